//! A checkpoint, loaded.

pub(crate) mod checkpoint;
pub(crate) mod decoder;
pub(crate) mod experts;
pub(crate) mod gguf;
pub(crate) mod latent;
mod packer;
pub(crate) mod quantized;
mod random;
pub(crate) mod rope;
pub(crate) mod routing;
pub(crate) mod weights;

use crate::{Error, tokens::Tokens};
use checkpoint::Checkpoint;
use decoder::Decoder;
use grammar::Grammars;
use kv_cache::TokenId;
use quantized::Quantization;
use std::{path::Path, sync::Arc};
use weights::Weights;

pub use checkpoint::ElementType;
pub use quantized::Quantize;
pub use random::{ExpertShape, LatentRanks, ModelShape};

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
    /// Element type of the weights, for people: `bf16`, `int4 (gptq, group 32)`.
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
    tokens: Arc<Tokens>,
    pub(crate) decoder: Decoder,
    /// `None` where they are on a card alone.
    weights: Option<Weights>,
    /// Of all experts.
    pub(crate) expert_bytes: u64,
}

impl Model {
    /// Loads a Hugging Face directory (`config.json`, `model.safetensors` or its shards) or a GGUF file, reporting progress as
    /// it goes.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file at fault, what is wrong and what was expected.
    pub fn load(path: &Path, progress: &mut dyn FnMut(LoadProgress)) -> Result<Arc<Self>, Error> {
        Self::load_quantized(path, None, progress)
    }

    /// Loads a directory or file as [`Model::load`] does and quantises its linears as `quantize` says, matrix by matrix while
    /// they are packed.
    ///
    /// Embedding and norms stay as stored, and the head becomes int8 in groups of 32 (so does an embedding that is the head).
    ///
    /// # Errors
    /// As for [`Model::load`], and [`Error::Setting`] when the checkpoint is quantised already.
    pub fn load_quantized(
        path: &Path,
        quantize: Option<Quantize>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Arc<Self>, Error> {
        let Opened { decoder, checkpoint, quantization, mut config } = Opened::open(path)?;
        if let (Some(quantize), Some(already)) = (quantize, &quantization) {
            let problem = format!("{quantize}, but the checkpoint is quantised already: {}", already.describe());
            return Err(Error::setting("quantize", problem));
        }
        // Pages that weights of another width computed are other pages.
        config.extend(quantize.map_or("", Quantize::name).bytes());
        let fingerprint = checkpoint.fingerprint(&config);
        checkpoint.release();
        let weights = Weights::pack(&decoder, &checkpoint, quantization.as_ref(), quantize, progress)?;
        let tokens = Tokens::of(path);
        Ok(Arc::new(Self::new(decoder, weights, fingerprint, tokens)))
    }

    /// Makes a model of `shape` whose weights are random, from `seed`: what `bench` measures without a download.
    ///
    /// # Errors
    /// [`Error::System`] when there is no memory for the weights.
    pub fn random(shape: &ModelShape, seed: u64) -> Result<Arc<Self>, Error> {
        let fingerprint = blake3::hash(format!("{shape:?} {seed}").as_bytes()).to_hex()[..32].to_owned();
        Ok(Arc::new(Self::new(shape.decoder()?, shape.weights(seed)?, fingerprint, Tokens::default())))
    }

    fn new(decoder: Decoder, weights: Weights, fingerprint: String, tokens: Tokens) -> Self {
        let info = ModelInfo {
            architecture: decoder.architecture.clone(),
            fingerprint,
            vocab_size: decoder.vocab_size as u32,
            max_position: decoder.max_position as u32,
            eos: decoder.eos.clone(),
            parameters: weights.parameters,
            weight_bytes: weights.bytes(),
            dtype: weights.dtype.clone(),
        };
        let expert_bytes = weights.expert_bytes();
        Self { info, tokens: Arc::new(tokens), decoder, weights: Some(weights), expert_bytes }
    }

    /// Returns what it is without its weights, for whoever has them on a card: the memory of those is given back with the last model that has them.
    pub(crate) fn without_weights(&self) -> Self {
        let Self { info, tokens, decoder, expert_bytes, .. } = self;
        let (info, tokens, decoder) = (info.clone(), tokens.clone(), decoder.clone());
        Self { info, tokens, decoder, weights: None, expert_bytes: *expert_bytes }
    }

    /// Returns the weights.
    ///
    /// # Panics
    /// Of a model [without them](Model::without_weights).
    pub(crate) fn weights(&self) -> &Weights {
        self.weights.as_ref().expect("what a card's engine calls its model is no model to make another engine of")
    }

    /// Returns what compiles grammars for this model; the first call takes a while.
    ///
    /// # Errors
    /// [`grammar::Error::Tokens`] when the model's tokens are not known.
    pub fn grammars(&self) -> Result<Arc<Grammars>, grammar::Error> {
        self.tokens.grammars(self.decoder.vocab_size, &self.decoder.eos)
    }

    /// Returns what is known about the checkpoint.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }
}

/// A checkpoint whose description was read, and whose weights are mapped.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) decoder: Decoder,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) quantization: Option<Quantization>,
    /// The description's bytes, for the fingerprint.
    config: Vec<u8>,
}

impl Opened {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        if path.is_file() {
            return gguf::open(path);
        }
        if !path.is_dir() {
            return Err(Error::checkpoint(path, "no such directory"));
        }
        let decoder = Decoder::read(path)?;
        let checkpoint = Checkpoint::open(path)?;
        let path = path.join("config.json");
        let config = std::fs::read(&path).map_err(|error| Error::checkpoint(&path, error))?;
        let quantization = serde_json::from_slice(&config).map_err(|error| error.to_string());
        let quantization = quantization.and_then(|config| Quantization::parse(&config));
        let quantization = quantization.map_err(|problem| Error::checkpoint(&path, problem))?;
        Ok(Self { decoder, checkpoint, quantization, config })
    }
}
