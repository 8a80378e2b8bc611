//! One rank: a device with its part of a model, of every page, and of what a pass works in.

use super::{
    Device,
    adapters::Adapters,
    device::{Memory, Region},
    graphs::Graphs,
    kernels::{self, Cut, Draw, Element, JoinTo, Kernel, LatentAttention},
    latent::{LatentBuffers, LatentSizes},
    pages::Pool as Pages,
    products::Products,
    rows::{Capacity, Parts, Rows},
    slice::Slice,
    weights::{self, Uploaded},
};
use crate::{
    Config, Error, Model,
    cpu::packed::PANEL,
    model::{decoder::Decoder, experts::Mixture},
};
use kv_cache::PageLayout;
use std::{collections::HashSet, ops::Range, time::Instant};

/// Most of everything in a step, and how rows lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(super) capacity: Capacity,
    /// Longest sequence.
    pub(super) context: usize,
    /// Elements from row to row.
    pub(super) residual: usize,
    pub(super) attended: usize,
    pub(super) gated: usize,
    pub(super) logits: usize,
    /// Of a rank's own heads; what leads into latent attention, where that is what a model has.
    pub(super) qkv: usize,
    pub(super) latent: Option<LatentSizes>,
    /// Whether rows are looked at for what is no number.
    pub(super) checked: bool,
    /// `None` where no layer has experts.
    pub(super) experts: Option<ExpertSizes>,
}

/// The same of layers with experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertSizes {
    pub(super) experts: usize,
    pub(super) chosen: usize,
    /// Elements from row to row.
    pub(super) scores: usize,
    pub(super) gated: usize,
}

impl Sizes {
    /// Of steps of up to `tokens` tokens of `sequences` sequences of up to `context` tokens in pages of `page_tokens`; `logits_rows` of them have logits
    /// at a time. The rest is as `config` says.
    pub(crate) fn new(
        model: &Model,
        config: &Config,
        (tokens, sequences): (usize, usize),
        logits_rows: usize,
        context: usize,
        page_tokens: usize,
    ) -> Self {
        let decoder = &model.decoder;
        let ranks = config.tensor_parallel;
        let (mixture, latent) = (decoder.mixture.as_ref(), decoder.latent.as_ref());
        let own_heads = || {
            let keys = decoder.kv_dim().div_ceil(ranks).next_multiple_of(decoder.head_dim);
            decoder.query_dim() / ranks + 2 * keys
        };
        Self {
            capacity: Capacity {
                rows: tokens,
                sequences,
                entries: sequences * context.div_ceil(page_tokens),
                logits_rows,
            },
            context,
            residual: whole(decoder.hidden),
            qkv: whole(latent.map_or_else(own_heads, |shape| shape.entry(decoder.heads))),
            latent: latent.map(|shape| LatentSizes::new(shape, decoder.heads)),
            // Single heads write values of latents, one beside the other.
            attended: latent.map_or(whole(decoder.query_dim()), |shape| decoder.heads * shape.value),
            gated: whole(decoder.intermediate.max(mixture.map_or(0, |mixture| mixture.shared))),
            logits: whole(decoder.vocab_size),
            checked: config.nan_guard,
            experts: mixture.map(|Mixture { routing, intermediate, .. }| ExpertSizes {
                experts: routing.experts,
                chosen: routing.chosen,
                scores: whole(routing.experts),
                gated: whole(*intermediate),
            }),
        }
    }
}

/// Returns the elements of a row of `width` in whole panels.
pub(super) fn whole(width: usize) -> usize {
    width.next_multiple_of(PANEL)
}

/// Most bytes of [`Buffers::states`], unless a single sequence leaves more. Sequences that find no room wait for others.
const STATES: usize = 256 << 20;

/// What a pass works in, all on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    pub(super) residual: Region,
    pub(super) qkv: Region,
    /// The rows of both that are kept.
    pub(super) kept_residual: Region,
    pub(super) kept_qkv: Region,
    pub(super) input: Region,
    pub(super) attended: Region,
    pub(super) gated: Region,
    /// What half a block gives, where it is normed before it is added.
    pub(super) outcome: Region,
    pub(super) logits: Region,
    /// The token that was found for each row, that of its largest logit at first.
    pub(super) tokens: Region,
    /// What draws leave between their kernels and blocks.
    pub(super) edges: Region,
    pub(super) leads: Region,
    pub(super) lead_counters: Region,
    /// A linear's inputs in the order of its weights, where they have one.
    pub(super) ordered: Region,
    /// Sums that blocks leave to each other, and how many have.
    pub(super) partial: Region,
    pub(super) counters: Region,
    /// What parts of long sequences leave to each other in attention.
    pub(super) states: Region,
    /// What this rank gives to its peers, and what it has of all of them; of no length where it has none.
    pub(super) part: Region,
    pub(super) parts: Region,
    /// Where rows, and those that are kept, first hold what is no number; of no length where nobody asks.
    pub(super) stages: Region,
    pub(super) kept_stages: Region,
    /// Of no length where attention is not latent.
    pub(super) latent: LatentBuffers,
    /// Of no length where no layer has experts.
    pub(super) experts: ExpertBuffers,
}

/// What layers with experts work in besides.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ExpertBuffers {
    pub(super) scores: Region,
    /// Of each pair: its expert, and what that weighs.
    pub(super) chosen: Region,
    pub(super) weights: Region,
    /// Pairs, expert after expert, and the tiles that they make.
    pub(super) pairs: Region,
    pub(super) tiles: Region,
    pub(super) gated: Region,
    pub(super) outcomes: Region,
}

/// A part of a model on a device.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(super) device: Box<dyn Device>,
    pub(super) slice: Slice,
    pub(super) element: Element,
    pub(super) sizes: Sizes,
    pub(super) weights: Uploaded,
    pub(super) buffers: Buffers,
    /// Present where a library multiplies.
    pub(super) products: Option<Products>,
    pub(super) words: Rows,
    pub(super) parts: Parts,
    /// `None` before [`Rank::reserve_pages`].
    pub(super) pages: Option<Pages>,
    pub(super) graphs: Graphs,
    pub(super) adapters: Adapters,
    /// Rows at hand, and where the head's inputs are.
    pub(super) rows: usize,
    pub(super) hidden: Region,
    /// Rows whose logits are there, and what was found for them.
    pub(super) computed: Range<usize>,
    /// Whether tokens are drawn on the device.
    pub(super) races: bool,
    /// Present while calls are made only to learn which kernels they are of.
    pub(super) listed: Option<HashSet<Kernel>>,
}

impl Rank {
    /// Uploads `slice` of `model` to `device` and reserves buffers.
    pub(super) fn new(mut device: Box<dyn Device>, slice: Slice, model: &Model, sizes: Sizes) -> Result<Self, Error> {
        let element = weights::element(model.weights());
        let weights = Uploaded::upload(&mut *device, slice, &model.decoder, model.weights(), element, sizes.context)?;
        let buffers = Buffers::reserve(&mut *device, slice, &sizes, &model.decoder, &weights, element)?;
        let products = Products::reserve(&mut *device, &weights, element, sizes.capacity.rows)?;
        let region = device.alloc("the rows of a step", sizes.capacity.bytes())?;
        let adapters = Adapters::reserve(&mut *device, sizes.capacity.rows)?;
        Ok(Self {
            device,
            slice,
            element,
            sizes,
            weights,
            hidden: buffers.input,
            buffers,
            products,
            words: Rows::new(sizes.capacity),
            parts: sizes.capacity.parts(region),
            pages: None,
            graphs: Graphs::new(),
            adapters,
            rows: 0,
            computed: 0..0,
            races: model.decoder.vocab_size < Draw::MOST_COLUMNS,
            listed: None,
        })
    }

    /// Returns what a `share` of the device's memory leaves for pages, of which another engine of ours has `beside` bytes.
    ///
    /// # Errors
    /// [`Error::Card`] says who has the rest.
    pub(super) fn bytes_for_pages(&mut self, share: f64, beside: u64) -> Result<u64, Error> {
        let Memory { total, free, own } = self.device.memory()?;
        let own = own + beside;
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

    /// Reserves this rank's part of the pool, and makes ready what steps of `model` do.
    pub(super) fn reserve_pages(&mut self, model: &Model, layout: &PageLayout) -> Result<(), Error> {
        self.pages = Some(Pages::reserve(&mut *self.device, layout, self.slice, self.element)?);
        let began = Instant::now();
        self.prepare(&model.decoder)?;
        tracing::debug!(seconds = began.elapsed().as_secs_f64(), "kernels are ready");
        Ok(())
    }
}

impl Buffers {
    fn reserve(
        device: &mut dyn Device,
        slice: Slice,
        sizes: &Sizes,
        decoder: &Decoder,
        weights: &Uploaded,
        element: Element,
    ) -> Result<Self, Error> {
        let Capacity { rows, logits_rows, .. } = sizes.capacity;
        let most_shared = device.most_shared();
        let latent = sizes.latent.map(|latent| LatentBuffers::reserve(device, rows, &latent, weights)).transpose()?;
        let mut alloc = |bytes: usize| device.alloc("what a step works in", bytes);
        let post_norms = decoder.names.attention_post_norm.or(decoder.names.mlp_post_norm).is_some();
        // What sums of parts need depends on how many rows there are, and not always more on more.
        let of = |linear: &weights::Linear| {
            let bytes = |rows: usize| linear.call(element, most_shared, rows, Region::default(), 0).partial_bytes();
            (1..=rows).step_by(16).chain([rows]).map(bytes).max().unwrap_or(0)
        };
        // No less than a sequence of any length leaves.
        let each = match &decoder.latent {
            Some(shape) => LatentAttention::most_state_bytes(decoder.heads, shape.rank, sizes.context),
            None => {
                let kv_heads = slice.kv_heads(decoder.kv_heads).len();
                sizes.context.div_ceil(512) * kv_heads * (decoder.head_dim / 2 + 12) * 128
            }
        };
        let widest = [sizes.residual, sizes.attended, sizes.gated, sizes.latent.map_or(0, |latent| latent.narrow)];
        let widest = widest.into_iter().max().unwrap_or(0);
        let reordered = weights.linears().any(|linear| linear.order.bytes > 0);
        let partial = weights.linears().map(of).max().unwrap_or(0);
        let part = if slice.ranks > 1 { Self::part_bytes(slice, sizes, decoder) } else { 0 };
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
            ordered: alloc(if reordered { rows * widest * 2 } else { 0 })?,
            partial: alloc(partial as usize)?,
            counters: alloc(kernels::Linear::most_counters() as usize * 4)?,
            states: alloc((sizes.capacity.sequences * each).min(STATES).max(each))?,
            part: alloc(part)?,
            parts: alloc(part * slice.ranks)?,
            stages: alloc(if sizes.checked { rows * 4 } else { 0 })?,
            kept_stages: alloc(if sizes.checked { rows * 4 } else { 0 })?,
            latent: latent.unwrap_or_default(),
            experts: match &sizes.experts {
                Some(experts) => ExpertBuffers::reserve(&mut alloc, sizes, experts)?,
                None => ExpertBuffers::default(),
            },
        })
    }

    /// Returns the bytes of the most that a rank gives to its peers at once.
    fn part_bytes(slice: Slice, sizes: &Sizes, decoder: &Decoder) -> usize {
        let Capacity { rows, logits_rows, .. } = sizes.capacity;
        let pairs = sizes.experts.map_or(0, |experts| rows * experts.chosen);
        let expert_gated = sizes.experts.map_or(0, |experts| experts.gated);
        let (halves, floats) = (JoinTo::Halves.bytes(), JoinTo::Floats.bytes());
        let parts = [
            (rows, decoder.query_dim(), halves),
            (rows, sizes.gated, halves),
            (pairs, expert_gated, halves),
            (rows.max(pairs), decoder.hidden, floats),
            (logits_rows, decoder.vocab_size, floats),
        ];
        let bytes = |(rows, width, bytes): (usize, usize, usize)| rows * whole(slice.width(width)) * bytes;
        parts.into_iter().map(bytes).max().unwrap_or(0)
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
