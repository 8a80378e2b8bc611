//! `/v1/chat/completions`.

use super::{
    Head, Shape, StopReason, Usage,
    fields::{Fields, shown, wrong},
    logprobs::{ChatLogprobs, PromptLogprobs},
    params::{Differences, Params},
    reasons,
    stream::event,
    write_json,
};
use crate::{
    error::Error,
    prompt::{Prompt, PromptSource},
    request::{Router, Step},
    text::template::ChatInput,
};
use kv_cache::TokenId;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;

/// A chat request that makes sense.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    input: ChatInput,
}

impl ChatRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(mut fields: Fields, router: &Router) -> Result<Self, Error> {
        let logprobs = logprobs(&mut fields, router.config.limits.max_logprobs)?;
        let differences = Differences { prompt_field: "messages", default_max_tokens: None, logprobs, echo: false };
        let params = Params::take(&mut fields, router, differences)?;
        fields.refuse(&["echo", "chat_template", "add_special_tokens", "web_search_options", "modalities"])?;
        let tools = tools(&mut fields)?;
        Ok(Self { params, input: chat_input(&mut fields, tools)? })
    }

    /// Returns how to make the prompt; to be called on the text threads.
    pub(crate) fn into_prompt(self) -> impl FnOnce(&Router) -> Result<Vec<PromptSource>, Error> + Send + 'static {
        let input = self.input;
        move |router| {
            let template =
                router.model.template.as_ref().ok_or_else(|| {
                    Error::invalid("messages", "this model has no chat template; use /v1/completions")
                })?;
            let text = template.render(&input).map_err(|problem| {
                Error::invalid("messages", format_args!("the chat template refused them: {problem}"))
            })?;
            // The template writes the special tokens itself.
            Ok(vec![PromptSource::Text { text, special: false }])
        }
    }
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

fn tools(fields: &mut Fields) -> Result<Vec<Value>, Error> {
    let tools = fields.list("tools")?;
    if tools.as_ref().is_some_and(Vec::is_empty) {
        return Err(Error::invalid("tools", "must not be an empty list; leave it out instead"));
    }
    let tools = tools.unwrap_or_default();
    if let Some(bad) = tools.iter().find(|tool| !tool.is_object()) {
        return Err(wrong("tools", "a list of objects", bad));
    }
    match fields.take("tool_choice") {
        None => Ok(tools),
        Some(Value::String(choice)) if choice == "none" => Ok(Vec::new()),
        Some(_) if tools.is_empty() => Err(Error::invalid("tool_choice", "only allowed when tools are given")),
        Some(Value::String(choice)) if choice == "auto" => Ok(tools),
        // A choice that must be obeyed needs a grammar.
        Some(choice) => Err(Error::unsupported("tool_choice", format_args!("tool_choice = {}", shown(&choice)))),
    }
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
    if let Some(reasoning) = message.remove("reasoning_content") {
        // Templates know one of the two names.
        message.entry("reasoning").or_insert_with(|| reasoning.clone());
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

/// Writes chat completions.
#[derive(Debug)]
pub(crate) struct ChatShape {
    router: Arc<Router>,
    head: Head,
    /// Alternatives per token; `None` = no log-probabilities.
    logprobs: Option<u32>,
    include_usage: bool,
    /// Ids of the prompt, where ids are asked for.
    prompt_token_ids: Option<Vec<TokenId>>,
    /// Alternatives listed beside each token of the prompt; `None` = they are not listed.
    prompt_logprobs: Option<u32>,
    prompt: Option<PromptLogprobs>,
    choices: Vec<ChatChoice>,
}

#[derive(Debug, Serialize)]
struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Debug, Default, Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<()>,
    annotations: Option<()>,
    audio: Option<()>,
    function_call: Option<()>,
    reasoning: Option<()>,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChatChoice],
    service_tier: Option<()>,
    system_fingerprint: &'a str,
    usage: Usage,
    prompt_logprobs: Option<&'a PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// On the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    /// Absent unless asked for; then `null` but on the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Default, Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChatShape {
    pub(crate) fn new(router: Arc<Router>, head: Head, params: &Params, prompt: &Prompt) -> Self {
        let logprobs = params.sampling.logprobs;
        let choice = |index| ChatChoice {
            index: index as usize,
            message: Message { role: "assistant", ..Message::default() },
            logprobs: logprobs.map(|_| ChatLogprobs::default()),
            finish_reason: None,
            stop_reason: None,
            token_ids: params.token_ids.then(Vec::new),
        };
        Self {
            router,
            head,
            logprobs,
            include_usage: params.include_usage,
            prompt_token_ids: params.token_ids.then(|| prompt.tokens.clone()),
            prompt_logprobs: params.prompt_logprobs,
            prompt: None,
            choices: (0..params.n).map(choice).collect(),
        }
    }

    fn write_chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, first: bool, out: &mut Vec<u8>) {
        let head = &self.head;
        let chunk = Chunk {
            id: &head.id,
            object: "chat.completion.chunk",
            created: head.created,
            model: &head.model,
            system_fingerprint: &head.fingerprint,
            choices,
            prompt_token_ids: self.prompt_token_ids.as_deref().filter(|_| first),
            usage: (self.include_usage || usage.is_some()).then_some(usage),
        };
        event(out, |out| write_json(&chunk, out));
    }

    fn chunk_logprobs(&self, step: &Step) -> Option<ChatLogprobs> {
        let count = self.logprobs.filter(|_| !step.tokens.is_empty())?;
        let mut logprobs = ChatLogprobs::default();
        logprobs.extend(&self.router.model.tokenizer, &step.tokens, count as usize);
        Some(logprobs)
    }
}

impl Shape for ChatShape {
    fn chunk(&mut self, index: usize, first: bool, step: &Step, usage: Option<Usage>, out: &mut Vec<u8>) {
        if first {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            self.write_chunk(&[ChunkChoice { index, delta, ..ChunkChoice::default() }], usage, index == 0, out);
        }
        let token_ids = (self.prompt_token_ids.is_some() && !step.ids.is_empty()).then_some(&step.ids[..]);
        let logprobs = self.chunk_logprobs(step);
        let (finish_reason, stop_reason) = match &step.finish {
            Some(finish) => {
                let (finish_reason, stop_reason) = reasons(finish);
                (Some(finish_reason), Some(stop_reason))
            }
            None => (None, None),
        };
        if step.text.is_empty() && logprobs.is_none() && token_ids.is_none() && finish_reason.is_none() {
            return;
        }
        let content = (!step.text.is_empty() || logprobs.is_some()).then_some(step.text.as_str());
        let delta = Delta { role: None, content };
        let choice = ChunkChoice { index, delta, logprobs, finish_reason, stop_reason, token_ids };
        self.write_chunk(&[choice], usage, false, out);
    }

    fn usage_chunk(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.write_chunk(&[], Some(usage), false, out);
    }

    fn collect(&mut self, index: usize, step: &Step) {
        if let (Some(count), Some(others)) = (self.prompt_logprobs, &step.prompt) {
            self.prompt = Some(PromptLogprobs::new(&self.router.model.tokenizer, others, count as usize));
        }
        let choice = &mut self.choices[index];
        choice.message.content.push_str(&step.text);
        choice.token_ids.as_mut().into_iter().for_each(|ids| ids.extend(&step.ids));
        if let (Some(logprobs), Some(count)) = (&mut choice.logprobs, self.logprobs) {
            logprobs.extend(&self.router.model.tokenizer, &step.tokens, count as usize);
        }
        if let Some(finish) = &step.finish {
            let (finish_reason, stop_reason) = reasons(finish);
            (choice.finish_reason, choice.stop_reason) = (Some(finish_reason), stop_reason);
        }
    }

    fn answer(&mut self, usage: Usage) -> Vec<u8> {
        let head = &self.head;
        let mut out = Vec::new();
        let answer = Answer {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.model,
            choices: &self.choices,
            service_tier: None,
            system_fingerprint: &head.fingerprint,
            usage,
            prompt_logprobs: self.prompt.as_ref(),
            prompt_token_ids: self.prompt_token_ids.as_deref(),
        };
        write_json(&answer, &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_become_plain() {
        let message = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"});
        assert_eq!(plain_message(0, message).unwrap(), json!({"role": "user", "name": "x", "content": "a\nb"}));
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]});
        let plain = plain_message(0, call).unwrap();
        assert_eq!(plain["content"], "");
        assert_eq!(plain["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
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
