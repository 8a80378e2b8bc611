//! Vectors of f32 as kernels see them: one trait, one implementation for each instruction set.
//!
//! Kernels are written once, generic over [`Simd`], and inlined into functions that enable the instructions
//! ([`super::kernels`]). A value of an implementing type is the proof that this machine has them, so arithmetic is safe to call;
//! only what goes through a pointer is not.
//!
//! Every operation acts on each lane alone and has one rounding, so an element's bits do not depend on the lane it is in.
//! [`Simd::sum4`] adds lanes in one fixed order.

use crate::model::decoder::Activation;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

/// A vector unit.
pub(crate) trait Simd: Copy {
    /// `LANES` f32.
    type F: Copy;
    /// `LANES` words of 32 bits.
    type W: Copy;
    /// Elements of a vector.
    const LANES: usize;

    fn splat(self, value: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger of each lane; that of `b` where one is no number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Rounds to the nearest integer, ties to even; for magnitudes below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `2^n` for integers `n` in `-126 ..= 127`, and 0 for `n = -127`.
    fn pow2(self, n: Self::F) -> Self::F;
    /// `a * 2^n` for `a` in `0.5 ..= 2` and integers `n` in `-150 ..= 127`; 0 for `n = -150`.
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
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
    /// # Safety
    /// `LANES` i8 can be read at `from`.
    unsafe fn load_i8(self, from: *const i8) -> Self::F;
    /// Widens finite e4m3 floats.
    ///
    /// # Safety
    /// `LANES` e4m3 can be read at `from`.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::F;
    /// Splits `LANES` pairs of bf16 into the first and the second of each pair.
    ///
    /// # Safety
    /// `LANES` pairs can be read at `from`.
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (Self::F, Self::F);
    /// Rounds to the nearest bf16, ties to even, and keeps it as f32.
    fn round_bf16(self, value: Self::F) -> Self::F;
    /// # Safety
    /// `LANES` words can be read at `from`, at any alignment.
    unsafe fn load_words(self, from: *const u32) -> Self::W;
    /// Four bits of each word, as a number `0 ..= 15`; `index` 0 are the lowest.
    fn nibble(self, words: Self::W, index: usize) -> Self::F;
    /// A byte of each word, as a number `0 ..= 255`; `index` 0 is the lowest.
    fn byte(self, words: Self::W, index: usize) -> Self::F;
    /// A byte of each word, as the finite e4m3 float it is; `index` 0 is the lowest.
    fn e4m3(self, words: Self::W, index: usize) -> Self::F;
    fn splat_word(self, word: u32) -> Self::W;
    /// `sum + a.0 * b.0 + a.1 * b.1 + a.2 * b.2 + a.3 * b.3` over the four bytes of each word, those of `a` unsigned and those of `b`
    /// signed; exact, as an i32 in a word.
    fn dot_bytes(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W;
    /// `sum + a.0 * b.0 + a.1 * b.1` over the two i16 of each word; exact, as an i32 in a word.
    fn dot_halves(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W;
    /// `words >> (4 * nibbles) & mask`.
    fn field(self, words: Self::W, nibbles: usize, mask: u32) -> Self::W;
    /// Adds words.
    fn add_words(self, a: Self::W, b: Self::W) -> Self::W;
    /// Converts words that are i32 to floats.
    fn integers(self, words: Self::W) -> Self::F;
    /// Turns a square of `LANES` rows of `LANES` words, `from_stride` and `to_stride` words from row to row.
    ///
    /// # Safety
    /// The square can be read at `from` and written at `to`, at any alignment.
    unsafe fn transpose(self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize);
    /// Writes pairs of one element of `first` and one of `second`, `2 * LANES` of them.
    ///
    /// # Safety
    /// `2 * LANES` elements can be read at `first` and `second`, and as many pairs written at `to`, at any alignment.
    unsafe fn interleave(self, first: *const u16, second: *const u16, to: *mut u32);
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
    /// Pairs each of `2 * LANES` elements of one row with that of another.
    ///
    /// # Safety
    /// `2 * LANES` bf16 can be read at `first` and at `second`, at any alignment.
    unsafe fn weave(self, first: *const u16, second: *const u16) -> [Self::Pairs; 2];
    /// Rounds to the nearest bf16, ties to even, and pairs neighbours; those of the first vector come first.
    fn round_pairs(self, values: [Self::F; 2]) -> Self::Pairs;
    /// # Safety
    /// `LANES` pairs can be written at `to`.
    unsafe fn store_pairs(self, to: *mut u32, pairs: Self::Pairs);
    /// # Safety
    /// `LANES` pairs can be read at `from`.
    unsafe fn load_pairs(self, from: *const u32) -> Self::Pairs;
    /// Widens the finite e4m3 floats of each word: the first two bytes as a pair, and the last two.
    fn e4m3_pairs(self, words: Self::W) -> [Self::Pairs; 2];
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

/// `2^x` for `x` below 127, within 3e-6 of itself, a hundredth of what rounding to bf16 takes; 0 for minus infinity.
#[inline(always)]
pub(crate) fn exp2_short<S: Simd>(simd: S, x: S::F) -> S::F {
    // The polynomial of the fourth degree whose largest relative error on [-0.5, 0.5] is least (Remez).
    const COEFFICIENTS: [f32; 5] = [0.999_999_3, 0.693_121_8, 0.240_247_44, 0.055_917_86, 0.009_570_102];
    let x = simd.max(x, simd.splat(-150.0));
    let whole = simd.round(x);
    let part = simd.sub(x, whole);
    let mut sum = simd.splat(COEFFICIENTS[4]);
    for coefficient in COEFFICIENTS[..4].iter().rev() {
        sum = simd.fma(sum, part, simd.splat(*coefficient));
    }
    simd.scale(sum, whole)
}

/// `tanh x`, within 2e-7.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(simd: S, x: S::F) -> S::F {
    let power = exp2(simd, simd.mul(x, simd.splat(2.0 * std::f32::consts::LOG2_E)));
    simd.sub(simd.splat(1.0), simd.div(simd.splat(2.0), simd.add(simd.splat(1.0), power)))
}

/// Error function, within 3e-7: the rational approximation of Eigen and XLA (`ErfImpl32`), constant beyond 4.
#[inline(always)]
fn erf<S: Simd>(simd: S, x: S::F) -> S::F {
    const ABOVE: [f32; 7] =
        [-1.609_603_3e-2, -2.954_6e-3, -7.349_906e-4, -5.692_506_4e-5, -2.101_024e-6, 2.770_681_4e-8, -2.726_142_3e-10];
    const BELOW: [f32; 5] = [-1.426_473_9e-2, -7.373_329e-3, -1.682_827e-3, -2.133_740_6e-4, -1.456_607_2e-5];
    let x = simd.min(simd.max(x, simd.splat(-4.0)), simd.splat(4.0));
    let square = simd.mul(x, x);
    let polynomial = |coefficients: &[f32]| {
        let mut sum = simd.splat(0.0);
        for coefficient in coefficients.iter().rev() {
            sum = simd.fma(sum, square, simd.splat(*coefficient));
        }
        sum
    };
    simd.div(simd.mul(x, polynomial(&ABOVE)), polynomial(&BELOW))
}

/// `x / 2 * (1 + erf(x / sqrt 2))`.
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::F) -> S::F {
    let erf = erf(simd, simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2)));
    simd.mul(simd.mul(x, simd.splat(0.5)), simd.add(simd.splat(1.0), erf))
}

/// `x / 2 * (1 + tanh u)` with `u = sqrt(2 / pi) * (x + 0.044715 x^3)`, which is `x / (1 + e^(-2 u))`.
#[inline(always)]
fn gelu_tanh<S: Simd>(simd: S, x: S::F) -> S::F {
    const SCALE: f32 = -2.0 * 0.797_884_6 * std::f32::consts::LOG2_E;
    let inner = simd.fma(simd.mul(x, x), simd.splat(0.044_715 * SCALE), simd.splat(SCALE));
    simd.div(x, simd.add(simd.splat(1.0), exp2(simd, simd.mul(x, inner))))
}

/// Applies `activation`.
#[inline(always)]
pub(crate) fn activate<S: Simd>(simd: S, activation: Activation, x: S::F) -> S::F {
    match activation {
        Activation::Silu => silu(simd, x),
        Activation::Gelu => gelu(simd, x),
        Activation::GeluTanh => gelu_tanh(simd, x),
    }
}

/// Multiplies `floats`, whole vectors, by `scale` and then bends them below `cap`: `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn scale_and_cap<S: Simd>(simd: S, floats: &mut [f32], scale: f32, cap: Option<f32>) {
    let before = cap.map_or(scale, |cap| scale / cap);
    for vector in floats.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk holds a vector.
        unsafe {
            let mut value = simd.mul(simd.load(vector.as_ptr()), simd.splat(before));
            if let Some(cap) = cap {
                value = simd.mul(tanh(simd, value), simd.splat(cap));
            }
            simd.store(vector.as_mut_ptr(), value);
        }
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn silu<S: Simd>(simd: S, x: S::F) -> S::F {
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

#[cfg(test)]
mod tests {
    use super::{portable::Portable, *};

    /// Applies `function` to one number.
    fn one(function: impl Fn(Portable, <Portable as Simd>::F) -> <Portable as Simd>::F, x: f32) -> f64 {
        let mut out = [0.0f32; 16];
        // SAFETY: an array of 16 holds a vector.
        unsafe { Portable.store(out.as_mut_ptr(), function(Portable, Portable.splat(x))) };
        f64::from(out[0])
    }

    /// The integral of the definition by Simpson's rule.
    fn exact_erf(x: f64) -> f64 {
        let (steps, bell) = (400, |t: f64| (-t * t).exp());
        let width = x / f64::from(steps);
        let weight = |step: i32| if step == 0 || step == steps { 1.0 } else { f64::from(2 + step % 2 * 2) };
        let sum: f64 = (0..=steps).map(|step| weight(step) * bell(f64::from(step) * width)).sum();
        sum * width / 3.0 * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn activations_are_as_exact_as_they_say() {
        for step in -1200..=1200 {
            let x = step as f32 / 100.0;
            let wide = f64::from(x);
            let check = |name: &str, out: f64, expected: f64| {
                let error = (out - expected).abs();
                assert!(error <= 5e-7 * wide.abs().max(1.0), "{name}({x}) = {out}, expected {expected}");
            };
            check("tanh", one(tanh, x), wide.tanh());
            check("erf", one(erf, x), exact_erf(wide));
            let gelu = wide / 2.0 * (1.0 + exact_erf(wide / 2f64.sqrt()));
            check("gelu", one(|simd, x| activate(simd, Activation::Gelu, x), x), gelu);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let tanh = wide / 2.0 * (1.0 + inner.tanh());
            check("gelu_tanh", one(|simd, x| activate(simd, Activation::GeluTanh, x), x), tanh);
            check("silu", one(|simd, x| activate(simd, Activation::Silu, x), x), wide / (1.0 + (-wide).exp()));
        }
    }

    #[test]
    fn caps_hold_for_anything() {
        let mut logits = [0.0, 1.0, -1e30, 1e30, f32::INFINITY, 6.0, -6.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        scale_and_cap(Portable, &mut logits, 0.5, Some(3.0));
        let expected = [0.0, 0.4954214, -3.0, 3.0, 3.0, 2.2847825, -2.2847825, 0.2494229];
        for (logit, expected) in logits.iter().zip(expected) {
            assert!((logit - expected).abs() < 2e-6, "{logit}, expected {expected}");
        }
    }
}
