//! Ways to place a request.

use serde::Serialize;
use std::{fmt, str::FromStr};

/// Who decides where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The router's own cost function.
    Baton,
    /// Anyone.
    Random,
    /// Each in turn.
    RoundRobin,
    /// The prefill worker with the least to compute, the decode worker with the fewest sequences.
    LeastLoaded,
    /// The worker that the first page of the prompt hashes to (rendezvous hashing).
    Sticky,
    /// The least time to first token, reckoned with each prefill worker's own prefix cache. Mooncake's "local cache-aware"
    /// (Qin et al., FAST 2025, section 6).
    CacheAware,
    /// The same, but a prefix may come from whichever prefill worker holds most of it. Mooncake's "KVCache-centric", algorithm 1.
    Global,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Baton, Self::Random, Self::RoundRobin, Self::LeastLoaded, Self::Sticky, Self::CacheAware, Self::Global];

    /// Returns its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baton => "baton",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastLoaded => "least-loaded",
            Self::Sticky => "sticky",
            Self::CacheAware => "cache-aware",
            Self::Global => "global",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|policy| policy.name()).collect();
            format!("{name:?} is no policy; there are {}", known.join(", "))
        })
    }
}
