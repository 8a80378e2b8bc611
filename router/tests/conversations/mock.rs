//! A worker that does as it is told: the real gRPC service with a test behind it.

use crate::support::within;
use cluster::{Capacity, Directory, LoadSummary, Member, ModelCard, Registration, Role, State};
use proto::{
    Ended, PageEvents, RouterFrame, Submit, Token, Welcome, WorkerFrame,
    ended::Reason,
    submit::Leg,
    worker_server::{Worker, WorkerServer},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

pub(crate) const MODEL: &str = "demo";
pub(crate) const CONTEXT: u32 = 256;

/// The way up of the latest stream, until it is hung up.
type Stream = Arc<Mutex<Option<mpsc::Sender<Result<WorkerFrame, Status>>>>>;

/// Something a router said.
#[derive(Debug)]
pub(crate) enum Heard {
    Submit(Box<Submit>),
    Cancel(u64),
    Resync,
    Reset(u64),
}

/// A worker in the hands of a test. Dropping it ends its process, as far as a router can tell.
#[derive(Debug)]
pub(crate) struct MockWorker {
    pub(crate) id: String,
    heard: mpsc::Receiver<Heard>,
    waiting: VecDeque<Heard>,
    stream: Stream,
    registration: Option<Registration>,
    server: JoinHandle<()>,
}

impl Drop for MockWorker {
    fn drop(&mut self) {
        self.hang_up();
        self.server.abort();
    }
}

struct Service {
    id: String,
    heard: mpsc::Sender<Heard>,
    stream: Stream,
}

#[tonic::async_trait]
impl Worker for Service {
    type AttachStream = ReceiverStream<Result<WorkerFrame, Status>>;

    async fn attach(&self, request: Request<Streaming<RouterFrame>>) -> Result<Response<Self::AttachStream>, Status> {
        let (sender, receiver) = mpsc::channel(1_024);
        let welcome = Welcome { protocol: proto::PROTOCOL, worker: self.id.clone(), incarnation: 77 };
        let first = WorkerFrame { welcome: Some(welcome), ..WorkerFrame::default() };
        sender.send(Ok(first)).await.map_err(|_| Status::internal("just made"))?;
        *self.stream.lock().unwrap() = Some(sender);
        let (heard, stream, mut frames) = (self.heard.clone(), self.stream.clone(), request.into_inner());
        let hello = frames.message().await?.and_then(|frame| {
            assert!(frame.resync, "a new stream asks for all pages");
            frame.hello
        });
        assert_eq!(hello.map(|h| h.protocol), Some(proto::PROTOCOL));
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                if frame.ping != 0
                    && let Some(sender) = stream.lock().unwrap().as_ref()
                {
                    let _ = sender.try_send(Ok(WorkerFrame { pong: frame.ping, ..WorkerFrame::default() }));
                }
                let submits = frame.submit.into_iter().map(|submit| Heard::Submit(Box::new(submit)));
                let cancels = frame.cancel.into_iter().map(Heard::Cancel);
                let resync = frame.resync.then_some(Heard::Resync);
                let reset = (frame.reset != 0).then_some(Heard::Reset(frame.reset));
                for said in submits.chain(cancels).chain(resync).chain(reset) {
                    if heard.send(said).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl MockWorker {
    pub(crate) async fn start(directory: &dyn Directory, id: &str, role: Role) -> Self {
        Self::start_with(directory, id, role, |_| {}).await
    }

    pub(crate) async fn start_with(
        directory: &dyn Directory,
        id: &str,
        role: Role,
        change: impl FnOnce(&mut Member),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut member = Member {
            id: id.to_string(),
            incarnation: 7,
            role,
            state: State::Ready,
            address: listener.local_addr().unwrap().to_string(),
            link: format!("{id}.link:1"),
            model: Some(ModelCard {
                name: MODEL.into(),
                fingerprint: "f".into(),
                max_model_len: CONTEXT,
                vocab_size: 4_096,
                page_tokens: 16,
                page_bytes: 1_024,
            }),
            capacity: Capacity { pages: 1_000, sequences: 64, token_budget: 512 },
            load: LoadSummary::default(),
        };
        change(&mut member);
        let (sender, heard) = mpsc::channel(1_024);
        let stream = Arc::new(Mutex::new(None));
        let service = Service { id: id.to_string(), heard: sender, stream: stream.clone() };
        let server = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(WorkerServer::new(service));
            server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))).await.unwrap();
        });
        let registration = Some(directory.register(member).await.unwrap());
        Self { id: id.to_string(), heard, waiting: VecDeque::new(), stream, registration, server }
    }

    /// Leaves the directory without ending anything else.
    pub(crate) async fn leave_directory(&mut self) {
        self.registration.take().unwrap().leave().await;
    }

    pub(crate) fn set_state(&self, state: State) {
        self.registration.as_ref().unwrap().set_state(state);
    }

    /// Waits until a router has opened a stream.
    pub(crate) async fn attached(&self) {
        within("a router", async {
            while self.stream.lock().unwrap().is_none() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Ends the stream.
    pub(crate) fn hang_up(&self) {
        self.stream.lock().unwrap().take();
    }

    pub(crate) fn send(&self, frame: WorkerFrame) {
        self.stream.lock().unwrap().as_ref().expect("attached").try_send(Ok(frame)).unwrap();
    }

    /// Sends tokens, counted from `index`, and maybe the last word, in one frame.
    pub(crate) fn emit(&self, submit: &Submit, index: u32, tokens: &[u32], ended: Option<Ended>) {
        let tokens = tokens.iter().zip(index..).map(|(&token, index)| proto::Token {
            attempt: submit.attempt,
            index,
            token,
            logprobs: submit.sampling.as_ref().and_then(|s| s.logprobs).map(|count| proto::Logprobs {
                logprob: -0.5,
                rank: 1,
                top_tokens: (0..count).map(|i| if i == 0 { token } else { token + i }).collect(),
                top_logprobs: (0..count).map(|i| -0.5 - i as f32).collect(),
            }),
            prompt: false,
        });
        let tokens: Vec<Token> = tokens.collect();
        let ended = ended.map(|ended| Ended { attempt: submit.attempt, ..ended });
        self.send(WorkerFrame { tokens, ended: ended.into_iter().collect(), ..WorkerFrame::default() });
    }

    /// Sends tokens in a frame of their own, as fast as the router takes frames.
    pub(crate) async fn emit_slowly(&self, submit: &Submit, index: u32, tokens: &[u32]) {
        let sender = self.stream.lock().unwrap().clone().expect("attached");
        let tokens = tokens.iter().zip(index..);
        let tokens = tokens.map(|(&token, index)| Token { attempt: submit.attempt, index, token, ..Token::default() });
        let frame = WorkerFrame { tokens: tokens.collect(), ..WorkerFrame::default() };
        within("room for a frame", sender.send(Ok(frame))).await.unwrap();
    }

    /// Reports this load.
    pub(crate) fn load(&self, load: proto::Load) {
        self.send(WorkerFrame { load: Some(load), ..WorkerFrame::default() });
    }

    pub(crate) fn pages(&self, events: PageEvents) {
        self.send(WorkerFrame { pages: Some(events), ..WorkerFrame::default() });
    }

    /// Waits for the next submission.
    pub(crate) async fn submission(&mut self) -> Submit {
        self.heard(
            &format!("a submission to {}", self.id.clone()),
            |said| matches!(said, Heard::Submit(_)),
            |said| match said {
                Heard::Submit(submit) => *submit,
                _ => unreachable!(),
            },
        )
        .await
    }

    /// Waits for the next cancel.
    pub(crate) async fn cancel(&mut self) -> u64 {
        self.heard(
            &format!("a cancel to {}", self.id.clone()),
            |said| matches!(said, Heard::Cancel(_)),
            |said| match said {
                Heard::Cancel(attempt) => attempt,
                _ => unreachable!(),
            },
        )
        .await
    }

    /// Waits until the router asks for all pages.
    pub(crate) async fn resync(&mut self) {
        self.heard("a resync", |said| matches!(said, Heard::Resync), drop).await;
    }

    /// Waits until the router asks to forget all prefixes, and answers.
    pub(crate) async fn reset(&mut self, done: bool) {
        let number = self.asked_to_reset().await;
        self.send(WorkerFrame { reset: Some(proto::Reset { number, done }), ..WorkerFrame::default() });
    }

    /// Waits until the router asks to forget all prefixes. Returns under which number.
    pub(crate) async fn asked_to_reset(&mut self) -> u64 {
        let take = |said| match said {
            Heard::Reset(number) => number,
            _ => unreachable!(),
        };
        self.heard("a reset", |said| matches!(said, Heard::Reset(_)), take).await
    }

    /// Whether a submission has come that nobody took.
    pub(crate) fn has_submission(&mut self) -> bool {
        self.has(|said| matches!(said, Heard::Submit(_)))
    }

    /// Whether a cancel has come that nobody took.
    pub(crate) fn has_cancel(&mut self) -> bool {
        self.has(|said| matches!(said, Heard::Cancel(_)))
    }

    fn has(&mut self, wanted: impl Fn(&Heard) -> bool) -> bool {
        while let Ok(said) = self.heard.try_recv() {
            self.waiting.push_back(said);
        }
        self.waiting.iter().any(wanted)
    }

    async fn heard<T>(&mut self, what: &str, wanted: impl Fn(&Heard) -> bool, take: impl FnOnce(Heard) -> T) -> T {
        if let Some(at) = self.waiting.iter().position(&wanted) {
            return take(self.waiting.remove(at).unwrap());
        }
        loop {
            let said = within(what, self.heard.recv()).await.expect("the service runs as long as the worker");
            if wanted(&said) {
                return take(said);
            }
            self.waiting.push_back(said);
        }
    }

    /// Answers every submission with its part of `output`, ended by `reason`, for as long as the worker lives.
    pub(crate) fn answer_all(mut self, output: &[u32], reason: Reason) -> Answering {
        let output = output.to_vec();
        let stream = self.stream.clone();
        let task = tokio::spawn(async move {
            loop {
                match self.heard.recv().await {
                    Some(Heard::Submit(submit)) => self.answer(&submit, &output, reason),
                    Some(_) => {}
                    None => return,
                }
            }
        });
        Answering { task, stream }
    }

    /// Plays a leg to its end: the tokens of `output` that are this leg's, then `reason`.
    pub(crate) fn answer(&self, submit: &Submit, output: &[u32], reason: Reason) {
        let base = prompt_ids(submit).len() as u32 - submit.prompt_tokens;
        let max = submit.stop.as_ref().unwrap().max_tokens as usize;
        let (output, reason) = if output.len() > max { (&output[..max], Reason::Length) } else { (output, reason) };
        let rest = &output[(base as usize).min(output.len())..];
        let last = *output.last().unwrap();
        match submit.leg.as_ref().unwrap() {
            Leg::Local(_) => self.emit(submit, base, rest, Some(ended(reason, last))),
            Leg::Prefill(_) => {
                let reason = if rest.len() == 1 { reason } else { Reason::HandedOff };
                self.emit(submit, base, &rest[..1], Some(ended(reason, last)));
            }
            Leg::Embed(_) => {
                let ended = Ended { embedding: embedding(submit), ..ended(Reason::Embedded, 0) };
                self.emit(submit, 0, &[], Some(ended));
            }
            Leg::Decode(_) if rest.len() > 1 => self.emit(submit, base + 1, &rest[1..], Some(ended(reason, last))),
            Leg::Decode(_) => {}
        }
    }
}

/// The tokens of a submission.
pub(crate) fn prompt_ids(submit: &Submit) -> Vec<u32> {
    proto::unpack(&submit.tokens).unwrap()
}

/// What a mock makes of a prompt: a vector that tells it from others.
pub(crate) fn embedding(submit: &Submit) -> Vec<f32> {
    prompt_ids(submit).into_iter().map(|token| token as f32 + 0.1).collect()
}

/// A worker that answers by itself.
#[derive(Debug)]
pub(crate) struct Answering {
    task: JoinHandle<()>,
    stream: Stream,
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stream.lock().unwrap().take();
        self.task.abort();
    }
}

/// A last word.
pub(crate) fn ended(reason: Reason, stop_token: u32) -> Ended {
    Ended { reason: reason.into(), stop_token, cached_tokens: 16, ..Ended::default() }
}

/// A last word that says what went wrong.
pub(crate) fn failed(reason: Reason, message: &str) -> Ended {
    Ended { reason: reason.into(), message: message.into(), ..Ended::default() }
}
