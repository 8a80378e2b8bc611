//! Opening the library.

use crate::{API_VERSION, Api};
use libc::{c_char, c_int, c_uint, c_void};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
use std::{
    error::Error,
    ffi::CStr,
    mem,
    path::{Path, PathBuf},
    ptr,
    sync::{Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard},
    thread,
    time::{Duration, Instant},
};

/// Soname of the library.
const LIBRARY: &str = "libucp.so.0";
/// What it needs from the folder it lies in when that is not one the system searches, in the order of their needs.
const NEEDED: [&str; 4] = ["libnuma.so.1", "libucm.so.0", "libucs.so.0", "libuct.so.0"];
const SIGNALS: std::ops::RangeInclusive<c_int> = 1..=64;

/// Why there is no UCX here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The library, one that it needs or one of its functions is not there.
    #[error("{library} cannot be loaded: {reason}")]
    Missing {
        /// What was looked for.
        library: String,
        /// What the dynamic linker said.
        reason: String,
    },
    /// It is older than anything this code knows.
    #[error("{library} is version {}.{}.{}, at least {}.{} is needed", version.0, version.1, version.2, API_VERSION.0, API_VERSION.1)]
    TooOld {
        /// What was opened.
        library: String,
        /// What it says it is.
        version: (u32, u32, u32),
    },
    /// One process, one UCX.
    #[error("{wanted} cannot be loaded beside {loaded}: a process has one UCX")]
    Another {
        /// What was asked for.
        wanted: String,
        /// What is there.
        loaded: String,
    },
}

/// How much a message of the library matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Fatal ones too; the process ends after those.
    Error,
    Warn,
    Info,
    Debug,
}

static LOADED: Mutex<Option<&'static Api>> = Mutex::new(None);
/// Held by threads that are inside the library; for good by the end of the process.
static INSIDE: RwLock<()> = RwLock::new(());
/// Longest that the end of the process waits for threads inside the library.
const EXIT_LIMIT: Duration = Duration::from_secs(1);
static LOG: OnceLock<fn(Level, &str)> = OnceLock::new();

/// Opens the library at `path`, or `libucp.so.0` where the system looks. It stays for the life of the process; a second call
/// returns the same one. What it has to say goes to `log` instead of standard output.
///
/// The libraries it needs (`libucs.so.0` and others) are taken from the folder of `path` first, so that an unpacked package
/// works wherever it lies.
pub fn load(path: Option<&Path>, log: fn(Level, &str)) -> Result<&'static Api, LoadError> {
    let wanted = path.map_or(LIBRARY.to_owned(), |path| path.display().to_string());
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    match *loaded {
        Some(api) if path.is_none() || api.path() == wanted => return Ok(api),
        Some(api) => return Err(LoadError::Another { wanted, loaded: api.path().to_owned() }),
        None => {}
    }
    let _ = LOG.set(log);
    let before = handlers();
    let opened = open(path, &wanted);
    restore(before);
    let api = Box::leak(Box::new(opened?));
    // SAFETY: a function that does not unwind, registered once.
    unsafe { libc::atexit(keep_out) };
    *loaded = Some(api);
    Ok(api)
}

/// To be held by a thread that may still be running when the process exits, whenever it is inside the library: the library's
/// destructors run then, and what they take down is what such a thread would touch. After that it waits here for its end.
pub fn enter() -> RwLockReadGuard<'static, ()> {
    // There is nothing in it that a panic could leave half done.
    INSIDE.read().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps threads out of the library. Runs before its destructors, as those were registered earlier.
extern "C" fn keep_out() {
    let deadline = Instant::now() + EXIT_LIMIT;
    while Instant::now() < deadline {
        if let Ok(guard) = INSIDE.try_write() {
            return mem::forget(guard);
        }
        // Nobody wakes this thread: it looks again.
        thread::park_timeout(Duration::from_millis(1));
    }
}

fn open(path: Option<&Path>, wanted: &str) -> Result<Api, LoadError> {
    let missing = |error: libloading::Error| {
        let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        LoadError::Missing { library: wanted.to_owned(), reason }
    };
    let open = |file: PathBuf| {
        // Lazily and for all to see: libucm and libucs need each other.
        // SAFETY: runs the initialisers of UCX, which change signal handlers (taken back by the caller). Leaked at once: none is
        // ever unloaded.
        let library = unsafe { Library::open(Some(file), RTLD_LAZY | RTLD_GLOBAL) }?;
        Ok(&*Box::leak(Box::new(library)))
    };
    if let Some(folder) = path.and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        for needed in NEEDED.map(|name| folder.join(name)).into_iter().filter(|file| file.exists()) {
            open(needed).map_err(missing)?;
        }
    }
    let ucp: &'static Library = open(path.map_or(LIBRARY.into(), Path::to_owned)).map_err(missing)?;
    // Loaded along with libucp, so any search finds that one: its functions are reachable through libucp itself.
    // SAFETY: both are UCX's, and leaked.
    let mut api = unsafe { Api::find(ucp, wanted.to_owned()) }.map_err(missing)?;
    let (mut major, mut minor, mut release) = (0, 0, 0);
    // SAFETY: writes three numbers.
    unsafe { (api.ucp_get_version)(&mut major, &mut minor, &mut release) };
    api.version = (major, minor, release);
    if !api.at_least(API_VERSION) {
        return Err(LoadError::TooOld { library: wanted.to_owned(), version: api.version });
    }
    // SAFETY: `ucs_log_push_handler` of `ucs/debug/log_def.h` takes such a function and keeps it.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if let Ok(push) = unsafe { ucp.get::<unsafe extern "C" fn(LogHandler)>(b"ucs_log_push_handler\0") } {
        // SAFETY: a function of this process, which stays.
        unsafe { push(heard) };
    }
    Ok(api)
}

type LogHandler = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    *const c_char,
    c_uint,
    *const c_void,
    *const c_char,
    *mut c_void,
) -> c_uint;

unsafe extern "C" {
    /// `vsnprintf`, its `va_list` as the pointer that the ABIs of x86-64 and AArch64 pass it as.
    fn vsnprintf(buffer: *mut c_char, length: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// `ucs_log_func_t`: hands a message on, and keeps it from the library's own log.
unsafe extern "C" fn heard(
    _file: *const c_char,
    _line: c_uint,
    _function: *const c_char,
    level: c_uint,
    _component: *const c_void,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_uint {
    let mut text: [c_char; 1024] = [0; 1024];
    // SAFETY: format and arguments belong together (the library's macro), the buffer is as long as is said and ends with a zero.
    let text = unsafe {
        vsnprintf(text.as_mut_ptr(), text.len(), format, arguments);
        CStr::from_ptr(text.as_ptr())
    };
    // `ucs_log_level_t`: fatal, error, warn, diag, info, debug and finer.
    let level = match level {
        0 | 1 => Level::Error,
        2 => Level::Warn,
        3 | 4 => Level::Info,
        _ => Level::Debug,
    };
    if let Some(log) = LOG.get() {
        log(level, &text.to_string_lossy());
    }
    0 // UCS_LOG_FUNC_RC_STOP
}

/// Returns what each signal does now, and this thread's alternate stack.
fn handlers() -> (Vec<(c_int, libc::sigaction)>, libc::stack_t) {
    let handler = |signal| {
        // SAFETY: all zeros is a `sigaction`; asks only.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            (libc::sigaction(signal, ptr::null(), &mut action) == 0).then_some((signal, action))
        }
    };
    // SAFETY: as above.
    let stack = unsafe {
        let mut stack: libc::stack_t = mem::zeroed();
        libc::sigaltstack(ptr::null(), &mut stack);
        stack
    };
    (SIGNALS.filter_map(handler).collect(), stack)
}

/// Takes back what the library's initialisers changed: faults of this process are not theirs to report.
fn restore((before, stack): (Vec<(c_int, libc::sigaction)>, libc::stack_t)) {
    let (now, _) = handlers();
    for ((signal, before), (_, now)) in before.iter().zip(now) {
        if before.sa_sigaction != now.sa_sigaction {
            // SAFETY: what was there until a moment ago.
            unsafe { libc::sigaction(*signal, before, ptr::null_mut()) };
        }
    }
    // SAFETY: as above; this thread's own stack, which still is.
    unsafe { libc::sigaltstack(&stack, ptr::null_mut()) };
}
