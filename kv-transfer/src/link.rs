//! The control connection of a link: dialling, accepting, messages, and noticing that the other end is gone.
//!
//! A link is dialled by the source on first use and again on the next use after it died. Its control socket carries every
//! message but the blocks themselves. Either end pings; one that heard nothing for two pings, or whose socket closes, declares
//! the link dead, and the driver ends every hand-off on it. Reading stops while the driver is busy (its worker does not take
//! events), and that time does not count as silence.

use crate::{
    Peer, TransportKind,
    handoffs::LinkId,
    handshake::{self, Offer},
    message::{Greeting, Malformed, Message, Welcome, frame_bytes},
    transport::Transport,
};
use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
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
const LONGEST_GREETING: usize = 16 << 10;

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
        Self { reason: error.to_string(), refused: false }
    }
}

/// Dials `peer` and says hello. Returns the control connection and the answer.
pub(crate) async fn dial(offer: &Offer, peer: &Peer) -> Result<(TcpStream, Welcome), NoLink> {
    let mut stream = connect(&peer.link).await?;
    send(&mut stream, &Greeting::Hello(offer.hello(peer))).await?;
    let refused =
        |reason: String| NoLink { reason: format!("{} at {}: {reason}", peer.worker, peer.link), refused: true };
    match receive(&mut stream).await? {
        Greeting::Welcome(welcome) => match offer.check(&welcome, peer) {
            Ok(()) => Ok((stream, welcome)),
            Err(reason) => Err(refused(reason)),
        },
        Greeting::Reject { reason } => Err(refused(reason)),
        Greeting::Foreign { protocol } => Err(refused(handshake::foreign(protocol))),
        other => Err(refused(format!("unexpected greeting {other:?}"))),
    }
}

/// Opens one data connection of the link that was given `token`.
pub(crate) async fn join(address: &str, token: u64) -> io::Result<std::net::TcpStream> {
    let mut stream = connect(address).await?;
    send(&mut stream, &Greeting::Join { token }).await?;
    stream.into_std()
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("connect {address}: {error}"));
    let stream = TcpStream::connect(address).await.map_err(named)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Writes a greeting.
pub(crate) async fn send(stream: &mut TcpStream, greeting: &Greeting) -> io::Result<()> {
    let mut frame = Vec::new();
    greeting.encode(&mut frame);
    stream.write_all(&frame).await
}

/// Reads a greeting, and not a byte more.
pub(crate) async fn receive(stream: &mut TcpStream) -> io::Result<Greeting> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let bytes = frame_bytes(prefix).map_err(io::Error::other)?;
    if bytes > LONGEST_GREETING {
        return Err(io::Error::other(Malformed::TooLong(bytes)));
    }
    let mut frame = vec![0; bytes];
    stream.read_exact(&mut frame).await?;
    Greeting::decode(&frame).map_err(io::Error::other)
}

/// Carries messages both ways until the link ends. Returns why it did.
pub(crate) async fn carry(
    link: LinkId,
    stream: TcpStream,
    outgoing: mpsc::Receiver<Message>,
    arrivals: &mpsc::Sender<Arrival>,
    stop: &LinkStop,
    pings: Pings,
) -> String {
    let (reader, writer) = stream.into_split();
    tokio::select! {
        // Neither is resumed after the other has ended: cancel safety is not asked of them.
        reason = read(link, reader, arrivals, pings.silence()) => reason,
        error = write(writer, outgoing, pings.ours) => error.to_string(),
        () = stop.token().cancelled() => stop.reason(),
    }
}

async fn read(link: LinkId, mut reader: OwnedReadHalf, arrivals: &mpsc::Sender<Arrival>, silence: Duration) -> String {
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

async fn write(mut writer: OwnedWriteHalf, mut outgoing: mpsc::Receiver<Message>, ping: Duration) -> io::Error {
    let mut pings = interval_at(Instant::now() + ping, ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut frame = Vec::new();
    loop {
        // Both arms are cancel safe: a message is taken or stays, a tick happens or does not.
        tokio::select! {
            message = outgoing.recv() => match message {
                Some(message) => message.encode(&mut frame),
                None => return io::Error::other("shutting down"),
            },
            _ = pings.tick() => Message::Ping.encode(&mut frame),
        }
        while let Ok(message) = outgoing.try_recv() {
            message.encode(&mut frame);
        }
        if let Err(error) = writer.write_all(&frame).await {
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
    async fn read(&mut self, reader: &mut OwnedReadHalf) -> io::Result<usize> {
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
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("bound");
        let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (dialled.expect("connect"), accepted.expect("accept").0)
    }

    /// Runs one end; the other is the test's own socket.
    fn start(stream: TcpStream, ping: Duration) -> (mpsc::Sender<Message>, mpsc::Receiver<Arrival>, LinkStop) {
        let pings = Pings { ours: ping, theirs: ping };
        let (say, outgoing) = mpsc::channel(8);
        let (arrivals, arrived) = mpsc::channel(8);
        let stop = LinkStop::default();
        let stopping = stop.clone();
        tokio::spawn(async move {
            let reason = carry(LinkId(1), stream, outgoing, &arrivals, &stopping, pings).await;
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

    #[tokio::test]
    async fn messages_cross_in_pieces() {
        let (ours, mut theirs) = pair().await;
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

    #[tokio::test]
    async fn two_missed_pings_are_death() {
        let ping = Duration::from_millis(40);
        let (ours, _theirs) = pair().await;
        let started = Instant::now();
        let (_say, mut arrived, _stop) = start(ours, ping);
        assert_eq!(down(&mut arrived).await, "nothing heard for 90ms");
        assert!(started.elapsed() >= 2 * ping);
    }

    #[tokio::test]
    async fn pings_keep_a_silent_link_alive() {
        let ping = Duration::from_millis(40);
        let (ours, theirs) = pair().await;
        let (_say, mut arrived, _stop) = start(ours, ping);
        let (_other, mut other_arrived, other_stop) = start(theirs, ping);
        timeout(10 * ping, arrived.recv()).await.expect_err("nothing happens");
        other_stop.stop("enough");
        assert_eq!(down(&mut other_arrived).await, "enough");
        assert_eq!(down(&mut arrived).await, "the other end closed the link");
    }

    #[tokio::test]
    async fn nonsense_ends_the_link() {
        let (ours, mut theirs) = pair().await;
        let (_say, mut arrived, _stop) = start(ours, Duration::from_secs(9));
        theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("write");
        assert_eq!(down(&mut arrived).await, "frame of 542393671 bytes is longer than 4194304");
    }
}
