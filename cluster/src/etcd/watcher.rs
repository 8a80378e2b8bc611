//! Lists and watches the members, and merges what etcd says into the view.
//!
//! Each session begins with a full list and watches from the list's revision on, so nothing falls between the two. Resuming an
//! older watch instead would save the list, but an etcd whose data was lost counts its revisions anew under the same cluster
//! id: a resumed watch could then miss members for ever. A list is one read of a few hundred bytes per member. It is also the
//! answer when etcd has compacted the revision that a slow watch stood at.

use super::connection::{CALL_TIMEOUT, Connector, Failure, Patience, limited};
use crate::{
    Member, View,
    view::{Change, Roster, grace},
};
use etcd_client::{Client, Event, EventType, GetOptions, KeyValue, WatchOptions, WatchResponse, WatchStream};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

/// Changes of load alone are published this often: each publication copies the view, and nobody waits for load.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);

/// How often the watch is asked whether it is alive.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Largest message: a list of every member, about 1 KiB each.
const MESSAGE_BYTES: usize = 64 << 20;

/// Why a watch ended without a failure.
enum Ended {
    /// etcd has compacted the revision the watch stood at: list again.
    Compacted,
}

/// The task behind the view.
pub(super) struct Watcher {
    connector: Arc<Connector>,
    roster: Roster,
    view: watch::Sender<Arc<View>>,
    /// 1 while etcd can be reached.
    connected: metrics::Gauge,
    /// When changes of load are to be published, if there are any.
    load_due: Option<Instant>,
}

impl Watcher {
    /// Makes the task and the view it will keep.
    pub(super) fn new(connector: Arc<Connector>) -> (Self, watch::Receiver<Arc<View>>) {
        let roster = Roster::new(grace(connector.config.lease_ttl));
        let (view, receiver) = watch::channel(Arc::new(roster.view()));
        metrics::describe_gauge!(
            "baton_directory_connected",
            "1 while the directory can be reached, 0 while its last view stands."
        );
        let connected = metrics::gauge!("baton_directory_connected");
        connected.set(0.0);
        (Self { connector, roster, view, connected, load_due: None }, receiver)
    }

    /// Keeps the view until nobody has a receiver of it any more.
    pub(super) async fn run(self) {
        let view = self.view.clone();
        tokio::select! {
            () = view.closed() => {}
            // Dropped where it stands: it leaves nothing behind in etcd.
            never = self.keep() => match never {},
        }
    }

    /// Keeps the view for ever.
    async fn keep(mut self) -> std::convert::Infallible {
        let mut patience = Patience::new("watching the members".into());
        loop {
            let Err(failure) = self.session(&mut patience).await;
            let change = self.roster.disconnected();
            self.publish(change);
            patience.failed(&failure).await;
        }
    }

    /// Lists and watches until something fails.
    async fn session(&mut self, patience: &mut Patience) -> Result<std::convert::Infallible, Failure> {
        let client = self.connector.client().await?;
        loop {
            let revision = self.list(&client).await?;
            patience.works();
            let mut watch_client = client.watch_client().max_decoding_message_size(MESSAGE_BYTES);
            let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
            let stream = limited("watch", watch_client.watch(self.connector.prefix(), Some(options))).await?;
            let Ended::Compacted = self.follow(stream).await?;
            tracing::info!(revision, "etcd compacted what was being watched: listing the members again");
        }
    }

    /// Merges a full list; returns its revision.
    async fn list(&mut self, client: &Client) -> Result<i64, Failure> {
        let mut kv = client.kv_client().max_decoding_message_size(MESSAGE_BYTES);
        let options = GetOptions::new().with_prefix();
        let response = limited("list", kv.get(self.connector.prefix(), Some(options))).await?;
        let members: BTreeMap<String, Member> =
            response.kvs().iter().filter_map(|kv| self.read(kv)).map(|member| (member.id.clone(), member)).collect();
        let change = self.roster.listed(Instant::now(), members);
        self.publish(change);
        response.header().map(|header| header.revision()).ok_or(Failure::Closed("list"))
    }

    /// Merges changes until the watch ends.
    ///
    /// A watch without changes is silent, and a silent connection may be a dead one. So etcd is asked for its progress every
    /// second; any answer counts as a sign of life, none for [`CALL_TIMEOUT`] more as death.
    async fn follow(&mut self, stream: WatchStream) -> Result<Ended, Failure> {
        let (mut requests, mut responses) = stream.split();
        let mut probe = interval(PROBE_INTERVAL);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard_at = Instant::now();
        loop {
            // All arms are cancel-safe: `message` keeps a half-read message in the stream.
            tokio::select! {
                response = responses.message() => {
                    let response = response.map_err(|error| Failure::Etcd("watch", error))?.ok_or(Failure::Closed("watch"))?;
                    heard_at = Instant::now();
                    if response.compact_revision() > 0 {
                        return Ok(Ended::Compacted);
                    }
                    if response.canceled() {
                        tracing::debug!(reason = response.cancel_reason(), "etcd cancelled the watch");
                        return Err(Failure::Closed("watch"));
                    }
                    self.merge(&response);
                }
                _ = probe.tick() => limited("watch", requests.request_progress()).await?,
                () = sleep_until(heard_at + PROBE_INTERVAL + CALL_TIMEOUT) => return Err(Failure::Timeout("watch")),
                () = at(self.roster.settles_at()) => {
                    let change = self.roster.settle(Instant::now());
                    self.publish(change);
                }
                () = at(self.load_due) => self.publish(Change::Members),
            }
        }
    }

    /// Merges the changes of one response.
    fn merge(&mut self, response: &WatchResponse) {
        let now = Instant::now();
        let changes = response.events().iter().map(|event| self.merge_event(now, event));
        let change = changes.max().unwrap_or(Change::Nothing);
        self.publish(change);
    }

    fn merge_event(&mut self, now: Instant, event: &Event) -> Change {
        let Some(kv) = event.kv() else { return Change::Nothing };
        match event.event_type() {
            EventType::Put => self.read(kv).map_or(Change::Nothing, |member| self.roster.put(member)),
            EventType::Delete => self.id(kv).map_or(Change::Nothing, |id| self.roster.removed(now, id)),
        }
    }

    /// Reads a member; one that cannot be read is logged and left out.
    fn read(&self, kv: &KeyValue) -> Option<Member> {
        let id = self.id(kv)?;
        match serde_json::from_slice::<Member>(kv.value()) {
            Ok(member) if member.id == id => Some(member),
            Ok(member) => {
                tracing::warn!(key = id, id = member.id, "a member lies under a key that is not its own: ignored");
                None
            }
            Err(error) => {
                tracing::warn!(key = id, %error, "a member cannot be read: ignored");
                None
            }
        }
    }

    fn id<'kv>(&self, kv: &'kv KeyValue) -> Option<&'kv str> {
        kv.key_str().ok()?.strip_prefix(&self.connector.prefix())
    }

    /// Publishes the view: at once if it matters, within a second if only load changed.
    fn publish(&mut self, change: Change) {
        match change {
            Change::Nothing => {}
            Change::Load => {
                self.load_due.get_or_insert_with(|| Instant::now() + LOAD_INTERVAL);
            }
            Change::Members => {
                self.load_due = None;
                let view = self.roster.view();
                self.connected.set(if view.connected { 1.0 } else { 0.0 });
                self.view.send_replace(Arc::new(view));
            }
        }
    }
}

/// Waits until then; for ever where there is no then. Cancel-safe.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
