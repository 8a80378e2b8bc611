//! What a request asks for, as text.

use crate::{Error, ebnf};
use serde_json::Value;

/// A grammar as text. Equal specs are the same grammar.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// How to read `text`.
    pub kind: Kind,
    /// The grammar.
    pub text: String,
    /// A regular expression for what may stand between the parts of JSON; empty = nothing, `None` = the default, up to
    /// [`Spec::DEFAULT_WHITESPACE`]. Means nothing to the other kinds.
    pub whitespace: Option<String>,
    /// What may come before the output that must fit.
    pub thoughts: Option<Thoughts>,
}

/// Reasoning before an answer, between two marks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Thoughts {
    /// The mark it begins with.
    pub start: String,
    /// The mark it ends with.
    pub end: String,
    /// Whether it has begun before the output does; otherwise the output may begin with it, or not.
    pub begun: bool,
    /// Most tokens it may take; then it must end.
    pub budget: Option<u32>,
}

/// The languages grammars are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A JSON schema (draft 2020-12 unless `$schema` says otherwise): the output is JSON that it validates.
    JsonSchema,
    /// A regular expression in the syntax of Rust's `regex`: it matches the output as a whole.
    Regex,
    /// A grammar in llguidance's Lark dialect; the rule `start` matches the output.
    Lark,
    /// A JSON list of strings: the output is one of them.
    Choice,
}

impl Spec {
    /// Whitespace between the parts of JSON where the request says nothing. Bounded: a model that has lost its way likes to
    /// go on with blanks for ever, and unlike in a string there is no other rule that stops it.
    pub const DEFAULT_WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";

    /// JSON that `schema` validates.
    pub fn json_schema(schema: &Value) -> Self {
        Self { kind: Kind::JsonSchema, text: schema.to_string(), whitespace: None, thoughts: None }
    }

    /// Any JSON object.
    pub fn json_object() -> Self {
        Self { kind: Kind::JsonSchema, text: r#"{"type":"object"}"#.into(), whitespace: None, thoughts: None }
    }

    /// Output that `pattern` matches from its beginning to its end.
    pub fn regex(pattern: &str) -> Self {
        Self { kind: Kind::Regex, text: pattern.into(), whitespace: None, thoughts: None }
    }

    /// A grammar in Lark, or in EBNF of the GBNF kind (`root ::= …`), which is translated.
    ///
    /// # Errors
    /// [`Error::Invalid`] says where the EBNF cannot be read.
    pub fn grammar(text: &str) -> Result<Self, Error> {
        let text = if ebnf::is_ebnf(text) { ebnf::to_lark(text).map_err(Error::Invalid)? } else { text.into() };
        Ok(Self { kind: Kind::Lark, text, whitespace: None, thoughts: None })
    }

    /// Any output: for the sake of what else a spec says.
    pub fn anything() -> Self {
        Self { kind: Kind::Lark, text: "start: <[*]>*".into(), whitespace: None, thoughts: None }
    }

    /// One of `choices`, to the letter.
    pub fn choice<S: AsRef<str>>(choices: &[S]) -> Self {
        let choices: Vec<&str> = choices.iter().map(AsRef::as_ref).collect();
        Self { kind: Kind::Choice, text: Value::from(choices).to_string(), whitespace: None, thoughts: None }
    }
}
