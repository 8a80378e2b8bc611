//! Measures how long the steps of an engine take here, as a profile that timed engines and the simulation read.
//!
//! Steps of many shapes are computed in turn, a few times over: sequences with contexts, and chunks of prompts with what came before
//! them. [`timing::Fit`], with which workers learn their own pace, makes five numbers of their medians. How far those are off is
//! printed for every shape: a pace is a model of an engine, not the engine.

use super::stats::Samples;
use crate::{model, settings::ModelChoice};
use anyhow::Context;
use engine::{Config, Engine, Row, Sample, Sampling, TokenId, machine};
use kv_cache::PageId;
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use timing::{Fit, Profile, Work};

/// What others compute meanwhile, again and again.
const BESIDE: Shape = Shape::Chunk(512, 0);

const ROUNDS: usize = 7;
const SEQUENCES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const CONTEXTS: [usize; 4] = [64, 512, 2_000, 8_000];
const CHUNKS: [usize; 5] = [32, 128, 512, 1_024, 2_048];

/// What a step holds.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// Sequences that take a token each, and the context of each.
    Decode(usize, usize),
    /// Tokens of a prompt, and how many came before.
    Chunk(usize, usize),
}

/// Measures the model that `choice` names on `threads` threads and writes the profile. All but one of `workers` compute prompts meanwhile: workers
/// of one machine share its memory and its cores.
pub(super) fn run(path: &Path, choice: &ModelChoice, threads: Option<usize>, workers: usize) -> anyhow::Result<()> {
    let located = model::locate(choice)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let model = runtime.block_on(model::load(&located, None))?;
    let threads = threads.unwrap_or_else(|| (model::cores() / workers).max(1));
    let engine = || Engine::new(model.clone(), &Config { threads: Some(threads), ..Config::default() }).map(Bench::new);
    let (mut bench, others) = (engine()?, (1..workers).map(|_| engine()).collect::<Result<Vec<_>, _>>()?);
    let shapes = bench.shapes();
    let done = AtomicBool::new(false);
    let took = thread::scope(|scope| {
        for mut other in others {
            let done = &done;
            // A step that fails here fails there, too.
            scope.spawn(move || while !done.load(Ordering::Relaxed) && other.step(BESIDE).is_ok() {});
        }
        let took = bench.measure(&shapes);
        done.store(true, Ordering::Relaxed);
        took
    })?;
    let measured = |(shape, ms): (&Shape, &f64)| (shape.work(), Duration::from_secs_f64(ms * 1e-3));
    let measured: Vec<(Work, Duration)> = shapes.iter().zip(&took).map(measured).collect();
    let pace = Fit::of(&measured).pace().context("no step was measured")?;
    println!("{:<44} {:>10} {:>10} {:>7}", "step", "ms", "profile", "ratio");
    for (shape, took) in shapes.iter().zip(took) {
        let told = pace.step(&shape.work()).as_secs_f64() * 1e3;
        println!("{:<44} {took:>10.3} {told:>10.3} {:>7.2}", shape.name(), told / took);
    }
    let (info, layout) = (bench.engine.model().info(), bench.engine.memory().layout());
    let profile = Profile {
        model: format!("{}, {}", located.name, info.dtype),
        machine: format!(
            "{threads} {}{}, {}",
            if threads == 1 { "thread" } else { "threads" },
            if workers == 1 { String::new() } else { format!(" for each of {workers} workers") },
            machine::instruction_set()
        ),
        source: format!("baton bench --profile, {} rounds of {} steps", ROUNDS, shapes.len()),
        kv_bytes_per_token: layout.page_bytes() as u64 / u64::from(layout.page_tokens),
        kv_tokens: u64::from(layout.pages) * u64::from(layout.page_tokens),
        pace,
    };
    let text = toml::to_string(&profile).context("write the profile")?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    println!("\nwrote {}", path.display());
    Ok(())
}

impl Shape {
    fn work(self) -> Work {
        let mut work = Work::default();
        match self {
            Self::Decode(sequences, context) => (0..sequences).for_each(|_| work.single(context)),
            Self::Chunk(tokens, context) => work.chunk(context, tokens),
        }
        work
    }

    fn name(self) -> String {
        match self {
            Self::Decode(sequences, context) => format!("{sequences} sequences after {context} tokens each"),
            Self::Chunk(tokens, context) => format!("{tokens} tokens of a prompt after {context}"),
        }
    }

    /// Tokens that its pages have to hold.
    fn room(self) -> usize {
        match self {
            Self::Decode(sequences, context) => sequences * (context + 16),
            Self::Chunk(tokens, context) => tokens + context + 16,
        }
    }

    fn longest(self) -> usize {
        match self {
            Self::Decode(_, context) => context + 1,
            Self::Chunk(tokens, context) => tokens + context,
        }
    }
}

struct Bench {
    engine: Engine,
    tokens: Vec<TokenId>,
    pages: Vec<PageId>,
}

impl Bench {
    fn new(engine: Engine) -> Self {
        let (vocabulary, longest) = (engine.model().info().vocab_size, CHUNKS[CHUNKS.len() - 1]);
        // What tokens say changes nothing about the time.
        let tokens = (0..longest as TokenId).map(|index| index * 7 % vocabulary).collect();
        let pages = (0..engine.memory().layout().pages).map(PageId).collect();
        Self { engine, tokens, pages }
    }

    /// Those that fit the engine.
    fn shapes(&self) -> Vec<Shape> {
        let (layout, config) = (self.engine.memory().layout(), self.engine.config());
        let room = layout.pages as usize * layout.page_tokens as usize;
        let decode = SEQUENCES.iter().flat_map(|&count| CONTEXTS.map(|context| Shape::Decode(count, context)));
        let chunks = CHUNKS.iter().flat_map(|&count| [0, 1_024, 4_096].map(|context| Shape::Chunk(count, context)));
        let fits = |shape: &Shape| {
            let step = match shape {
                Shape::Decode(sequences, _) => *sequences <= config.max_sequences as usize,
                Shape::Chunk(tokens, _) => *tokens <= config.token_budget as usize,
            };
            step && shape.room() <= room && shape.longest() <= self.engine.max_model_len()
        };
        decode.chain(chunks).filter(fits).collect()
    }

    /// Computes all of `shapes` a few times over. Returns the median of each, in milliseconds.
    fn measure(&mut self, shapes: &[Shape]) -> anyhow::Result<Vec<f64>> {
        let mut took: Vec<Vec<f64>> = vec![Vec::new(); shapes.len()];
        for round in 0..=ROUNDS {
            for (shape, took) in shapes.iter().zip(&mut took) {
                let began = Instant::now();
                self.step(*shape)?;
                let step = began.elapsed();
                // The first round touches memory for the first time.
                if round > 0 {
                    took.push(step.as_secs_f64() * 1e3);
                }
            }
        }
        Ok(took.into_iter().map(|took| Samples::from_iter(took).median()).collect())
    }

    /// Computes one. Pages hold zeros or what another step left there.
    fn step(&mut self, shape: Shape) -> anyhow::Result<()> {
        let page = self.engine.config().page_tokens as usize;
        let sampling = Sampling::default();
        let sample = Sample {
            sampling: &sampling,
            history: &[],
            prompt_tokens: 0,
            forbidden: &[],
            min_tokens: 0,
            grammar: None,
        };
        let rows: Vec<Row<'_>> = match shape {
            Shape::Decode(sequences, context) => {
                let pages = self.pages.chunks(context / page + 1).take(sequences);
                let row = |pages| Row {
                    tokens: &self.tokens[..1],
                    start: context,
                    pages,
                    sample: Some(sample),
                    ..Row::default()
                };
                pages.map(row).collect()
            }
            Shape::Chunk(tokens, context) => {
                let tokens = &self.tokens[..tokens];
                vec![Row { tokens, start: context, pages: &self.pages, sample: Some(sample), ..Row::default() }]
            }
        };
        self.engine.step(&rows, &mut |_| {})?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_models_profile_can_be_read() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo-draft");
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("profile.toml");
        run(&path, &ModelChoice { model: Some(model), model_name: None }, Some(1), 2).expect("a profile");
        let profile = Profile::read(&path).expect("a profile that can be read");
        assert!(
            profile.model.starts_with("demo-draft, ")
                && profile.machine.starts_with("1 thread for each of 2 workers, "),
            "{profile:?}"
        );
        assert!(profile.pace.token_us > 0.0 && profile.pace.step_us > 0.0, "{profile:?}");
    }
}
