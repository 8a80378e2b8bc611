//! Moves pages between this process and another, by every transport in turn.
//!
//! The other end is a child of this process, one for each transport, or `baton doctor --listen` on another host.

use crate::shutdown;
use anyhow::{Context, bail};
use engine::KvMemory;
use kv_cache::{KvDtype, PageId, PageLayout};
use kv_transfer::{Begin, Commit, Config, Event, HandoffId, Identity, Outcome, Peer, Rank, Transfer, TransportKind};
use std::{
    ffi::OsString,
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Pages of one hand-off: 512 tokens of a 1 B model, 16 MiB.
const PAGES: u32 = 32;
/// Hand-offs before the ones that count, and those.
const WARM_UP: usize = 4;
const ROUNDS: usize = 15;
/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(10);
/// Member id of the end that serves.
const SERVED: &str = "doctor";

/// What became of one transport.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) kind: TransportKind,
    pub(super) result: Result<Timing, String>,
}

/// How fast it was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) gb_per_s: f64,
    /// Of one hand-off.
    pub(super) milliseconds: f64,
}

fn layout() -> PageLayout {
    let pages = 2 * PAGES;
    PageLayout { layers: 16, page_tokens: 16, kv_heads: 8, key_dim: 64, value_dim: 64, dtype: KvDtype::Bf16, pages }
}

/// Measures every transport, to a process of this host or to the doctor that listens at `peer`.
/// Both ends do as `config` says, of which `passed_on` tells the other.
pub(super) async fn paths(peer: Option<&str>, config: &Config, passed_on: &[OsString]) -> Vec<Measured> {
    let mut measured = Vec::new();
    for kind in [TransportKind::Shm, TransportKind::Ucx, TransportKind::Tcp] {
        let config = Config { require: Some(kind), listen: SocketAddr::from(([0, 0, 0, 0], 0)), ..config.clone() };
        let result = path(peer, kind, config, passed_on).await.map_err(|error| format!("{error:#}"));
        measured.push(Measured { kind, result });
    }
    measured
}

async fn path(
    peer: Option<&str>,
    kind: TransportKind,
    config: Config,
    passed_on: &[OsString],
) -> anyhow::Result<Timing> {
    let (_child, link) = match peer {
        Some(peer) => (None, peer.to_owned()),
        None => {
            let (child, link) =
                timeout(LIMIT, spawn(kind, passed_on)).await.context("the other process does not start")??;
            (Some(child), link)
        }
    };
    let mut end = End::start("doctor-source", config).await?;
    let mut times = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        let took = end.hand_off(&link, round as u32).await?;
        if round >= WARM_UP {
            times.push(took.as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[ROUNDS / 2];
    let bytes = layout().page_bytes() * PAGES as usize;
    Ok(Timing { gb_per_s: bytes as f64 / median / 1e9, milliseconds: median * 1e3 })
}

/// Starts this program again as the other end. It ends with the handle.
async fn spawn(kind: TransportKind, passed_on: &[OsString]) -> anyhow::Result<(Child, String)> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["doctor", "--listen", "127.0.0.1:0", "--transport", name(kind)]).args(passed_on);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start the other process")?;
    let (Some(said), Some(complaints)) = (child.stdout.take(), child.stderr.take()) else { bail!("no pipes") };
    let mut line = String::new();
    BufReader::new(said).read_line(&mut line).await.context("read what the other process says")?;
    match line.trim().strip_prefix(LISTENING) {
        Some(address) => Ok((child, address.to_owned())),
        None => {
            let mut reason = String::new();
            BufReader::new(complaints).read_line(&mut reason).await.context("read why the other process ended")?;
            bail!("{}", reason.trim().trim_start_matches("error: "))
        }
    }
}

const LISTENING: &str = "listening on ";

fn name(kind: TransportKind) -> &'static str {
    match kind {
        TransportKind::Memory => "memory",
        TransportKind::Cuda => "cuda",
        TransportKind::Shm => "shm",
        TransportKind::Ucx => "ucx",
        TransportKind::Tcp => "tcp",
    }
}

/// Takes hand-offs from other doctors until told to stop.
pub(super) async fn serve(config: Config) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signal()?;
    let mut end = End::start(SERVED, config).await?;
    println!("{LISTENING}{}", end.transfer.address());
    while let Some(Some(event)) = shutdown.run_until_cancelled(end.events.recv()).await {
        if let Event::Begun { handoff, tokens, .. } = event {
            let pages = end.identity.layout.pages_for(tokens as usize) as u32;
            // One at a time from one doctor; two doctors write over each other's pages, which nobody reads.
            end.transfer.open(handoff, (0..pages).map(PageId).collect(), 0);
        }
    }
    Ok(())
}

/// One end of the links.
struct End {
    transfer: Transfer,
    identity: Identity,
    events: mpsc::Receiver<Event>,
    _memory: KvMemory,
    stop: CancellationToken,
}

impl Drop for End {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl End {
    async fn start(worker: &str, config: Config) -> anyhow::Result<Self> {
        let memory = KvMemory::new(layout()).context("reserve pages")?;
        let identity = Identity {
            worker: worker.into(),
            incarnation: 1,
            fingerprint: concat!("doctor ", env!("CARGO_PKG_VERSION")).into(),
            layout: layout(),
            rank: Rank::default(),
        };
        let (sender, events) = mpsc::channel(64);
        let stop = CancellationToken::new();
        let transfer = Transfer::start(config, identity.clone(), memory.file(), sender, stop.clone()).await?;
        Ok(Self { transfer, identity, events, _memory: memory, stop })
    }

    /// Hands pages over and returns how long that took.
    async fn hand_off(&mut self, link: &str, round: u32) -> anyhow::Result<Duration> {
        let handoff = HandoffId(rand::random());
        let pages: Vec<PageId> = (0..PAGES).map(|page| PageId((round % 2) * PAGES + page)).collect();
        let target = Peer { worker: SERVED.into(), incarnation: 1, link: link.to_owned() };
        let began = Instant::now();
        let tokens = PAGES * self.identity.layout.page_tokens;
        self.transfer.begin(Begin { handoff, targets: vec![target], tokens, pages });
        self.transfer.push(handoff, 0..self.identity.layout.layers, 0..PAGES);
        self.transfer.commit(handoff, Commit { first_token: 0 });
        let event = timeout(LIMIT, self.events.recv()).await.context("the other end does not answer")?;
        match event.context("the transfer has stopped")? {
            Event::SourceDone { outcome: Outcome::Landed, .. } => Ok(began.elapsed()),
            Event::SourceDone {
                outcome: Outcome::Refused(reason) | Outcome::Aborted(reason) | Outcome::Expired(reason),
                ..
            } => {
                bail!(reason)
            }
            other => bail!("unexpected {other:?}"),
        }
    }
}
