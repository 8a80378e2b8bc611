//! The weights of a decoder, packed, under the names Hugging Face gives them.

use crate::{
    Error, LoadProgress,
    cpu::packed::{PANEL, Packed},
    model::{
        checkpoint::{Checkpoint, ElementType},
        decoder::{Decoder, QkNorm, QkvNames, UpNames},
        packer::{Matrix, Packer, Source},
        quantized::{Quantization, Quantize},
    },
};
use std::sync::Arc;

/// A linear map: packed weights and, where the model has them, biases.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) packed: Packed,
    /// `[panels][64]`, in the order of the packed columns.
    pub(crate) bias: Option<Vec<[f32; PANEL]>>,
}

/// A norm of the residual stream's width.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[hidden]`, zeros up to a whole panel.
    pub(crate) weight: Vec<f32>,
    /// As long.
    pub(crate) bias: Option<Vec<f32>>,
}

/// One block of the decoder. A norm that is not there leaves things as they are.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Option<Norm>,
    pub(crate) attention: Attention,
    /// Of what attention gives, before it is added to the residual.
    pub(crate) attention_post_norm: Option<Norm>,
    pub(crate) mlp_norm: Option<Norm>,
    pub(crate) mlp: Mlp,
    /// Of what the MLP gives, before it is added to the residual.
    pub(crate) mlp_post_norm: Option<Norm>,
}

impl Layer {
    /// Returns all linears of the block.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let mut linears = match &self.attention {
            Attention::Heads(HeadAttention { qkv, output, .. }) => vec![qkv, output],
            Attention::Latent(Latent { entry, query, key, value, output, .. }) => {
                let up = query.as_ref().map(|query| &query.up);
                [entry, key, value, output].into_iter().chain(up).collect()
            }
        };
        match &self.mlp {
            Mlp::Dense(Dense { gate_up, down }) => linears.extend([gate_up, down]),
            Mlp::Plain(Plain { up, down }) => linears.extend([up, down]),
            Mlp::Experts(Experts { router, gate_up, down, shared, .. }) => {
                linears.extend([router, gate_up, down]);
                linears.extend(shared.iter().flat_map(|Dense { gate_up, down }| [gate_up, down]));
            }
        }
        linears.into_iter()
    }
}

/// How a block attends.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each layer, made once and never moved")]
pub(crate) enum Attention {
    /// Keys and values of their own for each head or group of heads.
    Heads(HeadAttention),
    /// One latent for all heads.
    Latent(Latent),
}

/// Attention with keys and values for each head or group of heads.
#[derive(Debug)]
pub(crate) struct HeadAttention {
    /// q, k and v side by side.
    pub(crate) qkv: Linear,
    /// Norms of the heads of q and of k: `[head_dim]` for each alike, or `[heads * head_dim]`.
    pub(crate) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) output: Linear,
}

/// Latent attention of one block ([`super::latent`]).
#[derive(Debug)]
pub(crate) struct Latent {
    /// What queries are made from, or the queries themselves, and the latent with the rotated key, side by side.
    pub(crate) entry: Linear,
    /// What makes queries, where they do not come from the residual stream directly.
    pub(crate) query: Option<LowRank>,
    /// Norm of the latent, `[rank]`.
    pub(crate) norm: Vec<f32>,
    /// Head by head from the plain part of a query to the latents.
    pub(crate) key: Linear,
    /// Head by head from the latents to values.
    pub(crate) value: Linear,
    pub(crate) output: Linear,
}

/// A norm and the linear that leads out of a narrow space.
#[derive(Debug)]
pub(crate) struct LowRank {
    /// `[rank]`.
    pub(crate) norm: Vec<f32>,
    pub(crate) up: Linear,
}

/// What follows attention in a block.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each layer, made once and never moved")]
pub(crate) enum Mlp {
    /// One gated pair for all tokens.
    Dense(Dense),
    /// One pair without a gate.
    Plain(Plain),
    /// Many gated pairs, of which each token uses a few.
    Experts(Experts),
}

/// Gated pairs of which every token uses a few, chosen by its scores.
#[derive(Debug)]
pub(crate) struct Experts {
    /// One score for each expert.
    pub(crate) router: Linear,
    /// Added to the scores that experts are chosen by, `[experts]`.
    pub(crate) correction: Option<Vec<f32>>,
    /// As in [`Dense`], one expert's panels after the other's.
    pub(crate) gate_up: Linear,
    /// One expert's panels after the other's.
    pub(crate) down: Linear,
    /// What every token goes through as well.
    pub(crate) shared: Option<Dense>,
}

/// A gated linear and the one that leads back.
#[derive(Debug)]
pub(crate) struct Dense {
    /// Panels of 32 gate columns and the 32 up columns that belong to them.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// A linear with an activation and the one that leads back.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// Where embeddings are looked up.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// In the head's packed weights, which are the same: a look-up is a stride through a panel instead of half a GiB twice.
    Tied,
    /// In panels of its own, because it is quantised and the head is another matrix.
    Packed(Packed),
    /// In rows as stored, `[vocab][hidden]`.
    Rows { dtype: ElementType, bytes: Vec<u8> },
}

/// All weights of a decoder.
#[derive(Debug)]
pub(crate) struct Weights {
    /// Element type for people: `bf16`, `int4 (gptq, group 32)`.
    pub(crate) dtype: String,
    /// Element type of what the checkpoint keeps as floats; f32 when its matrices are quantised or differ.
    pub(crate) stored: ElementType,
    pub(crate) embedding: Embedding,
    /// What embeddings are multiplied by.
    pub(crate) embedding_scale: f32,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Norm,
    pub(crate) head: Linear,
    /// Parameters.
    pub(crate) parameters: u64,
}

impl Weights {
    /// Copies the embedding of `token` to `out`, `[hidden]`.
    pub(crate) fn embed(&self, token: usize, out: &mut [f32]) {
        match &self.embedding {
            Embedding::Tied => self.head.packed.column(token, out),
            Embedding::Packed(packed) => packed.column(token, out),
            Embedding::Rows { dtype, bytes } => {
                let stride = out.len() * dtype.bytes();
                let row = &bytes[token * stride..][..stride];
                out.iter_mut().enumerate().for_each(|(index, out)| *out = dtype.get(row, index));
            }
        }
        if self.embedding_scale != 1.0 {
            out.iter_mut().for_each(|value| *value *= self.embedding_scale);
        }
    }

    /// Returns all linears.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears).chain([&self.head])
    }

    /// Returns the weights of each linear.
    pub(crate) fn packed(&self) -> impl Iterator<Item = &Packed> {
        self.linears().map(|linear| &linear.packed)
    }

    /// Returns the bytes of all packed weights and of the embedding.
    pub(crate) fn bytes(&self) -> u64 {
        let packed: usize = self.linears().map(|linear| linear.packed.bytes()).sum();
        let rows = match &self.embedding {
            Embedding::Tied => 0,
            Embedding::Packed(packed) => packed.bytes(),
            Embedding::Rows { bytes, .. } => bytes.len(),
        };
        (packed + rows) as u64
    }

    /// Returns the bytes of all experts, without routers and what is shared.
    pub(crate) fn expert_bytes(&self) -> u64 {
        let of_layer = |layer: &Layer| match &layer.mlp {
            Mlp::Experts(experts) => experts.gate_up.packed.bytes() + experts.down.packed.bytes(),
            Mlp::Dense(_) | Mlp::Plain(_) => 0,
        };
        self.layers.iter().map(of_layer).sum::<usize>() as u64
    }

    /// Packs the tensors of `checkpoint` that `decoder` names: quantised as `quantization` says, or as `quantize` asks.
    pub(crate) fn pack(
        decoder: &Decoder,
        checkpoint: &Checkpoint,
        quantization: Option<&Quantization>,
        quantize: Option<Quantize>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, Error> {
        Packer::new(decoder, checkpoint, quantization, quantize, progress).pack()
    }
}

impl Packer<'_> {
    fn pack(mut self) -> Result<Weights, Error> {
        let (decoder, root) = (self.decoder, self.root());
        let layers = (0..decoder.layers()).map(|layer| self.layer(root, layer)).collect::<Result<_, _>>()?;
        let final_norm = self.norm(&format!("{root}.{}", decoder.names.final_norm))?;
        let (embedding, head) = self.ends(root)?;
        (self.progress)(LoadProgress { done: self.state.total, ..self.state });
        let (dtype, stored) = match (self.quantization, self.quantize) {
            (Some(quantization), _) => (quantization.describe(), ElementType::F32),
            (None, Some(quantize)) => (format!("{quantize} (quantised from {})", self.dtype.name()), self.dtype),
            (None, None) => (self.dtype.name().to_owned(), self.dtype),
        };
        // The reference multiplies in the weights' own type, whose idea of the root this is.
        let embedding_scale =
            if decoder.scaled_embedding { self.dtype.round((decoder.hidden as f32).sqrt()) } else { 1.0 };
        Ok(Weights { dtype, stored, embedding, embedding_scale, layers, final_norm, head, parameters: self.parameters })
    }

    /// Returns what stands before the names of the decoder's tensors.
    fn root(&self) -> &'static str {
        let names = &self.decoder.names;
        let found = names.roots.iter().find(|root| self.checkpoint.has(&format!("{root}.{}.weight", names.embedding)));
        // Without any, reading the embedding says that it is missing.
        found.unwrap_or(&names.roots[0])
    }

    fn layer(&mut self, root: &str, layer: usize) -> Result<Layer, Error> {
        let names = self.decoder.names;
        let name = |part: &str| format!("{root}.{}.{layer}.{part}", names.layers);
        let attention = match &self.decoder.latent {
            None => Attention::Heads(self.heads(&name)?),
            Some(shape) => Attention::Latent(self.latent(&name, shape)?),
        };
        let mlp = match &self.decoder.mixture {
            Some(mixture) if mixture.layers[layer] => Mlp::Experts(self.experts(&name, mixture)?),
            _ => self.mlp(&name)?,
        };
        let mut norm = |part: Option<&str>| part.map(|part| self.norm(&name(part))).transpose();
        Ok(Layer {
            attention_norm: norm(names.attention_norm)?,
            attention,
            attention_post_norm: norm(names.attention_post_norm)?,
            mlp_norm: norm(names.mlp_norm)?,
            mlp,
            mlp_post_norm: norm(names.mlp_post_norm)?,
        })
    }

    fn heads(&mut self, name: &dyn Fn(&str) -> String) -> Result<HeadAttention, Error> {
        let decoder = self.decoder;
        let (hidden, q_dim, kv_dim, bias) = (decoder.hidden, decoder.query_dim(), decoder.kv_dim(), decoder.qkv_bias);
        let qkv = match decoder.names.qkv {
            QkvNames::Apart { q, k, v } => vec![
                self.source(&name(q), q_dim, hidden, bias)?,
                self.source(&name(k), kv_dim, hidden, bias)?,
                self.source(&name(v), kv_dim, hidden, bias)?,
            ],
            QkvNames::Fused(qkv) => vec![self.source(&name(qkv), q_dim + 2 * kv_dim, hidden, bias)?],
            QkvNames::ByHead(qkv) => {
                let (dim, heads) = (decoder.head_dim, decoder.heads);
                let all = self.source(&name(qkv), 3 * q_dim, hidden, bias)?;
                let part = |index: usize| all.part(index % heads * 3 * dim + index / heads * dim, dim);
                (0..3 * heads).map(part).collect()
            }
        };
        let head_norms = match decoder.qk_norm {
            QkNorm::None => None,
            _ => Some((
                self.head_norm(&name("self_attn.q_norm.weight"), decoder.heads)?,
                self.head_norm(&name("self_attn.k_norm.weight"), decoder.kv_heads)?,
            )),
        };
        let output = self.source(&name(decoder.names.output), hidden, q_dim, decoder.output_bias)?;
        Ok(HeadAttention {
            qkv: self.side_by_side(&qkv, hidden)?,
            head_norms,
            output: self.side_by_side(&[output], q_dim)?,
        })
    }

    fn head_norm(&mut self, name: &str, heads: usize) -> Result<Vec<f32>, Error> {
        let dim = self.decoder.head_dim;
        let shape: &[usize] = match self.decoder.qk_norm {
            QkNorm::None | QkNorm::Head => &[dim],
            QkNorm::EachHead => &[heads, dim],
            QkNorm::Whole => &[heads * dim],
        };
        let mut weight = self.floats(name, shape)?;
        weight.iter_mut().for_each(|weight| *weight += self.decoder.norm_offset);
        Ok(weight)
    }

    fn mlp(&mut self, name: &dyn Fn(&str) -> String) -> Result<Mlp, Error> {
        let decoder = self.decoder;
        let (hidden, inner, bias) = (decoder.hidden, decoder.intermediate, decoder.mlp_bias);
        let (gate, up) = match decoder.names.up {
            UpNames::Gated { gate, up } => {
                (self.source(&name(gate), inner, hidden, bias)?, self.source(&name(up), inner, hidden, bias)?)
            }
            UpNames::Fused(gate_up) => {
                let both = self.source(&name(gate_up), 2 * inner, hidden, bias)?;
                (both.part(0, inner), both.part(inner, inner))
            }
            UpNames::Plain(up) => {
                let up = self.source(&name(up), inner, hidden, bias)?;
                let up = self.side_by_side(&[up], hidden)?;
                return Ok(Mlp::Plain(Plain { up, down: self.down(name)? }));
            }
        };
        let gate_up = self.interleaved(&gate, &up, hidden)?;
        Ok(Mlp::Dense(Dense { gate_up, down: self.down(name)? }))
    }

    fn down(&mut self, name: &dyn Fn(&str) -> String) -> Result<Linear, Error> {
        let decoder = self.decoder;
        let (hidden, inner) = (decoder.hidden, decoder.intermediate);
        let down = self.source(&name(decoder.names.down), hidden, inner, decoder.mlp_bias)?;
        self.side_by_side(&[down], inner)
    }

    /// Packs what stands at both ends: the embedding and the head.
    fn ends(&mut self, root: &str) -> Result<(Embedding, Linear), Error> {
        let (vocab, hidden, names) = (self.decoder.vocab_size, self.decoder.hidden, self.decoder.names);
        let name = format!("{root}.{}", names.embedding);
        let stored = match self.checkpoint.blocks(&format!("{name}.weight"), [vocab, hidden])? {
            Some(blocks) => Matrix::Quantized(Arc::new(blocks)),
            None => Matrix::Float(self.checkpoint.tensor(&format!("{name}.weight"), &[vocab, hidden])?),
        };
        self.parameters += (vocab * hidden) as u64;
        if self.decoder.tied_head {
            let source = self.head(&name, stored)?;
            return Ok((Embedding::Tied, self.side_by_side(&[source], hidden)?));
        }
        let embedding = match stored {
            Matrix::Float(stored) => {
                self.count(stored.bytes.len());
                Embedding::Rows { dtype: stored.dtype, bytes: stored.bytes.to_vec() }
            }
            Matrix::Quantized(_) => {
                let source = Source { matrix: stored, outputs: vocab, bias: None };
                Embedding::Packed(self.side_by_side(&[source], hidden)?.packed)
            }
        };
        let head = self.source_as_stored(names.head, vocab, hidden, false)?;
        let head = self.head(names.head, head.matrix)?;
        Ok((embedding, self.side_by_side(&[head], hidden)?))
    }
}
