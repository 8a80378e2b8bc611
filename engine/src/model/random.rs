//! Models of a real shape with random weights: speed without a download.

use super::{
    checkpoint::ElementType,
    decoder::Decoder,
    rope::Rope,
    weights::{Embedding, Layer, Linear, Weights},
};
use crate::{
    Error,
    cpu::packed::{PANEL, Packed},
};

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
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Longest sequence.
    pub max_position: usize,
    /// Element type of the weights.
    pub dtype: ElementType,
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
            qkv_bias: false,
            max_position: 131_072,
            dtype: ElementType::Bf16,
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
            qkv_bias: true,
            max_position: 32_768,
            dtype: ElementType::Bf16,
        }
    }

    pub(super) fn decoder(&self) -> Decoder {
        Decoder {
            architecture: format!("random {}", self.name),
            vocab_size: self.vocab_size,
            hidden: self.hidden,
            intermediate: self.intermediate,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            max_position: self.max_position,
            norm_eps: 1e-5,
            qkv_bias: self.qkv_bias,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied_head: true,
            rope: Rope::plain(500_000.0, self.head_dim),
            windows: vec![None; self.layers],
            eos: Vec::new(),
        }
    }

    /// Fills all weights from `seed`.
    pub(super) fn weights(&self, seed: u64) -> Result<Weights, Error> {
        let mut filler = Filler { dtype: self.dtype, seed, matrices: 0, parameters: 0 };
        let qkv_dim = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let ones = || {
            let mut weight = vec![1.0; self.hidden];
            weight.resize(self.hidden.next_multiple_of(PANEL), 0.0);
            weight
        };
        let layer = |_| {
            let mut qkv = filler.linear(qkv_dim, self.hidden)?;
            qkv.bias = self.qkv_bias.then(|| vec![[0.01; PANEL]; qkv.packed.panels()]);
            Ok(Layer {
                attention_norm: ones(),
                qkv,
                head_norms: None,
                output: filler.linear(self.hidden, self.heads * self.head_dim)?,
                mlp_norm: ones(),
                gate_up: filler.linear(2 * self.intermediate, self.hidden)?,
                down: filler.linear(self.hidden, self.intermediate)?,
            })
        };
        let layers = (0..self.layers).map(layer).collect::<Result<_, Error>>()?;
        let head = filler.linear(self.vocab_size, self.hidden)?;
        Ok(Weights {
            dtype: self.dtype,
            embedding: Embedding::Tied,
            layers,
            final_norm: ones(),
            head,
            parameters: filler.parameters,
        })
    }
}

struct Filler {
    dtype: ElementType,
    seed: u64,
    matrices: u64,
    parameters: u64,
}

impl Filler {
    /// Makes a matrix of elements of either sign around `1 / sqrt(inputs)`, which keeps activations in range.
    ///
    /// Columns beyond `outputs` are as random as the others; nobody reads their sums.
    fn linear(&mut self, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        self.matrices += 1;
        self.parameters += (outputs * inputs) as u64;
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
        let seed = self.seed ^ self.matrices << 32;
        let mut packed = Packed::zeroed(self.dtype, outputs.div_ceil(PANEL), inputs)?;
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        packed.for_each_panel(threads, &|panel, bytes| {
            let mut state = seed ^ panel as u64;
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&(split_mix(&mut state) & random | fixed).to_le_bytes());
            }
        });
        Ok(Linear { packed, bias: None })
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
        for dtype in [ElementType::F32, ElementType::F16, ElementType::Bf16] {
            let shape = ModelShape {
                name: "tiny",
                vocab_size: 300,
                hidden: 96,
                intermediate: 200,
                layers: 3,
                heads: 6,
                kv_heads: 2,
                head_dim: 16,
                qkv_bias: true,
                max_position: 128,
                dtype,
            };
            let model = Model::random(&shape, 7).expect("memory");
            assert_eq!(model.info().dtype, dtype.name());
            assert_eq!(model.info().parameters, 300 * 96 + 3 * (96 * 10 * 16 + 96 * 96 + 3 * 200 * 96));
            assert_ne!(model.info().fingerprint, Model::random(&shape, 8).expect("memory").info().fingerprint);

            let config = Config { kv_bytes: 1 << 20, token_budget: 64, max_sequences: 1, ..Config::default() };
            let mut engine = Engine::new(model, &config).expect("an engine");
            let tokens: Vec<u32> = (0..50).collect();
            let pages: Vec<PageId> = (0..4).map(PageId).collect();
            let sampling = Sampling::default();
            let sample = Sample { sampling: &sampling, history: &tokens, prompt_tokens: 50, forbidden: &[] };
            let row = Row { tokens: &tokens, start: 0, pages: &pages, sample: Some(sample) };
            engine.step(&[row], &mut |_| {}).expect("a good row");
            let logits = engine.logits(0).expect("sampled");
            let largest = logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
            assert!(logits.iter().all(|logit| logit.is_finite()) && largest > 0.1 && largest < 1e3, "{largest}");
        }
    }
}
