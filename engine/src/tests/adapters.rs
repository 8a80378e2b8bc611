//! Adapters that cannot be used, each named by file and field or tensor; and adapters that equal merged weights.

use super::{Runner, Unit, load, repository, watched};
use crate::{Adapter, AdapterError, Adapters, Error, Model, Row, cpu::kernels::Kernels};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use std::{collections::BTreeMap, fs, path::Path, sync::Arc};
use tempfile::TempDir;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const Q_DOWN: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
const Q_UP: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

/// Named f32 tensors with their shapes.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).expect("a file");
    let read = SafeTensors::deserialize(&bytes).expect("safetensors");
    let floats = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    read.tensors().iter().map(|(name, view)| (name.clone(), (view.shape().to_vec(), floats(view.data())))).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let bytes: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, floats))| {
            (name, shape, floats.iter().flat_map(|float| float.to_le_bytes()).collect::<Vec<_>>())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("whole tensors"))
    });
    fs::write(path, serialize(views, None).expect("serialisable")).expect("written");
}

fn copy(adapter: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for file in [CONFIG, TENSORS] {
        let from = repository("tests/golden/llama/adapters").join(adapter).join(file);
        fs::copy(from, dir.path().join(file)).expect("a copy");
    }
    dir
}

/// Loads a changed copy of `lora-qv` and checks that the error is about `file` and contains all `words`.
fn refused(change: impl FnOnce(&Path), file: &str, words: &[&str]) {
    let dir = copy("lora-qv");
    change(dir.path());
    let error = Adapter::load(&load("tests/golden/llama"), dir.path(), 8).expect_err("a bad adapter");
    let Error::Checkpoint { path, problem } = &error else { panic!("{error:?}") };
    assert!(path.ends_with(file), "{} is not {file}: {problem}", path.display());
    for word in words {
        assert!(problem.contains(word), "{problem:?} lacks {word:?}");
    }
}

fn edit(field: &'static str, value: serde_json::Value) -> impl FnOnce(&Path) {
    move |dir| {
        let path = dir.join(CONFIG);
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        json[field] = value;
        fs::write(path, json.to_string()).expect("written");
    }
}

fn tensors(change: impl FnOnce(&mut Tensors)) -> impl FnOnce(&Path) {
    move |dir| {
        let path = dir.join(TENSORS);
        let mut tensors = read_tensors(&path);
        change(&mut tensors);
        write_tensors(&path, &tensors);
    }
}

#[test]
fn missing_and_malformed_files() {
    refused(|dir| fs::remove_file(dir.join(CONFIG)).expect("removed"), CONFIG, &["No such file"]);
    refused(|dir| fs::remove_file(dir.join(TENSORS)).expect("removed"), TENSORS, &["No such file"]);
    refused(|dir| fs::write(dir.join(CONFIG), "[1").expect("written"), CONFIG, &["EOF"]);
    refused(|dir| fs::write(dir.join(TENSORS), [0xff; 64]).expect("written"), TENSORS, &["not a safetensors file"]);
    let truncate = |dir: &Path| {
        let bytes = fs::read(dir.join(TENSORS)).expect("a file");
        fs::write(dir.join(TENSORS), &bytes[..20_000]).expect("written");
    };
    refused(truncate, TENSORS, &["truncated", "20000"]);
    let error = Adapter::load(&load("tests/golden/llama"), Path::new("/nowhere"), 8).expect_err("no directory");
    assert_eq!(error.to_string(), "/nowhere: no such directory");
}

#[test]
fn shapes_must_be_those_of_the_model_and_the_rank() {
    refused(edit("r", 4.into()), TENSORS, &["layers.0.self_attn.q_proj.lora_A", "[8, 96]", "[4, 96]"]);
    refused(edit("r", 9.into()), CONFIG, &["r: 9", "largest rank", "8"]);
    refused(edit("rank_pattern", serde_json::json!({"v_proj": 2})), TENSORS, &["v_proj.lora_A", "[8, 96]", "[2, 96]"]);
    let narrow = |all: &mut Tensors| {
        all.insert(Q_UP.into(), (vec![95, 8], vec![0.0; 95 * 8]));
    };
    refused(tensors(narrow), TENSORS, &[Q_UP, "[95, 8]", "[96, 8]"]);
}

#[test]
fn both_factors_are_needed() {
    let remove = |name: &'static str| {
        tensors(move |all| {
            all.remove(name).expect("it was there");
        })
    };
    refused(remove(Q_UP), TENSORS, &[Q_UP, "missing"]);
    refused(remove(Q_DOWN), TENSORS, &[Q_DOWN, "missing"]);
}

#[test]
fn numbers_must_be_finite() {
    for value in [f32::NAN, f32::INFINITY] {
        refused(
            tensors(|all| all.get_mut(Q_UP).expect("there").1[5] = value),
            TENSORS,
            &[Q_UP, &value.to_string(), "at 5"],
        );
    }
}

#[test]
fn targets_must_be_linears_of_the_model() {
    refused(
        edit("target_modules", serde_json::json!(["c_attn"])),
        CONFIG,
        &["target_modules", "LlamaForCausalLM", "self_attn.q_proj"],
    );
    refused(edit("target_modules", serde_json::json!(["q_proj", "lm_head"])), CONFIG, &["lm_head"]);
    let only_q = edit("target_modules", serde_json::json!(["q_proj"]));
    refused(only_q, TENSORS, &["layers.0.self_attn.v_proj.lora_A.weight", CONFIG, "self_attn.v_proj"]);
    refused(
        edit("target_modules", serde_json::json!(["q_proj", "v_proj", "o_proj"])),
        TENSORS,
        &["o_proj.lora_A", "missing"],
    );
    refused(edit("use_dora", true.into()), CONFIG, &["use_dora", "true"]);
    let add = |name: &'static str| tensors(move |all| drop(all.insert(name.into(), (vec![1], vec![0.0]))));
    refused(add("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"), TENSORS, &["DoRA"]);
    refused(add("base_model.model.model.embed_tokens.lora_embedding_A"), TENSORS, &["embedding"]);
    refused(
        add("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight"),
        TENSORS,
        &["experts.3", "expert,"],
    );
    refused(add("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"), TENSORS, &["layers.9"]);
}

#[test]
fn ids_name_contents() {
    let model = load("tests/golden/llama");
    let id = |dir: &Path| Adapter::load(&model, dir, 8).expect("a good adapter").id().to_owned();
    let (same, other) = (copy("lora-qv"), copy("lora-qv"));
    edit("lora_dropout", 0.5.into())(same.path());
    assert_eq!(id(same.path()), id(copy("lora-qv").path()));
    tensors(|all| all.get_mut(Q_UP).expect("there").1[0] += 1.0)(other.path());
    assert_ne!(id(same.path()), id(other.path()));
    edit("lora_alpha", 17.into())(same.path());
    assert_ne!(id(same.path()), id(copy("lora-qv").path()));
}

#[test]
fn adapters_come_and_go_by_name() {
    let adapters = Adapters::new(load("tests/golden/llama"), 8);
    let dir = copy("lora-qv");
    let loaded = adapters.load("a", dir.path()).expect("a good adapter");
    assert!(matches!(adapters.load("a", dir.path()), Err(AdapterError::Exists(name)) if name == "a"));
    assert!(matches!(adapters.load("b", Path::new("/nowhere")), Err(AdapterError::NotFound(_))));
    adapters.load("b", dir.path()).expect("equal contents under another name");
    assert_eq!(adapters.list().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    adapters.unload("a").expect("it was there");
    assert!(matches!(adapters.unload("a"), Err(AdapterError::Unknown(_))));
    assert!(adapters.get(loaded.id()).is_some(), "the other name still has it");
    adapters.unload("b").expect("it was there");
    assert!(adapters.get(loaded.id()).is_none());
}

#[test]
fn an_adapter_of_another_model_is_refused_by_row() {
    let adapter = Adapter::load(&load("tests/golden/llama"), copy("lora-qv").path(), 8).expect("a good adapter");
    let mut runner = Runner::new(load("tests/golden/mistral"), Kernels::detect());
    let row = Row { tokens: &[1], start: 0, pages: &runner.pages, adapter: Some(&adapter), ..Row::default() };
    let error = runner.engine.step(&[row], &mut |_| {}).expect_err("another model");
    assert!(
        matches!(&error, Error::Row(problem) if problem.contains("row 0") && problem.contains(adapter.id())),
        "{error}"
    );
}

/// Rewrites the tensors of `dir` as `dtype`, rounded, and returns a directory with the same numbers as f32.
fn stored_as(dir: &Path, dtype: Dtype) -> TempDir {
    let widened = tempfile::tempdir().expect("a directory");
    fs::copy(dir.join(CONFIG), widened.path().join(CONFIG)).expect("a copy");
    let mut tensors = read_tensors(&dir.join(TENSORS));
    let mut stored = Vec::new();
    for (name, (shape, floats)) in &mut tensors {
        let mut bytes = Vec::new();
        for float in floats {
            let (narrow, wide) = match dtype {
                Dtype::BF16 => (half::bf16::from_f32(*float).to_le_bytes(), half::bf16::from_f32(*float).to_f32()),
                _ => (half::f16::from_f32(*float).to_le_bytes(), half::f16::from_f32(*float).to_f32()),
            };
            bytes.extend(narrow);
            *float = wide;
        }
        stored.push((name.clone(), shape.clone(), bytes));
    }
    write_tensors(&widened.path().join(TENSORS), &tensors);
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).expect("whole tensors"))
    });
    fs::write(dir.join(TENSORS), serialize(views, None).expect("serialisable")).expect("written");
    widened
}

#[test]
fn factors_stay_as_stored_and_count_as_their_f32_values() {
    for (base, dtype) in [
        ("llama", Dtype::BF16),
        ("llama", Dtype::F16),
        ("llama3-bf16-sharded", Dtype::BF16),
        ("llama3-bf16-sharded", Dtype::F16),
    ] {
        let model = load(&format!("tests/golden/{base}"));
        let (narrow, scratch) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        random_adapter("tests/golden/llama", narrow.path(), scratch.path());
        if base != "llama" {
            random_adapter("tests/golden/llama3", narrow.path(), scratch.path());
        }
        let wide = stored_as(narrow.path(), dtype);
        let adapters = [narrow.path(), wide.path()].map(|dir| Adapter::load(&model, dir, 8).expect("a good adapter"));
        assert!(adapters[0].bytes() < adapters[1].bytes());
        for kernels in Kernels::available() {
            let [narrow, wide] = adapters.clone().map(|adapter| {
                let mut runner = Runner::new(model.clone(), kernels);
                runner.adapter = Some(adapter);
                runner.draw(&[5, 9, 2, 77, 140, 8, 31], 0, 4, &watched());
                runner.engine.logits(0).expect("sampled").to_vec()
            });
            assert!(narrow == wide, "{base} {dtype:?} {}", kernels.name);
        }
    }
}

/// Writes an adapter of random numbers for every linear of `base`, by pattern, and a copy of `base` with it merged.
pub(super) fn random_adapter(base: &str, dir: &Path, merged: &Path) {
    let (rank, alpha, mut state) = (5, 3.0f32, 1u32);
    let mut random = |count: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * size
        };
        (0..count).map(|_| next()).collect()
    };
    let mut weights = read_tensors(&repository(base).join("model.safetensors"));
    let mut factors = Tensors::new();
    for (name, (shape, weight)) in &mut weights {
        let Some(module) = name.strip_suffix(".weight").filter(|name| name.contains(".layers.")) else { continue };
        let [outputs, inputs] = shape[..] else { continue };
        if !["_proj", "dense", "query_key_value", "_4h", "_h"].iter().any(|end| module.ends_with(end)) {
            continue;
        }
        let (down, up) = (random(rank * inputs, 0.3), random(outputs * rank, 0.3));
        for (row, weights) in weight.chunks_exact_mut(inputs).enumerate() {
            for (column, weight) in weights.iter_mut().enumerate() {
                let delta: f32 = (0..rank).map(|r| up[row * rank + r] * down[r * inputs + column]).sum();
                *weight += alpha / (rank as f32).sqrt() * delta;
            }
        }
        factors.insert(format!("base_model.model.{module}.lora_A.weight"), (vec![rank, inputs], down));
        factors.insert(format!("base_model.model.{module}.lora_B.weight"), (vec![outputs, rank], up));
    }
    write_tensors(&dir.join(TENSORS), &factors);
    let config = serde_json::json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": true, "target_modules": r".*\.layers\..*",
    });
    fs::write(dir.join(CONFIG), config.to_string()).expect("written");
    for file in ["config.json", "generation_config.json"] {
        let from = repository(base).join(file);
        if from.exists() {
            fs::copy(from, merged.join(file)).expect("a copy");
        }
    }
    write_tensors(&merged.join("model.safetensors"), &weights);
}

/// Compares base plus adapter with weights into which the adapter was merged: names, order and scale of every linear. They may differ by `tolerance` of the
/// largest logit.
pub(super) fn equals_merged(base: &str, unit: Unit, tolerance: f32) {
    let (adapter_dir, merged_dir) =
        (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    random_adapter(base, adapter_dir.path(), merged_dir.path());
    let logits = |model: Arc<Model>, adapter: Option<Arc<Adapter>>| {
        let mut runner = Runner::new(model, unit);
        runner.adapter = adapter;
        let tokens: Vec<u32> = (0..40).map(|at| at * 7 % 900).collect();
        runner.draw(&tokens, 0, 33, &watched());
        runner.engine.logits(0).expect("sampled").to_vec()
    };
    let model = load(base);
    let adapter = Adapter::load(&model, adapter_dir.path(), 8).expect("a good adapter");
    let plain = logits(model.clone(), None);
    let ours = logits(model, Some(adapter));
    let merged = logits(Model::load(merged_dir.path(), &mut |_| {}).expect("a good checkpoint"), None);
    let largest = merged.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(distance(&ours, &merged) < tolerance * largest, "{base}: {} of {largest}", distance(&ours, &merged));
    assert!(distance(&ours, &plain) > 0.05 * largest, "{base}: the adapter changes something");
}

/// Families whose linears have other names, orders or activations.
pub(super) const FAMILIES: [&str; 9] = [
    "tests/golden/llama",
    "tests/golden/mistral",
    "tests/golden/qwen3",
    "tests/golden/gemma2",
    "tests/golden/gemma3",
    "tests/golden/phi3",
    "tests/golden/cohere",
    "tests/golden/olmo2",
    "tests/golden/gptneox",
];

#[test]
fn an_adapter_equals_merged_weights() {
    FAMILIES.into_iter().for_each(|base| equals_merged(base, Kernels::detect().into(), 1e-3));
}
