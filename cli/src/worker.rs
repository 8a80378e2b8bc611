//! `baton prefill-worker` and `baton decode-worker`.

use crate::{
    config,
    engine::Kind,
    listen, model,
    settings::{Speculation, Tables, Worker},
    speculation::{self, Guesser},
};
use anyhow::Context;
use cluster::Directory;
use std::{sync::Arc, time::Duration};
use telemetry::Health;
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
    let start = Start::new(role, worker, tables, &located)?;
    let directory: Arc<dyn Directory> = Arc::new(config::directory(&worker.membership)?);

    let health = Health::new("loading weights", STALL);
    let admin = listen::bind("--admin-listen", worker.admin_listen).await?;
    println!("admin on http://{}", admin.local_addr().context("read the bound address")?);
    let admin_stop = CancellationToken::new();
    let admin = tokio::spawn(telemetry::serve_admin(admin, health.clone(), admin_stop.clone()));

    let loading = async {
        let model = model::load(&located, worker.compute.quantize).await?;
        let guesser = match role {
            Role::Prefill => Guesser::Nothing,
            Role::Decode(choice) => speculation::load(choice, &located).await?,
        };
        let engine = tokio::task::spawn_blocking(move || {
            let engine = kind.engine(model, &engine_config)?;
            let speculator = guesser.speculator(&engine)?;
            anyhow::Ok((engine, speculator))
        });
        engine.await.context("reserve memory")?
    };
    let Some((engine, speculator)) = shutdown.run_until_cancelled(loading).await.transpose()? else { return Ok(()) };
    health.not_ready("joining the cluster");
    let outcome = match start {
        Start::Prefill(config) => prefill_worker::run(config, engine, directory, health, shutdown).await,
        Start::Decode(config) => decode_worker::run(config, engine, speculator, directory, health, shutdown).await,
    };
    // Probes are answered to the end of the drain.
    admin_stop.cancel();
    admin.await.context("serve probes")?.context("serve probes (--admin-listen)")?;
    outcome
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
