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
//! into pages per data connection, at most one control frame (4 MiB) being read, and descriptors of the blocks still to go. A
//! link over `shm` has no data connections; at its source, the map of the target's pool has page tables of a 512th of the
//! pool's size (the pages themselves are the target's, and counted once). A target that shares its pool has eight bytes more for each of
//! its pages. With TLS each connection holds up to 64 KiB that are
//! encrypted and have not left, and up to two records (2 x 18 KiB) that came and were not read. A link over `ucx` takes what UCX takes for
//! a worker at either end: below 1 MiB of its own and 4 MiB of shared memory over its `posix` and `tcp`; over RDMA, where it posts
//! receive buffers, more.

mod auth;
mod convert;
mod coverage;
mod digest;
mod driver;
#[cfg(test)]
mod exploration;
mod fetches;
#[cfg(any(fuzzing, test))]
mod fuzz;
mod handoffs;
mod handshake;
mod inbox;
mod landing;
mod link;
mod links;
mod message;
mod metrics;
mod mover;
mod overlap;
mod pages;
mod plan;
mod ranks;
#[cfg(test)]
mod simulation;
mod socket;
mod source;
mod speed;
mod streaming;
mod target;
#[cfg(test)]
mod testing;
mod tls;
mod transfer;
mod transport;
mod words;

#[cfg(fuzzing)]
pub use fuzz::frames as fuzz_frames;
pub use transfer::{Overlapped, Pool, Transfer};
pub use transport::ucx::{Survey, UcxConfig, UcxMemory, survey};

use kv_cache::{PageHash, PageId, PageLayout, TokenId};
use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr, path::PathBuf};

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
    /// Shape of the pages, of this rank alone.
    pub layout: PageLayout,
    /// Which of the worker's ranks this is.
    pub rank: Rank,
}

/// One rank of a tensor-parallel worker. The key and value heads of the model are dealt out to the ranks in order, the same number
/// to each ([`PageLayout::kv_heads`]); where there are fewer heads than ranks, `replicas` ranks in a row hold the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rank {
    /// From 0.
    pub index: u32,
    /// Ranks of the worker.
    pub of: u32,
    /// Ranks that hold the same heads; all of them where pages hold latents (MLA).
    pub replicas: u32,
}

impl Default for Rank {
    fn default() -> Self {
        Self { index: 0, of: 1, replicas: 1 }
    }
}

impl Rank {
    /// Returns rank `index` of `of` for a model with `kv_heads` heads in all, or `None` when they cannot be dealt out evenly.
    pub fn new(index: u32, of: u32, kv_heads: u32) -> Option<Self> {
        let fits = index < of && kv_heads > 0 && (kv_heads.is_multiple_of(of) || of.is_multiple_of(kv_heads));
        fits.then(|| Self { index, of, replicas: (of / kv_heads).max(1) })
    }

    /// Says whether this rank is the one that sends what it holds to `target`, of the `kv_heads` heads of the model. Each head of
    /// a target comes from one rank: replicas take turns.
    pub fn sends_to(&self, target: &Rank, kv_heads: u32) -> bool {
        let heads = |rank: &Rank| {
            let each = kv_heads / (rank.of / rank.replicas);
            let first = rank.index / rank.replicas * each;
            first..first + each
        };
        let (ours, theirs) = (heads(self), heads(target));
        ours.start < theirs.end && theirs.start < ours.end && self.index % self.replicas == target.index % self.replicas
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.index, self.of)?;
        if self.replicas == 1 { Ok(()) } else { write!(f, ", {} alike", self.replicas) }
    }
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
    /// Takes pages whose elements are rounded on the way, such as f32 to bf16 or bf16 to int8, where the two workers keep keys and
    /// values in different types. Off: such a link is refused; types that hold every value of the other always fit. Read at the
    /// target, whose answers it changes.
    pub lossy_kv: bool,
    /// Layers leave in groups of at least this many bytes (or when the last is done); unset = chosen so that least is left to move
    /// when the last is done, from how fast they compute and how fast links are.
    pub group_bytes: Option<usize>,
    /// File with the token that all workers of the cluster share: who has another, or none, gets no link. 16 bytes or more; read
    /// once, at the start. Unset: whoever reaches the listener may link.
    pub cluster_token_file: Option<PathBuf>,
    /// Certificates. Set: every connection of every link is TLS, both ends show theirs, and clear text is refused.
    pub tls: Option<TlsConfig>,
    /// TCP connections per link.
    pub tcp_streams: usize,
    /// How UCX is found and what it may use.
    pub ucx: UcxConfig,
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
            lossy_kv: false,
            group_bytes: None,
            cluster_token_file: None,
            tls: None,
            tcp_streams: 2,
            ucx: UcxConfig::default(),
            open_timeout_ms: 10_000,
            progress_timeout_ms: 5_000,
            ping_interval_ms: 400,
        }
    }
}

impl Config {
    /// Reads the files that are named, to find what is wrong with them before anything starts.
    ///
    /// # Errors
    /// [`Error::ClusterToken`] and [`Error::Tls`], as [`Transfer::start`] would return them.
    pub fn check_files(&self) -> Result<(), Error> {
        link::Access::new(self).map(|_| ())
    }
}

/// Files in PEM that make a worker's links TLS. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificates of the authorities that sign for workers of this cluster, and for nobody else.
    pub ca: PathBuf,
    /// This worker's certificate, and what is between it and the authority's. It serves both ends of a link.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Name that the certificates of peers are made out to; unset = the host of the address that is dialled.
    #[serde(default)]
    pub name: Option<String>,
}

/// When page contents are digested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// `Full` over tcp in clear text between two machines; `Counts` in memory, shared or not, over the loopback of one, and where TLS
    /// authenticates every byte.
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
    /// Two processes of one host with pages on cards that reach each other: the source writes into the target's pages there.
    Cuda,
    /// Two processes of one host: the source writes into the target's pages.
    Shm,
    /// What UCX finds between two machines, RDMA above all: the source writes into the target's pages.
    Ucx,
    /// Any two machines.
    Tcp,
}

/// What the source knows when a prompt is scheduled.
#[derive(Clone, Debug)]
pub struct Begin {
    /// The attempt.
    pub handoff: HandoffId,
    /// Where the sequence goes: one peer, or all ranks of a tensor-parallel one in their order. This rank sends each what both
    /// hold, and is done when all have it.
    pub targets: Vec<Peer>,
    /// Prompt tokens whose keys and values will be pushed.
    pub tokens: u32,
    /// The sequence's pages here, in order; all of them, `layout.pages_for(tokens)`. The caller holds them until
    /// [`Event::SourceDone`].
    pub pages: Vec<PageId>,
}

/// What a target asks a peer for that holds it.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// The attempt.
    pub handoff: HandoffId,
    /// Who holds it.
    pub source: Peer,
    /// Names of the prefix's pages, in order, those that are here already too.
    pub pages: Vec<PageHash>,
}

/// What makes a sequence runnable at the target. Sampling is counter-based, so the first token is the whole sampler state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Token 0 of this leg, sampled by the source and already on its way to the router. Of a prefix that was fetched it says nothing.
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
    /// A peer asks for the pages of a prefix that this worker is thought to hold. Answer with [`Transfer::begin`] of this hand-off
    /// `by` it, with all of the prefix, or with [`Transfer::refuse`], before the deadline.
    Asked {
        /// The attempt.
        handoff: HandoffId,
        /// Where the prefix is to go.
        by: Peer,
        /// Names of its pages, in order.
        pages: Vec<PageHash>,
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
    /// The target acknowledged the commit: it owns the sequence, or its ranks own what this rank had for them.
    Landed,
    /// The source's worker had no more need of it: the answer was complete with its first token.
    Forgone,
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
    /// Transport `ucx` is required and cannot be had.
    #[error("transport ucx: {0}")]
    Ucx(String),
    /// Transport `cuda` is required by a worker whose pages are on no card.
    #[error("transport cuda: this worker's pages are on no card; `--engine cuda` puts them there")]
    NotOnCards,
    /// The cluster's token cannot be used.
    #[error("cluster_token_file {}: {reason}", file.display())]
    ClusterToken {
        /// The file named.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate or key cannot be used.
    #[error("[transfer.tls] {field} {}: {reason}", file.display())]
    Tls {
        /// The setting.
        field: &'static str,
        /// The file it names.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
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
