//! What follows from facts and measurements: for each path a state and one sentence. Pure.

use super::{
    facts::{Device, Facts, Port},
    measure::Measured,
};
use crate::settings::Bytes;
use kv_transfer::TransportKind;
use serde::Serialize;
use std::fmt;

/// Smallest packet of a RoCE interface that carries RDMA frames of 4 KiB, the largest there are.
const FULL_MTU: u32 = 4200;

/// A way between two members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Path {
    Shm,
    Ucx,
    Tcp,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Shm => "shm",
            Self::Ucx => "ucx",
            Self::Tcp => "tcp",
        })
    }
}

/// How a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Health {
    /// As it should be.
    Good,
    /// Works, and could be better.
    Poor,
    /// Does not work here.
    Unusable,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "good",
            Self::Poor => "poor",
            Self::Unusable => "unusable",
        })
    }
}

/// What is to be said of a path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Finding {
    pub(super) path: Path,
    pub(super) health: Health,
    /// As measured.
    pub(super) gb_per_s: Option<f64>,
    /// Of a hand-off of 16 MiB, as measured.
    pub(super) milliseconds: Option<f64>,
    /// What is wrong, and what is used.
    pub(super) says: String,
}

/// Says how each path is. `elsewhere`: the other end was on another host.
pub(super) fn of(facts: &Facts, measured: &[Measured], elsewhere: bool) -> Vec<Finding> {
    let works = |kind| measured.iter().any(|one| one.kind == kind && one.result.is_ok());
    // What members take by themselves, between two processes of a host and between two hosts.
    let rdma = rdma_problem(facts).is_none();
    let here = if works(TransportKind::Shm) && !elsewhere { Path::Shm } else { Path::Tcp };
    let there = if rdma && works(TransportKind::Ucx) { Path::Ucx } else { Path::Tcp };
    let finding = |path, kind| {
        let one = measured.iter().find(|one| one.kind == kind);
        let timing = one.and_then(|one| one.result.as_ref().ok());
        let problem = one.and_then(|one| one.result.as_ref().err()).cloned();
        let (health, says) = match path {
            Path::Shm => shm(elsewhere, problem, here),
            Path::Ucx => ucx(facts, problem, there),
            Path::Tcp => tcp(problem, here, there),
        };
        let (gb_per_s, milliseconds) = (timing.map(|it| it.gb_per_s), timing.map(|it| it.milliseconds));
        Finding { path, health, gb_per_s, milliseconds, says }
    };
    vec![
        finding(Path::Shm, TransportKind::Shm),
        finding(Path::Ucx, TransportKind::Ucx),
        finding(Path::Tcp, TransportKind::Tcp),
    ]
}

fn shm(elsewhere: bool, problem: Option<String>, here: Path) -> (Health, String) {
    match problem {
        None => (Health::Good, "used between members of one host".into()),
        Some(_) if elsewhere => (Health::Unusable, "the other end is on another host".into()),
        Some(problem) => (Health::Unusable, format!("{problem}; {here} is used between members of one host")),
    }
}

fn ucx(facts: &Facts, problem: Option<String>, there: Path) -> (Health, String) {
    let rdma = rdma_problem(facts);
    match (&facts.ucx, problem, rdma) {
        (Err(_), _, Some(reason)) => (Health::Unusable, format!("{reason}; {there} is used between hosts")),
        (_, Some(problem), reason) => {
            let reason = reason.map_or(problem.clone(), |reason| format!("{reason} ({})", sentence(&problem)));
            (Health::Unusable, format!("{reason}; {there} is used between hosts"))
        }
        (_, None, Some(reason)) => (Health::Poor, format!("{reason}; {there} is used between hosts")),
        (_, None, None) => match slow(facts) {
            Some(reason) => (Health::Poor, format!("{reason}; used between hosts")),
            None => (Health::Good, "used between hosts".into()),
        },
    }
}

fn tcp(problem: Option<String>, here: Path, there: Path) -> (Health, String) {
    let says = match problem {
        Some(problem) => return (Health::Unusable, problem),
        None if here == Path::Tcp && there == Path::Tcp => "used everywhere",
        None if there == Path::Tcp => "used between hosts",
        None if here == Path::Tcp => "used between members of one host",
        None => "used where nothing better is",
    };
    (Health::Good, says.into())
}

/// Takes the last full stop off.
fn sentence(text: &str) -> &str {
    text.trim_end_matches('.')
}

/// Returns what keeps UCX from RDMA: the first thing to be put right.
fn rdma_problem(facts: &Facts) -> Option<String> {
    let ucx = match &facts.ucx {
        Ok(ucx) => ucx,
        Err(reason) => return Some(format!("{} (it comes with UCX 1.14 or newer)", sentence(reason))),
    };
    if facts.devices.is_empty() {
        return Some("this host has no RDMA device".into());
    }
    if let Some(reason) = all(&facts.devices, |device| device.closed.clone()) {
        return Some(format!("{reason}: give this process the devices in /dev/infiniband"));
    }
    let ports: Vec<(&Device, &Port)> =
        facts.devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port))).collect();
    let active: Vec<_> = ports.iter().filter(|(_, port)| port.state == "ACTIVE").copied().collect();
    if active.is_empty() {
        let state =
            |(device, port): &(&Device, &Port)| format!("{} port {} is {}", device.name, port.number, port.state);
        let states: Vec<String> = ports.iter().map(state).collect();
        return Some(format!("no port is active: {}", states.join(", ")));
    }
    let nameless = |(device, port): &(&Device, &Port)| {
        let interface = port.interface.as_ref().map_or("its interface", |(name, _)| name);
        (port.gids == 0)
            .then(|| format!("{} port {} has no GID: give {interface} an address", device.name, port.number))
    };
    if let Some(reason) = all(&active, nameless) {
        return Some(reason);
    }
    if let Some(limit) = facts.locked.limit_bytes.filter(|_| !facts.locked.exempt)
        && facts.pool_bytes.is_none_or(|pool| pool > limit)
    {
        let pool =
            facts.pool_bytes.map_or("a larger page pool".into(), |pool| format!("a page pool of {}", Bytes(pool)));
        return Some(format!(
            "locked memory is limited to {}: {pool} cannot be registered (ulimit -l unlimited, or LimitMEMLOCK=infinity)",
            Bytes(limit)
        ));
    }
    if !ucx.has_rdma() {
        let found = ucx.resources.join(" ");
        return Some(format!(
            "UCX finds no RDMA transport among {found}: its module libuct_ib, or UCX_TLS, leaves them out"
        ));
    }
    None
}

/// Returns what makes RDMA slower than it could be.
fn slow(facts: &Facts) -> Option<String> {
    let ports = facts.devices.iter().flat_map(|device| &device.ports).filter(|port| port.state == "ACTIVE");
    let small = ports.filter_map(|port| port.interface.as_ref()).find(|(_, mtu)| *mtu < FULL_MTU);
    small.map(|(interface, mtu)| {
        let carried = (256..=2048).rev().filter(|size: &u32| size.is_power_of_two()).find(|size| size + 100 <= *mtu);
        format!(
            "{interface} has mtu {mtu}, so RDMA frames carry {} bytes of 4096: set {FULL_MTU} or more on every hop",
            carried.unwrap_or(256)
        )
    })
}

/// Returns the first problem, if every one of `things` has one.
fn all<T>(things: &[T], problem: impl Fn(&T) -> Option<String>) -> Option<String> {
    let problems: Option<Vec<String>> = things.iter().map(problem).collect();
    problems.and_then(|problems| problems.into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::{super::facts::Locked, super::measure::Timing, *};
    use kv_transfer::Survey;

    /// A host on which everything is as it should be.
    fn facts() -> Facts {
        let port = Port {
            number: 1,
            state: "ACTIVE".into(),
            rate: "200 Gb/sec (4X HDR)".into(),
            ethernet: true,
            gids: 2,
            interface: Some(("eth2".into(), 9000)),
        };
        let resources = ["self/memory", "tcp/eth2", "rc_mlx5/mlx5_0:1"].map(str::to_owned).to_vec();
        Facts {
            ucx: Ok(Survey { version: (1, 18, 1), library: "libucp.so.0".into(), resources }),
            cards: None,
            devices: vec![Device { name: "mlx5_0".into(), closed: None, ports: vec![port] }],
            locked: Locked { limit_bytes: None, exempt: false },
            pool_bytes: Some(8 << 30),
            huge_pages: "advise".into(),
        }
    }

    fn measured(failed: &[(TransportKind, &str)]) -> Vec<Measured> {
        let result = |kind| match failed.iter().find(|(failed, _)| *failed == kind) {
            Some((_, reason)) => Err((*reason).to_owned()),
            None => Ok(Timing { gb_per_s: 10.0, milliseconds: 1.6 }),
        };
        [TransportKind::Shm, TransportKind::Ucx, TransportKind::Tcp]
            .map(|kind| Measured { kind, result: result(kind) })
            .to_vec()
    }

    fn check(change: impl FnOnce(&mut Facts), failed: &[(TransportKind, &str)], expected: [(Health, &str); 3]) {
        let mut facts = facts();
        change(&mut facts);
        let found = of(&facts, &measured(failed), false);
        for (finding, (health, says)) in found.iter().zip(expected) {
            assert_eq!((finding.says.as_str(), finding.health), (says, health), "{}", finding.path);
        }
    }

    const SHM: (Health, &str) = (Health::Good, "used between members of one host");
    const TCP: (Health, &str) = (Health::Good, "used between hosts");

    fn check_ucx(change: impl FnOnce(&mut Facts), says: &str) {
        check(change, &[], [SHM, (Health::Poor, &format!("{says}; tcp is used between hosts")), TCP]);
    }

    #[test]
    fn all_is_well() {
        let rest = (Health::Good, "used where nothing better is");
        check(|_| (), &[], [SHM, (Health::Good, "used between hosts"), rest]);
    }

    #[test]
    fn a_missing_library_is_named() {
        let missing = "libucp.so.0 cannot be loaded: No such file";
        let says = format!("{missing} (it comes with UCX 1.14 or newer); tcp is used between hosts");
        check(
            |facts| facts.ucx = Err(missing.into()),
            &[(TransportKind::Ucx, missing)],
            [SHM, (Health::Unusable, &says), TCP],
        );
        let old = "libucp.so.0 is version 1.13.1, at least 1.14 is needed";
        let says = format!("{old} (it comes with UCX 1.14 or newer); tcp is used between hosts");
        check(|facts| facts.ucx = Err(old.into()), &[(TransportKind::Ucx, old)], [SHM, (Health::Unusable, &says), TCP]);
    }

    #[test]
    fn what_keeps_from_rdma_is_named() {
        check_ucx(|facts| facts.devices.clear(), "this host has no RDMA device");
        check_ucx(
            |facts| facts.devices[0].closed = Some("/dev/infiniband/uverbs0: Permission denied".into()),
            "/dev/infiniband/uverbs0: Permission denied: give this process the devices in /dev/infiniband",
        );
        check_ucx(|facts| facts.devices[0].ports[0].state = "DOWN".into(), "no port is active: mlx5_0 port 1 is DOWN");
        check_ucx(|facts| facts.devices[0].ports[0].gids = 0, "mlx5_0 port 1 has no GID: give eth2 an address");
        check_ucx(
            |facts| facts.locked.limit_bytes = Some(8 << 20),
            "locked memory is limited to 8 MiB: a page pool of 8 GiB cannot be registered \
             (ulimit -l unlimited, or LimitMEMLOCK=infinity)",
        );
        check_ucx(
            |facts| {
                if let Ok(ucx) = &mut facts.ucx {
                    ucx.resources.pop();
                }
            },
            "UCX finds no RDMA transport among self/memory tcp/eth2: its module libuct_ib, or UCX_TLS, leaves them out",
        );
    }

    #[test]
    fn limits_that_do_not_bind_are_no_problem() {
        let rest = (Health::Good, "used where nothing better is");
        let good = [SHM, (Health::Good, "used between hosts"), rest];
        check(|facts| facts.locked = Locked { limit_bytes: Some(8 << 20), exempt: true }, &[], good);
        check(|facts| facts.locked.limit_bytes = Some(16 << 30), &[], good);
    }

    #[test]
    fn one_good_port_is_enough() {
        let rest = (Health::Good, "used where nothing better is");
        let more = |facts: &mut Facts| {
            let mut device = facts.devices[0].clone();
            device.ports[0].gids = 0;
            facts.devices.insert(0, device.clone());
            device.ports[0].state = "DOWN".into();
            facts.devices.insert(0, device);
        };
        check(more, &[], [SHM, (Health::Good, "used between hosts"), rest]);
    }

    #[test]
    fn a_small_mtu_is_slow() {
        let small = |facts: &mut Facts| facts.devices[0].ports[0].interface = Some(("eth2".into(), 1500));
        let says = "eth2 has mtu 1500, so RDMA frames carry 1024 bytes of 4096: set 4200 or more on every hop; used between hosts";
        check(small, &[], [SHM, (Health::Poor, says), (Health::Good, "used where nothing better is")]);
    }

    #[test]
    fn what_was_measured_counts() {
        let shm = (Health::Unusable, "no memfd; tcp is used between members of one host");
        let ucx = (Health::Unusable, "it hangs; tcp is used between hosts");
        check(
            |_| (),
            &[(TransportKind::Shm, "no memfd"), (TransportKind::Ucx, "it hangs")],
            [shm, ucx, (Health::Good, "used everywhere")],
        );
        let found = of(&facts(), &measured(&[(TransportKind::Shm, "host")]), true);
        assert_eq!((found[0].health, found[0].says.as_str()), (Health::Unusable, "the other end is on another host"));
        check(
            |_| (),
            &[(TransportKind::Tcp, "refused")],
            [SHM, (Health::Good, "used between hosts"), (Health::Unusable, "refused")],
        );
    }
}
