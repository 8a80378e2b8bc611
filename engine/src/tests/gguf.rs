//! GGUF files: written by llama.cpp's own package (`tests/gguf/make.py`), made of golden checkpoints, and broken in every way.

use super::{
    Runner, Unit,
    golden::{F32, Tolerance, check_model},
    load, repository, watched,
};
use crate::{Error, Model, TokenId, cpu::kernels::Kernels};
use ::gguf::{File, TensorType, Writer};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, sync::Arc};

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Prompt>,
    /// Eight or so elements of row 1, evenly spaced, by the name of the tensor elsewhere.
    rows: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<TokenId>,
    logits: Vec<f32>,
}

/// Compares what the file computes with float64 over its dequantised weights.
fn check(name: &str, dtype: &str) {
    let model = load(&format!("tests/gguf/{name}.gguf"));
    let expected = expected(name);
    assert_eq!(model.info().dtype, dtype);

    let mut row = vec![0.0; model.decoder.hidden];
    let sampled = |row: &[f32]| row.iter().step_by(row.len() / 8).copied().collect::<Vec<f32>>();
    model.weights().embed(1, &mut row);
    assert_eq!(sampled(&row), expected.rows["model.embed_tokens.weight"], "{name}: embedding");
    if let Some(head) = expected.rows.get("lm_head.weight") {
        model.weights().head.packed.column(1, &mut row);
        assert_eq!(sampled(&row), *head, "{name}: head");
    }
    // Inputs have fifteen bits where weights are integers.
    Kernels::available().into_iter().for_each(|kernels| check_on(name, kernels.into(), 3e-4));
}

fn expected(name: &str) -> Expected {
    let expected = std::fs::read(repository(&format!("tests/gguf/{name}.json"))).expect("expected values");
    serde_json::from_slice(&expected).expect("expected values")
}

/// Compares what `unit` computes of the file; logits may differ by `limit` of the largest.
pub(super) fn check_on(name: &str, unit: Unit, limit: f32) {
    let mut runner = Runner::new(load(&format!("tests/gguf/{name}.gguf")), unit);
    for prompt in expected(name).prompts {
        runner.draw(&prompt.ids, 0, 33, &watched());
        let logits = runner.engine.logits(0).expect("the row was sampled");
        let largest = prompt.logits.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let worst = logits.iter().zip(&prompt.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert_eq!(logits.len(), prompt.logits.len(), "{name}");
        assert!(worst <= limit * largest, "{name} {unit:?}: logits differ by {worst} of {largest}");
    }
}

#[test]
fn q4_0_with_a_head_of_its_own() {
    check("llama-q4_0", "Q4_0 (gguf)");
}

#[test]
fn q8_0_mixed_with_bf16() {
    check("qwen2-q8_0", "Q8_0 (gguf)");
}

#[test]
fn k_quants() {
    check("k-quants", "Q5_K (gguf)");
}

#[test]
fn quantised_weights_stay_quantised() {
    let path = "tests/gguf/llama-q4_0.gguf";
    let file = std::fs::metadata(repository(path)).expect("a file").len();
    let weights = load(path).info().weight_bytes;
    assert!(weights < file * 3 / 2, "{weights} bytes of a file of {file}");
}

/// A golden checkpoint as a GGUF file with floats of type `kind`.
fn convert(directory: &str, kind: TensorType) -> Vec<u8> {
    let read = |name: &str| std::fs::read(repository(directory).join(name)).expect("a golden file");
    let config: Value = serde_json::from_slice(&read("config.json")).expect("JSON");
    let arch = match config["model_type"].as_str().expect("a model type") {
        "mistral" | "mixtral" => "llama",
        "qwen3_moe" => "qwen3moe",
        "gemma3_text" => "gemma3",
        "cohere" => "command-r",
        other => other,
    };
    let mut writer = Writer::default();
    writer.text("general.architecture", arch);
    for (field, key) in [
        ("hidden_size", "embedding_length"),
        ("intermediate_size", "feed_forward_length"),
        ("num_hidden_layers", "block_count"),
        ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"),
        ("head_dim", "attention.key_length"),
        ("head_dim", "attention.value_length"),
        ("max_position_embeddings", "context_length"),
        ("sliding_window", "attention.sliding_window"),
        ("num_experts_per_tok", "expert_used_count"),
        ("num_experts", "expert_count"),
        ("num_local_experts", "expert_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
    ] {
        // Qwen2's window is switched off, which GGUF files say by leaving it out.
        if let Some(count) = config[field].as_u64().filter(|_| field != "sliding_window" || arch != "qwen2") {
            writer.u32(&format!("{arch}.{key}"), count as u32);
        }
    }
    for (field, key) in [
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ("layer_norm_eps", "attention.layer_norm_epsilon"),
        ("rope_theta", "rope.freq_base"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("logit_scale", "logit_scale"),
    ] {
        if let Some(number) = config[field].as_f64() {
            writer.f32(&format!("{arch}.{key}"), number as f32);
        }
    }
    if let Some(scalar) = config["query_pre_attn_scalar"].as_f64() {
        writer.f32(&format!("{arch}.attention.scale"), scalar.powf(-0.5) as f32);
    }
    if let Some(pattern) = config["sliding_window_pattern"].as_u64() {
        writer.u32(&format!("{arch}.attention.sliding_window_pattern"), pattern as u32);
    }
    let dim = config["head_dim"].as_u64().unwrap_or_else(|| {
        config["hidden_size"].as_u64().expect("a size") / config["num_attention_heads"].as_u64().expect("heads")
    });
    if config["rope_scaling"]["rope_type"] == "llama3" {
        let factors = llama3_factors(&config, dim as usize);
        writer.tensor("rope_freqs.weight", &[factors.len()], TensorType::F32, &bytes_of(&factors, TensorType::F32));
    }

    let stored = read("model.safetensors");
    let stored = SafeTensors::deserialize(&stored).expect("a golden checkpoint");
    let names = crate::model::gguf::Names::of(arch, dim as usize).expect("a known architecture");
    /// Shape and values of each expert's matrix.
    type Stack = BTreeMap<usize, (Vec<usize>, Vec<f32>)>;
    let mut experts: BTreeMap<String, Stack> = BTreeMap::new();
    for (name, tensor) in stored.tensors() {
        let elements = tensor.data().chunks_exact(4);
        let mut values: Vec<f32> =
            elements.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
        let (shape, row) = (tensor.shape(), values.len() / tensor.shape()[0]);
        if arch == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            values = turned(&values, row, dim as usize);
        }
        if arch.starts_with("gemma") && name.contains("norm") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let name = names.stored(&name);
        if let Some((tensor, expert)) = name.strip_suffix(']').and_then(|name| name.split_once('[')) {
            let all = experts.entry(tensor.to_owned()).or_default();
            all.insert(expert.parse().expect("a number"), (shape.to_vec(), values));
            continue;
        }
        let kind = if shape.len() == 1 { TensorType::F32 } else { kind };
        writer.tensor(&name, shape, kind, &bytes_of(&values, kind));
    }
    for (name, all) in experts {
        let shape = [&[all.len()][..], &all[&0].0].concat();
        let values: Vec<f32> = all.into_values().flat_map(|(_, values)| values).collect();
        writer.tensor(&name, &shape, kind, &bytes_of(&values, kind));
    }
    writer.finish()
}

/// Puts the rows of each head in the order in which llama.cpp turns them: one of each half in turn.
fn turned(values: &[f32], row: usize, dim: usize) -> Vec<f32> {
    let heads = values.chunks_exact(dim * row);
    let pairs = heads.flat_map(|head| {
        let (first, second) = head.split_at(dim / 2 * row);
        first.chunks_exact(row).zip(second.chunks_exact(row)).flat_map(|(a, b)| [a, b].concat())
    });
    pairs.collect()
}

/// What llama.cpp's converter writes for `rope_scaling` of type llama3.
fn llama3_factors(config: &Value, dim: usize) -> Vec<f32> {
    let number = |field: &str| config["rope_scaling"][field].as_f64().expect("a number");
    let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
    let original = number("original_max_position_embeddings");
    let theta = config["rope_theta"].as_f64().expect("a number");
    let of_pair = |pair: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..dim / 2).map(|pair| of_pair(pair) as f32).collect()
}

fn bytes_of(values: &[f32], kind: TensorType) -> Vec<u8> {
    match kind {
        TensorType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        TensorType::F16 => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        TensorType::Bf16 => values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect(),
        other => panic!("no writer for {}", other.name()),
    }
}

fn load_bytes(bytes: &[u8]) -> Result<Arc<Model>, Error> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("written");
    Model::load(&path, &mut |_| {})
}

#[test]
fn golden_checkpoints_compute_the_same_as_files() {
    for family in FAMILIES {
        let directory = format!("tests/golden/{family}");
        let model =
            load_bytes(&convert(&directory, TensorType::F32)).unwrap_or_else(|error| panic!("{family}: {error}"));
        check_model(model, &directory, F32);
    }
}

const FAMILIES: [&str; 11] =
    ["llama", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "cohere", "olmo2"];

#[test]
fn halves_are_near() {
    // Eleven bits of mantissa in every weight, and eight.
    for (kind, logit) in [(TensorType::F16, 4e-3), (TensorType::Bf16, 3e-2)] {
        let model = load_bytes(&convert("tests/golden/qwen3", kind)).expect("a good file");
        check_model(model, "tests/golden/qwen3", Tolerance { logit, gap: 0.5, logprob: None });
    }
}

/// Loads `bytes` and checks that the error is about the file and contains all `words`.
fn refused(bytes: &[u8], words: &[&str]) {
    let error = load_bytes(bytes).expect_err("a bad file");
    let Error::Checkpoint { path, problem } = &error else { panic!("{error:?}") };
    assert!(path.ends_with("model.gguf"), "{}", path.display());
    words.iter().for_each(|word| assert!(problem.contains(word), "{problem:?} lacks {word:?}"));
}

fn file_of(name: &str) -> Vec<u8> {
    std::fs::read(repository(&format!("tests/gguf/{name}.gguf"))).expect("a file")
}

/// Writes `new` where `old` stands, once in each place.
fn replaced(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len() - old.len()).filter(|&at| bytes[at..].starts_with(old)).collect();
    assert!(!places.is_empty(), "{} is not there", old.escape_ascii());
    places.into_iter().for_each(|at| bytes[at..at + new.len()].copy_from_slice(new));
    bytes
}

#[test]
fn broken_files_are_named() {
    let good = file_of("llama-q4_0");
    for length in [0, 3, 30, 1000, good.len() / 4, good.len() - 40] {
        refused(&good[..length], if length < 200_000 { &[] } else { &["truncated", "tensor"] });
    }
    refused(
        &replaced(&good, b"llama.attention.head_count\x04", b"llama.attention.head_c0unt\x04"),
        &["llama.attention.head_count"],
    );
    refused(&replaced(&good, b"general.architecture", b"general.archiTecture"), &["general.architecture"]);
    refused(&replaced(&good, b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"), &["blk.1.attn_q.weight", "missing"]);
    refused(&replaced(&good, b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"), &["blk.1.attn_k.weight", "twice"]);
    let heads = |count: u8| {
        let with = |count: u8| [&b"llama.attention.head_count\x04\0\0\0"[..], &[count, 0, 0, 0]].concat();
        replaced(&good, &with(6), &with(count))
    };
    refused(&heads(0), &["head_count"]);
    refused(&heads(5), &["num_attention_heads", "5"]);
    refused(&heads(2), &["blk.0.attn_k.weight", "[32, 96]", "[96, 96]"]);
    let arch = |name: &[u8]| replaced(&good, b"\x05\0\0\0\0\0\0\0llama", &[b"\x05\0\0\0\0\0\0\0", name].concat());
    refused(&arch(b"mamba"), &["mamba", "llama", "qwen2"]);
    refused(&arch(b"gemma"), &["gemma", "known"]);

    let start =
        |name: &str| File::parse(&good, good.len() as u64).expect("good").tensor(name).expect("there").bytes.start;
    for (name, value, word) in [("blk.2.ffn_up.weight", 0x7e00_u16, "NaN"), ("output.weight", 0x7c00, "inf")] {
        let mut bytes = good.clone();
        let at = start(name);
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        refused(&bytes, &[name, word, "row 0", "column 0"]);
    }
    // Q4_0 of the same size is IQ4_NL.
    let entry =
        |kind: u8| [&b"blk.0.attn_v.weight\x02\0\0\0\x60\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0"[..], &[kind]].concat();
    refused(&replaced(&good, &entry(2), &entry(20)), &["blk.0.attn_v.weight", "IQ4_NL", "Q4_0", "Q6_K"]);
}

#[test]
fn other_problems_are_named() {
    let mut writer = Writer::default();
    writer.text("general.architecture", "llama");
    for (key, value) in
        [("embedding_length", 4), ("block_count", 1), ("attention.head_count", 2), ("context_length", 8)]
    {
        refused(&writer.finish(), &[key, "missing"]);
        writer.u32(&format!("llama.{key}"), value);
    }
    refused(&writer.finish(), &["token_embd.weight", "missing"]);
    writer.tensor("token_embd.weight", &[3, 4], TensorType::F32, &[0; 48]);
    refused(&writer.finish(), &["intermediate_size"]);
    writer.u32("llama.feed_forward_length", 4);
    refused(&writer.finish(), &["blk.0.attn_q.weight", "missing"]);
    refused(&writer.clone().u32("split.count", 3).finish(), &["split.count", "3"]);
    refused(
        &writer.clone().text("llama.rope.scaling.type", "twisted").finish(),
        &["rope.scaling.type", "twisted", "yarn"],
    );
    assert!(matches!(Model::load(Path::new("nowhere.gguf"), &mut |_| {}), Err(Error::Checkpoint { .. })));
}
