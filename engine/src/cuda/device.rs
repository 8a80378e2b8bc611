//! What a card does for a step, and nothing else: memory, copies, launches, waiting.
//!
//! Everything the CUDA home does goes through [`Device`], so that it can be watched and carried out without a card: the driver's own
//! ([`super::driver`]), one that runs the kernels on the processor, and one that counts.
//!
//! Work is in order: what is asked of a device is done after what was asked before, and whoever wants a result waits for it.

use crate::Error;

/// Memory of a device. Addresses are the device's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

/// A kernel over a grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    /// Which.
    pub(crate) kernel: &'static str,
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared: u32,
    /// The arguments in order: the bits of each in the low bytes of a word (addresses 8, u32 and f32 4).
    pub(crate) args: &'a [u64],
}

/// A card, or what stands in for one.
pub(crate) trait Device: std::fmt::Debug + Send {
    /// Reserves `bytes` zeroed bytes that live as long as the device, aligned to 256.
    fn alloc(&mut self, bytes: usize) -> Result<Region, Error>;

    /// Copies `bytes` to the start of `to`; they may change once this returns.
    fn upload(&mut self, to: Region, bytes: &[u8]) -> Result<(), Error>;

    /// Copies the start of `from` to `bytes`, and waits for it.
    fn download(&mut self, from: Region, bytes: &mut [u8]) -> Result<(), Error>;

    /// Runs a kernel.
    fn launch(&mut self, launch: Launch<'_>) -> Result<(), Error>;
}
