//! What checkpoints call their tensors.

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
    pub(super) const USUAL: Names = Names {
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
    pub(super) const GEMMA: Names = Names {
        attention_post_norm: Some("post_attention_layernorm"),
        mlp_norm: Some("pre_feedforward_layernorm"),
        mlp_post_norm: Some("post_feedforward_layernorm"),
        ..Names::USUAL
    };

    pub(super) const PHI3: Names =
        Names { qkv: QkvNames::Fused("self_attn.qkv_proj"), up: UpNames::Fused("mlp.gate_up_proj"), ..Names::USUAL };

    /// Norms only after each half of a block.
    pub(super) const OLMO2: Names = Names { attention_norm: None, mlp_norm: None, ..Names::GEMMA };

    /// One norm for both halves of a block.
    pub(super) const COHERE: Names = Names { mlp_norm: Some("input_layernorm"), ..Names::USUAL };

    pub(super) const GPT_NEOX: Names = Names {
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
