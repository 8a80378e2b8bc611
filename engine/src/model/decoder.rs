//! What a checkpoint's `config.json` describes: one [`Decoder`], whatever the family.
//!
//! A family is a row of [`FAMILIES`] and the fields it sets; the forward pass reads the fields and never the name. Both
//! generations of the file are understood: `rope_theta` + `rope_scaling` + `torch_dtype`, and `rope_parameters` + `dtype`.

use crate::{Error, model::rope::Rope};
use kv_cache::TokenId;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// Shape and variant of a decoder-only transformer with pre-norm blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Decoder {
    /// Architecture as the checkpoint names it.
    pub(crate) architecture: String,
    /// Rows of the embedding and of the logits.
    pub(crate) vocab_size: usize,
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    /// Width between the gate and the down projection.
    pub(crate) intermediate: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key/value heads; divides `heads`.
    pub(crate) kv_heads: usize,
    /// Elements of one head of q, k and v.
    pub(crate) head_dim: usize,
    /// Longest sequence the checkpoint was made for.
    pub(crate) max_position: usize,
    /// Added to the mean square under the root of every norm.
    pub(crate) norm_eps: f32,
    /// Biases on q, k and v.
    pub(crate) qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub(crate) output_bias: bool,
    /// Biases on gate, up and down.
    pub(crate) mlp_bias: bool,
    /// RMS norm on every head of q and k, before the rotation.
    pub(crate) qk_norm: bool,
    /// The logits use the embedding's weights.
    pub(crate) tied_head: bool,
    /// Rotary embedding.
    pub(crate) rope: Rope,
    /// Per layer: how many of the latest positions are seen, itself included; `None` = all.
    pub(crate) windows: Vec<Option<usize>>,
    /// Tokens that end a sequence.
    pub(crate) eos: Vec<TokenId>,
}

impl Decoder {
    /// Reads `config.json` and, where present, `generation_config.json` of `dir`.
    pub(crate) fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|error| Error::checkpoint(&path, error))?;
        let raw: Value = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(&path, error))?;
        let mut decoder = Self::parse(&raw).map_err(|problem| Error::checkpoint(&path, problem))?;

        let path = dir.join("generation_config.json");
        if path.exists() {
            let text = std::fs::read(&path).map_err(|error| Error::checkpoint(&path, error))?;
            let generation: Generation =
                serde_json::from_slice(&text).map_err(|error| Error::checkpoint(&path, error))?;
            if let Some(eos) = generation.eos_token_id {
                decoder.eos = eos.list();
            }
        }
        Ok(decoder)
    }

    /// Reads the contents of a `config.json`; the error says which field is at fault.
    pub(crate) fn parse(value: &Value) -> Result<Self, String> {
        let raw: Raw = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
        let architecture = raw.architectures.first().cloned().unwrap_or_default();
        let Some(family) = FAMILIES.iter().find(|family| family.architecture == architecture) else {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
            return Err(format!("architecture `{architecture}` is not supported; known: {}", known.join(", ")));
        };
        if let Some(quantization) = value.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return Err(format!("quantization_config: quantised weights (`{method}`) are not supported"));
        }
        raw.check()?;

        let heads = raw.num_attention_heads;
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        let mut decoder = Decoder {
            architecture,
            vocab_size: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim,
            max_position: raw.max_position_embeddings,
            norm_eps: raw.rms_norm_eps,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied_head: raw.tie_word_embeddings,
            rope: Rope::parse(value, head_dim)?,
            windows: raw.windows(family.window)?,
            eos: raw.eos_token_id.as_ref().map(Ids::list).unwrap_or_default(),
        };
        (family.fields)(&mut decoder, &raw);
        Ok(decoder)
    }

    /// Returns the number of layers.
    pub(crate) fn layers(&self) -> usize {
        self.windows.len()
    }

    /// Returns the width of all query heads together.
    pub(crate) fn query_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of all key heads together, which is that of the value heads.
    pub(crate) fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// How the window of a family is switched on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum WindowRule {
    /// Never.
    Never,
    /// On every layer as soon as `sliding_window` is set.
    Always,
    /// On layers from `max_window_layers` on when `use_sliding_window` is true.
    Switched,
}

/// What sets one family apart from the others.
struct Family {
    architecture: &'static str,
    window: WindowRule,
    fields: fn(&mut Decoder, &Raw),
}

const FAMILIES: [Family; 4] = [
    Family {
        architecture: "LlamaForCausalLM",
        window: WindowRule::Never,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.mlp_bias = raw.mlp_bias;
        },
    },
    Family { architecture: "MistralForCausalLM", window: WindowRule::Always, fields: |_, _| {} },
    Family {
        architecture: "Qwen2ForCausalLM",
        window: WindowRule::Switched,
        fields: |decoder, _| decoder.qkv_bias = true,
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        window: WindowRule::Switched,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.qk_norm = true;
        },
    },
];

/// `config.json` as far as the families above read it; everything else in the file is of no consequence here.
#[derive(Debug, Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default = "default_norm_eps")]
    rms_norm_eps: f32,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    eos_token_id: Option<Ids>,
}

fn default_norm_eps() -> f32 {
    1e-6
}

impl Raw {
    /// Refuses sizes that no weights could have, before anything divides by them.
    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads.unwrap_or(1)),
            ("head_dim", self.head_dim.unwrap_or(2)),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, size) in sizes {
            if size == 0 || size > 1 << 28 {
                return Err(format!("{field}: {size} is not a size"));
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads.unwrap_or(1));
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_key_value_heads: {kv_heads} does not divide num_attention_heads, {heads}"));
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            return Err(format!("num_attention_heads: {heads} does not divide hidden_size, {}", self.hidden_size));
        }
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / heads);
        if !head_dim.is_multiple_of(2) || head_dim > 512 {
            return Err(format!("head_dim: {head_dim} is not an even number up to 512"));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => Ok(()),
            Some(other) => Err(format!("hidden_act: `{other}` is not supported; known: silu")),
        }
    }

    fn windows(&self, rule: WindowRule) -> Result<Vec<Option<usize>>, String> {
        let layers = self.num_hidden_layers;
        let window = match self.sliding_window {
            Some(0) => return Err("sliding_window: 0 is not a window".into()),
            window => window,
        };
        if let Some(types) = self.layer_types.as_ref().filter(|_| rule != WindowRule::Never) {
            if types.len() != layers {
                return Err(format!("layer_types: {} entries for {layers} layers", types.len()));
            }
            let of_type = |name: &String| match name.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(window),
                other => {
                    Err(format!("layer_types: `{other}` is not supported; known: full_attention, sliding_attention"))
                }
            };
            return types.iter().map(of_type).collect();
        }
        let first = match rule {
            WindowRule::Never => layers,
            WindowRule::Always => 0,
            WindowRule::Switched if self.use_sliding_window => self.max_window_layers.unwrap_or(0),
            WindowRule::Switched => layers,
        };
        Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
    }
}

/// One token id or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(TokenId),
    Many(Vec<TokenId>),
}

impl Ids {
    fn list(&self) -> Vec<TokenId> {
        match self {
            Ids::One(id) => vec![*id],
            Ids::Many(ids) => ids.clone(),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(extra: Value) -> Value {
        let mut value = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "eos_token_id": 2,
        });
        for (key, field) in extra.as_object().expect("an object") {
            value[key] = field.clone();
        }
        value
    }

    fn parse(extra: Value) -> Decoder {
        Decoder::parse(&config(extra)).expect("a good config")
    }

    #[test]
    fn defaults_are_those_of_the_reference() {
        let decoder = parse(json!({}));
        assert_eq!((decoder.head_dim, decoder.kv_heads, decoder.layers()), (8, 2, 4));
        assert_eq!(decoder.norm_eps, 1e-6);
        assert_eq!(decoder.eos, [2]);
        assert!(!decoder.qkv_bias && !decoder.qk_norm && !decoder.tied_head);
    }

    #[test]
    fn families_set_their_fields() {
        assert!(parse(json!({"architectures": ["Qwen2ForCausalLM"]})).qkv_bias);
        assert!(!parse(json!({"architectures": ["Qwen2ForCausalLM"]})).output_bias);
        assert!(parse(json!({"architectures": ["Qwen3ForCausalLM"]})).qk_norm);
        assert!(parse(json!({"attention_bias": true})).output_bias);
        assert!(parse(json!({"mlp_bias": true})).mlp_bias);
    }

    #[test]
    fn windows_follow_the_family_and_layer_types() {
        let check = |extra: Value, expected: &[Option<usize>]| assert_eq!(parse(extra).windows, expected);
        let (all, none) = ([Some(5); 4], [None; 4]);
        check(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 5}), &all);
        check(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null}), &none);
        check(json!({"architectures": ["LlamaForCausalLM"], "sliding_window": 5}), &none);
        check(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5, "use_sliding_window": false}), &none);
        check(
            json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5, "use_sliding_window": true, "max_window_layers": 3}),
            &[None, None, None, Some(5)],
        );
        let types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"];
        check(
            json!({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 5, "layer_types": types}),
            &[Some(5), None, None, Some(5)],
        );
    }

    #[test]
    fn problems_name_the_field_and_the_value() {
        let check = |extra: Value, words: &[&str]| {
            let problem = Decoder::parse(&config(extra)).expect_err("a bad config");
            for word in words {
                assert!(problem.contains(word), "{problem:?} lacks {word:?}");
            }
        };
        check(json!({"architectures": ["BertModel"]}), &["BertModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]);
        check(json!({"architectures": []}), &["architecture", "LlamaForCausalLM"]);
        check(json!({"num_key_value_heads": 3}), &["num_key_value_heads", "3", "8"]);
        check(json!({"num_attention_heads": 0}), &["num_attention_heads", "0"]);
        check(json!({"hidden_size": "wide"}), &["wide"]);
        check(json!({"hidden_act": "gelu"}), &["hidden_act", "gelu", "silu"]);
        check(json!({"quantization_config": {"quant_method": "gptq"}}), &["quantization_config", "gptq"]);
        check(json!({"head_dim": 7}), &["head_dim", "7"]);
        let mut missing = config(json!({}));
        missing.as_object_mut().expect("an object").remove("vocab_size");
        assert!(Decoder::parse(&missing).expect_err("no vocab").contains("vocab_size"));
    }
}
