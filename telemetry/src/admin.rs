//! `/metrics`, `/livez`, `/readyz` for those who run the process, on a port of their own.

use crate::{Health, render_metrics};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use std::time::Duration;
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;

/// How long open connections may delay the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves `/metrics`, `/livez` and `/readyz` until `shutdown`.
///
/// Probes answer 200 with `ok`, or 503 with the reason, as text.
pub async fn serve_admin(listener: TcpListener, health: Health, shutdown: CancellationToken) -> std::io::Result<()> {
    let stop = shutdown.clone().cancelled_owned();
    let serving = axum::serve(listener, routes(health)).with_graceful_shutdown(stop);
    tokio::select! {
        ended = serving.into_future() => ended,
        () = async { shutdown.cancelled().await; sleep(CLOSE_TIMEOUT).await } => Ok(()),
    }
}

fn routes(health: Health) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async |State(health): State<Health>| probe(health.liveness())))
        .route("/readyz", get(async |State(health): State<Health>| probe(health.readiness())))
        .with_state(health)
}

async fn metrics() -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], render_metrics())
}

fn probe(result: Result<(), String>) -> (StatusCode, String) {
    match result {
        Ok(()) => (StatusCode::OK, "ok\n".into()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    /// Asks as a probe does and returns status and body.
    async fn ask(address: std::net::SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
        let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, body.to_owned())
    }

    #[tokio::test]
    async fn probes_and_metrics_answer_until_shutdown() {
        let _guard = crate::init(&crate::Config::default(), "test").expect("good settings");
        ::metrics::counter!("baton_admin_test_total").increment(7);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let health = Health::new("loading weights", Duration::ZERO);
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_admin(listener, health.clone(), shutdown.clone()));

        assert_eq!(ask(address, "/readyz").await, (503, "loading weights\n".into()));
        assert_eq!(ask(address, "/livez").await, (200, "ok\n".into()));
        health.ready();
        assert_eq!(ask(address, "/readyz").await, (200, "ok\n".into()));
        // The limit is zero, so any step that takes time is too long.
        health.work_began();
        let (status, reason) = ask(address, "/livez").await;
        assert_eq!(status, 503);
        assert!(reason.starts_with("there is work"), "{reason}");
        let (status, text) = ask(address, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("baton_admin_test_total 7"), "{text}");
        assert_eq!(ask(address, "/elsewhere").await.0, 404);

        // An idle connection does not hold up the end.
        let _idle = TcpStream::connect(address).await.expect("it listens");
        shutdown.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), serving).await.expect("bounded");
        ended.expect("no panic").expect("no error");
    }
}
