//! A golden directory's tokenizer and template as metadata of a GGUF file, as llama.cpp's converter would write it.

use gguf::Writer;
use serde_json::Value as Json;
use std::{collections::BTreeMap, path::Path};

/// Returns the file, or `None` where GGUF cannot say what the directory does.
pub(super) fn convert(directory: &Path) -> Option<Vec<u8>> {
    let read = |name: &str| -> Json {
        serde_json::from_slice(&std::fs::read(directory.join(name)).expect("a golden file")).expect("JSON")
    };
    let (config, tokenizer, settings) = (read("config.json"), read("tokenizer.json"), read("tokenizer_config.json"));
    let model = &tokenizer["model"];
    let sentence_piece = model["byte_fallback"] == true;
    // Where the space goes that begins a text, GGUF can say in one way only.
    if tokenizer["pre_tokenizer"]["type"] == "Metaspace" {
        return None;
    }

    let vocab: BTreeMap<&str, u64> = entries(&model["vocab"]).map(|(text, id)| (text, id.as_u64().unwrap())).collect();
    let rows = config["vocab_size"].as_u64().unwrap();
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![5; rows as usize];
    for (&text, &id) in &vocab {
        tokens[id as usize] = text.to_owned();
        let byte = text.len() == 6 && text.starts_with("<0x");
        types[id as usize] = if byte && sentence_piece { 6 } else { 1 };
    }
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        tokens[id] = added["content"].as_str().unwrap().to_owned();
        let unknown = model["unk_token"] == added["content"];
        types[id] = if unknown {
            2
        } else if added["special"] == true {
            3
        } else {
            4
        };
    }
    let id_of = |text: &str| tokens.iter().position(|token| token == text).map(|id| id as u32);

    let mut writer = Writer::default();
    writer.text("general.architecture", "llama").u32("llama.context_length", 1024);
    writer.text("tokenizer.ggml.model", if sentence_piece { "llama" } else { "gpt2" });
    writer.texts("tokenizer.ggml.tokens", &tokens).i32s("tokenizer.ggml.token_type", &types);
    let merges: Vec<(&str, &str)> = model["merges"].as_array().unwrap().iter().map(pair).collect();
    if sentence_piece {
        let mut scores = vec![-1e6; tokens.len()];
        for (rank, (left, right)) in merges.iter().enumerate().rev() {
            scores[vocab[format!("{left}{right}").as_str()] as usize] = -(rank as f32);
        }
        writer.f32s("tokenizer.ggml.scores", &scores);
        let prefix = tokenizer["normalizer"]["normalizers"][0]["type"] == "Prepend";
        writer.flag("tokenizer.ggml.add_space_prefix", prefix);
    } else {
        let merges: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        writer.texts("tokenizer.ggml.merges", &merges).text("tokenizer.ggml.pre", words(&tokenizer)?);
    }
    for (name, key) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let token = &settings[format!("{name}_token")];
        let token = token.as_str().or_else(|| token["content"].as_str());
        if let Some(id) = token.and_then(id_of) {
            writer.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    writer.flag("tokenizer.ggml.add_bos_token", tokenizer["post_processor"].to_string().contains("TemplateProcessing"));
    if let Some(template) = settings["chat_template"].as_str() {
        writer.text("tokenizer.chat_template", template);
    }
    Some(writer.finish())
}

fn entries(map: &Json) -> impl Iterator<Item = (&str, &Json)> {
    map.as_object().unwrap().iter().map(|(key, value)| (key.as_str(), value))
}

fn pair(merge: &Json) -> (&str, &str) {
    match merge.as_str() {
        Some(text) => text.split_once(' ').unwrap(),
        None => (merge[0].as_str().unwrap(), merge[1].as_str().unwrap()),
    }
}

/// Names the way in which a byte-level tokenizer cuts words, if it has a name.
fn words(tokenizer: &Json) -> Option<&'static str> {
    let composed = tokenizer["normalizer"]["type"] == "NFC";
    let steps = tokenizer["pre_tokenizer"].to_string();
    match (steps.contains("Digits"), steps.contains("{1,3}"), steps.contains("Split"), composed) {
        (true, ..) => Some("command-r"),
        (_, true, ..) => Some("dbrx"),
        (_, _, true, true) => Some("qwen2"),
        (_, _, false, true) => Some("olmo"),
        _ => None,
    }
}
