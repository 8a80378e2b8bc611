use super::*;
use crate::{Rank, testing::identity};
use proptest::prelude::*;

fn layout(layers: u32, pages: u32) -> PageLayout {
    PageLayout { layers, page_tokens: 2, kv_heads: 1, key_dim: 2, value_dim: 1, dtype: KvDtype::Bf16, pages }
}

fn ids(pages: &[u32]) -> Vec<PageId> {
    pages.iter().copied().map(PageId).collect()
}

fn worker(layout: PageLayout, rank: Rank) -> Identity {
    Identity { layout, rank, ..identity("w", 1) }
}

#[test]
fn neighbours_on_both_sides_merge() {
    let (ours, theirs) = (layout(2, 8), layout(2, 10));
    let terms = Terms::same(&ours, &theirs);
    let (source, target) = (ids(&[1, 2, 5, 6]), ids(&[4, 5, 6, 0]));
    let source = Place { view: &terms.source, pages: &source };
    let target = Place { view: &terms.target, pages: &target };
    let pieces: Vec<Piece> = pieces(0..1, 0..4, 0).collect();
    let block = ours.block_bytes();
    assert_eq!(
        copies(source, target, &pieces),
        [
            PoolCopy { source: block, target: 4 * block, bytes: 2 * block },
            PoolCopy { source: 5 * block, target: 6 * block, bytes: block },
            PoolCopy { source: 6 * block, target: 0, bytes: block },
        ]
    );
    assert_eq!(
        extents(source, &pieces),
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

/// The heads of rank 1 of 2 in pages twice as long: of each of its heads, half a page.
#[test]
fn a_slice_of_heads_is_a_run_and_half_a_page_is_one_for_each_head() {
    let whole = PageLayout { kv_heads: 4, ..layout(1, 2) };
    let half = PageLayout { kv_heads: 2, ..layout(1, 2) };
    let agree = |source: &PageLayout| {
        let rank = Rank::new(1, 2, 4).expect("even");
        Terms::agree(&worker(source.clone(), Rank::default()), &worker(half.clone(), rank), false).expect("fits")
    };
    let pieces = [Piece { layer: 0, pages: 1..2 }];
    let pages = ids(&[0, 1]);
    let bytes = |terms: &Terms| {
        let extents = extents(Place { view: &terms.source, pages: &pages }, &pieces);
        extents.into_iter().map(|extent| (extent.offset, extent.bytes)).collect::<Vec<_>>()
    };
    // A block: keys of 4 heads x 2 tokens x 4 bytes, then values of half as many.
    assert_eq!(bytes(&agree(&whole)), [(48 + 16, 16), (48 + 32 + 8, 8)]);
    // Keys of 4 heads x 4 tokens x 4 bytes, of which tokens 2 and 3 of heads 2 and 3.
    let long = PageLayout { page_tokens: 4, ..whole };
    assert_eq!(bytes(&agree(&long)), [(40, 8), (56, 8), (64 + 20, 4), (64 + 28, 4)]);
}

#[test]
fn what_does_not_fit_is_refused_with_both_values() {
    let check = |source: (PageLayout, Rank), target: (PageLayout, Rank), expected: &str| {
        let agreed = Terms::agree(&worker(source.0, source.1), &worker(target.0, target.1), false);
        assert_eq!(agreed.map(|_| ()), Err(expected.to_owned()));
    };
    let plain = || (layout(2, 9), Rank::default());
    check(plain(), (layout(3, 9), Rank::default()), "layers: yours 2, ours 3");
    check(plain(), (PageLayout { key_dim: 9, ..layout(2, 9) }, Rank::default()), "key_dim: yours 2, ours 9");
    check(plain(), (PageLayout { kv_heads: 9, ..layout(2, 9) }, Rank::default()), "kv_heads: yours 1, ours 9");
    check(plain(), (layout(2, 9), Rank { index: 1, of: 2, replicas: 1 }), "kv_heads: yours 1, ours 2");
    let rank = |index| (layout(2, 9), Rank { index, of: 2, replicas: 1 });
    check(rank(0), rank(1), "rank: yours (0 of 2) has nothing for ours (1 of 2)");
    let int8 = (PageLayout { dtype: KvDtype::Int8, ..layout(2, 9) }, Rank::default());
    check(plain(), int8, "dtype: yours bf16, ours int8, and lossy_kv is off");
    check(
        (PageLayout { page_tokens: 0, ..layout(2, 9) }, Rank::default()),
        plain(),
        "yours: page_tokens 0 is not in 1 ..= 65536",
    );
    check(rank(2), plain(), "yours: rank 2 of 2 is none");
    let endless = (PageLayout { page_tokens: 1 << 16, kv_heads: 1 << 16, ..layout(2, u32::MAX) }, Rank::default());
    check(endless, plain(), "yours: a pool of 4294967295 pages is larger than any memory");
}

/// Of every pair of degrees, each head of a target comes from exactly one rank, latents included.
#[test]
fn every_head_has_one_sender() {
    for (heads, sources, targets) in [1, 2, 4, 8]
        .into_iter()
        .flat_map(|h| [1, 2, 4, 8].into_iter().flat_map(move |s| [1, 2, 4, 8].map(|t| (h, s, t))))
    {
        let rank = |index, of| {
            let rank = Rank::new(index, of, heads).expect("even");
            let kv_heads = heads / (of / rank.replicas);
            worker(PageLayout { kv_heads, ..layout(1, 4) }, rank)
        };
        for target in (0..targets).map(|index| rank(index, targets)) {
            let mut seen = vec![0; target.layout.kv_heads as usize];
            for source in (0..sources).map(|index| rank(index, sources)) {
                if let Ok(terms) = Terms::agree(&source, &target, false) {
                    let first = terms.target.first_head as usize;
                    seen[first..first + terms.target.travel.kv_heads as usize].iter_mut().for_each(|seen| *seen += 1);
                }
            }
            assert!(seen.iter().all(|seen| *seen == 1), "{heads} heads, {sources} to {targets}: {seen:?}");
        }
    }
}

/// Ranks of a source, one target of them all, a sequence in every pool, and how it is cut into pushes.
#[derive(Debug)]
struct Case {
    tokens: u32,
    sources: Vec<(Identity, Vec<PageId>)>,
    target: (Identity, Vec<PageId>),
    /// Pages of the target.
    have: u32,
    layer_cuts: Vec<u32>,
    /// In tokens.
    cuts: Vec<u32>,
    frame_blocks: u32,
}

fn case() -> impl Strategy<Value = Case> {
    let page_tokens = proptest::sample::select(vec![1u32, 2, 3, 4, 6, 8]);
    let dtype = proptest::sample::select(KvDtype::ALL.to_vec());
    let degrees = proptest::sample::select(vec![(1u32, 1u32), (1, 2), (2, 1), (4, 2), (2, 4), (4, 1)]);
    let dims = (1u32..4, 0u32..3, 1u32..4, proptest::sample::select(vec![1u32, 2, 4]));
    (degrees, [page_tokens.clone(), page_tokens], dtype, dims, 1u32..30, any::<[u16; 2]>(), 1u32..9).prop_flat_map(
        |(
            (sources, targets),
            [ours, theirs],
            dtype,
            (key_dim, value_dim, layers, heads),
            tokens,
            [pick, have],
            frame_blocks,
        )| {
            let rank = move |index: u32, of: u32, page_tokens: u32| {
                let rank = Rank::new(index, of, heads).expect("powers of two");
                let kv_heads = heads / (of / rank.replicas);
                let pages = tokens.div_ceil(page_tokens) + 2;
                worker(PageLayout { layers, page_tokens, kv_heads, key_dim, value_dim, dtype, pages }, rank)
            };
            let place = |worker: Identity| {
                let count = worker.layout.pages_for(tokens as usize);
                Just((0..worker.layout.pages).collect::<Vec<_>>())
                    .prop_shuffle()
                    .prop_map(move |order| (worker.clone(), ids(&order[..count])))
            };
            let target = rank(u32::from(pick) % targets, targets, theirs);
            let have = u32::from(have) % (target.layout.pages_for(tokens as usize) as u32 + 1);
            let senders: Vec<_> = (0..sources)
                .map(|index| rank(index, sources, ours))
                .filter(|source| source.rank.sends_to(&target.rank, heads))
                .map(place)
                .collect();
            let cuts = |most| proptest::collection::vec(0..=most, 0..4);
            (senders, place(target), cuts(layers), cuts(tokens.div_ceil(ours))).prop_map(
                move |(sources, target, mut layer_cuts, mut cuts)| {
                    layer_cuts.extend([0, layers]);
                    cuts.extend([0, tokens.div_ceil(ours)]);
                    layer_cuts.sort_unstable();
                    cuts.sort_unstable();
                    Case { tokens, sources, target, have, layer_cuts, cuts, frame_blocks }
                },
            )
        },
    )
}

/// Where an element, or a scale, of one token and head lies in a pool.
fn cells(layout: &PageLayout, pages: &[PageId], token: u32, head: u32) -> Vec<Range<usize>> {
    let page = pages[(token / layout.page_tokens) as usize];
    let row = (head * layout.page_tokens + token % layout.page_tokens) as usize;
    let planes = [(layout.keys(), layout.key_dim as usize), (layout.values(), layout.value_dim as usize)];
    let mut cells = Vec::new();
    for layer in 0..layout.layers {
        let block = layout.block_offset(layer, page);
        for (plane, dim) in planes.into_iter().filter(|(_, dim)| *dim > 0) {
            let bytes = dim * layout.dtype.bytes();
            let scale = layout.dtype.scale_bytes();
            cells.push(block + plane.elements + row * bytes..block + plane.elements + (row + 1) * bytes);
            cells.push(block + plane.scales + row * scale..block + plane.scales + (row + 1) * scale);
        }
    }
    cells
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Every byte of the landing that should be written is written exactly once, with the right byte, and none else is: for any
    /// page sizes, degrees, scaled types, what is there already, and however pushes and frames are cut. Also what a stream
    /// carries is in the same order on both sides.
    #[test]
    fn each_byte_is_written_once(case in case()) {
        let (target, landing) = &case.target;
        // (source, byte) by byte of the target.
        let mut writes = vec![Vec::new(); target.layout.pool_bytes()];
        let mut expected = writes.clone();
        for (number, (source, pages)) in case.sources.iter().enumerate() {
            let terms = Terms::agree(source, target, false).unwrap();
            let from = Place { view: &terms.source, pages };
            let to = Place { view: &terms.target, pages: landing };
            let all = terms.travel_pages(case.tokens);
            let have = terms.target.travel_of(0..case.have).end.min(all);
            for cut in case.cuts.windows(2) {
                let travel = terms.source.travel_of(cut[0]..cut[1]);
                for layers in case.layer_cuts.windows(2) {
                    let pieces = pieces(layers[0]..layers[1], travel.start..travel.end.min(all), have);
                    for frame in frames(pieces, case.frame_blocks) {
                        let streamed: Vec<usize> = extents(from, &frame).into_iter().flat_map(bytes_of).collect();
                        let read: Vec<usize> = extents(to, &frame).into_iter().flat_map(bytes_of).collect();
                        prop_assert_eq!(read.len() as u64, blocks(&frame) * terms.block_bytes() as u64);
                        let copied: Vec<(usize, usize)> = copies(from, to, &frame)
                            .into_iter()
                            .flat_map(|copy| (0..copy.bytes).map(move |at| (copy.source + at, copy.target + at)))
                            .collect();
                        prop_assert_eq!(&copied, &streamed.into_iter().zip(read).collect::<Vec<_>>());
                        copied.into_iter().for_each(|(from, to)| writes[to].push((number, from)));
                    }
                }
            }
            // What is not there, to the end of the last travel page: as far as the sequence goes, and up to a page's end.
            let tokens = terms.target.travel.page_tokens;
            for token in have * tokens..all * tokens {
                for head in 0..terms.target.travel.kv_heads {
                    let sent = cells(&source.layout, pages, token, terms.source.first_head + head);
                    let landed = cells(&target.layout, landing, token, terms.target.first_head + head);
                    for (from, to) in sent.into_iter().flatten().zip(landed.into_iter().flatten()) {
                        expected[to].push((number, from));
                    }
                }
            }
        }
        prop_assert_eq!(writes, expected);
    }
}

fn bytes_of(extent: Extent) -> Range<usize> {
    extent.offset..extent.offset + extent.bytes
}
