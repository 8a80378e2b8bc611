//! Ready and alive, or why not.
//!
//! *Ready* is what the part says of itself: it can take work. *Alive* is judged from steps: while there is work, a step must finish
//! every so often. A part without work is alive however long it rests.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// What probes are told about one part of a process. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Health {
    core: Arc<Mutex<Core>>,
}

impl Health {
    /// Starts not ready, for the reason given, and alive. `stall` is how long [`Health::work_began`] may go without
    /// [`Health::progressed`] before the part counts as hung.
    pub fn new(reason: &str, stall: Duration) -> Self {
        Self { core: Arc::new(Mutex::new(Core { unready: Some(reason.into()), stall, waiting_since: None })) }
    }

    /// The part can take work.
    pub fn ready(&self) {
        self.core().unready = None;
    }

    /// The part cannot take work, for this reason.
    pub fn not_ready(&self, reason: &str) {
        self.core().unready = Some(reason.into());
    }

    /// There is work: from now on progress is expected. Saying so again changes nothing.
    pub fn work_began(&self) {
        self.core().work_began(Instant::now());
    }

    /// A step finished. `idle` when nothing is left to do, so that no further progress is expected.
    pub fn progressed(&self, idle: bool) {
        self.core().progressed(Instant::now(), idle);
    }

    /// `Err` with the reason while not ready (`/readyz`).
    pub fn readiness(&self) -> Result<(), String> {
        self.core().unready.clone().map_or(Ok(()), Err)
    }

    /// `Err` with the reason when work is there but no step finishes (`/livez`).
    pub fn liveness(&self) -> Result<(), String> {
        self.core().liveness(Instant::now())
    }

    /// Whoever panicked while holding it left nothing half done: each change is one assignment.
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state behind [`Health`]. Pure: time is an argument.
#[derive(Debug)]
struct Core {
    unready: Option<String>,
    stall: Duration,
    /// There is work, and no step has finished since.
    waiting_since: Option<Instant>,
}

impl Core {
    fn work_began(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    fn progressed(&mut self, now: Instant, idle: bool) {
        self.waiting_since = (!idle).then_some(now);
    }

    fn liveness(&self, now: Instant) -> Result<(), String> {
        let waited = self.waiting_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if waited <= self.stall {
            return Ok(());
        }
        let (waited, stall) = (waited.as_secs_f64(), self.stall.as_secs_f64());
        Err(format!("there is work, but no step has finished for {waited:.1} s (limit {stall} s)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_what_the_part_says() {
        let health = Health::new("loading weights", Duration::from_secs(1));
        let shared = health.clone();
        assert_eq!(health.readiness(), Err("loading weights".into()));
        shared.ready();
        assert_eq!(health.readiness(), Ok(()));
        shared.not_ready("draining");
        assert_eq!(health.readiness(), Err("draining".into()));
    }

    /// What happened at which second, and since when (if at all) the part is dead.
    #[test]
    fn liveness_is_judged_by_steps() {
        enum Event {
            Began,
            Step,
            LastStep,
        }
        use Event::{Began, LastStep, Step};
        fn check(events: &[(u64, Event)], at: u64, alive: bool) {
            let start = Instant::now();
            let time = |second: u64| start + Duration::from_secs(second);
            let mut core = Core { unready: None, stall: Duration::from_secs(10), waiting_since: None };
            for (second, event) in events {
                match event {
                    Began => core.work_began(time(*second)),
                    Step => core.progressed(time(*second), false),
                    LastStep => core.progressed(time(*second), true),
                }
            }
            assert_eq!(core.liveness(time(at)).is_ok(), alive, "at {at}: {:?}", core.liveness(time(at)));
        }
        check(&[], 1000, true);
        check(&[(0, Began)], 10, true);
        check(&[(0, Began)], 11, false);
        check(&[(0, Began), (9, Began)], 11, false);
        check(&[(0, Began), (8, Step)], 18, true);
        check(&[(0, Began), (8, Step)], 19, false);
        check(&[(0, Began), (8, LastStep)], 1000, true);
        check(&[(0, Began), (8, LastStep), (50, Began)], 60, true);
        check(&[(0, Began), (8, LastStep), (50, Began)], 61, false);
        check(&[(0, Began), (30, Step)], 31, true);
    }

    #[tokio::test(start_paused = true)]
    async fn the_reason_names_the_times() {
        let health = Health::new("", Duration::from_secs(10));
        health.work_began();
        assert_eq!(health.liveness(), Ok(()));
        tokio::time::advance(Duration::from_millis(12_500)).await;
        let expected = "there is work, but no step has finished for 12.5 s (limit 10 s)";
        assert_eq!(health.liveness(), Err(expected.into()));
        health.progressed(true);
        assert_eq!(health.liveness(), Ok(()));
    }
}
