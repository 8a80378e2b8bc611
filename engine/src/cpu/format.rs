//! How activations lie in memory: inputs of a linear, keys and values without a scale.

use super::simd::Simd;
use crate::model::checkpoint::ElementType;

/// Element type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// f32.
    F32,
    /// Rounded to bf16, kept as f32: bf16 weights on a machine without a bf16 dot instruction.
    RoundedBf16,
    /// bf16.
    Bf16,
    /// f16.
    F16,
}

impl From<ElementType> for Format {
    fn from(dtype: ElementType) -> Self {
        match dtype {
            ElementType::F32 => Format::F32,
            ElementType::F16 => Format::F16,
            ElementType::Bf16 => Format::Bf16,
        }
    }
}

impl Format {
    /// Returns the size of one element in bytes.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Format::F32 | Format::RoundedBf16 => 4,
            Format::Bf16 | Format::F16 => 2,
        }
    }

    /// Returns the bytes from row to row for rows of `elements`, rounded up to 64: whole cache lines, so that vectors may
    /// overrun, and an odd number of them, so that rows do not all fall into one set of a cache.
    pub(crate) fn stride(self, elements: usize) -> usize {
        ((elements.next_multiple_of(64) * self.bytes() / 64) | 1) * 64
    }

    /// Writes `LANES` elements at `index` of `row`.
    ///
    /// # Safety
    /// The elements lie in the row and nobody else touches them.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(self, simd: S, row: *mut u8, index: usize, value: S::F) {
        // SAFETY: passed on.
        unsafe {
            match self {
                Format::F32 => simd.store(row.cast::<f32>().add(index), value),
                Format::RoundedBf16 => simd.store(row.cast::<f32>().add(index), simd.round_bf16(value)),
                Format::Bf16 => simd.store_bf16(row.cast::<u16>().add(index), value),
                Format::F16 => simd.store_f16(row.cast::<u16>().add(index), value),
            }
        }
    }

    /// Reads `LANES` elements at `index` of `row`.
    ///
    /// # Safety
    /// The elements lie in the row and nobody else writes them.
    #[inline(always)]
    pub(crate) unsafe fn load<S: Simd>(self, simd: S, row: *const u8, index: usize) -> S::F {
        // SAFETY: passed on.
        unsafe {
            match self {
                Format::F32 | Format::RoundedBf16 => simd.load(row.cast::<f32>().add(index)),
                Format::Bf16 => simd.load_bf16(row.cast::<u16>().add(index)),
                Format::F16 => simd.load_f16(row.cast::<u16>().add(index)),
            }
        }
    }

    /// Reads `values.len()` elements of `row`, of any number.
    ///
    /// # Safety
    /// The elements lie in the row and nobody else writes them.
    #[inline(always)]
    pub(crate) unsafe fn load_slice<S: Simd>(self, simd: S, row: *const u8, values: &mut [f32]) {
        let whole = values.len() - values.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: both hold LANES elements from `at` on.
            unsafe { simd.store(values.as_mut_ptr().add(at), self.load(simd, row, at)) };
        }
        let rest = &mut values[whole..];
        if rest.is_empty() {
            return;
        }
        let mut stored = [0.0f32; 16];
        let mut padded = [0.0f32; 16];
        // SAFETY: both arrays hold a whole vector of any format; `rest` elements of the row are the caller's word.
        unsafe {
            let from = row.add(whole * self.bytes());
            std::ptr::copy_nonoverlapping(from, stored.as_mut_ptr().cast::<u8>(), rest.len() * self.bytes());
            simd.store(padded.as_mut_ptr(), self.load(simd, stored.as_ptr().cast(), 0));
        }
        rest.copy_from_slice(&padded[..rest.len()]);
    }

    /// Writes `values` at `index` of `row`, of any length.
    ///
    /// # Safety
    /// The elements lie in the row and nobody else touches them.
    #[inline(always)]
    pub(crate) unsafe fn store_slice<S: Simd>(self, simd: S, row: *mut u8, index: usize, values: &[f32]) {
        let whole = values.len() - values.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `values` holds LANES elements from `at` on, and so does the row from `index + at` on.
            unsafe { self.store(simd, row, index + at, simd.load(values.as_ptr().add(at))) };
        }
        let rest = &values[whole..];
        if rest.is_empty() {
            return;
        }
        let mut padded = [0.0f32; 16];
        padded[..rest.len()].copy_from_slice(rest);
        let mut stored = [0.0f32; 16];
        // SAFETY: both arrays hold a whole vector of either format; `rest` elements of the row are the caller's word.
        unsafe {
            self.store(simd, stored.as_mut_ptr().cast(), 0, simd.load(padded.as_ptr()));
            let to = row.add((index + whole) * self.bytes());
            std::ptr::copy_nonoverlapping(stored.as_ptr().cast::<u8>(), to, rest.len() * self.bytes());
        }
    }
}
