//! How long a step takes. Pure.
//!
//! A step reads the weights once and does arithmetic for each token; whichever takes longer hides the other. Attention comes on top: a
//! sequence that takes one token reads its whole context, a chunk of a prompt does arithmetic for every pair of a token and one before
//! it. That is a roofline (Williams, Waterman and Patterson 2009) with five numbers, a [`Pace`].
//!
//! One idea, four uses: a worker learns its own pace from its steps ([`Fit`]) and reports it, the router predicts with it what a
//! placement costs, the timed engine takes its step times from it, and so does the simulation.
#![forbid(unsafe_code)]

mod fit;
mod profile;

pub use fit::Fit;
pub use profile::{Profile, ProfileError};

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How fast a worker is. All values are finite and not negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pace {
    /// Microseconds of a step whatever it holds: reading the weights, starting kernels.
    pub step_us: f64,
    /// Microseconds more for each sequence that takes a single token.
    pub sequence_us: f64,
    /// Nanoseconds for each token of context that such a sequence reads.
    pub context_ns: f64,
    /// Microseconds for each token of a prompt, attention aside.
    pub token_us: f64,
    /// Nanoseconds for each pair of a prompt's token and one that it attends to.
    pub pair_ns: f64,
}

/// What a step holds, or what waits to be computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Sequences that take a single token.
    pub sequences: u64,
    /// Tokens those attend to, over all of them.
    pub context: u64,
    /// Tokens of prompts.
    pub tokens: u64,
    /// Pairs of a prompt's token and one that it attends to.
    pub pairs: u64,
}

impl Work {
    /// Adds a sequence that takes one token after `context` others.
    pub fn single(&mut self, context: usize) {
        self.sequences += 1;
        self.context += context as u64;
    }

    /// Adds `tokens` tokens of a prompt after `context` others.
    pub fn chunk(&mut self, context: usize, tokens: usize) {
        self.tokens += tokens as u64;
        self.pairs += pairs(context as u64, tokens as u64);
    }
}

fn pairs(context: u64, tokens: u64) -> u64 {
    tokens.saturating_mul(context).saturating_add(tokens.saturating_mul(tokens + 1) / 2)
}

impl Pace {
    /// Returns how long a step takes.
    pub fn step(&self, work: &Work) -> Duration {
        let us = self.linear_us(work).max(self.token_us * work.tokens as f64) + self.attention_us(work);
        Duration::from_secs_f64(us * 1e-6)
    }

    /// Returns the milliseconds that a prompt's work takes, in steps large enough to hide the reading of the weights.
    pub fn prompt_ms(&self, tokens: u64, pairs: u64) -> f64 {
        (self.token_us * tokens as f64 + self.pair_ns * 1e-3 * pairs as f64) * 1e-3
    }

    /// Returns the milliseconds that computing `tokens` tokens of a prompt after `context` others takes, in steps as large.
    pub fn chunk_ms(&self, context: u64, tokens: u64) -> f64 {
        self.prompt_ms(tokens, pairs(context, tokens))
    }

    /// Returns the milliseconds of a step in which `sequences` take a token each and read `context` tokens.
    pub fn decode_ms(&self, sequences: f64, context: f64) -> f64 {
        (self.step_us + self.sequence_us * sequences + self.context_ns * 1e-3 * context) * 1e-3
    }

    /// Returns this pace with what is not known of it, steps or prompts, taken from `other`.
    pub fn or(self, other: &Self) -> Self {
        let steps = if self.step_us > 0.0 { &self } else { other };
        let prompts = if self.token_us > 0.0 { &self } else { other };
        Self {
            step_us: steps.step_us,
            sequence_us: steps.sequence_us,
            context_ns: steps.context_ns,
            token_us: prompts.token_us,
            pair_ns: prompts.pair_ns,
        }
    }

    /// Says whether every number can be reckoned with.
    pub fn is_valid(&self) -> bool {
        let all = [self.step_us, self.sequence_us, self.context_ns, self.token_us, self.pair_ns];
        all.iter().all(|value| value.is_finite() && *value >= 0.0)
    }

    fn linear_us(&self, work: &Work) -> f64 {
        self.step_us + self.sequence_us * work.sequences as f64
    }

    fn attention_us(&self, work: &Work) -> f64 {
        1e-3 * (self.context_ns * work.context as f64 + self.pair_ns * work.pairs as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { step_us: 1_000.0, sequence_us: 10.0, context_ns: 5.0, token_us: 20.0, pair_ns: 2.0 };

    #[test]
    fn a_step_is_bound_by_weights_or_by_arithmetic() {
        let ms = |work: Work| PACE.step(&work).as_secs_f64() * 1e3;
        let mut decode = Work::default();
        decode.single(1_000);
        decode.single(3_000);
        assert!((ms(decode) - 1.04).abs() < 1e-9, "1 ms, two sequences of 10 us, 4,000 tokens of 5 ns");
        let mut small = decode;
        small.chunk(0, 10);
        assert!((ms(small) - 1.040_11).abs() < 1e-9, "ten tokens hide behind the weights, 55 pairs do not");
        let mut large = Work::default();
        large.chunk(100, 200);
        assert!((ms(large) - (4.0 + 0.0802)).abs() < 1e-9, "200 tokens, 200 x 100 + 20,100 pairs");
    }

    #[test]
    fn a_prompt_in_chunks_is_as_much_work_as_whole() {
        let mut whole = Work::default();
        whole.chunk(7, 100);
        let mut chunks = Work::default();
        chunks.chunk(7, 64);
        chunks.chunk(71, 36);
        assert_eq!(whole, chunks);
        assert!((PACE.chunk_ms(7, 100) - PACE.prompt_ms(whole.tokens, whole.pairs)).abs() < 1e-9);
    }
}
