//! Machine code of kernels, kept from one start to the next.
//!
//! A file is named by all that its contents depend on: source, options (the architecture is one), and NVRTC's version. It begins with a hash of what
//! follows, so that one which was cut short is compiled again instead of loaded. Nothing here can fail a start: without a cache,
//! kernels are compiled each time.

use super::nvrtc::{Compiled, Nvrtc};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Bytes of the hash in front.
const HASH: usize = 32;

/// Where machine code is kept.
#[derive(Debug)]
pub(crate) struct Cache {
    /// `None` = nowhere.
    pub(crate) folder: Option<PathBuf>,
}

impl Cache {
    /// Returns the machine code of `source`, from the cache or from `nvrtc`.
    ///
    /// # Errors
    /// What the compiler says.
    pub(crate) fn cubin(&self, nvrtc: &Nvrtc, name: &str, source: &str, options: &[String]) -> Result<Vec<u8>, String> {
        let path = self.folder.as_ref().map(|folder| folder.join(file_name(nvrtc.version(), source, options)));
        if let Some(cubin) = path.as_deref().and_then(read) {
            return Ok(cubin);
        }
        let Compiled { cubin, log } = nvrtc.compile(name, source, options)?;
        tracing::debug!(name, log, "a kernel was compiled");
        if let Some(path) = path
            && let Err(error) = write(&path, &cubin)
        {
            tracing::warn!(path = %path.display(), %error, "machine code of a kernel is not kept: it will be compiled again");
        }
        Ok(cubin)
    }
}

fn file_name(version: (i32, i32), source: &str, options: &[String]) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("baton kernel v1");
    hasher.update(&version.0.to_le_bytes()).update(&version.1.to_le_bytes());
    for part in options.iter().map(String::as_str).chain([source]) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    format!("{}.cubin", &hasher.finalize().to_hex()[..32])
}

/// Returns the contents of a whole file.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let whole = bytes.len() > HASH && blake3::hash(&bytes[HASH..]).as_bytes() == &bytes[..HASH];
    whole.then(|| bytes.split_off(HASH))
}

/// Writes beside the file and puts it into its place, so that nobody reads half of it.
fn write(path: &Path, cubin: &[u8]) -> io::Result<()> {
    let folder = path.parent().expect("a file in the cache's folder");
    fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("{}.part", std::process::id()));
    fs::write(&beside, [blake3::hash(cubin).as_bytes(), cubin].concat())?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_everything() {
        let options = |list: &[&str]| list.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
        let plain = file_name((13, 0), "source", &options(&["-a", "-b"]));
        assert_eq!(plain, file_name((13, 0), "source", &options(&["-a", "-b"])));
        for other in [
            file_name((13, 1), "source", &options(&["-a", "-b"])),
            file_name((13, 0), "source ", &options(&["-a", "-b"])),
            file_name((13, 0), "source", &options(&["-a-b"])),
            file_name((13, 0), "-bsource", &options(&["-a"])),
        ] {
            assert_ne!(plain, other);
        }
    }

    #[test]
    fn a_file_that_is_not_whole_is_no_file() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("deeper").join("a.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"machine code").expect("written");
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
        let whole = fs::read(&path).expect("a file");
        for bytes in [&whole[..whole.len() - 1], &whole[..HASH], &whole[..5], &[&whole[..], b"x"].concat()] {
            fs::write(&path, bytes).expect("written");
            assert_eq!(read(&path), None, "{} bytes", bytes.len());
        }
    }
}
