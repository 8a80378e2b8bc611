//! Which worker holds which prefix.
//!
//! The index is exact: it holds what workers said they stored and forgets what they said they evicted. A page's hash names the
//! whole prefix that ends with it, so a prompt's leading pages are found by walking its hashes until nobody is left, and
//! one walk answers for all workers.
//!
//! Where nobody drops out, the walk takes [`STRIDE`] pages at once: workers give a prefix up from its end, so who holds a page holds
//! those before it. (Two sequences that compute one prefix at once can leave a hole in it. A match is then too long, and the worker
//! computes what it turns out to lack.)
//!
//! **Memory.** A page costs one table slot of 33 bytes (a table is between 44 % and 88 % full), more only when over six workers hold it. The
//! table is kept in two generations, each at most half of the budget. Pages go into the young one; when it is full, the
//! old one is dropped whole and the young one grows old. A page matched or stored again moves back to the young one. So what is
//! dropped first is what was neither stored nor matched for longest, and dropping costs no search. A dropped page makes a placement
//! worse, never wrong.
//!
//! **Leaving.** A worker's life is a [`Slot`]. When the stream ends or a snapshot replaces what was known, its slot is
//! retired at once and its bits are cleared as their pages move or drop; a slot is given out again only when none can be left.

mod holders;

use holders::{Holders, SlotSet};
use kv_cache::PageHash;
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hash, Hasher},
    mem::size_of,
};

/// Pages that a walk skips where it can.
const STRIDE: usize = 32;

/// One life of one worker, as the index knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

impl Slot {
    /// Returns the slot as an index into what [`PrefixIndex::matches`] fills.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// See the module.
#[derive(Debug)]
pub struct PrefixIndex {
    young: Generation,
    old: Generation,
    /// Most bytes of one generation.
    generation_bytes: usize,
    /// How often the young generation has grown old.
    turns: u64,
    slots: Slots,
}

impl PrefixIndex {
    /// Holds at most `budget_bytes`.
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            young: Generation::default(),
            old: Generation::default(),
            generation_bytes: budget_bytes / 2,
            turns: 0,
            slots: Slots::default(),
        }
    }

    /// Gives out a slot that no page knows.
    pub fn assign(&mut self) -> Slot {
        if let Some(slot) = self.slots.reuse(self.turns).or_else(|| self.slots.fresh()) {
            return slot;
        }
        // Every number was used and is still in some page. Clear them all, once in 65,535 lives.
        let dead = std::mem::take(&mut self.slots.dead);
        self.young.strip(&dead);
        self.old.strip(&dead);
        self.slots.retired.iter_mut().for_each(|(_, turn)| *turn = 0);
        self.turns = self.turns.max(2);
        self.slots.reuse(self.turns).expect("65,535 workers are not attached at once")
    }

    /// Forgets all that `slot` holds.
    pub fn retire(&mut self, slot: Slot) {
        self.slots.dead.insert(slot);
        self.slots.retired.push((slot, self.turns));
    }

    /// Notes that `slot` holds these pages.
    pub fn store(&mut self, slot: Slot, pages: impl IntoIterator<Item = PageHash>) {
        for page in pages {
            let key = Key::from(page);
            if self.refresh(key) {
                self.young.add(key, slot);
            } else {
                self.insert(key, Holders::one(slot));
            }
        }
    }

    /// Notes that `slot` no longer holds these pages.
    pub fn evict(&mut self, slot: Slot, pages: impl IntoIterator<Item = PageHash>) {
        for page in pages {
            let key = Key::from(page);
            self.young.remove(key, slot);
            self.old.remove(key, slot);
        }
    }

    /// Fills `leading`, indexed by slot, with how many of the first `pages` each holds without a hole.
    pub fn matches(&mut self, pages: &[PageHash], leading: &mut Vec<u32>) {
        leading.clear();
        leading.resize(usize::from(self.slots.used), 0);
        // Who holds every page so far, and how many those are.
        let (mut alive, mut count) = (SlotSet::default(), 0);
        // Pages up to here are looked up one by one.
        let mut walk_to = 1;
        while count < pages.len() {
            if count >= walk_to {
                // What is in the old generation is walked to, so that all of it moves.
                let ahead = pages.get(count + STRIDE - 1).and_then(|&page| self.young.pages.get(&Key::from(page)));
                if ahead.is_some_and(|holders| holders.cover(&alive)) {
                    count += STRIDE;
                    continue;
                }
                walk_to = count + STRIDE;
            }
            let key = Key::from(pages[count]);
            if !self.young.pages.contains_key(&key) && !self.refresh(key) {
                break;
            }
            let holders = &self.young.pages[&key];
            if count == 0 {
                holders.for_each(|slot| alive.insert(slot));
            } else {
                holders.intersect(&mut alive, |slot| leading[slot.index()] = count as u32);
            }
            if alive.is_empty() {
                return;
            }
            count += 1;
        }
        alive.iter().for_each(|slot| leading[slot.index()] = count as u32);
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.young.bytes() + self.old.bytes()
    }

    /// Pages known.
    #[cfg(test)]
    fn pages(&self) -> usize {
        self.young.pages.len() + self.old.pages.len()
    }

    /// Makes sure that a known page is in the young generation. Returns whether it is known.
    fn refresh(&mut self, key: Key) -> bool {
        if self.young.pages.contains_key(&key) {
            return true;
        }
        let Some(mut holders) = self.old.take(key) else { return false };
        holders.strip(&self.slots.dead);
        !holders.is_empty() && self.insert(key, holders)
    }

    /// Returns false when the budget is too small for even one page.
    fn insert(&mut self, key: Key, holders: Holders) -> bool {
        if self.young.bytes_with_one_more(&holders) > self.generation_bytes {
            if self.young.pages.is_empty() {
                return false;
            }
            self.turns += 1;
            self.old = std::mem::take(&mut self.young);
            return self.insert(key, holders);
        }
        self.young.insert(key, holders);
        true
    }
}

/// Which slot numbers are in use.
#[derive(Debug, Default)]
struct Slots {
    /// Numbers given out so far.
    used: u16,
    /// Retired slots whose bits may still stand in some page.
    dead: SlotSet,
    /// Retired slots and the turn of their retirement.
    retired: Vec<(Slot, u64)>,
}

impl Slots {
    fn fresh(&mut self) -> Option<Slot> {
        let slot = Slot(self.used);
        self.used = self.used.checked_add(1)?;
        Some(slot)
    }

    /// Two turns after its retirement every page a slot stood in has been dropped or moved, and moving clears dead bits.
    fn reuse(&mut self, turns: u64) -> Option<Slot> {
        let at = self.retired.iter().position(|&(_, retired)| retired + 2 <= turns)?;
        let (slot, _) = self.retired.swap_remove(at);
        self.dead.remove(slot);
        Some(slot)
    }
}

#[derive(Debug, Default)]
struct Generation {
    pages: HashMap<Key, Holders, BuildHasherDefault<AlreadyHashed>>,
    /// Bytes of sets outside the table.
    spilled_bytes: usize,
}

impl Generation {
    fn insert(&mut self, key: Key, holders: Holders) {
        self.spilled_bytes += holders.spilled_bytes();
        self.pages.insert(key, holders);
    }

    fn add(&mut self, key: Key, slot: Slot) {
        if let Some(holders) = self.pages.get_mut(&key) {
            self.spilled_bytes -= holders.spilled_bytes();
            holders.insert(slot);
            self.spilled_bytes += holders.spilled_bytes();
        }
    }

    fn remove(&mut self, key: Key, slot: Slot) {
        let Some(holders) = self.pages.get_mut(&key) else { return };
        holders.remove(slot);
        if holders.is_empty() {
            self.take(key);
        }
    }

    fn take(&mut self, key: Key) -> Option<Holders> {
        let holders = self.pages.remove(&key)?;
        self.spilled_bytes -= holders.spilled_bytes();
        Some(holders)
    }

    fn strip(&mut self, dead: &SlotSet) {
        self.pages.retain(|_, holders| {
            holders.strip(dead);
            !holders.is_empty()
        });
        self.spilled_bytes = self.pages.values().map(Holders::spilled_bytes).sum();
    }

    fn bytes(&self) -> usize {
        table_bytes(self.pages.capacity()) + self.spilled_bytes
    }

    fn bytes_with_one_more(&self, holders: &Holders) -> usize {
        let room =
            if self.pages.len() < self.pages.capacity() { self.pages.capacity() } else { self.pages.capacity() + 1 };
        table_bytes(room) + self.spilled_bytes + holders.spilled_bytes()
    }
}

/// What a table of this capacity takes: a power of two of slots, at most 7/8 of them filled, one control byte each.
fn table_bytes(capacity: usize) -> usize {
    if capacity == 0 { 0 } else { (capacity * 8).div_ceil(7).next_power_of_two() * (size_of::<(Key, Holders)>() + 1) }
}

/// A page's hash in halves: 8-byte alignment keeps a table slot at 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key([u64; 2]);

impl From<PageHash> for Key {
    fn from(hash: PageHash) -> Self {
        Self([hash.0 as u64, (hash.0 >> 64) as u64])
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
    }
}

/// Page hashes are BLAKE3: their bits need no further mixing, and nobody can choose them.
#[derive(Debug, Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys hash as one u64")
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BIG: usize = 1 << 20;

    /// A hash as uniform as the real ones.
    fn hash(n: u64) -> PageHash {
        let bytes = blake3::hash(&n.to_le_bytes());
        PageHash(u128::from_le_bytes(bytes.as_bytes()[..16].try_into().unwrap()))
    }

    fn leading(index: &mut PrefixIndex, pages: &[PageHash], slot: Slot) -> u32 {
        let mut out = Vec::new();
        index.matches(pages, &mut out);
        out[slot.index()]
    }

    #[test]
    fn a_table_slot_is_as_small_as_the_header_says() {
        assert_eq!(size_of::<(Key, Holders)>() + 1, 33);
    }

    #[test]
    fn one_walk_answers_for_all() {
        let mut index = PrefixIndex::new(BIG);
        let prompt: Vec<_> = (0..4).map(hash).collect();
        let [a, b, c] = [(); 3].map(|()| index.assign());
        index.store(a, prompt.clone());
        index.store(b, prompt[..2].to_vec());
        index.store(c, prompt[1..].to_vec());
        let mut out = Vec::new();
        index.matches(&prompt, &mut out);
        assert_eq!(out, [4, 2, 0], "c holds no first page, so nothing of it can be used");
        index.evict(a, [prompt[1]]);
        index.matches(&prompt, &mut out);
        assert_eq!(out, [1, 2, 0]);
    }

    #[test]
    fn leaving_clears_only_its_own() {
        let mut index = PrefixIndex::new(BIG);
        let pages = [hash(1), hash(2)];
        let (a, b) = (index.assign(), index.assign());
        index.store(a, pages);
        index.store(b, pages);
        index.retire(a);
        assert_eq!(leading(&mut index, &pages, b), 2);
        let again = index.assign();
        assert_ne!(again, a, "pages may still know the retired slot");
        assert_eq!(leading(&mut index, &pages, again), 0);
    }

    #[test]
    fn a_slot_is_reused_only_when_no_page_knows_it() {
        let mut index = PrefixIndex::new(8 * 1024);
        let (a, b) = (index.assign(), index.assign());
        let kept = [hash(u64::MAX)];
        index.store(a, kept);
        index.store(b, kept);
        index.retire(a);
        for n in 0..2_000 {
            index.store(b, [hash(n)]);
            assert_eq!(leading(&mut index, &kept, b), 1, "what is matched often stays");
        }
        let reused = index.assign();
        assert_eq!(reused, a);
        assert_eq!(leading(&mut index, &kept, reused), 0);
    }

    #[test]
    fn the_budget_holds_and_the_newest_stay() {
        let budget = 64 * 1024;
        let mut index = PrefixIndex::new(budget);
        let slot = index.assign();
        for n in 0..100_000 {
            index.store(slot, [hash(n)]);
            assert!(index.bytes() <= budget, "{} bytes after {n} pages", index.bytes());
        }
        assert_eq!(leading(&mut index, &[hash(99_999)], slot), 1);
        assert_eq!(leading(&mut index, &[hash(0)], slot), 0);
        assert!(index.pages() >= 400, "{} pages", index.pages());
    }

    #[test]
    fn many_holders_of_one_page_stay_inside_the_budget() {
        let mut index = PrefixIndex::new(32 * 1024);
        let slots: Vec<_> = (0..200).map(|_| index.assign()).collect();
        for n in 0..200 {
            slots.iter().for_each(|&slot| index.store(slot, [hash(n)]));
            assert!(index.bytes() <= 32 * 1024);
        }
        let mut out = Vec::new();
        index.matches(&[hash(199)], &mut out);
        assert!(out.iter().all(|&pages| pages == 1));
    }

    #[test]
    fn a_budget_of_nothing_knows_nothing() {
        let mut index = PrefixIndex::new(0);
        let slot = index.assign();
        index.store(slot, [hash(1)]);
        assert_eq!((leading(&mut index, &[hash(1)], slot), index.bytes()), (0, 0));
    }

    #[test]
    fn slot_numbers_never_run_out() {
        let mut index = PrefixIndex::new(BIG);
        let keeper = index.assign();
        index.store(keeper, [hash(0)]);
        for _ in 0..70_000u32 {
            let slot = index.assign();
            index.store(slot, [hash(0)]);
            assert_ne!(slot, keeper);
            index.retire(slot);
        }
        assert_eq!(leading(&mut index, &[hash(0)], keeper), 1);
    }

    proptest! {
        /// Prefixes without holes, as workers keep them.
        #[test]
        fn skipping_ahead_finds_what_walking_finds(
            held in proptest::collection::vec(0usize..400, 1..20),
            asked in 1usize..400,
        ) {
            let mut index = PrefixIndex::new(BIG);
            let prompt: Vec<_> = (0..400).map(hash).collect();
            let hold = |&pages: &usize| {
                let slot = index.assign();
                index.store(slot, prompt[..pages].iter().copied());
                slot
            };
            let slots: Vec<Slot> = held.iter().map(hold).collect();
            let mut out = Vec::new();
            index.matches(&prompt[..asked], &mut out);
            for (slot, pages) in slots.iter().zip(held) {
                prop_assert_eq!(out[slot.index()] as usize, pages.min(asked));
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Store(usize, u64),
        Evict(usize, u64),
        Restart(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0usize..9, 0u64..12).prop_map(|(w, p)| Op::Store(w, p)),
            3 => (0usize..9, 0u64..12).prop_map(|(w, p)| Op::Evict(w, p)),
            1 => (0usize..9).prop_map(Op::Restart),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_plain_sets(ops in proptest::collection::vec(op(), 0..200)) {
            let mut index = PrefixIndex::new(BIG);
            let mut workers: Vec<(Slot, BTreeSet<u64>)> = (0..9).map(|_| (index.assign(), BTreeSet::new())).collect();
            for op in ops {
                match op {
                    Op::Store(w, page) => {
                        workers[w].1.insert(page);
                        index.store(workers[w].0, [hash(page)]);
                    }
                    Op::Evict(w, page) => {
                        workers[w].1.remove(&page);
                        index.evict(workers[w].0, [hash(page)]);
                    }
                    Op::Restart(w) => {
                        index.retire(workers[w].0);
                        workers[w] = (index.assign(), BTreeSet::new());
                    }
                }
            }
            let prompt: Vec<_> = (0..12).map(hash).collect();
            let mut out = Vec::new();
            index.matches(&prompt, &mut out);
            for (slot, held) in &workers {
                let expected = (0..12).take_while(|page| held.contains(page)).count() as u32;
                prop_assert_eq!(out[slot.index()], expected);
            }
        }
    }
}
