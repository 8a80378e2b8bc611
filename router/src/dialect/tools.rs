//! The tools of a request.

use serde_json::{Map, Value, json};

/// A tool a model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// A JSON schema of its arguments.
    pub(crate) parameters: Value,
}

impl Tool {
    /// Returns the types that a parameter may have, as far as its schema says.
    pub(super) fn types(&self, parameter: &str) -> Vec<&str> {
        let Some(schema) = self.parameters.get("properties").and_then(|properties| properties.get(parameter)) else {
            return Vec::new();
        };
        let branches = ["anyOf", "oneOf"].into_iter().filter_map(|name| schema.get(name)?.as_array()).flatten();
        let types = branches.chain([schema]).filter_map(|schema| schema.get("type"));
        types
            .flat_map(|found| found.as_array().map_or(std::slice::from_ref(found), Vec::as_slice))
            .filter_map(Value::as_str)
            .collect()
    }
}

/// The tools of one request, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools(pub(crate) Vec<Tool>);

impl Tools {
    pub(crate) fn get(&self, name: &str) -> Option<&Tool> {
        self.0.iter().find(|tool| tool.name == name)
    }

    /// Returns the schema of a list of calls: what `tool_choice: required` makes of an answer.
    pub(crate) fn calls_schema(&self, one_call: bool) -> Value {
        let call = |(index, tool): (usize, &Tool)| {
            let mut parameters = tool.parameters.clone();
            move_references(&mut parameters, &format!("#/items/anyOf/{index}/properties/parameters"));
            json!({
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            })
        };
        let calls: Vec<Value> = self.0.iter().enumerate().map(call).collect();
        let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
        if one_call {
            schema["maxItems"] = 1.into();
        }
        schema
    }
}

/// Lets references within a schema go on when it becomes part of a larger one, at `place`.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Array(list) => list.iter_mut().for_each(|item| move_references(item, place)),
        Value::Object(fields) => fields.iter_mut().for_each(|(name, value)| match value {
            Value::String(target) if name == "$ref" && target.starts_with('#') => target.replace_range(..1, place),
            // What stands there is data.
            _ if matches!(name.as_str(), "const" | "enum" | "default" | "examples") => {}
            other => move_references(other, place),
        }),
        _ => {}
    }
}

/// The schema of a tool that names none: any object.
pub(crate) fn any_arguments() -> Value {
    let mut schema = Map::new();
    schema.insert("type".into(), "object".into());
    schema.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::TextModel;
    use grammar::Spec;
    use std::path::Path;

    #[test]
    fn references_go_on_in_the_schema_of_calls() {
        let tree = json!({"type": "object", "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
            "$defs": {"leaf": {"const": {"$ref": "#"}}}});
        let tools = Tools(vec![
            Tool { name: "a".into(), parameters: any_arguments() },
            Tool { name: "b".into(), parameters: tree },
        ]);
        let schema = tools.calls_schema(true);
        let moved = &schema["items"]["anyOf"][1]["properties"]["parameters"];
        assert_eq!(moved["properties"]["next"]["$ref"], "#/items/anyOf/1/properties/parameters");
        assert_eq!(moved["properties"]["leaf"]["$ref"], "#/items/anyOf/1/properties/parameters/$defs/leaf");
        assert_eq!(moved["$defs"]["leaf"]["const"]["$ref"], "#", "data stays");
        assert_eq!((&schema["maxItems"], &tools.calls_schema(false)["maxItems"]), (&json!(1), &Value::Null));
    }

    #[test]
    fn a_grammar_makes_calls_of_the_tools_and_nothing_else() {
        let tree = json!({"type": "object", "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
            "required": ["leaf"], "additionalProperties": false, "$defs": {"leaf": {"type": "integer"}}});
        let tools = Tools(vec![
            Tool { name: "any".into(), parameters: any_arguments() },
            Tool { name: "tree".into(), parameters: tree },
        ]);
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
        let model = TextModel::load(&dir).unwrap();
        let fits = |one_call, text: &str| {
            let spec = Spec::json_schema(&tools.calls_schema(one_call));
            let grammar = model.grammars().unwrap().compile_here(&spec).unwrap();
            let mut matcher = grammar.start(true);
            let tokens = model.tokenizer.encode(text, false).unwrap();
            matcher.replay(&tokens).is_ok() && matcher.is_complete()
        };
        let tree = r#"{"name": "tree", "parameters": {"next": {"leaf": 2}, "leaf": 1}}"#;
        assert!(fits(false, &format!("[{tree}]")));
        assert!(fits(false, &format!(r#"[{{"name": "any", "parameters": {{"x": [1]}}}}, {tree}]"#)));
        assert!(!fits(true, &format!("[{tree}, {tree}]")), "one call only");
        for wrong in [
            "[]",
            "{}",
            "Let me see",
            r#"[{"name": "none", "parameters": {}}]"#,
            r#"[{"name": "tree", "parameters": {"leaf": "x"}}]"#,
            r#"[{"name": "tree", "parameters": {"next": {}, "leaf": 1}}]"#,
            r#"[{"name": "any"}]"#,
        ] {
            assert!(!fits(false, wrong), "{wrong}");
        }
    }

    #[test]
    fn types_come_from_wherever_a_schema_says_them() {
        let tool = Tool {
            name: "f".into(),
            parameters: json!({"properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]},
                "c": {"anyOf": [{"type": "object"}, {"type": "null"}]}, "d": {}}}),
        };
        let check = |name: &str, expected: &[&str]| assert_eq!(tool.types(name), expected, "{name}");
        check("a", &["integer"]);
        check("b", &["string", "null"]);
        check("c", &["object", "null"]);
        check("d", &[]);
        check("e", &[]);
    }
}
