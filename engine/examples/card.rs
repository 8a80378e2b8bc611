//! Prefill and decode speed of random weights of Llama 3.1 8B's shape on a card, and how much of the host's time a step hides, one JSON object a line.
//!
//! `cargo run --release -p engine --example card -- [cuda:0] [on|off] [NVRTC's library] [cuBLASLt's]`, where off is what `--exact off` is; `tests/gpu/run.sh`
//! puts the card's own limits beside it.

use engine::{
    Config, Device, Engine, Error, Model, ModelShape, Row, Sample, Sampling,
    scheduler::{History, Limits, Request, Scheduler, Stop, Until},
};
use kv_cache::PageId;
use std::time::Instant;

const SHAPE: ModelShape = ModelShape {
    name: "llama-8b",
    vocab_size: 128_256,
    hidden: 4096,
    intermediate: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    latent: None,
    experts: None,
    qkv_bias: false,
    max_position: 131_072,
    dtype: engine::ElementType::Bf16,
    quantize: None,
};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next().unwrap_or_else(|| "cuda:0".into()).parse();
    let device: Device = device.unwrap_or_else(|problem| panic!("{problem}"));
    let exact = match arguments.next().as_deref() {
        None | Some("on") => true,
        Some("off") => false,
        Some(other) => panic!("on or off, not {other}"),
    };
    // Empty where the system's loader knows it.
    let mut library = || arguments.next().filter(|path| !path.is_empty()).map(Into::into);
    let (nvrtc_library, cublaslt_library) = (library(), library());
    let model = Model::random(&SHAPE, 1)?;
    let token_budget = 16_384;
    let config = Config {
        device,
        exact,
        nvrtc_library,
        cublaslt_library,
        token_budget,
        max_model_len: Some(32_768),
        ..Config::default()
    };
    let began = Instant::now();
    let mut engine = Engine::new(model.clone(), &config)?;
    println!(r#"{{"work": "start", "exact": {exact}, "seconds": {:.2}}}"#, began.elapsed().as_secs_f64());

    // A tied head is read once more than the parameters say, and not multiplied for tokens that draw nothing.
    let head = (SHAPE.vocab_size * SHAPE.hidden) as f64;
    let body = 2.0 * (model.info().parameters as f64 - head);
    let attention = 2.0 * (SHAPE.layers * SHAPE.heads * SHAPE.head_dim) as f64;
    for tokens in [512, 4096, 16_384] {
        let seconds = median(5, || prefill(&mut engine, tokens))?;
        let operations = (body + attention * tokens as f64) * tokens as f64 + 2.0 * head;
        println!(
            r#"{{"work": "prefill", "exact": {exact}, "tokens": {tokens}, "ms": {:.3}, "tokens_per_s": {:.0}, "tflops": {:.1}}}"#,
            seconds * 1e3,
            tokens as f64 / seconds,
            operations / seconds / 1e12
        );
    }
    for (batch, context) in [(1, 128), (1, 16_384), (8, 2048), (32, 2048), (64, 2048)] {
        let seconds = median(20, || decode(&mut engine, batch, context))?;
        let layout = engine.memory().layout();
        let pages = layout.page_bytes() / layout.page_tokens as usize * context * batch;
        let bytes = model.info().weight_bytes as f64 + pages as f64;
        println!(
            r#"{{"work": "decode", "exact": {exact}, "batch": {batch}, "context": {context}, "ms": {:.3}, "tokens_per_s": {:.0}, "gb_per_s": {:.0}}}"#,
            seconds * 1e3,
            batch as f64 / seconds,
            bytes / seconds / 1e9
        );
    }
    let (batch, context, steps) = (64, 512, 200);
    let bare = back_to_back(&mut engine, batch, context, steps)? * 1e3;
    let [in_step, ahead] = [false, true].map(|ahead| scheduled(&mut engine, batch, context, steps, ahead));
    let (in_step, ahead) = (in_step? * 1e3, ahead? * 1e3);
    let hidden = (in_step - ahead) / (in_step - bare);
    println!(
        r#"{{"work": "host", "batch": {batch}, "context": {context}, "ms_card": {bare:.3}, "ms_step_by_step": {in_step:.3}, "ms_one_step_ahead": {ahead:.3}, "hidden": {hidden:.3}}}"#
    );
    Ok(())
}

/// Returns the seconds of a step of a scheduler's `batch` sequences, from planning it to having its tokens, each step ending before the next is planned or one
/// step `ahead`.
fn scheduled(engine: &mut Engine, batch: usize, context: usize, steps: usize, ahead: bool) -> Result<f64, Error> {
    let layout = engine.memory().layout();
    let limits = Limits {
        pages: layout.pages as usize,
        page_tokens: layout.page_tokens as usize,
        token_budget: engine.config().token_budget as usize,
        max_sequences: batch,
        max_model_len: engine.max_model_len(),
        max_waiting: batch,
    };
    let mut scheduler = Scheduler::new(limits)?;
    scheduler.set_guessing(!ahead);
    for first in 0..batch as u32 {
        let prompt = (0..context as u32).map(|token| (first * 131 + token * 7) % 50_000).collect();
        let request = Request {
            history: History::new(b"", prompt, limits.page_tokens),
            prompt_tokens: context,
            adapter: None,
            sampling: Sampling { temperature: 1.0, seed: first.into(), ..Sampling::default() },
            grammar: None,
            stop: Stop { max_tokens: 10 * steps, ..Stop::default() },
            prompt_logprobs: None,
            priority: 0,
            until: Until::End,
        };
        scheduler.submit(request, Default::default()).expect("a line for all of them");
    }
    let began = Instant::now();
    let mut turn = || {
        let plan = scheduler.schedule(began.elapsed());
        let computed = scheduler.compute(plan, engine, &mut |_, _| {}, &|| began.elapsed());
        assert!(computed.faults.is_empty(), "{:?}", computed.faults);
        (scheduler.backlog().tokens == batch, scheduler.is_under_way())
    };
    while !turn().0 {}
    (0..20).for_each(|_| _ = turn());
    let from = Instant::now();
    (0..steps).for_each(|_| _ = turn());
    let seconds = from.elapsed().as_secs_f64() / steps as f64;
    // What is under way is ended before anybody else uses the engine.
    if ahead {
        let _ = engine.end();
    }
    Ok(seconds)
}

/// Returns the seconds of a step where the next is always there before it ends, and nobody looks at its tokens.
fn back_to_back(engine: &mut Engine, batch: usize, context: usize, steps: usize) -> Result<f64, Error> {
    let each = context / 16 + 1;
    let pages: Vec<PageId> = (0..(batch * each) as u32).map(PageId).collect();
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let sample = Some(sample(&sampling, &[]));
    let row = |pages| Row { tokens: &[17], start: context - 1, pages, sample, ..Row::default() };
    let rows: Vec<Row<'_>> = pages.chunks(each).map(row).collect();
    let mut from = Instant::now();
    for step in 0..steps + 20 {
        if step == 20 {
            from = Instant::now();
        }
        assert!(engine.begin(&rows)?, "rows that decode");
        if step > 0 {
            engine.end()?;
        }
    }
    let seconds = from.elapsed().as_secs_f64() / steps as f64;
    engine.end()?;
    Ok(seconds)
}

/// Returns the median of `rounds` times in seconds, after one that is not counted.
fn median(rounds: usize, mut work: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    work()?;
    let mut seconds = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        work()?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[rounds / 2])
}

fn sample<'a>(sampling: &'a Sampling, history: &'a [u32]) -> Sample<'a> {
    Sample { sampling, history, prompt_tokens: history.len(), forbidden: &[], min_tokens: 0, grammar: None }
}

fn prefill(engine: &mut Engine, tokens: usize) -> Result<(), Error> {
    let prompt: Vec<u32> = (0..tokens as u32).map(|token| token * 7 % 50_000).collect();
    let pages: Vec<PageId> = (0..tokens.div_ceil(16) as u32).map(PageId).collect();
    let sampling = Sampling::default();
    let sample = Some(sample(&sampling, &prompt));
    let row = Row { tokens: &prompt, start: 0, pages: &pages, sample, ..Row::default() };
    engine.step(&[row], &mut |_| {}).map(drop)
}

fn decode(engine: &mut Engine, batch: usize, context: usize) -> Result<(), Error> {
    let each = context / 16 + 1;
    let pages: Vec<PageId> = (0..(batch * each) as u32).map(PageId).collect();
    let sampling = Sampling::default();
    let sample = Some(sample(&sampling, &[]));
    let row = |pages| Row { tokens: &[17], start: context - 1, pages, sample, ..Row::default() };
    let rows: Vec<Row<'_>> = pages.chunks(each).map(row).collect();
    engine.step(&rows, &mut |_| {}).map(drop)
}
