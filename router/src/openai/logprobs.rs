//! Log-probabilities, as chat and text completions write them.

use crate::{
    fleet::leg::{Logprobs, Token},
    text::tokenizer::Tokenizer,
};
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
    /// `null` for the first token of an echoed prompt.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
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

    /// Adds an echoed prompt: its first token, of which nothing is known, and the others.
    pub(crate) fn echo(&mut self, tokenizer: &Tokenizer, first: TokenId, others: &[Token], count: usize) {
        self.push(first, None, tokenizer);
        self.extend(tokenizer, others, count);
    }

    fn push(&mut self, token: TokenId, known: Option<(f32, TopLogprobs)>, tokenizer: &Tokenizer) {
        let shown = text(tokenizer, token);
        self.text_offset.push(self.offset);
        self.offset += shown.chars().count();
        self.tokens.push(shown);
        let (logprob, top) = known.unzip();
        self.token_logprobs.push(logprob.map(|logprob| logprob.max(LEAST)));
        self.top_logprobs.push(top);
    }

    /// Adds the tokens of a step: `count` alternatives each, and the token itself where it is not among them.
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, tokens: &[Token], count: usize) {
        for token in tokens {
            let Some(logprobs) = &token.logprobs else { continue };
            let mut top: Vec<(String, f32)> = Vec::with_capacity(count + 1);
            let own = (token.id, logprobs.logprob);
            for &(id, logprob) in logprobs.top.iter().take(count).chain([&own]) {
                let name = text(tokenizer, id);
                // Distinct tokens may read alike when they are parts of characters; a JSON object holds one of them.
                if top.iter().all(|(other, _)| *other != name) {
                    top.push((name, logprob.max(LEAST)));
                }
            }
            self.push(token.id, Some((logprobs.logprob, TopLogprobs(top))), tokenizer);
        }
    }
}

fn text(tokenizer: &Tokenizer, id: TokenId) -> String {
    String::from_utf8_lossy(tokenizer.bytes(id)).into_owned()
}

/// `prompt_logprobs`, vLLM's addition: for each token of the prompt what could have stood there, by token id. The first is `null`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct PromptLogprobs(Vec<Option<PromptToken>>);

impl PromptLogprobs {
    /// Lists a prompt's tokens but for the first, `count` alternatives each.
    pub(crate) fn new(tokenizer: &Tokenizer, others: &[Token], count: usize) -> Self {
        let list = others.iter().map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            Some(PromptToken::new(tokenizer, token.id, logprobs, count))
        });
        Self(std::iter::once(None).chain(list).collect())
    }
}

/// Token id to what is known of it: the prompt's own token first, then the most likely ones.
#[derive(Debug)]
struct PromptToken(Vec<(TokenId, Candidate)>);

#[derive(Debug, Serialize)]
struct Candidate {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl PromptToken {
    fn new(tokenizer: &Tokenizer, own: TokenId, logprobs: &Logprobs, count: usize) -> Self {
        let candidate = |id, logprob: f32, rank| {
            (id, Candidate { logprob: logprob.max(LEAST), rank, decoded_token: text(tokenizer, id) })
        };
        let others = (1..).zip(&logprobs.top).take(count).filter(|(_, (id, _))| *id != own);
        let others = others.map(|(rank, &(id, logprob))| candidate(id, logprob, rank));
        Self(std::iter::once(candidate(own, logprobs.logprob, logprobs.rank)).chain(others).collect())
    }
}

impl Serialize for PromptToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, candidate)| (id, candidate)))
    }
}
