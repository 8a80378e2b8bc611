use super::*;
use crate::{
    KvMemory,
    cpu::{buffer::Buffer, kernels::Kernels, simd::portable::Portable},
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
    values: Vec<f32>,
    /// `[length][heads][head_dim]`.
    q: Vec<f32>,
}

fn wave(index: usize, salt: usize) -> f32 {
    ((index * 7919 + salt * 104_729) % 2003) as f32 / 500.0 - 2.0
}

impl Case {
    fn new(dtype: KvDtype, group: usize, head_dim: usize, length: usize, window: Option<usize>) -> Self {
        let kv_heads = 2;
        let shape = AttentionShape {
            group,
            head_dim,
            value_dim: head_dim,
            latent: false,
            scale: 1.0 / (head_dim as f32).sqrt(),
            cap: None,
        };
        let pages = length.div_ceil(16) as u32 + 3;
        let layout = PageLayout {
            layers: 1,
            page_tokens: 16,
            kv_heads: kv_heads as u32,
            key_dim: head_dim as u32,
            value_dim: head_dim as u32,
            dtype,
            pages,
        };
        let memory = KvMemory::new(layout).expect("memory");
        use std::os::unix::fs::FileExt;
        memory.file().write_all_at(&vec![0xff; memory.layout().pool_bytes()], 0).expect("the pool's bytes");
        let table: Vec<PageId> = (0..length.div_ceil(16) as u32).map(|page| PageId(pages - 1 - page)).collect();
        let pool = LayerPages::new(&memory, 0);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for position in 0..length {
            let slot = Slot { page: table[position / 16].0, token: (position % 16) as u32 };
            for head in 0..kv_heads {
                for (salt, (all, side)) in [(&mut keys, pool.keys), (&mut values, pool.values)].into_iter().enumerate()
                {
                    let written: Vec<f32> = (0..head_dim).map(|index| wave(all.len() + index, salt)).collect();
                    let mut stored = vec![0.0; head_dim];
                    // SAFETY: the slot lies in the pool and nobody else uses it.
                    unsafe {
                        side.write(Portable, slot, head, &written);
                        side.read(Portable, slot, head, head_dim, &mut stored);
                    }
                    all.extend(stored);
                }
            }
        }
        let q = (0..length * kv_heads * group * head_dim).map(|index| wave(index, 11)).collect();
        Self { shape, kv_heads, length, window, memory, table, keys, values, q }
    }

    fn heads(&self) -> usize {
        self.kv_heads * self.shape.group
    }

    /// The same by dense f32 operations of candle, `[length][heads][head_dim]`.
    fn reference(&self) -> candle_core::Result<Vec<f32>> {
        let (length, heads, dim) = (self.length, self.heads(), self.shape.head_dim);
        let device = Device::Cpu;
        let spread = |side: &[f32]| {
            let tensor = Tensor::from_slice(side, (length, self.kv_heads, 1, dim), &device)?;
            tensor
                .broadcast_as((length, self.kv_heads, self.shape.group, dim))?
                .reshape((length, heads, dim))?
                .transpose(0, 1)
        };
        let q = Tensor::from_slice(&self.q, (length, heads, dim), &device)?.transpose(0, 1)?.contiguous()?;
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

    /// Computes tokens `from ..` in tasks of `tokens`, `[length - from][heads][head_dim]`.
    fn run(&self, kernels: &Kernels, from: usize, tokens: usize, in_parts: bool) -> Vec<f32> {
        let mut arena = Arena::new(self);
        self.run_in(&mut arena, kernels, from, tokens, in_parts);
        arena.output.floats()[..(self.length - from) * self.heads() * self.shape.head_dim].to_vec()
    }

    fn run_in(&self, arena: &mut Arena, kernels: &Kernels, from: usize, tokens: usize, in_parts: bool) {
        let (heads, dim) = (self.heads(), self.shape.head_dim);
        let Arena { q, output, scratch } = arena;
        for kv_head in 0..self.kv_heads {
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
                    kv_head,
                    output: output.floats_mut()[(first - from) * heads * dim..].as_mut_ptr().cast(),
                    output_stride: heads * dim * 4,
                    output_index: head * dim,
                    format: Format::F32,
                };
                // SAFETY: buffers hold all tokens and end at guard pages; the kernels are available.
                unsafe {
                    if in_parts {
                        let mut states = vec![f32::NAN; task.parts().len() * task.state_floats()];
                        for (part, state) in task.parts().zip(states.chunks_exact_mut(task.state_floats())).rev() {
                            (kernels.attention_part)(&task, part, state, scratch.floats_mut());
                        }
                        (kernels.attention_merge)(&task, &mut states, scratch.floats_mut());
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
            (KvDtype::F32, 2, 96, 1100, None),
            (KvDtype::Fp8, 3, 64, 100, None),
            (KvDtype::Fp8, 2, 24, 70, Some(33)),
            (KvDtype::Int8, 4, 128, 90, None),
            (KvDtype::Int8, 1, 9, 600, Some(550)),
            (KvDtype::Bf16, 1, 2, 1100, Some(600)),
        ] {
            let case = Case::new(dtype, group, head_dim, length, window);
            let expected = case.reference().expect("candle computes");
            let output = case.run(kernels, 0, case.shape.task_tokens(), false);
            let worst = output.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-5, "{} {dtype} {group} x {head_dim}, {length}, {window:?}: {worst}", kernels.name);
        }
    }
}

#[test]
fn capped_scores_are_those_of_the_dense_reference() {
    for kernels in Kernels::available() {
        for (head_dim, length, window, cap) in [(32, 90, None, 2.0), (24, 70, Some(17), 0.5), (64, 600, None, 50.0)] {
            let mut case = Case::new(KvDtype::F32, 2, head_dim, length, window);
            case.shape.cap = Some(cap);
            let expected = case.reference().expect("candle computes");
            let output = case.run(kernels, 0, case.shape.task_tokens(), false);
            let worst = output.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // A score is off by what tanh is, times the cap.
            assert!(worst < 1e-4, "{} {head_dim}, {length}, {window:?}, cap {cap}: {worst}", kernels.name);
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_every_task() {
    for kernels in Kernels::available() {
        for (head_dim, length, window) in [(64, 1100, None), (24, 1100, Some(520)), (80, 70, Some(40))] {
            let dtype = if head_dim == 24 { KvDtype::Int8 } else { KvDtype::Bf16 };
            let case = Case::new(dtype, 3, head_dim, length, window);
            let from = length - 65;
            let same = |tokens: usize, in_parts: bool| {
                let expected = case.run(kernels, from, 1, false);
                let output = case.run(kernels, from, tokens, in_parts);
                let equal = output.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(equal, "{} {head_dim} {length} {window:?}: {tokens} tokens, in parts {in_parts}", kernels.name);
            };
            for tokens in 1..=case.shape.task_tokens() {
                same(tokens, false);
            }
            same(1, true);
            same(case.shape.task_tokens(), true);
        }
    }
}

/// `cargo test -p engine -- --ignored --nocapture attention::tests::speed`
#[test]
#[ignore = "prints speeds; asserts nothing"]
fn speed() {
    for kernels in Kernels::available() {
        for (group, head_dim) in [(4, 64), (7, 64), (1, 128), (8, 128)] {
            let case = Case::new(KvDtype::Bf16, group, head_dim, 2048, None);
            for tokens in [case.shape.task_tokens(), 1] {
                let from = 2048 - tokens;
                let mut arena = Arena::new(&case);
                let mut best = f64::INFINITY;
                for _ in 0..200 {
                    let start = std::time::Instant::now();
                    case.run_in(&mut arena, kernels, from, tokens, false);
                    best = best.min(start.elapsed().as_secs_f64());
                }
                let operations = 4.0 * (tokens * case.heads() * head_dim * 2048) as f64;
                let bytes = (case.kv_heads * head_dim * 2048 * 4) as f64;
                println!(
                    "{:12} {group} x {head_dim}, {tokens:2} tokens: {:6.1} Gop/s {:5.1} GB/s",
                    kernels.name,
                    operations / best / 1e9,
                    bytes / best / 1e9
                );
            }
        }
    }
}
