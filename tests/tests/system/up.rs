//! `baton up`, the binary, as a newcomer starts it.

use cluster_tests::{
    Client,
    client::chat_text,
    process::{Baton, free_address},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_answers_the_curl_it_prints_and_drains() -> anyhow::Result<()> {
    let address = free_address().to_string();
    let client = Client::new(format!("http://{address}"));
    let mut baton = Baton::start(&["up", "--listen", &address, "--kv-memory", "64MiB"]);
    baton.ready(&client, "/readyz", Duration::from_secs(20)).await;

    let models = client.get("/v1/models").await?.json();
    let model = models["data"][0]["id"].as_str().expect("a model is listed").to_string();
    let request = json!({
        "model": model, "stream": true, "temperature": 0,
        "messages": [{"role": "user", "content": "What is a KV cache?"}],
    });
    let (chunks, done) = client.stream("/v1/chat/completions", &request).await?.collect().await?;
    assert!(done && chat_text(&chunks).contains("cache"), "{chunks:?}");
    assert!(baton.output().contains("curl") && baton.output().contains(&address), "{}", baton.output());

    // A stream that has begun is finished; then the process leaves by itself.
    let story = json!({
        "model": model, "stream": true, "temperature": 0, "ignore_eos": true, "max_tokens": 300,
        "messages": [{"role": "user", "content": "Tell me a story."}],
    });
    let mut events = client.stream("/v1/chat/completions", &story).await?;
    events.next().await?;
    baton.signal("INT");
    let (chunks, done) = events.collect().await?;
    assert!(done, "the stream goes on through the drain");
    assert_eq!(chunks.iter().filter_map(|c| c["choices"][0]["finish_reason"].as_str()).next_back(), Some("length"));
    let (code, output) = baton.exit(Duration::from_secs(15)).await;
    assert_eq!(code, Some(0), "{output}");
    Ok(())
}
