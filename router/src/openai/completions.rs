//! `/v1/completions`.

use super::{
    Head, Opening, Shape, StopReason, Usage,
    fields::{Fields, integer, wrong},
    json,
    kv_transfer::Told,
    logprobs::{Names, PromptLogprobs, TextLogprobs},
    params::{Differences, Params},
    reasons,
    stream::{self, event},
};
use crate::{
    error::Error,
    prompt::{Prompt, PromptSource},
    request::{Finish, Router, Step},
};
use axum::response::Response;
use kv_cache::TokenId;
use serde::Serialize;
use serde_json::Value;
use std::sync::Arc;

/// Most prompts of a request.
const MAX_PROMPTS: usize = 1_024;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A completion request that makes sense.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) params: Params,
    pub(crate) prompts: Vec<PromptSource>,
}

impl CompletionRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let limits = &router.config.limits;
        let logprobs = fields.integer("logprobs", 0..=i64::from(limits.max_logprobs))?.map(|n| n as u32);
        let echo = fields.bool("echo")?.unwrap_or(false);
        let differences =
            Differences { prompt_field: "prompt", default_max_tokens: Some(DEFAULT_MAX_TOKENS), logprobs, echo };
        let params = Params::take(&mut fields, router, differences)?;
        fields.refuse(&["suffix"])?;
        best_of(&mut fields, params.n)?;
        let special = fields.bool("add_special_tokens")?.unwrap_or(true);
        let prompts = prompts(&mut fields, ("prompt", MAX_PROMPTS), special, router.model.vocab_size)?;
        if params.transfer.is_some() && prompts.len() > 1 {
            let problem = format!("speaks of one prompt, and there are {}", prompts.len());
            return Err(Error::invalid("kv_transfer_params", problem));
        }
        let choices = prompts.len() * params.n as usize;
        if choices > limits.max_choices as usize {
            let problem = format!(
                "{} prompts with n = {} make {choices} choices, at most {} are allowed",
                prompts.len(),
                params.n,
                limits.max_choices
            );
            return Err(Error::invalid("prompt", problem));
        }
        Ok(Self { params, prompts })
    }
}

/// Asking for more candidates than choices needs a ranking nobody serves any more.
fn best_of(fields: &mut Fields, n: u32) -> Result<(), Error> {
    match fields.integer("best_of", 1..=i64::from(u32::MAX))? {
        Some(best_of) if best_of != i64::from(n) => {
            Err(Error::unsupported("best_of", format_args!("best_of = {best_of}")))
        }
        _ => Ok(()),
    }
}

/// A prompt is a text or a list of token ids, or a list of at most `most` of either. `name` is its field.
pub(super) fn prompts(
    fields: &mut Fields,
    (name, most): (&str, usize),
    special: bool,
    vocab_size: u32,
) -> Result<Vec<PromptSource>, Error> {
    let value = fields.take(name).ok_or_else(|| Error::invalid(name, "is required"))?;
    let list = match value {
        Value::String(text) => return Ok(vec![PromptSource::Text { text, special }]),
        Value::Array(list) if list.is_empty() => return Err(Error::invalid(name, "must not be an empty list")),
        Value::Array(list) => list,
        other => return Err(wrong(name, "a string, a list of strings, or token ids", &other)),
    };
    if list[0].is_number() {
        return Ok(vec![PromptSource::Tokens(token_ids(name, &list, vocab_size)?)]);
    }
    if list.len() > most {
        return Err(Error::invalid(name, format_args!("holds {} prompts, at most {most} are allowed", list.len())));
    }
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(PromptSource::Text { text, special }),
        Value::Array(ids) => Ok(PromptSource::Tokens(token_ids(&format!("{name}[{i}]"), &ids, vocab_size)?)),
        other => Err(wrong(&format!("{name}[{i}]"), "a string or a list of token ids", &other)),
    };
    list.into_iter().enumerate().map(one).collect()
}

fn token_ids(name: &str, values: &[Value], vocab_size: u32) -> Result<Vec<u32>, Error> {
    let id = |(i, value): (usize, &Value)| {
        integer(value).and_then(|id| u32::try_from(id).ok()).filter(|&id| id < vocab_size).ok_or_else(|| {
            wrong(&format!("{name}[{i}]"), &format!("a token id of this model (0 to {})", vocab_size - 1), value)
        })
    };
    values.iter().enumerate().map(id).collect()
}

/// Writes text completions.
#[derive(Debug)]
pub(crate) struct CompletionShape {
    router: Arc<Router>,
    opening: Opening,
    prompts: Vec<Arc<Prompt>>,
    n: usize,
    /// Alternatives per token; `None` = no log-probabilities.
    logprobs: Option<u32>,
    /// Alternatives listed beside each token of the prompt; `None` = they are not listed.
    prompt_logprobs: Option<u32>,
    /// Whether the prompt is all that is shown.
    prompt_only: bool,
    include_usage: bool,
    token_ids: bool,
    /// Whether log-probabilities name tokens by their ids.
    tokens_by_id: bool,
    /// Where the prompt's pages are, for a proxy that asked.
    transfer: Option<Told>,
    /// Choices whose last chunk has not been written.
    open: usize,
    choices: Vec<TextChoice>,
    /// Where each choice's text stands, in characters: streamed log-probabilities count on.
    offsets: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

/// The whole answer and its chunks have one shape.
#[derive(Serialize)]
struct Answer<'a, Choice> {
    choices: &'a [Choice],
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<&'a Told>,
    /// Absent from chunks unless asked for; then `null` but on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Default, Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    /// This and the next on a choice's first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

impl CompletionShape {
    pub(crate) fn new(router: Arc<Router>, head: &Head, params: &Params, prompts: Vec<Arc<Prompt>>) -> Self {
        let n = params.n as usize;
        let logprobs = params.sampling.logprobs;
        let choice = |index: usize| TextChoice {
            index,
            text: prompts[index / n].echo.clone().unwrap_or_default(),
            logprobs: logprobs.map(|_| TextLogprobs::default()),
            finish_reason: None,
            stop_reason: None,
            prompt_logprobs: None,
            prompt_text: params.prompt_text.then(|| router.model.tokenizer.decode(&prompts[index / n].tokens, false)),
            prompt_token_ids: params.token_ids.then(|| prompts[index / n].tokens.clone()),
            token_ids: params.token_ids.then(Vec::new),
        };
        let choices: Vec<TextChoice> = (0..prompts.len() * n).map(choice).collect();
        let offsets = vec![0; choices.len()];
        let (include_usage, token_ids) = (params.include_usage, params.token_ids);
        let (prompt_logprobs, prompt_only) = (params.prompt_logprobs, params.prompt_only());
        // Nothing is computed for a prompt that is only repeated.
        let computed = params.transfer.as_ref().filter(|_| !prompt_only);
        let transfer = computed.and_then(|part| part.told(&router, prompts.first()?, &head.id));
        Self {
            router,
            opening: Opening::new(head, "text_completion"),
            n,
            logprobs,
            prompt_logprobs,
            prompt_only,
            include_usage,
            token_ids,
            tokens_by_id: params.tokens_by_id,
            transfer,
            open: choices.len(),
            choices,
            offsets,
            prompts,
        }
    }

    /// Answers `echo` with `max_tokens` 0: the prompts themselves, for which nobody needs to compute anything.
    pub(crate) fn prompts_only(&mut self, params: &Params) -> Response {
        let usage = Usage::new(self.prompts.iter().map(|prompt| prompt.tokens.len() as u32).sum(), 0, 0);
        let step = Step { finish: Some(Finish::Length), ..Step::default() };
        let choices = 0..self.choices.len();
        if !params.stream {
            choices.for_each(|index| self.collect(index, &step));
            return json(self.answer(usage));
        }
        let mut out = Vec::new();
        choices.for_each(|index| self.chunk(index, true, &step, params.continuous_usage.then_some(usage), &mut out));
        if params.include_usage {
            self.usage_chunk(usage, &mut out);
        }
        stream::complete(out)
    }

    fn write<Choice: Serialize>(&self, choices: &[Choice], usage: Option<Option<Usage>>, out: &mut Vec<u8>) {
        let kv_transfer_params = self.transfer.as_ref().filter(|_| self.open == 0 && !choices.is_empty());
        self.opening.write(&Answer { choices, kv_transfer_params, usage }, out);
    }

    fn write_chunk(&self, choice: Option<ChunkChoice<'_>>, usage: Option<Usage>, out: &mut Vec<u8>) {
        let usage = (self.include_usage || usage.is_some()).then_some(usage);
        event(out, |out| self.write(choice.as_slice(), usage, out));
    }
}

impl Shape for CompletionShape {
    fn chunk(&mut self, index: usize, first: bool, step: &Step, usage: Option<Usage>, out: &mut Vec<u8>) {
        let prompt = &self.prompts[index / self.n];
        let names = Names { tokenizer: &self.router.model.tokenizer, by_id: self.tokens_by_id };
        if let Some(text) = prompt.echo.as_deref().filter(|_| first) {
            let logprobs = self.logprobs.zip(step.prompt.as_ref()).map(|(count, others)| {
                let mut logprobs = TextLogprobs::default();
                logprobs.echo(names, prompt.tokens[0], others, count as usize);
                self.offsets[index] = logprobs.offset();
                logprobs
            });
            self.write_chunk(Some(ChunkChoice { index, text, logprobs, ..ChunkChoice::default() }), usage, out);
        }
        let nothing = Step { finish: step.finish.clone(), ..Step::default() };
        let step = if self.prompt_only { &nothing } else { step };
        let prompt_token_ids = (first && self.token_ids).then_some(&prompt.tokens[..]);
        let token_ids = (self.token_ids && !step.ids.is_empty()).then_some(&step.ids[..]);
        let logprobs = self.logprobs.filter(|_| !step.tokens.is_empty()).map(|count| {
            let mut logprobs = TextLogprobs::at(self.offsets[index]);
            logprobs.extend(names, &step.tokens, count as usize);
            self.offsets[index] = logprobs.offset();
            logprobs
        });
        let (finish_reason, stop_reason) = step.finish.as_ref().map(|finish| reasons(finish, false)).unzip();
        if !step.text.is_empty() || logprobs.is_some() || token_ids.is_some() || finish_reason.is_some() {
            let stop_reason = stop_reason.flatten();
            let text = &step.text;
            self.open -= usize::from(finish_reason.is_some());
            let prompt_text = self.choices[index].prompt_text.as_deref().filter(|_| first);
            let choice = ChunkChoice {
                index,
                text,
                logprobs,
                finish_reason,
                stop_reason,
                prompt_text,
                prompt_token_ids,
                token_ids,
            };
            self.write_chunk(Some(choice), usage, out);
        }
    }

    fn usage_chunk(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.write_chunk(None, Some(usage), out);
    }

    fn collect(&mut self, index: usize, step: &Step) {
        let choice = &mut self.choices[index];
        let names = Names { tokenizer: &self.router.model.tokenizer, by_id: self.tokens_by_id };
        let prompt = &self.prompts[index / self.n];
        if let Some(others) = &step.prompt {
            let list = |count: u32| PromptLogprobs::new(names, others, count as usize);
            choice.prompt_logprobs = self.prompt_logprobs.map(list);
            if let (Some(logprobs), Some(count), true) = (&mut choice.logprobs, self.logprobs, prompt.echo.is_some()) {
                logprobs.echo(names, prompt.tokens[0], others, count as usize);
            }
        }
        let nothing = Step { finish: step.finish.clone(), ..Step::default() };
        let step = if self.prompt_only { &nothing } else { step };
        choice.text.push_str(&step.text);
        choice.token_ids.as_mut().into_iter().for_each(|ids| ids.extend(&step.ids));
        if let (Some(logprobs), Some(count)) = (&mut choice.logprobs, self.logprobs) {
            logprobs.extend(names, &step.tokens, count as usize);
        }
        if let Some(finish) = &step.finish {
            let (finish_reason, stop_reason) = reasons(finish, false);
            self.open -= 1;
            (choice.finish_reason, choice.stop_reason) = (Some(finish_reason), stop_reason);
        }
    }

    fn answer(&mut self, usage: Usage) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&self.choices, Some(Some(usage)), &mut out);
        out
    }
}
