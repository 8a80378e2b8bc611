//! Bytes on their way from one worker.

use std::time::Duration;

/// A worker's outgoing link: one thing after the other, at a constant bandwidth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    bytes_per_s: f64,
    free: Duration,
}

impl Link {
    pub(crate) fn new(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, free: Duration::ZERO }
    }

    /// Takes `bytes` that may leave from `from` on. Returns when the last of them has come.
    pub(crate) fn send(&mut self, bytes: u64, from: Duration) -> Duration {
        self.free = self.free.max(from) + self.time(bytes);
        self.free
    }

    pub(crate) fn time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_s)
    }
}
