//! Two routers on the same workers: nobody leads, and work spreads all the same.

use cluster_tests::{Client, cluster::TestCluster};
use futures::future::try_join_all;
use serde_json::json;
use std::collections::BTreeMap;

const WORKERS: usize = 3;

/// Asks for a completion; returns the worker that decoded it, as the router that was asked tells.
async fn decoded_by(client: &Client, index: usize) -> anyhow::Result<String> {
    let request = json!({
        "prompt": format!("Number {index}: {}", "once upon a time ".repeat(20)),
        "max_tokens": 60, "temperature": 0, "ignore_eos": true, "request_id": format!("spread-{index}"),
    });
    let answer = client.post("/v1/completions", &request).await?;
    anyhow::ensure!(answer.status == 200, "{}", answer.text);
    let why = client.get(&format!("/v1/requests/spread-{index}/why")).await?.json();
    let candidates = why["attempts"][0]["candidates"].as_array().cloned().unwrap_or_default();
    let chosen = candidates.iter().find(|candidate| candidate["chosen"] == true);
    Ok(chosen.and_then(|chosen| chosen["decode"].as_str()).unwrap_or_else(|| panic!("{why}")).to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_routers_share_their_workers_evenly() -> anyhow::Result<()> {
    let cluster = TestCluster::new().workers(0, WORKERS).placement(router::Policy::Local).routers(2).start().await?;
    let clients = [&cluster.client, &cluster.others[0]];
    let requests = (0..24).map(|index| decoded_by(clients[index % 2], index));
    let mut counts = BTreeMap::new();
    for worker in try_join_all(requests).await? {
        *counts.entry(worker).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), WORKERS, "{counts:?}");
    assert!(counts.values().all(|count| (4..=12).contains(count)), "eight each would be even: {counts:?}");
    // Each knows only its own requests.
    let unknown = cluster.others[0].get("/v1/requests/spread-0/why").await?;
    assert_eq!(unknown.status, 404);
    cluster.stop().await
}
