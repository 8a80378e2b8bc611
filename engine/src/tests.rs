//! Tests of the whole engine: recorded references, batch invariance, bad checkpoints.
//!
//! They live in the crate so that buffers end at guard pages and every instruction set of the machine is tried.

mod checkpoints;
mod golden;
mod invariance;
mod limits;

use crate::{Config, Engine, Model, Row, Sample, Sampled, Sampling, TokenId, cpu::kernels::Kernels};
use kv_cache::PageId;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Returns a directory of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn load(path: &str) -> Arc<Model> {
    Model::load(&repository(path), &mut |_| {}).expect("a good checkpoint")
}

fn small_config() -> Config {
    Config {
        kv_bytes: 8 << 20,
        token_budget: 512,
        max_sequences: 16,
        threads: Some(2),
        max_model_len: Some(1024),
        ..Config::default()
    }
}

/// An engine and a sequence that grows in it.
struct Runner {
    engine: Engine,
    pages: Vec<PageId>,
}

impl Runner {
    /// Starts `kernels` over `model`; the sequence's pages lie in no order.
    fn new(model: Arc<Model>, kernels: &'static Kernels) -> Self {
        let config = Config { max_model_len: None, ..small_config() };
        let engine = Engine::with_kernels(model, &config, kernels).expect("an engine");
        let count = engine.memory().layout().pages;
        assert!(!count.is_multiple_of(37), "every page is to appear once");
        let pages = (0..count).map(|index| PageId((u64::from(index) * 37 % u64::from(count)) as u32)).collect();
        Self { engine, pages }
    }

    /// Computes `tokens[start..]` in chunks of `chunk` and draws what follows, by `sampling`.
    fn draw(&mut self, tokens: &[TokenId], start: usize, chunk: usize, sampling: &Sampling) -> Sampled {
        let mut last = None;
        let mut at = start;
        while at < tokens.len() {
            let end = tokens.len().min(at + chunk);
            let sample = Sample { sampling, history: tokens, prompt_tokens: tokens.len(), forbidden: &[] };
            let row = Row {
                tokens: &tokens[at..end],
                start: at,
                pages: &self.pages,
                sample: (end == tokens.len()).then_some(sample),
            };
            last = self.engine.step(&[row], &mut |_| {}).expect("a good row").pop().flatten();
            at = end;
        }
        last.expect("the last chunk samples")
    }
}
