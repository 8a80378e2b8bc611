//! AVX-512: sixteen lanes, thirty-two registers, and with BF16 two products of bf16 for each lane and instruction.

use super::{DotBf16, Simd};
use crate::cpu::scheme::widen_e4m3;
use std::arch::x86_64::*;

/// The AVX-512 unit of this machine; with `BF16`, one that has the bf16 instructions and those for bytes that came before them
/// (VNNI, VBMI).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// Says whether this machine has all instructions used here.
    pub(crate) fn available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16
                || (is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")))
    }

    /// Makes the token.
    ///
    /// # Safety
    /// [`Avx512::available`] said yes.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY of the blocks below: a value of `Avx512` exists only where its instructions do (those of BF16 are reached only with
// `BF16`); memory is vouched for by the callers of the unsafe methods.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type W = __m512i;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let sums = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            std::mem::transmute(sums)
        }
    }

    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, value: __m512) {
        unsafe {
            if BF16 {
                let bits: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
                _mm256_storeu_si256(to.cast(), bits);
            } else {
                let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.round_bf16(value)));
                _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
            }
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: __m512) {
        unsafe {
            let bits = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            _mm256_storeu_si256(to.cast(), bits);
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m512 {
        unsafe {
            // As f16 the exponent is too small by 8; widening the sign leaves two copies of it, of which the mask keeps one.
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
            let halves = _mm256_and_si256(wide, _mm256_set1_epi16(0xbf80_u16 as i16));
            _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (__m512, __m512) {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let first = _mm512_slli_epi32::<16>(pairs);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second))
        }
    }

    #[inline(always)]
    fn round_bf16(self, value: __m512) -> __m512 {
        unsafe {
            if BF16 {
                let bits: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
                return _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
            }
            // Adds just under half of the last kept bit, and that bit itself so that ties go to even; a NaN only has to stay one.
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let kept = _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            _mm512_mask_blend_ps(nan, _mm512_castsi512_ps(kept), _mm512_set1_ps(f32::NAN))
        }
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn nibble(self, words: __m512i, index: usize) -> __m512 {
        unsafe {
            // A look-up heeds the lowest four bits of a word and no others: mask and conversion in one instruction.
            let numbers = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            _mm512_permutexvar_ps(_mm512_srl_epi32(words, _mm_cvtsi32_si128(4 * index as i32)), numbers)
        }
    }

    #[inline(always)]
    fn byte(self, words: __m512i, index: usize) -> __m512 {
        unsafe {
            let low = _mm512_srl_epi32(words, _mm_cvtsi32_si128(8 * index as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32(255)))
        }
    }

    #[inline(always)]
    fn e4m3(self, words: __m512i, index: usize) -> __m512 {
        unsafe {
            // The shift to the right copies the sign above the exponent; the mask leaves one copy (`scheme::widen_e4m3`).
            let high = _mm512_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * index as i32));
            let bits = _mm512_and_si512(_mm512_srai_epi32::<4>(high), _mm512_set1_epi32(0x87f0_0000_u32 as i32));
            _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(f32::from_bits((127 + 120) << 23)))
        }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(word as i32) }
    }

    #[inline(always)]
    fn dot_bytes(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe {
            if BF16 {
                return _mm512_dpbusd_epi32(sum, a, b);
            }
            // Even and odd bytes apart, as i16: two products of them fit an i32, and nothing saturates.
            let even = (_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(b)));
            let odd = (_mm512_srli_epi16::<8>(a), _mm512_srai_epi16::<8>(b));
            let products = _mm512_add_epi32(_mm512_madd_epi16(even.0, even.1), _mm512_madd_epi16(odd.0, odd.1));
            _mm512_add_epi32(sum, products)
        }
    }

    #[inline(always)]
    fn dot_halves(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe {
            if !BF16 {
                return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
            }
            dpwssd(sum, a, b)
        }
    }

    #[inline(always)]
    fn field(self, words: __m512i, nibbles: usize, mask: u32) -> __m512i {
        unsafe {
            let low = _mm512_srl_epi32(words, _mm_cvtsi32_si128(4 * nibbles as i32));
            _mm512_and_si512(low, _mm512_set1_epi32(mask as i32))
        }
    }

    #[inline(always)]
    fn add_words(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn integers(self, words: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(words) }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        unsafe {
            for four in (0..16).step_by(4) {
                let from = from.add(four);
                let [a, b, c, d] = [
                    every_fourth(from, from_stride),
                    every_fourth(from.add(from_stride), from_stride),
                    every_fourth(from.add(2 * from_stride), from_stride),
                    every_fourth(from.add(3 * from_stride), from_stride),
                ];
                // Squares of four words, which unpacking turns in each quarter.
                let ab = [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)];
                let cd = [_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)];
                let to = to.add(four * to_stride);
                _mm512_storeu_si512(to.cast(), _mm512_unpacklo_epi64(ab[0], cd[0]));
                _mm512_storeu_si512(to.add(to_stride).cast(), _mm512_unpackhi_epi64(ab[0], cd[0]));
                _mm512_storeu_si512(to.add(2 * to_stride).cast(), _mm512_unpacklo_epi64(ab[1], cd[1]));
                _mm512_storeu_si512(to.add(3 * to_stride).cast(), _mm512_unpackhi_epi64(ab[1], cd[1]));
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const u16, second: *const u16, to: *mut u32) {
        unsafe {
            let [low, high] = weave(first, second);
            _mm512_storeu_si512(to.cast(), low);
            _mm512_storeu_si512(to.add(16).cast(), high);
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// Adds the products of two pairs of sixteen bits to each lane. The intrinsic becomes `vpmaddwd` and `vpaddd`, a shorter way from sum
/// to sum that fills all pipes where one instruction leaves half of them free.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: it computes in registers alone.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Loads 32 elements of each of two rows and puts those of one next to those of the other.
///
/// # Safety
/// The machine has AVX-512 BW, and the rows can be read.
#[inline(always)]
unsafe fn weave(first: *const u16, second: *const u16) -> [__m512i; 2] {
    // Element `i` of the first next to element `i` of the second, which the instruction counts from 32 on.
    const PAIRS: [u16; 64] = {
        let mut pairs = [0; 64];
        let mut at = 0;
        while at < 64 {
            pairs[at] = at as u16 / 2 + at as u16 % 2 * 32;
            at += 1;
        }
        pairs
    };
    // SAFETY: the caller's word.
    unsafe {
        let (first, second) = (_mm512_loadu_si512(first.cast()), _mm512_loadu_si512(second.cast()));
        let (low, high) = (_mm512_loadu_si512(PAIRS.as_ptr().cast()), _mm512_loadu_si512(PAIRS[32..].as_ptr().cast()));
        [_mm512_permutex2var_epi16(first, low, second), _mm512_permutex2var_epi16(first, high, second)]
    }
}

/// Loads the first four words of every fourth row, one row to each quarter.
///
/// # Safety
/// The machine has AVX-512, and the rows can be read.
#[inline(always)]
unsafe fn every_fourth(rows: *const u32, stride: usize) -> __m512i {
    // SAFETY: the caller's word.
    unsafe {
        let quarters = _mm512_castsi128_si512(_mm_loadu_si128(rows.cast()));
        let quarters = _mm512_inserti32x4::<1>(quarters, _mm_loadu_si128(rows.add(4 * stride).cast()));
        let quarters = _mm512_inserti32x4::<2>(quarters, _mm_loadu_si128(rows.add(8 * stride).cast()));
        _mm512_inserti32x4::<3>(quarters, _mm_loadu_si128(rows.add(12 * stride).cast()))
    }
}

// SAFETY of the blocks below: as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl DotBf16 for Avx512<true> {
    type Pairs = __m512i;

    #[inline(always)]
    fn dot(self, sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        unsafe {
            let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(pair as i32) }
    }

    #[inline(always)]
    unsafe fn weave(self, first: *const u16, second: *const u16) -> [__m512i; 2] {
        unsafe { weave(first, second) }
    }

    #[inline(always)]
    fn round_pairs(self, [first, second]: [__m512; 2]) -> __m512i {
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
    }

    #[inline(always)]
    unsafe fn store_pairs(self, to: *mut u32, pairs: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), pairs) }
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn e4m3_pairs(self, words: __m512i) -> [__m512i; 2] {
        /// The lower and the upper byte of the bf16 of every magnitude.
        static BYTES: [[u8; 128]; 2] = {
            let (mut bytes, mut code) = ([[0; 128]; 2], 0);
            while code < 128 {
                let high = (widen_e4m3(code as u8).to_bits() >> 16) as u16;
                (bytes[0][code], bytes[1][code]) = (high as u8, (high >> 8) as u8);
                code += 1;
            }
            bytes
        };
        #[inline(always)]
        unsafe fn half(bytes: &[u8; 128], at: usize) -> __m512i {
            unsafe { _mm512_loadu_si512(bytes.as_ptr().add(at).cast()) }
        }
        unsafe {
            // A look-up heeds the lowest seven bits of an index: the sign is left out.
            let low = _mm512_permutex2var_epi8(half(&BYTES[0], 0), words, half(&BYTES[0], 64));
            let high = _mm512_permutex2var_epi8(half(&BYTES[1], 0), words, half(&BYTES[1], 64));
            let high = _mm512_or_si512(high, _mm512_and_si512(words, _mm512_set1_epi8(0x80_u8 as i8)));
            // Four bf16 of a word stand in two lanes now; what belongs together is gathered from both halves.
            let a = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
            let b = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
            let (first, last) = (_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
            [_mm512_castps_si512(first), _mm512_castps_si512(last)]
        }
    }
}
