//! What a model's files say of its embeddings: `modules.json` as sentence-transformers writes it, or a GGUF file's `pooling_type`.
//!
//! Any decoder has hidden states; of one whose files say nothing they make poor embeddings, so nothing is taken for granted.

use super::{parse, read};
use crate::fleet::leg::Pooling;
use gguf::File;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;

/// What is said.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct EmbeddingShape {
    /// How hidden states are pooled; `None` = nothing is said, or what we do not serve.
    pub(crate) pooling: Option<Pooling>,
    /// Numbers in a vector, where that is known.
    pub(crate) dimensions: Option<u32>,
    pub(crate) shorter: Shorter,
}

/// Whether the first numbers of a vector are an embedding, too (matryoshka representation, arXiv 2205.13147).
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Shorter {
    #[default]
    No,
    Any,
    These(Vec<u32>),
}

/// The fields of `config.json` that matter here; the names are those vLLM reads.
#[derive(Debug, Deserialize)]
struct Matryoshka {
    #[serde(default)]
    is_matryoshka: bool,
    matryoshka_dimensions: Option<Vec<u32>>,
}

#[derive(Debug, Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl EmbeddingShape {
    /// Reads a model's directory, whose `config.json` is `config` and whose vectors have so many `dimensions`.
    pub(super) fn read(dir: &Path, config: &str, dimensions: Option<u32>) -> anyhow::Result<Self> {
        let path = dir.join("modules.json");
        let modules: Vec<Module> = if path.exists() { parse(&path, &read(&path)?)? } else { Vec::new() };
        let Matryoshka { is_matryoshka, matryoshka_dimensions } = parse(&dir.join("config.json"), config)?;
        let shorter = match matryoshka_dimensions {
            Some(known) => Shorter::These(known),
            None if is_matryoshka => Shorter::Any,
            None => Shorter::No,
        };
        Ok(Self { pooling: pooling(dir, &modules)?, dimensions, shorter })
    }

    /// Reads a GGUF file of this architecture.
    pub(super) fn of_gguf(file: &File<'_>, architecture: &str) -> anyhow::Result<Self> {
        // llama.cpp, `enum llama_pooling_type`.
        let pooling = match file.count(&format!("{architecture}.pooling_type"))? {
            Some(1) => Some(Pooling::Mean),
            Some(3) => Some(Pooling::Last),
            _ => None,
        };
        let dimensions = file.count(&format!("{architecture}.embedding_length"))?;
        Ok(Self { pooling, dimensions: dimensions.and_then(|count| count.try_into().ok()), shorter: Shorter::No })
    }
}

/// Hidden states are pooled and brought to length 1; anything beside that would be another embedding.
fn pooling(dir: &Path, modules: &[Module]) -> anyhow::Result<Option<Pooling>> {
    let kind = |module: &Module| module.kind.rsplit('.').next().unwrap_or_default().to_owned();
    let Some(pooling) = modules.iter().find(|module| kind(module) == "Pooling") else { return Ok(None) };
    if let Some(other) =
        modules.iter().map(kind).find(|kind| !["Transformer", "Pooling", "Normalize"].contains(&&kind[..]))
    {
        tracing::warn!(
            module = other,
            "this model's embeddings are not served: modules.json has a module that is not known here"
        );
        return Ok(None);
    }
    let path = dir.join(&pooling.path).join("config.json");
    let config: Map<String, Value> = parse(&path, &read(&path)?)?;
    let modes: Vec<&str> = config
        .iter()
        .filter(|(_, value)| **value == Value::Bool(true))
        .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
        .chain(config.get("pooling_mode").and_then(Value::as_str))
        .collect();
    match modes[..] {
        ["lasttoken"] => Ok(Some(Pooling::Last)),
        ["mean_tokens" | "mean"] => Ok(Some(Pooling::Mean)),
        _ => {
            tracing::warn!(
                ?modes,
                "this model's embeddings are not served: only the last token and the mean are known here"
            );
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Reads a directory with these files.
    fn shape(config: &str, files: &[(&str, &str)]) -> anyhow::Result<EmbeddingShape> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("1_Pooling")).unwrap();
        for (path, text) in files {
            fs::write(dir.path().join(path), text).unwrap();
        }
        EmbeddingShape::read(dir.path(), config, Some(64))
    }

    const MODULES: (&str, &str) = (
        "modules.json",
        r#"[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#,
    );

    fn pooled(config: &str) -> Option<Pooling> {
        shape("{}", &[MODULES, ("1_Pooling/config.json", config)]).unwrap().pooling
    }

    #[test]
    fn sentence_transformers_files_say_how_states_are_pooled() {
        // Qwen3-Embedding's file, and the shorter form of newer releases.
        let last = r#"{"word_embedding_dimension": 64, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": false,
            "pooling_mode_lasttoken": true, "include_prompt": true}"#;
        assert_eq!(pooled(last), Some(Pooling::Last));
        assert_eq!(pooled(r#"{"pooling_mode_mean_tokens": true}"#), Some(Pooling::Mean));
        assert_eq!(pooled(r#"{"pooling_mode": "lasttoken"}"#), Some(Pooling::Last));
        assert_eq!(pooled(r#"{"pooling_mode_cls_token": true}"#), None);
        assert_eq!(pooled(r#"{"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": true}"#), None);
    }

    #[test]
    fn a_model_that_says_nothing_has_no_embeddings() {
        assert_eq!(shape("{}", &[]).unwrap().pooling, None);
        let dense = MODULES.1.replace("models.Normalize", "models.Dense");
        let files = [("modules.json", &dense[..]), ("1_Pooling/config.json", r#"{"pooling_mode_lasttoken": true}"#)];
        assert_eq!(shape("{}", &files).unwrap().pooling, None);
        let error = format!("{:#}", shape("{}", &[("modules.json", "{}")]).unwrap_err());
        assert!(error.contains("modules.json"), "{error}");
    }

    #[test]
    fn matryoshka_models_say_so() {
        let shorter = |config: &str| shape(config, &[]).unwrap().shorter;
        assert_eq!(shorter("{}"), Shorter::No);
        assert_eq!(shorter(r#"{"is_matryoshka": true}"#), Shorter::Any);
        assert_eq!(shorter(r#"{"matryoshka_dimensions": [32, 16]}"#), Shorter::These(vec![32, 16]));
    }
}
