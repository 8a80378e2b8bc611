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
    Ok(Survey { version, library, resources: context.resources() })
}
