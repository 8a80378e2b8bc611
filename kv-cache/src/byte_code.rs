//! Keys and values in elements of one byte: multiples of a scale that each head of a token has.
//!
//! Engines store them and hand-offs convert to them. Both round by these functions, so that a page has the same bits wherever it was
//! made of the same values.

/// What an element of one byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteCode {
    /// Four exponent bits with a bias of 7, three of the significand (arXiv 2209.05433, table 1).
    E4m3,
    /// An integer in -127 ..= 127.
    Int8,
}

impl ByteCode {
    /// Returns the largest magnitude of an element.
    pub fn largest(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::Int8 => 127.0,
        }
    }

    /// Returns the scale for `values`: a bf16, as f32, under which none exceeds the largest element. It is normal, so that dividing by
    /// it is harmless; or NaN where a value is not finite.
    #[inline(always)]
    pub fn scale(self, values: &[f32]) -> f32 {
        // Magnitudes are ordered as their bits are, and what is not finite comes last.
        let magnitude = values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff));
        if magnitude >= f32::INFINITY.to_bits() {
            return f32::from_bits(0x7fc0_0000);
        }
        let wanted = f32::from_bits(magnitude) / self.largest();
        let rounded_up = (wanted.to_bits() + 0xffff) & 0xffff_0000;
        f32::from_bits(rounded_up).max(f32::MIN_POSITIVE)
    }

    /// Rounds `values / scale` to the nearest elements, ties to even; all become zero where the scale is NaN.
    #[inline(always)]
    pub fn encode(self, values: &[f32], scale: f32, elements: &mut [u8]) {
        if scale.is_nan() {
            elements.fill(0);
            return;
        }
        let pairs = elements.iter_mut().zip(values);
        match self {
            Self::E4m3 => pairs.for_each(|(element, value)| *element = narrow_e4m3(value / scale)),
            Self::Int8 => pairs.for_each(|(element, value)| *element = narrow_i8(value / scale)),
        }
    }
}

/// Rounds to the nearest integer in -127 ..= 127, ties to even.
#[inline(always)]
fn narrow_i8(value: f32) -> u8 {
    value.round_ties_even().clamp(-127.0, 127.0) as i8 as u8
}

/// Rounds to the nearest finite e4m3, ties to even.
#[inline(always)]
fn narrow_e4m3(value: f32) -> u8 {
    const LARGEST: u32 = 0x7e;
    let sign = (value.to_bits() >> 24 & 0x80) as u8;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    // Adds just under half of the last kept bit, and that bit itself so that ties go to even; then the exponent's bias is 7.
    let rounded = magnitude + 0x7_ffff + (magnitude >> 20 & 1);
    let normal = (rounded >> 20).wrapping_sub((127 - 7) << 3).min(LARGEST);
    // Below the smallest normal number, 2^-6, codes count in steps of 2^-9: those in which f32 count from 2^14 on.
    const STEPS: f32 = 16_384.0;
    let subnormal = (f32::from_bits(magnitude) + STEPS).to_bits().wrapping_sub(STEPS.to_bits());
    let code = if magnitude < (127 - 6) << 23 { subnormal } else { normal };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what a code stands for, by the definition of the format.
    fn e4m3(code: u8) -> f64 {
        let (exponent, significand) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude =
            if exponent == 0 { significand * 2f64.powi(-6) } else { (1.0 + significand) * 2f64.powi(exponent - 7) };
        if code < 0x80 { magnitude } else { -magnitude }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_code_and_ties_to_the_even_one() {
        for code in 0..0x7eu8 {
            let (low, high) = (e4m3(code) as f32, e4m3(code + 1) as f32);
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for (value, expected) in [
                (low, code),
                (middle.next_down(), code),
                (middle, even),
                (middle.next_up(), code + 1),
                (high, code + 1),
            ] {
                assert_eq!(narrow_e4m3(value), expected, "{value}");
                assert_eq!(narrow_e4m3(-value), expected | 0x80, "-{value}");
            }
        }
        for value in [448.0, 464.0, 480.0, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!((narrow_e4m3(value), narrow_e4m3(-value)), (0x7e, 0xfe), "{value}");
        }
        for value in [0.0, 1e-45, f32::MIN_POSITIVE, 2f32.powi(-11)] {
            assert_eq!((narrow_e4m3(value), narrow_e4m3(-value)), (0, 0x80), "{value}");
        }
    }

    #[test]
    fn int8_rounds_to_the_nearest_integer_and_ties_to_the_even_one() {
        for (value, expected) in [
            (0.5, 0),
            (0.500_001, 1),
            (1.5, 2),
            (2.5, 2),
            (-0.5, 0),
            (-1.5, -2),
            (126.5, 126),
            (127.4, 127),
            (-127.6, -127),
        ] {
            assert_eq!(narrow_i8(value) as i8, expected, "{value}");
        }
    }

    #[test]
    fn a_scale_is_the_smallest_bf16_that_holds_the_largest_magnitude() {
        for (code, largest) in [(ByteCode::Int8, 127.0), (ByteCode::E4m3, 448.0f32)] {
            assert_eq!(code.scale(&[largest, -1.0]), 1.0);
            assert_eq!(code.scale(&[1.0, -largest.next_up()]), 1.007_812_5, "one step of bf16 more");
            assert_eq!(code.scale(&[-0.0, 0.0]), f32::MIN_POSITIVE);
            assert_eq!(code.scale(&[]), f32::MIN_POSITIVE);
            assert!(code.scale(&[f32::MAX, f32::MIN]).is_finite());
            for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(code.scale(&[1.0, odd, 2.0]).to_bits(), 0x7fc0_0000);
            }
        }
    }

    #[test]
    fn what_is_not_finite_has_no_code() {
        for code in [ByteCode::E4m3, ByteCode::Int8] {
            let (values, mut elements) = ([1.0, f32::INFINITY], [7; 2]);
            code.encode(&values, code.scale(&values), &mut elements);
            assert_eq!(elements, [0; 2]);
        }
    }
}
