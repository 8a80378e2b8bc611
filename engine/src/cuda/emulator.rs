//! Kernels on the processor, for tests: the text that a device would run, compiled by the system's C compiler over `emulator.c`.
//!
//! What this proves: indices, barriers, the order of sums, the layouts of fragments (as the PTX ISA documents them), shared memory within
//! what a launch says, memory of buffers within their guard pages. What it cannot: speed, and the last bits of the device's own `mma`,
//! `ex2` and library functions.

use super::kernels::{Call, Kernel};
use libloading::Library;
use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    process::Command,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

/// The order in which threads take turns; what is right does not depend on it (`emulator.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Forward,
    Backward,
}

type Run = unsafe extern "C" fn(*const c_void, *const u64, *const u32, u32, u64, c_int, *mut c_char, u64) -> c_int;

static COMPILED: LazyLock<Mutex<HashMap<Kernel, Arc<Library>>>> = LazyLock::new(Mutex::default);

/// Runs a call whose addresses are those of this process.
///
/// # Safety
/// The memory that the kernel reads and writes is there, and nobody else touches what it writes.
///
/// # Errors
/// Names the kernel and what is wrong: threads that part at a barrier, a launch that cannot be.
pub(crate) unsafe fn run(call: &Call, order: Order) -> Result<(), String> {
    let name = call.kernel.name;
    let library = library(&call.kernel)?;
    let mut problem = [0u8; 256];
    // SAFETY: the library was just compiled from sources that define both symbols with these types; the words are the kernel's
    // structure, whose fields are eight bytes each, and `problem` is as long as it says.
    let status = unsafe {
        let entry = library.get::<*const c_void>(name).map_err(|error| error.to_string())?;
        let run = library.get::<Run>("emulator_run").map_err(|error| error.to_string())?;
        let (args, room) = (call.args.words().as_ptr(), problem.len() as u64);
        let backward = c_int::from(order == Order::Backward);
        let shared = u64::from(call.shared_bytes);
        run(*entry, args, call.grid.as_ptr(), call.threads, shared, backward, problem.as_mut_ptr().cast(), room)
    };
    if status == 0 {
        return Ok(());
    }
    let problem = CStr::from_bytes_until_nul(&problem).map_or("a long story".into(), CStr::to_string_lossy);
    Err(format!("kernel {name}, {:?}: {problem}", call.kernel.defines))
}

/// Returns the compiled source of a kernel; one of the same source and defines is compiled once.
fn library(kernel: &Kernel) -> Result<Arc<Library>, String> {
    let key = Kernel { name: "", ..*kernel };
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = compiled.get(&key) {
        return Ok(library.clone());
    }
    let folder = tempfile::tempdir().map_err(|error| format!("make a folder to compile in: {error}"))?;
    let (source, object) = (folder.path().join("kernel.c"), folder.path().join("kernel.so"));
    let text = kernel.text_over(("emulator.c", include_str!("emulator.c")));
    std::fs::write(&source, text).map_err(|error| format!("write {}: {error}", source.display()))?;
    let mut compiler = Command::new("cc");
    // Products and sums are rounded one by one, as `--fmad=false` has it on the device.
    compiler.args([
        "-std=gnu11",
        "-O2",
        "-ftree-vectorize",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
    ]);
    #[cfg(target_arch = "x86_64")]
    compiler.arg("-march=native");
    let output = compiler.args(["-Werror", "-Wno-unknown-pragmas", "-o"]).arg(&object).arg(&source).arg("-lm").output();
    let output = output.map_err(|error| format!("start the C compiler `cc`: {error}"))?;
    if !output.status.success() {
        return Err(format!("cc on {:?}: {}", kernel.source, String::from_utf8_lossy(&output.stderr)));
    }
    // SAFETY: the library has no initialisers.
    let library = unsafe { Library::new(&object) }.map_err(|error| error.to_string())?;
    let library = Arc::new(library);
    compiled.insert(key, library.clone());
    Ok(library)
}
