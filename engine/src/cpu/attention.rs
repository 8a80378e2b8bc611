//! Attention over pages: two linears whose weights are the cache, and a softmax between them.
//!
//! Positions are cut at fixed places, whatever the batch: into *parts* of 512 and those into *blocks* of 64, the columns of a
//! panel. A block's keys and values are brought into panels ([`panels`]) and meet all rows of a task in the register tiles of
//! [`super::linear`]: scores are queries times keys, and outputs add probabilities times values. Within a part the softmax runs
//! online over its blocks (arXiv 2205.14135); parts are merged from first to last. All cuts are counted from position 0, so a
//! query's bits depend on its position and its window alone: not on the chunk it is computed in, not on its neighbours, not on
//! whether parts were computed by one thread or by several.
//!
//! A task holds queries of one sequence that share a key/value head: the heads of a group for one or several tokens. Many rows
//! pay little for a block's panels; one token's rows are as fast as memory gives its keys and values, of which the next block's
//! are asked for while one is brought in. Scores are in units of log2.
//!
//! Precision: where pages hold bf16, or codes that bf16 holds exactly, queries and probabilities are rounded to bf16 as inputs
//! of bf16 weights are; a token's scale multiplies its scores, and its probabilities before they are rounded. What is divided by
//! is the sum of rounded probabilities, so that rounding them does not make their sum other than one. With f32 and f16 pages
//! everything stays f32.
//!
//! What a query must not see has probability 0 and is still multiplied where a neighbour sees it: harmless, because
//! everything up to the last token of a task is finite.

use super::{
    format::Format,
    linear::{
        Block,
        floats::F32,
        tiled::{Columns, Tiled},
    },
    packed::{Groups, PANEL},
    pages::LayerPages,
    simd::{Simd, exp2, tanh},
};
use crate::model::latent::LatentShape;
use kv_cache::PageId;
use panels::{EachStep, Elements, Panels, Upcoming, Woven};
use std::ops::Range;

mod panels;

/// Positions that are merged online before a part's result is final.
const PART: usize = 512;
/// Positions whose scores are computed at once: the columns of a panel.
const BLOCK: usize = PANEL;
/// Lanes kept of a row's sum of probabilities; a vector of the widest unit, others leave the last ones zero.
const SUM_LANES: usize = 16;
/// How far scores may rise above a row's reference, in units of log2, before it follows them: often enough the first block's
/// maximum serves for all, and sums of up to `PART * 2^HEADROOM` are as exact as others.
const HEADROOM: f32 = 8.0;
/// Queries of a task, over tokens and heads, unless one group has more.
const TASK_ROWS: usize = 96;
/// Rows that go from queries to outputs before the next: whole register tiles whose scores stay in the first-level cache.
const STRIP: usize = 24;

/// Shape of attention, the same for all layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    /// Query heads that share a key/value head.
    pub(crate) group: usize,
    /// Elements of a head's query and key.
    pub(crate) head_dim: usize,
    /// Elements of a head's value; `head_dim` unless `latent`.
    pub(crate) value_dim: usize,
    /// A value is the first elements of its key, and not stored apart.
    pub(crate) latent: bool,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub(crate) cap: Option<f32>,
}

impl AttentionShape {
    /// Returns the shape of `heads` heads that share one latent, in groups that fit a task.
    pub(crate) fn latent(heads: usize, shape: &LatentShape, scale: f32) -> Self {
        let group = (1..=heads.min(TASK_ROWS)).rev().find(|group| heads.is_multiple_of(*group)).unwrap_or(1);
        Self { group, head_dim: shape.key(), value_dim: shape.rank, latent: true, scale, cap: None }
    }

    /// Returns the tokens of one task.
    pub(crate) fn task_tokens(&self) -> usize {
        (TASK_ROWS / self.group).max(1)
    }

    /// Elements of a query or key in scratch: whole panels.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(PANEL)
    }

    /// Elements of a value in scratch: whole panels.
    fn padded_value(&self) -> usize {
        self.value_dim.next_multiple_of(PANEL)
    }

    /// Returns the f32 that the state of `rows` queries takes: maxima, sums and weighted values.
    fn state_floats(&self, rows: usize) -> usize {
        rows.next_multiple_of(16) + rows * (SUM_LANES + self.padded_value())
    }

    /// Returns the f32 of scratch that a task needs.
    pub(crate) fn scratch_floats(&self) -> usize {
        let rows = self.task_tokens() * self.group;
        // The maxima of each key/value head begin a vector.
        2 * (self.state_floats(rows) + 16 * rows) + rows * self.padded_dim() + STRIP * BLOCK + Panels::floats(self)
    }
}

/// Some tokens of one sequence, and some key/value heads.
#[derive(Debug)]
pub(crate) struct AttentionTask<'a> {
    pub(crate) shape: AttentionShape,
    /// First token's first query head of the first group; heads follow each other.
    pub(crate) q: *const f32,
    /// f32 from token to token.
    pub(crate) q_stride: usize,
    /// At most [`AttentionShape::task_tokens`].
    pub(crate) tokens: usize,
    /// Position of the first token.
    pub(crate) start: usize,
    /// Positions seen, itself included; `None` = all.
    pub(crate) window: Option<usize>,
    /// The sequence's pages.
    pub(crate) table: &'a [PageId],
    pub(crate) pages: LayerPages,
    /// Each is shared by a group of heads. Blocks go by with all of them, one after the other: memory is read as it lies.
    pub(crate) kv_heads: Range<usize>,
    /// First token's first output of the first group, as a row of `format` and an element in it.
    pub(crate) output: *mut u8,
    pub(crate) output_stride: usize,
    pub(crate) output_index: usize,
    pub(crate) format: Format,
}

impl AttentionTask<'_> {
    /// Rows that meet one key/value head.
    fn rows(&self) -> usize {
        self.tokens * self.shape.group
    }

    /// Returns the f32 of the state that a part of the task leaves.
    pub(crate) fn state_floats(&self) -> usize {
        self.kv_heads.len() * self.head_floats()
    }

    /// f32 of the state of one key/value head.
    fn head_floats(&self) -> usize {
        self.shape.state_floats(self.rows())
    }

    /// First position that the token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        first_seen(position, self.window)
    }

    /// Returns the parts that hold what the task's tokens see.
    pub(crate) fn parts(&self) -> Range<usize> {
        parts(self.start, self.tokens, self.window)
    }
}

fn first_seen(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// Returns the parts that hold what `tokens` tokens from position `start` on see.
pub(crate) fn parts(start: usize, tokens: usize, window: Option<usize>) -> Range<usize> {
    first_seen(start, window) / PART..(start + tokens - 1) / PART + 1
}

/// Running softmax of some rows: `max[rows]`, `sum[rows][SUM_LANES]`, `values[padded_value / 64][rows][64]`.
struct State<'a> {
    /// What probabilities are relative to: about the largest score.
    max: &'a mut [f32],
    sum: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> State<'a> {
    fn over(floats: &'a mut [f32], rows: usize, shape: &AttentionShape) -> Self {
        let (max, rest) = floats.split_at_mut(rows.next_multiple_of(16));
        let (sum, values) = rest.split_at_mut(rows * SUM_LANES);
        Self { max: &mut max[..rows], sum, values: &mut values[..rows * shape.padded_value()] }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.values.fill(0.0);
    }

    /// Where row `row` has its values, panel by panel.
    #[inline(always)]
    fn row_panels(&self, row: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let stride = self.max.len() * PANEL;
        (row * PANEL..self.values.len()).step_by(stride).map(|at| at..at + PANEL)
    }
}

/// The states of a task's key/value heads in `floats`.
fn states<'a>(floats: &'a mut [f32], task: &AttentionTask<'_>) -> impl Iterator<Item = State<'a>> {
    let (rows, shape) = (task.rows(), task.shape);
    floats[..task.state_floats()].chunks_exact_mut(task.head_floats()).map(move |head| State::over(head, rows, &shape))
}

/// What a task works in.
struct Work<'a> {
    panels: Panels<'a>,
    /// `[kv_heads][rows][padded_dim]`, as the inputs of the pages' elements.
    q: &'a mut [f32],
    /// `[STRIP][BLOCK]`: scores, and in their place probabilities, as inputs from the start of each row on.
    scores: &'a mut [f32],
    upcoming: Upcoming,
}

/// Returns it, and what is left for the states of a part and of the whole.
fn split_scratch<'a>(task: &AttentionTask<'_>, scratch: &'a mut [f32]) -> (Work<'a>, &'a mut [f32], &'a mut [f32]) {
    let (panels, rest) = Panels::split(&task.shape, scratch);
    let (q, rest) = rest.split_at_mut(task.kv_heads.len() * task.rows() * task.shape.padded_dim());
    let (scores, rest) = rest.split_at_mut(STRIP * BLOCK);
    let (part, total) = rest.split_at_mut(task.state_floats());
    (Work { panels, q, scores, upcoming: Upcoming::new() }, part, total)
}

/// Computes a whole task; `W` is what bf16 meets its inputs as.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, the table's pages lie in the pool and cover the
/// tokens' positions, nobody writes what is read, and the outputs are ours.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, W: Elements<S>>(simd: S, task: &AttentionTask<'_>, scratch: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match task.pages.keys.fits_bf16() {
            true => run_as::<S, W>(simd, task, scratch),
            false => run_as::<S, F32>(simd, task, scratch),
        }
    }
}

#[inline(always)]
unsafe fn run_as<S: Simd, W: Elements<S>>(simd: S, task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let (mut work, part, total) = split_scratch(task, scratch);
    states(total, task).for_each(|mut total| total.clear());
    // SAFETY: passed on.
    unsafe {
        begin::<S, W>(simd, task, task.parts(), &mut work);
        for index in task.parts() {
            sum_part::<S, W>(simd, task, index, &mut work, part);
            for (mut total, part) in states(total, task).zip(part.chunks_exact(task.head_floats())) {
                merge(simd, &mut total, part);
            }
        }
        for (head, mut total) in states(total, task).enumerate() {
            finish(simd, task, head, &mut total);
        }
    }
}

/// Computes some parts of a task's positions and leaves their states in `out`, each [`AttentionTask::state_floats`] long.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(crate) unsafe fn run_parts<S: Simd, W: Elements<S>>(
    simd: S,
    task: &AttentionTask<'_>,
    parts: Range<usize>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    // SAFETY: passed on.
    unsafe {
        match task.pages.keys.fits_bf16() {
            true => run_parts_as::<S, W>(simd, task, parts, out, scratch),
            false => run_parts_as::<S, F32>(simd, task, parts, out, scratch),
        }
    }
}

#[inline(always)]
unsafe fn run_parts_as<S: Simd, W: Elements<S>>(
    simd: S,
    task: &AttentionTask<'_>,
    parts: Range<usize>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let (mut work, _, _) = split_scratch(task, scratch);
    // SAFETY: passed on.
    unsafe {
        begin::<S, W>(simd, task, parts.clone(), &mut work);
        for (index, out) in parts.zip(out.chunks_exact_mut(task.state_floats())) {
            sum_part::<S, W>(simd, task, index, &mut work, out);
        }
    }
}

/// Merges what all parts, one after the other in `parts`, have for a key/value head of the task, and writes its outputs.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(crate) unsafe fn merge_parts<S: Simd>(
    simd: S,
    task: &AttentionTask<'_>,
    head: usize,
    parts: &[f32],
    scratch: &mut [f32],
) {
    let (rows, floats) = (task.rows(), task.head_floats());
    let mut total = State::over(scratch, rows, &task.shape);
    total.clear();
    for part in parts.chunks_exact(task.state_floats()).take(task.parts().len()) {
        merge(simd, &mut total, &part[head * floats..][..floats]);
    }
    // SAFETY: passed on.
    unsafe { finish(simd, task, head, &mut total) };
}

/// Brings in the queries while the first block of some parts is on its way.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn begin<S: Simd, W: Elements<S>>(simd: S, task: &AttentionTask<'_>, parts: Range<usize>, work: &mut Work<'_>) {
    let first = task.first_seen(task.start).max(parts.start * PART);
    let end = task.start + task.tokens;
    work.upcoming.aim(task, first..end.min(first / BLOCK * BLOCK + BLOCK));
    work.upcoming.ask_all(simd);
    // SAFETY: passed on.
    unsafe { load_queries::<S, W>(simd, task, work.q) };
}

/// Copies the queries to scratch as inputs, scaled so that scores are in units of log2 or of the cap, with zeros up to whole
/// panels.
#[inline(always)]
unsafe fn load_queries<S: Simd, W: Elements<S>>(simd: S, task: &AttentionTask<'_>, out: &mut [f32]) {
    let (group, dim, padded) = (task.shape.group, task.shape.head_dim, task.shape.padded_dim());
    let scale = task.shape.scale * task.shape.cap.map_or(std::f32::consts::LOG2_E, f32::recip);
    let out = out.as_mut_ptr().cast::<u8>();
    for row in 0..task.kv_heads.len() * task.rows() {
        let (kv_head, here) = (row / task.rows(), row % task.rows());
        // SAFETY: the caller vouches for the queries of every token and head of the task; `out` holds `padded` f32, or something
        // smaller, for each, and an array of 64 whole vectors.
        unsafe {
            let head = task.q.add(here / group * task.q_stride + (kv_head * group + here % group) * dim);
            let out = out.add(row * padded * W::INPUT.bytes());
            for at in (0..padded).step_by(PANEL) {
                let mut scaled = [0.0; PANEL];
                let here = PANEL.min(dim - at);
                Format::F32.load_slice(simd, head.add(at).cast(), &mut scaled[..here]);
                scaled.iter_mut().for_each(|value| *value *= scale);
                for lane in (0..PANEL).step_by(S::LANES) {
                    W::INPUT.store(simd, out, at + lane, simd.load(scaled.as_ptr().add(lane)));
                }
            }
        }
    }
}

/// Runs the online softmax over the blocks of part `index`. What follows it is asked for, as it will be this thread's next part.
#[inline(always)]
unsafe fn sum_part<S: Simd, W: Elements<S>>(
    simd: S,
    task: &AttentionTask<'_>,
    index: usize,
    work: &mut Work<'_>,
    part: &mut [f32],
) {
    states(part, task).for_each(|mut state| state.clear());
    let end = task.start + task.tokens;
    let seen = task.first_seen(task.start).max(index * PART)..end.min((index + 1) * PART);
    for block in (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK) {
        let positions = seen.start.max(block)..seen.end.min(block + BLOCK);
        work.upcoming.aim(task, (block + BLOCK).min(end)..end.min(block + 2 * BLOCK));
        for (kv_head, mut state) in task.kv_heads.clone().zip(states(part, task)) {
            // SAFETY: passed on: the positions are covered by the table.
            unsafe {
                let mut runs = [std::ptr::null(); BLOCK];
                let woven = Woven::new::<S, W>(task, kv_head, block, &positions, &mut runs);
                let Work { panels, upcoming, .. } = work;
                panels.fill::<S, W>(simd, task, (kv_head, block), positions.clone(), woven.is_some(), upcoming);
                for first in (0..task.rows()).step_by(STRIP) {
                    let rows = first..task.rows().min(first + STRIP);
                    sum_strip::<S, W>(simd, task, (kv_head, block), (rows, woven), work, &mut state);
                }
            }
        }
    }
}

/// Takes some rows through a block, whose panels are ready.
#[inline(always)]
unsafe fn sum_strip<S: Simd, W: Elements<S>>(
    simd: S,
    task: &AttentionTask<'_>,
    (kv_head, block): (usize, usize),
    (rows, woven): (Range<usize>, Option<Woven<'_>>),
    work: &mut Work<'_>,
    state: &mut State<'_>,
) {
    let shape = &task.shape;
    let first_row = (kv_head - task.kv_heads.start) * task.rows() + rows.start;
    // What the token at `position` sees of the block.
    let seen = |position: usize| {
        let first = task.first_seen(position).saturating_sub(block).min(BLOCK);
        first..(position + 1).saturating_sub(block).min(BLOCK)
    };
    let (mut position, mut head) = (task.start + rows.start / shape.group, rows.start % shape.group);
    let together = seen(position).start..seen(task.start + (rows.end - 1) / shape.group).end;
    if together.is_empty() {
        return;
    }
    let input_stride = shape.padded_dim() * W::INPUT.bytes();
    let scores = work.scores.as_mut_ptr();
    // SAFETY: the rows lie in `q`, the panels were filled for what is seen, and `scores` and the state hold the sums.
    unsafe {
        Tiled::<W>::sum_asking(
            simd,
            &Block {
                input: work.q.as_ptr().cast::<u8>().add(first_row * input_stride),
                input_stride,
                rows: rows.len(),
                inputs: 0..shape.head_dim,
                panel: work.panels.keys.as_ptr().cast(),
                groups: Groups::default(),
                next: std::ptr::null(),
                sums: scores,
                resume: false,
            },
            &mut EachStep::<2>(&mut work.upcoming),
        );
        for (index, row) in rows.clone().enumerate() {
            let scores = scores.add(index * BLOCK);
            let [key_scales, value_scales] = &work.panels.scales;
            let scaled = task.pages.keys.has_scales();
            if scaled {
                multiply(simd, scores, key_scales);
            }
            if let Some(cap) = shape.cap {
                bend(simd, scores, cap);
            }
            let seen = seen(position);
            if seen.len() < BLOCK {
                let all = std::slice::from_raw_parts_mut(scores, BLOCK);
                all[..seen.start].fill(f32::NEG_INFINITY);
                all[seen.end..].fill(f32::NEG_INFINITY);
            }
            work.upcoming.ask::<S, 8>(simd);
            update_row::<S, W>(simd, row, scores, scaled.then_some(&**value_scales), state);
            (position, head) = if head + 1 == shape.group { (position + 1, 0) } else { (position, head + 1) };
        }
        for panel in 0..shape.padded_value() / PANEL {
            let block = Block {
                input: scores.cast(),
                input_stride: BLOCK * 4,
                rows: rows.len(),
                inputs: together.start / W::STEP * W::STEP..together.end,
                panel: work.panels.values.as_ptr().add(panel * BLOCK / W::STEP * PANEL).cast(),
                groups: Groups::default(),
                next: std::ptr::null(),
                sums: state.values.as_mut_ptr().add((panel * state.max.len() + rows.start) * PANEL),
                resume: true,
            };
            let asks = &mut EachStep::<3>(&mut work.upcoming);
            match woven {
                Some(woven) => {
                    let columns = Columns::<S, W>::at(woven, panel * PANEL);
                    Tiled::<W>::sum_elsewhere(simd, &block, columns, asks);
                }
                None => Tiled::<W>::sum_asking(simd, &block, asks),
            }
        }
    }
}

/// Multiplies a block's scores by their tokens' scales.
///
/// # Safety
/// `scores` holds a block.
#[inline(always)]
unsafe fn multiply<S: Simd>(simd: S, scores: *mut f32, scales: &[f32]) {
    for at in (0..BLOCK).step_by(S::LANES) {
        // SAFETY: both hold a block; scales do because panels have them.
        unsafe {
            let scale = simd.load(scales[at..at + S::LANES].as_ptr());
            simd.store(scores.add(at), simd.mul(simd.load(scores.add(at)), scale));
        }
    }
}

/// Turns a block's scores in units of `cap` into capped ones in units of log2.
///
/// # Safety
/// `scores` holds a block.
#[inline(always)]
unsafe fn bend<S: Simd>(simd: S, scores: *mut f32, cap: f32) {
    for at in (0..BLOCK).step_by(S::LANES) {
        // SAFETY: a block is whole vectors.
        unsafe {
            let bent = simd.mul(tanh(simd, simd.load(scores.add(at))), simd.splat(cap * std::f32::consts::LOG2_E));
            simd.store(scores.add(at), bent);
        }
    }
}

/// Turns a row's scores into probabilities relative to its reference, times `scales` and as inputs from the start of the row on.
/// Where scores rise far above the reference they move it, and rescale what the row has.
///
/// # Safety
/// `scores` holds a block.
#[inline(always)]
unsafe fn update_row<S: Simd, W: Elements<S>>(
    simd: S,
    row: usize,
    scores: *mut f32,
    scales: Option<&[f32]>,
    state: &mut State<'_>,
) {
    let vectors = BLOCK / S::LANES;
    let mut powers = [simd.splat(0.0); BLOCK / 8];
    let sum = state.sum[row * SUM_LANES..][..SUM_LANES].as_mut_ptr();
    // SAFETY: `scores` holds a block and `sum` a vector. No input is larger than an f32, so what is written of a row is behind
    // what was read of it.
    unsafe {
        let mut most = simd.splat(f32::NEG_INFINITY);
        for (vector, power) in powers[..vectors].iter_mut().enumerate() {
            *power = simd.load(scores.add(vector * S::LANES));
            most = simd.max(most, *power);
        }
        let most = simd.max_lane(most);
        if most > state.max[row] + HEADROOM {
            let mut scale = [0.0f32; 16];
            simd.store(scale.as_mut_ptr(), exp2(simd, simd.splat(state.max[row] - most)));
            for panel in state.row_panels(row) {
                state.values[panel].iter_mut().for_each(|value| *value *= scale[0]);
            }
            simd.store(sum, simd.mul(simd.load(sum), simd.splat(scale[0])));
            state.max[row] = most;
        } else if state.max[row] == f32::NEG_INFINITY {
            // The row sees nothing up to here.
            scores.write_bytes(0, BLOCK);
            return;
        }
        let reference = simd.splat(state.max[row]);
        let mut total = simd.load(sum);
        for pair in (0..vectors).step_by(2) {
            let mut probabilities = [powers[pair], powers[pair + 1]];
            for power in &mut probabilities {
                *power = W::power(simd, simd.sub(*power, reference));
            }
            let Some(scales) = scales else {
                total = W::put(simd, probabilities, scores.cast(), pair * S::LANES, total);
                continue;
            };
            for (vector, probability) in probabilities.iter_mut().enumerate() {
                total = simd.add(total, *probability);
                let at = (pair + vector) * S::LANES;
                *probability = simd.mul(*probability, simd.load(scales[at..at + S::LANES].as_ptr()));
            }
            W::put(simd, probabilities, scores.cast(), pair * S::LANES, total);
        }
        simd.store(sum, total);
    }
}

/// Adds the state of a part to that of what comes before it.
#[inline(always)]
fn merge<S: Simd>(simd: S, total: &mut State<'_>, part: &[f32]) {
    let (part_max, rest) = part.split_at(total.max.len().next_multiple_of(16));
    let (part_sum, part_values) = rest.split_at(total.sum.len());
    for (row, here) in part_max[..total.max.len()].iter().copied().enumerate() {
        let before = total.max[row];
        let max = before.max(here);
        if here == f32::NEG_INFINITY {
            continue;
        }
        let mut scales = [[0.0f32; 16]; 2];
        // SAFETY: an array of 16 holds a vector.
        unsafe {
            simd.store(scales[0].as_mut_ptr(), exp2(simd, simd.splat(before - max)));
            simd.store(scales[1].as_mut_ptr(), exp2(simd, simd.splat(here - max)));
        }
        let [old, new] = [scales[0][0], scales[1][0]];
        total.max[row] = max;
        let sums = row * SUM_LANES..(row + 1) * SUM_LANES;
        add_scaled(&mut total.sum[sums.clone()], old, &part_sum[sums], new);
        for panel in total.row_panels(row) {
            add_scaled(&mut total.values[panel.clone()], old, &part_values[panel], new);
        }
    }
}

#[inline(always)]
fn add_scaled(total: &mut [f32], old: f32, part: &[f32], new: f32) {
    for (total, part) in total.iter_mut().zip(part) {
        *total = *total * old + part * new;
    }
}

/// Divides by the sums and writes the outputs of a key/value head, the task's `head`th.
#[inline(always)]
unsafe fn finish<S: Simd>(simd: S, task: &AttentionTask<'_>, head: usize, total: &mut State<'_>) {
    let (group, dim) = (task.shape.group, task.shape.value_dim);
    for row in 0..task.rows() {
        let lanes = &total.sum[row * SUM_LANES..][..SUM_LANES];
        let fours: [f32; 4] = std::array::from_fn(|i| (lanes[i] + lanes[i + 4]) + (lanes[i + 8] + lanes[i + 12]));
        let sum = (fours[0] + fours[1]) + (fours[2] + fours[3]);
        for (panel, place) in total.row_panels(row).enumerate() {
            let values = &mut total.values[place];
            for value in &mut *values {
                // Adding zero makes minus zero plus zero: how often a probability of 0 was added must not show.
                *value = *value / sum + 0.0;
            }
            let first = panel * PANEL;
            // SAFETY: the caller vouches for the outputs of every token and head of the task.
            unsafe {
                let to = task.output.add(row / group * task.output_stride);
                let index = task.output_index + (head * group + row % group) * dim + first;
                task.format.store_slice(simd, to, index, &values[..PANEL.min(dim - first)]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
