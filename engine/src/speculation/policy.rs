//! How many drafts are worth it. Pure: what it knows is what it was told.
//!
//! A draft adds a token to a step, which costs time, and yields a token if it and all before it are right. The rate at which
//! tokens come is what counts: the policy takes the most promising drafts, one after the other, as long as (tokens expected) /
//! (time of the step, drafting included) grows. With few sequences a step reads weights and a token more is nearly free; in a large batch it is
//! not, and the best number of drafts is 0. Both curves are measured: how often the drafts of each sequence are right, and
//! how long steps of so many tokens take. A step of a size not seen yet is taken to cost what the next smaller one does, so sizes get
//! tried; and when nothing is drafted, one sequence is every now and then, so that the policy notices when times change.

use crate::scheduler::SequenceId;
use std::{collections::HashMap, time::Duration};

/// The rate of right drafts before anything is known.
const FIRST_RATE: f64 = 0.7;
/// How much one draft moves the rate of its sequence, and that of all.
const SEQUENCE_BLEND: f64 = 0.1;
const POOL_BLEND: f64 = 0.02;
/// How much one step moves the time of its size.
const TIME_BLEND: f64 = 0.2;
/// After so many steps without drafts one sequence tries some.
const PROBE_STEPS: u32 = 64;
/// Drafts must promise so much more than none: measurements are not that exact.
const MARGIN: f64 = 1.03;

/// A sequence that could be drafted for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Offer {
    pub(super) id: SequenceId,
    /// Drafts there are, or could be.
    pub(super) most: usize,
}

/// What was measured.
#[derive(Debug)]
pub(super) struct Policy {
    most: usize,
    /// Share of drafts that are right, given that all before them are.
    pool: f64,
    sequences: HashMap<SequenceId, f64>,
    steps: StepTimes,
    /// Seconds for one draft of every sequence.
    drafting: f64,
    /// Steps since drafts were last tried.
    idle: u32,
    probes: usize,
}

impl Policy {
    /// Makes one that never takes more than `most` drafts for a sequence.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            pool: FIRST_RATE,
            sequences: HashMap::new(),
            steps: StepTimes::default(),
            drafting: 0.0,
            idle: 0,
            probes: 0,
        }
    }

    /// Returns how many drafts of each of `offers`, which are all sequences of the step, to verify.
    pub(super) fn choose(&mut self, offers: &[Offer]) -> Vec<usize> {
        let mut counts = vec![0; offers.len()];
        let mut drafts: Vec<(f64, usize, usize)> = Vec::new();
        for (at, offer) in offers.iter().enumerate() {
            let rate = self.rate(offer.id);
            let depths = 1..=offer.most.min(self.most);
            drafts.extend(depths.map(|depth| (rate.powi(depth as i32), at, depth)));
        }
        if drafts.is_empty() {
            return counts;
        }
        // A sequence's drafts promise less and less, so any number of the best ones leaves no gap.
        drafts.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
        for &(_, at, depth) in &drafts[..self.worthwhile(offers.len(), &drafts)] {
            counts[at] = depth;
        }
        if counts.iter().any(|&count| count > 0) {
            self.idle = 0;
        } else {
            self.idle += 1;
            if self.idle >= PROBE_STEPS {
                self.idle = 0;
                self.probe(offers, &mut counts);
            }
        }
        counts
    }

    /// Returns how many of `drafts`, the best first, make the most of a step of `sequences` sequences.
    fn worthwhile(&self, sequences: usize, drafts: &[(f64, usize, usize)]) -> usize {
        let (mut expected, mut time, mut deepest) = (sequences as f64, self.steps.estimate(sequences), 0);
        let mut best = (expected / time * MARGIN, 0);
        for (count, &(promise, _, depth)) in (1..).zip(drafts) {
            expected += promise;
            deepest = deepest.max(depth);
            // More tokens never take less time, whatever was measured.
            time = time.max(self.steps.estimate(sequences + count));
            let rate = expected / (time + self.drafting * deepest as f64);
            if rate > best.0 {
                best = (rate, count);
            }
        }
        best.1
    }

    /// Lets one sequence try, each in its turn.
    fn probe(&mut self, offers: &[Offer], counts: &mut [usize]) {
        self.probes += 1;
        let turn = self.probes % offers.len();
        let order = (turn..offers.len()).chain(0..turn);
        if let Some(at) = order.into_iter().find(|&at| offers[at].most > 0) {
            counts[at] = offers[at].most.min(self.most);
        }
    }

    /// Learns that the first `accepted` of `drafts` drafts were right.
    pub(super) fn verified(&mut self, id: SequenceId, drafts: usize, accepted: usize) {
        let mut rate = self.rate(id);
        for right in (0..drafts.min(accepted + 1)).map(|draft| f64::from(draft < accepted)) {
            rate += SEQUENCE_BLEND * (right - rate);
            self.pool += POOL_BLEND * (right - self.pool);
        }
        self.sequences.insert(id, rate);
    }

    /// Learns the time of a step of `tokens` tokens.
    pub(super) fn step_took(&mut self, tokens: usize, took: Duration) {
        self.steps.add(tokens, took.as_secs_f64());
    }

    /// Learns the time of drafting `depth` tokens for every sequence.
    pub(super) fn drafting_took(&mut self, depth: usize, took: Duration) {
        if depth > 0 {
            let each = took.as_secs_f64() / depth as f64;
            self.drafting += if self.drafting == 0.0 { each } else { TIME_BLEND * (each - self.drafting) };
        }
    }

    /// Forgets the sequences of which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(SequenceId) -> bool) {
        self.sequences.retain(|id, _| keep(*id));
    }

    fn rate(&self, id: SequenceId) -> f64 {
        self.sequences.get(&id).copied().unwrap_or(self.pool).clamp(0.01, 0.99)
    }
}

/// Seconds of steps by their tokens: exact up to 16 tokens, then four sizes to the doubling.
#[derive(Debug, Default)]
struct StepTimes {
    sizes: Vec<Option<Size>>,
}

#[derive(Clone, Copy, Debug)]
struct Size {
    tokens: f64,
    seconds: f64,
}

impl StepTimes {
    fn add(&mut self, tokens: usize, seconds: f64) {
        let at = size_of(tokens);
        if self.sizes.len() <= at {
            self.sizes.resize(at + 1, None);
        }
        match &mut self.sizes[at] {
            Some(size) => {
                size.tokens += TIME_BLEND * (tokens as f64 - size.tokens);
                size.seconds += TIME_BLEND * (seconds - size.seconds);
            }
            size => *size = Some(Size { tokens: tokens as f64, seconds }),
        }
    }

    /// Returns the time between those of the sizes next to `tokens`; of what lies beyond all sizes the last one's; 1 when nothing is
    /// known.
    fn estimate(&self, tokens: usize) -> f64 {
        let wanted = tokens as f64;
        let known = || self.sizes.iter().flatten();
        let below = known().rfind(|size| size.tokens <= wanted);
        let above = known().find(|size| size.tokens > wanted);
        match (below, above) {
            (Some(below), Some(above)) => {
                let share = (wanted - below.tokens) / (above.tokens - below.tokens);
                below.seconds + share * (above.seconds - below.seconds)
            }
            (Some(only), None) | (None, Some(only)) => only.seconds,
            (None, None) => 1.0,
        }
    }
}

fn size_of(tokens: usize) -> usize {
    match tokens {
        0..=16 => tokens,
        _ => 16 + (4.0 * (tokens as f64 / 16.0).log2()).ceil() as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> SequenceId {
        SequenceId::for_tests(number)
    }

    fn offers(count: u64, most: usize) -> Vec<Offer> {
        (0..count).map(|number| Offer { id: id(number), most }).collect()
    }

    /// A policy that has seen steps that take `base + each * tokens` milliseconds.
    fn seasoned(base: f64, each: f64, rate: f64) -> Policy {
        let mut policy = Policy::new(4);
        for tokens in 1..=128 {
            policy.step_took(tokens, Duration::from_secs_f64((base + each * tokens as f64) / 1e3));
        }
        for _ in 0..4000 {
            let right = policy.pool < rate;
            policy.verified(id(999), 1, usize::from(right));
        }
        policy
    }

    #[test]
    fn free_tokens_are_all_taken_and_dear_ones_are_not() {
        let check = |base, each, rate, sequences, expected: usize| {
            let counts = seasoned(base, each, rate).choose(&offers(sequences, 4));
            assert_eq!(counts.iter().sum::<usize>(), expected, "{base} + {each} n ms, {rate}, {sequences} sequences");
        };
        check(10.0, 0.01, 0.8, 1, 4);
        check(10.0, 0.01, 0.3, 1, 4);
        check(10.0, 1.0, 0.8, 1, 4);
        check(10.0, 2.0, 0.2, 1, 1);
        check(10.0, 9.0, 0.4, 1, 0);
        // A large batch pays for every token.
        check(10.0, 1.0, 0.6, 32, 0);
        check(0.1, 1.0, 0.9, 1, 0);
        // In between, each sequence gets what pays.
        check(10.0, 0.5, 0.5, 8, 8);
    }

    #[test]
    fn good_sequences_get_the_drafts() {
        let mut policy = seasoned(10.0, 0.8, 0.5);
        for _ in 0..50 {
            policy.verified(id(0), 1, 0);
            policy.verified(id(1), 4, 4);
        }
        assert_eq!(policy.choose(&offers(2, 4)), [0, 4]);
        assert_eq!(policy.choose(&[Offer { id: id(1), most: 2 }, Offer { id: id(0), most: 0 }]), [2, 0]);
    }

    #[test]
    fn the_time_of_drafting_counts() {
        let mut policy = seasoned(10.0, 0.01, 0.6);
        policy.drafting_took(2, Duration::from_millis(2));
        let few: usize = policy.choose(&offers(1, 4)).iter().sum();
        assert!((1..4).contains(&few), "{few}");
        (0..50).for_each(|_| policy.drafting_took(1, Duration::from_millis(20)));
        assert_eq!(policy.choose(&offers(1, 4)), [0]);
    }

    #[test]
    fn a_loss_is_probed_now_and_then_by_one_sequence() {
        let mut policy = seasoned(0.1, 1.0, 0.5);
        let steps: Vec<Vec<usize>> = (0..4 * PROBE_STEPS).map(|_| policy.choose(&offers(3, 4))).collect();
        let tries: Vec<&Vec<usize>> = steps.iter().filter(|counts| counts.iter().any(|&count| count > 0)).collect();
        assert_eq!(tries, [&[0, 4, 0], &[0, 0, 4], &[4, 0, 0], &[0, 4, 0]]);
    }

    #[test]
    fn sizes_not_seen_yet_are_tried_and_then_known() {
        let mut policy = Policy::new(4);
        policy.step_took(1, Duration::from_millis(10));
        assert_eq!(policy.choose(&offers(1, 4)), [4]);
        (0..20).for_each(|_| policy.step_took(5, Duration::from_millis(90)));
        assert_eq!(policy.choose(&offers(1, 4)), [0]);
    }

    #[test]
    fn nothing_to_verify_is_no_idle_step() {
        let mut policy = seasoned(0.1, 1.0, 0.5);
        for _ in 0..3 * PROBE_STEPS {
            assert_eq!(policy.choose(&offers(2, 0)), [0, 0]);
        }
        assert_eq!(policy.choose(&[]), Vec::<usize>::new());
        assert_eq!(policy.idle, 0);
    }

    #[test]
    fn ended_sequences_are_forgotten() {
        let mut policy = Policy::new(4);
        policy.verified(id(1), 2, 1);
        policy.retain(|_| false);
        assert!(policy.sequences.is_empty());
    }

    #[test]
    fn times_between_sizes_are_interpolated() {
        let mut times = StepTimes::default();
        assert_eq!(times.estimate(5), 1.0);
        times.add(2, 10.0);
        assert_eq!((times.estimate(1), times.estimate(50)), (10.0, 10.0));
        times.add(64, 72.0);
        assert_eq!((times.estimate(2), times.estimate(33), times.estimate(64)), (10.0, 41.0, 72.0));
    }
}
