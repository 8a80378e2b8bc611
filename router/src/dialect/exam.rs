//! What must hold whatever a model says, for tests and fuzzing.

use super::{reasoning::*, tools::any_arguments, *};
use serde_json::json;

pub(super) fn tools() -> Arc<Tools> {
    let weather = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
        "where": {"type": "object"}, "hot": {"type": "boolean"}}});
    Arc::new(Tools(vec![
        Tool { name: "weather".into(), parameters: weather },
        Tool { name: "f".into(), parameters: any_arguments() },
    ]))
}

pub(super) fn auto(format: ToolFormat) -> Reading {
    Reading { tools: Use::Auto(format, tools()), ..Reading::default() }
}

/// What was said, all in all: reasoning, text, and the calls' names and arguments.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) reasoning: String,
    pub(super) text: String,
    pub(super) calls: Vec<(String, String)>,
}

pub(super) fn heard(reading: &Reading, pieces: &[&str]) -> Said {
    let (mut listener, mut said) = (Listener::new(reading), Said::default());
    let mut ids = Vec::new();
    for (i, piece) in pieces.iter().enumerate() {
        let mut events = Vec::new();
        listener.hear((*piece).to_owned(), i + 1 == pieces.len(), &mut events);
        for event in events {
            match event {
                Event::Reasoning(text) => said.reasoning.push_str(&text),
                Event::Text(text) => said.text.push_str(&text),
                Event::Call { index, id, name } => {
                    assert_eq!(index, said.calls.len(), "calls are counted");
                    assert!(!ids.contains(&id), "ids differ");
                    ids.push(id);
                    said.calls.push((name, String::new()));
                }
                Event::Arguments { index, json } => {
                    assert_eq!(index + 1, said.calls.len(), "arguments follow their call");
                    said.calls[index].1.push_str(&json);
                }
            }
        }
    }
    said
}

/// Readings of all kinds.
fn readings() -> Vec<Reading> {
    let formats = [
        ToolFormat::Hermes,
        ToolFormat::Llama3Json,
        ToolFormat::Mistral,
        ToolFormat::Pythonic,
        ToolFormat::Qwen3Xml,
        ToolFormat::Cohere,
    ];
    let mut readings: Vec<Reading> = formats.into_iter().map(auto).collect();
    readings.extend(
        [Use::None, Use::Required, Use::Named("f".into())].map(|tools| Reading { tools, ..Reading::default() }),
    );
    let thinking = |(thoughts, opening)| {
        let with = move |reading: &Reading| Reading { thoughts: Some(thoughts), opening, ..reading.clone() };
        readings.iter().map(with).collect::<Vec<_>>()
    };
    let more: Vec<Reading> =
        [(&QWEN3, Opening::May), (&DEEPSEEK_R1, Opening::Thinking)].into_iter().flat_map(thinking).collect();
    readings.extend(more);
    readings
}

/// Checks that a text says the same to every reader whether it comes in these pieces or whole, and that no reader makes anything up.
pub(crate) fn examine(pieces: &[&str]) {
    let text = pieces.concat();
    for reading in readings() {
        let whole = heard(&reading, &[&text]);
        assert_eq!(heard(&reading, pieces), whole, "{reading:?}: {text:?}");
        // At most punctuation is added, a few characters for each of the text's own.
        let calls: usize = whole.calls.iter().map(|(name, json)| name.len() + json.len()).sum();
        let said = whole.reasoning.len() + whole.text.len() + calls;
        assert!(said <= 8 * text.len() + 8, "{said} bytes of {}: {reading:?}: {text:?}", text.len());
    }
}
