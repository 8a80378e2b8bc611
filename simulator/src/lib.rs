//! A cluster in virtual time.
//!
//! The decisions are the real ones: [`placement`] chooses, the prefix index is filled from page events, every worker has the engine's scheduler
//! over a real page pool, and learns its own pace from its steps. Only what takes time is imagined: a step takes what a [`timing::Pace`]
//! says, bytes take what a link's bandwidth says, a message takes a constant. So an hour of thousands of workers is simulated in
//! seconds, and the same seed gives the same hour.
//!
//! Rivals' ways to place ([`Policy`]) run on the same workers and see the same reports.
#![forbid(unsafe_code)]

mod link;
mod policy;
mod router;
mod worker;
mod world;

pub use policy::Policy;
pub use world::{Config, Outcome, run};

use timing::Profile;

/// Returns the profile of a node of eight A800 with a 70B model.
pub fn a800() -> Profile {
    Profile::parse(include_str!("../profiles/8xa800-llama2-70b.toml")).expect("a test reads it")
}

#[cfg(test)]
mod tests;
