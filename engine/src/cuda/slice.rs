//! Which outputs of a linear a rank computes, where several cards run a model together.
//!
//! Every linear is cut along its outputs, and none along what is summed: so a rank's sums are those that one card would have, bit by bit, and
//! ranks exchange activations instead of parts of sums ([`Device::gather`](super::Device::gather)). To cut the second of two linears along its
//! inputs instead (M. Shoeybi et al., *Megatron-LM*, arXiv 1909.08053, section 3) exchanges two sums in a layer where this exchanges four activations;
//! as bf16 in a ring that is 64 KiB of a token of Llama 70B, and this 136. But then bits depend on the number of cards.

use crate::cpu::packed::PANEL;
use std::ops::Range;

/// Gates of a panel that has as many ups.
const HALF: usize = PANEL / 2;

/// One of several ranks that share a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) rank: usize,
    /// How many there are.
    pub(crate) ranks: usize,
}

/// A linear whose outputs are computed by several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    /// Outputs of a rank; the last ranks may have fewer, or none.
    pub(crate) own: usize,
    /// Of all ranks.
    pub(crate) all: usize,
}

/// How the outputs of a linear lie in its panels, and with that who computes which.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outputs {
    /// In order, and every rank computes all of them.
    All,
    /// So many, in order.
    Plain(usize),
    /// So many gates, in panels of 32 of them and of the 32 ups that belong to them.
    Gated(usize),
    /// Heads of q, of k and of v, of which a rank keeps its own.
    Heads { heads: usize, kv_heads: usize, dim: usize },
}

impl Slice {
    /// Returns how many of `count` things a rank has at most.
    pub(crate) fn width(self, count: usize) -> usize {
        count.div_ceil(self.ranks)
    }

    /// Returns which of `count` things are this rank's.
    pub(crate) fn range(self, count: usize) -> Range<usize> {
        let start_of = |rank: usize| (rank * self.width(count)).min(count);
        start_of(self.rank)..start_of(self.rank + 1)
    }

    /// Returns which of `kv_heads` heads of keys and values this rank has: where there are fewer than ranks, one that others have as well.
    pub(crate) fn kv_heads(self, kv_heads: usize) -> Range<usize> {
        if kv_heads >= self.ranks {
            return self.range(kv_heads);
        }
        let head = self.rank * kv_heads / self.ranks;
        head..head + 1
    }

    /// Says whether ranks share so many heads, and heads of keys and values, evenly.
    pub(crate) fn is_even(ranks: usize, heads: usize, kv_heads: usize) -> bool {
        let divides = |a: usize, b: usize| b.is_multiple_of(a);
        ranks > 0 && divides(ranks, heads) && (divides(ranks, kv_heads) || divides(kv_heads, ranks))
    }
}

impl Outputs {
    /// Says whether panels hold gates and ups.
    pub(crate) fn gated(self) -> bool {
        matches!(self, Outputs::Gated(_))
    }

    /// Returns what ranks exchange of what they compute; `None` where there is nothing to exchange.
    pub(crate) fn split(self, slice: Slice) -> Option<Split> {
        match self {
            Outputs::Plain(all) | Outputs::Gated(all) if slice.ranks > 1 => Some(Split { own: slice.width(all), all }),
            _ => None,
        }
    }

    /// Returns, for each column of the panels of `slice`, which column of all panels it is, if it is not one of zeros; `None` where these are all of
    /// them as they are.
    pub(crate) fn columns(self, slice: Slice) -> Option<Vec<Option<usize>>> {
        if slice.ranks == 1 {
            return None;
        }
        let mut columns: Vec<Option<usize>> = match self {
            Outputs::All => return None,
            Outputs::Plain(all) => slice.range(all).map(Some).collect(),
            Outputs::Gated(all) => {
                let own: Vec<usize> = slice.range(all).collect();
                let halves = own.chunks(HALF).flat_map(|gates| {
                    let half = |up: usize| {
                        let place = move |gate: &usize| Some(gate / HALF * PANEL + up * HALF + gate % HALF);
                        let places = gates.iter().map(place);
                        places.chain(std::iter::repeat_n(None, HALF - gates.len()))
                    };
                    half(0).chain(half(1))
                });
                halves.collect()
            }
            Outputs::Heads { heads, kv_heads, dim } => {
                let of = |first: usize, own: Range<usize>| (first + own.start * dim..first + own.end * dim).map(Some);
                let (keys, own) = (heads * dim, slice.kv_heads(kv_heads));
                let values = of(keys + kv_heads * dim, own.clone());
                of(0, slice.range(heads)).chain(of(keys, own)).chain(values).collect()
            }
        };
        // A rank without outputs has zeros, as a linear has a panel at least.
        let width = match self {
            Outputs::Plain(all) => slice.width(all).next_multiple_of(PANEL),
            Outputs::Gated(all) => slice.width(all).div_ceil(HALF) * PANEL,
            Outputs::All | Outputs::Heads { .. } => columns.len().next_multiple_of(PANEL),
        };
        columns.resize(width, None);
        Some(columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices(ranks: usize) -> impl Iterator<Item = Slice> {
        (0..ranks).map(move |rank| Slice { rank, ranks })
    }

    #[test]
    fn ranks_share_all_things() {
        for (count, ranks) in [(0, 1), (1, 4), (7, 2), (64, 4), (100, 8)] {
            let shared: Vec<usize> = slices(ranks).flat_map(|slice| slice.range(count)).collect();
            assert!(shared.into_iter().eq(0..count), "{count} among {ranks}");
        }
    }

    #[test]
    fn every_column_is_some_rank_s_and_as_wide_for_all() {
        for (outputs, columns) in [
            (Outputs::Plain(70), 70),
            (Outputs::Plain(1), 1),
            (Outputs::Gated(96), 192),
            (Outputs::Heads { heads: 8, kv_heads: 4, dim: 12 }, 192),
            (Outputs::Heads { heads: 8, kv_heads: 2, dim: 12 }, 144),
        ] {
            for ranks in [2, 4] {
                let of_ranks: Vec<_> = slices(ranks).map(|slice| outputs.columns(slice).expect("a part")).collect();
                assert!(
                    of_ranks.iter().all(|columns| columns.len() == of_ranks[0].len() && columns.len() % PANEL == 0)
                );
                let mut all: Vec<usize> = of_ranks.into_iter().flatten().flatten().collect();
                all.sort_unstable();
                // Heads of keys and values that are fewer than ranks are some ranks' each.
                all.dedup();
                assert!(all.into_iter().eq(0..columns), "{outputs:?} among {ranks}");
            }
            assert!(outputs.columns(Slice { rank: 0, ranks: 1 }).is_none());
        }
        assert!(Outputs::All.columns(Slice { rank: 1, ranks: 2 }).is_none());
    }

    #[test]
    fn heads_are_shared_evenly_or_not_at_all() {
        for (ranks, heads, kv_heads) in [(1, 7, 7), (2, 8, 4), (4, 8, 2), (8, 64, 8), (3, 6, 3), (4, 4, 1)] {
            assert!(Slice::is_even(ranks, heads, kv_heads), "{ranks} {heads} {kv_heads}");
            for slice in slices(ranks) {
                // The heads that a rank's heads belong to are its own.
                let group = |head: usize| head / (heads / kv_heads);
                let own = slice.range(heads);
                let expected = group(own.start)..group(own.end - 1) + 1;
                assert_eq!(slice.kv_heads(kv_heads), expected, "{slice:?} {heads} {kv_heads}");
            }
        }
        for (ranks, heads, kv_heads) in [(0, 8, 8), (3, 8, 8), (4, 6, 2), (3, 6, 2), (4, 12, 3)] {
            assert!(!Slice::is_even(ranks, heads, kv_heads), "{ranks} {heads} {kv_heads}");
        }
    }

    #[test]
    fn a_gate_stays_beside_its_up() {
        // 40 gates: panels of 32 and 8; the second rank has gates 20 to 39.
        let columns = Outputs::Gated(40).columns(Slice { rank: 1, ranks: 2 }).expect("a part");
        let expected = |half: usize| (20..40).map(move |gate| gate / 32 * 64 + half * 32 + gate % 32);
        assert!(columns[..20].iter().copied().eq(expected(0).map(Some)));
        assert!(columns[32..52].iter().copied().eq(expected(1).map(Some)));
        assert!(columns[20..32].iter().chain(&columns[52..]).all(Option::is_none));
    }
}
