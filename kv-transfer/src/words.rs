//! Words of shared memory in which a source that writes by itself settles a hand-off, without waiting for the target to look.
//!
//! A target has one for each page of its pool. The landing of a hand-off uses that of its last page, which no other hand-off has while it is
//! open. Legs from several ranks land in the same pages: the word is the last one's, and the others wait for their `Ack`.
//!
//! ```text
//!                 the source, after its last write
//!     open: id ────────────────────────────────────► settled: !id
//!        │
//!        └──── the target, which lets no more writes in ────► closed: 0
//! ```
//!
//! Either exchange succeeds or finds that the other was first. So a hand-off that is called off is settled or not, both ends know which,
//! and the pages of one that is settled need no other word of the source: it writes there no more.

use crate::HandoffId;
use kv_cache::PageId;
use memmap2::{Advice, MmapOptions, MmapRaw};
use std::{
    fs::File,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

/// Neither open nor settled.
const CLOSED: u64 = 0;

/// A map of them.
#[derive(Debug)]
pub(crate) struct Words(MmapRaw);

impl Words {
    /// Returns the size of the file with the words of a pool of `pages` pages.
    pub(crate) fn bytes(pages: u32) -> usize {
        pages as usize * size_of::<u64>()
    }

    /// Maps the words in `file`, whose size cannot change. Children of this process do not inherit them.
    ///
    /// # Errors
    /// When the file does not have one for each of `pages`, or cannot be mapped.
    pub(crate) fn map(file: &File, pages: u32) -> io::Result<Self> {
        let (length, wanted) = (file.metadata()?.len(), Self::bytes(pages));
        if length != wanted as u64 {
            return Err(io::Error::other(format!("the words of {pages} pages have {wanted} bytes, not {length}")));
        }
        let map = MmapOptions::new().len(wanted).map_raw(file)?;
        map.advise(Advice::DontFork)?;
        Ok(Self(map))
    }

    /// Target: the source may settle `handoff`, whose landing ends with `page`.
    pub(crate) fn open(&self, page: PageId, handoff: HandoffId) {
        self.word(page).store(handoff.0, Ordering::Release);
    }

    /// Source: settles `handoff`. Its writes happen before. Returns whether the landing was still open.
    pub(crate) fn settle(&self, page: PageId, handoff: HandoffId) -> bool {
        handoff.0 != CLOSED && self.leave(page, handoff, !handoff.0).is_ok()
    }

    /// Target: lets `handoff` be settled no more. Returns whether it has been.
    pub(crate) fn close(&self, page: PageId, handoff: HandoffId) -> bool {
        self.leave(page, handoff, CLOSED) == Err(!handoff.0)
    }

    fn leave(&self, page: PageId, handoff: HandoffId, to: u64) -> Result<u64, u64> {
        self.word(page).compare_exchange(handoff.0, to, Ordering::AcqRel, Ordering::Acquire)
    }

    fn word(&self, page: PageId) -> &AtomicU64 {
        let at = page.0 as usize;
        assert!(at < self.0.len() / size_of::<u64>(), "page {at} has no word");
        // SAFETY: inside the map, which lives as long as `self` and starts at a page of the system, so that the word is aligned. All
        // access in this process and any other is by atomic operations of this size.
        unsafe { AtomicU64::from_ptr(self.0.as_mut_ptr().cast::<u64>().add(at)) }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::testing::pool_with_seals;
    use rustix::fs::SealFlags;
    use std::{os::unix::fs::FileExt, sync::Barrier, thread};

    const PAGE: PageId = PageId(2);
    const H: HandoffId = HandoffId(0xB1);

    /// The words of three pages, as the target and the source have them.
    fn both() -> (File, Words, Words) {
        let file = pool_with_seals(Words::bytes(3), SealFlags::SHRINK | SealFlags::GROW);
        let [target, source] = [(); 2].map(|()| Words::map(&file, 3).expect("map"));
        (file, target, source)
    }

    #[test]
    fn who_comes_first_decides() {
        let (_, target, source) = both();
        assert!(!source.settle(PAGE, H), "not open yet");
        target.open(PAGE, H);
        assert!(!source.settle(PAGE, HandoffId(7)), "another hand-off");
        assert!(!source.settle(PageId(1), H), "another page");
        assert!(source.settle(PAGE, H));
        assert!(!source.settle(PAGE, H), "once");
        assert!(target.close(PAGE, H) && target.close(PAGE, H));

        target.open(PAGE, H);
        assert!(!target.close(PAGE, H));
        assert!(!source.settle(PAGE, H));
        assert!(!target.close(PAGE, H));
    }

    /// A word is eight bytes of the file and nothing else, and there is none beyond the last.
    #[test]
    fn words_lie_where_pages_say() {
        let (file, target, _) = both();
        target.open(PageId(1), HandoffId(u64::MAX / 3));
        let mut bytes = [1; 24];
        file.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(bytes, std::array::from_fn(|at| if (8..16).contains(&at) { 0x55 } else { 0 }));
        let beyond = std::panic::catch_unwind(|| target.open(PageId(3), H));
        assert!(beyond.is_err());
        let error = Words::map(&file, 4).expect_err("too short").to_string();
        assert_eq!(error, "the words of 4 pages have 32 bytes, not 24");
    }

    /// What the source wrote before it settled is there once the target knows that it did, and one of both wins.
    #[test]
    fn a_race_has_one_winner() {
        let (_, target, source) = both();
        let (written, start) = (AtomicU64::new(0), Barrier::new(2));
        let mut settled = 0;
        for round in 1..=2_000_u64 {
            let handoff = HandoffId(round);
            target.open(PAGE, handoff);
            let (won, closed) = thread::scope(|scope| {
                let source = scope.spawn(|| {
                    start.wait();
                    written.store(round, Ordering::Relaxed);
                    source.settle(PAGE, handoff)
                });
                start.wait();
                let closed = target.close(PAGE, handoff);
                assert!(!closed || written.load(Ordering::Relaxed) == round);
                (source.join().expect("the source"), closed)
            });
            assert_eq!(won, closed);
            settled += u64::from(won);
        }
        println!("{settled} of 2000 settled");
    }
}
