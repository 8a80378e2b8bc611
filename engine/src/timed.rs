//! An engine that computes nothing and takes as long as if it did.
//!
//! Everything around the model stays what it is: pages, their names, batching, hand-offs, sampling, grammars. A step lasts as long as a
//! measured [`Profile`] says for what it holds, with its layers final at even distances, so that pages leave while others are "computed".
//! The logits after a token come from a hash of that token and its position, so a sequence that goes on elsewhere goes on the same.
//! Pages are as many as the profile says and hold next to nothing: a hand-off costs its messages, not its bytes.
//!
//! A step is never shorter than it should be. How much longer depends on the system's timer, whose slack on Linux is 50 us unless it
//! is told otherwise (`PR_SET_TIMERSLACK`); the next step begins when it is over, as with any engine.

use crate::{Config, Row, TokenId};
use kv_cache::{KvDtype, PageLayout};
use std::time::{Duration, Instant};
use timing::{Pace, Profile, Work};

/// How the steps of an engine are timed.
#[derive(Debug)]
pub(crate) struct Timed {
    pace: Pace,
    /// Tokens that end a sequence. They are never likely: how long an answer is belongs to the load, not to a hash.
    eos: Vec<TokenId>,
    vocab_size: usize,
    /// Those made last.
    logits: Vec<f32>,
}

/// Logit of the most likely token; others lie between 0 and 1. At temperature 1 and a vocabulary of 100,000 it has half of all.
const PEAK: f32 = 12.0;
/// Logit of tokens that end a sequence.
const LEAST: f32 = -20.0;

/// Returns the shape of a pool of as many pages as `profile` has room for, with `layers` layers of next to nothing.
pub(crate) fn page_layout(profile: &Profile, config: &Config, layers: u32) -> PageLayout {
    let pages = (profile.kv_tokens / u64::from(config.page_tokens)).clamp(1, u64::from(u32::MAX)) as u32;
    let dtype = config.kv_dtype.unwrap_or(KvDtype::Bf16);
    PageLayout { layers, page_tokens: config.page_tokens, kv_heads: 1, key_dim: 1, value_dim: 1, dtype, pages }
}

impl Timed {
    pub(crate) fn new(profile: &Profile, eos: &[TokenId], vocab_size: usize) -> Self {
        Self { pace: profile.pace, eos: eos.to_vec(), vocab_size, logits: Vec::new() }
    }

    /// Returns how long a step of `rows` takes. A draft costs what a token of a prompt does.
    pub(crate) fn step(&self, rows: &[Row<'_>]) -> Duration {
        let mut work = Work::default();
        for row in rows {
            if row.tokens.len() == 1 { work.single(row.start) } else { work.chunk(row.start, row.tokens.len()) }
        }
        self.pace.step(&work)
    }

    /// Waits out a step that began at `began` and takes `took`, and tells `on_layer` of each of `layers` in its time.
    pub(crate) fn wait(&self, began: Instant, took: Duration, layers: u32, on_layer: &mut dyn FnMut(u32)) {
        for layer in 0..layers {
            wait_until(began + took.mul_f64(f64::from(layer + 1) / f64::from(layers)));
            on_layer(layer);
        }
    }

    /// Returns the most likely token after `token`, which stands at `position`.
    pub(crate) fn most_likely(&self, position: usize, token: TokenId) -> TokenId {
        let mut next = (key(position, token) % self.vocab_size as u64) as TokenId;
        while self.eos.contains(&next) && self.eos.len() < self.vocab_size {
            next = (next + 1) % self.vocab_size as TokenId;
        }
        next
    }

    /// Makes the logits, `[vocab]`, after `token`, which stands at `position`.
    pub(crate) fn logits(&mut self, position: usize, token: TokenId) -> &[f32] {
        let (key, peak) = (key(position, token), self.most_likely(position, token));
        self.logits.clear();
        let unit = |token: u64| (mix(key ^ token) >> 40) as f32 / (1u64 << 24) as f32;
        self.logits.extend((0..self.vocab_size as u64).map(unit));
        for token in &self.eos {
            if let Some(logit) = self.logits.get_mut(*token as usize) {
                *logit = LEAST;
            }
        }
        self.logits[peak as usize] = PEAK;
        &self.logits
    }
}

fn key(position: usize, token: TokenId) -> u64 {
    mix(mix(position as u64) ^ u64::from(token))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), one step on.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Waits on this thread, which computes nothing else anyway.
fn wait_until(deadline: Instant) {
    // Somebody may unpark the thread.
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
}
