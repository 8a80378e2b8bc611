//! Keys and values in their pages: where a token's lie, how they are written and how they are read back.
//!
//! f32, bf16 and f16 elements are rounded once and stand for themselves. fp8 and int8 elements are multiples of a scale that
//! each token has for each head, for its key and for its value ([`kv_cache::PageLayout`] says where). The scale is the smallest
//! bf16 that brings the head's largest magnitude within the elements' range, so nothing saturates and what a token's bytes are
//! depends on that token alone. bf16 is enough: rounding it up costs less than one part in 128 of the range. Elements are exact
//! as bf16, and attention multiplies scores and probabilities by their scales.
//!
//! A head with an element that is not finite has NaN for its scale: all of it is NaN.

use super::{format::Format, simd::Simd};
use crate::KvMemory;
use kv_cache::{ByteCode, KvDtype, PageId, PageLayout, Plane};
use std::ops::Range;

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
    Scaled(ByteCode),
}

impl From<KvDtype> for Storage {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Storage::Plain(Format::F32),
            KvDtype::Bf16 => Storage::Plain(Format::Bf16),
            KvDtype::F16 => Storage::Plain(Format::F16),
            KvDtype::Fp8 => Storage::Scaled(ByteCode::E4m3),
            KvDtype::Int8 => Storage::Scaled(ByteCode::Int8),
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

    /// Reads `LANES` elements at `index`, without their scale.
    ///
    /// # Safety
    /// They can be read.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, from: *const u8, index: usize) -> S::F {
        // SAFETY: passed on.
        unsafe {
            match self {
                Storage::Plain(format) => format.load(simd, from, index),
                Storage::Scaled(ByteCode::E4m3) => simd.load_e4m3(from.add(index)),
                Storage::Scaled(ByteCode::Int8) => simd.load_i8(from.add(index).cast()),
            }
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

    /// Says whether elements are bf16 or something that bf16 holds exactly.
    #[inline(always)]
    pub(crate) fn fits_bf16(&self) -> bool {
        matches!(self.storage, Storage::Plain(Format::Bf16) | Storage::Scaled(_))
    }

    /// Says whether elements are multiples of a scale.
    #[inline(always)]
    pub(crate) fn has_scales(&self) -> bool {
        matches!(self.storage, Storage::Scaled(_))
    }

    /// Returns what the elements of a token for `head` are multiples of.
    ///
    /// # Safety
    /// The slot and the head lie in the pool, and nobody writes there.
    #[inline(always)]
    pub(crate) unsafe fn scale(&self, slot: Slot, head: usize) -> f32 {
        match self.storage {
            Storage::Plain(_) => 1.0,
            // SAFETY: passed on; the layout has a scale for every token and head.
            Storage::Scaled(_) => scale_from(u16::from_le_bytes(unsafe { self.at(slot, head).1.read() })),
        }
    }

    /// Returns the first element of a token for `head` where the page holds `format`. The page's next tokens follow it.
    #[inline(always)]
    pub(crate) fn stored_as(&self, slot: Slot, head: usize, format: Format) -> Option<*const u8> {
        matches!(self.storage, Storage::Plain(stored) if stored == format).then(|| self.at(slot, head).0.cast_const())
    }

    /// Returns where `tokens` tokens of a page lie for `heads`, and the cache lines from the first head's to the last's.
    #[inline(always)]
    pub(crate) fn lines(&self, slot: Slot, heads: &Range<usize>, tokens: usize) -> (*const u8, usize) {
        let tokens = (heads.len() - 1) * self.page_tokens + tokens;
        (self.at(slot, heads.start).0, (tokens * self.dim * self.storage.bytes()).div_ceil(64))
    }

    /// Reads what a token has for `head` as `format`, f32 or one that holds it exactly, without its scale: `to[dim]`.
    ///
    /// # Safety
    /// The slot and the head lie in the pool, nobody writes there, and `dim` elements of `format` can be written at `to`.
    #[inline(always)]
    pub(crate) unsafe fn read<S: Simd>(&self, simd: S, slot: Slot, head: usize, format: Format, to: *mut u8) {
        let from = self.at(slot, head).0.cast_const();
        let whole = self.dim - self.dim % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: both hold LANES elements from `at` on.
            unsafe { format.store(simd, to, at, self.storage.load(simd, from, at)) };
        }
        let rest = self.dim - whole;
        if rest > 0 {
            let (mut stored, mut read) = ([0.0f32; 16], [0.0f32; 16]);
            // SAFETY: both arrays hold a whole vector of any format; `rest` elements are the caller's word.
            unsafe {
                let bytes = self.storage.bytes();
                std::ptr::copy_nonoverlapping(from.add(whole * bytes), stored.as_mut_ptr().cast(), rest * bytes);
                let vector = self.storage.load(simd, stored.as_ptr().cast(), 0);
                format.store(simd, read.as_mut_ptr().cast(), 0, vector);
                let bytes = format.bytes();
                std::ptr::copy_nonoverlapping(read.as_ptr().cast(), to.add(whole * bytes), rest * bytes);
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

#[cfg(test)]
impl Side {
    /// Returns what a token has for `head`, its scale included.
    ///
    /// # Safety
    /// As for [`Side::read`].
    pub(crate) unsafe fn values<S: Simd>(&self, simd: S, slot: Slot, head: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; self.dim];
        // SAFETY: passed on.
        unsafe {
            self.read(simd, slot, head, Format::F32, values.as_mut_ptr().cast());
            let scale = self.scale(slot, head);
            values.iter().map(|value| value * scale).collect()
        }
    }
}

#[cfg(test)]
mod tests;
