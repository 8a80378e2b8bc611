//! The figures of a run: exact percentiles of what every request saw, and how many were served well enough.
//!
//! Latencies count from when a request was *meant* to arrive, whether or not the sender was late: a server that stalls its
//! clients would otherwise be measured only while it does well ("coordinated omission").

use serde::{Serialize, Serializer};
use std::time::Duration;

/// What one request that was served to its end saw. All times share one origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// When it was meant to arrive.
    pub arrived: Duration,
    /// When each piece of the answer came, in order; at least one. Usually that is a token each.
    pub pieces: Vec<Duration>,
    /// Tokens of the answer.
    pub output_tokens: usize,
}

impl Served {
    /// Returns the time to the first token.
    pub fn ttft(&self) -> Duration {
        self.pieces.first().map_or(Duration::ZERO, |first| first.saturating_sub(self.arrived))
    }

    /// Returns the time to the last token.
    pub fn e2e(&self) -> Duration {
        self.pieces.last().map_or(Duration::ZERO, |last| last.saturating_sub(self.arrived))
    }

    /// Returns the times between one piece and the next.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.pieces.windows(2).map(|pair| pair[1].saturating_sub(pair[0]))
    }

    /// Returns the mean time for each token after the first, where there is more than one.
    pub fn tpot(&self) -> Option<Duration> {
        let tokens = u32::try_from(self.output_tokens.checked_sub(1)?).ok().filter(|&tokens| tokens > 0)?;
        Some((self.e2e().saturating_sub(self.ttft())) / tokens)
    }
}

/// What a request must see to count as served well. What is not asked for is met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Objectives {
    /// Longest time to the first token.
    #[serde(rename = "ttft_ms", serialize_with = "optional_millis")]
    pub ttft: Option<Duration>,
    /// Longest mean time for each token after the first of a request (DistServe's TPOT objective, OSDI 2024).
    #[serde(rename = "itl_ms", serialize_with = "optional_millis")]
    pub itl: Option<Duration>,
}

impl Objectives {
    /// Says whether `served` meets all of them.
    pub fn met(&self, served: &Served) -> bool {
        let within = |limit: Option<Duration>, value: Duration| limit.is_none_or(|limit| value <= limit);
        within(self.ttft, served.ttft()) && within(self.itl, served.tpot().unwrap_or_default())
    }
}

/// The figures of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Requests sent.
    pub requests: usize,
    /// Those that were not served to their end.
    pub failed: usize,
    /// From the first arrival to the last token.
    #[serde(rename = "span_s", serialize_with = "seconds")]
    pub span: Duration,
    /// Requests a second that were served.
    pub throughput: f64,
    /// Tokens of answers a second.
    pub output_tokens_per_s: f64,
    pub objectives: Objectives,
    /// Requests that met the objectives.
    pub good: usize,
    /// Those a second.
    pub goodput: f64,
    /// Time to the first token.
    #[serde(rename = "ttft_ms")]
    pub ttft: Distribution,
    /// Times between pieces of an answer, of all requests together.
    #[serde(rename = "itl_ms")]
    pub itl: Distribution,
    /// Mean time for each token after the first, by request.
    #[serde(rename = "tpot_ms")]
    pub tpot: Distribution,
    /// Time to the last token.
    #[serde(rename = "e2e_ms")]
    pub e2e: Distribution,
}

impl Summary {
    /// Sums up a run in which `failed` more requests than those `served` were sent.
    pub fn of(served: &[Served], failed: usize, objectives: Objectives) -> Self {
        let first = served.iter().map(|request| request.arrived).min().unwrap_or_default();
        let last = served.iter().filter_map(|request| request.pieces.last()).max().copied().unwrap_or_default();
        let span = last.saturating_sub(first);
        let per_second = |count: usize| if span.is_zero() { 0.0 } else { count as f64 / span.as_secs_f64() };
        let good = served.iter().filter(|request| objectives.met(request)).count();
        Self {
            requests: served.len() + failed,
            failed,
            span,
            throughput: per_second(served.len()),
            output_tokens_per_s: per_second(served.iter().map(|request| request.output_tokens).sum()),
            objectives,
            good,
            goodput: per_second(good),
            ttft: Distribution::of(served.iter().map(Served::ttft)),
            itl: Distribution::of(served.iter().flat_map(Served::gaps)),
            tpot: Distribution::of(served.iter().filter_map(Served::tpot)),
            e2e: Distribution::of(served.iter().map(Served::e2e)),
        }
    }
}

/// Durations, summed up. All zero where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Distribution {
    pub count: usize,
    #[serde(serialize_with = "millis")]
    pub mean: Duration,
    #[serde(serialize_with = "millis")]
    pub p50: Duration,
    #[serde(serialize_with = "millis")]
    pub p90: Duration,
    #[serde(serialize_with = "millis")]
    pub p99: Duration,
    #[serde(serialize_with = "millis")]
    pub max: Duration,
}

impl Distribution {
    /// Sorts and sums up `values`. Percentile p is the least value that p % of them do not exceed.
    pub fn of(values: impl Iterator<Item = Duration>) -> Self {
        let mut values: Vec<Duration> = values.collect();
        values.sort_unstable();
        let Some(&max) = values.last() else { return Self::default() };
        let count = values.len();
        let percentile = |percent: usize| values[(count * percent).div_ceil(100).max(1) - 1];
        let nanos: u128 = values.iter().map(Duration::as_nanos).sum();
        let mean = Duration::from_nanos((nanos / count as u128).try_into().unwrap_or(u64::MAX));
        Self { count, mean, p50: percentile(50), p90: percentile(90), p99: percentile(99), max }
    }
}

fn millis<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(value.as_secs_f64() * 1e3)
}

fn optional_millis<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| value.as_secs_f64() * 1e3).serialize(serializer)
}

fn seconds<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(value.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn served(arrived: u64, pieces: &[u64]) -> Served {
        Served { arrived: ms(arrived), pieces: pieces.iter().map(|&at| ms(at)).collect(), output_tokens: pieces.len() }
    }

    #[test]
    fn a_run_is_summed_up() {
        let objectives = Objectives { ttft: Some(ms(100)), itl: Some(ms(20)) };
        // Good; late at first; slow afterwards; one token, which has no gap to be slow in.
        let runs =
            [served(0, &[100, 110, 140]), served(0, &[101, 110]), served(500, &[510, 600]), served(900, &[1000])];
        let summary = Summary::of(&runs, 1, objectives);
        assert_eq!((summary.requests, summary.failed, summary.good), (5, 1, 2));
        assert_eq!(summary.span, ms(1000));
        assert_eq!((summary.throughput, summary.goodput, summary.output_tokens_per_s), (4.0, 2.0, 8.0));
        assert_eq!(
            (summary.ttft.mean, summary.ttft.p50, summary.ttft.max),
            (Duration::from_micros(77_750), ms(100), ms(101))
        );
        assert_eq!((summary.itl.count, summary.itl.p50, summary.itl.max), (4, ms(10), ms(90)));
        assert_eq!((summary.tpot.count, summary.tpot.p50), (3, ms(20)));
        assert_eq!(summary.e2e.max, ms(140));
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["ttft_ms"]["p99"], 101.0);
        assert_eq!(json["objectives"]["itl_ms"], 20.0);
        assert_eq!(json["span_s"], 1.0);
    }

    #[test]
    fn nothing_is_summed_up_to_nothing() {
        let summary = Summary::of(&[], 3, Objectives::default());
        assert_eq!((summary.requests, summary.good, summary.goodput), (3, 0, 0.0));
        assert_eq!(summary.ttft, Distribution::default());
    }

    proptest! {
        /// Nearest rank: at least p % of the values do not exceed the percentile, and fewer would not be exceeded by less.
        #[test]
        fn percentiles_are_exact(values in proptest::collection::vec(0u64..50, 1..300)) {
            let summed = Distribution::of(values.iter().map(|&value| ms(value)));
            for (percent, value) in [(50, summed.p50), (90, summed.p90), (99, summed.p99), (100, summed.max)] {
                let below = values.iter().filter(|&&other| ms(other) < value).count();
                let within = values.iter().filter(|&&other| ms(other) <= value).count();
                prop_assert!(within * 100 >= values.len() * percent && below * 100 < values.len() * percent);
            }
        }
    }
}
