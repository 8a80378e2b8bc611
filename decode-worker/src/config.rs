//! Settings of a decode worker.

use crate::reservation;
use attach::Slot;
use cluster::Role;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// Settings of a decode worker. What its engine may use is the engine's `Config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Member id; unset = a random one.
    pub name: Option<String>,
    /// Name clients ask for.
    pub model_name: String,
    /// Where routers connect. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Host, or `host:port`, that routers are told; unset = the bound address.
    pub advertise: Option<String>,
    /// The hand-off.
    pub transfer: kv_transfer::Config,
    /// Most sequences in the line for each thing to wait for (a turn, a source, pages); further ones are refused, and another
    /// worker may take them.
    pub max_waiting: usize,
    /// Longest a hand-off that a source has begun waits for its router's submission, in milliseconds.
    pub begun_wait_ms: u64,
    /// Longest a submission waits for its source to begin, in milliseconds. Long, because the prompt may stand in the prefill
    /// worker's line; a router that knows better cancels.
    pub expected_wait_ms: u64,
    /// Longest a hand-off waits for pages, in milliseconds. With `begun_wait_ms` less than the `open_timeout_ms` of the sources, so that
    /// they are told why.
    pub landing_wait_ms: u64,
    /// Adapters to begin with: name and PEFT directory.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Largest rank of an adapter; larger ones are refused.
    pub max_lora_rank: usize,
    /// Longest that running sequences may take to finish when the worker is asked to stop, in milliseconds.
    pub drain_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: None,
            model_name: "default".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            transfer: kv_transfer::Config::default(),
            max_waiting: 1024,
            begun_wait_ms: 3_000,
            expected_wait_ms: 120_000,
            landing_wait_ms: 6_000,
            adapters: BTreeMap::new(),
            max_lora_rank: 64,
            drain_timeout_ms: 30_000,
        }
    }
}

impl Config {
    /// Checks what types cannot say. Errors name the field.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.clone().into_slot().validate()
    }

    /// Returns what every worker is told.
    pub(crate) fn into_slot(self) -> Slot {
        Slot {
            role: Role::Decode,
            name: self.name,
            model_name: self.model_name,
            listen: self.listen,
            advertise: self.advertise,
            transfer: self.transfer,
            max_waiting: self.max_waiting,
            adapters: self.adapters,
            max_lora_rank: self.max_lora_rank,
            drain_timeout: Duration::from_millis(self.drain_timeout_ms),
        }
    }

    /// Returns how long and how many hand-offs may wait.
    pub(crate) fn reservations(&self) -> reservation::Limits {
        reservation::Limits {
            begun_wait: Duration::from_millis(self.begun_wait_ms),
            expected_wait: Duration::from_millis(self.expected_wait_ms),
            queue_wait: Duration::from_millis(self.landing_wait_ms),
            waiting: self.max_waiting,
        }
    }
}
