//! Chat completions asked for in other APIs' words.

use crate::{
    mock::{MockWorker, ended, prompt_ids},
    support::{EOS, Open, TestRouter, output, tokens},
};
use cluster::Role;
use hyper::Method;
use proto::ended::Reason;
use router::Policy;
use serde_json::{Value, json};

/// A router and one decode worker.
async fn local() -> (TestRouter, MockWorker) {
    let router = TestRouter::start(Policy::Local).await;
    let worker = MockWorker::start(&*router.directory, "decode", Role::Decode).await;
    router.ready().await;
    (router, worker)
}

/// Reads all events of a stream that nothing but its end ends.
async fn events(mut stream: Open) -> Vec<Value> {
    let mut events = Vec::new();
    while let Some(event) = stream.event().await {
        events.push(serde_json::from_str(&event).unwrap_or_else(|e| panic!("{event}: {e}")));
    }
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_message_and_a_chat_are_the_same_prompt() {
    let (router, mut worker) = local().await;
    let chat = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]});
    let message = json!({"system": "Be brief.", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]});
    let response = json!({"instructions": "Be brief.", "input": "Hi", "max_output_tokens": 9});
    let mut prompts = Vec::new();
    for (path, body) in [("/v1/chat/completions", chat), ("/v1/messages", message), ("/v1/responses", response)] {
        let (answer, submit) = tokio::join!(router.post(path, &body), async {
            let submit = worker.submission().await;
            worker.answer(&submit, &output("Hello."), Reason::Stop);
            submit
        });
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.contains("\"Hello.\""), "{}", answer.body);
        prompts.push(prompt_ids(&submit));
    }
    assert!(prompts[0] == prompts[1] && prompts[0] == prompts[2], "{prompts:?}");
}

#[tokio::test]
async fn streams_of_messages_end_in_their_own_way() {
    let (router, mut worker) = local().await;
    let body = json!({"max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let (stream, submit) = tokio::join!(router.open("/v1/messages", &body), async {
        let submit = worker.submission().await;
        worker.emit(&submit, 0, &tokens("Hello"), None);
        submit
    });
    worker.emit(&submit, tokens("Hello").len() as u32, &[EOS], Some(ended(Reason::Stop, EOS)));
    let events = events(stream).await;
    let order = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(kinds(&events), order);
    assert_eq!(events[2]["delta"], json!({"type": "text_delta", "text": "Hello"}));
    assert_eq!(events[4]["delta"], json!({"stop_reason": "end_turn", "stop_sequence": null}));
    assert_eq!(events[4]["usage"]["output_tokens"], tokens("Hello").len() + 1);
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_the_apis_words() {
    for (path, body, last) in [
        ("/v1/messages", json!({"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}), "error"),
        ("/v1/responses", json!({"input": "Hi"}), "response.failed"),
    ] {
        let (router, mut worker) = local().await;
        let mut body = body;
        body["stream"] = true.into();
        let (stream, submit) = tokio::join!(router.open(path, &body), async {
            let submit = worker.submission().await;
            worker.emit(&submit, 0, &tokens("Hello"), None);
            submit
        });
        let wrong = proto::Ended { message: "no such token".into(), ..ended(Reason::Invalid, 0) };
        worker.emit(&submit, 9, &[], Some(wrong));
        let events = events(stream).await;
        assert_eq!(kinds(&events).last(), Some(&last), "{events:?}");
        let told = events[events.len() - 1].to_string();
        assert!(told.contains("no such token"), "{told}");
    }
}

#[tokio::test]
async fn a_stored_response_is_gone_on_from_until_it_is_deleted() {
    let (router, mut worker) = local().await;
    let mut ask = async |body: Value, said: &str| {
        let (answer, submit) = tokio::join!(router.post("/v1/responses", &body), async {
            let submit = worker.submission().await;
            worker.answer(&submit, &output(said), Reason::Stop);
            submit
        });
        assert_eq!(answer.status, 200, "{}", answer.body);
        (answer.json(), prompt_ids(&submit))
    };
    let (first, _) = ask(json!({"input": "Hi"}), "Hello.").await;
    let id = first["id"].as_str().unwrap().to_string();
    let (_, continued) = ask(json!({"input": "And?", "previous_response_id": id}), "Well.").await;
    let spelled_out = json!({"input": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"role": "user", "content": "And?"},
    ]});
    let (_, repeated) = ask(spelled_out, "Well.").await;
    assert_eq!(continued, repeated);
    let path = format!("/v1/responses/{id}");
    assert_eq!(router.get(&path).await.json(), first);
    assert_eq!(router.send(Method::DELETE, &path, None, &[]).await.whole().await.json()["deleted"], true);
    assert!(router.get(&path).await.error().contains(&id));
    let lost = router.post("/v1/responses", json!({"input": "And?", "previous_response_id": id})).await;
    assert_eq!((lost.status, lost.json()["error"]["param"].as_str()), (400, Some("previous_response_id")));
}

#[tokio::test]
async fn a_response_in_the_background_is_cancelled_where_it_runs() {
    let (router, mut worker) = local().await;
    let begun = router.post("/v1/responses", json!({"input": "Hi", "background": true})).await.json();
    assert_eq!(begun["status"], "in_progress");
    let submit = worker.submission().await;
    let path = format!("/v1/responses/{}/cancel", begun["id"].as_str().unwrap());
    let cancelled = router.send(Method::POST, &path, None, &[]).await.whole().await.json();
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(worker.cancel().await, submit.attempt);
}

#[tokio::test]
async fn tokens_are_those_that_workers_get() {
    let (router, mut worker) = local().await;
    let messages = json!([{"role": "user", "content": "What is a KV cache?"}]);
    let tokenized = router.post("/tokenize", json!({"messages": messages})).await.json();
    let counted = router.post("/v1/messages/count_tokens", json!({"messages": messages})).await.json();
    let (_, submit) = tokio::join!(router.post("/v1/chat/completions", json!({"messages": messages})), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("x"), Reason::Stop);
        submit
    });
    assert_eq!(tokenized["tokens"], json!(prompt_ids(&submit)));
    assert_eq!(counted["input_tokens"], prompt_ids(&submit).len());
    let text = "naïve 🦊 text";
    let asked = json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true});
    let tokenized = router.post("/tokenize", asked).await.json();
    assert_eq!(tokenized["tokens"], json!(tokens(text)));
    assert_eq!(tokenized["token_strs"].as_array().map(Vec::len), tokenized["count"].as_u64().map(|n| n as usize));
    let back = router.post("/detokenize", json!({"tokens": tokenized["tokens"]})).await.json();
    assert_eq!(back["prompt"], text);
}

/// A call as the grammar of a forced choice makes the model write it.
const CALL: &str = r#"[{"name": "get_price", "parameters": {"item": "tomatoes"}}]"#;

#[tokio::test]
async fn calls_of_tools_are_blocks_of_a_message() {
    let (router, mut worker) = local().await;
    let tool = json!({"name": "get_price", "input_schema": {"type": "object"}});
    let ask = |stream: bool| {
        json!({"max_tokens": 90, "messages": [{"role": "user", "content": "Price?"}], "tools": [tool],
               "tool_choice": {"type": "any"}, "stream": stream})
    };
    let (answer, ()) = tokio::join!(router.post("/v1/messages", ask(false)), async {
        let submit = worker.submission().await;
        assert!(submit.grammar.is_some(), "the choice is forced");
        worker.answer(&submit, &output(CALL), Reason::Stop);
    });
    let answer = answer.json();
    assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
    let call = &answer["content"][0];
    assert_eq!(
        (call["type"].as_str(), call["name"].as_str(), &call["input"]),
        (Some("tool_use"), Some("get_price"), &json!({"item": "tomatoes"}))
    );
    let (stream, ()) = tokio::join!(router.open("/v1/messages", ask(true)), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output(CALL), Reason::Stop);
    });
    let events = events(stream).await;
    assert_eq!(events[1]["content_block"]["type"], "tool_use", "{events:?}");
    let pieces: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&pieces).unwrap(), json!({"item": "tomatoes"}));
    assert_eq!(events[events.len() - 2]["delta"]["stop_reason"], "tool_use");
}

#[tokio::test]
async fn calls_of_tools_are_items_of_a_response_and_can_be_answered() {
    let (router, mut worker) = local().await;
    let tools = json!([{"type": "function", "name": "get_price", "parameters": {"type": "object"}}]);
    let ask = json!({"input": "Price?", "tools": tools, "tool_choice": "required", "stream": true});
    let (stream, ()) = tokio::join!(router.open("/v1/responses", &ask), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output(CALL), Reason::Stop);
    });
    let events = events(stream).await;
    let mut order = kinds(&events);
    order.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(order, expected);
    let response = &events[events.len() - 1]["response"];
    let call = &response["output"][0];
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert_eq!((call["name"].as_str(), arguments), (Some("get_price"), json!({"item": "tomatoes"})));

    let result = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "14"}]);
    let ask = json!({"input": result, "previous_response_id": response["id"], "tools": tools});
    let (answer, submit) = tokio::join!(router.post("/v1/responses", &ask), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("14 dollars."), Reason::Stop);
        submit
    });
    assert_eq!(answer.json()["output"][0]["content"][0]["text"], "14 dollars.", "{}", answer.body);
    let spelled_out = json!({"tools": [{"type": "function", "function": {"name": "get_price", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "user", "content": "Price?"},
        {"role": "assistant", "tool_calls": [{"id": call["call_id"], "type": "function",
            "function": {"name": "get_price", "arguments": call["arguments"]}}]},
        {"role": "tool", "tool_call_id": call["call_id"], "content": "14"},
    ]});
    let (_, repeated) = tokio::join!(router.post("/v1/chat/completions", &spelled_out), async {
        let submit = worker.submission().await;
        worker.answer(&submit, &output("14 dollars."), Reason::Stop);
        submit
    });
    assert_eq!(prompt_ids(&submit), prompt_ids(&repeated), "the conversation that is kept is the one that was held");
}
