//! How much memory it takes to quantise a checkpoint while it loads.

use crate::{Model, ModelShape, Quantize};
use serde_json::json;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    process::Command,
};

const DIR: &str = "BATON_TEST_FOOTPRINT_DIR";
const NAME: &str = "tests::footprint::quantising_takes_little_more_memory_than_its_result";

/// Writes a checkpoint of `shape` with random bf16, one shard for each six layers and one for what stands at the ends, and returns
/// the bytes of the largest shard.
fn write_checkpoint(dir: &Path, shape: &ModelShape) -> u64 {
    let (hidden, inner) = (shape.hidden, shape.intermediate);
    let (query, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": shape.vocab_size, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": shape.max_position,
        "tie_word_embeddings": true,
    });
    fs::write(dir.join("config.json"), config.to_string()).expect("written");
    let mut shards = vec![vec![
        ("model.embed_tokens.weight".to_owned(), vec![shape.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ]];
    for layer in 0..shape.layers {
        if layer % 6 == 0 {
            shards.push(Vec::new());
        }
        let matrices = [
            ("input_layernorm.weight", vec![hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![query, hidden]),
            ("self_attn.k_proj.weight", vec![kv, hidden]),
            ("self_attn.v_proj.weight", vec![kv, hidden]),
            ("self_attn.q_proj.bias", vec![query]),
            ("self_attn.k_proj.bias", vec![kv]),
            ("self_attn.v_proj.bias", vec![kv]),
            ("self_attn.o_proj.weight", vec![hidden, query]),
            ("mlp.gate_proj.weight", vec![inner, hidden]),
            ("mlp.up_proj.weight", vec![inner, hidden]),
            ("mlp.down_proj.weight", vec![hidden, inner]),
        ];
        let shard = shards.last_mut().expect("just pushed");
        shard.extend(matrices.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    let mut weight_map = serde_json::Map::new();
    let mut largest = 0;
    for (index, tensors) in shards.iter().enumerate() {
        let file = format!("model-{index}.safetensors");
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for (name, shape) in tensors {
            let start = end;
            end += shape.iter().product::<usize>() * 2;
            header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
            weight_map.insert(name.clone(), json!(file));
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut out = BufWriter::with_capacity(1 << 20, File::create(dir.join(&file)).expect("a file"));
        out.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
        out.write_all(header.as_bytes()).expect("written");
        let mut state = index as u64 + 1;
        for _ in 0..end / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Random signs and mantissas under one exponent: magnitudes of 1/32 to 1/16.
            let four = state & 0x807f_807f_807f_807f | 0x3d00_3d00_3d00_3d00;
            out.write_all(&four.to_le_bytes()).expect("written");
        }
        out.write_all(&vec![0; end % 8]).expect("written");
        out.flush().expect("written");
        largest = largest.max(end as u64);
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("written");
    largest
}

/// Returns the most memory this process ever had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a Linux system");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the peak");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") << 10
}

/// `cargo test -p engine --lib -- --ignored --nocapture footprint`
#[test]
#[ignore = "writes and loads a gigabyte, and needs /proc"]
fn quantising_takes_little_more_memory_than_its_result() {
    if let Some(dir) = std::env::var_os(DIR) {
        let model = Model::load_quantized(Path::new(&dir), Some(Quantize::Int4), &mut |_| {}).expect("a checkpoint");
        println!("{NAME}={},{}", model.info().weight_bytes, peak());
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let shard = write_checkpoint(dir.path(), &ModelShape::qwen_0_5b());
    let this = std::env::current_exe().expect("a path");
    let child = Command::new(this).args(["--ignored", "--exact", "--nocapture", NAME]).env(DIR, dir.path()).output();
    let output = String::from_utf8(child.expect("a child").stdout).expect("UTF-8");
    let line = output.lines().find_map(|line| line.split_once("=")).expect(&output).1.to_owned();
    let (result, peak) = line.split_once(',').expect("two numbers");
    let (result, peak): (u64, u64) = (result.parse().expect("a number"), peak.parse().expect("a number"));
    let bound = result * 13 / 10 + shard;
    println!(
        "result {} MB, largest shard {} MB, peak {} MB, bound {} MB",
        result >> 20,
        shard >> 20,
        peak >> 20,
        bound >> 20
    );
    assert!(peak < bound, "peak {peak}, bound {bound}");
}
