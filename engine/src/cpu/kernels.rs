//! The kernels of this machine: one table for each instruction set, chosen once at run time.

use super::{
    adapter::{self, ShrinkTask},
    attention::{self, AttentionTask},
    format::Format,
    latent::{self, LatentTask},
    linear::{
        self, LinearTask,
        quantized::{self, Quantized},
    },
    norm::{self, NormTask},
    packed::WeightType,
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
    linear_int4: unsafe fn(&LinearTask<'_>, &mut [f32]),
    linear_int8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    linear_fp8: unsafe fn(&LinearTask<'_>, &mut [f32]),
    /// Inputs of `linear_bf16`.
    bf16_format: Format,
    pub(crate) shrink: unsafe fn(&ShrinkTask<'_>),
    pub(crate) norm: unsafe fn(&NormTask<'_>),
    pub(crate) rotary: unsafe fn(&RotaryTask<'_>),
    pub(crate) latent: unsafe fn(&LatentTask<'_>),
    pub(crate) attention: unsafe fn(&AttentionTask<'_>, &mut [f32]),
    pub(crate) attention_part: unsafe fn(&AttentionTask<'_>, usize, &mut [f32], &mut [f32]),
    pub(crate) attention_merge: unsafe fn(&AttentionTask<'_>, &mut [f32], &mut [f32]),
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
        all.push(&portable::KERNELS);
        all
    }

    /// Returns the kernel for `weights` whose inputs lie in `format`.
    pub(crate) fn linear(&self, weights: WeightType, format: Format) -> unsafe fn(&LinearTask<'_>, &mut [f32]) {
        let kernel = match weights {
            WeightType::Float(ElementType::F32) => self.linear_f32,
            WeightType::Float(ElementType::F16) => self.linear_f16,
            WeightType::Float(ElementType::Bf16) if format == self.bf16_format => return self.linear_bf16,
            WeightType::Float(ElementType::Bf16) => self.linear_bf16_f32,
            WeightType::Quantized(scheme) => match scheme.code {
                Code::Int4 => self.linear_int4,
                Code::Int8 => self.linear_int8,
                Code::Fp8 => self.linear_fp8,
            },
        };
        assert_eq!(format, Format::F32, "{weights:?} is for f32 inputs");
        kernel
    }

    /// Returns how the inputs of a model's linears are stored: for bf16 when all their weights are, else as f32.
    pub(crate) fn format(&self, mut weights: impl Iterator<Item = WeightType>) -> Format {
        let bf16 = weights.all(|weights| weights == WeightType::Float(ElementType::Bf16));
        if bf16 { self.bf16_format } else { Format::F32 }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    vendor.as_flattened() == b"GenuineIntel"
}

/// Instantiates every kernel for one unit: `$token` makes the proof that the machine has the features named.
macro_rules! kernels {
    ($module:ident, $name:literal, $token:expr, $bf16:ty, $bf16_format:expr $(, $features:literal)?) => {
        mod $module {
            use super::*;

            // SAFETY of the functions below: `Kernels::available` hands them out only where their features are detected,
            // and tasks are the callers' word.
            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_f32(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, linear::Tiled<linear::F32>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_f16(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, linear::Tiled<linear::F16>>($token, task, scratch) }
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
                unsafe { linear::run::<_, linear::Tiled<linear::Bf16Widened>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_int4(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Int4>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_int8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Int8>>($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn linear_fp8(task: &LinearTask<'_>, scratch: &mut [f32]) {
                unsafe { linear::run::<_, Quantized<quantized::Fp8>>($token, task, scratch) }
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
                unsafe { attention::run($token, task, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn attention_part(task: &AttentionTask<'_>, part: usize, out: &mut [f32], scratch: &mut [f32]) {
                unsafe { attention::run_part($token, task, part, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
            unsafe fn attention_merge(task: &AttentionTask<'_>, parts: &mut [f32], scratch: &mut [f32]) {
                unsafe { attention::merge_parts($token, task, parts, scratch) }
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

            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                linear_f32,
                linear_f16,
                linear_bf16,
                linear_bf16_f32,
                linear_int4,
                linear_int8,
                linear_fp8,
                bf16_format: $bf16_format,
                shrink,
                norm,
                rotary,
                latent,
                attention,
                attention_part,
                attention_merge,
                scale_and_cap,
                read,
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_amx,
    "avx512-amx",
    Avx512::<true>::new(),
    amx::Amx,
    Format::Bf16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_bf16,
    "avx512-bf16",
    Avx512::<true>::new(),
    linear::Tiled<linear::Bf16Dot>,
    Format::Bf16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512,
    "avx512",
    Avx512::<false>::new(),
    linear::Tiled<linear::Bf16Widened>,
    Format::RoundedBf16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, "avx2", Avx2::new(), linear::Tiled<linear::Bf16Widened>, Format::RoundedBf16, "avx2,fma,f16c");
kernels!(portable, "portable", Portable, linear::Tiled<linear::Bf16Widened>, Format::RoundedBf16);
