//! Checkpoints made to break the reader: whatever stands in a file, it is refused by name, or loaded.

use crate::{Error, Model};
use ::gguf::{TensorType, Writer};
use serde_json::{Value, json};
use std::{fs, path::Path};
use tempfile::TempDir;

/// Tensors of a Llama of one layer, hidden 8, two heads of 4.
const TENSORS: [(&str, &str, &[usize]); 12] = [
    ("model.embed_tokens.weight", "token_embd.weight", &[6, 8]),
    ("model.norm.weight", "output_norm.weight", &[8]),
    ("lm_head.weight", "output.weight", &[6, 8]),
    ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", &[8]),
    ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", &[8]),
    ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", &[8, 8]),
    ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", &[4, 8]),
    ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", &[4, 8]),
    ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", &[8, 8]),
    ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", &[4, 8]),
    ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", &[4, 8]),
    ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", &[8, 4]),
];

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 6, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
    })
}

/// Returns a safetensors file with `header` and `bytes` bytes of zeros.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

/// Returns the header and the length of the data of the tensors that `keep` keeps.
fn header(keep: impl Fn(&str) -> bool) -> (Value, usize) {
    let (mut header, mut end) = (json!({}), 0);
    for (name, _, shape) in TENSORS.iter().filter(|(name, ..)| keep(name)) {
        let start = end;
        end += shape.iter().product::<usize>() * 4;
        header[name] = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
    }
    (header, end)
}

fn gguf() -> Vec<u8> {
    let mut writer = Writer::default();
    writer.text("general.architecture", "llama");
    for (key, value) in [
        ("embedding_length", 8),
        ("block_count", 1),
        ("feed_forward_length", 4),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("context_length", 16),
    ] {
        writer.u32(&format!("llama.{key}"), value);
    }
    writer.f32("llama.rope.freq_base", 1e4).texts("tokenizer.ggml.tokens", &["a", "b", "<|im_end|>"]);
    writer.i32s("tokenizer.ggml.token_type", &[1, 1, 3]).u32("tokenizer.ggml.eos_token_id", 1);
    for (_, name, shape) in TENSORS {
        writer.tensor(name, shape, TensorType::F32, &vec![0; shape.iter().product::<usize>() * 4]);
    }
    writer.finish()
}

struct Directory(TempDir);

impl Directory {
    /// A directory with one file of all tensors.
    fn single() -> Self {
        let (header, bytes) = header(|_| true);
        let directory = Self(tempfile::tempdir().expect("a directory"));
        directory.write("config.json", config().to_string().as_bytes());
        directory.write("model.safetensors", &safetensors(&header.to_string(), bytes));
        directory
    }

    /// A directory with two shards, the norms in the second.
    fn sharded() -> Self {
        let directory = Self(tempfile::tempdir().expect("a directory"));
        directory.write("config.json", config().to_string().as_bytes());
        let mut index = json!({"weight_map": {}});
        for (file, norms) in [("one.safetensors", false), ("two.safetensors", true)] {
            let (header, bytes) = header(|name| name.contains("norm") == norms);
            directory.write(file, &safetensors(&header.to_string(), bytes));
            header.as_object().expect("an object").keys().for_each(|name| index["weight_map"][name] = file.into());
        }
        directory.write("model.safetensors.index.json", index.to_string().as_bytes());
        directory
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.path().join(name), bytes).expect("written");
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).expect("a file")
    }

    /// Checks that loading is refused with an error about `file` that contains all `words`.
    fn refused(&self, file: &str, words: &[&str]) {
        let error = load(self.0.path()).expect_err("a bad checkpoint");
        let Error::Checkpoint { path, problem } = &error else { panic!("{error:?}") };
        assert!(path.ends_with(file), "{} is not {file}: {problem}", path.display());
        words.iter().for_each(|word| assert!(problem.contains(word), "{problem:?} lacks {word:?}"));
    }
}

fn load(path: &Path) -> Result<(), Error> {
    Model::load(path, &mut |_| {}).map(drop)
}

#[test]
fn the_small_checkpoints_are_good() {
    load(Directory::single().0.path()).expect("a good directory");
    load(Directory::sharded().0.path()).expect("good shards");
    let directory = Directory::single();
    directory.write("model.gguf", &gguf());
    load(&directory.0.path().join("model.gguf")).expect("a good file");
}

#[test]
fn headers_that_lie_about_lengths() {
    let check = |bytes: &[u8], words: &[&str]| {
        let directory = Directory::single();
        directory.write("model.safetensors", bytes);
        directory.refused("model.safetensors", words);
    };
    let good = Directory::single().read("model.safetensors");
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 32, good.len() as u64, 0] {
        check(&[&length.to_le_bytes()[..], &good[8..]].concat(), &[]);
    }
    check(&[], &["truncated", "0 bytes"]);
    check(&good[..good.len() - 1], &["truncated", &good.len().to_string()]);
    check(&[&good[..], &[0]].concat(), &["expected"]);

    let with = |change: fn(&mut Value)| {
        let (mut header, bytes) = header(|_| true);
        change(&mut header);
        safetensors(&header.to_string(), bytes)
    };
    check(&with(|header| header["lm_head.weight"]["shape"] = json!([1_u64 << 40, 1_u64 << 40])), &[]);
    check(&with(|header| header["lm_head.weight"]["shape"] = json!([-1, 8])), &[]);
    check(&with(|header| header["lm_head.weight"]["data_offsets"] = json!([9, 5])), &[]);
    check(&with(|header| header["lm_head.weight"]["data_offsets"] = json!([0, u64::MAX])), &[]);
    check(&with(|header| header["lm_head.weight"]["dtype"] = json!("I64")), &[]);
    check(&with(|header| *header = json!([])), &["not a safetensors file"]);
}

#[test]
fn names_that_stand_twice() {
    let (header, bytes) = header(|_| true);
    let text = header.to_string();
    let first = json!({"dtype": "F32", "shape": [6, 8], "data_offsets": [0, 192]});
    let twice = text.replacen('{', &format!("{{\"lm_head.weight\":{first},"), 1);
    let directory = Directory::single();
    directory.write("model.safetensors", &safetensors(&twice, bytes));
    directory.refused("model.safetensors", &["lm_head.weight", "twice"]);

    let directory = Directory::sharded();
    let (all, bytes) = self::header(|_| true);
    directory.write("two.safetensors", &safetensors(&all.to_string(), bytes));
    directory.refused("two.safetensors", &["one.safetensors", "as well"]);

    let directory = Directory::sharded();
    let index = String::from_utf8(directory.read("model.safetensors.index.json")).expect("UTF-8");
    let index = index.replacen(":{", ":{\"lm_head.weight\":\"two.safetensors\",", 1);
    directory.write("model.safetensors.index.json", index.as_bytes());
    directory.refused("model.safetensors.index.json", &["lm_head.weight", "twice"]);
}

#[test]
fn sizes_that_no_model_has() {
    for (field, value) in [
        ("num_hidden_layers", json!(1 << 27)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("vocab_size", json!(1_u64 << 40)),
        ("hidden_size", json!(-8)),
        ("num_attention_heads", json!(0)),
        ("head_dim", json!(1_000_000)),
        ("rope_theta", json!("NaN")),
        ("max_position_embeddings", json!(0)),
    ] {
        let directory = Directory::single();
        let mut config = config();
        config[field] = value.clone();
        directory.write("config.json", config.to_string().as_bytes());
        let error = load(directory.0.path()).expect_err("a bad config").to_string();
        assert!(error.contains("config.json"), "{field} {value}: {error}");
    }
}

/// Changes a few bytes, or cuts the file, or inserts numbers that matter.
fn mutate(bytes: &mut Vec<u8>, random: &mut impl FnMut(usize) -> usize) {
    for _ in 0..=random(3) {
        let at = random(bytes.len().max(1)).min(bytes.len());
        let rest = bytes.len() - at;
        match random(6) {
            0 if rest > 0 => bytes[at] = random(256) as u8,
            1 if rest > 0 => bytes[at] ^= 1 << random(8),
            2 => bytes.truncate(at.max(1)),
            3 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
            4 => drop(bytes.splice(
                at..at,
                [b"-1".as_slice(), b"1e99", b"null", b"18446744073709551615", b"\0"][random(5)].to_vec(),
            )),
            _ => drop(bytes.splice(at..at + random(4).min(rest), [])),
        }
    }
}

#[test]
fn mutations_are_refused_or_loaded() {
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = |below: usize| {
        // Xorshift (Marsaglia 2003): any sequence does, if it is always the same one.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let directory = Directory::sharded();
    let names = ["config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"];
    for name in names {
        let good = directory.read(name);
        for _ in 0..500 {
            let mut bytes = good.clone();
            mutate(&mut bytes, &mut random);
            directory.write(name, &bytes);
            let _ = load(directory.0.path());
        }
        directory.write(name, &good);
    }
    let good = gguf();
    let path = directory.0.path().join("model.gguf");
    for _ in 0..1_500 {
        let mut bytes = good.clone();
        mutate(&mut bytes, &mut random);
        fs::write(&path, &bytes).expect("written");
        let _ = load(&path);
    }
}
