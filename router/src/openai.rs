//! The public API: OpenAI's shapes, and vLLM's additions to them.
//!
//! Each endpoint's request and response stand beside each other; what both endpoints share is in [`params`]. Fields nobody knows
//! are ignored, as clients expect; fields that would change the answer and are not served yet are refused by name.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod constraint;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod fields;
mod hearing;
pub(crate) mod kv_transfer;
mod logprobs;
pub(crate) mod models;
pub(crate) mod params;
pub(crate) mod stream;
pub(crate) mod tokens;
pub(crate) mod tools;

use crate::{
    admission::{Claim, Turn},
    error::Error,
    metrics::{Metrics, Outcome, RequestGuard},
    prompt::{Prompt, PromptSource},
    request::{Finish, Generation, Origin, Router, Step, Work},
    why::Arrival,
};
use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use hearing::Hearing;
use params::Params;
use serde::Serialize;
use std::sync::Arc;

/// How one endpoint writes what was generated.
pub(crate) trait Shape: Send + 'static {
    /// Writes the chunks of one step of one choice. `first` at the choice's first step.
    fn chunk(&mut self, choice: usize, first: bool, step: &Step, usage: Option<Usage>, out: &mut Vec<u8>);

    /// Writes the last chunk, which only carries usage.
    fn usage_chunk(&mut self, usage: Usage, out: &mut Vec<u8>);

    /// Writes what ends a stream.
    fn close(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(stream::DONE);
    }

    /// Writes what ends a stream that failed.
    fn failed(&mut self, error: &Error, out: &mut Vec<u8>) {
        stream::event(out, |out| error::write(error, out));
        out.extend_from_slice(stream::DONE);
    }

    /// Takes in one step of an answer that is not streamed.
    fn collect(&mut self, choice: usize, step: &Step);

    /// Writes the whole answer.
    fn answer(&mut self, usage: Usage) -> Vec<u8>;
}

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
}

/// How every object of one answer begins, in JSON: written once, for a stream has thousands of them.
#[derive(Debug)]
pub(crate) struct Opening(Vec<u8>);

impl Opening {
    /// `object` is the kind of object.
    fn new(head: &Head, object: &str) -> Self {
        #[derive(Serialize)]
        struct Fields<'a> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let Head { id, created, model, fingerprint } = head;
        let mut json = Vec::new();
        write_json(&Fields { id, object, created: *created, model, system_fingerprint: fingerprint }, &mut json);
        json.pop();
        Self(json)
    }

    /// Writes an object that goes on with the fields of `rest`, which has some.
    fn write(&self, rest: &impl Serialize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
        let joint = out.len();
        write_json(rest, out);
        debug_assert!(out[joint..].starts_with(b"{\""), "an object with a field");
        out[joint] = b',';
    }
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    total_tokens: u32,
    pub(crate) completion_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    /// Of models that reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
}

impl Usage {
    /// Prompt tokens that came from a prefix cache.
    pub(crate) fn cached_tokens(&self) -> u32 {
        self.prompt_tokens_details.cached_tokens
    }

    /// Output tokens that were reasoning.
    pub(crate) fn reasoning_tokens(&self) -> u32 {
        self.completion_tokens_details.map_or(0, |details| details.reasoning_tokens)
    }

    fn new(prompt_tokens: u32, cached_tokens: u32, completion_tokens: u32) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self {
            prompt_tokens,
            total_tokens,
            completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
            completion_tokens_details: None,
        }
    }

    /// Adds what another prompt took.
    fn and(self, other: &Self) -> Self {
        Self::new(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens() + other.cached_tokens(),
            self.completion_tokens + other.completion_tokens,
        )
    }

    fn reasoning(self, tokens: Option<u32>) -> Self {
        let details = tokens.map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens });
        Self { completion_tokens_details: details, ..self }
    }
}

/// `finish_reason` and `stop_reason` of a choice.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum StopReason {
    Token(u32),
    String(String),
}

/// `calls_tools`: the choice ended to have tools called, which is a reason of its own unless it was cut off.
fn reasons(finish: &Finish, calls_tools: bool) -> (&'static str, Option<StopReason>) {
    match finish {
        Finish::EndOfSequence if calls_tools => ("tool_calls", None),
        Finish::EndOfSequence => ("stop", None),
        Finish::StopToken(token) => ("stop", Some(StopReason::Token(*token))),
        Finish::StopString(string) => ("stop", Some(StopReason::String(string.clone()))),
        Finish::Length => ("length", None),
    }
}

/// A request that was accepted and whose prompts are tokens.
pub(crate) struct Accepted {
    pub(crate) router: Arc<Router>,
    pub(crate) origin: Origin,
    pub(crate) params: Params,
    pub(crate) prompts: Vec<Arc<Prompt>>,
    pub(crate) turn: Turn,
    pub(crate) guard: RequestGuard,
}

/// Turns the prompts into tokens and waits for a turn. `render` makes the sources and runs on the text threads.
pub(crate) async fn accept(
    router: Arc<Router>,
    origin: Origin,
    mut params: Params,
    mut guard: RequestGuard,
    render: impl FnOnce(&Router) -> Result<Vec<PromptSource>, Error> + Send + 'static,
) -> Result<Accepted, (Error, RequestGuard)> {
    let prepared = async {
        params.check_reach(&router)?;
        if let Some(adapter) = &params.adapter {
            guard.waits(&adapter.name);
        }
        let place = router.admission.enter(params.priority)?;
        let root = (params.salt.clone(), params.adapter.clone());
        let (kept, bytes) = ((params.echo, params.truncation), origin.body_bytes);
        let prompts = router.prepare(bytes, render, root, kept, params.prompt_field).await?;
        let claim = claim(&router, &origin, &params, &prompts);
        let turn = place.turn(claim, || router.predict_ms(prompts.first()?)).await?;
        if let Some(constraint) = &params.constraint {
            constraint.check(&router).await?;
        }
        guard.runs();
        Ok((turn, prompts))
    };
    let prepared = prepared.await;
    let waited = origin.arrived.elapsed();
    let arrival = Arrival { class: params.priority, waited, objective: origin.objective };
    // What is wrong with a request itself is said to its client alone.
    let rejected = prepared.as_ref().err().filter(|error| error::outcome(error) == Outcome::Rejected);
    if prepared.is_ok() || rejected.is_some() {
        router.why.admitted(&origin.request, arrival);
    }
    if let Some(rejected) = rejected {
        router.why.refused(&origin.request, rejected);
    }
    match prepared {
        Ok((turn, prompts)) => {
            router.metrics.asked(params.n, params.max_tokens);
            if let (Some(reading), Some(prompt)) = (&mut params.reading, prompts.first()) {
                reading.open(&router.model.tokenizer, &prompt.tokens);
                params.think_first();
            }
            Ok(Accepted { router, origin, params, prompts, turn, guard })
        }
        Err(error) => Err((error, guard)),
    }
}

/// What a request asks for.
fn claim(router: &Router, origin: &Origin, params: &Params, prompts: &[Arc<Prompt>]) -> Claim {
    let choices = prompts.len() * params.n as usize;
    let read: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    let written = choices as u64 * u64::from(params.expected_output(router));
    Claim {
        class: params.priority,
        key: origin.key_number(),
        tokens: read as u64 + written,
        choices,
        objective: origin.objective.map(|wanted| wanted.saturating_sub(origin.arrived.elapsed())),
    }
}

impl Accepted {
    /// One generation for each prompt and each of `n`, in the order of the answer's indices.
    fn generations(&self) -> Vec<Generation> {
        let context = self.router.context_tokens();
        let reading = self.params.reading.as_ref();
        let shown = reading.map(|reading| reading.marks(&self.router.dialect)).unwrap_or_default();
        let work = self.prompts.iter().flat_map(|prompt| {
            let stop = Arc::new(self.params.stop(context, prompt.tokens.len() as u32));
            let shown = shown.clone();
            (0..self.params.n).map(move |choice| Work {
                origin: self.origin.clone(),
                prompt: prompt.clone(),
                sampling: self.params.sampling.clone(),
                grammar: self.params.constraint.as_ref().map(|constraint| constraint.spec.clone()),
                choice,
                stop: stop.clone(),
                stop_strings: self.params.stop_strings.clone(),
                include_stop: self.params.include_stop,
                skip_special: self.params.skip_special,
                shown: shown.clone(),
                report_ids: self.params.token_ids || reading.is_some_and(|reading| reading.thoughts.is_some()),
                prompt_logprobs: self.params.reported_prompt(),
                priority: self.params.priority,
                pooling: None,
                transfer: self.params.transfer.clone(),
                promise: self.turn.promise,
                expected: self.params.expected_output(&self.router),
            })
        });
        work.map(|work| Generation::new(self.router.clone(), work)).collect()
    }

    /// Returns a listener for a choice, where the endpoint speaks of messages.
    fn hearing(&self) -> Option<Hearing> {
        let reading = self.params.reading.as_ref()?;
        Some(Hearing::new(reading, &self.router.dialect))
    }

    fn choices(&self) -> Choices {
        Choices::new(self.generations(), || self.hearing(), self.params.n, self.router.metrics.clone())
    }

    /// Generates, and answers in one piece or as a stream.
    pub(crate) async fn answer(mut self, shape: impl Shape) -> Result<Response, (Error, RequestGuard)> {
        let choices = self.choices();
        if self.params.stream {
            return stream::answer(self, choices, shape).await;
        }
        let mut shape = shape;
        match whole(choices, &mut shape).await {
            Ok(body) => {
                self.guard.ended(Outcome::Ok);
                Ok(json(body))
            }
            Err(error) => Err((error, self.guard)),
        }
    }

    /// Generates with nobody waiting, and returns the body.
    pub(crate) async fn collect(self, shape: &mut impl Shape) -> (RequestGuard, Result<Vec<u8>, Error>) {
        let body = whole(self.choices(), shape).await;
        (self.guard, body)
    }
}

async fn whole(mut choices: Choices, shape: &mut impl Shape) -> Result<Vec<u8>, Error> {
    while let Some(stepped) = choices.next().await {
        stepped.result.clone()?;
        shape.collect(stepped.index, &stepped.step);
    }
    Ok(shape.answer(choices.usage()))
}

pub(crate) fn json(body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Writes `value` as JSON. Our types hold nothing that JSON cannot say.
pub(crate) fn write_json(value: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("plain structs serialise into memory");
}

/// The choices of one request, generated side by side.
pub(crate) struct Choices {
    running: Running,
    /// The step being looked at.
    current: Option<Box<Stepped>>,
    /// Prompts are counted once, not once per choice.
    n: u32,
    usage: Usage,
    /// Choices that have not ended.
    left: usize,
    /// Output tokens of the longest that have.
    longest: u32,
    metrics: Metrics,
}

enum Running {
    /// The common case pays for no set of futures.
    One(Option<Box<Stepped>>),
    Many(FuturesUnordered<BoxFuture<'static, Box<Stepped>>>),
}

/// A choice after a step.
pub(crate) struct Stepped {
    pub(crate) index: usize,
    pub(crate) step: Step,
    pub(crate) result: Result<(), Error>,
    /// Whether this was its first.
    pub(crate) first: bool,
    generation: Generation,
    hearing: Option<Hearing>,
}

impl Stepped {
    async fn step(mut self: Box<Self>) -> Box<Self> {
        self.result = self.generation.next(&mut self.step).await;
        if let Some(hearing) = &mut self.hearing {
            hearing.hear(&mut self.step);
        }
        self
    }

    fn is_over(&self) -> bool {
        self.result.is_err() || self.step.finish.is_some()
    }
}

impl Choices {
    fn new(generations: Vec<Generation>, hearing: impl Fn() -> Option<Hearing>, n: u32, metrics: Metrics) -> Self {
        let start = |(index, generation)| {
            let (step, hearing) = (Step::default(), hearing());
            Box::new(Stepped { index, step, result: Ok(()), first: true, generation, hearing })
        };
        let left = generations.len();
        let mut starts: Vec<Box<Stepped>> = generations.into_iter().enumerate().map(start).collect();
        let running = match starts.len() {
            1 => Running::One(starts.pop()),
            _ => Running::Many(starts.into_iter().map(|stepped| Box::pin(stepped.step()) as BoxFuture<_>).collect()),
        };
        Self { running, current: None, n, usage: Usage::default(), left, longest: 0, metrics }
    }

    /// Waits for the next step of any choice; `None` when all have ended. After an error there is nothing more to wait for.
    async fn next(&mut self) -> Option<&Stepped> {
        if let Some(mut seen) = self.current.take() {
            seen.first = false;
            if !seen.is_over() {
                match &mut self.running {
                    Running::One(one) => *one = Some(seen),
                    Running::Many(many) => many.push(Box::pin(seen.step())),
                }
            }
        }
        let stepped = match &mut self.running {
            Running::One(one) => one.take()?.step().await,
            Running::Many(many) => many.next().await?,
        };
        if stepped.is_over() {
            self.count(&stepped);
        }
        self.current = Some(stepped);
        self.current.as_deref()
    }

    fn count(&mut self, stepped: &Stepped) {
        let generation = &stepped.generation;
        let (mut prompt, mut cached) = (0, 0);
        if stepped.index.is_multiple_of(self.n as usize) {
            (prompt, cached) = (generation.prompt_tokens(), generation.cached_tokens());
        }
        self.left -= 1;
        self.longest = self.longest.max(generation.output_tokens());
        if self.left == 0 {
            self.metrics.longest(self.longest);
        }
        let so_far = self.usage;
        let before = so_far.completion_tokens_details.map_or(0, |details| details.reasoning_tokens);
        let reasoning = stepped.reasoning_tokens().map(|tokens| before + tokens);
        self.usage = Usage::new(
            so_far.prompt_tokens + prompt,
            so_far.prompt_tokens_details.cached_tokens + cached,
            so_far.completion_tokens + generation.output_tokens(),
        )
        .reasoning(reasoning);
    }

    /// Returns what all choices that have ended used.
    fn usage(&self) -> Usage {
        self.usage
    }
}

impl Stepped {
    /// What this choice has used so far.
    fn usage(&self) -> Usage {
        let generation = &self.generation;
        Usage::new(generation.prompt_tokens(), generation.cached_tokens(), generation.output_tokens())
            .reasoning(self.reasoning_tokens())
    }

    fn reasoning_tokens(&self) -> Option<u32> {
        self.hearing.as_ref().and_then(Hearing::reasoning_tokens)
    }
}
