//! One forward pass over rows of several sequences.
//!
//! A step allocates nothing once the engine has seen its like: what it works in belongs to the engine and keeps its memory. What is
//! still allocated was asked for: log-probabilities, a grammar's masks, hidden states, the reason of an error.

use crate::{
    Adapter, Config, Error, KvMemory, Logprobs, Model, Pooling, Sample, Sampled, Stuck, TokenId,
    cpu::{Cpu, Span, kernels::Kernels},
    model::{
        checkpoint::ElementType,
        weights::{Attention, Dense, Mlp, Plain},
    },
    reuse::reuse,
    sampling::{self, Scratch},
    timed::{self, Timed},
};
use kv_cache::{KvDtype, PageId, PageLayout};
use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use timing::Profile;

/// What one sequence computes in a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Row<'a> {
    /// The tokens to compute, at positions `start ..`.
    pub tokens: &'a [TokenId],
    /// Tokens whose keys and values are in `pages` already.
    pub start: usize,
    /// The sequence's pages in order; they cover positions up to `start + tokens.len()`.
    pub pages: &'a [PageId],
    /// What is added to the model for this sequence; read for the engine's model.
    pub adapter: Option<&'a Adapter>,
    /// How many of the last `tokens` are drafts: guesses, which `sample` verifies. They end its history, too.
    pub drafts: usize,
    /// Present when tokens are drawn: one after the last token that is no draft, and one more for each draft that turns out to
    /// be what was drawn in its place.
    pub sample: Option<Sample<'a>>,
    /// Present when the prompt's own log-probabilities are wanted.
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    /// Present when the row is computed for an embedding, and for nothing else: [`Yield::hidden`] then has the hidden state of its
    /// last token, or of all.
    pub pooling: Option<Pooling>,
}

/// Which tokens of a prompt are given log-probabilities by a row.
#[derive(Clone, Copy, Debug)]
pub struct PromptLogprobs<'a> {
    /// The tokens that follow the row's first `targets.len()` tokens, each in its turn.
    pub targets: &'a [TokenId],
    /// How many alternatives are reported beside each.
    pub top: u32,
}

/// What a step made of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Yield {
    /// The tokens drawn, in order. All but the last are drafts of the row that turned out right; empty where none was asked for.
    pub sampled: Vec<Sampled>,
    /// Of each target of [`Row::prompt_logprobs`].
    pub prompt_logprobs: Vec<Logprobs>,
    /// The hidden states that [`Row::pooling`] asked for, flat `[tokens, hidden]`, in the order of positions: after the last norm, as the
    /// head would read them.
    pub hidden: Vec<f32>,
    /// Why the token after those of `sampled` could not be drawn, where that is so.
    pub stuck: Option<Stuck>,
}

/// What carries out a step: [`Engine::step`], or what stands in for it.
pub trait Step {
    /// Computes `rows` and returns what it made of each, until the next step.
    ///
    /// # Errors
    /// As [`Engine::step`].
    fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error>;
}

impl Step for Engine {
    fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        Engine::step(self, rows, on_layer)
    }
}

impl From<Sampled> for Yield {
    fn from(sampled: Sampled) -> Self {
        Self { sampled: vec![sampled], ..Self::default() }
    }
}

/// Bytes of the weights of experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertTraffic {
    /// Of all experts of the model.
    pub all: u64,
    /// Of those that tokens chose, once for each step and layer: what had to be read since the engine was made.
    pub chosen: u64,
    /// What was read since then.
    pub read: u64,
}

/// A model with the pages and buffers of one worker.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    model: Arc<Model>,
    fingerprint: String,
    memory: Arc<KvMemory>,
    cpu: Cpu,
    /// Present when nothing is computed.
    timed: Option<Timed>,
    limits: Limits,
    /// Tokens of the step at hand, flat.
    tokens: Vec<TokenId>,
    /// What the step at hand computes, row by row; empty between steps.
    spans: Vec<Span<'static>>,
    /// The spans that are left of it after the last pages are written; empty between steps.
    kept: Vec<Span<'static>>,
    /// The tokens after which logits are wanted.
    places: Vec<Place>,
    /// What was drawn at each place.
    drawn: Vec<Mutex<Option<Result<Sampled, Stuck>>>>,
    /// What the last step made of its rows, and what is left of longer ones.
    yields: Vec<Yield>,
    /// One for each thread.
    scratch: Vec<Mutex<Scratch>>,
    /// Per page: the step in which it was last written, counted from 1.
    written: Vec<u64>,
    steps: u64,
    /// Whether the last rows of logits were computed, and not only the largest of each found.
    logits_kept: bool,
    /// Per row of the last step: which row of the logits its first draw was made from.
    logits_rows: Vec<Option<usize>>,
}

/// Rows of logits that are computed at a time, unless the batch has more sequences: what a few drafts take. A prompt whose every
/// position is asked for would fill gigabytes.
const LOGITS_ROWS: usize = 32;

/// A token of a step after which logits are wanted.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Which of the step's rows.
    row: usize,
    /// Which of its tokens.
    token: usize,
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

    /// Makes an engine that computes nothing: its steps take as long as `profile` says, its tokens are made up from those before
    /// them, and its pages, as many as the profile has room for, hold next to nothing. `model` lends its vocabulary, its number of
    /// layers and the tokens that end a sequence; `kv_bytes` and `threads` mean nothing, and `max_model_len` may be more than the
    /// checkpoint was made for.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn timed(model: Arc<Model>, config: &Config, profile: &Profile) -> Result<Self, Error> {
        let config = Config { threads: Some(1), ..config.clone() };
        check_page_tokens(&config)?;
        let layout = timed::page_layout(profile, &config, model.decoder.layers() as u32);
        let timed = Timed::new(profile, &model.info().eos, model.decoder.vocab_size);
        Self::build(model, &config, Kernels::detect(), layout, Some(timed))
    }

    pub(crate) fn with_kernels(model: Arc<Model>, config: &Config, kernels: &'static Kernels) -> Result<Self, Error> {
        let layout = page_layout(&model, config)?;
        Self::build(model, config, kernels, layout, None)
    }

    fn build(
        model: Arc<Model>,
        config: &Config,
        kernels: &'static Kernels,
        layout: PageLayout,
        timed: Option<Timed>,
    ) -> Result<Self, Error> {
        let limits = Limits::new(&model, config, &layout, timed.is_some())?;
        let threads = match config.threads {
            Some(0) => return Err(Error::setting("threads", "0 threads compute nothing")),
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, |threads| threads.get()),
        };
        let format = kernels.format(model.weights.packed());
        // Not the limit that the pool's size gives: workers with pools of different sizes exchange pages.
        let context = config.max_model_len.map_or(model.decoder.max_position, |len| len as usize);
        let (tokens, logits) = (limits.token_budget, limits.logits_rows());
        let cpu = Cpu::new(kernels, &model.decoder, format, threads, tokens, logits, context)?;
        let fingerprint = match timed {
            // Pages that hold nothing are nobody else's.
            Some(_) => {
                blake3::hash(format!("timed {}", fingerprint(&model, context)).as_bytes()).to_hex()[..32].to_owned()
            }
            None => fingerprint(&model, context),
        };
        let memory = Arc::new(KvMemory::new(layout)?);
        tracing::info!(
            isa = cpu.isa(),
            threads,
            pages = limits.pages,
            kv_dtype = %memory.layout().dtype,
            max_model_len = limits.max_model_len,
            "engine ready"
        );
        let tokens = Vec::with_capacity(limits.token_budget);
        let scratch = (0..threads).map(|_| Mutex::new(Scratch::new(limits.vocab_size))).collect();
        let written = vec![0; limits.pages];
        let config = config.clone();
        Ok(Self {
            config,
            model,
            fingerprint,
            memory,
            cpu,
            timed,
            limits,
            tokens,
            spans: Vec::new(),
            kept: Vec::new(),
            places: Vec::new(),
            drawn: Vec::new(),
            yields: Vec::new(),
            scratch,
            written,
            steps: 0,
            logits_kept: false,
            logits_rows: Vec::new(),
        })
    }

    /// Names what pages hold: the model's weights and, where they depend on the longest context, its angles. Only engines
    /// that agree on it may read each other's pages.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
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

    /// Computes `rows` (at most `token_budget` tokens in all), draws tokens for each row that asks, and returns what it made of each
    /// row.
    ///
    /// Drafts decide how many tokens a step yields and never which: every token is drawn as if the ones before it had been computed
    /// one at a time.
    ///
    /// Keys and values are written to the rows' pages. `on_layer(l)` is called on this thread when layer `l`'s blocks of all
    /// rows are final, while later layers are still to come: it must return fast. A row's bits do not depend on the other
    /// rows, on how a prompt was cut into chunks, or on the number of threads.
    ///
    /// # Errors
    /// [`Error::Row`] names the row at fault; nothing is computed then.
    pub fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        self.limits.check(rows)?;
        self.check_kind(rows)?;
        self.claim_pages(rows)?;
        let began = Instant::now();
        let _stay = self.timed.is_none().then(|| self.cpu.stay());
        let (mut spans, mut kept) = (reuse(std::mem::take(&mut self.spans)), reuse(std::mem::take(&mut self.kept)));
        self.list(rows, &mut spans, &mut kept);
        match &self.timed {
            Some(timed) => timed.wait(began, timed.step(rows), self.memory.layout().layers, on_layer),
            None => self.forward(&spans, &kept, on_layer),
        }
        (self.spans, self.kept) = (reuse(spans), reuse(kept));
        self.clear_yields(rows.len());
        self.take_hidden(rows);
        self.draw(rows);
        self.collect(rows);
        Ok(&mut self.yields[..rows.len()])
    }

    /// Lists the tokens of `rows`, the `spans` they make, the places after which logits are wanted, and the spans that these make when
    /// they are all that is left of the step.
    fn list<'a>(&mut self, rows: &[Row<'a>], spans: &mut Vec<Span<'a>>, kept: &mut Vec<Span<'a>>) {
        self.tokens.clear();
        self.places.clear();
        for (index, row) in rows.iter().enumerate() {
            let (first, tokens) = (self.tokens.len(), row.tokens.len());
            let span = Span { first, tokens, start: row.start, pages: row.pages, adapter: row.adapter };
            spans.push(span);
            self.tokens.extend_from_slice(row.tokens);
            for tokens in row.wanted().into_iter().filter(|tokens| !tokens.is_empty()) {
                let (first, start) = (self.places.len(), row.start + tokens.start);
                kept.push(Span { first, tokens: tokens.len(), start, ..span });
                self.places.extend(tokens.map(|token| Place { row: index, token }));
            }
        }
    }

    /// Returns the logits, `[vocab]`, from which the last step drew the first token of its row `row`; `None` when it drew none, when
    /// more logits were asked for than are kept at a time, or when all its rows wanted the most likely token and nothing else: then
    /// there are none. [`Sampling::logprobs`](crate::Sampling::logprobs) makes them be there.
    ///
    /// For tests and tools: a step's caller needs them only to see how close a decision was.
    pub fn logits(&self, row: usize) -> Option<&[f32]> {
        let index = (*self.logits_rows.get(row)?)?;
        Some(&self.cpu.logits().row(index)[..self.limits.vocab_size])
    }

    /// Returns how much of the experts' weights steps have read.
    pub fn expert_traffic(&self) -> ExpertTraffic {
        let (chosen, read) = self.cpu.expert_bytes();
        ExpertTraffic { all: self.model.weights.expert_bytes(), chosen, read }
    }

    /// Says which row asks for what this engine has not.
    fn check_kind(&self, rows: &[Row<'_>]) -> Result<(), Error> {
        for (index, row) in rows.iter().enumerate() {
            if let Some(adapter) = row.adapter.filter(|adapter| !adapter.is_for(&self.model)) {
                let id = adapter.id();
                return Err(Error::Row(format!("row {index}: adapter {id} was read for another model")));
            }
            if self.timed.is_some() && row.pooling.is_some() {
                return Err(Error::Row(format!(
                    "row {index}: a timed engine has no hidden states to make embeddings of"
                )));
            }
        }
        Ok(())
    }

    /// Makes room for what a step makes of so many rows.
    fn clear_yields(&mut self, rows: usize) {
        if self.yields.len() < rows {
            self.yields.resize_with(rows, Yield::default);
        }
        self.yields[..rows].iter_mut().for_each(Yield::clear);
    }

    /// Keeps the hidden states that rows ask for; the places that are left are those of logits.
    fn take_hidden(&mut self, rows: &[Row<'_>]) {
        if rows.iter().all(|row| row.pooling.is_none()) {
            return;
        }
        let pooled = |place: &Place| rows[place.row].pooling.is_some();
        for (index, place) in self.places.iter().enumerate().filter(|(_, place)| pooled(place)) {
            let hidden = &mut self.yields[place.row].hidden;
            let start = hidden.len();
            hidden.resize(start + self.model.decoder.hidden, 0.0);
            self.cpu.read_input(index, &mut hidden[start..]);
        }
        self.cpu.keep_input(self.places.iter().enumerate().filter(|(_, place)| !pooled(place)).map(|(index, _)| index));
        self.places.retain(|place| !pooled(place));
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

    /// Runs the decoder over `spans`, and up to the last norm over the places, whose spans are `kept`.
    fn forward(&mut self, spans: &[Span<'_>], kept: &[Span<'_>], on_layer: &mut dyn FnMut(u32)) {
        let (cpu, memory, decoder, weights) = (&mut self.cpu, &*self.memory, &self.model.decoder, &self.model.weights);
        if spans.is_empty() {
            return;
        }
        let all = spans;
        let mut spans = spans;
        cpu.begin(spans, self.limits.page_tokens);
        cpu.embed(weights, &self.tokens);
        for (layer, block) in weights.layers.iter().enumerate() {
            let (rope, window) = (decoder.layer_ropes[layer], decoder.windows[layer]);
            cpu.norm(block.attention_norm.as_ref());
            match &block.attention {
                Attention::Heads(heads) => {
                    cpu.qkv(&heads.qkv, spans, layer);
                    cpu.rotate_and_write(heads, rope, memory, layer);
                }
                Attention::Latent(latent) => {
                    cpu.latent_entry(&latent.entry);
                    cpu.latent_write(latent, rope, memory, layer);
                }
            }
            on_layer(layer as u32);
            if layer + 1 == weights.layers.len() {
                // The last pages are written. From here on a token matters only to its own logits.
                cpu.keep(self.places.iter().map(|place| all[place.row].first + place.token));
                spans = kept;
                if spans.is_empty() {
                    return;
                }
            }
            let output = match &block.attention {
                Attention::Heads(heads) => {
                    cpu.attend(spans, window, memory, layer);
                    &heads.output
                }
                Attention::Latent(latent) => {
                    cpu.latent_query(latent, rope);
                    cpu.attend(spans, window, memory, layer);
                    cpu.latent_value(latent);
                    &latent.output
                }
            };
            if decoder.parallel {
                // The MLP reads the residual as attention did.
                cpu.norm(block.mlp_norm.as_ref());
                cpu.output(output, block.attention_post_norm.as_ref(), spans, layer);
            } else {
                cpu.output(output, block.attention_post_norm.as_ref(), spans, layer);
                cpu.norm(block.mlp_norm.as_ref());
            }
            match &block.mlp {
                Mlp::Dense(Dense { gate_up, down }) => {
                    cpu.gate_up(gate_up, spans, layer);
                    cpu.down(down, block.mlp_post_norm.as_ref(), spans, layer);
                }
                Mlp::Plain(Plain { up, down }) => {
                    cpu.up(up, spans, layer);
                    cpu.down(down, block.mlp_post_norm.as_ref(), spans, layer);
                }
                Mlp::Experts(experts) => {
                    cpu.experts(experts);
                    if let Some(Dense { gate_up, down }) = &experts.shared {
                        // Nothing is added to an expert.
                        cpu.gate_up(gate_up, &[], layer);
                        cpu.down(down, None, &[], layer);
                    }
                }
            }
        }
        cpu.norm(Some(&weights.final_norm));
    }

    /// Computes the logits at the places, a bounded number at a time, and makes of them what the rows ask: each on whichever thread
    /// has time.
    fn draw(&mut self, rows: &[Row<'_>]) {
        let (head, vocab, at_once) = (&self.model.weights.head, self.limits.vocab_size, self.limits.logits_rows());
        let (places, scratch) = (&self.places, &self.scratch);
        if self.drawn.len() < places.len() {
            self.drawn.resize_with(places.len(), Mutex::default);
        }
        let drawn = &self.drawn;
        if let Some(timed) = &mut self.timed {
            self.logits_kept = false;
            for (place, drawn) in places.iter().zip(drawn) {
                let row = &rows[place.row];
                let (position, token) = (row.start + place.token, row.tokens[place.token]);
                *lock(drawn) = Some(if row.is_plain(place.token) {
                    Ok(Sampled { token: timed.most_likely(position, token), logprobs: None })
                } else {
                    row.draw(place.token, timed.logits(position, token), &mut lock(&scratch[0]))
                });
            }
            return;
        }
        for first in (0..places.len()).step_by(at_once) {
            let slice = first..places.len().min(first + at_once);
            let plain = |place: &Place| rows[place.row].is_plain(place.token);
            self.logits_kept = !places[slice.clone()].iter().all(plain);
            if !self.logits_kept {
                self.cpu.compute_largest(head, slice.clone());
                for (index, drawn) in drawn[slice].iter().enumerate() {
                    let token = self.cpu.most_likely(index).ok_or(Stuck::NoLogits);
                    *lock(drawn) = Some(token.map(|token| Sampled { token, logprobs: None }));
                }
                continue;
            }
            self.cpu.compute_logits(head, slice.clone());
            let (pool, logits) = self.cpu.pool_and_logits();
            pool.run(slice.len(), &|index, thread| {
                let place = places[first + index];
                let logits = &logits.row(index)[..vocab];
                let sampled = rows[place.row].draw(place.token, logits, &mut lock(&scratch[thread]));
                *lock(&drawn[first + index]) = Some(sampled);
            });
        }
    }

    /// Puts together what was drawn for each row.
    fn collect(&mut self, rows: &[Row<'_>]) {
        self.logits_rows.clear();
        self.logits_rows.resize(rows.len(), None);
        for (index, (place, drawn)) in self.places.iter().zip(&self.drawn).enumerate() {
            let sampled = lock(drawn).take().expect("every place was visited");
            let (row, made) = (&rows[place.row], &mut self.yields[place.row]);
            if place.token < row.reported() {
                made.prompt_logprobs.extend(sampled.into_iter().filter_map(|sampled| sampled.logprobs));
                continue;
            }
            let one_slice = self.places.len() <= self.limits.logits_rows();
            if place.token == row.first_drawn() && one_slice && self.logits_kept {
                self.logits_rows[place.row] = Some(index);
            }
            // What follows a draft that was wrong was drawn from a history that is none.
            if row.tokens[row.first_drawn() + 1..place.token + 1]
                .iter()
                .eq(made.sampled.iter().map(|sampled| &sampled.token))
            {
                match sampled {
                    Ok(sampled) => made.sampled.push(sampled),
                    Err(stuck) => made.stuck = made.stuck.take().or(Some(stuck)),
                }
            }
        }
    }
}

impl Yield {
    /// Makes it that of a row that asked for nothing.
    fn clear(&mut self) {
        self.sampled.clear();
        self.prompt_logprobs.clear();
        self.hidden.clear();
        self.stuck = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A step that panicked is over, and the next one starts afresh.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Row<'_> {
    /// Returns how many of its first tokens are followed by a token whose log-probabilities are wanted.
    fn reported(&self) -> usize {
        self.prompt_logprobs.map_or(0, |wanted| wanted.targets.len())
    }

    /// Returns which of its tokens is the last that is no draft.
    fn first_drawn(&self) -> usize {
        self.tokens.len() - 1 - self.drafts
    }

    /// Returns the tokens that are wanted at the end of the decoder: those of an embedding; else those after which logits are wanted,
    /// first of a prompt, then those after which tokens are drawn.
    fn wanted(&self) -> [Range<usize>; 2] {
        match self.pooling {
            Some(Pooling::Last) => return [0..0, self.tokens.len() - 1..self.tokens.len()],
            Some(Pooling::Mean) => return [0..0, 0..self.tokens.len()],
            None => {}
        }
        let drawn = if self.sample.is_some() { self.first_drawn()..self.tokens.len() } else { 0..0 };
        [0..self.reported(), drawn]
    }

    /// Returns how what follows the token `token` is drawn.
    fn sample_after(&self, token: usize) -> Sample<'_> {
        let sample = self.sample.expect("tokens are drawn where a sample says how");
        let known = sample.history.len() - (self.tokens.len() - 1 - token);
        Sample { history: &sample.history[..known], ..sample }
    }

    /// Says whether all that is wanted after the token `token` is the most likely one.
    fn is_plain(&self, token: usize) -> bool {
        token >= self.reported() && self.sample_after(token).is_plain()
    }

    /// Makes of the logits after the token `token` what is asked.
    fn draw(&self, token: usize, logits: &[f32], scratch: &mut Scratch) -> Result<Sampled, Stuck> {
        if let Some(PromptLogprobs { targets, top }) = self.prompt_logprobs
            && let Some(&token) = targets.get(token)
        {
            return Ok(Sampled { token, logprobs: Some(sampling::logprobs(logits, token, top as usize)) });
        }
        let sample = self.sample_after(token);
        let Some(matcher) = sample.grammar else { return sampling::draw(logits, &sample, None, scratch) };
        let masks = matcher.masks().map_err(|error| Stuck::Forbidden(error.to_string()))?;
        let mask = masks.at(token - self.first_drawn());
        // Behind such a draft nothing is drawn: it is wrong, or the last token of the sequence.
        let mask =
            mask.ok_or_else(|| Stuck::Forbidden("a draft before it does not fit the grammar, or ends it".into()))?;
        sampling::draw(logits, &sample, Some(mask), scratch)
    }
}

impl Limits {
    /// A `timed` engine may be told to take longer sequences than the checkpoint was made for.
    fn new(model: &Model, config: &Config, layout: &PageLayout, timed: bool) -> Result<Self, Error> {
        for (field, value) in [("token_budget", config.token_budget), ("max_sequences", config.max_sequences)] {
            if value == 0 {
                return Err(Error::setting(field, "0 leaves nothing to compute"));
            }
        }
        let longest = model.decoder.max_position;
        let room = layout.pages as usize * layout.page_tokens as usize;
        let max_model_len = match config.max_model_len.map(|len| len as usize) {
            Some(0) => return Err(Error::setting("max_model_len", "0 leaves no room for a token")),
            Some(len) if len > longest && !timed => {
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

    /// Returns how many rows of logits are computed at a time.
    fn logits_rows(&self) -> usize {
        self.max_sequences.max(LOGITS_ROWS).min(self.token_budget)
    }

    fn check_row(&self, row: &Row<'_>) -> Result<(), String> {
        if row.tokens.is_empty() {
            return Err("no tokens to compute".into());
        }
        let end = row.start.saturating_add(row.tokens.len());
        if end > self.max_model_len {
            return Err(format!("{end} tokens are more than the longest sequence, {}", self.max_model_len));
        }
        let targets = row.prompt_logprobs.map_or(&[][..], |wanted| wanted.targets);
        if let Some(token) = row.tokens.iter().chain(targets).find(|token| **token as usize >= self.vocab_size) {
            return Err(format!("token {token} is outside the vocabulary of {}", self.vocab_size));
        }
        if row.drafts >= row.tokens.len() {
            return Err(format!("{} drafts among {} tokens leave none to draw after", row.drafts, row.tokens.len()));
        }
        if row.pooling.is_some() && (row.sample.is_some() || row.prompt_logprobs.is_some()) {
            return Err("hidden states are asked for, and what is made of logits as well".into());
        }
        let last = row.first_drawn();
        match row.sample {
            Some(sample) if !sample.history.ends_with(&row.tokens[last + 1..]) => {
                return Err(format!("its {} drafts do not end its history", row.drafts));
            }
            None if row.drafts > 0 => return Err(format!("{} drafts and nothing to verify them by", row.drafts)),
            _ => {}
        }
        let most = if row.sample.is_some() { last } else { row.tokens.len() };
        if targets.len() > most {
            return Err(format!("{} log-probabilities of a prompt asked of {most} tokens", targets.len()));
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

/// Names what an engine whose longest context is `context` writes to pages.
fn fingerprint(model: &Model, context: usize) -> String {
    let model_fingerprint = &model.info().fingerprint;
    let turns = |context: usize| -> Vec<_> { model.decoder.ropes.iter().map(|rope| rope.turns(context)).collect() };
    if turns(context) == turns(0) {
        return model_fingerprint.clone();
    }
    blake3::hash(format!("{model_fingerprint} {:?}", turns(context)).as_bytes()).to_hex()[..32].to_owned()
}

/// Returns the shape of the pool that `config` asks for.
pub(crate) fn page_layout(model: &Model, config: &Config) -> Result<PageLayout, Error> {
    let decoder = &model.decoder;
    check_page_tokens(config)?;
    let dtype = config.kv_dtype.unwrap_or(match model.weights.stored {
        ElementType::F32 => KvDtype::F32,
        ElementType::F16 => KvDtype::F16,
        ElementType::Bf16 => KvDtype::Bf16,
    });
    let mut layout = PageLayout {
        layers: decoder.layers() as u32,
        page_tokens: config.page_tokens,
        kv_heads: decoder.kv_heads as u32,
        key_dim: decoder.head_dim as u32,
        // The value of a latent stands in its key.
        value_dim: if decoder.latent.is_some() { 0 } else { decoder.head_dim as u32 },
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

fn check_page_tokens(config: &Config) -> Result<(), Error> {
    match config.page_tokens {
        1..=1024 => Ok(()),
        other => Err(Error::setting("page_tokens", format!("{other} is not between 1 and 1024"))),
    }
}

// A worker's thread owns its engine and may be started by another.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Engine>();
};
