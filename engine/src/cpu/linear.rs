//! Matrix times packed weights.
//!
//! One output is one sum along the depth, from front to back, in one accumulator: the number of rows, the tile it is in, the
//! cut of the depth into cache-sized blocks (partial sums are stored and loaded as they are) and the thread change nothing.
//! That is all there is to batch invariance here. The tile unit ([`super::amx`]) has another order, and keeps it as strictly.
//!
//! Precision: sums are f32. With f32 and f16 weights inputs stay f32; with bf16 weights inputs are rounded to bf16 on every
//! machine. Integer weights meet inputs that are integers of sixteen bits with a scale for every 128 or fewer, or of eight bits
//! where they were made for that; eight-bit floats meet inputs rounded to bf16 ([`codes`]). Where groups of weights or the unit do not lend themselves to that, quantised weights are widened to the
//! f32 that they stand for ([`quantized`]), and their sums are those of an f32 matrix. Units differ in the last bits, so a cluster
//! whose workers continue each other's sequences to the bit is one of equal processors.

use super::{
    adapter::{self, Adapted},
    format::Format,
    packed::{Groups, PANEL},
    simd::{Simd, activate, scale_and_cap},
};
use crate::model::decoder::Activation;
use std::ops::Range;

pub(crate) mod codes;
pub(crate) mod floats;
pub(crate) mod quantized;
pub(crate) mod tiled;

/// Rows of one task.
pub(crate) const TASK_ROWS: usize = 192;
/// Panels of one task when its rows are many: their partial sums stay in a core's second-level cache.
pub(crate) const TASK_PANELS: usize = 4;
/// f32 of scratch that a task needs.
pub(crate) const SCRATCH: usize = TASK_ROWS * TASK_PANELS * PANEL;
/// Rows whose inputs fit every cache: their task may have any number of panels, one after the other.
pub(crate) const FEW_ROWS: usize = 16;
/// Inputs of many rows that stay in the second-level cache while a task's panels go by.
const CHUNK_INPUTS: usize = 2048;
/// Bytes of a panel that are used for all rows before the next: half a small second-level cache.
const BLOCK_BYTES: usize = 128 << 10;
/// How far ahead of use weights are asked for.
const PREFETCH_BYTES: usize = 8 << 10;

/// The outputs of some panels for some rows.
#[derive(Debug)]
pub(crate) struct LinearTask<'a> {
    /// First input row, in the [encoding](crate::cpu::encode::Encoding) that the kernel is for.
    pub(crate) input: *const u8,
    /// Bytes from row to row.
    pub(crate) input_stride: usize,
    /// At most [`TASK_ROWS`].
    pub(crate) rows: usize,
    /// Inputs of a row.
    pub(crate) depth: usize,
    /// The first panel's weights.
    pub(crate) panel: *const u8,
    /// Bytes from panel to panel.
    pub(crate) panel_bytes: usize,
    /// At most [`TASK_PANELS`] unless rows are [few](FEW_ROWS).
    pub(crate) panels: usize,
    /// How a panel of quantised weights is laid out; of no consequence for others.
    pub(crate) groups: Groups,
    /// Added to the sums, for each panel.
    pub(crate) bias: Option<&'a [[f32; PANEL]]>,
    /// Rows with a delta.
    pub(crate) adapted: Option<AdaptedRows<'a>>,
    /// Where the outputs of the first panel go; those of the others stand beside them.
    pub(crate) output: Output,
}

/// The deltas of a task's rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdaptedRows<'a> {
    /// One for each row of the task.
    pub(crate) rows: &'a [Option<Adapted<'a>>],
    /// The task's first panel, counted from the linear's.
    pub(crate) panel: usize,
}

/// What becomes of the sums of a panel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Output {
    /// Stored, `[rows][64]` with `stride` f32 from row to row.
    Store { to: *mut f32, stride: usize },
    /// Added to what is there.
    Add { to: *mut f32, stride: usize },
    /// Stored as `format`, the first `columns` of the panels alone, with `stride` bytes from row to row: what stands beside them
    /// belongs to another.
    Cast { to: *mut u8, stride: usize, format: Format, columns: usize },
    /// The activation, `[rows][64]` with `stride` bytes from row to row.
    Activate { to: *mut u8, stride: usize, format: Format, activation: Activation },
    /// The activation of the first half of the panel times the second half, `[rows][32]` with `stride` bytes from row to row.
    Gate { to: *mut u8, stride: usize, format: Format, activation: Activation },
    /// The largest of the first `columns` alone, once scaled and capped, `[rows][panels]` with `stride` from row to row; the first
    /// output of the panel is the linear's output `first`.
    Largest { to: *mut Largest, stride: usize, first: usize, columns: usize, scale: f32, cap: Option<f32> },
}

/// The largest number of a row's panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Largest {
    /// Minus infinity where no number is larger.
    pub(crate) value: f32,
    /// The first output that has it.
    pub(crate) column: u32,
}

impl Largest {
    /// Returns which output of a row is the largest, the first of equals, from the largest of its panels in order.
    pub(crate) fn first(panels: &[Largest]) -> Option<u32> {
        let larger = |best: (f32, _), panel: &Largest| match panel.value > best.0 {
            true => (panel.value, Some(panel.column)),
            false => best,
        };
        panels.iter().fold((f32::NEG_INFINITY, None), larger).1
    }
}

impl Output {
    /// Returns where row `row` of panel `panel` goes.
    #[inline(always)]
    pub(crate) fn part(self, row: usize, panel: usize) -> Self {
        // Only addresses: whoever writes vouches for them.
        match self {
            Output::Store { to, stride } => Output::Store { to: to.wrapping_add(row * stride + panel * PANEL), stride },
            Output::Add { to, stride } => Output::Add { to: to.wrapping_add(row * stride + panel * PANEL), stride },
            Output::Cast { to, stride, format, columns } => {
                let column = panel * PANEL * format.bytes();
                let columns = columns.saturating_sub(panel * PANEL);
                Output::Cast { to: to.wrapping_add(row * stride + column), stride, format, columns }
            }
            Output::Activate { to, stride, format, activation } => {
                let column = panel * PANEL * format.bytes();
                Output::Activate { to: to.wrapping_add(row * stride + column), stride, format, activation }
            }
            Output::Gate { to, stride, format, activation } => {
                let column = panel * PANEL / 2 * format.bytes();
                Output::Gate { to: to.wrapping_add(row * stride + column), stride, format, activation }
            }
            Output::Largest { to, stride, first, columns, scale, cap } => {
                let (to, first) = (to.wrapping_add(row * stride + panel), first + panel * PANEL);
                Output::Largest { to, stride, first, columns: columns.saturating_sub(panel * PANEL), scale, cap }
            }
        }
    }
}

/// Some inputs of some rows, and the weights of one panel that belong to them.
#[derive(Debug)]
pub(crate) struct Block {
    /// First row.
    pub(crate) input: *const u8,
    /// Bytes from row to row.
    pub(crate) input_stride: usize,
    pub(crate) rows: usize,
    /// The inputs of each row that are summed; the first is a multiple of 32.
    pub(crate) inputs: Range<usize>,
    /// The panel.
    pub(crate) panel: *const u8,
    pub(crate) groups: Groups,
    /// The weights that are used next, or any address.
    pub(crate) next: *const u8,
    /// `[rows][64]`, with room for whole tiles of 16 rows.
    pub(crate) sums: *mut f32,
    /// Go on from the sums that are there.
    pub(crate) resume: bool,
}

/// How the sums of a panel are computed.
pub(crate) trait PanelSums<S: Simd> {
    /// Writes the sums of a block.
    ///
    /// # Safety
    /// The pointers of `block` are valid for what they are documented to hold, and inputs as for [`run`].
    unsafe fn sum(simd: S, block: &Block);
}

/// Computes a task, with [`SCRATCH`] f32 for the sums.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, nobody else touches the outputs, and inputs can be
/// read (as anything finite) up to 32 elements and 16 rows, to the next multiple.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, P: PanelSums<S>>(simd: S, task: &LinearTask<'_>, scratch: &mut [f32]) {
    if task.rows <= FEW_ROWS {
        for panel in 0..task.panels {
            // SAFETY: passed on.
            unsafe {
                sum_chunk::<S, P>(simd, task, panel, 0..task.depth, scratch);
                finish_panel(simd, task, panel, scratch);
            }
        }
        return;
    }
    let panel_sums = task.rows.next_multiple_of(16) * PANEL;
    for first in (0..task.depth).step_by(CHUNK_INPUTS) {
        let inputs = first..task.depth.min(first + CHUNK_INPUTS);
        for (panel, sums) in scratch.chunks_exact_mut(panel_sums).enumerate().take(task.panels) {
            // SAFETY: passed on.
            unsafe { sum_chunk::<S, P>(simd, task, panel, inputs.clone(), sums) };
        }
    }
    for (panel, sums) in scratch.chunks_exact_mut(panel_sums).enumerate().take(task.panels) {
        // SAFETY: passed on.
        unsafe { finish_panel(simd, task, panel, sums) };
    }
}

/// Sums some inputs of all rows for one panel.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn sum_chunk<S: Simd, P: PanelSums<S>>(
    simd: S,
    task: &LinearTask<'_>,
    panel: usize,
    inputs: Range<usize>,
    sums: &mut [f32],
) {
    assert!(sums.len() >= task.rows.next_multiple_of(16) * PANEL);
    // SAFETY: inputs and panel lie in what the caller vouches for, and `sums` has the room, as just checked.
    unsafe {
        let start = task.panel.add(panel * task.panel_bytes);
        // As far into the next panel as this chunk begins in this one; all of a panel is followed by the next.
        let into = task.panel_bytes / task.depth * inputs.start;
        let block = Block {
            input: task.input,
            input_stride: task.input_stride,
            rows: task.rows,
            panel: start,
            groups: task.groups,
            next: start.wrapping_add(task.panel_bytes + into),
            sums: sums.as_mut_ptr(),
            resume: inputs.start > 0,
            inputs,
        };
        P::sum(simd, &block);
    }
}

/// Adds the biases and deltas of a panel and writes its outputs.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn finish_panel<S: Simd>(simd: S, task: &LinearTask<'_>, panel: usize, sums: &mut [f32]) {
    let sums = &mut sums[..task.rows * PANEL];
    if let Some(bias) = task.bias {
        for row in sums.chunks_exact_mut(PANEL) {
            row.iter_mut().zip(&bias[panel]).for_each(|(sum, bias)| *sum += bias);
        }
    }
    if let Some(adapted) = task.adapted {
        for (row, sums) in adapted.rows.iter().zip(sums.chunks_exact_mut(PANEL)) {
            if let Some(row) = row {
                adapter::add(simd, row, adapted.panel + panel, sums);
            }
        }
    }
    for (row, sums) in sums.chunks_exact_mut(PANEL).enumerate() {
        // SAFETY: passed on.
        unsafe { write(simd, task.output.part(0, panel), row, sums) };
    }
}

/// # Safety
/// Row `row` of `output` is valid and ours.
#[inline(always)]
unsafe fn write<S: Simd>(simd: S, output: Output, row: usize, sums: &mut [f32]) {
    if let Output::Largest { to, stride, first, columns, scale, cap } = output {
        if scale != 1.0 || cap.is_some() {
            scale_and_cap(simd, sums, scale, cap);
        }
        let largest = largest(simd, sums, first, columns);
        // SAFETY: the row is the caller's word.
        unsafe { to.add(row * stride).write(largest) };
        return;
    }
    if let Output::Cast { to, stride, format, columns } = output {
        // SAFETY: the row's columns are the caller's word.
        unsafe { format.store_slice(simd, to.add(row * stride), 0, &sums[..columns.min(PANEL)]) };
        return;
    }
    let sums = sums.as_ptr();
    for column in (0..PANEL).step_by(S::LANES) {
        // SAFETY: `sums` holds 64 f32, a multiple of LANES; the row of the output is the caller's word.
        unsafe {
            match output {
                Output::Store { to, stride } => simd.store(to.add(row * stride + column), simd.load(sums.add(column))),
                Output::Add { to, stride } => {
                    let to = to.add(row * stride + column);
                    simd.store(to, simd.add(simd.load(to), simd.load(sums.add(column))));
                }
                Output::Activate { to, stride, format, activation } => {
                    let value = activate(simd, activation, simd.load(sums.add(column)));
                    format.store(simd, to.add(row * stride), column, value);
                }
                Output::Gate { to, stride, format, activation } if column < PANEL / 2 => {
                    let gate = activate(simd, activation, simd.load(sums.add(column)));
                    let up = simd.load(sums.add(PANEL / 2 + column));
                    format.store(simd, to.add(row * stride), column, simd.mul(gate, up));
                }
                Output::Gate { .. } | Output::Cast { .. } | Output::Largest { .. } => {}
            }
        }
    }
}

/// Finds the largest of the first `columns` of a panel's `sums`, the lowest of equals; what is no number is passed over.
#[inline(always)]
fn largest<S: Simd>(simd: S, sums: &mut [f32], first: usize, columns: usize) -> Largest {
    assert_eq!(sums.len(), PANEL);
    sums[columns.min(PANEL)..].fill(f32::NEG_INFINITY);
    let mut vector = simd.splat(f32::NEG_INFINITY);
    for column in (0..PANEL).step_by(S::LANES) {
        // SAFETY: `sums` holds 64 f32, as checked, a multiple of LANES.
        vector = simd.max(unsafe { simd.load(sums.as_ptr().add(column)) }, vector);
    }
    let value = simd.max_lane(vector);
    let column = sums.iter().position(|sum| *sum == value).unwrap_or(0);
    Largest { value, column: (first + column) as u32 }
}

#[cfg(test)]
mod tests;
