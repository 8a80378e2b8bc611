//! What this host has, read from `/sys`, `/proc` and UCX.

use crate::settings::Bytes;
use engine::cards::{self, Survey as Cards};
use kv_transfer::{Survey, UcxConfig};
use serde::{Serialize, Serializer};
use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

/// Bit of `CAP_IPC_LOCK` among capabilities: locked memory is not limited.
const CAP_IPC_LOCK: u32 = 14;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts {
    /// The library and what it finds, or why it cannot be used.
    #[serde(serialize_with = "found_or_error")]
    pub(super) ucx: Result<Survey, String>,
    /// Cards and what they take; `None` where this binary knows none.
    pub(super) cards: Option<Cards>,
    /// InfiniBand and RoCE devices.
    pub(super) devices: Vec<Device>,
    /// How much memory this process may lock, which registering it does.
    pub(super) locked: Locked,
    /// How large a worker's page pool is to be, if that was said.
    pub(super) pool_bytes: Option<u64>,
    /// What the system does about huge pages in shared memory.
    pub(super) huge_pages: String,
}

/// Writes what was found, or `{"error": why it was not}`.
fn found_or_error<S: Serializer>(found: &Result<Survey, String>, serializer: S) -> Result<S::Ok, S::Error> {
    match found {
        Ok(survey) => survey.serialize(serializer),
        Err(reason) => BTreeMap::from([("error", reason)]).serialize(serializer),
    }
}

/// A device of `/sys/class/infiniband`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Device {
    pub(super) name: String,
    /// Why processes cannot open it.
    pub(super) closed: Option<String>,
    pub(super) ports: Vec<Port>,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Port {
    pub(super) number: u32,
    /// `ACTIVE`, `DOWN` …
    pub(super) state: String,
    pub(super) rate: String,
    /// RoCE, not InfiniBand.
    pub(super) ethernet: bool,
    /// Addresses it has.
    pub(super) gids: usize,
    /// Of the network interface over it: name and largest packet in bytes.
    pub(super) interface: Option<(String, u32)>,
}

/// A limit on locked memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Locked {
    /// `None` = unlimited.
    pub(super) limit_bytes: Option<u64>,
    /// The limit does not bind this process.
    pub(super) exempt: bool,
}

impl Facts {
    /// Reads them from the files under `root`.
    pub(super) fn gather(root: &Path, ucx: &UcxConfig, engine: &engine::Config, pool_bytes: Option<u64>) -> Self {
        let shmem = read(&root.join("sys/kernel/mm/transparent_hugepage/shmem_enabled"));
        Self {
            ucx: kv_transfer::survey(ucx),
            cards: cards::survey(engine),
            devices: devices(root),
            locked: locked(&read(&root.join("proc/self/limits")), &read(&root.join("proc/self/status"))),
            pool_bytes,
            huge_pages: chosen(&shmem),
        }
    }
}

/// Returns what a file says, or nothing.
fn read(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Returns the entries of a folder, by name.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Returns the word in brackets of `always [advise] never`.
fn chosen(text: &str) -> String {
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    word.map_or("unknown", |(word, _)| word).to_owned()
}

fn devices(root: &Path) -> Vec<Device> {
    entries(&root.join("sys/class/infiniband")).iter().map(|device| read_device(root, device)).collect()
}

fn read_device(root: &Path, device: &Path) -> Device {
    let interface = entries(&device.join("device/net")).first().and_then(|interface| {
        let mtu = read(&interface.join("mtu")).parse().ok()?;
        Some((name(interface), mtu))
    });
    let port = |folder: &PathBuf| {
        let gids = entries(&folder.join("gids"));
        let ethernet = read(&folder.join("link_layer")) == "Ethernet";
        Some(Port {
            number: name(folder).parse().ok()?,
            // "4: ACTIVE"
            state: read(&folder.join("state")).rsplit(' ').next().unwrap_or_default().to_owned(),
            rate: read(&folder.join("rate")),
            ethernet,
            gids: gids.iter().filter(|gid| read(gid).chars().any(|digit| !"0:".contains(digit))).count(),
            interface: interface.clone().filter(|_| ethernet),
        })
    };
    Device {
        name: name(device),
        closed: closed(root, device),
        ports: entries(&device.join("ports")).iter().filter_map(port).collect(),
    }
}

/// Returns why the device cannot be opened by this process.
fn closed(root: &Path, device: &Path) -> Option<String> {
    let verbs = entries(&device.join("device/infiniband_verbs")).first().map(|verbs| name(verbs))?;
    let path = Path::new("/dev/infiniband").join(verbs);
    let opened = fs::File::options().read(true).write(true).open(root.join(path.strip_prefix("/").ok()?));
    opened.err().map(|error| format!("{}: {error}", path.display()))
}

/// Reads a limit from `/proc/self/limits` and `/proc/self/status`.
fn locked(limits: &str, status: &str) -> Locked {
    // "Max locked memory         8388608              8388608              bytes"
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let limit = limit.and_then(|rest| rest.split_whitespace().next()).and_then(|limit| limit.parse().ok());
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    Locked { limit_bytes: limit, exempt: capabilities >> CAP_IPC_LOCK & 1 == 1 }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(reason) = &self.closed {
            write!(f, " (closed: {reason})")?;
        }
        for port in &self.ports {
            let Port { number, state, rate, gids, .. } = port;
            let kind = if port.ethernet { "RoCE" } else { "InfiniBand" };
            write!(f, ", port {number}: {kind} {state} {rate}, {gids} GIDs")?;
            if let Some((interface, mtu)) = &port.interface {
                write!(f, ", {interface} mtu {mtu}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Locked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit_bytes {
            None => f.write_str("unlimited"),
            Some(limit) if self.exempt => write!(f, "{} (does not bind this process)", Bytes(limit)),
            Some(limit) => write!(f, "{}", Bytes(limit)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max locked memory         8388608              unlimited            bytes";
        let status = |capabilities: &str| format!("Name:\tbaton\nCapEff:\t{capabilities}\n");
        let check = |limits: &str, capabilities: &str, limit_bytes, exempt| {
            assert_eq!(locked(limits, &status(capabilities)), Locked { limit_bytes, exempt });
        };
        check(limits, "0000000000000000", Some(8 << 20), false);
        check(limits, "000001ffffffffff", Some(8 << 20), true);
        check(&limits.replace("8388608", "unlimited"), "0", None, false);
        check("", "", None, false);
    }

    #[test]
    fn devices_are_read() {
        let root = tempfile::tempdir().expect("temporary folder");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("make");
            fs::write(path, text).expect("write");
        };
        assert_eq!(devices(root.path()), []);
        let device = "sys/class/infiniband/mlx5_0";
        write(&format!("{device}/ports/1/state"), "4: ACTIVE\n");
        write(&format!("{device}/ports/1/rate"), "100 Gb/sec (2X HDR)\n");
        write(&format!("{device}/ports/1/link_layer"), "Ethernet\n");
        write(&format!("{device}/ports/1/gids/0"), "fe80:0000:0000:0000:0000:0000:0000:0001\n");
        write(&format!("{device}/ports/1/gids/1"), "0000:0000:0000:0000:0000:0000:0000:0000\n");
        write(&format!("{device}/device/net/eth2/mtu"), "9000\n");
        write(&format!("{device}/device/infiniband_verbs/uverbs0/dev"), "231:192\n");
        let found = devices(root.path());
        let port = Port {
            number: 1,
            state: "ACTIVE".into(),
            rate: "100 Gb/sec (2X HDR)".into(),
            ethernet: true,
            gids: 1,
            interface: Some(("eth2".into(), 9000)),
        };
        assert_eq!(found[0].ports, [port]);
        assert!(
            found[0].closed.as_ref().is_some_and(|reason| reason.starts_with("/dev/infiniband/uverbs0: No such file"))
        );
        write("dev/infiniband/uverbs0", "");
        assert_eq!(devices(root.path())[0].closed, None);
    }

    #[test]
    fn programs_read_what_is_wrong() {
        let facts = Facts {
            ucx: Err("libucp.so.0 cannot be loaded".into()),
            cards: None,
            devices: Vec::new(),
            locked: Locked { limit_bytes: None, exempt: false },
            pool_bytes: None,
            huge_pages: "never".into(),
        };
        let json = serde_json::to_value(&facts).expect("JSON");
        assert_eq!(json["ucx"]["error"], "libucp.so.0 cannot be loaded");
        let survey = Survey { version: (1, 18, 1), library: "libucp.so.0".into(), resources: Vec::new() };
        let json = serde_json::to_value(Facts { ucx: Ok(survey), ..facts }).expect("JSON");
        assert_eq!(json["ucx"]["version"], serde_json::json!([1, 18, 1]));
    }

    #[test]
    fn the_choice_is_in_brackets() {
        assert_eq!(chosen("always within_size [advise] never"), "advise");
        assert_eq!(chosen(""), "unknown");
    }
}
