//! How far predictions of the time to the first token can be trusted. Pure.
//!
//! A request with an objective is turned away on a prediction, so the prediction has to lean to the late side: it is multiplied by a factor
//! that nine in ten requests lately stayed within (a quantile followed by steps, as in Robbins and Monro). And because what is always
//! turned away can never show that the prediction was wrong, one request in [`TRY_EVERY`] goes where nothing waits, whatever is predicted.

use std::time::Duration;

/// How often a request goes against the prediction, if its workers have nothing else to do.
pub const TRY_EVERY: Duration = Duration::from_secs(1);

/// What is shorter says more about clocks and wake-ups than about workers.
const LEAST: Duration = Duration::from_millis(10);

/// Part of requests that the factor is to cover.
const COVERED: f64 = 0.9;

/// How much of itself one observation moves the factor at most.
const STEP: f64 = 0.1;

/// Beyond this a prediction is not unsure but wrong.
const FACTORS: std::ops::RangeInclusive<f64> = 0.5..=4.0;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Forecast {
    factor: f64,
    last_try: Option<Duration>,
}

impl Default for Forecast {
    fn default() -> Self {
        Self { factor: 1.0, last_try: None }
    }
}

impl Forecast {
    /// Returns within what time a first token predicted for `ms` milliseconds from now comes.
    pub fn ttft(&self, ms: f64) -> Duration {
        milliseconds(ms * self.factor)
    }

    /// Notes what became of a prediction.
    pub fn learn(&mut self, predicted_ms: f64, took: Duration) {
        if predicted_ms < LEAST.as_secs_f64() * 1e3 {
            return;
        }
        let late = took.as_secs_f64() * 1e3 > predicted_ms * self.factor;
        let step = if late { 1.0 + STEP * COVERED } else { 1.0 - STEP * (1.0 - COVERED) };
        self.factor = (self.factor * step).clamp(*FACTORS.start(), *FACTORS.end());
    }

    /// Whether a request that is predicted to be too slow goes all the same, to idle workers.
    pub fn tries(&mut self, now: Duration) -> bool {
        let due = self.last_try.is_none_or(|last| now >= last + TRY_EVERY);
        if due {
            self.last_try = Some(now);
        }
        due
    }
}

pub(crate) fn milliseconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms.max(0.0) / 1e3).unwrap_or(Duration::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_in_a_second_goes_against_the_prediction() {
        let mut forecast = Forecast::default();
        let at = |ms| Duration::from_millis(ms);
        assert_eq!([0, 1, 999, 1_000, 1_001].map(|ms| forecast.tries(at(ms))), [true, false, false, true, false]);
    }

    proptest! {
        /// Whatever the spread of the times, about nine in ten stay within what is said.
        #[test]
        fn nine_in_ten_come_in_time(bias in 0.6f64..2.0, seed: u64) {
            use rand::{Rng, SeedableRng, rngs::StdRng};
            let (mut random, mut forecast) = (StdRng::seed_from_u64(seed), Forecast::default());
            let mut in_time = 0;
            for i in 0..6_000 {
                let predicted = random.random_range(20.0..2_000.0);
                let took = Duration::from_secs_f64(predicted * bias * random.random_range(0.7..1.5) / 1e3);
                in_time += usize::from(i >= 1_000 && took <= forecast.ttft(predicted));
                forecast.learn(predicted, took);
            }
            prop_assert!((4_250..4_750).contains(&in_time), "{in_time} of 5,000");
        }
    }
}
