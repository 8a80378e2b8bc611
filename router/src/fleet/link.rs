//! The task that keeps one worker attached.
//!
//! Connect, greet, take frames until the stream ends or falls silent, and again. A worker the directory no longer lists stays
//! as long as its stream lives: losing the directory must not lose traffic.

use super::{Fleet, Worker, session::Session, wire};
use cluster::Member;
use futures::stream;
use placement::Slot;
use proto::{PageEvents, WorkerFrame, worker_client::WorkerClient};
use rand::Rng;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, timeout},
};
use tonic::{Streaming, transport::Endpoint};

/// Pause after the first failure; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How much of a worker's frames may be on its way before it is read.
const WINDOW_BYTES: u32 = 1 << 20;

/// A snapshot of a large pool comes in pieces, but one piece may still be large.
const MAX_FRAME_BYTES: usize = 64 << 20;

/// Keeps `worker` attached until the fleet has forgotten it or stops.
pub(super) async fn run(fleet: Fleet, worker: Arc<Worker>, mut member: watch::Receiver<Member>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let at = member.borrow_and_update().clone();
        let ended = tokio::select! {
            ended = attach(&fleet, &worker, &at, &mut member) => ended,
            () = worker.gone.cancelled() => return,
        };
        if ended.was_attached {
            pause = FIRST_PAUSE;
        }
        if pause == FIRST_PAUSE {
            tracing::warn!(worker = %worker.id, address = %at.address, reason = %ended.reason, "worker is not attached");
        } else {
            tracing::debug!(worker = %worker.id, address = %at.address, reason = %ended.reason, "worker is still not attached");
        }
        fleet.drop_unlisted(&worker);
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            _ = member.changed() => pause = FIRST_PAUSE,
            () = worker.gone.cancelled() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Why a worker is not attached (any more).
struct Detached {
    reason: String,
    was_attached: bool,
}

async fn attach(fleet: &Fleet, worker: &Arc<Worker>, at: &Member, member: &mut watch::Receiver<Member>) -> Detached {
    let session = Session::new(&fleet.router);
    let limit = fleet.limits.connect_timeout();
    let (incarnation, frames) = match timeout(limit, greet(&session, at)).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(reason)) => return Detached { reason, was_attached: false },
        Err(_) => return Detached { reason: format!("no welcome within {limit:?}"), was_attached: false },
    };
    let mut attached = Attached::new(fleet, worker, session, incarnation);
    let reason = attached.serve(frames, at, member).await;
    attached.reason.clone_from(&reason);
    Detached { reason, was_attached: true }
}

/// Opens the stream and waits for the welcome. Returns the worker's incarnation.
async fn greet(session: &Arc<Session>, at: &Member) -> Result<(u64, Streaming<WorkerFrame>), String> {
    let endpoint = Endpoint::from_shared(format!("http://{}", at.address))
        .map_err(|e| format!("address {:?}: {e}", at.address))?
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let channel = endpoint.connect().await.map_err(|e| format!("connect: {}", root_cause(&e)))?;
    let mut client = WorkerClient::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
    let outgoing = stream::unfold(session.clone(), |session| async move {
        let frame = session.next_frame().await?;
        Some((frame, session))
    });
    let mut frames = client.attach(outgoing).await.map_err(|e| format!("attach: {}", e.message()))?.into_inner();
    let first = frames.message().await.map_err(|e| format!("welcome: {}", e.message()))?;
    let mut first = first.unwrap_or_default();
    let welcome = first.welcome.take().ok_or("the first frame holds no welcome")?;
    if welcome.protocol != proto::PROTOCOL {
        return Err(format!("worker speaks protocol {}, this router {}", welcome.protocol, proto::PROTOCOL));
    }
    if welcome.worker != at.id {
        return Err(format!("{} answers as {:?}, not {:?}", at.address, welcome.worker, at.id));
    }
    // It may hold more, the adapters above all: without them a worker that has just attached would lack them for a moment.
    session.receive(&mut first);
    Ok((welcome.incarnation, frames))
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A worker that takes work. Dropping it makes the worker unavailable and tells its legs.
struct Attached<'a> {
    fleet: &'a Fleet,
    worker: &'a Arc<Worker>,
    session: Arc<Session>,
    pages: PageLog,
    /// Told to the legs.
    reason: String,
}

impl<'a> Attached<'a> {
    fn new(fleet: &'a Fleet, worker: &'a Arc<Worker>, session: Arc<Session>, incarnation: u64) -> Self {
        let slot = fleet.index().assign();
        worker.attached(session.clone(), incarnation, slot);
        fleet.changed();
        tracing::info!(worker = %worker.id, incarnation, "worker attached");
        Self {
            fleet,
            worker,
            session,
            pages: PageLog { slot, state: PageLogState::Ahead },
            reason: "router stopped".into(),
        }
    }

    /// Takes frames until the stream is of no use. Returns why.
    async fn serve(
        &mut self,
        mut frames: Streaming<WorkerFrame>,
        at: &Member,
        member: &mut watch::Receiver<Member>,
    ) -> String {
        let limits = &self.fleet.limits;
        let mut probe = tokio::time::interval(limits.probe_interval());
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut last_frame, mut pings) = (Instant::now(), 0);
        loop {
            // All three are cancel-safe: a frame is only taken from the stream when it is whole.
            tokio::select! {
                frame = frames.message() => match frame {
                    Ok(Some(frame)) => {
                        last_frame = Instant::now();
                        self.take(frame);
                    }
                    Ok(None) => return "worker ended the stream".into(),
                    Err(status) => return format!("stream broke: {}", status.message()),
                },
                _ = probe.tick() => {
                    let silence = last_frame.elapsed();
                    if silence > limits.probe_timeout() {
                        return format!("silent for {} ms", silence.as_millis());
                    }
                    pings += 1;
                    self.session.ping(pings);
                }
                changed = member.changed() => {
                    if changed.is_err() {
                        return "router stopped".into();
                    }
                    let now_at = member.borrow_and_update().address.clone();
                    if now_at != at.address {
                        return format!("moved to {now_at}");
                    }
                }
            }
        }
    }

    fn take(&mut self, mut frame: WorkerFrame) {
        let draining = self.session.draining();
        let adapters_changed = frame.adapters.is_some();
        self.session.receive(&mut frame);
        if let Some(events) = frame.pages {
            self.pages(&events);
        }
        if adapters_changed || frame.load.is_some_and(|load| load.draining != draining) {
            self.fleet.changed();
        }
    }

    fn pages(&mut self, events: &PageEvents) {
        match self.pages.next(events) {
            PageStep::Skip => {}
            PageStep::Resync => {
                tracing::info!(worker = %self.worker.id, sequence = events.sequence, "gap in page events: asking for all of them");
                self.session.request_resync();
            }
            PageStep::Replace => {
                let mut index = self.fleet.index();
                index.retire(self.pages.slot);
                self.pages.slot = index.assign();
                index.store(self.pages.slot, wire::page_hashes(&events.stored));
                drop(index);
                self.worker.moved(self.pages.slot);
            }
            PageStep::Apply => {
                let mut index = self.fleet.index();
                index.store(self.pages.slot, wire::page_hashes(&events.stored));
                index.evict(self.pages.slot, wire::page_hashes(&events.evicted));
            }
        }
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.worker.detached();
        // All its legs together are one failure; those of a router that stops are none.
        if self.session.is_busy() && !self.fleet.shutdown.is_cancelled() {
            self.fleet.failed(&self.worker.id, &self.reason);
        }
        self.session.close(&self.reason);
        self.fleet.index().retire(self.pages.slot);
        self.fleet.changed();
    }
}

/// Follows the numbers of page events.
#[derive(Debug)]
struct PageLog {
    slot: Slot,
    state: PageLogState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageLogState {
    /// Before a snapshot: what comes cannot be understood. Asked for one.
    Ahead,
    /// Inside a snapshot; its next piece has this number.
    Snapshot { next: u64 },
    /// The next change has this number.
    Live { next: u64 },
}

/// What to do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageStep {
    Skip,
    Resync,
    /// Forget all, then store.
    Replace,
    /// Store, then evict.
    Apply,
}

impl PageLog {
    fn next(&mut self, events: &PageEvents) -> PageStep {
        use PageLogState::{Ahead, Live, Snapshot};
        let after = |more| match more {
            true => Snapshot { next: events.sequence + 1 },
            false => Live { next: events.sequence + 1 },
        };
        let (state, step) = match self.state {
            Snapshot { next } if next == events.sequence => (after(events.more), PageStep::Apply),
            _ if events.snapshot => (after(events.more), PageStep::Replace),
            Ahead => (Ahead, PageStep::Skip),
            Live { next } if next == events.sequence => (after(false), PageStep::Apply),
            Live { .. } | Snapshot { .. } => (Ahead, PageStep::Resync),
        };
        self.state = state;
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use placement::PrefixIndex;

    fn events(sequence: u64, snapshot: bool, more: bool) -> PageEvents {
        PageEvents { sequence, snapshot, more, ..PageEvents::default() }
    }

    #[test]
    fn page_events_are_followed_and_gaps_ask_once() {
        let mut log = PageLog { slot: PrefixIndex::new(0).assign(), state: PageLogState::Ahead };
        let mut check = |sequence, snapshot, more, expected| {
            assert_eq!(log.next(&events(sequence, snapshot, more)), expected, "message {sequence}");
        };
        check(4, false, false, PageStep::Skip);
        check(5, true, true, PageStep::Replace);
        check(6, false, true, PageStep::Apply);
        check(7, true, false, PageStep::Apply);
        check(8, false, false, PageStep::Apply);
        check(10, false, false, PageStep::Resync);
        check(11, false, false, PageStep::Skip);
        check(12, true, false, PageStep::Replace);
        check(13, false, false, PageStep::Apply);
        check(14, true, true, PageStep::Replace);
        check(16, false, false, PageStep::Resync);
    }
}
