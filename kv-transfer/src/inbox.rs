//! What the worker and the transports have to say to the driver.
//!
//! A mutex held for one push or one swap, so that the engine's step, which calls [`Inbox::put`] between layers, never waits for
//! anything longer than that. It needs no back-pressure: every note belongs to a live hand-off and there are only so many of
//! each (a push per layer group and chunk, a report per frame). Should a worker push without end all the same, the hand-off is
//! called off instead of taking ever more memory.

use crate::{
    Begin, Fetch, HandoffId,
    handoffs::{Moved, Request},
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::{sync::Notify, time::Instant};

/// Notes waiting before pushes are no longer believed.
const MOST_NOTES: usize = 1 << 16;

/// One thing to handle.
#[derive(Debug)]
pub(crate) enum Note {
    /// From the worker: start this. The span covers the hand-off's life here.
    Begin(Begin, tracing::Span),
    /// From the worker: ask for this.
    Fetch(Fetch),
    /// From the worker.
    Request(Request),
    /// From a transport.
    Moved(HandoffId, Moved),
}

/// The queue in front of the driver, its only reader.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    notes: Mutex<Vec<(Instant, Note)>>,
    wake: Notify,
}

impl Inbox {
    /// Adds a note, stamped with the present.
    pub(crate) fn put(&self, note: Note) {
        let now = Instant::now();
        let mut notes = self.lock();
        match note {
            Note::Request(Request::Push { handoff, .. }) if notes.len() >= MOST_NOTES => {
                let reason = format!("{MOST_NOTES} pushes wait to be handled");
                notes.push((now, Note::Request(Request::Abort { handoff, reason })));
            }
            note => notes.push((now, note)),
        }
        drop(notes);
        self.wake.notify_one();
    }

    /// Waits for notes and takes them all into `taken`, which is empty. Cancel safe.
    pub(crate) async fn take(&self, taken: &mut Vec<(Instant, Note)>) {
        loop {
            std::mem::swap(&mut *self.lock(), taken);
            if !taken.is_empty() {
                return;
            }
            self.wake.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, Note)>> {
        // The vector is whole between any two statements: a panic elsewhere leaves nothing half done.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Duration;

    fn push(handoff: u64) -> Note {
        Note::Request(Request::Push { handoff: HandoffId(handoff), layers: 0..1, pages: 0..1 })
    }

    #[tokio::test]
    async fn takes_all_in_order_and_waits_for_more() {
        let inbox = Inbox::default();
        let mut taken = Vec::new();
        inbox.put(push(1));
        inbox.put(push(2));
        inbox.take(&mut taken).await;
        let ids: Vec<_> = taken
            .drain(..)
            .map(|(_, note)| match note {
                Note::Request(Request::Push { handoff, .. }) => handoff.0,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ids, [1, 2]);
        tokio::time::timeout(Duration::from_millis(1), inbox.take(&mut taken)).await.expect_err("nothing there");
        tokio::join!(inbox.take(&mut taken), async { inbox.put(push(3)) });
        assert_eq!(taken.len(), 1);
    }

    #[tokio::test]
    async fn pushing_without_end_calls_the_handoff_off() {
        let inbox = Inbox::default();
        (0..=MOST_NOTES).for_each(|_| inbox.put(push(1)));
        let mut taken = Vec::new();
        inbox.take(&mut taken).await;
        assert!(matches!(taken.last(), Some((_, Note::Request(Request::Abort { .. })))));
    }
}
