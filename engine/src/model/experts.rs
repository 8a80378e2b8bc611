//! Mixtures of experts: what `config.json` says about them, and how their weights are packed.

use crate::{
    Error,
    cpu::packed::PANEL,
    model::{
        packer::{Packer, Source},
        routing::{Groups, Routing, Scoring},
        weights::{Dense, Experts, Linear},
    },
};
use serde::Deserialize;
use serde_json::Value;

/// The experts of a model; all its sparse layers are alike.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mixture {
    pub(crate) routing: Routing,
    /// A bias of every expert decides the choice with its score.
    pub(crate) correction: bool,
    /// Width between an expert's gate and its down projection.
    pub(crate) intermediate: usize,
    /// The same of the experts that every token goes to, side by side; 0 = there are none.
    pub(crate) shared: usize,
    /// Per layer: does it have experts? The others are dense.
    pub(crate) layers: Vec<bool>,
    names: &'static Names,
}

/// What a family calls the tensors of a layer's experts.
#[derive(Debug, PartialEq)]
struct Names {
    block: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

const MIXTRAL: Names = Names { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };
const COMMON: Names = Names { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };

impl Mixture {
    /// Makes the experts of a model that comes from no checkpoint: weights add to one, as in Mixtral and Qwen3.
    pub(super) fn random(count: usize, chosen: usize, intermediate: usize, shared: usize, layers: Vec<bool>) -> Self {
        let (scoring, normalise) = (Scoring::Softmax, true);
        let routing = Routing { experts: count, chosen, scoring, groups: None, normalise, scale: 1.0 };
        Self { routing, correction: false, intermediate, shared, layers, names: &COMMON }
    }

    /// Reads the experts of the model that `config` describes, if its architecture has any and it has `layers` layers.
    pub(crate) fn parse(architecture: &str, config: &Value, layers: usize) -> Result<Option<Self>, String> {
        let read = match architecture {
            "MixtralForCausalLM" => Raw::mixtral,
            "Qwen3MoeForCausalLM" => Raw::qwen3,
            "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM" => Raw::deepseek,
            _ => return Ok(None),
        };
        let raw: Raw = serde_json::from_value(config.clone()).map_err(|error| error.to_string())?;
        let mixture = read(&raw, layers)?;
        if let Some(mixture) = &mixture {
            mixture.routing.check()?;
            for (field, size) in [("moe_intermediate_size", mixture.intermediate), ("n_shared_experts", mixture.shared)]
            {
                if size > 1 << 28 || (size == 0 && field == "moe_intermediate_size") {
                    return Err(format!("{field}: {size} is not a size"));
                }
            }
        }
        Ok(mixture)
    }
}

/// `config.json` as far as it is about experts.
#[derive(Debug, Deserialize)]
struct Raw {
    intermediate_size: Option<usize>,
    moe_intermediate_size: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts: Option<usize>,
    n_routed_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    norm_topk_prob: Option<bool>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    decoder_sparse_step: Option<usize>,
    n_shared_experts: Option<usize>,
    first_k_dense_replace: Option<usize>,
    moe_layer_freq: Option<usize>,
    routed_scaling_factor: Option<f32>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
}

impl Raw {
    fn mixtral(&self, layers: usize) -> Result<Option<Mixture>, String> {
        let routing = Routing {
            experts: required("num_local_experts", self.num_local_experts)?,
            chosen: required("num_experts_per_tok", self.num_experts_per_tok)?,
            scoring: Scoring::Softmax,
            groups: None,
            // A softmax over the scores of the chosen ones, which is the same.
            normalise: true,
            scale: 1.0,
        };
        let intermediate = required("intermediate_size", self.intermediate_size)?;
        let layers = vec![true; layers];
        Ok(Some(Mixture { routing, correction: false, intermediate, shared: 0, layers, names: &MIXTRAL }))
    }

    fn qwen3(&self, layers: usize) -> Result<Option<Mixture>, String> {
        let experts = required("num_experts", self.num_experts)?;
        if experts == 0 {
            return Ok(None);
        }
        let routing = Routing {
            experts,
            chosen: required("num_experts_per_tok", self.num_experts_per_tok)?,
            scoring: Scoring::Softmax,
            groups: None,
            normalise: self.norm_topk_prob.unwrap_or(false),
            scale: 1.0,
        };
        let step = self.decoder_sparse_step.unwrap_or(1);
        if step == 0 {
            return Err("decoder_sparse_step: 0 is not a step".into());
        }
        let sparse = |layer: usize| !self.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(step);
        let intermediate = required("moe_intermediate_size", self.moe_intermediate_size)?;
        let layers = (0..layers).map(sparse).collect();
        Ok(Some(Mixture { routing, correction: false, intermediate, shared: 0, layers, names: &COMMON }))
    }

    fn deepseek(&self, layers: usize) -> Result<Option<Mixture>, String> {
        let Some(experts) = self.n_routed_experts else { return Ok(None) };
        let scoring = match self.scoring_func.as_deref().unwrap_or("softmax") {
            "softmax" => Scoring::Softmax,
            "sigmoid" => Scoring::Sigmoid,
            other => return Err(format!("scoring_func: `{other}` is not supported; known: softmax, sigmoid")),
        };
        let method = self.topk_method.as_deref().unwrap_or("greedy");
        let best = match method {
            "greedy" => None,
            "group_limited_greedy" => Some(1),
            "noaux_tc" => Some(2),
            other => {
                let known = "greedy, group_limited_greedy, noaux_tc";
                return Err(format!("topk_method: `{other}` is not supported; known: {known}"));
            }
        };
        let groups = match best {
            Some(best) if self.n_group != Some(1) => {
                let (count, kept) = (required("n_group", self.n_group)?, required("topk_group", self.topk_group)?);
                Some(Groups { count, kept, best })
            }
            _ => None,
        };
        let routing = Routing {
            experts,
            chosen: required("num_experts_per_tok", self.num_experts_per_tok)?,
            scoring,
            groups,
            normalise: self.norm_topk_prob.unwrap_or(false),
            scale: self.routed_scaling_factor.unwrap_or(1.0),
        };
        let (first, every) = (self.first_k_dense_replace.unwrap_or(0), self.moe_layer_freq.unwrap_or(1));
        if every == 0 {
            return Err("moe_layer_freq: 0 is not a step".into());
        }
        let intermediate = required("moe_intermediate_size", self.moe_intermediate_size)?;
        Ok(Some(Mixture {
            routing,
            correction: method == "noaux_tc",
            intermediate,
            shared: intermediate.saturating_mul(self.n_shared_experts.unwrap_or(0)),
            layers: (0..layers).map(|layer| layer >= first && layer.is_multiple_of(every)).collect(),
            names: &COMMON,
        }))
    }
}

fn required(field: &str, value: Option<usize>) -> Result<usize, String> {
    value.ok_or_else(|| format!("{field} is missing"))
}

impl<'a> Packer<'a> {
    /// Packs the experts of a layer; `name` makes a tensor's name from that of its part of the layer.
    pub(super) fn experts(&mut self, name: &dyn Fn(&str) -> String, mixture: &Mixture) -> Result<Experts, Error> {
        let (hidden, inner, count) = (self.decoder.hidden, mixture.intermediate, mixture.routing.experts);
        let Names { block, gate, up, down } = mixture.names;
        let name = |part: &str| name(&format!("{block}.{part}"));
        self.refuse_fused(&name("experts.gate_up_proj"), &name(&format!("experts.0.{gate}.weight")))?;

        let router = self.source_as_stored(&name("gate"), count, hidden, false)?;
        let router = self.side_by_side(&[router], hidden)?;
        let correction = match mixture.correction {
            true => Some(self.vector(&name("gate.e_score_correction_bias"), count)?),
            false => None,
        };
        let part = |packer: &mut Self, part: &str, outputs: usize, inputs: usize| -> Result<Vec<Source<'a>>, Error> {
            let one = |expert| packer.source(&name(&format!("experts.{expert}.{part}")), outputs, inputs, false);
            (0..count).map(one).collect()
        };
        let (gates, ups) = (part(self, gate, inner, hidden)?, part(self, up, inner, hidden)?);
        let gate_up = self.stacked(&[gates, ups], hidden)?;
        let downs = part(self, down, hidden, inner)?;
        let down = self.stacked(&[downs], inner)?;
        let shared = match mixture.shared {
            0 => None,
            width => Some(self.shared(&name, width)?),
        };
        Ok(Experts { router, correction, gate_up, down, shared })
    }

    /// Packs what every token goes through.
    fn shared(&mut self, name: &dyn Fn(&str) -> String, width: usize) -> Result<Dense, Error> {
        let hidden = self.decoder.hidden;
        let gate = self.source(&name("shared_experts.gate_proj"), width, hidden, false)?;
        let up = self.source(&name("shared_experts.up_proj"), width, hidden, false)?;
        let down = self.source(&name("shared_experts.down_proj"), hidden, width, false)?;
        Ok(Dense { gate_up: self.interleaved(&gate, &up, hidden)?, down: self.side_by_side(&[down], width)? })
    }

    /// Packs the same matrices of all experts, one expert's panels after the other's. Of two matrices, gate and up, each panel
    /// holds 32 columns.
    fn stacked(&mut self, matrices: &[Vec<Source<'_>>], inputs: usize) -> Result<Linear, Error> {
        let width = PANEL / matrices.len();
        let panels = matrices[0][0].outputs.div_ceil(width);
        let column = |column: usize| {
            let (panel, lane) = (column / PANEL, column % PANEL);
            let source = &matrices[lane / width][panel / panels];
            let output = panel % panels * width + lane % width;
            (output < source.outputs).then_some((source, output))
        };
        let sources: Vec<Source<'_>> = matrices.iter().flatten().cloned().collect();
        let linear = self.blocks(&sources, panels * matrices[0].len(), inputs, &column)?;
        self.count(sources.iter().map(|source| source.matrix.stored_bytes()).sum());
        Ok(linear)
    }

    /// Says so when a layer's experts are stored as one tensor, whose order of axes differs from writer to writer.
    fn refuse_fused(&self, fused: &str, expected: &str) -> Result<(), Error> {
        let Some(path) = self.checkpoint.file_of(fused).filter(|_| self.checkpoint.file_of(expected).is_none()) else {
            return Ok(());
        };
        let problem =
            format!("tensor `{fused}` holds all experts in one; expected one tensor each, `{expected}` and so on");
        Err(Error::checkpoint(path, problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deepseek(extra: Value) -> Value {
        let mut config = json!({
            "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 40,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": true,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        });
        for (key, field) in extra.as_object().expect("an object") {
            config[key] = field.clone();
        }
        config
    }

    fn parse(architecture: &str, config: &Value) -> Mixture {
        Mixture::parse(architecture, config, 4).expect("a good config").expect("experts")
    }

    #[test]
    fn dense_families_have_none() {
        assert_eq!(Mixture::parse("LlamaForCausalLM", &json!({"num_experts": 8}), 4), Ok(None));
        assert_eq!(Mixture::parse("DeepseekV2ForCausalLM", &json!({"n_routed_experts": null}), 4), Ok(None));
    }

    #[test]
    fn mixtral_chooses_and_makes_weights_add_to_one() {
        let config = json!({"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96});
        let mixture = parse("MixtralForCausalLM", &config);
        assert!(mixture.routing.normalise && mixture.layers == [true; 4]);
        assert_eq!((mixture.routing.experts, mixture.routing.chosen, mixture.intermediate), (8, 2, 96));
    }

    #[test]
    fn qwen3_says_which_layers_are_dense() {
        let mut config = json!({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48});
        assert_eq!(parse("Qwen3MoeForCausalLM", &config).layers, [true; 4]);
        assert!(!parse("Qwen3MoeForCausalLM", &config).routing.normalise);
        config["mlp_only_layers"] = json!([0, 3]);
        assert_eq!(parse("Qwen3MoeForCausalLM", &config).layers, [false, true, true, false]);
        config["decoder_sparse_step"] = json!(2);
        assert_eq!(parse("Qwen3MoeForCausalLM", &config).layers, [false, true, false, false]);
    }

    #[test]
    fn deepseek_versions_differ() {
        let v3 = parse("DeepseekV3ForCausalLM", &deepseek(json!({})));
        assert_eq!(v3.routing.groups, Some(Groups { count: 4, kept: 2, best: 2 }));
        assert_eq!((v3.routing.scoring, v3.routing.scale, v3.shared), (Scoring::Sigmoid, 2.5, 80));
        assert!(v3.correction && v3.layers == [false, true, true, true]);

        let v2 = parse(
            "DeepseekV2ForCausalLM",
            &deepseek(json!({
                "moe_layer_freq": 2, "scoring_func": null, "topk_method": null,
            })),
        );
        assert_eq!((v2.routing.groups, v2.routing.scoring, v2.correction), (None, Scoring::Softmax, false));
        assert_eq!(v2.layers, [false, false, true, false]);
        let limited = parse("DeepseekV2ForCausalLM", &deepseek(json!({"topk_method": "group_limited_greedy"})));
        assert_eq!(limited.routing.groups, Some(Groups { count: 4, kept: 2, best: 1 }));
        let one_group = parse("DeepseekV3ForCausalLM", &deepseek(json!({"n_group": 1, "topk_group": 1})));
        assert!(one_group.routing.groups.is_none() && one_group.correction);
    }

    #[test]
    fn problems_name_the_field_and_the_value() {
        let check = |extra: Value, words: &[&str]| {
            let problem = Mixture::parse("DeepseekV3ForCausalLM", &deepseek(extra), 4).expect_err("a bad config");
            for word in words {
                assert!(problem.contains(word), "{problem:?} lacks {word:?}");
            }
        };
        check(json!({"num_experts_per_tok": null}), &["num_experts_per_tok", "missing"]);
        check(json!({"num_experts_per_tok": 9}), &["num_experts_per_tok", "9", "8"]);
        check(json!({"n_group": 3}), &["n_group", "3", "8"]);
        check(json!({"scoring_func": "tanh"}), &["scoring_func", "tanh", "sigmoid"]);
        check(json!({"topk_method": "random"}), &["topk_method", "random", "noaux_tc"]);
        check(json!({"moe_layer_freq": 0}), &["moe_layer_freq", "0"]);
        check(json!({"moe_intermediate_size": 0}), &["moe_intermediate_size", "0"]);
        check(json!({"n_shared_experts": 1u64 << 60}), &["n_shared_experts"]);
    }
}
