//! From logits to a token.
//!
//! Randomness is counter-based and keyed by (seed, choice, token index), so a sequence draws the same tokens in any batch, on
//! any worker and after any replay. The order of operations is `engine-semantics.md` 3.3 (vLLM's `sample/sampler.py`):
//! the grammar's mask; allowed tokens; bad words; end-of-sequence and stop ids while under `min_tokens`; biases; penalties;
//! greedy choice, or temperature, min-p, top-k, top-p and a draw. Log-probabilities are those of the unmodified logits, grammar or
//! not: what the model believes. Arithmetic on probabilities is f64 and plain Rust: the same on every machine.

mod race;
mod random;

use grammar::{Mask, Matcher};
use kv_cache::TokenId;
pub(crate) use race::Race;
use random::Numbers;
use std::cmp::Ordering;

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
    /// The only tokens that may be drawn; empty = all.
    pub allowed_tokens: Vec<TokenId>,
    /// Sequences of tokens that the output must not hold: the last token of each is not drawn where the others have just been.
    pub bad_words: Vec<Vec<TokenId>>,
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
            allowed_tokens: Vec::new(),
            bad_words: Vec::new(),
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

/// What drawing a token needs to know of its sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// How to draw.
    pub sampling: &'a Sampling,
    /// All tokens so far, prompt first.
    pub history: &'a [TokenId],
    /// How many of `history` are the prompt; the drawn token's index is `history.len() - prompt_tokens`.
    pub prompt_tokens: usize,
    /// Tokens that must not be drawn while fewer than `min_tokens` output tokens are known: end-of-sequence and stop ids.
    pub forbidden: &'a [TokenId],
    /// Output tokens, counted from index 0 whoever emitted them.
    pub min_tokens: usize,
    /// Where the sequence is in its grammar, if it has one: after the last token that is no draft.
    pub grammar: Option<&'a Matcher>,
}

/// Why no token could be drawn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    /// What the request asks for leaves no token: no worker could go on.
    #[error("no token may follow: {0}")]
    Forbidden(String),
    /// The model computed no number for any token.
    #[error("none of the logits is a number")]
    NoLogits,
}

impl Sampling {
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

impl Sample<'_> {
    /// Says whether the most likely token is wanted, and nothing else about it.
    pub(crate) fn is_plain(&self) -> bool {
        let greedy = self.sampling.temperature < GREEDY && self.sampling.logprobs.is_none();
        greedy && self.grammar.is_none() && !self.adjusts()
    }

    /// Says whether anything but a grammar changes single logits.
    fn adjusts(&self) -> bool {
        let Sampling { allowed_tokens, bad_words, logit_bias, .. } = self.sampling;
        let restricted = !allowed_tokens.is_empty() || !bad_words.is_empty() || !self.forbidden().is_empty();
        restricted || !logit_bias.is_empty() || self.sampling.penalises()
    }

    /// Returns the tokens that must not be drawn now.
    fn forbidden(&self) -> &[TokenId] {
        if self.history.len().saturating_sub(self.prompt_tokens) < self.min_tokens { self.forbidden } else { &[] }
    }

    /// Says what left no token.
    fn stuck(&self, logits: &[f32], mask: Option<&Mask>) -> Stuck {
        if most_likely(logits).is_none() {
            return Stuck::NoLogits;
        }
        let sampling = self.sampling;
        let reasons = [
            ("the grammar", mask.is_some()),
            ("allowed_token_ids", !sampling.allowed_tokens.is_empty()),
            ("bad_words", !sampling.bad_words.is_empty()),
            ("min_tokens", !self.forbidden().is_empty()),
            ("logit_bias", !sampling.logit_bias.is_empty()),
        ];
        let reasons: Vec<&str> = reasons.iter().filter(|(_, holds)| *holds).map(|(name, _)| *name).collect();
        Stuck::Forbidden(format!("{} leave none that the model could give", reasons.join(", ")))
    }
}

/// A temperature below this means greedy.
const GREEDY: f32 = 1e-5;

/// What draws work in: one for each thread, so that none allocates memory.
#[derive(Clone, Debug)]
pub(crate) struct Scratch {
    /// Logits as what changes single ones leaves them.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Per token of the vocabulary; all 0 between draws.
    seen: Vec<u32>,
}

impl Scratch {
    /// Reserves room for a vocabulary of `tokens` tokens; memory is taken when it is first written.
    pub(crate) fn new(tokens: usize) -> Self {
        Self { adjusted: Vec::with_capacity(tokens), candidates: Vec::with_capacity(tokens), seen: vec![0; tokens] }
    }
}

/// Draws the token after `sample.history` from its logits, `[vocab]`, if `mask` allows it.
///
/// Among equal logits the lowest token id counts as the more likely. A NaN counts as minus infinity, and what is minus infinity
/// is never drawn.
///
/// # Errors
/// [`Stuck`] when that leaves no token.
pub(crate) fn draw(
    logits: &[f32],
    sample: &Sample<'_>,
    mask: Option<&Mask>,
    scratch: &mut Scratch,
) -> Result<Sampled, Stuck> {
    let Scratch { adjusted, candidates, seen } = scratch;
    let sampling = sample.sampling;
    let scores = if sample.adjusts() || mask.is_some() {
        adjust(logits, sample, mask, adjusted, seen);
        adjusted
    } else {
        logits
    };
    let best = most_likely(scores).ok_or_else(|| sample.stuck(logits, mask))?;
    let token = if sampling.temperature < GREEDY {
        best
    } else {
        let index = sample.history.len().saturating_sub(sample.prompt_tokens);
        choose(scores, best, sampling, candidates);
        race(candidates, Numbers::new(sampling.seed, sampling.choice, index as u64))
    };
    Ok(Sampled { token, logprobs: sampling.logprobs.map(|count| logprobs(logits, token, count as usize)) })
}

/// Writes the logits that a draw goes by to `adjusted`.
fn adjust(logits: &[f32], sample: &Sample<'_>, mask: Option<&Mask>, adjusted: &mut Vec<f32>, seen: &mut [u32]) {
    let sampling = sample.sampling;
    adjusted.clear();
    if sampling.allowed_tokens.is_empty() {
        adjusted.extend_from_slice(logits);
    } else {
        adjusted.resize(logits.len(), f32::NEG_INFINITY);
        for &token in &sampling.allowed_tokens {
            if let (Some(logit), Some(own)) = (adjusted.get_mut(token as usize), logits.get(token as usize)) {
                *logit = *own;
            }
        }
    }
    if let Some(mask) = mask {
        keep(adjusted, mask);
    }
    for &token in bad_words(sample).chain(sample.forbidden()) {
        if let Some(logit) = adjusted.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = adjusted.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    if sampling.penalises() {
        penalise(adjusted, sample, seen);
    }
}

/// Forbids what `mask` does not allow.
fn keep(logits: &mut [f32], mask: &Mask) {
    for (logits, word) in logits.chunks_mut(32).zip(mask.words().iter().copied().chain(std::iter::repeat(0))) {
        if word == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Returns the tokens that would complete a bad word.
fn bad_words<'a>(sample: &Sample<'a>) -> impl Iterator<Item = &'a TokenId> {
    let output = &sample.history[sample.prompt_tokens.min(sample.history.len())..];
    let words = sample.sampling.bad_words.iter();
    words.filter_map(move |word| word.split_last().filter(|(_, before)| output.ends_with(before)).map(|(last, _)| last))
}

/// Repetition penalty over prompt and output (arXiv 1909.05858, section 4.1), the other two over the output only.
fn penalise(logits: &mut [f32], sample: &Sample<'_>, seen: &mut [u32]) {
    let sampling = sample.sampling;
    // One more than how often the output has a token.
    for (index, &token) in sample.history.iter().enumerate() {
        if let Some(seen) = seen.get_mut(token as usize) {
            *seen = (*seen).max(1) + u32::from(index >= sample.prompt_tokens);
        }
    }
    for &token in sample.history {
        let Some(seen) = seen.get_mut(token as usize) else { continue };
        let count = std::mem::take(seen);
        if count == 0 {
            continue;
        }
        let (logit, penalty) = (&mut logits[token as usize], sampling.repetition_penalty);
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        if count > 1 {
            *logit -= sampling.frequency_penalty * (count - 1) as f32 + sampling.presence_penalty;
        }
    }
}

/// Returns the token with the largest logit; `None` when all are minus infinity or no number.
fn most_likely(logits: &[f32]) -> Option<TokenId> {
    let (mut best, mut token) = (f32::NEG_INFINITY, None);
    for (index, logit) in logits.iter().enumerate() {
        if *logit > best {
            (best, token) = (*logit, Some(index as TokenId));
        }
    }
    token
}

/// A token that may be drawn, and its weight: its probability relative to the most likely token's.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: TokenId,
    weight: f64,
}

/// Orders candidates from the most likely on.
fn by_weight(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

/// Fills `kept` with the tokens that survive min-p, top-k and top-p, of which `best` is the most likely. Never empty; in order of
/// token id when nothing was cut by rank.
fn choose(logits: &[f32], best: TokenId, sampling: &Sampling, kept: &mut Vec<Candidate>) {
    kept.clear();
    let max = logits[best as usize];
    if max.is_infinite() {
        kept.push(Candidate { token: best, weight: 1.0 });
        return;
    }
    let scale = 1.0 / f64::from(sampling.temperature);
    let weigh = |(token, logit): (usize, &f32)| {
        let weight = (f64::from(logit - max) * scale).exp();
        // A NaN fails the comparison too.
        (weight > 0.0 && weight >= f64::from(sampling.min_p)).then_some(Candidate { token: token as TokenId, weight })
    };
    kept.extend(logits.iter().enumerate().filter_map(weigh));
    let top_k = sampling.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, by_weight);
        kept.truncate(top_k);
        kept.sort_unstable_by(by_weight);
    }
    if sampling.top_p < 1.0 {
        keep_mass(kept, f64::from(sampling.top_p));
    }
}

/// Keeps the fewest most likely candidates that together have at least `share` of the mass, at least one.
fn keep_mass(kept: &mut Vec<Candidate>, share: f64) {
    let wanted = share * kept.iter().map(|candidate| candidate.weight).sum::<f64>();
    // The head of the distribution is nearly always enough; sorting all of a vocabulary would cost milliseconds.
    let mut sorted = kept.len().min(256);
    loop {
        if sorted < kept.len() {
            kept.select_nth_unstable_by(sorted, by_weight);
        }
        kept[..sorted].sort_unstable_by(by_weight);
        let mut mass = 0.0;
        for index in 0..sorted {
            mass += kept[index].weight;
            if mass >= wanted {
                kept.truncate(index + 1);
                return;
            }
        }
        if sorted == kept.len() {
            return;
        }
        sorted = kept.len().min(sorted * 8);
    }
}

/// Lets the candidates race: each takes an exponential time over its weight, and the first to arrive is the token. It arrives
/// first with its share of the mass. Because a token's time has its own number, two distributions that are alike mostly
/// have the same winner: that is what makes the drafts of a model that draws by the same numbers right.
fn race(candidates: &[Candidate], mut numbers: Numbers) -> TokenId {
    let (mut winner, mut fastest) = (candidates[0].token, 0.0);
    for &Candidate { token, weight } in candidates {
        let number = numbers.of(token);
        // No time is below 1 - number, which spares nearly all logarithms.
        if weight > fastest * (1.0 - number) {
            let speed = weight / -number.ln();
            if speed > fastest {
                (winner, fastest) = (token, speed);
            }
        }
    }
    winner
}

/// Returns the log-probabilities of `token`, which must be one of the vocabulary, and of the `count` most likely tokens.
pub(crate) fn logprobs(logits: &[f32], token: TokenId, count: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| f64::from(logit - max).exp()).sum();
    let normalizer = f64::from(max) + sum.ln();
    let logprob = |logit: f32| match normalizer.is_finite() {
        true => (f64::from(logit) - normalizer) as f32,
        // An infinite logit is certain, and beside it nothing else can be.
        false if logit == f32::INFINITY => 0.0,
        false => f32::NEG_INFINITY,
    };
    let own = Some(logits[token as usize]).filter(|logit| !logit.is_nan()).unwrap_or(f32::NEG_INFINITY);
    let above =
        logits.iter().enumerate().filter(|(index, logit)| **logit > own || (**logit == own && *index < token as usize));
    Logprobs {
        logprob: logprob(own),
        rank: above.count() as u32 + 1,
        top: top(logits, count).into_iter().map(|(token, logit)| (token, logprob(logit))).collect(),
    }
}

/// Returns the `count` largest logits, best first.
fn top(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut all: Vec<(TokenId, f32)> = logits
        .iter()
        .enumerate()
        .filter(|(_, logit)| !logit.is_nan())
        .map(|(token, logit)| (token as TokenId, *logit))
        .collect();
    if count < all.len() {
        all.select_nth_unstable_by(count - 1, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests;
