//! What a peer's bytes can reach, as fuzzing calls it: greetings, the control connection, a data connection.

use crate::{
    Begin, Commit, Config, Event, HandoffId, Identity, Peer, Rank,
    handoffs::{Action, Handoffs, LinkId, Moved, Request},
    handshake::Offer,
    inbox::Inbox,
    landing::Landings,
    message::{Greeting, Message, frame_bytes},
    pages::Pages,
    plan::{self, Piece, Place, Terms},
    socket::Data,
    source::{Frame, Limits},
    transport::tcp::Receiver,
};
use kv_cache::{KvDtype, PageId, PageLayout};
use std::{fs::File, os::unix::fs::FileExt, sync::Arc, time::Duration};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

const POISON: u8 = 0xA5;
/// Pages of the hand-off that is under way when bytes come.
const LANDING: [PageId; 3] = [PageId(4), PageId(1), PageId(2)];

/// Reads `input` as a peer would have us: its first byte says where it arrives. `pool` is a file that is ours to use.
///
/// # Panics
/// When something that must hold does not.
#[cfg_attr(not(fuzzing), allow(unreachable_pub))]
pub fn frames(input: &[u8], pool: &File) {
    match input.split_first() {
        Some((0, frame)) => greeting(frame),
        Some((1, stream)) => control(stream),
        Some((2, stream)) => data(stream, pool),
        _ => {}
    }
}

fn identity() -> Identity {
    let layout = PageLayout {
        layers: 2,
        page_tokens: 16,
        kv_heads: 2,
        key_dim: 8,
        value_dim: 4,
        dtype: KvDtype::Bf16,
        pages: 6,
    };
    Identity { worker: "w".into(), incarnation: 1, fingerprint: "f".into(), layout, rank: Rank::default() }
}

fn peer() -> Peer {
    Peer { worker: "w".into(), incarnation: 1, link: "127.0.0.1:1".into() }
}

fn terms() -> Arc<Terms> {
    Arc::new(Terms::agree(&identity(), &identity(), false).expect("the same pages"))
}

/// What is agreed to keeps to our pool.
fn greeting(frame: &[u8]) {
    let Ok(greeting) = Greeting::decode(frame) else { return };
    let mut again = Vec::new();
    greeting.encode(&mut again);
    assert_eq!(Greeting::decode(&again[4..]).as_ref(), Ok(&greeting));
    let offer =
        Offer::new(&Config { lossy_kv: true, ..Config::default() }, identity(), 1, Ok("host".into()), (false, false));
    let terms = match greeting {
        Greeting::Hello(hello) => offer.answer(&hello, false, &[]).map(|agreed| agreed.terms),
        Greeting::Welcome(welcome) => return drop(offer.check(&welcome, &peer())),
        _ => return,
    };
    let Ok(terms) = terms else { return };
    let travel = terms.target.travel_of(0..LANDING.len() as u32);
    let pieces = [0, 1].map(|layer| Piece { layer, pages: travel.clone() });
    for extent in plan::extents(Place { view: &terms.target, pages: &LANDING }, &pieces) {
        assert!(extent.offset + extent.bytes <= identity().layout.pool_bytes());
    }
}

/// Whatever the peers of two links say, every hand-off ends with them.
fn control(mut stream: &[u8]) {
    let (accepted, dialled) = (LinkId(1), LinkId(2));
    let second = Duration::from_secs(1);
    let limits = Limits { open: second, progress: second, group_bytes: Some(1), group_frames: 2 };
    let mut worker = Worker { handoffs: Handoffs::new(identity().layout, limits), now: Duration::ZERO, open: 0 };
    worker.handoffs.link_up(accepted, terms());
    worker.handoffs.link_up(dialled, terms());
    for handoff in [HandoffId(1), HandoffId(3)] {
        let begin = Begin { handoff, targets: vec![peer()], tokens: 40, pages: LANDING.to_vec() };
        worker.step(|handoffs, now, out| handoffs.begin(now, dialled, &begin, out));
        let push = Request::Push { handoff, layers: 0..2, pages: 0..3 };
        worker.step(|handoffs, now, out| handoffs.request(now, push, out));
        let commit = Request::Commit { handoff, commit: Commit { first_token: 7 } };
        worker.step(|handoffs, now, out| handoffs.request(now, commit, out));
    }
    while let Some((prefix, rest)) = stream.split_first_chunk() {
        let Ok(bytes) = frame_bytes(*prefix) else { break };
        let Some((frame, rest)) = rest.split_at_checked(bytes) else { break };
        let Ok(message) = Message::decode(frame) else { break };
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(Message::decode(&again[4..]), Ok(message.clone()));
        let odd = message.handoff().is_some_and(|handoff| handoff.0 % 2 == 1);
        let link = if odd { dialled } else { accepted };
        worker.step(|handoffs, now, out| handoffs.message(now, (link, "w", !odd), message, out));
        worker.now += Duration::from_millis(20);
        worker.step(|handoffs, now, out| handoffs.tick(now, out));
        stream = rest;
    }
    for link in [accepted, dialled] {
        worker.step(|handoffs, now, out| handoffs.link_lost(now, link, "over", false, out));
    }
    assert_eq!((worker.handoffs.live(), worker.open), (0, 0), "hand-offs that have not ended, landings in use");
}

/// A worker that opens what it is asked for, and whose transports do at once what they are told.
struct Worker {
    handoffs: Handoffs,
    now: Duration,
    /// Landings that were opened and not given back.
    open: usize,
}

impl Worker {
    fn step(&mut self, step: impl FnOnce(&mut Handoffs, Duration, &mut Vec<Action>)) {
        let (handoffs, now) = (&mut self.handoffs, self.now);
        let mut actions = Vec::new();
        step(handoffs, now, &mut actions);
        let mut at = 0;
        while at < actions.len() {
            match actions[at].clone() {
                Action::Post(_, Frame { handoff, sequence, .. }) => {
                    handoffs.moved(now, handoff, Moved::Sent { sequence, bytes: 1, digest: None }, &mut actions);
                }
                Action::Commit { handoff, .. } if handoff.0 % 2 == 0 => {
                    handoffs.moved(now, handoff, Moved::Settled, &mut actions);
                }
                Action::Seal { handoff, .. } => handoffs.moved(now, handoff, Moved::Sealed, &mut actions),
                Action::Emit(Event::Begun { handoff, tokens, .. }) if handoff.0 % 4 == 0 => {
                    let pages = identity().layout.pages_for(tokens as usize) as u32;
                    let open = Request::Open { handoff, landing: (0..pages).map(PageId).collect(), have: pages / 2 };
                    self.open += 1;
                    handoffs.request(now, open, &mut actions);
                }
                Action::Emit(Event::Landed { .. } | Event::Quiet { .. }) => self.open -= 1,
                _ => {}
            }
            at += 1;
        }
    }
}

/// Whatever comes over a data connection, only the pages of the landing change.
fn data(stream: &[u8], file: &File) {
    let layout = identity().layout;
    file.set_len(layout.pool_bytes() as u64).expect("a file of ours");
    file.write_all_at(&vec![POISON; layout.pool_bytes()], 0).expect("a file of ours");
    let pages = Arc::new(Pages::map(file, layout.clone()).expect("a file of ours"));
    let landings = Arc::new(Landings::new(pages, Arc::new(Inbox::default())));
    let terms = terms();
    let travel = 0..terms.target.travel_of(0..LANDING.len() as u32).end;
    let block_bytes = terms.block_bytes();
    landings.open(HandoffId(1), (7, terms), LANDING.as_slice().into(), travel);
    let receiver = Receiver { landings, token: 7, block_bytes, digest: true };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let (peer, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().expect("bound")), listener.accept());
        let (mut peer, mut ours) = (peer.expect("connect"), Data::from(accepted.expect("accept").0));
        let says = async {
            // It may stop listening before we have finished.
            let _ = peer.write_all(stream).await;
            let _ = peer.shutdown().await;
        };
        let hears = async { while receiver.receive_frame(&mut ours).await.is_ok() {} };
        tokio::join!(says, hears);
        // Leaves nothing to wait for behind: thousands of these are made in a second.
        let _ = peer.set_zero_linger();
    });
    let mut contents = vec![0; layout.pool_bytes()];
    file.read_exact_at(&mut contents, 0).expect("a file of ours");
    for layer in 0..layout.layers {
        for page in (0..layout.pages).map(PageId).filter(|page| !LANDING.contains(page)) {
            let at = layout.block_offset(layer, page);
            assert!(contents[at..at + layout.block_bytes()].iter().all(|byte| *byte == POISON), "page {page:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TransportKind;
    use crate::message::{Hello, Sent};

    /// What the fuzzer starts from, each a file of `fuzz/seeds/frames`.
    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let encode = |first: u8, messages: &[Message]| {
            let mut bytes = vec![first];
            messages.iter().for_each(|message| message.encode(&mut bytes));
            bytes
        };
        let hello = Hello {
            nonce: [1; 32],
            cluster_token: false,
            identity: identity(),
            target: "w".into(),
            target_incarnation: 1,
            process: 1,
            shm: None,
            transports: vec![TransportKind::Tcp],
            host: None,
            verify: crate::Verify::Auto,
            ping_ms: 400,
        };
        let mut frame = Vec::new();
        Greeting::Hello(hello).encode(&mut frame);
        frame[3] = 0; // In place of its length's last byte.
        let (h, o) = (HandoffId(4), HandoffId(1));
        let sent = Sent { pages: 2, bytes: 2 * 2 * 768, frames: 1, digest: None };
        let reason = || "so".to_owned();
        let landing = LANDING.to_vec();
        let pieces = vec![Piece { layer: 0, pages: 0..3 }, Piece { layer: 1, pages: 1..2 }];
        let mut blocks = encode(2, &[Message::Pages { handoff: o, sequence: 0, pieces }]);
        blocks.resize(blocks.len() + 4 * 768, 9);
        vec![
            ("hello", frame[3..].to_vec()),
            (
                "source",
                encode(
                    1,
                    &[
                        Message::Begin { handoff: h, tokens: 40 },
                        Message::Commit { handoff: h, sent, commit: Commit { first_token: 3 }, settled: false },
                        Message::Abort { handoff: h, reason: reason() },
                        Message::Quiet { handoff: h },
                        Message::Forgo { handoff: h },
                        Message::Ping,
                    ],
                ),
            ),
            (
                "target",
                encode(
                    1,
                    &[
                        Message::Open { handoff: o, have: 1, landing },
                        Message::Ack { handoff: o },
                        Message::Refuse { handoff: HandoffId(3), reason: reason() },
                    ],
                ),
            ),
            ("data", blocks),
        ]
    }

    #[test]
    fn seeds_do_what_they_are_for() {
        let pool = tempfile::tempfile().expect("temporary file");
        for (name, seed) in seeds() {
            frames(&seed, &pool);
            for at in (0..seed.len()).step_by(1 + seed.len() / 200) {
                let mut other = seed.clone();
                other[at] ^= 0x41;
                frames(&other[..seed.len() - at % 7], &pool);
            }
            assert!(name != "hello" || Greeting::decode(&seed[1..]).is_ok());
        }
    }
}
