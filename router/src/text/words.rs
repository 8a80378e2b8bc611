//! Tokens of words seen lately.
//!
//! A new text asks for a word every few bytes, so asking must cost about one line of cache: a table of slots of 64 bytes, each with a word
//! and its tokens, in memory that is there from the start. A word has one place, told by a hash with a random key; whoever comes
//! later takes it, so what is asked for often is soon back. Words and lists that fit no slot are not remembered.

use foldhash::fast::RandomState;
use kv_cache::TokenId;
use std::{
    hash::BuildHasher,
    sync::{RwLock, RwLockReadGuard},
};

/// Bytes of a slot: lengths of word and list, the word, the list in little-endian order.
const SLOT: usize = 64;
const WORD: std::ops::Range<usize> = 2..32;
const LIST: std::ops::Range<usize> = 32..64;

/// Bytes of the longest word that fits.
pub(super) const LONGEST: usize = WORD.end - WORD.start;

/// See the module.
#[derive(Debug)]
pub(super) struct Words {
    table: RwLock<Table>,
}

#[derive(Debug)]
struct Table {
    /// Zero where no word is, and not touched before one comes.
    bytes: Vec<u8>,
    /// Where the first slot begins: at a line of cache.
    start: usize,
    /// A power of two, or 0.
    slots: usize,
    hasher: RandomState,
}

/// The words, while they are looked up. Nothing is noted meanwhile.
pub(super) struct Known<'a>(RwLockReadGuard<'a, Table>);

impl Words {
    /// Takes at most `budget_bytes`.
    pub(super) fn new(budget_bytes: usize) -> Self {
        let most = budget_bytes.saturating_sub(SLOT) / SLOT;
        let slots = if most == 0 { 0 } else { 1 << most.ilog2() };
        let bytes = vec![0; slots * SLOT + SLOT];
        let start = bytes.as_ptr().align_offset(SLOT).min(SLOT);
        Self { table: RwLock::new(Table { bytes, start, slots, hasher: RandomState::default() }) }
    }

    /// Begins to look words up.
    pub(super) fn known(&self) -> Known<'_> {
        Known(self.table.read().expect("no code panics while it holds the table"))
    }

    /// Notes a word's tokens.
    pub(super) fn insert(&self, word: &str, tokens: &[TokenId]) {
        if word.len() > WORD.len() || tokens.len() * 4 > LIST.len() {
            return;
        }
        let mut table = self.table.write().expect("no code panics while it holds the table");
        let Some(at) = table.slot(word) else { return };
        let slot = &mut table.bytes[at..at + SLOT];
        (slot[0], slot[1]) = (word.len() as u8, tokens.len() as u8);
        slot[WORD][..word.len()].copy_from_slice(word.as_bytes());
        for (bytes, token) in slot[LIST].chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.known().0.bytes.len()
    }
}

impl Known<'_> {
    /// Appends a word's tokens to `out`; says whether they are known.
    pub(super) fn get(&self, word: &str, out: &mut Vec<TokenId>) -> bool {
        let Some(at) = self.0.slot(word) else { return false };
        let slot = &self.0.bytes[at..at + SLOT];
        let (length, tokens) = (usize::from(slot[0]), usize::from(slot[1]));
        if length != word.len() || length == 0 || slot[WORD][..length] != *word.as_bytes() {
            return false;
        }
        let list = slot[LIST].chunks_exact(4).take(tokens);
        out.extend(list.map(|bytes| TokenId::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])));
        true
    }
}

impl Table {
    /// Returns where the word's slot begins, if there can be one.
    fn slot(&self, word: &str) -> Option<usize> {
        let last = self.slots.checked_sub(1).filter(|_| word.len() <= WORD.len())?;
        let place = self.hasher.hash_one(word.as_bytes()) as usize & last;
        Some(self.start + place * SLOT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &Words, word: &str) -> Option<Vec<TokenId>> {
        let mut out = vec![7];
        words.known().get(word, &mut out).then(|| out[1..].to_vec())
    }

    #[test]
    fn a_word_has_the_tokens_it_was_given_last() {
        let words = Words::new(1 << 20);
        assert_eq!(found(&words, " word"), None);
        words.insert(" word", &[1, 2]);
        words.insert(" none", &[]);
        assert_eq!((found(&words, " word"), found(&words, " none")), (Some(vec![1, 2]), Some(vec![])));
        words.insert(" word", &[3]);
        assert_eq!((found(&words, " word"), found(&words, " wor")), (Some(vec![3]), None));
        assert_eq!(found(&words, ""), None);
    }

    #[test]
    fn what_fits_no_slot_is_not_remembered() {
        let words = Words::new(1 << 20);
        let (longest, longer) = ("x".repeat(30), "x".repeat(31));
        words.insert(&longest, &[1; 8]);
        words.insert(&longer, &[1]);
        words.insert("many", &[1; 9]);
        assert_eq!((found(&words, &longest), found(&words, &longer)), (Some(vec![1; 8]), None));
        assert_eq!(found(&words, "many"), None);
        let none = Words::new(100);
        none.insert("x", &[1]);
        assert_eq!(found(&none, "x"), None);
    }

    #[test]
    fn memory_stays_what_it_is_and_nobody_gets_another_s_tokens() {
        let words = Words::new(64 << 10);
        assert!(words.bytes() <= 64 << 10);
        for number in 0..10_000u32 {
            words.insert(&number.to_string(), &[number, number]);
        }
        let known = (0..10_000u32).filter_map(|number| Some((number, found(&words, &number.to_string())?)));
        let known: Vec<_> = known.collect();
        assert!(known.iter().all(|(number, tokens)| *tokens == [*number; 2]));
        assert!(known.len() > 256, "only {} of 512 slots are in use", known.len());
        assert!(words.bytes() <= 64 << 10);
    }
}
