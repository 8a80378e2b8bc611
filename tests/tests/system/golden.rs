//! Disaggregated equals local equals the recorded reference, token for token.

use cluster_tests::{TestCluster, golden};
use kv_transfer::TransportKind;
use router::Policy;
use serde_json::{Value, json};

const FAMILIES: [&str; 15] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "cohere",
    "olmo2",
    "gptneox",
    "mixtral",
    "qwen3moe",
    "deepseek_v2",
    "deepseek_v3",
];

const QUANTISED: [&str; 6] = [
    "llama-gptq-int4-g32",
    "llama-gptq-int4-g32-actorder",
    "llama-awq-int4-g32",
    "llama-fp8-tensor",
    "llama-fp8-channel",
    "llama-int8-w8a8",
];

/// Returns which prompts of a directory hold for our arithmetic, and the gap between the best two logits below which the reference's
/// own choice is not binding (`tests/golden/README.md`): some quantised weights meet quantised inputs.
fn recorded(directory: &str) -> (&'static str, f64) {
    match directory {
        "llama-int8-w8a8" => ("prompts_actquant", 0.3),
        // Inputs are bf16 on some processors.
        "llama-fp8-tensor" | "llama-fp8-channel" => ("prompts", 0.3),
        _ => ("prompts", 1e-2),
    }
}

async fn continuations(family: &str, mode: Policy, transport: TransportKind) -> anyhow::Result<Vec<Vec<u64>>> {
    let cluster = TestCluster::new()
        .model(golden(family))
        .engine(|engine| engine.token_budget = 64) // long prompts travel in several chunks
        .placement(mode)
        .transport(transport)
        .start()
        .await?;
    let mut outputs = Vec::new();
    for prompt in expected(family)?["prompts"].as_array().expect("prompts") {
        let request = json!({
            "model": "test", "prompt": prompt["ids"], "max_tokens": 48, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true, "logprobs": 1,
        });
        let answer = cluster.client.post("/v1/completions", &request).await?;
        anyhow::ensure!(answer.status == 200, "{family} {}: {}", prompt["name"], answer.text);
        let ids = answer.json()["choices"][0]["token_ids"].clone();
        outputs.push(serde_json::from_value(ids)?);
    }
    cluster.stop().await?;
    Ok(outputs)
}

fn expected(family: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(golden(family).join("expected.json"))?)?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_family_continues_as_the_reference_does() -> anyhow::Result<()> {
    for family in FAMILIES.into_iter().chain(QUANTISED) {
        let local = continuations(family, Policy::Local, TransportKind::Memory).await?;
        let memory = continuations(family, Policy::Remote, TransportKind::Memory).await?;
        let shm = continuations(family, Policy::Remote, TransportKind::Shm).await?;
        let tcp = continuations(family, Policy::Remote, TransportKind::Tcp).await?;
        assert_eq!(local, memory, "{family}: a hand-off in memory changes nothing");
        assert_eq!(local, shm, "{family}: a hand-off through shared memory changes nothing");
        assert_eq!(local, tcp, "{family}: a hand-off over tcp changes nothing");

        let (prompts, binding_gap) = recorded(family);
        for (prompt, output) in expected(family)?[prompts].as_array().expect("prompts").iter().zip(&local) {
            let reference: Vec<u64> = serde_json::from_value(prompt["greedy"].clone())?;
            let gaps: Vec<f64> = serde_json::from_value(prompt["greedy_gaps"].clone())?;
            assert_eq!(output.len(), reference.len(), "{family} {}", prompt["name"]);
            let wrong = output.iter().zip(&reference).position(|(ours, theirs)| ours != theirs);
            let allowed = wrong.is_none_or(|at| gaps[at] <= binding_gap);
            assert!(allowed, "{family} {}: token {wrong:?} of {output:?} is not {reference:?}", prompt["name"]);
        }
    }
    Ok(())
}

/// Every directory with recorded prompts, by name.
fn directories() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(golden(""))? {
        let entry = entry?;
        if entry.path().join("expected.json").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Starts the cluster and asks for the continuation of every recorded prompt, `rounds` times: token ids and log-probabilities.
async fn answers(directory: &str, cluster: TestCluster, rounds: usize) -> anyhow::Result<Vec<Vec<[Value; 2]>>> {
    let cluster = cluster.model(golden(directory)).start().await?;
    let expected = expected(directory)?;
    let mut all = Vec::new();
    for round in 0..rounds {
        let mut answers = Vec::new();
        for prompt in expected["prompts"].as_array().expect("prompts") {
            let request = json!({
                "model": "test", "prompt": prompt["ids"], "max_tokens": 48, "temperature": 0,
                "ignore_eos": true, "return_token_ids": true, "logprobs": 3,
            });
            let answer = cluster.client.post("/v1/completions", &request).await?;
            anyhow::ensure!(answer.status == 200, "{directory} {} {round}: {}", prompt["name"], answer.text);
            let choice = &answer.json()["choices"][0];
            answers.push([choice["token_ids"].clone(), choice["logprobs"].clone()]);
        }
        all.push(answers);
    }
    cluster.stop().await?;
    Ok(all)
}

/// Prefill in chunks of five tokens, each a page of its own; then once more with the prefixes cached on both sides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_tokens_at_a_time_and_a_warm_cache_change_no_bit() -> anyhow::Result<()> {
    for directory in directories()? {
        let whole = TestCluster::new().engine(|engine| engine.token_budget = 512).placement(Policy::Local);
        let whole = answers(&directory, whole, 1).await?;
        let chunks = TestCluster::new()
            .engine(|engine| {
                // Chunks end with pages, and a step has room for one page and one token.
                (engine.page_tokens, engine.token_budget) = (5, 6);
            })
            .placement(Policy::Remote);
        let chunks = answers(&directory, chunks, 2).await?;
        assert_eq!(chunks[0], whole[0], "{directory}: chunks and a hand-off changed something");
        assert_eq!(chunks[1], whole[0], "{directory}: a warm cache changed something");
    }
    Ok(())
}

/// Seeds fix the draws, so also a sampled continuation does not depend on where it was computed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sampled_tokens_do_not_depend_on_the_placement() -> anyhow::Result<()> {
    let mut texts = Vec::new();
    for mode in [Policy::Local, Policy::Remote] {
        let cluster = TestCluster::new().placement(mode).start().await?;
        let request = json!({
            "model": "test", "messages": [{"role": "user", "content": "Tell me a story about a brave fox."}],
            "temperature": 1.2, "top_p": 0.95, "seed": 7, "n": 2, "max_tokens": 60,
        });
        let answer = cluster.client.post("/v1/chat/completions", &request).await?.json();
        let both: Vec<String> = answer["choices"]
            .as_array()
            .expect("choices")
            .iter()
            .map(|choice| choice["message"]["content"].to_string())
            .collect();
        assert_ne!(both[0], both[1], "two choices draw apart");
        texts.push(both);
        cluster.stop().await?;
    }
    assert_eq!(texts[0], texts[1]);
    Ok(())
}
