//! A worker fetches a prefix from a peer that holds it: the roles of a hand-off, swapped.

mod support;

use kv_cache::{PageHash, PageId};
use kv_transfer::{Begin, Config, Event, Fetch, HandoffId, Outcome, Peer};
use support::{LAYERS, SOON, Worker, assert_same, identity, kinds, landed, only};

const H: HandoffId = HandoffId(0xFE7C);

async fn pair(config: Config) -> (Worker, Worker) {
    let asker = Worker::start(config.clone(), identity("decode-0", 40), 1).await;
    let holder = Worker::start(config, identity("decode-1", 64), 2).await;
    (asker, holder)
}

fn prefix(count: u128) -> Vec<PageHash> {
    (0..count).map(PageHash).collect()
}

fn fetch(asker: &Worker, source: Peer, count: u128) {
    asker.transfer.fetch(Fetch { handoff: H, source, pages: prefix(count) });
}

/// Waits until the holder is asked, and returns by whom.
async fn asked(holder: &mut Worker, count: u128) -> Peer {
    match holder.event().await {
        Event::Asked { handoff: H, by, pages } => {
            assert_eq!(pages, prefix(count));
            by
        }
        other => panic!("{other:?} instead of Asked"),
    }
}

async fn lost(asker: &mut Worker) -> String {
    match asker.event().await {
        Event::Lost { handoff: H, reason } => reason,
        other => panic!("{other:?} instead of Lost"),
    }
}

#[tokio::test]
async fn what_is_asked_for_lands() {
    for kind in kinds() {
        let (mut asker, mut holder) = pair(only(kind)).await;
        let (pages, landing) = ([5, 9, 1, 2].map(PageId), [30, 31, 7, 8].map(PageId));
        let (there, here) = (holder.contents(), asker.contents());
        fetch(&asker, holder.peer(), 4);
        assert_eq!(asker.transfer.in_flight(), 1);
        let by = asked(&mut holder, 4).await;
        assert_eq!(by, asker.peer());
        holder.transfer.begin(Begin { handoff: H, targets: vec![by], tokens: 64, pages: pages.to_vec() });
        holder.transfer.push(H, 0..LAYERS, 0..4);
        holder.commit(H, 0);
        asker.begun(H).await;
        // The first page is there already.
        asker.transfer.open(H, landing.to_vec(), 1);
        assert!(matches!(asker.event().await, Event::Landed { handoff: H, .. }));
        assert_eq!(holder.event().await, Event::SourceDone { handoff: H, outcome: Outcome::Landed });
        let (from, to) = (&holder.identity.layout, &asker.identity.layout);
        assert_same(&asker.contents(), &landed((from, &pages, &there), (to, &landing, &here), 1));
        assert_eq!((asker.transfer.drain(SOON).await, holder.transfer.drain(SOON).await), (0, 0));
    }
}

#[tokio::test]
async fn a_refusal_a_dead_peer_and_silence_are_losses() {
    for kind in kinds() {
        let (mut asker, mut holder) = pair(Config { open_timeout_ms: 300, ..only(kind) }).await;
        fetch(&asker, holder.peer(), 2);
        asked(&mut holder, 2).await;
        holder.transfer.refuse(H, "evicted".into());
        assert_eq!(lost(&mut asker).await, "evicted");
        // It is over: what begins now is too late.
        holder.transfer.begin(Begin { handoff: H, targets: vec![asker.peer()], tokens: 16, pages: vec![PageId(0)] });
        assert!(matches!(holder.event().await, Event::SourceDone { outcome: Outcome::Aborted(_), .. }));
        assert_eq!((asker.transfer.drain(SOON).await, holder.transfer.drain(SOON).await), (0, 0));

        let (mut asker, mut holder) = pair(Config { open_timeout_ms: 300, ..only(kind) }).await;
        fetch(&asker, holder.peer(), 2);
        asked(&mut holder, 2).await;
        assert_eq!(lost(&mut asker).await, "no answer within 300ms");
        assert_eq!((asker.transfer.drain(SOON).await, holder.transfer.drain(SOON).await), (0, 0));

        let (mut asker, mut holder) = pair(only(kind)).await;
        fetch(&asker, holder.peer(), 2);
        asked(&mut holder, 2).await;
        holder.shutdown.cancel();
        let reason = lost(&mut asker).await;
        assert!(reason.starts_with("link to decode-1 lost"), "{reason}");
        let unreachable = Peer { link: "127.0.0.1:1".into(), ..holder.peer() };
        asker.transfer.fetch(Fetch { handoff: HandoffId(2), source: unreachable, pages: prefix(1) });
        assert!(matches!(asker.event().await, Event::Lost { handoff: HandoffId(2), .. }));
        assert_eq!(asker.transfer.drain(SOON).await, 0);
    }
}

#[tokio::test]
async fn what_is_called_off_does_not_begin() {
    for kind in kinds() {
        let (asker, mut holder) = pair(only(kind)).await;
        fetch(&asker, holder.peer(), 2);
        let by = asked(&mut holder, 2).await;
        asker.transfer.abort(H, "client left".into());
        assert_eq!(asker.transfer.drain(SOON).await, 0);
        holder.transfer.begin(Begin { handoff: H, targets: vec![by], tokens: 32, pages: vec![PageId(0), PageId(1)] });
        let reason = "called off before it began: client left".to_owned();
        let done = Event::SourceDone { handoff: H, outcome: Outcome::Aborted(reason) };
        assert_eq!(holder.event().await, done);
        assert_eq!(holder.transfer.drain(SOON).await, 0);
    }
}
