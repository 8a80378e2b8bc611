//! NVRTC, which makes machine code of the kernels for the card at hand.
//!
//! It is opened when a card is used, never linked: a build needs no CUDA and neither does a start. It needs no card, so tests compile every
//! kernel for every architecture. Functions and their meaning: NVIDIA, *NVRTC*, section "User Interface".

use super::library;
use libloading::Library;
use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
    ptr::{null, null_mut},
};

/// Names under which the system's loader may know it, newest first, and where toolkits put it.
const PLACES: [&str; 5] =
    ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "/usr/local/cuda/lib64/libnvrtc.so"];

/// Returns how every kernel is compiled for `architecture`, such as `sm_90a`. Products and sums are rounded one by one unless a kernel says otherwise, so
/// that the emulator rounds alike.
pub(crate) fn options(architecture: &str) -> Vec<String> {
    vec![format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "--fmad=false".into()]
}

/// An open NVRTC.
#[derive(Debug)]
pub(crate) struct Nvrtc {
    functions: Functions,
    version: (c_int, c_int),
    /// Keeps the functions where they are.
    _library: Library,
    /// What it opens by a bare name when it compiles; open already, where it lies beside a named file and the loader does not look.
    _builtins: Option<Library>,
}

/// What it made of a source.
#[derive(Debug)]
pub(crate) struct Compiled {
    /// Machine code of one architecture.
    pub(crate) cubin: Vec<u8>,
    /// What it had to say; empty unless asked by options.
    pub(crate) log: String,
}

type Program = *mut c_void;

/// The functions in use. All return 0 when they succeed.
#[derive(Debug)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    cubin_bytes: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    log_bytes: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

impl Functions {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: types are those of NVRTC's header, unchanged since CUDA 11.1.
        unsafe {
            Ok(Self {
                version: library::function(library, c"nvrtcVersion")?,
                error: library::function(library, c"nvrtcGetErrorString")?,
                create: library::function(library, c"nvrtcCreateProgram")?,
                destroy: library::function(library, c"nvrtcDestroyProgram")?,
                compile: library::function(library, c"nvrtcCompileProgram")?,
                cubin_bytes: library::function(library, c"nvrtcGetCUBINSize")?,
                cubin: library::function(library, c"nvrtcGetCUBIN")?,
                log_bytes: library::function(library, c"nvrtcGetProgramLogSize")?,
                log: library::function(library, c"nvrtcGetProgramLog")?,
            })
        }
    }
}

impl Nvrtc {
    /// Opens the library `file`, or the one that the system's loader or a toolkit has.
    ///
    /// # Errors
    /// Says where it was looked for.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, String> {
        let (library, place) = library::open("NVRTC", file, &PLACES)?;
        Self::of(library, &place).map_err(|error| format!("{}: {error}", place.display()))
    }

    fn of(library: Library, place: &Path) -> Result<Self, String> {
        let functions = Functions::of(&library).map_err(|error| library::describe(&error))?;
        let mut version = (0, 0);
        // SAFETY: both are ours to write.
        match unsafe { (functions.version)(&mut version.0, &mut version.1) } {
            0 => {
                let builtins = place.with_file_name(format!("libnvrtc-builtins.so.{}.{}", version.0, version.1));
                // SAFETY: a table of functions, without initialisers.
                let _builtins = unsafe { Library::new(builtins) }.ok();
                Ok(Self { functions, version, _library: library, _builtins })
            }
            code => Err(format!("it says no version, but error {code}")),
        }
    }

    /// Returns its version, which is part of what a cached result depends on.
    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles `source`, called `name` in messages, for the architecture that `options` name.
    ///
    /// # Errors
    /// What the compiler says.
    pub(crate) fn compile(&self, name: &str, source: &str, options: &[String]) -> Result<Compiled, String> {
        let text =
            |text: &str| CString::new(text).map_err(|_| format!("{name}: a zero byte in the source or an option"));
        let (title, source) = (text(name)?, text(source)?);
        let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut open = Open { functions: &self.functions, program: null_mut() };
        // SAFETY: strings end with a zero and live until the end of the function; there are no headers.
        let created =
            unsafe { (self.functions.create)(&mut open.program, source.as_ptr(), title.as_ptr(), 0, null(), null()) };
        self.check(created).map_err(|problem| format!("{name}: {problem}"))?;
        // SAFETY: the program was made just above, and there are as many options as said.
        let compiled = unsafe { (self.functions.compile)(open.program, options.len() as c_int, options.as_ptr()) };
        let log = self.read(&open, self.functions.log_bytes, self.functions.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        self.check(compiled).map_err(|problem| format!("{name}: {problem}\n{log}"))?;
        let cubin = self.read(&open, self.functions.cubin_bytes, self.functions.cubin);
        Ok(Compiled { cubin: cubin.map_err(|problem| format!("{name}: {problem}"))?, log })
    }

    fn read(
        &self,
        open: &Open<'_>,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        read: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: the program is open.
        self.check(unsafe { size(open.program, &mut bytes) })?;
        let mut to = vec![0u8; bytes];
        // SAFETY: there is as much room as it asked for.
        self.check(unsafe { read(open.program, to.as_mut_ptr().cast()) })?;
        Ok(to)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it returns a static string for any code.
        let text = unsafe { (self.functions.error)(code) };
        if text.is_null() {
            return Err(format!("NVRTC error {code}"));
        }
        // SAFETY: as above; it ends with a zero.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A program until it is dropped.
struct Open<'a> {
    functions: &'a Functions,
    program: Program,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: it is open, and nobody else has it.
            unsafe { (self.functions.destroy)(&mut self.program) };
        }
    }
}
