//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

use super::Simd;
use std::arch::x86_64::*;

/// The AVX2 unit of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Says whether this machine has all instructions used here.
    pub(crate) fn available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    /// Makes the token.
    ///
    /// # Safety
    /// [`Avx2::available`] said yes.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY of the blocks below: a value of `Avx2` exists only where its instructions do; memory is vouched for by the callers
// of the unsafe methods.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = __m256;
    type W = __m256i;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn pow2(self, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn scale(self, a: __m256, n: __m256) -> __m256 {
        self.mul(a, self.pow2(self.max(n, self.splat(-127.0))))
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let low = _mm256_shuffle_ps::<0x44>(ab, cd);
            let high = _mm256_shuffle_ps::<0xee>(ab, cd);
            let sums = _mm256_add_ps(low, high);
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            std::mem::transmute(sums)
        }
    }

    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, value: __m256) {
        unsafe {
            let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.round_bf16(value)));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: __m256) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m256 {
        unsafe {
            // As f16 the exponent is too small by 8; widening the sign leaves two copies of it, of which the mask keeps one.
            let wide = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(from.cast())));
            let halves = _mm_and_si128(wide, _mm_set1_epi16(0xbf80_u16 as i16));
            _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (__m256, __m256) {
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast());
            let first = _mm256_slli_epi32::<16>(pairs);
            let second = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            (_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    fn round_bf16(self, value: __m256) -> __m256 {
        unsafe {
            // Adds just under half of the last kept bit, and that bit itself so that ties go to even; a NaN only has to stay one.
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let kept = _mm256_and_si256(rounded, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
            _mm256_blendv_ps(_mm256_castsi256_ps(kept), _mm256_set1_ps(f32::NAN), nan)
        }
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u32) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    fn nibble(self, words: __m256i, index: usize) -> __m256 {
        unsafe {
            let low = _mm256_srl_epi32(words, _mm_cvtsi32_si128(4 * index as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(15)))
        }
    }

    #[inline(always)]
    fn byte(self, words: __m256i, index: usize) -> __m256 {
        unsafe {
            let low = _mm256_srl_epi32(words, _mm_cvtsi32_si128(8 * index as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(255)))
        }
    }

    #[inline(always)]
    fn e4m3(self, words: __m256i, index: usize) -> __m256 {
        unsafe {
            // The shift to the right copies the sign above the exponent; the mask leaves one copy (`scheme::widen_e4m3`).
            let high = _mm256_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * index as i32));
            let bits = _mm256_and_si256(_mm256_srai_epi32::<4>(high), _mm256_set1_epi32(0x87f0_0000_u32 as i32));
            _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(f32::from_bits((127 + 120) << 23)))
        }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(word as i32) }
    }

    #[inline(always)]
    fn dot_bytes(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe {
            // Even and odd bytes apart, as i16: two products of them fit an i32, and nothing saturates.
            let even = (_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b)));
            let odd = (_mm256_srli_epi16::<8>(a), _mm256_srai_epi16::<8>(b));
            let products = _mm256_add_epi32(_mm256_madd_epi16(even.0, even.1), _mm256_madd_epi16(odd.0, odd.1));
            _mm256_add_epi32(sum, products)
        }
    }

    #[inline(always)]
    fn dot_halves(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }

    #[inline(always)]
    fn field(self, words: __m256i, nibbles: usize, mask: u32) -> __m256i {
        unsafe {
            let low = _mm256_srl_epi32(words, _mm_cvtsi32_si128(4 * nibbles as i32));
            _mm256_and_si256(low, _mm256_set1_epi32(mask as i32))
        }
    }

    #[inline(always)]
    fn add_words(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    fn integers(self, words: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(words) }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        unsafe {
            for four in (0..8).step_by(4) {
                let from = from.add(four);
                let [a, b, c, d] = [
                    every_fourth(from, from_stride),
                    every_fourth(from.add(from_stride), from_stride),
                    every_fourth(from.add(2 * from_stride), from_stride),
                    every_fourth(from.add(3 * from_stride), from_stride),
                ];
                // Squares of four words, which unpacking turns in each half.
                let ab = [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)];
                let cd = [_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)];
                let to = to.add(four * to_stride);
                _mm256_storeu_si256(to.cast(), _mm256_unpacklo_epi64(ab[0], cd[0]));
                _mm256_storeu_si256(to.add(to_stride).cast(), _mm256_unpackhi_epi64(ab[0], cd[0]));
                _mm256_storeu_si256(to.add(2 * to_stride).cast(), _mm256_unpacklo_epi64(ab[1], cd[1]));
                _mm256_storeu_si256(to.add(3 * to_stride).cast(), _mm256_unpackhi_epi64(ab[1], cd[1]));
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const u16, second: *const u16, to: *mut u32) {
        unsafe {
            let (first, second) = (_mm256_loadu_si256(first.cast()), _mm256_loadu_si256(second.cast()));
            let low = _mm256_unpacklo_epi16(first, second);
            let high = _mm256_unpackhi_epi16(first, second);
            _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(to.add(8).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Loads the first four words of a row and of the fourth after it, one row to each half.
///
/// # Safety
/// The machine has AVX2, and the rows can be read.
#[inline(always)]
unsafe fn every_fourth(rows: *const u32, stride: usize) -> __m256i {
    // SAFETY: the caller's word.
    unsafe {
        let first = _mm256_castsi128_si256(_mm_loadu_si128(rows.cast()));
        _mm256_inserti128_si256::<1>(first, _mm_loadu_si128(rows.add(4 * stride).cast()))
    }
}
