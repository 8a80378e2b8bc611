//! Who may write which landing pages right now.
//!
//! Every byte that reaches this worker's pool from outside passes here: a transport finds the landing of the hand-off, has the
//! blocks *admitted* (inside the sequence, from the right link, not there before) and takes a *permit* around each short burst
//! of writing. Closing a landing lets no further permit out; when the last one is back, no write can land any more, and the
//! driver hears `Sealed`. That is the proof behind [`Event::Quiet`](crate::Event::Quiet), and it costs the data path two atomic
//! additions per burst.
//!
//! A permit is never held while waiting for a peer, so sealing takes as long as one burst: well under a millisecond.

use crate::{
    HandoffId,
    coverage::Coverage,
    digest::Digest,
    handoffs::Moved,
    inbox::{Inbox, Note},
    pages::Pages,
    plan::{self, Piece, Place},
};
use kv_cache::PageId;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
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
    pool: Arc<Pages>,
    gate: Gate,
    admitted: Mutex<Coverage>,
    inbox: Arc<Inbox>,
}

/// The right to write the blocks admitted to its holder, until dropped.
#[derive(Debug)]
pub(crate) struct Permit<'a>(&'a Landing);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.0.gate.leave() {
            self.0.report(Moved::Sealed);
        }
    }
}

impl Landing {
    /// Returns the pool that the pages lie in.
    pub(crate) fn pool(&self) -> &Pages {
        &self.pool
    }

    /// Returns where the sequence's pages lie in it.
    pub(crate) fn place(&self) -> Place<'_> {
        Place { layout: self.pool.layout(), pages: &self.pages }
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
    pub(crate) fn enter(&self) -> Option<Permit<'_>> {
        // Lazily: a permit that is made and dropped leaves the gate.
        self.gate.enter().then(|| Permit(self))
    }

    /// Says that all bytes of a frame are here. The caller holds a permit, so that this comes before `Sealed`.
    pub(crate) fn landed(&self, _permit: &Permit<'_>, sequence: u32, pieces: &[Piece], digest: Option<Digest>) {
        self.report(Moved::Landed { sequence, blocks: plan::blocks(pieces), digest });
    }

    fn report(&self, moved: Moved) {
        self.inbox.put(Note::Moved(self.handoff, moved));
    }
}

/// All landings of one worker.
#[derive(Debug)]
pub(crate) struct Landings {
    pool: Arc<Pages>,
    inbox: Arc<Inbox>,
    open: Mutex<HashMap<HandoffId, Arc<Landing>>>,
}

impl Landings {
    /// Starts with none in `pool`, reporting to `inbox`.
    pub(crate) fn new(pool: Arc<Pages>, inbox: Arc<Inbox>) -> Self {
        Self { pool, inbox, open: Mutex::default() }
    }

    /// Opens `pages`, but the first `have`, for frames of `handoff` that come over `link`.
    pub(crate) fn open(&self, handoff: HandoffId, link: u64, pages: Arc<[PageId]>, have: u32) {
        let mut admitted = Coverage::new(self.pool.layout().layers, pages.len() as u32);
        if have > 0 {
            (0..self.pool.layout().layers).for_each(|layer| assert!(admitted.mark(&Piece { layer, pages: 0..have })));
        }
        let landing = Landing {
            handoff,
            link,
            pages,
            pool: self.pool.clone(),
            gate: Gate::default(),
            admitted: Mutex::new(admitted),
            inbox: self.inbox.clone(),
        };
        self.lock().insert(handoff, Arc::new(landing));
    }

    /// Returns the landing that frames of `handoff` over `link` go to.
    pub(crate) fn find(&self, handoff: HandoffId, link: u64) -> Option<Arc<Landing>> {
        self.lock().get(&handoff).filter(|landing| landing.link == link).cloned()
    }

    /// Closes a landing. `Sealed` is reported once, as soon as it is true.
    pub(crate) fn seal(&self, handoff: HandoffId) {
        if self.lock().get(&handoff).is_some_and(|landing| landing.gate.close()) {
            self.inbox.put(Note::Moved(handoff, Moved::Sealed));
        }
    }

    /// Forgets a sealed landing.
    pub(crate) fn forget(&self, handoff: HandoffId) {
        self.lock().remove(&handoff);
    }

    /// Closes all landings, when nobody is left to be told.
    pub(crate) fn close(&self) {
        self.lock().drain().for_each(|(_, landing)| {
            landing.gate.close();
        });
    }

    /// Counts a frame that was thrown away.
    pub(crate) fn stale(&self, handoff: HandoffId) {
        self.inbox.put(Note::Moved(handoff, Moved::Stale));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<HandoffId, Arc<Landing>>> {
        // Whole between any two statements.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
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
        landings.open(HANDOFF, 1, [3, 1, 5].map(PageId).as_slice().into(), 1);
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
