use super::*;
use crate::testing::layout;

const H: HandoffId = HandoffId(1);
const PAGES: u32 = 4;
const LAYERS: u32 = 3;
const BLOCK: usize = 384;

fn limits() -> Limits {
    let (open, progress) = (Duration::from_secs(10), Duration::from_secs(5));
    Limits { open, progress, group_bytes: Some(4 * BLOCK), group_frames: 1 }
}

fn way() -> Way {
    Way { terms: Terms::same(&layout(LAYERS, 8), &layout(LAYERS, 20)), bytes_per_s: 0.0 }
}

/// A source and what it said so far. Time stands at `now`.
struct Run {
    source: Source,
    now: Duration,
    said: Vec<Action>,
}

impl Run {
    /// Stands in `Offered`.
    fn new() -> Self {
        let pages: Vec<PageId> = (0..PAGES).map(PageId).collect();
        let target = crate::Peer { worker: "decode".into(), incarnation: 1, link: String::new() };
        let begin = Begin { handoff: H, targets: vec![target], tokens: PAGES * 16, pages };
        let mut said = Vec::new();
        let source = Source::begin(Duration::ZERO, &begin, &layout(LAYERS, 8), limits(), &mut said);
        assert_eq!(said, [Action::Send(Message::Begin { handoff: H, tokens: PAGES * 16 })]);
        Self { source, now: Duration::ZERO, said: Vec::new() }
    }

    fn step(&mut self, input: Input) -> bool {
        self.source.step(self.now, input, &mut self.said)
    }

    /// Takes what was said since.
    fn said(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.said)
    }

    fn open(&mut self) {
        assert!(self.step(Input::Opened { landing: (10..10 + PAGES).map(PageId).collect(), have: 0, way: way() }));
    }

    fn push_all(&mut self) {
        self.step(Input::Push { layers: 0..LAYERS, pages: 0..PAGES });
    }

    /// Opened, one group of three frames in flight.
    fn moving() -> Self {
        let mut run = Self::new();
        run.open();
        run.push_all();
        assert_eq!(sequences(&run.said()), [0, 1, 2]);
        run
    }

    /// `Commit` was said.
    fn committed() -> Self {
        let mut run = Self::moving();
        run.step(Input::Commit(Commit { first_token: 7 }));
        (0..3).for_each(|sequence| _ = run.step(Input::FrameSent { sequence, digest: None }));
        assert!(matches!(run.said()[..], [Action::Commit { word: Some(_), .. }]));
        run
    }

    fn expire(&mut self) {
        self.now = self.source.deadline();
        self.step(Input::Tick);
    }
}

fn sequences(actions: &[Action]) -> Vec<u32> {
    let posted = |action: &Action| match action {
        Action::Post(frame) => frame.sequence,
        other => panic!("{other:?}"),
    };
    actions.iter().map(posted).collect()
}

fn abort(reason: &str) -> Action {
    Action::Send(Message::Abort { handoff: H, reason: reason.into() })
}

fn forgo() -> Action {
    Action::Send(Message::Forgo { handoff: H })
}

fn quiet() -> Action {
    Action::Send(Message::Quiet { handoff: H })
}

fn done(outcome: Outcome) -> Action {
    Action::Done(outcome)
}

fn lost(refused: bool) -> Input {
    Input::LinkLost { reason: "gone".into(), refused }
}

fn why(reason: &str) -> String {
    reason.to_owned()
}

#[test]
fn lands_when_acknowledged() {
    let mut run = Run::committed();
    assert!(run.step(Input::Acked));
    assert_eq!(run.said(), [done(Outcome::Landed)]);
    assert!(run.source.is_done());
}

#[test]
fn commit_says_what_was_sent() {
    let mut run = Run::new();
    run.step(Input::Commit(Commit { first_token: 7 }));
    run.step(Input::Opened { landing: (0..PAGES).map(PageId).collect(), have: PAGES, way: way() });
    let sent = Sent { pages: 0, bytes: 0, frames: 0, digest: Some(Digest::of_frames([])) };
    let commit = Commit { first_token: 7 };
    // Nothing was pushed, and nothing had to be.
    assert_eq!(run.said(), [Action::Commit { sent, commit, word: None }]);

    let mut run = Run::moving();
    run.step(Input::Commit(Commit { first_token: 8 }));
    let digests = [Digest([1; 8]), Digest([2; 8]), Digest([3; 8])];
    for sequence in [2, 0, 1] {
        assert!(run.said().is_empty(), "frames are still in flight");
        run.step(Input::FrameSent { sequence, digest: Some(digests[sequence as usize]) });
    }
    let bytes = u64::from(PAGES * LAYERS) * BLOCK as u64;
    let sent = Sent { pages: PAGES, bytes, frames: 3, digest: Some(Digest::of_frames(digests)) };
    let commit = Commit { first_token: 8 };
    assert_eq!(run.said(), [Action::Commit { sent, commit, word: None }]);
}

#[test]
fn blocks_are_gathered_into_groups() {
    let mut run = Run::new();
    run.open();
    run.step(Input::Push { layers: 0..1, pages: 0..3 });
    assert_eq!(run.said(), [], "three blocks of four");
    run.step(Input::Push { layers: 1..2, pages: 0..3 });
    assert_eq!(sequences(&run.said()), [0, 1], "six blocks, four a frame");
    run.step(Input::Push { layers: 2..3, pages: 0..1 });
    assert_eq!(sequences(&run.said()), [2], "the last layer is done: nothing more will come soon");
    run.step(Input::Push { layers: 0..1, pages: 3..4 });
    assert_eq!(run.said(), []);
}

#[test]
fn what_was_pushed_before_the_landing_leaves_with_it() {
    let mut run = Run::new();
    run.step(Input::Push { layers: 0..1, pages: 0..1 });
    run.step(Input::Push { layers: 0..1, pages: 1..3 });
    assert_eq!(run.said(), []);
    run.step(Input::Opened { landing: (0..PAGES).map(PageId).collect(), have: 2, way: way() });
    match &run.said()[..] {
        [Action::Post(frame)] => assert_eq!(frame.pieces, [Piece { layer: 0, pages: 2..3 }]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_window_bounds_frames_in_flight() {
    let mut run = Run::new();
    run.source.limits.group_bytes = Some(1);
    run.source.layout.layers = 10;
    run.source.pushed = Coverage::new(10, PAGES);
    run.open();
    run.step(Input::Push { layers: 0..10, pages: 0..PAGES });
    assert_eq!(sequences(&run.said()), (0..WINDOW).collect::<Vec<_>>());
    run.step(Input::FrameSent { sequence: 3, digest: None });
    assert_eq!(sequences(&run.said()), [WINDOW]);
}

/// Every way to end, from every state: (state, input, what is said, whether frames must come back first).
#[test]
fn every_state_ends_every_way() {
    type Make = fn() -> Run;
    let cases: Vec<(&str, Make, Input, Vec<Action>)> = vec![
        ("offered", Run::new, Input::Refused(why("full")), vec![quiet(), done(Outcome::Refused(why("full")))]),
        ("offered", Run::new, Input::PeerAborted(why("no")), vec![quiet(), done(Outcome::Aborted(why("no")))]),
        ("offered", Run::new, lost(true), vec![done(Outcome::Refused(why("gone")))]),
        ("offered", Run::new, lost(false), vec![done(Outcome::Aborted(why("gone")))]),
        (
            "offered",
            Run::new,
            Input::Abort(why("cancel")),
            vec![abort("cancel"), quiet(), done(Outcome::Aborted(why("cancel")))],
        ),
        ("offered", Run::new, Input::Forgo, vec![forgo(), quiet(), done(Outcome::Forgone)]),
        ("moving", Run::moving, Input::Forgo, vec![forgo(), Action::Cancel, quiet(), done(Outcome::Forgone)]),
        (
            "moving",
            Run::moving,
            Input::Refused(why("bad")),
            vec![Action::Cancel, quiet(), done(Outcome::Refused(why("bad")))],
        ),
        (
            "moving",
            Run::moving,
            Input::PeerAborted(why("x")),
            vec![Action::Cancel, quiet(), done(Outcome::Aborted(why("x")))],
        ),
        ("moving", Run::moving, lost(false), vec![Action::Cancel, done(Outcome::Aborted(why("gone")))]),
        (
            "moving",
            Run::moving,
            Input::Abort(why("cancel")),
            vec![abort("cancel"), Action::Cancel, quiet(), done(Outcome::Aborted(why("cancel")))],
        ),
        (
            "committed",
            Run::committed,
            Input::Refused(why("digest")),
            vec![quiet(), done(Outcome::Refused(why("digest")))],
        ),
        ("committed", Run::committed, Input::PeerAborted(why("x")), vec![quiet(), done(Outcome::Aborted(why("x")))]),
        ("committed", Run::committed, lost(false), vec![done(Outcome::Aborted(why("gone")))]),
        (
            "committed",
            Run::committed,
            Input::Abort(why("late")),
            vec![abort("late"), quiet(), done(Outcome::Aborted(why("late")))],
        ),
    ];
    for (state, make, input, expected) in cases {
        let mut run = make();
        assert!(run.step(input.clone()), "{state} {input:?}");
        for _ in 0..run.source.in_flight {
            assert!(
                !run.said.iter().any(|action| matches!(action, Action::Done(_))),
                "{state} {input:?}: pages are read"
            );
            run.step(Input::FrameLost);
        }
        assert_eq!(run.said(), expected, "{state} {input:?}");
        assert!(run.source.is_done(), "{state} {input:?}");
    }
}

#[test]
fn every_state_has_a_deadline() {
    let expired = |reason: &str| done(Outcome::Expired(why(reason)));
    let mut run = Run::new();
    run.expire();
    assert_eq!(run.now, Duration::from_secs(10));
    assert_eq!(run.said(), [abort("no landing within 10s"), quiet(), expired("no landing within 10s")]);

    let mut run = Run::moving();
    run.expire();
    assert_eq!(run.now, Duration::from_secs(5));
    assert_eq!(run.said(), [abort("no progress for 5s"), Action::Cancel]);
    run.expire();
    assert_eq!(run.now, Duration::from_secs(10));
    assert_eq!(run.said(), [Action::DropLink(why("3 frames of hand-off 0000000000000001 hang"))]);
    assert_eq!(run.source.deadline(), Duration::MAX, "nothing but the frames coming back ends it");
    run.step(lost(false));
    (0..3).for_each(|_| _ = run.step(Input::FrameLost));
    assert_eq!(run.said(), [expired("no progress for 5s")], "nobody is there to hear Quiet");

    let mut run = Run::committed();
    run.expire();
    let reason = "commit not acknowledged for 5s";
    assert_eq!(run.said(), [abort(reason), quiet(), expired(reason)]);
}

/// A lost frame is the end, but the reason is usually a moment away.
#[test]
fn a_lost_frame_waits_for_its_reason_and_never_commits() {
    let broken = || {
        let mut run = Run::moving();
        run.step(Input::Commit(Commit { first_token: 7 }));
        run.step(Input::FrameLost);
        run.step(Input::FrameSent { sequence: 0, digest: None });
        run.step(Input::FrameSent { sequence: 1, digest: None });
        assert_eq!(run.said(), []);
        assert_eq!(run.source.deadline(), EXPLANATION);
        run
    };
    let mut run = broken();
    run.step(lost(false));
    assert_eq!(run.said(), [done(Outcome::Aborted(why("gone")))]);
    let mut run = broken();
    run.step(Input::PeerAborted(why("cancelled")));
    assert_eq!(run.said(), [quiet(), done(Outcome::Aborted(why("cancelled")))]);
    let mut run = broken();
    run.expire();
    let reason = "blocks could not be moved";
    assert_eq!(run.said(), [abort(reason), quiet(), done(Outcome::Aborted(why(reason)))]);
}

#[test]
fn progress_moves_the_deadline() {
    let mut run = Run::new();
    run.now = Duration::from_secs(9);
    run.step(Input::Push { layers: 0..1, pages: 0..1 });
    assert_eq!(run.source.deadline(), Duration::from_secs(10), "pushing is not the target's answer");
    run.open();
    assert_eq!(run.source.deadline(), Duration::from_secs(14));
    run.now = Duration::from_secs(13);
    run.step(Input::FrameSent { sequence: 0, digest: None });
    assert_eq!(run.source.deadline(), Duration::from_secs(18));
    run.now = Duration::from_secs(17);
    run.step(Input::Tick);
    assert_eq!(run.source.deadline(), Duration::from_secs(18));
    run.step(Input::Push { layers: 2..3, pages: 0..1 });
    assert_eq!(run.source.deadline(), Duration::from_secs(22));
}

#[test]
fn what_does_not_belong_is_ignored() {
    let mut run = Run::new();
    assert!(!run.step(Input::Acked));
    run.open();
    assert!(!run.step(Input::Opened { landing: vec![], have: 0, way: way() }), "a second landing");
    assert!(!run.step(Input::Acked), "before Commit");
    assert_eq!(run.said(), []);
    let mut run = Run::committed();
    run.push_all();
    run.step(Input::Commit(Commit { first_token: 9 }));
    assert_eq!(run.said(), []);
    run.step(Input::Acked);
    run.said();
    for late in [Input::Acked, Input::Refused(why("x")), Input::PeerAborted(why("x"))] {
        assert!(!run.step(late.clone()), "{late:?}");
    }
    run.step(Input::Abort(why("x")));
    run.step(lost(false));
    assert_eq!(run.said(), []);
}

#[test]
fn mistakes_of_the_worker_end_it() {
    let outcome = |run: &mut Run| match run.said().pop() {
        Some(Action::Done(Outcome::Aborted(reason))) => reason,
        other => panic!("{other:?}"),
    };
    let mut run = Run::new();
    run.step(Input::Push { layers: 0..1, pages: 0..2 });
    run.step(Input::Push { layers: 0..1, pages: 1..3 });
    assert_eq!(outcome(&mut run), "layer 0 of pages 1..3 was pushed twice or lies outside");
    let mut run = Run::new();
    run.open();
    run.step(Input::Push { layers: 0..LAYERS, pages: 0..0 });
    assert_eq!(outcome(&mut run), "layer 0 of pages 0..0 was pushed twice or lies outside");
    let mut run = Run::new();
    run.open();
    run.step(Input::Commit(Commit { first_token: 0 }));
    assert_eq!(outcome(&mut run), "committed with 12 blocks not pushed");
    let mut run = Run::new();
    run.step(Input::Opened { landing: vec![PageId(0)], have: 0, way: way() });
    assert_eq!(outcome(&mut run), "landing of 1 pages, 0 there, does not fit 4");
}

#[test]
fn pages_must_fit_the_tokens_and_the_pool() {
    let layout = layout(1, 8);
    let outcome = |tokens: u32, pages: &[u32]| {
        let target = crate::Peer { worker: "decode".into(), incarnation: 1, link: String::new() };
        let pages = pages.iter().copied().map(PageId).collect();
        let mut out = Vec::new();
        let begin = Begin { handoff: H, targets: vec![target], tokens, pages };
        Source::begin(Duration::ZERO, &begin, &layout, limits(), &mut out);
        out
    };
    let refused = |said: Vec<Action>| matches!(said[..], [Action::Done(Outcome::Aborted(_))]);
    assert!(refused(outcome(17, &[1])), "too few");
    assert!(refused(outcome(17, &[1, 1])), "one twice");
    assert!(refused(outcome(17, &[1, 8])), "outside");
    assert!(!refused(outcome(17, &[1, 0])));
}
