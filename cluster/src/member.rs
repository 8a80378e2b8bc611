//! A member and what it says of itself.
//!
//! These types are also the JSON that lies in etcd. Clusters are upgraded one process at a time, so a reader ignores fields it
//! does not know, and a field added later needs a default.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

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
#[serde(default)]
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
#[serde(default)]
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
    #[serde(default)]
    pub link: String,
    /// The model it serves; `None` for routers.
    #[serde(default)]
    pub model: Option<ModelCard>,
    /// What it can hold.
    #[serde(default)]
    pub capacity: Capacity,
    /// Recent load.
    #[serde(default)]
    pub load: LoadSummary,
}

/// Returns an incarnation for a life that begins now and follows one of incarnation `previous`: the time of day in
/// microseconds, or just more than `previous` where the clock went backwards.
pub(crate) fn incarnation_after(previous: u64) -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let micros = u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX);
    micros.max(previous.saturating_add(1))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A prefill worker at `address`.
    pub(crate) fn member(id: &str, address: &str) -> Member {
        Member {
            id: id.into(),
            incarnation: 1,
            role: Role::Prefill,
            state: State::Ready,
            address: address.into(),
            link: "127.0.0.1:9".into(),
            model: None,
            capacity: Capacity { pages: 64, sequences: 8, token_budget: 512 },
            load: LoadSummary::default(),
        }
    }

    #[test]
    fn json_keeps_every_field() {
        let model = ModelCard {
            name: "demo".into(),
            fingerprint: "abc".into(),
            max_model_len: 2048,
            vocab_size: 4096,
            page_tokens: 16,
            page_bytes: 1 << 20,
        };
        let there = Member { model: Some(model), ..member("p0", "10.0.0.1:7000") };
        let text = serde_json::to_string(&there).expect("a member is plain data");
        assert_eq!(serde_json::from_str::<Member>(&text).expect("just written"), there);
    }

    #[test]
    fn a_newer_peer_may_say_more_and_an_older_one_less() {
        let text = r#"{"id":"d0","incarnation":7,"role":"decode","state":"draining","address":"h:1","colour":"red",
                       "capacity":{"pages":3,"gpus":2}}"#;
        let read: Member = serde_json::from_str(text).expect("unknown fields are ignored");
        assert_eq!((read.role, read.state, read.capacity.pages), (Role::Decode, State::Draining, 3));
        assert_eq!((read.link.as_str(), read.model, read.load), ("", None, LoadSummary::default()));
    }

    #[test]
    fn incarnations_grow_even_when_the_clock_does_not() {
        let first = incarnation_after(0);
        assert!(first > 1_600_000_000_000_000, "microseconds since the epoch");
        let ahead = first + 3_600_000_000;
        assert_eq!(incarnation_after(ahead), ahead + 1);
    }
}
