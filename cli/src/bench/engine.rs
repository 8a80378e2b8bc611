//! Tokens per second of the engine, beside what the machine's arithmetic and memory allow.
//!
//! Models have the shapes of real ones and random weights, made here: Llama 3.2 1B, Qwen 2.5 0.5B and, since the whole does not fit
//! a small machine, five layers of Qwen3 30B-A3B of which the first is dense. `int4` has groups of 128 inputs, `int8` and `fp8`
//! one scale for each output; the head is int8 in groups of 32 in all three. Keys and values are bf16.
//!
//! `prefillN` is a prompt of N tokens, in steps of at most 2,048, of which the last is sampled. `decode_bB` is a step of B
//! sequences that have 512 tokens each, `decode_ctx32k` one of a single sequence of 32,768. A figure is the median of five rounds, or
//! of three where a round takes long. Between rounds, and before the first and after the last, memory and arithmetic are probed: the
//! limit is made of the medians of those probes, for a machine that is shared changes within a minute.
//!
//! The limit of a round is the longer of two times:
//!
//! - *memory*: every byte it must read, once in each step, at the rate of reading. Those are the weights (of experts, the ones that
//!   tokens chose) and, in decode, the keys and values of `context` positions of each sequence.
//! - *arithmetic*: two operations for every weight and token that it is multiplied with, and for attention
//!   `2 * 2 * heads * head_dim` for every token and position it sees, in every layer; at the peak of bf16 products for bf16 and
//!   fp8 and of int8 products for int8 and int4. Tokens that are not sampled need no head, and nothing of the last layer
//!   beyond q, k and v: that work is neither done nor counted.
//!
//! Writes, activations, norms and sampling count for nothing, so the limit is a little beyond reach.

use super::{report::Report, stats::Samples};
use crate::model::cores;
use anyhow::Context;
use engine::{
    Config, Engine, Model, ModelShape, Quantize, Row, Sample, Sampling, TokenId,
    machine::{Arithmetic, Probes},
};
use kv_cache::PageId;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::time::Instant;

const FORMATS: [Option<Quantize>; 4] = [None, Some(Quantize::Int8), Some(Quantize::Int4), Some(Quantize::Fp8)];

/// What is measured of each model in each format.
const ROWS: [(&str, Work); 7] = [
    ("prefill512", Work::Prefill { tokens: 512 }),
    ("prefill4096", Work::Prefill { tokens: 4096 }),
    ("decode_b1", Work::Decode { batch: 1, context: 512 }),
    ("decode_b4", Work::Decode { batch: 4, context: 512 }),
    ("decode_b16", Work::Decode { batch: 16, context: 512 }),
    ("decode_b32", Work::Decode { batch: 32, context: 512 }),
    ("decode_ctx32k", Work::Decode { batch: 1, context: 32_768 }),
];

const ROUNDS: usize = 5;
/// Rounds of which each takes longer than [`LONG_SECONDS`].
const LONG_ROUNDS: usize = 3;
const LONG_SECONDS: f64 = 3.0;
/// Steps of a round of decode.
const DECODE_STEPS: usize = 4;
/// Room for the longest context of the shape with the most keys and values.
const KV_BYTES: u64 = 1 << 30;

/// What a round computes.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// One prompt.
    Prefill { tokens: usize },
    /// A token of each of `batch` sequences, [`DECODE_STEPS`] times over; each sees `context` positions, its own included.
    Decode { batch: usize, context: usize },
}

/// Measures every `engine/` row that is wanted.
pub(super) fn run(report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("engine/") {
        return Ok(());
    }
    let mut probes = Probes::new(cores())?;
    for shape in [ModelShape::llama_1b(), ModelShape::qwen_0_5b(), ModelShape::qwen3_moe()] {
        for quantize in FORMATS {
            let format = quantize.map_or("bf16", Quantize::name);
            let name = |what: &str| format!("engine/{what}/{}/{format}", shape.name);
            let rows: Vec<_> = ROWS.iter().filter(|(what, _)| report.wants(&name(what))).collect();
            if rows.is_empty() {
                continue;
            }
            let shape = ModelShape { quantize, ..shape.clone() };
            let mut bench = Bench::new(&shape).with_context(|| format!("make {} in {format}", shape.name))?;
            for (what, work) in rows {
                let Figure { rate, limit, bound } = bench.measure(&mut probes, *work).with_context(|| name(what))?;
                report.bounded_row(&name(what), rate, "tok/s", Some(limit), Some(bound))?;
            }
        }
    }
    Ok(())
}

struct Bench<'a> {
    shape: &'a ModelShape,
    engine: Engine,
    /// Random.
    tokens: Vec<TokenId>,
}

/// Tokens per second, what the machine allows, and what of it.
struct Figure {
    rate: f64,
    limit: f64,
    bound: String,
}

impl<'a> Bench<'a> {
    /// Makes the model and an engine on all cores, and computes a prompt so that buffers are there.
    fn new(shape: &'a ModelShape) -> anyhow::Result<Self> {
        let model = Model::random(shape, 1)?;
        let mut random = StdRng::seed_from_u64(2);
        let tokens = (0..4096).map(|_| random.random_range(0..shape.vocab_size as TokenId)).collect();
        let config = Config { max_sequences: 32, kv_bytes: Some(KV_BYTES), ..Config::default() };
        let mut bench = Self { shape, engine: Engine::new(model, &config)?, tokens };
        bench.prefill(512)?;
        Ok(bench)
    }

    fn measure(&mut self, probes: &mut Probes, work: Work) -> anyhow::Result<Figure> {
        let arithmetic = match self.shape.quantize {
            None | Some(Quantize::Fp8) => Arithmetic::Bf16,
            Some(Quantize::Int8 | Quantize::Int4) => Arithmetic::Int8,
        };
        if let Work::Decode { .. } = work {
            // Its pages are touched for the first time.
            self.round(work)?;
        }
        let (mut seconds, mut read, mut peak) = (Vec::new(), Samples::default(), Samples::default());
        let (mut bytes, chosen) = (0, self.engine.expert_traffic().chosen);
        loop {
            read.extend([probes.read()]);
            peak.extend([probes.peak(arithmetic)]);
            let long = seconds.len() == LONG_ROUNDS && seconds.iter().all(|round| *round > LONG_SECONDS);
            if seconds.len() == ROUNDS || long {
                break;
            }
            let began = Instant::now();
            bytes += self.round(work)?;
            seconds.push(began.elapsed().as_secs_f64());
        }
        // Bytes do not vary between rounds, but for what prompts of experts choose.
        let rounds = seconds.len() as u64;
        let bytes = (bytes + self.engine.expert_traffic().chosen - chosen) / rounds;
        let seconds = Samples::from_iter(seconds).median();
        let (read, peak) = (read.median(), peak.median());
        let (reading, computing) = (bytes as f64 / (read * 1e9), self.operations(work) / (peak * 1e9));
        let tokens = work.tokens() as f64;
        let bound = match reading > computing {
            true => format!("memory at {read:.1} GB/s"),
            false => format!("arithmetic at {peak:.0} Gop/s"),
        };
        Ok(Figure { rate: tokens / seconds, limit: tokens / reading.max(computing), bound })
    }

    /// Computes a round and returns the bytes that it must read, without those of experts.
    fn round(&mut self, work: Work) -> anyhow::Result<u64> {
        let dense = self.engine.model().info().weight_bytes - self.engine.expert_traffic().all;
        match work {
            Work::Prefill { tokens } => Ok(self.prefill(tokens)? as u64 * dense),
            Work::Decode { batch, context } => {
                for _ in 0..DECODE_STEPS {
                    self.decode(batch, context)?;
                }
                let layout = self.engine.memory().layout();
                let kv = layout.page_bytes() * batch * context / layout.page_tokens as usize;
                Ok(DECODE_STEPS as u64 * (dense + kv as u64))
            }
        }
    }

    /// Computes a prompt and returns how many steps it took.
    fn prefill(&mut self, tokens: usize) -> anyhow::Result<usize> {
        let config = self.engine.config();
        let (budget, page) = (config.token_budget as usize, config.page_tokens as usize);
        let pages: Vec<_> = (0..tokens.div_ceil(page) as u32).map(PageId).collect();
        let sampling = Sampling::default();
        let prompt = &self.tokens[..tokens];
        for start in (0..tokens).step_by(budget) {
            let end = tokens.min(start + budget);
            let sample = (end == tokens).then(|| sample(&sampling, prompt));
            let row = Row { tokens: &prompt[start..end], start, pages: &pages, sample, ..Row::default() };
            self.engine.step(&[row], &mut |_| {})?;
        }
        Ok(tokens.div_ceil(budget))
    }

    /// Computes one token of each of `batch` sequences. Their pages hold zeros or what a prompt left there: that changes nothing
    /// about the time.
    fn decode(&mut self, batch: usize, context: usize) -> anyhow::Result<()> {
        let each = context.div_ceil(self.engine.config().page_tokens as usize);
        let pages: Vec<PageId> = (0..(batch * each) as u32).map(PageId).collect();
        let sampling = Sampling::default();
        let rows: Vec<Row<'_>> = self
            .tokens
            .chunks(1)
            .zip(pages.chunks(each))
            .map(|(tokens, pages)| Row {
                tokens,
                start: context - 1,
                pages,
                sample: Some(sample(&sampling, &[])),
                ..Row::default()
            })
            .collect();
        self.engine.step(&rows, &mut |_| {})?;
        Ok(())
    }

    /// Returns the operations of a round.
    fn operations(&self, work: Work) -> f64 {
        let shape = self.shape;
        let (hidden, query, kv) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        // Weights that a token meets in a layer: those that make keys and values, those of the rest, and the head's.
        let keys = hidden * (query + 2 * kv);
        let rest = |layer: usize| {
            hidden * query
                + match &shape.experts {
                    Some(experts) if layer > 0 => {
                        hidden * (experts.count + 3 * (experts.chosen * experts.intermediate + experts.shared))
                    }
                    _ => 3 * hidden * shape.intermediate,
                }
        };
        let before: usize = (0..shape.layers - 1).map(|layer| keys + rest(layer)).sum();
        let (all, sampled) = (before + keys, rest(shape.layers - 1) + hidden * shape.vocab_size);
        let seen = 4 * query;
        let operations = match work {
            Work::Prefill { tokens } => {
                let positions = tokens * (tokens + 1) / 2;
                2 * (tokens * all + sampled) + seen * (positions * (shape.layers - 1) + tokens)
            }
            Work::Decode { batch, context } => {
                DECODE_STEPS * batch * (2 * (all + sampled) + seen * context * shape.layers)
            }
        };
        operations as f64
    }
}

impl Work {
    /// Returns the tokens of a round.
    fn tokens(self) -> usize {
        match self {
            Work::Prefill { tokens } => tokens,
            Work::Decode { batch, .. } => DECODE_STEPS * batch,
        }
    }
}

fn sample<'a>(sampling: &'a Sampling, history: &'a [TokenId]) -> Sample<'a> {
    Sample { sampling, history, prompt_tokens: history.len(), forbidden: &[], min_tokens: 0, grammar: None }
}
