//! How much is taken on, and in what order.
//!
//! A request passes here twice. On arrival it gets a [`Place`], or is refused before any work is done for it; once it is tokens, it waits for
//! its [`Turn`]. Who goes next, who is sent away, how long a wait will be and what a prediction is worth is decided in the crate
//! [`admission`](::admission); this file keeps the clock and wakes people up.
//!
//! Turns are bounded by a setting, and by what the workers say: while all of them have enough to do, requests wait here, where a better
//! class or another key can still overtake them. One that would come too late is told so when it asks, not after it has waited.

use crate::{config, error::Error, metrics::Metrics};
use ::admission::{Ask, Forecast, Limits, Objective, Outcome, Queue, Refusal, Supply, Ticket, Waits};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, sleep_until},
};

/// How old what is known of the workers may be: asking all of them for each request would cost more than the rest of this file.
const SUPPLY_AGE: Duration = Duration::from_millis(2);

/// What a key may have in a round: a few ordinary prompts.
const QUANTUM_TOKENS: u64 = 4_096;

/// The least that a client is asked to stay away.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The way in. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    /// Asks the workers.
    supply: Box<dyn Fn() -> Supply + Send + Sync>,
    patience: Duration,
    started: Instant,
    /// Somebody waits.
    wake: Notify,
    metrics: Metrics,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("waiting", &self.state().queue.waiting()).finish_non_exhaustive()
    }
}

struct State {
    queue: Queue,
    forecast: Forecast,
    waiters: HashMap<Ticket, oneshot::Sender<Result<(), Refusal>>>,
    /// When the workers were asked last.
    supplied: Option<Instant>,
    outcomes: Vec<Outcome>,
}

/// Who asks for a turn, and for how much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    /// The request's priority.
    pub(crate) class: i32,
    /// Whose request it is.
    pub(crate) key: u64,
    /// Tokens of the prompts and of the expected outputs.
    pub(crate) tokens: u64,
    /// Choices it generates at once.
    pub(crate) choices: usize,
    /// What is left until its first token is wanted.
    pub(crate) objective: Option<Duration>,
}

impl Admission {
    /// `supply` says what the workers can take.
    pub(crate) fn new(
        limits: &config::Limits,
        supply: impl Fn() -> Supply + Send + Sync + 'static,
        metrics: Metrics,
    ) -> Self {
        let queue = Queue::new(Limits {
            max_running: limits.max_concurrent,
            max_waiting: limits.max_queued,
            quantum_tokens: QUANTUM_TOKENS,
        });
        let state = State {
            queue,
            forecast: Forecast::default(),
            waiters: HashMap::new(),
            supplied: None,
            outcomes: Vec::new(),
        };
        let inner = Inner {
            state: Mutex::new(state),
            supply: Box::new(supply),
            patience: limits.queue_timeout(),
            started: Instant::now(),
            wake: Notify::new(),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Looks after those who wait, for ever: workers get room without telling anybody here.
    pub(crate) async fn follow(self) {
        loop {
            self.inner.wake.notified().await;
            while self.inner.pump() > 0 {
                sleep(SUPPLY_AGE).await;
            }
        }
    }

    /// Whether there is a place in the queue: what can be said before anything is read.
    pub(crate) fn check_queue(&self) -> Result<(), Error> {
        let mut state = self.inner.state();
        self.inner.ask_workers(&mut state);
        if state.queue.is_closed() {
            return Err(Error::Overloaded { waiting: state.queue.waiting() });
        }
        Ok(())
    }

    /// Gives a request of this class a place, or says that there is none.
    pub(crate) fn enter(&self, class: i32) -> Result<Place, Error> {
        let entered = {
            let mut state = self.inner.state();
            self.inner.ask_workers(&mut state);
            state.queue.enter(class)
        };
        entered.map_err(|refusal| self.inner.error(refusal, None))?;
        Ok(Place { admission: self.clone() })
    }

    /// Corrects what a request was taken to need: it read and wrote `more` tokens.
    pub(crate) fn settle(&self, class: i32, key: u64, more: i64) {
        let mut state = self.inner.state();
        if state.queue.waiting() > 0 {
            state.queue.settle(class, key, more);
        }
    }

    /// Says whether a request may be placed whose first token is wanted by `wanted` after `elapsed` have passed and is predicted in
    /// `predicted_ms`. `idle`: its workers have nothing else to do.
    pub(crate) fn check_objective(
        &self,
        (elapsed, wanted): (Duration, Duration),
        predicted_ms: f64,
        idle: bool,
    ) -> Result<(), Error> {
        let mut state = self.inner.state();
        let predicted = elapsed + state.forecast.ttft(predicted_ms);
        if predicted <= wanted || (idle && state.forecast.tries(self.inner.started.elapsed())) {
            return Ok(());
        }
        self.inner.metrics.refused(Refusal::TooSlow { predicted });
        Err(too_slow(predicted, wanted))
    }

    /// Notes that a first token came that was promised.
    pub(crate) fn learn(&self, promise: Promise) {
        self.inner.state().forecast.learn(promise.ttft_ms, promise.since.elapsed());
    }
}

/// A first token predicted in so many milliseconds from then on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Promise {
    pub(crate) ttft_ms: f64,
    pub(crate) since: Instant,
}

/// A place for a request that is being prepared. Dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Admission,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.inner.state().queue.arrived();
    }
}

impl Place {
    /// Waits for a turn. `service_ms` predicts what its workers will take to the first token, if that is known. Cancel-safe: a client that
    /// leaves gives up its place in the queue.
    pub(crate) async fn turn(self, claim: Claim, service_ms: impl FnOnce() -> Option<f64>) -> Result<Turn, Error> {
        let admission = self.admission.clone();
        let inner = &admission.inner;
        if inner.pass(&claim) {
            return Ok(Turn { admission, share: claim.choices, promise: None });
        }
        // Placement is asked before the lock is taken.
        let objective = claim.objective.and_then(|ttft| Some(Objective { ttft, service_ms: service_ms()? }));
        let asked = Instant::now();
        let (mut waiting, promised_ms) = {
            let mut state = inner.state();
            let State { queue, forecast, .. } = &mut *state;
            let Claim { class, key, tokens, choices: share, .. } = claim;
            let ask = Ask { class, key, tokens, share, patience: inner.patience, objective };
            let waits = queue.wait(inner.now(), ask, forecast);
            let Waits { ticket, promised_ms } = waits.map_err(|refusal| inner.error(refusal, claim.objective))?;
            let (sender, answer) = oneshot::channel();
            state.waiters.insert(ticket, sender);
            (Waiting { inner, ticket, share, answer }, promised_ms)
        };
        drop(self);
        inner.pump();
        inner.wake.notify_one();
        let outcome = loop {
            // Both arms are cancel-safe.
            tokio::select! {
                answer = &mut waiting.answer => break answer.expect("everybody who waits is answered"),
                () = sleep_until(asked + inner.patience + SUPPLY_AGE) => { inner.pump(); }
            }
        };
        drop(waiting);
        inner.metrics.waited(asked.elapsed());
        match outcome {
            Ok(()) => {
                let promise = promised_ms.map(|ttft_ms| Promise { ttft_ms, since: asked });
                Ok(Turn { share: claim.choices, admission, promise })
            }
            Err(refusal) => Err(inner.error(refusal, claim.objective)),
        }
    }
}

/// A request that waits. Dropped before it was answered, it gives up; dropped with an answer that it did not take, it gives that back.
struct Waiting<'a> {
    inner: &'a Inner,
    ticket: Ticket,
    share: usize,
    answer: oneshot::Receiver<Result<(), Refusal>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let unanswered = {
            let mut state = self.inner.state();
            state.waiters.remove(&self.ticket).is_some() && state.queue.give_up(self.ticket)
        };
        if !unanswered && let Ok(Ok(())) = self.answer.try_recv() {
            self.inner.done(self.share);
        }
    }
}

/// A turn, held until the last token. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Turn {
    admission: Admission,
    share: usize,
    /// What it was let in with, if it waited for this and has an objective.
    pub(crate) promise: Option<Promise>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.admission.inner.done(self.share);
    }
}

impl Inner {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes a turn without waiting.
    fn pass(&self, claim: &Claim) -> bool {
        let mut state = self.state();
        self.ask_workers(&mut state);
        state.queue.pass(claim.choices, claim.tokens)
    }

    fn done(&self, share: usize) {
        let waiting = {
            let mut state = self.state();
            state.queue.done(share);
            state.queue.waiting()
        };
        if waiting > 0 {
            self.pump();
        }
    }

    /// Answers whom there is an answer for. Returns how many still wait.
    fn pump(&self) -> usize {
        let mut state = self.state();
        self.ask_workers(&mut state);
        let State { queue, waiters, outcomes, .. } = &mut *state;
        queue.pump(self.now(), outcomes);
        for (ticket, outcome) in outcomes.drain(..) {
            // Whoever does not listen any more gives the answer back.
            if let Some(waiter) = waiters.remove(&ticket) {
                let _ = waiter.send(outcome);
            }
        }
        let waiting = queue.waiting();
        self.metrics.queued(waiting);
        waiting
    }

    fn ask_workers(&self, state: &mut State) {
        let now = Instant::now();
        if state.supplied.is_none_or(|at| now >= at + SUPPLY_AGE) {
            state.supplied = Some(now);
            state.queue.supply((self.supply)());
        }
    }

    fn error(&self, refusal: Refusal, wanted: Option<Duration>) -> Error {
        self.metrics.refused(refusal);
        match refusal {
            Refusal::Full { waiting } => Error::Overloaded { waiting },
            Refusal::Expired { .. } => Error::Unavailable {
                message: format!("no capacity came free within {} ms", self.patience.as_millis()),
                retry_after: self.patience.max(RETRY_AFTER),
            },
            Refusal::TooSlow { predicted } => too_slow(predicted, wanted.unwrap_or_default()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The queue is whole between any two of its calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn too_slow(predicted: Duration, wanted: Duration) -> Error {
    Error::TooSlow { predicted, wanted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::sync::atomic::{AtomicI64, Ordering};

    fn admission(max_concurrent: usize, max_queued: usize) -> Admission {
        supplied(max_concurrent, max_queued, || Supply::UNKNOWN)
    }

    fn supplied(
        max_concurrent: usize,
        max_queued: usize,
        supply: impl Fn() -> Supply + Send + Sync + 'static,
    ) -> Admission {
        let limits = config::Limits { max_concurrent, max_queued, ..config::Limits::default() };
        Admission::new(&limits, supply, Metrics::new("m"))
    }

    async fn admit(door: &Admission, choices: usize) -> Result<Turn, Error> {
        let claim = Claim { class: 0, key: 0, tokens: 10, choices, objective: None };
        door.enter(0)?.turn(claim, || None).await
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_bounded_and_so_is_the_queue() {
        let door = admission(2, 1);
        let held = admit(&door, 2).await.unwrap();
        let mut waiting = Box::pin(admit(&door, 1));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(admit(&door, 1).await.unwrap_err(), Error::Overloaded { waiting: 1 });
        assert_eq!(door.check_queue(), Err(Error::Overloaded { waiting: 1 }));
        drop(held);
        assert!(waiting.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_limit_and_leaving_frees_the_place() {
        let door = admission(1, 1);
        let _held = admit(&door, 1).await.unwrap();
        assert!(matches!(admit(&door, 1).await.unwrap_err(), Error::Unavailable { .. }));
        let mut gone = Box::pin(admit(&door, 1));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        let mut next = Box::pin(admit(&door, 1));
        assert!(next.as_mut().now_or_never().is_none(), "the place in the queue was given back");
    }

    #[tokio::test]
    async fn a_request_larger_than_the_house_takes_all_of_it() {
        let door = admission(2, 0);
        let all = admit(&door, 100).await.unwrap();
        assert!(admit(&door, 1).await.is_err());
        drop(all);
        assert!(admit(&door, 1).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_nobody_takes_goes_to_the_next() {
        let door = admission(1, 2);
        let held = admit(&door, 1).await.unwrap();
        let (mut first, mut second) = (Box::pin(admit(&door, 1)), Box::pin(admit(&door, 1)));
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        drop(held);
        drop(first);
        assert!(second.now_or_never().is_some_and(|turn| turn.is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_until_a_worker_has_room() {
        let room = Arc::new(AtomicI64::new(0));
        let told = room.clone();
        let supply = move || Supply { room_tokens: told.load(Ordering::Relaxed), tokens_per_s: 100.0 };
        let door = supplied(10, 10, supply);
        let _following = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(door.clone().follow()));
        let mut waiting = Box::pin(admit(&door, 1));
        assert!(tokio::time::timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        room.store(1, Ordering::Relaxed);
        assert!(tokio::time::timeout(Duration::from_millis(10), &mut waiting).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_objective_that_cannot_be_met_is_refused_with_both_figures() {
        let door = admission(1, 10);
        let _held = admit(&door, 1).await.unwrap();
        let claim = |ms| Claim { class: 0, key: 0, tokens: 10, choices: 1, objective: Some(Duration::from_millis(ms)) };
        let early = door.enter(0).unwrap().turn(claim(50), || Some(80.0)).await.unwrap_err();
        let ms = Duration::from_millis;
        assert_eq!(early, Error::TooSlow { predicted: ms(80), wanted: ms(50) });
        let started = Instant::now();
        let late = door.enter(0).unwrap().turn(claim(200), || Some(80.0)).now_or_never();
        assert!(late.is_none(), "it may still work out");
        let _following = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(door.clone().follow()));
        let late = door.enter(0).unwrap().turn(claim(200), || Some(80.0)).await.unwrap_err();
        assert!(matches!(late, Error::TooSlow { .. }), "{late:?}");
        assert!((ms(199)..ms(210)).contains(&started.elapsed()), "when it is certain: {:?}", started.elapsed());
        assert_eq!(door.check_objective((ms(0), ms(100)), 101.0, false), Err(too_slow(ms(101), ms(100))));
        assert_eq!(door.check_objective((ms(0), ms(100)), 101.0, true), Ok(()), "one is tried");
        assert!(door.check_objective((ms(0), ms(100)), 101.0, true).is_err());
    }
}
