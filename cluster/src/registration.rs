//! A member's place in the directory.
//!
//! A [`Registration`] is the handle the member holds; a task of the directory publishes what it says. Between the two stands
//! one value, [`Wanted`], of which only the latest counts: a slow directory delays what is published, it never makes it queue.
//! How often that may be is decided by [`Pace`].

use crate::{LoadSummary, State};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use std::time::Duration;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Load is published at most this often: a directory is for what changes slowly.
pub(crate) const LOAD_INTERVAL: Duration = Duration::from_secs(1);

/// How long [`Registration::leave`] waits for the directory.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a member wants published.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) state: State,
    pub(crate) load: LoadSummary,
}

/// A live registration. Dropping it leaves the directory.
#[derive(Debug)]
pub struct Registration {
    wanted: watch::Sender<Wanted>,
    incarnation: Arc<AtomicU64>,
    task: JoinHandle<()>,
    // Dropped last or on its own, it ends the task, which leaves the directory.
    stop: DropGuard,
}

/// The other end of a [`Registration`], held by the task that publishes.
#[derive(Debug)]
pub(crate) struct Publisher {
    /// What to publish. Closed when the registration is gone, but `stop` says so first.
    pub(crate) wanted: watch::Receiver<Wanted>,
    /// Where to say under which incarnation the member is registered.
    pub(crate) incarnation: Arc<AtomicU64>,
    /// Cancelled when the member leaves.
    pub(crate) stop: CancellationToken,
}

impl Registration {
    /// Makes a registration that starts from `wanted` and `incarnation`, and runs the task `publish` makes of its other end.
    /// The task leaves the directory and ends when [`Publisher::stop`] is cancelled.
    pub(crate) fn spawn<F>(wanted: Wanted, incarnation: u64, publish: impl FnOnce(Publisher) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = watch::channel(wanted);
        let incarnation = Arc::new(AtomicU64::new(incarnation));
        let stop = CancellationToken::new();
        let publisher = Publisher { wanted: receiver, incarnation: incarnation.clone(), stop: stop.clone() };
        Self { wanted: sender, incarnation, task: tokio::spawn(publish(publisher)), stop: stop.drop_guard() }
    }

    /// Returns the current incarnation. It grows when a lease was lost and the member had to register again.
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    /// Publishes a new state, at once.
    pub fn set_state(&self, state: State) {
        self.wanted.send_if_modified(|wanted| std::mem::replace(&mut wanted.state, state) != state);
    }

    /// Publishes load, at most once a second; what comes faster replaces what waits.
    pub fn set_load(&self, load: LoadSummary) {
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.load != load;
            wanted.load = load;
            changed
        });
    }

    /// Leaves the directory and waits until that is known there (or two seconds have passed).
    pub async fn leave(self) {
        let Self { task, stop, .. } = self;
        drop(stop);
        if timeout(LEAVE_TIMEOUT, task).await.is_err() {
            tracing::warn!("the directory did not confirm the leave in time; the lease will run out");
        }
    }
}

/// When what a member wants may be published. Pure: time is an argument.
#[derive(Debug)]
pub(crate) struct Pace {
    published: Wanted,
    published_at: Instant,
}

/// What [`Pace`] says about what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// All is published.
    Nothing,
    /// Publish now.
    Now,
    /// Publish then, unless something more urgent comes first.
    At(Instant),
}

impl Due {
    /// Waits until something is due; forever where nothing is. Cancel-safe.
    pub(crate) async fn wait(self) {
        match self {
            Due::Now => {}
            Due::At(at) => sleep_until(at).await,
            Due::Nothing => std::future::pending().await,
        }
    }
}

impl Pace {
    /// `published` went out at `now`.
    pub(crate) fn new(published: Wanted, now: Instant) -> Self {
        Self { published, published_at: now }
    }

    /// Says when `wanted` may go out: a state at once, load when the last publication is [`LOAD_INTERVAL`] old.
    pub(crate) fn due(&self, wanted: &Wanted, now: Instant) -> Due {
        let next_load = self.published_at + LOAD_INTERVAL;
        if wanted == &self.published {
            Due::Nothing
        } else if wanted.state != self.published.state || now >= next_load {
            Due::Now
        } else {
            Due::At(next_load)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(state: State, running: u32) -> Wanted {
        Wanted { state, load: LoadSummary { running, ..Default::default() } }
    }

    #[test]
    fn a_state_goes_at_once_and_load_once_a_second() {
        let start = Instant::now();
        let pace = Pace::new(wanted(State::Ready, 1), start);
        let check = |what: Wanted, after_ms: u64, expected: Due| {
            assert_eq!(
                pace.due(&what, start + Duration::from_millis(after_ms)),
                expected,
                "{what:?} after {after_ms} ms"
            );
        };
        check(wanted(State::Ready, 1), 0, Due::Nothing);
        check(wanted(State::Ready, 1), 5_000, Due::Nothing);
        check(wanted(State::Ready, 2), 0, Due::At(start + LOAD_INTERVAL));
        check(wanted(State::Ready, 2), 999, Due::At(start + LOAD_INTERVAL));
        check(wanted(State::Ready, 2), 1_000, Due::Now);
        check(wanted(State::Draining, 1), 0, Due::Now);
        check(wanted(State::Draining, 2), 0, Due::Now);
    }
}
