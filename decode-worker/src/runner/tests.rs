//! What happens when the step thread itself is at fault.

use super::*;
use attach::{Inbox, Profile};
use engine::{
    Engine, Model,
    scheduler::{self, Scheduler},
};
use kv_transfer::{Identity, Transfer};
use proto::{RouterFrame, ended::Reason, worker_client::WorkerClient};
use std::path::Path;
use telemetry::Health;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(10);

/// Makes a runner over a small checkpoint, and the sending side of its commands.
async fn runner(stop: &CancellationToken) -> (Runner, mpsc::Sender<Command>, Health) {
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama");
    let model = Model::load(&checkpoint, &mut |_| {}).expect("the golden checkpoint loads");
    let config = engine::Config { kv_bytes: Some(1 << 20), threads: Some(1), ..Default::default() };
    let engine = Engine::new(model, &config).expect("the engine starts");
    let layout = engine.memory().layout().clone();
    let (sender, events) = mpsc::channel(16);
    let (commands_sender, commands) = mpsc::channel(16);
    let identity = Identity {
        worker: "w".into(),
        incarnation: 1,
        fingerprint: "f".into(),
        layout: layout.clone(),
        rank: Default::default(),
    };
    let memory = engine.memory().clone();
    let transfer = Transfer::start(Default::default(), identity, memory.file(), sender, stop.clone()).await;
    let limits = scheduler::Limits {
        pages: layout.pages as usize,
        page_tokens: 16,
        token_budget: 64,
        max_sequences: 4,
        max_model_len: 100,
        max_waiting: 4,
    };
    let health = Health::new("starting", PATIENCE);
    let parts = Parts {
        worker: "w".into(),
        model_name: "m".into(),
        engine,
        scheduler: Scheduler::new(limits).expect("the limits make sense"),
        transfer: transfer.expect("the transfer starts"),
        inbox: Inbox::new(commands, events, CancellationToken::new(), stop.clone()).expect("timers start"),
        load: watch::Sender::new(Load::default()),
        health: health.clone(),
    };
    (Runner::new(parts, crate::Config::default().reservations(), None), commands_sender, health)
}

fn submit(attempt: u64) -> proto::Submit {
    proto::Submit {
        attempt,
        tokens: proto::pack(&[&[5, 6, 7]]),
        prompt_tokens: 3,
        sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
        stop: Some(proto::Stop { max_tokens: 90, ignore_eos: true, ..Default::default() }),
        leg: Some(proto::submit::Leg::Local(proto::Local {})),
        ..Default::default()
    }
}

/// Two legs, the second of which breaks what the scheduler takes for granted: no router can do that, since submissions are
/// checked on the way in, but a mistake of ours could.
#[tokio::test]
async fn a_panic_ends_every_leg_as_failed_and_the_thread_with_its_message() {
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let (runner, commands, health) = runner(&stop).await;
    health.ready();
    let stepped = attach::start_thread("test-step", runner).expect("the thread starts");

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = format!("http://{}", listener.local_addr().expect("it is bound"));
    let (sender, mut asked) = mpsc::channel(16);
    let profile = Profile {
        worker: "w".into(),
        incarnation: 1,
        vocab_size: 1000,
        page_tokens: 16,
        eos: vec![],
        adapters: None,
        model: None,
    };
    tokio::spawn(attach::serve(listener, profile, sender, stop.clone()));
    let (to, frames) = mpsc::channel(4);
    let hello = Some(proto::Hello { protocol: proto::PROTOCOL, router: "r".into() });
    to.send(RouterFrame { hello, submit: vec![submit(1), submit(2)], ..Default::default() })
        .await
        .expect("there is room");
    let mut client = WorkerClient::connect(address).await.expect("the service listens");
    let mut from = client.attach(ReceiverStream::new(frames)).await.expect("it attaches").into_inner();

    for _ in 0..3 {
        let mut command = asked.recv().await.expect("attach, submit, submit");
        if let Command::Submit(submission) = &mut command
            && submission.id.attempt == 2
        {
            submission.sequence.prompt_tokens = 0;
        }
        commands.send(command).await.expect("the thread lives");
    }

    let message = timeout(PATIENCE, stepped).await.expect("the thread ends").expect("and says how").unwrap_err();
    assert!(message.contains("the prompt is part of the tokens"), "{message}");
    assert_eq!(health.readiness(), Err(format!("the step thread ended: {message}")));
    let mut ended = Vec::new();
    while let Ok(Some(frame)) = timeout(PATIENCE, from.message()).await.expect("the stream ends") {
        ended.extend(frame.ended);
    }
    assert_eq!(ended.len(), 1, "the second one was never taken");
    assert_eq!((ended[0].attempt, ended[0].reason()), (1, Reason::Failed));
    assert!(ended[0].message.starts_with("the worker's step thread ended: it panicked"), "{}", ended[0].message);
}
