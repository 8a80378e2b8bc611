//! GGUF files: one file that holds a model's settings, its tokenizer and its weights, as llama.cpp writes it.
//!
//! This crate reads the container and nothing else: the header, the metadata and the table of tensors. What the keys mean is the
//! reader's business: the engine's for shapes and weights, the router's for tokens and templates. Format: `docs/gguf.md` of
//! ggml; versions 2 and 3, little-endian.
//!
//! A file is input from outside. Nothing is allocated by a length the file claims: every length is compared with the bytes
//! that are left, arrays are walked once and then read in place, and tensors are ranges that were checked to lie inside the
//! file, aligned and apart from each other. candle's `gguf_file` (0.11.1) checks lengths too, but lets the last of two tensors
//! of one name win, accepts tensors that overlap, rewrites text that is not UTF-8, and would bring tensors to the router.

#![forbid(unsafe_code)]

mod cursor;
mod ends;
mod tensor;
mod value;
mod writer;

use cursor::Cursor;
use std::collections::{BTreeMap, BTreeSet};
pub use tensor::{Tensor, TensorType};
pub use value::{Array, Elements, Value};
pub use writer::Writer;

/// Why a file cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The bytes given end before the table of tensors does, but the file goes on: try again with more of it.
    #[error("the header is longer than the {0} bytes read of it")]
    Incomplete(usize),
    /// The file is not what it should be; the text names the key or tensor, what is there and what was expected.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    fn invalid(problem: impl Into<String>) -> Self {
        Self::Invalid(problem.into())
    }
}

/// What stands before the weights: metadata by key and tensors by name. Borrows from the bytes it was parsed from.
#[derive(Clone, Debug)]
pub struct File<'a> {
    metadata: BTreeMap<&'a str, Value<'a>>,
    tensors: BTreeMap<&'a str, Tensor>,
    header: &'a [u8],
}

/// Bytes that tensors start at multiples of, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;

impl<'a> File<'a> {
    /// Parses the beginning of a file of `file_bytes` bytes. `bytes` is the whole file or enough of it: the weights
    /// themselves are not looked at.
    ///
    /// # Errors
    /// [`Error::Incomplete`] asks for more of the file, [`Error::Invalid`] says what is wrong with it.
    pub fn parse(bytes: &'a [u8], file_bytes: u64) -> Result<Self, Error> {
        let mut cursor = Cursor::new(bytes, file_bytes);
        check_version(&mut cursor)?;
        let tensors = cursor.u64("tensor_count")?;
        let entries = cursor.u64("metadata_kv_count")?;

        let metadata = read_metadata(&mut cursor, entries)?;
        let alignment = alignment(&metadata)?;
        let tensors = tensor::read_table(&mut cursor, tensors, alignment)?;
        Ok(Self { metadata, tensors, header: &bytes[..cursor.position() as usize] })
    }

    /// Returns the bytes of all that was parsed.
    pub fn header(&self) -> &'a [u8] {
        self.header
    }

    /// Returns the value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.metadata.get(key).copied()
    }

    /// Returns the text under `key`.
    ///
    /// # Errors
    /// When there is something else under it, or bytes that are not UTF-8.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "text", |value| value.as_str())
    }

    /// Returns the whole number under `key`, which must not be negative.
    ///
    /// # Errors
    /// When there is something else under it.
    pub fn count(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number of 0 or more", |value| value.as_count())
    }

    /// Returns the number under `key`, whole or not.
    ///
    /// # Errors
    /// When there is something else under it.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |value| value.as_number())
    }

    /// Returns the truth value under `key`.
    ///
    /// # Errors
    /// When there is something else under it.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// Returns the array under `key`.
    ///
    /// # Errors
    /// When there is something else under it.
    pub fn array(&self, key: &str) -> Result<Option<Array<'a>>, Error> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::invalid(format!("metadata `{key}` is {value}, expected {expected}"))),
        }
    }

    /// Returns the tokens that end a sequence: those the file names, and those whose text says so. Files name one or two, while
    /// models were trained to end a turn, a message for a tool or a document with different ones.
    ///
    /// # Errors
    /// When a key holds something else than what it should.
    pub fn end_tokens(&self) -> Result<BTreeSet<u32>, Error> {
        ends::end_tokens(self)
    }

    /// Returns all metadata in the order of keys.
    pub fn metadata(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> {
        self.metadata.iter().map(|(key, value)| (*key, *value))
    }

    /// Returns all tensors in the order of names.
    pub fn tensors(&self) -> impl Iterator<Item = (&'a str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor))
    }

    /// Returns the tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }
}

fn check_version(cursor: &mut Cursor<'_>) -> Result<(), Error> {
    let magic = cursor.take(4, "the magic")?;
    if magic != b"GGUF" {
        return Err(Error::invalid(format!("not a GGUF file: it begins with {}, expected GGUF", magic.escape_ascii())));
    }
    match cursor.u32("the version")? {
        2 | 3 => Ok(()),
        version if (1..=3).contains(&version.swap_bytes()) => {
            Err(Error::invalid("a big-endian file; expected little-endian"))
        }
        version => Err(Error::invalid(format!("version {version} is not supported; known: 2, 3"))),
    }
}

fn read_metadata<'a>(cursor: &mut Cursor<'a>, entries: u64) -> Result<BTreeMap<&'a str, Value<'a>>, Error> {
    /// A key's length, its type and a value of one byte.
    const LEAST_BYTES: u64 = 8 + 4 + 1;
    cursor.check_room("metadata_kv_count", entries, LEAST_BYTES)?;
    let mut metadata = BTreeMap::new();
    for entry in 0..entries {
        let key = cursor.name(&format_args!("metadata key {entry}"))?;
        let value = Value::read(cursor, key)?;
        if metadata.insert(key, value).is_some() {
            return Err(Error::invalid(format!("metadata `{key}` is there twice")));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<&str, Value<'_>>) -> Result<usize, Error> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    let alignment =
        value.as_count().and_then(|count| u32::try_from(count).ok()).filter(|count| count.is_power_of_two());
    match alignment {
        Some(alignment) => Ok(alignment as usize),
        None => Err(Error::invalid(format!("metadata `general.alignment` is {value}, expected a power of two"))),
    }
}

#[cfg(test)]
mod tests;
