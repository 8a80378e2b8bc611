//! A GGUF file, served: weights, tokenizer and template all out of the one file.

use cluster_tests::{
    Client, TestCluster,
    process::{Baton, free_address},
    root,
};
use router::Policy;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What the two placements answer to a conversation, and to a prompt of tokens.
async fn answers(file: &str, mode: Policy, ids: &Value) -> anyhow::Result<(String, Vec<u64>)> {
    let cluster = TestCluster::new().model(root().join("tests/gguf").join(file)).placement(mode).start().await?;
    let chat = json!({
        "model": "test", "messages": [{"role": "user", "content": "Tell me a story."}],
        "temperature": 0, "max_tokens": 24, "ignore_eos": true,
    });
    let chat = cluster.client.post("/v1/chat/completions", &chat).await?;
    anyhow::ensure!(chat.status == 200, "{file}: {}", chat.text);
    let completion = json!({
        "model": "test", "prompt": ids, "temperature": 0, "max_tokens": 4, "ignore_eos": true, "return_token_ids": true,
    });
    let completion = cluster.client.post("/v1/completions", &completion).await?;
    anyhow::ensure!(completion.status == 200, "{file}: {}", completion.text);
    let tokens = serde_json::from_value(completion.json()["choices"][0]["token_ids"].clone())?;
    let text = chat.json()["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
    cluster.stop().await?;
    Ok((text, tokens))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_answer_the_same_through_a_hand_off() -> anyhow::Result<()> {
    for file in ["llama-q4_0", "qwen2-q8_0"] {
        let expected = std::fs::read(root().join(format!("tests/gguf/{file}.json")))?;
        let expected: Value = serde_json::from_slice(&expected)?;
        let prompt = &expected["prompts"][2];
        let logits: Vec<f64> = serde_json::from_value(prompt["logits"].clone())?;
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("logits");

        let file = format!("{file}.gguf");
        let (text, tokens) = answers(&file, Policy::Local, &prompt["ids"]).await?;
        assert_eq!(tokens[0], best as u64, "{file}");
        assert!(!text.is_empty(), "{file}");
        let remote = answers(&file, Policy::Remote, &prompt["ids"]).await?;
        assert_eq!(remote, (text, tokens), "{file}: a hand-off changes nothing");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_serves_a_file_under_its_name() -> anyhow::Result<()> {
    let address = free_address().to_string();
    let client = Client::new(format!("http://{address}"));
    let file = root().join("tests/gguf/qwen2-q8_0.gguf");
    let file = file.to_str().expect("a path in UTF-8");
    let mut baton = Baton::start(&["up", "--listen", &address, "--kv-memory", "16MiB", "--model", file]);
    baton.ready(&client, "/readyz", Duration::from_secs(20)).await;
    let models = client.get("/v1/models").await?.json();
    assert_eq!(models["data"][0]["id"], "qwen2-q8_0", "{models}");
    // The lines are printed a moment after the first probe succeeds.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !baton.output().contains("Q8_0 (gguf)") {
        anyhow::ensure!(Instant::now() < deadline, "the type of the weights is not printed: {}", baton.output());
        tokio::task::yield_now().await;
    }
    Ok(())
}
