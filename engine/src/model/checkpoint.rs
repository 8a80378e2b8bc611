//! The tensors of a Hugging Face directory, mapped: one `model.safetensors`, or shards and their index.
//!
//! Files are mapped only while a model is loaded. Whatever is wrong with them is found here and named: the file, the tensor,
//! what was expected and what is there.

use crate::Error;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::SafeTensorError};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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
}

impl<'a> Tensor<'a> {
    /// Returns row `row` of a matrix with `columns` columns.
    pub(crate) fn row(&self, row: usize, columns: usize) -> &'a [u8] {
        let stride = columns * self.dtype.bytes();
        &self.bytes[row * stride..][..stride]
    }

    /// Returns the elements as f32.
    pub(crate) fn to_f32(self) -> Vec<f32> {
        let count = self.bytes.len() / self.dtype.bytes();
        (0..count).map(|index| self.dtype.get(self.bytes, index)).collect()
    }
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
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
}

impl Checkpoint {
    /// Maps the safetensors files of `dir` and reads their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let mut checkpoint =
            Self { dir: dir.to_owned(), shards: Vec::new(), entries: BTreeMap::new(), promised: BTreeMap::new() };
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

    fn add(&mut self, path: &Path) -> Result<(), Error> {
        let file = File::open(path).map_err(|error| Error::checkpoint(path, error))?;
        // SAFETY: the map is read-only and lives only while the model loads; a checkpoint that is rewritten in place in that
        // time is the operator's mistake, which no reader of mapped files can guard against.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::checkpoint(path, error))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| Error::checkpoint(path, explain(&map, &error)))?;
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry { file: self.shards.len(), dtype: info.dtype, shape: info.shape.clone(), bytes };
            self.entries.insert(name, entry);
        }
        self.shards.push(Shard { path: path.to_owned(), map });
        Ok(())
    }

    /// Returns the bytes of all tensors.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Returns the tensor `name`, which must have `shape`.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, Error> {
        let Some(entry) = self.entries.get(name) else {
            return Err(self.missing(name));
        };
        let shard = &self.shards[entry.file];
        if entry.shape != shape {
            let problem = format!("tensor `{name}` has shape {:?}, expected {shape:?}", entry.shape);
            return Err(Error::checkpoint(&shard.path, problem));
        }
        let dtype = match entry.dtype {
            Dtype::F32 => ElementType::F32,
            Dtype::F16 => ElementType::F16,
            Dtype::BF16 => ElementType::Bf16,
            other => {
                let problem = format!("tensor `{name}` has type {other:?}, expected F32, F16 or BF16");
                return Err(Error::checkpoint(&shard.path, problem));
            }
        };
        Ok(Tensor { dtype, bytes: &shard.map[entry.bytes.clone()] })
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
            hasher.update(format!("{name}\0{:?}\0{:?}\0", entry.dtype, entry.shape).as_bytes());
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
    weight_map: BTreeMap<String, String>,
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = std::fs::read(path).map_err(|error| Error::checkpoint(path, error))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(path, error))?;
    // Shards lie beside the index; a name that leads elsewhere is not one.
    if let Some(file) = index.weight_map.values().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
        return Err(Error::checkpoint(path, format!("weight_map: `{file}` is not a file name")));
    }
    Ok(index.weight_map)
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
    let json: BTreeMap<String, serde_json::Value> = serde_json::from_slice(file.get(8..8 + header)?).ok()?;
    let ends = json.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    Some(8 + header + ends.max()? as usize)
}
