//! The wire between a router and its workers, and nothing else.
//!
//! `proto/worker.proto` is the document; this crate is its generated code. Wire types stop at `rpc.rs` in the workers and at
//! `fleet.rs` in the router. The hand-off between workers has its own wire, in `kv-transfer`.
#![forbid(unsafe_code)]
#![allow(missing_debug_implementations, unreachable_pub, clippy::all)]

/// Reads and writes messages outside a stream.
pub use prost::Message;

tonic::include_proto!("baton.v1");

/// Version of this protocol; both ends refuse another one, naming both.
pub const PROTOCOL: u32 = 3;
