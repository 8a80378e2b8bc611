//! A worker that dies: requests go on elsewhere, or end with a word.

use cluster_tests::{
    Client,
    client::chat_text,
    process::{Baton, free_address},
};
use serde_json::json;
use std::time::Duration;

use super::etcd::{Etcd, Worker, wait_for_fleet};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_the_death_of_a_decode_worker() -> anyhow::Result<()> {
    let etcd = Etcd::start();
    let url = etcd.endpoint();
    let address = free_address().to_string();
    let client = Client::new(format!("http://{address}"));
    let prefill = Worker::start("prefill-worker", "prefill-0", &url);
    let mut decodes = ["decode-0", "decode-1"].map(|name| Worker::start("decode-worker", name, &url)).into_iter();
    let router = ["router", "--listen", &address, "--etcd", &url, "--placement", "remote"];
    let mut router = Baton::start(&router);
    router.ready(&client, "/readyz", Duration::from_secs(30)).await;
    wait_for_fleet(&client, 3).await?;

    let request = json!({
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "temperature": 0, "ignore_eos": true, "max_tokens": 1500, "stream": true,
    });
    let whole = client.stream("/v1/chat/completions", &request).await?.collect().await?.0;
    let reference = chat_text(&whole);

    // What is drawn at random and must fit an expression goes on, too.
    let fitting = json!({
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}], "temperature": 1, "seed": 3,
        "structured_outputs": {"regex": "([a-z]{1,8} ){300}end"}, "max_tokens": 1500, "stream": true,
    });
    let fitting_reference = chat_text(&client.stream("/v1/chat/completions", &fitting).await?.collect().await?.0);
    assert!(fitting_reference.ends_with(" end"), "{fitting_reference:?}");

    // Eight streams over both decode workers; one worker dies while all of them run.
    let mut streams = Vec::new();
    for index in 0..8 {
        let (request, reference) = if index < 5 { (&request, &reference) } else { (&fitting, &fitting_reference) };
        let mut events = client.stream("/v1/chat/completions", request).await?;
        events.next().await?;
        streams.push((events, reference));
    }
    drop(decodes.next()); // SIGKILL
    for (events, reference) in streams {
        let (chunks, done) = events.collect().await?;
        assert!(done, "every stream ends with [DONE]");
        let text = chat_text(&chunks);
        let error = chunks.iter().find_map(|chunk| chunk["error"]["message"].as_str());
        assert!(error.is_none(), "one decode worker is left, so no stream may fail: {error:?}");
        assert!(text == *reference || reference.ends_with(&text), "the continuation is the same one: {text:?}");
    }
    let last = decodes.next().expect("two were started");
    super::cancel::pages_come_back(&last.admin).await?;
    super::cancel::pages_come_back(&prefill.admin).await?;

    // The last one dies too: the stream ends with a word, not in silence.
    let mut events = client.stream("/v1/chat/completions", &request).await?;
    events.next().await?;
    drop(last);
    let (chunks, done) = events.collect().await?;
    let error = chunks.iter().find_map(|chunk| chunk["error"]["message"].as_str());
    assert!(done && error.is_some_and(|message| !message.is_empty()), "{:?}", chunks.last());
    Ok(())
}
