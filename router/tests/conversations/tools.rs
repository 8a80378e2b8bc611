//! Calls of tools and reasoning: what the model says reaches clients taken apart.

use crate::{
    mock::{MODEL, MockWorker, ended, prompt_ids},
    support::{EOS, TestRouter, output, tokens},
};
use cluster::Role;
use proto::{Submit, ended::Reason, grammar::Kind};
use router::{Policy, ReasoningParser, ToolCallParser};
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::Tokenizer;

const CHAT: &str = "/v1/chat/completions";

fn weather() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Says the weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Will it rain?"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// A model of the golden tests with its own tokenizer.
struct Golden(&'static str);

impl Golden {
    fn tokenizer(&self) -> Tokenizer {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        Tokenizer::from_file(root.join(self.0).join("tokenizer.json")).unwrap()
    }

    fn tokens(&self, text: &str) -> Vec<u32> {
        self.tokenizer().encode(text, false).unwrap().get_ids().to_vec()
    }

    fn text(&self, tokens: &[u32]) -> String {
        self.tokenizer().decode(tokens, false).unwrap()
    }

    async fn start(&self) -> (TestRouter, MockWorker) {
        let dir = format!("../../tests/golden/{}", self.0);
        start(|config| config.model_dir = config.model_dir.join(dir)).await
    }
}

async fn start(change: impl FnOnce(&mut router::Config)) -> (TestRouter, MockWorker) {
    let router = TestRouter::start_with(Policy::Local, change).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, worker)
}

async fn demo() -> (TestRouter, MockWorker) {
    start(|_| {}).await
}

/// Asks, and lets the worker say `said` token by token.
async fn answered(router: &TestRouter, worker: &mut MockWorker, body: Value, said: &[u32]) -> (Value, Submit) {
    let (answer, submit) = tokio::join!(router.post(CHAT, body), async {
        let submit = worker.submission().await;
        say(worker, &submit, said);
        submit
    });
    assert_eq!(answer.status, 200, "{}", answer.body);
    (answer.json(), submit)
}

async fn streamed(router: &TestRouter, worker: &mut MockWorker, body: Value, said: &[u32]) -> Vec<Value> {
    let (stream, ()) = tokio::join!(router.open(CHAT, body), async {
        let submit = worker.submission().await;
        say(worker, &submit, said);
    });
    stream.chunks().await
}

fn say(worker: &MockWorker, submit: &Submit, said: &[u32]) {
    let last = said.len() as u32 - 1;
    for (index, token) in said.iter().enumerate() {
        let end = (index as u32 == last).then(|| ended(Reason::Stop, *token));
        worker.emit(submit, index as u32, &[*token], end);
    }
}

/// The pieces of one field of all deltas, put together.
fn gathered(chunks: &[Value], pointer: &str) -> String {
    let deltas = chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).map(|choice| &choice["delta"]);
    deltas.filter_map(|delta| delta.pointer(pointer)?.as_str()).collect()
}

const CALLS: &str = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"São Paulo\"}}\n</tool_call>\n\
                     <tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";

#[tokio::test]
async fn calls_the_model_chose_are_in_the_message() {
    let (router, mut worker) = demo().await;
    let (body, submit) = answered(&router, &mut worker, chat(json!({"tools": weather()})), &output(CALLS)).await;
    let choice = &body["choices"][0];
    let calls = &choice["message"]["tool_calls"];
    assert_eq!(choice["message"]["content"], "Let me see.");
    assert_eq!(calls[0]["type"], "function");
    assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": "{\"city\": \"São Paulo\"}"}));
    assert_eq!(calls[1]["function"], json!({"name": "time", "arguments": "{}"}));
    let ids: Vec<&str> = calls.as_array().unwrap().iter().map(|call| call["id"].as_str().unwrap()).collect();
    assert!(ids.iter().all(|id| id.starts_with("chatcmpl-tool-")) && ids[0] != ids[1], "{ids:?}");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("tool_calls"), &Value::Null));
    assert_eq!(submit.grammar, None, "the model decides");
    let prompt = Tokenizer::from_file(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/tokenizer.json"))
        .unwrap()
        .decode(&prompt_ids(&submit), false)
        .unwrap();
    assert!(prompt.contains("Says the weather"), "{prompt}");

    // Without text, content is null; with one call allowed, others are dropped.
    let only = &CALLS[CALLS.find("<tool_call>").unwrap()..];
    let request = chat(json!({"tools": weather(), "parallel_tool_calls": false}));
    let (body, _) = answered(&router, &mut worker, request, &output(only)).await;
    let message = &body["choices"][0]["message"];
    assert_eq!(message["content"], Value::Null);
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);

    // Without tools it is text, and so it is where the client wants none called.
    for extra in [json!({}), json!({"tools": weather(), "tool_choice": "none"})] {
        let (body, _) = answered(&router, &mut worker, chat(extra), &output(CALLS)).await;
        let choice = &body["choices"][0];
        assert_eq!(choice["message"]["content"], CALLS);
        assert!(choice["message"].get("tool_calls").is_none());
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn calls_are_streamed_piece_by_piece() {
    let (router, mut worker) = demo().await;
    let body = chat(json!({"tools": weather(), "stream": true}));
    let said = output(CALLS);
    let half = tokens(&CALLS[..CALLS.find("Paulo").unwrap()]).len();
    let (stream, submit) = tokio::join!(router.open(CHAT, body), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &said[..half], None);
        submit
    });
    let (mut stream, mut chunks) = (stream, Vec::new());
    while gathered(&chunks, "/tool_calls/0/function/arguments").is_empty() {
        chunks.push(stream.chunk().await);
    }
    worker.emit(&submit, half as u32, &said[half..], Some(ended(Reason::Stop, EOS)));
    chunks.extend(stream.chunks().await);
    assert_eq!(gathered(&chunks, "/content"), "Let me see.");
    let calls: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/tool_calls/0")).collect();
    let (begun, pieces): (Vec<&Value>, Vec<&Value>) = calls.iter().partition(|call| call.get("id").is_some());
    assert_eq!(begun.len(), 2, "{calls:?}");
    for (index, (call, name)) in begun.iter().zip(["weather", "time"]).enumerate() {
        assert_eq!((&call["index"], &call["type"]), (&json!(index), &json!("function")));
        assert_eq!(call["function"], json!({"name": name, "arguments": ""}));
    }
    for (index, expected) in ["{\"city\": \"São Paulo\"}", "{}"].into_iter().enumerate() {
        let pieces = pieces.iter().filter(|call| call["index"] == index);
        let keys = |call: &Value| call.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert!(
            pieces.clone().all(|call| keys(call) == ["index", "function"] && keys(&call["function"]) == ["arguments"])
        );
        let arguments: String = pieces.map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(arguments, expected);
    }
    let reasons: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).filter(|reason| !reason.is_null()).collect();
    assert_eq!(reasons, [&json!("tool_calls")]);
}

#[tokio::test]
async fn a_call_that_is_cut_off_says_so() {
    let (router, mut worker) = demo().await;
    let said = tokens("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"P");
    let body = chat(json!({"tools": weather(), "max_tokens": said.len()}));
    let (answer, ()) = tokio::join!(router.post(CHAT, body), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &said, Reason::Length);
    });
    let choice = &answer.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], "{\"city\": \"P");
}

#[tokio::test]
async fn forced_calls_have_a_grammar_and_their_own_shape() {
    let (router, mut worker) = demo().await;
    let said = "[{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}]";
    let request = chat(json!({"tools": weather(), "tool_choice": "required"}));
    let (body, submit) = answered(&router, &mut worker, request, &output(said)).await;
    let grammar = submit.grammar.unwrap();
    assert_eq!(grammar.kind(), Kind::JsonSchema);
    let schema: Value = serde_json::from_str(&grammar.text).unwrap();
    assert_eq!((&schema["type"], &schema["minItems"]), (&json!("array"), &json!(1)));
    assert_eq!(schema["items"]["anyOf"][0]["properties"]["parameters"], weather()[0]["function"]["parameters"]);
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(function, &json!({"name": "weather", "arguments": "{\"city\": \"Rome\"}"}));

    let named = json!({"type": "function", "function": {"name": "weather"}});
    for stream in [false, true] {
        let request = chat(json!({"tools": weather(), "tool_choice": named, "stream": stream}));
        let said = output("{\"city\": \"Rome\"}");
        if stream {
            let chunks = streamed(&router, &mut worker, request, &said).await;
            assert_eq!(gathered(&chunks, "/tool_calls/0/function/arguments"), "{\"city\": \"Rome\"}");
            assert_eq!(gathered(&chunks, "/tool_calls/0/function/name"), "weather");
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
        } else {
            let (body, submit) = answered(&router, &mut worker, request, &said).await;
            let schema: Value = serde_json::from_str(&submit.grammar.unwrap().text).unwrap();
            assert_eq!(schema, weather()[0]["function"]["parameters"]);
            let choice = &body["choices"][0];
            assert_eq!(choice["finish_reason"], "stop", "a client that named the tool knows");
            let function = &choice["message"]["tool_calls"][0]["function"];
            assert_eq!(function, &json!({"name": "weather", "arguments": "{\"city\": \"Rome\"}"}));
        }
    }
}

#[tokio::test]
async fn special_tokens_that_mark_calls_are_read_and_not_shown() {
    let golden = Golden("mistral");
    let (router, mut worker) = golden.start().await;
    let said = "Ok [TOOL_CALLS] [{\"name\": \"time\", \"arguments\": {\"zone\": \"é\"}}]";
    let said = [golden.tokens(said), vec![2]].concat();
    assert!(said.contains(&5), "the mark is a token: {said:?}");
    let (body, _) = answered(&router, &mut worker, chat(json!({"tools": weather()})), &said).await;
    let choice = &body["choices"][0];
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(function, &json!({"name": "time", "arguments": "{\"zone\": \"é\"}"}), "{choice}");
    assert_eq!(choice["message"]["content"].as_str().unwrap().trim(), "Ok");
    let id = choice["message"]["tool_calls"][0]["id"].as_str().unwrap();
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
    let (body, _) = answered(&router, &mut worker, chat(json!({})), &said).await;
    let content = body["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(!content.contains("TOOL_CALLS") && content.contains("zone"), "{content}");
}

#[tokio::test]
async fn another_parser_can_be_configured_and_none_too() {
    let (router, mut worker) = start(|config| config.tool_call_parser = ToolCallParser::Pythonic).await;
    let said = output("[weather(city='Rome')]");
    let (body, _) = answered(&router, &mut worker, chat(json!({"tools": weather()})), &said).await;
    let function = &body["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(function, &json!({"name": "weather", "arguments": "{\"city\": \"Rome\"}"}));

    let (router, _worker) = start(|config| config.tool_call_parser = ToolCallParser::None).await;
    let refused = router.post(CHAT, chat(json!({"tools": weather()}))).await;
    assert_eq!(refused.status, 400);
    assert!(refused.error().contains("--tool-call-parser"), "{}", refused.body);
}

const THOUGHTS: &str = "<think>\nIt might. Clouds.\n</think>\n\nYes, it will.";

#[tokio::test]
async fn reasoning_is_told_from_the_answer_and_counted() {
    let golden = Golden("qwen3");
    let (router, mut worker) = golden.start().await;
    let eos = golden.tokens("<|im_end|>")[0];
    let said = [golden.tokens(THOUGHTS), vec![eos]].concat();
    let thoughts = golden.tokens("\nIt might. Clouds.\n").len();
    let request = json!({"return_token_ids": true, "logprobs": true});
    let (body, submit) = answered(&router, &mut worker, chat(request.clone()), &said).await;
    assert!(golden.text(&prompt_ids(&submit)).ends_with("assistant\n"));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["reasoning"], "It might. Clouds.");
    assert_eq!(choice["message"]["reasoning_content"], "It might. Clouds.");
    assert_eq!(choice["message"]["content"], "Yes, it will.");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(body["usage"]["completion_tokens_details"]["reasoning_tokens"], thoughts);
    assert_eq!(body["usage"]["completion_tokens"], said.len());
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), said.len());

    // Hidden, neither its text nor its tokens are seen, but they count.
    let mut hidden = chat(request);
    hidden["include_reasoning"] = false.into();
    let (body, _) = answered(&router, &mut worker, hidden, &said).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["reasoning"], Value::Null);
    assert_eq!(choice["message"]["content"], "Yes, it will.");
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), said.len() - thoughts);
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert!(logprobs.iter().all(|token| token["token"] != "It"), "{logprobs:?}");
    assert_eq!(body["usage"]["completion_tokens_details"]["reasoning_tokens"], thoughts);

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = streamed(&router, &mut worker, chat(options), &said).await;
    for field in ["/reasoning", "/reasoning_content"] {
        assert_eq!(gathered(&chunks, field), "It might. Clouds.");
    }
    assert_eq!(gathered(&chunks, "/content"), "Yes, it will.");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens_details"]["reasoning_tokens"], thoughts);
}

#[tokio::test]
async fn a_prompt_that_ends_reasoning_leaves_none() {
    let golden = Golden("qwen3");
    let (router, mut worker) = golden.start().await;
    let eos = golden.tokens("<|im_end|>")[0];
    let said = [golden.tokens("<think> is how it would begin."), vec![eos]].concat();
    let request = chat(json!({"chat_template_kwargs": {"enable_thinking": false}}));
    let (body, submit) = answered(&router, &mut worker, request, &said).await;
    assert!(golden.text(&prompt_ids(&submit)).trim_end().ends_with("</think>"));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["reasoning"], Value::Null);
    assert_eq!(choice["message"]["content"], "<think> is how it would begin.");
    assert_eq!(body["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
}

#[tokio::test]
async fn a_model_may_think_at_once() {
    let (router, mut worker) = start(|config| config.reasoning_parser = ReasoningParser::DeepseekR1).await;
    let (body, _) = answered(&router, &mut worker, chat(json!({})), &output("Hm.\n</think>\nYes.")).await;
    let message = &body["choices"][0]["message"];
    assert_eq!((&message["reasoning"], &message["content"]), (&json!("Hm."), &json!("Yes.")));
    let begun = json!([{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes,"}]);
    let goes_on = json!({"messages": begun, "continue_final_message": true, "add_generation_prompt": false});
    let (body, _) = answered(&router, &mut worker, chat(goes_on), &output(" it will.")).await;
    let message = &body["choices"][0]["message"];
    assert_eq!((&message["reasoning"], &message["content"]), (&Value::Null, &json!(" it will.")));
    let said = [tokens("Hm. It"), vec![EOS]].concat();
    let (body, _) = answered(&router, &mut worker, chat(json!({})), &said).await;
    let message = &body["choices"][0]["message"];
    assert_eq!((&message["reasoning"], &message["content"]), (&json!("Hm. It"), &Value::Null));
}

#[tokio::test]
async fn a_conversation_with_calls_goes_back_into_the_template() {
    let (router, mut worker) = demo().await;
    let mut request = chat(json!({"tools": weather()}));
    let call =
        json!({"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}});
    request["messages"] = json!([
        {"role": "user", "content": "Will it rain in Rome?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "sunny"},
    ]);
    let (_, submit) = answered(&router, &mut worker, request, &output("No.")).await;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/tokenizer.json");
    let prompt = Tokenizer::from_file(path).unwrap().decode(&prompt_ids(&submit), false).unwrap();
    assert!(prompt.contains("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>"));
    assert!(prompt.contains("<tool_response>\nsunny\n</tool_response>"), "{prompt}");
}
