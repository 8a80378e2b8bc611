//! One forward pass over rows of several sequences.

use crate::{Config, Error, KvMemory, Model, Sampled, Sampling, TokenId};
use kv_cache::PageId;
use std::sync::Arc;

/// What one sequence computes in a step.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The tokens to compute, at positions `start ..`.
    pub tokens: &'a [TokenId],
    /// Tokens whose keys and values are in `pages` already.
    pub start: usize,
    /// The sequence's pages in order; they cover positions up to `start + tokens.len()`.
    pub pages: &'a [PageId],
    /// Present when a token is drawn after the last of `tokens`.
    pub sample: Option<Sample<'a>>,
}

/// What drawing a token needs to know of its sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// How to draw.
    pub sampling: &'a Sampling,
    /// All tokens so far, prompt first.
    pub history: &'a [TokenId],
    /// How many of `history` are the prompt; the drawn token's index is `history.len() - prompt_tokens`.
    pub prompt_tokens: usize,
    /// Tokens that must not be drawn (end-of-sequence and stop ids while under `min_tokens`).
    pub forbidden: &'a [TokenId],
}

/// A model with the pages and buffers of one worker.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    memory: Arc<KvMemory>,
}

impl Engine {
    /// Reserves pages and buffers for `model`.
    pub fn new(_model: Arc<Model>, _config: &Config) -> Result<Self, Error> {
        todo!()
    }

    /// Returns the model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Returns the pages.
    pub fn memory(&self) -> &Arc<KvMemory> {
        &self.memory
    }

    /// Returns the longest sequence this engine takes, in tokens.
    pub fn max_model_len(&self) -> usize {
        todo!()
    }

    /// Computes `rows` (at most `token_budget` tokens in all) and draws a token for each row that asks.
    ///
    /// Keys and values are written to the rows' pages. `on_layer(l)` is called on this thread when layer `l`'s blocks of all
    /// rows are final, while later layers are still to come: it must return fast. A row's bits do not depend on the other
    /// rows, on how a prompt was cut into chunks, or on the number of threads.
    ///
    /// # Errors
    /// [`Error::Row`] names the row at fault; nothing is computed then.
    pub fn step(&mut self, _rows: &[Row<'_>], _on_layer: &mut dyn FnMut(u32)) -> Result<Vec<Option<Sampled>>, Error> {
        todo!()
    }
}
