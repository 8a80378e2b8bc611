//! Clients that people use, pointed at us: each holds conversations, streams, calls tools and meets errors (`tests/clients/`).
//! `tests/servers/install.sh` installs them.

use cluster_tests::{
    Client,
    process::{Baton, free_address},
    root,
};
use std::{path::PathBuf, time::Duration};
use tokio::process::Command;

const PYTHON: &str = ".venv/bin/python";
/// Frameworks that want an older `openai` than the newest.
const FRAMEWORKS: &str = ".test-servers/frameworks/bin/python";
const NODE_MODULES: &str = "tests/clients/node_modules";

/// Longest that a script may take: importing some of these takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

fn installed(path: &str) -> PathBuf {
    let path = root().join(path);
    assert!(path.exists(), "{} is missing; run tests/servers/install.sh", path.display());
    path
}

/// Runs scripts one after the other against one cluster.
async fn converse(mut scripts: Vec<(&'static str, Command)>) -> anyhow::Result<()> {
    let address = free_address().to_string();
    let url = format!("http://{address}");
    let mut baton = Baton::start(&[
        "up",
        "--listen",
        &address,
        "--placement",
        "remote",
        "--kv-memory",
        "64MiB",
        "--embedding-pooling",
        "last",
    ]);
    baton.ready(&Client::new(&url), "/readyz", Duration::from_secs(20)).await;
    for (script, command) in &mut scripts {
        let run = command.arg(root().join("tests/clients").join(*script)).arg(&url).kill_on_drop(true).output();
        let output = tokio::time::timeout(PATIENCE, run).await??;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script}: {stdout}\n{stderr}\n{}", baton.output());
        assert!(stdout.trim_end().ends_with("ok"), "{script} did not come to its end: {stdout}\n{stderr}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_with_the_openai_client() -> anyhow::Result<()> {
    let python = || Command::new(installed(PYTHON));
    converse(vec![("openai_chat.py", python()), ("openai_responses.py", python())]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_with_the_anthropic_client() -> anyhow::Result<()> {
    converse(vec![("anthropic_messages.py", Command::new(installed(PYTHON)))]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_through_litellm_and_langchain() -> anyhow::Result<()> {
    let python = || Command::new(installed(FRAMEWORKS));
    converse(vec![("litellm_chat.py", python()), ("langchain_chat.py", python())]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_with_clients_for_node() -> anyhow::Result<()> {
    installed(NODE_MODULES);
    let node = || Command::new("node");
    converse(vec![("openai_chat.mjs", node()), ("ai_sdk.mjs", node())]).await
}
