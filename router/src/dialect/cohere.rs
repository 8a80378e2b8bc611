//! Cohere: `<|START_ACTION|>[{"tool_call_id": "0", "tool_name": …, "parameters": {…}}]<|END_ACTION|>`, and with Command R
//! `Action: ` and the same list in a fence of JSON.

use super::{
    Parser,
    calls::{self, Calls, Progress},
    marker::Finder,
    sink::Sink,
};

pub(super) const MARKERS: [&str; 7] = [
    "<|START_ACTION|>",
    "Action: ```json",
    "<|END_ACTION|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN_TOKEN|>",
    FENCE,
];
/// Ends a fence, and is text where none is open.
const FENCE: &str = "```";
/// As many of the markers are followed by calls.
const BEFORE_CALLS: usize = 2;

#[derive(Debug, Default)]
pub(super) struct Cohere {
    finder: Finder,
    calls: Option<Calls>,
    /// Whether a fence is still open.
    fenced: bool,
}

impl Parser for Cohere {
    fn read(&mut self, c: char, out: &mut Sink) {
        if let Some(calls) = &mut self.calls {
            match calls.read(c, |_| true, out) {
                Progress::More => return,
                Progress::Done => out.part(),
                Progress::Text(text) => {
                    self.fenced = false;
                    out.texts(&text);
                }
            }
            self.calls = None;
            return;
        }
        let markers = &MARKERS[..MARKERS.len() - usize::from(!self.fenced)];
        match self.finder.read(c, markers, |c| out.text(c)) {
            Some(found) if found < BEFORE_CALLS => {
                self.fenced = found == 1;
                self.calls = Some(Calls::default());
            }
            Some(_) => {
                self.fenced = false;
                out.part();
            }
            None => {}
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        calls::finish(self.calls.take(), &mut self.finder, out);
    }
}
