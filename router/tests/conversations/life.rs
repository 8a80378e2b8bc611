//! The life of a request: hand-off, cancel, recovery, overload, drain.

use crate::{
    mock::{MODEL, MockWorker, ended, failed, prompt_ids},
    support::{EOS, TestRouter, output, streamed, tokens, within},
};
use cluster::{Member, Role};
use hyper::Method;
use proto::{PageEvents, ended::Reason, submit::Leg};
use router::Policy;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const CHAT: &str = "/v1/chat/completions";

fn chat(stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "What is a KV cache?"}], "stream": stream})
}

/// A router, a prefill and a decode worker, and nothing but hand-offs.
async fn pair() -> (TestRouter, MockWorker, MockWorker) {
    let router = TestRouter::start(Policy::Remote).await;
    let prefill = MockWorker::start(&*router.directory, "prefill", Role::Prefill).await;
    let decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, prefill, decode)
}

/// A router and several decode workers that compute prompts themselves.
async fn decoders<const N: usize>(change: impl FnOnce(&mut router::Config)) -> (TestRouter, [MockWorker; N]) {
    let router = TestRouter::start_with(Policy::Local, change).await;
    let mut workers = Vec::new();
    for i in 0..N {
        workers.push(MockWorker::start(&*router.directory, &format!("decode-{i}"), Role::Decode).await);
    }
    let workers: [MockWorker; N] = workers.try_into().unwrap();
    router.ready().await;
    (router, workers)
}

/// Waits until one of two workers gets a submission; returns it first.
async fn first_asked<'a>(a: &'a mut MockWorker, b: &'a mut MockWorker) -> (&'a mut MockWorker, &'a mut MockWorker) {
    let asked = async {
        loop {
            if a.has_submission() {
                return true;
            }
            if b.has_submission() {
                return false;
            }
            tokio::task::yield_now().await;
        }
    };
    if within("a submission to either worker", asked).await { (a, b) } else { (b, a) }
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

#[tokio::test]
async fn a_chunk_does_not_wait_for_the_acknowledgement_of_the_one_before() {
    let (router, [mut worker]) = decoders(|_| {}).await;
    let (token, mut client) = (tokens("word")[0], TcpStream::connect(router.address).await.unwrap());
    let body = json!({"model": MODEL, "prompt": "x", "max_tokens": ROUNDS + 2, "stream": true}).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length";
    client.write_all(format!("{head}: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let submit = worker.submission().await;
    let began = Instant::now();
    for index in 0..ROUNDS {
        delay_acknowledgement(&client);
        worker.emit(&submit, index, &[token], None);
        let mut read = Vec::new();
        while !read.ends_with(b"}\n\n\r\n") {
            let byte = within("a chunk", client.read_u8()).await.unwrap();
            read.push(byte);
        }
    }
    let (took, delayed) = (began.elapsed(), delayed().await);
    assert!(took < delayed / 2, "{ROUNDS} chunks took {took:?}; with delayed acknowledgements it would be {delayed:?}");
}

/// Passes on what goes between a router and the worker at `address`, and is slow to acknowledge what the router sends. Returns its own
/// address.
fn relay(address: &str) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let (own, worker) = (listener.local_addr().unwrap(), address.to_owned());
    tokio::spawn(async move {
        let (mut router, _) = TcpListener::from_std(listener).unwrap().accept().await.unwrap();
        let mut worker = TcpStream::connect(worker).await.unwrap();
        for socket in [&router, &worker] {
            socket.set_nodelay(true).unwrap();
        }
        let (mut down, mut up) = (vec![0; 4096], vec![0; 4096]);
        loop {
            delay_acknowledgement(&router);
            tokio::select! {
                Ok(read @ 1..) = router.read(&mut down) => worker.write_all(&down[..read]).await.unwrap(),
                Ok(read @ 1..) = worker.read(&mut up) => router.write_all(&up[..read]).await.unwrap(),
                else => return,
            }
        }
    });
    own.to_string()
}

#[tokio::test]
async fn a_submission_does_not_wait_for_the_acknowledgement_of_the_one_before() {
    let router = TestRouter::start(Policy::Local).await;
    let slow = |member: &mut Member| member.address = relay(&member.address);
    let mut worker = MockWorker::start_with(&*router.directory, "decode", Role::Decode, slow).await;
    router.ready().await;
    let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 9}).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length";
    let request = format!("{head}: {}\r\n\r\n{body}", body.len());
    let mut clients = Vec::new();
    let began = Instant::now();
    for _ in 0..ROUNDS {
        let mut client = TcpStream::connect(router.address).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        worker.submission().await;
        clients.push(client);
    }
    let (took, delayed) = (began.elapsed(), delayed().await);
    assert!(
        took < delayed / 2,
        "{ROUNDS} submissions took {took:?}; with delayed acknowledgements it would be {delayed:?}"
    );
}

#[tokio::test]
async fn both_legs_start_at_once_and_tokens_come_in_order() {
    let (router, mut prefill, mut decode) = pair().await;
    let text = "It keeps the keys and values of tokens.";
    let out = output(text);
    let (stream, ()) = tokio::join!(router.open(CHAT, chat(true)), async {
        let (at_prefill, at_decode) = (prefill.submission().await, decode.submission().await);
        let (Some(Leg::Prefill(p)), Some(Leg::Decode(d))) = (&at_prefill.leg, &at_decode.leg) else {
            panic!("{at_prefill:?} {at_decode:?}")
        };
        assert_eq!(p.handoff, d.handoff);
        assert_eq!((p.worker.as_str(), p.incarnation, p.link.as_str()), ("decode", 77, "decode.link:1"));
        assert_eq!((d.worker.as_str(), d.incarnation), ("prefill", 77));
        assert_ne!(at_prefill.attempt, at_decode.attempt);
        assert_eq!(at_prefill.tokens, at_decode.tokens);
        assert_eq!(at_prefill.sampling, at_decode.sampling);
        // The decode worker's first tokens overtake token 0, and token 0 comes twice.
        decode.emit(&at_decode, 1, &out[1..4], None);
        prefill.emit(&at_prefill, 0, &out[..1], Some(ended(Reason::HandedOff, 0)));
        decode.emit(&at_decode, 0, &out[..1], None);
        decode.emit(&at_decode, 4, &out[4..], Some(ended(Reason::Stop, EOS)));
    });
    let chunks = stream.chunks().await;
    assert_eq!(streamed(&chunks, 0), text);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_request_that_ends_with_token_zero_calls_the_decode_leg_off() {
    let (router, mut prefill, mut decode) = pair().await;
    let (answer, expected) = tokio::join!(router.post(CHAT, chat(false)), async {
        let (at_prefill, at_decode) = (prefill.submission().await, decode.submission().await);
        prefill.emit(&at_prefill, 0, &[EOS], Some(ended(Reason::Stop, EOS)));
        at_decode.attempt
    });
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "");
    assert_eq!(answer.json()["usage"]["completion_tokens"], 1);
    assert_eq!(decode.cancel().await, expected);
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_every_leg() {
    let (router, mut prefill, mut decode) = pair().await;
    let (stream, legs) = tokio::join!(router.open(CHAT, chat(true)), async {
        let (at_prefill, at_decode) = (prefill.submission().await, decode.submission().await);
        prefill.emit(&at_prefill, 0, &tokens("Hi")[..1], None);
        (at_prefill.attempt, at_decode.attempt)
    });
    drop(stream);
    assert_eq!((prefill.cancel().await, decode.cancel().await), legs);
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_cancels_every_leg() {
    let (router, mut prefill, mut decode) = pair().await;
    for stream in [false, true] {
        let (mut connection, request) = router.request(Method::POST, CHAT, Some(chat(stream).to_string()), &[]).await;
        let mut answer = Box::pin(connection.sender.send_request(request));
        let legs = tokio::select! {
            answer = &mut answer => panic!("{answer:?}"),
            legs = async { (prefill.submission().await.attempt, decode.submission().await.attempt) } => legs,
        };
        drop(answer);
        drop(connection);
        assert_eq!((prefill.cancel().await, decode.cancel().await), legs);
    }
}

#[tokio::test]
async fn a_worker_lost_before_token_zero_is_replaced() {
    let (router, [mut a, mut b]) = decoders::<2>(|_| {}).await;
    let (answer, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        let (lost, other) = first_asked(&mut a, &mut b).await;
        lost.submission().await;
        lost.hang_up();
        let again = other.submission().await;
        other.answer(&again, &output("Saved."), Reason::Stop);
    });
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "Saved.");
}

#[tokio::test]
async fn a_worker_lost_after_token_zero_is_replaced_and_the_stream_goes_on() {
    let (router, [mut a, mut b]) = decoders::<2>(|_| {}).await;
    let out = output("The stream goes on, it does.");
    let (stream, ()) = tokio::join!(router.open(CHAT, chat(true)), async {
        let (lost, other) = first_asked(&mut a, &mut b).await;
        let submit = lost.submission().await;
        lost.emit(&submit, 0, &out[..3], None);
        lost.hang_up();
        let again = other.submission().await;
        assert_eq!(again.prompt_tokens, submit.prompt_tokens);
        assert_eq!(
            prompt_ids(&again),
            [&prompt_ids(&submit)[..], &out[..3]].concat(),
            "the prompt and what was emitted"
        );
        assert_eq!(again.sampling, submit.sampling, "the same seed, so the same continuation");
        other.answer(&again, &out, Reason::Stop);
    });
    let chunks = stream.chunks().await;
    assert_eq!(streamed(&chunks, 0), "The stream goes on, it does.");
    assert!(chunks.iter().all(|chunk| chunk.get("error").is_none()));
}

#[tokio::test]
async fn a_refused_hand_off_goes_to_another_decode_worker() {
    let (router, mut prefill, mut first) = pair().await;
    let out = output("Second try.");
    let (answer, _second) = tokio::join!(router.post(CHAT, chat(false)), async {
        let (at_prefill, at_decode) = (prefill.submission().await, first.submission().await);
        let mut second = MockWorker::start(&*router.directory, "decode-2", Role::Decode).await;
        second.attached().await;
        prefill.emit(&at_prefill, 0, &out[..1], None);
        first.emit(&at_decode, 0, &[], Some(failed(Reason::Refused, "no room")));
        assert_eq!(prefill.cancel().await, at_prefill.attempt, "the leg that is left is called off");
        let (again, landed) = (prefill.submission().await, second.submission().await);
        assert_eq!(prompt_ids(&again).len(), prompt_ids(&at_prefill).len() + 1);
        assert_eq!(again.prompt_tokens, at_prefill.prompt_tokens);
        prefill.answer(&again, &out, Reason::Stop);
        second.answer(&landed, &out, Reason::Stop);
        second
    });
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "Second try.");
}

#[tokio::test]
async fn a_hand_off_that_token_zero_made_needless_is_no_failure() {
    let (router, mut prefill, mut decode) = pair().await;
    let (answer, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        let (at_prefill, at_decode) = (prefill.submission().await, decode.submission().await);
        // The decode worker learns over the link that the hand-off is off, and is faster to say so.
        decode.emit(&at_decode, 0, &[], Some(failed(Reason::Failed, "hand-off lost: the prefill leg ended: Length")));
        // A gap in its page events: when the router asks for all of them, it has read what came before.
        decode.pages(PageEvents { sequence: 1, snapshot: true, ..PageEvents::default() });
        decode.pages(PageEvents { sequence: 9, ..PageEvents::default() });
        decode.resync().await;
        let out = output("One");
        prefill.emit(&at_prefill, 0, &out[..1], Some(ended(Reason::Length, 0)));
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "length");
    assert!(!prefill.has_submission() && !decode.has_submission(), "nothing is tried again");
}

#[tokio::test]
async fn attempts_are_bounded_and_the_last_words_are_told() {
    let (router, [mut worker]) = decoders::<1>(|config| config.limits.max_attempts = 3).await;
    let (answer, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        for _ in 0..3 {
            let submit = worker.submission().await;
            worker.emit(&submit, 0, &[], Some(failed(Reason::Failed, "page 7 is on fire")));
        }
    });
    assert_eq!(answer.status, 500);
    assert!(answer.error().contains("3 attempts") && answer.error().contains("page 7 is on fire"), "{}", answer.body);
    let (answer, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &[], Some(failed(Reason::Invalid, "token 9 is outside the vocabulary")));
    });
    assert_eq!(answer.status, 400, "what no worker can do is not tried again");
    assert!(!worker.has_submission());
}

#[tokio::test]
async fn a_stream_that_cannot_go_on_ends_with_an_error_event() {
    let (router, [mut worker]) = decoders::<1>(|config| config.limits.max_attempts = 1).await;
    let (stream, ()) = tokio::join!(router.open(CHAT, chat(true)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hello there"), None);
        worker.emit(&submit, 0, &[], Some(failed(Reason::Failed, "out of luck")));
    });
    assert_eq!(stream.status, 200);
    let chunks = stream.chunks().await;
    assert_eq!(streamed(&chunks[..chunks.len() - 1], 0), "Hello there");
    let error = &chunks.last().unwrap()["error"];
    assert!(error["message"].as_str().unwrap().contains("out of luck"), "{error}");
    assert_eq!((&error["type"], &error["code"]), (&json!("InternalServerError"), &json!(500)));
}

#[tokio::test]
async fn silence_is_not_waited_out_for_ever() {
    let (router, [mut worker]) = decoders::<1>(|config| {
        config.limits.first_token_timeout_ms = 50;
        config.limits.stall_timeout_ms = 50;
        config.limits.max_attempts = 2;
    })
    .await;
    let (answer, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        let silent = worker.submission().await;
        assert_eq!(worker.cancel().await, silent.attempt);
        let stalled = worker.submission().await;
        worker.emit(&stalled, 0, &tokens("Hi")[..1], None);
        assert_eq!(worker.cancel().await, stalled.attempt);
    });
    assert_eq!(answer.status, 504, "{}", answer.body);
}

#[tokio::test]
async fn too_much_is_turned_away_before_any_work() {
    let (router, [mut worker]) = decoders::<1>(|config| {
        config.limits.max_concurrent = 1;
        config.limits.max_queued = 0;
    })
    .await;
    let (stream, submit) = tokio::join!(router.open(CHAT, chat(true)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hi")[..1], None);
        submit
    });
    let refused = router.post(CHAT, chat(false)).await;
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert_eq!(refused.headers["retry-after"], "1");
    assert!(!worker.has_submission());
    worker.emit(&submit, 1, &[EOS], Some(ended(Reason::Stop, EOS)));
    stream.chunks().await;
    let (next, ()) = tokio::join!(router.post(CHAT, chat(false)), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("ok"), Reason::Stop);
    });
    assert_eq!(next.status, 200, "the turn was given back");
}

#[tokio::test]
async fn shutdown_lets_streams_finish_and_takes_nothing_new() {
    let (mut router, [mut worker]) = decoders::<1>(|_| {}).await;
    let (mut stream, submit) = tokio::join!(router.open(CHAT, chat(true)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hello")[..1], None);
        submit
    });
    stream.chunk().await;
    router.shutdown.cancel();
    router.readiness(false).await;
    worker.emit(&submit, 1, &[EOS], Some(ended(Reason::Stop, EOS)));
    let chunks = stream.chunks().await;
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    within("the end of run", &mut router.running).await.unwrap().unwrap();
}

#[tokio::test]
async fn streams_still_open_after_the_drain_end_with_an_error_event() {
    let (mut router, [mut worker]) = decoders::<1>(|config| config.limits.drain_timeout_ms = 50).await;
    let (stream, submit) = tokio::join!(router.open(CHAT, chat(true)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hello")[..1], None);
        submit
    });
    router.shutdown.cancel();
    let chunks = stream.chunks().await;
    assert_eq!(chunks.last().unwrap()["error"]["type"], "ServiceUnavailableError");
    assert_eq!(worker.cancel().await, submit.attempt);
    within("the end of run", &mut router.running).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_is_let_go() {
    let router = TestRouter::start_with(Policy::Local, |config| config.limits.stream_buffer_tokens = 256).await;
    let endless = |member: &mut cluster::Member| member.model.as_mut().unwrap().max_model_len = 1 << 30;
    let mut worker = MockWorker::start_with(&*router.directory, "decode", Role::Decode, endless).await;
    router.ready().await;
    let word = tokens(" word")[0];
    let (stream, submit) = tokio::join!(router.open(CHAT, chat(true)), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &[word], None);
        submit
    });
    // The sockets between take some megabytes before anybody notices.
    let mut index = 1;
    while !worker.has_cancel() {
        worker.emit_slowly(&submit, index, &[word; 100]).await;
        index += 100;
        assert!(index < 10_000_000, "nobody stopped the worker");
    }
    assert_eq!(worker.cancel().await, submit.attempt);
    let chunks = stream.chunks().await;
    assert_eq!(chunks.last().unwrap()["error"]["type"], "SlowClientError");
}

#[tokio::test]
async fn traces_go_on_in_the_workers() {
    let (router, [mut worker]) = decoders::<1>(|_| {}).await;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (given, expected) in [(traceparent, traceparent), ("nonsense", "")] {
        let body = Some(chat(false).to_string());
        let headers = [("traceparent", given), ("x-request-id", "r-1")];
        let (answer, submit) = tokio::join!(router.send(Method::POST, CHAT, body, &headers), async {
            let submit = worker.submission().await;
            worker.answer(&submit, &output("ok"), Reason::Stop);
            submit
        });
        assert_eq!(answer.status, 200);
        assert_eq!((submit.traceparent.as_str(), submit.request.as_str()), (expected, "r-1"));
    }
}
