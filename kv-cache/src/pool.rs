//! Which page is free, held or cached.
//!
//! A page is *held* while somebody counts on its bytes (reference count above zero), *cached* when nobody does but its
//! prefix has a name, and *free* otherwise. Allocation takes free pages first, lowest number first so that a sequence's pages
//! form runs that travel as one copy, then evicts cached pages, least recently used first. A sequence that gives its pages
//! back last-page-first loses the tail of its prefix before the head (the rules are vLLM's, `block_pool.py`).

use crate::{PageHash, PageId};
use std::collections::{BTreeSet, HashMap, HashSet};

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
    free: BTreeSet<PageId>,
    /// Cached pages by the moment they were last let go.
    idle: std::collections::BTreeMap<u64, PageId>,
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
            free: (0..pages as u32).map(PageId).collect(),
            idle: Default::default(),
            named: Default::default(),
            stored: Default::default(),
            evicted: Default::default(),
            clock: 0,
        }
    }

    /// Returns how the pool is used now.
    pub fn stats(&self) -> PoolStats {
        PoolStats { total: self.pages.len(), free: self.free.len(), cached: self.idle.len() }
    }

    /// Takes `count` pages, each with one holder and no name, or none at all when fewer can be had.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        if self.stats().available() < count {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let page = match self.free.pop_first() {
                Some(page) => page,
                None => self.evict_oldest(),
            };
            self.pages[page.index()].holders = 1;
            taken.push(page);
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
            } else {
                self.free.insert(page);
            }
        }
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
            self.free.insert(page);
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

    proptest! {
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
