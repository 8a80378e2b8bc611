//! Who gets a link, and what somebody on the way can do.

mod support;

use kv_cache::PageId;
use kv_transfer::{Config, Error, Event, HandoffId, Outcome, TlsConfig, Transfer, TransportKind};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use support::{
    Over, SOON, Worker, assert_same, identity, kinds, landed, only,
    proxy::{Proxy, Way},
    some_pages,
    tls::{Authority, Files, authority},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const H: HandoffId = HandoffId(0x5EC);

fn with(kind: impl Into<Over>, tls: Option<TlsConfig>) -> Config {
    Config { tls, ..only(kind) }
}

fn with_token(kind: impl Into<Over>, file: Option<&Path>) -> Config {
    Config { cluster_token_file: file.map(Path::to_owned), ..only(kind) }
}

async fn pair(source: Config, target: Config) -> (Worker, Worker) {
    let source = Worker::start(source, identity("prefill-0", 40), 1).await;
    (source, Worker::start(target, identity("decode-0", 64), 2).await)
}

/// Hands seven pages over and checks every byte of the target's pool.
async fn lands(source: &mut Worker, target: &mut Worker) {
    let (pages, landing) = (some_pages(&source.identity.layout, 7, 3), some_pages(&target.identity.layout, 7, 4));
    let (before, handoff) = (target.contents(), HandoffId(rand::random()));
    source.begin(handoff, target.peer(), &pages);
    target.begun(handoff).await;
    target.transfer.open(handoff, landing.clone(), 0);
    source.push(handoff, 0..7);
    source.commit(handoff, 1);
    assert!(matches!(target.event().await, Event::Landed { handoff: landed, .. } if landed == handoff));
    assert_eq!(source.event().await, Event::SourceDone { handoff, outcome: Outcome::Landed });
    let from = (&source.identity.layout, &pages[..], &source.contents()[..]);
    assert_same(&target.contents(), &landed(from, (&target.identity.layout, &landing, &before), 0));
}

/// Says why there is no link, which nothing of the target's pool may have survived to see.
async fn refused(source: &mut Worker, target: &Worker) -> String {
    let before = target.contents();
    source.begin(H, target.peer(), &[PageId(0)]);
    let event = source.event().await;
    assert_same(&target.contents(), &before);
    assert_eq!(target.transfer.in_flight(), 0);
    match event {
        Event::SourceDone { handoff: H, outcome: Outcome::Refused(reason) | Outcome::Aborted(reason) } => reason,
        other => panic!("{other:?} instead of a refusal"),
    }
}

#[tokio::test]
async fn a_cluster_with_a_token_hands_over_by_every_transport() {
    let files = Files::new();
    let token = files.write("token", "correct horse battery staple\n");
    for kind in kinds() {
        let (mut source, mut target) = pair(with_token(kind, Some(&token)), with_token(kind, Some(&token))).await;
        lands(&mut source, &mut target).await;
    }
}

#[tokio::test]
async fn who_has_another_token_or_none_gets_no_link() {
    let files = Files::new();
    let ours = files.write("ours", "correct horse battery staple");
    let other = files.write("other", "correct horse battery stable");
    for kind in kinds() {
        for (source, target, expected) in [
            (Some(&other), Some(&ours), "cluster token: your proof is wrong, so the tokens differ"),
            (None, Some(&ours), "cluster token: you have none, ours has one (cluster_token_file)"),
            (Some(&ours), None, "cluster token: you have one, we have none (cluster_token_file)"),
        ] {
            let configs = [source, target].map(|file| with_token(kind, file.map(PathBuf::as_path)));
            let [source, target] = configs;
            let (mut source, target) = pair(source, target).await;
            let reason = refused(&mut source, &target).await;
            assert_eq!(reason, format!("decode-0 at {}: {expected}", target.transfer.address()));
        }
    }
}

/// Somebody who answers for a worker without having the token.
#[tokio::test]
async fn a_target_that_cannot_prove_itself_gets_no_pages() {
    let files = Files::new();
    let token = files.write("token", "correct horse battery staple");
    let (mut source, target) = pair(with_token(TransportKind::Tcp, Some(&token)), only(TransportKind::Tcp)).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let mut peer = target.peer();
    peer.link = listener.local_addr().expect("bound").to_string();
    source.begin(H, peer, &[PageId(0)]);
    let mut stream = listener.accept().await.expect("accept").0;
    read_frame(&mut stream).await;
    let header = |tag: u8| [&[tag][..], b"BTKV", &6u32.to_le_bytes()].concat();
    write_frame(&mut stream, &[header(20), vec![7; 32]].concat()).await;
    assert_eq!(read_frame(&mut stream).await[0], 21, "the source proves itself first");
    let welcome = serde_json::json!({
        "proof": vec![7; 32], "identity": target.identity, "landings": 0, "transport": "tcp",
        "digest": true, "token": 5, "ping_ms": 400
    });
    write_frame(&mut stream, &[header(17), serde_json::to_vec(&welcome).expect("json")].concat()).await;
    match source.event().await {
        Event::SourceDone { outcome: Outcome::Refused(reason), .. } => {
            assert!(reason.ends_with("cluster token: its proof is wrong"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

async fn read_frame(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 4];
    timeout(SOON, stream.read_exact(&mut length)).await.expect("a frame").expect("read");
    let mut frame = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut frame).await.expect("read");
    frame
}

async fn write_frame(stream: &mut TcpStream, frame: &[u8]) {
    stream.write_all(&(frame.len() as u32).to_le_bytes()).await.expect("write");
    stream.write_all(frame).await.expect("write");
}

#[tokio::test]
async fn every_transport_hands_over_under_tls() {
    let (files, authority) = (Files::new(), authority());
    let [source, target] = ["source", "target"].map(|name| files.worker(name, &authority, "127.0.0.1"));
    for kind in kinds() {
        let (mut source, mut target) = pair(with(kind, Some(source.clone())), with(kind, Some(target.clone()))).await;
        lands(&mut source, &mut target).await;
    }
}

#[tokio::test]
async fn clear_text_and_tls_do_not_meet() {
    let (files, authority) = (Files::new(), authority());
    let tls = files.worker("worker", &authority, "127.0.0.1");
    let kind = TransportKind::Tcp;
    let (mut source, target) = pair(only(kind), with(kind, Some(tls.clone()))).await;
    let reason = refused(&mut source, &target).await;
    assert!(reason.ends_with(": clear text: this worker speaks TLS only ([transfer.tls])"), "{reason}");
    let (mut source, target) = pair(with(kind, Some(tls)), only(kind)).await;
    let reason = refused(&mut source, &target).await;
    let named = format!("connect {}: TLS: ", target.transfer.address());
    assert!(reason.starts_with(&named) && reason.ends_with("; has it [transfer.tls] too?"), "{reason}");
}

#[tokio::test]
async fn strange_certificates_are_refused_by_both_ends() {
    let (files, ours, other) = (Files::new(), authority(), authority());
    let kind = TransportKind::Tcp;
    let member = files.worker("member", &ours, "127.0.0.1");
    let stranger = files.worker("stranger", &other, "127.0.0.1");
    let (mut source, target) = pair(with(kind, Some(member.clone())), with(kind, Some(stranger.clone()))).await;
    let reason = refused(&mut source, &target).await;
    assert!(reason.contains("invalid peer certificate"), "{reason}");

    // The source believes in the target, but not the other way round.
    let half = TlsConfig { ca: member.ca.clone(), ..stranger };
    let (mut source, target) = pair(with(kind, Some(half)), with(kind, Some(member.clone()))).await;
    let reason = refused(&mut source, &target).await;
    assert!(reason.contains("received fatal alert"), "{reason}");

    let elsewhere = files.worker("elsewhere", &ours, "decode.example");
    let (mut source, target) = pair(with(kind, Some(member.clone())), with(kind, Some(elsewhere.clone()))).await;
    let reason = refused(&mut source, &target).await;
    assert!(reason.contains("certificate not valid for name \"127.0.0.1\""), "{reason}");
    // Unless that is what certificates of this cluster say.
    let named = TlsConfig { name: Some("decode.example".into()), ..member };
    let (mut source, mut target) = pair(with(kind, Some(named)), with(kind, Some(elsewhere))).await;
    lands(&mut source, &mut target).await;
}

#[tokio::test]
async fn certificates_are_read_again_when_they_change() {
    let (files, before, after) = (Files::new(), authority(), authority());
    let kind = TransportKind::Tcp;
    let tls = |authority: &Authority| ["source", "target"].map(|name| files.worker(name, authority, "127.0.0.1"));
    let [source, target] = tls(&before);
    let (mut source, mut target) = pair(with(kind, Some(source)), with(kind, Some(target))).await;
    lands(&mut source, &mut target).await;
    // A key that does not fit its certificate leaves the ones of before in force; the link that is up goes on either way.
    files.write("source.key", "nonsense");
    lands(&mut source, &mut target).await;
    tls(&after);
    let [late, old] = [("late", &after), ("old", &before)].map(|(name, by)| files.worker(name, by, "127.0.0.1"));
    let mut late = Worker::start(with(kind, Some(late)), identity("prefill-1", 40), 1).await;
    lands(&mut late, &mut target).await;
    let mut old = Worker::start(with(kind, Some(old)), identity("prefill-2", 40), 1).await;
    assert!(refused(&mut old, &target).await.contains("invalid peer certificate"));
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let (files, authority) = (Files::new(), authority());
    let good = files.worker("worker", &authority, "127.0.0.1");
    let other = files.worker("other", &authority, "127.0.0.1");
    let nonsense = files.write("nonsense", "no PEM");
    let missing = files.0.path().join("missing");
    let name = |path: &Path| path.display().to_string();
    for (tls, expected) in [
        (TlsConfig { ca: missing.clone(), ..good.clone() }, format!("[transfer.tls] ca {}: ", name(&missing))),
        (TlsConfig { ca: nonsense.clone(), ..good.clone() }, format!("[transfer.tls] ca {}: no cert", name(&nonsense))),
        (
            TlsConfig { cert: nonsense.clone(), ..good.clone() },
            format!("[transfer.tls] cert {}: no c", name(&nonsense)),
        ),
        (
            TlsConfig { key: nonsense.clone(), ..good.clone() },
            format!("[transfer.tls] key {}: no pri", name(&nonsense)),
        ),
        (
            TlsConfig { key: other.key.clone(), ..good.clone() },
            format!("[transfer.tls] key {}: is not the key of {}", name(&other.key), name(&good.cert)),
        ),
    ] {
        let error = start(with(TransportKind::Tcp, Some(tls))).await.to_string();
        assert!(error.starts_with(&expected), "{error} instead of {expected}");
    }
    let error = start(with_token(TransportKind::Tcp, Some(&files.write("token", "short")))).await.to_string();
    assert!(error.starts_with("cluster_token_file ") && error.ends_with("5 bytes, at least 16 are wanted"), "{error}");
}

async fn start(config: Config) -> Error {
    let identity = identity("decode-0", 4);
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(identity.layout.pool_bytes() as u64).expect("set length");
    let (events, _) = mpsc::channel(1);
    Transfer::start(config, identity, &file, events, CancellationToken::new()).await.expect_err("bad settings")
}

/// Under TLS a bit that turns on the way never gets as far as the digest: the connection ends, and with it the hand-off.
#[tokio::test]
async fn a_flipped_bit_under_tls_ends_the_link() {
    let (files, authority) = (Files::new(), authority());
    let tls = Some(files.worker("worker", &authority, "127.0.0.1"));
    let kind = TransportKind::Tcp;
    let (mut source, mut target) = pair(with(kind, tls.clone()), with(kind, tls)).await;
    // Beyond the handshakes: within the blocks.
    let proxy = Proxy::start(target.transfer.address(), 64 << 10, Some(40_000)).await;
    let landing = some_pages(&target.identity.layout, 12, 4);
    let peer = kv_transfer::Peer { link: proxy.address.clone(), ..target.peer() };
    source.begin(H, peer, &some_pages(&source.identity.layout, 12, 3));
    target.begun(H).await;
    target.transfer.open(H, landing, 0);
    source.push(H, 0..12);
    source.commit(H, 1);
    match target.event().await {
        Event::Lost { reason, .. } => assert!(reason.contains("link to prefill-0 lost: data connection: "), "{reason}"),
        other => panic!("{other:?} instead of Lost"),
    }
    assert_eq!(target.event().await, Event::Quiet { handoff: H });
    match source.event().await {
        Event::SourceDone { outcome: Outcome::Aborted(reason), .. } => assert!(reason.contains("lost"), "{reason}"),
        other => panic!("{other:?} instead of an abort"),
    }
    lands(&mut source, &mut target).await;
}

/// A connection that stops passing bytes, TLS or not, is noticed by its silence.
#[tokio::test]
async fn a_frozen_way_under_tls_ends_both_sides() {
    let (files, authority) = (Files::new(), authority());
    let tls = Some(files.worker("worker", &authority, "127.0.0.1"));
    let kind = TransportKind::Tcp;
    let (mut source, mut target) = pair(with(kind, tls.clone()), with(kind, tls)).await;
    let proxy = Proxy::start(target.transfer.address(), 64 << 10, None).await;
    let peer = kv_transfer::Peer { link: proxy.address.clone(), ..target.peer() };
    source.begin(H, peer, &some_pages(&source.identity.layout, 12, 3));
    target.begun(H).await;
    target.transfer.open(H, some_pages(&target.identity.layout, 12, 4), 0);
    source.push(H, 0..6);
    proxy.set(Way::Frozen);
    assert!(matches!(target.event().await, Event::Lost { .. }));
    assert_eq!(target.event().await, Event::Quiet { handoff: H });
    assert!(matches!(source.event().await, Event::SourceDone { outcome: Outcome::Aborted(_), .. }));
    lands(&mut source, &mut target).await;
}

/// Strangers who are let wait in the handshake do not keep members out, and are shown the door.
#[tokio::test]
async fn who_does_not_prove_itself_in_time_is_dropped() {
    let files = Files::new();
    let token = files.write("token", "correct horse battery staple");
    let kind = TransportKind::Tcp;
    let (mut source, mut target) = pair(with_token(kind, Some(&token)), with_token(kind, Some(&token))).await;
    let mut silent = TcpStream::connect(target.transfer.address()).await.expect("connect");
    let mut half = TcpStream::connect(target.transfer.address()).await.expect("connect");
    half.write_all(&[200, 0, 0, 0, 16]).await.expect("write");
    lands(&mut source, &mut target).await;
    for stream in [&mut silent, &mut half] {
        let read = timeout(SOON + Duration::from_secs(1), stream.read(&mut [0])).await.expect("dropped");
        assert_eq!(read.expect("closed"), 0);
    }
}
