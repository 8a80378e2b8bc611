//! One live stream to one worker: what waits to go down, and who waits for what comes up.
//!
//! A [`Session`] lasts as long as the stream. Submitting to it never waits: frames are gathered by the stream's own task, so a
//! burst of submissions and cancels becomes one frame. When the stream ends, every leg on it hears [`End::Lost`].
//!
//! Full, in either direction: beyond [`MAX_UNSENT`] unsent submissions the worker counts as busy and the request goes elsewhere; a
//! request whose own queue is full belongs to a client that does not read, and its leg ends with [`End::Overflow`]. The last word of
//! a leg always arrives.

use super::{
    adapters::{Adapter, Change, Refusal},
    events::Speaker,
    leg::{End, Ended, LegEvent, Said, Submission},
    wire,
};
use placement::Ledger;
use proto::{RouterFrame, WorkerFrame};
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, oneshot};

/// Submissions that may wait for the stream's flow control.
const MAX_UNSENT: usize = 4_096;

/// Bytes of the submissions' tokens in one frame, unless the first alone has more: keeps frames well below gRPC's 4 MiB.
const FRAME_BYTES: usize = 512 << 10;

/// The worker took no submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unsent {
    /// Its stream has ended.
    #[error("the stream to the worker has ended")]
    Gone,
    /// Too many submissions wait already.
    #[error("{MAX_UNSENT} submissions already wait to be sent to the worker")]
    Busy,
}

/// One live stream.
pub(crate) struct Session {
    inner: Mutex<Inner>,
    wake: Notify,
    /// Moment from which the ledger's time counts.
    epoch: Instant,
}

/// What a leg takes on its worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asks {
    /// Milliseconds of computing.
    pub(crate) compute_ms: f64,
    /// Pages that it has to have free.
    pub(crate) pages: u32,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("legs", &self.lock().legs.len()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    closed: bool,
    first: Option<RouterFrame>,
    submits: VecDeque<proto::Submit>,
    cancels: Vec<u64>,
    resync: bool,
    ping: u64,
    legs: HashMap<u64, Leg>,
    /// Load as the worker last reported it, and what was sent to it since.
    ledger: Ledger,
    /// As the worker last said.
    adapters: Arc<[Arc<Adapter>]>,
    adapter_commands: Vec<proto::AdapterCommand>,
    next_command: u64,
    /// Who waits for the answer to a command.
    answers: HashMap<u64, oneshot::Sender<Result<(), Refusal>>>,
    /// Number of the reset that is to be sent.
    reset: Option<u64>,
    /// Who waits for the answer to one, by its number.
    resets: Vec<(u64, oneshot::Sender<bool>)>,
}

struct Leg {
    events: Speaker,
}

impl Session {
    /// Starts with a greeting in the name of `router`, which asks for a snapshot of the worker's pages.
    pub(super) fn new(router: &str) -> Arc<Self> {
        let inner = Inner { first: Some(wire::hello(router)), ..Inner::default() };
        Arc::new(Self { inner: Mutex::new(inner), wake: Notify::new(), epoch: Instant::now() })
    }

    /// Sends a leg to the worker and its events to `events`. `asks` is what it takes there.
    pub(crate) fn submit(
        self: &Arc<Self>,
        submission: Submission,
        asks: Asks,
        events: &Speaker,
    ) -> Result<LegGuard, Unsent> {
        let attempt = submission.attempt;
        let mut inner = self.lock();
        if inner.closed {
            return Err(Unsent::Gone);
        }
        if inner.submits.len() >= MAX_UNSENT {
            return Err(Unsent::Busy);
        }
        inner.legs.insert(attempt, Leg { events: events.clone() });
        inner.ledger.submit(attempt, asks.compute_ms, asks.pages, self.epoch.elapsed());
        inner.submits.push_back(wire::submit(submission));
        drop(inner);
        self.wake.notify_one();
        Ok(LegGuard { session: self.clone(), attempt })
    }

    /// Calls a leg off. One that has ended, or was never sent, costs nothing.
    fn cancel(&self, attempt: u64) {
        let mut inner = self.lock();
        if inner.forget(attempt).is_none() {
            return;
        }
        if let Some(at) = inner.submits.iter().rposition(|submit| submit.attempt == attempt) {
            inner.submits.remove(at);
            return;
        }
        inner.cancels.push(attempt);
        drop(inner);
        self.wake.notify_one();
    }

    /// Asks the worker for a change of its adapters; `None` when the stream ends before its answer.
    pub(super) async fn change_adapters(&self, change: &Change) -> Option<Result<(), Refusal>> {
        let command = |inner: &mut Inner, number, sender| {
            inner.answers.retain(|_, waiting| !waiting.is_closed());
            inner.answers.insert(number, sender);
            inner.adapter_commands.push(wire::adapter_command(number, change));
        };
        self.ask(command).await
    }

    /// Asks the worker to forget all prefixes. Says whether it did, or `None` when the stream ends before its answer.
    pub(super) async fn reset(&self) -> Option<bool> {
        let command = |inner: &mut Inner, number, sender| {
            inner.resets.retain(|(_, waiting)| !waiting.is_closed());
            inner.resets.push((number, sender));
            inner.reset = Some(number);
        };
        self.ask(command).await
    }

    /// Gives a command the next number and waits for its answer; `None` when the stream ends before that.
    async fn ask<T>(&self, command: impl FnOnce(&mut Inner, u64, oneshot::Sender<T>)) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        {
            let mut inner = self.lock();
            if inner.closed {
                return None;
            }
            inner.next_command += 1;
            let number = inner.next_command;
            command(&mut inner, number, sender);
        }
        self.wake.notify_one();
        answer.await.ok()
    }

    /// Returns the adapters that the worker has.
    pub(super) fn adapters(&self) -> Arc<[Arc<Adapter>]> {
        self.lock().adapters.clone()
    }

    /// Says whether the worker has the adapter with this id.
    pub(super) fn has_adapter(&self, id: &str) -> bool {
        self.lock().adapters.iter().any(|adapter| adapter.id == id)
    }

    /// Asks the worker for a fresh snapshot of its pages.
    pub(super) fn request_resync(&self) {
        self.lock().resync = true;
        self.wake.notify_one();
    }

    /// Sends a probe.
    pub(super) fn ping(&self, number: u64) {
        self.lock().ping = number;
        self.wake.notify_one();
    }

    /// Waits for something to send; `None` when the session is closed. One task calls this.
    pub(super) async fn next_frame(&self) -> Option<RouterFrame> {
        loop {
            {
                let mut inner = self.lock();
                if let Some(first) = inner.first.take() {
                    return Some(first);
                }
                if inner.closed {
                    return None;
                }
                if let Some(frame) = inner.gather() {
                    return Some(frame);
                }
            }
            self.wake.notified().await;
        }
    }

    /// Gives a frame's tokens and last words to their requests and takes its load.
    pub(super) fn receive(&self, frame: &mut WorkerFrame) {
        let mut inner = self.lock();
        let mut tokens = frame.tokens.drain(..).peekable();
        while let Some(token) = tokens.next() {
            let attempt = token.attempt;
            if !token.prompt {
                inner.token(token);
                continue;
            }
            // A chunk of a prompt is one event: as many as it has tokens would be more than a client's queue holds.
            let mut prompt = vec![wire::token(token)];
            while let Some(next) = tokens.next_if(|next| next.prompt && next.attempt == attempt) {
                prompt.push(wire::token(next));
            }
            inner.say(attempt, Said::Prompt(prompt));
        }
        drop(tokens);
        for ended in frame.ended.drain(..) {
            let (attempt, ended) = wire::ended(ended);
            inner.end(attempt, ended);
        }
        if let Some(load) = &frame.load {
            inner.ledger.report(wire::report(load), self.epoch.elapsed());
        }
        // The list first: an answer promises that its effect shows.
        if let Some(adapters) = frame.adapters.take() {
            inner.adapters = wire::adapters(adapters).into();
        }
        for answer in frame.adapter_answers.drain(..) {
            let (command, said) = wire::adapter_answer(answer);
            if let Some(waiting) = inner.answers.remove(&command) {
                // Who asked may have given up.
                let _ = waiting.send(said);
            }
        }
        if let Some(proto::Reset { number, done }) = frame.reset.take() {
            // A later one that went out in its place answers those before it.
            for (_, waiting) in inner.resets.extract_if(.., |(asked, _)| *asked <= number) {
                let _ = waiting.send(done);
            }
        }
        let overflowed = !inner.cancels.is_empty();
        drop(inner);
        if overflowed {
            self.wake.notify_one();
        }
    }

    /// Whether legs are under way.
    pub(super) fn is_busy(&self) -> bool {
        !self.lock().legs.is_empty()
    }

    /// Ends the session; every leg hears why.
    pub(super) fn close(&self, reason: &str) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.submits.clear();
        inner.answers.clear();
        inner.resets.clear();
        let legs: Vec<u64> = inner.legs.keys().copied().collect();
        for attempt in legs {
            inner.end(attempt, Ended::without_numbers(End::Lost(reason.to_string())));
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Returns what a placement should reckon with, and the moment it is asked at.
    pub(super) fn ledger<T>(&self, read: impl FnOnce(&Ledger, Duration) -> T) -> T {
        read(&self.lock().ledger, self.epoch.elapsed())
    }

    /// Notes that a peer was told to fetch from the worker, which takes `ms`.
    pub(super) fn lends(&self, ms: f64) {
        let now = self.epoch.elapsed();
        self.lock().ledger.fetch(ms, now);
    }

    /// Says whether the worker takes nothing new.
    pub(super) fn draining(&self) -> bool {
        self.lock().ledger.last_report().is_some_and(|report| report.draining)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics while it holds a session")
    }
}

impl Inner {
    /// Takes what waits, up to a frame's worth.
    fn gather(&mut self) -> Option<RouterFrame> {
        let nothing_new = self.submits.is_empty() && self.cancels.is_empty() && self.adapter_commands.is_empty();
        if nothing_new && !self.resync && self.ping == 0 && self.reset.is_none() {
            return None;
        }
        let (mut submit, mut bytes) = (Vec::new(), 0);
        while let Some(next) = self.submits.front() {
            bytes += next.tokens.len();
            if bytes > FRAME_BYTES && !submit.is_empty() {
                break;
            }
            submit.extend(self.submits.pop_front());
        }
        Some(RouterFrame {
            hello: None,
            submit,
            cancel: std::mem::take(&mut self.cancels),
            resync: std::mem::take(&mut self.resync),
            ping: std::mem::take(&mut self.ping),
            reset: self.reset.take().unwrap_or_default(),
            adapters: std::mem::take(&mut self.adapter_commands),
        })
    }

    fn token(&mut self, token: proto::Token) {
        let attempt = token.attempt;
        self.say(attempt, Said::Token(wire::token(token)));
    }

    /// Gives an event to its request, whose leg ends when it has no room left.
    fn say(&mut self, attempt: u64, said: Said) {
        let Some(leg) = self.legs.get_mut(&attempt) else { return };
        let event = LegEvent { attempt, said };
        if leg.events.say(event).is_err() {
            self.end(attempt, Ended::without_numbers(End::Overflow));
            self.cancels.push(attempt);
        }
    }

    fn end(&mut self, attempt: u64, ended: Ended) {
        if let Some(leg) = self.forget(attempt) {
            leg.events.last_word(LegEvent { attempt, said: Said::Ended(Box::new(ended)) });
        }
    }

    fn forget(&mut self, attempt: u64) -> Option<Leg> {
        self.ledger.withdraw(attempt);
        self.legs.remove(&attempt)
    }
}

/// A leg under way. Dropping it calls the leg off, unless it has ended.
#[derive(Debug)]
pub(crate) struct LegGuard {
    session: Arc<Session>,
    attempt: u64,
}

impl LegGuard {
    /// The leg's number, as its events carry it.
    pub(crate) fn attempt(&self) -> u64 {
        self.attempt
    }
}

impl Drop for LegGuard {
    fn drop(&mut self) {
        self.session.cancel(self.attempt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{events::channel, leg::tests::submission};

    fn frame(session: &Session) -> Option<RouterFrame> {
        futures::FutureExt::now_or_never(session.next_frame()).flatten()
    }

    fn attached() -> Arc<Session> {
        let session = Session::new("r");
        assert!(frame(&session).is_some_and(|f| f.hello.is_some() && f.resync));
        session
    }

    fn token(attempt: u64, index: u32) -> proto::Token {
        proto::Token { attempt, index, token: 7, ..proto::Token::default() }
    }

    #[test]
    fn submissions_and_cancels_share_a_frame() {
        let session = attached();
        let (tx, _rx) = channel(8);
        let first = session.submit(submission(1, 10), Asks::default(), &tx).unwrap();
        let _second = session.submit(submission(2, 10), Asks::default(), &tx).unwrap();
        let sent = frame(&session).unwrap();
        assert_eq!(sent.submit.iter().map(|s| s.attempt).collect::<Vec<_>>(), [1, 2]);
        let third = session.submit(submission(3, 10), Asks::default(), &tx).unwrap();
        drop(third);
        drop(first);
        let sent = frame(&session).unwrap();
        assert_eq!(sent.cancel, [1], "a submission that was never sent needs no cancel");
        assert!(sent.submit.is_empty());
        assert!(frame(&session).is_none());
    }

    #[test]
    fn one_answer_is_for_all_who_asked_for_a_reset_before_it() {
        let session = attached();
        let ask = || Box::pin(session.reset());
        let (mut first, mut second, mut third) = (ask(), ask(), ask());
        let heard = |asked: &mut _| futures::FutureExt::now_or_never(asked);
        assert_eq!((heard(&mut first), heard(&mut second)), (None, None));
        assert_eq!(frame(&session).map(|frame| frame.reset), Some(2));
        assert_eq!(heard(&mut third), None);
        let reset = Some(proto::Reset { number: 2, done: true });
        session.receive(&mut WorkerFrame { reset, ..WorkerFrame::default() });
        assert_eq!(
            (heard(&mut first), heard(&mut second), heard(&mut third)),
            (Some(Some(true)), Some(Some(true)), None)
        );
        session.close("gone");
        assert_eq!(heard(&mut third), Some(None));
    }

    #[test]
    fn long_prompts_are_spread_over_frames() {
        let session = attached();
        let (tx, _rx) = channel(8);
        let _guards: Vec<_> = (0..3)
            .map(|attempt| session.submit(submission(attempt, 100 << 10), Asks::default(), &tx).unwrap())
            .collect();
        for _ in 0..3 {
            assert_eq!(frame(&session).unwrap().submit.len(), 1);
        }
        assert!(frame(&session).is_none());
    }

    #[test]
    fn a_full_queue_ends_the_leg_and_its_last_word_still_arrives() {
        let session = attached();
        let (tx, mut rx) = channel(2);
        let _guard = session.submit(submission(1, 10), Asks::default(), &tx).unwrap();
        frame(&session);
        let mut received = WorkerFrame { tokens: (0..5).map(|i| token(1, i)).collect(), ..WorkerFrame::default() };
        session.receive(&mut received);
        let events = rx.heard();
        assert_eq!(events.len(), 3);
        assert!(matches!(&events[2].said, Said::Ended(ended) if ended.end == End::Overflow), "{:?}", events[2]);
        assert_eq!(frame(&session).unwrap().cancel, [1]);
    }

    #[test]
    fn a_lost_stream_is_every_legs_last_word() {
        let session = attached();
        let (tx, mut rx) = channel(8);
        let guard = session.submit(submission(1, 10), Asks::default(), &tx).unwrap();
        session.close("connection reset");
        assert!(matches!(&rx.heard()[0].said, Said::Ended(e) if e.end == End::Lost("connection reset".into())));
        assert_eq!(session.submit(submission(2, 10), Asks::default(), &tx).unwrap_err(), Unsent::Gone);
        drop(guard);
        assert!(frame(&session).is_none());
    }

    #[test]
    fn load_is_the_report_and_what_it_does_not_know_of() {
        let session = attached();
        let (tx, _rx) = channel(8);
        // What was sent shrinks as time passes: a thousand rounded by less than one here.
        let rounded = |ms: f64| (ms / 1e4).round() * 1e4;
        let load = || session.ledger(|ledger, now| (ledger.sequences(), rounded(ledger.backlog_ms(now))));
        let asks = Asks { compute_ms: 1e6, pages: 3 };
        let _a = session.submit(submission(1, 100), asks, &tx).unwrap();
        let b = session.submit(submission(2, 100), asks, &tx).unwrap();
        assert_eq!(load(), (2, 2e6));
        let pace = Some(proto::Pace { step_us: 10.0, token_us: 2.0, ..Default::default() });
        let report = proto::Load { received: 1, legs: 5, pages_free: 90, pages_total: 100, pace, ..Default::default() };
        session.receive(&mut WorkerFrame { load: Some(report), ..WorkerFrame::default() });
        assert_eq!(load(), (6, 1e6));
        assert_eq!(session.ledger(|ledger, _| (ledger.free_pages(7), ledger.held_pages())), (87, 13));
        assert_eq!(session.ledger(|ledger, _| ledger.speed().pace.map(|pace| pace.token_us)), Some(2.0));
        drop(b);
        assert_eq!(load(), (5, 0.0), "what is called off before the worker knows of it does not count");
    }
}
