//! Writes files: what tests and fuzzing start from.

use crate::TensorType;

const ALIGNMENT: usize = 32;

/// A file in the making, version 3. Keys and tensors are written as they come; nothing is checked.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<u8>,
    entries: u64,
    table: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

impl Writer {
    /// Adds a text.
    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key, 8);
        write_text(&mut self.metadata, value);
        self
    }

    /// Adds a whole number.
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
        self
    }

    /// Adds a float.
    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
        self
    }

    /// Adds a truth value.
    pub fn flag(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key, 7);
        self.metadata.push(value.into());
        self
    }

    /// Adds an array of texts.
    pub fn texts(&mut self, key: &str, values: &[impl AsRef<str>]) -> &mut Self {
        self.array(key, 8, values.len());
        values.iter().for_each(|value| write_text(&mut self.metadata, value.as_ref()));
        self
    }

    /// Adds an array of whole numbers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        self.array(key, 5, values.len());
        values.iter().for_each(|value| self.metadata.extend(value.to_le_bytes()));
        self
    }

    /// Adds an array of floats.
    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        self.array(key, 6, values.len());
        values.iter().for_each(|value| self.metadata.extend(value.to_le_bytes()));
        self
    }

    /// Adds a tensor whose `shape` is row-major.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: TensorType, bytes: &[u8]) -> &mut Self {
        write_text(&mut self.table, name);
        self.table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&size| self.table.extend((size as u64).to_le_bytes()));
        self.table.extend(kind.number().to_le_bytes());
        self.table.extend((self.data.len() as u64).to_le_bytes());
        self.tensors += 1;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self
    }

    /// Returns the file.
    pub fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.entries.to_le_bytes());
        file.extend(&self.metadata);
        file.extend(&self.table);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&self.data);
        file
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.entries += 1;
        write_text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    fn array(&mut self, key: &str, kind: u32, count: usize) {
        self.key(key, 9);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend((count as u64).to_le_bytes());
    }
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
