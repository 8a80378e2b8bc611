//! Prefixes that a target asks a peer for, instead of having them computed: pure.
//!
//! The peer becomes the source of an ordinary hand-off, so all that is new is the asking: `Fetch` goes to it over a link dialled by
//! the asker, and its worker answers with `begin`, which dials back, or refuses. On both ends an unanswered one has a deadline.

use crate::{Event, HandoffId, Peer, handoffs::LinkId, message::Message};
use kv_cache::PageHash;
use std::{collections::BTreeMap, time::Duration};

/// Unanswered ones that a worker keeps from all peers; the rest are refused.
const MOST_ASKED: usize = 64;

/// The unanswered fetches of one worker.
#[derive(Clone, Debug)]
pub(crate) struct Fetches {
    /// Longest wait for an answer.
    limit: Duration,
    /// Asked of others: over which link, until when.
    wanted: BTreeMap<HandoffId, (LinkId, Duration)>,
    /// Asked of this worker.
    asked: BTreeMap<HandoffId, (LinkId, Duration)>,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say this on the link.
    Send(LinkId, Message),
    /// Tell the worker.
    Emit(Event),
    /// Wanted in vain, and why.
    Lost(HandoffId, String),
}

impl Fetches {
    /// Starts with none.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, wanted: BTreeMap::new(), asked: BTreeMap::new() }
    }

    /// Returns the number of unanswered ones.
    pub(crate) fn live(&self) -> usize {
        self.wanted.len() + self.asked.len()
    }

    /// This worker asks for `handoff` over `link`.
    pub(crate) fn want(&mut self, now: Duration, link: LinkId, handoff: HandoffId) {
        self.wanted.insert(handoff, (link, now + self.limit));
    }

    /// The peer that was asked began.
    pub(crate) fn came(&mut self, handoff: HandoffId) {
        self.wanted.remove(&handoff);
    }

    /// This worker calls off what it wanted, or was asked for. Returns the link to say so over.
    pub(crate) fn call_off(&mut self, handoff: HandoffId) -> Option<LinkId> {
        self.wanted.remove(&handoff).or_else(|| self.asked.remove(&handoff)).map(|(link, _)| link)
    }

    /// The peer asked refuses. Returns whether it was asked, over this link.
    pub(crate) fn refused(&mut self, link: LinkId, handoff: HandoffId, reason: &str, out: &mut Vec<Action>) -> bool {
        let asked = self.wanted.get(&handoff).is_some_and(|(over, _)| *over == link);
        if asked {
            self.wanted.remove(&handoff);
            out.push(Action::Lost(handoff, reason.to_owned()));
        }
        asked
    }

    /// The peer `by` at the other end of `link` asks for `pages`.
    pub(crate) fn ask(
        &mut self,
        now: Duration,
        (link, by): (LinkId, Peer),
        handoff: HandoffId,
        pages: Vec<PageHash>,
        out: &mut Vec<Action>,
    ) -> bool {
        if self.asked.contains_key(&handoff) {
            return false;
        }
        if self.asked.len() == MOST_ASKED {
            let reason = format!("{MOST_ASKED} others wait for an answer");
            out.push(Action::Send(link, Message::Refuse { handoff, reason }));
            return true;
        }
        self.asked.insert(handoff, (link, now + self.limit));
        out.push(Action::Emit(Event::Asked { handoff, by, pages }));
        true
    }

    /// This worker answers: with `begin`, or by refusing for `reason`. Returns whether it was asked.
    pub(crate) fn answer(&mut self, handoff: HandoffId, reason: Option<String>, out: &mut Vec<Action>) -> bool {
        let Some((link, _)) = self.asked.remove(&handoff) else { return false };
        out.extend(reason.map(|reason| Action::Send(link, Message::Refuse { handoff, reason })));
        true
    }

    /// The asker called it off. Returns whether it was waited for, over this link.
    pub(crate) fn called_off(&mut self, link: LinkId, handoff: HandoffId) -> bool {
        let asked = self.asked.get(&handoff).is_some_and(|(over, _)| *over == link);
        asked && self.asked.remove(&handoff).is_some()
    }

    /// Nothing more is heard over `link`.
    pub(crate) fn link_lost(&mut self, link: LinkId, reason: &str, out: &mut Vec<Action>) {
        self.asked.retain(|_, (over, _)| *over != link);
        self.lose(|over, _| over == link, reason, out);
    }

    /// Lets deadlines pass.
    pub(crate) fn tick(&mut self, now: Duration, out: &mut Vec<Action>) {
        let late: Vec<HandoffId> =
            self.asked.iter().filter(|(_, (_, until))| *until <= now).map(|(handoff, _)| *handoff).collect();
        let reason = format!("no answer within {:?}", self.limit);
        for handoff in late {
            self.answer(handoff, Some(reason.clone()), out);
        }
        self.lose(|_, until| until <= now, &reason, out);
    }

    fn lose(&mut self, which: impl Fn(LinkId, Duration) -> bool, reason: &str, out: &mut Vec<Action>) {
        let lost = self.wanted.extract_if(.., |_, (link, until)| which(*link, *until));
        out.extend(lost.map(|(handoff, _)| Action::Lost(handoff, reason.to_owned())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H: HandoffId = HandoffId(1);
    const LINK: LinkId = LinkId(1);
    const LIMIT: Duration = Duration::from_secs(10);

    fn by() -> Peer {
        Peer { worker: "decode".into(), incarnation: 1, link: "here:1".into() }
    }

    fn lost(reason: &str) -> Action {
        Action::Lost(H, reason.into())
    }

    /// What one step makes happen.
    fn acts(step: impl FnOnce(&mut Vec<Action>)) -> Vec<Action> {
        let mut out = Vec::new();
        step(&mut out);
        out
    }

    #[test]
    fn what_is_wanted_comes_or_is_lost_once() {
        let mut fetches = Fetches::new(LIMIT);
        fetches.want(Duration::ZERO, LINK, H);
        fetches.came(H);
        assert_eq!(fetches.call_off(H), None, "it began");
        fetches.want(Duration::ZERO, LINK, H);
        assert_eq!(fetches.call_off(H), Some(LINK));
        fetches.want(Duration::ZERO, LINK, H);
        assert_eq!(acts(|out| assert!(!fetches.refused(LinkId(2), H, "no", out))), [], "it was not asked");
        assert_eq!(acts(|out| assert!(fetches.refused(LINK, H, "no", out))), [lost("no")]);
        fetches.want(Duration::ZERO, LINK, H);
        assert_eq!(acts(|out| fetches.link_lost(LinkId(2), "gone", out)), []);
        assert_eq!(acts(|out| fetches.link_lost(LINK, "gone", out)), [lost("gone")]);
        fetches.want(Duration::ZERO, LINK, H);
        assert_eq!(acts(|out| fetches.tick(LIMIT - Duration::from_millis(1), out)), []);
        assert_eq!(acts(|out| fetches.tick(LIMIT, out)), [lost("no answer within 10s")]);
        assert_eq!((acts(|out| fetches.tick(LIMIT, out)), fetches.live()), (vec![], 0));
    }

    #[test]
    fn what_is_asked_is_answered_once() {
        let mut fetches = Fetches::new(LIMIT);
        let ask = |fetches: &mut Fetches, handoff| {
            acts(|out| _ = fetches.ask(Duration::ZERO, (LINK, by()), handoff, vec![PageHash(7)], out))
        };
        let asked = |handoff| Action::Emit(Event::Asked { handoff, by: by(), pages: vec![PageHash(7)] });
        let refuse = |handoff, reason: &str| Action::Send(LINK, Message::Refuse { handoff, reason: reason.into() });
        assert_eq!(ask(&mut fetches, H), [asked(H)]);
        assert_eq!(ask(&mut fetches, H), [], "asked twice");
        assert_eq!(acts(|out| assert!(fetches.answer(H, None, out))), [], "begin is the answer");
        assert!(!fetches.answer(H, Some("late".into()), &mut Vec::new()));
        assert_eq!(ask(&mut fetches, H), [asked(H)]);
        assert_eq!(acts(|out| assert!(fetches.answer(H, Some("no".into()), out))), [refuse(H, "no")]);
        assert_eq!(ask(&mut fetches, H), [asked(H)]);
        assert!(!fetches.called_off(LinkId(2), H) && fetches.called_off(LINK, H) && !fetches.called_off(LINK, H));
        assert_eq!(ask(&mut fetches, H), [asked(H)]);
        assert_eq!(acts(|out| fetches.tick(LIMIT, out)), [refuse(H, "no answer within 10s")]);
        for handoff in (0..MOST_ASKED as u64).map(HandoffId) {
            assert_eq!(ask(&mut fetches, handoff), [asked(handoff)]);
        }
        let full = HandoffId(99);
        assert_eq!(ask(&mut fetches, full), [refuse(full, "64 others wait for an answer")]);
        assert_eq!(acts(|out| fetches.link_lost(LINK, "gone", out)), []);
        assert_eq!(fetches.live(), 0);
    }
}
