//! Requests as they were recorded: when, how long, and with what in common.
//!
//! A reader for each published format makes the same [`Trace`]. What a format does not say is filled in where it can be (Azure's prompts
//! have nothing in common) and an error where it cannot.

mod azure;
mod mooncake;
mod sharegpt;

use crate::Arrivals;
use std::{
    ops::Range,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it arrives, since the trace began.
    pub at: Duration,
    /// Tokens of the prompt, at least one.
    pub input_tokens: usize,
    /// Tokens of the answer, at least one.
    pub output_tokens: usize,
    /// What the prompt holds, a block of [`Trace::block_tokens`] for each id; the last may be partly filled. Two prompts with the
    /// same leading ids have the same leading tokens.
    pub blocks: Vec<u64>,
}

impl Request {
    /// Makes the prompt: token ids below `vocabulary`, which depend on the blocks' ids and on nothing else.
    ///
    /// # Panics
    /// Where `block_tokens` or `vocabulary` is 0, or the blocks hold less than the prompt.
    pub fn tokens(&self, block_tokens: usize, vocabulary: u32) -> Vec<u32> {
        assert!(block_tokens > 0 && vocabulary > 0, "blocks of {block_tokens} tokens, vocabulary of {vocabulary}");
        assert!(self.blocks.len() * block_tokens >= self.input_tokens, "the blocks hold the prompt");
        let ids = self.blocks.iter().flat_map(|&id| (0..block_tokens as u64).map(move |index| (id, index)));
        ids.take(self.input_tokens).map(|(id, index)| token(id, index, vocabulary)).collect()
    }
}

/// Returns token `index` of block `id`.
fn token(id: u64, index: u64, vocabulary: u32) -> u32 {
    let bits = mix(mix(id).wrapping_add(index)) >> 32;
    ((bits * u64::from(vocabulary)) >> 32) as u32
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), one step on.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Requests in the order in which they arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// By arrival.
    pub requests: Vec<Request>,
    /// Tokens that a block id stands for.
    pub block_tokens: usize,
}

impl Trace {
    /// Tokens of a block as it is published; where a format has no blocks, as it is read.
    pub const BLOCK_TOKENS: usize = 512;

    /// Reads a file; without a `format`, its ending tells it.
    pub fn read(path: &Path, format: impl Into<Option<Format>>) -> Result<Self, Error> {
        let format = format.into().or_else(|| Format::of(path));
        let format = format.ok_or_else(|| Error::UnknownFormat { path: path.to_owned() })?;
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
        let name = path.display().to_string();
        let mut requests = match format {
            Format::Mooncake => mooncake::read(&name, &text),
            Format::Azure => azure::read(&name, &text),
            Format::ShareGpt => sharegpt::read(&name, &text),
        }?;
        if requests.is_empty() {
            return Err(Error::Empty { file: name });
        }
        requests.sort_by_key(|request| request.at);
        Ok(Self { requests, block_tokens: Self::BLOCK_TOKENS })
    }

    /// Makes `count` requests of one shape, all of them at the start. Prompts begin with `shared_tokens` that are the same for all, in
    /// whole blocks of 16.
    pub fn uniform(count: usize, input_tokens: usize, output_tokens: usize, shared_tokens: usize) -> Self {
        let block_tokens = 16;
        let blocks = input_tokens.div_ceil(block_tokens);
        let shared = (shared_tokens / block_tokens).min(blocks);
        let request = |number: usize| {
            let own = (number * blocks..).map(|id| (blocks + id) as u64);
            let blocks = (0..shared as u64).chain(own).take(blocks).collect();
            Request { at: Duration::ZERO, input_tokens, output_tokens, blocks }
        };
        Self { requests: (0..count).map(request).collect(), block_tokens }
    }

    /// Returns when the last request arrives.
    pub fn span(&self) -> Duration {
        self.requests.last().map_or(Duration::ZERO, |request| request.at)
    }

    /// Returns the first `count` requests.
    pub fn first(mut self, count: usize) -> Self {
        self.requests.truncate(count);
        self
    }

    /// Returns what arrives within `window`, whose start becomes the trace's.
    pub fn window(mut self, window: Range<Duration>) -> Self {
        self.requests.retain(|request| window.contains(&request.at));
        for request in &mut self.requests {
            request.at -= window.start;
        }
        self
    }

    /// Plays it `factor` times as fast.
    ///
    /// # Panics
    /// Where `factor` is not positive and finite.
    pub fn faster(mut self, factor: f64) -> Self {
        assert!(factor > 0.0 && factor.is_finite(), "a trace is played {factor} times as fast");
        for request in &mut self.requests {
            request.at = request.at.div_f64(factor);
        }
        self
    }

    /// Scales prompts and answers by `factor`. A block becomes a whole number of tokens and prompts are scaled with it, so
    /// that requests have as many blocks as before and the same ones in common.
    ///
    /// # Panics
    /// Where `factor` is not positive and finite.
    pub fn scaled(mut self, factor: f64) -> Self {
        assert!(factor > 0.0 && factor.is_finite(), "lengths are scaled by {factor}");
        let scale = |tokens: usize, factor: f64| ((tokens as f64 * factor).round() as usize).max(1);
        let block_tokens = scale(self.block_tokens, factor);
        let by_block = block_tokens as f64 / self.block_tokens as f64;
        for request in &mut self.requests {
            let full = request.blocks.len() * block_tokens;
            // Rounding must neither empty the last block nor overflow it.
            let least = full.saturating_sub(block_tokens) + 1;
            request.input_tokens = scale(request.input_tokens, by_block).clamp(least, full);
            request.output_tokens = scale(request.output_tokens, factor);
        }
        self.block_tokens = block_tokens;
        self
    }

    /// Lets the requests, in their order, arrive as `arrivals` says, `rate` a second on average; the first at once.
    ///
    /// # Panics
    /// Where `rate` is not positive and finite.
    pub fn arriving(mut self, arrivals: Arrivals, rate: f64, seed: u64) -> Self {
        for (request, at) in self.requests.iter_mut().zip(arrivals.times(rate, seed)) {
            request.at = at;
        }
        self
    }

    /// Returns how many requests a second arrive on average, where they do not all come at once.
    pub fn rate(&self) -> Option<f64> {
        let span = self.span().as_secs_f64();
        (span > 0.0).then(|| (self.requests.len() - 1) as f64 / span)
    }
}

/// How a file says what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line of JSON for each request: `{"timestamp": ms, "input_length": …, "output_length": …, "hash_ids": […]}`, with an id for
    /// every 512 tokens of the prompt (Mooncake, FAST 2025; Apache-2.0).
    Mooncake,
    /// `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure LLM inference trace 2023; CC-BY 4.0). Prompts have nothing in common.
    Azure,
    /// Conversations as JSON: `[{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}]`. Every answer is a request whose
    /// prompt is all that was said before it; lengths are estimated at four bytes a token. They have no times: all arrive at once.
    ShareGpt,
}

impl Format {
    /// Guesses by the ending: `.jsonl` is Mooncake's, `.csv` Azure's, `.json` ShareGPT's.
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "jsonl" => Some(Self::Mooncake),
            "csv" => Some(Self::Azure),
            "json" => Some(Self::ShareGpt),
            _ => None,
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "mooncake" => Ok(Self::Mooncake),
            "azure" => Ok(Self::Azure),
            "sharegpt" => Ok(Self::ShareGpt),
            _ => Err(format!("{name:?} is no format of traces: mooncake, azure or sharegpt")),
        }
    }
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither was its format given nor does its ending tell it.
    #[error("{}: its ending tells no format, say --format mooncake, azure or sharegpt", path.display())]
    UnknownFormat { path: PathBuf },
    /// The file cannot be read, or is no text.
    #[error("read {}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// It does not say what its format wants.
    #[error("{file}:{line}: {problem}")]
    Line { file: String, line: usize, problem: String },
    /// It holds no request.
    #[error("{file}: holds no request")]
    Empty { file: String },
}

/// Makes sure that a length is one: no request has an empty prompt or asks for nothing.
fn length(field: &str, tokens: usize) -> Result<usize, String> {
    // What no request has; a sum of a few such lengths still fits.
    const MOST: usize = 1 << 32;
    if (1..=MOST).contains(&tokens) {
        Ok(tokens)
    } else {
        Err(format!("{field} is {tokens}, it must be a number of tokens from 1 to {MOST}"))
    }
}

#[cfg(test)]
mod tests;
