//! Values of the metadata.

use crate::{Error, cursor::Cursor};
use std::fmt;

/// Arrays within arrays deeper than this are refused; no writer nests at all.
const MAX_DEPTH: usize = 4;

/// One value. Numbers are widened: which width a writer chose says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// An unsigned integer of 8 to 64 bits.
    Unsigned(u64),
    /// A signed integer of 8 to 64 bits.
    Signed(i64),
    /// A float of 32 or 64 bits.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text as stored: UTF-8 if the writer kept to the format.
    Text(&'a [u8]),
    /// Values of one type.
    Array(Array<'a>),
}

/// Values of one type, read where they lie: an array of a few million tokens costs nothing until it is walked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    kind: Kind,
    count: usize,
    /// Walked once when the file was parsed.
    bytes: &'a [u8],
}

/// How a value is stored, numbered as in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

const KINDS: [Kind; 13] = [
    Kind::U8,
    Kind::I8,
    Kind::U16,
    Kind::I16,
    Kind::U32,
    Kind::I32,
    Kind::F32,
    Kind::Bool,
    Kind::Text,
    Kind::Array,
    Kind::U64,
    Kind::I64,
    Kind::F64,
];

impl Kind {
    fn read(cursor: &mut Cursor<'_>, key: &str) -> Result<Self, Error> {
        let number = cursor.u32(key)?;
        let kind = KINDS.get(number as usize).copied();
        kind.ok_or_else(|| Error::invalid(format!("metadata `{key}` has type {number}, known are 0 to 12")))
    }

    /// Returns the bytes of one value, which for text and arrays are the least it can have.
    fn bytes(self) -> u64 {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::Text | Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::Array => 12,
        }
    }
}

impl<'a> Value<'a> {
    /// Takes the type and the value of `key`.
    pub(crate) fn read(cursor: &mut Cursor<'a>, key: &str) -> Result<Self, Error> {
        let kind = Kind::read(cursor, key)?;
        Self::read_as(kind, cursor, key, 0)
    }

    fn read_as(kind: Kind, cursor: &mut Cursor<'a>, key: &str, depth: usize) -> Result<Self, Error> {
        Ok(match kind {
            Kind::U8 => Self::Unsigned(u8::from_le_bytes(cursor.array(key)?).into()),
            Kind::I8 => Self::Signed(i8::from_le_bytes(cursor.array(key)?).into()),
            Kind::U16 => Self::Unsigned(u16::from_le_bytes(cursor.array(key)?).into()),
            Kind::I16 => Self::Signed(i16::from_le_bytes(cursor.array(key)?).into()),
            Kind::U32 => Self::Unsigned(u32::from_le_bytes(cursor.array(key)?).into()),
            Kind::I32 => Self::Signed(i32::from_le_bytes(cursor.array(key)?).into()),
            Kind::U64 => Self::Unsigned(u64::from_le_bytes(cursor.array(key)?)),
            Kind::I64 => Self::Signed(i64::from_le_bytes(cursor.array(key)?)),
            Kind::F32 => Self::Float(f32::from_le_bytes(cursor.array(key)?).into()),
            Kind::F64 => Self::Float(f64::from_le_bytes(cursor.array(key)?)),
            Kind::Bool => Self::Bool(cursor.array::<1>(key)? != [0]),
            Kind::Text => Self::Text(cursor.text(key)?),
            Kind::Array => Self::Array(Array::read(cursor, key, depth + 1)?),
        })
    }

    /// Returns a text that is UTF-8.
    pub fn as_str(self) -> Option<&'a str> {
        match self {
            Self::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Returns a whole number that is not negative.
    pub fn as_count(self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(number),
            Self::Signed(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// Returns a number, whole or not.
    pub fn as_number(self) -> Option<f64> {
        match self {
            Self::Unsigned(number) => Some(number as f64),
            Self::Signed(number) => Some(number as f64),
            Self::Float(number) => Some(number),
            _ => None,
        }
    }
}

/// Says what a value is, briefly.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(number) => write!(f, "{number}"),
            Self::Signed(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Bool(flag) => write!(f, "{flag}"),
            Self::Text(bytes) => write!(f, "the text `{}`", bytes[..bytes.len().min(80)].escape_ascii()),
            Self::Array(array) => write!(f, "an array of {}", array.count),
        }
    }
}

impl<'a> Array<'a> {
    fn read(cursor: &mut Cursor<'a>, key: &str, depth: usize) -> Result<Self, Error> {
        if depth > MAX_DEPTH {
            return Err(Error::invalid(format!("metadata `{key}` nests arrays deeper than {MAX_DEPTH}")));
        }
        let kind = Kind::read(cursor, key)?;
        let count = cursor.u64(key)?;
        let bytes = match kind {
            Kind::Text | Kind::Array => {
                cursor.check_room(key, count, kind.bytes())?;
                let mut walker = cursor.fork();
                for _ in 0..count {
                    Value::read_as(kind, &mut walker, key, depth)?;
                }
                cursor.take(walker.position() - cursor.position(), key)?
            }
            _ => cursor.take_elements(count, kind.bytes(), key)?,
        };
        Ok(Self { kind, count: count as usize, bytes })
    }

    /// Returns how many values there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the values in their order.
    pub fn iter(&self) -> Elements<'a> {
        let cursor = Cursor::new(self.bytes, self.bytes.len() as u64);
        Elements { kind: self.kind, left: self.count, cursor }
    }
}

impl<'a> IntoIterator for Array<'a> {
    type Item = Value<'a>;
    type IntoIter = Elements<'a>;

    fn into_iter(self) -> Elements<'a> {
        self.iter()
    }
}

/// The values of an [`Array`], one by one.
#[derive(Debug)]
pub struct Elements<'a> {
    kind: Kind,
    left: usize,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let value = Value::read_as(self.kind, &mut self.cursor, "an array", 0);
        Some(value.expect("the array was walked when the file was parsed"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elements<'_> {}
