//! Workers that come, go, and say what they hold.

use crate::{
    mock::{MODEL, MockWorker, failed, prompt_ids},
    support::{TestRouter, output, tokens},
};
use bytes::Bytes;
use cluster::{Role, State};
use proto::{PageEvents, ended::Reason};
use router::Policy;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

fn completion(prompt: &str) -> Value {
    json!({"model": MODEL, "prompt": prompt})
}

#[tokio::test]
async fn readiness_needs_a_whole_path() {
    let router = TestRouter::start(Policy::Remote).await;
    let answer = router.post(COMPLETIONS, completion("x")).await;
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert_eq!(answer.headers["retry-after"], "1");
    for path in ["/readyz", "/health"] {
        assert_eq!(router.get(path).await.status, 503);
    }
    assert_eq!(router.get("/livez").await.status, 200);
    let decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    let prefill = MockWorker::start(&*router.directory, "prefill", Role::Prefill).await;
    router.ready().await;
    assert_eq!(router.get("/readyz").await.status, 200);
    prefill.set_state(State::Draining);
    router.readiness(false).await;
    prefill.set_state(State::Ready);
    router.readiness(true).await;
    decode.send(proto::WorkerFrame {
        load: Some(proto::Load { draining: true, ..Default::default() }),
        ..Default::default()
    });
    router.readiness(false).await;
}

#[tokio::test]
async fn a_decode_worker_alone_is_a_path_unless_hand_offs_are_forced() {
    let router = TestRouter::start(Policy::Auto).await;
    let prefill = MockWorker::start(&*router.directory, "prefill", Role::Prefill).await;
    let decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    drop(prefill);
    let _decode = decode.answer_all(&output("alone"), Reason::Stop);
    let answer = router.post(COMPLETIONS, completion(&"long ".repeat(100))).await;
    assert_eq!(answer.json()["choices"][0]["text"], "alone");
}

#[tokio::test]
async fn a_worker_of_another_model_is_ignored() {
    let router = TestRouter::start(Policy::Auto).await;
    let change = |member: &mut cluster::Member| member.model.as_mut().unwrap().name = "other".into();
    let _other = MockWorker::start_with(&*router.directory, "other", Role::Decode, change).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    let _worker = worker.answer_all(&output("mine"), Reason::Stop);
    for _ in 0..4 {
        assert_eq!(router.post(COMPLETIONS, completion("x")).await.json()["choices"][0]["text"], "mine");
    }
}

#[tokio::test]
async fn a_worker_the_directory_forgot_still_serves() {
    let router = TestRouter::start(Policy::Auto).await;
    let mut worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    worker.leave_directory().await;
    let worker = worker.answer_all(&output("still here"), Reason::Stop);
    assert_eq!(router.post(COMPLETIONS, completion("x")).await.json()["choices"][0]["text"], "still here");
    drop(worker);
    router.readiness(false).await;
}

#[tokio::test]
async fn a_worker_that_comes_back_is_attached_again() {
    let router = TestRouter::start(Policy::Auto).await;
    let mut worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    worker.hang_up();
    router.readiness(false).await;
    router.readiness(true).await;
    let (answer, ()) = tokio::join!(router.post(COMPLETIONS, completion("x")), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("back"), Reason::Stop);
    });
    assert_eq!(answer.json()["choices"][0]["text"], "back");
}

#[tokio::test]
async fn an_adapter_is_served_by_those_who_have_it_also_after_one_fails() {
    let router = TestRouter::start(Policy::Local).await;
    let mut have = Vec::new();
    for id in ["a", "b"] {
        have.push(MockWorker::start(&*router.directory, id, Role::Decode).await);
    }
    let mut lacks = MockWorker::start(&*router.directory, "c", Role::Decode).await;
    router.ready().await;
    let request = json!({"model": "poet", "prompt": "x"});
    let unknown = router.post(COMPLETIONS, request.clone()).await;
    assert_eq!(unknown.status, 404, "{}", unknown.body);
    for worker in &have {
        worker.attached().await;
        let poet = proto::Adapter { name: "poet".into(), id: "12ab".into(), path: "/poet".into() };
        let adapters = Some(proto::Adapters { adapters: vec![poet] });
        worker.send(proto::WorkerFrame { adapters, ..Default::default() });
    }
    crate::support::within("the model", async { while router.get("/v1/models/poet").await.status != 200 {} }).await;
    let text = output("verse");
    let (answer, ()) = tokio::join!(router.post(COMPLETIONS, request), async {
        let first = loop {
            match have.iter_mut().position(MockWorker::has_submission) {
                Some(first) => break first,
                None => tokio::task::yield_now().await,
            }
        };
        let submit = have[first].submission().await;
        assert_eq!(submit.adapter.as_ref().map(|adapter| adapter.id.as_str()), Some("12ab"));
        have[first].emit(&submit, 0, &text[..1], Some(failed(Reason::Failed, "boom")));
        let again = have[1 - first].submission().await;
        assert_eq!((&again.adapter, prompt_ids(&again).len()), (&submit.adapter, prompt_ids(&submit).len() + 1));
        have[1 - first].answer(&again, &text, Reason::Stop);
    });
    assert_eq!(
        (answer.json()["choices"][0]["text"].as_str(), answer.json()["model"].as_str()),
        (Some("verse"), Some("poet"))
    );
    assert!(!lacks.has_submission());
    let base = router.get("/v1/models").await.json();
    assert_eq!(base["data"][1]["root"], "/poet", "{base}");
}

/// Hashes of the full pages of a prompt, as page events carry them.
fn pages(prompt: &str) -> Bytes {
    let hashes = kv_cache::page_hashes(b"", &tokens(prompt), 16);
    hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect::<Vec<u8>>().into()
}

#[tokio::test]
async fn a_prompt_goes_where_its_prefix_is() {
    let router = TestRouter::start(Policy::Local).await;
    let mut cold = MockWorker::start(&*router.directory, "cold", Role::Decode).await;
    let mut warm = MockWorker::start(&*router.directory, "warm", Role::Decode).await;
    router.ready().await;
    let prompt = "all about the cache ".repeat(12);
    cold.pages(PageEvents { sequence: 1, snapshot: true, ..PageEvents::default() });
    warm.pages(PageEvents { sequence: 1, snapshot: true, stored: pages(&prompt), ..PageEvents::default() });
    ask_until(&router, &mut warm, &mut cold, &prompt).await;

    // A gap: what the worker holds is not known any more until it says so anew.
    warm.pages(PageEvents { sequence: 9, evicted: pages(&prompt), ..PageEvents::default() });
    warm.resync().await;
    warm.pages(PageEvents { sequence: 10, snapshot: true, ..PageEvents::default() });
    cold.pages(PageEvents { sequence: 2, stored: pages(&prompt), ..PageEvents::default() });
    ask_until(&router, &mut cold, &mut warm, &prompt).await;
}

/// Asks until `wanted` gets the request three times in a row; page events travel beside requests, so the first few may go astray.
async fn ask_until(router: &TestRouter, wanted: &mut MockWorker, other: &mut MockWorker, prompt: &str) {
    let mut in_a_row = 0;
    for _ in 0..200 {
        let (answer, ()) = tokio::join!(router.post(COMPLETIONS, completion(prompt)), async {
            loop {
                if wanted.has_submission() {
                    let submit = wanted.submission().await;
                    wanted.answer(&submit, &output("ok"), Reason::Stop);
                    in_a_row += 1;
                    return;
                }
                if other.has_submission() {
                    let submit = other.submission().await;
                    other.answer(&submit, &output("ok"), Reason::Stop);
                    in_a_row = 0;
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(answer.status, 200, "{}", answer.body);
        if in_a_row == 3 {
            return;
        }
    }
    panic!("requests do not go to {}", wanted.id);
}

#[tokio::test]
async fn prefix_caches_are_reset_on_all_workers_where_that_is_allowed() {
    let router = TestRouter::start_with(Policy::Auto, |config| config.cache_reset = true).await;
    let mut prefill = MockWorker::start(&*router.directory, "prefill", Role::Prefill).await;
    let mut decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    prefill.attached().await;
    const RESET: &str = "/reset_prefix_cache";
    for done in [[true, true], [true, false], [false, false]] {
        let (answer, (), ()) =
            tokio::join!(router.post(RESET, json!({})), prefill.reset(done[0]), decode.reset(done[1]));
        assert_eq!((answer.status, answer.json()), (200, json!({"success": done == [true, true]})));
    }
    let (answer, (), ()) = tokio::join!(router.post(RESET, json!({})), prefill.reset(true), async {
        decode.asked_to_reset().await;
        decode.hang_up();
    });
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(answer.error().contains("worker decode: its stream ended"), "{}", answer.body);
    for query in ["reset_running_requests=true", "reset_external=true", "reset_external=maybe"] {
        let answer = router.post(&format!("{RESET}?{query}"), json!({})).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.error().contains(query.split('=').next().unwrap()), "{}", answer.body);
    }
    let closed = TestRouter::start(Policy::Local).await;
    let answer = closed.post(RESET, json!({})).await;
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(answer.error().contains("cache_reset = true"), "{}", answer.body);
}
