//! What this machine can do at most: the limits that speeds are measured against.
//!
//! A probe does one thing for about a hundredth of a second, on all threads, a few times over, and returns the median, as is done
//! for the figures it stands beside: machines that are shared change from minute to minute, so a limit is worth something
//! next to the figure alone. Arithmetic is measured in a loop of nothing but the kernels' own instruction over registers
//! (written as assembly where a compiler would spill them), memory by reading and copying buffers larger than any cache.

use crate::{
    Error,
    cpu::{buffer::Buffer, kernels::Kernels, pool::Pool},
};
use std::{
    hint::black_box,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Kind of multiply-add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 times f32 plus f32.
    F32,
    /// bf16 times bf16 plus f32: the unit that the engine's kernels use here.
    Bf16,
    /// Unsigned times signed bytes plus 32-bit integers.
    Int8,
}

/// Bytes of the buffer that memory probes use: more than a second or third level cache keeps for one process.
const BYTES: usize = 256 << 20;
/// Turns of a loop of multiply-adds: about a millisecond.
const TURNS: u64 = 400_000;
const ROUNDS: usize = 5;

/// Returns the instruction set that the engine's kernels use here.
pub fn instruction_set() -> &'static str {
    Kernels::detect().name
}

/// Threads and memory that probes work on, kept so that a probe takes little longer than what it measures.
#[derive(Debug)]
pub struct Probes {
    pool: Pool,
    buffer: Buffer,
    turns: u64,
}

impl Probes {
    /// Starts `threads` threads and takes memory.
    ///
    /// # Errors
    /// [`Error::System`] when there is no memory or no thread to be had.
    pub fn new(threads: usize) -> Result<Self, Error> {
        Self::of(threads, BYTES, TURNS)
    }

    fn of(threads: usize, bytes: usize, turns: u64) -> Result<Self, Error> {
        let (mut pool, mut buffer) = (Pool::new(threads)?, Buffer::new(bytes)?);
        // Memory lies beside whoever touches it first: a thread its own share, as it is with weights.
        let share = buffer.len().div_ceil(pool.threads());
        let shares: Vec<Mutex<&mut [u8]>> = buffer.bytes_mut().chunks_mut(share).map(Mutex::new).collect();
        pool.run(shares.len(), &|index, _| shares[index].lock().unwrap_or_else(PoisonError::into_inner).fill(1));
        drop(shares);
        Ok(Self { pool, buffer, turns })
    }

    /// Measures multiply-adds, two operations each, in Gop/s.
    pub fn peak(&mut self, arithmetic: Arithmetic) -> f64 {
        let (turns, operations) = (self.turns, AtomicU64::new(0));
        let seconds = median(&mut self.pool, &|_| operations.store(spin(arithmetic, turns), Ordering::Relaxed));
        (operations.into_inner() * self.pool.threads() as u64) as f64 / seconds / 1e9
    }

    /// Measures how fast memory is read, in GB/s.
    pub fn read(&mut self) -> f64 {
        let (floats, read) = (self.buffer.floats(), Kernels::detect().read);
        let share = floats.len() / self.pool.threads();
        let seconds = median(&mut self.pool, &|thread| {
            // SAFETY: the kernels were detected; they read the slice.
            black_box(unsafe { read(&floats[thread * share..][..share]) });
        });
        (share * self.pool.threads() * 4) as f64 / seconds / 1e9
    }

    /// Measures how fast memory is copied, in GB/s of copied bytes (each is read once and written once).
    pub fn copy(&mut self) -> f64 {
        let half = self.buffer.len() / 2;
        let (from, to) = self.buffer.bytes_mut().split_at_mut(half);
        let share = half / self.pool.threads();
        let shares: Vec<Mutex<&mut [u8]>> = to.chunks_exact_mut(share).map(Mutex::new).collect();
        let seconds = median(&mut self.pool, &|thread| {
            let mut to = shares[thread].lock().unwrap_or_else(PoisonError::into_inner);
            to.copy_from_slice(&from[thread * share..][..share]);
            black_box(&mut to[0]);
        });
        (share * self.pool.threads()) as f64 / seconds / 1e9
    }
}

/// Runs `work` once for each thread, a few times, and returns the median time in seconds.
fn median(pool: &mut Pool, work: &(dyn Fn(usize) + Sync)) -> f64 {
    let (threads, _stay) = (pool.threads(), pool.stay());
    let mut rounds = [0.0; ROUNDS];
    for seconds in &mut rounds {
        let start = Instant::now();
        pool.run(threads, &|index, _| work(index));
        *seconds = start.elapsed().as_secs_f64();
    }
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

/// Runs `turns` turns of independent multiply-adds and returns the operations done.
fn spin(arithmetic: Arithmetic, turns: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        let name = instruction_set();
        // SAFETY: the instruction sets were detected.
        unsafe {
            match (arithmetic, name) {
                (Arithmetic::Bf16, "avx512-amx") => return crate::cpu::amx::spin(turns / 4),
                (Arithmetic::Bf16, "avx512-bf16") => return x86::dot_bf16(turns),
                (Arithmetic::Int8, _) if is_x86_feature_detected!("avx512vnni") => return x86::dot_int8(turns),
                (Arithmetic::Int8, "avx512" | "avx2") => return x86::dot_int8_avx2(turns),
                (_, "avx512-amx" | "avx512-bf16" | "avx512") => return x86::fma_avx512(turns),
                (_, "avx2") => return x86::fma_avx2(turns),
                _ => {}
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if arithmetic != Arithmetic::Int8 {
        return arm64::fma_neon(turns);
    }
    match arithmetic {
        Arithmetic::F32 | Arithmetic::Bf16 => portable(turns),
        Arithmetic::Int8 => portable_int8(turns),
    }
}

/// Eight accumulators of eight lanes; the compiler makes of it what it makes of the portable kernels.
fn portable(turns: u64) -> u64 {
    let mut sums = [[1.0f32; 8]; 8];
    let (a, b) = (black_box(0.999f32), black_box(0.001f32));
    for _ in 0..turns {
        for lane in sums.iter_mut().flatten() {
            *lane = *lane * a + b;
        }
    }
    black_box(sums);
    turns * 8 * 8 * 2
}

/// The same in 32-bit integers, which is what bytes are widened to there.
fn portable_int8(turns: u64) -> u64 {
    let mut sums = [[1i32; 8]; 8];
    let (a, b) = (black_box(3i32), black_box(-5i32));
    for _ in 0..turns {
        for lane in sums.iter_mut().flatten() {
            *lane = lane.wrapping_mul(a).wrapping_add(b);
        }
    }
    black_box(sums);
    turns * 8 * 8 * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// # Safety
    /// The machine has AVX-512 BF16.
    pub(super) unsafe fn dot_bf16(turns: u64) -> u64 {
        // SAFETY: registers only, all declared; the counter is a copy.
        unsafe {
            asm!(
                "vpbroadcastd zmm30, {ones:e}",
                "vpbroadcastd zmm31, {small:e}",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vpxord zmm\\i, zmm\\i, zmm\\i",
                ".endr",
                "2:",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vdpbf16ps zmm\\i, zmm30, zmm31",
                ".endr",
                "dec {turns}",
                "jnz 2b",
                ones = in(reg) 0x3f80_3f80_u32,
                small = in(reg) 0x3c00_3c00_u32,
                turns = inout(reg) turns => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm30") _, out("zmm31") _,
                options(nostack, nomem),
            );
        }
        turns * 24 * 16 * 4
    }

    /// # Safety
    /// The machine has AVX-512 VNNI.
    pub(super) unsafe fn dot_int8(turns: u64) -> u64 {
        // SAFETY: as above.
        unsafe {
            asm!(
                "vpbroadcastd zmm30, {a:e}",
                "vpbroadcastd zmm31, {b:e}",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vpxord zmm\\i, zmm\\i, zmm\\i",
                ".endr",
                "2:",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vpdpbusd zmm\\i, zmm30, zmm31",
                ".endr",
                "dec {turns}",
                "jnz 2b",
                a = in(reg) 0x0102_0304_u32,
                b = in(reg) 0x01ff_02fe_u32,
                turns = inout(reg) turns => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm30") _, out("zmm31") _,
                options(nostack, nomem),
            );
        }
        turns * 24 * 16 * 8
    }

    /// Bytes to pairs of 16 bits, to 32 bits, to the sum: three instructions for what VNNI does in one.
    ///
    /// # Safety
    /// The machine has AVX2.
    pub(super) unsafe fn dot_int8_avx2(turns: u64) -> u64 {
        // SAFETY: as above.
        unsafe {
            asm!(
                "vmovd xmm13, {a:e}",
                "vpbroadcastd ymm13, xmm13",
                "vmovd xmm14, {b:e}",
                "vpbroadcastd ymm14, xmm14",
                "vmovd xmm15, {ones:e}",
                "vpbroadcastd ymm15, xmm15",
                ".irp i,0,1,2,3,4,5",
                "vpxor ymm\\i, ymm\\i, ymm\\i",
                ".endr",
                "2:",
                ".irp i,6,7,8,9,10,11",
                "vpmaddubsw ymm\\i, ymm13, ymm14",
                "vpmaddwd ymm\\i, ymm\\i, ymm15",
                ".endr",
                "vpaddd ymm0, ymm0, ymm6",
                "vpaddd ymm1, ymm1, ymm7",
                "vpaddd ymm2, ymm2, ymm8",
                "vpaddd ymm3, ymm3, ymm9",
                "vpaddd ymm4, ymm4, ymm10",
                "vpaddd ymm5, ymm5, ymm11",
                "dec {turns}",
                "jnz 2b",
                a = in(reg) 0x0102_0304_u32,
                b = in(reg) 0x01ff_02fe_u32,
                ones = in(reg) 0x0001_0001_u32,
                turns = inout(reg) turns => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nostack, nomem),
            );
        }
        turns * 6 * 8 * 8
    }

    /// # Safety
    /// The machine has AVX-512.
    pub(super) unsafe fn fma_avx512(turns: u64) -> u64 {
        // SAFETY: as above.
        unsafe {
            asm!(
                "vpbroadcastd zmm30, {ones:e}",
                "vpbroadcastd zmm31, {small:e}",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vpxord zmm\\i, zmm\\i, zmm\\i",
                ".endr",
                "2:",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                "vfmadd231ps zmm\\i, zmm30, zmm31",
                ".endr",
                "dec {turns}",
                "jnz 2b",
                ones = in(reg) 0x3f80_0000_u32,
                small = in(reg) 0x3c00_0000_u32,
                turns = inout(reg) turns => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm30") _, out("zmm31") _,
                options(nostack, nomem),
            );
        }
        turns * 24 * 16 * 2
    }

    /// # Safety
    /// The machine has AVX2 and FMA.
    pub(super) unsafe fn fma_avx2(turns: u64) -> u64 {
        // SAFETY: as above.
        unsafe {
            asm!(
                "vmovd xmm14, {ones:e}",
                "vbroadcastss ymm14, xmm14",
                "vmovd xmm15, {small:e}",
                "vbroadcastss ymm15, xmm15",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11",
                "vpxor ymm\\i, ymm\\i, ymm\\i",
                ".endr",
                "2:",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11",
                "vfmadd231ps ymm\\i, ymm14, ymm15",
                ".endr",
                "dec {turns}",
                "jnz 2b",
                ones = in(reg) 0x3f80_0000_u32,
                small = in(reg) 0x3c00_0000_u32,
                turns = inout(reg) turns => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm14") _, out("ymm15") _,
                options(nostack, nomem),
            );
        }
        turns * 12 * 8 * 2
    }
}

#[cfg(target_arch = "aarch64")]
mod arm64 {
    use std::arch::asm;

    pub(super) fn fma_neon(turns: u64) -> u64 {
        // SAFETY: registers only, all declared; the counter is a copy; every arm64 has the instructions.
        unsafe {
            asm!(
                "dup v30.4s, {ones:w}",
                "dup v31.4s, {small:w}",
                ".irp i,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27,28,29",
                "movi v\\i\\().4s, #0",
                ".endr",
                "2:",
                ".irp i,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27,28,29",
                "fmla v\\i\\().4s, v30.4s, v31.4s",
                ".endr",
                "subs {turns}, {turns}, #1",
                "b.ne 2b",
                ones = in(reg) 0x3f80_0000_u32,
                small = in(reg) 0x3c00_0000_u32,
                turns = inout(reg) turns => _,
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _,
                out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                out("v30") _, out("v31") _,
                options(nostack, nomem),
            );
        }
        turns * 22 * 4 * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_every_loop_runs() {
        let mut probes = Probes::of(2, 1 << 20, 1000).expect("threads and memory");
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8] {
            assert!(probes.peak(arithmetic) > 0.1);
        }
        assert_eq!((portable(10), portable_int8(10)), (1280, 1280));
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            assert_eq!(unsafe { x86::dot_int8_avx2(10) }, 3840);
        }
        assert!(probes.read() > 0.01);
        assert!(probes.copy() > 0.01);
    }
}
