//! Two workers' ends of a link, without workers.

use anyhow::{Context, bail, ensure};
use engine::KvMemory;
use kv_cache::{PageId, PageLayout};
use kv_transfer::{Begin, Commit, Config, Event, HandoffId, Identity, Outcome, Peer, Transfer, TransportKind};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::{
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// Longest wait for any one event.
const EVENT: Duration = Duration::from_secs(10);

/// A source, a target and their pools.
pub(super) struct Pair {
    pub(super) layout: PageLayout,
    source: End,
    target: End,
    peer: Peer,
    next: u64,
    stop: CancellationToken,
}

struct End {
    transfer: Transfer,
    events: mpsc::Receiver<Event>,
    memory: KvMemory,
}

/// How long one hand-off took.
pub(super) struct Timing {
    /// From the last layer pushed until the commit is acknowledged.
    pub(super) overhead: Duration,
    /// From `begin` until then.
    pub(super) whole: Duration,
}

impl Pair {
    /// Starts both ends in this process, joined by `kind` and nothing else.
    pub(super) async fn start(kind: TransportKind, layout: PageLayout) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let source = End::start("source", kind, &layout, &stop).await?;
        let target = End::start("target", kind, &layout, &stop).await?;
        source.fill()?;
        let peer = Peer { worker: "target".into(), incarnation: 1, link: target.transfer.address() };
        Ok(Self { layout, source, target, peer, next: 1, stop })
    }

    /// Moves a sequence that lies in `from` at the source to `to` at the target. With `pace`, a layer is finished each time that
    /// has passed; without, all are at once.
    pub(super) async fn hand_off(
        &mut self,
        from: &[PageId],
        to: &[PageId],
        pace: Option<Duration>,
    ) -> anyhow::Result<Timing> {
        let handoff = HandoffId(self.next);
        self.next += 1;
        let tokens = from.len() as u32 * self.layout.page_tokens;
        let pages = 0..from.len() as u32;
        let began = Instant::now();
        self.source.transfer.begin(Begin { handoff, target: self.peer.clone(), tokens, pages: from.to_vec() });
        match self.target.event().await? {
            Event::Begun { handoff, .. } => self.target.transfer.open(handoff, to.to_vec(), 0),
            other => bail!("expected Begun, got {other:?}"),
        }
        match pace {
            Some(pace) => {
                let mut layers = tokio::time::interval_at(tokio::time::Instant::now() + pace, pace);
                for layer in 0..self.layout.layers {
                    layers.tick().await;
                    self.source.transfer.push(handoff, layer..layer + 1, pages.clone());
                }
            }
            None => self.source.transfer.push(handoff, 0..self.layout.layers, pages),
        }
        let computed = Instant::now();
        self.source.transfer.commit(handoff, Commit { first_token: 7 });
        match self.source.event().await? {
            Event::SourceDone { outcome: Outcome::Landed, .. } => {}
            other => bail!("expected the source to be done, got {other:?}"),
        }
        let timing = Timing { overhead: computed.elapsed(), whole: began.elapsed() };
        match self.target.event().await? {
            Event::Landed { .. } => Ok(timing),
            other => bail!("expected Landed, got {other:?}"),
        }
    }

    /// Checks that the pages `to` of the target hold what `from` holds at the source.
    pub(super) fn check(&self, from: &[PageId], to: &[PageId]) -> anyhow::Result<()> {
        for layer in 0..self.layout.layers {
            for (from, to) in from.iter().zip(to) {
                let same = self.source.block(layer, *from)? == self.target.block(layer, *to)?;
                ensure!(same, "layer {layer}: page {to:?} does not hold what page {from:?} does");
            }
        }
        Ok(())
    }

    /// Ends both.
    pub(super) fn stop(self) {
        self.stop.cancel();
    }
}

impl End {
    async fn start(
        worker: &str,
        kind: TransportKind,
        layout: &PageLayout,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let memory = KvMemory::new(layout.clone()).context("reserve pages")?;
        let identity =
            Identity { worker: worker.into(), incarnation: 1, fingerprint: "bench".into(), layout: layout.clone() };
        let config = Config { require: Some(kind), ..Config::default() };
        let (sender, events) = mpsc::channel(64);
        let transfer = Transfer::start(config, identity, memory.file(), sender, stop.clone()).await?;
        Ok(Self { transfer, events, memory })
    }

    async fn event(&mut self) -> anyhow::Result<Event> {
        let event = timeout(EVENT, self.events.recv()).await.context("wait for an event of the hand-off")?;
        event.context("the transfer has stopped")
    }

    /// Writes random bytes to the whole pool, the same in every run.
    fn fill(&self) -> anyhow::Result<()> {
        let mut random = StdRng::seed_from_u64(2);
        let mut chunk = vec![0; 1 << 20];
        for offset in (0..self.memory.layout().pool_bytes()).step_by(chunk.len()) {
            random.fill_bytes(&mut chunk);
            let length = chunk.len().min(self.memory.layout().pool_bytes() - offset);
            self.memory.file().write_all_at(&chunk[..length], offset as u64).context("fill the pool")?;
        }
        Ok(())
    }

    fn block(&self, layer: u32, page: PageId) -> anyhow::Result<Vec<u8>> {
        let layout = self.memory.layout();
        let mut block = vec![0; layout.block_bytes()];
        let offset = layout.block_offset(layer, page) as u64;
        self.memory.file().read_exact_at(&mut block, offset).context("read a block")?;
        Ok(block)
    }
}
