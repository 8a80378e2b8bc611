//! Sums over quantised weights that are widened: where [`super::codes`] cannot serve.
//!
//! A step loads a word of each output, eight or four codes of neighbouring inputs, and widens one input's codes after the other:
//! `weight = scale * code + offset`, rounded once, from scales and offsets that stay in registers for a group. What follows is
//! the multiply-add of f32 weights, in the same order: a quantised matrix has the bits of the f32 matrix it stands for, wherever
//! multiply-adds round once.

use super::{BLOCK_BYTES, Block, PREFETCH_BYTES, PanelSums};
use crate::cpu::{
    packed::{Groups, PANEL, WORD_BYTES},
    scheme,
    simd::Simd,
};

/// How codes of one kind are widened.
pub(crate) trait Code<S: Simd> {
    /// Which kind.
    const CODE: scheme::Code;

    /// Code `index` of each word, as the number that scales and offsets apply to.
    fn widen(simd: S, words: S::W, index: usize) -> S::F;
}

/// Four-bit integers.
pub(crate) struct Int4;

impl<S: Simd> Code<S> for Int4 {
    const CODE: scheme::Code = scheme::Code::Int4;

    #[inline(always)]
    fn widen(simd: S, words: S::W, index: usize) -> S::F {
        simd.nibble(words, scheme::Code::Int4.shift(index) / 4)
    }
}

/// Eight-bit integers.
pub(crate) struct Int8;

impl<S: Simd> Code<S> for Int8 {
    const CODE: scheme::Code = scheme::Code::Int8;

    #[inline(always)]
    fn widen(simd: S, words: S::W, index: usize) -> S::F {
        simd.byte(words, index)
    }
}

/// Eight-bit floats.
pub(crate) struct Fp8;

impl<S: Simd> Code<S> for Fp8 {
    const CODE: scheme::Code = scheme::Code::Fp8;

    #[inline(always)]
    fn widen(simd: S, words: S::W, index: usize) -> S::F {
        simd.e4m3(words, index)
    }
}

/// Sums of f32 inputs and quantised weights.
pub(crate) struct Quantized<C>(std::marker::PhantomData<C>);

impl<S: Simd, C: Code<S>> PanelSums<S> for Quantized<C> {
    #[inline(always)]
    unsafe fn sum(simd: S, block: &Block) {
        let each = BLOCK_BYTES / WORD_BYTES * C::CODE.per_word();
        for first in block.inputs.clone().step_by(each) {
            let mut row = 0;
            while row < block.rows {
                let (rows, columns) = tile_shape::<S>(block.rows - row);
                for column in (0..PANEL).step_by(columns) {
                    let tile = Tile {
                        input: block.input.wrapping_add(row * block.input_stride),
                        input_stride: block.input_stride,
                        panel: block.panel,
                        column,
                        first,
                        last: block.inputs.end.min(first + each),
                        groups: block.groups,
                        sums: block.sums.wrapping_add(row * PANEL + column),
                        resume: block.resume || first > block.inputs.start,
                    };
                    // SAFETY: the rows lie in the input, the inputs in the panel and the tile in `sums`.
                    unsafe { run_tile::<S, C>(simd, rows, &tile) };
                }
                row += rows;
            }
        }
    }
}

struct Tile {
    /// First row.
    input: *const u8,
    input_stride: usize,
    panel: *const u8,
    /// First output.
    column: usize,
    /// Inputs; the first is a multiple of 8.
    first: usize,
    last: usize,
    groups: Groups,
    sums: *mut f32,
    /// Go on from the sums that are there.
    resume: bool,
}

/// Chooses rows and columns of the next tile: sums, words and what widens them share the registers.
#[inline(always)]
fn tile_shape<S: Simd>(rows: usize) -> (usize, usize) {
    match (S::LANES, rows) {
        (16, 1..=3) => (rows, PANEL),
        (16, _) => (rows.min(10), 32),
        (_, 1) => (1, 4 * S::LANES),
        _ => (rows.min(4), 2 * S::LANES),
    }
}

/// # Safety
/// As for [`sum_tile`].
#[inline(always)]
unsafe fn run_tile<S: Simd, C: Code<S>>(simd: S, rows: usize, tile: &Tile) {
    // SAFETY: passed on.
    unsafe {
        match (S::LANES, rows) {
            (_, 1) => sum_tile::<S, C, 1, 4>(simd, tile),
            (16, 2) => sum_tile::<S, C, 2, 4>(simd, tile),
            (16, 3) => sum_tile::<S, C, 3, 4>(simd, tile),
            (_, 2) => sum_tile::<S, C, 2, 2>(simd, tile),
            (_, 3) => sum_tile::<S, C, 3, 2>(simd, tile),
            (_, 4) => sum_tile::<S, C, 4, 2>(simd, tile),
            (16, 5) => sum_tile::<S, C, 5, 2>(simd, tile),
            (16, 6) => sum_tile::<S, C, 6, 2>(simd, tile),
            (16, 7) => sum_tile::<S, C, 7, 2>(simd, tile),
            (16, 8) => sum_tile::<S, C, 8, 2>(simd, tile),
            (16, 9) => sum_tile::<S, C, 9, 2>(simd, tile),
            (16, 10) => sum_tile::<S, C, 10, 2>(simd, tile),
            _ => unreachable!("tile_shape gives at most 10 rows, or 4 of the shorter vectors"),
        }
    }
}

/// # Safety
/// Inputs `first .. last` of `ROWS` rows can be read, their codes and what belongs to them from `panel`, and `ROWS` rows of
/// `VECTORS` vectors can be written to `sums`.
#[inline(always)]
unsafe fn sum_tile<S: Simd, C: Code<S>, const ROWS: usize, const VECTORS: usize>(simd: S, tile: &Tile) {
    let per_word = C::CODE.per_word();
    let groups = &tile.groups;
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
        let mut at = tile.first;
        while at < tile.last {
            let group = at / groups.inputs;
            let last = tile.last.min((group + 1) * groups.inputs);
            let from = tile.panel.add(group * groups.bytes);
            let mut scales = [simd.splat(0.0); VECTORS];
            let mut offsets = scales;
            for vector in 0..VECTORS {
                let column = tile.column + vector * S::LANES;
                scales[vector] = if groups.narrow {
                    simd.load_f16(from.cast::<u16>().add(column))
                } else {
                    simd.load(from.cast::<f32>().add(column))
                };
                offsets[vector] = if groups.offsets {
                    simd.load(from.add(groups.scale_bytes()).cast::<f32>().add(column))
                } else {
                    simd.mul(scales[vector], simd.splat(-C::CODE.zero()))
                };
            }
            let skipped = (at - group * groups.inputs) / per_word;
            let mut words = from.add(groups.header_bytes() + skipped * WORD_BYTES + tile.column * 4).cast::<u32>();
            let mut input = tile.input.cast::<f32>().add(at);
            while at < last {
                let mut codes = [simd.load_words(words); VECTORS];
                for (vector, codes) in codes.iter_mut().enumerate() {
                    *codes = simd.load_words(words.add(vector * S::LANES));
                    simd.prefetch(words.wrapping_add(PREFETCH_BYTES / 4 + vector * S::LANES).cast());
                }
                // The last word of a row may hold fewer: what is beyond the row has no weight of zero where there are offsets.
                if last - at >= per_word {
                    for index in 0..per_word {
                        let weights = widen::<S, C, VECTORS>(simd, codes, index, scales, offsets);
                        accumulate(simd, &mut sums, weights, input.add(index), tile.input_stride);
                    }
                } else {
                    for index in 0..last - at {
                        let weights = widen::<S, C, VECTORS>(simd, codes, index, scales, offsets);
                        accumulate(simd, &mut sums, weights, input.add(index), tile.input_stride);
                    }
                }
                at += per_word;
                words = words.add(PANEL);
                input = input.add(per_word);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                simd.store(tile.sums.add(row * PANEL + vector * S::LANES), *sum);
            }
        }
    }
}

#[inline(always)]
fn widen<S: Simd, C: Code<S>, const VECTORS: usize>(
    simd: S,
    codes: [S::W; VECTORS],
    index: usize,
    scales: [S::F; VECTORS],
    offsets: [S::F; VECTORS],
) -> [S::F; VECTORS] {
    let mut weights = scales;
    for vector in 0..VECTORS {
        weights[vector] = simd.fma(C::widen(simd, codes[vector], index), scales[vector], offsets[vector]);
    }
    weights
}

/// # Safety
/// An f32 of each row can be read from `input` on, rows being `stride` bytes apart.
#[inline(always)]
unsafe fn accumulate<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    sums: &mut [[S::F; VECTORS]; ROWS],
    weights: [S::F; VECTORS],
    input: *const f32,
    stride: usize,
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller vouches for it.
        let input = simd.splat(unsafe { input.byte_add(row * stride).read() });
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum = simd.fma(input, weight, *sum);
        }
    }
}
