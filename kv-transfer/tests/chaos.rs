//! Many hand-offs at once between real workers, aborted, refused and cut off at random from a seed, in pools so small that every
//! page is used again as soon as it is given back. Pages nobody owns hold poison: a late write shows in the poison, a page read
//! after it was given back shows in what lands. The way between them passes a few bytes at a time, so that much happens while a
//! frame is under way.

mod support;

use kv_cache::{PageId, PageLayout};
use kv_transfer::{Begin, Config, Event, HandoffId, Outcome, TransportKind};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use support::{
    LAYERS, Over, SOON, Worker, identity, kinds_that_break, only,
    proxy::{Proxy, Way},
};
use tokio::time::timeout;

const HANDOFFS: u64 = 250;
const AT_ONCE: usize = 8;
const POISON: u8 = 0xEE;

/// Pages of one worker: free ones hold poison.
struct Pool {
    layout: PageLayout,
    free: BTreeSet<PageId>,
}

impl Pool {
    fn new(worker: &Worker) -> Self {
        let layout = worker.identity.layout.clone();
        let pool = Self { free: (0..layout.pages).map(PageId).collect(), layout };
        pool.free.iter().for_each(|page| pool.fill(worker, *page, |_| POISON));
        pool
    }

    fn take(&mut self, count: usize) -> Option<Vec<PageId>> {
        let pages: Vec<PageId> = self.free.iter().copied().take(count).collect();
        let enough = pages.len() == count;
        enough.then(|| pages.iter().for_each(|page| assert!(self.free.remove(page))));
        enough.then_some(pages)
    }

    fn give_back(&mut self, worker: &Worker, pages: &[PageId]) {
        for page in pages {
            self.fill(worker, *page, |_| POISON);
            assert!(self.free.insert(*page));
        }
    }

    fn fill(&self, worker: &Worker, page: PageId, byte: impl Fn(u32) -> u8) {
        for layer in 0..LAYERS {
            worker.write(self.layout.block_offset(layer, page), &vec![byte(layer); self.layout.block_bytes()]);
        }
    }

    /// Says whether every byte of `page` is what `byte` says for its layer.
    fn holds(&self, contents: &[u8], page: PageId, byte: impl Fn(u32) -> u8) -> bool {
        (0..LAYERS).all(|layer| {
            let at = self.layout.block_offset(layer, page);
            contents[at..at + self.layout.block_bytes()].iter().all(|got| *got == byte(layer))
        })
    }
}

fn pattern(handoff: HandoffId, index: usize) -> impl Fn(u32) -> u8 {
    move |layer| (handoff.0 as u8).wrapping_mul(31).wrapping_add(index as u8 * 7 + layer as u8) % 200
}

#[derive(Default)]
struct Record {
    pages: Vec<PageId>,
    pushed: u32,
    committed: bool,
    source_done: bool,
    landing: Option<Vec<PageId>>,
    lost: bool,
}

struct Chaos {
    rng: StdRng,
    source: Worker,
    target: Worker,
    source_pool: Pool,
    target_pool: Pool,
    proxy: Proxy,
    records: BTreeMap<HandoffId, Record>,
    next: u64,
    landed: usize,
    quiet: usize,
}

impl Chaos {
    async fn new(over: impl Into<Over>, seed: u64) -> Self {
        let config = Config { ping_interval_ms: 100, group_bytes: Some(24 << 10), ..only(over) };
        let source = Worker::start(config.clone(), identity("prefill-0", 48), seed).await;
        let target = Worker::start(config, identity("decode-0", 24), seed).await;
        let proxy = Proxy::start(target.transfer.address(), 512, None).await;
        let (source_pool, target_pool) = (Pool::new(&source), Pool::new(&target));
        let rng = StdRng::seed_from_u64(seed);
        let records = BTreeMap::new();
        Self { rng, source, target, source_pool, target_pool, proxy, records, next: 0, landed: 0, quiet: 0 }
    }

    async fn run(mut self) -> (usize, usize) {
        loop {
            while self.next < HANDOFFS && self.live().len() < AT_ONCE {
                self.begin();
            }
            let event = timeout(Duration::from_millis(20), async {
                tokio::select! {
                    event = self.source.events.recv() => event,
                    event = self.target.events.recv() => event,
                }
            });
            match event.await {
                Ok(event) => self.handle(event.expect("runs")),
                // Nothing moves by itself any more: the workers finish what they have.
                Err(_) if self.live().is_empty() && self.in_flight() == 0 => break,
                Err(_) => self.live().into_iter().for_each(|handoff| self.finish(handoff)),
            }
            self.meddle();
        }
        assert_eq!((self.source.transfer.drain(SOON).await, self.target.transfer.drain(SOON).await), (0, 0));
        self.check_poison();
        assert_eq!(self.target_pool.free.len(), 24, "stranded pages");
        (self.landed, self.quiet)
    }

    fn in_flight(&self) -> usize {
        self.source.transfer.in_flight() + self.target.transfer.in_flight()
    }

    /// Those that one side still has pages for.
    fn live(&self) -> Vec<HandoffId> {
        let live = |record: &Record| !record.source_done || record.landing.is_some();
        self.records.iter().filter(|(_, record)| live(record)).map(|(handoff, _)| *handoff).collect()
    }

    fn begin(&mut self) {
        let handoff = HandoffId(self.next);
        self.next += 1;
        let count = self.rng.random_range(1..5);
        let pages = self.source_pool.take(count).expect("enough for all at once");
        for (index, page) in pages.iter().enumerate() {
            self.source_pool.fill(&self.source, *page, pattern(handoff, index));
        }
        let mut target = self.target.peer();
        target.link = self.proxy.address.clone();
        if self.rng.random_ratio(1, 20) {
            self.target.transfer.abort(handoff, "before it began".into());
        }
        let tokens = count as u32 * 16;
        self.source.transfer.begin(Begin { handoff, targets: vec![target], tokens, pages: pages.clone() });
        self.records.insert(handoff, Record { pages, ..Record::default() });
    }

    fn record(&mut self, handoff: HandoffId) -> &mut Record {
        self.records.get_mut(&handoff).expect("begun")
    }

    /// Pushes one more page.
    fn push(&mut self, handoff: HandoffId) {
        let record = self.records.get_mut(&handoff).expect("begun");
        if record.pushed < record.pages.len() as u32 {
            self.source.push(handoff, record.pushed..record.pushed + 1);
            record.pushed += 1;
        }
    }

    fn finish(&mut self, handoff: HandoffId) {
        (0..4).for_each(|_| self.push(handoff));
        if !std::mem::replace(&mut self.record(handoff).committed, true) {
            self.source.commit(handoff, 1);
        }
    }

    fn meddle(&mut self) {
        let Some(handoff) = self.live().choose(&mut self.rng).copied() else { return };
        match self.rng.random_range(0..100) {
            0..10 => self.source.transfer.abort(handoff, "meddled".into()),
            10..20 => self.target.transfer.abort(handoff, "meddled".into()),
            20..50 => self.push(handoff),
            50..98 => self.finish(handoff),
            _ => {
                self.proxy.set(Way::Cut);
                self.proxy.set(Way::Open);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Begun { handoff, .. } => self.begun(handoff),
            Event::Landed { handoff, .. } => {
                let landing = self.take_landing(handoff);
                let contents = self.target.contents();
                for (index, page) in landing.iter().enumerate() {
                    assert!(
                        self.target_pool.holds(&contents, *page, pattern(handoff, index)),
                        "{handoff} landed wrong"
                    );
                }
                self.target_pool.give_back(&self.target, &landing);
                self.landed += 1;
            }
            Event::Lost { handoff, .. } => {
                let record = self.record(handoff);
                assert!(!std::mem::replace(&mut record.lost, true), "{handoff} lost twice");
            }
            Event::Quiet { handoff } => {
                let landing = self.take_landing(handoff);
                self.target_pool.give_back(&self.target, &landing);
                self.quiet += 1;
            }
            Event::Asked { handoff, .. } => panic!("nobody fetched {handoff}"),
            Event::SourceDone { handoff, outcome } => {
                let record = self.record(handoff);
                assert!(!std::mem::replace(&mut record.source_done, true), "{handoff} ended twice");
                assert!(outcome != Outcome::Landed || record.committed);
                let pages = record.pages.clone();
                self.source_pool.give_back(&self.source, &pages);
            }
        }
        self.check_poison();
    }

    fn begun(&mut self, handoff: HandoffId) {
        let count = self.record(handoff).pages.len();
        match if self.rng.random_ratio(1, 20) { None } else { self.target_pool.take(count) } {
            Some(landing) => {
                self.record(handoff).landing = Some(landing.clone());
                self.target.transfer.open(handoff, landing, 0);
            }
            None => self.target.transfer.refuse(handoff, "full".into()),
        }
    }

    fn take_landing(&mut self, handoff: HandoffId) -> Vec<PageId> {
        self.record(handoff).landing.take().expect("opened, and not ended before")
    }

    /// Nobody writes pages that nobody owns.
    fn check_poison(&self) {
        let contents = self.target.contents();
        for page in &self.target_pool.free {
            assert!(self.target_pool.holds(&contents, *page, |_| POISON), "late write into {page:?}");
        }
    }
}

async fn chaos(over: impl Into<Over>, seed: u64) {
    let (landed, quiet) = timeout(Duration::from_secs(60), Chaos::new(over, seed).await.run()).await.expect("ends");
    assert!(landed > 20 && quiet > 20, "seed {seed}: {landed} landed, {quiet} quiet: nothing was tested");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_under_chaos() {
    for seed in 0..3 {
        chaos(TransportKind::Memory, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ucx_under_chaos() {
    for over in kinds_that_break().into_iter().filter(|over| over.kind() == TransportKind::Ucx) {
        for seed in 0..3 {
            chaos(over, seed).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shm_under_chaos() {
    for seed in 0..3 {
        chaos(TransportKind::Shm, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_under_chaos() {
    for seed in 0..3 {
        chaos(TransportKind::Tcp, seed).await;
    }
}
