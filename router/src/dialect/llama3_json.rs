//! Llama 3.1 and 3.2: the whole answer is `{"name": …, "parameters": {…}}`, several joined by semicolons, perhaps behind
//! `<|python_tag|>`.
//!
//! An answer in JSON looks much the same, so an object is a call only if it begins the answer or follows the tag, and names one of the tools.

use super::{
    Parser, Tools,
    calls::{Calls, Progress, is_blank},
    marker::Finder,
    sink::Sink,
};
use std::sync::Arc;

pub(super) const MARKERS: [&str; 1] = ["<|python_tag|>"];

#[derive(Debug)]
pub(super) struct Llama3Json {
    tools: Arc<Tools>,
    finder: Finder,
    state: State,
}

#[derive(Debug)]
enum State {
    /// A call may begin; what came, blanks and a semicolon, is text if it does not.
    Open(String),
    Calls(Calls),
    Text,
}

impl Llama3Json {
    pub(super) fn new(tools: Arc<Tools>) -> Self {
        Self { tools, finder: Finder::default(), state: State::Open(String::new()) }
    }

    fn text(&mut self, c: char, out: &mut Sink) {
        if self.finder.read(c, &MARKERS, |c| out.text(c)).is_some() {
            self.state = State::Open(String::new());
        }
    }
}

impl Parser for Llama3Json {
    fn read(&mut self, c: char, out: &mut Sink) {
        match &mut self.state {
            State::Text => self.text(c, out),
            State::Open(raw) if is_blank(c) || (c == ';' && !raw.contains(';')) => raw.push(c),
            State::Open(raw) if c == '{' => {
                // What separates calls is dropped with the first that follows.
                let mut calls = Calls::behind(std::mem::take(raw));
                calls.read(c, |_| true, out);
                self.state = State::Calls(calls);
            }
            State::Open(raw) => {
                let raw = std::mem::take(raw);
                self.state = State::Text;
                raw.chars().chain([c]).for_each(|c| self.text(c, out));
            }
            State::Calls(calls) => match calls.read(c, |name| self.tools.get(name).is_some(), out) {
                Progress::More => {}
                Progress::Done => {
                    out.part();
                    self.state = State::Open(String::new());
                }
                Progress::Text(text) => {
                    self.state = State::Text;
                    text.chars().for_each(|c| self.text(c, out));
                }
            },
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        match &mut self.state {
            State::Text => self.finder.finish(|c| out.text(c)),
            State::Open(raw) => out.texts(raw),
            State::Calls(calls) => {
                let text = calls.finish(out);
                out.texts(&text);
            }
        }
    }
}
