//! One route as a value: axum does not list its own, and the description of the API is held against all of them.

use super::Service;
use axum::{
    handler::Handler,
    http::Method,
    routing::{self, MethodRouter},
};

/// A handler, and where it is.
pub(super) struct Route {
    #[cfg_attr(not(test), expect(dead_code, reason = "the handler knows its own; the test of the description asks"))]
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) handler: MethodRouter<Service>,
}

pub(super) fn get<T: 'static>(path: &'static str, handler: impl Handler<T, Service>) -> Route {
    Route { method: Method::GET, path, handler: routing::get(handler) }
}

pub(super) fn post<T: 'static>(path: &'static str, handler: impl Handler<T, Service>) -> Route {
    Route { method: Method::POST, path, handler: routing::post(handler) }
}

pub(super) fn delete<T: 'static>(path: &'static str, handler: impl Handler<T, Service>) -> Route {
    Route { method: Method::DELETE, path, handler: routing::delete(handler) }
}
