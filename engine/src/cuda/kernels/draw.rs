//! Kernels of `draw.cu`: tokens that are drawn where their logits are.

use super::{Args, Call, Defines, Element, Kernel, Source};

/// Columns that a block of [`Draw`] lets race.
const RACE_COLUMNS: u32 = 8192;

/// Draws a token from each row that races, by the terms that [`crate::sampling::Race`] gives it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`.
    pub(crate) logits: u64,
    pub(crate) stride: u32,
    /// Below [`Draw::MOST_COLUMNS`].
    pub(crate) columns: u32,
    /// u32 `[rows][8]`; zeros where a row does not race.
    pub(crate) terms: u64,
    /// u32 `[rows]`, as [`super::Largest`] left them. Those of rows that race become their token, [`u32::MAX`] where no logit is above minus infinity,
    /// and [`Draw::UNDECIDED`] where rounding could decide: the host draws from the row's logits then.
    pub(crate) to: u64,
    /// u32 `[rows][2]`.
    pub(crate) edges: u64,
    /// [`Draw::lead_bytes`] for each row.
    pub(crate) leads: u64,
    /// u32 `[rows]`, zeros before and after.
    pub(crate) counters: u64,
}

impl Draw {
    pub(crate) const UNDECIDED: u32 = u32::MAX - 1;
    pub(crate) const MOST_COLUMNS: usize = 1 << 20;

    const RANK_THREADS: u32 = 1024;
    const RACE_THREADS: u32 = 256;
    const BINS: u32 = 8192;

    /// Returns the bytes that the blocks of a row of so many columns leave to each other.
    pub(crate) fn lead_bytes(columns: usize) -> usize {
        columns.div_ceil(RACE_COLUMNS as usize) * 16
    }

    /// Returns the calls, in order: where top-k and top-p cut, and the race.
    pub(crate) fn calls(&self) -> [Call; 2] {
        assert!((self.columns as usize) < Self::MOST_COLUMNS, "{} columns", self.columns);
        let shared = Args::default().word(self.logits).word(self.terms).word(self.to).word(self.edges);
        let rank = shared.number(self.stride).number(self.columns);
        let race = shared.word(self.leads).word(self.counters).number(self.stride).number(self.columns);
        let call = |name, parts, threads, shared_words: u32, args| {
            let kernel = Kernel { name, source: Source::Draw, element: Element::Bf16, defines: Defines::default() };
            Call { kernel, grid: [self.rows, parts, 1], threads, shared_bytes: shared_words * 4, args }
        };
        // Counts and parts of bins, counts and masses of threads and warps, and six words of edges.
        let rank_words = 2 * (Self::BINS + Self::RANK_THREADS + Self::RANK_THREADS / 32) + 6;
        let parts = self.columns.div_ceil(RACE_COLUMNS);
        [
            call("rank", 1, Self::RANK_THREADS, rank_words, rank),
            call("race", parts, Self::RACE_THREADS, Self::RACE_THREADS / 32 * 4, race),
        ]
    }
}

#[cfg(test)]
mod tests;
