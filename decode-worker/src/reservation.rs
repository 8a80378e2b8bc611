//! Sequences on their way here: matched, given pages, landed or lost. Pure.
//!
//! A hand-off is announced twice, in either order: the router submits the leg ([`Reservations::expect`]) and the source asks for a
//! landing ([`Reservations::begun`]). Only when both have spoken are pages taken. Each state has an end:
//!
//! ```text
//!   Begun ────┐ router silent: refused
//!             ├─► Queued ───► Landing ───► (in the batch)
//!   Expected ─┘ no pages      │ lost, or the router cancelled
//!   source silent: leg failed in time: └─► Quarantine ─► (pages given back when quiet)
//!               leg refused
//! ```
//!
//! The queue goes by priority, then arrival, and its head is never passed. When a landing gets its pages is the scheduler's
//! rule (`engine::scheduler::Landing`). The deadline of a landing is kv-transfer's, which reports it as lost.

use attach::{End, LegId};
use engine::{
    TokenId,
    scheduler::{Hold, Landing, NoRoom, Request, Scheduler, SequenceId},
};
use kv_cache::PageId;
use kv_transfer::HandoffId;
use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

/// How long and how many may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest a source waits for the router to submit the leg.
    pub(crate) begun_wait: Duration,
    /// Longest a leg waits for its source: it may stand in that worker's line.
    pub(crate) expected_wait: Duration,
    /// Longest a matched leg waits for pages. Shorter than the source's patience, so that the refusal is ours.
    pub(crate) queue_wait: Duration,
    /// Most legs that wait for their source, and as many that wait for pages; further ones are refused.
    pub(crate) waiting: usize,
}

/// A leg that a router submitted.
#[derive(Debug)]
pub(crate) struct Awaited {
    pub(crate) leg: LegId,
    /// Member id of the prefill worker.
    pub(crate) source: String,
    pub(crate) request: Request,
    pub(crate) arrived: Duration,
}

/// What is to be done about a decision.
#[derive(Debug, PartialEq)]
pub(crate) enum Action {
    /// Tell the source where the pages go.
    Open { handoff: HandoffId, pages: Vec<PageId>, have: usize },
    /// Tell the source that there is no landing.
    Refuse { handoff: HandoffId, reason: String },
    /// Call the hand-off off.
    Abort { handoff: HandoffId, reason: String },
    /// Tell the router that its leg is over.
    End { leg: LegId, end: End },
    /// The leg's sequence runs.
    Run { leg: LegId, sequence: SequenceId },
}

#[derive(Debug)]
enum State {
    Begun { source: String, tokens: usize, until: Duration },
    Expected { awaited: Awaited, until: Duration },
    Queued { awaited: Awaited, until: Duration },
    Landing { awaited: Awaited, landing: Landing },
    Quarantine { hold: Hold },
}

/// The hand-offs of a decode worker that have not landed.
#[derive(Debug)]
pub(crate) struct Reservations {
    limits: Limits,
    states: HashMap<HandoffId, State>,
    /// Who waits for pages, in order.
    queue: BTreeMap<SequenceId, HandoffId>,
    actions: Vec<Action>,
    /// Nothing is overdue before this.
    next_deadline: Option<Duration>,
}

impl Reservations {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, states: HashMap::new(), queue: BTreeMap::new(), actions: Vec::new(), next_deadline: None }
    }

    /// A router submitted the decode leg of `handoff`.
    pub(crate) fn expect(&mut self, handoff: HandoffId, awaited: Awaited, now: Duration, scheduler: &mut Scheduler) {
        let tokens = awaited.request.history.len();
        if tokens >= scheduler.max_len() {
            let reason =
                format!("{tokens} tokens leave no room for output in sequences of at most {}", scheduler.max_len());
            let begun = matches!(self.states.get(&handoff), Some(State::Begun { .. }));
            self.end(awaited.leg, End::Refused(reason.clone()));
            if begun {
                self.states.remove(&handoff);
                self.actions.push(Action::Refuse { handoff, reason });
            }
            return;
        }
        match self.states.remove(&handoff) {
            None if self.awaited() >= self.limits.waiting => {
                let reason = format!("{} hand-offs are awaited already", self.awaited());
                self.end(awaited.leg, End::Refused(reason.clone()));
                self.actions.push(Action::Abort { handoff, reason });
            }
            None => {
                let until = now + self.limits.expected_wait;
                self.wait(handoff, State::Expected { awaited, until });
            }
            Some(State::Begun { source, tokens, .. }) => {
                self.matched(handoff, awaited, &source, tokens, now, scheduler);
            }
            Some(other) => {
                self.states.insert(handoff, other);
                self.end(awaited.leg, End::Invalid(format!("hand-off {:016x} was used before", handoff.0)));
            }
        }
    }

    /// A source asks for a landing.
    pub(crate) fn begun(
        &mut self,
        handoff: HandoffId,
        source: String,
        tokens: usize,
        now: Duration,
        scheduler: &mut Scheduler,
    ) {
        match self.states.remove(&handoff) {
            None if self.count(|state| matches!(state, State::Begun { .. })) >= self.limits.waiting => {
                let reason = format!("{} hand-offs wait for their router already", self.limits.waiting);
                self.actions.push(Action::Refuse { handoff, reason });
            }
            None => {
                let until = now + self.limits.begun_wait;
                self.wait(handoff, State::Begun { source, tokens, until });
            }
            Some(State::Expected { awaited, .. }) => {
                self.matched(handoff, awaited, &source, tokens, now, scheduler);
            }
            Some(other) => {
                self.states.insert(handoff, other);
                self.actions.push(Action::Refuse { handoff, reason: "this hand-off was begun before".into() });
            }
        }
    }

    /// Both have spoken: do they mean the same?
    fn matched(
        &mut self,
        handoff: HandoffId,
        awaited: Awaited,
        source: &str,
        tokens: usize,
        now: Duration,
        scheduler: &mut Scheduler,
    ) {
        let expected = awaited.request.history.len();
        let problem = if awaited.source != source {
            Some(format!("expected from {}, begun by {source}", awaited.source))
        } else if expected != tokens {
            Some(format!("{expected} tokens expected, {tokens} begun"))
        } else {
            None
        };
        if let Some(problem) = problem {
            self.end(awaited.leg, End::Failed(problem.clone()));
            self.actions.push(Action::Refuse { handoff, reason: problem });
        } else if self.queue.len() >= self.limits.waiting {
            self.turn_away(handoff, &awaited, format!("{} sequences wait for pages already", self.queue.len()));
        } else {
            let ticket = scheduler.ticket(awaited.request.priority);
            self.queue.insert(ticket, handoff);
            self.wait(handoff, State::Queued { awaited, until: now + self.limits.queue_wait });
        }
    }

    /// Gives pages to whoever waits for them, as far as they go. To be called before each step and after every event.
    pub(crate) fn open(&mut self, scheduler: &mut Scheduler) {
        while let Some((&ticket, &handoff)) = self.queue.first_key_value() {
            let Some(State::Queued { awaited, .. }) = self.states.get(&handoff) else {
                unreachable!("who stands in the queue is queued");
            };
            let history = &awaited.request.history;
            let reserved = scheduler.reserve(ticket, history.hashes(), history.len());
            if matches!(reserved, Err(NoRoom::Now)) {
                return;
            }
            self.queue.remove(&ticket);
            let Some(State::Queued { awaited, .. }) = self.states.remove(&handoff) else { continue };
            match reserved {
                Ok(landing) => {
                    let (pages, have) = (landing.pages().to_vec(), landing.have());
                    self.actions.push(Action::Open { handoff, pages, have });
                    self.states.insert(handoff, State::Landing { awaited, landing });
                }
                Err(_) => self.turn_away(handoff, &awaited, "it is longer than this worker can hold".into()),
            }
        }
    }

    /// Every page is here: the sequence joins the batch.
    pub(crate) fn landed(&mut self, handoff: HandoffId, first_token: TokenId, scheduler: &mut Scheduler) {
        match self.states.remove(&handoff) {
            Some(State::Landing { awaited, landing }) => {
                let Awaited { leg, request, arrived, .. } = awaited;
                let sequence = scheduler.land(landing, request, first_token, arrived);
                self.actions.push(Action::Run { leg, sequence });
            }
            // Cancelled while the news was on its way. It has landed, so nobody writes there any more.
            Some(State::Quarantine { hold }) => scheduler.give_back(hold),
            other => self.keep(handoff, other),
        }
    }

    /// The hand-off ended without landing. Its pages may still be written.
    pub(crate) fn lost(&mut self, handoff: HandoffId, reason: String, scheduler: &mut Scheduler) {
        match self.states.remove(&handoff) {
            Some(State::Landing { awaited, landing }) => {
                let hold = scheduler.forgo(landing);
                self.states.insert(handoff, State::Quarantine { hold });
                self.end(awaited.leg, End::Failed(format!("hand-off from {} lost: {reason}", awaited.source)));
            }
            Some(State::Queued { awaited, .. }) => {
                self.leave_queue(handoff);
                self.end(awaited.leg, End::Failed(format!("hand-off from {} lost: {reason}", awaited.source)));
            }
            Some(State::Begun { .. }) => {}
            other => self.keep(handoff, other),
        }
    }

    /// Nobody writes its pages any more.
    pub(crate) fn quiet(&mut self, handoff: HandoffId, scheduler: &mut Scheduler) {
        match self.states.remove(&handoff) {
            Some(State::Quarantine { hold }) => scheduler.give_back(hold),
            other => self.keep(handoff, other),
        }
    }

    /// The leg is not wanted any more; its router is not told.
    pub(crate) fn cancel(&mut self, handoff: HandoffId, reason: &str, scheduler: &mut Scheduler) {
        let reason = reason.to_owned();
        match self.states.remove(&handoff) {
            Some(State::Expected { .. }) => self.actions.push(Action::Abort { handoff, reason }),
            Some(State::Queued { .. }) => {
                self.leave_queue(handoff);
                self.actions.push(Action::Refuse { handoff, reason });
            }
            Some(State::Landing { landing, .. }) => {
                let hold = scheduler.forgo(landing);
                self.states.insert(handoff, State::Quarantine { hold });
                self.actions.push(Action::Abort { handoff, reason });
            }
            other => self.keep(handoff, other),
        }
    }

    /// Ends what has waited too long.
    pub(crate) fn expire(&mut self, now: Duration) {
        if self.next_deadline.is_none_or(|next| now < next) {
            return;
        }
        let overdue = |(handoff, state): (&HandoffId, &State)| (state.until()? <= now).then_some(*handoff);
        let overdue: Vec<HandoffId> = self.states.iter().filter_map(overdue).collect();
        for handoff in overdue {
            match self.states.remove(&handoff) {
                Some(State::Begun { .. }) => {
                    let reason = format!("no router submitted it within {:?}", self.limits.begun_wait);
                    self.actions.push(Action::Refuse { handoff, reason });
                }
                Some(State::Expected { awaited, .. }) => {
                    let reason =
                        format!("{} did not begin the hand-off within {:?}", awaited.source, self.limits.expected_wait);
                    self.end(awaited.leg, End::Failed(reason.clone()));
                    self.actions.push(Action::Abort { handoff, reason });
                }
                Some(State::Queued { awaited, .. }) => {
                    self.leave_queue(handoff);
                    self.turn_away(handoff, &awaited, format!("no pages within {:?}", self.limits.queue_wait));
                }
                other => self.keep(handoff, other),
            }
        }
        self.next_deadline = self.states.values().filter_map(State::until).min();
    }

    /// Returns when [`Reservations::expire`] is to be called next.
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        self.next_deadline
    }

    /// Takes what is to be done.
    pub(crate) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Returns how many hand-offs are in flight or waiting for pages.
    pub(crate) fn in_flight(&self) -> usize {
        self.count(|state| matches!(state, State::Queued { .. } | State::Landing { .. }))
    }

    fn awaited(&self) -> usize {
        self.count(|state| matches!(state, State::Expected { .. }))
    }

    fn count(&self, counts: impl Fn(&State) -> bool) -> usize {
        self.states.values().filter(|state| counts(state)).count()
    }

    fn wait(&mut self, handoff: HandoffId, state: State) {
        self.next_deadline = [self.next_deadline, state.until()].into_iter().flatten().min();
        self.states.insert(handoff, state);
    }

    fn turn_away(&mut self, handoff: HandoffId, awaited: &Awaited, reason: String) {
        self.end(awaited.leg, End::Refused(reason.clone()));
        self.actions.push(Action::Refuse { handoff, reason });
    }

    fn end(&mut self, leg: LegId, end: End) {
        self.actions.push(Action::End { leg, end });
    }

    /// Puts back a state that an event does not concern.
    fn keep(&mut self, handoff: HandoffId, state: Option<State>) {
        if let Some(state) = state {
            self.states.insert(handoff, state);
        }
    }

    fn leave_queue(&mut self, handoff: HandoffId) {
        self.queue.retain(|_, queued| *queued != handoff);
    }
}

impl State {
    fn until(&self) -> Option<Duration> {
        match self {
            State::Begun { until, .. } | State::Expected { until, .. } | State::Queued { until, .. } => Some(*until),
            State::Landing { .. } | State::Quarantine { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
