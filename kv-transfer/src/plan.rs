//! Which bytes go where: source pages, landing pages and layers → contiguous copies.
//!
//! Pure. Two pools may differ in the tokens of a page, in the heads they hold (each rank of a tensor-parallel worker holds a
//! range of them), in the element type and in size. What travels between them are blocks of a shape that both can be cut into,
//! a *travel page*: the longest run of tokens that divides the pages of both, the heads that both hold, the target's element
//! type. [`Terms`] are agreed on in the handshake; a [`View`] says where travel pages lie in the pages of one side. Where the
//! two layouts are the same a travel page is a page, and all of this is an offset.
//!
//! A hand-off speaks of *pieces*: some travel pages of a sequence in one layer. Each side turns pieces into bytes of its own
//! pool, and whoever sees both pools (a copy in memory) into copies between them. Blocks that neighbour each other travel as
//! one run: pools lay the pages of a layer side by side, and the page allocator prefers runs.

use crate::{Identity, Rank};
use kv_cache::{Extent, KvDtype, PageId, PageLayout, PoolCopy};
use std::{fmt, ops::Range};

/// Blocks of one layer: travel pages `pages` of the sequence, counted from its first. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Layer of the model.
    pub(crate) layer: u32,
    /// Indices into the sequence's travel pages.
    pub(crate) pages: Range<u32>,
}

impl Piece {
    /// Returns the number of blocks, one per travel page.
    pub(crate) fn blocks(&self) -> u32 {
        self.pages.end - self.pages.start
    }
}

/// Returns the blocks of all `pieces`.
pub(crate) fn blocks(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.blocks())).sum()
}

/// What two workers agree on: how the pages of one become pages of the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Travel pages in the source's pool.
    pub(crate) source: View,
    /// Travel pages in the target's pool, which is also how they look on the way.
    pub(crate) target: View,
    /// Which rank of the source this is.
    pub(crate) source_rank: Rank,
    /// Which rank of the target.
    pub(crate) target_rank: Rank,
    /// Heads of the model.
    kv_heads: u32,
}

impl Terms {
    /// Finds what `source` can send to `target`, or says which values do not fit, worded for the source. `lossy`: the target takes
    /// elements that are rounded on the way.
    pub(crate) fn agree(source: &Identity, target: &Identity, lossy: bool) -> Result<Self, String> {
        let (yours, ours) = (&source.layout, &target.layout);
        let fields = [
            ("layers", yours.layers, ours.layers),
            ("key_dim", yours.key_dim, ours.key_dim),
            ("value_dim", yours.value_dim, ours.value_dim),
        ];
        for (name, yours, ours) in fields {
            if yours != ours {
                return Err(format!("{name}: yours {yours}, ours {ours}"));
            }
        }
        let (your_heads, all_yours) = heads(source).map_err(|problem| format!("yours: {problem}"))?;
        let (our_heads, all_ours) = heads(target).map_err(|problem| format!("ours: {problem}"))?;
        if all_yours != all_ours {
            return Err(format!("kv_heads: yours {all_yours}, ours {all_ours}"));
        }
        let shared = your_heads.start.max(our_heads.start)..your_heads.end.min(our_heads.end);
        if !source.rank.sends_to(&target.rank, all_yours) {
            return Err(format!("rank: yours ({}) has nothing for ours ({})", source.rank, target.rank));
        }
        if yours.dtype != ours.dtype && !is_exact(yours.dtype, ours.dtype) && !lossy {
            return Err(format!("dtype: yours {}, ours {}, and lossy_kv is off", yours.dtype, ours.dtype));
        }
        let page_tokens = greatest_common_divisor(yours.page_tokens, ours.page_tokens);
        let view = |pool: &PageLayout, heads: &Range<u32>| View {
            travel: PageLayout { page_tokens, kv_heads: shared.end - shared.start, pages: 0, ..pool.clone() },
            pool: pool.clone(),
            first_head: shared.start - heads.start,
        };
        let (source_rank, target_rank) = (source.rank, target.rank);
        let (source, target) = (view(yours, &your_heads), view(ours, &our_heads));
        Ok(Self { source, target, source_rank, target_rank, kv_heads: all_yours })
    }

    /// The terms of two pools whose pages are the same.
    #[cfg(test)]
    pub(crate) fn same(source: &PageLayout, target: &PageLayout) -> std::sync::Arc<Self> {
        let identity = |layout: &PageLayout| Identity { layout: layout.clone(), ..crate::testing::identity("w", 1) };
        std::sync::Arc::new(Self::agree(&identity(source), &identity(target), false).expect("same pages"))
    }

    /// Says whether either side is one of several ranks.
    pub(crate) fn has_ranks(&self) -> bool {
        self.source_rank.of > 1 || self.target_rank.of > 1
    }

    /// Returns the ranks of the source that send something to this rank of the target.
    pub(crate) fn senders(&self) -> impl Iterator<Item = Rank> {
        let ranks = (0..self.source_rank.of).map(|index| Rank { index, ..self.source_rank });
        ranks.filter(|rank| rank.sends_to(&self.target_rank, self.kv_heads))
    }

    /// Says whether elements are converted on the way.
    pub(crate) fn converts(&self) -> bool {
        self.source.pool.dtype != self.target.pool.dtype
    }

    /// Returns the bytes of one travel page of one layer on the way.
    pub(crate) fn block_bytes(&self) -> usize {
        self.target.travel.block_bytes()
    }

    /// Returns the travel pages that hold `tokens` tokens.
    pub(crate) fn travel_pages(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.target.travel.page_tokens)
    }
}

/// Says whether every value of `from` is one of `to`. Multiples of a scale of eight bits fit an f32, and nothing shorter.
fn is_exact(from: KvDtype, to: KvDtype) -> bool {
    from == to || to == KvDtype::F32
}

/// Returns the heads that a worker holds, of how many, or says why there are none. A peer's word is checked here: whatever is
/// computed from a layout later stays small.
fn heads(worker: &Identity) -> Result<(Range<u32>, u32), String> {
    const MOST: u32 = 1 << 16;
    let (layout, rank) = (&worker.layout, &worker.rank);
    for (name, value) in [("page_tokens", layout.page_tokens), ("kv_heads", layout.kv_heads), ("rank.of", rank.of)] {
        if !(1..=MOST).contains(&value) {
            return Err(format!("{name} {value} is not in 1 ..= {MOST}"));
        }
    }
    if rank.index >= rank.of || rank.replicas == 0 || !rank.of.is_multiple_of(rank.replicas) {
        return Err(format!("rank {rank} is none"));
    }
    let block = u128::from(layout.kv_heads)
        * u128::from(layout.page_tokens)
        * (u128::from(layout.key_dim) + u128::from(layout.value_dim) + 4)
        * 4;
    if block * u128::from(layout.layers) * u128::from(layout.pages) > 1 << 50 {
        return Err(format!("a pool of {} pages is larger than any memory", layout.pages));
    }
    let all = u64::from(layout.kv_heads) * u64::from(rank.of / rank.replicas);
    let all = u32::try_from(all).ok().filter(|all| *all <= MOST).ok_or(format!("{all} heads are more than {MOST}"))?;
    let first = rank.index / rank.replicas * layout.kv_heads;
    Ok((first..first + layout.kv_heads, all))
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// How travel pages lie in the pages of one pool.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct View {
    /// Shape of the pool.
    pub(crate) pool: PageLayout,
    /// Shape of a travel page, in this pool's element type.
    pub(crate) travel: PageLayout,
    /// The first head that travels, among those of the pool.
    first_head: u32,
}

impl View {
    /// Returns the travel pages that lie in `pages` of the pool's pages, both counted from the start of the sequence.
    pub(crate) fn travel_of(&self, pages: Range<u32>) -> Range<u32> {
        let each = self.per_page();
        pages.start.saturating_mul(each)..pages.end.saturating_mul(each)
    }

    /// Returns the page that travel page `page` lies in.
    pub(crate) fn page_of(&self, page: u32) -> u32 {
        page / self.per_page()
    }

    fn per_page(&self) -> u32 {
        self.pool.page_tokens / self.travel.page_tokens
    }

    /// Names the bytes of one block in the order in which they travel: that of a block, keys, values and their scales.
    fn strips(&self, pages: &[PageId], layer: u32, page: u32, mut strip: impl FnMut(usize, usize)) {
        let (pool, travel, each) = (&self.pool, &self.travel, self.per_page());
        let block = pool.block_offset(layer, pages[(page / each) as usize]);
        if each == 1 && travel.kv_heads == pool.kv_heads {
            return strip(block, pool.block_bytes());
        }
        let (keys, values) = (pool.keys(), pool.values());
        let (element, scale) = (pool.dtype.bytes(), pool.dtype.scale_bytes());
        let scale_of = |dim: u32| if dim == 0 { 0 } else { scale };
        // Of a token's head, in bytes.
        let planes = [
            (keys.elements, pool.key_dim as usize * element),
            (values.elements, pool.value_dim as usize * element),
            (keys.scales, scale_of(pool.key_dim)),
            (values.scales, scale_of(pool.value_dim)),
        ];
        let tokens = travel.page_tokens as usize;
        let first_token = (page % each) as usize * tokens;
        for (plane, bytes) in planes.into_iter().filter(|(_, bytes)| *bytes > 0) {
            let at = |head: u32| block + plane + (head as usize * pool.page_tokens as usize + first_token) * bytes;
            if each == 1 {
                strip(at(self.first_head), travel.kv_heads as usize * tokens * bytes);
            } else {
                (0..travel.kv_heads).for_each(|head| strip(at(self.first_head + head), tokens * bytes));
            }
        }
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let View { pool, travel, first_head } = self;
        write!(f, "{} x {} of {} x {}", travel.page_tokens, travel.kv_heads, pool.page_tokens, pool.kv_heads)?;
        write!(f, ", from head {first_head}, {}", pool.dtype)
    }
}

/// The pages of a sequence in one pool, in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// How travel pages lie in it.
    pub(crate) view: &'a View,
    /// The sequence's pages in it.
    pub(crate) pages: &'a [PageId],
}

/// Splits the blocks of `layers` × travel pages `pages` into pieces, leaving out the first `have`, which the target already holds.
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
/// the same bytes in the same order, however differently their pages lie, unless elements are converted in between.
///
/// # Panics
/// When a piece lies outside the sequence or the layout: pieces from a peer are checked against the landing first.
pub(crate) fn extents(place: Place<'_>, pieces: &[Piece]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(pieces.len());
    for (layer, page) in blocks_of(pieces) {
        place.view.strips(place.pages, layer, page, |offset, bytes| match extents.last_mut() {
            Some(last) if last.offset + last.bytes == offset => last.bytes += bytes,
            _ => extents.push(Extent { offset, bytes }),
        });
    }
    extents
}

/// Returns the copies that bring `pieces` from `source` to `target`, merged where they neighbour on both sides.
///
/// # Panics
/// As [`extents`]; and when elements are to be converted, which no copy does.
pub(crate) fn copies(source: Place<'_>, target: Place<'_>, pieces: &[Piece]) -> Vec<PoolCopy> {
    assert_eq!(source.view.pool.dtype, target.view.pool.dtype, "copies do not convert");
    let (from, mut to) = (extents(source, pieces), extents(target, pieces).into_iter());
    let mut copies = Vec::with_capacity(from.len());
    let mut room = Extent { offset: 0, bytes: 0 };
    for mut extent in from {
        while extent.bytes > 0 {
            if room.bytes == 0 {
                room = to.next().expect("both sides have the same bytes");
            }
            let bytes = extent.bytes.min(room.bytes);
            copies.push(PoolCopy { source: extent.offset, target: room.offset, bytes });
            extent = Extent { offset: extent.offset + bytes, bytes: extent.bytes - bytes };
            room = Extent { offset: room.offset + bytes, bytes: room.bytes - bytes };
        }
    }
    copies
}

/// Cuts `pieces` so that each part has at most `bytes` bytes on the way, or one block.
pub(crate) fn parts(terms: &Terms, pieces: &[Piece], bytes: usize) -> Vec<Vec<Piece>> {
    let blocks = (bytes / terms.block_bytes()).clamp(1, u32::MAX as usize);
    frames(pieces.iter().cloned(), blocks as u32)
}

fn blocks_of(pieces: &[Piece]) -> impl Iterator<Item = (u32, u32)> {
    pieces.iter().flat_map(|piece| piece.pages.clone().map(|page| (piece.layer, page)))
}

#[cfg(test)]
mod tests;
