//! Prefill and decode speed of a random model beside the machine's limits.
//!
//! `cargo run --release -p engine --example speed -- [llama-1b|qwen-0.5b|qwen3-moe] [bf16|int8|int4|fp8] [threads]`

use engine::{
    Config, Engine, Model, ModelShape, Quantize, Row, Sample, Sampling,
    machine::{self, Arithmetic, Probes},
};
use kv_cache::PageId;
use std::time::Instant;

fn main() -> Result<(), engine::Error> {
    let mut arguments = std::env::args().skip(1);
    let mut shape = match arguments.next().as_deref() {
        Some("llama-1b") => ModelShape::llama_1b(),
        Some("qwen3-moe") => ModelShape::qwen3_moe(),
        _ => ModelShape::qwen_0_5b(),
    };
    shape.quantize = match arguments.next().as_deref() {
        Some("int8") => Some(Quantize::Int8),
        Some("int4") => Some(Quantize::Int4),
        Some("fp8") => Some(Quantize::Fp8),
        _ => None,
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(cores);
    let mut probes = Probes::new(threads)?;
    let (bf16, int8) = (probes.peak(Arithmetic::Bf16), probes.peak(Arithmetic::Int8));
    let (read, copy) = (probes.read(), probes.copy());
    println!("{} x{threads}: bf16 {bf16:.0} Gop/s, int8 {int8:.0} Gop/s", machine::instruction_set());
    println!("memory: read {read:.1} GB/s, copy {copy:.1} GB/s");

    let start = Instant::now();
    let model = Model::random(&shape, 1)?;
    println!("{}: {} parameters in {:.2} s", shape.name, model.info().parameters, start.elapsed().as_secs_f64());
    let config = Config { threads: Some(threads), kv_bytes: Some(2 << 30), token_budget: 4096, ..Config::default() };
    let mut engine = Engine::new(model.clone(), &config)?;

    // Operations of a token outside attention and the head.
    let head = (shape.vocab_size * shape.hidden) as f64;
    let body = 2.0 * (model.info().parameters as f64 - head);
    // A query meets half of the prompt on average, twice: keys, and values.
    let attention = 2.0 * (shape.layers * shape.heads * shape.head_dim) as f64;
    for tokens in [16, 64, 512, 4096] {
        let seconds = time(3, || prefill(&mut engine, tokens));
        let rate = ((body + attention * tokens as f64) * tokens as f64 + 2.0 * head) / seconds / 1e9;
        let peak = if matches!(shape.quantize, Some(Quantize::Int8 | Quantize::Int4)) { int8 } else { bf16 };
        let share = 100.0 * rate / peak;
        println!("prefill {tokens}: {:.0} tok/s, {rate:.0} Gop/s = {share:.0} %", tokens as f64 / seconds);
    }
    for (batch, context) in [(1, 16), (1, 1 << 15), (4, 16), (8, 16), (16, 16), (32, 16), (32, 512)] {
        let seconds = time(5, || decode(&mut engine, batch, context));
        let layout = engine.memory().layout();
        let kv = (layout.page_bytes() / layout.page_tokens as usize * context * batch) as f64;
        let bytes = (model.info().weight_bytes as f64 + kv) / seconds / 1e9;
        let share = 100.0 * bytes / read;
        println!(
            "decode {batch} x {context}: {:.1} tok/s, {:.1} ms, {bytes:.1} GB/s = {share:.0} %",
            batch as f64 / seconds,
            seconds * 1e3
        );
    }
    Ok(())
}

/// Returns the shortest of `rounds` times in seconds.
fn time(rounds: usize, mut work: impl FnMut()) -> f64 {
    work();
    let round = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..rounds).map(round).fold(f64::INFINITY, f64::min)
}

fn prefill(engine: &mut Engine, tokens: usize) {
    let prompt: Vec<u32> = (0..tokens as u32).map(|token| token * 7 % 50_000).collect();
    let pages: Vec<PageId> = (0..tokens.div_ceil(16) as u32).map(PageId).collect();
    let sampling = Sampling::default();
    let sample = Sample {
        sampling: &sampling,
        history: &prompt,
        prompt_tokens: tokens,
        forbidden: &[],
        min_tokens: 0,
        grammar: None,
    };
    let row = Row { tokens: &prompt, start: 0, pages: &pages, sample: Some(sample), ..Row::default() };
    engine.step(&[row], &mut |_| {}).expect("a good row");
}

fn decode(engine: &mut Engine, batch: usize, context: usize) {
    let pages = context / 16 + 1;
    let tables: Vec<Vec<PageId>> =
        (0..batch).map(|sequence| (0..pages).map(|page| PageId((sequence * pages + page) as u32)).collect()).collect();
    let sampling = Sampling::default();
    let sample =
        Sample { sampling: &sampling, history: &[], prompt_tokens: 0, forbidden: &[], min_tokens: 0, grammar: None };
    let rows: Vec<Row<'_>> = tables
        .iter()
        .map(|pages| Row { tokens: &[17], start: context - 1, pages, sample: Some(sample), ..Row::default() })
        .collect();
    engine.step(&rows, &mut |_| {}).expect("good rows");
}
