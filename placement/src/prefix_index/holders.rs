//! The workers that hold one page, in eight bytes as long as they are few.

use super::Slot;

/// The slots that hold a page.
#[derive(Debug)]
pub(super) enum Holders {
    Few(Few),
    Many(SlotSet),
}

impl Holders {
    pub(super) fn one(slot: Slot) -> Self {
        Self::Few(Few::default().with(slot).expect("there is room for one"))
    }

    pub(super) fn insert(&mut self, slot: Slot) {
        match self {
            Self::Few(few) => match few.with(slot) {
                Some(more) => *few = more,
                None => {
                    let mut set: SlotSet = few.iter().collect();
                    set.insert(slot);
                    *self = Self::Many(set);
                }
            },
            Self::Many(set) => set.insert(slot),
        }
    }

    pub(super) fn keep(&mut self, keep: impl Fn(Slot) -> bool) {
        match self {
            Self::Few(few) => *few = few.iter().filter(|&slot| keep(slot)).fold(Few::default(), Few::pushed),
            Self::Many(set) => set.keep(keep),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few(few) => few.0 == 0,
            Self::Many(set) => set.is_empty(),
        }
    }
}

/// The same, as they stand in a table.
#[derive(Clone, Copy, Debug)]
pub(super) enum Held<'a> {
    Few(Few),
    Many(&'a SlotSet),
}

impl Held<'_> {
    pub(super) fn contains(self, slot: Slot) -> bool {
        match self {
            Self::Few(few) => few.contains(slot),
            Self::Many(set) => set.contains(slot),
        }
    }

    /// Returns those of `slots` that are not here.
    pub(super) fn lacks(self, slots: &SlotSet) -> Vec<Slot> {
        match self {
            Self::Few(few) => slots.iter().filter(|&slot| !few.contains(slot)).collect(),
            Self::Many(set) => {
                let lacking = |(at, word): (usize, &u64)| (at, word & !set.words.get(at).copied().unwrap_or(0));
                slots.words.iter().enumerate().map(lacking).flat_map(bits).collect()
            }
        }
    }

    pub(super) fn to_set(self) -> SlotSet {
        match self {
            Self::Few(few) => few.iter().collect(),
            Self::Many(set) => set.clone(),
        }
    }
}

/// Up to four slots: each plus one in sixteen bits, the first in the lowest; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Few(pub(super) u64);

impl Few {
    const LANES: u32 = 4;

    fn iter(self) -> impl Iterator<Item = Slot> {
        let lane = move |lane: u32| (self.0 >> (16 * lane)) as u16;
        (0..Self::LANES).map_while(move |number| lane(number).checked_sub(1).map(Slot))
    }

    fn contains(self, slot: Slot) -> bool {
        self.iter().any(|held| held == slot)
    }

    /// Returns this with `slot`; `None` where there is no room for it.
    fn with(self, slot: Slot) -> Option<Self> {
        if self.contains(slot) {
            return Some(self);
        }
        (self.iter().count() < Self::LANES as usize).then(|| self.pushed(slot))
    }

    fn pushed(self, slot: Slot) -> Self {
        Self(self.0 | (u64::from(slot.0) + 1) << (16 * self.iter().count()))
    }
}

/// A set of slots, one bit each.
#[derive(Clone, Debug, Default)]
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

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.words.capacity() * size_of::<u64>()
    }

    fn keep(&mut self, keep: impl Fn(Slot) -> bool) {
        let gone: Vec<Slot> = self.iter().filter(|&slot| !keep(slot)).collect();
        gone.into_iter().for_each(|slot| self.remove(slot));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.words.iter().copied().enumerate().flat_map(bits)
    }
}

/// Returns the slots of word `at` of a set.
fn bits((at, word): (usize, u64)) -> impl Iterator<Item = Slot> {
    let next = |rest: &u64| Some(rest & (rest - 1)).filter(|&rest| rest != 0);
    let bits = std::iter::successors(Some(word).filter(|&word| word != 0), next);
    bits.map(move |rest| Slot((at * 64) as u16 + rest.trailing_zeros() as u16))
}

impl FromIterator<Slot> for SlotSet {
    fn from_iter<I: IntoIterator<Item = Slot>>(slots: I) -> Self {
        let mut set = Self::default();
        slots.into_iter().for_each(|slot| set.insert(slot));
        set
    }
}
