//! Kernels of `linear.cu`: which of them computes a linear, and over which grid.

use super::{Args, Call, Codes, Defines, Deltas, Element, Kernel, Pairs, Source};
use crate::model::decoder::Activation;

/// Inputs of a step: what packed weights are padded to.
const STEP: usize = 32;
/// Outputs of a panel.
const PANEL: usize = 64;
/// Warps that a linear of few rows should have, at least: eight for each of the 132 processors of an H100.
const WARPS: usize = 1056;

/// The shape of packed weights, and with it the order of every output's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinearShape {
    pub(crate) panels: u32,
    /// Inputs, in steps of 32.
    pub(crate) steps: u32,
    /// Runs that the inputs are cut into.
    pub(crate) splits: u32,
}

impl LinearShape {
    /// Returns the shape of `outputs` by `inputs` weights; `gated` where panels hold gates and what they let through. They are those of one of `chosen`
    /// linears that a row goes through side by side.
    pub(crate) fn new(outputs: usize, inputs: usize, gated: bool, chosen: usize) -> Self {
        Self::in_segments(outputs, inputs, gated, chosen, 1)
    }

    /// Returns the shape of `panels` of its panels. Their sums are cut as they are in the whole.
    pub(crate) fn part(self, panels: usize) -> Self {
        Self { panels: panels as u32, ..self }
    }

    /// As [`LinearShape::new`], for runs of whole segments of `segment` steps.
    pub(super) fn in_segments(outputs: usize, inputs: usize, gated: bool, chosen: usize, segment: usize) -> Self {
        let (panels, steps) = (outputs.div_ceil(PANEL), inputs.div_ceil(STEP));
        // A pair of half panels stays in one block of eight warps.
        let most = if gated { 4 } else { 8 };
        let mut splits = 1;
        while splits < most && 2 * panels * chosen * splits < WARPS && 2 * splits <= steps.div_ceil(segment) {
            splits *= 2;
        }
        Self { panels: panels as u32, steps: steps as u32, splits: splits as u32 }
    }
}

/// What follows the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// They are stored as f32.
    Store,
    /// They are added to f32.
    Add,
    /// The first 32 of each panel go through the activation and multiply the last 32: 16-bit floats `[rows][panels * 32]`.
    Gate(Activation),
    /// They go through the activation: 16-bit floats.
    Activate(Activation),
    /// They are stored as 16-bit floats.
    Narrow,
}

impl Finish {
    /// Says whether panels hold gates and what they let through.
    pub(super) fn is_gated(self) -> bool {
        matches!(self, Finish::Gate(_))
    }

    /// Returns what kernels know it by, and the activation.
    fn numbers(self) -> (u32, u32) {
        match self {
            Finish::Store => (0, 0),
            Finish::Add => (1, 0),
            Finish::Gate(activation) => (2, activation as u32),
            Finish::Activate(activation) => (3, activation as u32),
            Finish::Narrow => (4, 0),
        }
    }
}

/// A linear: `sums[row][output] = bias + inputs[row] . weights[output]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub(crate) element: Element,
    pub(crate) shape: LinearShape,
    pub(crate) rows: u32,
    /// `[panels][16 steps][64]` pairs of neighbouring inputs, zero beyond what there is.
    pub(crate) weights: u64,
    /// f32 `[panels * 64]`; 0 = none.
    pub(crate) bias: u64,
    /// 16-bit floats `[rows][input_stride]`, zero up to a whole step.
    pub(crate) input: u64,
    /// A multiple of 8.
    pub(crate) input_stride: u32,
    /// `[rows][to_stride]`, with room for whole panels in a row.
    pub(crate) to: u64,
    /// A multiple of 8.
    pub(crate) to_stride: u32,
    pub(crate) finish: Finish,
    /// Room for sums of runs that are computed apart: [`Linear::partial_bytes`].
    pub(crate) partial: u64,
    /// Zeros, and zeros again when it is done: u32 `[`[`Linear::most_counters`]`]`.
    pub(crate) counters: u64,
    /// How the weights lie, where they are codes.
    pub(crate) codes: Option<Codes>,
    /// Bytes of shared memory that a block of the device may have, opted in: 163 KiB on sm_80, 227 KiB from sm_90 on.
    pub(crate) most_shared: u32,
    /// Present where rows are pairs of a row and an expert, and the weights those of all experts; `shape` is that of one, and there is no bias.
    pub(crate) pairs: Option<Pairs>,
    /// Present where rows may have adapters: what they add is in the sums before anything follows them. Pairs have none.
    pub(crate) deltas: Option<Deltas>,
}

/// A way to compile `linear_tiled`.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    rows: u32,
    panels: u32,
    warps: u32,
    stages: u32,
    defines: Defines,
}

macro_rules! tiling {
    ($tiles:literal, $row_warps:literal, $panels:literal, $stages:literal) => {
        Tiling {
            rows: 16 * $tiles * $row_warps,
            panels: $panels,
            warps: $row_warps * $panels,
            stages: $stages,
            defines: Defines::of(&[
                ("TILE_MT", $tiles),
                ("TILE_ROW_WARPS", $row_warps),
                ("TILE_PANELS", $panels),
                ("TILE_STAGES", $stages),
            ]),
        }
    };
}

/// Up to 64 rows, where the weights' way from memory is what counts: half a tile of rows.
const FEW: Tiling = tiling!(4, 1, 4, 4);
/// More rows.
const MANY: Tiling = tiling!(4, 2, 4, 4);
/// More rows, where a block cannot have the shared memory of [`MANY`]: before sm_90.
const MANY_NARROW: Tiling = tiling!(4, 2, 2, 4);
/// What a block may have from sm_90 on.
const WIDE_SHARED: u32 = 227 << 10;

const STREAM_16: Defines = Defines::of(&[("STREAM_TILES", 1), ("STREAM_STAGES", 3)]);
const STREAM_32: Defines = Defines::of(&[("STREAM_TILES", 2), ("STREAM_STAGES", 4)]);
const STREAM_WARPS: u32 = 8;

/// How a linear is computed.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Weights through registers, for rows of some tiles of 16.
    Stream { tiles: u32 },
    /// Through shared memory.
    Tiled { tiling: Tiling, apart: bool },
    /// Codes through registers, for tiles of some 16 rows.
    Codes { codes: Codes, tiles: u32 },
}

impl Linear {
    /// What it is compiled with where it reads weights as few rows do.
    pub(super) const STREAM: Defines = STREAM_16;

    /// Blocks from which on runs of one output need no blocks of their own.
    const BLOCKS: u32 = 132;

    /// Every variant.
    #[cfg(test)]
    pub(crate) fn variants(element: Element) -> impl Iterator<Item = Kernel> {
        let stream = [STREAM_16, STREAM_32].map(|defines| ("linear_stream", defines));
        let tiled = [FEW, MANY, MANY_NARROW].map(|tiling| ("linear_tiled", tiling.defines));
        let kernel = move |(name, defines): (_, Defines)| {
            [false, true].map(|grouped| Kernel {
                name,
                source: Source::Linear,
                element,
                defines: defines.grouped(grouped),
            })
        };
        stream.into_iter().chain(tiled).flat_map(kernel)
    }

    fn way(&self) -> Way {
        // A tile of pairs is as high as those of the list.
        let rows = self.pairs.map_or(self.rows, |pairs| pairs.cut.rows);
        if let Some(codes) = self.codes {
            return Way::Codes { codes, tiles: if rows <= 16 { 1 } else { 2 } };
        }
        match rows {
            0..=16 => Way::Stream { tiles: 1 },
            17..=32 => Way::Stream { tiles: 2 },
            33..=64 => self.tiled(FEW),
            _ if self.most_shared < WIDE_SHARED => self.tiled(MANY_NARROW),
            _ => self.tiled(MANY),
        }
    }

    fn tiled(&self, tiling: Tiling) -> Way {
        // Experts are enough blocks.
        let idle = self.pairs.is_none() && self.tiles(tiling) < Self::BLOCKS;
        Way::Tiled { tiling, apart: self.shape.splits > 1 && idle }
    }

    /// Returns the bytes of [`Linear::partial`] that it needs for its rows.
    pub(crate) fn partial_bytes(&self) -> u64 {
        match self.way() {
            Way::Tiled { tiling, apart: true } => {
                let tile = u64::from(tiling.rows) * u64::from(tiling.panels) * PANEL as u64 * 4;
                u64::from(self.tiles(tiling) * self.shape.splits) * tile
            }
            _ => 0,
        }
    }

    /// Returns the most counters that a linear needs.
    pub(crate) fn most_counters() -> u64 {
        u64::from(Self::BLOCKS)
    }

    fn tiles(&self, tiling: Tiling) -> u32 {
        self.rows.div_ceil(tiling.rows) * self.shape.panels.div_ceil(tiling.panels)
    }

    pub(crate) fn call(&self) -> Call {
        self.call_by(self.way())
    }

    fn call_by(&self, way: Way) -> Call {
        let LinearShape { panels, steps, splits } = self.shape;
        assert!(splits <= steps && self.input_stride.is_multiple_of(8) && self.to_stride.is_multiple_of(8));
        assert!(!self.finish.is_gated() || splits <= 4, "{:?} splits a pair of half panels", self.shape);
        assert!(
            self.pairs.is_none() || self.bias == 0 && self.deltas.is_none(),
            "experts have neither biases nor deltas"
        );
        let row_tiles = |rows: u32| self.pairs.map_or(self.rows.div_ceil(rows), |pairs| pairs.cut.count);
        let (name, defines, grid, threads, shared_bytes, partial) = match way {
            Way::Stream { tiles } => {
                let (defines, halves) = (if tiles == 1 { STREAM_16 } else { STREAM_32 }, STREAM_WARPS / splits);
                let grid = [(2 * panels).div_ceil(halves), row_tiles(16 * tiles), 1];
                ("linear_stream", defines, grid, STREAM_WARPS * 32, STREAM_WARPS * tiles * 16 * 32 * 4, 0)
            }
            Way::Codes { codes, tiles } => {
                let grid = [(2 * panels).div_ceil(STREAM_WARPS / splits), row_tiles(16 * tiles), 1];
                let shared_bytes = STREAM_WARPS * tiles * 16 * 32 * 4;
                ("linear_codes", codes.defines(tiles), grid, STREAM_WARPS * 32, shared_bytes, 0)
            }
            Way::Tiled { tiling, apart } => {
                let stage = tiling.rows * 64 + tiling.panels * 4096;
                let totals = if splits > 1 && !apart { tiling.rows * tiling.panels * PANEL as u32 * 4 } else { 0 };
                let layers = if apart { splits } else { 1 };
                let grid = [row_tiles(tiling.rows), panels.div_ceil(tiling.panels), layers];
                let partial = if apart { self.partial } else { 0 };
                ("linear_tiled", tiling.defines, grid, tiling.warps * 32, tiling.stages * stage + totals, partial)
            }
        };
        let args = self.words(partial);
        let (source, args) = match way {
            Way::Codes { codes, .. } => (Source::Codes, codes.append(args)),
            Way::Stream { .. } | Way::Tiled { .. } => (Source::Linear, args),
        };
        let kernel = Kernel { name, source, element: self.element, defines: defines.grouped(self.pairs.is_some()) };
        Call { kernel, grid, threads, shared_bytes, args }
    }

    /// Returns what every kernel of a linear is told; sums of runs go to `partial`.
    pub(super) fn words(&self, partial: u64) -> Args {
        let (LinearShape { panels, steps, splits }, (what, activation)) = (self.shape, self.finish.numbers());
        let args = Args::default().word(self.weights).word(self.bias).word(self.input).word(self.to);
        let args = args.word(partial).word(self.counters).number(self.rows).number(panels).number(steps).number(splits);
        let args = args.number(self.input_stride).number(self.to_stride).number(what).number(activation);
        self.pairs.map_or_else(|| Deltas::append(self.deltas, args), |pairs| pairs.append(args))
    }
}

#[cfg(test)]
mod tests;
