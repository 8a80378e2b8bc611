//! Tokens per second of the engine, beside what the machine's arithmetic and memory allow.
//!
//! Models have the shapes of real ones and random weights, made here. The limit of a step is the longer of two times: reading
//! every weight once from memory, and two operations per weight and token at the machine's peak. Attention and the KV pages are
//! left out of it, so the limit is a little beyond reach.

use super::{machine::Peak, report::Report, stats::Samples};
use anyhow::Context;
use engine::{Config, Engine, Model, ModelShape, Row, Sample, Sampling, TokenId};
use kv_cache::PageId;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{sync::Arc, time::Instant};

/// Tokens of the prompt that is prefilled.
const PROMPT: usize = 512;
/// Tokens that each decoding sequence has behind it.
const CONTEXT: usize = 256;
/// Sequences that decode together.
const BATCHES: [usize; 4] = [1, 4, 16, 32];
const PREFILLS: usize = 4;
const DECODE_STEPS: usize = 24;

/// Names a row of a model.
fn row(what: &str, shape: &ModelShape) -> String {
    format!("engine/{what}/{}/bf16", shape.name)
}

fn prefill_row(shape: &ModelShape) -> String {
    row(&format!("prefill{PROMPT}"), shape)
}

fn decode_row(batch: usize, shape: &ModelShape) -> String {
    row(&format!("decode_b{batch}"), shape)
}

/// Measures every `engine/` row that is wanted.
pub(super) fn run(report: &mut Report, peak: &Peak) -> anyhow::Result<()> {
    for shape in [ModelShape::llama_1b(), ModelShape::qwen_0_5b()] {
        let mut rows = BATCHES.iter().map(|batch| decode_row(*batch, &shape)).chain([prefill_row(&shape)]);
        if rows.any(|row| report.wants(&row)) {
            measure(report, peak, &shape).with_context(|| format!("measure {}", shape.name))?;
        }
    }
    Ok(())
}

fn measure(report: &mut Report, peak: &Peak, shape: &ModelShape) -> anyhow::Result<()> {
    let model = Model::random(shape, 1).context("make random weights")?;
    let mut bench = Bench::new(model, shape)?;
    let prefill = prefill_row(shape);
    if report.wants(&prefill) {
        report.row(&prefill, bench.prefill()?, "tok/s", Some(bench.limit(peak, PROMPT, 1)))?;
    }
    for batch in BATCHES {
        let decode = decode_row(batch, shape);
        if report.wants(&decode) {
            report.row(&decode, bench.decode(batch)?, "tok/s", Some(bench.limit(peak, batch, batch)))?;
        }
    }
    Ok(())
}

struct Bench {
    engine: Engine,
    /// Parameters of the head (tied to the embedding): only tokens that are sampled pass it.
    head: usize,
    page_tokens: usize,
    tokens: Vec<TokenId>,
    sampling: Sampling,
}

impl Bench {
    /// Reserves pages for the largest batch, on all cores.
    fn new(model: Arc<Model>, shape: &ModelShape) -> anyhow::Result<Self> {
        let mut random = StdRng::seed_from_u64(2);
        let vocab = model.info().vocab_size;
        let tokens = (0..PROMPT.max(CONTEXT + DECODE_STEPS + 2)).map(|_| random.random_range(0..vocab)).collect();
        let config =
            Config { token_budget: PROMPT as u32, max_sequences: 32, kv_bytes: 512 << 20, ..Config::default() };
        let page_tokens = config.page_tokens as usize;
        let head = shape.vocab_size * shape.hidden;
        Ok(Self { engine: Engine::new(model, &config)?, head, page_tokens, tokens, sampling: Sampling::default() })
    }

    /// Returns tokens per second of one prompt, the best of a few.
    fn prefill(&mut self) -> anyhow::Result<f64> {
        let pages: Vec<_> = (0..PROMPT.div_ceil(self.page_tokens) as u32).map(PageId).collect();
        let mut rounds = Samples::default();
        for _ in 0..PREFILLS {
            let prompt = &self.tokens[..PROMPT];
            let row = Row {
                tokens: prompt,
                start: 0,
                pages: &pages,
                sample: Some(sample(&self.sampling, prompt)),
                ..Row::default()
            };
            let began = Instant::now();
            self.engine.step(&[row], &mut |_| {})?;
            rounds.extend([PROMPT as f64 / began.elapsed().as_secs_f64()]);
        }
        Ok(rounds.best())
    }

    /// Returns tokens per second of `batch` sequences that decode together, at the median step. Their pages hold zeros: what they
    /// hold changes nothing about the time.
    fn decode(&mut self, batch: usize) -> anyhow::Result<f64> {
        let each = (CONTEXT + DECODE_STEPS + 1).div_ceil(self.page_tokens);
        let pages: Vec<Vec<PageId>> =
            (0..batch).map(|i| (i * each..(i + 1) * each).map(|page| PageId(page as u32)).collect()).collect();
        let mut steps = Samples::default();
        for step in 0..=DECODE_STEPS {
            let at = CONTEXT + step;
            let rows: Vec<Row<'_>> = pages
                .iter()
                .map(|pages| Row {
                    tokens: &self.tokens[at..at + 1],
                    start: at,
                    pages,
                    sample: Some(sample(&self.sampling, &self.tokens[..at + 1])),
                    ..Row::default()
                })
                .collect();
            let began = Instant::now();
            self.engine.step(&rows, &mut |_| {})?;
            // The first step faults the pages in.
            if step > 0 {
                steps.extend([batch as f64 / began.elapsed().as_secs_f64()]);
            }
        }
        Ok(steps.median())
    }

    /// Returns the tokens per second that the machine allows for steps of `tokens` tokens, of which `sampled` are.
    fn limit(&self, peak: &Peak, tokens: usize, sampled: usize) -> f64 {
        let info = self.engine.model().info();
        let reading = info.weight_bytes as f64 / (peak.read_gbs * 1e9);
        let products = (info.parameters as f64 - self.head as f64) * tokens as f64 + self.head as f64 * sampled as f64;
        let computing = 2.0 * products / (peak.bf16_gflops * 1e9);
        tokens as f64 / reading.max(computing)
    }
}

fn sample<'a>(sampling: &'a Sampling, history: &'a [TokenId]) -> Sample<'a> {
    Sample { sampling, history, prompt_tokens: history.len(), forbidden: &[], min_tokens: 0, grammar: None }
}
