use super::*;
use crate::{
    KvMemory,
    cpu::{buffer::Buffer, kernels::Kernels, pages::Slot, simd::portable::Portable},
};
use candle_core::{DType, Device, Tensor};
use kv_cache::{KvDtype, PageLayout};

/// A sequence's keys and values in pages, and as plain tensors.
struct Case {
    shape: AttentionShape,
    kv_heads: usize,
    length: usize,
    window: Option<usize>,
    memory: KvMemory,
    table: Vec<PageId>,
    /// `[length][kv_heads][head_dim]`, as the pages hold them.
    keys: Vec<f32>,
    /// `[length][kv_heads][value_dim]`.
    values: Vec<f32>,
    /// `[length][heads][head_dim]`.
    q: Vec<f32>,
}

/// What a case is made of.
#[derive(Clone, Copy, Debug)]
struct Plan {
    dtype: KvDtype,
    group: usize,
    head_dim: usize,
    /// Of values that stand in their keys.
    rank: Option<usize>,
    length: usize,
    page_tokens: usize,
    window: Option<usize>,
    cap: Option<f32>,
}

impl Plan {
    fn new(dtype: KvDtype, group: usize, head_dim: usize, length: usize) -> Self {
        Self { dtype, group, head_dim, rank: None, length, page_tokens: 16, window: None, cap: None }
    }
}

fn wave(index: usize, salt: usize) -> f32 {
    ((index * 7919 + salt * 104_729) % 2003) as f32 / 500.0 - 2.0
}

impl Case {
    fn new(plan: Plan) -> Self {
        let Plan { dtype, group, head_dim, rank, length, page_tokens, window, cap } = plan;
        let kv_heads = if rank.is_some() { 1 } else { 2 };
        let shape = AttentionShape {
            group,
            head_dim,
            value_dim: rank.unwrap_or(head_dim),
            latent: rank.is_some(),
            scale: 1.0 / (head_dim as f32).sqrt(),
            cap,
        };
        let pages = length.div_ceil(page_tokens) as u32 + 3;
        let layout = PageLayout {
            layers: 1,
            page_tokens: page_tokens as u32,
            kv_heads: kv_heads as u32,
            key_dim: head_dim as u32,
            value_dim: if rank.is_some() { 0 } else { head_dim as u32 },
            dtype,
            pages,
        };
        let memory = KvMemory::new(layout).expect("memory");
        use std::os::unix::fs::FileExt;
        memory.file().write_all_at(&vec![0xff; memory.layout().pool_bytes()], 0).expect("the pool's bytes");
        let table: Vec<PageId> =
            (0..length.div_ceil(page_tokens) as u32).map(|page| PageId(pages - 1 - page)).collect();
        let pool = LayerPages::new(&memory, 0);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for position in 0..length {
            let (page, token) = (table[position / page_tokens].0, (position % page_tokens) as u32);
            let slot = Slot { page, token };
            for head in 0..kv_heads {
                let sides = [(&mut keys, pool.keys), (&mut values, pool.values)];
                for (salt, (all, side)) in sides.into_iter().enumerate().take(if rank.is_some() { 1 } else { 2 }) {
                    let written: Vec<f32> = (0..side.dim).map(|index| wave(all.len() + index, salt)).collect();
                    // SAFETY: the slot lies in the pool and nobody else uses it.
                    unsafe {
                        side.write(Portable, slot, head, &written);
                        all.extend(side.values(Portable, slot, head));
                    }
                }
            }
        }
        if let Some(rank) = rank {
            values = keys.chunks_exact(head_dim).flat_map(|key| &key[..rank]).copied().collect();
        }
        let q = (0..length * kv_heads * group * head_dim).map(|index| wave(index, 11)).collect();
        Self { shape, kv_heads, length, window, memory, table, keys, values, q }
    }

    /// Queries as they meet keys: scaled, and rounded where keys fit bf16.
    fn rounded_q(&self) -> Vec<f32> {
        let narrow = LayerPages::new(&self.memory, 0).keys.fits_bf16();
        let scale = self.shape.scale * self.shape.cap.map_or(std::f32::consts::LOG2_E, f32::recip);
        let round = |q: &f32| if narrow { half::bf16::from_f32(q * scale).to_f32() / scale } else { *q };
        self.q.iter().map(round).collect()
    }

    fn heads(&self) -> usize {
        self.kv_heads * self.shape.group
    }

    /// The same by dense f32 operations of candle, `[length][heads][value_dim]`.
    fn reference(&self) -> candle_core::Result<Vec<f32>> {
        let (length, heads, dim) = (self.length, self.heads(), self.shape.head_dim);
        let device = Device::Cpu;
        let spread = |side: &[f32]| {
            let dim = side.len() / length / self.kv_heads;
            let tensor = Tensor::from_slice(side, (length, self.kv_heads, 1, dim), &device)?;
            tensor
                .broadcast_as((length, self.kv_heads, self.shape.group, dim))?
                .reshape((length, heads, dim))?
                .transpose(0, 1)
        };
        let q = Tensor::from_slice(&self.rounded_q(), (length, heads, dim), &device)?.transpose(0, 1)?.contiguous()?;
        let (keys, values) = (spread(&self.keys)?.contiguous()?, spread(&self.values)?.contiguous()?);
        let seen = |i: usize, j: usize| j <= i && self.window.is_none_or(|window| i - j < window);
        let mask: Vec<f32> = (0..length * length)
            .map(|at| if seen(at / length, at % length) { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(mask, (1, length, length), &device)?;
        let scores = (q.matmul(&keys.transpose(1, 2)?.contiguous()?)? * f64::from(self.shape.scale))?;
        let scores = match self.shape.cap.map(f64::from) {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        let scores = scores.broadcast_add(&mask)?;
        let scores = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let scores = scores.broadcast_div(&scores.sum_keepdim(2)?)?;
        scores.matmul(&values)?.transpose(0, 1)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }

    /// Computes tokens `from ..` in tasks of `tokens`, `[length - from][heads][value_dim]`.
    fn run(&self, kernels: &Kernels, from: usize, tokens: usize, in_parts: bool) -> Vec<f32> {
        let mut arena = Arena::new(self);
        self.run_in(&mut arena, kernels, from, tokens, in_parts);
        arena.output.floats()[..(self.length - from) * self.heads() * self.shape.value_dim].to_vec()
    }

    fn run_in(&self, arena: &mut Arena, kernels: &Kernels, from: usize, tokens: usize, in_parts: bool) {
        let (heads, dim, value_dim) = (self.heads(), self.shape.head_dim, self.shape.value_dim);
        let Arena { q, output, scratch } = arena;
        // All heads in a task where it has room, as a step does.
        let joined = if tokens * self.kv_heads <= self.shape.task_tokens() { self.kv_heads } else { 1 };
        for kv_head in (0..self.kv_heads).step_by(joined) {
            let head = kv_head * self.shape.group;
            for first in (from..self.length).step_by(tokens) {
                let task = AttentionTask {
                    shape: self.shape,
                    q: q.floats()[(first * heads + head) * dim..].as_ptr(),
                    q_stride: heads * dim,
                    tokens: tokens.min(self.length - first),
                    start: first,
                    window: self.window,
                    table: &self.table,
                    pages: LayerPages::new(&self.memory, 0),
                    kv_heads: kv_head..kv_head + joined,
                    output: output.floats_mut()[(first - from) * heads * value_dim..].as_mut_ptr().cast(),
                    output_stride: heads * value_dim * 4,
                    output_index: head * value_dim,
                    format: Format::F32,
                };
                // SAFETY: buffers hold all tokens and end at guard pages; the kernels are available.
                unsafe {
                    if in_parts {
                        let mut states = vec![f32::NAN; task.parts().len() * task.state_floats()];
                        let each = 2 * task.state_floats();
                        let firsts = task.parts().step_by(2);
                        for (first, states) in firsts.zip(states.chunks_mut(each)).rev() {
                            let parts = first..task.parts().end.min(first + 2);
                            (kernels.attention_parts)(&task, parts, states, scratch.floats_mut());
                        }
                        for head in 0..task.kv_heads.len() {
                            (kernels.attention_merge)(&task, head, &states, scratch.floats_mut());
                        }
                    } else {
                        (kernels.attention)(&task, scratch.floats_mut());
                    }
                }
            }
        }
    }
}

/// Buffers that end at guard pages.
struct Arena {
    q: Buffer,
    output: Buffer,
    scratch: Buffer,
}

impl Arena {
    fn new(case: &Case) -> Self {
        let mut q = Buffer::new(case.q.len() * 4).expect("memory");
        q.floats_mut()[..case.q.len()].copy_from_slice(&case.q);
        let output = Buffer::new(case.q.len() * 4).expect("memory");
        let mut scratch = Buffer::new(case.shape.scratch_floats() * 4).expect("memory");
        scratch.bytes_mut().fill(0xff);
        Self { q, output, scratch }
    }
}

/// Compares tasks of as many tokens as they may have with the reference.
fn check(kernels: &Kernels, plan: Plan) {
    let case = Case::new(plan);
    let expected = case.reference().expect("candle computes");
    let output = case.run(kernels, 0, case.shape.task_tokens(), false);
    let worst = output.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Half a step of bf16 from each probability, at random; and a score is off by what tanh is, times the cap.
    let narrow = LayerPages::new(&case.memory, 0).keys.fits_bf16();
    let bound = if narrow { 8e-3 } else { 2e-5 } + if plan.cap.is_some() { 1e-4 } else { 0.0 };
    assert!(worst < bound, "{} {plan:?}: {worst}", kernels.name);
}

#[test]
fn attention_is_that_of_the_dense_reference() {
    for kernels in Kernels::available() {
        for (dtype, group, head_dim, length, window) in [
            (KvDtype::F32, 1, 16, 1, None),
            (KvDtype::F32, 3, 24, 100, None),
            (KvDtype::F32, 4, 64, 70, Some(17)),
            (KvDtype::Bf16, 7, 128, 65, None),
            (KvDtype::F16, 2, 80, 90, Some(33)),
            (KvDtype::Bf16, 40, 32, 40, Some(1)),
            (KvDtype::Bf16, 100, 256, 20, None),
            (KvDtype::F32, 2, 96, 1100, None),
            (KvDtype::Bf16, 4, 64, 600, None),
            (KvDtype::Fp8, 3, 64, 100, None),
            (KvDtype::Fp8, 2, 24, 70, Some(33)),
            (KvDtype::Int8, 4, 128, 90, None),
            (KvDtype::Int8, 1, 9, 600, Some(550)),
            (KvDtype::Bf16, 1, 2, 1100, Some(600)),
        ] {
            check(kernels, Plan { window, ..Plan::new(dtype, group, head_dim, length) });
        }
    }
}

#[test]
fn pages_of_any_size_and_values_within_keys() {
    for kernels in Kernels::available() {
        for page_tokens in [1, 5, 8, 16, 24, 64, 1024] {
            for dtype in KvDtype::ALL {
                let plan = Plan { page_tokens, ..Plan::new(dtype, 3, 64, 150) };
                check(kernels, plan);
                check(kernels, Plan { window: Some(70), ..plan });
                check(kernels, Plan { rank: Some(40), head_dim: 56, ..plan });
                check(kernels, Plan { rank: Some(64), head_dim: 128, window: Some(40), ..plan });
            }
        }
    }
}

#[test]
fn capped_scores_are_those_of_the_dense_reference() {
    for kernels in Kernels::available() {
        for (head_dim, length, window, cap) in [(32, 90, None, 2.0), (24, 70, Some(17), 0.5), (64, 600, None, 50.0)] {
            for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
                check(kernels, Plan { window, cap: Some(cap), ..Plan::new(dtype, 2, head_dim, length) });
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_every_task() {
    for kernels in Kernels::available() {
        for (dtype, head_dim, length, window) in [
            (KvDtype::Bf16, 64, 1100, None),
            (KvDtype::Int8, 24, 1100, Some(520)),
            (KvDtype::Bf16, 80, 70, Some(40)),
            (KvDtype::F32, 64, 600, None),
            (KvDtype::Fp8, 64, 150, Some(100)),
        ] {
            let plan = Plan { window, ..Plan::new(dtype, 3, head_dim, length) };
            for plan in [plan, Plan { rank: Some(head_dim / 2), page_tokens: 5, ..plan }] {
                let case = Case::new(plan);
                let from = length - 65;
                let expected = case.run(kernels, from, 1, false);
                let same = |tokens: usize, in_parts: bool| {
                    let output = case.run(kernels, from, tokens, in_parts);
                    let equal = output.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "{} {plan:?}: {tokens} tokens, in parts {in_parts}", kernels.name);
                };
                for tokens in [2, 3, 5, 8, 16, 21] {
                    same(tokens, false);
                }
                same(1, true);
                same(case.shape.task_tokens(), false);
                same(case.shape.task_tokens(), true);
            }
        }
    }
}

/// `cargo test --release -p engine --lib -- --ignored --nocapture attention::tests::speed`
#[test]
#[ignore = "prints speeds; asserts nothing"]
fn speed() {
    const LENGTH: usize = 4096;
    for kernels in Kernels::available() {
        for (dtype, group, head_dim) in [
            (KvDtype::Bf16, 4, 64),
            (KvDtype::Bf16, 7, 64),
            (KvDtype::Bf16, 1, 128),
            (KvDtype::Bf16, 8, 128),
            (KvDtype::Int8, 4, 64),
            (KvDtype::Fp8, 4, 64),
            (KvDtype::F32, 4, 64),
        ] {
            let case = Case::new(Plan::new(dtype, group, head_dim, LENGTH));
            for tokens in [case.shape.task_tokens(), 1] {
                let from = LENGTH - tokens;
                let mut arena = Arena::new(&case);
                let mut times: Vec<f64> = Vec::new();
                for _ in 0..100 {
                    let start = std::time::Instant::now();
                    case.run_in(&mut arena, kernels, from, tokens, false);
                    times.push(start.elapsed().as_secs_f64());
                }
                times.sort_by(f64::total_cmp);
                let middle = times[times.len() / 2];
                let operations = 4.0 * (tokens * case.heads() * head_dim * LENGTH) as f64;
                let bytes = (2 * case.kv_heads * (head_dim * dtype.bytes() + dtype.scale_bytes()) * LENGTH) as f64;
                println!(
                    "{:12} {dtype} {group} x {head_dim}, {tokens:2} tokens: {:6.1} Gop/s {:5.1} GB/s",
                    kernels.name,
                    operations / middle / 1e9,
                    bytes / middle / 1e9
                );
            }
        }
    }
}
