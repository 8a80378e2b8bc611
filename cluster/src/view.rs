//! Everybody, as far as the directory knows: how its lists and changes merge into one [`View`]. Pure: time is an argument.
//!
//! The rule that matters is what happens around an outage. Leases run out while nobody can renew them, so a directory that
//! comes back may say, for some seconds, that members are gone which are alive and about to register again. Dropping them would
//! turn an outage of the directory into an outage of the service. Therefore:
//!
//! - while the directory cannot be reached, the last view stays in force, marked as not connected;
//! - from its return on, for the *grace*, nobody is dropped: neither who is missing from the list nor who is removed by a
//!   change (an expired lease is deleted some time after the return, and looks like a leave). Who is then still missing goes.
//!
//! The grace is the lease's time to live plus two seconds: an etcd that comes back gives every lease it still knows its full
//! time to live again, so no later can a lease that the outage killed run out, and a member that lives needs at most one
//! backoff and two calls, which the two seconds cover, to register anew. The price is that a member which left during an outage, or
//! just after it, stays in the view a few seconds longer; those who use the view probe members directly anyway.

use crate::Member;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// Everybody, by member id, and whether the directory itself can be reached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// The members last known.
    pub members: BTreeMap<String, Member>,
    /// False while the directory cannot be reached: `members` is then the last view, and leaving it is not noticed.
    pub connected: bool,
}

/// How long after an outage nobody is dropped, for leases of this time to live.
pub(crate) fn grace(lease_ttl: Duration) -> Duration {
    lease_ttl + Duration::from_secs(2)
}

/// How much a merge changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    /// Nothing that shows.
    Nothing,
    /// Only load.
    Load,
    /// Who is here, in what state, or whether the directory is.
    Members,
}

/// The view and what must be remembered to merge into it.
#[derive(Debug)]
pub(crate) struct Roster {
    members: BTreeMap<String, Entry>,
    connected: bool,
    grace: Duration,
    /// Until when nobody is dropped; set when the directory comes back.
    settles_at: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    member: Member,
    /// The directory does not list it (any more): it goes when the view settles.
    missing: bool,
}

impl Roster {
    pub(crate) fn new(grace: Duration) -> Self {
        Self { members: BTreeMap::new(), connected: false, grace, settles_at: None }
    }

    /// The directory cannot be reached: everybody stays.
    pub(crate) fn disconnected(&mut self) -> Change {
        // Nobody is dropped while disconnected either; the next list starts a new grace.
        self.settles_at = None;
        if std::mem::replace(&mut self.connected, false) { Change::Members } else { Change::Nothing }
    }

    /// The directory listed all its members. After an outage the grace begins; in the midst of a connection the list is
    /// simply the truth.
    pub(crate) fn listed(&mut self, now: Instant, list: BTreeMap<String, Member>) -> Change {
        let mut change = Change::Nothing;
        if !self.connected {
            self.connected = true;
            self.settles_at = Some(now + self.grace);
            change = Change::Members;
        }
        let gone: Vec<String> = self.members.keys().filter(|id| !list.contains_key(*id)).cloned().collect();
        for id in gone {
            change = change.max(self.removed(now, &id));
        }
        for member in list.into_values() {
            change = change.max(self.put(member));
        }
        change
    }

    /// The directory says that this member is here, or has changed.
    pub(crate) fn put(&mut self, member: Member) -> Change {
        let id = member.id.clone();
        let Some(old) = self.members.insert(id.clone(), Entry { member, missing: false }) else {
            return Change::Members;
        };
        let new = &self.members[&id].member;
        if *new == old.member {
            Change::Nothing
        } else if *new == (Member { load: new.load.clone(), ..old.member }) {
            Change::Load
        } else {
            Change::Members
        }
    }

    /// The directory says that this member left, or that its lease ran out.
    pub(crate) fn removed(&mut self, now: Instant, id: &str) -> Change {
        match self.members.get_mut(id) {
            Some(entry) if self.settles_at.is_some_and(|at| now < at) => {
                entry.missing = true;
                Change::Nothing
            }
            Some(_) => {
                self.members.remove(id);
                Change::Members
            }
            None => Change::Nothing,
        }
    }

    /// Drops who is missing once the view has settled. To be called at [`Roster::settles_at`].
    pub(crate) fn settle(&mut self, now: Instant) -> Change {
        if self.settles_at.is_none_or(|at| now < at) {
            return Change::Nothing;
        }
        self.settles_at = None;
        let before = self.members.len();
        self.members.retain(|_, entry| !entry.missing);
        if self.members.len() < before { Change::Members } else { Change::Nothing }
    }

    /// Until when nobody is dropped.
    pub(crate) fn settles_at(&self) -> Option<Instant> {
        self.settles_at
    }

    /// Returns the view to publish.
    pub(crate) fn view(&self) -> View {
        let members = self.members.iter().map(|(id, entry)| (id.clone(), entry.member.clone())).collect();
        View { members, connected: self.connected }
    }
}

#[cfg(test)]
mod tests;
