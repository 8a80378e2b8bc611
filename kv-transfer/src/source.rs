//! The source's half of a hand-off: a pure state machine.
//!
//! ```text
//!            Opened             commit, all frames out        Acked or settled
//! Offered ───────────► Moving ─────────────────────► Committed ───────────────► done: Landed
//!    │                   │                               │
//!    └─── refused, called off, link lost, deadline ──────┘
//!                        ▼
//!                    Draining ── last frame in flight comes back ──► done: Forgone | Refused | Aborted | Expired
//! ```
//!
//! | state     | who must act                       | deadline passes                                   |
//! |-----------|------------------------------------|---------------------------------------------------|
//! | Offered   | the target's worker                | Abort, Expired                                    |
//! | Moving    | this worker (push) and the link    | Abort, Expired                                    |
//! | Committed | the target                         | Abort, Expired                                    |
//! | Draining  | this side's transport              | the link is dropped, which ends every frame on it |
//!
//! Frames in flight read the source's pages, so a hand-off is not done before the last of them has come back, whatever
//! happened. After that, and only then, `Quiet` tells the target that nothing more of it can land.
//!
//! Over shared memory a source settles the hand-off by itself, in a [word](crate::words) of the target's, and is done: all is written, in
//! a landing that was open. Whether the sequence then runs, the target's worker knows; as after an `Ack`. With digests it waits to be told.
//!
//! A link lost after `Commit` leaves the source without knowledge: the target may own the sequence. It ends as Aborted here;
//! the pages are free either way, because the target has its own copy.

use crate::{
    Begin, Commit, HandoffId, Outcome, Overlapped,
    coverage::Coverage,
    digest::Digest,
    message::{Message, Sent},
    overlap::{Overlap, group_bytes, least_frame_bytes},
    plan::{self, Piece, Terms},
};
use kv_cache::{PageId, PageLayout};
use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

/// Frames of one hand-off that may be in flight at once: enough to keep every stream of a link busy.
const WINDOW: u32 = 16;

/// Largest frame, where a block is no larger: what is called off need not wait long for those in flight, and streams end together.
const MOST_FRAME_BYTES: usize = 1 << 20;

/// How long the link or the target gets to say why a frame was lost, before "lost" must do as the reason.
const EXPLANATION: Duration = Duration::from_millis(500);

/// How long states last and how blocks are grouped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest wait for `Open`.
    pub(crate) open: Duration,
    /// Longest wait without progress afterwards.
    pub(crate) progress: Duration,
    /// Blocks are gathered up to this many bytes before any leave; `None` = as [`group_bytes`] finds best.
    pub(crate) group_bytes: Option<usize>,
    /// Frames that a group leaves as, so that all streams of the link share it.
    pub(crate) group_frames: usize,
}

/// Blocks that travel as one. They are read from the source's pool when their turn comes, not before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// The attempt.
    pub(crate) handoff: HandoffId,
    /// Number within the hand-off, from 0.
    pub(crate) sequence: u32,
    /// Which blocks.
    pub(crate) pieces: Vec<Piece>,
    /// The sequence's pages here.
    pub(crate) pages: Arc<[PageId]>,
    /// The sequence's pages there. For transports that write into the target's memory.
    pub(crate) landing: Arc<[PageId]>,
}

/// What happens to a source.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// The worker finished these blocks.
    Push { layers: Range<u32>, pages: Range<u32> },
    /// The worker finished them all.
    Commit(Commit),
    /// The worker calls it off.
    Abort(String),
    /// The worker has no more need of it.
    Forgo,
    /// The target has a landing.
    Opened { landing: Vec<PageId>, have: u32, way: Way },
    /// The target will not take it.
    Refused(String),
    /// The target owns the sequence: it says so, or the hand-off is settled.
    Acked,
    /// The target called it off.
    PeerAborted(String),
    /// The transport no longer reads a frame's blocks; every byte is on its way.
    FrameSent { sequence: u32, digest: Option<Digest> },
    /// The transport no longer reads a frame's blocks; they did not all leave.
    FrameLost,
    /// The link is gone, or never came up; `refused` when the other end would not have it.
    LinkLost { reason: String, refused: bool },
    /// Time passed.
    Tick,
}

/// The way to the target.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// How our pages become pages of the target.
    pub(crate) terms: Arc<Terms>,
    /// How fast bytes have moved lately; 0 = not known yet.
    pub(crate) bytes_per_s: f64,
}

/// What a source wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say this to the target.
    Send(Message),
    /// Settle this in the word of that page of the target, if there is one, and tell the target that all frames left; answered by `Acked` where it
    /// is settled.
    Commit { sent: Sent, commit: Commit, word: Option<PageId> },
    /// Move these blocks; answered by `FrameSent` or `FrameLost`.
    Post(Frame),
    /// Drop frames that have not started; each is answered by `FrameLost`.
    Cancel,
    /// Close the link: nothing else ends what is in flight.
    DropLink(String),
    /// Over; the pages may be given back.
    Done(Outcome),
}

#[derive(Clone, Debug)]
enum State {
    Offered,
    /// `have`: travel pages that are there already.
    Moving {
        landing: Arc<[PageId]>,
        have: u32,
        way: Way,
    },
    Committed,
    Draining {
        outcome: Outcome,
        tell: bool,
    },
    Done,
}

/// One hand-off, seen from the worker that computed the pages.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    handoff: HandoffId,
    tokens: u32,
    pages: Arc<[PageId]>,
    layout: PageLayout,
    limits: Limits,
    state: State,
    deadline: Duration,
    pushed: Coverage,
    /// When the first push came, and the bytes of those after it.
    pace: Option<(Duration, u64)>,
    overlap: Overlap,
    /// Pushed and not yet cut into frames, as (layers, pages).
    gathered: Vec<(Range<u32>, Range<u32>)>,
    /// Cut and not yet posted.
    queue: VecDeque<Vec<Piece>>,
    /// A frame was lost, so this cannot land any more.
    broken: bool,
    in_flight: u32,
    /// By frame number, of all frames posted.
    digests: Vec<Option<Digest>>,
    committed: Option<(Duration, Commit)>,
}

impl Source {
    /// Starts a hand-off at `now` with asking the target for a landing.
    pub(crate) fn begin(
        now: Duration,
        begin: &Begin,
        layout: &PageLayout,
        limits: Limits,
        out: &mut Vec<Action>,
    ) -> Self {
        let mut source = Self {
            handoff: begin.handoff,
            tokens: begin.tokens,
            pages: begin.pages.as_slice().into(),
            layout: layout.clone(),
            limits,
            state: State::Offered,
            deadline: now + limits.open,
            pushed: Coverage::new(layout.layers, 0),
            pace: None,
            overlap: Overlap::default(),
            gathered: Vec::new(),
            queue: VecDeque::new(),
            broken: false,
            in_flight: 0,
            digests: Vec::new(),
            committed: None,
        };
        if layout.pages_for(begin.tokens as usize) == begin.pages.len() && fit(&begin.pages, layout) {
            source.pushed = Coverage::new(layout.layers, begin.pages.len() as u32);
            out.push(Action::Send(Message::Begin { handoff: begin.handoff, tokens: begin.tokens }));
        } else {
            let reason = format!("{} pages were given for {} tokens", begin.pages.len(), begin.tokens);
            source.end(now, Outcome::Aborted(reason), false, out);
        }
        source
    }

    /// Returns when [`Input::Tick`] has something to say.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Says whether it is over.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Returns when the worker committed.
    pub(crate) fn committed_at(&self) -> Option<Duration> {
        self.committed.as_ref().map(|(at, _)| *at)
    }

    /// Returns the time spent moving until `now`, and what of it was hidden by computing.
    pub(crate) fn overlapped(&self, now: Duration) -> Overlapped {
        Overlapped { moved: self.overlap.moved(now), hidden: self.overlap.hidden() }
    }

    /// Takes one input at `now` and appends what to do about it. Returns whether the input meant anything in this state.
    pub(crate) fn step(&mut self, now: Duration, input: Input, out: &mut Vec<Action>) -> bool {
        let of_interest = self.take(now, input, out);
        self.overlap.set_moving(now, self.in_flight > 0 || matches!(self.state, State::Committed));
        of_interest
    }

    fn take(&mut self, now: Duration, input: Input, out: &mut Vec<Action>) -> bool {
        match input {
            Input::Push { layers, pages } => self.push(now, layers, pages, out),
            Input::Commit(commit) => self.commit(now, commit, out),
            Input::Abort(reason) => self.call_off(now, Outcome::Aborted(reason), out),
            Input::Forgo => self.call_off(now, Outcome::Forgone, out),
            Input::Opened { landing, have, way } => return self.opened(now, landing, have, way, out),
            Input::Refused(reason) => return self.told_off(now, Outcome::Refused(reason), out),
            Input::PeerAborted(reason) => return self.told_off(now, Outcome::Aborted(reason), out),
            Input::Acked => return self.acked(out),
            Input::FrameSent { sequence, digest } => self.frame_sent(now, sequence, digest, out),
            Input::FrameLost => self.frame_lost(now, out),
            Input::LinkLost { reason, refused } => self.link_lost(now, reason, refused, out),
            Input::Tick if now >= self.deadline => self.expire(now, out),
            Input::Tick => {}
        }
        true
    }

    fn push(&mut self, now: Duration, layers: Range<u32>, pages: Range<u32>, out: &mut Vec<Action>) {
        if self.committed.is_some() || !matches!(self.state, State::Offered | State::Moving { .. }) {
            return;
        }
        for layer in layers.clone() {
            if !self.pushed.mark(&Piece { layer, pages: pages.clone() }) {
                let reason = format!("layer {layer} of pages {pages:?} was pushed twice or lies outside");
                return self.call_off(now, Outcome::Aborted(reason), out);
            }
        }
        self.overlap.pushed(now);
        let bytes = (layers.len() * pages.len() * self.layout.block_bytes()) as u64;
        self.pace = Some(self.pace.map_or((now, 0), |(first, pushed)| (first, pushed + bytes)));
        let last_layer = layers.end == self.layout.layers;
        match self.gathered.last_mut() {
            Some(last) if last.1 == pages && last.0.end == layers.start => last.0.end = layers.end,
            _ => self.gathered.push((layers, pages)),
        }
        self.advance(now, last_layer, out);
    }

    fn commit(&mut self, now: Duration, commit: Commit, out: &mut Vec<Action>) {
        if self.committed.is_none() && matches!(self.state, State::Offered | State::Moving { .. }) {
            self.committed = Some((now, commit));
            self.advance(now, true, out);
        }
    }

    fn opened(&mut self, now: Duration, landing: Vec<PageId>, have: u32, way: Way, out: &mut Vec<Action>) -> bool {
        let terms = &way.terms;
        if !matches!(self.state, State::Offered) {
            return false;
        }
        let wanted = terms.target.pool.pages_for(self.tokens as usize);
        if landing.len() != wanted || have as usize > wanted || !fit(&landing, &terms.target.pool) {
            let reason = format!("landing of {} pages, {have} there, does not fit {wanted}", landing.len());
            self.call_off(now, Outcome::Aborted(reason), out);
            return true;
        }
        let have = terms.target.travel_of(0..have).end.min(terms.travel_pages(self.tokens));
        self.state = State::Moving { landing: landing.into(), have, way };
        // What was pushed while waiting has waited long enough.
        self.advance(now, true, out);
        true
    }

    fn acked(&mut self, out: &mut Vec<Action>) -> bool {
        let expected = matches!(self.state, State::Committed);
        if expected {
            self.state = State::Done;
            out.push(Action::Done(Outcome::Landed));
        }
        expected
    }

    fn frame_sent(&mut self, now: Duration, sequence: u32, digest: Option<Digest>, out: &mut Vec<Action>) {
        self.in_flight -= 1;
        self.digests[sequence as usize] = digest;
        self.advance(now, false, out);
        self.settle(out);
    }

    fn frame_lost(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.in_flight -= 1;
        if matches!(self.state, State::Moving { .. }) && !std::mem::replace(&mut self.broken, true) {
            self.deadline = self.deadline.min(now + EXPLANATION);
        }
        self.settle(out);
    }

    fn link_lost(&mut self, now: Duration, reason: String, refused: bool, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Draining { tell, .. } => *tell = false,
            State::Done => {}
            _ if refused => self.end(now, Outcome::Refused(reason), false, out),
            _ => self.end(now, Outcome::Aborted(reason), false, out),
        }
    }

    fn expire(&mut self, now: Duration, out: &mut Vec<Action>) {
        let reason = match self.state {
            State::Offered => format!("no landing within {:?}", self.limits.open),
            State::Moving { .. } if self.broken => {
                return self.call_off(now, Outcome::Aborted("blocks could not be moved".into()), out);
            }
            State::Moving { .. } => format!("no progress for {:?}", self.limits.progress),
            State::Committed => format!("commit not acknowledged for {:?}", self.limits.progress),
            State::Draining { .. } => {
                self.deadline = Duration::MAX;
                return out
                    .push(Action::DropLink(format!("{} frames of hand-off {} hang", self.in_flight, self.handoff)));
            }
            State::Done => return,
        };
        self.call_off(now, Outcome::Expired(reason), out);
    }

    /// There was progress: cuts what was gathered into frames when there is enough of it (or `flush`), posts what the window
    /// allows, and says `Commit` after the last.
    fn advance(&mut self, now: Duration, flush: bool, out: &mut Vec<Action>) {
        let State::Moving { landing, have, way } = &self.state else { return };
        if self.broken {
            return;
        }
        let (landing, have, terms) = (landing.clone(), *have, way.terms.clone());
        let group = self.limits.group_bytes.unwrap_or_else(|| self.best_group(now, have, way));
        self.deadline = now + self.limits.progress;
        let gathered = self.gathered_bytes(have, &terms);
        if flush || gathered >= group {
            // What came all at once leaves in few frames, since each costs a report on both sides.
            let leaves = if self.limits.group_bytes.is_none() { gathered.max(group) } else { group };
            let most = self.limits.group_bytes.unwrap_or(usize::MAX).min(MOST_FRAME_BYTES);
            let least = least_frame_bytes(way.bytes_per_s).min(most);
            let frame = (leaves / self.limits.group_frames).clamp(least, MOST_FRAME_BYTES);
            let limit = (frame / terms.block_bytes()).max(1) as u32;
            let gathered = std::mem::take(&mut self.gathered);
            let travel = |pages| self.travel_of(pages, &terms);
            let pieces = gathered.into_iter().flat_map(|(layers, pages)| plan::pieces(layers, travel(pages), have));
            self.queue.extend(plan::frames(pieces, limit));
        }
        while self.in_flight < WINDOW
            && let Some(pieces) = self.queue.pop_front()
        {
            let (pages, landing) = (self.pages.clone(), landing.clone());
            let sequence = self.digests.len() as u32;
            self.digests.push(None);
            self.in_flight += 1;
            out.push(Action::Post(Frame { handoff: self.handoff, sequence, pieces, pages, landing }));
        }
        if self.in_flight == 0
            && self.queue.is_empty()
            && let Some((_, commit)) = self.committed.clone()
        {
            self.say_commit(now, (&landing, have), &terms, commit, out);
        }
    }

    fn say_commit(
        &mut self,
        now: Duration,
        (landing, have): (&[PageId], u32),
        terms: &Terms,
        commit: Commit,
        out: &mut Vec<Action>,
    ) {
        let pages = terms.travel_pages(self.tokens) - have;
        let blocks = u64::from(pages) * u64::from(self.layout.layers);
        let missing = if pages == 0 { 0 } else { self.pushed.missing_from(terms.source.page_of(have)) };
        if missing > 0 {
            let reason = format!("committed with {missing} blocks not pushed");
            return self.call_off(now, Outcome::Aborted(reason), out);
        }
        let sent = Sent {
            pages,
            bytes: blocks * terms.block_bytes() as u64,
            frames: self.digests.len() as u32,
            digest: self.digests.iter().copied().collect::<Option<Vec<_>>>().map(Digest::of_frames),
        };
        self.state = State::Committed;
        self.deadline = now + self.limits.progress;
        // A digest is for the target to compare.
        let word = landing.last().copied().filter(|_| pages > 0 && sent.digest.is_none());
        out.push(Action::Commit { sent, commit, word });
    }

    /// Ends it on our own account: the target hears `Abort` or `Forgo` first, and `Quiet` once that is true.
    fn call_off(&mut self, now: Duration, outcome: Outcome, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Draining { .. } | State::Done) {
            let (handoff, reason) = (self.handoff, outcome.reason().to_owned());
            let forgone = outcome == Outcome::Forgone;
            out.push(Action::Send(if forgone {
                Message::Forgo { handoff }
            } else {
                Message::Abort { handoff, reason }
            }));
            self.end(now, outcome, true, out);
        }
    }

    /// Ends it because the target said so. Returns whether it was still going.
    fn told_off(&mut self, now: Duration, outcome: Outcome, out: &mut Vec<Action>) -> bool {
        let going = !matches!(self.state, State::Draining { .. } | State::Done);
        if going {
            self.end(now, outcome, true, out);
        }
        going
    }

    fn end(&mut self, now: Duration, outcome: Outcome, tell: bool, out: &mut Vec<Action>) {
        self.gathered.clear();
        self.queue.clear();
        self.state = State::Draining { outcome, tell };
        self.deadline = now + self.limits.progress;
        if self.in_flight > 0 {
            out.push(Action::Cancel);
        }
        self.settle(out);
    }

    /// Leaves `Draining` once nobody reads the pages any more.
    fn settle(&mut self, out: &mut Vec<Action>) {
        if self.in_flight > 0 || !matches!(self.state, State::Draining { .. }) {
            return;
        }
        if let State::Draining { outcome, tell } = std::mem::replace(&mut self.state, State::Done) {
            if tell {
                out.push(Action::Send(Message::Quiet { handoff: self.handoff }));
            }
            out.push(Action::Done(outcome));
        }
    }

    fn gathered_bytes(&self, have: u32, terms: &Terms) -> usize {
        let blocks = |(layers, pages): &(Range<u32>, Range<u32>)| {
            let travel = self.travel_of(pages.clone(), terms);
            layers.len() as u64 * u64::from(travel.end.saturating_sub(travel.start.max(have)))
        };
        self.gathered.iter().map(blocks).sum::<u64>() as usize * terms.block_bytes()
    }

    fn best_group(&self, now: Duration, have: u32, way: &Way) -> usize {
        let blocks = u64::from(way.terms.travel_pages(self.tokens) - have) * u64::from(self.layout.layers);
        let per_s = |(first, bytes)| bytes as f64 / now.saturating_sub(first).as_secs_f64();
        let computed_per_s = self.pace.map(per_s).filter(|pace| pace.is_finite()).unwrap_or(0.0);
        group_bytes(blocks * way.terms.block_bytes() as u64, computed_per_s, way.bytes_per_s)
    }

    /// Returns the travel pages in our `pages`: those with tokens of the sequence.
    fn travel_of(&self, pages: Range<u32>, terms: &Terms) -> Range<u32> {
        let travel = terms.source.travel_of(pages);
        travel.start..travel.end.min(terms.travel_pages(self.tokens))
    }
}

/// Says whether all `pages` are distinct pages of a pool of this `layout`.
pub(crate) fn fit(pages: &[PageId], layout: &PageLayout) -> bool {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted.last().is_none_or(|last| last.0 < layout.pages) && sorted.windows(2).all(|pair| pair[0] != pair[1])
}

#[cfg(test)]
mod tests;
