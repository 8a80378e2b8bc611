//! What the legs of one attempt have said and their request has not heard.
//!
//! One listens, few speak, and nearly always there is nothing: ten thousand open streams have ten thousand of these, so one that is empty
//! takes no more than a line of cache or two. Full, a token is turned away; a last word never is.

use super::leg::LegEvent;
use futures::task::AtomicWaker;
use std::{
    future::poll_fn,
    mem::swap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
};

/// A leg's end of it. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Speaker(Arc<Shared>);

/// The request's end.
#[derive(Debug)]
pub(crate) struct Listener(Arc<Shared>);

/// So much waits already that nothing more is taken but last words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Vec<LegEvent>>,
    capacity: usize,
    waker: AtomicWaker,
}

/// Makes both ends. `capacity` events may wait, beside last words.
pub(crate) fn channel(capacity: usize) -> (Speaker, Listener) {
    let shared = Arc::new(Shared { waiting: Mutex::default(), capacity, waker: AtomicWaker::new() });
    (Speaker(shared.clone()), Listener(shared))
}

impl Speaker {
    pub(crate) fn say(&self, event: LegEvent) -> Result<(), Full> {
        let mut waiting = self.0.lock();
        if waiting.len() >= self.0.capacity {
            return Err(Full);
        }
        waiting.push(event);
        drop(waiting);
        self.0.waker.wake();
        Ok(())
    }

    /// Says what a leg says at most once.
    pub(crate) fn last_word(&self, event: LegEvent) {
        self.0.lock().push(event);
        self.0.waker.wake();
    }
}

impl Listener {
    /// Waits until something was said, and moves all of it to the end of `events`. Cancel-safe.
    pub(crate) async fn listen(&mut self, events: &mut Vec<LegEvent>) {
        poll_fn(|context| {
            // Registered before the look, so that what is said after it wakes us.
            self.0.waker.register(context.waker());
            if self.take(events) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn take(&self, events: &mut Vec<LegEvent>) -> bool {
        let mut waiting = self.0.lock();
        if waiting.is_empty() {
            return false;
        }
        if events.is_empty() {
            swap(&mut *waiting, events);
        } else {
            events.append(&mut waiting);
        }
        true
    }

    /// Returns what was said so far.
    #[cfg(test)]
    pub(crate) fn heard(&mut self) -> Vec<LegEvent> {
        let mut events = Vec::new();
        self.take(&mut events);
        events
    }
}

impl Shared {
    /// The list is whole between any two statements that could panic, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, Vec<LegEvent>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::leg::{End, Ended, Said};
    use futures::FutureExt;

    fn event(attempt: u64) -> LegEvent {
        LegEvent { attempt, said: Said::Ended(Box::new(Ended::without_numbers(End::Length))) }
    }

    fn attempts(events: &[LegEvent]) -> Vec<u64> {
        events.iter().map(|event| event.attempt).collect()
    }

    #[test]
    fn what_is_said_is_heard_in_order_and_full_takes_last_words_only() {
        let (speaker, mut listener) = channel(2);
        let other = speaker.clone();
        assert_eq!((speaker.say(event(1)), other.say(event(2)), speaker.say(event(3))), (Ok(()), Ok(()), Err(Full)));
        other.last_word(event(4));
        let mut events = vec![event(0)];
        assert_eq!(listener.listen(&mut events).now_or_never(), Some(()));
        assert_eq!(attempts(&events), [0, 1, 2, 4]);
        assert_eq!(listener.listen(&mut events).now_or_never(), None);
        assert_eq!(speaker.say(event(5)), Ok(()), "there is room again");
        assert_eq!(attempts(&listener.heard()), [5]);
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let (speaker, mut listener) = channel(1);
        let waiting = tokio::spawn(async move {
            let mut events = Vec::new();
            listener.listen(&mut events).await;
            attempts(&events)
        });
        tokio::task::yield_now().await;
        speaker.last_word(event(7));
        assert_eq!(waiting.await.unwrap(), [7]);
    }
}
