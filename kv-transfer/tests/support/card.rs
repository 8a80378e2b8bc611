//! A card, played by memory beside the pool's file: what is there is reached as a driver would, and nothing else gets there.

use kv_cache::{Backing, Extent, PoolCopy, Reach};
use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::Arc,
};

/// The pages of one worker.
#[derive(Debug)]
pub(crate) struct Card {
    /// What passes through the host.
    pub(crate) pool: File,
    pub(crate) memory: File,
}

fn copy((from, at): (&File, usize), (to, place): (&File, usize), bytes: usize) -> Result<(), String> {
    let copied = || -> io::Result<()> {
        let mut block = vec![0; bytes];
        from.read_exact_at(&mut block, at as u64)?;
        to.write_all_at(&block, place as u64)
    };
    copied().map_err(|error| error.to_string())
}

impl Backing for Card {
    fn fetch(&self, extents: &[Extent]) -> Result<(), String> {
        let (memory, pool) = (&self.memory, &self.pool);
        extents.iter().try_for_each(|extent| copy((memory, extent.offset), (pool, extent.offset), extent.bytes))
    }

    fn store(&self, extents: &[Extent]) -> Result<(), String> {
        let (memory, pool) = (&self.memory, &self.pool);
        extents.iter().try_for_each(|extent| copy((pool, extent.offset), (memory, extent.offset), extent.bytes))
    }

    fn share(&self) -> Result<String, String> {
        Ok(format!("/proc/{}/fd/{}", std::process::id(), self.memory.as_raw_fd()))
    }

    fn reach(&self, shared: &str) -> Result<Arc<dyn Reach>, String> {
        let from = self.memory.try_clone().map_err(|error| error.to_string())?;
        let to = File::options().write(true).open(shared).map_err(|error| format!("{shared}: {error}"))?;
        Ok(Arc::new(Reached { from, to }))
    }
}

#[derive(Debug)]
struct Reached {
    from: File,
    to: File,
}

impl Reach for Reached {
    fn write(&self, copies: &[PoolCopy]) -> Result<(), String> {
        copies.iter().try_for_each(|it| copy((&self.from, it.source), (&self.to, it.target), it.bytes))
    }
}
