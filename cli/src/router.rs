//! `baton router`.

use crate::{
    config, listen, model,
    settings::{Router, Tables},
    worker::STALL,
};
use anyhow::Context;
use cluster::Directory;
use std::sync::Arc;
use telemetry::Health;
use tokio_util::sync::CancellationToken;

/// Runs until `shutdown`, then drains.
pub(crate) async fn run(router: &Router, tables: &Tables, shutdown: CancellationToken) -> anyhow::Result<()> {
    let located = model::locate(&router.model)?;
    let (dialect, door) = (&router.dialect, Some(&router.door));
    let mut config = config::router(tables, &located, router.placement, router.runtime.runtime_lora, dialect, door)?;
    let directory: Arc<dyn Directory> = Arc::new(config::directory(&router.membership)?);
    let listener = listen::bind("--listen", router.listen).await?;
    let address = listener.local_addr().context("read the bound address")?;
    config.name = router.membership.name.clone();
    config.advertise = router.membership.advertise.as_ref().map(|host| format!("{host}:{}", address.port()));
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    println!("listening on {scheme}://{address}");
    ::router::run(config, listener, directory, Health::new("waiting for workers", STALL), shutdown).await
}
