//! `/v1/chat/completions`.

mod shape;

pub(crate) use shape::ChatShape;

use super::{
    constraint::Constraint,
    fields::{Fields, wrong},
    params::{Differences, Params},
    tools::ToolFields,
};
use crate::{
    dialect::{Dialect, Reading},
    error::Error,
    prompt::PromptSource,
    request::Router,
    text::template::ChatInput,
};
use grammar::Spec;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Largest budget of thoughts: a grammar that counts to it is still small.
const MAX_THOUGHT_BUDGET: u32 = 1 << 20;

/// Values of `reasoning_effort`.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// A chat request that makes sense.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    input: ChatInput,
    /// Whether tokens such as BOS are put before what the template writes.
    special: bool,
}

impl ChatRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let logprobs = logprobs(&mut fields, router.config.limits.max_logprobs)?;
        let differences = Differences { prompt_field: "messages", default_max_tokens: None, logprobs, echo: false };
        let mut params = Params::take(&mut fields, router, differences)?;
        fields.refuse(&["chat_template", "web_search_options", "modalities"])?;
        let special = fields.bool("add_special_tokens")?.unwrap_or(false);
        let echo = fields.bool("echo")?.unwrap_or(false);
        let tools = ToolFields::take(&mut fields, &router.dialect)?;
        params.constrain(tools.constraint)?;
        let thought_budget = thought_budget(&mut fields, &router.dialect)?;
        if thought_budget.is_some() {
            // Counting thoughts is a grammar's business, even where it lets everything follow.
            let anything = || Constraint { field: "thinking_token_budget", spec: Arc::new(Spec::anything()) };
            params.constraint.get_or_insert_with(anything);
        }
        let input = chat_input(&mut fields, tools.told)?;
        params.reading = Some(Reading {
            echo: if echo { input.begun_answer() } else { String::new() },
            thought_budget,
            tools: tools.choice,
            one_call: tools.one_call,
            // Who goes on in an answer has thought already.
            thoughts: router.dialect.thoughts.filter(|_| !input.continue_final_message),
            hide_thoughts: !fields.bool("include_reasoning")?.unwrap_or(true),
            ..Reading::default()
        });
        params.think_first();
        Ok(Self { params, input, special })
    }

    /// Returns how to make the prompt; to be called on the text threads.
    pub(crate) fn into_prompt(self) -> impl FnOnce(&Router) -> Result<Vec<PromptSource>, Error> + Send + 'static {
        let Self { input, special, .. } = self;
        move |router| {
            let template =
                router.model.template.as_ref().ok_or_else(|| {
                    Error::invalid("messages", "this model has no chat template; use /v1/completions")
                })?;
            let text = template.render(&input).map_err(|problem| {
                Error::invalid("messages", format_args!("the chat template refused them: {problem}"))
            })?;
            // As a rule the template writes the special tokens itself.
            Ok(vec![PromptSource::Text { text, special }])
        }
    }
}

/// Returns how many tokens the model may think; `None` = as many as it likes.
fn thought_budget(fields: &mut Fields, dialect: &Dialect) -> Result<Option<u32>, Error> {
    let name = "thinking_token_budget";
    let budget =
        fields.integer(name, -1..=i64::from(MAX_THOUGHT_BUDGET))?.and_then(|budget| u32::try_from(budget).ok());
    if budget.is_some() && dialect.thought_tokens[1].is_none() {
        return Err(Error::invalid(name, "this model has no token that ends its reasoning"));
    }
    Ok(budget)
}

/// Returns the number of alternatives per token, if log-probabilities are asked for.
fn logprobs(fields: &mut Fields, max: u32) -> Result<Option<u32>, Error> {
    let asked = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=i64::from(max))?.unwrap_or(0) as u32;
    if top > 0 && !asked {
        return Err(Error::invalid("top_logprobs", "only allowed when logprobs is true"));
    }
    Ok(asked.then_some(top))
}

fn chat_input(fields: &mut Fields, tools: Vec<Value>) -> Result<ChatInput, Error> {
    let messages = fields.list("messages")?.ok_or_else(|| Error::invalid("messages", "is required"))?;
    if messages.is_empty() {
        return Err(Error::invalid("messages", "must hold at least one message"));
    }
    let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
    if continue_final_message && add_generation_prompt {
        let problem = "cannot be true while add_generation_prompt is true; set that to false";
        return Err(Error::invalid("continue_final_message", problem));
    }
    let mut variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(effort) = fields.string("reasoning_effort")? {
        if !EFFORTS.contains(&effort.as_str()) {
            return Err(wrong("reasoning_effort", &format!("one of {}", EFFORTS.join(", ")), &effort.into()));
        }
        // Some templates know the one, some the other.
        variables.entry("enable_thinking").or_insert((effort != "none").into());
        variables.entry("reasoning_effort").or_insert_with(|| effort.into());
    }
    Ok(ChatInput {
        messages: messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| plain_message(i, message))
            .collect::<Result<_, _>>()?,
        tools,
        documents: fields.list("documents")?.unwrap_or_default(),
        add_generation_prompt,
        continue_final_message,
        variables,
    })
}

/// A message as templates expect it: content is one string, a call's arguments are an object.
fn plain_message(index: usize, message: Value) -> Result<Value, Error> {
    let name = |field: &str| format!("messages[{index}]{field}");
    let Value::Object(mut message) = message else { return Err(wrong(&name(""), "an object", &message)) };
    match message.get("role") {
        Some(Value::String(_)) => {}
        other => return Err(wrong(&name(".role"), "a string", other.unwrap_or(&Value::Null))),
    }
    let content = match message.remove("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&name(".content"), &parts)?,
        Some(other) => return Err(wrong(&name(".content"), "a string or a list of parts", &other)),
    };
    message.insert("content".into(), content.into());
    // Templates know one of the two names.
    let [older, newer] = ["reasoning_content", "reasoning"].map(|name| message.remove(name));
    if let Some(reasoning) = newer.or(older).filter(|reasoning| !reasoning.is_null()) {
        message.insert("reasoning".into(), reasoning.clone());
        message.insert("reasoning_content".into(), reasoning);
    }
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        for (i, call) in calls.iter_mut().enumerate() {
            parse_arguments(&name(&format!(".tool_calls[{i}].function.arguments")), call)?;
        }
    }
    Ok(Value::Object(message))
}

fn join_parts(name: &str, parts: &[Value]) -> Result<String, Error> {
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let text = |field: &str| part.get(field).and_then(Value::as_str);
        match (part, text("type")) {
            (Value::String(text), _) => texts.push(text.as_str()),
            (_, Some("text" | "input_text" | "output_text")) => {
                texts.push(
                    text("text").ok_or_else(|| Error::invalid(&format!("{name}[{i}].text"), "must be a string"))?,
                );
            }
            (_, Some("refusal")) => texts.push(text("refusal").unwrap_or_default()),
            (_, Some(kind)) => {
                return Err(Error::invalid(
                    &format!("{name}[{i}].type"),
                    format_args!("{kind:?} is not supported: this model reads text only"),
                ));
            }
            (other, None) => return Err(wrong(&format!("{name}[{i}]"), "an object with a type", other)),
        }
    }
    Ok(texts.join("\n"))
}

fn parse_arguments(name: &str, call: &mut Value) -> Result<(), Error> {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return Ok(()) };
    let Some(text) = arguments.as_str() else { return Ok(()) };
    let parsed = if text.trim().is_empty() { Ok(Value::Object(Map::new())) } else { serde_json::from_str(text) };
    *arguments = parsed.map_err(|error| Error::invalid(name, format_args!("not valid JSON: {error}")))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_become_plain() {
        let message = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"});
        assert_eq!(plain_message(0, message).unwrap(), json!({"role": "user", "name": "x", "content": "a\nb"}));
        for name in ["reasoning", "reasoning_content"] {
            let plain = plain_message(0, json!({"role": "assistant", "content": "x", name: "hm"})).unwrap();
            assert_eq!((&plain["reasoning"], &plain["reasoning_content"]), (&json!("hm"), &json!("hm")));
        }
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]});
        let plain = plain_message(0, call).unwrap();
        assert_eq!(plain["content"], "");
        assert_eq!(plain["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
    }

    #[test]
    fn templates_judge_roles() {
        for role in ["system", "developer", "user", "assistant", "tool", "function", "critic", ""] {
            let plain = plain_message(0, json!({"role": role, "content": "x"})).unwrap();
            assert_eq!(plain, json!({"role": role, "content": "x"}));
        }
    }

    #[test]
    fn wrong_messages_are_named() {
        let check = |message: Value, expected: &str| {
            let error = plain_message(3, message).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} does not say {expected}");
        };
        check(json!("hi"), "messages[3]: must be an object");
        check(json!({"content": "x"}), "messages[3].role");
        check(json!({"role": "user", "content": 5}), "messages[3].content");
        check(
            json!({"role": "user", "content": [{"type": "image_url"}]}),
            "messages[3].content[0].type: \"image_url\"",
        );
        check(
            json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}),
            "messages[3].tool_calls[0].function.arguments: not valid JSON",
        );
    }
}
