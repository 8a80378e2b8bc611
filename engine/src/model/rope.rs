//! Rotary position embedding: which angle a pair of elements turns by.
//!
//! Element `i` of the first half of a head is paired with element `i` of the second half ("rotate half", as Hugging Face
//! checkpoints are stored). Angles are computed for the positions of a step when they are needed: a table for 128 Ki
//! positions would cost tens of MiB and most of a start-up.

use serde_json::Value;

/// Rotary embedding of one head.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    /// Radians per position of each pair, `[head_dim / 2]`.
    frequencies: Vec<f32>,
}

impl Rope {
    /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`, of a `config.json`.
    pub(crate) fn parse(config: &Value, head_dim: usize) -> Result<Self, String> {
        let (field, parameters) = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|field| config.get(field).filter(|value| !value.is_null()).map(|value| (field, value)))
            .unwrap_or(("rope_scaling", &Value::Null));
        let theta = parameters.get("rope_theta").or_else(|| config.get("rope_theta")).and_then(Value::as_f64);
        let theta = theta.unwrap_or(10_000.0);
        if theta.is_nan() || theta <= 0.0 {
            return Err(format!("rope_theta: {theta} is not a positive number"));
        }
        let mut rope = Self::plain(theta, head_dim);

        let number = |name: &str| {
            let value = parameters.get(name).and_then(Value::as_f64).filter(|value| *value > 0.0);
            value.ok_or_else(|| format!("{field}.{name}: a positive number is missing"))
        };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type"));
        match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => {}
            "linear" => {
                let factor = number("factor")? as f32;
                rope.frequencies.iter_mut().for_each(|frequency| *frequency /= factor);
            }
            "llama3" => rope.stretch_like_llama3(
                number("factor")?,
                number("low_freq_factor")?,
                number("high_freq_factor")?,
                number("original_max_position_embeddings")?,
            ),
            other => {
                return Err(format!("{field}: rope type `{other}` is not supported; known: default, linear, llama3"));
            }
        }
        Ok(rope)
    }

    /// Makes the unscaled embedding (RoFormer, arXiv 2104.09864, section 3.2.2).
    pub(crate) fn plain(theta: f64, head_dim: usize) -> Self {
        let frequency = |pair: usize| theta.powf(-(2.0 * pair as f64) / head_dim as f64) as f32;
        Self { frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// Slows waves longer than the original context by `factor`, leaves short ones, and blends between (Hugging Face
    /// `modeling_rope_utils.py`, `_compute_llama3_parameters`).
    fn stretch_like_llama3(&mut self, factor: f64, low: f64, high: f64, original_context: f64) {
        for frequency in &mut self.frequencies {
            let waves = original_context * f64::from(*frequency) / std::f64::consts::TAU;
            let keep = ((waves - low) / (high - low)).clamp(0.0, 1.0);
            *frequency = (f64::from(*frequency) * (keep + (1.0 - keep) / factor)) as f32;
        }
    }

    /// Returns the pairs of a head.
    pub(crate) fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Writes the cosines and sines of `position`, `[pairs]` each.
    pub(crate) fn angles(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        // The product is rounded to f32 before the sine, as the reference does: at position 10^5 that is visible.
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            (*sin, *cos) = (position as f32 * frequency).sin_cos();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_generations_of_the_config_agree() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128});
        let old = Rope::parse(&json!({"rope_theta": 5e5, "rope_scaling": scaling}), 24).expect("old");
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        let new = Rope::parse(&json!({"rope_parameters": parameters}), 24).expect("new");
        assert_eq!(old, new);
        assert_ne!(old, Rope::plain(5e5, 24));
    }

    #[test]
    fn llama3_keeps_short_waves_and_slows_long_ones() {
        let plain = Rope::plain(5e5, 64);
        let mut scaled = plain.clone();
        scaled.stretch_like_llama3(8.0, 1.0, 4.0, 8192.0);
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert_eq!(scaled.frequencies[31], plain.frequencies[31] / 8.0);
    }

    #[test]
    fn unknown_kinds_and_missing_numbers_are_refused() {
        let check = |config: Value, word: &str| {
            let problem = Rope::parse(&config, 8).expect_err("a bad rope");
            assert!(problem.contains(word), "{problem:?} lacks {word:?}");
        };
        check(json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "yarn");
        check(json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor");
        check(json!({"rope_theta": -1.0}), "rope_theta");
    }

    #[test]
    fn position_zero_does_not_turn() {
        let rope = Rope::plain(1e4, 8);
        let (mut cos, mut sin) = ([0.0; 4], [1.0; 4]);
        rope.angles(0, &mut cos, &mut sin);
        assert_eq!((cos, sin), ([1.0; 4], [0.0; 4]));
    }
}
