//! The life of one request, as a walk through the system. Newcomers run it under a debugger.

use cluster_tests::{
    Client, TestCluster,
    client::chat_text,
    process::{Baton, free_address},
};
use kv_transfer::TransportKind;
use router::Policy;
use serde_json::json;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_goes_through_router_prefill_handoff_and_decode() -> anyhow::Result<()> {
    // One prefill worker, one decode worker, a router; pages must travel over tcp although all live in one process.
    let cluster = TestCluster::new().transport(TransportKind::Tcp).placement(Policy::Remote).start().await?;
    let client = &cluster.client;

    // The router renders the template, tokenises, hashes the pages and picks a (prefill, decode) pair. Both legs open at
    // once; the prefill worker computes the prompt, emits token 0 and pushes the pages; decode goes on from there.
    let request = json!({
        "model": "test",
        "messages": [{"role": "user", "content": "What is a KV cache?"}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let (chunks, done) = client.stream("/v1/chat/completions", &request).await?.collect().await?;

    // The client sees one stream: the role first, then text, one finish reason, usage, and the end mark.
    assert!(done, "the stream ends with [DONE]");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text = chat_text(&chunks);
    assert!(text.contains("cache"), "an answer about caches, not {text:?}");
    let reasons: Vec<_> = chunks.iter().filter_map(|c| c["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(reasons, ["stop"]);
    let usage = &chunks.last().expect("chunks came")["usage"];
    assert!(usage["prompt_tokens"].as_u64() > Some(0) && usage["completion_tokens"].as_u64() > Some(1), "{usage}");

    // The hand-off happened, over the transport that was asked for, and the pages of both sides are given back.
    let landed = client.metric("baton_handoffs_total", &["side=\"target\"", "outcome=\"landed\"", "tcp"]).await?;
    assert!(landed >= 1.0, "{landed} hand-offs landed");
    super::cancel::pages_come_back(client).await?;

    // The same words without streaming are the same words.
    let mut whole = request.clone();
    whole["stream"] = json!(false);
    whole.as_object_mut().expect("an object").remove("stream_options");
    let answer = client.post("/v1/chat/completions", &whole).await?.json();
    assert_eq!(answer["choices"][0]["message"]["content"], text.as_str());
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_one_token_leaves_its_pages_where_they_are() -> anyhow::Result<()> {
    // A process of its own, because all clusters of this one count together.
    let address = free_address().to_string();
    let mut baton = Baton::start(&["up", "--listen", &address, "--placement", "remote", "--kv-memory", "64MiB"]);
    let client = Client::new(format!("http://{address}"));
    baton.ready(&client, "/readyz", Duration::from_secs(30)).await;
    // The first hand-off brings the link up.
    for (tokens, landed, forgone) in [(2, 1.0, 0.0), (1, 1.0, 1.0)] {
        let request = json!({"prompt": "What is a KV cache?", "temperature": 0, "max_tokens": tokens});
        let answer = client.post("/v1/completions", &request).await?.json();
        assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{answer}");

        // The target is told by its source and by its router. Whichever comes first, nothing lands.
        super::cancel::pages_come_back(&client).await?;
        for (labels, count) in [
            (["side=\"source\"", "outcome=\"forgone\""], forgone),
            (["side=\"source\"", "outcome=\"landed\""], landed),
            (["side=\"target\"", "outcome=\"landed\""], landed),
        ] {
            assert_eq!(client.metric("baton_handoffs_total", &labels).await?, count, "{tokens} tokens: {labels:?}");
        }
    }
    Ok(())
}
