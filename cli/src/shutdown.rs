//! Stopping: the first signal drains, the second one quits at once.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process that was told twice to stop: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// Returns a token that SIGINT (Ctrl-C) or SIGTERM cancels. A second signal ends the process there and then.
pub(crate) fn on_signal() -> anyhow::Result<CancellationToken> {
    let interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let token = CancellationToken::new();
    tokio::spawn(watch(interrupt, terminate, token.clone()));
    Ok(token)
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, token: CancellationToken) {
    let mut next = async || {
        // Cancel safe: a signal that arrives while nobody waits is kept for the next `recv`.
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    next().await;
    eprintln!("draining: running requests finish first (once more to quit at once)");
    token.cancel();
    next().await;
    std::process::exit(INTERRUPTED);
}
