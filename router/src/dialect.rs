//! Dialects: how families of models write down what is not text for the user – reasoning, and calls of tools.
//!
//! A model says everything in one stream of text. A [`Listener`] takes that stream apart, as it comes, into [`Event`]s: what the model
//! thought, what it says, which tools it calls with which arguments. What it looks for is a [`Reading`], made from the request (which
//! tools, must one be called) and the model's [`Dialect`].
//!
//! Parsers read one character at a time and keep what they cannot decide yet. So the result does not depend on how the text was
//! cut into pieces, and what is kept is never more than what was said. Nothing here waits, draws or fails: text that looks
//! like a call and turns out to be none is text.

mod calls;
mod choose;
mod cohere;
#[cfg(any(fuzzing, test))]
pub(crate) mod exam;
mod forced;
mod hermes;
mod literal;
mod llama3_json;
mod marker;
mod mistral;
mod pythonic;
mod qwen3_xml;
mod reasoning;
mod sink;
#[cfg(test)]
mod tests;
mod tools;

pub(crate) use reasoning::{Opening, Span, Thoughts};
pub(crate) use tools::{Tool, Tools, any_arguments};

use crate::{
    config::{ReasoningParser, ToolCallParser},
    text::{TextModel, template::ChatTemplate, tokenizer::Tokenizer},
};
use kv_cache::TokenId;
use reasoning::Reasoning;
use sink::Sink;
use std::{fmt, sync::Arc};

/// Something that became known of a message. Pieces of one kind belong together: their concatenation is what was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// More of what the model thinks.
    Reasoning(String),
    /// More of what it says.
    Text(String),
    /// It begins to call a tool. `index` counts the calls of the message.
    Call { index: usize, id: String, name: String },
    /// More of a call's arguments: JSON, in pieces.
    Arguments { index: usize, json: String },
}

/// How the served model writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dialect {
    /// `None`: nothing is known of how it calls tools.
    pub(crate) tools: Option<ToolFormat>,
    /// `None`: it does not think aloud, as far as is known.
    pub(crate) thoughts: Option<&'static Thoughts>,
    /// Special tokens among the marks of calls and of thoughts: parsers must see them, though clients do not see special tokens.
    pub(crate) special: [Vec<TokenId>; 2],
    /// The marks of thoughts, where they are tokens of their own.
    pub(crate) thought_tokens: [Option<TokenId>; 2],
}

/// The ways to write a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolFormat {
    Hermes,
    Llama3Json,
    Mistral,
    Pythonic,
    Qwen3Xml,
    Cohere,
}

impl Dialect {
    /// Takes what the configuration says, and where it leaves that open, what the model's chat template shows.
    pub(crate) fn choose(tools: ToolCallParser, reasoning: ReasoningParser, model: &TextModel) -> Self {
        let template = model.template.as_ref().map(ChatTemplate::source).unwrap_or_default();
        let (tools, thoughts) = (choose::tools(tools, template), choose::thoughts(reasoning, template));
        let token = |mark: &str| model.tokenizer.token(mark);
        let marks = thoughts.map(|thoughts| [thoughts.start, thoughts.end]);
        let special = |marks: &[&str]| {
            let tokens = marks.iter().filter_map(|mark| token(mark));
            tokens.filter(|id| model.tokenizer.is_special(*id)).collect()
        };
        Self {
            tools,
            thoughts,
            special: [special(tool_marks(tools)), special(marks.as_ref().map_or(&[], |marks| &marks[..]))],
            thought_tokens: marks.map_or([None; 2], |marks| marks.map(token)),
        }
    }
}

fn tool_marks(format: Option<ToolFormat>) -> &'static [&'static str] {
    match format {
        None => &[],
        Some(ToolFormat::Hermes) => &hermes::MARKERS,
        Some(ToolFormat::Llama3Json) => &llama3_json::MARKERS,
        Some(ToolFormat::Mistral) => &mistral::MARKERS,
        Some(ToolFormat::Pythonic) => &pythonic::MARKERS,
        Some(ToolFormat::Qwen3Xml) => &qwen3_xml::MARKERS,
        Some(ToolFormat::Cohere) => &cohere::MARKERS,
    }
}

/// How the answer to a request is to be taken apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) tools: Use,
    pub(crate) thoughts: Option<&'static Thoughts>,
    /// Whether the prompt leaves the model thinking; known once there is a prompt.
    pub(crate) opening: Opening,
    /// Whether clients get to see what it thinks.
    pub(crate) hide_thoughts: bool,
    /// Text that is said again before the answer goes on from it.
    pub(crate) echo: String,
    /// Most tokens of thoughts.
    pub(crate) thought_budget: Option<u32>,
    /// Whether calls after the first are dropped.
    pub(crate) one_call: bool,
}

/// Tokens at the end of a prompt that may hold the marks of thoughts.
const OPENING_TOKENS: usize = 16;

impl Reading {
    /// Sees from the end of the prompt whether the model is thinking.
    pub(crate) fn open(&mut self, tokenizer: &Tokenizer, prompt: &[TokenId]) {
        if let Some(thoughts) = self.thoughts {
            let end = &prompt[prompt.len().saturating_sub(OPENING_TOKENS)..];
            self.opening = thoughts.opening(&tokenizer.decode(end, false));
        }
    }

    /// Returns the special tokens that are marks of what is read.
    pub(crate) fn marks(&self, dialect: &Dialect) -> Arc<[TokenId]> {
        let [calls, thoughts] = &dialect.special;
        let calls = calls.iter().filter(|_| matches!(self.tools, Use::Auto(..)));
        calls.chain(thoughts.iter().filter(|_| self.thoughts.is_some())).copied().collect()
    }

    /// Returns what a grammar for the answer must let come before it.
    pub(crate) fn before_answer(&self) -> Option<grammar::Thoughts> {
        let thoughts = self.thoughts.filter(|_| self.opening != Opening::Speaking)?;
        let begun = self.opening == Opening::Thinking;
        let (start, end) = (thoughts.start.to_owned(), thoughts.end.to_owned());
        Some(grammar::Thoughts { start, end, begun, budget: self.thought_budget })
    }
}

/// What a request says about tools.
#[derive(Clone, Debug, Default)]
pub(crate) enum Use {
    /// None are called.
    #[default]
    None,
    /// The model decides.
    Auto(ToolFormat, Arc<Tools>),
    /// At least one is called: a grammar makes the answer a list of calls.
    Required,
    /// This one is called: a grammar makes the answer its arguments.
    Named(String),
}

/// Reads the calls of one message out of its text.
trait Parser: Send + fmt::Debug {
    /// Goes on by one character.
    fn read(&mut self, c: char, out: &mut Sink);

    /// Gives up what is undecided: nothing more comes.
    fn finish(&mut self, out: &mut Sink);
}

/// Takes one message apart.
#[derive(Debug)]
pub(crate) struct Listener {
    reasoning: Option<Reasoning>,
    parser: Option<Box<dyn Parser>>,
    hide_thoughts: bool,
    named: bool,
    echo: String,
    sink: Sink,
}

impl Listener {
    pub(crate) fn new(reading: &Reading) -> Self {
        let (mut parser, mut short_ids): (Option<Box<dyn Parser>>, _) = (None, false);
        match &reading.tools {
            Use::None => {}
            Use::Required => parser = Some(Box::new(forced::Required::default())),
            Use::Named(name) => parser = Some(Box::new(forced::Named::new(name))),
            Use::Auto(format, tools) => {
                short_ids = *format == ToolFormat::Mistral;
                parser = Some(match format {
                    ToolFormat::Hermes => Box::new(hermes::Hermes::default()),
                    ToolFormat::Llama3Json => Box::new(llama3_json::Llama3Json::new(tools.clone())),
                    ToolFormat::Mistral => Box::new(mistral::Mistral::default()),
                    ToolFormat::Pythonic => Box::new(pythonic::Pythonic::new(tools.clone())),
                    ToolFormat::Qwen3Xml => Box::new(qwen3_xml::Qwen3Xml::new(tools.clone())),
                    ToolFormat::Cohere => Box::new(cohere::Cohere::default()),
                });
            }
        }
        Self {
            reasoning: reading.thoughts.map(|thoughts| Reasoning::new(thoughts, reading.opening)),
            parser,
            hide_thoughts: reading.hide_thoughts,
            echo: reading.echo.clone(),
            named: matches!(reading.tools, Use::Named(_)),
            sink: Sink::new(short_ids, reading.one_call),
        }
    }

    /// Takes the next piece of text, the last one if `over`, and adds to `events` what is certain now.
    pub(crate) fn hear(&mut self, text: String, over: bool, events: &mut Vec<Event>) {
        let Self { reasoning, parser, hide_thoughts, echo, sink, .. } = self;
        if !echo.is_empty() {
            events.push(Event::Text(std::mem::take(echo)));
        }
        if reasoning.is_none() && parser.is_none() {
            // The usual answer is what was said, and costs nothing.
            events.extend((!text.is_empty()).then_some(Event::Text(text)));
            return;
        }
        let mut say = |c: char, sink: &mut Sink| match parser {
            Some(parser) => parser.read(c, sink),
            None => sink.text(c),
        };
        for c in text.chars() {
            match reasoning {
                Some(reasoning) => reasoning.read(c, sink, &mut say),
                None => say(c, sink),
            }
        }
        if over {
            if let Some(reasoning) = reasoning {
                reasoning.finish(sink, &mut say);
            }
            if let Some(parser) = parser {
                parser.finish(sink);
            }
            sink.finish();
        }
        let shown = |event: &Event| !(*hide_thoughts && matches!(event, Event::Reasoning(_)));
        events.extend(sink.take().into_iter().filter(shown));
    }

    /// Says whether the model is thinking.
    pub(crate) fn is_thinking(&self) -> bool {
        self.reasoning.as_ref().is_some_and(Reasoning::is_thinking)
    }

    /// Says whether the message asks for tools to be called. A client that named the tool knows, and OpenAI does not tell it.
    pub(crate) fn calls_tools(&self) -> bool {
        !self.named && self.sink.calls() > 0
    }
}
