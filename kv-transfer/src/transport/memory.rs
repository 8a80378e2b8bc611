//! `memory`: both workers live in this process, and the source copies blocks straight into the target's pool.
//!
//! The source finds the target's landings in a process-wide registry under the number that the target's `Welcome` named. The
//! copy runs on the *source's* movers, in bursts under the target's permit: closing the landing waits for at most one burst
//! and then proves that nothing more is written.

use super::{BURST_BYTES, Job, JobQueue, Queued, bursts};
use crate::{
    digest::FrameHasher,
    landing::{Landing, Landings},
    link::LinkStop,
    mover::Movers,
    pages::Pages,
    plan::{self, Place, Terms},
};
use kv_cache::Reach;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};

/// Landings of this process, by number.
static REGISTRY: Mutex<Option<HashMap<u64, Weak<Landings>>>> = Mutex::new(None);

/// Returns the number of this process: two workers that see the same one share memory.
pub(crate) fn process() -> u64 {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    *PROCESS.get_or_init(rand::random)
}

/// Landings that peers in this process can find, until dropped.
#[derive(Debug)]
pub(crate) struct Registration(u64);

impl Registration {
    /// Lists `landings` under a new number.
    pub(crate) fn new(landings: &Arc<Landings>) -> Self {
        let number = rand::random();
        registry().get_or_insert_default().insert(number, Arc::downgrade(landings));
        Self(number)
    }

    /// Returns the number to tell peers.
    pub(crate) fn number(&self) -> u64 {
        self.0
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        registry().get_or_insert_default().remove(&self.0);
    }
}

fn registry() -> MutexGuard<'static, Option<HashMap<u64, Weak<Landings>>>> {
    // Whole between any two statements.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a link's copiers share.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// The source's pool.
    pub(crate) pool: Arc<Pages>,
    /// How its pages become pages of the target.
    pub(crate) terms: Arc<Terms>,
    /// Token of the link.
    pub(crate) token: u64,
    /// Whether contents are digested on both sides.
    pub(crate) digest: bool,
}

/// Starts copiers on `movers` for the landings under `number`, or `None` when they are gone.
pub(crate) fn start(number: u64, path: &Path, movers: &Movers, link: &LinkStop) -> Option<Queued> {
    let landings = registry().as_ref()?.get(&number)?.upgrade()?;
    let direct = (!path.digest && !path.terms.converts()).then(|| reach(&path.pool, landings.pool())).flatten();
    let queued = Queued::new(movers.count());
    for mover in 0..movers.count() {
        let (queue, path, landings) = (queued.queue.clone(), path.clone(), landings.clone());
        let direct = direct.clone();
        queued.run(movers, mover, (link, "a copier ended"), async move {
            copy_frames((&queue, mover), &landings, &path, direct.as_deref()).await
        });
    }
    Some(queued)
}

/// Returns how `source` reaches the pages of `target`, if both are on cards.
fn reach(source: &Pages, target: &Pages) -> Option<Arc<dyn Reach>> {
    let (ours, theirs) = (source.backing()?, target.backing()?);
    let reached = theirs.share().and_then(|shared| ours.reach(&shared));
    let problem = |problem: &String| tracing::warn!(problem, "pages go from card to card through the host's memory");
    reached.inspect_err(problem).ok()
}

async fn copy_frames(
    (queue, mover): (&JobQueue, usize),
    landings: &Landings,
    path: &Path,
    direct: Option<&dyn Reach>,
) -> String {
    loop {
        let job = queue.next(mover).await;
        match landings.find(job.frame.handoff, path.token) {
            Some(landing) if landing.admit(&job.frame.pieces) => {
                if let Err(problem) = copy_frame(job, &landing, path, direct).await {
                    return problem;
                }
            }
            _ => landings.stale(job.frame.handoff),
        }
    }
}

/// Copies one frame, unless the landing is closed meanwhile; then the job is dropped and so reported as lost. An error ends the link.
async fn copy_frame(job: Job, landing: &Landing, path: &Path, direct: Option<&dyn Reach>) -> Result<(), String> {
    let frame = &job.frame;
    let source = Place { view: &path.terms.source, pages: &frame.pages };
    if let Some(direct) = direct {
        let Some(permit) = landing.enter() else { return Ok(()) };
        if let Err(problem) = direct.write(&plan::copies(source, landing.place(), &frame.pieces)) {
            // A card that hangs may go on with it later: the landing stays open, and the pages as they are.
            std::mem::forget((permit, job));
            return Err(problem);
        }
        landing.landed_directly(&permit, frame.sequence, &frame.pieces, None);
        drop(permit);
        job.finish(None);
        return Ok(());
    }
    path.pool.fetch(source, &frame.pieces)?;
    let hasher = || path.digest.then(|| FrameHasher::new(frame.handoff, frame.sequence, &frame.pieces));
    let (mut sent, mut landed) = (hasher(), hasher());
    if path.terms.converts() {
        for part in plan::parts(&path.terms, &frame.pieces, BURST_BYTES) {
            // SAFETY: the source blocks are frozen until this job reports back.
            let blocks = unsafe { path.pool.converted(&path.terms, &frame.pages, &part) };
            let Some(permit) = landing.enter() else { return Ok(()) };
            // SAFETY: the landing blocks were admitted to this frame alone and the permit is held.
            unsafe { landing.pool().write_blocks(landing.place(), &part, &blocks) };
            if let (Some(sent), Some(landed)) = (&mut sent, &mut landed) {
                sent.update(&blocks);
                for extent in plan::extents(landing.place(), &part) {
                    // SAFETY: as above; nobody else writes them.
                    landed.update(unsafe { landing.pool().bytes(extent) });
                }
            }
            drop(permit);
            tokio::task::yield_now().await;
        }
        finish(job, landing, sent, landed);
        return Ok(());
    }
    for burst in bursts(plan::copies(source, landing.place(), &frame.pieces)) {
        let Some(permit) = landing.enter() else { return Ok(()) };
        // SAFETY: the source blocks are frozen until this job reports back; the landing blocks were admitted to this frame
        // alone and the permit is held. Source and landing are pages of different sequences.
        unsafe { landing.pool().copy_from(&path.pool, &burst) };
        if let (Some(sent), Some(landed)) = (&mut sent, &mut landed) {
            for copy in burst {
                // SAFETY: as above; nobody else writes either.
                let (from, to) = unsafe { (path.pool.bytes(copy.from()), landing.pool().bytes(copy.to())) };
                sent.update(from);
                landed.update(to);
            }
        }
        drop(permit);
        tokio::task::yield_now().await;
    }
    finish(job, landing, sent, landed);
    Ok(())
}

fn finish(job: Job, landing: &Landing, sent: Option<FrameHasher>, landed: Option<FrameHasher>) {
    let Some(permit) = landing.enter() else { return };
    landing.landed(&permit, job.frame.sequence, &job.frame.pieces, landed.map(FrameHasher::finish));
    drop(permit);
    job.finish(sent.map(FrameHasher::finish));
}
