//! A card of NVIDIA as a home for a model.
//!
//! Three layers. [`kernels`] says what the kernels are and what a call of one is; [`device`] is what a card does with calls; [`Cuda`] is the
//! [`Home`](crate::home::Home): weights and buffers on the device, and the order of calls that make a pass ([`forward`]). Only [`driver`] knows NVIDIA's
//! driver. Kernels are compiled for the card at hand when it is opened ([`nvrtc`], [`cache`]).
//!
//! ```text
//! embed       tokens            -> residual     f32 [rows][hidden]
//! norm        residual          -> input        16-bit floats [rows][hidden]
//! linear      input             -> qkv          f32 [rows][(heads + 2 kv_heads) * head_dim]
//! rotary      qkv               -> qkv, pages
//! attention   qkv, pages        -> attended     16-bit floats [rows][heads * head_dim]
//! linear      attended          +> residual     or -> outcome, and through a norm
//! linear      input             -> gated        16-bit floats [rows][intermediate]
//! linear      gated             +> residual     or likewise
//!
//!             where a layer has experts, instead of the last two:
//! linear      input             -> scores       f32 [rows][experts]
//! choose      scores            -> chosen, weights [rows][chosen]; a pair is a row and one of its choices
//! group       chosen            -> pairs, tiles expert after expert
//! linear      input, tiles      -> gated        16-bit floats [pairs][intermediate]
//! linear      gated, tiles      -> outcomes     f32 [pairs][hidden]
//! mix         outcomes          +> residual     choice after choice
//!
//! gather      residual, qkv     -> kept         after the last pages are written only sampled rows go on
//! linear      input             -> logits       f32 [rows][vocab]; capped, and the largest found
//! rank        logits            -> edges        where top-k and top-p cut; only where a row races
//! race        logits, edges     -> tokens       in place of the largest of rows that race
//! ```
//!
//! Memory is taken when the engine is made, and none by a step. A step's rows are described in words that are copied once ([`rows`]);
//! what is asked of the device after that waits for nothing until the tokens are wanted.

#[cfg(feature = "cuda")]
mod cache;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod emulator;
mod forward;
mod graphs;
mod kernels;
#[cfg(feature = "cuda")]
mod nvrtc;
mod pages;
mod rows;
mod weights;

pub(crate) use device::Device;
pub(crate) use weights::{check, check_path};
#[cfg(test)]
pub(crate) use {emulated::Emulated, emulator::Order};

use crate::{
    Error, Model,
    cpu::{packed::PANEL, pool::Pool},
    model::{decoder::Decoder, experts::Mixture},
};
use device::{Memory, Region};
use graphs::Graphs;
use kernels::{Cut, Draw, Element, Kernel, Linear};
use kv_cache::{KvDtype, PageLayout, TokenId};
use pages::Pool as Pages;
use rows::{Capacity, Parts, Rows};
use std::{collections::HashSet, ops::Range, time::Instant};
use weights::Uploaded;

/// Returns what keys and values of `model` are kept as when nobody says.
pub(crate) fn kv_dtype(model: &Model) -> KvDtype {
    weights::kv_dtype(weights::element(&model.weights))
}

/// Opens card `card`, whose kernels are compiled by the library `nvrtc` and kept in the folder `cache`.
///
/// # Errors
/// [`Error::Card`] says what is missing.
#[cfg(feature = "cuda")]
pub(crate) fn open(
    card: usize,
    nvrtc: Option<&std::path::Path>,
    cache: Option<&std::path::Path>,
) -> Result<Box<dyn Device>, Error> {
    let cache = cache::Cache { folder: cache.map(std::path::Path::to_owned) };
    Ok(Box::new(driver::Card::open(card, nvrtc, cache)?))
}

/// Most of everything in a step, and how rows lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    capacity: Capacity,
    /// Longest sequence.
    context: usize,
    /// Elements from row to row.
    residual: usize,
    qkv: usize,
    attended: usize,
    gated: usize,
    logits: usize,
    /// `None` where no layer has experts.
    experts: Option<ExpertSizes>,
}

/// The same of layers with experts.
#[derive(Clone, Copy, Debug)]
struct ExpertSizes {
    experts: usize,
    chosen: usize,
    /// Elements from row to row.
    scores: usize,
    gated: usize,
}

impl Sizes {
    /// Of steps of up to `tokens` tokens of `sequences` sequences of up to `context` tokens in pages of `page_tokens`; `logits_rows` of them have logits
    /// at a time.
    pub(crate) fn new(
        model: &Model,
        (tokens, sequences): (usize, usize),
        logits_rows: usize,
        context: usize,
        page_tokens: usize,
    ) -> Self {
        let decoder = &model.decoder;
        let whole = |width: usize| width.next_multiple_of(PANEL);
        let mixture = decoder.mixture.as_ref();
        Self {
            capacity: Capacity {
                rows: tokens,
                sequences,
                entries: sequences * context.div_ceil(page_tokens),
                logits_rows,
            },
            context,
            residual: whole(decoder.hidden),
            qkv: whole(decoder.query_dim() + 2 * decoder.kv_dim()),
            attended: whole(decoder.query_dim()),
            gated: whole(decoder.intermediate.max(mixture.map_or(0, |mixture| mixture.shared))),
            logits: whole(decoder.vocab_size),
            experts: mixture.map(|Mixture { routing, intermediate, .. }| ExpertSizes {
                experts: routing.experts,
                chosen: routing.chosen,
                scores: whole(routing.experts),
                gated: whole(*intermediate),
            }),
        }
    }
}

/// Most bytes of [`Buffers::states`], unless a single sequence leaves more. Sequences that find no room wait for others.
const STATES: usize = 256 << 20;

/// What a pass works in, all on the device.
#[derive(Clone, Copy, Debug)]
struct Buffers {
    residual: Region,
    qkv: Region,
    /// The rows of both that are kept.
    kept_residual: Region,
    kept_qkv: Region,
    input: Region,
    attended: Region,
    gated: Region,
    /// What half a block gives, where it is normed before it is added.
    outcome: Region,
    logits: Region,
    /// The token that was found for each row, that of its largest logit at first.
    tokens: Region,
    /// What draws leave between their kernels and blocks.
    edges: Region,
    leads: Region,
    lead_counters: Region,
    /// Sums that blocks leave to each other, and how many have.
    /// A linear's inputs in the order of its weights, where they have one.
    ordered: Region,
    partial: Region,
    counters: Region,
    /// What parts of long sequences leave to each other in attention.
    states: Region,
    /// Of no length where no layer has experts.
    experts: ExpertBuffers,
}

/// What layers with experts work in besides.
#[derive(Clone, Copy, Debug, Default)]
struct ExpertBuffers {
    scores: Region,
    /// Of each pair: its expert, and what that weighs.
    chosen: Region,
    weights: Region,
    /// Pairs, expert after expert, and the tiles that they make.
    pairs: Region,
    tiles: Region,
    gated: Region,
    outcomes: Region,
}

/// A model's weights, buffers and pages on a device.
#[derive(Debug)]
pub(crate) struct Cuda {
    device: Box<dyn Device>,
    element: Element,
    sizes: Sizes,
    weights: Uploaded,
    buffers: Buffers,
    words: Rows,
    parts: Parts,
    /// `None` before [`Cuda::reserve_pages`].
    pages: Option<Pages>,
    graphs: Graphs,
    /// Rows at hand, and where the head's inputs are.
    rows: usize,
    hidden: Region,
    /// Rows whose logits are there, and what was found for them.
    computed: Range<usize>,
    /// Whether tokens are drawn on the device.
    races: bool,
    /// Layers of the pass that nobody was told of.
    untold: Range<usize>,
    /// What was downloaded last.
    logits: Vec<f32>,
    found: Vec<TokenId>,
    pool: Pool,
    /// Present while calls are made only to learn which kernels they are of.
    listed: Option<HashSet<Kernel>>,
}

impl Cuda {
    /// Uploads `model` to `device` and reserves buffers; `threads` draw tokens.
    pub(crate) fn new(mut device: Box<dyn Device>, model: &Model, sizes: Sizes, threads: usize) -> Result<Self, Error> {
        let element = weights::element(&model.weights);
        let weights = Uploaded::upload(&mut *device, &model.decoder, &model.weights, element, sizes.context)?;
        let buffers = Buffers::reserve(&mut *device, &sizes, &model.decoder, &weights, element)?;
        let region = device.alloc("the rows of a step", sizes.capacity.bytes())?;
        Ok(Self {
            device,
            element,
            sizes,
            weights,
            hidden: buffers.input,
            buffers,
            words: Rows::new(sizes.capacity),
            parts: sizes.capacity.parts(region),
            pages: None,
            graphs: Graphs::new(),
            rows: 0,
            computed: 0..0,
            races: model.decoder.vocab_size < Draw::MOST_COLUMNS,
            untold: 0..0,
            logits: vec![0.0; sizes.capacity.logits_rows * sizes.logits],
            found: vec![0; sizes.capacity.logits_rows],
            pool: Pool::new(threads)?,
            listed: None,
        })
    }

    /// Says whether weights were rounded when they were uploaded.
    pub(crate) fn rounds(&self) -> bool {
        self.weights.rounded
    }

    /// Returns what a `share` of the device's memory leaves for pages.
    ///
    /// # Errors
    /// [`Error::Card`] says who has the rest.
    pub(crate) fn bytes_for_pages(&mut self, share: f64) -> Result<u64, Error> {
        let Memory { total, free, own } = self.device.memory()?;
        let mine = (total as f64 * share) as u64;
        let (left, others) = (mine.saturating_sub(own), total.saturating_sub(free + own));
        if left > 0 && left <= free {
            return Ok(left);
        }
        let mib = |bytes: u64| bytes >> 20;
        let problem = format!(
            "a share of {share} is {} MiB of {}; weights and buffers take {} of them, others have {}, and {} are free: change the share (gpu_memory_utilization), or take a smaller model or token_budget",
            mib(mine),
            mib(total),
            mib(own),
            mib(others),
            mib(free)
        );
        Err(Error::card(self.device.name(), "find room for pages", problem))
    }

    /// Reserves the pool, and makes ready what steps of `model` do.
    pub(crate) fn reserve_pages(&mut self, model: &Model, layout: &PageLayout) -> Result<(), Error> {
        self.pages = Some(Pages::reserve(&mut *self.device, layout, self.element)?);
        let began = Instant::now();
        self.prepare(&model.decoder)?;
        tracing::debug!(seconds = began.elapsed().as_secs_f64(), "kernels are ready");
        Ok(())
    }
}

impl Buffers {
    fn reserve(
        device: &mut dyn Device,
        sizes: &Sizes,
        decoder: &Decoder,
        weights: &Uploaded,
        element: Element,
    ) -> Result<Self, Error> {
        let Capacity { rows, logits_rows, .. } = sizes.capacity;
        let most_shared = device.most_shared();
        let mut alloc = |bytes: usize| device.alloc("what a step works in", bytes);
        let post_norms = decoder.names.attention_post_norm.or(decoder.names.mlp_post_norm).is_some();
        // What sums of parts need depends on how many rows there are, and not always more on more.
        let of = |linear: &weights::Linear| {
            let bytes = |rows: usize| linear.call(element, most_shared, rows, Region::default(), 0).partial_bytes();
            (1..=rows).step_by(16).chain([rows]).map(bytes).max().unwrap_or(0)
        };
        // No less than a sequence of any length leaves.
        let each = sizes.context.div_ceil(512) * decoder.kv_heads * (decoder.head_dim / 2 + 12) * 128;
        let reordered = weights.linears().any(|linear| linear.order.bytes > 0);
        let partial = weights.linears().map(of).max().unwrap_or(0);
        Ok(Self {
            residual: alloc(rows * sizes.residual * 4)?,
            qkv: alloc(rows * sizes.qkv * 4)?,
            kept_residual: alloc(rows * sizes.residual * 4)?,
            kept_qkv: alloc(rows * sizes.qkv * 4)?,
            input: alloc(rows * sizes.residual * 2)?,
            attended: alloc(rows * sizes.attended * 2)?,
            gated: alloc(rows * sizes.gated * 2)?,
            outcome: alloc(if post_norms { rows * sizes.residual * 4 } else { 0 })?,
            logits: alloc(logits_rows * sizes.logits * 4)?,
            tokens: alloc(logits_rows * 4)?,
            edges: alloc(logits_rows * 8)?,
            leads: alloc(logits_rows * Draw::lead_bytes(decoder.vocab_size))?,
            lead_counters: alloc(logits_rows * 4)?,
            ordered: alloc(if reordered { rows * sizes.residual.max(sizes.attended).max(sizes.gated) * 2 } else { 0 })?,
            partial: alloc(partial as usize)?,
            counters: alloc(Linear::most_counters() as usize * 4)?,
            states: alloc((sizes.capacity.sequences * each).min(STATES).max(each))?,
            experts: match &sizes.experts {
                Some(experts) => ExpertBuffers::reserve(&mut alloc, sizes, experts)?,
                None => ExpertBuffers::default(),
            },
        })
    }
}

impl ExpertBuffers {
    fn reserve(
        alloc: &mut dyn FnMut(usize) -> Result<Region, Error>,
        sizes: &Sizes,
        experts: &ExpertSizes,
    ) -> Result<Self, Error> {
        let rows = sizes.capacity.rows;
        let pairs = rows * experts.chosen;
        Ok(Self {
            scores: alloc(rows * experts.scores * 4)?,
            chosen: alloc(pairs * 4)?,
            weights: alloc(pairs * 4)?,
            pairs: alloc(pairs * 4)?,
            tiles: alloc(Cut::most_count(pairs, experts.experts) * 12)?,
            gated: alloc(pairs * experts.gated * 2)?,
            outcomes: alloc(pairs * sizes.residual * 4)?,
        })
    }
}
