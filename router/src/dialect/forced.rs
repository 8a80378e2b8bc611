//! Calls that a grammar makes: a list of `{"name": …, "parameters": {…}}`, or the arguments of the one tool that was named.

use super::{
    Parser,
    calls::{Calls, Progress, is_blank},
    sink::Sink,
};

/// At least one call.
#[derive(Debug, Default)]
pub(super) struct Required {
    calls: Calls,
    over: bool,
}

impl Parser for Required {
    fn read(&mut self, c: char, out: &mut Sink) {
        if self.over {
            return out.text(c);
        }
        match self.calls.read(c, |_| true, out) {
            Progress::More => {}
            Progress::Done => {
                self.over = true;
                out.part();
            }
            // The grammar does not let it come to this.
            Progress::Text(text) => {
                self.over = true;
                out.texts(&text);
            }
        }
    }

    fn finish(&mut self, out: &mut Sink) {
        if !self.over {
            self.calls.finish(out);
        }
    }
}

/// This call.
#[derive(Debug)]
pub(super) struct Named {
    name: String,
    began: bool,
    /// Blanks that belong to the arguments if more of them follow.
    blanks: String,
}

impl Named {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), began: false, blanks: String::new() }
    }
}

impl Parser for Named {
    fn read(&mut self, c: char, out: &mut Sink) {
        if is_blank(c) {
            if self.began {
                self.blanks.push(c);
            }
            return;
        }
        if !self.began {
            self.began = true;
            out.call(&self.name);
        }
        out.arguments(&self.blanks);
        self.blanks.clear();
        out.arguments(c.encode_utf8(&mut [0; 4]));
    }

    fn finish(&mut self, _: &mut Sink) {}
}
