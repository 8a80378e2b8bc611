//! Clients that go away: everything they held comes back.

use cluster_tests::{Client, TestCluster};
use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::StdRng};
use router::Policy;
use serde_json::json;
use std::time::{Duration, Instant};

/// Waits until no page is held, in quarantine or on its way, for at most the second that DESIGN.md allows (plus the time a
/// loaded test machine needs to look).
pub(crate) async fn pages_come_back(client: &Client) -> anyhow::Result<Duration> {
    let start = Instant::now();
    loop {
        let page = client.get("/metrics").await?.text;
        let held = cluster_tests::client::sum_metric(&page, "baton_pages", &["state=\"held\""]);
        let moving = cluster_tests::client::sum_metric(&page, "baton_handoff_in_flight", &[]);
        let quarantined = cluster_tests::client::sum_metric(&page, "baton_handoff_quarantined_pages", &[]);
        if held + moving + quarantined == 0.0 {
            return Ok(start.elapsed());
        }
        let late = start.elapsed() > Duration::from_secs(5);
        anyhow::ensure!(!late, "after 5 s: {held} pages held, {moving} hand-offs, {quarantined} pages in quarantine");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_aborted_requests_leave_nothing_behind() -> anyhow::Result<()> {
    let cluster = TestCluster::new().workers(2, 2).placement(Policy::Remote).start().await?;
    let mut random = StdRng::seed_from_u64(200);
    for _ in 0..10 {
        let aborted = (0..20).map(|_| {
            let client = cluster.client.clone();
            let words = random.random_range(1..400);
            let patience = Duration::from_micros(random.random_range(0..120_000));
            let request = json!({
                "model": "test", "prompt": "cache ".repeat(words), "max_tokens": 500, "ignore_eos": true,
                "temperature": 1.0, "stream": random.random_bool(0.7),
            });
            async move {
                let read = async {
                    match request["stream"] == true {
                        true => client.stream("/v1/completions", &request).await?.collect().await.map(drop),
                        false => client.post("/v1/completions", &request).await.map(drop),
                    }
                };
                // Dropping the future closes the connection, wherever the request is by then.
                let _ = tokio::time::timeout(patience, read).await;
            }
        });
        join_all(aborted).await;
    }
    let took = pages_come_back(&cluster.client).await?;
    println!("all pages back {took:?} after the last abort");

    // What is left serves as before.
    let answer = cluster.client.post("/v1/completions", &json!({"prompt": "A page is", "max_tokens": 4})).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    pages_come_back(&cluster.client).await?;
    cluster.stop().await
}
