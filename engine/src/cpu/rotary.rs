//! Heads of q and k are normalised where the model says so and turned by their position; k and v go to their pages.

use super::{
    norm::norm_head,
    pages::{LayerPages, Slot},
    simd::Simd,
};
use crate::model::decoder::NormKind;

/// Some tokens of a step after the q/k/v linear.
#[derive(Debug)]
pub(crate) struct RotaryTask<'a> {
    /// First token's `[heads + 2 * kv_heads][head_dim]`; q is turned in place.
    pub(crate) qkv: *mut f32,
    /// f32 from token to token.
    pub(crate) stride: usize,
    /// Where each token's key and value go.
    pub(crate) slots: &'a [Slot],
    /// Cosines and sines, `[tokens][pairs]`; the first `2 * pairs` elements of a head turn.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) pairs: usize,
    /// Pairs are neighbours; else an element of the first half and one of the second.
    pub(crate) interleaved: bool,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) norms: Option<HeadNorms<'a>>,
    pub(crate) pages: LayerPages,
}

/// Norms of q and k.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadNorms<'a> {
    pub(crate) kind: NormKind,
    /// All heads are one vector; else each is its own.
    pub(crate) whole: bool,
    /// Weights, `[head_dim]` for all heads or `[heads][head_dim]`.
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) eps: f32,
}

impl HeadNorms<'_> {
    #[inline(always)]
    fn apply(&self, heads: &mut [f32], weight: &[f32], dim: usize) {
        if self.whole {
            norm_head(self.kind, heads, weight, self.eps);
            return;
        }
        for (index, head) in heads.chunks_exact_mut(dim).enumerate() {
            norm_head(self.kind, head, &weight[index * dim % weight.len()..][..dim], self.eps);
        }
    }
}

/// Computes a task.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, every slot lies in the pool, and nobody else
/// touches the tokens or the slots.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &RotaryTask<'_>) {
    let (dim, pages) = (task.pages.keys.dim, &task.pages);
    let width = (task.heads + 2 * task.kv_heads) * dim;
    for (token, slot) in task.slots.iter().enumerate() {
        // SAFETY: a token's row holds `width` f32, and it is ours.
        let row = unsafe { std::slice::from_raw_parts_mut(task.qkv.add(token * task.stride), width) };
        let (q, kv) = row.split_at_mut(task.heads * dim);
        let (k, v) = kv.split_at_mut(task.kv_heads * dim);
        if let Some(norms) = &task.norms {
            norms.apply(q, norms.q, dim);
            norms.apply(k, norms.k, dim);
        }
        let angles = token * task.pairs..(token + 1) * task.pairs;
        let (cos, sin) = (&task.cos[angles.clone()], &task.sin[angles]);
        for head in q.chunks_exact_mut(dim) {
            turn(&mut head[..2 * task.pairs], cos, sin, task.interleaved);
        }
        for (index, head) in k.chunks_exact_mut(dim).enumerate() {
            turn(&mut head[..2 * task.pairs], cos, sin, task.interleaved);
            // SAFETY: the slot lies in the pool and is ours.
            unsafe { pages.keys.write(simd, *slot, index, head) };
        }
        for (index, head) in v.chunks_exact(dim).enumerate() {
            // SAFETY: as above.
            unsafe { pages.values.write(simd, *slot, index, head) };
        }
    }
}

/// Turns the pairs of a vector: neighbours, or element `i` of the first half with element `i` of the second.
#[inline(always)]
pub(crate) fn turn(head: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    if interleaved {
        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            let [first, second] = *pair;
            *pair = [first * cos - second * sin, second * cos + first * sin];
        }
        return;
    }
    let (first, second) = head.split_at_mut(cos.len());
    for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_neighbours_or_halves_apart() {
        let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]);
        let mut head = [1.0, 2.0, 3.0, 4.0];
        turn(&mut head, &cos, &sin, false);
        assert_eq!(head, [-3.0, 2.0, 1.0, 4.0]);
        let mut head = [1.0, 2.0, 3.0, 4.0];
        turn(&mut head, &cos, &sin, true);
        assert_eq!(head, [-2.0, 1.0, 3.0, 4.0]);
    }

    #[test]
    fn heads_share_a_weight_or_have_their_own_or_are_one() {
        let apply = |whole: bool, weight: &[f32]| {
            let norms = HeadNorms { kind: NormKind::Rms, whole, q: weight, k: weight, eps: 0.0 };
            let mut heads = [1.0, 1.0, 7.0, 7.0];
            norms.apply(&mut heads, weight, 2);
            heads
        };
        assert_eq!(apply(false, &[1.0, 2.0]), [1.0, 2.0, 1.0, 2.0]);
        assert_eq!(apply(false, &[1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0]);
        let whole = apply(true, &[1.0, 1.0, 1.0, 2.0]);
        assert!((whole[0] - 0.2).abs() < 1e-6 && (whole[3] - 2.8).abs() < 1e-6, "{whole:?}");
    }
}
