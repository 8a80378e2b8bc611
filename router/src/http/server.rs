//! What the server says of itself: whether it is well, how busy it is, what it runs, how its API is described.

use super::{
    Service,
    route::{Route, get, post},
};
use crate::{config::Limits, error::Error, openai::error};
use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use placement::Policy;
use serde::{Deserialize, Serialize};

/// The API as OpenAPI 3.1 describes it. A test compares it with the routes and with real answers.
const OPENAPI: &str = include_str!("../../openapi.json");

/// A page that shows it.
const DOCS: &str = include_str!("docs.html");

pub(super) fn routes() -> Vec<Route> {
    vec![
        get("/ping", ping),
        post("/ping", ping),
        get("/load", load),
        post("/reset_prefix_cache", reset_prefix_cache),
        get("/server_info", server_info),
        get("/openapi.json", openapi),
        get("/docs", docs),
    ]
}

/// `/health` under the name SageMaker asks for.
async fn ping(service: State<Service>) -> StatusCode {
    super::health(service).await
}

#[derive(Serialize)]
struct Load {
    /// Requests being answered or waiting for their turn.
    server_load: usize,
}

async fn load(State(service): State<Service>) -> Json<Load> {
    Json(Load { server_load: service.router.metrics.in_flight() })
}

/// What vLLM takes for `/reset_prefix_cache`.
#[derive(Deserialize)]
struct ResetQuery {
    #[serde(default)]
    reset_running_requests: bool,
    #[serde(default)]
    reset_external: bool,
}

#[derive(Serialize)]
struct Reset {
    /// Whether all workers forgot everything; one that is at work forgets nothing.
    success: bool,
}

async fn reset_prefix_cache(
    State(service): State<Service>,
    query: Result<Query<ResetQuery>, QueryRejection>,
) -> Response {
    let router = &service.router;
    if !router.config.cache_reset {
        let message =
            "prefix caches cannot be reset here; the router was started without `cache_reset = true` under [router]";
        return error::not_served(StatusCode::NOT_FOUND, message);
    }
    let done = async {
        let Query(asked) = query.map_err(|rejection| Error::Invalid { message: rejection.body_text(), param: None })?;
        for (name, asked) in
            [("reset_running_requests", asked.reset_running_requests), ("reset_external", asked.reset_external)]
        {
            if asked {
                return Err(Error::invalid(name, "is not supported; only false is"));
            }
        }
        tracing::info!("prefix caches are reset");
        router.fleet.forget_prefixes(router.config.limits.adapter_timeout()).await
    };
    match done.await {
        Ok(success) => Json(Reset { success }).into_response(),
        Err(error) => error::response(&error),
    }
}

#[derive(Serialize)]
struct ServerInfo<'a> {
    version: &'static str,
    /// All names of the model, the first one first.
    models: Vec<&'a String>,
    max_model_len: u32,
    vocab_size: u32,
    system_fingerprint: &'a str,
    workers: Workers,
    placement: Policy,
    limits: &'a Limits,
}

#[derive(Serialize)]
struct Workers {
    prefill: usize,
    decode: usize,
}

/// What clients may know of the settings: no paths, no addresses.
async fn server_info(State(service): State<Service>) -> Response {
    let router = &service.router;
    let (prefill, decode) = router.fleet.attached();
    let info = ServerInfo {
        version: env!("CARGO_PKG_VERSION"),
        models: router.config.names().collect(),
        max_model_len: router.context_tokens(),
        vocab_size: router.model.vocab_size,
        system_fingerprint: &router.model.fingerprint,
        workers: Workers { prefill, decode },
        placement: router.config.placement,
        limits: &router.config.limits,
    };
    Json(info).into_response()
}

async fn openapi() -> Response {
    page(OPENAPI, "application/json")
}

async fn docs() -> Response {
    page(DOCS, "text/html; charset=utf-8")
}

fn page(text: &'static str, kind: &'static str) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], text).into_response()
}
