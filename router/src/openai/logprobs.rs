//! Log-probabilities, as chat and text completions write them.

use crate::{fleet::leg::Token, text::tokenizer::Tokenizer};
use kv_cache::TokenId;
use serde::{Serialize, Serializer, ser::SerializeMap};

/// What JSON says for minus infinity.
const LEAST: f32 = -9999.0;

/// `logprobs` of a chat choice.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Alternative {
    fn new(tokenizer: &Tokenizer, id: TokenId, logprob: f32) -> Self {
        let bytes = tokenizer.bytes(id).to_vec();
        Self { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob.max(LEAST), bytes }
    }
}

impl ChatLogprobs {
    /// Adds the tokens of a step; `count` alternatives each.
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, tokens: &[Token], count: usize) {
        self.content.extend(tokens.iter().filter_map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            let top = logprobs.top.iter().take(count);
            Some(ChatToken {
                token: Alternative::new(tokenizer, token.id, logprobs.logprob),
                top_logprobs: top.map(|&(id, logprob)| Alternative::new(tokenizer, id, logprob)).collect(),
            })
        }));
    }
}

/// `logprobs` of a text choice: lists side by side.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f32>,
    tokens: Vec<String>,
    top_logprobs: Vec<TopLogprobs>,
    /// Characters of the text so far.
    #[serde(skip)]
    offset: usize,
}

/// Token to log-probability, best first.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl TextLogprobs {
    /// Starts where the answer's text stands, in characters.
    pub(crate) fn at(offset: usize) -> Self {
        Self { offset, ..Self::default() }
    }

    /// Returns the offset behind the last token.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Adds the tokens of a step: `count` alternatives each, and the token itself where it is not among them.
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, tokens: &[Token], count: usize) {
        let text = |id| String::from_utf8_lossy(tokenizer.bytes(id)).into_owned();
        for token in tokens {
            let Some(logprobs) = &token.logprobs else { continue };
            let mut top: Vec<(String, f32)> = Vec::with_capacity(count + 1);
            let own = (token.id, logprobs.logprob);
            for &(id, logprob) in logprobs.top.iter().take(count).chain([&own]) {
                let name = text(id);
                // Distinct tokens may read alike when they are parts of characters; a JSON object holds one of them.
                if top.iter().all(|(other, _)| *other != name) {
                    top.push((name, logprob.max(LEAST)));
                }
            }
            let shown = text(token.id);
            self.text_offset.push(self.offset);
            self.offset += shown.chars().count();
            self.token_logprobs.push(logprobs.logprob.max(LEAST));
            self.tokens.push(shown);
            self.top_logprobs.push(TopLogprobs(top));
        }
    }
}
