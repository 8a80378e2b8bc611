//! `schemathesis` makes requests out of `openapi.json`, right ones and wrong ones: no answer is a 5xx, and every one is as described.

use anyhow::Context;
use cluster_tests::{
    Client,
    process::{Baton, free_address},
    root,
};
use std::{process::Stdio, time::Duration};
use tokio::process::Command;

const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_made_from_the_description_find_it_true() -> anyhow::Result<()> {
    let server = Server::start().await;
    server.ask("examples,coverage,fuzzing", 60, 1, Duration::from_secs(400)).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "20,000 requests, others each time; takes long"]
async fn many_requests_made_from_the_description_find_it_true() -> anyhow::Result<()> {
    let server = Server::start().await;
    let mut cases = 0;
    // Many small runs: the more examples it has of the large bodies, the less of its time goes into new ones.
    while cases < 20_000 {
        cases += server.ask("fuzzing", 100, rand::random(), Duration::from_secs(3600)).await?;
        println!("{cases} cases so far");
    }
    Ok(())
}

struct Server {
    address: String,
    baton: Baton,
}

impl Server {
    async fn start() -> Self {
        let address = free_address().to_string();
        let mut baton = Baton::start(&["up", "--listen", &address, "--kv-memory", "64MiB"]);
        baton.ready(&Client::new(format!("http://{address}")), "/readyz", Duration::from_secs(20)).await;
        Self { address, baton }
    }

    /// Makes `examples` requests for each operation with a body, and with phase `coverage` those that the description's bounds
    /// suggest. Returns how many it made.
    async fn ask(&self, phases: &str, examples: u32, seed: u32, patience: Duration) -> anyhow::Result<u32> {
        let program = root().join(".venv/bin/schemathesis");
        assert!(program.exists(), "{} is missing; run tests/servers/install.sh", program.display());
        let work = tempfile::tempdir()?;
        let mut command = Command::new(program);
        command
            .args(["run", &format!("http://{}/openapi.json", self.address)])
            .args(["--checks", CHECKS, "--phases", phases, "--max-examples", &examples.to_string()])
            .args(["--seed", &seed.to_string(), "--no-shrink", "--generation-database", "none"])
            .args(["--request-timeout", "60", "--no-color", "--continue-on-failure"])
            // How fast requests are made says something of this machine only.
            .args(["--suppress-health-check", "too_slow"])
            .env("SCHEMATHESIS_HOOKS", "fuzz_hooks")
            .env("PYTHONPATH", root().join("tests/clients"))
            .current_dir(work.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(patience, command.output()).await??;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println!("{stdout}");
        assert!(output.status.success(), "{stdout}\n{stderr}\n{}", self.baton.output());
        let told =
            stdout.lines().find_map(|line| line.trim().split_once(" generated")?.0.replace(',', "").parse().ok());
        told.with_context(|| format!("it does not say how many requests it made:\n{stdout}"))
    }
}
