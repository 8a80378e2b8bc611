//! Pages by name, sixteen bytes each, one after the other.
//!
//! Names are hashes, so a name says by itself about where in the table it stands: entries are sorted by it, with gaps, and a search begins
//! where the name should be and goes up until it has been passed (ordered linear probing: Amble and Knuth, "Ordered hash tables", Computer Journal
//! 17(2), 1974). That is one or two lines of memory, whether the page is known or not, where a table with control bytes reads two places
//! far apart. Sorted, a table grows in one sweep, and to any size: a budget is used to the end.

use super::{
    Slot,
    holders::{Few, Held, Holders, SlotSet},
};

/// Pages and who holds them.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Sorted by name, each at its home or behind it; the last one is always free.
    entries: Vec<Entry>,
    /// Places that a name can be at home in. Behind them stands what found no place before the end.
    homes: usize,
    pages: usize,
    /// Of pages that many hold; a free place is empty.
    sets: Vec<SlotSet>,
    free_sets: Vec<u32>,
    /// Bytes of those sets.
    set_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Above every name where there is no page.
    name: u64,
    /// [`Few`], or [`MANY`] and the number of a set.
    holders: u64,
}

const FREE: Entry = Entry { name: u64::MAX, holders: 0 };
/// No slot is as large.
const MANY: u64 = 0xffff << 48;
/// The least a table has.
const LEAST: usize = 64;

/// Where a page is, or where it would have to go.
pub(super) type Place = Result<usize, usize>;

impl Table {
    /// Pages a table of so many homes holds: four in five, or runs get long.
    fn most_pages(homes: usize) -> usize {
        homes * 4 / 5
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages == 0
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>() + self.set_bytes
    }

    pub(super) fn find(&self, name: u64) -> Place {
        if self.entries.is_empty() {
            return Err(0);
        }
        let mut at = self.home(name);
        while self.entries[at].name < name {
            at += 1;
        }
        if self.entries[at].name == name { Ok(at) } else { Err(at) }
    }

    pub(super) fn get(&self, name: u64) -> Option<Held<'_>> {
        let Entry { holders, .. } = self.entries[self.find(name).ok()?];
        Some(if holders & MANY == MANY {
            Held::Many(&self.sets[holders as u32 as usize])
        } else {
            Held::Few(Few(holders))
        })
    }

    /// Makes sure that one more page has room within `most_bytes`. Returns false where it has none. Places change.
    pub(super) fn make_room(&mut self, most_bytes: usize) -> bool {
        if self.pages < Self::most_pages(self.homes) && self.bytes() + size_of::<Entry>() <= most_bytes {
            return true;
        }
        let most = most_bytes.saturating_sub(self.set_bytes) / size_of::<Entry>();
        // Room for those that find none before the end: the longest run of a table so full is some hundred places long.
        let most = most.saturating_sub(2 + (most / 32).min(1_024));
        let homes = (self.homes * 2).max(LEAST).min(most);
        if homes <= self.homes || self.pages >= Self::most_pages(homes) {
            return false;
        }
        self.spread(homes);
        true
    }

    /// Adds a page that is not here, and for which there is room.
    pub(super) fn insert(&mut self, name: u64, holders: Holders) {
        let Err(at) = self.find(name) else { unreachable!("the page is not here") };
        let mut gap = at;
        while self.entries[gap] != FREE {
            gap += 1;
        }
        self.entries.copy_within(at..gap, at + 1);
        if gap + 1 == self.entries.len() {
            self.entries.push(FREE);
        }
        let holders = self.pack(holders);
        self.entries[at] = Entry { name, holders };
        self.pages += 1;
    }

    /// Notes that `slot` holds the page at `at`.
    pub(super) fn add(&mut self, at: usize, slot: Slot) {
        let mut holders = self.unpack(at);
        holders.insert(slot);
        self.entries[at].holders = self.pack(holders);
    }

    /// Notes that `slot` does not hold a page, if it is here.
    pub(super) fn remove(&mut self, name: u64, slot: Slot) {
        let Ok(at) = self.find(name) else { return };
        let mut holders = self.unpack(at);
        holders.keep(|held| held != slot);
        if holders.is_empty() {
            self.close(at);
        } else {
            self.entries[at].holders = self.pack(holders);
        }
    }

    /// Takes a page out.
    pub(super) fn take(&mut self, name: u64) -> Option<Holders> {
        let at = self.find(name).ok()?;
        let holders = self.unpack(at);
        self.close(at);
        Some(holders)
    }

    /// Takes slots out of all pages.
    pub(super) fn strip(&mut self, dead: &SlotSet) {
        for at in (0..self.entries.len()).filter(|&at| self.entries[at] != FREE).collect::<Vec<_>>() {
            let mut holders = self.unpack(at);
            holders.keep(|slot| !dead.contains(slot));
            if holders.is_empty() {
                self.entries[at] = FREE;
                self.pages -= 1;
            } else {
                self.entries[at].holders = self.pack(holders);
            }
        }
        self.spread(self.homes);
    }

    /// Names are uniform: the share of all names that is below one is the share of the table before its home.
    fn home(&self, name: u64) -> usize {
        ((u128::from(name) * self.homes as u128) >> 64) as usize
    }

    /// Lets those behind `at` move up that are not at home.
    fn close(&mut self, mut at: usize) {
        while self.entries[at + 1] != FREE && self.home(self.entries[at + 1].name) <= at {
            self.entries[at] = self.entries[at + 1];
            at += 1;
        }
        self.entries[at] = FREE;
        self.pages -= 1;
    }

    /// Sets all entries anew, in a table of so many homes.
    fn spread(&mut self, homes: usize) {
        let old = std::mem::replace(&mut self.entries, vec![FREE; homes + 1]);
        self.homes = homes;
        let mut next = 0;
        for entry in old.into_iter().filter(|entry| *entry != FREE) {
            let at = self.home(entry.name).max(next);
            next = at + 1;
            if next >= self.entries.len() {
                self.entries.resize(next + 1, FREE);
            }
            self.entries[at] = entry;
        }
    }

    /// Takes the holders out of the entry at `at`, which has to get others or go.
    fn unpack(&mut self, at: usize) -> Holders {
        let packed = self.entries[at].holders;
        if packed & MANY != MANY {
            return Holders::Few(Few(packed));
        }
        let set = std::mem::take(&mut self.sets[packed as u32 as usize]);
        self.set_bytes -= set.bytes();
        self.free_sets.push(packed as u32);
        Holders::Many(set)
    }

    fn pack(&mut self, holders: Holders) -> u64 {
        let set = match holders {
            Holders::Few(few) => return few.0,
            Holders::Many(set) => set,
        };
        self.set_bytes += set.bytes();
        let number = self.free_sets.pop().unwrap_or_else(|| {
            self.sets.push(SlotSet::default());
            (self.sets.len() - 1) as u32
        });
        self.sets[number as usize] = set;
        MANY | u64::from(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_page_takes_sixteen_bytes() {
        assert_eq!(size_of::<Entry>(), 16);
    }

    #[test]
    fn a_table_is_filled_to_four_fifths_of_any_budget() {
        for budget in [5_000, 70_001, 1 << 20] {
            let mut table = Table::default();
            let mut name = 0u64;
            while table.make_room(budget) {
                name = name.wrapping_add(0x9e37_79b9_7f4a_7c15);
                table.insert(name, Holders::one(Slot(1)));
            }
            assert!(table.bytes() <= budget && table.pages() >= budget / 21, "{} in {budget}", table.pages());
        }
    }

    proptest! {
        /// Names at the ends of the range, where runs are pushed over the edge, and close together.
        #[test]
        fn agrees_with_a_map(ops in proptest::collection::vec((any::<bool>(), 0u64..40, 0u16..9), 0..300)) {
            let name = |n: u64| if n < 20 { n } else { u64::MAX - 1 - n };
            let (mut table, mut map) = (Table::default(), BTreeMap::<u64, Vec<u16>>::new());
            for (store, n, slot) in ops {
                let name = name(n);
                if store {
                    prop_assert!(table.make_room(1 << 20));
                    match table.find(name) {
                        Ok(at) => table.add(at, Slot(slot)),
                        Err(_) => table.insert(name, Holders::one(Slot(slot))),
                    }
                    let held = map.entry(name).or_default();
                    if !held.contains(&slot) {
                        held.push(slot);
                    }
                } else {
                    table.remove(name, Slot(slot));
                    if let Some(held) = map.get_mut(&name) {
                        held.retain(|&other| other != slot);
                        if held.is_empty() {
                            map.remove(&name);
                        }
                    }
                }
                prop_assert!(table.entries.iter().filter(|entry| **entry != FREE).is_sorted_by_key(|entry| entry.name));
            }
            prop_assert_eq!(table.pages(), map.len());
            for n in 0..40 {
                let held = table.get(name(n));
                prop_assert_eq!(held.is_some(), map.contains_key(&name(n)));
                for slot in 0..9 {
                    let wanted = map.get(&name(n)).is_some_and(|held| held.contains(&slot));
                    prop_assert_eq!(held.is_some_and(|held| held.contains(Slot(slot))), wanted);
                }
            }
            let sets: usize = table.sets.iter().filter(|set| !set.is_empty()).map(SlotSet::bytes).sum();
            prop_assert_eq!(table.set_bytes, sets);
        }
    }
}
