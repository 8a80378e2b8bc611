use super::*;
use crate::{LoadSummary, State, member::tests::member};
use proptest::prelude::*;

const GRACE: Duration = Duration::from_secs(7);

/// A roster on a clock of its own, written as a story.
struct Story {
    roster: Roster,
    start: Instant,
    now: Instant,
}

impl Story {
    fn new() -> Self {
        let now = Instant::now();
        Self { roster: Roster::new(GRACE), start: now, now }
    }

    fn at(&mut self, seconds: f64) -> &mut Self {
        self.now = self.start + Duration::from_secs_f64(seconds);
        self.roster.settle(self.now);
        self
    }

    fn list(&mut self, ids: &str) -> &mut Self {
        let list = ids.split_whitespace().map(|id| (id.to_owned(), member(id, "h:1"))).collect();
        self.roster.listed(self.now, list);
        self
    }

    fn lost(&mut self) -> &mut Self {
        self.roster.disconnected();
        self
    }

    fn put(&mut self, id: &str) -> &mut Self {
        self.roster.put(member(id, "h:1"));
        self
    }

    fn removed(&mut self, id: &str) -> &mut Self {
        self.roster.removed(self.now, id);
        self
    }

    #[track_caller]
    fn shows(&mut self, expected: &str) -> &mut Self {
        let view = self.roster.view();
        let ids: Vec<&str> = view.members.keys().map(String::as_str).collect();
        let sign = if view.connected { "" } else { "? " };
        assert_eq!(format!("{sign}{}", ids.join(" ")), expected, "at {:?}", self.now - self.start);
        self
    }
}

#[test]
fn nothing_is_known_before_the_first_list() {
    Story::new().shows("? ").list("").shows("").at(1.0).put("a").shows("a");
}

#[test]
fn a_settled_view_follows_the_directory_at_once() {
    Story::new().list("a b").at(8.0).removed("a").shows("b").put("c").shows("b c").removed("x").shows("b c");
}

#[test]
fn an_outage_drops_nobody() {
    Story::new().list("a b").at(8.0).lost().shows("? a b").at(1000.0).shows("? a b");
}

#[test]
fn who_registers_again_within_the_grace_never_left() {
    let mut story = Story::new();
    story.list("a b").at(8.0).lost().at(60.0).list("").shows("a b");
    story.at(61.0).put("b").at(64.0).put("a").shows("a b").at(67.1).shows("a b");
}

#[test]
fn who_does_not_come_back_goes_when_the_grace_ends() {
    let mut story = Story::new();
    story.list("a b").at(8.0).lost().at(60.0).list("b").at(66.9).shows("a b").at(67.0).shows("b");
}

#[test]
fn a_lease_that_runs_out_just_after_the_outage_waits_for_the_grace_too() {
    let mut story = Story::new();
    story.list("a b").at(8.0).lost().at(20.0).list("a b").at(21.0).removed("a").removed("b").shows("a b");
    story.at(23.0).put("a").at(27.0).shows("a");
}

#[test]
fn a_second_outage_starts_the_grace_anew() {
    let mut story = Story::new();
    story.list("a").at(8.0).lost().at(20.0).list("").at(22.0).lost().at(40.0).shows("? a");
    story.list("").at(46.9).shows("a").at(47.0).shows("");
}

#[test]
fn a_new_list_within_a_connection_is_the_truth() {
    Story::new().list("a b").at(8.0).list("b c").shows("b c");
}

#[test]
fn changes_are_told_by_how_much_they_matter() {
    let mut roster = Roster::new(GRACE);
    let now = Instant::now();
    let a = member("a", "h:1");
    let busy = Member { load: LoadSummary { running: 3, ..Default::default() }, ..a.clone() };
    let draining = Member { state: State::Draining, ..busy.clone() };
    assert_eq!(roster.disconnected(), Change::Nothing);
    assert_eq!(roster.listed(now, BTreeMap::new()), Change::Members, "connected");
    assert_eq!(roster.listed(now, BTreeMap::new()), Change::Nothing);
    assert_eq!(roster.put(a.clone()), Change::Members);
    assert_eq!(roster.put(a), Change::Nothing);
    assert_eq!(roster.put(busy.clone()), Change::Load);
    assert_eq!(roster.put(draining), Change::Members);
    assert_eq!(roster.listed(now, BTreeMap::from([("a".to_owned(), busy)])), Change::Members);
    assert_eq!(roster.settle(now + GRACE), Change::Nothing);
    assert_eq!(roster.settles_at(), None);
    assert_eq!(roster.removed(now, "a"), Change::Members);
    assert_eq!(roster.disconnected(), Change::Members);
}

/// What can happen to a roster.
#[derive(Clone, Debug)]
enum Event {
    Wait(u64),
    List(Vec<u8>),
    Put(u8),
    Removed(u8),
    Disconnected,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1u64..4_000).prop_map(Event::Wait),
        proptest::collection::vec(0u8..5, 0..5).prop_map(Event::List),
        (0u8..5).prop_map(Event::Put),
        (0u8..5).prop_map(Event::Removed),
        Just(Event::Disconnected),
    ]
}

proptest! {
    /// Whatever happens: nobody whom the directory lists is hidden, nobody is dropped during an outage or in the grace after it,
    /// and once the grace is over the view is what the directory says.
    #[test]
    fn merging_is_safe_and_converges(events in proptest::collection::vec(event(), 0..60)) {
        let mut roster = Roster::new(GRACE);
        let mut now = Instant::now();
        let mut directory = std::collections::BTreeSet::new();
        let (mut connected, mut settles_at) = (false, now);
        for event in events {
            let before = roster.view();
            match &event {
                Event::Wait(ms) => now += Duration::from_millis(*ms),
                Event::List(ids) => {
                    if !connected {
                        settles_at = now + GRACE;
                    }
                    connected = true;
                    directory = ids.iter().map(|id| id.to_string()).collect();
                    roster.listed(now, directory.iter().map(|id| (id.clone(), member(id, "h:1"))).collect());
                }
                Event::Put(id) if connected => {
                    directory.insert(id.to_string());
                    roster.put(member(&id.to_string(), "h:1"));
                }
                Event::Removed(id) if connected => {
                    directory.remove(&id.to_string());
                    roster.removed(now, &id.to_string());
                }
                Event::Disconnected => {
                    connected = false;
                    roster.disconnected();
                }
                Event::Put(_) | Event::Removed(_) => {}
            }
            roster.settle(now);
            let view = roster.view();
            prop_assert_eq!(view.connected, connected);
            if connected {
                prop_assert!(directory.iter().all(|id| view.members.contains_key(id)));
            }
            if !connected || now < settles_at {
                prop_assert!(before.members.keys().all(|id| view.members.contains_key(id)), "dropped too early by {:?}", event);
            } else {
                prop_assert!(view.members.keys().eq(directory.iter()));
            }
        }
    }
}
