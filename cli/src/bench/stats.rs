//! Order statistics of samples.

/// Samples of one quantity.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// Returns the value that `share` (0 to 1) of the samples do not exceed (nearest rank). Without samples, NaN.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// Returns the median.
    pub(super) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Returns the largest: of repeated throughput measurements, the one that was disturbed least.
    pub(super) fn best(&self) -> f64 {
        self.quantile(1.0)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(samples: I) -> Self {
        Self(samples.into_iter().collect())
    }
}

impl IntoIterator for Samples {
    type Item = f64;
    type IntoIter = std::vec::IntoIter<f64>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl Extend<f64> for Samples {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, samples: I) {
        self.0.extend(samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let samples: Samples = (1..=100).rev().map(f64::from).collect();
        assert_eq!((samples.median(), samples.quantile(0.99), samples.best()), (50.0, 99.0, 100.0));
        assert_eq!(Samples::from_iter([7.0]).quantile(0.01), 7.0);
        assert!(Samples::default().median().is_nan());
    }
}
