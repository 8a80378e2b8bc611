//! The router: OpenAI's API in front, the cluster behind.
//!
//! To follow one request, read `request` first; it names the files in the order in which a request meets them. Text lives
//! only in this crate: clients speak text, workers see token ids. The router holds no tensors and no weights.
//!
//! | file | what it is |
//! |---|---|
//! | `http`, `openai/` | routes, the API's shapes, server-sent events |
//! | `admission` | how much is taken on |
//! | `text/` | templates, tokens, incremental text, stop strings |
//! | `prompt`, `request`, `attempt`, `recovery` | what is asked; one request's life; one try at it; what to do when a try fails |
//! | `fleet/` | the workers: one stream each, their load, the only place with wire types |
//! | `prefix_index`, `cost`, `placement` | who holds which prefix, what a placement costs, which one it is |
#![forbid(unsafe_code)]

mod admission;
mod attempt;
mod config;
mod cost;
mod error;
mod fleet;
#[cfg(test)]
mod golden;
mod http;
mod metrics;
mod openai;
mod placement;
mod prefix_index;
mod prompt;
mod recovery;
mod request;
mod text;

pub use config::{Config, Limits, Policy, Weights};

use crate::{admission::Admission, fleet::Fleet, metrics::Metrics, request::Router};
use anyhow::Context;
use axum::serve::ListenerExt;
use cluster::{Capacity, Directory, LoadSummary, Member, Registration, Role, State};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use telemetry::Health;
use text::{TextModel, TextPool};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Reads the text of a model as [`run`] does, encodes and renders a little with it, and forgets it: what fuzzing calls.
#[cfg(fuzzing)]
pub fn fuzz_model(path: &std::path::Path) {
    let Ok(model) = TextModel::load(path) else { return };
    for text in ["", "Hello, w\u{f6}rld 12\n", "<s>\u{2581}\u{1f600}</s>"] {
        if let Ok(ids) = model.tokenizer.encode(text, true) {
            model.tokenizer.decode(&ids, true);
            ids.iter().for_each(|id| drop(model.tokenizer.bytes(*id).to_vec()));
        }
    }
    if let Some(template) = &model.template {
        let input = text::template::ChatInput {
            messages: vec![serde_json::json!({"role": "user", "content": "Hi"})],
            add_generation_prompt: true,
            ..Default::default()
        };
        let _ = template.render(&input);
    }
}

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
    let model = tokio::task::spawn_blocking(move || TextModel::load(&dir)).await.context("load tokenizer")??;
    let address = listener.local_addr().context("read the listener's address")?;
    let me = member(&config, address);
    tracing::info!(id = %me.id, %address, model = %config.model_name, "router starts");

    let metrics = Metrics::new();
    let stop_fleet = CancellationToken::new();
    let _stop_fleet = stop_fleet.clone().drop_guard();
    let fleet = Fleet::start(&config, &me.id, &*directory, metrics.clone(), stop_fleet.clone());
    let router = Arc::new(Router {
        model: Arc::new(model),
        text: TextPool::new(config.text_threads),
        fleet: fleet.clone(),
        admission: Admission::new(&config.limits, metrics.clone()),
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
    let mut serving = serve(router.clone(), listener, health, shutdown.clone());

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

type Serving = AbortOnDropHandle<std::io::Result<()>>;

/// Accepts connections until `shutdown`; ends when the last one has.
fn serve(router: Arc<Router>, listener: TcpListener, health: Health, shutdown: CancellationToken) -> Serving {
    let listener = listener.tap_io(|socket| {
        // Without it a small write may wait 40 ms for the other side's delayed acknowledgement.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "set TCP_NODELAY");
        }
    });
    let routes = http::routes(http::Service { router, health });
    let server = axum::serve(listener, routes).with_graceful_shutdown(shutdown.cancelled_owned());
    AbortOnDropHandle::new(tokio::spawn(server.into_future()))
}

/// Lets open streams finish, for a while; then ends them with an error that can be retried.
async fn drain(router: &Router, serving: &mut Serving, registration: Option<&Registration>) -> anyhow::Result<()> {
    let limit = router.config.limits.drain_timeout();
    tracing::info!(?limit, "router drains");
    if let Some(registration) = registration {
        registration.set_state(State::Draining);
    }
    if let Ok(served) = timeout(limit, &mut *serving).await {
        return flatten(served);
    }
    tracing::warn!(?limit, "streams were still open at the end of the drain; they end with an error");
    router.abort.cancel();
    match timeout(router.config.limits.probe_timeout(), serving).await {
        Ok(served) => flatten(served),
        Err(_) => Ok(()),
    }
}

fn flatten(served: Result<std::io::Result<()>, tokio::task::JoinError>) -> anyhow::Result<()> {
    served.context("serve HTTP")?.context("serve HTTP")
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
