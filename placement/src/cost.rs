//! What a placement is expected to cost. Pure.
//!
//! Every term is in milliseconds: of this request until its last token, plus what the placement takes from others, those who are already
//! there and those who will come while it is computed. The sum is compared, the terms explain. Speeds come from the workers' reports, or
//! from the priors in [`Weights`].

use crate::Weights;
use timing::Pace;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Known tokens: the prompt and what earlier attempts emitted.
    pub tokens: u32,
    /// Tokens it may still produce.
    pub max_output: u32,
}

/// What is known of a worker when a request is placed.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// Sequences that run, wait or are on their way there.
    pub sequences: u32,
    /// Milliseconds of computing before it could begin with another prompt.
    pub backlog_ms: f64,
    /// Milliseconds before it could begin to send a prefix to a peer.
    pub sending_ms: f64,
    /// Pages free or evictable.
    pub free_pages: u32,
    /// Pages that sequences hold.
    pub held_pages: u32,
    /// Leading pages of the demand in its prefix cache.
    pub cached_pages: u32,
    /// Leading pages of the demand that it will have computed before it comes to this one: a sibling's, who is still in its line.
    pub coming_pages: u32,
    /// Tokens in a page.
    pub page_tokens: u32,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// How fast it is.
    pub speed: Speed,
}

/// Speeds a worker has reported; `None` is not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speed {
    /// Of its steps; a part of which nothing is known is 0.
    pub pace: Option<Pace>,
    /// Of hand-offs it sends.
    pub link_bytes_per_s: Option<f64>,
}

/// The terms, all in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Until the prompts before it are computed.
    pub queue: f64,
    /// Until pages of its prefix have come from a peer.
    pub fetch: f64,
    /// Computing the tokens that are neither cached nor fetched.
    pub compute: f64,
    /// Until enough pages are free.
    pub room: f64,
    /// The hand-off: its fixed part, and the part of the transfer that compute does not hide.
    pub transfer: f64,
    /// Prompts being computed on the decode worker, between this sequence's steps.
    pub stall: f64,
    /// One decode step: the time between two tokens.
    pub step: f64,
    /// All the decode steps of the expected output.
    pub decode: f64,
    /// What the sequences already there lose.
    pub neighbours: f64,
    /// What those lose that will come while this prompt waits and is computed.
    pub followers: f64,
}

impl Cost {
    /// What placements are compared by.
    pub fn total(&self) -> f64 {
        let own = self.ttft() + self.transfer + self.stall + self.decode;
        own + self.neighbours + self.followers
    }

    /// Predicted time to first token.
    pub fn ttft(&self) -> f64 {
        self.queue.max(self.fetch) + self.compute + self.room
    }

    /// The terms by name, in the order in which they come about; `step` is part of `decode`.
    pub fn terms(&self) -> [(&'static str, f64); 9] {
        [
            ("queue", self.queue),
            ("fetch", (self.fetch - self.queue).max(0.0)),
            ("room", self.room),
            ("compute", self.compute),
            ("transfer", self.transfer),
            ("stall", self.stall),
            ("decode", self.decode),
            ("neighbours", self.neighbours),
            ("followers", self.followers),
        ]
    }
}

/// The cost of computing the prompt on the decode worker itself.
pub(crate) fn local(demand: &Demand, decode: &Worker, weights: &Weights) -> Cost {
    let compute = decode.compute_ms(demand, weights);
    let joined = decode.joining(demand, weights);
    Cost {
        queue: decode.backlog_ms,
        compute,
        room: decode.room_ms(demand, weights),
        // Every sequence there, and those that will come, wait while the prompt is computed in their steps.
        neighbours: joined.neighbours
            + weights.disturbance
                * decode.added_ms(demand, weights)
                * (f64::from(decode.sequences) + weights.expected_neighbours),
        followers: followers_ms(decode.backlog_ms, compute, weights),
        ..joined
    }
}

/// The cost of computing the prompt on `prefill` and handing it off to `decode`.
pub(crate) fn remote(demand: &Demand, prefill: &Worker, decode: &Worker, weights: &Weights) -> Cost {
    let compute = prefill.compute_ms(demand, weights);
    Cost {
        queue: prefill.backlog_ms,
        compute,
        room: prefill.room_ms(demand, weights) + decode.room_ms(demand, weights),
        transfer: weights.handoff_ms + exposed_ms(prefill.transfer_ms(demand, decode, weights), compute, weights),
        stall: decode.backlog_ms,
        followers: followers_ms(prefill.backlog_ms, compute, weights),
        ..decode.joining(demand, weights)
    }
}

/// Returns `worker` as it will be when it has fetched the pages that `holder` has more, and the milliseconds until then.
pub(crate) fn fetched(demand: &Demand, worker: &Worker, holder: &Worker, weights: &Weights) -> (Worker, f64) {
    let pages = holder.reusable_pages(demand).saturating_sub(worker.cached_pages);
    let bytes = u64::from(pages) * worker.page_bytes;
    let cached_pages = worker.cached_pages + pages;
    let ms = weights.handoff_ms + holder.sending_ms + holder.link_ms(bytes, weights);
    (Worker { cached_pages, free_pages: worker.free_pages.saturating_sub(pages), ..*worker }, ms)
}

/// A transfer runs beside the compute, layer group by layer group. The last group shows, and whatever is longer than the compute.
fn exposed_ms(transfer: f64, compute: f64, weights: &Weights) -> f64 {
    (transfer * weights.exposed_transfer.min(1.0)).max(transfer - compute)
}

/// Those who come while the worker is busy wait for this prompt, too.
fn followers_ms(queue: f64, compute: f64, weights: &Weights) -> f64 {
    compute * weights.followers_per_s * (queue + compute) * 1e-3
}

impl Worker {
    fn pace(&self, weights: &Weights) -> Pace {
        self.speed.pace.map_or(weights.prior, |pace| pace.or(&weights.prior))
    }

    /// Milliseconds until the prompt is computed, once it is begun: a step at least.
    pub fn compute_ms(&self, demand: &Demand, weights: &Weights) -> f64 {
        self.added_ms(demand, weights).max(self.pace(weights).decode_ms(0.0, 0.0))
    }

    /// Milliseconds by which it makes steps longer that others are part of.
    fn added_ms(&self, demand: &Demand, weights: &Weights) -> f64 {
        let missing = self.missing_tokens(demand);
        self.pace(weights).chunk_ms(u64::from(demand.tokens.saturating_sub(missing)), u64::from(missing))
    }

    /// Tokens it has to compute. The last one always is: its logits are not in the cache.
    pub fn missing_tokens(&self, demand: &Demand) -> u32 {
        let known = self.cached_pages.max(self.coming_pages).saturating_mul(self.page_tokens);
        demand.tokens.saturating_sub(known).max(1)
    }

    /// Pages of the demand that another could use: never that of its last token.
    fn reusable_pages(&self, demand: &Demand) -> u32 {
        self.cached_pages.min(demand.tokens.saturating_sub(1) / self.page_tokens.max(1))
    }

    fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens.max(1))
    }

    /// Pages of the demand that it does not hold.
    pub fn missing_pages(&self, demand: &Demand) -> u32 {
        self.pages_for(demand.tokens).saturating_sub(self.cached_pages)
    }

    fn transfer_ms(&self, demand: &Demand, decode: &Worker, weights: &Weights) -> f64 {
        self.link_ms(u64::from(decode.missing_pages(demand)) * decode.page_bytes, weights)
    }

    fn link_ms(&self, bytes: u64, weights: &Weights) -> f64 {
        1e3 * bytes as f64 / self.speed.link_bytes_per_s.unwrap_or(weights.prior_link_bytes_per_s)
    }

    /// Pages come free as running sequences end: one is assumed in the time of one undisturbed step.
    fn room_ms(&self, demand: &Demand, weights: &Weights) -> f64 {
        let short = self.missing_pages(demand).saturating_sub(self.free_pages);
        f64::from(short) * self.pace(weights).decode_ms(1.0, 0.0)
    }

    /// The terms of decoding here, beside the sequences that are.
    fn joining(&self, demand: &Demand, weights: &Weights) -> Cost {
        let pace = self.pace(weights);
        let output = f64::from(demand.max_output.min(weights.expected_output_tokens));
        let context = f64::from(self.held_pages) * f64::from(self.page_tokens);
        let step = pace.decode_ms(f64::from(self.sequences) + 1.0, context + f64::from(demand.tokens));
        // What this sequence adds to a step, every other sequence waits for as well.
        let growth = pace.decode_ms(1.0, f64::from(demand.tokens)) - pace.decode_ms(0.0, 0.0);
        Cost { step, decode: output * step, neighbours: output * growth * f64::from(self.sequences), ..Cost::default() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn idle() -> Worker {
        Worker {
            sequences: 0,
            backlog_ms: 0.0,
            sending_ms: 0.0,
            free_pages: 1_000,
            held_pages: 0,
            cached_pages: 0,
            coming_pages: 0,
            page_tokens: 16,
            page_bytes: 49_152,
            speed: Speed::default(),
        }
    }

    fn demand(tokens: u32) -> Demand {
        Demand { tokens, max_output: 256 }
    }

    fn remote_is_cheaper(tokens: u32, cached_pages: u32) -> bool {
        let weights = Weights::default();
        let decode = Worker { cached_pages, ..idle() };
        remote(&demand(tokens), &idle(), &decode, &weights).total() < local(&demand(tokens), &decode, &weights).total()
    }

    #[test]
    fn an_idle_cluster_sends_long_prompts_away_and_keeps_short_and_cached_ones() {
        assert!(remote_is_cheaper(2_000, 0));
        assert!(remote_is_cheaper(100, 0));
        assert!(!remote_is_cheaper(10, 0));
        assert!(!remote_is_cheaper(2_000, 124));
    }

    #[test]
    fn terms_are_milliseconds() {
        let pace = Pace { step_us: 20_000.0, sequence_us: 1_000.0, context_ns: 100.0, token_us: 1_000.0, pair_ns: 0.0 };
        let worker =
            Worker { backlog_ms: 500.0, speed: Speed { pace: Some(pace), link_bytes_per_s: Some(1e6) }, ..idle() };
        let weights = Weights {
            exposed_transfer: 0.5,
            handoff_ms: 2.0,
            expected_output_tokens: 10,
            followers_per_s: 0.0,
            ..Weights::default()
        };
        let cost = remote(&Demand { tokens: 160, max_output: 100 }, &worker, &worker, &weights);
        assert_eq!((cost.queue, cost.compute, cost.stall), (500.0, 160.0, 500.0));
        // Ten pages of 49,152 bytes at 1 MB/s take 491.52 ms, of which 160 ms run beside the compute.
        assert!((cost.transfer - (2.0 + 491.52 - 160.0)).abs() < 1e-6, "{cost:?}");
        assert!((cost.step - 21.016).abs() < 1e-9, "20 ms, 1 ms for the sequence, 160 tokens of 100 ns");
        assert!((cost.decode - 210.16).abs() < 1e-9);
        assert_eq!(cost.ttft(), 660.0);
        assert!((cost.terms().iter().map(|(_, ms)| ms).sum::<f64>() - cost.total()).abs() < 1e-9);
    }

    #[test]
    fn a_fetch_saves_compute_and_hides_behind_the_queue() {
        let weights = Weights::default();
        let holder = Worker { cached_pages: 60, ..idle() };
        let (worker, ms) = fetched(&demand(1_000), &idle(), &holder, &weights);
        assert_eq!((worker.cached_pages, worker.missing_tokens(&demand(1_000))), (60, 40));
        let bytes = 60.0 * 49_152.0;
        assert!((ms - (weights.handoff_ms + 1e3 * bytes / weights.prior_link_bytes_per_s)).abs() < 1e-9);
        let waiting = Cost { queue: 100.0, fetch: 40.0, compute: 10.0, ..Cost::default() };
        assert_eq!((waiting.ttft(), Cost { queue: 0.0, ..waiting }.ttft()), (110.0, 50.0));
    }

    #[test]
    fn the_page_of_the_last_token_is_not_fetched() {
        let holder = Worker { cached_pages: 63, ..idle() };
        let (worker, _) = fetched(&demand(1_008), &idle(), &holder, &Weights::default());
        assert_eq!(worker.cached_pages, 62);
    }

    fn worker() -> impl Strategy<Value = Worker> {
        let pace = (0.1..1e6, 0.0..1e4, 0.0..1e3, 0.1..1e5, 0.0..1e4).prop_map(
            |(step_us, sequence_us, context_ns, token_us, pair_ns)| Pace {
                step_us,
                sequence_us,
                context_ns,
                token_us,
                pair_ns,
            },
        );
        let speed = (proptest::option::of(pace), proptest::option::of(1e5..1e11));
        (0u32..500, 0f64..1e6, 0u32..5_000, 0u32..5_000, 0u32..300, speed).prop_map(
            |(sequences, backlog_ms, free_pages, held_pages, cached_pages, (pace, link_bytes_per_s))| Worker {
                sequences,
                backlog_ms,
                free_pages,
                held_pages,
                cached_pages,
                speed: Speed { pace, link_bytes_per_s },
                ..idle()
            },
        )
    }

    /// The same worker with more to do.
    fn busier(worker: Worker, sequences: u32, backlog_ms: f64, pages: u32) -> Worker {
        Worker {
            sequences: worker.sequences + sequences,
            backlog_ms: worker.backlog_ms + backlog_ms,
            free_pages: worker.free_pages.saturating_sub(pages),
            held_pages: worker.held_pages + pages,
            ..worker
        }
    }

    fn not_less(a: f64, b: f64) -> bool {
        a >= b - b.abs() * 1e-9
    }

    proptest! {
        #[test]
        fn more_load_never_costs_less(p in worker(), d in worker(), tokens in 1u32..10_000, more in (0u32..100, 0f64..10_000.0, 0u32..5_000)) {
            let (weights, demand) = (Weights::default(), demand(tokens));
            let busy = |w| busier(w, more.0, more.1, more.2);
            let base = remote(&demand, &p, &d, &weights).total();
            prop_assert!(not_less(remote(&demand, &busy(p), &d, &weights).total(), base));
            prop_assert!(not_less(remote(&demand, &p, &busy(d), &weights).total(), base));
            prop_assert!(not_less(local(&demand, &busy(d), &weights).total(), local(&demand, &d, &weights).total()));
        }

        #[test]
        fn more_overlap_never_costs_more(p in worker(), d in worker(), tokens in 1u32..10_000, more in 0u32..300) {
            let (weights, demand) = (Weights { exposed_transfer: 0.0, ..Weights::default() }, demand(tokens));
            let warmer = |w: Worker| Worker { cached_pages: w.cached_pages + more, ..w };
            let base = remote(&demand, &p, &d, &weights).total();
            prop_assert!(not_less(base, remote(&demand, &warmer(p), &d, &weights).total()));
            prop_assert!(not_less(base, remote(&demand, &p, &warmer(d), &weights).total()));
            prop_assert!(not_less(local(&demand, &d, &weights).total(), local(&demand, &warmer(d), &weights).total()));
        }

        #[test]
        fn every_term_is_finite_and_not_negative(p in worker(), d in worker(), tokens in 1u32..200_000) {
            let (weights, demand) = (Weights::default(), demand(tokens));
            for cost in [remote(&demand, &p, &d, &weights), local(&demand, &d, &weights)] {
                prop_assert!(cost.terms().iter().all(|(_, ms)| ms.is_finite() && *ms >= 0.0), "{:?}", cost);
                prop_assert!(not_less(cost.terms().iter().map(|(_, ms)| ms).sum::<f64>(), cost.total()));
            }
        }
    }
}
