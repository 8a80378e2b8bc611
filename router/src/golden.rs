//! Text against recorded references: every family's tokenizer, template and stream (`tests/golden/README.md`).

mod gguf;

use crate::text::{TextModel, detokenizer::Detokenizer, template::ChatInput};
use proptest::test_runner::{Config, TestRunner};
use serde::Deserialize;
use serde_json::{Map, Value as Json};
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Expected {
    round_trips: Vec<RoundTrip>,
    streaming: Vec<Streaming>,
    #[serde(default)]
    chat: Vec<Chat>,
}

#[derive(Deserialize)]
struct RoundTrip {
    text: String,
    ids: Vec<u32>,
    ids_no_special: Vec<u32>,
    decode: String,
    decode_skip_special: String,
}

#[derive(Deserialize)]
struct Streaming {
    ids: Vec<u32>,
    deltas: Vec<String>,
    flush: String,
    full: String,
}

#[derive(Deserialize)]
struct Chat {
    name: String,
    messages: Vec<Json>,
    #[serde(default)]
    tools: Vec<Json>,
    add_generation_prompt: bool,
    enable_thinking: Option<bool>,
    prompt: Option<String>,
    ids: Option<Vec<u32>>,
    error: Option<String>,
}

/// Calls `check` with every directory that has recorded text, and with the same tokenizer and template out of a GGUF file.
fn for_each_family(mut check: impl FnMut(&str, &TextModel, Expected)) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let golden =
        std::fs::read_dir(root.join("tests/golden")).expect("golden vectors").map(|entry| entry.unwrap().path());
    let directories: Vec<PathBuf> =
        golden.chain([root.join("models/demo")]).filter(|d| d.join("expected_text.json").exists()).collect();
    let scratch = tempfile::tempdir().unwrap();
    assert!(directories.len() >= 16, "only {} families found", directories.len());
    let mut converted = 0;
    for directory in directories {
        let expected = std::fs::read_to_string(directory.join("expected_text.json")).unwrap();
        let model = TextModel::load(&directory).unwrap();
        let family = directory.file_name().unwrap().to_string_lossy().into_owned();
        check(&family, &model, serde_json::from_str(&expected).unwrap());
        let Some(file) = gguf::convert(&directory) else { continue };
        let path = scratch.path().join(format!("{family}.gguf"));
        std::fs::write(&path, file).unwrap();
        let model = TextModel::load(&path).unwrap_or_else(|error| panic!("{family}: {error:#}"));
        check(&format!("{family}.gguf"), &model, serde_json::from_str(&expected).unwrap());
        converted += 1;
    }
    assert!(converted >= 12, "only {converted} families as GGUF");
}

#[test]
fn texts_round_trip() {
    for_each_family(|family, model, expected| {
        for case in expected.round_trips {
            let tokenizer = &model.tokenizer;
            assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.ids, "{family}: {:?}", case.text);
            assert_eq!(tokenizer.encode(&case.text, false).unwrap(), case.ids_no_special, "{family}: {:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ids_no_special, false), case.decode, "{family}: {:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ids, true), case.decode_skip_special, "{family}: {:?}", case.text);
        }
    });
}

#[test]
fn streams_read_like_the_whole_and_never_break_a_character() {
    for_each_family(|family, model, expected| {
        for case in expected.streaming {
            let mut detokenizer = Detokenizer::new(&model.tokenizer, &[], true);
            let (mut text, mut reference) = (String::new(), String::new());
            for (&id, delta) in case.ids.iter().zip(&case.deltas) {
                detokenizer.push(&model.tokenizer, id, &mut text);
                reference.push_str(delta);
                assert!(case.full.starts_with(&text), "{family}: {text:?} is not how {:?} begins", case.full);
                // Nothing is held back longer than the usual method would.
                assert!(text.len() >= reference.len(), "{family}: {text:?} lags behind {reference:?}");
            }
            assert_eq!(format!("{reference}{}", case.flush), case.full, "{family}: the recording itself");
            detokenizer.finish(&model.tokenizer, &mut text);
            assert_eq!(text, case.full, "{family}");
        }
    });
}

#[test]
fn chats_render_and_tokenise_exactly() {
    for_each_family(|family, model, expected| {
        for case in expected.chat {
            let mut variables = Map::new();
            if let Some(thinking) = case.enable_thinking {
                variables.insert("enable_thinking".into(), thinking.into());
            }
            let input = ChatInput {
                messages: case.messages,
                tools: case.tools,
                add_generation_prompt: case.add_generation_prompt,
                variables,
                ..ChatInput::default()
            };
            let rendered = model.template.as_ref().expect("a chat template").render(&input);
            match (rendered, case.prompt, case.error) {
                (Ok(prompt), Some(expected), None) => {
                    assert_eq!(prompt, expected, "{family}: {}", case.name);
                    assert_eq!(
                        Some(model.tokenizer.encode(&prompt, false).unwrap()),
                        case.ids,
                        "{family}: {}",
                        case.name
                    );
                }
                (Err(message), None, Some(expected)) => assert_eq!(message, expected, "{family}: {}", case.name),
                (got, prompt, error) => {
                    panic!("{family}: {}: got {got:?}, expected {prompt:?} or {error:?}", case.name)
                }
            }
        }
    });
}

/// Text of many scripts, with what tokenizers treat specially.
const SCRIPTS: &str =
    "Hello world, größe  naïve\n\tтекст 日本語 한국어 😀👩\u{200d}👩\u{200d}👧 <|im_end|> </s> 1234 ▁x";

#[test]
fn output_reads_on_where_the_prompt_ends() {
    for_each_family(|family, model, _| {
        let tokenizer = &model.tokenizer;
        let ids = tokenizer.encode("Once upon a time there was a river", false).unwrap();
        let whole = tokenizer.decode(&ids, true);
        for cut in 1..ids.len() {
            let mut detokenizer = Detokenizer::new(tokenizer, &ids[..cut], true);
            let mut text = String::new();
            ids[cut..].iter().for_each(|&id| detokenizer.push(tokenizer, id, &mut text));
            detokenizer.finish(tokenizer, &mut text);
            assert_eq!(tokenizer.decode(&ids[..cut], true) + &text, whole, "{family}: cut at {cut}");
        }
    });
}

#[test]
fn any_tokens_stream_like_the_whole() {
    let chars: Vec<char> = SCRIPTS.chars().collect();
    for_each_family(|family, model, _| {
        let tokenizer = &model.tokenizer;
        let mut runner = TestRunner::new(Config { cases: 32, failure_persistence: None, ..Config::default() });
        let texts = proptest::collection::vec(proptest::sample::select(chars.clone()), 0..60);
        let ids = proptest::collection::vec(0..tokenizer.vocab_size() as u32, 0..60);
        let check = |ids: &[u32]| {
            let (mut detokenizer, mut text) = (Detokenizer::new(tokenizer, &[], true), String::new());
            ids.iter().for_each(|&id| detokenizer.push(tokenizer, id, &mut text));
            detokenizer.finish(tokenizer, &mut text);
            proptest::prop_assert_eq!(text, tokenizer.decode(ids, true), "{}", family);
            Ok(())
        };
        let text_case = |chars: Vec<char>| check(&tokenizer.encode(&String::from_iter(chars), false).unwrap());
        runner.run(&texts, text_case).unwrap();
        if tokenizer.is_byte_level() {
            // Elsewhere a decoder's verdict on a broken character reaches back to text that was already shown.
            runner.run(&ids, |ids| check(&ids)).unwrap();
        }
    });
}
