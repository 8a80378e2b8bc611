//! Chat templates, as Hugging Face writes them.
//!
//! Templates are Jinja with Python underneath: string methods, `tojson` as `json.dumps` prints, `raise_exception`,
//! `strftime_now`, and `{% generation %}` marks that only training needs. A template runs on a client's input, so it runs with
//! limits of steps and recursion and sees nothing but what it is given.

use super::python;
use minijinja::{Environment, Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::{Map, Value as Json};

/// Instructions of the template engine that one prompt may take: about a second. A thousand messages take a tenth of it.
const MOST_STEPS: u64 = 10_000_000;

const NAME: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like, by name.
    special_tokens: Map<String, Json>,
    source: String,
}

/// What a template is rendered with.
#[derive(Debug, Default)]
pub(crate) struct ChatInput {
    /// Messages as the client gave them, contents flattened to strings.
    pub(crate) messages: Vec<Json>,
    /// Tool descriptions; empty means none.
    pub(crate) tools: Vec<Json>,
    /// Retrieved documents; empty means none.
    pub(crate) documents: Vec<Json>,
    /// Whether the assistant's header follows the last message.
    pub(crate) add_generation_prompt: bool,
    /// Whether the last message is the beginning of the answer.
    pub(crate) continue_final_message: bool,
    /// Further variables of the template (`enable_thinking`, ...).
    pub(crate) variables: Map<String, Json>,
}

impl ChatInput {
    /// Returns the text that an answer goes on from, where the last message is the assistant's.
    pub(crate) fn begun_answer(&self) -> String {
        let last = self.messages.last().filter(|message| message["role"] == "assistant");
        last.and_then(|message| message["content"].as_str()).unwrap_or_default().to_owned()
    }
}

/// Variables as the template sees them. Absent ones are left out, because templates ask `is defined`.
#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [Json],
    tools: Option<&'a [Json]>,
    documents: Option<&'a [Json]>,
    add_generation_prompt: bool,
    #[serde(flatten)]
    special_tokens: &'a Map<String, Json>,
    #[serde(flatten)]
    variables: &'a Map<String, Json>,
}

impl ChatTemplate {
    /// Compiles `source`.
    pub(crate) fn compile(source: &str, special_tokens: Map<String, Json>) -> anyhow::Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_recursion_limit(100);
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| python::strftime(&format, python::now()));
        environment
            .add_template_owned(NAME, strip_generation_marks(source))
            .map_err(|e| anyhow::anyhow!("compile chat template: {}", explain(&e)))?;
        Ok(Self { environment, special_tokens, source: source.to_owned() })
    }

    /// Returns the template's text.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Returns the prompt. The error is what the template itself said, or what it tripped over.
    pub(crate) fn render(&self, input: &ChatInput) -> Result<String, String> {
        let context = Context {
            messages: &input.messages,
            tools: some_unless_empty(&input.tools),
            documents: some_unless_empty(&input.documents),
            add_generation_prompt: input.add_generation_prompt,
            special_tokens: &self.special_tokens,
            variables: &input.variables,
        };
        let template = self.environment.get_template(NAME).map_err(|e| explain(&e))?;
        let prompt = template.render(context).map_err(|e| explain(&e))?;
        if input.continue_final_message { cut_after_last_message(prompt, &input.messages) } else { Ok(prompt) }
    }
}

fn some_unless_empty(list: &[Json]) -> Option<&[Json]> {
    (!list.is_empty()).then_some(list)
}

/// Cuts the prompt behind the last message's content, so that generation goes on inside it.
fn cut_after_last_message(mut prompt: String, messages: &[Json]) -> Result<String, String> {
    let content = messages.last().and_then(|m| m.get("content")).and_then(Json::as_str).unwrap_or_default().trim();
    match prompt.rfind(content) {
        Some(at) if !content.is_empty() => {
            prompt.truncate(at + content.len());
            Ok(prompt)
        }
        _ => Err("continue_final_message: the last message's content does not appear in the rendered prompt".into()),
    }
}

/// Removes `{% generation %}` and `{% endgeneration %}`, keeping the whitespace control of the tags.
fn strip_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open + 2..].find("%}").map(|end| end + 4) else { break };
        let tag = &rest[open..open + length];
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        out.push_str(&rest[..open]);
        if matches!(word, "generation" | "endgeneration") {
            // A comment is trimmed like a block and prints nothing.
            let (left, right) = (inner.starts_with('-'), inner.ends_with('-'));
            out.push_str(if left { "{#-" } else { "{#" });
            out.push_str(if right { "-#}" } else { "#}" });
        } else {
            out.push_str(tag);
        }
        rest = &rest[open + length..];
    }
    out.push_str(rest);
    out
}

/// `tojson` as `transformers` registers it: `json.dumps` with `ensure_ascii=False` unless told.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let style = python::JsonStyle {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: kwargs.get::<Option<usize>>("indent")?,
        separators: separators(kwargs.get("separators")?)?,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")).with_source(e))?;
    Ok(Value::from_safe_string(style.dumps(&json)))
}

/// A pair, as Python has it.
fn separators(value: Option<Vec<String>>) -> Result<Option<(String, String)>, Error> {
    match value.map(<[String; 2]>::try_from) {
        None => Ok(None),
        Some(Ok([comma, colon])) => Ok(Some((comma, colon))),
        Some(Err(other)) => {
            let problem = format!("tojson: separators must be two strings, not {}", other.len());
            Err(Error::new(ErrorKind::InvalidOperation, problem))
        }
    }
}

/// The message a template gave with `raise_exception`, or minijinja's, with its line.
fn explain(error: &Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("it takes more than {MOST_STEPS} steps"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, input: &ChatInput) -> Result<String, String> {
        ChatTemplate::compile(source, Map::new()).unwrap().render(input)
    }

    #[test]
    fn generation_marks_leave_no_trace() {
        let source = "a\n{% generation %}\nb{%- endgeneration -%}  c";
        assert_eq!(render(source, &ChatInput::default()).unwrap(), "a\nbc");
        for odd in ["{%}", "{%", "{%%}", "x{%}%}"] {
            assert_eq!(strip_generation_marks(odd), odd, "what is no tag stays");
        }
    }

    #[test]
    fn tools_print_as_python_prints_them() {
        let source = "{{ tools[0] | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(separators=(',', ':')) }}";
        let input = ChatInput { tools: vec![json!({"b": 1.0, "a": ["<é>", null, true]})], ..ChatInput::default() };
        assert_eq!(
            render(source, &input).unwrap(),
            "{\"b\": 1.0, \"a\": [\"<é>\", null, true]}[\n  {\n    \"b\": 1.0,\n    \"a\": [\n      \"<é>\",\n      null,\n      true\n    ]\n  }\n][{\"b\":1.0,\"a\":[\"<é>\",null,true]}]"
        );
    }

    #[test]
    fn a_refusal_is_the_templates_own_words() {
        let error = render("{{ raise_exception('System role not supported') }}", &ChatInput::default()).unwrap_err();
        assert_eq!(error, "System role not supported");
    }

    #[test]
    fn a_continued_message_ends_the_prompt() {
        let source = "{% for m in messages %}<{{ m.content }}>{% endfor %}";
        let input = ChatInput {
            messages: vec![
                json!({"role": "user", "content": "x"}),
                json!({"role": "assistant", "content": "The answer"}),
            ],
            continue_final_message: true,
            ..ChatInput::default()
        };
        assert_eq!(render(source, &input).unwrap(), "<x><The answer");
    }

    #[test]
    fn an_endless_loop_is_an_error() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let error = render(source, &ChatInput::default()).unwrap_err();
        assert!(error.contains("10000000 steps"), "{error}");
    }

    #[test]
    fn endless_recursion_is_an_error() {
        let error = render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", &ChatInput::default()).unwrap_err();
        assert!(error.contains("recursion"), "{error}");
    }
}
