//! Guesses of a small model that runs beside the large one.
//!
//! It keeps pages of its own, without names and without a scheduler: a sequence's cache holds what the model was fed of it, and
//! is brought up to date before the model goes on guessing. What has to be computed first is usually one or two tokens; for a
//! sequence that is new here – also one whose pages came from another worker – it is the whole prompt, which is
//! read in pieces of at most a step while others are drafted. When pages run out, whoever was not drafted for
//! the longest time loses its cache and has it computed again when its turn comes.

use crate::{Engine, Error, Row, Sample, Sampling, scheduler::SequenceId};
use kv_cache::{PageId, TokenId};
use std::collections::HashMap;

/// A sequence to draft for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) id: SequenceId,
    /// How its next token is drawn, after all that is known.
    pub(super) sample: Sample<'a>,
    /// Drafts wanted; at least one.
    pub(super) count: usize,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Round {
    /// For each wanted sequence; fewer than wanted, or none, where there was no room or the model is still reading.
    pub(super) drafts: Vec<Vec<TokenId>>,
    /// Steps it took.
    pub(super) depth: usize,
    /// Whether no sequence had more to compute than the last step left.
    pub(super) caught_up: bool,
}

/// The model and its caches.
#[derive(Debug)]
pub(super) struct DraftModel {
    engine: Engine,
    page_tokens: usize,
    free: Vec<PageId>,
    caches: HashMap<SequenceId, Cache>,
    rounds: u64,
}

#[derive(Debug, Default)]
struct Cache {
    /// The sequence's tokens and the drafts of the last round.
    tokens: Vec<TokenId>,
    /// How many of them are known to be the sequence's.
    known: usize,
    /// How many of them have their keys and values in `pages`.
    computed: usize,
    pages: Vec<PageId>,
    /// The round that used it last.
    used: u64,
}

/// A sequence in a round.
struct Part {
    at: usize,
    id: SequenceId,
    sampling: Sampling,
    count: usize,
}

impl DraftModel {
    pub(super) fn new(engine: Engine) -> Self {
        let layout = engine.memory().layout();
        let (page_tokens, free) = (layout.page_tokens as usize, (0..layout.pages).rev().map(PageId).collect());
        Self { engine, page_tokens, free, caches: HashMap::new(), rounds: 0 }
    }

    /// Returns how many drafts may follow `tokens` tokens.
    pub(super) fn room(&self, tokens: usize) -> usize {
        self.engine.max_model_len().saturating_sub(tokens)
    }

    #[cfg(test)]
    pub(super) fn free_pages(&self) -> usize {
        self.free.len()
    }

    #[cfg(test)]
    pub(super) fn all_pages(&self) -> usize {
        self.engine.memory().layout().pages as usize
    }

    /// Forgets the sequences of which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(SequenceId) -> bool) {
        let free = &mut self.free;
        self.caches.retain(|id, cache| {
            let kept = keep(*id);
            if !kept {
                free.append(&mut cache.pages);
            }
            kept
        });
    }

    /// Drafts for all of `wanted` side by side.
    pub(super) fn propose(&mut self, wanted: &[Wanted<'_>]) -> Result<Round, Error> {
        self.rounds += 1;
        let mut parts = Vec::with_capacity(wanted.len());
        for (at, wanted) in wanted.iter().enumerate() {
            self.update(wanted);
            let count = wanted.count.min(self.room(wanted.sample.history.len()));
            if count > 0 && self.take_pages(wanted.id, wanted.sample.history.len() + count - 1) {
                let sampling = Sampling { logprobs: None, ..wanted.sample.sampling.clone() };
                parts.push(Part { at, id: wanted.id, sampling, count });
            }
        }
        // Whoever has least to compute goes first, so that a long prompt holds up nobody but itself.
        parts.sort_by_key(|part| self.caches[&part.id].missing());
        let caught_up = parts.iter().all(|part| self.caches[&part.id].missing() <= 1 + super::MAX_DRAFTS);
        let mut depth = 0;
        while !parts.is_empty() {
            self.step(wanted, &parts)?;
            depth += 1;
            parts.retain(|part| {
                let (cache, wanted) = (&self.caches[&part.id], &wanted[part.at]);
                let drafts = &cache.tokens[wanted.sample.history.len()..];
                // Behind the end of the sequence there is nothing to guess, and one that is still reading goes on next time.
                let ended = drafts.last().is_none_or(|token| wanted.sample.forbidden.contains(token));
                !ended && drafts.len() == depth && depth < part.count
            });
        }
        let drafts = wanted.iter().map(|wanted| match self.caches.get(&wanted.id) {
            Some(cache) => cache.tokens[wanted.sample.history.len()..].to_vec(),
            None => Vec::new(),
        });
        Ok(Round { drafts: drafts.collect(), depth, caught_up })
    }

    /// Brings a cache's tokens up to the sequence's; what was guessed wrong is not computed any more.
    fn update(&mut self, wanted: &Wanted<'_>) {
        let history = wanted.sample.history;
        let cache = self.caches.entry(wanted.id).or_default();
        cache.used = self.rounds;
        let right = cache.tokens[cache.known..].iter().zip(&history[cache.known..]).take_while(|(a, b)| a == b).count();
        // The last token is computed in any case: its logits are what is drawn from.
        cache.computed = cache.computed.min(cache.known + right).min(history.len() - 1);
        cache.tokens.truncate(cache.known + right);
        cache.tokens.extend_from_slice(&history[cache.tokens.len()..]);
        cache.known = history.len();
    }

    /// Makes sure that a sequence has pages for `tokens` tokens, if need be at the cost of one that is not part of this round.
    fn take_pages(&mut self, id: SequenceId, tokens: usize) -> bool {
        let missing = tokens.div_ceil(self.page_tokens).saturating_sub(self.caches[&id].pages.len());
        while self.free.len() < missing {
            let idle = self.caches.iter().filter(|(_, cache)| cache.used < self.rounds && !cache.pages.is_empty());
            let Some(oldest) = idle.min_by_key(|(id, cache)| (cache.used, **id)).map(|(id, _)| *id) else {
                return false;
            };
            let cache = self.caches.remove(&oldest).expect("it was found just above");
            self.free.extend(cache.pages);
        }
        let taken = self.free.split_off(self.free.len() - missing);
        self.caches.get_mut(&id).expect("it was updated before").pages.extend(taken);
        true
    }

    /// Computes what is missing, as far as a step goes, and draws the next draft of those that have caught up.
    fn step(&mut self, wanted: &[Wanted<'_>], parts: &[Part]) -> Result<(), Error> {
        let (budget, most_rows) =
            (self.engine.config().token_budget as usize, self.engine.config().max_sequences as usize);
        let (mut left, mut rows, mut counts) = (budget, Vec::new(), Vec::new());
        for part in parts.iter().take(most_rows) {
            let cache = &self.caches[&part.id];
            let tokens = cache.missing().min(left);
            if tokens == 0 {
                break;
            }
            left -= tokens;
            let end = cache.computed + tokens;
            // Whatever else the target's draw is bound to does not bind a guess: a guess that breaks it is wrong, or cut before.
            let Sample { prompt_tokens, forbidden, min_tokens, .. } = wanted[part.at].sample;
            let (sampling, history) = (&part.sampling, &cache.tokens[..]);
            let sample = Sample { sampling, history, prompt_tokens, forbidden, min_tokens, grammar: None };
            rows.push(Row {
                tokens: &cache.tokens[cache.computed..end],
                start: cache.computed,
                pages: &cache.pages,
                sample: (end == cache.tokens.len()).then_some(sample),
                ..Row::default()
            });
            counts.push(tokens);
        }
        let yields = self.engine.step(&rows, &mut |_| {})?;
        for ((part, tokens), made) in parts.iter().zip(counts).zip(yields) {
            let cache = self.caches.get_mut(&part.id).expect("it was just computed");
            cache.computed += tokens;
            cache.tokens.extend(made.sampled.iter().map(|sampled| sampled.token));
        }
        Ok(())
    }
}

impl Cache {
    /// Returns how many of its tokens are not computed; at least one.
    fn missing(&self) -> usize {
        self.tokens.len() - self.computed
    }
}
