//! What a cluster is asked to do, and how well it did.
//!
//! Owns traces (who asks for how much, when, and what prompts have in common), the processes by which requests arrive, and the
//! figures of a run. It sends nothing and waits for nothing: `baton bench` plays a trace against a server and the simulation
//! plays it in virtual time, and both are measured by the same [`Summary`].
//!
//! Content is kept as *blocks*: an id stands for a run of tokens, and equal ids are equal tokens. That is all that published
//! traces say about their prompts, and all that a prefix cache wants to know.
#![forbid(unsafe_code)]

mod arrivals;
mod summary;
mod trace;

pub use arrivals::Arrivals;
pub use summary::{Distribution, Objectives, Served, Summary};
pub use trace::{Error, Format, Request, Trace};
