//! The real services in one process, through the same `run` that the binary calls.

use crate::{Client, demo_model};
use cluster::{Directory, MemoryDirectory};
use engine::speculation::Speculator;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Clusters of one process share its metrics, so tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// What to start.
#[derive(Clone, Debug)]
pub struct TestCluster {
    model: PathBuf,
    prefill: usize,
    decode: usize,
    engine: engine::Config,
    transport: Option<kv_transfer::TransportKind>,
    placement: router::Policy,
    adapters: BTreeMap<String, PathBuf>,
    runtime_lora: bool,
    speculation: Speculation,
}

/// What guesses tokens on the decode workers.
#[derive(Clone, Debug, Default)]
pub enum Speculation {
    /// Nothing.
    #[default]
    Off,
    /// What the sequence said before.
    Ngrams,
    /// The model in this directory.
    Draft(PathBuf),
}

impl TestCluster {
    /// One prefill and one decode worker with the bundled model; the router decides the placement.
    pub fn new() -> Self {
        Self {
            model: demo_model(),
            prefill: 1,
            decode: 1,
            engine: engine::Config { threads: Some(1), kv_bytes: Some(64 << 20), ..Default::default() },
            transport: None,
            placement: router::Policy::Auto,
            adapters: BTreeMap::new(),
            runtime_lora: false,
            speculation: Speculation::Off,
        }
    }

    /// Serves the checkpoint in `dir`.
    pub fn model(mut self, dir: PathBuf) -> Self {
        self.model = dir;
        self
    }

    /// Starts this many workers of each role.
    pub fn workers(mut self, prefill: usize, decode: usize) -> Self {
        (self.prefill, self.decode) = (prefill, decode);
        self
    }

    /// Changes the engines' settings.
    pub fn engine(mut self, change: impl FnOnce(&mut engine::Config)) -> Self {
        change(&mut self.engine);
        self
    }

    /// Lets hand-offs travel this way only.
    pub fn transport(mut self, kind: kv_transfer::TransportKind) -> Self {
        self.transport = Some(kind);
        self
    }

    /// Forces a kind of placement.
    pub fn placement(mut self, mode: router::Policy) -> Self {
        self.placement = mode;
        self
    }

    /// Serves the adapter in `dir` as `name`, from the start.
    pub fn adapter(mut self, name: &str, dir: PathBuf) -> Self {
        self.adapters.insert(name.into(), dir);
        self
    }

    /// Lets clients load and unload adapters.
    pub fn runtime_lora(mut self) -> Self {
        self.runtime_lora = true;
        self
    }

    /// Guesses tokens on the decode workers.
    pub fn speculation(mut self, speculation: Speculation) -> Self {
        self.speculation = speculation;
        self
    }

    /// Starts everything and waits until a whole path exists.
    pub async fn start(self) -> anyhow::Result<Running> {
        let turn = TURN.lock().await;
        let telemetry = telemetry::init(&telemetry::Config { log: "warn".into(), ..Default::default() }, "tests")?;
        let shutdown = CancellationToken::new();
        let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::default());
        let model = engine::Model::load(&self.model, &mut |_| {})?;
        let mut tasks = JoinSet::new();

        for i in 0..self.prefill {
            let engine = engine::Engine::new(model.clone(), &self.engine)?;
            let config = prefill_worker::Config {
                name: Some(format!("prefill-{i}")),
                model_name: "test".into(),
                transfer: self.transfer(),
                adapters: self.adapters.clone(),
                ..Default::default()
            };
            tasks.spawn(prefill_worker::run(config, engine, directory.clone(), health(), shutdown.clone()));
        }
        for i in 0..self.decode {
            let engine = engine::Engine::new(model.clone(), &self.engine)?;
            let config = decode_worker::Config {
                name: Some(format!("decode-{i}")),
                model_name: "test".into(),
                transfer: self.transfer(),
                adapters: self.adapters.clone(),
                ..Default::default()
            };
            let speculator = self.speculator(&engine)?;
            tasks.spawn(decode_worker::run(config, engine, speculator, directory.clone(), health(), shutdown.clone()));
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let client = Client::new(format!("http://{}", listener.local_addr()?));
        let config = router::Config {
            model_dir: self.model.clone(),
            model_name: "test".into(),
            placement: self.placement,
            runtime_lora: self.runtime_lora,
            cache_reset: true,
            ..Default::default()
        };
        tasks.spawn(router::run(config, listener, directory.clone(), health(), shutdown.clone()));

        let running = Running { client, directory, tasks, shutdown, _telemetry: telemetry, _turn: turn };
        running.until_ready(self.prefill + self.decode).await?;
        Ok(running)
    }

    fn speculator(&self, engine: &engine::Engine) -> anyhow::Result<Option<Speculator>> {
        Ok(match &self.speculation {
            Speculation::Off => None,
            Speculation::Ngrams => Some(Speculator::ngrams(4)),
            Speculation::Draft(dir) => {
                Some(Speculator::draft(engine.draft(engine::Model::load(dir, &mut |_| {})?)?, 4))
            }
        })
    }

    fn transfer(&self) -> kv_transfer::Config {
        kv_transfer::Config { require: self.transport, ..Default::default() }
    }
}

impl Default for TestCluster {
    fn default() -> Self {
        Self::new()
    }
}

fn health() -> telemetry::Health {
    telemetry::Health::new("starting", Duration::from_secs(30))
}

/// A running cluster. Dropping it stops everything without draining; [`Running::stop`] drains.
#[derive(Debug)]
pub struct Running {
    /// Talks to the router.
    pub client: Client,
    /// Where the members are.
    pub directory: Arc<dyn Directory>,
    tasks: JoinSet<anyhow::Result<()>>,
    shutdown: CancellationToken,
    _telemetry: telemetry::Guard,
    _turn: MutexGuard<'static, ()>,
}

impl Running {
    async fn until_ready(&self, workers: usize) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let fleet = self.client.metric("baton_fleet_workers", &[]).await.unwrap_or(0.0);
            let ready = self.client.get("/readyz").await.is_ok_and(|answer| answer.status == 200);
            if ready && fleet >= workers as f64 {
                return Ok(());
            }
            anyhow::ensure!(tokio::time::Instant::now() < deadline, "no whole path after 20 s ({fleet} workers)");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops accepting, finishes what is there, leaves. Returns the first error of any part.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        while let Some(part) = tokio::time::timeout(Duration::from_secs(30), self.tasks.join_next()).await? {
            part??;
        }
        Ok(())
    }
}
