//! The processes that are measured: started from this very binary, killed when dropped.

use super::mock::{MOCKS, Mocks, PAGE_TOKENS, PAGES, VOCAB};
use crate::{
    config, model,
    settings::{Dialect, ModelChoice, Placement, Tables},
};
use anyhow::{Context, ensure};
use cluster::{Capacity, Directory, LoadSummary, Member, MemoryDirectory, ModelCard, Role, State};
use std::{
    net::SocketAddr,
    process::{Child as Process, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use telemetry::Health;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Longest a child may take to answer.
const START: Duration = Duration::from_secs(20);
/// Streams that the router lets in at once: more than are opened.
const MAX_STREAMS: usize = 16 << 10;

/// A running child.
pub(super) struct Child {
    pub(super) address: SocketAddr,
    process: Process,
}

impl Child {
    /// Starts the plain server.
    pub(super) async fn plain() -> anyhow::Result<Self> {
        Self::start(&["--serve", "plain"]).await.context("start the plain server")
    }

    /// Starts a router for the mocks and waits until it is ready.
    pub(super) async fn router(mocks: &Mocks) -> anyhow::Result<Self> {
        let workers = mocks.all.each_ref().map(|mock| mock.address.to_string()).join(",");
        Self::start(&["--serve", "router", "--workers", &workers]).await.context("start the router")
    }

    /// Starts this binary as a child. It prints its address once it is ready.
    async fn start(args: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this binary")?;
        let mut process = Command::new(program).arg("bench").args(args).stdout(Stdio::piped()).spawn()?;
        let stdout = process.stdout.take().context("its output is piped")?;
        let stdout = tokio::process::ChildStdout::from_std(stdout)?;
        let mut child = Self { address: SocketAddr::from(([0, 0, 0, 0], 0)), process };
        let line =
            timeout(START, BufReader::new(stdout).lines().next_line()).await.context("wait for its address")??;
        child.address = line.context("it ended")?.parse().context("read its address")?;
        Ok(child)
    }

    /// Returns the process id.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended already; either way nothing of it is left afterwards.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs the router of the bench: prints its address once the mocks are attached, then serves until killed.
pub(super) fn router(workers: &[SocketAddr]) -> anyhow::Result<()> {
    ensure!(workers.len() == MOCKS.len(), "--workers: expected the addresses of two prefill and two decode workers");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let located = model::locate(&ModelChoice { model: None, model_name: Some("bench".into()) })?;
        let mut config =
            config::router(&Tables::default(), &located, Placement::Remote, false, &Dialect::default(), None)?;
        config.limits.max_concurrent = MAX_STREAMS;
        let directory = Arc::new(MemoryDirectory::default());
        let mut registrations = Vec::new();
        for ((role, name), address) in MOCKS.into_iter().zip(workers) {
            registrations.push(directory.register(member(role, name, *address)).await?);
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.context("bind the router")?;
        let address = listener.local_addr().context("read the bound address")?;
        let health = Health::new("waiting for workers", Duration::from_secs(60));
        let announce = async {
            timeout(START, crate::up::ready(std::slice::from_ref(&health)))
                .await
                .context("wait for the mock workers")?;
            println!("{address}");
            std::future::pending::<anyhow::Result<()>>().await
        };
        tokio::select! {
            ended = ::router::run(config, listener, directory, health.clone(), CancellationToken::new()) => ended,
            failed = announce => failed,
        }
    })
}

fn member(role: Role, name: &str, address: SocketAddr) -> Member {
    Member {
        id: name.to_owned(),
        incarnation: 1,
        role,
        state: State::Ready,
        address: address.to_string(),
        link: address.to_string(),
        model: Some(ModelCard {
            name: "bench".into(),
            fingerprint: "bench".into(),
            max_model_len: 1 << 17,
            vocab_size: VOCAB,
            page_tokens: PAGE_TOKENS,
            page_bytes: 1 << 16,
        }),
        capacity: Capacity { pages: PAGES, sequences: MAX_STREAMS as u32, token_budget: 8192 },
        load: LoadSummary { running: 0, waiting: 0, pages_free: PAGES },
    }
}
