//! Quantising while loading: codes and scales computed from a matrix of floats, output by output, as they are packed.
//!
//! int8 and fp8 have one scale for each output. int4 has f16 scales by groups of 32 inputs, 4.5 bits a weight: groups of 64 would
//! save a quarter of a bit and make the error about an eighth larger. An int4 scale is the one of a few around the range of
//! its group that leaves the least squared error. The head is int8 in groups of 32 under every choice: its errors go straight
//! to the logits, at this width they are about those of bf16, and where it is tied it is the embedding as well.

use crate::{
    cpu::scheme::{Code, QuantizedMatrix, QuantizedRow, Scheme},
    model::checkpoint::Tensor,
};
use half::f16;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What the matrices of a float checkpoint become when they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// 8-bit integers, one scale for each output, and activations of eight bits, one scale for each token (W8A8).
    Int8,
    /// 4-bit integers, one scale for each 32 inputs of an output.
    Int4,
    /// e4m3 floats, one scale for each output.
    Fp8,
}

impl Quantize {
    /// Returns the name people use: `int4`.
    pub fn name(self) -> &'static str {
        match self {
            Quantize::Int8 => "int8",
            Quantize::Int4 => "int4",
            Quantize::Fp8 => "fp8",
        }
    }

    /// Returns how a linear of `inputs` inputs is quantised.
    pub(crate) fn scheme(self, inputs: usize) -> Scheme {
        match self {
            Quantize::Int8 => Scheme { narrow_inputs: true, ..Scheme::per_output(Code::Int8, inputs) },
            Quantize::Int4 => {
                Scheme { code: Code::Int4, group: 32, narrow: true, offsets: false, narrow_inputs: false }
            }
            Quantize::Fp8 => Scheme::per_output(Code::Fp8, inputs),
        }
    }

    /// Returns how the head is quantised.
    pub(crate) fn head_scheme(self) -> Scheme {
        Scheme { code: Code::Int8, group: 32, narrow: true, offsets: false, narrow_inputs: false }
    }
}

impl fmt::Display for Quantize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A matrix of floats that is quantised as it is read.
pub(crate) struct Quantizing<'a> {
    pub(crate) tensor: Tensor<'a>,
    pub(crate) inputs: usize,
    pub(crate) scheme: Scheme,
}

impl QuantizedMatrix for Quantizing<'_> {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn stored_bytes(&self) -> usize {
        self.tensor.bytes.len()
    }

    fn read(&self, output: usize, row: &mut QuantizedRow) {
        let stored = self.tensor.row(output, self.inputs);
        let weights: Vec<f32> = (0..self.inputs).map(|index| self.tensor.dtype.get(stored, index)).collect();
        let Scheme { code, group, narrow, .. } = self.scheme;
        for (index, weights) in weights.chunks(group).enumerate() {
            let codes = &mut row.codes[index * group..][..weights.len()];
            row.scales[index] = match code {
                Code::Int4 => int4(weights, codes),
                Code::Int8 => int8(weights, codes, narrow),
                Code::Fp8 => fp8(weights, codes),
            };
        }
    }
}

/// Returns the largest magnitude; what is no number counts for nothing.
fn largest(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |max, weight| weight.abs().max(max))
}

/// Rounds a scale to f16, never to infinity.
fn narrowed(scale: f32) -> f32 {
    f16::from_f32(scale.clamp(-65504.0, 65504.0)).to_f32()
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn int8(weights: &[f32], codes: &mut [u8], narrow: bool) -> f32 {
    let scale = largest(weights) / 127.0;
    let scale = if narrow { narrowed(scale) } else { scale };
    let inverse = inverse(scale);
    for (code, weight) in codes.iter_mut().zip(weights) {
        *code = ((weight * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
    }
    scale
}

/// Tries scales around the one that maps the largest weight to the end of the range, which is one longer on one side.
fn int4(weights: &[f32], codes: &mut [u8]) -> f32 {
    const CANDIDATES: usize = 12;
    let extreme = weights.iter().fold(0.0f32, |max, weight| if weight.abs() > max.abs() { *weight } else { max });
    let mut best = (f32::INFINITY, 0.0);
    for candidate in 0..CANDIDATES {
        // From 6.6 to 8.8 steps for the largest: short of 8 all fit, beyond it the largest is cut and others gain.
        let scale = narrowed(extreme / -(6.6 + candidate as f32 * 0.2));
        let inverse = inverse(scale);
        let error: f32 = weights
            .iter()
            .map(|weight| {
                let error = (weight * inverse).round_ties_even().clamp(-8.0, 7.0) * scale - weight;
                error * error
            })
            .sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    let inverse = inverse(best.1);
    for (code, weight) in codes.iter_mut().zip(weights) {
        *code = ((weight * inverse).round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8;
    }
    best.1
}

/// Scales so that the largest weight becomes the largest e4m3.
fn fp8(weights: &[f32], codes: &mut [u8]) -> f32 {
    let scale = largest(weights) / 448.0;
    let inverse = inverse(scale);
    for (code, weight) in codes.iter_mut().zip(weights) {
        *code = round_e4m3(weight * inverse);
    }
    scale
}

/// Rounds to the nearest finite e4m3, ties to even.
fn round_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let size = value.abs().min(448.0);
    if size < 2f32.powi(-6) {
        // Subnormal: steps of 2^-9; the eighth is the first normal number, as its bits say too.
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    // Adds just under half of the last kept bit, and that bit itself so that ties go to even.
    let bits = size.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - (120 << 3)).min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scheme::widen_e4m3;

    #[test]
    fn e4m3_rounds_to_the_nearest() {
        let all: Vec<f32> = (0..0x7fu8).map(widen_e4m3).collect();
        for (bits, value) in all.iter().enumerate() {
            assert_eq!(usize::from(round_e4m3(*value)), bits);
            assert_eq!(usize::from(round_e4m3(-value)), bits | 0x80);
        }
        for (bits, pair) in all.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = bits + bits % 2;
            assert_eq!(usize::from(round_e4m3(middle)), even, "{middle}");
            assert_eq!(usize::from(round_e4m3(middle * (1.0 - 1e-6))), bits, "{middle}");
            assert_eq!(usize::from(round_e4m3(middle * (1.0 + 1e-6))), bits + 1, "{middle}");
        }
        assert_eq!(round_e4m3(f32::INFINITY), 0x7e);
    }

    #[test]
    fn quantised_rows_are_close_and_zeros_stay_zeros() {
        let weights: Vec<f32> = (0..128).map(|index| ((index * 7919 % 2003) as f32 / 1001.0 - 1.0) * 0.1).collect();
        let error = |scheme: Scheme, weights: &[f32]| {
            let stored: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let tensor = Tensor { dtype: crate::ElementType::F32, bytes: &stored, turned_rows: None };
            let matrix = Quantizing { tensor, inputs: weights.len(), scheme };
            let mut row = QuantizedRow::zeroed(&scheme, weights.len());
            matrix.read(0, &mut row);
            let mut out = vec![0.0; weights.len()];
            row.widen(&scheme, &mut out);
            out.iter().zip(weights).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()))
        };
        for (quantize, limit) in [(Quantize::Int8, 0.0005), (Quantize::Int4, 0.015), (Quantize::Fp8, 0.0065)] {
            assert!(
                error(quantize.scheme(128), &weights) < limit,
                "{quantize}: {}",
                error(quantize.scheme(128), &weights)
            );
            assert!(error(quantize.head_scheme(), &weights) < 0.0005);
            assert_eq!(error(quantize.scheme(40), &[0.0; 40]), 0.0);
        }
    }
}
