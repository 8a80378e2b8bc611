//! How fast the links of a worker have been lately, and how much of their time was hidden by computing.

use crate::Overlapped;
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Least bytes that make a sample: below it, wake-ups are measured rather than the link.
const LEAST_BYTES: u64 = 256 << 10;
/// Bytes after which a sample is taken although there is more to send.
const ENOUGH_BYTES: u64 = 64 << 20;
/// Weight of the newest sample.
const WEIGHT: f64 = 0.25;

/// Bytes per second while something was under way; time without is not counted. What is under way are frames, and commits
/// until they are acknowledged: bytes that only reached a socket's buffer have not arrived.
#[derive(Debug, Default)]
pub(crate) struct Speed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    in_flight: usize,
    busy_since: Option<Instant>,
    busy: Duration,
    bytes: u64,
    bytes_per_s: f64,
    overlapped: Overlapped,
}

impl Speed {
    /// A frame was handed to a transport, or a commit sent. Returns whether nothing else is under way.
    pub(crate) fn started(&self, now: Instant) -> bool {
        self.with(|state| {
            state.in_flight += 1;
            state.busy_since.get_or_insert(now);
            state.in_flight == 1
        })
    }

    /// A frame of `bytes` left (0: did not), or a commit was answered.
    pub(crate) fn finished(&self, now: Instant, bytes: u64) {
        self.with(|state| {
            state.in_flight -= 1;
            state.bytes += bytes;
            let since = state.busy_since.unwrap_or(now);
            state.busy += now.saturating_duration_since(since);
            state.busy_since = (state.in_flight > 0).then_some(now);
            let idle = state.in_flight == 0 && state.bytes >= LEAST_BYTES;
            if (idle || state.bytes >= ENOUGH_BYTES) && !state.busy.is_zero() {
                let sample = state.bytes as f64 / state.busy.as_secs_f64();
                let old = if state.bytes_per_s == 0.0 { sample } else { state.bytes_per_s };
                state.bytes_per_s = old + WEIGHT * (sample - old);
                (state.bytes, state.busy) = (0, Duration::ZERO);
            }
        });
    }

    /// A hand-off landed that spent this moving.
    pub(crate) fn overlapped(&self, more: Overlapped) {
        self.with(|state| {
            state.overlapped.moved += more.moved;
            state.overlapped.hidden += more.hidden;
        });
    }

    /// Returns what all that landed spent moving.
    pub(crate) fn all_overlapped(&self) -> Overlapped {
        self.with(|state| state.overlapped)
    }

    /// Returns the recent speed in bytes per second; 0 = not known yet.
    pub(crate) fn bytes_per_s(&self) -> f64 {
        self.with(|state| state.bytes_per_s)
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_does_not_count() {
        let speed = Speed::default();
        assert_eq!(speed.bytes_per_s(), 0.0);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Two overlapping frames in 10 ms, an hour of nothing, two in a row in 20 ms: 100 MB/s throughout.
        for now in [at(0), at(0)] {
            speed.started(now);
        }
        speed.finished(at(5), 500_000);
        speed.finished(at(10), 500_000);
        assert!((speed.bytes_per_s() - 1e8).abs() < 1e3, "{}", speed.bytes_per_s());
        speed.started(at(3_600_000));
        speed.finished(at(3_600_010), 1_000_000);
        speed.started(at(3_600_010));
        speed.finished(at(3_600_020), 1_000_000);
        assert!((speed.bytes_per_s() - 1e8).abs() < 1e3, "{}", speed.bytes_per_s());
    }

    #[test]
    fn lost_and_tiny_frames_say_nothing() {
        let speed = Speed::default();
        let start = Instant::now();
        for bytes in [0, 4096] {
            speed.started(start);
            speed.finished(start + Duration::from_millis(1), bytes);
        }
        assert_eq!(speed.bytes_per_s(), 0.0);
    }
}
