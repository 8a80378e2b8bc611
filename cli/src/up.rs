//! `baton up`: router, workers and directory in this process.
//!
//! The parts are the ones that separate processes run; only the directory is in memory, the model is loaded once, and the
//! cores are shared out among the workers.

use crate::{
    config,
    engine::Kind,
    listen, model,
    model::Located,
    settings::{Bytes, Placement, Tables, Up},
    speculation::{self, Guesser},
    worker::STALL,
};
use anyhow::{Context, bail};
use cluster::{Directory, MemoryDirectory};
use engine::{Model, ModelInfo};
use kv_cache::PageLayout;
use kv_transfer::TransportKind;
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use telemetry::Health;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Runs until `shutdown`, then drains: the router first, which ends what the workers have to do.
///
/// # Errors
/// The first error of any part; the others are stopped then.
pub(crate) async fn run(up: &Up, tables: &Tables, shutdown: CancellationToken) -> anyhow::Result<()> {
    let began = Instant::now();
    let located = model::locate(&up.model)?;
    let plan = Plan::new(up, tables, &located)?;
    let listener = listen::bind("--listen", up.listen).await?;
    let address = listener.local_addr().context("read the bound address")?;
    let loading = async {
        let model = model::load(&located, up.compute.quantize).await?;
        anyhow::Ok((model, speculation::load(&up.speculation, plan.draft.as_ref()).await?))
    };
    let Some(loaded) = shutdown.run_until_cancelled(loading).await.transpose()? else { return Ok(()) };
    let (model, guesser) = loaded;

    let info = model.info().clone();
    // Nobody but its engines keeps the model: on a card they let go of its weights.
    let mut cluster = Cluster::start(plan.clone(), model, guesser, listener)?;
    let parts = cluster.healths.clone();
    tokio::select! {
        // All arms are cancel safe: the first polls, the second keeps what has ended in the set.
        () = ready(&parts) => {
            let welcome = Welcome { address, located: &located, info: &info, plan: &plan, layout: &cluster.layout };
            println!("{}", welcome.text(began.elapsed()));
        }
        ended = cluster.part_ended() => return cluster.stop(ended).await,
        () = shutdown.cancelled() => {}
    }
    tokio::select! {
        ended = cluster.part_ended() => cluster.stop(ended).await,
        () = shutdown.cancelled() => cluster.drain().await,
    }
}

/// Every part's settings, checked.
#[derive(Clone, Debug)]
struct Plan {
    kind: Kind,
    /// The model that drafts, where one does.
    draft: Option<Located>,
    engine: engine::Config,
    prefill: Vec<prefill_worker::Config>,
    decode: Vec<decode_worker::Config>,
    router: router::Config,
}

impl Plan {
    fn new(up: &Up, tables: &Tables, located: &Located) -> anyhow::Result<Self> {
        let mut engine = config::engine(&up.compute, tables)?;
        if up.prefill == 0 && up.placement == Placement::Remote {
            bail!(
                "--prefill is 0, and with --placement remote somebody else has to compute prompts; say --prefill 1, or --placement local"
            );
        }
        let kind = Kind::read(&up.compute.engine)?;
        let draft = speculation::locate(&up.speculation, located)?;
        kind.check(located, up.compute.quantize, draft.as_ref(), &engine)?;
        let workers = up.prefill + up.decode;
        // They share a card as they share the cores.
        engine.gpu_memory_utilization /= workers as f64;
        engine.threads.get_or_insert_with(|| (model::cores() / workers).max(1));
        let prefill =
            (0..up.prefill).map(|i| config::prefill(tables, located, &up.adapters, Some(format!("prefill-{i}"))));
        let decode = (0..up.decode).map(|i| config::decode(tables, located, &up.adapters, Some(format!("decode-{i}"))));
        let (prefill, decode): (Vec<_>, Vec<_>) =
            (prefill.collect::<anyhow::Result<_>>()?, decode.collect::<anyhow::Result<_>>()?);
        prefill.iter().try_for_each(|config| config::check_links("prefill-worker", false, &config.transfer))?;
        decode.iter().try_for_each(|config| config::check_links("decode-worker", false, &config.transfer))?;
        Ok(Self {
            kind,
            draft,
            engine,
            prefill,
            decode,
            router: config::router(
                tables,
                located,
                up.placement,
                up.runtime.runtime_lora,
                &up.dialect,
                Some(&up.door),
            )?,
        })
    }
}

/// The running parts.
#[derive(Debug)]
struct Cluster {
    /// Of the workers and the router.
    healths: Vec<Health>,
    /// Of each worker's pool.
    layout: PageLayout,
    parts: JoinSet<anyhow::Result<()>>,
    workers: usize,
    stop_router: CancellationToken,
    stop_workers: CancellationToken,
}

impl Cluster {
    fn start(plan: Plan, model: Arc<Model>, guesser: Guesser, listener: TcpListener) -> anyhow::Result<Self> {
        let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::default());
        let (stop_router, stop_workers) = (CancellationToken::new(), CancellationToken::new());
        let mut healths = Vec::new();
        let mut health = || {
            healths.push(Health::new("starting", STALL));
            healths[healths.len() - 1].clone()
        };
        let mut layout = None;
        let mut engine = |guesser: &Guesser| {
            let (engine, speculator) = guesser.engine(&plan.kind, model.clone(), &plan.engine)?;
            layout = Some(engine.memory().layout().clone());
            anyhow::Ok((engine, speculator))
        };
        let mut parts = JoinSet::new();
        for config in plan.prefill {
            let (directory, stop) = (directory.clone(), stop_workers.clone());
            let (engine, _) = engine(&Guesser::Nothing)?;
            parts.spawn(prefill_worker::run(config, engine, directory, health(), stop));
        }
        for config in plan.decode {
            let (directory, stop) = (directory.clone(), stop_workers.clone());
            let (engine, speculator) = engine(&guesser)?;
            parts.spawn(decode_worker::run(config, engine, speculator, directory, health(), stop));
        }
        let workers = parts.len();
        parts.spawn(router::run(plan.router, listener, directory, health(), stop_router.clone()));
        let layout = layout.context("there are no workers")?;
        Ok(Self { healths, layout, parts, workers, stop_router, stop_workers })
    }

    /// Waits until some part has ended.
    async fn part_ended(&mut self) -> anyhow::Result<()> {
        match self.parts.join_next().await {
            Some(ended) => ended.context("a part of the cluster panicked")?,
            None => Ok(()),
        }
    }

    /// Stops what is left after a part ended that nobody had told to. Returns its error.
    async fn stop(mut self, ended: anyhow::Result<()>) -> anyhow::Result<()> {
        let cause = ended.and_then(|()| bail!("a part of the cluster ended by itself"));
        self.stop_router.cancel();
        self.stop_workers.cancel();
        // What the others complain of now follows from the first error.
        while !self.parts.is_empty() {
            let _ = self.part_ended().await;
        }
        cause
    }

    /// Lets running requests finish, then stops. The workers have to outlive the router: it is their streams that finish.
    async fn drain(mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        self.stop_router.cancel();
        while self.parts.len() > self.workers {
            outcome = outcome.and(self.part_ended().await);
        }
        self.stop_workers.cancel();
        while !self.parts.is_empty() {
            outcome = outcome.and(self.part_ended().await);
        }
        outcome
    }
}

/// Returns once all of these can take work.
pub(crate) async fn ready(parts: &[Health]) {
    let mut look = tokio::time::interval(Duration::from_millis(5));
    while parts.iter().any(|health| health.readiness().is_err()) {
        look.tick().await;
    }
}

/// What a newcomer is told once everything runs.
struct Welcome<'a> {
    address: SocketAddr,
    located: &'a Located,
    info: &'a ModelInfo,
    plan: &'a Plan,
    layout: &'a PageLayout,
}

impl Welcome<'_> {
    /// Says where the cluster is, what runs and how to try it.
    fn text(&self, took: Duration) -> String {
        let scheme = if self.plan.router.tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listen::reachable(self.address));
        let (info, name) = (self.info, &self.located.name);
        let program = std::env::args().next().unwrap_or_else(|| "baton".into());
        format!(
            r#"Baton is ready on {url} after {took:.2} s

  model    {name}: {architecture}, {parameters} parameters, {dtype}, {weights} in memory
  workers  {prefill} prefill + {decode} decode, {computing}
  pages    {pages} of {tokens} tokens per worker ({kv}, {kv_dtype}), handed off {transport}

Ask it something:

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{name}", "stream": true, "messages": [{{"role": "user", "content": "What is a KV cache?"}}]}}'

or talk to it: {program} chat{chat}
Ctrl-C drains and stops."#,
            took = took.as_secs_f64(),
            architecture = info.architecture,
            parameters = count(info.parameters),
            dtype = info.dtype,
            weights = Bytes(info.weight_bytes),
            prefill = self.plan.prefill.len(),
            decode = self.plan.decode.len(),
            computing = self.plan.kind.describe(self.plan.engine.threads.unwrap_or(1)),
            pages = self.layout.pages,
            tokens = self.layout.page_tokens,
            kv_dtype = self.layout.dtype,
            kv = Bytes(self.layout.pool_bytes() as u64),
            transport = self.transport(),
            chat = if self.address.port() == 8000 { String::new() } else { format!(" --url {url}") },
        )
    }

    fn transport(&self) -> &'static str {
        match self.plan.prefill.iter().find_map(|worker| worker.transfer.require) {
            Some(TransportKind::Tcp) => "over loopback (tcp)",
            Some(TransportKind::Ucx) => "by UCX (ucx)",
            Some(TransportKind::Cuda) => "from card to card (cuda)",
            Some(TransportKind::Shm) => "through shared memory (shm)",
            Some(TransportKind::Memory) | None => "within this process (memory)",
        }
    }
}

/// Writes a count of parameters as people say it.
fn count(parameters: u64) -> String {
    match parameters as f64 {
        n if n >= 1e9 => format!("{:.1} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n => format!("{:.0} k", n / 1e3),
    }
}
