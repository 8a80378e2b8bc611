//! The few requests that a conversation needs, over hyper.

use crate::sse::Events;
use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, Uri, body::Incoming, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::time::Duration;
use tokio::{net::TcpStream, time::timeout};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for the next piece of an answer: a long prompt on a small machine takes its time.
const PIECE: Duration = Duration::from_secs(300);

/// Talks to one endpoint.
#[derive(Debug)]
pub(super) struct Client {
    /// `host:port`
    authority: String,
    /// What stands before `/v1`.
    prefix: String,
}

/// A part of an answer.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    Text(String),
    Usage { completion_tokens: u64 },
}

/// An answer that is still coming. Dropping it cancels the request.
#[derive(Debug)]
pub(super) struct Answer {
    body: Incoming,
    events: Events,
}

impl Client {
    /// Reads the endpoint's URL, with or without `/v1`.
    pub(super) fn new(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("--url {url:?}"))?;
        if uri.scheme_str() != Some("http") {
            bail!("--url {url:?}: only http:// is spoken here; put a TLS proxy's plain side in its place");
        }
        let host = uri.host().with_context(|| format!("--url {url:?}: no host"))?;
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        let path = uri.path().trim_end_matches('/');
        Ok(Self { authority, prefix: path.strip_suffix("/v1").unwrap_or(path).to_owned() })
    }

    /// Asks for the models and returns the first.
    pub(super) async fn first_model(&self) -> anyhow::Result<String> {
        let response = self.send(Method::GET, "/v1/models", Bytes::new()).await?;
        let body = timeout(PIECE, response.into_body().collect()).await.context("read the models")??.to_bytes();
        let models: Value = serde_json::from_slice(&body).context("read the models")?;
        let first = models["data"][0]["id"].as_str();
        first.map(str::to_owned).with_context(|| format!("{} serves no model", self.authority))
    }

    /// Sends a streaming chat request.
    pub(super) async fn ask(&self, request: &Value) -> anyhow::Result<Answer> {
        let response = self.send(Method::POST, "/v1/chat/completions", request.to_string().into()).await?;
        Ok(Answer { body: response.into_body(), events: Events::default() })
    }

    /// Sends one request on its own connection and returns the response if it is a success.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let unreachable =
            || format!("connect to {}; is `baton` running there? --url names another endpoint", self.authority);
        let stream = timeout(CONNECT, TcpStream::connect(&self.authority)).await;
        let stream = stream.with_context(unreachable)?.with_context(unreachable)?;
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("start HTTP")?;
        // Ends with the connection, whose other half is `sender` and the response.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .context("write the request")?;
        let response = timeout(PIECE, sender.send_request(request)).await.context("wait for the answer")??;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = timeout(PIECE, response.into_body().collect()).await.context("read the error")??.to_bytes();
        bail!("{}", complaint(&body).unwrap_or_else(|| status.to_string()))
    }
}

impl Answer {
    /// Returns the next piece, `None` at the end. Cancel safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Piece>> {
        loop {
            while let Some(data) = self.events.pop() {
                if data == "[DONE]" {
                    return Ok(None);
                }
                if let Some(message) = complaint(data.as_bytes()) {
                    bail!("{message}");
                }
                if let Some(piece) = Piece::read(&data)? {
                    return Ok(Some(piece));
                }
            }
            match timeout(PIECE, self.body.frame()).await.context("wait for the next token")? {
                Some(frame) => {
                    if let Ok(data) = frame.context("read the answer")?.into_data() {
                        self.events.push(&data);
                    }
                }
                None => bail!("the connection ended in the middle of the answer"),
            }
        }
    }
}

impl Piece {
    /// Reads the data of one event; `None` for what a conversation does not show.
    fn read(data: &str) -> anyhow::Result<Option<Self>> {
        let chunk: Value = serde_json::from_str(data).with_context(|| format!("read event {data:?}"))?;
        if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
            return Ok(Some(Self::Usage { completion_tokens: tokens }));
        }
        let text = chunk["choices"][0]["delta"]["content"].as_str();
        Ok(text.filter(|text| !text.is_empty()).map(|text| Self::Text(text.to_owned())))
    }
}

/// Returns the message of an OpenAI-shaped error.
fn complaint(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    body["error"]["message"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_with_and_without_the_version() {
        for (url, authority, prefix) in [
            ("http://127.0.0.1:8000", "127.0.0.1:8000", ""),
            ("http://host/v1", "host:80", ""),
            ("http://host:1/base/v1/", "host:1", "/base"),
            ("http://[::1]:9", "[::1]:9", ""),
        ] {
            let client = Client::new(url).expect("a good URL");
            assert_eq!((client.authority.as_str(), client.prefix.as_str()), (authority, prefix), "{url}");
        }
        let problem = Client::new("https://host").expect_err("no TLS here").to_string();
        assert!(problem.contains("--url") && problem.contains("http://"), "{problem}");
    }

    #[test]
    fn events_become_pieces() {
        let text = r#"{"choices":[{"delta":{"content":"Hi"}}]}"#;
        assert_eq!(Piece::read(text).expect("an event"), Some(Piece::Text("Hi".into())));
        let role = r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
        assert_eq!(Piece::read(role).expect("an event"), None);
        let usage = r#"{"choices":[],"usage":{"completion_tokens":7}}"#;
        assert_eq!(Piece::read(usage).expect("an event"), Some(Piece::Usage { completion_tokens: 7 }));
        assert!(Piece::read("nonsense").is_err());
        assert_eq!(complaint(br#"{"error":{"message":"no"}}"#), Some("no".into()));
        assert_eq!(complaint(text.as_bytes()), None);
    }
}
