//! What `llguidance` would read otherwise than its author meant: refused, or put right, before it sees a schema.
//!
//! The crate implements most of JSON Schema and refuses keywords of the schema's draft that it does not implement. What is left to
//! do here are keywords of *other* drafts, which it takes for annotations (`dependencies` in a schema that names no draft means
//! something to its author), its own options inside a schema, which could loosen what the server promises, and a few harmless
//! annotations it refuses. And two mistakes of its 1.9: between two bounds with the same integer part it takes an exclusive whole
//! bound for an inclusive one, and dates and times may be the 29th of any February and the 60th second of any minute.

use serde_json::{Map, Value};

/// Constraints that are not implemented, in any draft. `llguidance` finds those of the schema's own draft.
const NOT_IMPLEMENTED: [&str; 5] =
    ["dependencies", "$recursiveRef", "$recursiveAnchor", "$dynamicRef", "$dynamicAnchor"];

/// Annotations that say nothing about what is valid, and that `llguidance` does not know as such.
const ANNOTATIONS: [&str; 3] = ["deprecated", "$vocabulary", "contentSchema"];

/// Values of `format` that say nothing about what is valid (OpenAPI).
const FORMATS_WITHOUT_MEANING: [&str; 2] = ["password", "binary"];

/// Longest regular expression, in bytes. The time some of them take grows with the square of their length: 0.2 s at this one.
pub(crate) const MAX_PATTERN_BYTES: usize = 8 << 10;

/// Keywords that hold a schema, or for `items` also a list of them.
const SCHEMA: [&str; 11] = [
    "items",
    "additionalItems",
    "additionalProperties",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
];
/// Keywords that hold a list of schemas.
const LIST: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
/// Keywords that hold named schemas.
const NAMED: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// Prepares `schema` and all schemas in it. Errors name the keyword and where it stands, as a JSON pointer.
pub(crate) fn prepare(schema: &mut Value) -> Result<(), String> {
    match schema {
        Value::Bool(_) => Ok(()),
        Value::Object(fields) => prepare_object(fields, "#"),
        other => Err(format!("a schema is an object or a boolean, got {}", kind(other))),
    }
}

fn prepare_any(schema: &mut Value, at: &str) -> Result<(), String> {
    // What is no schema is `llguidance`'s to refuse.
    schema.as_object_mut().map_or(Ok(()), |fields| prepare_object(fields, at))
}

fn prepare_object(fields: &mut Map<String, Value>, at: &str) -> Result<(), String> {
    for keyword in NOT_IMPLEMENTED {
        if fields.contains_key(keyword) {
            return Err(format!("{keyword} at {at} is not supported"));
        }
    }
    if fields.contains_key("x-guidance") {
        return Err(format!("x-guidance at {at}: the server's own settings hold"));
    }
    ANNOTATIONS.iter().for_each(|keyword| drop(fields.shift_remove(*keyword)));
    if fields.get("uniqueItems") == Some(&Value::Bool(false)) {
        fields.shift_remove("uniqueItems");
    }
    if fields.get("format").and_then(Value::as_str).is_some_and(|format| FORMATS_WITHOUT_MEANING.contains(&format)) {
        fields.shift_remove("format");
    }
    move_exclusive_bounds(fields);
    name_real_days(fields);
    let names = fields.get("patternProperties").and_then(Value::as_object).into_iter().flat_map(|named| named.keys());
    let patterns = fields.get("pattern").and_then(Value::as_str).into_iter().chain(names.map(String::as_str));
    if let Some(pattern) = patterns.into_iter().find(|pattern| pattern.len() > MAX_PATTERN_BYTES) {
        return Err(format!(
            "a pattern of {} bytes at {at} is longer than the {MAX_PATTERN_BYTES} allowed",
            pattern.len()
        ));
    }
    for (keyword, value) in fields.iter_mut() {
        let keyword = keyword.as_str();
        let at = || format!("{at}/{keyword}");
        match value {
            Value::Array(list) if LIST.contains(&keyword) || keyword == "items" => {
                for (index, schema) in list.iter_mut().enumerate() {
                    prepare_any(schema, &format!("{}/{index}", at()))?;
                }
            }
            Value::Object(named) if NAMED.contains(&keyword) => {
                for (name, schema) in named.iter_mut() {
                    prepare_any(schema, &format!("{}/{name}", at()))?;
                }
            }
            value if SCHEMA.contains(&keyword) => prepare_any(value, &at())?,
            _ => {}
        }
    }
    Ok(())
}

/// Writes an exclusive bound that is a whole number as an inclusive one beside it, where the other bound has the same integer part.
/// What lies between the two is lost; what is not valid stays out.
fn move_exclusive_bounds(fields: &mut Map<String, Value>) {
    let number = |name: &str| fields.get(name).and_then(Value::as_f64);
    let bound = |exclusive: &str, inclusive: &str| match fields.get(exclusive) {
        // As draft 4 has it.
        Some(Value::Bool(true)) => number(inclusive).map(|bound| (bound, true)),
        Some(Value::Number(_)) => number(exclusive).map(|bound| (bound, true)),
        _ => number(inclusive).map(|bound| (bound, false)),
    };
    let (Some(low), Some(high)) = (bound("exclusiveMinimum", "minimum"), bound("exclusiveMaximum", "maximum")) else {
        return;
    };
    // Seen from zero: a bound, and the one beyond it.
    let mixed = |near: (f64, bool), far: f64| near.1 && near.0.fract() == 0.0 && near.0.trunc() == far.trunc();
    let beside = |bound: f64, direction: f64| bound + direction * (bound.abs() * f64::EPSILON).max(1e-9);
    if low.0 >= 0.0 && mixed(low, high.0) {
        replace(fields, "exclusiveMinimum", "minimum", beside(low.0, 1.0));
    } else if high.0 <= 0.0 && mixed(high, low.0) {
        replace(fields, "exclusiveMaximum", "maximum", beside(high.0, -1.0));
    }
}

fn replace(fields: &mut Map<String, Value>, exclusive: &str, inclusive: &str, bound: f64) {
    fields.shift_remove(exclusive);
    fields.insert(inclusive.into(), bound.into());
}

/// Adds to the formats of dates and times what their expressions leave out: leap days are those of leap years, and there are no
/// leap seconds, which are valid at one moment of some days only.
fn name_real_days(fields: &mut Map<String, Value>) {
    const DAY: &str = "[0-9]{4}-(?:02-(?:[01][0-9]|2[0-8])|(?:0[13-9]|1[0-2])-[0-9]{2})";
    const LEAP_DAY: &str = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29";
    let pattern = match fields.get("format").and_then(Value::as_str) {
        Some("date") => format!("^(?:{DAY}|{LEAP_DAY})$"),
        Some("time") => "^.{6}[0-5]".into(),
        Some("date-time") => format!("^(?:{DAY}|{LEAP_DAY})[tT].{{6}}[0-5]"),
        _ => return,
    };
    let constraint = serde_json::json!({ "pattern": pattern });
    // What is no list is refused soon.
    if let Value::Array(all) = fields.entry("allOf").or_insert_with(|| Value::Array(Vec::new())) {
        all.push(constraint);
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_be_dropped_is_refused_wherever_it_stands() {
        let check = |mut schema: Value, expected: &str| assert_eq!(prepare(&mut schema).unwrap_err(), expected);
        check(json!({"dependencies": {}}), "dependencies at # is not supported");
        check(
            json!({"properties": {"a": {"items": {"anyOf": [{}, {"$dynamicRef": "#x"}]}}}}),
            "$dynamicRef at #/properties/a/items/anyOf/1 is not supported",
        );
        check(json!({"$defs": {"a": {"x-guidance": {}}}}), "x-guidance at #/$defs/a: the server's own settings hold");
        check(json!([]), "a schema is an object or a boolean, got a list");
    }

    #[test]
    fn names_and_values_are_not_keywords() {
        let mut schema =
            json!({"properties": {"dependencies": {"const": {"x-guidance": 1}}}, "enum": [{"dependencies": 1}]});
        let before = schema.clone();
        prepare(&mut schema).unwrap();
        assert_eq!(schema, before);
    }

    #[test]
    fn whole_exclusive_bounds_move_where_they_would_be_lost() {
        let check = |mut schema: Value, expected: Value| {
            prepare(&mut schema).unwrap();
            assert_eq!(schema, expected);
        };
        check(json!({"exclusiveMinimum": 2, "maximum": 2.5}), json!({"maximum": 2.5, "minimum": 2.000000001}));
        check(json!({"exclusiveMaximum": 0, "minimum": -0.5}), json!({"minimum": -0.5, "maximum": -1e-9}));
        check(
            json!({"exclusiveMinimum": true, "minimum": 1, "maximum": 1.5}),
            json!({"minimum": 1.000000001, "maximum": 1.5}),
        );
        for kept in [
            json!({"exclusiveMinimum": 2, "maximum": 3}),
            json!({"exclusiveMinimum": 2, "minimum": 1}),
            json!({"minimum": 2, "exclusiveMaximum": 2.5}),
            json!({"exclusiveMinimum": -3, "exclusiveMaximum": 7}),
            json!({"exclusiveMinimum": 0.25, "exclusiveMaximum": 0.5}),
        ] {
            check(kept.clone(), kept);
        }
    }

    #[test]
    fn annotations_go() {
        let mut schema = json!({"type": "string", "deprecated": true, "format": "password", "uniqueItems": false});
        prepare(&mut schema).unwrap();
        assert_eq!(schema, json!({"type": "string"}));
    }
}
