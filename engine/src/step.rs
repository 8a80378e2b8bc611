//! One forward pass over rows of several sequences.

use crate::{
    Config, Error, KvMemory, Model, Sample, Sampled, TokenId,
    cpu::{Cpu, Span, kernels::Kernels},
    model::checkpoint::ElementType,
    sampling,
};
use kv_cache::{KvDtype, PageId, PageLayout};
use std::sync::{Arc, Mutex, PoisonError};

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

/// A model with the pages and buffers of one worker.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    model: Arc<Model>,
    memory: Arc<KvMemory>,
    cpu: Cpu,
    limits: Limits,
    /// Tokens of the step at hand, flat.
    tokens: Vec<TokenId>,
    /// Per page: the step in which it was last written, counted from 1.
    written: Vec<u64>,
    steps: u64,
    /// Per row of the last step: which row of the logits is its own.
    logits_rows: Vec<Option<usize>>,
}

/// What a step must keep to.
#[derive(Clone, Copy, Debug)]
struct Limits {
    max_model_len: usize,
    token_budget: usize,
    max_sequences: usize,
    vocab_size: usize,
    page_tokens: usize,
    pages: usize,
}

impl Engine {
    /// Reserves pages and buffers for `model` and starts its threads.
    ///
    /// # Errors
    /// [`Error::Setting`] names the field of `config` that does not fit, [`Error::System`] what the machine refused.
    pub fn new(model: Arc<Model>, config: &Config) -> Result<Self, Error> {
        Self::with_kernels(model, config, Kernels::detect())
    }

    pub(crate) fn with_kernels(model: Arc<Model>, config: &Config, kernels: &'static Kernels) -> Result<Self, Error> {
        let layout = page_layout(&model, config)?;
        let limits = Limits::new(&model, config, &layout)?;
        let threads = match config.threads {
            Some(0) => return Err(Error::setting("threads", "0 threads compute nothing")),
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, |threads| threads.get()),
        };
        let format = kernels.format(model.weights.dtype);
        let (tokens, samples) = (limits.token_budget, limits.max_sequences);
        let cpu = Cpu::new(kernels, &model.decoder, format, threads, tokens, samples)?;
        let memory = Arc::new(KvMemory::new(layout)?);
        tracing::info!(
            isa = cpu.isa(),
            threads,
            pages = limits.pages,
            max_model_len = limits.max_model_len,
            "engine ready"
        );
        let tokens = Vec::with_capacity(limits.token_budget);
        let written = vec![0; limits.pages];
        let config = config.clone();
        Ok(Self { config, model, memory, cpu, limits, tokens, written, steps: 0, logits_rows: Vec::new() })
    }

    /// Returns the model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Returns the pages.
    pub fn memory(&self) -> &Arc<KvMemory> {
        &self.memory
    }

    /// Returns the settings it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the longest sequence this engine takes, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.limits.max_model_len
    }

    /// Computes `rows` (at most `token_budget` tokens in all) and draws a token for each row that asks.
    ///
    /// Keys and values are written to the rows' pages. `on_layer(l)` is called on this thread when layer `l`'s blocks of all
    /// rows are final, while later layers are still to come: it must return fast. A row's bits do not depend on the other
    /// rows, on how a prompt was cut into chunks, or on the number of threads.
    ///
    /// # Errors
    /// [`Error::Row`] names the row at fault; nothing is computed then.
    pub fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<Vec<Option<Sampled>>, Error> {
        self.limits.check(rows)?;
        self.claim_pages(rows)?;
        self.tokens.clear();
        self.logits_rows.clear();
        let mut spans = Vec::with_capacity(rows.len());
        for row in rows {
            let (first, tokens) = (self.tokens.len(), row.tokens.len());
            spans.push(Span { first, tokens, start: row.start, pages: row.pages });
            self.tokens.extend_from_slice(row.tokens);
        }
        self.forward(rows, &spans, on_layer);
        Ok(self.sample(rows))
    }

    /// Returns the logits, `[vocab]`, from which the last step drew the token of its row `row`; `None` when it drew none.
    ///
    /// For tests and tools: a step's caller needs them only to see how close a decision was.
    pub fn logits(&self, row: usize) -> Option<&[f32]> {
        let index = (*self.logits_rows.get(row)?)?;
        Some(&self.cpu.logits().row(index)[..self.limits.vocab_size])
    }

    /// Makes sure that no page is written twice: rows are computed at the same time, and a page has one writer.
    fn claim_pages(&mut self, rows: &[Row<'_>]) -> Result<(), Error> {
        self.steps += 1;
        for (index, row) in rows.iter().enumerate() {
            let last = (row.start + row.tokens.len() - 1) / self.limits.page_tokens;
            for page in &row.pages[row.start / self.limits.page_tokens..=last] {
                if std::mem::replace(&mut self.written[page.index()], self.steps) == self.steps {
                    return Err(Error::Row(format!("row {index}: page {} is written twice in this step", page.0)));
                }
            }
        }
        Ok(())
    }

    /// Runs the decoder; leaves the logits of sampled rows in the buffers.
    fn forward(&mut self, rows: &[Row<'_>], spans: &[Span<'_>], on_layer: &mut dyn FnMut(u32)) {
        let (cpu, memory, decoder, weights) = (&mut self.cpu, &*self.memory, &self.model.decoder, &self.model.weights);
        if spans.is_empty() {
            return;
        }
        let sampled = sampled_spans(rows, spans, &mut self.logits_rows);
        let mut spans = spans;
        cpu.begin(decoder, spans, self.limits.page_tokens);
        cpu.embed(weights, &self.tokens);
        for (layer, (block, window)) in weights.layers.iter().zip(&decoder.windows).enumerate() {
            cpu.norm(&block.attention_norm);
            cpu.qkv(&block.qkv);
            cpu.rotate_and_write(block, memory, layer);
            on_layer(layer as u32);
            if layer + 1 == weights.layers.len() {
                // The last pages are written. From here on a row matters only to its own logits.
                cpu.keep(rows.iter().zip(spans).filter(|(row, _)| row.sample.is_some()).map(|(_, span)| span.last()));
                spans = &sampled;
                if spans.is_empty() {
                    return;
                }
            }
            cpu.attend(spans, *window, memory, layer);
            cpu.output(&block.output);
            cpu.norm(&block.mlp_norm);
            cpu.gate_up(&block.gate_up);
            cpu.down(&block.down);
        }
        cpu.norm(&weights.final_norm);
        cpu.compute_logits(&weights.head);
    }

    /// Draws the tokens of all rows that ask, each on whichever thread has time.
    fn sample(&mut self, rows: &[Row<'_>]) -> Vec<Option<Sampled>> {
        let drawn: Vec<Mutex<Option<Sampled>>> = rows.iter().map(|_| Mutex::new(None)).collect();
        let (logits_rows, vocab) = (&self.logits_rows, self.limits.vocab_size);
        let (pool, logits) = self.cpu.pool_and_logits();
        pool.run(rows.len(), &|index, _| {
            if let (Some(row), Some(sample)) = (logits_rows[index], rows[index].sample) {
                let sampled = sampling::draw(&logits.row(row)[..vocab], &sample);
                *drawn[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(sampled);
            }
        });
        drawn.into_iter().map(|drawn| drawn.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

impl Limits {
    fn new(model: &Model, config: &Config, layout: &PageLayout) -> Result<Self, Error> {
        for (field, value) in [("token_budget", config.token_budget), ("max_sequences", config.max_sequences)] {
            if value == 0 {
                return Err(Error::setting(field, "0 leaves nothing to compute"));
            }
        }
        let longest = model.decoder.max_position;
        let room = layout.pages as usize * layout.page_tokens as usize;
        let max_model_len = match config.max_model_len.map(|len| len as usize) {
            Some(0) => return Err(Error::setting("max_model_len", "0 leaves no room for a token")),
            Some(len) if len > longest => {
                let problem = format!("{len} tokens are more than the checkpoint was made for, {longest}");
                return Err(Error::setting("max_model_len", problem));
            }
            Some(len) if len > room => {
                let problem = format!("{len} tokens need more pages than kv_bytes gives; they hold {room} tokens");
                return Err(Error::setting("max_model_len", problem));
            }
            Some(len) => len,
            None => longest.min(room),
        };
        Ok(Self {
            max_model_len,
            token_budget: config.token_budget as usize,
            max_sequences: config.max_sequences as usize,
            vocab_size: model.decoder.vocab_size,
            page_tokens: layout.page_tokens as usize,
            pages: layout.pages as usize,
        })
    }

    /// Says which row could not be computed, and why.
    fn check(&self, rows: &[Row<'_>]) -> Result<(), Error> {
        if rows.len() > self.max_sequences {
            return Err(Error::Row(format!("{} rows in a step of at most {}", rows.len(), self.max_sequences)));
        }
        let total: usize = rows.iter().map(|row| row.tokens.len()).sum();
        if total > self.token_budget {
            return Err(Error::Row(format!("{total} tokens in a step of at most {}", self.token_budget)));
        }
        for (index, row) in rows.iter().enumerate() {
            self.check_row(row).map_err(|problem| Error::Row(format!("row {index}: {problem}")))?;
        }
        Ok(())
    }

    fn check_row(&self, row: &Row<'_>) -> Result<(), String> {
        if row.tokens.is_empty() {
            return Err("no tokens to compute".into());
        }
        let end = row.start.saturating_add(row.tokens.len());
        if end > self.max_model_len {
            return Err(format!("{end} tokens are more than the longest sequence, {}", self.max_model_len));
        }
        if let Some(token) = row.tokens.iter().find(|token| **token as usize >= self.vocab_size) {
            return Err(format!("token {token} is outside the vocabulary of {}", self.vocab_size));
        }
        let needed = end.div_ceil(self.page_tokens);
        if row.pages.len() < needed {
            return Err(format!("{} pages do not hold {end} tokens; {needed} are needed", row.pages.len()));
        }
        if let Some(page) = row.pages[..needed].iter().find(|page| page.index() >= self.pages) {
            return Err(format!("page {} is outside the pool of {}", page.0, self.pages));
        }
        Ok(())
    }
}

/// Returns the spans of the sampled rows' last tokens alone, and which row of the logits each row gets.
fn sampled_spans<'a>(rows: &[Row<'_>], spans: &[Span<'a>], logits_rows: &mut Vec<Option<usize>>) -> Vec<Span<'a>> {
    let mut sampled = Vec::new();
    for (row, span) in rows.iter().zip(spans) {
        if row.sample.is_none() {
            logits_rows.push(None);
            continue;
        }
        let first = sampled.len();
        logits_rows.push(Some(first));
        sampled.push(Span { first, tokens: 1, start: span.start + span.tokens - 1, pages: span.pages });
    }
    sampled
}

/// Returns the shape of the pool that `config` asks for.
fn page_layout(model: &Model, config: &Config) -> Result<PageLayout, Error> {
    let decoder = &model.decoder;
    if config.page_tokens == 0 || config.page_tokens > 1024 {
        let problem = format!("{} is not between 1 and 1024", config.page_tokens);
        return Err(Error::setting("page_tokens", problem));
    }
    let dtype = config.kv_dtype.unwrap_or(match model.weights.dtype {
        ElementType::F32 => KvDtype::F32,
        ElementType::F16 => KvDtype::F16,
        ElementType::Bf16 => KvDtype::Bf16,
    });
    let mut layout = PageLayout {
        layers: decoder.layers() as u32,
        page_tokens: config.page_tokens,
        kv_heads: decoder.kv_heads as u32,
        key_dim: decoder.head_dim as u32,
        value_dim: decoder.head_dim as u32,
        dtype,
        pages: 0,
    };
    let pages = config.kv_bytes / layout.page_bytes() as u64;
    if pages == 0 {
        let problem = format!("{} bytes hold no page; one takes {}", config.kv_bytes, layout.page_bytes());
        return Err(Error::setting("kv_bytes", problem));
    }
    layout.pages = pages.min(u64::from(u32::MAX)) as u32;
    Ok(layout)
}

// A worker's thread owns its engine and may be started by another.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Engine>();
};
