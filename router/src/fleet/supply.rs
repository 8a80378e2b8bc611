//! What the workers can take before all of them have enough to do. Pure but for asking them.
//!
//! Enough is a small backlog: what keeps a worker busy until it has reported and the router has answered. More would only take the
//! decision who is served next away from the router.

use super::Fleet;
use crate::{admission::queue::Supply, config::Policy, placement::Kind};

/// The least backlog in tokens: an engine's default step. Less would have workers compute steps that are not full.
const LEAST_BACKLOG_TOKENS: f64 = 2_048.0;

/// A worker at work.
#[derive(Clone, Copy, Debug)]
struct Working {
    kind: Kind,
    sequences: u32,
    queued_tokens: u64,
    /// What its free pages hold.
    free_tokens: u64,
    tokens_per_s: f64,
}

impl Fleet {
    /// Returns what can be sent now.
    pub(crate) fn supply(&self) -> Supply {
        let now = self.now();
        let workers = self.workers();
        let working = workers.iter().filter_map(|worker| {
            let state = worker.state();
            let load = state.attached.as_ref()?.session.load();
            if state.draining || load.draining || !worker.breaker().allows(now) {
                return None;
            }
            let free_pages = load.free_pages.unwrap_or(state.capacity_pages);
            Some(Working {
                kind: worker.kind,
                sequences: load.sequences,
                queued_tokens: load.queued_tokens,
                free_tokens: u64::from(free_pages) * u64::from(state.card.page_tokens),
                tokens_per_s: load.speed.prefill_tokens_per_s.unwrap_or(self.weights.prior_prefill_tokens_per_s),
            })
        });
        supply(&working.collect::<Vec<_>>(), self.policy, self.limits.worker_backlog_ms as f64 / 1e3)
    }
}

/// `backlog_s`: seconds of work that are enough.
fn supply(workers: &[Working], policy: Policy, backlog_s: f64) -> Supply {
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
        let backlog = (worker.tokens_per_s * backlog_s).max(LEAST_BACKLOG_TOKENS) as u64;
        backlog.saturating_sub(worker.queued_tokens)
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
        Working { kind, sequences: 1, queued_tokens: 0, free_tokens: 100_000, tokens_per_s: 10_000.0 }
    }

    fn room(workers: &[Working], policy: Policy) -> i64 {
        supply(workers, policy, 0.5).room_tokens
    }

    #[test]
    fn room_is_what_is_short_of_a_small_backlog() {
        let (p, d) = (working(Kind::Prefill), working(Kind::Decode));
        assert_eq!(supply(&[p, p, d], Policy::Remote, 0.5), Supply { room_tokens: 10_000, tokens_per_s: 20_000.0 });
        assert_eq!(room(&[Working { queued_tokens: 4_000, ..p }, p, d], Policy::Remote), 6_000);
        assert_eq!(room(&[Working { queued_tokens: 90_000, ..p }, p, d], Policy::Remote), 5_000, "one is not idle for another");
        assert_eq!(room(&[Working { tokens_per_s: 10.0, ..p }, d], Policy::Remote), 2_048, "a step is always wanted");
    }

    #[test]
    fn whose_room_counts_is_the_policys() {
        let (p, d) = (working(Kind::Prefill), working(Kind::Decode));
        let full = Working { queued_tokens: 5_000, ..p };
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
