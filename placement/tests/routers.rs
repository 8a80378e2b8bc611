//! Several routers that place from the same reports and know nothing of each other.

use placement::{Candidate, Demand, Kind, Ledger, Policy, Report, Speed, Weights, Worker, place_beside};
use proptest::prelude::*;
use std::time::Duration;
use timing::Pace;

const WORKERS: usize = 8;
/// Each worker reports so often.
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
        free_pages: 100_000,
        held_pages: 0,
        cached_pages: 0,
        coming_pages: 0,
        page_tokens: 16,
        page_bytes: 1,
        speed: Speed { pace: Some(PACE), link_bytes_per_s: None },
    }
}

/// Lets `routers` place prompts of 20 ms for half a minute, at 85 % of what the workers can do, each as if it had `peers` others. Returns the mean
/// wait for a worker in milliseconds.
fn mean_wait_ms(routers: usize, peers: u32, seed: u64) -> f64 {
    let (mut random, weights) = (Random(seed), Weights::default());
    let demand = Demand { tokens: 2_000, max_output: 1 };
    let compute_ms = worker(0.0).compute_ms(&demand, &weights);
    let mut ledgers = vec![vec![Ledger::default(); WORKERS]; routers];
    let mut backlog = [0.0f64; WORKERS];
    let (mut waits, mut number, mut owed) = (Vec::new(), 0, 0.0);
    for ms in 0..30_000 {
        let now = Duration::from_millis(ms);
        for (id, backlog) in backlog.iter_mut().enumerate() {
            if (ms + 7 * id as u64) % REPORT_MS == 0 {
                let report = Report { received: number, backlog_ms: *backlog, pace: Some(PACE), ..Report::default() };
                ledgers.iter_mut().for_each(|own| own[id].report(report, now));
            }
            *backlog = (*backlog - 1.0).max(0.0);
        }
        owed += 0.85 * WORKERS as f64 / compute_ms;
        while owed >= 1.0 {
            owed -= 1.0;
            number += 1;
            let own = &mut ledgers[(random.next() % routers as u64) as usize];
            let seen: Vec<Candidate> =
                own.iter().enumerate().map(|(id, ledger)| candidate(id, worker(ledger.backlog_ms(now)))).collect();
            let placed = place_beside(peers, &demand, &seen, Policy::Local, &weights, random.next()).unwrap();
            let chosen = placed.decision.choice.decode;
            own[chosen].submit(number, compute_ms, 0);
            waits.push(backlog[chosen]);
            backlog[chosen] += compute_ms;
        }
    }
    waits.iter().sum::<f64>() / waits.len() as f64
}

#[test]
fn routers_do_not_follow_each_other() {
    for seed in 0..3 {
        let single = mean_wait_ms(1, 0, seed);
        for routers in [2, 4, 8] {
            let blind = mean_wait_ms(routers, 0, seed);
            let apart = mean_wait_ms(routers, routers as u32 - 1, seed);
            println!("{routers} routers: {blind:.1} ms blind, {apart:.1} ms apart, {single:.1} ms for a single one");
            assert!(apart < blind, "{routers} routers, seed {seed}: {apart} ms, {blind} ms without looking out");
        }
    }
}

proptest! {
    /// Whatever the others may do, a request goes nowhere that is worse by more than what they could have sent elsewhere, and with no others
    /// it goes where it is cheapest.
    #[test]
    fn nobody_is_sent_anywhere_bad(backlogs in proptest::collection::vec(0.0f64..5_000.0, 1..12), peers in 0u32..6, random: u64) {
        let (weights, demand) = (Weights::default(), Demand { tokens: 2_000, max_output: 1 });
        let seen: Vec<Candidate> = backlogs.iter().enumerate().map(|(id, ms)| candidate(id, worker(*ms))).collect();
        let placed = place_beside(peers, &demand, &seen, Policy::Local, &weights, random).unwrap();
        let all = placed.runners_up.iter().chain([&placed.decision]);
        let best = all.min_by(|a, b| a.cost.total().total_cmp(&b.cost.total())).unwrap().cost;
        let most = best.total() + weights.tie_ms.max(f64::from(peers) * (best.compute + best.step));
        prop_assert!(placed.decision.cost.total() <= most + 1e-9);
    }
}
