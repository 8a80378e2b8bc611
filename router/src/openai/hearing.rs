//! A choice being listened to: its text taken apart, and the tokens of its reasoning counted or hidden.

use crate::{
    dialect::{Dialect, Listener, Reading, Span},
    request::Step,
};

/// What is listened for in one choice.
#[derive(Debug)]
pub(crate) struct Hearing {
    listener: Listener,
    thoughts: Option<Tokens>,
}

/// Tokens of reasoning. Ids and log-probabilities run ahead of the text each in its own way, so each has its own count.
#[derive(Debug)]
struct Tokens {
    /// `None`: the marks are no tokens of their own, and tokens count by the text they came with.
    spans: Option<[Span; 2]>,
    hide: bool,
    count: u32,
}

impl Hearing {
    pub(crate) fn new(reading: &Reading, dialect: &Dialect) -> Self {
        let [start, end] = dialect.thought_tokens;
        let span = Span::new(start, end, reading.opening);
        let spans = (start.is_some() && end.is_some()).then(|| [span.clone(), span]);
        let tokens = Tokens { spans, hide: reading.hide_thoughts, count: 0 };
        Self { listener: Listener::new(reading), thoughts: reading.thoughts.map(|_| tokens) }
    }

    /// Takes the text of `step` apart.
    pub(crate) fn hear(&mut self, step: &mut Step) {
        step.events.clear();
        let thinking = self.listener.is_thinking();
        let over = step.finish.is_some();
        self.listener.hear(std::mem::take(&mut step.text), over, &mut step.events);
        step.calls_tools = over && self.listener.calls_tools();
        if let Some(thoughts) = &mut self.thoughts {
            thoughts.hear(step, thinking);
        }
    }

    /// Returns how many tokens were reasoning; `None` if the model has none.
    pub(crate) fn reasoning_tokens(&self) -> Option<u32> {
        self.thoughts.as_ref().map(|thoughts| thoughts.count)
    }
}

impl Tokens {
    fn hear(&mut self, step: &mut Step, thinking: bool) {
        let Self { spans, hide, count } = self;
        let [mut of_ids, mut of_tokens] = spans.as_mut().map_or([None, None], |[a, b]| [Some(a), Some(b)]);
        let keep = |span: &mut Option<&mut Span>, id: u32, count: &mut u32| {
            let covered = span.as_mut().map_or(thinking, |span| span.covers(id));
            *count += u32::from(covered);
            !(*hide && covered)
        };
        step.ids.retain(|id| keep(&mut of_ids, *id, count));
        step.tokens.retain(|token| keep(&mut of_tokens, token.id, &mut 0));
    }
}
