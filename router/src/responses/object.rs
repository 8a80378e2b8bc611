//! The response object: what was asked, repeated, and what came of it.

use crate::{
    error::Error,
    openai::{Usage, error, params::Params},
};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a response repeats of its request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Echo {
    pub(crate) instructions: Option<String>,
    pub(crate) max_output_tokens: Option<i64>,
    pub(crate) previous_response_id: Option<String>,
    pub(crate) reasoning: Option<Value>,
    pub(crate) text: Value,
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: Value,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) metadata: Value,
    pub(crate) truncation: &'static str,
    pub(crate) background: bool,
    pub(crate) store: bool,
    pub(crate) user: Option<String>,
    pub(crate) prompt_cache_key: Option<String>,
    pub(crate) safety_identifier: Option<String>,
    pub(super) temperature: f64,
    pub(super) top_p: f64,
}

impl Echo {
    /// Takes over what the request or the model's defaults came to.
    pub(crate) fn settle(&mut self, params: &Params) {
        // As the client wrote it, not as the nearest f32 reads.
        let plain = |value: f32| (f64::from(value) * 1e6).round() / 1e6;
        (self.temperature, self.top_p) = (plain(params.sampling.temperature), plain(params.sampling.top_p));
    }
}

/// Where a response stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Status {
    InProgress,
    Completed,
    /// It came to `max_output_tokens`, or to the context's end.
    Incomplete,
    Failed(Error),
}

impl Status {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Incomplete => "incomplete",
            Status::Failed(_) => "failed",
        }
    }
}

/// Which response it is.
#[derive(Clone, Debug)]
pub(crate) struct Title {
    pub(crate) id: String,
    /// Seconds since the Unix epoch.
    pub(crate) created_at: u64,
    pub(crate) model: String,
}

impl Title {
    /// Draws an id.
    pub(crate) fn new(model: &str) -> Self {
        Self { id: new_id("resp"), created_at: now(), model: model.to_string() }
    }
}

/// Returns an id of OpenAI's form.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}_{:032x}", rand::random::<u128>())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Returns the object.
pub(crate) fn object(title: &Title, echo: &Echo, status: &Status, output: Vec<Value>, usage: Option<Usage>) -> Value {
    let error = match status {
        Status::Failed(failure) => {
            let code = if error::status(failure).0.as_u16() == 429 { "rate_limit_exceeded" } else { "server_error" };
            Some(json!({"code": code, "message": failure.to_string()}))
        }
        _ => None,
    };
    let incomplete = (*status == Status::Incomplete).then(|| json!({"reason": "max_output_tokens"}));
    let reasoning = echo.reasoning.clone().unwrap_or_else(|| json!({"effort": null, "summary": null}));
    json!({
        "id": title.id,
        "object": "response",
        "created_at": title.created_at,
        "completed_at": (*status == Status::Completed).then(now),
        "status": status.name(),
        "background": echo.background,
        "error": error,
        "incomplete_details": incomplete,
        "instructions": echo.instructions,
        "max_output_tokens": echo.max_output_tokens,
        "max_tool_calls": null,
        "model": title.model,
        "output": output,
        "parallel_tool_calls": echo.parallel_tool_calls,
        "previous_response_id": echo.previous_response_id,
        "prompt_cache_key": echo.prompt_cache_key,
        "reasoning": reasoning,
        "safety_identifier": echo.safety_identifier,
        "service_tier": "default",
        "store": echo.store,
        "temperature": echo.temperature,
        "text": echo.text,
        "tool_choice": echo.tool_choice,
        "tools": echo.tools,
        "top_logprobs": 0,
        "top_p": echo.top_p,
        "truncation": echo.truncation,
        "usage": usage.map(tokens),
        "user": echo.user,
        "metadata": echo.metadata,
    })
}

fn tokens(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens()},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens()},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
