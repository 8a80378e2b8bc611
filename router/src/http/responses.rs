//! `/v1/responses`, and what can be done with a stored one.

use super::{
    Service, finish, name, named, origin, read, refuse,
    route::{Route, delete, get, post},
};
use crate::{
    error::Error,
    metrics::{Endpoint, Outcome},
    openai::{self, Accepted, error, json},
    request::Router,
    responses::{answer::ResponsesShape, object::Title, request::ResponsesRequest},
};
use axum::{
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, PathRejection},
    },
    http::HeaderMap,
    response::Response,
};
use std::sync::Arc;

pub(super) fn routes() -> Vec<Route> {
    vec![
        post("/v1/responses", create),
        get("/v1/responses/{id}", retrieve),
        delete("/v1/responses/{id}", forget),
        post("/v1/responses/{id}/cancel", cancel),
    ]
}

async fn create(State(service): State<Service>, headers: HeaderMap, body: Result<Bytes, BytesRejection>) -> Response {
    let router = service.router;
    let origin = origin(&router, &headers, Endpoint::Responses);
    let mut guard = router.metrics.request(Endpoint::Responses);
    let request = match read(&router, &headers, body, ResponsesRequest::parse).await {
        Ok(request) => request,
        Err(error) => return refuse(&origin, &error, &mut guard),
    };
    let ResponsesRequest { chat, echo, conversation, background } = request;
    let params = chat.params.clone();
    let title = Title::new(&params.model);
    let shape = ResponsesShape::new(router.clone(), title.clone(), echo, conversation);
    let accepted = openai::accept(router.clone(), origin.clone(), params, guard, chat.into_prompt()).await;
    match accepted {
        Ok(accepted) if background => {
            let mut response = json(start(&router, &title.id, accepted, shape));
            name(&origin, &mut response);
            response
        }
        Ok(accepted) => finish(&origin, accepted.answer(shape).await),
        Err(refused) => finish(&origin, Err(refused)),
    }
}

/// Lets a response run on its own and returns what it is now.
fn start(router: &Arc<Router>, id: &str, accepted: Accepted, shape: ResponsesShape) -> Vec<u8> {
    let object = shape.object();
    let unwanted = router.responses.begin(id, &object);
    router.responses.spawn(async move {
        tokio::select! {
            () = unwanted.cancelled() => {}
            () = run(accepted, shape) => {}
        }
    });
    object.to_string().into_bytes()
}

async fn run(accepted: Accepted, mut shape: ResponsesShape) {
    let (mut guard, collected) = accepted.collect(&mut shape).await;
    guard.ended(match &collected {
        Ok(_) => Outcome::Ok,
        Err(error) => error::outcome(error),
    });
    if let Err(error) = collected {
        shape.fail(&error);
    }
}

async fn retrieve(State(service): State<Service>, id: Result<Path<String>, PathRejection>) -> Response {
    object(named(id).and_then(|id| service.router.responses.get(&id)))
}

async fn forget(State(service): State<Service>, id: Result<Path<String>, PathRejection>) -> Response {
    let deleted = named(id).and_then(|id| {
        service.router.responses.delete(&id)?;
        Ok(serde_json::json!({"id": id, "object": "response", "deleted": true}).to_string().into())
    });
    object(deleted)
}

async fn cancel(State(service): State<Service>, id: Result<Path<String>, PathRejection>) -> Response {
    object(named(id).and_then(|id| service.router.responses.cancel(&id)))
}

fn object(found: Result<Bytes, Error>) -> Response {
    found.map_or_else(|error| error::response(&error), |object| json(object.into()))
}
