//! The directory over a real etcd, which these tests kill, pause, empty and start again.

#[path = "../../tests/src/etcd.rs"]
#[expect(unreachable_pub, reason = "the system tests use this file as a public module")]
mod etcd;
mod proxy;

use cluster::{
    Capacity, Directory, Error, EtcdConfig, EtcdDirectory, LoadSummary, Member, ModelCard, Registration, Role, State,
    View,
};
use etcd::Etcd;
use etcd_client::{Client, CompactionOptions, PutOptions};
use metrics_exporter_prometheus::PrometheusBuilder;
use proxy::Proxy;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};

/// The bar: everybody is registered again so soon after etcd is back.
const BACK: Duration = Duration::from_secs(5);
/// For everything else that should happen soon, on a machine that may be busy.
const SOON: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_secs(2);

fn directory(endpoint: String) -> EtcdDirectory {
    EtcdDirectory::with_config(EtcdConfig { lease_ttl: TTL, ..EtcdConfig::new(vec![endpoint], "test") })
        .expect("good settings")
}

fn worker(id: &str) -> Member {
    Member {
        id: id.into(),
        incarnation: 1,
        role: Role::Decode,
        state: State::Ready,
        address: format!("{id}.test:7000"),
        link: format!("{id}.test:7001"),
        model: Some(ModelCard {
            name: "demo".into(),
            fingerprint: "f".into(),
            max_model_len: 2048,
            vocab_size: 4096,
            page_tokens: 16,
            page_bytes: 65536,
        }),
        capacity: Capacity { pages: 100, sequences: 8, token_budget: 512 },
        load: LoadSummary::default(),
    }
}

async fn register(directory: &EtcdDirectory, id: &str) -> Registration {
    directory.register(worker(id)).await.expect("a free id")
}

/// Waits for a view that `holds` and returns it.
#[track_caller]
fn view_when(
    views: &watch::Receiver<Arc<View>>,
    limit: Duration,
    what: impl std::fmt::Display,
    holds: impl Fn(&View) -> bool,
) -> impl Future<Output = Arc<View>> {
    let (mut views, at) = (views.clone(), std::panic::Location::caller());
    async move {
        if let Ok(found) = timeout(limit, views.wait_for(|view| holds(view))).await {
            return found.expect("the directory is alive").clone();
        }
        let last = views.borrow().clone();
        panic!("{at}: no view where {what} within {limit:?}; the last one: {last:#?}");
    }
}

/// Waits until these and no others are there.
#[track_caller]
fn members(views: &watch::Receiver<Arc<View>>, limit: Duration, ids: &[&str]) -> impl Future<Output = Arc<View>> {
    let (ids, what): (Vec<String>, _) =
        (ids.iter().map(|id| id.to_string()).collect(), format!("the members are {ids:?}"));
    view_when(views, limit, what, move |view| view.connected && view.members.keys().eq(ids.iter()))
}

/// Watches views go by and panics when one misses a member that was there before.
fn nobody_is_dropped(views: &watch::Receiver<Arc<View>>) -> JoinHandle<()> {
    let mut views = views.clone();
    let known: Vec<String> = views.borrow_and_update().members.keys().cloned().collect();
    tokio::spawn(async move {
        while views.changed().await.is_ok() {
            let view = views.borrow_and_update().clone();
            let missing: Vec<&String> = known.iter().filter(|id| !view.members.contains_key(*id)).collect();
            assert!(missing.is_empty(), "{missing:?} dropped from the view (connected: {})", view.connected);
        }
    })
}

/// Fails when somebody is dropped until the grace after an outage that just ended must be over.
async fn until_settled(watcher: &mut JoinHandle<()>) {
    let settled = TTL + Duration::from_secs(3);
    assert!(timeout(settled, watcher).await.is_err(), "somebody was dropped, see above");
}

/// A client of our own, to look at etcd and to meddle with it.
async fn client(endpoint: &str) -> Client {
    let client = Client::connect([endpoint], None).await.expect("a good endpoint");
    timeout(SOON, client.clone().status()).await.expect("etcd is up").expect("etcd is up");
    client
}

async fn lease_of(client: &mut Client, id: &str) -> i64 {
    let found = client.get(format!("/baton/test/members/{id}"), None).await.expect("etcd is up");
    found.kvs().first().map_or(0, |kv| kv.lease())
}

/// Waits until every one of `ids` lies in etcd under another lease than before.
async fn until_registered(client: &mut Client, ids: &[String]) {
    for id in ids {
        while lease_of(client, id).await == 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn members_register_change_and_leave() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let views = directory.watch();
    let a = register(&directory, "a").await;
    let b = register(&directory, "b").await;
    let view = members(&views, SOON, &["a", "b"]).await;
    assert_eq!(view.members["a"], worker("a"), "what is read is what was registered");

    a.set_state(State::Draining);
    view_when(&views, SOON, "a drains", |view| view.members["a"].state == State::Draining).await;
    a.leave().await;
    // The key is gone when `leave` returns; who was there before the view settled is shown until it has.
    assert_eq!(lease_of(&mut client(&etcd.endpoint()).await, "a").await, 0);
    members(&views, SOON, &["b"]).await;
    drop(b);
    members(&views, SOON, &[]).await;
}

#[tokio::test]
async fn views_and_registrations_outlive_the_directory() {
    let mut etcd = Etcd::reserve();
    let ours = directory(etcd.endpoint());
    let views = ours.watch();
    let _a = register(&ours, "a").await;
    drop(ours);
    etcd.restart();
    members(&views, BACK, &["a"]).await;
    let others = directory(etcd.endpoint());
    let b = register(&others, "b").await;
    members(&views, SOON, &["a", "b"]).await;
    drop(b);
    members(&views, SOON, &["a"]).await;
}

#[tokio::test]
async fn clusters_on_one_etcd_do_not_see_each_other() {
    let etcd = Etcd::start();
    let ours = directory(etcd.endpoint());
    let theirs = EtcdDirectory::connect(vec![etcd.endpoint()], "test2").expect("good settings");
    let _a = register(&ours, "a").await;
    let _b = register(&theirs, "b").await;
    members(&ours.watch(), SOON, &["a"]).await;
    members(&theirs.watch(), SOON, &["b"]).await;
}

#[tokio::test]
async fn what_a_newer_peer_says_is_read_and_what_makes_no_sense_is_left_out() {
    let etcd = Etcd::start();
    let mut meddler = client(&etcd.endpoint()).await;
    let mut newer = serde_json::to_value(worker("newer")).expect("plain data");
    newer["colour"] = "red".into();
    let values = [
        ("newer", newer.to_string()),
        ("garbage", "{not json".into()),
        ("wrong-role", newer.to_string().replace("decode", "teleport")),
        ("another-id", serde_json::to_string(&worker("x")).expect("plain data")),
    ];
    for (id, value) in &values {
        meddler.put(format!("/baton/test/members/{id}"), value.as_bytes(), None).await.expect("etcd is up");
    }
    let directory = directory(etcd.endpoint());
    let views = directory.watch();
    members(&views, SOON, &["newer"]).await;
    // The same by way of changes rather than the list.
    meddler.put("/baton/test/members/late-garbage", "[]", None).await.expect("etcd is up");
    let late = serde_json::to_string(&worker("late")).expect("plain data");
    meddler.put("/baton/test/members/late", late, None).await.expect("etcd is up");
    members(&views, SOON, &["late", "newer"]).await;
}

#[tokio::test]
async fn an_id_alive_elsewhere_is_taken() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let _a = register(&directory, "a").await;
    let imposter = Member { address: "elsewhere:1".into(), ..worker("a") };
    let error = timeout(SOON, directory.register(imposter)).await.expect("bounded").expect_err("a is alive");
    assert!(matches!(&error, Error::Taken { id, address } if id == "a" && address == "a.test:7000"), "{error}");
    let view = members(&directory.watch(), SOON, &["a"]).await;
    assert_eq!(view.members["a"].address, "a.test:7000");
}

#[tokio::test]
async fn a_slot_whose_process_died_is_taken_over() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let mut dead = client(&etcd.endpoint()).await;
    let lease = dead.lease_grant(TTL.as_secs() as i64, None).await.expect("etcd is up").id();
    let options = PutOptions::new().with_lease(lease);
    let life = |id| serde_json::to_string(&Member { incarnation: u64::MAX / 2, ..worker(id) }).expect("plain data");
    for id in ["same", "moved"] {
        dead.put(format!("/baton/test/members/{id}"), life(id), Some(options.clone())).await.expect("etcd is up");
    }
    // At the same address it can only be our own slot: at once, and under a larger incarnation.
    let same = register(&directory, "same").await;
    assert_eq!(same.incarnation(), u64::MAX / 2 + 1);
    assert_ne!(lease_of(&mut dead, "same").await, lease);
    // At another address the old lease must run out first.
    let moved = Member { address: "elsewhere:1".into(), ..worker("moved") };
    let _moved = timeout(SOON, directory.register(moved)).await.expect("bounded").expect("nobody renews the old lease");
    let view = view_when(&directory.watch(), SOON, "both are there", |view| view.members.len() == 2).await;
    assert_eq!(view.members["moved"].address, "elsewhere:1");
}

#[tokio::test]
async fn started_before_etcd_everybody_waits_for_it() {
    // The runtime of this test is this thread, so its tasks see this recorder too.
    let recorder = PrometheusBuilder::new().build_recorder();
    let _recording = metrics::set_default_local_recorder(&recorder);
    let says = |line: &str| recorder.handle().render().lines().any(|there| there == line);

    let mut etcd = Etcd::reserve();
    let directory = directory(etcd.endpoint());
    let views = directory.watch();
    let start = Instant::now();
    let a = register(&directory, "a").await;
    assert!(start.elapsed() < Duration::from_secs(4), "registering does not wait for etcd");
    assert_eq!(**views.borrow(), View::default());
    assert!(says("baton_directory_connected 0") && says("baton_member_registered{member=\"a\"} 0"));
    etcd.restart();
    members(&views, BACK, &["a"]).await;
    // The key is seen before its owner hears that it was put; a second change is published only after that.
    a.set_state(State::Draining);
    view_when(&views, SOON, "a drains", |view| view.members["a"].state == State::Draining).await;
    assert!(says("baton_directory_connected 1") && says("baton_member_registered{member=\"a\"} 1"));
}

/// What a restart does to the data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Data {
    Kept,
    Lost,
}

async fn everybody_is_back_after_a_restart(data: Data) {
    let mut etcd = Etcd::start();
    let ids: Vec<String> = (0..20).map(|index| format!("w{index:02}")).collect();
    let workers = directory(etcd.endpoint());
    let mut registrations = Vec::new();
    for id in &ids {
        registrations.push(register(&workers, id).await);
    }
    let router = directory(etcd.endpoint());
    let views = router.watch();
    let all: Vec<&str> = ids.iter().map(String::as_str).collect();
    members(&views, SOON, &all).await;
    let before: Vec<u64> = registrations.iter().map(Registration::incarnation).collect();
    let mut watcher = nobody_is_dropped(&views);

    etcd.kill();
    view_when(&views, SOON, "etcd is gone", |view| !view.connected).await;
    if data == Data::Lost {
        etcd.wipe();
    }
    etcd.restart();
    let back = Instant::now();
    let mut observer = client(&etcd.endpoint()).await;
    timeout(BACK, until_registered(&mut observer, &ids)).await.expect("everybody is registered again in time");
    let view = members(&views, BACK.saturating_sub(back.elapsed()), &all).await;
    println!("{data:?}: everybody is back after {:?}", back.elapsed());

    if data == Data::Lost {
        // They were registered anew, so they live again: every incarnation has grown, in the view too.
        for (registration, before) in registrations.iter().zip(before) {
            assert!(registration.incarnation() > before);
        }
        view_when(&views, SOON, "all incarnations are the new ones", |view| {
            view.members.values().all(|m| m.incarnation > 1)
        })
        .await;
    } else {
        assert!(view.members.values().all(|member| member.incarnation == 1), "a lease that survived is the same life");
    }
    until_settled(&mut watcher).await;
    members(&views, SOON, &all).await;
}

#[tokio::test]
async fn everybody_is_back_within_five_seconds_of_a_killed_etcd() {
    everybody_is_back_after_a_restart(Data::Kept).await;
}

#[tokio::test]
async fn everybody_is_back_within_five_seconds_of_an_etcd_that_lost_its_data() {
    everybody_is_back_after_a_restart(Data::Lost).await;
}

#[tokio::test]
async fn who_died_during_the_outage_goes_when_the_grace_ends() {
    let mut etcd = Etcd::start();
    let (living, dying) = (directory(etcd.endpoint()), directory(etcd.endpoint()));
    let _a = register(&living, "a").await;
    let b = register(&dying, "b").await;
    let views = living.watch();
    members(&views, SOON, &["a", "b"]).await;
    etcd.kill();
    view_when(&views, SOON, "etcd is gone", |view| !view.connected).await;
    b.leave().await;
    etcd.restart();
    view_when(&views, BACK, "etcd is back and b not yet forgotten", |view| view.connected && view.members.len() == 2)
        .await;
    members(&views, SOON, &["a"]).await;
}

#[tokio::test]
async fn an_etcd_that_stands_still_longer_than_the_leases_drops_nobody() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let a = register(&directory, "a").await;
    let views = directory.watch();
    members(&views, SOON, &["a"]).await;
    let mut watcher = nobody_is_dropped(&views);
    etcd.pause();
    view_when(&views, SOON, "the silence is noticed", |view| !view.connected).await;
    let mut silent = views.clone();
    silent.mark_unchanged();
    assert!(timeout(TTL * 2, silent.changed()).await.is_err(), "a view came from nowhere: {:?}", silent.borrow());
    etcd.resume();
    view_when(&views, BACK, "etcd is back", |view| view.connected).await;
    timeout(BACK, async {
        let mut observer = client(&etcd.endpoint()).await;
        until_registered(&mut observer, &["a".into()]).await;
    })
    .await
    .expect("registered again in time");
    until_settled(&mut watcher).await;
    let view = members(&views, SOON, &["a"]).await;
    assert_eq!(view.members["a"].incarnation, a.incarnation());
}

#[tokio::test]
async fn a_revoked_lease_begins_a_new_life() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let a = register(&directory, "a").await;
    let views = directory.watch();
    members(&views, SOON, &["a"]).await;
    let mut meddler = client(&etcd.endpoint()).await;
    let mut last = a.incarnation();
    for _ in 0..2 {
        let lease = lease_of(&mut meddler, "a").await;
        meddler.lease_revoke(lease).await.expect("etcd is up");
        let view = view_when(&views, BACK, "a lives again", |view| {
            view.members.get("a").is_some_and(|a| a.incarnation > last)
        })
        .await;
        assert_eq!(view.members["a"].incarnation, a.incarnation());
        assert_ne!(lease_of(&mut meddler, "a").await, lease);
        last = a.incarnation();
    }
}

#[tokio::test]
async fn a_deleted_key_is_noticed_with_the_next_publication() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let a = register(&directory, "a").await;
    let before = a.incarnation();
    let mut meddler = client(&etcd.endpoint()).await;
    meddler.delete("/baton/test/members/a", None).await.expect("etcd is up");
    a.set_load(LoadSummary { running: 1, ..Default::default() });
    let views = directory.watch();
    let view = view_when(&views, BACK, "a lives again", |view| view.members.contains_key("a")).await;
    assert!(view.members["a"].incarnation > before);
    assert_eq!(view.members["a"].load.running, 1);
}

#[tokio::test]
async fn load_is_written_at_most_once_a_second() {
    let etcd = Etcd::start();
    let directory = directory(etcd.endpoint());
    let a = register(&directory, "a").await;
    let start = Instant::now();
    let mut running = 0;
    let mut often = tokio::time::interval(Duration::from_millis(10));
    while start.elapsed() < Duration::from_millis(2500) {
        running += 1;
        a.set_load(LoadSummary { running, ..Default::default() });
        often.tick().await;
    }
    view_when(&directory.watch(), SOON, "the last load is there", |view| {
        view.members.get("a").is_some_and(|a| a.load.running == running)
    })
    .await;
    let seconds = start.elapsed().as_secs() as i64;
    let found = client(&etcd.endpoint()).await.get("/baton/test/members/a", None).await.expect("etcd is up");
    let writes = found.kvs()[0].version() - 1;
    assert!((2..=seconds + 1).contains(&writes), "{writes} writes in {seconds} s");
}

#[tokio::test]
async fn what_happened_while_the_watcher_was_cut_off_is_seen_although_compacted() {
    let etcd = Etcd::start();
    let proxy = Proxy::start(etcd.endpoint()).await;
    let workers = directory(etcd.endpoint());
    let a = register(&workers, "a").await;
    let _b = register(&workers, "b").await;
    let router = directory(proxy.endpoint());
    let views = router.watch();
    members(&views, SOON, &["a", "b"]).await;

    proxy.cut();
    view_when(&views, SOON, "the router is cut off", |view| !view.connected).await;
    a.leave().await;
    let _c = register(&workers, "c").await;
    compact(&mut client(&etcd.endpoint()).await).await;
    proxy.mend();
    view_when(&views, BACK, "c is seen", |view| view.connected && view.members.contains_key("c")).await;
    members(&views, SOON, &["b", "c"]).await;
}

#[tokio::test]
async fn a_watch_that_compaction_overtakes_lists_again_without_an_outage() {
    let etcd = Etcd::start();
    let workers = directory(etcd.endpoint());
    let _a = register(&workers, "a").await;
    // A slow way to etcd: between the list and the start of the watch there is time for a compaction.
    let proxy = Proxy::start(etcd.endpoint()).await;
    proxy.delay(Duration::from_millis(150));
    let router = directory(proxy.endpoint());
    let views = router.watch();
    let mut meddler = client(&etcd.endpoint()).await;
    let compacting = tokio::spawn(async move {
        loop {
            meddler.put("/elsewhere", "x", None).await.expect("etcd is up");
            compact(&mut meddler).await;
        }
    });
    view_when(&views, SOON, "the list is there", |view| view.connected).await;
    let mut later = views.clone();
    let outage = async move { later.wait_for(|view| !view.connected).await.map(drop) };
    assert!(timeout(Duration::from_secs(2), outage).await.is_err(), "a compaction is no outage");
    compacting.abort();
    proxy.delay(Duration::ZERO);
    let _b = register(&workers, "b").await;
    members(&views, SOON, &["a", "b"]).await;
}

async fn compact(client: &mut Client) {
    let revision =
        client.get("/", None).await.expect("etcd is up").header().expect("etcd says its revision").revision();
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await.expect("not yet compacted");
}

#[tokio::test]
async fn one_of_several_endpoints_is_enough() {
    let etcd = Etcd::start();
    let nobody = Etcd::reserve();
    let config = EtcdConfig { lease_ttl: TTL, ..EtcdConfig::new(vec![nobody.endpoint(), etcd.endpoint()], "test") };
    let directory = EtcdDirectory::with_config(config).expect("good settings");
    let _a = register(&directory, "a").await;
    members(&directory.watch(), SOON, &["a"]).await;
}
