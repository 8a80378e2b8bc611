//! Root-mean-square norm (arXiv 1910.07467).

use super::{format::Format, packed::PANEL, simd::Simd};

/// The norm of some rows of the residual stream, written as inputs of a linear.
#[derive(Debug)]
pub(crate) struct NormTask<'a> {
    /// First row, f32, `[rows][stride]`; zero beyond `width`.
    pub(crate) from: *const f32,
    /// f32 from row to row, a multiple of 64.
    pub(crate) from_stride: usize,
    /// First output row.
    pub(crate) to: *mut u8,
    /// Bytes from row to row.
    pub(crate) to_stride: usize,
    /// Element type of the output.
    pub(crate) format: Format,
    pub(crate) rows: usize,
    /// Elements of a row.
    pub(crate) width: usize,
    /// `[stride]`, zero beyond `width`.
    pub(crate) weight: &'a [f32],
    /// Added to the mean square.
    pub(crate) eps: f32,
}

/// Computes a task. A row's squares are added in four sums of every lane, so in an order of their own that depends on nothing.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, and nobody else touches the outputs.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &NormTask<'_>) {
    assert!(task.weight.len() >= task.from_stride && task.from_stride.is_multiple_of(PANEL));
    let vectors = task.from_stride / S::LANES;
    for row in 0..task.rows {
        // SAFETY: rows are `from_stride` f32, a multiple of 64 and so of four vectors; outputs have as many elements.
        unsafe {
            let from = task.from.add(row * task.from_stride);
            let mut squares = [simd.splat(0.0); 4];
            for vector in (0..vectors).step_by(4) {
                for (lane, squares) in squares.iter_mut().enumerate() {
                    let value = simd.load(from.add((vector + lane) * S::LANES));
                    *squares = simd.fma(value, value, *squares);
                }
            }
            let scale = simd.splat(inverse_root(simd.sum4(squares), task.width, task.eps));
            let to = task.to.add(row * task.to_stride);
            for at in (0..task.from_stride).step_by(S::LANES) {
                let value = simd.mul(simd.load(from.add(at)), scale);
                let value = simd.mul(value, simd.load(task.weight.as_ptr().add(at)));
                task.format.store(simd, to, at, value);
            }
        }
    }
}

/// Normalises one head in place; `head` and `weight` have one length of any size.
#[inline(always)]
pub(crate) fn norm_head(head: &mut [f32], weight: &[f32], eps: f32) {
    let mut squares = [0.0f32; 16];
    let (chunks, rest) = head.as_chunks::<16>();
    for chunk in chunks {
        squares.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
    }
    squares.iter_mut().zip(rest).for_each(|(sum, value)| *sum += value * value);
    let quarters =
        std::array::from_fn(|lane| (squares[lane] + squares[lane + 8]) + (squares[lane + 4] + squares[lane + 12]));
    let scale = inverse_root(quarters, head.len(), eps);
    head.iter_mut().zip(weight).for_each(|(value, weight)| *value = *value * scale * weight);
}

#[inline(always)]
fn inverse_root(squares: [f32; 4], width: usize, eps: f32) -> f32 {
    let sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    1.0 / (sum / width as f32 + eps).sqrt()
}
