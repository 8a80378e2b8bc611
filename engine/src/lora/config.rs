//! `adapter_config.json` as PEFT writes it: what is adapted, with which rank and scale.
//!
//! Everything that would change the numbers is either understood or refused by field and value. What only matters to training
//! is skipped; a field that is not known here is refused unless it is off.

use crate::Error;
use regex::Regex;
use serde_json::{Map, Value};
use std::path::Path;

/// Fields without a say in what an adapter computes.
const IRRELEVANT: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "ensure_weight_tying",
];
/// Ways to begin training that leave the base weights as they are.
const HARMLESS_INIT: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What an adapter adapts.
#[derive(Debug)]
pub(super) struct Peft {
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    targets: Targets,
    exclude: Option<Targets>,
    layers: Option<Vec<usize>>,
    /// By pattern, the first that fits.
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

/// Which modules are meant.
#[derive(Debug)]
enum Targets {
    AllLinear,
    /// A full name, or its end after a dot.
    Names(Vec<String>),
    /// Fits the full name.
    Pattern(Regex),
}

impl Peft {
    /// Reads the file; errors name the field and the value.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read(path).map_err(|error| Error::checkpoint(path, error))?;
        let value: Value = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(path, error))?;
        let Value::Object(fields) = value else {
            return Err(Error::checkpoint(path, "not a JSON object"));
        };
        Self::parse(fields).map_err(|problem| Error::checkpoint(path, problem))
    }

    fn parse(mut fields: Map<String, Value>) -> Result<Self, String> {
        let mut take = |name: &str| fields.shift_remove(name).filter(|value| !value.is_null());
        let must = |name: &str, value: Option<Value>, expected: &str| match value {
            Some(value) if value != *expected => Err(format!("{name}: {value} is not supported, only \"{expected}\"")),
            _ => Ok(()),
        };
        let kind = take("peft_type").ok_or("peft_type is missing, expected \"LORA\"")?;
        must("peft_type", Some(kind), "LORA")?;
        must("bias", take("bias"), "none")?;
        must("layers_pattern", take("layers_pattern").filter(is_on), "layers")?;
        match take("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(init)) if HARMLESS_INIT.contains(&init.as_str()) => {}
            Some(init) => {
                return Err(format!("init_lora_weights: {init} changes the base weights, which is not supported"));
            }
        }
        let rank = whole("r", &take("r").ok_or("r is missing")?)?;
        let alpha = number("lora_alpha", &take("lora_alpha").ok_or("lora_alpha is missing")?)?;
        let rank_stabilised = match take("use_rslora") {
            None => false,
            Some(Value::Bool(on)) => on,
            Some(other) => return Err(format!("use_rslora: {other} is neither true nor false")),
        };
        let targets = take("target_modules").ok_or("target_modules is missing, expected a list or a pattern")?;
        let peft = Self {
            rank,
            alpha,
            rank_stabilised,
            targets: Targets::parse("target_modules", &targets)?,
            exclude: take("exclude_modules").map(|value| Targets::parse("exclude_modules", &value)).transpose()?,
            layers: take("layers_to_transform").map(|value| layers(&value)).transpose()?,
            ranks: patterns("rank_pattern", take("rank_pattern"), whole)?,
            alphas: patterns("alpha_pattern", take("alpha_pattern"), number)?,
        };
        for (name, value) in fields {
            if is_on(&value) && !IRRELEVANT.contains(&name.as_str()) {
                return Err(format!("{name}: {value} is not supported"));
            }
        }
        Ok(peft)
    }

    /// Says whether `module` (its full name in the base model) of layer `layer` is adapted.
    pub(super) fn adapts(&self, module: &str, layer: usize) -> bool {
        self.targets.mean(module)
            && self.exclude.as_ref().is_none_or(|exclude| !exclude.mean(module))
            && self.layers.as_ref().is_none_or(|layers| layers.contains(&layer))
    }

    /// Names the first target that no linear of a layer can be: an end of the model.
    pub(super) fn end(&self) -> Option<&str> {
        let Targets::Names(names) = &self.targets else { return None };
        let is_end =
            |name: &&String| ["lm_head", "embed_tokens", "embed_in", "embed_out"].iter().any(|end| name.ends_with(end));
        names.iter().find(is_end).map(String::as_str)
    }

    /// Returns the rank of `module`.
    pub(super) fn rank(&self, module: &str) -> usize {
        first(&self.ranks, module).unwrap_or(self.rank)
    }

    /// Returns the largest rank that any module may have.
    pub(super) fn largest_rank(&self) -> usize {
        self.ranks.iter().map(|(_, rank)| *rank).fold(self.rank, usize::max)
    }

    /// Returns what `B A x` of `module` is multiplied by.
    pub(super) fn scale(&self, module: &str) -> f32 {
        let rank = self.rank(module) as f64;
        let alpha = first(&self.alphas, module).unwrap_or(self.alpha);
        (alpha / if self.rank_stabilised { rank.sqrt() } else { rank }) as f32
    }
}

impl Targets {
    fn parse(name: &str, value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Value::String(text) => {
                let pattern = Regex::new(&format!("^(?:{text})$"));
                pattern.map(Targets::Pattern).map_err(|error| format!("{name}: `{text}`: {error}"))
            }
            Value::Array(list) => {
                let names = list.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
                names.map(Targets::Names).ok_or_else(|| format!("{name}: {value} is not a list of names"))
            }
            other => Err(format!("{name}: {other} is neither a list of names nor a pattern")),
        }
    }

    fn mean(&self, module: &str) -> bool {
        match self {
            Targets::AllLinear => true,
            Targets::Names(names) => names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
            Targets::Pattern(pattern) => pattern.is_match(module),
        }
    }
}

/// Says whether a field asks for something.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

fn whole(name: &str, value: &Value) -> Result<usize, String> {
    let rank = value.as_u64().filter(|rank| (1..=1 << 16).contains(rank));
    rank.map(|rank| rank as usize)
        .ok_or_else(|| format!("{name}: {value} is not a rank, expected a whole number from 1"))
}

fn number(name: &str, value: &Value) -> Result<f64, String> {
    let number = value.as_f64().filter(|number| (*number as f32).is_finite());
    number.ok_or_else(|| format!("{name}: {value} is not a number"))
}

fn layers(value: &Value) -> Result<Vec<usize>, String> {
    let index = |value: &Value| value.as_u64().map(|index| index as usize);
    let list = match value {
        Value::Array(list) => list.iter().map(index).collect(),
        one => index(one).map(|index| vec![index]),
    };
    list.ok_or_else(|| format!("layers_to_transform: {value} is neither a layer nor a list of them"))
}

/// Reads a field that sets something by the end of a module's name, in the order of the file.
fn patterns<T>(
    name: &str,
    value: Option<Value>,
    read: impl Fn(&str, &Value) -> Result<T, String>,
) -> Result<Vec<(Regex, T)>, String> {
    let map = match value {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(format!("{name}: {other} is not an object")),
    };
    let entry = |(pattern, value): (&String, &Value)| {
        let name = format!("{name}.{pattern}");
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(|error| format!("{name}: {error}"))?;
        Ok((regex, read(&name, value)?))
    };
    map.iter().map(entry).collect()
}

fn first<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> Result<Peft, String> {
        let mut fields = json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none",
            "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "use_dora": false, "modules_to_save": null,
        });
        for (key, value) in extra.as_object().expect("an object") {
            fields[key] = value.clone();
        }
        let Value::Object(fields) = fields else { unreachable!("made above") };
        Peft::parse(fields)
    }

    const Q: &str = "model.layers.3.self_attn.q_proj";

    #[test]
    fn targets_are_names_patterns_or_everything() {
        let adapts = |extra: Value, module: &str, layer| parse(extra).expect("a good config").adapts(module, layer);
        assert!(adapts(json!({}), Q, 3));
        assert!(!adapts(json!({}), "model.layers.3.self_attn.k_proj", 3));
        assert!(!adapts(json!({"target_modules": ["proj"]}), Q, 3), "a name starts after a dot");
        assert!(adapts(json!({"target_modules": [Q]}), Q, 3));
        assert!(adapts(json!({"target_modules": "all-linear"}), Q, 3));
        assert!(adapts(json!({"target_modules": r".*\.self_attn\.[qk]_proj"}), Q, 3));
        assert!(!adapts(json!({"target_modules": "q_proj"}), Q, 3), "a pattern fits the whole name");
        assert!(!adapts(json!({"layers_to_transform": [0, 1]}), Q, 3));
        assert!(adapts(json!({"layers_to_transform": 3}), Q, 3));
        assert!(!adapts(json!({"exclude_modules": ["q_proj"]}), Q, 3));
    }

    #[test]
    fn ranks_and_scales_follow_the_patterns() {
        let plain = parse(json!({})).expect("a good config");
        assert_eq!((plain.rank(Q), plain.scale(Q)), (8, 2.0));
        let stabilised = parse(json!({"use_rslora": true, "r": 16})).expect("a good config");
        assert_eq!(stabilised.scale(Q), 4.0);
        let patterns = json!({
            "rank_pattern": {r"layers\.[0-2]\.self_attn\.q_proj": 2, "q_proj": 32}, "alpha_pattern": {"q_proj": 8}
        });
        let patterns = parse(patterns).expect("a good config");
        assert_eq!((patterns.rank(Q), patterns.scale(Q), patterns.largest_rank()), (32, 0.25, 32));
        assert_eq!(patterns.rank("model.layers.1.self_attn.q_proj"), 2);
        assert_eq!(patterns.rank("model.layers.1.self_attn.v_proj"), 8);
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_value() {
        let check = |extra: Value, words: &[&str]| {
            let problem = parse(extra).expect_err("not supported");
            for word in words {
                assert!(problem.contains(word), "{problem:?} lacks {word:?}");
            }
        };
        check(json!({"use_dora": true}), &["use_dora", "true"]);
        check(json!({"peft_type": "IA3"}), &["peft_type", "IA3", "LORA"]);
        check(json!({"bias": "all"}), &["bias", "all", "none"]);
        check(json!({"fan_in_fan_out": true}), &["fan_in_fan_out", "true"]);
        check(json!({"modules_to_save": ["lm_head"]}), &["modules_to_save", "lm_head"]);
        check(json!({"init_lora_weights": "pissa"}), &["init_lora_weights", "pissa"]);
        check(json!({"layer_replication": [[0, 4], [2, 5]]}), &["layer_replication"]);
        check(json!({"trainable_token_indices": [1, 2]}), &["trainable_token_indices"]);
        check(json!({"something_new": 3}), &["something_new", "3"]);
        check(json!({"r": 0}), &["r: 0"]);
        check(json!({"r": -1}), &["r: -1"]);
        check(json!({"lora_alpha": "much"}), &["lora_alpha", "much"]);
        check(json!({"lora_alpha": 1e300}), &["lora_alpha"]);
        check(json!({"rank_pattern": {"q_proj": 0}}), &["rank_pattern.q_proj", "0"]);
        check(json!({"rank_pattern": [1]}), &["rank_pattern", "[1]"]);
        check(json!({"target_modules": "(unclosed"}), &["target_modules", "(unclosed"]);
        check(json!({"target_modules": [1]}), &["target_modules", "[1]"]);
        check(json!({"target_modules": null}), &["target_modules", "missing"]);
        check(json!({"layers_to_transform": "all"}), &["layers_to_transform", "all"]);
    }
}
