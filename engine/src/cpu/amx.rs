//! bf16 sums on the tile unit (AMX): eight registers of 16 rows of 64 bytes, one instruction for 16 x 16 sums of 32 products.
//!
//! The tile unit reads the packed panels as they are: 16 steps of 16 outputs are one tile with 256 bytes from row to row. It is
//! used for any number of rows, one included, so that a row's bits never depend on how many there are. `tdpbf16ps` sums the
//! first and the second of the pairs apart over its 32 products, adds the two and adds that to the tile (Intel SDM volume
//! 2, TDPBF16PS): an order of its own, and the same for every call.
//!
//! Tiles are always whole. Rows beyond the task's are read from the buffer's padding and their sums are left in scratch;
//! inputs beyond the depth are zeros in the weights and anything finite in the input.
//!
//! The intrinsics are not stable, so the loops are assembly. The compiler never uses tile registers, and the configuration
//! lives from [`Tiles::configure`] to its drop, within one task.

use super::{
    linear::{Block, PanelSums},
    packed::PANEL,
    simd::Simd,
};
use std::arch::asm;

/// Rows of a tile.
const ROWS: usize = 16;
/// Inputs of one `tdpbf16ps`.
const STEP: usize = 32;
/// Bytes from step to step of a panel: 16 pairs for 64 outputs.
const STEP_BYTES: usize = STEP * PANEL * 2;
/// Steps whose weights for half a panel stay in the first-level cache beside the inputs.
const BLOCK_STEPS: usize = 16;
/// Weights that a step of many rows asks for ahead: 16 cache lines, so that two pairs of tiles fetch the whole next block.
const AHEAD_BYTES: usize = 16 * 64;

/// Says whether this machine has the tile unit and the system lets us use it; asks for it the first time.
pub(crate) fn available() -> bool {
    static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && ask_system())
}

fn has_instructions() -> bool {
    // CPUID leaf 7: EDX bit 22 is AMX-BF16, bit 24 is AMX-TILE.
    let highest = std::arch::x86_64::__cpuid(0).eax;
    highest >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == (1 << 22 | 1 << 24)
}

/// Linux gives a process the 8 KiB of tile state only when asked (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn ask_system() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask_system() -> bool {
    false
}

/// The tile registers, configured; given back on drop so that a thread between tasks has nothing to save.
struct Tiles;

impl Tiles {
    /// # Safety
    /// [`available`] said yes.
    unsafe fn configure() -> Self {
        #[repr(C, align(64))]
        struct Layout([u8; 64]);
        let mut layout = Layout([0; 64]);
        layout.0[0] = 1;
        for tile in 0..8 {
            layout.0[16 + 2 * tile] = 64;
            layout.0[48 + tile] = ROWS as u8;
        }
        // SAFETY: the layout is valid (palette 1, eight tiles of 16 rows of 64 bytes) and lives during the call.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &layout, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a value exists only where the unit does.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Sums of bf16 inputs and bf16 weights on the tile unit.
pub(crate) struct Amx;

impl<S: Simd> PanelSums<S> for Amx {
    #[inline(always)]
    unsafe fn sum(_: S, block: &Block) {
        // SAFETY: the kernel table hands this out only where `available` said yes; pointers are the caller's word.
        unsafe { sum(block) };
    }
}

/// # Safety
/// The tile unit is there; panels are whole steps long; inputs can be read in whole tiles of rows and steps; `sums` has room for
/// whole tiles.
unsafe fn sum(block: &Block) {
    let begin = block.inputs.start / STEP;
    let steps = block.inputs.end.div_ceil(STEP);
    // SAFETY: passed on. All addresses below lie in what the caller vouches for.
    unsafe {
        let _tiles = Tiles::configure();
        // A single tile of rows reads the panel once whatever the order, and best from front to back.
        let each = if block.rows <= ROWS { steps - begin } else { BLOCK_STEPS };
        let (pairs, rest) = (block.rows / (2 * ROWS), block.rows % (2 * ROWS));
        let pairs = if rest > ROWS { pairs + 1 } else { pairs };
        for first in (begin..steps).step_by(each) {
            let tile = |row: usize, column: usize| Tile {
                input: block.input.add(row * block.input_stride + first * STEP * 2),
                input_stride: block.input_stride,
                panel: block.panel.add(first * STEP_BYTES + column * 4),
                steps: each.min(steps - first),
                sums: block.sums.add(row * PANEL + column),
                resume: block.resume || first > begin,
            };
            // Half a panel for all rows, then the other half: the weights stay in the first-level cache, while each tile
            // asks for another piece of the next block.
            let mut ahead = block.panel.wrapping_add((first + each) * STEP_BYTES);
            for column in [0, PANEL / 2] {
                for pair in 0..pairs {
                    tile(pair * 2 * ROWS, column).two_by_two(ahead);
                    ahead = ahead.wrapping_add(each * AHEAD_BYTES);
                }
            }
            if pairs * 2 * ROWS < block.rows {
                tile(pairs * 2 * ROWS, 0).one_by_four();
            }
        }
    }
}

struct Tile {
    input: *const u8,
    input_stride: usize,
    panel: *const u8,
    /// At least 1.
    steps: usize,
    sums: *mut f32,
    /// Go on from the sums that are there.
    resume: bool,
}

impl Tile {
    /// Sums 32 rows and 32 outputs, and asks for [`AHEAD_BYTES`] of weights for each step from `ahead` on.
    ///
    /// # Safety
    /// As for [`sum`], with tiles configured.
    unsafe fn two_by_two(&self, ahead: *const u8) {
        const ROW: usize = PANEL * 4;
        let lower = self.sums.wrapping_add(ROWS * PANEL);
        // SAFETY: passed on: reads `steps` steps of inputs and weights, reads and writes 32 x 32 sums; prefetches may name any
        // address.
        unsafe {
            if self.resume {
                asm!(
                    "tileloadd tmm0, [{upper} + {row}]",
                    "tileloadd tmm1, [{upper} + {row} + 64]",
                    "tileloadd tmm2, [{lower} + {row}]",
                    "tileloadd tmm3, [{lower} + {row} + 64]",
                    upper = in(reg) self.sums, lower = in(reg) lower, row = in(reg) ROW, options(nostack, readonly)
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
            }
            asm!(
                "2:",
                ".irp line,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "prefetcht1 [{ahead} + 64*\\line]",
                ".endr",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {ahead}, {ahead_bytes}",
                "add {panel}, 4096",
                "dec {steps}",
                "jnz 2b",
                panel = inout(reg) self.panel => _,
                upper = inout(reg) self.input => _,
                lower = inout(reg) self.input.wrapping_add(ROWS * self.input_stride) => _,
                steps = inout(reg) self.steps => _,
                ahead = inout(reg) ahead => _,
                ahead_bytes = const AHEAD_BYTES,
                row = in(reg) ROW,
                stride = in(reg) self.input_stride,
                options(nostack, readonly)
            );
            asm!(
                "tilestored [{upper} + {row}], tmm0",
                "tilestored [{upper} + {row} + 64], tmm1",
                "tilestored [{lower} + {row}], tmm2",
                "tilestored [{lower} + {row} + 64], tmm3",
                upper = in(reg) self.sums, lower = in(reg) lower, row = in(reg) ROW, options(nostack)
            );
        }
    }

    /// Sums 16 rows and all 64 outputs, asking for weights ahead.
    ///
    /// # Safety
    /// As for [`sum`], with tiles configured.
    unsafe fn one_by_four(&self) {
        const ROW: usize = PANEL * 4;
        // SAFETY: passed on: reads `steps` steps of inputs and weights, reads and writes 16 x 64 sums; prefetches may name any
        // address.
        unsafe {
            if self.resume {
                asm!(
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm1, [{sums} + {row} + 64]",
                    "tileloadd tmm2, [{sums} + {row} + 128]",
                    "tileloadd tmm3, [{sums} + {row} + 192]",
                    sums = in(reg) self.sums, row = in(reg) ROW, options(nostack, readonly)
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
            }
            asm!(
                "2:",
                // 8 KiB, two steps, ahead: a step's 64 lines.
                ".irp line,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "prefetcht0 [{panel} + 8192 + 64*\\line]",
                ".endr",
                "tileloadd tmm4, [{input} + {stride}]",
                "tileloadd tmm5, [{panel} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{panel} + {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                ".irp line,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "prefetcht0 [{panel} + 10240 + 64*\\line]",
                ".endr",
                "tileloadd tmm7, [{panel} + {row} + 128]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{panel} + {row} + 192]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {input}, 64",
                "add {panel}, 4096",
                "dec {steps}",
                "jnz 2b",
                panel = inout(reg) self.panel => _,
                input = inout(reg) self.input => _,
                steps = inout(reg) self.steps => _,
                row = in(reg) ROW,
                stride = in(reg) self.input_stride,
                options(nostack, readonly)
            );
            asm!(
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 64], tmm1",
                "tilestored [{sums} + {row} + 128], tmm2",
                "tilestored [{sums} + {row} + 192], tmm3",
                sums = in(reg) self.sums, row = in(reg) ROW, options(nostack)
            );
        }
    }
}

/// Multiplies tiles `turns` times over and returns the operations done: the unit's limit.
///
/// # Safety
/// [`available`] said yes.
pub(crate) unsafe fn spin(turns: u64) -> u64 {
    // SAFETY: registers only.
    unsafe {
        let _tiles = Tiles::configure();
        asm!(
            ".irp tile,0,1,2,3,4,5,6,7",
            "tilezero tmm\\tile",
            ".endr",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {turns}",
            "jnz 2b",
            turns = inout(reg) turns => _,
            options(nostack, nomem)
        );
    }
    turns * 4 * (ROWS * ROWS * STEP * 2) as u64
}
