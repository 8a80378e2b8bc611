//! How quantised weights lie for `codes.cu`: as the CPU home packs them.

use super::{Args, Defines, LinearShape};
use crate::{
    cpu::{
        packed::{PANEL, Packed, WeightType},
        scheme::Code,
    },
    cuda::device::Operand,
};

/// Steps of 32 inputs of a segment, where a group is longer.
const SEGMENT_STEPS: u32 = 4;

/// Packed weights that are codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    code: Code,
    panel_bytes: u64,
    group_bytes: u32,
    group_inputs: u32,
    /// Groups of a step: 1, also where a group has several steps.
    step_groups: u32,
    segment_steps: u32,
    inputs: u32,
    narrow: bool,
    offsets: bool,
    /// What they are beside inputs of eight bits.
    operand: Option<Operand>,
}

impl Codes {
    /// Reads how `packed` lies; its inputs are to come in its [order](Packed::order).
    ///
    /// # Errors
    /// Says what the kernel cannot do.
    pub(crate) fn new(packed: &Packed) -> Result<Self, String> {
        let WeightType::Quantized(scheme) = packed.weights() else {
            return Err(format!("weights of type {:?} are no codes", packed.weights()));
        };
        let (groups, inputs) = (packed.groups(), packed.depth());
        let (several, steps) = (groups.inputs < inputs, (groups.inputs / 32) as u32);
        let step_groups = if several && groups.inputs == 16 && scheme.code == Code::Int8 { 2 } else { 1 };
        if several && step_groups == 1 && !groups.inputs.is_multiple_of(32) {
            return Err(format!(
                "{} in groups of {} inputs; a multiple of 32, 16 for int8, or one for all, would be right",
                scheme.code.name(),
                groups.inputs
            ));
        }
        let segment_steps = match steps {
            0 if several => 1,
            steps if several && steps <= SEGMENT_STEPS => steps,
            steps if several && !steps.is_multiple_of(SEGMENT_STEPS) => 1,
            _ => SEGMENT_STEPS,
        };
        // Beside e4m3 inputs are of eight bits by convention; beside integers only where the checkpoint says so.
        let operand = match scheme.code {
            Code::Fp8 => Some(Operand::E4m3),
            Code::Int8 if scheme.narrow_inputs => Some(Operand::Int8),
            Code::Int8 | Code::Int4 => None,
        };
        let one_scale = groups.inputs >= inputs && !groups.offsets;
        Ok(Self {
            operand: operand.filter(|_| one_scale),
            code: scheme.code,
            panel_bytes: packed.panel_bytes() as u64,
            group_bytes: groups.bytes as u32,
            group_inputs: groups.inputs as u32,
            step_groups,
            segment_steps,
            inputs: inputs as u32,
            narrow: groups.narrow,
            offsets: groups.offsets,
        })
    }

    /// Returns the shape of the linear with these weights in `panels` panels; `gated` and `chosen` as in [`LinearShape::new`].
    pub(crate) fn shape(&self, panels: usize, gated: bool, chosen: usize) -> LinearShape {
        LinearShape::in_segments(panels * PANEL, self.inputs as usize, gated, chosen, self.segment_steps as usize)
    }

    /// Returns the operand of eight bits that the codes are, where each output has one scale and inputs are meant to have eight bits as well.
    pub(crate) fn operand(&self) -> Option<Operand> {
        self.operand
    }

    /// Returns what kernels know the code by.
    fn number(&self) -> u32 {
        match self.code {
            Code::Int4 => 0,
            Code::Int8 => 1,
            Code::Fp8 => 2,
        }
    }

    pub(super) fn panel_bytes(&self) -> u64 {
        self.panel_bytes
    }

    /// Returns what the kernel is compiled with for tiles of `tiles` times 16 rows.
    pub(super) fn defines(&self, tiles: u32) -> Defines {
        Defines::of(&[
            ("CODE", self.number()),
            ("OFFSETS", u32::from(self.offsets)),
            ("STEP_GROUPS", self.step_groups),
            ("STREAM_TILES", tiles),
            ("STREAM_STAGES", if self.code == Code::Int4 { 4 } else { 3 }),
        ])
    }

    /// Every variant over bf16.
    #[cfg(test)]
    pub(super) fn variants() -> impl Iterator<Item = super::Kernel> {
        let kinds = [
            (Code::Int4, false, 1),
            (Code::Int4, true, 1),
            (Code::Int8, false, 1),
            (Code::Int8, true, 1),
            (Code::Int8, false, 2),
            (Code::Int8, true, 2),
            (Code::Fp8, false, 1),
        ];
        let any = Self {
            code: Code::Int4,
            panel_bytes: 0,
            group_bytes: 0,
            group_inputs: 0,
            step_groups: 1,
            segment_steps: 1,
            inputs: 0,
            narrow: false,
            offsets: false,
            operand: None,
        };
        let of = move |(code, offsets, step_groups), tiles| Self { code, offsets, step_groups, ..any }.defines(tiles);
        let both = kinds.into_iter().flat_map(move |kind| [of(kind, 1), of(kind, 2)]);
        let all = both.flat_map(|defines| [false, true].map(|grouped| defines.grouped(grouped)));
        let (name, source, element) = ("linear_codes", super::Source::Codes, super::Element::Bf16);
        all.map(move |defines| super::Kernel { name, source, element, defines })
    }

    /// Appends what stands behind the arguments of [`Embed`](super::Embed).
    pub(super) fn append_table(&self, args: Args) -> Args {
        let args = args.word(self.panel_bytes).number(self.group_bytes).number(self.group_inputs);
        args.number(u32::from(self.narrow)).number(u32::from(self.offsets)).number(self.number())
    }

    /// Appends what stands behind the arguments of a linear.
    pub(super) fn append(&self, args: Args) -> Args {
        let args = args.word(self.panel_bytes).number(self.group_bytes).number(self.group_inputs);
        args.number(self.segment_steps).number(self.inputs).number(u32::from(self.narrow))
    }
}

#[cfg(test)]
mod tests;
