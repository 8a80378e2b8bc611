//! Load on an endpoint that does what a test wants.

use super::{
    endpoint::Endpoint,
    page, plan,
    plan::Plan,
    play,
    play::{Played, Record},
    report,
};
use crate::settings::{Command, Load, Settings};
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{Request, Response, body::Frame, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    ffi::OsString,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, sync::mpsc};

/// What the mock does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    /// Answers it.
    Serve,
    Refuse(u16),
    /// Says an error in the middle of the stream.
    Fail,
    /// Closes the stream without its end.
    Cut,
    /// Says nothing more.
    Stall,
    /// Ends without a token.
    Nothing,
}

/// An OpenAI endpoint without a model.
struct Mock {
    act: fn(&Value) -> Act,
    /// Before the first token.
    think: Duration,
    /// Answers one request after the other.
    one_by_one: Option<tokio::sync::Mutex<()>>,
    seen: Mutex<Vec<Value>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
}

type Body = BoxBody<Bytes, Infallible>;

impl Mock {
    fn new(act: fn(&Value) -> Act) -> Self {
        Self {
            act,
            think: Duration::ZERO,
            one_by_one: None,
            seen: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
        }
    }

    /// Starts it and returns its URL. It ends with the test's runtime.
    async fn start(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let url = format!("http://{}", listener.local_addr().expect("a bound address"));
        let mock = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mock = mock.clone();
                let service = service_fn(move |request| mock.clone().answer(request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        url
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        if path == "/v1/models" {
            return Ok(response(200, &json!({"data": [{"id": "mock"}]})));
        }
        let request: Value = serde_json::from_slice(&body).expect("JSON");
        let act = (self.act)(&request);
        self.seen.lock().expect("no panic").push(request.clone());
        if let Act::Refuse(status) = act {
            return Ok(response(status, &json!({"error": {"message": format!("no: {status}")}})));
        }
        let (events, body) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(64);
        let mut body = body;
        tokio::spawn(async move {
            let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_in_flight.fetch_max(now, Ordering::SeqCst);
            self.stream(&request, act, &events).await;
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            if act == Act::Stall {
                events.closed().await;
            }
        });
        let stream = futures::stream::poll_fn(move |context| body.poll_recv(context));
        Ok(Response::new(BodyExt::boxed(StreamBody::new(stream))))
    }

    async fn stream(&self, request: &Value, act: Act, events: &mpsc::Sender<Result<Frame<Bytes>, Infallible>>) {
        let _turn = match &self.one_by_one {
            Some(turn) => Some(turn.lock().await),
            None => None,
        };
        tokio::time::sleep(self.think).await;
        let send = async |event: Value| {
            let _ = events.send(Ok(Frame::data(format!("data: {event}\n\n").into()))).await;
        };
        let tokens = request["max_tokens"].as_u64().expect("a length");
        let chat = request.get("messages").is_some();
        for index in 0..tokens {
            match (act, index) {
                (Act::Serve, _) | (_, 0) if act != Act::Nothing => {}
                (Act::Fail, _) => return send(json!({"error": {"message": "the worker died"}})).await,
                (Act::Cut | Act::Stall, _) => return,
                _ => break,
            }
            let choice = if chat { json!({"delta": {"content": "x"}}) } else { json!({"text": "x"}) };
            send(json!({"choices": [choice]})).await;
        }
        let prompt = request["prompt"].as_array().map_or(0, Vec::len);
        send(json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}})).await;
        let _ = events.send(Ok(Frame::data("data: [DONE]\n\n".into()))).await;
    }
}

fn response(status: u16, body: &Value) -> Response<Body> {
    let text = Bytes::from(body.to_string());
    let mut response = Response::new(http_body_util::Full::new(text).boxed());
    *response.status_mut() = hyper::StatusCode::from_u16(status).expect("a status");
    response
}

fn load(url: &str, args: &[&str]) -> Load {
    let args = ["baton", "bench", "--url", url].into_iter().chain(args.iter().copied()).map(OsString::from);
    match Settings::read(args).expect("good settings").command {
        Command::Bench(bench) => bench.load,
        other => panic!("expected bench, got {other:?}"),
    }
}

async fn played(url: &str, args: &[&str]) -> (Load, Played) {
    let load = load(url, args);
    let plan = Plan::new(&load).expect("a plan");
    let endpoint = Arc::new(Endpoint::reach(url, &load).await.expect("an endpoint"));
    let played = play::play(endpoint, plan, std::future::pending()).await;
    (load, played)
}

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/traces/mooncake_conversation_300.jsonl");

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_sent_as_it_says() {
    let mock = Arc::new(Mock::new(|_| Act::Serve));
    let url = mock.start().await;
    let args = ["--trace", TRACE, "--requests", "20", "--lengths", "0.03125", "--rate", "200"];
    let (load, played) = played(&url, &args).await;
    assert_eq!((played.records.len(), played.unfinished), (20, 0));
    let trace = Plan::new(&load).expect("a plan").trace;
    let seen = std::mem::take(&mut *mock.seen.lock().expect("no panic"));
    // Requests that were due at the same moment ended in any order.
    let mut wanted = trace.requests.clone();
    wanted.sort_by_key(|request| (request.at, request.input_tokens, request.output_tokens));
    let mut records: Vec<_> = played.records.iter().collect();
    let output_tokens = |record: &Record| record.outcome.as_ref().map_or(0, |served| served.output_tokens);
    records.sort_by_key(|record| (record.due, record.input_tokens, output_tokens(record)));
    for (request, record) in wanted.iter().zip(records) {
        assert_eq!((record.due, record.input_tokens), (request.at, request.input_tokens));
        let served = record.outcome.as_ref().expect("an answer");
        assert_eq!((served.pieces.len(), served.output_tokens), (request.output_tokens, request.output_tokens));
        let tokens: Value = request.tokens(trace.block_tokens, 1000).into();
        let sent = seen.iter().find(|sent| sent["prompt"] == tokens).expect("the prompt was sent");
        assert_eq!((&sent["max_tokens"], &sent["ignore_eos"]), (&json!(request.output_tokens), &json!(true)));
    }
    assert_eq!(seen.len(), 21, "one request before the run asks whether token ids are taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn latencies_count_from_when_a_request_was_due() {
    let think = Duration::from_millis(20);
    let mock = Mock { think, one_by_one: Some(Default::default()), ..Mock::new(|_| Act::Serve) };
    let url = Arc::new(mock).start().await;
    let args = ["--requests", "10", "--output-tokens", "1", "--rate", "1000", "--arrivals", "constant"];
    let (_, played) = played(&url, &args).await;
    let longest = played.records.iter().map(|record| record.outcome.as_ref().expect("an answer").ttft()).max();
    // Whoever came last waited for all others, although it was due 9 ms after the first.
    assert!(longest >= Some(10 * think - Duration::from_millis(9)), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_loop_keeps_its_number_in_flight() {
    let mock = Arc::new(Mock { think: Duration::from_millis(5), ..Mock::new(|_| Act::Serve) });
    let url = mock.start().await;
    let (_, played) = played(&url, &["--requests", "30", "--output-tokens", "2", "--concurrency", "3"]).await;
    assert_eq!(played.records.len(), 30);
    assert_eq!(mock.most_in_flight.load(Ordering::SeqCst), 3);
}

/// Checks which endpoint and which fields an endpoint gets that refuses what `act` says.
async fn check_form(act: fn(&Value) -> Act, prompt: &str, exact_length: bool) {
    let mock = Arc::new(Mock::new(act));
    let url = mock.start().await;
    let (_, played) = played(&url, &["--requests", "2", "--input-tokens", "5", "--concurrency", "1"]).await;
    assert!(played.records.iter().all(|record| record.outcome.is_ok()), "{played:?}");
    let seen = mock.seen.lock().expect("no panic");
    let last = seen.last().expect("a request");
    let words = last["prompt"].as_str().or(last["messages"][0]["content"].as_str());
    let form = match (&last["prompt"], words.map(|words| words.split(' ').count())) {
        (Value::Array(_), None) => "tokens",
        (Value::String(_), Some(5)) => "text",
        (Value::Null, Some(5)) => "chat",
        _ => panic!("{last}"),
    };
    assert_eq!((form, last["ignore_eos"] == true), (prompt, exact_length));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_gets_what_it_takes() {
    check_form(|_| Act::Serve, "tokens", true).await;
    check_form(|request| if request["prompt"].is_array() { Act::Refuse(400) } else { Act::Serve }, "text", true).await;
    check_form(|request| if request["ignore_eos"] == true { Act::Refuse(400) } else { Act::Serve }, "tokens", false)
        .await;
    check_form(|request| if request["prompt"].is_null() { Act::Serve } else { Act::Refuse(404) }, "chat", true).await;

    let mock = Arc::new(Mock::new(|_| Act::Refuse(401)));
    let url = mock.start().await;
    let problem = Endpoint::reach(&url, &load(&url, &["--rate", "1"])).await.expect_err("no key").to_string();
    assert!(problem.contains("401") && problem.contains("no: 401"), "{problem}");
    assert_eq!(mock.seen.lock().expect("no panic").len(), 1, "another form does not help");
    let nobody = "http://127.0.0.1:1";
    let problem = Endpoint::reach(nobody, &load(nobody, &["--rate", "1"])).await.expect_err("nobody there");
    assert!(
        format!("{problem:#}").contains("127.0.0.1:1") && format!("{problem:#}").contains("--model"),
        "{problem:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_by_kind_and_reported() {
    // The request before the run asks for one token, the others for four; what happens to them hangs on their prompts.
    let act = |request: &Value| match request["prompt"].as_array().map(Vec::len) {
        _ if request["max_tokens"] == 1 => Act::Serve,
        Some(32) => Act::Refuse(429),
        Some(48) => Act::Fail,
        Some(64) => Act::Cut,
        Some(80) => Act::Stall,
        Some(96) => Act::Nothing,
        _ => Act::Serve,
    };
    let mock = Arc::new(Mock::new(act));
    let url = mock.start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let trace = dir.path().join("t.jsonl");
    let line = |input: usize| {
        format!("{{\"timestamp\":0,\"input_length\":{input},\"output_length\":4,\"hash_ids\":[{input}]}}\n")
    };
    std::fs::write(&trace, [16, 32, 32, 48, 64, 80, 96, 16].map(line).concat()).expect("a file");
    let trace = trace.to_str().expect("UTF-8");
    let objectives = ["--ttft-ms", "60000", "--itl-ms", "60000"];
    let args = [&["--trace", trace, "--rate", "100", "--arrivals", "constant", "--timeout", "300ms"][..], &objectives]
        .concat();
    let (load, played) = played(&url, &args).await;
    let about = report::About {
        endpoint: url.clone(),
        model: "<mock> & co".into(),
        load: "eight".into(),
        prompts: "as token ids".into(),
    };
    let report = report::Report::new(about, played, plan::objectives(&load));
    let kinds: Vec<(&str, usize)> = report.errors.iter().map(|(kind, of)| (kind.as_str(), of.after_ms.count)).collect();
    let expected =
        [("broken stream", 1), ("empty answer", 1), ("error in the stream", 1), ("status 429", 2), ("timeout", 1)];
    assert_eq!(kinds, expected);
    assert!(report.errors["timeout"].after_ms.p50 >= Duration::from_millis(300));
    let summary = &report.summary;
    assert_eq!((summary.requests, summary.failed, summary.good, summary.itl.count), (8, 6, 2, 6));

    let table = report.table();
    for part in
        ["2 served, 6 failed", "25.0 % with TTFT ≤ 60000 ms and mean ITL ≤ 60000 ms", "2 × status 429", "no: 429"]
    {
        assert!(table.contains(part), "{part:?} is not in {table}");
    }
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!((&json["summary"]["good"], &json["requests"][1]["error"]), (&json!(2), &json!("status 429")));
    assert!(json["summary"]["ttft_ms"]["p99"].is_number() && json["requests"][0]["ttft_ms"].is_number());
    let page = page::html(&report);
    assert_eq!(page.matches("<svg").count(), 5);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert!(page.contains("&lt;mock&gt; &amp; co") && page.contains("the worker died"));
    assert!(!page.contains("NaN") && !page.contains("inf"), "every point has a place");
    for outside in ["src=", "href=", "url(", "@import", "<script"] {
        assert!(!page.contains(outside), "the page fetches nothing: {outside}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_reports_what_it_has() {
    let url = Arc::new(Mock::new(|_| Act::Serve)).start().await;
    let load = load(&url, &["--requests", "1000", "--output-tokens", "1", "--rate", "50"]);
    let endpoint = Arc::new(Endpoint::reach(&url, &load).await.expect("an endpoint"));
    let after = tokio::time::sleep(Duration::from_millis(300));
    let played = play::play(endpoint, Plan::new(&load).expect("a plan"), after).await;
    assert_eq!(played.records.len() + played.unfinished, 1000);
    assert!(!played.records.is_empty() && played.unfinished > 0, "{played:?}");
}
