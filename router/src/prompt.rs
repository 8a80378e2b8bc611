//! A prompt: what the client gave, and the tokens it became.

use crate::{error::Error, fleet::adapters::Adapter, text::TextModel};
use bytes::Bytes;
use kv_cache::{PageHash, TokenId, page_hashes, root_salt};
use std::sync::Arc;

/// A prompt as tokens.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<TokenId>,
    /// Names of its full pages: their root holds both of the following.
    pub(crate) pages: Vec<PageHash>,
    /// What the request sets itself apart by.
    pub(crate) salt: Bytes,
    /// What is added to the base model.
    pub(crate) adapter: Option<Arc<Adapter>>,
    /// Its text, where the answer repeats it.
    pub(crate) echo: Option<String>,
}

/// What the client gave for a prompt.
#[derive(Clone, Debug)]
pub(crate) enum PromptSource {
    /// `special` adds BOS and such.
    Text {
        text: String,
        special: bool,
    },
    Tokens(Vec<TokenId>),
}

impl Prompt {
    /// Makes tokens of a source; to be called on the text threads. `name` is the field errors speak of.
    pub(crate) fn new(
        model: &TextModel,
        source: PromptSource,
        (salt, adapter): (Bytes, Option<Arc<Adapter>>),
        echo: bool,
        name: &str,
        page_tokens: usize,
    ) -> Result<Self, Error> {
        let (tokens, text) = match source {
            PromptSource::Text { text, special } => {
                let tokens = model.tokenizer.encode(&text, special).map_err(|e| Error::invalid(name, e))?;
                (tokens, echo.then_some(text))
            }
            PromptSource::Tokens(tokens) => {
                let text = echo.then(|| model.tokenizer.decode(&tokens, true));
                (tokens, text)
            }
        };
        if tokens.is_empty() {
            return Err(Error::invalid(name, "the prompt is empty"));
        }
        let root = root_salt(&salt, adapter.as_ref().map(|adapter| adapter.id.as_str()));
        let pages = page_hashes(&root, &tokens, page_tokens);
        Ok(Self { tokens, pages, salt, adapter, echo: text })
    }

    /// A prompt must leave room for at least one token.
    pub(crate) fn check_length(&self, context: u32, name: &str) -> Result<(), Error> {
        let tokens = self.tokens.len();
        if tokens < context as usize {
            return Ok(());
        }
        Err(Error::invalid(
            name,
            format_args!(
                "the prompt has {tokens} tokens, but this model's maximum context length is {context} tokens, of which at least one \
                 must be left for the answer"
            ),
        ))
    }
}
