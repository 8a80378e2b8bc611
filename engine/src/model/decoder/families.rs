//! The families: what each one's reference assumes where `config.json` is silent, and the fields it sets.

use super::{Decoder, Names, NormKind, QkNorm, config::Raw};
use serde_json::Value;

/// How the window of a family is switched on where `layer_types` does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum WindowRule {
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
pub(super) struct Family {
    pub(super) architecture: &'static str,
    /// What the reference assumes where `config.json` is silent, as JSON.
    pub(super) defaults: &'static str,
    pub(super) names: Names,
    pub(super) window: WindowRule,
    pub(super) fields: fn(&mut Decoder, &Raw),
}

impl Family {
    /// Returns `config` with what the reference assumes; of a model that also sees images, the part about text.
    pub(super) fn complete(&self, config: &Value) -> Value {
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

fn qwen3(decoder: &mut Decoder, raw: &Raw) {
    decoder.qkv_bias = raw.attention_bias;
    decoder.output_bias = raw.attention_bias;
    decoder.qk_norm = QkNorm::Head;
}

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

pub(super) const FAMILIES: [Family; 15] = [
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
        fields: qwen3,
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
        fields: qwen3,
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
