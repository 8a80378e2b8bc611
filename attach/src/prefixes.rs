//! Prefixes that come from peers, and prefixes lent to them.
//!
//! A router may send a prompt to a worker that lacks its prefix, and say who has it. The sequence takes its place in the line at once and is
//! passed over until the prefix is there, or is known not to come: then it is computed as any other. Whoever is asked hands over what
//! it has, through an ordinary hand-off. Where any of it fails, nothing is lost but time, unless the router wants the prefix or nothing.
//!
//! Prompts that peers were told of are [`kept`](crate::kept) for them.

use crate::{Borrowing, Keep, Parts, kept::Kept};
use engine::{
    Engine,
    scheduler::{Hold, Prefix, Scheduler, SequenceId},
};
use kv_cache::PageHash;
use kv_transfer::{Begin, Commit, Event, HandoffId, Outcome, Peer, Transfer};
use metrics::{Counter, Gauge, counter, gauge};
use std::{collections::HashMap, time::Instant};

/// The prefixes of one worker that are under way.
pub struct Prefixes {
    wanted: HashMap<HandoffId, Wanted>,
    /// Pages of prefixes that will not come, and that may still be written.
    quarantine: HashMap<HandoffId, Hold>,
    /// Pages that peers read, and the name of the last one.
    lent: HashMap<HandoffId, (Hold, PageHash)>,
    kept: Kept,
    /// Sequences that were to have their prefix or nothing, and why they do not have it.
    deprived: Vec<(SequenceId, String)>,
    /// Tokens asked for, and those that came, under the names that vLLM gives what comes from elsewhere.
    queries: Counter,
    hits: Counter,
    /// Sequences whose prefix has not begun to come, and those whose prefix is coming.
    stages: [Gauge; 2],
}

#[derive(Debug)]
struct Wanted {
    sequence: SequenceId,
    pages: Vec<PageHash>,
    /// Whether the sequence is not to be computed without it.
    required: bool,
    /// Where they land, once the peer has begun.
    prefix: Option<Prefix>,
}

impl std::fmt::Debug for Prefixes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prefixes")
            .field("wanted", &self.wanted)
            .field("quarantine", &self.quarantine)
            .field("lent", &self.lent)
            .field("kept", &self.kept)
            .finish_non_exhaustive()
    }
}

impl Prefixes {
    /// Starts with none.
    pub fn new(parts: &Parts) -> Self {
        let labels = [("model_name", parts.model_name.clone()), ("engine", parts.worker.clone())];
        let stages = ["waiting_to_start", "in_progress"].map(|stage| {
            let staged = [&labels[..], &[("stage", stage.to_owned())]].concat();
            gauge!("vllm:num_requests_kv_fetch_by_stage", &staged)
        });
        Self {
            wanted: HashMap::new(),
            quarantine: HashMap::new(),
            lent: HashMap::new(),
            kept: Kept::new(&parts.worker),
            deprived: Vec::new(),
            queries: counter!("vllm:external_prefix_cache_queries_total", &labels),
            hits: counter!("vllm:external_prefix_cache_hits_total", &labels),
            stages,
        }
    }

    /// Asks a peer for the prefix of a sequence that waits. One whose pages are here already asks nobody.
    pub fn fetch(&mut self, from: Borrowing, sequence: SequenceId, scheduler: &mut Scheduler, transfer: &Transfer) {
        let Borrowing { fetch, required } = from;
        let used = self.wanted.contains_key(&fetch.handoff) || self.quarantine.contains_key(&fetch.handoff);
        let here = scheduler.pool().matching(&fetch.pages);
        if used || here >= fetch.pages.len() {
            return;
        }
        self.queries.increment(((fetch.pages.len() - here) * scheduler.page_tokens()) as u64);
        scheduler.await_prefix(sequence, fetch.pages.len());
        let wanted = Wanted { sequence, pages: fetch.pages.clone(), required, prefix: None };
        self.wanted.insert(fetch.handoff, wanted);
        transfer.fetch(fetch);
        self.count();
    }

    /// Shows how many are under way.
    fn count(&self) {
        let coming = self.wanted.values().filter(|wanted| wanted.prefix.is_some()).count();
        self.stages[0].set((self.wanted.len() - coming) as f64);
        self.stages[1].set(coming as f64);
    }

    /// Takes in what a link reports. Returns what is no concern of prefixes.
    pub fn take(
        &mut self,
        event: Event,
        engine: &Engine,
        scheduler: &mut Scheduler,
        transfer: &Transfer,
    ) -> Option<Event> {
        match event {
            Event::Asked { handoff, by, pages } => self.lend(handoff, by, &pages, engine, scheduler, transfer),
            Event::Begun { handoff, .. } if self.wanted.contains_key(&handoff) => {
                self.begun(handoff, scheduler, transfer);
            }
            Event::Landed { handoff, .. } if self.wanted.contains_key(&handoff) => {
                let Wanted { sequence, pages, prefix, .. } = self.wanted.remove(&handoff)?;
                let mut fetched = 0;
                if let Some(prefix) = prefix {
                    fetched = (pages.len() - prefix.have()) * scheduler.page_tokens();
                    self.hits.increment(fetched as u64);
                    scheduler.keep_prefix(prefix, &pages);
                }
                scheduler.settle_prefix(sequence, fetched);
            }
            Event::Lost { handoff, ref reason } if self.wanted.contains_key(&handoff) => {
                tracing::debug!(handoff = handoff.0, reason, "a prefix does not come");
                let wanted = self.give_up(handoff)?;
                self.settle(&wanted, reason, scheduler);
            }
            Event::Quiet { handoff } if self.quarantine.contains_key(&handoff) => {
                scheduler.give_back(self.quarantine.remove(&handoff)?);
            }
            Event::Landed { handoff, .. } if self.quarantine.contains_key(&handoff) => {
                // It was given up while the news was on its way. Nobody writes there any more.
                scheduler.give_back(self.quarantine.remove(&handoff)?);
            }
            Event::SourceDone { handoff, ref outcome } if self.lent.contains_key(&handoff) => {
                let (hold, last) = self.lent.remove(&handoff)?;
                scheduler.give_back(hold);
                if *outcome == Outcome::Landed {
                    self.kept.fetched(last, scheduler);
                }
            }
            other => return Some(other),
        }
        self.count();
        None
    }

    /// Returns the sequences that must not go on, for their prefix does not come, and why.
    pub fn deprived(&mut self) -> Vec<(SequenceId, String)> {
        std::mem::take(&mut self.deprived)
    }

    /// Notes what is to be kept of a sequence for peers when it has ended.
    pub fn announce(&mut self, sequence: SequenceId, keep: Keep) {
        self.kept.announce(sequence, keep);
    }

    /// A sequence has come to its end.
    pub fn ended(&mut self, sequence: SequenceId, scheduler: &mut Scheduler) {
        self.kept.keep(Instant::now(), sequence, scheduler);
    }

    /// Lets go of what was kept long enough.
    pub fn expire(&mut self, scheduler: &mut Scheduler) {
        self.kept.expire(Instant::now(), scheduler);
    }

    /// Returns when [`Prefixes::expire`] should be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.kept.next_deadline()
    }

    /// Calls off what was asked for a sequence that came to nothing, and keeps nothing of it.
    pub fn cancel(&mut self, sequence: SequenceId, transfer: &Transfer) {
        self.kept.forget(sequence);
        let waits = self.wanted.iter().find(|(_, wanted)| wanted.sequence == sequence);
        if let Some((&handoff, _)) = waits {
            self.give_up(handoff);
            self.count();
            transfer.abort(handoff, "the leg ended before its prefix came".into());
        }
    }

    /// Sends a prefix to a peer, if all of it is here.
    fn lend(
        &mut self,
        handoff: HandoffId,
        by: Peer,
        pages: &[PageHash],
        engine: &Engine,
        scheduler: &mut Scheduler,
        transfer: &Transfer,
    ) {
        let here = scheduler.pool().matching(pages);
        if here < pages.len() || pages.is_empty() || self.lent.contains_key(&handoff) {
            return transfer.refuse(handoff, format!("{here} of {} pages are here", pages.len()));
        }
        let hold = scheduler.lend(pages);
        let tokens = (pages.len() * scheduler.page_tokens()) as u32;
        let (count, layers) = (pages.len() as u32, engine.memory().layout().layers);
        transfer.begin(Begin { handoff, targets: vec![by], tokens, pages: hold.pages().to_vec() });
        transfer.push(handoff, 0..layers, 0..count);
        transfer.commit(handoff, Commit { first_token: 0 });
        self.lent.insert(handoff, (hold, pages[pages.len() - 1]));
    }

    fn begun(&mut self, handoff: HandoffId, scheduler: &mut Scheduler, transfer: &Transfer) {
        let wanted = self.wanted.get_mut(&handoff).expect("callers looked it up");
        match scheduler.reserve_prefix(&wanted.pages) {
            Some(prefix) => {
                transfer.open(handoff, prefix.pages().to_vec(), prefix.have() as u32);
                wanted.prefix = Some(prefix);
            }
            None => {
                let reason = "no pages are free for the prefix";
                transfer.refuse(handoff, reason.into());
                let wanted = self.wanted.remove(&handoff).expect("it was looked up above");
                self.settle(&wanted, reason, scheduler);
            }
        }
    }

    /// Forgets what was asked for; its pages are kept until nobody can write there.
    fn give_up(&mut self, handoff: HandoffId) -> Option<Wanted> {
        let mut wanted = self.wanted.remove(&handoff)?;
        if let Some(prefix) = wanted.prefix.take() {
            self.quarantine.insert(handoff, prefix.forgo());
        }
        Some(wanted)
    }

    /// Goes on without the prefix, or not at all.
    fn settle(&mut self, wanted: &Wanted, reason: &str, scheduler: &mut Scheduler) {
        if wanted.required {
            self.deprived.push((wanted.sequence, format!("its pages could not be fetched: {reason}")));
        } else {
            scheduler.settle_prefix(wanted.sequence, 0);
        }
    }
}
