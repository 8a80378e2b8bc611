//! Tokens of a text, and what each token stands for.

use anyhow::{Context, ensure};
use kv_cache::TokenId;
use std::{fmt, panic::AssertUnwindSafe, path::Path};
use tokenizers::{DecoderWrapper, Tokenizer as Inner};

/// A model's tokenizer, as `tokenizer.json` or a GGUF file describes it.
pub(crate) struct Tokenizer {
    inner: Inner,
    pieces: Pieces,
    byte_level: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.pieces.len()).field("byte_level", &self.byte_level).finish()
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
        let pieces = Pieces::of(&inner, byte_level);
        let tokenizer = Self { inner, pieces, byte_level };
        // What its parts say of each other shows when they meet.
        tokenizer.encode("a", true).map_err(|error| anyhow::anyhow!("encode a text: {error}"))?;
        Ok(tokenizer)
    }

    /// Returns the tokens of `text`. `special` adds what the post-processor adds (BOS and such); special tokens spelled out
    /// in the text are recognised either way.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, String> {
        // `encode_fast` skips the offsets, which nobody here asks for.
        let encode = || self.inner.encode_fast(text, special).map_err(|error| anyhow::anyhow!("{error}"));
        Ok(guarded(encode).map_err(|error| error.to_string())?.get_ids().to_vec())
    }

    /// Returns the text of `tokens` taken as a whole.
    pub(crate) fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        // A decoder that its file makes impossible, such as one that strips more than there is, has no text to show.
        let decode = || self.inner.decode(tokens, skip_special).map_err(|error| anyhow::anyhow!("{error}"));
        guarded(decode).unwrap_or_default()
    }

    /// One more than the largest token id.
    pub(crate) fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    pub(crate) fn is_special(&self, token: TokenId) -> bool {
        self.pieces.special.get(token as usize).copied().unwrap_or(false)
    }

    /// Returns the bytes a token adds to the text; empty for an unknown token.
    pub(crate) fn bytes(&self, token: TokenId) -> &[u8] {
        self.pieces.get(token)
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
struct Pieces {
    bytes: Vec<u8>,
    /// Where token `i` ends; it begins where `i - 1` ends.
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl Pieces {
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
