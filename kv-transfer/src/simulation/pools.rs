//! The bytes at both ends of a simulation: real pools, mapped as over shared memory. Whatever does not belong to a hand-off is
//! poisoned, so that a read too early and a write too late both show in bytes.

use crate::{
    HandoffId,
    landing::Landing,
    pages::Pages,
    plan::{self, Piece, Place, Terms},
    source::Frame,
    testing,
};
use kv_cache::{Extent, PageId, PageLayout};
use std::{fs::File, sync::Arc};

/// What pages hold that are nobody's.
const POISON: u8 = 0xEE;

/// Which pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Target,
}

/// See the module. Blocks are large enough to be written past the cache, as those of a model are.
pub(super) struct Pools {
    terms: Arc<Terms>,
    source: Pages,
    target: Arc<Pages>,
    /// The source's own map of the target's pool.
    remote: Pages,
}

/// Returns the shape of a pool.
pub(super) fn layout(layers: u32, pages: u32) -> PageLayout {
    PageLayout { key_dim: 32, value_dim: 32, ..testing::layout(layers, pages) }
}

impl Pools {
    /// Maps two pools, all poison.
    pub(super) fn new(source: &PageLayout, target: &PageLayout) -> Self {
        let file = |layout: &PageLayout| {
            let file = pool(layout);
            testing::fill(&file, &vec![POISON; layout.pool_bytes()]);
            file
        };
        let (ours, theirs) = (file(source), file(target));
        Self {
            terms: Terms::same(source, target),
            source: Pages::map(&ours, source.clone()).expect("map"),
            target: Arc::new(Pages::map(&theirs, target.clone()).expect("map")),
            remote: Pages::map_foreign(&theirs, target.clone()).expect("map"),
        }
    }

    pub(super) fn terms(&self) -> &Arc<Terms> {
        &self.terms
    }

    /// Returns the target's pool as the target maps it.
    pub(super) fn target(&self) -> &Arc<Pages> {
        &self.target
    }

    /// Fills a block with what page number `at` of `handoff` holds in `layer`.
    pub(super) fn compute(&mut self, end: End, page: PageId, (handoff, layer, at): (HandoffId, u32, u32)) {
        let block = self.block_mut(end, layer, page);
        let word = contents(handoff, layer, at).to_le_bytes();
        block.iter_mut().zip(word.iter().cycle()).for_each(|(byte, right)| *byte = *right);
    }

    /// Says whether a block of the target is what [`Pools::compute`] would make it.
    pub(super) fn is_right(&self, page: PageId, (handoff, layer, at): (HandoffId, u32, u32)) -> bool {
        let word = contents(handoff, layer, at).to_le_bytes();
        self.block(End::Target, layer, page).chunks(word.len()).all(|bytes| bytes == word)
    }

    /// Makes `pages` nobody's.
    pub(super) fn poison(&mut self, end: End, pages: &[PageId]) {
        for page in pages {
            (0..self.terms.target.pool.layers).for_each(|layer| self.block_mut(end, layer, *page).fill(POISON));
        }
    }

    /// Says whether a page of the target is nobody's, and nobody wrote to it since.
    pub(super) fn is_poison(&self, page: PageId) -> bool {
        let layers = 0..self.terms.target.pool.layers;
        layers.flat_map(|layer| self.block(End::Target, layer, page)).all(|byte| *byte == POISON)
    }

    /// Writes one block of `frame` as its transport does: into `landing`, or from outside. One byte of it wrong if `corrupt`.
    pub(super) fn write(&mut self, frame: &Frame, (layer, at): (u32, u32), landing: Option<&Landing>, corrupt: bool) {
        let piece = Piece { layer, pages: at..at + 1 };
        let source = Place { view: &self.terms.source, pages: &frame.pages };
        let target = Place { view: &self.terms.target, pages: &frame.landing };
        let copies = plan::copies(source, target, &[piece]);
        let pool = landing.map_or(&self.remote, Landing::pool);
        // SAFETY: one thread, and no slice of a pool outlives its call.
        unsafe { pool.copy_from(&self.source, &copies) };
        if corrupt {
            // SAFETY: as above.
            let block = unsafe { pool.bytes_mut(copies[0].to()) };
            block[0] ^= 1;
        }
    }

    /// Views a block.
    pub(super) fn block(&self, end: End, layer: u32, page: PageId) -> &[u8] {
        let (pool, extent) = self.extent(end, layer, page);
        // SAFETY: one thread, and what writes takes `self` exclusively.
        unsafe { pool.bytes(extent) }
    }

    fn block_mut(&mut self, end: End, layer: u32, page: PageId) -> &mut [u8] {
        let (pool, extent) = self.extent(end, layer, page);
        // SAFETY: as above.
        unsafe { pool.bytes_mut(extent) }
    }

    fn extent(&self, end: End, layer: u32, page: PageId) -> (&Pages, Extent) {
        let pool = if end == End::Source { &self.source } else { &*self.target };
        let layout = pool.layout();
        (pool, Extent { offset: layout.block_offset(layer, page), bytes: layout.block_bytes() })
    }
}

fn contents(handoff: HandoffId, layer: u32, at: u32) -> u64 {
    handoff.0 << 32 | u64::from(layer) << 16 | u64::from(at)
}

#[cfg(target_os = "linux")]
fn pool(layout: &PageLayout) -> File {
    testing::sealed_pool(layout)
}

#[cfg(not(target_os = "linux"))]
fn pool(layout: &PageLayout) -> File {
    testing::pool(layout)
}
