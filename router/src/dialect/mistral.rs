//! Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, and since its eleventh tokenizer `[TOOL_CALLS]name[ARGS]{…}` or
//! `[TOOL_CALLS]name{…}`, once for each call.

use super::{
    Parser,
    calls::{Calls, Ends, Place, Progress, is_blank},
    marker::Finder,
    sink::Sink,
};

pub(super) const MARKERS: [&str; 3] = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"];

/// Longest name of a tool, in bytes.
const MAX_NAME: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Mistral {
    finder: Finder,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// Behind the marker.
    Marked,
    Calls(Calls),
    /// A name and what stands between it and the arguments.
    Name(String),
    Arguments(Ends),
}

impl Parser for Mistral {
    fn read(&mut self, c: char, out: &mut Sink) {
        match &mut self.state {
            State::Text => {
                if let Some(0) = self.finder.read(c, &MARKERS[..1], |c| out.text(c)) {
                    self.state = State::Marked;
                }
            }
            State::Marked if is_blank(c) => {}
            State::Marked if matches!(c, '[' | '{') => {
                let mut calls = Calls::default();
                calls.read(c, |_| true, out);
                self.state = State::Calls(calls);
            }
            State::Marked => self.name(String::new(), c, out),
            State::Calls(calls) => match calls.read(c, |_| true, out) {
                Progress::More => {}
                Progress::Done => {
                    out.part();
                    self.state = State::Text;
                }
                Progress::Text(text) => self.text(&text, out),
            },
            State::Name(name) => {
                let name = std::mem::take(name);
                self.name(name, c, out);
            }
            State::Arguments(ends) => {
                let place = ends.read(c);
                out.arguments(c.encode_utf8(&mut [0; 4]));
                if place == Place::Last {
                    out.part();
                    self.state = State::Text;
                }
            }
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        match std::mem::take(&mut self.state) {
            State::Text => self.finder.finish(|c| out.text(c)),
            State::Calls(mut calls) => {
                let text = calls.finish(out);
                out.texts(&text);
            }
            State::Name(name) => out.texts(&name),
            State::Marked | State::Arguments(_) => {}
        }
    }
}

impl Mistral {
    fn name(&mut self, mut name: String, c: char, out: &mut Sink) {
        if c == '{' && !name.is_empty() {
            let end = name.find('[').unwrap_or(name.len());
            out.call(name[..end].trim());
            let mut ends = Ends::default();
            ends.read(c);
            out.arguments("{");
            self.state = State::Arguments(ends);
            return;
        }
        name.push(c);
        let known = c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '[' | ']' | ' ');
        if known && name.len() <= MAX_NAME {
            self.state = State::Name(name);
        } else {
            self.text(&name, out);
        }
    }

    fn text(&mut self, text: &str, out: &mut Sink) {
        self.state = State::Text;
        out.texts(text);
    }
}
