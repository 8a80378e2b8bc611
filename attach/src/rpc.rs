//! The gRPC service: frames of one router, decoded one by one.

use crate::{
    Command, End, LegId, Router, StreamId, Submission,
    outbox::{Frames, outbox},
    routers::encode_ended,
    submission::Model,
};
use engine::{TokenId, scheduler::Usage};
use proto::{
    PROTOCOL, RouterFrame,
    worker_server::{Worker, WorkerServer},
};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// A router that says nothing for this long after connecting is not one.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that does not answer pings for twice this long is dead.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest frame of a router: several prompts of a million tokens.
const MAX_FRAME_BYTES: usize = 32 << 20;
/// Streams of one connection. A router needs one; a few more while it reconnects.
const MAX_STREAMS: u32 = 16;

/// What routers are told of a worker, and what their submissions are checked against.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Member id.
    pub worker: String,
    /// Which life of it.
    pub incarnation: u64,
    /// Rows of the logits.
    pub vocab_size: u32,
    /// Tokens per page.
    pub page_tokens: usize,
    /// Tokens that end a sequence unless the request ignores them.
    pub eos: Vec<TokenId>,
}

/// Serves routers on `listener` until `shutdown`; then every stream ends, after what was handed over for it.
///
/// Commands of one router come in order. `commands` is bounded: while it is full, routers wait. When its receiver is gone,
/// streams end as unavailable.
pub async fn serve(
    listener: TcpListener,
    profile: Profile,
    commands: mpsc::Sender<Command>,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let Profile { worker, incarnation, vocab_size, page_tokens, eos } = profile;
    let stop = shutdown.child_token();
    let service = Service {
        welcome: proto::Welcome { protocol: PROTOCOL, worker, incarnation },
        model: std::sync::Arc::new(Model { vocab_size, page_tokens, eos }),
        commands,
        streams: AtomicU64::new(1),
        tasks: TaskTracker::new(),
        shutdown: stop.clone(),
    };
    let tasks = service.tasks.clone();
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(WorkerServer::new(service).max_decoding_message_size(MAX_FRAME_BYTES))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown.cancelled_owned())
        .await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    served
}

#[derive(Debug)]
struct Service {
    welcome: proto::Welcome,
    model: std::sync::Arc<Model>,
    commands: mpsc::Sender<Command>,
    streams: AtomicU64,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Worker for Service {
    type AttachStream = Frames;

    async fn attach(&self, request: Request<Streaming<RouterFrame>>) -> Result<Response<Frames>, Status> {
        let id = StreamId(self.streams.fetch_add(1, Ordering::Relaxed));
        let (router, frames) = outbox(id, self.shutdown.child_token());
        let reader = Reader { router, model: self.model.clone(), commands: self.commands.clone() };
        self.tasks.spawn(reader.run(request.into_inner(), self.welcome.clone()));
        Ok(Response::new(frames))
    }
}

/// Reads one router's frames.
#[derive(Debug)]
struct Reader {
    router: Router,
    model: std::sync::Arc<Model>,
    commands: mpsc::Sender<Command>,
}

/// The receiver of commands is gone.
struct Gone;

impl Reader {
    async fn run(self, mut inbound: Streaming<RouterFrame>, welcome: proto::Welcome) {
        let first = match timeout(HELLO_TIMEOUT, inbound.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(_) => return self.router.finish(),
            Err(_) => return self.router.end(Status::deadline_exceeded(format!("no hello within {HELLO_TIMEOUT:?}"))),
        };
        let name = match check_hello(&first) {
            Ok(name) => name.to_owned(),
            Err(status) => return self.router.end(status),
        };
        let stream = self.router.id();
        tracing::info!(stream = stream.0, router = name, "router attached");
        self.router.welcome(welcome);
        if self.converse(first, inbound).await.is_err() {
            self.router.end(Status::unavailable("the worker has stopped"));
        }
        tracing::info!(stream = stream.0, router = name, "router detached");
        self.router.finish();
    }

    /// Passes on what the router asks until either side ends the stream.
    async fn converse(&self, first: RouterFrame, mut inbound: Streaming<RouterFrame>) -> Result<(), Gone> {
        self.command(Command::Attached(self.router.share())).await?;
        let mut frame = Some(first);
        while let Some(next) = frame {
            self.frame(next).await?;
            // Cancel safety: `message` keeps a half-read frame in `inbound`, which ends with this loop anyway.
            frame = tokio::select! {
                biased;
                () = self.router.closed().cancelled() => None,
                next = inbound.message() => next.unwrap_or_else(|status| {
                    tracing::debug!(stream = self.router.id().0, %status, "router stream broke");
                    None
                }),
            };
        }
        self.command(Command::Detached(self.router.id())).await
    }

    async fn frame(&self, frame: RouterFrame) -> Result<(), Gone> {
        let stream = self.router.id();
        if frame.ping != 0 {
            self.router.pong(frame.ping);
        }
        for submit in frame.submit {
            let attempt = submit.attempt;
            match Submission::decode(LegId { stream, attempt }, submit, &self.model) {
                Ok(submission) => self.command(Command::Submit(Box::new(submission))).await?,
                Err(why) => {
                    let ended = encode_ended(attempt, End::Invalid(why), Usage::default());
                    self.router.events(&mut Vec::new(), &mut vec![ended]);
                }
            }
        }
        for attempt in frame.cancel {
            self.command(Command::Cancel(LegId { stream, attempt })).await?;
        }
        if frame.resync {
            self.command(Command::Resync(stream)).await?;
        }
        Ok(())
    }

    async fn command(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).await.map_err(|_| Gone)
    }
}

fn check_hello(frame: &RouterFrame) -> Result<&str, Status> {
    let hello = frame.hello.as_ref().ok_or_else(|| Status::invalid_argument("the first frame carries no hello"))?;
    if hello.protocol != PROTOCOL {
        let theirs = hello.protocol;
        return Err(Status::failed_precondition(format!("protocol version: ours {PROTOCOL}, theirs {theirs}")));
    }
    Ok(&hello.router)
}
