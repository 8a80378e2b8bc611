//! The thread that owns a worker's UCX context: its loop, and the links on it.

use super::{
    LinkPath, Shared, UcxConfig, Window,
    allocated::Allocated,
    handles::{Context, Endpoint, From, Memory, Request, Worker},
    open, survey,
};
use crate::{
    digest::FrameHasher,
    link::LinkStop,
    message::Message,
    pages::Pages,
    plan::{self, Place},
    transport::{Job, JobQueue, shm::Remote},
};
use kv_cache::Extent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    collections::{HashMap, VecDeque},
    io::Read,
    iter,
    ops::Deref,
    os::unix::net::UnixStream,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Frames of one link that are put at once: enough to keep a wire busy, few because a cancelled hand-off waits for them.
const MOST_POSTED: usize = 4;
/// How long to spin for what is under way before sleeping.
const SPIN: Duration = Duration::from_micros(5);
/// How long to sleep at most while there is a link: a guard against a wake-up that a transport of UCX has lost.
const DOZE: Duration = Duration::from_millis(20);
/// How long to sleep at first when UCX waits for what it cannot be woken for, such as room in a peer's queue in shared memory; longer,
/// the longer that takes.
const NAP: Duration = Duration::from_micros(50);

/// How long a link that is closed may take to end what is under way, before it is cut off. UCX (to 1.22 at least) brings the target's
/// process down where it answers puts that are messages to a connection that is gone (`ucp_rma_sw_send_cmpl`). Short, for pages wait for it.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What the thread is asked for.
#[derive(Debug)]
pub(super) enum Command {
    /// Target: make the worker of a link.
    Accept { token: u64, reply: oneshot::Sender<Result<Window, String>> },
    /// Target: connect it to the source's, at `address`.
    Meet { token: u64, address: Vec<u8>, reply: oneshot::Sender<Result<(), String>> },
    /// Target: destroy it.
    Release { token: u64, reply: oneshot::Sender<()> },
    /// Source: make the worker of a link, and connect it once the target expects that.
    Open { connect: Box<Connect>, address: oneshot::Sender<Result<Vec<u8>, String>> },
}

/// Who waits for a link to come up.
type Reply = oneshot::Sender<Result<Option<Pages>, String>>;

/// A link to be made.
#[derive(Debug)]
pub(super) struct Connect {
    pub(super) window: Window,
    pub(super) path: LinkPath,
    pub(super) queue: Arc<JobQueue>,
    /// Set when the link is to end.
    pub(super) closed: Arc<AtomicBool>,
    pub(super) stop: LinkStop,
    /// Dropped when no write can land any more.
    pub(super) word: Option<Remote>,
    /// Says that the target expects it.
    pub(super) expected: oneshot::Receiver<()>,
    /// Gets the target's pool, where it is mapped.
    pub(super) reply: Reply,
}

/// A source's worker whose target does not expect it yet. It makes no progress: whatever comes is for the endpoint that it will have.
#[derive(Debug)]
struct Opening {
    worker: Worker,
    connect: Connect,
}

/// A target's end of a link: a worker, and from when the source is known an endpoint.
#[derive(Debug)]
enum Incoming {
    Alone(Worker),
    Met(Endpoint),
}

impl Incoming {
    fn worker(&self) -> &Worker {
        match self {
            Self::Alone(worker) => worker,
            Self::Met(endpoint) => endpoint.worker(),
        }
    }
}

/// What the thread holds. Fields are dropped in order: links and workers before memory, memory before its pages.
#[derive(Debug)]
pub(super) struct Owner {
    links: Vec<Link>,
    /// Links that are closed and wait for what is under way, and until when.
    leaving: Vec<(Instant, Link)>,
    /// Links that their targets do not expect yet.
    opening: Vec<Opening>,
    /// Of links to this target, by token.
    incoming: HashMap<u64, Incoming>,
    context: Arc<Context>,
    memory: PoolMemory,
    key: Vec<u8>,
    pool: Arc<Pages>,
    woken: UnixStream,
}

/// The pool as UCX knows it.
#[derive(Debug)]
enum PoolMemory {
    /// Our map of it, registered.
    Registered(Memory),
    /// UCX's own.
    Allocated(Arc<Allocated>),
}

impl Deref for PoolMemory {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        match self {
            Self::Registered(memory) => memory,
            Self::Allocated(allocated) => &allocated.memory,
        }
    }
}

impl Owner {
    /// Opens everything. Returns whether to offer it without being required, too.
    pub(super) fn open(
        config: &UcxConfig,
        pool: Arc<Pages>,
        allocated: Option<Arc<Allocated>>,
        woken: UnixStream,
    ) -> Result<(Self, bool), String> {
        let _inside = ucx_sys::enter();
        let (context, memory) = match allocated {
            Some(allocated) => (allocated.context.clone(), PoolMemory::Allocated(allocated)),
            None => {
                let context = open(config)?;
                // SAFETY: this struct holds the pool, which is unmapped after the memory is.
                let memory = unsafe { Memory::register(&context, pool.base(), pool.layout().pool_bytes()) }?;
                (context, PoolMemory::Registered(memory))
            }
        };
        let resources = context.resources();
        tracing::info!(version = ?context.api.version(), library = context.api.path(), ?resources, "UCX");
        let rdma = resources.iter().any(|resource| survey::is_rdma(resource));
        let (links, leaving, opening, incoming) = Default::default();
        let key = memory.key()?;
        Ok((Self { links, leaving, opening, incoming, context, memory, key, pool, woken }, rdma))
    }

    /// Runs until the worker's [`Ucx`](super::Ucx) is dropped. Then every connection ends, so that nobody's pages are read or written
    /// any more.
    pub(super) fn run(mut self, shared: &Shared) {
        let mut idle_since = Instant::now();
        loop {
            let inside = ucx_sys::enter();
            let stops = shared.stop.load(Ordering::Acquire);
            if stops {
                let ours = self.links.iter().filter(|link| !link.lent);
                ours.for_each(|link| link.closed.store(true, Ordering::Release));
                self.opening.clear();
                self.incoming.clear();
            }
            if self.turn(shared) {
                idle_since = Instant::now();
                continue;
            }
            if stops && self.links.is_empty() && self.leaving.is_empty() {
                return drop(self);
            }
            let idle = idle_since.elapsed();
            if idle < SPIN && self.links.iter().any(Link::waits) {
                std::hint::spin_loop();
                continue;
            }
            let limit = match self.arm() {
                // Without a link nothing can come but commands.
                true => self.is_linked().then_some(DOZE),
                // Something has come just now.
                false if idle < 2 * SPIN => continue,
                false => Some((idle / 4).clamp(NAP, DOZE)),
            };
            drop(inside);
            self.sleep(limit);
        }
    }

    /// Does what can be done now. Returns whether that was anything.
    fn turn(&mut self, shared: &Shared) -> bool {
        let mut busy = false;
        loop {
            // Whole between any two statements.
            let command = shared.commands.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(command) = command else { break };
            self.obey(command);
            busy = true;
        }
        busy |= self.connect_expected();
        for worker in self.workers() {
            busy |= worker.progress();
        }
        let (now, memory, pool) = (Instant::now(), &self.memory, &*self.pool);
        let closed = self.links.extract_if(.., |link| link.closed.load(Ordering::Acquire));
        self.leaving.extend(closed.map(|link| (now + LAST_WORDS, link)));
        self.leaving.retain(|(until, link)| link.waits() && now < *until);
        for link in &mut self.links {
            busy |= link.turn(memory, pool);
        }
        busy
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Accept { token, reply } => {
                let window = self.accept(token);
                if reply.send(window).is_err() {
                    self.incoming.remove(&token);
                }
            }
            Command::Release { token, reply } => {
                self.incoming.remove(&token);
                // Whoever asked may be gone.
                let _ = reply.send(());
            }
            Command::Meet { token, address, reply } => {
                // Whoever asked may be gone, and releases it then.
                let _ = reply.send(self.meet(token, &address));
            }
            Command::Open { connect, address } => {
                let worker = Worker::new(&self.context);
                let (worker, name) = worker
                    .and_then(|worker| Ok((worker.address()?, worker)))
                    .map_or_else(|reason| (None, Err(reason)), |(name, worker)| (Some(worker), Ok(name)));
                // Whoever asked may be gone.
                let asked = address.send(name).is_ok();
                let connect = *connect;
                self.opening.extend(worker.filter(|_| asked).map(|worker| Opening { worker, connect }));
            }
        }
    }

    /// Connects what targets expect by now. Returns whether that was anything.
    fn connect_expected(&mut self) -> bool {
        let settled = |opening: &mut Opening| {
            let waits = matches!(opening.connect.expected.try_recv(), Err(oneshot::error::TryRecvError::Empty));
            !waits || opening.connect.closed.load(Ordering::Acquire)
        };
        let settled: Vec<Opening> = self.opening.extract_if(.., settled).collect();
        let busy = !settled.is_empty();
        for Opening { worker, connect } in settled {
            // Who has gone has closed it.
            if !connect.closed.load(Ordering::Acquire) {
                self.connect(worker, connect);
            }
        }
        busy
    }

    fn connect(&mut self, worker: Worker, connect: Connect) {
        let Connect { window, path, queue, closed, stop, word, reply, .. } = connect;
        let endpoint = Endpoint::connect(worker, &window.address, Some(&window.key));
        match endpoint.and_then(|endpoint| Ok((endpoint.probe(window.base)?, endpoint))) {
            Ok((probe, endpoint)) => self.links.push(Link {
                endpoint,
                posted: VecDeque::new(),
                base: window.base,
                path,
                queue,
                closed,
                stop,
                state: State::Connecting(probe, reply),
                lent: false,
                word,
            }),
            // Whoever asked may be gone.
            Err(reason) => drop(reply.send(Err(reason))),
        }
    }

    /// Connects the worker of the link with `token` to the source's at `address`.
    fn meet(&mut self, token: u64, address: &[u8]) -> Result<(), String> {
        match self.incoming.remove(&token) {
            Some(Incoming::Alone(worker)) => {
                let met = Incoming::Met(Endpoint::connect(worker, address, None)?);
                self.incoming.insert(token, met);
                Ok(())
            }
            _ => Err("a link meets its source once".to_owned()),
        }
    }

    fn accept(&mut self, token: u64) -> Result<Window, String> {
        let worker = Worker::new(&self.context)?;
        let address = worker.address()?;
        for (what, bytes) in [("worker address", address.len()), ("pool key", self.key.len())] {
            if bytes > super::LONGEST_NAME {
                return Err(format!("a {what} of {bytes} bytes is longer than {}", super::LONGEST_NAME));
            }
        }
        self.incoming.insert(token, Incoming::Alone(worker));
        Ok(Window { address, key: self.key.clone(), base: self.memory.address() as u64 })
    }

    /// Asks all workers to wake us. Returns false when one has something to do.
    fn arm(&self) -> bool {
        self.workers().all(Worker::arm)
    }

    fn is_linked(&self) -> bool {
        !(self.links.is_empty() && self.leaving.is_empty() && self.opening.is_empty() && self.incoming.is_empty())
    }

    fn workers(&self) -> impl Iterator<Item = &Worker> {
        let leaving = self.leaving.iter().map(|(_, link)| link);
        self.links
            .iter()
            .chain(leaving)
            .map(|link| link.endpoint.worker())
            .chain(self.incoming.values().map(Incoming::worker))
    }

    /// Sleeps until somebody has something to do, for `limit` at most.
    fn sleep(&self, limit: Option<Duration>) {
        let wakes = self.workers().map(|worker| PollFd::from_borrowed_fd(worker.wake(), PollFlags::IN));
        let mut wakes: Vec<_> = iter::once(PollFd::new(&self.woken, PollFlags::IN)).chain(wakes).collect();
        let limit = limit.map(|limit| Timespec::try_from(limit).expect("milliseconds fit"));
        // Whatever it returns, the loop looks at everything again.
        let _ = poll(&mut wakes, limit.as_ref());
        if !wakes[0].revents().is_empty() {
            let _ = (&self.woken).read(&mut [0; 64]);
        }
    }
}

/// A link from this source. When it is dropped its connection ends first; then frames come back, as nothing reads their blocks any
/// more; and last the target hears that no write can land.
#[derive(Debug)]
struct Link {
    endpoint: Endpoint,
    /// Frames whose puts are under way, oldest first.
    posted: VecDeque<Posted>,
    /// Where the target's pool begins in its address space.
    base: u64,
    path: LinkPath,
    queue: Arc<JobQueue>,
    /// Set by its owner when it is to end.
    closed: Arc<AtomicBool>,
    stop: LinkStop,
    state: State,
    /// The target's pool is mapped and somebody else writes there: who has the map closes the link.
    lent: bool,
    word: Option<Remote>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// How far a link is.
#[derive(Debug)]
enum State {
    /// Waits for what it reads from the peer.
    Connecting(Option<Request>, Reply),
    Up,
    /// It has told its control connection to end, and waits for that.
    Failed,
}

/// Bytes to be put.
#[derive(Debug)]
struct Put {
    from: From,
    to: Extent,
}

#[derive(Debug)]
struct Posted {
    job: Job,
    /// Blocks that were converted for it.
    _converted: Option<Vec<u8>>,
    hasher: Option<FrameHasher>,
    /// Ends when all puts of the frame are in the target's memory.
    flush: Option<Request>,
}

impl Link {
    /// Says whether something is under way.
    fn waits(&self) -> bool {
        let last = match &self.state {
            State::Connecting(probe, _) => probe.as_ref(),
            State::Up => self.posted.back().and_then(|posted| posted.flush.as_ref()),
            State::Failed => None,
        };
        last.is_some_and(|last| self.endpoint.poll(last).is_none())
    }

    /// Does what can be done now. Returns whether that was anything.
    fn turn(&mut self, memory: &Memory, pool: &Pages) -> bool {
        let worked = match &self.state {
            State::Failed => return false,
            State::Up => self.advance(memory, pool),
            State::Connecting(probe, _) => match probe.as_ref().map(|probe| self.endpoint.poll(probe)) {
                Some(None) => Ok(false),
                Some(Some(Err(reason))) => Err(reason),
                None | Some(Some(Ok(()))) => self.come_up(),
            },
        };
        let worked = self.endpoint.failure().map_or(worked, Err);
        worked.unwrap_or_else(|reason| {
            // Frames that were put come back as lost, and nothing may be said of them then: bytes of theirs may still be on their
            // way. So they come back when the control connection is over, and the link is closed by its owner.
            match std::mem::replace(&mut self.state, State::Failed) {
                // Without a listener its handle is gone, and so the link is closed.
                State::Connecting(_, reply) => drop(reply.send(Err(reason))),
                _ => self.stop.stop(format!("UCX: {reason}")),
            }
            true
        })
    }

    /// The peer has answered.
    fn come_up(&mut self) -> Result<bool, String> {
        let lanes = self.endpoint.lanes();
        tracing::info!(?lanes, "UCX connected");
        if !self.path.emulated && !lanes.iter().any(|lane| survey::is_rdma(lane)) {
            return Err(format!("it connects by {}, which is no RDMA", lanes.join(" ")));
        }
        if let State::Connecting(probe, reply) = std::mem::replace(&mut self.state, State::Up) {
            let pages = self.mapped();
            self.lent = pages.is_some();
            probe.into_iter().for_each(|probe| self.endpoint.free(probe));
            // Whoever asked may be gone, and has closed the link then.
            let _ = reply.send(Ok(pages));
        }
        Ok(true)
    }

    /// Returns the target's pool where UCX mapped it, and the target waits for the word that it no longer is.
    fn mapped(&self) -> Option<Pages> {
        self.word.as_ref()?;
        let layout = self.path.terms.target.pool.clone();
        let address = self.endpoint.mapped(self.base, layout.pool_bytes())?;
        // SAFETY: all of it is mapped, and the map ends with the endpoint: when this link is closed, which only who holds these pages
        // does from here on, when dropping them.
        let pages = unsafe { Pages::lent(address, layout) };
        pages.inspect_err(|error| tracing::warn!(%error, "keep the target's pool from children")).ok()
    }

    fn advance(&mut self, memory: &Memory, pool: &Pages) -> Result<bool, String> {
        let mut busy = false;
        while let Some(posted) = self.posted.front() {
            match posted.flush.as_ref().map(|flush| self.endpoint.poll(flush)) {
                Some(None) => break,
                Some(Some(Err(reason))) => return Err(reason),
                None | Some(Some(Ok(()))) => {}
            }
            busy = true;
            let Some(Posted { job, hasher, flush, _converted }) = self.posted.pop_front() else { break };
            flush.into_iter().for_each(|flush| self.endpoint.free(flush));
            self.finish(job, hasher)?;
        }
        while self.posted.len() < MOST_POSTED
            && let Some(job) = self.queue.try_next()
        {
            busy = true;
            let posted = self.put(job, memory, pool)?;
            self.posted.push_back(posted);
        }
        Ok(busy)
    }

    /// Starts a frame.
    fn put(&mut self, job: Job, memory: &Memory, pool: &Pages) -> Result<Posted, String> {
        let (frame, terms) = (&job.frame, self.path.terms.clone());
        let pages = terms.target.pool.pages;
        if let Some(page) = frame.landing.iter().find(|page| page.0 >= pages) {
            return Err(format!("landing page {} of a pool of {pages}", page.0));
        }
        let mut hasher = self.path.digest.then(|| FrameHasher::new(frame.handoff, frame.sequence, &frame.pieces));
        let source = Place { view: &terms.source, pages: &frame.pages };
        let target = Place { view: &terms.target, pages: &frame.landing };
        pool.fetch(source, &frame.pieces)?;
        // SAFETY, here and below: the source blocks are frozen until this job reports back, which it does after its flush, or after
        // the endpoint is closed. Converted ones lie in `Posted` for as long. Extents stay inside the pools, the target's by the
        // check above.
        let (converted, puts) = if terms.converts() {
            // SAFETY: above.
            let blocks = unsafe { pool.converted(&terms, &frame.pages, &frame.pieces) };
            if let Some(hasher) = &mut hasher {
                hasher.update(&blocks);
            }
            let puts = plan::extents(target, &frame.pieces).into_iter().scan(0, |at, extent| {
                let put = Put { from: From::Elsewhere(blocks.as_ptr().wrapping_add(*at)), to: extent };
                *at += extent.bytes;
                Some(put)
            });
            let puts: Vec<Put> = puts.collect();
            (Some(blocks), puts)
        } else {
            let copies = plan::copies(source, target, &frame.pieces);
            if let Some(hasher) = &mut hasher {
                // SAFETY: above.
                copies.iter().for_each(|copy| hasher.update(unsafe { pool.bytes(copy.from()) }));
            }
            (None, copies.iter().map(|copy| Put { from: From::Pool(copy.source), to: copy.to() }).collect())
        };
        let started = puts.iter().try_for_each(|Put { from, to }| {
            // SAFETY: above.
            unsafe { self.endpoint.put(memory, *from, to.bytes, self.base + to.offset as u64) }
        });
        match started.and_then(|()| self.endpoint.flush()) {
            Ok(flush) => Ok(Posted { job, hasher, flush, _converted: converted }),
            Err(reason) => {
                // Puts of it may be under way: it comes back when the endpoint is closed.
                self.posted.push_back(Posted { job, hasher: None, flush: None, _converted: converted });
                Err(reason)
            }
        }
    }

    /// All of a frame is in the target's memory.
    fn finish(&mut self, job: Job, hasher: Option<FrameHasher>) -> Result<(), String> {
        // Before the report, which may bring `Commit` about: the target hears of frames first.
        let frame = &job.frame;
        let (handoff, sequence, pieces) = (frame.handoff, frame.sequence, frame.pieces.clone());
        let said = self.path.say.try_send(Message::Pages { handoff, sequence, pieces });
        said.map_err(|_| "the other end does not read".to_owned())?;
        job.finish(hasher.map(FrameHasher::finish));
        Ok(())
    }
}
