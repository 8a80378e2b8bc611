//! Sums of codes: quantised weights that meet their inputs as they are.
//!
//! The inputs of an output are summed segment by segment. Integers meet the codes of their inputs ([`crate::cpu::encode`]): four
//! products of bytes or two of sixteen bits for each lane and instruction, exact sums, so that within a segment there is no order
//! and no rounding.
//! Eight-bit floats become the bf16 that they are exactly and meet bf16 inputs. At the end of a segment its sum is an f32, times
//! the scale of the inputs, and one multiply-add with the scale of the weights brings it to the output's total. A total is the
//! work of one accumulator from front to back, so its bits do not depend on rows, tiles or threads.
//!
//! Codes are unsigned: those of a weight count from [`Code::zero`](scheme::Code::zero), or from wherever their offset says. With
//! `w = scale * (code - zero)` the sum over a segment is `scale * (codes . inputs - zero * sum of inputs)`, and the second part
//! needs the inputs' sum alone; an offset costs a multiply-add for each segment. Nothing overflows: 128 products of a byte and
//! sixteen bits stay below 2^30.

use super::{
    BLOCK_BYTES, Block, PanelSums,
    tiled::{Ahead, Asks},
};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::DotBf16;
use crate::cpu::{
    packed::{Groups, PANEL, WORD_BYTES},
    scheme,
    simd::Simd,
};
use std::mem::MaybeUninit;

/// Repeats a block for each index below a constant of at most six, as straight code. Whether a compiler unrolls a loop depends on
/// what else is in it, and sums that a variable indexes live in memory instead of registers.
macro_rules! unrolled {
    ($index:ident < $count:expr, $body:block) => {
        unrolled!(@ $index, $count, $body, 0 1 2 3 4 5)
    };
    (@ $index:ident, $count:expr, $body:block, $($at:literal)*) => {
        $(if $at < $count {
            let $index: usize = $at;
            $body
        })*
    };
}

/// How codes of one kind meet their inputs.
pub(crate) trait Code<S: Simd> {
    /// Which kind.
    const CODE: scheme::Code;
    /// What the inputs are.
    const INPUTS: Inputs;
    /// Most rows of a tile, which is as wide as a panel, on a unit with 32 registers.
    const TILE_ROWS: usize;
    /// Steps of a word: each meets four bytes of a row's inputs.
    const STEPS: usize;
    /// Whether a word that many tiles use is taken apart once for all of them. What comes of it goes through memory, which pays where taking
    /// apart is long.
    const EXPANDS: bool = false;
    /// The sum of a segment, one for each lane.
    type Sum: Copy;
    /// What a step of a row's inputs meets, one for each lane.
    type Columns: Copy;

    /// Where the sum of a segment begins whose inputs sum to `inputs`, so that codes count from their zero.
    fn start(simd: S, inputs: i32) -> Self::Sum;
    /// Returns step `step` of a word of each output.
    fn step(simd: S, words: S::W, step: usize) -> Self::Columns;
    fn accumulate(simd: S, sum: Self::Sum, input: u32, columns: Self::Columns) -> Self::Sum;
    /// Adds two sums of parts of a segment.
    fn join(simd: S, a: Self::Sum, b: Self::Sum) -> Self::Sum;
    /// Ends a segment.
    fn finish(simd: S, sum: Self::Sum) -> S::F;
}

/// What codes meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inputs {
    /// Codes of eight bits.
    Bytes,
    /// Codes of sixteen bits.
    Halves,
    /// bf16.
    Bf16,
}

impl Inputs {
    /// Returns the bytes of one input.
    const fn bytes(self) -> usize {
        match self {
            Inputs::Bytes => 1,
            Inputs::Halves | Inputs::Bf16 => 2,
        }
    }
}

/// Integers of `BITS` bits, four or eight, and codes of sixteen.
pub(crate) struct Integers<const BITS: usize>;

impl<S: Simd, const BITS: usize> Code<S> for Integers<BITS> {
    const CODE: scheme::Code = if BITS == 4 { scheme::Code::Int4 } else { scheme::Code::Int8 };
    const INPUTS: Inputs = Inputs::Halves;
    const TILE_ROWS: usize = 5;
    const STEPS: usize = 16 / BITS;
    type Sum = S::W;
    type Columns = S::W;

    #[inline(always)]
    fn start(simd: S, inputs: i32) -> S::W {
        let zero = 1 << (BITS - 1);
        simd.splat_word((-zero * inputs) as u32)
    }

    #[inline(always)]
    fn step(simd: S, words: S::W, step: usize) -> S::W {
        let code = (1 << BITS) - 1;
        simd.field(words, step * BITS / 4, code << 16 | code)
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::W, input: u32, columns: S::W) -> S::W {
        simd.dot_halves(sum, columns, simd.splat_word(input))
    }

    #[inline(always)]
    fn join(simd: S, a: S::W, b: S::W) -> S::W {
        simd.add_words(a, b)
    }

    #[inline(always)]
    fn finish(simd: S, sum: S::W) -> S::F {
        simd.integers(sum)
    }
}

/// Eight-bit integers and codes of eight bits.
pub(crate) struct W8a8;

impl<S: Simd> Code<S> for W8a8 {
    const CODE: scheme::Code = scheme::Code::Int8;
    const INPUTS: Inputs = Inputs::Bytes;
    const TILE_ROWS: usize = 6;
    const STEPS: usize = 1;
    type Sum = S::W;
    type Columns = S::W;

    #[inline(always)]
    fn start(simd: S, inputs: i32) -> S::W {
        simd.splat_word((-128 * inputs) as u32)
    }

    #[inline(always)]
    fn step(_: S, words: S::W, _: usize) -> S::W {
        words
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::W, input: u32, columns: S::W) -> S::W {
        simd.dot_bytes(sum, columns, simd.splat_word(input))
    }

    #[inline(always)]
    fn join(simd: S, a: S::W, b: S::W) -> S::W {
        simd.add_words(a, b)
    }

    #[inline(always)]
    fn finish(simd: S, sum: S::W) -> S::F {
        simd.integers(sum)
    }
}

/// Eight-bit floats and bf16 inputs.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Fp8;

#[cfg(target_arch = "x86_64")]
impl<S: DotBf16> Code<S> for Fp8 {
    const CODE: scheme::Code = scheme::Code::Fp8;
    const INPUTS: Inputs = Inputs::Bf16;
    // The tables that widen a code take four registers.
    const TILE_ROWS: usize = 4;
    const STEPS: usize = 2;
    const EXPANDS: bool = true;
    type Sum = S::F;
    type Columns = S::Pairs;

    #[inline(always)]
    fn step(simd: S, words: S::W, step: usize) -> S::Pairs {
        let [first, last] = simd.e4m3_pairs(words);
        if step == 0 { first } else { last }
    }

    #[inline(always)]
    fn accumulate(simd: S, sum: S::F, input: u32, columns: S::Pairs) -> S::F {
        simd.dot(sum, simd.splat_pair(input), columns)
    }

    #[inline(always)]
    fn start(simd: S, _: i32) -> S::F {
        simd.splat(0.0)
    }

    #[inline(always)]
    fn join(simd: S, a: S::F, b: S::F) -> S::F {
        simd.add(a, b)
    }

    #[inline(always)]
    fn finish(_: S, sum: S::F) -> S::F {
        sum
    }
}

/// Sums of codes of one kind.
pub(crate) struct Coded<C>(std::marker::PhantomData<C>);

impl<S: Simd, C: Code<S>> PanelSums<S> for Coded<C> {
    #[inline(always)]
    unsafe fn sum(simd: S, block: &Block) {
        let expand = C::EXPANDS && S::LANES == 16 && block.rows > 4 * C::TILE_ROWS;
        let mut expanded = Expanded::new();
        let each = if expand { Expanded::INPUTS } else { BLOCK_BYTES / WORD_BYTES * C::CODE.per_word() };
        for first in block.inputs.clone().step_by(each) {
            let last = block.inputs.end.min(first + each);
            let groups = &block.groups;
            let here = groups.word(block.panel, first, C::CODE);
            let next = if last == block.inputs.end { block.next } else { groups.word(block.panel, last, C::CODE) };
            let steps = (last - first).div_ceil(C::CODE.per_word());
            let mut ahead = Ahead::new(here, next, WORD_BYTES, steps, tiles::<S, C>(block.rows, expand));
            if expand {
                // SAFETY: the inputs lie in the panel and are not more than there is room for.
                unsafe { expanded.fill::<S, C>(simd, block, first, last) };
            }
            let mut row = 0;
            while row < block.rows {
                let (rows, columns) = tile_shape::<S, C>(block.rows - row, expand);
                for column in (0..PANEL).step_by(columns) {
                    let tile = Tile {
                        input: block.input.wrapping_add(row * block.input_stride),
                        input_stride: block.input_stride,
                        panel: block.panel,
                        column,
                        first,
                        last,
                        groups: block.groups,
                        sums: block.sums.wrapping_add(row * PANEL + column),
                        resume: block.resume || first > block.inputs.start,
                        ahead: ahead.share(),
                        expanded: &expanded,
                    };
                    // SAFETY: the rows lie in the input, the inputs in the panel and the tile in `sums`; what is expanded is that of
                    // these inputs.
                    unsafe {
                        if expand {
                            run_tile::<S, C, true>(simd, rows, &tile);
                        } else {
                            run_tile::<S, C, false>(simd, rows, &tile);
                        }
                    }
                }
                row += rows;
            }
        }
    }
}

/// The steps of a block's words, taken apart once for many rows: `[steps][64]` of four bytes, in the order of the inputs.
#[repr(align(64))]
struct Expanded([MaybeUninit<u8>; Self::INPUTS * PANEL * 2]);

impl Expanded {
    /// Inputs of a block: whole segments, and what becomes of them stays in a second-level cache. A step is two inputs.
    const INPUTS: usize = 512;

    #[inline(always)]
    fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; _])
    }

    /// Takes apart the words of inputs `first .. last`.
    ///
    /// # Safety
    /// The inputs lie in the panel, `first` is that of a segment, and they are at most [`Expanded::INPUTS`].
    #[inline(always)]
    unsafe fn fill<S: Simd, C: Code<S>>(&mut self, simd: S, block: &Block, first: usize, last: usize) {
        let segment = block.groups.rows.segment;
        let mut to = self.0.as_mut_ptr();
        for at in (first..last).step_by(segment) {
            let words = (last.min(at + segment) - at).div_ceil(C::CODE.per_word());
            let from = block.groups.word(block.panel, at, C::CODE).cast::<u32>();
            for word in 0..words {
                for vector in 0..PANEL / S::LANES {
                    // SAFETY: a segment has whole words, and each has room for its steps.
                    unsafe {
                        let words = simd.load_words(from.add(word * PANEL + vector * S::LANES));
                        for step in 0..C::STEPS {
                            let columns = C::step(simd, words, step);
                            let at = (word * C::STEPS + step) * PANEL + vector * S::LANES;
                            to.add(at * 4).cast::<C::Columns>().write_unaligned(columns);
                        }
                    }
                }
            }
            to = to.wrapping_add(words * C::STEPS * PANEL * 4);
        }
    }

    /// Returns the first step of the input that stands `inputs` behind the first, the first of a segment.
    #[inline(always)]
    fn step<S: Simd, C: Code<S>>(&self, inputs: usize) -> *const u8 {
        self.0.as_ptr().cast::<u8>().wrapping_add(inputs / C::CODE.per_word() * C::STEPS * PANEL * 4)
    }
}

struct Tile<'a> {
    /// First row.
    input: *const u8,
    input_stride: usize,
    panel: *const u8,
    /// First output.
    column: usize,
    /// Inputs; the first is that of a segment.
    first: usize,
    last: usize,
    groups: Groups,
    sums: *mut f32,
    /// Go on from the sums that are there.
    resume: bool,
    ahead: Ahead,
    expanded: &'a Expanded,
}

/// Chooses rows and columns of the next tile: sums, words and what is made of them share the registers. Rows are shared out
/// evenly, for a tile of few rows waits for its weights.
#[inline(always)]
fn tile_shape<S: Simd, C: Code<S>>(rows: usize, expanded: bool) -> (usize, usize) {
    let even = |most: usize| rows.div_ceil(rows.div_ceil(most));
    match (S::LANES, rows) {
        (16, _) => (even(if expanded { 6 } else { C::TILE_ROWS }), PANEL),
        (_, 1) => (1, 4 * S::LANES),
        _ => (even(4), 2 * S::LANES),
    }
}

/// Returns how many tiles `rows` rows of a panel take.
#[inline(always)]
fn tiles<S: Simd, C: Code<S>>(rows: usize, expanded: bool) -> usize {
    let (mut row, mut tiles) = (0, 0);
    while row < rows {
        let (rows, columns) = tile_shape::<S, C>(rows - row, expanded);
        row += rows;
        tiles += PANEL / columns;
    }
    tiles
}

/// # Safety
/// As for [`sum_tile`].
#[inline(always)]
unsafe fn run_tile<S: Simd, C: Code<S>, const EXPANDED: bool>(simd: S, rows: usize, tile: &Tile<'_>) {
    // SAFETY: passed on.
    unsafe {
        if S::LANES < 16 {
            return match rows {
                1 => sum_tile::<S, C, 1, 4, EXPANDED>(simd, tile),
                2 => sum_tile::<S, C, 2, 2, EXPANDED>(simd, tile),
                3 => sum_tile::<S, C, 3, 2, EXPANDED>(simd, tile),
                4 => sum_tile::<S, C, 4, 2, EXPANDED>(simd, tile),
                _ => unreachable!("tile_shape gives at most 4 rows of shorter vectors"),
            };
        }
        let most = if EXPANDED { 6 } else { C::TILE_ROWS };
        match rows {
            1 => sum_tile::<S, C, 1, 4, EXPANDED>(simd, tile),
            2 => sum_tile::<S, C, 2, 4, EXPANDED>(simd, tile),
            3 => sum_tile::<S, C, 3, 4, EXPANDED>(simd, tile),
            4 => sum_tile::<S, C, 4, 4, EXPANDED>(simd, tile),
            5 if most >= 5 => sum_tile::<S, C, 5, 4, EXPANDED>(simd, tile),
            6 if most >= 6 => sum_tile::<S, C, 6, 4, EXPANDED>(simd, tile),
            _ => unreachable!("tile_shape gives at most {most} rows"),
        }
    }
}

/// # Safety
/// Inputs `first .. last` of `ROWS` rows can be read, their codes and what belongs to them from `panel`, and `ROWS` rows of
/// `VECTORS` vectors can be written to `sums`.
#[inline(always)]
unsafe fn sum_tile<S: Simd, C: Code<S>, const ROWS: usize, const VECTORS: usize, const EXPANDED: bool>(
    simd: S,
    tile: &Tile<'_>,
) {
    let (groups, rows) = (&tile.groups, tile.groups.rows);
    let mut ahead = tile.ahead;
    if !tile.resume {
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                // SAFETY: the tile lies in `sums`.
                unsafe { simd.store(tile.sums.add(row * PANEL + vector * S::LANES), simd.splat(0.0)) };
            }
        }
    }
    let mut at = tile.first;
    while at < tile.last {
        let last = tile.last.min(at + rows.segment);
        let segment = at / rows.segment;
        let words = (last - at).div_ceil(C::CODE.per_word());
        let panel =
            if EXPANDED { tile.expanded.step::<S, C>(at - tile.first) } else { groups.word(tile.panel, at, C::CODE) };
        let panel = panel.cast::<u32>().wrapping_add(tile.column);
        let header = tile.panel.wrapping_add(at / groups.inputs * groups.bytes);
        if ROWS == 1 && at.is_multiple_of(groups.inputs) {
            ahead.between(simd, groups.header_bytes());
        }
        // SAFETY: all reads and writes below are within what the caller vouches for: a row has a scale and a sum for each segment,
        // and codes up to whole words; a panel has whole words, and scales for the group that the segment is in.
        unsafe {
            let mut sums = [[C::start(simd, 0); VECTORS]; ROWS];
            if C::INPUTS != Inputs::Bf16 && !groups.offsets {
                unrolled!(row < ROWS, {
                    let inputs = tile.input.add(row * tile.input_stride + rows.sums).cast::<i32>().add(segment).read();
                    sums[row] = [C::start(simd, inputs); VECTORS];
                });
            }
            // One row's sums would wait for each other: where order is of no consequence every other step has its own.
            let apart = ROWS == 1 && C::INPUTS != Inputs::Bf16 && C::STEPS > 1;
            let mut others = [C::start(simd, 0); VECTORS];
            // What is expanded is read step by step, each a word of its own.
            let (words, steps) = if EXPANDED { (words * C::STEPS, 1) } else { (words, C::STEPS) };
            let mut input = tile.input.add(at * C::INPUTS.bytes());
            for word in 0..words {
                if !EXPANDED || word % C::STEPS == 0 {
                    ahead.step(simd);
                }
                let from = panel.add(word * PANEL);
                unrolled!(step < steps, {
                    let mut columns = [load::<S, C, EXPANDED>(simd, from, step); VECTORS];
                    unrolled!(vector < VECTORS, {
                        columns[vector] = load::<S, C, EXPANDED>(simd, from.add(vector * S::LANES), step);
                    });
                    unrolled!(row < ROWS, {
                        let input = input.add(row * tile.input_stride).cast::<u32>().read_unaligned();
                        unrolled!(vector < VECTORS, {
                            let sum = if apart && step % 2 == 1 { &mut others[vector] } else { &mut sums[row][vector] };
                            *sum = C::accumulate(simd, *sum, input, columns[vector]);
                        });
                    });
                    input = input.add(4);
                });
            }
            if apart {
                unrolled!(vector < VECTORS, {
                    sums[0][vector] = C::join(simd, sums[0][vector], others[vector]);
                });
            }
            let mut scales = [simd.splat(0.0); VECTORS];
            unrolled!(vector < VECTORS, {
                let column = tile.column + vector * S::LANES;
                scales[vector] = if groups.narrow {
                    simd.load_f16(header.cast::<u16>().add(column))
                } else {
                    simd.load(header.cast::<f32>().add(column))
                };
            });
            unrolled!(row < ROWS, {
                let mut input_scale = simd.splat(1.0);
                if C::INPUTS != Inputs::Bf16 {
                    let scales = tile.input.add(row * tile.input_stride + rows.scales).cast::<f32>();
                    input_scale = simd.splat(scales.add(segment).read());
                }
                unrolled!(vector < VECTORS, {
                    let total = tile.sums.add(row * PANEL + vector * S::LANES);
                    let mut sum = C::finish(simd, sums[row][vector]);
                    if C::INPUTS != Inputs::Bf16 {
                        sum = simd.mul(sum, input_scale);
                    }
                    simd.store(total, simd.fma(sum, scales[vector], simd.load(total)));
                });
            });
            if groups.offsets {
                add_offsets::<S, ROWS, VECTORS>(simd, tile, segment, header.add(groups.scale_bytes()).cast());
            }
        }
        at = last;
    }
}

/// Adds what offsets make of the inputs of segment `segment` to the sums of a tile.
///
/// # Safety
/// As for [`sum_tile`]; `offsets` are those of a panel.
#[inline(always)]
unsafe fn add_offsets<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &Tile<'_>,
    segment: usize,
    offsets: *const f32,
) {
    for row in 0..ROWS {
        // SAFETY: a row has a scale and a sum for each segment, and the tile lies in `sums`.
        unsafe {
            let input = tile.input.add(row * tile.input_stride);
            let scale = input.add(tile.groups.rows.scales).cast::<f32>().add(segment).read();
            let inputs = input.add(tile.groups.rows.sums).cast::<i32>().add(segment).read() as f32 * scale;
            for vector in 0..VECTORS {
                let total = tile.sums.add(row * PANEL + vector * S::LANES);
                let offset = simd.load(offsets.add(tile.column + vector * S::LANES));
                simd.store(total, simd.fma(simd.splat(inputs), offset, simd.load(total)));
            }
        }
    }
}

/// Returns step `step` of a vector of words, or, where they are `EXPANDED`, the one that stands there.
///
/// # Safety
/// The vector can be read at `from`.
#[inline(always)]
unsafe fn load<S: Simd, C: Code<S>, const EXPANDED: bool>(simd: S, from: *const u32, step: usize) -> C::Columns {
    // SAFETY: passed on.
    unsafe {
        if EXPANDED { from.cast::<C::Columns>().read_unaligned() } else { C::step(simd, simd.load_words(from), step) }
    }
}
