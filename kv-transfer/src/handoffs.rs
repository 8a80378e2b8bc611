//! All hand-offs of one worker: pure. Finds the state machine that an input belongs to, and remembers the dead.
//!
//! Inputs name a link; a message that comes over another link than its hand-off's is as stale as one for a hand-off that ended
//! (one peer cannot touch the hand-offs of another). The last few thousand ended or called-off ids are remembered, so that an
//! abort may come before its `Begin` and an `open` after its loss, and so that late messages are told from confused ones.

use crate::{
    Begin, Commit, Event, Fetch, HandoffId, Outcome, Overlapped, Peer,
    digest::Digest,
    fetches::{self, Fetches},
    message::{Message, Sent},
    plan::Terms,
    source::{self, Frame, Limits, Source, Way},
    target::{self, End, FORGONE, Target},
};
use kv_cache::{PageId, PageLayout};
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

/// How many ended hand-offs are remembered.
const MEMORY: usize = 8192;

/// Names a link within this process, in the order in which they were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// Which half of a hand-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Source,
    Target,
}

/// What the worker asks for, other than to begin.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Push { handoff: HandoffId, layers: Range<u32>, pages: Range<u32> },
    Commit { handoff: HandoffId, commit: Commit },
    Open { handoff: HandoffId, landing: Vec<PageId>, have: u32 },
    Refuse { handoff: HandoffId, reason: String },
    Abort { handoff: HandoffId, reason: String },
    Forgo { handoff: HandoffId },
}

impl Request {
    /// Returns the hand-off it speaks of.
    pub(crate) fn handoff(&self) -> HandoffId {
        match self {
            Request::Push { handoff, .. }
            | Request::Commit { handoff, .. }
            | Request::Open { handoff, .. }
            | Request::Refuse { handoff, .. }
            | Request::Abort { handoff, .. }
            | Request::Forgo { handoff } => *handoff,
        }
    }

    /// Asks the same of another.
    pub(crate) fn of(mut self, other: HandoffId) -> Self {
        match &mut self {
            Request::Push { handoff, .. }
            | Request::Commit { handoff, .. }
            | Request::Open { handoff, .. }
            | Request::Refuse { handoff, .. }
            | Request::Abort { handoff, .. }
            | Request::Forgo { handoff } => *handoff = other,
        }
        self
    }
}

/// What transports report about a hand-off.
#[derive(Clone, Debug)]
pub(crate) enum Moved {
    /// Source: a frame's bytes are on their way.
    Sent { sequence: u32, bytes: u64, digest: Option<Digest> },
    /// Source: a frame will not (all) leave; nobody reads its blocks any more.
    Lost,
    /// Source: it has settled the hand-off.
    Settled,
    /// Target: a frame's bytes are in the landing.
    Landed { sequence: u32, bytes: u64, digest: Option<Digest> },
    /// Target: the landing is closed and no write is under way.
    Sealed,
    /// Target: a frame came for a landing that is closed or never was; its bytes were thrown away.
    Stale,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say this on the link.
    Send(LinkId, Message),
    /// Settle a hand-off in the word of that page, if it has one, and send its `Commit`; answered by `Settled` where it is settled.
    Commit { link: LinkId, handoff: HandoffId, sent: Sent, commit: Commit, word: Option<PageId> },
    /// Move a frame over the link.
    Post(LinkId, Frame),
    /// Drop the frames of this hand-off that have not started.
    Cancel(LinkId, HandoffId),
    /// Let writes of these travel pages from the link into a landing.
    Admit { link: LinkId, handoff: HandoffId, landing: Arc<[PageId]>, travel: Range<u32> },
    /// Let no more writes into a landing.
    Seal { link: LinkId, handoff: HandoffId, vouched: bool },
    /// Close the link.
    DropLink(LinkId, String),
    /// Tell the worker.
    Emit(Event),
    /// For the records: a half has ended; with what it took, when it landed at its source.
    Ended { link: Option<LinkId>, handoff: HandoffId, side: Side, end: End, took: Option<Took> },
    /// For the records: a message was ignored.
    Stale(HandoffId),
}

/// What a hand-off that landed took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Took {
    /// From the commit to its acknowledgement.
    pub(crate) overhead: Duration,
    /// Moving.
    pub(crate) overlapped: Overlapped,
}

/// The hand-offs of one worker.
#[derive(Clone, Debug)]
pub(crate) struct Handoffs {
    layout: PageLayout,
    limits: Limits,
    /// Of the links that are up.
    terms: BTreeMap<LinkId, Arc<Terms>>,
    /// How fast bytes have left lately; 0 = not known yet.
    moved_per_s: f64,
    // Ordered, so that a simulation is the same every time.
    sources: BTreeMap<HandoffId, (LinkId, Source)>,
    targets: BTreeMap<HandoffId, (LinkId, Target)>,
    fetches: Fetches,
    remembered: Memory,
}

impl Handoffs {
    /// Starts with none.
    pub(crate) fn new(layout: PageLayout, limits: Limits) -> Self {
        let (terms, sources, targets) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self {
            layout,
            limits,
            terms,
            moved_per_s: 0.0,
            sources,
            targets,
            fetches: Fetches::new(limits.open),
            remembered: Memory::default(),
        }
    }

    /// A link is up, under these terms. Nothing is heard over one that is not.
    pub(crate) fn link_up(&mut self, link: LinkId, terms: Arc<Terms>) {
        self.terms.insert(link, terms);
    }

    /// Returns the terms of a link that is up.
    pub(crate) fn terms(&self, link: LinkId) -> Option<&Arc<Terms>> {
        self.terms.get(&link)
    }

    /// Returns why a hand-off is over, if it is known to be.
    pub(crate) fn remembered(&self, handoff: HandoffId) -> Option<&str> {
        self.remembered.reason(handoff)
    }

    /// Remembers that a hand-off is over, and why.
    pub(crate) fn remember(&mut self, handoff: HandoffId, reason: &str) {
        self.remembered.insert(handoff, reason);
    }

    /// Bytes have left this fast lately.
    pub(crate) fn moved_at(&mut self, bytes_per_s: f64) {
        self.moved_per_s = bytes_per_s;
    }

    /// Returns the number of hand-offs that have not ended.
    pub(crate) fn live(&self) -> usize {
        self.sources.len() + self.targets.len() + self.fetches.live()
    }

    /// Returns the landing pages that wait for proof that no write can land.
    pub(crate) fn quarantined_pages(&self) -> u32 {
        self.targets.values().map(|(_, target)| target.quarantined_pages()).sum()
    }

    /// Starts a hand-off over `link`. Every `begin` is answered by exactly one `SourceDone`, except for an id that is live: that
    /// is a mistake of our worker, and the live one stands.
    pub(crate) fn begin(&mut self, now: Duration, link: LinkId, begin: &Begin, out: &mut Vec<Action>) {
        let handoff = begin.handoff;
        self.fetched(handoff);
        if self.sources.contains_key(&handoff) {
            return tracing::error!(%handoff, "hand-off begun twice");
        }
        if let Some(reason) = self.remembered.reason(handoff) {
            let outcome = Outcome::Aborted(format!("called off before it began: {reason}"));
            return self.never_began(handoff, outcome, out);
        }
        let mut actions = Vec::new();
        let source = Source::begin(now, begin, &self.layout, self.limits, &mut actions);
        self.sources.insert(handoff, (link, source));
        self.finish_source(now, handoff, actions, out);
    }

    /// Asks the peer at the other end of `link` for a prefix, which is to go to `address` in this life. It begins here as any other
    /// hand-off, or is `Lost`.
    pub(crate) fn fetch(
        &mut self,
        now: Duration,
        (link, incarnation, address): (LinkId, u64, &str),
        fetch: &Fetch,
        out: &mut Vec<Action>,
    ) {
        let handoff = fetch.handoff;
        if let Some(reason) = self.remembered.reason(handoff) {
            let reason = format!("called off before it began: {reason}");
            return out.push(Action::Emit(Event::Lost { handoff, reason }));
        }
        self.fetches.want(now, link, handoff);
        let (link_address, pages) = (address.to_owned(), fetch.pages.clone());
        out.push(Action::Send(link, Message::Fetch { handoff, incarnation, link: link_address, pages }));
    }

    /// What was fetched, or is asked for, begins.
    pub(crate) fn fetched(&mut self, handoff: HandoffId) {
        self.fetches.came(handoff);
        self.fetches.answer(handoff, None, &mut Vec::new());
    }

    fn fetches(&mut self, actions: Vec<fetches::Action>, out: &mut Vec<Action>) {
        for action in actions {
            out.push(match action {
                fetches::Action::Send(link, message) => Action::Send(link, message),
                fetches::Action::Emit(event) => Action::Emit(event),
                fetches::Action::Lost(handoff, reason) => {
                    self.remembered.insert(handoff, &reason);
                    Action::Emit(Event::Lost { handoff, reason })
                }
            });
        }
    }

    /// Answers a `begin` for which there is no link to be had.
    pub(crate) fn never_began(&mut self, handoff: HandoffId, outcome: Outcome, out: &mut Vec<Action>) {
        self.remembered.insert(handoff, outcome.reason());
        out.push(Action::Ended { link: None, handoff, side: Side::Source, end: outcome.end(), took: None });
        out.push(Action::Emit(Event::SourceDone { handoff, outcome }));
    }

    /// Takes a request of the worker.
    pub(crate) fn request(&mut self, now: Duration, request: Request, out: &mut Vec<Action>) {
        match request {
            Request::Push { handoff, layers, pages } => {
                self.source(now, handoff, None, source::Input::Push { layers, pages }, out);
            }
            Request::Commit { handoff, commit } => {
                self.source(now, handoff, None, source::Input::Commit(commit), out);
            }
            Request::Open { handoff, landing, have } => {
                // The hand-off may have ended while the worker was finding pages: no write ever could land in them.
                if !self.target(now, handoff, None, target::Input::Open { landing, have }, out) {
                    out.push(Action::Emit(Event::Quiet { handoff }));
                }
            }
            Request::Refuse { handoff, reason } => {
                let mut actions = Vec::new();
                self.fetches.answer(handoff, Some(reason.clone()), &mut actions);
                self.fetches(actions, out);
                self.target(now, handoff, None, target::Input::Refuse(reason), out);
            }
            Request::Abort { handoff, reason } => {
                self.remembered.insert(handoff, &reason);
                if let Some(link) = self.fetches.call_off(handoff) {
                    out.push(Action::Send(link, Message::Abort { handoff, reason: reason.clone() }));
                }
                self.source(now, handoff, None, source::Input::Abort(reason.clone()), out);
                self.target(now, handoff, None, target::Input::Abort(reason), out);
            }
            Request::Forgo { handoff } => {
                self.source(now, handoff, None, source::Input::Forgo, out);
            }
        }
    }

    /// Takes a message from `from`, the member at the other end of `link`. `accepted`: it dialled us, so it is the source.
    pub(crate) fn message(
        &mut self,
        now: Duration,
        (link, from, accepted): (LinkId, &str, bool),
        message: Message,
        out: &mut Vec<Action>,
    ) {
        let Some(handoff) = message.handoff() else { return };
        let late_quiet = matches!(message, Message::Quiet { .. }) && self.remembered.contains(handoff);
        let of_interest = if accepted {
            self.source_says(now, link, from, message, out)
        } else {
            self.target_says(now, link, message, out)
        };
        // Quiet follows every abort; where the landing could be closed without it, it comes too late to matter.
        if !of_interest && !late_quiet {
            out.push(Action::Stale(handoff));
        }
    }

    fn source_says(
        &mut self,
        now: Duration,
        link: LinkId,
        from: &str,
        message: Message,
        out: &mut Vec<Action>,
    ) -> bool {
        let (handoff, input) = match message {
            Message::Begin { handoff, tokens } => return self.begun(now, (link, from), handoff, tokens, out),
            Message::Commit { handoff, sent, commit, settled } => {
                (handoff, target::Input::Committed { sent, commit, settled })
            }
            Message::Quiet { handoff } => (handoff, target::Input::PeerQuiet),
            Message::Fetch { handoff, incarnation, link: address, pages } => {
                let by = Peer { worker: from.to_owned(), incarnation, link: address };
                let mut actions = Vec::new();
                let new = self.fetches.ask(now, (link, by), handoff, pages, &mut actions);
                self.fetches(actions, out);
                return new;
            }
            Message::Abort { handoff, reason } => {
                self.fetches.called_off(link, handoff);
                if self.ended_early(handoff, &reason) {
                    return true;
                }
                (handoff, target::Input::PeerAborted(reason))
            }
            Message::Forgo { handoff } if self.ended_early(handoff, FORGONE) => return true,
            Message::Forgo { handoff } => (handoff, target::Input::PeerForwent),
            _ => return false,
        };
        self.target(now, handoff, Some(link), input, out)
    }

    /// Remembers a hand-off whose end comes before its beginning. Returns whether this one's did.
    fn ended_early(&mut self, handoff: HandoffId, reason: &str) -> bool {
        let early = !self.targets.contains_key(&handoff) && !self.remembered.contains(handoff);
        if early {
            self.remembered.insert(handoff, reason);
        }
        early
    }

    fn target_says(&mut self, now: Duration, link: LinkId, message: Message, out: &mut Vec<Action>) -> bool {
        let (handoff, input) = match message {
            Message::Open { handoff, have, landing } => {
                let Some(terms) = self.terms.get(&link).cloned() else { return false };
                let way = Way { terms, bytes_per_s: self.moved_per_s };
                (handoff, source::Input::Opened { landing, have, way })
            }
            Message::Refuse { handoff, reason } => {
                let mut actions = Vec::new();
                let fetched = self.fetches.refused(link, handoff, &reason, &mut actions);
                self.fetches(actions, out);
                if fetched {
                    return true;
                }
                (handoff, source::Input::Refused(reason))
            }
            Message::Ack { handoff } => (handoff, source::Input::Acked),
            Message::Abort { handoff, reason } => (handoff, source::Input::PeerAborted(reason)),
            _ => return false,
        };
        self.source(now, handoff, Some(link), input, out)
    }

    fn begun(
        &mut self,
        now: Duration,
        (link, from): (LinkId, &str),
        handoff: HandoffId,
        tokens: u32,
        out: &mut Vec<Action>,
    ) -> bool {
        if self.targets.contains_key(&handoff) {
            return false;
        }
        let Some(terms) = self.terms.get(&link).cloned() else { return false };
        if let Some(reason) = self.remembered.reason(handoff) {
            let reason = format!("called off before it began: {reason}");
            out.push(Action::Send(link, Message::Abort { handoff, reason }));
            return true;
        }
        self.fetched(handoff);
        let mut actions = Vec::new();
        let named = (handoff, from.to_owned(), tokens);
        let target = Target::begun(now, named, terms, self.limits, &mut actions);
        self.targets.insert(handoff, (link, target));
        self.finish_target(handoff, actions, out);
        true
    }

    /// Takes a transport's report.
    pub(crate) fn moved(&mut self, now: Duration, handoff: HandoffId, moved: Moved, out: &mut Vec<Action>) {
        match moved {
            Moved::Sent { sequence, digest, .. } => {
                self.source(now, handoff, None, source::Input::FrameSent { sequence, digest }, out);
            }
            Moved::Lost => {
                self.source(now, handoff, None, source::Input::FrameLost, out);
            }
            Moved::Settled => {
                self.source(now, handoff, None, source::Input::Acked, out);
            }
            Moved::Landed { sequence, bytes, digest } => {
                self.target(now, handoff, None, target::Input::FrameLanded { sequence, bytes, digest }, out);
            }
            Moved::Sealed => {
                self.target(now, handoff, None, target::Input::Sealed, out);
            }
            Moved::Stale => out.push(Action::Stale(handoff)),
        }
    }

    /// Returns when the next deadline passes.
    #[cfg(test)]
    pub(crate) fn next_deadline(&self) -> Duration {
        let sources = self.sources.values().map(|(_, source)| source.deadline());
        sources.chain(self.targets.values().map(|(_, target)| target.deadline())).min().unwrap_or(Duration::MAX)
    }

    /// Ends what was under way on `link`. `refused`: it never came up, because the other end would not have it.
    pub(crate) fn link_lost(
        &mut self,
        now: Duration,
        link: LinkId,
        reason: &str,
        refused: bool,
        out: &mut Vec<Action>,
    ) {
        for handoff in on_link(&self.sources, link) {
            let input = source::Input::LinkLost { reason: reason.to_owned(), refused };
            self.source(now, handoff, None, input, out);
        }
        for handoff in on_link(&self.targets, link) {
            self.target(now, handoff, None, target::Input::LinkLost(reason.to_owned()), out);
        }
        let mut actions = Vec::new();
        self.fetches.link_lost(link, reason, &mut actions);
        self.fetches(actions, out);
        self.terms.remove(&link);
    }

    /// Lets deadlines pass.
    pub(crate) fn tick(&mut self, now: Duration, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.fetches.tick(now, &mut actions);
        self.fetches(actions, out);
        let due: Vec<_> =
            self.sources.iter().filter(|(_, (_, source))| source.deadline() <= now).map(|(id, _)| *id).collect();
        for handoff in due {
            self.source(now, handoff, None, source::Input::Tick, out);
        }
        let due: Vec<_> =
            self.targets.iter().filter(|(_, (_, target))| target.deadline() <= now).map(|(id, _)| *id).collect();
        for handoff in due {
            self.target(now, handoff, None, target::Input::Tick, out);
        }
    }

    /// Steps a source. `over` is the link that a message came over. Returns whether the input was of interest.
    fn source(
        &mut self,
        now: Duration,
        handoff: HandoffId,
        over: Option<LinkId>,
        input: source::Input,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some((link, source)) = self.sources.get_mut(&handoff) else { return false };
        if over.is_some_and(|over| over != *link) {
            return false;
        }
        let mut actions = Vec::new();
        let of_interest = source.step(now, input, &mut actions);
        self.finish_source(now, handoff, actions, out);
        of_interest
    }

    fn finish_source(
        &mut self,
        now: Duration,
        handoff: HandoffId,
        actions: Vec<source::Action>,
        out: &mut Vec<Action>,
    ) {
        let (link, source) = &self.sources[&handoff];
        let (link, done, committed_at) = (*link, source.is_done(), source.committed_at());
        let overlapped = source.overlapped(now);
        for action in actions {
            let action = match action {
                source::Action::Send(message) => Action::Send(link, message),
                source::Action::Commit { sent, commit, word } => Action::Commit { link, handoff, sent, commit, word },
                source::Action::Post(frame) => Action::Post(link, frame),
                source::Action::Cancel => Action::Cancel(link, handoff),
                source::Action::DropLink(reason) => Action::DropLink(link, reason),
                source::Action::Done(outcome) => {
                    self.remembered.insert(handoff, outcome.reason());
                    let landed = outcome == Outcome::Landed;
                    let took = |at| Took { overhead: now.saturating_sub(at), overlapped };
                    let (took, end) = (committed_at.filter(|_| landed).map(took), outcome.end());
                    out.push(Action::Ended { link: Some(link), handoff, side: Side::Source, end, took });
                    Action::Emit(Event::SourceDone { handoff, outcome })
                }
            };
            out.push(action);
        }
        if done {
            self.sources.remove(&handoff);
        }
    }

    /// Steps a target, as [`Handoffs::source`].
    fn target(
        &mut self,
        now: Duration,
        handoff: HandoffId,
        over: Option<LinkId>,
        input: target::Input,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some((link, target)) = self.targets.get_mut(&handoff) else { return false };
        if over.is_some_and(|over| over != *link) {
            return false;
        }
        let mut actions = Vec::new();
        let of_interest = target.step(now, input, &mut actions);
        self.finish_target(handoff, actions, out);
        of_interest
    }

    fn finish_target(&mut self, handoff: HandoffId, actions: Vec<target::Action>, out: &mut Vec<Action>) {
        let (link, target) = &self.targets[&handoff];
        let (link, done) = (*link, target.is_done());
        for action in actions {
            out.push(match action {
                target::Action::Send(message) => Action::Send(link, message),
                target::Action::Admit { landing, travel } => Action::Admit { link, handoff, landing, travel },
                target::Action::Seal { vouched } => Action::Seal { link, handoff, vouched },
                target::Action::DropLink(reason) => Action::DropLink(link, reason),
                target::Action::Emit(event) => Action::Emit(event),
                target::Action::Done(end) => {
                    self.remembered.insert(handoff, "it ended");
                    Action::Ended { link: Some(link), handoff, side: Side::Target, end, took: None }
                }
            });
        }
        if done {
            self.targets.remove(&handoff);
        }
    }
}

fn on_link<T>(handoffs: &BTreeMap<HandoffId, (LinkId, T)>, link: LinkId) -> Vec<HandoffId> {
    handoffs.iter().filter(|(_, (on, _))| *on == link).map(|(handoff, _)| *handoff).collect()
}

impl Event {
    /// Returns the hand-off it is about.
    pub(crate) fn handoff(&self) -> HandoffId {
        match self {
            Event::Begun { handoff, .. }
            | Event::Landed { handoff, .. }
            | Event::Lost { handoff, .. }
            | Event::Quiet { handoff }
            | Event::Asked { handoff, .. }
            | Event::SourceDone { handoff, .. } => *handoff,
        }
    }
}

impl Outcome {
    /// Returns why, in words.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Outcome::Landed => "landed",
            Outcome::Forgone => FORGONE,
            Outcome::Refused(reason) | Outcome::Aborted(reason) | Outcome::Expired(reason) => reason,
        }
    }

    /// Returns how, without the reason.
    pub(crate) fn end(&self) -> End {
        match self {
            Outcome::Landed => End::Landed,
            Outcome::Forgone => End::Forgone,
            Outcome::Refused(_) => End::Refused,
            Outcome::Aborted(_) => End::Aborted,
            Outcome::Expired(_) => End::Expired,
        }
    }
}

/// The last [`MEMORY`] hand-offs that ended or were called off before they began, and why. When full, the oldest is forgotten:
/// its late messages then count as stale without more ado, and a `Begin` after its abort runs into its deadline.
#[derive(Clone, Debug, Default)]
struct Memory {
    reasons: BTreeMap<HandoffId, String>,
    order: VecDeque<HandoffId>,
}

impl Memory {
    fn insert(&mut self, handoff: HandoffId, reason: &str) {
        if self.reasons.contains_key(&handoff) {
            return;
        }
        if self.order.len() == MEMORY
            && let Some(oldest) = self.order.pop_front()
        {
            self.reasons.remove(&oldest);
        }
        self.order.push_back(handoff);
        self.reasons.insert(handoff, reason.to_owned());
    }

    fn contains(&self, handoff: HandoffId) -> bool {
        self.reasons.contains_key(&handoff)
    }

    fn reason(&self, handoff: HandoffId) -> Option<&str> {
        self.reasons.get(&handoff).map(String::as_str)
    }
}
