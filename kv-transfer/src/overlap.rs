//! How much of a hand-off hides behind the computing of what is still to come.
//!
//! Layers leave in groups while later ones compute. Small groups leave little to move once the last layer is done; but each costs
//! wake-ups on both sides, and where those add up to more than computing takes, the groups queue and the tail grows again.
//! [`group_bytes`] finds the size between the two, from what was measured; [`Overlap`] measures what came of it.

use std::time::Duration;

/// Smallest group worth a wake-up.
const LEAST_GROUP_BYTES: usize = 256 << 10;
/// Largest group, also that of a link so slow that only its bytes count.
const MOST_GROUP_BYTES: usize = 16 << 20;
/// Group while nothing is known yet.
const FIRST_GROUP_BYTES: usize = 1 << 20;
/// What a group costs beside its bytes: posting, waking a mover and the driver, one system call and a report on each side. 20 to
/// 30 µs a hand-off where nothing else runs (notes on transports, section 6), and more where something does.
const GROUP_OVERHEAD: Duration = Duration::from_micros(50);

/// Returns the group size that leaves the shortest tail of a hand-off of `total_bytes` that are computed at `computed_per_s` and move
/// at `moved_per_s`; a speed of 0 is not known yet.
///
/// The tail is the longer of two. A link that keeps up has the last group left when the last layer is done. A link that does not
/// has all groups to move, one after the other, and began when the first was computed.
pub(crate) fn group_bytes(total_bytes: u64, computed_per_s: f64, moved_per_s: f64) -> usize {
    if computed_per_s <= 0.0 || moved_per_s <= 0.0 {
        return FIRST_GROUP_BYTES;
    }
    let (total, overhead) = (total_bytes as f64, GROUP_OVERHEAD.as_secs_f64());
    let tail = |group: f64| {
        let group = group.min(total);
        let last = overhead + group / moved_per_s;
        let all = total / group * overhead + total / moved_per_s;
        last.max(all - (total - group) / computed_per_s)
    };
    let sizes = std::iter::successors(Some(LEAST_GROUP_BYTES), |bytes| Some(bytes * 2));
    let sizes = sizes.take_while(|bytes| *bytes <= MOST_GROUP_BYTES);
    sizes.min_by(|a, b| tail(*a as f64).total_cmp(&tail(*b as f64))).unwrap_or(FIRST_GROUP_BYTES)
}

/// Returns the smallest frame worth moving by itself on a link that moves `moved_per_s` (0: not known yet). To share a group saves half
/// of its time and costs waking another mover and being woken by its report, with all that follows from being late.
pub(crate) fn least_frame_bytes(moved_per_s: f64) -> usize {
    ((moved_per_s * 4.0 * GROUP_OVERHEAD.as_secs_f64()) as usize).max(LEAST_GROUP_BYTES)
}

/// The time that one hand-off was moving, and how much of it came before the last push. Moving is while frames are under way, and
/// from the commit to its acknowledgement.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Overlap {
    moved: Duration,
    moving_since: Option<Duration>,
    hidden: Duration,
}

impl Overlap {
    /// Bytes are moving from `now` on, or none are.
    pub(crate) fn set_moving(&mut self, now: Duration, moving: bool) {
        self.moved = self.moved(now);
        self.moving_since = moving.then_some(now);
    }

    /// More was computed: what moved until `now` was hidden by that.
    pub(crate) fn pushed(&mut self, now: Duration) {
        self.hidden = self.moved(now);
    }

    /// Returns the time spent moving until `now`.
    pub(crate) fn moved(&self, now: Duration) -> Duration {
        self.moved + self.moving_since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Returns the part of it before the last push.
    pub(crate) fn hidden(&self) -> Duration {
        self.hidden
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn group_sizes() {
        let check = |total, computed, moved, expected: usize| {
            assert_eq!(group_bytes(total, computed, moved), expected << 10, "{total} at {computed}, moving at {moved}");
        };
        // A 512-token prompt of the Llama-3.2-1B shape, computed in half a second: any link of today keeps up with the smallest.
        check(16 * MIB, 32e6, 10e9, 256);
        check(16 * MIB, 32e6, 1e9, 256);
        // A fast device: 16 MiB in 2 ms, over 25 GB/s. 256 KiB compute in 33 us and take 60, 512 KiB in 66 and take 71: they queue.
        check(16 * MIB, 8e9, 25e9, 1024);
        // A link as fast as computing has its own time to make up for: more groups only add to it.
        check(16 * MIB, 8e9, 8e9, 2048);
        // A link slower than computing: the best compromise between starting early and paying often.
        check(16 * MIB, 8e9, 1e9, 2048);
        check(1024 * MIB, 8e9, 1e9, 16384);
        check(16 * MIB, 0.0, 1e9, 1024);
        check(16 * MIB, 1e9, 0.0, 1024);
        check(0, 1e9, 1e9, 256);
    }

    #[test]
    fn frames_of_faster_links_are_larger() {
        for (moved, expected) in
            [(0.0, 256 << 10), (1e9, 256 << 10), (2e9, 400_000), (10e9, 2_000_000), (40e9, 8_000_000)]
        {
            assert_eq!(least_frame_bytes(moved), expected, "{moved}");
        }
    }

    proptest! {
        /// Slower computing never asks for larger groups, and a hand-off is never cut finer than wake-ups are worth.
        #[test]
        fn slower_computing_means_smaller_groups(total in 1u64..1 << 32, computed in 1e6..1e11f64, moved in 1e6..1e11f64) {
            let group = group_bytes(total, computed, moved);
            prop_assert!((LEAST_GROUP_BYTES..=MOST_GROUP_BYTES).contains(&group));
            prop_assert!(group_bytes(total, computed / 2.0, moved) <= group);
        }
    }

    #[test]
    fn what_moves_before_the_last_push_is_hidden() {
        let ms = Duration::from_millis;
        let mut overlap = Overlap::default();
        overlap.pushed(ms(0));
        overlap.set_moving(ms(0), true);
        overlap.set_moving(ms(4), false);
        overlap.pushed(ms(10));
        overlap.set_moving(ms(10), true);
        overlap.set_moving(ms(11), true);
        overlap.pushed(ms(12));
        overlap.set_moving(ms(14), false);
        assert_eq!((overlap.hidden(), overlap.moved(ms(99))), (ms(6), ms(8)));
    }
}
