//! What was worked out lately, within a budget of bytes.
//!
//! A map from bytes to a list, cut into shards so that threads seldom meet. The drop rule is the prefix index's: each shard has two
//! generations of at most half of its budget. Entries go into the young one; when that is full, the old one is dropped whole
//! and the young one grows old. What is found in the old one moves back to the young. So what is dropped first was neither made nor
//! found for longest, and dropping costs no search. Something dropped is worked out again.

use foldhash::fast::RandomState;
use std::{
    collections::HashMap,
    mem::{size_of_val, take},
    sync::{Mutex, PoisonError},
};

/// Shards of a map.
const SHARDS: usize = 16;

/// What an entry takes beside its bytes: its slot in a table that is between 44 % and 88 % full, and the heads of two allocations.
const ENTRY_BYTES: usize = 112;

/// See the module. `T` is what lists hold.
#[derive(Debug)]
pub(crate) struct Recent<T> {
    shards: [Mutex<Shard<T>>; SHARDS],
    /// Most bytes of one generation of one shard.
    generation_bytes: usize,
}

/// Its hash has a random key and is no more than fast: a shard's budget bounds what colliding keys can cost.
type Generation<T> = HashMap<Box<[u8]>, Box<[T]>, RandomState>;

#[derive(Debug)]
struct Shard<T> {
    young: Generation<T>,
    young_bytes: usize,
    old: Generation<T>,
    old_bytes: usize,
}

impl<T: Copy> Recent<T> {
    /// Holds at most `budget_bytes`.
    pub(crate) fn new(budget_bytes: usize) -> Self {
        let map = HashMap::default;
        let shard = || Shard { young: map(), young_bytes: 0, old: map(), old_bytes: 0 };
        Self { shards: std::array::from_fn(|_| Mutex::new(shard())), generation_bytes: budget_bytes / SHARDS / 2 }
    }

    /// Appends the list that `key` stands for to `out`; says whether there is one.
    pub(crate) fn get(&self, key: &[u8], out: &mut Vec<T>) -> bool {
        self.with(key, |shard| {
            if let Some(list) = shard.young.get(key) {
                out.extend_from_slice(list);
                return true;
            }
            let Some((key, list)) = shard.old.remove_entry(key) else { return false };
            shard.old_bytes -= bytes(&key, &list);
            out.extend_from_slice(&list);
            shard.insert(key, list, self.generation_bytes);
            true
        })
    }

    /// Notes what `key` stands for.
    pub(crate) fn insert(&self, key: &[u8], list: &[T]) {
        // Copied before the lock is taken.
        let (owned, list): (Box<[u8]>, Box<[T]>) = (key.into(), list.into());
        self.with(key, |shard| shard.insert(owned, list, self.generation_bytes));
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> usize {
        let held = |shard: &Mutex<Shard<T>>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.young_bytes + shard.old_bytes
        };
        self.shards.iter().map(held).sum()
    }

    /// The map is whole between any two statements that could panic, so a poisoned lock is as good as another.
    fn with<R>(&self, key: &[u8], work: impl FnOnce(&mut Shard<T>) -> R) -> R {
        // Spreads well enough for locks.
        let ends = [key.first(), key.last(), key.get(key.len() / 2)].map(|byte| usize::from(*byte.unwrap_or(&0)));
        let shard = (ends[0] + 3 * ends[1] + 7 * ends[2] + key.len()) % SHARDS;
        work(&mut self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> Shard<T> {
    fn insert(&mut self, key: Box<[u8]>, list: Box<[T]>, most: usize) {
        let added = bytes(&key, &list);
        if added > most {
            return;
        }
        if self.young_bytes + added > most {
            (self.old, self.old_bytes) = (take(&mut self.young), take(&mut self.young_bytes));
        }
        self.young_bytes += added;
        // Two threads may have worked the same out at once.
        if self.young.insert(key, list).is_some() {
            self.young_bytes -= added;
        }
    }
}

fn bytes<T>(key: &[u8], list: &[T]) -> usize {
    key.len() + size_of_val(list) + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(recent: &Recent<u32>, key: &str) -> Option<Vec<u32>> {
        let mut out = vec![7];
        recent.get(key.as_bytes(), &mut out).then(|| out[1..].to_vec())
    }

    #[test]
    fn what_was_noted_is_found() {
        let recent = Recent::new(1 << 20);
        assert_eq!(found(&recent, "a"), None);
        recent.insert(b"a", &[1, 2]);
        recent.insert(b"", &[]);
        assert_eq!((found(&recent, "a"), found(&recent, "")), (Some(vec![1, 2]), Some(vec![])));
    }

    #[test]
    fn bytes_stay_within_the_budget_and_what_is_used_stays() {
        let recent = Recent::new(256 << 10);
        recent.insert(b"kept", &[1]);
        for i in 0..100_000u32 {
            recent.insert(format!("{i} and more text").as_bytes(), &[i]);
            if i % 8 == 0 {
                assert_eq!(found(&recent, "kept"), Some(vec![1]), "after {i}");
            }
            if i % 1_000 == 0 {
                assert!(recent.bytes() <= 256 << 10, "{} bytes", recent.bytes());
            }
        }
        assert_eq!(found(&recent, "17 and more text"), None);
        assert!(recent.bytes() > 128 << 10);
    }

    #[test]
    fn the_same_twice_is_counted_once_and_too_much_is_not_kept() {
        let recent = Recent::new(64 << 10);
        for _ in 0..10_000 {
            recent.insert(b"same", &[1, 2, 3]);
        }
        assert_eq!(recent.bytes(), bytes(b"same", &[1u32, 2, 3]));
        recent.insert(b"large", &[0; 10_000]);
        assert_eq!(found(&recent, "large"), None);
    }
}
