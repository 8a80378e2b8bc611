//! The simulation beside what it simulates: a profile is measured, and a trace played on real engines and in virtual time.

use cluster_tests::{
    Client,
    process::{Baton, free_address},
};
use serde_json::Value;
use std::time::Duration;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/traces/mooncake_conversation_300.jsonl");
/// Ten seconds of it, at lengths that the bundled model holds.
const SLICE: [&str; 4] = ["40", "--lengths", "0.03", "--json"];

async fn run(arguments: &[&str]) -> String {
    let (code, output) = Baton::start(arguments).exit(Duration::from_secs(300)).await;
    assert_eq!(code, Some(0), "{arguments:?}: {output}");
    output
}

/// Times are printed and not held against each other: tests share their machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_played_on_a_cluster_and_in_virtual_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let [profile, figures] = ["here.toml", "figures.json"].map(|name| dir.path().join(name).display().to_string());
    run(&["bench", "--profile", &profile, "--threads", "1"]).await;

    let address = free_address().to_string();
    let url = format!("http://{address}");
    let up = ["up", "--listen", &address, "--prefill", "1", "--decode", "1", "--threads", "1"];
    let mut cluster = Baton::start(&up);
    cluster.ready(&Client::new(&url), "/readyz", Duration::from_secs(30)).await;
    run(&[&["bench", "--url", &url, "--trace", TRACE, "--requests"][..], &SLICE, &[&figures]].concat()).await;
    let real: Value = serde_json::from_str(&std::fs::read_to_string(&figures).expect("the figures")).expect("JSON");

    let pools = ["simulate", TRACE, "--prefill", "1", "--decode", "1", "--policy", "baton"];
    let here = ["--profile", &profile, "--token-budget", "2048", "--first"];
    let simulated = run(&[&pools[..], &here, &SLICE].concat()).await;
    let simulated: Value = serde_json::from_str(simulated.trim()).expect("one run is one line of JSON");

    let [real, simulated] = [&real["summary"], &simulated["outcome"]["summary"]];
    for summary in [real, simulated] {
        assert_eq!((summary["requests"].as_u64(), summary["failed"].as_u64()), (Some(40), Some(0)), "{summary}");
    }
    assert_eq!(real["itl_ms"]["count"], simulated["itl_ms"]["count"], "tokens after the first");
    for figure in ["ttft_ms", "itl_ms"] {
        let mean = |summary: &Value| summary[figure]["mean"].as_f64().expect("a mean");
        let (real, simulated) = (mean(real), mean(simulated));
        assert!(real > 0.0 && simulated > 0.0, "{figure}: {real} and {simulated}");
        println!("{figure}: {real:.2} on the cluster, {simulated:.2} in virtual time, {:.2} of it", simulated / real);
    }
}
