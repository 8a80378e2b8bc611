//! Which blocks of a hand-off have been seen, so that each is sent, and accepted, exactly once.

use crate::plan::Piece;

/// One bit per block, `[layers][pages]`; a thousandth of a percent of what it describes.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
    layers: u32,
    pages: u32,
    bits: Vec<u64>,
}

impl Coverage {
    /// Starts with no block marked.
    pub(crate) fn new(layers: u32, pages: u32) -> Self {
        let blocks = layers as usize * pages as usize;
        Self { layers, pages, bits: vec![0; blocks.div_ceil(64)] }
    }

    /// Returns the number of blocks of pages `first..` that are not marked.
    pub(crate) fn missing_from(&self, first: u32) -> u64 {
        let rows = (0..self.layers).map(|layer| Piece { layer, pages: first..self.pages });
        rows.map(|row| self.places(&row).filter(|(word, bit)| self.bits[*word] & bit == 0).count() as u64).sum()
    }

    /// Says whether every block of `piece` lies inside and none is marked.
    pub(crate) fn is_new(&self, piece: &Piece) -> bool {
        piece.layer < self.layers
            && piece.pages.start < piece.pages.end
            && piece.pages.end <= self.pages
            && self.places(piece).all(|(word, bit)| self.bits[word] & bit == 0)
    }

    /// Marks the blocks of `piece`, or none when [`Coverage::is_new`] says no. Returns whether it did.
    pub(crate) fn mark(&mut self, piece: &Piece) -> bool {
        if !self.is_new(piece) {
            return false;
        }
        for (word, bit) in self.places(piece) {
            self.bits[word] |= bit;
        }
        true
    }

    /// Takes back the mark of a marked `piece`.
    pub(crate) fn unmark(&mut self, piece: &Piece) {
        for (word, bit) in self.places(piece) {
            self.bits[word] &= !bit;
        }
    }

    fn places(&self, piece: &Piece) -> impl Iterator<Item = (usize, u64)> + use<> {
        let row = piece.layer as usize * self.pages as usize;
        piece
            .pages
            .clone()
            .map(move |page| (row + page as usize) / 64)
            .zip(piece.pages.clone().map(move |page| 1 << ((row + page as usize) % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(layer: u32, start: u32, end: u32) -> Piece {
        Piece { layer, pages: start..end }
    }

    #[test]
    fn each_block_once() {
        let mut coverage = Coverage::new(3, 50);
        assert!(coverage.mark(&piece(1, 10, 40)));
        assert!(!coverage.mark(&piece(1, 39, 45)), "page 39 again");
        assert!(coverage.mark(&piece(1, 40, 45)), "the refused piece left nothing behind");
        assert!(coverage.mark(&piece(2, 0, 50)));
        assert_eq!(coverage.missing_from(0), 150 - 85);
        assert_eq!(coverage.missing_from(42), 8 + 5);
    }

    #[test]
    fn nothing_outside() {
        let mut coverage = Coverage::new(3, 50);
        for outside in [piece(3, 0, 1), piece(0, 49, 51), piece(0, 50, 51), piece(0, 7, 7)] {
            assert!(!coverage.mark(&outside), "{outside:?}");
        }
        assert_eq!(coverage.missing_from(0), 150);
    }
}
