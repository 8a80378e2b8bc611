//! What a placement is expected to cost. Pure.
//!
//! Every term is in milliseconds: of this request until its last token, plus what the placement takes from the sequences that are
//! already there. The sum is compared, the terms explain. Speeds come from the workers' reports, or from the priors in
//! [`Weights`].

use crate::config::Weights;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    /// Known tokens: the prompt and what earlier attempts emitted.
    pub(crate) tokens: u32,
    /// Tokens it may still produce.
    pub(crate) max_output: u32,
}

/// What is known of a worker when a request is placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Worker {
    /// Sequences that run, wait or are on their way there.
    pub(crate) sequences: u32,
    /// Tokens known and not yet computed.
    pub(crate) queued_tokens: u64,
    /// Pages free or evictable.
    pub(crate) free_pages: u32,
    /// Leading pages of the demand in its prefix cache.
    pub(crate) cached_pages: u32,
    /// Tokens in a page.
    pub(crate) page_tokens: u32,
    /// Bytes of a page.
    pub(crate) page_bytes: u64,
    /// How fast it is.
    pub(crate) speed: Speed,
}

/// Speeds a worker has reported; `None` is not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Speed {
    /// Of prompts.
    pub(crate) prefill_tokens_per_s: Option<f64>,
    /// A decode step with one sequence, in milliseconds.
    pub(crate) step_ms: Option<f64>,
    /// Of hand-offs it sends.
    pub(crate) link_bytes_per_s: Option<f64>,
}

/// The terms, all in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Until the tokens queued before it are computed.
    pub(crate) queue: f64,
    /// Computing the tokens that are not cached.
    pub(crate) compute: f64,
    /// Until enough pages are free.
    pub(crate) room: f64,
    /// The hand-off: its fixed part, and the part of the transfer that compute does not hide.
    pub(crate) transfer: f64,
    /// Prompts being computed on the decode worker, between this sequence's steps.
    pub(crate) stall: f64,
    /// One decode step: the time between two tokens.
    pub(crate) step: f64,
    /// All the decode steps of the expected output.
    pub(crate) decode: f64,
    /// What the sequences already there lose.
    pub(crate) neighbours: f64,
}

impl Cost {
    /// What placements are compared by.
    pub(crate) fn total(&self) -> f64 {
        self.queue + self.compute + self.room + self.transfer + self.stall + self.decode + self.neighbours
    }

    /// Predicted time to first token.
    pub(crate) fn ttft(&self) -> f64 {
        self.queue + self.compute + self.room
    }
}

/// The cost of computing the prompt on the decode worker itself.
pub(crate) fn local(demand: &Demand, decode: &Worker, weights: &Weights) -> Cost {
    let compute = decode.compute_ms(demand, weights);
    let joined = decode.joining(demand, weights);
    Cost {
        queue: decode.queue_ms(weights),
        compute,
        room: decode.room_ms(demand, weights),
        // Every sequence there, and those that will come, wait while the prompt is computed between their steps.
        neighbours: joined.neighbours + compute * (f64::from(decode.sequences) + weights.expected_neighbours),
        ..joined
    }
}

/// The cost of computing the prompt on `prefill` and handing it off to `decode`.
pub(crate) fn remote(demand: &Demand, prefill: &Worker, decode: &Worker, weights: &Weights) -> Cost {
    let compute = prefill.compute_ms(demand, weights);
    Cost {
        queue: prefill.queue_ms(weights),
        compute,
        room: prefill.room_ms(demand, weights) + decode.room_ms(demand, weights),
        transfer: weights.handoff_ms + exposed_ms(prefill.transfer_ms(demand, decode, weights), compute, weights),
        stall: decode.queue_ms(weights),
        ..decode.joining(demand, weights)
    }
}

/// A transfer runs beside the compute, layer group by layer group. The last group shows, and whatever is longer than the compute.
fn exposed_ms(transfer: f64, compute: f64, weights: &Weights) -> f64 {
    (transfer * weights.exposed_transfer.min(1.0)).max(transfer - compute)
}

impl Worker {
    fn prefill_ms(&self, tokens: f64, weights: &Weights) -> f64 {
        1e3 * tokens / self.speed.prefill_tokens_per_s.unwrap_or(weights.prior_prefill_tokens_per_s)
    }

    fn queue_ms(&self, weights: &Weights) -> f64 {
        self.prefill_ms(self.queued_tokens as f64, weights)
    }

    fn compute_ms(&self, demand: &Demand, weights: &Weights) -> f64 {
        self.prefill_ms(f64::from(self.missing_tokens(demand)), weights)
    }

    /// Tokens it has to compute. The last one always is: its logits are not in the cache.
    pub(crate) fn missing_tokens(&self, demand: &Demand) -> u32 {
        demand.tokens.saturating_sub(self.cached_pages.saturating_mul(self.page_tokens)).max(1)
    }

    fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens.max(1))
    }

    fn missing_pages(&self, demand: &Demand) -> u32 {
        self.pages_for(demand.tokens).saturating_sub(self.cached_pages)
    }

    fn transfer_ms(&self, demand: &Demand, decode: &Worker, weights: &Weights) -> f64 {
        let bytes = u64::from(decode.missing_pages(demand)) * decode.page_bytes;
        1e3 * bytes as f64 / self.speed.link_bytes_per_s.unwrap_or(weights.prior_link_bytes_per_s)
    }

    /// Pages come free as running sequences end: one is assumed in the time of one undisturbed step.
    fn room_ms(&self, demand: &Demand, weights: &Weights) -> f64 {
        let short = self.missing_pages(demand).saturating_sub(self.free_pages);
        f64::from(short) * self.single_step_ms(weights)
    }

    fn single_step_ms(&self, weights: &Weights) -> f64 {
        self.speed.step_ms.unwrap_or(weights.prior_decode_step_ms)
    }

    /// The terms of decoding here, beside the sequences that are.
    fn joining(&self, demand: &Demand, weights: &Weights) -> Cost {
        let single = self.single_step_ms(weights);
        let growth = single * weights.step_growth;
        let output = f64::from(demand.max_output.min(weights.expected_output_tokens));
        let step = single + growth * f64::from(self.sequences);
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
            queued_tokens: 0,
            free_pages: 1_000,
            cached_pages: 0,
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
        let worker = Worker {
            queued_tokens: 500,
            speed: Speed { prefill_tokens_per_s: Some(1_000.0), step_ms: Some(20.0), link_bytes_per_s: Some(1e6) },
            ..idle()
        };
        let weights =
            Weights { exposed_transfer: 0.5, handoff_ms: 2.0, expected_output_tokens: 10, ..Weights::default() };
        let cost = remote(&Demand { tokens: 160, max_output: 100 }, &worker, &worker, &weights);
        assert_eq!((cost.queue, cost.compute, cost.stall), (500.0, 160.0, 500.0));
        // Ten pages of 49,152 bytes at 1 MB/s take 491.52 ms, of which 160 ms run beside the compute.
        assert!((cost.transfer - (2.0 + 491.52 - 160.0)).abs() < 1e-6, "{cost:?}");
        assert_eq!((cost.step, cost.decode), (20.0, 200.0));
        assert_eq!(cost.ttft(), 660.0);
    }

    fn worker() -> impl Strategy<Value = Worker> {
        let speed = (proptest::option::of(10.0..1e5), proptest::option::of(0.1..1e3), proptest::option::of(1e5..1e11));
        (0u32..500, 0u64..1_000_000, 0u32..5_000, 0u32..300, speed).prop_map(
            |(
                sequences,
                queued_tokens,
                free_pages,
                cached_pages,
                (prefill_tokens_per_s, step_ms, link_bytes_per_s),
            )| Worker {
                sequences,
                queued_tokens,
                free_pages,
                cached_pages,
                speed: Speed { prefill_tokens_per_s, step_ms, link_bytes_per_s },
                ..idle()
            },
        )
    }

    /// The same worker with more to do.
    fn busier(worker: Worker, sequences: u32, queued_tokens: u64, pages: u32) -> Worker {
        Worker {
            sequences: worker.sequences + sequences,
            queued_tokens: worker.queued_tokens + queued_tokens,
            free_pages: worker.free_pages.saturating_sub(pages),
            ..worker
        }
    }

    fn not_less(a: f64, b: f64) -> bool {
        a >= b - b.abs() * 1e-9
    }

    proptest! {
        #[test]
        fn more_load_never_costs_less(p in worker(), d in worker(), tokens in 1u32..10_000, more in (0u32..100, 0u64..10_000, 0u32..5_000)) {
            let (weights, demand) = (Weights::default(), demand(tokens));
            let busy = |w| busier(w, more.0, more.1, more.2);
            let base = remote(&demand, &p, &d, &weights).total();
            prop_assert!(not_less(remote(&demand, &busy(p), &d, &weights).total(), base));
            prop_assert!(not_less(remote(&demand, &p, &busy(d), &weights).total(), base));
            prop_assert!(not_less(local(&demand, &busy(d), &weights).total(), local(&demand, &d, &weights).total()));
        }

        #[test]
        fn more_overlap_never_costs_more(p in worker(), d in worker(), tokens in 1u32..10_000, more in 0u32..300) {
            let (weights, demand) = (Weights::default(), demand(tokens));
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
                for term in [cost.queue, cost.compute, cost.room, cost.transfer, cost.stall, cost.step, cost.decode, cost.neighbours] {
                    prop_assert!(term.is_finite() && term >= 0.0, "{:?}", cost);
                }
            }
        }
    }
}
