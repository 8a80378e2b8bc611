//! Kernels that know pages of keys and values: `rotary.cu`, which writes them, and `attention.cu`, which reads them.

use super::{Args, Call, Defines, Element, Kernel, LatentAttention, Source};
use crate::model::decoder::NormKind;
use kv_cache::{KvDtype, PageLayout};

/// The pages of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    /// Block of page 0.
    layer: u64,
    block_bytes: u64,
    values: u32,
    key_scales: u32,
    value_scales: u32,
    page_shift: u32,
    kv_heads: u32,
    pub(super) dim: u32,
    /// What `PAGES` is.
    pub(super) kind: u32,
}

impl Pages {
    /// Returns the pages of `layout` whose pool lies at `pool`, for layer `layer` of a model that computes in `element`.
    ///
    /// # Errors
    /// Says what the kernels cannot do.
    pub(crate) fn new(layout: &PageLayout, element: Element, pool: u64, layer: usize) -> Result<Self, String> {
        let kind = match (layout.dtype, element) {
            (KvDtype::Bf16, Element::Bf16) | (KvDtype::F16, Element::F16) => 0,
            (KvDtype::Fp8, _) => 1,
            (KvDtype::Int8, _) => 2,
            (other, _) => return Err(format!("pages of {other} for a model that computes in {element:?}")),
        };
        if !layout.page_tokens.is_power_of_two() {
            return Err(format!("pages of {} tokens; a power of two would be right", layout.page_tokens));
        }
        let dim = layout.key_dim;
        let fits = |of: u32, most: u32| dim > 0 && dim <= most && dim.is_multiple_of(of);
        if layout.value_dim == 0 {
            // A latent is a value as well.
            let (heads, most) = (layout.kv_heads, LatentAttention::MOST_KEY as u32);
            if heads != 1 || !fits(8, most) {
                return Err(format!(
                    "{heads} keys of {dim} elements that are values as well; one, of a multiple of 8 up to {most}, would be right"
                ));
            }
        } else if layout.value_dim != dim || !fits(4, 256) {
            return Err(format!(
                "heads of {dim} and {} elements; up to 256, the same of both, and a multiple of 4 would be right",
                layout.value_dim
            ));
        }
        let block_bytes = layout.block_bytes() as u64;
        Ok(Self {
            layer: pool + layer as u64 * u64::from(layout.pages) * block_bytes,
            block_bytes,
            values: layout.values().elements as u32,
            key_scales: layout.keys().scales as u32,
            value_scales: layout.values().scales as u32,
            page_shift: layout.page_tokens.trailing_zeros(),
            kv_heads: layout.kv_heads,
            dim,
            kind,
        })
    }

    pub(super) fn append(&self, args: Args) -> Args {
        let args = args.word(self.layer).word(self.block_bytes).number(self.values).number(self.key_scales);
        args.number(self.value_scales).number(self.page_shift).number(self.kv_heads).number(self.dim)
    }
}

/// Whose norm weights a head has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// All heads the same, `[dim]`.
    Same = 0,
    /// Each its own, `[heads][dim]`.
    Each = 1,
    /// All heads are one vector, `[heads * dim]`.
    Whole = 2,
}

/// Norms of q and k.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadNorms {
    pub(crate) kind: NormKind,
    pub(crate) share: Share,
    /// f32.
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) eps: f32,
}

/// Norms and turns q and k, and writes k and v to pages. q is left where it was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotary {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`: `heads` heads of q, then of k, then of v.
    pub(crate) qkv: u64,
    pub(crate) stride: u32,
    pub(crate) heads: u32,
    /// u32 `[rows]`.
    pub(crate) positions: u64,
    /// u32 `[rows][2]`: page, token in it.
    pub(crate) slots: u64,
    /// f32 `[positions][pairs][2]`: cosine, sine.
    pub(crate) angles: u64,
    /// The first `2 * pairs` elements of a head turn.
    pub(crate) pairs: u32,
    /// Pairs are neighbours, else halves apart.
    pub(crate) interleaved: bool,
    pub(crate) norms: Option<HeadNorms>,
    pub(crate) pages: Pages,
}

impl Rotary {
    const THREADS: u32 = 256;

    pub(crate) fn call(&self) -> Call {
        let norms = self.norms;
        let args = Args::default().word(self.qkv).word(self.positions).word(self.slots).word(self.angles);
        let args = args.word(norms.map_or(0, |norms| norms.q)).word(norms.map_or(0, |norms| norms.k));
        let args = self.pages.append(args).number(self.stride).number(self.heads).number(self.pairs);
        let kind = norms.map_or(0, |norms| if norms.kind == NormKind::Rms { 1 } else { 2 });
        let args = args.number(u32::from(self.interleaved)).number(kind);
        let args = args.number(norms.map_or(0, |norms| norms.share as u32)).float(norms.map_or(0.0, |norms| norms.eps));
        let defines = Defines::of(&[("PAGES", self.pages.kind)]);
        let kernel = Kernel { name: "rotary", source: Source::Rotary, element: self.element, defines };
        // Two heads for each warp.
        let shared_bytes = Self::THREADS / 32 * 2 * 256 * 4;
        Call { kernel, grid: [self.rows, 1, 1], threads: Self::THREADS, shared_bytes, args }
    }
}

/// Attention of some sequences over the pages of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub(crate) element: Element,
    /// Over all sequences, at least.
    pub(crate) rows: u32,
    /// Rows of a sequence, at least.
    pub(crate) most_rows: u32,
    /// Positions of the longest sequence, those computed now included, at least.
    pub(crate) longest: u32,
    /// f32 `[rows][q_stride]`, `heads` heads in a row.
    pub(crate) q: u64,
    pub(crate) q_stride: u32,
    pub(crate) heads: u32,
    /// u32 `[sequences][4]`: first row, rows, position of the first, start of its page table in `tables`.
    pub(crate) sequences: u64,
    pub(crate) sequence_count: u32,
    /// Page ids.
    pub(crate) tables: u64,
    /// 16-bit floats `[rows][to_stride]`, `heads * dim` in a row; what is beyond stays.
    pub(crate) to: u64,
    /// A multiple of 2.
    pub(crate) to_stride: u32,
    /// Positions seen, itself included; `None` = all.
    pub(crate) window: Option<u32>,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub(crate) cap: Option<f32>,
    pub(crate) pages: Pages,
    /// Room for [`Attention::state_bytes`].
    pub(crate) states: u64,
}

/// Positions of a part.
const PART: u32 = 512;
/// Keys of a block.
const KEYS: u32 = 64;

impl Attention {
    fn group(&self) -> u32 {
        self.heads / self.pages.kv_heads
    }

    /// Returns how many tokens of a sequence have no more rows than a warp holds, of `group` heads each, so that blocks can be given to parts instead.
    pub(crate) fn few_tokens(group: usize) -> usize {
        16 / group
    }

    fn is_short(&self) -> bool {
        self.most_rows as usize <= Self::few_tokens(self.group() as usize)
    }

    /// Returns the parts that have blocks of their own; 1 = none has.
    fn parts(&self) -> u32 {
        if self.is_short() { self.longest.div_ceil(PART).max(1) } else { 1 }
    }

    fn dim_tiles(&self) -> u32 {
        self.pages.dim.div_ceil(16)
    }

    /// f32 of a lane's state.
    fn state_floats(&self) -> u32 {
        8 * self.dim_tiles() + 4
    }

    /// Returns the bytes of [`Attention::states`] that it needs.
    pub(crate) fn state_bytes(&self) -> u64 {
        match self.parts() {
            1 => 0,
            parts => u64::from(parts * self.sequence_count * self.pages.kv_heads * self.state_floats()) * 128,
        }
    }

    /// Returns the call, and the one that merges parts where they are apart.
    pub(crate) fn calls(&self) -> (Call, Option<Call>) {
        let Pages { kv_heads, dim, kind, .. } = self.pages;
        assert!(self.heads.is_multiple_of(kv_heads) && self.to_stride.is_multiple_of(2), "{self:?}");
        assert!(dim <= 256 && self.group() > 0, "{self:?}");
        let (short, parts, tiles) = (self.is_short(), self.parts(), self.dim_tiles());
        let (warps, stages) = match (short, tiles) {
            (true, _) => (1, 2),
            (false, 0..=8) => (4, 2),
            (false, _) => (2, 1),
        };
        let args = Args::default().word(self.q).word(self.sequences).word(self.tables).word(self.to);
        let args = self.pages.append(args.word(if parts > 1 { self.states } else { 0 }));
        let args = args.number(self.sequence_count).number(self.group()).number(self.q_stride).number(self.to_stride);
        let args = args.number(self.window.unwrap_or(0)).number(parts).float(self.scale).float(self.cap.unwrap_or(0.0));
        let defines =
            Defines::of(&[("PAGES", kind), ("DIM_TILES", tiles), ("ATT_WARPS", warps), ("ATT_STAGES", stages)]);
        let kernel = Kernel { name: "attention", source: Source::Attention, element: self.element, defines };
        let (rows, padded) = (16 * warps, 16 * tiles);
        let scales = if kind == 0 { 0 } else { 2 * KEYS * 4 };
        let stage = KEYS * (2 * padded + 24) * 2 + scales;
        // Where a block goes through several parts, what it has waits for what follows.
        let totals = if parts == 1 && self.longest > PART { self.state_floats() * warps * 32 * 4 } else { 0 };
        let shared_bytes = rows * (padded + 16) * 2 + stages * stage + totals;
        let blocks =
            if parts > 1 { self.sequence_count } else { self.rows * self.group() / rows + self.sequence_count };
        let call = Call { kernel, grid: [blocks, kv_heads, parts], threads: warps * 32, shared_bytes, args };
        let merge = Call {
            kernel: Kernel { name: "attention_merge", ..kernel },
            grid: [self.sequence_count, kv_heads, 1],
            threads: 32 * tiles,
            shared_bytes: 0,
            args,
        };
        (call, (parts > 1).then_some(merge))
    }
}

#[cfg(test)]
pub(super) mod tests;
