//! A device whose kernels run on the processor ([`super::emulator`]), and which counts what is asked of it.

use super::{
    device::{
        Alive, Copier, Device, Elsewhere, Graph, Handle, MOST_SENT_BYTES, Memory, Operand, Product, ProductShape,
        Region, Run, SLOTS,
    },
    emulator::{self, Order},
    kernels::{Call, Copies, Element, Kernel},
};
use crate::{
    Error,
    cpu::{buffer::Buffer, scheme::widen_e4m3},
};
use std::{
    collections::HashSet,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// What was asked of a device so far.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) allocations: AtomicUsize,
    /// Bytes that were given out and not given back.
    pub(crate) held: AtomicUsize,
    /// The most of them that it gives; for a test to say.
    pub(crate) most: AtomicUsize,
    pub(crate) uploads: AtomicUsize,
    /// Downloads and waits for marks.
    pub(crate) waits: AtomicUsize,
    /// Bytes of downloads.
    pub(crate) downloaded: AtomicUsize,
    /// Calls, and graphs in their place.
    pub(crate) calls: AtomicUsize,
    /// Those of a library, in graphs or not.
    pub(crate) products: AtomicUsize,
}

impl Default for Asked {
    fn default() -> Self {
        let none = AtomicUsize::default;
        Self {
            allocations: none(),
            held: none(),
            most: AtomicUsize::new(usize::MAX),
            uploads: none(),
            waits: none(),
            downloaded: none(),
            calls: none(),
            products: none(),
        }
    }
}

/// The processor as a device. Memory ends at pages that cannot be touched.
#[derive(Debug)]
pub(crate) struct Emulated {
    asked: Arc<Asked>,
    memory: Vec<Buffer>,
    used: u64,
    order: Order,
    ready: HashSet<Kernel>,
    /// Whether kernels run; else only their calls are counted, and all memory stays zero.
    runs: bool,
    /// The products that a library computes, where there is one.
    ways: Option<HashSet<(ProductShape, u32)>>,
    /// It has no way for those of so many inputs.
    baffling: u32,
    remembered: Option<Vec<Work>>,
    graphs: Vec<Vec<Work>>,
    marks: usize,
    sent: [Vec<u8>; SLOTS],
    rank: usize,
    peers: Arc<Peers>,
    alive: Alive,
}

/// What a graph remembers.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are the large one")]
enum Work {
    Call(Call),
    Gather { part: Region, bytes: usize, whole: Region },
    Multiply(Product),
}

/// Where ranks meet.
#[derive(Debug)]
struct Peers {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug)]
struct Meeting {
    /// By rank: the address of what it gives, while it is there.
    parts: Vec<u64>,
    arrived: usize,
    /// How often all were there.
    met: usize,
    left: bool,
}

impl Peers {
    fn new(ranks: usize) -> Self {
        let meeting = Meeting { parts: vec![0; ranks], arrived: 0, met: 0, left: false };
        Self { meeting: Mutex::new(meeting), changed: Condvar::new() }
    }

    /// Waits until every rank has come and given the address of its part; returns the addresses.
    fn meet(&self, rank: usize, part: u64) -> Result<Vec<u64>, Error> {
        let mut meeting = self.meeting.lock().expect("no rank panicked");
        (meeting.parts[rank], meeting.arrived) = (part, meeting.arrived + 1);
        if meeting.arrived == meeting.parts.len() {
            (meeting.arrived, meeting.met) = (0, meeting.met + 1);
            self.changed.notify_all();
        }
        let before = meeting.met - usize::from(meeting.arrived == 0);
        let waits = |meeting: &mut Meeting| meeting.met == before && !meeting.left;
        let waited = self.changed.wait_timeout_while(meeting, Duration::from_secs(60), waits);
        let (meeting, waited) = waited.expect("no rank panicked");
        match meeting.left || waited.timed_out() {
            true => Err(Error::card("emulated", "gather", "a peer is gone".into())),
            false => Ok(meeting.parts.clone()),
        }
    }
}

impl Emulated {
    /// Bytes that it says it has.
    pub(crate) const MEMORY: u64 = 64 << 20;

    /// Makes one whose threads take turns in `order`.
    pub(crate) fn new(order: Order) -> Self {
        Self {
            asked: Arc::default(),
            memory: Vec::new(),
            used: 0,
            order,
            ready: HashSet::new(),
            runs: true,
            ways: None,
            baffling: 0,
            remembered: None,
            graphs: Vec::new(),
            marks: 0,
            sent: Default::default(),
            rank: 0,
            peers: Arc::new(Peers::new(1)),
            alive: Alive::new(),
        }
    }

    /// Makes `ranks` that share a model.
    pub(crate) fn team(order: Order, ranks: usize) -> Vec<Self> {
        let peers = Arc::new(Peers::new(ranks));
        let mut devices: Vec<_> = (0..ranks).map(|_| Self::new(order)).collect();
        devices.iter_mut().enumerate().for_each(|(rank, device)| (device.rank, device.peers) = (rank, peers.clone()));
        devices
    }

    /// Gives it a library that multiplies, but not `baffling` inputs.
    pub(crate) fn with_library(mut self, baffling: u32) -> Self {
        (self.ways, self.baffling) = (Some(HashSet::new()), baffling);
        self
    }

    /// Makes one that computes nothing.
    pub(crate) fn recording() -> Self {
        let mut device = Self::new(Order::Forward);
        device.runs = false;
        device
    }

    /// Returns what will be counted.
    pub(crate) fn asked(&self) -> Arc<Asked> {
        self.asked.clone()
    }

    fn run(&self, work: &Work) -> Result<(), Error> {
        match work {
            _ if !self.runs => Ok(()),
            // SAFETY: the addresses are those of buffers of this device, which nobody else has.
            Work::Call(call) => unsafe { emulator::run(call, self.order) }
                .map_err(|problem| Error::card("emulated", "compute", problem)),
            Work::Gather { part, bytes, whole } => {
                let parts = self.peers.meet(self.rank, part.address)?;
                for (rank, part) in parts.into_iter().enumerate() {
                    let to = whole.part(rank * bytes, *bytes);
                    // SAFETY: peers wait for each other before and behind this, and parts are as long for all.
                    unsafe { (to.address as *mut u8).copy_from_nonoverlapping(part as *const u8, *bytes) };
                }
                self.peers.meet(self.rank, part.address).map(drop)
            }
            Work::Multiply(product) => {
                multiply(product);
                Ok(())
            }
        }
    }

    /// Does `work`, or remembers it while a graph is made.
    fn ask(&mut self, work: Work) -> Result<(), Error> {
        self.asked.calls.fetch_add(1, Relaxed);
        match &mut self.remembered {
            Some(all) => {
                all.push(work);
                Ok(())
            }
            None => self.run(&work),
        }
    }
}

impl Device for Emulated {
    fn name(&self) -> &str {
        "emulated"
    }

    fn identity(&self) -> (String, [u8; 16]) {
        (format!("emulated:{}", self.rank), [0; 16])
    }

    fn most_shared(&self) -> u32 {
        227 << 10
    }

    fn memory(&mut self) -> Result<Memory, Error> {
        Ok(Memory { total: Self::MEMORY, free: Self::MEMORY - self.used, own: self.used })
    }

    fn alloc(&mut self, purpose: &'static str, bytes: usize) -> Result<Region, Error> {
        self.asked.allocations.fetch_add(1, Relaxed);
        assert!(self.remembered.is_none(), "memory for {purpose} is asked for in a graph");
        if bytes > self.asked.most.load(Relaxed).saturating_sub(self.used as usize) {
            return Err(Error::card("emulated", "reserve memory", format!("there are no {bytes} bytes for {purpose}")));
        }
        self.memory.push(Buffer::new(bytes)?);
        let buffer = self.memory.last_mut().expect("it was just pushed");
        self.used += buffer.len() as u64;
        self.asked.held.fetch_add(buffer.len(), Relaxed);
        Ok(Region { address: buffer.as_mut_ptr() as u64, bytes: buffer.len() })
    }

    fn free(&mut self, region: Region) -> Result<(), Error> {
        self.asked.waits.fetch_add(1, Relaxed);
        assert!(self.remembered.is_none(), "memory is given back in a graph");
        let at = self.memory.iter().position(|buffer| buffer.as_ptr() as u64 == region.address);
        let buffer = self.memory.swap_remove(at.expect("it was given out"));
        self.used -= buffer.len() as u64;
        self.asked.held.fetch_sub(buffer.len(), Relaxed);
        Ok(())
    }

    fn upload(&mut self, to: Region, bytes: &[u8]) -> Result<(), Error> {
        self.asked.uploads.fetch_add(1, Relaxed);
        assert!(self.remembered.is_none() && bytes.len() <= to.bytes, "{} bytes into {}", bytes.len(), to.bytes);
        // SAFETY: the region is part of a buffer of this device.
        unsafe { (to.address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn download(&mut self, from: Region, to: &mut [u8]) -> Result<(), Error> {
        self.asked.waits.fetch_add(1, Relaxed);
        self.asked.downloaded.fetch_add(to.len(), Relaxed);
        assert!(self.remembered.is_none() && to.len() <= from.bytes, "{} bytes of {}", to.len(), from.bytes);
        // SAFETY: as above.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from.address as *const u8, to.len()) };
        Ok(())
    }

    fn send(&mut self, slot: usize, from: Region) -> Result<(), Error> {
        assert!(self.remembered.is_none() && from.bytes <= MOST_SENT_BYTES, "{} bytes to be sent", from.bytes);
        let sent = &mut self.sent[slot];
        assert!(sent.is_empty(), "what is in slot {slot} is wanted");
        // SAFETY: the region is part of a buffer of this device.
        sent.extend_from_slice(unsafe { std::slice::from_raw_parts(from.address as *const u8, from.bytes) });
        Ok(())
    }

    fn receive(&mut self, slot: usize, to: &mut [u8]) -> Result<(), Error> {
        self.asked.waits.fetch_add(1, Relaxed);
        self.asked.downloaded.fetch_add(to.len(), Relaxed);
        to.copy_from_slice(&self.sent[slot][..to.len()]);
        self.sent[slot].clear();
        Ok(())
    }

    fn prepare(&mut self, kernel: &Kernel) -> Result<(), Error> {
        self.ready.insert(*kernel);
        Ok(())
    }

    fn launch(&mut self, call: &Call) -> Result<(), Error> {
        assert!(self.ready.contains(&call.kernel), "{:?} was not made ready", call.kernel);
        self.ask(Work::Call(*call))
    }

    fn gather(&mut self, part: Region, bytes: usize, whole: Region) -> Result<(), Error> {
        assert!(bytes <= part.bytes, "{bytes} bytes of {}", part.bytes);
        self.ask(Work::Gather { part, bytes, whole })
    }

    fn multiplies(&self, _operand: Operand) -> bool {
        self.ways.is_some()
    }

    fn prepare_product(&mut self, product: &Product) -> Result<bool, Error> {
        let ways = self.ways.as_mut().expect("a device with a library");
        let known = product.shape.inputs != self.baffling;
        if known {
            ways.insert((product.shape, product.row_class()));
        }
        Ok(known)
    }

    fn multiply(&mut self, product: &Product) -> Result<(), Error> {
        let known = self.ways.as_ref().is_some_and(|ways| ways.contains(&(product.shape, product.row_class())));
        assert!(known, "{product:?} was not made ready");
        self.asked.products.fetch_add(1, Relaxed);
        self.ask(Work::Multiply(*product))
    }

    fn leave(&mut self) {
        self.peers.meeting.lock().expect("no rank panicked").left = true;
        self.peers.changed.notify_all();
    }

    fn mark(&mut self, mark: usize) -> Result<(), Error> {
        assert!(self.remembered.is_none(), "a mark in a graph");
        self.marks = self.marks.max(mark + 1);
        Ok(())
    }

    fn wait(&mut self, mark: usize) -> Result<(), Error> {
        self.asked.waits.fetch_add(1, Relaxed);
        assert!(mark < self.marks, "mark {mark} was never set");
        Ok(())
    }

    fn begin_graph(&mut self) -> Result<(), Error> {
        assert!(self.remembered.replace(Vec::new()).is_none(), "a graph in a graph");
        Ok(())
    }

    fn end_graph(&mut self) -> Result<Graph, Error> {
        self.graphs.push(self.remembered.take().expect("a graph was begun"));
        Ok(Graph(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: Graph) -> Result<(), Error> {
        self.asked.calls.fetch_add(1, Relaxed);
        self.graphs[graph.0].iter().try_for_each(|work| self.run(work))
    }

    fn copier(&mut self) -> Result<Box<dyn Copier>, Error> {
        Ok(Box::new(Copying(self.order)))
    }

    fn alive(&self) -> Alive {
        self.alive.clone()
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        self.alive.end();
    }
}

/// What moves pages of an emulated device. To it the memory of another process is that of another device.
#[derive(Debug)]
struct Copying(Order);

impl Copier for Copying {
    fn fetch(&mut self, from: &[Region], to: &mut dyn FnMut(usize, &[u8])) -> Result<(), Error> {
        for (index, from) in from.iter().enumerate() {
            // SAFETY: the region is part of a buffer of the device, which is alive, and nobody writes it now.
            to(index, unsafe { std::slice::from_raw_parts(from.address as *const u8, from.bytes) });
        }
        Ok(())
    }

    fn store(&mut self, to: &[Region], from: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), Error> {
        for (index, to) in to.iter().enumerate() {
            // SAFETY: likewise; nobody else has it now.
            from(index, unsafe { std::slice::from_raw_parts_mut(to.address as *mut u8, to.bytes) });
        }
        Ok(())
    }

    fn copy(&mut self, runs: &[Run]) -> Result<(), Error> {
        let call = Copies { runs: runs.as_ptr() as u64, count: runs.len() as u32 }.call();
        // SAFETY: runs are between buffers of devices that are alive, whose pages belong to a hand-off.
        unsafe { emulator::run(&call, self.0) }.map_err(|problem| Error::card("emulated", "copy pages", problem))
    }

    fn share(&mut self, region: Region) -> Result<Handle, Error> {
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&region.address.to_le_bytes());
        Ok(handle)
    }

    fn reach(&mut self, region: Elsewhere<'_>) -> Result<u64, Error> {
        Ok(match region {
            Elsewhere::Here(_, address) => address,
            Elsewhere::There(handle) => u64::from_le_bytes(*handle.first_chunk().expect("64 bytes")),
        })
    }

    fn leave(&mut self, _: u64) {}
}

/// Multiplies as its definition says.
fn multiply(product: &Product) {
    let Product { shape, rows, weights, input, to, .. } = *product;
    let (rows, outputs, inputs) = (rows as usize, shape.outputs as usize, shape.inputs as usize);
    let (input_stride, to_stride, bytes) =
        (shape.input_stride as usize, shape.to_stride as usize, shape.operand.bytes());
    let read = |from: u64, stride: usize, count: usize| -> Vec<f32> {
        let length = ((count - 1) * stride + inputs) * bytes;
        // SAFETY: as long as a product documents it in a buffer of this device, which nobody writes now.
        let from = unsafe { std::slice::from_raw_parts(from as *const u8, length) };
        let row = |row: usize| from[row * stride * bytes..][..inputs * bytes].chunks_exact(bytes);
        let wide = |element: &[u8]| match shape.operand {
            Operand::Floats(Element::Bf16) => half::bf16::from_le_bytes([element[0], element[1]]).to_f32(),
            Operand::Floats(Element::F16) => half::f16::from_le_bytes([element[0], element[1]]).to_f32(),
            Operand::E4m3 => widen_e4m3(element[0]),
            Operand::Int8 => f32::from(element[0] as i8),
        };
        (0..count).flat_map(|index| row(index).map(wide)).collect()
    };
    let (weights, input) = (read(weights, inputs, outputs), read(input, input_stride, rows));
    for (row, input) in input.chunks_exact(inputs).enumerate() {
        for (output, weights) in weights.chunks_exact(inputs).enumerate() {
            let sum: f64 = input.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let to = (to as usize + (row * to_stride + output) * 4) as *mut f32;
            // SAFETY: likewise; nobody else touches it now.
            unsafe {
                match (shape.operand, shape.adds) {
                    (Operand::Int8, false) => to.cast::<i32>().write(sum as i32),
                    (_, false) => to.write(sum as f32),
                    (_, true) => to.write(to.read() + sum as f32),
                }
            }
        }
    }
}
