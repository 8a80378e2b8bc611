//! Errors as OpenAI writes them, and the one place that chooses status codes.

use super::{json, write_json};
use crate::{error::Error, metrics::Outcome};
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use serde::Serialize;
use std::time::Duration;

#[derive(Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_ttft_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wanted_ttft_ms: Option<u64>,
}

impl<'a> Body<'a> {
    fn new(message: &'a str, kind: &'a str, param: Option<&'a str>, status: StatusCode) -> Self {
        Self { message, kind, param, code: status.as_u16(), predicted_ttft_ms: None, wanted_ttft_ms: None }
    }
}

/// Writes an error object, as a body or as an event of a stream.
pub(crate) fn write(error: &Error, out: &mut Vec<u8>) {
    let (status, kind) = status(error);
    let param = match error {
        Error::Invalid { param, .. } => param.as_deref(),
        Error::UnknownModel(_) => Some("model"),
        _ => None,
    };
    let message = error.to_string();
    let mut body = Body::new(&message, kind, param, status);
    if let Error::TooSlow { predicted, wanted } = error {
        let ms = |time: &Duration| u64::try_from(time.as_millis()).ok();
        (body.predicted_ttft_ms, body.wanted_ttft_ms) = (ms(predicted), ms(wanted));
    }
    write_json(&Envelope { error: body }, out);
}

/// Answers with an error.
pub(crate) fn response(error: &Error) -> Response {
    let mut body = Vec::new();
    write(error, &mut body);
    response_with(error, body)
}

/// Answers with an error that another API's words describe.
pub(crate) fn response_with(error: &Error, body: Vec<u8>) -> Response {
    let mut response = json(body);
    *response.status_mut() = status(error).0;
    let retry_after = match error {
        Error::Overloaded { .. } => Some(Duration::ZERO),
        Error::Unavailable { retry_after, .. } | Error::RateLimited { retry_after, .. } => Some(*retry_after),
        // By then what is in its way will be done, unless more comes.
        Error::TooSlow { predicted, wanted } => Some(predicted.saturating_sub(*wanted)),
        _ => None,
    };
    if let Some(wait) = retry_after {
        let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Answers a path or method that is not served.
pub(crate) fn not_served(status: StatusCode, message: &str) -> Response {
    let kind = if status == StatusCode::METHOD_NOT_ALLOWED { "MethodNotAllowedError" } else { "NotFoundError" };
    let mut body = Vec::new();
    write_json(&Envelope { error: Body::new(message, kind, None, status) }, &mut body);
    let mut response = json(body);
    *response.status_mut() = status;
    response
}

/// How metrics count the error.
pub(crate) fn outcome(error: &Error) -> Outcome {
    match error {
        Error::Invalid { .. } | Error::UnknownModel(_) | Error::NotFound(_) | Error::TooLarge { .. } => {
            Outcome::Invalid
        }
        Error::Overloaded { .. } | Error::TooSlow { .. } | Error::RateLimited { .. } | Error::Unavailable { .. } => {
            Outcome::Rejected
        }
        Error::SlowClient(_) | Error::SlowBody(_) => Outcome::Cancelled,
        Error::Timeout(_) | Error::Failed(_) => Outcome::Failed,
    }
}

/// Returns the status code of an error, and OpenAI's name for it.
pub(crate) fn status(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::Invalid { .. } => (StatusCode::BAD_REQUEST, "BadRequestError"),
        Error::UnknownModel(_) | Error::NotFound(_) => (StatusCode::NOT_FOUND, "NotFoundError"),
        Error::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLargeError"),
        Error::Overloaded { .. } | Error::TooSlow { .. } | Error::RateLimited { .. } => {
            (StatusCode::TOO_MANY_REQUESTS, "RateLimitError")
        }
        Error::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
        Error::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "TimeoutError"),
        Error::SlowClient(_) | Error::SlowBody(_) => (StatusCode::REQUEST_TIMEOUT, "SlowClientError"),
        Error::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError"),
    }
}
