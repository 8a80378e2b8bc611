//! The bytes of the pages.

use crate::Error;
use kv_cache::PageLayout;
use std::fs::File;

/// The page pool of one worker: anonymous shared memory (a memfd on Linux, an unlinked temporary file elsewhere), mapped.
///
/// It is a file so that a transport can map the same bytes by itself, in this process or another, without the two crates
/// sharing a pointer.
#[derive(Debug)]
pub struct KvMemory {
    layout: PageLayout,
    file: File,
}

impl KvMemory {
    /// Reserves memory for `layout`, zero-filled.
    pub fn new(_layout: PageLayout) -> Result<Self, Error> {
        todo!()
    }

    /// Returns where each page's bytes lie.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Returns the file that is mapped, [`PageLayout::pool_bytes`] long.
    pub fn file(&self) -> &File {
        &self.file
    }
}
