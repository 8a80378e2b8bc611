//! Model and kernels: tokens in, logits and tokens out.
//!
//! The engine is synchronous and knows no network. A [`Model`] is a checkpoint, loaded and packed once and shared; an
//! [`Engine`] adds the pages ([`KvMemory`]) and the buffers of one worker and runs steps over them. Which sequences a step
//! holds is the [`scheduler`]'s decision, which is pure.
//!
//! Precision: the residual stream, norms, rotation, attention and logits are f32. Weights stay as stored; f32, f16 and quantised
//! weights meet f32 inputs, bf16 weights meet inputs rounded to bf16 when all of a model's are bf16, and all sums are f32. Keys and values are rounded once, when they
//! are written to their page. On one kind of processor a sequence's bits depend on nothing but the sequence; processors of
//! different kinds differ in the last bits.

pub mod cards;
mod config;
mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod embedding;
mod error;
mod home;
mod lora;
pub mod machine;
mod memory;
mod model;
mod reuse;
mod sampling;
pub mod scheduler;
pub mod speculation;
mod step;
mod timed;
mod tokens;

pub use config::{Config, Device};
pub use embedding::{Embedding, Pooling};
pub use error::Error;
pub use grammar::{Mask, Masks, Matcher};
pub use kv_cache::TokenId;
pub use lora::{Adapter, AdapterError, Adapters};
pub use memory::KvMemory;
pub use model::{ElementType, ExpertShape, LatentRanks, LoadProgress, Model, ModelInfo, ModelShape, Quantize};
pub use sampling::{Logprobs, Sample, Sampled, Sampling, Stuck};
pub use step::{Engine, ExpertTraffic, PromptLogprobs, Row, Step, Yield, check_device};

#[cfg(test)]
mod tests;
