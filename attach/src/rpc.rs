//! The gRPC service: frames of one router, decoded one by one.
//!
//! A submission with a grammar waits here until that is compiled, while others pass it: the step thread never sees one that is
//! not ready to run.

use crate::{
    Command, End, LegId, Router, StreamId, Submission,
    adapters::Board,
    outbox::{Frames, outbox},
    routers::encode_ended,
    submission::{Model, decode_grammar},
};
use engine::{Adapters, TokenId, scheduler::Usage};
use grammar::{Grammars, Matcher, Spec};
use proto::{
    PROTOCOL, RouterFrame,
    worker_server::{Worker, WorkerServer},
};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// A router that says nothing for this long after connecting is not one.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that does not answer pings for twice this long is dead.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest frame of a router: several prompts of a million tokens.
const MAX_FRAME_BYTES: usize = 32 << 20;
/// A long prompt's piece of a frame, and how much of them may be on its way before it is read: with gRPC's 16 and 64 KiB a few long prompts
/// wait for each other's acknowledgements.
const FRAME_BYTES: u32 = 128 << 10;
const WINDOW_BYTES: u32 = 1 << 20;
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
    /// What can be added to the model; `None` where there is no model to add to.
    pub adapters: Option<Arc<Adapters>>,
    /// What compiles grammars; without it they are refused.
    pub model: Option<Arc<engine::Model>>,
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
    let Profile { worker, incarnation, vocab_size, page_tokens, eos, adapters, model } = profile;
    let stop = shutdown.child_token();
    let service = Service {
        welcome: proto::Welcome { protocol: PROTOCOL, worker, incarnation },
        board: Board::new(adapters.clone()),
        model: Arc::new(Model { vocab_size, page_tokens, eos, adapters }),
        grammars: model,
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
        .max_frame_size(Some(FRAME_BYTES))
        .initial_stream_window_size(Some(WINDOW_BYTES))
        .initial_connection_window_size(Some(WINDOW_BYTES))
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
    model: Arc<Model>,
    board: Board,
    grammars: Option<Arc<engine::Model>>,
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
        let reader = Reader {
            router,
            model: self.model.clone(),
            board: self.board.clone(),
            tasks: self.tasks.clone(),
            grammars: self.grammars.clone(),
            commands: self.commands.clone(),
            compiling: JoinSet::new(),
            unready: HashMap::new(),
        };
        self.tasks.spawn(reader.run(request.into_inner(), self.welcome.clone()));
        Ok(Response::new(frames))
    }
}

/// Reads one router's frames.
#[derive(Debug)]
struct Reader {
    router: Router,
    model: Arc<Model>,
    board: Board,
    tasks: TaskTracker,
    grammars: Option<Arc<engine::Model>>,
    commands: mpsc::Sender<Command>,
    /// Grammars that are being compiled, each for an attempt.
    compiling: JoinSet<(u64, Result<Matcher, End>)>,
    /// The submissions that wait for them. What was cancelled meanwhile is not here any more.
    unready: HashMap<u64, Box<Submission>>,
}

/// The receiver of commands is gone.
struct Gone;

impl Reader {
    async fn run(mut self, mut inbound: Streaming<RouterFrame>, welcome: proto::Welcome) {
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
        let changes = self.board.changes();
        self.router.welcome(welcome, self.board.list());
        if self.converse(first, inbound, changes).await.is_err() {
            self.router.end(Status::unavailable("the worker has stopped"));
        }
        tracing::info!(stream = stream.0, router = name, "router detached");
        self.router.finish();
    }

    /// Passes on what the router asks until either side ends the stream.
    async fn converse(
        &mut self,
        first: RouterFrame,
        mut inbound: Streaming<RouterFrame>,
        mut changes: watch::Receiver<()>,
    ) -> Result<(), Gone> {
        self.command(Command::Attached(self.router.share())).await?;
        self.frame(first).await?;
        loop {
            // Cancel safety: `message` keeps a half-read frame in `inbound`, and `join_next` what it does not return.
            let next = tokio::select! {
                biased;
                () = self.router.closed().cancelled() => break,
                _ = changes.changed() => {
                    self.router.adapters(self.board.list());
                    continue;
                }
                Some(compiled) = self.compiling.join_next() => {
                    let (attempt, matcher) = compiled.expect("what waits for a grammar neither panics nor is called off");
                    self.compiled(attempt, matcher).await?;
                    continue;
                }
                next = inbound.message() => next,
            };
            match next {
                Ok(Some(frame)) => self.frame(frame).await?,
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(stream = self.router.id().0, %status, "router stream broke");
                    break;
                }
            }
        }
        self.command(Command::Detached(self.router.id())).await
    }

    async fn frame(&mut self, frame: RouterFrame) -> Result<(), Gone> {
        let stream = self.router.id();
        if frame.ping != 0 {
            self.router.pong(frame.ping);
        }
        for mut submit in frame.submit {
            let (attempt, grammar) = (submit.attempt, submit.grammar.take());
            let spec = grammar.map(decode_grammar).transpose().map_err(End::Invalid);
            let decoded = Submission::decode(LegId { stream, attempt }, submit, &self.model);
            match decoded.and_then(|submission| Ok((Box::new(submission), spec?))) {
                Ok((submission, None)) => self.command(Command::Submit(submission)).await?,
                Ok((submission, Some(spec))) => self.compile(submission, spec),
                Err(end) => self.ended(attempt, end),
            }
        }
        for attempt in frame.cancel {
            // Nobody is told: a router forgets what it cancels.
            if self.unready.remove(&attempt).is_none() {
                self.command(Command::Cancel(LegId { stream, attempt })).await?;
            }
        }
        if frame.resync {
            self.command(Command::Resync(stream)).await?;
        }
        if frame.reset != 0 {
            self.command(Command::Reset(stream, frame.reset)).await?;
        }
        for command in frame.adapters {
            self.tasks.spawn(self.board.clone().command(command, self.router.share()));
        }
        Ok(())
    }

    /// Lets a submission wait for its grammar.
    fn compile(&mut self, submission: Box<Submission>, spec: Spec) {
        let attempt = submission.id.attempt;
        let Some(model) = self.grammars.clone() else {
            return self.ended(attempt, End::Invalid("this worker compiles no grammars".into()));
        };
        let request = &submission.sequence;
        let emitted = request.history.tokens()[request.prompt_tokens..].to_vec();
        let may_end = self.model.eos.iter().any(|token| request.stop.ids.contains(token));
        if self.unready.insert(attempt, submission).is_some() {
            self.unready.remove(&attempt);
            return self.ended(attempt, End::Invalid(format!("attempt {attempt} is live already")));
        }
        self.compiling.spawn(async move { (attempt, matcher(model, spec, emitted, may_end).await) });
    }

    /// A grammar is there, or there is none.
    async fn compiled(&mut self, attempt: u64, matcher: Result<Matcher, End>) -> Result<(), Gone> {
        let Some(mut submission) = self.unready.remove(&attempt) else { return Ok(()) };
        match matcher {
            // Whoever emitted the last token died before saying that it was the last.
            Ok(matcher) if matcher.is_complete() => {
                let tokens = submission.sequence.history.tokens();
                self.ended(attempt, End::Stop(*tokens.last().expect("a prompt is not empty")));
                Ok(())
            }
            Ok(matcher) => {
                submission.sequence.grammar = Some(matcher);
                self.command(Command::Submit(submission)).await
            }
            Err(end) => {
                self.ended(attempt, end);
                Ok(())
            }
        }
    }

    /// Says the last word about an attempt that the step thread never heard of.
    fn ended(&self, attempt: u64, end: End) {
        let ended = encode_ended(attempt, end, Usage::default());
        self.router.events(&mut Vec::new(), &mut vec![ended]);
    }

    async fn command(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).await.map_err(|_| Gone)
    }
}

/// Compiles `spec` and goes on by the tokens `emitted`; says how the leg ends where that is not possible.
async fn matcher(model: Arc<engine::Model>, spec: Spec, emitted: Vec<TokenId>, may_end: bool) -> Result<Matcher, End> {
    // The first one reads the model's tokens.
    let grammars: Result<Arc<Grammars>, _> = match tokio::task::spawn_blocking(move || model.grammars()).await {
        Ok(grammars) => grammars,
        Err(panic) => return Err(End::Failed(format!("grammar: {panic}"))),
    };
    let grammars = grammars.map_err(no_matcher)?;
    let (sender, receiver) = oneshot::channel();
    // Nobody receives when the submission was called off.
    grammars.resume(spec, emitted, may_end, move |matcher| drop(sender.send(matcher)));
    match timeout(grammars.patience(), receiver).await {
        Ok(Ok(matcher)) => matcher.map_err(no_matcher),
        Ok(Err(_)) => Err(End::Failed("grammar: the compiling thread gave up".into())),
        Err(_) => Err(no_matcher(grammars.too_slow())),
    }
}

fn no_matcher(error: grammar::Error) -> End {
    let message = format!("grammar: {error}");
    match error {
        grammar::Error::Busy(_) => End::Refused(message),
        _ => End::Invalid(message),
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
