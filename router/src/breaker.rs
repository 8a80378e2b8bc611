//! Circuit breaker of one worker. Pure.
//!
//! Evidence is how legs end: a failure is a leg that died, fell silent or was cut off with its stream, as far as
//! [`recovery`](crate::recovery) blames this worker; a success is a leg that spoke. What clients do and what a worker refuses is no
//! evidence. The breaker opens after [`IN_A_ROW`] failures without a success between them, or when over some seconds at least [`WEIGHT`] legs
//! and half of all failed. While it is open, the worker is chosen only if nobody else is left. After a pause that doubles each time one
//! request goes there as a probe; a success closes the breaker.

use std::time::Duration;

/// Failures without a success between them.
const IN_A_ROW: u32 = 3;

/// Failed legs, the older the less they count, that are enough if as many succeeded at most.
const WEIGHT: f64 = 5.0;

/// After which a leg counts half.
const HALF_LIFE: Duration = Duration::from_secs(10);

/// The pause before the first probe; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// After which another probe may go if the last one neither succeeded nor failed: its client may have left.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);

/// See the module. Times are since any fixed moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Breaker {
    state: State,
    in_a_row: u32,
    /// Weights of what legs came to, as of `weighed`.
    failed: f64,
    succeeded: f64,
    weighed: Duration,
    /// Times it opened since it last stayed closed for long.
    openings: u32,
    closed_at: Duration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    /// A probe may go then.
    Open { probe_at: Duration },
    /// One is under way; another may go then.
    Probing { again_at: Duration },
}

impl Breaker {
    /// Whether the worker may be chosen.
    pub(crate) fn allows(&self, now: Duration) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { probe_at: at } | State::Probing { again_at: at } => now >= at,
        }
    }

    /// The worker has been chosen. `false` if that was another's probe.
    pub(crate) fn begin(&mut self, now: Duration) -> bool {
        let allowed = self.allows(now);
        if allowed && self.state != State::Closed {
            self.state = State::Probing { again_at: now + PROBE_PATIENCE };
        }
        allowed
    }

    /// A leg spoke. Says whether that closed the breaker.
    pub(crate) fn succeeded(&mut self, now: Duration) -> bool {
        self.in_a_row = 0;
        self.age(now);
        self.succeeded += 1.0;
        let closes = matches!(self.state, State::Probing { .. });
        if closes {
            // What it did before is known to be over.
            (self.state, self.failed, self.closed_at) = (State::Closed, 0.0, now);
        }
        closes
    }

    /// A leg failed. Returns the pause until a probe if that opened the breaker.
    pub(crate) fn failed(&mut self, now: Duration) -> Option<Duration> {
        self.age(now);
        self.in_a_row += 1;
        self.failed += 1.0;
        let opens = match self.state {
            State::Open { .. } => false,
            State::Probing { .. } => true,
            State::Closed => self.in_a_row >= IN_A_ROW || (self.failed >= WEIGHT && self.failed >= self.succeeded),
        };
        if !opens {
            return None;
        }
        if self.state == State::Closed && now.saturating_sub(self.closed_at) > LONGEST_PAUSE {
            self.openings = 0;
        }
        let pause = (FIRST_PAUSE * 2u32.saturating_pow(self.openings.min(16))).min(LONGEST_PAUSE);
        self.openings += 1;
        self.state = State::Open { probe_at: now + pause };
        Some(pause)
    }

    fn age(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.weighed).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let keep = (-passed).exp2();
        (self.failed, self.succeeded, self.weighed) = (self.failed * keep, self.succeeded * keep, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    impl Breaker {
        fn is_open(&self) -> bool {
            self.state != State::Closed
        }
    }

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        assert_eq!([0, 0, 0].map(|now| breaker.failed(at(now))), [None, None, Some(FIRST_PAUSE)]);
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_one_probe_closes_it() {
        let mut breaker = opened();
        assert!(breaker.is_open() && !breaker.allows(at(999)) && !breaker.begin(at(999)));
        assert!(breaker.begin(at(1_000)), "the probe");
        assert!(!breaker.begin(at(1_000)), "there is one");
        assert!(breaker.succeeded(at(1_100)) && !breaker.is_open());
        assert!(breaker.begin(at(1_100)) && breaker.begin(at(1_100)), "closed, everybody may go");
        assert_eq!(breaker.failed(at(1_200)), None, "what was before the probe is forgotten");
    }

    #[test]
    fn pauses_grow_while_probes_fail_and_are_forgotten_after_a_good_time() {
        let mut breaker = opened();
        let mut now = at(0);
        let mut pause = FIRST_PAUSE;
        for seconds in [2, 4, 8, 16, 32, 60, 60] {
            now += pause;
            assert!(breaker.begin(now));
            pause = breaker.failed(now).expect("the probe failed");
            assert_eq!(pause, Duration::from_secs(seconds));
        }
        assert_eq!(breaker.failed(now), None, "legs that began before it opened say nothing new");
        now += pause;
        assert!(breaker.begin(now) && breaker.succeeded(now));
        now += LONGEST_PAUSE + at(1);
        assert_eq!([now; 3].map(|now| breaker.failed(now)), [None, None, Some(FIRST_PAUSE)]);
    }

    #[test]
    fn a_probe_whose_client_left_is_repeated() {
        let mut breaker = opened();
        assert!(breaker.begin(at(1_000)));
        assert!(!breaker.allows(at(5_999)) && breaker.begin(at(6_000)));
    }

    #[test]
    fn half_of_many_is_too_much() {
        let mut breaker = Breaker::default();
        let opened = (0..20).find(|i| {
            breaker.succeeded(at(i * 10));
            breaker.failed(at(i * 10)).is_some() || breaker.failed(at(i * 10)).is_some()
        });
        assert!(opened.is_some_and(|i| i < 4), "{opened:?}");
        let mut breaker = Breaker::default();
        for i in 0..1_000 {
            assert_eq!(breaker.failed(at(i * 10)), None, "one in three is not half");
            breaker.succeeded(at(i * 10));
            breaker.succeeded(at(i * 10));
        }
    }

    proptest! {
        /// However it got there, a worker that answers its probe is taken back, and probes never stop.
        #[test]
        fn a_worker_that_has_recovered_is_found(events in proptest::collection::vec((0u8..3, 0u64..20_000), 0..100)) {
            let (mut breaker, mut now) = (Breaker::default(), at(0));
            for (event, pause) in events {
                now += at(pause);
                match event {
                    0 => drop(breaker.succeeded(now)),
                    1 => drop(breaker.failed(now)),
                    _ => drop(breaker.begin(now)),
                }
            }
            now += LONGEST_PAUSE;
            prop_assert!(breaker.begin(now));
            breaker.succeeded(now);
            prop_assert!(!breaker.is_open());
        }
    }
}
