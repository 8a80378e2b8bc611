//! Kernels of linears that the device's library computes: those that lay out its operands, and what ends its sums (`products.cu`).

use super::{Args, Call, Defines, Deltas, Element, Finish, Kernel, Linear, Source};

const PRODUCT_THREADS: u32 = 256;

impl Linear {
    /// Returns the part of it that computes `count` panels of outputs, from `first` on.
    pub(crate) fn part(&self, first: u32, count: u32) -> Self {
        let panel_bytes = self.codes.map_or(u64::from(self.shape.steps) * 4096, |codes| codes.panel_bytes());
        let to_bytes = match self.finish {
            Finish::Store | Finish::Add => 256,
            Finish::Gate(_) => 64,
            Finish::Activate(_) | Finish::Narrow => 128,
        };
        let first = u64::from(first);
        Self {
            shape: self.shape.part(count as usize),
            weights: self.weights + first * panel_bytes,
            bias: if self.bias == 0 { 0 } else { self.bias + first * 256 },
            to: self.to + first * to_bytes,
            deltas: self
                .deltas
                .map(|deltas| Deltas { first_column: deltas.first_column + first as u32 * 64, ..deltas }),
            ..*self
        }
    }

    /// Returns what lays out its weights at `to`, `[panels * 64][32 steps]`: 16-bit floats; or, with their `scales`, the codes of eight bits that they
    /// [are](super::Codes::operand), and f32 `[panels * 64]` there.
    pub(crate) fn lay(&self, to: u64, scales: Option<u64>) -> Call {
        let (args, warps) = (self.words(0), 2 * self.shape.panels * self.shape.steps);
        let (name, source, defines, args) = match self.codes {
            None => ("lay_floats", Source::Linear, Self::STREAM, args.word(to)),
            Some(codes) => {
                let args = codes.append(args).word(to).word(scales.unwrap_or(0));
                ("lay_codes", Source::Codes, codes.defines(1), args)
            }
        };
        let kernel = Kernel { name, source, element: self.element, defines: defines.grouped(false) };
        Call { kernel, grid: [warps.div_ceil(8), 1, 1], threads: 256, shared_bytes: 0, args }
    }

    /// Returns what makes its outcome of `sums`.
    pub(crate) fn end(&self, sums: &Sums) -> Call {
        let units = u64::from(self.rows) * u64::from(self.shape.panels) * if self.finish.is_gated() { 4 } else { 8 };
        let args = self.words(0).word(sums.from).word(sums.row_scales).word(sums.scales);
        let grid = [units.div_ceil(u64::from(PRODUCT_THREADS)) as u32, 1, 1];
        call("end_sums", self.element, grid, args.number(u32::from(sums.integers)))
    }
}

/// Sums that a library has made of a linear's rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    /// `[rows][panels * 64]` f32, or i32.
    pub(crate) from: u64,
    pub(crate) integers: bool,
    /// f32 `[rows]` and `[panels * 64]`: what they are to be multiplied with; 0 = nothing.
    pub(crate) row_scales: u64,
    pub(crate) scales: u64,
}

/// Rows as numbers of eight bits times a scale of each row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Narrow {
    pub(crate) element: Element,
    pub(crate) rows: u32,
    /// 16-bit floats `[rows][stride]`.
    pub(crate) from: u64,
    /// e4m3, or signed integers: `[rows][width]`, a multiple of 32.
    pub(crate) to: u64,
    /// f32 `[rows]`.
    pub(crate) scales: u64,
    pub(crate) width: u32,
    pub(crate) stride: u32,
    pub(crate) integers: bool,
}

impl Narrow {
    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.from).word(self.to).word(self.scales);
        let args = args.number(self.width).number(self.stride).number(u32::from(self.integers));
        call("narrow_rows", self.element, [self.rows, 1, 1], args)
    }
}

fn call(name: &'static str, element: Element, grid: [u32; 3], args: Args) -> Call {
    let kernel = Kernel { name, source: Source::Products, element, defines: Defines::default() };
    // Where threads meet, each warp leaves a word.
    Call { kernel, grid, threads: PRODUCT_THREADS, shared_bytes: PRODUCT_THREADS / 32 * 4, args }
}

#[cfg(test)]
mod tests;
