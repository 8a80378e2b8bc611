//! What was generated, as content blocks: whole, or as the events that build them up.

use super::write_error;
use crate::{
    dialect::Event,
    error::Error,
    openai::{Head, Shape, Usage, stream::named_event, write_json},
    request::{Finish, Step},
};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

/// Writes messages.
#[derive(Debug)]
pub(crate) struct MessagesShape {
    head: Head,
    content: Vec<Block>,
    /// Whether the last block may still grow.
    open: bool,
    finish: Option<Finish>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
        /// Nobody here signs what a model thinks.
        signature: &'static str,
    },
    ToolUse {
        id: String,
        name: String,
        input: Input,
    },
}

/// Arguments of a call, as far as they came.
#[derive(Debug, Default)]
struct Input(String);

impl Serialize for Input {
    /// Writes an object, whatever became of the call.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let parsed: Option<Map<String, Value>> = serde_json::from_str(&self.0).ok();
        parsed.unwrap_or_default().serialize(serializer)
    }
}

#[derive(Serialize)]
struct Message<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: &'a str,
    content: &'a [Block],
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
    usage: Tokens,
}

/// Anthropic counts what came from the cache apart from the rest of the prompt.
#[derive(Serialize)]
struct Tokens {
    input_tokens: u32,
    cache_creation_input_tokens: u32,
    cache_read_input_tokens: u32,
    output_tokens: u32,
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Self {
        let cached = usage.cached_tokens();
        Self {
            input_tokens: usage.prompt_tokens - cached,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

impl MessagesShape {
    pub(crate) fn new(head: Head) -> Self {
        Self { head, content: Vec::new(), open: false, finish: None }
    }

    fn message(&self, usage: Usage) -> Message<'_> {
        let (stop_reason, stop_sequence) = self.reasons();
        Message {
            id: &self.head.id,
            kind: "message",
            role: "assistant",
            model: &self.head.model,
            content: &self.content,
            stop_reason,
            stop_sequence,
            usage: usage.into(),
        }
    }

    fn reasons(&self) -> (Option<&'static str>, Option<&str>) {
        match &self.finish {
            None => (None, None),
            Some(Finish::EndOfSequence) if self.calls_tools() => (Some("tool_use"), None),
            Some(Finish::EndOfSequence | Finish::StopToken(_)) => (Some("end_turn"), None),
            Some(Finish::StopString(string)) => (Some("stop_sequence"), Some(string)),
            Some(Finish::Length) => (Some("max_tokens"), None),
        }
    }

    fn calls_tools(&self) -> bool {
        self.content.iter().any(|block| matches!(block, Block::ToolUse { .. }))
    }

    /// Takes a step in and writes the events of it.
    fn take(&mut self, step: &Step, out: &mut Vec<u8>) {
        for event in &step.events {
            self.hear(event, out);
        }
        if let Some(finish) = &step.finish {
            self.finish = Some(finish.clone());
            self.close_block(out);
        }
    }

    fn hear(&mut self, event: &Event, out: &mut Vec<u8>) {
        match (event, self.content.last().filter(|_| self.open)) {
            (Event::Text(_), Some(Block::Text { .. })) | (Event::Reasoning(_), Some(Block::Thinking { .. })) => {}
            (Event::Text(_), _) => self.open_block(Block::Text { text: String::new() }, out),
            (Event::Reasoning(_), _) => {
                self.open_block(Block::Thinking { thinking: String::new(), signature: "" }, out);
            }
            (Event::Call { id, name, .. }, _) => {
                let input = Input::default();
                self.open_block(Block::ToolUse { id: id.clone(), name: name.clone(), input }, out);
            }
            (Event::Arguments { .. }, _) => {}
        }
        match (event, self.content.last_mut()) {
            (Event::Text(more), Some(Block::Text { text })) => {
                text.push_str(more);
                self.delta(&json!({"type": "text_delta", "text": more}), out);
            }
            (Event::Reasoning(more), Some(Block::Thinking { thinking, .. })) => {
                thinking.push_str(more);
                self.delta(&json!({"type": "thinking_delta", "thinking": more}), out);
            }
            (Event::Arguments { json: more, .. }, Some(Block::ToolUse { input, .. })) => {
                input.0.push_str(more);
                self.delta(&json!({"type": "input_json_delta", "partial_json": more}), out);
            }
            _ => {}
        }
    }

    fn open_block(&mut self, block: Block, out: &mut Vec<u8>) {
        self.close_block(out);
        let index = self.content.len();
        send(out, &json!({"type": "content_block_start", "index": index, "content_block": block}));
        self.content.push(block);
        self.open = true;
    }

    fn delta(&self, delta: &Value, out: &mut Vec<u8>) {
        send(out, &json!({"type": "content_block_delta", "index": self.content.len() - 1, "delta": delta}));
    }

    fn close_block(&mut self, out: &mut Vec<u8>) {
        if std::mem::take(&mut self.open) {
            send(out, &json!({"type": "content_block_stop", "index": self.content.len() - 1}));
        }
    }
}

/// Writes an event, which is named as its type is.
fn send(out: &mut Vec<u8>, event: &Value) {
    let name = event["type"].as_str().unwrap_or_default();
    named_event(out, name, |out| write_json(event, out));
}

impl Shape for MessagesShape {
    fn chunk(&mut self, _choice: usize, first: bool, step: &Step, usage: Option<Usage>, out: &mut Vec<u8>) {
        if first {
            let message = self.message(usage.unwrap_or_default());
            named_event(out, "message_start", |out| {
                write_json(&json!({"type": "message_start", "message": message}), out)
            });
        }
        self.take(step, out);
    }

    fn usage_chunk(&mut self, usage: Usage, out: &mut Vec<u8>) {
        let (stop_reason, stop_sequence) = self.reasons();
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        send(out, &json!({"type": "message_delta", "delta": delta, "usage": Tokens::from(usage)}));
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        send(out, &json!({"type": "message_stop"}));
    }

    fn failed(&mut self, error: &Error, out: &mut Vec<u8>) {
        named_event(out, "error", |out| write_error(error, None, out));
    }

    fn collect(&mut self, _choice: usize, step: &Step) {
        self.take(step, &mut Vec::new());
    }

    fn answer(&mut self, usage: Usage) -> Vec<u8> {
        let mut out = Vec::new();
        write_json(&self.message(usage), &mut out);
        out
    }
}
