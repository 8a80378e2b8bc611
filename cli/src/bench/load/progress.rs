//! The line that shows how it goes, where somebody watches.

use super::play::Record;
use indicatif::{ProgressBar, ProgressStyle};
use std::{collections::VecDeque, time::Duration};

/// Requests whose median the line shows.
const RECENT: usize = 50;

#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    served: usize,
    failed: usize,
    recent_ttft: VecDeque<Duration>,
    /// At the last look: when, and how many pieces had come.
    last: (Duration, u64),
}

impl Progress {
    pub(super) fn new(total: usize) -> Self {
        let bar = ProgressBar::new(total as u64);
        // The template is constant and good; the plain bar would do as well.
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        Self { bar, served: 0, failed: 0, recent_ttft: VecDeque::new(), last: (Duration::ZERO, 0) }
    }

    /// Takes note of a request that has ended.
    pub(super) fn ended(&mut self, record: &Record) {
        match &record.outcome {
            Ok(served) => {
                self.served += 1;
                self.recent_ttft.push_back(served.ttft());
                if self.recent_ttft.len() > RECENT {
                    self.recent_ttft.pop_front();
                }
            }
            Err((failure, _)) => {
                self.failed += 1;
                if self.failed == 1 {
                    self.bar.suspend(|| eprintln!("the first failure: {failure}"));
                }
            }
        }
        self.bar.inc(1);
    }

    pub(super) fn show(&mut self, elapsed: Duration, in_flight: usize, pieces: u64) {
        let (then, before) = std::mem::replace(&mut self.last, (elapsed, pieces));
        let span = (elapsed.saturating_sub(then)).as_secs_f64();
        let rate = if span > 0.0 { (pieces - before) as f64 / span } else { 0.0 };
        let mut ttft: Vec<Duration> = self.recent_ttft.iter().copied().collect();
        ttft.sort_unstable();
        let ttft =
            ttft.get(ttft.len() / 2).map_or_else(|| "-".into(), |ttft| format!("{:.0} ms", ttft.as_secs_f64() * 1e3));
        let failed = self.failed;
        self.bar.set_message(format!(
            "{:.0} s  {in_flight} in flight  {failed} failed  {rate:.0} tok/s  TTFT p50 {ttft}",
            elapsed.as_secs_f64()
        ));
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
