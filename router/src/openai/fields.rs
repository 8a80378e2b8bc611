//! Fields of a request body, taken one by one, with errors that name the field and the value.
//!
//! A body is read into a plain map first: that costs a few microseconds per request (never per token), and buys messages
//! in the words of the API rather than of a parser.

use crate::error::Error;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// How much of a wrong value an error repeats.
const SHOWN_CHARS: usize = 200;

/// The fields not yet taken.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    #[cfg(test)]
    pub(crate) fn new(fields: Map<String, Value>) -> Self {
        Self(fields)
    }

    /// Gives a field a value.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_string(), value.into());
    }

    /// Reads a body. What is wrong with it is said with line and column.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(other) => {
                let message = format!("the body must be a JSON object, got {}", shown(&other));
                Err(Error::Invalid { message, param: None })
            }
            Err(error) => Err(Error::Invalid { message: format!("the body is not valid JSON: {error}"), param: None }),
        }
    }

    /// Takes a field of any type; `null` is the same as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        self.typed(name, "true or false", |value| value.as_bool())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_string))
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Error> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(name, "a list", &other)),
        }
    }

    /// Takes an integer; `3.0` is one.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Error> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        self.typed(name, &expected, |value| integer(value).filter(|n| range.contains(n)))
    }

    /// Takes a number for which `fits` holds; `expected` says so in words.
    pub(crate) fn number(
        &mut self,
        name: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, Error> {
        // What counts is what is left of it as f32: 1e-50 is 0 there.
        self.typed(name, expected, |value| value.as_f64().map(|n| n as f32).filter(|&n| fits(n.into())))
    }

    /// Refuses fields that would change the answer. `false`, `0` and empty values ask for nothing.
    pub(crate) fn refuse(&mut self, names: &[&str]) -> Result<(), Error> {
        for name in names {
            if let Some(value) = self.take(name).filter(asks_for_something) {
                return Err(Error::unsupported(name, format_args!("{name} = {}", shown(&value))));
            }
        }
        Ok(())
    }

    fn typed<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(name, expected, &value))
    }
}

fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

pub(crate) fn integer(value: &Value) -> Option<i64> {
    let exact = |n: &f64| n.fract() == 0.0 && n.abs() < 9e15;
    value.as_i64().or_else(|| value.as_f64().filter(exact).map(|n| n as i64))
}

/// The error for a value that is not what it must be.
pub(crate) fn wrong(name: &str, expected: &str, got: &Value) -> Error {
    Error::invalid(name, format_args!("must be {expected}, got {}", shown(got)))
}

/// A value as errors repeat it.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn errors_name_field_value_and_expectation() {
        let error = fields(r#"{"n": "two"}"#).integer("n", 1..=8).unwrap_err();
        assert_eq!(error.to_string(), r#"n: must be an integer from 1 to 8, got "two""#);
        assert!(fields(r#"{"n": 9}"#).integer("n", 1..=8).is_err());
        assert!(fields(r#"{"n": true}"#).integer("n", 0..=8).is_err());
        let above_zero = |json: &str| fields(json).number("p", "above 0", |p| p > 0.0);
        assert_eq!(above_zero(r#"{"p": 0.5}"#), Ok(Some(0.5)));
        assert!(above_zero(r#"{"p": 1e-50}"#).is_err());
        assert_eq!(fields(r#"{"n": 3.0}"#).integer("n", 1..=8), Ok(Some(3)));
        assert_eq!(fields(r#"{"n": null}"#).integer("n", 1..=8), Ok(None));
    }

    #[test]
    fn broken_bodies_are_located() {
        let error = Fields::parse(b"{\"a\": 1,\n \"b\": }").unwrap_err().to_string();
        assert!(error.contains("line 2 column 7"), "{error}");
        assert!(Fields::parse(b"[1]").unwrap_err().to_string().contains("must be a JSON object"));
        assert!(Fields::parse(&b"[".repeat(100_000)).is_err(), "deep nesting is an error, not a crash");
    }

    #[test]
    fn long_values_are_cut() {
        let long = format!(r#"{{"x": "{}"}}"#, "é".repeat(10_000));
        assert!(fields(&long).bool("x").unwrap_err().to_string().len() < 600);
    }

    #[test]
    fn refusing_looks_at_what_is_asked() {
        assert!(fields(r#"{"suffix": ""}"#).refuse(&["suffix"]).is_ok());
        let error = fields(r#"{"suffix": "x"}"#).refuse(&["suffix"]).unwrap_err().to_string();
        assert!(error.contains("suffix") && error.contains("not supported"), "{error}");
    }
}
