//! Vectors of f32 as kernels see them: one trait, one implementation for each instruction set.
//!
//! Kernels are written once, generic over [`Simd`], and inlined into functions that enable the instructions
//! ([`super::kernels`]). A value of an implementing type is the proof that this machine has them, so arithmetic is safe to call;
//! only what goes through a pointer is not.
//!
//! Every operation acts on each lane alone and has one rounding, so an element's bits do not depend on the lane it is in.
//! [`Simd::sum4`] adds lanes in one fixed order.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

/// A vector unit.
pub(crate) trait Simd: Copy {
    /// `LANES` f32.
    type F: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of q that share the loaded keys of a tile of scores.
    const SCORE_ROWS: usize;

    fn splat(self, value: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Rounds to the nearest integer, ties to even; for magnitudes below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `2^n` for integers `n` in `-126 ..= 127`, and 0 for `n = -127`.
    fn pow2(self, n: Self::F) -> Self::F;
    /// Sums of the lanes of each of four vectors.
    fn sum4(self, vectors: [Self::F; 4]) -> [f32; 4];
    /// The largest lane.
    fn max_lane(self, a: Self::F) -> f32;

    /// # Safety
    /// `LANES` f32 can be read at `from`, at any alignment.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` f32 can be written at `to`, at any alignment.
    unsafe fn store(self, to: *mut f32, value: Self::F);
    /// # Safety
    /// `LANES` bf16 can be read at `from`.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// `LANES` bf16 can be written at `to`.
    unsafe fn store_bf16(self, to: *mut u16, value: Self::F);
    /// # Safety
    /// `LANES` f16 can be read at `from`.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// `LANES` f16 can be written at `to`.
    unsafe fn store_f16(self, to: *mut u16, value: Self::F);
    /// Splits `LANES` pairs of bf16 into the first and the second of each pair.
    ///
    /// # Safety
    /// `LANES` pairs can be read at `from`.
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (Self::F, Self::F);
    /// Rounds to the nearest bf16, ties to even, and keeps it as f32.
    fn round_bf16(self, value: Self::F) -> Self::F;
    /// Asks for a cache line that will be read soon; any address will do.
    fn prefetch(self, at: *const u8);
}

/// A vector unit that multiplies pairs of bf16 and adds both products to an f32.
#[cfg(target_arch = "x86_64")]
pub(crate) trait DotBf16: Simd {
    /// `LANES` pairs of bf16.
    type Pairs: Copy;

    /// `sum + a.0 * b.0 + a.1 * b.1` in the machine's order and rounding, which is the same for every call.
    fn dot(self, sum: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F;
    fn splat_pair(self, pair: u32) -> Self::Pairs;
    /// # Safety
    /// `LANES` pairs can be read at `from`.
    unsafe fn load_pairs(self, from: *const u32) -> Self::Pairs;
}

/// `2^x`, within 2 units in the last place; 0 from `x <= -126.5` on, and so for minus infinity.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::F) -> S::F {
    // ln(2)^k / k!, the Taylor series: on [-0.5, 0.5] its remainder is 5e-9.
    const COEFFICIENTS: [f32; 8] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
        0.000_015_252_734,
    ];
    let x = simd.min(simd.max(x, simd.splat(-127.0)), simd.splat(127.0));
    let whole = simd.round(x);
    let part = simd.sub(x, whole);
    let mut sum = simd.splat(COEFFICIENTS[7]);
    for coefficient in COEFFICIENTS[..7].iter().rev() {
        sum = simd.fma(sum, part, simd.splat(*coefficient));
    }
    simd.mul(sum, simd.pow2(whole))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, x: S::F) -> S::F {
    let power = exp2(simd, simd.mul(x, simd.splat(-std::f32::consts::LOG2_E)));
    simd.div(x, simd.add(simd.splat(1.0), power))
}

/// Reads `floats` as fast as memory gives them, up to whole runs of eight vectors, and returns the largest.
#[inline(always)]
pub(crate) fn read<S: Simd>(simd: S, floats: &[f32]) -> f32 {
    const AHEAD: usize = 1024;
    let mut largest = [simd.splat(f32::NEG_INFINITY); 8];
    for run in floats.chunks_exact(8 * S::LANES) {
        for (vector, largest) in largest.iter_mut().enumerate() {
            let at = run.as_ptr().wrapping_add(vector * S::LANES);
            simd.prefetch(at.wrapping_add(AHEAD).cast());
            // SAFETY: a run holds eight vectors.
            *largest = simd.max(unsafe { simd.load(at) }, *largest);
        }
    }
    largest.into_iter().map(|vector| simd.max_lane(vector)).fold(f32::NEG_INFINITY, f32::max)
}
