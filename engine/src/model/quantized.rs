//! Quantised checkpoints: what `quantization_config` says, and matrices read by it.
//!
//! Every method ends in a [`Grouped`]: scales and offsets by output and group, and codes as they lie in the file. Everything that
//! a kernel relies on is checked when one is made (types, shapes, finite scales, groups in range), so reading cannot fail.
//!
//! Which linears are quantised: those the file stores so, unless the configuration excludes them, and then they must be floats.
//! Activations stay float whatever the configuration says of them; a static `input_scale` is checked and otherwise not used.

mod at_load;
mod awq;
mod compressed;
mod fp8;
mod gptq;

use crate::{
    Error,
    cpu::scheme::{Code, QuantizedMatrix, QuantizedRow, Scheme},
    model::checkpoint::Checkpoint,
};
use safetensors::Dtype;
use serde_json::Value;
use std::sync::Arc;

pub use at_load::Quantize;
pub(crate) use at_load::Quantizing;

/// How a checkpoint is quantised.
#[derive(Debug)]
pub(crate) enum Quantization {
    Gptq(gptq::Gptq),
    Awq(awq::Awq),
    Fp8(fp8::Fp8),
    Compressed(compressed::Compressed),
    /// In blocks of a GGUF file, most of them of this type; each tensor says its own.
    Blocks(&'static str),
}

impl Quantization {
    /// Reads the `quantization_config` (or `compression_config`) of a `config.json`; `None` when it has none.
    ///
    /// The error says which field is at fault.
    pub(crate) fn parse(config: &Value) -> Result<Option<Self>, String> {
        let sections = ["quantization_config", "compression_config"];
        let found = sections.iter().find_map(|name| Some((*name, config.get(name).filter(|value| !value.is_null())?)));
        let Some((section, value)) = found else { return Ok(None) };
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or(match section {
            "compression_config" => "compressed-tensors",
            _ => "unknown",
        });
        let quantization = match method {
            "gptq" => gptq::Gptq::parse(value).map(Quantization::Gptq),
            "awq" => awq::Awq::parse(value).map(Quantization::Awq),
            "fp8" => fp8::Fp8::parse(value).map(Quantization::Fp8),
            "compressed-tensors" => compressed::Compressed::parse(value).map(Quantization::Compressed),
            other => Err(format!(".quant_method: {}", unsupported(other, "gptq, awq, fp8, compressed-tensors"))),
        };
        quantization.map(Some).map_err(|problem| format!("{section}{problem}"))
    }

    /// Returns the matrix of the linear `name`, `[outputs][inputs]`, or `None` when it is to be read as floats.
    pub(crate) fn matrix<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Option<Arc<dyn QuantizedMatrix + 'a>>, Error> {
        let part = Part { checkpoint, name, outputs, inputs };
        let matrix = match self {
            Quantization::Gptq(gptq) => gptq.matrix(&part),
            Quantization::Awq(awq) => awq.matrix(&part),
            Quantization::Fp8(fp8) => fp8.matrix(&part),
            Quantization::Compressed(compressed) => compressed.matrix(&part),
            Quantization::Blocks(_) => {
                let blocks = checkpoint.blocks(&format!("{name}.weight"), [outputs, inputs])?;
                return Ok(blocks.map(|blocks| Arc::new(blocks) as _));
            }
        }?;
        Ok(matrix.map(|matrix| Arc::new(matrix) as _))
    }

    /// Returns what people call it: `int4 (gptq, group 32)`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Quantization::Gptq(gptq) => gptq.describe(),
            Quantization::Awq(awq) => awq.describe(),
            Quantization::Fp8(fp8) => fp8.describe(),
            Quantization::Compressed(compressed) => compressed.describe(),
            Quantization::Blocks(kind) => format!("{kind} (gguf)"),
        }
    }
}

/// Says what is wrong with a value that is not among `known`.
fn unsupported(found: impl std::fmt::Display, known: &str) -> String {
    format!("{found} is not supported; known: {known}")
}

/// Describes groups of inputs: `group 32`, or `per channel` without.
fn describe_group(group: Option<usize>) -> String {
    group.map_or("per channel".into(), |group| format!("group {group}"))
}

/// Returns the field `name` of a section, or an error that names it.
fn field<T: serde::de::DeserializeOwned>(section: &Value, name: &str) -> Result<Option<T>, String> {
    match section.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(|error| format!(".{name}: {error}")),
    }
}

/// Reads the bits of integer codes, of which `known` are supported.
fn bits(section: &Value, name: &str, known: &[u64]) -> Result<Code, String> {
    let bits: Option<u64> = field(section, name)?;
    match bits.filter(|bits| known.contains(bits)) {
        Some(4) => Ok(Code::Int4),
        Some(_) => Ok(Code::Int8),
        None => {
            let known: Vec<String> = known.iter().map(u64::to_string).collect();
            let found = bits.map_or("nothing".into(), |bits| bits.to_string());
            Err(format!(".{name}: {}", unsupported(found, &known.join(", "))))
        }
    }
}

/// Reads a group size, a multiple of 8; -1 and nothing mean one group for all inputs.
fn group_size(section: &Value) -> Result<Option<usize>, String> {
    match field::<i64>(section, "group_size")? {
        None | Some(-1) => Ok(None),
        Some(size) if size > 0 && size % 8 == 0 && size <= 1 << 28 => Ok(Some(size as usize)),
        Some(size) => Err(format!(".group_size: {}", unsupported(size, "-1 and multiples of 8"))),
    }
}

/// Says whether `name` is one of `listed`, or part of a module that is: `model.layers.0.mlp` excludes all linears in it.
fn is_listed(listed: &[String], name: &str) -> bool {
    listed.iter().any(|entry| {
        let inside = name.strip_prefix(entry.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        inside || name.ends_with(&format!(".{entry}")) || name.contains(&format!(".{entry}."))
    })
}

/// A linear of a checkpoint that is to be read.
#[derive(Clone, Copy)]
struct Part<'a, 'n> {
    checkpoint: &'a Checkpoint,
    name: &'n str,
    outputs: usize,
    inputs: usize,
}

impl<'a> Part<'a, '_> {
    fn tensor_name(&self, tensor: &str) -> String {
        format!("{}.{tensor}", self.name)
    }

    /// Returns the type of one of the linear's tensors, if there is such a tensor.
    fn dtype(&self, tensor: &str) -> Option<Dtype> {
        self.checkpoint.find(&self.tensor_name(tensor)).map(|(dtype, _)| dtype)
    }

    fn shape(&self, tensor: &str) -> Option<&'a [usize]> {
        self.checkpoint.find(&self.tensor_name(tensor)).map(|(_, shape)| shape)
    }

    fn bytes(&self, tensor: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8], Error> {
        self.checkpoint.bytes(&self.tensor_name(tensor), dtype, shape)
    }

    /// Returns 32-bit words, `[rows][columns]`.
    fn words(&self, tensor: &str, rows: usize, columns: usize) -> Result<Words<'a>, Error> {
        Ok(Words { bytes: self.bytes(tensor, Dtype::I32, &[rows, columns])?, columns })
    }

    /// Returns the elements of a tensor of floats, which must be finite and not negative: scales.
    fn scales(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let scales = self.checkpoint.tensor(&self.tensor_name(tensor), shape)?.to_f32();
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite() || scale.is_sign_negative()) {
            return Err(self.fault(tensor, format!("scale {at} is {}, expected a finite number from 0 on", scales[at])));
        }
        Ok(scales)
    }

    /// Says whether the linear is kept as floats, because the method leaves it out or because it is stored so.
    fn is_left_out(&self, excluded: &[String]) -> bool {
        let stored_as_floats = self.dtype("qweight").is_none() && self.dtype("weight").is_some();
        stored_as_floats || is_listed(excluded, self.name)
    }

    /// Reads `scales`, `[groups][outputs]`, and returns them by output and group, with the offsets that `zero` of an output and a
    /// group makes of them: how GPTQ and AWQ keep both.
    fn scales_and_offsets(
        &self,
        code: Code,
        (group, groups): (usize, usize),
        zero: impl Fn(usize, usize) -> f32,
    ) -> Result<(Scheme, Vec<f32>, Vec<f32>), Error> {
        let scales = by_output(&self.scales("scales", &[groups, self.outputs])?, self.outputs);
        let zeros: Vec<f32> = (0..scales.len()).map(|at| zero(at / groups, at % groups)).collect();
        let offsets = offsets(code, &scales, &zeros);
        let narrow = self.dtype("scales") == Some(Dtype::F16);
        let group = group.next_multiple_of(8);
        let scheme = Scheme { code, group, narrow, offsets: !offsets.is_empty(), narrow_inputs: false };
        Ok((scheme, scales, offsets))
    }

    /// Returns the scales of `tensor` whatever its shape, which must be one of `shapes`; the scalar and `[1]` are one.
    fn scales_of_shape(&self, tensor: &str, shapes: &[Vec<usize>]) -> Result<(usize, Vec<f32>), Error> {
        let stored = self.shape(tensor);
        let which = shapes.iter().position(|shape| stored == Some(&shape[..])).unwrap_or(0);
        Ok((which, self.scales(tensor, &shapes[which])?))
    }

    /// Checks the scale of static activations, which float activations have no use for.
    fn check_input_scale(&self) -> Result<(), Error> {
        let Some(shape) = self.shape("input_scale") else { return Ok(()) };
        let shape = if shape.is_empty() { vec![] } else { vec![1] };
        let scale = self.scales("input_scale", &shape)?[0];
        if scale == 0.0 {
            return Err(self.fault("input_scale", "scale 0 is 0, expected a finite number above 0".into()));
        }
        Ok(())
    }

    /// Returns the bytes of those of `tensors` that are there.
    fn stored_bytes(&self, tensors: &[&str]) -> usize {
        tensors.iter().filter_map(|tensor| self.checkpoint.stored_bytes(&self.tensor_name(tensor))).sum()
    }

    fn fault(&self, tensor: &str, problem: String) -> Error {
        self.checkpoint.fault(&self.tensor_name(tensor), &problem)
    }

    /// Returns a group size that divides the inputs, and how many there are.
    fn groups(&self, group: Option<usize>) -> Result<(usize, usize), Error> {
        let group = group.unwrap_or(self.inputs);
        if !self.inputs.is_multiple_of(group) {
            let problem = format!(
                "quantization_config.group_size: {group} does not divide the {} inputs of `{}`",
                self.inputs, self.name
            );
            return Err(self.checkpoint.config_fault(&problem));
        }
        Ok((group, self.inputs / group))
    }

    /// Checks that a number of outputs or inputs fills whole words of `per_word` codes.
    fn check_whole_words(&self, what: &str, count: usize, per_word: usize) -> Result<(), Error> {
        if count.is_multiple_of(per_word) {
            return Ok(());
        }
        let problem = format!(
            "`{}` has {count} {what}, expected a multiple of {per_word}: packed words hold no fewer",
            self.name
        );
        Err(self.checkpoint.config_fault(&problem))
    }
}

/// Words of a file, `[rows][columns]`, little-endian at any alignment.
#[derive(Clone, Copy)]
struct Words<'a> {
    bytes: &'a [u8],
    columns: usize,
}

impl Words<'_> {
    fn get(&self, row: usize, column: usize) -> u32 {
        let at = (row * self.columns + column) * 4;
        u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    /// Returns code `index` of a word of codes.
    fn code(&self, row: usize, column: usize, code: Code, index: usize) -> u8 {
        let bits = 32 / code.per_word();
        (self.get(row, column) >> (bits * index) & ((1 << bits) - 1)) as u8
    }
}

/// How codes lie in a file.
enum Codes<'a> {
    /// `[inputs / codes of a word][outputs]`, words along the inputs (GPTQ).
    DownInputs(Words<'a>),
    /// `[inputs][outputs / 8]`, words across eight outputs in AWQ's order.
    AcrossOutputs(Words<'a>),
    /// `[outputs][inputs / codes of a word]`, words along the inputs (compressed-tensors).
    AlongInputs(Words<'a>),
    /// `[outputs][inputs]`, a byte each, of which some bits are turned over.
    Bytes { bytes: &'a [u8], flip: u8 },
}

/// A quantised matrix of a checkpoint.
struct Grouped<'a> {
    scheme: Scheme,
    inputs: usize,
    /// `[outputs][groups]`.
    scales: Vec<f32>,
    /// `[outputs][groups]`, or empty where the scheme has none.
    offsets: Vec<f32>,
    order: Option<Arc<[u32]>>,
    codes: Codes<'a>,
    stored_bytes: usize,
}

impl QuantizedMatrix for Grouped<'_> {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    fn order(&self) -> Option<&Arc<[u32]>> {
        self.order.as_ref()
    }

    fn read(&self, output: usize, row: &mut QuantizedRow) {
        let groups = self.scheme.groups(self.inputs);
        row.scales.copy_from_slice(&self.scales[output * groups..][..groups]);
        if self.scheme.offsets {
            row.offsets.copy_from_slice(&self.offsets[output * groups..][..groups]);
        }
        let code = self.scheme.code;
        let per_word = code.per_word();
        let input = |place: usize| self.order.as_ref().map_or(place, |order| order[place] as usize);
        let codes = row.codes.iter_mut().enumerate();
        match &self.codes {
            Codes::DownInputs(words) => codes.for_each(|(place, to)| {
                let input = input(place);
                *to = words.code(input / per_word, output, code, input % per_word);
            }),
            Codes::AcrossOutputs(words) => codes.for_each(|(place, to)| {
                *to = words.code(input(place), output / 8, code, awq::NIBBLE[output % 8]);
            }),
            Codes::AlongInputs(words) => codes.for_each(|(place, to)| {
                let input = input(place);
                *to = words.code(output, input / per_word, code, input % per_word);
            }),
            Codes::Bytes { bytes, flip } => {
                codes.zip(&bytes[output * self.inputs..]).for_each(|((_, to), from)| *to = from ^ flip);
            }
        }
    }
}

/// Turns scales by group and output, `[groups][outputs]`, into scales by output and group.
fn by_output(scales: &[f32], outputs: usize) -> Vec<f32> {
    let groups = scales.len() / outputs;
    (0..outputs).flat_map(|output| (0..groups).map(move |group| scales[group * outputs + output])).collect()
}

/// Returns `-scale * zero` for each scale, or nothing when every zero is the one that a code without offsets has.
fn offsets(code: Code, scales: &[f32], zeros: &[f32]) -> Vec<f32> {
    if zeros.iter().all(|zero| *zero == code.zero()) {
        return Vec::new();
    }
    scales.iter().zip(zeros).map(|(scale, zero)| -scale * zero).collect()
}

/// Returns the order of inputs that puts every group's together, given each input's group; `None` when they are already.
///
/// The error says which input or group is at fault.
fn order_of(groups_of: &[i64], group: usize) -> Result<Option<Arc<[u32]>>, String> {
    let groups = groups_of.len() / group;
    let mut counts = vec![0; groups];
    for (input, index) in groups_of.iter().enumerate() {
        match usize::try_from(*index).ok().and_then(|index| counts.get_mut(index)) {
            Some(count) => *count += 1,
            None => return Err(format!("input {input} is in group {index}, expected one of {groups}")),
        }
    }
    if let Some(odd) = counts.iter().position(|count| *count != group) {
        return Err(format!("group {odd} has {} inputs, expected {group}", counts[odd]));
    }
    let mut order: Vec<u32> = (0..groups_of.len() as u32).collect();
    order.sort_by_key(|input| groups_of[*input as usize]);
    let sorted = order.iter().enumerate().all(|(place, input)| place == *input as usize);
    Ok((!sorted).then(|| order.into()))
}

/// Returns what `g_idx` says, or `None` without it.
fn stored_order(part: &Part<'_, '_>, tensor: &str, group: usize) -> Result<Option<Arc<[u32]>>, Error> {
    let Some(dtype) = part.dtype(tensor) else { return Ok(None) };
    let wide = dtype == Dtype::I64;
    let bytes = part.bytes(tensor, if wide { Dtype::I64 } else { Dtype::I32 }, &[part.inputs])?;
    let groups: Vec<i64> = if wide {
        bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    } else {
        bytes.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect()
    };
    // compressed-tensors writes -1 everywhere where there is no order.
    if groups.iter().all(|group| *group == -1) {
        return Ok(None);
    }
    order_of(&groups, group).map_err(|problem| part.fault(tensor, problem))
}
