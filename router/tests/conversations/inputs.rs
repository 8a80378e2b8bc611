//! What is refused, and in which words.

use crate::{
    mock::{CONTEXT, MODEL, MockWorker},
    support::{TestRouter, tokens},
};
use cluster::Role;
use hyper::Method;
use router::Policy;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn wrong_fields_are_named() {
    let router = TestRouter::start(Policy::Local).await;
    let mut worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    let chat: &[(Value, &[&str])] = &[
        (json!({"messages": null}), &["messages", "required"]),
        (json!({"messages": []}), &["messages", "at least one"]),
        (json!({"messages": "hi"}), &["messages", "a list", "hi"]),
        (json!({"messages": [{"role": 1, "content": "x"}]}), &["messages[0].role", "1"]),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            &["messages[0].content[0]", "image_url"],
        ),
        (json!({"temperature": "hot"}), &["temperature", "number from 0 to 2", "hot"]),
        (json!({"temperature": -1}), &["temperature", "-1"]),
        (json!({"temperature": 2.5}), &["temperature", "2.5"]),
        (json!({"top_p": 0}), &["top_p"]),
        (json!({"top_p": 1.1}), &["top_p", "1.1"]),
        (json!({"top_k": -2}), &["top_k", "-2"]),
        (json!({"top_k": 1.5}), &["top_k", "1.5"]),
        (json!({"min_p": 2}), &["min_p"]),
        (json!({"presence_penalty": 3}), &["presence_penalty", "3"]),
        (json!({"frequency_penalty": -2.1}), &["frequency_penalty", "-2.1"]),
        (json!({"repetition_penalty": 0}), &["repetition_penalty"]),
        (json!({"seed": 1e30}), &["seed"]),
        (json!({"n": 0}), &["n", "0"]),
        (json!({"n": 1_000, "temperature": 1}), &["n", "1000"]),
        (json!({"n": 2, "temperature": 0}), &["n", "greedy"]),
        (json!({"max_tokens": 0}), &["max_tokens", "0"]),
        (json!({"max_tokens": "many"}), &["max_tokens", "many"]),
        (json!({"max_completion_tokens": -5}), &["max_completion_tokens", "-5"]),
        (json!({"max_tokens": 5, "min_tokens": 6}), &["min_tokens", "5", "6"]),
        (json!({"stop": ""}), &["stop"]),
        (json!({"stop": ["a", ""]}), &["stop"]),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), &["stop", "at most 4"]),
        (json!({"stop": 7}), &["stop", "7"]),
        (json!({"stop_token_ids": [99_999]}), &["stop_token_ids", "99999"]),
        (json!({"logit_bias": {"99999": 1}}), &["logit_bias", "99999", "4095"]),
        (json!({"logit_bias": {"x": 1}}), &["logit_bias", "x"]),
        (json!({"logit_bias": {"5": "y"}}), &["logit_bias", "5", "y"]),
        (json!({"logprobs": 3}), &["logprobs", "true or false"]),
        (json!({"top_logprobs": 2}), &["top_logprobs", "logprobs"]),
        (json!({"logprobs": true, "top_logprobs": 21}), &["top_logprobs", "20", "21"]),
        (json!({"stream": "yes"}), &["stream", "yes"]),
        (json!({"stream_options": {"include_usage": true}}), &["stream_options", "stream"]),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), &["stream_options.include_usage"]),
        (json!({"tools": []}), &["tools"]),
        (json!({"tools": [1]}), &["tools", "1"]),
        (json!({"tool_choice": "auto"}), &["tool_choice", "tools"]),
        (json!({"tools": [{"type": "function"}]}), &["tools[0].function", "a name"]),
        (
            json!({"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": {"name": "g"}}}),
            &["tool_choice", "\"g\"", "\"f\""],
        ),
        (
            json!({"tools": [{"function": {"name": "f"}}], "tool_choice": "required", "guided_regex": "a"}),
            &["tools", "guided_regex"],
        ),
        (
            json!({"tools": [{"function": {"name": "f", "parameters": {"type": "strin"}}}], "tool_choice": "required"}),
            &["tools", "strin"],
        ),
        (
            json!({"response_format": {"type": "structural_tag"}}),
            &["response_format", "structural_tag", "not supported yet"],
        ),
        (json!({"response_format": {}}), &["response_format.type"]),
        (json!({"structured_outputs": {"json": {"type": "strin"}}}), &["structured_outputs", "strin"]),
        (json!({"structured_outputs": {"regex": "("}}), &["structured_outputs", "unclosed group"]),
        (json!({"allowed_token_ids": [99_999]}), &["allowed_token_ids", "99999", "4095"]),
        (json!({"bad_words": ["x", 7]}), &["bad_words", "7"]),
        (json!({"prompt_logprobs": 21}), &["prompt_logprobs", "20", "21"]),
        (json!({"prompt_logprobs": 1, "stream": true}), &["prompt_logprobs", "stream"]),
        (json!({"continue_final_message": true}), &["continue_final_message", "add_generation_prompt"]),
        (json!({"cache_salt": "a/b"}), &["cache_salt", "a/b"]),
        (json!({"priority": 1e30}), &["priority"]),
        (json!({"chat_template": "x"}), &["chat_template", "not supported yet"]),
        (json!({"ignore_eos": "no"}), &["ignore_eos", "no"]),
    ];
    for (extra, words) in chat {
        let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        check(&router, CHAT, &body.to_string(), 400, words).await;
    }
    let completions: &[(Value, &[&str])] = &[
        (json!({}), &["prompt", "required"]),
        (json!({"prompt": []}), &["prompt", "empty"]),
        (json!({"prompt": ""}), &["prompt", "empty"]),
        (json!({"prompt": 5}), &["prompt", "5"]),
        (json!({"prompt": [5_000]}), &["prompt[0]", "5000", "4095"]),
        (json!({"prompt": [1, "a"]}), &["prompt[1]", "a"]),
        (json!({"prompt": ["a", 1]}), &["prompt[1]", "1"]),
        (json!({"prompt": "x", "max_tokens": 0}), &["max_tokens", "0"]),
        (json!({"prompt": "x", "logprobs": 21}), &["logprobs", "21"]),
        (json!({"prompt": "x", "logprobs": true}), &["logprobs", "true"]),
        (json!({"prompt": "x", "suffix": "y"}), &["suffix", "not supported yet"]),
        (json!({"prompt": "x", "best_of": 3}), &["best_of", "not supported yet"]),
        (json!({"prompt": vec!["x"; 1_025]}), &["prompt", "1025", "1024"]),
        (json!({"prompt": vec!["x"; 200], "n": 6, "temperature": 1}), &["prompt", "200", "1200", "1024"]),
    ];
    for (body, words) in completions {
        check(&router, COMPLETIONS, &body.to_string(), 400, words).await;
    }
    assert!(!worker.has_submission(), "nothing refused may reach a worker");
}

#[tokio::test]
async fn broken_bodies_unknown_models_and_long_prompts() {
    let router = TestRouter::start_with(Policy::Local, |config| config.limits.max_body_bytes = 10_000).await;
    let _worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    check(&router, CHAT, "{\"model\": \"demo\",\n  messages: []}", 400, &["not valid JSON", "line 2 column 3"]).await;
    check(&router, CHAT, "[]", 400, &["must be a JSON object"]).await;
    check(&router, CHAT, "", 400, &["not valid JSON"]).await;
    check(&router, CHAT, &json!({"model": "gpt-17", "messages": []}).to_string(), 404, &["gpt-17"]).await;
    check(&router, CHAT, &json!({"model": 5, "messages": []}).to_string(), 400, &["model", "5"]).await;
    check(&router, CHAT, &"x".repeat(20_000), 413, &["10000"]).await;

    let long = "word ".repeat(600);
    let count = tokens(&long).len().to_string();
    check(&router, COMPLETIONS, &json!({"prompt": long}).to_string(), 400, &["prompt", &count, &CONTEXT.to_string()])
        .await;

    let plain =
        router.send(Method::POST, CHAT, Some("{}".into()), &[("content-type", "text/plain")]).await.whole().await;
    assert_eq!(plain.status, 400);
    assert!(plain.error().contains("text/plain"), "{}", plain.body);
}

#[tokio::test]
async fn a_template_may_refuse_and_a_value_is_not_repeated_at_length() {
    let router = TestRouter::start_with(Policy::Local, |config| {
        config.model_dir = config.model_dir.join("../../tests/golden/gemma2");
    })
    .await;
    let _worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    let body = json!({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]});
    check(&router, CHAT, &body.to_string(), 400, &["messages", "System role not supported"]).await;
    let body = json!({"messages": [{"role": "user", "content": "y"}], "temperature": "x".repeat(100_000)});
    let answer = router.post(CHAT, &body).await;
    assert!(answer.body.len() < 1_000, "{} bytes", answer.body.len());
}

async fn check(router: &TestRouter, path: &str, body: &str, status: u16, words: &[&str]) {
    let answer = router.send(Method::POST, path, Some(body.to_string()), &[]).await.whole().await;
    assert_eq!(answer.status, status, "{body}: {}", answer.body);
    assert!(answer.headers.contains_key("x-request-id"));
    let message = answer.error();
    for word in words {
        assert!(message.contains(word), "{body}: {message:?} does not say {word:?}");
    }
}
