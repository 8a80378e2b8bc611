//! What a worker tells routers about its load.

use std::time::Duration;

/// Load of a worker, as of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences not yet scheduled.
    pub waiting: usize,
    /// Tokens known and not yet computed, over both.
    pub waiting_tokens: usize,
    /// Pages free or evictable.
    pub pages_free: usize,
    /// Pages in the pool.
    pub pages_total: usize,
    /// Hand-offs in flight.
    pub handoffs: usize,
    /// Recent, in tokens per second.
    pub prefill: Rate,
    /// Recent steps that only decode, per second.
    pub decode_steps: Rate,
    /// Recent, of hand-offs this worker sent; 0 = not known yet.
    pub link_bytes_per_s: f64,
    /// Whether new submissions are refused.
    pub draining: bool,
}

/// A moving average of work per time, weighted by time: half of it is younger than about a second of work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    amount: f64,
    seconds: f64,
}

impl Rate {
    /// Seconds of work after which a measurement counts half.
    const HALF_LIFE: f64 = 1.0;

    /// Adds `amount` done in `took`.
    pub fn add(&mut self, amount: f64, took: Duration) {
        let took = took.as_secs_f64();
        let keep = (-took / Self::HALF_LIFE).exp2();
        self.amount = self.amount * keep + amount;
        self.seconds = self.seconds * keep + took;
    }

    /// Returns the rate per second; 0 while nothing was measured.
    pub fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.amount / self.seconds } else { 0.0 }
    }
}

impl From<&Load> for proto::Load {
    fn from(load: &Load) -> Self {
        let steps_per_second = load.decode_steps.per_second();
        Self {
            running: load.running as u32,
            waiting: load.waiting as u32,
            waiting_tokens: load.waiting_tokens as u64,
            pages_free: load.pages_free as u32,
            pages_total: load.pages_total as u32,
            handoffs: load.handoffs as u32,
            prefill_tokens_per_s: load.prefill.per_second() as f32,
            decode_step_ms: if steps_per_second > 0.0 { (1e3 / steps_per_second) as f32 } else { 0.0 },
            link_bytes_per_s: load.link_bytes_per_s as f32,
            draining: load.draining,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_follows_the_last_seconds_of_work() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(), 0.0);
        for _ in 0..100 {
            rate.add(10.0, Duration::from_millis(100));
        }
        assert!((rate.per_second() - 100.0).abs() < 1e-6);
        for _ in 0..30 {
            rate.add(20.0, Duration::from_millis(100));
        }
        assert!(rate.per_second() > 180.0, "{}", rate.per_second());
    }
}
