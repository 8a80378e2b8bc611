//! One [`Decoder`], whatever the family: the fields that the forward pass reads. It never reads the name.

mod config;
mod families;
mod names;

pub(crate) use names::{Names, QkvNames, UpNames};

use crate::model::{experts::Mixture, latent::LatentShape, rope::Rope};
use kv_cache::TokenId;

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
    pub(super) fn named(name: &str) -> Result<Self, String> {
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
            other => Err(format!("hidden_act: `{other}` is not supported; known: silu, gelu, gelu_pytorch_tanh")),
        }
    }
}

impl Decoder {
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
