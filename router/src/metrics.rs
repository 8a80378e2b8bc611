//! What the router counts. Handles are made once; a look-up per token would cost more than the token.

mod vllm;

pub(crate) use vllm::Told;

use crate::request::Finish;
use admission::Refusal;
use metrics::{Counter, Gauge, Histogram};
use placement::Kind;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use vllm::Vllm;

/// An endpoint, as metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    Embeddings,
    Messages,
    Responses,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered in full.
    Ok,
    /// The request itself was wrong.
    Invalid,
    /// Not taken: overload, draining, or no path.
    Rejected,
    /// The client went away.
    Cancelled,
    /// Workers or time failed it.
    Failed,
}

const ENDPOINTS: [&str; 5] = ["chat_completions", "completions", "embeddings", "messages", "responses"];
const OUTCOMES: [&str; 5] = ["ok", "invalid", "rejected", "cancelled", "failed"];

/// Why a leg was placed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryReason {
    Lost,
    Failed,
    Refused,
    Stalled,
}

const RETRY_REASONS: [&str; 4] = ["lost", "failed", "refused", "stalled"];

/// Handles of all the router's metrics. Cloning shares them.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    inner: Arc<Handles>,
}

struct Handles {
    ttft: Histogram,
    itl: Histogram,
    duration: [Histogram; 5],
    requests: [[Counter; 5]; 5],
    in_flight: Gauge,
    /// The same number, to be read.
    open: AtomicUsize,
    queue_depth: Gauge,
    queue_wait: Histogram,
    refused: [Counter; 3],
    prompt_tokens: Counter,
    cached_tokens: Counter,
    output_tokens: Counter,
    placements: [Counter; 2],
    retries: [Counter; 4],
    fleet: [Gauge; 2],
    prefix_index_bytes: Gauge,
    text_cache_bytes: Gauge,
    vllm: Vllm,
    adapters: Mutex<InUse>,
}

/// By adapter: requests that wait for their turn, and those that have it. Without either it is not here.
type InUse = BTreeMap<String, [usize; 2]>;

/// Counts a request that was turned away at the door.
pub(crate) fn turned_away(status: u16) {
    metrics::counter!("baton_requests_turned_away_total", "status" => status.to_string()).increment(1);
}

impl std::fmt::Debug for Handles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handles")
    }
}

impl Metrics {
    /// Registers everything, so that a metric is there before it first moves.
    pub(crate) fn new(model: &str) -> Self {
        describe();
        let requests = |endpoint: &'static str| {
            OUTCOMES
                .map(|outcome| metrics::counter!("baton_requests_total", "endpoint" => endpoint, "outcome" => outcome))
        };
        let inner = Handles {
            ttft: metrics::histogram!("baton_request_ttft_seconds"),
            itl: metrics::histogram!("baton_request_itl_seconds"),
            duration: ENDPOINTS
                .map(|endpoint| metrics::histogram!("baton_request_duration_seconds", "endpoint" => endpoint)),
            requests: ENDPOINTS.map(requests),
            in_flight: metrics::gauge!("baton_requests_in_flight"),
            open: AtomicUsize::new(0),
            queue_depth: metrics::gauge!("baton_router_queue_depth"),
            queue_wait: metrics::histogram!("baton_router_queue_seconds"),
            refused: ["full", "expired", "too_slow"]
                .map(|reason| metrics::counter!("baton_router_refusals_total", "reason" => reason)),
            prompt_tokens: metrics::counter!("baton_prompt_tokens_total"),
            cached_tokens: metrics::counter!("baton_prompt_tokens_cached_total"),
            output_tokens: metrics::counter!("baton_output_tokens_total"),
            placements: ["local", "remote"].map(|kind| metrics::counter!("baton_placements_total", "kind" => kind)),
            retries: RETRY_REASONS.map(|reason| metrics::counter!("baton_retries_total", "reason" => reason)),
            fleet: ["prefill", "decode"].map(|role| metrics::gauge!("baton_fleet_workers", "role" => role)),
            prefix_index_bytes: metrics::gauge!("baton_prefix_index_bytes"),
            vllm: Vllm::new(model),
            text_cache_bytes: metrics::gauge!("baton_text_cache_bytes"),
            adapters: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Counts a request in; the guard counts it out.
    pub(crate) fn request(&self, endpoint: Endpoint) -> RequestGuard {
        self.inner.in_flight.increment(1.0);
        self.inner.open.fetch_add(1, Ordering::Relaxed);
        RequestGuard {
            metrics: self.clone(),
            endpoint,
            started: tokio::time::Instant::now(),
            outcome: Outcome::Cancelled,
            adapter: None,
        }
    }

    /// Returns which adapters are in use, as vLLM's `lora_requests_info` says it, in the text form of metrics. `served`: how many there are.
    pub(crate) fn adapters_in_use(&self, served: usize) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        vllm::lora_requests_info(served, &self.inner.in_use(), now)
    }

    /// Returns how many requests are being answered or waiting for their turn.
    pub(crate) fn in_flight(&self) -> usize {
        self.inner.open.load(Ordering::Relaxed)
    }

    pub(crate) fn queued(&self, depth: usize) {
        self.inner.queue_depth.set(depth as f64);
    }

    /// A request that had to wait for its turn is out of the queue.
    pub(crate) fn waited(&self, wait: Duration) {
        self.inner.queue_wait.record(wait.as_secs_f64());
    }

    /// Counts a request that gets no turn.
    pub(crate) fn refused(&self, refusal: Refusal) {
        let reason = match refusal {
            Refusal::Full { .. } => 0,
            Refusal::Expired { .. } => 1,
            Refusal::TooSlow { .. } => 2,
        };
        self.inner.refused[reason].increment(1);
    }

    /// The circuit breaker of a worker opened or closed.
    pub(crate) fn breaker(&self, worker: &str, open: bool) {
        metrics::gauge!("baton_worker_breaker_open", "worker" => worker.to_string()).set(f64::from(open));
        if open {
            metrics::counter!("baton_worker_breaker_openings_total", "worker" => worker.to_string()).increment(1);
        }
    }

    pub(crate) fn first_token(&self, seconds: f64) {
        self.inner.ttft.record(seconds);
        self.inner.vllm.first_token.record(seconds);
    }

    /// `count` tokens came `seconds` apart.
    pub(crate) fn next_tokens(&self, seconds: f64, count: usize) {
        self.inner.itl.record_many(seconds, count);
        self.inner.vllm.next_token.record_many(seconds, count);
    }

    /// Counts what a request asks for.
    pub(crate) fn asked(&self, choices: u32, max_tokens: Option<u32>) {
        self.inner.vllm.asked(choices, max_tokens);
    }

    /// Counts a choice that came to its end.
    pub(crate) fn told(&self, told: &Told, finish: &Finish) {
        self.inner.prompt_tokens.increment(u64::from(told.prompt_tokens));
        self.inner.cached_tokens.increment(u64::from(told.cached.tokens));
        self.inner.output_tokens.increment(u64::from(told.output_tokens));
        self.inner.vllm.told(told, finish);
    }

    /// Counts the longest choice of a request that came to its end.
    pub(crate) fn longest(&self, output_tokens: u32) {
        self.inner.vllm.most(output_tokens);
    }

    pub(crate) fn placed(&self, remote: bool) {
        self.inner.placements[usize::from(remote)].increment(1);
    }

    pub(crate) fn retried(&self, reason: RetryReason) {
        self.inner.retries[reason as usize].increment(1);
    }

    pub(crate) fn fleet_size(&self, kind: Kind, attached: usize) {
        self.inner.fleet[usize::from(kind == Kind::Decode)].set(attached as f64);
    }

    pub(crate) fn caches(&self, prefix_index_bytes: usize, text_bytes: usize) {
        self.inner.prefix_index_bytes.set(prefix_index_bytes as f64);
        self.inner.text_cache_bytes.set(text_bytes as f64);
    }
}

impl Handles {
    /// The counts are whole between any two statements that could panic, so a poisoned lock is as good as another.
    fn in_use(&self) -> MutexGuard<'_, InUse> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says what each metric is, for those who find it on a dashboard.
fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_histogram!("baton_request_ttft_seconds", "From a request's arrival to its first token.");
    describe_histogram!("baton_request_itl_seconds", "Between two tokens of a choice.");
    describe_histogram!("baton_request_duration_seconds", "From a request's arrival to its last token.");
    describe_counter!("baton_requests_total", "Requests by endpoint and outcome.");
    describe_counter!(
        "baton_requests_turned_away_total",
        "Requests answered at the door, by status; not among the others."
    );
    describe_gauge!("baton_requests_in_flight", "Requests being answered or waiting for their turn.");
    describe_gauge!("baton_router_queue_depth", "Requests waiting for their turn.");
    describe_histogram!("baton_router_queue_seconds", "Waits for a turn of requests that had to wait.");
    describe_counter!(
        "baton_router_refusals_total",
        "Requests that got no turn: full, expired (none came free in time), too_slow (the first token would come too late)."
    );
    describe_gauge!("baton_worker_breaker_open", "Whether this router shuns a worker that keeps failing.");
    describe_counter!("baton_worker_breaker_openings_total", "Times a worker's circuit breaker opened.");
    describe_counter!("baton_prompt_tokens_total", "Prompt tokens of finished choices.");
    describe_counter!("baton_prompt_tokens_cached_total", "Of those, tokens a worker had cached.");
    describe_counter!("baton_output_tokens_total", "Output tokens of finished choices.");
    describe_counter!("baton_placements_total", "Attempts placed: local (prefill on the decode worker) or remote.");
    describe_counter!("baton_retries_total", "Attempts placed again, by what happened to the one before.");
    describe_gauge!("baton_fleet_workers", "Workers attached to this router.");
    describe_gauge!("baton_prefix_index_bytes", "Memory of the prefix index.");
    describe_gauge!("baton_text_cache_bytes", "Memory of remembered tokens and page names of prompts.");
}

/// A request under way. Dropped without an outcome, its client has gone away.
#[derive(Debug)]
pub(crate) struct RequestGuard {
    metrics: Metrics,
    endpoint: Endpoint,
    started: tokio::time::Instant,
    outcome: Outcome,
    /// The adapter it wants, and whether it has its turn.
    adapter: Option<(String, bool)>,
}

impl RequestGuard {
    /// Notes that the request waits for its turn with an adapter.
    pub(crate) fn waits(&mut self, adapter: &str) {
        self.metrics.inner.in_use().entry(adapter.to_owned()).or_default()[0] += 1;
        self.adapter = Some((adapter.to_owned(), false));
    }

    /// Notes that it has its turn.
    pub(crate) fn runs(&mut self) {
        let Some((adapter, runs)) = &mut self.adapter else { return };
        if let Some([waiting, running]) = self.metrics.inner.in_use().get_mut(adapter)
            && !std::mem::replace(runs, true)
        {
            (*waiting, *running) = (*waiting - 1, *running + 1);
        }
    }

    /// Notes how the request ended.
    pub(crate) fn ended(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let (handles, endpoint) = (&self.metrics.inner, self.endpoint as usize);
        handles.in_flight.decrement(1.0);
        handles.open.fetch_sub(1, Ordering::Relaxed);
        handles.duration[endpoint].record(self.started.elapsed().as_secs_f64());
        handles.requests[endpoint][self.outcome as usize].increment(1);
        handles.vllm.unfinished(self.outcome);
        if let Some((adapter, runs)) = &self.adapter {
            let mut in_use = handles.in_use();
            if let Some(counts) = in_use.get_mut(adapter) {
                counts[usize::from(*runs)] -= 1;
                if *counts == [0; 2] {
                    in_use.remove(adapter);
                }
            }
        }
    }
}
