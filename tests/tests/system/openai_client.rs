//! The official `openai` Python client, pointed at us. `tests/servers/install.sh` makes its virtual environment.

use cluster_tests::{
    Client,
    process::{Baton, free_address},
    root,
};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_with_the_openai_client() -> anyhow::Result<()> {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing; run tests/servers/install.sh", python.display());
    let address = free_address().to_string();
    let url = format!("http://{address}");
    let mut baton = Baton::start(&["up", "--listen", &address, "--placement", "remote", "--kv-memory", "64MiB"]);
    baton.ready(&Client::new(&url), "/readyz", Duration::from_secs(20)).await;

    let script = root().join("tests/clients/openai_chat.py");
    let run = tokio::process::Command::new(python).arg(script).arg(&url).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(90), run).await??;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}\n{}", baton.output());
    Ok(())
}
