//! Attention of a step: which tasks there are, and when their parts are computed apart.

use super::{Cpu, Shared, Span, attention::AttentionTask, lock, pages::LayerPages};
use crate::KvMemory;
use std::ops::Range;

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
        // Later tokens of a prompt see more: tasks go from the back so that the longest start first.
        let tiles = |span: &Span<'_>| span.tokens.div_ceil(each);
        let total: usize = spans.iter().map(tiles).sum::<usize>() * groups;
        let task = |index: usize| {
            let group = index % groups;
            let mut tile = index / groups;
            let span = spans.iter().find(|span| {
                let here = tiles(span);
                if tile >= here {
                    tile -= here;
                    return false;
                }
                true
            });
            let span = span.expect("the index is below the number of tiles");
            let first = (tiles(span) - 1 - tile) * each;
            let row = span.first + first;
            AttentionTask {
                shape,
                q: q.at(row * sizes.qkv + group * shape.group * shape.head_dim),
                q_stride: sizes.qkv,
                tokens: each.min(span.tokens - first),
                start: span.start + first,
                window,
                table: span.pages,
                pages,
                // Heads that share a key/value head are one group, unless they are too many.
                kv_head: group * sizes.kv_heads / groups,
                output: attended.at(row * attended_stride),
                output_stride: attended_stride,
                output_index: group * shape.group * shape.value_dim,
                format: sizes.format,
            }
        };
        let (scratch, kernels) = (&self.scratch, self.kernels);
        let pieces = if total < 2 * self.pool.threads() { pieces(total, &task) } else { Vec::new() };
        if pieces.len() <= total {
            self.pool.run(total, &|index, thread| {
                // SAFETY: rows lie in the buffers, pages were checked when the step began and their contents are final for
                // this layer, and every task has its own outputs.
                unsafe { (kernels.attention)(&task(index), lock(&scratch[thread]).floats_mut()) };
            });
            return;
        }

        // Fewer tasks than threads could take, and long sequences: their parts are computed apart.
        let floats = pieces.iter().map(|piece| piece.floats.end).max().unwrap_or(0);
        if self.parts.len() < floats {
            self.parts.resize(floats, 0.0);
        }
        let parts = Shared(self.parts.as_mut_ptr());
        self.pool.run(pieces.len(), &|index, thread| {
            let piece = &pieces[index];
            // SAFETY: as above, and every piece has its own floats.
            unsafe {
                let out = std::slice::from_raw_parts_mut(parts.at(piece.floats.start), piece.floats.len());
                (kernels.attention_part)(&task(piece.task), piece.part, out, lock(&scratch[thread]).floats_mut());
            }
        });
        self.pool.run(total, &|index, thread| {
            let mut own = pieces.iter().filter(|piece| piece.task == index).map(|piece| &piece.floats);
            let first = own.next().expect("a task has a part");
            let last = own.next_back().unwrap_or(first);
            // SAFETY: as above; the pieces of a task follow each other and are complete.
            unsafe {
                let states = std::slice::from_raw_parts_mut(parts.at(first.start), last.end - first.start);
                (kernels.attention_merge)(&task(index), states, lock(&scratch[thread]).floats_mut());
            }
        });
    }
}

/// One part of an attention task, computed apart.
#[derive(Debug)]
struct Piece {
    task: usize,
    part: usize,
    /// Its state in [`Cpu::parts`].
    floats: Range<usize>,
}

/// Lists the parts of `tasks` tasks, task by task.
fn pieces<'a>(tasks: usize, task: &dyn Fn(usize) -> AttentionTask<'a>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut floats = 0;
    for index in 0..tasks {
        let task = task(index);
        for part in task.parts() {
            let end = floats + task.state_floats();
            pieces.push(Piece { task: index, part, floats: floats..end });
            floats = end;
        }
    }
    pieces
}
