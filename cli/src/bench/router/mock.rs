//! A worker that computes nothing: it answers submissions through the workers' own `attach`.

use anyhow::Context;
use attach::{Command, End, Leg, LegId, Load, Profile, Routers, Submission};
use cluster::Role;
use engine::{Sampled, TokenId, scheduler::Usage};
use kv_cache::{PageHash, PagePool};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};
use timing::Pace;
use tokio::{net::TcpListener, sync::mpsc, time::MissedTickBehavior};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

/// What every mock says of its model; the bundled tokenizer's vocabulary.
pub(super) const VOCAB: u32 = 4096;
pub(super) const PAGE_TOKENS: u32 = 16;
pub(super) const PAGES: u32 = 1 << 16;
/// What a worker that answers at once would learn of itself. Without it, the router would hold prompts back as for one it knows nothing of.
const PACE: Pace = Pace { step_us: 1.0, sequence_us: 0.0, context_ns: 0.0, token_us: 0.001, pair_ns: 0.0 };
/// An ordinary word of the bundled tokenizer.
const TOKEN: TokenId = 300;

/// The workers behind the router.
pub(super) const MOCKS: [(Role, &str); 4] = [
    (Role::Prefill, "prefill-0"),
    (Role::Prefill, "prefill-1"),
    (Role::Decode, "decode-0"),
    (Role::Decode, "decode-1"),
];

/// All of them, running.
pub(super) struct Mocks {
    pub(super) all: [Mock; MOCKS.len()],
}

impl Mocks {
    /// Starts them. The decode workers emit a token each `pace`, or all at once.
    pub(super) async fn start(pace: Option<Duration>) -> anyhow::Result<Self> {
        let [a, b, c, d] = MOCKS.map(|(role, name)| Mock::start(name, pace.filter(|_| role == Role::Decode)));
        let (a, b, c, d) = tokio::try_join!(a, b, c, d)?;
        Ok(Self { all: [a, b, c, d] })
    }
}

/// A running mock. Dropping it stops it.
pub(super) struct Mock {
    pub(super) address: SocketAddr,
    _stop: DropGuard,
    _tasks: TaskTracker,
}

impl Mock {
    /// Starts a worker that is called `name`. A prefill leg is answered with its first token at once; the tokens of a decode leg
    /// come all at once, or one each `pace`, those of all legs together, as a batch has it.
    async fn start(name: &str, pace: Option<Duration>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("bind a mock worker")?;
        let address = listener.local_addr().context("read the bound address")?;
        let profile = Profile {
            worker: name.to_owned(),
            incarnation: 1,
            vocab_size: VOCAB,
            page_tokens: PAGE_TOKENS as usize,
            eos: vec![2],
            adapters: None,
            model: None,
        };
        let stop = CancellationToken::new();
        let (commands, inbox) = mpsc::channel(1024);
        let tasks = TaskTracker::new();
        tasks.spawn(attach::serve(listener, profile, commands, stop.clone()));
        let worker = Worker { routers: Routers::default(), legs: BTreeMap::new(), pool: PagePool::new(PAGES as usize) };
        tasks.spawn(stop.clone().run_until_cancelled_owned(worker.run(inbox, pace)));
        Ok(Self { address, _stop: stop.drop_guard(), _tasks: tasks })
    }
}

struct Worker {
    routers: Routers,
    legs: BTreeMap<LegId, Progress>,
    pool: PagePool,
}

/// The next token of a leg, and where it ends.
struct Progress {
    next: usize,
    end: usize,
}

impl Worker {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, pace: Option<Duration>) {
        let mut steps = tokio::time::interval(pace.unwrap_or(Duration::from_secs(3600)));
        steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut commands = Vec::new();
        loop {
            // Both arms are cancel safe.
            tokio::select! {
                count = inbox.recv_many(&mut commands, 1024) => {
                    if count == 0 {
                        return;
                    }
                    commands.drain(..).for_each(|command| self.command(command));
                    if pace.is_none() {
                        while !self.legs.is_empty() {
                            self.step();
                        }
                    }
                }
                _ = steps.tick() => self.step(),
            }
            let (pages_free, pages_total) = (PAGES as usize, PAGES as usize);
            let load = Load { pages_free, pages_total, pace: Some(PACE), ..Load::default() };
            self.routers.flush(Instant::now(), self.pool.take_delta(), &self.pool, &load);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Attached(router) => self.routers.attach(router),
            Command::Submit(submission) => self.submit(*submission),
            Command::Cancel(leg) => {
                if self.legs.remove(&leg).is_some() {
                    self.routers.ended(leg, End::Cancelled, Usage::default());
                }
            }
            Command::Resync(stream) => self.routers.resync(stream),
            Command::Reset(stream, number) => {
                self.pool.clear_cached();
                self.routers.reset(stream, number, true);
            }
            Command::Detached(stream) => {
                self.legs.retain(|leg, _| leg.stream != stream);
                self.routers.detach(stream);
            }
        }
    }

    fn submit(&mut self, submission: Submission) {
        self.routers.received(submission.id);
        self.remember(submission.sequence.history.hashes());
        let end = submission.sequence.stop.max_tokens;
        let next = match submission.leg {
            Leg::Prefill { .. } => {
                self.token(submission.id, 0);
                self.routers.ended(submission.id, End::HandedOff, Usage::default());
                return;
            }
            Leg::Decode { .. } => 1,
            Leg::Local => 0,
            Leg::Embed(_) => {
                let why = "this worker of a benchmark has no embeddings".to_string();
                self.routers.ended(submission.id, End::Invalid(why), Usage::default());
                return;
            }
        };
        self.legs.insert(submission.id, Progress { next, end });
    }

    /// Holds the pages of a prompt for a moment, so that they are cached, as after a worker computed them or let them land.
    fn remember(&mut self, hashes: &[PageHash]) {
        let mut pages = self.pool.reuse(hashes);
        let known = pages.len();
        pages.extend(self.pool.allocate(hashes.len() - known).expect("a prompt has fewer pages than a worker"));
        for (page, hash) in pages.iter().zip(hashes).skip(known) {
            self.pool.name(*page, *hash);
        }
        self.pool.release(&pages);
    }

    /// Gives every leg one token.
    fn step(&mut self) {
        let legs: Vec<LegId> = self.legs.keys().copied().collect();
        for id in legs {
            let Some(leg) = self.legs.get_mut(&id) else { continue };
            let index = leg.next;
            leg.next += 1;
            let ended = leg.next >= leg.end;
            self.token(id, index);
            if ended {
                self.legs.remove(&id);
                self.routers.ended(id, End::Length, Usage::default());
            }
        }
    }

    fn token(&mut self, leg: LegId, index: usize) {
        self.routers.token(leg, index, Sampled { token: TOKEN, logprobs: None });
    }
}
