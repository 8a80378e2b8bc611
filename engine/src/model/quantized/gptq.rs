//! GPTQ (AutoGPTQ, GPTQModel): integers by groups of inputs, found one input after the other.
//!
//! `qweight` holds codes along the inputs, `qzeros` codes along the outputs, `g_idx` the group of each input, which act-order
//! (`desc_act`) scatters. The first version of the format stores `zero - 1`, `gptq_v2` stores `zero`.

use super::{Codes, Grouped, Part, bits, describe_group, field, group_size, stored_order, unsupported};
use crate::{Error, cpu::scheme::Code};
use serde_json::Value;

#[derive(Debug)]
pub(crate) struct Gptq {
    code: Code,
    group: Option<usize>,
    /// Added to a stored zero.
    zero_shift: f32,
    excluded: Vec<String>,
}

impl Gptq {
    pub(super) fn parse(section: &Value) -> Result<Self, String> {
        let code = bits(section, "bits", &[4, 8])?;
        let group = group_size(section)?;
        let format: Option<String> = match field(section, "checkpoint_format")? {
            Some(format) => Some(format),
            None => field(section, "format")?,
        };
        let zero_shift = match format.as_deref() {
            None | Some("gptq") => 1.0,
            Some("gptq_v2") => 0.0,
            Some(other) => return Err(format!(".checkpoint_format: {}", unsupported(other, "gptq, gptq_v2"))),
        };
        if section.get("dynamic").and_then(Value::as_object).is_some_and(|rules| !rules.is_empty()) {
            return Err(".dynamic: rules for single modules are not supported; known: one rule for all".into());
        }
        Ok(Self { code, group, zero_shift, excluded: field(section, "modules_to_not_convert")?.unwrap_or_default() })
    }

    pub(super) fn describe(&self) -> String {
        format!("{} (gptq, {})", self.code.name(), describe_group(self.group))
    }

    pub(super) fn matrix<'a>(&self, part: &Part<'a, '_>) -> Result<Option<Grouped<'a>>, Error> {
        if part.is_left_out(&self.excluded) {
            return Ok(None);
        }
        let (outputs, inputs, code) = (part.outputs, part.inputs, self.code);
        let per_word = code.per_word();
        part.check_whole_words("inputs", inputs, per_word)?;
        part.check_whole_words("outputs", outputs, per_word)?;
        let groups = part.groups(self.group)?;
        let words = part.words("qweight", inputs / per_word, outputs)?;
        let packed_zeros = part.words("qzeros", groups.1, outputs / per_word)?;
        let zero = |output: usize, index: usize| {
            f32::from(packed_zeros.code(index, output / per_word, code, output % per_word)) + self.zero_shift
        };
        let (scheme, scales, offsets) = part.scales_and_offsets(code, groups, zero)?;
        let order = stored_order(part, "g_idx", groups.0)?;
        let stored_bytes = part.stored_bytes(&["qweight", "qzeros", "scales", "g_idx"]);
        Ok(Some(Grouped { scheme, inputs, scales, offsets, order, codes: Codes::DownInputs(words), stored_bytes }))
    }
}
