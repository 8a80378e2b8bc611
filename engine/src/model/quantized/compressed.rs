//! compressed-tensors: int8 and e4m3 as plain matrices, int4 and int8 packed into words, each with scales by tensor, channel,
//! group or block.
//!
//! `config_groups` name the linears they apply to, and `ignore` those that stay floats, by class (`Linear`), by name, or by
//! regular expression (`re:...`, matched from the start of the name).

use super::{
    Codes, Grouped, Part, Words, bits, describe_group, field, fp8, group_size, is_listed, offsets, stored_order,
    unsupported,
};
use crate::{
    Error,
    cpu::scheme::{Code, Scheme},
};
use regex::Regex;
use safetensors::Dtype;
use serde_json::Value;

#[derive(Debug)]
pub(crate) struct Compressed {
    rules: Vec<Rule>,
    ignore: Vec<Target>,
}

/// One of `config_groups`.
#[derive(Debug)]
struct Rule {
    targets: Vec<Target>,
    packed: bool,
    code: Code,
    strategy: Strategy,
    /// Zero points are stored.
    zeros: bool,
    /// Activations are eight-bit integers, too.
    narrow_inputs: bool,
}

#[derive(Debug)]
enum Strategy {
    Tensor,
    Channel,
    Group(usize),
    Block([usize; 2]),
}

#[derive(Debug)]
enum Target {
    Linear,
    Name(String),
    Pattern(Regex),
}

impl Target {
    fn parse(entry: &str) -> Result<Self, String> {
        match entry.strip_prefix("re:") {
            Some(pattern) => {
                Regex::new(&format!("^(?:{pattern})")).map(Target::Pattern).map_err(|error| error.to_string())
            }
            None if entry == "Linear" => Ok(Target::Linear),
            None => Ok(Target::Name(entry.to_owned())),
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Target::Linear => true,
            Target::Name(entry) => is_listed(std::slice::from_ref(entry), name),
            Target::Pattern(pattern) => pattern.is_match(name),
        }
    }
}

fn targets(section: &Value, name: &str) -> Result<Vec<Target>, String> {
    let entries: Vec<String> = field(section, name)?.unwrap_or_default();
    entries.iter().map(|entry| Target::parse(entry).map_err(|error| format!(".{name}: {error}"))).collect()
}

impl Compressed {
    pub(super) fn parse(section: &Value) -> Result<Self, String> {
        let format: Option<String> = field(section, "format")?;
        let Some(groups) = section.get("config_groups").and_then(Value::as_object).filter(|groups| !groups.is_empty())
        else {
            return Err(".config_groups: empty, expected at least one".into());
        };
        let rule = |(name, group): (&String, &Value)| {
            let own = field(group, "format")?;
            Rule::parse(group, own.as_ref().or(format.as_ref()).map_or("", String::as_str))
                .map_err(|problem| format!(".config_groups.{name}{problem}"))
        };
        let rules: Vec<Rule> = groups.iter().map(rule).collect::<Result<_, _>>()?;
        Ok(Self { rules, ignore: targets(section, "ignore")? })
    }

    pub(super) fn describe(&self) -> String {
        let Rule { code, strategy, .. } = &self.rules[0];
        let strategy = match strategy {
            Strategy::Tensor => "per tensor".into(),
            Strategy::Channel => describe_group(None),
            Strategy::Group(group) => describe_group(Some(*group)),
            Strategy::Block([outputs, inputs]) => format!("blocks of {outputs} x {inputs}"),
        };
        format!("{} (compressed-tensors, {strategy})", code.name())
    }

    pub(super) fn matrix<'a>(&self, part: &Part<'a, '_>) -> Result<Option<Grouped<'a>>, Error> {
        if self.ignore.iter().any(|target| target.matches(part.name)) {
            return Ok(None);
        }
        let Some(rule) = self.rules.iter().find(|rule| rule.targets.iter().any(|target| target.matches(part.name)))
        else {
            return Ok(None);
        };
        let stored = part.dtype("weight");
        let floats = matches!(stored, Some(Dtype::F32 | Dtype::F16 | Dtype::BF16));
        if floats && part.dtype("weight_packed").is_none() {
            return Ok(None);
        }
        part.check_input_scale()?;
        match (rule.packed, rule.code) {
            (true, _) => rule.packed_words(part),
            (false, Code::Fp8) => rule.floats(part),
            (false, _) => rule.bytes(part),
        }
        .map(Some)
    }
}

impl Rule {
    fn parse(group: &Value, format: &str) -> Result<Self, String> {
        let weights = &group["weights"];
        let at = |problem: String| format!(".weights{problem}");
        let kind: String = field(weights, "type").map_err(at)?.unwrap_or("int".into());
        let (packed, code) = match (format, kind.as_str()) {
            ("pack-quantized", "int") => (true, bits(weights, "num_bits", &[4, 8]).map_err(at)?),
            ("int-quantized" | "naive-quantized", "int") => (false, bits(weights, "num_bits", &[8]).map_err(at)?),
            ("float-quantized" | "naive-quantized", "float") => {
                bits(weights, "num_bits", &[8]).map_err(at)?;
                (false, Code::Fp8)
            }
            ("pack-quantized" | "int-quantized" | "float-quantized" | "naive-quantized", _) => {
                return Err(format!(".weights.type: {kind} is not supported with format {format}"));
            }
            _ => {
                let known = "int-quantized, float-quantized, naive-quantized, pack-quantized";
                return Err(format!(".format: {}", unsupported(format, known)));
            }
        };
        let strategy: String = field(weights, "strategy").map_err(at)?.unwrap_or("tensor".into());
        let strategy = match strategy.as_str() {
            "tensor" => Strategy::Tensor,
            "channel" => Strategy::Channel,
            "group" => match group_size(weights).map_err(at)? {
                Some(group) => Strategy::Group(group),
                None => Strategy::Channel,
            },
            "block" => {
                let block: Vec<usize> = field(weights, "block_structure").map_err(at)?.unwrap_or_default();
                Strategy::Block(
                    fp8::check_block(&block).map_err(|problem| format!(".weights.block_structure: {problem}"))?,
                )
            }
            other => return Err(format!(".weights.strategy: {}", unsupported(other, "tensor, channel, group, block"))),
        };
        if matches!(strategy, Strategy::Block(_)) && code != Code::Fp8 {
            return Err(format!(".weights.strategy: block is not supported for {kind}"));
        }
        let zeros = field(weights, "symmetric").map_err(at)? == Some(false);
        if zeros && code == Code::Fp8 {
            return Err(".weights.symmetric: false is not supported for float".into());
        }
        let activations = group.get("input_activations").filter(|value| !value.is_null());
        if let Some(activations) = activations {
            let at = |problem: String| format!(".input_activations{problem}");
            bits(activations, "num_bits", &[8]).map_err(at)?;
        }
        let narrow_inputs = activations.is_some() && code == Code::Int8;
        let targets = targets(group, "targets")?;
        Ok(Self { targets, packed, code, strategy, zeros, narrow_inputs })
    }

    /// Reads the scales, `[outputs][groups]`, and the inputs of a group.
    fn scales(&self, part: &Part<'_, '_>) -> Result<(usize, Vec<f32>), Error> {
        let outputs = part.outputs;
        match self.strategy {
            Strategy::Group(size) => {
                let (group, groups) = part.groups(Some(size))?;
                Ok((group, part.scales("weight_scale", &[outputs, groups])?))
            }
            Strategy::Tensor => {
                let (_, scales) = part.scales_of_shape("weight_scale", &[vec![1], vec![]])?;
                Ok((part.inputs, vec![scales[0]; outputs]))
            }
            // Blocks are floats, whose scales are read elsewhere.
            Strategy::Channel | Strategy::Block(_) => {
                let (_, scales) = part.scales_of_shape("weight_scale", &[vec![outputs, 1], vec![outputs]])?;
                Ok((part.inputs, scales))
            }
        }
    }

    fn scheme(&self, part: &Part<'_, '_>, group: usize, offsets: bool) -> Scheme {
        let narrow = part.dtype("weight_scale") == Some(Dtype::F16);
        let group = group.next_multiple_of(8);
        Scheme { code: self.code, group, narrow, offsets, narrow_inputs: self.narrow_inputs }
    }

    fn floats<'a>(&self, part: &Part<'a, '_>) -> Result<Grouped<'a>, Error> {
        if let Strategy::Block(block) = self.strategy {
            return fp8::in_blocks(part, "weight_scale", block);
        }
        let (group, scales) = self.scales(part)?;
        fp8::grouped(part, "weight_scale", self.scheme(part, group, false), scales)
    }

    fn bytes<'a>(&self, part: &Part<'a, '_>) -> Result<Grouped<'a>, Error> {
        let bytes = part.bytes("weight", Dtype::I8, &[part.outputs, part.inputs])?;
        let (group, scales) = self.scales(part)?;
        let offsets = if self.zeros {
            let shape = part.shape("weight_scale").unwrap_or_default();
            let stored = part.bytes("weight_zero_point", Dtype::I8, shape)?;
            let zeros: Vec<f32> =
                (0..scales.len()).map(|at| f32::from(stored[if stored.len() == 1 { 0 } else { at }] ^ 0x80)).collect();
            offsets(self.code, &scales, &zeros)
        } else {
            Vec::new()
        };
        let scheme = self.scheme(part, group, !offsets.is_empty());
        let stored_bytes = part.stored_bytes(&["weight", "weight_scale", "weight_zero_point", "input_scale"]);
        let codes = Codes::Bytes { bytes, flip: 0x80 };
        Ok(Grouped { scheme, inputs: part.inputs, scales, offsets, order: None, codes, stored_bytes })
    }

    fn packed_words<'a>(&self, part: &Part<'a, '_>) -> Result<Grouped<'a>, Error> {
        let (outputs, inputs, per_word) = (part.outputs, part.inputs, self.code.per_word());
        let words = part.words("weight_packed", outputs, inputs.div_ceil(per_word))?;
        let (group, scales) = self.scales(part)?;
        let groups = scales.len() / outputs;
        let offsets = if self.zeros {
            let packed: Words<'_> = part.words("weight_zero_point", outputs.div_ceil(per_word), groups)?;
            let zero = |at: usize| {
                let (output, index) = (at / groups, at % groups);
                f32::from(packed.code(output / per_word, index, self.code, output % per_word))
            };
            offsets(self.code, &scales, &(0..scales.len()).map(zero).collect::<Vec<_>>())
        } else {
            Vec::new()
        };
        let scheme = self.scheme(part, group, !offsets.is_empty());
        let order = stored_order(part, "weight_g_idx", group)?;
        let stored_bytes = part.stored_bytes(&[
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
            "input_scale",
        ]);
        Ok(Grouped { scheme, inputs, scales, offsets, order, codes: Codes::AlongInputs(words), stored_bytes })
    }
}
