//! `baton bench --url` against a real cluster, and a cluster whose engines are timed, as a user runs them.

use cluster_tests::{
    Client,
    process::{Baton, free_address},
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/traces/mooncake_conversation_300.jsonl");
const REQUESTS: usize = 12;
const SCALE: f64 = 0.03125;
/// Of the scaled trace.
const BLOCK_TOKENS: u64 = 16;

const PROFILE: &str = r#"
model = "a model"
machine = "a machine"
source = "this test"
kv_bytes_per_token = 1
kv_tokens = 20000
[pace]
step_us = 2000
sequence_us = 10
context_ns = 10
token_us = 100
pair_ns = 1
"#;

/// Starts a cluster and waits until it takes requests.
async fn up(arguments: &[&str]) -> (Baton, String) {
    let address = free_address().to_string();
    let mut baton = Baton::start(&[&["up", "--listen", &address][..], arguments].concat());
    let url = format!("http://{address}");
    baton.ready(&Client::new(&url), "/readyz", Duration::from_secs(30)).await;
    (baton, url)
}

/// Plays the head of the trace against `url` and returns the figures and the page.
async fn bench(url: &str, dir: &Path) -> (Value, String) {
    let (json, html) = (dir.join("figures.json"), dir.join("report.html"));
    let (requests, scale) = (REQUESTS.to_string(), SCALE.to_string());
    let mut arguments = vec!["bench", "--url", url, "--trace", TRACE, "--requests", &requests, "--lengths", &scale];
    arguments.extend(["--rate", "10", "--arrivals", "bursty:2", "--ttft-ms", "60000", "--itl-ms", "60000"]);
    arguments.extend(["--json", json.to_str().expect("UTF-8"), "--html", html.to_str().expect("UTF-8")]);
    let (code, output) = Baton::start(&arguments).exit(Duration::from_secs(120)).await;
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("12 served, 0 failed") && output.contains("100.0 % with TTFT"), "{output}");
    let read = |path| std::fs::read_to_string(path).expect("the file was written");
    (serde_json::from_str(&read(&json)).expect("JSON"), read(&html))
}

/// Checks that every request of the trace was served in the length it asks for.
fn check(figures: &Value) {
    let trace = std::fs::read_to_string(TRACE).expect("the trace is there");
    let asked = trace.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")).take(REQUESTS);
    let served = figures["requests"].as_array().expect("requests");
    assert_eq!(served.len(), REQUESTS);
    for (asked, served) in asked.zip(served) {
        let blocks = asked["hash_ids"].as_array().expect("blocks").len() as u64;
        let output = (asked["output_length"].as_f64().expect("a length") * SCALE).round().max(1.0) as u64;
        assert_eq!(served["input_tokens"].as_u64().expect("counted").div_ceil(BLOCK_TOKENS), blocks, "{served}");
        assert_eq!(served["output_tokens"], output, "{served}");
        assert!(served["ttft_ms"].as_f64() <= served["e2e_ms"].as_f64(), "{served}");
    }
    assert_eq!((&figures["summary"]["good"], &figures["errors"]), (&json!(REQUESTS), &json!({})));
    assert_eq!(figures["prompts"], "prompts as token ids");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_played_against_a_cluster() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_baton, url) = up(&["--kv-memory", "64MiB"]).await;
    let (figures, page) = bench(&url, dir.path()).await;
    check(&figures);
    assert!(page.contains("<svg") && page.contains("demo at http://127.0.0.1"), "{page}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timed_engines_serve_in_the_time_of_their_profile() {
    let dir = tempfile::tempdir().expect("a directory");
    let profile = dir.path().join("profile.toml");
    std::fs::write(&profile, PROFILE).expect("a file");
    let engine = format!("timed:{}", profile.display());
    let (baton, url) = up(&["--engine", &engine, "--prefill", "2", "--decode", "2"]).await;
    let (figures, _) = bench(&url, dir.path()).await;
    assert!(baton.output().contains("timed as a model on a machine"), "{}", baton.output());
    check(&figures);
    // Nothing was cached yet: 0.1 ms a token, and 2 ms a step after the first token.
    let first = &figures["requests"][0];
    let (input, output) = (first["input_tokens"].as_f64().expect("counted"), first["output_tokens"].as_f64());
    assert!(first["ttft_ms"].as_f64() >= Some(input * 0.1), "{first}");
    let decoding = first["e2e_ms"].as_f64().zip(first["ttft_ms"].as_f64()).map(|(e2e, ttft)| e2e - ttft);
    // Token 0 and token 1 come from different workers, which may overlap; the others are a step apart.
    assert!(decoding >= output.map(|output| 2.0 * (output - 2.0)), "{first}");

    // What is said follows from what was said, whoever says it and whatever runs beside it.
    let client = Client::new(&url);
    let ask = async |temperature: f64| {
        let body =
            json!({"model": "demo", "prompt": [5, 6, 7, 8], "max_tokens": 40, "temperature": temperature, "seed": 3});
        client.post("/v1/completions", &body).await.expect("an answer").json()["choices"][0]["text"].clone()
    };
    for temperature in [0.0, 1.0] {
        let said = ask(temperature).await;
        assert_eq!(said, ask(temperature).await);
        assert!(said.as_str().is_some_and(|text| !text.is_empty()), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_run_is_named() {
    let url = format!("http://{}", free_address());
    for (arguments, part) in [
        (&["bench", "--url", &url, "--rate", "1"][..], "for its models"),
        (&["bench", "--url", &url], "--rate R or --concurrency N"),
        (&["up", "--engine", "timed:/nowhere.toml"], "/nowhere.toml"),
        (&["up", "--engine", "gpu"], "timed:FILE"),
    ] {
        let (code, output) = Baton::start(arguments).exit(Duration::from_secs(30)).await;
        assert!(code.is_some_and(|code| code > 0) && output.contains(part), "{arguments:?}: {output}");
    }
}
