//! Libraries of NVIDIA that are opened when they are needed, and functions in them.

use libloading::Library;
use std::{
    error::Error,
    ffi::CStr,
    path::{Path, PathBuf},
};

/// Opens the library `file`, or the first of `places` that can be opened; `what` names it for people. Returns where it was.
///
/// # Errors
/// Says where it was looked for.
pub(super) fn open(what: &str, file: Option<&Path>, places: &[&str]) -> Result<(Library, PathBuf), String> {
    let places: Vec<PathBuf> = match file {
        Some(file) => vec![file.to_owned()],
        None => places.iter().map(PathBuf::from).collect(),
    };
    let mut problem = String::new();
    for place in &places {
        // SAFETY: initialisers of NVRTC and NCCL do nothing but set up their own state.
        match unsafe { Library::new(place) } {
            Ok(library) => return Ok((library, place.clone())),
            Err(error) => problem = describe(&error),
        }
    }
    let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    Err(format!("{what} cannot be opened ({problem}); looked for {}", looked.join(", ")))
}

/// Says what is wrong, and with which name: that stands in the error's source.
pub(crate) fn describe(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Returns the function `name`, which is there as long as the library is open.
///
/// # Safety
/// It is of type `F`.
pub(super) unsafe fn function<F: Copy>(library: &Library, name: &CStr) -> Result<F, libloading::Error> {
    // SAFETY: passed on.
    unsafe { library.get::<F>(name.to_bytes_with_nul()).map(|function| *function) }
}
