//! One sequence: what is asked, what is known, what is computed.

use super::History;
use crate::{Row, Sample, Sampled, Sampling};
use kv_cache::{PageId, PagePool, TokenId};
use std::time::Duration;

/// Names a sequence, and orders the line: lower priority values first, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    pub(super) priority: i32,
    pub(super) number: u64,
}

/// What is to be computed.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt, then tokens that earlier attempts have emitted.
    pub history: History,
    /// How many of the history's tokens are the prompt; a token's index counts from here.
    pub prompt_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When to stop.
    pub stop: Stop,
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
}

/// Why a sequence has no further token here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// This token, one of [`Stop::ids`], was drawn.
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
    /// From arrival to the first step that held it.
    pub queue: Duration,
    /// From then to the first token drawn here.
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
}

impl Sequence {
    pub(super) fn new(request: Request, arrived: Duration) -> Self {
        let (started, first_token) = (None, None);
        Self { request, pages: Vec::new(), computed: 0, named: 0, arrived, started, first_token, cached_tokens: 0 }
    }

    /// Returns the tokens known and not yet computed; at least one, always.
    pub(super) fn remaining(&self) -> usize {
        self.request.history.len() - self.computed
    }

    /// Says whether tokens will be added to it here, and so pages.
    pub(super) fn grows(&self) -> bool {
        self.request.until == Until::End
    }

    /// Returns how many pages it lacks before its known tokens can be computed.
    pub(super) fn pages_missing(&self) -> usize {
        let history = &self.request.history;
        history.pages_for(history.len()).saturating_sub(self.pages.len())
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
        let index = self.request.history.len() - self.request.prompt_tokens;
        self.request.history.push(token);
        let stop = &self.request.stop;
        let finish = if stop.ids.contains(&token) {
            Some(Finish::Stop(token))
        } else if index + 1 >= stop.max_tokens || self.request.history.len() >= max_len {
            Some(Finish::Length)
        } else {
            (self.request.until == Until::FirstToken).then_some(Finish::FirstToken)
        };
        (index, finish)
    }

    pub(super) fn row(&self, start: usize, tokens: usize) -> Row<'_> {
        let known = self.request.history.tokens();
        let sample = (start + tokens == known.len()).then(|| self.sample());
        Row { tokens: &known[start..start + tokens], start, pages: &self.pages, sample }
    }

    fn sample(&self) -> Sample<'_> {
        let Request { history, prompt_tokens, sampling, stop, .. } = &self.request;
        let gated = history.len() - prompt_tokens < stop.min_tokens;
        Sample {
            sampling,
            history: history.tokens(),
            prompt_tokens: *prompt_tokens,
            forbidden: if gated { &stop.ids } else { &[] },
        }
    }

    pub(super) fn usage(&self, now: Duration) -> Usage {
        let started = self.started.unwrap_or(now);
        Usage {
            cached_tokens: self.cached_tokens,
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
