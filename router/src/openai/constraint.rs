//! What an answer must fit: `response_format`, vLLM's `structured_outputs`, and the `guided_*` fields of its earlier versions.
//!
//! They are read here and compiled once before anything is placed, so that what cannot be compiled is refused with the field's
//! name. Workers compile it again, each for itself.

use super::fields::{Fields, shown, wrong};
use crate::{error::Error, request::Router};
use grammar::Spec;
use serde_json::Value;
use std::sync::Arc;
use tokio::{sync::oneshot, time::timeout};

/// A grammar, and the field it came from.
#[derive(Clone, Debug)]
pub(crate) struct Constraint {
    pub(crate) field: &'static str,
    pub(crate) spec: Arc<Spec>,
}

/// What `structured_outputs` may hold besides the constraint itself.
const OPTIONS: [&str; 4] =
    ["disable_any_whitespace", "whitespace_pattern", "disable_fallback", "disable_additional_properties"];

impl Constraint {
    /// Takes the fields; more than one constraint is a mistake.
    pub(crate) fn take(fields: &mut Fields) -> Result<Option<Self>, Error> {
        let mut found: Vec<Self> = Vec::new();
        found.extend(response_format(fields)?);
        found.extend(structured_outputs(fields)?);
        found.extend(guided(fields)?);
        if let [first, second, ..] = &found[..] {
            let problem = format!("cannot be combined with {}: an answer fits one constraint", first.field);
            return Err(Error::invalid(second.field, problem));
        }
        Ok(found.pop())
    }

    /// Compiles it, for the sake of its errors.
    pub(crate) async fn check(&self, router: &Arc<Router>) -> Result<(), Error> {
        let model = router.model.clone();
        // The first one reads the model's tokens.
        let grammars = router.text.run(move || model.grammars()).await.map_err(|error| self.error(&error))?;
        let (sender, receiver) = oneshot::channel();
        // Nobody receives when the client is gone.
        grammars.compile(Spec::clone(&self.spec), move |compiled| drop(sender.send(compiled.map(drop))));
        match timeout(grammars.patience(), receiver).await {
            Ok(Ok(compiled)) => compiled.map_err(|error| self.error(&error)),
            Ok(Err(_)) => Err(Error::Failed("the thread that compiles grammars gave up".into())),
            Err(_) => Err(self.error(&grammars.too_slow())),
        }
    }

    fn error(&self, error: &grammar::Error) -> Error {
        match error {
            grammar::Error::Busy(waiting) => Error::Overloaded { waiting: *waiting },
            error => Error::invalid(self.field, error),
        }
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Constraint>, Error> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    let spec = match format.get("type").and_then(Value::as_str) {
        Some("text") => return Ok(None),
        Some("json_object") => Spec::json_object(),
        Some("json_schema") => {
            let field = "response_format.json_schema";
            let Some(Value::Object(named)) = format.get("json_schema") else {
                return Err(Error::invalid(field, "must be an object that holds a schema"));
            };
            match (named.get("strict"), named.get("schema")) {
                (Some(strict), _) if !strict.is_boolean() && !strict.is_null() => {
                    return Err(wrong(&format!("{field}.strict"), "true or false", strict));
                }
                // It holds whether or not the client insists.
                (_, Some(schema @ (Value::Object(_) | Value::Bool(_)))) => Spec::json_schema(schema),
                (_, other) => {
                    let other = other.unwrap_or(&Value::Null);
                    return Err(wrong(&format!("{field}.schema"), "a JSON schema", other));
                }
            }
        }
        Some(kind) => return Err(Error::unsupported("response_format", format_args!("type {kind:?}"))),
        None => return Err(Error::invalid("response_format.type", "must be a string")),
    };
    Ok(Some(Constraint { field: "response_format", spec: Arc::new(spec) }))
}

fn structured_outputs(fields: &mut Fields) -> Result<Option<Constraint>, Error> {
    let field = "structured_outputs";
    let Some(mut given) = fields.object(field)? else { return Ok(None) };
    given.retain(|_, value| !value.is_null());
    let options = OPTIONS.map(|name| given.shift_remove(name));
    let [tight, pattern, _, closed] = &options;
    let flag = |name: &str, value: &Option<Value>| match value {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| wrong(&format!("{field}.{name}"), "true or false", value)),
    };
    if flag(OPTIONS[3], closed)? {
        return Err(Error::unsupported(&format!("{field}.{}", OPTIONS[3]), "adding additionalProperties to a schema"));
    }
    let whitespace = match pattern {
        _ if flag(OPTIONS[0], tight)? => Some(String::new()),
        None => None,
        Some(Value::String(pattern)) => Some(pattern.clone()),
        Some(other) => return Err(wrong(&format!("{field}.{}", OPTIONS[1]), "a string", other)),
    };
    // `json_object: false` asks for nothing.
    given.retain(|name, value| !(name == "json_object" && value == &Value::Bool(false)));
    let mut kinds = given.iter();
    let (Some((kind, value)), None) = (kinds.next(), kinds.next()) else {
        let names: Vec<&str> = given.keys().map(String::as_str).collect();
        let problem =
            format!("must hold one of json, regex, choice, grammar and json_object, got [{}]", names.join(", "));
        return Err(Error::invalid(field, problem));
    };
    let spec = Spec { whitespace, ..read(&format!("{field}.{kind}"), kind, value)? };
    Ok(Some(Constraint { field, spec: Arc::new(spec) }))
}

/// The fields that `structured_outputs` has taken the place of.
fn guided(fields: &mut Fields) -> Result<Vec<Constraint>, Error> {
    let whitespace = fields.string("guided_whitespace_pattern")?;
    // All backends are one here.
    fields.take("guided_decoding_backend");
    let mut found = Vec::new();
    for (field, kind) in [
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("guided_json_object", "json_object"),
    ] {
        if let Some(value) = fields.take(field).filter(|value| *value != Value::Bool(false)) {
            let spec = Spec { whitespace: whitespace.clone(), ..read(field, kind, &value)? };
            found.push(Constraint { field, spec: Arc::new(spec) });
        }
    }
    Ok(found)
}

/// Reads a constraint of `kind`, as vLLM names them.
fn read(field: &str, kind: &str, value: &Value) -> Result<Spec, Error> {
    match (kind, value) {
        ("json", Value::Object(_) | Value::Bool(_)) => Ok(Spec::json_schema(value)),
        // A schema that was written out already.
        ("json", Value::String(text)) => match serde_json::from_str::<Value>(text) {
            Ok(schema) => Ok(Spec::json_schema(&schema)),
            Err(error) => Err(Error::invalid(field, format_args!("not valid JSON: {error}"))),
        },
        ("json", other) => Err(wrong(field, "a JSON schema", other)),
        ("regex", Value::String(pattern)) => Ok(Spec::regex(pattern)),
        ("regex", other) => Err(wrong(field, "a string", other)),
        ("grammar", Value::String(text)) => Spec::grammar(text).map_err(|error| Error::invalid(field, error)),
        ("grammar", other) => Err(wrong(field, "a string", other)),
        ("choice", Value::Array(list)) => {
            let choices: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
            choices.map(|choices| Spec::choice(&choices)).ok_or_else(|| wrong(field, "a list of strings", value))
        }
        ("choice", other) => Err(wrong(field, "a list of strings", other)),
        ("json_object", Value::Bool(true)) => Ok(Spec::json_object()),
        ("json_object", other) => Err(wrong(field, "true or false", other)),
        (_, value) => Err(Error::unsupported(field, format_args!("{field} = {}", shown(value)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use grammar::Kind;
    use serde_json::json;

    fn take(body: Value) -> Result<Option<(&'static str, Spec)>, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).expect("an object");
        let constraint = Constraint::take(&mut fields).map_err(|error| error.to_string())?;
        Ok(constraint.map(|constraint| (constraint.field, Spec::clone(&constraint.spec))))
    }

    #[test]
    fn all_spellings_are_read() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let check = |body: Value, field: &str, kind: Kind, text: &str, whitespace: Option<&str>| {
            let (found, spec) = take(body.clone()).unwrap().unwrap_or_else(|| panic!("{body}"));
            assert_eq!(
                (found, spec.kind, &spec.text[..], spec.whitespace.as_deref()),
                (field, kind, text, whitespace),
                "{body}"
            );
        };
        let text = schema.to_string();
        let (format, outputs) = ("response_format", "structured_outputs");
        check(json!({format: {"type": "json_object"}}), format, Kind::JsonSchema, r#"{"type":"object"}"#, None);
        let named = json!({"name": "x", "strict": true, "schema": schema});
        check(json!({format: {"type": "json_schema", "json_schema": named}}), format, Kind::JsonSchema, &text, None);
        check(json!({outputs: {"json": schema, "regex": null}}), outputs, Kind::JsonSchema, &text, None);
        check(
            json!({outputs: {"json": text, "disable_any_whitespace": true}}),
            outputs,
            Kind::JsonSchema,
            &text,
            Some(""),
        );
        check(
            json!({outputs: {"json": text, "whitespace_pattern": " ?"}}),
            outputs,
            Kind::JsonSchema,
            &text,
            Some(" ?"),
        );
        check(json!({outputs: {"regex": "a+"}}), outputs, Kind::Regex, "a+", None);
        check(json!({outputs: {"choice": ["a", "b\""]}}), outputs, Kind::Choice, r#"["a","b\""]"#, None);
        check(json!({outputs: {"grammar": "root ::= \"a\""}}), outputs, Kind::Lark, "start: \"a\" \n", None);
        check(json!({outputs: {"json_object": true}}), outputs, Kind::JsonSchema, r#"{"type":"object"}"#, None);
        check(json!({"guided_regex": "a", "guided_decoding_backend": "x"}), "guided_regex", Kind::Regex, "a", None);
        check(
            json!({"guided_json": schema, "guided_whitespace_pattern": ""}),
            "guided_json",
            Kind::JsonSchema,
            &text,
            Some(""),
        );
        check(json!({"guided_choice": ["a"]}), "guided_choice", Kind::Choice, r#"["a"]"#, None);
        for nothing in
            [json!({}), json!({format: {"type": "text"}}), json!({format: null, outputs: null, "guided_json": null})]
        {
            assert_eq!(take(nothing), Ok(None));
        }
    }

    #[test]
    fn mistakes_are_named() {
        let check = |body: Value, words: &str| {
            let error = take(body).unwrap_err();
            assert!(error.contains(words), "{error} lacks {words}");
        };
        check(json!({"response_format": {}}), "response_format.type: must be a string");
        check(
            json!({"response_format": {"type": "structural_tag"}}),
            "response_format: type \"structural_tag\" is not supported",
        );
        check(json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema: must be an object");
        check(
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "json_schema.schema: must be",
        );
        check(json!({"structured_outputs": {}}), "structured_outputs: must hold one of json");
        check(json!({"structured_outputs": {"json": {}, "regex": "a"}}), "got [json, regex]");
        check(json!({"structured_outputs": {"jsn": {}}}), "structured_outputs.jsn");
        check(json!({"structured_outputs": {"structural_tag": "x"}}), "not supported");
        check(json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json: not valid JSON");
        check(json!({"structured_outputs": {"choice": [1]}}), "structured_outputs.choice: must be a list of strings");
        check(json!({"structured_outputs": {"grammar": "root ::= ["}}), "structured_outputs.grammar: line 1");
        check(json!({"structured_outputs": {"json": {}, "disable_additional_properties": true}}), "not supported");
        let both = json!({"response_format": {"type": "json_object"}, "guided_regex": "a"});
        check(both, "guided_regex: cannot be combined with response_format");
    }
}
