//! The life of a worker, the same for both kinds: bind, start the step thread, join the directory, serve, drain, leave.
//!
//! What a kind of worker does with its submissions is its [`Stepper`].

use crate::{Inbox, Load, Profile, Stepper, advertised, cards, serve, start_thread};
use anyhow::{Context, anyhow, bail, ensure};
use cluster::{Capacity, Directory, LoadSummary, Member, ModelCard, Registration, Role, State};
use engine::{
    Adapters, Engine,
    scheduler::{self, Scheduler},
};
use kv_transfer::{Identity, Pool, Transfer};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use telemetry::Health;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

/// Commands of routers that wait for the end of a step. Full: the routers' streams wait.
const COMMANDS: usize = 1024;
/// Events of hand-offs that wait for the end of a step. Full: the links wait.
const EVENTS: usize = 1024;
/// How often the directory hears of the load.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);
/// Longest the last frames and hand-offs may take to leave.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a worker is told about itself.
#[derive(Clone, Debug)]
pub struct Slot {
    /// What it does.
    pub role: Role,
    /// Member id; `None` draws one.
    pub name: Option<String>,
    /// Name clients ask for.
    pub model_name: String,
    /// Where routers connect. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Host, or `host:port`, that routers are told; `None` = the bound address.
    pub advertise: Option<String>,
    /// The hand-off.
    pub transfer: kv_transfer::Config,
    /// Most sequences in the scheduler's line.
    pub max_waiting: usize,
    /// Adapters to begin with: name and PEFT directory.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Largest rank of an adapter.
    pub max_lora_rank: usize,
    /// Longest that running sequences may take to finish at the end.
    pub drain_timeout: Duration,
}

impl Slot {
    /// Checks what types cannot say. Errors name the field.
    pub fn validate(&self) -> anyhow::Result<()> {
        ensure!(self.name.as_deref() != Some(""), "name: must not be empty");
        ensure!(!self.model_name.is_empty(), "model_name: must not be empty");
        ensure!(self.max_waiting > 0, "max_waiting: must be at least 1");
        ensure!(!self.adapters.contains_key(""), "adapters: a name must not be empty");
        ensure!(self.max_lora_rank > 0, "max_lora_rank: must be at least 1");
        Ok(())
    }

    fn role_name(&self) -> &'static str {
        match self.role {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Router => unreachable!("a router has no step thread"),
        }
    }
}

/// What a step thread is made of.
#[derive(Debug)]
pub struct Parts {
    /// Member id.
    pub worker: String,
    /// Name clients ask for.
    pub model_name: String,
    /// The model over its pages.
    pub engine: Engine,
    /// Which sequences a step holds.
    pub scheduler: Scheduler,
    /// The hand-offs.
    pub transfer: Transfer,
    /// What routers ask and hand-offs report.
    pub inbox: Inbox<kv_transfer::Event>,
    /// Where the load goes that the directory hears of.
    pub load: watch::Sender<Load>,
    /// What probes are told.
    pub health: Health,
}

/// Serves as `slot` says until `shutdown`, then finishes what is there, for at most the drain timeout. `stepper` makes the step
/// thread's state.
///
/// # Errors
/// When an address cannot be bound, the directory refuses the name, or the step thread dies.
pub async fn live<S: Stepper>(
    slot: Slot,
    engine: Engine,
    directory: Arc<dyn Directory>,
    health: Health,
    shutdown: CancellationToken,
    stepper: impl FnOnce(Parts) -> S,
) -> anyhow::Result<()> {
    slot.validate()?;
    let mut worker = Worker::start(&slot, engine, &health, stepper).await?;
    let registration = tokio::select! {
        registered = directory.register(worker.member.clone()) => registered.with_context(|| format!("register {} worker", slot.role_name()))?,
        () = shutdown.cancelled() => return worker.leave().await,
        died = &mut worker.stepped => return Err(describe(died)),
    };
    health.ready();
    tracing::info!(worker = worker.member.id, address = worker.member.address, role = slot.role_name(), "worker ready");
    tokio::select! {
        () = shutdown.cancelled() => {}
        died = &mut worker.stepped => {
            registration.leave().await;
            return Err(describe(died));
        }
        served = &mut worker.served => {
            registration.leave().await;
            served.context("serve routers")?.context("serve routers")?;
            bail!("the gRPC service ended by itself");
        }
        () = publish_load(&registration, worker.load.clone()) => unreachable!("load is published for ever"),
    }
    tracing::info!(worker = worker.member.id, role = slot.role_name(), "worker drains");
    health.not_ready("draining");
    registration.set_state(State::Draining);
    let drained = worker.drain(slot.drain_timeout).await;
    registration.leave().await;
    drained.and(worker.leave().await)
}

/// The running parts.
#[derive(Debug)]
struct Worker {
    member: Member,
    transfer: Transfer,
    load: watch::Receiver<Load>,
    /// Asks the step thread to take nothing new and to end when it has nothing left.
    drain: CancellationToken,
    /// Ends the step thread and the links at once.
    stop: CancellationToken,
    _stop: DropGuard,
    /// Ends the routers' streams. Not before the step thread has had its last word on them.
    close: DropGuard,
    /// How the step thread ended, and why if that was before its time.
    stepped: oneshot::Receiver<Result<(), String>>,
    served: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    _cards: Option<AbortOnDropHandle<()>>,
}

impl Worker {
    async fn start<S: Stepper>(
        slot: &Slot,
        engine: Engine,
        health: &Health,
        stepper: impl FnOnce(Parts) -> S,
    ) -> anyhow::Result<Self> {
        let (drain, stop, close) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let guard = stop.clone().drop_guard();
        let listener = TcpListener::bind(slot.listen).await.with_context(|| format!("listen: bind {}", slot.listen))?;
        let adapters = load_adapters(slot, &engine).await?;
        let scheduler = Scheduler::new(limits(slot, &engine))?;
        let mut member = describe_member(slot, &engine, &scheduler);
        member.address = advertised(slot.advertise.as_deref(), listener.local_addr()?);

        let (events_sender, events) = mpsc::channel(EVENTS);
        let (commands_sender, commands) = mpsc::channel(COMMANDS);
        let identity = Identity {
            worker: member.id.clone(),
            incarnation: member.incarnation,
            fingerprint: engine.fingerprint().to_owned(),
            layout: engine.memory().layout().clone(),
            rank: Default::default(),
        };
        let profile = Profile {
            worker: member.id.clone(),
            incarnation: member.incarnation,
            vocab_size: engine.model().info().vocab_size,
            page_tokens: engine.memory().layout().page_tokens as usize,
            eos: engine.model().info().eos.clone(),
            adapters: Some(adapters),
            model: Some(engine.model().clone()),
        };
        let memory = engine.memory().clone();
        let cards = cards::follow(&engine);
        let pool = Pool { file: memory.file(), backing: engine.backing() };
        let transfer = Transfer::start(slot.transfer.clone(), identity, pool, events_sender, stop.clone()).await?;
        member.link = transfer.address();

        let (load_sender, load) = watch::channel(Load::default());
        let parts = Parts {
            worker: member.id.clone(),
            model_name: slot.model_name.clone(),
            engine,
            scheduler,
            transfer: transfer.clone(),
            inbox: Inbox::new(commands, events, drain.clone(), stop.clone()).context("start step thread")?,
            load: load_sender,
            health: health.clone(),
        };
        let stepped =
            start_thread(&format!("{}-step", slot.role_name()), stepper(parts)).context("start step thread")?;
        let served = tokio::spawn(serve(listener, profile, commands_sender, close.clone()));
        let close = close.drop_guard();
        Ok(Self { member, transfer, load, drain, stop, _stop: guard, close, stepped, served, _cards: cards })
    }

    /// Lets the step thread finish what it has.
    async fn drain(&mut self, limit: Duration) -> anyhow::Result<()> {
        self.drain.cancel();
        if let Ok(ended) = timeout(limit, &mut self.stepped).await {
            return ended.unwrap_or(Ok(())).map_err(|problem| anyhow!("step thread: {problem}"));
        }
        tracing::warn!(worker = self.member.id, ?limit, "drain timeout: what is left fails");
        self.stop.cancel();
        let _ = timeout(FAREWELL, &mut self.stepped).await;
        Ok(())
    }

    /// Lets the last frames and hand-offs out, then stops the rest.
    async fn leave(self) -> anyhow::Result<()> {
        let left = self.transfer.drain(FAREWELL).await;
        if left > 0 {
            tracing::warn!(worker = self.member.id, handoffs = left, "hand-offs cut off");
        }
        self.stop.cancel();
        drop(self.close);
        match timeout(FAREWELL, self.served).await {
            Ok(served) => served.context("serve routers")?.context("serve routers"),
            Err(_) => Ok(()),
        }
    }
}

/// Says why the step thread ended although nobody had asked it to.
fn describe(died: Result<Result<(), String>, oneshot::error::RecvError>) -> anyhow::Error {
    match died {
        Ok(Err(problem)) => anyhow!("step thread: {problem}"),
        _ => anyhow!("the step thread ended by itself"),
    }
}

async fn publish_load(registration: &Registration, load: watch::Receiver<Load>) {
    let mut ticks = interval(LOAD_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let load = *load.borrow();
        registration.set_load(LoadSummary {
            running: load.running as u32,
            waiting: load.waiting as u32,
            pages_free: load.pages_free as u32,
        });
    }
}

/// Reads the adapters that the worker begins with.
async fn load_adapters(slot: &Slot, engine: &Engine) -> anyhow::Result<Arc<Adapters>> {
    let adapters = Arc::new(Adapters::new(engine.model().clone(), slot.max_lora_rank));
    let (named, loading) = (slot.adapters.clone(), adapters.clone());
    let load = move || {
        named.iter().try_for_each(|(name, dir)| {
            loading.load(name, dir).map(drop).with_context(|| format!("load adapter {name}"))
        })
    };
    tokio::task::spawn_blocking(load).await.context("load adapters")??;
    Ok(adapters)
}

fn limits(slot: &Slot, engine: &Engine) -> scheduler::Limits {
    let layout = engine.memory().layout();
    scheduler::Limits {
        pages: layout.pages as usize,
        page_tokens: layout.page_tokens as usize,
        token_budget: engine.config().token_budget as usize,
        max_sequences: engine.config().max_sequences as usize,
        max_model_len: engine.max_model_len(),
        max_waiting: slot.max_waiting,
    }
}

/// Describes the worker as far as it is known before its addresses are.
fn describe_member(slot: &Slot, engine: &Engine, scheduler: &Scheduler) -> Member {
    let (info, layout) = (engine.model().info(), engine.memory().layout());
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Member {
        id: slot.name.clone().unwrap_or_else(|| format!("{}-{:08x}", slot.role_name(), rand::random::<u32>())),
        incarnation: started.as_micros() as u64,
        role: slot.role,
        state: State::Ready,
        address: String::new(),
        link: String::new(),
        model: Some(ModelCard {
            name: slot.model_name.clone(),
            fingerprint: engine.fingerprint().to_owned(),
            max_model_len: scheduler.max_len() as u32,
            vocab_size: info.vocab_size,
            page_tokens: layout.page_tokens,
            page_bytes: layout.page_bytes() as u64,
        }),
        capacity: Capacity {
            pages: layout.pages,
            sequences: scheduler.max_sequences() as u32,
            token_budget: engine.config().token_budget,
        },
        load: LoadSummary::default(),
    }
}
