//! Tokens of plain pieces: what byte pair encoding makes of a space and letters.
//!
//! Nothing splits such a piece, so its tokens are a matter of merges alone, of which only those between letters can occur. The library
//! makes a dozen allocations of a word. A word is short, so its pairs are simply looked through for the one that comes first in the list,
//! until none is in it.

use foldhash::fast::RandomState;
use kv_cache::TokenId;
use serde::Deserialize;
use std::collections::HashMap;
use tokenizers::{Model, models::bpe::BPE};

/// Bytes of the longest piece that is taken: the time grows with their square.
const LONGEST: usize = 32;

/// How byte-level vocabularies write a space.
const SPACE: &str = "\u{120}";

/// See the module.
#[derive(Debug)]
pub(super) struct Merges {
    /// The tokens of a space and of letters, by their bytes.
    letters: [TokenId; 128],
    /// By a pair of tokens: the place of their merge in the list, and what they become.
    merges: HashMap<(TokenId, TokenId), (u32, TokenId), RandomState>,
    /// Pieces that are tokens as they are, and stay so whatever the merges say.
    whole: HashMap<Box<str>, TokenId, RandomState>,
}

/// The model's fields that are not open otherwise.
#[derive(Deserialize)]
struct Fields {
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    ignore_merges: bool,
    merges: Vec<(String, String)>,
}

impl Merges {
    /// Takes from `model` what concerns plain pieces; `None` where there is more to them than merges, or a letter is no token.
    pub(super) fn of(model: &BPE) -> Option<Self> {
        let fields: Fields = serde_json::from_str(&serde_json::to_string(model).ok()?).ok()?;
        let added = [&fields.continuing_subword_prefix, &fields.end_of_word_suffix];
        if fields.dropout.is_some() || added.into_iter().flatten().any(|added| !added.is_empty()) {
            return None;
        }
        let mut letters = [0; 128];
        for letter in (b'a'..=b'z').chain(b'A'..=b'Z') {
            letters[usize::from(letter)] = model.token_to_id(char::from(letter).encode_utf8(&mut [0]))?;
        }
        letters[usize::from(b' ')] = model.token_to_id(SPACE)?;
        let of_letters = |text: &str| text.trim_start_matches(SPACE).bytes().all(|byte| byte.is_ascii_alphabetic());
        let merges = fields.merges.iter().zip(0..).filter(|((left, right), _)| of_letters(left) && of_letters(right));
        let merges = merges.filter_map(|((left, right), place)| {
            let [left_id, right_id] = [left, right].map(|text| model.token_to_id(text));
            Some(((left_id?, right_id?), (place, model.token_to_id(&[&**left, right].concat())?)))
        });
        let mut whole = HashMap::default();
        if fields.ignore_merges {
            let words = model.get_vocab().into_iter().filter(|(text, _)| text.starts_with(SPACE) && of_letters(text));
            whole.extend(words.map(|(text, id)| (text.replacen(SPACE, " ", 1).into(), id)));
        }
        Some(Self { letters, merges: merges.collect(), whole })
    }

    /// Whether a piece is a space and small letters behind it, of which the first may be a capital, and not too long. No expression splits
    /// that, composition leaves it as it is, and byte level only writes the space another way: what is left of encoding it are the merges.
    pub(super) fn take(piece: &str) -> bool {
        match piece.as_bytes() {
            [b' ', first, rest @ ..]
                if first.is_ascii_lowercase() || (first.is_ascii_uppercase() && !rest.is_empty()) =>
            {
                piece.len() <= LONGEST && rest.iter().all(u8::is_ascii_lowercase)
            }
            _ => false,
        }
    }

    /// Appends the tokens of a piece that is [taken](Merges::take).
    pub(super) fn encode(&self, piece: &str, out: &mut Vec<TokenId>) {
        if let Some(&token) = self.whole.get(piece) {
            return out.push(token);
        }
        let begin = out.len();
        out.extend(piece.bytes().map(|byte| self.letters[usize::from(byte)]));
        // Of equal pairs the first comes first.
        let merge = |(at, pair): (usize, &[TokenId])| Some((*self.merges.get(&(pair[0], pair[1]))?, at));
        while let Some(((_, token), at)) =
            out[begin..].windows(2).enumerate().filter_map(merge).min_by_key(|((place, _), _)| *place)
        {
            out[begin + at] = token;
            out.remove(begin + at + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::byte_level;
    use proptest::prelude::*;
    use tokenizers::ModelWrapper;

    proptest! {
        #[test]
        fn a_piece_has_the_tokens_that_the_library_finds(pieces in proptest::collection::vec(" [A-Za-z][a-z]{0,30}", 1..40)) {
            for (name, inner) in byte_level() {
                let ModelWrapper::BPE(model) = inner.get_model() else { unreachable!("{name} is byte-level") };
                let merges = Merges::of(model).unwrap();
                for piece in pieces.iter().filter(|piece| Merges::take(piece)) {
                    let mut found = vec![7];
                    merges.encode(piece, &mut found);
                    let expected = inner.encode_fast(piece.as_str(), false).unwrap();
                    prop_assert_eq!(&found[1..], expected.get_ids(), "{} {:?}", name, piece);
                }
            }
        }
    }

    #[test]
    fn only_short_pieces_of_one_word_are_taken() {
        let long = format!(" {}", "a".repeat(LONGEST));
        for (piece, taken) in [
            (" word", true),
            (" Word", true),
            (" a", true),
            (" A", false),
            (" WORD", false),
            ("word", false),
            (" wörd", false),
            (" two words", false),
            (" word.", false),
            (" ", false),
            ("", false),
            (&long[..LONGEST], true),
            (&long, false),
        ] {
            assert_eq!(Merges::take(piece), taken, "{piece:?}");
        }
    }
}
