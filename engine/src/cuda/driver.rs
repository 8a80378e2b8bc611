//! NVIDIA's driver: a card as a [`Device`].
//!
//! The driver's library is opened when a card is asked for; a machine without it has no card, and says so. One stream carries all work, in
//! order; pages that are handed off move beside it ([`super::copier`]). Copies between host and card go through page-locked memory of the card's own, so that an upload does not wait.
//!
//! Meaning of the functions: NVIDIA, *CUDA Driver API*. Not one of them is newer than CUDA 12.0.

use super::{
    cache::Cache,
    copier::{CardCopier, LIST},
    cublaslt::CublasLt,
    device::{Alive, Copier, Device, Graph, MOST_SENT_BYTES, Memory, Operand, Product, Region, SLOTS},
    kernels::{Call, Copies, Kernel},
    nccl::Ring,
    nvrtc::{self, Nvrtc},
    pages::MOST_BLOCK_BYTES,
    patience::Patience,
    products::WORKSPACE,
    staging::Staging,
};
use crate::Error;
use cudarc::driver::{
    DriverError,
    result::{self, ctx, event, graph, module, primary_ctx, stream},
    sys::{self, CUdevice_attribute, CUresult},
};
use std::{
    collections::HashMap,
    ffi::{CString, c_int, c_void},
    panic::resume_unwind,
    path::Path,
    ptr::null_mut,
    sync::Arc,
    time::Duration,
};

/// Oldest CUDA that a driver must know, as it counts: 12.0.
const OLDEST_CUDA: c_int = 12_000;
/// Oldest architecture: the first with bf16 in its tensor cores.
const OLDEST_ARCHITECTURE: (c_int, c_int) = (8, 0);
/// What an architecture is asked for by.
const ARCHITECTURE: [CUdevice_attribute; 2] = [
    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
];
/// Oldest architecture with e4m3 in its tensor cores.
const OLDEST_WITH_E4M3: (c_int, c_int) = (8, 9);
/// Bytes of page-locked memory that uploads go through, and as many for downloads.
const STAGING: usize = MOST_BLOCK_BYTES;

/// A card with everything that was put on it.
#[derive(Debug)]
pub(crate) struct Card {
    name: String,
    identity: (String, [u8; 16]),
    device: sys::CUdevice,
    architecture: (c_int, c_int),
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// What copiers ask on other threads.
    alive: Alive,
    patience: Patience,
    /// By kernels without their names: what is compiled alike is loaded once.
    modules: HashMap<Kernel, sys::CUmodule>,
    functions: HashMap<Kernel, sys::CUfunction>,
    nvrtc: Nvrtc,
    cache: Cache,
    /// Most shared memory of a block.
    shared_bytes: c_int,
    memory: Vec<sys::CUdeviceptr>,
    own: u64,
    /// What uploads go through, [`STAGING`] bytes, and which of them are in use.
    up: *mut u8,
    staging: Staging,
    /// What downloads go through, as many, and the slots that it sends to behind them.
    down: *mut u8,
    slots: [Slot; SLOTS],
    marks: Vec<sys::CUevent>,
    graphs: Vec<sys::CUgraphExec>,
    /// Its rank among cards that share a model, and their connections.
    ring: Option<(usize, Arc<Ring>)>,
    /// Multiplies where that need not be exact.
    products: Option<CublasLt>,
}

// SAFETY: handles of the driver may be used by any thread that has made their context current, which every method does; the page-locked
// memory belongs to this value alone.
unsafe impl Send for Card {}
// SAFETY: what a shared reference gives is its name alone.
unsafe impl Sync for Card {}

/// Where a device sends to.
#[derive(Debug)]
struct Slot {
    /// Set when it was sent to.
    sent: sys::CUevent,
    /// What of the uploads was asked for before that.
    uploads: u64,
}

impl Card {
    /// Opens card `ordinal`, counted as the driver does. Its kernels are compiled by the library `nvrtc`, or the one that is found; what is waited for
    /// takes up to `limit`.
    ///
    /// # Errors
    /// [`Error::Card`] says what is missing and what to do about it.
    pub(crate) fn open(ordinal: usize, nvrtc: Option<&Path>, cache: Cache, limit: Duration) -> Result<Self, Error> {
        let card = format!("cuda:{ordinal}");
        let fault = |action: &str, problem: String| Error::card(&card, action, problem);
        let refused = |action: &'static str| {
            let card = card.clone();
            move |error: DriverError| Error::card(&card, action, describe(error))
        };
        let (_, count) = start(&card)?;
        if ordinal >= count as usize {
            return Err(fault(
                "find it",
                format!("this machine has {count} {}, counted from 0", if count == 1 { "card" } else { "cards" }),
            ));
        }
        let device = result::device::get(ordinal as c_int).map_err(refused("find it"))?;
        let name = result::device::get_name(device).map_err(refused("ask for its name"))?;
        // SAFETY: the device was found just above.
        let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
        let [major, minor] = ARCHITECTURE.map(|number| attribute(number).map_err(refused("ask for its architecture")));
        let architecture = (major?, minor?);
        let uuid = result::device::get_uuid(device).map_err(refused("ask which it is"))?;
        if architecture < OLDEST_ARCHITECTURE {
            let (major, minor) = architecture;
            let problem = format!("{name} has compute capability {major}.{minor}, and 8.0 (A100) or newer is needed");
            return Err(fault("use it", problem));
        }
        let shared_bytes = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(refused("ask for its shared memory"))?;
        let nvrtc = Nvrtc::open(nvrtc).map_err(|problem| fault("open the compiler of its kernels", problem))?;
        // SAFETY: the device exists; the context is released when this value is dropped.
        let context = unsafe { primary_ctx::retain(device) }.map_err(refused("make a context"))?;
        let mut opened = Self {
            name: format!("{card} {name}"),
            identity: (card.clone(), uuid.bytes.map(|byte| byte as u8)),
            device,
            architecture,
            context,
            stream: null_mut(),
            alive: Alive::new(),
            patience: Patience::new(limit),
            modules: HashMap::new(),
            functions: HashMap::new(),
            nvrtc,
            cache,
            shared_bytes,
            memory: Vec::new(),
            own: 0,
            up: null_mut(),
            staging: Staging::new(STAGING),
            down: null_mut(),
            slots: std::array::from_fn(|_| Slot { sent: null_mut(), uploads: 0 }),
            marks: Vec::new(),
            graphs: Vec::new(),
            ring: None,
            products: None,
        };
        opened.enter()?;
        opened.stream = stream::create(stream::StreamKind::NonBlocking).map_err(refused("make a stream"))?;
        for (start, bytes) in [(&mut opened.up, STAGING), (&mut opened.down, STAGING + SLOTS * MOST_SENT_BYTES)] {
            // SAFETY: what is returned is freed with this value.
            *start = unsafe { result::malloc_host(bytes, 0) }.map_err(refused("lock memory for copies"))?.cast();
        }
        for slot in &mut opened.slots {
            slot.sent = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(refused("make an event"))?;
        }
        Ok(opened)
    }

    /// Has many rows multiplied by the library `cublaslt`, or the one that is found.
    ///
    /// # Errors
    /// [`Error::Card`] says what is missing.
    pub(crate) fn multiply_by(&mut self, cublaslt: Option<&Path>) -> Result<(), Error> {
        self.enter()?;
        let mut version = 0;
        // SAFETY: the number is ours to write.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(|error| self.fault("ask for the driver's version", error))?;
        let opened = CublasLt::open(cublaslt, version, WORKSPACE);
        let opened =
            opened.map_err(|problem| Error::card(&self.name, "open what multiplies (exact is off)", problem))?;
        self.products = Some(opened);
        Ok(())
    }

    /// Returns what NVRTC calls its architecture: with what only this one has, where there is such a thing.
    pub(crate) fn architecture(&self) -> String {
        let (major, minor) = self.architecture;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }

    /// Returns the kernel's function, compiled and loaded if it is not yet.
    fn function(&mut self, kernel: &Kernel) -> Result<sys::CUfunction, Error> {
        if let Some(function) = self.functions.get(kernel) {
            return Ok(*function);
        }
        let unit = Kernel { name: "", ..*kernel };
        let module = match self.modules.get(&unit) {
            Some(module) => *module,
            None => {
                let options = nvrtc::options(&self.architecture());
                let cubin = self.cache.cubin(&self.nvrtc, kernel.name, &kernel.text(), &options);
                let cubin = cubin.map_err(|problem| Error::card(&self.name, "compile its kernels", problem))?;
                // SAFETY: the driver checks what it is given, and copies it.
                let module = unsafe { module::load_data(cubin.as_ptr().cast()) }
                    .map_err(|error| self.fault("load kernels", error))?;
                *self.modules.entry(unit).or_insert(module)
            }
        };
        let name = CString::new(kernel.name).expect("names of kernels have no zero byte");
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the module stays loaded as long as this value lives.
        let function = unsafe {
            module::get_function(module, name).and_then(|function| {
                result::function::set_function_attribute(function, attribute, self.shared_bytes)?;
                Ok(function)
            })
        }
        .map_err(|error| self.fault(kernel.name, error))?;
        self.functions.insert(*kernel, function);
        Ok(function)
    }

    /// Makes the card's context that of the calling thread.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is ours until this value is dropped.
        unsafe { ctx::set_current(self.context) }.map_err(|error| self.fault("enter its context", error))
    }

    /// Returns where slot `slot` is.
    fn slot(&self, slot: usize) -> *mut u8 {
        assert!(slot < SLOTS, "slot {slot} of {SLOTS}");
        // SAFETY: the slots are behind the staging memory.
        unsafe { self.down.add(STAGING + slot * MOST_SENT_BYTES) }
    }

    /// Waits for everything, after which no memory is in use by a copy.
    fn synchronize(&mut self) -> Result<(), Error> {
        let stream = self.stream;
        // SAFETY: the stream is ours.
        self.wait_for(|| unsafe { sys::cuStreamQuery(stream) }.result())?;
        self.staging.done(self.staging.taken());
        Ok(())
    }

    /// Waits until `query` says that it is done.
    fn wait_for(&self, query: impl FnMut() -> Result<(), DriverError>) -> Result<(), Error> {
        self.patience.wait(query).map_err(|problem| Error::card(&self.name, "compute", problem))
    }

    fn fault(&self, action: &str, error: DriverError) -> Error {
        Error::card(&self.name, action, describe(error))
    }
}

/// Starts the driver for `card`, and returns which CUDA it knows and how many cards it sees.
///
/// # Errors
/// [`Error::Card`] says what is missing and what to do about it.
fn start(card: &str) -> Result<(String, c_int), Error> {
    let fault = |action: &str, problem: String| Error::card(card, action, problem);
    // SAFETY: the driver's initialisers do nothing but set up its own state.
    if !unsafe { sys::is_culib_present() } {
        let problem = "libcuda.so.1 cannot be opened: there is no NVIDIA driver here, or this process (a container?) does not see it";
        return Err(fault("open the driver", problem.into()));
    }
    result::init().map_err(|error| {
        let hint = match error.0 {
            CUresult::CUDA_ERROR_NO_DEVICE => "; no card is visible to this process (CUDA_VISIBLE_DEVICES?)",
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
                "; the library and the kernel's module are of different drivers"
            }
            _ => "",
        };
        fault("start the driver", format!("{}{hint}", describe(error)))
    })?;
    let mut version = 0;
    // SAFETY: the number is ours to write.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    asked.map_err(|error| fault("ask for the driver's version", describe(error)))?;
    let known = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    if version < OLDEST_CUDA {
        let problem = format!("it knows {known}, and 12.0 is needed: install driver 525 or newer");
        return Err(fault("use the driver", problem));
    }
    let count = result::device::get_count().map_err(|error| fault("count cards", describe(error)))?;
    Ok((known, count))
}

/// Returns which CUDA the driver knows, and its cards for people.
///
/// # Errors
/// Says why there are none.
pub(crate) fn survey() -> Result<(String, Vec<String>), String> {
    let (version, count) = start("").map_err(|error| match error {
        Error::Card { problem, .. } => problem,
        other => other.to_string(),
    })?;
    let card = |ordinal: c_int| {
        let device = result::device::get(ordinal)?;
        let name = result::device::get_name(device)?;
        let [major, minor] = ARCHITECTURE.map(|attribute| {
            // SAFETY: the device was found just above.
            unsafe { result::device::get_attribute(device, attribute) }
        });
        // SAFETY: likewise.
        let bytes = unsafe { result::device::total_mem(device) }?;
        Ok(format!("cuda:{ordinal} {name}, compute capability {}.{}, {} GiB", major?, minor?, bytes >> 30))
    };
    let named = |ordinal| card(ordinal).unwrap_or_else(|error| format!("cuda:{ordinal}: {}", describe(error)));
    Ok((version, (0..count).map(named).collect()))
}

/// Says what the driver's error is.
pub(super) fn describe(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{text} ({name})"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// Connects `cards`, if they are several, to share a model by the library `nccl`, or the one that is found. What each first gives the others goes to memory of
/// its own: whatever NCCL puts off until then is done before anything is captured.
///
/// # Errors
/// [`Error::Card`] says what is missing.
pub(crate) fn connect(cards: &mut [Card], nccl: Option<&Path>) -> Result<(), Error> {
    if cards.len() < 2 {
        return Ok(());
    }
    let numbers: Vec<sys::CUdevice> = cards.iter().map(|card| card.device).collect();
    let fault = |card: &Card, problem: String| Error::card(&card.name, "connect it with its peers", problem);
    let ring = Ring::connect(nccl, &numbers, cards[0].patience.limit());
    let ring = Arc::new(ring.map_err(|problem| fault(&cards[0], problem))?);
    cards.iter_mut().enumerate().for_each(|(rank, card)| card.ring = Some((rank, ring.clone())));
    // Before any waits for the others.
    let words =
        |card: &mut Card| Ok((card.alloc("a first word", 256)?, card.alloc("a first word", 256 * ring.ranks())?));
    let words = cards.iter_mut().map(words).collect::<Result<Vec<_>, Error>>()?;
    let first = |card: &mut Card, (part, whole): (Region, Region)| {
        card.gather(part, 256, whole).and_then(|()| card.synchronize()).inspect_err(|_| ring.leave())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            cards.iter_mut().zip(words).map(|(card, words)| scope.spawn(move || first(card, words))).collect();
        let outcomes = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        outcomes.collect::<Vec<_>>().into_iter().collect()
    })
}

impl Device for Card {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> (String, [u8; 16]) {
        self.identity.clone()
    }

    fn most_shared(&self) -> u32 {
        self.shared_bytes as u32
    }

    fn memory(&mut self) -> Result<Memory, Error> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|error| self.fault("ask for its memory", error))?;
        Ok(Memory { total: total as u64, free: free as u64, own: self.own })
    }

    fn alloc(&mut self, purpose: &'static str, bytes: usize) -> Result<Region, Error> {
        self.enter()?;
        let bytes = bytes.max(1).next_multiple_of(256);
        // SAFETY: the memory is freed with this value; it is zeroed before anybody sees it.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            let free = self.memory().map_or(0, |memory| memory.free);
            let action = format!("reserve {bytes} bytes for {purpose}, of {free} that are free");
            self.fault(&action, error)
        })?;
        self.memory.push(address);
        self.own += bytes as u64;
        // SAFETY: just allocated, that long.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }
            .map_err(|error| self.fault("clear memory", error))?;
        Ok(Region { address, bytes })
    }

    fn free(&mut self, region: Region) -> Result<(), Error> {
        self.enter()?;
        self.synchronize()?;
        let at = self.memory.iter().position(|address| *address == region.address).expect("it was reserved");
        self.memory.swap_remove(at);
        self.own -= region.bytes as u64;
        // SAFETY: it was reserved by this value, which knows it no more, and nothing is under way that uses it.
        unsafe { result::free_sync(region.address) }.map_err(|error| self.fault("give memory back", error))
    }

    fn upload(&mut self, to: Region, bytes: &[u8]) -> Result<(), Error> {
        assert!(bytes.len() <= to.bytes, "{} bytes into {}", bytes.len(), to.bytes);
        self.enter()?;
        let mut at = 0;
        while at < bytes.len() {
            let room = match self.staging.take((bytes.len() - at).min(STAGING)) {
                Some(room) => room,
                None => {
                    self.synchronize()?;
                    continue;
                }
            };
            let part = &bytes[at..at + room.len()];
            // SAFETY: this part of the staging memory is in use by no copy and lives until the copy is done; `to` was checked, and is ours.
            unsafe {
                let staged = self.up.add(room.start);
                staged.copy_from_nonoverlapping(part.as_ptr(), part.len());
                let staged = std::slice::from_raw_parts(staged, part.len());
                result::memcpy_htod_async(to.address + at as u64, staged, self.stream)
            }
            .map_err(|error| self.fault("copy to it", error))?;
            at += part.len();
        }
        Ok(())
    }

    fn download(&mut self, from: Region, to: &mut [u8]) -> Result<(), Error> {
        assert!(to.len() <= from.bytes, "{} bytes of {}", to.len(), from.bytes);
        self.enter()?;
        for (index, part) in to.chunks_mut(STAGING).enumerate() {
            // SAFETY: the staging memory holds the part, and every copy into it was waited for; `from` was checked.
            unsafe {
                let staged = std::slice::from_raw_parts_mut(self.down, part.len());
                result::memcpy_dtoh_async(staged, from.address + (index * STAGING) as u64, self.stream)
                    .map_err(|error| self.fault("copy from it", error))?;
            }
            self.synchronize()?;
            // SAFETY: the copy is done.
            part.copy_from_slice(unsafe { std::slice::from_raw_parts(self.down, part.len()) });
        }
        Ok(())
    }

    fn send(&mut self, slot: usize, from: Region) -> Result<(), Error> {
        assert!(from.bytes <= MOST_SENT_BYTES, "{} bytes to be sent", from.bytes);
        self.enter()?;
        // SAFETY: a slot holds as many bytes, and its last ones were waited for; `from`, stream and event are ours.
        unsafe {
            let staged = std::slice::from_raw_parts_mut(self.slot(slot), from.bytes);
            result::memcpy_dtoh_async(staged, from.address, self.stream)
                .and_then(|()| event::record(self.slots[slot].sent, self.stream))
        }
        .map_err(|error| self.fault("copy from it", error))?;
        self.slots[slot].uploads = self.staging.taken();
        Ok(())
    }

    fn receive(&mut self, slot: usize, to: &mut [u8]) -> Result<(), Error> {
        assert!(to.len() <= MOST_SENT_BYTES, "{} bytes to be received", to.len());
        self.enter()?;
        let sent = self.slots[slot].sent;
        // SAFETY: the event is ours.
        self.wait_for(|| unsafe { event::query(sent) })?;
        self.staging.done(self.slots[slot].uploads);
        // SAFETY: the copy is done, and the slot is that long.
        to.copy_from_slice(unsafe { std::slice::from_raw_parts(self.slot(slot), to.len()) });
        Ok(())
    }

    fn gather(&mut self, part: Region, bytes: usize, whole: Region) -> Result<(), Error> {
        assert!(bytes <= part.bytes, "{bytes} bytes of {}", part.bytes);
        self.enter()?;
        let (rank, ring) = self.ring.as_ref().expect("only cards that are connected share a model");
        let whole = whole.part(0, bytes * ring.ranks());
        // SAFETY: both regions are ours, as long as was checked, and live as long as this device.
        unsafe { ring.gather(*rank, part.address, bytes, whole.address, self.stream) }
            .map_err(|problem| Error::card(&self.name, "gather from its peers", problem))
    }

    fn leave(&mut self) {
        self.ring.iter().for_each(|(_, ring)| ring.leave());
    }

    fn prepare(&mut self, kernel: &Kernel) -> Result<(), Error> {
        self.enter()?;
        self.function(kernel).map(drop)
    }

    fn launch(&mut self, call: &Call) -> Result<(), Error> {
        self.enter()?;
        let function = self.function(&call.kernel)?;
        let mut params = [call.args.words().as_ptr().cast::<c_void>().cast_mut()];
        let ([x, y, z], block) = (call.grid, (call.threads, 1, 1));
        // SAFETY: the function is loaded, and its one parameter, which is copied, is the structure that `kernels.rs` documents; the regions in
        // it live as long as this device.
        unsafe { result::launch_kernel(function, (x, y, z), block, call.shared_bytes, self.stream, &mut params) }
            .map_err(|error| self.fault(call.kernel.name, error))
    }

    fn multiplies(&self, operand: Operand) -> bool {
        self.products.is_some() && (operand != Operand::E4m3 || self.architecture >= OLDEST_WITH_E4M3)
    }

    fn prepare_product(&mut self, product: &Product) -> Result<bool, Error> {
        self.enter()?;
        let products = self.products.as_mut().expect("a card that multiplies has a library");
        let known = products.prepare(product).map_err(|problem| Error::card(&self.name, "find a product", problem))?;
        if known {
            self.multiply(product)?;
        }
        Ok(known)
    }

    fn multiply(&mut self, product: &Product) -> Result<(), Error> {
        self.enter()?;
        let products = self.products.as_mut().expect("a card that multiplies has a library");
        // SAFETY: its regions are ours, as long as `products.rs` makes them, and live as long as this device.
        unsafe { products.multiply(product, self.stream) }
            .map_err(|problem| Error::card(&self.name, "multiply", problem))
    }

    fn mark(&mut self, mark: usize) -> Result<(), Error> {
        self.enter()?;
        while self.marks.len() <= mark {
            let made = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            self.marks.push(made.map_err(|error| self.fault("make an event", error))?);
        }
        // SAFETY: event and stream are ours.
        unsafe { event::record(self.marks[mark], self.stream) }.map_err(|error| self.fault("set an event", error))
    }

    fn wait(&mut self, mark: usize) -> Result<(), Error> {
        self.enter()?;
        let mark = self.marks[mark];
        // SAFETY: the event is ours.
        self.wait_for(|| unsafe { event::query(mark) })
    }

    fn begin_graph(&mut self) -> Result<(), Error> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours.
        unsafe { stream::begin_capture(self.stream, mode) }.map_err(|error| self.fault("capture a graph", error))
    }

    fn end_graph(&mut self) -> Result<Graph, Error> {
        self.enter()?;
        // SAFETY: the stream is capturing; the graph is not needed once it is instantiated.
        let made = unsafe {
            stream::end_capture(self.stream).and_then(|captured| {
                let made = graph::instantiate(captured, sys::CUgraphInstantiate_flags(0));
                graph::destroy(captured)?;
                made
            })
        };
        self.graphs.push(made.map_err(|error| self.fault("capture a graph", error))?);
        Ok(Graph(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: Graph) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: graph and stream are ours, and so is all memory that the graph's kernels use.
        unsafe { graph::launch(self.graphs[graph.0], self.stream) }.map_err(|error| self.fault("run a graph", error))
    }

    fn copier(&mut self) -> Result<Box<dyn Copier>, Error> {
        let list = self.alloc("lists of copies", LIST)?;
        let function = self.function(&Copies::kernel())?;
        // Until the list is cleared it is not the copier's to write.
        self.synchronize()?;
        let (device, patience) = ((self.device, self.identity.1), self.patience.clone());
        Ok(Box::new(CardCopier::new(&self.name, device, patience, list, function)?))
    }

    fn alive(&self) -> Alive {
        self.alive.clone()
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        self.alive.end();
        if self.patience.is_over() {
            self.ring.iter().for_each(|(_, ring)| ring.leave());
            return;
        }
        // What cannot be given back goes with the process.
        // SAFETY: everything was made by this value and is used by nobody else; the stream is waited for before what it uses goes.
        unsafe {
            let _ = ctx::set_current(self.context);
            // Peers are waited for while all of them are still there.
            self.ring.iter().for_each(|(_, ring)| ring.close());
            let stream = Some(self.stream).filter(|stream| !stream.is_null());
            stream.map(|stream| self.patience.wait(|| sys::cuStreamQuery(stream).result()));
            drop(self.products.take());
            self.graphs.drain(..).for_each(|graph| _ = graph::exec_destroy(graph));
            self.marks.drain(..).for_each(|mark| _ = event::destroy(mark));
            self.modules.drain().for_each(|(_, module)| _ = module::unload(module));
            self.memory.drain(..).for_each(|address| _ = result::free_sync(address));
            let sent = self.slots.iter().map(|slot| slot.sent).filter(|event| !event.is_null());
            sent.for_each(|event| _ = event::destroy(event));
            for start in [self.up, self.down].into_iter().filter(|start| !start.is_null()) {
                let _ = result::free_host(start.cast());
            }
            stream.map(|stream| stream::destroy(stream));
            let _ = primary_ctx::release(self.device);
        }
    }
}
