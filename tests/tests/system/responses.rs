//! `/v1/responses`: what it says is what chat completions say, whole, streamed, stored and in the background.

use cluster_tests::{TestCluster, client::chat_text};
use serde_json::{Value, json};
use std::time::Duration;

const QUESTION: &str = "What is a KV cache?";

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_says_what_chat_says_and_can_be_gone_on_from() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;
    let chat = async |messages: Value| {
        let ask = json!({"messages": messages, "temperature": 0, "stream": true});
        anyhow::Ok(chat_text(&client.stream("/v1/chat/completions", &ask).await?.collect().await?.0))
    };
    let expected = chat(json!([{"role": "user", "content": QUESTION}])).await?;

    let ask = json!({"input": QUESTION, "temperature": 0, "metadata": {"a": "b"}});
    let first = client.post("/v1/responses", &ask).await?.json();
    assert_eq!((first["status"].as_str(), text(&first)), (Some("completed"), expected.as_str()));
    assert_eq!(first["metadata"], json!({"a": "b"}));
    let usage = &first["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(usage["input_tokens"].as_u64().unwrap_or_default() + usage["output_tokens"].as_u64().unwrap_or_default())
    );

    // Stored, read again, gone on from, deleted.
    let id = first["id"].as_str().expect("an id");
    assert_eq!(client.get(&format!("/v1/responses/{id}")).await?.json(), first);
    let next = json!({"input": "And plus 3?", "previous_response_id": id, "instructions": "Be brief.", "temperature": 0, "store": false});
    let second = client.post("/v1/responses", &next).await?.json();
    let conversation = json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": expected}, {"role": "user", "content": "And plus 3?"},
    ]);
    assert_eq!(text(&second), chat(conversation).await?);
    assert_eq!(second["previous_response_id"], id);
    let unstored = second["id"].as_str().expect("an id");
    assert_eq!(client.get(&format!("/v1/responses/{unstored}")).await?.status, 404);
    assert_eq!(client.request("DELETE", &format!("/v1/responses/{id}")).await?.json()["deleted"], true);
    assert_eq!(client.request("DELETE", &format!("/v1/responses/{id}")).await?.status, 404);
    let lost = client.post("/v1/responses", &next).await?;
    assert_eq!((lost.status, lost.json()["error"]["param"].as_str()), (400, Some("previous_response_id")));

    let cut = client.post("/v1/responses", &json!({"input": QUESTION, "max_output_tokens": 2})).await?.json();
    assert_eq!(
        (cut["status"].as_str(), cut["incomplete_details"]["reason"].as_str()),
        (Some("incomplete"), Some("max_output_tokens"))
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_builds_the_response_up_in_numbered_events() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;
    let ask = |stream: bool| json!({"input": QUESTION, "temperature": 0, "stream": stream});
    let whole = client.post("/v1/responses", &ask(false)).await?.json();
    let (events, done) = client.stream("/v1/responses", &ask(true)).await?.collect().await?;
    assert!(!done, "this stream has no [DONE]");
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"].as_u64(), Some(number as u64));
    }
    let mut kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
    kinds.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds, expected);
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas, text(&whole));
    let last = &events[events.len() - 1]["response"];
    assert_eq!((text(last), &last["usage"]["output_tokens"]), (text(&whole), &whole["usage"]["output_tokens"]));
    let id = last["id"].as_str().expect("an id");
    assert_eq!(client.get(&format!("/v1/responses/{id}")).await?.json(), *last);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_in_the_background_is_asked_for_or_cancelled() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;
    let ended = async |id: &str| {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let response = client.get(&format!("/v1/responses/{id}")).await?.json();
            if response["status"] != "in_progress" {
                return anyhow::Ok(response);
            }
            anyhow::ensure!(tokio::time::Instant::now() < deadline, "still {response}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let begun =
        client.post("/v1/responses", &json!({"input": QUESTION, "background": true, "temperature": 0})).await?.json();
    assert_eq!(begun["status"], "in_progress");
    let id = begun["id"].as_str().expect("an id");
    let done = ended(id).await?;
    assert!(done["status"] == "completed" && text(&done).contains("cache"), "{done}");
    assert_eq!(client.request("POST", &format!("/v1/responses/{id}/cancel")).await?.json(), done, "too late");

    let long = json!({"input": "Tell me a story.", "background": true, "ignore_eos": true});
    let begun = client.post("/v1/responses", &long).await?.json();
    let id = begun["id"].as_str().expect("an id");
    let cancelled = client.request("POST", &format!("/v1/responses/{id}/cancel")).await?.json();
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(ended(id).await?["status"], "cancelled");

    let plain = client.post("/v1/responses", &json!({"input": "Hi", "max_output_tokens": 1})).await?.json();
    let refused =
        client.request("POST", &format!("/v1/responses/{}/cancel", plain["id"].as_str().expect("an id"))).await?;
    assert_eq!(refused.status, 400, "{}", refused.text);
    assert_eq!(client.request("POST", "/v1/responses/resp_none/cancel").await?.status, 404);
    cluster.stop().await
}
