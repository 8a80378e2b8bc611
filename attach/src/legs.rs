//! The legs that live on a worker, with their deadlines.

use crate::{LegId, StreamId};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Every live leg with what its worker knows of it. Time is counted from a moment of the caller's choice.
#[derive(Debug)]
pub struct Legs<T> {
    live: BTreeMap<LegId, Slot<T>>,
    deadlines: BTreeSet<(Duration, LegId)>,
}

#[derive(Debug)]
struct Slot<T> {
    leg: T,
    deadline: Option<Duration>,
}

/// A router used the same attempt id for two legs that live at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("attempt {} is live already", .0.attempt)]
pub struct Duplicate(pub LegId);

impl<T> Default for Legs<T> {
    fn default() -> Self {
        Self { live: BTreeMap::new(), deadlines: BTreeSet::new() }
    }
}

impl<T> Legs<T> {
    /// Adds a leg that must have ended at `deadline`.
    pub fn insert(&mut self, id: LegId, leg: T, deadline: Option<Duration>) -> Result<(), Duplicate> {
        if self.live.contains_key(&id) {
            return Err(Duplicate(id));
        }
        self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        self.live.insert(id, Slot { leg, deadline });
        Ok(())
    }

    /// Returns a leg.
    pub fn get(&self, id: LegId) -> Option<&T> {
        self.live.get(&id).map(|slot| &slot.leg)
    }

    /// Returns a leg, to change it.
    pub fn get_mut(&mut self, id: LegId) -> Option<&mut T> {
        self.live.get_mut(&id).map(|slot| &mut slot.leg)
    }

    /// Takes a leg out.
    pub fn remove(&mut self, id: LegId) -> Option<T> {
        let slot = self.live.remove(&id)?;
        if let Some(deadline) = slot.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        Some(slot.leg)
    }

    /// Returns the legs of one router.
    pub fn of_stream(&self, stream: StreamId) -> Vec<LegId> {
        let (first, last) = (LegId { stream, attempt: 0 }, LegId { stream, attempt: u64::MAX });
        self.live.range(first..=last).map(|(id, _)| *id).collect()
    }

    /// Returns all legs.
    pub fn ids(&self) -> Vec<LegId> {
        self.live.keys().copied().collect()
    }

    /// Returns the legs whose deadline is `now` or before.
    pub fn overdue(&self, now: Duration) -> Vec<LegId> {
        self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now).map(|(_, id)| *id).collect()
    }

    /// Returns the next deadline.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Says whether there is none.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(stream: u64, attempt: u64) -> LegId {
        LegId { stream: StreamId(stream), attempt }
    }

    #[test]
    fn attempts_are_unique_per_stream() {
        let mut legs = Legs::default();
        assert_eq!(legs.insert(id(1, 1), 'a', None), Ok(()));
        assert_eq!(legs.insert(id(2, 1), 'b', None), Ok(()));
        assert_eq!(legs.insert(id(1, 1), 'c', None), Err(Duplicate(id(1, 1))));
        assert_eq!(legs.of_stream(StreamId(1)), [id(1, 1)]);
        assert_eq!(legs.remove(id(1, 1)), Some('a'));
        assert_eq!(legs.insert(id(1, 1), 'd', None), Ok(()));
    }

    #[test]
    fn deadlines_leave_with_their_legs() {
        let at = Duration::from_millis;
        let mut legs = Legs::default();
        legs.insert(id(1, 1), (), Some(at(30))).unwrap();
        legs.insert(id(1, 2), (), Some(at(10))).unwrap();
        legs.insert(id(1, 3), (), None).unwrap();
        assert_eq!(legs.next_deadline(), Some(at(10)));
        assert_eq!(legs.overdue(at(9)), []);
        assert_eq!(legs.overdue(at(30)), [id(1, 2), id(1, 1)]);
        legs.remove(id(1, 2));
        assert_eq!(legs.next_deadline(), Some(at(30)));
    }
}
