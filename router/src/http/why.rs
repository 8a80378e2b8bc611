//! `/v1/requests/{id}/why`, and the headers by which a request says when it wants its first token and asks how it went.

use super::{
    Service, named,
    route::{Route, get},
};
use crate::{error::Error, openai::error};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue},
    response::{IntoResponse, Response},
};
use std::time::Duration;

/// Longest time to a first token that may be asked for: a day, which no request lives.
const MAX_TTFT_MS: u64 = 24 * 60 * 60 * 1_000;

pub(super) fn routes() -> Vec<Route> {
    vec![get("/v1/requests/{id}/why", why)]
}

async fn why(State(service): State<Service>, id: Result<Path<String>, PathRejection>) -> Response {
    match named(id).and_then(|id| service.router.why.report(&id)) {
        Ok(report) => Json(report).into_response(),
        Err(error) => error::response(&error),
    }
}

/// Reads `x-baton-ttft-ms`: within what time of its arrival a request wants its first token.
pub(super) fn wanted_ttft(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("x-baton-ttft-ms") else { return Ok(None) };
    let ms = value.to_str().ok().and_then(|text| text.trim().parse().ok()).filter(|ms| (1..=MAX_TTFT_MS).contains(ms));
    let wrong = || {
        let got = String::from_utf8_lossy(value.as_bytes()).chars().take(100).collect::<String>();
        Error::invalid(
            "x-baton-ttft-ms",
            format_args!("must be whole milliseconds from 1 to {MAX_TTFT_MS}, got {got:?}"),
        )
    };
    ms.map(|ms| Some(Duration::from_millis(ms))).ok_or_else(wrong)
}

/// Whether the answer is to say how the request went.
pub(super) fn is_asked(headers: &HeaderMap) -> bool {
    headers.get("x-baton-why").map(HeaderValue::as_bytes) == Some(b"1")
}
