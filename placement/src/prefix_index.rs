//! Which worker holds which prefix.
//!
//! The index is exact: it holds what workers said they stored and forgets what they said they evicted. A page's hash names the
//! whole prefix that ends with it, so a prompt's leading pages are found by walking its hashes until nobody is left, and
//! one walk answers for all workers.
//!
//! Where nobody drops out, the walk takes [`STRIDE`] pages at once: workers give a prefix up from its end, so who holds a page holds
//! those before it. Who drops out on the way is found by halving. (Two sequences that compute one prefix at once can leave a hole in it. A match is
//! then too long, and the worker computes what it turns out to lack. So is one in 2^64, since half of a name is kept.)
//!
//! **Memory.** A page takes 20 to 40 bytes of a [`Table`], more only when over four workers hold it. The
//! table is kept in two generations, each at most half of the budget. Pages go into the young one; when it is full, the
//! old one is dropped whole and the young one grows old. A page matched or stored again moves back to the young one. So what is
//! dropped first is what was neither stored nor matched for longest, and dropping costs no search. A dropped page makes a placement
//! worse, never wrong. While a table grows there are two of it for a moment.
//!
//! **Leaving.** A worker's life is a [`Slot`]. When the stream ends or a snapshot replaces what was known, its slot is
//! retired at once and its bits are cleared as their pages move or drop; a slot is given out again only when none can be left.

mod holders;
mod table;

use holders::{Held, Holders, SlotSet};
use kv_cache::PageHash;
use table::Table;

/// Pages that a walk skips where it can.
const STRIDE: usize = 32;
/// Strides that a walk moves to the young generation at most: what is left of a long prompt moves when it is asked for again.
const MOVES: usize = 32;

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
    young: Table,
    old: Table,
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
            young: Table::default(),
            old: Table::default(),
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
        // Every number was used and is still in some page. Clear them all, once in 65,534 lives.
        let dead = std::mem::take(&mut self.slots.dead);
        self.young.strip(&dead);
        self.old.strip(&dead);
        self.slots.retired.iter_mut().for_each(|(_, turn)| *turn = 0);
        self.turns = self.turns.max(2);
        self.slots.reuse(self.turns).expect("65,534 workers are not attached at once")
    }

    /// Forgets all that `slot` holds.
    pub fn retire(&mut self, slot: Slot) {
        self.slots.dead.insert(slot);
        self.slots.retired.push((slot, self.turns));
    }

    /// Notes that `slot` holds these pages.
    pub fn store(&mut self, slot: Slot, pages: impl IntoIterator<Item = PageHash>) {
        for name in pages.into_iter().map(name) {
            match self.young.find(name) {
                Ok(at) => self.young.add(at, slot),
                Err(_) => {
                    let mut holders = self.take_old(name).unwrap_or_else(|| Holders::one(slot));
                    holders.insert(slot);
                    self.insert(name, holders);
                }
            }
            if self.young.bytes() > self.generation_bytes {
                self.turn();
            }
        }
    }

    /// Notes that `slot` no longer holds these pages.
    pub fn evict(&mut self, slot: Slot, pages: impl IntoIterator<Item = PageHash>) {
        for name in pages.into_iter().map(name) {
            self.young.remove(name, slot);
            self.old.remove(name, slot);
        }
    }

    /// Fills `leading`, indexed by slot, with how many of the first `pages` each holds without a hole.
    pub fn matches(&mut self, pages: &[PageHash], leading: &mut Vec<u32>) {
        leading.clear();
        leading.resize(usize::from(self.slots.used), 0);
        // Who holds the first `count` pages.
        let Some(mut alive) = self.holders_of_first(pages) else { return };
        let (mut count, mut moves) = (1, MOVES);
        while count < pages.len() && !alive.is_empty() {
            // Too few for a stride are walked one by one.
            let next = if count + STRIDE <= pages.len() { count + STRIDE } else { count + 1 };
            if moves > 0 && self.young.find(name(pages[next - 1])).is_err() {
                // What is in the old generation is walked to, so that all of it moves.
                pages[count..next].iter().for_each(|&page| self.refresh(name(page)));
                moves -= 1;
            }
            let mut lost = self.get(pages[next - 1]).map_or_else(|| alive.iter().collect(), |held| held.lacks(&alive));
            if !lost.is_empty() {
                lost.iter().for_each(|&slot| alive.remove(slot));
                self.settle(pages, count, next - 1, &mut lost, leading);
            }
            count = next;
        }
        alive.iter().for_each(|slot| leading[slot.index()] = count as u32);
    }

    fn holders_of_first(&mut self, pages: &[PageHash]) -> Option<SlotSet> {
        let first = *pages.first()?;
        self.refresh(name(first));
        Some(self.get(first)?.to_set())
    }

    fn get(&self, page: PageHash) -> Option<Held<'_>> {
        self.young.get(name(page)).or_else(|| self.old.get(name(page)))
    }

    /// Finds how far each of `lost` comes, who hold the first `least` pages and lack the page at `most`.
    fn settle(&self, pages: &[PageHash], least: usize, most: usize, lost: &mut [Slot], leading: &mut [u32]) {
        if lost.is_empty() {
            return;
        }
        if least == most {
            lost.iter().for_each(|slot| leading[slot.index()] = least as u32);
            return;
        }
        let middle = (least + most) / 2;
        let held = self.get(pages[middle]);
        let have = partition(lost, |slot| held.is_some_and(|held| held.contains(slot)));
        let (have, lack) = lost.split_at_mut(have);
        self.settle(pages, middle + 1, most, have, leading);
        self.settle(pages, least, middle, lack, leading);
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.young.bytes() + self.old.bytes()
    }

    /// Pages known.
    pub fn pages(&self) -> usize {
        self.young.pages() + self.old.pages()
    }

    /// Makes sure that a known page is in the young generation.
    fn refresh(&mut self, name: u64) {
        if self.young.find(name).is_err()
            && let Some(holders) = self.take_old(name)
        {
            self.insert(name, holders);
        }
    }

    /// Takes a page out of the old generation, if somebody is left who holds it.
    fn take_old(&mut self, name: u64) -> Option<Holders> {
        let mut holders = self.old.take(name)?;
        holders.keep(|slot| !self.slots.dead.contains(slot));
        (!holders.is_empty()).then_some(holders)
    }

    /// Adds a page that the young generation does not know. Of a budget that is too small for even one page nothing comes.
    fn insert(&mut self, name: u64, holders: Holders) {
        if !self.young.make_room(self.generation_bytes) && !self.young.is_empty() {
            self.turn();
        }
        if self.young.make_room(self.generation_bytes) {
            self.young.insert(name, holders);
        }
    }

    fn turn(&mut self) {
        self.turns += 1;
        self.old = std::mem::take(&mut self.young);
    }
}

/// What the index keeps of a page's name.
fn name(page: PageHash) -> u64 {
    (page.0 as u64).min(u64::MAX - 1)
}

/// Moves those for whom `is_first` to the front. Returns how many they are.
fn partition(slots: &mut [Slot], is_first: impl Fn(Slot) -> bool) -> usize {
    let mut first = 0;
    for at in 0..slots.len() {
        if is_first(slots[at]) {
            slots.swap(first, at);
            first += 1;
        }
    }
    first
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
    /// Numbers end where a [`Table`] could not hold them.
    const MOST: u16 = u16::MAX - 1;

    fn fresh(&mut self) -> Option<Slot> {
        let slot = Slot(self.used);
        self.used = self.used.checked_add(1).filter(|&used| used <= Self::MOST)?;
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
