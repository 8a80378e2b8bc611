//! What is handed over: pools, pages and their contents, the same in every run and in both processes.

use anyhow::{Context, bail};
use kv_cache::{KvDtype, PageId, PageLayout};
use rand::{RngCore, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Tokens of every hand-off.
pub(super) const TOKENS: u32 = 512;

/// One shape of hand-off. Pools are eight hand-offs large, so that blocks rarely come from a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    /// 1,536 blocks of 16 KiB, no two of them neighbours but by chance.
    Scattered,
    /// The same, all pages of a hand-off side by side.
    Runs,
    /// 512 tokens of Llama-3.2-1B: 512 blocks of 32 KiB, scattered.
    Prompt,
}

impl Case {
    /// Names it to the other process.
    pub(super) fn name(self) -> &'static str {
        match self {
            Case::Scattered => "scattered",
            Case::Runs => "runs",
            Case::Prompt => "prompt",
        }
    }

    /// Returns the case of that name.
    pub(super) fn named(name: &str) -> anyhow::Result<Self> {
        match [Case::Scattered, Case::Runs, Case::Prompt].into_iter().find(|case| case.name() == name) {
            Some(case) => Ok(case),
            None => bail!("{name:?} is no case of the hand-off bench"),
        }
    }

    /// Returns the shape of both pools.
    pub(super) fn layout(self) -> PageLayout {
        let (layers, kv_heads) = if self == Case::Prompt { (16, 8) } else { (48, 4) };
        PageLayout { layers, page_tokens: 16, kv_heads, key_dim: 64, value_dim: 64, dtype: KvDtype::Bf16, pages: 256 }
    }

    /// Returns the pages of one hand-off.
    pub(super) fn pages(self) -> usize {
        self.layout().pages_for(TOKENS as usize)
    }

    /// Returns the bytes of one hand-off.
    pub(super) fn bytes(self) -> usize {
        self.layout().page_bytes() * self.pages()
    }
}

/// Deals out the pages of one pool, a hand-off's at a time, in a random order that repeats.
#[derive(Debug)]
pub(super) struct Deal {
    each: usize,
    order: Vec<PageId>,
    at: usize,
}

impl Deal {
    /// Starts with `seed`; source and target have different ones.
    pub(super) fn new(case: Case, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut order: Vec<PageId> = (0..case.layout().pages).map(PageId).collect();
        if case == Case::Runs {
            let mut runs: Vec<_> = order.chunks(case.pages()).collect();
            runs.shuffle(&mut random);
            order = runs.concat();
        } else {
            order.shuffle(&mut random);
        }
        Self { each: case.pages(), order, at: 0 }
    }

    /// The source's.
    pub(super) fn source(case: Case) -> Self {
        Self::new(case, 1)
    }

    /// The target's.
    pub(super) fn target(case: Case) -> Self {
        Self::new(case, 2)
    }

    /// Returns the pages of the next hand-off.
    pub(super) fn next(&mut self) -> Vec<PageId> {
        let range = self.at..self.at + self.each;
        self.at = range.end % self.order.len();
        self.order[range].to_vec()
    }

    /// Returns how many hand-offs it takes to touch every page.
    pub(super) fn round(&self) -> usize {
        self.order.len() / self.each
    }
}

/// Fills `block` with what the source's block of `page` in `layer` holds.
pub(super) fn contents(layer: u32, page: PageId, block: &mut [u8]) {
    StdRng::seed_from_u64(u64::from(layer) << 32 | u64::from(page.0)).fill_bytes(block);
}

/// Reads a case and a kind's name out of `CASE/KIND`, as one process of the bench tells the other.
pub(super) fn parse(name: &str) -> anyhow::Result<(Case, &str)> {
    let (case, kind) = name.split_once('/').with_context(|| format!("{name:?} is not CASE/KIND"))?;
    Ok((Case::named(case)?, kind))
}
