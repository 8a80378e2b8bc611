//! What is on its way to one router.
//!
//! The step thread adds, gRPC takes. Between two takes things gather, so a router that reads slower than the worker steps gets
//! fewer and larger frames, in order. The written answers to *full*:
//! - tokens and embeddings: the router is too slow for what it asked; its stream ends, and with it all it submitted;
//! - page events: they are dropped but counted, so the router sees a gap and asks for a snapshot;
//! - load: the newest replaces what waits.

use crate::StreamId;
use futures::{Stream, task::AtomicWaker};
use proto::{AdapterAnswer, Adapters, Ended, Load, PageEvents, Reset, Token, Welcome, WorkerFrame};
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Most tokens in a frame, alternatives and pairs of an embedding's numbers counted: keeps frames under 4 MiB, the usual limit of a gRPC
/// message.
const MAX_FRAME_WEIGHT: usize = 64 << 10;
/// Most tokens that wait, counted likewise: seconds of a full batch, and tens of megabytes at the very worst.
const MAX_WAITING_WEIGHT: usize = 512 << 10;
/// Most bytes of page events that wait.
const MAX_WAITING_PAGE_BYTES: usize = 4 << 20;

/// One router's stream, as the worker holds it.
#[derive(Debug)]
pub struct Router {
    id: StreamId,
    shared: Arc<Shared>,
}

/// The same stream, as gRPC polls it. Dropping it detaches the router.
#[derive(Debug)]
pub(crate) struct Frames {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    waker: AtomicWaker,
    /// Cancelled when nothing more will be sent.
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    welcome: Option<Welcome>,
    tokens: VecDeque<Token>,
    ended: VecDeque<Ended>,
    /// Of both.
    weight: usize,
    pages: VecDeque<PageEvents>,
    page_bytes: usize,
    page_sequence: u64,
    load: Option<Load>,
    pong: u64,
    reset: Option<Reset>,
    adapters: Option<Adapters>,
    answers: Vec<AdapterAnswer>,
    /// Set once: how the stream ends after what is still here.
    end: Option<Result<(), Status>>,
}

/// Makes the two sides of a stream that ends when `closed` is cancelled.
pub(crate) fn outbox(id: StreamId, closed: CancellationToken) -> (Router, Frames) {
    let shared = Arc::new(Shared { state: Mutex::default(), waker: AtomicWaker::new(), closed });
    (Router { id, shared: shared.clone() }, Frames { shared })
}

impl Router {
    /// Returns the stream's name.
    pub fn id(&self) -> StreamId {
        self.id
    }

    pub(crate) fn share(&self) -> Self {
        Self { id: self.id, shared: self.shared.clone() }
    }

    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.shared.closed
    }

    pub(crate) fn welcome(&self, welcome: Welcome, adapters: Adapters) {
        self.with(|state| {
            state.welcome = Some(welcome);
            state.adapters = Some(adapters);
        });
    }

    pub(crate) fn pong(&self, ping: u64) {
        self.with(|state| state.pong = ping);
    }

    /// Answers a reset, and with it those before it.
    pub(crate) fn reset(&self, reset: Reset) {
        self.with(|state| state.reset = Some(reset));
    }

    /// Adds the events of one step, leaving `tokens` and `ended` empty.
    pub(crate) fn events(&self, tokens: &mut Vec<Token>, ended: &mut Vec<Ended>) {
        self.with(|state| {
            state.weight += tokens.iter().map(weight).sum::<usize>() + ended.iter().map(ended_weight).sum::<usize>();
            state.tokens.extend(tokens.drain(..));
            state.ended.extend(ended.drain(..));
            if state.weight > MAX_WAITING_WEIGHT {
                let (tokens, ended) = (state.tokens.len(), state.ended.len());
                let message = format!("the router reads too slowly: {tokens} tokens and the ends of {ended} legs wait");
                state.end_now(Status::resource_exhausted(message));
            }
        });
    }

    /// Adds a change of the reusable prefixes, or counts it as missed when too much waits already.
    pub(crate) fn pages(&self, stored: bytes::Bytes, evicted: bytes::Bytes) {
        self.with(|state| {
            if state.page_bytes + stored.len() + evicted.len() > MAX_WAITING_PAGE_BYTES {
                state.page_sequence += 1;
                return;
            }
            state.push_pages(PageEvents { stored, evicted, ..Default::default() });
        });
    }

    /// Adds the whole set of reusable prefixes, in place of all that waits.
    pub(crate) fn snapshot(&self, parts: Vec<bytes::Bytes>) {
        self.with(|state| {
            state.pages.clear();
            state.page_bytes = 0;
            let last = parts.len() - 1;
            for (index, stored) in parts.into_iter().enumerate() {
                state.push_pages(PageEvents { snapshot: true, stored, more: index < last, ..Default::default() });
            }
        });
    }

    pub(crate) fn load(&self, load: Load) {
        self.with(|state| state.load = Some(load));
    }

    /// Says which adapters there are; the newest list replaces what waits.
    pub(crate) fn adapters(&self, adapters: Adapters) {
        self.with(|state| state.adapters = Some(adapters));
    }

    /// Answers a command about adapters.
    pub(crate) fn answer(&self, answer: AdapterAnswer) {
        self.with(|state| state.answers.push(answer));
    }

    /// Ends the stream at once; what waits is lost.
    pub(crate) fn end(&self, status: Status) {
        self.with(|state| state.end_now(status));
    }

    /// Ends the stream after what waits.
    pub(crate) fn finish(&self) {
        self.with(|state| {
            state.end.get_or_insert(Ok(()));
        });
    }

    fn with(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        if state.end.is_none() {
            change(&mut state);
        }
        let ended = state.end.is_some();
        drop(state);
        self.shared.waker.wake();
        if ended {
            self.shared.closed.cancel();
        }
    }
}

impl Shared {
    /// The state is whole between any two statements that could panic, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a token and its alternatives.
fn weight(token: &Token) -> usize {
    1 + token.logprobs.as_ref().map_or(0, |logprobs| logprobs.top_tokens.len())
}

/// Counts an embedding: two numbers take about as much as an alternative.
fn ended_weight(ended: &Ended) -> usize {
    ended.embedding.len() / 2
}

impl State {
    fn push_pages(&mut self, events: PageEvents) {
        self.page_sequence += 1;
        self.page_bytes += events.stored.len() + events.evicted.len();
        self.pages.push_back(PageEvents { sequence: self.page_sequence, ..events });
    }

    fn end_now(&mut self, status: Status) {
        *self = State { end: Some(Err(status)), ..Default::default() };
    }

    /// Takes the next frame: as much as fits, tokens before the ends they lead to.
    fn take(&mut self) -> Option<WorkerFrame> {
        let mut frame = WorkerFrame { welcome: self.welcome.take(), ..Default::default() };
        (frame.tokens, frame.ended) = self.take_events();
        frame.pages = self.pages.pop_front();
        if let Some(pages) = &frame.pages {
            self.page_bytes -= pages.stored.len() + pages.evicted.len();
        }
        frame.load = self.load.take();
        frame.pong = std::mem::take(&mut self.pong);
        frame.reset = self.reset.take();
        frame.adapters = self.adapters.take();
        frame.adapter_answers = std::mem::take(&mut self.answers);
        (frame != WorkerFrame::default()).then_some(frame)
    }

    /// Takes what fits in a frame: at least one of what waits, and ends once all tokens are out.
    fn take_events(&mut self) -> (Vec<Token>, Vec<Ended>) {
        if self.weight <= MAX_FRAME_WEIGHT {
            self.weight = 0;
            return (std::mem::take(&mut self.tokens).into(), std::mem::take(&mut self.ended).into());
        }
        let mut taken = 0;
        let mut fits = |weight: usize| {
            taken += weight;
            taken <= MAX_FRAME_WEIGHT
        };
        let count = self.tokens.iter().take_while(|token| fits(weight(token))).count();
        let tokens: Vec<Token> = self.tokens.drain(..count).collect();
        let count = if self.tokens.is_empty() {
            self.ended.iter().take_while(|ended| fits(ended_weight(ended))).count()
        } else {
            0
        };
        let ended: Vec<Ended> = self.ended.drain(..count).collect();
        self.weight -= tokens.iter().map(weight).sum::<usize>() + ended.iter().map(ended_weight).sum::<usize>();
        (tokens, ended)
    }
}

impl Stream for Frames {
    type Item = Result<WorkerFrame, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // Registered before the look, so that what is added after it wakes us.
        self.shared.waker.register(context.waker());
        let mut state = self.shared.lock();
        if let Some(frame) = state.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        match &mut state.end {
            None => Poll::Pending,
            Some(end) => Poll::Ready(std::mem::replace(end, Ok(())).err().map(Err)),
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}
