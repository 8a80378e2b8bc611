//! Prefixes that come from peers, and prefixes lent to them.
//!
//! A router may send a prompt to a worker that lacks its prefix, and say who has it. The sequence takes its place in the line at once and is
//! passed over until the prefix is there, or is known not to come: then it is computed as any other. Whoever is asked hands over what
//! it has, through an ordinary hand-off. Where any of it fails, nothing is lost but time.

use engine::scheduler::{Hold, Prefix, Scheduler, SequenceId};
use kv_cache::PageHash;
use kv_transfer::{Begin, Commit, Event, Fetch, HandoffId, Peer, Transfer};
use std::collections::HashMap;

/// The prefixes of one worker that are under way.
#[derive(Debug, Default)]
pub struct Prefixes {
    wanted: HashMap<HandoffId, Wanted>,
    /// Pages of prefixes that will not come, and that may still be written.
    quarantine: HashMap<HandoffId, Hold>,
    /// Pages that peers read.
    lent: HashMap<HandoffId, Hold>,
}

#[derive(Debug)]
struct Wanted {
    sequence: SequenceId,
    pages: Vec<PageHash>,
    /// Where they land, once the peer has begun.
    prefix: Option<Prefix>,
}

impl Prefixes {
    /// Asks a peer for the prefix of a sequence that waits. One whose pages are here already asks nobody.
    pub fn fetch(&mut self, fetch: Fetch, sequence: SequenceId, scheduler: &mut Scheduler, transfer: &Transfer) {
        let used = self.wanted.contains_key(&fetch.handoff) || self.quarantine.contains_key(&fetch.handoff);
        if used || scheduler.pool().matching(&fetch.pages) >= fetch.pages.len() {
            return;
        }
        scheduler.await_prefix(sequence, fetch.pages.len());
        let wanted = Wanted { sequence, pages: fetch.pages.clone(), prefix: None };
        self.wanted.insert(fetch.handoff, wanted);
        transfer.fetch(fetch);
    }

    /// Takes in what a link reports. Returns what is no concern of prefixes.
    pub fn take(&mut self, event: Event, layers: u32, scheduler: &mut Scheduler, transfer: &Transfer) -> Option<Event> {
        match event {
            Event::Asked { handoff, by, pages } => self.lend(handoff, by, &pages, layers, scheduler, transfer),
            Event::Begun { handoff, .. } if self.wanted.contains_key(&handoff) => {
                self.begun(handoff, scheduler, transfer);
            }
            Event::Landed { handoff, .. } if self.wanted.contains_key(&handoff) => {
                let Wanted { sequence, pages, prefix } = self.wanted.remove(&handoff)?;
                if let Some(prefix) = prefix {
                    scheduler.keep_prefix(prefix, &pages);
                }
                scheduler.settle_prefix(sequence);
            }
            Event::Lost { handoff, ref reason } if self.wanted.contains_key(&handoff) => {
                tracing::debug!(handoff = handoff.0, reason, "a prefix does not come and is computed");
                let sequence = self.give_up(handoff)?;
                scheduler.settle_prefix(sequence);
            }
            Event::Quiet { handoff } if self.quarantine.contains_key(&handoff) => {
                scheduler.give_back(self.quarantine.remove(&handoff)?);
            }
            Event::Landed { handoff, .. } if self.quarantine.contains_key(&handoff) => {
                // It was given up while the news was on its way. Nobody writes there any more.
                scheduler.give_back(self.quarantine.remove(&handoff)?);
            }
            Event::SourceDone { handoff, .. } if self.lent.contains_key(&handoff) => {
                scheduler.give_back(self.lent.remove(&handoff)?);
            }
            other => return Some(other),
        }
        None
    }

    /// Calls off what was asked for a sequence that is over.
    pub fn cancel(&mut self, sequence: SequenceId, transfer: &Transfer) {
        let waits = self.wanted.iter().find(|(_, wanted)| wanted.sequence == sequence);
        if let Some((&handoff, _)) = waits {
            self.give_up(handoff);
            transfer.abort(handoff, "the leg ended before its prefix came".into());
        }
    }

    /// Sends a prefix to a peer, if all of it is here.
    fn lend(
        &mut self,
        handoff: HandoffId,
        by: Peer,
        pages: &[PageHash],
        layers: u32,
        scheduler: &mut Scheduler,
        transfer: &Transfer,
    ) {
        let here = scheduler.pool().matching(pages);
        if here < pages.len() || pages.is_empty() || self.lent.contains_key(&handoff) {
            return transfer.refuse(handoff, format!("{here} of {} pages are here", pages.len()));
        }
        let hold = scheduler.lend(pages);
        let tokens = (pages.len() * scheduler.page_tokens()) as u32;
        let count = pages.len() as u32;
        transfer.begin(Begin { handoff, targets: vec![by], tokens, pages: hold.pages().to_vec() });
        transfer.push(handoff, 0..layers, 0..count);
        transfer.commit(handoff, Commit { first_token: 0 });
        self.lent.insert(handoff, hold);
    }

    fn begun(&mut self, handoff: HandoffId, scheduler: &mut Scheduler, transfer: &Transfer) {
        let wanted = self.wanted.get_mut(&handoff).expect("callers looked it up");
        match scheduler.reserve_prefix(&wanted.pages) {
            Some(prefix) => {
                transfer.open(handoff, prefix.pages().to_vec(), prefix.have() as u32);
                wanted.prefix = Some(prefix);
            }
            None => {
                transfer.refuse(handoff, "no pages are free for the prefix".into());
                let sequence = wanted.sequence;
                self.wanted.remove(&handoff);
                scheduler.settle_prefix(sequence);
            }
        }
    }

    /// Forgets what was asked for; its pages are kept until nobody can write there.
    fn give_up(&mut self, handoff: HandoffId) -> Option<SequenceId> {
        let Wanted { sequence, prefix, .. } = self.wanted.remove(&handoff)?;
        if let Some(prefix) = prefix {
            self.quarantine.insert(handoff, prefix.forgo());
        }
        Some(sequence)
    }
}
