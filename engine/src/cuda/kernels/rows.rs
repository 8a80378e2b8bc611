//! Kernels of `rows.cu`, which take a row at a time.

use super::{Args, Call, Codes, Defines, Element, Kernel, Source};
use crate::model::decoder::NormKind;

const ROW_THREADS: u32 = 256;
const LARGEST_THREADS: u32 = 1024;

fn call(name: &'static str, element: Element, rows: u32, threads: u32, args: Args) -> Call {
    let kernel = Kernel { name, source: Source::Rows, element, defines: Defines::default() };
    // Where threads meet, each warp leaves a word or two.
    Call { kernel, grid: [rows, 1, 1], threads, shared_bytes: threads / 32 * 8, args }
}

/// How the rows of an embedding lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// `[vocab][width]` 16-bit floats.
    Rows,
    /// `[vocab][width]` f32.
    Floats,
    /// Packed weights of 16-bit floats: a tied head.
    Panels,
    /// Packed weights that are codes, and whose inputs are in order.
    Codes(Codes),
}

/// `to = scale * table[tokens]`, zero beyond the width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Embed {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// u32 `[rows]`, each in the vocabulary, or [`crate::home::FOUND`] and a row of `found`.
    pub(crate) tokens: u64,
    /// u32 `[rows]`: what was found before. What is no token counts as the first.
    pub(crate) found: u64,
    pub(crate) vocab: u32,
    pub(crate) table: u64,
    /// f32 `[rows][stride]`.
    pub(crate) to: u64,
    pub(crate) width: u32,
    pub(crate) stride: u32,
    pub(crate) kind: Table,
    pub(crate) scale: f32,
}

impl Embed {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.tokens).word(self.found).word(self.table).word(self.to);
        let args = args.number(self.vocab).number(self.width).number(self.stride).float(self.scale);
        let (name, args) = match self.kind {
            Table::Rows => ("embed", args.number(0)),
            Table::Floats => ("embed", args.number(1)),
            Table::Panels => ("embed", args.number(2)),
            Table::Codes(codes) => ("embed_codes", codes.append_table(args)),
        };
        call(name, self.element, self.rows, ROW_THREADS, args)
    }
}

/// Where normed rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormTo {
    /// 16-bit floats `[rows][to_stride]`, zero beyond the width; `to_stride` is even.
    Store,
    /// Added to f32 `[rows][to_stride]`.
    Add,
}

/// A norm of each row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// f32 `[rows][from_stride]`.
    pub(crate) from: u64,
    /// f32 `[width]`.
    pub(crate) weight: u64,
    /// f32 `[width]`; 0 = none.
    pub(crate) bias: u64,
    pub(crate) to: u64,
    pub(crate) width: u32,
    pub(crate) from_stride: u32,
    pub(crate) to_stride: u32,
    /// `None` = rows as they are; then there is no weight.
    pub(crate) kind: Option<NormKind>,
    pub(crate) eps: f32,
    pub(crate) into: NormTo,
}

impl Norm {
    pub(crate) fn call(&self) -> Call {
        let kind = match self.kind {
            None => 0,
            Some(NormKind::Rms) => 1,
            Some(NormKind::Layer) => 2,
        };
        let args = Args::default().word(self.from).word(self.weight).word(self.bias).word(self.to);
        let args = args.number(self.width).number(self.from_stride).number(self.to_stride).number(kind).float(self.eps);
        let name = match self.into {
            NormTo::Store => "norm_store",
            NormTo::Add => "norm_add",
        };
        call(name, self.element, self.rows, ROW_THREADS, args)
    }
}

/// `to[i] = from[rows[i]]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gather {
    pub(crate) kept: u32,
    /// `[any][stride]` words of 32 bits.
    pub(crate) from: u64,
    /// u32 `[kept]`.
    pub(crate) rows: u64,
    /// `[kept][stride]`, apart from `from`.
    pub(crate) to: u64,
    pub(crate) stride: u32,
}

/// `stages[row] = stage` where `from[row]` has an infinity or a NaN and no stage is noted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check {
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`.
    pub(crate) from: u64,
    /// u32 `[rows]`.
    pub(crate) stages: u64,
    pub(crate) width: u32,
    pub(crate) stride: u32,
    /// Above 0.
    pub(crate) stage: u32,
    /// Whether none is noted yet, whatever stands there; then 0 is written where there is none.
    pub(crate) first: bool,
}

impl Check {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.stages).number(self.width).number(self.stride);
        let args = args.number(self.stage).number(self.first.into());
        call("check", Element::Bf16, self.rows, ROW_THREADS, args)
    }
}

impl Gather {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.rows).word(self.to).number(self.stride);
        call("gather", Element::Bf16, self.kept, ROW_THREADS, args)
    }
}

/// `to[row][i] = from[row][order[i]]`, zero beyond the width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reorder {
    pub(crate) rows: u32,
    /// 16-bit floats `[rows][stride]`.
    pub(crate) from: u64,
    /// u32 `[width]`, each below it.
    pub(crate) order: u64,
    /// As `from`, apart from it.
    pub(crate) to: u64,
    pub(crate) width: u32,
    /// Even.
    pub(crate) stride: u32,
}

impl Reorder {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.order).word(self.to).number(self.width);
        call("reorder", Element::Bf16, self.rows, ROW_THREADS, args.number(self.stride))
    }
}

/// What [`Join`] makes of parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JoinTo {
    /// 16-bit floats, zero beyond the width.
    Halves,
    /// f32.
    Floats,
    /// f32 that are added to those that are there.
    Sums,
}

/// `to[row][part * part_width + i] = parts[part][row][i]`, up to the width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Join {
    pub(crate) rows: u32,
    pub(crate) parts: u32,
    /// `[parts][rows][part_stride]`.
    pub(crate) from: u64,
    pub(crate) part_stride: u32,
    pub(crate) part_width: u32,
    /// `[rows][to_stride]`.
    pub(crate) to: u64,
    pub(crate) width: u32,
    pub(crate) to_stride: u32,
    pub(crate) into: JoinTo,
}

impl Join {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.to).number(self.part_stride).number(self.part_width);
        let name = match self.into {
            JoinTo::Halves => "join_halves",
            JoinTo::Floats => "join_floats",
            JoinTo::Sums => "join_add",
        };
        let args = args.number(self.width).number(self.to_stride);
        let call = call(name, Element::Bf16, self.rows, ROW_THREADS, args);
        Call { grid: [self.rows, self.parts, 1], ..call }
    }
}

impl JoinTo {
    /// Returns the bytes of an element.
    pub(crate) fn bytes(self) -> usize {
        if self == JoinTo::Halves { 2 } else { 4 }
    }
}

/// Logits `x` become `scale * x`, and `cap * tanh(x / cap)` of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cap {
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`.
    pub(crate) logits: u64,
    pub(crate) stride: u32,
    pub(crate) columns: u32,
    pub(crate) scale: f32,
    pub(crate) cap: Option<f32>,
}

impl Cap {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.logits).number(self.stride).number(self.columns);
        let args = args.float(self.scale).float(self.cap.unwrap_or(0.0));
        let call = call("cap", Element::Bf16, self.rows, ROW_THREADS, args);
        Call { grid: [self.rows, self.columns.div_ceil(16 * ROW_THREADS), 1], ..call }
    }
}

/// The column of each row's largest logit, the lowest of equals; [`u32::MAX`] where none is a number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Largest {
    pub(crate) rows: u32,
    /// f32 `[rows][stride]`.
    pub(crate) logits: u64,
    /// u32 `[rows]`.
    pub(crate) to: u64,
    pub(crate) stride: u32,
    pub(crate) columns: u32,
}

impl Largest {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.logits).word(self.to).number(self.stride).number(self.columns);
        call("largest", Element::Bf16, self.rows, LARGEST_THREADS, args)
    }
}

#[cfg(test)]
mod tests;
