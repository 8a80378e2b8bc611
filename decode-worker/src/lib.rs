//! The decode worker: pages and a first token in, tokens out.
//!
//! ```text
//!  router ──► attach ── commands ──► [runner] the step thread: match · land · step · emit
//!         ◄── attach ◄── tokens ────    │  ▲        └─ [reservation] sequences on their way
//!                          open, refuse    Begun, Landed, Lost, Quiet
//!                                       ▼  │
//!  prefill worker ══ pages ══► kv-transfer
//! ```
//!
//! How it joins the directory, serves routers and leaves is the same for both kinds of worker: [`attach::live`].
#![forbid(unsafe_code)]

mod config;
mod reservation;
mod runner;

pub use config::Config;

use cluster::Directory;
use engine::{Engine, speculation::Speculator};
use runner::Runner;
use std::sync::Arc;
use telemetry::Health;
use tokio_util::sync::CancellationToken;

/// Serves sequences until `shutdown`, guessing their tokens by `speculator` where there is one, then finishes those it has, for at most the drain timeout.
///
/// # Errors
/// When a setting makes no sense, an address cannot be bound, the directory refuses the name, or the step thread dies.
pub async fn run(
    config: Config,
    engine: Engine,
    speculator: Option<Speculator>,
    directory: Arc<dyn Directory>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let reservations = config.reservations();
    attach::live(config.into_slot(), engine, directory, health, shutdown, |parts| {
        Runner::new(parts, reservations, speculator)
    })
    .await
}
