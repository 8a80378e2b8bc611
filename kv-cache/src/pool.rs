//! Which page is free, held or cached.
//!
//! A page is *held* while somebody counts on its bytes (reference count above zero), *cached* when nobody does but its
//! prefix has a name, and *free* otherwise. Allocation takes free pages first; where there are too few, it evicts as many
//! cached pages as are missing, least recently used first. A sequence that gives its pages back last-page-first loses the tail
//! of its prefix before the head (the rules are vLLM's, `block_pool.py`).
//!
//! Neighbouring pages travel as one copy, so an allocation is made of as few *runs* as possible, each in ascending order: the
//! smallest run of free pages that is large enough, or else the largest ones there are. A page for a sequence that grows so
//! fills a hole, and the long runs stay for prompts. Which pages are evicted does not depend on it.

use crate::{PageHash, PageId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// How the pool is used, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All pages.
    pub total: usize,
    /// Pages with neither holder nor name.
    pub free: usize,
    /// Pages without holder that still name a prefix: reusable, and evicted when room is needed.
    pub cached: usize,
}

impl PoolStats {
    /// Returns the pages somebody holds.
    pub fn held(&self) -> usize {
        self.total - self.free - self.cached
    }

    /// Returns the pages that an allocation could get.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

/// Net change of the set of named prefixes since it was last taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheDelta {
    /// Prefixes that can be reused now and could not before.
    pub stored: Vec<PageHash>,
    /// Prefixes that can no longer be reused.
    pub evicted: Vec<PageHash>,
}

impl CacheDelta {
    /// Says whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.evicted.is_empty()
    }
}

#[derive(Clone, Debug, Default)]
struct Page {
    holders: u32,
    hash: Option<PageHash>,
    /// Key in `idle` while the page is cached and unheld.
    idle_since: u64,
}

/// The pages of one worker.
#[derive(Clone, Debug)]
pub struct PagePool {
    pages: Vec<Page>,
    free: Runs,
    /// Cached pages by the moment they were last let go.
    idle: BTreeMap<u64, PageId>,
    named: HashMap<PageHash, PageId>,
    stored: HashSet<PageHash>,
    evicted: HashSet<PageHash>,
    clock: u64,
}

impl PagePool {
    /// Makes a pool of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        Self {
            pages: vec![Page::default(); pages],
            free: Runs::all(pages as u32),
            idle: Default::default(),
            named: Default::default(),
            stored: Default::default(),
            evicted: Default::default(),
            clock: 0,
        }
    }

    /// Returns how the pool is used now.
    pub fn stats(&self) -> PoolStats {
        PoolStats { total: self.pages.len(), free: self.free.count as usize, cached: self.idle.len() }
    }

    /// Takes `count` pages, each with one holder and no name, or none at all when fewer can be had. They form as few runs of
    /// neighbours as can be.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        if self.stats().available() < count {
            return None;
        }
        for _ in self.stats().free..count {
            let page = self.evict_oldest();
            self.free.insert(page.0, 1);
        }
        let taken = self.free.take(count as u32);
        for page in &taken {
            self.pages[page.index()].holders = 1;
        }
        Some(taken)
    }

    /// Counts the leading pages of `hashes` that [`PagePool::reuse`] would return, without holding them.
    pub fn matching(&self, hashes: &[PageHash]) -> usize {
        hashes.iter().take_while(|hash| self.named.contains_key(hash)).count()
    }

    /// Holds and returns the pages of the longest known prefix of `hashes`.
    pub fn reuse(&mut self, hashes: &[PageHash]) -> Vec<PageId> {
        let pages: Vec<PageId> = hashes.iter().map_while(|hash| self.named.get(hash).copied()).collect();
        for &page in &pages {
            self.hold(page);
        }
        pages
    }

    /// Adds a holder to a page that is held or cached.
    ///
    /// # Panics
    /// When the page is free.
    pub fn hold(&mut self, page: PageId) {
        let slot = &mut self.pages[page.index()];
        if slot.holders == 0 {
            assert!(self.idle.remove(&slot.idle_since).is_some(), "{page:?} is free and cannot be held");
        }
        slot.holders += 1;
    }

    /// Names the prefix that ends with `page`, whose bytes must be complete. When another page already has the name, that one
    /// keeps it: two sequences that computed the same prefix at once keep their own pages.
    ///
    /// # Panics
    /// When nobody holds the page.
    pub fn name(&mut self, page: PageId, hash: PageHash) {
        let slot = &mut self.pages[page.index()];
        assert!(slot.holders > 0, "{page:?} is named while nobody holds it");
        if slot.hash.is_some() || self.named.contains_key(&hash) {
            return;
        }
        slot.hash = Some(hash);
        self.named.insert(hash, page);
        if !self.evicted.remove(&hash) {
            self.stored.insert(hash);
        }
    }

    /// Gives back one holder of each of `pages`, which are in sequence order.
    ///
    /// # Panics
    /// When nobody holds one of them: a page given back twice.
    pub fn release(&mut self, pages: &[PageId]) {
        // Of freed pages that neighbour each other.
        let (mut first, mut length) = (0, 0);
        for &page in pages.iter().rev() {
            let slot = &mut self.pages[page.index()];
            assert!(slot.holders > 0, "{page:?} is released while nobody holds it");
            slot.holders -= 1;
            if slot.holders > 0 {
                continue;
            }
            if slot.hash.is_some() {
                self.clock += 1;
                slot.idle_since = self.clock;
                self.idle.insert(self.clock, page);
            } else if length > 0 && page.0 + 1 == first {
                (first, length) = (page.0, length + 1);
            } else {
                self.free.insert(first, length);
                (first, length) = (page.0, 1);
            }
        }
        self.free.insert(first, length);
    }

    /// Takes the net change of named prefixes since the last call.
    pub fn take_delta(&mut self) -> CacheDelta {
        CacheDelta { stored: self.stored.drain().collect(), evicted: self.evicted.drain().collect() }
    }

    /// Returns every named prefix, for a reader that starts from nothing.
    pub fn named(&self) -> impl Iterator<Item = PageHash> + '_ {
        self.named.keys().copied()
    }

    /// Forgets every name nobody holds. Returns how many pages that freed.
    pub fn clear_cached(&mut self) -> usize {
        let mut freed = 0;
        while !self.idle.is_empty() {
            let page = self.evict_oldest();
            self.free.insert(page.0, 1);
            freed += 1;
        }
        freed
    }

    fn evict_oldest(&mut self) -> PageId {
        let (_, page) = self.idle.pop_first().expect("callers checked that a cached page exists");
        let hash = self.pages[page.index()].hash.take().expect("an idle page has a name");
        self.named.remove(&hash);
        if !self.stored.remove(&hash) {
            self.evicted.insert(hash);
        }
        page
    }
}

/// Free pages, as the runs of neighbours that they form.
#[derive(Clone, Debug)]
struct Runs {
    /// First page → number of pages. No two runs touch.
    lengths: BTreeMap<u32, u32>,
    /// The same as (number of pages, first page).
    by_length: BTreeSet<(u32, u32)>,
    /// Pages of all runs.
    count: u32,
}

impl Runs {
    /// Starts with all of `pages` pages.
    fn all(pages: u32) -> Self {
        let mut runs = Self { lengths: BTreeMap::new(), by_length: BTreeSet::new(), count: pages };
        runs.add(0, pages);
        runs
    }

    /// Adds `length` pages from `first` on that are in no run.
    fn insert(&mut self, mut first: u32, mut length: u32) {
        if length == 0 {
            return;
        }
        self.count += length;
        if let Some((&before, &pages)) = self.lengths.range(..first).next_back()
            && before + pages == first
        {
            self.remove(before, pages);
            (first, length) = (before, pages + length);
        }
        if let Some(&pages) = self.lengths.get(&(first + length)) {
            self.remove(first + length, pages);
            length += pages;
        }
        self.add(first, length);
    }

    /// Takes `count` pages in as few runs as possible, ascending within each.
    ///
    /// # Panics
    /// When there are fewer.
    fn take(&mut self, count: u32) -> Vec<PageId> {
        let mut taken = Vec::with_capacity(count as usize);
        let mut missing = count;
        while missing > 0 {
            let fitting = self.by_length.range((missing, 0)..).next();
            let &(length, first) = fitting.or(self.by_length.last()).expect("callers checked that there are enough");
            let pages = length.min(missing);
            self.remove(first, length);
            self.add(first + pages, length - pages);
            taken.extend((first..first + pages).map(PageId));
            missing -= pages;
        }
        self.count -= count;
        taken
    }

    fn add(&mut self, first: u32, length: u32) {
        if length > 0 {
            self.lengths.insert(first, length);
            self.by_length.insert((length, first));
        }
    }

    fn remove(&mut self, first: u32, length: u32) {
        self.lengths.remove(&first);
        self.by_length.remove(&(length, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_hashes;
    use proptest::prelude::*;

    fn hashes(n: u32) -> Vec<PageHash> {
        page_hashes(b"", &(0..n).collect::<Vec<_>>(), 1)
    }

    #[test]
    fn all_or_nothing() {
        let mut pool = PagePool::new(3);
        assert_eq!(pool.allocate(4), None);
        assert_eq!(pool.allocate(3), Some(vec![PageId(0), PageId(1), PageId(2)]));
        assert_eq!(pool.allocate(1), None);
        assert_eq!(pool.stats().held(), 3);
    }

    #[test]
    fn a_prefix_is_reused_and_its_tail_is_evicted_first() {
        let mut pool = PagePool::new(3);
        let names = hashes(3);
        let pages = pool.allocate(3).unwrap();
        for (&page, &hash) in pages.iter().zip(&names) {
            pool.name(page, hash);
        }
        pool.release(&pages);
        assert_eq!(pool.stats(), PoolStats { total: 3, free: 0, cached: 3 });
        assert_eq!(pool.take_delta().stored.len(), 3);

        let other = pool.allocate(1).unwrap();
        assert_eq!(other, vec![pages[2]], "the tail goes first");
        assert_eq!(pool.take_delta().evicted, vec![names[2]]);
        assert_eq!(pool.reuse(&names), pages[..2]);
        assert_eq!(pool.allocate(1), None, "reused pages are held");
    }

    #[test]
    fn the_first_page_of_a_name_keeps_it() {
        let mut pool = PagePool::new(2);
        let pages = pool.allocate(2).unwrap();
        let name = hashes(1)[0];
        pool.name(pages[0], name);
        pool.name(pages[1], name);
        pool.release(&pages);
        assert_eq!(pool.stats(), PoolStats { total: 2, free: 1, cached: 1 });
        assert_eq!(pool.reuse(&[name]), vec![pages[0]]);
    }

    #[test]
    fn stored_and_evicted_between_two_looks_cancel_out() {
        let mut pool = PagePool::new(1);
        let page = pool.allocate(1).unwrap();
        pool.name(page[0], hashes(1)[0]);
        pool.release(&page);
        pool.allocate(1).unwrap();
        assert!(pool.take_delta().is_empty());
    }

    #[test]
    fn holes_are_filled_before_runs_are_cut() {
        let mut pool = PagePool::new(12);
        let pages = pool.allocate(12).unwrap();
        let release = |pool: &mut PagePool, range: std::ops::Range<usize>| pool.release(&pages[range]);
        release(&mut pool, 0..1);
        release(&mut pool, 2..5);
        release(&mut pool, 6..11);
        assert_eq!(pool.allocate(1), Some(vec![PageId(0)]), "the smallest hole");
        assert_eq!(pool.allocate(2), Some(vec![PageId(2), PageId(3)]));
        assert_eq!(pool.allocate(6), Some([6, 7, 8, 9, 10, 4].map(PageId).to_vec()), "the largest run first");
    }

    #[test]
    fn evicted_neighbours_are_a_run_again() {
        let mut pool = PagePool::new(6);
        let names = hashes(4);
        let (cached, held) = (pool.allocate(4).unwrap(), pool.allocate(2).unwrap());
        cached.iter().zip(&names).for_each(|(page, name)| pool.name(*page, *name));
        pool.release(&cached);
        assert_eq!(pool.allocate(3), Some([1, 2, 3].map(PageId).to_vec()), "last let go first, and in order");
        pool.release(&held);
    }

    /// The number of runs that pages in this order form.
    fn runs(pages: &[PageId]) -> usize {
        1 + pages.windows(2).filter(|pair| pair[0].0 + 1 != pair[1].0).count()
    }

    /// The least number of runs that `count` of these pages can form: the largest first.
    fn least_runs(free: &BTreeSet<u32>, count: usize) -> usize {
        let pages: Vec<PageId> = free.iter().copied().map(PageId).collect();
        let mut lengths: Vec<usize> = pages.chunk_by(|one, next| one.0 + 1 == next.0).map(<[_]>::len).collect();
        lengths.sort_unstable();
        let mut missing = count;
        let enough = lengths.iter().rev().take_while(|length| {
            let needed = missing > 0;
            missing = missing.saturating_sub(**length);
            needed
        });
        enough.count()
    }

    proptest! {
        /// Whatever was allocated and given back in whatever order, no allocation has more runs than it must, and every free page
        /// can be had.
        #[test]
        fn allocations_have_as_few_runs_as_can_be(ops in prop::collection::vec((any::<bool>(), 1usize..12), 1..200)) {
            let mut pool = PagePool::new(40);
            let mut free: BTreeSet<u32> = (0..40).collect();
            let mut held: Vec<PageId> = Vec::new();
            for (take, n) in ops {
                if take {
                    let taken = pool.allocate(n);
                    prop_assert_eq!(taken.is_some(), free.len() >= n);
                    if let Some(pages) = taken {
                        prop_assert_eq!(runs(&pages), least_runs(&free, n));
                        for page in pages {
                            prop_assert!(free.remove(&page.0));
                            held.push(page);
                        }
                    }
                } else {
                    // Scattered ones, so that holes appear, and neighbours among them.
                    let given: Vec<PageId> =
                        (0..n.min(held.len())).map(|at| held.swap_remove((at * 7 / 2 + n) % held.len())).collect();
                    pool.release(&given);
                    free.extend(given.iter().map(|page| page.0));
                }
                prop_assert_eq!(pool.stats().free, free.len());
            }
        }

        /// Which pages are evicted depends on when they were let go, and on nothing else.
        #[test]
        fn the_oldest_are_evicted_however_they_lie(order in Just((0..12usize).collect::<Vec<_>>()).prop_shuffle(), count in 1usize..12) {
            let mut pool = PagePool::new(12);
            let names = hashes(12);
            let pages = pool.allocate(12).unwrap();
            pages.iter().zip(&names).for_each(|(page, name)| pool.name(*page, *name));
            order.iter().for_each(|at| pool.release(&pages[*at..=*at]));
            let mut taken = pool.allocate(count).unwrap();
            taken.sort_unstable();
            let mut oldest: Vec<PageId> = order[..count].iter().map(|at| pages[*at]).collect();
            oldest.sort_unstable();
            prop_assert_eq!(taken, oldest);
        }

        /// Whatever is done in whatever order, every page is in exactly one state and a reader of the deltas knows the names.
        #[test]
        fn no_page_is_lost(ops in prop::collection::vec((0u8..4, 0usize..6), 1..200)) {
            let mut pool = PagePool::new(8);
            let names = hashes(8);
            let mut held: Vec<Vec<PageId>> = Vec::new();
            let mut reader: HashSet<PageHash> = HashSet::new();
            for (op, n) in ops {
                match op {
                    0 => held.extend(pool.allocate(n)),
                    1 if !held.is_empty() => pool.release(&held.swap_remove(n % held.len())),
                    2 if !held.is_empty() => {
                        let sequence = &held[n % held.len()];
                        for (&page, &name) in sequence.iter().zip(&names) {
                            pool.name(page, name);
                        }
                    }
                    _ => held.push(pool.reuse(&names[..n])),
                }
                let distinct: HashSet<PageId> = held.iter().flatten().copied().collect();
                prop_assert_eq!(pool.stats().held(), distinct.len());
                let delta = pool.take_delta();
                for hash in &delta.evicted { prop_assert!(reader.remove(hash)); }
                for hash in &delta.stored { prop_assert!(reader.insert(*hash)); }
                prop_assert_eq!(&reader, &pool.named().collect::<HashSet<_>>());
            }
            for sequence in held { pool.release(&sequence); }
            prop_assert_eq!(pool.stats().available(), 8);
        }
    }
}
