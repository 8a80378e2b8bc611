//! Any machine: arrays of eight that the compiler turns into whatever vectors it may use (NEON on arm64, SSE2 on x86-64).

use super::Simd;
use crate::cpu::scheme::widen_e4m3;
use half::{bf16, f16};

/// Plain Rust; every machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const LANES: usize = 8;
type F = [f32; LANES];

#[inline(always)]
fn map(a: F, f: impl Fn(f32) -> f32) -> F {
    std::array::from_fn(|lane| f(a[lane]))
}

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

/// Widens an f16 without a branch, so that a loop of it becomes vectors.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // The exponent is too small by 112; multiplying also makes normal numbers of subnormal ones.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 << 13 { 0xff << 23 } else { 0 };
    f32::from_bits(scaled | special | u32::from(bits & 0x8000) << 16)
}

impl Simd for Portable {
    type F = F;
    type W = [u32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, value: f32) -> F {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // One instruction on arm64; on x86-64 without FMA `mul_add` would be a call for each lane.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
        } else {
            std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
        }
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        // Adding 1.5 * 2^23 leaves no bits for a fraction, in two operations that every machine has as vectors.
        const SHIFT: f32 = 12_582_912.0;
        map(a, |a| (a + SHIFT) - SHIFT)
    }

    #[inline(always)]
    fn pow2(self, n: F) -> F {
        map(n, |n| {
            // SAFETY: callers pass integers in -127 ..= 127, so the value is finite and fits; a plain `as` would test for
            // that lane by lane and keep the loop from becoming vectors.
            let n = unsafe { n.to_int_unchecked::<i32>() };
            f32::from_bits(((n + 127) << 23) as u32)
        })
    }

    #[inline(always)]
    fn scale(self, a: F, n: F) -> F {
        self.mul(a, self.pow2(self.max(n, self.splat(-127.0))))
    }

    #[inline(always)]
    fn sum4(self, vectors: [F; 4]) -> [f32; 4] {
        vectors.map(|v| ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))
    }

    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |max, lane| if lane > max { lane } else { max })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { from.cast::<F>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: F) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<F>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> F {
        // SAFETY: the caller vouches for LANES elements.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        std::array::from_fn(|lane| f32::from_bits(u32::from(bits[lane]) << 16))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, value: F) {
        let bits: [u16; LANES] = std::array::from_fn(|lane| bf16::from_f32(value[lane]).to_bits());
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F {
        // SAFETY: the caller vouches for LANES elements.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        std::array::from_fn(|lane| widen_f16(bits[lane]))
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: F) {
        let bits: [u16; LANES] = std::array::from_fn(|lane| f16::from_f32(value[lane]).to_bits());
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> F {
        // SAFETY: the caller vouches for LANES elements.
        let numbers = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        numbers.map(f32::from)
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> F {
        // SAFETY: the caller vouches for LANES elements.
        let bits = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        bits.map(widen_e4m3)
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (F, F) {
        // SAFETY: the caller vouches for LANES pairs.
        let bits = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        let first = std::array::from_fn(|lane| f32::from_bits(bits[lane] << 16));
        let second = std::array::from_fn(|lane| f32::from_bits(bits[lane] & 0xffff_0000));
        (first, second)
    }

    #[inline(always)]
    fn round_bf16(self, value: F) -> F {
        map(value, |value| bf16::from_f32(value).to_f32())
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u32) -> [u32; LANES] {
        // SAFETY: the caller vouches for LANES words.
        unsafe { from.cast::<[u32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    fn nibble(self, words: [u32; LANES], index: usize) -> F {
        words.map(|word| (word >> (4 * index) & 15) as f32)
    }

    #[inline(always)]
    fn byte(self, words: [u32; LANES], index: usize) -> F {
        words.map(|word| (word >> (8 * index) & 255) as f32)
    }

    #[inline(always)]
    fn e4m3(self, words: [u32; LANES], index: usize) -> F {
        words.map(|word| widen_e4m3((word >> (8 * index)) as u8))
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> [u32; LANES] {
        [word; LANES]
    }

    #[inline(always)]
    fn dot_bytes(self, sum: [u32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        std::array::from_fn(|lane| {
            let product = |byte: u32| (a[lane] >> (8 * byte) & 255) as i32 * i32::from((b[lane] >> (8 * byte)) as i8);
            let products = product(0) + product(1) + product(2) + product(3);
            sum[lane].wrapping_add_signed(products)
        })
    }

    #[inline(always)]
    fn dot_halves(self, sum: [u32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        std::array::from_fn(|lane| {
            let product = |shift: u32| i32::from((a[lane] >> shift) as i16) * i32::from((b[lane] >> shift) as i16);
            sum[lane].wrapping_add_signed(product(0) + product(16))
        })
    }

    #[inline(always)]
    fn field(self, words: [u32; LANES], nibbles: usize, mask: u32) -> [u32; LANES] {
        words.map(|word| word >> (4 * nibbles) & mask)
    }

    #[inline(always)]
    fn add_words(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        std::array::from_fn(|lane| a[lane].wrapping_add(b[lane]))
    }

    #[inline(always)]
    fn integers(self, words: [u32; LANES]) -> F {
        words.map(|word| word as i32 as f32)
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        for column in 0..LANES {
            // SAFETY: the caller vouches for both squares.
            unsafe {
                let words: [u32; LANES] =
                    std::array::from_fn(|row| from.add(row * from_stride + column).read_unaligned());
                to.add(column * to_stride).cast::<[u32; LANES]>().write_unaligned(words);
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const u16, second: *const u16, to: *mut u32) {
        // SAFETY: the caller vouches for twice LANES elements and pairs.
        unsafe {
            let first = first.cast::<[u16; 2 * LANES]>().read_unaligned();
            let second = second.cast::<[u16; 2 * LANES]>().read_unaligned();
            let pairs: [u32; 2 * LANES] =
                std::array::from_fn(|lane| u32::from(first[lane]) | u32::from(second[lane]) << 16);
            to.cast::<[u32; 2 * LANES]>().write_unaligned(pairs);
        }
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_it_should() {
        for bits in 0..=u16::MAX {
            let (ours, expected) = (widen_f16(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == expected.to_bits() || (ours.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }
}
