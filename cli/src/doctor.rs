//! `baton doctor`: which cards there are and what they take, which ways between members work on this host, how fast, and what is wrong with
//! the others.
//!
//! Three steps, each on its own: [`facts`] are read from the system and from UCX, [`measure`] moves pages between two processes
//! (or two hosts) by every transport, and [`findings`] says what follows from both. Only the last decides anything.

mod facts;
mod findings;
mod measure;

use crate::settings::{Doctor as Settings, Tables};
use anyhow::{Context, bail};
use engine::cards::{Part, Survey};
use facts::Facts;
use findings::{Finding, Health, Path};
use kv_transfer::{Config, TransportKind};
use measure::Measured;
use serde::Serialize;
use std::ffi::OsString;

/// What is told with `--json`.
#[derive(Debug, Serialize)]
struct Told<'a> {
    facts: &'a Facts,
    paths: &'a [Finding],
}

/// Examines this host as `settings` ask, or serves a doctor elsewhere.
pub(crate) fn run(settings: &Settings, tables: &Tables) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("start the runtime")?;
    let config = transfer(settings, tables)?;
    if let Some(listen) = settings.listen {
        return runtime.block_on(measure::serve(Config { listen, ..config }));
    }
    let mut engine: engine::Config = tables.config("engine")?;
    crate::config::card_libraries(&settings.card_libraries, &mut engine);
    let pool_bytes = settings.kv_memory.map(|memory| memory.0);
    let facts = Facts::gather(std::path::Path::new("/"), &config.ucx, &engine, pool_bytes);
    let measured: Vec<Measured> =
        runtime.block_on(measure::paths(settings.peer.as_deref(), &config, &passed_on(settings)));
    let paths = findings::of(&facts, &measured, settings.peer.is_some());
    if settings.json {
        let told = Told { facts: &facts, paths: &paths };
        println!("{}", serde_json::to_string_pretty(&told).context("write JSON")?);
    } else {
        print(&facts, &paths);
    }
    let required = settings.transport.map(TransportKind::from);
    if required == Some(TransportKind::Cuda) {
        bail!(
            "transport cuda is required, and only workers with an engine on a card try it: one with --transport cuda says why where it cannot be"
        );
    }
    match paths.iter().find(|finding| Some(finding.path.kind()) == required && finding.health == Health::Unusable) {
        Some(finding) => bail!("transport {} is required and cannot be used: {}", finding.path, finding.says),
        None => Ok(()),
    }
}

/// Returns what a worker with these settings would do.
fn transfer(settings: &Settings, tables: &Tables) -> anyhow::Result<Config> {
    let mut config = tables.config::<prefill_worker::Config>("prefill-worker")?.transfer;
    if config == Config::default() {
        config = tables.config::<decode_worker::Config>("decode-worker")?.transfer;
    }
    config.require = settings.transport.map(Into::into);
    config.ucx.library = settings.ucx.ucx_library.clone().or(config.ucx.library);
    config.ucx.tls = settings.ucx.ucx_tls.clone().or(config.ucx.tls);
    config.cluster_token_file = settings.cluster_token_file.clone().or(config.cluster_token_file);
    Ok(config)
}

/// Returns the arguments that tell another doctor the same.
fn passed_on(settings: &Settings) -> Vec<OsString> {
    let Settings { config, cluster_token_file, ucx, .. } = settings;
    let files =
        [("--config", config), ("--cluster-token-file", cluster_token_file), ("--ucx-library", &ucx.ucx_library)];
    let files = files.into_iter().filter_map(|(flag, file)| Some((flag, file.clone()?.into_os_string())));
    let tls = ucx.ucx_tls.clone().map(|tls| ("--ucx-tls", tls.into()));
    files.chain(tls).flat_map(|(flag, value)| [flag.into(), value]).collect()
}

fn print(facts: &Facts, paths: &[Finding]) {
    match &facts.ucx {
        Ok(ucx) => {
            let (major, minor, release) = ucx.version;
            println!("UCX            {major}.{minor}.{release} ({})", ucx.library);
            println!("  transports   {}", ucx.resources.join(" "));
        }
        Err(reason) => println!("UCX            none: {reason}"),
    }
    if facts.devices.is_empty() {
        println!("RDMA devices   none");
    }
    for device in &facts.devices {
        println!("RDMA device    {device}");
    }
    facts.cards.iter().for_each(print_cards);
    println!("locked memory  {}", facts.locked);
    println!("huge pages     {}", facts.huge_pages);
    println!();
    println!("{:<6} {:<9} {:>7} {:>9}  finding", "path", "state", "GB/s", "ms/16MiB");
    for Finding { path, health, gb_per_s, milliseconds, says } in paths {
        let figure = |value: &Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        println!("{path:<6} {health:<9} {:>7} {:>9}  {says}", figure(gb_per_s), figure(milliseconds));
    }
}

fn print_cards(survey: &Survey) {
    let Survey { driver, cards, nvrtc, nccl, cublaslt, nvml } = survey;
    let part = |name: &str, part: &Part| match part {
        Part::Found(what) => println!("{name:<14} {what}"),
        Part::Missing(why) => println!("{name:<14} none: {why}"),
    };
    part("NVIDIA driver", driver);
    cards.iter().for_each(|card| println!("  card         {card}"));
    // Without a driver nobody misses the rest.
    if let Part::Found(_) = driver {
        let parts = [("NVRTC", nvrtc), ("NCCL", nccl), ("cuBLASLt", cublaslt), ("NVML", nvml)];
        parts.into_iter().for_each(|(name, found)| part(name, found));
    }
}

impl Path {
    /// Returns the transport that it stands for.
    fn kind(self) -> TransportKind {
        match self {
            Self::Shm => TransportKind::Shm,
            Self::Ucx => TransportKind::Ucx,
            Self::Tcp => TransportKind::Tcp,
        }
    }
}
