//! Logits, continuations and log-probabilities against what the reference recorded (`tests/golden/README.md`).

use super::{Runner, load, repository, small_config};
use crate::{
    Adapter, Config, Model, Sampling, TokenId,
    cpu::{encode::Encoding, format::Format, kernels::Kernels},
};
use kv_cache::KvDtype;
use safetensors::SafeTensors;
use serde::Deserialize;
use std::sync::Arc;

#[derive(Deserialize)]
pub(super) struct Prompt {
    pub(super) name: String,
    pub(super) ids: Vec<TokenId>,
    logit_absmax: f32,
    pub(super) greedy: Vec<TokenId>,
    greedy_logprobs: Vec<f32>,
    greedy_gaps: Vec<f32>,
    prompt_logprobs: Vec<Option<f32>>,
}

/// The limits of one arithmetic, from the README.
#[derive(Clone, Copy)]
pub(super) struct Tolerance {
    /// Of the largest logit.
    pub(super) logit: f32,
    /// Below this gap between the best two logits another token may win.
    pub(super) gap: f32,
    /// Of log-probabilities; `None` where the README sets no limit.
    pub(super) logprob: Option<f32>,
}

pub(super) const F32: Tolerance = Tolerance { logit: 1e-3, gap: 1e-2, logprob: Some(2e-3) };
pub(super) const BF16: Tolerance = Tolerance { logit: 0.05, gap: 0.5, logprob: None };
/// Of quantised weights that meet quantised inputs.
const QUANTISED_INPUTS: Tolerance = Tolerance { logit: 0.02, gap: 0.3, logprob: None };
/// Of weights of 8 bits that meet inputs rounded to as many in some steps, beside a reference that rounds none: about what references that round all differ
/// by from that one (0.22 and 0.06).
pub(super) const FP8_INPUTS: Tolerance = Tolerance { logit: 0.25, gap: 2.0, logprob: None };
pub(super) const INT8_INPUTS: Tolerance = Tolerance { logit: 0.08, gap: 0.5, logprob: None };
/// Of f32 models with pages of 8 bits; not from the README but about twice what was measured.
pub(super) const FP8_PAGES: Tolerance = Tolerance { logit: 0.2, gap: 0.75, logprob: None };
const INT8_PAGES: Tolerance = Tolerance { logit: 0.04, gap: 0.15, logprob: None };

fn check(path: &str, tolerance: Tolerance) {
    check_model(load(path), path, tolerance);
}

/// Compares what `model` computes with what was recorded in the directory `path`.
pub(super) fn check_model(model: Arc<Model>, path: &str, tolerance: Tolerance) {
    check_prompts(model, None, None, path, tolerance);
}

/// Checks the model at `base` with the adapter at `path`.
fn check_adapted(base: &str, path: &str, tolerance: Tolerance) {
    let model = load(base);
    let adapter = Adapter::load(&model, &repository(path), 8).expect("a good adapter");
    check_prompts(model, Some(adapter), None, path, tolerance);
}

fn check_prompts(
    model: Arc<Model>,
    adapter: Option<Arc<Adapter>>,
    kv_dtype: Option<KvDtype>,
    path: &str,
    tolerance: Tolerance,
) {
    for kernels in Kernels::available() {
        check_kernels(&model, &adapter, kv_dtype, path, tolerance, kernels, "");
    }
}

/// Checks one unit's kernels; `recorded` is `_actquant` for what the reference made of quantised inputs.
fn check_kernels(
    model: &Arc<Model>,
    adapter: &Option<Arc<Adapter>>,
    kv_dtype: Option<KvDtype>,
    path: &str,
    tolerance: Tolerance,
    kernels: &'static Kernels,
    recorded: &str,
) {
    let prompts = prompts(path, recorded);
    let mut runner = Runner::with(model.clone(), kernels, Config { kv_dtype, ..small_config() });
    runner.adapter.clone_from(adapter);
    for (prompt, reference) in &prompts {
        for chunk in [512, 33, 5] {
            check_prompt(&mut runner, prompt, reference, chunk, tolerance, &format!("{path} {}", kernels.name));
        }
    }
    for (prompt, _) in prompts.iter().filter(|(prompt, _)| prompt.ids.len() <= 200) {
        check_prompt_logprobs(&mut runner, prompt, tolerance);
    }
}

/// Reads what was recorded in the directory `path`: prompts, and the logits after each.
pub(super) fn prompts(path: &str, recorded: &str) -> Vec<(Prompt, Vec<f32>)> {
    let text = std::fs::read(repository(path).join("expected.json")).expect("expected.json");
    let mut expected: serde_json::Value = serde_json::from_slice(&text).expect("expected.json");
    let prompts = expected[format!("prompts{recorded}")].take();
    let prompts: Vec<Prompt> = serde_json::from_value(prompts).expect("expected.json");
    let logits = std::fs::read(repository(path).join("logits.safetensors")).expect("logits.safetensors");
    let logits = SafeTensors::deserialize(&logits).expect("logits.safetensors");
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let reference =
        |prompt: &Prompt| logits.tensor(&format!("{}{recorded}", prompt.name)).map(|tensor| floats(tensor.data()));
    prompts
        .into_iter()
        .map(|prompt| {
            let reference = reference(&prompt).expect("a tensor for each prompt");
            (prompt, reference)
        })
        .collect()
}

/// Computes a prompt in chunks, compares its last logits, and continues it greedily one token at a time.
pub(super) fn check_prompt(
    runner: &mut Runner,
    prompt: &Prompt,
    reference: &[f32],
    chunk: usize,
    limit: Tolerance,
    what: &str,
) {
    let what = format!("{what} {} in chunks of {chunk}", prompt.name);
    let sampling = Sampling { logprobs: Some(3), ..Sampling::default() };
    let mut tokens = prompt.ids.clone();
    let mut sampled = runner.draw(&tokens, 0, chunk, &sampling);
    let logits = runner.engine.logits(0).expect("the row was sampled");
    assert_eq!(logits.len(), reference.len(), "{what}");
    let worst = logits.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= limit.logit * prompt.logit_absmax, "{what}: logits differ by {worst} of {}", prompt.logit_absmax);

    for (step, token) in prompt.greedy.iter().enumerate() {
        if sampled.token != *token {
            let gap = prompt.greedy_gaps[step];
            assert!(gap <= limit.gap, "{what}: token {step} is {}, expected {token}; the gap is {gap}", sampled.token);
            return;
        }
        let logprobs = sampled.logprobs.as_ref().expect("asked for");
        assert_eq!((logprobs.rank, logprobs.top.len(), logprobs.top[0].0), (1, 3, *token), "{what}: token {step}");
        let difference = (logprobs.logprob - prompt.greedy_logprobs[step]).abs();
        assert!(
            limit.logprob.is_none_or(|limit| difference <= limit),
            "{what}: logprob {step} differs by {difference}"
        );
        tokens.push(*token);
        sampled = runner.draw(&tokens, tokens.len() - 1, 1, &sampling);
    }
}

/// Asks for the log-probabilities of a prompt, in chunks of several sizes and one token at a time.
pub(super) fn check_prompt_logprobs(runner: &mut Runner, prompt: &Prompt, limit: Tolerance) {
    let whole = runner.prompt_logprobs(&prompt.ids, 512);
    assert_eq!(whole.len() + 1, prompt.prompt_logprobs.len());
    let Some(limit) = limit.logprob else { return };
    for (index, (found, expected)) in whole.iter().zip(&prompt.prompt_logprobs[1..]).enumerate() {
        let difference = (found.logprob - expected.expect("only the first is null")).abs();
        assert!(difference <= limit, "prompt logprob {} differs by {difference}", index + 1);
        let listed = found.top.iter().find(|(token, _)| *token == prompt.ids[index + 1]);
        assert!(listed.is_none_or(|(_, logprob)| *logprob == found.logprob));
        assert_eq!(listed.is_some(), found.rank <= 3);
    }
    for chunk in [1, 33] {
        assert!(runner.prompt_logprobs(&prompt.ids, chunk) == whole, "in chunks of {chunk} they are others");
    }
}

#[test]
fn llama() {
    check("tests/golden/llama", F32);
}

#[test]
fn llama3_rope_scaling() {
    check("tests/golden/llama3", F32);
}

#[test]
fn mistral_sliding_window() {
    check("tests/golden/mistral", F32);
}

#[test]
fn qwen2_biases() {
    check("tests/golden/qwen2", F32);
}

#[test]
fn qwen3_head_norms() {
    check("tests/golden/qwen3", F32);
}

#[test]
fn mixtral_experts() {
    check("tests/golden/mixtral", F32);
}

#[test]
fn qwen3_experts_on_some_layers() {
    check("tests/golden/qwen3moe", F32);
}

#[test]
fn deepseek_v2_latent_attention() {
    check("tests/golden/deepseek_v2", F32);
}

#[test]
fn deepseek_v3_groups_of_experts() {
    check("tests/golden/deepseek_v3", F32);
}

#[test]
fn gemma2_soft_caps() {
    check("tests/golden/gemma2", F32);
}

#[test]
fn gemma3_local_rope() {
    check("tests/golden/gemma3", F32);
}

#[test]
fn phi3_fused_linears() {
    check("tests/golden/phi3", F32);
}

#[test]
fn cohere_parallel_blocks() {
    check("tests/golden/cohere", F32);
}

#[test]
fn olmo2_norms_after_blocks() {
    check("tests/golden/olmo2", F32);
}

#[test]
fn gptneox_partial_rotary() {
    check("tests/golden/gptneox", F32);
}

#[test]
fn llama3_bf16_in_shards() {
    check("tests/golden/llama3-bf16-sharded", BF16);
}

#[test]
fn qwen2_bf16_in_shards() {
    check("tests/golden/qwen2-bf16-sharded", BF16);
}

#[test]
fn llama_adapters() {
    check_adapted("tests/golden/llama", "tests/golden/llama/adapters/lora-qv", F32);
    check_adapted("tests/golden/llama", "tests/golden/llama/adapters/lora-all", F32);
}

#[test]
fn qwen2_adapters() {
    check_adapted("tests/golden/qwen2", "tests/golden/qwen2/adapters/lora-qv", F32);
    check_adapted("tests/golden/qwen2", "tests/golden/qwen2/adapters/lora-all", F32);
}

#[test]
fn gptq_int4() {
    check("tests/golden/llama-gptq-int4-g32", F32);
}

#[test]
fn gptq_int4_with_zeros_in_act_order() {
    check("tests/golden/llama-gptq-int4-g32-actorder", F32);
}

#[test]
fn awq_int4() {
    check("tests/golden/llama-awq-int4-g32", F32);
}

#[test]
fn fp8_per_tensor() {
    check_fp8("tests/golden/llama-fp8-tensor");
}

#[test]
fn fp8_per_channel() {
    check_fp8("tests/golden/llama-fp8-channel");
}

/// Inputs are bf16 where the unit multiplies those, else f32.
fn check_fp8(path: &str) {
    let model = load(path);
    for kernels in Kernels::available() {
        let inputs = model.weights().packed().map(|weights| kernels.linear(weights).1);
        let bf16 = inputs.into_iter().any(|inputs| inputs == Encoding::Floats(Format::Bf16));
        let tolerance = if bf16 { QUANTISED_INPUTS } else { F32 };
        check_kernels(&model, &None, None, path, tolerance, kernels, "");
    }
}

#[test]
fn int8_per_channel() {
    let path = "tests/golden/llama-int8-w8a8";
    let model = load(path);
    for kernels in Kernels::available() {
        check_kernels(&model, &None, None, path, QUANTISED_INPUTS, kernels, "_actquant");
    }
}

#[test]
fn bundled_model() {
    check("models/demo", BF16);
}

#[test]
fn bundled_draft_model() {
    check("models/demo-draft", BF16);
}

#[test]
fn fp8_pages() {
    for path in ["tests/golden/llama", "tests/golden/qwen2", "tests/golden/mistral", "models/demo"] {
        check_prompts(load(path), None, Some(KvDtype::Fp8), path, FP8_PAGES);
    }
}

#[test]
fn int8_pages() {
    for path in ["tests/golden/llama", "tests/golden/qwen2", "tests/golden/mistral", "models/demo"] {
        check_prompts(load(path), None, Some(KvDtype::Int8), path, INT8_PAGES);
    }
}
