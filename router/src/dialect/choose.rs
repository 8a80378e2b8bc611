//! Which dialect a model writes, told from its chat template: a template shows past calls and thoughts the way the model writes them.

use super::{
    ToolFormat,
    reasoning::{COHERE, DEEPSEEK_R1, MISTRAL, QWEN3, Thoughts},
};
use crate::config::{ReasoningParser, ToolCallParser};

pub(super) fn tools(configured: ToolCallParser, template: &str) -> Option<ToolFormat> {
    let has = |part: &str| template.contains(part);
    match configured {
        ToolCallParser::None => None,
        ToolCallParser::Hermes => Some(ToolFormat::Hermes),
        ToolCallParser::Llama3Json => Some(ToolFormat::Llama3Json),
        ToolCallParser::Mistral => Some(ToolFormat::Mistral),
        ToolCallParser::Pythonic => Some(ToolFormat::Pythonic),
        ToolCallParser::Qwen3Xml => Some(ToolFormat::Qwen3Xml),
        ToolCallParser::Cohere => Some(ToolFormat::Cohere),
        // The more telling marks first: Qwen3-Coder writes both of the first two.
        ToolCallParser::Auto if has("<function=") && has("<parameter=") => Some(ToolFormat::Qwen3Xml),
        ToolCallParser::Auto if has("<tool_call>") => Some(ToolFormat::Hermes),
        ToolCallParser::Auto if has("[TOOL_CALLS]") => Some(ToolFormat::Mistral),
        ToolCallParser::Auto if has("<|START_ACTION|>") || (has("Action:") && has("tool_name")) => {
            Some(ToolFormat::Cohere)
        }
        ToolCallParser::Auto if has("<|python_start|>") => Some(ToolFormat::Pythonic),
        ToolCallParser::Auto if has("<|start_header_id|>") && has("\"parameters\"") => Some(ToolFormat::Llama3Json),
        ToolCallParser::Auto => None,
    }
}

pub(super) fn thoughts(configured: ReasoningParser, template: &str) -> Option<&'static Thoughts> {
    let has = |part: &str| template.contains(part);
    match configured {
        ReasoningParser::None => None,
        ReasoningParser::DeepseekR1 => Some(&DEEPSEEK_R1),
        ReasoningParser::Qwen3 => Some(&QWEN3),
        ReasoningParser::Mistral => Some(&MISTRAL),
        ReasoningParser::Cohere => Some(&COHERE),
        ReasoningParser::Auto if has("</think>") && has("<｜Assistant｜>") => Some(&DEEPSEEK_R1),
        ReasoningParser::Auto if has("</think>") => Some(&QWEN3),
        ReasoningParser::Auto if has("[THINK]") => Some(&MISTRAL),
        ReasoningParser::Auto if has("<|START_THINKING|>") => Some(&COHERE),
        ReasoningParser::Auto => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_of_real_models_are_told_apart() {
        let check = |model: &str, expected: Option<ToolFormat>, thinks: Option<&'static Thoughts>| {
            let path = format!("{}/../{model}/tokenizer_config.json", env!("CARGO_MANIFEST_DIR"));
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            let template = config["chat_template"].as_str().unwrap_or_default();
            let found = (tools(ToolCallParser::Auto, template), thoughts(ReasoningParser::Auto, template));
            assert_eq!(found, (expected, thinks), "{model}");
        };
        check("models/demo", Some(ToolFormat::Hermes), None);
        check("tests/golden/qwen3", Some(ToolFormat::Hermes), Some(&QWEN3));
        check("tests/golden/llama3", Some(ToolFormat::Llama3Json), None);
        check("tests/golden/mistral", Some(ToolFormat::Mistral), None);
        check("tests/golden/gemma2", None, None);
    }

    #[test]
    fn what_is_configured_holds() {
        assert_eq!(tools(ToolCallParser::None, "<tool_call>"), None);
        assert_eq!(tools(ToolCallParser::Pythonic, "<tool_call>"), Some(ToolFormat::Pythonic));
        assert_eq!(tools(ToolCallParser::Auto, "<tool_call><function=x><parameter=y>"), Some(ToolFormat::Qwen3Xml));
        assert_eq!(thoughts(ReasoningParser::None, "</think>"), None);
        assert_eq!(thoughts(ReasoningParser::Auto, "<｜Assistant｜></think>"), Some(&DEEPSEEK_R1));
    }
}
