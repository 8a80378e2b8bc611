//! Where a request goes. Pure.
//!
//! Candidates are all (prefill, decode) pairs of equal fingerprint, and every decode worker by itself. The cheapest wins; among
//! equals the random number decides, so that load spreads. Workers that are draining, too small, without the adapter or
//! excluded by an earlier attempt are no candidates.

use crate::{
    config::{Policy, Weights},
    cost::{self, Cost, Demand},
};

/// Of a large pool, only this many of each role, the cheapest by themselves, are tried in pairs: the shared terms of a pair are small
/// beside what they cost alone, and 1,000 workers must not mean 250,000 pairs.
const SHORTLIST: usize = 16;

/// What a worker can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Prefill,
    Decode,
}

/// A worker as placement sees it.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// Its number, which the [`Choice`] names.
    pub(crate) id: usize,
    pub(crate) kind: Kind,
    /// Only workers of equal fingerprint exchange pages; numbered by the fleet.
    pub(crate) fingerprint: usize,
    /// Takes nothing new.
    pub(crate) draining: bool,
    /// Failed this request before.
    pub(crate) excluded: bool,
    /// Does not have the adapter that the request needs.
    pub(crate) lacks_adapter: bool,
    /// Longest sequence it can hold, in tokens.
    pub(crate) max_tokens: u32,
    pub(crate) cost: cost::Worker,
}

/// Who takes the request; numbers are [`Candidate::id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Remote { prefill: usize, decode: usize },
    Local { decode: usize },
}

/// A choice and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decision {
    pub(crate) choice: Choice,
    pub(crate) cost: Cost,
}

/// Nobody can take the request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no worker can take this request: {prefill} prefill and {decode} decode workers are available, placement is {policy:?}"
)]
pub(crate) struct NoPath {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
    pub(crate) policy: Policy,
}

/// Chooses. `random` breaks ties.
pub(crate) fn place(
    demand: &Demand,
    candidates: &[Candidate],
    policy: Policy,
    weights: &Weights,
    random: u64,
) -> Result<Decision, NoPath> {
    let usable = |kind| move |c: &&Candidate| c.kind == kind && c.is_usable(demand);
    let prefill: Vec<&Candidate> = candidates.iter().filter(usable(Kind::Prefill)).collect();
    let decode: Vec<&Candidate> = candidates.iter().filter(usable(Kind::Decode)).collect();
    let decisions = decisions(demand, &prefill, &decode, policy, weights);
    cheapest(&decisions, weights.tie_ms, random).ok_or(NoPath { prefill: prefill.len(), decode: decode.len(), policy })
}

/// Whether anything at all could be placed: what readiness means.
pub(crate) fn has_path(candidates: &[Candidate], policy: Policy) -> bool {
    let demand = Demand { tokens: 1, max_output: 1 };
    place(&demand, candidates, policy, &Weights::default(), 0).is_ok()
}

impl Candidate {
    fn is_usable(&self, demand: &Demand) -> bool {
        !self.draining && !self.excluded && !self.lacks_adapter && demand.tokens < self.max_tokens
    }
}

fn decisions(
    demand: &Demand,
    prefill: &[&Candidate],
    decode: &[&Candidate],
    policy: Policy,
    weights: &Weights,
) -> Vec<Decision> {
    let mut decisions = Vec::new();
    if policy != Policy::Remote {
        decisions.extend(
            decode.iter().map(|d| Decision {
                choice: Choice::Local { decode: d.id },
                cost: cost::local(demand, &d.cost, weights),
            }),
        );
    }
    if policy != Policy::Local {
        for fingerprint in fingerprints(decode) {
            let of = |list: &[&Candidate]| -> Vec<cost::Worker> {
                list.iter().filter(|c| c.fingerprint == fingerprint).map(|c| c.cost).collect()
            };
            let ids = |list: &[&Candidate]| -> Vec<usize> {
                list.iter().filter(|c| c.fingerprint == fingerprint).map(|c| c.id).collect()
            };
            let (p, d) = (of(prefill), of(decode));
            let (p_ids, d_ids) = (ids(prefill), ids(decode));
            // A worker's own share of a pair's cost is what the pair costs with itself on both ends.
            let alone = |w: &cost::Worker| cost::remote(demand, w, w, weights).total();
            for &i in &shortlist(&p, alone) {
                for &j in &shortlist(&d, alone) {
                    decisions.push(Decision {
                        choice: Choice::Remote { prefill: p_ids[i], decode: d_ids[j] },
                        cost: cost::remote(demand, &p[i], &d[j], weights),
                    });
                }
            }
        }
    }
    decisions
}

fn fingerprints(candidates: &[&Candidate]) -> Vec<usize> {
    let mut all: Vec<usize> = candidates.iter().map(|c| c.fingerprint).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Returns the indices of the cheapest workers.
fn shortlist(workers: &[cost::Worker], cost: impl Fn(&cost::Worker) -> f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..workers.len()).collect();
    if workers.len() > SHORTLIST {
        let costs: Vec<f64> = workers.iter().map(cost).collect();
        order.select_nth_unstable_by(SHORTLIST, |&a, &b| costs[a].total_cmp(&costs[b]));
        order.truncate(SHORTLIST);
    }
    order
}

fn cheapest(decisions: &[Decision], tie_ms: f64, random: u64) -> Option<Decision> {
    let best = decisions.iter().map(|d| d.cost.total()).min_by(f64::total_cmp)?;
    let equals: Vec<&Decision> = decisions.iter().filter(|d| d.cost.total() <= best + tie_ms).collect();
    Some(*equals[(random % equals.len() as u64) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::tests::idle;
    use proptest::prelude::*;

    fn candidate(id: usize, kind: Kind) -> Candidate {
        Candidate {
            id,
            kind,
            fingerprint: 0,
            draining: false,
            excluded: false,
            lacks_adapter: false,
            max_tokens: 100_000,
            cost: idle(),
        }
    }

    fn pool(prefill: usize, decode: usize) -> Vec<Candidate> {
        let kinds = std::iter::repeat_n(Kind::Prefill, prefill).chain(std::iter::repeat_n(Kind::Decode, decode));
        kinds.enumerate().map(|(id, kind)| candidate(id, kind)).collect()
    }

    fn choose(tokens: u32, pool: &[Candidate], policy: Policy, random: u64) -> Result<Choice, NoPath> {
        place(&Demand { tokens, max_output: 64 }, pool, policy, &Weights::default(), random).map(|d| d.choice)
    }

    #[test]
    fn policies_force_the_path() {
        let pool = pool(1, 1);
        assert_eq!(choose(2, &pool, Policy::Remote, 0), Ok(Choice::Remote { prefill: 0, decode: 1 }));
        assert_eq!(choose(9_000, &pool, Policy::Local, 0), Ok(Choice::Local { decode: 1 }));
        assert_eq!(choose(9_000, &pool, Policy::Auto, 0), Ok(Choice::Remote { prefill: 0, decode: 1 }));
        assert_eq!(choose(2, &pool, Policy::Auto, 0), Ok(Choice::Local { decode: 1 }));
    }

    #[test]
    fn draining_excluded_and_small_workers_are_no_candidates() {
        let changes: [fn(&mut Candidate); 4] =
            [|c| c.draining = true, |c| c.excluded = true, |c| c.lacks_adapter = true, |c| c.max_tokens = 500];
        for change in changes {
            let mut pool = pool(0, 2);
            change(&mut pool[0]);
            for random in 0..4 {
                assert_eq!(choose(500, &pool, Policy::Auto, random), Ok(Choice::Local { decode: 1 }));
            }
            change(&mut pool[1]);
            assert_eq!(
                choose(500, &pool, Policy::Auto, 0),
                Err(NoPath { prefill: 0, decode: 0, policy: Policy::Auto })
            );
        }
    }

    #[test]
    fn only_equal_fingerprints_pair() {
        let mut pool = pool(2, 1);
        pool[0].fingerprint = 1;
        for random in 0..4 {
            assert_eq!(choose(5_000, &pool, Policy::Remote, random), Ok(Choice::Remote { prefill: 1, decode: 2 }));
        }
        pool[1].fingerprint = 1;
        assert_eq!(
            choose(5_000, &pool, Policy::Remote, 0),
            Err(NoPath { prefill: 2, decode: 1, policy: Policy::Remote })
        );
    }

    #[test]
    fn equals_take_turns() {
        let pool = pool(2, 3);
        let mut seen = Vec::new();
        for random in 0..6 {
            let choice = choose(5_000, &pool, Policy::Remote, random).unwrap();
            assert!(!seen.contains(&choice));
            seen.push(choice);
        }
        assert_eq!(seen.len(), 6);
    }

    #[test]
    fn a_large_pool_still_finds_the_warm_worker() {
        let mut pool = pool(500, 500);
        pool[321].cost.cached_pages = 300;
        pool[765].cost.cached_pages = 100;
        assert_eq!(choose(5_000, &pool, Policy::Auto, 7), Ok(Choice::Remote { prefill: 321, decode: 765 }));
    }

    #[test]
    fn a_path_needs_a_decode_worker() {
        assert!(!has_path(&pool(3, 0), Policy::Auto));
        assert!(has_path(&pool(0, 1), Policy::Auto));
        assert!(!has_path(&pool(0, 1), Policy::Remote));
        assert!(has_path(&pool(1, 1), Policy::Remote));
    }

    fn loads() -> impl Strategy<Value = Vec<(u32, u64, u32)>> {
        proptest::collection::vec((0u32..50, 0u64..20_000, 0u32..100), 1..6)
    }

    fn loaded(loads: &[(u32, u64, u32)], kind: Kind, first: usize) -> Vec<Candidate> {
        let with = |(i, &(sequences, queued_tokens, cached_pages)): (usize, &(u32, u64, u32))| {
            let mut c = candidate(first + i, kind);
            c.cost = cost::Worker { sequences, queued_tokens, cached_pages, ..idle() };
            c
        };
        loads.iter().enumerate().map(with).collect()
    }

    proptest! {
        #[test]
        fn a_worker_that_is_not_chosen_changes_nothing(p in loads(), d in loads(), tokens in 1u32..5_000, drop in any::<prop::sample::Index>()) {
            let mut pool = loaded(&p, Kind::Prefill, 0);
            pool.extend(loaded(&d, Kind::Decode, 100));
            let demand = Demand { tokens, max_output: 64 };
            let weights = Weights { tie_ms: 0.0, ..Weights::default() };
            let decision = place(&demand, &pool, Policy::Auto, &weights, 0).unwrap();
            let dropped = drop.get(&pool).id;
            let chosen = match decision.choice {
                Choice::Remote { prefill, decode } => vec![prefill, decode],
                Choice::Local { decode } => vec![decode],
            };
            prop_assume!(!chosen.contains(&dropped));
            pool.retain(|c| c.id != dropped);
            prop_assert_eq!(place(&demand, &pool, Policy::Auto, &weights, 0).unwrap().cost, decision.cost);
        }

        #[test]
        fn nothing_cheaper_was_left(p in loads(), d in loads(), tokens in 1u32..5_000, random: u64) {
            let mut pool = loaded(&p, Kind::Prefill, 0);
            pool.extend(loaded(&d, Kind::Decode, 100));
            let demand = Demand { tokens, max_output: 64 };
            let weights = Weights::default();
            let chosen = place(&demand, &pool, Policy::Auto, &weights, random).unwrap().cost.total();
            for decode in pool.iter().filter(|c| c.kind == Kind::Decode) {
                prop_assert!(chosen <= cost::local(&demand, &decode.cost, &weights).total() + weights.tie_ms);
                for prefill in pool.iter().filter(|c| c.kind == Kind::Prefill) {
                    prop_assert!(chosen <= cost::remote(&demand, &prefill.cost, &decode.cost, &weights).total() + weights.tie_ms);
                }
            }
        }
    }
}
