//! Checkpoints that cannot be used: each error names the file and what is wrong with it.

use super::repository;
use crate::{Error, Model};
use std::{fs, path::Path};
use tempfile::TempDir;

/// Copies a golden checkpoint to change it.
fn copy(name: &str) -> TempDir {
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
fn refused(dir: &Path, file: &str, words: &[&str]) {
    let error = Model::load(dir, &mut |_| {}).expect_err("a bad checkpoint");
    let Error::Checkpoint { path, problem } = &error else { panic!("{error:?}") };
    assert!(path.ends_with(file), "{} is not {file}", path.display());
    for word in words {
        assert!(problem.contains(word), "{problem:?} lacks {word:?}");
    }
    assert!(error.to_string().contains(file), "{error}");
}

/// Rewrites the JSON file `name`.
fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
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
    refused(dir.path(), "config.json", &["quantization_config"]);
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
