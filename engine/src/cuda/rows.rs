//! What kernels are told of a step's rows: one run of 32-bit words, written on the host and copied once.
//!
//! ```text
//! used            [1]               rows that are no padding
//! tokens          [rows]            which embedding, or what was found for which row before
//! positions       [rows]            which angles
//! slots           [rows][2]         page, and token within it, where keys and values go
//! kept            [rows]            the rows that go on when the last pages are written
//! sequences       [sequences][4]    first row, rows, position of the first, start of its page table
//! kept_sequences  [2 sequences][4]  the same of the rows that are kept
//! races           [logits_rows][8]  how the token after each row of logits is drawn; zeros where it is not
//! tables          []                page ids
//! ```
//!
//! Each part starts where it always does, whatever the step, so that a graph finds it. A step may be *padded* to more rows than it has: those
//! belong to sequences of one token at position 0 whose page is one behind the pool, which nobody reads.

use super::device::Region;
use crate::{
    home::{Pass, Span},
    sampling::Race,
};
use std::ops::Range;

/// Most of everything in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub(crate) rows: usize,
    pub(crate) sequences: usize,
    /// Entries of page tables, over all sequences.
    pub(crate) entries: usize,
    /// Rows of logits at a time.
    pub(crate) logits_rows: usize,
}

/// Where the parts are on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub(crate) used: Region,
    pub(crate) tokens: Region,
    pub(crate) positions: Region,
    pub(crate) slots: Region,
    pub(crate) kept: Region,
    pub(crate) sequences: Region,
    pub(crate) kept_sequences: Region,
    pub(crate) races: Region,
    pub(crate) tables: Region,
    /// All of them.
    pub(crate) whole: Region,
}

/// The words of a step, in memory that is kept from step to step.
#[derive(Debug)]
pub(crate) struct Rows {
    capacity: Capacity,
    words: Vec<u32>,
    /// Words in use.
    used: usize,
    /// Of each row that is kept.
    races: Vec<Option<Race>>,
}

impl Capacity {
    /// Words of each part.
    fn words(&self) -> [usize; 9] {
        let Self { rows, sequences, entries, logits_rows } = *self;
        // Each part starts at a multiple of sixteen bytes.
        let rows = rows.next_multiple_of(4);
        [4, rows, rows, 2 * rows, rows, 4 * sequences, 8 * sequences, Race::WORDS * logits_rows, entries + 1]
    }

    /// Returns the bytes of all parts.
    pub(crate) fn bytes(&self) -> usize {
        self.words().iter().sum::<usize>() * 4
    }

    /// Returns where the parts are in `whole`.
    pub(crate) fn parts(&self, whole: Region) -> Parts {
        let mut at = 0;
        let [used, tokens, positions, slots, kept, sequences, kept_sequences, races, tables] =
            self.words().map(|words| {
                at += words * 4;
                whole.part(at - words * 4, words * 4)
            });
        Parts { used, tokens, positions, slots, kept, sequences, kept_sequences, races, tables, whole }
    }
}

impl Rows {
    pub(crate) fn new(capacity: Capacity) -> Self {
        let races = Vec::with_capacity(capacity.rows);
        Self { capacity, words: vec![0; capacity.bytes() / 4], used: 0, races }
    }

    /// Writes the step of `pass`, padded to `padded` rows; `nowhere` is the page behind the pool.
    ///
    /// # Panics
    /// When it is more than there is room for: the engine checks steps before.
    pub(crate) fn write(&mut self, pass: &Pass<'_>, padded: usize, page_tokens: usize, nowhere: u32) {
        let mut rest = &mut self.words[..];
        let parts = self.capacity.words().map(|words| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(words);
            rest = after;
            part
        });
        let [used, tokens, positions, slots, kept, sequences, kept_sequences, races, tables] = parts;
        used[0] = pass.tokens.len() as u32;
        tokens[..pass.tokens.len()].copy_from_slice(pass.tokens);
        let mut entries = 0;
        let mut kept_spans = pass.kept.iter().zip(kept_sequences.as_chunks_mut::<4>().0).peekable();
        for (span, words) in pass.spans.iter().zip(sequences.as_chunks_mut::<4>().0) {
            for (row, position) in (span.first..).zip(span.start..span.start + span.tokens) {
                positions[row] = position as u32;
                slots[2 * row..][..2].copy_from_slice(&slot(span, position, page_tokens));
            }
            *words = sequence(span, entries);
            // Spans of kept rows follow those they are part of.
            while let Some((kept, words)) = kept_spans.next_if(|(kept, _)| std::ptr::eq(kept.pages, span.pages)) {
                *words = sequence(kept, entries);
            }
            let pages = &span.pages[..(span.start + span.tokens).div_ceil(page_tokens)];
            tables[entries..][..pages.len()].iter_mut().zip(pages).for_each(|(entry, page)| *entry = page.0);
            entries += pages.len();
        }
        for (to, row) in kept.iter_mut().zip(pass.kept_rows()) {
            *to = row as u32;
        }
        for (index, row) in (pass.spans.len()..).zip(pass.tokens.len()..padded) {
            (tokens[row], positions[row]) = (0, 0);
            slots[2 * row..][..2].copy_from_slice(&[nowhere, 0]);
            sequences[4 * index..][..4].copy_from_slice(&[row as u32, 1, 0, entries as u32]);
        }
        tables[entries] = nowhere;
        self.races.clear();
        self.races.extend(pass.places.iter().map(|place| place.race));
        write_races(races, self.races.iter().copied().chain(std::iter::repeat(None)).take(padded));
        self.used = self.capacity.bytes() / 4 - tables.len() + entries + 1;
    }

    /// Writes the races of `rows` of those that are kept, and returns what is to be copied there; `None` where none races.
    pub(crate) fn races(&mut self, rows: Range<usize>) -> Option<&[u8]> {
        let races = &self.races[rows];
        races.iter().any(Option::is_some).then(|| {
            let [before @ .., _races, _tables] = self.capacity.words();
            let part = &mut self.words[before.iter().sum()..][..Race::WORDS * races.len()];
            write_races(part, races.iter().copied());
            bytes_of(part)
        })
    }

    /// Writes which rows are kept after all, and returns what is to be copied there.
    pub(crate) fn keep(&mut self, rows: &mut dyn Iterator<Item = usize>) -> &[u8] {
        let [used, tokens, positions, slots, room, ..] = self.capacity.words();
        let kept = &mut self.words[used + tokens + positions + slots..][..room];
        let mut count = 0;
        for (to, row) in kept.iter_mut().zip(rows) {
            *to = row as u32;
            self.races[count] = self.races[row];
            count += 1;
        }
        self.races.truncate(count);
        bytes_of(&kept[..count])
    }

    /// Returns what is to be copied to the start of the parts.
    pub(crate) fn bytes(&self) -> &[u8] {
        bytes_of(&self.words[..self.used])
    }
}

/// Writes `races`, as many as there is room for.
fn write_races(words: &mut [u32], races: impl Iterator<Item = Option<Race>>) {
    for (words, race) in words.as_chunks_mut::<{ Race::WORDS }>().0.iter_mut().zip(races) {
        *words = race.map_or([0; Race::WORDS], |race| race.words());
    }
}

fn bytes_of(words: &[u32]) -> &[u8] {
    // SAFETY: any word is four bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 4) }
}

fn slot(span: &Span<'_>, position: usize, page_tokens: usize) -> [u32; 2] {
    [span.pages[position / page_tokens].0, (position % page_tokens) as u32]
}

fn sequence(span: &Span<'_>, table: usize) -> [u32; 4] {
    [span.first, span.tokens, span.start, table].map(|word| word as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sample, Sampling, home::Place};
    use kv_cache::PageId;

    #[test]
    fn parts_hold_what_they_say() {
        let capacity = Capacity { rows: 6, sequences: 3, entries: 8, logits_rows: 4 };
        let mut rows = Rows::new(capacity);
        let pages = [[PageId(7), PageId(3), PageId(9)], [PageId(5), PageId(2), PageId(1)]];
        let span = |first, tokens, start, pages| Span { first, tokens, start, pages, adapter: None, leaves: false };
        let spans = [span(0, 3, 3, &pages[0][..]), span(3, 1, 0, &pages[1][..])];
        let kept = [span(0, 1, 4, &pages[0][..]), span(1, 1, 5, &pages[0][..]), span(2, 1, 0, &pages[1][..])];
        let sampling = Sampling { temperature: 0.5, ..Sampling::default() };
        let sample = Sample {
            sampling: &sampling,
            history: &[1],
            prompt_tokens: 1,
            forbidden: &[],
            min_tokens: 0,
            grammar: None,
        };
        let (race, race_words) = (sample.race(), sample.race().expect("it races").words());
        let place = |row, token, race| Place { row, token, race };
        let places = [place(0, 1, None), place(0, 2, race), place(1, 0, race)];
        rows.write(&Pass { tokens: &[10, 11, 12, 13], spans: &spans, places: &places, kept: &kept }, 5, 4, 100);
        let parts = capacity.parts(Region { address: 0, bytes: capacity.bytes() });
        let words: Vec<u32> =
            rows.bytes().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four"))).collect();
        let part = |part: Region, length: usize| words[part.address as usize / 4..][..length].to_vec();
        assert_eq!(part(parts.used, 1), [4]);
        assert_eq!(part(parts.tokens, 5), [10, 11, 12, 13, 0]);
        assert_eq!(part(parts.positions, 5), [3, 4, 5, 0, 0]);
        assert_eq!(part(parts.slots, 10), [7, 3, 3, 0, 3, 1, 5, 0, 100, 0]);
        assert_eq!(part(parts.kept, 3), [1, 2, 3]);
        assert_eq!(part(parts.sequences, 12), [0, 3, 3, 0, 3, 1, 0, 2, 4, 1, 0, 3]);
        assert_eq!(part(parts.kept_sequences, 12), [0, 1, 4, 0, 1, 1, 5, 0, 2, 1, 0, 2]);
        assert_eq!(part(parts.tables, 4), [7, 3, 5, 100]);
        assert_eq!(part(parts.races, 32), [&[0; 8][..], &race_words, &race_words, &[0; 8]].concat());
        assert_eq!(words.len(), (parts.tables.address as usize) / 4 + 4);
        assert_eq!(rows.races(0..1), None);
        assert_eq!(rows.races(1..3).map(<[u8]>::len), Some(64));
        assert_eq!(rows.keep(&mut [0, 2].into_iter()).len(), 8);
        assert_eq!(rows.races(0..2), Some(bytes_of(&[[0; 8], race_words].concat())));
    }
}
