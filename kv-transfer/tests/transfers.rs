//! Real hand-offs between two workers of one process, over every transport: every byte arrives, and no other changes.

mod support;

use kv_cache::PageId;
use kv_transfer::{Commit, Config, Event, HandoffId, Outcome, TransportKind, Verify};
use std::time::Duration;
use support::{Over, SOON, Worker, assert_same, identity, kinds, landed, only, some_pages};

const H: HandoffId = HandoffId(0xBA70);

async fn pair(config: Config) -> (Worker, Worker) {
    pair_of(config.clone(), config).await
}

async fn pair_of(source: Config, target: Config) -> (Worker, Worker) {
    let source = Worker::start(source, identity("prefill-0", 40), 1).await;
    let target = Worker::start(target, identity("decode-0", 64), 2).await;
    (source, target)
}

/// Hands `count` pages over, `have` of them there already, and compares both pools byte by byte.
async fn hand_over(config: Config, count: usize, have: u32) {
    hand_over_between(config.clone(), config, count, have).await;
}

async fn hand_over_between(source: Config, target: Config, count: usize, have: u32) {
    let (mut source, mut target) = pair_of(source, target).await;
    let (pages, landing) = pages_of(&source, &target, count);
    let (source_before, target_before) = (source.contents(), target.contents());

    source.begin(H, target.peer(), &pages);
    source.push(H, 0..count as u32 / 2);
    target.begun(H).await;
    target.transfer.open(H, landing.clone(), have);
    source.push(H, count as u32 / 2..count as u32);
    source.commit(H, 17);

    assert_eq!(target.event().await, Event::Landed { handoff: H, commit: Commit { first_token: 17 } });
    assert_eq!(source.event().await, Event::SourceDone { handoff: H, outcome: Outcome::Landed });
    let (from, to) = (&source.identity.layout, &target.identity.layout);
    let expected = landed((from, &pages, &source_before), (to, &landing, &target_before), have as usize);
    assert_same(&target.contents(), &expected);
    assert_same(&source.contents(), &source_before);
    assert_eq!((source.transfer.drain(SOON).await, target.transfer.drain(SOON).await), (0, 0));
}

fn pages_of(source: &Worker, target: &Worker, count: usize) -> (Vec<PageId>, Vec<PageId>) {
    (some_pages(&source.identity.layout, count, 3), some_pages(&target.identity.layout, count, 4))
}

#[tokio::test]
async fn memory_moves_every_byte() {
    hand_over(only(TransportKind::Memory), 30, 0).await;
}

#[tokio::test]
async fn memory_verifies_contents_when_asked() {
    hand_over(Config { verify: Verify::Full, ..only(TransportKind::Memory) }, 30, 7).await;
}

#[tokio::test]
async fn shm_moves_every_byte() {
    hand_over(only(TransportKind::Shm), 30, 0).await;
}

#[tokio::test]
async fn shm_verifies_contents_when_asked() {
    hand_over(Config { verify: Verify::Full, ..only(TransportKind::Shm) }, 30, 7).await;
}

#[tokio::test]
async fn ucx_moves_every_byte() {
    for over in kinds().into_iter().filter(|over| over.kind() == TransportKind::Ucx) {
        hand_over(only(over), 30, 0).await;
        hand_over(Config { verify: Verify::Full, ..only(over) }, 30, 7).await;
        hand_over(only(over), 8, 8).await;
        hand_over(Config { group_bytes: Some(1 << 30), ..only(over) }, 9, 0).await;
    }
}

/// From card to card in one process and between two, and through the host; what is on no card goes to one, and back.
#[tokio::test]
async fn cards_move_every_byte() {
    for over in [Over::Cuda, Over::CardMemory, Over::CardShm, Over::CardTcp] {
        hand_over(only(over), 30, 0).await;
        hand_over(only(over), 30, 7).await;
        hand_over(only(over), 8, 8).await;
        if over != Over::Cuda {
            hand_over(Config { verify: Verify::Full, ..only(over) }, 30, 7).await;
        }
    }
    for (from, to) in [(Over::CardMemory, Over::Memory), (Over::Shm, Over::CardShm), (Over::CardTcp, Over::Tcp)] {
        hand_over_between(only(from), only(to), 30, 7).await;
        hand_over_between(only(to), only(from), 30, 0).await;
    }
}

#[tokio::test]
async fn tcp_moves_every_byte() {
    hand_over(only(TransportKind::Tcp), 30, 0).await;
}

#[tokio::test]
async fn tcp_leaves_out_pages_the_target_has() {
    hand_over(only(TransportKind::Tcp), 30, 11).await;
}

#[tokio::test]
async fn tcp_over_many_streams_without_digests() {
    hand_over(Config { tcp_streams: 5, verify: Verify::Counts, ..only(TransportKind::Tcp) }, 30, 1).await;
}

#[tokio::test]
async fn a_target_that_has_everything_gets_only_the_commit() {
    hand_over(only(TransportKind::Tcp), 8, 8).await;
    hand_over(only(TransportKind::Memory), 8, 8).await;
    hand_over(only(TransportKind::Shm), 8, 8).await;
}

#[tokio::test]
async fn groups_are_as_large_as_configured() {
    hand_over(Config { group_bytes: Some(1), ..only(TransportKind::Tcp) }, 9, 0).await;
    hand_over(Config { group_bytes: Some(1 << 30), ..only(TransportKind::Memory) }, 9, 0).await;
    hand_over(Config { group_bytes: Some(1 << 30), ..only(TransportKind::Shm) }, 9, 0).await;
}

/// Many hand-offs at once in both pools, over one link, each landing in its own pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_handoffs_share_a_link() {
    for kind in kinds() {
        let (mut source, mut target) = pair(only(kind)).await;
        let (pages, landing) = pages_of(&source, &target, 40);
        let (source_before, target_before) = (source.contents(), target.contents());
        let handoffs: Vec<HandoffId> = (0..10).map(HandoffId).collect();
        for (handoff, pages) in handoffs.iter().zip(pages.chunks(4)) {
            source.begin(*handoff, target.peer(), pages);
            source.push(*handoff, 0..4);
            source.commit(*handoff, handoff.0 as u32);
        }
        let (mut landed_count, mut done) = (0, 0);
        while landed_count < handoffs.len() {
            match target.event().await {
                Event::Begun { handoff, .. } => {
                    let at = 4 * handoff.0 as usize;
                    target.transfer.open(handoff, landing[at..at + 4].to_vec(), 0);
                }
                Event::Landed { handoff, commit } => {
                    assert_eq!(u64::from(commit.first_token), handoff.0);
                    landed_count += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        while done < handoffs.len() {
            assert!(matches!(source.event().await, Event::SourceDone { outcome: Outcome::Landed, .. }));
            done += 1;
        }
        let (from, to) = (&source.identity.layout, &target.identity.layout);
        let expected = landed((from, &pages, &source_before), (to, &landing, &target_before), 0);
        assert_same(&target.contents(), &expected);
        assert!(source.transfer.link_bytes_per_s() > 0.0, "speed is known after 2 MiB");
        assert_eq!(target.transfer.link_bytes_per_s(), 0.0, "the target sent nothing");
    }
}

#[tokio::test]
async fn drain_waits_for_handoffs_in_flight() {
    let (mut source, mut target) = pair(only(TransportKind::Memory)).await;
    assert_eq!(source.transfer.drain(SOON).await, 0);
    source.begin(H, target.peer(), &[PageId(1)]);
    assert_eq!(source.transfer.in_flight(), 1);
    assert_eq!(source.transfer.drain(Duration::from_millis(20)).await, 1);
    target.begun(H).await;
    assert_eq!(target.transfer.in_flight(), 1);
    target.transfer.refuse(H, "no room".into());
    assert_eq!(source.transfer.drain(SOON).await, 0);
    assert_eq!(source.event().await, Event::SourceDone { handoff: H, outcome: Outcome::Refused("no room".into()) });
}
