//! Heads of q and k are normalised where the model says so and turned by their position; k and v go to their pages.

use super::{format::Format, norm::norm_head, simd::Simd};

/// Where the keys and values of one layer lie: the pool's blocks of that layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPages {
    /// Block of page 0.
    pub(crate) base: *mut u8,
    /// Bytes of a block.
    pub(crate) block_bytes: usize,
    /// Bytes of a block before its values.
    pub(crate) key_bytes: usize,
    /// Tokens of a page.
    pub(crate) page_tokens: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
    /// Element type.
    pub(crate) format: Format,
}

// SAFETY: only an address; whoever reads or writes through it vouches for the slots it uses.
unsafe impl Sync for LayerPages {}

/// A token's place in its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) page: u32,
    pub(crate) token: u32,
}

impl LayerPages {
    /// Returns the key of a token for `head`; its neighbours in the page follow it.
    #[inline(always)]
    pub(crate) fn key(&self, slot: Slot, head: usize) -> *mut u8 {
        let element = (head * self.page_tokens + slot.token as usize) * self.head_dim;
        // Only an address: whoever uses it vouches for the slot.
        self.base.wrapping_add(slot.page as usize * self.block_bytes + element * self.format.bytes())
    }

    /// Returns the value of a token for `head`; its neighbours in the page follow it.
    #[inline(always)]
    pub(crate) fn value(&self, slot: Slot, head: usize) -> *mut u8 {
        self.key(slot, head).wrapping_add(self.key_bytes)
    }
}

/// Some tokens of a step after the q/k/v linear.
#[derive(Debug)]
pub(crate) struct RotaryTask<'a> {
    /// First token's `[heads + 2 * kv_heads][head_dim]`; q is turned in place.
    pub(crate) qkv: *mut f32,
    /// f32 from token to token.
    pub(crate) stride: usize,
    /// Where each token's key and value go.
    pub(crate) slots: &'a [Slot],
    /// Cosines and sines, `[tokens][head_dim / 2]`.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Weights of the norms of q and k heads, `[head_dim]`, and their epsilon.
    pub(crate) norms: Option<(&'a [f32], &'a [f32])>,
    pub(crate) eps: f32,
    pub(crate) pages: LayerPages,
}

/// Computes a task.
///
/// # Safety
/// The pointers of `task` are valid for what they are documented to hold, every slot lies in the pool, and nobody else
/// touches the tokens or the slots.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(simd: S, task: &RotaryTask<'_>) {
    let (dim, pages) = (task.pages.head_dim, &task.pages);
    let width = (task.heads + 2 * task.kv_heads) * dim;
    for (token, slot) in task.slots.iter().enumerate() {
        // SAFETY: a token's row holds `width` f32, and it is ours.
        let row = unsafe { std::slice::from_raw_parts_mut(task.qkv.add(token * task.stride), width) };
        let (q, kv) = row.split_at_mut(task.heads * dim);
        let (k, v) = kv.split_at_mut(task.kv_heads * dim);
        let half = token * dim / 2..(token + 1) * dim / 2;
        let (cos, sin) = (&task.cos[half.clone()], &task.sin[half]);
        for head in q.chunks_exact_mut(dim) {
            if let Some((weight, _)) = task.norms {
                norm_head(head, weight, task.eps);
            }
            turn(head, cos, sin);
        }
        for (index, head) in k.chunks_exact_mut(dim).enumerate() {
            if let Some((_, weight)) = task.norms {
                norm_head(head, weight, task.eps);
            }
            turn(head, cos, sin);
            // SAFETY: the slot lies in the pool and is ours.
            unsafe { pages.format.store_slice(simd, pages.key(*slot, index), 0, head) };
        }
        for (index, head) in v.chunks_exact(dim).enumerate() {
            // SAFETY: as above.
            unsafe { pages.format.store_slice(simd, pages.value(*slot, index), 0, head) };
        }
    }
}

/// Turns element `i` of the first half of a head with element `i` of the second.
#[inline(always)]
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
    }
}
