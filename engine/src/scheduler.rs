//! Which sequences a step holds. Pure: no clock, no I/O, no tensors.
//!
//! One idea serves every role: a sequence has tokens *known* and tokens *computed*, and a step spends a budget of tokens on
//! bringing the second up to the first. There is no prefill phase and no decode phase; a long prompt is a sequence that is
//! far behind. Who uses it decides what comes in ([`Scheduler::submit`] a fresh sequence, [`Scheduler::land`] one whose pages another
//! worker has filled) and how far it goes ([`Until`]).
//!
//! The rules are those of vLLM's `v1/core/sched/scheduler.py`, with these deviations:
//! - Sequences that lack a single token go first, before longer chunks: a landed or decoding sequence never waits behind a
//!   prompt. The batch is smaller than the budget by at least a page, so prompts always go on.
//! - A chunk ends with a full page unless the prompt ends there: pages leave for another worker whole, and once.
//! - A sequence takes the pages of all its known tokens when it is admitted, so a prompt never stops half-way for want of
//!   pages, and a hand-off can name them from the start. One page per growing sequence is left over, to preempt less.
//! - Drafts (guesses at the next tokens, [`Scheduler::guess`]) take what single tokens leave of the budget but for a page, and pages
//!   only where nobody has to give one up for them. Those that turn out wrong are forgotten: `computed` never counts them.
//!
//! The scheduler owns the [`PagePool`]. A cycle is [`Scheduler::schedule`], the engine's step over [`Scheduler::rows`], and
//! [`Scheduler::complete`]; [`Scheduler::compute`] does the last two.
//!
//! Where the engine can begin a step and end it later ([`Step::begin`](crate::Step::begin)), `compute` leaves it *under way* and ends the one before. The
//! next plan is then made while tokens are drawn: it holds those sequences one token further, and names the row that draws it
//! ([`Chunk::follows`]). A sequence that turns out to have ended has been computed once in vain. Plans that cannot be begun so wait until nothing is under way, and so
//! does whatever would take pages from somebody.

mod compute;
mod history;
mod landing;
mod plan;
mod sequence;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use compute::{Computed, Fault, Stepped};
pub use history::History;
pub use landing::{Landing, NoRoom, Prefix};
pub use plan::{Chunk, Plan};
pub use sequence::{Drawn, Embedded, Ended, Finish, Hold, Reported, Request, SequenceId, Stop, Until, Usage, Verified};

use crate::{Error, Row, Sample, Stuck, Yield};
use kv_cache::{CacheDelta, PageId, PagePool, TokenId};
use sequence::Sequence;
use std::{collections::BTreeMap, time::Duration};
use timing::Work;

/// What a [`Scheduler`] may spend.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Pages in the pool.
    pub pages: usize,
    /// Tokens per page.
    pub page_tokens: usize,
    /// Most tokens in one step.
    pub token_budget: usize,
    /// Most sequences in one step. At most `token_budget - page_tokens` of them are used, so that a full batch leaves room
    /// for a page of a prompt.
    pub max_sequences: usize,
    /// Longest sequence, prompt and output together. What the pool can hold bounds it, too.
    pub max_model_len: usize,
    /// Most sequences in the line; further ones are refused.
    pub max_waiting: usize,
}

/// Why a sequence is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The line is full.
    #[error("{waiting} sequences wait already")]
    Full {
        /// How many.
        waiting: usize,
    },
    /// Longer than anything this worker can hold.
    #[error("{tokens} tokens leave no room for output in sequences of at most {max_len}")]
    TooLong {
        /// Its known tokens.
        tokens: usize,
        /// Longest sequence here, output included.
        max_len: usize,
    },
}

/// How much there is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences in the line.
    pub waiting: usize,
    /// Of those, sequences that wait for a prefix from a peer.
    pub deferred: usize,
    /// Tokens known and not computed, over both.
    pub tokens: usize,
    /// What is left of their prompts; what is cached, or a sibling computes before them, is not counted.
    pub prompts: Work,
}

/// A sequence whose next step computes a single token.
#[derive(Clone, Copy, Debug)]
pub struct Decoding<'a> {
    /// Whose.
    pub id: SequenceId,
    /// How its next token is drawn, after all that is known.
    pub sample: Sample<'a>,
    /// Most drafts that could be of use: it ends after one token more.
    pub room: usize,
}

/// The sequences of one worker and their pages.
#[derive(Debug)]
pub struct Scheduler {
    pool: PagePool,
    page_tokens: usize,
    token_budget: usize,
    max_sequences: usize,
    max_len: usize,
    max_waiting: usize,
    running: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeMap<SequenceId, Sequence>,
    /// Landings given out: each has a place in the batch.
    landings: usize,
    next_number: u64,
    /// Between `schedule` and `complete` the engine writes pages: what is given up meanwhile waits here.
    stepping: bool,
    after_step: Vec<Vec<PageId>>,
    /// The step that was begun and has not ended, and what was given up before it was all that is left to write.
    under_way: Option<Plan>,
    after_under_way: Vec<Vec<PageId>>,
    /// When the last step ended.
    last_end: Duration,
    /// Whether every step ends before the next is planned.
    in_step: bool,
    /// The memory of the last step's plan and rows, for the next.
    spare_plan: Plan,
    spare_rows: Vec<Row<'static>>,
}

impl Scheduler {
    /// Makes a scheduler over an empty pool.
    ///
    /// # Errors
    /// [`Error::Setting`] when the limits allow no step at all.
    pub fn new(limits: Limits) -> Result<Self, Error> {
        let Limits { pages, page_tokens, token_budget, max_sequences, max_model_len, max_waiting } = limits;
        let setting = |field, problem| Err(Error::Setting { field, problem });
        if token_budget <= page_tokens {
            return setting("token_budget", format!("{token_budget} must exceed a page of {page_tokens} tokens"));
        }
        if max_sequences == 0 {
            return setting("max_sequences", "0 sequences make no batch".into());
        }
        if pages == 0 {
            return setting("kv_bytes", "too small for a single page".into());
        }
        Ok(Self {
            pool: PagePool::new(pages),
            page_tokens,
            token_budget,
            max_sequences: max_sequences.min(token_budget - page_tokens),
            max_len: max_model_len.min(pages * page_tokens),
            max_waiting,
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            landings: 0,
            next_number: 0,
            stepping: false,
            after_step: Vec::new(),
            under_way: None,
            after_under_way: Vec::new(),
            last_end: Duration::ZERO,
            in_step: false,
            spare_plan: Plan::default(),
            spare_rows: Vec::new(),
        })
    }

    /// Takes a fresh sequence into the line. `now` is the time since a moment of the caller's choice, here and everywhere.
    pub fn submit(&mut self, request: Request, now: Duration) -> Result<SequenceId, Refusal> {
        let tokens = request.history.len();
        assert!((1..=tokens).contains(&request.prompt_tokens), "callers check that the prompt is part of the tokens");
        if tokens >= self.max_len {
            return Err(Refusal::TooLong { tokens, max_len: self.max_len });
        }
        if self.waiting.len() >= self.max_waiting {
            return Err(Refusal::Full { waiting: self.waiting.len() });
        }
        let id = self.ticket(request.priority);
        let expected = self.expected_tokens(&request);
        self.waiting.insert(id, Sequence::new(request, now, expected));
        Ok(id)
    }

    /// Decides what the next step computes. While one is under way that may be nothing though there is something to do: then it is to end first.
    ///
    /// # Panics
    /// When the plan before is neither completed nor abandoned, nor under way.
    pub fn schedule(&mut self, now: Duration) -> Plan {
        assert!(!self.stepping, "one step at a time");
        let mut plan = std::mem::take(&mut self.spare_plan);
        plan.began = now;
        if self.under_way.is_some() && !self.has_pages_to_go_ahead() {
            return plan;
        }
        self.plan_single_tokens(&mut plan, now);
        self.plan_drafts(&mut plan);
        self.plan_prompts(&mut plan, now);
        self.stepping = !plan.is_empty();
        plan
    }

    /// Returns the rows of `plan` as the engine takes them.
    pub fn rows<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = Row<'a>> {
        plan.chunks.iter().map(|chunk| self.running[&chunk.id].row(chunk))
    }

    /// Takes what the engine made of the rows of `plan` out of `yields`, and names the pages that are full now. What was cancelled meanwhile is ignored.
    pub fn complete(&mut self, plan: Plan, yields: &mut [Yield], now: Duration) -> Computed {
        let asked = plan.chunks.iter().map(|chunk| chunk.sample);
        assert!(yields.iter().map(Yield::is_answer).eq(asked), "tokens are drawn exactly where they were asked for");
        self.take(plan, yields, now)
    }

    /// Does so where rows may have no answer: those whose next token the engine could not tell by itself, and those that follow them.
    fn take(&mut self, plan: Plan, yields: &mut [Yield], now: Duration) -> Computed {
        assert_eq!(plan.chunks.len(), yields.len(), "a step answers every row");
        let stepped = Some(self.stepped(&plan, now));
        let mut computed = Computed { drawn: Vec::with_capacity(plan.chunks.len()), stepped, ..Computed::default() };
        for (chunk, made) in plan.chunks.iter().zip(yields) {
            // Of one that followed a token which is not there, nothing holds.
            let Some(sequence) = self.running.get_mut(&chunk.id).filter(|sequence| sequence.computed == chunk.start)
            else {
                continue;
            };
            if chunk.sample && !made.is_answer() {
                sequence.fall_back();
                continue;
            }
            let (sampled, stuck) = (&mut made.sampled, made.stuck.take());
            assert!(sampled.len() <= 1 + chunk.drafts, "one token, and one for each draft that was right");
            if chunk.drafts > 0 && !sampled.is_empty() {
                let (id, drafts, accepted) = (chunk.id, chunk.drafts, sampled.len() - 1);
                computed.verified.push(Verified { id, drafts, accepted });
            }
            computed.reported.extend(sequence.report(chunk, std::mem::take(&mut made.prompt_logprobs)));
            sequence.advance(chunk.tokens - chunk.drafts, self.page_tokens, &mut self.pool);
            if let Some(vector) = sequence.pool_states(chunk, &std::mem::take(&mut made.hidden), now) {
                let sequence = self.running.remove(&chunk.id).expect("it was found just above");
                let ended = self.close(sequence, now);
                computed.embedded.push(Embedded { id: chunk.id, vector, ended });
                continue;
            }
            for (right, sampled) in sampled.drain(..).enumerate() {
                if right > 0 {
                    // The token before this one was a draft, so it is computed.
                    sequence.advance(1, self.page_tokens, &mut self.pool);
                }
                let (index, finish) = sequence.append(sampled.token, self.max_len, now);
                let Some(finish) = finish else {
                    computed.drawn.push(Drawn { id: chunk.id, index, sampled, ended: None });
                    continue;
                };
                let sequence = self.running.remove(&chunk.id).expect("it was found just above");
                let ended = Some((finish, self.close(sequence, now)));
                computed.drawn.push(Drawn { id: chunk.id, index, sampled, ended });
                break;
            }
            if let Some(stuck) = stuck
                && let Some(sequence) = self.running.remove(&chunk.id)
            {
                let (id, ended) = (chunk.id, self.close(sequence, now));
                let hopeless = matches!(stuck, Stuck::Forbidden(_));
                computed.faults.push(Fault { id, error: stuck.to_string(), hopeless, ended });
            }
        }
        self.end_step(plan);
        computed
    }

    /// Returns the sequences of which the next step computes a single token, the last one known: those that drafts may follow.
    pub fn decoding(&self) -> impl Iterator<Item = Decoding<'_>> {
        let decodes = |sequence: &&Sequence| sequence.remaining() == 1 && sequence.grows() && sequence.ahead.is_none();
        self.running.iter().filter(move |(_, sequence)| decodes(sequence)).map(|(&id, sequence)| Decoding {
            id,
            sample: sequence.sample(sequence.request.history.tokens()),
            room: sequence.room(self.max_len),
        })
    }

    /// Adds guesses at the next tokens of a sequence, in place of earlier ones. As many of them as have room are verified by the
    /// next step; what they are changes the number of tokens that it draws and never which.
    pub fn guess(&mut self, id: SequenceId, drafts: &[TokenId]) {
        if let Some(sequence) = self.running.get_mut(&id).filter(|sequence| sequence.ahead.is_none()) {
            sequence.guess(drafts, self.max_len);
        }
    }

    /// Says whether sequences are given guesses. While they are, no step is left under way: guesses take the tokens before them.
    pub fn set_guessing(&mut self, guessing: bool) {
        self.in_step = guessing;
    }

    /// Says whether a step was begun that [`Scheduler::compute`] has yet to end.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Says whether there is such a sequence (still).
    pub fn contains(&self, id: SequenceId) -> bool {
        self.running.contains_key(&id) || self.waiting.contains_key(&id)
    }

    /// Takes back a plan whose step computed nothing.
    pub fn abandon(&mut self, plan: Plan) {
        match self.under_way {
            Some(_) => (self.stepping, self.spare_plan) = (false, plan.cleared()),
            None => self.end_step(plan),
        }
    }

    /// Returns the pages of a sequence, all that its known tokens need; none while it waits.
    pub fn pages_of(&self, id: SequenceId) -> &[PageId] {
        self.running.get(&id).map_or(&[], |sequence| &sequence.pages)
    }

    /// Returns what a sequence has taken so far, and how many tokens of it are known.
    pub fn usage_of(&self, id: SequenceId, now: Duration) -> Option<(Usage, usize)> {
        let sequence = self.running.get(&id).or_else(|| self.waiting.get(&id))?;
        Some((sequence.usage(now), sequence.request.history.len()))
    }

    /// Returns the pages.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Forgets all prefixes, unless somebody holds a page; says whether it did.
    pub fn forget_prefixes(&mut self) -> bool {
        let nobody = self.pool.stats().held() == 0;
        if nobody {
            self.pool.clear_cached();
        }
        nobody
    }

    /// Takes the change of reusable prefixes since the last call.
    pub fn take_delta(&mut self) -> CacheDelta {
        self.pool.take_delta()
    }

    /// Returns how much there is to do.
    pub fn backlog(&self) -> Backlog {
        let (mut tokens, mut prompts) = (0, Work::default());
        for sequence in self.running.values().chain(self.waiting.values()) {
            tokens += sequence.remaining();
            sequence.add_backlog(&mut prompts);
        }
        let deferred = self.waiting.values().filter(|sequence| sequence.awaiting).count();
        Backlog { running: self.running.len(), waiting: self.waiting.len(), deferred, tokens, prompts }
    }

    /// Returns the longest sequence, prompt and output together.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Returns the tokens in a page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Returns the most sequences in one step.
    pub fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    /// Gives each running sequence that lacks a single token its turn.
    fn plan_single_tokens(&mut self, plan: &mut Plan, now: Duration) {
        self.grow_all(plan);
        for (&id, sequence) in &mut self.running {
            if sequence.is_single(self.max_len) {
                if sequence.start(now) {
                    plan.started.push(id);
                }
                plan.push(sequence.single(id));
            }
        }
    }

    /// Says whether all sequences of a single token can have a page for it without taking one from somebody.
    fn has_pages_to_go_ahead(&self) -> bool {
        let singles = self.running.values().filter(|sequence| sequence.is_single(self.max_len));
        singles.map(Sequence::pages_missing).sum::<usize>() <= self.pool.stats().available()
    }

    /// Lets the drafts of those sequences ride along, first come first served.
    fn plan_drafts(&mut self, plan: &mut Plan) {
        let mut spare = self.pool.stats().available().saturating_sub(self.headroom());
        let mut budget = (self.token_budget - self.page_tokens).saturating_sub(plan.tokens);
        for chunk in plan.chunks.iter_mut().filter(|chunk| chunk.follows.is_none()) {
            let sequence = self.running.get_mut(&chunk.id).expect("what is planned runs");
            let known = sequence.request.history.len();
            let wanted = sequence.request.history.drafts().min(budget);
            let missing = sequence.request.history.pages_for(known + wanted).saturating_sub(sequence.pages.len());
            if missing > 0 && missing <= spare {
                spare -= missing;
                sequence.pages.extend(self.pool.allocate(missing).expect("pages were counted just above"));
            }
            let drafts = wanted.min(sequence.pages.len() * self.page_tokens - known);
            budget -= drafts;
            plan.tokens += drafts;
            (chunk.tokens, chunk.drafts) = (1 + drafts, drafts);
        }
    }

    /// Makes sure that all sequences that lack a single token have a page for it, taking pages from the end of the batch where
    /// there are none left.
    fn grow_all(&mut self, plan: &mut Plan) {
        let single = |sequence: &Sequence| sequence.is_single(self.max_len) && sequence.pages_missing() > 0;
        let growing: Vec<SequenceId> =
            self.running.iter().filter(|(_, sequence)| single(sequence)).map(|(id, _)| *id).collect();
        for id in growing {
            while let Some(sequence) = self.running.get_mut(&id) {
                if let Some(pages) = self.pool.allocate(sequence.pages_missing()) {
                    sequence.pages.extend(pages);
                    break;
                }
                self.preempt_last(plan);
            }
        }
    }

    /// Sends the last sequence of the batch back to the line.
    fn preempt_last(&mut self, plan: &mut Plan) {
        let last = self.running.iter().rev().find(|(_, sequence)| sequence.grows());
        let id = *last.expect("a sequence that asks for pages grows").0;
        let mut sequence = self.running.remove(&id).expect("it was found just above");
        sequence.preempt(&mut self.pool);
        self.waiting.insert(id, sequence);
        plan.preempted.push(id);
    }

    /// Gives the rest of the budget to prompts, those of the batch and those of the line, in the order of their ids: who is more
    /// urgent passes a long prompt that is under way.
    fn plan_prompts(&mut self, plan: &mut Plan, now: Duration) {
        let prompts = self.running.iter().filter(|(_, sequence)| sequence.remaining() > 1);
        let prompts: Vec<SequenceId> = prompts.map(|(id, _)| *id).collect();
        for id in prompts {
            self.admit(plan, Some(id), now);
            let sequence = &self.running[&id];
            let (start, remaining) = (sequence.computed, sequence.remaining());
            let tokens = self.chunk(start, remaining, plan);
            if tokens > 0 {
                let sample = sequence.draws() && tokens == remaining;
                plan.push(Chunk { id, start, tokens, drafts: 0, sample, follows: None });
            }
        }
        self.admit(plan, None, now);
    }

    /// Returns how much of `remaining` tokens from `start` on the rest of the budget allows: all, or up to the end of a page.
    fn chunk(&self, start: usize, remaining: usize, plan: &Plan) -> usize {
        let budget = self.token_budget - plan.tokens;
        if remaining <= budget {
            return remaining;
        }
        let end = (start + budget) / self.page_tokens * self.page_tokens;
        end.saturating_sub(start)
    }

    /// Admits from the head of the line, as far as it is `before` somebody, while there is budget, a place and pages. The head is
    /// never passed: whoever is first and large would otherwise wait for ever. Nobody is admitted in a step that took pages away.
    fn admit(&mut self, plan: &mut Plan, before: Option<SequenceId>, now: Duration) {
        while plan.tokens < self.token_budget
            && plan.preempted.is_empty()
            && self.occupied() < self.max_sequences
            && let Some((&id, _)) = self.head()
            && before.is_none_or(|before| id < before)
        {
            let mut sequence = self.waiting.remove(&id).expect("it is the head of the line");
            let history = &sequence.request.history;
            let (known, needed) = (history.len(), history.pages_for(history.len()));
            let mut pages = self.pool.reuse(sequence.reusable());
            let cached = pages.len();
            let start = cached * self.page_tokens;
            let tokens = self.chunk(start, known - start, plan);
            let enough = self.pool.stats().available() >= needed - cached + self.headroom();
            if tokens == 0 || !enough {
                self.pool.release(&pages);
                self.waiting.insert(id, sequence);
                return;
            }
            pages.extend(self.pool.allocate(needed - cached).expect("pages were counted just above"));
            if sequence.admit(pages, cached, self.page_tokens, now) {
                plan.started.push(id);
            }
            let sample = sequence.draws() && start + tokens == known;
            plan.push(Chunk { id, start, tokens, drafts: 0, sample, follows: None });
            self.running.insert(id, sequence);
        }
    }

    /// Returns who is first in the line, but for those whose prefix is on its way.
    fn head(&self) -> Option<(&SequenceId, &Sequence)> {
        self.waiting.iter().find(|(_, sequence)| !sequence.awaiting)
    }

    /// Returns how many places of the batch are taken.
    fn occupied(&self) -> usize {
        self.running.len() + self.landings
    }

    /// Returns how many tokens of a fresh sequence need no computing: they are cached, or will be when its turn comes.
    fn expected_tokens(&self, request: &Request) -> usize {
        if request.prompt_logprobs.is_some() {
            return 0;
        }
        let others = self.running.values().chain(self.waiting.values());
        let shared = others.map(|sequence| sequence.request.history.common_pages(&request.history)).max();
        self.pool.matching(request.history.reusable()).max(shared.unwrap_or(0)) * self.page_tokens
    }

    /// Returns the pages that an admission leaves over: one for each sequence that may soon need one.
    fn headroom(&self) -> usize {
        self.landings + self.running.values().filter(|sequence| sequence.grows()).count()
    }

    fn close(&mut self, sequence: Sequence, now: Duration) -> Ended {
        let usage = sequence.usage(now);
        let keep = sequence.request.until == Until::FirstToken && !sequence.pages.is_empty();
        let hold = Hold { pages: sequence.pages };
        if keep {
            return Ended { usage, hold: Some(hold) };
        }
        self.give_back(hold);
        Ended { usage, hold: None }
    }

    /// Gives back what no step writes any more. What was given up while the step under way was there already waits for that one, too.
    fn end_step(&mut self, plan: Plan) {
        self.stepping = false;
        self.after_under_way.drain(..).for_each(|pages| self.pool.release(&pages));
        std::mem::swap(&mut self.after_step, &mut self.after_under_way);
        if self.under_way.is_none() {
            self.after_under_way.drain(..).for_each(|pages| self.pool.release(&pages));
        }
        self.spare_plan = plan.cleared();
    }
}
