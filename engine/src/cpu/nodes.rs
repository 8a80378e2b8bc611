//! Memory nodes: which cores have which memory beside them.
//!
//! A machine with several sockets reads the memory of another socket at a fraction of the speed of its own. Weights are what a
//! step reads, and which part of them a thread reads is ours to say. So everything that comes in a row (the panels of a matrix, the
//! tasks of a job, the threads of a pool) is cut in one way, into a contiguous share for each node that is as large as the node has
//! cores: a thread packs panels of its node's share, so that the system puts them into its node's memory, and takes tasks of
//! its node's share before it helps the others.
//!
//! With one node there is one share, and nobody is told where to run. This has been tried with made-up nodes only: no machine with
//! two was at hand.

use std::{ops::Range, sync::OnceLock};

/// The cores of each memory node that this process may use; at least one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nodes {
    cores: Vec<Vec<usize>>,
}

impl Nodes {
    /// Returns a machine whose memory is all alike.
    pub(crate) fn one() -> Self {
        Self { cores: vec![Vec::new()] }
    }

    /// Returns this machine's nodes, read once.
    pub(crate) fn machine() -> &'static Self {
        static NODES: OnceLock<Nodes> = OnceLock::new();
        NODES.get_or_init(|| Self::from_lists(&system::core_lists(), &system::allowed_cores()))
    }

    /// Makes nodes of the system's lists of their cores (`0-3,8-11`), of which those in `allowed` count. Nodes without cores,
    /// which are memory only, are left out.
    fn from_lists(lists: &[String], allowed: &[usize]) -> Self {
        let list = |list: &String| {
            let cores = cores_of(list)?;
            Some(allowed.iter().copied().filter(|core| cores.iter().any(|range| range.contains(core))).collect())
        };
        let Some(mut cores) = lists.iter().map(list).collect::<Option<Vec<Vec<usize>>>>() else { return Self::one() };
        cores.retain(|cores| !cores.is_empty());
        if cores.len() > 1 { Self { cores } } else { Self::one() }
    }

    /// Returns how many there are.
    pub(crate) fn count(&self) -> usize {
        self.cores.len()
    }

    /// Returns the share of node `node` in `items` things that come in a row.
    pub(crate) fn share(&self, node: usize, items: usize) -> Range<usize> {
        if self.cores.len() == 1 {
            return 0..items;
        }
        let cores = |nodes: &[Vec<usize>]| nodes.iter().map(Vec::len).sum::<usize>();
        let all = cores(&self.cores);
        let start = cores(&self.cores[..node]);
        items * start / all..items * (start + self.cores[node].len()) / all
    }

    /// Returns the node of thread `thread` among `threads`.
    pub(crate) fn of_thread(&self, thread: usize, threads: usize) -> usize {
        (0..self.count()).find(|&node| self.share(node, threads).contains(&thread)).unwrap_or(0)
    }

    /// Keeps the calling thread, and those it starts, on the cores of its node: any of them, for the system knows best which is
    /// free. Where there is one node, or the system refuses, threads run where they run.
    pub(crate) fn stay(&self, thread: usize, threads: usize) {
        if self.count() > 1 {
            system::stay_on(&self.cores[self.of_thread(thread, threads)]);
        }
    }
}

/// Reads a list of cores as the kernel writes it: numbers and ranges, both ends included; `None` for anything else.
fn cores_of(list: &str) -> Option<Vec<Range<usize>>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse().ok()?, last.parse::<usize>().ok()?);
        (first <= last).then(|| first..last.saturating_add(1))
    };
    list.trim().split(',').filter(|part| !part.is_empty()).map(range).collect()
}

#[cfg(target_os = "linux")]
mod system {
    /// Returns the list of cores of each node, in the order of their numbers.
    pub(super) fn core_lists() -> Vec<String> {
        let Ok(entries) = std::fs::read_dir("/sys/devices/system/node") else { return Vec::new() };
        let number = |entry: std::fs::DirEntry| {
            let number: usize = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some((number, std::fs::read_to_string(entry.path().join("cpulist")).ok()?))
        };
        let mut nodes: Vec<(usize, String)> = entries.flatten().filter_map(number).collect();
        nodes.sort();
        nodes.into_iter().map(|(_, list)| list).collect()
    }

    /// Returns the cores that this process may use; none when there are more than the system's set holds.
    pub(super) fn allowed_cores() -> Vec<usize> {
        let mut set = empty_set();
        // SAFETY: the set is valid for as many bytes as are named, and core numbers stay below its size.
        unsafe {
            if libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) != 0 {
                return Vec::new();
            }
            (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
        }
    }

    /// Keeps the calling thread on `cores`, which came from [`allowed_cores`].
    pub(super) fn stay_on(cores: &[usize]) {
        let mut set = empty_set();
        // SAFETY: as above. That the system refuses costs speed alone.
        unsafe {
            cores.iter().for_each(|core| libc::CPU_SET(*core, &mut set));
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
        }
    }

    fn empty_set() -> libc::cpu_set_t {
        // SAFETY: a set is an array of bits, and none of them set is an empty one.
        unsafe { std::mem::zeroed() }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn core_lists() -> Vec<String> {
        Vec::new()
    }

    pub(super) fn allowed_cores() -> Vec<usize> {
        Vec::new()
    }

    pub(super) fn stay_on(_: &[usize]) {}
}

/// Two nodes of equal size that share the cores of this machine: everything but their effect on speed can be seen on it.
#[cfg(test)]
pub(crate) fn made_up() -> Nodes {
    let cores = system::allowed_cores();
    Nodes { cores: vec![cores.clone(), cores] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(lists: &[&str], allowed: &[usize]) -> Vec<Vec<usize>> {
        Nodes::from_lists(&lists.iter().map(ToString::to_string).collect::<Vec<_>>(), allowed).cores
    }

    #[test]
    fn nodes_are_what_the_system_says_and_the_process_may_use() {
        let one = Nodes::one().cores;
        let all: Vec<usize> = (0..16).collect();
        let check = |lists: &[&str], allowed: &[usize], expected: &[&[usize]]| {
            assert_eq!(nodes(lists, allowed), expected, "{lists:?} {allowed:?}");
        };
        check(&["0-3,8-9\n", "4-7,10\n"], &all, &[&[0, 1, 2, 3, 8, 9], &[4, 5, 6, 7, 10]]);
        check(&["0-3\n", "4-7\n", "\n"], &all, &[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
        check(&["0-3\n", "4-7\n"], &[2, 3, 4], &[&[2, 3], &[4]]);
        check(&["0,2,4", "1,3,5"], &all, &[&[0, 2, 4], &[1, 3, 5]]);
        for (lists, allowed) in [
            (&["0-15\n"][..], &all[..]),
            (&[], &all),
            (&["0-7", "8-15"], &[]),
            (&["0-7", "8-15"], &[1, 2]),
            (&["0-7", "8-"], &all),
            (&["7-0", "8-15"], &all),
            (&["0-7", "x"], &all),
            (&["0-7", "99999999999999999999999"], &all),
        ] {
            assert_eq!(nodes(lists, allowed), one, "{lists:?} {allowed:?}");
        }
    }

    #[test]
    fn shares_cover_everything_in_order_and_follow_the_cores() {
        let uneven = Nodes { cores: vec![vec![0, 1, 2], vec![3], vec![4, 5]] };
        for nodes in [Nodes::one(), uneven.clone(), made_up()] {
            for items in [0, 1, 2, 5, 6, 1000] {
                let mut end = 0;
                for node in 0..nodes.count() {
                    let share = nodes.share(node, items);
                    assert_eq!(share.start, end, "{nodes:?} {items}");
                    end = share.end;
                }
                assert_eq!(end, items, "{nodes:?}");
                (0..items).for_each(|thread| {
                    assert!(nodes.share(nodes.of_thread(thread, items), items).contains(&thread));
                });
            }
        }
        assert_eq!((0..3).map(|node| uneven.share(node, 12)).collect::<Vec<_>>(), [0..6, 6..8, 8..12]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_stays_on_its_nodes_cores() {
        let allowed = system::allowed_cores();
        let nodes = Nodes { cores: allowed.iter().map(|core| vec![*core]).collect() };
        for thread in 0..allowed.len() {
            let nodes = nodes.clone();
            let threads = allowed.len();
            let seen = std::thread::spawn(move || {
                nodes.stay(thread, threads);
                system::allowed_cores()
            });
            let expected = if threads > 1 { vec![allowed[thread]] } else { allowed.clone() };
            assert_eq!(seen.join().expect("a thread"), expected);
        }
        assert_eq!(system::allowed_cores(), allowed, "the caller's are as they were");
    }
}
