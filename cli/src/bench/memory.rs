//! Memory of another process, as Linux counts it.

use anyhow::Context;
use std::fs;

/// Resident bytes of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resident {
    pub(super) now: u64,
    /// The most since it began.
    pub(super) peak: u64,
}

/// Returns what process `id` holds.
///
/// # Errors
/// Where there is no `/proc/ID/status`: on other systems than Linux, or when the process is gone.
pub(super) fn of(id: u32) -> anyhow::Result<Resident> {
    let path = format!("/proc/{id}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|number| number.parse().ok());
        kilobytes.map(|kilobytes: u64| kilobytes << 10).with_context(|| format!("find {name} in {path}"))
    };
    Ok(Resident { now: field("VmRSS:")?, peak: field("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_holds_something() {
        let held = super::of(std::process::id()).expect("Linux says");
        assert!(held.now > 1 << 20 && held.peak >= held.now, "{held:?}");
    }
}
