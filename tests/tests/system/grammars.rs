//! Constraints through the whole cluster: what they promise holds, wherever it is computed, and what is wrong with them is said.

use cluster_tests::{TestCluster, golden};
use router::Policy;
use serde_json::{Value, json};

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
            "place": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["name", "tags", "place"],
        "additionalProperties": false,
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
            "required": ["x"], "additionalProperties": false}},
    })
}

/// Checks by hand what the schema says.
fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(value.as_object().expect("an object").len(), 3, "{text}");
    assert!(value["name"].as_str().expect("a string").chars().count() <= 12, "{text}");
    let tags = value["tags"].as_array().expect("a list");
    assert!(
        (1..=3).contains(&tags.len())
            && tags.iter().all(|tag| ["red", "green", "blue"].contains(&tag.as_str().expect("a string"))),
        "{text}"
    );
    let place = &value["place"];
    assert!(place.is_null() || (-9..=9).contains(&place["x"].as_i64().expect("an integer")), "{text}");
}

/// Looks at the text of an answer.
type Check = fn(&str);

/// The requests of the comparison: every kind of constraint, with other rules of sampling beside it.
fn requests() -> Vec<(Value, Check)> {
    let chat = |constraint: Value| {
        let mut request = json!({
            "model": "test", "messages": [{"role": "user", "content": "Describe a fox."}],
            "temperature": 1.0, "seed": 11, "n": 2, "max_tokens": 200,
        });
        request.as_object_mut().expect("an object").extend(constraint.as_object().expect("an object").clone());
        request
    };
    let tight = json!({"json": schema(), "disable_any_whitespace": true});
    let named = json!({"type": "json_schema", "json_schema": {"name": "fox", "strict": true, "schema": schema()}});
    vec![
        (chat(json!({"structured_outputs": tight})), check),
        (chat(json!({"response_format": named, "frequency_penalty": 0.3, "top_p": 0.95})), check),
        (chat(json!({"structured_outputs": {"regex": "[a-z]{2,6}(-[0-9]{1,3}){2}"}})), |text| {
            let mut parts = text.split('-');
            assert!(parts.next().is_some_and(|word| (2..=6).contains(&word.len())), "{text}");
            assert_eq!(parts.filter(|part| part.parse::<u16>().is_ok()).count(), 2, "{text}");
        }),
        (chat(json!({"structured_outputs": {"choice": ["yes", "no", "perhaps"]}, "min_p": 0.01})), |text| {
            assert!(["yes", "no", "perhaps"].contains(&text), "{text}");
        }),
        (
            chat(
                json!({"guided_grammar": "root ::= \"<\" item (\",\" item){1,3} \">\"\nitem ::= [a-f]{2}", "bad_words": ["a"]}),
            ),
            |text| {
                assert!(text.starts_with('<') && text.ends_with('>') && text.len() <= 13, "{text}");
            },
        ),
    ]
}

async fn texts(model: &str, mode: Policy) -> anyhow::Result<Vec<String>> {
    let cluster = TestCluster::new().model(golden(model)).placement(mode).start().await?;
    let mut texts = Vec::new();
    for (request, check) in requests() {
        let answer = cluster.client.post("/v1/chat/completions", &request).await?;
        anyhow::ensure!(answer.status == 200, "{request}: {}", answer.text);
        for choice in answer.json()["choices"].as_array().expect("choices") {
            let text = choice["message"]["content"].as_str().expect("a text").to_owned();
            // A limit may cut it off, but not within these bounds unless it only makes blanks.
            if choice["finish_reason"] == "stop" {
                check(&text);
            }
            texts.push(format!("{}: {text}", choice["finish_reason"]));
        }
    }
    cluster.stop().await?;
    Ok(texts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_fit_wherever_they_are_computed() -> anyhow::Result<()> {
    for model in ["qwen2", "llama3"] {
        let local = texts(model, Policy::Local).await?;
        let remote = texts(model, Policy::Remote).await?;
        assert_eq!(local, remote, "{model}: a hand-off changes nothing");
        let whole = local.iter().filter(|text| text.starts_with("\"stop\"")).count();
        assert!(whole * 10 >= local.len() * 8, "{model}: {local:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allowed_tokens_and_bad_words_hold() -> anyhow::Result<()> {
    let cluster = TestCluster::new().model(golden("qwen2")).start().await?;
    let ids = async |rules: Value| -> anyhow::Result<Vec<u64>> {
        let mut request = json!({"model": "test", "prompt": "a fox", "max_tokens": 40, "temperature": 1.0, "seed": 5, "return_token_ids": true, "ignore_eos": true});
        request.as_object_mut().expect("an object").extend(rules.as_object().expect("an object").clone());
        let answer = cluster.client.post("/v1/completions", &request).await?;
        anyhow::ensure!(answer.status == 200, "{}", answer.text);
        Ok(serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone())?)
    };
    let allowed = ids(json!({"allowed_token_ids": [40, 41, 42]})).await?;
    assert_eq!(allowed.len(), 40);
    assert!(allowed.iter().all(|id| (40..43).contains(id)), "{allowed:?}");
    // `"` is token 1 and stands alone; words that begin with it are other tokens.
    let banned = ids(json!({"allowed_token_ids": [1, 40], "bad_words": ["\""]})).await?;
    assert!(banned.iter().all(|id| *id == 40), "{banned:?}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_a_clear_error() -> anyhow::Result<()> {
    let cluster = TestCluster::new().model(golden("qwen2")).start().await?;
    let cases = [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}}),
            "response_format",
            "strin",
        ),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "must be an object"),
        (json!({"structured_outputs": {"json": {"not": {}}}}), "structured_outputs", "not"),
        (
            json!({"structured_outputs": {"json": {"$ref": "http://example.com/x"}}}),
            "structured_outputs",
            "example.com",
        ),
        (json!({"structured_outputs": {"regex": "(a"}}), "structured_outputs", "unclosed group"),
        (json!({"structured_outputs": {"regex": "x".repeat(9000)}}), "structured_outputs", "8192"),
        (json!({"structured_outputs": {"grammar": "start: nowhere"}}), "structured_outputs", "nowhere"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs", "no choice"),
        (json!({"structured_outputs": {"regex": "a", "json": {}}}), "structured_outputs", "one of"),
        (json!({"guided_json": "{", "stream": true}), "guided_json", "JSON"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids", "empty"),
        (json!({"allowed_token_ids": [99999]}), "allowed_token_ids", "99999"),
        (json!({"bad_words": [""]}), "bad_words", "empty"),
        (json!({"bad_words": "x"}), "bad_words", "list"),
    ];
    for (rules, param, words) in cases {
        let mut request = json!({"model": "test", "prompt": "x", "max_tokens": 4});
        request.as_object_mut().expect("an object").extend(rules.as_object().expect("an object").clone());
        let answer = cluster.client.post("/v1/completions", &request).await?;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{rules}: {}", answer.text);
        assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{rules}: {}", answer.text);
    }
    // Found out at the first draw only.
    let request = json!({"model": "test", "prompt": "x", "max_tokens": 4, "allowed_token_ids": [40],
        "structured_outputs": {"choice": ["yes"]}});
    let answer = cluster.client.post("/v1/completions", &request).await?;
    assert_eq!(answer.status, 400, "{}", answer.text);
    assert!(answer.text.contains("the grammar, allowed_token_ids leave none"), "{}", answer.text);
    cluster.stop().await
}
