//! AWQ as AutoAWQ's `gemm` kernels want it: int4 by groups of inputs, words across eight outputs in an order of their own.

use super::{Codes, Grouped, Part, bits, describe_group, field, group_size, unsupported};
use crate::{Error, cpu::scheme::Code};
use serde_json::Value;

/// Where in a word each of eight neighbouring outputs lies: a word holds outputs 0 2 4 6 1 3 5 7, the lowest bits first.
pub(super) const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Debug)]
pub(crate) struct Awq {
    group: Option<usize>,
    excluded: Vec<String>,
}

impl Awq {
    pub(super) fn parse(section: &Value) -> Result<Self, String> {
        bits(section, "bits", &[4])?;
        let version: Option<String> = field(section, "version")?;
        if let Some(other) = version.filter(|version| !version.eq_ignore_ascii_case("gemm")) {
            return Err(format!(".version: {}", unsupported(other, "gemm")));
        }
        if field(section, "zero_point")? == Some(false) {
            return Err(format!(".zero_point: {}", unsupported(false, "true")));
        }
        let excluded = field(section, "modules_to_not_convert")?.unwrap_or_default();
        Ok(Self { group: group_size(section)?, excluded })
    }

    pub(super) fn describe(&self) -> String {
        format!("int4 (awq, {})", describe_group(self.group))
    }

    pub(super) fn matrix<'a>(&self, part: &Part<'a, '_>) -> Result<Option<Grouped<'a>>, Error> {
        if part.is_left_out(&self.excluded) {
            return Ok(None);
        }
        let (outputs, inputs, code) = (part.outputs, part.inputs, Code::Int4);
        part.check_whole_words("outputs", outputs, 8)?;
        let groups = part.groups(self.group)?;
        let words = part.words("qweight", inputs, outputs / 8)?;
        let packed_zeros = part.words("qzeros", groups.1, outputs / 8)?;
        let zero =
            |output: usize, index: usize| f32::from(packed_zeros.code(index, output / 8, code, NIBBLE[output % 8]));
        let (scheme, scales, offsets) = part.scales_and_offsets(code, groups, zero)?;
        let stored_bytes = part.stored_bytes(&["qweight", "qzeros", "scales"]);
        Ok(Some(Grouped {
            scheme,
            inputs,
            scales,
            offsets,
            order: None,
            codes: Codes::AcrossOutputs(words),
            stored_bytes,
        }))
    }
}
