//! `/v1/messages`: Anthropic's shapes around what chat completions say.

use cluster_tests::{TestCluster, client::chat_text};
use serde_json::{Value, json};

const QUESTION: &str = "What is a KV cache?";

fn ask(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_says_what_chat_says() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;
    let chat = json!({
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        "max_tokens": 60, "temperature": 0, "stream": true,
    });
    let expected = chat_text(&client.stream("/v1/chat/completions", &chat).await?.collect().await?.0);

    let system = json!({"system": [{"type": "text", "text": "Be brief."}]});
    let whole = client.post("/v1/messages", &ask(system.clone())).await?.json();
    assert_eq!(whole["content"], json!([{"type": "text", "text": expected}]));
    assert_eq!((whole["stop_reason"].as_str(), &whole["stop_sequence"]), (Some("end_turn"), &Value::Null));

    let counted = client.post("/v1/messages/count_tokens", &ask(system.clone())).await?.json();
    let read = |usage: &Value, name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("{name} in {usage}"));
    let prompt = |usage: &Value| read(usage, "input_tokens") + read(usage, "cache_read_input_tokens");
    assert_eq!(counted["input_tokens"].as_u64(), Some(prompt(&whole["usage"])));

    let mut streamed = ask(system);
    streamed["stream"] = true.into();
    let (events, done) = client.stream("/v1/messages", &streamed).await?.collect().await?;
    assert!(!done, "this stream has no [DONE]");
    let mut kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
    kinds.dedup();
    let order = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(kinds, order);
    let deltas: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(deltas, expected);
    assert_eq!(Some(prompt(&events[0]["message"]["usage"])), counted["input_tokens"].as_u64());
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"]["stop_reason"], "end_turn");
    assert_eq!(read(&end["usage"], "output_tokens"), read(&whole["usage"], "output_tokens"));
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_and_errors_are_in_its_words() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;
    let cut = client.post("/v1/messages", &ask(json!({"max_tokens": 2}))).await?.json();
    assert_eq!(cut["stop_reason"], "max_tokens");
    let stopped = client.post("/v1/messages", &ask(json!({"stop_sequences": ["cache"]}))).await?.json();
    assert_eq!(
        (stopped["stop_reason"].as_str(), stopped["stop_sequence"].as_str()),
        (Some("stop_sequence"), Some("cache"))
    );

    for (body, status, kind, words) in [
        (json!({"messages": [{"role": "user", "content": "x"}]}), 400, "invalid_request_error", "max_tokens"),
        (ask(json!({"messages": []})), 400, "invalid_request_error", "messages"),
        (ask(json!({"temperature": -1})), 400, "invalid_request_error", "temperature"),
        (ask(json!({"model": "nobody"})), 404, "not_found_error", "nobody"),
    ] {
        let refused = client.post("/v1/messages", &body).await?;
        let error = refused.json();
        assert_eq!((refused.status, error["error"]["type"].as_str()), (status, Some(kind)), "{error}");
        assert!(error["error"]["message"].as_str().is_some_and(|message| message.contains(words)), "{error}");
        assert_eq!(error["request_id"].as_str(), refused.headers["x-request-id"].to_str().ok());
    }
    cluster.stop().await
}
