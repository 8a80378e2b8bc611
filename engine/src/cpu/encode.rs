//! Inputs as a linear reads them, where that is not how they lie in their buffer.
//!
//! Weights that are integers meet inputs that are integers: `input = scale * code`, rounded to nearest. Which codes depends on what
//! the weights were made for. Most formats quantise weights alone; their inputs are cut into *segments* with a scale each, and a
//! code has sixteen bits. A segment's largest magnitude becomes 32,767, which is finer than bf16 by a factor of a hundred, and
//! sums are exact. W8A8 weights expect inputs of eight bits with one scale for a row; a code is one byte, and the row's
//! largest magnitude becomes 127.
//!
//! Beside its scale a segment has the sum of its codes: what unsigned weights need to be counted from their zero
//! ([`super::linear::codes`]). What a row becomes depends on that row alone.
//!
//! A segment, or a row, with an input that is not finite has NaN for its scale, and so have all outputs of its row.

use super::{format::Format, simd::Simd};

/// How a linear reads its inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As floats.
    Floats(Format),
    /// As codes with scales.
    Codes(CodeRows),
}

impl Encoding {
    /// Returns the bytes from row to row for rows of `depth` inputs: an odd number of cache lines, as for [`Format::stride`].
    pub(crate) fn stride(self, depth: usize) -> usize {
        match self {
            Encoding::Floats(format) => format.stride(depth),
            Encoding::Codes(rows) => ((rows.sums + depth.div_ceil(rows.segment) * 4).div_ceil(64) | 1) * 64,
        }
    }
}

/// Where the parts of a row of codes lie: the codes first, zero up to a multiple of 64 of them; then an f32 for each segment, its
/// scale; then an i32 for each, the sum of its codes. Codes of sixteen bits stand in fours of which the middle two are swapped:
/// so they meet bytes of weights that are widened in place, even ones and odd ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CodeRows {
    /// Inputs of a segment, a multiple of 16; 0 where inputs are floats.
    pub(crate) segment: usize,
    /// Codes have eight bits, and a row one scale, else sixteen.
    pub(crate) narrow: bool,
    /// Byte of the first scale.
    pub(crate) scales: usize,
    /// Byte of the first sum.
    pub(crate) sums: usize,
}

impl CodeRows {
    /// Lays out rows of `depth` inputs.
    pub(crate) fn new(depth: usize, segment: usize, narrow: bool) -> Self {
        let scales = depth.next_multiple_of(64) * if narrow { 1 } else { 2 };
        Self { segment, narrow, scales, sums: scales + depth.div_ceil(segment) * 4 }
    }
}

/// One row of inputs.
#[derive(Debug)]
pub(crate) struct EncodeTask<'a> {
    /// The row as it lies in its buffer.
    pub(crate) from: *const u8,
    pub(crate) format: Format,
    /// Which of its elements stands at each place, if not its own; the elements are f32 then.
    pub(crate) order: Option<&'a [u32]>,
    /// Inputs of the row.
    pub(crate) depth: usize,
    pub(crate) to: *mut u8,
    pub(crate) encoding: Encoding,
}

/// Inputs that are widened at once: whole segments of every length.
const CHUNK: usize = 2048;

/// Encodes a row.
///
/// # Safety
/// Both rows are valid, and nobody else touches the one that is written.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &EncodeTask<'_>) {
    let rows = match task.encoding {
        Encoding::Floats(format) => {
            let mut wide = [0.0f32; CHUNK];
            for first in (0..task.depth).step_by(CHUNK) {
                // SAFETY: passed on; the chunk lies in both rows.
                unsafe { format.store_slice(simd, task.to, first, load(simd, task, first, &mut wide)) };
            }
            // Kernels read up to a whole step, and what they read there meets zeros: it must be a number.
            let beyond = task.depth.next_multiple_of(64) - task.depth;
            // SAFETY: rows are whole cache lines of every format.
            unsafe { task.to.add(task.depth * format.bytes()).write_bytes(0, beyond * format.bytes()) };
            return;
        }
        Encoding::Codes(rows) => rows,
    };
    let mut wide = [0.0f32; CHUNK];
    let mut whole_row = None;
    if rows.narrow {
        let mut largest = 0;
        for first in (0..task.depth).step_by(CHUNK) {
            // SAFETY: passed on.
            largest = largest.max(magnitude(unsafe { load(simd, task, first, &mut wide) }));
        }
        whole_row = Some(Scale::new(largest, 127.0));
    }
    // SAFETY: passed on; codes, and what kernels read beyond the last up to a whole word, lie before the scales.
    unsafe {
        let codes = rows.scales / task.depth.next_multiple_of(64) * (task.depth / 64 * 64);
        task.to.add(codes).write_bytes(0, rows.scales - codes);
        for first in (0..task.depth).step_by(CHUNK) {
            encode(task, rows, first, load(simd, task, first, &mut wide), whole_row);
        }
    }
}

/// Returns the inputs from `first` on, up to a chunk.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn load<'a, S: Simd>(simd: S, task: &EncodeTask<'_>, first: usize, wide: &'a mut [f32; CHUNK]) -> &'a [f32] {
    let wide = &mut wide[..CHUNK.min(task.depth - first)];
    // SAFETY: the places lie in the row, and an order names its elements.
    unsafe {
        match task.order {
            Some(order) => {
                for (to, input) in wide.iter_mut().zip(&order[first..]) {
                    *to = task.from.cast::<f32>().add(*input as usize).read();
                }
            }
            None => task.format.load_slice(simd, task.from.add(first * task.format.bytes()), wide),
        }
    }
    wide
}

/// Writes the codes of some inputs, and the scales and sums of their segments.
///
/// # Safety
/// As for [`run`]; the inputs stand at `first` and are whole segments, or the last.
#[inline(always)]
unsafe fn encode(task: &EncodeTask<'_>, rows: CodeRows, first: usize, inputs: &[f32], whole_row: Option<Scale>) {
    for (index, inputs) in inputs.chunks(rows.segment).enumerate() {
        let at = first + index * rows.segment;
        let scale = match whole_row {
            Some(scale) => scale,
            None => Scale::new(magnitude(inputs), 32_767.0),
        };
        // SAFETY: the row has a code for each input, and a scale and a sum for each segment.
        let sum = unsafe {
            if rows.narrow {
                scale.narrow(inputs, std::slice::from_raw_parts_mut(task.to.cast::<i8>().add(at), inputs.len()))
            } else {
                // Up to whole fours, of which the last may have been zeroed.
                let codes = inputs.len().next_multiple_of(4);
                scale.wide(inputs, std::slice::from_raw_parts_mut(task.to.cast::<i16>().add(at), codes))
            }
        };
        let segment = first / rows.segment + index;
        // SAFETY: as above.
        unsafe {
            task.to.add(rows.scales).cast::<f32>().add(segment).write(scale.scale);
            task.to.add(rows.sums).cast::<i32>().add(segment).write(sum);
        }
    }
}

/// Returns the bits of the largest magnitude: they are ordered as magnitudes are, and what is not finite comes last.
#[inline(always)]
fn magnitude(inputs: &[f32]) -> u32 {
    inputs.iter().fold(0, |most, input| most.max(input.to_bits() & 0x7fff_ffff))
}

/// What turns inputs into codes and back.
#[derive(Clone, Copy)]
struct Scale {
    scale: f32,
    inverse: f32,
}

impl Scale {
    /// Added to a number of magnitude below 2^22, it rounds to an integer, ties to even, that stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;

    /// Maps the magnitude of bits `largest` to `most`.
    #[inline(always)]
    fn new(largest: u32, most: f32) -> Self {
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            return Self { scale: f32::NAN, inverse: 0.0 };
        }
        // One over less than this could be infinite.
        if largest < 1e-30 {
            return Self { scale: 0.0, inverse: 0.0 };
        }
        Self { scale: largest / most, inverse: most / largest }
    }

    #[inline(always)]
    fn code(self, input: f32) -> i32 {
        // What is not finite has no code, and its scale says so.
        let scaled = if self.inverse == 0.0 { 0.0 } else { input * self.inverse };
        ((scaled + Self::ROUND).to_bits() as i32) << 10 >> 10
    }

    /// Writes codes of eight bits and returns their sum.
    #[inline(always)]
    fn narrow(self, inputs: &[f32], codes: &mut [i8]) -> i32 {
        let mut sum = 0;
        for (input, to) in inputs.iter().zip(codes) {
            let code = self.code(*input);
            *to = code as i8;
            sum += code;
        }
        sum
    }

    /// Writes codes of sixteen bits and returns their sum.
    #[inline(always)]
    fn wide(self, inputs: &[f32], codes: &mut [i16]) -> i32 {
        let mut sum = 0;
        let (fours, rest) = inputs.as_chunks::<4>();
        let (whole, last) = codes.as_chunks_mut::<4>().0.split_at_mut(fours.len());
        for (inputs, to) in fours.iter().zip(whole) {
            let [a, b, c, d] = [self.code(inputs[0]), self.code(inputs[1]), self.code(inputs[2]), self.code(inputs[3])];
            *to = [a as i16, c as i16, b as i16, d as i16];
            sum += a + b + c + d;
        }
        for (index, input) in rest.iter().enumerate() {
            let code = self.code(*input);
            last[0][[0, 2, 1, 3][index]] = code as i16;
            sum += code;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{buffer::Buffer, kernels::Kernels};

    /// Encodes one row.
    fn encoded(kernels: &Kernels, inputs: &[f32], order: Option<&[u32]>, encoding: Encoding) -> Buffer {
        let depth = inputs.len();
        let mut from = Buffer::new(Format::F32.stride(depth)).expect("memory");
        from.floats_mut()[..depth].copy_from_slice(inputs);
        let mut to = Buffer::new(encoding.stride(depth)).expect("memory");
        to.bytes_mut().fill(0xff);
        let format = Format::F32;
        let task = EncodeTask { from: from.as_ptr(), format, order, depth, to: to.as_mut_ptr(), encoding };
        // SAFETY: both rows are as long as they should be and end at guard pages; the kernels are available.
        unsafe { (kernels.encode)(&task) };
        to
    }

    #[test]
    fn codes_are_the_nearest_and_sums_are_theirs() {
        for kernels in Kernels::available() {
            for (depth, segment) in [(1, 128), (16, 16), (100, 32), (128, 128), (1500, 64), (2080, 128)] {
                for narrow in [false, true] {
                    let inputs: Vec<f32> = (0..depth).map(|at| ((at * 7919) % 2003) as f32 / 100.0 - 10.0).collect();
                    let rows = CodeRows::new(depth, segment, narrow);
                    let mut out = encoded(kernels, &inputs, None, Encoding::Codes(rows));
                    let bytes = out.bytes_mut();
                    let beyond = depth.next_multiple_of(4) * rows.scales / depth.next_multiple_of(64)..rows.scales;
                    assert!(bytes[beyond].iter().all(|byte| *byte == 0));
                    let code = |at: usize| match rows.narrow {
                        true => i32::from(bytes[at] as i8),
                        false => {
                            let place = at / 4 * 4 + [0, 2, 1, 3][at % 4];
                            i32::from(i16::from_le_bytes([bytes[place * 2], bytes[place * 2 + 1]]))
                        }
                    };
                    let (largest, most) = (
                        |inputs: &[f32]| inputs.iter().fold(0.0f32, |most, input| most.max(input.abs())),
                        if narrow { 127.0 } else { 32_767.0 },
                    );
                    for (index, some) in inputs.chunks(segment).enumerate() {
                        let word = |at: usize| <[u8; 4]>::try_from(&bytes[at + index * 4..][..4]).expect("four bytes");
                        let scale = f32::from_le_bytes(word(rows.scales));
                        assert_eq!(scale, largest(if narrow { &inputs } else { some }) / most);
                        let codes = (0..some.len()).map(|at| code(index * segment + at));
                        assert_eq!(codes.clone().sum::<i32>(), i32::from_le_bytes(word(rows.sums)));
                        for (code, input) in codes.zip(some) {
                            let back = f64::from(code) * f64::from(scale);
                            let error = (back - f64::from(*input)).abs() / f64::from(scale);
                            assert!(error <= 0.51, "{input} as {code} x {scale}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_zero_and_what_is_not_finite_stays_so() {
        for kernels in Kernels::available() {
            let mut inputs = [0.0; 64];
            (inputs[20], inputs[33], inputs[50]) = (f32::INFINITY, f32::NAN, 1e-41);
            for narrow in [false, true] {
                let rows = CodeRows::new(64, 16, narrow);
                let out = encoded(kernels, &inputs, None, Encoding::Codes(rows));
                let scales = &out.floats()[rows.scales / 4..][..4];
                let lost: Vec<bool> = scales.iter().map(|scale| scale.is_nan()).collect();
                assert_eq!(lost, if narrow { [true; 4] } else { [false, true, true, false] }, "{scales:?}");
                assert!(narrow || (scales[0] == 0.0 && scales[3] == 0.0), "{scales:?}");
            }
        }
    }

    #[test]
    fn inputs_are_put_in_order_and_floats_change_their_format() {
        let inputs: Vec<f32> = (0..1100).map(|at| at as f32).collect();
        let order: Vec<u32> = (0..1100).rev().collect();
        for kernels in Kernels::available() {
            let out = encoded(kernels, &inputs, Some(&order), Encoding::Floats(Format::F32));
            assert!(out.floats()[..1100].iter().zip(&order).all(|(out, input)| *out == *input as f32));
            let mut out = encoded(kernels, &inputs, None, Encoding::Floats(Format::Bf16));
            for (bytes, input) in out.bytes_mut().chunks_exact(2).zip(&inputs) {
                assert_eq!(bytes, half::bf16::from_f32(*input).to_le_bytes());
            }
            assert!(out.bytes_mut()[2200..2304].iter().all(|byte| *byte == 0), "kernels read on, up to a whole step");
        }
    }
}
