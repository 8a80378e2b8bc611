//! One hand-off between the ranks of tensor-parallel workers: pure.
//!
//! Every rank is a process with pages and links of its own. A source rank sends each target rank the heads that both hold; each
//! such pair is a *leg*, a hand-off by itself with an id that both ends compute. What the workers see is the hand-off: it is asked
//! for once, opened once, and lands at a target rank when every source rank's leg has. A leg that is lost takes the others of its
//! rank with it; what other ranks have is for the worker that they belong to.
//!
//! Between workers without ranks a leg is the hand-off, and passes through untouched.

use crate::{
    Begin, Commit, Event, HandoffId, Outcome, Rank,
    handoffs::{Action, Handoffs, LinkId, Moved, Request},
    message::Message,
    plan::Terms,
    target::FORGONE,
};
use kv_cache::PageId;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

/// Returns the id of the leg of `handoff` from rank `source` to rank `target`; and of a leg's id, that of its hand-off.
pub(crate) fn leg(handoff: HandoffId, source: Rank, target: Rank) -> HandoffId {
    // An odd number: no two pairs give the same product.
    let pair = u64::from(source.index) << 32 | u64::from(target.index);
    HandoffId(handoff.0 ^ pair.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// All hand-offs of one rank.
#[derive(Debug)]
pub(crate) struct Ranks {
    handoffs: Handoffs,
    rank: Rank,
    /// Heads of the model.
    kv_heads: u32,
    /// Longest wait for all legs of a hand-off to begin.
    begin_limit: Duration,
    /// The hand-off of each leg of those below.
    parents: BTreeMap<HandoffId, HandoffId>,
    sending: BTreeMap<HandoffId, Sending>,
    receiving: BTreeMap<HandoffId, Receiving>,
}

/// A hand-off that leaves in several legs.
#[derive(Debug)]
struct Sending {
    /// Legs that have not ended.
    live: BTreeSet<HandoffId>,
    all: Vec<HandoffId>,
    /// How the first that did not land ended.
    failed: Option<Outcome>,
}

/// A hand-off that comes in several legs.
#[derive(Debug)]
struct Receiving {
    /// Legs that have not begun yet.
    missing: BTreeSet<HandoffId>,
    /// Legs that have, and have not landed.
    begun: BTreeSet<HandoffId>,
    /// Opened legs that neither landed nor are quiet.
    open: BTreeSet<HandoffId>,
    landing: Option<(Vec<PageId>, u32)>,
    /// Of the legs that landed: all ranks sample the same token.
    commit: Option<Commit>,
    /// Will not land.
    dead: bool,
    deadline: Duration,
}

impl Ranks {
    /// Wraps the hand-offs of rank `rank`, whose pages hold `kv_heads` heads.
    pub(crate) fn new(handoffs: Handoffs, rank: Rank, kv_heads: u32, begin_limit: Duration) -> Self {
        let kv_heads = kv_heads.saturating_mul(rank.of / rank.replicas.max(1));
        let (parents, sending, receiving) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { handoffs, rank, kv_heads, begin_limit, parents, sending, receiving }
    }

    /// Returns the number of hand-offs, by legs, that have not ended.
    pub(crate) fn live(&self) -> usize {
        let waiting = self.receiving.values().filter(|receiving| receiving.begun.is_empty());
        self.handoffs.live() + waiting.count()
    }

    /// Returns the legs themselves.
    pub(crate) fn legs(&self) -> &Handoffs {
        &self.handoffs
    }

    /// Returns the legs themselves, for what concerns no hand-off in particular.
    pub(crate) fn legs_mut(&mut self) -> &mut Handoffs {
        &mut self.handoffs
    }

    /// Names the legs of `begin`: their ids and which of [`Begin::targets`] each goes to.
    pub(crate) fn legs_of(&self, begin: &Begin) -> Vec<(HandoffId, usize)> {
        let of = begin.targets.len() as u32;
        let wanted =
            |index: u32| Rank::new(index, of, self.kv_heads).filter(|rank| self.rank.sends_to(rank, self.kv_heads));
        // Degrees that do not fit are for the handshake to refuse.
        let fits = Rank::new(0, of, self.kv_heads).is_some();
        let targets = (0..of).filter(|index| !fits || wanted(*index).is_some());
        targets.map(|index| (leg(begin.handoff, self.rank, Rank { index, of, replicas: 1 }), index as usize)).collect()
    }

    /// Starts a hand-off whose `legs` go over these links, or could not be given any. See [`Handoffs::begin`].
    pub(crate) fn begin(
        &mut self,
        now: Duration,
        begin: &Begin,
        legs: Vec<(HandoffId, Result<LinkId, String>)>,
        out: &mut Vec<Action>,
    ) {
        let handoff = begin.handoff;
        self.handoffs.fetched(handoff);
        let passes = matches!(&legs[..], [(leg, _)] if *leg == handoff);
        if !passes {
            if self.sending.contains_key(&handoff) {
                return tracing::error!(%handoff, "hand-off begun twice");
            }
            if legs.is_empty() {
                // Another replica sends what this rank holds.
                return out.push(Action::Emit(Event::SourceDone { handoff, outcome: Outcome::Landed }));
            }
            let all: Vec<HandoffId> = legs.iter().map(|(leg, _)| *leg).collect();
            self.parents.extend(all.iter().map(|leg| (*leg, handoff)));
            self.sending.insert(handoff, Sending { live: all.iter().copied().collect(), all, failed: None });
        }
        let called_off = self.handoffs.remembered(handoff).map(str::to_owned);
        for (leg, link) in legs {
            let mut actions = Vec::new();
            match link {
                _ if !passes && called_off.is_some() => {
                    let reason = format!("called off before it began: {}", called_off.as_deref().unwrap_or_default());
                    self.handoffs.never_began(leg, Outcome::Aborted(reason), &mut actions);
                }
                Ok(link) => self.handoffs.begin(now, link, &Begin { handoff: leg, ..begin.clone() }, &mut actions),
                Err(reason) => self.handoffs.never_began(leg, Outcome::Refused(reason), &mut actions),
            }
            self.pass(now, actions, out);
        }
    }

    /// Takes a request of the worker. See [`Handoffs::request`].
    pub(crate) fn request(&mut self, now: Duration, request: Request, out: &mut Vec<Action>) {
        let handoff = request.handoff();
        let mut requests = Vec::new();
        if let Some(sending) = self.sending.get(&handoff) {
            requests.extend(sending.all.iter().map(|leg| request.clone().of(*leg)));
        }
        if let Some(receiving) = self.receiving.get_mut(&handoff) {
            match &request {
                Request::Open { landing, have, .. } if receiving.landing.is_none() => {
                    receiving.landing = Some((landing.clone(), *have));
                    if !receiving.dead {
                        receiving.open.extend(&receiving.begun);
                        requests.extend(receiving.begun.iter().map(|leg| request.clone().of(*leg)));
                    }
                }
                Request::Refuse { .. } | Request::Abort { .. } => {
                    receiving.dead = true;
                    requests.extend(receiving.begun.iter().map(|leg| request.clone().of(*leg)));
                    self.handoffs.remember(handoff, "the target called it off");
                }
                _ => {}
            }
        }
        let known = self.sending.contains_key(&handoff) || self.receiving.contains_key(&handoff);
        if !known {
            requests.push(request);
        }
        for request in requests {
            let mut actions = Vec::new();
            self.handoffs.request(now, request, &mut actions);
            self.pass(now, actions, out);
        }
        self.settle(handoff, out);
    }

    /// Takes a message. See [`Handoffs::message`].
    pub(crate) fn message(
        &mut self,
        now: Duration,
        (link, from, accepted): (LinkId, &str, bool),
        message: Message,
        out: &mut Vec<Action>,
    ) {
        if let (Message::Begin { handoff, .. }, true) = (&message, accepted)
            && let Some(terms) = self.handoffs.terms(link).filter(|terms| terms.has_ranks())
        {
            let terms = terms.clone();
            self.leg_begins(now, *handoff, &terms, out);
        }
        let mut actions = Vec::new();
        self.handoffs.message(now, (link, from, accepted), message, &mut actions);
        self.pass(now, actions, out);
    }

    /// Takes a transport's report. See [`Handoffs::moved`].
    pub(crate) fn moved(&mut self, now: Duration, leg: HandoffId, moved: Moved, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.handoffs.moved(now, leg, moved, &mut actions);
        self.pass(now, actions, out);
    }

    /// Ends what was under way on `link`. See [`Handoffs::link_lost`].
    pub(crate) fn link_lost(
        &mut self,
        now: Duration,
        link: LinkId,
        reason: &str,
        refused: bool,
        out: &mut Vec<Action>,
    ) {
        let mut actions = Vec::new();
        self.handoffs.link_lost(now, link, reason, refused, &mut actions);
        self.pass(now, actions, out);
    }

    /// Lets deadlines pass.
    pub(crate) fn tick(&mut self, now: Duration, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.handoffs.tick(now, &mut actions);
        self.pass(now, actions, out);
        let late =
            |receiving: &Receiving| !receiving.missing.is_empty() && !receiving.dead && receiving.deadline <= now;
        let due: Vec<_> = self.receiving.iter().filter(|(_, r)| late(r)).map(|(handoff, _)| *handoff).collect();
        for handoff in due {
            let missing = self.receiving[&handoff].missing.len();
            let reason = format!("{missing} ranks of the source did not begin within {:?}", self.begin_limit);
            self.lose(now, handoff, reason, out);
        }
    }

    /// A leg is about to begin here.
    fn leg_begins(&mut self, now: Duration, id: HandoffId, terms: &Arc<Terms>, out: &mut Vec<Action>) {
        let handoff = leg(id, terms.source_rank, terms.target_rank);
        // The leg between the first ranks has the hand-off's own id: that it has ended says nothing of the others.
        let going = self.receiving.get(&handoff).is_some_and(|receiving| !receiving.dead);
        if let Some(reason) = self.handoffs.remembered(handoff).filter(|_| !going) {
            let reason = reason.to_owned();
            return self.handoffs.request(now, Request::Abort { handoff: id, reason }, out);
        }
        let receiving = self.receiving.entry(handoff).or_insert_with(|| Receiving {
            missing: terms.senders().map(|source| leg(handoff, source, terms.target_rank)).collect(),
            begun: BTreeSet::new(),
            open: BTreeSet::new(),
            landing: None,
            commit: None,
            dead: false,
            deadline: now + self.begin_limit,
        });
        self.handoffs.fetched(handoff);
        if receiving.missing.remove(&id) {
            receiving.begun.insert(id);
            self.parents.insert(id, handoff);
        }
    }

    /// Passes on what legs want done, but for what they tell the worker: that is told of the hand-off.
    fn pass(&mut self, now: Duration, actions: Vec<Action>, out: &mut Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            let Action::Emit(event) = action else {
                out.push(action);
                continue;
            };
            match self.parents.get(&event.handoff()).copied() {
                Some(handoff) => self.leg_says(now, handoff, event, out),
                None => out.push(Action::Emit(event)),
            }
        }
    }

    fn leg_says(&mut self, now: Duration, handoff: HandoffId, event: Event, out: &mut Vec<Action>) {
        let leg = event.handoff();
        match event {
            Event::SourceDone { outcome, .. } => self.leg_done(now, handoff, leg, outcome, out),
            Event::Begun { from, tokens, .. } => {
                let Some(receiving) = self.receiving.get_mut(&handoff) else { return };
                let first = receiving.begun.len() == 1 && receiving.landing.is_none();
                if let Some((landing, have)) = receiving.landing.clone() {
                    receiving.open.insert(leg);
                    let mut actions = Vec::new();
                    self.handoffs.request(now, Request::Open { handoff: leg, landing, have }, &mut actions);
                    self.pass(now, actions, out);
                } else if first {
                    out.push(Action::Emit(Event::Begun { handoff, from, tokens }));
                }
            }
            Event::Landed { commit, .. } => {
                let Some(receiving) = self.receiving.get_mut(&handoff) else { return };
                receiving.begun.remove(&leg);
                receiving.open.remove(&leg);
                self.parents.remove(&leg);
                let others = receiving.commit.get_or_insert_with(|| commit.clone());
                if *others != commit {
                    let reason =
                        format!("ranks committed different tokens: {} and {}", others.first_token, commit.first_token);
                    return self.lose(now, handoff, reason, out);
                }
                if receiving.begun.is_empty() && receiving.missing.is_empty() && !receiving.dead {
                    self.receiving.remove(&handoff);
                    self.handoffs.remember(handoff, "it ended");
                    out.push(Action::Emit(Event::Landed { handoff, commit }));
                } else {
                    self.settle(handoff, out);
                }
            }
            // Asked for by its own id, never a leg's.
            Event::Asked { .. } => out.push(Action::Emit(event)),
            Event::Lost { reason, .. } => self.lose(now, handoff, reason, out),
            Event::Quiet { .. } => {
                let Some(receiving) = self.receiving.get_mut(&handoff) else { return };
                receiving.open.remove(&leg);
                self.settle(handoff, out);
            }
        }
    }

    fn leg_done(&mut self, now: Duration, handoff: HandoffId, leg: HandoffId, outcome: Outcome, out: &mut Vec<Action>) {
        let Some(sending) = self.sending.get_mut(&handoff) else { return };
        sending.live.remove(&leg);
        self.parents.remove(&leg);
        let reason = outcome.reason().to_owned();
        let first_failure = outcome != Outcome::Landed && sending.failed.is_none();
        // What is forgone is forgone of all legs, and each has been told.
        let takes_others_along = first_failure && outcome != Outcome::Forgone;
        if first_failure {
            sending.failed = Some(outcome);
        }
        if sending.live.is_empty() {
            let outcome = self.sending.remove(&handoff).and_then(|sending| sending.failed).unwrap_or(Outcome::Landed);
            self.handoffs.remember(handoff, outcome.reason());
            return out.push(Action::Emit(Event::SourceDone { handoff, outcome }));
        }
        if takes_others_along {
            // Without this one the sequence cannot run.
            for leg in sending.live.clone() {
                let mut actions = Vec::new();
                self.handoffs.request(now, Request::Abort { handoff: leg, reason: reason.clone() }, &mut actions);
                self.pass(now, actions, out);
            }
        }
    }

    /// Ends a hand-off at this target rank for want of one leg, and tells the worker.
    fn lose(&mut self, now: Duration, handoff: HandoffId, reason: String, out: &mut Vec<Action>) {
        let Some(receiving) = self.receiving.get_mut(&handoff) else { return };
        if !std::mem::replace(&mut receiving.dead, true) {
            // What is forgone is forgone of all legs, and each hears it for itself.
            let begun = if reason == FORGONE { BTreeSet::new() } else { receiving.begun.clone() };
            self.handoffs.remember(handoff, &reason);
            out.push(Action::Emit(Event::Lost { handoff, reason: reason.clone() }));
            for leg in begun {
                let mut actions = Vec::new();
                self.handoffs.request(now, Request::Abort { handoff: leg, reason: reason.clone() }, &mut actions);
                self.pass(now, actions, out);
            }
        }
        self.settle(handoff, out);
    }

    /// Forgets a dead hand-off once nothing of it can land any more.
    fn settle(&mut self, handoff: HandoffId, out: &mut Vec<Action>) {
        let over = |receiving: &&Receiving| receiving.dead && receiving.open.is_empty();
        if self.receiving.get(&handoff).filter(over).is_none() {
            return;
        }
        if let Some(receiving) = self.receiving.remove(&handoff) {
            receiving.begun.iter().for_each(|leg| _ = self.parents.remove(leg));
            if receiving.landing.is_some() {
                out.push(Action::Emit(Event::Quiet { handoff }));
            }
        }
    }
}
