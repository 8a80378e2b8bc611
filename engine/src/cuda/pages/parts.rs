//! Which bytes of a pool a card has, and where.

use super::super::slice::Slice;
use kv_cache::{Extent, PageId, PageLayout, Plane};

/// What a rank has of the blocks of a pool that ranks share.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// The pool's layout, but with the rank's heads alone, and with a page behind each layer's that padding writes to.
    layout: PageLayout,
    /// Whether its heads are those that leave: several ranks may have the same.
    leads: bool,
    /// Where the parts of a block stand in the pool's.
    pieces: Vec<Piece>,
}

/// Bytes that follow each other in a block of a rank and in the pool's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    here: usize,
    there: usize,
    bytes: usize,
}

impl Part {
    /// Returns what `slice` has of a pool of `all`.
    pub(super) fn new(all: &PageLayout, slice: Slice) -> Self {
        let own = slice.kv_heads(all.kv_heads as usize);
        let leads = slice.rank == 0 || Slice { rank: slice.rank - 1, ..slice }.kv_heads(all.kv_heads as usize) != own;
        let layout = PageLayout { pages: all.pages + 1, kv_heads: own.len() as u32, ..all.clone() };
        let pieces = pieces(&layout, all, slice);
        Self { layout, leads, pieces }
    }

    /// Returns the same of a pool of which another process told, if there can be such a thing.
    pub(super) fn checked(all: &PageLayout, slice: Slice) -> Option<Self> {
        let heads = all.kv_heads as usize;
        let fits =
            heads > 0 && all.pages > 0 && all.pages < u32::MAX && Slice::is_even(slice.ranks, slice.ranks, heads);
        fits.then(|| Self::new(all, slice))
    }

    /// Returns the shape of what the rank has.
    pub(super) fn layout(&self) -> &PageLayout {
        &self.layout
    }

    pub(super) fn leads(&self) -> bool {
        self.leads
    }

    /// Says whether it has bytes that `other`, which may be a part of another pool of such blocks, has as well.
    pub(super) fn meets(&self, other: &Part) -> bool {
        let overlap = |a: &Piece, b: &Piece| a.there < b.there + b.bytes && b.there < a.there + a.bytes;
        self.pieces.iter().any(|a| other.pieces.iter().any(|b| overlap(a, b)))
    }

    /// Calls `to` for each run of bytes of `extent`, which lies in the pool of `all`, that the rank has: with its offset there, its offset in what the rank has, and its
    /// length.
    ///
    /// # Panics
    /// When `extent` leaves the pool: whoever made it counts pages of it.
    pub(super) fn each(&self, all: &PageLayout, extent: Extent, mut to: impl FnMut(usize, usize, usize)) {
        let (block_bytes, end) = (all.block_bytes(), extent.offset + extent.bytes);
        let mut at = extent.offset;
        while at < end {
            let (block, inner) = (at / block_bytes, at % block_bytes);
            let bytes = (block_bytes - inner).min(end - at);
            let (layer, page) = (block / all.pages as usize, block % all.pages as usize);
            let own = self.layout.block_offset(layer as u32, PageId(page as u32));
            for Piece { here, there, bytes: length } in self.pieces.iter().copied() {
                let (start, stop) = (there.max(inner), (there + length).min(inner + bytes));
                if start < stop {
                    to(at - inner + start, own + here + (start - there), stop - start);
                }
            }
            at += bytes;
        }
    }
}

/// Returns where the planes of `own`, which has the heads of `slice`, stand in blocks of `all`.
fn pieces(own: &PageLayout, all: &PageLayout, slice: Slice) -> Vec<Piece> {
    let page_tokens = own.page_tokens as usize;
    let planes = |here: Plane, there: Plane, dim: u32| {
        // A latent has no values beside it, and these no scales.
        let scale = if dim == 0 { 0 } else { own.dtype.scale_bytes() };
        let [element, scale] = [dim as usize * own.dtype.bytes(), scale].map(|bytes| bytes * page_tokens);
        let piece = move |here: usize, there: usize, head_bytes: usize| Piece {
            here,
            there: there + slice.kv_heads(all.kv_heads as usize).start * head_bytes,
            bytes: own.kv_heads as usize * head_bytes,
        };
        [piece(here.elements, there.elements, element), piece(here.scales, there.scales, scale)]
    };
    let (keys, values) =
        (planes(own.keys(), all.keys(), own.key_dim), planes(own.values(), all.values(), own.value_dim));
    let mut pieces: Vec<Piece> = Vec::new();
    let mut sorted: Vec<Piece> = keys.into_iter().chain(values).filter(|piece| piece.bytes > 0).collect();
    sorted.sort_by_key(|piece| piece.here);
    for piece in sorted {
        match pieces.last_mut() {
            Some(last) if (last.here + last.bytes, last.there + last.bytes) == (piece.here, piece.there) => {
                last.bytes += piece.bytes;
            }
            _ => pieces.push(piece),
        }
    }
    pieces
}
