//! Steps that only decode are replayed: what is asked of the device depends on how many rows there are, how long their sequences may be, whether tokens
//! are drawn and whether some have adapters, so one graph serves every step whose rows and lengths round up to the same numbers. All else is in device memory.
//!
//! A graph is made when it is first needed, which takes some milliseconds; there are few, because numbers are rounded up coarsely.

use super::device::Graph;
use crate::home::Pass;
use std::collections::HashMap;

/// What a graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Bucket {
    /// Rows, each a sequence.
    pub(super) rows: usize,
    /// Positions of the longest sequence, at most.
    pub(super) longest: usize,
    /// Whether tokens are drawn, and not only the most likely ones found.
    pub(super) races: bool,
    /// Whether rows may have adapters, whichever.
    pub(super) adapted: bool,
}

/// The graphs made so far.
pub(super) type Graphs = HashMap<Bucket, Graph>;

/// Fewest positions that a graph is for.
const SHORTEST: usize = 512;

impl Bucket {
    /// Returns what `pass` rounds up to, if each of its sequences computes one token that goes on and leaves nothing: up to `rows` rows and positions up to
    /// `context`.
    pub(super) fn of(pass: &Pass<'_>, rows: usize, context: usize) -> Option<Self> {
        let count = pass.spans.len();
        let stays = pass.spans.iter().all(|span| !span.leaves);
        let decodes = pass.tokens.len() == count && pass.places.len() == count && stays;
        if !decodes || count == 0 || count > rows {
            return None;
        }
        let longest = pass.spans.iter().map(|span| span.start + 1).max().unwrap_or(0);
        let longest = longest.next_power_of_two().max(SHORTEST).min(context);
        let races = pass.places.iter().any(|place| place.race.is_some());
        Some(Self { rows: rounded_up(count).min(rows), longest, races, adapted: pass.is_adapted() })
    }
}

/// Rounds to a power of two or the middle between two: at most half the rows are padding.
fn rounded_up(count: usize) -> usize {
    let power = count.next_power_of_two();
    if power >= 32 && count <= power / 4 * 3 { power / 4 * 3 } else { power }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::{Place, Span};
    use kv_cache::PageId;

    #[test]
    fn rows_round_up_a_little() {
        let rounded: Vec<usize> = [1, 2, 3, 5, 9, 16, 17, 24, 25, 32, 33, 48, 49, 96, 97, 129].map(rounded_up).into();
        assert_eq!(rounded, [1, 2, 4, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64, 96, 128, 192]);
    }

    #[test]
    fn only_steps_that_decode_have_a_bucket() {
        let pages = [PageId(0); 64];
        let check = |starts: &[usize], tokens: usize, places: usize, expected: Option<(usize, usize)>| {
            let spans: Vec<Span<'_>> = starts
                .iter()
                .enumerate()
                .map(|(first, &start)| Span { first, tokens: 1, start, pages: &pages, adapter: None, leaves: false })
                .collect();
            let places: Vec<Place> = (0..places).map(|row| Place { row, token: 0, race: None }).collect();
            let pass = Pass { tokens: &vec![1; tokens], spans: &spans, places: &places, kept: &spans };
            let expected = expected.map(|(rows, longest)| Bucket { rows, longest, races: false, adapted: false });
            assert_eq!(Bucket::of(&pass, 6, 900), expected, "{starts:?} {tokens}");
        };
        check(&[5], 1, 1, Some((1, 512)));
        check(&[511, 3, 4], 3, 3, Some((4, 512)));
        check(&[512, 3, 4], 3, 3, Some((4, 900)));
        check(&[0; 5], 5, 5, Some((6, 512)));
        check(&[0; 7], 7, 7, None);
        check(&[0, 3], 3, 2, None);
        check(&[0, 3], 2, 1, None);
        check(&[], 0, 0, None);
    }
}
