//! What to do when a leg fails. Pure.
//!
//! Sampling draws from a counter keyed by seed and token index, so another attempt goes on exactly where the last one stopped: with the prompt
//! and the tokens already emitted, on other workers. What is decided here is whether, without whom, and when.

use crate::{error::Error, metrics::RetryReason};
use std::time::Duration;

/// Pause before the second retry; the first is immediate. It doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Which part a worker had in an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Local,
    Prefill,
    Decode,
}

/// How an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// Whose leg it was.
    pub(crate) worker: String,
    pub(crate) part: Part,
    /// The other worker of a hand-off.
    pub(crate) peer: Option<String>,
    /// Whether this attempt had produced a token.
    pub(crate) spoke: bool,
    /// For people.
    pub(crate) message: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// The stream to the worker ended, or could not take the submission.
    Lost,
    /// The leg died.
    Failed,
    /// The worker would not take it.
    Refused,
    /// No worker could do it.
    Invalid,
    /// No token came in time.
    Stalled,
    /// The client did not read.
    Overflow,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Place it again after a pause, elsewhere if there is an elsewhere.
    Retry {
        without: String,
        pause: Duration,
        reason: RetryReason,
    },
    GiveUp(Error),
}

/// Decides after the `attempts`th attempt has failed.
pub(crate) fn remedy(failure: &Failure, attempts: u32, max_attempts: u32, stream_buffer_tokens: usize) -> Remedy {
    let reason = match failure.kind {
        FailureKind::Invalid => {
            return Remedy::GiveUp(Error::Invalid { message: failure.message.clone(), param: None });
        }
        FailureKind::Overflow => return Remedy::GiveUp(Error::SlowClient(stream_buffer_tokens)),
        FailureKind::Lost => RetryReason::Lost,
        FailureKind::Failed => RetryReason::Failed,
        FailureKind::Refused => RetryReason::Refused,
        FailureKind::Stalled => RetryReason::Stalled,
    };
    if attempts >= max_attempts {
        return Remedy::GiveUp(gave_up(failure, attempts));
    }
    let pause = match attempts {
        0 | 1 => Duration::ZERO,
        n => (FIRST_PAUSE * 2u32.saturating_pow(n - 2)).min(LONGEST_PAUSE),
    };
    Remedy::Retry { without: culprit(failure).to_string(), pause, reason }
}

/// A prefill leg that fails after its token did its own part; it was the hand-off that went wrong, and the prefix is still cached
/// there. In all other cases whoever failed is to blame.
pub(crate) fn culprit(failure: &Failure) -> &str {
    match (failure.kind, failure.part, failure.spoke, &failure.peer) {
        (FailureKind::Failed, Part::Prefill, true, Some(decode)) => decode,
        _ => &failure.worker,
    }
}

fn gave_up(failure: &Failure, attempts: u32) -> Error {
    let message =
        format!("gave up after {attempts} attempts; the last ended on {}: {}", failure.worker, failure.message);
    match failure.kind {
        FailureKind::Stalled => Error::Timeout(message),
        FailureKind::Refused => Error::Unavailable { message, retry_after: Duration::from_secs(1) },
        _ => Error::Failed(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: FailureKind, part: Part, spoke: bool) -> Failure {
        let peer = (part != Part::Local).then(|| "peer".to_string());
        Failure { kind, worker: "self".into(), part, peer, spoke, message: "boom".into() }
    }

    fn retried_without(kind: FailureKind, part: Part, spoke: bool) -> String {
        match remedy(&failure(kind, part, spoke), 1, 3, 0) {
            Remedy::Retry { without, .. } => without,
            Remedy::GiveUp(error) => panic!("{error}"),
        }
    }

    #[test]
    fn blame_falls_where_the_fault_was() {
        assert_eq!(retried_without(FailureKind::Lost, Part::Prefill, true), "self");
        assert_eq!(retried_without(FailureKind::Failed, Part::Prefill, false), "self");
        assert_eq!(retried_without(FailureKind::Failed, Part::Prefill, true), "peer");
        assert_eq!(retried_without(FailureKind::Failed, Part::Decode, true), "self");
        assert_eq!(retried_without(FailureKind::Refused, Part::Decode, false), "self");
        assert_eq!(retried_without(FailureKind::Stalled, Part::Local, false), "self");
    }

    #[test]
    fn attempts_are_bounded_and_pauses_grow() {
        let pause = |attempts| match remedy(&failure(FailureKind::Lost, Part::Local, false), attempts, 10, 0) {
            Remedy::Retry { pause, .. } => pause.as_millis(),
            Remedy::GiveUp(error) => panic!("{error}"),
        };
        assert_eq!([1, 2, 3, 4, 9].map(pause), [0, 50, 100, 200, 1_000]);
        assert!(matches!(
            remedy(&failure(FailureKind::Lost, Part::Local, false), 3, 3, 0),
            Remedy::GiveUp(Error::Failed(_))
        ));
        assert!(matches!(
            remedy(&failure(FailureKind::Stalled, Part::Local, false), 3, 3, 0),
            Remedy::GiveUp(Error::Timeout(_))
        ));
    }

    #[test]
    fn what_cannot_succeed_is_not_tried_again() {
        assert!(matches!(
            remedy(&failure(FailureKind::Invalid, Part::Local, false), 1, 9, 0),
            Remedy::GiveUp(Error::Invalid { .. })
        ));
        assert_eq!(
            remedy(&failure(FailureKind::Overflow, Part::Decode, true), 1, 9, 64),
            Remedy::GiveUp(Error::SlowClient(64))
        );
    }
}
