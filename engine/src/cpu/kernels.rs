//! The kernels of this machine: one table for each instruction set, chosen once at run time.

#[cfg(target_arch = "x86_64")]
use super::{
    amx,
    simd::{avx2::Avx2, avx512::Avx512},
};
use super::{
    attention::{self, AttentionTask},
    format::Format,
    linear::{self, LinearTask},
    norm::{self, NormTask},
    rotary::{self, RotaryTask},
    simd::{self, portable::Portable},
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
    /// Inputs of `linear_bf16`.
    bf16_format: Format,
    pub(crate) norm: unsafe fn(&NormTask<'_>),
    pub(crate) rotary: unsafe fn(&RotaryTask<'_>),
    pub(crate) attention: unsafe fn(&AttentionTask<'_>, &mut [f32]),
    pub(crate) attention_part: unsafe fn(&AttentionTask<'_>, usize, &mut [f32], &mut [f32]),
    pub(crate) attention_merge: unsafe fn(&AttentionTask<'_>, &mut [f32], &mut [f32]),
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

    /// Returns the kernel for weights of `dtype`.
    pub(crate) fn linear(&self, dtype: ElementType) -> unsafe fn(&LinearTask<'_>, &mut [f32]) {
        match dtype {
            ElementType::F32 => self.linear_f32,
            ElementType::F16 => self.linear_f16,
            ElementType::Bf16 => self.linear_bf16,
        }
    }

    /// Returns how the inputs of a linear with weights of `dtype` are stored.
    pub(crate) fn format(&self, dtype: ElementType) -> Format {
        match dtype {
            ElementType::F32 | ElementType::F16 => Format::F32,
            ElementType::Bf16 => self.bf16_format,
        }
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
            unsafe fn read(floats: &[f32]) -> f32 {
                simd::read(unsafe { $token }, floats)
            }

            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                linear_f32,
                linear_f16,
                linear_bf16,
                bf16_format: $bf16_format,
                norm,
                rotary,
                attention,
                attention_part,
                attention_merge,
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
