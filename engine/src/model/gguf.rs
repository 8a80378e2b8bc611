//! GGUF checkpoints: one file, whose metadata is said here as a `config.json`, and whose tensors are found under the names Hugging
//! Face gives them.
//!
//! Nothing behind this module knows GGUF: the decoder is configured by the same fields, and weights are asked for by the
//! same names. Three things differ in the tensors themselves. Matrices may be in [`blocks`]; of the families that llama.cpp
//! turns in neighbouring pairs, the rows of q and k are stored in that order ([`Names::turned_rows`]); and norms that add one to
//! their weights have it added already.

pub(crate) mod blocks;

use crate::{
    Error,
    model::{Opened, checkpoint::Checkpoint, decoder::Decoder, quantized::Quantization},
};
use ::gguf::{File, TensorType};
use grammar::TokenTable;
use kv_cache::TokenId;
use memmap2::Mmap;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What llama.cpp calls an architecture, and what is particular about it.
#[derive(Debug)]
struct Family {
    /// `general.architecture`.
    name: &'static str,
    /// The same, as `config.json` has it.
    architecture: &'static str,
    /// The rows of q and k lie in the order of turning pairs.
    turned_rows: bool,
    /// Parts of a layer that have other names than [`PARTS`], as there.
    parts: &'static [(&'static str, &'static str)],
}

const GEMMA_PARTS: &[(&str, &str)] = &[
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

const FAMILIES: [Family; 9] = {
    const fn family(name: &'static str, architecture: &'static str) -> Family {
        Family { name, architecture, turned_rows: false, parts: &[] }
    }
    [
        // Llama, Mistral and Mixtral are one architecture to llama.cpp.
        Family { turned_rows: true, ..family("llama", "LlamaForCausalLM") },
        family("qwen2", "Qwen2ForCausalLM"),
        family("qwen3", "Qwen3ForCausalLM"),
        family("qwen3moe", "Qwen3MoeForCausalLM"),
        Family { parts: GEMMA_PARTS, ..family("gemma2", "Gemma2ForCausalLM") },
        Family { parts: GEMMA_PARTS, ..family("gemma3", "Gemma3ForCausalLM") },
        Family { parts: &[("mlp.gate_up_proj", "ffn_up")], ..family("phi3", "Phi3ForCausalLM") },
        family("command-r", "CohereForCausalLM"),
        Family { parts: GEMMA_PARTS, ..family("olmo2", "Olmo2ForCausalLM") },
    ]
};

/// Parts of a layer: the name in Hugging Face's checkpoints, and in GGUF files.
const PARTS: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
];

/// Linears of an expert, of which GGUF files keep all experts' in one tensor.
const EXPERT_PARTS: &[(&str, &str)] = &[
    ("gate_proj", "ffn_gate_exps"),
    ("up_proj", "ffn_up_exps"),
    ("down_proj", "ffn_down_exps"),
    ("w1", "ffn_gate_exps"),
    ("w3", "ffn_up_exps"),
    ("w2", "ffn_down_exps"),
];

const ENDS: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Finds tensors of a GGUF file by the names that Hugging Face gives them.
#[derive(Debug)]
pub(crate) struct Names {
    family: &'static Family,
    /// Elements of a head.
    head_dim: usize,
}

impl Names {
    /// Returns the names of an architecture that llama.cpp calls `name`.
    #[cfg(test)]
    pub(crate) fn of(name: &str, head_dim: usize) -> Option<Self> {
        FAMILIES.iter().find(|family| family.name == name).map(|family| Self { family, head_dim })
    }

    /// Returns the name in the file of what `name` is elsewhere. A name that no GGUF file has an equal of stays as it is.
    pub(crate) fn stored(&self, name: &str) -> String {
        self.find(name).unwrap_or_else(|| name.to_owned())
    }

    fn find(&self, name: &str) -> Option<String> {
        let (part, suffix) = name.rsplit_once('.')?;
        let in_table = |table: &[(&str, &'static str)], part: &str| {
            table.iter().find(|(elsewhere, _)| *elsewhere == part).map(|(_, stored)| *stored)
        };
        let Some(rest) = part.strip_prefix("model.layers.") else {
            return Some(format!("{}.{suffix}", in_table(ENDS, part)?));
        };
        let (layer, part) = rest.split_once('.')?;
        let expert = ["mlp.experts.", "block_sparse_moe.experts."].iter().find_map(|prefix| part.strip_prefix(prefix));
        if let Some((expert, part)) = expert.and_then(|rest| rest.split_once('.')) {
            let stored = in_table(EXPERT_PARTS, part)?;
            return Some(slice_name(&format!("blk.{layer}.{stored}.{suffix}"), expert.parse().ok()?));
        }
        let stored = in_table(self.family.parts, part).or_else(|| in_table(PARTS, part))?;
        Some(format!("blk.{layer}.{stored}.{suffix}"))
    }

    /// Returns the rows of a head if those of tensor `name` lie as its heads turn: row `2 i` of a head is elsewhere row `i`, and
    /// row `2 i + 1` the one half a head later.
    pub(crate) fn turned_rows(&self, name: &str) -> Option<usize> {
        let (linear, _) = name.rsplit_once('.')?;
        let turns = linear.ends_with("self_attn.q_proj") || linear.ends_with("self_attn.k_proj");
        (self.family.turned_rows && turns).then_some(self.head_dim)
    }
}

/// Names the matrix of one expert within the tensor of all.
pub(crate) fn slice_name(tensor: &str, expert: usize) -> String {
    format!("{tensor}[{expert}]")
}

/// Returns the bytes of the tokens of the GGUF file at `path`, for grammars over `vocab_size` logits.
pub(crate) fn tokens(path: &Path, vocab_size: usize, eos: &[TokenId]) -> Result<TokenTable, grammar::Error> {
    let problem = |problem: String| grammar::Error::Tokens(format!("{}: {problem}", path.display()));
    let source = std::fs::File::open(path).map_err(|error| problem(error.to_string()))?;
    // SAFETY: as in `open`: the map is read-only and lives only here; nobody can guard against a file rewritten meanwhile.
    let map = unsafe { Mmap::map(&source) }.map_err(|error| problem(error.to_string()))?;
    let file = File::parse(&map, map.len() as u64).map_err(|error| problem(error.to_string()))?;
    let array = |key: &str| file.array(key).map_err(|error| problem(error.to_string()));
    let (texts, types) = (array("tokenizer.ggml.tokens")?, array("tokenizer.ggml.token_type")?);
    let texts = texts.ok_or_else(|| problem("metadata `tokenizer.ggml.tokens` is missing".into()))?;
    // Normal, unless it says otherwise.
    let types: Vec<u64> =
        types.iter().flat_map(|types| types.iter()).map(|kind| kind.as_count().unwrap_or(1)).collect();
    let kind = |id: TokenId| types.get(id as usize).copied().unwrap_or(1);
    let texts: Vec<(TokenId, &str)> =
        (0..).zip(texts.iter()).filter_map(|(id, text)| Some((id, text.as_str()?))).collect();
    let byte_level = file.text("tokenizer.ggml.model").ok().flatten() == Some("gpt2");
    // `llama_token_type`: 2 unknown, 3 control, 4 as it stands, 5 unused.
    let plain = texts.iter().copied().filter(|(id, _)| matches!(kind(*id), 1 | 6));
    let added = texts.iter().copied().filter(|(id, _)| matches!(kind(*id), 2..=4));
    TokenTable::from_texts(vocab_size, eos, byte_level, plain, added.map(|(id, text)| (id, text, kind(id) != 4)))
}

/// Maps the file and reads its header.
pub(super) fn open(path: &Path) -> Result<Opened, Error> {
    let problem = |problem: String| Error::checkpoint(path, problem);
    let source = std::fs::File::open(path).map_err(|error| Error::checkpoint(path, error))?;
    // SAFETY: the map is read-only and lives only while the model loads; a file that is rewritten in place in that time is the
    // operator's mistake, which no reader of mapped files can guard against.
    let map = unsafe { Mmap::map(&source) }.map_err(|error| Error::checkpoint(path, error))?;
    let file = File::parse(&map, map.len() as u64).map_err(|error| Error::checkpoint(path, error))?;
    if let Some(parts) =
        file.count("split.count").map_err(|error| Error::checkpoint(path, error))?.filter(|parts| *parts > 1)
    {
        return Err(problem(format!(
            "metadata `split.count` is {parts}: one part of a model; join them (llama-gguf-split)"
        )));
    }
    let family = family(&file).map_err(problem)?;
    let config = Reader { file: &file, bytes: &map, family }.config().map_err(problem)?;
    let mut decoder =
        Decoder::parse(&config).map_err(|error| problem(format!("metadata, as a config.json: {error}")))?;
    decoder.norm_offset = 0.0;
    let tensors: Vec<_> = file.tensors().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let config = file.header().to_vec();
    let checkpoint = Checkpoint::of_gguf(path, map, tensors, Names { family, head_dim: decoder.head_dim })?;
    let quantization = checkpoint.blocks_name().map(Quantization::Blocks);
    Ok(Opened { decoder, checkpoint, quantization, config })
}

fn family(file: &File<'_>) -> Result<&'static Family, String> {
    let name = file.text("general.architecture").map_err(|error| error.to_string())?;
    let name = name.ok_or("metadata `general.architecture` is missing")?;
    FAMILIES.iter().find(|family| family.name == name).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        format!("metadata `general.architecture`: `{name}` is not supported; known: {}", known.join(", "))
    })
}

/// Reads metadata as the fields of a `config.json`.
struct Reader<'a> {
    file: &'a File<'a>,
    bytes: &'a [u8],
    family: &'static Family,
}

/// Whole numbers of a model: the field of `config.json`, and the key after the architecture's name.
const COUNTS: [(&str, &str); 12] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("sliding_window", "attention.sliding_window"),
    ("num_experts_per_tok", "expert_used_count"),
    ("num_experts", "expert_count"),
    ("num_local_experts", "expert_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
];

/// Other numbers, likewise.
const NUMBERS: [(&str, &str); 7] = [
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_eps", "attention.layer_norm_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("logit_scale", "logit_scale"),
];

impl Reader<'_> {
    fn config(&self) -> Result<Value, String> {
        let mut config = Map::new();
        for (field, key) in COUNTS {
            if let Some(count) = self.count(key)?.filter(|count| *count > 0) {
                config.insert(field.to_owned(), count.into());
            }
        }
        for (field, key) in NUMBERS {
            if let Some(number) = self.number(key)? {
                config.insert(field.to_owned(), number.into());
            }
        }
        let required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"];
        for (field, key) in COUNTS.iter().filter(|(field, _)| required.contains(field)) {
            if !config.contains_key(*field) {
                return Err(format!("metadata `{}` is missing", self.key(key)));
            }
        }
        let experts = config.contains_key("num_experts");
        let window = config.contains_key("sliding_window");
        let architecture = match self.family.architecture {
            "LlamaForCausalLM" if experts => "MixtralForCausalLM",
            "LlamaForCausalLM" if window => "MistralForCausalLM",
            architecture => architecture,
        };
        let embedding = self.file.tensor("token_embd.weight").ok_or("tensor `token_embd.weight` is missing")?;
        config.insert("architectures".into(), json!([architecture]));
        config.insert("vocab_size".into(), json!(embedding.shape[0]));
        config.insert("tie_word_embeddings".into(), json!(self.file.tensor("output.weight").is_none()));
        config.insert("attention_bias".into(), json!(self.file.tensor("blk.0.attn_q.bias").is_some()));
        config.insert("mlp_bias".into(), json!(self.file.tensor("blk.0.ffn_up.bias").is_some()));
        config.insert("norm_topk_prob".into(), json!(true));
        let ends = self.file.end_tokens().map_err(|error| error.to_string())?;
        config.insert("eos_token_id".into(), json!(ends));

        let (hidden, heads) = (self.count("embedding_length")?, self.count("attention.head_count")?);
        let even = hidden.zip(heads).and_then(|(hidden, heads)| hidden.checked_div(heads)).unwrap_or_default();
        let head_dim = self.count("attention.key_length")?.unwrap_or(even);
        if let Some(values) = self.count("attention.value_length")?.filter(|values| *values != head_dim) {
            return Err(format!("metadata `{}` is {values}, expected {head_dim}", self.key("attention.value_length")));
        }
        // The largest Gemmas scale scores by the width per head, not by the head's own; few files say so.
        let layers = self.count("block_count")?;
        let by_width = matches!((self.family.name, layers), ("gemma2", Some(46)) | ("gemma3", Some(62)));
        if let Some(scale) = self.number("attention.scale")?.filter(|scale| *scale > 0.0) {
            config.insert("query_pre_attn_scalar".into(), json!(scale.powi(-2)));
        } else if self.family.name.starts_with("gemma") {
            config.insert("query_pre_attn_scalar".into(), json!(if by_width { even } else { head_dim }));
        }
        match self.file.get(&self.key("attention.sliding_window_pattern")) {
            Some(::gguf::Value::Array(layers)) => {
                let types = layers.iter().map(|window| match window {
                    ::gguf::Value::Bool(true) => "sliding_attention",
                    _ => "full_attention",
                });
                config.insert("layer_types".into(), types.collect());
            }
            Some(_) => {
                config.insert("sliding_window_pattern".into(), self.count("attention.sliding_window_pattern")?.into());
            }
            None => {}
        }
        if let Some(turning) = self.count("rope.dimension_count")?.filter(|turning| *turning != head_dim) {
            config.insert("partial_rotary_factor".into(), json!(turning as f64 / head_dim.max(1) as f64));
        }
        if let Some(scaling) = self.rope_scaling(&mut config)? {
            config.insert("rope_scaling".into(), scaling);
        }
        Ok(Value::Object(config))
    }

    /// Reads what slows the rotation down: factors for each pair in tensors, or a rule by name.
    fn rope_scaling(&self, config: &mut Map<String, Value>) -> Result<Option<Value>, String> {
        let original = self.count("rope.scaling.original_context_length")?;
        if let Some(original) = original {
            config.insert("original_max_position_embeddings".into(), original.into());
        }
        // What llama3 scaling comes to is written as a tensor; one of factors for all lengths means just that.
        if let Some(factors) = self.floats("rope_freqs.weight")? {
            return Ok(Some(
                json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}),
            ));
        }
        if let (Some(short), Some(long)) =
            (self.floats("rope_factors_short.weight")?, self.floats("rope_factors_long.weight")?)
        {
            let scale = self.number("rope.scaling.attn_factor")?;
            return Ok(Some(
                json!({"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": scale}),
            ));
        }
        let key = self.key("rope.scaling.type");
        let kind = self.file.text(&key).map_err(|error| error.to_string())?;
        let factor = self.number("rope.scaling.factor")?;
        match kind.unwrap_or("none") {
            "none" => Ok(None),
            "linear" => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            "yarn" => {
                let mut scaling =
                    json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original});
                for (field, key) in [
                    ("attention_factor", "rope.scaling.attn_factor"),
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(number) = self.number(key)? {
                        scaling[field] = number.into();
                    }
                }
                Ok(Some(scaling))
            }
            other => Err(format!("metadata `{key}`: `{other}` is not supported; known: none, linear, yarn")),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.family.name)
    }

    fn count(&self, key: &str) -> Result<Option<u64>, String> {
        self.file.count(&self.key(key)).map_err(|error| error.to_string())
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        self.file.number(&self.key(key)).map_err(|error| error.to_string())
    }

    /// Reads a small tensor of floats.
    fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, String> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        if tensor.kind != TensorType::F32 || tensor.shape.len() != 1 || tensor.shape[0] > 4096 {
            let (kind, shape) = (tensor.kind.name(), &tensor.shape);
            return Err(format!(
                "tensor `{name}` is {kind} of shape {shape:?}, expected F32 with a factor for each pair"
            ));
        }
        let bytes = self.bytes[tensor.bytes.clone()].chunks_exact(4);
        Ok(Some(bytes.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()))
    }
}
