//! The weights of a decoder, packed, under the names Hugging Face gives them.

use crate::{
    Error, LoadProgress,
    cpu::packed::{PANEL, Packed, StoredRow},
    model::{
        checkpoint::{Checkpoint, ElementType, Tensor},
        decoder::Decoder,
    },
};

/// A linear map: packed weights and, where the model has them, biases.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) packed: Packed,
    /// `[panels][64]`, in the order of the packed columns.
    pub(crate) bias: Option<Vec<[f32; PANEL]>>,
}

/// One block of the decoder.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `[hidden]`, zeros up to a whole panel.
    pub(crate) attention_norm: Vec<f32>,
    /// q, k and v side by side.
    pub(crate) qkv: Linear,
    /// Norms of the heads of q and of k, `[head_dim]`.
    pub(crate) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) output: Linear,
    /// `[hidden]`, zeros up to a whole panel.
    pub(crate) mlp_norm: Vec<f32>,
    /// Panels of 32 gate columns and the 32 up columns that belong to them.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// Where embeddings are looked up.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// In the head's packed weights, which are the same: a look-up is a stride through a panel instead of half a GiB twice.
    Tied,
    /// In rows as stored, `[vocab][hidden]`.
    Rows { dtype: ElementType, bytes: Vec<u8> },
}

/// All weights of a decoder.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) dtype: ElementType,
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
    /// `[hidden]`, zeros up to a whole panel.
    pub(crate) final_norm: Vec<f32>,
    pub(crate) head: Linear,
    /// Parameters.
    pub(crate) parameters: u64,
}

impl Weights {
    /// Copies the embedding of `token` to `out`, `[hidden]`.
    pub(crate) fn embed(&self, token: usize, out: &mut [f32]) {
        match &self.embedding {
            Embedding::Tied => self.head.packed.column(token, out),
            Embedding::Rows { dtype, bytes } => {
                let stride = out.len() * dtype.bytes();
                let row = &bytes[token * stride..][..stride];
                out.iter_mut().enumerate().for_each(|(index, out)| *out = dtype.get(row, index));
            }
        }
    }

    /// Returns the bytes of all packed weights and of the embedding.
    pub(crate) fn bytes(&self) -> u64 {
        let linears = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        let packed: usize = linears.chain([&self.head]).map(|linear| linear.packed.bytes()).sum();
        let rows = match &self.embedding {
            Embedding::Tied => 0,
            Embedding::Rows { bytes, .. } => bytes.len(),
        };
        (packed + rows) as u64
    }

    /// Packs the tensors of `checkpoint` that `decoder` names.
    pub(crate) fn pack(
        decoder: &Decoder,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, Error> {
        Packer::new(decoder, checkpoint, progress)?.pack()
    }
}

/// Packs one checkpoint, counting as it goes.
struct Packer<'a> {
    decoder: &'a Decoder,
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
    parameters: u64,
    dtype: ElementType,
    threads: usize,
}

/// A matrix that is part of a packed one: rows `[outputs]` of the model's input width, and biases.
#[derive(Clone)]
struct Source<'a> {
    tensor: Tensor<'a>,
    outputs: usize,
    bias: Option<Vec<f32>>,
}

impl<'a> Packer<'a> {
    fn new(
        decoder: &'a Decoder,
        checkpoint: &'a Checkpoint,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Result<Self, Error> {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let state = LoadProgress { done: 0, total: checkpoint.total_bytes() };
        let mut packer = Self { decoder, checkpoint, progress, state, parameters: 0, dtype: ElementType::F32, threads };
        packer.dtype = packer.common_dtype()?;
        (packer.progress)(state);
        Ok(packer)
    }

    /// Returns the type of all matrices, or f32, which holds any, when they differ.
    fn common_dtype(&self) -> Result<ElementType, Error> {
        let decoder = self.decoder;
        let (hidden, inner) = (decoder.hidden, decoder.intermediate);
        let mut dtypes = vec![self.checkpoint.tensor(EMBEDDING, &[decoder.vocab_size, hidden])?.dtype];
        for layer in 0..decoder.layers() {
            for (name, shape) in [
                ("self_attn.q_proj", [decoder.query_dim(), hidden]),
                ("self_attn.k_proj", [decoder.kv_dim(), hidden]),
                ("self_attn.v_proj", [decoder.kv_dim(), hidden]),
                ("self_attn.o_proj", [hidden, decoder.query_dim()]),
                ("mlp.gate_proj", [inner, hidden]),
                ("mlp.up_proj", [inner, hidden]),
                ("mlp.down_proj", [hidden, inner]),
            ] {
                dtypes.push(self.checkpoint.tensor(&format!("model.layers.{layer}.{name}.weight"), &shape)?.dtype);
            }
        }
        let first = dtypes[0];
        Ok(if dtypes.iter().all(|dtype| *dtype == first) { first } else { ElementType::F32 })
    }

    fn pack(mut self) -> Result<Weights, Error> {
        let layers = (0..self.decoder.layers()).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = self.norm("model.norm.weight")?;
        let (embedding, head) = self.ends()?;
        (self.progress)(LoadProgress { done: self.state.total, ..self.state });
        Ok(Weights { dtype: self.dtype, embedding, layers, final_norm, head, parameters: self.parameters })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, Error> {
        let decoder = self.decoder;
        let (hidden, inner) = (decoder.hidden, decoder.intermediate);
        let name = |part: &str| format!("model.layers.{layer}.{part}");

        let q = self.source(&name("self_attn.q_proj"), decoder.query_dim(), hidden, decoder.qkv_bias)?;
        let k = self.source(&name("self_attn.k_proj"), decoder.kv_dim(), hidden, decoder.qkv_bias)?;
        let v = self.source(&name("self_attn.v_proj"), decoder.kv_dim(), hidden, decoder.qkv_bias)?;
        let output = self.source(&name("self_attn.o_proj"), hidden, decoder.query_dim(), decoder.output_bias)?;
        let gate = self.source(&name("mlp.gate_proj"), inner, hidden, decoder.mlp_bias)?;
        let up = self.source(&name("mlp.up_proj"), inner, hidden, decoder.mlp_bias)?;
        let down = self.source(&name("mlp.down_proj"), hidden, inner, decoder.mlp_bias)?;

        let head_norms = if decoder.qk_norm {
            let mut norm =
                |which: &str| self.vector(&name(&format!("self_attn.{which}_norm.weight")), decoder.head_dim);
            Some((norm("q")?, norm("k")?))
        } else {
            None
        };
        Ok(Layer {
            attention_norm: self.norm(&name("input_layernorm.weight"))?,
            qkv: self.side_by_side(&[q, k, v], hidden)?,
            head_norms,
            output: self.side_by_side(&[output], decoder.query_dim())?,
            mlp_norm: self.norm(&name("post_attention_layernorm.weight"))?,
            gate_up: self.interleaved(&gate, &up, hidden)?,
            down: self.side_by_side(&[down], inner)?,
        })
    }

    /// Packs what stands at both ends: the embedding and the head.
    fn ends(&mut self) -> Result<(Embedding, Linear), Error> {
        let (vocab, hidden) = (self.decoder.vocab_size, self.decoder.hidden);
        let stored = self.checkpoint.tensor(EMBEDDING, &[vocab, hidden])?;
        self.parameters += (vocab * hidden) as u64;
        if self.decoder.tied_head {
            let source = Source { tensor: stored, outputs: vocab, bias: None };
            return Ok((Embedding::Tied, self.side_by_side(&[source], hidden)?));
        }
        let embedding = Embedding::Rows { dtype: stored.dtype, bytes: stored.bytes.to_vec() };
        self.count(stored.bytes.len());
        let head = self.source("lm_head", vocab, hidden, false)?;
        Ok((embedding, self.side_by_side(&[head], hidden)?))
    }

    fn source(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Source<'a>, Error> {
        let tensor = self.checkpoint.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), outputs)?) } else { None };
        self.parameters += (outputs * inputs) as u64;
        Ok(Source { tensor, outputs, bias })
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.checkpoint.tensor(name, &[length])?;
        self.parameters += length as u64;
        self.count(tensor.bytes.len());
        Ok(tensor.to_f32())
    }

    fn norm(&mut self, name: &str) -> Result<Vec<f32>, Error> {
        let mut weight = self.vector(name, self.decoder.hidden)?;
        weight.resize(self.decoder.hidden.next_multiple_of(PANEL), 0.0);
        Ok(weight)
    }

    /// Packs matrices so that their outputs follow each other.
    fn side_by_side(&mut self, sources: &[Source<'_>], inputs: usize) -> Result<Linear, Error> {
        let outputs: usize = sources.iter().map(|source| source.outputs).sum();
        let column = |mut column: usize| {
            sources.iter().find_map(|source| {
                if column >= source.outputs {
                    column -= source.outputs;
                    return None;
                }
                Some((source, column))
            })
        };
        self.linear(sources, outputs.div_ceil(PANEL), inputs, &column)
    }

    /// Packs gate and up so that a panel holds 32 columns of each.
    fn interleaved(&mut self, gate: &Source<'_>, up: &Source<'_>, inputs: usize) -> Result<Linear, Error> {
        let sources = [gate.clone(), up.clone()];
        let column = |column: usize| {
            let index = column / PANEL * (PANEL / 2) + column % (PANEL / 2);
            let source = &sources[column % PANEL / (PANEL / 2)];
            (index < source.outputs).then_some((source, index))
        };
        self.linear(&sources, gate.outputs.div_ceil(PANEL / 2), inputs, &column)
    }

    /// Packs `panels` panels; `column` says which output of which source a column is.
    fn linear<'b>(
        &mut self,
        sources: &[Source<'b>],
        panels: usize,
        inputs: usize,
        column: &(dyn Fn(usize) -> Option<(&'b Source<'b>, usize)> + Sync),
    ) -> Result<Linear, Error>
    where
        'a: 'b,
    {
        let row = |index: usize| {
            let (source, output) = column(index)?;
            Some(StoredRow { dtype: source.tensor.dtype, bytes: source.tensor.row(output, inputs) })
        };
        let packed = Packed::pack(self.dtype, panels, inputs, self.threads, &row)?;
        let bias_of = |index: usize| column(index).and_then(|(source, output)| Some(source.bias.as_ref()?[output]));
        let has_bias = sources.iter().any(|source| source.bias.is_some());
        let bias = has_bias.then(|| {
            let panel = |panel: usize| std::array::from_fn(|lane| bias_of(panel * PANEL + lane).unwrap_or(0.0));
            (0..panels).map(panel).collect()
        });
        self.count(sources.iter().map(|source| source.tensor.bytes.len()).sum());
        Ok(Linear { packed, bias })
    }

    fn count(&mut self, bytes: usize) {
        self.state.done += bytes as u64;
        (self.progress)(self.state);
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
