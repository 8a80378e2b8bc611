//! Which bytes of a staging memory are in use: copies through it are done in the order in which they were asked for.

use std::ops::Range;

/// Bytes from which a copy starts.
const LINE: u64 = 64;

/// The use of a memory, counted in bytes that were ever taken.
#[derive(Debug)]
pub(super) struct Staging {
    bytes: u64,
    /// Everything before is done.
    done: u64,
    taken: u64,
}

impl Staging {
    /// Of `bytes` bytes, whole lines.
    pub(super) fn new(bytes: usize) -> Self {
        Self { bytes: bytes as u64, done: 0, taken: 0 }
    }

    /// Takes what follows, up to `most` bytes; `None` while that is in use.
    pub(super) fn take(&mut self, most: usize) -> Option<Range<usize>> {
        let start = self.taken % self.bytes;
        let length = (most as u64).min(self.bytes - start);
        let end = self.taken + length.next_multiple_of(LINE);
        (end - self.done <= self.bytes).then(|| {
            self.taken = end;
            start as usize..(start + length) as usize
        })
    }

    /// Returns how much was taken so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Notes that copies of the first `taken` bytes are done.
    pub(super) fn done(&mut self, taken: u64) {
        self.done = self.done.max(taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_taken_again_when_their_copies_are_done() {
        let mut staging = Staging::new(256);
        assert_eq!(staging.take(100), Some(0..100));
        let first = staging.taken();
        assert_eq!(staging.take(64), Some(128..192));
        assert_eq!(staging.take(100), Some(192..256), "as much as follows");
        assert_eq!(staging.take(36), None);
        staging.done(first);
        assert_eq!(staging.take(129), None, "what comes next in one piece is more than is free");
        assert_eq!(staging.take(128), Some(0..128));
        assert_eq!(staging.take(1), None);
        staging.done(0);
        assert_eq!(staging.take(1), None);
        staging.done(staging.taken());
        assert_eq!(staging.take(1000), Some(128..256));
    }
}
