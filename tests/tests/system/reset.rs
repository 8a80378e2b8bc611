//! Prefix caches are forgotten for the asking.

use cluster_tests::{TestCluster, client::Client};
use router::Policy;
use serde_json::json;
use std::time::Duration;

async fn cached(client: &Client) -> anyhow::Result<u64> {
    let prompt = "A prefix cache remembers the pages of prompts. ".repeat(12);
    let answer = client.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 1})).await?;
    anyhow::ensure!(answer.status == 200, "{}", answer.text);
    Ok(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number"))
}

async fn reset(client: &Client) -> anyhow::Result<bool> {
    let answer = client.post("/reset_prefix_cache", &json!({})).await?;
    anyhow::ensure!(answer.status == 200, "{}", answer.text);
    Ok(answer.json()["success"].as_bool().expect("true or false"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cached_is_computed_again_after_a_reset() -> anyhow::Result<()> {
    for placement in [Policy::Local, Policy::Remote] {
        let cluster = TestCluster::new().placement(placement).start().await?;
        let client = &cluster.client;
        assert_eq!(cached(client).await?, 0, "{placement:?}: nobody has asked before");
        assert!(cached(client).await? > 64, "{placement:?}: it is remembered");
        // The last pages come back a moment after the last token.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while !reset(client).await? {
            anyhow::ensure!(
                tokio::time::Instant::now() < deadline,
                "{placement:?}: pages are held for 10 s after the last request"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(cached(client).await?, 0, "{placement:?}: it is forgotten");
        cluster.stop().await?;
    }
    Ok(())
}
