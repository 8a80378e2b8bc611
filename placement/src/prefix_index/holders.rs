//! The workers that hold one page, in 16 bytes as long as they are few.

use super::Slot;
use std::mem::size_of;

/// The slots that hold a page.
#[derive(Debug)]
pub(super) enum Holders {
    Few { len: u8, slots: [Slot; 6] },
    Many(Box<SlotSet>),
}

impl Holders {
    pub(super) fn one(slot: Slot) -> Self {
        Self::Few { len: 1, slots: [slot; 6] }
    }

    pub(super) fn insert(&mut self, slot: Slot) {
        match self {
            Self::Few { len, slots } => {
                let held = &slots[..usize::from(*len)];
                if held.contains(&slot) {
                } else if held.len() < slots.len() {
                    slots[usize::from(*len)] = slot;
                    *len += 1;
                } else {
                    let mut set = SlotSet::default();
                    held.iter().for_each(|&s| set.insert(s));
                    set.insert(slot);
                    *self = Self::Many(Box::new(set));
                }
            }
            Self::Many(set) => set.insert(slot),
        }
    }

    pub(super) fn remove(&mut self, slot: Slot) {
        self.keep(|s| s != slot);
    }

    pub(super) fn strip(&mut self, dead: &SlotSet) {
        self.keep(|s| !dead.contains(s));
    }

    fn keep(&mut self, keep: impl Fn(Slot) -> bool) {
        match self {
            Self::Few { len, slots } => {
                let mut kept = 0;
                for i in 0..usize::from(*len) {
                    if keep(slots[i]) {
                        slots[kept] = slots[i];
                        kept += 1;
                    }
                }
                *len = kept as u8;
            }
            Self::Many(set) => set.keep(keep),
        }
    }

    fn contains(&self, slot: Slot) -> bool {
        match self {
            Self::Few { len, slots } => slots[..usize::from(*len)].contains(&slot),
            Self::Many(set) => set.contains(slot),
        }
    }

    /// Says whether all of `slots` are here.
    pub(super) fn cover(&self, slots: &SlotSet) -> bool {
        match self {
            Self::Few { .. } => slots.iter().all(|slot| self.contains(slot)),
            Self::Many(set) => {
                slots.words.iter().enumerate().all(|(i, word)| word & !set.words.get(i).copied().unwrap_or(0) == 0)
            }
        }
    }

    /// Leaves in `slots` those that are here, and names the others.
    pub(super) fn intersect(&self, slots: &mut SlotSet, gone: impl FnMut(Slot)) {
        if !self.cover(slots) {
            let missing: Vec<Slot> = slots.iter().filter(|&slot| !self.contains(slot)).collect();
            missing.iter().for_each(|&slot| slots.remove(slot));
            missing.into_iter().for_each(gone);
        }
    }

    pub(super) fn for_each(&self, mut each: impl FnMut(Slot)) {
        match self {
            Self::Few { len, slots } => slots[..usize::from(*len)].iter().for_each(|&slot| each(slot)),
            Self::Many(set) => set.iter().for_each(each),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few { len, .. } => *len == 0,
            Self::Many(set) => set.is_empty(),
        }
    }

    pub(super) fn spilled_bytes(&self) -> usize {
        match self {
            Self::Few { .. } => 0,
            Self::Many(set) => size_of::<SlotSet>() + set.words.capacity() * size_of::<u64>(),
        }
    }
}

/// A set of slots, one bit each.
#[derive(Debug, Default)]
pub(super) struct SlotSet {
    words: Vec<u64>,
}

impl SlotSet {
    pub(super) fn insert(&mut self, slot: Slot) {
        let (word, bit) = (slot.index() / 64, slot.index() % 64);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << bit;
    }

    pub(super) fn remove(&mut self, slot: Slot) {
        if let Some(word) = self.words.get_mut(slot.index() / 64) {
            *word &= !(1 << (slot.index() % 64));
        }
    }

    pub(super) fn contains(&self, slot: Slot) -> bool {
        self.words.get(slot.index() / 64).is_some_and(|word| word >> (slot.index() % 64) & 1 == 1)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    fn keep(&mut self, keep: impl Fn(Slot) -> bool) {
        let gone: Vec<Slot> = self.iter().filter(|&slot| !keep(slot)).collect();
        gone.into_iter().for_each(|slot| self.remove(slot));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
            let next = |rest: &u64| Some(rest & (rest - 1)).filter(|&rest| rest != 0);
            let bits = std::iter::successors(Some(word).filter(|&word| word != 0), next);
            bits.map(move |rest| Slot((i * 64) as u16 + rest.trailing_zeros() as u16))
        })
    }
}
