//! What a hand-off costs, beside moving the same bytes plainly.
//!
//! One hand-off carries 512 tokens of a 1 B model (16 MiB in blocks of 32 KiB) between scattered pages. *Overhead* is what a
//! client could feel: layers finish one by one, as in a prefill, and the clock runs from the last one until the commit is
//! acknowledged. *At once* pushes every layer in one go, so nothing is hidden. The limits move the same bytes by `memcpy` (memory)
//! and by blocking sockets over loopback (tcp), without protocol, digest or acknowledgement per group.

mod pair;
mod plain;

use super::{report::Report, stats::Samples};
use anyhow::Context;
use kv_cache::{KvDtype, PageId, PageLayout};
use kv_transfer::TransportKind;
use pair::Pair;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::time::Duration;

/// Tokens of one hand-off.
const TOKENS: u32 = 512;
/// Time between two layers: 16 ms for the whole prompt, the pace of a fast accelerator.
const LAYER: Duration = Duration::from_millis(1);
const PACED_ROUNDS: usize = 300;
const AT_ONCE_ROUNDS: usize = 200;

/// The KV pages of Llama-3.2-1B; the pool is eight hand-offs large, so that blocks rarely come from a cache.
fn layout() -> PageLayout {
    PageLayout {
        layers: 16,
        page_tokens: 16,
        kv_heads: 8,
        key_dim: 64,
        value_dim: 64,
        dtype: KvDtype::Bf16,
        pages: 256,
    }
}

/// Measures every `handoff/` row that is wanted.
pub(super) fn run(report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("handoff/") {
        return Ok(());
    }
    let bytes = layout().page_bytes() * layout().pages_for(TOKENS as usize);
    let limits = [
        (TransportKind::Memory, "memory", plain::memcpy_us(&layout(), bytes)),
        (TransportKind::Tcp, "tcp", plain::tcp_us(bytes).context("send plainly over loopback")?),
    ];
    for (_, name, limit) in limits {
        report.row(&format!("handoff/plain_copy_us/{name}"), limit, "us", None)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    for (kind, name, limit) in limits {
        runtime.block_on(transport(report, kind, name, limit)).with_context(|| format!("hand off by {name}"))?;
    }
    Ok(())
}

async fn transport(report: &mut Report, kind: TransportKind, name: &str, limit: f64) -> anyhow::Result<()> {
    let mut pair = Pair::start(kind, layout()).await?;
    let mut pages = Pages::new(&pair.layout);
    // Every page once: links are opened, memory is faulted in, and what lands is what was sent.
    for _ in 0..pair.layout.pages as usize / pages.each {
        let (from, to) = pages.next();
        pair.hand_off(&from, &to, None).await?;
        pair.check(&from, &to)?;
    }

    let mut paced = Samples::default();
    let mut at_once = Samples::default();
    for _ in 0..PACED_ROUNDS {
        let (from, to) = pages.next();
        paced.extend([pair.hand_off(&from, &to, Some(LAYER)).await?.overhead.as_secs_f64() * 1e6]);
    }
    for _ in 0..AT_ONCE_ROUNDS {
        let (from, to) = pages.next();
        at_once.extend([pair.hand_off(&from, &to, None).await?.whole.as_secs_f64() * 1e6]);
    }
    pair.stop();
    report.row(&format!("handoff/overhead_p50_us/{name}"), paced.median(), "us", Some(limit))?;
    report.row(&format!("handoff/overhead_p99_us/{name}"), paced.quantile(0.99), "us", Some(limit))?;
    report.row(&format!("handoff/at_once_p50_us/{name}"), at_once.median(), "us", Some(limit))?;
    report.row(&format!("handoff/at_once_p99_us/{name}"), at_once.quantile(0.99), "us", Some(limit))
}

/// Deals out pages in a random order that is the same in every run.
struct Pages {
    each: usize,
    order: [Vec<PageId>; 2],
    at: usize,
}

impl Pages {
    fn new(layout: &PageLayout) -> Self {
        let mut random = StdRng::seed_from_u64(1);
        let mut shuffled = || {
            let mut pages: Vec<_> = (0..layout.pages).map(PageId).collect();
            pages.shuffle(&mut random);
            pages
        };
        Self { each: layout.pages_for(TOKENS as usize), order: [shuffled(), shuffled()], at: 0 }
    }

    /// Returns the pages of the next hand-off, at the source and at the target.
    fn next(&mut self) -> (Vec<PageId>, Vec<PageId>) {
        let range = self.at..self.at + self.each;
        self.at = range.end % self.order[0].len();
        (self.order[0][range.clone()].to_vec(), self.order[1][range].to_vec())
    }
}
