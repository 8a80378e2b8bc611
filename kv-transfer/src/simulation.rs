//! Source and target on virtual time, with everything going wrong, from a seed.
//!
//! Two tables of hand-offs talk over a network that loses, repeats, delays and reorders messages (worse than the TCP below a
//! real link) and whose links die, noticed at different times by the two ends. Workers push, stall, cancel, refuse and forget
//! to answer. Blocks are written one at a time, so that anything can happen between two of them, and sometimes wrongly. The
//! target's pool is small: pages are reused at once, which is when a late write would do harm.
//!
//! What must always hold:
//! - a block is written only into a page that is, at that moment, in the landing of its own hand-off;
//! - the source's pages are read only between `begin` and `SourceDone`;
//! - what lands is what was pushed, and the source says Landed only if the target did, or if it has settled the hand-off;
//! - every hand-off ends exactly once per side, and all pages come back.
//!
//! Both ways of writing are simulated: by the target's permit (`memory`, `tcp`), through the real [`Landings`], and by the
//! source from outside (shared memory, RDMA), where only `Quiet`, `Commit`, a settled word or the source's proven death count as
//! sealing. The bytes are real: both pools are mapped, the target's by the source as well, and free pages are poisoned.

mod pools;

use crate::{
    Begin, Commit, Event, HandoffId, Outcome, Peer,
    digest::{Digest, FrameHasher},
    handoffs::{Action, Handoffs, LinkId, Moved, Request, Side},
    inbox::{Inbox, Note},
    landing::{Landing, Landings},
    message::Message,
    plan::{Piece, Terms},
    source::{Frame, Limits},
    target::End,
};
use futures::FutureExt;
use kv_cache::{PageId, PageLayout};
use pools::{End as Place, Pools, layout};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

const LAYERS: u32 = 2;
const TARGET_PAGES: u32 = 8;
/// Of one hand-off at most.
const MOST_PAGES: u32 = 3;
const SOURCE_PAGES: u32 = 30 * MOST_PAGES;
/// After this no more faults happen, so that what is left must end by itself.
const CALM: Duration = Duration::from_secs(20);
/// Everything must have ended by then: the longest way is through every deadline once.
const END: Duration = Duration::from_secs(60);

/// Who writes the target's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    ByPermit,
    OneSided,
    /// One-sided, without digests, and the source settles in words of the target's.
    Settling,
}

const WRITERS: [Writer; 3] = [Writer::ByPermit, Writer::OneSided, Writer::Settling];

/// How often things go wrong, in percent.
#[derive(Clone, Copy, Debug)]
struct Faults {
    lose: u32,
    repeat: u32,
    corrupt: u32,
    kill_links: u32,
    /// Workers that stall, cancel or refuse.
    workers: u32,
}

const NONE: Faults = Faults { lose: 0, repeat: 0, corrupt: 0, kill_links: 0, workers: 0 };
const ALL: Faults = Faults { lose: 3, repeat: 5, corrupt: 2, kill_links: 12, workers: 25 };

/// Something that happens at a time.
#[derive(Clone, Debug)]
enum Step {
    Begin(HandoffId),
    Push(HandoffId, Range<u32>, Range<u32>),
    Commit(HandoffId),
    AbortAtSource(HandoffId),
    Answer(HandoffId),
    AbortAtTarget(HandoffId),
    ToTarget(LinkId, Message),
    ToSource(LinkId, Message),
    WriteBlock(u64),
    Notify(HandoffId, Moved),
    KillLink(LinkId),
    SourceLosesLink(LinkId),
    TargetLosesLink(LinkId),
    Tick,
}

/// A frame on its way, block by block.
struct Flight {
    link: LinkId,
    frame: Frame,
    blocks: Vec<(u32, u32)>,
    written: usize,
}

/// What a hand-off did so far, as its workers saw it.
#[derive(Debug, Default)]
struct Record {
    pages: Vec<PageId>,
    begun: bool,
    source_done: Option<Outcome>,
    target_begun: bool,
    /// The target called it off or refused: it is not told of the loss.
    target_gave_up: bool,
    opened: Option<(Vec<PageId>, u32)>,
    landed: bool,
    lost: bool,
    quiet: bool,
    target_end: Option<End>,
}

struct World {
    seed: u64,
    writer: Writer,
    faults: Faults,
    rng: StdRng,
    now: Duration,
    steps: BTreeMap<(Duration, u64), Step>,
    stamp: u64,
    source: Handoffs,
    target: Handoffs,
    pools: Pools,
    landings: Landings,
    inbox: Arc<Inbox>,
    link: u64,
    dead_links: BTreeSet<LinkId>,
    flights: BTreeMap<u64, Flight>,
    /// One-sided: seals that wait for the source's word or its end.
    held_seals: BTreeMap<HandoffId, LinkId>,
    /// Words of landings that are open, or settled.
    words: BTreeMap<HandoffId, bool>,
    /// Target pages by owner; absent = free.
    owners: BTreeMap<PageId, HandoffId>,
    records: BTreeMap<HandoffId, Record>,
    stale: usize,
}

fn limits() -> Limits {
    let (open, progress) = (Duration::from_secs(10), Duration::from_secs(5));
    Limits { open, progress, group_bytes: Some(2 * layout(LAYERS, 1).block_bytes()), group_frames: 1 }
}

impl World {
    fn new(seed: u64, writer: Writer, faults: Faults) -> Self {
        let target_layout = layout(LAYERS, TARGET_PAGES);
        let inbox = Arc::new(Inbox::default());
        let pools = Pools::new(&layout(LAYERS, SOURCE_PAGES), &target_layout);
        Self {
            seed,
            writer,
            faults,
            rng: StdRng::seed_from_u64(seed),
            now: Duration::ZERO,
            steps: BTreeMap::new(),
            stamp: 0,
            source: Handoffs::new(layout(LAYERS, SOURCE_PAGES), limits()),
            target: Handoffs::new(target_layout.clone(), limits()),
            landings: Landings::new(pools.target().clone(), inbox.clone()),
            pools,
            inbox,
            link: 0,
            dead_links: BTreeSet::new(),
            flights: BTreeMap::new(),
            held_seals: BTreeMap::new(),
            words: BTreeMap::new(),
            owners: BTreeMap::new(),
            records: BTreeMap::new(),
            stale: 0,
        }
    }

    fn percent(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn within(&mut self, ms: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(0..ms * 1000))
    }

    fn at(&mut self, at: Duration, step: Step) {
        self.stamp += 1;
        self.steps.insert((at, self.stamp), step);
    }

    fn after(&mut self, ms: u64, step: Step) {
        let at = self.now + self.within(ms);
        self.at(at, step);
    }

    fn link(&self) -> LinkId {
        LinkId(self.link)
    }

    /// Lays out what both workers will do about `handoff`.
    fn plan(&mut self, handoff: HandoffId) {
        let count = self.rng.random_range(1..=MOST_PAGES);
        let first = (handoff.0 as u32 - 1) * MOST_PAGES;
        let pages: Vec<PageId> = (first..first + count).map(PageId).collect();
        self.records.insert(handoff, Record { pages, ..Record::default() });
        let start = self.within(10_000);
        self.at(start, Step::Begin(handoff));
        let stalls = self.percent(self.faults.workers / 2);
        let mut at = start;
        let mut pushes: Vec<_> = (0..count).flat_map(|page| (0..LAYERS).map(move |layer| (layer, page))).collect();
        pushes.shuffle(&mut self.rng);
        for (layer, page) in pushes {
            at += self.within(300);
            if !stalls {
                self.at(at, Step::Push(handoff, layer..layer + 1, page..page + 1));
            }
        }
        at += self.within(300);
        self.at(at, Step::Commit(handoff));
        if self.percent(self.faults.workers) {
            let early = start.saturating_sub(Duration::from_millis(100)) + self.within(2000);
            self.at(early, Step::AbortAtSource(handoff));
        }
        if self.percent(self.faults.workers) {
            let early = start.saturating_sub(Duration::from_millis(100)) + self.within(2000);
            self.at(early, Step::AbortAtTarget(handoff));
        }
    }

    fn run(mut self, handoffs: u64) -> Self {
        for handoff in 1..=handoffs {
            self.plan(HandoffId(handoff));
        }
        while let Some(((at, _), step)) = self.steps.pop_first() {
            assert!(at < END, "still busy: {step:?}");
            self.now = at;
            self.perform_step(step);
            self.take_notes();
            self.check_pages();
        }
        self.check_end();
        self
    }

    fn perform_step(&mut self, step: Step) {
        match step {
            Step::Begin(handoff) => self.begin(handoff),
            Step::Push(handoff, layers, pages) => self.push(handoff, layers, pages),
            Step::Commit(handoff) => self.ask_source(Request::Commit { handoff, commit: commit(handoff) }),
            Step::AbortAtSource(handoff) if handoff.0 % 2 == 0 => self.ask_source(Request::Forgo { handoff }),
            Step::AbortAtSource(handoff) => self.ask_source(Request::Abort { handoff, reason: "cancelled".into() }),
            Step::AbortAtTarget(handoff) => {
                let record = self.records.get_mut(&handoff).expect("planned");
                record.target_gave_up |= record.target_end.is_none();
                self.ask_target(Request::Abort { handoff, reason: "cancelled".into() });
            }
            Step::Answer(handoff) => self.answer(handoff),
            Step::ToTarget(link, message) => {
                self.step_target(|target, now, out| target.message(now, (link, "prefill", true), message, out));
            }
            Step::ToSource(link, message) => {
                self.step_source(|source, now, out| source.message(now, (link, "decode", false), message, out));
            }
            Step::WriteBlock(flight) => self.write_block(flight),
            Step::Notify(handoff, moved) => self.step_target(|target, now, out| target.moved(now, handoff, moved, out)),
            Step::KillLink(link) => self.kill(link),
            Step::SourceLosesLink(link) => {
                self.step_source(|source, now, out| source.link_lost(now, link, "dead", false, out));
                // Its data path ends a moment later.
                let on_link: Vec<u64> =
                    self.flights.iter().filter(|(_, flight)| flight.link == link).map(|(key, _)| *key).collect();
                on_link.into_iter().for_each(|flight| self.end_flight(flight, Moved::Lost));
                self.prove(link);
            }
            Step::TargetLosesLink(link) => {
                self.step_target(|target, now, out| target.link_lost(now, link, "dead", false, out));
            }
            Step::Tick => {
                self.step_source(Handoffs::tick);
                self.step_target(Handoffs::tick);
            }
        }
        if !self.steps.values().any(|step| matches!(step, Step::Tick)) && self.source.live() + self.target.live() > 0 {
            self.at(self.now + Duration::from_millis(50), Step::Tick);
        }
    }

    fn begin(&mut self, handoff: HandoffId) {
        let record = self.records.get_mut(&handoff).expect("planned");
        record.begun = true;
        let target = Peer { worker: "decode".into(), incarnation: 1, link: String::new() };
        let tokens = record.pages.len() as u32 * 16;
        let begin = Begin { handoff, targets: vec![target], tokens, pages: record.pages.clone() };
        if self.dead_links.contains(&self.link()) {
            self.link += 1;
        }
        let link = self.link();
        self.source.link_up(link, self.pools.terms().clone());
        self.target.link_up(link, self.pools.terms().clone());
        if self.now < CALM && self.percent(self.faults.kill_links) {
            self.after(3000, Step::KillLink(link));
        }
        self.step_source(|source, now, out| source.begin(now, link, &begin, out));
    }

    /// The source's worker has computed these blocks, unless the hand-off is over and its pages are others'.
    fn push(&mut self, handoff: HandoffId, layers: Range<u32>, pages: Range<u32>) {
        let record = &self.records[&handoff];
        if record.source_done.is_none() {
            for (layer, at) in layers.clone().flat_map(|layer| pages.clone().map(move |at| (layer, at))) {
                self.pools.compute(Place::Source, record.pages[at as usize], (handoff, layer, at));
            }
        }
        self.ask_source(Request::Push { handoff, layers, pages });
    }

    /// The target's worker answers `Begun`, from the pages it has.
    fn answer(&mut self, handoff: HandoffId) {
        let free: Vec<PageId> = (0..TARGET_PAGES).map(PageId).filter(|page| !self.owners.contains_key(page)).collect();
        let count = self.records[&handoff].pages.len();
        if free.len() < count {
            self.records.get_mut(&handoff).expect("planned").target_gave_up = true;
            return self.ask_target(Request::Refuse { handoff, reason: "full".into() });
        }
        let landing: Vec<PageId> = free[..count].to_vec();
        let have = if self.percent(30) { self.rng.random_range(0..=count as u32) } else { 0 };
        for (at, page) in landing.iter().enumerate() {
            self.owners.insert(*page, handoff);
            for layer in (0..LAYERS).filter(|_| (at as u32) < have) {
                self.pools.compute(Place::Target, *page, (handoff, layer, at as u32));
            }
        }
        self.records.get_mut(&handoff).expect("planned").opened = Some((landing.clone(), have));
        self.ask_target(Request::Open { handoff, landing, have });
    }

    fn kill(&mut self, link: LinkId) {
        if self.dead_links.insert(link) {
            self.after(900, Step::SourceLosesLink(link));
            self.after(900, Step::TargetLosesLink(link));
        }
    }

    fn ask_source(&mut self, request: Request) {
        self.step_source(|source, now, out| source.request(now, request, out));
    }

    fn ask_target(&mut self, request: Request) {
        self.step_target(|target, now, out| target.request(now, request, out));
    }

    fn step_source(&mut self, step: impl FnOnce(&mut Handoffs, Duration, &mut Vec<Action>)) {
        let mut out = Vec::new();
        step(&mut self.source, self.now, &mut out);
        out.into_iter().for_each(|action| self.act(Side::Source, action));
    }

    fn step_target(&mut self, step: impl FnOnce(&mut Handoffs, Duration, &mut Vec<Action>)) {
        let mut out = Vec::new();
        step(&mut self.target, self.now, &mut out);
        out.into_iter().for_each(|action| self.act(Side::Target, action));
    }

    fn act(&mut self, from: Side, action: Action) {
        match action {
            Action::Send(link, message) => self.send(from, link, &message),
            Action::Commit { link, handoff, sent, commit, word } => {
                let settled =
                    word.is_some() && self.words.get_mut(&handoff).is_some_and(|word| !std::mem::replace(word, true));
                self.send(from, link, &Message::Commit { handoff, sent, commit, settled });
                if settled {
                    self.inbox_source(handoff, Moved::Settled);
                }
            }
            Action::Post(link, frame) => self.post(link, frame),
            // Only frames that have not written anything; the others go on.
            Action::Cancel(_, handoff) => {
                let fresh = |flight: &Flight| flight.frame.handoff == handoff && flight.written == 0;
                let cancelled: Vec<u64> =
                    self.flights.iter().filter(|(_, flight)| fresh(flight)).map(|(key, _)| *key).collect();
                cancelled.into_iter().for_each(|flight| self.end_flight(flight, Moved::Lost));
            }
            Action::Admit { link, handoff, landing, travel } => {
                self.landings.open(handoff, (link.0, self.pools.terms().clone()), landing, travel);
                if self.writer == Writer::Settling {
                    self.words.insert(handoff, false);
                }
            }
            Action::Seal { link, handoff, vouched } => match self.writer {
                Writer::ByPermit => self.landings.seal(handoff),
                _ if vouched || self.is_settled(handoff) => {
                    self.held_seals.remove(&handoff);
                    self.landings.seal(handoff);
                }
                Writer::OneSided | Writer::Settling => {
                    self.words.remove(&handoff);
                    self.held_seals.insert(handoff, link);
                    if self.dead_links.contains(&link) {
                        self.prove(link);
                    }
                }
            },
            Action::DropLink(link, _) => self.kill(link),
            Action::Emit(event) => self.event(event),
            Action::Ended { handoff, side, end, .. } => {
                if side == Side::Target {
                    self.landings.forget(handoff);
                    let record = self.records.get_mut(&handoff).expect("planned");
                    assert_eq!(record.target_end.replace(end), None, "{handoff} ended twice at the target");
                }
            }
            Action::Stale(_) => self.stale += 1,
        }
    }

    fn is_settled(&self, handoff: HandoffId) -> bool {
        self.words.get(&handoff) == Some(&true)
    }

    fn send(&mut self, from: Side, link: LinkId, message: &Message) {
        let step = match from {
            Side::Source => Step::ToTarget(link, message.clone()),
            Side::Target => Step::ToSource(link, message.clone()),
        };
        let dead = self.dead_links.contains(&link);
        let calm = self.now >= CALM;
        if dead || !calm && self.percent(self.faults.lose) {
            return;
        }
        if !calm && self.percent(self.faults.repeat) {
            self.after(3000, step.clone());
        }
        let slow = !calm && self.percent(self.faults.repeat);
        self.after(if slow { 2000 } else { 5 }, step);
    }

    fn post(&mut self, link: LinkId, frame: Frame) {
        self.stamp += 1;
        let key = self.stamp;
        let blocks = |piece: &Piece| piece.pages.clone().map(|page| (piece.layer, page)).collect::<Vec<_>>();
        let blocks: Vec<_> = frame.pieces.iter().flat_map(blocks).collect();
        if self.dead_links.contains(&link) {
            // Found out when the socket is touched.
            return self.inbox_source(frame.handoff, Moved::Lost);
        }
        self.flights.insert(key, Flight { link, frame, blocks, written: 0 });
        self.after(20, Step::WriteBlock(key));
    }

    /// Tells the source of a frame, as its transport would: through the driver's inbox, not from within.
    fn inbox_source(&mut self, handoff: HandoffId, moved: Moved) {
        self.inbox.put(Note::Moved(handoff, moved));
    }

    fn write_block(&mut self, key: u64) {
        let Some(flight) = self.flights.get(&key) else { return };
        let (handoff, link) = (flight.frame.handoff, flight.link);
        let record = &self.records[&handoff];
        assert!(record.begun && record.source_done.is_none(), "pages of {handoff} are read after they were given back");
        if self.writer == Writer::ByPermit {
            let found = self.landings.find(handoff, link.0);
            let first = flight.written == 0;
            let admitted = |landing: &crate::landing::Landing| !first || landing.admit(&flight.frame.pieces);
            let Some(landing) = found.filter(|landing| admitted(landing)) else {
                return self.end_flight(key, Moved::Lost);
            };
            let Some(permit) = landing.enter() else { return self.end_flight(key, Moved::Lost) };
            self.write(key, Some(&landing));
            drop(permit);
        } else {
            self.write(key, None);
        }
        let flight = &self.flights[&key];
        if flight.written < flight.blocks.len() {
            let slow = self.now < CALM && self.percent(self.faults.repeat);
            self.after(if slow { 9000 } else { 20 }, Step::WriteBlock(key));
        } else {
            self.arrived(key);
        }
    }

    /// Writes the next block of a flight. The invariant of invariants: the page must be in this hand-off's landing.
    fn write(&mut self, key: u64, into: Option<&Landing>) {
        // Which only a digest shows.
        let corrupt = self.writer != Writer::Settling && self.now < CALM && self.percent(self.faults.corrupt);
        let flight = self.flights.get_mut(&key).expect("in flight");
        let (layer, page) = flight.blocks[flight.written];
        flight.written += 1;
        let handoff = flight.frame.handoff;
        let landing = flight.frame.landing[page as usize];
        assert_eq!(self.owners.get(&landing), Some(&handoff), "late write of {handoff} into page {landing:?}");
        assert!(!self.records[&handoff].landed, "{handoff} is written after it landed");
        self.pools.write(&flight.frame, (layer, page), into, corrupt);
    }

    /// All blocks of a frame are written: both ends learn it.
    fn arrived(&mut self, key: u64) {
        let flight = &self.flights[&key];
        let frame = &flight.frame;
        let (handoff, sequence) = (frame.handoff, frame.sequence);
        let of = |end: Place, pages: &[PageId]| -> Option<Digest> {
            let mut hasher = FrameHasher::new(handoff, sequence, &frame.pieces);
            let block = |(layer, at): &(u32, u32)| self.pools.block(end, *layer, pages[*at as usize]);
            flight.blocks.iter().for_each(|at| hasher.update(block(at)));
            (self.writer != Writer::Settling).then(|| hasher.finish())
        };
        let (sent, landed) = (of(Place::Source, &frame.pages), of(Place::Target, &frame.landing));
        let bytes = (self.pools.terms().block_bytes() * flight.blocks.len()) as u64;
        let moved = Moved::Landed { sequence, bytes, digest: landed };
        self.end_flight(key, Moved::Sent { sequence, bytes, digest: sent });
        // Where the target does not write itself it is told, and that may be lost.
        if self.writer == Writer::ByPermit {
            self.step_target(|target, now, out| target.moved(now, handoff, moved, out));
        } else if !self.percent(self.faults.lose) {
            self.after(5, Step::Notify(handoff, moved));
        }
    }

    fn end_flight(&mut self, key: u64, moved: Moved) {
        let flight = self.flights.remove(&key).expect("in flight");
        self.inbox_source(flight.frame.handoff, moved);
        self.prove(flight.link);
    }

    /// One-sided: a dead link whose source has stopped writing is proof for all that waits for it.
    fn prove(&mut self, link: LinkId) {
        if self.dead_links.contains(&link) && !self.flights.values().any(|flight| flight.link == link) {
            let proven: Vec<HandoffId> =
                self.held_seals.iter().filter(|(_, on)| **on == link).map(|(handoff, _)| *handoff).collect();
            for handoff in proven {
                self.held_seals.remove(&handoff);
                self.landings.seal(handoff);
            }
        }
    }

    fn take_notes(&mut self) {
        let mut notes = Vec::new();
        while self.inbox.take(&mut notes).now_or_never().is_some() {
            for (_, note) in notes.drain(..) {
                match note {
                    Note::Moved(handoff, moved @ (Moved::Sent { .. } | Moved::Lost | Moved::Settled)) => {
                        self.step_source(|source, now, out| source.moved(now, handoff, moved, out));
                    }
                    Note::Moved(handoff, moved) => {
                        self.step_target(|target, now, out| target.moved(now, handoff, moved, out))
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Begun { handoff, .. } => {
                let record = self.records.get_mut(&handoff).expect("planned");
                assert!(!record.target_begun, "{handoff} began twice");
                record.target_begun = true;
                if !self.percent(self.faults.workers / 2) {
                    self.after(500, Step::Answer(handoff));
                }
            }
            Event::Landed { handoff, commit: landed } => {
                assert_eq!(landed, commit(handoff));
                let record = self.records.get_mut(&handoff).expect("planned");
                assert!(!record.landed && !record.lost && !record.quiet, "{record:?}");
                record.landed = true;
                let (landing, _) = record.opened.clone().expect("landed without landing");
                for (at, page) in landing.iter().enumerate() {
                    for layer in 0..LAYERS {
                        let right = self.pools.is_right(*page, (handoff, layer, at as u32));
                        assert!(right, "wrong byte in {handoff} became runnable");
                    }
                }
                // The sequence is short: its pages are free again at once, and will be used for others.
                self.give_back(&landing);
            }
            Event::Lost { handoff, .. } => {
                let record = self.records.get_mut(&handoff).expect("planned");
                assert!(!record.lost && !record.landed && !record.quiet, "{record:?}");
                record.lost = true;
            }
            Event::Quiet { handoff } => {
                let record = self.records.get_mut(&handoff).expect("planned");
                assert!(!record.quiet && !record.landed, "{record:?}");
                record.quiet = true;
                let (landing, _) = record.opened.clone().expect("quiet without landing");
                self.give_back(&landing);
            }
            Event::Asked { handoff, .. } => panic!("nobody fetched {handoff}"),
            Event::SourceDone { handoff, outcome } => {
                let settled = self.is_settled(handoff);
                let record = self.records.get_mut(&handoff).expect("planned");
                assert!(record.begun);
                assert_eq!(record.source_done, None, "{handoff} ended twice at the source");
                if outcome == Outcome::Landed {
                    assert!(record.landed || settled, "{handoff} landed only for the source");
                }
                record.source_done = Some(outcome);
                self.pools.poison(Place::Source, &record.pages);
            }
        }
    }

    fn give_back(&mut self, pages: &[PageId]) {
        pages.iter().for_each(|page| assert!(self.owners.remove(page).is_some()));
        self.pools.poison(Place::Target, pages);
    }

    /// No page is reusable while a write to it is under way: asked of every flight at every step, not only when it writes.
    fn check_pages(&self) {
        if self.writer != Writer::ByPermit {
            for flight in self.flights.values() {
                let handoff = flight.frame.handoff;
                for (_, page) in &flight.blocks[flight.written..] {
                    let page = flight.frame.landing[*page as usize];
                    assert_eq!(self.owners.get(&page), Some(&handoff), "seed {}: page {page:?} is writable", self.seed);
                }
            }
        }
    }

    fn check_end(&self) {
        assert_eq!((self.source.live(), self.target.live()), (0, 0));
        assert_eq!(self.target.quarantined_pages(), 0);
        assert!(self.flights.is_empty() && self.held_seals.is_empty());
        assert!(self.owners.is_empty(), "stranded pages: {:?}", self.owners);
        (0..TARGET_PAGES).map(PageId).for_each(|page| assert!(self.pools.is_poison(page), "late write to {page:?}"));
        for (handoff, record) in &self.records {
            assert!(record.source_done.is_some(), "{handoff} did not end at the source: {record:?}");
            let opened = record.opened.is_some();
            assert_eq!(record.quiet, opened && !record.landed, "{handoff}: {record:?}");
            if record.target_begun && !record.target_gave_up {
                assert!(record.landed ^ record.lost, "{handoff}: {record:?}");
            }
            let end = record.target_end;
            assert_eq!(record.target_begun, end.is_some(), "{handoff} did not end at the target: {record:?}");
            assert_eq!(record.landed, end == Some(End::Landed));
        }
    }

    fn landed(&self) -> usize {
        self.records.values().filter(|record| record.landed).count()
    }
}

fn commit(handoff: HandoffId) -> Commit {
    Commit { first_token: handoff.0 as u32 + 100 }
}

fn simulate(seed: u64, writer: Writer, faults: Faults, handoffs: u64) -> World {
    // A panic inside prints the seed with the test's message.
    let world = std::panic::catch_unwind(|| World::new(seed, writer, faults).run(handoffs));
    world.unwrap_or_else(|_| panic!("simulation of seed {seed}, {writer:?}, {faults:?} failed"))
}

#[test]
fn without_faults_everything_with_room_lands() {
    for writer in WRITERS {
        for seed in 0..20 {
            let world = simulate(seed, writer, NONE, 12);
            let refused = world.records.values().filter(|record| record.target_gave_up).count();
            assert_eq!(world.landed() + refused, 12, "seed {seed}");
            assert_eq!(world.stale, 0, "seed {seed}");
        }
    }
}

#[test]
fn with_all_faults_nothing_is_corrupted_or_stranded() {
    let (mut landed, mut stale, mut ends) = (0, 0, BTreeMap::<String, usize>::new());
    for writer in WRITERS {
        for seed in 0..2000 {
            let world = simulate(seed, writer, ALL, 20);
            landed += world.landed();
            stale += world.stale;
            for record in world.records.values() {
                let end = record.source_done.as_ref().map(|outcome| format!("{:?}", outcome.end()));
                *ends.entry(end.unwrap_or_default()).or_default() += 1;
            }
        }
    }
    // The faults must have bitten, and not everything: otherwise the invariants were not tested.
    assert!(landed > 1000 && stale > 1000, "{landed} landed, {stale} stale");
    assert!(
        ["Landed", "Forgone", "Refused", "Aborted", "Expired"]
            .iter()
            .all(|end| ends.get(*end).is_some_and(|n| *n > 50)),
        "{ends:?}"
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = || format!("{:?}", simulate(7, Writer::OneSided, ALL, 20).records);
    assert_eq!(run(), run());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any mixture of faults, one kind at a time and all together.
    #[test]
    fn any_mixture_of_faults(
        seed: u64,
        writer in 0..WRITERS.len(),
        (lose, repeat, corrupt) in (0u32..60, 0u32..60, 0u32..20),
        (kill_links, workers) in (0u32..100, 0u32..60),
        handoffs in 1u64..30,
    ) {
        simulate(seed, WRITERS[writer], Faults { lose, repeat, corrupt, kill_links, workers }, handoffs);
    }
}

/// A message for a hand-off comes over another link than its own: ignored, and counted.
#[test]
fn another_peer_cannot_touch_a_handoff() {
    let layout: PageLayout = layout(LAYERS, TARGET_PAGES);
    let mut target = Handoffs::new(layout.clone(), limits());
    (1..3).for_each(|link| target.link_up(LinkId(link), Terms::same(&layout, &layout)));
    let mut out = Vec::new();
    let now = Duration::ZERO;
    let h = HandoffId(1);
    let begin = |handoff| Message::Begin { handoff, tokens: 16 };
    target.message(now, (LinkId(1), "a", true), begin(h), &mut out);
    target.request(now, Request::Open { handoff: h, landing: vec![PageId(0)], have: 0 }, &mut out);
    out.clear();
    let intruder = (LinkId(2), "b", true);
    let abort = Message::Abort { handoff: h, reason: "x".into() };
    for message in [begin(h), abort.clone(), Message::Quiet { handoff: h }, Message::Ack { handoff: h }] {
        target.message(now, intruder, message.clone(), &mut out);
        assert_eq!(std::mem::take(&mut out), [Action::Stale(h)], "{message:?}");
    }
    target.message(now, (LinkId(1), "a", true), abort, &mut out);
    assert!(matches!(out[..], [Action::Emit(Event::Lost { .. }), Action::Seal { .. }]), "{out:?}");
}

/// The last few thousand are remembered, and no more.
#[test]
fn aborts_before_begin_are_remembered_within_bounds() {
    let layout = layout(LAYERS, TARGET_PAGES);
    let mut target = Handoffs::new(layout.clone(), limits());
    target.link_up(LinkId(1), Terms::same(&layout, &layout));
    let mut out = Vec::new();
    let now = Duration::ZERO;
    for handoff in (0..10_000).map(HandoffId) {
        target.request(now, Request::Abort { handoff, reason: "cancelled".into() }, &mut out);
    }
    assert!(out.is_empty());
    target.message(now, (LinkId(1), "a", true), Message::Begin { handoff: HandoffId(9_999), tokens: 16 }, &mut out);
    let reason = "called off before it began: cancelled".to_owned();
    assert_eq!(out, [Action::Send(LinkId(1), Message::Abort { handoff: HandoffId(9_999), reason })]);
    out.clear();
    target.message(now, (LinkId(1), "a", true), Message::Begin { handoff: HandoffId(0), tokens: 16 }, &mut out);
    assert!(matches!(out[..], [Action::Emit(Event::Begun { .. })]), "forgotten: {out:?}");
}
