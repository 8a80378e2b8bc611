//! Where a request goes. Pure: no clock, no I/O, no randomness of its own.
//!
//! Whoever places keeps a [`Ledger`] of each worker, what it last reported and what was sent to it since, and one [`PrefixIndex`] of the pages
//! that workers hold. For a request both give [`Candidate`]s, and [`place`] chooses by what each way is predicted to [`cost`](Cost). The router
//! does so with live workers, the simulation with thousands of imagined ones.
#![forbid(unsafe_code)]

mod choose;
mod cost;
mod ledger;
mod prefix_index;
mod siblings;
mod weights;

pub use choose::{Candidate, Choice, Decision, Fetch, Kind, NoPath, has_path, place, place_beside};
pub use cost::{Cost, Demand, Speed, Worker};
pub use ledger::{Ledger, Report};
pub use prefix_index::{PrefixIndex, Slot};
pub use siblings::Siblings;
pub use weights::{Policy, Weights};
