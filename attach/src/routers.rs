//! The routers of a worker, as its step thread sees them.

use crate::{LegId, Load, Router, StreamId};
use bytes::Bytes;
use engine::{
    Sampled, TokenId,
    scheduler::{Reported, Usage},
};
use kv_cache::{CacheDelta, PageHash, PagePool};
use proto::ended::Reason;
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Load goes out with every frame, and alone at most this often.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);
/// Most hashes in one message: 1 MiB.
const MESSAGE_HASHES: usize = (1 << 20) / 16;

/// How a leg ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// This token, an end-of-sequence or stop id, was drawn (and emitted).
    Stop(TokenId),
    /// `max_tokens` or the context length was reached.
    Length,
    /// The decode worker owns the sequence now.
    HandedOff,
    /// An embed leg has its vector.
    Embedded(Vec<f32>),
    /// The router asked.
    Cancelled,
    /// The leg died; another attempt may succeed elsewhere.
    Failed(String),
    /// Not admitted; another worker may take it.
    Refused(String),
    /// No worker could do it.
    Invalid(String),
}

/// Gathers what each router is told, and hands it over once per step.
#[derive(Debug, Default)]
pub struct Routers {
    streams: HashMap<StreamId, Staged>,
    load_due: Option<Instant>,
}

#[derive(Debug)]
struct Staged {
    router: Router,
    tokens: Vec<proto::Token>,
    ended: Vec<proto::Ended>,
    /// Whether the router is to get the whole set of reusable prefixes.
    snapshot: bool,
    /// The highest attempt that the step thread has taken.
    received: u64,
    /// What the router was last told, and which attempts that knew of.
    load: Option<(Load, u64)>,
    load_sent: Option<Instant>,
}

impl Routers {
    /// Adds a router. It gets a snapshot of the reusable prefixes first.
    pub fn attach(&mut self, router: Router) {
        let id = router.id();
        let (tokens, ended) = (Vec::new(), Vec::new());
        self.streams
            .insert(id, Staged { router, tokens, ended, snapshot: true, received: 0, load: None, load_sent: None });
    }

    /// Forgets a router. What is staged for its legs from now on goes nowhere.
    pub fn detach(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
    }

    /// Notes that the step thread has taken a submission: the next load counts it.
    pub fn received(&mut self, leg: LegId) {
        if let Some(staged) = self.streams.get_mut(&leg.stream) {
            staged.received = staged.received.max(leg.attempt);
        }
    }

    /// Gives the router a fresh snapshot of the reusable prefixes.
    pub fn resync(&mut self, stream: StreamId) {
        if let Some(staged) = self.streams.get_mut(&stream) {
            staged.snapshot = true;
        }
    }

    /// Says whether all prefixes were forgotten, as a router asked under this number.
    pub fn reset(&mut self, stream: StreamId, number: u64, done: bool) {
        if let Some(staged) = self.streams.get(&stream) {
            staged.router.reset(proto::Reset { number, done });
        }
    }

    /// Ends a stream because its router broke the protocol.
    pub fn expel(&mut self, stream: StreamId, why: &str) {
        if let Some(staged) = self.streams.remove(&stream) {
            tracing::warn!(stream = stream.0, why, "router expelled");
            staged.router.end(tonic::Status::invalid_argument(why));
        }
    }

    /// Stages a token.
    pub fn token(&mut self, leg: LegId, index: usize, sampled: Sampled) {
        self.stage(leg, index, sampled, false);
    }

    /// Stages what was asked about tokens of a leg's prompt.
    pub fn reported(&mut self, leg: LegId, reported: Reported) {
        for (position, token) in (reported.position..).zip(reported.tokens) {
            self.stage(leg, position, token, true);
        }
    }

    fn stage(&mut self, leg: LegId, index: usize, sampled: Sampled, prompt: bool) {
        if let Some(staged) = self.streams.get_mut(&leg.stream) {
            let logprobs = sampled.logprobs.map(|logprobs| {
                let (top_tokens, top_logprobs) = logprobs.top.into_iter().unzip();
                proto::Logprobs { logprob: logprobs.logprob, rank: logprobs.rank, top_tokens, top_logprobs }
            });
            let (attempt, index, token) = (leg.attempt, index as u32, sampled.token);
            staged.tokens.push(proto::Token { attempt, index, token, logprobs, prompt });
        }
    }

    /// Stages the last word about a leg.
    pub fn ended(&mut self, leg: LegId, end: End, usage: Usage) {
        if let Some(staged) = self.streams.get_mut(&leg.stream) {
            staged.ended.push(encode_ended(leg.attempt, end, usage));
        }
    }

    /// Hands over what is staged: at most one frame's worth per router. `delta` is what changed since the last flush, and
    /// `pool` holds the whole.
    pub fn flush(&mut self, now: Instant, delta: CacheDelta, pool: &PagePool, load: &Load) {
        let changes = (!delta.is_empty()).then(|| encode_delta(&delta));
        self.load_due = None;
        for staged in self.streams.values_mut() {
            let mut sending = !staged.tokens.is_empty() || !staged.ended.is_empty();
            if sending {
                staged.router.events(&mut staged.tokens, &mut staged.ended);
            }
            if std::mem::take(&mut staged.snapshot) {
                staged.router.snapshot(encode_snapshot(pool));
                sending = true;
            } else if let Some(changes) = &changes {
                changes.iter().for_each(|(stored, evicted)| staged.router.pages(stored.clone(), evicted.clone()));
                sending = true;
            }
            let due = staged.send_load(now, load, sending);
            self.load_due = [self.load_due, due].into_iter().flatten().min();
        }
    }

    /// Returns when [`Routers::flush`] should be called next even if nothing happens: load that was held back goes out then.
    pub fn load_due(&self) -> Option<Instant> {
        self.load_due
    }

    /// Ends every stream after what was handed over.
    pub fn finish(&mut self) {
        self.streams.drain().for_each(|(_, staged)| staged.router.finish());
    }
}

impl Staged {
    /// Adds load to a frame that goes anyway, or sends it alone when the last time is long enough ago. Returns when it should go
    /// out if it was held back.
    fn send_load(&mut self, now: Instant, load: &Load, sending: bool) -> Option<Instant> {
        let said = (*load, self.received);
        if self.load == Some(said) {
            return None;
        }
        let due = self.load_sent.map(|sent| sent + LOAD_INTERVAL).filter(|&due| due > now && !sending);
        if due.is_none() {
            self.router.load(load.encode(self.received));
            self.load = Some(said);
            self.load_sent = Some(now);
        }
        due
    }
}

/// Encodes the last word about an attempt.
pub(crate) fn encode_ended(attempt: u64, end: End, usage: Usage) -> proto::Ended {
    let mut embedding = Vec::new();
    let (reason, stop_token, message) = match end {
        End::Stop(token) => (Reason::Stop, token, String::new()),
        End::Length => (Reason::Length, 0, String::new()),
        End::HandedOff => (Reason::HandedOff, 0, String::new()),
        End::Embedded(vector) => {
            embedding = vector;
            (Reason::Embedded, 0, String::new())
        }
        End::Cancelled => (Reason::Cancelled, 0, String::new()),
        End::Failed(why) => (Reason::Failed, 0, why),
        End::Refused(why) => (Reason::Refused, 0, why),
        End::Invalid(why) => (Reason::Invalid, 0, why),
    };
    let micros = |duration: Duration| duration.as_micros().try_into().unwrap_or(u32::MAX);
    proto::Ended {
        attempt,
        reason: reason.into(),
        stop_token,
        message,
        cached_tokens: usage.cached_tokens as u32,
        fetched_tokens: usage.fetched_tokens as u32,
        queue_us: micros(usage.queue),
        prefill_us: micros(usage.prefill),
        embedding,
    }
}

fn encode_hashes(hashes: &[PageHash]) -> Bytes {
    hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Cuts a change into messages of bounded size.
fn encode_delta(delta: &CacheDelta) -> Vec<(Bytes, Bytes)> {
    let (mut stored, mut evicted) = (delta.stored.chunks(MESSAGE_HASHES), delta.evicted.chunks(MESSAGE_HASHES));
    std::iter::from_fn(|| match (stored.next(), evicted.next()) {
        (None, None) => None,
        (stored, evicted) => {
            Some((encode_hashes(stored.unwrap_or_default()), encode_hashes(evicted.unwrap_or_default())))
        }
    })
    .collect()
}

/// Cuts the whole set into messages of bounded size; an empty set is one empty message.
fn encode_snapshot(pool: &PagePool) -> Vec<Bytes> {
    let named: Vec<PageHash> = pool.named().collect();
    if named.is_empty() {
        return vec![Bytes::new()];
    }
    named.chunks(MESSAGE_HASHES).map(encode_hashes).collect()
}
