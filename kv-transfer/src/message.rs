//! What two ends of a link say to each other, and how it looks on the wire.
//!
//! A frame is its length (u32), a tag (u8) and fields, all little-endian. `Hello` and `Welcome` carry a magic number and the
//! protocol version before anything that a later version could change; the rest of them is JSON, since they are read once per
//! link and should survive fields being added. Everything read is checked for length before memory is taken for it.

use crate::{
    Commit, HandoffId, Identity, TransportKind, Verify,
    auth::{Nonce, Proof},
    digest::Digest,
    plan::Piece,
    transport::ucx::{LONGEST_NAME, Window},
};
use kv_cache::{PageHash, PageId};
use serde::{Deserialize, Serialize};

/// Version of everything in this file. Both ends must speak the same one.
pub(crate) const PROTOCOL: u32 = 6;
/// Longest frame, without its length. `Open` of a sequence of a million pages fits.
pub(crate) const LONGEST_FRAME: usize = 4 << 20;
/// Longest reason that travels; the rest is cut.
const LONGEST_REASON: usize = 1024;
const MAGIC: [u8; 4] = *b"BTKV";

/// Everything said on a link after the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Source: a landing is wanted for the pages of this many tokens.
    Begin { handoff: HandoffId, tokens: u32 },
    /// Target: the landing, one page per page of the sequence; the first `have` are there already.
    Open { handoff: HandoffId, have: u32, landing: Vec<PageId> },
    /// Target: will not take it.
    Refuse { handoff: HandoffId, reason: String },
    /// Source. On a data connection: the blocks that follow, laid end to end. On the control connection of a link whose source
    /// writes by itself: blocks that it wrote.
    Pages { handoff: HandoffId, sequence: u32, pieces: Vec<Piece> },
    /// Source: every block has left. `settled`: it knows that the target owns the sequence, and waits for no `Ack`.
    Commit { handoff: HandoffId, sent: Sent, commit: Commit, settled: bool },
    /// Target: it owns the sequence.
    Ack { handoff: HandoffId },
    /// Either: called off.
    Abort { handoff: HandoffId, reason: String },
    /// Source: called off, for the answer was complete with its first token.
    Forgo { handoff: HandoffId },
    /// Source: of this hand-off, no write of mine can land any more.
    Quiet { handoff: HandoffId },
    /// Either: alive.
    Ping,
    /// Target, at the other end of a link that it dialled: begin a hand-off of the prefix with these pages to `link`, of this life
    /// of mine; or refuse.
    Fetch { handoff: HandoffId, incarnation: u64, link: String, pages: Vec<PageHash> },
}

/// What the source says it sent; the target compares before the sequence becomes runnable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Pages of the sequence that were not there already.
    pub(crate) pages: u32,
    /// Bytes of all blocks.
    pub(crate) bytes: u64,
    /// Frames they travelled in.
    pub(crate) frames: u32,
    /// Digest over all frames, when the link verifies contents.
    pub(crate) digest: Option<Digest>,
}

/// The first frame on a connection, and the answer to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Greeting {
    /// From the source, on a control connection.
    Hello(Hello),
    /// The target's first answer: prove who you are.
    Challenge(Nonce),
    /// From the source: it has the key of this link.
    Proof(Proof),
    /// The target's answer: the link is up.
    Welcome(Welcome),
    /// The target's answer: no link, and why.
    Reject { reason: String },
    /// From the source, of a link over UCX: the address of its worker, from which it will connect.
    Calling(Vec<u8>),
    /// The target's answer: it may.
    Expected,
    /// From the source, of a link over UCX: bytes have gone to the target's worker and back.
    Connected,
    /// From the source, on a further connection.
    Join(Join),
    /// Starts like a greeting of ours but speaks another version.
    Foreign { protocol: u32 },
}

/// The connection is number `number` of the link that was given `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) token: u64,
    pub(crate) number: u32,
    pub(crate) proof: Proof,
}

/// Who the source is, whom it wants and what it offers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// Drawn for this link.
    pub(crate) nonce: Nonce,
    /// Whether it has a cluster token.
    pub(crate) cluster_token: bool,
    /// The source.
    pub(crate) identity: Identity,
    /// Member id of the target it wants.
    pub(crate) target: String,
    /// Life of that member it was told.
    pub(crate) target_incarnation: u64,
    /// Drawn once per process: equal when both ends share one.
    pub(crate) process: u64,
    /// Where the target can pass its pool, if it lives on the same host.
    pub(crate) shm: Option<Invitation>,
    /// Ways it can move bytes.
    pub(crate) transports: Vec<TransportKind>,
    /// Names the boot of its host, where processes of that can share its pool.
    pub(crate) host: Option<String>,
    /// When it wants contents digested.
    pub(crate) verify: Verify,
    /// How often it pings, in milliseconds.
    pub(crate) ping_ms: u64,
}

/// Where a target on the same host can pass its pool to the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Invitation {
    /// Boot id of the source's machine.
    pub(crate) host: String,
    /// Name of an abstract Unix socket.
    pub(crate) socket: String,
}

/// Who the target is and what was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// That it has the key of this link.
    pub(crate) proof: Proof,
    /// The target.
    pub(crate) identity: Identity,
    /// Names its landings within the process.
    pub(crate) landings: u64,
    /// How bytes will move.
    pub(crate) transport: TransportKind,
    /// Where the source writes them, over UCX.
    pub(crate) ucx: Option<Window>,
    /// Whether contents are digested.
    pub(crate) digest: bool,
    /// Names the link to its further connections.
    pub(crate) token: u64,
    /// How often it pings, in milliseconds.
    pub(crate) ping_ms: u64,
}

/// Why bytes are not a frame of ours. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("frame of {0} bytes is longer than {LONGEST_FRAME}")]
    TooLong(usize),
    #[error("unknown frame tag {0}")]
    Tag(u8),
    #[error("frame ends early")]
    Short,
    #[error("frame has {0} bytes too many")]
    Long(usize),
    #[error("not a link of ours")]
    Magic,
    #[error("greeting: {0}")]
    Json(String),
}

/// Returns the length of the frame after `prefix`.
pub(crate) fn frame_bytes(prefix: [u8; 4]) -> Result<usize, Malformed> {
    let bytes = u32::from_le_bytes(prefix) as usize;
    if bytes > LONGEST_FRAME { Err(Malformed::TooLong(bytes)) } else { Ok(bytes) }
}

impl Message {
    /// Returns the hand-off it speaks of.
    pub(crate) fn handoff(&self) -> Option<HandoffId> {
        match self {
            Message::Begin { handoff, .. }
            | Message::Open { handoff, .. }
            | Message::Refuse { handoff, .. }
            | Message::Pages { handoff, .. }
            | Message::Commit { handoff, .. }
            | Message::Ack { handoff }
            | Message::Abort { handoff, .. }
            | Message::Fetch { handoff, .. }
            | Message::Forgo { handoff }
            | Message::Quiet { handoff } => Some(*handoff),
            Message::Ping => None,
        }
    }

    /// Appends the frame, length first.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        framed(out, |out| match self {
            Message::Begin { handoff, tokens } => {
                tagged(out, 1, *handoff);
                put_u32(out, *tokens);
            }
            Message::Open { handoff, have, landing } => {
                tagged(out, 2, *handoff);
                put_u32(out, *have);
                landing.iter().for_each(|page| put_u32(out, page.0));
            }
            Message::Refuse { handoff, reason } => {
                tagged(out, 3, *handoff);
                put_reason(out, reason);
            }
            Message::Pages { handoff, sequence, pieces } => {
                tagged(out, 4, *handoff);
                put_u32(out, *sequence);
                for piece in pieces {
                    [piece.layer, piece.pages.start, piece.pages.end].into_iter().for_each(|field| put_u32(out, field));
                }
            }
            Message::Commit { handoff, sent, commit, settled } => {
                tagged(out, 5, *handoff);
                out.push(u8::from(*settled));
                put_u32(out, sent.pages);
                out.extend(sent.bytes.to_le_bytes());
                put_u32(out, sent.frames);
                put_u32(out, commit.first_token);
                out.extend(sent.digest.iter().flat_map(|digest| digest.0));
            }
            Message::Ack { handoff } => tagged(out, 6, *handoff),
            Message::Abort { handoff, reason } => {
                tagged(out, 7, *handoff);
                put_reason(out, reason);
            }
            Message::Quiet { handoff } => tagged(out, 8, *handoff),
            Message::Ping => out.push(9),
            Message::Fetch { handoff, incarnation, link, pages } => {
                tagged(out, 10, *handoff);
                out.extend(incarnation.to_le_bytes());
                let link = cut(link).as_bytes();
                put_u32(out, link.len() as u32);
                out.extend(link);
                pages.iter().for_each(|page| out.extend(page.0.to_le_bytes()));
            }
            Message::Forgo { handoff } => tagged(out, 11, *handoff),
        });
    }

    /// Reads a frame, without its length.
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(frame);
        let tag = fields.u8()?;
        if tag == 9 {
            return fields.end().map(|()| Message::Ping);
        }
        if !(1..=11).contains(&tag) {
            return Err(Malformed::Tag(tag));
        }
        let handoff = HandoffId(fields.u64()?);
        let message = match tag {
            1 => Message::Begin { handoff, tokens: fields.u32()? },
            2 => Message::Open {
                handoff,
                have: fields.u32()?,
                landing: fields.rest_as(|fields| fields.u32().map(PageId))?,
            },
            3 => Message::Refuse { handoff, reason: fields.reason() },
            4 => Message::Pages { handoff, sequence: fields.u32()?, pieces: fields.rest_as(Fields::piece)? },
            5 => {
                let settled = fields.u8()? != 0;
                let (pages, bytes, frames) = (fields.u32()?, fields.u64()?, fields.u32()?);
                let commit = Commit { first_token: fields.u32()? };
                let digest = if fields.0.is_empty() { None } else { Some(Digest(fields.array()?)) };
                Message::Commit { handoff, sent: Sent { pages, bytes, frames, digest }, commit, settled }
            }
            6 => Message::Ack { handoff },
            7 => Message::Abort { handoff, reason: fields.reason() },
            8 => Message::Quiet { handoff },
            11 => Message::Forgo { handoff },
            _ => Message::Fetch {
                handoff,
                incarnation: fields.u64()?,
                link: fields.text()?,
                pages: fields.rest_as(|fields| fields.array().map(|bytes| PageHash(u128::from_le_bytes(bytes))))?,
            },
        };
        fields.end().map(|()| message)
    }
}

impl Greeting {
    /// Appends the frame, length first.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        framed(out, |out| match self {
            Greeting::Hello(hello) => greeting(out, 16, PROTOCOL, &json(hello)),
            Greeting::Welcome(welcome) => greeting(out, 17, PROTOCOL, &json(welcome)),
            Greeting::Reject { reason } => greeting(out, 18, PROTOCOL, cut(reason).as_bytes()),
            Greeting::Join(Join { token, number, proof }) => {
                greeting(out, 19, PROTOCOL, &token.to_le_bytes());
                put_u32(out, *number);
                out.extend(proof.0);
            }
            Greeting::Challenge(nonce) => greeting(out, 20, PROTOCOL, nonce),
            Greeting::Proof(proof) => greeting(out, 21, PROTOCOL, &proof.0),
            Greeting::Connected => greeting(out, 22, PROTOCOL, &[]),
            Greeting::Calling(address) => greeting(out, 23, PROTOCOL, address),
            Greeting::Expected => greeting(out, 24, PROTOCOL, &[]),
            Greeting::Foreign { protocol } => greeting(out, 16, *protocol, &[]),
        });
    }

    /// Reads a frame, without its length. A rejection is understood from every version; it is how versions learn of each other.
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(frame);
        let tag = fields.u8()?;
        if fields.array()? != MAGIC {
            return Err(Malformed::Magic);
        }
        let protocol = fields.u32()?;
        if protocol != PROTOCOL && tag != 18 {
            return Ok(Greeting::Foreign { protocol });
        }
        match tag {
            16 => from_json(fields.0).map(Greeting::Hello),
            17 => from_json(fields.0).map(Greeting::Welcome),
            18 => Ok(Greeting::Reject { reason: fields.reason() }),
            23 => match fields.0.len().checked_sub(LONGEST_NAME) {
                None | Some(0) => Ok(Greeting::Calling(fields.0.to_vec())),
                Some(more) => Err(Malformed::Long(more)),
            },
            19..=24 => {
                let greeting = match tag {
                    19 => Greeting::Join(Join {
                        token: fields.u64()?,
                        number: fields.u32()?,
                        proof: Proof(fields.array()?),
                    }),
                    20 => Greeting::Challenge(fields.array()?),
                    21 => Greeting::Proof(Proof(fields.array()?)),
                    22 => Greeting::Connected,
                    _ => Greeting::Expected,
                };
                fields.end().map(|()| greeting)
            }
            tag => Err(Malformed::Tag(tag)),
        }
    }
}

fn framed(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put_u32(out, 0);
    body(out);
    let bytes = u32::try_from(out.len() - start - 4).expect("a frame of ours is far below 4 GiB");
    out[start..start + 4].copy_from_slice(&bytes.to_le_bytes());
}

fn tagged(out: &mut Vec<u8>, tag: u8, handoff: HandoffId) {
    out.push(tag);
    out.extend(handoff.0.to_le_bytes());
}

fn greeting(out: &mut Vec<u8>, tag: u8, protocol: u32, rest: &[u8]) {
    out.push(tag);
    out.extend(MAGIC);
    put_u32(out, protocol);
    out.extend(rest);
}

fn put_u32(out: &mut Vec<u8>, field: u32) {
    out.extend(field.to_le_bytes());
}

fn put_reason(out: &mut Vec<u8>, reason: &str) {
    out.extend(cut(reason).as_bytes());
}

fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(LONGEST_REASON)]
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("greetings hold only strings and numbers")
}

fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    serde_json::from_slice(bytes).map_err(|error| Malformed::Json(error.to_string()))
}

/// What is left of a frame.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads bytes after their number; what is no text is replaced.
    fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.u32()? as usize;
        let (text, rest) = self.0.split_at_checked(bytes).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(cut(&String::from_utf8_lossy(text)).to_owned())
    }

    fn piece(&mut self) -> Result<Piece, Malformed> {
        Ok(Piece { layer: self.u32()?, pages: self.u32()?..self.u32()? })
    }

    /// Reads items to the end of the frame: their number is bounded by its length.
    fn rest_as<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Malformed>) -> Result<Vec<T>, Malformed> {
        let mut items = Vec::new();
        while !self.0.is_empty() {
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn reason(&mut self) -> String {
        cut(&String::from_utf8_lossy(std::mem::take(&mut self.0))).to_owned()
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Long(self.0.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::identity;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        let handoff = any::<u64>().prop_map(HandoffId);
        let pieces = proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 0..5);
        let digest = proptest::option::of(any::<[u8; 8]>().prop_map(Digest));
        (handoff, any::<[u32; 4]>(), pieces, digest, ".{0,40}", 0..11u8).prop_map(
            |(handoff, [a, b, c, d], pieces, digest, reason, kind)| match kind {
                0 => Message::Begin { handoff, tokens: a },
                1 => Message::Open { handoff, have: a, landing: vec![PageId(b), PageId(c), PageId(d)] },
                2 => Message::Refuse { handoff, reason },
                3 => Message::Pages {
                    handoff,
                    sequence: a,
                    pieces: pieces.into_iter().map(|(layer, start, end)| Piece { layer, pages: start..end }).collect(),
                },
                4 => Message::Commit {
                    handoff,
                    sent: Sent { pages: a, bytes: u64::from(b) << 20, frames: c, digest },
                    commit: Commit { first_token: d },
                    settled: a % 2 == 0,
                },
                5 => Message::Ack { handoff },
                6 => Message::Abort { handoff, reason },
                7 => Message::Quiet { handoff },
                8 => Message::Fetch {
                    handoff,
                    incarnation: u64::from(a) << 20,
                    link: reason,
                    pages: vec![PageHash(u128::from(b) << 100), PageHash(u128::from(c))],
                },
                9 => Message::Forgo { handoff },
                _ => Message::Ping,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard(message in message()) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            let length = frame_bytes(bytes[..4].try_into().unwrap()).unwrap();
            prop_assert_eq!(length, bytes.len() - 4);
            prop_assert_eq!(Message::decode(&bytes[4..]).unwrap(), message);
        }

        #[test]
        fn noise_is_an_error_and_nothing_worse(bytes in proptest::collection::vec(any::<u8>(), 0..64), tag in 0u8..24) {
            let _ = Message::decode(&bytes);
            let _ = Greeting::decode(&bytes);
            let tagged: Vec<u8> = [tag].into_iter().chain(MAGIC).chain(bytes).collect();
            let _ = Greeting::decode(&tagged);
            if let Ok(message) = Message::decode(&tagged) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(Message::decode(&again[4..]).unwrap(), message);
            }
        }

        #[test]
        fn a_frame_cut_short_is_not_another_frame(message in message(), cut in 0usize..64) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            let body = &bytes[4..];
            // A reason is read lossily: half of the character that stands for what cannot be read reads as that character.
            let stands_in = |reason: &str| reason.ends_with(char::REPLACEMENT_CHARACTER);
            prop_assume!(!matches!(&message, Message::Refuse { reason, .. } | Message::Abort { reason, .. } if stands_in(reason)));
            if cut < body.len() {
                // Lists and reasons run to the end of the frame, so a cut one may decode, but never to the same message.
                prop_assert_ne!(Message::decode(&body[..cut]), Ok(message));
            }
        }
    }

    fn greet(greeting: &Greeting) -> Result<Greeting, Malformed> {
        let mut bytes = Vec::new();
        greeting.encode(&mut bytes);
        Greeting::decode(&bytes[4..])
    }

    #[test]
    fn greetings_are_heard() {
        let hello = Hello {
            nonce: [9; 32],
            cluster_token: true,
            identity: identity("prefill-0", 4),
            target: "decode-1".into(),
            target_incarnation: u64::MAX,
            process: 7,
            shm: Some(Invitation { host: "boot".into(), socket: "door".into() }),
            transports: vec![TransportKind::Memory, TransportKind::Tcp],
            host: Some("boot".into()),
            verify: Verify::Auto,
            ping_ms: 400,
        };
        let welcome = Welcome {
            proof: Proof([8; 32]),
            identity: identity("decode-1", 4),
            landings: 3,
            transport: TransportKind::Tcp,
            ucx: Some(Window { address: vec![1, 2], key: vec![3], base: 4 }),
            digest: true,
            token: u64::MAX,
            ping_ms: 400,
        };
        let reject = Greeting::Reject { reason: "no".into() };
        let join = Greeting::Join(Join { token: 5, number: 6, proof: Proof([7; 32]) });
        let proof = Greeting::Proof(Proof([6; 32]));
        let (hello, welcome) = (Greeting::Hello(hello), Greeting::Welcome(welcome));
        let (calling, plain) = (Greeting::Calling(vec![7; LONGEST_NAME]), [Greeting::Expected, Greeting::Connected]);
        let all = [hello, Greeting::Challenge([5; 32]), proof, welcome, reject, join, calling];
        for greeting in all.into_iter().chain(plain) {
            assert_eq!(greet(&greeting), Ok(greeting.clone()));
        }
        assert_eq!(greet(&Greeting::Calling(vec![7; LONGEST_NAME + 2])), Err(Malformed::Long(2)));
    }

    #[test]
    fn another_version_is_named_and_its_rejection_read() {
        assert_eq!(greet(&Greeting::Foreign { protocol: 9 }), Ok(Greeting::Foreign { protocol: 9 }));
        let mut rejection = vec![18];
        rejection.extend(MAGIC);
        rejection.extend(9u32.to_le_bytes());
        rejection.extend(b"protocol: ours 9, yours 1");
        let reason = "protocol: ours 9, yours 1".to_owned();
        assert_eq!(Greeting::decode(&rejection), Ok(Greeting::Reject { reason }));
        assert_eq!(Greeting::decode(b"\x10HTTP\0\0\0\0"), Err(Malformed::Magic));
    }

    #[test]
    fn long_frames_and_reasons_are_cut_off() {
        assert_eq!(frame_bytes(u32::MAX.to_le_bytes()), Err(Malformed::TooLong(u32::MAX as usize)));
        let mut bytes = Vec::new();
        Message::Abort { handoff: HandoffId(1), reason: "é".repeat(4000) }.encode(&mut bytes);
        assert_eq!(bytes.len(), 4 + 1 + 8 + LONGEST_REASON);
    }
}
