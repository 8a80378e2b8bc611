//! Prefill and decode speed of random weights of Llama 3.1 8B's shape on a card, how much of the host's time a step hides, and how fast a prompt's pages go to
//! another process on the card, one JSON object a line.
//!
//! `cargo run --release -p engine --example card -- [cuda:0] [on|off] [NVRTC's library] [cuBLASLt's]`, where off is what `--exact off` is; `tests/gpu/run.sh`
//! puts the card's own limits beside it.

use engine::{
    Config, Device, Engine, Error, Model, ModelShape, Row, Sample, Sampling,
    scheduler::{History, Limits, Request, Scheduler, Stop, Until},
};
use kv_cache::{PageId, PoolCopy};
use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

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

/// The same pages, and little else.
const PAGES: ModelShape = ModelShape {
    name: "llama-8b-pages",
    vocab_size: 1024,
    hidden: 256,
    intermediate: 256,
    max_position: 8192,
    ..SHAPE
};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next().unwrap_or_else(|| "cuda:0".into()).parse();
    let device: Device = device.unwrap_or_else(|problem| panic!("{problem}"));
    let what = arguments.next();
    let exact = match what.as_deref() {
        None | Some("on") => true,
        Some("off" | "target") => false,
        Some(other) => panic!("on or off, not {other}"),
    };
    // Empty where the system's loader knows it.
    let mut library = || arguments.next().filter(|path| !path.is_empty()).map(Into::into);
    let (nvrtc_library, cublaslt_library) = (library(), library());
    if what.as_deref() == Some("target") {
        return target(device, nvrtc_library);
    }
    if exact {
        handoff(device, nvrtc_library.clone())?;
    }
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

/// Makes an engine that has pages and little else.
fn with_pages(device: Device, nvrtc_library: Option<PathBuf>) -> Result<Engine, Error> {
    let config = Config { device, nvrtc_library, kv_bytes: Some(1 << 30), ..Config::default() };
    Engine::new(Model::random(&PAGES, 1)?, &config)
}

/// Is the process whose pages are written: says where they are, and ends when its input does.
fn target(device: Device, nvrtc_library: Option<PathBuf>) -> Result<(), Error> {
    let engine = with_pages(device, nvrtc_library)?;
    println!("{}", engine.backing().expect("a card").share().expect("a card that lets others reach its pages"));
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

/// Measures how fast the pages of 2,048 tokens go to another process, all at once and by layers, as those of a prompt leave.
fn handoff(device: Device, nvrtc_library: Option<PathBuf>) -> Result<(), Error> {
    let engine = with_pages(device, nvrtc_library.clone())?;
    let program = std::env::current_exe().expect("this program");
    let nvrtc = nvrtc_library.unwrap_or_default();
    let mut child = Command::new(program);
    child.arg(device.to_string()).arg("target").arg(nvrtc);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("another process");
    let mut shared = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut shared).expect("it says where its pages are");
    let reached = engine.backing().expect("a card").reach(shared.trim()).unwrap_or_else(|problem| panic!("{problem}"));
    let layout = engine.memory().layout().clone();
    let bytes = layout.block_bytes();
    // No two neighbours, in either pool.
    let pages = layout.pages_for(2048) as u32;
    let block = |layer, page| PoolCopy {
        source: layout.block_offset(layer, PageId(2 * page)),
        target: layout.block_offset(layer, PageId(3 * page + 1)),
        bytes,
    };
    let layers: Vec<Vec<PoolCopy>> =
        (0..layout.layers).map(|layer| (0..pages).map(|page| block(layer, page)).collect()).collect();
    let moved = (layers.len() * pages as usize * bytes) as f64;
    for (way, group) in [("all", layers.len()), ("layers", 1)] {
        let groups: Vec<Vec<PoolCopy>> = layers.chunks(group).map(|layers| layers.concat()).collect();
        let seconds = median(20, || {
            groups.iter().try_for_each(|group| reached.write(group)).unwrap_or_else(|problem| panic!("{problem}"));
            Ok(())
        })
        .expect("problems panic");
        println!(
            r#"{{"work": "handoff", "tokens": 2048, "at_once": "{way}", "ms": {:.3}, "gb_per_s": {:.0}}}"#,
            seconds * 1e3,
            // Read and written.
            2.0 * moved / seconds / 1e9
        );
    }
    drop(reached);
    drop(child.stdin.take());
    child.wait().expect("it ends");
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
