//! What the tests of this crate share: a small layout, a pool file, and its bytes.

use crate::{
    Identity, Rank,
    auth::{ClusterKey, LinkKey},
};
use kv_cache::{KvDtype, PageLayout};
use std::{fs::File, os::unix::fs::FileExt, sync::LazyLock};

/// A layout with blocks of 384 bytes.
pub(crate) fn layout(layers: u32, pages: u32) -> PageLayout {
    PageLayout { layers, page_tokens: 16, kv_heads: 1, key_dim: 8, value_dim: 4, dtype: KvDtype::Bf16, pages }
}

/// Worker `worker` with a pool of `pages` pages in three layers.
pub(crate) fn identity(worker: &str, pages: u32) -> Identity {
    Identity {
        worker: worker.into(),
        incarnation: 1_000,
        fingerprint: "weights".into(),
        layout: layout(3, pages),
        rank: Rank::default(),
    }
}

/// A zero-filled pool file.
pub(crate) fn pool(layout: &PageLayout) -> File {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(layout.pool_bytes() as u64).expect("set length");
    file
}

/// A zero-filled pool that processes can share.
#[cfg(target_os = "linux")]
pub(crate) fn sealed_pool(layout: &PageLayout) -> File {
    use rustix::fs::SealFlags;
    pool_with_seals(layout.pool_bytes(), SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

/// Memory with these seals.
#[cfg(target_os = "linux")]
pub(crate) fn pool_with_seals(bytes: usize, seals: rustix::fs::SealFlags) -> File {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    let file = File::from(memfd_create("pool", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(bytes as u64).expect("set length");
    fcntl_add_seals(&file, seals).expect("seal");
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

/// The key of a link in a cluster without a token.
pub(crate) fn key() -> &'static LinkKey {
    static KEY: LazyLock<LinkKey> =
        LazyLock::new(|| ClusterKey::read(None).expect("no file to read").link(b"hello", &[7; 32]));
    &KEY
}
