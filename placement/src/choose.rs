//! The choice. Pure.
//!
//! Candidates are all (prefill, decode) pairs of equal fingerprint, and every decode worker by itself; whoever computes the prompt may
//! also fetch the part of it that a peer holds. The cheapest wins; among equals the random number decides, so that load spreads. Workers that are
//! draining, too small, without the adapter or excluded by an earlier attempt are no candidates.

use crate::{
    Policy, Weights,
    cost::{self, Cost, Demand},
};
use timing::Pace;

/// Of a large pool, only this many of each role, the cheapest by themselves, are tried in pairs: the shared terms of a pair are small
/// beside what they cost alone, and 1,000 workers must not mean 250,000 pairs.
const SHORTLIST: usize = 16;

/// Decisions that a [`Placed`] names beside the chosen one.
const RUNNERS_UP: usize = 4;

/// What a worker can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Computes prompts for others.
    Prefill,
    /// Decodes, and computes prompts for itself.
    Decode,
}

/// A worker as placement sees it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its number, which the [`Choice`] names.
    pub id: usize,
    /// What it can be used for.
    pub kind: Kind,
    /// Only workers of equal fingerprint exchange pages; numbered by the fleet.
    pub fingerprint: usize,
    /// Takes nothing new.
    pub draining: bool,
    /// Failed this request before.
    pub excluded: bool,
    /// Does not have the adapter that the request needs.
    pub lacks_adapter: bool,
    /// Longest sequence it can hold, in tokens.
    pub max_tokens: u32,
    /// What is known of its load.
    pub cost: cost::Worker,
}

/// Who takes the request; numbers are [`Candidate::id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Who computes the prompt; `None` when the decode worker does so itself.
    pub prefill: Option<usize>,
    /// Who decodes.
    pub decode: usize,
    /// What whoever computes the prompt fetches first.
    pub fetch: Option<Fetch>,
}

/// Pages to be had from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Who has them.
    pub holder: usize,
    /// Leading pages of the prompt that are cached when they have come.
    pub pages: u32,
}

/// A choice and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Who.
    pub choice: Choice,
    /// Why.
    pub cost: Cost,
}

/// The decision taken, and the best of those that were not.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// What is to be done.
    pub decision: Decision,
    /// Cheapest first.
    pub runners_up: Vec<Decision>,
}

/// Nobody can take the request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no worker can take this request: {prefill} prefill and {decode} decode workers are available, placement is {policy:?}"
)]
pub struct NoPath {
    /// Usable prefill workers.
    pub prefill: usize,
    /// Usable decode workers.
    pub decode: usize,
    /// What was asked for.
    pub policy: Policy,
}

/// Chooses. `random` breaks ties.
///
/// # Errors
/// [`NoPath`] when nobody can take it.
pub fn place(
    demand: &Demand,
    candidates: &[Candidate],
    policy: Policy,
    weights: &Weights,
    random: u64,
) -> Result<Placed, NoPath> {
    place_beside(0, demand, candidates, policy, weights, random)
}

/// Chooses as one of several: `peers` others choose from the same reports.
///
/// What they sent since shows in no report, and all of them see the same worker as the cheapest. So candidates are equal here that differ by less
/// than a share of what this request takes, and of two drawn from those the cheaper one is taken: the power of two choices (Mitzenmacher, IEEE
/// TPDS 12(10), 2001) keeps routers from following each other, and none goes anywhere bad. The share is half, and less for few
/// peers: with it, routers that report every 50 ms wait less than without, and two never wait more (`tests/routers.rs`).
///
/// # Errors
/// [`NoPath`] when nobody can take it.
pub fn place_beside(
    peers: u32,
    demand: &Demand,
    candidates: &[Candidate],
    policy: Policy,
    weights: &Weights,
    random: u64,
) -> Result<Placed, NoPath> {
    let usable = |kind| move |c: &&Candidate| c.kind == kind && c.is_usable(demand);
    let prefill: Vec<&Candidate> = candidates.iter().filter(usable(Kind::Prefill)).collect();
    let decode: Vec<&Candidate> = candidates.iter().filter(usable(Kind::Decode)).collect();
    let weights = &learned(candidates, weights);
    let mut decisions = Vec::new();
    for fingerprint in fingerprints(&decode) {
        let same = |c: &&Candidate| c.fingerprint == fingerprint;
        let pool = Pool {
            demand,
            weights,
            holder: holder(candidates.iter().filter(same)),
            prefill: prefill.iter().copied().filter(same).collect(),
            decode: decode.iter().copied().filter(same).collect(),
        };
        if policy != Policy::Remote {
            pool.local(&mut decisions);
        }
        if policy != Policy::Local {
            pool.remote(&mut decisions);
        }
    }
    let placed = cheapest(decisions, weights.tie_ms, random, peers);
    placed.ok_or(NoPath { prefill: prefill.len(), decode: decode.len(), policy })
}

/// Whether anything at all could be placed: what readiness means.
pub fn has_path(candidates: &[Candidate], policy: Policy) -> bool {
    let demand = Demand { tokens: 1, max_output: 1 };
    place(&demand, candidates, policy, &Weights::default(), 0).is_ok()
}

impl Candidate {
    fn is_usable(&self, demand: &Demand) -> bool {
        !self.draining && !self.excluded && !self.lacks_adapter && demand.tokens < self.max_tokens
    }
}

/// Workers of one fingerprint.
struct Pool<'a> {
    demand: &'a Demand,
    weights: &'a Weights,
    /// Who holds most of the prompt.
    holder: Option<&'a Candidate>,
    prefill: Vec<&'a Candidate>,
    decode: Vec<&'a Candidate>,
}

impl Pool<'_> {
    fn local(&self, decisions: &mut Vec<Decision>) {
        for d in &self.decode {
            decisions.extend(self.ways(d).map(|way| Decision {
                choice: Choice { prefill: None, decode: d.id, fetch: way.fetch },
                cost: way.cost(cost::local(self.demand, &way.worker, self.weights)),
            }));
        }
    }

    fn remote(&self, decisions: &mut Vec<Decision>) {
        let (demand, weights) = (self.demand, self.weights);
        // A worker's own share of a pair's cost is what the pair costs with itself on both ends.
        let alone = |way: &Way| way.cost(cost::remote(demand, &way.worker, &way.worker, weights)).total();
        let prefill = shortlist(&self.prefill, |p| self.ways(p).map(|way| alone(&way)).fold(f64::INFINITY, f64::min));
        let decode = shortlist(&self.decode, |d| cost::remote(demand, &d.cost, &d.cost, weights).total());
        for p in prefill {
            for way in self.ways(p) {
                decisions.extend(decode.iter().map(|d| Decision {
                    choice: Choice { prefill: Some(p.id), decode: d.id, fetch: way.fetch },
                    cost: way.cost(cost::remote(demand, &way.worker, &d.cost, weights)),
                }));
            }
        }
    }

    /// The ways in which `c` can compute the prompt: with what it has, and with what the holder has more.
    fn ways(&self, c: &Candidate) -> impl Iterator<Item = Way> + use<> {
        let as_it_is = Way { worker: c.cost, fetch: None, ms: 0.0 };
        let known = c.cost.cached_pages.max(c.cost.coming_pages);
        let worth =
            |h: &&Candidate| h.id != c.id && h.cost.cached_pages >= known.saturating_add(self.weights.fetch_pages);
        let fetching = self.holder.filter(worth).map(|holder| {
            let (worker, ms) = cost::fetched(self.demand, &c.cost, &holder.cost, self.weights);
            Way { worker, fetch: Some(Fetch { holder: holder.id, pages: worker.cached_pages }), ms }
        });
        std::iter::once(as_it_is).chain(fetching)
    }
}

/// A worker with the prefix it would have.
struct Way {
    worker: cost::Worker,
    fetch: Option<Fetch>,
    /// How long the fetch takes.
    ms: f64,
}

impl Way {
    fn cost(&self, cost: Cost) -> Cost {
        Cost { fetch: self.ms, ..cost }
    }
}

/// Returns the weights with what the workers have learned in place of the prior: of a worker that has computed no prompt yet, what its
/// peers need is the best guess, and without one nobody would ever try.
fn learned(candidates: &[Candidate], weights: &Weights) -> Weights {
    let known = |part: fn(&Pace) -> f64| {
        let paces = candidates.iter().filter_map(|c| c.cost.speed.pace).filter(move |pace| part(pace) > 0.0);
        paces.min_by(|a, b| part(a).total_cmp(&part(b)))
    };
    let (step, prompt) = (known(|pace| pace.step_us), known(|pace| pace.token_us));
    let steps = step.map_or(weights.prior, |step| Pace { token_us: 0.0, pair_ns: 0.0, ..step }.or(&weights.prior));
    let prior = prompt.map_or(steps, |prompt| Pace { step_us: 0.0, ..prompt }.or(&steps));
    Weights { prior, ..weights.clone() }
}

/// Returns who holds the longest prefix; of several, who can send it first.
fn holder<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> Option<&'a Candidate> {
    let by_pages = |a: &&Candidate, b: &&Candidate| {
        a.cost.cached_pages.cmp(&b.cost.cached_pages).then(b.cost.sending_ms.total_cmp(&a.cost.sending_ms))
    };
    candidates.filter(|c| c.cost.cached_pages > 0 && !c.excluded).max_by(by_pages)
}

fn fingerprints(candidates: &[&Candidate]) -> Vec<usize> {
    let mut all: Vec<usize> = candidates.iter().map(|c| c.fingerprint).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Returns the cheapest workers.
fn shortlist<'a>(workers: &[&'a Candidate], cost: impl Fn(&Candidate) -> f64) -> Vec<&'a Candidate> {
    if workers.len() <= SHORTLIST {
        return workers.to_vec();
    }
    let mut order: Vec<(f64, &Candidate)> = workers.iter().map(|worker| (cost(worker), *worker)).collect();
    order.select_nth_unstable_by(SHORTLIST, |(a, _), (b, _)| a.total_cmp(b));
    order.truncate(SHORTLIST);
    order.into_iter().map(|(_, worker)| worker).collect()
}

fn cheapest(mut decisions: Vec<Decision>, tie_ms: f64, random: u64, peers: u32) -> Option<Placed> {
    let cheaper = |a: &Decision, b: &Decision| a.cost.total().total_cmp(&b.cost.total());
    let best = decisions.iter().min_by(|a, b| cheaper(a, b))?.cost;
    let unseen = best.compute / 2.0 * f64::from(peers) / f64::from(peers + 1);
    let equals: Vec<usize> =
        (0..decisions.len()).filter(|&i| decisions[i].cost.total() <= best.total() + tie_ms.max(unseen)).collect();
    let draw = |random: u64| equals[(random % equals.len() as u64) as usize];
    let chosen = match peers {
        0 => draw(random),
        // Both halves of the number are as random as the whole.
        _ => {
            let drawn = [draw(random & u64::from(u32::MAX)), draw(random >> 32)];
            drawn.into_iter().min_by(|&a, &b| cheaper(&decisions[a], &decisions[b]))?
        }
    };
    let decision = decisions.swap_remove(chosen);
    if decisions.len() > RUNNERS_UP {
        decisions.select_nth_unstable_by(RUNNERS_UP, cheaper);
        decisions.truncate(RUNNERS_UP);
    }
    decisions.sort_by(cheaper);
    Some(Placed { decision, runners_up: decisions })
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

    fn pair(prefill: usize, decode: usize) -> Choice {
        Choice { prefill: Some(prefill), decode, fetch: None }
    }

    fn alone(decode: usize) -> Choice {
        Choice { prefill: None, decode, fetch: None }
    }

    fn pool(prefill: usize, decode: usize) -> Vec<Candidate> {
        let kinds = std::iter::repeat_n(Kind::Prefill, prefill).chain(std::iter::repeat_n(Kind::Decode, decode));
        kinds.enumerate().map(|(id, kind)| candidate(id, kind)).collect()
    }

    fn choose(tokens: u32, pool: &[Candidate], policy: Policy, random: u64) -> Result<Choice, NoPath> {
        place(&Demand { tokens, max_output: 64 }, pool, policy, &Weights::default(), random)
            .map(|placed| placed.decision.choice)
    }

    #[test]
    fn policies_force_the_path() {
        let pool = pool(1, 1);
        assert_eq!(choose(2, &pool, Policy::Remote, 0), Ok(pair(0, 1)));
        assert_eq!(choose(9_000, &pool, Policy::Local, 0), Ok(alone(1)));
        assert_eq!(choose(9_000, &pool, Policy::Auto, 0), Ok(pair(0, 1)));
        assert_eq!(choose(2, &pool, Policy::Auto, 0), Ok(alone(1)));
    }

    #[test]
    fn draining_excluded_and_small_workers_are_no_candidates() {
        let changes: [fn(&mut Candidate); 4] =
            [|c| c.draining = true, |c| c.excluded = true, |c| c.lacks_adapter = true, |c| c.max_tokens = 500];
        for change in changes {
            let mut pool = pool(0, 2);
            change(&mut pool[0]);
            for random in 0..4 {
                assert_eq!(choose(500, &pool, Policy::Auto, random), Ok(alone(1)));
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
            assert_eq!(choose(5_000, &pool, Policy::Remote, random), Ok(pair(1, 2)));
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
        assert_eq!(choose(5_000, &pool, Policy::Auto, 7), Ok(pair(321, 765)));
    }

    #[test]
    fn a_hot_prefix_spreads_when_its_holder_is_busy() {
        let weights = Weights { fetch_pages: 8, ..Weights::default() };
        let choose = |tokens, pool: &[Candidate], policy, random| {
            let demand = Demand { tokens, max_output: 64 };
            place(&demand, pool, policy, &weights, random).map(|placed| placed.decision.choice)
        };
        let mut pool = pool(3, 1);
        pool[0].cost.cached_pages = 300;
        assert_eq!(choose(5_000, &pool, Policy::Remote, 0), Ok(pair(0, 3)));
        pool[0].cost.backlog_ms = 3_000.0;
        let fetching = Choice { fetch: Some(Fetch { holder: 0, pages: 300 }), ..pair(1, 3) };
        assert_eq!(choose(5_000, &pool, Policy::Remote, 0), Ok(fetching));
        pool[0].excluded = true;
        assert_eq!(choose(5_000, &pool, Policy::Remote, 0), Ok(pair(1, 3)), "nothing is asked of one that failed");
    }

    #[test]
    fn a_decode_worker_that_computed_no_prompt_yet_is_taken_to_be_like_its_peers() {
        let mut pool = pool(1, 1);
        let fast = Pace { step_us: 0.0, sequence_us: 0.0, context_ns: 0.0, token_us: 1.0, pair_ns: 0.0 };
        pool[0].cost.speed.pace = Some(fast);
        pool[1].cost.speed.pace = Some(Pace { step_us: 500.0, token_us: 0.0, ..fast });
        pool[0].cost.backlog_ms = 1_000.0;
        assert_eq!(choose(2_000, &pool, Policy::Auto, 0), Ok(alone(1)), "2 ms here beat a second of waiting there");
    }

    #[test]
    fn runners_up_are_the_cheapest_of_the_rest() {
        let mut pool = pool(8, 1);
        (0..8).for_each(|id| pool[id].cost.backlog_ms = 1_000.0 * id as f64);
        let placed =
            place(&Demand { tokens: 5_000, max_output: 64 }, &pool, Policy::Remote, &Weights::default(), 0).unwrap();
        let order: Vec<_> = placed.runners_up.iter().map(|decision| decision.choice).collect();
        assert_eq!((placed.decision.choice, order), (pair(0, 8), [1, 2, 3, 4].map(|id| pair(id, 8)).to_vec()));
    }

    #[test]
    fn a_path_needs_a_decode_worker() {
        assert!(!has_path(&pool(3, 0), Policy::Auto));
        assert!(has_path(&pool(0, 1), Policy::Auto));
        assert!(!has_path(&pool(0, 1), Policy::Remote));
        assert!(has_path(&pool(1, 1), Policy::Remote));
    }

    fn loads() -> impl Strategy<Value = Vec<(u32, f64, u32)>> {
        proptest::collection::vec((0u32..50, 0f64..5_000.0, 0u32..100), 1..6)
    }

    fn loaded(loads: &[(u32, f64, u32)], kind: Kind, first: usize) -> Vec<Candidate> {
        let with = |(i, &(sequences, backlog_ms, cached_pages)): (usize, &(u32, f64, u32))| {
            let mut c = candidate(first + i, kind);
            c.cost = cost::Worker { sequences, backlog_ms, cached_pages, ..idle() };
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
            let decision = place(&demand, &pool, Policy::Auto, &weights, 0).unwrap().decision;
            let dropped = drop.get(&pool).id;
            let Choice { prefill, decode, fetch } = decision.choice;
            let chosen = [prefill, Some(decode), fetch.map(|fetch| fetch.holder)];
            prop_assume!(!chosen.contains(&Some(dropped)));
            pool.retain(|c| c.id != dropped);
            prop_assert_eq!(place(&demand, &pool, Policy::Auto, &weights, 0).unwrap().decision.cost, decision.cost);
        }

        #[test]
        fn nothing_cheaper_was_left(p in loads(), d in loads(), tokens in 1u32..5_000, random: u64) {
            let mut pool = loaded(&p, Kind::Prefill, 0);
            pool.extend(loaded(&d, Kind::Decode, 100));
            let demand = Demand { tokens, max_output: 64 };
            let weights = Weights::default();
            let chosen = place(&demand, &pool, Policy::Auto, &weights, random).unwrap().decision.cost.total();
            for decode in pool.iter().filter(|c| c.kind == Kind::Decode) {
                prop_assert!(chosen <= cost::local(&demand, &decode.cost, &weights).total() + weights.tie_ms);
                for prefill in pool.iter().filter(|c| c.kind == Kind::Prefill) {
                    prop_assert!(chosen <= cost::remote(&demand, &prefill.cost, &decode.cost, &weights).total() + weights.tie_ms);
                }
            }
        }
    }
}
