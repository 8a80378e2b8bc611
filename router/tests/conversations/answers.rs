//! What clients get to see.

use crate::{
    mock::{MODEL, MockWorker, ended, prompt_ids},
    support::{EOS, TestRouter, output, streamed, tokens},
};
use cluster::Role;
use proto::ended::Reason;
use router::Policy;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "What is a KV cache?"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// A router and one decode worker.
async fn local() -> (TestRouter, MockWorker) {
    let router = TestRouter::start(Policy::Local).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, worker)
}

#[tokio::test]
async fn a_chat_is_answered_in_one_piece() {
    let (router, mut worker) = local().await;
    let (answer, submit) = tokio::join!(router.post(CHAT, chat(json!({"max_tokens": 50}))), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("It keeps keys 🙂."), Reason::Stop);
        submit
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    let completion_tokens = output("It keeps keys 🙂.").len();
    let id = answer.headers["x-request-id"].to_str().unwrap();
    assert_eq!(
        body,
        json!({
            "id": format!("chatcmpl-{id}"),
            "object": "chat.completion",
            "created": body["created"],
            "model": MODEL,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "It keeps keys 🙂.", "refusal": null, "annotations": [],
                            "audio": null, "reasoning": null},
                "logprobs": null,
                "finish_reason": "stop",
                "stop_reason": null,
            }],
            "service_tier": null,
            "system_fingerprint": body["system_fingerprint"],
            "usage": {
                "prompt_tokens": submit.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": submit.prompt_tokens as usize + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
            "prompt_logprobs": null,
        })
    );
    assert!(body["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let stop = submit.stop.unwrap();
    assert_eq!((stop.max_tokens, stop.min_tokens, stop.ignore_eos), (50, 0, false));
    // The demo model's generation_config.json says not to sample.
    assert_eq!(submit.sampling.unwrap().temperature, 0.0);
}

#[tokio::test]
async fn a_stream_has_the_shape_clients_expect() {
    let (router, mut worker) = local().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let (stream, submit) = tokio::join!(router.open(CHAT, &body), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hello"), None);
        submit
    });
    let mut stream = stream;
    assert_eq!(stream.headers["content-type"], "text/event-stream; charset=utf-8");
    assert!(stream.headers.contains_key("x-request-id"));
    let role = stream.chunk().await;
    assert_eq!(role["object"], "chat.completion.chunk");
    assert_eq!(
        role["choices"],
        json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}])
    );
    assert_eq!(role["usage"], Value::Null);
    let text = stream.chunk().await;
    assert_eq!(
        text["choices"],
        json!([{"index": 0, "delta": {"content": "Hello"}, "logprobs": null, "finish_reason": null}])
    );
    assert_eq!(text["id"], role["id"]);
    let index = tokens("Hello").len() as u32;
    worker.emit(&submit, index, &[EOS], Some(ended(Reason::Stop, EOS)));
    let rest = stream.chunks().await;
    assert_eq!(rest.len(), 2, "{rest:?}");
    assert_eq!(
        rest[0]["choices"],
        json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop", "stop_reason": null}])
    );
    assert_eq!(rest[1]["choices"], json!([]));
    assert_eq!(rest[1]["usage"]["completion_tokens"], index + 1);
    assert_eq!(rest[1]["usage"]["prompt_tokens"], submit.prompt_tokens);
}

#[tokio::test]
async fn usage_is_absent_unless_asked_for_and_everywhere_when_continuous() {
    let (router, worker) = local().await;
    let _worker = worker.answer_all(&output("ok then"), Reason::Stop);
    let chunks = router.open(CHAT, chat(json!({"stream": true}))).await.chunks().await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()), "{chunks:?}");
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = router.open(CHAT, chat(json!({"stream": true, "stream_options": options}))).await.chunks().await;
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()), "{chunks:?}");
}

#[tokio::test]
async fn characters_are_never_broken() {
    let (router, mut worker) = local().await;
    let text = "日本語 👩‍👩‍👧 größe";
    let (stream, submit) = tokio::join!(router.open(CHAT, chat(json!({"stream": true}))), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens(text)[..1], None);
        submit
    });
    for (index, token) in tokens(text).into_iter().enumerate().skip(1) {
        worker.emit(&submit, index as u32, &[token], None);
    }
    worker.emit(&submit, tokens(text).len() as u32, &[EOS], Some(ended(Reason::Stop, EOS)));
    let chunks = stream.chunks().await;
    assert_eq!(streamed(&chunks, 0), text);
    assert!(chunks.iter().all(|chunk| !chunk.to_string().contains('\u{fffd}')));
}

#[tokio::test]
async fn stop_strings_end_the_text_and_call_the_leg_off() {
    let (router, mut worker) = local().await;
    let text = "one two three four";
    for (include, expected) in [(false, "one "), (true, "one two th")] {
        let body = chat(json!({"stop": ["two th", "zzz"], "include_stop_str_in_output": include}));
        let (answer, submit) = tokio::join!(router.post(CHAT, &body), async {
            let submit = worker.submission().await;
            // One token a frame, and no end: it is the router that must notice.
            for (index, token) in tokens(text).into_iter().enumerate() {
                worker.emit(&submit, index as u32, &[token], None);
            }
            submit
        });
        let choice = &answer.json()["choices"][0];
        assert_eq!(choice["message"]["content"], expected);
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("two th")));
        assert_eq!(worker.cancel().await, submit.attempt);
    }
}

#[tokio::test]
async fn stop_tokens_are_named_and_their_text_is_hidden() {
    let (router, worker) = local().await;
    let stop = tokens("!")[0];
    let _worker = worker.answer_all(&[tokens("Hi"), vec![stop]].concat(), Reason::Stop);
    let choice = |body: Value| body["choices"][0].clone();
    let hidden = choice(router.post(CHAT, chat(json!({"stop_token_ids": [stop]}))).await.json());
    assert_eq!((&hidden["message"]["content"], &hidden["stop_reason"]), (&json!("Hi"), &json!(stop)));
    let shown = chat(json!({"stop_token_ids": [stop], "include_stop_str_in_output": true}));
    assert_eq!(choice(router.post(CHAT, &shown).await.json())["message"]["content"], "Hi!");
}

#[tokio::test]
async fn the_limit_ends_with_length() {
    let (router, worker) = local().await;
    let _worker = worker.answer_all(&output("one two three four five"), Reason::Stop);
    let answer = router.post(CHAT, chat(json!({"max_completion_tokens": 2, "max_tokens": 9}))).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn several_choices_share_a_seed_and_count_a_prompt_once() {
    let (router, mut worker) = local().await;
    let body = chat(
        json!({"n": 3, "temperature": 0.8, "seed": 42, "stream": true, "stream_options": {"include_usage": true}}),
    );
    let (stream, submits) = tokio::join!(router.open(CHAT, &body), async {
        let mut submits = Vec::new();
        for _ in 0..3 {
            submits.push(worker.submission().await);
        }
        submits.sort_by_key(|submit| submit.sampling.as_ref().unwrap().choice);
        for (submit, text) in submits.iter().zip(["red", "green", "blue"]) {
            worker.answer(submit, &output(text), Reason::Stop);
        }
        submits
    });
    assert!(submits.iter().all(|submit| submit.sampling.as_ref().unwrap().seed == 42));
    assert_eq!(submits.iter().map(|s| s.sampling.as_ref().unwrap().choice).collect::<Vec<_>>(), [0, 1, 2]);
    let chunks = stream.chunks().await;
    for (index, text) in ["red", "green", "blue"].into_iter().enumerate() {
        assert_eq!(streamed(&chunks, index as u64), text);
        let of_choice = |c: &&Value| c["choices"][0]["index"] == index;
        assert_eq!(chunks.iter().filter(of_choice).filter(|c| c["choices"][0]["delta"]["role"].is_string()).count(), 1);
        assert_eq!(chunks.iter().filter(of_choice).filter(|c| c["choices"][0]["finish_reason"].is_string()).count(), 1);
    }
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["prompt_tokens"], submits[0].prompt_tokens);
    let expected: usize = ["red", "green", "blue"].map(|text| output(text).len()).iter().sum();
    assert_eq!(usage["completion_tokens"], expected);
}

#[tokio::test]
async fn log_probabilities_of_chats() {
    let (router, worker) = local().await;
    let _worker = worker.answer_all(&output("Hi there"), Reason::Stop);
    let answer = router.post(CHAT, chat(json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let joined: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(joined, "Hi there", "the end of the turn is no content");
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"], json!("Hi".as_bytes()[..content[0]["token"].as_str().unwrap().len()]));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[0]["top_logprobs"][0]["token"], content[0]["token"]);
}

#[tokio::test]
async fn text_completions_take_every_form_of_prompt() {
    let (router, mut worker) = local().await;
    let hello = tokens("Hello world");
    for (prompt, expected) in [
        (json!("Hello world"), vec![hello.clone()]),
        (json!(["Hello world", "A"]), vec![hello.clone(), tokens("A")]),
        (json!([1, 2, 3]), vec![vec![1, 2, 3]]),
        (json!([[1, 2, 3], [4]]), vec![vec![1, 2, 3], vec![4]]),
    ] {
        let body = json!({"model": MODEL, "prompt": prompt, "seed": 1});
        let (answer, mut prompts) = tokio::join!(router.post(COMPLETIONS, &body), async {
            let mut prompts = Vec::new();
            for _ in 0..expected.len() {
                let submit = worker.submission().await;
                assert_eq!(submit.stop.as_ref().unwrap().max_tokens, 16, "OpenAI's default");
                worker.answer(&submit, &output(" again"), Reason::Stop);
                prompts.push(prompt_ids(&submit));
            }
            prompts
        });
        let body = answer.json();
        assert_eq!(body["object"], "text_completion");
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), expected.len());
        assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i && c["text"] == " again"), "{body}");
        prompts.sort();
        let mut expected = expected;
        expected.sort();
        assert_eq!(prompts, expected);
        assert_eq!(body["usage"]["prompt_tokens"], expected.concat().len());
    }
}

#[tokio::test]
async fn text_completions_echo_and_report_log_probabilities() {
    let (router, worker) = local().await;
    let _worker = worker.answer_all(&output(" time there"), Reason::Stop);
    let body = json!({"prompt": "Once upon a", "echo": true});
    assert_eq!(router.post(COMPLETIONS, &body).await.json()["choices"][0]["text"], "Once upon a time there");
    let nothing = json!({"prompt": "Once upon a", "echo": true, "max_tokens": 0});
    let answer = router.post(COMPLETIONS, &nothing).await.json();
    assert_eq!(answer["choices"][0]["text"], "Once upon a");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let nothing = json!({"prompt": ["a", "b"], "echo": true, "max_tokens": 0, "stream": true});
    let chunks = router.open(COMPLETIONS, nothing).await.chunks().await;
    assert_eq!((streamed(&chunks, 0).as_str(), streamed(&chunks, 1).as_str()), ("a", "b"));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    let stream = json!({"prompt": "Once upon a", "echo": true, "stream": true});
    let chunks = router.open(COMPLETIONS, &stream).await.chunks().await;
    assert_eq!(streamed(&chunks, 0), "Once upon a time there");
    assert_eq!(chunks[0]["object"], "text_completion");

    let answer = router.post(COMPLETIONS, json!({"prompt": "Once", "logprobs": 2})).await.json();
    let logprobs = &answer["choices"][0]["logprobs"];
    let count = tokens(" time there").len();
    for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), count, "{logprobs}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
    assert_eq!(logprobs["text_offset"][1], logprobs["tokens"][0].as_str().unwrap().chars().count());
    let chunks =
        router.open(COMPLETIONS, json!({"prompt": "Once", "logprobs": 1, "stream": true})).await.chunks().await;
    let offsets: Vec<Value> = chunks
        .iter()
        .flat_map(|c| c["choices"][0]["logprobs"]["text_offset"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(Value::from(offsets), logprobs["text_offset"], "offsets go on across chunks");
}

#[tokio::test]
async fn parameters_reach_the_worker() {
    let (router, mut worker) = local().await;
    let body = chat(json!({
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": -1, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": -0.3, "logit_bias": {"5": 200, "7": -1.5}, "max_tokens": 5, "min_tokens": 2,
        "ignore_eos": true, "stop_token_ids": [9], "priority": -3, "cache_salt": "tenant", "user": "u", "metadata": {"a": 1},
        "chat_template_kwargs": {"x": 1}, "unheard_of": [1, 2], "allowed_token_ids": [5, 6],
        "structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": true}
    }));
    let (answer, submit) = tokio::join!(router.post(CHAT, &body), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &tokens("a b c d e f g"), Reason::Length);
        submit
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    let sampling = submit.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.7, 0.9, 40, 0.05));
    assert_eq!((sampling.seed, sampling.repetition_penalty), (u64::MAX, 1.1));
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty, sampling.logprobs), (0.2, -0.3, None));
    assert_eq!(sampling.logit_bias.iter().map(|b| (b.token, b.bias)).collect::<Vec<_>>(), [(5, 100.0), (7, -1.5)]);
    assert_eq!(sampling.allowed_tokens, [5, 6]);
    let grammar = submit.grammar.unwrap();
    assert_eq!((grammar.kind(), &grammar.text[..]), (proto::grammar::Kind::JsonSchema, r#"{"type":"object"}"#));
    assert_eq!(grammar.whitespace.as_deref(), Some(""));
    let stop = submit.stop.unwrap();
    assert_eq!((stop.max_tokens, stop.min_tokens, stop.ignore_eos, stop.token_ids), (5, 2, true, vec![9]));
    assert_eq!((submit.priority, &submit.salt[..]), (-3, &b"tenant"[..]));
    assert!(submit.deadline_ms > 0 && !submit.request.is_empty());
}

#[tokio::test]
async fn tools_and_continued_messages_shape_the_prompt() {
    let (router, mut worker) = local().await;
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]);
    for (extra, contains, lacks) in [
        (json!({"tools": tools}), "get_weather", ""),
        (json!({"tools": tools, "tool_choice": "none"}), "KV cache", "get_weather"),
        (json!({"add_generation_prompt": false}), "KV cache?<|im_end|>\n", "assistant\n"),
    ] {
        let (_, submit) = tokio::join!(router.post(CHAT, chat(extra)), async {
            let submit = worker.submission().await;
            worker.answer(&submit, &output("ok"), Reason::Stop);
            submit
        });
        let prompt = decode(&prompt_ids(&submit));
        assert!(prompt.contains(contains), "{prompt}");
        assert!(lacks.is_empty() || !prompt.contains(lacks), "{prompt}");
    }
    let body = json!({
        "messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two,"}],
        "add_generation_prompt": false, "continue_final_message": true,
    });
    let (_, submit) = tokio::join!(router.post(CHAT, &body), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output(" three"), Reason::Stop);
        submit
    });
    assert!(decode(&prompt_ids(&submit)).ends_with("one, two,"));
}

fn decode(ids: &[u32]) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/tokenizer.json");
    tokenizers::Tokenizer::from_file(path).unwrap().decode(ids, false).unwrap()
}

#[tokio::test]
async fn request_ids_are_the_clients_or_new() {
    let (router, worker) = local().await;
    let _worker = worker.answer_all(&output("ok"), Reason::Stop);
    let send = async |id: &str| {
        let body = Some(chat(json!({})).to_string());
        router.send(hyper::Method::POST, CHAT, body, &[("x-request-id", id)]).await.whole().await
    };
    let answer = send("client-7").await;
    assert_eq!(answer.headers["x-request-id"], "client-7");
    assert_eq!(answer.json()["id"], "chatcmpl-client-7");
    let answer = send(&"x".repeat(500)).await;
    assert_eq!(answer.headers["x-request-id"].len(), 32, "an id too long for a log line is replaced");
}

#[tokio::test]
async fn the_other_endpoints_answer() {
    let router = TestRouter::start_with(Policy::Local, |config| config.aliases = vec!["org/alias".into()]).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    let _worker = worker.answer_all(&output("ok"), Reason::Stop);
    router.ready().await;
    let models = router.get("/v1/models").await.json();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], MODEL);
    assert_eq!(models["data"][0]["max_model_len"], crate::mock::CONTEXT);
    assert_eq!(router.get("/v1/models/org/alias").await.json()["root"], MODEL);
    assert_eq!(router.get("/v1/models/nope").await.status, 404);
    assert_eq!(router.post(CHAT, chat(json!({"model": "org/alias"}))).await.json()["model"], "org/alias");
    assert_eq!(router.post(CHAT, chat(json!({"model": ""}))).await.status, 200);
    assert_eq!(router.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    for (path, body) in [("/health", ""), ("/livez", "alive\n"), ("/readyz", "ready\n")] {
        let answer = router.get(path).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, body));
    }
    assert_eq!(router.get("/metrics").await.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(router.get("/nowhere").await.error(), "there is nothing at /nowhere");
    assert_eq!(router.get(CHAT).await.status, 405);
}
