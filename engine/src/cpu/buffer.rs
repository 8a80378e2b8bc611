//! Memory for kernels: zeroed, aligned, taken from the system when first touched.
//!
//! In unit tests every buffer ends at a page that cannot be touched, so a kernel that reads or writes past its buffer ends the
//! test instead of passing by luck.

use crate::Error;
use memmap2::{Advice, MmapMut};

/// A vector register of the widest kernel, and a cache line.
const ALIGN: usize = 64;
/// A huge page; buffers of several of them start on one so that streaming them costs few table walks.
const HUGE: usize = 2 << 20;

/// Bytes that live as long as their owner.
#[derive(Debug)]
pub(crate) struct Buffer {
    map: MmapMut,
    offset: usize,
    len: usize,
}

impl Buffer {
    /// Reserves `len` zero bytes, rounded up to whole cache lines.
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        let len = len.max(1).next_multiple_of(ALIGN);
        Self::map(len).map_err(Error::system("reserve memory for the model"))
    }

    #[cfg(not(test))]
    fn map(len: usize) -> std::io::Result<Self> {
        if len < 2 * HUGE {
            return Ok(Self { map: MmapMut::map_anon(len)?, offset: 0, len });
        }
        let map = MmapMut::map_anon(len + HUGE)?;
        let offset = map.as_ptr().align_offset(HUGE);
        // Fewer table walks is all that is lost when the system has no huge pages to give.
        #[cfg(target_os = "linux")]
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map, offset, len })
    }

    #[cfg(test)]
    fn map(len: usize) -> std::io::Result<Self> {
        const PAGE: usize = 64 << 10;
        let _ = (HUGE, Advice::Normal);
        let mut map = MmapMut::map_anon(len.next_multiple_of(PAGE) + PAGE)?;
        let end = map.len() - PAGE;
        // SAFETY: the last PAGE bytes belong to this map, start on a page of the system and are never part of the buffer.
        let status = unsafe { libc::mprotect(map.as_mut_ptr().add(end).cast(), PAGE, libc::PROT_NONE) };
        assert_eq!(status, 0, "protecting the guard page");
        Ok(Self { map, offset: end - len, len })
    }

    /// Returns the length in bytes, a multiple of 64.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the first byte, aligned to 64.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.map[self.offset..].as_ptr()
    }

    /// Returns the first byte for writing, aligned to 64.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.map[self.offset..].as_mut_ptr()
    }

    /// Returns the bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map[self.offset..][..self.len]
    }

    /// Returns the bytes for writing.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.offset..][..self.len]
    }

    /// Returns the contents as f32.
    pub(crate) fn floats(&self) -> &[f32] {
        // SAFETY: the buffer is aligned to 64, holds len bytes that are initialised, and every pattern is an f32.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len / 4) }
    }

    /// Returns the contents as f32 for writing.
    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as for `floats`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len / 4) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_whole_lines() {
        for len in [1, 64, 65, 5 << 20] {
            let mut buffer = Buffer::new(len).expect("a buffer");
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            assert_eq!(buffer.len(), len.next_multiple_of(ALIGN));
            assert!(buffer.floats().iter().all(|value| *value == 0.0));
            let last = buffer.floats().len() - 1;
            buffer.floats_mut()[last] = 1.0;
            assert_eq!(buffer.bytes_mut().last(), Some(&0x3f));
        }
    }
}
