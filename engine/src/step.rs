//! One forward pass over rows of several sequences.
//!
//! A step allocates nothing once the engine has seen its like: what it works in belongs to the engine and keeps its memory. What is
//! still allocated was asked for: log-probabilities, a grammar's masks, hidden states, the reason of an error.

mod limits;
mod making;

use crate::{
    Adapter, Config, Error, KvMemory, Logprobs, Model, Pooling, Sample, Sampled, Stuck, TokenId,
    home::{self, Home, Pass, Place, Span},
    reuse::reuse,
    sampling::{self, Race, Scratch},
    timed::Timed,
};
use kv_cache::{Backing, PageId};
use limits::Limits;
pub use making::check_device;
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

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
    /// Whether the pages it writes are read by others from [`Engine::memory`] as soon as `on_layer` was called: they are handed off. What is not
    /// can still be, after [`Engine::export`].
    pub leaves: bool,
    /// How many of the last `tokens` are drafts: guesses, which `sample` verifies. They end its history, too.
    pub drafts: usize,
    /// Present when tokens are drawn: one after the last token that is no draft, and one more for each draft that turns out to
    /// be what was drawn in its place.
    pub sample: Option<Sample<'a>>,
    /// Present when the prompt's own log-probabilities are wanted.
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    /// Present where its one token is not known yet: it is what this row of the step begun before draws. A token that is none stands in its
    /// place, in `tokens` and at the end of the sample's history. Only for [`Engine::begin`].
    pub follows: Option<usize>,
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

    /// Begins such a step and returns without waiting for it, if it can; where it cannot, nothing has happened.
    ///
    /// # Errors
    /// As [`Engine::begin`].
    fn begin(&mut self, rows: &[Row<'_>]) -> Result<bool, Error>;

    /// Waits for the first of the steps that were begun, and returns what it made of each row, until the next step. A row without an answer
    /// is to be computed again, by `step`.
    ///
    /// # Errors
    /// As [`Engine::end`].
    fn end(&mut self) -> Result<&mut [Yield], Error>;
}

impl Step for Engine {
    fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        Engine::step(self, rows, on_layer)
    }

    fn begin(&mut self, rows: &[Row<'_>]) -> Result<bool, Error> {
        Engine::begin(self, rows)
    }

    fn end(&mut self) -> Result<&mut [Yield], Error> {
        Engine::end(self)
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
    home: Box<dyn Home>,
    backing: Option<Arc<dyn Backing>>,
    /// Present when nothing is computed.
    timed: Option<Timed>,
    limits: Limits,
    /// Rows of each step that was begun and has not ended, first the first.
    begun: VecDeque<usize>,
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
    /// The places of the slice at hand whose logits are needed.
    open: Vec<usize>,
    /// Per place of the last step: whether its logits were computed, and its token not found without.
    logits_kept: Vec<bool>,
    /// Per row of the last step: which row of the logits its first draw was made from.
    logits_rows: Vec<Option<usize>>,
}

impl Engine {
    /// Names what pages hold: the model's weights and, where they depend on the longest context, its angles. Only engines
    /// that agree on it may read each other's pages.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns the model; on a card without its weights, which are there: it is none to make another engine of.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Returns the pages.
    pub fn memory(&self) -> &Arc<KvMemory> {
        &self.memory
    }

    /// Returns where the pages are, if not in [`Engine::memory`], for whoever hands them off.
    pub fn backing(&self) -> Option<Arc<dyn Backing>> {
        self.backing.clone()
    }

    /// Returns the cards that it computes on.
    #[cfg(feature = "cuda")]
    pub(crate) fn cards(&self) -> Vec<(String, [u8; 16])> {
        self.home.cards()
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
    ///
    /// # Panics
    /// While a step is begun that has not ended.
    pub fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        assert!(self.begun.is_empty(), "steps end in their order");
        self.check(rows)?;
        let began = Instant::now();
        let _stay = self.timed.is_none().then(|| self.home.stay());
        let (mut spans, mut kept) = (reuse(std::mem::take(&mut self.spans)), reuse(std::mem::take(&mut self.kept)));
        self.list(rows, &mut spans, &mut kept);
        match &self.timed {
            Some(timed) => timed.wait(began, timed.step(rows), self.memory.layout().layers, on_layer),
            None => {
                let pass = Pass { tokens: &self.tokens, spans: &spans, places: &self.places, kept: &kept };
                self.home.forward(&self.model, &self.memory, &pass, on_layer)?;
            }
        }
        (self.spans, self.kept) = (reuse(spans), reuse(kept));
        self.clear_yields(rows.len());
        self.take_hidden(rows)?;
        self.draw(rows)?;
        if self.timed.is_none() {
            self.home.finish(on_layer)?;
        }
        self.collect(rows);
        Ok(&mut self.yields[..rows.len()])
    }

    /// Begins a step over `rows` and returns without waiting for it; there may be two that have not ended. Says whether it did: a card can, where each row is
    /// one token after which one is drawn by itself, from logits as they are; where it did not, nothing has happened, and [`Engine::step`] says what
    /// is wrong with rows that are.
    ///
    /// # Errors
    /// [`Error::Card`] says what broke the card.
    pub fn begin(&mut self, rows: &[Row<'_>]) -> Result<bool, Error> {
        let before = self.begun.back().copied().unwrap_or(0);
        let decodes = |row: &Row<'_>| row.runs_ahead() && row.follows.is_none_or(|row| row < before);
        let can = self.timed.is_none() && self.home.races() && rows.len() <= self.limits.logits_rows();
        if !can || self.begun.len() > 1 || !rows.iter().all(decodes) || self.check(rows).is_err() {
            return Ok(false);
        }
        let (mut spans, mut kept) = (reuse(std::mem::take(&mut self.spans)), reuse(std::mem::take(&mut self.kept)));
        self.list(rows, &mut spans, &mut kept);
        for (token, row) in self.tokens.iter_mut().zip(rows) {
            *token = row.follows.map_or(*token, |row| home::FOUND | row as TokenId);
        }
        let pass = Pass { tokens: &self.tokens, spans: &spans, places: &self.places, kept: &kept };
        let begun = self.home.begin(&self.model, &self.memory, &pass);
        (self.spans, self.kept) = (reuse(spans), reuse(kept));
        if begun? {
            self.begun.push_back(rows.len());
            return Ok(true);
        }
        Ok(false)
    }

    /// Waits for the first of the steps that were begun, and returns what it made of each row. A row without an answer is to be computed again by
    /// [`Engine::step`]: it takes the host to tell its token, and what followed it is void.
    ///
    /// # Errors
    /// [`Error::Card`] says what broke the card.
    ///
    /// # Panics
    /// When none was begun.
    pub fn end(&mut self) -> Result<&mut [Yield], Error> {
        let rows = self.begun.pop_front().expect("a step was begun");
        self.clear_yields(rows);
        self.home.end(rows)?;
        for (row, made) in self.yields[..rows].iter_mut().enumerate() {
            match self.home.found(row) {
                Some(Ok(token)) => made.sampled.push(Sampled { token, logprobs: None }),
                Some(Err(stuck)) => made.stuck = Some(stuck),
                None => {}
            }
        }
        Ok(&mut self.yields[..rows])
    }

    /// Lists the tokens of `rows`, the `spans` they make, the places after which logits are wanted, and the spans that these make when
    /// they are all that is left of the step.
    fn list<'a>(&mut self, rows: &[Row<'a>], spans: &mut Vec<Span<'a>>, kept: &mut Vec<Span<'a>>) {
        self.tokens.clear();
        self.places.clear();
        let races = self.home.races();
        for (index, row) in rows.iter().enumerate() {
            let (first, tokens) = (self.tokens.len(), row.tokens.len());
            let (pages, adapter, leaves) = (row.pages, row.adapter, row.leaves);
            let span = Span { first, tokens, start: row.start, pages, adapter, leaves };
            spans.push(span);
            self.tokens.extend_from_slice(row.tokens);
            for tokens in row.wanted().into_iter().filter(|tokens| !tokens.is_empty()) {
                let (first, start) = (self.places.len(), row.start + tokens.start);
                kept.push(Span { first, tokens: tokens.len(), start, ..span });
                let race = |token| races.then(|| row.race(token)).flatten();
                self.places.extend(tokens.map(|token| Place { row: index, token, race: race(token) }));
            }
        }
    }

    /// Returns the logits, `[vocab]`, from which the last step drew the first token of its row `row`; `None` when it drew none, when
    /// more logits were asked for than are kept at a time, or when its token was found without: where all rows wanted the most likely token
    /// and nothing else, and on a card nearly always. [`Sampling::logprobs`](crate::Sampling::logprobs) makes them be there.
    ///
    /// For tests and tools: a step's caller needs them only to see how close a decision was.
    pub fn logits(&self, row: usize) -> Option<&[f32]> {
        let index = (*self.logits_rows.get(row)?)?;
        Some(&self.home.logits().row(index)[..self.limits.vocab_size])
    }

    /// Returns how much of the experts' weights steps have read.
    pub fn expert_traffic(&self) -> ExpertTraffic {
        let (chosen, read) = self.home.expert_bytes();
        ExpertTraffic { all: self.model.expert_bytes, chosen, read }
    }

    /// Says which row cannot be computed, and claims the pages that they write.
    fn check(&mut self, rows: &[Row<'_>]) -> Result<(), Error> {
        self.limits.check(rows)?;
        self.check_kind(rows)?;
        self.claim_pages(rows)
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
    fn take_hidden(&mut self, rows: &[Row<'_>]) -> Result<(), Error> {
        if rows.iter().all(|row| row.pooling.is_none()) {
            return Ok(());
        }
        let pooled = |place: &Place| rows[place.row].pooling.is_some();
        for (index, place) in self.places.iter().enumerate().filter(|(_, place)| pooled(place)) {
            let hidden = &mut self.yields[place.row].hidden;
            let start = hidden.len();
            hidden.resize(start + self.model.decoder.hidden, 0.0);
            self.home.read_hidden(index, &mut hidden[start..])?;
        }
        let mut left = self.places.iter().enumerate().filter(|(_, place)| !pooled(place)).map(|(index, _)| index);
        self.home.keep_rows(&mut left)?;
        self.places.retain(|place| !pooled(place));
        Ok(())
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

    /// Lets the home find tokens at the places, or computes the logits there, a bounded number at a time, and makes of them what the rows ask: each on
    /// whichever thread has time.
    fn draw(&mut self, rows: &[Row<'_>]) -> Result<(), Error> {
        let (vocab, at_once) = (self.limits.vocab_size, self.limits.logits_rows());
        let (places, scratch) = (&self.places, &self.scratch);
        if self.drawn.len() < places.len() {
            self.drawn.resize_with(places.len(), Mutex::default);
        }
        // Of a step that failed something may be left.
        self.drawn[..places.len()].iter_mut().for_each(|drawn| *drawn = Mutex::default());
        self.logits_kept.clear();
        self.logits_kept.resize(places.len(), false);
        let drawn = &self.drawn;
        if let Some(timed) = &mut self.timed {
            for (place, drawn) in places.iter().zip(drawn) {
                let row = &rows[place.row];
                let (position, token) = (row.start + place.token, row.tokens[place.token]);
                *lock(drawn) = Some(if row.is_plain(place.token) {
                    Ok(Sampled { token: timed.most_likely(position, token), logprobs: None })
                } else {
                    row.draw(place.token, timed.logits(position, token), &mut lock(&scratch[0]))
                });
            }
            return Ok(());
        }
        for first in (0..places.len()).step_by(at_once) {
            let slice = first..places.len().min(first + at_once);
            let findable = |place: &Place| place.race.is_some() || rows[place.row].is_plain(place.token);
            let mut asked = places[slice.clone()].iter();
            let finds = if self.home.races() { asked.any(findable) } else { asked.all(findable) };
            if finds {
                self.home.find_tokens(&self.model, slice.clone())?;
                for index in slice.clone().filter(|index| findable(&places[*index])) {
                    let sampled = |token| Sampled { token, logprobs: None };
                    *lock(&drawn[index]) = self.home.found(index - first).map(|token| token.map(sampled));
                }
            }
            self.open.clear();
            self.open.extend(slice.clone().filter(|index| lock(&drawn[*index]).is_none()));
            if self.open.is_empty() {
                continue;
            }
            self.open.iter().for_each(|index| self.logits_kept[*index] = true);
            let (open, kept) = (&self.open, &self.logits_kept);
            self.home.compute_logits(&self.model, slice, &|row| kept[first + row])?;
            let (pool, logits) = self.home.pool_and_logits();
            pool.run(open.len(), &|at, thread| {
                let index = open[at];
                let (place, logits) = (places[index], &logits.row(index - first)[..vocab]);
                let sampled = rows[place.row].draw(place.token, logits, &mut lock(&scratch[thread]));
                *lock(&drawn[index]) = Some(sampled);
            });
        }
        Ok(())
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
            if place.token == row.first_drawn() && one_slice && self.logits_kept[index] {
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
    /// Says whether what was to be drawn was, or why not.
    pub(crate) fn is_answer(&self) -> bool {
        !self.sampled.is_empty() || self.stuck.is_some()
    }

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
    /// Says whether it is one token after which one is drawn from logits as they are, and nothing else.
    fn runs_ahead(&self) -> bool {
        let plain = self.tokens.len() == 1 && self.sample.is_some() && self.prompt_logprobs.is_none();
        plain && !self.leaves && (self.is_plain(0) || self.race(0).is_some())
    }

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

    /// Returns how a home draws the token after `token`, if it can.
    fn race(&self, token: usize) -> Option<Race> {
        if self.sample.is_none() || token < self.reported() { None } else { self.sample_after(token).race() }
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

// A worker's thread owns its engine and may be started by another.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Engine>();
};
