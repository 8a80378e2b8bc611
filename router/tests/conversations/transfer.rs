//! `kv_transfer_params` at a worker's own door: what the worker is asked, what the proxy is told, what is refused.

use crate::{
    mock::{MODEL, MockWorker},
    support::{TestRouter, output},
};
use cluster::Role;
use proto::{Submit, ended::Reason, submit::Leg};
use router::{KvTransfer, Policy};
use serde_json::{Value, json};
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";

/// Two full pages and a token of a third.
const PROMPT_TOKENS: usize = 33;

async fn start(role: Role, change: impl FnOnce(&mut KvTransfer)) -> (TestRouter, MockWorker) {
    let mut transfer = KvTransfer {
        peers: ["10.0.0.7:7001", "peer"].map(|peer| peer.parse().unwrap()).to_vec(),
        required: false,
        lease: Duration::from_secs(30),
        first_token_only: role == Role::Prefill,
    };
    change(&mut transfer);
    let router = TestRouter::start_with(Policy::Local, |config| config.kv_transfer = Some(transfer)).await;
    let worker = MockWorker::start(&*router.directory, "own", role).await;
    router.ready().await;
    (router, worker)
}

fn request(params: Value) -> Value {
    let prompt: Vec<usize> = (1..=PROMPT_TOKENS).collect();
    json!({"model": MODEL, "prompt": prompt, "max_tokens": 1, "kv_transfer_params": params})
}

fn remote() -> Value {
    json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_engine_id": "p@12", "remote_block_ids": ["ab"],
        "remote_host": "10.0.0.7", "remote_port": 7001, "remote_num_tokens": 32, "tp_size": 1})
}

async fn answered(router: &TestRouter, worker: &mut MockWorker, body: Value) -> (Value, Submit) {
    let (answer, submit) = tokio::join!(router.post(COMPLETIONS, body), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("x"), Reason::Stop);
        submit
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    (answer.json(), submit)
}

#[tokio::test]
async fn a_prefill_workers_own_door_takes_prompts_and_says_where_their_pages_are() {
    let (router, mut worker) = start(Role::Prefill, |_| {}).await;
    let (answer, submit) = answered(&router, &mut worker, request(json!({"do_remote_decode": true}))).await;
    assert_eq!((submit.keep_ms, submit.fetch), (30_000, None));
    assert!(matches!(submit.leg, Some(Leg::Local(_))), "{:?}", submit.leg);
    let told = &answer["kv_transfer_params"];
    assert_eq!(told["remote_num_tokens"], 32);
    assert!(told["remote_engine_id"].as_str().is_some_and(|id| id.starts_with("own@")), "{told}");
    assert!(told["remote_port"].is_u64() && told["remote_host"].is_string(), "{told}");
    assert_eq!(told["remote_block_ids"].as_array().map(Vec::len), Some(1));
    // Who asks for nothing is told nothing, and nothing is kept.
    for nothing in [json!(null), json!({}), json!({"do_remote_decode": false, "do_remote_prefill": null})] {
        let (answer, submit) = answered(&router, &mut worker, request(nothing)).await;
        assert_eq!((answer.get("kv_transfer_params"), submit.keep_ms, submit.fetch), (None, 0, None));
    }
    // Counting needs no token.
    let count = json!({"messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(router.post("/v1/messages/count_tokens", count).await.status, 200);
}

#[tokio::test]
async fn what_a_proxy_was_told_is_fetched_from_there() {
    let (router, mut worker) = start(Role::Decode, |_| {}).await;
    let (answer, submit) = answered(&router, &mut worker, request(remote())).await;
    let fetch = submit.fetch.expect("pages to fetch");
    assert_eq!((&*fetch.worker, fetch.incarnation, &*fetch.link), ("p", 12, "10.0.0.7:7001"));
    assert_eq!((fetch.pages, fetch.required, submit.keep_ms), (2, false, 0));
    assert_eq!(answer.get("kv_transfer_params"), None);
    // No more than is there, and nothing where there is nothing.
    for (tokens, pages) in [(json!(17), Some(1)), (json!(15), None), (json!(0), None), (json!(null), Some(2))] {
        let mut params = remote();
        params["remote_num_tokens"] = tokens;
        let (_, submit) = answered(&router, &mut worker, request(params)).await;
        assert_eq!(submit.fetch.map(|fetch| fetch.pages), pages);
    }
    // Each attempt is a hand-off of its own.
    let (answer, fetches) = tokio::join!(router.post(COMPLETIONS, request(remote())), async {
        let first = worker.submission().await;
        worker.emit(&first, 0, &[], Some(crate::mock::failed(Reason::Failed, "boom")));
        let second = worker.submission().await;
        worker.answer(&second, &output("x"), Reason::Stop);
        [first, second].map(|submit| submit.fetch.expect("pages to fetch").handoff)
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_ne!(fetches[0], fetches[1]);

    let (router, mut worker) = start(Role::Decode, |transfer| transfer.required = true).await;
    let (_, submit) = answered(&router, &mut worker, request(remote())).await;
    assert!(submit.fetch.is_some_and(|fetch| fetch.required));
}

#[tokio::test]
async fn what_is_wrong_is_named_and_goes_nowhere() {
    let (router, mut worker) = start(Role::Decode, |_| {}).await;
    let check = async |change: Value, param: &str, words: &str| {
        let mut params = remote();
        params.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let answer = router.post(COMPLETIONS, request(params)).await;
        let param = if param.is_empty() { "kv_transfer_params".into() } else { format!("kv_transfer_params.{param}") };
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(&*param)), "{}", answer.body);
        assert!(answer.error().contains(words), "{}", answer.body);
    };
    check(json!({"do_remote_decode": true}), "", "cannot both be true").await;
    check(json!({"do_remote_decode": 1}), "do_remote_decode", "true or false, got 1").await;
    check(json!({"remote_host": "10.0.0.8"}), "remote_host", "\"10.0.0.8:7001\" is not among").await;
    check(json!({"remote_port": 7002}), "remote_host", "--kv-peer").await;
    check(json!({"remote_host": null}), "remote_host", "a string, got null").await;
    check(json!({"remote_port": 0}), "remote_port", "1 to 65535, got 0").await;
    check(json!({"remote_port": null}), "remote_port", "1 to 65535, got null").await;
    check(json!({"remote_engine_id": "p"}), "remote_engine_id", "NAME@NUMBER, got \"p\"").await;
    check(json!({"remote_engine_id": "@1"}), "remote_engine_id", "NAME@NUMBER").await;
    check(json!({"remote_num_tokens": -1}), "remote_num_tokens", "got -1").await;
    let many = json!({"model": MODEL, "prompt": ["a", "b"], "kv_transfer_params": {"do_remote_decode": true}});
    let answer = router.post(COMPLETIONS, many).await;
    assert!(
        answer.status == 400 && answer.error().contains("speaks of one prompt, and there are 2"),
        "{}",
        answer.body
    );
    let message = json!({"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}],
        "input": "hi", "kv_transfer_params": {"do_remote_decode": true}});
    for path in ["/v1/messages", "/v1/responses"] {
        let answer = router.post(path, &message).await;
        assert!(answer.status == 400 && answer.body.contains("kv_transfer_params"), "{}", answer.body);
    }
    // Any port of a host that was named without one.
    let mut params = remote();
    (params["remote_host"], params["remote_port"]) = (json!("Peer"), json!(9));
    answered(&router, &mut worker, request(params)).await;

    let (router, mut worker) = start(Role::Prefill, |_| {}).await;
    for (most, got) in [(json!(2), "got 2"), (json!(null), "got 16")] {
        let answer = router.post(COMPLETIONS, json!({"model": MODEL, "prompt": "x", "max_tokens": most})).await;
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("max_tokens")));
        assert!(answer.error().contains(got), "{}", answer.body);
    }
    assert!(!worker.has_submission(), "nothing refused may reach a worker");
}
