//! The processor as a home for a model: the few fused operations a step is made of, over buffers that are allocated once.
//!
//! This is the engine's narrow waist. [`Cpu`] is what another home would look like too: [`Cpu::begin`] takes the tokens of a
//! step, and each operation works on the buffers it names.
//!
//! ```text
//! embed            tokens            -> residual
//! norm             residual          -> input
//! qkv              input             -> qkv          one linear for q, k and v
//! rotate_and_write qkv               -> qkv, pages   turned; k and v to their pages
//! attend           qkv, pages        -> attended
//! output           attended          +> residual
//! gate_up          input             -> gated        one linear, silu(gate) * up on the way out
//! down             gated             +> residual
//! keep_sampled     residual, qkv                     after the last pages are written only sampled rows go on
//! logits           input             -> logits
//! ```

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod format;
pub(crate) mod kernels;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod pool;
pub(crate) mod rotary;
pub(crate) mod simd;

use crate::{
    Error, KvMemory,
    model::{
        decoder::Decoder,
        weights::{Layer, Linear, Weights},
    },
};
use attention::{AttentionShape, AttentionTask};
use buffer::Buffer;
use format::Format;
use kernels::Kernels;
use kv_cache::{PageId, TokenId};
use linear::{FEW_ROWS, LinearTask, Output, TASK_PANELS, TASK_ROWS};
use norm::NormTask;
use packed::PANEL;
use pool::Pool;
use rotary::{LayerPages, RotaryTask, Slot};
use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Multiply-adds below which waking other threads costs more than it saves.
const ALONE: usize = 1 << 16;
/// Tokens of one task of a row-wise operation.
const CHUNK: usize = 16;

/// The tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    /// First row of the step.
    pub(crate) first: usize,
    /// Rows.
    pub(crate) tokens: usize,
    /// Position of the first token.
    pub(crate) start: usize,
    /// The sequence's pages.
    pub(crate) pages: &'a [PageId],
}

impl Span<'_> {
    /// Returns the row of the last token.
    pub(crate) fn last(&self) -> usize {
        self.first + self.tokens - 1
    }
}

/// What the head made of the sampled rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits<'a> {
    floats: &'a [f32],
    stride: usize,
}

impl<'a> Logits<'a> {
    /// Returns a row: `[vocab]` and zeros up to a whole panel.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.floats[row * self.stride..][..self.stride]
    }
}

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
    /// `[sampled rows][vocab]` f32.
    logits: Buffer,
    /// `[rows][head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    slots: Vec<Slot>,
    /// States of attention parts that are computed apart; grows to what the longest sequence needs.
    parts: Vec<f32>,
    /// One for each thread.
    scratch: Vec<Mutex<Buffer>>,
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
    /// Bytes from row to row.
    input: usize,
    attended: usize,
    gated: usize,
    heads: usize,
    kv_heads: usize,
    pairs: usize,
    norm_eps: f32,
    attention: AttentionShape,
}

impl Cpu {
    /// Starts `threads` threads and reserves buffers for steps of up to `tokens` tokens of which up to `samples` are sampled.
    ///
    /// `dtype_format` is how inputs of the model's linears are stored, from [`Kernels::format`].
    pub(crate) fn new(
        kernels: &'static Kernels,
        decoder: &Decoder,
        dtype_format: Format,
        threads: usize,
        tokens: usize,
        samples: usize,
    ) -> Result<Self, Error> {
        let sizes = Sizes::new(decoder, dtype_format);
        // The tile unit reads inputs of linears in whole tiles.
        let whole_tiles = tokens.next_multiple_of(16);
        let scratch_bytes = 4 * linear::SCRATCH.max(sizes.attention.scratch_floats());
        let scratch = (0..threads).map(|_| Buffer::new(scratch_bytes).map(Mutex::new));
        Ok(Self {
            kernels,
            pool: Pool::new(threads)?,
            rows: 0,
            residual: Buffer::new(tokens * sizes.residual * 4)?,
            input: Buffer::new(whole_tiles * sizes.input)?,
            qkv: Buffer::new(tokens * sizes.qkv * 4)?,
            attended: Buffer::new(whole_tiles * sizes.attended)?,
            gated: Buffer::new(whole_tiles * sizes.gated)?,
            logits: Buffer::new(samples * sizes.logits * 4)?,
            cos: vec![0.0; tokens * sizes.pairs],
            sin: vec![0.0; tokens * sizes.pairs],
            slots: Vec::with_capacity(tokens),
            parts: Vec::new(),
            scratch: scratch.collect::<Result<_, _>>()?,
            sizes,
        })
    }

    /// Returns the instruction set in use.
    pub(crate) fn isa(&self) -> &'static str {
        self.kernels.name
    }

    /// Starts a step: computes angles and slots of all rows.
    pub(crate) fn begin(&mut self, decoder: &Decoder, spans: &[Span<'_>], page_tokens: usize) {
        self.rows = spans.iter().map(|span| span.tokens).sum();
        self.slots.clear();
        let pairs = self.sizes.pairs;
        let angles = self.cos.chunks_exact_mut(pairs).zip(self.sin.chunks_exact_mut(pairs));
        let positions = spans.iter().flat_map(|span| (span.start..span.start + span.tokens).map(|at| (at, span.pages)));
        for ((position, pages), (cos, sin)) in positions.zip(angles) {
            decoder.rope.angles(position as u32, cos, sin);
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

    /// Norms the residual into the input of the next linear.
    pub(crate) fn norm(&mut self, weight: &[f32]) {
        let sizes = &self.sizes;
        let (from, to) = (Shared(self.residual.as_mut_ptr().cast::<f32>()), Shared(self.input.as_mut_ptr()));
        let rows = self.rows;
        let run = self.kernels.norm;
        self.pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
            let first = chunk * CHUNK;
            let task = NormTask {
                from: from.at(first * sizes.residual),
                from_stride: sizes.residual,
                to: to.at(first * sizes.input),
                to_stride: sizes.input,
                format: sizes.format,
                rows: CHUNK.min(rows - first),
                width: sizes.hidden,
                weight,
                eps: sizes.norm_eps,
            };
            // SAFETY: the rows lie in both buffers, which were sized for them, and belong to this task.
            unsafe { run(&task) };
        });
    }

    /// Computes q, k and v.
    pub(crate) fn qkv(&mut self, linear: &Linear) {
        let to = Output::Store { to: self.qkv.as_mut_ptr().cast(), stride: self.sizes.qkv };
        self.linear(linear, Operand::Input, to);
    }

    /// Norms and turns q and k, and writes k and v to the pages of layer `layer`.
    pub(crate) fn rotate_and_write(&mut self, weights: &Layer, memory: &KvMemory, layer: usize) {
        let sizes = &self.sizes;
        let pages = layer_pages(memory, layer);
        let qkv = Shared(self.qkv.as_mut_ptr().cast::<f32>());
        let (slots, cos, sin) = (&self.slots, &self.cos, &self.sin);
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
                heads: sizes.heads,
                kv_heads: sizes.kv_heads,
                norms: weights.head_norms.as_ref().map(|(q, k)| (&q[..], &k[..])),
                eps: sizes.norm_eps,
                pages,
            };
            // SAFETY: the rows lie in the buffer; slots were checked against the pool when the step began, and each token's
            // slot is written by its own task alone.
            unsafe { run(&task) };
        });
    }

    /// Attends over the pages of layer `layer`; rows of `spans` are those of the step.
    pub(crate) fn attend(&mut self, spans: &[Span<'_>], window: Option<usize>, memory: &KvMemory, layer: usize) {
        let pages = layer_pages(memory, layer);
        let q = Shared(self.qkv.as_mut_ptr().cast::<f32>());
        let attended = Shared(self.attended.as_mut_ptr());
        let sizes = &self.sizes;
        let shape = sizes.attention;
        let each = shape.task_tokens();
        // Later tokens of a prompt see more: tasks go from the back so that the longest start first.
        let tiles = |span: &Span<'_>| span.tokens.div_ceil(each);
        let total: usize = spans.iter().map(tiles).sum::<usize>() * sizes.kv_heads;
        let task = |index: usize| {
            let kv_head = index % sizes.kv_heads;
            let mut tile = index / sizes.kv_heads;
            let span = spans.iter().find(|span| {
                let here = tiles(span);
                if tile >= here {
                    tile -= here;
                    return false;
                }
                true
            });
            let span = span.expect("the index is below the number of tiles");
            let first = (tiles(span) - 1 - tile) * each;
            let row = span.first + first;
            AttentionTask {
                shape,
                q: q.at(row * sizes.qkv + kv_head * shape.group * shape.head_dim),
                q_stride: sizes.qkv,
                tokens: each.min(span.tokens - first),
                start: span.start + first,
                window,
                table: span.pages,
                pages,
                kv_head,
                output: attended.at(row * sizes.attended),
                output_stride: sizes.attended,
                output_index: kv_head * shape.group * shape.head_dim,
                format: sizes.format,
            }
        };
        let (scratch, kernels) = (&self.scratch, self.kernels);
        let pieces = if total < 2 * self.pool.threads() { pieces(total, &task) } else { Vec::new() };
        if pieces.len() <= total {
            self.pool.run(total, &|index, thread| {
                // SAFETY: rows lie in the buffers, pages were checked when the step began and their contents are final for
                // this layer, and every task has its own outputs.
                unsafe { (kernels.attention)(&task(index), lock(&scratch[thread]).floats_mut()) };
            });
            return;
        }

        // Fewer tasks than threads could take, and long sequences: their parts are computed apart.
        let floats = pieces.iter().map(|piece| piece.floats.end).max().unwrap_or(0);
        if self.parts.len() < floats {
            self.parts.resize(floats, 0.0);
        }
        let parts = Shared(self.parts.as_mut_ptr());
        self.pool.run(pieces.len(), &|index, thread| {
            let piece = &pieces[index];
            // SAFETY: as above, and every piece has its own floats.
            unsafe {
                let out = std::slice::from_raw_parts_mut(parts.at(piece.floats.start), piece.floats.len());
                (kernels.attention_part)(&task(piece.task), piece.part, out, lock(&scratch[thread]).floats_mut());
            }
        });
        self.pool.run(total, &|index, thread| {
            let mut own = pieces.iter().filter(|piece| piece.task == index).map(|piece| &piece.floats);
            let first = own.next().expect("a task has a part");
            let last = own.next_back().unwrap_or(first);
            // SAFETY: as above; the pieces of a task follow each other and are complete.
            unsafe {
                let states = std::slice::from_raw_parts_mut(parts.at(first.start), last.end - first.start);
                (kernels.attention_merge)(&task(index), states, lock(&scratch[thread]).floats_mut());
            }
        });
    }

    /// Adds the attention's output projection to the residual.
    pub(crate) fn output(&mut self, linear: &Linear) {
        let to = Output::Add { to: self.residual.as_mut_ptr().cast(), stride: self.sizes.residual };
        self.linear(linear, Operand::Attended, to);
    }

    /// Computes `silu(gate) * up`.
    pub(crate) fn gate_up(&mut self, linear: &Linear) {
        let to = Output::Gate { to: self.gated.as_mut_ptr(), stride: self.sizes.gated, format: self.sizes.format };
        self.linear(linear, Operand::Input, to);
    }

    /// Adds the down projection to the residual.
    pub(crate) fn down(&mut self, linear: &Linear) {
        let to = Output::Add { to: self.residual.as_mut_ptr().cast(), stride: self.sizes.residual };
        self.linear(linear, Operand::Gated, to);
    }

    /// Moves `rows`, in ascending order, to the front of the residual and of q, and forgets all others.
    pub(crate) fn keep(&mut self, rows: impl Iterator<Item = usize>) {
        let (residual, qkv) = (self.sizes.residual, self.sizes.qkv);
        let mut kept = 0;
        for row in rows {
            assert!(row >= kept && row < self.rows, "row {row} of {}", self.rows);
            self.residual.floats_mut().copy_within(row * residual..(row + 1) * residual, kept * residual);
            self.qkv.floats_mut().copy_within(row * qkv..(row + 1) * qkv, kept * qkv);
            kept += 1;
        }
        self.rows = kept;
    }

    /// Computes the logits of all rows.
    pub(crate) fn compute_logits(&mut self, head: &Linear) {
        let to = Output::Store { to: self.logits.as_mut_ptr().cast(), stride: self.sizes.logits };
        self.linear(head, Operand::Input, to);
    }

    /// Returns the logits of all rows.
    pub(crate) fn logits(&self) -> Logits<'_> {
        Logits { floats: self.logits.floats(), stride: self.sizes.logits }
    }

    /// Returns the threads, and the logits for them to work on.
    pub(crate) fn pool_and_logits(&mut self) -> (&mut Pool, Logits<'_>) {
        (&mut self.pool, Logits { floats: self.logits.floats(), stride: self.sizes.logits })
    }

    /// Multiplies all rows of an operand by `linear`.
    fn linear(&mut self, linear: &Linear, operand: Operand, output: Output) {
        let (buffer, input_stride) = match operand {
            Operand::Input => (&self.input, self.sizes.input),
            Operand::Attended => (&self.attended, self.sizes.attended),
            Operand::Gated => (&self.gated, self.sizes.gated),
        };
        let input = Shared(buffer.as_ptr().cast_mut());
        let weights = &linear.packed;
        let (rows, panels, depth) = (self.rows, weights.panels(), weights.depth());
        let run = self.kernels.linear(weights.dtype());

        let row_blocks = rows.div_ceil(TASK_ROWS).max(1);
        // A multiple of the full tiles of all units, so that blocks do not end in short ones and start on whole ones.
        let block_rows = rows.div_ceil(row_blocks).next_multiple_of(96).min(TASK_ROWS);
        // Few rows are a stream of weights: each task reads a long run of it. Many rows share a few panels while they are in
        // cache. Either way there are some tasks for each thread, so that the last one is not waited for long.
        let most = if rows <= FEW_ROWS { 16 } else { TASK_PANELS };
        let run_panels = (panels * row_blocks).div_ceil(4 * self.pool.threads()).clamp(1, most);
        let runs = panels.div_ceil(run_panels);
        let output = SharedOutput(output);
        let scratch = &self.scratch;
        let body = |index: usize, thread: usize| {
            let (row, panel) = (index % row_blocks * block_rows, index / row_blocks * run_panels);
            let task = LinearTask {
                input: input.at(row * input_stride),
                input_stride,
                rows: block_rows.min(rows - row),
                depth,
                panel: weights.panel(panel),
                panel_bytes: weights.panel_bytes(),
                panels: run_panels.min(panels - panel),
                bias: linear.bias.as_ref().map(|bias| &bias[panel..]),
                output: output.part(row, panel),
            };
            // SAFETY: buffers hold `rows` rows of whole panels, and every task has its own rows and columns.
            unsafe { run(&task, lock(&scratch[thread]).floats_mut()) };
        };
        if rows * depth * panels * PANEL < ALONE {
            (0..runs * row_blocks).for_each(|index| body(index, 0));
        } else {
            self.pool.run(runs * row_blocks, &body);
        }
    }
}

/// One part of an attention task, computed apart.
#[derive(Debug)]
struct Piece {
    task: usize,
    part: usize,
    /// Its state in [`Cpu::parts`].
    floats: Range<usize>,
}

/// Lists the parts of `tasks` tasks, task by task.
fn pieces<'a>(tasks: usize, task: &dyn Fn(usize) -> AttentionTask<'a>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut floats = 0;
    for index in 0..tasks {
        let task = task(index);
        for part in task.parts() {
            let end = floats + task.state_floats();
            pieces.push(Piece { task: index, part, floats: floats..end });
            floats = end;
        }
    }
    pieces
}

/// Which buffer a linear reads.
#[derive(Clone, Copy, Debug)]
enum Operand {
    Input,
    Attended,
    Gated,
}

impl Sizes {
    fn new(decoder: &Decoder, format: Format) -> Self {
        let whole = |width: usize| width.next_multiple_of(PANEL);
        Self {
            format,
            hidden: decoder.hidden,
            residual: whole(decoder.hidden),
            qkv: whole(decoder.query_dim() + 2 * decoder.kv_dim()),
            logits: whole(decoder.vocab_size),
            input: format.stride(decoder.hidden),
            attended: format.stride(decoder.query_dim()),
            gated: format.stride(decoder.intermediate),
            heads: decoder.heads,
            kv_heads: decoder.kv_heads,
            pairs: decoder.rope.pairs(),
            norm_eps: decoder.norm_eps,
            attention: AttentionShape {
                group: decoder.heads / decoder.kv_heads,
                head_dim: decoder.head_dim,
                scale: 1.0 / (decoder.head_dim as f32).sqrt(),
            },
        }
    }
}

/// Returns where layer `layer` of the pool lies.
fn layer_pages(memory: &KvMemory, layer: usize) -> LayerPages {
    let layout = memory.layout();
    let offset = layout.block_offset(layer as u32, PageId(0));
    LayerPages {
        // SAFETY: `block_offset` checked that the layer lies in the pool.
        base: unsafe { memory.as_mut_ptr().add(offset) },
        block_bytes: layout.block_bytes(),
        key_bytes: layout.key_bytes(),
        page_tokens: layout.page_tokens as usize,
        head_dim: layout.key_dim as usize,
        format: layout.dtype.into(),
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

/// An output that tasks of one job share, each with rows and columns of its own.
struct SharedOutput(Output);

// SAFETY: only an address, as for `Shared`.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    fn part(&self, row: usize, panel: usize) -> Output {
        self.0.part(row, panel)
    }
}
