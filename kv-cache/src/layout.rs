//! Where a page's bytes lie.
//!
//! The pool is one array `[layers][pages]` of *blocks*. A block holds one page of one layer: the keys
//! `[kv_heads][page_tokens][key_dim]`, then the values `[kv_heads][page_tokens][value_dim]`. Heads are outermost so that a
//! tensor-parallel slice of keys or values is contiguous; layers are outermost so that neighbouring pages of a layer travel as
//! one run of bytes while later layers still compute.
//!
//! Elements of one byte are multiples of a *scale*, one for each token and head, apart for keys and values. Scales stand behind
//! the elements: `[kv_heads][page_tokens]` bf16 of the keys, then of the values. They are part of the block, so whatever moves
//! blocks moves them. A scale for a whole page would have to grow when a larger token arrives, and the bits of the tokens
//! before it would depend on what followed them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Element type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit brain float.
    Bf16,
    /// 16-bit IEEE float.
    F16,
    /// 8-bit float of 4 exponent and 3 mantissa bits without infinities (e4m3, arXiv 2209.05433), times a scale.
    Fp8,
    /// Integers -127 ..= 127, times a scale.
    Int8,
}

impl KvDtype {
    /// All of them.
    pub const ALL: [KvDtype; 5] = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8, KvDtype::Int8];

    /// Returns the size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 | KvDtype::F16 => 2,
            KvDtype::Fp8 | KvDtype::Int8 => 1,
        }
    }

    /// Returns the size in bytes of the scale that a token's head has; 0 where elements are what they mean.
    pub fn scale_bytes(self) -> usize {
        match self {
            KvDtype::F32 | KvDtype::Bf16 | KvDtype::F16 => 0,
            KvDtype::Fp8 | KvDtype::Int8 => 2,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::F16 => "f16",
            KvDtype::Fp8 => "fp8",
            KvDtype::Int8 => "int8",
        })
    }
}

/// Shape of every page of a worker and so of its whole pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageLayout {
    /// Layers of the model on this rank.
    pub layers: u32,
    /// Tokens per page.
    pub page_tokens: u32,
    /// Key/value heads on this rank.
    pub kv_heads: u32,
    /// Elements of one head's key.
    pub key_dim: u32,
    /// Elements of one head's value; 0 where values are computed from keys.
    pub value_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
    /// Pages in the pool.
    pub pages: u32,
}

impl PageLayout {
    /// Returns where the keys of a block lie.
    pub fn keys(&self) -> Plane {
        let elements = self.heads() * self.key_dim as usize * self.dtype.bytes();
        Plane { elements: 0, scales: elements + self.heads() * self.value_dim as usize * self.dtype.bytes() }
    }

    /// Returns where the values of a block lie.
    pub fn values(&self) -> Plane {
        let keys = self.keys();
        Plane {
            elements: self.heads() * self.key_dim as usize * self.dtype.bytes(),
            scales: keys.scales + self.scale_bytes(self.key_dim),
        }
    }

    /// Returns the bytes of one block: one page of one layer, keys and values with their scales.
    pub fn block_bytes(&self) -> usize {
        self.values().scales + self.scale_bytes(self.value_dim)
    }

    /// Returns the heads of all tokens of a page.
    fn heads(&self) -> usize {
        self.kv_heads as usize * self.page_tokens as usize
    }

    /// Returns the bytes of the scales of keys or values of `dim` elements in one block.
    fn scale_bytes(&self, dim: u32) -> usize {
        if dim == 0 { 0 } else { self.heads() * self.dtype.scale_bytes() }
    }

    /// Returns the bytes of one page over all layers.
    pub fn page_bytes(&self) -> usize {
        self.block_bytes() * self.layers as usize
    }

    /// Returns the bytes of the whole pool.
    pub fn pool_bytes(&self) -> usize {
        self.page_bytes() * self.pages as usize
    }

    /// Returns the byte offset in the pool of the block of `page` in `layer`.
    ///
    /// # Panics
    /// When `layer` or `page` lies outside the pool: that is a bookkeeping mistake of ours, never input.
    pub fn block_offset(&self, layer: u32, page: crate::PageId) -> usize {
        assert!(layer < self.layers && page.0 < self.pages, "block ({layer}, {page:?}) outside {self:?}");
        (layer as usize * self.pages as usize + page.index()) * self.block_bytes()
    }

    /// Returns how many pages hold `tokens` tokens.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens as usize)
    }
}

/// Where the keys or the values of a block lie, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// `[kv_heads][page_tokens][key_dim or value_dim]` elements.
    pub elements: usize,
    /// `[kv_heads][page_tokens]` scales; of no length where the dtype has none.
    pub scales: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageId;

    fn layout() -> PageLayout {
        PageLayout { layers: 3, page_tokens: 16, kv_heads: 2, key_dim: 8, value_dim: 4, dtype: KvDtype::Bf16, pages: 5 }
    }

    #[test]
    fn blocks_tile_the_pool() {
        let layout = layout();
        assert_eq!(layout.values().elements, 2 * 16 * 8 * 2);
        assert_eq!(layout.block_bytes(), 2 * 16 * 12 * 2);
        let mut next = 0;
        for layer in 0..layout.layers {
            for page in 0..layout.pages {
                assert_eq!(layout.block_offset(layer, PageId(page)), next);
                next += layout.block_bytes();
            }
        }
        assert_eq!(next, layout.pool_bytes());
    }

    #[test]
    fn scales_stand_behind_the_elements() {
        let eight = PageLayout { dtype: KvDtype::Int8, ..layout() };
        assert_eq!(eight.keys(), Plane { elements: 0, scales: 32 * 12 });
        assert_eq!(eight.values(), Plane { elements: 32 * 8, scales: 32 * 12 + 32 * 2 });
        assert_eq!(eight.block_bytes(), 32 * 12 + 2 * 32 * 2);
    }

    #[test]
    fn keys_alone_are_a_layout() {
        for dtype in KvDtype::ALL {
            let keys = PageLayout { value_dim: 0, dtype, ..layout() };
            assert_eq!(keys.block_bytes(), 32 * (8 * dtype.bytes() + dtype.scale_bytes()));
            assert_eq!(keys.values(), Plane { elements: 32 * 8 * dtype.bytes(), scales: keys.block_bytes() });
        }
    }

    #[test]
    fn dtypes_are_read_as_they_are_shown() {
        use serde::de::{IntoDeserializer, value::Error};
        for dtype in KvDtype::ALL {
            let name = dtype.to_string();
            let read: Result<KvDtype, Error> = KvDtype::deserialize(name.as_str().into_deserializer());
            assert_eq!(read, Ok(dtype));
        }
    }
}
