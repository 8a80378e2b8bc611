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

#[cfg(target_arch = "x86_64")]
use super::simd::DotBf16;
use super::{
    adapter::{self, Adapted},
    format::Format,
    packed::{Groups, PANEL},
    simd::{Simd, activate, scale_and_cap},
};
use crate::model::decoder::Activation;
use std::ops::Range;

pub(crate) mod codes;
pub(crate) mod quantized;

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

/// How weights of one type meet their inputs.
pub(crate) trait Weights<S: Simd> {
    /// One step of `LANES` outputs.
    type Columns: Copy;
    /// One step of a row's inputs, in every lane.
    type Input: Copy;
    /// Inputs that a step uses.
    const STEP: usize;
    /// Registers that a vector of a step takes once widened.
    const REGISTERS: usize;
    /// Bytes of a step of one output.
    const COLUMN_BYTES: usize;
    /// Bytes of a step of a row's inputs.
    const INPUT_BYTES: usize;

    /// # Safety
    /// A step of `LANES` outputs can be read.
    unsafe fn columns(simd: S, from: *const u8) -> Self::Columns;
    /// # Safety
    /// A step of inputs can be read.
    unsafe fn input(simd: S, from: *const u8) -> Self::Input;
    fn accumulate(simd: S, sum: S::F, input: Self::Input, columns: Self::Columns) -> S::F;
}

/// f32 weights, f32 inputs.
pub(crate) struct F32;

impl<S: Simd> Weights<S> for F32 {
    type Columns = S::F;
    type Input = S::F;
    const STEP: usize = 1;
    const REGISTERS: usize = 1;
    const COLUMN_BYTES: usize = 4;
    const INPUT_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn columns(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller vouches for the step.
        unsafe { simd.load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn input(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller vouches for the step.
        simd.splat(unsafe { from.cast::<f32>().read() })
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::F, input: S::F, columns: S::F) -> S::F {
        simd.fma(input, columns, sum)
    }
}

/// f16 weights, f32 inputs.
pub(crate) struct F16;

impl<S: Simd> Weights<S> for F16 {
    type Columns = S::F;
    type Input = S::F;
    const STEP: usize = 1;
    const REGISTERS: usize = 1;
    const COLUMN_BYTES: usize = 2;
    const INPUT_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn columns(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller vouches for the step.
        unsafe { simd.load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn input(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller vouches for the step.
        simd.splat(unsafe { from.cast::<f32>().read() })
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::F, input: S::F, columns: S::F) -> S::F {
        simd.fma(input, columns, sum)
    }
}

/// bf16 weights, inputs rounded to bf16 and kept as f32.
pub(crate) struct Bf16Widened;

impl<S: Simd> Weights<S> for Bf16Widened {
    type Columns = (S::F, S::F);
    type Input = (S::F, S::F);
    const STEP: usize = 2;
    const REGISTERS: usize = 2;
    const COLUMN_BYTES: usize = 4;
    const INPUT_BYTES: usize = 8;

    #[inline(always)]
    unsafe fn columns(simd: S, from: *const u8) -> Self::Columns {
        // SAFETY: the caller vouches for the step.
        unsafe { simd.load_bf16_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn input(simd: S, from: *const u8) -> Self::Input {
        // SAFETY: the caller vouches for the step, two f32.
        let [first, second] = unsafe { from.cast::<[f32; 2]>().read() };
        (simd.splat(first), simd.splat(second))
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::F, input: Self::Input, columns: Self::Columns) -> S::F {
        simd.fma(input.1, columns.1, simd.fma(input.0, columns.0, sum))
    }
}

/// bf16 weights, bf16 inputs, the machine's dot instruction.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Bf16Dot;

#[cfg(target_arch = "x86_64")]
impl<S: DotBf16> Weights<S> for Bf16Dot {
    type Columns = S::Pairs;
    type Input = S::Pairs;
    const STEP: usize = 2;
    const REGISTERS: usize = 1;
    const COLUMN_BYTES: usize = 4;
    const INPUT_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn columns(simd: S, from: *const u8) -> S::Pairs {
        // SAFETY: the caller vouches for the step.
        unsafe { simd.load_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn input(simd: S, from: *const u8) -> S::Pairs {
        // SAFETY: the caller vouches for the step, two bf16; rows start at multiples of 64 bytes.
        simd.splat_pair(unsafe { from.cast::<u32>().read() })
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::F, input: S::Pairs, columns: S::Pairs) -> S::F {
        simd.dot(sum, input, columns)
    }
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

/// Sums in register tiles of a vector unit.
pub(crate) struct Tiled<W>(std::marker::PhantomData<W>);

impl<S: Simd, W: Weights<S>> PanelSums<S> for Tiled<W> {
    #[inline(always)]
    unsafe fn sum(simd: S, block: &Block) {
        let steps = block.inputs.end.div_ceil(W::STEP);
        let each = BLOCK_BYTES / (PANEL * W::COLUMN_BYTES);
        for first in (block.inputs.start / W::STEP..steps).step_by(each) {
            let last = steps.min(first + each);
            let at = |step: usize| block.panel.wrapping_add(step * PANEL * W::COLUMN_BYTES);
            let next = if last == steps { block.next } else { at(last) };
            let tiles = tiles::<S, W>(block.rows);
            let mut ahead = Ahead::new(at(first), next, PANEL * W::COLUMN_BYTES, last - first, tiles);
            // SAFETY: passed on; the steps are some of the block's.
            unsafe { sum_steps::<S, W, _>(simd, block, first..last, &mut ahead) };
        }
    }
}

impl<W> Tiled<W> {
    /// Writes the sums of a block whose inputs are few enough to be used at once, asking for something else than weights.
    ///
    /// # Safety
    /// As for [`PanelSums::sum`].
    #[inline(always)]
    pub(crate) unsafe fn sum_asking<S: Simd, A: Asks<S>>(simd: S, block: &Block, asks: &mut A)
    where
        W: Weights<S>,
    {
        let steps = block.inputs.start / W::STEP..block.inputs.end.div_ceil(W::STEP);
        // SAFETY: passed on.
        unsafe { sum_steps::<S, W, A>(simd, block, steps, asks) };
    }

    /// Says whether one tile, or one beside the other, takes `rows` rows.
    pub(crate) fn is_one<S: Simd>(rows: usize) -> bool
    where
        W: Weights<S>,
    {
        tile_shape::<S, W>(rows).0 == rows
    }

    /// Writes the sums of a block whose columns stand elsewhere than in its panel. The rows are not more than a tile takes.
    ///
    /// # Safety
    /// As for [`PanelSums::sum`], with as many steps in `columns` as the block's inputs take, the first of them for the first.
    #[inline(always)]
    pub(crate) unsafe fn sum_elsewhere<S: Simd, A: Asks<S>, C: Columns<S, W>>(
        simd: S,
        block: &Block,
        columns: C,
        asks: &mut A,
    ) where
        W: Weights<S>,
    {
        let (rows, width) = tile_shape::<S, W>(block.rows);
        assert_eq!(rows, block.rows, "the rows are one tile's");
        let begin = block.inputs.start / W::STEP;
        for column in (0..PANEL).step_by(width) {
            // SAFETY: passed on.
            unsafe {
                let tile = Tile {
                    input: block.input.add(begin * W::INPUT_BYTES),
                    input_stride: block.input_stride,
                    steps: block.inputs.end.div_ceil(W::STEP) - begin,
                    sums: block.sums.add(column),
                    resume: block.resume,
                };
                run_tile::<S, W, A, C>(simd, rows, &tile, columns.at(column), asks);
            }
        }
    }
}

/// Takes all rows of a block through some of its steps.
///
/// # Safety
/// As for [`PanelSums::sum`], and the steps are some of the block's.
#[inline(always)]
unsafe fn sum_steps<S: Simd, W: Weights<S>, A: Asks<S>>(simd: S, block: &Block, steps: Range<usize>, asks: &mut A) {
    let mut row = 0;
    while row < block.rows {
        let (rows, columns) = tile_shape::<S, W>(block.rows - row);
        for column in (0..PANEL).step_by(columns) {
            // SAFETY: the steps lie in the panel, the rows in the input, and the tile in `sums`.
            unsafe {
                let tile = Tile {
                    input: block.input.add(row * block.input_stride + steps.start * W::INPUT_BYTES),
                    input_stride: block.input_stride,
                    steps: steps.len(),
                    sums: block.sums.add(row * PANEL + column),
                    resume: block.resume || steps.start > block.inputs.start / W::STEP,
                };
                let panel = InPanel(block.panel.add((steps.start * PANEL + column) * W::COLUMN_BYTES));
                run_tile::<S, W, A, InPanel>(simd, rows, &tile, panel, asks);
            }
        }
        row += rows;
    }
}

struct Tile {
    input: *const u8,
    input_stride: usize,
    steps: usize,
    sums: *mut f32,
    /// Go on from the sums that are there.
    resume: bool,
}

/// Where a tile's columns stand, and how far it has read them.
pub(crate) trait Columns<S: Simd, W: Weights<S>>: Copy {
    /// Returns the same from column `column` of a panel on.
    fn at(self, column: usize) -> Self;

    /// Reads the columns of a step, and goes on to the next.
    ///
    /// # Safety
    /// There is a step left, of at least `VECTORS` vectors.
    unsafe fn step<const VECTORS: usize>(&mut self, simd: S) -> [W::Columns; VECTORS];
}

/// Columns in their panel.
#[derive(Clone, Copy)]
struct InPanel(*const u8);

impl<S: Simd, W: Weights<S>> Columns<S, W> for InPanel {
    #[inline(always)]
    fn at(self, column: usize) -> Self {
        Self(self.0.wrapping_add(column * W::COLUMN_BYTES))
    }

    #[inline(always)]
    unsafe fn step<const VECTORS: usize>(&mut self, simd: S) -> [W::Columns; VECTORS] {
        // SAFETY: the caller vouches for the step.
        unsafe {
            let mut columns = [W::columns(simd, self.0); VECTORS];
            for (vector, columns) in columns.iter_mut().enumerate() {
                *columns = W::columns(simd, self.0.add(vector * S::LANES * W::COLUMN_BYTES));
            }
            self.0 = self.0.add(PANEL * W::COLUMN_BYTES);
            columns
        }
    }
}

/// Memory that is asked for while tiles compute.
pub(crate) trait Asks<S: Simd> {
    /// Asks for what a step of a tile is to ask for.
    fn step(&mut self, simd: S);
}

/// Weights that are asked for while others are used. Where several tiles use a block, one after the other, each asks for its
/// share of the block that comes next, so that memory is busy all the time; where one tile does, it asks for what is a little
/// ahead of it.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    at: *const u8,
    /// Bytes for each step of a tile.
    step: usize,
    /// Bytes for each tile.
    tile: usize,
}

impl Ahead {
    /// Starts a block of `steps` steps of `bytes` bytes at `here` that is followed by what is at `next`.
    #[inline(always)]
    pub(crate) fn new(here: *const u8, next: *const u8, bytes: usize, steps: usize, tiles: usize) -> Self {
        let at = if tiles == 1 { here.wrapping_add(PREFETCH_BYTES) } else { next };
        Self { at, step: bytes / tiles, tile: bytes / tiles * steps }
    }

    /// Asks for `bytes` that lie between two steps.
    #[inline(always)]
    pub(crate) fn between<S: Simd>(&mut self, simd: S, bytes: usize) {
        for line in (0..bytes).step_by(64) {
            simd.prefetch(self.at.wrapping_add(line));
        }
        self.at = self.at.wrapping_add(bytes);
    }

    /// Returns the share of the next tile.
    #[inline(always)]
    pub(crate) fn share(&mut self) -> Self {
        let share = *self;
        self.at = self.at.wrapping_add(self.tile);
        share
    }
}

impl<S: Simd> Asks<S> for Ahead {
    #[inline(always)]
    fn step(&mut self, simd: S) {
        simd.prefetch(self.at);
        if self.step > 64 {
            simd.prefetch(self.at.wrapping_add(64));
            if self.step > 128 {
                simd.prefetch(self.at.wrapping_add(128));
                simd.prefetch(self.at.wrapping_add(192));
            }
        }
        self.at = self.at.wrapping_add(self.step);
    }
}

/// Returns how many tiles `rows` rows of a panel take.
#[inline(always)]
fn tiles<S: Simd, W: Weights<S>>(rows: usize) -> usize {
    let (mut row, mut tiles) = (0, 0);
    while row < rows {
        let (rows, columns) = tile_shape::<S, W>(rows - row);
        row += rows;
        tiles += PANEL / columns;
    }
    tiles
}

/// Chooses rows and columns of the next tile so that its sums, with a step of weights, fill the registers. A batch of 7 to
/// 14 rows is read in one go: taken in two, it would pay for the cache twice. Weights that are widened are best used for
/// many rows.
#[inline(always)]
fn tile_shape<S: Simd, W: Weights<S>>(rows: usize) -> (usize, usize) {
    match (S::LANES, W::REGISTERS, rows) {
        (16, 1, 7..=14) => (rows, 32),
        (16, 1, _) => (rows.min(6), PANEL),
        (16, _, 1..=4) => (rows, PANEL),
        (16, ..) => (rows.min(12), 32),
        (_, _, 1) => (1, PANEL),
        _ => (rows.min(4), 2 * S::LANES),
    }
}

/// # Safety
/// As for [`sum_tile`].
#[inline(always)]
unsafe fn run_tile<S: Simd, W: Weights<S>, A: Asks<S>, C: Columns<S, W>>(
    simd: S,
    rows: usize,
    tile: &Tile,
    columns: C,
    asks: &mut A,
) {
    // SAFETY: passed on.
    unsafe {
        if S::LANES == 16 {
            match rows {
                1 => sum_tile::<S, W, A, C, 1, 4>(simd, tile, columns, asks),
                2 => sum_tile::<S, W, A, C, 2, 4>(simd, tile, columns, asks),
                3 => sum_tile::<S, W, A, C, 3, 4>(simd, tile, columns, asks),
                4 => sum_tile::<S, W, A, C, 4, 4>(simd, tile, columns, asks),
                5 if W::REGISTERS == 2 => sum_tile::<S, W, A, C, 5, 2>(simd, tile, columns, asks),
                5 => sum_tile::<S, W, A, C, 5, 4>(simd, tile, columns, asks),
                6 if W::REGISTERS == 2 => sum_tile::<S, W, A, C, 6, 2>(simd, tile, columns, asks),
                6 => sum_tile::<S, W, A, C, 6, 4>(simd, tile, columns, asks),
                7 => sum_tile::<S, W, A, C, 7, 2>(simd, tile, columns, asks),
                8 => sum_tile::<S, W, A, C, 8, 2>(simd, tile, columns, asks),
                9 => sum_tile::<S, W, A, C, 9, 2>(simd, tile, columns, asks),
                10 => sum_tile::<S, W, A, C, 10, 2>(simd, tile, columns, asks),
                11 => sum_tile::<S, W, A, C, 11, 2>(simd, tile, columns, asks),
                12 => sum_tile::<S, W, A, C, 12, 2>(simd, tile, columns, asks),
                13 => sum_tile::<S, W, A, C, 13, 2>(simd, tile, columns, asks),
                14 => sum_tile::<S, W, A, C, 14, 2>(simd, tile, columns, asks),
                _ => unreachable!("tile_shape gives at most 14 rows"),
            }
        } else {
            match rows {
                1 => sum_tile::<S, W, A, C, 1, 8>(simd, tile, columns, asks),
                2 => sum_tile::<S, W, A, C, 2, 2>(simd, tile, columns, asks),
                3 => sum_tile::<S, W, A, C, 3, 2>(simd, tile, columns, asks),
                4 => sum_tile::<S, W, A, C, 4, 2>(simd, tile, columns, asks),
                _ => unreachable!("tile_shape gives at most 4 rows"),
            }
        }
    }
}

/// # Safety
/// `ROWS` rows of `steps` steps can be read from `input`, `steps` steps of `VECTORS` vectors from `columns`, and `ROWS` rows of
/// `VECTORS` vectors can be written to `sums`.
#[inline(always)]
unsafe fn sum_tile<S: Simd, W: Weights<S>, A: Asks<S>, C: Columns<S, W>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &Tile,
    mut columns: C,
    asks: &mut A,
) {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    // SAFETY: all reads and writes below are within what the caller vouches for; `wrapping_add` only makes a prefetch address.
    unsafe {
        if tile.resume {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.load(tile.sums.add(row * PANEL + vector * S::LANES));
                }
            }
        }
        let mut input = tile.input;
        for _ in 0..tile.steps {
            asks.step(simd);
            let columns: [W::Columns; VECTORS] = columns.step(simd);
            for (row, sums) in sums.iter_mut().enumerate() {
                let input = W::input(simd, input.add(row * tile.input_stride));
                for (sum, columns) in sums.iter_mut().zip(columns) {
                    *sum = W::accumulate(simd, *sum, input, columns);
                }
            }
            input = input.add(W::INPUT_BYTES);
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                simd.store(tile.sums.add(row * PANEL + vector * S::LANES), *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests;
