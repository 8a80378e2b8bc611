//! What fuzzing calls: everything that reads what a model's files, a model or a client say. Nothing may panic, or take without bound.

use crate::{
    Config,
    admission::Admission,
    dialect::{Dialect, exam},
    fleet::{Fleet, leg::Pooling},
    metrics::Metrics,
    openai::{chat::ChatRequest, completions::CompletionRequest, embeddings::EmbeddingRequest, fields::Fields},
    page_names::PageNames,
    request::Router,
    responses::store::Store,
    text::{
        TextModel, TextPool,
        template::{ChatInput, ChatTemplate},
    },
    why::Why,
};
use ::admission::Supply;
use cluster::MemoryDirectory;
use serde_json::{Map, json};
use std::{path::Path, sync::Arc};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Reads the text of a model as [`run`](crate::run) does, encodes and renders a little with it, and forgets it.
pub fn model(path: &Path) {
    let Ok(model) = TextModel::load(path) else { return };
    for text in ["", "Hello, w\u{f6}rld 12\n", "<s>\u{2581}\u{1f600}</s>"] {
        if let Ok(ids) = model.tokenizer.encode(text, true) {
            model.tokenizer.decode(&ids, true);
            ids.iter().for_each(|id| drop(model.tokenizer.bytes(*id).to_vec()));
        }
    }
    if let Some(template) = &model.template {
        let _ = template.render(&greeting());
    }
}

fn greeting() -> ChatInput {
    let messages = vec![json!({"role": "user", "content": "Hi"})];
    ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() }
}

/// Takes a model's words apart by every reader, whole and cut at each byte 0xff (which no text holds): both must say the same.
pub fn words(input: &[u8]) {
    let pieces: Vec<String> =
        input.split(|byte| *byte == 0xff).map(|piece| String::from_utf8_lossy(piece).into_owned()).collect();
    exam::examine(&pieces.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Renders a template with what stands behind a zero byte: a list of messages, or one message.
pub fn template(input: &[u8]) {
    let end = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let Ok(template) = ChatTemplate::compile(&String::from_utf8_lossy(&input[..end]), Map::new()) else { return };
    let text = String::from_utf8_lossy(input.get(end + 1..).unwrap_or_default());
    let messages = serde_json::from_str(&text).unwrap_or_else(|_| vec![json!({"role": "user", "content": text})]);
    let _ = template.render(&ChatInput { messages, tools: vec![json!({"name": "f"})], ..greeting() });
}

/// A router without workers that reads bodies.
#[derive(Debug)]
pub struct Bodies {
    router: Arc<Router>,
    /// What its fleet runs on.
    _runtime: Runtime,
}

impl Bodies {
    /// Serves the model in `dir`.
    pub fn new(dir: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let config = Config { model_name: "demo".into(), ..Config::default() };
        let model = TextModel::load(dir).expect("a model");
        let metrics = Metrics::new("demo");
        let fleet = {
            let _inside = runtime.enter();
            Fleet::start(&config, "router", &MemoryDirectory::default(), metrics.clone(), CancellationToken::new())
        };
        let router = Router {
            dialect: Dialect::choose(config.tool_call_parser, config.reasoning_parser, &model),
            pooling: Some(Pooling::Last),
            model: Arc::new(model),
            text: TextPool::new(1),
            keys: None,
            page_names: PageNames::new(0),
            responses: Store::new(&config.limits),
            fleet,
            admission: Admission::new(&config.limits, || Supply::UNKNOWN, metrics.clone()),
            why: Why::new(0),
            metrics,
            created: 0,
            draining: CancellationToken::new(),
            abort: CancellationToken::new(),
            config,
        };
        Self { router: Arc::new(router), _runtime: runtime }
    }

    /// Reads a body as the endpoints that take prompts do, and renders those of a chat.
    pub fn read(&self, body: &[u8]) {
        let router = &self.router;
        if let Ok(request) = Fields::parse(body).and_then(|fields| ChatRequest::parse(fields, router)) {
            let _ = request.into_prompt()(router);
        }
        let _ = Fields::parse(body).and_then(|fields| CompletionRequest::parse(fields, router));
        let _ = Fields::parse(body).and_then(|fields| EmbeddingRequest::parse(fields, router));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    /// JSON that has the names and, often, the types that bodies have.
    fn body() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
            prop::sample::select(vec!["auto", "required", "none", "json_schema", "text", "user", "function"])
                .prop_map(Value::from),
        ];
        let names = prop::sample::select(vec![
            "messages",
            "prompt",
            "input",
            "encoding_format",
            "dimensions",
            "role",
            "content",
            "type",
            "text",
            "tools",
            "tool_choice",
            "function",
            "name",
            "parameters",
            "tool_calls",
            "arguments",
            "response_format",
            "json_schema",
            "schema",
            "structured_outputs",
            "regex",
            "grammar",
            "stop",
            "logit_bias",
            "n",
            "seed",
            "stream",
            "stream_options",
            "max_tokens",
            "reasoning_effort",
            "truncate_prompt_tokens",
            "cache_salt",
            "echo",
            "documents",
            "chat_template_kwargs",
            "bad_words",
            "7",
            "continue_final_message",
        ]);
        let value = leaf.prop_recursive(4, 40, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((names.clone(), inner), 0..8).prop_map(|fields| Value::Object(
                    fields.into_iter().map(|(name, v)| (name.to_owned(), v)).collect()
                )),
            ]
        });
        value.prop_map(|value| {
            let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "prompt": "x"});
            if let (Value::Object(fields), Some(body)) = (&value, body.as_object_mut()) {
                body.extend(fields.clone());
            }
            body.to_string()
        })
    }

    thread_local! {
        static BODIES: Bodies = Bodies::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1_000, ..Default::default() })]

        #[test]
        fn any_body_is_read_or_refused(body in body()) {
            BODIES.with(|bodies| bodies.read(body.as_bytes()));
        }

        #[test]
        fn any_template_is_rendered_or_refused(text in "[{%} a-z|().'=\\[\\]0-9\n]{0,60}", message in ".{0,20}") {
            template(format!("{text}\0{message}").as_bytes());
        }

        #[test]
        fn any_words_are_taken_apart(input in prop::collection::vec(any::<u8>(), 0..60)) {
            words(&input);
        }
    }
}
