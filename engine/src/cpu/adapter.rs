//! Low-rank deltas of linears (LoRA, arXiv 2106.09685): `y += B (scale * A x)`, each row with its own.
//!
//! A delta is added to the sums of its linear before they go out, so before the activation and before the rotation, in two
//! parts. [`shrink`] computes `scale * A x` of the rows that have a delta, a few numbers each; the linear's own last step
//! multiplies them by `B` and adds ([`add`]). Rows without a delta are not touched, and steps without any skip both.
//!
//! One number of `A x` is one sum in lanes along the depth, and one output's delta one sum along the ranks, both from front to
//! back: rows, tiles and threads change nothing. Sums are f32, factors stay as stored.
//!
//! `B` lies in the order of the packed linear: for each half panel of 32 outputs, the ranks that these outputs use, one after
//! the other. So gate and up, whose outputs alternate by half panels, pay for their own ranks alone.

use super::{buffer::Buffer, format::Format, packed::PANEL, simd::Simd};
use crate::{
    Error,
    model::checkpoint::{ElementType, Tensor},
};
use std::ops::Range;

/// Outputs that share a list of ranks.
const HALF: usize = PANEL / 2;
/// Numbers of `A x` that are summed side by side.
pub(crate) const RANK_STEP: usize = 4;

/// The factors of one part of a linear.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors<'a> {
    /// `A`, `[rank][inputs]`.
    pub(crate) down: Tensor<'a>,
    /// `B`, `[outputs][rank]`.
    pub(crate) up: Tensor<'a>,
    pub(crate) rank: usize,
    /// What `A x` is multiplied by.
    pub(crate) scale: f32,
}

/// The delta of one packed linear: the factors of all its parts, their ranks one after the other.
#[derive(Debug)]
pub(crate) struct Delta {
    /// Of both factors.
    format: Format,
    /// Inputs.
    depth: usize,
    /// `A`, `[ranks][depth]`, rows of `down_stride` bytes, zero beyond the depth and the last rank.
    down: Buffer,
    down_stride: usize,
    /// For each rank, padded to whole steps.
    scales: Vec<f32>,
    /// For each half panel.
    halves: Vec<Half>,
    /// `B`: for each half panel `[ranks][32]`.
    up: Buffer,
}

/// The ranks that 32 outputs use.
#[derive(Clone, Debug, Default)]
struct Half {
    ranks: Range<usize>,
    /// Its bytes in [`Delta::up`].
    offset: usize,
}

impl Delta {
    /// Brings the factors of a linear's `parts` into the order of its `panels` panels; `column` says which output of which part
    /// a packed column is, `None` = padding. Parts without factors get no delta.
    pub(crate) fn new(
        dtype: ElementType,
        depth: usize,
        panels: usize,
        parts: &[Option<Factors<'_>>],
        column: &dyn Fn(usize) -> Option<(usize, usize)>,
    ) -> Result<Self, Error> {
        let format = Format::from(dtype);
        let mut ranks_of = Vec::with_capacity(parts.len());
        let mut ranks = 0;
        for part in parts {
            let rank = part.map_or(0, |factors| factors.rank);
            ranks_of.push(ranks..ranks + rank);
            ranks += rank;
        }
        let padded = ranks.next_multiple_of(RANK_STEP);
        let mut delta = Self {
            format,
            depth,
            down: Buffer::new(padded * format.stride(depth))?,
            down_stride: format.stride(depth),
            scales: vec![0.0; padded],
            halves: Vec::with_capacity(2 * panels),
            up: Buffer::new(1)?,
        };
        for (factors, ranks) in parts.iter().zip(&ranks_of) {
            let Some(factors) = factors else { continue };
            for rank in 0..factors.rank {
                let at = (ranks.start + rank) * delta.down_stride;
                let row = &mut delta.down.bytes_mut()[at..][..depth * dtype.bytes()];
                copy_row(dtype, factors.down, rank, depth, row);
            }
            delta.scales[ranks.clone()].fill(factors.scale);
        }
        delta.place_up(dtype, panels, parts, &ranks_of, column)?;
        Ok(delta)
    }

    fn place_up(
        &mut self,
        dtype: ElementType,
        panels: usize,
        parts: &[Option<Factors<'_>>],
        ranks_of: &[Range<usize>],
        column: &dyn Fn(usize) -> Option<(usize, usize)>,
    ) -> Result<(), Error> {
        let mut bytes = 0;
        for half in 0..2 * panels {
            let used = (half * HALF..(half + 1) * HALF).filter_map(column).map(|(part, _)| &ranks_of[part]);
            let used = used.filter(|ranks| !ranks.is_empty());
            let ranks = used.fold(0..0, |all: Range<usize>, ranks| match all.is_empty() {
                true => ranks.clone(),
                false => all.start.min(ranks.start)..all.end.max(ranks.end),
            });
            let offset = bytes;
            bytes += ranks.len() * HALF * dtype.bytes();
            self.halves.push(Half { ranks, offset });
        }
        self.up = Buffer::new(bytes)?;
        let up = self.up.bytes_mut();
        for (index, half) in self.halves.iter().enumerate() {
            for lane in 0..HALF {
                let Some((part, output)) = column(index * HALF + lane) else { continue };
                let Some(factors) = &parts[part] else { continue };
                for rank in 0..factors.rank {
                    let row = ranks_of[part].start + rank - half.ranks.start;
                    let at = half.offset + (row * HALF + lane) * dtype.bytes();
                    let value = factors.up.dtype.get(factors.up.row(output, factors.rank), rank);
                    put(dtype, value, &mut up[at..][..dtype.bytes()]);
                }
            }
        }
        Ok(())
    }

    /// Returns the numbers of `A x`, a multiple of [`RANK_STEP`].
    pub(crate) fn ranks(&self) -> usize {
        self.scales.len()
    }

    /// Returns the multiply-adds of `A x` for one row.
    pub(crate) fn work(&self) -> usize {
        self.scales.len() * self.depth
    }

    /// Returns the type of both factors.
    pub(crate) fn dtype(&self) -> ElementType {
        match self.format {
            Format::Bf16 => ElementType::Bf16,
            Format::F16 => ElementType::F16,
            Format::F32 | Format::RoundedBf16 => ElementType::F32,
        }
    }

    /// Returns the inputs.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Returns what each number of `A x` is multiplied by; 0 for those that only pad.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Returns row `rank` of `A`, `[depth]`.
    pub(crate) fn down(&self, rank: usize) -> &[u8] {
        &self.down.bytes()[rank * self.down_stride..][..self.depth * self.dtype().bytes()]
    }

    /// Returns the half panels of 32 outputs.
    pub(crate) fn halves(&self) -> usize {
        self.halves.len()
    }

    /// Returns the ranks that half panel `half` uses, and its part of `B`, `[ranks][32]`.
    pub(crate) fn half(&self, half: usize) -> (Range<usize>, &[u8]) {
        let Half { ranks, offset } = &self.halves[half];
        (ranks.clone(), &self.up.bytes()[*offset..][..ranks.len() * HALF * self.dtype().bytes()])
    }

    /// Returns the bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.down.len() + self.up.len()
    }
}

/// Copies row `row` of `tensor` to `to` as `dtype`.
fn copy_row(dtype: ElementType, tensor: Tensor<'_>, row: usize, columns: usize, to: &mut [u8]) {
    let from = tensor.row(row, columns);
    for (index, to) in to.chunks_exact_mut(dtype.bytes()).enumerate() {
        put(dtype, tensor.dtype.get(from, index), to);
    }
}

/// Writes `value`, which came from `dtype` or is to be widened, so that nothing is rounded.
fn put(dtype: ElementType, value: f32, to: &mut [u8]) {
    match dtype {
        ElementType::F32 => to.copy_from_slice(&value.to_le_bytes()),
        ElementType::F16 => to.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
        ElementType::Bf16 => to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
    }
}

/// A row with a delta.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adapted<'a> {
    pub(crate) delta: &'a Delta,
    /// `scale * A x`, one for each rank.
    pub(crate) hidden: &'a [f32],
}

/// Some numbers of `scale * A x` for some rows of one delta.
#[derive(Debug)]
pub(crate) struct ShrinkTask<'a> {
    pub(crate) delta: &'a Delta,
    /// Whole steps of [`RANK_STEP`].
    pub(crate) ranks: Range<usize>,
    /// First input row, readable as anything finite up to a whole vector beyond the depth.
    pub(crate) input: *const u8,
    /// Bytes from row to row.
    pub(crate) input_stride: usize,
    pub(crate) format: Format,
    pub(crate) rows: usize,
    /// The first row's numbers, all ranks.
    pub(crate) hidden: *mut f32,
    /// f32 from row to row.
    pub(crate) hidden_stride: usize,
}

/// Computes a task.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, and nobody else touches the outputs.
#[inline(always)]
pub(crate) unsafe fn shrink<S: Simd>(simd: S, task: &ShrinkTask<'_>) {
    assert!(task.ranks.end <= task.delta.ranks() && task.ranks.len().is_multiple_of(RANK_STEP));
    // The formats as constants, so that the loop below has no branches.
    // SAFETY: passed on.
    unsafe {
        match (task.delta.format, task.format) {
            (Format::Bf16, Format::Bf16) => shrink_as(simd, task, Format::Bf16, Format::Bf16),
            (Format::F16, Format::Bf16) => shrink_as(simd, task, Format::F16, Format::Bf16),
            (_, Format::Bf16) => shrink_as(simd, task, Format::F32, Format::Bf16),
            (Format::Bf16, _) => shrink_as(simd, task, Format::Bf16, Format::F32),
            (Format::F16, _) => shrink_as(simd, task, Format::F16, Format::F32),
            (..) => shrink_as(simd, task, Format::F32, Format::F32),
        }
    }
}

/// # Safety
/// As for [`shrink`]; the formats are those of the factors and of the inputs.
#[inline(always)]
unsafe fn shrink_as<S: Simd>(simd: S, task: &ShrinkTask<'_>, factors: Format, inputs: Format) {
    let Delta { down, down_stride, depth, scales, .. } = task.delta;
    for row in 0..task.rows {
        for first in task.ranks.clone().step_by(RANK_STEP) {
            // SAFETY: rows of `down` are whole cache lines with zeros beyond the depth, ranks were checked, and inputs and
            // outputs are the caller's word.
            unsafe {
                let input = task.input.add(row * task.input_stride);
                let down = down.as_ptr().add(first * down_stride);
                let mut sums = [simd.splat(0.0); RANK_STEP];
                for at in (0..*depth).step_by(S::LANES) {
                    let input = inputs.load(simd, input, at);
                    for (rank, sum) in sums.iter_mut().enumerate() {
                        *sum = simd.fma(input, factors.load(simd, down.add(rank * down_stride), at), *sum);
                    }
                }
                let to = task.hidden.add(row * task.hidden_stride + first);
                for (rank, sum) in simd.sum4(sums).into_iter().enumerate() {
                    to.add(rank).write(sum * scales[first + rank]);
                }
            }
        }
    }
}

/// Adds a row's delta to its sums of panel `panel`.
#[inline(always)]
pub(crate) fn add<S: Simd>(simd: S, adapted: &Adapted<'_>, panel: usize, sums: &mut [f32]) {
    assert_eq!(sums.len(), PANEL);
    for (half, sums) in adapted.delta.halves[2 * panel..][..2].iter().zip(sums.chunks_exact_mut(HALF)) {
        match adapted.delta.format {
            Format::Bf16 => add_half(simd, adapted, half, Format::Bf16, sums),
            Format::F16 => add_half(simd, adapted, half, Format::F16, sums),
            Format::F32 | Format::RoundedBf16 => add_half(simd, adapted, half, Format::F32, sums),
        }
    }
}

#[inline(always)]
fn add_half<S: Simd>(simd: S, adapted: &Adapted<'_>, half: &Half, format: Format, sums: &mut [f32]) {
    if half.ranks.is_empty() {
        return;
    }
    let vectors = HALF / S::LANES;
    let mut deltas = [simd.splat(0.0); 4];
    assert!(vectors <= deltas.len() && sums.len() == HALF);
    for (rank, hidden) in adapted.hidden[half.ranks.clone()].iter().enumerate() {
        let hidden = simd.splat(*hidden);
        // SAFETY: `Delta::new` made room for 32 outputs of every rank of the half, and `sums` holds 32.
        unsafe {
            let up = adapted.delta.up.as_ptr().add(half.offset + rank * HALF * format.bytes());
            for (vector, delta) in deltas.iter_mut().enumerate().take(vectors) {
                *delta = simd.fma(hidden, format.load(simd, up, vector * S::LANES), *delta);
            }
        }
    }
    for (vector, delta) in deltas.into_iter().enumerate().take(vectors) {
        // SAFETY: `sums` holds 32 f32, as checked.
        unsafe {
            let to = sums.as_mut_ptr().add(vector * S::LANES);
            simd.store(to, simd.add(simd.load(to), delta));
        }
    }
}
