//! Text: the one place in the cluster that knows it.
//!
//! A [`TextModel`] is what the router reads of a model's directory or GGUF file: tokenizer, chat template, generation defaults. Rendering
//! and tokenising what is long and new run on a small bounded pool of blocking threads ([`TextPool`]), because that costs milliseconds. What
//! costs less than handing it to another thread happens where it is: a short prompt, a long one whose parts were seen lately, and
//! detokenising one token.

pub(crate) mod detokenizer;
pub(crate) mod embedding;
mod gguf;
#[cfg(test)]
mod hostile;
mod merges;
mod pieces;
mod python;
pub(crate) mod stop;
pub(crate) mod template;
pub(crate) mod tokenizer;
mod words;

use anyhow::Context;
use embedding::EmbeddingShape;
use grammar::{Grammars, Limits, TokenTable};
use kv_cache::TokenId;
use serde::Deserialize;
use serde_json::{Map, Value as Json};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, OnceLock},
};
use template::ChatTemplate;
use tokenizer::Tokenizer;
use tokio::sync::Semaphore;

/// What the router knows of a model.
#[derive(Debug)]
pub(crate) struct TextModel {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) defaults: GenerationDefaults,
    /// Tokens that end a sequence.
    pub(crate) eos: BTreeSet<TokenId>,
    /// Longest sequence by the model's own config.
    pub(crate) context_tokens: u32,
    /// Rows of the logits: the bound for token ids clients name.
    pub(crate) vocab_size: u32,
    /// What its files say of embeddings.
    pub(crate) embedding: EmbeddingShape,
    /// Names the configuration to clients.
    pub(crate) fingerprint: String,
    /// What compiles grammars, once one was asked for.
    grammars: OnceLock<Result<Arc<Grammars>, grammar::Error>>,
}

/// Sampling settings the model's authors recommend, used where a request says nothing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct GenerationDefaults {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) do_sample: Option<bool>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(TokenId),
    Many(Vec<TokenId>),
}

impl OneOrMany {
    fn as_slice(&self) -> &[TokenId] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// The fields of `config.json` that matter here. Models with a vision part keep them under `text_config`.
#[derive(Deserialize)]
struct ModelConfig {
    max_position_embeddings: Option<u32>,
    vocab_size: Option<u32>,
    hidden_size: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    text_config: Option<Box<ModelConfig>>,
}

impl TextModel {
    /// Reads an HF directory or a GGUF file. Errors name the file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        if path.is_file() {
            return gguf::load(path).with_context(|| format!("read {}", path.display()));
        }
        if !path.is_dir() {
            anyhow::bail!("model {} does not exist", path.display());
        }
        Self::load_directory(path)
    }

    fn load_directory(dir: &Path) -> anyhow::Result<Self> {
        let config_json = read(&dir.join("config.json"))?;
        let config: ModelConfig = parse(&dir.join("config.json"), &config_json)?;
        let config =
            config.text_config.map_or_else(|| parse(&dir.join("config.json"), &config_json), |inner| Ok(*inner))?;
        let generation_path = dir.join("generation_config.json");
        let defaults: GenerationDefaults = if generation_path.exists() {
            parse(&generation_path, &read(&generation_path)?)?
        } else {
            GenerationDefaults::default()
        };
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        let (template, special_tokens) = read_tokenizer_config(dir)?;
        let template = template.map(|source| ChatTemplate::compile(&source, special_tokens)).transpose()?;

        let eos = defaults.eos_token_id.as_ref().or(config.eos_token_id.as_ref());
        let eos = eos.map(|ids| ids.as_slice().iter().copied().collect()).unwrap_or_default();
        let vocab_size = config.vocab_size.unwrap_or(tokenizer.vocab_size() as u32);
        let fingerprint = format!("fp_{}", &blake3::hash(config_json.as_bytes()).to_hex()[..12]);
        let context_tokens = config.max_position_embeddings.unwrap_or(u32::MAX);
        Ok(Self {
            tokenizer,
            template,
            defaults,
            eos,
            context_tokens,
            vocab_size,
            embedding: EmbeddingShape::read(dir, &config_json, config.hidden_size)?,
            fingerprint,
            grammars: OnceLock::new(),
        })
    }

    /// Returns what compiles grammars for this model. The first call takes a while: it is for the text threads.
    pub(crate) fn grammars(&self) -> Result<Arc<Grammars>, grammar::Error> {
        let make = || {
            let eos: Vec<TokenId> = self.eos.iter().copied().filter(|token| *token < self.vocab_size).collect();
            let known = 0..self.tokenizer.vocab_size() as TokenId;
            let pieces = known.map(|id| (id, self.tokenizer.bytes(id).to_vec(), self.tokenizer.is_special(id)));
            let table = TokenTable::from_parts(self.vocab_size as usize, &eos, pieces)?;
            // Nothing is sampled here, so no masks are worked out.
            Grammars::new(Arc::new(table), Limits::default(), 1).map(Arc::new)
        };
        self.grammars.get_or_init(make).clone()
    }
}

/// Returns the chat template, if there is one, and the named special tokens.
fn read_tokenizer_config(dir: &Path) -> anyhow::Result<(Option<String>, Map<String, Json>)> {
    let path = dir.join("tokenizer_config.json");
    let config: Map<String, Json> = if path.exists() { parse(&path, &read(&path)?)? } else { Map::new() };
    let special_tokens = config.iter().filter(|(key, _)| key.ends_with("_token")).filter_map(|(key, value)| {
        // A special token is a string, or an object that holds it.
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((key.clone(), Json::from(text)))
    });
    let special_tokens = special_tokens.collect();
    let own_file = dir.join("chat_template.jinja");
    let template =
        if own_file.exists() { Some(read(&own_file)?) } else { config.get("chat_template").and_then(default_template) };
    Ok((template, special_tokens))
}

/// A template is a string, or a list of named ones of which `default` is meant.
fn default_template(value: &Json) -> Option<String> {
    match value {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => {
            let default = named.iter().find(|t| t.get("name").and_then(Json::as_str) == Some("default"))?;
            Some(default.get("template")?.as_str()?.to_string())
        }
        _ => None,
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn parse<'a, T: Deserialize<'a>>(path: &Path, text: &'a str) -> anyhow::Result<T> {
    serde_json::from_str(text).with_context(|| format!("parse {}", path.display()))
}

/// Threads for work on text. Cloning shares them.
#[derive(Clone, Debug)]
pub(crate) struct TextPool {
    permits: Arc<Semaphore>,
}

impl TextPool {
    /// Allows `threads` pieces of work at once; 0 takes half of the cores. More wait in order of arrival; how many may wait is admission's
    /// business.
    pub(crate) fn new(threads: usize) -> Self {
        let half = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
        Self { permits: Arc::new(Semaphore::new(if threads == 0 { half } else { threads })) }
    }

    /// Runs `work` on a blocking thread. When the caller goes away, work that has begun is finished for nothing.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let permit = self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let span = tracing::Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            span.in_scope(work)
        });
        match task.await {
            Ok(value) => value,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}
