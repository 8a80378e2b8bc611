//! `/tokenize` and `/detokenize`.

use super::{
    Service, read,
    route::{Route, post},
};
use crate::{
    error::Error,
    openai::{
        error,
        fields::Fields,
        tokens::{DetokenizeRequest, TokenizeRequest},
    },
    request::Router,
};
use axum::{
    Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::sync::Arc;

pub(super) fn routes() -> Vec<Route> {
    vec![post("/tokenize", tokenize), post("/detokenize", detokenize)]
}

async fn tokenize(State(service): State<Service>, headers: HeaderMap, body: Result<Bytes, BytesRejection>) -> Response {
    answer(&service.router, &headers, body, TokenizeRequest::parse, TokenizeRequest::tokenize).await
}

async fn detokenize(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let detokenize = |request: DetokenizeRequest, router: &Router| Ok(request.detokenize(router));
    answer(&service.router, &headers, body, DetokenizeRequest::parse, detokenize).await
}

/// Reads a request, takes a place as one that generates would, and does it on the text threads.
pub(super) async fn answer<Request: Send + 'static, Answer: Serialize + Send + 'static>(
    router: &Arc<Router>,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    parse: fn(Fields, &Router) -> Result<Request, Error>,
    work: fn(Request, &Router) -> Result<Answer, Error>,
) -> Response {
    let answered = async {
        let request = read(router, headers, body, parse).await?;
        let _place = router.admission.enter(0)?;
        let working = router.clone();
        router.text.run(move || work(request, &working)).await
    };
    answered.await.map_or_else(|error| error::response(&error), |answer| Json(answer).into_response())
}
