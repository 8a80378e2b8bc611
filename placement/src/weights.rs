//! What the cost function assumes and weighs.

use serde::{Deserialize, Serialize};
use timing::Pace;

/// Where prompts are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Wherever the predicted cost is least.
    #[default]
    Auto,
    /// Always on a prefill worker, handed off to a decode worker.
    Remote,
    /// Always on the decode worker itself.
    Local,
}

/// What the cost function assumes where workers have not reported, and what it weighs against what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Speed of a worker that has not reported one: a small model on a laptop.
    pub prior: Pace,
    /// Bytes per second of a link that has not reported a speed: 10 Gbit/s.
    pub prior_link_bytes_per_s: f64,
    /// Milliseconds a hand-off costs whatever its size: opening, committing, one more worker in the path.
    pub handoff_ms: f64,
    /// Part of the transfer that is not hidden behind the prefill's own compute: the last layer group.
    pub exposed_transfer: f64,
    /// Tokens a request is assumed to produce (its `max_tokens`, if less): turns a slower step into milliseconds.
    pub expected_output_tokens: u32,
    /// Sequences assumed to join a decode worker while a prompt is computed there: what keeps long prompts away from an idle
    /// decode worker.
    pub expected_neighbours: f64,
    /// Milliseconds of waiting for a first token that one millisecond is worth for which a stream that is already running stops: a reader
    /// minds a pause more than a later start.
    pub disturbance: f64,
    /// Requests assumed to come to a worker in each second that it is busy, and to wait behind what it was given: what makes a miss in
    /// the prefix cache of an idle worker dearer than its own wait.
    pub followers_per_s: f64,
    /// Least pages that are worth fetching from a peer.
    pub fetch_pages: u32,
    /// Costs closer than this, in milliseconds, are equal; the choice among them rotates.
    pub tie_ms: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            prior: Pace { step_us: 10_000.0, sequence_us: 500.0, context_ns: 0.0, token_us: 250.0, pair_ns: 0.0 },
            prior_link_bytes_per_s: 1.25e9,
            handoff_ms: 3.0,
            exposed_transfer: 0.25,
            expected_output_tokens: 64,
            expected_neighbours: 0.05,
            disturbance: 12.0,
            followers_per_s: 0.5,
            fetch_pages: 8,
            tie_ms: 0.01,
        }
    }
}

impl Weights {
    /// Says which field cannot be reckoned with, and why.
    pub fn validate(&self) -> Result<(), String> {
        if !self.prior.is_valid() || self.prior.step_us <= 0.0 || self.prior.token_us <= 0.0 {
            let wanted = "all numbers finite and not negative, step_us and token_us above 0";
            return Err(format!("weights.prior is {:?}; wanted are {wanted}", self.prior));
        }
        if !(self.prior_link_bytes_per_s.is_finite() && self.prior_link_bytes_per_s > 0.0) {
            let value = self.prior_link_bytes_per_s;
            return Err(format!("weights.prior_link_bytes_per_s is {value}; it must be above 0"));
        }
        for (field, value) in [
            ("handoff_ms", self.handoff_ms),
            ("exposed_transfer", self.exposed_transfer),
            ("expected_neighbours", self.expected_neighbours),
            ("disturbance", self.disturbance),
            ("followers_per_s", self.followers_per_s),
            ("tie_ms", self.tie_ms),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("weights.{field} is {value}; it must be 0 or more"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_reckoned_with_is_named() {
        let refused = |change: fn(&mut Weights)| {
            let mut weights = Weights::default();
            change(&mut weights);
            weights.validate().unwrap_err()
        };
        assert_eq!(Weights::default().validate(), Ok(()));
        assert!(refused(|w| w.prior.token_us = 0.0).contains("weights.prior"));
        assert!(refused(|w| w.prior_link_bytes_per_s = f64::NAN).contains("prior_link_bytes_per_s is NaN"));
        assert!(refused(|w| w.tie_ms = -1.0).contains("weights.tie_ms is -1"));
    }
}
