//! Room for sequences whose pages come from another worker.
//!
//! A landing gets its pages and its place in the batch together, so what has landed runs at the next step. The rule of
//! admission: besides the pages it needs, one page stays available for every sequence that is running or landing, because each
//! may grow by one while this one is under way; and whoever stands in the line before it has their pages and their
//! place set aside, so that a stream of landings cannot starve them.

use super::{Ended, Hold, Request, Scheduler, Sequence, SequenceId};
use kv_cache::{PageHash, PageId, TokenId};
use std::time::Duration;

/// Pages and a place in the batch, promised to a sequence on its way. End it with [`Scheduler::land`] or [`Scheduler::forgo`].
#[derive(Debug)]
#[must_use = "a landing must end in land or forgo"]
pub struct Landing {
    id: SequenceId,
    hold: Hold,
    have: usize,
}

impl Landing {
    /// Returns the pages, in sequence order.
    pub fn pages(&self) -> &[PageId] {
        &self.hold.pages
    }

    /// Returns how many leading pages hold the sequence's prefix already. They may be shared and must not be written.
    pub fn have(&self) -> usize {
        self.have
    }
}

/// Pages for a prefix on its way from a peer. End it with [`Scheduler::keep_prefix`], or give its [`Hold`] back when nobody can write
/// there any more.
#[derive(Debug)]
#[must_use = "a prefix must be kept or given back"]
pub struct Prefix {
    hold: Hold,
    have: usize,
}

impl Prefix {
    /// Returns the pages, in sequence order.
    pub fn pages(&self) -> &[PageId] {
        &self.hold.pages
    }

    /// Returns how many leading pages were here already. They may be shared and must not be written.
    pub fn have(&self) -> usize {
        self.have
    }

    /// Gives the prefix up.
    pub fn forgo(self) -> Hold {
        self.hold
    }
}

/// Why there is no landing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// Sequences must end first.
    Now,
    /// It is longer than anything this worker can hold.
    Ever,
}

impl Scheduler {
    /// Draws a place in the line for a sequence that will land.
    pub fn ticket(&mut self, priority: i32) -> SequenceId {
        self.next_number += 1;
        SequenceId { priority, number: self.next_number }
    }

    /// Takes pages for all `tokens` tokens of a sequence whose full pages are named `hashes`, and a place in the batch.
    ///
    /// # Errors
    /// [`NoRoom::Now`] is worth another try when a sequence has ended.
    pub fn reserve(&mut self, id: SequenceId, hashes: &[PageHash], tokens: usize) -> Result<Landing, NoRoom> {
        if tokens >= self.max_len {
            return Err(NoRoom::Ever);
        }
        let line = self.head().filter(|(head, _)| **head < id);
        let (line_places, line_pages) = line.map_or((0, 0), |(_, sequence)| (1, sequence.pages_missing()));
        if self.occupied() + line_places >= self.max_sequences {
            return Err(NoRoom::Now);
        }
        let reused = self.pool.reuse(hashes);
        let missing = tokens.div_ceil(self.page_tokens) - reused.len();
        if self.pool.stats().available() < missing + self.headroom() + line_pages {
            self.pool.release(&reused);
            return Err(NoRoom::Now);
        }
        let have = reused.len();
        let mut pages = reused;
        pages.extend(self.pool.allocate(missing).expect("pages were counted just above"));
        self.landings += 1;
        Ok(Landing { id, hold: Hold { pages }, have })
    }

    /// Puts a landed sequence into the batch: all of `request.history` is computed in the landing's pages, and `first_token`
    /// follows it. `arrived` is when the request came.
    pub fn land(
        &mut self,
        landing: Landing,
        mut request: Request,
        first_token: TokenId,
        arrived: Duration,
    ) -> SequenceId {
        let tokens = request.history.len();
        assert_eq!(landing.hold.pages.len(), request.history.pages_for(tokens), "a landing is as long as its sequence");
        request.priority = landing.id.priority;
        let mut sequence = Sequence::new(request, arrived, 0);
        sequence.land(landing.hold.pages, landing.have, self.page_tokens, &mut self.pool);
        sequence.know(first_token);
        self.landings -= 1;
        self.running.insert(landing.id, sequence);
        landing.id
    }

    /// Gives up a landing. Its place is free at once; its pages are the caller's until nobody can write them any more.
    pub fn forgo(&mut self, landing: Landing) -> Hold {
        self.landings -= 1;
        landing.hold
    }

    /// Gives back the pages of a sequence that is over.
    pub fn give_back(&mut self, hold: Hold) {
        if self.stepping || self.under_way.is_some() {
            self.after_step.push(hold.pages);
        } else {
            self.pool.release(&hold.pages);
        }
    }

    /// Passes a waiting sequence over, until [`Scheduler::settle_prefix`]: its first `pages` pages are on their way from a peer.
    pub fn await_prefix(&mut self, id: SequenceId, pages: usize) {
        let tokens = pages * self.page_tokens;
        if let Some(sequence) = self.waiting.get_mut(&id) {
            sequence.awaiting = true;
            sequence.expect(tokens);
        }
    }

    /// The prefix of a waiting sequence has come, `fetched` tokens of it from a peer, or will not come.
    pub fn settle_prefix(&mut self, id: SequenceId, fetched: usize) {
        let Some(sequence) = self.waiting.get_mut(&id) else { return };
        (sequence.awaiting, sequence.fetched) = (false, fetched);
        let here = self.pool.matching(sequence.reusable()) * self.page_tokens;
        sequence.expect(here);
    }

    /// Holds the pages of a prefix for somebody who reads them.
    pub fn lend(&mut self, hashes: &[PageHash]) -> Hold {
        Hold { pages: self.pool.reuse(hashes) }
    }

    /// Takes pages for a prefix that a peer will send: `hashes` names its full pages. `None` where there are too few, which
    /// is no reason to wait: the prompt can be computed.
    pub fn reserve_prefix(&mut self, hashes: &[PageHash]) -> Option<Prefix> {
        let mut pages = self.pool.reuse(hashes);
        let have = pages.len();
        let missing = hashes.len() - have;
        if self.pool.stats().available() < missing + self.headroom() {
            self.pool.release(&pages);
            return None;
        }
        pages.extend(self.pool.allocate(missing).expect("pages were counted just above"));
        Some(Prefix { hold: Hold { pages }, have })
    }

    /// Makes a prefix that has come reusable: its bytes are those that `hashes` names. Sequences that are admitted from now on find it.
    pub fn keep_prefix(&mut self, prefix: Prefix, hashes: &[PageHash]) {
        assert_eq!(prefix.hold.pages.len(), hashes.len(), "a prefix is as long as its names");
        for (&page, &hash) in prefix.hold.pages.iter().zip(hashes).skip(prefix.have) {
            self.pool.name(page, hash);
        }
        self.give_back(prefix.hold);
    }

    /// Takes a sequence out, wherever it is and also in the middle of a step, whose result for it is then ignored.
    /// `None` when there is no such sequence (any more).
    pub fn cancel(&mut self, id: SequenceId, now: Duration) -> Option<Ended> {
        let sequence = self.running.remove(&id).or_else(|| self.waiting.remove(&id))?;
        Some(self.close(sequence, now))
    }
}
