//! A block of positions, brought from pages into the panels that linears read.
//!
//! Scores are queries times keys and need a panel with positions for its columns: `[head_dim][64 positions]`, or in pairs of
//! bf16 `[head_dim / 2][64 positions][2]`. Rows of pages are turned into it as squares of words, in registers. Outputs are
//! probabilities times values, for which positions are the depth: `[64 positions][64 values]`, or `[32][64 values][2]`, once for
//! every 64 values; there a row is copied, or two rows are woven into one.
//!
//! Pages are read in place, a vector's lanes of tokens at a time, where such a group lies in one page, is wanted to the
//! last token, and is stored as it meets its inputs in rows of whole panels. Other groups are staged: converted token by token, with
//! zeros for tokens that are not wanted and for what is beyond a row. Scales stand beside the panels.

use super::{AttentionShape, AttentionTask, BLOCK};
use crate::cpu::{
    format::Format,
    linear::{
        floats::{Bf16Widened, F32},
        tiled::{Asks, Columns, Tiled, Weights},
    },
    packed::PANEL,
    pages::{Side, Slot},
    simd::{Simd, exp2, exp2_short},
};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{linear::floats::Bf16Dot, simd::DotBf16};
use std::ops::Range;

/// Weights that keys and values are brought into, a word for each step of a column.
pub(crate) trait Elements<S: Simd>: Weights<S> {
    /// What an element is in a panel.
    const STORED: Format;
    /// What queries and probabilities are.
    const INPUT: Format;

    /// Values are woven as they are read, where one tile takes all rows.
    const WOVEN: bool = false;

    /// `2^x` for `x` up to the headroom, as exact as inputs are.
    fn power(simd: S, x: S::F) -> S::F;

    /// Weaves `2 * LANES` stored elements of two tokens into columns; only where elements are [`Elements::WOVEN`].
    ///
    /// # Safety
    /// They can be read.
    #[inline(always)]
    unsafe fn weave(_: S, _: *const u8, _: *const u8) -> [Self::Columns; 2] {
        unreachable!("elements that are not woven")
    }

    /// Writes two vectors as inputs, the first of them at `index`, and adds what was written to `sum`.
    ///
    /// # Safety
    /// `2 * LANES` inputs can be written there.
    #[inline(always)]
    unsafe fn put(simd: S, values: [S::F; 2], to: *mut u8, index: usize, sum: S::F) -> S::F {
        let [first, second] = match Self::STORED {
            Format::Bf16 => [simd.round_bf16(values[0]), simd.round_bf16(values[1])],
            _ => values,
        };
        // SAFETY: passed on.
        unsafe {
            Self::INPUT.store(simd, to, index, first);
            Self::INPUT.store(simd, to, index + S::LANES, second);
        }
        simd.add(simd.add(sum, first), second)
    }
}

impl<S: Simd> Elements<S> for F32 {
    const STORED: Format = Format::F32;
    const INPUT: Format = Format::F32;

    #[inline(always)]
    fn power(simd: S, x: S::F) -> S::F {
        exp2(simd, x)
    }
}

impl<S: Simd> Elements<S> for Bf16Widened {
    const STORED: Format = Format::Bf16;
    const INPUT: Format = Format::RoundedBf16;

    #[inline(always)]
    fn power(simd: S, x: S::F) -> S::F {
        exp2_short(simd, x)
    }
}

#[cfg(target_arch = "x86_64")]
impl<S: DotBf16> Elements<S> for Bf16Dot {
    const STORED: Format = Format::Bf16;
    const INPUT: Format = Format::Bf16;
    const WOVEN: bool = true;

    #[inline(always)]
    unsafe fn weave(simd: S, first: *const u8, second: *const u8) -> [S::Pairs; 2] {
        // SAFETY: passed on.
        unsafe { simd.weave(first.cast(), second.cast()) }
    }

    #[inline(always)]
    fn power(simd: S, x: S::F) -> S::F {
        exp2_short(simd, x)
    }

    #[inline(always)]
    unsafe fn put(simd: S, values: [S::F; 2], to: *mut u8, index: usize, sum: S::F) -> S::F {
        const ONES: u32 = 0x3f80_3f80;
        let pairs = simd.round_pairs(values);
        // SAFETY: passed on.
        unsafe { simd.store_pairs(to.cast::<u16>().add(index).cast(), pairs) };
        simd.dot(sum, pairs, simd.splat_pair(ONES))
    }
}

/// Values where they lie, which become columns as they are read: two tokens are a step.
#[derive(Clone, Copy)]
pub(super) struct Woven<'a> {
    /// Where the tokens of each page begin.
    runs: &'a [*const u8],
    /// Steps of a page.
    steps: usize,
    /// Bytes of a token.
    token: usize,
    at: *const u8,
    left: usize,
    /// Bytes before the column.
    column: usize,
}

impl<'a> Woven<'a> {
    /// Returns the values of the block from `block` on, when all of it is wanted, it lies in whole pages, and `rows` meet it in one
    /// tile; `runs` is room for addresses.
    pub(super) fn new<S: Simd, W: Elements<S>>(
        task: &AttentionTask<'_>,
        kv_head: usize,
        block: usize,
        positions: &Range<usize>,
        runs: &'a mut [*const u8; BLOCK],
    ) -> Option<Self> {
        let (side, page_tokens) = (&task.pages.values, task.pages.page_tokens);
        let whole =
            positions.len() == BLOCK && BLOCK.is_multiple_of(page_tokens) && page_tokens.is_multiple_of(W::STEP);
        let good = W::WOVEN && !task.shape.latent && side.dim.is_multiple_of(PANEL);
        if !(whole && good && Tiled::<W>::is_one::<S>(task.rows())) {
            return None;
        }
        let runs = &mut runs[..BLOCK / page_tokens];
        for (run, first) in runs.iter_mut().zip((block..).step_by(page_tokens)) {
            *run = side.stored_as(task.slot(first), kv_head, W::STORED)?;
        }
        let token = side.dim * W::STORED.bytes();
        Some(Self { runs, steps: page_tokens / W::STEP, token, at: std::ptr::null(), left: 0, column: 0 })
    }
}

impl<S: Simd, W: Elements<S>> Columns<S, W> for Woven<'_> {
    #[inline(always)]
    fn at(self, column: usize) -> Self {
        Self { column: self.column + column * W::STORED.bytes(), ..self }
    }

    #[inline(always)]
    unsafe fn step<const VECTORS: usize>(&mut self, simd: S) -> [W::Columns; VECTORS] {
        if self.left == 0 {
            (self.at, self.left) = (self.runs[0].wrapping_add(self.column), self.steps);
            self.runs = &self.runs[1..];
        }
        // SAFETY: the caller vouches for the step, of two tokens.
        unsafe {
            let [first, _] = W::weave(simd, self.at, self.at.add(self.token));
            let mut columns = [first; VECTORS];
            for pair in 0..VECTORS / 2 {
                let at = self.at.add(pair * 2 * S::LANES * W::STORED.bytes());
                [columns[2 * pair], columns[2 * pair + 1]] = W::weave(simd, at, at.add(self.token));
            }
            self.at = self.at.wrapping_add(2 * self.token);
            self.left -= 1;
            columns
        }
    }
}

/// Tokens of a group: the lanes of the widest unit.
const GROUP: usize = 16;

/// The panels of a block, and where rows are staged on the way.
pub(super) struct Panels<'a> {
    pub(super) keys: &'a mut [f32],
    /// One after the other, each of `64 / STEP` steps.
    pub(super) values: &'a mut [f32],
    /// Of the block's keys and of its values; untouched where pages have none.
    pub(super) scales: [&'a mut [f32]; 2],
    staged: &'a mut [f32],
}

impl<'a> Panels<'a> {
    /// Returns the f32 that panels take for any elements.
    pub(super) fn floats(shape: &AttentionShape) -> usize {
        (BLOCK + GROUP) * shape.padded_dim() + BLOCK * shape.padded_value() + 2 * BLOCK
    }

    /// Takes panels from the front of `floats`, and returns what is left.
    pub(super) fn split(shape: &AttentionShape, floats: &'a mut [f32]) -> (Self, &'a mut [f32]) {
        let (keys, rest) = floats.split_at_mut(BLOCK * shape.padded_dim());
        let (values, rest) = rest.split_at_mut(BLOCK * shape.padded_value());
        let (staged, rest) = rest.split_at_mut(GROUP * shape.padded_dim());
        let (key_scales, rest) = rest.split_at_mut(BLOCK);
        let (value_scales, rest) = rest.split_at_mut(BLOCK);
        (Self { keys, values, scales: [key_scales, value_scales], staged }, rest)
    }

    /// Brings in `positions`, which lie in the block from `block` on; the values of pairs that they touch are whole. Values only
    /// where they are not `woven` from their pages. Asks for some of what is `upcoming`.
    ///
    /// # Safety
    /// The table covers the positions, its pages lie in the pool, and nobody writes them.
    #[inline(always)]
    pub(super) unsafe fn fill<S: Simd, W: Elements<S>>(
        &mut self,
        simd: S,
        task: &AttentionTask<'_>,
        (kv_head, block): (usize, usize),
        positions: Range<usize>,
        woven: bool,
        upcoming: &mut Upcoming,
    ) {
        let (keys, values) = (&task.pages.keys, &task.pages.values);
        for first in (positions.start / S::LANES * S::LANES..positions.end).step_by(S::LANES) {
            let group = Group { first, wanted: positions.clone() };
            // SAFETY: passed on; a group's columns, and its pairs, lie in the block.
            unsafe {
                let key_rows = group.rows::<S, W>(simd, task, keys, kv_head, self.staged);
                self.turn_keys::<S, W>(simd, first - block, key_rows, upcoming);
                if task.shape.latent {
                    self.weave_values::<S, W>(simd, first - block, (key_rows, task.shape.padded_value()), upcoming);
                } else if !woven {
                    let rows = group.rows::<S, W>(simd, task, values, kv_head, self.staged);
                    self.weave_values::<S, W>(simd, first - block, (rows, task.shape.padded_value()), upcoming);
                }
            }
        }
        if keys.has_scales() {
            let sides = if task.shape.latent { [keys, keys] } else { [keys, values] };
            for (scales, side) in self.scales.iter_mut().zip(sides) {
                scales.fill(0.0);
                let wanted = &mut scales[positions.start - block..positions.end - block];
                for (scale, slot) in wanted.iter_mut().zip(task.slots(positions.clone())) {
                    // SAFETY: the position is one of the caller's.
                    *scale = unsafe { side.scale(slot, kv_head) };
                }
            }
        }
    }

    /// Makes LANES columns of `rows`, the first of them `column`.
    ///
    /// # Safety
    /// The rows can be read.
    #[inline(always)]
    unsafe fn turn_keys<S: Simd, W: Elements<S>>(
        &mut self,
        simd: S,
        column: usize,
        rows: Rows,
        upcoming: &mut Upcoming,
    ) {
        // `padded` elements, `STEP` to a word.
        let words = self.keys.len() / BLOCK / W::STEP;
        for word in (0..words).step_by(S::LANES) {
            upcoming.ask::<S, 8>(simd);
            // SAFETY: rows are whole panels, so the square lies in them, and as many words of 64 columns in the keys.
            unsafe {
                let from = rows.first.cast::<u32>().add(word);
                let to = self.keys.as_mut_ptr().cast::<u32>().add(word * BLOCK + column);
                simd.transpose(from, rows.stride / 4, to, BLOCK);
            }
        }
    }

    /// Makes `LANES` of the depth of `rows`, the first of them `index`.
    ///
    /// # Safety
    /// The rows can be read.
    #[inline(always)]
    unsafe fn weave_values<S: Simd, W: Elements<S>>(
        &mut self,
        simd: S,
        index: usize,
        (rows, padded): (Rows, usize),
        upcoming: &mut Upcoming,
    ) {
        let words = BLOCK / W::STEP * PANEL;
        for panel in 0..padded / PANEL {
            // SAFETY: rows are whole panels, and a panel a multiple of `2 * LANES`.
            unsafe {
                let mut to = self.values.as_mut_ptr().add(panel * words + index / W::STEP * PANEL);
                let mut from = rows.first.add(panel * PANEL * W::STORED.bytes());
                for _ in 0..S::LANES / W::STEP {
                    upcoming.ask::<S, 4>(simd);
                    for column in (0..PANEL).step_by(2 * S::LANES) {
                        if W::STEP == 2 {
                            let from = from.cast::<u16>().add(column);
                            simd.interleave(from, from.add(rows.stride / 2), to.add(column).cast());
                        } else {
                            for column in [column, column + S::LANES] {
                                simd.store(to.add(column), simd.load(from.cast::<f32>().add(column)));
                            }
                        }
                    }
                    to = to.add(PANEL);
                    from = from.add(W::STEP * rows.stride);
                }
            }
        }
    }
}

/// Cache lines of the keys and values of the block that comes next, in the order of memory, asked for a few at a time between what
/// is done with the block before it: asked for at once they fill the queue of misses, and everything waits.
pub(super) struct Upcoming {
    /// Where each run of lines begins and how many lines it has: a page's keys, its values, and the next page's.
    runs: [(*const u8, usize); 2 * BLOCK],
    /// Runs that are there.
    count: usize,
    /// The run that is asked for now, and what is left of it.
    run: usize,
    at: *const u8,
    left: usize,
}

impl Upcoming {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self { runs: [(std::ptr::null(), 0); 2 * BLOCK], count: 0, run: 0, at: std::ptr::null(), left: 0 }
    }

    /// Starts over with `positions` of all key/value heads of a task, at most a block.
    #[inline(always)]
    pub(super) fn aim(&mut self, task: &AttentionTask<'_>, positions: Range<usize>) {
        self.count = 0;
        let mut first = positions.start;
        while first < positions.end {
            let slot = task.slot(first);
            let tokens = (task.pages.page_tokens - slot.token as usize).min(positions.end - first);
            self.runs[self.count] = task.pages.keys.lines(slot, &task.kv_heads, tokens);
            self.runs[self.count + 1] = task.pages.values.lines(slot, &task.kv_heads, tokens);
            // Where values are computed from keys their run is empty.
            self.count += 2;
            first += tokens;
        }
        (self.run, self.left) = (0, 0);
        self.next_run();
    }

    /// Goes on to the next run with lines.
    #[inline(always)]
    fn next_run(&mut self) {
        while self.left == 0 && self.run < self.count {
            (self.at, self.left) = self.runs[self.run];
            self.run += 1;
        }
    }

    /// Asks for up to `LINES` lines.
    #[inline(always)]
    pub(super) fn ask<S: Simd, const LINES: usize>(&mut self, simd: S) {
        if self.left == 0 {
            return;
        }
        // A few beyond the end of a run do no harm.
        for line in 0..LINES {
            simd.prefetch(self.at.wrapping_add(line * 64));
        }
        self.at = self.at.wrapping_add(LINES * 64);
        self.left = self.left.saturating_sub(LINES);
        self.next_run();
    }

    /// Asks for everything.
    #[inline(always)]
    pub(super) fn ask_all<S: Simd>(&mut self, simd: S) {
        while self.left > 0 {
            self.ask::<S, 1>(simd);
        }
    }
}

/// What is upcoming, asked for by the steps of tiles, `LINES` lines each.
pub(super) struct EachStep<'a, const LINES: usize>(pub(super) &'a mut Upcoming);

impl<S: Simd, const LINES: usize> Asks<S> for EachStep<'_, LINES> {
    #[inline(always)]
    fn step(&mut self, simd: S) {
        self.0.ask::<S, LINES>(simd);
    }
}

/// `LANES` positions that are brought in together.
struct Group {
    first: usize,
    /// Others become zero.
    wanted: Range<usize>,
}

/// `LANES` rows of whole panels.
#[derive(Clone, Copy)]
struct Rows {
    first: *const u8,
    /// Bytes from row to row.
    stride: usize,
}

impl Group {
    /// Finds the group's rows in the page, or stages them.
    ///
    /// # Safety
    /// As for [`Panels::fill`].
    #[inline(always)]
    unsafe fn rows<S: Simd, W: Elements<S>>(
        &self,
        simd: S,
        task: &AttentionTask<'_>,
        side: &Side,
        kv_head: usize,
        staged: &mut [f32],
    ) -> Rows {
        let slot = task.slot(self.first);
        let end = self.first + S::LANES;
        let whole = self.wanted.start <= self.first && end <= self.wanted.end;
        let whole = whole && slot.token as usize + S::LANES <= task.pages.page_tokens;
        if let Some(first) = side.stored_as(slot, kv_head, W::STORED)
            && whole
            && side.dim.is_multiple_of(PANEL)
        {
            return Rows { first, stride: side.dim * W::STORED.bytes() };
        }
        let stride = side.dim.next_multiple_of(PANEL) * W::STORED.bytes();
        assert!(S::LANES * stride <= size_of_val(staged), "the longest rows fit");
        let first = staged.as_mut_ptr().cast::<u8>();
        let wanted = self.first.max(self.wanted.start)..end.min(self.wanted.end);
        let (length, row) = (side.dim * W::STORED.bytes(), wanted.start - self.first);
        // SAFETY: the rows lie in `staged`, as just checked; wanted positions are the caller's word.
        unsafe {
            first.write_bytes(0, row * stride);
            for (index, slot) in task.slots(wanted.clone()).enumerate() {
                let row = first.add((row + index) * stride);
                side.read(simd, slot, kv_head, W::STORED, row);
                row.add(length).write_bytes(0, stride - length);
            }
            first.add((wanted.end - self.first) * stride).write_bytes(0, (end - wanted.end) * stride);
        }
        Rows { first, stride }
    }
}

impl AttentionTask<'_> {
    /// Returns where a position lies.
    #[inline(always)]
    fn slot(&self, position: usize) -> Slot {
        let page_tokens = self.pages.page_tokens;
        Slot { page: self.table[position / page_tokens].0, token: (position % page_tokens) as u32 }
    }

    /// Returns where each of some positions lies.
    #[inline(always)]
    fn slots(&self, positions: Range<usize>) -> impl Iterator<Item = Slot> {
        let mut next = self.slot(positions.start);
        positions.map(move |position| {
            if next.token as usize == self.pages.page_tokens {
                next = self.slot(position);
            }
            let slot = next;
            next.token += 1;
            slot
        })
    }
}
