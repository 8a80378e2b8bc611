//! `/v1/messages`: Anthropic's API, served by the pipeline of chat completions.
//!
//! A request is rewritten as the chat request that means the same ([`request`]) and goes its way from there; what is generated
//! becomes content blocks ([`answer`]).

pub(crate) mod answer;
pub(crate) mod request;

use crate::{
    error::Error,
    openai::{error, write_json},
};
use axum::{http::StatusCode, response::Response};
use serde::Serialize;

#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: Body<'a>,
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: &'a str,
}

/// Answers with an error as Anthropic writes it.
pub(crate) fn refusal(error: &Error, request: &str) -> Response {
    let mut body = Vec::new();
    write_error(error, Some(request), &mut body);
    error::response_with(error, body)
}

/// Writes an error object, as a body or as an event of a stream.
fn write_error(error: &Error, request_id: Option<&str>, out: &mut Vec<u8>) {
    let kind = kind(error::status(error).0);
    write_json(&Envelope { kind: "error", error: Body { kind, message: &error.to_string() }, request_id }, out);
}

fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}
