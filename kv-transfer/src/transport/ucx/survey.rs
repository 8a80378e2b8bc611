//! What this host has for transport `ucx`.

use super::{UcxConfig, open};
use serde::Serialize;
use std::{fs, path::Path};

/// Says whether UCX's `transport/device` writes to other hosts' memory without their processors.
pub(super) fn is_rdma(resource: &str) -> bool {
    ["rc_", "dc_", "srd/", "gga_"].iter().any(|prefix| resource.starts_with(prefix))
}

/// Returns the names of InfiniBand and RoCE devices, from `/sys`.
pub(super) fn infiniband_devices(sys: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(sys.join("class/infiniband")) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// UCX as found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// Major, minor, release.
    pub version: (u32, u32, u32),
    /// What was opened.
    pub library: String,
    /// Transports it found, as `transport/device`.
    pub resources: Vec<String>,
}

impl Survey {
    /// Says whether it writes to other hosts' memory without their processors.
    pub fn has_rdma(&self) -> bool {
        self.resources.iter().any(|resource| is_rdma(resource))
    }
}

/// Opens UCX and lists what it finds, or says why there is none.
pub fn survey(config: &UcxConfig) -> Result<Survey, String> {
    let context = open(config)?;
    let (version, library) = (context.api.version(), context.api.path().to_owned());
    let mut resources = context.resources();
    if is_contained(Path::new("/proc")) {
        // Where files have names (see `directory`), UCX connects by it among processes of the host alone.
        resources.retain(|resource| !resource.starts_with("posix/"));
    }
    Ok(Survey { version, library, resources })
}

/// Says whether this process counts processes apart from the host, as a container does.
fn is_contained(proc: &Path) -> bool {
    // `PROC_PID_INIT_INO` of Linux: where the host's begins.
    fs::read_link(proc.join("self/ns/pid")).is_ok_and(|name| name != Path::new("pid:[4026531836]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn containers_count_their_own_processes() {
        let proc = tempfile::tempdir().expect("a directory");
        let space = proc.path().join("self/ns");
        assert!(!is_contained(proc.path()), "unknown");
        fs::create_dir_all(&space).expect("made");
        for (name, contained) in [("pid:[4026531836]", false), ("pid:[4026532201]", true)] {
            symlink(name, space.join("pid")).expect("linked");
            assert_eq!(is_contained(proc.path()), contained, "{name}");
            fs::remove_file(space.join("pid")).expect("removed");
        }
    }
}
