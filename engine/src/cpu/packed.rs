//! Weights in the order in which kernels read them.
//!
//! A matrix `[columns][depth]` (one row of the checkpoint for each output) becomes *panels* of 64 outputs. A panel holds, for
//! each step along the depth, its 64 outputs side by side: one element each for f32 and f16 (`[depth][64]`), a pair of
//! neighbours for bf16 (`[depth / 2][64][2]`, the operand of `vdpbf16ps`). A kernel reads a panel from front to back, whatever
//! its vectors' width, so one packing serves every instruction set. Missing columns are zero, and so is what bf16 panels have
//! beyond the depth, up to a whole step of the tile unit.
//!
//! Quantised weights lie in groups along the depth: the 64 outputs' scales, their offsets if there are any, and then words of
//! eight or four codes of neighbouring inputs, 64 side by side (`[depth / 8][64]` or `[depth / 4][64]`). Codes of eight bits
//! are the bytes of their word, in order; those of four bits stand as [`Code::shift`] says.
//! Whatever widens them stands in the same stream, right before its first use.

use crate::{
    Error,
    cpu::{
        buffer::Buffer,
        encode::CodeRows,
        nodes::Nodes,
        scheme::{Code, QuantizedRow, Scheme},
    },
    model::checkpoint::ElementType,
};
use std::{ops::Range, sync::Arc};

/// Outputs of a panel.
pub(crate) const PANEL: usize = 64;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum WeightType {
    /// As floats.
    Float(ElementType),
    /// As codes with scales.
    Quantized(Scheme),
}

/// A packed weight matrix.
#[derive(Debug)]
pub(crate) struct Packed {
    weights: WeightType,
    depth: usize,
    panels: usize,
    /// Which input stands at each place along the depth, if not its own.
    order: Option<Arc<[u32]>>,
    buffer: Buffer,
}

/// A stored row of weights: its elements along the depth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredRow<'a> {
    pub(crate) dtype: ElementType,
    pub(crate) bytes: &'a [u8],
}

/// How the groups of a quantised panel lie.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Groups {
    /// Inputs of a group.
    pub(crate) inputs: usize,
    /// Bytes from group to group.
    pub(crate) bytes: usize,
    /// Scales are f16, else f32.
    pub(crate) narrow: bool,
    /// Offsets follow the scales.
    pub(crate) offsets: bool,
    /// How rows of inputs lie that are codes, too.
    pub(crate) rows: CodeRows,
}

impl Groups {
    fn new(scheme: &Scheme, depth: usize) -> Self {
        let Scheme { code, group, narrow, offsets, narrow_inputs } = *scheme;
        let segment = scheme.segment(depth);
        let rows = segment.map(|segment| CodeRows::new(depth, segment, narrow_inputs)).unwrap_or_default();
        let mut groups = Self { inputs: group, bytes: 0, narrow, offsets, rows };
        groups.bytes = groups.header_bytes() + group.div_ceil(code.per_word()) * WORD_BYTES;
        groups
    }

    /// Returns the words of `panel` that begin with the codes of input `input`, the first of a word. Only an address: whoever
    /// reads it vouches for the input.
    #[inline(always)]
    pub(crate) fn word(&self, panel: *const u8, input: usize, code: Code) -> *const u8 {
        let words = input % self.inputs / code.per_word();
        panel.wrapping_add(input / self.inputs * self.bytes + self.header_bytes() + words * WORD_BYTES)
    }

    /// Returns the bytes of a group's scales.
    #[inline(always)]
    pub(crate) fn scale_bytes(&self) -> usize {
        PANEL * if self.narrow { 2 } else { 4 }
    }

    /// Returns the bytes of a group before its codes.
    #[inline(always)]
    pub(crate) fn header_bytes(&self) -> usize {
        self.scale_bytes() + if self.offsets { PANEL * 4 } else { 0 }
    }
}

/// Bytes of a word of each output of a panel.
pub(crate) const WORD_BYTES: usize = 4 * PANEL;

impl Packed {
    /// Packs `panels * 64` columns of `depth` elements as `dtype`; `row` names the stored row of a column, `None` = zeros.
    ///
    /// Runs on `threads` threads. A row stored as another type is converted.
    pub(crate) fn pack<'a>(
        dtype: ElementType,
        panels: usize,
        depth: usize,
        threads: usize,
        row: &(dyn Fn(usize) -> Option<StoredRow<'a>> + Sync),
    ) -> Result<Self, Error> {
        let mut packed = Self::zeroed(dtype, panels, depth)?;
        packed.for_each_panel(threads, &|panel, bytes| {
            for column in 0..PANEL {
                if let Some(row) = row(panel * PANEL + column) {
                    assert_eq!(row.bytes.len(), depth * row.dtype.bytes(), "a stored row has the matrix's depth");
                    place_row(dtype, row, column, bytes);
                }
            }
        });
        Ok(packed)
    }

    /// Packs `panels * 64` columns of `depth` codes under `scheme`.
    ///
    /// `read` fills in a column and returns true, or returns false for a column of zeros. `order` is the columns' common
    /// [order](crate::cpu::scheme::QuantizedMatrix::order).
    pub(crate) fn pack_quantized(
        scheme: Scheme,
        panels: usize,
        depth: usize,
        threads: usize,
        order: Option<Arc<[u32]>>,
        read: &(dyn Fn(usize, &mut QuantizedRow) -> bool + Sync),
    ) -> Result<Self, Error> {
        let names_inputs =
            |order: &Arc<[u32]>| order.len() == depth && order.iter().all(|input| (*input as usize) < depth);
        assert!(order.as_ref().is_none_or(names_inputs), "an order names every input");
        assert!(scheme.group.is_multiple_of(8), "groups hold whole words");
        let mut packed = Self { order, ..Self::of(WeightType::Quantized(scheme), panels, depth)? };
        packed.for_each_panel(threads, &|panel, bytes| {
            let mut row = QuantizedRow::zeroed(&scheme, depth);
            for column in 0..PANEL {
                if read(panel * PANEL + column, &mut row) {
                    assert_eq!(row.codes.len(), depth, "a row has the matrix's depth");
                    place_codes(&scheme, &row, column, bytes);
                }
            }
        });
        Ok(packed)
    }

    /// Packs `panels * 64` columns of `depth` f32 that `read` makes, or leaves as zeros and returns false.
    pub(crate) fn pack_made(
        panels: usize,
        depth: usize,
        threads: usize,
        read: &(dyn Fn(usize, &mut [f32]) -> bool + Sync),
    ) -> Result<Self, Error> {
        let mut packed = Self::zeroed(ElementType::F32, panels, depth)?;
        packed.for_each_panel(threads, &|panel, bytes| {
            let mut row = vec![0.0; depth];
            for column in 0..PANEL {
                if read(panel * PANEL + column, &mut row) {
                    for (lane, weight) in bytes.chunks_exact_mut(PANEL * 4).zip(&row) {
                        lane[column * 4..column * 4 + 4].copy_from_slice(&weight.to_le_bytes());
                    }
                }
            }
        });
        Ok(packed)
    }

    /// Makes a matrix of zeros.
    pub(crate) fn zeroed(dtype: ElementType, panels: usize, depth: usize) -> Result<Self, Error> {
        Self::of(WeightType::Float(dtype), panels, depth)
    }

    fn of(weights: WeightType, panels: usize, depth: usize) -> Result<Self, Error> {
        let buffer = Buffer::new(panels * panel_bytes(weights, depth))?;
        Ok(Self { weights, depth, panels, order: None, buffer })
    }

    /// Calls `fill` with the bytes of every panel, on `threads` threads: each writes, and so places in the memory beside it, what
    /// threads of its node will read.
    pub(crate) fn for_each_panel(&mut self, threads: usize, fill: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        let mut panels: Vec<(usize, &mut [u8])> =
            self.buffer.bytes_mut().chunks_exact_mut(panel_bytes(self.weights, self.depth)).enumerate().collect();
        // Panels are large: with less than a few for each thread, starting threads would cost more than it saves.
        if threads < 2 || panels.len() * self.depth < 1 << 16 {
            panels.iter_mut().for_each(|(index, bytes)| fill(*index, bytes));
            return;
        }
        let each = panels.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for (thread, share) in panels.chunks_mut(each).enumerate() {
                scope.spawn(move || {
                    Nodes::machine().stay(thread, threads);
                    share.iter_mut().for_each(|(index, bytes)| fill(*index, bytes));
                });
            }
        });
    }

    /// Returns how the weights are kept.
    pub(crate) fn weights(&self) -> WeightType {
        self.weights
    }

    /// Returns how the groups of a panel lie; nothing of the kind for floats.
    pub(crate) fn groups(&self) -> Groups {
        match &self.weights {
            WeightType::Float(_) => Groups::default(),
            WeightType::Quantized(scheme) => Groups::new(scheme, self.depth),
        }
    }

    /// Returns which input stands at each place along the depth, where that is not the input of that place.
    pub(crate) fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Returns the number of elements that are summed for an output.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Returns the number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.panels
    }

    /// Returns the bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Returns the bytes from panel to panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        panel_bytes(self.weights, self.depth)
    }

    /// Returns the start of `panel`, aligned to 64 bytes.
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.panels, "panel {panel} of {}", self.panels);
        let offset = panel * self.panel_bytes();
        // SAFETY: the panel lies in the buffer, as just checked.
        unsafe { self.buffer.as_ptr().add(offset) }
    }

    /// Returns the bytes of `panel`.
    pub(crate) fn panel_contents(&self, panel: usize) -> &[u8] {
        // SAFETY: the panel is that long, initialised, and not written while shared.
        unsafe { std::slice::from_raw_parts(self.panel(panel), self.panel_bytes()) }
    }

    /// Copies column `column` to column `to` of `panel`, the bytes of a panel of a matrix like this one.
    pub(crate) fn copy_column(&self, column: usize, panel: &mut [u8], to: usize) {
        let (source, from) = (self.panel_contents(column / PANEL), column % PANEL);
        assert!(panel.len() == source.len() && to < PANEL, "column {to} of {} bytes for {self:?}", panel.len());
        // Whatever it is, elements of all columns lie side by side.
        let mut copy = |range: Range<usize>, bytes: usize| {
            for lanes in range.step_by(PANEL * bytes) {
                panel[lanes + to * bytes..][..bytes].copy_from_slice(&source[lanes + from * bytes..][..bytes]);
            }
        };
        match &self.weights {
            WeightType::Float(dtype) => copy(0..source.len(), step(*dtype) * dtype.bytes()),
            WeightType::Quantized(_) => {
                let groups = self.groups();
                for group in (0..source.len()).step_by(groups.bytes) {
                    let words = group + groups.scale_bytes();
                    copy(group..words, groups.scale_bytes() / PANEL);
                    copy(words..source.len().min(group + groups.bytes), WORD_BYTES / PANEL);
                }
            }
        }
    }

    /// Copies one column, that is one stored row, to `out` as f32: how a tied embedding is looked up.
    pub(crate) fn column(&self, column: usize, out: &mut [f32]) {
        assert!(column < self.panels * PANEL && out.len() == self.depth, "column {column} of {self:?}");
        // SAFETY: the buffer holds `len` initialised bytes and is not written while shared.
        let bytes = unsafe { std::slice::from_raw_parts(self.buffer.as_ptr(), self.buffer.len()) };
        let panel = &bytes[column / PANEL * self.panel_bytes()..][..self.panel_bytes()];
        let lane = column % PANEL;
        match &self.weights {
            WeightType::Float(dtype) => {
                let step = step(*dtype);
                for (index, out) in out.iter_mut().enumerate() {
                    *out = dtype.get(panel, (index / step * PANEL + lane) * step + index % step);
                }
            }
            WeightType::Quantized(scheme) => {
                let place = |index: usize| self.order.as_ref().map_or(index, |order| order[index] as usize);
                (0..self.depth)
                    .for_each(|index| out[place(index)] = take_weight(scheme, panel, lane, index, self.depth));
            }
        }
    }
}

/// Neighbours along the depth that lie side by side.
fn step(dtype: ElementType) -> usize {
    match dtype {
        ElementType::Bf16 => 2,
        ElementType::F32 | ElementType::F16 => 1,
    }
}

fn panel_bytes(weights: WeightType, depth: usize) -> usize {
    match weights {
        WeightType::Float(dtype) => {
            let whole = if dtype == ElementType::Bf16 { depth.next_multiple_of(32) } else { depth };
            whole * PANEL * dtype.bytes()
        }
        WeightType::Quantized(scheme) => {
            let words = depth.div_ceil(scheme.code.per_word());
            scheme.groups(depth) * Groups::new(&scheme, depth).header_bytes() + words * WORD_BYTES
        }
    }
}

fn place_row(dtype: ElementType, row: StoredRow<'_>, column: usize, panel: &mut [u8]) {
    let step_bytes = step(dtype) * dtype.bytes();
    let lanes = panel.chunks_exact_mut(PANEL * step_bytes);
    let start = column * step_bytes;
    if row.dtype == dtype {
        // The last bf16 of an odd depth has no neighbour: its chunk is short.
        for (lane, element) in lanes.zip(row.bytes.chunks(step_bytes)) {
            lane[start..start + element.len()].copy_from_slice(element);
        }
        return;
    }
    assert_eq!(dtype, ElementType::F32, "only f32 holds every other type");
    for (index, lane) in lanes.enumerate() {
        lane[start..start + 4].copy_from_slice(&row.dtype.get(row.bytes, index).to_le_bytes());
    }
}

fn place_codes(scheme: &Scheme, row: &QuantizedRow, column: usize, panel: &mut [u8]) {
    let groups = Groups::new(scheme, row.codes.len());
    let codes = row.codes.chunks(scheme.group);
    for (index, (group, codes)) in panel.chunks_mut(groups.bytes).zip(codes).enumerate() {
        let scale = row.scales[index];
        if groups.narrow {
            let narrow = half::f16::from_f32(scale);
            debug_assert_eq!(narrow.to_f32(), scale, "a narrow scale is exact");
            group[column * 2..][..2].copy_from_slice(&narrow.to_le_bytes());
        } else {
            group[column * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
        if groups.offsets {
            group[groups.scale_bytes() + column * 4..][..4].copy_from_slice(&row.offsets[index].to_le_bytes());
        }
        let words = group[groups.header_bytes()..].chunks_exact_mut(WORD_BYTES);
        for (word, codes) in words.zip(codes.chunks(scheme.code.per_word())) {
            let place = |(index, code): (usize, &u8)| u32::from(*code) << scheme.code.shift(index);
            let packed = codes.iter().enumerate().map(place).fold(0, |word, code| word | code);
            word[column * 4..][..4].copy_from_slice(&packed.to_le_bytes());
        }
    }
}

/// The way back from [`place_codes`]: the weight that stands at place `index` along the depth.
fn take_weight(scheme: &Scheme, panel: &[u8], column: usize, index: usize, depth: usize) -> f32 {
    let groups = Groups::new(scheme, depth);
    let (group, index) = (&panel[index / scheme.group * groups.bytes..], index % scheme.group);
    let scale = if groups.narrow { ElementType::F16 } else { ElementType::F32 }.get(group, column);
    let offset = match groups.offsets {
        true => ElementType::F32.get(&group[groups.scale_bytes()..], column),
        false => -scheme.code.zero() * scale,
    };
    let (per_word, words) = (scheme.code.per_word(), &group[groups.header_bytes()..]);
    let (shift, bits) = (scheme.code.shift(index % per_word), 32 / per_word);
    let byte = words[index / per_word * WORD_BYTES + column * 4 + shift / 8];
    let code = byte >> (shift % 8) & (u8::MAX >> (8 - bits));
    scheme.code.value(code).mul_add(scale, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(dtype: ElementType, values: &[f32]) -> Vec<u8> {
        let element = |value: &f32| match dtype {
            ElementType::F32 => value.to_le_bytes().to_vec(),
            ElementType::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
            ElementType::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(element).collect()
    }

    #[test]
    fn a_column_comes_back_as_it_was_stored() {
        for (from, to) in [
            (ElementType::F32, ElementType::F32),
            (ElementType::F16, ElementType::F16),
            (ElementType::Bf16, ElementType::Bf16),
            (ElementType::Bf16, ElementType::F32),
            (ElementType::F16, ElementType::F32),
        ] {
            for depth in [1, 2, 7, 33] {
                let columns = 70;
                let value = |column: usize, index: usize| (column * 3 + index) as f32 - 64.0;
                let rows: Vec<Vec<u8>> = (0..columns)
                    .map(|column| stored(from, &(0..depth).map(|index| value(column, index)).collect::<Vec<_>>()))
                    .collect();
                let row = |column: usize| rows.get(column).map(|bytes| StoredRow { dtype: from, bytes });
                let packed = Packed::pack(to, 2, depth, 2, &row).expect("memory");
                let mut out = vec![0.0; depth];
                check_copies(&packed);
                for column in 0..2 * PANEL {
                    packed.column(column, &mut out);
                    for (index, out) in out.iter().enumerate() {
                        let expected = if column < columns { value(column, index) } else { 0.0 };
                        assert_eq!(*out, expected, "{from:?} {to:?} depth {depth} column {column} index {index}");
                    }
                }
            }
        }
    }

    /// Copies the columns of two panels to each other's places and back.
    fn check_copies(packed: &Packed) {
        let mut turned = [vec![0; packed.panel_bytes()], vec![0; packed.panel_bytes()]];
        for column in 0..2 * PANEL {
            let to = (column * 37 + 5) % (2 * PANEL);
            packed.copy_column(column, &mut turned[to / PANEL], to % PANEL);
        }
        let mut other = Packed::of(packed.weights, 2, packed.depth).expect("memory");
        other.for_each_panel(1, &|panel, bytes| bytes.copy_from_slice(&turned[panel]));
        for column in 0..2 * PANEL {
            let to = (column * 37 + 5) % (2 * PANEL);
            other.copy_column(to, &mut turned[column / PANEL], column % PANEL);
        }
        (0..2).for_each(|panel| assert!(packed.panel_contents(panel) == turned[panel], "{packed:?}"));
    }

    /// Codes, scales and offsets that look random, under `scheme`.
    fn some_row(scheme: &Scheme, depth: usize, column: usize) -> QuantizedRow {
        let mut row = QuantizedRow::zeroed(scheme, depth);
        let highest = if scheme.code == Code::Int4 { 16 } else { 127 };
        row.codes.iter_mut().enumerate().for_each(|(at, code)| *code = ((at * 31 + column * 7) % highest) as u8);
        row.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = ((at + column) % 29) as f32 / 16.0 - 0.5);
        row.offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = (at * 3 + column) as f32 / 3.0);
        row
    }

    #[test]
    fn a_quantised_column_comes_back_as_it_was_read() {
        for code in [Code::Int4, Code::Int8, Code::Fp8] {
            for (group, depth) in [(16, 7), (32, 33), (64, 200), (128, 128), (128, 1)] {
                for (narrow, offsets) in [(false, false), (true, false), (false, true), (true, true)] {
                    let scheme = Scheme { code, group, narrow, offsets, narrow_inputs: false };
                    let read = |column: usize, row: &mut QuantizedRow| {
                        *row = some_row(&scheme, depth, column);
                        column < 70
                    };
                    let order: Arc<[u32]> = (0..depth as u32).rev().collect();
                    let plain = Packed::pack_quantized(scheme, 2, depth, 2, None, &read).expect("memory");
                    let turned = Packed::pack_quantized(scheme, 2, depth, 2, Some(order), &read).expect("memory");
                    check_copies(&plain);
                    let (mut expected, mut out) = (vec![0.0; depth], vec![0.0; depth]);
                    for column in 0..2 * PANEL {
                        expected.fill(0.0);
                        if column < 70 {
                            some_row(&scheme, depth, column).widen(&scheme, &mut expected);
                        }
                        plain.column(column, &mut out);
                        assert_eq!(out, expected, "{scheme:?} depth {depth} column {column}");
                        turned.column(column, &mut out);
                        out.reverse();
                        assert_eq!(out, expected, "{scheme:?} depth {depth} column {column}, turned");
                    }
                }
            }
        }
    }
}
