//! Settings of a prefill worker.

use attach::Slot;
use cluster::Role;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// Settings of a prefill worker. What its engine may use is the engine's `Config`.
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
    /// Most prompts in the line; further ones are refused, and another worker may take them.
    pub max_waiting: usize,
    /// Adapters to begin with: name and PEFT directory.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Largest rank of an adapter; larger ones are refused.
    pub max_lora_rank: usize,
    /// Longest that running prompts may take to finish when the worker is asked to stop, in milliseconds.
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
            role: Role::Prefill,
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
}
