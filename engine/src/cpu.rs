//! The processor as a home for a model: the few fused operations a step is made of, over buffers that are allocated once.
//!
//! This is the engine's narrow waist: [`Cpu::begin`] takes the tokens of a step, and each operation works on the buffers it names. [`forward`]
//! is their order.
//!
//! ```text
//! embed            tokens            -> residual
//! norm             residual          -> input        or the residual as it is
//! qkv              input             -> qkv          one linear for q, k and v
//! rotate_and_write qkv               -> qkv, pages   turned; k and v to their pages
//! attend           qkv, pages        -> attended
//! output           attended          +> residual     through a norm where the model has one there
//! gate_up          input             -> gated        one linear, activation(gate) * up on the way out
//! up               input             -> gated        one linear and its activation, where there is no gate
//! down             gated             +> residual     as output
//! keep             residual, qkv                     after the last pages are written only sampled rows go on
//! head             input             -> logits       scaled and capped where the model says so
//! largest          input             -> logits       of each panel's logits the largest alone
//! ```

pub(crate) mod adapter;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
mod attend;
pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod encode;
mod experts;
pub(crate) mod format;
mod forward;
pub(crate) mod kernels;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod nodes;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod pages;
pub(crate) mod pool;
mod products;
pub(crate) mod rotary;
pub(crate) mod scheme;
pub(crate) mod simd;

use crate::{
    Error, KvMemory,
    home::Span,
    model::{
        decoder::{Activation, Decoder, NormKind, QkNorm},
        rope::{Rope, Turns},
        weights::{HeadAttention, Linear, Norm, Weights},
    },
};
use attend::Dealing;
use attention::AttentionShape;
use buffer::Buffer;
use experts::ExpertBuffers;
use format::Format;
use kernels::Kernels;
use kv_cache::TokenId;
use latent::LatentBuffers;
use linear::{Largest, Output};
use norm::{NormOutput, NormTask};
use packed::PANEL;
use pages::{LayerPages, Slot};
use pool::Pool;
use products::{DeltaLists, Deltas, Operand, SharedOutput};
use rotary::{HeadNorms, RotaryTask};
use simd::portable::Portable;
use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Multiply-adds below which waking other threads costs more than it saves.
const ALONE: usize = 1 << 16;
/// Tokens of one task of a row-wise operation.
const CHUNK: usize = 16;
/// Logits of one task of an operation on each.
const LOGITS_CHUNK: usize = 1 << 14;

/// Threads, kernels and buffers of one engine.
#[derive(Debug)]
pub(crate) struct Cpu {
    kernels: &'static Kernels,
    pool: Pool,
    sizes: Sizes,
    /// Rows of the step at hand.
    rows: usize,
    /// `[rows][hidden]` f32, zero beyond `hidden`.
    residual: Buffer,
    /// `[rows][hidden]`, format of the weights.
    input: Buffer,
    /// `[rows][heads + 2 * kv_heads][head_dim]` f32.
    qkv: Buffer,
    /// `[rows][heads][head_dim]`, format of the weights.
    attended: Buffer,
    /// `[rows][intermediate]`, format of the weights.
    gated: Buffer,
    /// An operand as the linear at hand reads it, where that is not how it lies in its buffer.
    encoded: Buffer,
    /// `[rows][hidden]` f32: what half a block gives, where it is normed before it is added.
    outcome: Buffer,
    /// `[sampled rows][vocab]` f32, or the start of it `[sampled rows][panels]` of the largest.
    logits: Buffer,
    /// The angles of each of the decoder's ropes.
    angles: Vec<Angles>,
    slots: Vec<Slot>,
    experts: Option<ExpertBuffers>,
    latent: Option<LatentBuffers>,
    dealing: Dealing,
    /// What adapters make of the rows' inputs, `[rows][ranks]`; grows to the largest ranks in use.
    hidden: Vec<f32>,
    delta_lists: DeltaLists,
    /// One for each thread.
    scratch: Vec<Mutex<Buffer>>,
}

/// What heads turn by in a step, `[rows][pairs]`.
#[derive(Debug)]
struct Angles {
    turns: Turns,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Strides and shapes, all derived from the decoder.
#[derive(Clone, Debug)]
struct Sizes {
    format: Format,
    hidden: usize,
    /// f32 from row to row.
    residual: usize,
    qkv: usize,
    logits: usize,
    vocab: usize,
    /// Bytes from row to row.
    input: usize,
    attended: usize,
    gated: usize,
    encoded: usize,
    heads: usize,
    kv_heads: usize,
    pairs: usize,
    interleaved_pairs: bool,
    norm: NormKind,
    norm_eps: f32,
    whole_qk_norm: bool,
    activation: Activation,
    logit_scale: f32,
    logit_cap: Option<f32>,
    attention: AttentionShape,
}

impl Cpu {
    /// Starts `threads` threads and reserves buffers for steps of up to `tokens` tokens of which up to `samples` are sampled.
    ///
    /// `dtype_format` is how inputs of the model's linears are stored, from [`Kernels::format`]; `context` the longest
    /// sequence, on which the angles of some ropes depend.
    pub(crate) fn new(
        kernels: &'static Kernels,
        decoder: &Decoder,
        dtype_format: Format,
        threads: usize,
        tokens: usize,
        samples: usize,
        context: usize,
    ) -> Result<Self, Error> {
        let sizes = Sizes::new(decoder, dtype_format);
        // The tile unit reads inputs of linears in whole tiles.
        let whole_tiles = tokens.next_multiple_of(16);
        let scratch_bytes = 4 * linear::SCRATCH.max(sizes.attention.scratch_floats());
        let scratch = (0..threads).map(|_| Buffer::new(scratch_bytes).map(Mutex::new));
        let experts = decoder.mixture.as_ref().map(|mixture| ExpertBuffers::new(mixture, &sizes, threads, tokens));
        let latent = decoder.latent.as_ref().map(|shape| LatentBuffers::new(shape, &sizes, tokens));
        let table = || vec![0.0; tokens * sizes.pairs];
        let angles = |rope: &Rope| Angles { turns: rope.turns(context), cos: table(), sin: table() };
        let post_norms = decoder.names.attention_post_norm.or(decoder.names.mlp_post_norm).is_some();
        Ok(Self {
            kernels,
            pool: Pool::new(threads)?,
            rows: 0,
            residual: Buffer::new(tokens * sizes.residual * 4)?,
            input: Buffer::new(whole_tiles * sizes.input)?,
            qkv: Buffer::new(tokens * sizes.qkv * 4)?,
            attended: Buffer::new(whole_tiles * sizes.attended)?,
            gated: Buffer::new(whole_tiles * sizes.gated)?,
            encoded: Buffer::new(whole_tiles * sizes.encoded)?,
            outcome: Buffer::new(if post_norms { tokens * sizes.residual * 4 } else { 0 })?,
            logits: Buffer::new(samples * sizes.logits * 4)?,
            angles: decoder.ropes.iter().map(angles).collect(),
            slots: Vec::with_capacity(tokens),
            experts: experts.transpose()?,
            latent: latent.transpose()?,
            dealing: Dealing::default(),
            hidden: Vec::new(),
            delta_lists: DeltaLists::default(),
            scratch: scratch.collect::<Result<_, _>>()?,
            sizes,
        })
    }

    /// Starts a step: computes angles and slots of all rows.
    pub(crate) fn begin(&mut self, spans: &[Span<'_>], page_tokens: usize) {
        self.rows = spans.iter().map(|span| span.tokens).sum();
        self.slots.clear();
        let pairs = self.sizes.pairs;
        let positions = spans.iter().flat_map(|span| (span.start..span.start + span.tokens).map(|at| (at, span.pages)));
        for (row, (position, pages)) in positions.enumerate() {
            let turned = row * pairs..(row + 1) * pairs;
            for Angles { turns, cos, sin } in &mut self.angles {
                turns.angles(position as u32, &mut cos[turned.clone()], &mut sin[turned.clone()]);
            }
            let token = (position % page_tokens) as u32;
            self.slots.push(Slot { page: pages[position / page_tokens].0, token });
        }
    }

    /// Looks up the embeddings of `tokens`, one for each row.
    pub(crate) fn embed(&mut self, weights: &Weights, tokens: &[TokenId]) {
        let (width, stride) = (self.sizes.hidden, self.sizes.residual);
        let residual = Shared(self.residual.as_mut_ptr().cast::<f32>());
        let chunks = tokens.len().div_ceil(CHUNK);
        self.pool.run(chunks, &|chunk, _| {
            let first = chunk * CHUNK;
            for (row, token) in tokens.iter().enumerate().skip(first).take(CHUNK) {
                // SAFETY: row `row` of the residual holds `stride` f32 and belongs to this task.
                let row = unsafe { std::slice::from_raw_parts_mut(residual.at(row * stride), stride) };
                weights.embed(*token as usize, &mut row[..width]);
                row[width..].fill(0.0);
            }
        });
    }

    /// Norms the residual into the input of the next linear, or takes it as it is.
    pub(crate) fn norm(&mut self, norm: Option<&Norm>) {
        let to = NormOutput::Store { to: self.input.as_mut_ptr(), stride: self.sizes.input, format: self.sizes.format };
        let from = self.residual.as_mut_ptr().cast();
        self.norm_rows(norm, from, to);
    }

    /// Norms all rows of `from`, which is laid out as the residual.
    fn norm_rows(&mut self, norm: Option<&Norm>, from: *mut f32, to: NormOutput) {
        let (sizes, rows, run) = (&self.sizes, self.rows, self.kernels.norm);
        let (from, to) = (Shared(from), SharedNormOutput(to));
        self.pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
            let first = chunk * CHUNK;
            let task = NormTask {
                from: from.at(first * sizes.residual),
                from_stride: sizes.residual,
                to: to.row(first),
                rows: CHUNK.min(rows - first),
                width: sizes.hidden,
                kind: sizes.norm,
                norm,
                eps: sizes.norm_eps,
            };
            // SAFETY: the rows lie in both buffers, which were sized for them, and belong to this task.
            unsafe { run(&task) };
        });
    }

    /// Adds the product of an operand and `linear` to the residual, through a norm where there is one.
    fn add(&mut self, linear: &Linear, operand: Operand, norm: Option<&Norm>, deltas: Deltas<'_>) {
        let (residual, stride) = (self.residual.as_mut_ptr().cast(), self.sizes.residual);
        if norm.is_none() {
            return self.linear(linear, operand, Output::Add { to: residual, stride }, deltas);
        }
        let outcome = self.outcome.as_mut_ptr().cast();
        self.linear(linear, operand, Output::Store { to: outcome, stride }, deltas);
        self.norm_rows(norm, outcome, NormOutput::Add { to: residual, stride });
    }

    /// Computes q, k and v.
    pub(crate) fn qkv(&mut self, linear: &Linear, spans: &[Span<'_>], layer: usize) {
        let to = Output::Store { to: self.qkv.as_mut_ptr().cast(), stride: self.sizes.qkv };
        self.linear(linear, Operand::Input, to, Deltas::new(spans, layer, |layer| &layer.qkv));
    }

    /// Norms q and k, turns them by rope `rope`, and writes k and v to the pages of layer `layer`.
    pub(crate) fn rotate_and_write(&mut self, weights: &HeadAttention, rope: usize, memory: &KvMemory, layer: usize) {
        let sizes = &self.sizes;
        let pages = LayerPages::new(memory, layer);
        let qkv = Shared(self.qkv.as_mut_ptr().cast::<f32>());
        let (slots, Angles { cos, sin, .. }) = (&self.slots, &self.angles[rope]);
        let norms = weights.head_norms.as_ref().map(|(q, k)| HeadNorms {
            kind: sizes.norm,
            whole: sizes.whole_qk_norm,
            q,
            k,
            eps: sizes.norm_eps,
        });
        let run = self.kernels.rotary;
        self.pool.run(slots.len().div_ceil(CHUNK), &|chunk, _| {
            let first = chunk * CHUNK;
            let tokens = CHUNK.min(slots.len() - first);
            let angles = first * sizes.pairs..(first + tokens) * sizes.pairs;
            let task = RotaryTask {
                qkv: qkv.at(first * sizes.qkv),
                stride: sizes.qkv,
                slots: &slots[first..first + tokens],
                cos: &cos[angles.clone()],
                sin: &sin[angles],
                pairs: sizes.pairs,
                interleaved: sizes.interleaved_pairs,
                heads: sizes.heads,
                kv_heads: sizes.kv_heads,
                norms,
                pages,
            };
            // SAFETY: the rows lie in the buffer; slots were checked against the pool when the step began, and each token's
            // slot is written by its own task alone.
            unsafe { run(&task) };
        });
    }

    /// Adds the attention's output projection, normed by `norm`, to the residual.
    pub(crate) fn output(&mut self, linear: &Linear, norm: Option<&Norm>, spans: &[Span<'_>], layer: usize) {
        self.add(linear, Operand::Attended, norm, Deltas::new(spans, layer, |layer| &layer.output));
    }

    /// Computes `activation(gate) * up`.
    pub(crate) fn gate_up(&mut self, linear: &Linear, spans: &[Span<'_>], layer: usize) {
        let Sizes { gated: stride, format, activation, .. } = self.sizes;
        let to = Output::Gate { to: self.gated.as_mut_ptr(), stride, format, activation };
        self.linear(linear, Operand::Input, to, Deltas::new(spans, layer, |layer| &layer.up));
    }

    /// Computes `activation(up)`.
    pub(crate) fn up(&mut self, linear: &Linear, spans: &[Span<'_>], layer: usize) {
        let Sizes { gated: stride, format, activation, .. } = self.sizes;
        let to = Output::Activate { to: self.gated.as_mut_ptr(), stride, format, activation };
        self.linear(linear, Operand::Input, to, Deltas::new(spans, layer, |layer| &layer.up));
    }

    /// Adds the down projection, normed by `norm`, to the residual.
    pub(crate) fn down(&mut self, linear: &Linear, norm: Option<&Norm>, spans: &[Span<'_>], layer: usize) {
        self.add(linear, Operand::Gated, norm, Deltas::new(spans, layer, |layer| &layer.down));
    }

    /// Moves `rows`, in ascending order, to the front of the residual and of what queries come from, and forgets all others.
    pub(crate) fn keep(&mut self, rows: impl Iterator<Item = usize>) {
        let Sizes { residual, qkv, pairs, .. } = self.sizes;
        let mut kept = 0;
        for row in rows {
            assert!(row >= kept && row < self.rows, "row {row} of {}", self.rows);
            self.residual.floats_mut().copy_within(row * residual..(row + 1) * residual, kept * residual);
            match &mut self.latent {
                None => self.qkv.floats_mut().copy_within(row * qkv..(row + 1) * qkv, kept * qkv),
                Some(latent) => {
                    // Its queries are still to be made, and turned.
                    latent.keep(row, kept);
                    for Angles { cos, sin, .. } in &mut self.angles {
                        cos.copy_within(row * pairs..(row + 1) * pairs, kept * pairs);
                        sin.copy_within(row * pairs..(row + 1) * pairs, kept * pairs);
                    }
                }
            }
            kept += 1;
        }
        self.rows = kept;
    }

    /// Copies what the next linear reads of row `row` to `to`, `[hidden]`.
    pub(crate) fn read_input(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.rows && to.len() == self.sizes.hidden, "row {row} of {}", self.rows);
        // SAFETY: the buffer holds `rows` rows of `hidden` elements, and nobody writes it now.
        unsafe {
            let from = self.input.as_ptr().add(row * self.sizes.input);
            self.sizes.format.load_slice(Portable, from, to);
        }
    }

    /// Moves `rows` of what the next linear reads, in ascending order, to the front, and forgets all others.
    pub(crate) fn keep_input(&mut self, rows: impl Iterator<Item = usize>) {
        let stride = self.sizes.input;
        let mut kept = 0;
        for row in rows {
            assert!(row >= kept && row < self.rows, "row {row} of {}", self.rows);
            self.input.bytes_mut().copy_within(row * stride..(row + 1) * stride, kept * stride);
            kept += 1;
        }
        self.rows = kept;
    }

    /// Computes the logits of `rows`, which thereby become the rows of the step. Slices follow each other in ascending order.
    pub(crate) fn head(&mut self, linear: &Linear, rows: Range<usize>) {
        self.move_input(rows);
        let to = Output::Store { to: self.logits.as_mut_ptr().cast(), stride: self.sizes.logits };
        self.linear(linear, Operand::Input, to, Deltas::NONE);
        let Sizes { logit_scale, logit_cap, .. } = self.sizes;
        if logit_scale == 1.0 && logit_cap.is_none() {
            return;
        }
        let (count, run) = (self.rows * self.sizes.logits, self.kernels.scale_and_cap);
        let logits = Shared(self.logits.as_mut_ptr().cast::<f32>());
        self.pool.run(count.div_ceil(LOGITS_CHUNK), &|chunk, _| {
            let first = chunk * LOGITS_CHUNK;
            // SAFETY: the logits lie in the buffer and belong to this task; rows and chunks are whole panels.
            unsafe {
                let logits = std::slice::from_raw_parts_mut(logits.at(first), LOGITS_CHUNK.min(count - first));
                run(logits, logit_scale, logit_cap);
            }
        });
    }

    /// Finds the largest logit of each panel for `rows`, as [`Cpu::head`] would compute them, and writes no other.
    pub(crate) fn compute_largest(&mut self, head: &Linear, rows: Range<usize>) {
        self.move_input(rows);
        let Sizes { logits, vocab, logit_scale: scale, logit_cap: cap, .. } = self.sizes;
        let to = self.logits.as_mut_ptr().cast::<Largest>();
        let to = Output::Largest { to, stride: logits / PANEL, first: 0, columns: vocab, scale, cap };
        self.linear(head, Operand::Input, to, Deltas::NONE);
    }

    /// Returns the token with the largest logit of row `row`, the lowest of equals, as [`Cpu::compute_largest`] left it.
    pub(crate) fn largest(&self, row: usize) -> Option<TokenId> {
        let panels = self.sizes.logits / PANEL;
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the buffer has room for 64 f32 where one panel's largest stands; it is aligned to 64 bytes and initialised, and
        // any bits are an f32 and an u32.
        let largest =
            unsafe { std::slice::from_raw_parts(self.logits.as_ptr().cast::<Largest>().add(row * panels), panels) };
        Largest::first(largest)
    }

    /// Makes `rows` of what the next linear reads the rows of the step.
    fn move_input(&mut self, rows: Range<usize>) {
        let stride = self.sizes.input;
        if rows.start > 0 {
            self.input.bytes_mut().copy_within(rows.start * stride..rows.end * stride, 0);
        }
        self.rows = rows.len();
    }
}

impl Sizes {
    fn new(decoder: &Decoder, format: Format) -> Self {
        let whole = |width: usize| width.next_multiple_of(PANEL);
        let shared = decoder.mixture.as_ref().map_or(0, |mixture| mixture.shared);
        let intermediate = decoder.intermediate.max(shared);
        let narrow = decoder.latent.as_ref().and_then(|shape| shape.query_rank).unwrap_or(0);
        let (qkv, attended) = match &decoder.latent {
            Some(shape) => (decoder.query_dim(), decoder.heads * shape.value),
            None => (decoder.query_dim() + 2 * decoder.kv_dim(), decoder.query_dim()),
        };
        Self {
            format,
            hidden: decoder.hidden,
            residual: whole(decoder.hidden),
            qkv: whole(qkv),
            logits: whole(decoder.vocab_size),
            vocab: decoder.vocab_size,
            input: format.stride(decoder.hidden),
            attended: format.stride(attended),
            gated: format.stride(intermediate),
            // Of all encodings f32 take the most room.
            encoded: Format::F32.stride(decoder.hidden.max(attended).max(intermediate).max(narrow)),
            heads: decoder.heads,
            kv_heads: decoder.kv_heads,
            pairs: decoder.ropes[0].pairs(),
            interleaved_pairs: decoder.interleaved_pairs,
            norm: decoder.norm,
            norm_eps: decoder.norm_eps,
            whole_qk_norm: decoder.qk_norm == QkNorm::Whole,
            activation: decoder.activation,
            logit_scale: decoder.logit_scale,
            logit_cap: decoder.logit_cap,
            attention: match &decoder.latent {
                Some(shape) => AttentionShape::latent(decoder.heads, shape, decoder.score_scale),
                None => AttentionShape {
                    group: decoder.heads / decoder.kv_heads,
                    head_dim: decoder.head_dim,
                    value_dim: decoder.head_dim,
                    latent: false,
                    scale: decoder.score_scale,
                    cap: decoder.score_cap,
                },
            },
        }
    }
}

fn lock(scratch: &Mutex<Buffer>) -> MutexGuard<'_, Buffer> {
    // Scratch holds nothing between tasks, so one that panicked leaves nothing to distrust.
    scratch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The start of a buffer that tasks of one job share, each with parts of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: only an address; whoever reads or writes through it vouches for the part it uses.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// Rows that tasks of one job write or add to, each with rows of its own.
struct SharedNormOutput(NormOutput);

// SAFETY: only an address, as for `Shared`.
unsafe impl Sync for SharedNormOutput {}

impl SharedNormOutput {
    fn row(&self, row: usize) -> NormOutput {
        match self.0 {
            NormOutput::Store { to, stride, format } => {
                NormOutput::Store { to: to.wrapping_add(row * stride), stride, format }
            }
            NormOutput::Add { to, stride } => NormOutput::Add { to: to.wrapping_add(row * stride), stride },
        }
    }
}
