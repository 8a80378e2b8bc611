//! A router on a free port, and a client that reads what it says byte by byte.

use crate::mock::MODEL;
use bytes::Bytes;
use cluster::MemoryDirectory;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, Request, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use router::{Config, Policy};
use serde_json::Value;
use std::{borrow::Borrow, future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use telemetry::Health;
use tokenizers::Tokenizer;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Waits for something that must happen soon.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

pub(crate) struct TestRouter {
    pub(crate) address: SocketAddr,
    pub(crate) directory: Arc<MemoryDirectory>,
    pub(crate) health: Health,
    pub(crate) shutdown: CancellationToken,
    pub(crate) running: JoinHandle<anyhow::Result<()>>,
}

impl Drop for TestRouter {
    fn drop(&mut self) {
        self.running.abort();
    }
}

impl TestRouter {
    pub(crate) async fn start(policy: Policy) -> Self {
        Self::start_with(policy, |_| {}).await
    }

    pub(crate) async fn start_with(policy: Policy, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(Arc::default(), policy, change).await
    }

    /// Starts another one in the same directory.
    pub(crate) async fn start_beside(other: &Self, name: &str, policy: Policy) -> Self {
        Self::start_in(other.directory.clone(), policy, |config| config.name = Some(name.into())).await
    }

    async fn start_in(directory: Arc<MemoryDirectory>, policy: Policy, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            name: Some("router".into()),
            model_dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo"),
            model_name: MODEL.into(),
            placement: policy,
            ..Config::default()
        };
        change(&mut config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::new("starting", Duration::from_secs(60));
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(router::run(config, listener, directory.clone(), health.clone(), shutdown.clone()));
        Self { address, directory, health, shutdown, running }
    }

    /// Waits until a request could be taken.
    pub(crate) async fn ready(&self) {
        self.readiness(true).await;
    }

    pub(crate) async fn readiness(&self, ready: bool) {
        let reached = async {
            while self.health.readiness().is_ok() != ready {
                tokio::task::yield_now().await;
            }
        };
        within(if ready { "readiness" } else { "unreadiness" }, reached).await;
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, None, &[]).await.whole().await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Borrow<Value>) -> Answer {
        self.open(path, body).await.whole().await
    }

    /// Sends a request and returns once the head of the answer is there.
    pub(crate) async fn open(&self, path: &str, body: impl Borrow<Value>) -> Open {
        self.send(Method::POST, path, Some(body.borrow().to_string()), &[]).await
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
        headers: &[(&str, &str)],
    ) -> Open {
        let (sender, request) = self.request(method, path, body, headers).await;
        self.finish(sender, request).await
    }

    /// Connects and makes a request without sending it.
    pub(crate) async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
        headers: &[(&str, &str)],
    ) -> (Connection, Request<Full<Bytes>>) {
        let socket = within("a connection", TcpStream::connect(self.address)).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut request = Request::builder().method(method).uri(path).header("host", "test");
        if body.is_some() && !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).unwrap();
        (Connection { sender, driver }, request)
    }

    pub(crate) async fn finish(&self, mut connection: Connection, request: Request<Full<Bytes>>) -> Open {
        let response = within("an answer", connection.sender.send_request(request)).await.unwrap();
        let (parts, body) = response.into_parts();
        Open {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
            buffer: Vec::new(),
            _connection: connection,
        }
    }
}

/// A connection; dropping it closes the socket.
pub(crate) struct Connection {
    pub(crate) sender: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// An answer whose body is still to come. Dropping it closes the connection.
pub(crate) struct Open {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    buffer: Vec<u8>,
    _connection: Connection,
}

impl Open {
    pub(crate) async fn whole(self) -> Answer {
        let body = within("the rest of an answer", self.body.collect()).await.unwrap().to_bytes();
        Answer { status: self.status, headers: self.headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    /// Reads the next event's data.
    pub(crate) async fn event(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = String::from_utf8(event).expect("whole characters only");
                // Some APIs name their events.
                let data = text.lines().find_map(|line| line.strip_prefix("data: "));
                return Some(data.expect("an event has data").to_string());
            }
            let frame = within("an event", self.body.frame()).await?;
            self.buffer.extend_from_slice(&frame.expect("a valid body").into_data().unwrap());
        }
    }

    /// Reads the next event as JSON.
    pub(crate) async fn chunk(&mut self) -> Value {
        let event = self.event().await.expect("another event");
        serde_json::from_str(&event).unwrap_or_else(|e| panic!("{event}: {e}"))
    }

    /// Reads all events up to the end of the body; the last must be `[DONE]`.
    pub(crate) async fn chunks(mut self) -> Vec<Value> {
        let mut chunks = Vec::new();
        loop {
            let event = self.event().await.expect("[DONE] ends the stream");
            if event == "[DONE]" {
                assert!(self.event().await.is_none(), "nothing follows [DONE]");
                return chunks;
            }
            chunks.push(serde_json::from_str(&event).unwrap());
        }
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{}: {e}", self.body))
    }

    /// The error's message, after a look at its shape.
    pub(crate) fn error(&self) -> String {
        let error = &self.json()["error"];
        assert_eq!(error["code"], self.status, "{}", self.body);
        assert!(error["type"].is_string() && error.get("param").is_some(), "{}", self.body);
        error["message"].as_str().unwrap().to_string()
    }
}

/// Token ids of a text of the demo model.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/tokenizer.json");
    Tokenizer::from_file(path).unwrap().encode(text, false).unwrap().get_ids().to_vec()
}

/// The demo model's end of a turn.
pub(crate) const EOS: u32 = 2;

/// `text` as an output: its tokens, then the end of the turn.
pub(crate) fn output(text: &str) -> Vec<u32> {
    [tokens(text), vec![EOS]].concat()
}

/// The text of all of a choice's chunks.
pub(crate) fn streamed(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index);
    choices.filter_map(|c| c["delta"]["content"].as_str().or(c["text"].as_str())).collect()
}
