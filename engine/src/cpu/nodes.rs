//! Memory nodes: which cores have which memory beside them.
//!
//! A machine with several sockets reads the memory of another socket at a fraction of the speed of its own. Weights are what a
//! step reads, and which part of them a thread reads is ours to say. So everything that comes in a row (the panels of a matrix, the
//! tasks of a job, the threads of a pool) is cut in one way, into a contiguous share for each thread and with that for each node: a
//! thread packs panels of its share, so that the system puts them into its node's memory, and takes tasks of its share and of its
//! node's before it helps the others. A node has as many threads, of all, as it has cores.
//!
//! With one node there is one share. Several have been tried as made-up ones only: no machine with two was at hand.
//!
//! Where there is a thread for every core, each stays on a core of its own ([`Nodes::stay`]). Left to the system, a thread that is
//! woken is put beside the one that wakes it when the other core looks taken, as a core of a virtual machine does once its host has
//! let it sleep; the two then share a core for milliseconds, and memory is read half as fast.

use std::{ops::Range, sync::OnceLock};

/// The cores of each memory node that this process may use; at least one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nodes {
    cores: Vec<Vec<usize>>,
}

impl Nodes {
    /// Returns one node of cores that are not known: threads run where they run.
    pub(crate) fn one() -> Self {
        Self { cores: vec![Vec::new()] }
    }

    /// Returns this machine's nodes, read once.
    pub(crate) fn machine() -> &'static Self {
        static NODES: OnceLock<Nodes> = OnceLock::new();
        NODES.get_or_init(|| Self::from_lists(&system::core_lists(), &allowed_cores()))
    }

    /// Makes nodes of the system's lists of their cores (`0-3,8-11`), of which those in `allowed` count. Nodes without cores,
    /// which are memory only, are left out; lists that say nothing make one node.
    fn from_lists(lists: &[String], allowed: &[usize]) -> Self {
        let list = |list: &String| {
            let cores = cores_of(list)?;
            Some(allowed.iter().copied().filter(|core| cores.iter().any(|range| range.contains(core))).collect())
        };
        let mut cores = lists.iter().map(list).collect::<Option<Vec<Vec<usize>>>>().unwrap_or_default();
        cores.retain(|cores| !cores.is_empty());
        if cores.len() > 1 { Self { cores } } else { Self { cores: vec![allowed.to_vec()] } }
    }

    /// Returns how many cores there are; 0 where they are not known.
    pub(crate) fn cores(&self) -> usize {
        self.cores.iter().map(Vec::len).sum()
    }

    /// Returns how many there are.
    pub(crate) fn count(&self) -> usize {
        self.cores.len()
    }

    /// Returns the share of node `node` in `items` things that come in a row.
    fn share(&self, node: usize, items: usize) -> Range<usize> {
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

    /// Keeps the calling thread, and those it starts, on its core when there is one for each of `threads`; on those of its node, any
    /// of them, when there are more threads; where they run when there are fewer, or when the system refuses.
    pub(crate) fn stay(&self, thread: usize, threads: usize) {
        let cores = self.place(thread, threads);
        if !cores.is_empty() {
            system::stay_on(&system::Cores::of(cores));
        }
    }

    /// [`Nodes::stay`] until what it returns is dropped.
    pub(crate) fn stay_a_while(&self, thread: usize, threads: usize) -> Stay {
        let cores = self.place(thread, threads);
        let before = if cores.is_empty() { None } else { system::Cores::allowed() };
        if before.is_some() {
            system::stay_on(&system::Cores::of(cores));
        }
        Stay { before }
    }

    /// Returns the cores that a thread is to stay on; none where that is the system's to choose.
    fn place(&self, thread: usize, threads: usize) -> &[usize] {
        let cores = self.cores();
        if threads < cores {
            return &[];
        }
        let node = self.of_thread(thread, threads);
        let first: usize = self.cores[..node].iter().map(Vec::len).sum();
        if threads == cores { &self.cores[node][thread - first..=thread - first] } else { &self.cores[node] }
    }
}

/// A thread's stay on a core, after which it may go where it might before.
#[derive(Debug)]
pub(crate) struct Stay {
    before: Option<system::Cores>,
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            system::stay_on(before);
        }
    }
}

/// Returns the cores that the calling thread may use; none where that is not known.
fn allowed_cores() -> Vec<usize> {
    system::Cores::allowed().map(|cores| cores.numbers()).unwrap_or_default()
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

    /// A set of cores.
    #[derive(Clone, Copy)]
    pub(super) struct Cores(libc::cpu_set_t);

    impl Cores {
        /// Returns those that the calling thread may use; `None` when there are more than the system's set holds.
        pub(super) fn allowed() -> Option<Self> {
            let mut cores = Self::of(&[]);
            // SAFETY: the set is valid for as many bytes as are named.
            let failed = unsafe { libc::sched_getaffinity(0, size_of_val(&cores.0), &raw mut cores.0) } != 0;
            (!failed).then_some(cores)
        }

        /// Makes a set of `cores`, which came from [`Cores::numbers`].
        pub(super) fn of(cores: &[usize]) -> Self {
            // SAFETY: a set is an array of bits, and none of them set is an empty one.
            let mut set = unsafe { std::mem::zeroed() };
            // SAFETY: a core's number is below the set's size.
            cores.iter().for_each(|core| unsafe { libc::CPU_SET(*core, &mut set) });
            Self(set)
        }

        pub(super) fn numbers(&self) -> Vec<usize> {
            // SAFETY: as above.
            (0..libc::CPU_SETSIZE as usize).filter(|core| unsafe { libc::CPU_ISSET(*core, &self.0) }).collect()
        }
    }

    impl std::fmt::Debug for Cores {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_list().entries(self.numbers()).finish()
        }
    }

    /// Keeps the calling thread on `cores`. That the system refuses costs speed alone.
    pub(super) fn stay_on(cores: &Cores) {
        // SAFETY: the set is valid for as many bytes as are named.
        unsafe { libc::sched_setaffinity(0, size_of_val(&cores.0), &raw const cores.0) };
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn core_lists() -> Vec<String> {
        Vec::new()
    }

    #[derive(Debug)]
    pub(super) struct Cores;

    impl Cores {
        pub(super) fn allowed() -> Option<Self> {
            None
        }

        pub(super) fn of(_: &[usize]) -> Self {
            Self
        }

        pub(super) fn numbers(&self) -> Vec<usize> {
            Vec::new()
        }
    }

    pub(super) fn stay_on(_: &Cores) {}
}

/// Two nodes of equal size that share the cores of this machine: everything but their effect on speed can be seen on it.
#[cfg(test)]
pub(crate) fn made_up() -> Nodes {
    let cores = allowed_cores();
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
            assert_eq!(nodes(lists, allowed), [allowed], "{lists:?} {allowed:?}");
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
    fn threads_have_cores_of_their_own_where_there_is_one_for_each() {
        let place = |cores: &[&[usize]], threads: usize| -> Vec<Vec<usize>> {
            let nodes = Nodes { cores: cores.iter().map(|cores| cores.to_vec()).collect() };
            (0..threads).map(|thread| nodes.place(thread, threads).to_vec()).collect()
        };
        assert_eq!(place(&[&[2, 5]], 2), [[2], [5]]);
        assert_eq!(place(&[&[2, 5], &[7]], 3), [[2], [5], [7]]);
        assert_eq!(place(&[&[2, 5], &[7, 9]], 3), [[]; 3].map(|none: [usize; 0]| none.to_vec()));
        assert_eq!(place(&[&[2, 5]], 3), [[2, 5]; 3]);
        assert_eq!(place(&[&[2], &[7]], 4), [[2], [2], [7], [7]]);
        assert_eq!(place(&[&[]], 2), [[]; 2].map(|none: [usize; 0]| none.to_vec()), "cores that are not known");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_stays_on_its_core_for_as_long_as_it_is_told_to() {
        let allowed = allowed_cores();
        let nodes = Nodes { cores: vec![allowed.clone()] };
        for thread in 0..allowed.len() {
            let (nodes, allowed) = (nodes.clone(), allowed.clone());
            let stays = move || {
                let stay = nodes.stay_a_while(thread, allowed.len());
                assert_eq!(allowed_cores(), [allowed[thread]]);
                drop(stay);
                assert_eq!(allowed_cores(), allowed);
                nodes.stay(thread, allowed.len());
                assert_eq!(allowed_cores(), [allowed[thread]]);
            };
            std::thread::spawn(stays).join().expect("a thread");
        }
        assert_eq!(allowed_cores(), allowed, "the caller's are as they were");
    }
}
