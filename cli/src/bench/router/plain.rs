//! A server that answers every request with the same bytes: the least that an HTTP server can do for a token.

use anyhow::Context;
use std::{io, time::Duration};
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
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("bind the plain server")?;
        println!("{}", listener.local_addr().context("read the bound address")?);
        loop {
            let (connection, _) = listener.accept().await.context("accept a connection")?;
            // A connection that breaks is the client's to report.
            tokio::spawn(async move { drop(converse(connection, pace).await) });
        }
    })
}

async fn converse(mut connection: TcpStream, pace: Duration) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    let answer = answer();
    while let Some(tokens) = request(&mut connection, &mut buffer).await? {
        match tokens {
            None => connection.write_all(answer.as_bytes()).await?,
            Some(tokens) => stream(&mut connection, tokens, pace).await?,
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

async fn stream(connection: &mut TcpStream, tokens: usize, pace: Duration) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    connection.write_all(head.as_bytes()).await?;
    let mut steps = tokio::time::interval(pace);
    for _ in 0..tokens {
        steps.tick().await;
        connection.write_all(chunk(EVENT).as_bytes()).await?;
    }
    connection.write_all(format!("{}0\r\n\r\n", chunk(DONE)).as_bytes()).await
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
