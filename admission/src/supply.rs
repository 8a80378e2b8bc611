//! What the workers can take before all of them have enough to do.
//!
//! Enough is a small backlog: what keeps a worker busy until it has reported and the router has answered. More would only take the
//! decision who is served next away from the router.

use crate::Supply;
use placement::{Kind, Policy};

/// The least backlog in tokens: an engine's default step. Less would have workers compute steps that are not full.
const LEAST_BACKLOG_TOKENS: f64 = 2_048.0;

/// A worker that takes requests.
#[derive(Clone, Copy, Debug)]
pub struct Working {
    /// What it can be used for.
    pub kind: Kind,
    /// Sequences that run, wait or are on their way there.
    pub sequences: u32,
    /// Milliseconds of computing before it could begin with another prompt.
    pub backlog_ms: f64,
    /// Tokens that its free pages hold.
    pub free_tokens: u64,
    /// At which it computes prompts.
    pub tokens_per_s: f64,
}

/// Returns what `workers` can be sent until each of them has `backlog_ms` of computing to do.
pub fn supply(workers: &[Working], policy: Policy, backlog_ms: f64) -> Supply {
    let of = |kind| workers.iter().filter(move |worker| worker.kind == kind);
    let has_prefill = of(Kind::Prefill).next().is_some();
    let computes = |worker: &&Working| match (policy, worker.kind) {
        (Policy::Local, kind) => kind == Kind::Decode,
        (Policy::Remote, kind) => kind == Kind::Prefill,
        (Policy::Auto, Kind::Prefill) => true,
        // Beside prefill workers, one that decodes is not to be filled with prompts; one that does nothing may well take one.
        (Policy::Auto, Kind::Decode) => !has_prefill || worker.sequences == 0,
    };
    if of(Kind::Decode).next().is_none() || !workers.iter().any(|worker| computes(&worker)) {
        // Nobody to wait for: placement says why.
        return Supply::UNKNOWN;
    }
    let room = |worker: &Working| {
        let tokens = |ms: f64| worker.tokens_per_s * ms / 1e3;
        (tokens(backlog_ms).max(LEAST_BACKLOG_TOKENS) - tokens(worker.backlog_ms)).max(0.0) as u64
    };
    // A worker that does nothing takes a sequence, whatever it says of its pages.
    let landing = |worker: &Working| worker.free_tokens.max(u64::from(worker.sequences == 0));
    let to_compute: u64 = workers.iter().filter(computes).map(room).sum();
    let to_land: u64 = of(Kind::Decode).map(landing).sum();
    Supply {
        room_tokens: i64::try_from(to_compute.min(to_land)).unwrap_or(i64::MAX),
        tokens_per_s: workers.iter().filter(computes).map(|worker| worker.tokens_per_s).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn working(kind: Kind) -> Working {
        Working { kind, sequences: 1, backlog_ms: 0.0, free_tokens: 100_000, tokens_per_s: 10_000.0 }
    }

    fn room(workers: &[Working], policy: Policy) -> i64 {
        supply(workers, policy, 500.0).room_tokens
    }

    #[test]
    fn room_is_what_is_short_of_a_small_backlog() {
        let (p, d) = (working(Kind::Prefill), working(Kind::Decode));
        assert_eq!(supply(&[p, p, d], Policy::Remote, 500.0), Supply { room_tokens: 10_000, tokens_per_s: 20_000.0 });
        assert_eq!(room(&[Working { backlog_ms: 400.0, ..p }, p, d], Policy::Remote), 6_000);
        assert_eq!(
            room(&[Working { backlog_ms: 9_000.0, ..p }, p, d], Policy::Remote),
            5_000,
            "one is not idle for another"
        );
        assert_eq!(room(&[Working { tokens_per_s: 10.0, ..p }, d], Policy::Remote), 2_048, "a step is always wanted");
    }

    #[test]
    fn whose_room_counts_is_the_policys() {
        let (p, d) = (working(Kind::Prefill), working(Kind::Decode));
        let full = Working { backlog_ms: 500.0, ..p };
        assert_eq!(room(&[full, d], Policy::Auto), 0, "who decodes is left alone");
        assert_eq!(room(&[full, Working { sequences: 0, ..d }], Policy::Auto), 5_000, "who does nothing is not");
        assert_eq!(room(&[d], Policy::Auto), 5_000);
        assert_eq!(room(&[full, d], Policy::Local), 5_000);
        assert_eq!(room(&[p, Working { free_tokens: 0, ..d }], Policy::Remote), 0, "nowhere to land");
        assert_eq!(room(&[p, Working { free_tokens: 0, sequences: 0, ..d }], Policy::Remote), 1);
    }

    #[test]
    fn where_nobody_can_be_waited_for_nothing_is_held_back() {
        let (p, d) = (working(Kind::Prefill), working(Kind::Decode));
        for (workers, policy) in [(vec![], Policy::Auto), (vec![p], Policy::Auto), (vec![d], Policy::Remote)] {
            assert_eq!(supply(&workers, policy, 0.5), Supply::UNKNOWN);
        }
    }
}
