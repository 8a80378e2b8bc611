//! What parsers write to: gathers characters into events, numbers calls, and drops the blanks between the parts of a message.

use super::Event;
use std::mem;

/// Gathers what one message says.
#[derive(Debug)]
pub(super) struct Sink {
    events: Vec<Event>,
    /// Calls that have begun.
    calls: usize,
    short_ids: bool,
    one_call: bool,
    /// Blanks that belong to the text if more of it follows.
    blanks: String,
    /// Whether the next part has not begun: blanks before it are nobody's.
    between: bool,
}

impl Sink {
    /// With `short_ids`, ids of calls are Mistral's nine characters; with `one_call`, calls after the first are dropped.
    pub(super) fn new(short_ids: bool, one_call: bool) -> Self {
        Self { events: Vec::new(), calls: 0, short_ids, one_call, blanks: String::new(), between: false }
    }

    pub(super) fn text(&mut self, c: char) {
        self.write(c, |event| if let Event::Text(text) = event { Some(text) } else { None }, Event::Text);
    }

    pub(super) fn texts(&mut self, text: &str) {
        text.chars().for_each(|c| self.text(c));
    }

    pub(super) fn reasoning(&mut self, c: char) {
        self.write(c, |event| if let Event::Reasoning(text) = event { Some(text) } else { None }, Event::Reasoning);
    }

    fn write(&mut self, c: char, same: impl Fn(&mut Event) -> Option<&mut String>, new: impl Fn(String) -> Event) {
        if c.is_whitespace() {
            if !self.between {
                self.blanks.push(c);
            }
            return;
        }
        self.between = false;
        self.blanks.push(c);
        match self.events.last_mut().and_then(same) {
            Some(text) => text.push_str(&self.blanks),
            None => self.events.push(new(self.blanks.clone())),
        }
        self.blanks.clear();
    }

    /// Ends a part of the message.
    pub(super) fn part(&mut self) {
        self.blanks.clear();
        self.between = true;
    }

    /// Begins a call.
    pub(super) fn call(&mut self, name: &str) {
        self.part();
        self.calls += 1;
        if self.dropped() {
            return;
        }
        let id = if self.short_ids { short_id() } else { format!("chatcmpl-tool-{:032x}", rand::random::<u128>()) };
        self.events.push(Event::Call { index: self.calls - 1, id, name: name.to_owned() });
    }

    /// Adds to the arguments of the call that began last.
    pub(super) fn arguments(&mut self, json: &str) {
        if self.dropped() || json.is_empty() {
            return;
        }
        match self.events.last_mut() {
            Some(Event::Arguments { json: so_far, .. }) => so_far.push_str(json),
            _ => {
                let index = self.calls.saturating_sub(1);
                self.events.push(Event::Arguments { index, json: json.to_owned() });
            }
        }
    }

    fn dropped(&self) -> bool {
        self.one_call && self.calls > 1
    }

    /// Returns the number of calls that clients saw begin.
    pub(super) fn calls(&self) -> usize {
        if self.one_call { self.calls.min(1) } else { self.calls }
    }

    /// Nothing more comes: blanks at the end of a text are part of it.
    pub(super) fn finish(&mut self) {
        let blanks = mem::take(&mut self.blanks);
        match self.events.last_mut() {
            _ if blanks.is_empty() => {}
            Some(Event::Text(text)) => text.push_str(&blanks),
            _ => self.events.push(Event::Text(blanks)),
        }
    }

    pub(super) fn take(&mut self) -> Vec<Event> {
        mem::take(&mut self.events)
    }
}

/// Nine letters and digits: what Mistral's templates insist on.
fn short_id() -> String {
    const SIGNS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    (0..9).map(|_| SIGNS[rand::random_range(0..SIGNS.len())] as char).collect()
}
