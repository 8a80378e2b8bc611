//! A prompt: what the client gave, and the tokens it became.

use crate::{error::Error, fleet::adapters::Adapter, request::Router};
use bytes::Bytes;
use kv_cache::{PageHash, TokenId, root_salt};
use std::sync::Arc;

/// A prompt as tokens.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<TokenId>,
    /// Names of its full pages: their root holds both of the following.
    pub(crate) pages: Arc<[PageHash]>,
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

/// Which tokens of a prompt are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Truncation {
    /// `None` = as many as fit.
    pub(crate) keep: Option<u32>,
    /// Whether the first ones are kept rather than the last.
    pub(crate) first: bool,
    /// Tokens of the answer that must fit as well.
    pub(crate) answer: u32,
}

impl Truncation {
    fn cut(self, tokens: &mut Vec<TokenId>, context: u32) {
        let keep = self.keep.unwrap_or(context.saturating_sub(self.answer)) as usize;
        if self.first {
            tokens.truncate(keep);
        } else {
            tokens.drain(..tokens.len().saturating_sub(keep));
        }
    }
}

impl Prompt {
    /// Makes tokens of a source, unless more than `most_bytes` of it have tokens yet to be found. `name` is the field errors speak of.
    pub(crate) fn new(
        router: &Router,
        source: &PromptSource,
        (salt, adapter): (Bytes, Option<Arc<Adapter>>),
        (echo, truncation): (bool, Option<Truncation>),
        name: &str,
        most_bytes: usize,
    ) -> Result<Option<Self>, Error> {
        let tokenizer = &router.model.tokenizer;
        let mut tokens = match source {
            PromptSource::Text { text, special } => {
                let tokens = tokenizer.encode_within(text, *special, most_bytes);
                let Some(tokens) = tokens.map_err(|e| Error::invalid(name, e))? else { return Ok(None) };
                tokens
            }
            PromptSource::Tokens(tokens) => tokens.clone(),
        };
        if let Some(truncation) = truncation {
            truncation.cut(&mut tokens, router.context_tokens());
        }
        let text = echo.then(|| match source {
            PromptSource::Text { text, .. } if truncation.is_none() => text.clone(),
            _ => tokenizer.decode(&tokens, true),
        });
        if tokens.is_empty() {
            return Err(Error::invalid(name, "the prompt is empty"));
        }
        let root = root_salt(&salt, adapter.as_ref().map(|adapter| adapter.id.as_str()));
        let pages = router.page_names.of(&root, &tokens, router.fleet.page_tokens()).into();
        let prompt = Self { tokens, pages, salt, adapter, echo: text };
        prompt.check_length(router.context_tokens(), name)?;
        Ok(Some(prompt))
    }

    /// A prompt must leave room for at least one token.
    fn check_length(&self, context: u32, name: &str) -> Result<(), Error> {
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
