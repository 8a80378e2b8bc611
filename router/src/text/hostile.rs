//! Models made to break the reader: what stands in `tokenizer.json` or a GGUF file is refused by name, or read.

use super::TextModel;
use gguf::Writer;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, path::Path};

/// The metadata of a small vocabulary of each kind.
fn writer(kind: &str) -> Writer {
    let mut writer = Writer::default();
    writer.text("general.architecture", "llama").u32("llama.context_length", 64).text("tokenizer.ggml.model", kind);
    writer
}

fn load(file: &[u8]) -> anyhow::Result<TextModel> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, file).unwrap();
    TextModel::load(&path)
}

fn refused(writer: &Writer, words: &[&str]) {
    let error = format!("{:#}", load(&writer.finish()).expect_err("a bad file"));
    words.iter().chain(&["model.gguf"]).for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
}

#[test]
fn problems_of_gguf_files_name_the_key() {
    refused(&Writer::default(), &["general.architecture"]);
    refused(&writer("bert"), &["tokenizer.ggml.tokens"]);
    let tokens = |kind: &str, tokens: &[&str]| {
        let mut writer = writer(kind);
        writer.texts("tokenizer.ggml.tokens", tokens);
        writer
    };
    refused(&tokens("bert", &["a"]), &["tokenizer.ggml.model", "bert", "gpt2, llama"]);
    refused(tokens("gpt2", &["a"]).text("tokenizer.ggml.pre", "other"), &["tokenizer.ggml.pre", "other", "qwen2"]);
    refused(&tokens("gpt2", &["a"]), &["tokenizer.ggml.merges", "missing"]);
    refused(tokens("gpt2", &["a"]).texts("tokenizer.ggml.merges", &["a"]), &["tokenizer.ggml.merges", "entry 0"]);
    refused(tokens("gpt2", &["a"]).texts("tokenizer.ggml.merges", &["a b"]), &["tokenizer.ggml.merges", "`b`"]);
    refused(&tokens("llama", &["a"]), &["tokenizer.ggml.scores", "missing"]);
    refused(tokens("llama", &["a"]).f32s("tokenizer.ggml.scores", &[0.0; 2]), &["tokenizer.ggml.scores", "2", "1"]);
    refused(tokens("llama", &["a"]).f32s("tokenizer.ggml.scores", &[f32::NAN]), &["tokenizer.ggml.scores", "entry 0"]);
    refused(tokens("llama", &["a", "b", "a"]).f32s("tokenizer.ggml.scores", &[0.0; 3]), &["tokens 0 and 2", "\"a\""]);
    let long = "x".repeat(2000);
    refused(tokens("llama", &[&long]).f32s("tokenizer.ggml.scores", &[0.0]), &["token 0", "2000"]);
    refused(tokens("gpt2", &["a"]).i32s("tokenizer.ggml.token_type", &[1, 1]), &["tokenizer.ggml.token_type", "2"]);
    refused(tokens("gpt2", &["a"]).i32s("tokenizer.ggml.token_type", &[9]), &["tokenizer.ggml.token_type", "entry 0"]);

    let good = || {
        let mut writer = tokens("gpt2", &["a", "b", "ab"]);
        writer.texts("tokenizer.ggml.merges", &["a b"]);
        writer
    };
    let model = load(&good().finish()).unwrap();
    assert_eq!(model.tokenizer.encode("abb", true).unwrap(), [2, 1]);
    assert_eq!((model.vocab_size, model.context_tokens), (3, 64));
    refused(good().u32("tokenizer.ggml.bos_token_id", 3), &["tokenizer.ggml.bos_token_id", "3"]);
    refused(good().text("tokenizer.ggml.add_bos_token", "no"), &["tokenizer.ggml.add_bos_token", "no"]);
    refused(good().text("tokenizer.chat_template", "{% if"), &["tokenizer.chat_template"]);
    refused(good().text("llama.context_length", "long"), &["llama.context_length"]);
    let bytes = good().finish();
    for length in 0..bytes.len() - 64 {
        assert!(load(&bytes[..length]).is_err(), "cut after {length}");
    }
}

#[test]
fn a_decoder_that_strips_more_than_there_is_shows_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let strip = serde_json::json!({"type": "Strip", "content": "a", "start": 2, "stop": 2});
    let model = serde_json::json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "aa": 2, "aaa": 3}, "merges": []});
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [], "decoder": strip, "model": model});
    fs::write(dir.path().join("config.json"), r#"{"vocab_size": 4}"#).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let model = TextModel::load(dir.path()).unwrap();
    for token in 0..4 {
        assert!(model.tokenizer.decode(&[token], true).len() <= 3);
    }
}

/// Loads the file or directory at `path` and uses what came of it.
fn load_and_use(path: &Path) {
    let Ok(model) = TextModel::load(path) else { return };
    if let Ok(ids) = model.tokenizer.encode("Hello <s> wörld 12\n", true) {
        model.tokenizer.decode(&ids, true);
    }
}

#[test]
fn mutations_are_refused_or_read() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"vocab_size": 64}"#).unwrap();
    let file = dir.path().join("model.gguf");
    let mut random = StdRng::seed_from_u64(1);
    for kind in ["gguf", "tokenizer"] {
        for seed in fs::read_dir(seeds.join(kind)).unwrap() {
            let good = fs::read(seed.unwrap().path()).unwrap();
            for _ in 0..400 {
                let mut bytes = good.clone();
                for _ in 0..random.random_range(1..4) {
                    mutate(&mut bytes, &mut random);
                }
                if kind == "gguf" {
                    fs::write(&file, bytes).unwrap();
                    load_and_use(&file);
                } else {
                    let mut parts = bytes.split(|byte| *byte == 0);
                    fs::write(dir.path().join("tokenizer.json"), parts.next().unwrap_or_default()).unwrap();
                    fs::write(dir.path().join("tokenizer_config.json"), parts.next().unwrap_or(b"{}")).unwrap();
                    load_and_use(dir.path());
                }
            }
        }
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
    const NUMBERS: [&[u8]; 5] = [b"-1", b"1e99", b"null", b"18446744073709551615", b"[]"];
    let at = random.random_range(0..bytes.len().clamp(1, 4096)).min(bytes.len().saturating_sub(1));
    match random.random_range(0..6) {
        0 => bytes[at] = random.random(),
        1 => bytes[at] ^= 1 << random.random_range(0..8),
        2 => bytes.truncate(at.max(1)),
        3 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
        4 => drop(bytes.splice(at..at, NUMBERS[random.random_range(0..NUMBERS.len())].iter().copied())),
        _ => drop(bytes.splice(at..(at + 3).min(bytes.len()), [])),
    }
    if bytes.is_empty() {
        bytes.push(b'{');
    }
}
