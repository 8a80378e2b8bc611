//! What the router promises: `router/openapi.json`. Every answer that a test [`Client`](crate::Client) gets is held against it, so the
//! description stays true of all that tests do. Its schemas of answers are those that OpenAI and Anthropic publish.

use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
};

static API: LazyLock<Value> = LazyLock::new(|| {
    let text =
        std::fs::read_to_string(crate::root().join("router/openapi.json")).expect("router/openapi.json is there");
    serde_json::from_str(&text).expect("router/openapi.json is JSON")
});

/// Compiled schemas by their text.
static SCHEMAS: LazyLock<Mutex<HashMap<String, Arc<jsonschema::Validator>>>> = LazyLock::new(Mutex::default);

/// Checks an answer.
///
/// # Panics
/// When the path is described and this answer of it is not: another status, type or shape.
pub fn check(method: &str, path: &str, status: u16, content_type: &str, body: &str) {
    let Some(operation) = operation(method, path) else { return };
    let about = format!("{method} {path} answers {status} {content_type:?}: {body}");
    let answer = &operation["responses"][status.to_string()];
    assert!(answer.is_object(), "openapi.json does not know the status: {about}");
    let Some(contents) = answer["content"].as_object() else {
        return assert!(body.is_empty(), "openapi.json has no body: {about}");
    };
    let essence = content_type.split(';').next().unwrap_or_default();
    let content = contents.get(essence).unwrap_or_else(|| panic!("openapi.json does not know the type: {about}"));
    if essence == "application/json" {
        let value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {about}"));
        hold(&content["schema"], &value, &about);
    }
}

/// Checks an event of a stream, but for `[DONE]`.
///
/// # Panics
/// As [`check`].
pub fn check_event(path: &str, data: &str) {
    let Some(operation) = operation("POST", path).filter(|_| data != "[DONE]") else { return };
    let about = format!("{path} streams {data}");
    let stream = &operation["responses"]["200"]["content"]["text/event-stream"]["schema"];
    let data_schema = &stream["properties"]["data"];
    // Beside `[DONE]` where the stream has one.
    let alternatives = data_schema["anyOf"].as_array().map(Vec::as_slice).unwrap_or_default();
    let contents = alternatives.iter().chain([data_schema]).find_map(|schema| schema.get("contentSchema"));
    let schema = contents.unwrap_or_else(|| panic!("openapi.json knows no stream: {about}"));
    let value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {about}"));
    hold(schema, &value, &about);
}

fn hold(schema: &Value, value: &Value, about: &str) {
    let validator = {
        let mut schemas = SCHEMAS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let compile = || {
            let whole = json!({"allOf": [schema], "components": API["components"]});
            Arc::new(jsonschema::draft202012::new(&whole).expect("openapi.json holds schemas"))
        };
        schemas.entry(schema.to_string()).or_insert_with(compile).clone()
    };
    let problems: Vec<String> =
        validator.iter_errors(value).map(|error| format!("{} at {}", error, error.instance_path())).collect();
    assert!(problems.is_empty(), "not as openapi.json says: {problems:?}: {about}");
}

fn operation(method: &str, path: &str) -> Option<&'static Value> {
    let path = path.split('?').next().unwrap_or_default();
    let paths = API["paths"].as_object().expect("openapi.json has paths");
    let item = paths.get(path).or_else(|| Some(paths.iter().find(|(template, _)| fits(template, path))?.1))?;
    item.get(method.to_ascii_lowercase())
}

/// Whether a path is one of a template; a name at the end may hold slashes.
fn fits(template: &str, path: &str) -> bool {
    let Some((before, rest)) = template.split_once('{') else { return false };
    let Some((_, after)) = rest.split_once('}') else { return false };
    let name = path.strip_prefix(before).and_then(|name| name.strip_suffix(after));
    name.is_some_and(|name| {
        !name.is_empty() && (after.is_empty() && before.ends_with("models/") || !name.contains('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_their_operations() {
        let id = |method: &str, path: &str| operation(method, path).and_then(|found| found["operationId"].as_str());
        assert_eq!(id("GET", "/v1/models/org/name"), Some("retrieveModel"));
        assert_eq!(id("POST", "/v1/responses/resp_1/cancel"), Some("cancelResponse"));
        assert_eq!(id("GET", "/v1/responses/resp_1"), Some("retrieveResponse"));
        assert_eq!(id("GET", "/v1/responses/resp_1/input"), None);
        assert_eq!(id("PUT", "/v1/chat/completions"), None);
    }

    #[test]
    #[should_panic(expected = "not as openapi.json says")]
    fn what_is_not_described_is_seen() {
        check("GET", "/version", 200, "application/json", r#"{"version": 5}"#);
    }
}
