use super::*;
use crate::{plan::Terms, testing::layout};

const H: HandoffId = HandoffId(1);
const PAGES: u32 = 4;
const LAYERS: u32 = 3;
const BLOCK: u64 = 384;

fn terms() -> Arc<Terms> {
    Terms::same(&layout(LAYERS, 8), &layout(LAYERS, 8))
}

/// A target and what it said so far. Time stands at `now`.
struct Run {
    target: Target,
    now: Duration,
    said: Vec<Action>,
}

impl Run {
    /// Stands in `Begun`.
    fn new() -> Self {
        let (open, progress) = (Duration::from_secs(10), Duration::from_secs(5));
        let limits = Limits { open, progress, group_bytes: None, group_frames: 1 };
        let mut said = Vec::new();
        let named = (H, "prefill".to_owned(), PAGES * 16);
        let target = Target::begun(Duration::ZERO, named, terms(), limits, &mut said);
        let begun = Event::Begun { handoff: H, from: "prefill".into(), tokens: PAGES * 16 };
        assert_eq!(said, [Action::Emit(begun)]);
        Self { target, now: Duration::ZERO, said: Vec::new() }
    }

    /// Opened, with the first page there already.
    fn landing() -> Self {
        let mut run = Self::new();
        let landing: Vec<PageId> = [5, 3, 6, 2].map(PageId).into();
        assert!(run.step(Input::Open { landing: landing.clone(), have: 1 }));
        let admit = Action::Admit { landing: landing.as_slice().into(), travel: 1..4 };
        let open = Action::Send(Message::Open { handoff: H, have: 1, landing });
        assert_eq!(run.said(), [admit, open], "writes are let in before the source is told");
        run
    }

    /// Everything is here and verified, the landing is being sealed.
    fn sealing() -> Self {
        let mut run = Self::landing();
        run.frame(0, 9);
        run.step(Input::Committed { sent: sent(), commit: commit(), settled: false });
        assert_eq!(run.said(), [Action::Seal { vouched: true }]);
        run
    }

    fn quarantine() -> Self {
        let mut run = Self::landing();
        run.step(Input::Abort(why("cancel")));
        assert_eq!(run.said(), [abort("cancel"), Action::Seal { vouched: false }]);
        run
    }

    fn frame(&mut self, sequence: u32, blocks: u64) {
        self.step(Input::FrameLanded { sequence, bytes: blocks * 384, digest: Some(Digest([sequence as u8; 8])) });
    }

    fn step(&mut self, input: Input) -> bool {
        self.target.step(self.now, input, &mut self.said)
    }

    fn said(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.said)
    }

    fn expire(&mut self) {
        self.now = self.target.deadline();
        self.step(Input::Tick);
    }
}

fn sent() -> Sent {
    let bytes = u64::from((PAGES - 1) * LAYERS) * BLOCK;
    Sent { pages: PAGES - 1, bytes, frames: 1, digest: Some(Digest::of_frames([Digest([0; 8])])) }
}

fn commit() -> Commit {
    Commit { first_token: 7 }
}

fn why(reason: &str) -> String {
    reason.to_owned()
}

fn abort(reason: &str) -> Action {
    Action::Send(Message::Abort { handoff: H, reason: reason.into() })
}

fn lost(reason: &str) -> Action {
    Action::Emit(Event::Lost { handoff: H, reason: reason.into() })
}

fn quiet() -> Action {
    Action::Emit(Event::Quiet { handoff: H })
}

fn seal() -> Action {
    Action::Seal { vouched: false }
}

#[test]
fn lands_when_everything_is_here_whatever_came_first() {
    for settled in [false, true] {
        let mut run = Run::landing();
        let sent = Sent { frames: 2, digest: None, ..sent() };
        run.step(Input::Committed { sent, commit: commit(), settled });
        run.step(Input::FrameLanded { sequence: 1, bytes: 4 * 384, digest: None });
        assert_eq!(run.said(), [], "five blocks are missing");
        run.step(Input::FrameLanded { sequence: 0, bytes: 5 * 384, digest: None });
        assert_eq!(run.said(), [Action::Seal { vouched: true }]);
        run.step(Input::Sealed);
        let ack = (!settled).then_some(Action::Send(Message::Ack { handoff: H }));
        let landed = Action::Emit(Event::Landed { handoff: H, commit: commit() });
        let expected: Vec<_> = ack.into_iter().chain([landed, Action::Done(End::Landed)]).collect();
        assert_eq!(run.said(), expected, "a source that has settled waits for nothing");
        assert!(run.target.is_done());
    }
}

#[test]
fn nothing_unverified_becomes_runnable() {
    let check = |sent: Sent, expected: &str| {
        let mut run = Run::landing();
        run.frame(0, 9);
        run.step(Input::Committed { sent, commit: commit(), settled: false });
        let refuse = Action::Send(Message::Refuse { handoff: H, reason: expected.into() });
        assert_eq!(run.said(), [refuse, lost(expected), Action::Seal { vouched: true }]);
        run.step(Input::Sealed);
        assert_eq!(run.said(), [quiet(), Action::Done(End::Refused)]);
    };
    check(Sent { pages: 4, ..sent() }, "verification: 4 pages of 3456 bytes were committed, 3 of 3456 asked for");
    check(Sent { bytes: 3, ..sent() }, "verification: 3 pages of 3 bytes were committed, 3 of 3456 asked for");
    check(Sent { frames: 2, ..sent() }, "verification: 2 frames were committed, 1 landed");
    let (landed, other) = (sent().digest.expect("set"), Digest([9; 8]));
    let digests = format!("verification: digest of the contents: sent Some({other:?}), landed Some({landed:?})");
    check(Sent { digest: Some(other), ..sent() }, &digests);
    let none = format!("verification: digest of the contents: sent None, landed Some({landed:?})");
    check(Sent { digest: None, ..sent() }, &none);
}

/// Every way to end without landing, from every state.
#[test]
fn every_state_ends_every_way() {
    type Make = fn() -> Run;
    let [aborted, refused, forgone] = [End::Aborted, End::Refused, End::Forgone].map(Action::Done);
    let refuse = Action::Send(Message::Refuse { handoff: H, reason: why("full") });
    let vouch = Action::Seal { vouched: true };
    let gone = "the source ended it";
    // It has settled, and will say nothing more.
    let committed = Input::Committed { sent: sent(), commit: commit(), settled: true };
    let committed_landing = || {
        let mut run = Run::landing();
        run.step(Input::Committed { sent: sent(), commit: commit(), settled: true });
        run
    };
    let cases: Vec<(&str, Make, Input, Vec<Action>)> = vec![
        ("begun", Run::new, Input::Refuse(why("full")), vec![refuse, refused]),
        ("begun", Run::new, Input::Abort(why("cancel")), vec![abort("cancel"), aborted.clone()]),
        ("begun", Run::new, Input::PeerAborted(why("x")), vec![lost("x"), aborted.clone()]),
        ("begun", Run::new, Input::PeerForwent, vec![lost(FORGONE), forgone.clone()]),
        ("begun", Run::new, Input::PeerQuiet, vec![lost(gone), aborted.clone()]),
        ("begun", Run::new, Input::LinkLost(why("x")), vec![lost("x"), aborted.clone()]),
        ("landing", Run::landing, Input::Abort(why("c")), vec![abort("c"), seal(), quiet(), aborted.clone()]),
        ("landing", Run::landing, Input::PeerAborted(why("x")), vec![lost("x"), seal(), quiet(), aborted.clone()]),
        ("landing", Run::landing, Input::PeerForwent, vec![lost(FORGONE), seal(), quiet(), forgone]),
        ("landing", Run::landing, Input::PeerQuiet, vec![lost(gone), seal(), vouch.clone(), quiet(), aborted.clone()]),
        ("landing", Run::landing, Input::LinkLost(why("x")), vec![lost("x"), seal(), quiet(), aborted.clone()]),
        ("sealing", Run::sealing, Input::Abort(why("c")), vec![abort("c"), vouch.clone(), quiet(), aborted.clone()]),
        (
            "sealing",
            Run::sealing,
            Input::PeerAborted(why("x")),
            vec![lost("x"), vouch.clone(), quiet(), aborted.clone()],
        ),
        ("sealing", Run::sealing, Input::LinkLost(why("x")), vec![lost("x"), vouch.clone(), quiet(), aborted.clone()]),
        ("quarantine", Run::quarantine, committed.clone(), vec![vouch.clone(), quiet(), aborted.clone()]),
        (
            "committed",
            committed_landing,
            Input::Abort(why("c")),
            vec![abort("c"), vouch.clone(), quiet(), aborted.clone()],
        ),
        ("quarantine", Run::quarantine, Input::Abort(why("again")), vec![quiet(), aborted.clone()]),
        ("quarantine", Run::quarantine, Input::PeerAborted(why("x")), vec![quiet(), aborted.clone()]),
        ("quarantine", Run::quarantine, Input::PeerQuiet, vec![vouch, quiet(), aborted.clone()]),
        ("quarantine", Run::quarantine, Input::LinkLost(why("x")), vec![quiet(), aborted]),
    ];
    for (state, make, input, expected) in cases {
        let mut run = make();
        assert!(run.step(input.clone()), "{state} {input:?}");
        if !run.target.is_done() {
            assert_eq!(run.target.quarantined_pages(), PAGES - 1, "{state} {input:?}");
            assert!(!run.said.contains(&quiet()), "{state} {input:?}: not sealed yet");
            run.step(Input::Sealed);
        }
        assert_eq!(run.said(), expected, "{state} {input:?}");
        assert!(run.target.is_done(), "{state} {input:?}");
        assert_eq!(run.target.quarantined_pages(), 0);
    }
}

#[test]
fn every_state_has_a_deadline_and_none_frees_pages() {
    let mut run = Run::new();
    run.expire();
    let reason = "no answer within 10s";
    assert_eq!(run.said(), [abort(reason), lost(reason), Action::Done(End::Expired)]);
    for (make, vouched) in [(Run::landing as fn() -> Run, false), (Run::sealing, true)] {
        let mut run = make();
        run.expire();
        let reason = "no progress for 5s";
        assert_eq!(run.said(), [abort(reason), lost(reason), Action::Seal { vouched }]);
        run.expire();
        let no_proof = "no proof that writes of hand-off 0000000000000001 have ended";
        assert_eq!(run.said(), [Action::DropLink(why(no_proof))]);
        assert_eq!(run.target.deadline(), Duration::MAX);
        run.now = Duration::from_secs(1_000_000);
        run.step(Input::Tick);
        run.step(Input::LinkLost(why("dropped")));
        assert_eq!((run.said(), run.target.quarantined_pages()), (vec![], PAGES - 1), "time is no proof");
        run.step(Input::Sealed);
        assert_eq!(run.said(), [quiet(), Action::Done(End::Expired)]);
    }
}

#[test]
fn blocks_move_the_deadline() {
    let mut run = Run::landing();
    assert_eq!(run.target.deadline(), Duration::from_secs(5));
    run.now = Duration::from_secs(4);
    run.frame(0, 1);
    assert_eq!(run.target.deadline(), Duration::from_secs(9));
}

#[test]
fn what_does_not_belong_is_ignored() {
    let mut run = Run::new();
    assert!(!run.step(Input::Committed { sent: sent(), commit: commit(), settled: true }), "before Open");
    run.frame(0, 9);
    run.step(Input::Sealed);
    assert_eq!(run.said(), []);
    let mut run = Run::landing();
    assert!(run.step(Input::Open { landing: vec![], have: 0 }), "the first answer stands");
    run.step(Input::Refuse(why("late")));
    run.step(Input::Sealed);
    assert_eq!(run.said(), []);
    let mut run = Run::sealing();
    assert!(!run.step(Input::Committed { sent: sent(), commit: commit(), settled: false }), "a second Commit");
    run.step(Input::Sealed);
    run.said();
    assert!(!run.step(Input::Open { landing: vec![], have: 0 }), "the caller owes a Quiet");
    assert!(!run.step(Input::PeerAborted(why("late"))));
    assert!(!run.step(Input::PeerQuiet));
    run.step(Input::Abort(why("late")));
    run.step(Input::LinkLost(why("late")));
    assert_eq!(run.said(), []);
}

#[test]
fn a_landing_that_does_not_fit_is_refused_for_the_worker() {
    for (landing, have) in [(vec![1, 2, 3], 0), (vec![1, 2, 3, 3], 0), (vec![1, 2, 3, 8], 0), (vec![1, 2, 3, 4], 5)] {
        let mut run = Run::new();
        run.step(Input::Open { landing: landing.into_iter().map(PageId).collect(), have });
        match &run.said()[..] {
            [Action::Send(Message::Refuse { .. }), Action::Emit(Event::Lost { .. }), end, done] => {
                assert_eq!((end, done), (&quiet(), &Action::Done(End::Refused)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn more_tokens_than_the_pool_holds_are_refused() {
    let limits = Run::new().target.limits;
    let mut said = Vec::new();
    let target = Target::begun(Duration::ZERO, (H, why("prefill"), 129), terms(), limits, &mut said);
    let reason = why("129 tokens need 9 pages of 8");
    assert_eq!(said, [Action::Send(Message::Refuse { handoff: H, reason }), Action::Done(End::Refused)]);
    assert!(target.is_done());
}
