//! One rule each, over a real scheduler with pages of 4 tokens.

use super::*;
use attach::StreamId;
use engine::{
    Sampling,
    scheduler::{self, History, Stop, Until},
};

const NOW: Duration = Duration::ZERO;
const ID: HandoffId = HandoffId(0xabc);
const LIMITS: Limits = Limits {
    begun_wait: Duration::from_secs(3),
    expected_wait: Duration::from_secs(60),
    queue_wait: Duration::from_secs(6),
    waiting: 2,
};

struct World {
    scheduler: Scheduler,
    reservations: Reservations,
}

fn leg(attempt: u64) -> LegId {
    LegId { stream: StreamId(1), attempt }
}

fn awaited(attempt: u64, tokens: u32) -> Awaited {
    let request = Request {
        history: History::new(b"", (0..tokens).map(|token| token + attempt as u32 * 1000).collect(), 4),
        prompt_tokens: tokens as usize,
        adapter: None,
        sampling: Sampling::default(),
        stop: Stop { max_tokens: 9, ..Default::default() },
        grammar: None,
        prompt_logprobs: None,
        priority: 0,
        until: Until::End,
    };
    Awaited { leg: leg(attempt), source: "p".into(), request, arrived: NOW }
}

impl World {
    /// A worker of `pages` pages.
    fn new(pages: usize) -> Self {
        let limits = scheduler::Limits {
            pages,
            page_tokens: 4,
            token_budget: 64,
            max_sequences: 8,
            max_model_len: 1000,
            max_waiting: 8,
        };
        Self { scheduler: Scheduler::new(limits).unwrap(), reservations: Reservations::new(LIMITS) }
    }

    fn expect(&mut self, id: HandoffId, awaited: Awaited) -> Vec<Action> {
        self.reservations.expect(id, awaited, NOW, &mut self.scheduler);
        self.settle()
    }

    fn begun(&mut self, id: HandoffId, tokens: usize) -> Vec<Action> {
        self.reservations.begun(id, "p".into(), tokens, NOW, &mut self.scheduler);
        self.settle()
    }

    fn cancel(&mut self, id: HandoffId) -> Vec<Action> {
        self.reservations.cancel(id, "cancelled", &mut self.scheduler);
        self.settle()
    }

    fn expire(&mut self, seconds: u64) -> Vec<Action> {
        self.reservations.expire(Duration::from_secs(seconds));
        self.settle()
    }

    fn settle(&mut self) -> Vec<Action> {
        self.reservations.open(&mut self.scheduler);
        self.reservations.take_actions()
    }

    fn held(&self) -> usize {
        self.scheduler.pool().stats().held()
    }

    /// Brings hand-off `id` of 5 tokens to its landing.
    fn landing(&mut self, id: HandoffId, attempt: u64) {
        self.expect(id, awaited(attempt, 5));
        let actions = self.begun(id, 5);
        assert!(matches!(actions[..], [Action::Open { .. }]), "{actions:?}");
    }
}

fn open(handoff: HandoffId, pages: std::ops::Range<u32>, have: usize) -> Action {
    Action::Open { handoff, pages: pages.map(PageId).collect(), have }
}

fn refuse(handoff: HandoffId, reason: &str) -> Action {
    Action::Refuse { handoff, reason: reason.into() }
}

fn failed(attempt: u64, reason: &str) -> Action {
    Action::End { leg: leg(attempt), end: End::Failed(reason.into()) }
}

fn refused(attempt: u64, reason: &str) -> Action {
    Action::End { leg: leg(attempt), end: End::Refused(reason.into()) }
}

#[test]
fn either_order_opens_a_landing() {
    let mut world = World::new(8);
    assert_eq!(world.expect(ID, awaited(1, 5)), []);
    assert_eq!(world.begun(ID, 5), [open(ID, 0..2, 0)]);

    let mut world = World::new(8);
    assert_eq!(world.begun(ID, 5), []);
    assert_eq!(world.expect(ID, awaited(1, 5)), [open(ID, 0..2, 0)]);
}

#[test]
fn what_has_landed_runs_at_the_next_step() {
    let mut world = World::new(8);
    world.landing(ID, 1);
    world.reservations.landed(ID, 7, &mut world.scheduler);
    let actions = world.settle();
    let [Action::Run { leg: landed, sequence }] = actions[..] else { panic!("{actions:?}") };
    assert_eq!(landed, leg(1));
    let plan = world.scheduler.schedule(NOW);
    let chunk = plan.chunks()[0];
    assert_eq!((chunk.id, chunk.start, chunk.tokens, chunk.sample), (sequence, 5, 1, true));
    world.scheduler.abandon(plan);
}

#[test]
fn what_is_cached_is_not_sent_again() {
    let mut world = World::new(8);
    world.landing(ID, 1);
    world.reservations.landed(ID, 7, &mut world.scheduler);
    world.settle();
    // The same prompt again: its one full page is shared.
    let again = HandoffId(2);
    world.expect(again, awaited(1, 5));
    let actions = world.begun(again, 5);
    assert_eq!(actions, [Action::Open { handoff: again, pages: vec![PageId(0), PageId(2)], have: 1 }]);
}

#[test]
fn both_sides_must_mean_the_same() {
    let mut world = World::new(8);
    world.expect(ID, awaited(1, 5));
    let problem = "5 tokens expected, 6 begun";
    assert_eq!(world.begun(ID, 6), [failed(1, problem), refuse(ID, problem)]);

    world.expect(ID, Awaited { source: "other".into(), ..awaited(1, 5) });
    let problem = "expected from other, begun by p";
    assert_eq!(world.begun(ID, 5), [failed(1, problem), refuse(ID, problem)]);
    assert_eq!(world.held(), 0);
}

#[test]
fn a_silent_router_or_source_is_not_waited_for_forever() {
    let mut world = World::new(8);
    world.begun(ID, 5);
    assert_eq!(world.reservations.next_deadline(), Some(LIMITS.begun_wait));
    assert_eq!(world.expire(2), []);
    assert_eq!(world.expire(3), [refuse(ID, "no router submitted it within 3s")]);

    world.expect(ID, awaited(1, 5));
    let reason = "p did not begin the hand-off within 60s";
    let abort = Action::Abort { handoff: ID, reason: reason.into() };
    assert_eq!(world.expire(60), [failed(1, reason), abort]);
    assert_eq!(world.reservations.next_deadline(), None);
}

#[test]
fn the_queue_for_pages_is_in_order_and_bounded() {
    let mut world = World::new(4);
    world.landing(HandoffId(1), 1);
    // Two pages are left, one of which the first may grow into.
    for (id, tokens) in [(2, 8), (3, 1)] {
        world.expect(HandoffId(id), awaited(id, tokens));
        assert_eq!(world.begun(HandoffId(id), tokens as usize), [], "no page for {id}, or not its turn");
    }
    world.expect(HandoffId(4), awaited(4, 5));
    let full = "2 sequences wait for pages already";
    assert_eq!(world.begun(HandoffId(4), 5), [refused(4, full), refuse(HandoffId(4), full)]);

    // The first one gives up its place, and with it the page it might have grown into; its own pages are in quarantine.
    let abort = Action::Abort { handoff: HandoffId(1), reason: "cancelled".into() };
    assert_eq!(world.cancel(HandoffId(1)), [abort, open(HandoffId(2), 2..4, 0)]);
    world.reservations.quiet(HandoffId(1), &mut world.scheduler);
    assert_eq!(world.settle(), [open(HandoffId(3), 0..1, 0)]);
}

#[test]
fn pages_that_do_not_come_are_a_refusal() {
    let mut world = World::new(4);
    world.landing(HandoffId(1), 1);
    world.expect(HandoffId(2), awaited(2, 8));
    world.begun(HandoffId(2), 8);
    let reason = "no pages within 6s";
    assert_eq!(world.expire(6), [refused(2, reason), refuse(HandoffId(2), reason)]);
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut world = World::new(2);
    let reason = "8 tokens leave no room for output in sequences of at most 8";
    assert_eq!(world.expect(ID, awaited(1, 8)), [refused(1, reason)]);
    world.begun(ID, 8);
    assert_eq!(world.expect(ID, awaited(1, 8)), [refused(1, reason), refuse(ID, reason)]);
}

#[test]
fn a_lost_landing_stays_in_quarantine_until_quiet() {
    let mut world = World::new(8);
    world.landing(ID, 1);
    world.reservations.lost(ID, "link closed".into(), &mut world.scheduler);
    assert_eq!(world.settle(), [failed(1, "hand-off from p lost: link closed")]);
    assert_eq!(world.held(), 2);
    world.reservations.quiet(ID, &mut world.scheduler);
    assert_eq!(world.held(), 0);
}

#[test]
fn a_cancel_in_any_state_gives_all_pages_back() {
    let mut world = World::new(8);
    world.expect(ID, awaited(1, 5));
    assert_eq!(world.cancel(ID), [Action::Abort { handoff: ID, reason: "cancelled".into() }]);

    // Queued behind a full pool.
    let mut world = World::new(3);
    world.landing(HandoffId(1), 1);
    world.expect(ID, awaited(2, 5));
    world.begun(ID, 5);
    assert_eq!(world.cancel(ID), [refuse(ID, "cancelled")]);
    assert_eq!(world.reservations.in_flight(), 1);

    // On its way: back when quiet, or when the landing had already happened.
    for late_landing in [false, true] {
        let mut world = World::new(8);
        world.landing(ID, 1);
        assert_eq!(world.cancel(ID), [Action::Abort { handoff: ID, reason: "cancelled".into() }]);
        assert_eq!(world.held(), 2);
        if late_landing {
            world.reservations.landed(ID, 7, &mut world.scheduler);
        } else {
            world.reservations.quiet(ID, &mut world.scheduler);
        }
        assert_eq!(world.settle(), []);
        assert_eq!(world.held(), 0);
    }
}

#[test]
fn news_of_unknown_hand_offs_is_ignored() {
    let mut world = World::new(8);
    world.reservations.landed(ID, 7, &mut world.scheduler);
    world.reservations.lost(ID, "gone".into(), &mut world.scheduler);
    world.reservations.quiet(ID, &mut world.scheduler);
    assert_eq!(world.cancel(ID), []);
    assert_eq!(world.begun(ID, 5), []);
    assert_eq!(world.begun(ID, 5), [refuse(ID, "this hand-off was begun before")]);
}
