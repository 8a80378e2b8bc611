//! What was generated, as output items: whole, or as the events that build them up, numbered from 0.

use super::object::{Echo, Status, Title, new_id, object};
use crate::{
    dialect::Event,
    error::Error,
    openai::{Shape, Usage, stream::named_event, write_json},
    request::{Finish, Router, Step},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Writes responses, and keeps them when they are done.
#[derive(Debug)]
pub(crate) struct ResponsesShape {
    router: Arc<Router>,
    title: Title,
    echo: Echo,
    /// The conversation up to the answer.
    conversation: Vec<Value>,
    items: Vec<Item>,
    /// Whether the last item may still grow.
    open: bool,
    status: Status,
    usage: Option<Usage>,
    /// Of the next event.
    sequence: u64,
}

#[derive(Debug)]
enum Item {
    Message { id: String, text: String },
    Reasoning { id: String, text: String },
    Call { id: String, call_id: String, name: String, arguments: String },
}

impl Item {
    fn id(&self) -> &str {
        match self {
            Item::Message { id, .. } | Item::Reasoning { id, .. } | Item::Call { id, .. } => id,
        }
    }

    /// One that only begins has no parts yet.
    fn object(&self, status: &str) -> Value {
        let parts = |part: Value| if status == "in_progress" { json!([]) } else { json!([part]) };
        match self {
            Item::Message { id, text } => {
                let content = parts(output_text(text));
                json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": content})
            }
            Item::Reasoning { id, text } => {
                let content = parts(reasoning_text(text));
                json!({"id": id, "type": "reasoning", "summary": [], "status": status, "content": content})
            }
            Item::Call { id, call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": arguments,
            }),
        }
    }
}

fn reasoning_text(text: &str) -> Value {
    json!({"type": "reasoning_text", "text": text})
}

fn output_text(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

impl ResponsesShape {
    pub(crate) fn new(router: Arc<Router>, title: Title, echo: Echo, conversation: Vec<Value>) -> Self {
        Self {
            router,
            title,
            echo,
            conversation,
            items: Vec::new(),
            open: false,
            status: Status::InProgress,
            usage: None,
            sequence: 0,
        }
    }

    /// Returns the response as it stands.
    pub(crate) fn object(&self) -> Value {
        let last = self.items.len().saturating_sub(1);
        let status = |at: usize| match &self.status {
            Status::Incomplete | Status::Failed(_) if at == last => "incomplete",
            _ => "completed",
        };
        let output = self.items.iter().enumerate().map(|(at, item)| item.object(status(at))).collect();
        object(&self.title, &self.echo, &self.status, output, self.usage)
    }

    /// Ends with an error. Returns the response.
    pub(crate) fn fail(&mut self, error: &Error) -> Value {
        self.status = Status::Failed(error.clone());
        self.keep()
    }

    /// Keeps the response as it stands now, if it is to be, and returns it.
    fn keep(&self) -> Value {
        let object = self.object();
        if self.echo.store {
            let store = &self.router.responses;
            let conversation = [&self.conversation[..], &[self.said()]].concat();
            match self.echo.background {
                true => store.finish(&self.title.id, &object, &conversation),
                false => store.keep(&self.title.id, &object, &conversation),
            }
        }
        object
    }

    /// The answer as a message of a conversation that goes on.
    fn said(&self) -> Value {
        let (mut text, mut thoughts, mut calls) = (String::new(), String::new(), Vec::new());
        for item in &self.items {
            match item {
                Item::Message { text: more, .. } => text.push_str(more),
                Item::Reasoning { text: more, .. } => thoughts.push_str(more),
                Item::Call { call_id, name, arguments, .. } => {
                    // A call that broke off cannot be gone on from as it is.
                    let whole = serde_json::from_str::<Value>(arguments).is_ok_and(|arguments| arguments.is_object());
                    let arguments = if whole { arguments } else { "{}" };
                    let function = json!({"name": name, "arguments": arguments});
                    calls.push(json!({"id": call_id, "type": "function", "function": function}));
                }
            }
        }
        let mut said = json!({"role": "assistant", "content": text});
        if !thoughts.is_empty() {
            said["reasoning_content"] = thoughts.into();
        }
        if !calls.is_empty() {
            said["tool_calls"] = calls.into();
        }
        said
    }

    fn send(&mut self, kind: &str, mut event: Value, out: &mut Vec<u8>) {
        event["type"] = kind.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        named_event(out, kind, |out| write_json(&event, out));
    }

    /// Takes a step in and writes the events of it.
    fn take(&mut self, step: &Step, out: &mut Vec<u8>) {
        for event in &step.events {
            self.hear(event, out);
        }
        if let Some(finish) = &step.finish {
            self.status = if *finish == Finish::Length { Status::Incomplete } else { Status::Completed };
            self.close_item(out);
        }
    }

    fn hear(&mut self, event: &Event, out: &mut Vec<u8>) {
        match (event, self.items.last().filter(|_| self.open)) {
            (Event::Text(_), Some(Item::Message { .. })) | (Event::Reasoning(_), Some(Item::Reasoning { .. })) => {}
            (Event::Text(_), _) => {
                self.open_item(Item::Message { id: new_id("msg"), text: String::new() }, out);
                self.send_at_part("response.content_part.added", json!({"part": output_text("")}), out);
            }
            (Event::Reasoning(_), _) => {
                self.open_item(Item::Reasoning { id: new_id("rs"), text: String::new() }, out);
                self.send_at_part("response.content_part.added", json!({"part": reasoning_text("")}), out);
            }
            (Event::Call { id, name, .. }, _) => {
                let (call_id, name) = (id.clone(), name.clone());
                self.open_item(Item::Call { id: new_id("fc"), call_id, name, arguments: String::new() }, out);
            }
            (Event::Arguments { .. }, _) => {}
        }
        match (event, self.items.last_mut()) {
            (Event::Text(more), Some(Item::Message { text, .. })) => {
                text.push_str(more);
                self.send_at_part("response.output_text.delta", json!({"delta": more, "logprobs": []}), out);
            }
            (Event::Reasoning(more), Some(Item::Reasoning { text, .. })) => {
                text.push_str(more);
                self.send_at_part("response.reasoning_text.delta", json!({"delta": more}), out);
            }
            (Event::Arguments { json: more, .. }, Some(Item::Call { arguments, .. })) => {
                arguments.push_str(more);
                self.send_at_item("response.function_call_arguments.delta", json!({"delta": more}), out);
            }
            _ => {}
        }
    }

    fn open_item(&mut self, item: Item, out: &mut Vec<u8>) {
        self.close_item(out);
        let event = json!({"output_index": self.items.len(), "item": item.object("in_progress")});
        self.items.push(item);
        self.open = true;
        self.send("response.output_item.added", event, out);
    }

    fn close_item(&mut self, out: &mut Vec<u8>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let Some(item) = self.items.last() else { return };
        let status = if self.status == Status::Incomplete { "incomplete" } else { "completed" };
        let done = json!({"output_index": self.items.len() - 1, "item": item.object(status)});
        match item {
            Item::Message { text, .. } => {
                let (whole, part) = (json!({"text": text, "logprobs": []}), json!({"part": output_text(text)}));
                self.send_at_part("response.output_text.done", whole, out);
                self.send_at_part("response.content_part.done", part, out);
            }
            Item::Reasoning { text, .. } => {
                let (whole, part) = (json!({"text": text}), json!({"part": reasoning_text(text)}));
                self.send_at_part("response.reasoning_text.done", whole, out);
                self.send_at_part("response.content_part.done", part, out);
            }
            Item::Call { name, arguments, .. } => {
                let whole = json!({"name": name, "arguments": arguments});
                self.send_at_item("response.function_call_arguments.done", whole, out);
            }
        }
        self.send("response.output_item.done", done, out);
    }

    /// Sends an event about the last item.
    fn send_at_item(&mut self, kind: &str, mut event: Value, out: &mut Vec<u8>) {
        if let Some(item) = self.items.last() {
            event["item_id"] = item.id().into();
            event["output_index"] = (self.items.len() - 1).into();
        }
        self.send(kind, event, out);
    }

    /// Sends an event about the only part of the last item.
    fn send_at_part(&mut self, kind: &str, mut event: Value, out: &mut Vec<u8>) {
        event["content_index"] = 0.into();
        self.send_at_item(kind, event, out);
    }
}

impl Shape for ResponsesShape {
    fn chunk(&mut self, _choice: usize, first: bool, step: &Step, _usage: Option<Usage>, out: &mut Vec<u8>) {
        if first {
            let response = self.object();
            self.send("response.created", json!({"response": response}), out);
            self.send("response.in_progress", json!({"response": response}), out);
        }
        self.take(step, out);
    }

    fn usage_chunk(&mut self, usage: Usage, _out: &mut Vec<u8>) {
        self.usage = Some(usage);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let response = self.keep();
        let kind = format!("response.{}", self.status.name());
        self.send(&kind, json!({"response": response}), out);
    }

    fn failed(&mut self, error: &Error, out: &mut Vec<u8>) {
        let response = self.fail(error);
        self.send("response.failed", json!({"response": response}), out);
    }

    fn collect(&mut self, _choice: usize, step: &Step) {
        self.take(step, &mut Vec::new());
    }

    fn answer(&mut self, usage: Usage) -> Vec<u8> {
        self.usage = Some(usage);
        let mut out = Vec::new();
        write_json(&self.keep(), &mut out);
        out
    }
}
