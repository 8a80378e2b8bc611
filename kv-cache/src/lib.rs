//! Pages as bookkeeping.
//!
//! Owns the names of pages and prefixes, the shape of a page in bytes, how values become elements of one byte, and which page is
//! free, held or cached. It knows no device, no clock and no I/O: whoever owns the bytes ([`PageLayout`] says where they lie)
//! asks a [`PagePool`] which of them to use. Everything here is a decision, so everything here can be simulated.
#![forbid(unsafe_code)]

mod backing;
mod byte_code;
mod hash;
mod layout;
mod pool;

pub use backing::{Backing, Extent, PoolCopy, Reach};
pub use byte_code::ByteCode;
pub use hash::{PageHash, PrefixHasher, page_hashes, root_salt};
pub use layout::{KvDtype, PageLayout, Plane};
pub use pool::{CacheDelta, PagePool, PoolStats};

use serde::{Deserialize, Serialize};

/// A token's number in the model's vocabulary.
pub type TokenId = u32;

/// Index of a page in its worker's pool; the page's bytes for layer `l` are at [`PageLayout::block_offset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageId(pub u32);

impl PageId {
    /// Returns the page as an index into per-page tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
