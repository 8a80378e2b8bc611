//! NVIDIA's NCCL: how cards of one process give each other what they have computed.
//!
//! The library is opened when several cards are to share a model; a machine without it says so. It is opened here and not by cudarc, which looks
//! for `libnccl.so` alone: that name comes with development packages only. What is gathered is asked of a card's stream as a kernel is, and
//! a graph remembers it as one. A card whose peer has gone would wait for it for ever, so whoever goes ends the connections of all.
//!
//! Meaning of the functions: NVIDIA, *Collective Communication Library*, user guide; their types are those of its header since 2.4.

use super::library;
use cudarc::driver::sys::CUstream;
use libloading::Library;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    path::{Path, PathBuf},
    ptr::null_mut,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// Names under which the system's loader may know it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclUint8`.
const BYTES: c_int = 1;

type Comm = *mut c_void;

/// The functions in use. All but the first return 0 when they succeed.
#[derive(Debug)]
struct Functions {
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    connect: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int,
    gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    destroy: unsafe extern "C" fn(Comm) -> c_int,
}

impl Functions {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: these are their types.
        unsafe {
            Ok(Self {
                error: library::function(library, c"ncclGetErrorString")?,
                connect: library::function(library, c"ncclCommInitAll")?,
                gather: library::function(library, c"ncclAllGather")?,
                abort: library::function(library, c"ncclCommAbort")?,
                destroy: library::function(library, c"ncclCommDestroy")?,
            })
        }
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL returns a text that lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.error)(code)) };
        Err(format!("NCCL: {} (NCCL_DEBUG=WARN says more)", text.to_string_lossy()))
    }
}

/// Opens the library `file` or the one that is found. Returns where it was, too.
fn open(file: Option<&Path>) -> Result<(Library, Functions, PathBuf), String> {
    let (library, place) = library::open("NCCL", file, &NAMES)?;
    match Functions::of(&library) {
        Ok(functions) => Ok((library, functions, place)),
        Err(error) => Err(format!("{}: {}", place.display(), library::describe(&error))),
    }
}

/// Looks for the library, and says where it is.
///
/// # Errors
/// Says what is missing.
pub(super) fn find(file: Option<&Path>) -> Result<PathBuf, String> {
    open(file).map(|(_, _, place)| place)
}

/// The connections of some cards.
#[derive(Debug)]
pub(super) struct Ring {
    functions: Functions,
    /// By rank; `None` once they have ended.
    connections: Vec<Mutex<Option<Connection>>>,
    /// Keeps the functions where they are.
    _library: Library,
}

#[derive(Debug)]
struct Connection(Comm);

// SAFETY: a communicator may be used by any thread, one at a time.
unsafe impl Send for Connection {}

impl Ring {
    /// Connects the cards `cards`, counted as the driver does, by the library `file` or the one that is found, within `limit`.
    ///
    /// # Errors
    /// Says what is missing or what NCCL says.
    pub(super) fn connect(file: Option<&Path>, cards: &[c_int], limit: Duration) -> Result<Self, String> {
        let ((library, functions, _), cards) = (open(file)?, cards.to_vec());
        let (tell, told) = mpsc::channel();
        // NCCL waits for all cards, and knows no limit.
        let connect = move || tell.send(Self::connect_all(library, functions, &cards));
        thread::Builder::new()
            .name("nccl-connect".into())
            .spawn(connect)
            .map_err(|error| format!("start a thread: {error}"))?;
        let late = |_| format!("NCCL: no connection within {limit:?} (NCCL_DEBUG=INFO says more)");
        told.recv_timeout(limit).map_err(late)?
    }

    fn connect_all(library: Library, functions: Functions, cards: &[c_int]) -> Result<Self, String> {
        let mut made = vec![null_mut(); cards.len()];
        // SAFETY: there is room for a communicator of each card.
        let code = unsafe { (functions.connect)(made.as_mut_ptr(), cards.len() as c_int, cards.as_ptr()) };
        functions.check(code)?;
        let connections = made.into_iter().map(|made| Mutex::new(Some(Connection(made)))).collect();
        Ok(Self { functions, connections, _library: library })
    }

    /// Returns how many cards there are.
    pub(super) fn ranks(&self) -> usize {
        self.connections.len()
    }

    /// Asks `stream` of rank `rank` to gather `bytes` bytes of every rank's `part` in `whole`.
    ///
    /// # Safety
    /// Both lie in memory of the rank's card, `part` that long and `whole` as long as all parts, until the stream has passed this.
    pub(super) unsafe fn gather(
        &self,
        rank: usize,
        part: u64,
        bytes: usize,
        whole: u64,
        stream: CUstream,
    ) -> Result<(), String> {
        let connection = self.connection(rank);
        let Some(Connection(connection)) = *connection else { return Err("a peer has gone".into()) };
        let (part, whole) = (part as *const c_void, whole as *mut c_void);
        // SAFETY: as promised; the communicator lives while it is locked.
        self.functions.check(unsafe { (self.functions.gather)(part, whole, bytes, BYTES, connection, stream) })
    }

    /// Ends all connections, and with them what streams still wait for.
    pub(super) fn leave(&self) {
        self.end(self.functions.abort);
    }

    /// Gives everything back, when no stream has work left.
    pub(super) fn close(&self) {
        self.end(self.functions.destroy);
    }

    fn end(&self, how: unsafe extern "C" fn(Comm) -> c_int) {
        for rank in 0..self.connections.len() {
            if let Some(Connection(connection)) = self.connection(rank).take() {
                // SAFETY: nobody else has a communicator that was taken. What cannot be given back goes with the process.
                unsafe { how(connection) };
            }
        }
    }

    /// Nothing that is locked here is left half-way by a panic.
    fn connection(&self, rank: usize) -> MutexGuard<'_, Option<Connection>> {
        self.connections[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
