//! The life of one request. Read this first.
//!
//! A request arrives as text (`http`) and gets a place (`admission`), becomes tokens ([`Router::prepare`], on the text threads), waits for its turn,
//! and then is [`Work`]: one piece for each choice it asks for. A [`Generation`] carries one choice through:
//!
//! 1. **Place** it ([`begin`]): the fleet chooses a decode worker, and a prefill worker or none.
//! 2. **Submit** all legs at once: a prefill leg that will push its pages and a decode leg that expects them, or one local leg.
//! 3. **Listen**: tokens come in order, each once ([`Attempt`]); each becomes text (`text`) until a stop string, a stop token or
//!    a limit ends the choice.
//! 4. **Recover**: when a leg fails, [`recovery`](crate::recovery) says whether to place it again with what was emitted so far.
//!
//! Dropping a generation (its client is gone) calls its legs off at once. Every wait has a deadline.

mod begin;

use crate::{
    admission::{Admission, Promise},
    attempt::{Attempt, Ending, News},
    config::Config,
    dialect::{Dialect, Event},
    door::keys::{Key, Keys},
    error::Error,
    fleet::{
        Fleet,
        adapters::Adapter,
        leg::{Cached, LegEvent, Pooling, Sampling, Stop, Token},
    },
    metrics::{Metrics, Told},
    openai::kv_transfer::Part,
    page_names::PageNames,
    prompt::{Prompt, PromptSource, Truncation},
    recovery::{self, Failure, FailureKind, Remedy},
    responses::store::Store,
    text::{
        TextModel, TextPool,
        detokenizer::Detokenizer,
        stop::{Outcome, StopStrings},
    },
    why::Why,
};
use bytes::Bytes;
use grammar::Spec;
use kv_cache::TokenId;
use std::{pin::Pin, sync::Arc, time::Duration};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::Span;

/// A longer body is rendered on the text threads.
const SHORT_BODY_BYTES: usize = 20 << 10;
/// Most bytes tokenised elsewhere whose tokens are not remembered: less than a millisecond's worth.
const NEW_BYTES: usize = 2 << 10;

/// What every request shares.
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) config: Config,
    pub(crate) model: Arc<TextModel>,
    /// How the model writes reasoning and calls of tools.
    pub(crate) dialect: Dialect,
    /// How hidden states make an embedding; `None` = embeddings are refused.
    pub(crate) pooling: Option<Pooling>,
    pub(crate) text: TextPool,
    /// Who may ask; `None` = everybody.
    pub(crate) keys: Option<Arc<Keys>>,
    pub(crate) page_names: PageNames,
    pub(crate) fleet: Fleet,
    pub(crate) admission: Admission,
    pub(crate) why: Why,
    pub(crate) responses: Store,
    pub(crate) metrics: Metrics,
    /// When this router started, in seconds since the Unix epoch: the age clients see of its model.
    pub(crate) created: u64,
    /// Cancelled when nothing new is taken.
    pub(crate) draining: CancellationToken,
    /// Cancelled when streams have had their time to finish.
    pub(crate) abort: CancellationToken,
}

/// Who asks, for logs, traces and deadlines.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) request: Arc<str>,
    pub(crate) traceparent: Arc<str>,
    pub(crate) arrived: Instant,
    /// Of the body, as announced; without a word, any number.
    pub(crate) body_bytes: usize,
    /// Whose key it showed: charged with the tokens read and written.
    pub(crate) key: Option<Arc<Key>>,
    /// When it wants its first token, from its arrival on.
    pub(crate) objective: Option<Duration>,
    /// Where its answer's header finds how it went, if it asks for that.
    pub(crate) why: Option<Why>,
    pub(crate) span: Span,
}

impl Origin {
    /// Whose turns it shares.
    pub(crate) fn key_number(&self) -> u64 {
        self.key.as_ref().map_or(0, |key| key.number())
    }
}

/// One choice to be generated.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) origin: Origin,
    pub(crate) prompt: Arc<Prompt>,
    pub(crate) sampling: Arc<Sampling>,
    /// What the answer must fit.
    pub(crate) grammar: Option<Arc<Spec>>,
    /// Which of `n`: part of the random counter.
    pub(crate) choice: u32,
    pub(crate) stop: Arc<Stop>,
    pub(crate) stop_strings: Vec<String>,
    /// Whether what stopped it stays in the text.
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// Special tokens that are shown all the same: what the answer's dialect is read by.
    pub(crate) shown: Arc<[TokenId]>,
    /// Whether steps carry the ids of their tokens.
    pub(crate) report_ids: bool,
    /// Alternatives reported beside each token of the prompt; `None` = nothing is reported of it.
    pub(crate) prompt_logprobs: Option<u32>,
    /// Lower runs first.
    pub(crate) priority: i32,
    /// Asks for the prompt's embedding, and for no token.
    pub(crate) pooling: Option<Pooling>,
    /// What a client's proxy says of the prompt's pages.
    pub(crate) transfer: Option<Arc<Part>>,
    /// What it was let in with; it is not held against its objective again.
    pub(crate) promise: Option<Promise>,
    /// Tokens it was expected to write when it got its turn.
    pub(crate) expected: u32,
}

/// What became known since the last step.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) text: String,
    /// The tokens behind it, where log-probabilities were asked for. With stop strings they run ahead of the text.
    pub(crate) tokens: Vec<Token>,
    /// Every token's id, the one that stopped the choice included, where ids were asked for. They run ahead of the text, too.
    pub(crate) ids: Vec<TokenId>,
    /// The prompt's tokens but for the first, where log-probabilities of them were asked for: with the first step.
    pub(crate) prompt: Option<Vec<Token>>,
    /// The prompt's embedding, where that was asked for: with the end.
    pub(crate) embedding: Vec<f32>,
    /// What it says, taken apart, where the endpoint speaks of messages: `text` has moved there.
    pub(crate) events: Vec<Event>,
    pub(crate) finish: Option<Finish>,
    /// Whether it ended to have tools called.
    pub(crate) calls_tools: bool,
}

impl Step {
    fn says_something(&self) -> bool {
        !self.text.is_empty() || !self.tokens.is_empty()
    }
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model ended it, or there was nothing to generate.
    EndOfSequence,
    /// One of the request's `stop_token_ids`.
    StopToken(TokenId),
    /// One of its stop strings.
    StopString(String),
    /// `max_tokens` or the context.
    Length,
}

impl Router {
    /// Turns prompts into tokens and page names; `render` makes them. Where that may take long it is done on the text threads: for a
    /// long body all of it, for a short one whatever tokenising finds to be new. `name` is the field errors speak of.
    pub(crate) async fn prepare(
        self: &Arc<Self>,
        body_bytes: usize,
        render: impl FnOnce(&Self) -> Result<Vec<PromptSource>, Error> + Send + 'static,
        root: (Bytes, Option<Arc<Adapter>>),
        (echo, truncation): (bool, Option<Truncation>),
        name: &'static str,
    ) -> Result<Vec<Arc<Prompt>>, Error> {
        let short = body_bytes <= SHORT_BODY_BYTES;
        let rendered = if short { Ok(render(self)?) } else { Err(render) };
        let make = move |router: &Self, sources: &[PromptSource], most_bytes| -> Result<Option<Vec<_>>, Error> {
            let prompt = |source| Prompt::new(router, source, root.clone(), (echo, truncation), name, most_bytes);
            sources.iter().map(|source| Ok(prompt(source)?.map(Arc::new))).collect()
        };
        if let Ok(sources) = &rendered
            && let Some(prompts) = make(self, sources, NEW_BYTES / sources.len().max(1))?
        {
            return Ok(prompts);
        }
        let router = self.clone();
        let prompts = self.text.run(move || {
            let sources = rendered.or_else(|render| render(&router))?;
            make(&router, &sources, usize::MAX)
        });
        Ok(prompts.await?.expect("nothing is longer than memory"))
    }

    /// Whether a new request has a chance at all: what can be said before anything is read of it.
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            let message = "the router is shutting down".into();
            return Err(Error::Unavailable { message, retry_after: Duration::from_secs(1) });
        }
        self.admission.check_queue()
    }

    /// Returns the longest sequence that can be served.
    pub(crate) fn context_tokens(&self) -> u32 {
        self.fleet.max_model_len().unwrap_or(self.model.context_tokens)
    }
}

/// One choice under way. See the module.
#[derive(Debug)]
pub(crate) struct Generation {
    router: Arc<Router>,
    work: Work,
    attempt: Option<Attempt>,
    /// Where it is, as long as that has not proved to work.
    placed: Option<begin::Placed>,
    attempts: u32,
    /// Workers that failed it.
    excluded: Vec<String>,
    /// Every token so far, of all attempts.
    output: Vec<TokenId>,
    /// The last token, while it may be the one that stops the sequence: its text must not be shown then.
    held: Option<Token>,
    text: TextState,
    /// How the last attempt failed, until something is done about it.
    failure: Option<Failure>,
    /// As the first attempt found it: what later ones find cached is often their own.
    cached: Option<Cached>,
    /// How long the prompt waited and was computed, as the last attempt to say so found it.
    prompt_times: [Duration; 2],
    first_token: Option<Instant>,
    /// When the last token came; before the first, when the attempt began.
    last_heard: Instant,
    /// Rings at or before the current deadline. Moving a timer for every token would cost more than the token.
    alarm: Pin<Box<Sleep>>,
    /// Spare room for events.
    events: Vec<LegEvent>,
}

#[derive(Debug)]
struct TextState {
    detokenizer: Detokenizer,
    stop: StopStrings,
    /// Text of the current token.
    piece: String,
}

impl Generation {
    pub(crate) fn new(router: Arc<Router>, work: Work) -> Self {
        let text = TextState {
            detokenizer: Detokenizer::new(&router.model.tokenizer, &work.prompt.tokens, work.skip_special)
                .showing(work.shown.clone()),
            stop: StopStrings::new(work.stop_strings.clone(), work.include_stop),
            piece: String::new(),
        };
        Self {
            router,
            work,
            attempt: None,
            placed: None,
            attempts: 0,
            excluded: Vec::new(),
            output: Vec::new(),
            held: None,
            text,
            failure: None,
            cached: None,
            prompt_times: [Duration::ZERO; 2],
            first_token: None,
            last_heard: Instant::now(),
            alarm: Box::pin(sleep(Duration::ZERO)),
            events: Vec::new(),
        }
    }

    /// Fills `step` with what came next: the first token, more text, or the end. After the end it must not be called again.
    pub(crate) async fn next(&mut self, step: &mut Step) -> Result<(), Error> {
        step.text.clear();
        step.tokens.clear();
        step.ids.clear();
        step.prompt = None;
        let first = self.output.is_empty();
        while !(step.finish.is_some() || step.says_something() || (first && !self.output.is_empty())) {
            // What is rare is boxed: a stream that only listens would keep room for it.
            if let Some(failure) = self.failure.take() {
                Box::pin(self.recover(&failure, step)).await?;
            } else if self.attempt.is_none() {
                Box::pin(self.begin()).await?;
            } else if let Some(failure) = self.listen().await? {
                self.fail(failure);
            } else {
                self.take_news(step);
            }
        }
        if let Some(finish) = &step.finish {
            self.finish(finish);
        }
        Ok(())
    }

    /// Returns the output tokens so far.
    pub(crate) fn output_tokens(&self) -> u32 {
        self.output.len() as u32
    }

    /// Returns what came of the prompt from a prefix cache.
    fn cached(&self) -> Cached {
        let running = || self.attempt.as_ref().and_then(Attempt::cached);
        let cached = self.cached.or_else(running).unwrap_or_default();
        let prompt = self.prompt_tokens();
        Cached { tokens: cached.tokens.min(prompt), fetched: cached.fetched.min(prompt) }
    }

    /// Returns the prompt tokens that came from a prefix cache.
    pub(crate) fn cached_tokens(&self) -> u32 {
        self.cached().tokens
    }

    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.work.prompt.tokens.len() as u32
    }

    /// Tells whose key it was what the choice took.
    fn charge(&self) {
        if self.attempts == 0 {
            return;
        }
        let origin = &self.work.origin;
        if let Some(key) = &origin.key {
            key.charge(self.prompt_tokens().saturating_add(self.output_tokens()));
        }
        let more = i64::from(self.output_tokens()) - i64::from(self.work.expected);
        self.router.admission.settle(self.work.priority, origin.key_number(), more);
    }

    // 3: listen.

    /// Returns a failure when it has been silent for too long.
    async fn listen(&mut self) -> Result<Option<Failure>, Error> {
        let attempt = self.attempt.as_mut().expect("listening follows begin");
        loop {
            tokio::select! {
                biased;
                () = attempt.listen(&mut self.events) => return Ok(None),
                () = self.alarm.as_mut() => {}
                () = self.router.abort.cancelled() => {
                    return Err(Error::Unavailable {
                        message: "the router is shutting down".into(),
                        retry_after: Duration::from_secs(1),
                    });
                }
            }
            // The alarm may have been set before the last tokens came.
            let now = Instant::now();
            let limits = &self.router.config.limits;
            if now >= self.work.origin.arrived + limits.request_timeout() {
                return Err(Error::Timeout(format!("the request took longer than {:?}", limits.request_timeout())));
            }
            let patience = if attempt.has_spoken() { limits.stall_timeout() } else { limits.first_token_timeout() };
            if now >= self.last_heard + patience {
                return Ok(Some(attempt.stalled(format!("no token for {patience:?}"))));
            }
            let ring = (self.last_heard + patience).min(self.work.origin.arrived + limits.request_timeout());
            self.alarm.as_mut().reset(ring);
        }
    }

    fn take_news(&mut self, step: &mut Step) {
        let before = self.output.len();
        while step.finish.is_none() {
            match self.attempt.as_mut().and_then(Attempt::news) {
                Some(News::Token(token)) => self.token(token, step),
                Some(News::Ended(ending)) => self.end(ending, step),
                // What came before it is shown first.
                Some(News::Failed(failure)) => self.fail(failure),
                None => break,
            }
        }
        self.observe(before);
    }

    fn token(&mut self, token: Token, step: &mut Step) {
        if let Some(held) = self.held.take() {
            self.show(held, step);
        }
        if step.finish.is_some() {
            return;
        }
        if self.wanted_prompt().is_some() {
            step.prompt = self.attempt.as_mut().map(Attempt::take_prompt);
        }
        self.output.push(token.id);
        if self.work.report_ids {
            step.ids.push(token.id);
        }
        if self.may_stop(&token) {
            // The worker says in the same frame whether it did.
            self.held = Some(token);
        } else {
            self.show(token, step);
        }
    }

    fn may_stop(&self, token: &Token) -> bool {
        let stop = &self.work.stop;
        token.index >= stop.min_tokens
            && (stop.token_ids.contains(&token.id) || (!stop.ignore_eos && self.router.model.eos.contains(&token.id)))
    }

    fn show(&mut self, token: Token, step: &mut Step) {
        let text = &mut self.text;
        text.piece.clear();
        text.detokenizer.push(&self.router.model.tokenizer, token.id, &mut text.piece);
        let armed = token.index >= self.work.stop.min_tokens;
        if token.logprobs.is_some() {
            step.tokens.push(token);
        }
        if let Outcome::Found(index) = text.stop.push(&text.piece, armed, &mut step.text) {
            step.finish = Some(Finish::StopString(text.stop.string(index).to_string()));
        }
    }

    fn end(&mut self, ending: Ending, step: &mut Step) {
        let finish = match ending {
            Ending::Embedded(vector) => {
                step.embedding = vector;
                step.finish = Some(Finish::EndOfSequence);
                self.last_heard = Instant::now();
                return;
            }
            Ending::Length => Finish::Length,
            Ending::Stop(token) if self.work.stop.token_ids.contains(&token) => Finish::StopToken(token),
            Ending::Stop(_) => Finish::EndOfSequence,
        };
        if let Some(held) = self.held.take().filter(|_| finish == Finish::Length || self.work.include_stop) {
            self.show(held, step);
        }
        // A stop string may have been found in the very last token.
        if step.finish.is_none() {
            self.flush(step);
        }
        step.finish.get_or_insert(finish);
    }

    /// Shows what was held back for a character or a stop string that did not come.
    fn flush(&mut self, step: &mut Step) {
        let text = &mut self.text;
        text.piece.clear();
        text.detokenizer.finish(&self.router.model.tokenizer, &mut text.piece);
        if let Outcome::Found(index) = text.stop.push(&text.piece, true, &mut step.text) {
            step.finish = Some(Finish::StopString(text.stop.string(index).to_string()));
        }
        text.stop.finish(&mut step.text);
    }

    /// Notes the times of the tokens that came since the output was `before` tokens long.
    fn observe(&mut self, before: usize) {
        let count = self.output.len() - before;
        if count == 0 {
            return;
        }
        let now = Instant::now();
        self.note_success(now);
        let mut later = count;
        if before == 0 {
            self.first_token = Some(now);
            self.router.metrics.first_token((now - self.work.origin.arrived).as_secs_f64());
            later -= 1;
        }
        if later > 0 {
            self.router.metrics.next_tokens((now - self.last_heard).as_secs_f64() / later as f64, later);
        }
        self.last_heard = now;
    }

    /// The choice has all it needs: legs still under way are called off.
    fn finish(&mut self, finish: &Finish) {
        self.end_attempt();
        let [queue, prefill] = self.prompt_times;
        let told = Told {
            prompt_tokens: self.prompt_tokens(),
            cached: self.cached(),
            output_tokens: self.output_tokens(),
            whole: self.last_heard - self.work.origin.arrived,
            decode: self.first_token.map_or(Duration::ZERO, |first| self.last_heard - first),
            queue,
            prefill,
        };
        self.router.metrics.told(&told, finish);
        let span = &self.work.origin.span;
        span.record("prompt_tokens", self.prompt_tokens()).record("output_tokens", self.output_tokens());
    }

    fn end_attempt(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            self.cached = self.cached.or(attempt.cached());
            self.prompt_times = attempt.prompt_times().unwrap_or(self.prompt_times);
        }
    }

    // 4: recover.

    /// The attempt is over; what follows from it is decided once everything before it has been shown.
    fn fail(&mut self, failure: Failure) {
        self.end_attempt();
        self.failure = Some(failure);
    }

    async fn recover(&mut self, failure: &Failure, step: &mut Step) -> Result<(), Error> {
        // The leg may have died with nothing left to do.
        if let Some(held) = &self.held {
            let token = held.id;
            self.end(Ending::Stop(token), step);
        } else if self.output_tokens() >= self.work.stop.max_tokens {
            self.end(Ending::Length, step);
        } else {
            self.prepare_retry(failure).await?;
        }
        Ok(())
    }

    /// Waits until the request may be placed again, or says why it may not.
    async fn prepare_retry(&mut self, failure: &Failure) -> Result<(), Error> {
        let limits = &self.router.config.limits;
        let (request, attempt) = (&self.work.origin.request, self.attempts);
        self.router.why.failed(request, self.work.choice, failure);
        // A stream that was lost counts once, for all its legs, where it was lost.
        if matches!(failure.kind, FailureKind::Failed | FailureKind::Stalled) {
            self.router.fleet.failed(recovery::culprit(failure), &failure.message);
        }
        tracing::warn!(%request, attempt, worker = %failure.worker, kind = ?failure.kind, reason = %failure.message, "leg failed");
        match recovery::remedy(failure, self.attempts, limits.max_attempts, limits.stream_buffer_tokens) {
            Remedy::GiveUp(error) => Err(error),
            Remedy::Retry { without, pause, reason } => {
                self.router.metrics.retried(reason);
                self.excluded.push(without);
                sleep(pause).await;
                Ok(())
            }
        }
    }

    fn ends_at(&self) -> Instant {
        self.work.origin.arrived + self.router.config.limits.request_timeout()
    }

    fn set_alarm(&mut self) {
        let limits = &self.router.config.limits;
        let soonest = limits.first_token_timeout().min(limits.stall_timeout());
        self.alarm = Box::pin(sleep_until((self.last_heard + soonest).min(self.ends_at())));
    }
}

/// However it ended: what was computed is charged.
impl Drop for Generation {
    fn drop(&mut self) {
        self.charge();
    }
}
