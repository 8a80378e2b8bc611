//! The workers, live.
//!
//! The fleet follows the directory, keeps one stream to every worker that serves our model ([`link`]), and knows of each what a placement
//! asks: load, speeds, cached prefixes. Wire types stop here.

pub(crate) mod adapters;
pub(crate) mod events;
pub(crate) mod leg;
mod link;
pub(crate) mod session;
mod wire;

use crate::{
    config::{Config, Limits, Policy, Weights},
    cost::{self, Cost, Demand},
    metrics::Metrics,
    placement::{self, Candidate, Choice, Kind, NoPath},
    prefix_index::{PrefixIndex, Slot},
};
use cluster::{Directory, Member, ModelCard, Role, State, View};
use kv_cache::PageHash;
use session::Session;
use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;
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
    policy: Policy,
    weights: Weights,
    limits: Limits,
    workers: RwLock<Vec<Arc<Worker>>>,
    /// Fingerprints seen, in order of appearance: candidates carry the number.
    fingerprints: Mutex<Vec<String>>,
    index: Mutex<PrefixIndex>,
    next_attempt: AtomicU64,
    /// Grows when a worker comes, goes, drains or changes its adapters.
    version: watch::Sender<u64>,
    metrics: Metrics,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// A worker, attached or not.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Member id.
    pub(crate) id: String,
    kind: Kind,
    /// Where it is; its link task follows.
    member: watch::Sender<Member>,
    state: Mutex<WorkerState>,
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
    /// Tokens of the demand it has to compute.
    pub(crate) missing_tokens: u32,
}

/// Who takes a request.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// `None` when the decode worker computes the prompt itself.
    pub(crate) prefill: Option<Target>,
    pub(crate) decode: Target,
    pub(crate) cost: Cost,
}

/// A prompt as placement sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) demand: Demand,
    /// Names of the full pages of the demand.
    pub(crate) pages: &'a [PageHash],
    /// Workers that failed it before.
    pub(crate) excluded: &'a [String],
    /// Id of the adapter it needs.
    pub(crate) adapter: Option<&'a str>,
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
            policy: config.placement,
            weights: config.weights.clone(),
            limits: config.limits.clone(),
            workers: RwLock::default(),
            fingerprints: Mutex::default(),
            index: Mutex::new(PrefixIndex::new(config.prefix_index_bytes)),
            next_attempt: AtomicU64::new(1),
            version: watch::Sender::new(0),
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
        let mut leading = Vec::new();
        if !wanted.pages.is_empty() {
            self.index().matches(wanted.pages, &mut leading);
        }
        let workers = self.workers();
        let seen: Vec<Option<(Candidate, Connection)>> =
            workers.iter().enumerate().map(|(id, worker)| worker.candidate(id, wanted, &leading)).collect();
        let candidates: Vec<Candidate> = seen.iter().flatten().map(|(candidate, _)| candidate.clone()).collect();
        let decision = placement::place(&wanted.demand, &candidates, self.policy, &self.weights, random)?;
        let target = |id: usize, computes: bool| {
            let (candidate, connection) = seen[id].as_ref().expect("placement chose a candidate");
            let missing_tokens = if computes { candidate.cost.missing_tokens(&wanted.demand) } else { 0 };
            workers[id].target(connection, missing_tokens)
        };
        let (prefill, decode) = match decision.choice {
            Choice::Local { decode } => (None, target(decode, true)),
            // The decode worker receives the prompt's pages, it does not compute them.
            Choice::Remote { prefill, decode } => (Some(target(prefill, true)), target(decode, false)),
        };
        Ok(Path { prefill, decode, cost: decision.cost })
    }

    /// Whether a request, for the adapter with this id if there is one, could be placed now.
    pub(crate) fn has_path(&self, adapter: Option<&str>) -> bool {
        let demand = Demand { tokens: 1, max_output: 1 };
        let wanted = Wanted { demand, pages: &[], excluded: &[], adapter };
        let candidates: Vec<Candidate> =
            self.workers().iter().enumerate().filter_map(|(id, w)| Some(w.candidate(id, &wanted, &[])?.0)).collect();
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
        for member in view.members.values() {
            let Some((kind, card)) = self.serves_us(member) else { continue };
            let fingerprint = self.fingerprint(&card.fingerprint);
            match known.iter().find(|worker| worker.id == member.id && worker.kind == kind) {
                Some(worker) => worker.update(member, card, fingerprint),
                None => {
                    let gone = self.shutdown.child_token();
                    self.add(Worker::new(member, kind, card.clone(), fingerprint, gone));
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

impl Worker {
    fn new(member: &Member, kind: Kind, card: ModelCard, fingerprint: usize, gone: CancellationToken) -> Self {
        let state = WorkerState {
            card,
            fingerprint,
            capacity_pages: member.capacity.pages,
            listed: true,
            draining: member.state == State::Draining,
            attached: None,
        };
        let id = member.id.clone();
        Self { id, kind, member: watch::Sender::new(member.clone()), state: Mutex::new(state), gone }
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

    /// The worker as placement sees it, if it is attached. `leading` is indexed by slot.
    fn candidate(&self, id: usize, wanted: &Wanted<'_>, leading: &[u32]) -> Option<(Candidate, Connection)> {
        let state = self.state();
        let connection = state.attached.clone()?;
        let load = connection.session.load();
        let card = &state.card;
        let cost = cost::Worker {
            sequences: load.sequences,
            queued_tokens: load.queued_tokens,
            free_pages: load.free_pages.unwrap_or(state.capacity_pages),
            cached_pages: leading.get(connection.slot.index()).copied().unwrap_or(0),
            page_tokens: card.page_tokens,
            page_bytes: card.page_bytes,
            speed: load.speed,
        };
        let candidate = Candidate {
            id,
            kind: self.kind,
            fingerprint: state.fingerprint,
            draining: state.draining || load.draining,
            excluded: wanted.excluded.contains(&self.id),
            lacks_adapter: wanted.adapter.is_some_and(|id| !connection.session.has_adapter(id)),
            max_tokens: card.max_model_len,
            cost,
        };
        Some((candidate, connection))
    }

    fn target(self: &Arc<Self>, connection: &Connection, missing_tokens: u32) -> Target {
        let member = self.member.borrow();
        Target {
            worker: self.clone(),
            session: connection.session.clone(),
            // A worker that had to register again is known by its newer incarnation; one that restarted says so itself.
            incarnation: connection.incarnation.max(member.incarnation),
            link: member.link.clone(),
            missing_tokens,
        }
    }
}
