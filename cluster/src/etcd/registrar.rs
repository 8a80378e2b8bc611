//! Takes a member's key and keeps it: one task per registration.
//!
//! A life of the member is a lease. The registrar grants one, puts the member's key under it by a transaction that cannot
//! overwrite another member, and renews it every third of its time to live. A life that is lost (the lease ran out, somebody
//! deleted the key, etcd lost its data) is followed by the next one under a larger incarnation; one that only lost its connection is
//! resumed as it is.

use super::connection::{Connector, Failure, Patience, limited};
use crate::{
    Error, Member,
    member::incarnation_after,
    registration::{Due, Pace, Publisher, Wanted},
};
use etcd_client::{
    Client, Compare, CompareOp, GetResponse, KeyValue, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp,
    TxnOpResponse,
};
use serde::Deserialize;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    sync::oneshot,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

/// How often a registrar looks whether the holder of its id is still alive.
const HOLDER_INTERVAL: Duration = Duration::from_millis(250);

/// How a life, or the wait for one, ended without a failure of etcd.
enum Ended {
    /// The member leaves.
    Left,
    /// The lease or the key is gone: the next life begins.
    Lost(&'static str),
    /// The id is alive at another address.
    Taken(String),
}

/// How an attempt to take the key ended.
enum Claim {
    /// The key is ours under this lease.
    Held,
    /// The key is another's.
    Holder(Holder),
}

/// Who has the key.
#[derive(Debug)]
struct Holder {
    lease: i64,
    mod_revision: i64,
    address: String,
    incarnation: u64,
}

/// The task behind a registration over etcd.
pub(super) struct Registrar {
    connector: Arc<Connector>,
    key: String,
    member: Member,
    publisher: Publisher,
    /// Where the outcome of the first attempt goes.
    first: Option<oneshot::Sender<Result<(), Error>>>,
    /// The lease of the current life, once the key is under it.
    lease: Option<i64>,
    /// A life has been lost: the next incarnation must be larger than the last.
    reborn: bool,
    pace: Pace,
    /// 1 while the member is registered as far as this process knows.
    registered: metrics::Gauge,
}

impl Registrar {
    /// `first` gets the outcome of the first attempt: `Ok` when it took the key or etcd could not be reached, [`Error::Taken`]
    /// when another holds it; the task then ends.
    pub(super) fn new(
        connector: Arc<Connector>,
        member: Member,
        publisher: Publisher,
        first: oneshot::Sender<Result<(), Error>>,
    ) -> Self {
        let key = connector.key(&member.id);
        let pace = Pace::new(publisher.wanted.borrow().clone(), Instant::now());
        metrics::describe_gauge!(
            "baton_member_registered",
            "1 while the member is in the directory and renews its lease."
        );
        let registered = metrics::gauge!("baton_member_registered", "member" => member.id.clone());
        registered.set(0.0);
        Self { connector, key, member, publisher, first: Some(first), lease: None, reborn: false, pace, registered }
    }

    /// Keeps the member registered until it leaves.
    pub(super) async fn run(mut self) {
        let stop = self.publisher.stop.clone();
        let mut patience = Patience::new(format!("the registration of {}", self.member.id));
        while !stop.is_cancelled() {
            // A session ends by itself soon after `stop`, since its calls are limited; it must not be cut, or a lease granted a
            // moment ago would be forgotten rather than revoked.
            let ended = self.session(&mut patience).await;
            self.registered.set(0.0);
            match ended {
                Ok(Ended::Left) => return,
                Ok(Ended::Lost(why)) => self.lost(why),
                Ok(Ended::Taken(address)) => {
                    if self.taken(address).is_err() {
                        return;
                    }
                    stop.run_until_cancelled(sleep(self.connector.config.lease_ttl)).await;
                }
                Err(failure) => {
                    self.answer(Ok(()));
                    stop.run_until_cancelled(patience.failed(&failure)).await;
                }
            }
        }
        self.leave().await;
    }

    /// One connection: takes or resumes the key and keeps it.
    async fn session(&mut self, patience: &mut Patience) -> Result<Ended, Failure> {
        let mut client = self.connector.client().await?;
        let wanted = self.publisher.wanted.borrow_and_update().clone();
        self.publish(wanted);
        if !self.resume(&mut client).await?
            && let Some(ended) = self.acquire(&mut client).await?
        {
            return Ok(ended);
        }
        patience.works();
        self.registered.set(1.0);
        self.answer(Ok(()));
        self.keep(&mut client).await
    }

    /// Goes on with the lease of an earlier session if etcd still knows it and the key is still under it.
    async fn resume(&mut self, client: &mut Client) -> Result<bool, Failure> {
        let Some(lease) = self.lease else { return Ok(false) };
        let response = limited("lease time to live", client.lease_time_to_live(lease, None)).await?;
        if response.ttl() <= 0 || !self.put(client, lease).await? {
            self.lost("the lease ran out during the outage");
            return Ok(false);
        }
        Ok(true)
    }

    /// Begins a new life under a new lease. `None` when the key is ours.
    async fn acquire(&mut self, client: &mut Client) -> Result<Option<Ended>, Failure> {
        let ttl_seconds = self.connector.config.lease_ttl.as_secs();
        let lease = limited("lease grant", client.lease_grant(ttl_seconds.cast_signed(), None)).await?.id();
        if self.reborn {
            self.outlive(self.member.incarnation);
        }
        let ended = self.contend(client, lease).await?;
        if ended.is_some() {
            self.revoke(client, lease).await;
        } else {
            self.begun(lease);
        }
        Ok(ended)
    }

    /// Puts the key under `lease`; where another has it, waits until that one is proven alive or gone.
    ///
    /// The holder's lease only shrinks unless somebody renews it, and it must be gone once its time to live has passed.
    async fn contend(&mut self, client: &mut Client, lease: i64) -> Result<Option<Ended>, Failure> {
        let give_up_at = Instant::now() + self.connector.config.lease_ttl + Duration::from_secs(2);
        let mut least_ttl_seconds = i64::MAX;
        while !self.publisher.stop.is_cancelled() {
            let Claim::Holder(holder) = self.claim(client, lease).await? else { return Ok(None) };
            let response = limited("lease time to live", client.lease_time_to_live(holder.lease, None)).await?;
            let renewed = response.ttl() > least_ttl_seconds;
            least_ttl_seconds = least_ttl_seconds.min(response.ttl());
            if holder.lease == 0 || renewed || Instant::now() >= give_up_at {
                return Ok(Some(Ended::Taken(holder.address)));
            }
            sleep(HOLDER_INTERVAL).await;
        }
        Ok(Some(Ended::Left))
    }

    /// Tries to put the key under `lease`: where there is none, or over one of the same address.
    async fn claim(&mut self, client: &mut Client, lease: i64) -> Result<Claim, Failure> {
        let free = Compare::version(self.key.clone(), CompareOp::Equal, 0);
        let look = TxnOp::get(self.key.clone(), None);
        let txn = Txn::new().when([free]).and_then([self.put_op(lease)]).or_else([look]);
        let response = limited("register", client.txn(txn)).await?;
        if response.succeeded() {
            return Ok(Claim::Held);
        }
        let Some(holder) = response.op_responses().iter().find_map(holder_in) else {
            return Err(Failure::Closed("register"));
        };
        if holder.address != self.member.address {
            return Ok(Claim::Holder(holder));
        }
        // Our own slot, in an earlier life.
        if self.member.incarnation <= holder.incarnation {
            self.outlive(holder.incarnation);
        }
        let unchanged = Compare::mod_revision(self.key.clone(), CompareOp::Equal, holder.mod_revision);
        let txn = Txn::new().when([unchanged]).and_then([self.put_op(lease)]);
        let taken_over = limited("take over", client.txn(txn)).await?.succeeded();
        Ok(if taken_over { Claim::Held } else { Claim::Holder(holder) })
    }

    /// Renews the lease and publishes what the registration says, until it leaves or the life is lost.
    async fn keep(&mut self, client: &mut Client) -> Result<Ended, Failure> {
        let Some(lease) = self.lease else { return Ok(Ended::Lost("there is no lease")) };
        let (mut keeper, mut answers) = limited("keep alive", client.lease_keep_alive(lease)).await?;
        let mut renewal = interval(self.connector.config.lease_ttl / 3);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wanted = self.publisher.wanted.borrow_and_update().clone();
            let due = self.pace.due(&wanted, Instant::now());
            if due == Due::Now {
                self.publish(wanted);
                if !self.put(client, lease).await? {
                    return Ok(Ended::Lost("the key was deleted or taken over"));
                }
                continue;
            }
            // All arms are cancel-safe; what they wake is done outside.
            let renew = tokio::select! {
                biased;
                () = self.publisher.stop.cancelled() => {
                    self.leave_with(client).await;
                    return Ok(Ended::Left);
                }
                _ = renewal.tick() => true,
                Ok(()) = self.publisher.wanted.changed() => false,
                () = due.wait() => false,
            };
            if renew && !renew_lease(&mut keeper, &mut answers).await? {
                return Ok(Ended::Lost("the lease ran out or was revoked"));
            }
        }
    }

    /// Puts the member as it is now, if the key is still under `lease`.
    async fn put(&mut self, client: &mut Client, lease: i64) -> Result<bool, Failure> {
        let ours = Compare::lease(self.key.clone(), CompareOp::Equal, lease);
        let txn = Txn::new().when([ours]).and_then([self.put_op(lease)]);
        Ok(limited("publish", client.txn(txn)).await?.succeeded())
    }

    fn put_op(&self, lease: i64) -> TxnOp {
        let value = serde_json::to_vec(&self.member).expect("a member is plain data, which always has a JSON form");
        TxnOp::put(self.key.clone(), value, Some(PutOptions::new().with_lease(lease)))
    }

    /// Takes over what the registration says; the next put carries it.
    fn publish(&mut self, wanted: Wanted) {
        (self.member.state, self.member.load) = (wanted.state, wanted.load.clone());
        self.pace = Pace::new(wanted, Instant::now());
    }

    /// Chooses the incarnation of a life that follows `previous`. The registration knows it before the directory does, so that the
    /// member never meets an incarnation of its own that it has not heard of.
    fn outlive(&mut self, previous: u64) {
        self.member.incarnation = incarnation_after(previous);
        self.publisher.incarnation.store(self.member.incarnation, Ordering::Release);
    }

    /// A life began under `lease`.
    fn begun(&mut self, lease: i64) {
        self.lease = Some(lease);
        tracing::info!(
            member = self.member.id,
            incarnation = self.member.incarnation,
            lease = format_args!("{lease:x}"),
            "registered in etcd"
        );
    }

    /// The current life is over: the next one gets a new lease and a larger incarnation.
    fn lost(&mut self, why: &str) {
        tracing::warn!(member = self.member.id, "registration lost, registering again: {why}");
        self.lease = None;
        self.reborn = true;
    }

    /// The id is alive elsewhere. `Err` when that answers the first attempt, which ends the registration.
    fn taken(&mut self, address: String) -> Result<(), ()> {
        let error = Error::Taken { id: self.member.id.clone(), address };
        if self.first.is_some() {
            self.answer(Err(error));
            return Err(());
        }
        tracing::error!("{error}; trying again until it leaves");
        Ok(())
    }

    fn answer(&mut self, outcome: Result<(), Error>) {
        if let Some(first) = self.first.take() {
            // Nobody listens any more when the future of `register` was dropped; `stop` then ends the task.
            let _ = first.send(outcome);
        }
    }

    /// Leaves over a new connection, if there is something to leave.
    async fn leave(&mut self) {
        if self.lease.is_some()
            && let Ok(mut client) = self.connector.client().await
        {
            self.leave_with(&mut client).await;
        }
    }

    async fn leave_with(&mut self, client: &mut Client) {
        if let Some(lease) = self.lease.take() {
            self.revoke(client, lease).await;
            tracing::info!(member = self.member.id, "left etcd");
        }
    }

    /// Gives a lease back, and with it what lies under it.
    async fn revoke(&self, client: &mut Client, lease: i64) {
        if let Err(failure) = limited("lease revoke", client.lease_revoke(lease)).await {
            tracing::warn!(member = self.member.id, "the lease is left to run out: {failure}");
        }
    }
}

/// Renews the lease; false when etcd does not know it any more.
async fn renew_lease(keeper: &mut LeaseKeeper, answers: &mut LeaseKeepAliveStream) -> Result<bool, Failure> {
    limited("keep alive", keeper.keep_alive()).await?;
    let answer = limited("keep alive", answers.message()).await?.ok_or(Failure::Closed("keep alive"))?;
    Ok(answer.ttl() > 0)
}

fn holder_in(response: &TxnOpResponse) -> Option<Holder> {
    match response {
        TxnOpResponse::Get(found) => found_holder(found),
        _ => None,
    }
}

fn found_holder(found: &GetResponse) -> Option<Holder> {
    found.kvs().first().map(holder)
}

/// Reads who has the key. What cannot be read has no address, so that it counts as somebody else.
fn holder(kv: &KeyValue) -> Holder {
    /// The little that must be understood of a member of whatever version.
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Known {
        address: String,
        incarnation: u64,
    }
    let known: Known = serde_json::from_slice(kv.value()).unwrap_or_default();
    Holder {
        lease: kv.lease(),
        mod_revision: kv.mod_revision(),
        address: known.address,
        incarnation: known.incarnation,
    }
}
