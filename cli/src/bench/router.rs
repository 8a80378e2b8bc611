//! What the router costs, beside a server that answers without thinking.
//!
//! Three kinds of process share the machine, as in a cluster: this one holds the client and two mock workers (a prefill and a
//! decode worker that answer at once, through the workers' own `attach`); a child process is the router, with the real
//! tokenizer, template and detokeniser of the bundled model; another child is the plain server that gives the limits. Both
//! children answer the same requests of the same client. Saturated throughput would measure client and mocks as well, so what
//! counts is the children's own CPU time.

mod child;
mod client;
mod mock;
mod plain;

use super::{cpu_time, report::Report, stats::Samples};
use anyhow::Context;
use child::Child;
use client::{Client, Load};
use mock::Mock;
use std::{net::SocketAddr, time::Duration};

/// Tokens of a short answer.
const SHORT: u32 = 8;
/// Tokens of a stream: three seconds of it.
const STREAM: u32 = 300;
/// Streams at once, and the time between two tokens of one.
const STREAMS: usize = 64;
const PACE: Duration = Duration::from_millis(10);

/// Becomes the router.
pub(super) fn serve(workers: &[SocketAddr]) -> anyhow::Result<()> {
    child::router(workers)
}

/// Becomes the plain server.
pub(super) fn serve_plain() -> anyhow::Result<()> {
    plain::serve(PACE)
}

/// Measures every `router/` row that is wanted.
pub(super) fn run(report: &mut Report) -> anyhow::Result<()> {
    if !report.wants("router/") {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let plain = Child::plain().await?;
        if report.wants("router/added_latency") || report.wants("router/cpu_us_per_request/") {
            let mocks = [Mock::start("prefill-0", None).await?, Mock::start("decode-0", None).await?];
            let router = Child::router(&mocks).await?;
            latency(report, &router, &plain).await.context("measure latency")?;
            per_request(report, &router, &plain).await.context("measure CPU per request")?;
        }
        if report.wants("router/cpu_us_per_chunk/") {
            let mocks = [Mock::start("prefill-0", None).await?, Mock::start("decode-0", Some(PACE)).await?];
            let router = Child::router(&mocks).await?;
            per_chunk(report, &router, &plain).await.context("measure CPU per chunk")?;
        }
        Ok(())
    })
}

/// One connection, one request after another.
async fn latency(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    let load = Load { connections: 1, requests: 2_000, tokens: SHORT, stream: false };
    let [routed, direct] = both(&load, router, plain).await?;
    let added = |share: f64| routed.latency_us.quantile(share) - direct.latency_us.quantile(share);
    report.row("router/added_latency_us/c1", added(0.5), "us", Some(direct.latency_us.median()))?;
    report.row("router/added_latency_p99_us/c1", added(0.99), "us", Some(direct.latency_us.quantile(0.99)))
}

/// 32 connections, each one request after another.
async fn per_request(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    let load = Load { connections: 32, requests: 20_000, tokens: SHORT, stream: false };
    let [routed, direct] = both(&load, router, plain).await?;
    let per_request = |measured: &Measured| measured.cpu.as_secs_f64() * 1e6 / load.requests as f64;
    report.row("router/cpu_us_per_request/c32", per_request(&routed), "us", Some(per_request(&direct)))?;
    report.row("router/requests_per_s/c32", routed.per_second, "1/s", Some(direct.per_second))
}

/// Streams whose tokens come one by one: each is a wake-up, and nothing can be merged.
async fn per_chunk(report: &mut Report, router: &Child, plain: &Child) -> anyhow::Result<()> {
    let load = Load { connections: STREAMS, requests: STREAMS, tokens: STREAM, stream: true };
    let [routed, direct] = both(&load, router, plain).await?;
    let per_chunk = |measured: &Measured| measured.cpu.as_secs_f64() * 1e6 / measured.chunks as f64;
    report.row("router/cpu_us_per_chunk/paced64", per_chunk(&routed), "us", Some(per_chunk(&direct)))?;
    let gap = |measured: &Measured| measured.gap_us.quantile(0.99);
    report.row("router/chunk_gap_p99_us/paced64", gap(&routed), "us", Some(gap(&direct)))
}

/// What one server did under a load.
struct Measured {
    latency_us: Samples,
    gap_us: Samples,
    chunks: usize,
    per_second: f64,
    cpu: Duration,
}

/// Puts the same load on both servers, after warming each up with a tenth of it.
async fn both(load: &Load, router: &Child, plain: &Child) -> anyhow::Result<[Measured; 2]> {
    Ok([measure(load, router).await?, measure(load, plain).await?])
}

async fn measure(load: &Load, child: &Child) -> anyhow::Result<Measured> {
    let client = Client::new(child.address);
    let warm_up = Load { requests: (load.requests / 10).max(load.connections), tokens: SHORT, ..*load };
    client.run(&warm_up).await?;
    let before = cpu_time::of(child.id())?;
    let done = client.run(load).await?;
    let cpu = cpu_time::of(child.id())?.saturating_sub(before);
    let per_second = load.requests as f64 / done.took.as_secs_f64();
    Ok(Measured { latency_us: done.latency_us, gap_us: done.gap_us, chunks: done.chunks, per_second, cpu })
}
