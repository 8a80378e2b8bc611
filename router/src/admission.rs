//! How much is taken on.
//!
//! A request waits for its turn before any work is done for it, not after: no template is rendered and no token made for a
//! request that will be turned away. Turns are given in order of arrival.

use crate::{config::Limits, error::Error, metrics::Metrics};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// The door. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    turns: Arc<Semaphore>,
    max_concurrent: usize,
    max_queued: usize,
    queue_timeout: Duration,
    waiting: AtomicUsize,
    metrics: Metrics,
}

impl Admission {
    pub(crate) fn new(limits: &Limits, metrics: Metrics) -> Self {
        let inner = Inner {
            turns: Arc::new(Semaphore::new(limits.max_concurrent)),
            max_concurrent: limits.max_concurrent,
            max_queued: limits.max_queued,
            queue_timeout: limits.queue_timeout(),
            waiting: AtomicUsize::new(0),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether there is a place in the queue.
    pub(crate) fn check_queue(&self) -> Result<(), Error> {
        let inner = &self.inner;
        let waiting = inner.waiting.load(Ordering::Relaxed);
        if waiting >= inner.max_queued && inner.turns.available_permits() == 0 {
            return Err(Error::Overloaded { waiting });
        }
        Ok(())
    }

    /// Waits for the turn of a request with this many choices. The permit is held until the last token. Cancel-safe: a
    /// client that leaves gives its place in the queue back.
    pub(crate) async fn admit(&self, choices: usize) -> Result<OwnedSemaphorePermit, Error> {
        let inner = &self.inner;
        let share = choices.clamp(1, inner.max_concurrent) as u32;
        if let Ok(turn) = inner.turns.clone().try_acquire_many_owned(share) {
            return Ok(turn);
        }
        let _place = Place::take(inner)?;
        match timeout(inner.queue_timeout, inner.turns.clone().acquire_many_owned(share)).await {
            Ok(turn) => Ok(turn.expect("the semaphore is never closed")),
            Err(_) => Err(Error::Unavailable {
                message: format!("no capacity came free within {} ms", inner.queue_timeout.as_millis()),
                retry_after: inner.queue_timeout.max(Duration::from_secs(1)),
            }),
        }
    }
}

/// A place in the queue.
struct Place<'a>(&'a Inner);

impl<'a> Place<'a> {
    fn take(inner: &'a Inner) -> Result<Self, Error> {
        let ahead = inner.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Self(inner);
        if ahead >= inner.max_queued {
            return Err(Error::Overloaded { waiting: ahead });
        }
        inner.metrics.queued(ahead + 1);
        Ok(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let before = self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.queued(before - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn admission(max_concurrent: usize, max_queued: usize) -> Admission {
        Admission::new(&Limits { max_concurrent, max_queued, ..Limits::default() }, Metrics::new("m"))
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_bounded_and_so_is_the_queue() {
        let door = admission(2, 1);
        let held = door.admit(2).await.unwrap();
        let mut waiting = Box::pin(door.admit(1));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(door.admit(1).await.unwrap_err(), Error::Overloaded { waiting: 1 });
        assert_eq!(door.check_queue(), Err(Error::Overloaded { waiting: 1 }));
        drop(held);
        assert!(waiting.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_limit_and_leaving_frees_the_place() {
        let door = admission(1, 1);
        let _held = door.admit(1).await.unwrap();
        assert!(matches!(door.admit(1).await.unwrap_err(), Error::Unavailable { .. }));
        let mut gone = Box::pin(door.admit(1));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        let mut next = Box::pin(door.admit(1));
        assert!(next.as_mut().now_or_never().is_none(), "the place in the queue was given back");
    }

    #[tokio::test]
    async fn a_request_larger_than_the_house_takes_all_of_it() {
        let door = admission(2, 0);
        let all = door.admit(100).await.unwrap();
        assert!(door.admit(1).await.is_err());
        drop(all);
        assert!(door.admit(1).await.is_ok());
    }
}
