//! What a hand-off costs, beside moving the same bytes plainly.
//!
//! | rows      | what is moved                                                          | limit: the same pieces               |
//! |-----------|------------------------------------------------------------------------|--------------------------------------|
//! | `copy`    | 24 MiB in 1,536 blocks of 16 KiB, scattered over both pools            | moved plainly                        |
//! | `merged`  | the same bytes in neighbouring pages: runs of 512 KiB                  | moved plainly                        |
//! | `busy`    | `copy` while every core runs other work at the same priority           | `copy` on idle cores                 |
//! | `overhead`| 512 tokens of Llama-3.2-1B (16 MiB), finished layer by layer: the time from the last layer until the commit is acknowledged, or settled | the last layer, moved plainly as long after the one before, and the wake-ups |
//! | `hidden`  | the same in four chunks: the share of its transfer that compute hides  | all of it                            |
//!
//! *Plainly* is `memcpy` on one thread where both ends share memory, and blocking sockets, as many as a link has connections, where
//! they do not: without protocol, digest or acknowledgement per group. The *wake-ups* are that of a thread that sleeps, and,
//! but over `shm`, where the source settles by itself, those of a message there and back between two that do: no hand-off starts and ends with less, unless somebody polls. Limit and hand-off take turns in one run, five times; a row is
//! the median of the five. The target is a process of its own, but where the transport is for one process.

mod case;
mod pair;
mod plain;

use super::{report::Report, stats::Samples};
use anyhow::Context;
use case::Case;
use kv_transfer::{Config, TransportKind, UcxConfig};
use pair::{Pair, Pushes};
use plain::Plain;
use std::{
    hint::black_box,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

pub(super) use pair::serve;

/// Turns of limit and hand-off.
const TURNS: usize = 5;
/// Measurements in a turn, of which the median counts.
const EACH: usize = 20;
/// Time between two layers of `overhead`: 16 ms for the whole prompt, the pace of a fast accelerator.
const LAYER: Duration = Duration::from_millis(1);
/// Chunks of `hidden`, and the time between two layers of one: again 16 ms for the whole prompt.
const CHUNKS: u32 = 4;
const CHUNK_LAYER: Duration = Duration::from_micros(250);

/// A transport as it is measured.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// Last part of its rows' names.
    name: &'static str,
    transport: TransportKind,
    /// What UCX may use.
    ucx_tls: Option<&'static str>,
    /// Whether the limit is `memcpy`.
    shares_memory: bool,
}

const KINDS: [Kind; 5] = [
    Kind { name: "memory", transport: TransportKind::Memory, ucx_tls: None, shares_memory: true },
    Kind { name: "shm", transport: TransportKind::Shm, ucx_tls: None, shares_memory: true },
    Kind { name: "ucx-posix", transport: TransportKind::Ucx, ucx_tls: Some("posix"), shares_memory: true },
    Kind { name: "ucx-tcp", transport: TransportKind::Ucx, ucx_tls: Some("tcp"), shares_memory: false },
    Kind { name: "tcp", transport: TransportKind::Tcp, ucx_tls: None, shares_memory: false },
];

impl Kind {
    fn config(self, ucx_library: Option<&Path>) -> Config {
        let ucx = UcxConfig { library: ucx_library.map(Path::to_owned), tls: self.ucx_tls.map(str::to_owned) };
        Config { require: Some(self.transport), ucx, ..Config::default() }
    }
}

/// Measures every `handoff/` row that is wanted. A transport that this machine or this build lacks is skipped, and said so.
pub(super) fn run(report: &mut Report, ucx_library: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    for kind in KINDS {
        let wanted = |rows: &[&str]| rows.iter().any(|row| report.wants(&format!("handoff/{row}/{}", kind.name)));
        let cases = [
            (Case::Scattered, wanted(&["copy", "busy"])),
            (Case::Runs, wanted(&["merged"])),
            (Case::Prompt, wanted(&["overhead", "hidden"])),
        ];
        for (case, _) in cases.into_iter().filter(|(_, wanted)| *wanted) {
            let config = kind.config(ucx_library);
            if kind.transport == TransportKind::Ucx
                && let Err(why) = kv_transfer::survey(&config.ucx)
            {
                println!("handoff/*/{}: skipped: {why}", kind.name);
                break;
            }
            let measured = runtime.block_on(async {
                let mut pair = Pair::start(kind, case, config).await?;
                if let Some(why) = pair.warm_up().await? {
                    println!("handoff/*/{}: skipped: {why}", kind.name);
                    return Ok(false);
                }
                match case {
                    Case::Scattered => scattered(report, kind, &mut pair).await,
                    Case::Runs => runs(report, kind, &mut pair).await,
                    Case::Prompt => prompt(report, kind, &mut pair).await,
                }
                .map(|()| true)
            });
            if !measured.with_context(|| format!("hand off by {}", kind.name))? {
                break;
            }
        }
    }
    Ok(())
}

async fn scattered(report: &mut Report, kind: Kind, pair: &mut Pair) -> anyhow::Result<()> {
    let [copy, limit] = beside(kind, pair, Pushes::AtOnce).await?;
    let gbs = |samples: &Samples| Case::Scattered.bytes() as f64 / samples.median() / 1e3;
    report.row(&format!("handoff/copy/{}", kind.name), gbs(&copy), "GB/s", Some(gbs(&limit)))?;
    if report.wants(&format!("handoff/busy/{}", kind.name)) {
        let busy = {
            let _others = Busy::start();
            pair.measure(TURNS * EACH, Pushes::AtOnce).await?.told
        };
        report.row(&format!("handoff/busy/{}", kind.name), gbs(&busy), "GB/s", Some(gbs(&copy)))?;
    }
    Ok(())
}

async fn runs(report: &mut Report, kind: Kind, pair: &mut Pair) -> anyhow::Result<()> {
    let [copy, limit] = beside(kind, pair, Pushes::AtOnce).await?;
    let gbs = |samples: &Samples| Case::Runs.bytes() as f64 / samples.median() / 1e3;
    report.row(&format!("handoff/merged/{}", kind.name), gbs(&copy), "GB/s", Some(gbs(&limit)))
}

async fn prompt(report: &mut Report, kind: Kind, pair: &mut Pair) -> anyhow::Result<()> {
    // A layer is more than the smallest group, and at this pace none waits for the next.
    let layers = Case::Prompt.layout().layers;
    let mut plain = Plain::start(kind, pair.case(), layers - 1..layers).context("move the same plainly")?;
    let last_group = plain.measure(TURNS * EACH, LAYER)?.median();
    let asks = kind.transport != TransportKind::Shm;
    let wakes = plain::wakes(TURNS * EACH, LAYER, asks).context("wake threads")?.median();
    let bound = format!("the last group's {last_group:.1} us and {wakes:.1} us of waking");
    let paced = pair.measure(2 * TURNS * EACH, Pushes::Layers(LAYER)).await?.acked;
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let row = format!("handoff/overhead/{}/{name}", kind.name);
        report.bounded_row(&row, paced.quantile(share), "us", Some(last_group + wakes), Some(bound.clone()))?;
    }
    let copy = pair.measure(TURNS * EACH, Pushes::AtOnce).await?.acked;
    let chunked = pair.measure(TURNS * EACH, Pushes::Chunks(CHUNKS, CHUNK_LAYER)).await?.acked;
    let hidden = 1.0 - (chunked.median() / copy.median()).min(1.0);
    report.row(&format!("handoff/hidden/{}", kind.name), hidden, "share", Some(1.0))
}

/// Returns microseconds of hand-offs and of the same moved plainly, a median of each turn.
async fn beside(kind: Kind, pair: &mut Pair, pushes: Pushes) -> anyhow::Result<[Samples; 2]> {
    let layers = 0..pair.case().layout().layers;
    let mut plain = Plain::start(kind, pair.case(), layers).context("move the same plainly")?;
    let mut medians = [Samples::default(), Samples::default()];
    for _ in 0..TURNS {
        medians[1].extend([plain.measure(EACH, Duration::ZERO)?.median()]);
        medians[0].extend([pair.measure(EACH, pushes).await?.told.median()]);
    }
    Ok(medians)
}

/// Keeps every core busy until dropped.
struct Busy(&'static AtomicBool);

impl Busy {
    fn start() -> Self {
        static STOP: AtomicBool = AtomicBool::new(false);
        STOP.store(false, Ordering::Relaxed);
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            thread::spawn(|| {
                let mut work = 1_u64;
                while !STOP.load(Ordering::Relaxed) {
                    work = black_box(work.wrapping_mul(0x9E37_79B9_7F4A_7C15));
                }
            });
        }
        Self(&STOP)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
