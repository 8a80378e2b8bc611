//! A row's bits depend on its sequence alone: not on the rows beside it, the chunks, the pages or the threads.
//!
//! The kernels promise it; this is where the promise is kept. Each case computes the same sequences twice, once alone on one
//! thread in one piece, and once interleaved at random on several threads, and compares logits and pages bit by bit.

use super::{Unit, load, repository, small_config, watched};
use crate::{
    Adapter, Config, ElementType, Engine, ExpertShape, KvMemory, LatentRanks, Model, ModelShape, Quantize, Row, Sample,
    TokenId,
    cpu::kernels::Kernels,
    model::{
        decoder::{Activation, NormKind},
        rope::Rope,
    },
};
use kv_cache::{KvDtype, PageId};
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use std::{collections::HashMap, sync::Arc};

/// A sequence and what was seen of it.
pub(super) struct Sequence {
    tokens: Vec<TokenId>,
    pages: Vec<PageId>,
    adapter: Option<Arc<Adapter>>,
    computed: usize,
    /// Bits of the logits after so many tokens.
    logits: HashMap<usize, Vec<u32>>,
}

impl Sequence {
    fn new(tokens: Vec<TokenId>, pages: Vec<PageId>, adapter: Option<Arc<Adapter>>) -> Self {
        Self { tokens, pages, adapter, computed: 0, logits: HashMap::new() }
    }

    fn done(&self) -> bool {
        self.computed == self.tokens.len()
    }
}

/// Computes the next tokens of some sequences in one step: `(sequence, tokens)`, each sampled at its end.
fn step(engine: &mut Engine, sequences: &mut [Sequence], parts: &[(usize, usize)]) {
    let sampling = watched();
    let rows: Vec<Row<'_>> = parts
        .iter()
        .map(|&(index, count)| {
            let sequence = &sequences[index];
            let end = sequence.computed + count;
            let history = &sequence.tokens[..end];
            let sample = Sample {
                sampling: &sampling,
                history,
                prompt_tokens: end,
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let tokens = &sequence.tokens[sequence.computed..end];
            Row {
                tokens,
                start: sequence.computed,
                pages: &sequence.pages,
                adapter: sequence.adapter.as_deref(),
                sample: Some(sample),
                ..Row::default()
            }
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
            let planes = [(layout.keys(), layout.key_dim), (layout.values(), layout.value_dim)];
            for (plane, dim) in planes.into_iter().filter(|(_, dim)| *dim > 0) {
                let sizes =
                    [(plane.elements, dim as usize * layout.dtype.bytes()), (plane.scales, layout.dtype.scale_bytes())];
                for (from, size) in sizes {
                    for head in 0..layout.kv_heads as usize {
                        let start = from + head * layout.page_tokens as usize * size;
                        bytes.extend_from_slice(&block[start..start + used * size]);
                    }
                }
            }
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
pub(super) struct Plan {
    pub(super) threads: usize,
    /// For each step: which sequences take part, with how many tokens at most. Ends with whatever is left, in one go.
    pub(super) steps: Vec<Vec<(usize, usize)>>,
    /// Turns the order of the pages.
    pub(super) page_stride: usize,
}

pub(super) fn run(
    model: &Arc<Model>,
    unit: impl Into<Unit>,
    config: &Config,
    lengths: &[usize],
    plan: &Plan,
) -> Vec<(Sequence, Vec<u8>)> {
    run_adapted(model, unit, config, lengths, plan, &[None])
}

/// The same, with `adapters` dealt out to the sequences in turn.
pub(super) fn run_adapted(
    model: &Arc<Model>,
    unit: impl Into<Unit>,
    config: &Config,
    lengths: &[usize],
    plan: &Plan,
    adapters: &[Option<Arc<Adapter>>],
) -> Vec<(Sequence, Vec<u8>)> {
    let config = Config { threads: Some(plan.threads), max_model_len: None, ..config.clone() };
    let mut engine = unit.into().engine(model.clone(), &config);
    poison(engine.memory());
    let layout = engine.memory().layout().clone();
    let vocab = model.info().vocab_size;
    // Strides are primes: one that divides the pool would name pages twice.
    let page_stride = if (layout.pages as usize).is_multiple_of(plan.page_stride) { 1 } else { plan.page_stride };
    let mut next_page = 0;
    let mut sequences: Vec<Sequence> = lengths
        .iter()
        .enumerate()
        .map(|(index, &length)| {
            let tokens = (0..length).map(|at| ((at * at * 31 + at * 7 + index * 1009) as u32) % vocab).collect();
            let pages = layout.pages_for(length);
            let all =
                (next_page..next_page + pages).map(|page| PageId((page * page_stride % layout.pages as usize) as u32));
            next_page += pages;
            Sequence::new(tokens, all.collect(), adapters[index % adapters.len()].clone())
        })
        .collect();
    assert!(next_page <= layout.pages as usize, "{next_page} pages in a pool of {}", layout.pages);
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
pub(super) fn compare(plain: &[(Sequence, Vec<u8>)], mixed: &[(Sequence, Vec<u8>)], what: &str) {
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
pub(super) fn token_by_token(sequence: usize, length: usize) -> Plan {
    Plan { threads: 1, steps: (0..length).map(|_| vec![(sequence, 1)]).collect(), page_stride: 1 }
}

fn plans() -> impl Strategy<Value = (Vec<usize>, Plan)> {
    let lengths = prop::collection::vec(1usize..150, 1..8);
    let count = prop_oneof![3 => Just(1usize), 2 => 1usize..20, 1 => 20usize..150];
    let steps = prop::collection::vec(prop::collection::vec((0usize..8, count), 1..8), 0..40);
    (lengths, steps, 2usize..4, prop::sample::select(vec![1usize, 29, 43]))
        .prop_map(|(lengths, steps, threads, page_stride)| (lengths, Plan { threads, steps, page_stride }))
}

/// What families differ in, at random over the weights of one of them.
#[derive(Clone, Debug)]
struct Variant {
    checkpoint: &'static str,
    /// Of the first layers; then again from the first.
    windows: [Option<usize>; 2],
    /// What `config.json` would say of the rope of layers with a window, and of those without.
    ropes: [serde_json::Value; 2],
    interleaved_pairs: bool,
    parallel: bool,
    norm: NormKind,
    activation: Activation,
    score_cap: Option<f32>,
    logit_cap: Option<f32>,
}

impl Variant {
    fn model(&self) -> Arc<Model> {
        let path = format!("tests/golden/{}", self.checkpoint);
        let mut model = Arc::into_inner(load(&path)).expect("nobody else has it");
        let decoder = &mut model.decoder;
        let dim = decoder.head_dim;
        let rope = |config| Rope::parse(config, "full_attention", dim).expect("a good rope");
        decoder.ropes = self.ropes.iter().map(rope).collect();
        for (layer, (window, rope)) in decoder.windows.iter_mut().zip(&mut decoder.layer_ropes).enumerate() {
            *window = self.windows[layer % 2];
            *rope = usize::from(window.is_none());
        }
        decoder.interleaved_pairs = self.interleaved_pairs;
        decoder.parallel = self.parallel;
        decoder.norm = self.norm;
        decoder.activation = self.activation;
        (decoder.score_cap, decoder.logit_cap) = (self.score_cap, self.logit_cap);
        Arc::new(model)
    }
}

fn variants() -> impl Strategy<Value = Variant> {
    let checkpoints = ["gemma2", "gemma3", "phi3", "cohere", "olmo2", "gptneox", "qwen3"];
    let window = || prop::option::of(1usize..100);
    let rope = |portion: f64| {
        prop::sample::select(vec![
            serde_json::json!({}),
            serde_json::json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}),
            serde_json::json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}),
        ])
        .prop_map(move |mut config| {
            config["partial_rotary_factor"] = portion.into();
            config
        })
    };
    let ropes = prop::sample::select(vec![0.25, 0.5, 1.0]).prop_flat_map(move |portion| (rope(portion), rope(portion)));
    let activation = prop::sample::select(vec![Activation::Silu, Activation::Gelu, Activation::GeluTanh]);
    let norm = prop::sample::select(vec![NormKind::Rms, NormKind::Layer]);
    let cap = || prop::option::of(1f32..50.0);
    let (checkpoint, flags) = (prop::sample::select(checkpoints.to_vec()), (any::<bool>(), any::<bool>()));
    (checkpoint, window(), window(), ropes, flags, norm, activation, cap(), cap()).prop_map(
        |(checkpoint, first, second, ropes, (interleaved_pairs, parallel), norm, activation, score_cap, logit_cap)| {
            Variant {
                checkpoint,
                windows: [first, second],
                ropes: ropes.into(),
                interleaved_pairs,
                parallel,
                norm,
                activation,
                score_cap,
                logit_cap,
            }
        },
    )
}

#[test]
fn whatever_families_differ_in() {
    for kernels in Kernels::available() {
        check_cases(8, (variants(), plans()), |(variant, (lengths, plan))| {
            check_plan(&variant.model(), kernels, &small_config(), &lengths, &plan, &[None]);
        });
    }
}

/// Runs `case` for values of `strategy`.
fn check_cases<T: std::fmt::Debug>(cases: u32, strategy: impl Strategy<Value = T>, case: impl Fn(T)) {
    let mut runner = TestRunner::new_with_rng(
        ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() },
        TestRng::deterministic_rng(RngAlgorithm::ChaCha),
    );
    let outcome = runner.run(&strategy, |value| {
        case(value);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// Computes sequences alone and as `plan` says.
fn check_plan(
    model: &Arc<Model>,
    kernels: &'static Kernels,
    config: &Config,
    lengths: &[usize],
    plan: &Plan,
    adapters: &[Option<Arc<Adapter>>],
) {
    let alone = Plan { threads: 1, steps: Vec::new(), page_stride: 1 };
    let plain = run_adapted(model, kernels, config, lengths, &alone, adapters);
    let mixed = run_adapted(model, kernels, config, lengths, plan, adapters);
    compare(&plain, &mixed, &format!("{} {}", model.info().architecture, kernels.name));
}

fn check_model(path: &str, cases: u32, kv_dtype: Option<KvDtype>) {
    check_adapted(&load(path), cases, kv_dtype, &[None]);
}

fn check_adapted(model: &Arc<Model>, cases: u32, kv_dtype: Option<KvDtype>, adapters: &[Option<Arc<Adapter>>]) {
    let config = Config { kv_dtype, ..small_config() };
    for kernels in Kernels::available() {
        check_cases(cases, plans(), |(lengths, plan)| {
            check_plan(model, kernels, &config, &lengths, &plan, adapters);
        });
    }
}

/// Shapes of small models with experts, latent attention or both.
fn shapes() -> impl Strategy<Value = ModelShape> {
    let even = |most: usize| (1..=most / 2).prop_map(|half| 2 * half);
    let latent = (prop::option::of(even(50)), even(90), even(40), even(20), even(40));
    let latent = latent
        .prop_map(|(query, key_value, plain, rope, value)| LatentRanks { query, key_value, plain, rope, value })
        .prop_map(Some);
    let experts = (1usize..20, 1usize..5, 1usize..90, prop_oneof![Just(0usize), 1usize..90]);
    let experts = experts.prop_map(|(count, chosen, intermediate, shared)| {
        Some(ExpertShape { count, chosen: chosen.min(count), intermediate, shared })
    });
    let parts = prop_oneof![(latent.clone(), Just(None)), (Just(None), experts.clone()), (latent, experts),];
    let dtype = prop::sample::select(vec![ElementType::F32, ElementType::F16, ElementType::Bf16, ElementType::Bf16]);
    let heads = prop::sample::select(vec![1usize, 2, 6, 36]);
    let quantize =
        prop::sample::select(vec![None, None, Some(Quantize::Int8), Some(Quantize::Int4), Some(Quantize::Fp8)]);
    let parts = (parts, dtype, quantize, heads, 30usize..140);
    parts.prop_map(|((latent, experts), dtype, quantize, heads, hidden)| ModelShape {
        name: "small",
        vocab_size: 300,
        hidden,
        intermediate: 100,
        layers: 3,
        heads,
        kv_heads: heads.div_ceil(2),
        head_dim: 16,
        latent,
        experts,
        qkv_bias: false,
        max_position: 512,
        dtype,
        quantize,
    })
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
fn f32_with_caps_and_norms_after_blocks() {
    check_model("tests/golden/gemma2", 4, None);
}

#[test]
fn f32_with_parallel_blocks_and_a_partial_rope() {
    check_model("tests/golden/gptneox", 4, None);
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
fn adapters_of_all_kinds_in_one_batch() {
    let path = "tests/golden/llama";
    let model = load(path);
    let adapter = |name| Some(Adapter::load(&model, &repository(&format!("{path}/adapters/{name}")), 8).expect("good"));
    check_adapted(&model, 8, None, &[adapter("lora-qv"), None, adapter("lora-all")]);
}

#[test]
fn adapters_over_bf16_weights() {
    let model = load("tests/golden/qwen2-bf16-sharded");
    let dir = repository("tests/golden/qwen2/adapters/lora-all");
    let adapter = Some(Adapter::load(&model, &dir, 8).expect("a good adapter"));
    check_adapted(&model, 6, None, &[None, adapter]);
}

#[test]
fn random_models_with_experts_and_latent_attention() {
    for kernels in Kernels::available() {
        check_cases(24, (shapes(), plans()), |(shape, (lengths, plan))| {
            let model = Model::random(&shape, 5).expect("memory");
            check_plan(&model, kernels, &small_config(), &lengths, &plan, &[None]);
        });
    }
}

#[test]
fn groups_of_experts_and_latents_in_narrow_pages() {
    check_model("tests/golden/deepseek_v3", 4, Some(KvDtype::Bf16));
    check_model("tests/golden/deepseek_v2", 4, Some(KvDtype::Int8));
}

#[test]
fn int4_in_act_order() {
    check_model("tests/golden/llama-gptq-int4-g32-actorder", 4, None);
}

#[test]
fn fp8_and_f16_beside_it() {
    check_model("tests/golden/llama-fp8-channel", 4, None);
}

#[test]
fn int8_weights() {
    check_model("tests/golden/llama-int8-w8a8", 4, None);
}

#[test]
fn f32_with_fp8_pages() {
    check_model("tests/golden/mistral", 6, Some(KvDtype::Fp8));
}

#[test]
fn bf16_with_int8_pages() {
    check_model("tests/golden/qwen2-bf16-sharded", 6, Some(KvDtype::Int8));
}

#[test]
fn decoding_gives_the_bits_of_prefill_at_every_length() {
    let model = load("tests/golden/llama3-bf16-sharded");
    for (kernels, kv_dtype) in
        Kernels::available().into_iter().flat_map(|kernels| KvDtype::ALL.map(|dtype| (kernels, dtype)))
    {
        let config = Config { kv_dtype: Some(kv_dtype), ..small_config() };
        let lengths = [70];
        let one = run(&model, kernels, &config, &lengths, &token_by_token(0, 70));
        for first in [1, 6, 7, 15, 16, 31, 32, 33, 64] {
            let plan = Plan { threads: 2, steps: vec![vec![(0, first)]], page_stride: 29 };
            let two = run(&model, kernels, &config, &lengths, &plan);
            compare(&one, &two, &format!("{} {kv_dtype}", kernels.name));
        }
    }
}

#[test]
fn long_sequences_are_split_over_threads_without_a_trace() {
    let config = Config { token_budget: 2048, kv_bytes: Some(32 << 20), ..small_config() };
    for path in ["models/demo-draft", "tests/golden/mistral", "tests/golden/deepseek_v2"] {
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
