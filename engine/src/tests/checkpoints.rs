//! Checkpoints that cannot be used: each error names the file and what is wrong with it.

use super::{repository, small_config};
use crate::{Config, Engine, Error, Model};
use std::{fs, path::Path};
use tempfile::TempDir;

/// Copies a golden checkpoint to change it.
pub(super) fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(repository("tests/golden").join(name)).expect("golden files") {
        let path = entry.expect("an entry").path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("a copy");
        }
    }
    dir
}

/// Loads `dir` and checks that the error is about `file` and contains all `words`.
pub(super) fn refused(dir: &Path, file: &str, words: &[&str]) {
    let error = Model::load(dir, &mut |_| {}).expect_err("a bad checkpoint");
    let Error::Checkpoint { path, problem } = &error else { panic!("{error:?}") };
    assert!(path.ends_with(file), "{} is not {file}", path.display());
    for word in words {
        assert!(problem.contains(word), "{problem:?} lacks {word:?}");
    }
    assert!(error.to_string().contains(file), "{error}");
}

/// Rewrites the JSON file `name`.
pub(super) fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(name);
    let mut json = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    change(&mut json);
    fs::write(path, json.to_string()).expect("written");
}

#[test]
fn missing_directory_and_files() {
    let dir = tempfile::tempdir().expect("a directory");
    refused(&dir.path().join("nowhere"), "nowhere", &["no such directory"]);
    refused(dir.path(), "config.json", &[]);
    let dir = copy("llama");
    fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    let name = dir.path().file_name().expect("a name").to_str().expect("UTF-8").to_owned();
    refused(dir.path(), &name, &["model.safetensors", "model.safetensors.index.json"]);
}

#[test]
fn malformed_config() {
    let dir = copy("llama");
    fs::write(dir.path().join("config.json"), "{\"architectures\": [").expect("written");
    refused(dir.path(), "config.json", &["EOF"]);
    let dir = copy("llama");
    fs::write(dir.path().join("generation_config.json"), "{\"eos_token_id\": \"two\"}").expect("written");
    refused(dir.path(), "generation_config.json", &[]);
}

#[test]
fn unknown_architecture() {
    let dir = copy("llama");
    edit(dir.path(), "config.json", |config| config["architectures"] = serde_json::json!(["MambaForCausalLM"]));
    refused(dir.path(), "config.json", &["MambaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]);
}

#[test]
fn angles_that_depend_on_the_context_are_part_of_what_pages_are_called() {
    let fingerprint = |dir: &Path, max_model_len: Option<u32>| {
        let model = Model::load(dir, &mut |_| {}).expect("a good checkpoint");
        let same = model.info().fingerprint.clone();
        let engine = Engine::new(model, &Config { max_model_len, ..small_config() }).expect("an engine");
        (engine.fingerprint() == same, engine.fingerprint().to_owned())
    };
    let dir = copy("llama");
    assert_eq!(fingerprint(dir.path(), Some(64)), fingerprint(dir.path(), Some(512)));
    assert!(fingerprint(dir.path(), None).0);

    let dir = copy("phi3");
    let factors = |by: f64| vec![by; 10];
    edit(dir.path(), "config.json", |config| {
        config["original_max_position_embeddings"] = 256.into();
        config["rope_scaling"] =
            serde_json::json!({"type": "longrope", "short_factor": factors(1.0), "long_factor": factors(4.0)});
    });
    assert_eq!(fingerprint(dir.path(), Some(64)), fingerprint(dir.path(), Some(256)));
    assert_ne!(fingerprint(dir.path(), Some(256)), fingerprint(dir.path(), Some(257)));
    assert_eq!(fingerprint(dir.path(), Some(257)), fingerprint(dir.path(), None));
}

#[test]
fn truncated_tensors() {
    for (length, word) in [(0, "header"), (5, "header"), (100, "header"), (100_000, "1645488")] {
        let dir = copy("llama");
        let path = dir.path().join("model.safetensors");
        let bytes = fs::read(&path).expect("a file");
        fs::write(&path, &bytes[..length]).expect("written");
        refused(dir.path(), "model.safetensors", &[&length.to_string(), word]);
    }
    let dir = copy("llama");
    fs::write(dir.path().join("model.safetensors"), [0xff; 64]).expect("written");
    refused(dir.path(), "model.safetensors", &["not a safetensors file"]);
}

#[test]
fn wrong_shape_names_both() {
    let dir = copy("llama");
    edit(dir.path(), "config.json", |config| config["intermediate_size"] = serde_json::json!(161));
    refused(dir.path(), "model.safetensors", &["mlp.gate_proj", "[160, 96]", "[161, 96]"]);
}

#[test]
fn missing_tensors_are_named() {
    let dir = copy("llama");
    edit(dir.path(), "config.json", |config| config["num_hidden_layers"] = serde_json::json!(4));
    refused(dir.path(), "model.safetensors", &["model.layers.3.self_attn.q_proj.weight", "missing"]);
    let dir = copy("llama");
    edit(dir.path(), "config.json", |config| config["attention_bias"] = serde_json::json!(true));
    refused(dir.path(), "model.safetensors", &["q_proj.bias"]);
}

/// Gives a tensor another name, which is not longer.
fn rename(dir: &Path, from: &str, to: &str) {
    let path = dir.join("model.safetensors");
    let (from, to) = (format!("\"{from}\""), format!("\"{to}\""));
    let mut bytes = fs::read(&path).expect("a file");
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect("the name");
    bytes[at..at + from.len()].fill(b' ');
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(path, bytes).expect("written");
}

#[test]
fn every_expert_must_be_there() {
    for (name, prefix, part) in [
        ("mixtral", "model.layers.1.block_sparse_moe.experts", "w2.weight"),
        ("qwen3moe", "model.layers.2.mlp.experts", "up_proj.weight"),
        ("deepseek_v2", "model.layers.1.mlp.experts", "down_proj.weight"),
    ] {
        let dir = copy(name);
        rename(dir.path(), &format!("{prefix}.3.{part}"), &format!("{prefix}.9.{part}"));
        refused(dir.path(), "model.safetensors", &[&format!("{prefix}.3.{part}"), "missing"]);
    }
    let dir = copy("deepseek_v3");
    rename(dir.path(), "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.2.mlp.gate.bias");
    refused(dir.path(), "model.safetensors", &["model.layers.2.mlp.gate.e_score_correction_bias", "missing"]);
    let dir = copy("qwen3moe");
    edit(dir.path(), "config.json", |config| config["num_experts"] = serde_json::json!(9));
    refused(dir.path(), "model.safetensors", &["mlp.gate.weight", "[8, 64]", "[9, 64]"]);
}

#[test]
fn experts_in_one_tensor_are_refused() {
    let dir = copy("qwen3moe");
    let fused = "model.layers.1.mlp.experts.gate_up_proj";
    rename(dir.path(), "model.layers.1.mlp.experts.0.gate_proj.weight", fused);
    refused(dir.path(), "model.safetensors", &[fused, "model.layers.1.mlp.experts.0.gate_proj.weight"]);
}

#[test]
fn latent_attention_must_fit_its_ranks() {
    let dir = copy("deepseek_v3");
    edit(dir.path(), "config.json", |config| config["kv_lora_rank"] = serde_json::json!(38));
    refused(dir.path(), "model.safetensors", &["kv_a_proj_with_mqa", "[56, 64]", "[54, 64]"]);
    let dir = copy("deepseek_v3");
    edit(dir.path(), "config.json", |config| config["v_head_dim"] = serde_json::json!(20));
    refused(dir.path(), "model.safetensors", &["kv_b_proj", "[192, 40]", "[176, 40]"]);
    let dir = copy("deepseek_v2");
    edit(dir.path(), "config.json", |config| config["qk_rope_head_dim"] = serde_json::json!(15));
    refused(dir.path(), "config.json", &["qk_rope_head_dim", "15"]);
}

#[test]
fn experts_and_latents_are_counted_once() {
    for name in ["mixtral", "qwen3moe", "deepseek_v2", "deepseek_v3"] {
        let mut reports = Vec::new();
        let path = repository("tests/golden").join(name);
        let model = Model::load(&path, &mut |progress| reports.push(progress)).expect("a good checkpoint");
        let last = reports.last().expect("progress");
        assert_eq!(model.info().parameters * 4, last.total, "{name}: every stored element is a parameter");
        assert!(reports.windows(2).all(|pair| pair[0].done <= pair[1].done), "{name}");
        assert!(reports[reports.len() - 2].done == last.done, "{name}: every byte is counted");
    }
}

#[test]
fn shards_must_be_there_and_hold_what_the_index_says() {
    let index = "model.safetensors.index.json";
    let dir = copy("llama3-bf16-sharded");
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).expect("removed");
    refused(dir.path(), "model-00002-of-00003.safetensors", &[]);

    let dir = copy("llama3-bf16-sharded");
    edit(dir.path(), "config.json", |config| config["num_hidden_layers"] = serde_json::json!(4));
    refused(dir.path(), index, &["model.layers.3"]);

    let dir = copy("llama3-bf16-sharded");
    edit(dir.path(), index, |index| index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors".into());
    edit(dir.path(), "config.json", |config| config["tie_word_embeddings"] = serde_json::json!(false));
    refused(dir.path(), "model-00003-of-00003.safetensors", &["lm_head.weight", "index"]);

    let dir = copy("llama3-bf16-sharded");
    edit(dir.path(), index, |index| index["weight_map"]["x"] = "../model.safetensors".into());
    refused(dir.path(), index, &["../model.safetensors"]);
}

#[test]
fn unusable_types_are_named() {
    let dir = copy("llama-fp8-channel");
    edit(dir.path(), "config.json", |config| config["quantization_config"] = serde_json::Value::Null);
    refused(dir.path(), "model.safetensors", &["q_proj.weight", "F8_E4M3", "BF16"]);
}

#[test]
fn fingerprints_name_contents_and_progress_ends_at_the_total() {
    let mut reports = Vec::new();
    let dir = copy("llama");
    let model = Model::load(dir.path(), &mut |progress| reports.push(progress)).expect("a good checkpoint");
    let last = reports.last().expect("progress");
    assert_eq!(last.done, last.total);
    assert!(reports.len() > 10 && reports.windows(2).all(|pair| pair[0].done <= pair[1].done));
    assert_eq!(model.info().eos, [2]);
    assert_eq!((model.info().vocab_size, model.info().max_position), (1031, 1024));
    assert_eq!(model.info().dtype, "f32");
    assert_eq!(model.info().parameters * 4, last.total, "every stored element is a parameter");

    let same = copy("llama");
    let fingerprint = |dir: &Path| Model::load(dir, &mut |_| {}).expect("a checkpoint").info().fingerprint.clone();
    assert_eq!(fingerprint(same.path()), model.info().fingerprint);
    let path = same.path().join("model.safetensors");
    let mut bytes = fs::read(&path).expect("a file");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&path, bytes).expect("written");
    assert_ne!(fingerprint(same.path()), model.info().fingerprint);
}
