//! What a GGUF file says of text: tokenizer, chat template, recommended sampling.
//!
//! A GGUF file carries the tokenizer as llama.cpp keeps it: tokens, their types, and merges or scores. [`tokenizer`] makes of
//! that what `tokenizer.json` would have said, so that everything behind it is the same for both.

mod split;
mod tokenizer;

use super::{
    GenerationDefaults, TextModel,
    embedding::EmbeddingShape,
    template::ChatTemplate,
    tokenizer::{Tokenizer, guarded},
};
use anyhow::{Context, bail};
use gguf::File;
use serde_json::{Map, Value as Json};
use std::{io::Read, path::Path, sync::OnceLock};

/// Most bytes before the weights: 20 times what the largest vocabularies take.
const MAX_HEADER_BYTES: u64 = 512 << 20;

/// Reads the file's metadata; of the weights, at most as much as came with the last piece.
pub(super) fn load(path: &Path) -> anyhow::Result<TextModel> {
    let mut source = std::fs::File::open(path)?;
    let file_bytes = source.metadata()?.len();
    let mut bytes = Vec::new();
    let mut wanted: u64 = 4 << 20;
    loop {
        (&mut source).take(wanted - bytes.len() as u64).read_to_end(&mut bytes)?;
        match File::parse(&bytes, file_bytes) {
            Err(gguf::Error::Incomplete(_)) if (bytes.len() as u64) < wanted => bail!("the file became shorter"),
            Err(gguf::Error::Incomplete(_)) if wanted < MAX_HEADER_BYTES => wanted *= 4,
            Ok(file) => return text_model(&file),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes a model's text of its metadata.
pub(super) fn text_model(file: &File<'_>) -> anyhow::Result<TextModel> {
    let architecture = file.text("general.architecture")?.context("metadata `general.architecture` is missing")?;
    let context = file.count(&format!("{architecture}.context_length"))?;
    let context_tokens = context.map_or(u32::MAX, |tokens| tokens.try_into().unwrap_or(u32::MAX));
    let vocabulary = tokenizer::Vocabulary::read(file)?;
    let tokenizer = guarded(|| Tokenizer::new(tokenizer::build(file, &vocabulary)?))?;
    let template = file.text("tokenizer.chat_template")?;
    let template = template.map(|source| ChatTemplate::compile(source, special_tokens(file, &vocabulary)?)).transpose();
    Ok(TextModel {
        tokenizer,
        template: template.context("metadata `tokenizer.chat_template`")?,
        defaults: defaults(file)?,
        eos: file.end_tokens()?,
        context_tokens,
        vocab_size: vocabulary.len() as u32,
        embedding: EmbeddingShape::of_gguf(file, architecture)?,
        fingerprint: format!("fp_{}", &blake3::hash(file.header()).to_hex()[..12]),
        grammars: OnceLock::new(),
    })
}

/// Returns the special tokens a template may name, by their names.
fn special_tokens(file: &File<'_>, vocabulary: &tokenizer::Vocabulary<'_>) -> anyhow::Result<Map<String, Json>> {
    const NAMES: [(&str, &str); 5] =
        [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")];
    let mut tokens = Map::new();
    for (name, key) in NAMES {
        if let Some(id) = vocabulary.id(file, &format!("tokenizer.ggml.{key}_token_id"))? {
            tokens.insert(format!("{name}_token"), vocabulary.text(id).into());
        }
    }
    Ok(tokens)
}

fn defaults(file: &File<'_>) -> anyhow::Result<GenerationDefaults> {
    let number = |name: &str| file.number(&format!("general.sampling.{name}"));
    let float = |name: &str| number(name).map(|value| value.map(|value| value as f32));
    Ok(GenerationDefaults {
        temperature: float("temp")?,
        top_p: float("top_p")?,
        top_k: number("top_k")?.map(|value| value as i64),
        min_p: float("min_p")?,
        repetition_penalty: float("penalty_repeat")?,
        ..GenerationDefaults::default()
    })
}
