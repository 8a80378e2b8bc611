//! What is known of one worker's load: its last report, and what was sent to it that the report does not know of.
//!
//! A submission has a number, and a report says which the worker had taken in last when it was made. So each piece of work is counted
//! once, whoever else sends work to the same worker and however messages cross on the wire. What a worker has left to compute shrinks by
//! itself: a report made at the start of a step of a second, or a prompt sent a second ago, is not held against it when the second has passed.

use crate::cost::Speed;
use std::{collections::VecDeque, time::Duration};
use timing::Pace;

/// What a worker says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Number of the last submission of ours that it had taken in.
    pub received: u64,
    /// Legs of all routers that run, wait or are on their way there.
    pub sequences: u32,
    /// Time it needs for the prompts it has, in milliseconds.
    pub backlog_ms: f64,
    /// Pages free or evictable.
    pub free_pages: u32,
    /// Pages in its pool.
    pub total_pages: u32,
    /// Takes nothing new.
    pub draining: bool,
    /// Its speed, where it knows it.
    pub pace: Option<Pace>,
    /// Of hand-offs it sends.
    pub link_bytes_per_s: Option<f64>,
}

/// See the module. Time is counted from a moment of the caller's choice.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    report: Option<Report>,
    reported_at: Duration,
    /// Those that no report knows of.
    sent: VecDeque<Sent>,
    /// When it will have sent what peers were told to fetch from it.
    sending_until: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    at: Duration,
    compute_ms: f64,
    pages: u32,
}

impl Ledger {
    /// Notes a submission that asks for `compute_ms` of computing and `pages` pages. Numbers and times grow.
    pub fn submit(&mut self, number: u64, compute_ms: f64, pages: u32, now: Duration) {
        self.sent.push_back(Sent { number, at: now, compute_ms, pages });
    }

    /// Takes a submission back that ended before a report knew of it; one that a report knows of is the worker's to count.
    pub fn withdraw(&mut self, number: u64) {
        self.sent.retain(|sent| sent.number != number);
    }

    /// Notes that a peer was told to fetch from it, which takes `ms`, those before it included.
    pub fn fetch(&mut self, ms: f64, now: Duration) {
        self.sending_until = self.sending_until.max(now + Duration::from_secs_f64(ms * 1e-3));
    }

    /// Milliseconds before it could begin to send something else.
    pub fn sending_ms(&self, now: Duration) -> f64 {
        self.sending_until.saturating_sub(now).as_secs_f64() * 1e3
    }

    /// Takes a report in.
    pub fn report(&mut self, report: Report, now: Duration) {
        self.sent.retain(|sent| sent.number > report.received);
        self.report = Some(report);
        self.reported_at = now;
    }

    /// Returns the last report.
    pub fn last_report(&self) -> Option<&Report> {
        self.report.as_ref()
    }

    /// Sequences that run, wait or are on their way there.
    pub fn sequences(&self) -> u32 {
        self.report.map_or(0, |report| report.sequences) + self.sent.len() as u32
    }

    /// Milliseconds of computing before it could begin with another prompt.
    pub fn backlog_ms(&self, now: Duration) -> f64 {
        let reported = (self.reported_at, self.report.map_or(0.0, |report| report.backlog_ms));
        let until = |(from, ms): (Duration, f64), to: Duration| {
            let passed = to.saturating_sub(from).as_secs_f64() * 1e3;
            (from.max(to), (ms - passed).max(0.0))
        };
        let (at, ms) = self.sent.iter().fold(reported, |left, sent| {
            let (at, ms) = until(left, sent.at);
            (at, ms + sent.compute_ms)
        });
        until((at, ms), now).1
    }

    /// Pages free or evictable; `capacity` where nothing was reported yet.
    pub fn free_pages(&self, capacity: u32) -> u32 {
        let free = self.report.map_or(capacity, |report| report.free_pages);
        free.saturating_sub(self.sent.iter().map(|sent| sent.pages).fold(0, u32::saturating_add))
    }

    /// Pages that sequences hold, or are about to.
    pub fn held_pages(&self) -> u32 {
        let held = self.report.map_or(0, |report| report.total_pages.saturating_sub(report.free_pages));
        self.sent.iter().map(|sent| sent.pages).fold(held, u32::saturating_add)
    }

    /// How fast it is.
    pub fn speed(&self) -> Speed {
        let report = self.report.unwrap_or_default();
        Speed { pace: report.pace, link_bytes_per_s: report.link_bytes_per_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(1);

    fn report(received: u64, sequences: u32, backlog_ms: f64) -> Report {
        Report { received, sequences, backlog_ms, free_pages: 80, total_pages: 100, ..Report::default() }
    }

    #[test]
    fn work_is_counted_once_however_messages_cross() {
        let mut ledger = Ledger::default();
        ledger.submit(1, 100.0, 7, AT);
        ledger.submit(2, 50.0, 3, AT);
        assert_eq!((ledger.sequences(), ledger.backlog_ms(AT), ledger.free_pages(50)), (2, 150.0, 40));
        // Made when only the first had come.
        ledger.report(report(1, 1, 90.0), AT);
        assert_eq!((ledger.sequences(), ledger.backlog_ms(AT)), (2, 140.0));
        assert_eq!((ledger.free_pages(50), ledger.held_pages()), (77, 23));
        ledger.report(report(2, 2, 140.0), AT);
        assert_eq!((ledger.sequences(), ledger.backlog_ms(AT)), (2, 140.0));
    }

    #[test]
    fn the_work_of_other_routers_counts() {
        let mut ledger = Ledger::default();
        ledger.report(report(0, 40, 9_000.0), AT);
        ledger.submit(1, 10.0, 1, AT);
        assert_eq!((ledger.sequences(), ledger.backlog_ms(AT)), (41, 9_010.0));
    }

    #[test]
    fn a_backlog_shrinks_while_nothing_is_heard() {
        let mut ledger = Ledger::default();
        ledger.report(report(0, 1, 900.0), AT);
        let later = |ms| AT + Duration::from_millis(ms);
        ledger.submit(1, 100.0, 1, later(100));
        assert_eq!([100, 400, 900, 5_000].map(|ms| ledger.backlog_ms(later(ms))), [900.0, 600.0, 100.0, 0.0]);
        // It had nothing to do for four seconds, and what comes then takes its time.
        ledger.submit(2, 50.0, 1, later(5_000));
        assert_eq!([5_000, 5_020, 5_100].map(|ms| ledger.backlog_ms(later(ms))), [50.0, 30.0, 0.0]);
    }

    #[test]
    fn what_was_sent_before_a_report_that_does_not_know_of_it_is_still_to_be_done() {
        let mut ledger = Ledger::default();
        ledger.submit(1, 100.0, 1, AT);
        let later = AT + Duration::from_millis(80);
        ledger.report(report(0, 0, 10.0), later);
        assert_eq!(ledger.backlog_ms(later), 110.0);
        assert_eq!(ledger.backlog_ms(later + Duration::from_millis(60)), 50.0);
    }

    #[test]
    fn fetches_stand_in_line_for_the_link() {
        let mut ledger = Ledger::default();
        ledger.fetch(30.0, AT);
        ledger.fetch(ledger.sending_ms(AT) + 20.0, AT);
        ledger.fetch(5.0, AT);
        assert_eq!(ledger.sending_ms(AT + Duration::from_millis(10)), 40.0);
        assert_eq!(ledger.sending_ms(AT + Duration::from_secs(9)), 0.0);
    }

    #[test]
    fn what_is_withdrawn_is_not_counted() {
        let mut ledger = Ledger::default();
        ledger.submit(4, 5.0, 1, AT);
        ledger.submit(9, 7.0, 2, AT);
        ledger.withdraw(4);
        assert_eq!((ledger.sequences(), ledger.backlog_ms(AT)), (1, 7.0));
        ledger.report(report(9, 2, 12.0), AT);
        ledger.withdraw(9);
        assert_eq!(ledger.sequences(), 2, "it is the worker's to count now");
    }
}
