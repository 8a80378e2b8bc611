//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): its shape, and how its weights are packed.
//!
//! A token's keys and values of all heads come from one *latent* of `rank` elements and one rotated key of `rope` elements that
//! all heads share; these alone are kept in pages. A head's key is `[W_uk latent, rotated key]` and its value `W_uv latent`, so
//! that `q . W_uk latent = (W_uk^T q) . latent`: queries are taken into the space of latents, attention runs there as with one
//! key/value head of `rank + rope` elements, and `W_uv` leads out of it ("absorbed" projections). Prompts are computed in the
//! same way as single tokens, which costs more arithmetic than expanding keys would, and gives them the same bits.

use crate::{
    Error,
    cpu::packed::PANEL,
    model::{
        checkpoint::{ElementType, Tensor},
        packer::{Matrix, Packer, Source},
        rope::yarn_mscale,
        weights::{Latent, Linear, LowRank},
    },
};
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;

/// Added to the mean square under the root of the norms of latent attention, whatever the configuration says of the others: so does the
/// reference.
pub(crate) const NORM_EPS: f32 = 1e-6;

/// Elements of the parts of latent attention.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LatentShape {
    /// Of what all heads' queries are made from; `None` = they come from the residual stream directly.
    pub(crate) query_rank: Option<usize>,
    /// Of the latent from which keys and values come.
    pub(crate) rank: usize,
    /// Of a head's query that meets the latent.
    pub(crate) plain: usize,
    /// Of a head's query that is rotated, and of the rotated key.
    pub(crate) rope: usize,
    /// Of a head's value.
    pub(crate) value: usize,
}

impl LatentShape {
    /// Reads the shape from `config` if its architecture has latent attention.
    pub(crate) fn parse(architecture: &str, config: &Value) -> Result<Option<Self>, String> {
        if !matches!(architecture, "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM") {
            return Ok(None);
        }
        let raw: Raw = serde_json::from_value(config.clone()).map_err(|error| error.to_string())?;
        let sizes = [
            ("q_lora_rank", raw.q_lora_rank.unwrap_or(2)),
            ("kv_lora_rank", raw.kv_lora_rank),
            ("qk_nope_head_dim", raw.qk_nope_head_dim),
            ("qk_rope_head_dim", raw.qk_rope_head_dim),
            ("v_head_dim", raw.v_head_dim),
        ];
        for (field, size) in sizes {
            // Even, because bf16 inputs are read in pairs.
            if size == 0 || size > 1 << 16 || !size.is_multiple_of(2) {
                return Err(format!("{field}: {size} is not an even number up to {}", 1 << 16));
            }
        }
        Ok(Some(Self {
            query_rank: raw.q_lora_rank,
            rank: raw.kv_lora_rank,
            plain: raw.qk_nope_head_dim,
            rope: raw.qk_rope_head_dim,
            value: raw.v_head_dim,
        }))
    }

    /// Returns the elements of a query in the space of latents, which are those of a key in its page: the latent, then the
    /// rotated part. The latent is the value, too.
    pub(crate) fn key(&self) -> usize {
        self.rank + self.rope
    }

    /// Returns the elements of a head's query as it is projected: first what meets the latent, then what is rotated.
    pub(crate) fn query(&self) -> usize {
        self.plain + self.rope
    }

    /// Returns the outputs of what leads into attention of `heads` heads: queries, or what makes them, and a key.
    pub(crate) fn entry(&self, heads: usize) -> usize {
        self.query_rank.unwrap_or(heads * self.query()) + self.key()
    }

    /// Returns what scores are multiplied by: YaRN enlarges queries and keys, also the parts that it does not turn
    /// (arXiv 2309.00071, equation 22, with DeepSeek's weight).
    pub(crate) fn score_scale(&self, config: &Value) -> f32 {
        let parameters =
            ["rope_parameters", "rope_scaling"].into_iter().find_map(|field| config.get(field)?.as_object());
        let number = |name: &str| parameters?.get(name)?.as_f64();
        let stretch = match (number("factor"), number("mscale_all_dim")) {
            (Some(factor), Some(weight)) => yarn_mscale(factor, weight) as f32,
            _ => 1.0,
        };
        stretch * stretch / (self.query() as f32).sqrt()
    }
}

/// `config.json` as far as it is about latent attention.
#[derive(Debug, Deserialize)]
struct Raw {
    q_lora_rank: Option<usize>,
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    v_head_dim: usize,
}

impl Packer<'_> {
    /// Packs latent attention; `name` makes a tensor's name from that of its part of the layer.
    pub(super) fn latent(&mut self, name: &dyn Fn(&str) -> String, shape: &LatentShape) -> Result<Latent, Error> {
        let (hidden, heads, bias) = (self.decoder.hidden, self.decoder.heads, self.decoder.qkv_bias);
        let name = |part: &str| name(&format!("self_attn.{part}"));
        let queries = heads * shape.query();
        let (entry, query) = match shape.query_rank {
            None => (self.source(&name("q_proj"), queries, hidden, false)?, None),
            Some(rank) => {
                let entry = self.source(&name("q_a_proj"), rank, hidden, bias)?;
                let norm = self.vector(&name("q_a_layernorm.weight"), rank)?;
                let up = self.source(&name("q_b_proj"), queries, rank, false)?;
                (entry, Some(LowRank { norm, up: self.side_by_side(&[up], rank)? }))
            }
        };
        let latent = self.source(&name("kv_a_proj_with_mqa"), shape.key(), hidden, bias)?;
        let norm = self.vector(&name("kv_a_layernorm.weight"), shape.rank)?;
        // Half of it is transposed, which no codes and scales survive: what was not quantised before is not quantised here.
        let expand =
            self.source_as_stored(&name("kv_b_proj"), heads * (shape.plain + shape.value), shape.rank, false)?;
        let (key, value) = (self.head_keys(&expand, shape)?, self.head_values(&expand, shape)?);
        self.count(expand.matrix.stored_bytes());
        let output = self.source(&name("o_proj"), hidden, heads * shape.value, self.decoder.output_bias)?;
        Ok(Latent {
            entry: self.side_by_side(&[entry, latent], hidden)?,
            query,
            norm,
            key,
            value,
            output: self.side_by_side(&[output], heads * shape.value)?,
        })
    }

    /// Packs what takes each head's query to the latents, one head's panels after the other's: the keys' half of
    /// `kv_b_proj`, `[heads][plain + value][rank]`, transposed.
    fn head_keys(&self, expand: &Source<'_>, shape: &LatentShape) -> Result<Linear, Error> {
        let (dtype, size) = match &expand.matrix {
            Matrix::Float(tensor) => (tensor.dtype, tensor.dtype.bytes()),
            Matrix::Quantized(_) => (ElementType::F32, 4),
        };
        let mut bytes = vec![0; self.decoder.heads * shape.rank * shape.plain * size];
        for (head, bytes) in bytes.chunks_exact_mut(shape.rank * shape.plain * size).enumerate() {
            for input in 0..shape.plain {
                let row = stored_row(&expand.matrix, head * (shape.plain + shape.value) + input, shape.rank);
                for (output, element) in row.chunks_exact(size).enumerate() {
                    let at = (output * shape.plain + input) * size;
                    bytes[at..at + size].copy_from_slice(element);
                }
            }
        }
        let outputs = self.decoder.heads * shape.rank;
        let transposed =
            Source { matrix: Matrix::Float(Tensor { dtype, bytes: &bytes, turned_rows: None }), outputs, bias: None };
        self.head_by_head(&transposed, shape.rank, 0, shape.rank, shape.plain)
    }

    /// Packs what makes each head's value from a latent, one head's panels after the other's.
    fn head_values(&self, expand: &Source<'_>, shape: &LatentShape) -> Result<Linear, Error> {
        self.head_by_head(expand, shape.plain + shape.value, shape.plain, shape.value, shape.rank)
    }

    /// Packs outputs `first .. first + width` of each head's `each`, every head starting on a panel of its own.
    fn head_by_head(
        &self,
        source: &Source<'_>,
        each: usize,
        first: usize,
        width: usize,
        inputs: usize,
    ) -> Result<Linear, Error> {
        let panels = width.div_ceil(PANEL);
        let column = |column: usize| {
            let (head, output) = (column / (panels * PANEL), column % (panels * PANEL));
            (output < width).then_some((source, head * each + first + output))
        };
        self.blocks(std::slice::from_ref(source), self.decoder.heads * panels, inputs, &column)
    }
}

/// Returns an output's weights, little-endian: as stored, or as f32 where they are quantised.
fn stored_row<'a>(matrix: &Matrix<'a>, output: usize, inputs: usize) -> Cow<'a, [u8]> {
    match matrix {
        Matrix::Float(tensor) => Cow::Borrowed(tensor.row(output, inputs)),
        Matrix::Quantized(_) => {
            let mut weights = vec![0.0; inputs];
            matrix.widen(output, &mut weights);
            weights.into_iter().flat_map(f32::to_le_bytes).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(extra: Value) -> Value {
        let mut config = json!({
            "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12, "v_head_dim": 24,
        });
        for (key, field) in extra.as_object().expect("an object") {
            config[key] = field.clone();
        }
        config
    }

    fn parse(extra: Value) -> LatentShape {
        LatentShape::parse("DeepseekV3ForCausalLM", &config(extra)).expect("a good config").expect("latent attention")
    }

    #[test]
    fn the_shape_is_read() {
        let shape = parse(json!({}));
        assert_eq!((shape.query_rank, shape.key(), shape.query(), shape.value), (Some(48), 52, 36, 24));
        assert_eq!(shape.score_scale(&config(json!({}))), 1.0 / 6.0);
        assert_eq!(parse(json!({"q_lora_rank": null})).query_rank, None);
        assert_eq!(LatentShape::parse("LlamaForCausalLM", &json!({})), Ok(None));
    }

    #[test]
    fn yarn_stretches_scores() {
        let yarn = json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0});
        let scale = |extra: Value| parse(extra.clone()).score_scale(&config(extra));
        // DeepSeek-V3: 0.1 * ln(40) + 1 = 1.3689, squared.
        assert!((scale(json!({"rope_scaling": yarn})) * 6.0 - 1.873_86).abs() < 1e-4);
        assert!((scale(json!({"rope_parameters": yarn})) * 6.0 - 1.873_86).abs() < 1e-4);
        assert_eq!(scale(json!({"rope_scaling": {"type": "yarn", "factor": 40.0}})), 1.0 / 6.0);
        assert_eq!(scale(json!({"rope_scaling": null})), 1.0 / 6.0);
    }

    #[test]
    fn impossible_sizes_are_named() {
        let check = |extra: Value, words: &[&str]| {
            let problem = LatentShape::parse("DeepseekV2ForCausalLM", &config(extra)).expect_err("a bad config");
            for word in words {
                assert!(problem.contains(word), "{problem:?} lacks {word:?}");
            }
        };
        check(json!({"kv_lora_rank": 0}), &["kv_lora_rank", "0"]);
        check(json!({"qk_rope_head_dim": 7}), &["qk_rope_head_dim", "7"]);
        check(json!({"q_lora_rank": 1 << 20}), &["q_lora_rank", "1048576"]);
        let mut missing = config(json!({}));
        missing.as_object_mut().expect("an object").remove("v_head_dim");
        assert!(LatentShape::parse("DeepseekV2ForCausalLM", &missing).expect_err("no size").contains("v_head_dim"));
    }
}
