//! The table of tensors: where each lies in the file, how it is shaped and how its elements are stored.

use crate::{Error, cursor::Cursor};
use std::{collections::BTreeMap, ops::Range};

/// Most dimensions a tensor may have (`GGML_MAX_DIMS`).
const MAX_DIMENSIONS: u32 = 4;

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Row-major: the last dimension is the one whose elements lie beside each other. (GGUF stores them the other way
    /// round.)
    pub shape: Vec<usize>,
    /// How elements are stored.
    pub kind: TensorType,
    /// Where in the file the elements lie.
    pub bytes: Range<usize>,
}

/// How elements are stored: one by one, or in blocks of a row that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
    /// Blocks of 32: 4 bits, a scale.
    Q4_0,
    /// Blocks of 32: 8 bits, a scale.
    Q8_0,
    /// Blocks of 256: 4 bits, eight scales and minima of 6 bits.
    Q4K,
    /// Blocks of 256: 5 bits, eight scales and minima of 6 bits.
    Q5K,
    /// Blocks of 256: 6 bits, sixteen scales of 8 bits.
    Q6K,
    /// A type that is known by name and size only.
    Other(&'static Layout),
}

/// A type's name and block.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    number: u32,
    name: &'static str,
    /// Elements of a block.
    elements: usize,
    /// Bytes of a block.
    bytes: usize,
}

/// `enum ggml_type` and the sizes of its blocks (ggml-common.h). Numbers that are missing were withdrawn.
const LAYOUTS: [Layout; 34] = {
    const fn layout(number: u32, name: &'static str, elements: usize, bytes: usize) -> Layout {
        Layout { number, name, elements, bytes }
    }
    [
        layout(0, "F32", 1, 4),
        layout(1, "F16", 1, 2),
        layout(2, "Q4_0", 32, 18),
        layout(3, "Q4_1", 32, 20),
        layout(6, "Q5_0", 32, 22),
        layout(7, "Q5_1", 32, 24),
        layout(8, "Q8_0", 32, 34),
        layout(9, "Q8_1", 32, 40),
        layout(10, "Q2_K", 256, 84),
        layout(11, "Q3_K", 256, 110),
        layout(12, "Q4_K", 256, 144),
        layout(13, "Q5_K", 256, 176),
        layout(14, "Q6_K", 256, 210),
        layout(15, "Q8_K", 256, 292),
        layout(16, "IQ2_XXS", 256, 66),
        layout(17, "IQ2_XS", 256, 74),
        layout(18, "IQ3_XXS", 256, 98),
        layout(19, "IQ1_S", 256, 50),
        layout(20, "IQ4_NL", 32, 18),
        layout(21, "IQ3_S", 256, 110),
        layout(22, "IQ2_S", 256, 82),
        layout(23, "IQ4_XS", 256, 136),
        layout(24, "I8", 1, 1),
        layout(25, "I16", 1, 2),
        layout(26, "I32", 1, 4),
        layout(27, "I64", 1, 8),
        layout(28, "F64", 1, 8),
        layout(29, "IQ1_M", 256, 56),
        layout(30, "BF16", 1, 2),
        layout(34, "TQ1_0", 256, 54),
        layout(35, "TQ2_0", 256, 66),
        layout(39, "MXFP4", 32, 17),
        layout(40, "NVFP4", 64, 36),
        layout(41, "Q1_0", 128, 18),
    ]
};

impl TensorType {
    /// The types whose elements somebody here can read.
    pub const READABLE: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q5K, Self::Q6K];

    fn of(number: u32) -> Option<Self> {
        let layout = LAYOUTS.iter().find(|layout| layout.number == number)?;
        let readable = Self::READABLE.into_iter().find(|kind| kind.number() == number);
        Some(readable.unwrap_or(Self::Other(layout)))
    }

    /// Returns the number by which files name the type.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
            Self::Other(layout) => layout.number,
        }
    }

    fn layout(self) -> &'static Layout {
        let layout = LAYOUTS.iter().find(|layout| layout.number == self.number());
        layout.expect("every type stands in the table")
    }

    /// Returns the name ggml gives it, for example `Q4_K`.
    pub fn name(self) -> &'static str {
        self.layout().name
    }

    /// Returns the elements of a row that are stored together.
    pub fn block_elements(self) -> usize {
        self.layout().elements
    }

    /// Returns the bytes that a block takes.
    pub fn block_bytes(self) -> usize {
        self.layout().bytes
    }
}

/// Takes `count` entries and checks that their tensors lie inside the file, aligned and apart from each other.
pub(crate) fn read_table<'a>(
    cursor: &mut Cursor<'a>,
    count: u64,
    alignment: usize,
) -> Result<BTreeMap<&'a str, Tensor>, Error> {
    /// A name's length, the number of dimensions, a type and an offset.
    const LEAST_BYTES: u64 = 8 + 4 + 4 + 8;
    cursor.check_room("tensor_count", count, LEAST_BYTES)?;
    let mut tensors = BTreeMap::new();
    for index in 0..count {
        let name = cursor.name(&format_args!("the name of tensor {index}"))?;
        let tensor = read_entry(cursor, name, alignment)?;
        if tensors.insert(name, tensor).is_some() {
            return Err(Error::invalid(format!("tensor `{name}` is there twice")));
        }
    }
    place(&mut tensors, cursor.position().next_multiple_of(alignment as u64), cursor.file_bytes())?;
    Ok(tensors)
}

/// Takes one entry. Its bytes still count from the beginning of the data.
fn read_entry(cursor: &mut Cursor<'_>, name: &str, alignment: usize) -> Result<Tensor, Error> {
    let what = format_args!("the entry of tensor `{name}`");
    let invalid = |problem: String| Error::invalid(format!("tensor `{name}` {problem}"));
    let dimensions = cursor.u32(&what)?;
    if dimensions > MAX_DIMENSIONS {
        return Err(invalid(format!("has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}")));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(cursor.u64(&what)?);
    }
    shape.reverse();
    let number = cursor.u32(&what)?;
    let offset = cursor.u64(&what)?;

    let kind = TensorType::of(number).ok_or_else(|| invalid(format!("has type {number}, which is not known")))?;
    let sizes: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok().filter(|&s| s > 0)).collect();
    let elements = sizes.as_ref().and_then(|sizes| sizes.iter().try_fold(1_usize, |all, &size| all.checked_mul(size)));
    let (Some(sizes), Some(elements)) = (sizes, elements) else {
        return Err(invalid(format!("has shape {shape:?}, which no tensor can have")));
    };
    let columns = sizes.last().copied().unwrap_or(1);
    if !columns.is_multiple_of(kind.block_elements()) {
        let (kind, block) = (kind.name(), kind.block_elements());
        return Err(invalid(format!("has rows of {columns}, which {kind} cannot cut into blocks of {block}")));
    }
    if !offset.is_multiple_of(alignment as u64) {
        return Err(invalid(format!("has offset {offset}, which is not a multiple of the alignment, {alignment}")));
    }
    let bytes = (elements / kind.block_elements()).checked_mul(kind.block_bytes());
    let start = usize::try_from(offset).ok();
    let range = start.zip(bytes).and_then(|(start, bytes)| Some(start..start.checked_add(bytes)?));
    let bytes = range.ok_or_else(|| invalid(format!("has offset {offset} and shape {sizes:?}, beyond any file")))?;
    Ok(Tensor { shape: sizes, kind, bytes })
}

/// Moves all tensors to where they are in the file: the data begins at `data`.
fn place(tensors: &mut BTreeMap<&str, Tensor>, data: u64, file_bytes: u64) -> Result<(), Error> {
    for (name, tensor) in tensors.iter_mut() {
        let end = data.checked_add(tensor.bytes.end as u64).filter(|&end| end <= file_bytes);
        let Some(end) = end.and_then(|end| usize::try_from(end).ok()) else {
            let (start, size) = (data.saturating_add(tensor.bytes.start as u64), tensor.bytes.len());
            let problem =
                format!("truncated: tensor `{name}` takes {size} bytes from {start}, the file has {file_bytes}");
            return Err(Error::Invalid(problem));
        };
        tensor.bytes = end - tensor.bytes.len()..end;
    }
    let mut order: Vec<_> = tensors.iter().map(|(name, tensor)| (&tensor.bytes, *name)).collect();
    order.sort_by_key(|(bytes, _)| bytes.start);
    for pair in order.windows(2) {
        let ((before, first), (after, second)) = (&pair[0], &pair[1]);
        if after.start < before.end {
            return Err(Error::invalid(format!("tensors `{first}` and `{second}` overlap at byte {}", after.start)));
        }
    }
    Ok(())
}
