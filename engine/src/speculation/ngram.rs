//! Guesses from the sequence itself: what followed when its last tokens stood there before.
//!
//! Answers repeat their prompt (a quotation, code that is edited, a summary) and themselves. Each pair of tokens remembers
//! where it last stood, and each place where its pair stood before that: the places are looked at from the latest on, and the
//! one wins before which most tokens agree. The index grows by one entry for each token and costs the same however long the
//! sequence is.

use crate::scheduler::SequenceId;
use kv_cache::TokenId;
use std::collections::HashMap;

/// Places that are looked at.
const MOST_PLACES: usize = 16;
/// Tokens that may agree; more would not make a guess better.
const LONGEST_MATCH: usize = 8;
/// There was no such pair before.
const NOWHERE: u32 = u32::MAX;

/// The indices of all sequences.
#[derive(Debug, Default)]
pub(super) struct Ngrams {
    indices: HashMap<SequenceId, Index>,
}

impl Ngrams {
    /// Guesses at most `most` tokens after `tokens`, all tokens of sequence `id` so far.
    pub(super) fn propose(&mut self, id: SequenceId, tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let index = self.indices.entry(id).or_default();
        index.extend(tokens);
        match index.best_place(tokens) {
            Some(place) => copy(tokens, place, most),
            None => Vec::new(),
        }
    }

    /// Forgets the sequences of which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(SequenceId) -> bool) {
        self.indices.retain(|id, _| keep(*id));
    }
}

/// Where each pair of tokens of one sequence stood. A place is the position after a pair.
#[derive(Debug, Default)]
struct Index {
    last: HashMap<(TokenId, TokenId), u32>,
    /// For each place, the one of the same pair before it; the first two positions are none.
    previous: Vec<u32>,
}

impl Index {
    /// Adds the places that a token follows by now.
    fn extend(&mut self, tokens: &[TokenId]) {
        for place in self.previous.len()..tokens.len() {
            let pair = place.checked_sub(2).map(|first| (tokens[first], tokens[first + 1]));
            let previous = pair.and_then(|pair| self.last.insert(pair, place as u32));
            self.previous.push(previous.unwrap_or(NOWHERE));
        }
    }

    /// Returns the place before which most tokens are the last ones of `tokens`, and the latest of such.
    fn best_place(&self, tokens: &[TokenId]) -> Option<usize> {
        let end = tokens.len();
        let pair = (*tokens.get(end.checked_sub(2)?)?, tokens[end - 1]);
        let mut next = self.last.get(&pair).copied().unwrap_or(NOWHERE);
        let (mut best, mut longest) = (None, 0);
        for _ in 0..MOST_PLACES {
            if next == NOWHERE {
                break;
            }
            let place = next as usize;
            let agree = |back: &usize| tokens[place - back] == tokens[end - back];
            let length = (1..=LONGEST_MATCH.min(place)).take_while(agree).count();
            if length > longest {
                (best, longest) = (Some(place), length);
            }
            if longest == LONGEST_MATCH {
                break;
            }
            next = self.previous[place];
        }
        best
    }
}

/// Copies `most` tokens from `place` on. What is copied may be copied in its turn: a loop goes on for ever.
fn copy(tokens: &[TokenId], place: usize, most: usize) -> Vec<TokenId> {
    let mut drafts: Vec<TokenId> = Vec::with_capacity(most);
    for at in place..place + most {
        let token = tokens.get(at).copied().unwrap_or_else(|| drafts[at - tokens.len()]);
        drafts.push(token);
    }
    drafts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let id = SequenceId::for_tests(1);
        let mut ngrams = Ngrams::default();
        // The index grows with the sequence, however it grows.
        for end in [0, tokens.len() / 3, tokens.len() / 2, tokens.len()] {
            ngrams.propose(id, &tokens[..end], 1);
        }
        ngrams.propose(id, tokens, most)
    }

    #[test]
    fn what_followed_before_is_guessed_again() {
        assert_eq!(propose(&[1, 2, 3, 4, 9, 1, 2], 3), [3, 4, 9]);
        assert_eq!(propose(&[1, 2, 3, 4, 9, 1, 2], 9), [3, 4, 9, 1, 2, 3, 4, 9, 1]);
        assert_eq!(propose(&[5, 5, 5], 4), [5, 5, 5, 5]);
    }

    #[test]
    fn nothing_is_guessed_from_what_never_stood_before() {
        assert!(propose(&[], 3).is_empty());
        assert!(propose(&[1], 3).is_empty());
        assert!(propose(&[1, 1], 3).is_empty());
        assert!(propose(&[1, 2, 3, 2], 3).is_empty());
    }

    #[test]
    fn the_longest_match_wins_and_then_the_latest() {
        // After "7 1 2" stood 3; after a mere "1 2" stood 4, later.
        assert_eq!(propose(&[7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1), [3]);
        assert_eq!(propose(&[7, 1, 2, 3, 8, 1, 2, 4, 6, 1, 2], 1), [4]);
    }

    #[test]
    fn sequences_are_forgotten() {
        let (one, two) = (SequenceId::for_tests(1), SequenceId::for_tests(2));
        let mut ngrams = Ngrams::default();
        ngrams.propose(one, &[1, 2], 1);
        ngrams.propose(two, &[1, 2], 1);
        ngrams.retain(|id| id == two);
        assert_eq!(ngrams.indices.keys().collect::<Vec<_>>(), [&two]);
    }
}
