//! What the router counts. Handles are made once; a look-up per token would cost more than the token.

use crate::placement::Kind;
use metrics::{Counter, Gauge, Histogram};
use std::sync::Arc;

/// An endpoint, as metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
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

const ENDPOINTS: [&str; 2] = ["chat_completions", "completions"];
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
    duration: [Histogram; 2],
    requests: [[Counter; 5]; 2],
    in_flight: Gauge,
    queue_depth: Gauge,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    output_tokens: Counter,
    placements: [Counter; 2],
    retries: [Counter; 4],
    fleet: [Gauge; 2],
    prefix_index_bytes: Gauge,
}

impl std::fmt::Debug for Handles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handles")
    }
}

impl Metrics {
    /// Registers everything, so that a metric is there before it first moves.
    pub(crate) fn new() -> Self {
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
            queue_depth: metrics::gauge!("baton_router_queue_depth"),
            prompt_tokens: metrics::counter!("baton_prompt_tokens_total"),
            cached_tokens: metrics::counter!("baton_prompt_tokens_cached_total"),
            output_tokens: metrics::counter!("baton_output_tokens_total"),
            placements: ["local", "remote"].map(|kind| metrics::counter!("baton_placements_total", "kind" => kind)),
            retries: RETRY_REASONS.map(|reason| metrics::counter!("baton_retries_total", "reason" => reason)),
            fleet: ["prefill", "decode"].map(|role| metrics::gauge!("baton_fleet_workers", "role" => role)),
            prefix_index_bytes: metrics::gauge!("baton_prefix_index_bytes"),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Counts a request in; the guard counts it out.
    pub(crate) fn request(&self, endpoint: Endpoint) -> RequestGuard {
        self.inner.in_flight.increment(1.0);
        RequestGuard {
            metrics: self.clone(),
            endpoint,
            started: tokio::time::Instant::now(),
            outcome: Outcome::Cancelled,
        }
    }

    pub(crate) fn queued(&self, depth: usize) {
        self.inner.queue_depth.set(depth as f64);
    }

    pub(crate) fn first_token(&self, seconds: f64) {
        self.inner.ttft.record(seconds);
    }

    /// `count` tokens came `seconds` apart.
    pub(crate) fn next_tokens(&self, seconds: f64, count: usize) {
        self.inner.itl.record_many(seconds, count);
    }

    pub(crate) fn tokens(&self, prompt: u32, cached: u32, output: u32) {
        self.inner.prompt_tokens.increment(u64::from(prompt));
        self.inner.cached_tokens.increment(u64::from(cached));
        self.inner.output_tokens.increment(u64::from(output));
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

    pub(crate) fn prefix_index(&self, bytes: usize) {
        self.inner.prefix_index_bytes.set(bytes as f64);
    }
}

/// Says what each metric is, for those who find it on a dashboard.
fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_histogram!("baton_request_ttft_seconds", "From a request's arrival to its first token.");
    describe_histogram!("baton_request_itl_seconds", "Between two tokens of a choice.");
    describe_histogram!("baton_request_duration_seconds", "From a request's arrival to its last token.");
    describe_counter!("baton_requests_total", "Requests by endpoint and outcome.");
    describe_gauge!("baton_requests_in_flight", "Requests being answered or waiting for their turn.");
    describe_gauge!("baton_router_queue_depth", "Requests waiting for their turn.");
    describe_counter!("baton_prompt_tokens_total", "Prompt tokens of finished choices.");
    describe_counter!("baton_prompt_tokens_cached_total", "Of those, tokens a worker had cached.");
    describe_counter!("baton_output_tokens_total", "Output tokens of finished choices.");
    describe_counter!("baton_placements_total", "Attempts placed: local (prefill on the decode worker) or remote.");
    describe_counter!("baton_retries_total", "Attempts placed again, by what happened to the one before.");
    describe_gauge!("baton_fleet_workers", "Workers attached to this router.");
    describe_gauge!("baton_prefix_index_bytes", "Memory of the prefix index.");
}

/// A request under way. Dropped without an outcome, its client has gone away.
#[derive(Debug)]
pub(crate) struct RequestGuard {
    metrics: Metrics,
    endpoint: Endpoint,
    started: tokio::time::Instant,
    outcome: Outcome,
}

impl RequestGuard {
    /// Notes how the request ended.
    pub(crate) fn ended(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let (handles, endpoint) = (&self.metrics.inner, self.endpoint as usize);
        handles.in_flight.decrement(1.0);
        handles.duration[endpoint].record(self.started.elapsed().as_secs_f64());
        handles.requests[endpoint][self.outcome as usize].increment(1);
    }
}
