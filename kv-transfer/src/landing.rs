//! Who may write which landing pages right now.
//!
//! Every byte that reaches this worker's pool from outside passes here: a transport finds the landing of the hand-off, has the
//! blocks *admitted* (inside the sequence, from the right link, not there before) and takes a *permit* around each short burst
//! of writing. Closing a landing lets no further permit out; when the last one is back, no write can land any more, and the
//! driver hears `Sealed`. That is the proof behind [`Event::Quiet`](crate::Event::Quiet), and it costs the data path two atomic
//! additions per burst.
//!
//! A permit is never held while waiting for a peer, so sealing takes as long as one burst: well under a millisecond.
//!
//! A *one-sided* source (shared memory, RDMA) writes by itself, and no gate here can stop it. It counts as the holder of one
//! permit of each of its landings, from the moment they are open: who may write is still who holds a permit, and `Sealed` still
//! comes with the last one. The source's permit comes back in two ways, and never because time passed:
//!
//! - it *vouched* that of this hand-off no write of its own can land any more: `Commit`, which follows the last write, or a
//!   [word](crate::words) of ours that it settled then, or `Quiet`, which follows the last write that was under way when it was
//!   called off;
//! - it can write nothing at all any more, of which the transport has proof of its own ([`Landings::writer_gone`]). A lost link
//!   is no such proof, nor is a closed socket: the process behind it may be stopped in the middle of a copy, and go on later.
//!
//! So a transport whose source writes by itself calls [`Landings::writer_joined`] when the link comes up and `writer_gone`
//! when it has its proof, and every rule about pages is kept here.

use crate::{
    HandoffId,
    coverage::Coverage,
    digest::Digest,
    handoffs::Moved,
    inbox::{Inbox, Note},
    pages::Pages,
    plan::{self, Piece, Place, Terms},
    words::Words,
};
use kv_cache::PageId;
use std::{
    collections::{HashMap, HashSet},
    ops::{Deref, Range},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Set in a gate's word once it is closed; the bits below count permits.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Lets writers in until it is closed, and knows when the last has left.
#[derive(Debug, Default)]
struct Gate(AtomicUsize);

impl Gate {
    /// Returns whether a writer may go in.
    fn enter(&self) -> bool {
        // Acquire pairs with nothing on the way in; on the way out see `leave`.
        let admit = |word: usize| (word & CLOSED == 0).then_some(word + 1);
        self.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, admit).is_ok()
    }

    /// Lets a writer out. Returns whether it was the last of a closed gate.
    fn leave(&self) -> bool {
        // Release: its writes happen before whatever follows the seal.
        self.0.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1
    }

    /// Closes the gate. Returns whether it was open and is empty; otherwise the last `leave` says so.
    fn close(&self) -> bool {
        self.0.fetch_or(CLOSED, Ordering::AcqRel) == 0
    }
}

/// The landing of one hand-off.
#[derive(Debug)]
pub(crate) struct Landing {
    handoff: HandoffId,
    /// Token of the link that may write here.
    link: u64,
    pages: Arc<[PageId]>,
    terms: Arc<Terms>,
    pool: Arc<Pages>,
    gate: Gate,
    /// A one-sided source holds a permit.
    afar: AtomicBool,
    /// Where such a source can settle the hand-off.
    word: Option<(Arc<Words>, PageId)>,
    admitted: Mutex<Coverage>,
    inbox: Arc<Inbox>,
}

/// The right to write the blocks admitted to its holder, until dropped.
#[derive(Debug)]
pub(crate) struct Permit<L: Deref<Target = Landing>>(L);

impl<L: Deref<Target = Landing>> Drop for Permit<L> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl<L: Deref<Target = Landing>> Permit<L> {
    /// Returns what it is of.
    pub(crate) fn landing(&self) -> &Landing {
        &self.0
    }
}

impl Landing {
    /// Returns the pool that the pages lie in.
    pub(crate) fn pool(&self) -> &Pages {
        &self.pool
    }

    /// Returns where the sequence's pages lie in it.
    pub(crate) fn place(&self) -> Place<'_> {
        Place { view: &self.terms.target, pages: &self.pages }
    }

    /// Admits the blocks of a frame to the caller, all or none: each block is admitted once. Returns whether it did.
    pub(crate) fn admit(&self, pieces: &[Piece]) -> bool {
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, piece) in pieces.iter().enumerate() {
            if !admitted.mark(piece) {
                pieces[..at].iter().for_each(|marked| admitted.unmark(marked));
                return false;
            }
        }
        true
    }

    /// Lets the caller write for a moment, unless the landing is closed.
    pub(crate) fn enter(&self) -> Option<Permit<&Self>> {
        // Lazily: a permit that is made and dropped leaves the gate.
        self.gate.enter().then(|| Permit(self))
    }

    /// The same for work that others do.
    pub(crate) fn enter_for_others(self: Arc<Self>) -> Option<Permit<Arc<Self>>> {
        self.gate.enter().then(|| Permit(self))
    }

    /// Says whether a one-sided source may write here.
    pub(crate) fn is_written_from_afar(&self) -> bool {
        self.afar.load(Ordering::Acquire)
    }

    /// Takes the permit of the one-sided source back, if it has one.
    fn vouch(&self) {
        if self.afar.swap(false, Ordering::AcqRel) {
            self.leave();
        }
    }

    /// Lets the source settle the hand-off no more. One that has writes nothing more of it.
    fn close_word(&self) {
        if self.word.as_ref().is_some_and(|(words, page)| words.close(*page, self.handoff)) {
            self.vouch();
        }
    }

    fn leave(&self) {
        if self.gate.leave() {
            self.report(Moved::Sealed);
        }
    }

    /// Brings all bytes of a frame, which are here, to where its pages are, and says so. The caller holds a permit, so that this comes before `Sealed`.
    pub(crate) fn landed(
        &self,
        permit: &Permit<impl Deref<Target = Self>>,
        sequence: u32,
        pieces: &[Piece],
        digest: Option<Digest>,
    ) {
        match self.pool.store(self.place(), pieces) {
            Ok(()) => self.landed_directly(permit, sequence, pieces, digest),
            // Who computes there learns of it as well, and ends. Until then it is a hand-off without progress.
            Err(problem) => tracing::error!(handoff = %self.handoff, problem, "bring pages to where they belong"),
        }
    }

    /// Says that all bytes of a frame are where its pages are, likewise.
    pub(crate) fn landed_directly(
        &self,
        _permit: &Permit<impl Deref<Target = Self>>,
        sequence: u32,
        pieces: &[Piece],
        digest: Option<Digest>,
    ) {
        let bytes = plan::blocks(pieces) * self.terms.block_bytes() as u64;
        self.report(Moved::Landed { sequence, bytes, digest });
    }

    fn report(&self, moved: Moved) {
        self.inbox.put(Note::Moved(self.handoff, moved));
    }
}

/// All landings of one worker.
#[derive(Debug)]
pub(crate) struct Landings {
    pool: Arc<Pages>,
    /// Of the pool's pages, where other processes can have them.
    words: Option<Arc<Words>>,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<HandoffId, Arc<Landing>>,
    /// Tokens of links whose source writes by itself and still can.
    writers: HashSet<u64>,
}

impl Landings {
    /// Starts with none in `pool`, reporting to `inbox`.
    pub(crate) fn new(pool: Arc<Pages>, inbox: Arc<Inbox>) -> Self {
        Self { pool, words: None, inbox, state: Mutex::default() }
    }

    /// Returns the pool that they are in.
    pub(crate) fn pool(&self) -> &Arc<Pages> {
        &self.pool
    }

    /// Lets sources that have them settle hand-offs in `words`.
    pub(crate) fn with_words(self, words: Option<Arc<Words>>) -> Self {
        Self { words, ..self }
    }

    /// Opens `pages` for the travel pages `travel` of `handoff` that come over `link`, whose terms are `terms`.
    pub(crate) fn open(
        &self,
        handoff: HandoffId,
        (link, terms): (u64, Arc<Terms>),
        pages: Arc<[PageId]>,
        travel: Range<u32>,
    ) {
        let mut admitted = Coverage::new(self.pool.layout().layers, travel.end);
        if travel.start > 0 {
            let there = 0..travel.start;
            (0..self.pool.layout().layers)
                .for_each(|layer| assert!(admitted.mark(&Piece { layer, pages: there.clone() })));
        }
        // In one step with `writer_gone`: a permit that comes too late to be given back is not given out.
        let mut state = self.lock();
        let afar = state.writers.contains(&link);
        // Pages that are there already may be others' too.
        let last = pages.last().filter(|_| afar && !travel.is_empty());
        let word = self.words.clone().zip(last.copied());
        if let Some((words, page)) = &word {
            words.open(*page, handoff);
        }
        let landing = Landing {
            handoff,
            link,
            pages,
            terms,
            pool: self.pool.clone(),
            gate: Gate(AtomicUsize::new(usize::from(afar))),
            afar: AtomicBool::new(afar),
            word,
            admitted: Mutex::new(admitted),
            inbox: self.inbox.clone(),
        };
        state.open.insert(handoff, Arc::new(landing));
    }

    /// Returns the landing that frames of `handoff` over `link` go to.
    pub(crate) fn find(&self, handoff: HandoffId, link: u64) -> Option<Arc<Landing>> {
        self.lock().open.get(&handoff).filter(|landing| landing.link == link).cloned()
    }

    /// Closes a landing. `Sealed` is reported once, as soon as it is true.
    pub(crate) fn seal(&self, handoff: HandoffId) {
        let closed = |landing: &Arc<Landing>| {
            landing.close_word();
            landing.gate.close()
        };
        if self.lock().open.get(&handoff).is_some_and(closed) {
            self.inbox.put(Note::Moved(handoff, Moved::Sealed));
        }
    }

    /// A one-sided source said that it writes nothing more of `handoff`. Of no consequence to others.
    pub(crate) fn vouched(&self, handoff: HandoffId) {
        if let Some(landing) = self.lock().open.get(&handoff) {
            landing.vouch();
        }
    }

    /// From here on the source of `link` may write by itself, where it is told to.
    pub(crate) fn writer_joined(&self, link: u64) {
        self.lock().writers.insert(link);
    }

    /// The source of `link` can write nothing any more: the caller has proof.
    pub(crate) fn writer_gone(&self, link: u64) {
        let mut state = self.lock();
        state.writers.remove(&link);
        state.open.values().filter(|landing| landing.link == link).for_each(|landing| landing.vouch());
    }

    /// Forgets a sealed landing.
    pub(crate) fn forget(&self, handoff: HandoffId) {
        self.lock().open.remove(&handoff);
    }

    /// Closes all landings, when nobody is left to be told.
    pub(crate) fn close(&self) {
        self.lock().open.drain().for_each(|(_, landing)| {
            landing.close_word();
            landing.gate.close();
        });
    }

    /// Counts a frame that was thrown away.
    pub(crate) fn stale(&self, handoff: HandoffId) {
        self.inbox.put(Note::Moved(handoff, Moved::Stale));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{layout, pool};
    use tokio::time::Instant;

    const HANDOFF: HandoffId = HandoffId(7);

    fn landings() -> (Arc<Inbox>, Landings) {
        let layout = layout(2, 6);
        let pages = Pages::map(&pool(&layout), layout).expect("map");
        let inbox = Arc::new(Inbox::default());
        (inbox.clone(), Landings::new(Arc::new(pages), inbox))
    }

    fn opened(landings: &Landings) -> Arc<Landing> {
        let terms = Terms::same(&layout(2, 6), &layout(2, 6));
        landings.open(HANDOFF, (1, terms), [3, 1, 5].map(PageId).as_slice().into(), 1..3);
        landings.find(HANDOFF, 1).expect("open")
    }

    fn piece(layer: u32, start: u32, end: u32) -> Piece {
        Piece { layer, pages: start..end }
    }

    async fn reports(inbox: &Inbox) -> Vec<Moved> {
        inbox.put(Note::Moved(HANDOFF, Moved::Stale)); // So that there is always something to take.
        let mut taken: Vec<(Instant, Note)> = Vec::new();
        inbox.take(&mut taken).await;
        taken.pop();
        taken
            .into_iter()
            .map(|(_, note)| match note {
                Note::Moved(HANDOFF, moved) => moved,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[tokio::test]
    async fn sealing_waits_for_the_last_writer() {
        let (inbox, landings) = landings();
        let landing = opened(&landings);
        let (first, second) = (landing.enter().expect("open"), landing.enter().expect("open"));
        landings.seal(HANDOFF);
        assert!(landing.enter().is_none(), "closed");
        drop(first);
        landings.seal(HANDOFF);
        assert!(reports(&inbox).await.is_empty(), "one writer is still inside");
        drop(second);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));
        landings.seal(HANDOFF);
        assert!(reports(&inbox).await.is_empty(), "sealed once");
    }

    #[tokio::test]
    async fn an_idle_landing_seals_at_once() {
        let (inbox, landings) = landings();
        drop(opened(&landings).enter());
        landings.seal(HANDOFF);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));
    }

    #[tokio::test]
    async fn a_one_sided_source_must_vouch() {
        let (inbox, landings) = landings();
        landings.writer_joined(1);
        let landing = opened(&landings);
        assert!(landing.is_written_from_afar());
        landings.seal(HANDOFF);
        assert!(reports(&inbox).await.is_empty(), "it may still write");
        landings.vouched(HandoffId(8));
        landings.writer_gone(2);
        assert!(reports(&inbox).await.is_empty(), "others do not matter");
        landings.vouched(HANDOFF);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));
        landings.vouched(HANDOFF);
        landings.writer_gone(1);
        assert!(reports(&inbox).await.is_empty(), "sealed once");
    }

    #[tokio::test]
    async fn vouching_alone_seals_nothing() {
        let (inbox, landings) = landings();
        landings.writer_joined(1);
        let landing = opened(&landings);
        landings.vouched(HANDOFF);
        assert!(!landing.is_written_from_afar());
        let permit = landing.enter().expect("open");
        landings.seal(HANDOFF);
        assert!(reports(&inbox).await.is_empty(), "a digest is still being taken");
        drop(permit);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));
    }

    /// Whichever of the landing, its end and the writer's end comes first, the pages come back.
    #[tokio::test]
    async fn a_writer_that_is_gone_holds_nothing() {
        for order in 0..3 {
            let (inbox, landings) = landings();
            landings.writer_joined(1);
            if order == 0 {
                landings.writer_gone(1);
            }
            let landing = opened(&landings);
            assert_eq!(landing.is_written_from_afar(), order > 0);
            if order == 1 {
                landings.writer_gone(1);
            }
            landings.seal(HANDOFF);
            if order == 2 {
                assert!(reports(&inbox).await.is_empty());
                landings.writer_gone(1);
            }
            assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]), "{order}");
        }
    }

    /// A source that settled has written everything. One that comes too late is told so.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_settled_landing_needs_no_other_word() {
        use rustix::fs::SealFlags;
        let file = crate::testing::pool_with_seals(Words::bytes(6), SealFlags::SHRINK | SealFlags::GROW);
        let [ours, theirs] = [(); 2].map(|()| Words::map(&file, 6).expect("map"));
        let (inbox, landings) = landings();
        let landings = landings.with_words(Some(Arc::new(ours)));
        let last = PageId(5);
        opened(&landings);
        assert!(!theirs.settle(last, HANDOFF), "over this link nobody writes by itself");
        landings.writer_joined(1);
        opened(&landings);
        assert!(theirs.settle(last, HANDOFF));
        landings.seal(HANDOFF);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));

        opened(&landings);
        landings.seal(HANDOFF);
        assert!(!theirs.settle(last, HANDOFF), "closed before");
        assert!(reports(&inbox).await.is_empty(), "it may still write");
        landings.writer_gone(1);
        assert!(matches!(reports(&inbox).await[..], [Moved::Sealed]));
    }

    #[test]
    fn frames_are_admitted_whole_and_once() {
        let (_inbox, landings) = landings();
        let landing = opened(&landings);
        assert!(!landing.admit(&[piece(0, 1, 3), piece(1, 0, 1)]), "page 0 is there already");
        assert!(!landing.admit(&[piece(0, 1, 3), piece(0, 2, 3)]), "a block twice in one frame");
        assert!(!landing.admit(&[piece(0, 1, 4)]), "outside the sequence");
        assert!(landing.admit(&[piece(0, 1, 3), piece(1, 2, 3)]), "refused frames left nothing behind");
        assert!(!landing.admit(&[piece(1, 1, 3)]));
        assert!(landing.admit(&[piece(1, 1, 2)]));
    }

    #[test]
    fn another_link_finds_nothing() {
        let (_inbox, landings) = landings();
        let _landing = opened(&landings);
        assert!(landings.find(HANDOFF, 2).is_none());
        assert!(landings.find(HandoffId(8), 1).is_none());
    }

    /// Threads write a counter under permits while another seals: nothing changes after `Sealed`.
    #[test]
    fn nothing_is_written_after_the_seal() {
        use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
        for _ in 0..200 {
            let (inbox, landings) = landings();
            let landing = opened(&landings);
            let writes = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        while let Some(_permit) = landing.enter() {
                            writes.fetch_add(1, Relaxed);
                        }
                    });
                }
                landings.seal(HANDOFF);
                futures::executor::block_on(inbox.take(&mut Vec::new()));
                let sealed = writes.load(Relaxed);
                (0..100).for_each(|_| assert_eq!(writes.load(Relaxed), sealed));
            });
        }
    }
}
