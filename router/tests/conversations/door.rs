//! The door: keys, limits, ids, browsers, TLS, and clients that take their time.

use crate::{
    mock::{MODEL, MockWorker},
    support::{Open, TestRouter, output, within},
};
use cluster::Role;
use hyper::Method;
use proto::ended::Reason;
use router::{Policy, TlsFiles};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName},
};
use serde_json::{Value, json};
use std::{fs, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

const CHAT: &str = "/v1/chat/completions";
/// Of `sesame`.
const SESAME: &str = "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272";

fn chat() -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "What is a KV cache?"}]})
}

async fn ask(router: &TestRouter, headers: &[(&str, &str)]) -> Open {
    router.send(Method::POST, CHAT, Some(chat().to_string()), headers).await
}

/// Asks while a worker stands by to answer.
async fn answered(router: &TestRouter, worker: &mut MockWorker, headers: &[(&str, &str)]) -> u16 {
    let (answer, ()) = tokio::join!(ask(router, headers), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("ok"), Reason::Stop);
    });
    answer.whole().await.status
}

async fn with_worker(change: impl FnOnce(&mut router::Config)) -> (TestRouter, MockWorker) {
    let router = TestRouter::start_with(Policy::Local, change).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, worker)
}

#[tokio::test]
async fn without_the_right_key_nothing_is_done() {
    let (router, mut worker) = with_worker(|config| config.api_keys = vec!["sesame".into()]).await;
    for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "sesame")], &[("x-api-key", "")]]
    {
        let refused = ask(&router, headers).await.whole().await;
        assert_eq!((refused.status, refused.body.as_str()), (401, r#"{"error":"Unauthorized"}"#), "{headers:?}");
        assert_eq!(refused.headers["content-type"], "application/json");
        assert!(refused.headers.contains_key("x-request-id") && refused.headers.contains_key("www-authenticate"));
    }
    assert_eq!(router.get("/v1/models").await.status, 401);
    assert_eq!(router.get("/nowhere").await.status, 401, "what there is, is nobody's business");
    assert!(!worker.has_submission());
    for path in ["/health", "/livez", "/readyz", "/metrics", "/version"] {
        assert_eq!(router.get(path).await.status, 200, "{path}");
    }
    assert_eq!(answered(&router, &mut worker, &[("authorization", "Bearer sesame")]).await, 200);
    assert_eq!(answered(&router, &mut worker, &[("x-api-key", "sesame")]).await, 200);
}

#[tokio::test]
async fn a_key_is_held_to_its_limits() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let key = |name: &str, limit: &str| format!("[[key]]\nname = '{name}'\nsha256 = '{SESAME}'\n{limit} = 2\n");
    for limit in ["requests_per_minute", "tokens_per_minute"] {
        fs::write(&file, key("a", limit)).unwrap();
        let (router, mut worker) = with_worker(|config| config.api_key_file = Some(file.path().into())).await;
        let bearer = [("authorization", "Bearer sesame")];
        assert_eq!(answered(&router, &mut worker, &bearer).await, 200);
        if limit == "requests_per_minute" {
            assert_eq!(answered(&router, &mut worker, &bearer).await, 200);
        }
        let refused = ask(&router, &bearer).await.whole().await;
        assert_eq!(refused.status, 429);
        assert!(refused.error().contains("2") && refused.error().contains(&limit[..6]), "{}", refused.body);
        let wait: u32 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!(wait >= 1, "{wait}");
        assert!(!worker.has_submission());
    }
}

#[tokio::test]
async fn every_answer_names_its_request() {
    let (router, _worker) = with_worker(|_| {}).await;
    for path in ["/health", "/nowhere", "/v1/models"] {
        assert_eq!(router.get(path).await.headers["x-request-id"].len(), 32, "{path}");
        let named = router.send(Method::GET, path, None, &[("x-request-id", "mine")]).await;
        assert_eq!(named.headers["x-request-id"], "mine", "{path}");
    }
}

#[tokio::test]
async fn browsers_are_told_which_pages_may_ask() {
    let (router, _worker) = with_worker(|config| {
        config.api_keys = vec!["sesame".into()];
        config.cors_origins = vec!["https://chat.example".into()];
    })
    .await;
    let preflight = |origin| {
        [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization"),
        ]
    };
    let allowed = router.send(Method::OPTIONS, CHAT, None, &preflight("https://chat.example")).await;
    assert_eq!(allowed.status, 200, "a preflight shows no key");
    assert_eq!(allowed.headers["access-control-allow-origin"], "https://chat.example");
    assert_eq!(allowed.headers["access-control-allow-headers"], "authorization");
    let other = router.send(Method::OPTIONS, CHAT, None, &preflight("https://evil.example")).await;
    assert!(!other.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn bodies_and_heads_have_a_size_and_a_time() {
    let (router, mut worker) = with_worker(|config| {
        let limits = &mut config.limits;
        (limits.max_body_bytes, limits.max_header_bytes) = (2_000, 8_192);
        (limits.body_timeout_ms, limits.header_timeout_ms) = (300, 300);
    })
    .await;
    let announced =
        format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: 2001\r\n\r\n");
    let endless = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    let check = async |sent: &str, expected: &str| {
        let mut socket = TcpStream::connect(router.address).await.unwrap();
        socket.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        let read = async {
            let mut length = 0;
            while length < answer.len() {
                match socket.read(&mut answer[length..]).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => length += read,
                }
            }
            length
        };
        let length = within("an answer or the end", read).await;
        assert_eq!(String::from_utf8_lossy(&answer[..length]), expected, "{sent:.80}");
    };
    check(&announced, "HTTP/1.1 413").await;
    check(&format!("{endless}{chunk}{chunk}"), "HTTP/1.1 413").await;
    check(&format!("{endless}{chunk}"), "HTTP/1.1 408").await;
    check(&announced.replace("2001", "100"), "HTTP/1.1 408").await;
    check(&format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(100_000)), "HTTP/1.1 431").await;
    // A head that does not come to its end, and a connection on which nothing is asked.
    check("GET /health HTTP/1.1\r\nhost: t\r\n", "").await;
    check("", "").await;
    assert!(!worker.has_submission());
}

/// A certificate for `localhost` in files, and trust in it.
fn certificate(files: &TlsFiles) -> Arc<ClientConfig> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(&files.cert, made.cert.pem()).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(made.cert.der().to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}

async fn over_tls(router: &TestRouter, trust: &Arc<ClientConfig>) -> std::io::Result<String> {
    let socket = TcpStream::connect(router.address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut socket = within("a handshake", TlsConnector::from(trust.clone()).connect(name, socket)).await?;
    socket.write_all(b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    within("an answer", socket.read_to_string(&mut answer)).await?;
    Ok(answer)
}

#[tokio::test]
async fn tls_is_served_and_its_files_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles { cert: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
    let old = certificate(&files);
    let router = TestRouter::start_with(Policy::Local, |config| config.tls = Some(files.clone())).await;
    assert!(over_tls(&router, &old).await.unwrap().starts_with("HTTP/1.1 200"));
    fs::write(&files.cert, "nonsense").unwrap();
    assert!(over_tls(&router, &old).await.is_ok(), "the certificate of before stays in force");
    let new = certificate(&files);
    assert!(over_tls(&router, &new).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(over_tls(&router, &old).await.is_err());
    let mut clear = TcpStream::connect(router.address).await.unwrap();
    clear.write_all(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = within("the end", clear.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "clear text is not answered");
}

#[tokio::test]
async fn files_that_are_no_certificate_stop_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles { cert: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
    let mut router = TestRouter::start_with(Policy::Local, |config| config.tls = Some(files.clone())).await;
    let error = within("the end of run", &mut router.running).await.unwrap().unwrap_err();
    assert!(format!("{error:#}").contains("cert.pem"), "{error:#}");
}
