//! Why requests went where they went.
//!
//! Each placement leaves a record: what it knew, what every alternative would have cost, and, once it is known, what happened. Records of
//! the last requests are kept within a budget of bytes, the oldest forgotten first; none holds anything that a client wrote but its own id.

mod report;

use crate::{
    error::Error,
    fleet::{Considered, Path},
    recovery::Failure,
};
use std::{
    collections::{HashMap, VecDeque},
    mem::size_of,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

/// Attempts of one request that are kept; what comes after is only counted.
const MAX_ATTEMPTS: usize = 32;

/// Characters of a failure's message.
const MESSAGE_CHARS: usize = 200;

/// What a record takes beside its attempts: its slots in two tables, and heads of allocations.
const RECORD_BYTES: usize = size_of::<Record>() + 160;

/// See the module. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Why {
    state: Arc<Mutex<State>>,
    budget_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<Arc<str>, Record>,
    /// Oldest first.
    order: VecDeque<Arc<str>>,
    bytes: usize,
}

/// One request.
#[derive(Debug)]
struct Record {
    arrived: SystemTime,
    class: i32,
    /// From arrival to its turn.
    waited: Duration,
    objective: Option<Duration>,
    /// Why it got no further.
    refused: Option<String>,
    attempts: Vec<Attempt>,
    left_out: usize,
    bytes: usize,
}

/// One placement of one choice.
#[derive(Debug)]
struct Attempt {
    choice: u32,
    /// Since the request arrived.
    placed: Duration,
    /// Best first.
    considered: Vec<Considered>,
    /// From the placement to its first token.
    spoke: Option<Duration>,
    failed: Option<Failed>,
}

#[derive(Debug)]
struct Failed {
    worker: String,
    message: String,
}

/// What is known of a request when it has its turn, or gets none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) class: i32,
    pub(crate) waited: Duration,
    pub(crate) objective: Option<Duration>,
}

impl Why {
    /// Keeps at most `budget_bytes`.
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self { state: Arc::default(), budget_bytes }
    }

    /// Starts the record of a request. One with the same id is forgotten.
    pub(crate) fn admitted(&self, request: &Arc<str>, arrival: Arrival) {
        if self.budget_bytes == 0 {
            return;
        }
        let bytes = RECORD_BYTES + request.len();
        let arrived = SystemTime::now().checked_sub(arrival.waited).unwrap_or(SystemTime::UNIX_EPOCH);
        let Arrival { class, waited, objective } = arrival;
        let record =
            Record { arrived, class, waited, objective, refused: None, attempts: Vec::new(), left_out: 0, bytes };
        let mut state = self.state();
        match state.records.insert(request.clone(), record) {
            Some(before) => state.bytes -= before.bytes,
            None => state.order.push_back(request.clone()),
        }
        state.bytes += bytes;
        state.forget(self.budget_bytes);
    }

    /// It goes no further.
    pub(crate) fn refused(&self, request: &str, error: &Error) {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(request).filter(|record| record.refused.is_none()) else { return };
        let message = cut(&error.to_string());
        let bytes = message.len();
        record.bytes += bytes;
        record.refused = Some(message);
        state.bytes += bytes;
        state.forget(self.budget_bytes);
    }

    /// A choice was placed.
    pub(crate) fn placed(&self, request: &str, choice: u32, placed: Duration, path: &Path) {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(request) else { return };
        if record.attempts.len() == MAX_ATTEMPTS {
            record.left_out += 1;
            return;
        }
        let considered = path.considered.clone();
        let bytes = size_of::<Attempt>() + considered.len() * size_of::<Considered>();
        record.bytes += bytes;
        record.attempts.push(Attempt { choice, placed, considered, spoke: None, failed: None });
        state.bytes += bytes;
        state.forget(self.budget_bytes);
    }

    /// The first token of a choice's current attempt came `after` its placement.
    pub(crate) fn spoke(&self, request: &str, choice: u32, after: Duration) {
        if let Some(attempt) = self.state().attempt(request, choice) {
            attempt.spoke = Some(after);
        }
    }

    /// A choice's current attempt failed.
    pub(crate) fn failed(&self, request: &str, choice: u32, failure: &Failure) {
        let failed = Failed { worker: failure.worker.clone(), message: cut(&failure.message) };
        let bytes = failed.worker.len() + failed.message.len();
        let mut state = self.state();
        let Some(attempt) = state.attempt(request, choice) else { return };
        if attempt.failed.replace(failed).is_none() {
            state.bytes += bytes;
            state.records.get_mut(request).expect("its attempt was found").bytes += bytes;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn attempt(&mut self, request: &str, choice: u32) -> Option<&mut Attempt> {
        let record = self.records.get_mut(request).filter(|record| record.left_out == 0)?;
        record.attempts.iter_mut().rev().find(|attempt| attempt.choice == choice)
    }

    fn forget(&mut self, budget_bytes: usize) {
        while self.bytes > budget_bytes {
            let Some(oldest) = self.order.pop_front() else { return };
            self.bytes -= self.records.remove(&oldest).map_or(0, |record| record.bytes);
        }
    }
}

fn cut(message: &str) -> String {
    message.chars().take(MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARRIVAL: Arrival = Arrival { class: 0, waited: Duration::ZERO, objective: None };

    fn bytes(why: &Why) -> usize {
        why.state().bytes
    }

    #[test]
    fn records_stay_within_the_budget_and_the_oldest_go_first() {
        let why = Why::new(64 << 10);
        for i in 0..10_000 {
            why.admitted(&format!("request-{i}").into(), ARRIVAL);
            why.refused(&format!("request-{i}"), &Error::Overloaded { waiting: i });
            assert!(bytes(&why) <= 64 << 10);
        }
        assert!(bytes(&why) > 60 << 10);
        assert!(why.report("request-9999").is_ok());
        assert!(matches!(why.report("request-1"), Err(Error::NotFound(message)) if message.contains("\"request-1\"")));
        let nothing = Why::new(0);
        nothing.admitted(&"a".into(), ARRIVAL);
        assert!(matches!(nothing.report("a"), Err(Error::NotFound(message)) if message.contains("why_bytes = 0")));
    }

    #[test]
    fn an_id_that_comes_again_has_one_record() {
        let why = Why::new(64 << 10);
        let error = Error::Overloaded { waiting: 7 };
        why.admitted(&"a".into(), ARRIVAL);
        why.refused("a", &error);
        let once = bytes(&why);
        let again = Arrival { class: 3, waited: Duration::from_millis(2), objective: Some(Duration::from_millis(500)) };
        why.admitted(&"a".into(), again);
        why.refused("a", &error);
        why.refused("a", &Error::Overloaded { waiting: 8 });
        assert_eq!(bytes(&why), once);
        let report = why.report("chatcmpl-a").unwrap();
        assert_eq!(report["refused"], error.to_string());
        assert_eq!(
            (&report["priority"], &report["queued_ms"], &report["wanted_ttft_ms"]),
            (&3.into(), &2.0.into(), &500.0.into())
        );
        assert_eq!(why.line("a").as_deref(), Some("refused; queued=2.0"));
    }
}
