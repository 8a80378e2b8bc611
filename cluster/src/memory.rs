//! The directory of one process: what `baton up` and tests use.
//!
//! It keeps the promises of the one over etcd (ids are unique, load is coalesced, dropping leaves) without a lease, since
//! members cannot be lost without the directory.

use crate::{
    Directory, Error, Member, Registration, View,
    directory::check_name,
    registration::{Due, Pace, Publisher, Wanted},
};
use async_trait::async_trait;
use std::{collections::BTreeMap, sync::Arc};
use tokio::{sync::watch, time::Instant};

/// Members of one process. Cloning shares the directory.
#[derive(Clone, Debug)]
pub struct MemoryDirectory {
    view: Arc<watch::Sender<Arc<View>>>,
}

impl Default for MemoryDirectory {
    fn default() -> Self {
        let view = View { connected: true, ..Default::default() };
        Self { view: Arc::new(watch::Sender::new(Arc::new(view))) }
    }
}

#[async_trait]
impl Directory for MemoryDirectory {
    async fn register(&self, mut member: Member) -> Result<Registration, Error> {
        check_name("member id", &member.id)?;
        self.enter(&mut member)?;
        let wanted = Wanted { state: member.state, load: member.load.clone() };
        let directory = self.clone();
        Ok(Registration::spawn(wanted, member.incarnation, |publisher| directory.publish(member, publisher)))
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }
}

impl MemoryDirectory {
    /// Puts `member` into the view, under a larger incarnation where it takes over its own slot.
    fn enter(&self, member: &mut Member) -> Result<(), Error> {
        let mut refused = None;
        self.view.send_if_modified(|view| {
            if let Some(there) = view.members.get(&member.id) {
                if there.address != member.address {
                    refused = Some(Error::Taken { id: member.id.clone(), address: there.address.clone() });
                    return false;
                }
                member.incarnation = member.incarnation.max(there.incarnation + 1);
            }
            Arc::make_mut(view).members.insert(member.id.clone(), member.clone());
            true
        });
        refused.map_or(Ok(()), Err)
    }

    /// Publishes what the registration says until it stops, then leaves.
    async fn publish(self, mut member: Member, mut publisher: Publisher) {
        let entered = Wanted { state: member.state, load: member.load.clone() };
        let mut pace = Pace::new(entered, Instant::now());
        loop {
            let wanted = publisher.wanted.borrow_and_update().clone();
            let due = pace.due(&wanted, Instant::now());
            if due == Due::Now {
                (member.state, member.load) = (wanted.state, wanted.load.clone());
                self.amend(&member, |members| members.insert(member.id.clone(), member.clone()));
                pace = Pace::new(wanted, Instant::now());
                continue;
            }
            tokio::select! {
                biased;
                () = publisher.stop.cancelled() => break,
                Ok(()) = publisher.wanted.changed() => {}
                () = due.wait() => {}
            }
        }
        self.amend(&member, |members| members.remove(&member.id));
    }

    /// Changes the members, if this life of `member` is still the one in the view.
    fn amend(&self, member: &Member, change: impl FnOnce(&mut BTreeMap<String, Member>) -> Option<Member>) {
        self.view.send_if_modified(|view| {
            let current = view.members.get(&member.id).is_some_and(|there| there.incarnation == member.incarnation);
            if current {
                change(&mut Arc::make_mut(view).members);
            }
            current
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoadSummary, State, member::tests::member};
    use std::time::Duration;

    async fn until_view(directory: &MemoryDirectory, what: &str, holds: impl Fn(&View) -> bool) -> Arc<View> {
        let mut views = directory.watch();
        let seen = tokio::time::timeout(Duration::from_secs(5), views.wait_for(|view| holds(view))).await;
        seen.unwrap_or_else(|_| panic!("waited for {what}")).expect("the directory is alive").clone()
    }

    #[tokio::test(start_paused = true)]
    async fn members_come_change_and_leave() {
        let directory = MemoryDirectory::default();
        let a = directory.register(member("a", "h:1")).await.expect("free id");
        let _b = directory.register(member("b", "h:2")).await.expect("free id");
        let view = directory.watch().borrow().clone();
        assert!(view.connected);
        assert_eq!(view.members.keys().collect::<Vec<_>>(), ["a", "b"]);

        a.set_state(State::Draining);
        until_view(&directory, "a draining", |view| view.members["a"].state == State::Draining).await;
        a.leave().await;
        let view = directory.watch().borrow().clone();
        assert_eq!(view.members.keys().collect::<Vec<_>>(), ["b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn dropping_a_registration_leaves() {
        let directory = MemoryDirectory::default();
        drop(directory.register(member("a", "h:1")).await.expect("free id"));
        until_view(&directory, "an empty view", |view| view.members.is_empty()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_id_alive_elsewhere_is_taken_and_the_same_slot_takes_over() {
        let directory = MemoryDirectory::default();
        let first = directory.register(member("a", "h:1")).await.expect("free id");
        let error = directory.register(member("a", "h:2")).await.expect_err("alive at h:1");
        assert!(matches!(&error, Error::Taken { id, address } if id == "a" && address == "h:1"), "{error}");

        let second = directory.register(member("a", "h:1")).await.expect("same slot");
        assert!(second.incarnation() > first.incarnation());
        first.leave().await;
        let view = directory.watch().borrow().clone();
        assert_eq!(view.members["a"].incarnation, second.incarnation(), "the old life must not remove the new one");
    }

    #[tokio::test(start_paused = true)]
    async fn load_is_coalesced_to_once_a_second() {
        let directory = MemoryDirectory::default();
        let registration = directory.register(member("a", "h:1")).await.expect("free id");
        let mut views = directory.watch();
        views.mark_unchanged();
        let start = Instant::now();
        let mut published = Vec::new();
        for tick in 0..30u32 {
            registration.set_load(LoadSummary { running: tick + 1, ..Default::default() });
            tokio::time::advance(Duration::from_millis(100)).await;
            tokio::task::yield_now().await;
            if views.has_changed().expect("the directory is alive") {
                published.push(views.borrow_and_update().members["a"].load.running);
            }
        }
        assert_eq!(start.elapsed(), Duration::from_secs(3));
        assert!((2..=3).contains(&published.len()), "{published:?}");
        assert!(published.is_sorted(), "{published:?}");
        until_view(&directory, "the last load", |view| view.members["a"].load.running == 30).await;
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_a_key_is_refused() {
        let error = MemoryDirectory::default().register(member("a/b", "h:1")).await.expect_err("not a name");
        assert!(error.to_string().starts_with("member id \"a/b\""), "{error}");
    }
}
