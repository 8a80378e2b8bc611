//! Kernels of `shrink.cu` and what linears are told of adapters (`deltas.cu`).

use super::{Args, Call, Defines, Element, Kernel, Source};

/// Which of a layer's linears a delta is of: where it stands among those of the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeltaOf {
    Qkv,
    Output,
    Up,
    Down,
}

/// What adapters add to a linear.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deltas {
    /// The rows that have adapters: where numbers of `scale * A x` go, f32 `[rows][stride]`, and the stride; then, for each row, where the deltas of its adapter are,
    /// [`Deltas::WORDS`] each, `[layers][`[`Deltas::LINEARS`]`]`, or 0. All are words of eight bytes.
    pub(crate) adapted: u64,
    /// Which of an adapter's deltas.
    pub(crate) place: u32,
    /// Outputs before those at hand: a multiple of 64.
    pub(crate) first_column: u32,
}

impl Deltas {
    /// Linears of a layer that may have a delta.
    pub(crate) const LINEARS: usize = 4;
    /// Words of a delta: where its parts are, `A`, scales, `B` and halves, and its ranks.
    pub(crate) const WORDS: usize = 5;
    /// What ranks are padded to.
    pub(crate) const RANKS: usize = 16;

    /// Returns those of layer `layer`.
    pub(crate) fn new(adapted: u64, layer: usize, of: DeltaOf) -> Self {
        Self { adapted, place: (layer * Self::LINEARS) as u32 + of as u32, first_column: 0 }
    }

    /// Appends what a linear is told; of nothing where there is none.
    pub(super) fn append(deltas: Option<Self>, args: Args) -> Args {
        let Self { adapted, place, first_column } = deltas.unwrap_or(Self { adapted: 0, place: 0, first_column: 0 });
        args.word(adapted).number(place).number(first_column)
    }
}

/// The numbers of `scale * A x` of all rows that have a delta.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shrink {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// 16-bit floats `[rows][stride]`, numbers up to a whole step.
    pub(crate) input: u64,
    /// A multiple of 8.
    pub(crate) stride: u32,
    /// Inputs, in steps of 32.
    pub(crate) steps: u32,
    pub(crate) deltas: Deltas,
}

impl Shrink {
    const WARPS: u32 = 8;
    /// Rows from which on blocks take more turns: there are enough of them.
    const MANY_ROWS: u32 = 64;

    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.input).word(self.deltas.adapted).number(self.rows).number(self.stride);
        let args = args.number(self.steps).number(self.deltas.place);
        let turns = if self.rows < Self::MANY_ROWS { 6 } else { 1 };
        let (element, defines) = (self.element, Defines::default());
        let kernel = Kernel { name: "shrink", source: Source::Shrink, element, defines };
        // Each warp leaves sixteen ranks of sixteen rows.
        let shared_bytes = Self::WARPS * 16 * 16 * 4;
        Call { kernel, grid: [self.rows, turns, 1], threads: Self::WARPS * 32, shared_bytes, args }
    }
}

#[cfg(test)]
mod tests;
