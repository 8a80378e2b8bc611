//! Matrices whose rows GGUF stores in blocks: codes of a few bits with the scales of their groups.
//!
//! Each type is one of the engine's own schemes, without loss: the products of a block's f16 scale and the small scales of its
//! groups are exact in f32. Layouts: `block_*` in ggml-common.h, `dequantize_row_*` in ggml-quants.c.

use crate::{
    cpu::scheme::{Code, QuantizedMatrix, QuantizedRow, Scheme},
    model::checkpoint::stored_row,
};
use gguf::TensorType;
use half::f16;

/// A matrix `[outputs][inputs]` in blocks, with scales that are finite.
#[derive(Debug)]
pub(crate) struct Blocks<'a> {
    kind: TensorType,
    scheme: Scheme,
    bytes: &'a [u8],
    row_bytes: usize,
    turned_rows: Option<usize>,
}

impl<'a> Blocks<'a> {
    /// Takes `bytes` as rows of `inputs` elements, a multiple of the block; see [`Tensor`](crate::model::checkpoint::Tensor) for
    /// `turned_rows`.
    ///
    /// # Errors
    /// Says what is wrong: a type that cannot be read, or a scale that is no number.
    pub(crate) fn new(
        kind: TensorType,
        bytes: &'a [u8],
        inputs: usize,
        turned_rows: Option<usize>,
    ) -> Result<Self, String> {
        let Some(scheme) = scheme(kind) else {
            let known: Vec<&str> = TensorType::READABLE.iter().map(|kind| kind.name()).collect();
            return Err(format!("has type {}, which is not supported; known: {}", kind.name(), known.join(", ")));
        };
        let row_bytes = inputs / kind.block_elements() * kind.block_bytes();
        let blocks = bytes.chunks_exact(kind.block_bytes()).enumerate();
        for (index, block) in blocks {
            if let Some(scale) = scales(kind, block).into_iter().find(|scale| !scale.is_finite()) {
                let (row, start) = (index * kind.block_bytes() / row_bytes, index * kind.block_elements() % inputs);
                return Err(format!("has the scale {scale} in row {row} at column {start}, expected a finite number"));
            }
        }
        Ok(Self { kind, scheme, bytes, row_bytes, turned_rows })
    }
}

impl QuantizedMatrix for Blocks<'_> {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn read(&self, output: usize, row: &mut QuantizedRow) {
        let stored = &self.bytes[stored_row(output, self.turned_rows) * self.row_bytes..][..self.row_bytes];
        let elements = self.kind.block_elements();
        let groups = elements / self.scheme.group;
        for (index, block) in stored.chunks_exact(self.kind.block_bytes()).enumerate() {
            let codes = &mut row.codes[index * elements..][..elements];
            let scales = &mut row.scales[index * groups..][..groups];
            let offsets = row.offsets.get_mut(index * groups..(index + 1) * groups).unwrap_or_default();
            read_block(self.kind, block, codes, scales, offsets);
        }
    }
}

/// Returns the scheme of blocks of type `kind`.
fn scheme(kind: TensorType) -> Option<Scheme> {
    let (code, group, narrow, offsets) = match kind {
        TensorType::Q4_0 => (Code::Int4, 32, true, false),
        TensorType::Q8_0 => (Code::Int8, 32, true, false),
        TensorType::Q4K => (Code::Int4, 32, false, true),
        TensorType::Q5K => (Code::Int8, 32, false, true),
        TensorType::Q6K => (Code::Int8, 16, false, false),
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Other(_) => return None,
    };
    Some(Scheme { code, group, narrow, offsets, narrow_inputs: false })
}

/// Returns the f16 numbers that a block's weights are multiples of; the second is 0 where there is one.
fn scales(kind: TensorType, block: &[u8]) -> [f32; 2] {
    match kind {
        TensorType::Q4K | TensorType::Q5K => [float(block, 0), float(block, 2)],
        TensorType::Q6K => [float(block, 208), 0.0],
        _ => [float(block, 0), 0.0],
    }
}

fn float(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn read_block(kind: TensorType, block: &[u8], codes: &mut [u8], scales_out: &mut [f32], offsets: &mut [f32]) {
    let [scale, least] = scales(kind, block);
    match kind {
        TensorType::Q4_0 => {
            scales_out[0] = scale;
            split_nibbles(&block[2..], codes);
        }
        TensorType::Q8_0 => {
            scales_out[0] = scale;
            // Two's complement becomes a count from -128.
            codes.iter_mut().zip(&block[2..]).for_each(|(code, byte)| *code = byte ^ 0x80);
        }
        TensorType::Q4K => {
            read_scales(&block[4..16], scale, least, scales_out, offsets);
            codes.chunks_mut(64).zip(block[16..].chunks(32)).for_each(|(codes, bytes)| split_nibbles(bytes, codes));
        }
        TensorType::Q5K => {
            read_scales(&block[4..16], scale, least, scales_out, offsets);
            codes.chunks_mut(64).zip(block[48..].chunks(32)).for_each(|(codes, bytes)| split_nibbles(bytes, codes));
            let high = &block[16..48];
            codes.iter_mut().enumerate().for_each(|(at, code)| *code |= (high[at % 32] >> (at / 32) & 1) << 4);
        }
        TensorType::Q6K => {
            let (low, high, small) = (&block[..128], &block[128..192], &block[192..208]);
            scales_out.iter_mut().zip(small).for_each(|(out, small)| *out = scale * f32::from(*small as i8));
            for (at, code) in codes.iter_mut().enumerate() {
                let (half, at) = (at / 128, at % 128);
                let four = low[half * 64 + at % 64] >> (at / 64 * 4) & 15;
                let two = high[half * 32 + at % 32] >> (at / 32 * 2) & 3;
                // Stored counts from -32, ours from -128.
                *code = (two << 4 | four) + 96;
            }
        }
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Other(_) => {
            unreachable!("the type has a scheme")
        }
    }
}

/// Writes the low halves of `bytes`, then the high ones.
fn split_nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Writes the scales and offsets of eight groups, packed as 6 bits each in 12 bytes (`get_scale_min_k4`).
fn read_scales(packed: &[u8], scale: f32, least: f32, scales: &mut [f32], offsets: &mut [f32]) {
    for group in 0..8 {
        let (small, min) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4)
        };
        (scales[group], offsets[group]) = (scale * f32::from(small), -(least * f32::from(min)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns `rows` rows of one block each that look random, and their weights as the definitions of ggml read, element by
    /// element.
    fn sample(kind: TensorType, seed: u32) -> Vec<u8> {
        let mut state = seed;
        let mut bytes: Vec<u8> = (0..kind.block_bytes())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        for at in match kind {
            TensorType::Q6K => vec![208],
            TensorType::Q4K | TensorType::Q5K => vec![0, 2],
            _ => vec![0],
        } {
            bytes[at..at + 2].copy_from_slice(&f16::from_f32(0.01 + seed as f32 / 999.0).to_le_bytes());
        }
        bytes
    }

    #[test]
    fn scales_that_are_no_numbers_are_found() {
        for kind in TensorType::READABLE.into_iter().filter(|kind| scheme(*kind).is_some()) {
            let good = [sample(kind, 1), sample(kind, 2), sample(kind, 3), sample(kind, 4)].concat();
            let columns = 2 * kind.block_elements();
            assert!(Blocks::new(kind, &good, columns, None).is_ok());
            for value in [f16::NAN, f16::INFINITY] {
                let mut bad = good.clone();
                let at = 3 * kind.block_bytes() + if kind == TensorType::Q6K { 208 } else { 0 };
                bad[at..at + 2].copy_from_slice(&value.to_le_bytes());
                let problem = Blocks::new(kind, &bad, columns, None).expect_err("a bad scale");
                assert!(problem.contains("row 1") && problem.contains(&(columns / 2).to_string()), "{problem}");
            }
        }
        assert!(Blocks::new(TensorType::F32, &[], 4, None).expect_err("floats").contains("Q4_K"));
    }
}
