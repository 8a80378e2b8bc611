//! NEON: two registers of four lanes side by side, of thirty-two. Every arm64 processor has it.
//!
//! Eight lanes, because two registers for each vector are what the tiles that were cut for eight lanes fill here: four rows of
//! two vectors are sixteen registers of sums.

use super::Simd;
use std::arch::{aarch64::*, asm};

/// The NEON unit of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// Makes the token: the unit is part of the architecture.
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// Lanes `0 .. 4` and `4 .. 8`.
type F = [float32x4_t; 2];
type W = [uint32x4_t; 2];

/// `a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]`.
#[inline(always)]
fn pairs(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: arm64 has the instruction.
    unsafe { vpaddq_f32(a, b) }
}

/// Widens bytes of e4m3 in 32 bits without a branch (`scheme::widen_e4m3`).
#[inline(always)]
fn widen_e4m3(bits: uint32x4_t) -> float32x4_t {
    // SAFETY: arm64 has the instructions.
    unsafe {
        let magnitude = vshlq_n_u32::<20>(vandq_u32(bits, vdupq_n_u32(0x7f)));
        let sign = vshlq_n_u32::<24>(vandq_u32(bits, vdupq_n_u32(0x80)));
        let small = vreinterpretq_f32_u32(vorrq_u32(magnitude, sign));
        vmulq_f32(small, vdupq_n_f32(f32::from_bits((127 + 120) << 23)))
    }
}

// SAFETY of the blocks below: arm64 has the instructions; memory is vouched for by the callers of the unsafe methods.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    type F = F;
    type W = W;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> F {
        unsafe { [vdupq_n_f32(value); 2] }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        unsafe { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        unsafe { [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        unsafe { [vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // Chooses as the other units do where one is not a number: the second.
        unsafe { [0, 1].map(|half| vbslq_f32(vcgtq_f32(a[half], b[half]), a[half], b[half])) }
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        unsafe { [0, 1].map(|half| vbslq_f32(vcltq_f32(a[half], b[half]), a[half], b[half])) }
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        unsafe { a.map(|a| vrndnq_f32(a)) }
    }

    #[inline(always)]
    fn pow2(self, n: F) -> F {
        unsafe {
            n.map(|n| {
                let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
            })
        }
    }

    #[inline(always)]
    fn scale(self, a: F, n: F) -> F {
        self.mul(a, self.pow2(self.max(n, self.splat(-127.0))))
    }

    #[inline(always)]
    fn sum4(self, vectors: [F; 4]) -> [f32; 4] {
        let [a, b, c, d] = vectors.map(|[low, high]| unsafe { vaddq_f32(low, high) });
        let sums = pairs(pairs(a, b), pairs(c, d));
        unsafe { std::mem::transmute(sums) }
    }

    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(a[0], a[1])) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: F) {
        unsafe {
            vst1q_f32(to, value[0]);
            vst1q_f32(to.add(4), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> F {
        unsafe {
            let bits = vld1q_u16(from);
            let wide = [vshll_n_u16::<16>(vget_low_u16(bits)), vshll_n_u16::<16>(vget_high_u16(bits))];
            wide.map(|bits| vreinterpretq_f32_u32(bits))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, value: F) {
        unsafe {
            let [low, high] = self.round_bf16(value).map(|value| vshrn_n_u32::<16>(vreinterpretq_u32_f32(value)));
            vst1q_u16(to, vcombine_u16(low, high));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F {
        unsafe {
            let bits = vld1q_u16(from);
            let (low, high): (float32x4_t, float32x4_t);
            // The intrinsics of these two wait for a stable f16.
            asm!(
                "fcvtl {low:v}.4s, {bits:v}.4h",
                "fcvtl2 {high:v}.4s, {bits:v}.8h",
                low = out(vreg) low, high = lateout(vreg) high, bits = in(vreg) bits,
                options(pure, nomem, nostack, preserves_flags),
            );
            [low, high]
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: F) {
        unsafe {
            let bits: uint16x8_t;
            asm!(
                "fcvtn {bits:v}.4h, {low:v}.4s",
                "fcvtn2 {bits:v}.8h, {high:v}.4s",
                low = in(vreg) value[0], high = in(vreg) value[1], bits = out(vreg) bits,
                options(pure, nomem, nostack, preserves_flags),
            );
            vst1q_u16(to, bits);
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> F {
        unsafe {
            let wide = vmovl_s8(vld1_s8(from));
            [vmovl_s16(vget_low_s16(wide)), vmovl_s16(vget_high_s16(wide))].map(|wide| vcvtq_f32_s32(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> F {
        unsafe {
            let wide = vmovl_u8(vld1_u8(from));
            [vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide))].map(widen_e4m3)
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        // Four squares of four.
        for (row, column) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
            unsafe {
                let from = from.add(row * from_stride + column);
                let [a, b, c, d] = [0, 1, 2, 3].map(|row| vld1q_u32(from.add(row * from_stride)));
                let pairs = |a: uint32x4_t, b: uint32x4_t| {
                    [vreinterpretq_u64_u32(vtrn1q_u32(a, b)), vreinterpretq_u64_u32(vtrn2q_u32(a, b))]
                };
                let (ab, cd) = (pairs(a, b), pairs(c, d));
                let columns = [
                    vtrn1q_u64(ab[0], cd[0]),
                    vtrn1q_u64(ab[1], cd[1]),
                    vtrn2q_u64(ab[0], cd[0]),
                    vtrn2q_u64(ab[1], cd[1]),
                ];
                let to = to.add(column * to_stride + row);
                for (index, column) in columns.into_iter().enumerate() {
                    vst1q_u32(to.add(index * to_stride), vreinterpretq_u32_u64(column));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave(self, first: *const u16, second: *const u16, to: *mut u32) {
        for at in [0, 8] {
            unsafe {
                let (first, second) = (vld1q_u16(first.add(at)), vld1q_u16(second.add(at)));
                vst1q_u32(to.add(at), vreinterpretq_u32_u16(vzip1q_u16(first, second)));
                vst1q_u32(to.add(at + 4), vreinterpretq_u32_u16(vzip2q_u16(first, second)));
            }
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const u32) -> (F, F) {
        unsafe {
            let pairs = self.load_words(from);
            let first = pairs.map(|pairs| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)));
            let second = pairs.map(|pairs| vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))));
            (first, second)
        }
    }

    #[inline(always)]
    fn round_bf16(self, value: F) -> F {
        unsafe {
            value.map(|value| {
                // Adds just under half of the last kept bit, and that bit itself so that ties go to even; a NaN only has to stay
                // one.
                let bits = vreinterpretq_u32_f32(value);
                let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
                let kept = vreinterpretq_f32_u32(vandq_u32(rounded, vdupq_n_u32(0xffff_0000)));
                vbslq_f32(vceqq_f32(value, value), kept, vdupq_n_f32(f32::NAN))
            })
        }
    }

    #[inline(always)]
    unsafe fn load_words(self, from: *const u32) -> W {
        unsafe { [vld1q_u32(from), vld1q_u32(from.add(4))] }
    }

    #[inline(always)]
    fn nibble(self, words: W, index: usize) -> F {
        unsafe {
            let down = vdupq_n_s32(-4 * index as i32);
            words.map(|words| vcvtq_f32_u32(vandq_u32(vshlq_u32(words, down), vdupq_n_u32(15))))
        }
    }

    #[inline(always)]
    fn byte(self, words: W, index: usize) -> F {
        unsafe {
            let down = vdupq_n_s32(-8 * index as i32);
            words.map(|words| vcvtq_f32_u32(vandq_u32(vshlq_u32(words, down), vdupq_n_u32(255))))
        }
    }

    #[inline(always)]
    fn e4m3(self, words: W, index: usize) -> F {
        unsafe {
            let down = vdupq_n_s32(-8 * index as i32);
            words.map(|words| widen_e4m3(vshlq_u32(words, down)))
        }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> W {
        unsafe { [vdupq_n_u32(word); 2] }
    }

    #[inline(always)]
    fn dot_bytes(self, sum: W, a: W, b: W) -> W {
        unsafe {
            [0, 1].map(|half| {
                // `a - 128` is signed and its products fit 16 bits; what that leaves out is 128 times the sum of `b`.
                let a = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(a[half]), vdupq_n_u8(0x80)));
                let b = vreinterpretq_s8_u32(b[half]);
                let low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
                let high = vpaddlq_s16(vmull_high_s8(a, b));
                let rest = vshlq_n_s32::<7>(vpaddlq_s16(vpaddlq_s8(b)));
                let products = vaddq_s32(vpaddq_s32(low, high), rest);
                vaddq_u32(sum[half], vreinterpretq_u32_s32(products))
            })
        }
    }

    #[inline(always)]
    fn dot_halves(self, sum: W, a: W, b: W) -> W {
        unsafe {
            [0, 1].map(|half| {
                let (a, b) = (vreinterpretq_s16_u32(a[half]), vreinterpretq_s16_u32(b[half]));
                let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
                let products = vpaddq_s32(low, vmull_high_s16(a, b));
                vaddq_u32(sum[half], vreinterpretq_u32_s32(products))
            })
        }
    }

    #[inline(always)]
    fn field(self, words: W, nibbles: usize, mask: u32) -> W {
        unsafe {
            let shift = vdupq_n_s32(-4 * nibbles as i32);
            words.map(|words| vandq_u32(vshlq_u32(words, shift), vdupq_n_u32(mask)))
        }
    }

    #[inline(always)]
    fn add_words(self, a: W, b: W) -> W {
        unsafe { std::array::from_fn(|i| vaddq_u32(a[i], b[i])) }
    }

    #[inline(always)]
    fn integers(self, words: W) -> F {
        unsafe { words.map(|words| vcvtq_f32_s32(vreinterpretq_s32_u32(words))) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint; no address makes it fault.
        unsafe { asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags)) }
    }
}
