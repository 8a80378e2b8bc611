//! What a home is told to draw a token without the host: the terms of a race.

use super::{GREEDY, Sample};

/// How the token after some row of logits is drawn, where these are taken as they are: as [`super::draw`] does, from this alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Race {
    /// 1 / temperature.
    scale: f32,
    /// How far a logit may lie below the largest, so that min-p keeps its token.
    limit: f32,
    seed: u64,
    choice: u32,
    /// Of the drawn token among the output's.
    index: u32,
    /// 0 = all.
    top_k: u32,
    /// 1 = all.
    top_p: f32,
}

impl Race {
    /// Words of [`Race::words`].
    pub(crate) const WORDS: usize = 8;

    /// Returns it as kernels read it (`Terms` in `cuda/kernels/draw.cu`).
    pub(crate) fn words(&self) -> [u32; Self::WORDS] {
        let Self { scale, limit, seed, choice, index, top_k, top_p } = *self;
        [scale.to_bits(), limit.to_bits(), seed as u32, (seed >> 32) as u32, choice, index, top_k, top_p.to_bits()]
    }
}

impl Sample<'_> {
    /// Returns how the token is drawn, if it is, and if nothing but numbers is asked for: no change of single logits, no log-probabilities.
    pub(crate) fn race(&self) -> Option<Race> {
        let sampling = self.sampling;
        let numbers =
            sampling.temperature.is_finite() && (0.0..=1.0).contains(&sampling.min_p) && sampling.top_p >= 0.0;
        let plain = sampling.logprobs.is_none() && self.grammar.is_none() && !self.adjusts();
        if !numbers || !plain || sampling.temperature < GREEDY {
            return None;
        }
        let index = self.history.len().saturating_sub(self.prompt_tokens);
        Some(Race {
            scale: 1.0 / sampling.temperature,
            limit: farthest(sampling.temperature, sampling.min_p),
            seed: sampling.seed,
            choice: sampling.choice,
            index: u32::try_from(index).ok()?,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
        })
    }
}

/// Returns the largest distance below the largest logit whose weight is not below `min_p`: weights fall with the distance, so this is min-p, and
/// exact. Without it all are kept, whose weights may be 0: those never win.
fn farthest(temperature: f32, min_p: f32) -> f32 {
    if min_p == 0.0 {
        return f32::MAX;
    }
    let (scale, min_p) = (1.0 / f64::from(temperature), f64::from(min_p));
    let passes = |distance: f32| (f64::from(-distance) * scale).exp() >= min_p;
    // Next to where it must be: logarithms are right but for the last bits, and e^-x is 1 up to half of the last bit of 1.
    let mut farthest = ((-min_p.ln()).max(f64::EPSILON / 4.0) / scale).min(f64::from(f32::MAX)) as f32;
    while farthest < f32::MAX && passes(farthest.next_up()) {
        farthest = farthest.next_up();
    }
    while !passes(farthest) {
        farthest = farthest.next_down();
    }
    farthest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sampling;

    /// The race for the third token of an output, the first two of which are there.
    fn race(sampling: &Sampling) -> Option<Race> {
        let history = &[1, 2, 3];
        Sample { sampling, history, prompt_tokens: 1, forbidden: &[], min_tokens: 0, grammar: None }.race()
    }

    #[test]
    fn min_p_is_a_distance() {
        for temperature in [1e-5, 0.01, 0.3, 0.7, 1.0, 1.3, 2.0, 100.0, 1e20] {
            for min_p in [1e-40, 1e-9, 0.01, 0.05, 0.1, 0.5, 0.9, 1.0 - f32::EPSILON, 1.0] {
                let weight = |distance: f32| (f64::from(-distance) / f64::from(temperature)).exp();
                let scale = 1.0 / f64::from(temperature);
                let kept = |distance: f32| (f64::from(-distance) * scale).exp() >= f64::from(min_p);
                let limit = farthest(temperature, min_p);
                assert!(kept(limit) && !kept(limit.next_up()), "{temperature} {min_p}: {limit}, {}", weight(limit));
            }
        }
        assert_eq!(farthest(0.7, 0.0), f32::MAX);
    }

    #[test]
    fn what_changes_single_logits_does_not_race() {
        let check = |sampling: Sampling, expected: bool| {
            assert_eq!(race(&sampling).is_some(), expected, "{sampling:?}");
        };
        let warm = Sampling { temperature: 0.7, ..Sampling::default() };
        check(warm.clone(), true);
        check(Sampling { top_k: 9, top_p: 0.5, min_p: 0.1, seed: 8, choice: 2, ..warm.clone() }, true);
        check(Sampling::default(), false);
        check(Sampling { temperature: f32::NAN, ..warm.clone() }, false);
        check(Sampling { top_p: f32::NAN, ..warm.clone() }, false);
        check(Sampling { logprobs: Some(0), ..warm.clone() }, false);
        check(Sampling { logit_bias: vec![(1, 1.0)], ..warm.clone() }, false);
        check(Sampling { allowed_tokens: vec![1], ..warm.clone() }, false);
        check(Sampling { bad_words: vec![vec![1]], ..warm.clone() }, false);
        check(Sampling { repetition_penalty: 1.1, ..warm.clone() }, false);
        check(Sampling { frequency_penalty: 1.1, ..warm }, false);
    }

    #[test]
    fn terms_are_words() {
        let sampling =
            Sampling { temperature: 0.5, top_k: 3, top_p: 0.25, seed: 7 << 32 | 5, choice: 4, ..Sampling::default() };
        let words = race(&sampling).expect("it races").words();
        assert_eq!(words, [2f32.to_bits(), f32::MAX.to_bits(), 5, 7, 4, 2, 3, 0.25f32.to_bits()]);
    }
}
