//! Weights in the order in which kernels read them.
//!
//! A matrix `[columns][depth]` (one row of the checkpoint for each output) becomes *panels* of 64 outputs. A panel holds, for
//! each step along the depth, its 64 outputs side by side: one element each for f32 and f16 (`[depth][64]`), a pair of
//! neighbours for bf16 (`[depth / 2][64][2]`, the operand of `vdpbf16ps`). A kernel reads a panel from front to back, whatever
//! its vectors' width, so one packing serves every instruction set. Missing columns are zero, and so is what bf16 panels have
//! beyond the depth, up to a whole step of the tile unit.

use crate::{Error, cpu::buffer::Buffer, model::checkpoint::ElementType};

/// Outputs of a panel.
pub(crate) const PANEL: usize = 64;

/// A packed weight matrix.
#[derive(Debug)]
pub(crate) struct Packed {
    dtype: ElementType,
    depth: usize,
    panels: usize,
    buffer: Buffer,
}

/// A stored row of weights: its elements along the depth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredRow<'a> {
    pub(crate) dtype: ElementType,
    pub(crate) bytes: &'a [u8],
}

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

    /// Makes a matrix of zeros.
    pub(crate) fn zeroed(dtype: ElementType, panels: usize, depth: usize) -> Result<Self, Error> {
        Ok(Self { dtype, depth, panels, buffer: Buffer::new(panels * panel_bytes(dtype, depth))? })
    }

    /// Calls `fill` with the bytes of every panel, on `threads` threads.
    pub(crate) fn for_each_panel(&mut self, threads: usize, fill: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        let mut panels: Vec<(usize, &mut [u8])> =
            self.buffer.bytes_mut().chunks_exact_mut(panel_bytes(self.dtype, self.depth)).enumerate().collect();
        // Panels are large: with less than a few for each thread, starting threads would cost more than it saves.
        if threads < 2 || panels.len() * self.depth < 1 << 16 {
            panels.iter_mut().for_each(|(index, bytes)| fill(*index, bytes));
            return;
        }
        let each = panels.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for share in panels.chunks_mut(each) {
                scope.spawn(move || share.iter_mut().for_each(|(index, bytes)| fill(*index, bytes)));
            }
        });
    }

    /// Returns the element type.
    pub(crate) fn dtype(&self) -> ElementType {
        self.dtype
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
        panel_bytes(self.dtype, self.depth)
    }

    /// Returns the start of `panel`, aligned to 64 bytes.
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.panels, "panel {panel} of {}", self.panels);
        let offset = panel * panel_bytes(self.dtype, self.depth);
        // SAFETY: the panel lies in the buffer, as just checked.
        unsafe { self.buffer.as_ptr().add(offset) }
    }

    /// Copies one column, that is one stored row, to `out` as f32: how a tied embedding is looked up.
    pub(crate) fn column(&self, column: usize, out: &mut [f32]) {
        assert!(column < self.panels * PANEL && out.len() == self.depth, "column {column} of {self:?}");
        let step = step(self.dtype);
        let base = (column / PANEL) * panel_bytes(self.dtype, self.depth);
        // SAFETY: the buffer holds `len` initialised bytes and is not written while shared.
        let bytes = unsafe { std::slice::from_raw_parts(self.buffer.as_ptr(), self.buffer.len()) };
        for (index, out) in out.iter_mut().enumerate() {
            let element = (index / step * PANEL + column % PANEL) * step + index % step;
            *out = self.dtype.get(&bytes[base..], element);
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

fn panel_bytes(dtype: ElementType, depth: usize) -> usize {
    let whole = match dtype {
        ElementType::Bf16 => depth.next_multiple_of(32),
        ElementType::F32 | ElementType::F16 => depth,
    };
    whole * PANEL * dtype.bytes()
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
}
