//! What can go wrong between two real workers: each side gets its pages back, soon, and no other byte changes.

mod support;

use kv_cache::{KvDtype, PageId};
use kv_transfer::{Config, Event, HandoffId, Identity, Outcome, TransportKind, Verify};
use std::{ops::Range, time::Duration};
use support::{
    LAYERS, SOON, Worker, assert_same, identity, kinds_that_break, only,
    proxy::{Proxy, Way},
    some_pages,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const H: HandoffId = HandoffId(0xBA70);
/// Pages of most hand-offs here.
const COUNT: u32 = 6;

async fn pair(config: Config) -> (Worker, Worker) {
    let source = Worker::start(config.clone(), identity("prefill-0", 40), 1).await;
    let target = Worker::start(config, identity("decode-0", 64), 2).await;
    (source, target)
}

fn source_pages(source: &Worker) -> Vec<PageId> {
    some_pages(&source.identity.layout, COUNT as usize, 3)
}

fn landing(target: &Worker) -> Vec<PageId> {
    some_pages(&target.identity.layout, COUNT as usize, 4)
}

async fn source_done(source: &mut Worker) -> Outcome {
    match source.event().await {
        Event::SourceDone { outcome, handoff: H } => outcome,
        other => panic!("{other:?} instead of SourceDone"),
    }
}

async fn lost(target: &mut Worker) -> String {
    match target.event().await {
        Event::Lost { reason, handoff: H } => reason,
        other => panic!("{other:?} instead of Lost"),
    }
}

async fn quiet(target: &mut Worker) {
    assert_eq!(target.event().await, Event::Quiet { handoff: H });
}

/// Begins, opens and pushes the first half.
async fn half_way(source: &mut Worker, target: &mut Worker, link: Option<&Proxy>) {
    let mut peer = target.peer();
    if let Some(proxy) = link {
        peer.link = proxy.address.clone();
    }
    source.begin(H, peer, &source_pages(source));
    tokio::select! {
        () = target.begun(H) => {}
        event = source.event() => panic!("{event:?} before the target heard of it"),
    }
    target.transfer.open(H, landing(target), 0);
    source.push(H, 0..COUNT / 2);
}

/// Checks that nothing but the landing changed, and that nothing is in flight.
async fn settled(source: &Worker, target: &Worker, before: &[u8]) {
    assert_eq!((source.transfer.drain(SOON).await, target.transfer.drain(SOON).await), (0, 0));
    let layout = &target.identity.layout;
    let (mut now, mut before) = (target.contents(), before.to_vec());
    for page in landing(target) {
        for layer in 0..LAYERS {
            let at = layout.block_offset(layer, page);
            let block: Range<usize> = at..at + layout.block_bytes();
            now[block.clone()].fill(0);
            before[block].fill(0);
        }
    }
    assert_same(&now, &before);
}

/// After any failure, the next hand-off over the same two workers lands.
async fn still_works(source: &mut Worker, target: &mut Worker) {
    let next = HandoffId(0xF00D);
    source.begin(next, target.peer(), &[PageId(0)]);
    target.begun(next).await;
    target.transfer.open(next, vec![PageId(1)], 0);
    source.push(next, 0..1);
    source.commit(next, 1);
    assert!(matches!(target.event().await, Event::Landed { handoff, .. } if handoff == next));
    assert_eq!(source.event().await, Event::SourceDone { handoff: next, outcome: Outcome::Landed });
}

#[tokio::test]
async fn the_source_calls_off_before_it_begins() {
    let (mut source, mut target) = pair(only(TransportKind::Memory)).await;
    source.transfer.abort(H, "client left".into());
    source.begin(H, target.peer(), &source_pages(&source));
    let reason = "called off before it began: client left".to_owned();
    assert_eq!(source_done(&mut source).await, Outcome::Aborted(reason));
    still_works(&mut source, &mut target).await;
}

#[tokio::test]
async fn the_target_calls_off_before_it_begins() {
    let (mut source, mut target) = pair(only(TransportKind::Memory)).await;
    target.transfer.abort(H, "client left".into());
    source.begin(H, target.peer(), &source_pages(&source));
    let reason = "called off before it began: client left".to_owned();
    assert_eq!(source_done(&mut source).await, Outcome::Aborted(reason));
    still_works(&mut source, &mut target).await;
}

#[tokio::test]
async fn the_source_calls_off_before_the_landing() {
    let (mut source, mut target) = pair(only(TransportKind::Tcp)).await;
    source.begin(H, target.peer(), &source_pages(&source));
    target.begun(H).await;
    source.transfer.abort(H, "client left".into());
    assert_eq!(source_done(&mut source).await, Outcome::Aborted("client left".into()));
    assert_eq!(lost(&mut target).await, "client left");
    // The worker was finding pages meanwhile: it gets them back.
    target.transfer.open(H, landing(&target), 0);
    quiet(&mut target).await;
    still_works(&mut source, &mut target).await;
}

#[tokio::test]
async fn the_target_calls_off_before_the_landing() {
    let (mut source, mut target) = pair(only(TransportKind::Tcp)).await;
    source.begin(H, target.peer(), &source_pages(&source));
    target.begun(H).await;
    target.transfer.abort(H, "client left".into());
    assert_eq!(source_done(&mut source).await, Outcome::Aborted("client left".into()));
    still_works(&mut source, &mut target).await;
}

#[tokio::test]
async fn the_source_calls_off_half_way() {
    for kind in kinds_that_break() {
        let (mut source, mut target) = pair(only(kind)).await;
        let before = target.contents();
        half_way(&mut source, &mut target, None).await;
        source.transfer.abort(H, "client left".into());
        assert_eq!(source_done(&mut source).await, Outcome::Aborted("client left".into()));
        assert_eq!(lost(&mut target).await, "client left");
        quiet(&mut target).await;
        settled(&source, &target, &before).await;
        still_works(&mut source, &mut target).await;
    }
}

#[tokio::test]
async fn the_target_calls_off_half_way() {
    for kind in kinds_that_break() {
        let (mut source, mut target) = pair(only(kind)).await;
        let before = target.contents();
        half_way(&mut source, &mut target, None).await;
        target.transfer.abort(H, "client left".into());
        quiet(&mut target).await;
        let quiet_bytes = target.contents();
        source.push(H, COUNT / 2..COUNT);
        source.commit(H, 1);
        assert!(matches!(source_done(&mut source).await, Outcome::Aborted(_)));
        assert_same(&target.contents(), &quiet_bytes);
        settled(&source, &target, &before).await;
        still_works(&mut source, &mut target).await;
    }
}

#[tokio::test]
async fn calling_off_after_the_end_changes_nothing() {
    let (mut source, mut target) = pair(only(TransportKind::Memory)).await;
    still_works(&mut source, &mut target).await;
    let before = target.contents();
    source.transfer.abort(HandoffId(0xF00D), "late".into());
    target.transfer.abort(HandoffId(0xF00D), "late".into());
    half_way(&mut source, &mut target, None).await;
    source.transfer.abort(H, "x".into());
    assert_eq!(source_done(&mut source).await, Outcome::Aborted("x".into()));
    assert_eq!(lost(&mut target).await, "x");
    quiet(&mut target).await;
    settled(&source, &target, &before).await;
}

async fn refusal(config: Config, target: Identity) -> String {
    let mut source = Worker::start(only(TransportKind::Memory), identity("prefill-0", 40), 1).await;
    let target = Worker::start(config, target, 2).await;
    source.begin(H, target.peer(), &source_pages(&source));
    match source_done(&mut source).await {
        Outcome::Refused(reason) => {
            let named = format!("{} at {}: ", target.identity.worker, target.transfer.address());
            reason.strip_prefix(&named).unwrap_or_else(|| panic!("{reason} names {named}")).to_owned()
        }
        other => panic!("{other:?} instead of Refused"),
    }
}

#[tokio::test]
async fn workers_that_do_not_fit_are_refused_with_both_values() {
    let memory = only(TransportKind::Memory);
    let other = Identity { fingerprint: "other".into(), ..identity("decode-0", 64) };
    assert_eq!(refusal(memory.clone(), other).await, "fingerprint: yours `weights`, ours `other`");
    let mut other = identity("decode-0", 64);
    other.layout.dtype = KvDtype::Int8;
    assert_eq!(refusal(memory, other).await, "page layout: dtype: yours bf16, ours int8, and lossy_kv is off");
    let required = refusal(only(TransportKind::Tcp), identity("decode-0", 64)).await;
    assert_eq!(required, "transport: yours [Memory], ours [Tcp], in the same process");
}

#[tokio::test]
async fn a_past_life_is_refused_at_the_link_and_on_it() {
    let (mut source, mut target) = pair(only(TransportKind::Memory)).await;
    let mut past = target.peer();
    past.incarnation -= 1;
    let reason = "incarnation: 999 is a past life, now it is 1000";
    source.begin(H, past.clone(), &source_pages(&source));
    match source_done(&mut source).await {
        Outcome::Refused(refused) => assert!(refused.ends_with(reason), "{refused}"),
        other => panic!("{other:?}"),
    }
    still_works(&mut source, &mut target).await;
    let late = HandoffId(3);
    source.begin(late, past, &[PageId(0)]);
    assert_eq!(source.event().await, Event::SourceDone { handoff: late, outcome: Outcome::Refused(reason.into()) });
    // Registered again after a lost lease: the same process, so the same link.
    let mut registered_again = target.peer();
    registered_again.incarnation += 1;
    source.begin(HandoffId(4), registered_again, &[PageId(0)]);
    target.begun(HandoffId(4)).await;
}

#[tokio::test]
async fn another_protocol_version_is_refused_with_both_values() {
    let target = Worker::start(Config::default(), identity("decode-0", 64), 2).await;
    let mut stream = TcpStream::connect(target.transfer.address()).await.expect("connect");
    // Length, Hello, magic, version 9, and whatever version 9 puts behind it.
    stream
        .write_all(&[&12u32.to_le_bytes()[..], &[16], b"BTKV", &9u32.to_le_bytes(), b"???"].concat())
        .await
        .expect("write");
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an answer").expect("read");
    assert_eq!(&answer[4..9], b"\x12BTKV");
    assert_eq!(String::from_utf8_lossy(&answer[13..]), "protocol: yours 9, ours 6");
}

#[tokio::test]
async fn strangers_do_no_harm() {
    let (mut source, mut target) = pair(only(TransportKind::Tcp)).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[255; 4], &[9, 0, 0, 0, 19], b""] {
        let mut stream = TcpStream::connect(target.transfer.address()).await.expect("connect");
        stream.write_all(bytes).await.expect("write");
    }
    // Joins a link that does not exist.
    let mut stream = TcpStream::connect(target.transfer.address()).await.expect("connect");
    let version = 6u32.to_le_bytes();
    let join = [&53u32.to_le_bytes()[..], &[19], b"BTKV", &version, &7u64.to_le_bytes(), &[0; 4 + 32]].concat();
    stream.write_all(&join).await.expect("write");
    assert_eq!(timeout(SOON, stream.read(&mut [0])).await.expect("closed").expect("read"), 0);
    still_works(&mut source, &mut target).await;
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_named() {
    let (mut source, target) = pair(only(TransportKind::Tcp)).await;
    let mut nobody = target.peer();
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    nobody.link = closed.local_addr().expect("bound").to_string();
    drop(closed);
    source.begin(H, nobody.clone(), &source_pages(&source));
    match source_done(&mut source).await {
        Outcome::Aborted(reason) => assert!(reason.contains(&format!("connect {}", nobody.link)), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn deadlines_end_both_sides() {
    // One end in a hurry at a time: whose clock strikes first is not left to chance.
    let patient = only(TransportKind::Memory);
    let hurried = Config { open_timeout_ms: 200, progress_timeout_ms: 200, ..patient.clone() };
    let (landing, answer) = ("no landing within 200ms", "no answer within 200ms");
    for (ours, theirs, reason, outcome) in [
        (&hurried, &patient, landing, Outcome::Expired(landing.into())),
        (&patient, &hurried, answer, Outcome::Aborted(answer.into())),
    ] {
        let mut source = Worker::start(ours.clone(), identity("prefill-0", 40), 1).await;
        let mut target = Worker::start(theirs.clone(), identity("decode-0", 64), 2).await;
        source.begin(H, target.peer(), &source_pages(&source));
        target.begun(H).await;
        assert_eq!(lost(&mut target).await, reason);
        assert_eq!(source_done(&mut source).await, outcome);
    }

    let (mut source, mut target) = pair(Config { progress_timeout_ms: 200, ..only(TransportKind::Tcp) }).await;
    half_way(&mut source, &mut target, None).await;
    let outcome = source_done(&mut source).await;
    assert!(matches!(outcome, Outcome::Expired(_) | Outcome::Aborted(_)), "{outcome:?}");
    assert_eq!(lost(&mut target).await, "no progress for 200ms");
    quiet(&mut target).await;
    still_works(&mut source, &mut target).await;
}

/// Both sides end what a dead link carried, and the next hand-off gets a new link. How soon a link is known to be dead is checked in
/// virtual time (`link`), and what it carried ends in that moment (`source`, `target`): a busy machine does not show either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_link_ends_both_sides() {
    for (kind, way) in kinds_that_break().into_iter().flat_map(|kind| [(kind, Way::Cut), (kind, Way::Frozen)]) {
        println!("{kind:?} {way:?}"); // Shown with what fails.
        let (mut source, mut target) = pair(only(kind)).await;
        let before = target.contents();
        let proxy = Proxy::start(target.transfer.address(), 64 << 10, None).await;
        half_way(&mut source, &mut target, Some(&proxy)).await;
        proxy.set(way);
        let outcome = source_done(&mut source).await;
        let reason = lost(&mut target).await;
        quiet(&mut target).await;
        assert!(
            matches!(&outcome, Outcome::Aborted(reason) if reason.contains("link to decode-0 lost")),
            "{outcome:?}"
        );
        assert!(reason.contains("link to prefill-0 lost"), "{reason}");
        settled(&source, &target, &before).await;
        still_works(&mut source, &mut target).await;
    }
}

/// The process at the other end is gone, sockets and all.
#[test]
fn a_dead_peer_ends_the_survivor() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    for source_dies in [false, true] {
        for kind in kinds_that_break() {
            let (one, other) = (runtime(), runtime());
            let mut source = one.block_on(Worker::start(only(kind), identity("prefill-0", 40), 1));
            let mut target = other.block_on(Worker::start(only(kind), identity("decode-0", 64), 2));
            let before = target.contents();
            one.block_on(half_way(&mut source, &mut target, None));
            if source_dies {
                one.shutdown_background();
                other.block_on(async {
                    lost(&mut target).await;
                    quiet(&mut target).await;
                    settled(&source, &target, &before).await;
                });
            } else {
                other.shutdown_background();
                one.block_on(async {
                    let outcome = source_done(&mut source).await;
                    assert!(matches!(outcome, Outcome::Aborted(_)), "{kind:?}: {outcome:?}");
                    settled(&source, &target, &before).await;
                });
            }
        }
    }
}

#[tokio::test]
async fn stopping_a_worker_ends_its_handoffs_and_tells_it() {
    let (mut source, mut target) = pair(only(TransportKind::Tcp)).await;
    half_way(&mut source, &mut target, None).await;
    target.shutdown.cancel();
    assert!(lost(&mut target).await.contains("shutting down"));
    quiet(&mut target).await;
    assert_eq!(timeout(SOON, target.events.recv()).await.expect("ends"), None);
    assert!(matches!(source_done(&mut source).await, Outcome::Aborted(_)));
    source.begin(HandoffId(2), target.peer(), &[PageId(0)]);
    let refused = source.event().await;
    assert!(matches!(refused, Event::SourceDone { outcome: Outcome::Aborted(_), .. }), "{refused:?}");
}

/// One bit of the pages turns on the way: it is noticed, and the same link goes on.
#[tokio::test]
async fn a_flipped_bit_is_refused() {
    let (mut source, mut target) = pair(Config { verify: Verify::Full, ..only(TransportKind::Tcp) }).await;
    // Beyond every greeting and header: within the blocks of each data connection. The control connection says less.
    let proxy = Proxy::start(target.transfer.address(), 64 << 10, Some(20_000)).await;
    let before = target.contents();
    half_way(&mut source, &mut target, Some(&proxy)).await;
    source.push(H, COUNT / 2..COUNT);
    source.commit(H, 1);
    let reason = lost(&mut target).await;
    assert!(reason.starts_with("verification: digest of the contents: sent Some("), "{reason}");
    quiet(&mut target).await;
    assert_eq!(source_done(&mut source).await, Outcome::Refused(reason));
    settled(&source, &target, &before).await;
    still_works(&mut source, &mut target).await;
}

/// What the digest is for: counts alone do not see it.
#[tokio::test]
async fn a_flipped_bit_passes_when_only_counts_are_checked() {
    let (mut source, mut target) = pair(Config { verify: Verify::Counts, ..only(TransportKind::Tcp) }).await;
    let proxy = Proxy::start(target.transfer.address(), 64 << 10, Some(20_000)).await;
    half_way(&mut source, &mut target, Some(&proxy)).await;
    source.push(H, COUNT / 2..COUNT);
    source.commit(H, 1);
    assert!(matches!(target.event().await, Event::Landed { .. }));
    assert_eq!(source_done(&mut source).await, Outcome::Landed);
}

/// A worker that does not take its events: its peers wait, nothing dies of it, and nothing is lost.
#[tokio::test]
async fn events_not_taken_hold_the_link_back() {
    let config = Config { ping_interval_ms: 150, ..only(TransportKind::Tcp) };
    let (mut source, mut target) = pair(config).await;
    let many = 500;
    for handoff in 0..many {
        source.begin(HandoffId(handoff), target.peer(), &[PageId(0)]);
    }
    // Many pings long.
    timeout(Duration::from_millis(1_800), source.events.recv()).await.expect_err("nothing has ended");
    for handoff in 0..many {
        target.begun(HandoffId(handoff)).await;
        target.transfer.refuse(HandoffId(handoff), "full".into());
        let refused = Event::SourceDone { handoff: HandoffId(handoff), outcome: Outcome::Refused("full".into()) };
        assert_eq!(source.event().await, refused);
    }
}
