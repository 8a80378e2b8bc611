//! The tensors of a Hugging Face directory, mapped: one `model.safetensors`, or shards and their index. Or those of a GGUF file,
//! under the same names.
//!
//! Files are mapped only while a model is loaded. Whatever is wrong with them is found here and named: the file, the tensor,
//! what was expected and what is there.

use crate::{
    Error,
    model::gguf::{Names, blocks::Blocks, slice_name},
};
use ::gguf::TensorType;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::SafeTensorError};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    marker::PhantomData,
    ops::Range,
    path::{Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Of one layer, in a GGUF file.
const MAX_EXPERTS: usize = 4096;

/// Element type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
}

impl ElementType {
    /// Returns the type of floats that safetensors calls `dtype`, if it is one.
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(ElementType::F32),
            Dtype::F16 => Some(ElementType::F16),
            Dtype::BF16 => Some(ElementType::Bf16),
            _ => None,
        }
    }

    /// Returns the size of one element in bytes.
    pub(crate) fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
        }
    }

    /// Returns the name people use.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::F16 => "f16",
            ElementType::Bf16 => "bf16",
        }
    }

    /// Returns the nearest number of the type.
    pub(crate) fn round(self, value: f32) -> f32 {
        match self {
            ElementType::F32 => value,
            ElementType::F16 => half::f16::from_f32(value).to_f32(),
            ElementType::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// Reads element `index` of `bytes`, little-endian.
    pub(crate) fn get(self, bytes: &[u8], index: usize) -> f32 {
        let at = index * self.bytes();
        match self {
            ElementType::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
            ElementType::F16 => half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            ElementType::Bf16 => half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        }
    }
}

/// A tensor as it lies in its file: row-major, little-endian, at any alignment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: ElementType,
    pub(crate) bytes: &'a [u8],
    /// The rows of a head, if its two halves are stored row by row in turn.
    pub(crate) turned_rows: Option<usize>,
}

/// Returns where row `row` is stored.
pub(crate) fn stored_row(row: usize, turned_rows: Option<usize>) -> usize {
    let Some(rows) = turned_rows else { return row };
    let (head, row) = (row / rows, row % rows);
    head * rows + row % (rows / 2) * 2 + row / (rows / 2)
}

impl<'a> Tensor<'a> {
    /// Returns row `row` of a matrix with `columns` columns.
    pub(crate) fn row(&self, row: usize, columns: usize) -> &'a [u8] {
        let stride = columns * self.dtype.bytes();
        &self.bytes[stored_row(row, self.turned_rows) * stride..][..stride]
    }

    /// Returns the first element that is infinite or no number, and where it is.
    pub(crate) fn first_not_finite(self) -> Option<(usize, f32)> {
        let at = match self.dtype {
            ElementType::F32 => {
                let exponent = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes) & 0x7f80_0000 == 0x7f80_0000;
                self.bytes.as_chunks().0.iter().position(exponent)
            }
            ElementType::F16 => {
                let exponent = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & 0x7c00 == 0x7c00;
                self.bytes.as_chunks().0.iter().position(exponent)
            }
            ElementType::Bf16 => {
                let exponent = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & 0x7f80 == 0x7f80;
                self.bytes.as_chunks().0.iter().position(exponent)
            }
        }?;
        Some((at, self.dtype.get(self.bytes, at)))
    }

    /// Returns the elements as f32.
    pub(crate) fn to_f32(self) -> Vec<f32> {
        let count = self.bytes.len() / self.dtype.bytes();
        (0..count).map(|index| self.dtype.get(self.bytes, stored_row(index, self.turned_rows))).collect()
    }
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
    /// How elements are stored in blocks, which `dtype` then has no name for.
    blocks: Option<TensorType>,
}

impl Entry {
    fn type_name(&self) -> String {
        self.blocks.map_or_else(|| format!("{:?}", self.dtype), |kind| kind.name().to_owned())
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// All tensors of a directory by name.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    /// The file in which the index promises a tensor; empty without an index.
    promised: BTreeMap<String, String>,
    /// How a GGUF file calls its tensors.
    names: Option<Names>,
}

impl Checkpoint {
    /// Maps the safetensors files of `dir` and reads their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let mut checkpoint = Self::empty(dir);
        let index = dir.join(INDEX);
        if index.exists() {
            checkpoint.promised = read_index(&index)?;
            let files: BTreeSet<String> = checkpoint.promised.values().cloned().collect();
            for file in files {
                checkpoint.add(&dir.join(file))?;
            }
        } else if dir.join(SINGLE).exists() {
            checkpoint.add(&dir.join(SINGLE))?;
        } else {
            return Err(Error::checkpoint(dir, format!("holds neither {SINGLE} nor {INDEX}")));
        }
        Ok(checkpoint)
    }

    /// Takes the tensors of a GGUF file, of which `map` is the contents.
    pub(crate) fn of_gguf(
        path: &Path,
        map: Mmap,
        tensors: Vec<(String, ::gguf::Tensor)>,
        names: Names,
    ) -> Result<Self, Error> {
        let mut checkpoint = Self { names: Some(names), ..Self::empty(path) };
        for (name, tensor) in tensors {
            let (dtype, blocks) = match tensor.kind {
                TensorType::F32 => (Dtype::F32, None),
                TensorType::F16 => (Dtype::F16, None),
                TensorType::Bf16 => (Dtype::BF16, None),
                kind => (Dtype::U8, Some(kind)),
            };
            let entry = |shape: &[usize], bytes| Entry { file: 0, dtype, shape: shape.to_vec(), bytes, blocks };
            let [experts, matrix @ ..] = &tensor.shape[..] else { continue };
            if matrix.len() < 2 {
                checkpoint.entries.insert(name, entry(&tensor.shape, tensor.bytes));
                continue;
            }
            if *experts > MAX_EXPERTS {
                let problem = format!("tensor `{name}` has {experts} experts, expected at most {MAX_EXPERTS}");
                return Err(Error::checkpoint(path, problem));
            }
            let each = tensor.bytes.len() / experts;
            for expert in 0..*experts {
                let start = tensor.bytes.start + expert * each;
                checkpoint.entries.insert(slice_name(&name, expert), entry(matrix, start..start + each));
            }
        }
        checkpoint.shards.push(Shard { path: path.to_owned(), map });
        Ok(checkpoint)
    }

    fn empty(path: &Path) -> Self {
        Self {
            dir: path.to_owned(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            promised: BTreeMap::new(),
            names: None,
        }
    }

    /// Maps one safetensors file.
    pub(crate) fn open_file(path: &Path) -> Result<Self, Error> {
        let mut checkpoint = Self::empty(path.parent().unwrap_or(Path::new("")));
        checkpoint.add(path)?;
        Ok(checkpoint)
    }

    /// Returns the names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.entries.keys()
    }

    fn add(&mut self, path: &Path) -> Result<(), Error> {
        let file = File::open(path).map_err(|error| Error::checkpoint(path, error))?;
        // SAFETY: the map is read-only and lives only while the model loads; a checkpoint that is rewritten in place in that
        // time is the operator's mistake, which no reader of mapped files can guard against.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::checkpoint(path, error))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| Error::checkpoint(path, explain(&map, &error)))?;
        let data = header + 8;
        if let Err(error) = serde_json::from_slice::<Unique<IgnoredAny>>(&map[8..data]) {
            return Err(Error::checkpoint(path, format!("header: {error}")));
        }
        for (name, info) in metadata.tensors() {
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let file = self.shards.len();
            let entry = Entry { file, dtype: info.dtype, shape: info.shape.clone(), bytes, blocks: None };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let other = self.shards[other.file].path.display();
                return Err(Error::checkpoint(path, format!("tensor `{name}` is in {other} as well")));
            }
        }
        self.shards.push(Shard { path: path.to_owned(), map });
        Ok(())
    }

    /// Returns the bytes of all tensors.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Returns the type of all matrices, or f32, which holds any, when they differ or are stored in blocks.
    pub(crate) fn matrix_dtype(&self) -> ElementType {
        if self.entries.values().any(|entry| entry.blocks.is_some()) {
            return ElementType::F32;
        }
        let matrices = self.entries.values().filter(|entry| entry.shape.len() > 1);
        let mut dtypes = matrices.filter_map(|entry| ElementType::of(entry.dtype));
        let first = dtypes.next().unwrap_or(ElementType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { ElementType::F32 }
    }

    /// Says for people in which blocks most bytes are stored, if any are.
    pub(crate) fn blocks_name(&self) -> Option<&'static str> {
        let mut bytes: BTreeMap<&'static str, usize> = BTreeMap::new();
        for entry in self.entries.values() {
            if let Some(kind) = entry.blocks {
                *bytes.entry(kind.name()).or_default() += entry.bytes.len();
            }
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(name, _)| name)
    }

    /// Says whether there is a tensor `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        let name = &*self.stored(name);
        self.entries.contains_key(name) || self.promised.contains_key(name)
    }

    /// Returns the tensor `name`, which must have `shape`.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, Error> {
        let entry = self.shaped(name, shape)?;
        let shard = &self.shards[entry.file];
        let Some(dtype) = ElementType::of(entry.dtype) else {
            let problem =
                format!("tensor `{}` has type {}, expected F32, F16 or BF16", self.stored(name), entry.type_name());
            return Err(Error::checkpoint(&shard.path, problem));
        };
        Ok(Tensor { dtype, bytes: &shard.map[entry.bytes.clone()], turned_rows: self.turned_rows(name) })
    }

    /// Returns the matrix `name`, which must have `shape`, if it is stored in blocks.
    pub(crate) fn blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<Blocks<'_>>, Error> {
        let entry = self.shaped(name, &shape)?;
        let Some(kind) = entry.blocks else { return Ok(None) };
        let shard = &self.shards[entry.file];
        let blocks = Blocks::new(kind, &shard.map[entry.bytes.clone()], shape[1], self.turned_rows(name));
        let blocks = blocks
            .map_err(|problem| Error::checkpoint(&shard.path, format!("tensor `{}` {problem}", self.stored(name))))?;
        Ok(Some(blocks))
    }

    /// Returns the entry of `name`, which must have `shape`.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<&Entry, Error> {
        let name = &*self.stored(name);
        let Some(entry) = self.entries.get(name) else {
            return Err(self.missing(name));
        };
        if entry.shape != shape {
            let problem = format!("tensor `{name}` has shape {:?}, expected {shape:?}", entry.shape);
            return Err(Error::checkpoint(&self.shards[entry.file].path, problem));
        }
        Ok(entry)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(&*self.stored(name))
    }

    /// Returns what the files call `name`.
    fn stored<'a>(&self, name: &'a str) -> Cow<'a, str> {
        match &self.names {
            Some(names) => names.stored(name).into(),
            None => name.into(),
        }
    }

    fn turned_rows(&self, name: &str) -> Option<usize> {
        self.names.as_ref()?.turned_rows(name)
    }

    /// Returns the file that holds the tensor `name`, if one does.
    pub(crate) fn file_of(&self, name: &str) -> Option<&Path> {
        self.entry(name).map(|entry| self.shards[entry.file].path.as_path())
    }

    /// Returns type and shape of the tensor `name`, if there is one.
    pub(crate) fn find(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.entry(name).map(|entry| (entry.dtype, &entry.shape[..]))
    }

    /// Returns the bytes that tensor `name` takes, if there is one.
    pub(crate) fn stored_bytes(&self, name: &str) -> Option<usize> {
        self.entry(name).map(|entry| entry.bytes.len())
    }

    /// Returns the bytes of the tensor `name`, which must have `dtype` and `shape`.
    pub(crate) fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], Error> {
        let Some(entry) = self.entry(name) else {
            return Err(self.missing(name));
        };
        if entry.shape != shape {
            return Err(self.fault(name, &format!("shape {:?}, expected {shape:?}", entry.shape)));
        }
        if entry.dtype != dtype {
            return Err(self.fault(name, &format!("type {:?}, expected {dtype:?}", entry.dtype)));
        }
        Ok(&self.shards[entry.file].map[entry.bytes.clone()])
    }

    /// Returns an error about the tensor `name`, which must exist to be at fault.
    pub(crate) fn fault(&self, name: &str, problem: &str) -> Error {
        let path = self.entry(name).map_or(&self.dir, |entry| &self.shards[entry.file].path);
        Error::checkpoint(path, format!("tensor `{name}`: {problem}"))
    }

    /// Returns an error about what `config.json` says of the tensors.
    pub(crate) fn config_fault(&self, problem: &str) -> Error {
        Error::checkpoint(&self.dir.join("config.json"), problem)
    }

    /// Gives the memory of mapped pages back; what is read again comes from the file again.
    pub(crate) fn release(&self) {
        for shard in &self.shards {
            // A system that keeps the pages costs memory for a while, and nothing else.
            #[cfg(unix)]
            // SAFETY: the map is shared with the file and never written, so a page that is dropped reads the same again.
            let _ = unsafe { shard.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    fn missing(&self, name: &str) -> Error {
        if let Some(file) = self.promised.get(name) {
            let problem = format!("tensor `{name}` is missing, and {INDEX} says it is in this file");
            return Error::checkpoint(&self.dir.join(file), problem);
        }
        let path = match &self.shards[..] {
            [single] => single.path.clone(),
            _ => self.dir.join(INDEX),
        };
        Error::checkpoint(&path, format!("tensor `{name}` is missing; the file names {} tensors", self.entries.len()))
    }

    /// Names the contents: the configuration, every tensor's name, type and shape, and samples of its bytes.
    ///
    /// Two checkpoints of one shape differ in almost every element, so 16 samples of each tensor tell them apart without
    /// reading gigabytes before the first request.
    pub(crate) fn fingerprint(&self, config: &[u8]) -> String {
        const SAMPLES: usize = 16;
        const SAMPLE_BYTES: usize = 64;
        let mut hasher = blake3::Hasher::new_derive_key("baton model fingerprint v1");
        hasher.update(&(config.len() as u64).to_le_bytes());
        hasher.update(config);
        for (name, entry) in &self.entries {
            hasher.update(format!("{name}\0{}\0{:?}\0", entry.type_name(), entry.shape).as_bytes());
            let bytes = &self.shards[entry.file].map[entry.bytes.clone()];
            let last = bytes.len().saturating_sub(SAMPLE_BYTES);
            for sample in 0..SAMPLES {
                let start = last * sample / (SAMPLES - 1);
                hasher.update(&bytes[start..bytes.len().min(start + SAMPLE_BYTES)]);
            }
        }
        hasher.finalize().to_hex()[..32].to_owned()
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// A JSON object in which no name stands twice: most readers take the last one and say nothing.
struct Unique<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = BTreeMap<String, T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = access.next_key::<String>()? {
                    if entries.contains_key(&name) {
                        return Err(de::Error::custom(format!("`{name}` stands there twice")));
                    }
                    let value = access.next_value()?;
                    entries.insert(name, value);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData)).map(Self)
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = std::fs::read(path).map_err(|error| Error::checkpoint(path, error))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(path, error))?;
    // Shards lie beside the index; a name that leads elsewhere is not one.
    let Unique(weight_map) = index.weight_map;
    if let Some(file) = weight_map.values().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
        return Err(Error::checkpoint(path, format!("weight_map: `{file}` is not a file name")));
    }
    Ok(weight_map)
}

/// Says what is wrong with a file that cannot be read, in bytes where that is what is wrong.
fn explain(file: &[u8], error: &SafeTensorError) -> String {
    let found = file.len();
    let header = file.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    match (error, header) {
        (SafeTensorError::HeaderTooSmall, _) => format!("truncated: {found} bytes, expected a safetensors header"),
        (SafeTensorError::InvalidHeaderLength, Some(header)) => {
            format!("truncated: {found} bytes, expected a header of {header} bytes and tensors after it")
        }
        (SafeTensorError::MetadataIncompleteBuffer, Some(header)) => match promised_bytes(file, header as usize) {
            Some(expected) if found < expected => format!("truncated: {found} bytes, expected {expected}"),
            Some(expected) => format!("{found} bytes, expected {expected}: the header does not describe all of it"),
            None => error.to_string(),
        },
        _ => format!("not a safetensors file: {error}"),
    }
}

/// Returns the length of the file that its header describes.
fn promised_bytes(file: &[u8], header: usize) -> Option<usize> {
    let json: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(file.get(8..header.checked_add(8)?)?).ok()?;
    let ends = json.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    8_usize.checked_add(header)?.checked_add(usize::try_from(ends.max()?).ok()?)
}
