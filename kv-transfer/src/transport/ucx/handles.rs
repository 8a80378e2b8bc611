//! What UCX gives out, owned: each handle ends what it stands for when it is dropped, and keeps alive what it stands on.
//!
//! A worker and its endpoints belong to one thread (thread mode single) and are not [`Send`]; a context and memory may be made
//! on one thread and used on another, never on two at once.

use super::{directory::Directory, maps::Region};
use std::{
    cell::Cell,
    ffi::{CStr, CString},
    os::fd::{BorrowedFd, RawFd},
    ptr::{self, NonNull},
    sync::Arc,
};
use ucx_sys::{self as sys, Api, Status};

/// Says what a status means, in UCX's words.
pub(super) fn message(api: &Api, status: Status) -> String {
    // SAFETY: returns a constant string for any value.
    unsafe { CStr::from_ptr((api.ucs_status_string)(status)) }.to_string_lossy().into_owned()
}

/// Turns a status into a result that says what was tried.
fn check(api: &Api, status: Status, what: &str) -> Result<(), String> {
    if status == sys::OK { Ok(()) } else { Err(format!("{what}: {}", message(api, status))) }
}

/// Returns what `print` writes to a stream.
fn printed(print: impl FnOnce(*mut libc::FILE)) -> String {
    let (mut text, mut length) = (ptr::null_mut(), 0);
    // SAFETY: both outlive the stream, which is closed before they are read.
    let stream = unsafe { libc::open_memstream(&mut text, &mut length) };
    if stream.is_null() {
        return String::new();
    }
    print(stream);
    // SAFETY: the stream made above; closing it leaves `length` bytes at `text`, ours to free.
    unsafe {
        libc::fclose(stream);
        let said = String::from_utf8_lossy(std::slice::from_raw_parts(text.cast(), length)).into_owned();
        libc::free(text.cast());
        said
    }
}

/// The library's devices and settings.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) api: &'static Api,
    raw: sys::Context,
    /// Where it keeps files, removed after it.
    _directory: Directory,
}

// SAFETY: UCX ties a context to no thread; that no two use it at once is what the module demands of its callers.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens devices with `settings` (names as in `ucx_info -c`, without `UCX_`) on top of the environment's, files in `directory`.
    pub(super) fn open(
        api: &'static Api,
        settings: &[(&str, &str)],
        directory: Directory,
    ) -> Result<Arc<Self>, String> {
        let mut config = ptr::null_mut();
        // SAFETY: reads the defaults and the environment.
        check(api, unsafe { (api.ucp_config_read)(ptr::null(), ptr::null(), &mut config) }, "read UCX settings")?;
        let set = || {
            for (name, value) in settings {
                let what = format!("UCX_{name}={value}");
                let text = |text: &str| CString::new(text).map_err(|_| format!("{what}: holds a zero byte"));
                let (name, value) = (text(name)?, text(value)?);
                // SAFETY: a live configuration and two strings, which are copied.
                check(api, unsafe { (api.ucp_config_modify)(config, name.as_ptr(), value.as_ptr()) }, &what)?;
            }
            let mut params = sys::Params { field_mask: sys::PARAM_FEATURES, ..Default::default() };
            params.features = sys::FEATURE_RMA | sys::FEATURE_WAKEUP;
            let (major, minor) = sys::API_VERSION;
            let mut raw = ptr::null_mut();
            // SAFETY: parameters of that version, and a live configuration.
            let status = unsafe { (api.ucp_init_version)(major, minor, &params, config, &mut raw) };
            check(api, status, "open UCX devices").map(|()| Arc::new(Self { api, raw, _directory: directory }))
        };
        let context = set();
        // SAFETY: read above, and nobody uses it any more.
        unsafe { (api.ucp_config_release)(config) };
        context
    }

    /// Returns the transports it found, as `transport/device`.
    pub(super) fn resources(&self) -> Vec<String> {
        // SAFETY: a live context and stream.
        let text = printed(|stream| unsafe { (self.api.ucp_context_print_info)(self.raw, stream) });
        // "#      resource 3  :  md 1  dev 2  flags -- tcp/eth0"
        let resource = |line: &str| line.trim_start_matches('#').trim_start().starts_with("resource ");
        text.lines().filter(|line| resource(line)).filter_map(last_word).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made with it holds it, so nothing is left.
        unsafe { (self.api.ucp_cleanup)(self.raw) };
    }
}

fn last_word(line: &str) -> Option<String> {
    line.split_whitespace().next_back().map(str::to_owned)
}

/// Memory that UCX may read and that peers with its key may write.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<Context>,
    raw: sys::MemH,
    address: usize,
}

// SAFETY: as for `Context`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Registers `bytes` at `address`.
    ///
    /// # Safety
    /// They are mapped until this is dropped.
    pub(super) unsafe fn register(context: &Arc<Context>, address: *mut u8, bytes: usize) -> Result<Self, String> {
        let mask = sys::MEM_MAP_PARAM_ADDRESS | sys::MEM_MAP_PARAM_LENGTH;
        let params =
            sys::MemMapParams { field_mask: mask, address: address.cast(), length: bytes, ..Default::default() };
        Self::map(context, &params, "register the page pool")
    }

    /// Allocates `bytes` of zeros: for transports that write only into memory of their own (UCX's `posix`).
    pub(super) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Self, String> {
        let mask = sys::MEM_MAP_PARAM_LENGTH | sys::MEM_MAP_PARAM_FLAGS;
        let params =
            sys::MemMapParams { field_mask: mask, length: bytes, flags: sys::MEM_MAP_ALLOCATE, ..Default::default() };
        Self::map(context, &params, "allocate a page pool")
    }

    fn map(context: &Arc<Context>, params: &sys::MemMapParams, what: &str) -> Result<Self, String> {
        let api = context.api;
        let mut raw = ptr::null_mut();
        // SAFETY: a live context; the memory is the caller's, or made by this call.
        check(api, unsafe { (api.ucp_mem_map)(context.raw, params, &mut raw) }, what)?;
        let mut memory = Self { context: context.clone(), raw, address: 0 };
        let mut attributes = sys::MemAttr { field_mask: sys::MEM_ATTR_ADDRESS, ..Default::default() };
        // SAFETY: the memory just mapped.
        check(api, unsafe { (api.ucp_mem_query)(raw, &mut attributes) }, what)?;
        memory.address = attributes.address.addr();
        Ok(memory)
    }

    /// Returns where it lies in this process.
    pub(super) fn address(&self) -> usize {
        self.address
    }

    /// Returns what a peer needs to write here.
    pub(super) fn key(&self) -> Result<Vec<u8>, String> {
        let api = self.context.api;
        let (mut packed, mut length) = (ptr::null_mut(), 0);
        // SAFETY: a live context and its memory.
        let status = unsafe { (api.ucp_rkey_pack)(self.context.raw, self.raw, &mut packed, &mut length) };
        check(api, status, "make a key for the page pool")?;
        // SAFETY: a buffer of this length, ours until released.
        unsafe {
            let key = std::slice::from_raw_parts(packed.cast::<u8>(), length).to_vec();
            (api.ucp_rkey_buffer_release)(packed);
            Ok(key)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped with this context; what uses it holds it. A status says nothing that could be acted on.
        unsafe { (self.context.api.ucp_mem_unmap)(self.context.raw, self.raw) };
    }
}

/// Makes progress: one set of connections, with an address that peers connect to.
#[derive(Debug)]
pub(super) struct Worker {
    raw: sys::Worker,
    wake: RawFd,
    context: Arc<Context>,
}

impl Worker {
    /// Makes one, used by this thread alone.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, String> {
        let api = context.api;
        let params = sys::WorkerParams {
            field_mask: sys::WORKER_PARAM_THREAD_MODE | sys::WORKER_PARAM_FLAGS,
            thread_mode: sys::THREAD_MODE_SINGLE,
            // Destroying a worker in the middle of a hand-off is how links end.
            flags: sys::WORKER_IGNORE_REQUEST_LEAK,
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: a live context.
        check(api, unsafe { (api.ucp_worker_create)(context.raw, &params, &mut raw) }, "make a UCX worker")?;
        let mut worker = Self { raw, wake: -1, context: context.clone() };
        // SAFETY: the worker just made; the descriptor lives and dies with it.
        check(api, unsafe { (api.ucp_worker_get_efd)(raw, &mut worker.wake) }, "wait for a UCX worker")?;
        Ok(worker)
    }

    /// Returns what a peer connects to.
    pub(super) fn address(&self) -> Result<Vec<u8>, String> {
        let api = self.context.api;
        let mut attributes = sys::WorkerAttr { field_mask: sys::WORKER_ATTR_ADDRESS, ..Default::default() };
        // SAFETY: a live worker.
        check(api, unsafe { (api.ucp_worker_query)(self.raw, &mut attributes) }, "ask a UCX worker for its address")?;
        // SAFETY: a buffer of this length, ours until released.
        unsafe {
            let length = attributes.address_length;
            let address = std::slice::from_raw_parts(attributes.address.cast::<u8>(), length).to_vec();
            (api.ucp_worker_release_address)(self.raw, attributes.address);
            Ok(address)
        }
    }

    /// Does what can be done now. Returns whether that was anything.
    pub(super) fn progress(&self) -> bool {
        // SAFETY: a live worker on its thread.
        unsafe { (self.context.api.ucp_worker_progress)(self.raw) > 0 }
    }

    /// Asks to be woken through [`Worker::wake`]. Returns false when there is something to do already.
    pub(super) fn arm(&self) -> bool {
        // SAFETY: a live worker on its thread.
        unsafe { (self.context.api.ucp_worker_arm)(self.raw) == sys::OK }
    }

    /// Returns what becomes readable when there is something to do, once armed.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the worker.
        unsafe { BorrowedFd::borrow_raw(self.wake) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: for the last time, on its thread. Ends every connection from and to it: nothing is read, written or called back
        // for it any more.
        unsafe { (self.context.api.ucp_worker_destroy)(self.raw) };
    }
}

/// Where bytes to be put lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum From {
    /// At an offset of the registered pool.
    Pool(usize),
    /// In memory that UCX does not know.
    Elsewhere(*const u8),
}

/// Something under way on an endpoint.
#[derive(Debug)]
pub(super) struct Request(NonNull<libc::c_void>);

/// A connection to a peer's worker, and at the source the key to its memory. Dropping it ends it with all that is under way and without
/// asking the peer: no byte is read here for it, and none leaves, any more.
///
/// It has a worker of its own, which ends with it. UCX (1.13 to 1.22) lets a flush of a closed endpoint run once more when its worker
/// makes progress, on memory that is freed (`ucp_ep_flush_resume_slow_path_callback`); this worker makes none.
#[derive(Debug)]
pub(super) struct Endpoint {
    raw: sys::Ep,
    /// Null at the target.
    key: sys::Rkey,
    worker: Worker,
    /// Set by UCX when the peer is gone. Boxed, as what follows: UCX knows its address, as long as there is a worker.
    failed: Box<Cell<Status>>,
    /// What a probe reads.
    probed: Box<Cell<u64>>,
}

impl Endpoint {
    /// Connects `worker` to the one at `address`, whose memory `key` opens. Both come from a peer that has authenticated itself, as UCX
    /// believes what it reads in them.
    pub(super) fn connect(worker: Worker, address: &[u8], key: Option<&[u8]>) -> Result<Self, String> {
        let api = worker.context.api;
        let failed = Box::new(Cell::new(sys::OK));
        let params = sys::EpParams {
            field_mask: sys::EP_PARAM_REMOTE_ADDRESS | sys::EP_PARAM_ERR_MODE | sys::EP_PARAM_ERR_HANDLER,
            address: address.as_ptr().cast(),
            err_mode: sys::ERR_MODE_PEER,
            err_handler: Some(on_failure),
            err_handler_arg: ptr::from_ref(&*failed).cast_mut().cast(),
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: a live worker; the address is copied; the handler's argument outlives the worker, being dropped after it.
        check(api, unsafe { (api.ucp_ep_create)(worker.raw, &params, &mut raw) }, "connect")?;
        let mut endpoint = Self { raw, key: ptr::null_mut(), worker, failed, probed: Box::default() };
        let Some(key) = key else { return Ok(endpoint) };
        // SAFETY: a live endpoint and a key of a peer that is believed.
        let status = unsafe { (api.ucp_ep_rkey_unpack)(raw, key.as_ptr().cast(), &mut endpoint.key) };
        check(api, status, "use the key of the peer's pool").map(|()| endpoint)
    }

    /// Returns what must make progress for it.
    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Returns why the connection is of no use any more.
    pub(super) fn failure(&self) -> Option<String> {
        let status = self.failed.get();
        (status != sys::OK).then(|| message(self.api(), status))
    }

    /// Starts reading a word at address `from` of the peer: once that is over, the connection stands and the key is good. `None`: it
    /// is already.
    pub(super) fn probe(&self, from: u64) -> Result<Option<Request>, String> {
        let word = self.probed.as_ptr();
        // SAFETY: a live endpoint and key; the word outlives the worker, being dropped after it, and nobody reads it.
        let started = unsafe {
            (self.api().ucp_get_nbx)(self.raw, word.cast(), size_of::<u64>(), from, self.key, &Default::default())
        };
        self.outcome(started)
    }

    /// Returns where address `at` of the peer's memory lies in this process, if it lies in one map with `bytes` after it. That ends with
    /// this endpoint.
    ///
    /// UCX answers for any address and, from 1.23 on, with addresses of devices. So this is what the system says is mapped there:
    /// shared memory for writing, and no device's. What UCX's `posix` and `sysv` map stays when the peer dies; `/dev/xpmem` would not.
    pub(super) fn mapped(&self, at: u64, bytes: usize) -> Option<*mut u8> {
        let mut address = ptr::null_mut();
        // SAFETY: a live key; writes the address.
        let status = unsafe { (self.api().ucp_rkey_ptr)(self.key, at, &mut address) };
        let start = address.expose_provenance();
        let held = |region: Region| region.holds(start, bytes) && region.is_shared() && !region.is_of_device();
        (status == sys::OK && Region::at(start).is_some_and(held)).then(|| address.cast())
    }

    /// Starts writing `bytes` at `from` to address `to` at the peer. Whether they are there is what a later
    /// [`Endpoint::flush`] says.
    ///
    /// # Safety
    /// They are there, in `memory` where `from` says so, and are not written, and stay mapped, until a later flush is over or the endpoint is dropped.
    pub(super) unsafe fn put(&self, memory: &Memory, from: From, bytes: usize, to: u64) -> Result<(), String> {
        let mut param = sys::RequestParam { op_attr_mask: sys::OP_MULTI_SEND, ..Default::default() };
        let from = match from {
            From::Pool(offset) => {
                param.op_attr_mask |= sys::OP_MEMH;
                param.memh = memory.raw;
                ptr::with_exposed_provenance(memory.address + offset)
            }
            From::Elsewhere(address) => address.cast(),
        };
        // SAFETY: a live endpoint and key; the bytes are the caller's promise, and the key's pool is the peer's to lend.
        let started = unsafe { (self.api().ucp_put_nbx)(self.raw, from, bytes, to, self.key, &param) };
        if let Some(request) = self.outcome(started)? {
            // What becomes of it is the flush's to say.
            self.free(request);
        }
        Ok(())
    }

    /// Asks when all that was put so far is in the peer's memory. `None`: it is.
    pub(super) fn flush(&self) -> Result<Option<Request>, String> {
        // SAFETY: a live endpoint.
        let started = unsafe { (self.api().ucp_ep_flush_nbx)(self.raw, &Default::default()) };
        self.outcome(started)
    }

    fn outcome(&self, started: sys::StatusPtr) -> Result<Option<Request>, String> {
        let request = sys::outcome(started).map_err(|status| message(self.api(), status))?;
        Ok(request.map(Request))
    }

    /// Returns how a request ended, once it has. The worker must make progress in between.
    pub(super) fn poll(&self, request: &Request) -> Option<Result<(), String>> {
        // SAFETY: a request of this endpoint that was not freed: that is the last thing done with it.
        match unsafe { (self.api().ucp_request_check_status)(request.0.as_ptr()) } {
            sys::INPROGRESS => None,
            status => Some(if status == sys::OK { Ok(()) } else { Err(message(self.api(), status)) }),
        }
    }

    /// Gives a request back. One that is still under way ends in the background.
    pub(super) fn free(&self, request: Request) {
        // SAFETY: a request of this endpoint, for the last time.
        unsafe { (self.api().ucp_request_free)(request.0.as_ptr()) };
    }

    /// Returns the transports that its lanes use, as `transport/device`.
    pub(super) fn lanes(&self) -> Vec<String> {
        // SAFETY: a live endpoint and stream.
        let text = printed(|stream| unsafe { (self.api().ucp_ep_print_info)(self.raw, stream) });
        lanes_of(&text)
    }

    fn api(&self) -> &'static Api {
        self.worker.context.api
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let api = self.api();
        let param = sys::RequestParam { op_attr_mask: sys::OP_FLAGS, flags: sys::EP_CLOSE_FORCE, ..Default::default() };
        // SAFETY: a live endpoint and its key, for the last time. Whatever closing returns belongs to the worker, which is destroyed
        // next, before anything runs on it; so no put uses the key any more.
        unsafe {
            (api.ucp_ep_close_nbx)(self.raw, &param);
            if !self.key.is_null() {
                (api.ucp_rkey_destroy)(self.key);
            }
        }
    }
}

/// Finds the transports in what UCX prints of an endpoint.
fn lanes_of(text: &str) -> Vec<String> {
    let mut lanes: Vec<String> = Vec::new();
    for line in text.lines() {
        // "#                 lane[0]:  0:posix/memory.0 md[0]   -> md[0]/posix/sysdev[255] rma_bw#0 am am_bw#0"
        let Some((_, lane)) = line.split_once("lane[") else { continue };
        let name =
            lane.split_whitespace().nth(1).and_then(|word| word.split_once(':')).map(|(_, name)| name.to_owned());
        if let Some(name) = name.filter(|name| !lanes.contains(name)) {
            lanes.push(name);
        }
    }
    lanes
}

/// `ucp_err_handler_cb_t`.
unsafe extern "C" fn on_failure(failed: *mut libc::c_void, _ep: sys::Ep, status: Status) {
    // SAFETY: the cell of `Endpoint::connect`, which outlives the worker and is touched by the worker's thread alone, on which
    // UCX calls this.
    unsafe { &*failed.cast::<Cell<Status>>() }.set(status);
}
