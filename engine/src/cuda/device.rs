//! What a card does for a step, and nothing else: memory, copies, launches, products by a library, marks, graphs.
//!
//! Everything the CUDA home does goes through [`Device`], so that it can be watched and carried out without a card: there is the driver's
//! ([`super::driver`]) and, for tests, one that runs the kernels on the processor and counts what is asked of it.
//!
//! Work is in order: what is asked of a device is done after what was asked before, and whoever wants a result waits for it. Only
//! [`Device::download`], [`Device::receive`], [`Device::wait`] and [`Device::free`] wait. Memory lives as long as the device, unless it is freed before;
//! steps take none.
//!
//! Pages also move beside the steps, on threads of those who hand them off: by a [`Copier`].

use super::kernels::{Call, Element, Kernel};
use crate::Error;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Memory of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    /// The device's own.
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Region {
    /// Returns `bytes` bytes of it from `offset` on.
    ///
    /// # Panics
    /// When there are fewer: a mistake of ours.
    pub(crate) fn part(self, offset: usize, bytes: usize) -> Self {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset, "{bytes} bytes at {offset} of {}", self.bytes);
        Self { address: self.address + offset as u64, bytes }
    }
}

/// Bytes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    /// Those that nobody has.
    pub(crate) free: u64,
    /// Those that [`Device::alloc`] gave out.
    pub(crate) own: u64,
}

/// Places that a device sends to.
pub(crate) const SLOTS: usize = 2;
/// Bytes of each.
pub(crate) const MOST_SENT_BYTES: usize = 64 << 10;

/// Calls that are replayed as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Graph(pub(crate) usize);

/// What weights and inputs of a [`Product`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operand {
    Floats(Element),
    E4m3,
    /// Signed; sums are i32.
    Int8,
}

impl Operand {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Operand::Floats(_) => 2,
            Operand::E4m3 | Operand::Int8 => 1,
        }
    }
}

/// The shape of a product: with the power of two above its rows, what decides how a library computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    pub(crate) operand: Operand,
    /// Multiples of 32, as all widths and strides here.
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
    /// Elements from row to row.
    pub(crate) input_stride: u32,
    pub(crate) to_stride: u32,
    /// Whether sums are added to what is there.
    pub(crate) adds: bool,
}

/// A product by a library of the device, which adds up as it likes: `to[row][output] = inputs[row] . weights[output]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) shape: ProductShape,
    pub(crate) rows: u32,
    /// `[outputs][inputs]`; all begin at a multiple of 256 bytes.
    pub(crate) weights: u64,
    /// `[rows][input_stride]`.
    pub(crate) input: u64,
    /// `[rows][to_stride]` f32, or i32.
    pub(crate) to: u64,
    /// Room for the library itself.
    pub(crate) workspace: Region,
}

impl Product {
    /// Returns the rows for which the library is asked how to compute it.
    pub(crate) fn row_class(&self) -> u32 {
        self.rows.next_power_of_two()
    }
}

/// A card, or what stands in for one.
pub(crate) trait Device: std::fmt::Debug + Send + Sync {
    /// Names it for people.
    fn name(&self) -> &str;

    /// Returns its name in settings, and what tells it from all other devices.
    fn identity(&self) -> (String, [u8; 16]);

    /// Returns the bytes of shared memory that a block may have.
    fn most_shared(&self) -> u32;

    /// Returns how its memory is shared out.
    fn memory(&mut self) -> Result<Memory, Error>;

    /// Reserves `bytes` zeroed bytes for `purpose`, aligned to 256.
    fn alloc(&mut self, purpose: &'static str, bytes: usize) -> Result<Region, Error>;

    /// Gives back `region`, all of what [`Device::alloc`] returned, once what was asked before is done.
    fn free(&mut self, region: Region) -> Result<(), Error>;

    /// Copies `bytes` to the start of `to`; they may change once this returns.
    fn upload(&mut self, to: Region, bytes: &[u8]) -> Result<(), Error>;

    /// Copies the start of `from` to `to`, and waits for it.
    fn download(&mut self, from: Region, to: &mut [u8]) -> Result<(), Error>;

    /// Copies `from`, which is up to [`MOST_SENT_BYTES`], to the host: to slot `slot` of [`SLOTS`], whose last bytes nobody wants any more.
    fn send(&mut self, slot: usize, from: Region) -> Result<(), Error>;

    /// Waits for what was last sent to `slot`, and returns the start of it in `to`. What was asked after that goes on meanwhile.
    fn receive(&mut self, slot: usize, to: &mut [u8]) -> Result<(), Error>;

    /// Makes a kernel ready, so that its first call does not wait for a compiler.
    fn prepare(&mut self, kernel: &Kernel) -> Result<(), Error>;

    /// Brings together what this device and its peers ([`super::ranks`]) have computed: the first `bytes` bytes of each one's `part` go to `whole`, side by
    /// side in the order of ranks. Every one of them is asked the same in the same order.
    fn gather(&mut self, part: Region, bytes: usize, whole: Region) -> Result<(), Error>;

    /// Says that this device will gather no more: peers that wait for it give up.
    fn leave(&mut self);

    /// Runs a kernel.
    fn launch(&mut self, call: &Call) -> Result<(), Error>;

    /// Says whether a library of the device multiplies such operands.
    fn multiplies(&self, operand: Operand) -> bool;

    /// Chooses how products of such a shape and as many rows, rounded up, are computed, and computes this one: what the library puts off until then is done.
    /// Returns whether there is a way.
    fn prepare_product(&mut self, product: &Product) -> Result<bool, Error>;

    /// Multiplies.
    fn multiply(&mut self, product: &Product) -> Result<(), Error>;

    /// Sets mark `mark`, a small number, behind what was asked so far; it may be set again.
    fn mark(&mut self, mark: usize) -> Result<(), Error>;

    /// Waits for what stands before mark `mark`.
    fn wait(&mut self, mark: usize) -> Result<(), Error>;

    /// From here on calls are not done but remembered, up to [`Device::end_graph`]. Nothing but calls and what is gathered may be asked meanwhile.
    fn begin_graph(&mut self) -> Result<(), Error>;

    /// Returns what was remembered.
    fn end_graph(&mut self) -> Result<Graph, Error>;

    /// Does what a graph remembers.
    fn replay(&mut self, graph: Graph) -> Result<(), Error>;

    /// Makes what moves pages beside the steps.
    fn copier(&mut self) -> Result<Box<dyn Copier>, Error>;

    /// Says, to other threads, whether its memory is there.
    fn alive(&self) -> Alive;
}

/// Whether the memory of a device is there.
#[derive(Clone, Debug)]
pub(crate) struct Alive(Arc<RwLock<bool>>);

impl Alive {
    pub(crate) fn new() -> Self {
        Self(Arc::new(RwLock::new(true)))
    }

    /// Keeps the memory there until what is returned is dropped. `None`: it has gone.
    pub(crate) fn hold(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner)).filter(|alive| **alive)
    }

    /// Waits until nobody holds it, and lets nobody hold it from then on.
    pub(crate) fn end(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// A copy within memory that a device reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Run {
    /// Addresses.
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: u64,
}

/// What tells other processes of this host where a region is.
pub(crate) type Handle = [u8; 64];

/// A region of another pool.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elsewhere<'a> {
    /// Of this process: on which [device](Device::identity), and where.
    Here([u8; 16], u64),
    /// Of another process.
    There(&'a Handle),
}

/// What moves pages of a device while that computes. Each method waits until it is done, and is called only while the device is [`Alive`].
pub(crate) trait Copier: std::fmt::Debug + Send {
    /// Hands the bytes of each of `from`, which are up to [`super::pages::MOST_BLOCK_BYTES`], to `to`, with its index, in order.
    fn fetch(&mut self, from: &[Region], to: &mut dyn FnMut(usize, &[u8])) -> Result<(), Error>;

    /// Has `from` make the bytes of each of `to`, which are as many at most, with its index, in order.
    fn store(&mut self, to: &[Region], from: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), Error>;

    /// Copies `runs`, of which none overlap.
    fn copy(&mut self, runs: &[Run]) -> Result<(), Error>;

    /// Returns what other processes need to reach `region`, which is all that was allocated at once.
    fn share(&mut self, region: Region) -> Result<Handle, Error>;

    /// Returns the address at which this device has a region of another pool, until [`Copier::leave`].
    fn reach(&mut self, region: Elsewhere<'_>) -> Result<u64, Error>;

    /// Forgets an address of another process's memory.
    fn leave(&mut self, address: u64);
}
