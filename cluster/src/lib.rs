//! Who is here, and in what state.
//!
//! A [`Directory`] keeps the members: over etcd ([`EtcdDirectory`]) or in this process ([`MemoryDirectory`]). It holds what changes
//! slowly; whatever is faster than once a second flows worker to router over gRPC. Losing the directory stops joins and
//! leaves, never traffic: the last [`View`] stays in force.
#![forbid(unsafe_code)]

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// What a member does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Takes requests.
    Router,
    /// Turns prompts into pages.
    Prefill,
    /// Turns pages into tokens.
    Decode,
}

/// Where a member is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Takes work.
    Ready,
    /// Finishes what it has, takes nothing new.
    Draining,
}

/// The model a member serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name clients ask for.
    pub name: String,
    /// Names the weights: only members of equal fingerprint exchange pages.
    pub fingerprint: String,
    /// Longest sequence, in tokens.
    pub max_model_len: u32,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// Tokens per page.
    pub page_tokens: u32,
    /// Bytes of one page over all layers: what a transfer costs.
    pub page_bytes: u64,
}

/// What a member can hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Pages in its pool.
    pub pages: u32,
    /// Sequences in one step.
    pub sequences: u32,
    /// Tokens in one step.
    pub token_budget: u32,
}

/// Load as the directory holds it, published at most once a second; routers use the stream's instead.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadSummary {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences not yet scheduled.
    pub waiting: u32,
    /// Pages free or evictable.
    pub pages_free: u32,
}

/// One process in the directory (in `baton up`, one part of it).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Unique and stable over restarts of the same slot if the operator names it; random otherwise.
    pub id: String,
    /// Which life of that id: microseconds since the Unix epoch when the process started, and again whenever it had to register
    /// anew after a lost lease. It only grows.
    pub incarnation: u64,
    /// What it does.
    pub role: Role,
    /// Where it is in its life.
    pub state: State,
    /// `host:port` of its gRPC service (workers) or HTTP endpoint (routers).
    pub address: String,
    /// `host:port` of its link listener; empty for routers.
    pub link: String,
    /// The model it serves; `None` for routers.
    pub model: Option<ModelCard>,
    /// What it can hold.
    pub capacity: Capacity,
    /// Recent load.
    pub load: LoadSummary,
}

/// Everybody, by member id, and whether the directory itself can be reached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// The members last known.
    pub members: BTreeMap<String, Member>,
    /// False while the directory cannot be reached: `members` is then the last view, and leaving it is not noticed.
    pub connected: bool,
}

/// Why the directory refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not usable.
    #[error("etcd endpoint {endpoint:?}: {problem}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// Somebody else is alive under this id.
    #[error("member id {id:?} is already registered at {address}; give this one another --name")]
    Taken {
        /// The id.
        id: String,
        /// Who has it.
        address: String,
    },
}

/// A place where members register and see each other.
#[async_trait]
pub trait Directory: Send + Sync + std::fmt::Debug {
    /// Registers `member` and keeps it registered, through outages, until the [`Registration`] is left or dropped. After a
    /// lost lease it registers again under a larger incarnation.
    async fn register(&self, member: Member) -> Result<Registration, Error>;

    /// Returns the latest view and its changes.
    fn watch(&self) -> watch::Receiver<Arc<View>>;
}

/// A live registration. Dropping it leaves the directory.
#[derive(Debug)]
pub struct Registration {
    _private: (),
}

impl Registration {
    /// Returns the current incarnation. It grows when a lease was lost and the member had to register again.
    pub fn incarnation(&self) -> u64 {
        todo!()
    }

    /// Publishes a new state, at once.
    pub fn set_state(&self, _state: State) {
        todo!()
    }

    /// Publishes load, at most once a second; what comes faster replaces what waits.
    pub fn set_load(&self, _load: LoadSummary) {
        todo!()
    }

    /// Leaves the directory and waits until that is known there (or two seconds have passed).
    pub async fn leave(self) {
        todo!()
    }
}

/// Members of one process.
#[derive(Debug, Default)]
pub struct MemoryDirectory {}

/// Members in etcd, under a lease.
#[derive(Debug)]
pub struct EtcdDirectory {}
