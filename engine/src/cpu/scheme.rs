//! Quantised weights: codes of four or eight bits, and the numbers that turn a group of them back into weights.
//!
//! Every format of every checkpoint comes down to one rule. The inputs of an output are cut into groups, and within a group
//! `weight = scale * code + offset`, rounded once to f32. A reader of a checkpoint is a [`QuantizedMatrix`]: it says which
//! [`Scheme`] its matrix follows and hands over one [`QuantizedRow`] at a time; [`super::packed`] lays them out and
//! [`super::linear`] widens them in registers.

use std::sync::Arc;

/// What a code means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Code {
    /// `0 ..= 15`; without offsets it stands for `code - 8`.
    Int4,
    /// `0 ..= 255`; without offsets it stands for `code - 128`.
    Int8,
    /// The bits of an e4m3 float without infinities (OCP "8-bit Floating Point Specification", section 5): finite, for the
    /// two NaNs have no place in a kernel.
    Fp8,
}

impl Code {
    /// Codes of a 32-bit word.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Code::Int4 => 8,
            Code::Int8 | Code::Fp8 => 4,
        }
    }

    /// Returns the lowest bit of code `index` of a word (see [`super::packed`]).
    #[inline(always)]
    pub(crate) const fn shift(self, index: usize) -> usize {
        match self {
            // The two inputs of a step stand in the two halves of a word: 0 and 2, 1 and 3, 4 and 6, 5 and 7.
            Code::Int4 => index % 2 * 4 + index / 2 % 2 * 16 + index / 4 * 8,
            Code::Int8 | Code::Fp8 => index * 8,
        }
    }

    /// The code that stands for zero when there are no offsets.
    pub(crate) const fn zero(self) -> f32 {
        match self {
            Code::Int4 => 8.0,
            Code::Int8 => 128.0,
            Code::Fp8 => 0.0,
        }
    }

    /// Returns the number that scales and offsets apply to.
    pub(crate) fn value(self, code: u8) -> f32 {
        match self {
            Code::Int4 | Code::Int8 => f32::from(code),
            Code::Fp8 => widen_e4m3(code),
        }
    }

    /// Returns the name people use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Code::Int4 => "int4",
            Code::Int8 => "int8",
            Code::Fp8 => "fp8",
        }
    }
}

/// Widens a finite e4m3 without a branch.
#[inline(always)]
pub(crate) const fn widen_e4m3(bits: u8) -> f32 {
    let magnitude = f32::from_bits((bits as u32 & 0x7f) << 20 | (bits as u32 & 0x80) << 24);
    // The exponent is too small by 120; multiplying also makes normal numbers of subnormal ones.
    magnitude * f32::from_bits((127 + 120) << 23)
}

/// How a matrix is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scheme {
    pub(crate) code: Code,
    /// Inputs that share a scale, a multiple of 8; the last group of a row may be shorter. A group that is longer than the row
    /// is one scale for each output.
    pub(crate) group: usize,
    /// Every scale is exact as f16 and kept so.
    pub(crate) narrow: bool,
    /// Groups have offsets; without them the offset is `-scale * code.zero()`.
    pub(crate) offsets: bool,
    /// Inputs are meant to have eight bits and one scale for a row, as in W8A8 checkpoints; those of other weights keep fifteen.
    pub(crate) narrow_inputs: bool,
}

impl Scheme {
    /// One f32 scale for each output of `inputs` inputs, no offsets.
    pub(crate) fn per_output(code: Code, inputs: usize) -> Self {
        Self { code, group: inputs.next_multiple_of(8), narrow: false, offsets: false, narrow_inputs: false }
    }

    /// Returns the groups of a row of `inputs` inputs.
    pub(crate) fn groups(&self, inputs: usize) -> usize {
        inputs.div_ceil(self.group)
    }

    /// Returns how many inputs of a row of `inputs` are summed before scales apply, where codes are multiplied as they are: a power
    /// of two of which groups are whole multiples, up to 128, or 2048 where inputs have one scale anyway; `None` where that would be
    /// too short to be worth it.
    pub(crate) fn segment(&self, inputs: usize) -> Option<usize> {
        let most = if self.narrow_inputs { 2048 } else { 128 };
        let segment = if self.group >= inputs { most } else { greatest_common_divisor(self.group, most) };
        Some(segment).filter(|segment| *segment >= 16)
    }

    /// Returns a scheme to which rows of either can be [brought](QuantizedRow::convert) without loss, if there is one.
    pub(crate) fn unite(self, other: Self) -> Option<Self> {
        let code = match (self.code, other.code) {
            (a, b) if a == b => a,
            (Code::Fp8, _) | (_, Code::Fp8) => return None,
            _ => Code::Int8,
        };
        Some(Self {
            code,
            group: greatest_common_divisor(self.group, other.group),
            narrow: self.narrow && other.narrow,
            offsets: self.offsets || other.offsets,
            narrow_inputs: self.narrow_inputs && other.narrow_inputs,
        })
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// One output's weights.
#[derive(Clone, Debug, Default)]
pub(crate) struct QuantizedRow {
    /// One for each input, in [order](QuantizedMatrix::order).
    pub(crate) codes: Vec<u8>,
    /// One for each group.
    pub(crate) scales: Vec<f32>,
    /// One for each group where the scheme has offsets, else empty.
    pub(crate) offsets: Vec<f32>,
}

impl QuantizedRow {
    /// Returns zeros for `inputs` inputs under `scheme`.
    pub(crate) fn zeroed(scheme: &Scheme, inputs: usize) -> Self {
        let groups = scheme.groups(inputs);
        Self {
            codes: vec![0; inputs],
            scales: vec![0.0; groups],
            offsets: vec![0.0; if scheme.offsets { groups } else { 0 }],
        }
    }

    /// Writes the weights.
    pub(crate) fn widen(&self, scheme: &Scheme, weights: &mut [f32]) {
        for (group, (weights, codes)) in
            weights.chunks_mut(scheme.group).zip(self.codes.chunks(scheme.group)).enumerate()
        {
            let scale = self.scales[group];
            let offset = if scheme.offsets { self.offsets[group] } else { -scheme.code.zero() * scale };
            for (weight, code) in weights.iter_mut().zip(codes) {
                *weight = scheme.code.value(*code).mul_add(scale, offset);
            }
        }
    }

    /// Brings a row under `from` to `to`, which [`Scheme::unite`] made of `from` and others.
    pub(crate) fn convert(&mut self, from: &Scheme, to: &Scheme) {
        if from == to {
            return;
        }
        let groups = to.groups(self.codes.len());
        let origin = |group: usize| group * to.group / from.group;
        if to.offsets {
            let offset = |group: usize| {
                if from.offsets { self.offsets[origin(group)] } else { -from.code.zero() * self.scales[origin(group)] }
            };
            self.offsets = (0..groups).map(offset).collect();
        } else {
            // Without offsets codes count from their zero.
            let shift = (to.code.zero() - from.code.zero()) as u8;
            self.codes.iter_mut().for_each(|code| *code += shift);
        }
        self.scales = (0..groups).map(|group| self.scales[origin(group)]).collect();
    }
}

/// A quantised matrix `[outputs][inputs]` of a checkpoint, checked when it was made and read output by output.
pub(crate) trait QuantizedMatrix: Send + Sync {
    /// Returns how it is quantised.
    fn scheme(&self) -> Scheme;

    /// Returns the bytes it takes in its file, everything that belongs to it included.
    fn stored_bytes(&self) -> usize;

    /// Returns which input each position along a row belongs to; `None` = the input at that position.
    fn order(&self) -> Option<&Arc<[u32]>> {
        None
    }

    /// Reads an output into `row`, which was made by [`QuantizedRow::zeroed`] for this scheme and may hold another output.
    fn read(&self, output: usize, row: &mut QuantizedRow);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_widens_as_the_format_says() {
        for bits in 0..=0xffu8 {
            if bits & 0x7f == 0x7f {
                continue;
            }
            let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
            let size = match exponent {
                0 => mantissa / 8.0 * 2f32.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
            };
            let expected = if bits & 0x80 == 0 { size } else { -size };
            assert_eq!(widen_e4m3(bits).to_bits(), expected.to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn united_schemes_hold_the_same_weights() {
        let scheme = |code, group, offsets| Scheme { code, group, narrow: true, offsets, narrow_inputs: false };
        let all = [
            scheme(Code::Int4, 32, false),
            scheme(Code::Int4, 32, true),
            scheme(Code::Int8, 16, false),
            scheme(Code::Int8, 16, true),
            Scheme::per_output(Code::Int8, 75),
        ];
        for from in all {
            for other in all {
                let to = from.unite(other).expect("integers unite");
                let mut row = QuantizedRow::zeroed(&from, 75);
                let codes = if from.code == Code::Int4 { 16 } else { 256 };
                row.codes.iter_mut().enumerate().for_each(|(at, code)| *code = (at * 37 % codes) as u8);
                row.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = 0.25 + at as f32);
                row.offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = at as f32 - 3.0);
                let (mut before, mut after) = (vec![0.0; 75], vec![0.0; 75]);
                row.widen(&from, &mut before);
                row.convert(&from, &to);
                row.widen(&to, &mut after);
                assert_eq!(before, after, "{from:?} {to:?}");
            }
        }
        assert_eq!(Scheme::per_output(Code::Fp8, 64).unite(all[0]), None);
    }
}
