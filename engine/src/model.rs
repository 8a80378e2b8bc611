//! A checkpoint, loaded.

use crate::Error;
use kv_cache::TokenId;
use std::{path::Path, sync::Arc};

/// Facts about a checkpoint that others need.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// Architecture as the checkpoint names it, for example `LlamaForCausalLM`.
    pub architecture: String,
    /// Names these very weights: equal fingerprints compute equal pages.
    pub fingerprint: String,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// Longest sequence the checkpoint was made for.
    pub max_position: u32,
    /// Tokens that end a sequence (`generation_config.json`, else `config.json`).
    pub eos: Vec<TokenId>,
    /// Parameters.
    pub parameters: u64,
    /// Bytes the packed weights take.
    pub weight_bytes: u64,
    /// Element type of the weights, for people: `bf16`.
    pub dtype: String,
}

/// How far loading is, in bytes of weights.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes packed so far.
    pub done: u64,
    /// All bytes.
    pub total: u64,
}

/// A checkpoint packed for this machine. Several engines of one process share it.
#[derive(Debug)]
pub struct Model {
    info: ModelInfo,
}

impl Model {
    /// Loads a Hugging Face directory (`config.json`, `model.safetensors` or its shards), reporting progress as it goes.
    pub fn load(_dir: &Path, _progress: &mut dyn FnMut(LoadProgress)) -> Result<Arc<Self>, Error> {
        todo!()
    }

    /// Returns what is known about the checkpoint.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }
}
