//! One sequence: what is asked, what is known, what is computed.

use super::{Chunk, History};
use crate::{Adapter, Embedding, Logprobs, Pooling, PromptLogprobs, Row, Sample, Sampled, Sampling};
use grammar::Matcher;
use kv_cache::{PageHash, PageId, PagePool, TokenId};
use std::{sync::Arc, time::Duration};
use timing::Work;

/// Names a sequence, and orders the line: lower priority values first, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    pub(super) priority: i32,
    pub(super) number: u64,
}

#[cfg(test)]
impl SequenceId {
    pub(crate) fn for_tests(number: u64) -> Self {
        Self { priority: 0, number }
    }
}

/// What is to be computed.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt, then tokens that earlier attempts have emitted.
    pub history: History,
    /// How many of the history's tokens are the prompt; a token's index counts from here.
    pub prompt_tokens: usize,
    /// What is added to the model for it. The root of `history` must tell its pages from those of others.
    pub adapter: Option<Arc<Adapter>>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// What the output must fit: its place after the tokens emitted by earlier attempts.
    pub grammar: Option<Matcher>,
    /// When to stop.
    pub stop: Stop,
    /// How many alternatives are reported beside each token of the prompt but the first; `None` reports none of them. A prompt
    /// that is reported is computed whole: what is cached of it has no logits any more.
    pub prompt_logprobs: Option<u32>,
    /// Lower runs first.
    pub priority: i32,
    /// How far this worker takes it.
    pub until: Until,
}

/// When a sequence stops.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// Output tokens, counted from index 0 whoever emitted them.
    pub max_tokens: usize,
    /// Until so many output tokens are known, none of `ids` is drawn.
    pub min_tokens: usize,
    /// Tokens that end the sequence: end-of-sequence (unless the request ignores it) and the request's stop ids.
    pub ids: Vec<TokenId>,
}

/// How far a worker takes a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// To its first token here. Its pages are all taken at admission, are never given up to others, and are kept when it
    /// ends, however it ends: the caller gets them as a [`Hold`], because a hand-off may still be reading them.
    FirstToken,
    /// To its end.
    End,
    /// To the end of what is known: it draws nothing, and what is left of it is one vector ([`Embedded`]).
    Embedding(Pooling),
}

/// Why a sequence has no further token here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// This token was drawn: one of [`Stop::ids`], or one that completes the grammar so that nothing can follow.
    Stop(TokenId),
    /// `max_tokens` or the longest sequence of this worker was reached.
    Length,
    /// The first token is there, and that is all that was asked ([`Until::FirstToken`]).
    FirstToken,
}

/// What an ended sequence leaves behind.
#[derive(Debug, Default)]
#[must_use = "a hold must be given back"]
pub struct Ended {
    /// What it took.
    pub usage: Usage,
    /// Its pages, when they are the caller's to give back.
    pub hold: Option<Hold>,
}

/// What a sequence took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens found in the prefix cache when it was first admitted.
    pub cached_tokens: usize,
    /// Of those, tokens whose pages a peer sent for it.
    pub fetched_tokens: usize,
    /// From arrival to the first step that held it.
    pub queue: Duration,
    /// From then to the first token drawn here, or to the embedding.
    pub prefill: Duration,
}

/// Pages that outlive their sequence. Give them back with [`super::Scheduler::give_back`] when nobody reads or writes them any more;
/// a hold is one value, so that cannot happen twice.
#[derive(Debug)]
#[must_use = "a hold must be given back"]
pub struct Hold {
    pub(super) pages: Vec<PageId>,
}

impl Hold {
    /// Returns the pages, in sequence order.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }
}

/// A request with its progress.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) request: Request,
    /// Held pages in order; none while it waits.
    pub(super) pages: Vec<PageId>,
    /// Tokens whose keys and values are in `pages`.
    pub(super) computed: usize,
    /// Leading pages that have been offered to the pool by name.
    named: usize,
    arrived: Duration,
    started: Option<Duration>,
    first_token: Option<Duration>,
    cached_tokens: usize,
    /// Tokens that it will hardly have to compute, as it looked when it came: cached, or a sibling's before it.
    expected: usize,
    /// A prefix is on its way to it: until that is settled others pass it.
    pub(super) awaiting: bool,
    /// Tokens of the prefix that came.
    pub(super) fetched: usize,
    /// What is pooled so far, where that is what it is computed for.
    embedding: Option<Embedding>,
    /// Present while a step is under way that computes its last token and draws the next: its row there.
    pub(super) ahead: Option<usize>,
    /// A step that ran ahead could not tell what it drew: it takes the host to.
    pub(super) undecided: bool,
}

impl Sequence {
    /// `expected` is how many tokens of it others hold or will hold when its turn comes.
    pub(super) fn new(request: Request, arrived: Duration, expected: usize) -> Self {
        let (pages, computed, named, cached_tokens) = (Vec::new(), 0, 0, 0);
        let embedding = match request.until {
            Until::Embedding(pooling) => Some(Embedding::new(pooling)),
            Until::FirstToken | Until::End => None,
        };
        Self {
            request,
            pages,
            computed,
            named,
            arrived,
            started: None,
            first_token: None,
            cached_tokens,
            expected,
            awaiting: false,
            fetched: 0,
            embedding,
            ahead: None,
            undecided: false,
        }
    }

    /// Returns the tokens known and not yet computed; at least one, always.
    pub(super) fn remaining(&self) -> usize {
        self.request.history.len() - self.computed
    }

    /// Notes that `tokens` of it need no computing.
    pub(super) fn expect(&mut self, tokens: usize) {
        self.expected = tokens;
    }

    /// Adds what is probably left to compute of its prompt to `work`.
    pub(super) fn add_backlog(&self, work: &mut Work) {
        let known = self.request.history.len();
        let done = if self.pages.is_empty() { self.expected.min(known - 1) } else { self.computed };
        if known - done > 1 {
            work.chunk(done, known - done);
        }
    }

    /// Returns how many drafts of it could be of use: a step never draws past its end.
    pub(super) fn room(&self, max_len: usize) -> usize {
        let Request { history, prompt_tokens, stop, .. } = &self.request;
        let left = (max_len - history.len()).min((prompt_tokens + stop.max_tokens).saturating_sub(history.len()));
        left.saturating_sub(1)
    }

    /// Returns the names a fresh start may look up.
    pub(super) fn reusable(&self) -> &[PageHash] {
        let whole = self.prompt_logprobs().is_some() || self.request.until == Until::Embedding(Pooling::Mean);
        if whole { &[] } else { self.request.history.reusable() }
    }

    /// Says whether tokens are drawn once all that is known is computed.
    pub(super) fn draws(&self) -> bool {
        self.embedding.is_none()
    }

    /// Takes the hidden states of `chunk`, flat. Returns the vector when they are the last of them.
    pub(super) fn pool_states(&mut self, chunk: &Chunk, hidden: &[f32], now: Duration) -> Option<Vec<f32>> {
        let Until::Embedding(pooling) = self.request.until else { return None };
        let states = match pooling {
            Pooling::Last => 1,
            Pooling::Mean => chunk.tokens,
        };
        let embedding = self.embedding.as_mut()?;
        embedding.add(chunk.start, hidden.chunks_exact((hidden.len() / states).max(1)));
        if chunk.start + chunk.tokens < self.request.history.len() {
            return None;
        }
        self.first_token = Some(now);
        self.embedding.take().map(Embedding::finish)
    }

    /// Returns how many alternatives are to be reported beside the prompt's tokens, until that is done.
    fn prompt_logprobs(&self) -> Option<u32> {
        self.request.prompt_logprobs.filter(|_| self.first_token.is_none())
    }

    /// Says whether tokens will be added to it here, and so pages. What does not grow is never preempted.
    pub(super) fn grows(&self) -> bool {
        self.request.until == Until::End
    }

    /// Says whether the next step computes a single token of it: the last one known, or the one that the step under way draws, unless it is the
    /// last of the sequence.
    pub(super) fn is_single(&self, max_len: usize) -> bool {
        self.remaining() == 1 && (self.ahead.is_none() || self.room(max_len) > 0)
    }

    /// Returns how many pages it lacks before its known tokens, and the one being drawn, can be computed.
    pub(super) fn pages_missing(&self) -> usize {
        let history = &self.request.history;
        history.pages_for(history.len() + usize::from(self.ahead.is_some())).saturating_sub(self.pages.len())
    }

    /// Returns the chunk of a single token. One that is not known yet has a place in the history, as a draft would.
    pub(super) fn single(&mut self, id: SequenceId) -> Chunk {
        if self.ahead.is_some() {
            self.request.history.guess(&[0]);
        }
        let start = self.computed + usize::from(self.ahead.is_some());
        Chunk { id, start, tokens: 1, drafts: 0, sample: self.draws(), follows: self.ahead }
    }

    /// Notes that a step which ran ahead could not tell its next token, so that what followed it is void.
    pub(super) fn fall_back(&mut self) {
        self.request.history.guess(&[]);
        (self.ahead, self.undecided) = (None, true);
    }

    /// Takes `pages`, of which the first `cached` hold its prefix already, as its first step's are planned. Returns whether
    /// this is its first step.
    pub(super) fn admit(&mut self, pages: Vec<PageId>, cached: usize, page_tokens: usize, now: Duration) -> bool {
        self.pages = pages;
        self.named = cached;
        self.computed = cached * page_tokens;
        let first = self.start(now);
        if first {
            self.cached_tokens = self.computed;
        }
        first
    }

    /// Takes `pages`, which hold all its known tokens; the first `have` were here before.
    pub(super) fn land(&mut self, pages: Vec<PageId>, have: usize, page_tokens: usize, pool: &mut PagePool) {
        self.pages = pages;
        self.named = have;
        self.cached_tokens = have * page_tokens;
        self.advance(self.request.history.len(), page_tokens, pool);
    }

    /// Notes that it is part of a step. Returns whether for the first time.
    pub(super) fn start(&mut self, now: Duration) -> bool {
        self.started.replace(self.started.unwrap_or(now)).is_none()
    }

    /// Gives up its pages and all that was computed; what has a name stays findable.
    pub(super) fn preempt(&mut self, pool: &mut PagePool) {
        pool.release(&std::mem::take(&mut self.pages));
        self.request.history.guess(&[]);
        self.computed = 0;
        self.named = 0;
    }

    /// Counts `tokens` more as computed and names the pages that this completed.
    pub(super) fn advance(&mut self, tokens: usize, page_tokens: usize, pool: &mut PagePool) {
        self.computed += tokens;
        let full = self.computed / page_tokens;
        for index in self.named..full {
            pool.name(self.pages[index], self.request.history.hashes()[index]);
        }
        self.named = self.named.max(full);
    }

    /// Appends a drawn token. Returns its index and, when it is the last one here, why.
    pub(super) fn append(&mut self, token: TokenId, max_len: usize, now: Duration) -> (usize, Option<Finish>) {
        self.first_token.get_or_insert(now);
        self.undecided = false;
        let index = self.request.history.len() - self.request.prompt_tokens;
        self.know(token);
        let complete = self.request.grammar.as_ref().is_some_and(Matcher::is_complete);
        let stop = &self.request.stop;
        let finish = if complete || stop.ids.contains(&token) {
            Some(Finish::Stop(token))
        } else if index + 1 >= stop.max_tokens || self.request.history.len() >= max_len {
            Some(Finish::Length)
        } else {
            (self.request.until == Until::FirstToken).then_some(Finish::FirstToken)
        };
        (index, finish)
    }

    /// Adds a token that was drawn, here or elsewhere.
    pub(super) fn know(&mut self, token: TokenId) {
        self.request.history.push(token);
        if let Some(matcher) = self.request.grammar.as_mut().filter(|_| !self.request.stop.ids.contains(&token)) {
            // A token that does not fit leaves no way on, which the next draw reports.
            let _ = matcher.advance(token);
        }
    }

    /// Begins to work out what the grammar allows to be drawn after `chunk`.
    pub(super) fn prepare(&self, chunk: &Chunk) {
        if let Some(matcher) = &self.request.grammar {
            let end = chunk.start + chunk.tokens;
            matcher.prepare(&self.request.history.with_drafts()[end - chunk.drafts..end]);
        }
    }

    /// Puts `drafts` in place of those before, as far as they have room and fit the grammar.
    pub(super) fn guess(&mut self, drafts: &[TokenId], max_len: usize) {
        let drafts = &drafts[..drafts.len().min(self.room(max_len))];
        let fitting = self.request.grammar.as_ref().map_or(drafts.len(), |matcher| matcher.allowed(drafts));
        self.request.history.guess(&drafts[..fitting]);
    }

    /// Returns what is computed of it by `chunk`.
    pub(super) fn row(&self, chunk: &Chunk) -> Row<'_> {
        let Chunk { start, tokens, drafts, sample, follows, .. } = *chunk;
        let (known, end) = (self.request.history.with_drafts(), start + tokens);
        let sample = sample.then(|| self.sample(&known[..end]));
        let adapter = self.request.adapter.as_deref();
        let pooling = match self.request.until {
            Until::Embedding(pooling) => Some(pooling),
            Until::FirstToken | Until::End => None,
        };
        let tokens = &known[start..end];
        let leaves = matches!(self.request.until, Until::FirstToken);
        let pages = &self.pages;
        let row = Row { tokens, start, pages, adapter, leaves, drafts, sample, pooling, follows, ..Row::default() };
        let prompt = self.request.prompt_tokens;
        match self.prompt_logprobs() {
            Some(top) if start + 1 < prompt => {
                let targets = &known[start + 1..prompt.min(end + 1)];
                Row { prompt_logprobs: Some(PromptLogprobs { targets, top }), ..row }
            }
            _ => row,
        }
    }

    /// Names the tokens of the prompt that a row over `chunk` has reported.
    pub(super) fn report(&self, chunk: &Chunk, logprobs: Vec<Logprobs>) -> Option<Reported> {
        let (id, position) = (chunk.id, chunk.start + 1);
        let tokens = self.request.history.tokens().get(position..)?.iter().zip(logprobs);
        let tokens: Vec<_> = tokens.map(|(&token, logprobs)| Sampled { token, logprobs: Some(logprobs) }).collect();
        (!tokens.is_empty()).then_some(Reported { id, position, tokens })
    }

    /// Returns how the tokens after `history` are drawn.
    pub(super) fn sample<'a>(&'a self, history: &'a [TokenId]) -> Sample<'a> {
        let Request { prompt_tokens, sampling, stop, grammar, .. } = &self.request;
        Sample {
            sampling,
            history,
            prompt_tokens: *prompt_tokens,
            forbidden: &stop.ids,
            min_tokens: stop.min_tokens,
            grammar: grammar.as_ref(),
        }
    }

    pub(super) fn usage(&self, now: Duration) -> Usage {
        let started = self.started.unwrap_or(now);
        Usage {
            cached_tokens: self.cached_tokens,
            fetched_tokens: self.fetched.min(self.cached_tokens),
            queue: started.saturating_sub(self.arrived),
            prefill: self.first_token.map_or(Duration::ZERO, |first| first.saturating_sub(started)),
        }
    }
}

/// A token that a step drew.
#[derive(Debug)]
pub struct Drawn {
    /// Whose.
    pub id: SequenceId,
    /// Which of its output tokens.
    pub index: usize,
    /// The token.
    pub sampled: Sampled,
    /// Present when it is the sequence's last one here: the sequence is gone.
    pub ended: Option<(Finish, Ended)>,
}

/// What became of a sequence that was computed for its embedding: it is gone.
#[derive(Debug)]
pub struct Embedded {
    /// Whose.
    pub id: SequenceId,
    /// The vector, `[hidden]`, of length 1.
    pub vector: Vec<f32>,
    /// What is left of it.
    pub ended: Ended,
}

/// What became of a sequence's drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Whose.
    pub id: SequenceId,
    /// How many there were.
    pub drafts: usize,
    /// How many of them, from the first on, were right.
    pub accepted: usize,
}

/// Log-probabilities of some tokens of a prompt.
#[derive(Debug)]
pub struct Reported {
    /// Whose.
    pub id: SequenceId,
    /// Position of the first of them in the prompt.
    pub position: usize,
    /// The tokens from there on, each with what was asked about it.
    pub tokens: Vec<Sampled>,
}
