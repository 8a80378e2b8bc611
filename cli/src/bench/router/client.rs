//! A client that costs little: prepared bytes out, bytes counted coming in.

use super::prompts::{Length, Prompts};
use crate::bench::stats::Samples;
use anyhow::{Context, bail, ensure};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

/// Longest wait for any bytes.
const SILENCE: Duration = Duration::from_secs(20);
/// Streams opened side by side: fewer than a listener keeps waiting.
const OPENED_AT_ONCE: usize = 100;
/// What an event begins with.
const DATA: &[u8] = b"data: {";

/// What to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Each sends one request after another.
    pub(super) connections: usize,
    /// In all.
    pub(super) requests: usize,
    /// What is asked.
    pub(super) prompt: Length,
    /// `max_tokens` of each.
    pub(super) tokens: u32,
    pub(super) stream: bool,
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) took: Duration,
    /// Per request, until its last byte.
    pub(super) latency_us: Samples,
    /// Between two events of a stream.
    pub(super) gap_us: Samples,
    /// Events of streams.
    pub(super) chunks: usize,
}

/// Talks to one server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    server: SocketAddr,
}

impl Client {
    pub(super) fn new(server: SocketAddr) -> Self {
        Self { server }
    }

    /// Puts `load` on the server and waits for all of it. Each connection draws its prompts from a seed of its own, the first one
    /// from `seed`.
    pub(super) async fn run_from(&self, load: &Load, seed: u64) -> anyhow::Result<Done> {
        let left = Arc::new(AtomicUsize::new(load.requests));
        let mut tasks = JoinSet::new();
        let began = Instant::now();
        for seed in (seed..).take(load.connections) {
            let mut connection = Connection::open(self.server).await?;
            let (mut prompts, left, load) = (Prompts::new(load.prompt, seed), left.clone(), *load);
            tasks.spawn(async move {
                let mut done = Done::default();
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let request = request(&load, prompts.next());
                    connection.exchange(&request, load.stream, &mut done).await?;
                }
                anyhow::Ok(done)
            });
        }
        let mut all = Done::default();
        while let Some(done) = tasks.join_next().await {
            let done = done.context("a connection panicked")??;
            all.latency_us.extend(done.latency_us);
            all.gap_us.extend(done.gap_us);
            all.chunks += done.chunks;
        }
        all.took = began.elapsed();
        Ok(all)
    }

    /// Opens this many streams and waits until each has shown its first token. They stay open until what is returned is dropped.
    pub(super) async fn open_streams(&self, count: usize) -> anyhow::Result<Vec<TcpStream>> {
        let load = Load { connections: 1, requests: 1, prompt: Length::Short, tokens: 1_000, stream: true };
        let mut streams = Vec::with_capacity(count);
        while streams.len() < count {
            let mut opening = JoinSet::new();
            for _ in 0..OPENED_AT_ONCE.min(count - streams.len()) {
                let (server, request) = (self.server, request(&load, Prompts::new(load.prompt, 0).next()));
                opening.spawn(async move {
                    let mut connection = Connection::open(server).await?;
                    connection.socket.write_all(&request).await.context("send a request")?;
                    while count_of(&connection.buffer, DATA) < 2 {
                        connection.read_more().await?;
                    }
                    anyhow::Ok(connection.socket)
                });
            }
            while let Some(opened) = opening.join_next().await {
                streams.push(opened.context("a connection panicked")??);
            }
        }
        Ok(streams)
    }
}

struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(server: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(server).await.with_context(|| format!("connect to {server}"))?;
        socket.set_nodelay(true).context("set TCP_NODELAY")?;
        Ok(Self { socket, buffer: Vec::with_capacity(4 << 10) })
    }

    /// Sends one request and reads its whole answer.
    async fn exchange(&mut self, request: &[u8], stream: bool, done: &mut Done) -> anyhow::Result<()> {
        let began = Instant::now();
        self.socket.write_all(request).await.context("send a request")?;
        if stream {
            self.read_stream(done).await?;
        } else {
            self.read_answer().await?;
        }
        done.latency_us.extend([began.elapsed().as_secs_f64() * 1e6]);
        Ok(())
    }

    async fn read_answer(&mut self) -> anyhow::Result<()> {
        loop {
            if let Some(length) = message_length(&self.buffer) {
                self.check_status()?;
                self.buffer.drain(..length);
                return Ok(());
            }
            self.read_more().await?;
        }
    }

    /// Reads a chunked stream to its end, counting events.
    async fn read_stream(&mut self, done: &mut Done) -> anyhow::Result<()> {
        const END: &[u8] = b"0\r\n\r\n";
        let mut seen = 0;
        let mut last = None;
        loop {
            self.read_more().await?;
            let now = Instant::now();
            // An event may be cut by the end of the buffer: what could begin one is looked at again.
            let events = count_of(&self.buffer[seen..], DATA);
            seen = self.buffer.len().saturating_sub(DATA.len() - 1).max(seen);
            done.chunks += events;
            if events > 0 {
                done.gap_us.extend(last.map(|last: Instant| (now - last).as_secs_f64() * 1e6));
                last = Some(now);
            }
            if self.buffer.ends_with(END) {
                self.check_status()?;
                ensure!(count_of(&self.buffer, b"\"error\"") == 0, "{}", String::from_utf8_lossy(&self.buffer));
                self.buffer.clear();
                return Ok(());
            }
        }
    }

    async fn read_more(&mut self) -> anyhow::Result<()> {
        match timeout(SILENCE, self.socket.read_buf(&mut self.buffer)).await.context("wait for an answer")?? {
            0 => bail!("the connection ended early: {}", String::from_utf8_lossy(&self.buffer)),
            _ => Ok(()),
        }
    }

    fn check_status(&self) -> anyhow::Result<()> {
        ensure!(self.buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&self.buffer));
        Ok(())
    }
}

fn request(load: &Load, prompt: &str) -> Vec<u8> {
    let Load { tokens, stream, .. } = load;
    let body = format!(
        r#"{{"model":"bench","messages":[{{"role":"user","content":"{prompt}"}}],"temperature":0,"stream":{stream},"max_tokens":{tokens}}}"#
    );
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

/// Returns the length of the message that `buffer` begins with, if it is all there: a head, and as many bytes as it announces.
fn message_length(buffer: &[u8]) -> Option<usize> {
    let head = buffer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&buffer[..head]).ok()?;
    let value = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim())
    });
    let total = head + value?.parse::<usize>().ok()?;
    (buffer.len() >= total).then_some(total)
}

/// For the plain server: the length of the request that `buffer` begins with, and how many tokens it wants streamed.
pub(super) fn parse_request(buffer: &[u8]) -> Option<(usize, Option<usize>)> {
    let length = message_length(buffer)?;
    let text = std::str::from_utf8(&buffer[..length]).ok()?;
    let tokens = text.rsplit_once("\"max_tokens\":").map(|(_, rest)| rest.trim_end_matches('}'));
    let streamed = text.contains("\"stream\":true").then(|| tokens.and_then(|tokens| tokens.parse().ok()).unwrap_or(1));
    Some((length, streamed))
}

fn count_of(bytes: &[u8], pattern: &[u8]) -> usize {
    bytes.windows(pattern.len()).filter(|window| *window == pattern).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written() {
        for (stream, expected) in [(true, Some(300)), (false, None)] {
            let load = Load { connections: 1, requests: 1, prompt: Length::Short, tokens: 300, stream };
            let written = request(&load, "Say so.");
            assert_eq!(parse_request(&written), Some((written.len(), expected)));
            assert_eq!(parse_request(&written[..written.len() - 1]), None);
        }
    }

    #[tokio::test]
    async fn streams_are_counted_event_by_event() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let server = listener.local_addr().expect("a bound socket has an address");
        tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.expect("a connection");
            let mut request = [0; 4096];
            let read = socket.read(&mut request).await.expect("a request");
            assert!(parse_request(&request[..read]).is_some());
            let answer = "HTTP/1.1 200 OK\r\n\r\n7\r\ndata: {}\r\ndata: {}\r\n\r\ndata: [DONE]\r\n0\r\n\r\n";
            for bytes in answer.as_bytes().chunks(3) {
                socket.write_all(bytes).await.expect("the client reads");
                tokio::task::yield_now().await;
            }
        });
        let load = Load { connections: 1, requests: 1, prompt: Length::Short, tokens: 2, stream: true };
        let done = Client::new(server).run_from(&load, 0).await.expect("an answer");
        assert_eq!((done.chunks, done.latency_us.into_iter().count()), (2, 1));
    }
}
