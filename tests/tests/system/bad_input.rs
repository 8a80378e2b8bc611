//! Wrong input gets an answer that names the thing, and costs nobody else anything.

use cluster_tests::{
    TestCluster, demo_model,
    process::{Baton, free_address},
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let hi = json!([{"role": "user", "content": "hi"}]);
    let long = "word ".repeat(6000);
    let chat = "/v1/chat/completions";
    // (path, body, status, words the message must contain)
    let cases: Vec<(&str, Value, u16, &[&str])> = vec![
        (chat, json!({"model": "nope", "messages": hi}), 404, &["nope"]),
        (chat, json!({"messages": "hi"}), 400, &["messages"]),
        (chat, json!({"messages": []}), 400, &["messages"]),
        (chat, json!({}), 400, &["messages"]),
        (chat, json!({"messages": hi, "temperature": "hot"}), 400, &["temperature"]),
        (chat, json!({"messages": hi, "temperature": 9}), 400, &["temperature", "9"]),
        (chat, json!({"messages": hi, "top_p": 0}), 400, &["top_p"]),
        (chat, json!({"messages": hi, "max_tokens": -1}), 400, &["max_tokens"]),
        (chat, json!({"messages": hi, "n": 0}), 400, &["n"]),
        (chat, json!({"messages": hi, "stop": ["a", "b", "c", "d", "e"]}), 400, &["stop"]),
        (chat, json!({"messages": hi, "stream_options": {"include_usage": true}}), 400, &["stream_options"]),
        (chat, json!({"messages": hi, "logit_bias": {"99999999": 1}}), 400, &["99999999"]),
        (chat, json!({"messages": hi, "top_logprobs": 3}), 400, &["top_logprobs", "logprobs"]),
        (chat, json!({"messages": [{"role": "user", "content": long}]}), 400, &["4096"]),
        ("/v1/completions", json!({"prompt": [1, 2, 99_999_999]}), 400, &["99999999"]),
        ("/v1/completions", json!({"prompt": 5}), 400, &["prompt"]),
        ("/v1/completions", json!({"prompt": ""}), 400, &["prompt"]),
        ("/v1/nothing", json!({}), 404, &["/v1/nothing"]),
    ];
    for (path, body, status, words) in cases {
        let answer = cluster.client.post(path, &body).await?;
        let shown = body.to_string().chars().take(120).collect::<String>();
        assert_eq!(answer.status, status, "{path} {shown}: {}", answer.text);
        let message = answer.json()["error"]["message"].as_str().unwrap_or_default().to_string();
        for word in words {
            assert!(message.contains(word), "{path} {shown}: {message:?} does not name {word:?}");
        }
    }
    let answer = cluster.client.post_text(chat, "{\"messages\": [").await?;
    assert_eq!(answer.status, 400);
    assert!(answer.json()["error"]["message"].as_str().is_some_and(|m| m.contains("JSON")), "{}", answer.text);
    let answer = cluster.client.get(chat).await?;
    assert_eq!(answer.status, 405, "{}", answer.text);
    cluster.stop().await
}

/// Runs `baton` with arguments it must refuse. Returns what it printed.
async fn refusal(arguments: &[&str]) -> String {
    let (code, output) = Baton::start(arguments).exit(Duration::from_secs(20)).await;
    assert!(code.is_some_and(|code| code != 0), "{arguments:?} must fail, printed:\n{output}");
    assert!(!output.contains("panicked"), "{output}");
    output
}

fn assert_names(output: &str, words: &[&str]) {
    for word in words {
        assert!(output.contains(word), "{word:?} is not in:\n{output}");
    }
}

/// Copies the bundled model so that a test can break it.
fn broken_model(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        std::fs::copy(demo_model().join(name), dir.path().join(name)).expect("the bundled model can be copied");
    }
    change(dir.path());
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints() {
    assert_names(&refusal(&["up", "--listen", "127.0.0.1:0", "--model", "/no/such/model"]).await, &["/no/such/model"]);

    let truncated = broken_model(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).expect("the copy can be read");
        std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("the copy can be written");
    });
    let dir = truncated.path().to_str().expect("a utf-8 path");
    assert_names(&refusal(&["up", "--listen", "127.0.0.1:0", "--model", dir]).await, &["model.safetensors"]);

    let unsupported = broken_model(|dir| {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).expect("the copy can be read");
        std::fs::write(&path, text.replace("LlamaForCausalLM", "MambaForCausalLM")).expect("the copy can be written");
    });
    let dir = unsupported.path().to_str().expect("a utf-8 path");
    let output = refusal(&["up", "--listen", "127.0.0.1:0", "--model", dir]).await;
    assert_names(&output, &["config.json", "MambaForCausalLM", "LlamaForCausalLM"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let address = taken.local_addr().expect("a bound socket has an address").to_string();
    assert_names(&refusal(&["up", "--listen", &address]).await, &[&address, "--listen"]);

    let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
    std::fs::write(file.path(), "lisen = \"127.0.0.1:0\"\n").expect("it can be written");
    let path = file.path().to_str().expect("a utf-8 path");
    assert_names(&refusal(&["up", "--config", path]).await, &["lisen", path]);

    let address = free_address().to_string();
    assert_names(&refusal(&["up", "--listen", &address, "--decode", "0"]).await, &["decode"]);
    assert_names(&refusal(&["up", "--listen", &address, "--kv-memory", "lots"]).await, &["kv-memory", "lots"]);
    assert_names(&refusal(&["router", "--listen", &address, "--etcd", "not a url"]).await, &["etcd", "not a url"]);
}
