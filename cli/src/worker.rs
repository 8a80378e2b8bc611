//! `baton prefill-worker` and `baton decode-worker`: members of a cluster, or with `--http` each alone behind a door of its own.

use crate::{
    config,
    engine::Kind,
    listen, model,
    settings::{Speculation, Tables, Worker},
    speculation::{self, Guesser},
};
use anyhow::{Context, bail};
use cluster::{Directory, MemoryDirectory};
use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use telemetry::Health;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long a step may take before probes are told that the process hangs. A full step of a large model on a small machine
/// takes seconds; a restart costs all the sequences.
pub(crate) const STALL: Duration = Duration::from_secs(120);

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role<'a> {
    /// Prompts to pages.
    Prefill,
    /// Pages to tokens, guessed ahead like this.
    Decode(&'a Speculation),
}

/// Runs until `shutdown`, then drains. Probes and metrics answer before the weights load.
pub(crate) async fn run(
    role: Role<'_>,
    worker: &Worker,
    tables: &Tables,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let located = model::locate(&worker.model)?;
    let kind = Kind::read(&worker.compute.engine)?;
    let engine_config = config::worker_engine(worker, tables)?;
    let draft = match role {
        Role::Prefill => None,
        Role::Decode(choice) => speculation::locate(choice, &located)?,
    };
    kind.check(&located, worker.compute.quantize, draft.as_ref(), &engine_config)?;
    kind.check_transport(worker.transport)?;
    let start = Start::new(role, worker, tables, &located)?;
    let (directory, door): (Arc<dyn Directory>, _) = match worker.http.http {
        None => (Arc::new(config::directory(&worker.membership)?), None),
        Some(address) => {
            let config = config::door(worker, tables, &located, matches!(role, Role::Prefill))?;
            (Arc::new(MemoryDirectory::default()), Some(Door::open(config, address).await?))
        }
    };

    let health = Health::new("loading weights", STALL);
    let admin = listen::bind("--admin-listen", worker.admin_listen).await?;
    println!("admin on http://{}", admin.local_addr().context("read the bound address")?);
    let admin_stop = CancellationToken::new();
    let admin = tokio::spawn(telemetry::serve_admin(admin, health.clone(), admin_stop.clone()));

    let loading = async {
        let model = model::load(&located, worker.compute.quantize).await?;
        let guesser = match role {
            Role::Prefill => Guesser::Nothing,
            Role::Decode(choice) => speculation::load(choice, draft.as_ref()).await?,
        };
        let engine = tokio::task::spawn_blocking(move || guesser.engine(&kind, model, &engine_config));
        engine.await.context("reserve memory")?
    };
    let Some((engine, speculator)) = shutdown.run_until_cancelled(loading).await.transpose()? else { return Ok(()) };
    health.not_ready("joining the cluster");
    // A worker outlives its door, whose streams it finishes.
    let stop = if door.is_some() { CancellationToken::new() } else { shutdown.clone() };
    let (members, stopped) = (directory.clone(), stop.clone());
    let working = async {
        match start {
            Start::Prefill(config) => prefill_worker::run(config, engine, members, health, stopped).await,
            Start::Decode(config) => decode_worker::run(config, engine, speculator, members, health, stopped).await,
        }
    };
    let outcome = match door {
        None => working.await,
        Some(door) => door.serve(working, directory, shutdown, stop).await,
    };
    // Probes are answered to the end of the drain.
    admin_stop.cancel();
    admin.await.context("serve probes")?.context("serve probes (--admin-listen)")?;
    outcome
}

/// A worker's own OpenAI endpoint: a router with a fleet of one.
struct Door {
    config: ::router::Config,
    listener: TcpListener,
}

impl Door {
    async fn open(config: ::router::Config, address: SocketAddr) -> anyhow::Result<Self> {
        let listener = listen::bind("--http", address).await?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        println!("listening on {scheme}://{}", listener.local_addr().context("read the bound address")?);
        Ok(Self { config, listener })
    }

    /// Serves until `shutdown` and drains; then has the worker stop.
    async fn serve(
        self,
        working: impl Future<Output = anyhow::Result<()>>,
        directory: Arc<dyn Directory>,
        shutdown: CancellationToken,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let health = Health::new("waiting for the worker", STALL);
        let serving = ::router::run(self.config, self.listener, directory, health, shutdown);
        let (mut working, mut serving) = (pin!(working), pin!(serving));
        // Both arms are cancel safe: what they borrow goes on where it is awaited next.
        tokio::select! {
            ended = &mut working => ended.and_then(|()| bail!("the worker ended by itself")),
            served = &mut serving => {
                stop.cancel();
                let ended = working.await;
                served.and(ended)
            }
        }
    }
}

/// What the role's library is told.
enum Start {
    Prefill(prefill_worker::Config),
    Decode(decode_worker::Config),
}

impl Start {
    fn new(role: Role<'_>, worker: &Worker, tables: &Tables, located: &model::Located) -> anyhow::Result<Self> {
        Ok(match role {
            Role::Prefill => Self::Prefill(config::prefill_process(worker, tables, located)?),
            Role::Decode(_) => Self::Decode(config::decode_process(worker, tables, located)?),
        })
    }
}
