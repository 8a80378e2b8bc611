//! The router's knowledge and its choice.

use crate::{Config, Policy};
use engine::scheduler::History;
use kv_cache::{CacheDelta, PageHash};
use placement::{Candidate, Choice, Demand, Fetch, Kind, Ledger, PrefixIndex, Report, Siblings, Slot, Speed};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{sync::Arc, time::Duration};

/// What the router knows of the workers, prefill workers first.
#[derive(Debug)]
pub(crate) struct Router {
    policy: Policy,
    placement: placement::Policy,
    weights: placement::Weights,
    prefill: usize,
    page_tokens: u32,
    page_bytes: u64,
    pages: u32,
    max_tokens: u32,
    link_bytes_per_s: f64,
    index: PrefixIndex,
    workers: Vec<Known>,
    submissions: u64,
    turns: usize,
    random: StdRng,
    leading: Vec<u32>,
    siblings: Siblings,
    coming: Vec<u32>,
}

#[derive(Debug)]
struct Known {
    ledger: Ledger,
    slot: Slot,
}

/// A request's number at a worker.
pub(crate) type Submission = u64;

impl Router {
    pub(crate) fn new(config: &Config) -> Self {
        let mut index = PrefixIndex::new(config.index_bytes);
        let workers = (0..config.prefill + config.decode)
            .map(|_| Known { ledger: Ledger::default(), slot: index.assign() })
            .collect();
        Self {
            policy: config.policy,
            placement: config.placement,
            weights: config.weights.clone(),
            prefill: config.prefill,
            page_tokens: config.page_tokens as u32,
            page_bytes: config.page_bytes(),
            pages: config.pages() as u32,
            max_tokens: config.max_tokens() as u32,
            link_bytes_per_s: config.link_bytes_per_s,
            index,
            workers,
            submissions: 0,
            turns: 0,
            random: StdRng::seed_from_u64(config.seed),
            leading: Vec::new(),
            siblings: Siblings::default(),
            coming: Vec::new(),
        }
    }

    /// Takes in what a worker reports.
    pub(crate) fn hear(&mut self, worker: usize, report: Report, delta: &CacheDelta, now: Duration) {
        let known = &mut self.workers[worker];
        known.ledger.report(Report { link_bytes_per_s: Some(self.link_bytes_per_s), ..report }, now);
        self.index.store(known.slot, delta.stored.iter().copied());
        self.index.evict(known.slot, delta.evicted.iter().copied());
    }

    /// Chooses for a request. `None` when nobody can take it.
    pub(crate) fn place(&mut self, history: &History, output: usize, now: Duration) -> Option<Choice> {
        let demand = Demand { tokens: history.len() as u32, max_output: output as u32 };
        self.index.matches(history.hashes(), &mut self.leading);
        self.coming.clear();
        self.coming.resize(self.workers.len(), 0);
        if self.policy == Policy::Baton {
            let coming = &mut self.coming;
            self.siblings.matches(history.hashes(), |worker, pages| {
                let most = &mut coming[worker as usize];
                *most = pages.max(*most);
            });
        }
        let candidates: Vec<Candidate> = (0..self.workers.len()).map(|id| self.candidate(id, now)).collect();
        if demand.tokens >= self.max_tokens {
            return None;
        }
        let random: u64 = self.random.random();
        let choice = match self.policy {
            Policy::Baton => {
                placement::place(&demand, &candidates, self.placement, &self.weights, random).ok()?.decision.choice
            }
            rival => self.rival(rival, &demand, &candidates, history, random),
        };
        Some(choice)
    }

    /// Notes that a leg goes to a worker. Returns the submission's number.
    pub(crate) fn submit(
        &mut self,
        worker: usize,
        demand: &Demand,
        computes: bool,
        cached_pages: u32,
        now: Duration,
    ) -> Submission {
        self.submissions += 1;
        let cached_pages = if computes { cached_pages.max(self.coming[worker]) } else { cached_pages };
        let known = &mut self.workers[worker];
        let missing = demand.tokens.saturating_sub(cached_pages * self.page_tokens).max(1);
        let pace = known.ledger.speed().pace.map_or(self.weights.prior, |pace| pace.or(&self.weights.prior));
        let compute_ms = if computes { pace.chunk_ms((demand.tokens - missing).into(), missing.into()) } else { 0.0 };
        let pages = demand.tokens.div_ceil(self.page_tokens).saturating_sub(cached_pages);
        known.ledger.submit(self.submissions, compute_ms, pages, now);
        self.submissions
    }

    /// Notes that a prompt will be computed, for those that begin like it.
    pub(crate) fn computing(&mut self, worker: usize, number: Submission, pages: &Arc<[PageHash]>) {
        self.siblings.add(worker as u64, number, pages);
    }

    /// Notes that a prompt is computed.
    pub(crate) fn computed(&mut self, worker: usize, number: Submission, pages: &[PageHash]) {
        if let Some(first) = pages.first() {
            self.siblings.remove(worker as u64, number, *first);
        }
    }

    /// Notes that a peer fetches `pages` pages from `holder`.
    pub(crate) fn fetching(&mut self, holder: usize, pages: u32, now: Duration) {
        let ms = 1e3 * (u64::from(pages) * self.page_bytes) as f64 / self.link_bytes_per_s;
        let ledger = &mut self.workers[holder].ledger;
        ledger.fetch(ledger.sending_ms(now) + ms, now);
    }

    /// Leading pages of the request last placed that the index knows at a worker.
    pub(crate) fn cached_pages(&self, worker: usize) -> u32 {
        self.leading[self.workers[worker].slot.index()]
    }

    fn candidate(&self, id: usize, now: Duration) -> Candidate {
        let Known { ledger, slot } = &self.workers[id];
        let speed = Speed { link_bytes_per_s: Some(self.link_bytes_per_s), ..ledger.speed() };
        Candidate {
            id,
            kind: if id < self.prefill { Kind::Prefill } else { Kind::Decode },
            fingerprint: 0,
            draining: false,
            excluded: false,
            lacks_adapter: false,
            max_tokens: self.max_tokens,
            cost: placement::Worker {
                sequences: ledger.sequences(),
                backlog_ms: ledger.backlog_ms(now),
                sending_ms: ledger.sending_ms(now),
                free_pages: ledger.free_pages(self.pages),
                held_pages: ledger.held_pages(),
                cached_pages: self.leading[slot.index()],
                coming_pages: self.coming[id],
                page_tokens: self.page_tokens,
                page_bytes: self.page_bytes,
                speed,
            },
        }
    }

    fn rival(
        &mut self,
        rival: Policy,
        demand: &Demand,
        candidates: &[Candidate],
        history: &History,
        random: u64,
    ) -> Choice {
        let (prefill, decode) = candidates.split_at(self.prefill);
        let first = history.hashes().first().map_or(0, |hash| hash.0 as u64);
        let (mut p, mut d) = (least(prefill, |c| c.cost.backlog_ms), least(decode, |c| c.cost.sequences as f64));
        let mut fetch = None;
        match rival {
            Policy::Random => {
                p = (random % prefill.len() as u64) as usize;
                d = prefill.len() + (random >> 32) as usize % decode.len();
            }
            Policy::RoundRobin => {
                p = self.turns % prefill.len();
                d = prefill.len() + self.turns % decode.len();
                self.turns += 1;
            }
            Policy::Sticky => {
                p = least(prefill, |c| rendezvous(first, c.id));
                d = least(decode, |c| rendezvous(first, c.id));
            }
            Policy::CacheAware => p = least(prefill, |c| c.cost.backlog_ms + c.cost.compute_ms(demand, &self.weights)),
            Policy::Global => {
                let usable = (demand.tokens - 1) / self.page_tokens;
                let most = prefill.iter().map(|c| c.cost.cached_pages.min(usable)).max().unwrap_or(0);
                let holder = prefill.iter().filter(|c| c.cost.cached_pages.min(usable) == most);
                let holder = holder.min_by(|a, b| a.cost.backlog_ms.total_cmp(&b.cost.backlog_ms)).map_or(p, |c| c.id);
                let ttft = |c: &Candidate| {
                    let own = c.cost.cached_pages.min(usable);
                    if most <= own + self.weights.fetch_pages {
                        return c.cost.backlog_ms + c.cost.compute_ms(demand, &self.weights);
                    }
                    let there = placement::Worker { cached_pages: most, ..c.cost };
                    let bytes = u64::from(most - own) * self.page_bytes;
                    let transfer = 1e3 * bytes as f64 / self.link_bytes_per_s;
                    c.cost.backlog_ms + transfer + there.compute_ms(demand, &self.weights)
                };
                p = least(prefill, ttft);
                if most > prefill[p].cost.cached_pages.min(usable) + self.weights.fetch_pages {
                    fetch = Some(Fetch { holder, pages: most });
                }
            }
            Policy::LeastLoaded | Policy::Baton => {}
        }
        Choice { prefill: Some(p), decode: d, fetch }
    }
}

/// Returns the id of the cheapest candidate.
fn least(candidates: &[Candidate], cost: impl Fn(&Candidate) -> f64) -> usize {
    let cheapest = candidates.iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
    cheapest.expect("there is a worker of each kind").id
}

/// A number within (0, 1) drawn from key and worker (Thaler and Ravishankar 1998).
fn rendezvous(key: u64, worker: usize) -> f64 {
    StdRng::seed_from_u64(key ^ (worker as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).random()
}
