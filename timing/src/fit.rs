//! Learning a pace from steps. Pure.
//!
//! What steps cost beside each other changes little: that is the *shape*, learned by least squares over the last hundreds of steps. How
//! fast the machine is may change at any moment: that is the *scale*, which follows within a second of work or so. Both are kept twice. Steps
//! that hold no prompt tell of the step, the sequences and their context; what a step with a prompt takes beyond the context of the others
//! tells of the tokens and their pairs.
//!
//! No number may be negative, and one of which the steps tell nothing, because it went along with another all the time, stays what it
//! was. A single slow step, a page fault or a stolen core, counts no more than a few times what was expected.
#![allow(clippy::needless_range_loop, reason = "matrices read best by their indices")]

use crate::{Pace, Work};
use std::time::Duration;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Fit {
    decode: Part<3>,
    prompt: Part<2>,
}

impl Fit {
    /// Prompt tokens below which a step says nothing about prompts: they hide behind the weights.
    const FEWEST_TOKENS: u64 = 16;

    /// Learns from steps that are as good as each other, such as the medians of many: there is no time in which a machine could change.
    pub fn of(steps: &[(Work, Duration)]) -> Self {
        let mut fit = Self::default();
        steps.iter().for_each(|(work, took)| fit.sort(work, *took, Part::weigh, Part::weigh));
        fit.decode.solve();
        fit.prompt.solve();
        fit
    }

    /// Takes in that a step of `work` took `took`.
    pub fn add(&mut self, work: &Work, took: Duration) {
        self.sort(work, took, Part::add, Part::add);
    }

    fn sort(
        &mut self,
        work: &Work,
        took: Duration,
        decode: fn(&mut Part<3>, [f64; 3], f64),
        prompt: fn(&mut Part<2>, [f64; 2], f64),
    ) {
        let us = |took: Duration| (took.as_secs_f64() * 1e6).max(1.0);
        if work.tokens == 0 {
            if work.sequences > 0 {
                decode(&mut self.decode, [1.0, work.sequences as f64, work.context as f64], us(took));
            }
        } else if work.tokens >= Self::FEWEST_TOKENS {
            // The weights are read behind the arithmetic of so many tokens; the context of the others comes on top.
            let [_, _, context_us] = self.decode.numbers();
            let beside = Duration::from_secs_f64(context_us * work.context as f64 * 1e-6);
            prompt(&mut self.prompt, [work.tokens as f64, work.pairs as f64], us(took.saturating_sub(beside)));
        }
    }

    /// Returns what was learned; `None` until there was a step with a prompt or one without. The numbers of a part of which nothing is known
    /// are 0.
    pub fn pace(&self) -> Option<Pace> {
        if self.decode.steps + self.prompt.steps == 0 {
            return None;
        }
        let ([step_us, sequence_us, context_us], [token_us, pair_us]) = (self.decode.numbers(), self.prompt.numbers());
        Some(Pace { step_us, sequence_us, context_ns: context_us * 1e3, token_us, pair_ns: pair_us * 1e3 })
    }
}

/// The numbers `a` of `time = a·x`, in microseconds.
#[derive(Clone, Debug)]
struct Part<const N: usize> {
    /// Sum of `x xᵀ`, in the shape's time.
    xx: [[f64; N]; N],
    /// Sum of `x time`, in the shape's time.
    xy: [f64; N],
    shape: [f64; N],
    /// What a unit of the shape's time takes now.
    scale: f64,
    steps: u64,
}

impl<const N: usize> Default for Part<N> {
    fn default() -> Self {
        Self { xx: [[0.0; N]; N], xy: [0.0; N], shape: [0.0; N], scale: 1.0, steps: 0 }
    }
}

impl<const N: usize> Part<N> {
    /// Steps after which one counts half in the shape.
    const SHAPE_STEPS: f64 = 128.0;
    /// Time of work after which a step counts half in the scale, but for this least and this largest share of one step.
    const SCALE_SECONDS: f64 = 0.3;
    const SCALE_SHARE: (f64, f64) = (0.03, 0.3);
    /// By how much a step may exceed what was expected of it and be believed, by the scale and by the shape.
    const BELIEVED: (f64, f64) = (4.0, 1.5);
    /// Steps before one is doubted.
    const TRUSTING: u64 = 4;
    /// Weight of a number's last value, as a share of what the steps say.
    const INERTIA: f64 = 1e-3;
    /// Of coordinate descent; numbers that often go together need many. About a microsecond.
    const ROUNDS: usize = 100;

    fn numbers(&self) -> [f64; N] {
        self.shape.map(|number| number * self.scale)
    }

    fn add(&mut self, x: [f64; N], us: f64) {
        let expected: f64 = self.shape.iter().zip(x).map(|(a, x)| a * x).sum();
        let mut in_shape = us / self.scale;
        if self.steps >= Self::TRUSTING && expected > 0.0 {
            let (least, most) = Self::SCALE_SHARE;
            let share = (1.0 - (-expected * self.scale * 1e-6 / Self::SCALE_SECONDS).exp2()).clamp(least, most);
            let off = (us / expected).min(self.scale * Self::BELIEVED.0);
            self.scale += share * (off - self.scale);
            in_shape = (us / self.scale).clamp(expected / Self::BELIEVED.1, expected * Self::BELIEVED.1);
        }
        self.weigh(x, in_shape);
        self.solve();
    }

    /// Adds a step that took `in_shape` of the shape's time to the sums.
    fn weigh(&mut self, x: [f64; N], in_shape: f64) {
        self.steps += 1;
        let keep = (-1.0 / Self::SHAPE_STEPS).exp2();
        // A long step and a short one are worth the same: errors count as shares.
        let weight = in_shape.powi(-2);
        for i in 0..N {
            for j in 0..N {
                self.xx[i][j] = self.xx[i][j] * keep + weight * x[i] * x[j];
            }
            self.xy[i] = self.xy[i] * keep + weight * x[i] * in_shape;
        }
    }

    fn solve(&mut self) {
        let last = self.shape;
        for _ in 0..Self::ROUNDS {
            for i in 0..N {
                let diagonal = self.xx[i][i];
                if diagonal <= 0.0 {
                    continue;
                }
                let others: f64 = (0..N).filter(|&j| j != i).map(|j| self.xx[i][j] * self.shape[j]).sum();
                let inertia = if self.steps > 1 { Self::INERTIA * diagonal } else { 0.0 };
                self.shape[i] = ((self.xy[i] - others + inertia * last[i]) / (diagonal + inertia)).max(0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRUE: Pace = Pace { step_us: 8_000.0, sequence_us: 150.0, context_ns: 30.0, token_us: 240.0, pair_ns: 15.0 };

    fn decode(sequences: u64, context: u64) -> Work {
        Work { sequences, context: sequences * context, ..Work::default() }
    }

    fn prompt(context: usize, tokens: usize) -> Work {
        let mut work = Work::default();
        work.chunk(context, tokens);
        work
    }

    /// Steps of a worker under changing load.
    fn steps(count: u64) -> impl Iterator<Item = Work> {
        (0..count).map(|n| match n % 5 {
            0 => prompt(((n * 577) % 3_000) as usize, 100 + ((n * 131) % 900) as usize),
            _ => decode(1 + (n * 7) % 24, 100 + (n * 313) % 5_000),
        })
    }

    fn off(predicted: &Pace, truth: &Pace, work: Work) -> f64 {
        predicted.step(&work).as_secs_f64() / truth.step(&work).as_secs_f64()
    }

    #[test]
    fn steps_that_were_not_seen_are_predicted() {
        let mut fit = Fit::default();
        assert_eq!(fit.pace(), None);
        steps(400).for_each(|work| fit.add(&work, TRUE.step(&work)));
        let pace = fit.pace().unwrap();
        for work in [decode(1, 10), decode(16, 8_000), prompt(0, 2_000), prompt(8_000, 512)] {
            let off = off(&pace, &TRUE, work);
            assert!((0.93..1.07).contains(&off), "{work:?}: {off} with {pace:?}");
        }
    }

    #[test]
    fn what_is_measured_at_leisure_is_fitted_at_once() {
        let measured: Vec<(Work, Duration)> = steps(40).map(|work| (work, TRUE.step(&work))).collect();
        let pace = Fit::of(&measured).pace().unwrap();
        for (work, _) in &measured {
            let off = off(&pace, &TRUE, *work);
            assert!((0.95..1.05).contains(&off), "{work:?}: {off} with {pace:?}");
        }
        // Who is asked last counts no more than the others.
        let one_off =
            measured.iter().enumerate().map(|(n, (work, took))| (*work, if n == 39 { *took * 3 } else { *took }));
        let pace = Fit::of(&one_off.collect::<Vec<_>>()).pace().unwrap();
        let off = off(&pace, &TRUE, decode(4, 1_000));
        assert!((0.9..1.1).contains(&off), "{off}");
    }

    #[test]
    fn a_worker_that_slows_down_is_known_as_slow_within_seconds() {
        let mut fit = Fit::default();
        let slow = Pace { step_us: 32_000.0, sequence_us: 600.0, context_ns: 120.0, token_us: 960.0, pair_ns: 60.0 };
        steps(400).for_each(|work| fit.add(&work, TRUE.step(&work)));
        let mut spent = Duration::ZERO;
        for work in steps(1_000) {
            fit.add(&work, slow.step(&work));
            spent += slow.step(&work);
            if spent >= Duration::from_secs(8) {
                break;
            }
        }
        let pace = fit.pace().unwrap();
        for work in [decode(8, 1_000), prompt(0, 1_000)] {
            let off = off(&pace, &slow, work);
            assert!((0.85..1.15).contains(&off), "{work:?}: {off} with {pace:?}");
        }
    }

    #[test]
    fn one_stolen_core_is_not_a_slow_worker() {
        let mut fit = Fit::default();
        steps(400).for_each(|work| fit.add(&work, TRUE.step(&work)));
        fit.add(&decode(4, 1_000), Duration::from_millis(500));
        let off = off(&fit.pace().unwrap(), &TRUE, decode(4, 1_000));
        assert!(off < 1.2, "{off}");
    }

    #[test]
    fn what_was_not_seen_is_not_made_up() {
        let mut fit = Fit::default();
        fit.add(&prompt(0, 100), Duration::from_millis(50));
        let pace = fit.pace().unwrap();
        assert!((pace.chunk_ms(0, 100) - 50.0).abs() < 2.5 && pace.step_us == 0.0, "{pace:?}");
        let mut fit = Fit::default();
        fit.add(&decode(1, 100), Duration::from_millis(20));
        let pace = fit.pace().unwrap();
        assert!((pace.decode_ms(1.0, 100.0) - 20.0).abs() < 1.0 && pace.token_us == 0.0, "{pace:?}");
    }

    proptest! {
        #[test]
        fn whatever_is_measured_can_be_reckoned_with(
            samples in proptest::collection::vec((0u64..500, 0u64..200_000, 0usize..5_000, 0usize..100_000, 0u64..20_000_000), 1..60),
        ) {
            let mut fit = Fit::default();
            for (sequences, context, tokens, before, us) in samples {
                let mut work = Work { sequences, context, ..Work::default() };
                work.chunk(before, tokens);
                fit.add(&work, Duration::from_micros(us));
                prop_assert!(fit.pace().is_none_or(|pace| pace.is_valid()), "{:?}", fit.pace());
            }
        }
    }
}
