//! A checkpoint, loaded.

pub(crate) mod checkpoint;
pub(crate) mod decoder;
mod random;
pub(crate) mod rope;
pub(crate) mod weights;

use crate::Error;
use checkpoint::Checkpoint;
use decoder::Decoder;
use kv_cache::TokenId;
use std::{path::Path, sync::Arc};
use weights::Weights;

pub use checkpoint::ElementType;
pub use random::ModelShape;

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
    pub(crate) decoder: Decoder,
    pub(crate) weights: Weights,
}

impl Model {
    /// Loads a Hugging Face directory (`config.json`, `model.safetensors` or its shards), reporting progress as it goes.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file at fault, what is wrong and what was expected.
    pub fn load(dir: &Path, progress: &mut dyn FnMut(LoadProgress)) -> Result<Arc<Self>, Error> {
        if !dir.is_dir() {
            return Err(Error::checkpoint(dir, "no such directory"));
        }
        let decoder = Decoder::read(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let config = std::fs::read(dir.join("config.json")).map_err(|error| Error::checkpoint(dir, error))?;
        let fingerprint = checkpoint.fingerprint(&config);
        let weights = Weights::pack(&decoder, &checkpoint, progress)?;
        Ok(Arc::new(Self::new(decoder, weights, fingerprint)))
    }

    /// Makes a model of `shape` whose weights are random, from `seed`: what `bench` measures without a download.
    ///
    /// # Errors
    /// [`Error::System`] when there is no memory for the weights.
    pub fn random(shape: &ModelShape, seed: u64) -> Result<Arc<Self>, Error> {
        let fingerprint = blake3::hash(format!("{shape:?} {seed}").as_bytes()).to_hex()[..32].to_owned();
        Ok(Arc::new(Self::new(shape.decoder(), shape.weights(seed)?, fingerprint)))
    }

    fn new(decoder: Decoder, weights: Weights, fingerprint: String) -> Self {
        let info = ModelInfo {
            architecture: decoder.architecture.clone(),
            fingerprint,
            vocab_size: decoder.vocab_size as u32,
            max_position: decoder.max_position as u32,
            eos: decoder.eos.clone(),
            parameters: weights.parameters,
            weight_bytes: weights.bytes(),
            dtype: weights.dtype.name().to_owned(),
        };
        Self { info, decoder, weights }
    }

    /// Returns what is known about the checkpoint.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }
}
