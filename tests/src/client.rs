//! A small HTTP client: JSON in, JSON or server-sent events out, every wait bounded, every answer held against the
//! [`contract`](crate::contract).

use crate::contract;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{client::legacy, client::legacy::connect::HttpConnector, rt::TokioExecutor};
use serde_json::Value;
use std::time::Duration;

/// Longest any single wait of a test client may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Talks to one base URL.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    http: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Response headers.
    pub headers: hyper::HeaderMap,
    /// Body as text.
    pub text: String,
}

impl Answer {
    /// Parses the body as JSON.
    ///
    /// # Panics
    /// When it is not JSON, showing it.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("status {}: {e} in {:?}", self.status, self.text))
    }
}

impl Client {
    /// Makes a client for `base`, for example `http://127.0.0.1:8000`.
    pub fn new(base: impl Into<String>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { base: base.into(), http: legacy::Client::builder(TokioExecutor::new()).build(connector) }
    }

    /// Sends a request and returns the response head with its body still to be read.
    pub async fn send(&self, method: &str, path: &str, body: Bytes) -> anyhow::Result<hyper::Response<Incoming>> {
        let request = hyper::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        Ok(tokio::time::timeout(PATIENCE, self.http.request(request)).await??)
    }

    /// Sends `body` as it is and reads the whole answer.
    pub async fn post_text(&self, path: &str, body: impl Into<Bytes>) -> anyhow::Result<Answer> {
        whole("POST", path, self.send("POST", path, body.into()).await?).await
    }

    /// Posts JSON and reads the whole answer.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.post_text(path, body.to_string()).await
    }

    /// Gets a page.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.request("GET", path).await
    }

    /// Sends a request without a body.
    pub async fn request(&self, method: &str, path: &str) -> anyhow::Result<Answer> {
        whole(method, path, self.send(method, path, Bytes::new()).await?).await
    }

    /// Posts JSON and returns the events of the stream as they come.
    pub async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        let response = self.send("POST", path, body.to_string().into()).await?;
        if response.status() != 200 {
            let answer = whole("POST", path, response).await?;
            anyhow::bail!("status {}: {}", answer.status, answer.text);
        }
        Ok(Events { path: path.to_string(), body: response.into_body(), buffer: Vec::new() })
    }

    /// Sums the samples of a metric whose name and labels contain all of `labels`.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
        Ok(sum_metric(&self.get("/metrics").await?.text, name, labels))
    }
}

/// Sums the samples of `name` in Prometheus text whose labels contain all of `labels`.
pub fn sum_metric(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

async fn whole(method: &str, path: &str, response: hyper::Response<Incoming>) -> anyhow::Result<Answer> {
    let (parts, body) = response.into_parts();
    let bytes = tokio::time::timeout(PATIENCE, body.collect()).await??.to_bytes();
    let (status, text) = (parts.status.as_u16(), String::from_utf8_lossy(&bytes).into_owned());
    let content_type = parts.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    contract::check(method, path, status, content_type, &text);
    Ok(Answer { status, headers: parts.headers, text })
}

/// Server-sent events of one response. Dropping it closes the connection, as a client that goes away does.
#[derive(Debug)]
pub struct Events {
    path: String,
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// Returns the data of the next event, or `None` at the end of the body.
    pub async fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = String::from_utf8(event)?;
                if let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) {
                    contract::check_event(&self.path, data);
                    return Ok(Some(data.to_string()));
                }
                continue;
            }
            match tokio::time::timeout(PATIENCE, self.body.frame()).await? {
                Some(frame) => self.buffer.extend_from_slice(&frame?.into_data().unwrap_or_default()),
                None => return Ok(None),
            }
        }
    }

    /// Reads to the end. Returns the parsed chunks and whether `[DONE]` closed the stream.
    pub async fn collect(mut self) -> anyhow::Result<(Vec<Value>, bool)> {
        let mut chunks = Vec::new();
        let mut done = false;
        while let Some(data) = self.next().await? {
            match data.as_str() {
                "[DONE]" => done = true,
                json => chunks.push(serde_json::from_str(json)?),
            }
        }
        Ok((chunks, done))
    }
}

/// Joins the text of chat chunks.
pub fn chat_text(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}
