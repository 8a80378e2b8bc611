//! Models of a real shape with random weights: speed without a download.

use super::{
    checkpoint::ElementType,
    decoder::Decoder,
    experts::Mixture,
    latent::LatentShape,
    quantized::Quantize,
    rope::Rope,
    weights::{
        Attention, Dense, Embedding, Experts, HeadAttention, Latent, Layer, Linear, LowRank, Mlp, Norm, Weights,
    },
};
use crate::{
    Error,
    cpu::{
        packed::{PANEL, Packed},
        scheme::{Code, QuantizedRow, Scheme},
    },
};
use half::f16;

/// Shape of a model whose weights do not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// For people: `llama-1b`.
    pub name: &'static str,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width between the gate and the down projection.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Latent attention instead of keys and values for each head; `kv_heads` and `head_dim` are then of no consequence.
    pub latent: Option<LatentRanks>,
    /// Experts in all layers but the first, which is dense.
    pub experts: Option<ExpertShape>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Longest sequence.
    pub max_position: usize,
    /// Element type of the weights.
    pub dtype: ElementType,
    /// What matrices are quantised to, as [`Model::load_quantized`](crate::Model::load_quantized) does it, but for the groups of
    /// int4: they are of 128 inputs, as in most checkpoints of GPTQ and AWQ.
    pub quantize: Option<Quantize>,
}

/// Experts of a [`ModelShape`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token goes to.
    pub chosen: usize,
    /// Width between an expert's gate and its down projection.
    pub intermediate: usize,
    /// The same of what every token goes through; 0 = nothing.
    pub shared: usize,
}

/// Latent attention of a [`ModelShape`]; all are even.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatentRanks {
    /// Of what queries are made from; `None` = the residual stream.
    pub query: Option<usize>,
    /// Of the latent that keys and values are made from.
    pub key_value: usize,
    /// Of a head's query that is not rotated.
    pub plain: usize,
    /// Of a head's query that is rotated, and of the rotated key.
    pub rope: usize,
    /// Of a head's value.
    pub value: usize,
}

impl ModelShape {
    /// Llama 3.2 1B: 1.24 G parameters, tied head.
    pub fn llama_1b() -> Self {
        Self {
            name: "llama-1b",
            vocab_size: 128_256,
            hidden: 2048,
            intermediate: 8192,
            layers: 16,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            latent: None,
            experts: None,
            qkv_bias: false,
            max_position: 131_072,
            dtype: ElementType::Bf16,
            quantize: None,
        }
    }

    /// Qwen 2.5 0.5B: 0.49 G parameters, tied head.
    pub fn qwen_0_5b() -> Self {
        Self {
            name: "qwen-0.5b",
            vocab_size: 151_936,
            hidden: 896,
            intermediate: 4864,
            layers: 24,
            heads: 14,
            kv_heads: 2,
            head_dim: 64,
            latent: None,
            experts: None,
            qkv_bias: true,
            max_position: 32_768,
            dtype: ElementType::Bf16,
            quantize: None,
        }
    }

    /// Five of the 48 layers of Qwen3 30B-A3B, one of them dense: 2.9 G parameters of which a token uses 0.6 G.
    pub fn qwen3_moe() -> Self {
        Self {
            name: "qwen3-moe",
            vocab_size: 151_936,
            hidden: 2048,
            intermediate: 6144,
            layers: 5,
            heads: 32,
            kv_heads: 4,
            head_dim: 128,
            latent: None,
            experts: Some(ExpertShape { count: 128, chosen: 8, intermediate: 768, shared: 0 }),
            qkv_bias: false,
            max_position: 32_768,
            dtype: ElementType::Bf16,
            quantize: None,
        }
    }

    pub(super) fn decoder(&self) -> Result<Decoder, Error> {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": true,
        });
        let mut decoder = Decoder::parse(&config).map_err(|problem| Error::setting("shape", problem))?;
        decoder.architecture = format!("random {}", self.name);
        decoder.qkv_bias = self.qkv_bias;
        if let Some(ranks) = &self.latent {
            let shape = ranks.shape();
            decoder.ropes = vec![Rope::plain(5e5, shape.rope)];
            decoder.score_scale = shape.score_scale(&config);
            (decoder.kv_heads, decoder.head_dim, decoder.latent) = (1, shape.key(), Some(shape));
        }
        decoder.mixture = self.experts.as_ref().map(|ExpertShape { count, chosen, intermediate, shared }| {
            let layers = (0..self.layers).map(|layer| layer > 0).collect();
            Mixture::random(*count, *chosen, *intermediate, *shared, layers)
        });
        Ok(decoder)
    }

    /// Fills all weights from `seed`.
    pub(super) fn weights(&self, seed: u64) -> Result<Weights, Error> {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let (dtype, quantize) = (self.dtype, self.quantize);
        let mut filler = Filler { dtype, quantize, threads, seed, matrices: 0, parameters: 0 };
        let qkv_dim = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let ones = || {
            let mut weight = vec![1.0; self.hidden];
            weight.resize(self.hidden.next_multiple_of(PANEL), 0.0);
            Norm { weight, bias: None }
        };
        let layer = |layer: usize| {
            Ok(Layer {
                attention_norm: Some(ones()),
                attention: match &self.latent {
                    None => Attention::Heads(filler.heads(self, qkv_dim)?),
                    Some(ranks) => Attention::Latent(filler.latent(self, &ranks.shape())?),
                },
                attention_post_norm: None,
                mlp_norm: Some(ones()),
                mlp: match &self.experts {
                    Some(experts) if layer > 0 => Mlp::Experts(filler.experts(self.hidden, experts)?),
                    _ => Mlp::Dense(filler.dense(self.hidden, self.intermediate)?),
                },
                mlp_post_norm: None,
            })
        };
        let layers = (0..self.layers).map(layer).collect::<Result<_, Error>>()?;
        let head = filler.linear_as(self.quantize.map(Quantize::head_scheme), self.vocab_size, self.hidden)?;
        Ok(Weights {
            dtype: self.quantize.map_or(self.dtype.name(), Quantize::name).to_owned(),
            stored: self.dtype,
            embedding: Embedding::Tied,
            embedding_scale: 1.0,
            layers,
            final_norm: ones(),
            head,
            parameters: filler.parameters,
        })
    }
}

struct Filler {
    dtype: ElementType,
    quantize: Option<Quantize>,
    threads: usize,
    seed: u64,
    matrices: u64,
    parameters: u64,
}

impl LatentRanks {
    fn shape(&self) -> LatentShape {
        let LatentRanks { query: query_rank, key_value: rank, plain, rope, value } = *self;
        LatentShape { query_rank, rank, plain, rope, value }
    }
}

impl Filler {
    fn heads(&mut self, shape: &ModelShape, qkv_dim: usize) -> Result<HeadAttention, Error> {
        let mut qkv = self.linear(qkv_dim, shape.hidden)?;
        qkv.bias = shape.qkv_bias.then(|| vec![[0.01; PANEL]; qkv.packed.panels()]);
        let output = self.linear(shape.hidden, shape.heads * shape.head_dim)?;
        Ok(HeadAttention { qkv, head_norms: None, output })
    }

    fn latent(&mut self, shape: &ModelShape, latent: &LatentShape) -> Result<Latent, Error> {
        let queries = shape.heads * latent.query();
        let query = match latent.query_rank {
            Some(rank) => Some(LowRank { norm: vec![1.0; rank], up: self.linear(queries, rank)? }),
            None => None,
        };
        Ok(Latent {
            entry: self.linear(latent.query_rank.unwrap_or(queries) + latent.key(), shape.hidden)?,
            query,
            norm: vec![1.0; latent.rank],
            key: self.blocks(None, shape.heads, latent.rank, latent.plain)?,
            value: self.blocks(None, shape.heads, latent.value, latent.rank)?,
            output: self.linear(shape.hidden, shape.heads * latent.value)?,
        })
    }

    fn dense(&mut self, hidden: usize, intermediate: usize) -> Result<Dense, Error> {
        Ok(Dense { gate_up: self.linear(2 * intermediate, hidden)?, down: self.linear(hidden, intermediate)? })
    }

    fn experts(&mut self, hidden: usize, experts: &ExpertShape) -> Result<Experts, Error> {
        Ok(Experts {
            router: self.linear_as(None, experts.count, hidden)?,
            correction: None,
            gate_up: self.blocks(self.scheme(hidden), experts.count, 2 * experts.intermediate, hidden)?,
            down: self.blocks(self.scheme(experts.intermediate), experts.count, hidden, experts.intermediate)?,
            shared: match experts.shared {
                0 => None,
                width => Some(self.dense(hidden, width)?),
            },
        })
    }

    /// Makes `count` matrices, each on panels of its own.
    fn blocks(&mut self, scheme: Option<Scheme>, count: usize, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        let whole = outputs.next_multiple_of(PANEL);
        let linear = self.linear_as(scheme, count * whole, inputs)?;
        self.parameters -= (count * (whole - outputs) * inputs) as u64;
        Ok(linear)
    }

    /// Returns how a linear of `inputs` inputs is quantised, if it is.
    fn scheme(&self, inputs: usize) -> Option<Scheme> {
        self.quantize.map(|quantize| match quantize.scheme(inputs) {
            scheme if scheme.code == Code::Int4 => Scheme { group: 128, ..scheme },
            scheme => scheme,
        })
    }

    /// Makes a matrix of elements of either sign around `1 / sqrt(inputs)`, which keeps activations in range.
    fn linear(&mut self, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        self.linear_as(self.scheme(inputs), outputs, inputs)
    }

    /// The same under a scheme, or as floats.
    ///
    /// Columns beyond `outputs` are as random as the others; nobody reads their sums.
    fn linear_as(&mut self, scheme: Option<Scheme>, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        self.matrices += 1;
        self.parameters += (outputs * inputs) as u64;
        let (seed, panels) = (self.seed ^ self.matrices << 32, outputs.div_ceil(PANEL));
        let packed = match scheme {
            Some(scheme) => self.codes(seed, scheme, panels, inputs),
            None => self.floats(seed, panels, inputs),
        };
        Ok(Linear { packed: packed?, bias: None })
    }

    fn floats(&self, seed: u64, panels: usize, inputs: usize) -> Result<Packed, Error> {
        let exponent = -((inputs as f64).log2() / 2.0).round() as i64;
        // Sign and mantissa are random, the exponent is fixed: one mask and one or make a finite number of any type.
        let (random, fixed) = match self.dtype {
            ElementType::F32 => (0x807f_ffff_807f_ffff, ((127 + exponent) as u64) << 23 & 0xffff_ffff),
            ElementType::F16 => (0x83ff_83ff_83ff_83ff, ((15 + exponent).max(1) as u64) << 10),
            ElementType::Bf16 => (0x807f_807f_807f_807f, ((127 + exponent) as u64) << 7),
        };
        let fixed = match self.dtype {
            ElementType::F32 => fixed << 32 | fixed,
            ElementType::F16 | ElementType::Bf16 => fixed << 48 | fixed << 32 | fixed << 16 | fixed,
        };
        let mut packed = Packed::zeroed(self.dtype, panels, inputs)?;
        packed.for_each_panel(self.threads, &|panel, bytes| {
            let mut state = seed ^ panel as u64;
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&(split_mix(&mut state) & random | fixed).to_le_bytes());
            }
        });
        Ok(packed)
    }

    fn codes(&self, seed: u64, scheme: Scheme, panels: usize, inputs: usize) -> Result<Packed, Error> {
        // Codes that are all possible, and their root of the mean square; no e4m3 has these bits and is not a number.
        let (random, spread) = match scheme.code {
            Code::Int4 => (0x0f0f_0f0f_0f0f_0f0f, 4.6),
            Code::Int8 => (u64::MAX, 74.0),
            Code::Fp8 => (0xf7f7_f7f7_f7f7_f7f7, 80.0),
        };
        let scale = f16::from_f32(1.5 / spread / (inputs as f32).sqrt()).to_f32();
        Packed::pack_quantized(scheme, panels, inputs, self.threads, None, &|column, row: &mut QuantizedRow| {
            let mut state = seed ^ column as u64;
            for codes in row.codes.chunks_mut(8) {
                codes.copy_from_slice(&(split_mix(&mut state) & random).to_le_bytes()[..codes.len()]);
            }
            row.scales.fill(scale);
            true
        })
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Engine, Model, Row, Sample, Sampling};
    use kv_cache::PageId;

    #[test]
    fn random_models_of_every_type_compute_finite_logits() {
        let floats = [ElementType::F32, ElementType::F16, ElementType::Bf16].map(|dtype| (dtype, None));
        let codes = [Quantize::Int8, Quantize::Int4, Quantize::Fp8].map(|code| (ElementType::Bf16, Some(code)));
        for (dtype, quantize) in floats.into_iter().chain(codes) {
            let shape = ModelShape {
                name: "tiny",
                vocab_size: 300,
                hidden: 96,
                intermediate: 200,
                layers: 3,
                heads: 6,
                kv_heads: 2,
                head_dim: 16,
                latent: None,
                experts: None,
                qkv_bias: true,
                max_position: 128,
                dtype,
                quantize,
            };
            let model = Model::random(&shape, 7).expect("memory");
            assert_eq!(model.info().dtype, quantize.map_or(dtype.name(), Quantize::name));
            assert_eq!(model.info().parameters, 300 * 96 + 3 * (96 * 10 * 16 + 96 * 96 + 3 * 200 * 96));
            assert_ne!(model.info().fingerprint, Model::random(&shape, 8).expect("memory").info().fingerprint);

            let config = Config { kv_bytes: Some(1 << 20), token_budget: 64, max_sequences: 1, ..Config::default() };
            let mut engine = Engine::new(model, &config).expect("an engine");
            let tokens: Vec<u32> = (0..50).collect();
            let pages: Vec<PageId> = (0..4).map(PageId).collect();
            let sampling = Sampling { logprobs: Some(0), ..Sampling::default() };
            let sample = Sample {
                sampling: &sampling,
                history: &tokens,
                prompt_tokens: 50,
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let row = Row { tokens: &tokens, start: 0, pages: &pages, sample: Some(sample), ..Row::default() };
            engine.step(&[row], &mut |_| {}).expect("a good row");
            let logits = engine.logits(0).expect("sampled");
            let largest = logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
            assert!(logits.iter().all(|logit| logit.is_finite()) && largest > 0.1 && largest < 1e3, "{largest}");
        }
    }
}
