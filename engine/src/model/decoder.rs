//! What a checkpoint's `config.json` describes: one [`Decoder`], whatever the family.
//!
//! A family is a row of [`FAMILIES`]: what its reference assumes where the file is silent, and the fields it sets. The forward
//! pass reads the fields and never the name. Both generations of the file are understood: `rope_theta` + `rope_scaling` +
//! `torch_dtype`, and `rope_parameters` + `dtype`.

use crate::{
    Error,
    model::{experts::Mixture, latent::LatentShape, rope::Rope},
};
use kv_cache::TokenId;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// Shape and variant of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Decoder {
    /// Architecture as the checkpoint names it.
    pub(crate) architecture: String,
    /// What its tensors are called.
    pub(crate) names: Names,
    /// Rows of the embedding and of the logits.
    pub(crate) vocab_size: usize,
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    /// Width between the two linears of an MLP.
    pub(crate) intermediate: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key/value heads; divides `heads`.
    pub(crate) kv_heads: usize,
    /// Elements of one head of q, k and v; of q and k where attention is latent.
    pub(crate) head_dim: usize,
    /// Keys and values come from one latent, which is the one key/value head.
    pub(crate) latent: Option<LatentShape>,
    /// Layers that are not dense.
    pub(crate) mixture: Option<Mixture>,
    /// Longest sequence the checkpoint was made for.
    pub(crate) max_position: usize,
    /// How every norm divides.
    pub(crate) norm: NormKind,
    /// Added to the mean square under the root of every norm.
    pub(crate) norm_eps: f32,
    /// Added to the stored weights of every norm.
    pub(crate) norm_offset: f32,
    /// Biases on the norms of blocks and on the last one.
    pub(crate) norm_bias: bool,
    /// Attention and MLP read the same residual, and both add to it.
    pub(crate) parallel: bool,
    /// What is between the two linears of an MLP.
    pub(crate) activation: Activation,
    /// Biases on q, k and v.
    pub(crate) qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub(crate) output_bias: bool,
    /// Biases on all linears of an MLP.
    pub(crate) mlp_bias: bool,
    /// Norms of q and k, before the rotation.
    pub(crate) qk_norm: QkNorm,
    /// What scores are multiplied by.
    pub(crate) score_scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub(crate) score_cap: Option<f32>,
    /// Embeddings are multiplied by the root of `hidden`.
    pub(crate) scaled_embedding: bool,
    /// The logits use the embedding's weights.
    pub(crate) tied_head: bool,
    /// What logits are multiplied by.
    pub(crate) logit_scale: f32,
    /// Logits `x` become `cap * tanh(x / cap)`.
    pub(crate) logit_cap: Option<f32>,
    /// Rotary embeddings that layers choose from; all turn equally many pairs.
    pub(crate) ropes: Vec<Rope>,
    /// Pairs that turn are neighbours; else an element of the first half with one of the second.
    pub(crate) interleaved_pairs: bool,
    /// Per layer: how many of the latest positions are seen, itself included; `None` = all.
    pub(crate) windows: Vec<Option<usize>>,
    /// Per layer: which of `ropes`.
    pub(crate) layer_ropes: Vec<usize>,
    /// Tokens that end a sequence.
    pub(crate) eos: Vec<TokenId>,
}

/// How a norm brings a vector to size one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// Divides by the root of the mean square (arXiv 1910.07467).
    Rms,
    /// Takes the mean off first (arXiv 1607.06450).
    Layer,
}

/// What q and k go through before they turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// Nothing.
    None,
    /// A norm of each head, with the same weights, `[head_dim]`.
    Head,
    /// A norm of each head, with weights of its own, `[heads, head_dim]`.
    EachHead,
    /// One norm of all heads together, `[heads * head_dim]`.
    Whole,
}

/// The nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt 2))` (arXiv 1606.08415).
    Gelu,
    /// The same with its approximation by tanh.
    GeluTanh,
}

impl Activation {
    fn named(name: &str) -> Result<Self, String> {
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
            other => Err(format!("hidden_act: `{other}` is not supported; known: silu, gelu, gelu_pytorch_tanh")),
        }
    }
}

/// What a family calls its tensors, and how it stores those that belong together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Names {
    /// What may stand before all names of the decoder proper; the first under which there is an embedding holds.
    pub(crate) roots: &'static [&'static str],
    pub(crate) embedding: &'static str,
    /// Before the layer's number.
    pub(crate) layers: &'static str,
    pub(crate) attention_norm: Option<&'static str>,
    pub(crate) qkv: QkvNames,
    pub(crate) output: &'static str,
    /// Applied to what attention gives before it is added.
    pub(crate) attention_post_norm: Option<&'static str>,
    pub(crate) mlp_norm: Option<&'static str>,
    pub(crate) up: UpNames,
    pub(crate) down: &'static str,
    /// Applied to what the MLP gives before it is added.
    pub(crate) mlp_post_norm: Option<&'static str>,
    pub(crate) final_norm: &'static str,
    /// Stands alone.
    pub(crate) head: &'static str,
}

/// Where q, k and v are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum QkvNames {
    /// In matrices of their own.
    Apart { q: &'static str, k: &'static str, v: &'static str },
    /// In one matrix: all heads of q, of k, of v.
    Fused(&'static str),
    /// In one matrix: q, k and v of the first head, of the second...
    ByHead(&'static str),
}

/// Where the linears into an MLP are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum UpNames {
    /// A gate and what it multiplies.
    Gated { gate: &'static str, up: &'static str },
    /// Both in one matrix, the gate first.
    Fused(&'static str),
    /// No gate.
    Plain(&'static str),
}

impl Names {
    /// The names most families use.
    const USUAL: Names = Names {
        roots: &["model"],
        embedding: "embed_tokens",
        layers: "layers",
        attention_norm: Some("input_layernorm"),
        qkv: QkvNames::Apart { q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj" },
        output: "self_attn.o_proj",
        attention_post_norm: None,
        mlp_norm: Some("post_attention_layernorm"),
        up: UpNames::Gated { gate: "mlp.gate_proj", up: "mlp.up_proj" },
        down: "mlp.down_proj",
        mlp_post_norm: None,
        final_norm: "norm",
        head: "lm_head",
    };

    /// Norms before and after each half of a block.
    const GEMMA: Names = Names {
        attention_post_norm: Some("post_attention_layernorm"),
        mlp_norm: Some("pre_feedforward_layernorm"),
        mlp_post_norm: Some("post_feedforward_layernorm"),
        ..Names::USUAL
    };

    const PHI3: Names =
        Names { qkv: QkvNames::Fused("self_attn.qkv_proj"), up: UpNames::Fused("mlp.gate_up_proj"), ..Names::USUAL };

    /// Norms only after each half of a block.
    const OLMO2: Names = Names { attention_norm: None, mlp_norm: None, ..Names::GEMMA };

    /// One norm for both halves of a block.
    const COHERE: Names = Names { mlp_norm: Some("input_layernorm"), ..Names::USUAL };

    const GPT_NEOX: Names = Names {
        roots: &["gpt_neox"],
        embedding: "embed_in",
        qkv: QkvNames::ByHead("attention.query_key_value"),
        output: "attention.dense",
        up: UpNames::Plain("mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        final_norm: "final_layer_norm",
        head: "embed_out",
        ..Names::USUAL
    };
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

/// How the window of a family is switched on where `layer_types` does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
enum WindowRule {
    /// Never.
    Never,
    /// On every layer as soon as `sliding_window` is set.
    Always,
    /// On layers from `max_window_layers` on when `use_sliding_window` is true.
    Switched,
    /// On all layers but each `sliding_window_pattern`th.
    Pattern,
}

/// What sets one family apart from the others.
struct Family {
    architecture: &'static str,
    /// What the reference assumes where `config.json` is silent, as JSON.
    defaults: &'static str,
    names: Names,
    window: WindowRule,
    fields: fn(&mut Decoder, &Raw),
}

impl Family {
    /// Returns `config` with what the reference assumes; of a model that also sees images, the part about text.
    fn complete(&self, config: &Value) -> Value {
        let mut whole: Value = serde_json::from_str(self.defaults).expect("defaults are JSON");
        for part in [Some(config), config.get("text_config")].into_iter().flatten() {
            for (field, value) in part.as_object().into_iter().flatten() {
                whole[field] = value.clone();
            }
        }
        whole
    }
}

const GEMMA3_DEFAULTS: &str = r#"{
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": true
}"#;

fn gemma(decoder: &mut Decoder, raw: &Raw) {
    decoder.norm_offset = 1.0;
    decoder.scaled_embedding = true;
    decoder.qkv_bias = raw.attention_bias;
    decoder.output_bias = raw.attention_bias;
}

fn gemma3(decoder: &mut Decoder, raw: &Raw) {
    gemma(decoder, raw);
    decoder.qk_norm = QkNorm::Head;
}

fn deepseek(decoder: &mut Decoder, raw: &Raw) {
    decoder.interleaved_pairs = true;
    decoder.qkv_bias = raw.attention_bias;
    decoder.output_bias = raw.attention_bias;
}

const FAMILIES: [Family; 15] = [
    Family {
        architecture: "LlamaForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Never,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.mlp_bias = raw.mlp_bias;
        },
    },
    Family {
        architecture: "MistralForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Always,
        fields: |_, _| {},
    },
    Family {
        architecture: "Qwen2ForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Switched,
        fields: |decoder, _| decoder.qkv_bias = true,
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Switched,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.qk_norm = QkNorm::Head;
        },
    },
    Family {
        architecture: "Gemma2ForCausalLM",
        defaults: r#"{
            "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
            "sliding_window_pattern": 2, "max_position_embeddings": 8192, "tie_word_embeddings": true
        }"#,
        names: Names::GEMMA,
        window: WindowRule::Pattern,
        fields: gemma,
    },
    Family {
        architecture: "Gemma3ForCausalLM",
        defaults: GEMMA3_DEFAULTS,
        names: Names::GEMMA,
        window: WindowRule::Pattern,
        fields: gemma3,
    },
    Family {
        architecture: "Gemma3ForConditionalGeneration",
        defaults: GEMMA3_DEFAULTS,
        names: Names { roots: &["language_model.model", "model.language_model"], ..Names::GEMMA },
        window: WindowRule::Pattern,
        fields: gemma3,
    },
    Family {
        architecture: "Phi3ForCausalLM",
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        names: Names::PHI3,
        window: WindowRule::Always,
        fields: |_, _| {},
    },
    Family {
        architecture: "CohereForCausalLM",
        defaults: r#"{"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": true}"#,
        names: Names::COHERE,
        window: WindowRule::Never,
        fields: |decoder, raw| {
            decoder.norm = NormKind::Layer;
            decoder.norm_eps = raw.layer_norm_eps;
            decoder.parallel = true;
            decoder.interleaved_pairs = true;
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.qk_norm = if raw.use_qk_norm { QkNorm::EachHead } else { QkNorm::None };
            decoder.logit_scale = raw.logit_scale;
        },
    },
    Family {
        architecture: "Olmo2ForCausalLM",
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        names: Names::OLMO2,
        window: WindowRule::Never,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.qk_norm = QkNorm::Whole;
        },
    },
    Family {
        architecture: "GPTNeoXForCausalLM",
        defaults: r#"{
            "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "attention_bias": true,
            "use_parallel_residual": true
        }"#,
        names: Names::GPT_NEOX,
        window: WindowRule::Never,
        fields: |decoder, raw| {
            decoder.norm = NormKind::Layer;
            decoder.norm_eps = raw.layer_norm_eps;
            decoder.norm_bias = true;
            decoder.parallel = raw.use_parallel_residual;
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.mlp_bias = true;
        },
    },
    Family {
        architecture: "MixtralForCausalLM",
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        names: Names::USUAL,
        window: WindowRule::Always,
        fields: |_, _| {},
    },
    Family {
        architecture: "Qwen3MoeForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Switched,
        fields: |decoder, raw| {
            decoder.qkv_bias = raw.attention_bias;
            decoder.output_bias = raw.attention_bias;
            decoder.qk_norm = QkNorm::Head;
        },
    },
    Family {
        architecture: "DeepseekV2ForCausalLM",
        defaults: "{}",
        names: Names::USUAL,
        window: WindowRule::Never,
        fields: deepseek,
    },
    Family {
        architecture: "DeepseekV3ForCausalLM",
        defaults: r#"{
            "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "n_group": 8, "topk_group": 4,
            "routed_scaling_factor": 2.5, "n_shared_experts": 1, "first_k_dense_replace": 3
        }"#,
        names: Names::USUAL,
        window: WindowRule::Never,
        fields: deepseek,
    },
];

/// `config.json` as far as the families above read it; everything else in the file is of no consequence here.
#[derive(Debug, Deserialize)]
struct Raw {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default = "default_rms_norm_eps")]
    rms_norm_eps: f32,
    #[serde(default)]
    layer_norm_eps: f32,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_qk_norm: bool,
    #[serde(default)]
    use_parallel_residual: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    query_pre_attn_scalar: Option<f32>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    #[serde(default)]
    logit_scale: f32,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    use_bidirectional_attention: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    eos_token_id: Option<Ids>,
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
