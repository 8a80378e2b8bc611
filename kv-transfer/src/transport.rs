//! Ways to move bytes.
//!
//! A link has one [`Transport`] at its source: it takes frames and says when each no longer needs its blocks. It decides
//! nothing: what may be sent is decided by the source's state machine, what may be written by the target's landings. Control
//! messages never pass through it; they have the link's own socket, whose closing is seen at once.
//!
//! | transport | who writes the target's pages | proof that no write can land                                  |
//! |-----------|-------------------------------|---------------------------------------------------------------|
//! | `memory`  | the source's mover, by permit | the landing is closed                                         |
//! | `shm`     | the source, from outside      | its `Quiet`, `Commit` or word; the map or its process is gone |
//! | `ucx`     | the source, from outside      | as `shm`, and its UCX worker at the target is destroyed       |
//! | `tcp`     | the target's mover, by permit | the landing is closed                                         |
//!
//! A one-sided transport (`shm`, `ucx`) has everything it needs in a [`Frame`]: the pages on both sides. It tells the target of each
//! frame by a `Pages` message on the control connection.

pub(crate) mod memory;
pub(crate) mod shm;
pub(crate) mod tcp;
pub(crate) mod ucx;

use crate::{
    HandoffId,
    digest::Digest,
    handoffs::Moved,
    inbox::{Inbox, Note},
    link::LinkStop,
    mover::Movers,
    source::Frame,
    speed::Speed,
};
use kv_cache::{PageId, PoolCopy};
use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Bytes moved between two looks at anything else: one system call, one permit. At memory speed some 20 to 60 µs, which bounds
/// how long a mover's other links, and a seal, wait; small enough to be digested from the second-level cache.
pub(crate) const BURST_BYTES: usize = 256 << 10;

/// Cuts `copies` into groups of at most [`BURST_BYTES`], in order.
pub(crate) fn bursts(copies: Vec<PoolCopy>) -> impl Iterator<Item = Vec<PoolCopy>> {
    let mut copies = copies.into_iter();
    let mut rest: Option<PoolCopy> = None;
    std::iter::from_fn(move || {
        let mut burst = Vec::new();
        let mut room = BURST_BYTES;
        while room > 0
            && let Some(copy) = rest.take().or_else(|| copies.next())
        {
            let bytes = copy.bytes.min(room);
            room -= bytes;
            burst.push(PoolCopy { bytes, ..copy });
            if bytes < copy.bytes {
                let (source, target) = (copy.source + bytes, copy.target + bytes);
                rest = Some(PoolCopy { source, target, bytes: copy.bytes - bytes });
            }
        }
        (!burst.is_empty()).then_some(burst)
    })
}

/// The source's end of a link's data path.
pub(crate) trait Transport: fmt::Debug + Send + Sync {
    /// Queues a frame. Never blocks. The number of frames is bounded by the state machines' windows.
    fn post(&self, job: Job);

    /// Drops the frames of `handoff` that have not started.
    fn cancel(&self, handoff: HandoffId);

    /// Settles `handoff`, whose frames have all been reported and whose landing ends with the target's page `page`. Returns whether it is
    /// settled; otherwise the target has called it off, or has to be asked.
    fn settle(&self, _handoff: HandoffId, _page: PageId) -> bool {
        false
    }

    /// Stops. Every frame that has not left is dropped, as soon as nobody reads its blocks.
    fn close(&self);
}

/// A frame on its way. Dropping it unfinished reports it as lost, so no way out of a transport forgets one.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) frame: Frame,
    bytes: u64,
    /// Nothing else was under way when it was posted.
    alone: bool,
    inbox: Arc<Inbox>,
    speed: Arc<Speed>,
    sent: Option<Moved>,
}

impl Job {
    /// Starts the way of `frame`, whose blocks have `bytes` in all.
    pub(crate) fn new(frame: Frame, bytes: u64, inbox: Arc<Inbox>, speed: Arc<Speed>) -> Self {
        let alone = speed.started(Instant::now());
        Self { frame, bytes, alone, inbox, speed, sent: None }
    }

    /// All bytes are on their way and its blocks are no longer read.
    pub(crate) fn finish(mut self, digest: Option<Digest>) {
        self.sent = Some(Moved::Sent { sequence: self.frame.sequence, bytes: self.bytes, digest });
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let moved = self.sent.take().unwrap_or(Moved::Lost);
        let bytes = if matches!(moved, Moved::Lost) { 0 } else { self.bytes };
        self.speed.finished(Instant::now(), bytes);
        self.inbox.put(Note::Moved(self.frame.handoff, moved));
    }
}

/// The source's end of a link whose movers draw frames from one queue. What differs between kinds is what a mover does with one.
#[derive(Debug)]
pub(crate) struct Queued {
    queue: Arc<JobQueue>,
    stop: CancellationToken,
}

impl Queued {
    fn new(movers: usize) -> Self {
        Self { queue: JobQueue::new(movers), stop: CancellationToken::new() }
    }

    /// Runs `moving` on mover `number` until the transport is closed. It ends on its own only with a reason, and the link with it;
    /// `ended` is the reason where it could give none.
    fn run(
        &self,
        movers: &Movers,
        number: usize,
        (link, ended): (&LinkStop, &'static str),
        moving: impl Future<Output = String> + Send + 'static,
    ) {
        let (stop, ends) = (self.stop.clone(), EndsLink(link.clone(), ended));
        movers.spawn(number, async move {
            if let Some(reason) = stop.run_until_cancelled(moving).await {
                ends.0.stop(reason);
            }
            drop(ends);
        });
    }
}

impl Transport for Queued {
    fn post(&self, job: Job) {
        self.queue.post(job);
    }

    fn cancel(&self, handoff: HandoffId) {
        self.queue.cancel(handoff);
    }

    fn close(&self) {
        self.queue.close();
        self.stop.cancel();
    }
}

/// Frames waiting for one of the movers of a link, first come first served. While nothing else is under way, a frame is for home, on
/// whose thread it was posted: to wake another, and be woken by its report, takes as long as moving half a megabyte.
#[derive(Debug)]
pub(crate) struct JobQueue {
    state: Mutex<QueueState>,
    home: Notify,
    /// `None`: home is all there is.
    others: Option<Notify>,
}

#[derive(Debug, Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl JobQueue {
    /// Starts empty, for `movers` of them.
    pub(crate) fn new(movers: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), home: Notify::new(), others: (movers > 1).then(Notify::new) })
    }

    fn post(&self, job: Job) {
        let mut state = self.lock();
        if !state.closed {
            let others = self.others.as_ref().filter(|_| !job.alone);
            state.jobs.push_back(job);
            let queued = state.jobs.len();
            drop(state);
            if let Some(others) = others {
                others.notify_one();
            }
            if others.is_none() || queued > 1 {
                self.home.notify_one();
            }
        }
    }

    /// Takes the next frame, if there is one.
    fn try_next(&self) -> Option<Job> {
        self.lock().jobs.pop_front()
    }

    /// Waits for the next frame, on mover `number`. Cancel safe.
    async fn next(&self, number: usize) -> Job {
        let wake = self.others.as_ref().filter(|_| number > 0).unwrap_or(&self.home);
        loop {
            if let Some(job) = self.try_next() {
                return job;
            }
            wake.notified().await;
        }
    }

    /// Says whether a frame of `handoff` is next.
    fn continues(&self, handoff: HandoffId) -> bool {
        self.lock().jobs.front().is_some_and(|job| job.frame.handoff == handoff)
    }

    fn cancel(&self, handoff: HandoffId) {
        let mut state = self.lock();
        let jobs = std::mem::take(&mut state.jobs);
        let (cancelled, kept): (VecDeque<_>, _) = jobs.into_iter().partition(|job| job.frame.handoff == handoff);
        state.jobs = kept;
        drop(state);
        drop(cancelled);
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        drop(jobs);
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        // Whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the link down when the data path of it ends for whatever reason, a panic included.
#[derive(Debug)]
pub(crate) struct EndsLink(pub(crate) LinkStop, pub(crate) &'static str);

impl Drop for EndsLink {
    fn drop(&mut self) {
        self.0.stop(self.1);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::Piece;
    use futures::{FutureExt, future::BoxFuture};

    /// Makes frames of a worker on which nothing else is under way.
    #[derive(Default)]
    pub(crate) struct Jobs {
        inbox: Arc<Inbox>,
        speed: Arc<Speed>,
    }

    impl Jobs {
        pub(crate) fn job(&self, handoff: u64, sequence: u32) -> Job {
            let pieces = vec![Piece { layer: 0, pages: sequence..sequence + 1 }];
            let (handoff, pages, landing) = (HandoffId(handoff), [].into(), [].into());
            let frame = Frame { handoff, sequence, pieces, pages, landing };
            Job::new(frame, 1, self.inbox.clone(), self.speed.clone())
        }
    }

    fn taken(next: &mut BoxFuture<'_, Job>) -> Option<u32> {
        next.now_or_never().map(|job| job.frame.sequence)
    }

    #[test]
    fn a_lone_frame_is_for_home_and_further_ones_wake_the_others() {
        let (jobs, queue) = (Jobs::default(), JobQueue::new(2));
        let (mut home, mut other) = (queue.next(0).boxed(), queue.next(1).boxed());
        assert_eq!((taken(&mut home), taken(&mut other)), (None, None));
        queue.post(jobs.job(1, 0));
        assert_eq!((taken(&mut other), taken(&mut home)), (None, Some(0)));
        let _moving = jobs.job(1, 1);
        queue.post(jobs.job(2, 2));
        let mut home = queue.next(0).boxed();
        assert_eq!(taken(&mut other), Some(2));
        assert_eq!(taken(&mut home), None);
        let mut other = queue.next(1).boxed();
        assert_eq!(taken(&mut other), None);
        (3..5).for_each(|sequence| queue.post(jobs.job(2, sequence)));
        assert_eq!((taken(&mut home), taken(&mut other)), (Some(3), Some(4)), "both where frames queue");
    }

    #[test]
    fn home_alone_takes_everything() {
        let (jobs, queue) = (Jobs::default(), JobQueue::new(1));
        let _moving = jobs.job(1, 0);
        let mut home = queue.next(0).boxed();
        assert_eq!(taken(&mut home), None);
        queue.post(jobs.job(1, 1));
        assert_eq!(taken(&mut home), Some(1));
    }

    #[test]
    fn bursts_hold_every_copy_once_in_order() {
        let copy = |source, target, bytes| PoolCopy { source, target, bytes };
        let copies = vec![copy(10, 20, 5), copy(100, 900, 2 * BURST_BYTES), copy(7, 3, 1)];
        assert_eq!(
            bursts(copies).collect::<Vec<_>>(),
            [
                vec![copy(10, 20, 5), copy(100, 900, BURST_BYTES - 5)],
                vec![copy(95 + BURST_BYTES, 895 + BURST_BYTES, BURST_BYTES)],
                vec![copy(95 + 2 * BURST_BYTES, 895 + 2 * BURST_BYTES, 5), copy(7, 3, 1)],
            ]
        );
        assert_eq!(bursts(Vec::new()).count(), 0);
    }
}
