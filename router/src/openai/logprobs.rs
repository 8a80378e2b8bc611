//! Log-probabilities, as chat and text completions write them.

use crate::{
    fleet::leg::{Logprobs, Token},
    text::tokenizer::Tokenizer,
};
use kv_cache::TokenId;
use serde::{Serialize, Serializer, ser::SerializeMap};

/// What JSON says for minus infinity.
const LEAST: f32 = -9999.0;

/// How tokens are named to clients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// As `token_id:7` rather than by their text, which need not be theirs alone.
    pub(crate) by_id: bool,
}

impl Names<'_> {
    fn of(self, id: TokenId) -> String {
        if self.by_id { format!("token_id:{id}") } else { self.text(id) }
    }

    fn text(self, id: TokenId) -> String {
        String::from_utf8_lossy(self.tokenizer.bytes(id)).into_owned()
    }
}

/// `logprobs` of a chat choice.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
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
    fn new(names: Names<'_>, id: TokenId, logprob: f32) -> Self {
        Self { token: names.of(id), logprob: logprob.max(LEAST), bytes: names.tokenizer.bytes(id).to_vec() }
    }
}

impl ChatLogprobs {
    /// Adds the tokens of a step; `count` alternatives each.
    pub(crate) fn extend(&mut self, names: Names<'_>, tokens: &[Token], count: usize) {
        self.content.extend(tokens.iter().filter_map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            let top = logprobs.top.iter().take(count);
            Some(ChatToken {
                token: Alternative::new(names, token.id, logprobs.logprob),
                top_logprobs: top.map(|&(id, logprob)| Alternative::new(names, id, logprob)).collect(),
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
    pub(crate) fn echo(&mut self, names: Names<'_>, first: TokenId, others: &[Token], count: usize) {
        self.push(first, None, names);
        self.extend(names, others, count);
    }

    fn push(&mut self, token: TokenId, known: Option<(f32, TopLogprobs)>, names: Names<'_>) {
        let shown = names.of(token);
        self.text_offset.push(self.offset);
        self.offset += shown.chars().count();
        self.tokens.push(shown);
        let (logprob, top) = known.unzip();
        self.token_logprobs.push(logprob.map(|logprob| logprob.max(LEAST)));
        self.top_logprobs.push(top);
    }

    /// Adds the tokens of a step: `count` alternatives each, and the token itself where it is not among them.
    pub(crate) fn extend(&mut self, names: Names<'_>, tokens: &[Token], count: usize) {
        for token in tokens {
            let Some(logprobs) = &token.logprobs else { continue };
            let mut top: Vec<(String, f32)> = Vec::with_capacity(count + 1);
            let own = (token.id, logprobs.logprob);
            for &(id, logprob) in logprobs.top.iter().take(count).chain([&own]) {
                let name = names.of(id);
                // Distinct tokens may read alike when they are parts of characters; a JSON object holds one of them.
                if top.iter().all(|(other, _)| *other != name) {
                    top.push((name, logprob.max(LEAST)));
                }
            }
            self.push(token.id, Some((logprobs.logprob, TopLogprobs(top))), names);
        }
    }
}

/// `prompt_logprobs`, vLLM's addition: for each token of the prompt what could have stood there, by token id. The first is `null`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct PromptLogprobs(Vec<Option<PromptToken>>);

impl PromptLogprobs {
    /// Lists a prompt's tokens but for the first, `count` alternatives each.
    pub(crate) fn new(names: Names<'_>, others: &[Token], count: usize) -> Self {
        let list = others.iter().map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            Some(PromptToken::new(names, token.id, logprobs, count))
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
    fn new(names: Names<'_>, own: TokenId, logprobs: &Logprobs, count: usize) -> Self {
        let candidate = |id, logprob: f32, rank| {
            (id, Candidate { logprob: logprob.max(LEAST), rank, decoded_token: names.text(id) })
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
