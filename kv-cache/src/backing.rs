//! Pools whose pages are on a card: the seam between who moves pages and who has them.

use std::{fmt::Debug, sync::Arc};

/// Bytes of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the pool, in bytes, as [`PageLayout::block_offset`](crate::PageLayout::block_offset) counts.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// A copy from one pool into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolCopy {
    /// Offset in the source's pool, in bytes.
    pub source: usize,
    /// Offset in the target's pool, in bytes.
    pub target: usize,
    /// Length in bytes.
    pub bytes: usize,
}

impl PoolCopy {
    /// Returns the bytes that are read.
    pub fn from(&self) -> Extent {
        Extent { offset: self.source, bytes: self.bytes }
    }

    /// Returns the bytes that are written.
    pub fn to(&self) -> Extent {
        Extent { offset: self.target, bytes: self.bytes }
    }
}

/// Where a pool's pages are, if not in its file: on cards. The file has the pool's shape all the same, and holds what passes through the host.
/// Offsets are those in the file, wherever a card has these bytes.
///
/// Methods wait until what they are asked for is done. Errors are for people; after one the cards are broken or gone.
pub trait Backing: Debug + Send + Sync {
    /// Copies `extents` to the file.
    ///
    /// # Errors
    /// What the card said.
    fn fetch(&self, extents: &[Extent]) -> Result<(), String>;

    /// Copies `extents` from the file.
    ///
    /// # Errors
    /// What the card said.
    fn store(&self, extents: &[Extent]) -> Result<(), String>;

    /// Returns what others of this host need to reach the pages, without line breaks, in some hundred bytes for each card.
    ///
    /// # Errors
    /// Why nobody can.
    fn share(&self) -> Result<String, String>;

    /// Finds the pages of which another's [`Backing::share`] told.
    ///
    /// # Errors
    /// Why they cannot be reached from here.
    fn reach(&self, shared: &str) -> Result<Arc<dyn Reach>, String>;
}

/// Another's pages on cards, for as long as this lives.
pub trait Reach: Debug + Send + Sync {
    /// Copies from the pages of the one that reaches to these.
    ///
    /// # Errors
    /// What the card said.
    fn write(&self, copies: &[PoolCopy]) -> Result<(), String>;
}
