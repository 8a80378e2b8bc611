//! Reasoning: what a model thinks before it speaks, between two marks.

use super::{marker::Finder, sink::Sink};

/// How a family marks its thoughts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Thoughts {
    pub(crate) start: &'static str,
    pub(crate) end: &'static str,
    /// Whether an answer begins with thoughts even where neither prompt nor model wrote the first mark.
    pub(crate) at_once: bool,
}

pub(super) const DEEPSEEK_R1: Thoughts = Thoughts { start: "<think>", end: "</think>", at_once: true };
pub(super) const QWEN3: Thoughts = Thoughts { start: "<think>", end: "</think>", at_once: false };
pub(super) const MISTRAL: Thoughts = Thoughts { start: "[THINK]", end: "[/THINK]", at_once: false };
pub(super) const COHERE: Thoughts = Thoughts { start: "<|START_THINKING|>", end: "<|END_THINKING|>", at_once: false };

/// Where an answer stands at its first token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Opening {
    /// The model may begin to think.
    #[default]
    May,
    /// It is thinking already.
    Thinking,
    /// It thinks no more.
    Speaking,
}

impl Thoughts {
    /// Looks at the end of a prompt: templates write one mark to make a model think, and both to keep it from it.
    pub(crate) fn opening(&self, prompt: &str) -> Opening {
        let prompt = prompt.trim_end();
        if prompt.ends_with(self.end) {
            Opening::Speaking
        } else if prompt.ends_with(self.start) || self.at_once {
            Opening::Thinking
        } else {
            Opening::May
        }
    }
}

/// Tells the thoughts of one message from the rest.
#[derive(Debug)]
pub(super) struct Reasoning {
    thoughts: &'static Thoughts,
    state: State,
    finder: Finder,
}

#[derive(Debug)]
enum State {
    /// Only blanks have come; the first mark may follow.
    Before {
        blanks: String,
        thinking: bool,
    },
    Thinking,
    Speaking,
}

impl Reasoning {
    pub(super) fn new(thoughts: &'static Thoughts, opening: Opening) -> Self {
        let before = |thinking| State::Before { blanks: String::new(), thinking };
        let state = match opening {
            Opening::May => before(false),
            Opening::Thinking => before(true),
            Opening::Speaking => State::Speaking,
        };
        Self { thoughts, state, finder: Finder::default() }
    }

    /// Goes on by `c`: thoughts go to `sink`, all else to `say`.
    pub(super) fn read(&mut self, c: char, sink: &mut Sink, say: &mut impl FnMut(char, &mut Sink)) {
        let Thoughts { start, end, .. } = *self.thoughts;
        match &mut self.state {
            State::Speaking => say(c, sink),
            State::Thinking => {
                if self.finder.read(c, &[end], |c| sink.reasoning(c)).is_some() {
                    sink.part();
                    self.state = State::Speaking;
                }
            }
            State::Before { blanks, .. } if c.is_whitespace() && self.finder.is_empty() => blanks.push(c),
            State::Before { thinking, .. } => {
                let mut other = String::new();
                // A model that thinks already may say at once that it does no more.
                let markers = if *thinking { &[start, end][..] } else { &[start] };
                match self.finder.read(c, markers, |c| other.push(c)) {
                    Some(0) => self.think(sink),
                    Some(_) => {
                        sink.part();
                        self.state = State::Speaking;
                    }
                    None if other.is_empty() => {}
                    None => {
                        self.finder.finish(|c| other.push(c));
                        self.begin(&other, sink, say);
                    }
                }
            }
        }
    }

    pub(super) fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thinking | State::Before { thinking: true, .. })
    }

    fn think(&mut self, sink: &mut Sink) {
        sink.part();
        self.state = State::Thinking;
    }

    /// What came first was no mark.
    fn begin(&mut self, text: &str, sink: &mut Sink, say: &mut impl FnMut(char, &mut Sink)) {
        let State::Before { blanks, thinking } = std::mem::replace(&mut self.state, State::Speaking) else { return };
        if thinking {
            self.think(sink);
            text.chars().for_each(|c| self.read(c, sink, say));
        } else {
            blanks.chars().chain(text.chars()).for_each(|c| say(c, sink));
        }
    }

    /// Nothing more comes.
    pub(super) fn finish(&mut self, sink: &mut Sink, say: &mut impl FnMut(char, &mut Sink)) {
        let mut held = String::new();
        self.finder.finish(|c| held.push(c));
        match self.state {
            State::Before { .. } => {
                self.begin(&held, sink, say);
                self.finder.finish(|c| sink.reasoning(c));
            }
            _ => held.chars().for_each(|c| sink.reasoning(c)),
        }
        if matches!(self.state, State::Thinking) {
            sink.part();
        }
    }
}

/// Which tokens of an answer are thoughts, where both marks are tokens of their own.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    start: Option<u32>,
    end: Option<u32>,
    thinking: bool,
    /// A model thinks once.
    over: bool,
}

impl Span {
    /// `start` and `end` are the marks' tokens, where they are single tokens.
    pub(crate) fn new(start: Option<u32>, end: Option<u32>, opening: Opening) -> Self {
        Self { start, end, thinking: opening == Opening::Thinking, over: opening == Opening::Speaking }
    }

    /// Says whether the next token is a thought. The marks are none.
    pub(crate) fn covers(&mut self, token: u32) -> bool {
        if Some(token) == self.start && !self.over {
            self.thinking = true;
            return false;
        }
        if Some(token) == self.end {
            (self.thinking, self.over) = (false, true);
        }
        self.thinking
    }
}
