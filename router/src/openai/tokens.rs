//! `/tokenize` and `/detokenize`: what a prompt or a conversation is in tokens, and back.

use super::{
    chat::ChatRequest,
    fields::{Fields, wrong},
    params,
};
use crate::{error::Error, prompt::PromptSource, request::Router};
use kv_cache::TokenId;
use serde::Serialize;
use serde_json::Value;

/// What is to become tokens.
#[derive(Debug)]
pub(crate) struct TokenizeRequest {
    source: Source,
    /// Whether BOS and such are added.
    special: bool,
    /// Whether the answer spells every token.
    strings: bool,
}

#[derive(Debug)]
enum Source {
    Prompt(String),
    Chat(Box<ChatRequest>),
}

/// The tokens of a prompt.
#[derive(Debug, Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

impl TokenizeRequest {
    /// Reads and checks a body: `prompt`, or `messages` and whatever else a chat request says.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let strings = fields.bool("return_token_strs")?.unwrap_or(false);
        let special = fields.bool("add_special_tokens")?;
        if let Some(prompt) = fields.string("prompt")? {
            params::model(&mut fields, router)?;
            return Ok(Self { source: Source::Prompt(prompt), special: special.unwrap_or(true), strings });
        }
        let chat = ChatRequest::parse(fields, router).map_err(|error| match error {
            Error::Invalid { param: Some(param), message }
                if param == "messages" && message.ends_with("is required") =>
            {
                Error::invalid("prompt", "is required, or messages instead")
            }
            other => other,
        })?;
        // The template writes the special tokens itself.
        Ok(Self { source: Source::Chat(Box::new(chat)), special: special.unwrap_or(false), strings })
    }

    /// Makes the tokens; to be called on the text threads.
    pub(crate) fn tokenize(self, router: &Router) -> Result<Tokenized, Error> {
        let tokenizer = &router.model.tokenizer;
        let tokens = match self.source {
            Source::Prompt(text) => {
                tokenizer.encode(&text, self.special).map_err(|problem| Error::invalid("prompt", problem))?
            }
            Source::Chat(chat) => chat_tokens(*chat, self.special, router)?,
        };
        let token_strs = self.strings.then(|| tokens.iter().map(|token| tokenizer.spelling(*token)).collect());
        Ok(Tokenized { count: tokens.len(), max_model_len: router.context_tokens(), tokens, token_strs })
    }
}

/// Returns the tokens of a conversation; to be called on the text threads.
pub(crate) fn chat_tokens(chat: ChatRequest, special: bool, router: &Router) -> Result<Vec<TokenId>, Error> {
    let mut tokens = Vec::new();
    for source in chat.into_prompt()(router)? {
        match source {
            PromptSource::Text { text, special: own } => {
                let more = router.model.tokenizer.encode(&text, special || own);
                tokens.extend(more.map_err(|problem| Error::invalid("messages", problem))?);
            }
            PromptSource::Tokens(more) => tokens.extend(more),
        }
    }
    Ok(tokens)
}

/// Tokens that are to become text.
#[derive(Debug)]
pub(crate) struct DetokenizeRequest(Vec<TokenId>);

/// The text of tokens.
#[derive(Debug, Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
}

impl DetokenizeRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        params::model(&mut fields, router)?;
        match params::token_ids(&mut fields, "tokens", router.model.vocab_size)? {
            Some(tokens) => Ok(Self(tokens)),
            None => Err(wrong("tokens", "a list of token ids", &Value::Null)),
        }
    }

    /// Makes the text, special tokens included; to be called on the text threads.
    pub(crate) fn detokenize(self, router: &Router) -> Detokenized {
        Detokenized { prompt: router.model.tokenizer.decode(&self.0, false) }
    }
}
