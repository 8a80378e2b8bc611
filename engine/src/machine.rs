//! What this machine can do at most: the limits that speeds are measured against.
//!
//! Each probe runs on as many threads as asked for, a few rounds, and returns the best: a limit is what the machine does when
//! nothing else is in the way. Arithmetic is measured in a loop of nothing but the kernels' own instruction over registers
//! (written as assembly where a compiler would spill them), memory by reading and copying buffers larger than any cache.

use crate::{
    Error,
    cpu::{buffer::Buffer, kernels::Kernels, pool::Pool},
};
use std::{hint::black_box, time::Instant};

/// Kind of multiply-add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 times f32 plus f32.
    F32,
    /// bf16 times bf16 plus f32: the unit that the engine's kernels use here.
    Bf16,
}

/// Bytes of the buffers that memory probes use: more than a second or third level cache keeps for one process.
const BYTES: usize = 256 << 20;
const ROUNDS: usize = 5;

/// Returns the instruction set that the engine's kernels use here.
pub fn instruction_set() -> &'static str {
    Kernels::detect().name
}

/// Measures multiply-adds, two operations each, in Gop/s over `threads` threads.
///
/// # Errors
/// [`Error::System`] when threads cannot be started.
pub fn peak_gflops(arithmetic: Arithmetic, threads: usize) -> Result<f64, Error> {
    peak(arithmetic, threads, 200_000)
}

fn peak(arithmetic: Arithmetic, threads: usize, turns: u64) -> Result<f64, Error> {
    let mut pool = Pool::new(threads)?;
    let operations = std::sync::atomic::AtomicU64::new(0);
    let seconds = best(&mut pool, &|_| {
        let done = spin(arithmetic, turns);
        operations.store(done, std::sync::atomic::Ordering::Relaxed);
    });
    let each = operations.into_inner() as f64;
    Ok(each * threads as f64 / seconds / 1e9)
}

/// Measures how fast `threads` threads read memory, in GB/s.
///
/// # Errors
/// [`Error::System`] when there is no memory or no thread to be had.
pub fn read_gigabytes_per_second(threads: usize) -> Result<f64, Error> {
    read(threads, BYTES)
}

fn read(threads: usize, bytes: usize) -> Result<f64, Error> {
    let mut pool = Pool::new(threads)?;
    let mut buffer = Buffer::new(bytes)?;
    buffer.bytes_mut().fill(1);
    let floats = buffer.floats();
    let share = floats.len() / threads / 16 * 16;
    let read = Kernels::detect().read;
    let seconds = best(&mut pool, &|thread| {
        // SAFETY: the kernels were detected; they read the slice.
        black_box(unsafe { read(&floats[thread * share..][..share]) });
    });
    Ok((share * threads * 4) as f64 / seconds / 1e9)
}

/// Measures how fast `threads` threads copy memory, in GB/s of copied bytes (each is read once and written once).
///
/// # Errors
/// [`Error::System`] when there is no memory or no thread to be had.
pub fn copy_gigabytes_per_second(threads: usize) -> Result<f64, Error> {
    copy(threads, BYTES / 2)
}

fn copy(threads: usize, bytes: usize) -> Result<f64, Error> {
    let mut pool = Pool::new(threads)?;
    let (mut from, mut to) = (Buffer::new(bytes)?, Buffer::new(bytes)?);
    from.bytes_mut().fill(1);
    to.bytes_mut().fill(2);
    let share = from.len() / threads;
    let from = from.bytes_mut();
    let shares: Vec<std::sync::Mutex<&mut [u8]>> =
        to.bytes_mut().chunks_exact_mut(share).map(std::sync::Mutex::new).collect();
    let seconds = best(&mut pool, &|thread| {
        let mut to = shares[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        to.copy_from_slice(&from[thread * share..][..share]);
        black_box(&mut to[0]);
    });
    Ok((share * threads) as f64 / seconds / 1e9)
}

/// Runs `work` once for each thread, a few times, and returns the shortest time in seconds.
fn best(pool: &mut Pool, work: &(dyn Fn(usize) + Sync)) -> f64 {
    let threads = pool.threads();
    let round = |_| {
        let start = Instant::now();
        pool.run(threads, &|index, _| work(index));
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
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
                (_, "avx512-amx" | "avx512-bf16" | "avx512") => return x86::fma_avx512(turns),
                (_, "avx2") => return x86::fma_avx2(turns),
                _ => {}
            }
        }
    }
    let _ = arithmetic;
    portable(turns)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_every_loop_runs() {
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
            assert!(peak(arithmetic, 1, 1000).expect("a peak") > 0.1);
        }
        assert_eq!(portable(10), 1280);
        assert!(read(1, 1 << 20).expect("a rate") > 0.01);
        assert!(copy(2, 1 << 20).expect("a rate") > 0.01);
    }
}
