//! Parameters that chat and text completions share.

use super::{
    constraint::Constraint,
    fields::{Fields, integer, shown, wrong},
    kv_transfer::{self, Part},
};
use crate::{
    dialect::Reading,
    error::Error,
    fleet::{
        adapters::Adapter,
        leg::{Sampling, Stop},
    },
    prompt::Truncation,
    request::Router,
};
use bytes::Bytes;
use grammar::Spec;
use kv_cache::TokenId;
use serde_json::Value;
use std::sync::Arc;

/// Most stop strings of a request.
const MAX_STOP_STRINGS: usize = 4;

/// Most bad words of a request.
const MAX_BAD_WORDS: usize = 1024;

/// Longest request id taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// Most choices of a prompt, as at OpenAI.
const MAX_N: u32 = 128;

/// Most characters of a cache salt.
const MAX_SALT_CHARS: usize = 128;

/// Fields of vLLM and OpenAI that would change the answer and are not served yet.
const UNSUPPORTED: [&str; 7] = [
    "logprob_token_ids",
    "use_beam_search",
    "repetition_detection",
    "ec_transfer_params",
    "prompt_embeds",
    "functions",
    "audio",
];

/// What both endpoints understand.
#[derive(Clone, Debug)]
pub(crate) struct Params {
    /// As the client named it, or the default.
    pub(crate) model: String,
    /// What is added to the base model, where the name is an adapter's.
    pub(crate) adapter: Option<Arc<Adapter>>,
    pub(crate) sampling: Arc<Sampling>,
    /// What the answer must fit.
    pub(crate) constraint: Option<Constraint>,
    /// How the answer is taken apart, where the endpoint speaks of messages.
    pub(crate) reading: Option<Reading>,
    pub(crate) n: u32,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    pub(crate) priority: i32,
    pub(crate) salt: Bytes,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Usage on every chunk.
    pub(crate) continuous_usage: bool,
    /// Whether the answer names the token ids behind it, prompt included.
    pub(crate) token_ids: bool,
    /// Whether log-probabilities name tokens by their ids.
    pub(crate) tokens_by_id: bool,
    /// Whether the answer tells what the model was given.
    pub(crate) prompt_text: bool,
    /// Which tokens of the prompt are kept; `None` = all.
    pub(crate) truncation: Option<Truncation>,
    /// The client's name for the request.
    pub(crate) request_id: Option<String>,
    /// Whether the prompt is repeated before the answer.
    pub(crate) echo: bool,
    /// Alternatives listed beside each token of the prompt; `None` = the prompt is not listed.
    pub(crate) prompt_logprobs: Option<u32>,
    /// What a proxy asks of this worker as to the prompt's pages.
    pub(crate) transfer: Option<Arc<Part>>,
    /// The field that holds the prompt, for errors.
    pub(crate) prompt_field: &'static str,
    /// `None` = up to the context's end.
    pub(crate) max_tokens: Option<u32>,
    min_tokens: u32,
    ignore_eos: bool,
    stop_token_ids: Vec<TokenId>,
}

/// What the endpoints differ in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Differences {
    pub(crate) prompt_field: &'static str,
    /// `max_tokens` where the client gives none.
    pub(crate) default_max_tokens: Option<u32>,
    /// Alternatives per token, as the endpoint asks for them.
    pub(crate) logprobs: Option<u32>,
    pub(crate) echo: bool,
}

impl Params {
    /// Takes the shared fields.
    pub(crate) fn take(fields: &mut Fields, router: &Router, differences: Differences) -> Result<Self, Error> {
        let (model, adapter) = model(fields, router)?;
        fields.refuse(&UNSUPPORTED)?;
        let constraint = Constraint::take(fields)?;
        let sampling = sampling(fields, router, differences.logprobs)?;
        let n = fields.integer("n", 1..=i64::from(router.config.limits.max_choices.min(MAX_N)))?.unwrap_or(1) as u32;
        if n > 1 && sampling.is_greedy() {
            return Err(Error::invalid(
                "n",
                format_args!("must be 1 when sampling is greedy (temperature 0), got {n}"),
            ));
        }
        let (stream, include_usage, continuous_usage) = stream(fields)?;
        let most = i64::from(router.config.limits.max_logprobs);
        let prompt_logprobs = fields.integer("prompt_logprobs", 0..=most)?.map(|n| n as u32);
        if stream && prompt_logprobs.is_some_and(|count| count > 0) {
            return Err(Error::invalid("prompt_logprobs", "only allowed when stream is false"));
        }
        let least = if differences.echo { 0 } else { 1 };
        let max_tokens = max_tokens(fields, least)?.or(differences.default_max_tokens);
        let min_tokens = fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32;
        if let Some(max_tokens) = max_tokens.filter(|&max| min_tokens > max) {
            let problem = format!("must not be greater than max_tokens ({max_tokens}), got {min_tokens}");
            return Err(Error::invalid("min_tokens", problem));
        }
        Ok(Self {
            model,
            adapter,
            sampling: Arc::new(sampling),
            constraint,
            reading: None,
            n,
            stop_strings: stop_strings(fields)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            priority: priority(fields)?,
            salt: salt(fields)?,
            stream,
            include_usage,
            continuous_usage,
            token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            tokens_by_id: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
            prompt_text: fields.bool("return_prompt_text")?.unwrap_or(false),
            truncation: truncation(fields, max_tokens)?,
            request_id: request_id(fields)?,
            echo: differences.echo,
            prompt_logprobs,
            transfer: kv_transfer::take(fields, router)?,
            prompt_field: differences.prompt_field,
            max_tokens,
            min_tokens,
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            stop_token_ids: stop_token_ids(fields, router)?,
        })
    }

    /// Refuses what a prefill worker, behind a door of its own, does not do: it goes no further than the first token.
    pub(crate) fn check_reach(&self, router: &Router) -> Result<(), Error> {
        let bounded = router.config.kv_transfer.as_ref().is_some_and(|config| config.first_token_only);
        if !bounded || self.max_tokens.is_some_and(|most| most <= 1) {
            return Ok(());
        }
        let got = self.max_tokens.map_or_else(|| "none".to_owned(), |most| most.to_string());
        let problem = format!("must be 1 at a prefill worker, which computes prompts and their first token, got {got}");
        Err(Error::invalid("max_tokens", problem))
    }

    /// Adds a constraint of the endpoint's own; a request that has one already cannot have both.
    pub(crate) fn constrain(&mut self, own: Option<Constraint>) -> Result<(), Error> {
        if let (Some(own), Some(other)) = (&own, &self.constraint) {
            let problem = format!("a call that is forced cannot be combined with {}", other.field);
            return Err(Error::invalid(own.field, problem));
        }
        self.constraint = self.constraint.take().or(own);
        Ok(())
    }

    /// Lets the model think before what a constraint holds for, as far as is known that it does.
    pub(crate) fn think_first(&mut self) {
        if let (Some(constraint), Some(reading)) = (&mut self.constraint, &self.reading) {
            let spec = Spec { thoughts: reading.before_answer(), ..Spec::clone(&constraint.spec) };
            constraint.spec = Arc::new(spec);
        }
    }

    /// Returns how many alternatives workers are to report beside each token of the prompt, to list them or to echo the prompt
    /// with them.
    pub(crate) fn reported_prompt(&self) -> Option<u32> {
        let echoed = self.sampling.logprobs.filter(|_| self.echo);
        self.prompt_logprobs.filter(|_| !self.stream).max(echoed)
    }

    /// Whether the prompt alone is asked for: what is generated so that it can be reported is not shown.
    pub(crate) fn prompt_only(&self) -> bool {
        self.echo && self.max_tokens == Some(0)
    }

    /// Returns how many tokens a choice may be expected to have.
    pub(crate) fn expected_output(&self, router: &Router) -> u32 {
        self.max_tokens.unwrap_or(u32::MAX).min(router.config.weights.expected_output_tokens)
    }

    /// When a worker ends a choice behind a prompt of this length.
    pub(crate) fn stop(&self, context: u32, prompt_tokens: u32) -> Stop {
        let room = context.saturating_sub(prompt_tokens).max(1);
        let max_tokens = self.max_tokens.map_or(room, |max| max.clamp(1, room));
        Stop {
            max_tokens,
            min_tokens: self.min_tokens.min(max_tokens),
            ignore_eos: self.ignore_eos,
            token_ids: self.stop_token_ids.clone(),
        }
    }
}

/// An empty or missing name means the default model.
pub(super) fn model(fields: &mut Fields, router: &Router) -> Result<(String, Option<Arc<Adapter>>), Error> {
    let config = &router.config;
    let Some(name) = fields.string("model")?.filter(|name| !name.is_empty()) else {
        return Ok((config.model_name.clone(), None));
    };
    if config.names().any(|known| *known == name) {
        return Ok((name, None));
    }
    match router.fleet.adapter(&name) {
        Some(adapter) => Ok((name, Some(adapter))),
        None => Err(Error::UnknownModel(name)),
    }
}

/// Where the request says nothing the model's own recommendation holds, then the neutral value. vLLM does the same.
fn sampling(fields: &mut Fields, router: &Router, logprobs: Option<u32>) -> Result<Sampling, Error> {
    let defaults = &router.model.defaults;
    // A recommendation not to sample at all is one for temperature 0.
    let default_temperature = defaults.temperature.unwrap_or(if defaults.do_sample == Some(false) { 0.0 } else { 1.0 });
    let temperature = fields
        .number("temperature", "a number from 0 to 2", |t| (0.0..=2.0).contains(&t))?
        .unwrap_or(default_temperature);
    let penalty =
        |fields: &mut Fields, name| fields.number(name, "a number from -2 to 2", |p| (-2.0..=2.0).contains(&p));
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.or(defaults.top_k).unwrap_or(0);
    Ok(Sampling {
        // Temperatures just above 0 make numbers that overflow; vLLM draws the same line.
        temperature: if temperature < 1e-5 { 0.0 } else { temperature.max(0.01) },
        top_p: fields
            .number("top_p", "a number greater than 0 and at most 1", |p| p > 0.0 && p <= 1.0)?
            .or(defaults.top_p)
            .unwrap_or(1.0),
        top_k: u32::try_from(top_k).unwrap_or(0),
        min_p: fields
            .number("min_p", "a number from 0 to 1", |p| (0.0..=1.0).contains(&p))?
            .or(defaults.min_p)
            .unwrap_or(0.0),
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map_or_else(rand::random, |seed| seed as u64),
        repetition_penalty: fields
            .number("repetition_penalty", "a number greater than 0 and at most 100", |p| p > 0.0 && p <= 100.0)?
            .or(defaults.repetition_penalty)
            .unwrap_or(1.0),
        frequency_penalty: penalty(fields, "frequency_penalty")?.unwrap_or(0.0),
        presence_penalty: penalty(fields, "presence_penalty")?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, router.model.vocab_size)?,
        allowed_tokens: allowed_tokens(fields, router.model.vocab_size)?,
        bad_words: bad_words(fields, router)?,
        logprobs,
    })
}

/// Biases are cut to [-100, 100], where a token is certain or impossible anyway.
fn logit_bias(fields: &mut Fields, vocab_size: u32) -> Result<Vec<(TokenId, f32)>, Error> {
    let entries = fields.object("logit_bias")?.unwrap_or_default();
    let bias = entries.iter().map(|(id, bias)| {
        let token = id.parse().ok().filter(|&token| token < vocab_size).ok_or_else(|| {
            Error::invalid(
                "logit_bias",
                format_args!("{id:?} is not a token id of this model (0 to {})", vocab_size - 1),
            )
        })?;
        let number = bias.as_f64().ok_or_else(|| {
            Error::invalid("logit_bias", format_args!("the bias of token {id} must be a number, got {}", shown(bias)))
        })?;
        Ok((token, number.clamp(-100.0, 100.0) as f32))
    });
    bias.collect()
}

fn max_tokens(fields: &mut Fields, least: i64) -> Result<Option<u32>, Error> {
    let range = least..=i64::from(u32::MAX);
    let newer = fields.integer("max_completion_tokens", range.clone())?;
    let older = fields.integer("max_tokens", range)?;
    Ok(newer.or(older).map(|n| n as u32))
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, Error> {
    let expected = format!("a string or a list of at most {MAX_STOP_STRINGS} strings, none of them empty");
    let Some(value) = fields.take("stop") else { return Ok(Vec::new()) };
    let list = match &value {
        Value::Array(list) => list.iter().map(|s| s.as_str().map(str::to_string)).collect(),
        one => one.as_str().map(|s| vec![s.to_string()]),
    };
    list.filter(|list: &Vec<String>| list.len() <= MAX_STOP_STRINGS && list.iter().all(|s| !s.is_empty()))
        .ok_or_else(|| wrong("stop", &expected, &value))
}

fn stop_token_ids(fields: &mut Fields, router: &Router) -> Result<Vec<TokenId>, Error> {
    Ok(token_ids(fields, "stop_token_ids", router.model.vocab_size)?.unwrap_or_default())
}

/// An empty list would leave nothing to say.
fn allowed_tokens(fields: &mut Fields, vocab_size: u32) -> Result<Vec<TokenId>, Error> {
    let ids = token_ids(fields, "allowed_token_ids", vocab_size)?;
    if ids.as_ref().is_some_and(Vec::is_empty) {
        return Err(Error::invalid("allowed_token_ids", "must not be empty; leave it out instead"));
    }
    Ok(ids.unwrap_or_default())
}

pub(super) fn token_ids(fields: &mut Fields, name: &str, vocab_size: u32) -> Result<Option<Vec<TokenId>>, Error> {
    let id = |value: &Value| {
        integer(value)
            .and_then(|id| u32::try_from(id).ok())
            .filter(|&id| id < vocab_size)
            .ok_or_else(|| wrong(name, &format!("a list of token ids of this model (0 to {})", vocab_size - 1), value))
    };
    fields.list(name)?.map(|ids| ids.iter().map(id).collect()).transpose()
}

/// Returns the tokens of words that must not be said, at the beginning of a text and after a space: the second only where it is as
/// long and begins otherwise, as vLLM has it.
fn bad_words(fields: &mut Fields, router: &Router) -> Result<Vec<Vec<TokenId>>, Error> {
    let name = "bad_words";
    let list = fields.list(name)?.unwrap_or_default();
    if list.len() > MAX_BAD_WORDS {
        return Err(Error::invalid(name, format_args!("{} words are more than {MAX_BAD_WORDS}", list.len())));
    }
    let encode = |text: &str| {
        let tokens = router.model.tokenizer.encode(text, false).map_err(|problem| Error::invalid(name, problem))?;
        match tokens.iter().find(|token| **token >= router.model.vocab_size) {
            Some(token) => {
                Err(Error::invalid(name, format_args!("{text:?} has token {token}, which this model never gives")))
            }
            None => Ok(tokens),
        }
    };
    let mut words = Vec::new();
    for value in &list {
        let word = value.as_str().map(str::trim_start).filter(|word| !word.is_empty());
        let word = word.ok_or_else(|| wrong(name, "a list of strings, none of them empty", value))?;
        let (bare, spaced) = (encode(word)?, encode(&format!(" {word}"))?);
        let other = spaced.len() == bare.len() && spaced.first() != bare.first();
        words
            .extend([Some(bare), Some(spaced).filter(|_| other)].into_iter().flatten().filter(|word| !word.is_empty()));
    }
    Ok(words)
}

/// Priorities beyond those of the wire are the first and the last.
pub(super) fn priority(fields: &mut Fields) -> Result<i32, Error> {
    let priority = fields.integer("priority", i64::MIN..=i64::MAX)?.unwrap_or(0);
    Ok(priority.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32)
}

pub(super) fn truncation(fields: &mut Fields, max_tokens: Option<u32>) -> Result<Option<Truncation>, Error> {
    let keep = fields.integer("truncate_prompt_tokens", -1..=i64::from(u32::MAX))?;
    let first = match fields.string("truncation_side")?.as_deref() {
        None | Some("left") => false,
        Some("right") => true,
        Some(other) => return Err(wrong("truncation_side", "\"left\" or \"right\"", &other.into())),
    };
    let answer = max_tokens.unwrap_or(1).max(1);
    Ok(keep.map(|keep| Truncation { keep: u32::try_from(keep).ok(), first, answer }))
}

pub(super) fn request_id(fields: &mut Fields) -> Result<Option<String>, Error> {
    let id = fields.string("request_id")?;
    match id.as_deref().filter(|id| !is_request_id(id)) {
        None => Ok(id),
        Some(bad) => Err(wrong("request_id", &format!("1 to {MAX_REQUEST_ID} visible ASCII characters"), &bad.into())),
    }
}

/// Whether a client's name for a request can stand in a header and a log line.
pub(crate) fn is_request_id(id: &str) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Requests of different salts never share cached prefixes.
pub(super) fn salt(fields: &mut Fields) -> Result<Bytes, Error> {
    let Some(salt) = fields.string("cache_salt")? else { return Ok(Bytes::new()) };
    if salt.is_empty() || salt.chars().count() > MAX_SALT_CHARS || salt.contains(['@', '/', '\\', '\0']) {
        let expected = format!("1 to {MAX_SALT_CHARS} characters without @, /, \\ and NUL");
        return Err(wrong("cache_salt", &expected, &Value::from(salt)));
    }
    Ok(Bytes::from(salt))
}

/// Returns `stream`, `include_usage` and `continuous_usage_stats`.
fn stream(fields: &mut Fields) -> Result<(bool, bool, bool), Error> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let Some(options) = fields.object("stream_options")? else { return Ok((stream, false, false)) };
    if !stream {
        return Err(Error::invalid("stream_options", "only allowed when stream is true"));
    }
    let option = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(yes)) => Ok(*yes),
        Some(other) => Err(wrong(&format!("stream_options.{name}"), "true or false", other)),
    };
    let include_usage = option("include_usage")?;
    Ok((stream, include_usage, option("continuous_usage_stats")? && include_usage))
}
