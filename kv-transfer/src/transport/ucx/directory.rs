//! Where UCX's `posix` keeps its files: by names of their own, in a directory per context.
//!
//! By default it unlinks each file and tells peers `/proc/PID/fd/N` (`POSIX_USE_PROC_LINK`). Of a worker that was destroyed since, `N` may
//! be any other file of that process, which a peer that is about to connect then maps and writes. A name is gone with its file, and
//! is never another's.
//!
//! But names stay behind when a process is killed. Each directory is locked for as long as its process lives, so whoever opens UCX
//! next knows what nobody uses any more, and removes it.

use rand::random;
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// Memory that is files. UCX's own queues take some megabytes of it for a link.
const SHARED_MEMORY: &str = "/dev/shm";
/// How the directories' names begin. All are of one length: UCX takes a peer's to be as long as its own.
const PREFIX: &str = "baton-ucx-";

/// A context's directory. Dropping it removes it with all that is left there.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Locked.
    _file: File,
}

impl Directory {
    /// Makes one, and removes those of dead processes.
    pub(super) fn new() -> Result<Self, String> {
        Self::inside(Path::new(SHARED_MEMORY))
            .map_err(|error| format!("a directory for UCX in {SHARED_MEMORY}: {error}"))
    }

    fn inside(parent: &Path) -> io::Result<Self> {
        sweep(parent)?;
        loop {
            let path = parent.join(format!("{PREFIX}{:016x}", random::<u64>()));
            DirBuilder::new().mode(0o700).create(&path)?;
            // Somebody else's sweep may come first, and takes it for a dead process's.
            match File::open(&path) {
                Ok(file) if file.try_lock().is_ok() && path.exists() => return Ok(Self { path, _file: file }),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }

    /// Returns its path.
    pub(super) fn path(&self) -> &str {
        self.path.to_str().expect("made of text")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes the directories that nobody has locked.
fn sweep(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // What another user's process made cannot be opened, and is left to that user.
        if let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            remove(&entry.path());
        }
    }
    Ok(())
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        tracing::debug!(%error, path = %path.display(), "remove UCX's directory");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(parent: &Path) -> Vec<PathBuf> {
        fs::read_dir(parent).expect("read").map(|entry| entry.expect("an entry").path()).collect()
    }

    #[test]
    fn what_the_dead_left_is_removed_and_nothing_else() {
        let parent = tempfile::tempdir().expect("a directory");
        let ours = Directory::inside(parent.path()).expect("made");
        fs::write(ours.path.join("ucx_shm_posix_2a"), "queue").expect("written");
        // What a killed process leaves is not locked.
        let dead = parent.path().join(format!("{PREFIX}{:016x}", 7));
        fs::create_dir(&dead).expect("made");
        fs::write(dead.join("ucx_shm_posix_2b"), "queue").expect("written");
        let foreign = parent.path().join("somebody-else");
        fs::create_dir(&foreign).expect("made");

        let second = Directory::inside(parent.path()).expect("made");
        assert!(!dead.exists());
        assert!(foreign.exists() && ours.path.join("ucx_shm_posix_2a").exists());
        assert_eq!(ours.path().len(), second.path().len());
        drop((ours, second));
        assert_eq!(entries(parent.path()), [foreign]);
    }

    /// Many processes that start at once sweep each other's new directories, and each ends up with one.
    #[test]
    fn sweeps_leave_what_is_being_made() {
        let parent = tempfile::tempdir().expect("a directory");
        let make = || (0..50).map(|_| Directory::inside(parent.path()).expect("made")).collect::<Vec<_>>();
        let made: Vec<_> = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
            makers.into_iter().flat_map(|maker| maker.join().expect("no panic")).collect()
        });
        assert!(made.iter().all(|directory| directory.path.exists()));
        assert_eq!(entries(parent.path()).len(), made.len());
    }
}
