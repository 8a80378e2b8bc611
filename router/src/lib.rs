//! The router: OpenAI's API in front, the cluster behind.
//!
//! To follow one request, read `request` first; it names the files in the order in which a request meets them. Text lives
//! only in this crate: clients speak text, workers see token ids. The router holds no tensors and no weights.
//!
//! | file | what it is |
//! |---|---|
//! | `http`, `openai/` | routes, the API's shapes, server-sent events |
//! | `messages/`, `responses/` | the other two ways to ask for a chat completion |
//! | `server/`, `door/` | connections and TLS; ids, keys, limits of what comes in |
//! | `admission` | waiting for a turn |
//! | `dialect/` | what is reasoning, text and calls of tools in what a model says |
//! | `text/` | templates, tokens, incremental text, stop strings |
//! | `page_names`, `recent` | names of a prompt's pages; what was worked out lately |
//! | `prompt`, `request`, `attempt`, `recovery` | what is asked; one request's life; one try at it; what to do when a try fails |
//! | `fleet/` | the workers: one stream each, their load, the only place with wire types |
//! | `breaker` | which workers are shunned because they keep failing |
//! | `why/` | what became of the last requests, for those who ask |
//!
//! Who takes a request is decided in the crate `placement`, who goes next in the crate `admission`.
#![forbid(unsafe_code)]

mod admission;
mod attempt;
mod breaker;
mod config;
mod dialect;
mod door;
mod error;
mod fleet;
#[cfg(any(fuzzing, test))]
pub mod fuzz;
#[cfg(test)]
mod golden;
mod http;
mod messages;
mod metrics;
mod openai;
mod page_names;
mod prompt;
mod recent;
mod recovery;
mod request;
mod responses;
mod server;
mod text;
mod why;

pub use config::{Config, EmbeddingPooling, KvPeer, KvTransfer, Limits, ReasoningParser, ToolCallParser};
pub use placement::{Policy, Weights};
pub use server::TlsFiles;

use crate::{
    admission::Admission,
    dialect::Dialect,
    door::keys::Keys,
    fleet::{Fleet, leg::Pooling},
    metrics::Metrics,
    page_names::PageNames,
    request::Router,
    server::Tls,
    why::Why,
};
use anyhow::Context;
use cluster::{Capacity, Directory, LoadSummary, Member, Registration, Role, State};
use responses::store::Store;
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use telemetry::Health;
use text::{TextModel, TextPool};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Serves requests on `listener` until `shutdown`, then drains: takes nothing new, lets streams finish for a while, leaves the directory.
///
/// `health` becomes ready when a whole path exists: workers that could take a request from prompt to last token.
pub async fn run(
    config: Config,
    listener: TcpListener,
    directory: Arc<dyn Directory>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    config.validate().map_err(|problem| anyhow::anyhow!("router config: {problem}"))?;
    let dir = config.model_dir.clone();
    let mut model = tokio::task::spawn_blocking(move || TextModel::load(&dir)).await.context("load tokenizer")??;
    model.tokenizer.remember(config.text_cache_bytes / 4 * 3);
    let address = listener.local_addr().context("read the listener's address")?;
    let tls = config.tls.as_ref().map(Tls::load).transpose().context("tls")?.map(Arc::new);
    let keys = Keys::load(&config.api_keys, config.api_key_file.as_deref())?;
    let _keys = keys.clone().map(|keys| AbortOnDropHandle::new(tokio::spawn(keys.follow())));
    let me = member(&config, address);
    tracing::info!(id = %me.id, %address, model = %config.model_name, "router starts");

    let metrics = Metrics::new(&config.model_name);
    let stop_fleet = CancellationToken::new();
    let _stop_fleet = stop_fleet.clone().drop_guard();
    let fleet = Fleet::start(&config, &me.id, &*directory, metrics.clone(), stop_fleet.clone());
    let dialect = Dialect::choose(config.tool_call_parser, config.reasoning_parser, &model);
    tracing::info!(tools = ?dialect.tools, thoughts = ?dialect.thoughts, "the model's dialect");
    let pooling = match config.embedding_pooling {
        EmbeddingPooling::Auto => model.embedding.pooling,
        EmbeddingPooling::None => None,
        EmbeddingPooling::Last => Some(Pooling::Last),
        EmbeddingPooling::Mean => Some(Pooling::Mean),
    };
    let supply = fleet.clone();
    let admission = Admission::new(&config.limits, move || supply.supply(), metrics.clone());
    let _admission = AbortOnDropHandle::new(tokio::spawn(admission.clone().follow()));
    let router = Arc::new(Router {
        model: Arc::new(model),
        dialect,
        pooling,
        text: TextPool::new(config.text_threads),
        keys,
        page_names: PageNames::new(config.text_cache_bytes / 4),
        fleet: fleet.clone(),
        admission: admission.clone(),
        why: Why::new(config.why_bytes),
        responses: Store::new(&config.limits),
        metrics,
        created: me.incarnation / 1_000_000,
        draining: shutdown.clone(),
        abort: CancellationToken::new(),
        config,
    });

    let readiness = report_readiness(fleet.clone(), health.clone(), shutdown.clone());
    let _readiness = AbortOnDropHandle::new(tokio::spawn(readiness));
    // The fleet's view lives as long as the directory: it stays here until the end.
    let joined_directory = directory.clone();
    let mut joining = AbortOnDropHandle::new(tokio::spawn(async move { joined_directory.register(me).await }));
    let routes = http::routes(http::Service { router: router.clone(), health });
    let serving = server::serve(routes, listener, tls, router.config.limits.clone(), shutdown.clone());
    let mut serving = AbortOnDropHandle::new(tokio::spawn(serving));

    let mut registration = None;
    let served = loop {
        tokio::select! {
            () = shutdown.cancelled() => break drain(&router, &mut serving, registration.as_ref()).await,
            served = &mut serving => break flatten(served),
            // Taking requests does not wait for the directory; a name that is taken ends everything.
            joined = &mut joining, if registration.is_none() => match joined.context("register")? {
                Ok(joined) => registration = Some(joined),
                Err(error) => break Err(error.into()),
            },
        }
    };
    if let Some(registration) = registration {
        registration.leave().await;
    }
    stop_fleet.cancel();
    fleet.stopped().await;
    tracing::info!("router stopped");
    served
}

fn member(config: &Config, address: SocketAddr) -> Member {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64);
    Member {
        id: config.name.clone().unwrap_or_else(|| format!("router-{:08x}", rand::random::<u32>())),
        incarnation: started,
        role: Role::Router,
        state: State::Ready,
        address: config.advertise.clone().unwrap_or_else(|| address.to_string()),
        link: String::new(),
        model: None,
        capacity: Capacity::default(),
        load: LoadSummary::default(),
    }
}

type Serving = AbortOnDropHandle<()>;

/// Lets open streams finish, for a while; then ends them with an error that can be retried.
async fn drain(router: &Router, serving: &mut Serving, registration: Option<&Registration>) -> anyhow::Result<()> {
    let limit = router.config.limits.drain_timeout();
    tracing::info!(?limit, "router drains");
    if let Some(registration) = registration {
        registration.set_state(State::Draining);
    }
    let finished = async {
        let served = (&mut *serving).await;
        router.responses.finished().await;
        served
    };
    if let Ok(served) = timeout(limit, finished).await {
        return flatten(served);
    }
    tracing::warn!(?limit, "streams were still open at the end of the drain; they end with an error");
    router.abort.cancel();
    match timeout(router.config.limits.probe_timeout(), serving).await {
        Ok(served) => flatten(served),
        Err(_) => Ok(()),
    }
}

fn flatten(served: Result<(), tokio::task::JoinError>) -> anyhow::Result<()> {
    served.context("serve HTTP")
}

/// Keeps `health` true to what the fleet can do.
async fn report_readiness(fleet: Fleet, health: Health, shutdown: CancellationToken) {
    let mut versions = fleet.versions();
    loop {
        versions.mark_unchanged();
        if shutdown.is_cancelled() {
            health.not_ready("draining");
            return;
        }
        match fleet.has_path(None) {
            true => health.ready(),
            false => health.not_ready("no worker can take a request: waiting for workers"),
        }
        tokio::select! {
            changed = versions.changed() => if changed.is_err() { return },
            () = shutdown.cancelled() => {}
        }
    }
}
