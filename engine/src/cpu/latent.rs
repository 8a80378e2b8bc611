//! Latent attention (`model::latent` has the idea): from the residual stream to latents in pages and queries that meet them,
//! and from attended latents back to values.
//!
//! ```text
//! latent_entry  input              -> entry          one linear: queries, or what makes them; latent; shared key
//! latent_write  entry              -> pages          latent normed, key turned
//! latent_query  entry              -> qkv            queries turned and taken to the space of latents, head by head
//! attend        qkv, pages         -> latents        one key/value head
//! latent_value  latents            -> attended       head by head
//! ```

use super::{
    Angles, Cpu, Deltas, Operand, Shared, SharedOutput, Sizes,
    buffer::Buffer,
    format::Format,
    linear::{LinearTask, Output, TASK_PANELS, TASK_ROWS},
    lock,
    norm::norm_head,
    packed::PANEL,
    pages::{LayerPages, Slot},
    rotary::turn,
    simd::Simd,
};
use crate::{
    Error, KvMemory,
    model::{
        decoder::NormKind,
        latent::{LatentShape, NORM_EPS},
        weights::{Latent, Linear, LowRank},
    },
};

/// Tokens of one task of a row-wise operation.
const CHUNK: usize = 16;

/// What latent attention works in.
#[derive(Debug)]
pub(super) struct LatentBuffers {
    shape: LatentShape,
    heads: usize,
    /// `[rows][heads * query or query_rank][rank + rope]` f32.
    entry: Buffer,
    /// `[rows][query_rank]`, format of the weights.
    narrow: Buffer,
    /// `[rows][heads][plain + rope]` f32, where it does not stand in `entry`.
    queries: Buffer,
    /// `[rows][heads][plain]`, format of the weights.
    plain: Buffer,
    /// `[rows][heads][rank]`, format of the weights: what attention leaves.
    latents: Buffer,
    strides: Strides,
}

/// From row to row: f32 of f32 buffers, bytes of the others.
#[derive(Clone, Copy, Debug)]
struct Strides {
    entry: usize,
    narrow: usize,
    queries: usize,
    plain: usize,
    latents: usize,
}

impl LatentBuffers {
    /// Reserves buffers for steps of up to `tokens` tokens.
    pub(super) fn new(shape: &LatentShape, sizes: &Sizes, tokens: usize) -> Result<Self, Error> {
        let (heads, format) = (sizes.heads, sizes.format);
        let queries = heads * shape.query();
        let whole = |width: usize| width.next_multiple_of(PANEL);
        let strides = Strides {
            entry: whole(shape.query_rank.unwrap_or(queries) + shape.key()),
            narrow: format.stride(shape.query_rank.unwrap_or(0)),
            queries: if shape.query_rank.is_some() { whole(queries) } else { 0 },
            plain: format.stride(heads * shape.plain),
            latents: format.stride(heads * shape.rank),
        };
        // The tile unit reads inputs of linears in whole tiles.
        let whole_tiles = tokens.next_multiple_of(16);
        Ok(Self {
            shape: shape.clone(),
            heads,
            entry: Buffer::new(tokens * strides.entry * 4)?,
            narrow: Buffer::new(whole_tiles * strides.narrow)?,
            queries: Buffer::new(tokens * strides.queries * 4)?,
            plain: Buffer::new(whole_tiles * strides.plain)?,
            latents: Buffer::new(whole_tiles * strides.latents)?,
            strides,
        })
    }

    /// Moves row `row` to row `to`, which comes before it.
    pub(super) fn keep(&mut self, row: usize, to: usize) {
        let stride = self.strides.entry;
        self.entry.floats_mut().copy_within(row * stride..(row + 1) * stride, to * stride);
    }

    /// Returns what queries are made from, where that is not the residual stream, and the bytes from row to row.
    pub(super) fn narrow(&self) -> (&Buffer, usize) {
        (&self.narrow, self.strides.narrow)
    }

    /// Returns where attention leaves its latents, and the bytes from row to row.
    pub(super) fn output(&mut self) -> (*mut u8, usize) {
        (self.latents.as_mut_ptr(), self.strides.latents)
    }
}

impl Cpu {
    /// Computes what queries, latents and shared keys are made from.
    pub(crate) fn latent_entry(&mut self, linear: &Linear) {
        let buffers = self.latent.as_mut().expect(PRESENT);
        let to = Output::Store { to: buffers.entry.as_mut_ptr().cast(), stride: buffers.strides.entry };
        self.linear(linear, Operand::Input, to, Deltas::NONE);
    }

    /// Norms latents, turns shared keys by rope `rope`, and writes both to the pages of layer `layer`.
    pub(crate) fn latent_write(&mut self, weights: &Latent, rope: usize, memory: &KvMemory, layer: usize) {
        let buffers = self.latent.as_mut().expect(PRESENT);
        let (shape, stride) = (&buffers.shape, buffers.strides.entry);
        let before = shape.query_rank.unwrap_or(buffers.heads * shape.query());
        let (pairs, key) = (self.sizes.pairs, shape.key());
        let from = Shared(buffers.entry.as_mut_ptr().cast::<f32>());
        let (slots, Angles { cos, sin, .. }) = (&self.slots, &self.angles[rope]);
        let (run, pages) = (self.kernels.latent, LayerPages::new(memory, layer));
        self.pool.run(slots.len().div_ceil(CHUNK), &|chunk, _| {
            let tokens = chunk * CHUNK..slots.len().min((chunk + 1) * CHUNK);
            let angles = tokens.start * pairs..tokens.end * pairs;
            let task = LatentTask::Write {
                from: Rows { first: from.at(tokens.start * stride + before), stride, width: key },
                norm: &weights.norm,
                cos: &cos[angles.clone()],
                sin: &sin[angles],
                slots: &slots[tokens],
                pages,
            };
            // SAFETY: the rows lie in the buffer; slots were checked against the pool when the step began, and each token's
            // slot is written by its own task alone.
            unsafe { run(&task) };
        });
    }

    /// Makes the queries of all rows, turns them, and takes them to the space of latents.
    pub(crate) fn latent_query(&mut self, weights: &Latent, rope: usize) {
        if let Some(LowRank { norm, up }) = &weights.query {
            self.latent_narrow(norm);
            let buffers = self.latent.as_mut().expect(PRESENT);
            let to = Output::Store { to: buffers.queries.as_mut_ptr().cast(), stride: buffers.strides.queries };
            self.linear(up, Operand::Narrow, to, Deltas::NONE);
        }
        self.split_queries(rope);

        let buffers = self.latent.as_mut().expect(PRESENT);
        let (shape, strides) = (buffers.shape.clone(), buffers.strides);
        let input = HeadInput { first: buffers.plain.as_ptr(), stride: strides.plain, head: shape.plain };
        let to = Output::Cast {
            to: self.qkv.as_mut_ptr(),
            stride: self.sizes.qkv * 4,
            format: Format::F32,
            columns: shape.rank,
        };
        self.linear_by_head(&weights.key, input, to, shape.key());
    }

    /// Makes values of what was attended.
    pub(crate) fn latent_value(&mut self, weights: &Latent) {
        let buffers = self.latent.as_mut().expect(PRESENT);
        let (shape, strides) = (buffers.shape.clone(), buffers.strides);
        let input = HeadInput { first: buffers.latents.as_ptr(), stride: strides.latents, head: shape.rank };
        let (to, stride) = (self.attended.as_mut_ptr(), self.sizes.attended);
        let to = Output::Cast { to, stride, format: self.sizes.format, columns: shape.value };
        self.linear_by_head(&weights.value, input, to, shape.value);
    }

    /// Norms what queries are made from.
    fn latent_narrow(&mut self, norm: &[f32]) {
        let buffers = self.latent.as_mut().expect(PRESENT);
        let (rows, strides) = (self.rows, buffers.strides);
        let from = Shared(buffers.entry.as_mut_ptr().cast::<f32>());
        let to = Shared(buffers.narrow.as_mut_ptr());
        let (run, format) = (self.kernels.latent, self.sizes.format);
        self.pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
            let first = chunk * CHUNK;
            let task = LatentTask::Norm {
                from: Rows { first: from.at(first * strides.entry), stride: strides.entry, width: norm.len() },
                rows: CHUNK.min(rows - first),
                norm,
                to: to.at(first * strides.narrow),
                to_stride: strides.narrow,
                format,
            };
            // SAFETY: the rows lie in both buffers and belong to this task.
            unsafe { run(&task) };
        });
    }

    /// Parts every query: what meets the latent becomes the input of a linear, and what is turned goes to its place.
    fn split_queries(&mut self, rope: usize) {
        let buffers = self.latent.as_mut().expect(PRESENT);
        let (rows, strides, heads) = (self.rows, buffers.strides, buffers.heads);
        let shape = &buffers.shape;
        let (from, stride) = match shape.query_rank {
            Some(_) => (&mut buffers.queries, strides.queries),
            None => (&mut buffers.entry, strides.entry),
        };
        let (from, plain) = (Shared(from.as_mut_ptr().cast::<f32>()), Shared(buffers.plain.as_mut_ptr()));
        let (turned, turned_stride) = (Shared(self.qkv.as_mut_ptr().cast::<f32>()), self.sizes.qkv);
        let (Angles { cos, sin, .. }, pairs) = (&self.angles[rope], self.sizes.pairs);
        let (run, format) = (self.kernels.latent, self.sizes.format);
        self.pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
            let tokens = chunk * CHUNK..rows.min((chunk + 1) * CHUNK);
            let angles = tokens.start * pairs..tokens.end * pairs;
            let task = LatentTask::Split {
                from: Rows { first: from.at(tokens.start * stride), stride, width: heads * shape.query() },
                rows: tokens.len(),
                shape,
                cos: &cos[angles.clone()],
                sin: &sin[angles],
                plain: plain.at(tokens.start * strides.plain),
                plain_stride: strides.plain,
                format,
                turned: turned.at(tokens.start * turned_stride),
                turned_stride,
            };
            // SAFETY: the rows lie in all three buffers and belong to this task.
            unsafe { run(&task) };
        });
    }

    /// Multiplies each head's part of all rows by its own panels of `linear`; a head's outputs stand `each` elements after those
    /// of the one before, from `output`, an [`Output::Cast`], on.
    fn linear_by_head(&mut self, linear: &Linear, input: HeadInput, output: Output, each: usize) {
        let Output::Cast { to, stride, format, columns } = output else { unreachable!("heads are not whole panels") };
        let (rows, heads, input_format) = (self.rows, self.heads(), self.sizes.format);
        let (weights, scratch) = (&linear.packed, &self.scratch);
        let run = self.kernels.linear_of_floats(weights, self.sizes.format);
        let panels = weights.panels() / heads;
        let run_panels = (panels * heads).div_ceil(4 * self.pool.threads()).clamp(1, TASK_PANELS.min(panels));
        let (runs, row_blocks) = (panels.div_ceil(run_panels), rows.div_ceil(TASK_ROWS));
        let (first, to) = (Shared(input.first.cast_mut()), Shared(to));
        self.pool.run(heads * row_blocks * runs, &|index, thread| {
            let (head, index) = (index / (row_blocks * runs), index % (row_blocks * runs));
            let (row, panel) = (index % row_blocks * TASK_ROWS, index / row_blocks * run_panels);
            let to = to.at(head * each * format.bytes());
            let output = SharedOutput(Output::Cast { to, stride, format, columns });
            let task = LinearTask {
                input: first.at(row * input.stride + head * input.head * input_format.bytes()),
                input_stride: input.stride,
                rows: TASK_ROWS.min(rows - row),
                depth: weights.depth(),
                panel: weights.panel(head * panels + panel),
                panel_bytes: weights.panel_bytes(),
                panels: run_panels.min(panels - panel),
                groups: weights.groups(),
                bias: None,
                adapted: None,
                output: output.part(row, panel),
            };
            // SAFETY: buffers hold `rows` rows of all heads, what is read beyond a head is its neighbour or padding, and every
            // task has its own rows and columns.
            unsafe { run(&task, lock(&scratch[thread]).floats_mut()) };
        });
    }

    fn heads(&self) -> usize {
        self.latent.as_ref().expect(PRESENT).heads
    }
}

const PRESENT: &str = "a model with latent attention has buffers for it";

/// Inputs of a linear, head by head.
#[derive(Clone, Copy)]
struct HeadInput {
    first: *const u8,
    /// Bytes from row to row.
    stride: usize,
    /// Elements from head to head.
    head: usize,
}

/// Some rows of f32, changed in place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: *mut f32,
    /// f32 from row to row.
    pub(crate) stride: usize,
    /// Elements of a row that matter.
    pub(crate) width: usize,
}

impl Rows {
    /// # Safety
    /// The row is there and nobody else touches it while the slice lives.
    #[inline(always)]
    unsafe fn row<'a>(self, row: usize) -> &'a mut [f32] {
        // SAFETY: the caller vouches for it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.width) }
    }
}

/// Some tokens of a step on their way into attention.
#[derive(Debug)]
pub(crate) enum LatentTask<'a> {
    /// Norms rows and writes them as inputs of a linear, `[rows][width]`.
    Norm { from: Rows, rows: usize, norm: &'a [f32], to: *mut u8, to_stride: usize, format: Format },
    /// Norms the latents `[norm.len()]` of rows, turns the keys that follow them, and writes both to pages.
    Write { from: Rows, norm: &'a [f32], cos: &'a [f32], sin: &'a [f32], slots: &'a [Slot], pages: LayerPages },
    /// Parts queries `[heads][plain + rope]`: the plain parts become inputs of a linear, `[heads][plain]`; the others are turned
    /// and go to `turned`, `[heads][rank + rope]`, behind the latents.
    Split {
        from: Rows,
        rows: usize,
        shape: &'a LatentShape,
        cos: &'a [f32],
        sin: &'a [f32],
        plain: *mut u8,
        plain_stride: usize,
        format: Format,
        turned: *mut f32,
        turned_stride: usize,
    },
}

/// Computes a task.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, every slot lies in the pool, and nobody else
/// touches the rows or the slots.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &LatentTask<'_>) {
    match *task {
        LatentTask::Norm { from, rows, norm, to, to_stride, format } => {
            for row in 0..rows {
                // SAFETY: the row and its output are the caller's word.
                unsafe {
                    let values = from.row(row);
                    norm_head(NormKind::Rms, values, norm, NORM_EPS);
                    format.store_slice(simd, to.add(row * to_stride), 0, values);
                }
            }
        }
        LatentTask::Write { from, norm, cos, sin, slots, ref pages } => {
            let pairs = (from.width - norm.len()) / 2;
            for (row, slot) in slots.iter().enumerate() {
                // SAFETY: the row and the slot are the caller's word.
                unsafe {
                    let values = from.row(row);
                    let (latent, key) = values.split_at_mut(norm.len());
                    norm_head(NormKind::Rms, latent, norm, NORM_EPS);
                    turn(key, &cos[row * pairs..][..pairs], &sin[row * pairs..][..pairs], true);
                    pages.keys.write(simd, *slot, 0, values);
                }
            }
        }
        LatentTask::Split { from, rows, shape, cos, sin, plain, plain_stride, format, turned, turned_stride } => {
            let pairs = shape.rope / 2;
            for row in 0..rows {
                // SAFETY: the row, its input of the linear and its query are the caller's word.
                unsafe {
                    let turned =
                        Rows { first: turned, stride: turned_stride, width: from.width / shape.query() * shape.key() };
                    let queries = from.row(row).chunks_exact_mut(shape.query());
                    let turned = turned.row(row).chunks_exact_mut(shape.key());
                    for (head, (query, turned)) in queries.zip(turned).enumerate() {
                        let (straight, rotated) = query.split_at_mut(shape.plain);
                        format.store_slice(simd, plain.add(row * plain_stride), head * shape.plain, straight);
                        turn(rotated, &cos[row * pairs..][..pairs], &sin[row * pairs..][..pairs], true);
                        turned[shape.rank..].copy_from_slice(rotated);
                    }
                }
            }
        }
    }
}
