//! Disaggregated equals local equals the recorded reference, token for token.

use cluster_tests::{TestCluster, golden};
use kv_transfer::TransportKind;
use router::Policy;
use serde_json::{Value, json};

const FAMILIES: [&str; 5] = ["llama", "llama3", "mistral", "qwen2", "qwen3"];

/// Gap between the best two logits below which the reference's own choice is not binding (`tests/golden/README.md`).
const BINDING_GAP: f64 = 1e-2;

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
    for family in FAMILIES {
        let local = continuations(family, Policy::Local, TransportKind::Memory).await?;
        let memory = continuations(family, Policy::Remote, TransportKind::Memory).await?;
        let tcp = continuations(family, Policy::Remote, TransportKind::Tcp).await?;
        assert_eq!(local, memory, "{family}: a hand-off in memory changes nothing");
        assert_eq!(local, tcp, "{family}: a hand-off over tcp changes nothing");

        for (prompt, output) in expected(family)?["prompts"].as_array().expect("prompts").iter().zip(&local) {
            let reference: Vec<u64> = serde_json::from_value(prompt["greedy"].clone())?;
            let gaps: Vec<f64> = serde_json::from_value(prompt["greedy_gaps"].clone())?;
            assert_eq!(output.len(), reference.len(), "{family} {}", prompt["name"]);
            let wrong = output.iter().zip(&reference).position(|(ours, theirs)| ours != theirs);
            let allowed = wrong.is_none_or(|at| gaps[at] <= BINDING_GAP);
            assert!(allowed, "{family} {}: token {wrong:?} of {output:?} is not {reference:?}", prompt["name"]);
        }
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
