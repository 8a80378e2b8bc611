//! A card, played by the processor: what it computes beside what was recorded, its bits in any batch, and what it is asked for.

mod adapters;

use super::{
    Runner, Unit, checkpoints, gguf, golden, invariance,
    invariance::{Plan, token_by_token},
    load, repository, small_config, watched,
};
use crate::{
    Adapter, Config, Device, Engine, Error, Model, Quantize, Row, Sample, Sampling, TokenId, check_device,
    cpu::kernels::Kernels,
    cuda::{Device as _, Emulated, Order},
    scheduler::{Drawn, History, Limits, Request, Scheduler, Stop, Until},
};
use kv_cache::{KvDtype, PageId, PoolCopy, root_salt};
use std::{
    collections::HashMap,
    fs,
    ops::Range,
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

const START: Duration = Duration::ZERO;

/// Compares what `unit` computes of the model at `path` with what was recorded, in chunks of two sizes and then token by token.
fn check_on(path: &str, unit: Unit) {
    check_pages(path, unit, None, golden::BF16);
}

fn check_pages(path: &str, unit: Unit, kv_dtype: Option<KvDtype>, tolerance: golden::Tolerance) {
    let mut runner = Runner::with(load(path), unit, Config { kv_dtype, ..small_config() });
    for (mut prompt, reference) in golden::prompts(path, "").into_iter().filter(|(prompt, _)| prompt.ids.len() <= 200) {
        match NEAR_TIES.iter().find(|(model, name, _)| *model == path && *name == prompt.name) {
            Some((_, _, 0)) => continue,
            tie => prompt.greedy.truncate(tie.map_or(usize::MAX, |(_, _, tokens)| *tokens)),
        }
        for chunk in [512, 33] {
            golden::check_prompt(&mut runner, &prompt, &reference, chunk, tolerance, &format!("{path} {unit:?}"));
        }
    }
}

/// Models, prompts, and the tokens of a continuation after which 16-bit floats decide which experts a token goes to, and so which token is next. In the
/// reference the second and third expert of the last layer have scores of 0.2475 and 0.2409 there, and with the third in place of the second
/// token 29 is the one that a card finds. Where there are none it is the prompt itself: in the reference its last token has scores of 0.1573 and 0.1567 in the
/// last layer, and in f32 the other choice makes as large a difference in logits.
const NEAR_TIES: [(&str, &str, usize); 2] =
    [("tests/golden/qwen3moe", "len200", 29), ("tests/golden/deepseek_v2", "len17", 0)];

fn check(paths: &[&str]) {
    for path in paths {
        check_on(path, Unit::Card(Order::Forward));
    }
}

const LLAMA: [&str; 2] = ["tests/golden/llama", "tests/golden/llama3-bf16-sharded"];
const QWEN: [&str; 3] = ["tests/golden/qwen2", "tests/golden/qwen2-bf16-sharded", "tests/golden/qwen3"];
const GEMMA: [&str; 2] = ["tests/golden/gemma2", "tests/golden/gemma3"];
const OTHERS: [&str; 5] =
    ["tests/golden/mistral", "tests/golden/phi3", "tests/golden/cohere", "tests/golden/olmo2", "tests/golden/gptneox"];
const EXPERTS: [&str; 2] = ["tests/golden/mixtral", "tests/golden/qwen3moe"];

const DEEPSEEK: [&str; 2] = ["tests/golden/deepseek_v2", "tests/golden/deepseek_v3"];

const QUANTISED: [&str; 6] = [
    "tests/golden/llama-gptq-int4-g32",
    "tests/golden/llama-gptq-int4-g32-actorder",
    "tests/golden/llama-awq-int4-g32",
    "tests/golden/llama-fp8-tensor",
    "tests/golden/llama-fp8-channel",
    "tests/golden/llama-int8-w8a8",
];

#[test]
fn llama() {
    check(&LLAMA);
}

#[test]
fn qwen() {
    check(&QWEN);
}

#[test]
fn gemma() {
    check(&GEMMA);
}

#[test]
fn other_families() {
    check(&OTHERS);
}

#[test]
fn experts() {
    check(&EXPERTS);
}

#[test]
fn latent_attention() {
    check(&DEEPSEEK);
}

#[test]
fn quantised_weights() {
    check(&QUANTISED);
}

/// Files of blocks: of every type, and matrices that are put together of two.
const BLOCKS: [&str; 3] = ["llama-q4_0", "qwen2-q8_0", "k-quants"];

#[test]
fn blocks_of_gguf() {
    BLOCKS.into_iter().for_each(|name| gguf::check_on(name, Unit::Card(Order::Forward), golden::BF16.logit));
}

/// What is quantised as it is loaded: models with a head of its own, a tied one, biases, norms after blocks, experts, latents.
const AT_LOAD: [&str; 6] = [
    "tests/golden/llama",
    "tests/golden/llama3-bf16-sharded",
    "tests/golden/gptneox",
    "tests/golden/gemma2",
    "tests/golden/qwen3moe",
    "tests/golden/deepseek_v2",
];

/// How far a card may be from the processor, which rounds inputs of int8 to eight bits: twice what was measured, most of it of random weights.
const BESIDE: [f64; 3] = [0.2, 0.06, 0.03];
/// The same of a library, for which inputs of int8 and of fp8 are rounded to eight bits.
const BESIDE_A_LIBRARY: [f64; 3] = [0.15, 0.06, 0.6];

fn load_quantized(path: &str, quantize: Quantize) -> Arc<Model> {
    Model::load_quantized(&repository(path), Some(quantize), &mut |_| {}).expect("a good checkpoint")
}

/// Compares logits of the model at `path` with those of the processor, over the same weights; `limits` are of their size, for int8, int4 and fp8.
fn check_at_load(path: &str, unit: Unit, limits: [f64; 3]) {
    let tokens: Vec<TokenId> = (0..60).map(|at| at * 13 % 900).collect();
    let logits = |model: Arc<Model>, unit: Unit| {
        let mut runner = Runner::new(model, unit);
        runner.draw(&tokens, 0, 33, &watched());
        runner.engine.logits(0).expect("sampled").to_vec()
    };
    for (quantize, limit) in [Quantize::Int8, Quantize::Int4, Quantize::Fp8].into_iter().zip(limits) {
        let model = load_quantized(path, quantize);
        let (ours, expected) = (logits(model.clone(), unit), logits(model, Kernels::detect().into()));
        let size = |values: &[f32]| values.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
        let difference: Vec<f32> = ours.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let error = size(&difference) / size(&expected);
        assert!(error < limit, "{path} {quantize} {unit:?}: {error}");
    }
}

#[test]
fn weights_quantised_at_load() {
    AT_LOAD.iter().for_each(|path| check_at_load(path, Unit::Card(Order::Forward), BESIDE));
}

#[test]
fn pages_of_eight_bits() {
    let card = Unit::Card(Order::Forward);
    check_pages("tests/golden/llama", card, Some(KvDtype::Fp8), golden::FP8_PAGES);
    check_pages("tests/golden/llama", card, Some(KvDtype::Int8), golden::BF16);
    check_pages("tests/golden/deepseek_v2", card, Some(KvDtype::Fp8), golden::FP8_PAGES);
    check_pages("tests/golden/deepseek_v3", card, Some(KvDtype::Int8), golden::BF16);
}

#[test]
fn threads_may_take_turns_in_the_other_order() {
    check_on("models/demo-draft", Unit::Card(Order::Backward));
}

#[test]
fn a_sequence_has_its_bits_in_any_batch_and_in_any_chunks() {
    let (alone, together) = (Unit::Card(Order::Forward), Unit::Card(Order::Backward));
    INVARIANT.iter().for_each(|path| check_invariance(load(path), alone, together));
    check_invariance(load_quantized("tests/golden/llama3-bf16-sharded", Quantize::Int4), alone, together);
}

#[test]
fn cards_that_share_a_model_have_the_bits_of_one() {
    // Outputs that no number of ranks divides; biases; norms of each head and after; a head that all have; experts; codes, and codes in an order.
    for (path, ranks) in [
        ("tests/golden/llama3-bf16-sharded", 3),
        ("tests/golden/gptneox", 4),
        ("tests/golden/cohere", 3),
        ("tests/golden/gemma3", 4),
        ("tests/golden/qwen3moe", 4),
        ("tests/golden/mixtral", 2),
        ("tests/golden/llama-gptq-int4-g32-actorder", 2),
        ("tests/golden/llama-int8-w8a8", 2),
        ("tests/gguf/k-quants.gguf", 4),
    ] {
        check_invariance(load(path), Unit::Card(Order::Forward), Unit::Cards(ranks));
    }
    // A tied head of codes.
    let model = load_quantized("tests/golden/llama3-bf16-sharded", Quantize::Int8);
    check_invariance(model, Unit::Card(Order::Forward), Unit::Cards(3));
}

/// A dense model, one in blocks, one with experts, and those with latent attention.
const INVARIANT: [&str; 5] = [
    "tests/golden/llama3-bf16-sharded",
    "tests/gguf/k-quants.gguf",
    "tests/golden/qwen3moe",
    "tests/golden/deepseek_v2",
    "tests/golden/deepseek_v3",
];

/// Computes some sequences token by token, each alone, on one unit, and mixed on another; the bits are to be the same.
fn check_invariance(model: Arc<Model>, alone: Unit, together: Unit) {
    let config = Config { token_budget: 160, ..small_config() };
    let lengths = [70, 33, 20, 5];
    let steps = vec![
        vec![(0, 40), (1, 1), (2, 17)],
        vec![(0, 1), (1, 31), (2, 1), (3, 2)],
        vec![(0, 1), (1, 1), (2, 1), (3, 1)],
    ];
    let mixed = invariance::run(&model, together, &config, &lengths, &Plan { threads: 2, steps, page_stride: 29 });
    for (sequence, length) in lengths.into_iter().enumerate() {
        let plain = invariance::run(&model, alone, &config, &lengths, &token_by_token(sequence, length));
        invariance::compare(&plain, &mixed, &format!("{} on a card", model.info().architecture));
    }
}

#[test]
fn weights_leave_the_host_s_memory() {
    let model = load("tests/golden/qwen3moe");
    let (weights, info) = (Arc::downgrade(&model), model.info().clone());
    // Several workers share a model that one process loads once.
    let mut engines =
        [Unit::Card(Order::Forward), Unit::Cards(2)].map(|unit| unit.engine(model.clone(), &small_config()));
    assert!(weights.upgrade().is_some());
    drop(model);
    assert!(weights.upgrade().is_none(), "an engine keeps them");
    let pages: Vec<PageId> = (0..8).map(PageId).collect();
    let [one, two] = engines.each_mut().map(|engine| {
        assert!(*engine.model().info() == info && engine.expert_traffic().all > 0);
        engine.model().grammars().expect("its tokens");
        logits(engine, &[5, 6, 7], 0, &pages, false)
    });
    assert!(one == two);
}

/// Computes `tokens[start..]` as a row of its own, and returns the logits of what follows.
fn logits(engine: &mut Engine, tokens: &[TokenId], start: usize, pages: &[PageId], leaves: bool) -> Vec<u32> {
    let sampling = watched();
    let sample =
        Sample { sampling: &sampling, history: tokens, prompt_tokens: 1, forbidden: &[], min_tokens: 0, grammar: None };
    let row = Row { tokens: &tokens[start..], start, pages, leaves, sample: Some(sample), ..Row::default() };
    let mut layers = Vec::new();
    engine.step(&[row], &mut |layer| layers.push(layer)).expect("a good row");
    assert_eq!(layers, [0, 1, 2]);
    engine.logits(0).expect("it was sampled").iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn pages_leave_and_land() {
    let (one, three, llama) = (Unit::Card(Order::Forward), Unit::Cards(3), "tests/golden/llama3-bf16-sharded");
    check_landing(llama, one, one, None);
    for kv_dtype in [None, Some(KvDtype::Int8)] {
        // Whole pages leave several cards, and land on them.
        check_landing(llama, one, three, kv_dtype);
        check_landing(llama, three, one, kv_dtype);
        check_landing("tests/golden/deepseek_v3", one, Unit::Card(Order::Backward), kv_dtype);
    }
}

/// How pages move.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Host,
    /// From card to card, in one process.
    Card,
    /// As those of two processes.
    Process,
}

/// Moves pages of the model at `path` that `from` computes to `to`, in every way, and compares what both make of them.
fn check_landing(path: &str, from: Unit, to: Unit, kv_dtype: Option<KvDtype>) {
    for by in [By::Host, By::Card, By::Process] {
        check_landing_by(by, path, from, to, kv_dtype);
    }
}

fn check_landing_by(by: By, path: &str, from: Unit, to: Unit, kv_dtype: Option<KvDtype>) {
    use std::os::unix::fs::FileExt;
    let model = load(path);
    let config = Config { kv_bytes: Some(1 << 20), kv_dtype, ..small_config() };
    let (mut source, mut target) = (from.engine(model.clone(), &config), to.engine(model.clone(), &config));
    let tokens: Vec<TokenId> = (0..75).map(|at| at * 7 % 1000 + 3).collect();
    let (here, there) = ([3, 9, 4, 1, 7].map(PageId), [2, 11, 5, 6, 8].map(PageId));
    // Two pages stay at first, the others leave while they are computed.
    logits(&mut source, &tokens[..32], 0, &here, false);
    logits(&mut source, &tokens[..70], 32, &here, true);
    let (ours, theirs) = (source.memory().layout().clone(), target.memory().layout().clone());
    let (from, to) = (source.backing().expect("a card"), target.backing().expect("a card"));
    let bytes = ours.block_bytes();
    let moves: Vec<PoolCopy> = (0..ours.layers)
        .flat_map(|layer| here.iter().zip(&there).map(move |(here, there)| (layer, *here, *there)))
        .map(|(layer, here, there)| PoolCopy {
            source: ours.block_offset(layer, here),
            target: theirs.block_offset(layer, there),
            bytes,
        })
        .collect();
    if by == By::Host {
        from.fetch(&moves.iter().map(PoolCopy::from).collect::<Vec<_>>()).expect("pages that are there");
        for PoolCopy { source: here, target: there, .. } in &moves {
            let mut block = vec![0; bytes];
            source.memory().file().read_exact_at(&mut block, *here as u64).expect("the pool's bytes");
            assert!(block.iter().any(|byte| *byte != 0), "the block at {here} did not leave");
            target.memory().file().write_all_at(&block, *there as u64).expect("the pool's bytes");
        }
        to.store(&moves.iter().map(PoolCopy::to).collect::<Vec<_>>()).expect("pages of the pool");
    } else {
        let mut shared: serde_json::Value =
            serde_json::from_str(&to.share().expect("it can be reached")).expect("what says where");
        if by == By::Process {
            shared["number"] = 0.into();
        }
        let reached = from.reach(&shared.to_string()).expect("it can be reached");
        // Parts of blocks, and runs of them, move as blocks do.
        let (first, rest) = moves.split_first().expect("blocks");
        let half = PoolCopy { bytes: bytes / 2, ..*first };
        let other =
            PoolCopy { source: first.source + bytes / 2, target: first.target + bytes / 2, bytes: bytes - bytes / 2 };
        reached.write(&[half, other]).expect("it is reached");
        reached.write(rest).expect("it is reached");
    }
    let expected = logits(&mut source, &tokens, 70, &here, false);
    assert!(expected == logits(&mut target, &tokens, 70, &there, false), "{path} {by:?}");
    // Who still has pages of an engine that has ended is told so.
    let reached = from.reach(&to.share().expect("it is there"));
    drop(target);
    let gone = [to.fetch(&[moves[0].to()]), reached.expect("it was there").write(&moves[..1])];
    gone.into_iter()
        .for_each(|gone| assert_eq!(gone.expect_err("it is gone"), "the engine that had the pages has ended"));
}

/// Continues some sequences of the model at `path` in one batch, each by its own sampling, and returns what was drawn.
fn continuations(path: &str, unit: Unit, samplings: &[Sampling]) -> Vec<Vec<TokenId>> {
    let mut engine = unit.engine(load(path), &small_config());
    let vocab = engine.model().info().vocab_size;
    let pages = |at: usize| (at as u32 * 4..at as u32 * 4 + 4).map(PageId).collect::<Vec<_>>();
    // A sequence is what its seed says, wherever it stands in the batch.
    let prompt = |seed: u64| (0..10 + seed as u32).map(|at| (at * 37 + seed as u32) % vocab).collect::<Vec<_>>();
    let (pages, prompts): (Vec<_>, Vec<_>) =
        samplings.iter().enumerate().map(|(at, sampling)| (pages(at), prompt(sampling.seed))).unzip();
    let mut tokens = prompts.clone();
    for step in 0..24 {
        let row = |at: usize| {
            let (sampling, history, prompt_tokens) = (&samplings[at], &tokens[at][..], prompts[at].len());
            let sample = Sample { sampling, history, prompt_tokens, forbidden: &[], min_tokens: 0, grammar: None };
            let start = if step == 0 { 0 } else { history.len() - 1 };
            Row { tokens: &history[start..], start, pages: &pages[at], sample: Some(sample), ..Row::default() }
        };
        let rows: Vec<Row<'_>> = (0..samplings.len()).map(row).collect();
        let yields = engine.step(&rows, &mut |_| {}).expect("good rows");
        let drawn: Vec<TokenId> = yields.iter().map(|made| made.sampled[0].token).collect();
        tokens.iter_mut().zip(drawn).for_each(|(tokens, drawn)| tokens.push(drawn));
    }
    tokens.iter().zip(&prompts).map(|(tokens, prompt)| tokens[prompt.len()..].to_vec()).collect()
}

/// Draws by every kind of sampling, by the card and by the host from the card's logits, alone and in batches.
fn check_draws(path: &str, unit: Unit) {
    let warm = |seed| Sampling { temperature: 0.8, seed, ..Sampling::default() };
    let by_card = [
        warm(1),
        Sampling { top_k: 20, ..warm(2) },
        Sampling { top_p: 0.9, temperature: 1.5, ..warm(3) },
        Sampling { min_p: 0.05, ..warm(4) },
        Sampling { top_k: 50, top_p: 0.95, min_p: 0.01, temperature: 1.0, ..warm(5) },
        Sampling { temperature: 0.0, ..warm(6) },
    ];
    // A bias for a token that is none changes nothing, but the host does not know.
    let by_host = by_card.clone().map(|sampling| Sampling { logit_bias: vec![(TokenId::MAX, 1.0)], ..sampling });
    let expected = continuations(path, unit, &by_host);
    assert_eq!(continuations(path, unit, &by_card), expected, "{path}");
    let mixed: Vec<Sampling> =
        by_card.iter().zip(&by_host).enumerate().map(|(at, (card, host))| [card, host][at % 2].clone()).collect();
    assert_eq!(continuations(path, unit, &mixed), expected, "{path}, half of them by the host");
    for (sampling, expected) in by_card.into_iter().zip(expected) {
        assert_eq!(continuations(path, unit, std::slice::from_ref(&sampling)), [expected], "{path} {sampling:?} alone");
    }
}

#[test]
fn a_card_draws_what_the_host_draws() {
    check_draws("tests/golden/llama", Unit::Card(Order::Forward));
    check_draws("tests/golden/gemma2", Unit::Card(Order::Backward));
}

#[test]
fn a_library_multiplies_where_that_need_not_be_exact() {
    let all = [&LLAMA[..], &QWEN, &GEMMA, &OTHERS, &EXPERTS].concat();
    all.iter().for_each(|path| check_on(path, Unit::Library(0)));
    // What it has no way for is computed as ever.
    check_on("tests/golden/llama", Unit::Library(96));
}

/// Models whose weights of eight bits meet inputs of eight bits where a library multiplies, and what that may change. References that round inputs are no
/// nearer: what is rounded to bf16 before falls to other codes.
const NARROW: [(&str, golden::Tolerance); 3] = [
    ("tests/golden/llama-fp8-tensor", golden::FP8_INPUTS),
    ("tests/golden/llama-fp8-channel", golden::FP8_INPUTS),
    ("tests/golden/llama-int8-w8a8", golden::INT8_INPUTS),
];

#[test]
fn a_library_multiplies_quantised_weights() {
    let widened = QUANTISED.iter().filter(|path| NARROW.iter().all(|(narrow, _)| narrow != *path));
    widened.for_each(|path| check_on(path, Unit::Library(0)));
    NARROW.into_iter().for_each(|(path, tolerance)| check_pages(path, Unit::Library(0), None, tolerance));
    BLOCKS.into_iter().for_each(|name| gguf::check_on(name, Unit::Library(0), golden::BF16.logit));
    AT_LOAD[..3].iter().for_each(|path| check_at_load(path, Unit::Library(0), BESIDE_A_LIBRARY));
}

/// Computes prompts of 40 tokens of the model at `path`, and then of 5, on a recording device; returns what it was asked by each: memory, waits, products.
fn asked_by_prompts(path: &str, device: Emulated) -> Vec<[usize; 3]> {
    let asked = device.asked();
    let mut engine = Engine::on_devices(load(path), &small_config(), vec![Box::new(device)]).expect("an engine");
    let counts = || [&asked.allocations, &asked.waits, &asked.products].map(|count| count.load(Relaxed));
    let pages: Vec<PageId> = (0..8).map(PageId).collect();
    let step = |tokens: usize| {
        let before = counts();
        let row = Row { tokens: &vec![7; tokens], pages: &pages, ..Row::default() };
        engine.step(&[row], &mut |_| {}).expect("a good row");
        let after = counts();
        std::array::from_fn(|at| after[at] - before[at])
    };
    [40, 40, 5].map(step).into()
}

#[test]
fn products_of_a_library_take_no_memory_and_wait_for_nobody() {
    for path in ["tests/golden/llama", "tests/golden/llama-fp8-channel", "tests/golden/llama-int8-w8a8"] {
        let exact = asked_by_prompts(path, Emulated::recording());
        let [_, waits, _] = exact[0];
        assert!(exact.iter().all(|asked| *asked == [0, waits, 0]), "{path}: {exact:?}");
        let all = asked_by_prompts(path, Emulated::recording().with_library(0));
        let products = all[0][2];
        assert!(products > 8 && all == [[0, waits, products], [0, waits, products], [0, waits, 0]], "{path}: {all:?}");
        let some = asked_by_prompts(path, Emulated::recording().with_library(96))[0][2];
        assert!(0 < some && some < products, "{path}: {some} of {products}");
    }
}

/// Decodes `steps` steps of sequences of the model at `path`, one for each of `samplings`, on an engine whose card computes nothing, and returns what it
/// was asked meanwhile: memory, uploads, calls, waits, bytes that come down. `adapters` are dealt out in turn.
fn asked(path: &str, steps: usize, samplings: &[Sampling], adapters: &[Option<Arc<Adapter>>]) -> Vec<[usize; 5]> {
    let device = Emulated::recording();
    let asked = device.asked();
    let config = Config { kv_bytes: Some(1 << 20), ..small_config() };
    let mut engine = Engine::on_devices(load(path), &config, vec![Box::new(device)]).expect("an engine");
    let pages: Vec<Vec<PageId>> =
        (0..samplings.len() as u32).map(|at| (at * 8..at * 8 + 8).map(PageId).collect()).collect();
    let counts = || {
        let counts = [&asked.allocations, &asked.uploads, &asked.calls, &asked.waits, &asked.downloaded];
        counts.map(|count| count.load(Relaxed))
    };
    let mut before = counts();
    (0..steps)
        .map(|step| {
            let history = vec![1; 30 + step];
            let sample = |sampling| Sample {
                sampling,
                history: &history,
                prompt_tokens: 30,
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let row = |at: usize| Row {
                tokens: &[7],
                start: 29 + step,
                pages: &pages[at],
                adapter: adapters[at % adapters.len()].as_deref(),
                sample: Some(sample(&samplings[at])),
                ..Row::default()
            };
            let rows: Vec<Row<'_>> = (0..samplings.len()).map(row).collect();
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
    let warm = Sampling { temperature: 0.7, seed: 3, ..Sampling::default() };
    for (path, batch, sampling) in [
        ("tests/golden/llama", 1, Sampling::default()),
        ("tests/golden/llama", 5, Sampling::default()),
        ("tests/golden/llama", 1, warm.clone()),
        ("tests/golden/llama", 16, Sampling { top_k: 20, top_p: 0.9, min_p: 0.01, ..warm }),
        ("tests/golden/qwen3moe", 1, Sampling::default()),
        ("tests/golden/qwen3moe", 16, Sampling::default()),
        ("tests/golden/deepseek_v3", 1, Sampling::default()),
        ("tests/golden/deepseek_v3", 16, Sampling::default()),
    ] {
        let steps = asked(path, 6, &vec![sampling; batch], &[None]);
        // The first makes the graph. A wait for a mark that was passed long ago costs nothing, but is counted.
        assert!(steps[1..].iter().all(|step| *step == [0, 1, 1, 2, 4 * batch]), "{path} {batch}: {steps:?}");
    }
}

/// Runs some requests to their end on `unit`, each step ending before the next is planned or one step ahead. Returns what each drew, and how often
/// a step was left under way. `adapters` of the model are dealt out in turn.
fn run(path: &str, unit: Unit, ahead: bool, adapters: &[Option<&str>]) -> (Vec<Vec<TokenId>>, usize) {
    let model = load(path);
    let adapters = adapters::read(&model, adapters);
    let mut engine = unit.engine(model, &small_config());
    let mut scheduler = Scheduler::new(Limits {
        pages: engine.memory().layout().pages as usize,
        page_tokens: engine.memory().layout().page_tokens as usize,
        token_budget: 64,
        max_sequences: 8,
        max_model_len: 200,
        max_waiting: 100,
    })
    .expect("limits that allow steps");
    scheduler.set_guessing(!ahead);
    let warm = |seed| Sampling { temperature: 1.2, seed, ..Sampling::default() };
    let samplings = [
        Sampling::default(),
        warm(1),
        Sampling { top_k: 20, ..warm(2) },
        // What the host draws holds up only as long as it is there.
        Sampling { logprobs: Some(1), ..warm(3) },
        Sampling { top_p: 0.8, ..warm(4) },
        warm(5),
        warm(6),
        Sampling { min_p: 0.1, ..warm(7) },
        warm(8),
        Sampling::default(),
    ];
    let history = |at: usize, adapter: Option<&Adapter>| {
        let tokens = (0..10 + 7 * at as TokenId).map(|token| token * 31 % 1000).collect();
        History::new(&root_salt(b"", adapter.map(Adapter::id)), tokens, 16)
    };
    let request = |(at, sampling): (usize, Sampling)| Request {
        history: history(at, adapters[at % adapters.len()].as_deref()),
        prompt_tokens: 10 + 7 * at,
        adapter: adapters[at % adapters.len()].clone(),
        // Some end by a token that nobody knew would come, some by their length, one because it is as long as can be.
        stop: Stop {
            max_tokens: if at == 3 { 4 } else { 12 + 9 * at },
            min_tokens: 0,
            ids: (0..300).filter(|token| at % 3 == 2 && token % 4 == 0).collect(),
        },
        sampling,
        grammar: None,
        prompt_logprobs: None,
        priority: 0,
        until: Until::End,
    };
    let requests = samplings.into_iter().enumerate().map(request);
    let ids: Vec<_> = requests.map(|request| scheduler.submit(request, START).expect("room in the line")).collect();
    let (mut drawn, mut under_way): (HashMap<_, Vec<TokenId>>, _) = (HashMap::new(), 0);
    while scheduler.backlog().running + scheduler.backlog().waiting > 0 || scheduler.is_under_way() {
        let plan = scheduler.schedule(START);
        let computed = scheduler.compute(plan, &mut engine, &mut |_, _| {}, &|| START);
        assert!(computed.faults.is_empty(), "{:?}", computed.faults);
        under_way += usize::from(scheduler.is_under_way());
        for Drawn { id, sampled, .. } in computed.drawn {
            drawn.entry(id).or_default().push(sampled.token);
        }
    }
    assert_eq!(scheduler.pool().stats().held(), 0, "pages leaked");
    (ids.iter().map(|id| drawn.remove(id).expect("a token at least")).collect(), under_way)
}

fn check_ahead(path: &str, unit: Unit, adapters: &[Option<&str>]) {
    let (expected, none) = run(path, unit, false, adapters);
    let (drawn, under_way) = run(path, unit, true, adapters);
    assert_eq!(drawn, expected, "{path} {unit:?}");
    assert!(none == 0 && under_way > 60, "{path}: {none} and {under_way} steps were left under way");
    assert!(drawn.iter().any(|drawn| drawn.len() == 4) && drawn.iter().any(|drawn| drawn.len() > 80));
}

#[test]
fn a_host_one_step_ahead_draws_the_same() {
    check_ahead("tests/golden/llama", Unit::Card(Order::Forward), &[None]);
    check_ahead("tests/golden/qwen3moe", Unit::Card(Order::Backward), &[None]);
    check_ahead("tests/golden/llama", Unit::Cards(2), &[None]);
    let (_, none) = run("tests/golden/llama", Kernels::detect().into(), true, &[None]);
    assert_eq!(none, 0, "a processor has nothing to run ahead of");
}

/// Writes `value` over the numbers `at ..` of the tensor `name` of a checkpoint of f32 in one file.
fn overwrite(dir: &Path, name: &str, at: Range<usize>, value: f32) {
    let file = dir.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("a file");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let start = header[name]["data_offsets"][0].as_u64().expect("an offset") as usize + 8 + length;
    bytes[start + at.start * 4..start + at.end * 4]
        .as_chunks_mut::<4>()
        .0
        .iter_mut()
        .for_each(|number| *number = value.to_le_bytes());
    fs::write(file, bytes).expect("written");
}

#[test]
fn a_guard_says_where_numbers_end() {
    let dir = checkpoints::copy("llama");
    let hidden = 96;
    overwrite(dir.path(), "model.embed_tokens.weight", 7 * hidden..8 * hidden, f32::NAN);
    // A norm that overflows for every token but those whose input is nothing.
    overwrite(dir.path(), "model.layers.1.post_attention_layernorm.weight", 0..hidden, 3e38);
    for unit in [Unit::Card(Order::Forward), Unit::Cards(2)] {
        let model = Model::load(dir.path(), &mut |_| {}).expect("a checkpoint of numbers");
        let mut engine = unit.engine(model, &Config { nan_guard: true, ..small_config() });
        let mut fault = |tokens: &[TokenId], start: usize| {
            let sampling = Sampling::default();
            let sample = Sample {
                sampling: &sampling,
                history: tokens,
                prompt_tokens: 1,
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let row =
                Row { tokens: &tokens[start..], start, pages: &[PageId(3)], sample: Some(sample), ..Row::default() };
            assert!(!engine.begin(&[row]).expect("a card"), "whoever looks at each step does not run ahead");
            let other = Row { tokens: &[5], pages: &[PageId(4)], ..Row::default() };
            match engine.step(&[other, row], &mut |_| {}) {
                Err(Error::Row(problem)) => problem,
                other => panic!("{other:?}"),
            }
        };
        let problem = fault(&[5, 6, 7, 8], 0);
        assert!(problem.contains("row 1: position 2 holds a NaN or an infinity in the embedding"), "{problem}");
        let problem = fault(&[5, 6, 8], 2);
        assert!(problem.contains("before layer 2"), "{problem}");
    }
    let mut engine =
        Unit::Card(Order::Forward).engine(load("tests/golden/llama"), &Config { nan_guard: true, ..small_config() });
    let row = Row { tokens: &[5, 6, 7], pages: &[PageId(1)], ..Row::default() };
    engine.step(&[row], &mut |_| {}).expect("numbers throughout");
}

#[test]
fn what_is_begun_waits_for_nothing() {
    let device = Emulated::recording();
    let asked = device.asked();
    let config = Config { kv_bytes: Some(1 << 20), ..small_config() };
    let mut engine =
        Engine::on_devices(load("tests/golden/llama"), &config, vec![Box::new(device)]).expect("an engine");
    let pages: [&[PageId]; 2] = [&[0, 1, 2].map(PageId), &[3, 4, 5].map(PageId)];
    let counts = || [&asked.allocations, &asked.uploads, &asked.calls, &asked.waits].map(|count| count.load(Relaxed));
    let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
    let begin = |engine: &mut Engine, start: usize, follows: bool| {
        let (history, sampling) = (vec![1; start + 1], &sampling);
        let sample =
            Sample { sampling, history: &history, prompt_tokens: 5, forbidden: &[], min_tokens: 0, grammar: None };
        let row = |row| Row {
            tokens: &[7],
            start,
            pages: pages[row],
            sample: Some(sample),
            follows: follows.then_some(row),
            ..Row::default()
        };
        let before = counts();
        let begun = engine.begin(&[row(0), row(1)]).expect("a card that works");
        let after = counts();
        (begun, std::array::from_fn(|at| after[at] - before[at]))
    };
    let (begun, _) = begin(&mut engine, 20, false);
    assert!(begun, "the first makes the graph");
    for start in 21..30 {
        assert_eq!(begin(&mut engine, start, true), (true, [0, 1, 1, 0]));
        assert_eq!(begin(&mut engine, start + 1, true), (false, [0; 4]), "a third waits");
        let before = counts();
        assert_eq!(engine.end().expect("a card that works").len(), 2);
        assert_eq!(counts(), [before[0], before[1], before[2], before[3] + 1]);
    }
    assert_eq!(engine.end().expect("a card that works").len(), 2);
    assert_eq!(begin(&mut engine, 20, true), (false, [0; 4]), "nothing is there that it could follow");
}

#[test]
fn a_rank_that_fails_fails_the_others() {
    let mut devices = Emulated::team(Order::Forward, 3);
    devices.drain(1..).for_each(|mut peer| peer.leave());
    let [device] = &mut devices[..] else { panic!("one is left") };
    let (part, whole) = (device.alloc("a part", 256).expect("memory"), device.alloc("all", 768).expect("memory"));
    let error = device.gather(part, 256, whole).expect_err("nobody is there").to_string();
    assert!(error.contains("a peer is gone"), "{error}");
}

#[test]
fn only_logits_that_are_needed_come_down() {
    let path = "tests/golden/llama";
    let warm = Sampling { temperature: 0.7, seed: 3, ..Sampling::default() };
    let row_bytes = 4 * (load(path).info().vocab_size as usize).next_multiple_of(64);
    let check = |watched: &[usize], waits: usize, bytes: usize| {
        let mut samplings = vec![warm.clone(); 16];
        watched.iter().for_each(|at| samplings[*at].logprobs = Some(0));
        let steps = asked(path, 4, &samplings, &[None]);
        assert!(steps[1..].iter().all(|step| *step == [0, 1, 1, waits, bytes]), "{watched:?}: {steps:?}");
    };
    check(&[3], 3, 64 + row_bytes);
    // Neighbours come down together, and tokens only where some are found.
    check(&[3, 4, 15], 4, 64 + 3 * row_bytes);
    check(&(0..16).collect::<Vec<_>>(), 2, 16 * row_bytes);
}

#[test]
fn what_a_card_does_not_run_is_refused_by_name_before_weights_are_loaded() {
    let refused = |path: &str, kv_dtype: Option<KvDtype>, words: &[&str]| {
        let config = Config { device: Device::Cuda(0), kv_dtype, ..small_config() };
        let path = repository(path);
        let error = check_device(&path, None, &config).expect_err("nothing that runs").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
        check_device(&path, None, &Config { device: Device::Cpu, ..config }).expect("the processor runs all");
    };
    refused("tests/golden/llama", Some(KvDtype::F16), &["kv_dtype", "f16"]);
    let shared = |path: &str, device: Device, tensor_parallel: usize, words: &[&str]| {
        let config = Config { device, tensor_parallel, ..small_config() };
        let error = check_device(&repository(path), None, &config).expect_err("nothing that runs").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
    };
    let card = Device::Cuda(0);
    shared("tests/golden/llama", card, 3, &["tensor_parallel", "3 cards", "6 heads and 2 of keys", "evenly: 1, 2, 6"]);
    shared("tests/golden/llama", card, 0, &["tensor_parallel", "0 cards"]);
    shared("tests/golden/olmo2", card, 5, &["tensor_parallel", "norms over all heads", "Olmo2ForCausalLM"]);
    shared("tests/golden/deepseek_v3", card, 2, &["tensor_parallel", "latent attention", "DeepseekV3ForCausalLM"]);
    shared("tests/golden/llama", Device::Cpu, 2, &["tensor_parallel", "cpu"]);
    let inexact = |device: Device, tensor_parallel: usize, words: &[&str]| {
        let config = Config { device, tensor_parallel, exact: false, ..small_config() };
        let error = check_device(&repository("tests/golden/llama"), None, &config).expect_err("nothing that runs");
        words.iter().for_each(|word| assert!(error.to_string().contains(word), "{error} lacks {word:?}"));
    };
    inexact(Device::Cpu, 1, &["exact", "cpu"]);
    inexact(card, 2, &["exact", "2 cards", "one card alone"]);
    let config = Config { device: Device::Cuda(0), ..small_config() };
    for path in [
        "tests/golden/llama",
        "tests/golden/mixtral",
        "tests/golden/qwen3moe",
        "tests/golden/deepseek_v2",
        "tests/gguf/k-quants.gguf",
    ] {
        check_device(&repository(path), None, &config).expect("a model that runs");
    }
    // Inputs of codes are bf16, whatever the checkpoint's floats are.
    let config = Config { kv_dtype: Some(KvDtype::Bf16), ..config };
    check_device(&repository("tests/golden/llama-gptq-int4-g32"), None, &config).expect("pages as they are written");
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

/// On a real card, for a machine that has one: `tests/gpu/run.sh`.
#[cfg(feature = "cuda")]
mod on_a_card {
    use super::*;

    /// The card that `BATON_CARD` names, with NVRTC from `BATON_NVRTC_LIBRARY` where that is set, and cuBLASLt from `BATON_CUBLASLT_LIBRARY`.
    const REAL: Unit = Unit::Real(true);

    #[test]
    #[ignore = "needs a card"]
    fn recorded_references() {
        [&LLAMA[..], &QWEN, &GEMMA, &OTHERS, &EXPERTS, &DEEPSEEK, &QUANTISED]
            .concat()
            .iter()
            .for_each(|path| check_on(path, REAL));
        BLOCKS.into_iter().for_each(|name| gguf::check_on(name, REAL, golden::BF16.logit));
        AT_LOAD.iter().for_each(|path| check_at_load(path, REAL, BESIDE));
    }

    #[test]
    #[ignore = "needs a card"]
    fn recorded_references_by_a_library() {
        let inexact = Unit::Real(false);
        [&LLAMA[..], &QWEN, &GEMMA, &OTHERS, &EXPERTS].concat().iter().for_each(|path| check_on(path, inexact));
        NARROW.into_iter().for_each(|(path, tolerance)| check_pages(path, inexact, None, tolerance));
    }

    #[test]
    #[ignore = "needs a card"]
    fn bits_in_any_batch_and_in_any_chunks() {
        INVARIANT.iter().for_each(|path| check_invariance(load(path), REAL, REAL));
    }

    #[test]
    #[ignore = "needs a card"]
    fn adapters() {
        super::adapters::check_references(REAL);
        super::adapters::check_batch(REAL, REAL);
    }

    #[test]
    #[ignore = "needs a card"]
    fn draws_are_those_of_the_host() {
        check_draws("tests/golden/llama", REAL);
    }

    #[test]
    #[ignore = "needs a card"]
    fn a_host_one_step_ahead_draws_the_same() {
        check_ahead("tests/golden/llama", REAL, &[None]);
    }
}
