//! From settings to the libraries' own `Config`s: the file's tables first, flags over them, checked once.

use crate::{
    model::Located,
    settings::{
        Adapters, CardLibraries, Common, Compute, Dialect, Door, EngineChoice, Exact, KvDtype, KvLoadFailure,
        LogFormat, Membership, Placement, Tables, Worker,
    },
};
use anyhow::{Context, anyhow, bail};
use cluster::EtcdDirectory;
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

/// Returns what telemetry needs; `default_log` is the filter when none is given.
pub(crate) fn telemetry(common: &Common, default_log: &str) -> telemetry::Config {
    telemetry::Config {
        log: common.log.clone().unwrap_or_else(|| default_log.to_owned()),
        log_format: match common.log_format {
            LogFormat::Text => telemetry::LogFormat::Text,
            LogFormat::Json => telemetry::LogFormat::Json,
        },
        otlp: common.otlp.clone(),
    }
}

/// Returns the engine's settings as far as `up` and worker processes share them.
pub(crate) fn engine(compute: &Compute, tables: &Tables) -> anyhow::Result<engine::Config> {
    let mut config: engine::Config = tables.config("engine")?;
    config.kv_bytes = compute.kv_memory.map(|memory| memory.0).or(config.kv_bytes);
    if let EngineChoice::Device(device) = compute.engine {
        config.device = device;
    }
    config.gpu_memory_utilization = compute.gpu_memory_utilization.unwrap_or(config.gpu_memory_utilization);
    config.tensor_parallel = compute.tensor_parallel.unwrap_or(config.tensor_parallel);
    config.exact = compute.exact.map_or(config.exact, |exact| exact == Exact::On);
    config.nan_guard |= compute.nan_guard;
    card_libraries(&compute.card_libraries, &mut config);
    config.kernel_cache = config.kernel_cache.or_else(|| Some(std::env::home_dir()?.join(".cache/baton/kernels")));
    config.threads = compute.threads.or(config.threads);
    config.kv_dtype = match compute.kv_dtype {
        None => config.kv_dtype,
        Some(KvDtype::Auto) => None,
        Some(KvDtype::F32) => Some(kv_cache::KvDtype::F32),
        Some(KvDtype::Bf16) => Some(kv_cache::KvDtype::Bf16),
        Some(KvDtype::F16) => Some(kv_cache::KvDtype::F16),
        Some(KvDtype::Fp8) => Some(kv_cache::KvDtype::Fp8),
        Some(KvDtype::Int8) => Some(kv_cache::KvDtype::Int8),
    };
    Ok(config)
}

/// Notes in `config` where libraries are said to be.
pub(crate) fn card_libraries(libraries: &CardLibraries, config: &mut engine::Config) {
    config.nccl_library = libraries.nccl_library.clone().or(config.nccl_library.take());
    config.nvrtc_library = libraries.nvrtc_library.clone().or(config.nvrtc_library.take());
    config.cublaslt_library = libraries.cublaslt_library.clone().or(config.cublaslt_library.take());
}

/// Returns the engine's settings of a worker process.
pub(crate) fn worker_engine(worker: &Worker, tables: &Tables) -> anyhow::Result<engine::Config> {
    let mut config = engine(&worker.compute, tables)?;
    config.max_model_len = worker.max_model_len.or(config.max_model_len);
    config.token_budget = worker.token_budget.unwrap_or(config.token_budget);
    config.max_sequences = worker.max_sequences.unwrap_or(config.max_sequences);
    Ok(config)
}

/// Returns the settings of a prefill worker that takes free ports of the loopback.
pub(crate) fn prefill(
    tables: &Tables,
    located: &Located,
    adapters: &Adapters,
    name: Option<String>,
) -> anyhow::Result<prefill_worker::Config> {
    let table: prefill_worker::Config = tables.config("prefill-worker")?;
    let mut config = prefill_worker::Config { name, model_name: located.name.clone(), ..table };
    config.adapters.extend(named(adapters, located)?);
    config.max_lora_rank = adapters.max_lora_rank.unwrap_or(config.max_lora_rank);
    config.validate().context("[prefill-worker]")?;
    Ok(config)
}

/// Returns the settings of a decode worker that takes free ports of the loopback.
pub(crate) fn decode(
    tables: &Tables,
    located: &Located,
    adapters: &Adapters,
    name: Option<String>,
) -> anyhow::Result<decode_worker::Config> {
    let table: decode_worker::Config = tables.config("decode-worker")?;
    let mut config = decode_worker::Config { name, model_name: located.name.clone(), ..table };
    config.adapters.extend(named(adapters, located)?);
    config.max_lora_rank = adapters.max_lora_rank.unwrap_or(config.max_lora_rank);
    config.validate().context("[decode-worker]")?;
    Ok(config)
}

/// Returns the adapters to begin with; every name must mean one thing.
fn named(adapters: &Adapters, located: &Located) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut named = BTreeMap::new();
    for (name, dir) in &adapters.lora {
        if *name == located.name || named.insert(name.clone(), dir.clone()).is_some() {
            bail!("--lora {name}={}: the name {name} is taken", dir.display());
        }
    }
    Ok(named)
}

/// Returns the settings of a prefill worker process.
pub(crate) fn prefill_process(
    worker: &Worker,
    tables: &Tables,
    located: &Located,
) -> anyhow::Result<prefill_worker::Config> {
    check_advertised(worker)?;
    let mut config = prefill(tables, located, &worker.adapters, worker.membership.name.clone())?;
    config.listen = worker.listen;
    config.advertise = reached_at(worker);
    config.drain_timeout_ms = worker.drain_timeout.as_millis() as u64;
    link(worker, &mut config.transfer);
    check_links("prefill-worker", worker.cluster_token_file.is_some(), &config.transfer)?;
    Ok(config)
}

/// Returns the settings of a decode worker process.
pub(crate) fn decode_process(
    worker: &Worker,
    tables: &Tables,
    located: &Located,
) -> anyhow::Result<decode_worker::Config> {
    check_advertised(worker)?;
    let mut config = decode(tables, located, &worker.adapters, worker.membership.name.clone())?;
    config.listen = worker.listen;
    config.advertise = reached_at(worker);
    config.drain_timeout_ms = worker.drain_timeout.as_millis() as u64;
    link(worker, &mut config.transfer);
    check_links("decode-worker", worker.cluster_token_file.is_some(), &config.transfer)?;
    Ok(config)
}

/// Refuses files that no link can be made with, before weights load. The settings stand in `[table.transfer]`, but for a token's
/// that was given as a flag.
pub(crate) fn check_links(table: &str, token_flag: bool, transfer: &kv_transfer::Config) -> anyhow::Result<()> {
    transfer.check_files().map_err(|error| match error {
        kv_transfer::Error::ClusterToken { file, reason } if token_flag => {
            anyhow!("--cluster-token-file {}: {reason}", file.display())
        }
        kv_transfer::Error::ClusterToken { file, reason } => {
            anyhow!("[{table}.transfer] cluster_token_file {}: {reason}", file.display())
        }
        kv_transfer::Error::Tls { field, file, reason } => {
            anyhow!("[{table}.transfer.tls] {field} {}: {reason}", file.display())
        }
        other => other.into(),
    })
}

/// Routers reach the worker at its advertised host; its own door, which is in this process, at what it listens on.
fn reached_at(worker: &Worker) -> Option<String> {
    worker.membership.advertise.clone().filter(|_| worker.http.http.is_none())
}

fn link(worker: &Worker, transfer: &mut kv_transfer::Config) {
    transfer.listen = worker.link_listen.unwrap_or_else(|| SocketAddr::new(worker.listen.ip(), 0));
    transfer.advertise = worker.membership.advertise.clone().or(transfer.advertise.take());
    transfer.require = worker.transport.map(Into::into).or(transfer.require);
    transfer.ucx.library = worker.ucx.ucx_library.clone().or(transfer.ucx.library.take());
    transfer.ucx.tls = worker.ucx.ucx_tls.clone().or(transfer.ucx.tls.take());
    transfer.cluster_token_file = worker.cluster_token_file.clone().or(transfer.cluster_token_file.take());
}

/// Refuses to tell others an address that only means "all of this machine's".
fn check_advertised(worker: &Worker) -> anyhow::Result<()> {
    let link = worker.link_listen.unwrap_or(worker.listen);
    let everywhere = worker.listen.ip().is_unspecified() || link.ip().is_unspecified();
    if everywhere && worker.membership.advertise.is_none() {
        bail!(
            "--listen {}: others cannot reach that address; give the host they should use by --advertise",
            worker.listen
        );
    }
    Ok(())
}

/// Returns the settings of a router that listens on `address`.
pub(crate) fn router(
    tables: &Tables,
    located: &Located,
    placement: Placement,
    runtime_lora: bool,
    dialect: &Dialect,
    door: Option<&Door>,
) -> anyhow::Result<router::Config> {
    let mut config: router::Config = tables.config("router")?;
    if let Some(door) = door {
        config.api_keys.extend(door.api_keys.iter().cloned());
        config.api_key_file = door.api_key_file.clone().or(config.api_key_file);
        let files = door.tls_cert.clone().zip(door.tls_key.clone());
        config.tls = files.map(|(cert, key)| router::TlsFiles { cert, key }).or(config.tls);
        if !door.cors_origins.is_empty() {
            config.cors_origins.clone_from(&door.cors_origins);
        }
    }
    config.runtime_lora |= runtime_lora;
    config.tool_call_parser = dialect.tool_call_parser.unwrap_or(config.tool_call_parser);
    config.reasoning_parser = dialect.reasoning_parser.unwrap_or(config.reasoning_parser);
    config.embedding_pooling = dialect.embedding_pooling.unwrap_or(config.embedding_pooling);
    config.model_dir = located.path.clone();
    config.model_name = located.name.clone();
    config.placement = placement.policy();
    config.validate().map_err(|problem| anyhow!("[router]: {problem}"))?;
    Ok(config)
}

/// Returns the settings of a worker's own door.
pub(crate) fn door(
    worker: &Worker,
    tables: &Tables,
    located: &Located,
    prefill: bool,
) -> anyhow::Result<router::Config> {
    let http = &worker.http;
    let mut config = router(tables, located, Placement::Local, false, &http.dialect, Some(&http.door))?;
    config.kv_transfer = Some(router::KvTransfer {
        peers: http.kv_peers.clone(),
        required: http.kv_load_failure == KvLoadFailure::Fail,
        lease: http.kv_lease,
        first_token_only: prefill,
    });
    Ok(config)
}

/// Returns the directory over etcd. It connects by itself, also later.
pub(crate) fn directory(membership: &Membership) -> anyhow::Result<EtcdDirectory> {
    if membership.etcd.is_empty() {
        bail!(
            "--etcd is missing: give the URL of the etcd that joins this cluster, such as http://127.0.0.1:2379 \
             (`baton up` runs a whole cluster without one; a worker with --http runs alone)"
        );
    }
    EtcdDirectory::connect(membership.etcd.clone(), &membership.cluster).context("--etcd")
}
