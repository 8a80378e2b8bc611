//! Model and kernels: tokens in, logits and tokens out.
//!
//! The engine is synchronous and knows no network. A [`Model`] is a checkpoint, loaded and packed once and shared; an
//! [`Engine`] adds the pages ([`KvMemory`]) and the buffers of one worker and runs steps over them. Which sequences a step
//! holds is the [`scheduler`]'s decision, which is pure.
//!
//! Precision: the residual stream, norms, rotation, attention and logits are f32. Weights stay as stored; f32 and f16 weights
//! meet f32 inputs, bf16 weights meet inputs rounded to bf16, and all sums are f32. Keys and values are rounded once, when they
//! are written to their page. On one kind of processor a sequence's bits depend on nothing but the sequence; processors of
//! different kinds differ in the last bits.

mod config;
mod cpu;
mod error;
pub mod machine;
mod memory;
mod model;
mod sampling;
pub mod scheduler;
mod step;

pub use config::Config;
pub use error::Error;
pub use kv_cache::TokenId;
pub use memory::KvMemory;
pub use model::{ElementType, LoadProgress, Model, ModelInfo, ModelShape};
pub use sampling::{Logprobs, Sample, Sampled, Sampling, draw};
pub use step::{Engine, Row};

#[cfg(test)]
mod tests;
