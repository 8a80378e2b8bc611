//! Rotary position embedding: which angle a pair of elements turns by.
//!
//! A [`Rope`] is what a checkpoint says; [`Turns`] are the frequencies it comes to in an engine. They differ where a variant
//! depends on how long sequences are. The reference looks at each sequence's length at the time (dynamic NTK, longrope), so
//! that a position's angle changes while the sequence grows and pages computed earlier no longer fit. Here the length is the
//! engine's own longest, fixed when it starts: a position has one angle, whatever the sequence, the batch or the chunk.
//!
//! Angles are computed for the positions of a step when they are needed: a table for 128 Ki positions would cost tens of MiB
//! and most of a start-up.

use serde_json::Value;
use std::f64::consts::TAU;

/// Rotary embedding of the first `dim` elements of a head; of one more, as the reference has it, where that is odd.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    theta: f64,
    dim: usize,
    variant: Variant,
}

/// How the plain frequencies are changed (Hugging Face `modeling_rope_utils.py`, one function each).
#[derive(Clone, Debug, PartialEq)]
enum Variant {
    /// Not at all (RoFormer, arXiv 2104.09864, section 3.2.2).
    Plain,
    /// All slower by `factor`.
    Linear { factor: f64 },
    /// A larger theta for contexts beyond `original`.
    Dynamic { factor: f64, original: f64 },
    /// Waves longer than `original` slower by `factor`, short ones as they are, and a blend between.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    /// Pairs beyond `high` slower by `factor`, up to `low` as they are, and a ramp between (arXiv 2309.00071).
    Yarn { factor: f64, low: f64, high: f64, scale: f64 },
    /// Each pair slower by a factor of its own, from `long` in contexts beyond `original`, else from `short`.
    Long { short: Vec<f64>, long: Vec<f64>, original: usize, scale: f64 },
}

/// The angles of one engine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turns {
    /// Radians per position of each pair.
    frequencies: Vec<f32>,
    /// What cosines and sines are multiplied by.
    scale: f32,
}

impl Rope {
    /// Makes the unscaled embedding.
    pub(crate) fn plain(theta: f64, dim: usize) -> Self {
        Self { theta, dim, variant: Variant::Plain }
    }

    /// Reads what a `config.json` says about layers of `layer_type`, in heads of `head_dim` elements.
    ///
    /// Understood are `rope_parameters`, of all layers or of each type, and the older `rope_theta` and `rope_scaling`.
    pub(crate) fn parse(config: &Value, layer_type: &str, head_dim: usize) -> Result<Self, String> {
        let section = Section::find(config, layer_type);
        let theta = section.optional(&["rope_theta", "rotary_emb_base"])?.unwrap_or(10_000.0);
        if theta <= 1.0 {
            return Err(format!("rope_theta: {theta} is not a number above 1"));
        }
        let portion = section.optional(&["partial_rotary_factor", "rotary_pct"])?.unwrap_or(1.0);
        let dim = (head_dim as f64 * portion) as usize;
        if dim == 0 || dim.next_multiple_of(2) > head_dim {
            return Err(format!("partial_rotary_factor: {portion} of {head_dim} elements is not a part of a head"));
        }
        Ok(Self { theta, dim, variant: section.variant(theta, dim)? })
    }

    /// Returns the pairs of a head that turn.
    pub(crate) fn pairs(&self) -> usize {
        self.dim.div_ceil(2)
    }

    /// Returns the angles of an engine whose sequences have up to `context` tokens.
    pub(crate) fn turns(&self, context: usize) -> Turns {
        let plain = |theta: f64| move |pair: usize| theta.powf(-(2.0 * pair as f64) / self.dim as f64);
        let each = |frequency: &dyn Fn(usize) -> f64| (0..self.pairs()).map(|pair| frequency(pair) as f32).collect();
        let slowed = |by: &dyn Fn(usize, f64) -> f64| {
            each(&|pair| {
                let frequency = plain(self.theta)(pair);
                frequency / by(pair, frequency)
            })
        };
        let (frequencies, scale) = match &self.variant {
            Variant::Plain => (each(&plain(self.theta)), 1.0),
            Variant::Linear { factor } => (slowed(&|_, _| *factor), 1.0),
            Variant::Dynamic { factor, original } => {
                let longer = (context as f64 / original).max(1.0);
                let dim = self.dim as f64;
                let theta = self.theta * (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0).max(1.0));
                (each(&plain(theta)), 1.0)
            }
            Variant::Llama3 { factor, low, high, original } => {
                let frequencies = slowed(&|_, frequency| {
                    let waves = original * frequency / TAU;
                    let keep = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                    1.0 / (keep + (1.0 - keep) / factor)
                });
                (frequencies, 1.0)
            }
            Variant::Yarn { factor, low, high, scale } => {
                let frequencies = slowed(&|pair, _| {
                    let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    1.0 / (slow / factor + (1.0 - slow))
                });
                (frequencies, *scale)
            }
            Variant::Long { short, long, original, scale } => {
                let factors = if context > *original { long } else { short };
                (slowed(&|pair, _| factors[pair]), *scale)
            }
        };
        Turns { frequencies, scale: scale as f32 }
    }
}

impl Turns {
    /// Writes the cosines and sines of `position`, one for each pair.
    pub(crate) fn angles(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        // The product is rounded to f32 before the sine, as the reference does: at position 10^5 that is visible.
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let (turned_sin, turned_cos) = (position as f32 * frequency).sin_cos();
            (*sin, *cos) = (turned_sin * self.scale, turned_cos * self.scale);
        }
    }
}

/// Returns how much YaRN enlarges attention scores for contexts longer by `factor` (arXiv 2309.00071, section 3.4).
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The part of a `config.json` that speaks of one rope.
struct Section<'a> {
    config: &'a Value,
    /// What the file calls it.
    field: &'static str,
    parameters: &'a Value,
}

impl<'a> Section<'a> {
    fn find(config: &'a Value, layer_type: &str) -> Self {
        let present = |field| config.get(field).filter(|value| !value.is_null());
        let (field, all) = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|field| Some((field, present(field)?)))
            .unwrap_or(("rope_scaling", &Value::Null));
        Self { config, field, parameters: all.get(layer_type).unwrap_or(all) }
    }

    /// Reads a number under the first of `names` that is there: in the section, or else beside it.
    fn optional(&self, names: &[&str]) -> Result<Option<f64>, String> {
        let places = [self.parameters, self.config];
        let found = places.iter().find_map(|place| {
            names.iter().find_map(|name| Some((*name, place.get(*name).filter(|value| !value.is_null())?)))
        });
        let Some((name, value)) = found else { return Ok(None) };
        let number = value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
        number.map(Some).ok_or_else(|| format!("{name}: {value} is not a positive number"))
    }

    /// Reads a number of the section itself; the reference takes 0 for "not set".
    fn own(&self, name: &str) -> Result<Option<f64>, String> {
        let set = |value: &&Value| !value.is_null() && value.as_f64() != Some(0.0);
        let Some(value) = self.parameters.get(name).filter(set) else { return Ok(None) };
        let number = value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
        number.map(Some).ok_or_else(|| format!("{}.{name}: {value} is not a positive number", self.field))
    }

    fn required(&self, name: &str) -> Result<f64, String> {
        self.own(name)?.ok_or_else(|| format!("{}.{name}: a positive number is missing", self.field))
    }

    /// Reads a factor for each of `pairs` pairs.
    fn factors(&self, name: &str, pairs: usize) -> Result<Vec<f64>, String> {
        let list = self.parameters.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let factors: Vec<f64> = list.iter().filter_map(Value::as_f64).filter(|factor| *factor > 0.0).collect();
        if factors.len() != list.len() || factors.len() != pairs {
            let found = factors.len();
            return Err(format!("{}.{name}: {found} positive numbers, expected {pairs}", self.field));
        }
        Ok(factors)
    }

    fn variant(&self, theta: f64, dim: usize) -> Result<Variant, String> {
        let kind = self.parameters.get("rope_type").or_else(|| self.parameters.get("type")).and_then(Value::as_str);
        let longest = self.optional(&["max_position_embeddings"])?.unwrap_or(0.0);
        let original = self.optional(&["original_max_position_embeddings"])?.unwrap_or(longest);
        match kind.unwrap_or("default") {
            "default" => Ok(Variant::Plain),
            "linear" => Ok(Variant::Linear { factor: self.required("factor")? }),
            "dynamic" => Ok(Variant::Dynamic { factor: self.required("factor")?, original }),
            "llama3" => Ok(Variant::Llama3 {
                factor: self.required("factor")?,
                low: self.required("low_freq_factor")?,
                high: self.required("high_freq_factor")?,
                original: self.required("original_max_position_embeddings")?,
            }),
            "yarn" => self.yarn(theta, dim, original, longest / original),
            "longrope" | "su" => {
                let factor = self.own("factor")?.unwrap_or(longest / original);
                let stretch = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                Ok(Variant::Long {
                    short: self.factors("short_factor", dim.div_ceil(2))?,
                    long: self.factors("long_factor", dim.div_ceil(2))?,
                    original: original as usize,
                    scale: self.own("attention_factor")?.unwrap_or(stretch),
                })
            }
            other => Err(format!(
                "{}: rope type `{other}` is not supported; known: default, linear, dynamic, llama3, yarn, longrope",
                self.field
            )),
        }
    }

    fn yarn(&self, theta: f64, dim: usize, original: f64, ratio: f64) -> Result<Variant, String> {
        let factor = self.own("factor")?.unwrap_or(ratio);
        // The pair that turns `turns` times in the original context.
        let pair = |turns: f64| dim as f64 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
        let mut low = pair(self.own("beta_fast")?.unwrap_or(32.0));
        let mut high = pair(self.own("beta_slow")?.unwrap_or(1.0));
        if self.parameters.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let scale = match (self.own("attention_factor")?, self.own("mscale")?, self.own("mscale_all_dim")?) {
            (Some(scale), ..) => scale,
            (None, Some(mscale), Some(all)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
            _ => yarn_mscale(factor, 1.0),
        };
        Ok(Variant::Yarn { factor, low, high, scale })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(config: Value, head_dim: usize) -> Rope {
        Rope::parse(&config, "full_attention", head_dim).expect("a good rope")
    }

    #[test]
    fn both_generations_of_the_config_agree() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128});
        let old = parse(json!({"rope_theta": 5e5, "rope_scaling": scaling}), 24);
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        assert_eq!(old, parse(json!({"rope_parameters": parameters}), 24));
        let nested =
            json!({"rope_parameters": {"full_attention": parameters, "sliding_attention": {"rope_theta": 1e4}}});
        assert_eq!(old, parse(nested.clone(), 24));
        let local = Rope::parse(&nested, "sliding_attention", 24).expect("a good rope");
        assert_eq!(local, Rope::plain(1e4, 24));
    }

    #[test]
    fn llama3_keeps_short_waves_and_slows_long_ones() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let scaled = parse(json!({"rope_theta": 5e5, "rope_scaling": scaling}), 64).turns(1);
        let plain = Rope::plain(5e5, 64).turns(1);
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert_eq!(scaled.frequencies[31], plain.frequencies[31] / 8.0);
    }

    /// Compares with what `modeling_rope_utils.py` of transformers 5.23 computes, to f32's precision.
    fn check(config: Value, head_dim: usize, context: usize, expected: &[f32], scale: f32) {
        let turns = parse(config.clone(), head_dim).turns(context);
        assert_eq!(turns.frequencies.len(), expected.len(), "{config}");
        for (frequency, expected) in turns.frequencies.iter().zip(expected) {
            assert!((frequency - expected).abs() <= 1e-6 * expected, "{config}: {frequency}, expected {expected}");
        }
        assert!((turns.scale - scale).abs() < 1e-6, "{config}: {}, expected {scale}", turns.scale);
    }

    #[test]
    fn linear_is_the_reference_s() {
        let expected = [0.25, 0.079_056_94, 0.025, 0.007_905_695, 0.002_5, 0.00079056947, 0.000_25, 7.905_695e-5];
        let scaling = json!({"type": "linear", "factor": 4.0});
        check(json!({"rope_theta": 1e4, "rope_scaling": scaling}), 16, 1, &expected, 1.0);
    }

    #[test]
    fn dynamic_follows_the_longest_context() {
        let config = json!({
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
                "original_max_position_embeddings": 1024},
        });
        let plain = [1.0, 0.31622776, 0.1, 0.031_622_78, 0.01, 0.0031622779, 0.001, 0.000_316_227_8];
        check(config.clone(), 16, 512, &plain, 1.0);
        let longer =
            [1.0, 0.23948137, 0.057_351_32, 0.013734572, 0.0032891743, 0.00078769587, 0.00018863847, 4.5175395e-05];
        check(config, 16, 4096, &longer, 1.0);
    }

    #[test]
    fn yarn_is_the_reference_s() {
        let config = |theta: f64, longest: usize, mut scaling: Value| {
            scaling["rope_type"] = json!("yarn");
            json!({"rope_theta": theta, "max_position_embeddings": longest, "rope_scaling": scaling})
        };
        let expected = [
            1.0,
            0.56234133,
            0.31622776,
            0.15877494,
            0.078_571_43,
            0.038_158_87,
            0.018070158,
            0.008_256_298,
            0.0035714284,
            0.0014058533,
            0.00079056947,
            0.00044456986,
            0.000_25,
            0.00014058533,
            7.905_695e-5,
            4.4456985e-05,
        ];
        let scaling = json!({"factor": 4.0, "original_max_position_embeddings": 1024});
        check(config(1e4, 4096, scaling), 32, 1, &expected, 1.1386294);
        // Without a factor it is the ratio of the lengths.
        let scaling = json!({"original_max_position_embeddings": 1024});
        check(config(1e4, 4096, scaling), 32, 1, &expected, 1.1386294);
        let expected = [
            1.0,
            0.421_696_5,
            0.17782794,
            0.067_702_97,
            0.018701803,
            0.003733489,
            0.0014058533,
            0.00059284345,
            0.000_25,
            0.00010542414,
            4.4456985e-05,
            1.8747356e-05,
            7.905_694e-6,
            3.333804e-06,
            1.4058534e-06,
            5.9284343e-07,
        ];
        let scaling = json!({"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2,
            "truncate": false, "attention_factor": 1.5});
        check(config(1e6, 4096, scaling), 32, 1, &expected, 1.5);
        let expected = [
            1.0,
            0.56234133,
            0.31622776,
            0.17782794,
            0.1,
            0.056_234_13,
            0.027218176,
            0.012829017,
            0.0058214283,
            0.0024903687,
            0.00095997716,
            0.000_292_145_9,
            2.5e-5,
            1.4058533e-05,
            7.9056945e-06,
            4.4456983e-06,
        ];
        let scaling = json!({"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
            "mscale_all_dim": 0.5});
        check(config(1e4, 163_840, scaling), 32, 1, &expected, 1.155722);
    }

    #[test]
    fn llama3_is_the_reference_s() {
        let expected =
            [1.0, 0.19392276, 0.037_606_03, 0.0013125695, 0.00017677668, 3.4281024e-05, 6.6478706e-06, 1.2891732e-06];
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024});
        check(json!({"rope_theta": 5e5, "rope_scaling": scaling}), 16, 1, &expected, 1.0);
    }

    #[test]
    fn longrope_chooses_by_the_longest_context() {
        let config = json!({
            "rope_theta": 1e4, "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]},
        });
        let short = [1.0, 0.1958577, 0.038_679_9, 0.0076923077, 0.0015388816, 0.00030943935];
        check(config.clone(), 16, 4096, &short, 1.1902381);
        let long = [1.0, 0.10772174, 0.011603971, 0.00125, 0.00013465215, 1.4504969e-05];
        check(config, 16, 4097, &long, 1.1902381);
    }

    #[test]
    fn scales_go_into_cosines_and_sines() {
        let scaling = json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5});
        let turns = parse(json!({"max_position_embeddings": 64, "rope_scaling": scaling}), 4).turns(1);
        let (mut cos, mut sin) = ([0.0; 2], [1.0; 2]);
        turns.angles(0, &mut cos, &mut sin);
        assert_eq!((cos, sin), ([1.5; 2], [0.0; 2]));
    }

    #[test]
    fn an_odd_part_of_a_head_turns_one_element_more() {
        let rope = parse(json!({"rotary_pct": 0.25, "rotary_emb_base": 1e4}), 20);
        assert_eq!(rope, Rope::plain(1e4, 5));
        assert_eq!(rope.pairs(), 3);
    }

    #[test]
    fn unknown_kinds_and_bad_numbers_are_refused() {
        let check = |config: Value, word: &str| {
            let problem = Rope::parse(&config, "full_attention", 8).expect_err("a bad rope");
            assert!(problem.contains(word), "{problem:?} lacks {word:?}");
        };
        check(json!({"rope_scaling": {"type": "mrope", "factor": 4.0}}), "mrope");
        check(json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor");
        check(json!({"rope_parameters": {"rope_type": "linear", "factor": "two"}}), "rope_parameters.factor");
        check(json!({"rope_theta": -1.0}), "rope_theta");
        check(json!({"partial_rotary_factor": 0.1}), "partial_rotary_factor");
        check(json!({"partial_rotary_factor": 2}), "partial_rotary_factor");
        let long = json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2]});
        check(json!({"rope_scaling": long, "max_position_embeddings": 9}), "long_factor");
    }

    #[test]
    fn position_zero_does_not_turn() {
        let turns = Rope::plain(1e4, 8).turns(1);
        let (mut cos, mut sin) = ([0.0; 4], [1.0; 4]);
        turns.angles(0, &mut cos, &mut sin);
        assert_eq!((cos, sin), ([1.0; 4], [0.0; 4]));
    }
}
