//! Rows of the API that the other files do not meet: what is accepted, what it does, what is refused.

use crate::{
    mock::{MODEL, MockWorker, prompt_ids},
    support::{EOS, TestRouter, output, streamed, tokens},
};
use cluster::Role;
use hyper::Method;
use proto::{Submit, Thoughts, ended::Reason, grammar::Kind};
use router::Policy;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(extra: Value) -> Value {
    with(json!({"model": MODEL, "messages": [{"role": "user", "content": "one two three"}]}), extra)
}

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

async fn start(change: impl FnOnce(&mut router::Config)) -> (TestRouter, MockWorker) {
    let router = TestRouter::start_with(Policy::Local, change).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, worker)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(model: &str, tokens: &[u32]) -> String {
    Tokenizer::from_file(root().join(model).join("tokenizer.json")).unwrap().decode(tokens, false).unwrap()
}

/// Asks, and has "well then" answered.
async fn answered(router: &TestRouter, worker: &mut MockWorker, path: &str, body: Value) -> (Value, Submit) {
    let (answer, submit) = tokio::join!(router.post(path, body), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("well then"), Reason::Stop);
        submit
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    (answer.json(), submit)
}

#[tokio::test]
async fn what_changes_nothing_is_accepted_and_what_would_is_refused() {
    let (router, mut worker) = start(|_| {}).await;
    let ignored = json!({"user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "unheard_of": [1],
        "safety_identifier": "s", "prompt_cache_key": "k", "spaces_between_special_tokens": false, "logit_bias": null,
        "prompt_embeds": null, "use_beam_search": false});
    answered(&router, &mut worker, CHAT, chat(ignored.clone())).await;
    answered(&router, &mut worker, COMPLETIONS, with(json!({"prompt": "x"}), ignored)).await;
    for (name, value) in [
        ("use_beam_search", json!(true)),
        ("logprob_token_ids", json!([1])),
        ("repetition_detection", json!({"max_pattern_size": 3})),
        ("kv_transfer_params", json!({"do_remote_decode": true})),
        ("ec_transfer_params", json!({"a": 1})),
        ("prompt_embeds", json!("AAAA")),
        ("functions", json!([{"name": "f"}])),
        ("audio", json!({"voice": "x"})),
        ("modalities", json!(["audio"])),
        ("web_search_options", json!({"a": 1})),
        ("chat_template", json!("x")),
    ] {
        let answer = router.post(CHAT, chat(json!({name: value}))).await;
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(name)), "{}", answer.body);
        assert!(answer.error().contains("not supported"), "{}", answer.body);
        // A router says where it is served.
        assert_eq!(name == "kv_transfer_params", answer.error().contains("started with --http"), "{}", answer.body);
    }
    for (extra, words) in [
        (json!({"reasoning_effort": "huge"}), "none, minimal"),
        (json!({"truncate_prompt_tokens": -2}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": 0}), "the prompt is empty"),
        (json!({"truncation_side": "middle"}), "\"left\" or \"right\""),
        (json!({"request_id": "a b"}), "visible ASCII"),
        (json!({"thinking_token_budget": 5}), "no token that ends its reasoning"),
        (json!({"priority": "high"}), "priority"),
        (json!({"top_p": 1e-50}), "greater than 0"),
    ] {
        let answer = router.post(CHAT, chat(extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}: {}", answer.body);
        assert!(answer.error().contains(words), "{extra}: {}", answer.body);
    }
    assert!(!worker.has_submission(), "nothing refused may reach a worker");
}

#[tokio::test]
async fn log_probabilities_may_name_tokens_by_id() {
    let (router, mut worker) = start(|_| {}).await;
    let first = format!("token_id:{}", tokens("well then")[0]);
    let extra = json!({"logprobs": true, "top_logprobs": 1, "return_tokens_as_token_ids": true});
    let (body, _) = answered(&router, &mut worker, CHAT, chat(extra)).await;
    let token = &body["choices"][0]["logprobs"]["content"][0];
    assert_eq!((&token["token"], &token["top_logprobs"][0]["token"]), (&json!(first), &json!(first)));
    assert_eq!(token["bytes"][0], json!(b'w'), "bytes are the text's");
    let extra = json!({"prompt": "x", "logprobs": 1, "return_tokens_as_token_ids": true});
    let (body, _) = answered(&router, &mut worker, COMPLETIONS, extra).await;
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"][0], json!(first));
    assert!(logprobs["top_logprobs"][0].get(&first).is_some(), "{logprobs}");
}

#[tokio::test]
async fn an_answer_may_tell_what_the_model_was_given() {
    let (router, mut worker) = start(|_| {}).await;
    let (body, submit) = answered(&router, &mut worker, CHAT, chat(json!({"return_prompt_text": true}))).await;
    let prompt = text("models/demo", &prompt_ids(&submit));
    assert!(prompt.contains("one two three") && body["prompt_text"] == prompt, "{body}");
    let request = json!({"prompt": ["a b", "c d"], "return_prompt_text": true});
    let worker = worker.answer_all(&output("x"), Reason::Stop);
    let body = router.post(COMPLETIONS, &request).await.json();
    assert_eq!(
        (&body["choices"][0]["prompt_text"], &body["choices"][1]["prompt_text"]),
        (&json!("a b"), &json!("c d"))
    );
    let chunks = router.open(CHAT, chat(json!({"return_prompt_text": true, "stream": true}))).await.chunks().await;
    assert_eq!(chunks[0]["prompt_text"], prompt);
    assert!(chunks[1..].iter().all(|chunk| chunk.get("prompt_text").is_none()));
    assert_eq!(streamed(&chunks, 0), "x");
    drop(worker);
}

#[tokio::test]
async fn a_batch_of_as_many_prompts_as_are_allowed_is_answered_in_order() {
    let (router, worker) = start(|_| {}).await;
    let prompts: Vec<String> = (0..1_024).map(|i| format!("prompt {i}")).collect();
    let _worker = worker.answer_all(&output("x"), Reason::Stop);
    let body = router.post(COMPLETIONS, &json!({"prompt": prompts, "return_prompt_text": true})).await.json();
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.len(), prompts.len());
    for (i, (choice, prompt)) in choices.iter().zip(&prompts).enumerate() {
        assert_eq!((&choice["index"], &choice["prompt_text"]), (&json!(i), &json!(prompt)));
    }
}

#[tokio::test]
async fn prompts_are_cut_to_length() {
    let (router, mut worker) = start(|_| {}).await;
    let all = tokens("one two three four five six seven");
    let cut = |extra: Value| with(json!({"prompt": all, "max_tokens": 6}), extra);
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, cut(json!({"truncate_prompt_tokens": 3}))).await;
    assert_eq!(prompt_ids(&submit), all[all.len() - 3..]);
    let right = json!({"truncate_prompt_tokens": 3, "truncation_side": "right"});
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, cut(right)).await;
    assert_eq!(prompt_ids(&submit), all[..3]);
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, cut(json!({"truncate_prompt_tokens": 900}))).await;
    assert_eq!(prompt_ids(&submit), all);
    let long = json!({"prompt": "word ".repeat(600), "truncate_prompt_tokens": -1, "max_tokens": 20});
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, long).await;
    assert_eq!(prompt_ids(&submit).len() as u32 + 20, crate::mock::CONTEXT);
}

#[tokio::test]
async fn a_body_may_name_its_request_and_the_header_comes_first() {
    let (router, worker) = start(|_| {}).await;
    let _worker = worker.answer_all(&output("x"), Reason::Stop);
    let body = chat(json!({"request_id": "mine"})).to_string();
    for (headers, expected) in [(&[][..], "mine"), (&[("x-request-id", "theirs")][..], "theirs")] {
        let answer = router.send(Method::POST, CHAT, Some(body.clone()), headers).await.whole().await;
        assert_eq!(answer.headers["x-request-id"], expected);
        assert_eq!(answer.json()["id"], format!("chatcmpl-{expected}"));
    }
    let answer = router.post(COMPLETIONS, json!({"prompt": "x", "request_id": "mine"})).await;
    assert_eq!(answer.json()["id"], "cmpl-mine");
}

#[tokio::test]
async fn priorities_are_sixty_four_bits() {
    let (router, mut worker) = start(|_| {}).await;
    for (priority, expected) in [(json!(-7), -7), (json!(i64::MAX), i32::MAX), (json!(i64::MIN), i32::MIN)] {
        let (_, submit) = answered(&router, &mut worker, CHAT, chat(json!({"priority": priority}))).await;
        assert_eq!(submit.priority, expected);
    }
}

#[tokio::test]
async fn an_answer_goes_on_from_the_last_message_and_may_repeat_it() {
    let (router, mut worker) = start(|_| {}).await;
    let messages = json!([{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]);
    let goes_on =
        json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false, "echo": true});
    let (body, submit) = answered(&router, &mut worker, CHAT, chat(goes_on.clone())).await;
    assert!(text("models/demo", &prompt_ids(&submit)).ends_with("One, two,"));
    assert_eq!(body["choices"][0]["message"]["content"], "One, two,well then");
    let _worker = worker.answer_all(&output("well then"), Reason::Stop);
    let chunks = router.open(CHAT, chat(with(goes_on, json!({"stream": true})))).await.chunks().await;
    assert_eq!(streamed(&chunks, 0), "One, two,well then");
    let (body, chunks) = (router.post(CHAT, chat(json!({"echo": true}))).await.json(), chunks.len());
    assert_eq!(
        body["choices"][0]["message"]["content"], "well then",
        "the user's words are not the answer's ({chunks})"
    );
}

#[tokio::test]
async fn templates_get_documents_and_variables() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "generation_config.json"] {
        std::fs::copy(root().join("models/demo").join(file), dir.path().join(file)).unwrap();
    }
    let template =
        "{{ documents[0].title }}/{{ mood }}/{{ reasoning_effort }}/{{ enable_thinking }}/{{ messages[0].content }}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let path = dir.path().to_owned();
    let (router, mut worker) = start(|config| config.model_dir = path).await;
    let extra = json!({"documents": [{"title": "T", "text": "x"}], "chat_template_kwargs": {"mood": "calm"},
        "reasoning_effort": "low"});
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(extra)).await;
    assert_eq!(text("models/demo", &prompt_ids(&submit)), "T/calm/low/True/one two three");
}

#[tokio::test]
async fn special_tokens_before_a_template_are_for_the_asking() {
    let (router, mut worker) = start(|config| config.model_dir = root().join("tests/golden/llama")).await;
    let beginning = async |router: &TestRouter, worker: &mut MockWorker, add: bool| {
        let (_, submit) = answered(router, worker, CHAT, chat(json!({"add_special_tokens": add}))).await;
        let ids = prompt_ids(&submit);
        ids.iter().take_while(|token| **token == ids[0]).count()
    };
    let without = beginning(&router, &mut worker, false).await;
    assert_eq!(beginning(&router, &mut worker, true).await, without + 1, "one BOS more");
}

#[tokio::test]
async fn special_tokens_before_a_plain_prompt_are_there_unless_they_are_not_wanted() {
    let (router, mut worker) = start(|config| config.model_dir = root().join("tests/golden/llama")).await;
    let mut asked = [Vec::new(), Vec::new(), Vec::new()];
    for (tokens, add) in asked.iter_mut().zip([json!(null), json!(true), json!(false)]) {
        let request = json!({"model": MODEL, "prompt": "one two", "add_special_tokens": add});
        *tokens = prompt_ids(&answered(&router, &mut worker, COMPLETIONS, request).await.1);
    }
    let [default, with, without] = asked;
    assert_eq!((&default, with.len(), &with[1..]), (&with, without.len() + 1, &without[..]));
}

#[tokio::test]
async fn special_tokens_of_an_answer_are_shown_for_the_asking() {
    let (router, mut worker) = start(|_| {}).await;
    // The beginning of a turn, which the demo model has as a token of its own.
    let said = [&[1], &tokens("well")[..], &[EOS]].concat();
    for (skip, expected) in [(json!(null), "well"), (json!(true), "well"), (json!(false), "<|im_start|>well")] {
        let request = json!({"model": MODEL, "prompt": "x", "skip_special_tokens": skip});
        let (answer, ()) = tokio::join!(router.post(COMPLETIONS, request), async {
            let submit = worker.submission().await;
            worker.answer(&submit, &said, Reason::Stop);
        });
        assert_eq!(answer.json()["choices"][0]["text"], expected, "{}", answer.body);
    }
}

#[tokio::test]
async fn ids_of_tokens_are_told_for_the_asking_those_of_the_prompt_once() {
    let (router, mut worker) = start(|_| {}).await;
    let ids = json!({"return_token_ids": true});
    let (body, submit) = answered(&router, &mut worker, CHAT, chat(ids.clone())).await;
    assert_eq!(
        (&body["prompt_token_ids"], &body["choices"][0]["token_ids"]),
        (&json!(prompt_ids(&submit)), &json!(output("well then")))
    );
    let (body, _) = answered(&router, &mut worker, CHAT, chat(json!({}))).await;
    assert_eq!((body.get("prompt_token_ids"), body["choices"][0].get("token_ids")), (None, None));
    let streamed = with(chat(ids), json!({"stream": true}));
    let (stream, submit) = tokio::join!(router.open(CHAT, streamed), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("well then"), Reason::Stop);
        submit
    });
    let chunks = stream.chunks().await;
    let prompts: Vec<usize> = (0..chunks.len()).filter(|&i| chunks[i].get("prompt_token_ids").is_some()).collect();
    assert_eq!((prompts, &chunks[0]["prompt_token_ids"]), (vec![0], &json!(prompt_ids(&submit))));
    let ids = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten().cloned();
    assert_eq!(Value::from_iter(ids), json!(output("well then")));
}

#[tokio::test]
async fn the_fields_before_structured_outputs_are_served() {
    let (router, mut worker) = start(|_| {}).await;
    for (extra, kind, text) in [
        (json!({"guided_choice": ["a", "b"]}), Kind::Choice, Some("[\"a\",\"b\"]")),
        (json!({"guided_regex": "[ab]+"}), Kind::Regex, Some("[ab]+")),
        (json!({"guided_json": {"type": "string"}}), Kind::JsonSchema, None),
        (json!({"guided_json_object": true}), Kind::JsonSchema, None),
        (json!({"guided_grammar": "root ::= \"a\""}), Kind::Lark, None),
    ] {
        let pattern = json!({"guided_whitespace_pattern": " ?"});
        let (_, submit) = answered(&router, &mut worker, CHAT, chat(with(extra.clone(), pattern))).await;
        let grammar = submit.grammar.unwrap_or_else(|| panic!("{extra} is no constraint"));
        assert_eq!((grammar.kind(), grammar.whitespace.as_deref()), (kind, Some(" ?")), "{extra}");
        assert!(text.is_none_or(|text| grammar.text == text), "{extra}: {}", grammar.text);
    }
}

fn thoughts(submit: &Submit) -> Option<Thoughts> {
    submit.grammar.clone().unwrap().thoughts
}

#[tokio::test]
async fn grammars_hold_behind_reasoning_and_may_count_it() {
    let (router, mut worker) = start(|config| config.model_dir = root().join("tests/golden/qwen3")).await;
    let marks = |begun, budget| Some(Thoughts { start: "<think>".into(), end: "</think>".into(), begun, budget });
    let json_object = json!({"response_format": {"type": "json_object"}});
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(json_object.clone())).await;
    assert_eq!(thoughts(&submit), marks(false, None));
    let quiet = with(json_object, json!({"reasoning_effort": "none"}));
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(quiet)).await;
    assert_eq!(thoughts(&submit), None, "the prompt ended the reasoning");
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let forced = json!({"tools": tools, "tool_choice": "required", "thinking_token_budget": 40});
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(forced)).await;
    assert_eq!(thoughts(&submit), marks(false, Some(40)));
    assert_eq!(submit.grammar.unwrap().kind(), Kind::JsonSchema);
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(json!({"thinking_token_budget": 0}))).await;
    assert_eq!(thoughts(&submit), marks(false, Some(0)));
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(json!({"thinking_token_budget": -1}))).await;
    assert_eq!(submit.grammar, None);
    // A text completion has no reasoning.
    let plain = json!({"prompt": "x", "response_format": {"type": "json_object"}});
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, plain).await;
    assert_eq!(thoughts(&submit), None);
}

#[tokio::test]
async fn sampling_settings_that_mean_nothing_or_too_much_are_read_as_vllm_does() {
    let (router, mut worker) = start(|_| {}).await;
    for (temperature, expected) in [(0.0, 0.0), (1e-6, 0.0), (0.001, 0.01), (0.7, 0.7), (2.0, 2.0)] {
        let (_, submit) = answered(&router, &mut worker, CHAT, chat(json!({"temperature": temperature}))).await;
        assert_eq!(submit.sampling.unwrap().temperature, expected);
    }
    for (top_k, expected) in [(-1, 0), (0, 0), (7, 7)] {
        let (_, submit) = answered(&router, &mut worker, CHAT, chat(json!({"top_k": top_k}))).await;
        assert_eq!(submit.sampling.unwrap().top_k, expected);
    }
    let nulls = json!({"temperature": null, "top_p": null, "max_tokens": null, "stop": null, "logprobs": null, "top_logprobs": null,
        "tools": null, "tool_choice": null, "stream": null, "stream_options": null, "seed": null, "n": null});
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(nulls.clone())).await;
    assert_eq!(submit.stop.unwrap().max_tokens, crate::mock::CONTEXT - submit.prompt_tokens, "chat: all that fits");
    let (_, submit) = answered(&router, &mut worker, COMPLETIONS, with(json!({"prompt": "x"}), nulls)).await;
    assert_eq!(submit.stop.unwrap().max_tokens, 16, "OpenAI's default");
    let both = json!({"max_tokens": 9, "max_completion_tokens": 7});
    let (_, submit) = answered(&router, &mut worker, CHAT, chat(both)).await;
    assert_eq!(submit.stop.unwrap().max_tokens, 7, "the newer name comes first");
}

#[tokio::test]
async fn errors_have_the_types_clients_look_for() {
    let (router, _worker) = start(|config| config.limits.max_body_bytes = 1_000).await;
    let check = async |method: Method, path: &str, body: Option<String>, status: u16, kind: &str, param: Value| {
        let answer = router.send(method, path, body, &[]).await.whole().await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["type"], &error["param"]), (status, &json!(kind), &param), "{}", answer.body);
        assert_eq!(error["code"], status);
    };
    let body = |extra: Value| Some(chat(extra).to_string());
    check(Method::POST, CHAT, body(json!({"n": 0})), 400, "BadRequestError", json!("n")).await;
    check(Method::POST, CHAT, Some("{".into()), 400, "BadRequestError", Value::Null).await;
    check(Method::POST, CHAT, body(json!({"model": "other"})), 404, "NotFoundError", json!("model")).await;
    check(Method::GET, CHAT, None, 405, "MethodNotAllowedError", Value::Null).await;
    check(Method::GET, "/v1/nothing", None, 404, "NotFoundError", Value::Null).await;
    check(Method::POST, CHAT, Some("x".repeat(2_000)), 413, "RequestTooLargeError", Value::Null).await;
}
