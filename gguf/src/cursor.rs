//! A place in the bytes of a file, from which things are taken that are checked to be there.

use crate::Error;
use std::fmt::Display;

#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_bytes: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], file_bytes: u64) -> Self {
        Self { bytes, at: 0, file_bytes: file_bytes.max(bytes.len() as u64) }
    }

    /// Returns a second cursor at the same place.
    pub(crate) fn fork(&self) -> Self {
        Self { ..*self }
    }

    /// Returns where in the file the next byte is.
    pub(crate) fn position(&self) -> u64 {
        self.at as u64
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Takes `count` bytes of `what`.
    pub(crate) fn take(&mut self, count: u64, what: &(impl Display + ?Sized)) -> Result<&'a [u8], Error> {
        let left = self.file_bytes - self.position();
        if count > left {
            let problem = format!("truncated or corrupt: {what} takes {count} bytes, {left} are left of the file");
            return Err(Error::Invalid(problem));
        }
        let taken = usize::try_from(count).ok().and_then(|count| self.bytes.get(self.at..self.at + count));
        let taken = taken.ok_or(Error::Incomplete(self.bytes.len()))?;
        self.at += taken.len();
        Ok(taken)
    }

    /// Takes `count` elements of `size` bytes each.
    pub(crate) fn take_elements(
        &mut self,
        count: u64,
        size: u64,
        what: &(impl Display + ?Sized),
    ) -> Result<&'a [u8], Error> {
        self.check_room(what, count, size)?;
        self.take(count * size, what)
    }

    /// Refuses a `count` of things of at least `least_bytes` bytes that the rest of the file cannot hold.
    pub(crate) fn check_room(&self, what: &(impl Display + ?Sized), count: u64, least_bytes: u64) -> Result<(), Error> {
        let left = self.file_bytes - self.position();
        if count > left / least_bytes {
            let problem = format!("truncated or corrupt: {what} counts {count}, {left} bytes are left of the file");
            return Err(Error::Invalid(problem));
        }
        Ok(())
    }

    /// Takes the bytes of a text, which its length stands before.
    pub(crate) fn text(&mut self, what: &(impl Display + ?Sized)) -> Result<&'a [u8], Error> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// Takes a text that names something.
    pub(crate) fn name(&mut self, what: &(impl Display + ?Sized)) -> Result<&'a str, Error> {
        let bytes = self.text(what)?;
        std::str::from_utf8(bytes).map_err(|_| Error::invalid(format!("{what} is not UTF-8: {}", bytes.escape_ascii())))
    }

    pub(crate) fn u32(&mut self, what: &(impl Display + ?Sized)) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &(impl Display + ?Sized)) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &(impl Display + ?Sized)) -> Result<[u8; N], Error> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("as many bytes were taken"))
    }
}
