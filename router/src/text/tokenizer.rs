//! Tokens of a text, and what each token stands for.

use super::{
    merges::Merges,
    pieces::{Pieces, allows_cuts},
};
use anyhow::{Context, ensure};
use kv_cache::TokenId;
use std::{fmt, panic::AssertUnwindSafe, path::Path};
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, Tokenizer as Inner};

/// A model's tokenizer, as `tokenizer.json` or a GGUF file describes it.
pub(crate) struct Tokenizer {
    inner: Inner,
    /// Where texts may be cut: the tokens of parts.
    parts: Option<Parts>,
    spellings: Spellings,
    byte_level: bool,
}

/// The tokens of parts of texts, and what is put around a whole one on request.
struct Parts {
    known: Pieces,
    /// What makes the tokens of plain pieces, unless an added token is made of letters alone and so may stand in one.
    merges: Option<Merges>,
    before: Vec<TokenId>,
    behind: Vec<TokenId>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.spellings.len())
            .field("byte_level", &self.byte_level)
            .finish()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Padding and truncation it may carry are training settings and are dropped.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let read = || {
            // The library asserts that decoders are JSON, so that comes first.
            let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
            let mut inner: Inner = serde_json::from_value(json)?;
            inner.with_padding(None);
            inner.with_truncation(None).map_err(|error| anyhow::anyhow!("{error}"))?;
            Self::new(inner)
        };
        guarded(read).with_context(|| format!("read {}", path.display()))
    }

    /// Takes a tokenizer that neither pads nor truncates, if it works.
    pub(crate) fn new(inner: Inner) -> anyhow::Result<Self> {
        let last = inner.get_vocab(true).into_values().max().unwrap_or_default();
        ensure!(last <= LAST_TOKEN, "token {last} is beyond any vocabulary; known are ids up to {LAST_TOKEN}");
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let spellings = Spellings::of(&inner, byte_level);
        let tokenizer = Self { inner, spellings, byte_level, parts: None };
        // What its parts say of each other shows when they meet.
        tokenizer.encode("a", true).map_err(|error| anyhow::anyhow!("encode a text: {error}"))?;
        Ok(tokenizer)
    }

    /// Remembers the tokens of parts of texts, in at most `budget_bytes`, if texts may be cut at all.
    pub(crate) fn remember(&mut self, budget_bytes: usize) {
        self.parts = self.parts(budget_bytes);
        tracing::info!(remembers = self.parts.is_some(), budget_bytes, "tokenizer");
    }

    fn parts(&self, budget_bytes: usize) -> Option<Parts> {
        let whole = |special| self.encode_whole("a", special).ok();
        let (bare, around) = (whole(false)?, whole(true)?);
        let at = around.windows(bare.len()).position(|part| part == bare).filter(|_| allows_cuts(&self.inner))?;
        let (before, behind) = (around[..at].to_vec(), around[at + bare.len()..].to_vec());
        let letters = |token: &AddedToken| token.content.bytes().all(|byte| byte.is_ascii_alphabetic());
        let merges = match self.inner.get_model() {
            ModelWrapper::BPE(model) if !self.inner.get_added_tokens_decoder().values().any(letters) => {
                Merges::of(model)
            }
            _ => None,
        };
        Some(Parts { known: Pieces::new(&self.inner, budget_bytes), merges, before, behind })
    }

    /// Returns the tokens of `text`. `special` adds what the post-processor adds (BOS and such); special tokens spelled out
    /// in the text are recognised either way.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, String> {
        let tokens = self.encode_within(text, special, usize::MAX)?;
        Ok(tokens.expect("a text has fewer bytes than memory"))
    }

    /// The same if at most `most_bytes` of it, or a little more, have tokens yet to be found: what can be done between two other things.
    pub(crate) fn encode_within(
        &self,
        text: &str,
        special: bool,
        most_bytes: usize,
    ) -> Result<Option<Vec<TokenId>>, String> {
        let Some(parts) = &self.parts else {
            return if text.len() <= most_bytes { self.encode_whole(text, special).map(Some) } else { Ok(None) };
        };
        // English has four bytes to a token.
        let mut tokens = Vec::with_capacity(text.len() / 3 + 16);
        if special {
            tokens.extend_from_slice(&parts.before);
        }
        let mut left = most_bytes;
        let encoded = parts.known.encode(text, &mut tokens, |part, tokens| {
            left = left.checked_sub(part.len()).ok_or(None)?;
            match &parts.merges {
                Some(merges) if Merges::take(part) => merges.encode(part, tokens),
                _ => tokens.extend(self.encode_whole(part, false).map_err(Some)?),
            }
            Ok(())
        });
        match encoded {
            Ok(()) => {}
            Err(None) => return Ok(None),
            Err(Some(error)) => return Err(error),
        }
        if special {
            tokens.extend_from_slice(&parts.behind);
        }
        Ok(Some(tokens))
    }

    /// Encodes without cutting.
    pub(super) fn encode_whole(&self, text: &str, special: bool) -> Result<Vec<TokenId>, String> {
        // `encode_fast` skips the offsets, which nobody here asks for.
        let encode = || self.inner.encode_fast(text, special).map_err(|error| anyhow::anyhow!("{error}"));
        Ok(guarded(encode).map_err(|error| error.to_string())?.get_ids().to_vec())
    }

    /// Whether tokens of parts are remembered.
    #[cfg(test)]
    pub(super) fn remembers(&self) -> bool {
        self.parts.is_some()
    }

    /// Bytes that are remembered.
    pub(crate) fn remembered_bytes(&self) -> usize {
        self.parts.as_ref().map_or(0, |parts| parts.known.bytes())
    }

    /// Returns the text of `tokens` taken as a whole.
    pub(crate) fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        // A decoder that its file makes impossible, such as one that strips more than there is, has no text to show.
        let decode = || self.inner.decode(tokens, skip_special).map_err(|error| anyhow::anyhow!("{error}"));
        guarded(decode).unwrap_or_default()
    }

    /// One more than the largest token id.
    pub(crate) fn vocab_size(&self) -> usize {
        self.spellings.len()
    }

    /// Returns a token as the vocabulary writes it (`\u{0120}the` for ` the`); empty for an unknown one.
    pub(crate) fn spelling(&self, token: TokenId) -> String {
        self.inner.id_to_token(token).unwrap_or_default()
    }

    /// Returns the token that is written `text`, if there is one.
    pub(crate) fn token(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text)
    }

    pub(crate) fn is_special(&self, token: TokenId) -> bool {
        self.spellings.special.get(token as usize).copied().unwrap_or(false)
    }

    /// Returns the bytes a token adds to the text; empty for an unknown token.
    pub(crate) fn bytes(&self, token: TokenId) -> &[u8] {
        self.spellings.get(token)
    }

    /// Whether a text is exactly the concatenation of its tokens' bytes, read as UTF-8.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.byte_level
    }
}

/// Largest vocabularies have a quarter of a million tokens; a table of all ids is made.
const LAST_TOKEN: TokenId = (1 << 24) - 1;

/// Runs what hands a file's contents to the library, which asserts much of what files say.
pub(super) fn guarded<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    // What a panic leaves half done is dropped with the stack.
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(anyhow::anyhow!("the tokenizer library gave up: {}", text.unwrap_or("no reason given")))
    })
}

/// The bytes of every token, laid end to end.
struct Spellings {
    bytes: Vec<u8>,
    /// Where token `i` ends; it begins where `i - 1` ends.
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl Spellings {
    fn of(inner: &Inner, byte_level: bool) -> Self {
        let size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let mut special = vec![false; size];
        for (id, token) in inner.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(size));
        for id in 0..size as u32 {
            if let Some(token) = inner.id_to_token(id) {
                grammar::token_bytes(&token, byte_level, &mut bytes);
            }
            ends.push(bytes.len() as u32);
        }
        Self { bytes, ends, special }
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, token: TokenId) -> &[u8] {
        let i = token as usize;
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::LazyLock;

    /// Where tokenizers lie whose texts may be cut, of every kind.
    pub(in crate::text) const CUT: [&str; 5] =
        ["models/demo", "tests/golden/llama3", "tests/golden/gptneox", "tests/golden/cohere", "tests/golden/qwen2"];

    /// Loads one of them, or another one.
    pub(in crate::text) fn load(model: &str) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(model).join("tokenizer.json");
        Tokenizer::load(&path).unwrap()
    }

    /// All of them as the library has them, by name.
    pub(in crate::text) fn byte_level() -> impl Iterator<Item = (&'static str, &'static Inner)> {
        static LOADED: LazyLock<Vec<(&str, Tokenizer)>> =
            LazyLock::new(|| CUT.map(|model| (model, load(model))).into());
        LOADED.iter().map(|(name, tokenizer)| (*name, &tokenizer.inner))
    }
}
