//! Attention of a step: which tasks there are, and when their parts are computed apart.

use super::{
    Cpu, Shared, Span,
    attention::{AttentionTask, parts},
    lock,
    pages::LayerPages,
};
use crate::KvMemory;
use std::ops::Range;

/// Parts are computed apart when the longest task takes longer than this share of what each thread has to do.
const LONG_TASK: usize = 4;
/// Pieces for each thread that there are at least when heads are joined or parts are computed apart, where lengths allow it.
const PIECES: usize = 16;

/// How attention is dealt out; kept from layer to layer and step to step so that nothing is allocated.
#[derive(Debug, Default)]
pub(super) struct Dealing {
    tiles: Vec<Tile>,
    pieces: Vec<Piece>,
    /// What pieces leave; grows to what the longest sequence needs.
    states: Vec<f32>,
}

/// Some tokens of a span, which are a task with each group of heads.
#[derive(Clone, Copy, Debug)]
struct Tile {
    span: usize,
    /// First token, counted from the span's.
    first: usize,
}

/// Some parts of a task that are computed apart.
#[derive(Debug)]
struct Piece {
    task: usize,
    parts: Range<usize>,
    /// Their states in [`Dealing::states`].
    floats: Range<usize>,
}

impl Cpu {
    /// Attends over the pages of layer `layer`; rows of `spans` are those of the step.
    pub(crate) fn attend(&mut self, spans: &[Span<'_>], window: Option<usize>, memory: &KvMemory, layer: usize) {
        let pages = LayerPages::new(memory, layer);
        let q = Shared(self.qkv.as_mut_ptr().cast::<f32>());
        let (attended, attended_stride) = match &mut self.latent {
            Some(latent) => latent.output(),
            None => (self.attended.as_mut_ptr(), self.sizes.attended),
        };
        let attended = Shared(attended);
        let sizes = &self.sizes;
        let shape = sizes.attention;
        let groups = sizes.heads / shape.group;
        let each = shape.task_tokens();
        let Dealing { tiles, pieces, states } = &mut self.dealing;
        tiles.clear();
        for (span, tokens) in spans.iter().map(|span| span.tokens).enumerate() {
            // Later tokens of a prompt see more: tasks go from the back so that the longest start first.
            tiles.extend((0..tokens).step_by(each).rev().map(|first| Tile { span, first }));
        }
        let threads = self.pool.threads();
        let heads = joined(tiles, spans, (groups, sizes.kv_heads), each, window, PIECES * threads);
        let (total, tasks_of_tile) = (tiles.len() * groups / heads, groups / heads);
        let task = |index: usize| {
            let (group, Tile { span, first }) = (index % tasks_of_tile * heads, tiles[index / tasks_of_tile]);
            let span = &spans[span];
            let row = span.first + first;
            // Heads that share a key/value head are one group, unless they are too many.
            let kv_head = group * sizes.kv_heads / groups;
            AttentionTask {
                shape,
                q: q.at(row * sizes.qkv + group * shape.group * shape.head_dim),
                q_stride: sizes.qkv,
                tokens: each.min(span.tokens - first),
                start: span.start + first,
                window,
                table: span.pages,
                pages,
                kv_heads: kv_head..kv_head + heads,
                output: attended.at(row * attended_stride),
                output_stride: attended_stride,
                output_index: group * shape.group * shape.value_dim,
                format: sizes.format,
            }
        };
        let (scratch, kernels) = (&self.scratch, self.kernels);
        pieces.clear();
        if threads > 1 {
            cut(pieces, total, threads, &task);
        }
        if pieces.len() <= total {
            self.pool.run(total, &|index, thread| {
                // SAFETY: rows lie in the buffers, pages were checked when the step began and their contents are final for
                // this layer, and every task has its own outputs.
                unsafe { (kernels.attention)(&task(index), lock(&scratch[thread]).floats_mut()) };
            });
            return;
        }

        // Fewer tasks than threads could take, and long sequences: their parts are computed apart.
        let floats = pieces.last().map_or(0, |piece| piece.floats.end);
        if states.len() < floats {
            states.resize(floats, 0.0);
        }
        let states = Shared(states.as_mut_ptr());
        self.pool.run(pieces.len(), &|index, thread| {
            let piece = &pieces[index];
            // SAFETY: as above, and every piece has its own floats.
            unsafe {
                let out = std::slice::from_raw_parts_mut(states.at(piece.floats.start), piece.floats.len());
                let scratch = &mut *lock(&scratch[thread]);
                (kernels.attention_parts)(&task(piece.task), piece.parts.clone(), out, scratch.floats_mut());
            }
        });
        self.pool.run(total * heads, &|index, thread| {
            let (index, head) = (index / heads, index % heads);
            let mut own = pieces.iter().filter(|piece| piece.task == index).map(|piece| &piece.floats);
            let first = own.next().expect("a task has a part");
            let last = own.next_back().unwrap_or(first);
            // SAFETY: as above; the pieces of a task follow each other, are complete, and are only read now.
            unsafe {
                let states = std::slice::from_raw_parts(states.at(first.start), last.end - first.start);
                (kernels.attention_merge)(&task(index), head, states, lock(&scratch[thread]).floats_mut());
            }
        });
    }
}

/// Returns how many key/value heads a task takes, which pass over the same pages one after the other: as many as leave `wanted`
/// pieces, of those that divide all `groups`.
fn joined(
    tiles: &[Tile],
    spans: &[Span<'_>],
    (groups, kv_heads): (usize, usize),
    most_tokens: usize,
    window: Option<usize>,
    wanted: usize,
) -> usize {
    if groups != kv_heads {
        return 1;
    }
    let tokens = |tile: &Tile| most_tokens.min(spans[tile.span].tokens - tile.first);
    let longest = tiles.iter().map(tokens).max().unwrap_or(1);
    let parts: usize =
        tiles.iter().map(|tile| parts(spans[tile.span].start + tile.first, tokens(tile), window).len()).sum();
    let fits = |heads: &usize| groups.is_multiple_of(*heads) && parts * (groups / heads) >= wanted;
    (2..=groups.min(most_tokens / longest)).rev().find(fits).unwrap_or(1)
}

/// Cuts tasks into pieces of whole parts, task by task, when one of them is so long that others would wait for it.
fn cut<'a>(pieces: &mut Vec<Piece>, tasks: usize, threads: usize, task: &dyn Fn(usize) -> AttentionTask<'a>) {
    let parts = |index: usize| task(index).parts().len();
    let (all, longest) = (0..tasks).map(parts).fold((0, 0), |(all, longest), parts| (all + parts, longest.max(parts)));
    if longest * LONG_TASK * threads <= all {
        return;
    }
    let each = all.div_ceil(PIECES * threads);
    let mut floats = 0;
    for index in 0..tasks {
        let task = task(index);
        let parts = task.parts();
        for first in parts.clone().step_by(each) {
            let parts = first..parts.end.min(first + each);
            let end = floats + parts.len() * task.state_floats();
            pieces.push(Piece { task: index, parts, floats: floats..end });
            floats = end;
        }
    }
}
