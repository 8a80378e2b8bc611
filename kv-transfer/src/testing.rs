//! What the tests of this crate share: a small layout, a pool file, and its bytes.

use crate::Identity;
use kv_cache::{KvDtype, PageLayout};
use std::{fs::File, os::unix::fs::FileExt};

/// A layout with blocks of 384 bytes.
pub(crate) fn layout(layers: u32, pages: u32) -> PageLayout {
    PageLayout { layers, page_tokens: 16, kv_heads: 1, key_dim: 8, value_dim: 4, dtype: KvDtype::Bf16, pages }
}

/// Worker `worker` with a pool of `pages` pages in three layers.
pub(crate) fn identity(worker: &str, pages: u32) -> Identity {
    Identity { worker: worker.into(), incarnation: 1_000, fingerprint: "weights".into(), layout: layout(3, pages) }
}

/// A zero-filled pool file.
pub(crate) fn pool(layout: &PageLayout) -> File {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(layout.pool_bytes() as u64).expect("set length");
    file
}

/// Writes `bytes` over the whole pool.
pub(crate) fn fill(file: &File, bytes: &[u8]) {
    file.write_all_at(bytes, 0).expect("write pool");
}

/// Returns the bytes of the whole pool.
pub(crate) fn contents(file: &File, layout: &PageLayout) -> Vec<u8> {
    let mut bytes = vec![0; layout.pool_bytes()];
    file.read_exact_at(&mut bytes, 0).expect("read pool");
    bytes
}
