//! A page pool that UCX allocates.
//!
//! Over RDMA any memory can be written once it is registered. UCX's shared memory transport (`posix`) writes by itself only into
//! memory that UCX allocated; into any other it sends messages that the target copies out of. Its memory is a file like any
//! other pool, whose name the system knows.

use super::{
    UcxConfig,
    handles::{Context, Memory},
    maps::Region,
    open,
};
use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Pools of this process, by the file.
static POOLS: Mutex<Vec<(FileId, Weak<Allocated>)>> = Mutex::new(Vec::new());

/// Inode and length: devices of anonymous files have no number that `/proc` and `stat` agree on.
type FileId = (u64, u64);

#[derive(Debug)]
pub(super) struct Allocated {
    pub(super) memory: Memory,
    pub(super) context: Arc<Context>,
}

/// A page pool that UCX allocated, for [`Transfer::start`](crate::Transfer::start) with transport `ucx` on one host.
#[derive(Debug)]
pub struct UcxMemory {
    file: File,
    _pool: Arc<Allocated>,
}

impl UcxMemory {
    /// Allocates `bytes` of zeros with the transports of `config`, or says why that cannot be.
    pub fn new(config: &UcxConfig, bytes: usize) -> Result<Self, String> {
        let context = open(config)?;
        let memory = Memory::allocate(&context, bytes)?;
        let file =
            file_at(memory.address()).ok_or("UCX allocated memory that is no file: it has no transport `posix`")?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        if length < bytes as u64 {
            return Err(format!("UCX allocated a file of {length} bytes for {bytes}"));
        }
        let pool = Arc::new(Allocated { memory, context });
        let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|(_, pool)| pool.strong_count() > 0);
        pools.push((id(&file).ok_or("the pool's file cannot be named")?, Arc::downgrade(&pool)));
        Ok(Self { file, _pool: pool })
    }

    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn id(file: &File) -> Option<FileId> {
    file.metadata().ok().map(|metadata| (metadata.ino(), metadata.len()))
}

/// Returns the pool in `file`, if UCX allocated it.
pub(super) fn find(file: FileId) -> Option<Arc<Allocated>> {
    let pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.iter().find(|(id, _)| *id == file).and_then(|(_, pool)| pool.upgrade())
}

/// Names a pool's file for [`find`].
pub(super) fn name(file: &File) -> FileId {
    id(file).unwrap_or_default()
}

/// Returns the file that is mapped at `address`, opened again.
fn file_at(address: usize) -> Option<File> {
    File::options().read(true).write(true).open(Region::at(address)?.path).ok()
}
