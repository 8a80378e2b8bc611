//! Embeddings: the engine's own bits, whoever computes them and in whatever pieces.

use cluster_tests::{TestCluster, golden};
use engine::{Config, Embedding, Engine, Model, Pooling, Row};
use kv_cache::PageId;
use router::Policy;
use serde_json::{Value, json};
use std::{fs, os::unix::fs::symlink, path::Path};

/// Makes a directory of the llama checkpoint whose files say how it embeds, and that the first numbers of a vector are enough.
fn embedder(dir: &Path, mode: &str) -> anyhow::Result<()> {
    for entry in fs::read_dir(golden("llama"))? {
        let entry = entry?;
        if entry.file_name() != "config.json" {
            symlink(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    let mut config: Value = serde_json::from_slice(&fs::read(golden("llama").join("config.json"))?)?;
    config["is_matryoshka"] = json!(true);
    fs::write(dir.join("config.json"), config.to_string())?;
    let module = |path: &str, kind: &str| json!({"path": path, "type": format!("sentence_transformers.models.{kind}")});
    let modules =
        json!([module("", "Transformer"), module("1_Pooling", "Pooling"), module("2_Normalize", "Normalize")]);
    fs::write(dir.join("modules.json"), modules.to_string())?;
    fs::create_dir(dir.join("1_Pooling"))?;
    fs::write(dir.join("1_Pooling/config.json"), json!({format!("pooling_mode_{mode}"): true}).to_string())?;
    Ok(())
}

/// What an engine makes of `ids` by itself.
fn alone(dir: &Path, ids: &[u32], pooling: Pooling) -> anyhow::Result<Vec<f32>> {
    let config = Config { threads: Some(1), kv_bytes: Some(64 << 20), token_budget: 512, ..Config::default() };
    let mut engine = Engine::new(Model::load(dir, &mut |_| {})?, &config)?;
    let pages: Vec<PageId> = (0..ids.len().div_ceil(16) as u32).map(PageId).collect();
    let row = Row { tokens: ids, pages: &pages, pooling: Some(pooling), ..Row::default() };
    let made = engine.step(&[row], &mut |_| {})?;
    let states = if pooling == Pooling::Mean { ids.len() } else { 1 };
    let mut embedding = Embedding::new(pooling);
    embedding.add(0, made[0].hidden.chunks_exact(made[0].hidden.len() / states));
    Ok(embedding.finish())
}

fn numbers(item: &Value) -> Vec<f32> {
    let numbers = item["embedding"].as_array().expect("numbers").iter();
    numbers.map(|number| number.as_f64().expect("a number") as f32).collect()
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedding_is_the_engine_s_wherever_it_is_computed() -> anyhow::Result<()> {
    let expected: Value = serde_json::from_slice(&fs::read(golden("llama").join("expected.json"))?)?;
    let ids: Vec<u32> = serde_json::from_value(expected["prompts"][4]["ids"].clone())?;
    assert!(ids.len() > 64, "it takes several chunks");
    for (mode, pooling) in [("lasttoken", Pooling::Last), ("mean_tokens", Pooling::Mean)] {
        let dir = tempfile::tempdir()?;
        embedder(dir.path(), mode)?;
        let whole = alone(dir.path(), &ids, pooling)?;
        let short = alone(dir.path(), &ids[..7], pooling)?;
        for policy in [Policy::Local, Policy::Remote] {
            let cluster = TestCluster::new()
                .model(dir.path().into())
                .engine(|engine| engine.token_budget = 64)
                .placement(policy)
                .start()
                .await?;
            let ask = async |more: Value| {
                let mut request = json!({"model": "test", "input": [ids, ids[..7], ids]});
                request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
                let answer = cluster.client.post("/v1/embeddings", &request).await?;
                anyhow::ensure!(answer.status == 200, "{}", answer.text);
                anyhow::Ok(answer.json())
            };
            let answer = ask(json!({})).await?;
            let vectors: Vec<Vec<f32>> = answer["data"].as_array().expect("a list").iter().map(numbers).collect();
            assert_eq!(vectors, [whole.clone(), short.clone(), whole.clone()], "{mode} {policy:?}");
            assert_eq!(answer["usage"]["prompt_tokens"], 2 * ids.len() + 7);
            // A cached prefix spares the last token's hidden state most of its prompt, and a mean nothing.
            let again = ask(json!({})).await?;
            assert_eq!(again["data"], answer["data"]);
            let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
            assert_eq!(cached > 0, pooling == Pooling::Last, "{cached} of the tokens were cached");
            let fewer = numbers(&ask(json!({"dimensions": 8})).await?["data"][0]);
            assert_eq!((fewer.len(), (length(&fewer) - 1.0).abs() < 1e-6), (8, true), "{fewer:?}");
            let scale = f64::from(fewer[0]) / f64::from(whole[0]);
            assert!(fewer.iter().zip(&whole).all(|(a, b)| (f64::from(*a) - f64::from(*b) * scale).abs() < 1e-6));
            super::cancel::pages_come_back(&cluster.client).await?;
            cluster.stop().await?;
        }
    }
    Ok(())
}
