//! Norms: of the residual stream on its way into a linear, of a block's outcome on its way back, and of heads.

use super::{format::Format, packed::PANEL, simd::Simd};
use crate::model::{decoder::NormKind, weights::Norm};

/// Some rows, normed or as they are, written as inputs of a linear or added to the residual stream.
#[derive(Debug)]
pub(crate) struct NormTask<'a> {
    /// First row, f32, `[rows][stride]`; zero beyond `width`.
    pub(crate) from: *const f32,
    /// f32 from row to row, a multiple of 64.
    pub(crate) from_stride: usize,
    pub(crate) to: NormOutput,
    pub(crate) rows: usize,
    /// Elements of a row.
    pub(crate) width: usize,
    pub(crate) kind: NormKind,
    /// `None` = as they are.
    pub(crate) norm: Option<&'a Norm>,
    /// Added to the mean square.
    pub(crate) eps: f32,
}

/// Where normed rows go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NormOutput {
    /// Stored with `stride` bytes from row to row.
    Store { to: *mut u8, stride: usize, format: Format },
    /// Added to what is there, with `stride` f32 from row to row.
    Add { to: *mut f32, stride: usize },
}

/// Computes a task. A row's elements are added in four sums of every lane, so in an order of their own that depends on nothing.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, and nobody else touches the outputs.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &NormTask<'_>) {
    assert!(task.from_stride.is_multiple_of(PANEL) && task.width <= task.from_stride);
    for row in 0..task.rows {
        // SAFETY: rows are `from_stride` f32, a multiple of 64 and so of four vectors; outputs have as many elements, and so
        // have weights, as just checked.
        unsafe {
            let from = task.from.add(row * task.from_stride);
            let Some(norm) = task.norm else {
                for at in (0..task.from_stride).step_by(S::LANES) {
                    write(simd, task.to, row, at, simd.load(from.add(at)));
                }
                continue;
            };
            assert!(norm.weight.len() >= task.from_stride);
            let (mean, scale) = match task.kind {
                NormKind::Rms => (0.0, rms(simd, from, task)),
                NormKind::Layer => mean_and_scale(simd, from, task),
            };
            let (mean, scale) = (simd.splat(mean), simd.splat(scale));
            for at in (0..task.from_stride).step_by(S::LANES) {
                let value = simd.mul(simd.sub(simd.load(from.add(at)), mean), scale);
                let mut value = simd.mul(value, simd.load(norm.weight.as_ptr().add(at)));
                if let Some(bias) = &norm.bias {
                    assert!(bias.len() >= task.from_stride);
                    value = simd.add(value, simd.load(bias.as_ptr().add(at)));
                }
                write(simd, task.to, row, at, value);
            }
        }
    }
}

/// # Safety
/// The vector at `at` of row `row` is valid and ours.
#[inline(always)]
unsafe fn write<S: Simd>(simd: S, to: NormOutput, row: usize, at: usize, value: S::F) {
    // SAFETY: passed on.
    unsafe {
        match to {
            NormOutput::Store { to, stride, format } => format.store(simd, to.add(row * stride), at, value),
            NormOutput::Add { to, stride } => {
                let to = to.add(row * stride + at);
                simd.store(to, simd.add(simd.load(to), value));
            }
        }
    }
}

/// One over the root of the mean square of a row.
///
/// # Safety
/// The row holds `from_stride` f32.
#[inline(always)]
unsafe fn rms<S: Simd>(simd: S, from: *const f32, task: &NormTask<'_>) -> f32 {
    let mut squares = [simd.splat(0.0); 4];
    for first in (0..task.from_stride).step_by(4 * S::LANES) {
        for (lane, squares) in squares.iter_mut().enumerate() {
            // SAFETY: within the row, which is whole runs of four vectors.
            let value = unsafe { simd.load(from.add(first + lane * S::LANES)) };
            *squares = simd.fma(value, value, *squares);
        }
    }
    inverse_root(simd.sum4(squares), task.width, task.eps)
}

/// The mean of a row, and one over the root of the mean square of what is left without it.
///
/// # Safety
/// As for [`rms`].
#[inline(always)]
unsafe fn mean_and_scale<S: Simd>(simd: S, from: *const f32, task: &NormTask<'_>) -> (f32, f32) {
    let mut sums = [simd.splat(0.0); 4];
    for first in (0..task.from_stride).step_by(4 * S::LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            // SAFETY: within the row.
            *sum = simd.add(*sum, unsafe { simd.load(from.add(first + lane * S::LANES)) });
        }
    }
    let mean = total(simd.sum4(sums)) / task.width as f32;
    let mut squares = [simd.splat(0.0); 4];
    for first in (0..task.width).step_by(4 * S::LANES) {
        for (lane, squares) in squares.iter_mut().enumerate() {
            let at = first + lane * S::LANES;
            // Beyond the width stands the mean, so that it adds nothing.
            let mut last = [mean; 16];
            // SAFETY: within the row, and an array of 16 holds a vector.
            let value = unsafe {
                if at + S::LANES > task.width {
                    let left = task.width.saturating_sub(at);
                    std::ptr::copy_nonoverlapping(from.add(at), last.as_mut_ptr(), left);
                    simd.load(last.as_ptr())
                } else {
                    simd.load(from.add(at))
                }
            };
            let value = simd.sub(value, simd.splat(mean));
            *squares = simd.fma(value, value, *squares);
        }
    }
    (mean, inverse_root(simd.sum4(squares), task.width, task.eps))
}

/// Normalises one head, or all heads as one, in place; `head` and `weight` have one length of any size.
#[inline(always)]
pub(crate) fn norm_head(kind: NormKind, head: &mut [f32], weight: &[f32], eps: f32) {
    if kind == NormKind::Layer {
        let mean = total(sum_lanes(head, |value| value)) / head.len() as f32;
        head.iter_mut().for_each(|value| *value -= mean);
    }
    let scale = inverse_root(sum_lanes(head, |value| value * value), head.len(), eps);
    head.iter_mut().zip(weight).for_each(|(value, weight)| *value = *value * scale * weight);
}

/// Adds `term` of every element, in four sums.
#[inline(always)]
fn sum_lanes(values: &[f32], term: impl Fn(f32) -> f32) -> [f32; 4] {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += term(*value));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, value)| *sum += term(*value));
    std::array::from_fn(|lane| (sums[lane] + sums[lane + 8]) + (sums[lane + 4] + sums[lane + 12]))
}

#[inline(always)]
fn total(sums: [f32; 4]) -> f32 {
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

#[inline(always)]
fn inverse_root(squares: [f32; 4], width: usize, eps: f32) -> f32 {
    1.0 / (total(squares) / width as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{buffer::Buffer, kernels::Kernels};

    fn wave(index: usize) -> f32 {
        ((index * 7919) % 2003) as f32 / 500.0 - 1.0
    }

    /// The definition, in f64.
    fn exact(kind: NormKind, row: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f64) -> Vec<f64> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let mut row: Vec<f64> = row.iter().map(|value| f64::from(*value)).collect();
        if kind == NormKind::Layer {
            let middle = mean(&row);
            row.iter_mut().for_each(|value| *value -= middle);
        }
        let squares: Vec<f64> = row.iter().map(|value| value * value).collect();
        let scale = 1.0 / (mean(&squares) + eps).sqrt();
        let bias = |index: usize| bias.map_or(0.0, |bias| f64::from(bias[index]));
        row.iter().enumerate().map(|(at, value)| value * scale * f64::from(weight[at]) + bias(at)).collect()
    }

    #[test]
    fn rows_are_normed_as_defined() {
        for (kernels, kind) in Kernels::available().into_iter().flat_map(|k| [(k, NormKind::Rms), (k, NormKind::Layer)])
        {
            for width in [1usize, 7, 64, 80, 130, 1000] {
                let (rows, stride) = (3, width.next_multiple_of(PANEL));
                let mut from = Buffer::new(rows * stride * 4).expect("memory");
                let padded = |salt: usize| -> Vec<f32> {
                    (0..stride).map(|at| if at < width { wave(at + salt) } else { 0.0 }).collect()
                };
                for (row, values) in from.floats_mut().chunks_exact_mut(stride).take(rows).enumerate() {
                    values.copy_from_slice(&padded(row * 31));
                }
                for bias in [None, Some(padded(5))] {
                    let norm = Norm { weight: padded(77), bias };
                    let mut to = Buffer::new(rows * stride * 4).expect("memory");
                    to.floats_mut().fill(1.0);
                    let task = NormTask {
                        from: from.as_ptr().cast(),
                        from_stride: stride,
                        to: NormOutput::Add { to: to.as_mut_ptr().cast(), stride },
                        rows,
                        width,
                        kind,
                        norm: Some(&norm),
                        eps: 1e-5,
                    };
                    // SAFETY: both buffers hold the rows and end at guard pages; the kernels are available.
                    unsafe { (kernels.norm)(&task) };
                    for (row, to) in to.floats().chunks_exact(stride).take(rows).enumerate() {
                        let values = &from.floats()[row * stride..][..width];
                        let expected = exact(kind, values, &norm.weight, norm.bias.as_deref(), 1e-5);
                        for (out, expected) in to.iter().zip(expected) {
                            let error = (f64::from(*out) - 1.0 - expected).abs();
                            assert!(
                                error < 1e-5 * (1.0 + expected.abs()),
                                "{} {kind:?} {width}: {error}",
                                kernels.name
                            );
                        }
                        assert!(to[width..].iter().all(|out| *out == 1.0), "what is beyond a row stays zero");
                    }
                }
            }
        }
    }

    #[test]
    fn heads_are_normed_as_defined() {
        for kind in [NormKind::Rms, NormKind::Layer] {
            for width in [2, 20, 64, 130] {
                let head: Vec<f32> = (0..width).map(wave).collect();
                let weight: Vec<f32> = (7..width + 7).map(wave).collect();
                let mut normed = head.clone();
                norm_head(kind, &mut normed, &weight, 1e-5);
                let expected = exact(kind, &head, &weight, None, 1e-5);
                let worst = normed.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-5, "{kind:?} {width}: {worst}");
            }
        }
    }
}
