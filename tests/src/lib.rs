//! The whole system under test: real services in one process ([`TestCluster`]) or real processes ([`process`]), and a client
//! that sees what a user sees.
#![forbid(unsafe_code)]

pub mod client;
pub mod contract;
pub mod etcd;
pub mod process;

mod cluster;

pub use client::Client;
pub use cluster::{Speculation, TestCluster};

use std::path::PathBuf;

/// Returns the root of the repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_path_buf()
}

/// Returns the bundled model.
pub fn demo_model() -> PathBuf {
    root().join("models/demo")
}

/// Returns a golden checkpoint by name.
pub fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}
