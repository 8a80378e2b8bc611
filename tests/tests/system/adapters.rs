//! LoRA adapters, from the start and at run time: each answers as its reference does wherever it is computed, beside the others,
//! and their prefixes never mix.

use cluster_tests::{Client, TestCluster, golden};
use futures::future::try_join_all;
use kv_transfer::TransportKind;
use router::Policy;
use serde_json::{Value, json};

/// Gap between the best two logits below which the reference's own choice is not binding (`tests/golden/README.md`).
const BINDING_GAP: f64 = 1e-2;

/// What clients ask for, and where its reference lies.
const MODELS: [(&str, &str); 3] =
    [("test", "llama"), ("qv", "llama/adapters/lora-qv"), ("all", "llama/adapters/lora-all")];

fn prompts(reference: &str) -> Vec<Value> {
    let text = std::fs::read(golden(reference).join("expected.json")).expect("the golden file is there");
    let expected: Value = serde_json::from_slice(&text).expect("the golden file is JSON");
    expected["prompts"].as_array().expect("prompts").clone()
}

fn request(model: &str, ids: &Value, max_tokens: u32) -> Value {
    json!({
        "model": model, "prompt": ids, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true,
    })
}

async fn complete(client: &Client, model: &str, prompt: &Value) -> anyhow::Result<Vec<u64>> {
    let answer = client.post("/v1/completions", &request(model, &prompt["ids"], 48)).await?;
    anyhow::ensure!(answer.status == 200, "{model} {}: {}", prompt["name"], answer.text);
    anyhow::ensure!(answer.json()["model"] == model, "{}", answer.text);
    Ok(serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone())?)
}

fn check(model: &str, prompt: &Value, output: &[u64]) {
    let reference: Vec<u64> = serde_json::from_value(prompt["greedy"].clone()).expect("tokens");
    let wrong = output.iter().zip(&reference).position(|(ours, theirs)| ours != theirs);
    let allowed = wrong.is_none_or(|at| prompt["greedy_gaps"][at].as_f64().is_some_and(|gap| gap <= BINDING_GAP));
    assert!(output.len() == 48 && allowed, "{model} {}: token {wrong:?} of {output:?}", prompt["name"]);
}

/// All models and prompts at once, so that steps hold several adapters and none.
async fn all_at_once(mode: Policy, transport: TransportKind) -> anyhow::Result<Vec<Vec<u64>>> {
    let cluster = TestCluster::new()
        .model(golden("llama"))
        .engine(|engine| engine.token_budget = 64) // long prompts travel in several chunks
        .adapter("qv", golden("llama/adapters/lora-qv"))
        .adapter("all", golden("llama/adapters/lora-all"))
        .placement(mode)
        .transport(transport)
        .start()
        .await?;
    let asked: Vec<(&str, Value)> = MODELS
        .iter()
        .flat_map(|&(model, reference)| prompts(reference).into_iter().map(move |prompt| (model, prompt)))
        .collect();
    let outputs = try_join_all(asked.iter().map(|(model, prompt)| complete(&cluster.client, model, prompt))).await?;
    for ((model, prompt), output) in asked.iter().zip(&outputs) {
        check(model, prompt, output);
    }
    cluster.stop().await?;
    Ok(outputs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_and_the_model_itself_answer_side_by_side_wherever_they_are_computed() -> anyhow::Result<()> {
    let local = all_at_once(Policy::Local, TransportKind::Memory).await?;
    assert_eq!(
        local,
        all_at_once(Policy::Remote, TransportKind::Memory).await?,
        "a hand-off in memory changes nothing"
    );
    assert_eq!(local, all_at_once(Policy::Remote, TransportKind::Tcp).await?, "a hand-off over tcp changes nothing");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefixes_of_different_adapters_never_mix() -> anyhow::Result<()> {
    for mode in [Policy::Local, Policy::Remote] {
        let cluster = TestCluster::new()
            .model(golden("llama"))
            .adapter("qv", golden("llama/adapters/lora-qv"))
            .adapter("same", golden("llama/adapters/lora-qv"))
            .adapter("all", golden("llama/adapters/lora-all"))
            .placement(mode)
            .start()
            .await?;
        let prompt = prompts("llama").pop().expect("prompts");
        let cached = async |model: &str| {
            // One token: the prefill worker has the last word on it.
            let answer = cluster.client.post("/v1/completions", &request(model, &prompt["ids"], 1)).await?;
            anyhow::ensure!(answer.status == 200, "{}", answer.text);
            anyhow::Ok(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number"))
        };
        for model in ["test", "qv", "all"] {
            assert_eq!(cached(model).await?, 0, "{mode:?} {model}: others' pages are not its own");
        }
        for model in ["test", "qv", "all"] {
            assert!(cached(model).await? > 200, "{mode:?} {model}: its own pages are");
        }
        assert!(cached("same").await? > 200, "{mode:?}: an adapter is its contents, whatever its name");
        cluster.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_come_and_go_while_requests_run() -> anyhow::Result<()> {
    let cluster = TestCluster::new().model(golden("llama")).placement(Policy::Remote).runtime_lora().start().await?;
    let client = &cluster.client;
    let names = async || {
        let list = client.get("/v1/models").await?.json();
        let models = list["data"].as_array().expect("models").iter();
        anyhow::Ok(models.map(|model| model["id"].as_str().expect("a name").to_owned()).collect::<Vec<_>>())
    };
    let dir = golden("llama/adapters/lora-all");
    let prompt = &prompts("llama/adapters/lora-all")[3];
    let missing = client.post("/v1/completions", &request("all", &prompt["ids"], 2)).await?;
    assert_eq!((missing.status, missing.json()["error"]["param"].as_str()), (404, Some("model")), "{}", missing.text);

    let load = json!({"lora_name": "all", "lora_path": dir});
    let loaded = client.post("/v1/load_lora_adapter", &load).await?;
    assert_eq!((loaded.status, loaded.text.as_str()), (200, "Success: LoRA adapter 'all' added successfully."));
    assert_eq!(names().await?, ["test", "all"]);
    let card = client.get("/v1/models/all").await?.json();
    assert_eq!((card["parent"].as_str(), card["root"].as_str()), (Some("test"), dir.to_str()), "{card}");
    check("all", prompt, &complete(client, "all", prompt).await?);

    let again = client.post("/v1/load_lora_adapter", &load).await?;
    assert_eq!(again.status, 400, "{}", again.text);
    assert!(again.text.contains("worker prefill-0: adapter `all` is loaded already"), "{}", again.text);

    // A stream that began with it ends with it. It is long, so that it still runs when it is looked for.
    let mut streaming = request("all", &prompt["ids"], 900);
    streaming["stream"] = true.into();
    let mut events = client.stream("/v1/completions", &streaming).await?;
    let first = events.next().await?.expect("a first token");
    let metrics = client.get("/metrics").await?.text;
    let in_use = "vllm:lora_requests_info{max_lora=\"1\",waiting_lora_adapters=\"\",running_lora_adapters=\"all\"} ";
    assert!(metrics.contains(in_use), "{metrics}");
    let unload = json!({"lora_name": "all"});
    let unloaded = client.post("/v1/unload_lora_adapter", &unload).await?;
    assert_eq!((unloaded.status, unloaded.text.as_str()), (200, "Success: LoRA adapter 'all' removed successfully."));
    let refused = client.post("/v1/completions", &request("all", &prompt["ids"], 2)).await?;
    assert_eq!(refused.status, 404, "{}", refused.text);
    assert_eq!(names().await?, ["test"]);
    let (chunks, done) = events.collect().await?;
    let ids = |chunk: &Value| {
        serde_json::from_value::<Vec<u64>>(chunk["choices"][0]["token_ids"].clone()).unwrap_or_default()
    };
    let output: Vec<u64> = [serde_json::from_str(&first)?].iter().chain(&chunks).flat_map(ids).collect();
    assert!(done && output.len() == 900, "{done} {}", output.len());
    check("all", prompt, &output[..48]);

    let gone = client.post("/v1/unload_lora_adapter", &unload).await?;
    assert_eq!(gone.status, 404, "{}", gone.text);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_loaded_is_named_with_the_worker_that_said_so() -> anyhow::Result<()> {
    let cluster = TestCluster::new().model(golden("llama")).runtime_lora().start().await?;
    let load = async |name: &str, path: Value| {
        cluster.client.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).await
    };
    let check = |answer: cluster_tests::client::Answer, status: u16, words: &[&str]| {
        assert_eq!(answer.status, status, "{}", answer.text);
        for word in words {
            assert!(answer.text.contains(word), "{} lacks {word:?}", answer.text);
        }
    };
    check(
        load("a", "/nowhere".into()).await?,
        404,
        &["worker prefill-0", "worker decode-0", "/nowhere: no such directory"],
    );
    let other = golden("qwen2/adapters/lora-all").display().to_string();
    check(
        load("a", other.into()).await?,
        400,
        &["worker decode-0", "adapter_model.safetensors", "[192, 8]", "[160, 8]"],
    );
    check(load("test", "/nowhere".into()).await?, 400, &["lora_name", "test"]);
    check(load("", "/nowhere".into()).await?, 400, &["lora_name"]);
    check(load("a", 7.into()).await?, 400, &["lora_path", "7"]);
    check(load("a", Value::Null).await?, 400, &["lora_path"]);
    assert_eq!(cluster.client.get("/v1/models").await?.json()["data"].as_array().map(Vec::len), Some(1));
    cluster.stop().await?;

    let closed = TestCluster::new().model(golden("llama")).start().await?;
    let body = json!({"lora_name": "a", "lora_path": "/nowhere"});
    check(closed.client.post("/v1/load_lora_adapter", &body).await?, 404, &["--runtime-lora"]);
    closed.stop().await
}
