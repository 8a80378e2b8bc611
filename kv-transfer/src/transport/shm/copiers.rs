//! The threads that write a target's pages from outside, and what the target is told of it.

use super::{
    super::{BURST_BYTES, Job, JobQueue, Queued, Transport, bursts},
    Remote, STEP_BYTES,
};
use crate::{
    HandoffId,
    digest::FrameHasher,
    landing::{Landing, Landings},
    link::LinkStop,
    message::Message,
    mover::Movers,
    pages::Pages,
    plan::{self, Place, Terms},
    source::Frame,
    words::Words,
};
use kv_cache::{PageId, Reach};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Frames of which a target is told at once.
const MOST_UNTOLD: usize = 8;

/// What a link's copiers share.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// The source's pool.
    pub(crate) pool: Arc<Pages>,
    /// How its pages become pages of the target.
    pub(crate) terms: Arc<Terms>,
    /// Whether contents are digested.
    pub(crate) digest: bool,
    /// The link's control connection.
    pub(crate) say: mpsc::Sender<Message>,
}

/// The source's end of a link over shared memory.
#[derive(Debug)]
struct Link {
    copiers: Queued,
    words: Arc<Words>,
}

impl Transport for Link {
    fn post(&self, job: Job) {
        self.copiers.post(job);
    }

    fn cancel(&self, handoff: HandoffId) {
        self.copiers.cancel(handoff);
    }

    fn settle(&self, handoff: HandoffId, page: PageId) -> bool {
        self.words.settle(page, handoff)
    }

    fn close(&self) {
        self.copiers.close();
    }
}

/// Starts writing into the pool that a target has passed.
pub(crate) fn start_passed(remote: Remote, path: &Path, movers: &Movers, link: &LinkStop) -> Arc<dyn Transport> {
    let words = remote.passed().1.clone();
    Arc::new(Link { copiers: start(remote, path, movers, link), words })
}

/// A target's pool as its source writes it.
pub(crate) trait Writable: AsRef<Pages> + Send + Sync {
    /// Returns the target's pages on cards, where the source reaches them there.
    fn direct(&self) -> Option<&dyn Reach> {
        None
    }

    /// From here on nobody vouches for it that nothing is written any more.
    fn never_leaves(&self) {}

    /// Says whether all of the map is written sooner or later.
    fn is_touched(&self) -> bool {
        true
    }
}

/// Starts copiers on `movers` into the target's pool, as `remote` has it mapped. That is dropped with the last of them.
pub(crate) fn start(remote: impl Writable + 'static, path: &Path, movers: &Movers, link: &LinkStop) -> Queued {
    let (queued, remote) = (Queued::new(movers.count()), Arc::new(remote));
    let news = Arc::new(News { say: path.say.clone(), queue: queued.queue.clone(), state: Mutex::default() });
    for mover in 0..movers.count() {
        let (queue, path, remote, news) = (queued.queue.clone(), path.clone(), remote.clone(), news.clone());
        queued.run(movers, mover, (link, "a copier ended"), async move {
            loop {
                if let Err(reason) = write_frame(queue.next(mover).await, &*remote, &path, &news).await {
                    return reason;
                }
            }
        });
    }
    if remote.is_touched() {
        let stopped = queued.stop.clone();
        movers.spawn(movers.count() - 1, async move {
            stopped.run_until_cancelled(touch((*remote).as_ref())).await;
        });
    }
    queued
}

/// Fills the page tables of the map, so that copies do not stop at every page they meet for the first time.
async fn touch(pages: &Pages) {
    for at in (0..pages.layout().pool_bytes()).step_by(STEP_BYTES) {
        if !pages.touch(at, STEP_BYTES) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Writes one frame and says so. An error ends the link.
async fn write_frame(job: Job, writable: &impl Writable, path: &Path, news: &News) -> Result<(), String> {
    let frame = &job.frame;
    news.copying(frame);
    let (remote, direct) = (writable.as_ref(), writable.direct());
    let pages = remote.layout().pages;
    if let Some(page) = frame.landing.iter().find(|page| page.0 >= pages) {
        return Err(format!("landing page {} of a pool of {pages}", page.0));
    }
    let mut hasher = path.digest.then(|| FrameHasher::new(frame.handoff, frame.sequence, &frame.pieces));
    let source = Place { view: &path.terms.source, pages: &frame.pages };
    let target = Place { view: &path.terms.target, pages: &frame.landing };
    // SAFETY, here and below: the source blocks are frozen until this job reports back. The landing blocks are this hand-off's until
    // the target has our `Quiet` or `Commit`, which come after that report, or our word that the pool is unmapped, which comes
    // after this task is gone. Each block is in one frame only.
    if let Some(direct) = direct {
        if let Err(problem) = direct.write(&plan::copies(source, target, &frame.pieces)) {
            // A card that hangs may go on with it later: nobody says that it does not, until this process is gone.
            writable.never_leaves();
            std::mem::forget(job);
            return Err(problem);
        }
        news.copied(frame)?;
        job.finish(None);
        return Ok(());
    }
    path.pool.fetch(source, &frame.pieces)?;
    if path.terms.converts() {
        for part in plan::parts(&path.terms, &frame.pieces, BURST_BYTES) {
            // SAFETY: above.
            let blocks = unsafe { path.pool.converted(&path.terms, &frame.pages, &part) };
            // SAFETY: above.
            unsafe { remote.write_blocks(target, &part, &blocks) };
            if let Some(hasher) = &mut hasher {
                hasher.update(&blocks);
            }
            tokio::task::yield_now().await;
        }
    } else {
        for burst in bursts(plan::copies(source, target, &frame.pieces)) {
            // SAFETY: above.
            unsafe { remote.copy_from(&path.pool, &burst) };
            if let Some(hasher) = &mut hasher {
                // SAFETY: above.
                burst.into_iter().for_each(|copy| hasher.update(unsafe { path.pool.bytes(copy.from()) }));
            }
            tokio::task::yield_now().await;
        }
    }
    // Before the report, which may bring `Commit` about: the target hears of frames first.
    news.copied(frame)?;
    job.finish(hasher.map(FrameHasher::finish));
    Ok(())
}

/// What the target is told of frames. To tell it of one costs both ends as much as copying a tenth of it, so while more of the same
/// hand-off is copied or waits for that it is told of several at a time, and of the last together with the commit.
#[derive(Debug)]
struct News {
    say: mpsc::Sender<Message>,
    queue: Arc<JobQueue>,
    state: Mutex<Untold>,
}

#[derive(Debug, Default)]
struct Untold {
    /// Hand-offs of the frames that are being copied.
    copying: Vec<HandoffId>,
    /// Frames that are.
    copied: Vec<Message>,
}

impl News {
    /// A frame is about to be copied; [`News::copied`] follows, or the end of the link.
    fn copying(&self, frame: &Frame) {
        self.lock().copying.push(frame.handoff);
    }

    /// A frame is copied. An error ends the link.
    fn copied(&self, frame: &Frame) -> Result<(), String> {
        let (handoff, sequence, pieces) = (frame.handoff, frame.sequence, frame.pieces.clone());
        let mut state = self.lock();
        if let Some(at) = state.copying.iter().position(|other| *other == handoff) {
            state.copying.swap_remove(at);
        }
        state.copied.push(Message::Pages { handoff, sequence, pieces });
        let continues = state.copying.contains(&handoff) || self.queue.continues(handoff);
        if continues && state.copied.len() < MOST_UNTOLD {
            return Ok(());
        }
        let told = state.copied.drain(..).try_for_each(|message| self.say.try_send(message));
        told.map_err(|_| "the other end does not read".into())
    }

    fn lock(&self) -> MutexGuard<'_, Untold> {
        // Whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How frames of a link are written by its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Into the pool here.
    Here,
    /// Likewise, and what was written is digested.
    Digested,
    /// To where the pages are.
    Directly,
}

/// Target: takes the source's word that a frame's blocks are written. Returns what is left to be done about it, which may take as long as reading them.
pub(crate) fn written(
    landings: &Landings,
    link: u64,
    frame: Message,
    how: Written,
) -> Option<impl FnOnce() + Send + 'static> {
    let Message::Pages { handoff, sequence, pieces } = frame else { return None };
    // Now: what follows may be the word that the source writes nothing more.
    let landing =
        landings.find(handoff, link).filter(|landing| landing.is_written_from_afar() && landing.admit(&pieces));
    let Some(permit) = landing.and_then(Landing::enter_for_others) else {
        landings.stale(handoff);
        return None;
    };
    Some(move || {
        let landing = permit.landing();
        let digest = (how == Written::Digested).then(|| {
            let mut hasher = FrameHasher::new(handoff, sequence, &pieces);
            for extent in plan::extents(landing.place(), &pieces) {
                // SAFETY: the permit keeps the pages from being used for anything else, and the source said that it is done.
                hasher.update(unsafe { landing.pool().bytes(extent) });
            }
            hasher.finish()
        });
        match how {
            Written::Directly => landing.landed_directly(&permit, sequence, &pieces, digest),
            Written::Here | Written::Digested => landing.landed(&permit, sequence, &pieces, digest),
        }
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::{
        handoffs::Moved,
        inbox::{Inbox, Note},
        plan::Piece,
        testing::{fill, layout, sealed_pool},
        transport::tests::Jobs,
    };

    #[test]
    fn a_target_is_told_of_frames_together_while_more_of_them_wait() {
        let (say, mut said) = mpsc::channel(64);
        let (jobs, queue) = (Jobs::default(), JobQueue::new(1));
        let news = News { say, queue: queue.clone(), state: Mutex::default() };
        let mut copied = |job: &Job| {
            news.copied(&job.frame).expect("there is room");
            std::iter::from_fn(|| said.try_recv().ok()).count()
        };
        let mut told = |job: Job| {
            news.copying(&job.frame);
            copied(&job)
        };
        assert_eq!(told(jobs.job(1, 0)), 1, "nothing follows");
        queue.post(jobs.job(1, 99));
        assert_eq!((1..=MOST_UNTOLD as u32).map(|at| told(jobs.job(1, at))).sum::<usize>(), MOST_UNTOLD);
        assert_eq!(told(jobs.job(1, 50)), 0);
        assert_eq!(told(jobs.job(2, 0)), 2, "what follows is of another hand-off");
        assert_eq!(told(jobs.job(1, 51)), 0);
        queue.close();
        let last = jobs.job(1, 53);
        news.copying(&last.frame);
        assert_eq!(told(jobs.job(1, 52)), 0, "one is being copied");
        assert_eq!(copied(&last), 3, "nothing follows any more");
    }

    /// A source's word counts only where it can write, for what was asked for, and once.
    #[tokio::test]
    async fn only_what_was_asked_for_counts_as_written() {
        let layout = layout(2, 6);
        let file = sealed_pool(&layout);
        fill(&file, &vec![3; layout.pool_bytes()]);
        let inbox = Arc::new(Inbox::default());
        let landings = Landings::new(Arc::new(Pages::map(&file, layout.clone()).expect("map")), inbox.clone());
        landings.writer_joined(7);
        let (good, closed, elsewhere) = (HandoffId(1), HandoffId(2), HandoffId(3));
        for (handoff, link) in [(good, 7), (closed, 7), (elsewhere, 8)] {
            let terms = Terms::same(&layout, &layout);
            landings.open(handoff, (link, terms), [4, 2].map(PageId).as_slice().into(), 0..2);
        }
        landings.seal(closed);
        let said = |handoff, pieces: Vec<Piece>| Message::Pages { handoff, sequence: 5, pieces };
        let piece = |layer, pages| Piece { layer, pages };
        #[allow(clippy::reversed_empty_ranges)]
        for (link, frame) in [
            (7, said(good, vec![piece(0, 0..3)])),                 // beyond the sequence
            (7, said(good, vec![piece(2, 0..1)])),                 // beyond the layers
            (7, said(good, vec![piece(0, 0..1), piece(0, 0..1)])), // twice in one frame
            (7, said(good, vec![piece(0, 2..1)])),                 // backwards
            (7, said(closed, vec![piece(0, 0..1)])),
            (7, said(elsewhere, vec![piece(0, 0..1)])),    // another link's
            (8, said(elsewhere, vec![piece(0, 0..1)])),    // a link that cannot write by itself
            (7, said(HandoffId(9), vec![piece(0, 0..1)])), // nobody's
            (7, said(good, vec![piece(1, 1..2)])),
            (7, said(good, vec![piece(1, 1..2)])), // a second time
        ] {
            if let Some(rest) = written(&landings, link, frame, Written::Digested) {
                // What the source wrote before it said that it writes nothing more counts, whenever it is looked at.
                landings.vouched(good);
                rest();
            }
        }
        let mut notes = Vec::new();
        inbox.take(&mut notes).await;
        let moved: Vec<Moved> = notes
            .into_iter()
            .map(|(_, note)| match note {
                Note::Moved(_, moved) => moved,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(moved.iter().filter(|moved| matches!(moved, Moved::Stale)).count(), 9);
        let mut hasher = FrameHasher::new(good, 5, &[piece(1, 1..2)]);
        hasher.update(&vec![3; layout.block_bytes()]);
        let digest = Some(hasher.finish());
        let landed =
            |moved: &Moved| matches!(moved, Moved::Landed { sequence: 5, bytes: 384, digest: got } if *got == digest);
        assert_eq!(moved.iter().filter(|moved| landed(moved)).count(), 1, "{moved:?}");
    }
}
