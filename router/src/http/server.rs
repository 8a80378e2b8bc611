//! What the server says of itself: whether it is well, how busy it is, what it runs, how its API is described.

use super::{
    Service,
    route::{Route, get, post},
};
use crate::config::Limits;
use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use placement::Policy;
use serde::Serialize;

/// The API as OpenAPI 3.1 describes it. A test compares it with the routes and with real answers.
const OPENAPI: &str = include_str!("../../openapi.json");

/// A page that shows it.
const DOCS: &str = include_str!("docs.html");

pub(super) fn routes() -> Vec<Route> {
    vec![
        get("/ping", ping),
        post("/ping", ping),
        get("/load", load),
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
