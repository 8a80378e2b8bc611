//! A row's bits depend on its sequence alone: not on the rows beside it, the chunks, the pages or the threads.
//!
//! The kernels promise it; this is where the promise is kept. Each case computes the same sequences twice, once alone on one
//! thread in one piece, and once interleaved at random on several threads, and compares logits and pages bit by bit.

use super::{load, small_config};
use crate::{Config, Engine, KvMemory, Model, Row, Sample, Sampling, TokenId, cpu::kernels::Kernels};
use kv_cache::{KvDtype, PageId};
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use std::{collections::HashMap, sync::Arc};

/// A sequence and what was seen of it.
struct Sequence {
    tokens: Vec<TokenId>,
    pages: Vec<PageId>,
    computed: usize,
    /// Bits of the logits after so many tokens.
    logits: HashMap<usize, Vec<u32>>,
}

impl Sequence {
    fn new(tokens: Vec<TokenId>, pages: Vec<PageId>) -> Self {
        Self { tokens, pages, computed: 0, logits: HashMap::new() }
    }

    fn done(&self) -> bool {
        self.computed == self.tokens.len()
    }
}

/// Computes the next tokens of some sequences in one step: `(sequence, tokens)`, each sampled at its end.
fn step(engine: &mut Engine, sequences: &mut [Sequence], parts: &[(usize, usize)]) {
    let sampling = Sampling::default();
    let rows: Vec<Row<'_>> = parts
        .iter()
        .map(|&(index, count)| {
            let sequence = &sequences[index];
            let end = sequence.computed + count;
            let history = &sequence.tokens[..end];
            let sample = Sample { sampling: &sampling, history, prompt_tokens: end, forbidden: &[] };
            let tokens = &sequence.tokens[sequence.computed..end];
            Row { tokens, start: sequence.computed, pages: &sequence.pages, sample: Some(sample) }
        })
        .collect();
    engine.step(&rows, &mut |_| {}).expect("good rows");
    for (row, &(index, count)) in parts.iter().enumerate() {
        let sequence = &mut sequences[index];
        sequence.computed += count;
        let logits = engine.logits(row).expect("every row is sampled");
        sequence.logits.insert(sequence.computed, logits.iter().map(|logit| logit.to_bits()).collect());
    }
}

/// Copies the keys and values of the first `tokens` tokens, in the order of the sequence.
fn contents(memory: &KvMemory, pages: &[PageId], tokens: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let layout = memory.layout();
    let mut bytes = Vec::new();
    for layer in 0..layout.layers {
        let mut block = vec![0; layout.block_bytes()];
        for (index, page) in pages[..layout.pages_for(tokens)].iter().enumerate() {
            let offset = layout.block_offset(layer, *page);
            memory.file().read_exact_at(&mut block, offset as u64).expect("the pool's bytes");
            let used = (tokens - index * layout.page_tokens as usize).min(layout.page_tokens as usize);
            let head = layout.key_dim as usize * layout.dtype.bytes();
            let run = layout.page_tokens as usize * head;
            block.chunks_exact(run).for_each(|heads| bytes.extend_from_slice(&heads[..used * head]));
        }
    }
    bytes
}

/// Fills a pool with NaN, which no result can hide.
fn poison(memory: &KvMemory) {
    use std::os::unix::fs::FileExt;
    let bytes = vec![0xff; memory.layout().pool_bytes()];
    memory.file().write_all_at(&bytes, 0).expect("the pool's bytes");
}

/// How one side of a comparison is run.
#[derive(Clone, Debug)]
struct Plan {
    threads: usize,
    /// For each step: which sequences take part, with how many tokens at most. Ends with whatever is left, in one go.
    steps: Vec<Vec<(usize, usize)>>,
    /// Turns the order of the pages.
    page_stride: usize,
}

fn run(
    model: &Arc<Model>,
    kernels: &'static Kernels,
    config: &Config,
    lengths: &[usize],
    plan: &Plan,
) -> Vec<(Sequence, Vec<u8>)> {
    let config = Config { threads: Some(plan.threads), max_model_len: None, ..config.clone() };
    let mut engine = Engine::with_kernels(model.clone(), &config, kernels).expect("an engine");
    poison(engine.memory());
    let layout = engine.memory().layout().clone();
    let vocab = model.info().vocab_size;
    let mut next_page = 0;
    let mut sequences: Vec<Sequence> = lengths
        .iter()
        .enumerate()
        .map(|(index, &length)| {
            let tokens = (0..length).map(|at| ((at * at * 31 + at * 7 + index * 1009) as u32) % vocab).collect();
            let pages = layout.pages_for(length);
            let all = (next_page..next_page + pages)
                .map(|page| PageId((page * plan.page_stride % layout.pages as usize) as u32));
            next_page += pages;
            Sequence::new(tokens, all.collect())
        })
        .collect();
    assert!(next_page <= layout.pages as usize, "{next_page} pages in a pool of {}", layout.pages);
    let coprime = plan.page_stride == 1 || !(layout.pages as usize).is_multiple_of(plan.page_stride);
    assert!(coprime, "every page is to appear once");
    for parts in &plan.steps {
        let mut budget = config.token_budget as usize;
        let mut rows = Vec::new();
        for &(index, count) in parts {
            let index = index % sequences.len();
            let left = sequences[index].tokens.len() - sequences[index].computed;
            let count = count.min(left).min(budget);
            if count > 0 && rows.iter().all(|(taken, _)| *taken != index) {
                rows.push((index, count));
                budget -= count;
            }
        }
        step(&mut engine, &mut sequences, &rows);
    }
    for index in 0..sequences.len() {
        while !sequences[index].done() {
            let left = sequences[index].tokens.len() - sequences[index].computed;
            step(&mut engine, &mut sequences, &[(index, left.min(config.token_budget as usize))]);
        }
    }
    let memory = engine.memory().clone();
    sequences
        .into_iter()
        .map(|sequence| {
            let bytes = contents(&memory, &sequence.pages, sequence.tokens.len());
            (sequence, bytes)
        })
        .collect()
}

/// Compares every page and all logits that both sides saw.
fn compare(plain: &[(Sequence, Vec<u8>)], mixed: &[(Sequence, Vec<u8>)], what: &str) {
    for (index, ((plain, plain_bytes), (mixed, mixed_bytes))) in plain.iter().zip(mixed).enumerate() {
        assert!(plain_bytes == mixed_bytes, "{what}: pages of sequence {index} differ");
        let last = plain.tokens.len();
        assert!(mixed.logits.contains_key(&last), "the last logits are always compared");
        for (tokens, logits) in &mixed.logits {
            if let Some(expected) = plain.logits.get(tokens) {
                assert!(logits == expected, "{what}: logits of sequence {index} after {tokens} tokens differ");
                assert!(logits.iter().all(|bits| f32::from_bits(*bits).is_finite()));
            }
        }
    }
}

/// One token at a time, alone: every prefix's logits.
fn token_by_token(sequence: usize, length: usize) -> Plan {
    Plan { threads: 1, steps: (0..length).map(|_| vec![(sequence, 1)]).collect(), page_stride: 1 }
}

fn plans() -> impl Strategy<Value = (Vec<usize>, Plan)> {
    let lengths = prop::collection::vec(1usize..150, 1..8);
    let count = prop_oneof![3 => Just(1usize), 2 => 1usize..20, 1 => 20usize..150];
    let steps = prop::collection::vec(prop::collection::vec((0usize..8, count), 1..8), 0..40);
    (lengths, steps, 2usize..4, prop::sample::select(vec![1usize, 29, 43]))
        .prop_map(|(lengths, steps, threads, page_stride)| (lengths, Plan { threads, steps, page_stride }))
}

fn check_model(path: &str, cases: u32, kv_dtype: Option<KvDtype>) {
    let model = load(path);
    let config = Config { kv_dtype, ..small_config() };
    for kernels in Kernels::available() {
        let mut runner = TestRunner::new_with_rng(
            ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() },
            TestRng::deterministic_rng(RngAlgorithm::ChaCha),
        );
        let outcome = runner.run(&plans(), |(lengths, plan)| {
            let alone = Plan { threads: 1, steps: Vec::new(), page_stride: 1 };
            let plain = run(&model, kernels, &config, &lengths, &alone);
            let mixed = run(&model, kernels, &config, &lengths, &plan);
            compare(&plain, &mixed, &format!("{path} {}", kernels.name));
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{error}");
        }
    }
}

#[test]
fn f32_with_a_window() {
    check_model("tests/golden/mistral", 6, None);
}

#[test]
fn f32_with_head_norms_and_bf16_pages() {
    check_model("tests/golden/qwen3", 6, Some(KvDtype::Bf16));
}

#[test]
fn bf16_with_biases() {
    check_model("tests/golden/qwen2-bf16-sharded", 6, None);
}

#[test]
fn bf16_with_f16_pages() {
    check_model("models/demo-draft", 6, Some(KvDtype::F16));
}

#[test]
fn decoding_gives_the_bits_of_prefill_at_every_length() {
    let model = load("tests/golden/llama3-bf16-sharded");
    for kernels in Kernels::available() {
        let lengths = [70];
        let one = run(&model, kernels, &small_config(), &lengths, &token_by_token(0, 70));
        for first in [1, 6, 7, 15, 16, 31, 32, 33, 64] {
            let plan = Plan { threads: 2, steps: vec![vec![(0, first)]], page_stride: 29 };
            let two = run(&model, kernels, &small_config(), &lengths, &plan);
            compare(&one, &two, kernels.name);
        }
    }
}

#[test]
fn long_sequences_are_split_over_threads_without_a_trace() {
    let config = Config { token_budget: 2048, kv_bytes: 32 << 20, ..small_config() };
    for path in ["models/demo-draft", "tests/golden/mistral"] {
        let model = load(path);
        let length = 1023.min(model.info().max_position as usize);
        for kernels in Kernels::available() {
            let alone = Plan { threads: 1, steps: vec![vec![(0, length - 3)], vec![(0, 1)]], page_stride: 1 };
            let plain = run(&model, kernels, &config, &[length], &alone);
            for threads in [2, 3, 7] {
                let steps = vec![vec![(0, 500)], vec![(0, length - 503)], vec![(0, 1)], vec![(0, 1)]];
                let split = run(&model, kernels, &config, &[length], &Plan { threads, steps, page_stride: 29 });
                compare(&plain, &split, &format!("{path} {} {threads} threads", kernels.name));
            }
        }
    }
}
