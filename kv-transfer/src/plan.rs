//! Which bytes go where: source pages, landing pages and layers → contiguous copies.
//!
//! Pure. A hand-off speaks of *pieces*: some of a sequence's pages in one layer, as indices into the sequence. Each side turns
//! pieces into bytes of its own pool, and whoever sees both pools (a copy in memory) into copies between them. Blocks that
//! neighbour each other travel as one run: pools lay the pages of a layer side by side, and the page allocator prefers runs.

use kv_cache::{PageId, PageLayout};
use std::ops::Range;

/// Blocks of one layer: pages `pages` of the sequence, counted from its first page. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Layer of the model.
    pub(crate) layer: u32,
    /// Indices into the sequence's pages.
    pub(crate) pages: Range<u32>,
}

impl Piece {
    /// Returns the number of blocks, one per page.
    pub(crate) fn blocks(&self) -> u32 {
        self.pages.end - self.pages.start
    }
}

/// Returns the blocks of all `pieces`.
pub(crate) fn blocks(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.blocks())).sum()
}

/// Bytes of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Offset in the pool, in bytes.
    pub(crate) offset: usize,
    /// Length in bytes.
    pub(crate) bytes: usize,
}

/// A copy from one pool into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Offset in the source's pool, in bytes.
    pub(crate) source: usize,
    /// Offset in the target's pool, in bytes.
    pub(crate) target: usize,
    /// Length in bytes.
    pub(crate) bytes: usize,
}

/// The pages of a sequence in one pool, in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// Shape of the pool.
    pub(crate) layout: &'a PageLayout,
    /// The sequence's pages in it.
    pub(crate) pages: &'a [PageId],
}

impl Place<'_> {
    fn block(&self, layer: u32, page: u32) -> usize {
        self.layout.block_offset(layer, self.pages[page as usize])
    }
}

/// Splits the blocks of `layers` × `pages` into pieces, leaving out the first `have` pages, which the target already holds.
pub(crate) fn pieces(layers: Range<u32>, pages: Range<u32>, have: u32) -> impl Iterator<Item = Piece> {
    let pages = pages.start.max(have)..pages.end;
    let layers = if pages.is_empty() { 0..0 } else { layers };
    layers.map(move |layer| Piece { layer, pages: pages.clone() })
}

/// Cuts `pieces` into frames of at most `limit` blocks, in order.
pub(crate) fn frames(pieces: impl Iterator<Item = Piece>, limit: u32) -> Vec<Vec<Piece>> {
    let mut frames = Vec::new();
    let mut frame = Vec::new();
    let mut room = limit;
    for mut piece in pieces {
        while !piece.pages.is_empty() {
            let taken = piece.blocks().min(room);
            let middle = piece.pages.start + taken;
            frame.push(Piece { layer: piece.layer, pages: piece.pages.start..middle });
            piece.pages.start = middle;
            room -= taken;
            if room == 0 {
                frames.push(std::mem::take(&mut frame));
                room = limit;
            }
        }
    }
    if !frame.is_empty() {
        frames.push(frame);
    }
    frames
}

/// Returns the bytes of `pieces` in `place`, in the order of the pieces and with neighbours merged. Both sides of a stream get
/// the same bytes in the same order, however differently their pages lie.
///
/// # Panics
/// When a piece lies outside the sequence or the layout: pieces from a peer are checked against the landing first.
pub(crate) fn extents(place: Place<'_>, pieces: &[Piece]) -> Vec<Extent> {
    let bytes = place.layout.block_bytes();
    let mut extents: Vec<Extent> = Vec::with_capacity(pieces.len());
    for (layer, page) in blocks_of(pieces) {
        let offset = place.block(layer, page);
        match extents.last_mut() {
            Some(last) if last.offset + last.bytes == offset => last.bytes += bytes,
            _ => extents.push(Extent { offset, bytes }),
        }
    }
    extents
}

/// Returns the copies that bring `pieces` from `source` to `target`, merged where blocks neighbour on both sides.
///
/// # Panics
/// As [`extents`]; and when the blocks of the two differ in size, which `Hello` has excluded.
pub(crate) fn copies(source: Place<'_>, target: Place<'_>, pieces: &[Piece]) -> Vec<Copy> {
    let bytes = source.layout.block_bytes();
    assert_eq!(bytes, target.layout.block_bytes(), "blocks of both sides have one size");
    let mut copies: Vec<Copy> = Vec::with_capacity(pieces.len());
    for (layer, page) in blocks_of(pieces) {
        let next = Copy { source: source.block(layer, page), target: target.block(layer, page), bytes };
        match copies.last_mut() {
            Some(last) if last.source + last.bytes == next.source && last.target + last.bytes == next.target => {
                last.bytes += bytes;
            }
            _ => copies.push(next),
        }
    }
    copies
}

fn blocks_of(pieces: &[Piece]) -> impl Iterator<Item = (u32, u32)> {
    pieces.iter().flat_map(|piece| piece.pages.clone().map(|page| (piece.layer, page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_cache::KvDtype;
    use proptest::prelude::*;

    fn layout(layers: u32, pages: u32) -> PageLayout {
        PageLayout { layers, page_tokens: 2, kv_heads: 1, key_dim: 2, value_dim: 1, dtype: KvDtype::Bf16, pages }
    }

    fn ids(pages: &[u32]) -> Vec<PageId> {
        pages.iter().copied().map(PageId).collect()
    }

    #[test]
    fn neighbours_on_both_sides_merge() {
        let (ours, theirs) = (layout(2, 8), layout(2, 10));
        let (source, target) = (ids(&[1, 2, 5, 6]), ids(&[4, 5, 6, 0]));
        let pieces: Vec<Piece> = pieces(0..1, 0..4, 0).collect();
        let block = ours.block_bytes();
        let copies =
            copies(Place { layout: &ours, pages: &source }, Place { layout: &theirs, pages: &target }, &pieces);
        assert_eq!(
            copies,
            [
                Copy { source: block, target: 4 * block, bytes: 2 * block },
                Copy { source: 5 * block, target: 6 * block, bytes: block },
                Copy { source: 6 * block, target: 0, bytes: block },
            ]
        );
        let extents = extents(Place { layout: &ours, pages: &source }, &pieces);
        assert_eq!(
            extents,
            [Extent { offset: block, bytes: 2 * block }, Extent { offset: 5 * block, bytes: 2 * block }]
        );
    }

    #[test]
    fn pages_the_target_has_are_left_out() {
        assert_eq!(
            pieces(3..5, 0..4, 3).map(|piece| (piece.layer, piece.pages)).collect::<Vec<_>>(),
            [(3, 3..4), (4, 3..4)]
        );
        assert_eq!(pieces(0..5, 0..4, 4).count(), 0);
        assert_eq!(pieces(0..5, 2..2, 0).count(), 0);
    }

    #[test]
    fn frames_are_full_but_for_the_last() {
        let frames = frames(pieces(0..2, 0..5, 0), 4);
        assert_eq!(frames.iter().map(|frame| blocks(frame)).collect::<Vec<_>>(), [4, 4, 2]);
        assert_eq!(frames[1], [Piece { layer: 0, pages: 4..5 }, Piece { layer: 1, pages: 0..3 }]);
    }

    /// Two pools, a sequence in each (`source[i]` lands in `target[i]`) and how it is cut into pushes.
    #[derive(Debug)]
    struct Case {
        layouts: [PageLayout; 2],
        places: [Vec<PageId>; 2],
        have: u32,
        layer_cuts: Vec<u32>,
        page_cuts: Vec<u32>,
        frame_blocks: u32,
    }

    fn case() -> impl Strategy<Value = Case> {
        (1u32..5, 1u32..12, 0u32..4, 0u32..4).prop_flat_map(|(layers, count, spare, more)| {
            let (ours, theirs) = (count + spare, count + more);
            let order = |pages: u32| Just((0..pages).collect::<Vec<_>>()).prop_shuffle();
            (
                order(ours),
                order(theirs),
                0..=count,
                proptest::collection::vec(0..=layers, 0..4),
                proptest::collection::vec(0..=count, 0..4),
                1u32..9,
            )
                .prop_map(move |(source, target, have, mut layer_cuts, mut page_cuts, frame_blocks)| {
                    layer_cuts.extend([0, layers]);
                    page_cuts.extend([0, count]);
                    layer_cuts.sort_unstable();
                    page_cuts.sort_unstable();
                    Case {
                        layouts: [layout(layers, ours), layout(layers, theirs)],
                        places: [ids(&source[..count as usize]), ids(&target[..count as usize])],
                        have,
                        layer_cuts,
                        page_cuts,
                        frame_blocks,
                    }
                })
        })
    }

    proptest! {
        /// Every byte of the landing that should be written is written exactly once, with the right byte, and none else is.
        #[test]
        fn each_byte_is_written_once(case in case()) {
            let [ours, theirs] = &case.layouts;
            let source = Place { layout: ours, pages: &case.places[0] };
            let target = Place { layout: theirs, pages: &case.places[1] };
            let mut writes = vec![Vec::new(); theirs.pool_bytes()];
            for pages in case.page_cuts.windows(2) {
                for layers in case.layer_cuts.windows(2) {
                    let pieces = pieces(layers[0]..layers[1], pages[0]..pages[1], case.have);
                    for frame in frames(pieces, case.frame_blocks) {
                        let streamed: Vec<usize> = extents(source, &frame).into_iter().flat_map(bytes_of).collect();
                        let read: Vec<usize> = extents(target, &frame).into_iter().flat_map(bytes_of).collect();
                        let copied: Vec<(usize, usize)> = copies(source, target, &frame)
                            .into_iter()
                            .flat_map(|copy| (0..copy.bytes).map(move |at| (copy.source + at, copy.target + at)))
                            .collect();
                        prop_assert_eq!(&copied, &streamed.into_iter().zip(read).collect::<Vec<_>>());
                        copied.into_iter().for_each(|(from, to)| writes[to].push(from));
                    }
                }
            }
            let mut expected = vec![Vec::new(); theirs.pool_bytes()];
            for layer in 0..ours.layers {
                for page in case.have..case.places[0].len() as u32 {
                    for at in 0..ours.block_bytes() {
                        expected[target.block(layer, page) + at].push(source.block(layer, page) + at);
                    }
                }
            }
            prop_assert_eq!(writes, expected);
        }
    }

    fn bytes_of(extent: Extent) -> Range<usize> {
        extent.offset..extent.offset + extent.bytes
    }
}
