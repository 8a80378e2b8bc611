//! Pythonic: the whole answer is a list of calls as Python writes them, `[f(a=1, b="x"), g()]`, in Llama 4 between
//! `<|python_start|>` and `<|python_end|>`.
//!
//! A list is one of calls only if its first item begins like the call of one of the tools. Arguments become JSON one at a time.

use super::{Parser, Tools, calls::is_blank, literal, marker::Finder, sink::Sink};
use serde_json::Value;
use std::{mem, sync::Arc};

pub(super) const MARKERS: [&str; 2] = ["<|python_start|>", "<|python_end|>"];

#[derive(Debug)]
pub(super) struct Pythonic {
    tools: Arc<Tools>,
    finder: Finder,
    state: State,
    /// What has come and is text if no call follows.
    raw: String,
    /// The name or the literal being read.
    word: String,
    key: String,
    /// Open brackets, and the quote of an open string, within a literal.
    depth: usize,
    quote: Option<char>,
    escape: bool,
    arguments: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A list may begin.
    Open,
    /// A name or, if `last`, the end of the list.
    Item {
        last: bool,
    },
    Name,
    /// The name of an argument, or the end of the call.
    Key,
    Value,
    /// Behind a call.
    Behind,
    Text,
}

impl Pythonic {
    pub(super) fn new(tools: Arc<Tools>) -> Self {
        Self {
            tools,
            finder: Finder::default(),
            state: State::Open,
            raw: String::new(),
            word: String::new(),
            key: String::new(),
            depth: 0,
            quote: None,
            escape: false,
            arguments: 0,
        }
    }

    fn text(&mut self, c: char, out: &mut Sink) {
        match self.finder.read(c, &MARKERS, |c| out.text(c)) {
            Some(0) => self.state = State::Open,
            Some(_) => out.part(),
            None => {}
        }
    }

    /// It is no call, or none any more.
    fn give_up(&mut self, out: &mut Sink) {
        self.state = State::Text;
        mem::take(&mut self.raw).chars().for_each(|c| self.text(c, out));
    }

    fn name(&mut self, c: char, out: &mut Sink) {
        if is_name(c) || c == '.' {
            self.word.push(c);
        } else if c == '(' && self.tools.get(&self.word).is_some() {
            out.call(&mem::take(&mut self.word));
            out.arguments("{");
            self.raw.clear();
            self.arguments = 0;
            self.state = State::Key;
        } else {
            self.give_up(out);
        }
    }

    fn key(&mut self, c: char, out: &mut Sink) {
        match c {
            ')' if self.word.is_empty() => self.end_call(out),
            '=' if !self.word.is_empty() => {
                self.key = mem::take(&mut self.word).trim_end().to_owned();
                self.state = State::Value;
            }
            c if is_name(c) && !self.word.ends_with(' ') => self.word.push(c),
            c if is_blank(c) => {
                if !self.word.is_empty() && !self.word.ends_with(' ') {
                    self.word.push(' ');
                }
            }
            _ => self.give_up(out),
        }
    }

    fn value(&mut self, c: char, out: &mut Sink) {
        if self.depth == 0 && self.quote.is_none() && matches!(c, ',' | ')') {
            let Some(value) = literal::value(&mem::take(&mut self.word)) else { return self.give_up(out) };
            let comma = if self.arguments > 0 { ", " } else { "" };
            out.arguments(&format!("{comma}{}: {value}", Value::from(mem::take(&mut self.key))));
            self.arguments += 1;
            self.raw.clear();
            self.state = State::Key;
            if c == ')' {
                self.end_call(out);
            }
            return;
        }
        self.word.push(c);
        match (self.quote, c) {
            (Some(_), _) if self.escape => self.escape = false,
            (Some(_), '\\') => self.escape = true,
            (Some(quote), c) if c == quote => self.quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => self.quote = Some(c),
            (None, '[' | '{' | '(') => self.depth += 1,
            (None, ']' | '}' | ')') if self.depth > 0 => self.depth -= 1,
            (None, ']' | '}') => self.give_up(out),
            (None, _) => {}
        }
    }

    fn end_call(&mut self, out: &mut Sink) {
        out.arguments("}");
        out.part();
        self.raw.clear();
        self.state = State::Behind;
    }
}

impl Parser for Pythonic {
    fn read(&mut self, c: char, out: &mut Sink) {
        if self.state == State::Text {
            return self.text(c, out);
        }
        self.raw.push(c);
        match self.state {
            State::Open | State::Item { .. } | State::Behind if is_blank(c) => {}
            State::Open if c == '[' => self.state = State::Item { last: false },
            State::Item { last: true } if c == ']' => self.end_list(out),
            State::Item { .. } if is_name(c) => {
                self.word = c.into();
                self.state = State::Name;
            }
            State::Name => self.name(c, out),
            State::Key => self.key(c, out),
            State::Value => self.value(c, out),
            State::Behind if c == ',' => self.state = State::Item { last: true },
            State::Behind if c == ']' => self.end_list(out),
            _ => self.give_up(out),
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        // A call that has begun stays open: half of it must not look like the whole.
        if matches!(self.state, State::Open | State::Item { .. } | State::Name) {
            self.give_up(out);
        }
        self.finder.finish(|c| out.text(c));
    }
}

impl Pythonic {
    fn end_list(&mut self, out: &mut Sink) {
        self.raw.clear();
        out.part();
        self.state = State::Text;
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-')
}
