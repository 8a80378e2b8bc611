//! The bytes of this worker's page pool, mapped from the file that the engine maps too.
//!
//! Nothing here knows who may touch a block: the hand-off protocol says so, and it is what every `unsafe` call below leans on.
//!
//! - A *source* block is frozen from the `push` that names it until [`Event::SourceDone`](crate::Event::SourceDone). The
//!   transports only read it in between; the engine only reads it too.
//! - A *landing* block belongs to its hand-off from [`Transfer::open`](crate::Transfer::open) until `Landed` or `Quiet`. Only a
//!   transport that holds a [`Permit`](crate::landing::Permit) of that landing writes it, each block is admitted once, and the
//!   engine does not touch it.
//! - Every other block is none of our business.
//!
//! A mapping made here is followed by an inaccessible guard page, so that running over the end is a fault and not somebody's memory.

use crate::{
    Error,
    convert::convert,
    plan::{self, Piece, Place, Terms},
    streaming,
};
use kv_cache::{Backing, Extent, PageId, PageLayout, PoolCopy};
use std::{fs::File, io, os::fd::AsRawFd, ptr, sync::Arc};

/// A page pool as this crate sees it. Unmapped on drop, if it was mapped here.
#[derive(Debug)]
pub(crate) struct Pages {
    base: *mut u8,
    /// The whole reservation: up to a huge page before the pool, the pool rounded up to system pages, and the guard. `None`: mapped by
    /// somebody else.
    reserved: Option<(*mut libc::c_void, usize)>,
    layout: PageLayout,
    /// Where the pages really are, if not here.
    backing: Option<Arc<dyn Backing>>,
}

// SAFETY: `base` is an address of shared memory, valid from every thread for as long as `self` lives; all access goes through
// the unsafe functions below, whose callers answer for races.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `file`, which must be at least [`PageLayout::pool_bytes`] long: touching a mapping past the end of its file kills
    /// the process.
    pub(crate) fn map(file: &File, layout: PageLayout) -> Result<Self, Error> {
        let bytes = layout.pool_bytes();
        Self::reserve_and_map(file, &layout)
            .map(|(base, reserved)| Self { base, reserved: Some(reserved), layout, backing: None })
            .map_err(|source| Error::Map { bytes, source })
    }

    /// Maps the pool of another process, as [`Pages::map`]. Children of this process do not inherit it: they could write it when
    /// this process is gone.
    pub(crate) fn map_foreign(file: &File, layout: PageLayout) -> Result<Self, Error> {
        let pages = Self::map(file, layout)?;
        let bytes = pages.layout.pool_bytes();
        pages.keep_from_children().map_err(|source| Error::Map { bytes, source })?;
        Ok(pages)
    }

    /// Views a pool that somebody else mapped. Children of this process do not inherit it.
    ///
    /// # Safety
    /// All of it is mapped at `base` for writing, shared with its owner, for as long as this lives.
    pub(crate) unsafe fn lent(base: *mut u8, layout: PageLayout) -> io::Result<Self> {
        let pages = Self { base, reserved: None, layout, backing: None };
        pages.keep_from_children()?;
        Ok(pages)
    }

    /// Has pages that are elsewhere pass through here.
    pub(crate) fn with_backing(mut self, backing: Option<Arc<dyn Backing>>) -> Self {
        self.backing = backing;
        self
    }

    /// Returns where the pages are, if not here.
    pub(crate) fn backing(&self) -> Option<&Arc<dyn Backing>> {
        self.backing.as_ref()
    }

    /// Brings `pieces` of the sequence at `place` here from wherever they are; they are frozen.
    pub(crate) fn fetch(&self, place: Place<'_>, pieces: &[Piece]) -> Result<(), String> {
        self.backing.as_ref().map_or(Ok(()), |backing| backing.fetch(&plan::extents(place, pieces)))
    }

    /// Brings `pieces` of the sequence at `place`, which are here, to where they belong.
    pub(crate) fn store(&self, place: Place<'_>, pieces: &[Piece]) -> Result<(), String> {
        self.backing.as_ref().map_or(Ok(()), |backing| backing.store(&plan::extents(place, pieces)))
    }

    fn keep_from_children(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        self.advise(0, self.layout.pool_bytes(), libc::MADV_DONTFORK)?;
        Ok(())
    }

    fn reserve_and_map(file: &File, layout: &PageLayout) -> io::Result<(*mut u8, (*mut libc::c_void, usize))> {
        let bytes = layout.pool_bytes();
        let length = file.metadata()?.len();
        if bytes == 0 || length < bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the pool file has {length} bytes")));
        }
        let guard = system_page_bytes();
        let reserved = HUGE_PAGE_BYTES + bytes.next_multiple_of(guard) + guard;
        // SAFETY: an anonymous reservation at an address of the system's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Where the file has huge pages, they can be mapped as such.
        let base = start.map_addr(|address| address.next_multiple_of(HUGE_PAGE_BYTES));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces a part of the reservation just made, which nobody else knows of.
        let mapped =
            unsafe { libc::mmap(base, bytes, access, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: gives back the reservation made above; nothing points into it.
            unsafe { libc::munmap(start, reserved) };
            return Err(error);
        }
        #[cfg(target_os = "linux")]
        // SAFETY: changes how the system backs the map just made, not what it holds. Most systems ignore it for files.
        unsafe {
            libc::madvise(base, bytes, libc::MADV_HUGEPAGE);
        }
        Ok((base.cast(), (start, reserved)))
    }

    /// Returns where the pool begins, for those who register its memory.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Returns the shape of the pool.
    pub(crate) fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Fills the page tables of up to `bytes` from `offset` on, for writing. Returns whether the system does that.
    pub(crate) fn touch(&self, offset: usize, bytes: usize) -> bool {
        #[cfg(target_os = "linux")]
        return self.advise(offset, bytes.min(self.layout.pool_bytes() - offset), libc::MADV_POPULATE_WRITE).is_ok();
        #[cfg(not(target_os = "linux"))]
        return {
            let _ = (offset, bytes);
            false
        };
    }

    #[cfg(target_os = "linux")]
    fn advise(&self, offset: usize, bytes: usize, advice: libc::c_int) -> io::Result<()> {
        let address = self.address(offset, bytes);
        // SAFETY: inside the mapping; none of the advices given here changes what it holds.
        match unsafe { libc::madvise(address.cast(), bytes, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the address of `extent`.
    ///
    /// # Panics
    /// When it leaves the pool. Extents come out of `plan`, which cannot produce one; this is the last check before memory.
    fn address(&self, offset: usize, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.layout.pool_bytes()),
            "{bytes} bytes at {offset} leave the page pool"
        );
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(offset) }
    }

    /// Views bytes of frozen blocks.
    ///
    /// # Safety
    /// Nobody writes `extent` while the slice lives: its blocks were pushed and their hand-off is not done, or they landed
    /// under a permit that the caller still holds.
    pub(crate) unsafe fn bytes(&self, extent: Extent) -> &[u8] {
        let address = self.address(extent.offset, extent.bytes);
        // SAFETY: valid for the length (checked), initialised (a file mapping), and not written meanwhile (caller).
        unsafe { std::slice::from_raw_parts(address, extent.bytes) }
    }

    /// Views bytes of landing blocks for writing.
    ///
    /// # Safety
    /// The caller holds a permit of the landing that `extent` lies in for as long as the slice lives, and is the only one to
    /// whom these blocks were admitted.
    #[allow(clippy::mut_from_ref)] // Exclusive by the hand-off protocol, not by the borrow of the pool as a whole.
    pub(crate) unsafe fn bytes_mut(&self, extent: Extent) -> &mut [u8] {
        let address = self.address(extent.offset, extent.bytes);
        // SAFETY: valid for the length (checked), initialised (a file mapping), and exclusive (caller).
        unsafe { std::slice::from_raw_parts_mut(address, extent.bytes) }
    }

    /// Returns the blocks of `pieces` as they travel under `terms` that convert, read from the sequence's pages `pages` here.
    ///
    /// # Safety
    /// As [`Pages::bytes`], while this runs.
    pub(crate) unsafe fn converted(&self, terms: &Terms, pages: &[PageId], pieces: &[Piece]) -> Vec<u8> {
        let place = Place { view: &terms.source, pages };
        let mut out = Vec::with_capacity(plan::blocks(pieces) as usize * terms.block_bytes());
        let mut block = Vec::with_capacity(terms.source.travel.block_bytes());
        for piece in pieces {
            for page in piece.pages.clone() {
                block.clear();
                for extent in plan::extents(place, &[Piece { layer: piece.layer, pages: page..page + 1 }]) {
                    // SAFETY: passed on.
                    block.extend_from_slice(unsafe { self.bytes(extent) });
                }
                convert(&terms.source.travel, &block, &terms.target.travel, &mut out);
            }
        }
        out
    }

    /// Writes `blocks`, which are `pieces` as they travel, into landing blocks here.
    ///
    /// # Safety
    /// As [`Pages::bytes_mut`] for where `pieces` lie in `place`, while this runs.
    pub(crate) unsafe fn write_blocks(&self, place: Place<'_>, pieces: &[Piece], mut blocks: &[u8]) {
        for extent in plan::extents(place, pieces) {
            let (here, rest) = blocks.split_at(extent.bytes);
            // SAFETY: passed on.
            unsafe { self.bytes_mut(extent) }.copy_from_slice(here);
            blocks = rest;
        }
    }

    /// Copies blocks of `source` into landing blocks here, one copy after the other. When this returns, the bytes are as visible to others
    /// as those of any store.
    ///
    /// # Safety
    /// As [`Pages::bytes`] for the source's bytes and [`Pages::bytes_mut`] for ours.
    pub(crate) unsafe fn copy_from(&self, source: &Pages, copies: &[PoolCopy]) {
        for (at, copy) in copies.iter().enumerate() {
            let from = source.address(copy.source, copy.bytes);
            let to = self.address(copy.target, copy.bytes);
            let next =
                copies.get(at + 1).map_or(ptr::null(), |next| source.address(next.source, next.bytes).cast_const());
            // SAFETY: both valid for the length (checked); source and landing blocks are distinct even when both pools are the
            // same file, since no page is a source and a landing at once (caller).
            unsafe { streaming::copy(from, to, copy.bytes, next) };
        }
        streaming::fence();
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Some((start, bytes)) = self.reserved {
            // SAFETY: the reservation made in `map`; whoever uses the bytes holds `self`, so nobody does any more.
            unsafe { libc::munmap(start, bytes) };
        }
    }
}

/// Alignment that lets the system map huge pages, on the processors that we know.
const HUGE_PAGE_BYTES: usize = 2 << 20;

fn system_page_bytes() -> usize {
    // SAFETY: asks for a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).expect("the system has a page size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{layout, pool};
    use kv_cache::PageId;
    use std::os::fd::AsRawFd;

    fn block(layout: &PageLayout, layer: u32, page: u32) -> Extent {
        Extent { offset: layout.block_offset(layer, PageId(page)), bytes: layout.block_bytes() }
    }

    /// Every block is written through the mapping and read back through the file, with all others poisoned: a write that
    /// strays by a byte shows in a neighbour.
    #[test]
    fn a_block_is_its_bytes_and_nothing_else() {
        let layout = layout(3, 5);
        let file = pool(&layout);
        let pages = Pages::map(&file, layout.clone()).expect("map");
        for layer in 0..layout.layers {
            for page in 0..layout.pages {
                let extent = block(&layout, layer, page);
                let mut expected = vec![0xA5; layout.pool_bytes()];
                crate::testing::fill(&file, &expected);
                // SAFETY: this test is the only user of the pool.
                unsafe { pages.bytes_mut(extent) }.fill(7);
                expected[extent.offset..extent.offset + extent.bytes].fill(7);
                assert!(crate::testing::contents(&file, &layout) == expected, "block ({layer}, {page})");
            }
        }
    }

    #[test]
    fn blocks_copy_between_pools_of_different_size() {
        let (ours, theirs) = (layout(2, 3), layout(2, 7));
        let (source_file, target_file) = (pool(&ours), pool(&theirs));
        let (source, target) = (Pages::map(&source_file, ours.clone()), Pages::map(&target_file, theirs.clone()));
        let (source, target) = (source.expect("map"), target.expect("map"));
        let (from, to) = (block(&ours, 1, 2), block(&theirs, 1, 6));
        // SAFETY: this test is the only user of both pools.
        unsafe {
            source.bytes_mut(from).fill(9);
            target.copy_from(&source, &[PoolCopy { source: from.offset, target: to.offset, bytes: from.bytes }]);
        }
        let landed = crate::testing::contents(&target_file, &theirs);
        assert!(landed[to.offset..to.offset + to.bytes].iter().all(|byte| *byte == 9));
        assert!(landed[..to.offset].iter().all(|byte| *byte == 0), "neighbours are untouched");
    }

    /// The page after the pool cannot be touched. Asked through the kernel, which answers EFAULT where the processor would
    /// kill the test.
    #[test]
    fn a_guard_page_follows_the_pool() {
        let layout = layout(1, 1);
        let pages = Pages::map(&pool(&layout), layout.clone()).expect("map");
        let sink = tempfile::tempfile().expect("temporary file");
        let write = |offset: usize| {
            // SAFETY: the kernel checks the address; nothing is dereferenced here.
            let wrote = unsafe { libc::write(sink.as_raw_fd(), pages.base.add(offset).cast(), 1) };
            if wrote == 1 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error()) }
        };
        let rounded = layout.pool_bytes().next_multiple_of(system_page_bytes());
        assert_eq!(write(layout.pool_bytes() - 1), Ok(()));
        assert_eq!(write(rounded), Err(Some(libc::EFAULT)));
        assert_eq!(write(rounded + system_page_bytes() - 1), Err(Some(libc::EFAULT)));
    }

    #[test]
    #[should_panic(expected = "leave the page pool")]
    fn an_extent_outside_is_caught_before_memory() {
        let layout = layout(1, 2);
        let pages = Pages::map(&pool(&layout), layout.clone()).expect("map");
        // SAFETY: panics before touching anything.
        unsafe { pages.bytes(Extent { offset: layout.block_bytes(), bytes: layout.block_bytes() + 1 }) };
    }

    #[test]
    fn a_short_file_is_refused() {
        let layout = layout(2, 4);
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(layout.pool_bytes() as u64 - 1).expect("set length");
        let error = Pages::map(&file, layout).expect_err("too short").to_string();
        assert!(error.starts_with("map page pool of 3072 bytes: the pool file has 3071 bytes"), "{error}");
    }
}
