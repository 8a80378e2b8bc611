//! `tools`, `tool_choice` and `parallel_tool_calls`.

use super::{
    constraint::Constraint,
    fields::{Fields, shown, wrong},
};
use crate::{
    dialect::{Dialect, Tool, Tools, Use, any_arguments},
    error::Error,
};
use grammar::Spec;
use serde_json::Value;
use std::sync::Arc;

/// What a request says about tools.
#[derive(Debug, Default)]
pub(crate) struct ToolFields {
    /// As the template shows them to the model; empty = none.
    pub(crate) told: Vec<Value>,
    pub(crate) choice: Use,
    pub(crate) one_call: bool,
    /// What a forced call must fit.
    pub(crate) constraint: Option<Constraint>,
}

impl ToolFields {
    /// Takes the fields.
    pub(crate) fn take(fields: &mut Fields, dialect: &Dialect) -> Result<Self, Error> {
        let told = fields.list("tools")?;
        if told.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::invalid("tools", "must not be an empty list; leave it out instead"));
        }
        let told = told.unwrap_or_default();
        let tools = told.iter().enumerate().map(|(index, tool)| self::tool(index, tool));
        let tools = Arc::new(Tools(tools.collect::<Result<_, _>>()?));
        let one_call = !fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let choice = fields.take("tool_choice");
        if choice.as_ref().is_none_or(|choice| choice == "none") && (told.is_empty() || choice.is_some()) {
            return Ok(Self::default());
        }
        if told.is_empty() {
            return Err(Error::invalid("tool_choice", "only allowed when tools are given"));
        }
        let (choice, schema) = match choice {
            None => (auto(dialect, &tools)?, None),
            Some(Value::String(choice)) if choice == "auto" => (auto(dialect, &tools)?, None),
            Some(Value::String(choice)) if choice == "required" => (Use::Required, Some(tools.calls_schema(one_call))),
            Some(choice) => {
                let tool = named(&choice, &tools)?;
                (Use::Named(tool.name.clone()), Some(tool.parameters.clone()))
            }
        };
        let constraint = schema.map(|schema| Constraint { field: "tools", spec: Arc::new(Spec::json_schema(&schema)) });
        Ok(Self { told, choice, one_call, constraint })
    }
}

fn auto(dialect: &Dialect, tools: &Arc<Tools>) -> Result<Use, Error> {
    let problem = "\"auto\" needs to know how this model calls tools, and its chat template does not show it; start the router with \
                   --tool-call-parser, or choose \"none\", \"required\" or a function";
    let format = dialect.tools.ok_or_else(|| Error::invalid("tool_choice", problem))?;
    Ok(Use::Auto(format, tools.clone()))
}

/// A function the client insists on: OpenAI's shape, or the same without the wrapping.
fn named<'a>(choice: &Value, tools: &'a Tools) -> Result<&'a Tool, Error> {
    let expected = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let name = choice.pointer("/function/name").or_else(|| choice.get("name")).and_then(Value::as_str);
    let name = name.ok_or_else(|| wrong("tool_choice", expected, choice))?;
    tools.get(name).ok_or_else(|| {
        let known: Vec<&str> = tools.0.iter().map(|tool| tool.name.as_str()).collect();
        let problem = format!("{name:?} is none of the tools: {}", shown(&known.into()));
        Error::invalid("tool_choice", problem)
    })
}

fn tool(index: usize, tool: &Value) -> Result<Tool, Error> {
    let field = |name: &str| format!("tools[{index}]{name}");
    let Value::Object(entries) = tool else { return Err(wrong(&field(""), "an object", tool)) };
    match entries.get("type") {
        None => {}
        Some(Value::String(kind)) if kind == "function" => {}
        Some(kind) => return Err(wrong(&field(".type"), "\"function\"", kind)),
    }
    let function = entries.get("function").unwrap_or(&Value::Null);
    if !function.is_object() {
        return Err(wrong(&field(".function"), "an object with a name", function));
    }
    let name = function.get("name").unwrap_or(&Value::Null);
    let Some(text) = name.as_str().filter(|name| !name.is_empty()) else {
        return Err(wrong(&field(".function.name"), "a name", name));
    };
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => any_arguments(),
        // Arguments are an object even where the schema forgets to say so.
        Some(Value::Object(schema)) => {
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| "object".into());
            schema.into()
        }
        Some(other) => return Err(wrong(&field(".function.parameters"), "a JSON schema", other)),
    };
    Ok(Tool { name: text.to_owned(), parameters })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::ToolFormat;
    use serde_json::json;

    fn take(body: Value) -> Result<ToolFields, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).expect("an object");
        let dialect = Dialect { tools: Some(ToolFormat::Hermes), ..Dialect::default() };
        ToolFields::take(&mut fields, &dialect).map_err(|error| error.to_string())
    }

    fn tools() -> Value {
        json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}},
               {"type": "function", "function": {"name": "g"}}])
    }

    #[test]
    fn choices_are_read() {
        assert!(matches!(take(json!({})).unwrap().choice, Use::None));
        let none = take(json!({"tools": tools(), "tool_choice": "none"})).unwrap();
        assert!(matches!(none.choice, Use::None) && none.told.is_empty());
        for auto in [json!({"tools": tools()}), json!({"tools": tools(), "tool_choice": "auto"})] {
            let auto = take(auto).unwrap();
            assert!(matches!(auto.choice, Use::Auto(ToolFormat::Hermes, _)) && auto.constraint.is_none());
            assert_eq!((auto.told.len(), auto.one_call), (2, false));
        }
        let body = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
        let required = take(body).unwrap();
        assert!(matches!(required.choice, Use::Required) && required.one_call);
        assert!(required.constraint.unwrap().spec.text.contains("\"maxItems\":1"));
        for choice in [json!({"type": "function", "function": {"name": "f"}}), json!({"type": "function", "name": "f"})]
        {
            let named = take(json!({"tools": tools(), "tool_choice": choice})).unwrap();
            assert!(matches!(named.choice, Use::Named(name) if name == "f"));
            assert_eq!(
                named.constraint.unwrap().spec.text,
                json!({"properties": {"a": {"type": "integer"}}, "type": "object"}).to_string()
            );
        }
    }

    #[test]
    fn mistakes_are_named() {
        let check = |body: Value, words: &str| {
            let error = take(body).unwrap_err();
            assert!(error.contains(words), "{error} lacks {words}");
        };
        check(json!({"tools": []}), "tools: must not be an empty list");
        check(json!({"tools": [7]}), "tools[0]: must be an object, got 7");
        check(json!({"tools": [{"type": "retrieval"}]}), "tools[0].type: must be \"function\", got \"retrieval\"");
        check(json!({"tools": [{"type": "function"}]}), "tools[0].function: must be an object with a name");
        check(json!({"tools": [{"function": {"name": ""}}]}), "tools[0].function.name: must be a name");
        check(json!({"tools": [{"function": {"name": "f", "parameters": 1}}]}), "tools[0].function.parameters");
        check(json!({"tool_choice": "required"}), "tool_choice: only allowed when tools are given");
        check(json!({"tools": tools(), "tool_choice": "maybe"}), "tool_choice: must be \"none\"");
        check(
            json!({"tools": tools(), "tool_choice": {"function": {"name": "h"}}}),
            "\"h\" is none of the tools: [\"f\",\"g\"]",
        );
        check(json!({"tools": tools(), "parallel_tool_calls": 1}), "parallel_tool_calls: must be true or false");
        let mut fields = Fields::parse(json!({"tools": tools()}).to_string().as_bytes()).unwrap();
        let error = ToolFields::take(&mut fields, &Dialect::default()).unwrap_err().to_string();
        assert!(error.contains("--tool-call-parser"), "{error}");
    }
}
