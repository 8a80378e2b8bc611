//! Cohere: `<|START_ACTION|>[{"tool_call_id": "0", "tool_name": …, "parameters": {…}}]<|END_ACTION|>`, and with Command R
//! `Action: ` and the same list in a fence of JSON.

use super::{
    Parser,
    calls::{Calls, Progress},
    marker::Finder,
    sink::Sink,
};

pub(super) const MARKERS: [&str; 6] = [
    "<|START_ACTION|>",
    "Action: ```json",
    "<|END_ACTION|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN_TOKEN|>",
];
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
        let mut markers = MARKERS.to_vec();
        markers.extend(self.fenced.then_some("```"));
        match self.finder.read(c, &markers, |c| out.text(c)) {
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
        match self.calls.take() {
            Some(mut calls) => {
                let text = calls.finish(out);
                out.texts(&text);
            }
            None => self.finder.finish(|c| out.text(c)),
        }
    }
}
