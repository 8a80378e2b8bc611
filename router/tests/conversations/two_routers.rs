//! Two routers on the same workers: nobody leads, and work spreads all the same.

use crate::{
    mock::{CONTEXT, MODEL},
    support::{TestRouter, output, within},
};
use cluster::{Capacity, Directory, LoadSummary, Member, MemoryDirectory, ModelCard, Role, State};
use futures::future::join_all;
use proto::{
    Ended, Load, Pace, RouterFrame, Token, Welcome, WorkerFrame,
    ended::Reason,
    worker_server::{Worker, WorkerServer},
};
use router::Policy;
use serde_json::json;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const WORKERS: usize = 4;
const REQUESTS: usize = 40;
/// What a prompt takes on a worker, which computes one after the other.
const PROMPT_MS: u64 = 20;

type Frames = mpsc::Sender<Result<WorkerFrame, Status>>;

/// What a worker has been asked for, by all routers.
#[derive(Default)]
struct Desk {
    streams: Vec<Frames>,
    /// The highest attempt of each stream.
    received: Vec<u64>,
    /// Stream and attempt of prompts to compute.
    line: Vec<(usize, u64)>,
    served: usize,
}

impl Desk {
    /// Tells every router of everybody's work.
    fn report(&self) {
        for (stream, received) in self.streams.iter().zip(&self.received) {
            let load = Load {
                waiting: self.line.len() as u32,
                legs: self.line.len() as u32,
                backlog_ms: (PROMPT_MS * self.line.len() as u64) as f32,
                pages_free: 1_000,
                pages_total: 1_000,
                pace: Some(Pace { step_us: 1e3 * PROMPT_MS as f32, token_us: 10.0, ..Pace::default() }),
                received: *received,
                ..Load::default()
            };
            let _ = stream.try_send(Ok(WorkerFrame { load: Some(load), ..WorkerFrame::default() }));
        }
    }

    fn serve_next(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let (stream, attempt) = self.line.remove(0);
        self.served += 1;
        let out = output("ok");
        let last = *out.last().unwrap();
        let tokens = (0..).zip(&out).map(|(index, token)| Token { attempt, index, token: *token, ..Token::default() });
        let ended = Ended { attempt, reason: Reason::Stop.into(), stop_token: last, ..Ended::default() };
        let frame = WorkerFrame { tokens: tokens.collect(), ended: vec![ended], ..WorkerFrame::default() };
        self.streams[stream].try_send(Ok(frame)).unwrap();
    }
}

/// A worker of several routers, that computes for as long as prompts take.
struct Shared {
    id: String,
    desk: Arc<Mutex<Desk>>,
}

#[tonic::async_trait]
impl Worker for Shared {
    type AttachStream = ReceiverStream<Result<WorkerFrame, Status>>;

    async fn attach(&self, request: Request<Streaming<RouterFrame>>) -> Result<Response<Self::AttachStream>, Status> {
        let (sender, receiver) = mpsc::channel(1_024);
        let welcome = Welcome { protocol: proto::PROTOCOL, worker: self.id.clone(), incarnation: 1 };
        let first = WorkerFrame { welcome: Some(welcome), ..WorkerFrame::default() };
        sender.send(Ok(first)).await.map_err(|_| Status::internal("just made"))?;
        let (desk, mut frames) = (self.desk.clone(), request.into_inner());
        let stream = {
            let mut desk = desk.lock().unwrap();
            desk.streams.push(sender);
            desk.received.push(0);
            desk.report();
            desk.streams.len() - 1
        };
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                let mut desk = desk.lock().unwrap();
                for submit in frame.submit {
                    desk.received[stream] = desk.received[stream].max(submit.attempt);
                    desk.line.push((stream, submit.attempt));
                }
                let pong = WorkerFrame { pong: frame.ping, ..WorkerFrame::default() };
                let _ = desk.streams[stream].try_send(Ok(pong));
                desk.report();
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Starts a worker; its registration and tasks live as long as `tasks`.
async fn start(id: String, directory: &MemoryDirectory, tasks: &mut JoinSet<()>) -> Arc<Mutex<Desk>> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let model = ModelCard {
        name: MODEL.into(),
        fingerprint: "f".into(),
        max_model_len: CONTEXT,
        vocab_size: 4_096,
        page_tokens: 16,
        page_bytes: 1_024,
    };
    let member = Member {
        id: id.clone(),
        incarnation: 1,
        role: Role::Decode,
        state: State::Ready,
        address: listener.local_addr().unwrap().to_string(),
        link: format!("{id}.link:1"),
        model: Some(model),
        capacity: Capacity { pages: 1_000, sequences: 64, token_budget: 512 },
        load: LoadSummary::default(),
    };
    let desk = Arc::new(Mutex::new(Desk::default()));
    let service = WorkerServer::new(Shared { id, desk: desk.clone() });
    let registration = directory.register(member).await.unwrap();
    tasks.spawn(async move {
        let _registration = registration;
        let served = tonic::transport::Server::builder().add_service(service);
        served.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    });
    let computing = desk.clone();
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(PROMPT_MS)).await;
            let mut desk = computing.lock().unwrap();
            desk.serve_next();
            desk.report();
        }
    });
    desk
}

#[tokio::test]
async fn two_routers_share_their_workers_evenly() {
    let first = TestRouter::start(Policy::Local).await;
    let second = TestRouter::start_beside(&first, "router-2", Policy::Local).await;
    let (mut tasks, mut desks) = (JoinSet::new(), Vec::new());
    for id in 0..WORKERS {
        desks.push(start(format!("decode-{id}"), &first.directory, &mut tasks).await);
    }
    let routers = [&first, &second];
    for router in routers {
        let attached = async {
            while router.get("/server_info").await.json()["workers"]["decode"] != WORKERS {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within("all workers", attached).await;
    }
    // Both are asked at the same moments, a little faster than the workers compute.
    let ask = |index: usize| async move {
        tokio::time::sleep(Duration::from_millis(index as u64 / 2 * 8)).await;
        let body = json!({"model": MODEL, "prompt": format!("number {index}")});
        routers[index % 2].post("/v1/completions", body).await.status
    };
    let statuses = within("all answers", join_all((0..REQUESTS).map(ask))).await;
    assert_eq!(statuses, [200; REQUESTS]);
    let served: Vec<usize> = desks.iter().map(|desk| desk.lock().unwrap().served).collect();
    assert_eq!(served.iter().sum::<usize>(), REQUESTS);
    let even = REQUESTS / WORKERS;
    assert!(
        served.iter().all(|count| (even / 2..=even * 3 / 2).contains(count)),
        "{even} each would be even: {served:?}"
    );
}
