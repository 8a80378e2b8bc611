//! Names what was in the blocks, so that silent corruption between two pools becomes a refusal.
//!
//! Each frame is digested on its own while its bytes are in the cache anyway (just read from the socket, or about to be
//! written to it), so that nothing is left to digest when the commit comes; the commit carries a digest of these digests in
//! the order of their frame numbers. A frame's digest covers which blocks it holds too: right bytes in the wrong place differ.
//!
//! The hash is BLAKE3 cut to 128 bits. A checksum would do against flipped bits and be several times faster; BLAKE3 is already
//! here (it names pages), picks its vector code at run time, keeps up with a network (3 to 4 GB/s a core here) if not with
//! memory, and a peer cannot aim for a collision. Where both ends trust the path more than they miss the time, `verify =
//! "counts"` leaves it out.

use crate::{HandoffId, plan::Piece};
use std::fmt;

/// Digest of a frame, or of all frames of a hand-off.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Digest(pub(crate) [u8; Digest::BYTES]);

impl Digest {
    /// Length on the wire: 128 bits of BLAKE3, far more than chance needs.
    pub(crate) const BYTES: usize = 16;

    /// Digests the digests of all frames, in the order of their numbers.
    pub(crate) fn of_frames(frames: impl IntoIterator<Item = Digest>) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for frame in frames {
            hasher.update(&frame.0);
        }
        cut(&hasher)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Digests one frame as its bytes come by.
#[derive(Debug)]
pub(crate) struct FrameHasher(blake3::Hasher);

impl FrameHasher {
    /// Starts the digest of frame `sequence` of `handoff` with the blocks `pieces`.
    pub(crate) fn new(handoff: HandoffId, sequence: u32, pieces: &[Piece]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&handoff.0.to_le_bytes()).update(&sequence.to_le_bytes());
        for piece in pieces {
            for number in [piece.layer, piece.pages.start, piece.pages.end] {
                hasher.update(&number.to_le_bytes());
            }
        }
        Self(hasher)
    }

    /// Takes the next bytes. How they are cut makes no difference.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the digest.
    pub(crate) fn finish(self) -> Digest {
        cut(&self.0)
    }
}

fn cut(hasher: &blake3::Hasher) -> Digest {
    let mut digest = Digest([0; Digest::BYTES]);
    hasher.finalize_xof().fill(&mut digest.0);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(handoff: u64, sequence: u32, page: u32, bytes: &[&[u8]]) -> Digest {
        let mut hasher = FrameHasher::new(HandoffId(handoff), sequence, &[Piece { layer: 1, pages: page..page + 1 }]);
        bytes.iter().for_each(|bytes| hasher.update(bytes));
        hasher.finish()
    }

    #[test]
    fn covers_contents_and_place_but_not_the_cut() {
        let plain = digest(1, 2, 3, &[b"abcdef"]);
        assert_eq!(plain, digest(1, 2, 3, &[b"ab", b"", b"cdef"]));
        for other in [digest(9, 2, 3, &[b"abcdef"]), digest(1, 9, 3, &[b"abcdef"]), digest(1, 2, 9, &[b"abcdef"])] {
            assert_ne!(plain, other);
        }
        assert_ne!(plain, digest(1, 2, 3, &[b"abcdeg"]));
        assert_ne!(Digest::of_frames([plain, digest(1, 3, 3, &[])]), Digest::of_frames([digest(1, 3, 3, &[]), plain]));
    }
}
