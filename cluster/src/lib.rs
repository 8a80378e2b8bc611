//! Who is here, and in what state.
//!
//! A [`Directory`] keeps the members: over etcd ([`EtcdDirectory`]) or in this process ([`MemoryDirectory`]). It holds what changes
//! slowly; whatever is faster than once a second flows worker to router over gRPC. Losing the directory stops joins and
//! leaves, never traffic: the last [`View`] stays in force.
//!
//! | file | noun |
//! |---|---|
//! | `member.rs` | a member and what it says of itself |
//! | `directory.rs` | the trait, and why it refuses |
//! | `registration.rs` | a member's place in the directory, and how often it may publish |
//! | `view.rs` | everybody: how lists and changes merge, outages included (pure) |
//! | `memory.rs` | the directory of one process |
//! | `etcd.rs`, `etcd/` | the directory over etcd |
#![forbid(unsafe_code)]

mod directory;
mod etcd;
mod member;
mod memory;
mod registration;
mod view;

pub use directory::{Directory, Error};
pub use etcd::{EtcdConfig, EtcdDirectory};
pub use member::{Capacity, LoadSummary, Member, ModelCard, Role, State};
pub use memory::MemoryDirectory;
pub use registration::Registration;
pub use view::View;
