//! One request and its stream: when each piece came, or what went wrong.

use super::endpoint::Endpoint;
use crate::sse::Events;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use serde::Deserialize;
use std::{borrow::Cow, time::Duration};
use tokio::time::{Instant, timeout};

/// Longest wait for the text of a refusal whose status is known already.
const COMPLAINT: Duration = Duration::from_secs(5);

/// An answer that came to its end.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    /// When each piece came; at least one.
    pub(super) pieces: Vec<Instant>,
    /// Tokens of the prompt as the endpoint counts them, if it does.
    pub(super) input_tokens: Option<usize>,
    /// Tokens of the answer; where the endpoint does not count, its pieces.
    pub(super) output_tokens: usize,
    /// When it was said that no more would come.
    finished: Option<Instant>,
}

/// Why a request was not served to its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    /// No connection, or it broke before the answer.
    #[error("no answer: {0}")]
    Unreachable(String),
    /// The endpoint refused it.
    #[error("status {status}: {message}")]
    Status { status: u16, message: String },
    /// An event says that something went wrong.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// The stream ended before its end was said, or holds what is no event.
    #[error("broken stream: {0}")]
    Broken(String),
    /// It said its end without a token.
    #[error("the answer is empty")]
    Empty,
    /// It took longer than it may.
    #[error("no end within {:.1} s", .0.as_secs_f64())]
    Timeout(Duration),
}

impl Failure {
    /// Names the kind, for counting.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Unreachable(_) => "unreachable".into(),
            Self::Status { status, .. } => format!("status {status}"),
            Self::InStream(_) => "error in the stream".into(),
            Self::Broken(_) => "broken stream".into(),
            Self::Empty => "empty answer".into(),
            Self::Timeout(_) => "timeout".into(),
        }
    }
}

/// The fields of a chunk that matter here, of both endpoints.
#[derive(Debug, Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    finish_reason: Option<&'a str>,
}

#[derive(Debug, Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow, alias = "reasoning_content")]
    reasoning: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Choice<'_> {
    /// Says whether this brings a token. A completion's chunk does, also where its text waits for the rest of a character, unless it
    /// only says why the answer ended; a chat's does where there is text, as its first says nothing but the role.
    fn brings_a_token(&self) -> bool {
        let some = |text: &Option<Cow<'_, str>>| text.as_ref().is_some_and(|text| !text.is_empty());
        match &self.delta {
            Some(delta) => some(&delta.content) || some(&delta.reasoning),
            None => some(&self.text) || (self.text.is_some() && self.finish_reason.is_none()),
        }
    }
}

/// Posts `body` and reads the stream to its end within the endpoint's timeout. `on_piece` is called for each piece.
pub(super) async fn exchange(
    endpoint: &Endpoint,
    path: &str,
    body: Bytes,
    on_piece: impl Fn(),
) -> Result<Answer, Failure> {
    let limit = endpoint.timeout;
    timeout(limit, unbounded(endpoint, path, body, on_piece)).await.unwrap_or(Err(Failure::Timeout(limit)))
}

async fn unbounded(endpoint: &Endpoint, path: &str, body: Bytes, on_piece: impl Fn()) -> Result<Answer, Failure> {
    let response = endpoint.send(Method::POST, path, body).await;
    let response = response.map_err(|problem| Failure::Unreachable(causes(&problem)))?;
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let text = timeout(COMPLAINT, body.collect()).await.ok().and_then(Result::ok);
        let message = text.map_or_else(String::new, |text| complaint(&text.to_bytes()));
        return Err(Failure::Status { status: status.as_u16(), message });
    }
    let mut events = Events::default();
    let mut answer = Answer { pieces: Vec::new(), input_tokens: None, output_tokens: 0, finished: None };
    loop {
        let Some(frame) = body.frame().await else {
            return Err(Failure::Broken(format!("it ended after {} pieces without [DONE]", answer.pieces.len())));
        };
        let frame = frame.map_err(|problem| Failure::Broken(causes(&problem)))?;
        let now = Instant::now();
        let Ok(data) = frame.into_data() else { continue };
        events.push(&data);
        while let Some(data) = events.pop() {
            if data == "[DONE]" {
                return answer.ended();
            }
            if answer.take(&data, now)? {
                on_piece();
            }
        }
    }
}

impl Answer {
    /// Takes an event. Says whether it brought a token.
    fn take(&mut self, data: &str, now: Instant) -> Result<bool, Failure> {
        let chunk: Chunk<'_> = serde_json::from_str(data)
            .map_err(|problem| Failure::Broken(format!("{problem} in {}", shortened(data))))?;
        if let Some(error) = chunk.error {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            return Err(Failure::InStream(shortened(&message)));
        }
        if let Some(usage) = chunk.usage {
            (self.input_tokens, self.output_tokens) = (Some(usage.prompt_tokens), usage.completion_tokens);
        }
        if chunk.choices.iter().any(|choice| choice.finish_reason.is_some()) {
            self.finished = Some(now);
        }
        let brings = chunk.choices.iter().any(Choice::brings_a_token);
        if brings {
            self.pieces.push(now);
        }
        Ok(brings)
    }

    fn ended(mut self) -> Result<Self, Failure> {
        // Tokens that are no text, half a character perhaps, came with the end.
        if self.pieces.is_empty() && self.output_tokens > 0 {
            self.pieces.extend(self.finished);
        }
        if self.pieces.is_empty() {
            return Err(Failure::Empty);
        }
        self.output_tokens = self.output_tokens.max(if self.input_tokens.is_some() { 0 } else { self.pieces.len() });
        Ok(self)
    }
}

/// Returns the message of an OpenAI-shaped error, or the text itself.
pub(super) fn complaint(body: &[u8]) -> String {
    let message = serde_json::from_slice::<serde_json::Value>(body).ok();
    let message = message.and_then(|body| body["error"]["message"].as_str().map(str::to_owned));
    shortened(&message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned()))
}

fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

/// Joins an error and what caused it.
fn causes(problem: &dyn std::error::Error) -> String {
    let mut text = problem.to_string();
    let mut cause = problem.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks which of `events` bring tokens.
    fn check(events: &[(&str, bool)]) -> Answer {
        let mut answer = Answer { pieces: Vec::new(), input_tokens: None, output_tokens: 0, finished: None };
        for (event, brings) in events {
            assert_eq!(answer.take(event, Instant::now()), Ok(*brings), "{event}");
        }
        answer.ended().expect("an answer")
    }

    #[test]
    fn events_that_bring_tokens_are_pieces() {
        let completion = check(&[
            (r#"{"choices":[{"text":"\u00e9","finish_reason":null}]}"#, true),
            (r#"{"choices":[{"text":"","finish_reason":null}]}"#, true),
            (r#"{"choices":[{"text":"","finish_reason":"length"}]}"#, false),
            (r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}"#, false),
        ]);
        assert_eq!((completion.pieces.len(), completion.input_tokens, completion.output_tokens), (2, Some(5), 3));
        let no_text = check(&[
            (r#"{"choices":[{"text":"","finish_reason":"length"}]}"#, false),
            (r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1}}"#, false),
        ]);
        assert_eq!((no_text.pieces.len(), no_text.output_tokens), (1, 1));
        let chat = check(&[
            (r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#, false),
            (r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#, true),
            (r#"{"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}],"usage":null}"#, true),
        ]);
        assert_eq!((chat.pieces.len(), chat.input_tokens, chat.output_tokens), (2, None, 2));
    }

    #[test]
    fn what_is_no_answer_is_named() {
        let mut answer = Answer { pieces: Vec::new(), input_tokens: None, output_tokens: 0, finished: None };
        let error = answer.take(r#"{"error":{"message":"worker died"}}"#, Instant::now()).expect_err("an error");
        assert_eq!(error, Failure::InStream("worker died".into()));
        let broken = answer.take("{", Instant::now()).expect_err("no event");
        assert!(broken.kind() == "broken stream" && broken.to_string().contains('{'), "{broken}");
        assert_eq!(answer.ended().expect_err("no token"), Failure::Empty);
        assert_eq!(complaint(br#"{"error":{"message":"no"}}"#), "no");
        assert_eq!(complaint(b"Bad Gateway"), "Bad Gateway");
    }
}
