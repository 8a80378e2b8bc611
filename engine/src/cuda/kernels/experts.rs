//! Kernels of `experts.cu`: what rows choose, and how that becomes tiles of linears.

use super::{Args, Call, Defines, Element, Kernel, Source};
use crate::model::routing::{Groups, Routing, Scoring};

fn call(name: &'static str, grid: u32, threads: u32, shared_bytes: u32, args: Args) -> Call {
    let kernel = Kernel { name, source: Source::Experts, element: Element::Bf16, defines: Defines::default() };
    Call { kernel, grid: [grid, 1, 1], threads, shared_bytes, args }
}

/// The experts of each row, and their weights, by [`Routing`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choose<'a> {
    pub(crate) routing: &'a Routing,
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`.
    pub(crate) logits: u64,
    pub(crate) stride: u32,
    /// f32 `[experts]`; 0 = none.
    pub(crate) correction: u64,
    /// u32 `[rows][chosen]`; [`u32::MAX`] in rows that are padding.
    pub(crate) experts: u64,
    /// f32 `[rows][chosen]`.
    pub(crate) weights: u64,
    /// u32, rows that are no padding.
    pub(crate) used: u64,
}

impl Choose<'_> {
    /// Most experts of which scores and ranks fit into shared memory.
    pub(crate) const MOST: usize = 4096;

    pub(crate) fn call(&self) -> Call {
        let Routing { experts, chosen, scoring, groups, normalise, scale } = *self.routing;
        assert!(experts <= Self::MOST, "`check` refuses {experts} experts");
        let groups = groups.unwrap_or(Groups { count: 0, kept: 0, best: 0 });
        let args = Args::default().word(self.logits).word(self.correction).word(self.experts).word(self.weights);
        let args = args.word(self.used).number(self.stride).number(experts as u32).number(chosen as u32);
        let args = args.number(u32::from(scoring == Scoring::Sigmoid)).number(groups.count as u32);
        let args = args.number(groups.kept as u32).number(groups.best as u32).number(u32::from(normalise)).float(scale);
        call("choose", self.rows, 32, ((2 * experts + groups.count) * 4) as u32, args)
    }
}

/// How the pairs of so many rows are cut into tiles, whatever they choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Pairs that a tile has at most.
    pub(crate) rows: u32,
    /// Tiles, those left over included.
    pub(crate) count: u32,
}

impl Cut {
    /// Returns that of `pairs` pairs of `experts` experts, with tiles of up to `most` of them: high enough for what an expert has if none is half
    /// again as busy as the rest.
    pub(crate) fn new(pairs: usize, experts: usize, most: usize) -> Self {
        let busy = (3 * pairs).div_ceil(2 * experts);
        let rows = [16, 32, 64].into_iter().find(|rows| busy <= *rows).unwrap_or(128).min(most);
        Self { rows: rows as u32, count: pairs.min(pairs / rows + experts) as u32 }
    }

    /// Returns the most tiles of up to `pairs` pairs.
    pub(crate) fn most_count(pairs: usize, experts: usize) -> usize {
        pairs.min(pairs / 16 + experts)
    }
}

/// What rows of a linear are, where they are pairs of a row and an expert: its number is `row * chosen + choice`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    pub(crate) cut: Cut,
    /// u32 `[pairs]`, expert after expert.
    pub(crate) list: u64,
    /// u32 `[cut.count][3]`: an expert, its first place in the list, pairs.
    pub(crate) tiles: u64,
    /// Bytes of an expert's weights, a multiple of 16.
    pub(crate) expert_bytes: u64,
    /// Pairs that follow each other and have the same inputs; each has outputs of its own.
    pub(crate) sharers: u32,
    /// Outputs of a pair that are written, a multiple of 8; `None` = those of whole panels. Gated ones are all written.
    pub(crate) width: Option<u32>,
}

impl Pairs {
    /// Appends what stands behind the arguments of a linear.
    pub(super) fn append(&self, args: Args) -> Args {
        args.word(self.list)
            .word(self.tiles)
            .word(self.expert_bytes)
            .number(self.sharers)
            .number(self.width.unwrap_or(u32::MAX))
    }
}

/// Lists pairs by their experts, ascending, and cuts the list into tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    /// u32 `[pairs]`: of each pair; [`u32::MAX`] where it is to be left out.
    pub(crate) experts: u64,
    pub(crate) pairs: u32,
    pub(crate) expert_count: u32,
    pub(crate) cut: Cut,
    /// As in [`Pairs`].
    pub(crate) list: u64,
    pub(crate) tiles: u64,
}

impl Group {
    const THREADS: u32 = 256;

    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.experts).word(self.list).word(self.tiles).number(self.pairs);
        let args = args.number(self.expert_count).number(self.cut.rows).number(self.cut.count);
        call("group", self.expert_count, Self::THREADS, (Self::THREADS + Self::THREADS / 16) * 4, args)
    }
}

/// Adds to each row what its experts made of it, weighted, in the order of its choices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    pub(crate) rows: u32,
    pub(crate) chosen: u32,
    /// f32 `[rows][chosen][stride]`.
    pub(crate) outcomes: u64,
    /// f32 `[rows][chosen]`.
    pub(crate) weights: u64,
    /// f32 `[rows][stride]`.
    pub(crate) to: u64,
    /// u32, rows that are no padding.
    pub(crate) used: u64,
    pub(crate) stride: u32,
}

impl Mix {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.outcomes).word(self.weights).word(self.to).word(self.used);
        call("mix", self.rows, 256, 0, args.number(self.chosen).number(self.stride))
    }
}

#[cfg(test)]
mod tests;
