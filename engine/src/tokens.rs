//! The grammars of a model, made when they are first asked for: reading the bytes of all tokens takes a while, and most
//! processes that load a model never need them. What grammars are is the `grammar` crate's.

use crate::model::gguf;
use grammar::{Error, Grammars, Limits, TokenId, TokenTable};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// Where the bytes of a model's tokens come from, and what was made of them.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    source: Source,
    grammars: OnceLock<Result<Arc<Grammars>, Error>>,
}

#[derive(Debug, Default)]
enum Source {
    /// The weights are random: tokens mean nothing.
    #[default]
    None,
    /// A `tokenizer.json`.
    File(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl Tokens {
    /// Tokens of the checkpoint at `path`, a directory or a GGUF file; they are not read yet.
    pub(crate) fn of(path: &Path) -> Self {
        let source = if path.is_file() { Source::Gguf(path.into()) } else { Source::File(path.join("tokenizer.json")) };
        Self { source, grammars: OnceLock::new() }
    }

    /// Returns the grammars of a model with `vocab_size` rows of logits, whose sequences end with `eos`.
    pub(crate) fn grammars(&self, vocab_size: usize, eos: &[TokenId]) -> Result<Arc<Grammars>, Error> {
        let make = || {
            let table = match &self.source {
                Source::None => return Err(Error::Tokens("this model has no tokenizer, so no grammar fits it".into())),
                Source::File(path) => Arc::new(TokenTable::read(path, vocab_size, eos)?),
                Source::Gguf(path) => Arc::new(gguf::tokens(path, vocab_size, eos)?),
            };
            // Masks are worked out beside the step, which has all other cores.
            let helpers = std::thread::available_parallelism().map_or(1, |threads| threads.get().div_ceil(4));
            Grammars::new(table, Limits::default(), helpers).map(Arc::new)
        };
        self.grammars.get_or_init(make).clone()
    }
}
