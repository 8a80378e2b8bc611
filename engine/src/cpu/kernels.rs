//! The kernels of this machine: one table for each instruction set, chosen once at run time.

#[cfg(target_arch = "aarch64")]
use super::simd::neon::Neon;
use super::{
    adapter::{self, ShrinkTask},
    attention::{self, AttentionTask},
    encode::{self, EncodeTask, Encoding},
    format::Format,
    latent::{self, LatentTask},
    linear::{
        self, LinearTask,
        codes::{self, Coded},
        floats,
        quantized::{self, Quantized},
        tiled,
    },
    norm::{self, NormTask},
    packed::{Packed, WeightType},
    rotary::{self, RotaryTask},
    scheme::Code,
    simd::{self, portable::Portable},
};
#[cfg(target_arch = "x86_64")]
use super::{
    amx,
    simd::{avx2::Avx2, avx512::Avx512},
};
use crate::model::checkpoint::ElementType;
use std::ops::Range;

/// Kernels for one instruction set. All are unsafe for the pointers in their tasks, and need the set they were compiled for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernels {
    /// Instruction set, for people.
    pub(crate) name: &'static str,
    linear_f32: unsafe fn(&LinearTask<'_>, &mut [f32]),
    linear_f16: unsafe fn(&LinearTask<'_>, &mut [f32]),
    linear_bf16: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// bf16 weights and f32 inputs that nobody rounded.
    linear_bf16_f32: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// Codes, and f32 inputs.
    widened_int4: unsafe fn(&LinearTask<'_>, &mut [f32]),
    widened_int8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    widened_fp8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// Codes, and inputs that are codes of sixteen bits.
    linear_int4: unsafe fn(&LinearTask<'_>, &mut [f32]),
    linear_int8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// Codes, and inputs that are codes of eight bits.
    linear_w8a8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// Codes that are floats, and inputs in `bf16_format`; where that is bf16.
    linear_fp8: Option<unsafe fn(&LinearTask<'_>, &mut [f32])>,
    /// Inputs of `linear_bf16`.
    bf16_format: Format,
    pub(crate) encode: unsafe fn(&EncodeTask<'_>),
    pub(crate) shrink: unsafe fn(&ShrinkTask<'_>),
    pub(crate) norm: unsafe fn(&NormTask<'_>),
    pub(crate) rotary: unsafe fn(&RotaryTask<'_>),
    pub(crate) latent: unsafe fn(&LatentTask<'_>),
    pub(crate) attention: unsafe fn(&AttentionTask<'_>, &mut [f32]),
    pub(crate) attention_parts: unsafe fn(&AttentionTask<'_>, Range<usize>, &mut [f32], &mut [f32]),
    pub(crate) attention_merge: unsafe fn(&AttentionTask<'_>, usize, &[f32], &mut [f32]),
    /// Multiplies whole panels of logits by a scale and caps them.
    pub(crate) scale_and_cap: unsafe fn(&mut [f32], f32, Option<f32>),
    /// Reads a slice as fast as memory gives it and returns its largest element.
    pub(crate) read: unsafe fn(&[f32]) -> f32,
}

impl Kernels {
    /// Returns the best kernels this machine can run.
    pub(crate) fn detect() -> &'static Kernels {
        Self::available()[0]
    }

    /// Returns all kernels this machine can run, best first.
    ///
    /// The order is a rule about processors and not a measurement, so that equal workers always choose alike: what they
    /// compute must agree to the bit.
    pub(crate) fn available() -> Vec<&'static Kernels> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let dot = Avx512::<true>::available();
            // Intel's bf16 dot takes four times as long as its f32 multiply-add and does twice the work (measured on
            // Sapphire Rapids); AMD's takes as long.
            let slow_dot = is_intel();
            if dot && amx::available() {
                all.push(&avx512_amx::KERNELS);
            }
            if dot && !slow_dot {
                all.push(&avx512_bf16::KERNELS);
            }
            if Avx512::<false>::available() {
                all.push(&avx512::KERNELS);
            }
            if dot && slow_dot {
                all.push(&avx512_bf16::KERNELS);
            }
            if Avx2::available() {
                all.push(&avx2::KERNELS);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.extend([&neon::KERNELS]);
        all.push(&portable::KERNELS);
        all
    }

    /// Returns the kernel for `weights` that is fastest, and how it reads its inputs.
    pub(crate) fn linear(&self, weights: &Packed) -> (LinearKernel, Encoding) {
        let rows = weights.groups().rows;
        let segmented = rows.segment > 0;
        match weights.weights() {
            WeightType::Float(ElementType::F32) => (self.linear_f32, Encoding::Floats(Format::F32)),
            WeightType::Float(ElementType::F16) => (self.linear_f16, Encoding::Floats(Format::F32)),
            WeightType::Float(ElementType::Bf16) => (self.linear_bf16, Encoding::Floats(self.bf16_format)),
            WeightType::Quantized(scheme) => match (scheme.code, self.linear_fp8) {
                (Code::Int4, _) if segmented && !rows.narrow => (self.linear_int4, Encoding::Codes(rows)),
                (Code::Int8, _) if segmented && !rows.narrow => (self.linear_int8, Encoding::Codes(rows)),
                (Code::Int8, _) if segmented => (self.linear_w8a8, Encoding::Codes(rows)),
                (Code::Fp8, Some(linear_fp8)) if segmented && !scheme.offsets => {
                    (linear_fp8, Encoding::Floats(self.bf16_format))
                }
                (code, _) => (self.widened(code), Encoding::Floats(Format::F32)),
            },
        }
    }

    /// Returns the kernel for `weights` whose inputs lie in `format`, which [`Kernels::format`] gave for weights that these are
    /// among.
    pub(crate) fn linear_of_floats(&self, weights: &Packed, format: Format) -> LinearKernel {
        match (weights.weights(), self.linear(weights)) {
            (_, (kernel, Encoding::Floats(wanted))) if wanted == format => kernel,
            (WeightType::Float(ElementType::Bf16), _) if format == Format::F32 => self.linear_bf16_f32,
            (WeightType::Quantized(scheme), _) if format == Format::F32 => self.widened(scheme.code),
            (weights, _) => unreachable!("{weights:?} and inputs that are {format:?}"),
        }
    }

    fn widened(&self, code: Code) -> LinearKernel {
        match code {
            Code::Int4 => self.widened_int4,
            Code::Int8 => self.widened_int8,
            Code::Fp8 => self.widened_fp8,
        }
    }

    /// Returns how the inputs of a model's linears are stored: as bf16 weights want them when all read them so, else as f32.
    pub(crate) fn format<'a>(&self, mut weights: impl Iterator<Item = &'a Packed>) -> Format {
        let bf16 = Encoding::Floats(self.bf16_format);
        if weights.all(|weights| self.linear(weights).1 == bf16) { self.bf16_format } else { Format::F32 }
    }
}

/// Computes a task, with scratch for the sums.
pub(crate) type LinearKernel = unsafe fn(&LinearTask<'_>, &mut [f32]);

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    vendor.as_flattened() == b"GenuineIntel"
}

/// Eight-bit floats where bf16 have a dot instruction.
///
/// # Safety
/// The unit is one of those that [`Avx512::available`] describes, and as for every linear.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn linear_fp8(task: &LinearTask<'_>, scratch: &mut [f32]) {
    // SAFETY: `Kernels::available` hands it out only where its features are detected, and tasks are the callers' word.
    unsafe { linear::run::<_, Coded<codes::Fp8>>(Avx512::<true>::new(), task, scratch) }
}

/// Instantiates every kernel for one unit: `$token` makes the proof that the machine has the features named, `$bf16` is what
/// bf16 weights are summed by, and `$dot` how bf16 keys and values meet their inputs.
macro_rules! kernels {
    (
        $module:ident, $name:literal, $token:expr, $bf16:ty, $bf16_format:expr, $dot:ty, $fp8:expr $(, $features:literal)?
    ) => {
        mod $module {
            use super::*;

            // SAFETY of the functions below: `Kernels::available` hands them out only where their features are detected,
            // and tasks are the callers' word.
            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_f32(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, tiled::Tiled<floats::F32>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_f16(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, tiled::Tiled<floats::F16>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_bf16(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, $bf16>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn shrink(task: &ShrinkTask<'_>) {
                unsafe { adapter::shrink($token, task) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_bf16_f32(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, tiled::Tiled<floats::Bf16Widened>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn widened_int4(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Int4>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn widened_int8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Int8>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn widened_fp8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Fp8>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_w8a8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Coded<codes::W8a8>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_int4(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Coded<codes::Integers<4>>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_int8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Coded<codes::Integers<8>>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn encode(task: &EncodeTask<'_>) {
                unsafe { encode::run($token, task) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn norm(task: &NormTask<'_>) {
                unsafe { norm::run($token, task) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn rotary(task: &RotaryTask<'_>) {
                unsafe { rotary::run($token, task) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn latent(task: &LatentTask<'_>) {
                unsafe { latent::run($token, task) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn attention(task: &AttentionTask<'_>, scratch: &mut [f32]) {
                unsafe { attention::run::<_, $dot>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn attention_parts(
                task: &AttentionTask<'_>,
                parts: Range<usize>,
                out: &mut [f32],
                scratch: &mut [f32],
            ) {
                unsafe { attention::run_parts::<_, $dot>($token, task, parts, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn attention_merge(task: &AttentionTask<'_>, head: usize, parts: &[f32], scratch: &mut [f32]) {
                unsafe { attention::merge_parts($token, task, head, parts, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn scale_and_cap(floats: &mut [f32], scale: f32, cap: Option<f32>) {
                simd::scale_and_cap(unsafe { $token }, floats, scale, cap)
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn read(floats: &[f32]) -> f32 {
                simd::read(unsafe { $token }, floats)
            }

            pub(super) const TABLE: Kernels = Kernels {
                name: $name,
                linear_f32,
                linear_f16,
                linear_bf16,
                linear_bf16_f32,
                widened_int4,
                widened_int8,
                widened_fp8,
                linear_int4,
                linear_int8,
                linear_w8a8,
                linear_fp8: $fp8,
                bf16_format: $bf16_format,
                encode,
                shrink,
                norm,
                rotary,
                latent,
                attention,
                attention_parts,
                attention_merge,
                scale_and_cap,
                read,
            };
            pub(super) static KERNELS: Kernels = TABLE;
        }
    };
}

/// As [`avx512_bf16`], but for the one linear that the tile unit computes.
#[cfg(target_arch = "x86_64")]
mod avx512_amx {
    use super::*;

    /// # Safety
    /// As for every linear; [`amx::available`] said yes.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c")]
    unsafe fn linear_bf16(task: &LinearTask<'_>, scratch: &mut [f32]) {
        // SAFETY: `Kernels::available` hands it out only where its features are detected, and tasks are the callers' word.
        unsafe { linear::run::<_, amx::Amx>(Avx512::<true>::new(), task, scratch) }
    }

    // Units with tiles have a slow dot.
    const SLOW_DOT: Kernels = avx512::TABLE;
    pub(super) static KERNELS: Kernels = Kernels {
        name: "avx512-amx",
        linear_bf16,
        attention: SLOW_DOT.attention,
        attention_parts: SLOW_DOT.attention_parts,
        ..avx512_bf16::TABLE
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_bf16,
    "avx512-bf16",
    Avx512::<true>::new(),
    tiled::Tiled<floats::Bf16Dot>,
    Format::Bf16,
    floats::Bf16Dot,
    Some(linear_fp8),
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512,
    "avx512",
    Avx512::<false>::new(),
    tiled::Tiled<floats::Bf16Widened>,
    Format::RoundedBf16,
    floats::Bf16Widened,
    None,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx2,
    "avx2",
    Avx2::new(),
    tiled::Tiled<floats::Bf16Widened>,
    Format::RoundedBf16,
    floats::Bf16Widened,
    None,
    "avx2,fma,f16c"
);
#[cfg(target_arch = "aarch64")]
kernels!(
    neon,
    "neon",
    Neon::new(),
    tiled::Tiled<floats::Bf16Widened>,
    Format::RoundedBf16,
    floats::Bf16Widened,
    None,
    "neon"
);
kernels!(
    portable,
    "portable",
    Portable,
    tiled::Tiled<floats::Bf16Widened>,
    Format::RoundedBf16,
    floats::Bf16Widened,
    None
);
