//! Adapters that come and go while a worker serves: what routers ask, and what all of them are told.
//!
//! Nothing here meets the step thread. A submission looks its adapter up when it arrives and holds it from then on, so reading
//! one takes as long as it takes, on a thread of its own, and giving one up ends no sequence.

use crate::Router;
use engine::{AdapterError, Adapters};
use proto::{AdapterAnswer, AdapterCommand, adapter_answer::Outcome, adapter_command::What};
use std::{path::Path, sync::Arc};
use tokio::sync::{Semaphore, watch};

/// The adapters of a worker, and news of them. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Board {
    adapters: Option<Arc<Adapters>>,
    /// Commands run one after the other: a flood of loads must not take every thread.
    turn: Arc<Semaphore>,
    changes: Arc<watch::Sender<()>>,
}

impl Board {
    /// `None` is a worker without a model to add to.
    pub(crate) fn new(adapters: Option<Arc<Adapters>>) -> Self {
        Self { adapters, turn: Arc::new(Semaphore::new(1)), changes: Arc::new(watch::Sender::new(())) }
    }

    /// Returns all adapters as routers are told.
    pub(crate) fn list(&self) -> proto::Adapters {
        let listed = self.adapters.as_ref().map(|adapters| adapters.list()).unwrap_or_default();
        let adapter = |(name, adapter): (String, Arc<engine::Adapter>)| proto::Adapter {
            name,
            id: adapter.id().to_owned(),
            path: adapter.path().display().to_string(),
        };
        proto::Adapters { adapters: listed.into_iter().map(adapter).collect() }
    }

    /// Tells of changes from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Carries out a command and answers it, the changed list first.
    pub(crate) async fn command(self, command: AdapterCommand, router: Router) {
        let AdapterCommand { command, name, what } = command;
        let _turn = self.turn.acquire().await.expect("the semaphore is never closed");
        let adapters = self.adapters.clone();
        let work = tokio::task::spawn_blocking(move || carry_out(adapters.as_deref(), &name, what));
        let (outcome, message) = match work.await {
            Ok(Ok(())) => (Outcome::Done, String::new()),
            Ok(Err((outcome, message))) => (outcome, message),
            Err(panic) => (Outcome::Unusable, format!("reading it failed: {panic}")),
        };
        router.adapters(self.list());
        router.answer(AdapterAnswer { command, outcome: outcome.into(), message });
        self.changes.send_replace(());
    }
}

fn carry_out(adapters: Option<&Adapters>, name: &str, what: Option<What>) -> Result<(), (Outcome, String)> {
    let adapters = adapters.ok_or((Outcome::Unusable, "this worker takes no adapters".to_owned()))?;
    let done = match what {
        Some(What::Load(path)) => adapters.load(name, Path::new(&path)).map(drop),
        Some(What::Unload(_)) => adapters.unload(name),
        None => return Err((Outcome::Unusable, "the command neither loads nor unloads".into())),
    };
    done.map_err(|error| {
        let outcome = match &error {
            AdapterError::Exists(_) => Outcome::Exists,
            AdapterError::Unknown(_) => Outcome::Unknown,
            AdapterError::NotFound(_) => Outcome::NotFound,
            AdapterError::Full(_) | AdapterError::Unusable(_) => Outcome::Unusable,
        };
        (outcome, error.to_string())
    })
}
