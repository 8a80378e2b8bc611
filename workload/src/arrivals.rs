//! When requests come.

use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp, Gamma};
use std::{str::FromStr, time::Duration};

/// How the gaps between requests are distributed around their mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// All gaps are the same.
    Constant,
    /// Independent of each other, as from many users: exponential gaps.
    Poisson,
    /// Gamma-distributed gaps with this coefficient of variation (standard deviation over mean): 1 is Poisson, above it requests come
    /// in bursts.
    Bursty(f64),
}

impl Arrivals {
    /// Returns arrival times without end, `rate` a second on average, the first at 0. A seed gives the same times in one build.
    ///
    /// # Panics
    /// Where `rate`, or the variation of bursts, is not positive and finite.
    pub fn times(self, rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
        assert!(rate > 0.0 && rate.is_finite(), "requests arrive {rate} times a second");
        let mut random = StdRng::seed_from_u64(seed);
        let gap: Box<dyn Fn(&mut StdRng) -> f64> = match self {
            Self::Constant => Box::new(move |_| 1.0 / rate),
            Self::Poisson => {
                let gaps = Exp::new(rate).expect("a positive rate");
                Box::new(move |random| gaps.sample(random))
            }
            Self::Bursty(variation) => {
                assert!(variation > 0.0 && variation.is_finite(), "the coefficient of variation is {variation}");
                // Shape k has variation 1 / sqrt(k), and mean k times the scale.
                let shape = 1.0 / (variation * variation);
                let gaps = Gamma::new(shape, 1.0 / (rate * shape)).expect("positive shape and scale");
                Box::new(move |random| gaps.sample(random))
            }
        };
        std::iter::successors(Some(0.0), move |at| Some(at + gap(&mut random))).map(Duration::from_secs_f64)
    }
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let variation = |text: &str| text.parse().ok().filter(|value: &f64| (0.01..=100.0).contains(value));
        match text.split_once(':') {
            None if text == "constant" => Ok(Self::Constant),
            None if text == "poisson" => Ok(Self::Poisson),
            Some(("bursty", value)) => variation(value)
                .map(Self::Bursty)
                .ok_or_else(|| format!("the variation of bursts is {value:?}, it must be from 0.01 to 100")),
            _ => Err(format!("{text:?} is no way to arrive: constant, poisson or bursty:VARIATION, such as bursty:3")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks mean and variation of 20,000 gaps, each to 5 %: some four standard errors of the widest.
    fn check(arrivals: Arrivals, variation: f64) {
        let times: Vec<f64> = arrivals.times(4.0, 7).take(20_001).map(|at| at.as_secs_f64()).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((mean * 4.0 - 1.0).abs() < 0.05, "{arrivals:?}: mean {mean}");
        assert!(
            (deviation / mean - variation).abs() < 0.05 * variation.max(0.02),
            "{arrivals:?}: {}",
            deviation / mean
        );
        assert!(arrivals.times(4.0, 7).take(100).eq(arrivals.times(4.0, 7).take(100)), "a seed repeats itself");
    }

    #[test]
    fn gaps_have_the_mean_and_variation_asked_for() {
        check(Arrivals::Constant, 0.0);
        check(Arrivals::Poisson, 1.0);
        check(Arrivals::Bursty(0.5), 0.5);
        check(Arrivals::Bursty(1.0), 1.0);
        check(Arrivals::Bursty(2.0), 2.0);
        let differ = |arrivals: Arrivals| arrivals.times(4.0, 1).nth(1) != arrivals.times(4.0, 2).nth(1);
        assert!(differ(Arrivals::Poisson) && differ(Arrivals::Bursty(2.0)));
    }

    #[test]
    fn names_are_read() {
        assert_eq!("constant".parse(), Ok(Arrivals::Constant));
        assert_eq!("poisson".parse(), Ok(Arrivals::Poisson));
        assert_eq!("bursty:2.5".parse(), Ok(Arrivals::Bursty(2.5)));
        for text in ["", "bursty", "bursty:", "bursty:0", "bursty:nan", "bursty:1e9", "poisson:1"] {
            let problem = text.parse::<Arrivals>().unwrap_err();
            assert!(problem.contains("0.01 to 100") || problem.contains("constant, poisson"), "{text:?}: {problem}");
        }
    }
}
