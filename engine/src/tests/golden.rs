//! Logits, continuations and log-probabilities against what the reference recorded (`tests/golden/README.md`).

use super::{Runner, load, repository};
use crate::{Sampling, TokenId, cpu::kernels::Kernels};
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    ids: Vec<TokenId>,
    logit_absmax: f32,
    greedy: Vec<TokenId>,
    greedy_logprobs: Vec<f32>,
    greedy_gaps: Vec<f32>,
    prompt_logprobs: Vec<Option<f32>>,
}

/// The limits of one arithmetic, from the README.
#[derive(Clone, Copy)]
struct Tolerance {
    /// Of the largest logit.
    logit: f32,
    /// Below this gap between the best two logits another token may win.
    gap: f32,
    /// Of log-probabilities; `None` where the README sets no limit.
    logprob: Option<f32>,
}

const F32: Tolerance = Tolerance { logit: 1e-3, gap: 1e-2, logprob: Some(2e-3) };
const BF16: Tolerance = Tolerance { logit: 0.05, gap: 0.5, logprob: None };

fn check(path: &str, tolerance: Tolerance) {
    let model = load(path);
    let text = std::fs::read(repository(path).join("expected.json")).expect("expected.json");
    let expected: Expected = serde_json::from_slice(&text).expect("expected.json");
    let logits = std::fs::read(repository(path).join("logits.safetensors")).expect("logits.safetensors");
    let logits = SafeTensors::deserialize(&logits).expect("logits.safetensors");
    for kernels in Kernels::available() {
        let mut runner = Runner::new(model.clone(), kernels);
        for prompt in &expected.prompts {
            let bytes = logits.tensor(&prompt.name).expect("a tensor for each prompt").data();
            let reference: Vec<f32> = bytes
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                .collect();
            for chunk in [512, 33] {
                check_prompt(&mut runner, prompt, &reference, chunk, tolerance, &format!("{path} {}", kernels.name));
            }
        }
        check_prompt_logprobs(&mut runner, &expected.prompts[1], tolerance);
    }
}

/// Computes a prompt in chunks, compares its last logits, and continues it greedily one token at a time.
fn check_prompt(runner: &mut Runner, prompt: &Prompt, reference: &[f32], chunk: usize, limit: Tolerance, what: &str) {
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

/// Feeds a prompt token by token and looks up each next token among the log-probabilities.
fn check_prompt_logprobs(runner: &mut Runner, prompt: &Prompt, limit: Tolerance) {
    let Some(limit) = limit.logprob else { return };
    let sampling = Sampling { logprobs: Some(u32::MAX), ..Sampling::default() };
    for (index, expected) in prompt.prompt_logprobs.iter().enumerate().skip(1) {
        let sampled = runner.draw(&prompt.ids[..index], index - 1, 1, &sampling);
        let top = sampled.logprobs.expect("asked for").top;
        let (_, found) = top.iter().find(|(token, _)| *token == prompt.ids[index]).expect("every token is listed");
        let difference = (found - expected.expect("only the first is null")).abs();
        assert!(difference <= limit, "prompt logprob {index} differs by {difference}");
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
fn llama3_bf16_in_shards() {
    check("tests/golden/llama3-bf16-sharded", BF16);
}

#[test]
fn qwen2_bf16_in_shards() {
    check("tests/golden/qwen2-bf16-sharded", BF16);
}

#[test]
fn bundled_model() {
    check("models/demo", BF16);
}

#[test]
fn bundled_draft_model() {
    check("models/demo-draft", BF16);
}
