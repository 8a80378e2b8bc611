//! Chat completions as answers: whole, and in chunks.

use crate::{
    dialect::Event,
    openai::{
        Head, Opening, Shape, StopReason, Usage,
        kv_transfer::Told,
        logprobs::{ChatLogprobs, Names, PromptLogprobs},
        params::Params,
        reasons,
        stream::event,
    },
    prompt::Prompt,
    request::{Router, Step},
};
use kv_cache::TokenId;
use serde::Serialize;
use std::sync::Arc;

/// Writes chat completions.
#[derive(Debug)]
pub(crate) struct ChatShape {
    router: Arc<Router>,
    opening: Opening,
    /// Alternatives per token; `None` = no log-probabilities.
    logprobs: Option<u32>,
    include_usage: bool,
    /// Whether log-probabilities name tokens by their ids.
    tokens_by_id: bool,
    /// What the model was given, where that is asked for.
    prompt_text: Option<String>,
    /// Ids of the prompt, where ids are asked for.
    prompt_token_ids: Option<Vec<TokenId>>,
    /// Alternatives listed beside each token of the prompt; `None` = they are not listed.
    prompt_logprobs: Option<u32>,
    prompt: Option<PromptLogprobs>,
    /// Where the prompt's pages are, for a proxy that asked.
    transfer: Option<Told>,
    /// Choices whose last chunk has not been written.
    open: usize,
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
    /// `null` where the model only thought or called tools.
    content: Option<String>,
    refusal: Option<()>,
    annotations: [(); 0],
    audio: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
    reasoning: Option<String>,
    /// The same by its older name.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

#[derive(Debug, Serialize)]
struct ToolCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function,
}

#[derive(Debug, Serialize)]
struct Function {
    name: String,
    arguments: String,
}

impl Message {
    fn add(&mut self, event: &Event) {
        match event {
            Event::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(text),
            Event::Text(text) => self.content.get_or_insert_default().push_str(text),
            Event::Call { id, name, .. } => self.tool_calls.push(ToolCall {
                id: id.clone(),
                kind: "function",
                function: Function { name: name.clone(), arguments: String::new() },
            }),
            Event::Arguments { json, .. } => {
                let call = self.tool_calls.last_mut().expect("arguments follow their call");
                call.function.arguments.push_str(json);
            }
        }
    }

    /// An answer that says nothing at all says "".
    fn finish(&mut self) {
        if self.tool_calls.is_empty() && self.reasoning.is_none() {
            self.content.get_or_insert_default();
        }
        self.reasoning_content = self.reasoning.clone();
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    choices: &'a [ChatChoice],
    service_tier: Option<()>,
    usage: Usage,
    prompt_logprobs: Option<&'a PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<&'a Told>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    choices: &'a [ChunkChoice<'a>],
    /// On the last chunk of the last choice only.
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<&'a Told>,
    /// This and the next on the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<&'a str>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    /// The same by its older name.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

/// The first of a call has its id, type and name; later ones have pieces of its arguments.
#[derive(Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> Delta<'a> {
    fn of(event: &'a Event) -> Self {
        match event {
            Event::Reasoning(text) => Self { reasoning: Some(text), reasoning_content: Some(text), ..Self::default() },
            Event::Text(text) => Self { content: Some(text), ..Self::default() },
            Event::Call { index, id, name } => {
                let function = FunctionDelta { name: Some(name), arguments: "" };
                let call = CallDelta { index: *index, id: Some(id), kind: Some("function"), function };
                Self { tool_calls: Some([call]), ..Self::default() }
            }
            Event::Arguments { index, json } => {
                let function = FunctionDelta { name: None, arguments: json };
                let call = CallDelta { index: *index, id: None, kind: None, function };
                Self { tool_calls: Some([call]), ..Self::default() }
            }
        }
    }
}

impl ChatShape {
    pub(crate) fn new(router: Arc<Router>, head: &Head, params: &Params, prompt: &Prompt) -> Self {
        let logprobs = params.sampling.logprobs;
        let prompt_text = params.prompt_text.then(|| router.model.tokenizer.decode(&prompt.tokens, false));
        let transfer = params.transfer.as_ref().and_then(|part| part.told(&router, prompt, &head.id));
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
            opening: Opening::new(head, if params.stream { "chat.completion.chunk" } else { "chat.completion" }),
            logprobs,
            include_usage: params.include_usage,
            tokens_by_id: params.tokens_by_id,
            prompt_text,
            prompt_token_ids: params.token_ids.then(|| prompt.tokens.clone()),
            prompt_logprobs: params.prompt_logprobs,
            prompt: None,
            transfer,
            open: params.n as usize,
            choices: (0..params.n).map(choice).collect(),
        }
    }

    fn write_chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, first: bool, out: &mut Vec<u8>) {
        let over = self.open == 0 && choices.iter().any(|choice| choice.finish_reason.is_some());
        let chunk = Chunk {
            choices,
            kv_transfer_params: self.transfer.as_ref().filter(|_| over),
            prompt_text: self.prompt_text.as_deref().filter(|_| first),
            prompt_token_ids: self.prompt_token_ids.as_deref().filter(|_| first),
            usage: (self.include_usage || usage.is_some()).then_some(usage),
        };
        event(out, |out| self.opening.write(&chunk, out));
    }

    fn names(&self) -> Names<'_> {
        Names { tokenizer: &self.router.model.tokenizer, by_id: self.tokens_by_id }
    }

    fn chunk_logprobs(&self, step: &Step) -> Option<ChatLogprobs> {
        let count = self.logprobs.filter(|_| !step.tokens.is_empty())?;
        let mut logprobs = ChatLogprobs::default();
        logprobs.extend(self.names(), &step.tokens, count as usize);
        Some(logprobs)
    }
}

impl Shape for ChatShape {
    fn chunk(&mut self, index: usize, first: bool, step: &Step, usage: Option<Usage>, out: &mut Vec<u8>) {
        if first {
            let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
            self.write_chunk(&[ChunkChoice { index, delta, ..ChunkChoice::default() }], usage, index == 0, out);
        }
        let mut token_ids = (self.prompt_token_ids.is_some() && !step.ids.is_empty()).then_some(&step.ids[..]);
        let mut logprobs = self.chunk_logprobs(step);
        let (mut finish_reason, mut stop_reason) = (None, None);
        if let Some(finish) = &step.finish {
            let (reason, stop) = reasons(finish, step.calls_tools);
            (finish_reason, stop_reason) = (Some(reason), Some(stop));
            self.open -= 1;
        }
        let wordless = step.events.is_empty() && (logprobs.is_some() || token_ids.is_some() || finish_reason.is_some());
        let wordless = wordless.then(|| Delta { content: logprobs.is_some().then_some(""), ..Delta::default() });
        // What belongs to the step as a whole stands in its first chunk, its end in the last.
        let mut deltas = step.events.iter().map(Delta::of).chain(wordless).peekable();
        while let Some(delta) = deltas.next() {
            let mut choice = ChunkChoice { index, delta, ..ChunkChoice::default() };
            (choice.logprobs, choice.token_ids) = (logprobs.take(), token_ids.take());
            if deltas.peek().is_none() {
                (choice.finish_reason, choice.stop_reason) = (finish_reason.take(), stop_reason.take());
            }
            self.write_chunk(&[choice], usage, false, out);
        }
    }

    fn usage_chunk(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.write_chunk(&[], Some(usage), false, out);
    }

    fn collect(&mut self, index: usize, step: &Step) {
        if let (Some(count), Some(others)) = (self.prompt_logprobs, &step.prompt) {
            self.prompt = Some(PromptLogprobs::new(self.names(), others, count as usize));
        }
        let names = Names { tokenizer: &self.router.model.tokenizer, by_id: self.tokens_by_id };
        let choice = &mut self.choices[index];
        step.events.iter().for_each(|event| choice.message.add(event));
        choice.token_ids.as_mut().into_iter().for_each(|ids| ids.extend(&step.ids));
        if let (Some(logprobs), Some(count)) = (&mut choice.logprobs, self.logprobs) {
            logprobs.extend(names, &step.tokens, count as usize);
        }
        if let Some(finish) = &step.finish {
            let (finish_reason, stop_reason) = reasons(finish, step.calls_tools);
            (choice.finish_reason, choice.stop_reason) = (Some(finish_reason), stop_reason);
            choice.message.finish();
        }
    }

    fn answer(&mut self, usage: Usage) -> Vec<u8> {
        let mut out = Vec::new();
        let answer = Answer {
            choices: &self.choices,
            service_tier: None,
            usage,
            prompt_logprobs: self.prompt.as_ref(),
            kv_transfer_params: self.transfer.as_ref(),
            prompt_text: self.prompt_text.as_deref(),
            prompt_token_ids: self.prompt_token_ids.as_deref(),
        };
        self.opening.write(&answer, &mut out);
        out
    }
}
