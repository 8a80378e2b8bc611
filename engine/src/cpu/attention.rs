//! Attention over pages.
//!
//! Positions are cut at fixed places, whatever the batch: into *parts* of 512 and those into *blocks* of 32. Within a part
//! the softmax runs online over its blocks (arXiv 2205.14135); parts are merged from first to last. Both cuts are counted from
//! position 0, so a query's bits depend on its position and its window alone: not on the chunk it is computed in, not on its
//! neighbours, not on whether parts were computed by one thread or by several.
//!
//! A task holds queries of one sequence that share a key/value head: the heads of a group for one or several tokens. They
//! share the loaded keys and values, which are widened to f32 once for all of them. Scores are in units of log2.
//!
//! What a query must not see has probability 0 and is still multiplied where a neighbour sees it: harmless, because
//! everything up to the last token of a task is finite, and everything after it is zero.

use super::{
    format::Format,
    pages::{LayerPages, Slot},
    simd::{Simd, exp2, tanh},
};
use crate::model::latent::LatentShape;
use kv_cache::PageId;

/// Positions that are merged online before a part's result is final.
const PART: usize = 512;
/// Positions whose scores are computed at once.
const BLOCK: usize = 32;
/// Lanes kept of a row's sum of probabilities; a vector of the widest unit.
const SUM_LANES: usize = 16;
/// Queries of a task, over tokens and heads, unless one group has more.
const TASK_ROWS: usize = 32;

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

    /// Elements of a key in scratch: whole vectors.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Elements of a value in scratch: whole vectors.
    fn padded_value(&self) -> usize {
        self.value_dim.next_multiple_of(16)
    }

    /// Elements of the values of a block in scratch, where they do not stand in its keys.
    fn value_floats(&self) -> usize {
        if self.latent { 0 } else { BLOCK * self.padded_value() }
    }

    /// Returns the f32 that the state of `rows` queries takes: maxima, sums and weighted values.
    fn state_floats(&self, rows: usize) -> usize {
        rows.next_multiple_of(16) + rows * (SUM_LANES + self.padded_value())
    }

    /// Returns the f32 of scratch that a task needs.
    pub(crate) fn scratch_floats(&self) -> usize {
        let rows = self.task_tokens() * self.group;
        let block = BLOCK * self.padded_dim() + self.value_floats();
        2 * self.state_floats(rows) + rows * (self.padded_dim() + BLOCK) + block
    }
}

/// Some tokens of one sequence, and one key/value head.
#[derive(Debug)]
pub(crate) struct AttentionTask<'a> {
    pub(crate) shape: AttentionShape,
    /// First token's first query head of the group; the heads of the group follow each other.
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
    pub(crate) kv_head: usize,
    /// First token's first output of the group, as a row of `format` and an element in it.
    pub(crate) output: *mut u8,
    pub(crate) output_stride: usize,
    pub(crate) output_index: usize,
    pub(crate) format: Format,
}

impl AttentionTask<'_> {
    fn rows(&self) -> usize {
        self.tokens * self.shape.group
    }

    /// Returns the f32 of the state that a part of the task leaves.
    pub(crate) fn state_floats(&self) -> usize {
        self.shape.state_floats(self.rows())
    }

    /// First position that the token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Returns the parts that hold what the task's tokens see.
    pub(crate) fn parts(&self) -> std::ops::Range<usize> {
        self.first_seen(self.start) / PART..(self.start + self.tokens - 1) / PART + 1
    }
}

/// Running softmax of some rows: `max[rows]`, `sum[rows][SUM_LANES]`, `values[rows][padded_value]`.
struct State<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> State<'a> {
    fn over(floats: &'a mut [f32], rows: usize, dim: usize) -> Self {
        let (max, rest) = floats.split_at_mut(rows.next_multiple_of(16));
        let (sum, values) = rest.split_at_mut(rows * SUM_LANES);
        Self { max: &mut max[..rows], sum, values: &mut values[..rows * dim] }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.values.fill(0.0);
    }
}

/// What a task works in.
struct Work<'a> {
    q: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
}

fn split_scratch<'a>(
    shape: &AttentionShape,
    rows: usize,
    scratch: &'a mut [f32],
) -> (Work<'a>, State<'a>, &'a mut [f32]) {
    let dim = shape.padded_dim();
    let (keys, rest) = scratch.split_at_mut(BLOCK * dim);
    let (values, rest) = rest.split_at_mut(shape.value_floats());
    let (q, rest) = rest.split_at_mut(rows * dim);
    let (scores, rest) = rest.split_at_mut(rows * BLOCK);
    let (part, total) = rest.split_at_mut(shape.state_floats(rows));
    (Work { q, keys, values, scores }, State::over(part, rows, shape.padded_value()), total)
}

/// Computes a whole task.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, the table's pages lie in the pool and cover the
/// tokens' positions, nobody writes what is read, and the outputs are ours.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let (rows, dim) = (task.rows(), task.shape.padded_value());
    let (mut work, mut part, total) = split_scratch(&task.shape, rows, scratch);
    let mut total = State::over(total, rows, dim);
    total.clear();
    // SAFETY: passed on.
    unsafe {
        load_queries(simd, task, work.q);
        for index in task.parts() {
            sum_part(simd, task, index, &mut work, &mut part);
            merge(simd, &mut total, &part, dim);
        }
        finish(simd, task, &mut total);
    }
}

/// Computes one part of a task's positions and leaves its state in `out`, [`AttentionShape::state_floats`] long.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(crate) unsafe fn run_part<S: Simd>(
    simd: S,
    task: &AttentionTask<'_>,
    index: usize,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let (rows, dim) = (task.rows(), task.shape.padded_value());
    let (mut work, _, _) = split_scratch(&task.shape, rows, scratch);
    let mut state = State::over(out, rows, dim);
    // SAFETY: passed on.
    unsafe {
        load_queries(simd, task, work.q);
        sum_part(simd, task, index, &mut work, &mut state);
    }
}

/// Merges the states of all parts, one after the other in `parts`, and writes the outputs.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(crate) unsafe fn merge_parts<S: Simd>(simd: S, task: &AttentionTask<'_>, parts: &mut [f32], scratch: &mut [f32]) {
    let (rows, dim) = (task.rows(), task.shape.padded_value());
    let mut total = State::over(scratch, rows, dim);
    total.clear();
    for part in parts.chunks_exact_mut(task.shape.state_floats(rows)).take(task.parts().len()) {
        merge(simd, &mut total, &State::over(part, rows, dim), dim);
    }
    // SAFETY: passed on.
    unsafe { finish(simd, task, &mut total) };
}

/// Copies the queries to scratch, scaled so that scores are in units of log2 or of the cap, with zeros up to whole vectors.
#[inline(always)]
unsafe fn load_queries<S: Simd>(simd: S, task: &AttentionTask<'_>, out: &mut [f32]) {
    let (group, dim, padded) = (task.shape.group, task.shape.head_dim, task.shape.padded_dim());
    let scale = task.shape.scale * task.shape.cap.map_or(std::f32::consts::LOG2_E, f32::recip);
    for (row, out) in out.chunks_exact_mut(padded).enumerate() {
        // SAFETY: the caller vouches for the queries of every token and head of the task.
        unsafe {
            let head = task.q.add(row / group * task.q_stride + row % group * dim);
            Format::F32.load_slice(simd, head.cast(), &mut out[..dim]);
        }
        out[..dim].iter_mut().for_each(|value| *value *= scale);
        out[dim..].fill(0.0);
    }
}

/// Runs the online softmax over the blocks of part `index`.
#[inline(always)]
unsafe fn sum_part<S: Simd>(
    simd: S,
    task: &AttentionTask<'_>,
    index: usize,
    work: &mut Work<'_>,
    state: &mut State<'_>,
) {
    state.clear();
    let seen = task.first_seen(task.start).max(index * PART)..(task.start + task.tokens).min((index + 1) * PART);
    let mut block = seen.start / BLOCK * BLOCK;
    while block < seen.end {
        let positions = seen.start.max(block)..seen.end.min(block + BLOCK);
        // SAFETY: passed on: the positions are covered by the table.
        unsafe { load_block(simd, task, block, positions.clone(), work) };
        let used = positions.end - block;
        score(simd, task.shape.padded_dim(), used, work);
        for row in 0..task.rows() {
            let position = task.start + row / task.shape.group;
            let scores = &mut work.scores[row * BLOCK..][..BLOCK];
            if let Some(cap) = task.shape.cap {
                bend(simd, scores, cap);
            }
            let first = task.first_seen(position).saturating_sub(block).min(BLOCK);
            let end = (position + 1).saturating_sub(block).min(BLOCK);
            scores[..first].fill(f32::NEG_INFINITY);
            scores[end..].fill(f32::NEG_INFINITY);
            update_row(simd, row, scores, state);
        }
        weigh(simd, &task.shape, used, work, state);
        block += BLOCK;
    }
}

/// Turns scores in units of `cap` into capped ones in units of log2.
#[inline(always)]
fn bend<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    for scores in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk holds a vector.
        unsafe {
            let bent = simd.mul(tanh(simd, simd.load(scores.as_ptr())), simd.splat(cap * std::f32::consts::LOG2_E));
            simd.store(scores.as_mut_ptr(), bent);
        }
    }
}

/// Widens keys and values of `positions` to scratch, whose first row is position `block`; other rows become zero.
#[inline(always)]
unsafe fn load_block<S: Simd>(
    simd: S,
    task: &AttentionTask<'_>,
    block: usize,
    positions: std::ops::Range<usize>,
    work: &mut Work<'_>,
) {
    let (padded, page_tokens) = (task.shape.padded_dim(), task.pages.page_tokens);
    // A latent's value stands in its key.
    let sides = if task.shape.latent { 1 } else { 2 };
    for rows in [&mut *work.keys, &mut *work.values].into_iter().take(sides) {
        rows[..(positions.start - block) * padded].fill(0.0);
        rows[(positions.end - block) * padded..].fill(0.0);
    }
    let mut position = positions.start;
    while position < positions.end {
        let slot = Slot { page: task.table[position / page_tokens].0, token: (position % page_tokens) as u32 };
        let run = (page_tokens - slot.token as usize).min(positions.end - position);
        let rows = (position - block) * padded..(position - block + run) * padded;
        // SAFETY: passed on.
        unsafe {
            task.pages.keys.read(simd, slot, task.kv_head, padded, &mut work.keys[rows.clone()]);
            if !task.shape.latent {
                task.pages.values.read(simd, slot, task.kv_head, padded, &mut work.values[rows]);
            }
        }
        position += run;
    }
}

/// `scores[row][position] = q[row] . keys[position]` for positions below `used`, rounded up to four.
#[inline(always)]
fn score<S: Simd>(simd: S, dim: usize, used: usize, work: &mut Work<'_>) {
    let rows = work.q.len() / dim;
    let mut row = 0;
    while row < rows {
        // SAFETY: the tiles lie in `q`, in the block's keys and in `scores`.
        unsafe {
            let q = work.q.as_ptr().add(row * dim);
            let scores = work.scores.as_mut_ptr().add(row * BLOCK);
            let keys = work.keys.as_ptr();
            match (S::SCORE_ROWS, rows - row) {
                (4, 4..) => score_tile::<S, 4>(simd, dim, used, q, keys, scores),
                (2.., 2..) => {
                    score_tile::<S, 2>(simd, dim, used, q, keys, scores);
                    row += 2;
                    continue;
                }
                _ => {
                    score_tile::<S, 1>(simd, dim, used, q, keys, scores);
                    row += 1;
                    continue;
                }
            }
            row += 4;
        }
    }
}

/// # Safety
/// `q` holds `ROWS` rows of `dim`, `keys` a block of them, `scores` `ROWS` rows of a block.
#[inline(always)]
unsafe fn score_tile<S: Simd, const ROWS: usize>(
    simd: S,
    dim: usize,
    used: usize,
    q: *const f32,
    keys: *const f32,
    scores: *mut f32,
) {
    for position in (0..used).step_by(4) {
        let mut sums = [[simd.splat(0.0); 4]; ROWS];
        // SAFETY: a block has a multiple of four rows of `dim`, and `dim` is a multiple of LANES.
        unsafe {
            for at in (0..dim).step_by(S::LANES) {
                let mut key = [simd.splat(0.0); 4];
                for (index, key) in key.iter_mut().enumerate() {
                    *key = simd.load(keys.add((position + index) * dim + at));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let q = simd.load(q.add(row * dim + at));
                    for (sum, key) in sums.iter_mut().zip(key) {
                        *sum = simd.fma(q, key, *sum);
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                scores.add(row * BLOCK + position).cast::<[f32; 4]>().write_unaligned(simd.sum4(sums));
            }
        }
    }
}

/// Turns a row's scores into probabilities relative to its running maximum, and rescales what the row has.
#[inline(always)]
fn update_row<S: Simd>(simd: S, row: usize, scores: &mut [f32], state: &mut State<'_>) {
    assert_eq!(scores.len(), BLOCK);
    let scores = scores.as_mut_ptr();
    let old = state.max[row];
    let sum = state.sum[row * SUM_LANES..][..SUM_LANES].as_mut_ptr();
    // SAFETY: `scores` holds a block and `sum` SUM_LANES, both multiples of LANES.
    unsafe {
        let mut max = simd.load(scores);
        for at in (S::LANES..BLOCK).step_by(S::LANES) {
            max = simd.max(max, simd.load(scores.add(at)));
        }
        let max = old.max(simd.max_lane(max));
        if max == f32::NEG_INFINITY {
            // The row sees nothing up to here.
            for at in (0..BLOCK).step_by(S::LANES) {
                simd.store(scores.add(at), simd.splat(0.0));
            }
            return;
        }
        if max > old {
            let mut scale = [0.0f32; 16];
            simd.store(scale.as_mut_ptr(), exp2(simd, simd.splat(old - max)));
            let dim = state.values.len() / state.max.len();
            let values = state.values[row * dim..][..dim].as_mut_ptr();
            for at in (0..dim).step_by(S::LANES) {
                simd.store(values.add(at), simd.mul(simd.load(values.add(at)), simd.splat(scale[0])));
            }
            for at in (0..SUM_LANES).step_by(S::LANES) {
                simd.store(sum.add(at), simd.mul(simd.load(sum.add(at)), simd.splat(scale[0])));
            }
            state.max[row] = max;
        }
        for at in (0..BLOCK).step_by(S::LANES) {
            let probability = exp2(simd, simd.sub(simd.load(scores.add(at)), simd.splat(max)));
            simd.store(scores.add(at), probability);
            let sum = sum.add(at % SUM_LANES);
            simd.store(sum, simd.add(simd.load(sum), probability));
        }
    }
}

/// `state.values[row] += probabilities[row] . values` over positions below `used`.
#[inline(always)]
fn weigh<S: Simd>(simd: S, shape: &AttentionShape, used: usize, work: &Work<'_>, state: &mut State<'_>) {
    let (rows, dim) = (state.max.len(), shape.padded_value());
    let (block, stride) = if shape.latent { (&*work.keys, shape.padded_dim()) } else { (&*work.values, dim) };
    let mut row = 0;
    while row < rows {
        let count = if rows - row >= 4 { 4 } else { 1 };
        let mut at = 0;
        while at < dim {
            let vectors = match (S::LANES, (dim - at) / S::LANES) {
                (16, 4..) => 4,
                (_, 2..) => 2,
                _ => 1,
            };
            // SAFETY: the tiles lie in the probabilities, in the block's values and in the state's values.
            unsafe {
                let probabilities = work.scores.as_ptr().add(row * BLOCK);
                let values = Values { first: block.as_ptr().add(at), stride, used };
                let sums = state.values.as_mut_ptr().add(row * dim + at);
                match (count, vectors) {
                    (4, 4) => weigh_tile::<S, 4, 4>(simd, probabilities, values, sums, dim),
                    (4, 2) => weigh_tile::<S, 4, 2>(simd, probabilities, values, sums, dim),
                    (4, _) => weigh_tile::<S, 4, 1>(simd, probabilities, values, sums, dim),
                    (_, 4) => weigh_tile::<S, 1, 4>(simd, probabilities, values, sums, dim),
                    (_, 2) => weigh_tile::<S, 1, 2>(simd, probabilities, values, sums, dim),
                    _ => weigh_tile::<S, 1, 1>(simd, probabilities, values, sums, dim),
                }
            }
            at += vectors * S::LANES;
        }
        row += count;
    }
}

/// Values of a block, from a column on.
#[derive(Clone, Copy)]
struct Values {
    first: *const f32,
    /// f32 from position to position.
    stride: usize,
    /// Positions.
    used: usize,
}

/// # Safety
/// `probabilities` holds `ROWS` rows of a block, `values` as many vectors as a tile, `sums` `ROWS` rows of `dim`.
#[inline(always)]
unsafe fn weigh_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    probabilities: *const f32,
    values: Values,
    sums: *mut f32,
    dim: usize,
) {
    let mut tile = [[simd.splat(0.0); VECTORS]; ROWS];
    // SAFETY: within what the caller vouches for.
    unsafe {
        for (row, tile) in tile.iter_mut().enumerate() {
            for (vector, sum) in tile.iter_mut().enumerate() {
                *sum = simd.load(sums.add(row * dim + vector * S::LANES));
            }
        }
        for position in 0..values.used {
            let mut value = [simd.splat(0.0); VECTORS];
            for (vector, value) in value.iter_mut().enumerate() {
                *value = simd.load(values.first.add(position * values.stride + vector * S::LANES));
            }
            for (row, tile) in tile.iter_mut().enumerate() {
                let probability = simd.splat(probabilities.add(row * BLOCK + position).read());
                for (sum, value) in tile.iter_mut().zip(value) {
                    *sum = simd.fma(probability, value, *sum);
                }
            }
        }
        for (row, tile) in tile.iter().enumerate() {
            for (vector, sum) in tile.iter().enumerate() {
                simd.store(sums.add(row * dim + vector * S::LANES), *sum);
            }
        }
    }
}

/// Adds a part to what comes before it.
#[inline(always)]
fn merge<S: Simd>(simd: S, total: &mut State<'_>, part: &State<'_>, dim: usize) {
    for row in 0..total.max.len() {
        let (before, here) = (total.max[row], part.max[row]);
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
        let values = row * dim..(row + 1) * dim;
        add_scaled(&mut total.sum[sums.clone()], old, &part.sum[sums], new);
        add_scaled(&mut total.values[values.clone()], old, &part.values[values], new);
    }
}

#[inline(always)]
fn add_scaled(total: &mut [f32], old: f32, part: &[f32], new: f32) {
    for (total, part) in total.iter_mut().zip(part) {
        *total = *total * old + part * new;
    }
}

/// Divides by the sums and writes the outputs.
#[inline(always)]
unsafe fn finish<S: Simd>(simd: S, task: &AttentionTask<'_>, total: &mut State<'_>) {
    let (group, dim, padded) = (task.shape.group, task.shape.value_dim, task.shape.padded_value());
    for (row, values) in total.values.chunks_exact_mut(padded).enumerate() {
        let lanes = &total.sum[row * SUM_LANES..][..SUM_LANES];
        let fours: [f32; 4] = std::array::from_fn(|i| (lanes[i] + lanes[i + 4]) + (lanes[i + 8] + lanes[i + 12]));
        let sum = (fours[0] + fours[1]) + (fours[2] + fours[3]);
        for value in &mut *values {
            // Adding zero makes minus zero plus zero: how often a probability of 0 was added must not show.
            *value = *value / sum + 0.0;
        }
        // SAFETY: the caller vouches for the outputs of every token and head of the task.
        unsafe {
            let to = task.output.add(row / group * task.output_stride);
            task.format.store_slice(simd, to, task.output_index + row % group * dim, &values[..dim]);
        }
    }
}

#[cfg(test)]
mod tests;
