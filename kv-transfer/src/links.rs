//! Brings links up, on both ends, and runs each as one task.
//!
//! One listener takes control and data connections alike; the first frame says which. What strangers can make it hold is
//! bounded: so many handshakes at once, each for so long, and so many links.

use crate::{
    Config, Peer, TransportKind,
    auth::{Claim, LinkKey},
    handoffs::LinkId,
    handshake::{self, Agreed, Offer},
    landing::Landings,
    link::{self, Access, Arrival, HANDSHAKE_LIMIT, LinkStop, MOST_MESSAGES, NoLink, Pings, Role, Up},
    message::{Greeting, Hello, Invitation, Join, Message, Welcome},
    metrics,
    mover::Movers,
    pages::Pages,
    plan::Terms,
    socket::Socket,
    transport::{
        Transport,
        memory::{self, Registration},
        shm::{self, Door, Remote, Shared, Writable, Writer, Written},
        tcp::{self, Receiver},
        ucx::{LinkPath, Opening, Ucx, Way, Window},
    },
};
use ::metrics::Counter;
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
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
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
    pub(crate) access: Access,
    pub(crate) streams: usize,
    pub(crate) pool: Arc<Pages>,
    pub(crate) landings: Arc<Landings>,
    pub(crate) registration: Registration,
    /// Our pool, where processes of this host can map it.
    shared: Option<Arc<Shared>>,
    cuda_fallbacks: Counter,
    shm_fallbacks: Counter,
    ucx: Option<Ucx>,
    ucx_fallbacks: Counter,
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
    terms: Arc<Terms>,
    key: LinkKey,
    transport: TransportKind,
    digest: bool,
    /// Numbers of the connections that have joined, a bit each: every number is good once.
    joined: u32,
}

/// What a target answered, and on what.
#[derive(Debug)]
struct Reached {
    stream: Socket,
    welcome: Welcome,
    terms: Arc<Terms>,
    key: LinkKey,
    remote: Option<Remote>,
}

/// What a target chose, the source of this host that writes by itself, and what it needs to do so by UCX.
type Chosen = (Agreed, Option<Writer>, Option<Window>);

/// Lets a source in by UCX. One on this host is watched, as it may map the pool.
async fn let_in(
    ucx: &Ucx,
    (token, key): (u64, &LinkKey),
    invitation: Option<&Invitation>,
) -> Result<(Option<Writer>, Window), String> {
    let writer = match invitation {
        Some(invitation) if shm::is_here(invitation) => {
            let watched = shm::watch(invitation, key).await;
            Some(watched.map_err(|error| format!("watch the source's process: {error}"))?)
        }
        Some(_) => None,
        None => return Err("the source does not name its host".to_owned()),
    };
    Ok((writer, ucx.accept(token).await?))
}

/// Welcomes a source. Over `ucx` the link is up once the source has seen bytes go there and back.
async fn welcome_source(stream: &mut Socket, welcome: Welcome, ucx: Option<&Ucx>) -> io::Result<()> {
    let token = welcome.token;
    link::send(stream, &Greeting::Welcome(welcome)).await?;
    let Some(ucx) = ucx else { return Ok(()) };
    let unexpected = |other: Greeting| io::Error::other(format!("unexpected greeting {other:?}"));
    match link::receive(stream).await? {
        Greeting::Calling(address) => ucx.meet(token, address).await.map_err(io::Error::other)?,
        other => return Err(unexpected(other)),
    }
    link::send(stream, &Greeting::Expected).await?;
    match link::receive(stream).await? {
        Greeting::Connected => Ok(()),
        other => Err(unexpected(other)),
    }
}

/// Connects to a target over UCX, which learns beforehand from where.
async fn call(stream: &mut Socket, mut opening: Opening) -> Result<Way, String> {
    let address = std::mem::take(&mut opening.address);
    let asked = async {
        link::send(stream, &Greeting::Calling(address)).await?;
        link::receive(stream).await
    };
    match timeout(opening.limit, asked).await.map_err(io::Error::from).flatten() {
        Ok(Greeting::Expected) => opening.connect().await,
        Ok(other) => Err(format!("unexpected greeting {other:?}")),
        Err(error) => Err(format!("tell the target: {error}")),
    }
}

impl Links {
    /// Starts with none.
    pub(crate) fn new(
        config: &Config,
        (offer, access): (Offer, Access),
        landings: (Arc<Pages>, Arc<Landings>),
        (shared, ucx): (Option<Arc<Shared>>, Option<Ucx>),
        movers: Movers,
        arrivals: mpsc::Sender<Arrival>,
    ) -> Arc<Self> {
        let (pool, landings) = landings;
        Arc::new(Self {
            cuda_fallbacks: metrics::fallbacks(&offer.identity.worker, TransportKind::Cuda),
            shm_fallbacks: metrics::fallbacks(&offer.identity.worker, TransportKind::Shm),
            ucx_fallbacks: metrics::fallbacks(&offer.identity.worker, TransportKind::Ucx),
            shared,
            ucx,
            offer,
            access,
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
        let (stopped, say) = (stop.clone(), outgoing.clone());
        self.tasks.spawn(async move {
            let (reason, refused) = links.run_dialled(link, &peer, (say, messages), &stopped).await;
            links.arrive(Arrival::Down { link, reason, refused }).await;
        });
        (link, outgoing, stop)
    }

    /// Returns why the link ended or did not come up, and whether it was refused.
    async fn run_dialled(
        &self,
        link: LinkId,
        peer: &Peer,
        (say, messages): (mpsc::Sender<Message>, mpsc::Receiver<Message>),
        stop: &LinkStop,
    ) -> (String, bool) {
        let limited = timeout(HANDSHAKE_LIMIT, self.bring_up(peer, say, stop));
        let (stream, welcome, terms, transport) = match stop.token().run_until_cancelled(limited).await {
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
            terms,
            role: Role::Source(transport.clone()),
        };
        self.arrive(Arrival::Up(link, up)).await;
        let pings = self.pings(welcome.ping_ms);
        let reason = link::carry(link, stream.into_split(), messages, &self.arrivals, stop, pings).await;
        // Whatever ended it, its data path ends too.
        stop.stop(reason.clone());
        transport.close();
        (reason, false)
    }

    /// Brings a link up. When UCX is chosen and does not reach the peer after all, something else is agreed on.
    async fn bring_up(
        &self,
        peer: &Peer,
        say: mpsc::Sender<Message>,
        stop: &LinkStop,
    ) -> Result<(Socket, Welcome, Arc<Terms>, Arc<dyn Transport>), NoLink> {
        let reached = self.reach(peer, &self.offer).await?;
        let (Some(ucx), Some(window)) = (&self.ucx, reached.welcome.ucx.clone()) else {
            return self.start(peer, reached, say, stop).await;
        };
        let Reached { mut stream, welcome, terms, remote, .. } = reached;
        let (digest, emulated) = (welcome.digest, self.offer.without(TransportKind::Ucx).is_none());
        let path = LinkPath { terms: terms.clone(), digest, emulated, say: say.clone() };
        let way = match ucx.open(window, path, remote, stop).await {
            Ok(opening) => call(&mut stream, opening).await,
            Err(reason) => Err(reason),
        };
        let reason = match way {
            Ok(way) => {
                link::send(&mut stream, &Greeting::Connected).await?;
                let transport: Arc<dyn Transport> = match way {
                    Way::Puts(source) => Arc::new(source),
                    Way::Map(mapped) => {
                        let path = shm::Path { pool: self.pool.clone(), terms: terms.clone(), digest, say };
                        Arc::new(shm::start(mapped, &path, &self.movers, stop))
                    }
                };
                return Ok((stream, welcome, terms, transport));
            }
            Err(reason) => reason,
        };
        drop(stream);
        let Some(rest) = self.offer.without(TransportKind::Ucx) else {
            return Err(NoLink { reason: format!("{}: ucx: {reason}", peer.worker), refused: false });
        };
        tracing::warn!(peer = peer.worker, reason, "UCX does not connect, something else is used");
        self.ucx_fallbacks.increment(1);
        let reached = self.reach(peer, &rest).await?;
        self.start(peer, reached, say, stop).await
    }

    /// Starts the data path that the target chose, any but UCX.
    async fn start(
        &self,
        peer: &Peer,
        Reached { stream, welcome, terms, key, remote }: Reached,
        say: mpsc::Sender<Message>,
        stop: &LinkStop,
    ) -> Result<(Socket, Welcome, Arc<Terms>, Arc<dyn Transport>), NoLink> {
        let transport: Arc<dyn Transport> = match welcome.transport {
            TransportKind::Memory => {
                let (pool, token, digest) = (self.pool.clone(), welcome.token, welcome.digest);
                let path = memory::Path { pool, terms: terms.clone(), token, digest };
                let gone = || NoLink { reason: format!("{}: its landings are gone", peer.worker), refused: false };
                Arc::new(memory::start(welcome.landings, &path, &self.movers, stop).ok_or_else(gone)?)
            }
            TransportKind::Cuda | TransportKind::Shm => {
                let directly = welcome.transport == TransportKind::Cuda;
                let same = |remote: &Remote| {
                    remote.layout() == Some(&welcome.identity.layout) && remote.direct().is_some() == directly
                };
                let problem = || format!("{}: says that its pool was passed, which it was not", peer.worker);
                let remote = remote.filter(same).ok_or_else(|| NoLink { reason: problem(), refused: false })?;
                let (pool, terms, digest) = (self.pool.clone(), terms.clone(), welcome.digest);
                let path = shm::Path { pool, terms, digest, say };
                shm::start_passed(remote, &path, &self.movers, stop)
            }
            TransportKind::Ucx => {
                let reason = format!("{}: chose ucx and says nothing of its pool", peer.worker);
                return Err(NoLink { reason, refused: false });
            }
            TransportKind::Tcp => {
                let joins =
                    (0..self.streams as u32).map(|number| self.access.join(&peer.link, welcome.token, &key, number));
                let streams = futures::future::try_join_all(joins).await?;
                let path = tcp::Path { pool: self.pool.clone(), terms: terms.clone(), digest: welcome.digest };
                Arc::new(tcp::start(streams, &path, &self.movers, stop))
            }
        };
        Ok((stream, welcome, terms, transport))
    }

    /// Dials `peer`. While it thinks about its answer, it can pass us its pool.
    async fn reach(&self, peer: &Peer, offer: &Offer) -> Result<Reached, NoLink> {
        let refused =
            |error: &io::Error| tracing::warn!(%error, "targets on this host cannot be asked for their pools");
        let wanted =
            [TransportKind::Cuda, TransportKind::Shm, TransportKind::Ucx].into_iter().any(|kind| offer.allows(kind));
        let door = wanted.then(Door::open);
        let door = door.and_then(|door| door.inspect_err(refused).ok());
        let (mut stream, key) = self.access.dial(offer, peer, door.as_ref().map(Door::invitation)).await?;
        let answered = link::answer(&mut stream, &key, (offer, peer));
        let Some(door) = door else {
            let (welcome, terms) = answered.await?;
            return Ok(Reached { stream, welcome, terms, key, remote: None });
        };
        let mut remote = None;
        let (welcome, terms) = {
            tokio::pin!(answered);
            loop {
                // Neither is resumed after the answer has come: cancel safety is not asked of them.
                tokio::select! {
                    answer = &mut answered => break answer?,
                    received = door.receive(&key, self.pool.backing()), if remote.is_none() => remote = Some(received),
                }
            }
        };
        Ok(Reached { stream, welcome, terms, key, remote })
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
                            Ok(Ok(Some((stream, hello, key)))) => links.answer(stream, hello, key, &places).await,
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

    /// Reads the first frame. Returns it when it asks for a link and comes from this cluster.
    async fn greet(&self, stream: TcpStream) -> io::Result<Option<(Socket, Hello, LinkKey)>> {
        let mut stream = self.access.sockets.accept(stream).await?;
        let frame = link::receive_frame(&mut stream).await?;
        let reason = match Greeting::decode(&frame).map_err(io::Error::other)? {
            Greeting::Hello(hello) => match self.access.challenge(&mut stream, &hello, &frame).await? {
                Ok(key) => return Ok(Some((stream, hello, key))),
                Err(reason) => reason,
            },
            Greeting::Join(join) => {
                self.join(&join, stream)?;
                return Ok(None);
            }
            Greeting::Foreign { protocol } => handshake::foreign(protocol),
            other => return Err(io::Error::other(format!("unexpected greeting {other:?}"))),
        };
        tracing::warn!(reason, "link refused");
        link::send(&mut stream, &Greeting::Reject { reason }).await?;
        Ok(None)
    }

    fn join(&self, join: &Join, stream: Socket) -> io::Result<()> {
        let mut joinable = self.joinable();
        let link =
            joinable.get_mut(&join.token).filter(|link| link.key.check(Claim::Connection(join.number), &join.proof));
        let link = link.ok_or_else(|| io::Error::other("joins no link of ours"))?;
        if link.transport != TransportKind::Tcp {
            return Err(io::Error::other(format!("joins a link by {:?}", link.transport)));
        }
        if join.number as usize >= MOST_STREAMS || link.joined & 1 << join.number != 0 {
            let number = join.number;
            return Err(io::Error::other(format!("joins its link as number {number}, which is taken or too large")));
        }
        let receiver = Receiver {
            landings: self.landings.clone(),
            token: join.token,
            block_bytes: link.terms.block_bytes(),
            digest: link.digest,
        };
        receiver.start(join.number as usize, stream.detach()?, &self.movers, &link.stop);
        link.joined |= 1 << join.number;
        Ok(())
    }

    async fn answer(&self, mut stream: Socket, hello: Hello, key: LinkKey, places: &Arc<Semaphore>) {
        let token = rand::random();
        let answer = match places.clone().try_acquire_owned() {
            Ok(place) => {
                self.choose(&hello, stream.is_looped(), (token, &key)).await.map(|chosen| (Arc::new(place), chosen))
            }
            Err(_) => Err(format!("{MOST_LINKS} links are open")),
        };
        let (place, (Agreed { transport, digest, terms }, writer, window)) = match answer {
            Ok(answer) => answer,
            Err(reason) => {
                tracing::warn!(peer = hello.identity.worker, reason, "link refused");
                // The peer learns why, or that the connection closed; nothing depends on which.
                let _ = timeout(HANDSHAKE_LIMIT, link::send(&mut stream, &Greeting::Reject { reason })).await;
                return;
            }
        };
        let welcome = Welcome {
            proof: key.prove(Claim::Target),
            identity: self.offer.identity.clone(),
            landings: self.registration.number(),
            transport,
            ucx: window,
            digest,
            token,
            ping_ms: self.offer.ping_ms,
        };
        if terms.converts() {
            let (from, to) = (terms.source.pool.dtype, terms.target.pool.dtype);
            tracing::info!(peer = hello.identity.worker, %from, %to, "keys and values are converted on their way here");
        }
        let (stop, terms) = (LinkStop::default(), Arc::new(terms));
        let joinable = Joinable { stop: stop.clone(), terms: terms.clone(), key, transport, digest, joined: 0 };
        self.joinable().insert(token, joinable);
        let ucx = self.ucx.as_ref().filter(|_| welcome.ucx.is_some());
        let released = CancellationToken::new();
        if writer.is_some() || ucx.is_some() {
            let released = ucx.map(|_| released.clone());
            self.watch((writer, released), token, stop.clone(), place.clone());
        }
        if let Ok(Ok(())) = timeout(HANDSHAKE_LIMIT, welcome_source(&mut stream, welcome, ucx)).await {
            self.run_accepted(stream, &hello, (token, transport, terms), &stop).await;
        }
        self.joinable().remove(&token);
        if let Some(ucx) = ucx {
            ucx.release(token).await;
            released.cancel();
        }
    }

    /// Chooses how bytes will move over the link with `token`, and makes sure that they can.
    async fn choose(&self, hello: &Hello, looped: bool, (token, key): (u64, &LinkKey)) -> Result<Chosen, String> {
        let mut failed = Vec::new();
        loop {
            let agreed = self.offer.answer(hello, looped, &failed)?;
            let kind = agreed.transport;
            let (error, fallbacks) = match (kind, &self.shared, &self.ucx, &hello.shm) {
                (TransportKind::Cuda | TransportKind::Shm, Some(shared), _, Some(invitation)) => {
                    let directly = kind == TransportKind::Cuda;
                    match shared.pass(invitation, key, directly).await {
                        Ok(writer) => return Ok((agreed, Some(writer), None)),
                        Err(error) if directly => (error.to_string(), &self.cuda_fallbacks),
                        Err(error) => (error.to_string(), &self.shm_fallbacks),
                    }
                }
                (TransportKind::Ucx, _, Some(ucx), invitation) => {
                    match let_in(ucx, (token, key), invitation.as_ref()).await {
                        Ok((writer, window)) => return Ok((agreed, writer, Some(window))),
                        Err(error) => (error, &self.ucx_fallbacks),
                    }
                }
                _ => return Ok((agreed, None, None)),
            };
            let peer = &hello.identity.worker;
            tracing::warn!(peer, wanted = ?kind, error, "the source cannot be let in, something else is used");
            fallbacks.increment(1);
            failed.push((kind, error));
        }
    }

    /// Lets a source write into landings of the link with `token`, and watches for the proof that it no longer can: a `writer` of
    /// this host is gone, and what it wrote through by UCX is `released`. Until then it takes up a place among the links, also when
    /// the link is long gone.
    fn watch(
        &self,
        (writer, released): (Option<Writer>, Option<CancellationToken>),
        token: u64,
        stop: LinkStop,
        place: Arc<OwnedSemaphorePermit>,
    ) {
        self.landings.writer_joined(token);
        let landings = self.landings.clone();
        self.tasks.spawn(async move {
            if let Some(writer) = writer {
                stop.stop(writer.gone().await);
            }
            if let Some(released) = released {
                released.cancelled().await;
            }
            landings.writer_gone(token);
            drop(place);
        });
    }

    /// The source of the link with `token` says that it wrote a frame.
    pub(crate) fn written(&self, token: u64, frame: Message) {
        let Some((kind, digest)) = self.joinable().get(&token).map(|link| (link.transport, link.digest)) else {
            return;
        };
        let how = match kind {
            TransportKind::Cuda => Written::Directly,
            TransportKind::Shm | TransportKind::Ucx if digest => Written::Digested,
            _ => Written::Here,
        };
        // Over another transport the landing refuses it.
        let Some(rest) = shm::written(&self.landings, token, frame, how) else { return };
        if how == Written::Directly || how == Written::Here && self.pool.backing().is_none() {
            // A matter of microseconds.
            return rest();
        }
        self.movers.spawn(0, async move { rest() });
    }

    async fn run_accepted(
        &self,
        stream: Socket,
        hello: &Hello,
        (token, kind, terms): (u64, TransportKind, Arc<Terms>),
        stop: &LinkStop,
    ) {
        let (peer, incarnation) = (hello.identity.worker.clone(), hello.identity.incarnation);
        let ping_ms = hello.ping_ms;
        let link = self.next();
        let (outgoing, messages) = mpsc::channel(MOST_MESSAGES);
        let up = Up { peer, incarnation, token, kind, terms, role: Role::Target(outgoing, stop.clone()) };
        self.arrive(Arrival::Up(link, up)).await;
        let reason = link::carry(link, stream.into_split(), messages, &self.arrivals, stop, self.pings(ping_ms)).await;
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::{
        inbox::Inbox,
        message::Invitation,
        testing::{identity, key, sealed_pool},
    };

    /// The target's side, and a `Hello` of a source in another process of this host.
    fn target(config: &Config) -> (Arc<Links>, Hello) {
        let identity = identity("decode-0", 6);
        let file = sealed_pool(&identity.layout);
        let shared = Shared::of(&file, &identity.layout, None).expect("can be shared");
        let host = shared.host().to_owned();
        let pool = Arc::new(Pages::map(&file, identity.layout.clone()).expect("map"));
        let landings = Arc::new(Landings::new(pool.clone(), Arc::new(Inbox::default())));
        let source = Offer::new(
            &Config::default(),
            crate::testing::identity("prefill-0", 6),
            2,
            Ok(host.clone()),
            (false, false),
        );
        let peer = Peer { worker: "decode-0".into(), incarnation: 1_000, link: String::new() };
        let hello = source.hello(
            &peer,
            ([7; 32], false),
            Some(Invitation { host: host.clone(), socket: "baton-kv-nobody".into() }),
        );
        let offer = Offer::new(config, identity, 1, Ok(host), (false, false));
        let (arrivals, _) = mpsc::channel(1);
        let movers = Movers::start(1).expect("threads");
        let access = Access::new(&Config::default()).expect("no files");
        (Links::new(config, (offer, access), (pool, landings), (Some(shared), None), movers, arrivals), hello)
    }

    #[tokio::test]
    async fn a_pool_that_cannot_be_passed_is_not_waited_for() {
        let (links, hello) = target(&Config::default());
        let (agreed, writer, _) = links.choose(&hello, false, (1, key())).await.expect("something else");
        assert_eq!((agreed.transport, agreed.digest, writer.is_none()), (TransportKind::Tcp, true, true));

        let (links, hello) = target(&Config { require: Some(TransportKind::Shm), ..Config::default() });
        let refusal = links.choose(&hello, false, (1, key())).await.expect_err("nothing else will do");
        let expected = "transport: yours [Memory, Shm, Tcp], ours [Shm], in different processes; Shm: Connection refused (os error 111)";
        assert_eq!(refusal, expected);
    }

    /// A worker with UCX that thinks it worth while, on a host of its own.
    async fn with_ucx(worker: &str, number: u64, config: &Config) -> Arc<Links> {
        let identity = identity(worker, 6);
        let file = sealed_pool(&identity.layout);
        let pool = Arc::new(Pages::map(&file, identity.layout.clone()).expect("map"));
        let landings = Arc::new(Landings::new(pool.clone(), Arc::new(Inbox::default())));
        let ucx = Ucx::start(&config.ucx, pool.clone(), &file).await.expect("UCX starts");
        let offer = Offer::new(config, identity, number, Ok(format!("host {number}")), (false, true));
        let (access, movers) = (Access::new(config).expect("no files"), Movers::start(1).expect("threads"));
        let (arrivals, _) = mpsc::channel(1);
        Links::new(config, (offer, access), (pool, landings), (None, Some(ucx)), movers, arrivals)
    }

    #[tokio::test]
    async fn ucx_without_rdma_gives_way_to_tcp() {
        let Some(ucx) = crate::transport::ucx::tests::config("tcp") else { return };
        let config = Config { ucx, ..Config::default() };
        let (source, target) = (with_ucx("prefill-0", 1, &config).await, with_ucx("decode-0", 2, &config).await);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let link = listener.local_addr().expect("bound").to_string();
        let stop = CancellationToken::new();
        let accepting = tokio::spawn(target.clone().accept(listener, stop.clone()));
        let peer = Peer { worker: "decode-0".into(), incarnation: 1_000, link };
        let (say, _messages) = mpsc::channel(1);
        let up = timeout(Duration::from_secs(20), source.bring_up(&peer, say, &LinkStop::default())).await;
        let (_stream, welcome, ..) = up.expect("in time").map_err(|no_link| no_link.reason).expect("a link");
        assert_eq!(welcome.transport, TransportKind::Tcp);
        stop.cancel();
        accepting.await.expect("ends");
    }

    #[tokio::test]
    async fn a_pool_that_was_passed_is_chosen() {
        let (links, mut hello) = target(&Config::default());
        let door = Door::open().expect("door");
        hello.shm = Some(door.invitation());
        let (chosen, _remote) = tokio::join!(links.choose(&hello, false, (1, key())), door.receive(key(), None));
        let (agreed, writer, _) = chosen.expect("shared");
        assert_eq!((agreed.transport, agreed.digest, writer.is_some()), (TransportKind::Shm, false, true));
    }
}
