//! How long a card is waited for: one that hangs ends its worker instead of holding it for good.

use super::driver::describe;
use cudarc::driver::{DriverError, sys::CUresult};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// How long to ask without a pause. What takes longer is a step, beside which a pause is nothing, and whoever pauses leaves a core to others.
const EAGER: Duration = Duration::from_micros(200);
const PAUSE: Duration = Duration::from_micros(20);

/// What waits for a card, in all threads.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    limit: Duration,
    /// The card has been waited for in vain, and is never waited for again.
    given_up: Arc<AtomicBool>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, given_up: Arc::default() }
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Says whether the card was given up: nothing of it can be given back, for that would wait for it.
    pub(super) fn is_over(&self) -> bool {
        self.given_up.load(Relaxed)
    }

    /// Asks `query` until what it asks for is done.
    ///
    /// # Errors
    /// What the driver says, or that it took too long.
    pub(super) fn wait(&self, mut query: impl FnMut() -> Result<(), DriverError>) -> Result<(), String> {
        let began = Instant::now();
        while !self.is_over() {
            match query() {
                Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => {}
                done => return done.map_err(describe),
            }
            match began.elapsed() {
                waited if waited > self.limit => self.given_up.store(true, Relaxed),
                waited if waited > EAGER => thread::park_timeout(PAUSE),
                _ => thread::yield_now(),
            }
        }
        Err(format!(
            "it was not done within {:?}: the card hangs, or a step takes longer (card_timeout_ms)",
            self.limit
        ))
    }
}
