//! Sends requests when they are due and gathers what becomes of them.

use super::{
    endpoint::Endpoint,
    exchange::{Answer, Failure, exchange},
    plan::{Pace, Plan},
    progress::Progress,
};
use bytes::Bytes;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use workload::{Request, Served, Trace};

/// Between two looks at how it goes.
const LOOK: Duration = Duration::from_millis(250);

/// What became of a run.
#[derive(Debug)]
pub(super) struct Played {
    /// By arrival.
    pub(super) records: Vec<Record>,
    /// Requests of the plan that were not sent, or not waited for, because somebody interrupted the run.
    pub(super) unfinished: usize,
}

/// What became of a request. Times count from the start of the run.
#[derive(Debug)]
pub(super) struct Record {
    /// When it was due.
    pub(super) due: Duration,
    /// When it left.
    pub(super) sent: Duration,
    /// Tokens of the prompt: as the endpoint counts them, or else as planned.
    pub(super) input_tokens: usize,
    pub(super) outcome: Result<Served, (Failure, Duration)>,
}

/// A request ready to be sent.
struct Ready {
    at: Duration,
    input_tokens: usize,
    path: &'static str,
    body: Bytes,
}

/// Plays `plan` to its end, or until `interrupt`.
pub(super) async fn play(endpoint: Arc<Endpoint>, plan: Plan, interrupt: impl Future<Output = ()>) -> Played {
    let Plan { trace, pace, .. } = plan;
    let Trace { requests, block_tokens } = trace;
    let prepare = |request: Request| {
        let tokens = request.tokens(block_tokens, endpoint.vocabulary());
        let (path, body) = endpoint.request(&tokens, request.output_tokens);
        Ready { at: request.at, input_tokens: request.input_tokens, path, body }
    };
    let total = requests.len();
    let mut requests = requests.into_iter();
    // One is written ahead, so that a long prompt is not late for being written.
    let mut next = requests.next().map(prepare);
    let pieces = Arc::new(AtomicU64::new(0));
    let mut progress = Progress::new(total);
    let mut in_flight = JoinSet::new();
    let mut records: Vec<Record> = Vec::with_capacity(total);
    let mut look = tokio::time::interval(LOOK);
    let start = Instant::now();
    tokio::pin!(interrupt);
    while next.is_some() || !in_flight.is_empty() {
        let due = match (&next, pace) {
            (Some(ready), Pace::Times) => Some(start + ready.at),
            (Some(_), Pace::InFlight(most)) if in_flight.len() < most => Some(Instant::now()),
            _ => None,
        };
        // All arms are cancel safe: nothing is lost by waiting anew.
        tokio::select! {
            () = &mut interrupt => break,
            () = sleep_until(due.unwrap_or(start)), if due.is_some() => {
                let due = due.unwrap_or(start);
                if let Some(ready) = next.take() {
                    let (endpoint, pieces) = (endpoint.clone(), pieces.clone());
                    in_flight.spawn(async move { one(&endpoint, ready, start, due, &pieces).await });
                }
                next = requests.next().map(prepare);
            }
            Some(ended) = in_flight.join_next(), if !in_flight.is_empty() => {
                // A task that panics says so by itself; its request counts as unfinished.
                if let Ok(record) = ended {
                    progress.ended(&record);
                    records.push(record);
                }
            }
            _ = look.tick() => progress.show(start.elapsed(), in_flight.len(), pieces.load(Ordering::Relaxed)),
        }
    }
    progress.finish();
    records.sort_by_key(|record| record.due);
    Played { unfinished: total - records.len(), records }
}

/// Sends one request and says what became of it.
async fn one(endpoint: &Endpoint, ready: Ready, start: Instant, due: Instant, pieces: &AtomicU64) -> Record {
    let since = |instant: Instant| instant.saturating_duration_since(start);
    let sent = since(Instant::now());
    let count = || {
        pieces.fetch_add(1, Ordering::Relaxed);
    };
    let answer = exchange(endpoint, ready.path, ready.body, count).await;
    let mut input_tokens = ready.input_tokens;
    let outcome = answer.map_err(|failure| (failure, since(Instant::now()).saturating_sub(since(due)))).map(
        |Answer { pieces, input_tokens: counted, output_tokens, .. }| {
            input_tokens = counted.unwrap_or(input_tokens);
            Served { arrived: since(due), pieces: pieces.into_iter().map(since).collect(), output_tokens }
        },
    );
    Record { due: since(due), sent, input_tokens, outcome }
}
