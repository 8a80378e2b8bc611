//! Several routers that place from the same reports and know nothing of each other.

use placement::{Candidate, Demand, Kind, Ledger, Policy, Report, Speed, Weights, Worker, place_beside};
use proptest::prelude::*;
use std::time::Duration;
use timing::Pace;

const WORKERS: usize = 16;
/// Each worker reports when it is done with a prompt, and so often.
const REPORT_MS: u64 = 50;
const PACE: Pace = Pace { step_us: 1_000.0, sequence_us: 10.0, context_ns: 0.0, token_us: 10.0, pair_ns: 0.0 };

/// Numbers that look random (Steele, Lea, Flood: splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let a = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        b ^ (b >> 31)
    }
}

fn candidate(id: usize, cost: Worker) -> Candidate {
    Candidate {
        id,
        kind: Kind::Decode,
        fingerprint: 0,
        draining: false,
        excluded: false,
        lacks_adapter: false,
        max_tokens: 1 << 20,
        cost,
    }
}

fn worker(backlog_ms: f64) -> Worker {
    Worker {
        sequences: 0,
        backlog_ms,
        sending_ms: 0.0,
        free_pages: 100_000,
        held_pages: 0,
        cached_pages: 0,
        coming_pages: 0,
        page_tokens: 16,
        page_bytes: 1,
        speed: Speed { pace: Some(PACE), link_bytes_per_s: None },
    }
}

/// Lets `routers` place prompts of 200 ms, at 85 % of what the workers can do, each as if it had `peers` others. Returns the mean wait for a
/// worker in milliseconds.
fn mean_wait_ms(routers: usize, peers: u32, seed: u64) -> f64 {
    let (mut arrivals, mut random, weights) = (Random(seed), Random(seed + 1_000), Weights::default());
    let demand = Demand { tokens: 20_000, max_output: 1 };
    let compute_ms = worker(0.0).compute_ms(&demand, &weights);
    let gap_ms = compute_ms / (0.85 * WORKERS as f64);
    let mut ledgers = vec![vec![Ledger::default(); WORKERS]; routers];
    let mut backlog = [0.0f64; WORKERS];
    let (mut waits, mut number, mut next_ms) = (Vec::new(), 0, 0.0);
    for ms in 0..150_000 {
        let now = Duration::from_millis(ms);
        for (id, backlog) in backlog.iter_mut().enumerate() {
            let prompts = (*backlog / compute_ms).ceil();
            *backlog = (*backlog - 1.0).max(0.0);
            let is_done = (*backlog / compute_ms).ceil() < prompts;
            if is_done || (ms + 7 * id as u64).is_multiple_of(REPORT_MS) {
                let report = Report { received: number, backlog_ms: *backlog, pace: Some(PACE), ..Report::default() };
                ledgers.iter_mut().for_each(|own| own[id].report(report, now));
            }
        }
        while next_ms <= ms as f64 {
            next_ms -= gap_ms * ((arrivals.next() >> 11) as f64 / (1u64 << 53) as f64).max(1e-12).ln();
            number += 1;
            let own = &mut ledgers[(arrivals.next() % routers as u64) as usize];
            let seen: Vec<Candidate> =
                own.iter().enumerate().map(|(id, ledger)| candidate(id, worker(ledger.backlog_ms(now)))).collect();
            let placed = place_beside(peers, &demand, &seen, Policy::Local, &weights, random.next()).unwrap();
            let chosen = placed.decision.choice.decode;
            own[chosen].submit(number, compute_ms, 0, now);
            waits.push(backlog[chosen]);
            backlog[chosen] += compute_ms;
        }
    }
    waits.iter().sum::<f64>() / waits.len() as f64
}

#[test]
fn routers_do_not_follow_each_other() {
    let mean =
        |routers: usize, peers: usize| (0..2).map(|seed| mean_wait_ms(routers, peers as u32, seed)).sum::<f64>() / 2.0;
    let single = mean(1, 0);
    // Two hardly follow each other; the more there are, the more there is to be had.
    for (routers, most) in [(2, 1.0), (4, 0.9), (8, 0.85)] {
        let (blind, apart) = (mean(routers, 0), mean(routers, routers - 1));
        println!("{routers} routers: {apart:.1} ms, without looking out {blind:.1}, a single one {single:.1}");
        assert!(apart < most * blind, "{routers} routers wait {apart} ms, {blind} ms without looking out");
    }
}

proptest! {
    /// However many others there are, a request goes nowhere that is worse by more than half of what it takes.
    #[test]
    fn nobody_is_sent_anywhere_bad(backlogs in proptest::collection::vec(0.0f64..5_000.0, 1..12), peers in 0u32..6, random: u64) {
        let (weights, demand) = (Weights::default(), Demand { tokens: 2_000, max_output: 1 });
        let seen: Vec<Candidate> = backlogs.iter().enumerate().map(|(id, ms)| candidate(id, worker(*ms))).collect();
        let placed = place_beside(peers, &demand, &seen, Policy::Local, &weights, random).unwrap();
        let all = placed.runners_up.iter().chain([&placed.decision]);
        let best = all.min_by(|a, b| a.cost.total().total_cmp(&b.cost.total())).unwrap().cost;
        let most = best.total() + weights.tie_ms.max(best.compute / 2.0);
        prop_assert!(placed.decision.cost.total() <= most + 1e-9);
    }
}
