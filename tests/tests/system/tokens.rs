//! `/tokenize` and `/detokenize` say what generation reads, and the endpoints that describe the server say what is there.

use cluster_tests::TestCluster;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_those_that_generation_reads() -> anyhow::Result<()> {
    let cluster = TestCluster::new().start().await?;
    let client = &cluster.client;

    let text = "A KV cache is the baton – naïve 🦊.";
    let asked = json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true});
    let tokens = client.post("/tokenize", &asked).await?.json();
    assert_eq!(tokens["count"].as_u64(), tokens["tokens"].as_array().map(|tokens| tokens.len() as u64));
    assert_eq!(tokens["token_strs"].as_array().map(Vec::len), tokens["tokens"].as_array().map(Vec::len));
    let back = client.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await?.json();
    assert_eq!(back["prompt"], text);

    let messages = json!([{"role": "user", "content": "What is a KV cache?"}]);
    let tokens = client.post("/tokenize", &json!({"messages": messages})).await?.json();
    assert_eq!(tokens["token_strs"], Value::Null);
    let ask = json!({"messages": messages, "max_tokens": 1, "return_token_ids": true});
    let answer = client.post("/v1/chat/completions", &ask).await?.json();
    assert_eq!(answer["prompt_token_ids"], tokens["tokens"]);
    let models = client.get("/v1/models").await?.json();
    assert_eq!(tokens["max_model_len"], models["data"][0]["max_model_len"]);

    let ask = json!({"prompt": "A KV cache", "max_tokens": 1, "return_token_ids": true});
    let answer = client.post("/v1/completions", &ask).await?.json();
    let tokens = client.post("/tokenize", &json!({"prompt": "A KV cache"})).await?.json();
    assert_eq!(answer["choices"][0]["prompt_token_ids"], tokens["tokens"]);

    for (path, body, status, words) in [
        ("/tokenize", json!({}), 400, "prompt"),
        ("/tokenize", json!({"prompt": 5}), 400, "5"),
        ("/tokenize", json!({"prompt": "x", "model": "nobody"}), 404, "nobody"),
        ("/detokenize", json!({}), 400, "tokens"),
        ("/detokenize", json!({"tokens": [1_000_000]}), 400, "1000000"),
    ] {
        let refused = client.post(path, &body).await?;
        assert_eq!(refused.status, status, "{body}: {}", refused.text);
        assert!(refused.text.contains(words), "{body}: {} lacks {words}", refused.text);
    }
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_describes_itself() -> anyhow::Result<()> {
    let cluster = TestCluster::new().workers(2, 1).start().await?;
    let client = &cluster.client;
    for method in ["GET", "POST"] {
        assert_eq!(client.request(method, "/ping").await?.status, 200);
    }
    let info = client.get("/server_info").await?.json();
    assert_eq!(info["workers"], json!({"prefill": 2, "decode": 1}));
    assert_eq!(info["models"], json!(["test"]));
    assert!(!info.to_string().contains("models/demo"), "no paths: {info}");

    assert_eq!(client.get("/load").await?.json()["server_load"], 0);
    let ask = json!({"prompt": "A", "max_tokens": 400, "ignore_eos": true, "stream": true});
    let mut events = client.stream("/v1/completions", &ask).await?;
    events.next().await?;
    assert_eq!(client.get("/load").await?.json()["server_load"], 1);
    drop(events);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while client.get("/load").await?.json()["server_load"] != 0 {
        anyhow::ensure!(tokio::time::Instant::now() < deadline, "a client that left still counts");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }

    let api = client.get("/openapi.json").await?.json();
    assert_eq!(api["openapi"], "3.1.0");
    let docs = client.get("/docs").await?;
    assert!(docs.text.contains("openapi.json") && !docs.text.contains("//cdn"), "the page stands alone");
    let card = client.get("/v1/models/test").await?.json();
    assert_eq!(
        (card["object"].as_str(), card["permission"][0]["allow_sampling"].as_bool()),
        (Some("model"), Some(true))
    );
    assert_eq!(client.get("/v1/models/nobody").await?.status, 404);
    cluster.stop().await
}
