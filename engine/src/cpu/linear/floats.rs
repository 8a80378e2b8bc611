//! Weights that are floats, as tiles meet them.

use super::tiled::Weights;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::DotBf16;
use crate::cpu::simd::Simd;

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
