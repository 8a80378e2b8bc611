//! Tests of the whole engine: recorded references, batch invariance, bad checkpoints.
//!
//! They live in the crate so that buffers end at guard pages and every instruction set of the machine is tried.

mod adapters;
mod cards;
mod checkpoints;
mod embeddings;
mod footprint;
mod gguf;
mod golden;
mod grammars;
mod greedy;
mod hostile;
mod invariance;
mod limits;
mod quantized;
mod timed;

use crate::{
    Adapter, Config, Device, Engine, Logprobs, Model, PromptLogprobs, Row, Sample, Sampled, Sampling, TokenId,
    cpu::kernels::Kernels,
    cuda::{Emulated, Order},
};
use kv_cache::PageId;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Returns a directory of the repository: where it is now, which on a machine that the tests were carried to is another place.
pub(crate) fn repository(path: &str) -> PathBuf {
    let crate_dir = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&crate_dir).join("..").join(path)
}

pub(crate) fn load(path: &str) -> Arc<Model> {
    Model::load(&repository(path), &mut |_| {}).expect("a good checkpoint")
}

pub(crate) fn small_config() -> Config {
    Config {
        kv_bytes: Some(8 << 20),
        token_budget: 512,
        max_sequences: 16,
        threads: Some(2),
        max_model_len: Some(1024),
        ..Config::default()
    }
}

/// Draws the most likely token and leaves the logits to be looked at.
pub(crate) fn watched() -> Sampling {
    Sampling { logprobs: Some(0), ..Sampling::default() }
}

/// What computes in a test.
#[derive(Clone, Copy, Debug)]
enum Unit {
    /// The processor, by kernels of one instruction set.
    Kernels(&'static Kernels),
    /// A card that the processor plays, whose threads take turns in some order.
    Card(Order),
    /// One with a library that multiplies where that need not be exact, but not so many inputs.
    Library(u32),
    /// Several of them, which share the model.
    Cards(usize),
    /// A real card, exact or not.
    #[cfg(feature = "cuda")]
    Real(bool),
}

impl From<&'static Kernels> for Unit {
    fn from(kernels: &'static Kernels) -> Self {
        Unit::Kernels(kernels)
    }
}

impl Unit {
    fn engine(self, model: Arc<Model>, config: &Config) -> Engine {
        match self {
            Unit::Kernels(kernels) => Engine::with_kernels(model, config, kernels),
            Unit::Card(order) => Engine::on_devices(model, config, vec![Box::new(Emulated::new(order))]),
            Unit::Library(baffling) => {
                let device = Emulated::new(Order::Forward).with_library(baffling);
                Engine::on_devices(model, config, vec![Box::new(device)])
            }
            Unit::Cards(ranks) => {
                let config = Config { tensor_parallel: ranks, ..config.clone() };
                let boxed = |device| Box::new(device) as Box<dyn crate::cuda::Device>;
                let devices = Emulated::team(Order::Forward, ranks).into_iter().map(boxed).collect();
                Engine::on_devices(model, &config, devices)
            }
            #[cfg(feature = "cuda")]
            Unit::Real(exact) => {
                let setting = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, value)| value);
                let card = setting("BATON_CARD").map_or(0, |card| card.parse().expect("BATON_CARD: a number"));
                let library = |name| setting(name).map(PathBuf::from);
                let config = Config {
                    device: Device::Cuda(card),
                    exact,
                    nvrtc_library: library("BATON_NVRTC_LIBRARY"),
                    cublaslt_library: library("BATON_CUBLASLT_LIBRARY"),
                    ..config.clone()
                };
                Engine::new(model, &config)
            }
        }
        .expect("an engine")
    }
}

/// An engine and a sequence that grows in it.
struct Runner {
    engine: Engine,
    pages: Vec<PageId>,
    adapter: Option<Arc<Adapter>>,
}

impl Runner {
    /// Starts `unit` over `model`; the sequence's pages lie in no order.
    fn new(model: Arc<Model>, unit: impl Into<Unit>) -> Self {
        Self::with(model, unit, small_config())
    }

    fn with(model: Arc<Model>, unit: impl Into<Unit>, config: Config) -> Self {
        let config = Config { max_model_len: None, ..config };
        let engine = unit.into().engine(model, &config);
        let count = engine.memory().layout().pages;
        assert!(!count.is_multiple_of(37), "every page is to appear once");
        let pages = (0..count).map(|index| PageId((u64::from(index) * 37 % u64::from(count)) as u32)).collect();
        Self { engine, pages, adapter: None }
    }

    /// Computes `tokens[start..]` in chunks of `chunk` and draws what follows, by `sampling`.
    fn draw(&mut self, tokens: &[TokenId], start: usize, chunk: usize, sampling: &Sampling) -> Sampled {
        let mut last = None;
        let mut at = start;
        while at < tokens.len() {
            let end = tokens.len().min(at + chunk);
            let sample = Sample {
                sampling,
                history: tokens,
                prompt_tokens: tokens.len(),
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let row = Row {
                tokens: &tokens[at..end],
                start: at,
                pages: &self.pages,
                adapter: self.adapter.as_deref(),
                sample: (end == tokens.len()).then_some(sample),
                ..Row::default()
            };
            last = self.engine.step(&[row], &mut |_| {}).expect("a good row")[0].sampled.pop();
            at = end;
        }
        last.expect("the last chunk samples")
    }

    /// Returns what is known of each of `tokens` but the first, three alternatives each, computed in chunks of `chunk`.
    fn prompt_logprobs(&mut self, tokens: &[TokenId], chunk: usize) -> Vec<Logprobs> {
        let mut logprobs = Vec::new();
        for start in (0..tokens.len()).step_by(chunk) {
            let end = tokens.len().min(start + chunk);
            let targets = &tokens[start + 1..tokens.len().min(end + 1)];
            let row = Row {
                tokens: &tokens[start..end],
                start,
                pages: &self.pages,
                adapter: self.adapter.as_deref(),
                prompt_logprobs: Some(PromptLogprobs { targets, top: 3 }),
                ..Row::default()
            };
            logprobs.append(&mut self.engine.step(&[row], &mut |_| {}).expect("a good row")[0].prompt_logprobs);
        }
        logprobs
    }
}
