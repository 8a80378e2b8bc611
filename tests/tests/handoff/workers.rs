//! Workers in this process, on ports of their own, with a small golden checkpoint.

use cluster::{Capacity, Directory, LoadSummary, Member, MemoryDirectory, Role, State, View};
use engine::{Engine, KvMemory, Model};
use kv_cache::{PageId, PageLayout};
use kv_transfer::{Begin, Event, HandoffId, Identity, Outcome, Peer, Transfer};
use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};
use telemetry::Health;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// One prompt of the golden file.
#[derive(Clone, Debug, serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
}

fn checkpoint() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/llama")
}

/// The checkpoint, loaded once for all tests of this process.
pub(crate) fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| Model::load(&checkpoint(), &mut |_| {}).expect("the golden checkpoint loads")).clone()
}

/// The recorded prompts with their greedy continuations.
pub(crate) fn golden() -> Vec<Golden> {
    #[derive(serde::Deserialize)]
    struct Expected {
        prompts: Vec<Golden>,
    }
    let text = std::fs::read_to_string(checkpoint().join("expected.json")).expect("the golden file is there");
    serde_json::from_str::<Expected>(&text).expect("the golden file is well-formed").prompts
}

/// The longest recorded prompt.
pub(crate) fn longest() -> Golden {
    golden().into_iter().max_by_key(|prompt| prompt.ids.len()).expect("there are prompts")
}

/// The recorded prompt with this name.
pub(crate) fn named(name: &str) -> Golden {
    golden().into_iter().find(|prompt| prompt.name == name).expect("the prompt is recorded")
}

/// Bytes of `pages` pages of the checkpoint: 3 layers, keys and values of 2 heads of 16 floats, 16 tokens.
pub(crate) fn kv_bytes(pages: u64) -> u64 {
    pages * 3 * 2 * 2 * 16 * 4 * 16
}

/// What an engine of a test may use.
pub(crate) fn small() -> engine::Config {
    engine::Config {
        kv_bytes: Some(kv_bytes(256)),
        token_budget: 512,
        max_sequences: 32,
        threads: Some(1),
        ..Default::default()
    }
}

/// A running worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) member: Member,
    pub(crate) health: Health,
    pub(crate) shutdown: CancellationToken,
    pub(crate) running: JoinHandle<anyhow::Result<()>>,
}

impl Worker {
    pub(crate) async fn prefill(directory: &MemoryDirectory, name: &str, engine: engine::Config) -> Self {
        let config = prefill_worker::Config { name: Some(name.into()), ..Default::default() };
        Self::prefill_with(directory, config, engine).await
    }

    pub(crate) async fn prefill_with(
        directory: &MemoryDirectory,
        config: prefill_worker::Config,
        engine: engine::Config,
    ) -> Self {
        let name = config.name.clone().expect("tests name their workers");
        let engine = Engine::new(model(), &engine).expect("the engine starts");
        let (health, shutdown) = (health(), CancellationToken::new());
        let shared: Arc<dyn Directory> = Arc::new(directory.clone());
        let running = tokio::spawn(prefill_worker::run(config, engine, shared, health.clone(), shutdown.clone()));
        Self { member: registered(directory, &name).await, health, shutdown, running }
    }

    pub(crate) async fn decode(directory: &MemoryDirectory, name: &str, engine: engine::Config) -> Self {
        let config = decode_worker::Config { name: Some(name.into()), ..Default::default() };
        Self::decode_with(directory, config, engine).await
    }

    pub(crate) async fn decode_with(
        directory: &MemoryDirectory,
        config: decode_worker::Config,
        engine: engine::Config,
    ) -> Self {
        let name = config.name.clone().expect("tests name their workers");
        let engine = Engine::new(model(), &engine).expect("the engine starts");
        let (health, shutdown) = (health(), CancellationToken::new());
        let shared: Arc<dyn Directory> = Arc::new(directory.clone());
        let running = tokio::spawn(decode_worker::run(config, engine, None, shared, health.clone(), shutdown.clone()));
        Self { member: registered(directory, &name).await, health, shutdown, running }
    }

    /// Ends the worker as if its process had died.
    pub(crate) async fn kill(self) {
        self.running.abort();
        assert!(self.running.await.is_err_and(|error| error.is_cancelled()));
    }

    /// Asks it to stop and waits until it has.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        timeout(PATIENCE, self.running).await.expect("the worker stops").expect("the worker does not panic")
    }
}

fn health() -> Health {
    Health::new("starting", Duration::from_secs(60))
}

/// Waits until the directory knows a ready member of this name.
async fn registered(directory: &MemoryDirectory, name: &str) -> Member {
    wait_for(directory, |view| view.members.get(name).filter(|member| member.state == State::Ready).cloned()).await
}

/// Waits until the directory looks as `find` wants it.
pub(crate) async fn wait_for<T>(directory: &MemoryDirectory, find: impl Fn(&View) -> Option<T>) -> T {
    let mut views = directory.watch();
    timeout(PATIENCE, async {
        loop {
            let found = find(&views.borrow_and_update());
            match found {
                Some(found) => return found,
                None => views.changed().await.expect("the directory lives"),
            }
        }
    })
    .await
    .expect("the directory changes in time")
}

/// The sending half of a prefill worker, without an engine: it begins hand-offs and never gets any further.
pub(crate) struct Source {
    pub(crate) member: Member,
    /// Cancel it, and the process is gone.
    pub(crate) alive: CancellationToken,
    transfer: Transfer,
    events: mpsc::Receiver<Event>,
    layout: PageLayout,
    _memory: KvMemory,
}

impl Source {
    pub(crate) async fn start(name: &str) -> Self {
        let engine = Engine::new(model(), &small()).expect("the engine starts");
        let layout = engine.memory().layout().clone();
        let memory = KvMemory::new(layout.clone()).expect("there is memory");
        let identity = Identity {
            worker: name.into(),
            incarnation: 1,
            fingerprint: model().info().fingerprint.clone(),
            layout: layout.clone(),
            rank: Default::default(),
        };
        let (sender, events) = mpsc::channel(16);
        let alive = CancellationToken::new();
        let config = kv_transfer::Config::default();
        let transfer = Transfer::start(config, identity, memory.file(), sender, alive.clone()).await;
        let transfer = transfer.expect("the transfer starts");
        let member = Member {
            id: name.into(),
            incarnation: 1,
            role: Role::Prefill,
            state: State::Ready,
            address: String::new(),
            link: transfer.address(),
            model: None,
            capacity: Capacity::default(),
            load: LoadSummary::default(),
        };
        Self { member, alive, transfer, events, layout, _memory: memory }
    }

    /// Asks for a landing of `tokens` tokens.
    pub(crate) fn begin(&self, handoff: u64, tokens: usize, target: &Member) {
        let pages = (0..self.layout.pages_for(tokens) as u32).map(PageId).collect();
        let Member { id, incarnation, link, .. } = target.clone();
        let target = Peer { worker: id, incarnation, link };
        self.transfer.begin(Begin { handoff: HandoffId(handoff), targets: vec![target], tokens: tokens as u32, pages });
    }

    /// Waits until the one hand-off it has begun is over.
    pub(crate) async fn done(&mut self) -> Outcome {
        match timeout(PATIENCE, self.events.recv()).await {
            Ok(Some(Event::SourceDone { outcome, .. })) => outcome,
            other => panic!("{other:?} is not the end of the hand-off"),
        }
    }
}
