//! `quant_method: fp8`: e4m3 with a scale for each tensor, or for each block of outputs and inputs as DeepSeek V3 has it.

use super::{Codes, Grouped, Part, field, is_listed, unsupported};
use crate::{
    Error,
    cpu::scheme::{Code, Scheme},
};
use safetensors::Dtype;
use serde_json::Value;

#[derive(Debug)]
pub(crate) struct Fp8 {
    /// Outputs and inputs of a block; `None` = the whole matrix.
    block: Option<[usize; 2]>,
    excluded: Vec<String>,
}

impl Fp8 {
    pub(super) fn parse(section: &Value) -> Result<Self, String> {
        let format: Option<String> = field(section, "fmt")?;
        if let Some(other) = format.filter(|format| format != "e4m3") {
            return Err(format!(".fmt: {}", unsupported(other, "e4m3")));
        }
        let activations: Option<String> = field(section, "activation_scheme")?;
        if let Some(other) = activations.filter(|scheme| scheme != "static" && scheme != "dynamic") {
            return Err(format!(".activation_scheme: {}", unsupported(other, "static, dynamic")));
        }
        let block: Option<Vec<usize>> = field(section, "weight_block_size")?;
        let block = block.map(|block| check_block(&block).map_err(|problem| format!(".weight_block_size: {problem}")));
        let mut excluded: Vec<String> = field(section, "modules_to_not_convert")?.unwrap_or_default();
        excluded.extend(field::<Vec<String>>(section, "ignored_layers")?.unwrap_or_default());
        Ok(Self { block: block.transpose()?, excluded })
    }

    pub(super) fn describe(&self) -> String {
        match self.block {
            Some([outputs, inputs]) => format!("fp8 (blocks of {outputs} x {inputs})"),
            None => "fp8 (per tensor)".into(),
        }
    }

    pub(super) fn matrix<'a>(&self, part: &Part<'a, '_>) -> Result<Option<Grouped<'a>>, Error> {
        if part.dtype("weight") != Some(Dtype::F8_E4M3) || is_listed(&self.excluded, part.name) {
            return Ok(None);
        }
        part.check_input_scale()?;
        match self.block {
            Some(block) => in_blocks(part, "weight_scale_inv", block).map(Some),
            None => {
                let (_, scales) = part.scales_of_shape("weight_scale", &[vec![1], vec![]])?;
                per_output(part, "weight_scale", vec![scales[0]; part.outputs]).map(Some)
            }
        }
    }
}

/// Checks the outputs and inputs of a block.
pub(super) fn check_block(block: &[usize]) -> Result<[usize; 2], String> {
    match *block {
        [outputs, inputs] if outputs > 0 && inputs > 0 && inputs.is_multiple_of(8) && inputs <= 1 << 28 => {
            Ok([outputs, inputs])
        }
        _ => Err(unsupported(format!("{block:?}"), "[outputs, inputs], of which inputs is a multiple of 8")),
    }
}

/// Reads a matrix of e4m3 with one scale for each output.
pub(super) fn per_output<'a>(part: &Part<'a, '_>, scale: &str, scales: Vec<f32>) -> Result<Grouped<'a>, Error> {
    grouped(part, scale, Scheme::per_output(Code::Fp8, part.inputs), scales)
}

/// Reads a matrix of e4m3 whose blocks have scales, `[outputs / block][inputs / block]`, each rounded up.
pub(super) fn in_blocks<'a>(
    part: &Part<'a, '_>,
    scale: &str,
    [rows, columns]: [usize; 2],
) -> Result<Grouped<'a>, Error> {
    let groups = part.inputs.div_ceil(columns);
    let blocks = part.scales(scale, &[part.outputs.div_ceil(rows), groups])?;
    let scales =
        (0..part.outputs).flat_map(|output| blocks[output / rows * groups..][..groups].iter().copied()).collect();
    grouped(
        part,
        scale,
        Scheme { code: Code::Fp8, group: columns, narrow: false, offsets: false, narrow_inputs: false },
        scales,
    )
}

/// Reads a matrix of e4m3 under `scheme`, given its scales.
pub(super) fn grouped<'a>(
    part: &Part<'a, '_>,
    scale: &str,
    scheme: Scheme,
    scales: Vec<f32>,
) -> Result<Grouped<'a>, Error> {
    let bytes = part.bytes("weight", Dtype::F8_E4M3, &[part.outputs, part.inputs])?;
    if let Some(at) = bytes.iter().position(|byte| byte & 0x7f == 0x7f) {
        let (output, input) = (at / part.inputs, at % part.inputs);
        return Err(part.fault("weight", format!("the weight of output {output} and input {input} is NaN")));
    }
    let stored_bytes = part.stored_bytes(&["weight", scale, "input_scale"]);
    let codes = Codes::Bytes { bytes, flip: 0 };
    Ok(Grouped { scheme, inputs: part.inputs, scales, offsets: Vec::new(), order: None, codes, stored_bytes })
}
