//! Kernels of latent attention: `latent.cu`, which writes pages and parts queries, and `latent_attention.cu`, which reads pages.

use super::{Args, Call, Defines, Element, Kernel, Pages, Source};

fn rows_call(name: &'static str, element: Element, kind: u32, rows: u32, threads: u32, args: Args) -> Call {
    let defines = Defines::of(&[("PAGES", kind)]);
    let kernel = Kernel { name, source: Source::Latent, element, defines };
    Call { kernel, grid: [rows, 1, 1], threads, shared_bytes: 0, args }
}

/// Norms latents over their root mean square, turns the parts of keys that follow them, and writes both to pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentKeys {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// f32, a latent and what turns in each row; `stride` from row to row.
    pub(crate) from: u64,
    pub(crate) stride: u32,
    /// u32 `[rows]`.
    pub(crate) positions: u64,
    /// u32 `[rows][2]`: page, token in it.
    pub(crate) slots: u64,
    /// f32 `[positions][pairs][2]`: cosine, sine; a pair for every two elements behind the latent.
    pub(crate) angles: u64,
    /// f32 `[rank]`.
    pub(crate) norm: u64,
    /// Elements of a latent.
    pub(crate) rank: u32,
    /// Added to the mean square.
    pub(crate) eps: f32,
    pub(crate) pages: Pages,
}

impl LatentKeys {
    pub(crate) fn call(&self) -> Call {
        let Pages { dim, kind, .. } = self.pages;
        assert!(self.rank < dim, "{self:?}");
        let args = Args::default().word(self.from).word(self.positions).word(self.slots).word(self.angles);
        let args = self.pages.append(args.word(self.norm)).number(self.stride).number(self.rank).float(self.eps);
        let call = rows_call("latent_keys", self.element, kind, self.rows, 32, args);
        Call { shared_bytes: dim * 4, ..call }
    }
}

/// Parts queries into what meets latents, the input of a linear, and what turns, which goes behind that linear's outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentQueries {
    pub(crate) element: Element,
    pub(crate) count: u32,
    /// f32 `[count][stride]`: heads, each `width` elements that meet latents and `turning` that turn.
    pub(crate) from: u64,
    pub(crate) stride: u32,
    pub(crate) heads: u32,
    pub(crate) width: u32,
    /// Even.
    pub(crate) turning: u32,
    /// u32 `[count]`: which of `positions` is a row's; 0 = each its own.
    pub(crate) rows: u64,
    /// u32.
    pub(crate) positions: u64,
    /// As those of [`LatentKeys`].
    pub(crate) angles: u64,
    /// 16-bit floats `[count][heads][plain_stride]`, zero beyond the width.
    pub(crate) plain: u64,
    /// Even.
    pub(crate) plain_stride: u32,
    /// 16-bit floats `[count][heads][rank + turning]`, of which the last are written.
    pub(crate) q: u64,
    /// Even.
    pub(crate) rank: u32,
}

impl LatentQueries {
    const THREADS: u32 = 256;

    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.rows).word(self.positions).word(self.angles);
        let args = args.word(self.plain).word(self.q).number(self.stride).number(self.heads).number(self.width);
        let args = args.number(self.plain_stride).number(self.rank).number(self.turning);
        rows_call("latent_queries", self.element, 0, self.count, Self::THREADS, args)
    }
}

/// Attention of some sequences over pages of latents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatentAttention {
    pub(crate) element: Element,
    /// Over all sequences, at least.
    pub(crate) rows: u32,
    /// Rows of a sequence, at least.
    pub(crate) most_rows: u32,
    /// Positions of the longest sequence, those computed now included, at least.
    pub(crate) longest: u32,
    /// 16-bit floats `[rows][heads][dim]`, those of a key.
    pub(crate) q: u64,
    pub(crate) heads: u32,
    /// u32 `[sequences][4]`: first row, rows, position of the first, start of its page table in `tables`.
    pub(crate) sequences: u64,
    pub(crate) sequence_count: u32,
    /// Page ids.
    pub(crate) tables: u64,
    /// 16-bit floats `[rows][heads][to_stride]`, `rank` of each; what is beyond stays.
    pub(crate) to: u64,
    /// A multiple of 2.
    pub(crate) to_stride: u32,
    /// Elements of a value: the first of a key.
    pub(crate) rank: u32,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    pub(crate) pages: Pages,
    /// Room for [`LatentAttention::state_bytes`].
    pub(crate) states: u64,
    /// Bytes of shared memory that a block of the device may have.
    pub(crate) most_shared: u32,
}

/// Positions of a part.
const PART: u32 = 1024;
/// Keys of a block.
const KEYS: u32 = 64;
/// Warps that share sixteen rows.
const COLUMN_WARPS: u32 = 4;

impl LatentAttention {
    /// Most elements of a key, and of the latent that is its value.
    pub(crate) const MOST_KEY: usize = 576;
    pub(crate) const MOST_RANK: usize = 512;

    /// Returns how many tokens of a sequence are so few that blocks are given to parts as well.
    pub(crate) fn few_tokens(heads: usize) -> usize {
        (128 / heads).max(1)
    }

    fn is_short(&self) -> bool {
        self.most_rows as usize <= Self::few_tokens(self.heads as usize)
    }

    /// Returns the parts that have blocks of their own; 1 = none has.
    fn parts(&self) -> u32 {
        if self.is_short() { self.longest.div_ceil(PART).max(1) } else { 1 }
    }

    /// Sixteen rows of a block.
    fn row_tiles(&self) -> u32 {
        if self.is_short() && self.heads <= 16 { 1 } else { 2 }
    }

    /// Returns the tiles of rows, at least.
    fn tiles(&self) -> u32 {
        let rows = 16 * self.row_tiles();
        match self.parts() {
            1 => self.rows * self.heads / rows + self.sequence_count,
            _ => (self.most_rows * self.heads).div_ceil(rows) * self.sequence_count,
        }
    }

    fn threads(&self) -> u32 {
        self.row_tiles() * COLUMN_WARPS * 32
    }

    fn rank_tiles(&self) -> u32 {
        self.rank.div_ceil(64)
    }

    /// Returns the bytes of [`LatentAttention::states`] that it needs.
    pub(crate) fn state_bytes(&self) -> u64 {
        match self.parts() {
            1 => 0,
            parts => u64::from(parts * self.tiles()) * u64::from((8 * self.rank_tiles() + 4) * self.threads()) * 4,
        }
    }

    /// Returns the most bytes of states of a sequence of up to `longest` positions, for `heads` heads and latents of `rank` elements.
    pub(crate) fn most_state_bytes(heads: usize, rank: usize, longest: usize) -> usize {
        let rows = (Self::few_tokens(heads) * heads).next_multiple_of(32);
        let warps = rows / 16 * COLUMN_WARPS as usize;
        longest.div_ceil(PART as usize) * warps * (8 * rank.div_ceil(64) + 4) * 128
    }

    /// Returns the call, and the one that merges parts where they are apart.
    pub(crate) fn calls(&self) -> (Call, Option<Call>) {
        let Pages { dim, kind, .. } = self.pages;
        assert!(self.rank.is_multiple_of(8) && self.rank < dim && self.to_stride.is_multiple_of(2), "{self:?}");
        assert!(self.rank as usize <= Self::MOST_RANK && dim as usize <= Self::MOST_KEY, "{self:?}");
        let (parts, row_tiles, threads) = (self.parts(), self.row_tiles(), self.threads());
        let (key_tiles, rank_tiles) = (dim.div_ceil(16), self.rank_tiles());
        let row_bytes = ((16 * key_tiles).max(64 * rank_tiles) + 8) * 2;
        let fixed = 16 * row_tiles * (row_bytes + (KEYS + 8) * 4);
        let stage = KEYS * (row_bytes + if kind == 0 { 0 } else { 4 });
        let stages = if fixed + 2 * stage <= self.most_shared { 2 } else { 1 };
        let args = Args::default().word(self.q).word(self.sequences).word(self.tables).word(self.to);
        let args = self.pages.append(args.word(if parts > 1 { self.states } else { 0 }));
        let args = args.number(self.sequence_count).number(self.heads).number(self.rank).number(self.to_stride);
        let args = args.number(parts).float(self.scale);
        let defines = Defines::of(&[
            ("PAGES", kind),
            ("KEY_TILES", key_tiles),
            ("RANK_TILES", rank_tiles),
            ("ROW_TILES", row_tiles),
            ("LATENT_STAGES", stages),
        ]);
        let kernel =
            Kernel { name: "latent_attention", source: Source::LatentAttention, element: self.element, defines };
        let grid = [self.tiles(), parts, 1];
        let call = Call { kernel, grid, threads, shared_bytes: fixed + stages * stage, args };
        let merge = Call {
            kernel: Kernel { name: "latent_attention_merge", ..kernel },
            grid: [grid[0], rank_tiles, 1],
            shared_bytes: 0,
            ..call
        };
        (call, (parts > 1).then_some(merge))
    }
}

#[cfg(test)]
mod tests;
