use super::*;
use crate::cuda::kernels::tests::{Memory, close, floats, halves, noise, run};
use kv_cache::{ByteCode, Plane};

fn layout(dtype: KvDtype, kv_heads: u32, dim: u32) -> PageLayout {
    PageLayout { layers: 2, page_tokens: 16, kv_heads, key_dim: dim, value_dim: dim, dtype, pages: 70 }
}

pub(in crate::cuda::kernels) const EVERY: [(KvDtype, Element); 6] = [
    (KvDtype::Bf16, Element::Bf16),
    (KvDtype::F16, Element::F16),
    (KvDtype::Fp8, Element::Bf16),
    (KvDtype::Int8, Element::Bf16),
    (KvDtype::Fp8, Element::F16),
    (KvDtype::Int8, Element::F16),
];

/// Writes what a head of a token has, as it should lie in the pool: bytes of it, and what they stand for.
fn stored(layout: &PageLayout, element: Element, values: &[f32]) -> (Vec<u8>, Vec<u8>, Vec<f32>) {
    let code = match layout.dtype {
        KvDtype::Fp8 => ByteCode::E4m3,
        KvDtype::Int8 => ByteCode::Int8,
        _ => {
            let bits: Vec<u16> = values.iter().map(|value| element.narrow(*value)).collect();
            let wide = bits.iter().map(|bits| element.wide(*bits)).collect();
            return (bits.iter().flat_map(|bits| bits.to_le_bytes()).collect(), vec![], wide);
        }
    };
    let scale = code.scale(values);
    let mut bytes = vec![0; values.len()];
    code.encode(values, scale, &mut bytes);
    let widen = |byte: &u8| match code {
        ByteCode::Int8 => f32::from(*byte as i8),
        ByteCode::E4m3 => {
            let bits = u32::from(byte & 0x7f) << 20 | u32::from(byte & 0x80) << 24;
            f32::from_bits(bits) * 2f32.powi(120)
        }
    };
    let wide = bytes.iter().map(|byte| widen(byte) * scale).collect();
    (bytes, ((scale.to_bits() >> 16) as u16).to_le_bytes().to_vec(), wide)
}

/// Puts a head of a token into the pool's bytes, layer 1, and returns what stands there.
pub(in crate::cuda::kernels) fn put(
    pool: &mut [u8],
    layout: &PageLayout,
    element: Element,
    plane: Plane,
    slot: [u32; 2],
    head: usize,
    values: &[f32],
) -> Vec<f32> {
    let block = layout.block_offset(1, kv_cache::PageId(slot[0]));
    let index = head * layout.page_tokens as usize + slot[1] as usize;
    let (bytes, scale, wide) = stored(layout, element, values);
    pool[block + plane.elements + index * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
    if !scale.is_empty() {
        pool[block + plane.scales + index * 2..][..2].copy_from_slice(&scale);
    }
    wide
}

struct RotaryCase {
    kv_heads: usize,
    heads: usize,
    dim: usize,
    pairs: usize,
    interleaved: bool,
    norms: Option<(NormKind, Share)>,
}

/// The definition, in f64: a row of q, k and v, normed and turned.
fn turned(case: &RotaryCase, row: &[f32], position: usize, weights: [&[f32]; 2], angles: &[f32]) -> Vec<f32> {
    let mut row: Vec<f64> = row.iter().map(|value| f64::from(*value)).collect();
    let norm = |part: &mut [f64], kind: NormKind, weight: &[f32]| {
        let count = part.len() as f64;
        let mean = if kind == NormKind::Layer { part.iter().sum::<f64>() / count } else { 0.0 };
        let square = part.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        for (value, weight) in part.iter_mut().zip(weight) {
            *value = (*value - mean) / (square + 1e-6).sqrt() * f64::from(*weight);
        }
    };
    let (q, k) = (case.heads * case.dim, case.kv_heads * case.dim);
    for (part, weight) in [(0..q, weights[0]), (q..q + k, weights[1])] {
        match case.norms {
            None => {}
            Some((kind, Share::Whole)) => norm(&mut row[part.clone()], kind, weight),
            Some((kind, share)) => {
                for (head, values) in row[part.clone()].chunks_exact_mut(case.dim).enumerate() {
                    norm(values, kind, &weight[if share == Share::Each { head * case.dim } else { 0 }..]);
                }
            }
        }
        for head in row[part].chunks_exact_mut(case.dim) {
            for pair in 0..case.pairs {
                let at = (position * case.pairs + pair) * 2;
                let (cosine, sine) = (f64::from(angles[at]), f64::from(angles[at + 1]));
                let (a, b) = if case.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + case.pairs) };
                (head[a], head[b]) = (head[a] * cosine - head[b] * sine, head[b] * cosine + head[a] * sine);
            }
        }
    }
    row.into_iter().map(|value| value as f32).collect()
}

fn check_rotary(case: &RotaryCase, dtype: KvDtype, element: Element) {
    let RotaryCase { kv_heads, heads, dim, pairs, .. } = *case;
    let layout = layout(dtype, kv_heads as u32, dim as u32);
    let (width, rows) = ((heads + 2 * kv_heads) * dim, 3);
    let stride = width.next_multiple_of(64);
    let qkv: Vec<f32> = (0..rows * stride).map(|at| noise(1, at) * 3.0).collect();
    let (positions, slots) = ([5usize, 0, 9], [[3u32, 5], [69, 0], [7, 9]]);
    let angles: Vec<f32> = (0..10 * pairs).flat_map(|at| [(at as f32).cos(), (at as f32).sin()]).collect();
    let weights = [2, 3].map(|salt| (0..heads * dim).map(|at| noise(salt, at) + 1.0).collect::<Vec<_>>());
    let memory = [
        Memory::of_words(&positions.map(|position| position as u32)),
        Memory::of_words(slots.as_flattened()),
        Memory::of_floats(&angles),
        Memory::of_floats(&weights[0]),
        Memory::of_floats(&weights[1]),
    ];
    let before: Vec<u8> = qkv.iter().flat_map(|value| value.to_le_bytes()).collect();
    let both: Vec<u8> = before.iter().copied().chain(std::iter::repeat_n(0xaa, layout.pool_bytes())).collect();
    // One buffer holds both outputs: the rows, then the pool.
    let left = run(&both, |to| {
        let pool = to + before.len() as u64;
        let norms = case.norms.map(|(kind, share)| HeadNorms {
            kind,
            share,
            q: memory[3].address(),
            k: memory[4].address(),
            eps: 1e-6,
        });
        let rotary = Rotary {
            element,
            rows: rows as u32,
            qkv: to,
            stride: stride as u32,
            heads: heads as u32,
            positions: memory[0].address(),
            slots: memory[1].address(),
            angles: memory[2].address(),
            pairs: pairs as u32,
            interleaved: case.interleaved,
            norms,
            pages: Pages::new(&layout, element, pool, 1).expect("pages"),
        };
        rotary.call()
    });
    let (after, pool) = left.split_at(before.len());
    let after = floats(after);
    let mut expected_pool = vec![0xaa; layout.pool_bytes()];
    for row in 0..rows {
        let name = format!("{dtype} {element:?} dim {dim} row {row}");
        let expected = turned(case, &qkv[row * stride..][..width], positions[row], [&weights[0], &weights[1]], &angles);
        let got = &after[row * stride..][..stride];
        let q: Vec<f64> = expected[..heads * dim].iter().map(|value| f64::from(*value)).collect();
        close(&name, &got[..heads * dim], &q, 3e-6);
        assert_eq!(got[heads * dim..], qkv[row * stride..][heads * dim..stride], "{name}: k and v stay");
        for head in 0..kv_heads {
            let keys = &expected[(heads + head) * dim..][..dim];
            put(&mut expected_pool, &layout, element, layout.keys(), slots[row], head, keys);
            let values = &qkv[row * stride + (heads + kv_heads + head) * dim..][..dim];
            put(&mut expected_pool, &layout, element, layout.values(), slots[row], head, values);
        }
    }
    // Rounding may fall to the other side where the sum differs in its last bit: codes by one, and rarely.
    let differ = pool.iter().zip(&expected_pool).filter(|(a, b)| a != b).count();
    assert!(differ * 50 <= rows * 2 * kv_heads * dim, "{dtype} {element:?} dim {dim}: {differ} bytes differ");
    let far = pool.iter().zip(&expected_pool).filter(|(a, b)| a.abs_diff(**b) > 1 && a.abs_diff(**b) < 255).count();
    assert_eq!(far, 0, "{dtype} {element:?} dim {dim}");
}

#[test]
fn heads_are_normed_turned_and_written() {
    for (dtype, element) in EVERY {
        let plain = RotaryCase { kv_heads: 2, heads: 6, dim: 64, pairs: 32, interleaved: false, norms: None };
        check_rotary(&plain, dtype, element);
        check_rotary(&RotaryCase { dim: 20, pairs: 4, interleaved: true, ..plain }, dtype, element);
    }
    for (kind, share) in [
        (NormKind::Rms, Share::Same),
        (NormKind::Layer, Share::Each),
        (NormKind::Rms, Share::Whole),
        (NormKind::Layer, Share::Whole),
    ] {
        let norms = Some((kind, share));
        let case = RotaryCase { kv_heads: 3, heads: 3, dim: 128, pairs: 64, interleaved: false, norms };
        check_rotary(&case, KvDtype::Bf16, Element::Bf16);
        check_rotary(
            &RotaryCase { kv_heads: 1, heads: 12, dim: 256, pairs: 10, interleaved: true, norms },
            KvDtype::Int8,
            Element::Bf16,
        );
    }
}

/// Sequences of a step: rows, and position of the first.
struct AttentionCase {
    dtype: KvDtype,
    element: Element,
    kv_heads: usize,
    group: usize,
    dim: usize,
    window: Option<u32>,
    cap: Option<f32>,
    sequences: Vec<(usize, usize)>,
}

struct Prepared {
    layout: PageLayout,
    memory: [Memory; 4],
    q: Vec<f32>,
    /// `[sequence][position][kv_heads][dim]`.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    rows: usize,
}

/// Contents depend on the sequence's number alone, whatever page they are in; `numbers` are those of the case's sequences.
fn prepare(case: &AttentionCase, numbers: &[usize], backwards: bool) -> Prepared {
    let AttentionCase { kv_heads, dim, element, .. } = *case;
    let heads = kv_heads * case.group;
    let ends = case.sequences.iter().map(|(rows, start)| rows + start);
    let pages: usize = ends.map(|end| end.div_ceil(16)).sum();
    let layout = PageLayout { pages: pages as u32 + 1, ..layout(case.dtype, kv_heads as u32, dim as u32) };
    // What was never written is no number.
    let mut pool = vec![0xff; layout.pool_bytes()];
    let (mut tables, mut sequences, mut q) = (vec![], vec![], vec![]);
    let (mut keys, mut values, mut first, mut next) = (vec![], vec![], 0, 0);
    for (&(rows, start), &number) in case.sequences.iter().zip(numbers) {
        sequences.extend([first as u32, rows as u32, start as u32, tables.len() as u32]);
        let end = rows + start;
        let place = |at: usize| if backwards { pages - 1 - next - at } else { next + at };
        let table: Vec<u32> = (0..end.div_ceil(16)).map(|at| place(at) as u32).collect();
        next += table.len();
        let (mut own_keys, mut own_values) = (vec![], vec![]);
        for position in 0..end {
            let slot = [table[position / 16], (position % 16) as u32];
            for head in 0..kv_heads {
                let at = (position * kv_heads + head) * dim;
                let vector = |salt: u64| -> Vec<f32> {
                    (0..dim).map(|index| 2.0 * noise(salt + 10 * number as u64, at + index)).collect()
                };
                own_keys.extend(put(&mut pool, &layout, element, layout.keys(), slot, head, &vector(1)));
                own_values.extend(put(&mut pool, &layout, element, layout.values(), slot, head, &vector(2)));
            }
        }
        let queries = (start..end).flat_map(|position| (0..heads * dim).map(move |at| (position, at)));
        q.extend(queries.map(|(position, at)| 2.0 * noise(3 + 10 * number as u64, position * heads * dim + at)));
        tables.extend(table);
        keys.push(own_keys);
        values.push(own_values);
        first += rows;
    }
    let memory =
        [Memory::of_floats(&q), Memory::of_words(&sequences), Memory::of_words(&tables), Memory::of_bytes(&pool)];
    Prepared { layout, memory, q, keys, values, rows: first }
}

fn attention(case: &AttentionCase, prepared: &Prepared) -> Attention {
    let width = (case.kv_heads * case.group * case.dim) as u32;
    Attention {
        element: case.element,
        rows: prepared.rows as u32,
        most_rows: case.sequences.iter().map(|(rows, _)| *rows as u32).max().unwrap_or(1),
        longest: case.sequences.iter().map(|(rows, start)| (rows + start) as u32).max().unwrap_or(1),
        q: prepared.memory[0].address(),
        q_stride: width,
        heads: (case.kv_heads * case.group) as u32,
        sequences: prepared.memory[1].address(),
        sequence_count: case.sequences.len() as u32,
        tables: prepared.memory[2].address(),
        to: 0,
        to_stride: width,
        window: case.window,
        scale: 1.0 / (case.dim as f32).sqrt(),
        cap: case.cap,
        pages: Pages::new(&prepared.layout, case.element, prepared.memory[3].address(), 1).expect("pages"),
        states: 0,
    }
}

/// Runs both calls and returns the outputs' bits, `[rows][heads * dim]`.
fn attend(call: &Attention) -> Vec<u16> {
    let count = call.rows as usize * call.to_stride as usize;
    let states = Memory::of_bytes(&vec![0xff; call.state_bytes() as usize]);
    let calls = |to| Attention { to, states: states.address(), ..*call }.calls();
    let first = run(&vec![0xff; count * 2], |to| calls(to).0);
    match calls(0).1 {
        None => halves(&first),
        Some(_) => halves(&run(&vec![0xff; count * 2], |to| calls(to).1.expect("parts are merged"))),
    }
}

/// The definition, in f64.
fn exact(case: &AttentionCase, prepared: &Prepared) -> Vec<f64> {
    let AttentionCase { kv_heads, group, dim, .. } = *case;
    let (mut out, mut row) = (vec![], 0);
    for (index, &(rows, start)) in case.sequences.iter().enumerate() {
        for position in start..start + rows {
            for head in 0..kv_heads * group {
                let q = &prepared.q[(row * kv_heads * group + head) * dim..][..dim];
                let vector =
                    |of: &[Vec<f32>], at: usize| of[index][(at * kv_heads + head / group) * dim..][..dim].to_vec();
                let first = case.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
                let score = |at: usize| {
                    let products = q
                        .iter()
                        .zip(vector(&prepared.keys, at))
                        .map(|(q, k)| f64::from(case.element.round(*q)) * f64::from(k));
                    let score = products.sum::<f64>() / (dim as f64).sqrt();
                    case.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = powers.iter().sum();
                let mut own = vec![0.0; dim];
                for (at, power) in (first..=position).zip(powers) {
                    own.iter_mut()
                        .zip(vector(&prepared.values, at))
                        .for_each(|(o, v)| *o += power / sum * f64::from(v));
                }
                out.extend(own);
            }
            row += 1;
        }
    }
    out
}

fn check_attention(case: &AttentionCase) {
    let numbers: Vec<usize> = (0..case.sequences.len()).collect();
    let prepared = prepare(case, &numbers, false);
    let got = attend(&attention(case, &prepared));
    let got: Vec<f32> = got.into_iter().map(|bits| case.element.wide(bits)).collect();
    let name = format!("{} dim {} window {:?} {:?}", case.dtype, case.dim, case.window, case.sequences);
    close(&name, &got, &exact(case, &prepared), if case.element == Element::Bf16 { 8e-3 } else { 1.5e-3 });
}

fn case(dtype: KvDtype, element: Element, dim: usize, sequences: &[(usize, usize)]) -> AttentionCase {
    let sequences = sequences.to_vec();
    AttentionCase { dtype, element, kv_heads: 2, group: 2, dim, window: None, cap: None, sequences }
}

#[test]
fn queries_see_what_they_should() {
    for (dtype, element) in EVERY {
        // Tokens one by one and prompts, in one part and in several.
        check_attention(&case(dtype, element, 64, &[(1, 0), (1, 63), (1, 64), (2, 100)]));
        check_attention(&case(dtype, element, 32, &[(1, 700), (1, 10), (3, 1100)]));
        check_attention(&case(dtype, element, 20, &[(40, 0), (1, 90), (33, 500)]));
    }
    for dim in [16, 24, 80, 96, 128, 192, 256] {
        check_attention(&case(KvDtype::Bf16, Element::Bf16, dim, &[(1, 70), (1, 3)]));
        check_attention(&case(KvDtype::Fp8, Element::Bf16, dim, &[(20, 5)]));
    }
}

#[test]
fn windows_and_caps_hold() {
    for window in [Some(1), Some(40), Some(600)] {
        for cap in [None, Some(5.0)] {
            for sequences in [&[(1, 0), (1, 640), (2, 1030)][..], &[(20, 630), (1, 5)]] {
                let plain = case(KvDtype::Bf16, Element::Bf16, 32, sequences);
                check_attention(&AttentionCase { window, cap, ..plain });
            }
        }
    }
}

#[test]
fn groups_may_be_of_any_size() {
    for group in [1, 3, 7, 16, 20] {
        let plain = case(KvDtype::Bf16, Element::Bf16, 32, &[(1, 80), (2, 7), (5, 0)]);
        check_attention(&AttentionCase { group, ..plain });
    }
}

#[test]
fn a_token_alone_has_the_bits_it_has_in_a_prompt() {
    for (dtype, window) in [(KvDtype::Bf16, None), (KvDtype::Bf16, Some(530)), (KvDtype::Fp8, None)] {
        let prompt = AttentionCase { window, ..case(dtype, Element::Bf16, 32, &[(70, 1000), (1, 20), (9, 0)]) };
        let whole = prepare(&prompt, &[0, 1, 2], false);
        let width = 4 * 32;
        let expected = attend(&attention(&prompt, &whole));
        let check = |sequences: &[(usize, usize)], numbers: &[usize], rows: &[usize]| {
            let some = AttentionCase { window, ..case(dtype, Element::Bf16, 32, sequences) };
            let prepared = prepare(&some, numbers, true);
            let got = attend(&attention(&some, &prepared));
            for (index, row) in rows.iter().enumerate() {
                assert_eq!(
                    got[index * width..][..width],
                    expected[row * width..][..width],
                    "{dtype} {sequences:?} row {row}"
                );
            }
        };
        check(&[(1, 1000)], &[0], &[0]);
        check(&[(1, 1069), (1, 20), (1, 1023), (1, 1024)], &[0, 1, 0, 0], &[69, 70, 23, 24]);
        check(&[(2, 1030), (2, 7)], &[0, 2], &[30, 31, 78, 79]);
        check(&[(17, 1040), (1, 8)], &[0, 2], &(40..57).chain([79]).collect::<Vec<_>>());
    }
}

#[test]
fn what_kernels_cannot_do_is_said() {
    let check = |layout: PageLayout, element: Element, words: &[&str]| {
        let problem = Pages::new(&layout, element, 0, 0).expect_err("not possible");
        words.iter().for_each(|word| assert!(problem.contains(word), "{problem:?} lacks {word:?}"));
    };
    check(layout(KvDtype::F32, 1, 64), Element::Bf16, &["f32", "Bf16"]);
    check(layout(KvDtype::F16, 1, 64), Element::Bf16, &["f16", "Bf16"]);
    check(PageLayout { page_tokens: 24, ..layout(KvDtype::Bf16, 1, 64) }, Element::Bf16, &["24", "power of two"]);
    check(layout(KvDtype::Bf16, 1, 260), Element::Bf16, &["260", "256"]);
    check(layout(KvDtype::Bf16, 1, 66), Element::Bf16, &["66", "multiple of 4"]);
    check(PageLayout { value_dim: 32, ..layout(KvDtype::Bf16, 1, 64) }, Element::Bf16, &["64 and 32"]);
    let latents = |heads, dim| PageLayout { value_dim: 0, ..layout(KvDtype::Bf16, heads, dim) };
    check(latents(1, 584), Element::Bf16, &["584", "576"]);
    check(latents(1, 36), Element::Bf16, &["36", "multiple of 8"]);
    check(latents(2, 64), Element::Bf16, &["2 keys"]);
}
