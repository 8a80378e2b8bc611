//! Log-probabilities of the prompt itself: as the reference recorded them, wherever and in whatever pieces it is computed.

use cluster_tests::{TestCluster, golden};
use router::Policy;
use serde_json::{Value, json};

/// From `tests/golden/README.md`.
const TOLERANCE: f64 = 2e-3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_is_reported_as_the_reference_recorded_it() -> anyhow::Result<()> {
    let expected: Value = serde_json::from_slice(&std::fs::read(golden("llama").join("expected.json"))?)?;
    let prompt = &expected["prompts"].as_array().expect("prompts")[4];
    let ids: Vec<u64> = serde_json::from_value(prompt["ids"].clone())?;
    assert!(ids.len() > 64, "it takes several chunks");
    let mut seen = Vec::new();
    for mode in [Policy::Local, Policy::Remote] {
        let cluster = TestCluster::new()
            .model(golden("llama"))
            .engine(|engine| engine.token_budget = 64)
            .placement(mode)
            .start()
            .await?;
        let ask = async |more: Value| {
            let mut request = json!({"model": "test", "prompt": ids, "max_tokens": 3, "temperature": 0});
            request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            let answer = cluster.client.post("/v1/completions", &request).await?;
            anyhow::ensure!(answer.status == 200, "{}", answer.text);
            anyhow::Ok(answer.json()["choices"][0].clone())
        };
        let first = ask(json!({"prompt_logprobs": 2})).await?;
        check(&first["prompt_logprobs"], &ids, &prompt["prompt_logprobs"]);
        // Now the prompt is cached, and computed all the same.
        let again = ask(json!({"prompt_logprobs": 2})).await?;
        assert_eq!(again, first);
        assert!(ask(json!({})).await?["prompt_logprobs"].is_null());

        // An echoed prompt with log-probabilities, with and without an answer behind it, whole and streamed.
        let echo = ask(json!({"echo": true, "logprobs": 1})).await?;
        let logprobs = &echo["logprobs"];
        assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(ids.len() + 3));
        assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
        let listed = first["prompt_logprobs"][5][ids[5].to_string()]["logprob"].as_f64().expect("a number");
        assert_eq!(logprobs["token_logprobs"][5].as_f64(), Some(listed));
        let alone = ask(json!({"echo": true, "logprobs": 1, "max_tokens": 0})).await?;
        assert_eq!(alone["logprobs"]["tokens"].as_array().map(Vec::len), Some(ids.len()));
        assert!(echo["text"].as_str().expect("text").starts_with(alone["text"].as_str().expect("text")));
        let request = json!({"model": "test", "prompt": ids, "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1, "stream": true});
        let (chunks, done) = cluster.client.stream("/v1/completions", &request).await?.collect().await?;
        assert!(done);
        let streamed: Vec<Value> = chunks
            .iter()
            .flat_map(|chunk| chunk["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default())
            .collect();
        assert_eq!(json!(streamed), logprobs["token_logprobs"]);
        seen.push((first, echo));
        cluster.stop().await?;
    }
    assert_eq!(seen[0], seen[1], "a hand-off changes nothing");
    Ok(())
}

fn check(listed: &Value, ids: &[u64], reference: &Value) {
    let listed = listed.as_array().expect("a list");
    assert_eq!(listed.len(), ids.len());
    assert!(listed[0].is_null());
    for (at, candidates) in listed.iter().enumerate().skip(1) {
        let own = &candidates[ids[at].to_string()];
        let difference = (own["logprob"].as_f64().expect("a number") - reference[at].as_f64().expect("a number")).abs();
        assert!(difference <= TOLERANCE, "position {at} differs by {difference}");
        let count = candidates.as_object().expect("an object").len();
        assert_eq!(count, if own["rank"].as_u64().expect("a rank") <= 2 { 2 } else { 3 }, "{candidates}");
        assert!(own["decoded_token"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_reports_its_prompt_too() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let request = json!({
        "model": "test", "max_tokens": 4, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": true,
        "messages": [{"role": "user", "content": "What is a KV cache?"}],
    });
    let answer = cluster.client.post("/v1/chat/completions", &request).await?.json();
    let (ids, listed) = (&answer["prompt_token_ids"], answer["prompt_logprobs"].as_array().expect("a list"));
    assert_eq!(listed.len(), ids.as_array().expect("ids").len());
    assert!(listed[0].is_null() && listed[1..].iter().all(|one| one.as_object().is_some_and(|one| one.len() == 1)));
    assert!(listed[1][ids[1].to_string()]["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0));
    cluster.stop().await
}
