//! What happens, in order of time.

use crate::{
    Policy,
    link::Link,
    router::{Router, Submission},
    worker::{RequestId, Worker, request},
};
use engine::{
    TokenId,
    scheduler::{Ended, Finish, History, Hold, Landing, Limits, NoRoom, Prefix, SequenceId, Until},
};
use kv_cache::{CacheDelta, PageHash};
use placement::{Choice, Demand, Fetch, Report};
use serde::Serialize;
use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc, time::Duration};
use timing::{Pace, Profile};
use workload::{Objectives, Served, Summary, Trace};

/// A cluster and how it is used.
#[derive(Clone, Debug)]
pub struct Config {
    /// Prefill workers.
    pub prefill: usize,
    /// Decode workers.
    pub decode: usize,
    /// What each of them is.
    pub profile: Profile,
    /// Workers, by number (prefill workers first), that take so many times as long.
    pub slow: Vec<(usize, f64)>,
    /// Tokens in a page.
    pub page_tokens: usize,
    /// Most tokens in a step.
    pub token_budget: usize,
    /// Most sequences in a step.
    pub max_sequences: usize,
    /// Bandwidth of a worker's network.
    pub link_bytes_per_s: f64,
    /// How long a message between two processes takes.
    pub message: Duration,
    /// Who places.
    pub policy: Policy,
    /// Where the policy [`Policy::Baton`] lets prompts be computed.
    pub placement: placement::Policy,
    /// The router's assumptions.
    pub weights: placement::Weights,
    /// Bytes of its prefix index.
    pub index_bytes: usize,
    /// Of everything random.
    pub seed: u64,
    /// What goodput counts.
    pub objectives: Objectives,
}

impl Config {
    pub(crate) fn page_bytes(&self) -> u64 {
        self.profile.kv_bytes_per_token * self.page_tokens as u64
    }

    pub(crate) fn pages(&self) -> usize {
        self.profile.kv_tokens as usize / self.page_tokens
    }

    pub(crate) fn max_tokens(&self) -> usize {
        self.pages() * self.page_tokens
    }

    fn limits(&self) -> Limits {
        Limits {
            pages: self.pages(),
            page_tokens: self.page_tokens,
            token_budget: self.token_budget,
            max_sequences: self.max_sequences,
            max_model_len: self.max_tokens(),
            max_waiting: usize::MAX,
        }
    }

    fn pace(&self, worker: usize) -> Pace {
        let Pace { step_us, sequence_us, context_ns, token_us, pair_ns } = self.profile.pace;
        let factor = self.slow.iter().find(|(slow, _)| *slow == worker).map_or(1.0, |(_, factor)| *factor);
        Pace {
            step_us: step_us * factor,
            sequence_us: sequence_us * factor,
            context_ns: context_ns * factor,
            token_us: token_us * factor,
            pair_ns: pair_ns * factor,
        }
    }
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What requests saw.
    pub summary: Summary,
    /// Prompts computed by the worker that decodes.
    pub local: usize,
    /// Prompts of which a part was fetched from a peer.
    pub fetched: usize,
    /// Share of all prompt tokens that were not computed.
    pub cached: f64,
    /// Longest time for which a worker had more than [`CROWD`] prompts in its line while another of its kind had nothing to do, in
    /// seconds.
    pub idle_beside_crowd_s: f64,
    /// Share of their time that prefill workers, and decode workers, were busy.
    pub busy: [f64; 2],
}

/// Waiting prompts that should have gone elsewhere, if there is an elsewhere.
pub(crate) const CROWD: usize = 3;

/// Plays `trace`. Requests that no worker can hold count as failed.
pub fn run(config: &Config, trace: &Trace) -> Outcome {
    let mut world = World::new(config, trace);
    for (id, request) in trace.requests.iter().enumerate() {
        world.at(request.at, Event::Arrive(id));
    }
    while let Some(Reverse((now, _, Unordered(event)))) = world.events.pop() {
        world.now = now;
        world.happen(event);
        world.watch();
    }
    for worker in &world.workers {
        assert_eq!(
            (worker.legs, worker.scheduler.pool().stats().held()),
            (0, 0),
            "every leg ended and gave its pages back"
        );
    }
    world.outcome()
}

#[derive(Debug)]
enum Event {
    Arrive(RequestId),
    Submit { id: RequestId, worker: usize, number: Submission, part: Part },
    Step { worker: usize, took: Duration },
    Report { worker: usize, report: Report, delta: CacheDelta },
    Landed(RequestId),
    Fetched(RequestId),
}

/// Events are ordered by time and then by when they were made: what they are does not count.
#[derive(Debug)]
struct Unordered(Event);

impl PartialEq for Unordered {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Unordered {}

impl PartialOrd for Unordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Unordered {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Local,
    Prefill,
    Decode,
}

/// A request under way.
#[derive(Debug, Default)]
struct Live {
    history: Option<History>,
    choice: Option<Choice>,
    pieces: Vec<Duration>,
    landing: Option<Landing>,
    opened: Option<Duration>,
    /// When its last page was computed.
    computed: Option<Duration>,
    hold: Option<Hold>,
    /// Pages for what is fetched, and who waits for them.
    prefix: Option<(Prefix, SequenceId)>,
    /// Of the submission to whoever computes the prompt.
    number: Submission,
    /// Whether what was cached of its prompt has been counted.
    counted: bool,
}

struct World<'a> {
    config: &'a Config,
    trace: &'a Trace,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Unordered)>>,
    made: u64,
    router: Router,
    workers: Vec<Worker>,
    live: Vec<Live>,
    served: Vec<Served>,
    failed: usize,
    local: usize,
    fetched: usize,
    cached_tokens: u64,
    prompt_tokens: u64,
    busy: Vec<Duration>,
    fairness: Fairness,
}

#[derive(Debug, Default)]
struct Fairness {
    /// When to look again.
    next: Duration,
    /// Since when a worker of the kind idles while another is crowded.
    since: [Option<Duration>; 2],
    longest: Duration,
}

impl<'a> World<'a> {
    /// Of the token ids that prompts are made of.
    const VOCABULARY: u32 = 1 << 30;
    /// Of the layers' groups that a prompt's pages leave in, the last cannot leave before the prompt is computed.
    const GROUPS: u32 = 8;
    /// How often fairness is looked at.
    const WATCH: Duration = Duration::from_millis(100);

    fn new(config: &'a Config, trace: &'a Trace) -> Self {
        let workers = config.prefill + config.decode;
        let link = Link::new(config.link_bytes_per_s);
        Self {
            config,
            trace,
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            made: 0,
            router: Router::new(config),
            workers: (0..workers).map(|id| Worker::new(config.limits(), config.pace(id), link)).collect(),
            live: trace.requests.iter().map(|_| Live::default()).collect(),
            served: Vec::with_capacity(trace.requests.len()),
            failed: 0,
            local: 0,
            fetched: 0,
            cached_tokens: 0,
            prompt_tokens: 0,
            busy: vec![Duration::ZERO; workers],
            fairness: Fairness::default(),
        }
    }

    fn at(&mut self, when: Duration, event: Event) {
        self.made += 1;
        self.events.push(Reverse((when, self.made, Unordered(event))));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(id) => self.arrive(id),
            Event::Submit { id, worker, number, part } => self.submit(id, worker, number, part),
            Event::Step { worker, took } => self.end_step(worker, took),
            Event::Report { worker, report, delta } => self.router.hear(worker, report, &delta, self.now),
            Event::Landed(id) => self.landed(id),
            Event::Fetched(id) => self.fetched(id),
        }
    }

    // ---- the router ----

    fn arrive(&mut self, id: RequestId) {
        let asked = &self.trace.requests[id];
        let tokens = asked.tokens(self.trace.block_tokens, Self::VOCABULARY);
        let history = History::new(b"", tokens, self.config.page_tokens);
        let demand = Demand { tokens: history.len() as u32, max_output: asked.output_tokens as u32 };
        let Some(choice) = self.router.place(&history, asked.output_tokens, self.now) else {
            self.failed += 1;
            return;
        };
        self.prompt_tokens += u64::from(demand.tokens);
        self.live[id].history = Some(history);
        self.live[id].choice = Some(choice);
        let (computes, part) = match choice.prefill {
            Some(prefill) => (prefill, Part::Prefill),
            None => (choice.decode, Part::Local),
        };
        let cached = choice.fetch.map_or_else(|| self.router.cached_pages(computes), |fetch| fetch.pages);
        if let Some(Fetch { holder, pages }) = choice.fetch {
            self.router.fetching(holder, pages - self.router.cached_pages(computes), self.now);
        }
        let number = self.router.submit(computes, &demand, true, cached, self.now);
        let pages: Arc<[PageHash]> = self.live[id].history.as_ref().expect("it was set above").hashes().into();
        self.router.computing(computes, number, &pages);
        self.live[id].number = number;
        let then = self.now + self.config.message;
        self.at(then, Event::Submit { id, worker: computes, number, part });
        if part == Part::Local {
            self.local += 1;
        } else {
            let cached = self.router.cached_pages(choice.decode);
            let number = self.router.submit(choice.decode, &demand, false, cached, self.now);
            self.at(then, Event::Submit { id, worker: choice.decode, number, part: Part::Decode });
        }
    }

    // ---- workers ----

    fn submit(&mut self, id: RequestId, worker: usize, number: Submission, part: Part) {
        let known = &mut self.workers[worker];
        known.received = known.received.max(number);
        known.legs += 1;
        if part != Part::Decode {
            self.queue(id, worker);
        }
    }

    /// Puts a prompt into a worker's line.
    fn queue(&mut self, id: RequestId, worker: usize) {
        let until = if worker < self.config.prefill { Until::FirstToken } else { Until::End };
        let history = self.live[id].history.clone().expect("it lives");
        let request = request(history, self.trace.requests[id].output_tokens, until);
        let known = &mut self.workers[worker];
        let sequence = known.scheduler.submit(request, self.now).expect("its length was checked");
        known.requests.insert(sequence, id);
        self.fetch(id, worker, sequence);
        self.kick(worker);
    }

    /// Begins to fetch what a peer has of the prompt.
    fn fetch(&mut self, id: RequestId, worker: usize, sequence: SequenceId) {
        let live = &self.live[id];
        let (Some(history), Some(fetch)) = (&live.history, live.choice.and_then(|choice| choice.fetch)) else { return };
        let Fetch { holder, pages } = fetch;
        let hashes = &history.hashes()[..pages as usize];
        // It may have given some up since the router knew of them, and then it refuses.
        if self.workers[holder].scheduler.pool().matching(hashes) < hashes.len() {
            return;
        }
        let known = &mut self.workers[worker];
        let Some(prefix) = known.scheduler.reserve_prefix(hashes) else { return };
        known.scheduler.await_prefix(sequence, hashes.len());
        let bytes = (hashes.len() - prefix.have()) as u64 * self.config.page_bytes();
        self.live[id].prefix = Some((prefix, sequence));
        self.fetched += 1;
        let come = self.workers[holder].link.send(bytes, self.now + self.config.message);
        self.at(come + self.config.message, Event::Fetched(id));
    }

    fn fetched(&mut self, id: RequestId) {
        let live = &mut self.live[id];
        let (prefix, sequence) = live.prefix.take().expect("it was fetched");
        let (history, choice) = (live.history.as_ref().expect("it lives"), live.choice.expect("it was placed"));
        let worker = choice.prefill.unwrap_or(choice.decode);
        let pages = prefix.pages().len();
        let known = &mut self.workers[worker];
        known.scheduler.keep_prefix(prefix, &history.hashes()[..pages]);
        known.scheduler.settle_prefix(sequence, 0);
        self.kick(worker);
    }

    /// Lets a worker do what it can.
    fn kick(&mut self, worker: usize) {
        self.open(worker);
        let Some((took, started)) = self.workers[worker].begin_step(self.now) else { return };
        self.at(self.now + took, Event::Step { worker, took });
        for sequence in started {
            let id = self.workers[worker].requests[&sequence];
            if let Some((usage, _)) = self.workers[worker].scheduler.usage_of(sequence, self.now)
                && !self.live[id].counted
            {
                self.live[id].counted = true;
                self.cached_tokens += usage.cached_tokens as u64;
            }
            if worker < self.config.prefill {
                let decode = self.live[id].choice.expect("it was placed").decode;
                let ticket = self.workers[decode].scheduler.ticket(0);
                self.workers[decode].waiting.push_back((ticket, id));
                self.open(decode);
            }
        }
    }

    /// Gives pages to those that wait for them, in order.
    fn open(&mut self, worker: usize) {
        while let Some(&(ticket, id)) = self.workers[worker].waiting.front() {
            let history = self.live[id].history.as_ref().expect("it lives");
            match self.workers[worker].scheduler.reserve(ticket, history.hashes(), history.len()) {
                Ok(landing) => {
                    self.live[id].landing = Some(landing);
                    self.live[id].opened = Some(self.now);
                    self.transfer(id);
                }
                Err(NoRoom::Now) => return,
                Err(NoRoom::Ever) => unreachable!("its length was checked"),
            }
            self.workers[worker].waiting.pop_front();
        }
    }

    fn end_step(&mut self, worker: usize, took: Duration) {
        self.busy[worker] += took;
        let computed = self.workers[worker].end_step(self.now, took);
        for drawn in computed.drawn {
            let id = self.workers[worker].requests[&drawn.id];
            if self.live[id].pieces.is_empty() {
                let live = &self.live[id];
                let pages = live.history.as_ref().expect("it lives").hashes();
                self.router.computed(worker, live.number, pages);
            }
            self.live[id].pieces.push(self.now + self.config.message);
            let Some((finish, Ended { hold, .. })) = drawn.ended else { continue };
            self.workers[worker].requests.remove(&drawn.id);
            self.live[id].hold = hold;
            if finish == Finish::FirstToken {
                self.live[id].computed = Some(self.now);
                self.transfer(id);
            } else {
                self.end(id, worker);
            }
        }
        self.report(worker);
        self.kick(worker);
    }

    /// Sends a prompt's pages when they are computed and have a place to go.
    fn transfer(&mut self, id: RequestId) {
        let live = &self.live[id];
        let (Some(opened), Some(computed), Some(landing)) = (live.opened, live.computed, &live.landing) else { return };
        let prefill = live.choice.and_then(|choice| choice.prefill).expect("it is handed off");
        let bytes = (landing.pages().len() - landing.have()) as u64 * self.config.page_bytes();
        // Most of them have left while the rest was computed.
        let link = &mut self.workers[prefill].link;
        let sent = link.send(bytes, opened).max(computed + link.time(bytes) / Self::GROUPS).max(opened);
        self.at(sent + self.config.message, Event::Landed(id));
    }

    fn landed(&mut self, id: RequestId) {
        let Choice { prefill, decode, .. } = self.live[id].choice.expect("it was placed");
        let prefill = prefill.expect("it was handed off");
        if let Some(hold) = self.live[id].hold.take() {
            self.workers[prefill].scheduler.give_back(hold);
        }
        self.workers[prefill].legs -= 1;
        let live = &mut self.live[id];
        let (history, landing) = (live.history.clone().expect("it lives"), live.landing.take().expect("it was opened"));
        let asked = &self.trace.requests[id];
        let request = request(history, asked.output_tokens, Until::End);
        let sequence = self.workers[decode].scheduler.land(landing, request, TokenId::MAX, asked.at);
        self.workers[decode].requests.insert(sequence, id);
        self.kick(decode);
        self.kick(prefill);
        if self.workers[prefill].is_idle() {
            self.report(prefill);
        }
    }

    /// The last token of a request was drawn at `worker`.
    fn end(&mut self, id: RequestId, worker: usize) {
        self.workers[worker].legs -= 1;
        let live = std::mem::take(&mut self.live[id]);
        if let Some(hold) = live.hold {
            self.workers[worker].scheduler.give_back(hold);
        }
        let decode = live.choice.expect("it was placed").decode;
        if decode != worker {
            // One token was all it wanted: nothing is handed off.
            let other = &mut self.workers[decode];
            other.legs -= 1;
            other.waiting.retain(|(_, waiting)| *waiting != id);
            if let Some(landing) = live.landing {
                let hold = other.scheduler.forgo(landing);
                other.scheduler.give_back(hold);
            }
            self.kick(decode);
        }
        let asked = &self.trace.requests[id];
        self.served.push(Served { arrived: asked.at, pieces: live.pieces, output_tokens: asked.output_tokens });
    }

    fn report(&mut self, worker: usize) {
        let known = &mut self.workers[worker];
        let (report, delta) = (known.report(), known.take_delta());
        self.at(self.now + self.config.message, Event::Report { worker, report, delta });
    }

    // ---- what is measured ----

    fn watch(&mut self) {
        if self.now < self.fairness.next {
            return;
        }
        self.fairness.next = self.now + Self::WATCH;
        let (prefill, decode) = self.workers.split_at(self.config.prefill);
        for (kind, workers) in [prefill, decode].into_iter().enumerate() {
            let crowded = workers.iter().any(|worker| worker.scheduler.backlog().waiting > CROWD);
            let unfair = crowded && workers.iter().any(Worker::is_idle);
            let since = &mut self.fairness.since[kind];
            *since = unfair.then(|| since.unwrap_or(self.now));
            self.fairness.longest = self.fairness.longest.max(since.map_or(Duration::ZERO, |since| self.now - since));
        }
    }

    fn outcome(self) -> Outcome {
        let share = |busy: &[Duration]| {
            busy.iter().sum::<Duration>().as_secs_f64() / self.now.as_secs_f64() / busy.len().max(1) as f64
        };
        let (prefill, decode) = self.busy.split_at(self.config.prefill);
        Outcome {
            summary: Summary::of(&self.served, self.failed, self.config.objectives),
            local: self.local,
            fetched: self.fetched,
            cached: self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64,
            idle_beside_crowd_s: self.fairness.longest.as_secs_f64(),
            busy: [share(prefill), share(decode)],
        }
    }
}
