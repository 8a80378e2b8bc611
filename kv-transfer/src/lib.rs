//! The hand-off: moving a sequence's pages from a prefill worker to a decode worker, whole or not at all.
//!
//! Each worker starts one [`Transfer`] over its page pool. The source side [`begin`](Transfer::begin)s a hand-off when a prompt is
//! scheduled, pushes blocks as layers finish and commits; the target side opens a landing or refuses. Per hand-off, each side
//! is a pure state machine (`source.rs`, `target.rs`) with a deadline in every state; transports only move bytes. The crate knows
//! no model: it moves blocks of a [`PageLayout`].
//!
//! To follow a hand-off, read `transfer.rs` (what the workers call), `driver.rs` (the task that acts), `handoffs.rs` with
//! `source.rs` and `target.rs` (what is decided), `landing.rs` (who may write which page) and `transport/` (how bytes move);
//! `links.rs` and `link.rs` bring two workers together and notice when one is gone.
//!
//! Memory of a link: its socket buffers, one header and system calls of 256 KiB straight from and
//! into pages per data connection, at most one control frame (4 MiB) being read, and descriptors of the blocks still to go.

mod coverage;
mod digest;
mod driver;
mod handoffs;
mod handshake;
mod inbox;
mod landing;
mod link;
mod links;
mod message;
mod metrics;
mod mover;
mod pages;
mod plan;
#[cfg(test)]
mod simulation;
mod source;
mod speed;
mod target;
#[cfg(test)]
mod testing;
mod transfer;
mod transport;

pub use transfer::Transfer;

use kv_cache::{PageId, PageLayout, TokenId};
use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr};

/// Names one attempt at moving one sequence; drawn at random by the router, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HandoffId(pub u64);

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Who this worker is to its peers. Sent in `Hello`; a mismatch of fingerprint or layout refuses the link, naming both values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Member id.
    pub worker: String,
    /// When this process started, as the directory counts incarnations. A peer that was told an older one means a life that is
    /// gone and is refused; a newer one is this same process, registered again.
    pub incarnation: u64,
    /// Names the weights.
    pub fingerprint: String,
    /// Shape of the pages.
    pub layout: PageLayout,
}

/// The other end of a link, as the router named it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Member id.
    pub worker: String,
    /// Which life of that member.
    pub incarnation: u64,
    /// `host:port` of its link listener.
    pub link: String,
}

/// Settings of the transfer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where peers connect. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// `host:port` that peers are told, or a host alone, which goes with the bound port; unset = the bound address.
    pub advertise: Option<String>,
    /// Refuses any other transport instead of falling back to it.
    pub require: Option<TransportKind>,
    /// Whether a digest of the contents is checked before a sequence becomes runnable.
    pub verify: Verify,
    /// Blocks are gathered until a message has at least this many bytes (or the last layer is done).
    pub group_bytes: usize,
    /// TCP connections per link.
    pub tcp_streams: usize,
    /// Longest a hand-off may wait for `Open`, in milliseconds.
    pub open_timeout_ms: u64,
    /// Longest a hand-off may go without progress once opened, in milliseconds. Progress is a push, a block that moves, or an
    /// answer; so the time that one layer group of a chunk computes counts too, and must stay below this.
    pub progress_timeout_ms: u64,
    /// Interval of pings, in milliseconds; two missed ones are death.
    pub ping_interval_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            require: None,
            verify: Verify::Auto,
            group_bytes: 4 << 20,
            tcp_streams: 2,
            open_timeout_ms: 10_000,
            progress_timeout_ms: 5_000,
            ping_interval_ms: 400,
        }
    }
}

/// When page contents are digested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// `Full` over tcp, `Counts` in memory.
    Auto,
    /// Page count, bytes and a digest of the contents.
    Full,
    /// Page count and bytes.
    Counts,
}

/// A way to move bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// Both workers live in this process.
    Memory,
    /// Any two machines.
    Tcp,
}

/// What the source knows when a prompt is scheduled.
#[derive(Clone, Debug)]
pub struct Begin {
    /// The attempt.
    pub handoff: HandoffId,
    /// Where the sequence goes.
    pub target: Peer,
    /// Prompt tokens whose keys and values will be pushed.
    pub tokens: u32,
    /// The sequence's pages here, in order; all of them, `layout.pages_for(tokens)`. The caller holds them until
    /// [`Event::SourceDone`].
    pub pages: Vec<PageId>,
}

/// What makes a sequence runnable at the target. Sampling is counter-based, so the first token is the whole sampler state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Token 0 of this leg, sampled by the source and already on its way to the router.
    pub first_token: TokenId,
}

/// What happened to a hand-off. Events come in order per hand-off; each hand-off of a side ends exactly once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Target: a source asks for a landing. Answer with [`Transfer::open`] or [`Transfer::refuse`] before the deadline.
    Begun {
        /// The attempt.
        handoff: HandoffId,
        /// Member id of the source.
        from: String,
        /// Tokens that will land.
        tokens: u32,
    },
    /// Target: every page is here and verified; the sequence is runnable. The pages belong to the caller alone.
    Landed {
        /// The attempt.
        handoff: HandoffId,
        /// What came with it.
        commit: Commit,
    },
    /// Target: the hand-off ended without landing. The sequence is dead, but its landing pages must not be reused before
    /// [`Event::Quiet`]. Not sent for a hand-off the target itself aborted or refused.
    Lost {
        /// The attempt.
        handoff: HandoffId,
        /// Why, for people.
        reason: String,
    },
    /// Target: no write of this hand-off can land any more; its landing pages may be reused. Sent once for every opened
    /// hand-off that did not land.
    Quiet {
        /// The attempt.
        handoff: HandoffId,
    },
    /// Source: the hand-off is over and nobody reads its pages here any more; they may be given back.
    SourceDone {
        /// The attempt.
        handoff: HandoffId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// How a hand-off ended, seen from the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target acknowledged the commit: it owns the sequence.
    Landed,
    /// The target would not take it.
    Refused(String),
    /// One side called it off, or the link died. A link that dies between `Commit` and its acknowledgement leaves open whether
    /// the target owns the sequence; the pages here are free either way.
    Aborted(String),
    /// A deadline passed.
    Expired(String),
}

/// Why a [`Transfer`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The link address cannot be bound.
    #[error("link listener on {address}: {source}")]
    Listen {
        /// Address tried.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The threads that move bytes cannot be had.
    #[error("start mover threads: {0}")]
    Threads(std::io::Error),
    /// The page pool cannot be mapped.
    #[error("map page pool of {bytes} bytes: {source}")]
    Map {
        /// Its size.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
}
