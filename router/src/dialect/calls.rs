//! Calls as JSON: an object with the tool's name and its arguments, or a list of such objects.
//!
//! The name begins the call, and the arguments go on as the model writes them. Where the arguments come first they wait
//! for the name. Only as much of JSON is understood as finding the ends of values takes; whether arguments fit a tool is the client's to
//! check, as with OpenAI.

use super::{marker::Finder, sink::Sink};
use serde_json::{Map, Value};
use std::mem;

const NAMES: [&str; 2] = ["name", "tool_name"];
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];

/// Reads one object or one list of objects.
#[derive(Debug, Default)]
pub(super) struct Calls {
    state: State,
    list: bool,
    object: Object,
    /// What has come since the last call began or ended: text, if it is not to be one.
    raw: String,
}

#[derive(Debug, Default)]
enum State {
    /// An object or a list must begin.
    #[default]
    Start,
    /// Within a list an object must begin; `first`: or the list end.
    Item { first: bool },
    /// Within an object.
    Object,
    /// Behind an object of a list.
    Behind,
}

/// How far a reader got by a character.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    /// What was read ended with the character.
    Done,
    /// It is no call. This has not become part of one.
    Text(String),
}

impl Calls {
    /// Begins behind `raw`, which is text if no call follows.
    pub(super) fn behind(raw: String) -> Self {
        Self { raw, ..Self::default() }
    }

    /// Goes on by `c`. `known` says whether a name is one of a tool.
    pub(super) fn read(&mut self, c: char, known: impl Fn(&str) -> bool, out: &mut Sink) -> Progress {
        self.raw.push(c);
        let blank = is_blank(c);
        match (&self.state, c) {
            (State::Start | State::Item { .. } | State::Behind, _) if blank => {}
            (State::Start, '[') => (self.list, self.state) = (true, State::Item { first: true }),
            (State::Start | State::Item { .. }, '{') => {
                self.object = Object::default();
                self.state = State::Object;
            }
            (State::Object, c) => match self.object.read(c, known, out) {
                Step::More => {}
                // What began a call is no text any more.
                Step::Began => self.raw.clear(),
                Step::Wrong => return self.text(),
                Step::End => {
                    self.raw.clear();
                    if !self.list {
                        return Progress::Done;
                    }
                    self.state = State::Behind;
                }
            },
            (State::Item { first: true } | State::Behind, ']') => return Progress::Done,
            (State::Behind, ',') => self.state = State::Item { first: false },
            _ => return self.text(),
        }
        if self.object.has_begun() {
            self.raw.clear();
        }
        Progress::More
    }

    fn text(&mut self) -> Progress {
        Progress::Text(mem::take(&mut self.raw))
    }

    /// Nothing more comes: returns what is text after all.
    pub(super) fn finish(&mut self, out: &mut Sink) -> String {
        self.object.finish(out);
        mem::take(&mut self.raw)
    }
}

/// Nothing more comes: what is undecided of the `calls` being read, or else of a marker, is text after all.
pub(super) fn finish(calls: Option<Calls>, finder: &mut Finder, out: &mut Sink) {
    match calls {
        Some(mut calls) => {
            let text = calls.finish(out);
            out.texts(&text);
        }
        None => finder.finish(|c| out.text(c)),
    }
}

/// Blanks as JSON has them.
pub(super) fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// One call.
#[derive(Debug, Default)]
struct Object {
    at: At,
    key: String,
    value: Ends,
    /// The value being read, where it must be seen as a whole.
    held: String,
    began: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    /// Whether arguments were given.
    given: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    /// A key, or at the beginning the end of the object.
    #[default]
    First,
    Key,
    InKey,
    Colon,
    Value,
    InName,
    /// Arguments that are shown as they come.
    InArguments,
    /// Arguments that wait: for the name, or to be taken out of a string.
    InHeld,
    InOther,
    Behind,
}

enum Step {
    More,
    Began,
    End,
    Wrong,
}

impl Object {
    fn has_begun(&self) -> bool {
        self.began
    }

    fn read(&mut self, c: char, known: impl Fn(&str) -> bool, out: &mut Sink) -> Step {
        match self.at {
            At::First | At::Key | At::Colon | At::Value | At::Behind if is_blank(c) => Step::More,
            At::First if c == '}' => Step::Wrong,
            At::First | At::Key if c == '"' => {
                self.key.clear();
                self.value = Ends::default();
                self.value.read(c);
                self.key.push(c);
                self.at = At::InKey;
                Step::More
            }
            At::InKey => {
                self.key.push(c);
                if self.value.read(c) == Place::Last {
                    self.key = serde_json::from_str(&self.key).unwrap_or_default();
                    self.at = At::Colon;
                }
                Step::More
            }
            At::Colon if c == ':' => {
                self.at = At::Value;
                Step::More
            }
            At::Value => self.begin_value(c, known, out),
            At::InName | At::InArguments | At::InHeld | At::InOther => self.value(c, known, out),
            At::Behind => self.behind(c, out),
            _ => Step::Wrong,
        }
    }

    fn behind(&mut self, c: char, out: &mut Sink) -> Step {
        match c {
            ',' => {
                self.at = At::Key;
                Step::More
            }
            '}' => self.end(out),
            _ => Step::Wrong,
        }
    }

    fn begin_value(&mut self, c: char, known: impl Fn(&str) -> bool, out: &mut Sink) -> Step {
        let key = self.key.as_str();
        self.at = if NAMES.contains(&key) && !self.began {
            if c != '"' {
                return Step::Wrong;
            }
            At::InName
        } else if ARGUMENTS.contains(&key) && !self.given {
            self.given = true;
            if self.began && c == '{' { At::InArguments } else { At::InHeld }
        } else {
            At::InOther
        };
        self.held.clear();
        self.value = Ends::default();
        self.value(c, known, out)
    }

    fn value(&mut self, c: char, known: impl Fn(&str) -> bool, out: &mut Sink) -> Step {
        let place = self.value.read(c);
        if place == Place::Wrong {
            return Step::Wrong;
        }
        if place != Place::Beyond {
            match self.at {
                At::InArguments => out.arguments(c.encode_utf8(&mut [0; 4])),
                At::InName | At::InHeld => self.held.push(c),
                _ => {}
            }
        }
        if place == Place::Within {
            return Step::More;
        }
        let ended = mem::replace(&mut self.at, At::Behind);
        let step = match ended {
            At::InName => self.name(known, out),
            At::InHeld => {
                let arguments = object_in(mem::take(&mut self.held));
                if self.began {
                    out.arguments(&arguments);
                } else {
                    self.early = Some(arguments);
                }
                Step::More
            }
            _ => Step::More,
        };
        match place {
            // The character behind a number belongs to the object.
            Place::Beyond if !is_blank(c) => self.behind(c, out),
            _ => step,
        }
    }

    fn name(&mut self, known: impl Fn(&str) -> bool, out: &mut Sink) -> Step {
        let name: String = serde_json::from_str(&self.held).unwrap_or_default();
        if name.is_empty() || !known(&name) {
            return Step::Wrong;
        }
        out.call(&name);
        self.began = true;
        if let Some(early) = self.early.take() {
            out.arguments(&early);
        }
        Step::Began
    }

    fn end(&mut self, out: &mut Sink) -> Step {
        if !self.began {
            return Step::Wrong;
        }
        if !self.given {
            out.arguments("{}");
        }
        // The next one starts anew.
        *self = Self::default();
        Step::End
    }

    fn finish(&mut self, out: &mut Sink) {
        if self.began && self.at == At::InHeld {
            out.arguments(&self.held);
        }
    }
}

/// Some models write arguments as a string that holds the object, and none as `null`.
fn object_in(raw: String) -> String {
    let inner = match serde_json::from_str(&raw) {
        Ok(Value::String(inner)) => inner,
        Ok(Value::Null) => return "{}".into(),
        _ => return raw,
    };
    if serde_json::from_str::<Map<String, Value>>(&inner).is_ok() { inner } else { raw }
}

/// Finds the end of one JSON value.
#[derive(Debug, Default)]
pub(super) struct Ends {
    depth: usize,
    string: bool,
    escape: bool,
    scalar: bool,
}

/// Where a character stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Within,
    /// It is the value's last.
    Last,
    /// It is behind the value.
    Beyond,
    /// No value has it there.
    Wrong,
}

impl Ends {
    /// Goes on by `c`; the first one must not be a blank.
    pub(super) fn read(&mut self, c: char) -> Place {
        if self.string {
            match c {
                _ if self.escape => self.escape = false,
                '\\' => self.escape = true,
                '"' => {
                    self.string = false;
                    return self.closed();
                }
                _ => {}
            }
            return Place::Within;
        }
        if self.scalar {
            let goes_on = c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
            return if goes_on { Place::Within } else { Place::Beyond };
        }
        match c {
            '"' => self.string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                return self.closed();
            }
            _ if self.depth > 0 => {}
            c if c.is_ascii_alphanumeric() || c == '-' => self.scalar = true,
            _ => return Place::Wrong,
        }
        Place::Within
    }

    fn closed(&self) -> Place {
        if self.depth == 0 { Place::Last } else { Place::Within }
    }
}
