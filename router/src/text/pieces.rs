//! Where a text may be cut so that its parts' tokens, laid end to end, are the tokens of the whole.
//!
//! Byte-level tokenizers first split a text by a regular expression and then encode each split by itself. Between `x` and ` y` – a
//! space that stands between two visible characters of ASCII – every expression in use splits, whatever stands
//! around it: nothing of what may end there takes a space in or looks beyond one, and what begins there looks at nothing before
//! it. The same holds between a Chinese character and the comma or full stop behind it, and before a *mark*, an added token such as
//! `<|im_end|>`, which is found before anything is split. So a text falls into *pieces*, about a word each, which hardly depend on what
//! is asked: the tokens of most are known, and so are those of whole *segments* of a beginning that prompts share. The cuts are only made
//! for tokenizers whose every part is known to allow them; [`allows_cuts`] lists those.

use super::words::{self, Words};
use crate::recent::Recent;
use kv_cache::TokenId;
use serde::Serialize;
use serde_json::Value;
use tokenizers::{AddedToken, ModelWrapper, Tokenizer as Inner};

/// A segment ends at the first cut behind so many bytes: long enough to make look-ups cheap, short enough to waste little where prompts
/// part.
const SEGMENT_BYTES: usize = 1 << 10;

/// How a mark begins.
const MARK: u8 = b'<';

/// Expressions that split at every cut: GPT-4's with its two ways to take digits (Llama 3, OLMo 2; Qwen), and GPT-4o's. GPT-2's is
/// `ByteLevel`'s own.
const SPLITS: [&str; 3] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Tokens of pieces and segments seen lately.
#[derive(Debug)]
pub(super) struct Pieces {
    segments: Recent<TokenId>,
    words: Words,
    marks: Vec<String>,
}

impl Pieces {
    /// Remembers at most `budget_bytes` of the texts of a tokenizer that [allows](allows_cuts) it.
    pub(super) fn new(inner: &Inner, budget_bytes: usize) -> Self {
        let (segments, words) = (Recent::new(budget_bytes / 4 * 3), Words::new(budget_bytes / 4));
        Self { segments, words, marks: marks(inner) }
    }

    /// Appends the tokens of `text`; `encode` makes those of a part nobody has seen.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        out: &mut Vec<TokenId>,
        mut encode: impl FnMut(&str, &mut Vec<TokenId>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = text;
        while let Some(at) = self.next_cut(rest, SEGMENT_BYTES) {
            let (segment, after) = rest.split_at(at);
            if !self.segments.get(segment.as_bytes(), out) {
                let before = out.len();
                self.encode_words(segment, out, &mut encode)?;
                self.segments.insert(segment.as_bytes(), &out[before..]);
            }
            rest = after;
        }
        self.encode_words(rest, out, &mut encode)
    }

    fn encode_words<E>(
        &self,
        text: &str,
        out: &mut Vec<TokenId>,
        encode: &mut impl FnMut(&str, &mut Vec<TokenId>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut rest, mut known) = (text, self.words.known());
        while !rest.is_empty() {
            let (word, after) = rest.split_at(self.next_cut(rest, 1).unwrap_or(rest.len()));
            let long = word.len() > words::LONGEST;
            if !(known.get(word, out) || long && self.segments.get(word.as_bytes(), out)) {
                drop(known);
                let before = out.len();
                encode(word, out)?;
                self.note(word, &out[before..]);
                known = self.words.known();
            }
            rest = after;
        }
        Ok(())
    }

    /// Returns the first place at or behind `from` where `text` may be cut.
    fn next_cut(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        (from..bytes.len()).find(|&at| match bytes[at] {
            b' ' => bytes[at - 1].is_ascii_graphic() && bytes.get(at + 1).is_some_and(u8::is_ascii_graphic),
            MARK => self.marks.iter().any(|mark| bytes[at..].starts_with(mark.as_bytes())),
            // Bytes 0xe5 to 0xe8 begin U+5000 to U+8FFF, all of them letters.
            0xe3 | 0xef => {
                let follows = bytes[at..].starts_with("。".as_bytes()) || bytes[at..].starts_with("，".as_bytes());
                follows && at >= 3 && (0xe5..=0xe8).contains(&bytes[at - 3])
            }
            _ => false,
        })
    }

    fn note(&self, word: &str, tokens: &[TokenId]) {
        if word.len() > words::LONGEST {
            self.segments.insert(word.as_bytes(), tokens);
        } else {
            self.words.insert(word, tokens);
        }
    }

    /// Bytes held now.
    pub(super) fn bytes(&self) -> usize {
        self.segments.bytes() + self.words.bytes()
    }
}

/// Returns the added tokens before which a text may be cut: no other one reaches across their beginning.
fn marks(inner: &Inner) -> Vec<String> {
    let added = inner.get_added_tokens_decoder();
    if added.values().any(|token| token.content.bytes().skip(1).any(|byte| byte == MARK)) {
        return Vec::new();
    }
    // Others are looked for in what these leave, when it has been normalised.
    let first = added.into_values().filter(|token| !token.normalized).map(|token| token.content);
    first.filter(|content| content.as_bytes().first() == Some(&MARK)).collect()
}

/// Whether each part of the tokenizer leaves a text's parts alone.
pub(super) fn allows_cuts(inner: &Inner) -> bool {
    // No added token may reach across a cut or take in the space behind it.
    let added = inner.get_added_tokens_decoder();
    let stays = |token: &AddedToken| {
        !token.lstrip && !token.rstrip && !token.single_word && !token.content.contains([' ', '，', '。'])
    };
    added.values().all(stays)
        && normalizer_allows(&json(inner.get_normalizer()))
        && splitter_allows(&json(inner.get_pre_tokenizer()))
        && post_processor_allows(&json(inner.get_post_processor()))
        && matches!(inner.get_model(), ModelWrapper::BPE(model) if model.dropout.is_none())
}

/// A part as `tokenizer.json` has it; most keep their fields to themselves.
fn json(part: Option<&impl Serialize>) -> Value {
    serde_json::to_value(part).unwrap_or(Value::Bool(false))
}

/// Canonical composition joins no character with a space, comma or full stop.
fn normalizer_allows(part: &Value) -> bool {
    part.is_null() || part["type"] == "NFC"
}

fn splitter_allows(part: &Value) -> bool {
    // A space put before the text would be put before every part of it.
    let byte_level = |part: &Value| part["type"] == "ByteLevel" && part["add_prefix_space"] == false;
    match part["pretokenizers"].as_array().map(Vec::as_slice) {
        None => byte_level(part) && part["use_regex"] == true,
        Some([split, last]) if byte_level(last) => match split["type"].as_str() {
            Some("Digits") => last["use_regex"] == true,
            Some("Split") => {
                let known = split["pattern"]["Regex"].as_str().is_some_and(|regex| SPLITS.contains(&regex));
                known && split["behavior"] == "Isolated" && split["invert"] == false
            }
            _ => false,
        },
        Some(_) => false,
    }
}

/// What comes behind may only put tokens around the whole.
fn post_processor_allows(part: &Value) -> bool {
    match part["type"].as_str() {
        None => part.is_null(),
        Some("Sequence") => part["processors"].as_array().is_some_and(|all| all.iter().all(post_processor_allows)),
        Some(kind) => matches!(kind, "ByteLevel" | "TemplateProcessing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::{
        Tokenizer,
        tests::{self, CUT as MODELS},
    };
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::LazyLock;

    fn load(model: &str, budget_bytes: usize) -> Tokenizer {
        let mut tokenizer = tests::load(model);
        tokenizer.remember(budget_bytes);
        tokenizer
    }

    /// Tokenizers of every kind that allows cuts, as they are and with almost no room to remember anything.
    static CUT: LazyLock<Vec<[Tokenizer; 3]>> =
        LazyLock::new(|| MODELS.map(|model| [0, 64 << 10, 1 << 20].map(|budget| load(model, budget))).into());

    /// A splitter that looks across a cut, or that nobody has looked at, allows none.
    #[test]
    fn splitters_are_known_or_allow_no_cut() {
        let bytes =
            |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": regex});
        let split = |regex: &str, behavior: &str, invert: bool| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert});
        let both = |first: Value, last: Value| json!({"type": "Sequence", "pretokenizers": [first, last]});
        let digits = json!({"type": "Digits", "individual_digits": true});
        for (splitter, allows) in [
            (bytes(false, true), true),
            (bytes(true, true), false),
            (bytes(false, false), false),
            (both(split(SPLITS[0], "Isolated", false), bytes(false, false)), true),
            (both(split(SPLITS[0], "Isolated", false), bytes(true, false)), false),
            (both(split(SPLITS[0], "Removed", false), bytes(false, false)), false),
            (both(split(SPLITS[0], "Isolated", true), bytes(false, false)), false),
            (both(split(r"\w+", "Isolated", false), bytes(false, false)), false),
            (both(digits.clone(), bytes(false, true)), true),
            (both(digits.clone(), bytes(false, false)), false),
            (both(digits, json!({"type": "Whitespace"})), false),
            (json!({"type": "Metaspace"}), false),
            (Value::Null, false),
        ] {
            assert_eq!(splitter_allows(&splitter), allows, "{splitter}");
        }
    }

    fn check(text: &str) -> Result<(), TestCaseError> {
        for tokenizer in CUT.iter().flatten() {
            // What is known after the first time is read the second time.
            for _ in 0..2 {
                for special in [false, true] {
                    prop_assert_eq!(
                        tokenizer.encode(text, special),
                        tokenizer.encode_whole(text, special),
                        "{:?}",
                        text
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn known_tokenizers_allow_cuts_and_others_do_not() {
        assert!(CUT.iter().flatten().all(Tokenizer::remembers));
        for other in ["llama", "mistral", "gemma2", "phi3"] {
            assert!(!load(&format!("tests/golden/{other}"), 1 << 20).remembers(), "{other}");
        }
    }

    #[test]
    fn long_texts_and_those_that_begin_alike_read_like_the_whole() {
        let words = include_str!("pieces.rs");
        let long = words.repeat(2);
        for end in [long.len(), 9_000, 8_999, 4_097, 1_025, 1_024] {
            check(&long[..long.floor_char_boundary(end)]).unwrap();
            check(&format!("{}, and then <|im_end|> something else", &long[..long.floor_char_boundary(end)])).unwrap();
        }
    }

    fn fragment() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => "[ ]{0,2}[A-Za-z]{1,9}",
            4 => "[ ]{0,2}[0-9]{1,5}",
            4 => "[ ]?[\\.,;:!'\"/<>|_-]{1,3}",
            2 => "[ \t\r\n\u{a0}\u{2003}\u{3000}]{1,4}",
            3 => "[你好世界模型，。、！\u{4dff}\u{9fff}]{1,6}",
            2 => "[é́ñßİıſǆ\u{301}\u{200d}한글ก]{1,4}",
            1 => prop_oneof![Just("'s"), Just("'LL"), Just("<|im_start|>"), Just("<|im_end|>"), Just("<|endoftext|>"), Just("<BOS_TOKEN>"), Just("<tool_call>"), Just("😀👩‍💻")].prop_map(String::from),
            1 => "\\PC{0,3}",
        ]
    }

    proptest! {
        #[test]
        fn parts_read_like_the_whole(fragments in proptest::collection::vec(fragment(), 0..60), repeat in 1usize..4) {
            check(&fragments.concat().repeat(repeat))?;
        }
    }
}
