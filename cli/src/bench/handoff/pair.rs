//! Two workers' ends of a link, without workers.

use super::{
    KINDS, Kind,
    case::{self, Case, Deal, TOKENS},
};
use crate::bench::stats::Samples;
use anyhow::{Context, bail, ensure};
use engine::KvMemory;
use kv_cache::{PageId, PageLayout};
use kv_transfer::{
    Begin, Commit, Config, Event, HandoffId, Identity, Outcome, Peer, Transfer, TransportKind, UcxMemory,
};
use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Longest wait for any one event, and for a child's address.
const EVENT: Duration = Duration::from_secs(10);
/// Time from `begin` until pages are pushed: by then the landing is open.
const OPENS: Duration = Duration::from_millis(2);

/// How blocks become final.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pushes {
    /// All at one moment, once the landing is open.
    AtOnce,
    /// A layer each time this has passed.
    Layers(Duration),
    /// So many chunks of pages, each of them a layer each time this has passed.
    Chunks(u32, Duration),
}

/// Microseconds of hand-offs from their last push on.
#[derive(Debug, Default)]
pub(super) struct Tails {
    /// Until the target's acknowledgement is here: what was moved after the last push, and the commit's way there and back.
    pub(super) acked: Samples,
    /// Until this thread, which waits, has been told.
    pub(super) told: Samples,
}

/// A source, and a target that takes whatever comes.
pub(super) struct Pair {
    case: Case,
    source: End,
    target: Target,
    deal: Deal,
    next: u64,
    stop: CancellationToken,
}

/// Where the target runs. Both end with the pair.
enum Target {
    Here(String),
    Elsewhere(String, Child),
}

struct End {
    transfer: Transfer,
    events: mpsc::Receiver<Event>,
    layout: PageLayout,
    pool: Pool,
}

/// Memory for pages.
enum Pool {
    Ours(KvMemory),
    /// UCX's own: over `posix` it writes by itself only into that.
    Ucx(UcxMemory),
}

impl Pool {
    fn file(&self) -> &File {
        match self {
            Self::Ours(memory) => memory.file(),
            Self::Ucx(memory) => memory.file(),
        }
    }
}

impl Pair {
    /// Starts both ends, joined by `kind` and nothing else, as `config` says.
    pub(super) async fn start(kind: Kind, case: Case, config: Config) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let source = End::start("source", config.clone(), case, &stop).await?;
        source.fill()?;
        let target = if kind.transport == TransportKind::Memory {
            let end = End::start("target", config, case, &stop).await?;
            let address = end.transfer.address();
            tokio::spawn(async move {
                if let Err(error) = end.take_all(case).await {
                    eprintln!("target: {error:#}");
                }
            });
            Target::Here(address)
        } else {
            Target::start(kind, case, &config).await.context("start the target")?
        };
        Ok(Self { case, source, target, deal: Deal::source(case), next: 1, stop })
    }

    /// Returns what is handed over.
    pub(super) fn case(&self) -> Case {
        self.case
    }

    /// Moves every page once: the link is opened, memory is faulted in, and the target checks what lands. Returns why there is no
    /// such link, if there is none.
    pub(super) async fn warm_up(&mut self) -> anyhow::Result<Option<String>> {
        for _ in 0..self.deal.round() {
            if let Outcome::Refused(reason) = self.hand_off(Pushes::AtOnce).await?.1 {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    /// Times `count` hand-offs.
    pub(super) async fn measure(&mut self, count: usize, pushes: Pushes) -> anyhow::Result<Tails> {
        let mut tails = Tails::default();
        for _ in 0..count {
            let before = self.source.transfer.overlapped();
            match self.hand_off(pushes).await? {
                (took, Outcome::Landed) => tails.told.extend([took.as_secs_f64() * 1e6]),
                (_, other) => bail!("expected the hand-off to land, got {other:?}"),
            }
            let after = self.source.transfer.overlapped();
            let acked = (after.moved - before.moved) - (after.hidden - before.hidden);
            tails.acked.extend([acked.as_secs_f64() * 1e6]);
        }
        Ok(tails)
    }

    async fn hand_off(&mut self, pushes: Pushes) -> anyhow::Result<(Duration, Outcome)> {
        let (handoff, pages) = (HandoffId(self.next), self.deal.next());
        self.next += 1;
        let (layers, all) = (self.case.layout().layers, pages.len() as u32);
        let transfer = &self.source.transfer;
        transfer.begin(Begin { handoff, targets: vec![self.target.peer()], tokens: TOKENS, pages });
        // This thread plays the engine's, which computes and pushes without ever waiting for the transfer.
        let (chunks, step, pace) = match pushes {
            Pushes::AtOnce => (1, layers, OPENS),
            Pushes::Layers(pace) => (1, 1, pace),
            Pushes::Chunks(chunks, pace) => (chunks, 1, pace),
        };
        let mut pushed = Instant::now();
        for chunk in 0..chunks {
            for layer in (0..layers).step_by(step as usize) {
                compute(pace);
                pushed = Instant::now();
                transfer.push(handoff, layer..layer + step, all * chunk / chunks..all * (chunk + 1) / chunks);
            }
        }
        transfer.commit(handoff, Commit { first_token: 7 });
        match self.source.event().await? {
            Event::SourceDone { outcome, .. } => Ok((pushed.elapsed(), outcome)),
            other => bail!("expected the source to be done, got {other:?}"),
        }
    }
}

/// Plays an accelerator that computes for so long, while this thread waits for it.
#[allow(clippy::disallowed_methods)]
pub(super) fn compute(pace: Duration) {
    thread::sleep(pace);
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Target {
    /// Starts this binary as the target. It prints its address once it is ready.
    async fn start(kind: Kind, case: Case, config: &Config) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this binary")?;
        let what = format!("{}/{}", case.name(), kind.name);
        let mut command = Command::new(program);
        command.args(["bench", "--serve", "target", "--only", &what]);
        if let Some(library) = &config.ucx.library {
            command.arg("--ucx-library").arg(library);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut target = Self::Elsewhere(String::new(), child);
        if let Self::Elsewhere(address, child) = &mut target {
            let stdout = child.stdout.take().context("its output is piped")?;
            let mut lines = BufReader::new(tokio::process::ChildStdout::from_std(stdout)?).lines();
            let line = timeout(EVENT, lines.next_line()).await.context("wait for its address")??;
            *address = line.context("it ended")?;
        }
        Ok(target)
    }

    fn peer(&self) -> Peer {
        let (Self::Here(link) | Self::Elsewhere(link, _)) = self;
        Peer { worker: "target".into(), incarnation: 1, link: link.clone() }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Self::Elsewhere(_, child) = self {
            // It may have ended already; either way nothing of it is left afterwards.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the target of the bench: prints its address, then takes what comes until it is killed or its parent is gone. `what` is
/// `CASE/KIND`.
pub(in crate::bench) fn serve(what: &str, ucx_library: Option<&Path>) -> anyhow::Result<()> {
    let (case, name) = case::parse(what)?;
    let kind = KINDS.into_iter().find(|kind| kind.name == name);
    let kind = kind.with_context(|| format!("{name:?} is no transport of the hand-off bench"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let end = End::start("target", kind.config(ucx_library), case, &CancellationToken::new()).await?;
        println!("{}", end.transfer.address());
        let (gone, parent) = tokio::sync::oneshot::channel();
        thread::spawn(move || {
            // Ends with the parent, whose end of the pipe closes.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = gone.send(());
        });
        tokio::select! {
            ended = end.take_all(case) => ended,
            _ = parent => std::process::exit(0),
        }
    })
}

impl End {
    async fn start(worker: &str, config: Config, case: Case, stop: &CancellationToken) -> anyhow::Result<Self> {
        let layout = case.layout();
        let pool = if config.ucx.tls.as_deref() == Some("posix") {
            Pool::Ucx(UcxMemory::new(&config.ucx, layout.pool_bytes()).map_err(anyhow::Error::msg)?)
        } else {
            Pool::Ours(KvMemory::new(layout.clone()).context("reserve pages")?)
        };
        let identity = Identity {
            worker: worker.into(),
            incarnation: 1,
            fingerprint: "bench".into(),
            layout: layout.clone(),
            rank: Default::default(),
        };
        let (sender, events) = mpsc::channel(64);
        let transfer = Transfer::start(config, identity, pool.file(), sender, stop.clone()).await?;
        Ok(Self { transfer, events, layout, pool })
    }

    async fn event(&mut self) -> anyhow::Result<Event> {
        let event = timeout(EVENT, self.events.recv()).await.context("wait for an event of the hand-off")?;
        event.context("the transfer has stopped")
    }

    /// Target: opens a landing for whatever comes; what lands first in each page is checked.
    async fn take_all(mut self, case: Case) -> anyhow::Result<()> {
        let (mut from, mut to) = (Deal::source(case), Deal::target(case));
        let mut unchecked = to.round();
        // A source that settles by itself begins the next before this end has heard of it.
        let mut open = HashMap::new();
        while let Some(event) = self.events.recv().await {
            match event {
                Event::Begun { handoff, .. } => {
                    let landing = to.next();
                    self.transfer.open(handoff, landing.clone(), 0);
                    open.insert(handoff, landing);
                }
                Event::Landed { handoff, .. } => {
                    let landing = open.remove(&handoff).context("what lands has a landing")?;
                    if unchecked > 0 {
                        unchecked -= 1;
                        self.check(&from.next(), &landing)?;
                    }
                }
                other => bail!("expected a hand-off to begin or land, got {other:?}"),
            }
        }
        Ok(())
    }

    /// Checks that the pages `to` hold what `from` holds at the source.
    fn check(&self, from: &[PageId], to: &[PageId]) -> anyhow::Result<()> {
        let layout = &self.layout;
        let [mut expected, mut landed] = [vec![0; layout.block_bytes()], vec![0; layout.block_bytes()]];
        for layer in 0..layout.layers {
            for (from, to) in from.iter().zip(to) {
                case::contents(layer, *from, &mut expected);
                let offset = layout.block_offset(layer, *to) as u64;
                self.pool.file().read_exact_at(&mut landed, offset).context("read a block")?;
                ensure!(expected == landed, "layer {layer}: page {to:?} does not hold what page {from:?} does");
            }
        }
        Ok(())
    }

    /// Source: writes the contents of every block.
    fn fill(&self) -> anyhow::Result<()> {
        let layout = &self.layout;
        let mut block = vec![0; layout.block_bytes()];
        for layer in 0..layout.layers {
            for page in (0..layout.pages).map(PageId) {
                case::contents(layer, page, &mut block);
                let offset = layout.block_offset(layer, page) as u64;
                self.pool.file().write_all_at(&block, offset).context("fill the pool")?;
            }
        }
        Ok(())
    }
}
