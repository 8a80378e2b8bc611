//! The HTTP surface: routes, bodies, request ids.

mod messages;
mod responses;
mod route;
mod server;
mod text;
mod why;

use crate::{
    door,
    error::Error,
    fleet::adapters::Change,
    metrics::{Endpoint, Outcome},
    openai::{
        self, Head, adapters,
        chat::{ChatRequest, ChatShape},
        completions::{CompletionRequest, CompletionShape},
        embeddings::EmbeddingRequest,
        error,
        fields::Fields,
        models,
    },
    request::{Origin, Router},
};
use axum::{
    Json,
    body::Bytes,
    extract::{
        DefaultBodyLimit, Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
};
use route::{Route, get, post};
use serde::Serialize;
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use telemetry::Health;
use tokio::time::Instant;
use tower::ServiceBuilder;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};

/// Bodies up to this size are parsed where they arrive: a hundred microseconds at most, about what handing them over costs.
const SMALL_BODY_BYTES: usize = 64 << 10;

/// What handlers share.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) router: Arc<Router>,
    pub(crate) health: Health,
}

/// Every route.
fn table() -> Vec<Route> {
    let mut table = vec![
        post("/v1/chat/completions", chat),
        post("/v1/completions", completions),
        post("/v1/embeddings", embeddings),
        post("/v1/load_lora_adapter", load_adapter),
        post("/v1/unload_lora_adapter", unload_adapter),
        get("/v1/models", list_models),
        get("/v1/models/{*name}", find_model),
        get("/health", health),
        get("/livez", live),
        get("/readyz", ready),
        get("/metrics", metrics),
        get("/version", version),
    ];
    table.extend(messages::routes());
    table.extend(responses::routes());
    table.extend(server::routes());
    table.extend(text::routes());
    table.extend(why::routes());
    table
}

/// Returns the service that clients meet.
pub(crate) fn routes(service: Service) -> axum::Router {
    let router = service.router.clone();
    let routes = table()
        .into_iter()
        .fold(axum::Router::new(), |routes, Route { path, handler, .. }| routes.route(path, handler));
    routes
        .fallback(|uri: Uri| async move {
            error::not_served(StatusCode::NOT_FOUND, &format!("there is nothing at {}", uri.path()))
        })
        .method_not_allowed_fallback(|| async {
            error::not_served(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
        })
        // Outermost first. A mistake of ours costs the request that met it, not its connection's other ones.
        .layer(
            ServiceBuilder::new()
                .layer(CatchPanicLayer::custom(|_| {
                    error::response(&Error::Failed("the router failed; this is a bug".into()))
                }))
                .layer(cors(&router.config.cors_origins))
                .layer(middleware::from_fn_with_state(router, door::enter))
                // The door has counted.
                .layer(DefaultBodyLimit::disable()),
        )
        .with_state(service)
}

/// Lets pages of these origins ask from browsers; `*` is any.
fn cors(origins: &[String]) -> CorsLayer {
    let allowed = match origins {
        [any] if any == "*" => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let headers = AllowHeaders::mirror_request();
    let exposed = ["x-request-id", "retry-after", "x-baton-why"].map(HeaderName::from_static);
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(headers)
        .expose_headers(exposed)
}

async fn chat(State(service): State<Service>, headers: HeaderMap, body: Result<Bytes, BytesRejection>) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Chat);
    let mut guard = router.metrics.request(Endpoint::Chat);
    let request = match read(&router, &headers, body, ChatRequest::parse).await {
        Ok(request) => request,
        Err(error) => return refuse(&origin, &error, &mut guard),
    };
    let params = request.params.clone();
    let origin = renamed(origin, params.request_id.as_deref());
    let head = head(&router, &origin, "chatcmpl", &params.model);
    let accepted = openai::accept(router.clone(), origin.clone(), params, guard, request.into_prompt()).await;
    let answered = match accepted {
        Ok(accepted) => {
            let shape = ChatShape::new(router, &head, &accepted.params, &accepted.prompts[0]);
            accepted.answer(shape).await
        }
        Err(refused) => Err(refused),
    };
    finish(&origin, answered)
}

async fn completions(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Completions);
    let mut guard = router.metrics.request(Endpoint::Completions);
    let CompletionRequest { params, prompts } = match read(&router, &headers, body, CompletionRequest::parse).await {
        Ok(request) => request,
        Err(error) => return refuse(&origin, &error, &mut guard),
    };
    let origin = renamed(origin, params.request_id.as_deref());
    let head = head(&router, &origin, "cmpl", &params.model);
    let accepted = openai::accept(router.clone(), origin.clone(), params, guard, move |_| Ok(prompts)).await;
    let answered = match accepted {
        Ok(mut accepted) => {
            let mut shape = CompletionShape::new(router, &head, &accepted.params, accepted.prompts.clone());
            if accepted.params.prompt_only() && accepted.params.reported_prompt().is_none() {
                accepted.guard.ended(Outcome::Ok);
                Ok(shape.prompts_only(&accepted.params))
            } else {
                accepted.answer(shape).await
            }
        }
        Err(refused) => Err(refused),
    };
    finish(&origin, answered)
}

async fn embeddings(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Embeddings);
    let mut guard = router.metrics.request(Endpoint::Embeddings);
    let request = match read(&router, &headers, body, EmbeddingRequest::parse).await {
        Ok(request) => request,
        Err(error) => return refuse(&origin, &error, &mut guard),
    };
    let origin = renamed(origin, request.request_id.as_deref());
    let head = head(&router, &origin, "embd", &request.model);
    let answered = match request.answer(router, origin.clone(), head).await {
        Ok(body) => {
            guard.ended(Outcome::Ok);
            Ok(openai::json(body))
        }
        Err(error) => Err((error, guard)),
    };
    finish(&origin, answered)
}

/// Reads a body: a small one here, a large one on the text threads.
async fn read<T: Send + 'static>(
    router: &Arc<Router>,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    parse: fn(Fields, &Router) -> Result<T, Error>,
) -> Result<T, Error> {
    check_content_type(headers)?;
    why::wanted_ttft(headers)?;
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::TooLarge { limit: router.config.limits.max_body_bytes },
        _ => Error::Invalid { message: format!("the body cannot be read: {}", rejection.body_text()), param: None },
    })?;
    if body.len() <= SMALL_BODY_BYTES {
        return parse(Fields::parse(&body)?, router);
    }
    let (text, router) = (&router.text, router.clone());
    text.run(move || parse(Fields::parse(&body)?, &router)).await
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("unsupported media type {essence:?}: only 'application/json' is allowed");
    Err(Error::Invalid { message, param: Some("content-type".into()) })
}

/// Who asks.
fn origin(router: &Router, headers: &HeaderMap, endpoint: Endpoint) -> Origin {
    // The door has put one there.
    let request: Arc<str> = headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default().into();
    let span = tracing::info_span!(
        "request",
        id = %request,
        endpoint = ?endpoint,
        prompt_tokens = tracing::field::Empty,
        output_tokens = tracing::field::Empty
    );
    let parent = headers.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or_default();
    telemetry::set_parent(&span, parent);
    // Without export of our own, workers still continue the client's trace.
    let passed_on = || parent.parse::<telemetry::TraceParent>().map(|parent| parent.to_string()).unwrap_or_default();
    let traceparent = telemetry::traceparent(&span).unwrap_or_else(passed_on).into();
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let key = door::visit().key;
    if let Some(key) = &key {
        tracing::debug!(parent: &span, request = %request, key = key.name(), "key shown");
    }
    // What is wrong with it is said when the body is read.
    let objective = why::wanted_ttft(headers).ok().flatten().or_else(|| router.config.limits.ttft_objective());
    let why = why::is_asked(headers).then(|| router.why.clone());
    let body_bytes = length.unwrap_or(usize::MAX);
    Origin { request, traceparent, arrived: Instant::now(), body_bytes, key, objective, why, span }
}

/// A body may name a request that has no name in its headers.
fn renamed(origin: Origin, id: Option<&str>) -> Origin {
    match id.filter(|_| !door::visit().named) {
        Some(id) => {
            origin.span.record("id", id);
            Origin { request: id.into(), ..origin }
        }
        None => origin,
    }
}

fn head(router: &Router, origin: &Origin, prefix: &str, model: &str) -> Head {
    Head {
        id: format!("{prefix}-{}", origin.request),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        model: model.to_string(),
        fingerprint: router.model.fingerprint.clone(),
    }
}

type Answered = Result<Response, (Error, crate::metrics::RequestGuard)>;

fn finish(origin: &Origin, answered: Answered) -> Response {
    match answered {
        Ok(mut response) => {
            name(origin, &mut response);
            response
        }
        Err((error, mut guard)) => refuse(origin, &error, &mut guard),
    }
}

fn refuse(origin: &Origin, error: &Error, guard: &mut crate::metrics::RequestGuard) -> Response {
    guard.ended(error::outcome(error));
    tracing::debug!(request = %origin.request, %error, "request refused");
    let mut response = error::response(error);
    name(origin, &mut response);
    response
}

/// Puts the request id on a response, and how the request went if that was asked for.
fn name(origin: &Origin, response: &mut Response) {
    if let Ok(id) = HeaderValue::from_str(&origin.request) {
        response.headers_mut().insert("x-request-id", id);
    }
    let line = origin.why.as_ref().and_then(|why| why.line(&origin.request));
    if let Some(line) = line.and_then(|line| HeaderValue::try_from(line).ok()) {
        response.headers_mut().insert("x-baton-why", line);
    }
}

async fn load_adapter(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    change_adapters(&service.router, &headers, body, adapters::load).await
}

async fn unload_adapter(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    change_adapters(&service.router, &headers, body, adapters::unload).await
}

async fn change_adapters(
    router: &Arc<Router>,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    parse: fn(Fields, &Router) -> Result<Change, Error>,
) -> Response {
    if !router.config.runtime_lora {
        let message = "adapters cannot be changed here; the router was started without --runtime-lora";
        return error::not_served(StatusCode::NOT_FOUND, message);
    }
    let changed = async {
        let change = read(router, headers, body, parse).await?;
        tracing::info!(?change, "adapters change");
        router.fleet.change_adapters(change.clone(), router.config.limits.adapter_timeout()).await?;
        Ok(adapters::done(&change))
    };
    changed.await.map_or_else(|error| error::response(&error), IntoResponse::into_response)
}

async fn list_models(State(service): State<Service>) -> Json<models::ModelList> {
    Json(models::list(&service.router))
}

async fn find_model(State(service): State<Service>, name: Result<Path<String>, PathRejection>) -> Response {
    match named(name).and_then(|name| models::find(&service.router, &name)) {
        Ok(model) => Json(model).into_response(),
        Err(error) => error::response(&error),
    }
}

/// Reads the name in a path.
fn named(path: Result<Path<String>, PathRejection>) -> Result<String, Error> {
    let unreadable = |rejection: PathRejection| Error::Invalid {
        message: format!("the path cannot be read: {}", rejection.body_text()),
        param: None,
    };
    path.map(|Path(name)| name).map_err(unreadable)
}

/// Whether a request could be answered now, in vLLM's words: 200 or 503, no body.
async fn health(State(service): State<Service>) -> StatusCode {
    match service.health.liveness().and(service.health.readiness()) {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn live(State(service): State<Service>) -> (StatusCode, String) {
    probe(service.health.liveness(), "alive")
}

async fn ready(State(service): State<Service>) -> (StatusCode, String) {
    probe(service.health.readiness(), "ready")
}

fn probe(state: Result<(), String>, good: &str) -> (StatusCode, String) {
    match state {
        Ok(()) => (StatusCode::OK, format!("{good}\n")),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn metrics(State(service): State<Service>) -> Response {
    let router = &service.router;
    let text_bytes = router.model.tokenizer.remembered_bytes() + router.page_names.bytes();
    router.metrics.caches(router.fleet.prefix_index_bytes(), text_bytes);
    let text = telemetry::render_metrics() + &router.metrics.adapters_in_use(router.fleet.adapters().len());
    let mut response = text.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn openapi_describes_every_route_and_nothing_else() {
        let api: serde_json::Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        let described =
            api["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
                item.as_object().unwrap().keys().map(move |method| format!("{method} {path}"))
            });
        let served = super::table().into_iter().map(|route| {
            let method = route.method.as_str().to_ascii_lowercase();
            format!("{method} {}", route.path.replace("{*name}", "{model}"))
        });
        assert_eq!(described.collect::<BTreeSet<_>>(), served.collect::<BTreeSet<_>>());
    }
}
