//! From logits to a token.
//!
//! Randomness is counter-based and keyed by (seed, choice, token index), so a sequence draws the same tokens in any batch, on
//! any worker and after any replay. The order of operations is `engine-semantics.md` 3.3 (vLLM's `sample/sampler.py`).

use kv_cache::TokenId;

/// How tokens of one sequence are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Below 1e-5 the most likely token is taken.
    pub temperature: f32,
    /// Keeps the most likely tokens up to this probability mass; 1 = all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 = all.
    pub top_k: u32,
    /// Drops tokens below this fraction of the most likely one's probability; 0 = none.
    pub min_p: f32,
    /// Key of the random counter.
    pub seed: u64,
    /// Which of a request's choices; part of the counter's key.
    pub choice: u32,
    /// Divides (or multiplies) the logits of tokens seen in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once for tokens in the output.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// How many alternatives are reported beside the sampled token; `None` reports no log-probabilities at all.
    pub logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// Log-probabilities of one sampled token, natural, of the unmodified distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the sampled token.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Present when [`Sampling::logprobs`] asks.
    pub logprobs: Option<Logprobs>,
}
