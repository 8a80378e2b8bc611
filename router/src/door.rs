//! The door: what every request passes before anything is done for it.
//!
//! In this order: it gets its id; it shows a key ([`keys`]), unless it only asks how the router is; it is turned away when the house is full;
//! its body is read, up to a size and for so long. Only then does a handler see it. The id and the key's owner are found again with
//! [`visit`], for logs and to charge what an answer took.

pub(crate) mod keys;

use crate::{
    error::Error,
    metrics,
    openai::{self, params::is_request_id},
    request::Router,
};
use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use keys::Key;
use std::sync::Arc;
use tokio::time::timeout;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Paths that anybody may ask: probes, and what describes the router.
const OPEN_PATHS: [&str; 8] =
    ["/health", "/livez", "/readyz", "/ping", "/metrics", "/version", "/openapi.json", "/docs"];

/// What the door saw of the request that is being handled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Visit {
    /// The key that it showed; `None` where none is asked for.
    pub(crate) key: Option<Arc<Key>>,
    /// Whether the client gave it its id.
    pub(crate) named: bool,
}

tokio::task_local! {
    static VISIT: Visit;
}

/// Returns it.
pub(crate) fn visit() -> Visit {
    VISIT.try_with(Clone::clone).unwrap_or_default()
}

/// Lets a request in, or answers it.
pub(crate) async fn enter(State(router): State<Arc<Router>>, mut request: Request, next: Next) -> Response {
    let (id, named) = request_id(request.headers());
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = match admit(&router, request).await {
        Ok((request, key)) => VISIT.scope(Visit { key, named }, next.run(request)).await,
        Err(refusal) => {
            metrics::turned_away(refusal.status().as_u16());
            *refusal
        }
    };
    response.headers_mut().entry(REQUEST_ID).or_insert(id);
    response
}

async fn admit(router: &Router, request: Request) -> Result<(Request, Option<Arc<Key>>), Box<Response>> {
    let refuse = |error: &Error| Box::new(openai::error::response(error));
    let open = OPEN_PATHS.contains(&request.uri().path());
    let key = match &router.keys {
        Some(keys) if !open => {
            let shown = shown_key(request.headers()).and_then(|shown| keys.find(shown));
            let key = shown.ok_or_else(|| Box::new(unauthorized()))?;
            key.admit(tokio::time::Instant::now()).map_err(|error| refuse(&error))?;
            Some(key)
        }
        _ => None,
    };
    if request.method() != Method::POST {
        return Ok((request, key));
    }
    router.check_open().map_err(|error| refuse(&error))?;
    let request = read(router, request).await.map_err(|error| refuse(&error))?;
    Ok((request, key))
}

/// Returns the client's own request id if it can stand in a header and a log line, or a new one; and whether it is the client's.
fn request_id(headers: &HeaderMap) -> (HeaderValue, bool) {
    match headers.get(REQUEST_ID).filter(|id| id.to_str().is_ok_and(is_request_id)) {
        Some(id) => (id.clone(), true),
        None => {
            let id = format!("{:032x}", rand::random::<u128>());
            (HeaderValue::try_from(id).expect("hexadecimal digits"), false)
        }
    }
}

/// Returns the key in `Authorization: Bearer` or, as Anthropic's clients send it, in `x-api-key`.
fn shown_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
    });
    bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes))
}

/// As vLLM says it, which is not the shape of other errors.
fn unauthorized() -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, headers, r#"{"error":"Unauthorized"}"#).into_response()
}

/// Takes in the body, within limits.
async fn read(router: &Router, request: Request) -> Result<Request, Error> {
    let limits = &router.config.limits;
    let too_large = Error::TooLarge { limit: limits.max_body_bytes };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limits.max_body_bytes as u64) {
        return Err(too_large);
    }
    let (head, body) = request.into_parts();
    match timeout(limits.body_timeout(), Limited::new(body, limits.max_body_bytes).collect()).await {
        Ok(Ok(body)) => Ok(Request::from_parts(head, Body::from(body.to_bytes()))),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large),
        Ok(Err(error)) => Err(Error::Invalid { message: format!("the body cannot be read: {error}"), param: None }),
        Err(_) => Err(Error::SlowBody(limits.body_timeout())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn ids_that_could_break_a_log_are_replaced() {
        assert_eq!(request_id(&headers("x-request-id", "mine-1")), (HeaderValue::from_static("mine-1"), true));
        for bad in ["", "a b", "a\tb"] {
            let (id, given) = request_id(&headers("x-request-id", bad));
            assert_eq!((id.len(), given), (32, false), "{bad:?}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }

    #[test]
    fn keys_are_read_where_clients_put_them() {
        let check = |name, value, expected: Option<&str>| {
            assert_eq!(shown_key(&headers(name, value)), expected.map(str::as_bytes), "{name}: {value}");
        };
        check("authorization", "Bearer abc", Some("abc"));
        check("authorization", "bearer  abc ", Some("abc"));
        check("authorization", "Basic abc", None);
        check("authorization", "Bearer", None);
        check("x-api-key", "abc", Some("abc"));
        check("other", "abc", None);
    }
}
