//! A request of the Messages API as the chat request that means the same.

use crate::{
    error::Error,
    openai::{
        chat::ChatRequest,
        fields::{Fields, wrong},
    },
    request::Router,
};
use serde_json::{Map, Value, json};

/// Chat fields that would change the shape of the answer, and that this API does not have.
const NOT_HERE: [&str; 6] = ["n", "logprobs", "top_logprobs", "prompt_logprobs", "stream_options", "return_token_ids"];

/// Fields that need what no worker has.
const UNSUPPORTED: [&str; 4] = ["mcp_servers", "container", "context_management", "kv_transfer_params"];

/// Reads and checks a body.
pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<ChatRequest, Error> {
    let max_tokens = fields.take("max_tokens").ok_or_else(|| Error::invalid("max_tokens", "is required"))?;
    fields.set("max_tokens", max_tokens);
    parse_any(fields, router)
}

/// Reads and checks a request to count tokens: the same without what limits the answer.
pub(crate) fn parse_count(fields: Fields, router: &Router) -> Result<ChatRequest, Error> {
    parse_any(fields, router)
}

fn parse_any(mut fields: Fields, router: &Router) -> Result<ChatRequest, Error> {
    translate(&mut fields)?;
    let mut request = ChatRequest::parse(fields, router)?;
    // The first event of a stream counts the prompt, the last but one the answer.
    (request.params.include_usage, request.params.continuous_usage) = (true, true);
    Ok(request)
}

/// Rewrites the fields. Those that both APIs know, and vLLM's additions, stay as they are.
fn translate(fields: &mut Fields) -> Result<(), Error> {
    fields.refuse(&UNSUPPORTED)?;
    for name in NOT_HERE {
        fields.take(name);
    }
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": texts("system", system)?}));
    }
    let given = fields.list("messages")?.ok_or_else(|| Error::invalid("messages", "is required"))?;
    if given.is_empty() {
        return Err(Error::invalid("messages", "must hold at least one message"));
    }
    for (i, message) in given.into_iter().enumerate() {
        self::message(&format!("messages[{i}]"), message, &mut messages)?;
    }
    fields.set("messages", messages);
    if let Some(stop) = fields.list("stop_sequences")? {
        fields.set("stop", stop);
    }
    thinking(fields)?;
    tools(fields)
}

/// Adds the chat messages that say what `message` says: results of tools are messages of their own there.
fn message(name: &str, message: Value, out: &mut Vec<Value>) -> Result<(), Error> {
    let Value::Object(mut message) = message else { return Err(wrong(name, "an object", &message)) };
    let role = match message.get("role").and_then(Value::as_str) {
        Some(role @ ("user" | "assistant" | "system")) => role.to_string(),
        _ => {
            let given = message.get("role").cloned().unwrap_or_default();
            return Err(wrong(&format!("{name}.role"), "\"user\" or \"assistant\"", &given));
        }
    };
    let content = match message.remove("content") {
        Some(Value::String(text)) => {
            out.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        other => {
            let expected = "a string or a list of content blocks";
            return Err(wrong(&format!("{name}.content"), expected, &other.unwrap_or_default()));
        }
    };
    let mut said = Said::default();
    for (i, block) in content.into_iter().enumerate() {
        said.block(&format!("{name}.content[{i}]"), block, out)?;
    }
    said.finish(role, out);
    Ok(())
}

/// What one message says, apart from results of tools.
#[derive(Default)]
struct Said {
    texts: Vec<Value>,
    thinking: String,
    calls: Vec<Value>,
    /// Whether results of tools were all it had so far.
    answered: bool,
}

impl Said {
    fn block(&mut self, name: &str, block: Value, out: &mut Vec<Value>) -> Result<(), Error> {
        let Value::Object(mut block) = block else { return Err(wrong(name, "an object with a type", &block)) };
        let kind = block.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
        match kind.as_str() {
            "text" => self.texts.push(json!({"type": "text", "text": string(name, &mut block, "text")?})),
            "thinking" => self.thinking.push_str(&string(name, &mut block, "thinking")?),
            // Only who wrote it can read it.
            "redacted_thinking" => {}
            "tool_use" => {
                let (id, tool) = (string(name, &mut block, "id")?, string(name, &mut block, "name")?);
                let input = match block.remove("input") {
                    None | Some(Value::Null) => json!({}),
                    Some(input @ Value::Object(_)) => input,
                    Some(other) => return Err(wrong(&format!("{name}.input"), "an object", &other)),
                };
                let function = json!({"name": tool, "arguments": input.to_string()});
                self.calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            "tool_result" => {
                let call = string(name, &mut block, "tool_use_id")?;
                let content = match block.remove("content") {
                    None | Some(Value::Null) => Value::from(""),
                    Some(content) => texts(&format!("{name}.content"), content)?,
                };
                out.push(json!({"role": "tool", "tool_call_id": call, "content": content}));
                self.answered = true;
            }
            "" => return Err(Error::invalid(&format!("{name}.type"), "is missing")),
            other => {
                let problem = format!("{other:?} is not supported: this model reads text only");
                return Err(Error::invalid(&format!("{name}.type"), problem));
            }
        }
        Ok(())
    }

    fn finish(self, role: String, out: &mut Vec<Value>) {
        if self.answered && self.texts.is_empty() && self.calls.is_empty() {
            return;
        }
        let mut message = json!({"role": role, "content": self.texts});
        if !self.thinking.is_empty() {
            message["reasoning_content"] = self.thinking.into();
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.into();
        }
        out.push(message);
    }
}

fn string(name: &str, block: &mut Map<String, Value>, field: &str) -> Result<String, Error> {
    match block.remove(field) {
        Some(Value::String(text)) => Ok(text),
        other => Err(wrong(&format!("{name}.{field}"), "a string", &other.unwrap_or_default())),
    }
}

/// A string, or text blocks as chat messages hold them.
fn texts(name: &str, value: Value) -> Result<Value, Error> {
    let blocks = match value {
        Value::String(text) => return Ok(text.into()),
        Value::Array(blocks) => blocks,
        other => return Err(wrong(name, "a string or a list of text blocks", &other)),
    };
    let text = |(i, block): (usize, Value)| match (block.get("type").and_then(Value::as_str), block.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(json!({"type": "text", "text": text})),
        (Some("text"), other) => Err(wrong(&format!("{name}[{i}].text"), "a string", other.unwrap_or(&Value::Null))),
        _ => Err(wrong(&format!("{name}[{i}]"), "a block of type \"text\": this model reads text only", &block)),
    };
    blocks.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>().map(Value::from)
}

/// `thinking` decides what templates call `enable_thinking`.
fn thinking(fields: &mut Fields) -> Result<(), Error> {
    let Some(thinking) = fields.object("thinking")? else { return Ok(()) };
    let enabled = match thinking.get("type").and_then(Value::as_str) {
        Some("enabled" | "adaptive") => true,
        Some("disabled") => false,
        _ => {
            let given = thinking.get("type").cloned().unwrap_or_default();
            return Err(wrong("thinking.type", "\"enabled\", \"adaptive\" or \"disabled\"", &given));
        }
    };
    let mut variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    variables.entry("enable_thinking").or_insert(enabled.into());
    fields.set("chat_template_kwargs", variables);
    Ok(())
}

fn tools(fields: &mut Fields) -> Result<(), Error> {
    let given = fields.list("tools")?.unwrap_or_default();
    let tools = given.into_iter().enumerate().map(|(i, tool)| function(&format!("tools[{i}]"), tool));
    let tools: Vec<Value> = tools.collect::<Result<_, _>>()?;
    let choice = fields.object("tool_choice")?;
    if tools.is_empty() {
        return match choice {
            Some(choice) if choice.get("type").is_some_and(|kind| kind != "none" && kind != "auto") => {
                Err(Error::invalid("tool_choice", "only allowed when tools are given"))
            }
            _ => Ok(()),
        };
    }
    fields.set("tools", tools);
    let Some(choice) = choice else { return Ok(()) };
    let name = || match choice.get("name") {
        Some(Value::String(name)) => Ok(json!({"type": "function", "function": {"name": name}})),
        other => Err(wrong("tool_choice.name", "a string", other.unwrap_or(&Value::Null))),
    };
    let translated = match choice.get("type").and_then(Value::as_str) {
        Some("auto") => json!("auto"),
        Some("any") => json!("required"),
        Some("none") => json!("none"),
        Some("tool") => name()?,
        _ => {
            let given = choice.get("type").cloned().unwrap_or_default();
            return Err(wrong("tool_choice.type", "\"auto\", \"any\", \"tool\" or \"none\"", &given));
        }
    };
    fields.set("tool_choice", translated);
    match choice.get("disable_parallel_tool_use") {
        None | Some(Value::Null) => {}
        Some(Value::Bool(disabled)) => fields.set("parallel_tool_calls", !disabled),
        Some(other) => return Err(wrong("tool_choice.disable_parallel_tool_use", "true or false", other)),
    }
    Ok(())
}

fn function(name: &str, tool: Value) -> Result<Value, Error> {
    let Value::Object(mut tool) = tool else { return Err(wrong(name, "an object", &tool)) };
    if let Some(kind) = tool.get("type").filter(|kind| !kind.is_null() && *kind != "custom") {
        let problem = format!("{kind} is not supported: only tools that the client runs are");
        return Err(Error::invalid(&format!("{name}.type"), problem));
    }
    let function = json!({
        "name": string(name, &mut tool, "name")?,
        "description": tool.remove("description").unwrap_or_default(),
        "parameters": tool.remove("input_schema").unwrap_or_else(|| json!({"type": "object"})),
    });
    Ok(json!({"type": "function", "function": function}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(body: Value) -> Result<Value, String> {
        let Value::Object(map) = body else { panic!("a body is an object") };
        let mut fields = Fields::new(map);
        translate(&mut fields).map_err(|error| error.to_string())?;
        let names = ["messages", "stop", "tools", "tool_choice", "parallel_tool_calls", "n", "chat_template_kwargs"];
        let taken = names.iter().filter_map(|name| Some((name.to_string(), fields.take(name)?)));
        Ok(Value::Object(taken.collect()))
    }

    #[test]
    fn a_conversation_with_tools_becomes_chat() {
        let body = json!({
            "n": 3, "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "stop_sequences": ["X"], "thinking": {"type": "enabled", "budget_tokens": 1024},
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "Looking."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "text", "text": "So?"}]},
            ],
            "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": true},
        });
        let expected = json!({
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [{"type": "text", "text": "Looking."}], "reasoning_content": "Hm.",
                 "tool_calls": [{"id": "t1", "type": "function",
                                 "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}}]},
                {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"role": "user", "content": [{"type": "text", "text": "So?"}]},
            ],
            "stop": ["X"],
            "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": false,
            "chat_template_kwargs": {"enable_thinking": true},
        });
        assert_eq!(translated(body).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named_as_the_client_wrote_it() {
        let check = |body: Value, expected: &str| {
            let error = translated(body).unwrap_err();
            assert!(error.contains(expected), "{error} does not say {expected}");
        };
        let with = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        check(json!({}), "messages: is required");
        check(json!({"messages": []}), "messages: must hold at least one");
        check(json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role");
        check(with(json!(5)), "messages[0].content: must be a string or a list");
        check(with(json!([{"type": "image", "source": {}}])), "messages[0].content[0].type: \"image\"");
        check(with(json!([{"type": "text"}])), "messages[0].content[0].text: must be a string");
        check(with(json!([{"type": "tool_result", "tool_use_id": "t", "content": 5}])), "content[0].content");
        check(json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "any"}}), "tool_choice");
        let tool = json!({"type": "web_search_20250305", "name": "web_search"});
        check(json!({"messages": [{"role": "user", "content": "x"}], "tools": [tool]}), "tools[0].type");
    }
}
