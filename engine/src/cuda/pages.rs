//! Pages on a card, and their copies in the host's memory, which are what other workers read and write.
//!
//! Transports know [`KvMemory`] alone. So pages that leave are copied there before anybody is told of them ([`Rank::fetch_layer`], layer by layer while
//! later ones are computed; [`Home::export`](crate::home::Home::export) for those computed before), and pages that have come are copied from there before they
//! are read. What stays is not copied, and takes no memory on the host: its pages are not touched there.

use super::{
    device::{Device, Region},
    kernels::{Element, Pages},
    rank::Rank,
    slice::Slice,
};
use crate::{Error, KvMemory, home::Span};
use kv_cache::{PageId, PageLayout, Plane};

/// Most bytes of a block: every device takes that many in a copy.
pub(super) const MOST_BLOCK_BYTES: usize = 8 << 20;

/// The pool of a device: of every page the keys and values of a rank's heads.
#[derive(Debug)]
pub(super) struct Pool {
    /// The host's layout, but with the rank's heads alone, and with a page behind each layer's that padding writes to.
    layout: PageLayout,
    /// Whether its heads are those that leave: several ranks may have the same.
    leads: bool,
    /// Where the parts of a block stand in the host's.
    pieces: Vec<Piece>,
    region: Region,
    /// What kernels are told of each layer.
    pub(super) layers: Vec<Pages>,
    /// By page: whether the host has what the device has.
    copied: Vec<bool>,
    /// Blocks and pages of a copy, in memory that is kept.
    blocks: Vec<Region>,
    pages: Vec<PageId>,
}

/// Bytes that follow each other in a block of a rank and in the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    here: usize,
    there: usize,
    bytes: usize,
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

impl Pool {
    /// Reserves the part of the pool of `all` that `slice` has.
    pub(super) fn reserve(
        device: &mut dyn Device,
        all: &PageLayout,
        slice: Slice,
        element: Element,
    ) -> Result<Self, Error> {
        let copied = vec![false; all.pages as usize];
        let own = slice.kv_heads(all.kv_heads as usize);
        let leads = slice.rank == 0 || Slice { rank: slice.rank - 1, ..slice }.kv_heads(all.kv_heads as usize) != own;
        let layout = PageLayout { pages: all.pages + 1, kv_heads: own.len() as u32, ..all.clone() };
        if layout.block_bytes() > MOST_BLOCK_BYTES {
            let problem = format!(
                "{} tokens make blocks of {} bytes, and copies to the host take {MOST_BLOCK_BYTES} at a time",
                layout.page_tokens,
                layout.block_bytes()
            );
            return Err(Error::setting("page_tokens", problem));
        }
        let region = device.alloc("pages", layout.pool_bytes())?;
        let layers = (0..layout.layers as usize).map(|layer| Pages::new(&layout, element, region.address, layer));
        let layers = layers.collect::<Result<_, _>>().map_err(|problem| Error::setting("device", problem))?;
        let pieces = pieces(&layout, all, slice);
        Ok(Self { layout, leads, pieces, region, layers, copied, blocks: Vec::new(), pages: Vec::new() })
    }

    fn block(&self, layer: u32, page: PageId) -> Region {
        self.region.part(self.layout.block_offset(layer, page), self.layout.block_bytes())
    }

    /// Notes which pages a step writes, and lists those whose rows leave.
    pub(super) fn begin(&mut self, spans: &[Span<'_>]) {
        let page_tokens = self.layout.page_tokens as usize;
        self.pages.clear();
        for span in spans {
            let touched = &span.pages[span.start / page_tokens..(span.start + span.tokens).div_ceil(page_tokens)];
            touched.iter().for_each(|page| self.copied[page.index()] = span.leaves);
            if span.leaves && self.leads {
                self.pages.extend_from_slice(touched);
            }
        }
    }
}

impl Rank {
    /// Copies what the step at hand wrote of layer `layer` and leaves, once the layer's mark is passed.
    pub(super) fn fetch_layer(&mut self, memory: &KvMemory, layer: usize) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before the first step");
        if pool.pages.is_empty() {
            return self.device.wait(layer);
        }
        pool.fetch(&mut *self.device, memory, layer as u32, layer)
    }

    pub(super) fn export(&mut self, memory: &KvMemory, pages: &[PageId]) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before they are used");
        pool.pages.clear();
        pool.pages.extend(pages.iter().filter(|page| pool.leads && !pool.copied[page.index()]));
        if pool.pages.is_empty() {
            return Ok(());
        }
        self.device.mark(0)?;
        for layer in 0..pool.layout.layers {
            pool.fetch(&mut *self.device, memory, layer, 0)?;
        }
        pool.pages.iter().for_each(|page| pool.copied[page.index()] = true);
        Ok(())
    }

    pub(super) fn import(&mut self, memory: &KvMemory, pages: &[PageId]) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before they are used");
        for layer in 0..pool.layout.layers {
            for &page in pages {
                let from = memory.layout().block_offset(layer, page);
                for Piece { here, there, bytes } in pool.pieces.iter().copied() {
                    // SAFETY: `block_offset` checked that the block lies in the pool, the piece lies in it, and whoever wrote the page has told
                    // us that it is done.
                    let piece = unsafe { std::slice::from_raw_parts(memory.as_mut_ptr().add(from + there), bytes) };
                    self.device.upload(pool.block(layer, page).part(here, bytes), piece)?;
                }
            }
        }
        pages.iter().for_each(|page| pool.copied[page.index()] = true);
        Ok(())
    }
}

impl Pool {
    /// Copies layer `layer` of the listed pages to the host, once `mark` is passed.
    fn fetch(&mut self, device: &mut dyn Device, memory: &KvMemory, layer: u32, mark: usize) -> Result<(), Error> {
        self.blocks.clear();
        for index in 0..self.pages.len() {
            self.blocks.push(self.block(layer, self.pages[index]));
        }
        let (pages, pieces) = (&self.pages, &self.pieces);
        device.fetch(mark, &self.blocks, &mut |index, block| {
            let to = memory.layout().block_offset(layer, pages[index]);
            for Piece { here, there, bytes } in pieces.iter().copied() {
                let piece = &block[here..here + bytes];
                // SAFETY: `block_offset` checked that the block lies in the pool, and the piece lies in it; the page is a running sequence's, so
                // nobody else writes it but other ranks theirs, and nobody reads it before it is told of.
                unsafe { memory.as_mut_ptr().add(to + there).copy_from_nonoverlapping(piece.as_ptr(), bytes) };
            }
        })
    }
}
