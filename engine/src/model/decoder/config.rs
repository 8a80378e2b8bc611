//! From `config.json` to a [`Decoder`]. Both generations of the file are understood: `rope_theta` + `rope_scaling` + `torch_dtype`,
//! and `rope_parameters` + `dtype`.

use super::{
    Activation, Decoder, NormKind, QkNorm,
    families::{FAMILIES, WindowRule},
};
use crate::{
    Error,
    model::{experts::Mixture, latent::LatentShape, rope::Rope},
};
use kv_cache::TokenId;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

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
        let architecture = value.pointer("/architectures/0").and_then(Value::as_str).unwrap_or_default();
        let Some(family) = FAMILIES.iter().find(|family| family.architecture == architecture) else {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
            return Err(format!("architecture `{architecture}` is not supported; known: {}", known.join(", ")));
        };
        let value = &family.complete(value);
        let raw: Raw = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
        raw.check()?;

        let heads = raw.num_attention_heads;
        let latent = LatentShape::parse(architecture, value)?;
        let mixture = Mixture::parse(architecture, value, raw.num_hidden_layers)?;
        let mut head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        let mut kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        let mut turned = head_dim;
        let mut score_scale = 1.0 / raw.query_pre_attn_scalar.unwrap_or(head_dim as f32).sqrt();
        if let Some(shape) = &latent {
            (head_dim, kv_heads, turned) = (shape.key(), 1, shape.rope);
            score_scale = shape.score_scale(value);
        }
        let mut ropes = vec![Rope::parse(value, "full_attention", turned)?];
        let windows = raw.windows(family.window)?;
        let mut layer_ropes = vec![0; windows.len()];
        if let Some(local) = local_rope(value, &ropes[0], turned)? {
            ropes.push(local);
            layer_ropes = windows.iter().map(|window| usize::from(window.is_some())).collect();
        }
        let mut decoder = Decoder {
            architecture: architecture.to_owned(),
            names: family.names,
            vocab_size: raw.vocab_size,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            heads,
            kv_heads,
            head_dim,
            latent,
            mixture,
            max_position: raw.max_position_embeddings,
            norm: NormKind::Rms,
            norm_eps: raw.rms_norm_eps,
            norm_offset: 0.0,
            norm_bias: false,
            parallel: false,
            activation: raw.activation()?,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: QkNorm::None,
            score_scale,
            score_cap: raw.attn_logit_softcapping,
            scaled_embedding: false,
            tied_head: raw.tie_word_embeddings,
            logit_scale: 1.0,
            logit_cap: raw.final_logit_softcapping,
            ropes,
            interleaved_pairs: false,
            windows,
            layer_ropes,
            eos: raw.eos_token_id.as_ref().map(Ids::list).unwrap_or_default(),
        };
        (family.fields)(&mut decoder, &raw);
        Ok(decoder)
    }
}

/// Reads the rope of layers with a window where it is one of its own.
fn local_rope(config: &Value, global: &Rope, head_dim: usize) -> Result<Option<Rope>, String> {
    let nested = config.pointer("/rope_parameters/sliding_attention").is_some_and(|value| !value.is_null());
    let theta = config.get("rope_local_base_freq").filter(|value| !value.is_null());
    if !nested && theta.is_none() {
        return Ok(None);
    }
    let mut local = config.clone();
    if let Some(theta) = theta {
        local["rope_theta"] = theta.clone();
    }
    if !nested {
        // The older generation scales the other layers alone.
        local["rope_parameters"] = Value::Null;
        local["rope_scaling"] = Value::Null;
    }
    let local = Rope::parse(&local, "sliding_attention", head_dim)?;
    if local.pairs() != global.pairs() {
        return Err("partial_rotary_factor: differs between layers with a window and layers without".into());
    }
    Ok(Some(local))
}

/// `config.json` as far as the families read it; everything else in the file is of no consequence here.
#[derive(Debug, Deserialize)]
pub(super) struct Raw {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    #[serde(default = "default_rms_norm_eps")]
    pub(super) rms_norm_eps: f32,
    #[serde(default)]
    pub(super) layer_norm_eps: f32,
    #[serde(default)]
    pub(super) attention_bias: bool,
    #[serde(default)]
    pub(super) mlp_bias: bool,
    #[serde(default)]
    pub(super) use_qk_norm: bool,
    #[serde(default)]
    pub(super) use_parallel_residual: bool,
    #[serde(default)]
    pub(super) tie_word_embeddings: bool,
    pub(super) hidden_act: Option<String>,
    pub(super) hidden_activation: Option<String>,
    pub(super) query_pre_attn_scalar: Option<f32>,
    pub(super) attn_logit_softcapping: Option<f32>,
    pub(super) final_logit_softcapping: Option<f32>,
    #[serde(default)]
    pub(super) logit_scale: f32,
    pub(super) sliding_window: Option<usize>,
    pub(super) sliding_window_pattern: Option<usize>,
    #[serde(default)]
    pub(super) use_sliding_window: bool,
    #[serde(default)]
    pub(super) use_bidirectional_attention: bool,
    pub(super) max_window_layers: Option<usize>,
    pub(super) layer_types: Option<Vec<String>>,
    pub(super) eos_token_id: Option<Ids>,
}

fn default_rms_norm_eps() -> f32 {
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
            ("sliding_window_pattern", self.sliding_window_pattern.unwrap_or(1)),
        ];
        for (field, size) in sizes {
            // What is said of each layer is kept for each; no model is nearly as deep.
            let largest = if field == "num_hidden_layers" { 1 << 14 } else { 1 << 28 };
            if size == 0 || size > largest {
                return Err(format!("{field}: {size} is not a size"));
            }
        }
        let numbers = [
            ("query_pre_attn_scalar", self.query_pre_attn_scalar),
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ];
        for (field, number) in numbers {
            if number.is_some_and(|number| !number.is_finite() || number <= 0.0) {
                return Err(format!("{field}: {} is not a positive number", number.unwrap_or_default()));
            }
        }
        if self.use_bidirectional_attention {
            return Err("use_bidirectional_attention: true is not supported: a decoder sees what came before".into());
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
        Ok(())
    }

    fn activation(&self) -> Result<Activation, String> {
        let name = self.hidden_activation.as_ref().or(self.hidden_act.as_ref());
        name.map_or(Ok(Activation::Silu), |name| Activation::named(name))
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
        let pattern = self.sliding_window_pattern.unwrap_or(1);
        let slides = |layer: usize| match rule {
            WindowRule::Never => false,
            WindowRule::Always => true,
            WindowRule::Switched => self.use_sliding_window && layer >= self.max_window_layers.unwrap_or(0),
            WindowRule::Pattern => !(layer + 1).is_multiple_of(pattern),
        };
        Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
    }
}

/// One token id or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
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
        assert!(!decoder.qkv_bias && decoder.qk_norm == QkNorm::None && !decoder.tied_head);
    }

    #[test]
    fn families_set_their_fields() {
        assert!(parse(json!({"architectures": ["Qwen2ForCausalLM"]})).qkv_bias);
        assert!(!parse(json!({"architectures": ["Qwen2ForCausalLM"]})).output_bias);
        assert_eq!(parse(json!({"architectures": ["Qwen3ForCausalLM"]})).qk_norm, QkNorm::Head);
        assert!(parse(json!({"attention_bias": true})).output_bias);
        assert!(parse(json!({"mlp_bias": true})).mlp_bias);
    }

    fn golden(name: &str) -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("config.json");
        serde_json::from_slice(&std::fs::read(path).expect("a golden config")).expect("JSON")
    }

    /// Writes `config` as the newer generation does.
    fn newer(config: &Value) -> Value {
        let mut config = config.clone();
        let fields = config.as_object_mut().expect("an object");
        let scaling = fields.remove("rope_scaling").filter(|scaling| !scaling.is_null());
        let mut parameters = scaling.unwrap_or(json!({"rope_type": "default"}));
        for (older, newer) in [
            ("rope_theta", "rope_theta"),
            ("rotary_emb_base", "rope_theta"),
            ("rotary_pct", "partial_rotary_factor"),
            ("original_max_position_embeddings", "original_max_position_embeddings"),
        ] {
            if let Some(value) = fields.remove(older) {
                parameters[newer] = value;
            }
        }
        if let Some(theta) = fields.remove("rope_local_base_freq") {
            let local = json!({"rope_type": "default", "rope_theta": theta});
            parameters = json!({"full_attention": parameters, "sliding_attention": local});
        }
        fields.insert("rope_parameters".into(), parameters);
        if let Some(dtype) = fields.remove("torch_dtype") {
            fields.insert("dtype".into(), dtype);
        }
        config
    }

    #[test]
    fn both_generations_of_every_family_s_config_are_one_decoder() {
        let names =
            ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "cohere", "olmo2", "gptneox"];
        for name in names {
            let older = golden(name);
            let newer = newer(&older);
            assert_ne!(older, newer);
            assert_eq!(Decoder::parse(&older), Decoder::parse(&newer), "{name}");
        }
    }

    #[test]
    fn a_config_that_nests_its_text_model_is_read_there() {
        // As published with Gemma 3 4B: everything else is what the reference assumes.
        let config = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
            "vision_config": {"hidden_size": 1152},
        });
        let decoder = Decoder::parse(&config).expect("a good config");
        assert_eq!((decoder.hidden, decoder.heads, decoder.kv_heads, decoder.head_dim), (2560, 8, 4, 256));
        assert_eq!((decoder.vocab_size, decoder.max_position, decoder.layers()), (262_208, 131_072, 34));
        assert_eq!(decoder.windows[..6], [Some(1024), Some(1024), Some(1024), Some(1024), Some(1024), None]);
        assert_eq!(decoder.layer_ropes[..6], [1, 1, 1, 1, 1, 0]);
        assert_eq!(decoder.ropes[1], Rope::plain(1e4, 256));
        assert_ne!(decoder.ropes[0], Rope::plain(1e6, 256));
        assert!(decoder.tied_head && decoder.scaled_embedding && decoder.score_cap.is_none());
        assert_eq!((decoder.activation, decoder.eos), (Activation::GeluTanh, vec![1, 106]));
    }

    #[test]
    fn a_cap_of_null_is_none_and_silence_is_the_reference_s() {
        let gemma = |extra: Value| {
            let mut config = config(extra);
            config["architectures"] = json!(["Gemma2ForCausalLM"]);
            Decoder::parse(&config).expect("a good config")
        };
        let silent = gemma(json!({}));
        assert_eq!((silent.score_cap, silent.logit_cap, silent.score_scale), (Some(50.0), Some(30.0), 1.0 / 16.0));
        assert_eq!(silent.windows, [Some(4096), None, Some(4096), None]);
        let none = gemma(json!({"attn_logit_softcapping": null, "final_logit_softcapping": null}));
        assert_eq!((none.score_cap, none.logit_cap), (None, None));
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
        check(json!({"hidden_act": "relu2"}), &["hidden_act", "relu2", "silu"]);
        check(json!({"final_logit_softcapping": 0.0}), &["final_logit_softcapping", "0"]);
        check(json!({"use_bidirectional_attention": true}), &["use_bidirectional_attention"]);
        check(json!({"head_dim": 7}), &["head_dim", "7"]);
        let mut missing = config(json!({}));
        missing.as_object_mut().expect("an object").remove("vocab_size");
        assert!(Decoder::parse(&missing).expect_err("no vocab").contains("vocab_size"));
    }
}
