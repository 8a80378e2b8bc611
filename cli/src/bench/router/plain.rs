//! A server that answers every request with the same bytes: the least that an HTTP server can do for a token.
//!
//! What is streamed leaves from one thread that wakes once for all streams of a step and writes to one after another, so nothing is left
//! of a chunk but its `write`: what the kernel asks of whoever sends it.

use anyhow::Context;
use std::{
    io::{self, Write},
    net,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// One event of a stream, as large as an ordinary one, in its own HTTP chunk.
const EVENT: &str = concat!(
    r#"data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench","#,
    r#""choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}"#,
    "\n\n"
);
const DONE: &str = "data: [DONE]\n\n";

/// Prints its address, then serves until killed.
pub(super) fn serve(pace: Duration) -> anyhow::Result<()> {
    let (streams, inbox) = mpsc::channel();
    thread::spawn(move || write(&inbox, pace));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("bind the plain server")?;
        println!("{}", listener.local_addr().context("read the bound address")?);
        loop {
            let (connection, _) = listener.accept().await.context("accept a connection")?;
            let streams = streams.clone();
            // A connection that breaks is the client's to report.
            tokio::spawn(async move { drop(converse(connection, &streams).await) });
        }
    })
}

async fn converse(mut connection: TcpStream, streams: &mpsc::Sender<Stream>) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    let answer = answer();
    while let Some(tokens) = request(&mut connection, &mut buffer).await? {
        match tokens {
            None => connection.write_all(answer.as_bytes()).await?,
            Some(left) => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                connection.write_all(head.as_bytes()).await?;
                let socket = connection.into_std()?;
                socket.set_nonblocking(false)?;
                // The thread takes streams for as long as the process lives.
                return streams.send(Stream { socket, left }).map_err(io::Error::other);
            }
        }
    }
    Ok(())
}

/// Reads one request. Returns how many tokens it wants streamed, or `None` within for an answer in one piece; `None` at the end of
/// the connection.
async fn request(connection: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<Option<usize>>> {
    loop {
        if let Some((length, tokens)) = super::client::parse_request(buffer) {
            buffer.drain(..length);
            return Ok(Some(tokens));
        }
        if connection.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// An answer under way.
struct Stream {
    socket: net::TcpStream,
    /// Tokens not yet written.
    left: usize,
}

/// Writes a token to every stream each `pace`, until nobody can hand over streams any more.
fn write(inbox: &mpsc::Receiver<Stream>, pace: Duration) {
    let (event, end) = (chunk(EVENT), format!("{}0\r\n\r\n", chunk(DONE)));
    // A client that has gone is no concern of the others.
    let step = |stream: &mut Stream| -> bool {
        let Some(left) = stream.left.checked_sub(1) else { return false };
        stream.left = left;
        let last = if left == 0 { end.as_bytes() } else { b"" };
        stream.socket.write_all(event.as_bytes()).and_then(|()| stream.socket.write_all(last)).is_ok() && left > 0
    };
    while let Ok(first) = inbox.recv() {
        let (mut streams, mut next) = (vec![first], Instant::now());
        while !streams.is_empty() {
            next += pace;
            // Those that come meanwhile join, and whatever ends the wait, it is time.
            while let Ok(stream) = inbox.recv_timeout(next.saturating_duration_since(Instant::now())) {
                streams.push(stream);
            }
            streams.retain_mut(step);
        }
    }
}

fn chunk(event: &str) -> String {
    format!("{:x}\r\n{event}\r\n", event.len())
}

fn answer() -> String {
    let body = concat!(
        r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1700000000,"model":"bench","choices":[{"#,
        r#""index":0,"message":{"role":"assistant","content":" word word word word word word word word"},"#,
        r#""finish_reason":"length"}],"usage":{"prompt_tokens":40,"completion_tokens":8,"total_tokens":48}}"#
    );
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
}
