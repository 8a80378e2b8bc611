//! What a worker is asked to do for a request, and what it says about it.

use super::adapters::Adapter;
use bytes::Bytes;
use grammar::Spec;
use kv_cache::TokenId;
use std::{sync::Arc, time::Duration};

/// One leg of one attempt at a choice.
#[derive(Clone, Debug)]
pub(crate) struct Submission {
    /// Unique in this router.
    pub(crate) attempt: u64,
    /// Request id, for logs and traces.
    pub(crate) request: Arc<str>,
    /// W3C trace context, or empty.
    pub(crate) traceparent: Arc<str>,
    /// The prompt, then what earlier attempts emitted, as the wire has them: its legs share them.
    pub(crate) tokens: Bytes,
    /// How many of `tokens` are the prompt.
    pub(crate) prompt_tokens: u32,
    /// With the adapter's id the root of the page hash chain.
    pub(crate) salt: Bytes,
    pub(crate) adapter: Option<Arc<Adapter>>,
    pub(crate) sampling: Arc<Sampling>,
    /// What the output must fit.
    pub(crate) grammar: Option<Arc<Spec>>,
    /// Which of the request's choices.
    pub(crate) choice: u32,
    pub(crate) stop: Arc<Stop>,
    /// Alternatives reported beside each token of the prompt; `None` = nothing is reported of it. Only the leg that computes the
    /// prompt is asked.
    pub(crate) prompt_logprobs: Option<u32>,
    /// Lower runs first.
    pub(crate) priority: i32,
    /// Until the leg must have ended.
    pub(crate) deadline: Duration,
    pub(crate) role: LegRole,
    /// What whoever computes the prompt fetches first.
    pub(crate) fetch: Option<Fetch>,
    /// How long the prompt's pages are kept for peers; zero = no longer than others.
    pub(crate) keep: Duration,
}

/// Leading pages of a prompt to be had from a peer.
#[derive(Clone, Debug)]
pub(crate) struct Fetch {
    /// Of the hand-off that brings them.
    pub(crate) handoff: u64,
    pub(crate) worker: String,
    pub(crate) incarnation: u64,
    pub(crate) link: String,
    pub(crate) pages: u32,
    /// Whether the leg is refused if they do not come; otherwise they are computed.
    pub(crate) required: bool,
}

/// What this worker's part is.
#[derive(Clone, Debug)]
pub(crate) enum LegRole {
    /// Compute the prompt and decode.
    Local,
    /// Compute the prompt, emit the first token, push the pages to this worker.
    Prefill { handoff: u64, worker: String, incarnation: u64, link: String },
    /// Expect the pages from this worker, then decode.
    Decode { handoff: u64, worker: String, incarnation: u64 },
    /// Compute the prompt and answer with its embedding.
    Embed(Pooling),
}

/// What an embedding is made of: hidden states of the prompt's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// That of the last token.
    Last,
    /// The mean over all of them.
    Mean,
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampling {
    /// Below 1e-5 the most likely token is taken.
    pub(crate) temperature: f32,
    /// Probability mass kept; 1 = all.
    pub(crate) top_p: f32,
    /// Tokens kept; 0 = all.
    pub(crate) top_k: u32,
    /// Least probability kept, relative to the most likely token's; 0 = all.
    pub(crate) min_p: f32,
    pub(crate) seed: u64,
    /// 1 = off.
    pub(crate) repetition_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) logit_bias: Vec<(TokenId, f32)>,
    /// The only tokens that may be drawn; empty = all.
    pub(crate) allowed_tokens: Vec<TokenId>,
    /// Sequences of tokens whose last one is not drawn behind the others.
    pub(crate) bad_words: Vec<Vec<TokenId>>,
    /// Alternatives reported beside the sampled token; `None` = no log-probabilities at all.
    pub(crate) logprobs: Option<u32>,
}

impl Sampling {
    /// The most likely token, and nothing reported of it.
    pub(crate) fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_tokens: Vec::new(),
            bad_words: Vec::new(),
            logprobs: None,
        }
    }

    /// Whether the most likely token is always taken.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature < 1e-5
    }
}

/// When a worker ends a sequence. Stop strings are the router's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stop {
    /// Output tokens, whatever attempt emitted them.
    pub(crate) max_tokens: u32,
    pub(crate) min_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) token_ids: Vec<TokenId>,
}

/// Something a leg said.
#[derive(Debug)]
pub(crate) struct LegEvent {
    /// The leg's number.
    pub(crate) attempt: u64,
    pub(crate) said: Said,
}

#[derive(Debug)]
pub(crate) enum Said {
    /// Tokens of the prompt, `index` being their position there, with what was asked about them. They come before the first token.
    Prompt(Vec<Token>),
    Token(Token),
    /// The last word.
    Ended(Box<Ended>),
}

/// An output token.
#[derive(Debug)]
pub(crate) struct Token {
    /// Counted from the first token after the prompt.
    pub(crate) index: u32,
    pub(crate) id: TokenId,
    pub(crate) logprobs: Option<Box<Logprobs>>,
}

/// Log-probabilities of one token, natural.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Logprobs {
    pub(crate) logprob: f32,
    /// 1 for the most likely token.
    pub(crate) rank: u32,
    /// The most likely tokens, best first.
    pub(crate) top: Vec<(TokenId, f32)>,
}

/// Prompt tokens that were not computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cached {
    /// Those found in a worker's prefix cache.
    pub(crate) tokens: u32,
    /// Of those, the ones that had come from a peer's cache for this request.
    pub(crate) fetched: u32,
}

/// How a leg ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ended {
    pub(crate) end: End,
    /// What it took from its prefix cache.
    pub(crate) cached: Cached,
    /// From receipt to first scheduled.
    pub(crate) queue: Duration,
    /// From first scheduled to the first token.
    pub(crate) prefill: Duration,
}

impl Ended {
    /// An end the worker did not report itself.
    pub(crate) fn without_numbers(end: End) -> Self {
        Self { end, cached: Cached::default(), queue: Duration::ZERO, prefill: Duration::ZERO }
    }
}

/// Why a leg ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// This token ended the sequence. It was emitted too, by this leg or before it.
    Stop(TokenId),
    /// `max_tokens` or the context length was reached.
    Length,
    /// The decode worker owns the sequence now.
    HandedOff,
    /// The prompt's embedding is there: of length 1.
    Embedded(Vec<f32>),
    /// The worker died on it; another may not.
    Failed(String),
    /// The worker would not take it; another may.
    Refused(String),
    /// No worker could do it.
    Invalid(String),
    /// The stream to the worker ended.
    Lost(String),
    /// Nobody took the tokens.
    Overflow,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A local leg with a prompt of `tokens` tokens.
    pub(crate) fn submission(attempt: u64, tokens: usize) -> Submission {
        Submission {
            attempt,
            request: "test".into(),
            traceparent: "".into(),
            tokens: proto::pack(&[&vec![1; tokens]]),
            prompt_tokens: tokens as u32,
            salt: Bytes::new(),
            adapter: None,
            sampling: Arc::new(Sampling::greedy()),
            grammar: None,
            choice: 0,
            stop: Arc::new(Stop { max_tokens: 16, min_tokens: 0, ignore_eos: false, token_ids: Vec::new() }),
            prompt_logprobs: None,
            priority: 0,
            deadline: Duration::from_secs(1),
            role: LegRole::Local,
            fetch: None,
            keep: Duration::ZERO,
        }
    }
}
