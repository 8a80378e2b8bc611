//! Pages on a card, and their copies in the host's memory, which are what other workers read and write.
//!
//! Transports know [`KvMemory`] alone. So pages that leave are copied there before anybody is told of them ([`Cuda::fetch_layer`], layer by layer while
//! later ones are computed; [`Home::export`](crate::home::Home::export) for those computed before), and pages that have come are copied from there before they
//! are read. What stays is not copied, and takes no memory on the host: its pages are not touched there.

use super::{
    Cuda,
    device::{Device, Region},
    kernels::{Element, Pages},
};
use crate::{Error, KvMemory, home::Span};
use kv_cache::{PageId, PageLayout};

/// Most bytes of a block: every device takes that many in a copy.
pub(super) const MOST_BLOCK_BYTES: usize = 8 << 20;

/// The pool of a device.
#[derive(Debug)]
pub(super) struct Pool {
    /// The host's layout, but with a page behind each layer's that padding writes to.
    layout: PageLayout,
    region: Region,
    /// What kernels are told of each layer.
    pub(super) layers: Vec<Pages>,
    /// By page: whether the host has what the device has.
    copied: Vec<bool>,
    /// Blocks and pages of a copy, in memory that is kept.
    blocks: Vec<Region>,
    pages: Vec<PageId>,
}

impl Pool {
    /// Reserves the pool of `layout`.
    pub(super) fn reserve(device: &mut dyn Device, layout: &PageLayout, element: Element) -> Result<Self, Error> {
        let copied = vec![false; layout.pages as usize];
        let layout = PageLayout { pages: layout.pages + 1, ..layout.clone() };
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
        Ok(Self { layout, region, layers, copied, blocks: Vec::new(), pages: Vec::new() })
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
            if span.leaves {
                self.pages.extend_from_slice(touched);
            }
        }
    }
}

impl Cuda {
    /// Copies what the step at hand wrote of layer `layer` and leaves, once the layer's mark is passed.
    pub(super) fn fetch_layer(&mut self, memory: &KvMemory, layer: usize) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before the first step");
        if pool.pages.is_empty() {
            return self.device.wait(layer);
        }
        pool.fetch(&mut *self.device, memory, layer as u32, layer)
    }

    pub(super) fn export_pages(&mut self, memory: &KvMemory, pages: &[PageId]) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before they are used");
        pool.pages.clear();
        pool.pages.extend(pages.iter().filter(|page| !pool.copied[page.index()]));
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

    pub(super) fn import_pages(&mut self, memory: &KvMemory, pages: &[PageId]) -> Result<(), Error> {
        let pool = self.pages.as_mut().expect("pages are reserved before they are used");
        for layer in 0..pool.layout.layers {
            for &page in pages {
                let from = memory.layout().block_offset(layer, page);
                // SAFETY: `block_offset` checked that the block lies in the pool, and whoever wrote the page has told us that it is done.
                let block =
                    unsafe { std::slice::from_raw_parts(memory.as_mut_ptr().add(from), memory.layout().block_bytes()) };
                self.device.upload(pool.block(layer, page), block)?;
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
        let pages = &self.pages;
        device.fetch(mark, &self.blocks, &mut |index, block| {
            let to = memory.layout().block_offset(layer, pages[index]);
            // SAFETY: `block_offset` checked that the block lies in the pool, whose blocks are as long here as there; the page is a running
            // sequence's, so nobody else writes it, and nobody reads it before it is told of.
            unsafe { memory.as_mut_ptr().add(to).copy_from_nonoverlapping(block.as_ptr(), block.len()) };
        })
    }
}
