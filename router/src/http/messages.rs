//! `/v1/messages` and `/v1/messages/count_tokens`.

use super::{
    Service, head, name, origin, read,
    route::{Route, post},
};
use crate::{
    error::Error,
    messages::{self, answer::MessagesShape, request},
    metrics::{Endpoint, RequestGuard},
    openai::{self, error, json, tokens::chat_tokens, write_json},
    request::{Origin, Router},
};
use axum::{
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::HeaderMap,
    response::Response,
};
use std::sync::Arc;

pub(super) fn routes() -> Vec<Route> {
    vec![post("/v1/messages", create), post("/v1/messages/count_tokens", count_tokens)]
}

async fn create(State(service): State<Service>, headers: HeaderMap, body: Result<Bytes, BytesRejection>) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Messages);
    let guard = router.metrics.request(Endpoint::Messages);
    let mut response = match answer(&router, &origin, &headers, body, guard).await {
        Ok(response) => response,
        Err((error, mut guard)) => {
            guard.ended(error::outcome(&error));
            tracing::debug!(request = %origin.request, %error, "request refused");
            messages::refusal(&error, &origin.request)
        }
    };
    name(&origin, &mut response);
    response
}

async fn answer(
    router: &Arc<Router>,
    origin: &Origin,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    guard: RequestGuard,
) -> Result<Response, (Error, RequestGuard)> {
    let request = match read(router, headers, body, request::parse).await {
        Ok(request) => request,
        Err(error) => return Err((error, guard)),
    };
    let params = request.params.clone();
    let shape = MessagesShape::new(head(router, origin, "msg", &params.model));
    let accepted = openai::accept(router.clone(), origin.clone(), params, guard, request.into_prompt()).await?;
    accepted.answer(shape).await
}

async fn count_tokens(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Messages);
    let counted = async {
        let request = read(&router, &headers, body, request::parse_count).await?;
        let _place = router.admission.enter(0)?;
        let working = router.clone();
        router.text.run(move || chat_tokens(request, false, &working)).await
    };
    let mut response = match counted.await {
        Ok(tokens) => {
            let mut body = Vec::new();
            write_json(&serde_json::json!({"input_tokens": tokens.len()}), &mut body);
            json(body)
        }
        Err(error) => messages::refusal(&error, &origin.request),
    };
    name(&origin, &mut response);
    response
}
