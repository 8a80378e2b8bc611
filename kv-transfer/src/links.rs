//! Brings links up, on both ends, and runs each as one task.
//!
//! One listener takes control and data connections alike; the first frame says which. What strangers can make it hold is
//! bounded: so many handshakes at once, each for so long, and so many links.

use crate::{
    Config, Peer, TransportKind,
    handoffs::LinkId,
    handshake::{self, Offer},
    landing::Landings,
    link::{self, Arrival, HANDSHAKE_LIMIT, LinkStop, MOST_MESSAGES, NoLink, Pings, Role, Up},
    message::{Greeting, Hello, Message, Welcome},
    mover::Movers,
    pages::Pages,
    transport::{
        Transport,
        memory::{self, Memory, Registration},
        tcp::{Receiver, Tcp},
    },
};
use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Connections that may be in their handshake at once; further ones wait in the listener's backlog.
const MOST_HANDSHAKES: usize = 64;
/// Links that peers may open to one worker.
const MOST_LINKS: usize = 1024;
/// Data connections of one link.
pub(crate) const MOST_STREAMS: usize = 16;

/// What all links of a worker share.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) offer: Offer,
    pub(crate) streams: usize,
    pub(crate) pool: Arc<Pages>,
    pub(crate) landings: Arc<Landings>,
    pub(crate) registration: Registration,
    pub(crate) movers: Movers,
    pub(crate) arrivals: mpsc::Sender<Arrival>,
    /// Owns the tasks of all links.
    pub(crate) tasks: TaskTracker,
    /// Links that data connections may join, by token.
    joinable: Mutex<HashMap<u64, Joinable>>,
    made: AtomicU64,
}

#[derive(Debug)]
struct Joinable {
    stop: LinkStop,
    digest: bool,
    streams: usize,
}

impl Links {
    /// Starts with none.
    pub(crate) fn new(
        config: &Config,
        offer: Offer,
        landings: (Arc<Pages>, Arc<Landings>),
        movers: Movers,
        arrivals: mpsc::Sender<Arrival>,
    ) -> Arc<Self> {
        let (pool, landings) = landings;
        Arc::new(Self {
            offer,
            streams: config.tcp_streams.clamp(1, MOST_STREAMS),
            pool,
            registration: Registration::new(&landings),
            landings,
            movers,
            arrivals,
            tasks: TaskTracker::new(),
            joinable: Mutex::default(),
            made: AtomicU64::new(0),
        })
    }

    /// Names a new link.
    fn next(&self) -> LinkId {
        LinkId(self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// Starts dialling `peer`. What is sent meanwhile waits; `Up` or `Down` will arrive.
    pub(crate) fn dial(self: &Arc<Self>, peer: Peer) -> (LinkId, mpsc::Sender<Message>, LinkStop) {
        let (link, stop, links) = (self.next(), LinkStop::default(), self.clone());
        let (outgoing, messages) = mpsc::channel(MOST_MESSAGES);
        let stopped = stop.clone();
        self.tasks.spawn(async move {
            let (reason, refused) = links.run_dialled(link, &peer, messages, &stopped).await;
            links.arrive(Arrival::Down { link, reason, refused }).await;
        });
        (link, outgoing, stop)
    }

    /// Returns why the link ended or did not come up, and whether it was refused.
    async fn run_dialled(
        &self,
        link: LinkId,
        peer: &Peer,
        messages: mpsc::Receiver<Message>,
        stop: &LinkStop,
    ) -> (String, bool) {
        let limited = timeout(HANDSHAKE_LIMIT, self.bring_up(peer, stop));
        let (stream, welcome, transport) = match stop.token().run_until_cancelled(limited).await {
            Some(Ok(Ok(up))) => up,
            Some(Ok(Err(NoLink { reason, refused }))) => return (reason, refused),
            Some(Err(_)) => return (format!("{}: no link within {HANDSHAKE_LIMIT:?}", peer.link), false),
            None => return (stop.reason(), false),
        };
        let up = Up {
            peer: peer.worker.clone(),
            incarnation: welcome.identity.incarnation,
            token: welcome.token,
            kind: welcome.transport,
            role: Role::Source(transport.clone()),
        };
        self.arrive(Arrival::Up(link, up)).await;
        let pings = self.pings(welcome.ping_ms);
        let reason = link::carry(link, stream, messages, &self.arrivals, stop, pings).await;
        // Whatever ended it, its data path ends too.
        stop.stop(reason.clone());
        transport.close();
        (reason, false)
    }

    async fn bring_up(&self, peer: &Peer, stop: &LinkStop) -> Result<(TcpStream, Welcome, Arc<dyn Transport>), NoLink> {
        let (stream, welcome) = link::dial(&self.offer, peer).await?;
        let transport: Arc<dyn Transport> = match welcome.transport {
            TransportKind::Memory => {
                let path = memory::Path { pool: self.pool.clone(), token: welcome.token, digest: welcome.digest };
                let gone = || NoLink { reason: format!("{}: its landings are gone", peer.worker), refused: false };
                Arc::new(Memory::start(welcome.landings, &path, &self.movers, stop).ok_or_else(gone)?)
            }
            TransportKind::Tcp => {
                let joins = (0..self.streams).map(|_| link::join(&peer.link, welcome.token));
                let streams = futures::future::try_join_all(joins).await?;
                Arc::new(Tcp::start(streams, &self.pool, welcome.digest, &self.movers, stop))
            }
        };
        Ok((stream, welcome, transport))
    }

    /// Accepts connections until `stop`.
    pub(crate) async fn accept(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let handshakes = Arc::new(Semaphore::new(MOST_HANDSHAKES));
        let places = Arc::new(Semaphore::new(MOST_LINKS));
        loop {
            // Cancel safe: neither a permit nor a connection is lost with the future, it closes.
            let next = async {
                let permit = handshakes.clone().acquire_owned().await;
                (permit, listener.accept().await)
            };
            let Some((permit, accepted)) = stop.run_until_cancelled(next).await else { return };
            match accepted {
                Ok((stream, from)) => {
                    let (links, places) = (self.clone(), places.clone());
                    self.tasks.spawn(async move {
                        let greeted = timeout(HANDSHAKE_LIMIT, links.greet(stream)).await;
                        drop(permit);
                        match greeted {
                            Ok(Ok(Some((stream, hello)))) => links.answer(stream, hello, &places).await,
                            Ok(Ok(None)) => {}
                            Ok(Err(error)) => tracing::debug!(%from, %error, "connection without greeting"),
                            Err(_) => tracing::debug!(%from, "connection without greeting in time"),
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, usually: it passes when connections close.
                    tracing::warn!(%error, "accept link");
                    stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(100))).await;
                }
            }
        }
    }

    /// Reads the first frame; returns it when it asks for a link.
    async fn greet(&self, mut stream: TcpStream) -> io::Result<Option<(TcpStream, Hello)>> {
        stream.set_nodelay(true)?;
        match link::receive(&mut stream).await? {
            Greeting::Hello(hello) => return Ok(Some((stream, hello))),
            Greeting::Join { token } => self.join(token, stream.into_std()?),
            Greeting::Foreign { protocol } => {
                let reason = handshake::foreign(protocol);
                tracing::warn!(reason, "link refused");
                link::send(&mut stream, &Greeting::Reject { reason }).await?;
            }
            Greeting::Welcome(_) | Greeting::Reject { .. } => {}
        }
        Ok(None)
    }

    fn join(&self, token: u64, stream: std::net::TcpStream) {
        let mut joinable = self.joinable();
        let Some(link) = joinable.get_mut(&token).filter(|link| link.streams < MOST_STREAMS) else { return };
        let receiver = Receiver {
            landings: self.landings.clone(),
            token,
            block_bytes: self.pool.layout().block_bytes(),
            digest: link.digest,
        };
        receiver.start(link.streams, stream, &self.movers, &link.stop);
        link.streams += 1;
    }

    async fn answer(&self, mut stream: TcpStream, hello: Hello, places: &Arc<Semaphore>) {
        let answer = match places.clone().try_acquire_owned() {
            Ok(place) => self.offer.answer(&hello).map(|chosen| (place, chosen)),
            Err(_) => Err(format!("{MOST_LINKS} links are open")),
        };
        let (_place, (transport, digest)) = match answer {
            Ok(answer) => answer,
            Err(reason) => {
                tracing::warn!(peer = hello.identity.worker, reason, "link refused");
                // The peer learns why, or that the connection closed; nothing depends on which.
                let _ = timeout(HANDSHAKE_LIMIT, link::send(&mut stream, &Greeting::Reject { reason })).await;
                return;
            }
        };
        let token = rand::random();
        let welcome = Welcome {
            identity: self.offer.identity.clone(),
            landings: self.registration.number(),
            transport,
            digest,
            token,
            ping_ms: self.offer.ping_ms,
        };
        let stop = LinkStop::default();
        self.joinable().insert(token, Joinable { stop: stop.clone(), digest, streams: 0 });
        if let Ok(Ok(())) = timeout(HANDSHAKE_LIMIT, link::send(&mut stream, &Greeting::Welcome(welcome))).await {
            self.run_accepted(stream, &hello, (token, transport), &stop).await;
        }
        self.joinable().remove(&token);
    }

    async fn run_accepted(
        &self,
        stream: TcpStream,
        hello: &Hello,
        (token, kind): (u64, TransportKind),
        stop: &LinkStop,
    ) {
        let (peer, incarnation) = (hello.identity.worker.clone(), hello.identity.incarnation);
        let ping_ms = hello.ping_ms;
        let link = self.next();
        let (outgoing, messages) = mpsc::channel(MOST_MESSAGES);
        let up = Up { peer, incarnation, token, kind, role: Role::Target(outgoing, stop.clone()) };
        self.arrive(Arrival::Up(link, up)).await;
        let reason = link::carry(link, stream, messages, &self.arrivals, stop, self.pings(ping_ms)).await;
        stop.stop(reason.clone());
        self.arrive(Arrival::Down { link, reason, refused: false }).await;
    }

    fn pings(&self, theirs_ms: u64) -> Pings {
        Pings { ours: Duration::from_millis(self.offer.ping_ms), theirs: Duration::from_millis(theirs_ms) }
    }

    async fn arrive(&self, arrival: Arrival) {
        // Without a driver there is nobody left to tell.
        let _ = self.arrivals.send(arrival).await;
    }

    fn joinable(&self) -> MutexGuard<'_, HashMap<u64, Joinable>> {
        // Whole between any two statements.
        self.joinable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
