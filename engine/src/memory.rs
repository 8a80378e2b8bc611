//! The bytes of the pages.

use crate::Error;
use kv_cache::PageLayout;
use memmap2::{MmapOptions, MmapRaw};
use std::{fs::File, io};

/// The page pool of one worker: anonymous shared memory (a memfd on Linux, an unlinked temporary file elsewhere), mapped.
///
/// It is a file so that a transport can map the same bytes by itself, in this process or another, without the two crates
/// sharing a pointer. Its size is sealed: nobody who maps it can lose memory under their hands. Memory is taken when it is first written, so a large pool costs nothing at start.
#[derive(Debug)]
pub struct KvMemory {
    layout: PageLayout,
    file: File,
    map: MmapRaw,
}

impl KvMemory {
    /// Reserves memory for `layout`, zero-filled.
    ///
    /// # Errors
    /// [`Error::Setting`] for a layout without bytes, [`Error::System`] when the system refuses.
    pub fn new(layout: PageLayout) -> Result<Self, Error> {
        let bytes = layout.pool_bytes();
        if bytes == 0 {
            return Err(Error::setting("kv_bytes", format!("a pool of {layout:?} has no bytes")));
        }
        let file = anonymous_file().map_err(Error::system("create page memory"))?;
        file.set_len(bytes as u64).map_err(Error::system("size page memory"))?;
        #[cfg(target_os = "linux")]
        seal(&file).map_err(Error::system("seal page memory"))?;
        let map = MmapOptions::new().len(bytes).map_raw(&file).map_err(Error::system("map page memory"))?;
        // Where the system gives huge pages to shared memory that asks (`transparent_hugepage/shmem_enabled` is `advise`), reading
        // a long context costs fewer table walks. Most systems give none, and then nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { layout, file, map })
    }

    /// Returns where each page's bytes lie.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Returns the file that is mapped, [`PageLayout::pool_bytes`] long.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the start of the pool, [`PageLayout::pool_bytes`] long, aligned to a page of the system.
    ///
    /// A pointer and not a slice: transports write landing pages through their own maps while the engine computes on others.
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }
}

#[cfg(target_os = "linux")]
fn anonymous_file() -> io::Result<File> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the name is a C string; the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(c"baton-pages".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, is valid, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Fixes the size of `file`, so that another process can map it without fear that its memory is cut off.
#[cfg(target_os = "linux")]
fn seal(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call takes numbers alone, and the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(not(target_os = "linux"))]
fn anonymous_file() -> io::Result<File> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("baton-pages-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_cache::KvDtype;
    use std::os::unix::fs::FileExt;

    fn layout(pages: u32) -> PageLayout {
        PageLayout { layers: 2, page_tokens: 16, kv_heads: 2, key_dim: 8, value_dim: 8, dtype: KvDtype::F32, pages }
    }

    #[test]
    fn the_map_and_the_file_are_the_same_bytes() {
        let memory = KvMemory::new(layout(3)).expect("memory");
        let bytes = memory.layout().pool_bytes();
        assert_eq!(memory.file().metadata().expect("metadata").len() as usize, bytes);
        memory.file().write_all_at(&[7], bytes as u64 - 1).expect("write");
        // SAFETY: the byte is the last one of the map, and nobody writes at the same time.
        let (first, last) = unsafe { (memory.as_mut_ptr().read(), memory.as_mut_ptr().add(bytes - 1).read()) };
        assert_eq!((first, last), (0, 7));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_size_cannot_change() {
        let memory = KvMemory::new(layout(3)).expect("memory");
        let bytes = memory.layout().pool_bytes() as u64;
        for size in [bytes - 1, bytes + 1] {
            assert_eq!(memory.file().set_len(size).expect_err("sealed").kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_large_pool_takes_no_memory_before_it_is_written() {
        use std::os::unix::fs::MetadataExt;
        let memory = KvMemory::new(layout(1 << 18)).expect("memory");
        assert_eq!(memory.layout().pool_bytes(), 1 << 30);
        assert_eq!(memory.file().metadata().expect("metadata").blocks(), 0);
    }

    #[test]
    fn an_empty_pool_is_refused() {
        assert!(matches!(KvMemory::new(layout(0)), Err(Error::Setting { field: "kv_bytes", .. })));
    }
}
