//! The conversation between a router and a worker, over real gRPC.

use attach::{Command, End, LegId, Load, Profile, Routers};
use engine::{Logprobs, Sampled, scheduler::Usage};
use kv_cache::{CacheDelta, PageHash, PagePool};
use proto::{RouterFrame, WorkerFrame, ended::Reason, worker_client::WorkerClient};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(10);

/// A worker without an engine: the test is its step thread.
struct Worker {
    address: String,
    commands: mpsc::Receiver<Command>,
    routers: Routers,
    pool: PagePool,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

/// A router by hand.
struct Router {
    to: mpsc::Sender<RouterFrame>,
    from: Streaming<WorkerFrame>,
}

impl Worker {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sender, commands) = mpsc::channel(16);
        let shutdown = CancellationToken::new();
        let profile = Profile {
            worker: "w".into(),
            incarnation: 5,
            vocab_size: 100,
            page_tokens: 4,
            eos: vec![2],
            adapters: None,
            model: None,
        };
        let served = tokio::spawn(attach::serve(listener, profile, sender, shutdown.clone()));
        Self { address, commands, routers: Routers::default(), pool: PagePool::new(8), shutdown, served }
    }

    async fn command(&mut self) -> Command {
        timeout(PATIENCE, self.commands.recv()).await.expect("a command comes").expect("the service lives")
    }

    fn flush(&mut self) {
        let delta = self.pool.take_delta();
        self.routers.flush(Instant::now(), delta, &self.pool, &Load::default());
    }

    /// Attaches a router and lets it see the greeting.
    async fn attach(&mut self) -> Router {
        let mut router = Router::connect(&self.address, proto::PROTOCOL).await;
        let Command::Attached(attached) = self.command().await else { panic!("the first command attaches") };
        self.routers.attach(attached);
        let welcome = router.frame().await;
        assert_eq!(welcome.welcome.unwrap().worker, "w");
        self.flush();
        let first = router.frame().await;
        assert!(first.pages.unwrap().snapshot);
        assert_eq!(first.load, Some(proto::Load::default()));
        router
    }

    async fn submitted(&mut self) -> LegId {
        match self.command().await {
            Command::Submit(submission) => submission.id,
            other => panic!("{other:?} is no submission"),
        }
    }
}

impl Router {
    async fn connect(address: &str, protocol: u32) -> Self {
        let (to, frames) = mpsc::channel(16);
        let hello = proto::Hello { protocol, router: "r".into() };
        to.send(RouterFrame { hello: Some(hello), ..Default::default() }).await.unwrap();
        let mut client = WorkerClient::connect(address.to_owned()).await.unwrap();
        let from = client.attach(ReceiverStream::new(frames)).await.unwrap().into_inner();
        Self { to, from }
    }

    async fn send(&self, frame: RouterFrame) {
        self.to.send(frame).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<WorkerFrame>, Status> {
        timeout(PATIENCE, self.from.message()).await.expect("a frame comes")
    }

    async fn frame(&mut self) -> WorkerFrame {
        self.next().await.unwrap().expect("the stream goes on")
    }
}

fn submit(attempt: u64) -> proto::Submit {
    proto::Submit {
        attempt,
        request: "req".into(),
        tokens: proto::pack(&[&[5, 6, 7]]),
        prompt_tokens: 3,
        sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
        stop: Some(proto::Stop { max_tokens: 9, ..Default::default() }),
        leg: Some(proto::submit::Leg::Local(proto::Local {})),
        ..Default::default()
    }
}

fn sampled(token: u32) -> Sampled {
    Sampled { token, logprobs: None }
}

#[tokio::test]
async fn one_frame_per_step_carries_every_sequence_of_the_router() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    router.send(RouterFrame { submit: vec![submit(1), submit(2)], ..Default::default() }).await;
    let (first, second) = (worker.submitted().await, worker.submitted().await);

    let logprobs = Some(Logprobs { logprob: -0.5, rank: 1, top: vec![(9, -0.5), (4, -1.5)] });
    worker.routers.token(first, 0, Sampled { token: 9, logprobs });
    worker.routers.token(second, 0, sampled(8));
    let usage = Usage {
        cached_tokens: 16,
        fetched_tokens: 0,
        queue: Duration::from_micros(30),
        prefill: Duration::from_micros(40),
    };
    worker.routers.ended(second, End::Stop(8), usage);
    worker.flush();

    let frame = router.frame().await;
    let tokens: Vec<_> = frame.tokens.iter().map(|token| (token.attempt, token.index, token.token)).collect();
    assert_eq!(tokens, [(1, 0, 9), (2, 0, 8)]);
    assert_eq!(frame.tokens[0].logprobs.as_ref().unwrap().top_tokens, [9, 4]);
    let ended = &frame.ended[0];
    assert_eq!((ended.attempt, ended.reason(), ended.stop_token), (2, Reason::Stop, 8));
    assert_eq!((ended.cached_tokens, ended.queue_us, ended.prefill_us), (16, 30, 40));
}

/// Rounds of one small write and one read each.
const ROUNDS: u32 = 16;

/// Lets the reader's acknowledgement of what comes next wait for data to go with it, as it does in conversations: up to 40 ms.
fn delay_acknowledgement(reader: &TcpStream) {
    reader.set_quickack(false).unwrap();
}

/// How long the rounds take over a connection whose writer waits for acknowledgements before it sends more.
async fn delayed() -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (reader, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let ((mut writer, _), mut reader) = (accepted.unwrap(), reader.unwrap());
    let began = Instant::now();
    for _ in 0..ROUNDS {
        delay_acknowledgement(&reader);
        writer.write_all(b"x").await.unwrap();
        reader.read_u8().await.unwrap();
    }
    began.elapsed()
}

/// Passes on what goes between a router and the worker at `address`, and is slow to acknowledge what the worker sends. Returns its own
/// address.
async fn relay(address: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (own, worker) = (listener.local_addr().unwrap(), address.strip_prefix("http://").unwrap().to_owned());
    tokio::spawn(async move {
        let (mut router, _) = listener.accept().await.unwrap();
        let mut worker = TcpStream::connect(worker).await.unwrap();
        for socket in [&router, &worker] {
            socket.set_nodelay(true).unwrap();
        }
        let (mut down, mut up) = (vec![0; 4096], vec![0; 4096]);
        loop {
            delay_acknowledgement(&worker);
            tokio::select! {
                Ok(read @ 1..) = router.read(&mut down) => worker.write_all(&down[..read]).await.unwrap(),
                Ok(read @ 1..) = worker.read(&mut up) => router.write_all(&up[..read]).await.unwrap(),
                else => return,
            }
        }
    });
    format!("http://{own}")
}

#[tokio::test]
async fn a_token_does_not_wait_for_the_acknowledgement_of_the_one_before() {
    let mut worker = Worker::start().await;
    worker.address = relay(&worker.address).await;
    let mut router = worker.attach().await;
    router.send(RouterFrame { submit: vec![submit(1)], ..Default::default() }).await;
    let leg = worker.submitted().await;
    let began = Instant::now();
    for index in 0..ROUNDS {
        worker.routers.token(leg, index as usize, sampled(9));
        worker.flush();
        assert_eq!(router.frame().await.tokens[0].index, index);
    }
    let (took, delayed) = (began.elapsed(), delayed().await);
    assert!(took < delayed / 2, "{ROUNDS} tokens took {took:?}; with delayed acknowledgements it would be {delayed:?}");
}

#[tokio::test]
async fn another_protocol_version_is_refused_naming_both() {
    let worker = Worker::start().await;
    let mut router = Router::connect(&worker.address, 9).await;
    let status = router.next().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "protocol version: ours 3, theirs 9"));
}

#[tokio::test]
async fn what_no_worker_could_do_ends_at_the_door() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    let bad = proto::Submit { tokens: proto::pack(&[&[5, 100, 7]]), ..submit(3) };
    router.send(RouterFrame { submit: vec![bad], ..Default::default() }).await;
    let ended = router.frame().await.ended.remove(0);
    assert_eq!((ended.attempt, ended.reason()), (3, Reason::Invalid));
    assert_eq!(ended.message, "token 1 is 100, outside the vocabulary of 100");
}

#[tokio::test]
async fn a_ping_is_answered_without_the_step_thread() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    router.send(RouterFrame { ping: 77, ..Default::default() }).await;
    assert_eq!(router.frame().await.pong, 77);
}

#[tokio::test]
async fn cancels_and_the_end_of_the_stream_reach_the_worker() {
    let mut worker = Worker::start().await;
    let router = worker.attach().await;
    router.send(RouterFrame { submit: vec![submit(1)], cancel: vec![1], ..Default::default() }).await;
    let leg = worker.submitted().await;
    assert!(matches!(worker.command().await, Command::Cancel(id) if id == leg));
    drop(router);
    assert!(matches!(worker.command().await, Command::Detached(stream) if stream == leg.stream));
}

#[tokio::test]
async fn page_events_are_numbered_and_start_with_a_snapshot() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    let pages = worker.pool.allocate(2).unwrap();
    worker.pool.name(pages[0], PageHash(1));
    worker.flush();
    let events = router.frame().await.pages.unwrap();
    assert_eq!((events.sequence, events.snapshot), (2, false));
    assert_eq!(events.stored[..], 1u128.to_le_bytes());

    router.send(RouterFrame { resync: true, ..Default::default() }).await;
    let Command::Resync(stream) = worker.command().await else { panic!("a resync is asked for") };
    worker.routers.resync(stream);
    worker.pool.name(pages[1], PageHash(2));
    worker.flush();
    let events = router.frame().await.pages.unwrap();
    assert_eq!((events.sequence, events.snapshot, events.more, events.stored.len()), (3, true, false, 32));
}

#[tokio::test]
async fn missed_page_events_leave_a_gap() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    // The router does not read. More page events than may wait (4 MiB) and than the connection holds by itself.
    let big = CacheDelta { stored: (0..60_000).map(PageHash).collect(), evicted: Vec::new() };
    for _ in 0..16 {
        worker.routers.flush(Instant::now(), big.clone(), &worker.pool, &Load::default());
    }
    // What was dropped is missing from the numbers, the rest is in order.
    worker.routers.flush(Instant::now(), CacheDelta::default(), &worker.pool, &Load::default());
    let mut last = 1;
    let gap = loop {
        let Some(events) = router.frame().await.pages else { continue };
        if events.sequence != last + 1 {
            break events.sequence;
        }
        last = events.sequence;
        if last > 17 {
            panic!("nothing was dropped");
        }
        // Room again: the next one is sent.
        if last == 3 {
            worker.routers.flush(Instant::now(), big.clone(), &worker.pool, &Load::default());
        }
    };
    assert_eq!(gap, 18);
}

#[tokio::test]
async fn a_router_that_does_not_read_loses_its_stream() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    router.send(RouterFrame { submit: vec![submit(1)], ..Default::default() }).await;
    let leg = worker.submitted().await;
    // Far more than may wait and than the connection holds by itself.
    for index in 0..2_000_000 {
        worker.routers.token(leg, index, sampled(9));
        if index % 1000 == 0 {
            worker.flush();
        }
    }
    assert!(matches!(worker.command().await, Command::Detached(stream) if stream == leg.stream));
    let status = loop {
        match router.next().await {
            Ok(frame) => assert!(frame.is_some(), "the stream ends with a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().starts_with("the router reads too slowly"), "{status}");
}

#[tokio::test]
async fn held_back_load_has_a_due_time() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    let now = Instant::now();
    let load = |running| Load { running, ..Default::default() };
    let mut flush = |at, running| {
        worker.routers.flush(at, CacheDelta::default(), &worker.pool, &load(running));
        worker.routers.load_due()
    };
    assert!(flush(now, 1).is_some(), "the greeting has just carried load");
    let later = now + Duration::from_millis(60);
    assert_eq!(flush(later, 2), None);
    assert_eq!(router.frame().await.load.unwrap().running, 2);
    assert_eq!(flush(later, 2), None, "nothing changed");
}

#[tokio::test]
async fn shutdown_ends_streams_after_what_was_handed_over() {
    let mut worker = Worker::start().await;
    let mut router = worker.attach().await;
    router.send(RouterFrame { submit: vec![submit(1)], ..Default::default() }).await;
    let leg = worker.submitted().await;
    worker.routers.token(leg, 0, sampled(9));
    worker.flush();
    worker.shutdown.cancel();
    assert_eq!(router.frame().await.tokens.len(), 1);
    assert_eq!(router.next().await.unwrap(), None);
    timeout(PATIENCE, worker.served).await.expect("serve returns").unwrap().unwrap();
}
