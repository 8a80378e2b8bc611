//! Real hand-offs between workers whose pages differ: in length, in element type, in the heads of their rank.

mod support;

use kv_cache::{KvDtype, PageId, PageLayout};
use kv_transfer::{Begin, Commit, Config, Event, HandoffId, Identity, Outcome, Rank, TransportKind};
use metrics_exporter_prometheus::PrometheusBuilder;
use std::{ops::Range, time::Duration};
use support::{LAYERS, Over, SOON, Worker, assert_same, identity, kinds, only, some_pages};
use tokio::time::{sleep, timeout};

const H: HandoffId = HandoffId(0xBA70);

fn worker(name: &str, change: impl FnOnce(&mut PageLayout), rank: Rank) -> Identity {
    let mut identity = Identity { rank, ..identity(name, 40) };
    change(&mut identity.layout);
    identity
}

/// What the bytes of `tokens` tokens of head `head` mean, key then value, layer by layer.
fn meaning(worker: &Worker, contents: &[u8], pages: &[PageId], tokens: Range<u32>, head: u32) -> Vec<f32> {
    let layout = &worker.identity.layout;
    let mut meaning = Vec::new();
    for layer in 0..LAYERS {
        for token in tokens.clone() {
            let block = layout.block_offset(layer, pages[(token / layout.page_tokens) as usize]);
            let row = (head * layout.page_tokens + token % layout.page_tokens) as usize;
            for (plane, dim) in [(layout.keys(), layout.key_dim), (layout.values(), layout.value_dim)] {
                let scale = match layout.dtype.scale_bytes() {
                    0 => 1.0,
                    _ => {
                        let at = block + plane.scales + row * 2;
                        f32::from_bits(u32::from(u16::from_le_bytes([contents[at], contents[at + 1]])) << 16)
                    }
                };
                for element in 0..dim as usize {
                    let bytes = layout.dtype.bytes();
                    let at = &contents[block + plane.elements + (row * dim as usize + element) * bytes..][..bytes];
                    meaning.push(
                        scale
                            * match layout.dtype {
                                KvDtype::F32 => f32::from_le_bytes(at.try_into().expect("four")),
                                KvDtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes([at[0], at[1]])) << 16),
                                KvDtype::Int8 => f32::from(at[0] as i8),
                                other => panic!("{other} is not read here"),
                            },
                    );
                }
            }
        }
    }
    meaning
}

/// Fills a pool with numbers that mean something in its dtype.
fn write_numbers(worker: &Worker) {
    let layout = &worker.identity.layout;
    let mut contents = worker.contents();
    let number = |at: usize| (at * 7919 % 4001) as f32 / 1000.0 - 2.0;
    match layout.dtype {
        KvDtype::F32 => {
            contents.chunks_exact_mut(4).enumerate().for_each(|(at, to)| to.copy_from_slice(&number(at).to_le_bytes()))
        }
        KvDtype::Bf16 => contents
            .chunks_exact_mut(2)
            .enumerate()
            .for_each(|(at, to)| to.copy_from_slice(&((number(at).to_bits() >> 16) as u16).to_le_bytes())),
        // Codes may be anything, scales may not.
        _ => {
            for block in contents.chunks_exact_mut(layout.block_bytes()) {
                let scales = block[layout.keys().scales..].chunks_exact_mut(2);
                scales.enumerate().for_each(|(at, to)| to.copy_from_slice(&(0x3c00 + at as u16 % 64).to_le_bytes()));
            }
        }
    }
    worker.write(0, &contents);
}

/// Checks that what a target's heads mean is what those ranks of the source have for them, from the token `have` on.
fn assert_landed(
    sources: &[Worker],
    target: &Worker,
    (pages, landing): (&[PageId], &[PageId]),
    tokens: Range<u32>,
    most_error: f32,
) {
    let rank = target.identity.rank;
    let kv_heads = target.identity.layout.kv_heads * (rank.of / rank.replicas);
    let heads = |worker: &Worker| {
        let (rank, each) = (worker.identity.rank, worker.identity.layout.kv_heads);
        rank.index / rank.replicas * each..(rank.index / rank.replicas + 1) * each
    };
    let landed = target.contents();
    for head in heads(target) {
        let sends = |source: &&Worker| source.identity.rank.sends_to(&rank, kv_heads) && heads(source).contains(&head);
        let source = sources.iter().find(sends).expect("somebody has it");
        let was = meaning(source, &source.contents(), pages, tokens.clone(), head - heads(source).start);
        let is = meaning(target, &landed, landing, tokens.clone(), head - heads(target).start);
        let worst = was.iter().zip(&is).map(|(was, is)| (was - is).abs()).fold(0.0, f32::max);
        assert!(was.len() == is.len() && worst <= most_error, "head {head} is off by {worst}");
    }
}

/// Starts the ranks, hands a sequence over between all of them, and compares what landed. Nothing else in the pools of the target
/// changes. `have`: pages that are there.
async fn hand_over(kind: Over, sources: Vec<Identity>, targets: Vec<Identity>, have: u32, most_error: f32) {
    const TOKENS: u32 = 75;
    let config = Config { lossy_kv: most_error > 0.0, ..only(kind) };
    let mut started = Vec::new();
    for (seed, identity) in sources.into_iter().chain(targets.clone()).enumerate() {
        let worker = Worker::start(config.clone(), identity, seed as u64).await;
        write_numbers(&worker);
        started.push(worker);
    }
    let mut targets = started.split_off(started.len() - targets.len());
    let mut sources = started;
    let place = |worker: &Worker, seed: u64| {
        let layout = &worker.identity.layout;
        some_pages(layout, layout.pages_for(TOKENS as usize), seed)
    };
    let (pages, landing) = (place(&sources[0], 3), place(&targets[0], 4));
    let before: Vec<Vec<u8>> = targets.iter().map(Worker::contents).collect();
    let half = pages.len() as u32 / 2;
    for source in &sources {
        begin(source, &targets, TOKENS, &pages);
        source.push(H, 0..half);
    }
    for target in &mut targets {
        target.begun(H).await;
        target.transfer.open(H, landing.clone(), have);
    }
    for source in &sources {
        source.push(H, half..pages.len() as u32);
        source.commit(H, 17);
    }
    for target in &mut targets {
        assert_eq!(target.event().await, Event::Landed { handoff: H, commit: Commit { first_token: 17 } });
    }
    for source in &mut sources {
        assert_eq!(source.event().await, Event::SourceDone { handoff: H, outcome: Outcome::Landed });
    }
    for worker in sources.iter().chain(&targets) {
        assert_eq!(worker.transfer.drain(SOON).await, 0);
    }
    for (target, mut before) in targets.iter().zip(before) {
        let layout = &target.identity.layout;
        let tokens = (have * layout.page_tokens).min(TOKENS)..TOKENS;
        assert_landed(&sources, target, (&pages, &landing), tokens, most_error);
        // What was there, and what is nobody's, is untouched.
        let mut after = target.contents();
        for page in &landing[have as usize..] {
            for layer in 0..LAYERS {
                let at = layout.block_offset(layer, *page);
                before[at..at + layout.block_bytes()].fill(0);
                after[at..at + layout.block_bytes()].fill(0);
            }
        }
        assert_same(&after, &before);
    }
}

fn begin(source: &Worker, targets: &[Worker], tokens: u32, pages: &[PageId]) {
    let targets = targets.iter().map(Worker::peer).collect();
    source.transfer.begin(Begin { handoff: H, targets, tokens, pages: pages.to_vec() });
}

#[tokio::test]
async fn pages_of_different_length() {
    for kind in kinds() {
        for (ours, theirs, have) in [(16, 32, 0), (16, 32, 1), (32, 16, 0), (32, 16, 3), (16, 24, 1), (8, 32, 3)] {
            let source = worker("prefill-0", |layout| layout.page_tokens = ours, Rank::default());
            let target = worker("decode-0", |layout| layout.page_tokens = theirs, Rank::default());
            hand_over(kind, vec![source], vec![target], have, 0.0).await;
        }
    }
}

/// All ranks of a worker with four heads.
fn ranks(name: &str, of: u32, change: impl Fn(&mut PageLayout)) -> Vec<Identity> {
    let rank = |index| {
        let rank = Rank::new(index, of, 4).expect("even");
        let heads = |layout: &mut PageLayout| layout.kv_heads = 4 / (of / rank.replicas);
        worker(&format!("{name}-{index}"), |layout| (heads(layout), change(layout)).0, rank)
    };
    (0..of).map(rank).collect()
}

#[tokio::test]
async fn ranks_of_different_degree() {
    for kind in kinds() {
        for (sources, targets) in [(1, 2), (2, 1), (4, 2), (2, 4), (2, 2), (8, 2), (2, 8)] {
            hand_over(kind, ranks("prefill", sources, |_| {}), ranks("decode", targets, |_| {}), 0, 0.0).await;
        }
    }
}

/// A card does not convert: what is converted passes through the host.
fn kinds_that_convert() -> impl Iterator<Item = Over> {
    kinds().into_iter().filter(|kind| *kind != Over::Cuda)
}

#[tokio::test]
async fn everything_differs_at_once() {
    for kind in kinds_that_convert() {
        let sources = ranks("prefill", 4, |layout| layout.page_tokens = 8);
        let targets = ranks("decode", 2, |layout| (layout.page_tokens, layout.dtype) = (32, KvDtype::F32));
        hand_over(kind, sources, targets, 1, 0.0).await;
    }
}

#[tokio::test]
async fn elements_are_converted() {
    use KvDtype::{Bf16, F32, Int8};
    for kind in kinds_that_convert() {
        // Numbers are below 2 (and 127 steps of int8's scales below 16): half a step of the target's type.
        for (ours, theirs, error) in
            [(Bf16, F32, 0.0), (Int8, F32, 0.0), (F32, Bf16, 0.005), (Bf16, Int8, 0.008), (Int8, Bf16, 0.01)]
        {
            let source = worker("prefill-0", |layout| layout.dtype = ours, Rank::default());
            let target = worker("decode-0", |layout| layout.dtype = theirs, Rank::default());
            hand_over(kind, vec![source], vec![target], 1, error).await;
        }
    }
}

#[tokio::test]
async fn what_would_be_rounded_is_refused_unless_asked_for() {
    let source = worker("prefill-0", |_| {}, Rank::default());
    let target = worker("decode-0", |layout| layout.dtype = KvDtype::Int8, Rank::default());
    // The source's own setting changes nothing: the target decodes from what comes.
    let config = Config { lossy_kv: true, ..only(TransportKind::Tcp) };
    let mut source = Worker::start(config, source, 1).await;
    let target = Worker::start(only(TransportKind::Tcp), target, 2).await;
    source.begin(H, target.peer(), &[PageId(0)]);
    match source.event().await {
        Event::SourceDone { outcome: Outcome::Refused(reason), .. } => {
            assert!(reason.ends_with("page layout: dtype: yours bf16, ours int8, and lossy_kv is off"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

async fn all_ranks(config: Config, sources: u32, targets: u32) -> (Vec<Worker>, Vec<Worker>) {
    let (mut all_sources, mut all_targets) = (Vec::new(), Vec::new());
    for identity in ranks("prefill", sources, |_| {}) {
        all_sources.push(Worker::start(config.clone(), identity, 1).await);
    }
    for identity in ranks("decode", targets, |_| {}) {
        all_targets.push(Worker::start(config.clone(), identity, 2).await);
    }
    (all_sources, all_targets)
}

/// Begins the hand-off at every source, and opens it at every target.
async fn open_all(sources: &[Worker], targets: &mut [Worker]) {
    let pages: Vec<PageId> = (3..9).map(PageId).collect();
    for source in sources {
        begin(source, targets, 96, &pages);
    }
    for target in targets {
        target.begun(H).await;
        target.transfer.open(H, (20..26).map(PageId).collect(), 0);
    }
}

#[tokio::test]
async fn a_rank_that_gives_up_takes_the_others_with_it() {
    for kind in kinds() {
        let (mut sources, mut targets) = all_ranks(only(kind), 4, 2).await;
        open_all(&sources, &mut targets).await;
        // Rank 1 sends to target 0, together with rank 0.
        sources[0].push(H, 0..6);
        sources[0].commit(H, 5);
        sources[1].push(H, 0..3);
        sources[1].transfer.abort(H, "out of memory".into());
        assert_eq!(targets[0].event().await, Event::Lost { handoff: H, reason: "out of memory".into() });
        assert_eq!(targets[0].event().await, Event::Quiet { handoff: H });
        match sources[1].event().await {
            Event::SourceDone { outcome: Outcome::Aborted(_), .. } => {}
            other => panic!("{other:?}"),
        }
        // It may have landed before its neighbour gave up.
        assert!(matches!(sources[0].event().await, Event::SourceDone { .. }));
        // Target 1 knows nothing of it, and what its two ranks have for it lands.
        for source in &sources[2..] {
            source.push(H, 0..6);
            source.commit(H, 5);
        }
        let landed = targets[1].event().await;
        assert!(matches!(landed, Event::Landed { .. }), "{kind:?}: {landed:?}");
        for worker in sources.iter().chain(&targets) {
            assert_eq!(worker.transfer.drain(SOON).await, 0);
        }
    }
}

#[tokio::test]
async fn what_is_forgone_is_forgone_by_all_ranks() {
    for kind in kinds() {
        let recorder = PrometheusBuilder::new().build_recorder();
        // The handles are made by `Transfer::start`, on this thread.
        let local = metrics::set_default_local_recorder(&recorder);
        let (mut sources, mut targets) = all_ranks(only(kind), 4, 2).await;
        drop(local);
        open_all(&sources, &mut targets).await;
        // What moves has begun at its target, which so hears `Forgo` and has nothing to refuse.
        sources.iter().for_each(|source| source.push(H, 0..3));
        let moving = |text: &str| {
            let sent = |line: &&str| line.starts_with("baton_handoff_bytes_total{") && line.contains("\"source\"");
            text.lines().filter(sent).filter(|line| !line.ends_with(" 0")).count()
        };
        let all_move = async {
            while moving(&recorder.handle().render()) < sources.len() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, all_move).await.expect("every rank sends");
        for source in &mut sources {
            source.transfer.forgo(H);
            assert_eq!(source.event().await, Event::SourceDone { handoff: H, outcome: Outcome::Forgone });
        }
        for target in &mut targets {
            assert!(matches!(target.event().await, Event::Lost { .. }));
            assert_eq!(target.event().await, Event::Quiet { handoff: H });
        }
        for worker in sources.iter().chain(&targets) {
            assert_eq!(worker.transfer.drain(SOON).await, 0);
        }
        let text = recorder.handle().render();
        let ended = |line: &&str| line.starts_with("baton_handoffs_total{") && !line.ends_with(" 0");
        let ends: Vec<&str> = text.lines().filter(ended).collect();
        assert!(ends.len() == 6 && ends.iter().all(|line| line.contains("\"forgone\"")), "{ends:?}");
    }
}

#[tokio::test]
async fn a_rank_that_never_begins_is_waited_for_no_longer_than_any() {
    for kind in kinds() {
        let config = Config { open_timeout_ms: 800, ..only(kind) };
        let (mut sources, mut targets) = all_ranks(config, 2, 1).await;
        let pages: Vec<PageId> = (3..9).map(PageId).collect();
        begin(&sources[0], &targets, 96, &pages);
        targets[0].begun(H).await;
        targets[0].transfer.open(H, (20..26).map(PageId).collect(), 0);
        sources[0].push(H, 0..6);
        sources[0].commit(H, 5);
        assert_eq!(sources[0].event().await, Event::SourceDone { handoff: H, outcome: Outcome::Landed });
        let reason = "1 ranks of the source did not begin within 800ms".to_owned();
        assert_eq!(targets[0].event().await, Event::Lost { handoff: H, reason });
        assert_eq!(targets[0].event().await, Event::Quiet { handoff: H });
        begin(&sources[1], &targets, 96, &pages);
        assert!(matches!(sources[1].event().await, Event::SourceDone { outcome: Outcome::Aborted(_), .. }));
    }
}

#[tokio::test]
async fn a_target_rank_that_refuses_ends_it_for_its_sources() {
    for kind in kinds() {
        let (mut sources, mut targets) = all_ranks(only(kind), 1, 2).await;
        let pages: Vec<PageId> = (3..9).map(PageId).collect();
        begin(&sources[0], &targets, 96, &pages);
        for target in &mut targets {
            target.begun(H).await;
        }
        targets[0].transfer.open(H, (20..26).map(PageId).collect(), 0);
        targets[1].transfer.refuse(H, "full".into());
        assert_eq!(
            sources[0].event().await,
            Event::SourceDone { handoff: H, outcome: Outcome::Refused("full".into()) }
        );
        assert!(matches!(targets[0].event().await, Event::Lost { .. }));
        assert_eq!(targets[0].event().await, Event::Quiet { handoff: H });
    }
}

#[tokio::test]
async fn ranks_that_disagree_do_not_land() {
    let (sources, mut targets) = all_ranks(only(TransportKind::Tcp), 2, 1).await;
    let pages: Vec<PageId> = (3..9).map(PageId).collect();
    for (token, source) in sources.iter().enumerate() {
        begin(source, &targets, 96, &pages);
        source.push(H, 0..6);
        source.commit(H, token as u32);
    }
    targets[0].begun(H).await;
    targets[0].transfer.open(H, (20..26).map(PageId).collect(), 0);
    match targets[0].event().await {
        Event::Lost { reason, .. } => assert!(reason.starts_with("ranks committed different tokens"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(targets[0].event().await, Event::Quiet { handoff: H });
}
