//! A request of the Responses API as the chat request that means the same.

use super::{object::Echo, store::Store};
use crate::{
    error::Error,
    openai::{
        chat::ChatRequest,
        fields::{Fields, shown, wrong},
    },
    request::Router,
};
use serde_json::{Map, Value, json};

/// Chat fields that would change the shape of the answer, and that this API does not have.
const NOT_HERE: [&str; 6] = ["n", "logprobs", "top_logprobs", "prompt_logprobs", "stream_options", "return_token_ids"];

/// Fields that need what is not served.
const UNSUPPORTED: [&str; 3] = ["conversation", "prompt", "kv_transfer_params"];

/// A request that makes sense.
#[derive(Debug)]
pub(crate) struct ResponsesRequest {
    pub(crate) chat: ChatRequest,
    pub(crate) echo: Echo,
    /// The conversation up to the answer, to go on from: without instructions, which hold for one answer.
    pub(crate) conversation: Vec<Value>,
    pub(crate) background: bool,
}

impl ResponsesRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let rewritten = Rewritten::of(&mut fields, &router.responses)?;
        let Rewritten { mut echo, conversation } = rewritten;
        let mut chat = ChatRequest::parse(fields, router).map_err(name_as_here)?;
        (chat.params.include_usage, chat.params.continuous_usage) = (true, false);
        echo.settle(&chat.params);
        let background = echo.background;
        Ok(Self { chat, echo, conversation, background })
    }
}

/// Errors of chat requests name their fields.
fn name_as_here(error: Error) -> Error {
    let Error::Invalid { message, param: Some(param) } = &error else { return error };
    let here = match param.as_str() {
        "messages" => "input",
        "response_format" => "text.format",
        "max_tokens" | "max_completion_tokens" => "max_output_tokens",
        _ => return error,
    };
    let problem = message.strip_prefix(param.as_str()).map_or(message.as_str(), |rest| rest.trim_start_matches(": "));
    Error::invalid(here, problem)
}

#[derive(Debug)]
struct Rewritten {
    echo: Echo,
    conversation: Vec<Value>,
}

impl Rewritten {
    /// Rewrites the fields. Those that both APIs know, and vLLM's additions, stay as they are.
    fn of(fields: &mut Fields, stored: &Store) -> Result<Self, Error> {
        fields.refuse(&UNSUPPORTED)?;
        for name in NOT_HERE {
            fields.take(name);
        }
        let (store, background) = (fields.bool("store")?.unwrap_or(true), fields.bool("background")?.unwrap_or(false));
        if background && !store {
            return Err(Error::invalid("background", "needs store, or nobody could ask for the response"));
        }
        if background && fields.bool("stream")?.unwrap_or(false) {
            return Err(Error::unsupported("background", "background = true with stream = true"));
        }
        let instructions = fields.string("instructions")?;
        let previous = fields.string("previous_response_id")?;
        let mut conversation = match &previous {
            Some(id) => stored.conversation(id)?,
            None => Vec::new(),
        };
        input(fields, &mut conversation)?;
        let messages = with_instructions(instructions.as_deref(), &conversation);
        fields.set("messages", messages);
        let max_output_tokens = fields.integer("max_output_tokens", 1..=i64::from(u32::MAX))?;
        if let Some(max) = max_output_tokens {
            fields.set("max_completion_tokens", max);
        }
        let reasoning = fields.object("reasoning")?;
        if let Some(effort) = reasoning.as_ref().and_then(|reasoning| reasoning.get("effort")).filter(|e| !e.is_null())
        {
            fields.set("reasoning_effort", effort.clone());
        }
        let echo = Echo {
            instructions,
            max_output_tokens,
            previous_response_id: previous,
            reasoning: reasoning.map(Value::Object),
            text: text_format(fields)?,
            tools: tools(fields)?,
            tool_choice: tool_choice(fields)?,
            parallel_tool_calls: parallel_tool_calls(fields)?,
            metadata: metadata(fields)?,
            truncation: truncation(fields)?,
            background,
            store,
            user: fields.string("user")?,
            prompt_cache_key: fields.string("prompt_cache_key")?,
            safety_identifier: fields.string("safety_identifier")?,
            ..Echo::default()
        };
        logprobs(fields)?;
        Ok(Self { echo, conversation })
    }
}

/// One system message goes first: many templates take no other.
fn with_instructions(instructions: Option<&str>, conversation: &[Value]) -> Vec<Value> {
    let is_system = |message: &Value| message["role"] == "system" && message["content"].is_string();
    let leading = conversation.iter().take_while(|message| is_system(message)).count();
    let said = conversation[..leading].iter().filter_map(|message| message["content"].as_str());
    let system: Vec<&str> = instructions.into_iter().chain(said).collect();
    let first = (!system.is_empty()).then(|| json!({"role": "system", "content": system.join("\n\n")}));
    first.into_iter().chain(conversation[leading..].iter().cloned()).collect()
}

/// Adds the chat messages that say what `input` says.
fn input(fields: &mut Fields, out: &mut Vec<Value>) -> Result<(), Error> {
    let items = match fields.take("input") {
        None => return Err(Error::invalid("input", "is required")),
        Some(Value::String(text)) => {
            out.push(json!({"role": "user", "content": text}));
            return Ok(());
        }
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(Error::invalid("input", "must hold at least one item"));
        }
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong("input", "a string or a list of items", &other)),
    };
    // Thoughts belong to what was said or called after them.
    let mut thoughts = String::new();
    for (i, item) in items.into_iter().enumerate() {
        let name = format!("input[{i}]");
        let Value::Object(item) = item else { return Err(wrong(&name, "an object", &item)) };
        match item.get("type").and_then(Value::as_str).unwrap_or("message") {
            "message" => {
                let mut message = spoken(&name, &item)?;
                if message["role"] == "assistant" && !thoughts.is_empty() {
                    message["reasoning_content"] = std::mem::take(&mut thoughts).into();
                }
                out.push(message);
            }
            "reasoning" => thoughts.push_str(&thought(&item)),
            "function_call" => call(&name, &item, &mut thoughts, out)?,
            "function_call_output" => {
                let content = content(&format!("{name}.output"), item.get("output"))?;
                let id = string(&name, &item, "call_id")?;
                out.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            other => {
                return Err(Error::invalid(&format!("{name}.type"), format_args!("{other:?} is not supported")));
            }
        }
    }
    Ok(())
}

fn spoken(name: &str, item: &Map<String, Value>) -> Result<Value, Error> {
    let role = match item.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("user" | "assistant" | "system")) => role,
        _ => {
            let given = item.get("role").cloned().unwrap_or_default();
            let expected = "\"user\", \"assistant\", \"system\" or \"developer\"";
            return Err(wrong(&format!("{name}.role"), expected, &given));
        }
    };
    Ok(json!({"role": role, "content": content(&format!("{name}.content"), item.get("content"))?}))
}

/// A string, or parts that are text.
fn content(name: &str, value: Option<&Value>) -> Result<String, Error> {
    let parts = match value {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        other => return Err(wrong(name, "a string or a list of parts", other.unwrap_or(&Value::Null))),
    };
    let part = |(i, part): (usize, &Value)| {
        let field = match part.get("type").and_then(Value::as_str) {
            Some("input_text" | "output_text" | "text") => "text",
            Some("refusal") => "refusal",
            Some(kind) => {
                let problem = format!("{kind:?} is not supported: this model reads text only");
                return Err(Error::invalid(&format!("{name}[{i}].type"), problem));
            }
            None => return Err(wrong(&format!("{name}[{i}]"), "an object with a type", part)),
        };
        let text = part.get(field).and_then(Value::as_str).map(str::to_string);
        text.ok_or_else(|| Error::invalid(&format!("{name}[{i}].{field}"), "must be a string"))
    };
    let texts: Vec<String> = parts.iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

fn thought(item: &Map<String, Value>) -> String {
    let parts = item.get("content").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    parts.iter().filter_map(|part| part.get("text")?.as_str()).collect()
}

/// Calls side by side are one message's.
fn call(name: &str, item: &Map<String, Value>, thoughts: &mut String, out: &mut Vec<Value>) -> Result<(), Error> {
    let function = json!({"name": string(name, item, "name")?, "arguments": string(name, item, "arguments")?});
    let call = json!({"id": string(name, item, "call_id")?, "type": "function", "function": function});
    if let Some(last) = out.last_mut().filter(|last| last["role"] == "assistant" && thoughts.is_empty()) {
        match last["tool_calls"].as_array_mut() {
            Some(calls) => calls.push(call),
            None => last["tool_calls"] = json!([call]),
        }
        return Ok(());
    }
    let mut message = json!({"role": "assistant", "content": "", "tool_calls": [call]});
    if !thoughts.is_empty() {
        message["reasoning_content"] = std::mem::take(thoughts).into();
    }
    out.push(message);
    Ok(())
}

fn string(name: &str, item: &Map<String, Value>, field: &str) -> Result<String, Error> {
    match item.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(wrong(&format!("{name}.{field}"), "a string", other.unwrap_or(&Value::Null))),
    }
}

/// `text.format` is chat's `response_format`, one level flatter.
fn text_format(fields: &mut Fields) -> Result<Value, Error> {
    let text = fields.object("text")?.unwrap_or_default();
    let format = match text.get("format") {
        None | Some(Value::Null) => json!({"type": "text"}),
        Some(Value::Object(format)) => Value::Object(format.clone()),
        Some(other) => return Err(wrong("text.format", "an object", other)),
    };
    let response_format = match format["type"].as_str() {
        Some("text") => None,
        Some("json_object") => Some(format.clone()),
        Some("json_schema") => {
            let fields = ["name", "description", "schema", "strict"].into_iter();
            let body = fields.filter_map(|name| Some((name.to_string(), format.get(name)?.clone())));
            Some(json!({"type": "json_schema", "json_schema": Map::from_iter(body)}))
        }
        _ => {
            return Err(wrong("text.format.type", "\"text\", \"json_object\" or \"json_schema\"", &format["type"]));
        }
    };
    if let Some(response_format) = response_format {
        fields.set("response_format", response_format);
    }
    Ok(json!({"format": format}))
}

/// Returns the tools as the client wrote them and leaves them as chat has them.
fn tools(fields: &mut Fields) -> Result<Vec<Value>, Error> {
    let tools = fields.list("tools")?.unwrap_or_default();
    let function = |(i, tool): (usize, &Value)| {
        let Some(tool) = tool.as_object() else { return Err(wrong(&format!("tools[{i}]"), "an object", tool)) };
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            _ => {
                let given = tool.get("type").cloned().unwrap_or_default();
                return Err(wrong(&format!("tools[{i}].type"), "\"function\", the only one served", &given));
            }
        }
        string(&format!("tools[{i}]"), tool, "name")?;
        let fields = ["name", "description", "parameters", "strict"].into_iter();
        let function = fields.filter_map(|name| Some((name.to_string(), tool.get(name)?.clone())));
        Ok(json!({"type": "function", "function": Map::from_iter(function)}))
    };
    let functions: Vec<Value> = tools.iter().enumerate().map(function).collect::<Result<_, _>>()?;
    if !functions.is_empty() {
        fields.set("tools", functions);
    }
    Ok(tools)
}

fn tool_choice(fields: &mut Fields) -> Result<Value, Error> {
    let Some(choice) = fields.take("tool_choice") else { return Ok("auto".into()) };
    let chat = match &choice {
        Value::String(_) => choice.clone(),
        Value::Object(named) if named.get("type").is_some_and(|kind| kind == "function") => {
            json!({"type": "function", "function": {"name": string("tool_choice", named, "name")?}})
        }
        _ => return Err(wrong("tool_choice", "\"none\", \"auto\", \"required\" or a function's name", &choice)),
    };
    fields.set("tool_choice", chat);
    Ok(choice)
}

fn parallel_tool_calls(fields: &mut Fields) -> Result<bool, Error> {
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    fields.set("parallel_tool_calls", parallel);
    Ok(parallel)
}

fn metadata(fields: &mut Fields) -> Result<Value, Error> {
    let metadata = fields.object("metadata")?.unwrap_or_default();
    match metadata.iter().find(|(_, value)| !value.is_string()) {
        Some((name, value)) => Err(wrong(&format!("metadata.{name}"), "a string", value)),
        None => Ok(Value::Object(metadata)),
    }
}

/// Nothing is ever dropped from a conversation in silence.
fn truncation(fields: &mut Fields) -> Result<&'static str, Error> {
    match fields.string("truncation")?.as_deref() {
        None | Some("disabled") => Ok("disabled"),
        Some("auto") => Err(Error::unsupported("truncation", "truncation = \"auto\"")),
        Some(other) => Err(wrong("truncation", "\"disabled\"", &other.into())),
    }
}

/// Further output that may be asked for: what there is none of may be asked for in vain, log-probabilities may not.
fn logprobs(fields: &mut Fields) -> Result<(), Error> {
    let include = fields.list("include")?.unwrap_or_default();
    match include.iter().find(|what| what.as_str() == Some("message.output_text.logprobs")) {
        Some(what) => Err(Error::unsupported("include", format_args!("include = [{}]", shown(what)))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;

    fn rewritten(body: Value) -> Result<(Value, Rewritten), String> {
        let Value::Object(map) = body else { panic!("a body is an object") };
        let mut fields = Fields::new(map);
        let rewritten = Rewritten::of(&mut fields, &Store::new(&Limits::default())).map_err(|e| e.to_string())?;
        let names =
            ["messages", "tools", "tool_choice", "response_format", "max_completion_tokens", "reasoning_effort"];
        let taken = names.iter().filter_map(|name| Some((name.to_string(), fields.take(name)?)));
        Ok((Value::Object(taken.collect()), rewritten))
    }

    #[test]
    fn a_conversation_with_tools_becomes_chat() {
        let (chat, rewritten) = rewritten(json!({
            "instructions": "Be brief.", "max_output_tokens": 9, "reasoning": {"effort": "low"},
            "input": [
                {"role": "developer", "content": "Politely."},
                {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
            "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "weather"},
            "text": {"format": {"type": "json_schema", "name": "w", "schema": {"type": "object"}}},
        }))
        .unwrap();
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": "{}"}});
        let parameters = json!({"name": "weather", "parameters": {"type": "object"}, "strict": true});
        let expected = json!({
            "messages": [
                {"role": "system", "content": "Be brief.\n\nPolitely."},
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "tool_calls": [call("c1"), call("c2")], "reasoning_content": "Hm."},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            ],
            "tools": [{"type": "function", "function": parameters}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": {"type": "object"}}},
            "max_completion_tokens": 9,
            "reasoning_effort": "low",
        });
        assert_eq!(chat, expected);
        assert_eq!(rewritten.conversation.len(), 4, "instructions hold for one answer");
        assert_eq!(rewritten.conversation[0]["content"], "Politely.");
        assert!(rewritten.echo.store && !rewritten.echo.background);
    }

    #[test]
    fn what_is_wrong_is_named_as_the_client_wrote_it() {
        let check = |body: Value, expected: &str| {
            let error = rewritten(body).unwrap_err();
            assert!(error.contains(expected), "{error} does not say {expected}");
        };
        check(json!({}), "input: is required");
        check(json!({"input": 5}), "input: must be a string or a list");
        check(json!({"input": []}), "input: must hold at least one");
        check(json!({"input": [{"role": "robot", "content": "x"}]}), "input[0].role");
        check(json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type");
        check(json!({"input": [{"type": "item_reference", "id": "m"}]}), "input[0].type: \"item_reference\"");
        check(json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools[0].type");
        check(json!({"input": "x", "text": {"format": {"type": "xml"}}}), "text.format.type");
        check(json!({"input": "x", "metadata": {"a": 1}}), "metadata.a");
        check(json!({"input": "x", "background": true, "store": false}), "background: needs store");
        check(json!({"input": "x", "previous_response_id": "resp_1"}), "resp_1");
        check(json!({"input": "x", "truncation": "auto"}), "truncation");
        check(json!({"input": "x", "include": ["message.output_text.logprobs"]}), "include");
    }

    #[test]
    fn errors_of_chat_are_named_as_here() {
        let named = name_as_here(Error::invalid("messages", "too long")).to_string();
        assert_eq!(named, "input: too long");
        assert_eq!(name_as_here(Error::invalid("top_p", "wrong")).to_string(), "top_p: wrong");
    }
}
