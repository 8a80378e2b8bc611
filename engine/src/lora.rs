//! Adapters (LoRA, arXiv 2106.09685): small deltas of a model's linears, many of them beside one model.
//!
//! An [`Adapter`] is a PEFT directory, read for one model and immutable. [`Adapters`] are those of one worker, by the name
//! clients use; they come and go while steps run, because a sequence holds its own. How deltas are computed is in
//! [`crate::cpu::adapter`].
//!
//! An adapter's id names its contents. It is part of the root of page hashes ([`kv_cache::root_salt`]), so pages of
//! different adapters never meet, and it is what a router and its workers agree on: a name alone could mean two things.

mod config;
mod weights;

pub(crate) use weights::LayerDeltas;

use crate::{Error, Model};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

/// The most adapters at once: each takes memory that nothing else accounts for.
const MAX_ADAPTERS: usize = 256;

/// An adapter, ready for the model it was read for.
#[derive(Debug)]
pub struct Adapter {
    id: String,
    /// Fingerprint of the model.
    model: String,
    path: PathBuf,
    rank: usize,
    bytes: u64,
    layers: Vec<LayerDeltas>,
    /// Lives as long as the adapter.
    life: Arc<()>,
}

impl Adapter {
    /// Reads a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`) whose ranks are at most `max_rank`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file and the field or tensor, what is there and what was expected.
    pub fn load(model: &Model, dir: &Path, max_rank: usize) -> Result<Arc<Self>, Error> {
        if !dir.is_dir() {
            return Err(Error::checkpoint(dir, "no such directory"));
        }
        weights::read(model, dir, max_rank).map(Arc::new)
    }

    /// Returns the name of its contents: adapters of equal ids compute equal pages.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its largest rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the bytes it takes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Says whether it was read for `model`.
    pub(crate) fn is_for(&self, model: &Model) -> bool {
        self.model == model.info().fingerprint
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerDeltas {
        &self.layers[layer]
    }

    pub(crate) fn layers(&self) -> &[LayerDeltas] {
        &self.layers
    }

    /// Returns what tells it from all others, and whoever keeps a [`Weak`](std::sync::Weak) of it that nobody has the adapter any more.
    pub(crate) fn life(&self) -> &Arc<()> {
        &self.life
    }
}

/// Why an adapter was not loaded or unloaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The name is in use.
    #[error("adapter `{0}` is loaded already")]
    Exists(String),
    /// No adapter has the name.
    #[error("adapter `{0}` is not loaded")]
    Unknown(String),
    /// There is no such directory.
    #[error("{}: no such directory", .0.display())]
    NotFound(PathBuf),
    /// One must be unloaded first.
    #[error("{0} adapters are loaded already, and that is the most")]
    Full(usize),
    /// What is there cannot be used.
    #[error(transparent)]
    Unusable(#[from] Error),
}

/// The adapters of one worker by name.
#[derive(Debug)]
pub struct Adapters {
    model: Arc<Model>,
    max_rank: usize,
    loaded: RwLock<BTreeMap<String, Arc<Adapter>>>,
}

impl Adapters {
    /// Makes an empty list for `model` that takes ranks up to `max_rank`.
    pub fn new(model: Arc<Model>, max_rank: usize) -> Self {
        Self { model, max_rank, loaded: RwLock::default() }
    }

    /// Reads the adapter in `dir` and serves it as `name`. Reading takes as long as the disk does; steps go on meanwhile.
    ///
    /// # Errors
    /// When the name is in use, or the directory cannot be read ([`Adapter::load`]).
    pub fn load(&self, name: &str, dir: &Path) -> Result<Arc<Adapter>, AdapterError> {
        self.check_free(&self.loaded.read().expect("no code panics while it holds the list"), name)?;
        if !dir.is_dir() {
            return Err(AdapterError::NotFound(dir.to_owned()));
        }
        let adapter = Adapter::load(&self.model, dir, self.max_rank)?;
        let mut loaded = self.loaded.write().expect("no code panics while it holds the list");
        self.check_free(&loaded, name)?;
        loaded.insert(name.to_owned(), adapter.clone());
        tracing::info!(name, id = adapter.id, path = %dir.display(), rank = adapter.rank, bytes = adapter.bytes, "adapter loaded");
        Ok(adapter)
    }

    fn check_free(&self, loaded: &BTreeMap<String, Arc<Adapter>>, name: &str) -> Result<(), AdapterError> {
        if loaded.contains_key(name) {
            return Err(AdapterError::Exists(name.to_owned()));
        }
        if loaded.len() >= MAX_ADAPTERS {
            return Err(AdapterError::Full(loaded.len()));
        }
        Ok(())
    }

    /// Takes `name` off the list. Sequences that hold the adapter finish with it.
    pub fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let mut loaded = self.loaded.write().expect("no code panics while it holds the list");
        let adapter = loaded.remove(name).ok_or_else(|| AdapterError::Unknown(name.to_owned()))?;
        tracing::info!(name, id = adapter.id, "adapter unloaded");
        Ok(())
    }

    /// Returns the adapter with this id, under whichever name.
    pub fn get(&self, id: &str) -> Option<Arc<Adapter>> {
        let loaded = self.loaded.read().expect("no code panics while it holds the list");
        loaded.values().find(|adapter| adapter.id == id).cloned()
    }

    /// Returns all adapters with their names, sorted by name.
    pub fn list(&self) -> Vec<(String, Arc<Adapter>)> {
        let loaded = self.loaded.read().expect("no code panics while it holds the list");
        loaded.iter().map(|(name, adapter)| (name.clone(), adapter.clone())).collect()
    }
}
