//! Who gets a turn, who is turned away, which workers are shunned, and how a request learns why.

use crate::{
    mock::{MODEL, MockWorker, failed, prompt_ids},
    support::{Answer, TestRouter, output, tokens, within},
};
use cluster::Role;
use hyper::Method;
use proto::{Load, Pace, ended::Reason};
use router::{Config, Policy};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const COMPLETIONS: &str = "/v1/completions";

fn completion(prompt: &str, priority: i32) -> Value {
    json!({"model": MODEL, "prompt": prompt, "priority": priority})
}

/// A router and workers that compute prompts and decode.
async fn decoders<const N: usize>(change: impl FnOnce(&mut Config)) -> (TestRouter, [MockWorker; N]) {
    let router = TestRouter::start_with(Policy::Local, change).await;
    let mut workers = Vec::new();
    for i in 0..N {
        workers.push(MockWorker::start(&*router.directory, &format!("decode-{i}"), Role::Decode).await);
    }
    router.ready().await;
    (router, workers.try_into().unwrap())
}

async fn post(router: &TestRouter, body: Value, headers: &[(&str, &str)]) -> Answer {
    router.send(Method::POST, COMPLETIONS, Some(body.to_string()), headers).await.whole().await
}

/// Waits until this many requests wait for their turn.
async fn waiting(router: &TestRouter, count: usize) {
    let reached = async {
        while router.get("/load").await.json()["server_load"] != count {
            tokio::task::yield_now().await;
        }
    };
    within("requests in the house", reached).await;
}

/// Does what is to be done while requests are under way.
async fn with<T>(requests: impl Future<Output = T>, meanwhile: impl Future<Output = ()>) -> T {
    tokio::join!(requests, meanwhile).0
}

#[tokio::test]
async fn the_better_class_goes_first() {
    let (router, [mut worker]) = decoders::<1>(|config| config.limits.max_concurrent = 1).await;
    let router = &router;
    let first = post(router, completion("first", 0), &[]);
    let late = async {
        waiting(router, 1).await;
        post(router, completion("patient", 5), &[]).await
    };
    let better = async {
        waiting(router, 2).await;
        post(router, completion("urgent", -5), &[]).await
    };
    let serve = async {
        waiting(router, 3).await;
        for prompt in ["first", "urgent", "patient"] {
            let submit = worker.submission().await;
            assert!(prompt_ids(&submit).ends_with(&tokens(prompt)), "{prompt} is next");
            assert!(!worker.has_submission());
            worker.answer(&submit, &output("ok"), Reason::Stop);
        }
    };
    let (a, b, c, ()) = tokio::join!(first, late, better, serve);
    assert_eq!([a.status, b.status, c.status], [200; 3]);
}

#[tokio::test]
async fn requests_wait_at_the_router_while_every_worker_has_enough_to_do() {
    let (router, [mut worker]) = decoders::<1>(|_| {}).await;
    let busy = Load { running: 1, backlog_ms: 1e6, pages_free: 500, received: 1 << 60, ..Load::default() };
    worker.load(busy);
    let request = loop {
        let mut request = Box::pin(post(&router, completion("patient", 0), &[]));
        // Until the report has come, requests go.
        tokio::select! {
            _ = &mut request => panic!("nobody answered"),
            submit = worker.submission() => worker.answer(&submit, &output("ok"), Reason::Stop),
            () = tokio::time::sleep(Duration::from_millis(200)) => break request,
        }
        assert_eq!(request.await.status, 200);
    };
    let answer = with(request, async {
        worker.load(Load { backlog_ms: 10.0, ..busy });
        let submit = worker.submission().await;
        worker.answer(&submit, &output("ok"), Reason::Stop);
    });
    assert_eq!(answer.await.status, 200);
}

#[tokio::test]
async fn an_objective_that_cannot_be_met_is_refused_with_what_was_predicted() {
    let (router, [mut worker]) = decoders::<1>(|config| config.limits.worker_backlog_ms = 60_000).await;
    let answered = with(post(&router, completion("first", 0), &[]), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("ok"), Reason::Stop);
        // Two seconds of prompts are ahead of whatever comes.
        worker.load(Load {
            running: 1,
            backlog_ms: 2_000.0,
            pages_free: 500,
            pace: Some(Pace { step_us: 1_000.0, token_us: 100.0, ..Pace::default() }),
            received: submit.attempt,
            ..Load::default()
        });
    });
    assert_eq!(answered.await.status, 200);
    let refused = within("a refusal", async {
        loop {
            let request =
                post(&router, completion("late", 0), &[("x-baton-ttft-ms", "500"), ("x-request-id", "late-1")]);
            // Until the report has come, it is sent.
            tokio::select! {
                answer = request => return answer,
                submit = worker.submission() => worker.answer(&submit, &output("ok"), Reason::Stop),
            }
        }
    })
    .await;
    assert_eq!(refused.status, 429, "{}", refused.body);
    let error = &refused.json()["error"];
    let predicted = error["predicted_ttft_ms"].as_u64().unwrap();
    assert!((1_000..2_100).contains(&predicted), "{error}");
    assert_eq!(error["wanted_ttft_ms"], 500);
    assert!(["1", "2"].contains(&refused.headers["retry-after"].to_str().unwrap()));
    assert!(refused.error().contains("later than the 500 ms"), "{error}");
    let why = router.get("/v1/requests/late-1/why").await.json();
    assert_eq!((&why["wanted_ttft_ms"], &why["attempts"]), (&json!(500.0), &json!([])));
    assert!(why["refused"].as_str().unwrap().contains("later than the 500 ms"), "{why}");
    for bad in ["soon", "0", "-1", "1.5", "99999999999"] {
        let answer = post(&router, completion("x", 0), &[("x-baton-ttft-ms", bad)]).await;
        assert_eq!((answer.status, answer.error().contains(bad)), (400, true), "{}", answer.body);
    }
}

#[tokio::test]
async fn why_tells_what_was_weighed_and_what_then_happened() {
    let (router, [mut a, mut b]) = decoders::<2>(|_| {}).await;
    let headers = [("x-request-id", "asked-1"), ("x-baton-why", "1")];
    let answer = with(post(&router, completion("tell me", 3), &headers), async {
        let (worker, other) = tokio::select! {
            submit = a.submission() => { a.emit(&submit, 0, &[], Some(failed(Reason::Failed, "boom"))); ("decode-0", &mut b) }
            submit = b.submission() => { b.emit(&submit, 0, &[], Some(failed(Reason::Failed, "boom"))); ("decode-1", &mut a) }
        };
        let submit = other.submission().await;
        other.answer(&submit, &output("ok"), Reason::Stop);
        assert_ne!(worker, other.id);
    })
    .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let line = answer.headers["x-baton-why"].to_str().unwrap();
    assert!(line.starts_with("local decode-") && line.ends_with("attempts=2"), "{line}");
    for part in ["; predicted=", "; ttft=", "; queued="] {
        assert!(line.contains(part), "{line} lacks {part}");
    }
    // By the request's own id, and by its answer's.
    for id in ["asked-1", "cmpl-asked-1"] {
        let why = router.get(&format!("/v1/requests/{id}/why")).await.json();
        assert_eq!((&why["id"], &why["priority"], &why["refused"]), (&json!("asked-1"), &json!(3), &Value::Null));
        let [failed, spoke] = &why["attempts"].as_array().unwrap()[..] else { panic!("{why}") };
        assert_eq!(failed["failed"]["message"], "boom");
        assert_eq!((&failed["ttft_ms"], &spoke["failed"]), (&Value::Null, &Value::Null));
        assert!(spoke["ttft_ms"].as_f64().unwrap() <= why["ttft_ms"].as_f64().unwrap());
        assert!(failed["runner_up"]["way"].as_str().unwrap().starts_with("local decode-"), "{why}");
        let candidates = failed["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), 2);
        for candidate in candidates {
            let cost = candidate["cost_ms"].as_object().unwrap();
            let sum =
                ["queue", "fetch", "compute", "room"].iter().map(|term| cost[*term].as_f64().unwrap()).sum::<f64>();
            assert!((sum - candidate["predicted_ttft_ms"].as_f64().unwrap()).abs() < 0.01, "{candidate}");
        }
        assert_eq!(spoke["candidates"].as_array().unwrap().len(), 1, "the one that failed is no candidate again");
    }
    let unknown = router.get("/v1/requests/never/why").await;
    assert_eq!((unknown.status, unknown.error().contains("\"never\"")), (404, true));
}

#[tokio::test]
async fn a_worker_that_keeps_failing_is_shunned_until_a_probe_succeeds() {
    let (router, [mut bad, good]) = decoders::<2>(|_| {}).await;
    let good = good.answer_all(&output("ok"), Reason::Stop);
    // Sends a request, which ends well in any case; says how often the bad one was asked and failed.
    async fn ask(router: &TestRouter, bad: &mut MockWorker) -> usize {
        let mut failures = 0;
        let mut request = Box::pin(post(router, completion("try", 0), &[]));
        loop {
            tokio::select! {
                answer = &mut request => {
                    assert_eq!(answer.status, 200, "the other one goes on: {}", answer.body);
                    return failures;
                }
                submit = bad.submission() => {
                    failures += 1;
                    bad.emit(&submit, 0, &[], Some(failed(Reason::Failed, "boom")));
                }
            }
        }
    }
    let mut failures = 0;
    while failures < 3 {
        failures += within("a failure", ask(&router, &mut bad)).await;
    }
    let opened = Instant::now();
    for _ in 0..10 {
        let asked = ask(&router, &mut bad).await;
        assert!(asked == 0 || opened.elapsed() >= Duration::from_secs(1), "it is left alone for a second");
    }
    // With nobody else left it is better than nothing, and what it says then counts.
    drop(good);
    let answer = with(post(&router, completion("alone", 0), &[]), async {
        let submit = bad.submission().await;
        bad.answer(&submit, &output("well"), Reason::Stop);
    });
    assert_eq!(answer.await.json()["choices"][0]["text"], "well");
}
