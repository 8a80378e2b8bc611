//! Two workers in two processes, one of which is killed or stopped at a moment that nobody chose. Pages that nobody owns hold
//! poison: a write that comes after a page was given back shows in it.
//!
//! The other process is this binary again, told by its environment what to be.

mod support;

use kv_cache::PageId;
use kv_transfer::{Config, Event, HandoffId, Outcome, Peer, TransportKind};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader, Read, Write},
    process::{self, Command, Stdio},
    time::{Duration, Instant},
};
use support::{LAYERS, Over, SOON, Worker, identity, kinds_that_break, only};
use tokio::time::{sleep, timeout};

/// Pages of one hand-off: 3 MiB, a good part of a millisecond under way.
const COUNT: usize = 64;
/// Hand-offs that a source keeps going at once.
const AT_ONCE: u64 = 2;
const POISON: u8 = 0xEE;
/// Times that a process is killed over one transport.
const KILLS: u64 = 12;
/// Within which the survivor has its pages back.
const DEATH: Duration = Duration::from_millis(1_300);
/// How long a process is stopped: longer than every deadline of a link.
const STOP: Duration = Duration::from_secs(5);

const ROLE: &str = "BATON_TEST_ROLE";
const KIND: &str = "BATON_TEST_KIND";
const TARGET: &str = "BATON_TEST_TARGET";

/// Transports that join two processes.
fn between_processes() -> impl Iterator<Item = Over> {
    kinds_that_break().into_iter().filter(|kind| kind.kind() != TransportKind::Memory)
}

fn config(kind: Over) -> Config {
    Config { group_bytes: Some(1 << 20), ..only(kind) }
}

fn byte(handoff: HandoffId, index: usize, layer: u32) -> u8 {
    ((handoff.0 * 31 + index as u64 * 7 + u64::from(layer)) % 200) as u8
}

fn fill(worker: &Worker, page: PageId, byte: impl Fn(u32) -> u8) {
    let layout = &worker.identity.layout;
    for layer in 0..LAYERS {
        worker.write(layout.block_offset(layer, page), &vec![byte(layer); layout.block_bytes()]);
    }
}

/// A worker that opens a landing for whoever asks.
struct Target {
    worker: Worker,
    free: Vec<PageId>,
    open: BTreeMap<HandoffId, Vec<PageId>>,
    landed: usize,
    lost: usize,
}

impl Target {
    async fn start(kind: Over) -> Self {
        let pages = COUNT as u32 * (AT_ONCE as u32 + 1);
        let worker = Worker::start(config(kind), identity("decode-0", pages), 2).await;
        let free: Vec<PageId> = (0..pages).map(PageId).collect();
        free.iter().for_each(|page| fill(&worker, *page, |_| POISON));
        Self { worker, free, open: BTreeMap::new(), landed: 0, lost: 0 }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Begun { handoff, .. } if self.free.len() < COUNT => {
                self.worker.transfer.refuse(handoff, "no pages".into());
            }
            Event::Begun { handoff, .. } => {
                let landing = self.free.split_off(self.free.len() - COUNT);
                self.worker.transfer.open(handoff, landing.clone(), 0);
                self.open.insert(handoff, landing);
            }
            Event::Landed { handoff, .. } => {
                let (landing, contents) = (&self.open[&handoff], self.worker.contents());
                for (index, page) in landing.iter().enumerate() {
                    assert!(
                        self.holds(&contents, *page, |layer| byte(handoff, index, layer)),
                        "{handoff}: page {index}"
                    );
                }
                self.landed += 1;
                self.give_back(handoff);
            }
            Event::Lost { .. } => self.lost += 1,
            Event::Quiet { handoff } => self.give_back(handoff),
            other => panic!("{other:?}"),
        }
    }

    fn give_back(&mut self, handoff: HandoffId) {
        for page in self.open.remove(&handoff).expect("was open") {
            fill(&self.worker, page, |_| POISON);
            self.free.insert(0, page); // The longest unused are used next, so that poison lies for a while.
        }
    }

    fn holds(&self, contents: &[u8], page: PageId, byte: impl Fn(u32) -> u8) -> bool {
        let layout = &self.worker.identity.layout;
        (0..LAYERS).all(|layer| {
            let at = layout.block_offset(layer, page);
            contents[at..at + layout.block_bytes()].iter().all(|got| *got == byte(layer))
        })
    }

    fn check_poison(&self) {
        let contents = self.worker.contents();
        for page in &self.free {
            assert!(self.holds(&contents, *page, |_| POISON), "{page:?} was written after it was given back");
        }
    }

    /// Handles events for so long.
    async fn serve_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok(event) = timeout(end.saturating_duration_since(Instant::now()), self.worker.events.recv()).await {
            self.handle(event.expect("transfer runs"));
        }
    }

    /// Handles events until `done`, which must be soon.
    async fn serve_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let event = timeout(SOON, self.worker.events.recv()).await.unwrap_or_else(|_| panic!("{what}"));
            self.handle(event.expect("transfer runs"));
        }
    }

    /// Serves until hand-offs land, and then on to a moment in the middle of others. Returns how many are under way.
    async fn serve_to_the_middle(&mut self, rng: &mut StdRng) -> usize {
        let enough = self.landed + 3;
        self.serve_until("hand-offs land", |target| target.landed >= enough).await;
        self.serve_for(Duration::from_micros(rng.random_range(0..8_000))).await;
        self.open.len()
    }
}

impl Target {
    /// Stops the source in the middle of a hand-off, until that is lost. `holds`: pages stay open for want of a proof; which they do not where
    /// the source had settled and not yet said so.
    async fn stop(&mut self, source: &Child, holds: bool, rng: &mut StdRng) {
        loop {
            self.serve_to_the_middle(rng).await;
            source.signal(Signal::STOP);
            // What was over but for its last messages lands now.
            self.serve_for(Duration::from_millis(50)).await;
            if !self.open.is_empty() {
                let lost = self.lost;
                self.serve_until("what was under way is lost", |target| target.lost > lost).await;
                self.serve_for(Duration::from_millis(200)).await;
                if !self.open.is_empty() || !holds {
                    return;
                }
            }
            source.signal(Signal::CONT);
        }
    }
}

/// A worker that hands the same pages over again and again.
struct Source {
    worker: Worker,
    target: Peer,
    /// Of the next hand-off.
    next: u64,
    live: usize,
    landed: usize,
}

impl Source {
    async fn start(kind: Over, link: String) -> Self {
        let worker = Worker::start(config(kind), identity("prefill-0", COUNT as u32 * AT_ONCE as u32), 1).await;
        let target = Peer { worker: "decode-0".into(), incarnation: 1_000, link };
        Self { worker, target, next: u64::from(process::id()) << 32, live: 0, landed: 0 }
    }

    /// Pages of every hand-off with a number like this one's; free when it begins.
    fn pages(handoff: HandoffId) -> Vec<PageId> {
        let slot = (handoff.0 % AT_ONCE) as u32;
        (0..COUNT as u32).map(|page| PageId(page * AT_ONCE as u32 + slot)).collect()
    }

    fn begin(&mut self) {
        let handoff = self.ask();
        self.finish(handoff);
    }

    /// Asks for a landing.
    fn ask(&mut self) -> HandoffId {
        let handoff = HandoffId(self.next);
        self.next += 1;
        self.live += 1;
        let pages = Self::pages(handoff);
        for (index, page) in pages.iter().enumerate() {
            fill(&self.worker, *page, |layer| byte(handoff, index, layer));
        }
        self.worker.begin(handoff, self.target.clone(), &pages);
        handoff
    }

    /// Has computed all of it.
    fn finish(&self, handoff: HandoffId) {
        self.worker.push(handoff, 0..COUNT as u32);
        self.worker.commit(handoff, 1);
    }

    /// Takes the end of one hand-off.
    async fn ended(&mut self) {
        match self.worker.event().await {
            Event::SourceDone { outcome, .. } => self.landed += usize::from(outcome == Outcome::Landed),
            other => panic!("{other:?}"),
        }
        self.live -= 1;
    }

    /// Hands over round after round; returns in the middle of one, when at least `landed` more have landed.
    async fn run_to_the_middle(&mut self, landed: usize, rng: &mut StdRng) {
        let enough = self.landed + landed;
        loop {
            (0..AT_ONCE).for_each(|_| self.begin());
            if self.landed >= enough {
                return sleep(Duration::from_micros(rng.random_range(0..6_000))).await;
            }
            while self.live > 0 {
                self.ended().await;
            }
            if self.landed + landed == enough {
                sleep(Duration::from_millis(10)).await; // Nothing lands yet.
            }
        }
    }
}

/// Another process. Killed when dropped.
struct Child(process::Child);

impl Child {
    fn start(role: &str, kind: Over, target: &str) -> Self {
        Self::run(Command::new(env::current_exe().expect("this binary")), role, kind, target)
    }

    /// Starts one in whose view `/dev/shm` is full, if the system lets us make such a view.
    fn start_without_room(role: &str, kind: Over) -> Option<Self> {
        let view = ["--user", "--map-root-user", "--mount"];
        let fill = "mount -t tmpfs -o size=64k none /dev/shm && ! head -c 1M /dev/zero > /dev/shm/full 2>/dev/null";
        let possible = Command::new("unshare").args(view).args(["sh", "-c", fill]).status();
        if !possible.is_ok_and(|status| status.success()) {
            return None;
        }
        let mut command = Command::new("unshare");
        command.args(view).args(["sh", "-c", &format!("{fill}; exec \"$0\" \"$@\"")]);
        command.arg(env::current_exe().expect("this binary"));
        Some(Self::run(command, role, kind, ""))
    }

    fn run(mut command: Command, role: &str, kind: Over, target: &str) -> Self {
        command.args(["--exact", "other_process", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(KIND, format!("{kind:?}")).env(TARGET, target);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self(command.spawn().expect("start another process"))
    }

    /// Reads what it says of itself.
    fn says(&mut self, what: &str) -> String {
        let lines = BufReader::new(self.0.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let said = lines.filter_map(|line| line.strip_prefix(what).map(str::to_owned)).next();
        said.expect("it says so before it ends")
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, signal).expect("signal");
    }

    /// Returns when it is no more.
    fn kill(mut self) -> Instant {
        self.signal(Signal::KILL);
        self.0.wait().expect("killed");
        Instant::now()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the other process runs; nothing when it is a test like the others.
#[allow(clippy::disallowed_methods)] // The environment is how one test process tells another what to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_process() {
    let (Ok(role), Ok(kind)) = (env::var(ROLE), env::var(KIND)) else { return };
    // Ends with the process that started it, however that ends.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        process::exit(0);
    });
    let kind = between_processes().find(|known| format!("{known:?}") == kind).expect("a kind");
    match role.as_str() {
        "source" => {
            let mut source = Source::start(kind, env::var(TARGET).expect("a target")).await;
            loop {
                source.run_to_the_middle(usize::MAX / 2, &mut StdRng::seed_from_u64(0)).await;
            }
        }
        "target" => {
            let mut target = Target::start(kind).await;
            println!("\nlistens at {}", target.worker.transfer.address());
            std::io::stdout().flush().expect("piped");
            loop {
                target.serve_for(SOON).await;
            }
        }
        other => panic!("{ROLE}={other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_source_strands_no_page_and_spoils_none() {
    for kind in between_processes() {
        let mut target = Target::start(kind).await;
        let mut caught = 0;
        for seed in 0..KILLS {
            let child = Child::start("source", kind, &target.worker.transfer.address());
            caught += target.serve_to_the_middle(&mut StdRng::seed_from_u64(seed)).await;
            let died = child.kill();
            target.serve_until("its landings come back", |target| target.open.is_empty()).await;
            assert!(died.elapsed() < DEATH, "{kind:?}, seed {seed}: {:?}", died.elapsed());
            target.check_poison();
        }
        assert!(caught > 0, "{kind:?}: none was killed in the middle of a hand-off");
        target.serve_for(Duration::from_millis(100)).await;
        target.check_poison();
        assert_eq!(target.worker.transfer.drain(SOON).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_target_holds_no_source_up() {
    for kind in between_processes() {
        for seed in 0..KILLS {
            let mut child = Child::start("target", kind, "");
            let mut source = Source::start(kind, child.says("listens at ")).await;
            source.run_to_the_middle(3, &mut StdRng::seed_from_u64(seed)).await;
            let died = child.kill();
            while source.live > 0 {
                source.ended().await;
            }
            assert!(died.elapsed() < DEATH, "{kind:?}, seed {seed}: {:?}", died.elapsed());
            assert_eq!(source.worker.transfer.drain(SOON).await, 0);
        }
    }
}

/// A source is stopped, maybe in the middle of a copy. Where it writes by itself, the target must wait for it, and does: then
/// nothing it writes when it goes on can land in a page that was given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_source_writes_into_no_page_that_was_given_back() {
    for kind in between_processes() {
        let mut target = Target::start(kind).await;
        let child = Child::start("source", kind, &target.worker.transfer.address());
        let mut rng = StdRng::seed_from_u64(7);
        target.stop(&child, kind.kind() != TransportKind::Tcp, &mut rng).await;
        target.serve_for(STOP).await;
        assert_eq!(
            !target.open.is_empty(),
            kind.kind() != TransportKind::Tcp,
            "{kind:?}: quarantined while there is no proof"
        );
        target.check_poison();
        let quarantined: Vec<HandoffId> = target.open.keys().copied().collect();
        child.signal(Signal::CONT);
        let over = |target: &Target| quarantined.iter().all(|handoff| !target.open.contains_key(handoff));
        target.serve_until("it goes on and vouches", over).await;
        target.check_poison();
        let enough = target.landed + 3;
        target.serve_until("hand-offs land again", |target| target.landed >= enough).await;
        child.kill();
        target.serve_until("its landings come back", |target| target.open.is_empty()).await;
        target.check_poison();
    }
}

/// As above, but it is killed before it goes on: the end of its process is proof enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_source_that_is_killed_gives_everything_back() {
    let mut target = Target::start(Over::Shm).await;
    let child = Child::start("source", Over::Shm, &target.worker.transfer.address());
    let mut rng = StdRng::seed_from_u64(8);
    target.stop(&child, true, &mut rng).await;
    let died = child.kill();
    target.serve_until("its landings come back", |target| target.open.is_empty()).await;
    assert!(died.elapsed() < DEATH, "{:?}", died.elapsed());
    target.check_poison();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_target_holds_no_source_up() {
    for kind in between_processes() {
        let mut child = Child::start("target", kind, "");
        let mut source = Source::start(kind, child.says("listens at ")).await;
        let mut rng = StdRng::seed_from_u64(9);
        source.run_to_the_middle(3, &mut rng).await;
        child.signal(Signal::STOP);
        let stopped = Instant::now();
        while source.live > 0 {
            source.ended().await;
        }
        assert!(stopped.elapsed() < DEATH, "{kind:?}: {:?}", stopped.elapsed());
        sleep(STOP.saturating_sub(stopped.elapsed())).await;
        child.signal(Signal::CONT);
        source.run_to_the_middle(3, &mut rng).await;
    }
}

/// Over shared memory a source is done once it has written everything and settled: nobody has to be awake for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_settles_waits_for_nobody() {
    let mut child = Child::start("target", Over::Shm, "");
    let mut source = Source::start(Over::Shm, child.says("listens at ")).await;
    source.begin();
    source.ended().await;
    assert_eq!(source.landed, 1);
    let handoff = source.ask();
    // By then the landing is open.
    sleep(Duration::from_secs(1)).await;
    child.signal(Signal::STOP);
    source.finish(handoff);
    source.ended().await;
    assert_eq!(source.landed, 2, "the target was stopped when it landed");
    child.signal(Signal::CONT);
    source.begin();
    source.ended().await;
    assert_eq!(source.landed, 3);
}

/// Pools are no files of `/dev/shm`, of which containers have little.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_shared_memory_disk_does_not_matter() {
    let Some(mut child) = Child::start_without_room("target", Over::Shm) else {
        return eprintln!("skipped: no mount namespace to be had");
    };
    let mut source = Source::start(Over::Shm, child.says("listens at ")).await;
    source.run_to_the_middle(3, &mut StdRng::seed_from_u64(1)).await;
}
