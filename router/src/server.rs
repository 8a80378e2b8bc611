//! Connections: accepted, wrapped in TLS where there are certificates, and kept from being held open for nothing.
//!
//! A client may be slow, but it is given a time for each thing: the handshake, the head of a request (which also ends connections
//! that idle), its body (`door`), and taking in what is written to it ([`stall`]). The number of connections is bounded; beyond it the
//! system's backlog waits.

mod stall;
mod tls;

pub(crate) use tls::Tls;
pub use tls::TlsFiles;

use crate::config::Limits;
use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use stall::Stall;
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Pause when a connection cannot be accepted, most often because there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Streams of one HTTP/2 connection.
const MAX_HTTP2_STREAMS: u32 = 256;

/// Serves `routes` until `shutdown`; then takes no new connection and ends when the last one has. Dropping the future ends them all.
pub(crate) async fn serve(
    routes: Router,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let (graceful, tasks) = (GracefulShutdown::new(), TaskTracker::new());
    // What is still under way when this future is dropped ends with it.
    let ended = CancellationToken::new();
    let _ended = ended.clone().drop_guard();
    let places = Arc::new(Semaphore::new(limits.max_connections));
    // Not told apart by what a client sends first: one that sends nothing would be waited for without end.
    let servers = Arc::new((plain(&limits), multiplexed(&limits)));
    loop {
        let place = places.clone().acquire_owned();
        let accepted = async {
            let place = place.await.expect("the semaphore is never closed");
            listener.accept().await.map(|(socket, _)| (place, socket))
        };
        // Cancel-safe: an unfinished accept loses no connection.
        let (place, socket) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = accepted => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let (routes, servers, watcher) = (routes.clone(), servers.clone(), graceful.watcher());
        let (tls, handshake, write) = (tls.clone(), limits.header_timeout(), limits.write_timeout());
        // What only some connections need is boxed, for the others would keep room for it.
        let conversation = async move {
            let _place = place;
            if let Err(error) = prepare(&socket) {
                return tracing::debug!(%error, "set TCP_NODELAY");
            }
            let (socket, http2): (Box<dyn Socket>, bool) = match tls {
                None => (Box::new(socket), false),
                Some(tls) => match timeout(handshake, Box::pin(tls.accept(socket))).await {
                    Ok(Ok(socket)) => {
                        let http2 = socket.get_ref().1.alpn_protocol() == Some(b"h2");
                        (Box::new(socket), http2)
                    }
                    Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake"),
                    Err(_) => return tracing::debug!(?handshake, "TLS handshake takes too long"),
                },
            };
            let (socket, service) = (TokioIo::new(Stall::new(socket, write)), TowerToHyperService::new(routes));
            let served = if http2 {
                Box::pin(watcher.watch(servers.1.serve_connection(socket, service))).await
            } else {
                watcher.watch(servers.0.serve_connection(socket, service)).await
            };
            if let Err(error) = served {
                tracing::debug!(%error, "connection broke");
            }
        };
        let ended = ended.clone();
        // Boxed, because each future around it would keep a second place for it: kilobytes for every open connection.
        let conversation = Box::pin(conversation);
        tasks.spawn(async move { ended.run_until_cancelled(conversation).await });
    }
    drop(listener);
    graceful.shutdown().await;
    tasks.close();
    tasks.wait().await;
}

/// A connection, whatever it is wrapped in.
trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Without it a small write may wait 40 ms for the other side's delayed acknowledgement.
fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)
}

/// HTTP/1.1.
fn plain(limits: &Limits) -> http1::Builder {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout()).max_buf_size(limits.max_header_bytes);
    server
}

/// HTTP/2, where TLS agreed on it.
fn multiplexed(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.header_timeout())
        .max_header_list_size(limits.max_header_bytes as u32)
        .max_concurrent_streams(MAX_HTTP2_STREAMS);
    server
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_do_not_wait_for_acknowledgements() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (_client, (socket, _)) = (client.unwrap(), accepted.unwrap());
        assert!(!socket.nodelay().unwrap(), "the system's default is to wait");
        prepare(&socket).unwrap();
        assert!(socket.nodelay().unwrap());
    }
}
