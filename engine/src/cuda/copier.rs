//! NVIDIA's driver: what moves pages of a card, on a stream of its own beside that of its steps.
//!
//! Between card and host pages go through page-locked memory; between cards, and within one, a kernel copies them, all that are asked for in one launch.
//! Memory of another process is reached by CUDA IPC, that of another card of this one as a peer's.

use super::{
    device::{Copier, Elsewhere, Handle, Region, Run},
    driver::describe,
    kernels::Copies,
    pages::MOST_BLOCK_BYTES,
    patience::Patience,
};
use crate::Error;
use cudarc::driver::{
    DriverError,
    result::{self, ctx, primary_ctx, stream},
    sys::{self, CUresult},
};
use std::{
    ffi::{c_int, c_void},
    ptr::null_mut,
};

/// Bytes of the list of runs of a launch, on the card.
pub(super) const LIST: usize = 96 << 10;
/// Runs of it.
const MOST_RUNS: usize = LIST / size_of::<Run>();
const _: () = assert!(LIST <= MOST_BLOCK_BYTES, "lists go through the same memory as pages");

/// What moves pages of a card.
#[derive(Debug)]
pub(super) struct CardCopier {
    name: String,
    device: sys::CUdevice,
    /// Its UUID.
    card: [u8; 16],
    context: sys::CUcontext,
    stream: sys::CUstream,
    patience: Patience,
    /// Page-locked, [`MOST_BLOCK_BYTES`].
    staged: *mut u8,
    /// The card's, [`LIST`] bytes.
    list: Region,
    /// The card's [`Copies`].
    function: sys::CUfunction,
}

// SAFETY: handles of the driver may be used by any thread that has made their context current, which every method does; the page-locked
// memory belongs to this value alone.
unsafe impl Send for CardCopier {}

impl CardCopier {
    /// Makes one for the card `device`, whose memory `list` and whose kernel `function` live as long as the card is
    /// [alive](super::device::Alive).
    pub(super) fn new(
        name: &str,
        (device, card): (sys::CUdevice, [u8; 16]),
        patience: Patience,
        list: Region,
        function: sys::CUfunction,
    ) -> Result<Self, Error> {
        // SAFETY: the device exists; the context is released when this value is dropped.
        let context = unsafe { primary_ctx::retain(device) }
            .map_err(|error| Error::card(name, "make a context", describe(error)))?;
        let (stream, staged, name) = (null_mut(), null_mut(), name.to_owned());
        let mut made = Self { name, device, card, context, stream, patience, staged, list, function };
        made.enter()?;
        made.stream =
            stream::create(stream::StreamKind::NonBlocking).map_err(|error| made.fault("make a stream", error))?;
        // SAFETY: what is returned is freed with this value.
        made.staged = unsafe { result::malloc_host(MOST_BLOCK_BYTES, 0) }
            .map_err(|error| made.fault("lock memory for copies", error))?
            .cast();
        Ok(made)
    }

    /// Makes the card's context that of the calling thread.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is ours until this value is dropped.
        unsafe { ctx::set_current(self.context) }.map_err(|error| self.fault("enter its context", error))
    }

    fn wait(&self, action: &str) -> Result<(), Error> {
        // SAFETY: the stream is ours.
        let waited = self.patience.wait(|| unsafe { sys::cuStreamQuery(self.stream) }.result());
        waited.map_err(|problem| Error::card(&self.name, action, problem))
    }

    fn fault(&self, action: &str, error: DriverError) -> Error {
        Error::card(&self.name, action, describe(error))
    }

    /// Cuts `regions` into batches that fit the page-locked memory, and gives each to `each` with the index of its first.
    fn batches<F>(&mut self, regions: &[Region], mut each: F) -> Result<(), Error>
    where
        F: FnMut(&mut Self, usize, &[Region]) -> Result<(), Error>,
    {
        self.enter()?;
        let mut first = 0;
        while first < regions.len() {
            let mut used = 0;
            let fits = |region: &&Region| {
                used += region.bytes;
                used <= MOST_BLOCK_BYTES
            };
            let batch = &regions[first..][..regions[first..].iter().take_while(fits).count()];
            assert!(!batch.is_empty(), "{} bytes do not pass through {MOST_BLOCK_BYTES}", regions[first].bytes);
            each(self, first, batch)?;
            first += batch.len();
        }
        Ok(())
    }

    /// Makes the memory of another card of this process reachable.
    fn reach_peer(&self, card: [u8; 16]) -> Result<(), Error> {
        let fault = |error| self.fault("reach another card", error);
        let refused = |problem: &str| Error::card(&self.name, "reach another card", problem.into());
        let count = result::device::get_count().map_err(fault)?;
        let is_it = |ordinal: &c_int| {
            let uuid = result::device::get(*ordinal).and_then(result::device::get_uuid);
            uuid.is_ok_and(|uuid| uuid.bytes.map(|byte| byte as u8) == card)
        };
        let ordinal = (0..count).find(is_it).ok_or_else(|| refused("this process does not see it"))?;
        let peer = result::device::get(ordinal).map_err(fault)?;
        let mut can = 0;
        // SAFETY: both are devices, and the number is ours to write.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, peer) }.result().map_err(fault)?;
        if can == 0 {
            return Err(refused("they do not reach each other's memory"));
        }
        // SAFETY: the device exists; its context is kept by whoever's memory it is.
        let context = unsafe { primary_ctx::retain(peer) }.map_err(fault)?;
        // SAFETY: a context, and no flags.
        let enabled = unsafe { sys::cuCtxEnablePeerAccess(context, 0) }.result();
        // SAFETY: it was retained just above.
        unsafe { primary_ctx::release(peer) }.map_err(fault)?;
        match enabled {
            Err(error) if error.0 != CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Err(fault(error)),
            _ => Ok(()),
        }
    }
}

impl Copier for CardCopier {
    fn fetch(&mut self, from: &[Region], to: &mut dyn FnMut(usize, &[u8])) -> Result<(), Error> {
        self.batches(from, |copier, first, batch| {
            let mut at = 0;
            for region in batch {
                // SAFETY: the page-locked memory holds the batch, and every copy into it was waited for; the region is the card's.
                unsafe {
                    let staged = std::slice::from_raw_parts_mut(copier.staged.add(at), region.bytes);
                    result::memcpy_dtoh_async(staged, region.address, copier.stream)
                }
                .map_err(|error| copier.fault("copy pages from it", error))?;
                at += region.bytes;
            }
            copier.wait("copy pages from it")?;
            at = 0;
            for (index, region) in batch.iter().enumerate() {
                // SAFETY: the copies are done.
                to(first + index, unsafe { std::slice::from_raw_parts(copier.staged.add(at), region.bytes) });
                at += region.bytes;
            }
            Ok(())
        })
    }

    fn store(&mut self, to: &[Region], from: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), Error> {
        self.batches(to, |copier, first, batch| {
            let mut at = 0;
            for (index, region) in batch.iter().enumerate() {
                // SAFETY: the page-locked memory holds the batch, and every copy from it was waited for; the region is the card's.
                unsafe {
                    let staged = std::slice::from_raw_parts_mut(copier.staged.add(at), region.bytes);
                    from(first + index, staged);
                    result::memcpy_htod_async(region.address, staged, copier.stream)
                }
                .map_err(|error| copier.fault("copy pages to it", error))?;
                at += region.bytes;
            }
            copier.wait("copy pages to it")
        })
    }

    fn copy(&mut self, runs: &[Run]) -> Result<(), Error> {
        self.enter()?;
        let mut cut = runs.iter().flat_map(|run| {
            (0..run.bytes).step_by(Copies::MOST_BYTES).map(|at| {
                let bytes = (run.bytes - at).min(Copies::MOST_BYTES as u64);
                Run { from: run.from + at, to: run.to + at, bytes }
            })
        });
        loop {
            // SAFETY: the page-locked memory is aligned for anything, holds as many runs, and every copy from it was waited for.
            let list = unsafe { std::slice::from_raw_parts_mut(self.staged.cast::<Run>(), MOST_RUNS) };
            let mut count = 0;
            list.iter_mut().zip(&mut cut).for_each(|(to, run)| (*to, count) = (run, count + 1));
            if count == 0 {
                return Ok(());
            }
            // SAFETY: the list is the card's and holds as many; the function is loaded, and its one parameter, which is copied, is the structure of
            // `copies.cu`; whoever asks answers for the runs.
            unsafe {
                result::memcpy_htod_async(self.list.address, &list[..count], self.stream)
                    .map_err(|error| self.fault("copy to it", error))?;
                let call = Copies { runs: self.list.address, count: count as u32 }.call();
                let mut params = [call.args.words().as_ptr().cast::<c_void>().cast_mut()];
                let ([x, y, z], block) = (call.grid, (call.threads, 1, 1));
                result::launch_kernel(self.function, (x, y, z), block, call.shared_bytes, self.stream, &mut params)
            }
            .map_err(|error| self.fault("copy pages", error))?;
            self.wait("copy pages")?;
        }
    }

    fn share(&mut self, region: Region) -> Result<Handle, Error> {
        self.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the handle is ours to write, and the address that of an allocation.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, region.address) }
            .result()
            .map_err(|error| self.fault("let other processes reach its pages", error))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    fn reach(&mut self, region: Elsewhere<'_>) -> Result<u64, Error> {
        self.enter()?;
        match region {
            Elsewhere::Here(card, address) if card == self.card => Ok(address),
            Elsewhere::Here(card, address) => self.reach_peer(card).map(|()| address),
            Elsewhere::There(handle) => {
                let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
                let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
                let mut address = 0;
                // SAFETY: the address is ours to write, and the driver checks the handle.
                unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) }
                    .result()
                    .map_err(|error| self.fault("reach another process's pages", error))?;
                Ok(address)
            }
        }
    }

    fn leave(&mut self, address: u64) {
        let left = self.enter().and_then(|()| {
            // SAFETY: the address was opened, and whoever copied there has been waited for.
            let closed = unsafe { sys::cuIpcCloseMemHandle(address) }.result();
            closed.map_err(|error| self.fault("leave pages", error))
        });
        if let Err(error) = left {
            tracing::debug!(%error, "another process's pages");
        }
    }
}

impl Drop for CardCopier {
    fn drop(&mut self) {
        if self.patience.is_over() {
            return;
        }
        // What cannot be given back goes with the process.
        // SAFETY: everything was made by this value and is used by nobody else, and every copy was waited for.
        unsafe {
            let _ = ctx::set_current(self.context);
            if !self.staged.is_null() {
                let _ = result::free_host(self.staged.cast());
            }
            if !self.stream.is_null() {
                let _ = stream::destroy(self.stream);
            }
            let _ = primary_ctx::release(self.device);
        }
    }
}
