//! What a link costs in memory, as the crate's first page states it.

mod support;

use kv_cache::PageId;
use kv_transfer::{Config, Event, HandoffId, Outcome, TransportKind};
use support::{
    Worker, identity, kinds, only,
    tls::{Files, authority},
};

/// Pages of each pool: 100 MiB.
const PAGES: u32 = 2_133;
/// Pages of one hand-off: 25 MiB.
const COUNT: u32 = 533;

/// Kilobytes of this process, by the system's name for them.
fn kilobytes(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a known name");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

async fn hand_over(source: &mut Worker, target: &mut Worker, handoff: u64) {
    let handoff = HandoffId(handoff);
    let first = handoff.0 as u32 * 7 % (PAGES - COUNT);
    let pages: Vec<PageId> = (first..first + COUNT).map(PageId).collect();
    source.begin(handoff, target.peer(), &pages);
    target.begun(handoff).await;
    target.transfer.open(handoff, pages.iter().rev().copied().collect(), 0);
    source.push(handoff, 0..COUNT);
    source.commit(handoff, 1);
    assert!(matches!(target.event().await, Event::Landed { .. }));
    assert!(matches!(source.event().await, Event::SourceDone { outcome: Outcome::Landed, .. }));
}

/// Both ends of one link live in this process, so twice of everything is seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_takes_no_more_memory_than_it_says() {
    let (files, authority) = (Files::new(), authority());
    let tls = files.worker("worker", &authority, "127.0.0.1");
    let kinds = kinds().into_iter().map(|kind| (kind, None));
    for (kind, tls) in kinds.chain([(TransportKind::Tcp.into(), Some(tls))]) {
        let config = Config { group_bytes: Some(4 << 20), tls, ..only(kind) };
        let mut source = Worker::start(config.clone(), identity("prefill-0", PAGES), 1).await;
        let mut target = Worker::start(config, identity("decode-0", PAGES), 2).await;
        let (memory, tables) = (kilobytes("RssAnon"), kilobytes("VmPTE"));
        for handoff in 0..40 {
            hand_over(&mut source, &mut target, handoff).await;
        }
        let (memory, tables) = (kilobytes("RssAnon").saturating_sub(memory), kilobytes("VmPTE").saturating_sub(tables));
        println!("{kind:?}: {memory} kB, and {tables} kB of page tables");
        assert!(memory < 8 << 10, "{kind:?}: {memory} kB");
        // A 512th of each of: both pools as their workers map them, and the target's as the source maps it.
        let pool = source.identity.layout.pool_bytes() >> 10;
        assert!(tables < 3 * pool / 512 + 512, "{kind:?}: {tables} kB of page tables");
    }
}
