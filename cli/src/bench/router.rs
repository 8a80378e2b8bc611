//! What the router costs, beside a server that answers without thinking.
//!
//! Three kinds of process share the machine, as in a cluster: this one holds the client and four mock workers (two prefill and two
//! decode workers that answer at once, through the workers' own `attach`, and report the pages of the prompts they saw); a child
//! process is the router, with the real tokenizer, template and detokeniser of the bundled model; another child is the plain
//! server that gives the limits. Both children answer the same requests of the same client. Saturated throughput would
//! measure client and mocks as well, so what counts is the children's own CPU time.

mod child;
mod client;
mod mock;
mod plain;
mod prompts;

use super::{cpu_time, memory, report::Report, stats::Samples};
use anyhow::Context;
use child::Child;
use client::{Client, Load};
use mock::Mocks;
use prompts::Length;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Tokens of a short answer.
const SHORT: u32 = 8;
/// Tokens of a stream: five seconds of it.
const STREAM: u32 = 500;
/// Streams at once, and the time between two tokens of one.
const STREAMS: usize = 64;
const PACE: Duration = Duration::from_millis(10);
/// Streams that are only held open, and the time between two tokens of one: longer than the measurement.
const OPEN_STREAMS: usize = 10_000;
const NEVER: Duration = Duration::from_secs(600);
/// Rounds of the closed loops, router and plain server in turns; their medians count.
const ROUNDS: usize = 3;
/// One batch of long prompts that fill the caches.
const SOAK_REQUESTS: usize = 2_000;

/// Becomes the router.
pub(super) fn serve(workers: &[SocketAddr]) -> anyhow::Result<()> {
    child::router(workers)
}

/// Becomes the plain server.
pub(super) fn serve_plain() -> anyhow::Result<()> {
    plain::serve(PACE)
}

/// Measures every `router/` row that is wanted. Caches are filled for as long as `soak`.
pub(super) fn run(report: &mut Report, soak: Duration) -> anyhow::Result<()> {
    if !report.wants("router/") {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let plain = Child::plain().await?;
        if report.wants("router/added_latency") || report.wants("router/cpu_us_per_request/") {
            let mocks = Mocks::start(None).await?;
            let router = Child::router(&mocks).await?;
            latency(report, &router, &plain).await.context("measure latency")?;
            per_request(report, &router, &plain).await.context("measure CPU per request")?;
        }
        if report.wants("router/cpu_us_per_chunk/") {
            let mocks = Mocks::start(Some(PACE)).await?;
            let router = Child::router(&mocks).await?;
            per_chunk(report, &router, &plain).await.context("measure CPU per chunk")?;
        }
        if report.wants("router/memory/idle") || report.wants("router/memory/streams") {
            open_streams(report).await.context("measure the memory of open streams")?;
        }
        if report.wants("router/memory/prompts") {
            prompts(report, soak).await.context("measure the memory of prompts")?;
        }
        Ok(())
    })
}

/// One connection, one request after another.
async fn latency(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    if !report.wants("router/added_latency") {
        return Ok(());
    }
    let load = Load { connections: 1, requests: 3_000, prompt: Length::Short, tokens: SHORT, stream: false };
    let rounds = both(&load, router, plain).await?;
    for (share, name) in [(0.5, "router/added_latency_us/c1/p50"), (0.99, "router/added_latency_us/c1/p99")] {
        let at = |measured: &Measured| measured.latency_us.quantile(share);
        report.row(name, median(&rounds, |[r, p]| at(r) - at(p)), "us", Some(median(&rounds, |[_, p]| at(p))))?;
    }
    Ok(())
}

/// 32 connections, each one request after another.
async fn per_request(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    for (prompt, name, requests) in [(Length::Short, "short", 15_000), (Length::Long, "16KiB", 6_000)] {
        let row = format!("router/cpu_us_per_request/{name}");
        if !report.wants(&row) {
            continue;
        }
        let load = Load { connections: 32, requests, prompt, tokens: SHORT, stream: false };
        let rounds = both(&load, router, plain).await?;
        let cpu = |measured: &Measured| measured.cpu.as_secs_f64() * 1e6 / requests as f64;
        report.row(&row, median(&rounds, |[r, _]| cpu(r)), "us", Some(median(&rounds, |[_, p]| cpu(p))))?;
        let rate = [0, 1].map(|which| median(&rounds, |round| round[which].per_second));
        report.row(&format!("router/requests_per_s/{name}"), rate[0], "1/s", Some(rate[1]))?;
    }
    Ok(())
}

/// Streams whose tokens come one by one: nothing can be merged.
async fn per_chunk(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    let load = Load { connections: STREAMS, requests: STREAMS, prompt: Length::Short, tokens: STREAM, stream: true };
    let rounds = both(&load, router, plain).await?;
    let cpu = |measured: &Measured| measured.cpu.as_secs_f64() * 1e6 / measured.chunks as f64;
    let limit = median(&rounds, |[_, p]| cpu(p));
    report.row("router/cpu_us_per_chunk/paced", median(&rounds, |[r, _]| cpu(r)), "us", Some(limit))?;
    let gap = |measured: &Measured| measured.gap_us.quantile(0.99);
    let limit = median(&rounds, |[_, p]| gap(p));
    report.row("router/chunk_gap_p99_us/paced", median(&rounds, |[r, _]| gap(r)), "us", Some(limit))
}

/// A router that has done nothing yet, and one with many streams open.
async fn open_streams(report: &mut Report) -> anyhow::Result<()> {
    let mocks = Mocks::start(Some(NEVER)).await?;
    let router = Child::router(&mocks).await?;
    let idle = memory::of(router.id())?;
    report.row("router/memory/idle", idle.now as f64 / 1e6, "MB", None)?;
    if !report.wants("router/memory/streams") {
        return Ok(());
    }
    let streams = Client::new(router.address).open_streams(OPEN_STREAMS).await?;
    let grown = memory::of(router.id())?.peak - idle.now;
    report.row("router/memory/streams", grown as f64 / 1e3 / streams.len() as f64, "kB/stream", None)
}

/// Long prompts, none of which comes twice: what the router keeps of them is bounded, so the second half adds nothing.
async fn prompts(report: &mut Report, soak: Duration) -> anyhow::Result<()> {
    let mocks = Mocks::start(None).await?;
    let router = Child::router(&mocks).await?;
    let client = Client::new(router.address);
    let idle = memory::of(router.id())?.now;
    let (began, mut half, mut seed) = (Instant::now(), None, 0);
    while began.elapsed() < soak {
        let load =
            Load { connections: 32, requests: SOAK_REQUESTS, prompt: Length::Long, tokens: SHORT, stream: false };
        client.run_from(&load, seed).await?;
        seed += load.connections as u64;
        if began.elapsed() > soak / 2 {
            half.get_or_insert(memory::of(router.id())?.now);
        }
    }
    let held = memory::of(router.id())?.now;
    report.row("router/memory/prompts", (held - idle) as f64 / 1e6, "MB", None)?;
    let grown = held as f64 - half.context("the soak is too short")? as f64;
    report.row("router/memory/prompts_second_half", grown / 1e6, "MB", None)
}

/// What one server did under a load.
struct Measured {
    latency_us: Samples,
    gap_us: Samples,
    chunks: usize,
    per_second: f64,
    cpu: Duration,
}

/// Puts the same load on both servers in turns, after warming each up with a tenth of it.
async fn both(load: &Load, router: &Child, plain: &Child) -> anyhow::Result<Vec<[Measured; 2]>> {
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        rounds.push([measure(load, router, round).await?, measure(load, plain, round).await?]);
    }
    Ok(rounds)
}

fn median(rounds: &[[Measured; 2]], value: impl Fn(&[Measured; 2]) -> f64) -> f64 {
    rounds.iter().map(value).collect::<Samples>().median()
}

async fn measure(load: &Load, child: &Child, round: usize) -> anyhow::Result<Measured> {
    let client = Client::new(child.address);
    // Long prompts are new in every round.
    let seed = (2 * round * load.connections) as u64;
    let warm_up = Load { requests: (load.requests / 10).max(load.connections), tokens: SHORT, ..*load };
    client.run_from(&warm_up, seed).await?;
    let before = cpu_time::of(child.id())?;
    let done = client.run_from(load, seed + load.connections as u64).await?;
    let cpu = cpu_time::of(child.id())?.saturating_sub(before);
    let per_second = load.requests as f64 / done.took.as_secs_f64();
    Ok(Measured { latency_us: done.latency_us, gap_us: done.gap_us, chunks: done.chunks, per_second, cpu })
}
