//! The workers, live.
//!
//! The fleet follows the directory, keeps one stream to every worker that serves our model ([`link`]), and knows of each what a placement
//! asks: load, speeds, cached prefixes. Wire types stop here.

pub(crate) mod adapters;
pub(crate) mod events;
pub(crate) mod leg;
mod link;
mod reset;
pub(crate) mod session;
mod wire;

use crate::{
    breaker::Breaker,
    config::{Config, Limits},
    metrics::Metrics,
};
use admission::{Supply, Working};
use cluster::{Directory, Member, ModelCard, Role, State, View};
use kv_cache::PageHash;
use placement::{
    Candidate, Choice, Cost, Decision, Demand, Fetch, Kind, NoPath, Policy, PrefixIndex, Siblings, Slot, Weights,
};
use session::{Asks, Session};
use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Tokens in a page, until a worker says otherwise.
const DEFAULT_PAGE_TOKENS: u32 = 16;

/// Handle to the workers. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Fleet {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// This router's member id, told to the workers.
    router: String,
    model_name: String,
    /// Whether there is one worker, and this is its own door.
    alone: bool,
    policy: Policy,
    weights: Weights,
    limits: Limits,
    workers: RwLock<Vec<Arc<Worker>>>,
    /// Fingerprints seen, in order of appearance: candidates carry the number.
    fingerprints: Mutex<Vec<String>>,
    index: Mutex<PrefixIndex>,
    siblings: Mutex<Siblings>,
    next_attempt: AtomicU64,
    /// Grows when a worker comes, goes, drains or changes its adapters.
    version: watch::Sender<u64>,
    /// Other routers in the directory, whose submissions show only in the workers' reports.
    peers: AtomicU32,
    started: Instant,
    metrics: Metrics,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// A worker, attached or not.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Member id.
    pub(crate) id: String,
    /// Tells it from every other that this router has known.
    serial: u64,
    kind: Kind,
    /// Where it is; its link task follows.
    member: watch::Sender<Member>,
    state: Mutex<WorkerState>,
    breaker: Mutex<Breaker>,
    /// Cancelled when the fleet has forgotten it.
    gone: CancellationToken,
}

#[derive(Debug)]
struct WorkerState {
    card: ModelCard,
    fingerprint: usize,
    capacity_pages: u32,
    /// Whether the directory still knows it.
    listed: bool,
    draining: bool,
    attached: Option<Connection>,
}

#[derive(Clone, Debug)]
struct Connection {
    session: Arc<Session>,
    /// As the worker itself said.
    incarnation: u64,
    slot: Slot,
}

/// A worker chosen for a leg.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) worker: Arc<Worker>,
    pub(crate) session: Arc<Session>,
    pub(crate) incarnation: u64,
    /// `host:port` of its link listener.
    pub(crate) link: String,
    /// What the leg takes there.
    pub(crate) asks: Asks,
}

/// Who takes a request.
#[derive(Debug)]
pub(crate) struct Path {
    /// `None` when the decode worker computes the prompt itself.
    pub(crate) prefill: Option<Target>,
    pub(crate) decode: Target,
    /// Who has a part of the prompt that whoever computes it lacks, and how many leading pages that are.
    pub(crate) fetch: Option<(Target, u32)>,
    pub(crate) cost: Cost,
    /// Whether whoever computes the prompt has measured how fast it is.
    pub(crate) measured: bool,
    /// The chosen way and the next best ones, cheapest first.
    pub(crate) considered: Vec<Considered>,
    /// Lets those that begin alike follow, until the prompt is computed; `None` where nobody is bound.
    pub(crate) computing: Option<Computing>,
}

/// A way that a request could have gone.
#[derive(Clone, Debug)]
pub(crate) struct Considered {
    pub(crate) prefill: Option<Arc<Worker>>,
    pub(crate) decode: Arc<Worker>,
    pub(crate) chosen: bool,
    /// Tokens of the demand, and those of them that are cached at whoever computes it, or fetched there.
    pub(crate) tokens: u32,
    pub(crate) cached_tokens: u32,
    /// From whom pages would be fetched first.
    pub(crate) fetched_from: Option<Arc<Worker>>,
    pub(crate) cost: Cost,
}

/// A prompt that a worker will compute, for those that begin like it. Dropping it says that it is computed, or will not be.
#[derive(Debug)]
pub(crate) struct Computing {
    fleet: Fleet,
    worker: u64,
    number: u64,
    first: PageHash,
}

impl Drop for Computing {
    fn drop(&mut self) {
        self.fleet.siblings().remove(self.worker, self.number, self.first);
    }
}

/// Where peers fetch pages of the only worker.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    pub(crate) worker: String,
    pub(crate) incarnation: u64,
    /// `host:port` of its link listener.
    pub(crate) link: String,
}

/// A prompt as placement sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) demand: Demand,
    /// Names of the full pages of the demand; `None` where all of it is to be computed.
    pub(crate) pages: Option<&'a Arc<[PageHash]>>,
    /// Workers that failed it before.
    pub(crate) excluded: &'a [String],
    /// Id of the adapter it needs.
    pub(crate) adapter: Option<&'a str>,
    /// Whether workers that keep failing are better than nobody.
    pub(crate) desperate: bool,
}

impl Deref for Fleet {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl Fleet {
    /// Starts to follow `directory` until `shutdown`.
    pub(crate) fn start(
        config: &Config,
        router: &str,
        directory: &dyn Directory,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> Self {
        let inner = Inner {
            router: router.to_string(),
            model_name: config.model_name.clone(),
            alone: config.kv_transfer.is_some(),
            policy: config.placement,
            weights: config.weights.clone(),
            limits: config.limits.clone(),
            workers: RwLock::default(),
            fingerprints: Mutex::default(),
            index: Mutex::new(PrefixIndex::new(config.prefix_index_bytes)),
            siblings: Mutex::default(),
            next_attempt: AtomicU64::new(1),
            version: watch::Sender::new(0),
            peers: AtomicU32::new(0),
            started: Instant::now(),
            metrics,
            tasks: TaskTracker::new(),
            shutdown: shutdown.clone(),
        };
        let fleet = Self { inner: Arc::new(inner) };
        let mut view = directory.watch();
        fleet.tasks.spawn({
            let fleet = fleet.clone();
            async move {
                loop {
                    let now = view.borrow_and_update().clone();
                    fleet.reconcile(&now);
                    tokio::select! {
                        changed = view.changed() => if changed.is_err() { return },
                        () = shutdown.cancelled() => return,
                    }
                }
            }
        });
        fleet
    }

    /// Waits until every task has ended; they do so at the shutdown given to [`Fleet::start`].
    pub(crate) async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Returns a number for a leg, unique in this router.
    pub(crate) fn next_attempt(&self) -> u64 {
        self.next_attempt.fetch_add(1, Ordering::Relaxed)
    }

    /// Chooses who takes a request. `random` breaks ties.
    pub(crate) fn place(&self, wanted: &Wanted<'_>, random: u64) -> Result<Path, NoPath> {
        loop {
            let mut path = self.choose(wanted, random)?;
            let now = self.now();
            // Of a worker that kept failing one probe at a time is taken; whose was not is placed again, without it.
            if path.workers().all(|worker| worker.breaker().begin(now)) || wanted.desperate {
                if let Some((holder, _)) = &path.fetch {
                    holder.session.lends(path.cost.fetch);
                }
                let computes = path.prefill.as_ref().unwrap_or(&path.decode);
                path.computing = wanted.pages.and_then(|pages| self.computing(&computes.worker, pages));
                return Ok(path);
            }
        }
    }

    /// Says who would take a request, and binds nobody.
    pub(crate) fn choose(&self, wanted: &Wanted<'_>, random: u64) -> Result<Path, NoPath> {
        let now = self.now();
        let (mut leading, mut coming) = (Vec::new(), HashMap::new());
        if let Some(pages) = wanted.pages {
            self.index().matches(pages, &mut leading);
            self.siblings().matches(pages, |worker, pages| {
                let most = coming.entry(worker).or_insert(pages);
                *most = pages.max(*most);
            });
        }
        let workers = self.workers();
        let candidate = |(id, worker): (usize, &Arc<Worker>)| worker.candidate(id, wanted, &leading, &coming, now);
        let (candidates, connections): (Vec<Candidate>, Vec<Connection>) =
            workers.iter().enumerate().filter_map(candidate).unzip();
        let peers = self.peers.load(Ordering::Relaxed);
        let placed = placement::place_beside(peers, &wanted.demand, &candidates, self.policy, &self.weights, random)?;
        let Choice { prefill, decode, fetch } = placed.decision.choice;
        // Candidates are in the order of their numbers.
        let seen = |id: usize| candidates.binary_search_by_key(&id, |c| c.id).expect("placement names candidates");
        let known = |id: usize| &candidates[seen(id)].cost;
        let target = |id: usize, computes: bool| {
            let compute_ms = if computes { placed.decision.cost.compute } else { 0.0 };
            let pages = known(id).missing_pages(&wanted.demand);
            workers[id].target(&connections[seen(id)], Asks { compute_ms, pages })
        };
        let way = |other: &Decision| {
            let Choice { prefill, decode, fetch } = other.choice;
            let cached = known(prefill.unwrap_or(decode));
            let pages = fetch.map_or(cached.cached_pages, |fetch| fetch.pages);
            Considered {
                prefill: prefill.map(|id| workers[id].clone()),
                decode: workers[decode].clone(),
                chosen: other.choice == placed.decision.choice,
                tokens: wanted.demand.tokens,
                cached_tokens: pages.saturating_mul(cached.page_tokens).min(wanted.demand.tokens),
                fetched_from: fetch.map(|fetch| workers[fetch.holder].clone()),
                cost: other.cost,
            }
        };
        let mut considered: Vec<Considered> =
            std::iter::once(&placed.decision).chain(&placed.runners_up).map(way).collect();
        considered.sort_by(|a, b| a.cost.total().total_cmp(&b.cost.total()));
        let measured = known(prefill.unwrap_or(decode)).speed.pace.is_some();
        let fetch = fetch.map(|Fetch { holder, pages }| (target(holder, false), pages));
        // A decode worker that is handed the prompt's pages does not compute them.
        let decode = target(decode, prefill.is_none());
        let prefill = prefill.map(|id| target(id, true));
        Ok(Path { prefill, decode, fetch, cost: placed.decision.cost, measured, considered, computing: None })
    }

    /// Returns what the workers can be sent before all of them have enough to do.
    pub(crate) fn supply(&self) -> Supply {
        let now = self.now();
        let workers = self.workers();
        let working: Vec<Working> = workers.iter().filter_map(|worker| worker.working(now, &self.weights)).collect();
        admission::supply(&working, self.policy, self.limits.worker_backlog_ms as f64)
    }

    /// A leg on this worker spoke.
    pub(crate) fn succeeded(&self, worker: &Worker) {
        let closed = worker.breaker().succeeded(self.now());
        if closed {
            tracing::info!(worker = %worker.id, "worker answers again: its circuit breaker closes");
            self.metrics.breaker(&worker.id, false);
        }
    }

    /// A leg failed for which the worker with this id is to blame.
    pub(crate) fn failed(&self, id: &str, why: &str) {
        let workers = self.workers();
        let Some(worker) = workers.iter().find(|worker| worker.id == id) else { return };
        let opened = worker.breaker().failed(self.now());
        if let Some(pause) = opened {
            tracing::warn!(worker = %id, ?pause, why, "worker keeps failing: its circuit breaker opens");
            self.metrics.breaker(id, true);
        }
    }

    /// Time since the fleet was started.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether a request, for the adapter with this id if there is one, could be placed now.
    pub(crate) fn has_path(&self, adapter: Option<&str>) -> bool {
        let demand = Demand { tokens: 1, max_output: 1 };
        let wanted = Wanted { demand, pages: None, excluded: &[], adapter, desperate: true };
        let (workers, now, nothing) = (self.workers(), self.now(), HashMap::new());
        let candidate =
            |(id, worker): (usize, &Arc<Worker>)| Some(worker.candidate(id, &wanted, &[], &nothing, now)?.0);
        let candidates: Vec<Candidate> = workers.iter().enumerate().filter_map(candidate).collect();
        placement::has_path(&candidates, self.policy)
    }

    /// Waits until [`Fleet::has_path`].
    pub(crate) async fn wait_for_path(&self, adapter: Option<&str>) {
        let mut version = self.version.subscribe();
        while !self.has_path(adapter) {
            if version.changed().await.is_err() {
                return;
            }
        }
    }

    /// Grows when a worker comes, goes or drains.
    pub(crate) fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Returns the longest sequence any attached worker holds, in tokens.
    pub(crate) fn max_model_len(&self) -> Option<u32> {
        self.cards(|card| card.max_model_len).max()
    }

    /// Returns the tokens in a page.
    pub(crate) fn page_tokens(&self) -> usize {
        self.cards(|card| card.page_tokens).next().unwrap_or(DEFAULT_PAGE_TOKENS).max(1) as usize
    }

    /// Returns the worker that this router is the door of, if it is attached.
    pub(crate) fn door(&self) -> Option<Door> {
        let workers = self.workers();
        let worker = workers.first()?;
        let connection = worker.state().attached.clone()?;
        let member = worker.member.borrow();
        let incarnation = connection.incarnation.max(member.incarnation);
        Some(Door { worker: worker.id.clone(), incarnation, link: member.link.clone() })
    }

    /// Bytes the prefix index uses.
    pub(crate) fn prefix_index_bytes(&self) -> usize {
        self.index().bytes()
    }

    /// Returns how many prefill and how many decode workers are attached.
    pub(crate) fn attached(&self) -> (usize, usize) {
        let workers = self.workers();
        let count = |kind| workers.iter().filter(|w| w.kind == kind && w.state().attached.is_some()).count();
        (count(Kind::Prefill), count(Kind::Decode))
    }

    fn cards<T>(&self, field: impl Fn(&ModelCard) -> T) -> impl Iterator<Item = T> {
        let workers = self.workers();
        let attached = workers.iter().filter_map(|worker| {
            let state = worker.state();
            state.attached.as_ref().map(|_| field(&state.card))
        });
        attached.collect::<Vec<_>>().into_iter()
    }

    fn workers(&self) -> Vec<Arc<Worker>> {
        self.workers.read().expect("no code panics while it holds the list").clone()
    }

    fn siblings(&self) -> MutexGuard<'_, Siblings> {
        self.siblings.lock().expect("no code panics while it holds the siblings")
    }

    /// Notes that `worker` will compute the prompt with these full pages.
    fn computing(&self, worker: &Worker, pages: &Arc<[PageHash]>) -> Option<Computing> {
        let (first, number) = (*pages.first()?, self.next_attempt());
        self.siblings().add(worker.serial, number, pages);
        Some(Computing { fleet: self.clone(), worker: worker.serial, number, first })
    }

    fn index(&self) -> MutexGuard<'_, PrefixIndex> {
        self.index.lock().expect("no code panics while it holds the index")
    }

    /// Says that a worker came, went or drains.
    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
        let (prefill, decode) = self.attached();
        self.metrics.fleet_size(Kind::Prefill, prefill);
        self.metrics.fleet_size(Kind::Decode, decode);
    }

    /// Makes the workers those of the view. One that is no longer listed stays while its stream lives.
    fn reconcile(&self, view: &View) {
        let known = self.workers();
        let others = view.members.values().filter(|member| member.role == Role::Router && member.id != self.router);
        self.peers.store(others.count() as u32, Ordering::Relaxed);
        for member in view.members.values() {
            let Some((kind, card)) = self.serves_us(member) else { continue };
            let fingerprint = self.fingerprint(&card.fingerprint);
            match known.iter().find(|worker| worker.id == member.id && worker.kind == kind) {
                Some(worker) => worker.update(member, card, fingerprint),
                None => {
                    let gone = self.shutdown.child_token();
                    let serial = self.next_attempt();
                    self.add(Worker::new(member, kind, card.clone(), fingerprint, serial, gone));
                }
            }
        }
        // A directory that cannot be reached keeps its last view; nobody has left.
        if view.connected {
            for worker in known.iter().filter(|worker| !view.members.contains_key(&worker.id)) {
                worker.state().listed = false;
                self.drop_unlisted(worker);
            }
        }
        self.changed();
    }

    fn serves_us<'a>(&self, member: &'a Member) -> Option<(Kind, &'a ModelCard)> {
        let kind = match member.role {
            // At its own door it takes prompts whole, as far as their first token.
            Role::Prefill if self.alone => Kind::Decode,
            Role::Prefill => Kind::Prefill,
            Role::Decode => Kind::Decode,
            Role::Router => return None,
        };
        let card = member.model.as_ref()?;
        if card.name != self.model_name {
            tracing::debug!(worker = %member.id, serves = %card.name, wanted = %self.model_name, "worker of another model");
            return None;
        }
        Some((kind, card))
    }

    fn fingerprint(&self, fingerprint: &str) -> usize {
        let mut known = self.fingerprints.lock().expect("no code panics while it holds the list");
        known.iter().position(|f| f == fingerprint).unwrap_or_else(|| {
            known.push(fingerprint.to_string());
            known.len() - 1
        })
    }

    fn add(&self, worker: Worker) {
        let worker = Arc::new(worker);
        self.workers.write().expect("no code panics while it holds the list").push(worker.clone());
        let member = worker.member.subscribe();
        self.tasks.spawn(link::run(self.clone(), worker, member));
    }

    /// Forgets a worker that is neither listed nor attached.
    fn drop_unlisted(&self, worker: &Arc<Worker>) {
        let mut workers = self.workers.write().expect("no code panics while it holds the list");
        let state = worker.state();
        if !state.listed && state.attached.is_none() {
            workers.retain(|other| !Arc::ptr_eq(other, worker));
            worker.gone.cancel();
        }
    }
}

impl Path {
    /// The path of what ends with its prompt, as an embedding does: whoever would compute the prompt is all there is to it.
    pub(crate) fn without_handoff(mut self) -> Self {
        if let Some(prefill) = self.prefill.take() {
            for way in self.considered.iter_mut().filter(|way| way.chosen) {
                (way.prefill, way.decode) = (None, prefill.worker.clone());
            }
            self.decode = prefill;
        }
        self
    }

    /// Returns those who take part.
    fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.prefill.iter().chain([&self.decode]).map(|target| &target.worker)
    }
}

impl Worker {
    fn new(
        member: &Member,
        kind: Kind,
        card: ModelCard,
        fingerprint: usize,
        serial: u64,
        gone: CancellationToken,
    ) -> Self {
        let state = WorkerState {
            card,
            fingerprint,
            capacity_pages: member.capacity.pages,
            listed: true,
            draining: member.state == State::Draining,
            attached: None,
        };
        Self {
            id: member.id.clone(),
            serial,
            kind,
            member: watch::Sender::new(member.clone()),
            state: Mutex::new(state),
            breaker: Mutex::default(),
            gone,
        }
    }

    fn update(&self, member: &Member, card: &ModelCard, fingerprint: usize) {
        {
            let mut state = self.state();
            state.card.clone_from(card);
            state.fingerprint = fingerprint;
            state.capacity_pages = member.capacity.pages;
            state.listed = true;
            state.draining = member.state == State::Draining;
        }
        self.member.send_if_modified(|known| {
            let moved = known.address != member.address || known.incarnation != member.incarnation;
            known.clone_from(member);
            moved
        });
    }

    fn attached(&self, session: Arc<Session>, incarnation: u64, slot: Slot) {
        self.state().attached = Some(Connection { session, incarnation, slot });
    }

    fn moved(&self, slot: Slot) {
        if let Some(connection) = &mut self.state().attached {
            connection.slot = slot;
        }
    }

    fn detached(&self) {
        self.state().attached = None;
    }

    fn state(&self) -> MutexGuard<'_, WorkerState> {
        self.state.lock().expect("no code panics while it holds a worker's state")
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // It is whole between any two of its calls.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker as admission sees it, if it takes requests.
    fn working(&self, now: Duration, weights: &Weights) -> Option<Working> {
        let state = self.state();
        let session = &state.attached.as_ref()?.session;
        if state.draining || session.draining() || !self.breaker().allows(now) {
            return None;
        }
        Some(session.ledger(|ledger, at| Working {
            kind: self.kind,
            sequences: ledger.sequences(),
            backlog_ms: ledger.backlog_ms(at),
            free_tokens: u64::from(ledger.free_pages(state.capacity_pages)) * u64::from(state.card.page_tokens),
            tokens_per_s: 1e6 / ledger.speed().pace.unwrap_or(weights.prior).token_us.max(1e-3),
        }))
    }

    /// The worker as placement sees it, if it is attached. `leading` is indexed by slot.
    fn candidate(
        &self,
        id: usize,
        wanted: &Wanted<'_>,
        leading: &[u32],
        coming: &HashMap<u64, u32>,
        now: Duration,
    ) -> Option<(Candidate, Connection)> {
        let state = self.state();
        let connection = state.attached.clone()?;
        let card = &state.card;
        let cost = connection.session.ledger(|ledger, now| placement::Worker {
            sequences: ledger.sequences(),
            backlog_ms: ledger.backlog_ms(now),
            sending_ms: ledger.sending_ms(now),
            free_pages: ledger.free_pages(state.capacity_pages),
            held_pages: ledger.held_pages(),
            cached_pages: leading.get(connection.slot.index()).copied().unwrap_or(0),
            coming_pages: coming.get(&self.serial).copied().unwrap_or(0),
            page_tokens: card.page_tokens,
            page_bytes: card.page_bytes,
            speed: ledger.speed(),
        });
        let candidate = Candidate {
            id,
            kind: self.kind,
            fingerprint: state.fingerprint,
            draining: state.draining || connection.session.draining(),
            excluded: wanted.excluded.contains(&self.id) || !(wanted.desperate || self.breaker().allows(now)),
            lacks_adapter: wanted.adapter.is_some_and(|id| !connection.session.has_adapter(id)),
            max_tokens: card.max_model_len,
            cost,
        };
        Some((candidate, connection))
    }

    fn target(self: &Arc<Self>, connection: &Connection, asks: Asks) -> Target {
        let member = self.member.borrow();
        Target {
            worker: self.clone(),
            session: connection.session.clone(),
            // A worker that had to register again is known by its newer incarnation; one that restarted says so itself.
            incarnation: connection.incarnation.max(member.incarnation),
            link: member.link.clone(),
            asks,
        }
    }
}
