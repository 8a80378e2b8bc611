//! Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as often as there are calls.

use super::{
    Parser,
    calls::{self, Calls, Progress},
    marker::Finder,
    sink::Sink,
};

pub(super) const MARKERS: [&str; 2] = ["<tool_call>", "</tool_call>"];

#[derive(Debug, Default)]
pub(super) struct Hermes {
    finder: Finder,
    /// The call being read.
    calls: Option<Calls>,
    /// Whether a call was read and its end not seen.
    open: bool,
}

impl Parser for Hermes {
    fn read(&mut self, c: char, out: &mut Sink) {
        if let Some(calls) = &mut self.calls {
            match calls.read(c, |_| true, out) {
                Progress::More => return,
                Progress::Done => {
                    self.open = true;
                    out.part();
                }
                Progress::Text(text) => out.texts(&text),
            }
            self.calls = None;
            return;
        }
        match self.finder.read(c, &MARKERS, |c| out.text(c)) {
            Some(0) => self.calls = Some(Calls::behind(MARKERS[0].into())),
            Some(_) if std::mem::take(&mut self.open) => out.part(),
            Some(_) => out.texts(MARKERS[1]),
            None => {}
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        calls::finish(self.calls.take(), &mut self.finder, out);
    }
}
