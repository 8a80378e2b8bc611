//! Threads that share one job at a time.
//!
//! A step has a few hundred parallel regions of 10 µs to 10 ms each, so the threads persist, spin for a moment between
//! regions and only then park: a spinning thread joins in 0.2 µs, a parked one in 20 µs, and an idle engine burns no core.
//!
//! Nobody waits for a thread that has not come. A job is a number of tasks and a counter; the caller opens it, works itself,
//! closes it when no task is left, and waits only for the threads that joined before that. When the cores are shared with
//! others, a thread that gets no time costs nothing but its help.
//!
//! Tasks that follow each other read weights that do, so each thread has a contiguous share of them: what it asks for beyond the end
//! of a task is the start of its next. One that is done with its own helps the others, those of its memory node
//! ([`super::nodes`]) first. A thread stays on its node's cores when the pool has a thread for every core: a smaller one is best
//! placed by the system. The caller stays on its own for a [while](Pool::stay) only, because threads that it starts inherit that.

use super::nodes::{Nodes, Stay};
use crate::Error;
use std::{
    cell::UnsafeCell,
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long a thread spins for work, and the caller for the last thread, before it parks.
const SPIN: Duration = Duration::from_micros(30);

/// `state`: is a job open; how many threads are in it; how many jobs there were.
const OPEN: u64 = 1;
const JOINED: u64 = 1 << 1;
const JOINED_MASK: u64 = 0xffff << 1;
const JOB: u64 = 1 << 17;

/// A persistent group of threads; the caller of [`Pool::run`] is one of them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// A task: its number, and which thread runs it (`0` = the caller, below [`Pool::threads`]).
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    nodes: Nodes,
    /// The next task of each thread's share.
    next: Vec<Counter>,
    /// Whose shares each thread takes from, in this order.
    turns: Vec<Vec<usize>>,
    parked: Vec<AtomicBool>,
    caller_parked: AtomicBool,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// On cache lines of its own: a thread that takes from its share does not disturb the others, nor those that wait.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Clone)]
struct Job {
    tasks: usize,
    run: *const Task<'static>,
    caller: Thread,
}

// SAFETY: `job` is written only by the caller while no job is open and no thread is joined, and read only by threads that
// joined through `state` (acquire) after the caller opened it (release). The pointer in it is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// Starts `threads - 1` threads beside the caller, and returns when they run: what a thread needs to start is not part of a job.
    pub(crate) fn new(threads: usize) -> Result<Self, Error> {
        let machine = Nodes::machine();
        Self::on(if threads < machine.cores() { Nodes::one() } else { machine.clone() }, threads)
    }

    /// Starts threads that are spread over `nodes`.
    fn on(nodes: Nodes, threads: usize) -> Result<Self, Error> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: (0..threads).map(|_| Counter::default()).collect(),
            turns: (0..threads).map(|thread| turns(&nodes, thread, threads)).collect(),
            nodes,
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller_parked: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared: shared.clone(), workers: Vec::new() };
        let (started, running) = mpsc::channel();
        for id in 1..threads {
            let (shared, started) = (shared.clone(), started.clone());
            let work = move || {
                let _ = started.send(());
                drop(started);
                shared.nodes.stay(id, threads);
                shared.work(id);
            };
            let thread = thread::Builder::new().name(format!("engine-{id}"));
            pool.workers.push(thread.spawn(work).map_err(Error::system("start engine threads"))?);
        }
        running.iter().take(pool.workers.len()).for_each(drop);
        Ok(pool)
    }

    /// Returns the number of threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Keeps the caller on its core, if each thread has one, until what is returned is dropped.
    pub(crate) fn stay(&self) -> Stay {
        self.shared.nodes.stay_a_while(0, self.threads())
    }

    /// Runs tasks `0 .. tasks`, each once, on whichever threads have time, and returns when all are done.
    ///
    /// Which thread runs a task must not matter to its result.
    ///
    /// # Panics
    /// When a task panicked.
    pub(crate) fn run(&mut self, tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The reference is used by this thread and by threads that joined this job, and
        // `close` below returns only when none of them is left, also when a task panics.
        let run = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { tasks, run, caller: thread::current() };
        // SAFETY: no job is open and no thread joined (the last `run` ended with `close`), so nobody reads the slot.
        unsafe { *shared.job.get() = Some(job) };
        for (thread, next) in shared.next.iter().enumerate() {
            next.0.store(shared.share(thread, tasks).start, Ordering::Relaxed);
        }
        shared.state.fetch_add(JOB | OPEN, Ordering::SeqCst);
        for (worker, parked) in self.workers.iter().zip(&shared.parked) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(tasks, task, 0)));
        shared.close();
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
        assert!(!panicked, "an engine thread panicked");
    }
}

impl Shared {
    /// Returns the share of thread `thread` in a job of `tasks` tasks.
    fn share(&self, thread: usize, tasks: usize) -> Range<usize> {
        let threads = self.next.len();
        tasks * thread / threads..tasks * (thread + 1) / threads
    }

    fn take_tasks(&self, tasks: usize, task: &Task<'_>, thread: usize) {
        for &owner in &self.turns[thread] {
            let (next, end) = (&self.next[owner].0, self.share(owner, tasks).end);
            // Looking first leaves the line of a share that is done with all who look.
            while next.load(Ordering::Relaxed) < end {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                task(index, thread);
            }
        }
    }

    /// Lets no further thread join and waits for those inside.
    fn close(&self) {
        let mut state = self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spin = Spin::start();
        while state & JOINED_MASK != 0 {
            if !spin.again() {
                self.caller_parked.store(true, Ordering::SeqCst);
                if self.state.load(Ordering::SeqCst) & JOINED_MASK != 0 {
                    thread::park();
                }
                self.caller_parked.store(false, Ordering::SeqCst);
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    /// The life of thread `id`.
    fn work(&self, id: usize) {
        let mut last = 0;
        while let Some(generation) = self.wait(id, last) {
            last = generation;
            // SAFETY: this thread is joined, so the caller keeps the job as it is until we leave.
            let job = unsafe { (*self.job.get()).clone() }.expect("an open job is set");
            // SAFETY: as above: the closure outlives the job.
            let task = unsafe { &*job.run };
            if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job.tasks, task, id))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            let state = self.state.fetch_sub(JOINED, Ordering::SeqCst);
            if state & JOINED_MASK == JOINED && self.caller_parked.load(Ordering::SeqCst) {
                job.caller.unpark();
            }
        }
    }

    /// Waits for a job later than `last` and joins it; `None` = stop.
    fn wait(&self, id: usize, last: u64) -> Option<u64> {
        let mut spin = Spin::start();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let state = self.state.load(Ordering::SeqCst);
            let news = state & OPEN != 0 && state / JOB != last;
            if news {
                let joined = self.state.compare_exchange(state, state + JOINED, Ordering::SeqCst, Ordering::Relaxed);
                if joined.is_ok() {
                    return Some(state / JOB);
                }
            } else if !spin.again() {
                let parked = &self.parked[id - 1];
                parked.store(true, Ordering::SeqCst);
                let state = self.state.load(Ordering::SeqCst);
                let news = state & OPEN != 0 && state / JOB != last;
                if !news && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                parked.store(false, Ordering::SeqCst);
                spin = Spin::start();
            }
        }
    }
}

/// Returns the threads whose shares `thread` takes from: itself, then those of its node, then the rest, each from it onwards.
fn turns(nodes: &Nodes, thread: usize, threads: usize) -> Vec<usize> {
    let node = |thread| nodes.of_thread(thread, threads);
    let mut turns: Vec<usize> = (0..threads).map(|turn| (thread + turn) % threads).collect();
    turns.sort_by_key(|&other| node(other) != node(thread));
    turns
}

/// A bounded spin.
struct Spin {
    start: Instant,
    turns: u32,
}

impl Spin {
    fn start() -> Self {
        Self { start: Instant::now(), turns: 0 }
    }

    /// Spins once; says `false` when it has spun for [`SPIN`].
    fn again(&mut self) -> bool {
        std::hint::spin_loop();
        self.turns += 1;
        !self.turns.is_multiple_of(32) || self.start.elapsed() < SPIN
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A thread's panic was reported by the `run` it happened in.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::nodes;

    #[test]
    fn a_thread_takes_the_tasks_of_its_node_first() {
        let threads = 4;
        let mut pool = Pool::on(nodes::made_up(), threads).expect("threads");
        // The first task of each thread, which waits for the others to have one.
        let first: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(usize::MAX)).collect();
        pool.run(40, &|task, thread| {
            let _ = first[thread].compare_exchange(usize::MAX, task, Ordering::SeqCst, Ordering::SeqCst);
            let start = Instant::now();
            while first.iter().any(|task| task.load(Ordering::SeqCst) == usize::MAX) {
                assert!(start.elapsed() < Duration::from_secs(10), "nobody joined");
                thread::yield_now();
            }
        });
        let of_first_node = |thread: usize| first[thread].load(Ordering::SeqCst) < 20;
        assert_eq!((0..threads).map(of_first_node).collect::<Vec<_>>(), [true, true, false, false]);
    }

    #[test]
    fn a_thread_helps_itself_then_its_node_then_the_others() {
        let nodes = nodes::made_up();
        let of = |thread| turns(&nodes, thread, 4);
        assert_eq!([of(0), of(1), of(2), of(3)], [[0, 1, 2, 3], [1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 0, 1]]);
        assert_eq!(turns(&Nodes::one(), 1, 3), [1, 2, 0]);
    }

    #[test]
    fn every_task_runs_once() {
        let all = [1, 2, 5].into_iter().flat_map(|threads| [(threads, Nodes::one()), (threads, nodes::made_up())]);
        for (threads, nodes) in all {
            let mut pool = Pool::on(nodes, threads).expect("threads");
            for tasks in [0, 1, 2, 3, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=50 {
                    pool.run(tasks, &|task, thread| {
                        assert!(thread < threads);
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round));
                }
            }
        }
    }

    #[test]
    fn parked_threads_come_back() {
        let mut pool = Pool::new(3).expect("threads");
        for _ in 0..20 {
            let start = Instant::now();
            while !pool.shared.parked.iter().all(|parked| parked.load(Ordering::SeqCst)) {
                assert!(start.elapsed() < Duration::from_secs(10), "threads never park");
                thread::yield_now();
            }
            let seen = AtomicUsize::new(0);
            // Each task waits for another thread to have one, so this ends only if a parked thread woke.
            pool.run(2, &|_, _| {
                seen.fetch_add(1, Ordering::SeqCst);
                let start = Instant::now();
                while seen.load(Ordering::SeqCst) < 2 {
                    assert!(start.elapsed() < Duration::from_secs(10), "nobody joined");
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2).expect("threads");
        let run = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|task, _| assert_ne!(task, 5))));
        assert!(run.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 8);
    }

    /// `cargo test -p engine --lib -- --ignored --nocapture pool::tests::speed`
    #[test]
    #[ignore = "prints times; asserts nothing"]
    fn speed() {
        let mut pool = Pool::new(2).expect("threads");
        let spin = |micros: u64| {
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(micros) {}
        };
        let mut measure = |name: &str, rounds: usize, between: &dyn Fn()| {
            let round = |_| {
                between();
                let begun = AtomicUsize::new(0);
                let start = Instant::now();
                // Each task waits for the other to begin: both threads take part.
                pool.run(2, &|_, _| {
                    begun.fetch_add(1, Ordering::Relaxed);
                    while begun.load(Ordering::Relaxed) < 2 {
                        std::hint::spin_loop();
                    }
                });
                start.elapsed().as_secs_f64() * 1e6
            };
            let mut times: Vec<f64> = (0..rounds).map(round).collect();
            times.sort_by(f64::total_cmp);
            let at = |percent: usize| times[(rounds - 1) * percent / 100];
            println!("{name}: {:.2} us, 90 % {:.2}, 99 % {:.2}", at(50), at(90), at(99));
        };
        measure("back to back", 200_000, &|| {});
        measure("after 20 us alone", 20_000, &|| spin(20));
        measure("after 1 ms alone, the other parked", 2_000, &|| spin(1000));
    }
}
