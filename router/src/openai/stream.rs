//! Server-sent events: one event a step, an error as an event, `[DONE]` at the end of all.

use super::{Accepted, Choices, Shape, Stepped, error};
use crate::{
    admission::Turn,
    error::Error,
    metrics::{Outcome, RequestGuard},
};
use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::stream;
use std::convert::Infallible;

pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// Writes one event around what `data` writes, which must not hold a line break; JSON does not.
pub(crate) fn event(out: &mut Vec<u8>, data: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(b"data: ");
    data(out);
    out.extend_from_slice(b"\n\n");
}

/// Writes one event with a name, as APIs other than OpenAI's older ones have them.
pub(crate) fn named_event(out: &mut Vec<u8>, name: &str, data: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    event(out, data);
}

/// An answer being streamed. Dropping it (the client is gone) drops its generations, which calls their legs off.
struct Streaming<S> {
    choices: Choices,
    shape: S,
    include_usage: bool,
    continuous_usage: bool,
    state: State,
    guard: RequestGuard,
    _turn: Turn,
}

enum State {
    /// The first step is in `choices` and not yet written.
    First,
    Open,
    Over,
}

/// Waits for the first step, so that whatever goes wrong before it is an ordinary HTTP error, and streams from there.
pub(crate) async fn answer<S: Shape>(
    accepted: Accepted,
    mut choices: Choices,
    shape: S,
) -> Result<Response, (Error, RequestGuard)> {
    if let Some(Err(error)) = choices.next().await.map(|stepped| stepped.result.clone()) {
        return Err((error, accepted.guard));
    }
    // Boxed, because it moves with every event.
    let streaming = Box::new(Streaming {
        choices,
        shape,
        include_usage: accepted.params.include_usage,
        continuous_usage: accepted.params.continuous_usage,
        state: State::First,
        guard: accepted.guard,
        _turn: accepted.turn,
    });
    let events = stream::unfold(streaming, |mut streaming| async move {
        let events = streaming.next().await?;
        Some((Ok::<_, Infallible>(events), streaming))
    });
    Ok(event_stream(Body::from_stream(events)))
}

/// A stream whose events are all known.
pub(crate) fn complete(mut events: Vec<u8>) -> Response {
    events.extend_from_slice(DONE);
    event_stream(Body::from(events))
}

fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells reverse proxies not to gather what should be seen at once.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<S: Shape> Streaming<S> {
    /// Waits for the next events; `None` after the last.
    async fn next(&mut self) -> Option<Bytes> {
        let mut out = Vec::with_capacity(512);
        while out.is_empty() {
            let stepped = match self.state {
                State::Over => return None,
                State::First => self.choices.current.as_deref(),
                State::Open => self.choices.next().await,
            };
            self.state = State::Open;
            match stepped {
                Some(Stepped { result: Err(error), .. }) => {
                    self.guard.ended(error::outcome(error));
                    self.shape.failed(error, &mut out);
                    self.state = State::Over;
                }
                Some(stepped) => {
                    let usage = self.continuous_usage.then(|| stepped.usage());
                    self.shape.chunk(stepped.index, stepped.first, &stepped.step, usage, &mut out);
                }
                None => {
                    self.guard.ended(Outcome::Ok);
                    if self.include_usage {
                        self.shape.usage_chunk(self.choices.usage(), &mut out);
                    }
                    self.shape.close(&mut out);
                    self.state = State::Over;
                }
            }
        }
        Some(out.into())
    }
}
