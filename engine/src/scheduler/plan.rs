//! What one step computes.

use super::SequenceId;
use std::time::Duration;
use timing::Work;

/// A piece of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub id: SequenceId,
    /// Position of its first token. A multiple of the page size, except where a sequence takes one token at a time.
    pub start: usize,
    /// How many tokens, drafts included; at least one that is no draft.
    pub tokens: usize,
    /// How many of them are drafts.
    pub drafts: usize,
    /// Whether tokens are drawn at its end. A chunk that ends earlier ends with a full page.
    pub sample: bool,
    /// Present where its one token is not known yet: it is what this row of the step under way draws.
    pub follows: Option<usize>,
}

/// The chunks of one step, in the order of their rows. Hand it to [`super::Scheduler::complete`] or
/// [`super::Scheduler::abandon`]; until then no page it touches is given to anyone else.
#[derive(Debug, Default)]
#[must_use = "a plan must be completed or abandoned"]
pub struct Plan {
    pub(super) chunks: Vec<Chunk>,
    pub(super) started: Vec<SequenceId>,
    pub(super) preempted: Vec<SequenceId>,
    pub(super) tokens: usize,
    /// When it was begun to be made.
    pub(super) began: Duration,
}

impl Plan {
    /// Returns the chunks.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Returns the sequences that are part of a step for the first time.
    pub fn started(&self) -> &[SequenceId] {
        &self.started
    }

    /// Returns the sequences that lost their pages and went back to the line.
    pub fn preempted(&self) -> &[SequenceId] {
        &self.preempted
    }

    /// Returns the tokens it computes.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns how many of its tokens are drafts.
    pub fn draft_tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.drafts).sum()
    }

    /// Returns how many of its tokens are neither the single next token of a sequence nor drafts after it.
    pub fn prompt_tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.tokens - chunk.drafts).filter(|&tokens| tokens > 1).sum()
    }

    /// Returns how much there is to compute, drafts aside.
    pub fn work(&self) -> Work {
        let mut work = Work::default();
        for &Chunk { start, tokens, drafts, .. } in &self.chunks {
            if tokens - drafts == 1 { work.single(start) } else { work.chunk(start, tokens) }
        }
        work
    }

    /// Says whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Returns an empty plan in the memory of this one.
    pub(super) fn cleared(mut self) -> Self {
        self.chunks.clear();
        self.started.clear();
        self.preempted.clear();
        self.tokens = 0;
        self
    }

    pub(super) fn push(&mut self, chunk: Chunk) {
        self.tokens += chunk.tokens;
        self.chunks.push(chunk);
    }
}
