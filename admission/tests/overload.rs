//! More asked for than can be done, in virtual time: what is done still counts.

use admission::{Ask, Forecast, Limits, Objective, Queue, Refusal, Supply, Working, supply};
use placement::{Kind, Policy};
use std::{collections::HashMap, time::Duration};

const WORKERS: usize = 8;
/// Of each worker, as it reports it.
const TOKENS_PER_S: f64 = 10_000.0;
const MEAN_TOKENS: f64 = 1_000.0;
const WANTED: Duration = Duration::from_millis(1_000);
/// Reports are so old at most, and the router looks so often.
const REPORT_MS: u64 = 50;
const LOOK_MS: u64 = 2;
const SECONDS: u64 = 60;
/// Not counted: the queue fills and the factor settles.
const WARM_UP: Duration = Duration::from_secs(10);

/// Numbers that look random (Steele, Lea, Flood: splitmix64).
struct Random(u64);

impl Random {
    /// In (0, 1].
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let a = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((b ^ (b >> 31)) >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.next().ln()
    }
}

#[derive(Clone, Copy)]
struct Request {
    arrived: Duration,
    tokens: u64,
    /// What computing it takes in truth, in milliseconds.
    takes_ms: f64,
}

/// A worker computes one prompt after the other.
#[derive(Clone, Copy, Default)]
struct Worker {
    free_at_ms: f64,
    /// What it last said of its backlog, and what was sent since.
    reported: (f64, f64),
    sent_ms: f64,
    sequences: u32,
}

impl Worker {
    /// As the router sees it.
    fn backlog_ms(&self, now_ms: f64) -> f64 {
        let (backlog, at) = self.reported;
        (backlog - (now_ms - at)).max(0.0) + self.sent_ms
    }
}

/// What came of a run.
#[derive(Debug, Default)]
struct Outcome {
    /// Requests and tokens a second whose first token came in time.
    good: f64,
    good_tokens: f64,
    /// Of those that were served at all, the part that came in time.
    in_time: f64,
    /// Longest time until a refusal.
    slowest_refusal: Duration,
    /// Part of the time that workers computed.
    busy: f64,
}

struct Cluster {
    workers: [Worker; WORKERS],
    forecast: Forecast,
    served: Vec<(Duration, u64, bool)>,
    refused: Vec<Duration>,
    worked_ms: f64,
    /// What the router learns when: factor of one prediction each.
    lessons: Vec<(f64, f64, Duration)>,
}

impl Cluster {
    fn supply(&self, now_ms: f64) -> Supply {
        let working = self.workers.map(|worker| Working {
            kind: Kind::Decode,
            sequences: worker.sequences,
            backlog_ms: worker.backlog_ms(now_ms),
            free_tokens: 1 << 40,
            tokens_per_s: TOKENS_PER_S,
        });
        supply(&working, Policy::Local, 500.0)
    }

    fn best(&self, now_ms: f64) -> usize {
        let by_backlog =
            |a: &usize, b: &usize| self.workers[*a].backlog_ms(now_ms).total_cmp(&self.workers[*b].backlog_ms(now_ms));
        (0..WORKERS).min_by(by_backlog).unwrap()
    }

    fn predict_ms(&self, request: &Request, now_ms: f64) -> f64 {
        self.workers[self.best(now_ms)].backlog_ms(now_ms) + 1e3 * request.tokens as f64 / TOKENS_PER_S
    }

    /// Places a request that has its turn. `promised_ms`: what it was let in with, if it had to wait and there is an objective.
    fn place(&mut self, request: &Request, now: Duration, objective: bool, promised_ms: Option<f64>) {
        let now_ms = now.as_secs_f64() * 1e3;
        let placed_ms = self.predict_ms(request, now_ms);
        if objective && promised_ms.is_none() && self.forecast.ttft(placed_ms) > WANTED {
            return self.refused.push(now - request.arrived);
        }
        let predicted_ms = promised_ms.unwrap_or(placed_ms);
        let best = self.best(now_ms);
        let worker = &mut self.workers[best];
        worker.sent_ms += 1e3 * request.tokens as f64 / TOKENS_PER_S;
        worker.free_at_ms = worker.free_at_ms.max(now_ms) + request.takes_ms;
        worker.sequences += 1;
        self.worked_ms += request.takes_ms;
        let first_token = Duration::from_secs_f64(worker.free_at_ms / 1e3);
        self.lessons.push((worker.free_at_ms, predicted_ms, first_token - request.arrived));
        self.served.push((request.arrived, request.tokens, first_token - request.arrived <= WANTED));
    }
}

/// Offers `load` times what the workers can compute.
fn run(load: f64, objective: bool, seed: u64) -> Outcome {
    let mut random = Random(seed);
    let mut queue = Queue::new(Limits { max_running: 1 << 20, max_waiting: 1_024, quantum_tokens: 4_096 });
    let mut cluster = Cluster {
        workers: [Worker::default(); WORKERS],
        forecast: Forecast::default(),
        served: Vec::new(),
        refused: Vec::new(),
        worked_ms: 0.0,
        lessons: Vec::new(),
    };
    let (mut waiting, mut out) = (HashMap::new(), Vec::new());
    // Steps differ from what is reported of them; on the whole they take a tenth longer.
    let mean_s = 1.1 * MEAN_TOKENS / TOKENS_PER_S;
    let gap_s = mean_s / (WORKERS as f64 * load);
    let mut next_s = random.exponential(gap_s);
    for ms in 0..SECONDS * 1_000 {
        let (now, now_ms) = (Duration::from_millis(ms), ms as f64);
        for (id, worker) in cluster.workers.iter_mut().enumerate() {
            if (ms + 7 * id as u64).is_multiple_of(REPORT_MS) {
                let left = (worker.free_at_ms - now_ms).max(0.0) / 1.1;
                (worker.reported, worker.sent_ms) = ((left, now_ms), 0.0);
                worker.sequences = u32::from(left > 0.0);
            }
        }
        let known = cluster.lessons.extract_if(.., |(at, _, _)| *at <= now_ms).collect::<Vec<_>>();
        known.into_iter().for_each(|(_, predicted, took)| cluster.forecast.learn(predicted, took));
        if ms % LOOK_MS == 0 {
            queue.supply(cluster.supply(now_ms));
        }
        while next_s * 1e3 <= now_ms {
            next_s += random.exponential(gap_s);
            let tokens = random.exponential(MEAN_TOKENS).clamp(1.0, 5_000.0) as u64;
            let takes_ms = 1e3 * tokens as f64 / TOKENS_PER_S * (0.8 + 0.6 * random.next());
            let request = Request { arrived: now, tokens, takes_ms };
            if queue.pass(1, tokens) {
                cluster.place(&request, now, objective, None);
                continue;
            }
            let service_ms = cluster.predict_ms(&request, now_ms);
            let objective = objective.then_some(Objective { ttft: WANTED, service_ms });
            let patience = Duration::from_secs(10);
            let ask = Ask { class: 0, key: 0, tokens, share: 1, patience, objective };
            match queue.wait(now, ask, &cluster.forecast) {
                Ok(waits) => drop(waiting.insert(waits.ticket, (request, waits.promised_ms))),
                Err(_) => cluster.refused.push(Duration::ZERO),
            }
        }
        queue.pump(now, &mut out);
        for (ticket, outcome) in out.drain(..) {
            let (request, promised_ms) = waiting.remove(&ticket).unwrap();
            match outcome {
                Ok(()) => cluster.place(&request, now, objective, promised_ms),
                Err(Refusal::TooSlow { .. } | Refusal::Expired { .. } | Refusal::Full { .. }) => {
                    cluster.refused.push(now - request.arrived);
                }
            }
        }
    }
    let counted_s = SECONDS as f64 - WARM_UP.as_secs_f64();
    let counted: Vec<_> = cluster.served.iter().filter(|(arrived, _, _)| *arrived >= WARM_UP).collect();
    let good: Vec<_> = counted.iter().filter(|(_, _, in_time)| *in_time).collect();
    Outcome {
        good: good.len() as f64 / counted_s,
        good_tokens: good.iter().map(|(_, tokens, _)| *tokens).sum::<u64>() as f64 / counted_s,
        in_time: good.len() as f64 / counted.len() as f64,
        slowest_refusal: cluster.refused.iter().max().copied().unwrap_or_default(),
        busy: cluster.worked_ms / (SECONDS as f64 * 1e3 * WORKERS as f64),
    }
}

#[test]
fn goodput_stays_flat_at_three_times_what_can_be_done() {
    for seed in 0..5 {
        let (whole, over) = (run(1.0, true, seed), run(3.0, true, seed));
        println!("seed {seed}: 1x {whole:?}\n        3x {over:?}");
        println!("        3x without objectives {:?}", run(3.0, false, seed));
        assert!(over.good >= 0.95 * whole.good, "seed {seed}: requests");
        assert!(over.good_tokens >= 0.95 * whole.good_tokens, "seed {seed}: tokens");
        assert!(over.in_time > 0.95, "seed {seed}: what is taken on comes in time");
        assert!(over.busy > 0.95, "seed {seed}: no worker is left idle");
        for run in [whole, over] {
            assert_eq!(run.slowest_refusal, Duration::ZERO, "seed {seed}: who is refused is told on arrival");
        }
    }
}
