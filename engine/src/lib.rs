//! Model and kernels: tokens in, logits and tokens out.
//!
//! The engine is synchronous and knows no network. A [`Model`] is a checkpoint, loaded and packed once and shared; an
//! [`Engine`] adds the pages ([`KvMemory`]) and the buffers of one worker and runs steps over them. Which sequences a step
//! holds is the [`scheduler`]'s decision, which is pure.

mod config;
mod error;
mod memory;
mod model;
mod sampling;
pub mod scheduler;
mod step;

pub use config::Config;
pub use error::Error;
pub use kv_cache::TokenId;
pub use memory::KvMemory;
pub use model::{LoadProgress, Model, ModelInfo};
pub use sampling::{Logprobs, Sampled, Sampling};
pub use step::{Engine, Row, Sample};
