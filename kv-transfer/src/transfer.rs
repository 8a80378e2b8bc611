//! The handle that workers hold: starts everything and passes requests to the driver.

use crate::{
    Begin, Commit, Config, Error, Event, Fetch, HandoffId, Identity, TransportKind,
    driver::{Driver, Live, Parts},
    handoffs::{Handoffs, Request},
    handshake::Offer,
    inbox::{Inbox, Note},
    landing::Landings,
    link::Access,
    links::{Links, MOST_STREAMS},
    metrics::Metrics,
    mover::Movers,
    pages::Pages,
    ranks::Ranks,
    source::Limits,
    speed::Speed,
    transport::{memory, shm::Shared, ucx::Ucx},
};
use kv_cache::{Backing, PageId};
use std::{fs::File, net::SocketAddr, ops::Range, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Arrivals from all links that wait for the driver; when it is full, links stop reading.
const MOST_ARRIVALS: usize = 256;

/// One worker's end of all its links. Cloning is cheap; everything stops when the token given to [`Transfer::start`] is
/// cancelled, when the receiver of its events is dropped, or with the runtime it was started on.
#[derive(Clone, Debug)]
pub struct Transfer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: String,
    inbox: Arc<Inbox>,
    live: watch::Sender<Live>,
    speed: Arc<Speed>,
}

/// Time that hand-offs spent moving, from a source's first frame to the acknowledged commit, and what of it computing hid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlapped {
    /// While frames were under way, and from commits to their acknowledgements.
    pub moved: Duration,
    /// What of it came before the last push: nobody waited for that.
    pub hidden: Duration,
}

impl Overlapped {
    /// Returns the hidden share, in 0 ..= 1, or `None` when nothing moved.
    pub fn share(&self) -> Option<f64> {
        (!self.moved.is_zero()).then(|| self.hidden.as_secs_f64() / self.moved.as_secs_f64())
    }
}

/// Where a worker's pages are.
#[derive(Clone, Debug)]
pub struct Pool<'a> {
    /// All of them, or what passes through the host on its way.
    pub file: &'a File,
    /// The cards that have them, if any.
    pub backing: Option<Arc<dyn Backing>>,
}

impl<'a> From<&'a File> for Pool<'a> {
    fn from(file: &'a File) -> Self {
        Self { file, backing: None }
    }
}

impl Transfer {
    /// Maps the file of `pool` (of `identity.layout.pool_bytes()` bytes), listens for links and starts reporting to `events`.
    /// Other processes of this host can write landings themselves where the file is a memfd whose size is sealed.
    ///
    /// `events` is bounded; when it is full the link waits, and with it the peer. After `shutdown` the hand-offs in flight get
    /// half a second to end; [`Transfer::drain`] comes before that.
    pub async fn start(
        config: Config,
        identity: Identity,
        pool: impl Into<Pool<'_>>,
        events: mpsc::Sender<Event>,
        shutdown: CancellationToken,
    ) -> Result<Self, Error> {
        let access = Access::new(&config)?;
        let Pool { file, backing } = pool.into();
        if config.require == Some(TransportKind::Cuda) && backing.is_none() {
            return Err(Error::NotOnCards);
        }
        let pool = Arc::new(Pages::map(file, identity.layout.clone())?.with_backing(backing.clone()));
        let listen = |source| Error::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        if bound.ip().is_unspecified() && config.advertise.is_none() {
            tracing::warn!(%bound, "no address to advertise: peers elsewhere cannot use an unspecified one");
        }
        let streams = config.tcp_streams.clamp(1, MOST_STREAMS);
        let movers = Movers::start(streams).map_err(Error::Threads)?;
        let home = movers.home().clone();
        let listener = {
            let _reactor = home.enter();
            listener.into_std().and_then(TcpListener::from_std).map_err(listen)?
        };

        let inbox = Arc::new(Inbox::default());
        let (arrivals, arrived) = mpsc::channel(MOST_ARRIVALS);
        let shared = Shared::of(file, &identity.layout, backing.clone());
        let words = shared.as_ref().ok().map(|shared| shared.words().clone());
        let landings = Arc::new(Landings::new(pool.clone(), inbox.clone()).with_words(words));
        let shares = shared.as_ref().map(|shared| shared.host().to_owned()).map_err(ToString::to_string);
        let ucx = start_ucx(&config, &pool, file).await?;
        let with_ucx = ucx.as_ref().is_some_and(Ucx::is_worthwhile);
        let offer = Offer::new(&config, identity.clone(), memory::process(), shares, (backing.is_some(), with_ucx));
        let pools = (pool, landings.clone());
        let links = Links::new(&config, (offer, access), pools, (shared.ok(), ucx), movers, arrivals);
        let accepting = CancellationToken::new();
        links.tasks.spawn_on(links.clone().accept(listener, accepting.clone()), &home);

        let inner = Inner {
            address: advertised(config.advertise.as_deref(), bound),
            inbox: inbox.clone(),
            live: watch::Sender::default(),
            speed: Arc::default(),
        };
        let limits = limits(&config);
        let driver = Driver::new(Parts {
            handoffs: Ranks::new(
                Handoffs::new(identity.layout.clone(), limits),
                identity.rank,
                identity.layout.kv_heads,
                limits.open,
            ),
            links: links.clone(),
            landings,
            inbox,
            arrivals: arrived,
            events,
            live: inner.live.clone(),
            speed: inner.speed.clone(),
            metrics: Metrics::new(&identity.worker),
            incarnation: identity.incarnation,
            address: inner.address.clone(),
            _accepting: accepting.drop_guard(),
        });
        // It runs on threads of our own, and ends with the runtime of the worker all the same.
        let alive = CancellationToken::new();
        let ends = alive.clone().drop_guard();
        let running = alive.clone();
        links.tasks.spawn_on(
            async move {
                running.run_until_cancelled(driver.run(shutdown)).await;
                drop(ends);
            },
            &home,
        );
        // The guard is made here: a runtime may end before it has polled any of this.
        let gone = alive.clone().drop_guard();
        tokio::spawn(async move {
            alive.cancelled().await;
            drop(gone);
        });
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the `host:port` that peers use.
    pub fn address(&self) -> String {
        self.inner.address.clone()
    }

    /// Source: asks the target for a landing. Never blocks; the link is opened if needed. The hand-off's trace span is a child of
    /// the current one.
    pub fn begin(&self, begin: Begin) {
        let span = tracing::info_span!("handoff", id = %begin.handoff, side = "source", peer = begin.targets.first().map_or("", |peer| &peer.worker));
        self.inner.live.send_modify(|live| live.queued += 1);
        self.inner.inbox.put(Note::Begin(begin, span));
    }

    /// Target: asks a peer that holds a prefix to hand it over. Never blocks. What follows is [`Event::Begun`] as for any hand-off, or
    /// [`Event::Lost`] when the peer refuses, cannot be reached or does not answer in time.
    pub fn fetch(&self, fetch: Fetch) {
        self.inner.live.send_modify(|live| live.queued += 1);
        self.inner.inbox.put(Note::Fetch(fetch));
    }

    /// Source: the blocks of `layers` of pages `pages` (indices into [`Begin::pages`]) are final. They are sent as soon as the
    /// target has opened, merged into groups. Never blocks; called from the step, so it only queues a descriptor.
    ///
    /// Each block is pushed once: a page is pushed when it is full, or with the last of the prompt.
    pub fn push(&self, handoff: HandoffId, layers: Range<u32>, pages: Range<u32>) {
        self.request(Request::Push { handoff, layers, pages });
    }

    /// Source: every block has been pushed; `commit` follows the last one.
    pub fn commit(&self, handoff: HandoffId, commit: Commit) {
        self.request(Request::Commit { handoff, commit });
    }

    /// Source: the target is not needed, for the answer is complete with its first token. As [`Transfer::abort`], with an outcome of
    /// its own on both sides: nothing went wrong.
    pub fn forgo(&self, handoff: HandoffId) {
        self.request(Request::Forgo { handoff });
    }

    /// Target: `landing` are the local pages for all of the sequence, in order; the first `have` of them already hold its prefix
    /// and are not sent. If the hand-off has been lost meanwhile, [`Event::Quiet`] follows at once.
    pub fn open(&self, handoff: HandoffId, landing: Vec<PageId>, have: u32) {
        self.request(Request::Open { handoff, landing, have });
    }

    /// Target: no landing for this one. Or the answer to [`Event::Asked`]: this worker does not hand that over.
    pub fn refuse(&self, handoff: HandoffId, reason: String) {
        self.request(Request::Refuse { handoff, reason });
    }

    /// Either side: calls the hand-off off (the request was cancelled). The source still gets [`Event::SourceDone`], a target
    /// that had opened still gets [`Event::Quiet`]. Unknown hand-offs are remembered for a while, so that an abort may come
    /// before its `Begin`.
    pub fn abort(&self, handoff: HandoffId, reason: String) {
        self.request(Request::Abort { handoff, reason });
    }

    /// Returns the number of hand-offs that have not ended, both sides.
    pub fn in_flight(&self) -> usize {
        let live = *self.inner.live.borrow();
        live.queued + live.known
    }

    /// Returns how fast pages left this worker lately, in bytes per second while there was something to send; 0 = not known yet.
    pub fn link_bytes_per_s(&self) -> f64 {
        self.inner.speed.bytes_per_s()
    }

    /// Returns what the hand-offs that landed so far spent moving, as their source.
    pub fn overlapped(&self) -> Overlapped {
        self.inner.speed.all_overlapped()
    }

    /// Waits until no hand-off is in flight, for at most `limit`. Returns how many were left.
    pub async fn drain(&self, limit: Duration) -> usize {
        let mut live = self.inner.live.subscribe();
        let drained = live.wait_for(|live| live.queued + live.known == 0);
        match timeout(limit, drained).await {
            Ok(_) => 0,
            Err(_) => self.in_flight(),
        }
    }

    fn request(&self, request: Request) {
        self.inner.inbox.put(Note::Request(request));
    }
}

/// Returns `host:port` for peers: what is advertised, completed by the bound port where it is a host alone (an IPv6 address wears
/// brackets).
fn advertised(advertise: Option<&str>, bound: SocketAddr) -> String {
    let has_port = |host: &str| host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match advertise {
        None => bound.to_string(),
        Some(address) if has_port(address) => address.to_owned(),
        Some(host) => format!("{host}:{}", bound.port()),
    }
}

/// Starts UCX where it is wanted. Where it is not required, a worker does without.
async fn start_ucx(config: &Config, pool: &Arc<Pages>, file: &File) -> Result<Option<Ucx>, Error> {
    if !Ucx::is_wanted(config) {
        return Ok(None);
    }
    match Ucx::start(&config.ucx, pool.clone(), file).await {
        Ok(ucx) => Ok(Some(ucx)),
        Err(reason) if config.require.is_some() => Err(Error::Ucx(reason)),
        Err(reason) => {
            tracing::warn!(reason, "this host has RDMA devices and UCX cannot use them; `baton doctor` says more");
            Ok(None)
        }
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        open: Duration::from_millis(config.open_timeout_ms),
        progress: Duration::from_millis(config.progress_timeout_ms),
        group_bytes: config.group_bytes,
        group_frames: 2 * config.tcp_streams.clamp(1, MOST_STREAMS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertised_host_takes_the_bound_port() {
        let bound = SocketAddr::from(([127, 0, 0, 1], 7001));
        for (advertise, expected) in [
            (None, "127.0.0.1:7001"),
            (Some("worker-3.prefill"), "worker-3.prefill:7001"),
            (Some("worker-3:9000"), "worker-3:9000"),
            (Some("[fd00::3]"), "[fd00::3]:7001"),
            (Some("[fd00::3]:9000"), "[fd00::3]:9000"),
        ] {
            assert_eq!(advertised(advertise, bound), expected);
        }
    }
}
