//! Keys and values in their pages: where a token's lie, how they are written and how they are read back.
//!
//! f32, bf16 and f16 elements are rounded once and stand for themselves. fp8 and int8 elements are multiples of a scale that
//! each token has for each head, for its key and for its value ([`kv_cache::PageLayout`] says where). The scale is the smallest
//! bf16 that brings the head's largest magnitude within the elements' range, so nothing saturates and what a token's bytes are
//! depends on that token alone. bf16 is enough: rounding it up costs less than one part in 128 of the range, and an element of
//! at most 8 significant bits times a scale of 8 is an exact f32, so every unit reads the same bits.
//!
//! A head with an element that is not finite has NaN for its scale and reads back as NaN, all of it.

use super::{format::Format, simd::Simd};
use crate::KvMemory;
use kv_cache::{KvDtype, PageId, PageLayout, Plane};

/// A token's place in its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) page: u32,
    pub(crate) token: u32,
}

/// Where the keys and values of one layer lie: the pool's blocks of that layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPages {
    /// Tokens of a page.
    pub(crate) page_tokens: usize,
    pub(crate) keys: Side,
    /// Of 0 elements where the layout has no values.
    pub(crate) values: Side,
}

impl LayerPages {
    /// Returns where layer `layer` of the pool lies.
    pub(crate) fn new(memory: &KvMemory, layer: usize) -> Self {
        let offset = memory.layout().block_offset(layer as u32, PageId(0));
        // SAFETY: `block_offset` checked that the layer lies in the pool.
        Self::at(memory.layout(), unsafe { memory.as_mut_ptr().add(offset) })
    }

    /// Returns where a layer lies whose blocks start at `base`.
    fn at(layout: &PageLayout, base: *mut u8) -> Self {
        let side = |plane: Plane, dim: u32| Side {
            base,
            block_bytes: layout.block_bytes(),
            page_tokens: layout.page_tokens as usize,
            plane,
            dim: dim as usize,
            storage: layout.dtype.into(),
        };
        Self {
            page_tokens: layout.page_tokens as usize,
            keys: side(layout.keys(), layout.key_dim),
            values: side(layout.values(), layout.value_dim),
        }
    }
}

/// The keys, or the values, of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side {
    /// Block of page 0.
    base: *mut u8,
    block_bytes: usize,
    page_tokens: usize,
    plane: Plane,
    /// Elements of a head.
    pub(crate) dim: usize,
    storage: Storage,
}

// SAFETY: only addresses; whoever reads or writes through them vouches for the slots it uses.
unsafe impl Sync for Side {}

/// What the elements of a page are.
#[derive(Clone, Copy, Debug)]
enum Storage {
    /// Values.
    Plain(Format),
    /// Multiples of the head's scale.
    Scaled(Code),
}

/// Elements of one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    E4m3,
    Int8,
}

impl From<KvDtype> for Storage {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Storage::Plain(Format::F32),
            KvDtype::Bf16 => Storage::Plain(Format::Bf16),
            KvDtype::F16 => Storage::Plain(Format::F16),
            KvDtype::Fp8 => Storage::Scaled(Code::E4m3),
            KvDtype::Int8 => Storage::Scaled(Code::Int8),
        }
    }
}

impl Storage {
    fn bytes(self) -> usize {
        match self {
            Storage::Plain(format) => format.bytes(),
            Storage::Scaled(_) => 1,
        }
    }
}

impl Side {
    /// Returns the first element of a token for `head`, and its scale if it has one. Its neighbours in the page follow both.
    ///
    /// Only addresses: whoever uses them vouches for the slot.
    #[inline(always)]
    fn at(&self, slot: Slot, head: usize) -> (*mut u8, *mut [u8; 2]) {
        let block = self.base.wrapping_add(slot.page as usize * self.block_bytes);
        let index = head * self.page_tokens + slot.token as usize;
        let elements = block.wrapping_add(self.plane.elements + index * self.dim * self.storage.bytes());
        (elements, block.wrapping_add(self.plane.scales + index * 2).cast())
    }

    /// Writes what a token has for `head`: `values[dim]`.
    ///
    /// # Safety
    /// The slot and the head lie in the pool, and nobody else touches them.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, simd: S, slot: Slot, head: usize, values: &[f32]) {
        assert_eq!(values.len(), self.dim);
        let (elements, scale_at) = self.at(slot, head);
        match self.storage {
            // SAFETY: passed on.
            Storage::Plain(format) => unsafe { format.store_slice(simd, elements, 0, values) },
            Storage::Scaled(code) => {
                let scale = code.scale(values);
                // SAFETY: passed on; an element is a byte, and the layout has a scale for every token and head.
                let elements = unsafe {
                    scale_at.write(scale_bits(scale).to_le_bytes());
                    std::slice::from_raw_parts_mut(elements, self.dim)
                };
                code.encode(values, scale, elements);
            }
        }
    }

    /// Reads what the tokens from `slot` on have for `head`, one to each row of `rows`, `stride` f32 from row to row; what is
    /// beyond `dim` becomes zero.
    ///
    /// # Safety
    /// The tokens lie in the slot's page and the pool, the head too, and nobody writes them.
    #[inline(always)]
    pub(crate) unsafe fn read<S: Simd>(&self, simd: S, slot: Slot, head: usize, stride: usize, rows: &mut [f32]) {
        let (elements, scales) = self.at(slot, head);
        let row_bytes = self.dim * self.storage.bytes();
        match self.storage {
            // SAFETY: neighbours of the page follow each other.
            Storage::Plain(format) if self.dim == stride => unsafe { format.load_slice(simd, elements, rows) },
            Storage::Plain(format) => {
                for (token, row) in rows.chunks_exact_mut(stride).enumerate() {
                    let (row, beyond) = row.split_at_mut(self.dim);
                    beyond.fill(0.0);
                    // SAFETY: as above.
                    unsafe { format.load_slice(simd, elements.add(token * row_bytes), row) };
                }
            }
            Storage::Scaled(code) => {
                for (token, row) in rows.chunks_exact_mut(stride).enumerate() {
                    let (row, beyond) = row.split_at_mut(self.dim);
                    beyond.fill(0.0);
                    // SAFETY: as above, also for their scales.
                    unsafe {
                        let scale = scale_from(u16::from_le_bytes(scales.add(token).read()));
                        code.decode(simd, elements.add(token * row_bytes), scale, row);
                    }
                }
            }
        }
    }
}

fn scale_bits(scale: f32) -> u16 {
    (scale.to_bits() >> 16) as u16
}

fn scale_from(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

impl Code {
    /// Returns the largest magnitude of an element.
    fn largest(self) -> f32 {
        match self {
            Code::E4m3 => 448.0,
            Code::Int8 => 127.0,
        }
    }

    /// Returns the scale for `values`: a bf16, as f32. It is normal, so that dividing by it is harmless; or NaN where a value is
    /// not finite.
    #[inline(always)]
    fn scale(self, values: &[f32]) -> f32 {
        // Magnitudes are ordered as their bits are, and what is not finite comes last.
        let magnitude = values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff));
        if magnitude >= f32::INFINITY.to_bits() {
            return f32::from_bits(0x7fc0_0000);
        }
        let wanted = f32::from_bits(magnitude) / self.largest();
        let rounded_up = (wanted.to_bits() + 0xffff) & 0xffff_0000;
        f32::from_bits(rounded_up).max(f32::MIN_POSITIVE)
    }

    /// Rounds `values / scale` to the nearest elements, ties to even; all become zero where the scale is NaN.
    #[inline(always)]
    fn encode(self, values: &[f32], scale: f32, elements: &mut [u8]) {
        if scale.is_nan() {
            elements.fill(0);
            return;
        }
        let pairs = elements.iter_mut().zip(values);
        match self {
            Code::E4m3 => pairs.for_each(|(element, value)| *element = narrow_e4m3(value / scale)),
            Code::Int8 => pairs.for_each(|(element, value)| *element = narrow_i8(value / scale)),
        }
    }

    /// Multiplies `values.len()` elements by their scale.
    ///
    /// # Safety
    /// The elements can be read.
    #[inline(always)]
    unsafe fn decode<S: Simd>(self, simd: S, elements: *const u8, scale: f32, values: &mut [f32]) {
        let whole = values.len() - values.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: both hold LANES elements from `at` on.
            unsafe { simd.store(values.as_mut_ptr().add(at), self.decode_vector(simd, elements.add(at), scale)) };
        }
        let rest = &mut values[whole..];
        if rest.is_empty() {
            return;
        }
        let (mut stored, mut wide) = ([0u8; 16], [0.0f32; 16]);
        // SAFETY: both arrays hold a whole vector; `rest` elements are the caller's word.
        unsafe {
            std::ptr::copy_nonoverlapping(elements.add(whole), stored.as_mut_ptr(), rest.len());
            simd.store(wide.as_mut_ptr(), self.decode_vector(simd, stored.as_ptr(), scale));
        }
        rest.copy_from_slice(&wide[..rest.len()]);
    }

    /// # Safety
    /// `LANES` elements can be read.
    #[inline(always)]
    unsafe fn decode_vector<S: Simd>(self, simd: S, elements: *const u8, scale: f32) -> S::F {
        // SAFETY: passed on.
        let wide = unsafe {
            match self {
                Code::E4m3 => simd.load_e4m3(elements),
                Code::Int8 => simd.load_i8(elements.cast()),
            }
        };
        simd.mul(wide, simd.splat(scale))
    }
}

/// Rounds to the nearest integer in -127 ..= 127, ties to even.
#[inline(always)]
fn narrow_i8(value: f32) -> u8 {
    value.round_ties_even().clamp(-127.0, 127.0) as i8 as u8
}

/// Rounds to the nearest finite e4m3, ties to even.
#[inline(always)]
fn narrow_e4m3(value: f32) -> u8 {
    const LARGEST: u32 = 0x7e;
    let sign = (value.to_bits() >> 24 & 0x80) as u8;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    // Adds just under half of the last kept bit, and that bit itself so that ties go to even; then the exponent's bias is 7.
    let rounded = magnitude + 0x7_ffff + (magnitude >> 20 & 1);
    let normal = (rounded >> 20).wrapping_sub((127 - 7) << 3).min(LARGEST);
    // Below the smallest normal number, 2^-6, codes count in steps of 2^-9: those in which f32 count from 2^14 on.
    const STEPS: f32 = 16_384.0;
    let subnormal = (f32::from_bits(magnitude) + STEPS).to_bits().wrapping_sub(STEPS.to_bits());
    let code = if magnitude < (127 - 6) << 23 { subnormal } else { normal };
    sign | code as u8
}

#[cfg(test)]
mod tests;
