//! `/v1/embeddings`: what is asked of workers, what comes back, what is refused.

use crate::{
    mock::{CONTEXT, MODEL, MockWorker, embedding, failed, prompt_ids},
    support::{Answer, TestRouter, tokens},
};
use cluster::Role;
use proto::{Submit, ended::Reason, submit::Leg};
use router::{EmbeddingPooling, Policy};
use serde_json::{Value, json};
use std::path::Path;

const EMBEDDINGS: &str = "/v1/embeddings";

async fn started(pooling: EmbeddingPooling, policy: Policy) -> (TestRouter, MockWorker, MockWorker) {
    let router = TestRouter::start_with(policy, |config| config.embedding_pooling = pooling).await;
    let prefill = MockWorker::start(&*router.directory, "prefill", Role::Prefill).await;
    let decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    prefill.attached().await;
    router.ready().await;
    (router, prefill, decode)
}

fn pooling(submit: &Submit) -> &'static str {
    match submit.leg.as_ref().expect("a leg") {
        Leg::Embed(embed) => embed.pooling().as_str_name(),
        other => panic!("{other:?} is no embed leg"),
    }
}

/// The vectors of an answer, as f32.
fn vectors(answer: &Answer) -> Vec<Vec<f32>> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let numbers =
        |item: &Value| item["embedding"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as f32).collect();
    answer.json()["data"].as_array().unwrap().iter().map(numbers).collect()
}

/// What the mock makes of these tokens.
fn expected(tokens: &[u32]) -> Vec<f32> {
    embedding(&Submit { tokens: proto::pack(&[tokens]), ..Submit::default() })
}

#[tokio::test]
async fn every_form_of_input_becomes_its_prompts_in_order() {
    let (router, _prefill, decode) = started(EmbeddingPooling::Last, Policy::Local).await;
    let _decode = decode.answer_all(&[1], Reason::Stop);
    let check = async |input: Value, prompts: &[Vec<u32>]| {
        let answer = router.post(EMBEDDINGS, json!({"model": MODEL, "input": input})).await;
        let wanted: Vec<Vec<f32>> = prompts.iter().map(|tokens| expected(tokens)).collect();
        assert_eq!(vectors(&answer), wanted, "{input}");
        let (answer, count) = (answer.json(), prompts.iter().map(Vec::len).sum::<usize>());
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(MODEL)));
        let places: Vec<usize> = (0..prompts.len()).collect();
        let indices: Vec<&Value> = answer["data"].as_array().unwrap().iter().map(|item| &item["index"]).collect();
        assert_eq!(json!(indices), json!(places));
        let usage = &answer["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["total_tokens"]), (&json!(count), &json!(count)), "{usage}");
        assert_eq!(usage["completion_tokens"], 0);
    };
    let (one, two) = (tokens("one text"), tokens("and another"));
    check(json!("one text"), std::slice::from_ref(&one)).await;
    check(json!(["one text", "and another"]), &[one, two]).await;
    check(json!([5, 6, 7]), &[vec![5, 6, 7]]).await;
    check(json!([[5, 6, 7], [8]]), &[vec![5, 6, 7], vec![8]]).await;
    let many: Vec<Vec<u32>> = (0..200).map(|id| vec![id, 9]).collect();
    check(json!(many), &many).await;
}

#[tokio::test]
async fn whoever_would_compute_the_prompt_embeds_it() {
    let (router, mut prefill, mut decode) = started(EmbeddingPooling::Mean, Policy::Remote).await;
    let request = json!({"input": "some text", "priority": 3, "cache_salt": "mine", "request_id": "embedded"});
    let (answer, submit) = tokio::join!(router.post(EMBEDDINGS, request), async {
        let submit = prefill.submission().await;
        prefill.answer(&submit, &[1], Reason::Stop);
        submit
    });
    let why = router.get("/v1/requests/embedded/why").await.json();
    assert_eq!(why["attempts"][0]["chosen"], "local prefill", "nothing is handed over: {why}");
    assert_eq!(vectors(&answer), [expected(&tokens("some text"))]);
    assert_eq!((pooling(&submit), submit.priority, &submit.salt[..]), ("MEAN", 3, &b"mine"[..]));
    assert_eq!(submit.prompt_tokens as usize, prompt_ids(&submit).len());
    assert!(!decode.has_submission(), "nobody decodes");

    let (router, mut prefill, mut decode) = started(EmbeddingPooling::Last, Policy::Local).await;
    let (answer, submit) = tokio::join!(router.post(EMBEDDINGS, json!({"input": [7, 8]})), async {
        let submit = decode.submission().await;
        decode.answer(&submit, &[1], Reason::Stop);
        submit
    });
    assert_eq!((vectors(&answer), pooling(&submit)), (vec![expected(&[7, 8])], "LAST"));
    assert!(!prefill.has_submission());
}

#[tokio::test]
async fn special_tokens_are_there_unless_they_are_not_wanted() {
    let router = TestRouter::start_with(Policy::Local, |config| {
        config.embedding_pooling = EmbeddingPooling::Last;
        config.model_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama");
    })
    .await;
    let mut decode = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    let mut asked = [Vec::new(), Vec::new(), Vec::new()];
    for (tokens, add) in asked.iter_mut().zip([json!(null), json!(true), json!(false)]) {
        let request = json!({"model": MODEL, "input": "one two", "add_special_tokens": add});
        let (answer, submit) = tokio::join!(router.post(EMBEDDINGS, request), async {
            let submit = decode.submission().await;
            decode.answer(&submit, &[1], Reason::Stop);
            submit
        });
        assert_eq!(answer.status, 200, "{}", answer.body);
        *tokens = prompt_ids(&submit);
    }
    let [default, with, without] = asked;
    assert_eq!((&default, with.len(), &with[1..]), (&with, without.len() + 1, &without[..]));
}

#[tokio::test]
async fn base64_has_the_bits_of_the_numbers() {
    let (router, _prefill, decode) = started(EmbeddingPooling::Last, Policy::Local).await;
    let _decode = decode.answer_all(&[1], Reason::Stop);
    let answer = router.post(EMBEDDINGS, json!({"input": [1, 300], "encoding_format": "base64"})).await;
    // 1.1 and 300.1 as f32, little-endian: cd cc 8c 3f, cd 0c 96 43.
    assert_eq!(answer.json()["data"][0]["embedding"], "zcyMP80MlkM=", "{}", answer.body);
}

#[tokio::test]
async fn a_worker_that_dies_does_not_lose_an_embedding() {
    let (router, mut prefill, mut decode) = started(EmbeddingPooling::Last, Policy::Auto).await;
    let play = async {
        let first = tokio::select! {
            submit = prefill.submission() => {
                prefill.emit(&submit, 0, &[], Some(failed(Reason::Failed, "boom")));
                "prefill"
            }
            submit = decode.submission() => {
                decode.emit(&submit, 0, &[], Some(failed(Reason::Failed, "boom")));
                "decode"
            }
        };
        // Without a decode worker nothing is placed, so the next attempt may go to either.
        tokio::select! {
            submit = prefill.submission() => prefill.answer(&submit, &[1], Reason::Stop),
            submit = decode.submission() => decode.answer(&submit, &[1], Reason::Stop),
        }
        first
    };
    let (answer, _) = tokio::join!(router.post(EMBEDDINGS, json!({"input": [1, 2, 3]})), play);
    assert_eq!(vectors(&answer), [expected(&[1, 2, 3])]);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let (router, _prefill, mut decode) = started(EmbeddingPooling::Last, Policy::Local).await;
    let check = async |body: Value, param: &str, hints: &[&str]| {
        let answer = router.post(EMBEDDINGS, &body).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{}", answer.body);
        let message = answer.error();
        assert!(hints.iter().all(|hint| message.contains(hint)), "{message}");
    };
    check(json!({}), "input", &["required"]).await;
    check(json!({"input": []}), "input", &["empty list"]).await;
    check(json!({"input": ""}), "input", &["empty"]).await;
    check(json!({"input": ["a", ""]}), "input", &["empty"]).await;
    check(json!({"input": 5}), "input", &["a string, a list of strings", "5"]).await;
    check(json!({"input": [[4096]]}), "input[0][0]", &["4096", "0 to 4095"]).await;
    check(json!({"input": vec!["x"; 2_049]}), "input", &["2049", "2048"]).await;
    check(json!({"input": vec![1; CONTEXT as usize]}), "input", &["256"]).await;
    check(json!({"input": "x", "encoding_format": "hex"}), "encoding_format", &["float", "base64", "hex"]).await;
    check(json!({"input": "x", "dimensions": 0}), "dimensions", &["0"]).await;
    check(json!({"input": "x", "dimensions": 64}), "dimensions", &["256", "64", "is_matryoshka"]).await;
    check(json!({"input": "x", "messages": [{"role": "user", "content": "x"}]}), "messages", &["not supported"]).await;
    check(json!({"input": "x", "embed_dtype": "float16"}), "embed_dtype", &["not supported"]).await;
    check(json!({"input": "x", "endianness": "big"}), "endianness", &["not supported"]).await;
    check(json!({"input": "x", "truncation_side": "middle"}), "truncation_side", &["left", "right", "middle"]).await;
    let answer = router.post(EMBEDDINGS, json!({"input": "x", "model": "other"})).await;
    assert_eq!((answer.status, answer.error().contains("other")), (404, true));
    assert!(!decode.has_submission(), "nothing wrong is computed");
    let fits = json!({"input": vec![1; 900], "truncate_prompt_tokens": 3, "dimensions": 256});
    let _decode = decode.answer_all(&[1], Reason::Stop);
    assert_eq!(vectors(&router.post(EMBEDDINGS, fits).await), [expected(&[1, 1, 1])]);
    let cut = json!({"input": [1, 2, 3], "truncate_prompt_tokens": 2, "truncation_side": "right"});
    assert_eq!(vectors(&router.post(EMBEDDINGS, cut).await), [expected(&[1, 2])]);
}

#[tokio::test]
async fn a_model_that_is_not_made_for_it_says_so() {
    let (router, _prefill, _decode) = started(EmbeddingPooling::Auto, Policy::Local).await;
    let answer = router.post(EMBEDDINGS, json!({"input": "x"})).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("model")));
    let message = answer.error();
    assert!(message.contains("modules.json") && message.contains("--embedding-pooling"), "{message}");
}
