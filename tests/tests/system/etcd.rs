//! Separate processes joined by a real etcd.

use anyhow::Context;
use cluster::{Directory, EtcdDirectory, View};
use cluster_tests::{
    Client,
    process::{Baton, free_address},
};
use futures::{StreamExt, stream};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

pub(crate) use cluster_tests::etcd::Etcd;

/// A worker process and a client for its metrics. It finds its other ports by itself.
pub(crate) struct Worker {
    pub(crate) process: Baton,
    pub(crate) admin: Client,
}

impl Worker {
    pub(crate) fn start(role: &str, name: &str, etcd: &str) -> Self {
        let admin = free_address().to_string();
        let arguments =
            [role, "--etcd", etcd, "--name", name, "--admin-listen", &admin, "--threads", "1", "--kv-memory", "64MiB"];
        Self { process: Baton::start(&arguments), admin: Client::new(format!("http://{admin}")) }
    }
}

/// Waits until the router sees `count` workers that are ready.
pub(crate) async fn wait_for_fleet(client: &Client, count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let ready = client.metric("baton_fleet_workers", &[]).await?;
        if ready >= count as f64 {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "{ready} of {count} workers after 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends 200 requests of mixed lengths, 16 at a time; every one must succeed.
async fn two_hundred_requests(client: &Client, seed: u64) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let requests: Vec<_> = (0..200)
        .map(|i| {
            let words = random.random_range(1..600);
            json!({
                "prompt": format!("Request {i}. {}", "page ".repeat(words)),
                "max_tokens": random.random_range(1..80), "temperature": 0.8, "seed": i, "ignore_eos": true,
            })
        })
        .collect();
    let failures: Vec<String> = stream::iter(requests)
        .map(|request| async move {
            match client.post("/v1/completions", &request).await {
                Ok(answer) if answer.status == 200 => {
                    let tokens = answer.json()["usage"]["completion_tokens"].clone();
                    (tokens != request["max_tokens"]).then(|| format!("{tokens} tokens for {request}"))
                }
                Ok(answer) => Some(format!("{}: {}", answer.status, answer.text)),
                Err(error) => Some(error.to_string()),
            }
        })
        .buffer_unordered(16)
        .filter_map(|failure| async move { failure })
        .collect()
        .await;
    anyhow::ensure!(failures.is_empty(), "{} of 200 requests failed: {:?}", failures.len(), failures.first());
    Ok(())
}

/// Returns every member's incarnation as the directory shows it now.
fn lives(observer: &watch::Receiver<Arc<View>>) -> Vec<(String, u64)> {
    observer.borrow().members.values().map(|member| (member.id.clone(), member.incarnation)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_processes_serve_through_the_death_of_etcd() -> anyhow::Result<()> {
    let address = free_address().to_string();
    let client = Client::new(format!("http://{address}"));

    // The processes come before etcd does: they wait, say so, and go on when it appears.
    let mut etcd = Etcd::reserve();
    let url = etcd.endpoint();
    let prefill = Worker::start("prefill-worker", "prefill-0", &url);
    let decode = Worker::start("decode-worker", "decode-0", &url);
    let mut router = Baton::start(&["router", "--listen", &address, "--etcd", &url]);
    let deadline = Instant::now() + Duration::from_secs(20);
    for process in [&prefill.process, &decode.process, &router] {
        while !process.output().contains("etcd cannot be used") {
            anyhow::ensure!(Instant::now() < deadline, "nothing says that etcd is missing: {}", process.output());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    etcd.restart();
    router.ready(&client, "/readyz", Duration::from_secs(20)).await;
    wait_for_fleet(&client, 2).await?;

    let directory = EtcdDirectory::connect(vec![url], "baton")?;
    let mut observer = directory.watch();
    two_hundred_requests(&client, 1).await?;
    let links = prefill.admin.metric("baton_handoff_links", &["side=\"source\"", "transport=\"shm\""]).await?;
    anyhow::ensure!(links == 1.0, "{links} links through shared memory between processes of one host");

    // etcd dies while the next 200 run: nobody notices.
    let (served, ()) = tokio::join!(two_hundred_requests(&client, 2), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        etcd.kill();
    });
    served?;

    // It comes back, empty handed: everyone is registered again within five seconds, in a new life.
    let lives = lives(&observer);
    anyhow::ensure!(lives.len() == 3, "{lives:?}");
    etcd.wipe();
    etcd.restart();
    let back = Instant::now();
    let all_new = |view: &Arc<View>| {
        view.connected && lives.iter().all(|(id, life)| view.members.get(id).is_some_and(|m| m.incarnation > *life))
    };
    tokio::time::timeout(Duration::from_secs(5), observer.wait_for(all_new)).await.context("5 s")??;
    println!("all registered {:?} after etcd answered", back.elapsed());
    two_hundred_requests(&client, 3).await?;

    // A worker told to stop drains and leaves the directory.
    decode.process.signal("TERM");
    let (code, output) = decode.process.exit(Duration::from_secs(15)).await;
    assert_eq!(code, Some(0), "{output}");
    let left = |view: &Arc<View>| !view.members.contains_key("decode-0");
    tokio::time::timeout(Duration::from_secs(2), observer.wait_for(left)).await.context("decode-0 leaves")??;
    Ok(())
}
