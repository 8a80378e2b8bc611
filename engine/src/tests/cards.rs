//! A card, played by the processor: what it computes beside what was recorded, its bits in any batch, and what it is asked for.

use super::{
    Runner, Unit, golden, invariance,
    invariance::{Plan, token_by_token},
    load, small_config,
};
use crate::{
    Config, Device, Engine, Error, Row, Sample, Sampling, check_device,
    cuda::{Emulated, Order},
};
use kv_cache::{KvDtype, PageId};
use std::sync::atomic::Ordering::Relaxed;

/// Compares the model at `path` with what was recorded, in chunks of two sizes and then token by token.
fn check(path: &str) {
    for order in [Order::Forward, Order::Backward] {
        let mut runner = Runner::new(load(path), Unit::Card(order));
        for (prompt, reference) in golden::prompts(path, "").iter().filter(|(prompt, _)| prompt.ids.len() <= 200) {
            for chunk in [512, 33] {
                let what = format!("{path} {order:?}");
                golden::check_prompt(&mut runner, prompt, reference, chunk, golden::BF16, &what);
            }
        }
    }
}

#[test]
fn llama() {
    check("tests/golden/llama");
    check("tests/golden/llama3-bf16-sharded");
}

#[test]
fn mistral_sliding_window() {
    check("tests/golden/mistral");
}

#[test]
fn qwen() {
    check("tests/golden/qwen2");
    check("tests/golden/qwen2-bf16-sharded");
    check("tests/golden/qwen3");
}

#[test]
fn gemma() {
    check("tests/golden/gemma2");
    check("tests/golden/gemma3");
}

#[test]
fn cohere_parallel_blocks() {
    check("tests/golden/cohere");
}

#[test]
fn olmo2_norms_after_blocks() {
    check("tests/golden/olmo2");
}

#[test]
fn bundled_models() {
    check("models/demo-draft");
}

#[test]
fn a_sequence_has_its_bits_in_any_batch_and_in_any_chunks() {
    let model = load("tests/golden/llama3-bf16-sharded");
    let config = Config { token_budget: 160, ..small_config() };
    let lengths = [70, 33, 20, 5];
    let plain: Vec<_> = (0..lengths.len())
        .map(|sequence| invariance::run(&model, Unit::Card(Order::Forward), &config, &lengths, &token_by_token(sequence, lengths[sequence])))
        .collect();
    let steps = vec![
        vec![(0, 40), (1, 1), (2, 17)],
        vec![(0, 1), (1, 31), (2, 1), (3, 2)],
        vec![(0, 1), (1, 1), (2, 1), (3, 1)],
    ];
    let mixed = invariance::run(&model, Unit::Card(Order::Backward), &config, &lengths, &Plan { threads: 2, steps, page_stride: 29 });
    for plain in &plain {
        invariance::compare(plain, &mixed, "a card");
    }
}

/// Decodes `steps` steps of `batch` sequences on an engine whose card computes nothing, and returns what it was asked meanwhile: memory,
/// uploads, calls, waits.
fn asked(batch: usize, steps: usize, sampling: &Sampling) -> Vec<[usize; 4]> {
    let device = Emulated::recording();
    let asked = device.asked();
    let config = Config { kv_bytes: Some(1 << 20), ..small_config() };
    let mut engine = Engine::on_device(load("tests/golden/llama"), &config, Box::new(device)).expect("an engine");
    let pages: Vec<Vec<PageId>> = (0..batch as u32).map(|at| (at * 8..at * 8 + 8).map(PageId).collect()).collect();
    let counts = || [&asked.allocations, &asked.uploads, &asked.calls, &asked.waits].map(|count| count.load(Relaxed));
    let mut before = counts();
    (0..steps)
        .map(|step| {
            let history = vec![1; 30 + step];
            let sample = Sample { sampling, history: &history, prompt_tokens: 30, forbidden: &[], min_tokens: 0, grammar: None };
            let row = |pages| Row { tokens: &[7], start: 29 + step, pages, sample: Some(sample), ..Row::default() };
            let rows: Vec<Row<'_>> = pages.iter().map(|pages| row(&pages[..])).collect();
            let mut layers = 0;
            engine.step(&rows, &mut |_| layers += 1).expect("good rows");
            assert_eq!(layers, 3);
            let after = counts();
            let during = std::array::from_fn(|at| after[at] - before[at]);
            before = after;
            during
        })
        .collect()
}

#[test]
fn a_step_that_decodes_is_one_copy_one_graph_and_one_wait_for_its_tokens() {
    for (batch, sampling) in [
        (1, Sampling::default()),
        (5, Sampling::default()),
        (16, Sampling { temperature: 0.7, seed: 3, ..Sampling::default() }),
    ] {
        let steps = asked(batch, 6, &sampling);
        // The first makes the graph. A wait for a mark that was passed long ago costs nothing, but is counted.
        assert!(steps[1..].iter().all(|step| *step == [0, 1, 1, 2]), "{batch}: {steps:?}");
    }
}

#[test]
fn what_a_card_does_not_run_is_refused_by_name_before_weights_are_loaded() {
    let check = |path: &str, kv_dtype: Option<KvDtype>, words: &[&str]| {
        let config = Config { device: Device::Cuda(0), kv_dtype, ..small_config() };
        let path = super::repository(path);
        let error = check_device(&path, &config).expect_err("nothing that runs").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
        check_device(&path, &Config { device: Device::Cpu, ..config }).expect("the processor runs all");
    };
    check("tests/golden/deepseek_v2", None, &["latent attention", "DeepseekV2ForCausalLM"]);
    check("tests/golden/mixtral", None, &["experts", "MixtralForCausalLM"]);
    check("tests/golden/llama-gptq-int4-g32", None, &["int4 (gptq"]);
    check("tests/golden/llama-fp8-tensor", None, &["fp8"]);
    check("tests/golden/llama", Some(KvDtype::Fp8), &["kv_dtype", "fp8"]);
    let config = Config { device: Device::Cuda(0), ..small_config() };
    check_device(&super::repository("tests/golden/llama"), &config).expect("a model that runs");
}

#[test]
#[cfg(feature = "cuda")]
fn a_machine_without_a_card_says_so() {
    let config = Config { device: Device::Cuda(0), ..small_config() };
    match Engine::new(load("tests/golden/llama"), &config) {
        Ok(engine) => assert!(engine.config().device == Device::Cuda(0), "a machine with a card runs on it"),
        Err(Error::Card { card, problem, .. }) => assert!(card.contains("cuda:0") && !problem.is_empty(), "{problem}"),
        Err(other) => panic!("{other}"),
    }
}
