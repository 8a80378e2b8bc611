//! `baton bench`: what Baton does on this machine, beside what the machine could do.
//!
//! Every row has its own limit, measured in the same run: a figure without one says little on a machine that nobody knows. Rows
//! are independent; `--only PREFIX` chooses among them. The table goes to stdout as it grows, the rows to `target/bench.jsonl`.
//! With `--url` it is something else: load on an endpoint that runs already ([`load`]). With `--profile` it measures a model's steps
//! for timed engines ([`profile`]).

mod cpu_time;
mod engine;
mod handoff;
mod load;
mod machine;
mod memory;
mod placement;
mod profile;
mod report;
mod router;
mod stats;

use crate::settings::{Bench as Settings, BenchServer};
use anyhow::Context;
use report::Report;
use std::path::Path;

/// Measures what `settings` ask for.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    if let Some(what) = settings.serve {
        return match what {
            BenchServer::Router => router::serve(&settings.workers),
            BenchServer::Plain => router::serve_plain(),
            BenchServer::Target => handoff::serve(&settings.only, settings.ucx_library.as_deref()),
        };
    }
    if let Some(url) = &settings.load.url {
        return load::run(url, &settings.load);
    }
    if let Some(path) = &settings.profile {
        return profile::run(path, &settings.profile_model(), settings.threads, settings.sharing);
    }
    if cfg!(debug_assertions) {
        eprintln!("note: this is a debug build, its figures mean little; `make bench` builds a release");
    }
    let mut report = Report::create(Path::new("target/bench.jsonl"), &settings.only)?;
    machine::run(&mut report).context("bench machine")?;
    engine::run(&mut report).context("bench engine")?;
    handoff::run(&mut report, settings.ucx_library.as_deref()).context("bench handoff")?;
    placement::run(&mut report).context("bench placement")?;
    router::run(&mut report, settings.soak).context("bench router")?;
    report.finish()
}
