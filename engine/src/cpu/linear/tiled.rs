//! Sums in register tiles: some rows of inputs meet a step of columns at a time, and what comes next is asked for meanwhile.

use super::{BLOCK_BYTES, Block, PREFETCH_BYTES, PanelSums};
use crate::cpu::{packed::PANEL, simd::Simd};
use std::ops::Range;

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
