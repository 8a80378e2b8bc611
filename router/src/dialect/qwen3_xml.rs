//! Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`.
//!
//! Values are plain text; the tool's schema says what they mean. Arguments become JSON one at a time.

use super::{Parser, Tools, marker::Finder, sink::Sink, tools::Tool};
use serde_json::Value;
use std::{mem, sync::Arc};

pub(super) const MARKERS: [&str; 3] = ["<tool_call>", "</tool_call>", "<function="];

/// Within a function, and within a value: where the mark that should end it is missing, the next one does.
const INSIDE: [&str; 3] = ["<parameter=", "</function>", "</tool_call>"];
const IN_VALUE: [&str; 3] = ["</parameter>", "<parameter=", "</function>"];

/// Longest name of a tool or parameter, in bytes.
const MAX_NAME: usize = 256;

#[derive(Debug)]
pub(super) struct Qwen3Xml {
    tools: Arc<Tools>,
    finder: Finder,
    state: State,
    /// The name or value being read.
    word: String,
    /// The tool being called.
    name: String,
    key: String,
    arguments: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Text,
    Name,
    Inside,
    Key,
    Value,
}

impl Qwen3Xml {
    pub(super) fn new(tools: Arc<Tools>) -> Self {
        Self {
            tools,
            finder: Finder::default(),
            state: State::Text,
            word: String::new(),
            name: String::new(),
            key: String::new(),
            arguments: 0,
        }
    }

    /// Reads what ends with `>`. Returns it when it has ended.
    fn tag(&mut self, c: char, mark: &str, out: &mut Sink) -> Option<String> {
        if c == '>' && !self.word.trim().is_empty() {
            return Some(mem::take(&mut self.word).trim().to_owned());
        }
        self.word.push(c);
        if self.word.len() > MAX_NAME || matches!(c, '>' | '<' | '\n') {
            // No such tag.
            self.state = State::Text;
            out.texts(mark);
            out.texts(&mem::take(&mut self.word));
        }
        None
    }

    fn argument(&mut self, out: &mut Sink) {
        let text = mem::take(&mut self.word);
        let text = text.strip_prefix('\n').unwrap_or(&text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let value = self.tools.get(&self.name).map_or_else(|| text.into(), |tool| typed(tool, &self.key, text));
        let comma = if self.arguments > 0 { ", " } else { "" };
        out.arguments(&format!("{comma}{}: {value}", Value::from(mem::take(&mut self.key))));
        self.arguments += 1;
    }

    fn end(&mut self, out: &mut Sink) {
        out.arguments("}");
        out.part();
        self.state = State::Text;
    }
}

/// A value as the tool's schema has it, or as text where it does not fit.
fn typed(tool: &Tool, key: &str, text: &str) -> Value {
    let types = tool.types(key);
    if types.is_empty() || types.contains(&"string") {
        // `null` where there may be none; otherwise text is text.
        let none = types.contains(&"null") && text == "null";
        return if none { Value::Null } else { text.into() };
    }
    let read = serde_json::from_str(text.trim()).ok().or_else(|| super::literal::value(text));
    read.unwrap_or_else(|| text.into())
}

impl Parser for Qwen3Xml {
    fn read(&mut self, c: char, out: &mut Sink) {
        match self.state {
            State::Text => match self.finder.read(c, &MARKERS, |c| out.text(c)) {
                Some(2) => self.state = State::Name,
                Some(_) => out.part(),
                None => {}
            },
            State::Name => {
                if let Some(name) = self.tag(c, MARKERS[2], out) {
                    out.call(&name);
                    out.arguments("{");
                    (self.name, self.arguments, self.state) = (name, 0, State::Inside);
                }
            }
            State::Inside => match self.finder.read(c, &INSIDE, |_| {}) {
                Some(0) => self.state = State::Key,
                Some(_) => self.end(out),
                None => {}
            },
            State::Key => {
                if let Some(key) = self.tag(c, INSIDE[0], out) {
                    self.key = key;
                    self.state = State::Value;
                }
            }
            State::Value => match self.finder.read(c, &IN_VALUE, |c| self.word.push(c)) {
                None => {}
                Some(found) => {
                    self.argument(out);
                    match found {
                        0 => self.state = State::Inside,
                        1 => self.state = State::Key,
                        _ => self.end(out),
                    }
                }
            },
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        match self.state {
            State::Text => self.finder.finish(|c| out.text(c)),
            State::Name => {
                out.texts(MARKERS[2]);
                out.texts(&mem::take(&mut self.word));
            }
            // A call that has begun stays open: half of it must not look like the whole.
            State::Inside | State::Key | State::Value => {}
        }
    }
}
