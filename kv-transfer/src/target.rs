//! The target's half of a hand-off: a pure state machine.
//!
//! ```text
//!        open            Commit and every block, verified         Sealed
//! Begun ──────► Landing ──────────────────────────────────► Sealing ──────► done: Landed
//!   │              │                                           │
//!   │              └── refused, called off, link lost, deadline ┘
//!   │                                ▼
//!   │                           Quarantine ── Sealed ──► done: Quiet
//!   └── refused, called off, link lost, deadline ──► done
//! ```
//!
//! | state      | who must act               | deadline passes                                             |
//! |------------|----------------------------|-------------------------------------------------------------|
//! | Begun      | this worker (open, refuse) | Abort, Lost                                                 |
//! | Landing    | the source                 | Abort, Lost, quarantine                                     |
//! | Sealing    | this side's transport      | as Landing                                                  |
//! | Quarantine | this side's transport      | the link is dropped; the pages stay until `Sealed` comes    |
//!
//! *Sealed* is the proof that no write can land in these pages any more. Where the target does the writing itself (tcp) or
//! admits each write (memory), closing the landing is that proof. A transport whose source writes by itself (shared memory,
//! RDMA) may say `Sealed` only once the source has vouched for it (`Quiet`, or `Commit`, which follows the last write, or a
//! [word](crate::words) of shared memory) or is provably gone. No state leaves quarantine because time passed. A source that has settled says nothing
//! after its `Commit`, so that counts whenever it comes: the word may be another leg's by then.

use crate::{
    Commit, Event, HandoffId,
    digest::Digest,
    message::{Message, Sent},
    plan::Terms,
    source::{Limits, fit},
};
use kv_cache::PageId;
use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

/// What happens to a target.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// The worker has a landing.
    Open { landing: Vec<PageId>, have: u32 },
    /// The worker will not take it.
    Refuse(String),
    /// The worker calls it off.
    Abort(String),
    /// All bytes of a frame are in the landing.
    FrameLanded { sequence: u32, bytes: u64, digest: Option<Digest> },
    /// The source says that all frames left, and whether it has settled.
    Committed { sent: Sent, commit: Commit, settled: bool },
    /// The source called it off.
    PeerAborted(String),
    /// The source has no more need of it.
    PeerForwent,
    /// The source vouches that none of its writes can land any more.
    PeerQuiet,
    /// No write can land any more.
    Sealed,
    /// The link is gone.
    LinkLost(String),
    /// Time passed.
    Tick,
}

/// What a target wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say this to the source.
    Send(Message),
    /// Let writes of these travel pages into these pages.
    Admit { landing: Arc<[PageId]>, travel: Range<u32> },
    /// Let no more writes in; answered by `Sealed` once that is certain. `vouched` when the source says so too.
    Seal { vouched: bool },
    /// Close the link: nothing else proves that writes have ended.
    DropLink(String),
    /// Tell the worker.
    Emit(Event),
    /// Over, and how.
    Done(End),
}

/// Why a hand-off was forgone, for people.
pub(crate) const FORGONE: &str = "the answer was complete with its first token";

/// How a hand-off ended here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum End {
    /// The sequence is runnable.
    Landed,
    /// The source had no more need of it.
    Forgone,
    /// This side would not take it.
    Refused,
    /// One side called it off, or the link died.
    Aborted,
    /// A deadline passed.
    Expired,
}

#[derive(Clone, Debug)]
enum State {
    Begun,
    Landing,
    Sealing(Commit),
    Quarantine(End),
    Done,
}

/// One hand-off, seen from the worker that will decode the sequence.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    handoff: HandoffId,
    terms: Arc<Terms>,
    limits: Limits,
    tokens: u32,
    /// Pages of the sequence here.
    pages: u32,
    have: u32,
    state: State,
    deadline: Duration,
    /// Bytes in the landing.
    landed: u64,
    /// By frame number.
    digests: BTreeMap<u32, Option<Digest>>,
    committed: Option<(Sent, Commit)>,
    /// The source waits for no answer to its commit.
    settled: bool,
}

impl Target {
    /// Starts at `now` with telling the worker that `from` asks for a landing.
    pub(crate) fn begun(
        now: Duration,
        (handoff, from, tokens): (HandoffId, String, u32),
        terms: Arc<Terms>,
        limits: Limits,
        out: &mut Vec<Action>,
    ) -> Self {
        let mut target = Self {
            handoff,
            limits,
            tokens,
            pages: terms.target.pool.pages_for(tokens as usize) as u32,
            have: 0,
            state: State::Begun,
            deadline: now + limits.open,
            landed: 0,
            digests: BTreeMap::new(),
            committed: None,
            settled: false,
            terms,
        };
        let pool = target.terms.target.pool.pages;
        if target.pages > pool {
            let reason = format!("{tokens} tokens need {} pages of {pool}", target.pages);
            out.push(Action::Send(Message::Refuse { handoff, reason }));
            target.done(End::Refused, out);
        } else {
            out.push(Action::Emit(Event::Begun { handoff, from, tokens }));
        }
        target
    }

    /// Returns when [`Input::Tick`] has something to say.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Says whether it is over.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Returns the pages that are neither the worker's nor reusable.
    pub(crate) fn quarantined_pages(&self) -> u32 {
        if matches!(self.state, State::Quarantine(_)) { self.pages - self.have } else { 0 }
    }

    /// Takes one input at `now` and appends what to do about it. Returns whether the input meant anything in this state.
    pub(crate) fn step(&mut self, now: Duration, input: Input, out: &mut Vec<Action>) -> bool {
        match input {
            Input::Open { landing, have } => return self.open(now, landing, have, out),
            Input::Refuse(reason) => self.refuse(reason, out),
            Input::Abort(reason) => self.abort(now, reason, out),
            Input::FrameLanded { sequence, bytes, digest } => self.frame_landed(now, sequence, bytes, digest, out),
            Input::Committed { sent, commit, settled } => {
                return self.source_committed(now, (sent, commit), settled, out);
            }
            Input::PeerAborted(reason) => return self.peer_ended(now, End::Aborted, reason, out),
            Input::PeerForwent => return self.peer_ended(now, End::Forgone, FORGONE.into(), out),
            Input::PeerQuiet => return self.peer_quiet(now, out),
            Input::Sealed => self.sealed(out),
            Input::LinkLost(reason) => self.lose(now, End::Aborted, reason, None, out),
            Input::Tick if now >= self.deadline => self.expire(now, out),
            Input::Tick => {}
        }
        true
    }

    /// Returns false when there is nothing to open any more; the caller then owes the worker a `Quiet`.
    fn open(&mut self, now: Duration, landing: Vec<PageId>, have: u32, out: &mut Vec<Action>) -> bool {
        let handoff = self.handoff;
        match self.state {
            State::Begun => {}
            State::Done => return false,
            // A second answer to the same question is a mistake of our worker; the first one stands.
            _ => return true,
        }
        if landing.len() != self.pages as usize || have > self.pages || !fit(&landing, &self.terms.target.pool) {
            let reason = format!("landing of {} pages, {have} there, does not fit {}", landing.len(), self.pages);
            out.push(Action::Send(Message::Refuse { handoff, reason: reason.clone() }));
            out.push(Action::Emit(Event::Lost { handoff, reason }));
            out.push(Action::Emit(Event::Quiet { handoff }));
            self.done(End::Refused, out);
            return true;
        }
        self.have = have;
        self.state = State::Landing;
        self.deadline = now + self.limits.progress;
        out.push(Action::Admit { landing: landing.as_slice().into(), travel: self.travel() });
        out.push(Action::Send(Message::Open { handoff, have, landing }));
        true
    }

    fn refuse(&mut self, reason: String, out: &mut Vec<Action>) {
        if matches!(self.state, State::Begun) {
            out.push(Action::Send(Message::Refuse { handoff: self.handoff, reason }));
            self.done(End::Refused, out);
        }
    }

    fn abort(&mut self, now: Duration, reason: String, out: &mut Vec<Action>) {
        let handoff = self.handoff;
        match self.state {
            State::Begun => {
                out.push(Action::Send(Message::Abort { handoff, reason }));
                self.done(End::Aborted, out);
            }
            State::Landing | State::Sealing(_) => {
                out.push(Action::Send(Message::Abort { handoff, reason }));
                self.quarantine(now, End::Aborted, out);
            }
            State::Quarantine(_) | State::Done => {}
        }
    }

    fn frame_landed(
        &mut self,
        now: Duration,
        sequence: u32,
        bytes: u64,
        digest: Option<Digest>,
        out: &mut Vec<Action>,
    ) {
        if matches!(self.state, State::Landing) {
            self.landed += bytes;
            self.digests.insert(sequence, digest);
            self.deadline = now + self.limits.progress;
            self.verify(now, out);
        }
    }

    fn source_committed(
        &mut self,
        now: Duration,
        committed: (Sent, Commit),
        settled: bool,
        out: &mut Vec<Action>,
    ) -> bool {
        if self.committed.is_some() {
            return false;
        }
        match self.state {
            State::Landing => {
                (self.committed, self.settled) = (Some(committed), settled);
                self.deadline = now + self.limits.progress;
                self.verify(now, out);
            }
            State::Quarantine(_) => out.push(Action::Seal { vouched: true }),
            State::Begun | State::Sealing(_) | State::Done => return false,
        }
        true
    }

    /// Compares what the source says it sent with what was asked for and what came. Waits while blocks are missing.
    fn verify(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some((sent, commit)) = self.committed.clone() else { return };
        let pages = self.travel().len() as u32;
        let block_bytes = self.terms.block_bytes() as u64;
        let bytes = u64::from(pages) * u64::from(self.terms.target.pool.layers) * block_bytes;
        let problem = if (sent.pages, sent.bytes) != (pages, bytes) {
            format!("{} pages of {} bytes were committed, {pages} of {bytes} asked for", sent.pages, sent.bytes)
        } else if self.landed < bytes {
            return;
        } else if self.digests.len() != sent.frames as usize {
            format!("{} frames were committed, {} landed", sent.frames, self.digests.len())
        } else {
            let landed = self.digests.values().copied().collect::<Option<Vec<_>>>().map(Digest::of_frames);
            if landed == sent.digest {
                self.state = State::Sealing(commit);
                return out.push(Action::Seal { vouched: true });
            }
            format!("digest of the contents: sent {:?}, landed {landed:?}", sent.digest)
        };
        let reason = format!("verification: {problem}");
        let refusal = Message::Refuse { handoff: self.handoff, reason: reason.clone() };
        self.lose(now, End::Refused, reason, Some(refusal), out);
    }

    /// The source ended it and has writes under way, perhaps. Returns whether that was of interest.
    fn peer_ended(&mut self, now: Duration, end: End, reason: String, out: &mut Vec<Action>) -> bool {
        let going = !matches!(self.state, State::Done);
        self.lose(now, end, reason, None, out);
        going
    }

    /// The source has ended it, and no write of its own can land any more. Returns whether that was of interest.
    fn peer_quiet(&mut self, now: Duration, out: &mut Vec<Action>) -> bool {
        let going = !matches!(self.state, State::Done);
        self.lose(now, End::Aborted, "the source ended it".into(), None, out);
        if matches!(self.state, State::Quarantine(_)) {
            out.push(Action::Seal { vouched: true });
        }
        going
    }

    /// Returns the travel pages that are to come.
    fn travel(&self) -> Range<u32> {
        let all = self.terms.travel_pages(self.tokens);
        self.terms.target.travel_of(0..self.have).end.min(all)..all
    }

    fn sealed(&mut self, out: &mut Vec<Action>) {
        let handoff = self.handoff;
        match &self.state {
            State::Sealing(commit) => {
                let landed = Event::Landed { handoff, commit: commit.clone() };
                if !self.settled {
                    out.push(Action::Send(Message::Ack { handoff }));
                }
                out.push(Action::Emit(landed));
                self.done(End::Landed, out);
            }
            State::Quarantine(end) => {
                let end = *end;
                out.push(Action::Emit(Event::Quiet { handoff }));
                self.done(end, out);
            }
            State::Begun | State::Landing | State::Done => {}
        }
    }

    fn expire(&mut self, now: Duration, out: &mut Vec<Action>) {
        let reason = match self.state {
            State::Begun => format!("no answer within {:?}", self.limits.open),
            State::Landing | State::Sealing(_) => format!("no progress for {:?}", self.limits.progress),
            State::Quarantine(_) => {
                self.deadline = Duration::MAX;
                let reason = format!("no proof that writes of hand-off {} have ended", self.handoff);
                return out.push(Action::DropLink(reason));
            }
            State::Done => return,
        };
        let abort = Message::Abort { handoff: self.handoff, reason: reason.clone() };
        self.lose(now, End::Expired, reason, Some(abort), out);
    }

    /// Ends it without landing, through quarantine if pages were open, and tells the worker.
    fn lose(&mut self, now: Duration, end: End, reason: String, say: Option<Message>, out: &mut Vec<Action>) {
        let opened = match self.state {
            State::Begun => false,
            State::Landing | State::Sealing(_) => true,
            State::Quarantine(_) | State::Done => return,
        };
        out.extend(say.map(Action::Send));
        out.push(Action::Emit(Event::Lost { handoff: self.handoff, reason }));
        if opened {
            self.quarantine(now, end, out);
        } else {
            self.done(end, out);
        }
    }

    fn quarantine(&mut self, now: Duration, end: End, out: &mut Vec<Action>) {
        self.state = State::Quarantine(end);
        self.deadline = now + self.limits.progress;
        out.push(Action::Seal { vouched: self.committed.is_some() });
    }

    fn done(&mut self, end: End, out: &mut Vec<Action>) {
        self.state = State::Done;
        self.deadline = Duration::MAX;
        out.push(Action::Done(end));
    }
}

#[cfg(test)]
mod tests;
