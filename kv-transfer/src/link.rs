//! The control connection of a link: dialling, accepting, messages, and noticing that the other end is gone.
//!
//! A link is dialled by the source on first use and again on the next use after it died. Its control socket carries every
//! message but the blocks themselves. Either end pings; one that heard nothing for two pings, or whose socket closes, declares
//! the link dead, and the driver ends every hand-off on it. Reading stops while the driver is busy (its worker does not take
//! events), and that time does not count as silence.

use crate::{
    Config, Error, Peer, TransportKind,
    auth::{Claim, ClusterKey, LinkKey},
    handoffs::LinkId,
    handshake::{self, Offer},
    message::{Greeting, Hello, Invitation, Join, Malformed, Message, Welcome, frame_bytes},
    plan::Terms,
    socket::{Detached, Socket, Sockets},
    transport::Transport,
};
use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;

/// Longest a connection may take to come up, handshake included.
pub(crate) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// Messages waiting to be written before the link is given up: the other end has long stopped reading.
pub(crate) const MOST_MESSAGES: usize = 16 << 10;
/// Longest silence that a peer can ask for by announcing rare pings.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);
/// Longest greeting: there is nothing to read from a peer that is not one of ours.
const LONGEST_GREETING: usize = 32 << 10;

/// Ends a link, for a reason; the first one stands. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinkStop {
    token: CancellationToken,
    reason: Arc<OnceLock<String>>,
}

impl LinkStop {
    /// Ends the link.
    pub(crate) fn stop(&self, reason: impl Into<String>) {
        if !self.token.is_cancelled() {
            let _ = self.reason.set(reason.into());
            self.token.cancel();
        }
    }

    /// Returns what is cancelled when the link ends.
    pub(crate) fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Returns why it was ended.
    pub(crate) fn reason(&self) -> String {
        self.reason.get().cloned().unwrap_or_default()
    }
}

/// How often each end of a link pings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pings {
    pub(crate) ours: Duration,
    pub(crate) theirs: Duration,
}

impl Pings {
    /// Longest silence of the other end: two missed pings, and a little for the way. Bounded, whatever it announced.
    fn silence(self) -> Duration {
        (self.theirs * 2 + self.theirs / 4).min(LONGEST_SILENCE)
    }
}

/// What a link tells the driver, in order.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The link is up.
    Up(LinkId, Up),
    /// The other end says something.
    Said(LinkId, Message),
    /// The link is gone, or never came up. `refused`: the other end would not have it.
    Down { link: LinkId, reason: String, refused: bool },
}

/// What the driver learns when a link is up.
#[derive(Debug)]
pub(crate) struct Up {
    /// Member id of the other end.
    pub(crate) peer: String,
    /// When the other end's process started.
    pub(crate) incarnation: u64,
    /// Names the link on both ends.
    pub(crate) token: u64,
    /// How bytes move.
    pub(crate) kind: TransportKind,
    /// How pages of one end become pages of the other.
    pub(crate) terms: Arc<Terms>,
    /// Which end this is.
    pub(crate) role: Role,
}

/// Which end of a link this is.
#[derive(Debug)]
pub(crate) enum Role {
    /// Dialled here: bytes leave through this.
    Source(Arc<dyn Transport>),
    /// Dialled there: answers go here, and this ends it.
    Target(mpsc::Sender<Message>, LinkStop),
}

/// Why a link did not come up.
#[derive(Debug)]
pub(crate) struct NoLink {
    pub(crate) reason: String,
    /// The ends do not fit, as opposed to not reaching each other.
    pub(crate) refused: bool,
}

impl From<io::Error> for NoLink {
    fn from(error: io::Error) -> Self {
        // What was said makes no sense, or TLS would not have it: trying again does not help.
        Self { refused: error.kind() == io::ErrorKind::InvalidData, reason: error.to_string() }
    }
}

/// How links of this worker come up.
#[derive(Debug)]
pub(crate) struct Access {
    pub(crate) sockets: Sockets,
    pub(crate) cluster: ClusterKey,
}

impl Access {
    /// Reads what `config` names.
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let sockets = Sockets::new(config.tls.as_ref())?;
        Ok(Self { sockets, cluster: ClusterKey::read(config.cluster_token_file.as_deref())? })
    }

    /// Dials `peer`, says hello and proves to be of its cluster. Returns the control connection, on which the target owes its
    /// answer, and the link's key.
    pub(crate) async fn dial(
        &self,
        offer: &Offer,
        peer: &Peer,
        shm: Option<Invitation>,
    ) -> Result<(Socket, LinkKey), NoLink> {
        let mut stream = self.sockets.connect(&peer.link).await?;
        let mut hello = Vec::new();
        Greeting::Hello(offer.hello(peer, (rand::random(), self.cluster.given()), shm)).encode(&mut hello);
        stream.write_all(&hello).await?;
        stream.flush().await?;
        let challenge = match receive(&mut stream).await? {
            Greeting::Challenge(challenge) => challenge,
            other => return Err(unwelcome(peer, other)),
        };
        let key = self.cluster.link(&hello[4..], &challenge);
        send(&mut stream, &Greeting::Proof(key.prove(Claim::Source))).await?;
        Ok((stream, key))
    }

    /// Opens connection `number` of the link that was given `token`.
    pub(crate) async fn join(&self, address: &str, token: u64, key: &LinkKey, number: u32) -> io::Result<Detached> {
        let mut stream = self.sockets.connect(address).await?;
        let proof = key.prove(Claim::Connection(number));
        send(&mut stream, &Greeting::Join(Join { token, number, proof })).await?;
        stream.detach()
    }

    /// Target: has the source whose `Hello` came in `frame` prove to be of this cluster. Returns the link's key, or why not, as
    /// the source is to hear it.
    pub(crate) async fn challenge(
        &self,
        stream: &mut Socket,
        hello: &Hello,
        frame: &[u8],
    ) -> io::Result<Result<LinkKey, String>> {
        if let Err(reason) = self.cluster.compare(hello.cluster_token) {
            return Ok(Err(reason));
        }
        let challenge = rand::random();
        let key = self.cluster.link(frame, &challenge);
        send(stream, &Greeting::Challenge(challenge)).await?;
        match receive(stream).await? {
            Greeting::Proof(proof) if key.check(Claim::Source, &proof) => Ok(Ok(key)),
            Greeting::Proof(_) => Ok(Err("cluster token: your proof is wrong, so the tokens differ".into())),
            other => Err(io::Error::other(format!("unexpected greeting {other:?}"))),
        }
    }
}

/// Waits for the target's answer on a connection that was dialled, and checks it. Returns it and the terms.
pub(crate) async fn answer(
    stream: &mut Socket,
    key: &LinkKey,
    (offer, peer): (&Offer, &Peer),
) -> Result<(Welcome, Arc<Terms>), NoLink> {
    match receive(stream).await? {
        Greeting::Welcome(welcome) if !key.check(Claim::Target, &welcome.proof) => {
            Err(refused(peer, "cluster token: its proof is wrong"))
        }
        Greeting::Welcome(welcome) => match offer.check(&welcome, peer) {
            Ok(terms) => Ok((welcome, Arc::new(terms))),
            Err(reason) => Err(refused(peer, &reason)),
        },
        other => Err(unwelcome(peer, other)),
    }
}

/// There is no link, after an answer that is not the one hoped for.
fn unwelcome(peer: &Peer, answer: Greeting) -> NoLink {
    match answer {
        Greeting::Reject { reason } => refused(peer, &reason),
        Greeting::Foreign { protocol } => refused(peer, &handshake::foreign(protocol)),
        other => refused(peer, &format!("unexpected greeting {other:?}")),
    }
}

fn refused(peer: &Peer, reason: &str) -> NoLink {
    NoLink { reason: format!("{} at {}: {reason}", peer.worker, peer.link), refused: true }
}

/// Writes a greeting.
pub(crate) async fn send(stream: &mut Socket, greeting: &Greeting) -> io::Result<()> {
    let mut frame = Vec::new();
    greeting.encode(&mut frame);
    stream.write_all(&frame).await?;
    stream.flush().await
}

/// Reads a greeting, and not a byte more.
pub(crate) async fn receive(stream: &mut Socket) -> io::Result<Greeting> {
    Greeting::decode(&receive_frame(stream).await?).map_err(io::Error::other)
}

/// Reads a greeting as it is on the wire, without its length.
pub(crate) async fn receive_frame(stream: &mut Socket) -> io::Result<Vec<u8>> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let bytes = frame_bytes(prefix).map_err(io::Error::other)?;
    if bytes > LONGEST_GREETING {
        return Err(io::Error::other(Malformed::TooLong(bytes)));
    }
    let mut frame = vec![0; bytes];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

/// Carries messages both ways until the link ends. Returns why it did.
pub(crate) async fn carry(
    link: LinkId,
    (reader, writer): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    outgoing: mpsc::Receiver<Message>,
    arrivals: &mpsc::Sender<Arrival>,
    stop: &LinkStop,
    pings: Pings,
) -> String {
    tokio::select! {
        // Neither is resumed after the other has ended: cancel safety is not asked of them.
        reason = read(link, reader, arrivals, pings.silence()) => reason,
        error = write(writer, outgoing, pings.ours) => error.to_string(),
        () = stop.token().cancelled() => stop.reason(),
    }
}

async fn read(
    link: LinkId,
    mut reader: impl AsyncRead + Unpin,
    arrivals: &mpsc::Sender<Arrival>,
    silence: Duration,
) -> String {
    let mut frames = Frames::default();
    loop {
        loop {
            match frames.next() {
                Ok(None) => break,
                Ok(Some(Message::Ping)) => {}
                Ok(Some(message)) => {
                    if arrivals.send(Arrival::Said(link, message)).await.is_err() {
                        return "shutting down".into();
                    }
                }
                Err(error) => return error.to_string(),
            }
        }
        match timeout(silence, frames.read(&mut reader)).await {
            Err(_) => return format!("nothing heard for {silence:?}"),
            Ok(Ok(0)) => return "the other end closed the link".into(),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return error.to_string(),
        }
    }
}

async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut outgoing: mpsc::Receiver<Message>,
    ping: Duration,
) -> io::Error {
    let mut pings = interval_at(Instant::now() + ping, ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut frame = Vec::new();
    loop {
        // Both arms are cancel safe: a message is taken or stays, a tick happens or does not.
        let message = tokio::select! {
            message = outgoing.recv() => match message {
                Some(message) => message,
                None => return io::Error::other("shutting down"),
            },
            _ = pings.tick() => Message::Ping,
        };
        message.encode(&mut frame);
        if matches!(message, Message::Pages { .. }) {
            // What is ready to be said now goes in the same write: the commit with the frame before it.
            tokio::task::yield_now().await;
        }
        while let Ok(message) = outgoing.try_recv() {
            message.encode(&mut frame);
        }
        if let Err(error) = writer.write_all(&frame).await {
            return error;
        }
        // TLS may hold some of it back.
        if let Err(error) = writer.flush().await {
            return error;
        }
        frame.clear();
    }
}

/// Bytes read and not yet made into messages. Holds at most one frame and what came with its end.
#[derive(Debug, Default)]
struct Frames(bytes::BytesMut);

impl Frames {
    /// Reads what is there. Returns the number of bytes; 0 = closed.
    async fn read(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        self.0.reserve(4096);
        reader.read_buf(&mut self.0).await
    }

    /// Takes the next whole message.
    fn next(&mut self) -> Result<Option<Message>, Malformed> {
        let Some(prefix) = self.0.first_chunk() else { return Ok(None) };
        let bytes = frame_bytes(*prefix)?;
        if self.0.len() < 4 + bytes {
            return Ok(None);
        }
        let frame = self.0.split_to(4 + bytes);
        Message::decode(&frame[4..]).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HandoffId;
    use tokio::io::{DuplexStream, duplex};

    fn pair() -> (DuplexStream, DuplexStream) {
        duplex(64 << 10)
    }

    /// Runs one end; the other is the test's own. Time is virtual: a busy machine changes nothing.
    fn start(stream: DuplexStream, ping: Duration) -> (mpsc::Sender<Message>, mpsc::Receiver<Arrival>, LinkStop) {
        let pings = Pings { ours: ping, theirs: ping };
        let (say, outgoing) = mpsc::channel(8);
        let (arrivals, arrived) = mpsc::channel(8);
        let stop = LinkStop::default();
        let stopping = stop.clone();
        tokio::spawn(async move {
            let reason = carry(LinkId(1), tokio::io::split(stream), outgoing, &arrivals, &stopping, pings).await;
            let _ = arrivals.send(Arrival::Down { link: LinkId(1), reason, refused: false }).await;
        });
        (say, arrived, stop)
    }

    async fn down(arrived: &mut mpsc::Receiver<Arrival>) -> String {
        match timeout(Duration::from_secs(5), arrived.recv()).await.expect("an arrival").expect("not closed") {
            Arrival::Down { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_cross_in_pieces() {
        let (ours, mut theirs) = pair();
        let (_say, mut arrived, _stop) = start(ours, Duration::from_secs(9));
        let mut bytes = Vec::new();
        let message = Message::Abort { handoff: HandoffId(3), reason: "so".into() };
        message.encode(&mut bytes);
        Message::Ping.encode(&mut bytes);
        message.encode(&mut bytes);
        let cut = bytes.len() - 3;
        theirs.write_all(&bytes[..7]).await.expect("write");
        theirs.write_all(&bytes[7..cut]).await.expect("write");
        assert!(matches!(arrived.recv().await, Some(Arrival::Said(LinkId(1), said)) if said == message));
        theirs.write_all(&bytes[cut..]).await.expect("write");
        assert!(matches!(arrived.recv().await, Some(Arrival::Said(LinkId(1), said)) if said == message));
    }

    #[tokio::test(start_paused = true)]
    async fn two_missed_pings_are_death() {
        let ping = Duration::from_millis(Config::default().ping_interval_ms);
        let (ours, _theirs) = pair();
        let started = Instant::now();
        let (_say, mut arrived, _stop) = start(ours, ping);
        assert_eq!(down(&mut arrived).await, "nothing heard for 900ms");
        assert!((2 * ping..=Duration::from_secs(1)).contains(&started.elapsed()), "{:?}", started.elapsed());
    }

    /// However the other end goes, this one knows within a second.
    #[tokio::test(start_paused = true)]
    async fn every_end_is_noticed_within_a_second() {
        let ping = Duration::from_millis(Config::default().ping_interval_ms);
        let mut half = Vec::new();
        Message::Abort { handoff: HandoffId(3), reason: "so".into() }.encode(&mut half);
        half.truncate(half.len() / 2);
        let (closed, silent) = ("the other end closed the link", "nothing heard for 900ms");
        for (says, stays, reason) in
            [(vec![], false, closed), (half.clone(), false, closed), (vec![], true, silent), (half, true, silent)]
        {
            // As little room as a socket whose other end does not read.
            let (ours, mut theirs) = duplex(16);
            let (_say, mut arrived, _stop) = start(ours, ping);
            let writing = tokio::spawn(async move {
                theirs.write_all(&says).await.expect("write");
                // Reads nothing, and says nothing more.
                if stays {
                    std::future::pending::<()>().await;
                }
            });
            let started = Instant::now();
            assert_eq!(down(&mut arrived).await, reason);
            let limit = if stays { Duration::from_secs(1) } else { Duration::ZERO };
            assert!(started.elapsed() <= limit, "{reason}: {:?}", started.elapsed());
            writing.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pings_keep_a_silent_link_alive() {
        let ping = Duration::from_millis(40);
        let (ours, theirs) = pair();
        let (_say, mut arrived, _stop) = start(ours, ping);
        let (_other, mut other_arrived, other_stop) = start(theirs, ping);
        timeout(10 * ping, arrived.recv()).await.expect_err("nothing happens");
        other_stop.stop("enough");
        assert_eq!(down(&mut other_arrived).await, "enough");
        assert_eq!(down(&mut arrived).await, "the other end closed the link");
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_ends_the_link() {
        let (ours, mut theirs) = pair();
        let (_say, mut arrived, _stop) = start(ours, Duration::from_secs(9));
        theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("write");
        assert_eq!(down(&mut arrived).await, "frame of 542393671 bytes is longer than 4194304");
    }
}
