use super::*;
use crate::cuda::kernels::{
    Cut, Finish, Group, Linear, LinearShape, Pairs,
    pages::tests::{EVERY, put},
    tests::{Memory, close, halves, noise, noises, pack, run},
};
use kv_cache::{KvDtype, PageLayout};

fn layout(dtype: KvDtype, dim: usize, pages: u32) -> PageLayout {
    PageLayout { layers: 2, page_tokens: 16, kv_heads: 1, key_dim: dim as u32, value_dim: 0, dtype, pages }
}

/// Cosines and sines of `positions` times `pairs`.
fn angles(positions: usize, pairs: usize) -> Vec<f32> {
    (0..positions * pairs).flat_map(|at| [(at as f32).cos(), (at as f32).sin()]).collect()
}

/// Turns pairs of neighbours by the angles of `position`.
fn turned(values: &[f32], angles: &[f32], position: usize) -> Vec<f32> {
    let own = angles[position * values.len()..].as_chunks::<2>().0;
    let turn = |([a, b], [cosine, sine]): (&[f32; 2], &[f32; 2])| [a * cosine - b * sine, b * cosine + a * sine];
    values.as_chunks::<2>().0.iter().zip(own).flat_map(turn).collect()
}

fn check_keys(dtype: KvDtype, element: Element, rank: usize, turning: usize) {
    let (layout, rows, before) = (layout(dtype, rank + turning, 70), 3, 20);
    let stride = before + rank + turning + 7;
    let entry: Vec<f32> = (0..rows * stride).map(|at| noise(1, at) * 3.0).collect();
    let (positions, slots) = ([5usize, 0, 9], [[3u32, 5], [69, 0], [7, 9]]);
    let (angles, norm) = (angles(10, turning / 2), noises(2, rank));
    let memory = [
        Memory::of_floats(&entry),
        Memory::of_words(&positions.map(|position| position as u32)),
        Memory::of_words(slots.as_flattened()),
        Memory::of_floats(&angles),
        Memory::of_floats(&norm),
    ];
    let pool = run(&vec![0xaa; layout.pool_bytes()], |to| {
        let keys = LatentKeys {
            element,
            rows: rows as u32,
            from: memory[0].address() + before as u64 * 4,
            stride: stride as u32,
            positions: memory[1].address(),
            slots: memory[2].address(),
            angles: memory[3].address(),
            norm: memory[4].address(),
            rank: rank as u32,
            eps: 1e-6,
            pages: Pages::new(&layout, element, to, 1).expect("pages"),
        };
        keys.call()
    });
    let mut expected = vec![0xaa; layout.pool_bytes()];
    for row in 0..rows {
        let (latent, turns) = entry[row * stride + before..][..rank + turning].split_at(rank);
        let square = latent.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / rank as f64;
        let scale = 1.0 / (square + 1e-6).sqrt();
        let normed =
            latent.iter().zip(&norm).map(|(value, norm)| (f64::from(*value) * scale * f64::from(*norm)) as f32);
        let key: Vec<f32> = normed.chain(turned(turns, &angles, positions[row])).collect();
        put(&mut expected, &layout, element, layout.keys(), slots[row], 0, &key);
    }
    // Rounding may fall to the other side where the sum differs in its last bit: codes by one, and rarely.
    let name = format!("{dtype} {element:?} {rank} and {turning}");
    let differ = pool.iter().zip(&expected).filter(|(a, b)| a != b).count();
    assert!(differ * 50 <= rows * (rank + turning), "{name}: {differ} bytes differ");
    let far = pool.iter().zip(&expected).filter(|(a, b)| a.abs_diff(**b) > 1 && a.abs_diff(**b) < 255).count();
    assert_eq!(far, 0, "{name}");
}

#[test]
fn latents_are_normed_and_what_turns_is_written_behind_them() {
    for (dtype, element) in EVERY {
        check_keys(dtype, element, 40, 16);
        check_keys(dtype, element, 512, 64);
    }
}

#[test]
fn queries_are_parted() {
    for (element, heads, width, turning, rank) in [(Element::Bf16, 4, 24, 16, 40), (Element::F16, 11, 128, 64, 72)] {
        let (rows, stride) = (3, heads * (width + turning) + 5);
        let (from, angles) = (noises(1, rows * stride), angles(10, turning / 2));
        let (positions, kept) = ([7u32, 5, 0, 9], [1u32, 3, 2]);
        let memory = [
            Memory::of_floats(&from),
            Memory::of_words(&positions),
            Memory::of_words(&kept),
            Memory::of_floats(&angles),
        ];
        let plain_stride = width.next_multiple_of(32);
        let (plain_count, key) = (rows * heads * plain_stride, rank + turning);
        for chosen in [false, true] {
            // Both outputs, one behind the other.
            let left = halves(&run(&vec![0xee; (plain_count + rows * heads * key) * 2], |to| {
                let queries = LatentQueries {
                    element,
                    count: rows as u32,
                    from: memory[0].address(),
                    stride: stride as u32,
                    heads: heads as u32,
                    width: width as u32,
                    turning: turning as u32,
                    rows: if chosen { memory[2].address() } else { 0 },
                    positions: memory[1].address(),
                    angles: memory[3].address(),
                    plain: to,
                    plain_stride: plain_stride as u32,
                    q: to + plain_count as u64 * 2,
                    rank: rank as u32,
                };
                queries.call()
            }));
            let (plain, q) = left.split_at(plain_count);
            for row in 0..rows {
                let position = positions[if chosen { kept[row] as usize } else { row }] as usize;
                for head in 0..heads {
                    let query = &from[row * stride + head * (width + turning)..][..width + turning];
                    let own = &plain[(row * heads + head) * plain_stride..][..plain_stride];
                    let narrow: Vec<u16> = query[..width].iter().map(|value| element.narrow(*value)).collect();
                    assert_eq!(own[..width], narrow);
                    assert!(own[width..].iter().all(|bits| *bits == 0));
                    let own = &q[(row * heads + head) * key..][..key];
                    assert!(own[..rank].iter().all(|bits| *bits == 0xeeee), "that is a linear's place");
                    let got: Vec<f32> = own[rank..].iter().map(|bits| element.wide(*bits)).collect();
                    let wanted: Vec<f64> =
                        turned(&query[width..], &angles, position).iter().map(|value| f64::from(*value)).collect();
                    close(&format!("row {row} head {head}"), &got, &wanted, 4e-3);
                }
            }
        }
    }
}

#[test]
fn a_linear_by_head_writes_its_width_and_no_more() {
    let (rows, heads, inputs, width, each) = (37, 5, 24, 40, 56);
    let element = Element::Bf16;
    let round = |values: Vec<f32>| -> Vec<f32> { values.into_iter().map(|value| element.round(value)).collect() };
    let (weights, input) = (round(noises(1, heads * width * inputs)), round(noises(2, rows * heads * inputs)));
    // Every head starts on a panel of its own.
    let mut padded = vec![0.0; heads * 64 * inputs];
    let mut stored = vec![0u16; rows * heads * 32];
    for (to, from) in padded.chunks_exact_mut(64 * inputs).zip(weights.chunks_exact(width * inputs)) {
        to[..from.len()].copy_from_slice(from);
    }
    for (to, from) in stored.chunks_exact_mut(32).zip(input.chunks_exact(inputs)) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = element.narrow(*from));
    }
    let (packed, stored) = (pack(element, &padded, heads * 64, inputs), Memory::of_halves(&stored));
    let experts: Vec<u32> = (0..rows * heads).map(|pair| (pair % heads) as u32).collect();
    let experts = Memory::of_words(&experts);
    for cut in [Cut::new(rows * heads, heads, 128), Cut::new(rows * heads, heads, 32)] {
        let listed = run(&vec![0xee; rows * heads * 4 + cut.count as usize * 12], |to| {
            let (list, tiles, pairs) = (to, to + (rows * heads * 4) as u64, (rows * heads) as u32);
            Group { experts: experts.address(), pairs, expert_count: heads as u32, cut, list, tiles }.call()
        });
        let listed = Memory::of_bytes(&listed);
        let (list, tiles) = (listed.address(), listed.address() + (rows * heads * 4) as u64);
        let pairs = Pairs { cut, list, tiles, expert_bytes: 64 * 32 * 2, sharers: 1, width: Some(width as u32) };
        let left = halves(&run(&vec![0xee; rows * heads * each * 2], |to| {
            let linear = Linear {
                element,
                shape: LinearShape::new(64, inputs, false, heads),
                rows: (rows * heads) as u32,
                weights: packed.address(),
                bias: 0,
                input: stored.address(),
                input_stride: 32,
                to,
                to_stride: each as u32,
                finish: Finish::Narrow,
                partial: 0,
                counters: 0,
                codes: None,
                most_shared: 227 << 10,
                pairs: Some(pairs),
                deltas: None,
            };
            linear.call()
        }));
        for (pair, own) in left.chunks_exact(each).enumerate() {
            let from = &input[pair * inputs..][..inputs];
            let product = |output: usize| -> f64 {
                let weights = &weights[(pair % heads * width + output) * inputs..][..inputs];
                weights.iter().zip(from).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let wanted: Vec<f64> = (0..width).map(product).collect();
            let got: Vec<f32> = own[..width].iter().map(|bits| element.wide(*bits)).collect();
            close(&format!("pair {pair} by {cut:?}"), &got, &wanted, 4e-3);
            assert!(own[width..].iter().all(|bits| *bits == 0xeeee), "pair {pair} by {cut:?}");
        }
    }
}

/// Sequences of a step: rows, and position of the first.
struct Case {
    dtype: KvDtype,
    element: Element,
    heads: usize,
    rank: usize,
    turning: usize,
    most_shared: u32,
    sequences: Vec<(usize, usize)>,
}

impl Case {
    fn new(
        dtype: KvDtype,
        element: Element,
        heads: usize,
        sizes: (usize, usize),
        sequences: &[(usize, usize)],
    ) -> Self {
        let (rank, turning) = sizes;
        Self { dtype, element, heads, rank, turning, most_shared: 227 << 10, sequences: sequences.to_vec() }
    }

    fn key(&self) -> usize {
        self.rank + self.turning
    }
}

struct Prepared {
    layout: PageLayout,
    memory: [Memory; 4],
    /// `[rows][heads][key]`.
    q: Vec<f32>,
    /// `[sequence][position][key]`.
    keys: Vec<Vec<f32>>,
    rows: usize,
}

/// Contents depend on the sequence's number alone, whatever page they are in; `numbers` are those of the case's sequences.
fn prepare(case: &Case, numbers: &[usize], backwards: bool) -> Prepared {
    let (heads, key, element) = (case.heads, case.key(), case.element);
    let ends = case.sequences.iter().map(|(rows, start)| rows + start);
    let pages: usize = ends.map(|end| end.div_ceil(16)).sum();
    let layout = layout(case.dtype, key, pages as u32 + 1);
    // What was never written is no number.
    let mut pool = vec![0xff; layout.pool_bytes()];
    let (mut tables, mut sequences, mut q) = (vec![], vec![], vec![]);
    let (mut keys, mut first, mut next) = (vec![], 0, 0);
    for (&(rows, start), &number) in case.sequences.iter().zip(numbers) {
        sequences.extend([first as u32, rows as u32, start as u32, tables.len() as u32]);
        let end = rows + start;
        let place = |at: usize| if backwards { pages - 1 - next - at } else { next + at };
        let table: Vec<u32> = (0..end.div_ceil(16)).map(|at| place(at) as u32).collect();
        next += table.len();
        let mut own = vec![];
        for position in 0..end {
            let slot = [table[position / 16], (position % 16) as u32];
            let vector = (0..key).map(|at| 2.0 * noise(1 + 10 * number as u64, position * key + at));
            own.extend(put(&mut pool, &layout, element, layout.keys(), slot, 0, &vector.collect::<Vec<_>>()));
        }
        let queries = (start * heads * key..end * heads * key).map(|at| 2.0 * noise(3 + 10 * number as u64, at));
        q.extend(queries.map(|value| element.round(value)));
        tables.extend(table);
        keys.push(own);
        first += rows;
    }
    let narrow: Vec<u16> = q.iter().map(|value| element.narrow(*value)).collect();
    let memory =
        [Memory::of_halves(&narrow), Memory::of_words(&sequences), Memory::of_words(&tables), Memory::of_bytes(&pool)];
    Prepared { layout, memory, q, keys, rows: first }
}

fn attention(case: &Case, prepared: &Prepared) -> LatentAttention {
    LatentAttention {
        element: case.element,
        rows: prepared.rows as u32,
        most_rows: case.sequences.iter().map(|(rows, _)| *rows as u32).max().unwrap_or(1),
        longest: case.sequences.iter().map(|(rows, start)| (rows + start) as u32).max().unwrap_or(1),
        q: prepared.memory[0].address(),
        heads: case.heads as u32,
        sequences: prepared.memory[1].address(),
        sequence_count: case.sequences.len() as u32,
        tables: prepared.memory[2].address(),
        to: 0,
        to_stride: case.rank.next_multiple_of(32) as u32,
        rank: case.rank as u32,
        scale: 1.0 / (case.key() as f32).sqrt(),
        pages: Pages::new(&prepared.layout, case.element, prepared.memory[3].address(), 1).expect("pages"),
        states: 0,
        most_shared: case.most_shared,
    }
}

/// Runs both calls and returns the outputs' bits, `[rows * heads][rank]`.
fn attend(call: &LatentAttention) -> Vec<u16> {
    let count = (call.rows * call.heads * call.to_stride) as usize;
    let states = Memory::of_bytes(&vec![0xff; call.state_bytes() as usize]);
    let calls = |to| LatentAttention { to, states: states.address(), ..*call }.calls();
    let mut left = run(&vec![0xee; count * 2], |to| calls(to).0);
    if calls(0).1.is_some() {
        left = run(&vec![0xee; count * 2], |to| calls(to).1.expect("parts are merged"));
    }
    let left = halves(&left);
    let rows = left.chunks_exact(call.to_stride as usize);
    assert!(rows.clone().all(|row| row[call.rank as usize..].iter().all(|bits| *bits == 0xeeee)), "padding stays");
    rows.flat_map(|row| row[..call.rank as usize].to_vec()).collect()
}

/// The definition, in f64.
fn exact(case: &Case, prepared: &Prepared) -> Vec<f64> {
    let (heads, key, rank) = (case.heads, case.key(), case.rank);
    let (mut out, mut row) = (vec![], 0);
    for (index, &(rows, start)) in case.sequences.iter().enumerate() {
        let keys = |at: usize| &prepared.keys[index][at * key..][..key];
        for position in start..start + rows {
            for head in 0..heads {
                let q = &prepared.q[(row * heads + head) * key..][..key];
                let score = |at: usize| {
                    let products = q.iter().zip(keys(at)).map(|(q, k)| f64::from(*q) * f64::from(*k));
                    products.sum::<f64>() / (key as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=position).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = powers.iter().sum();
                let mut own = vec![0.0; rank];
                for (at, power) in powers.into_iter().enumerate() {
                    own.iter_mut().zip(keys(at)).for_each(|(o, v)| *o += power / sum * f64::from(*v));
                }
                out.extend(own);
            }
            row += 1;
        }
    }
    out
}

fn check(case: &Case) {
    let numbers: Vec<usize> = (0..case.sequences.len()).collect();
    let prepared = prepare(case, &numbers, false);
    let got: Vec<f32> = attend(&attention(case, &prepared)).into_iter().map(|bits| case.element.wide(bits)).collect();
    let name = format!("{} {} heads of {}+{} {:?}", case.dtype, case.heads, case.rank, case.turning, case.sequences);
    close(&name, &got, &exact(case, &prepared), if case.element == Element::Bf16 { 8e-3 } else { 1.5e-3 });
}

#[test]
fn queries_see_latents_up_to_their_own() {
    for (dtype, element) in EVERY {
        // Tokens one by one and prompts, in one part and in several.
        check(&Case::new(dtype, element, 4, (40, 16), &[(1, 0), (1, 63), (1, 64), (2, 100)]));
        check(&Case::new(dtype, element, 4, (40, 16), &[(1, 1300), (1, 10), (3, 2050)]));
        check(&Case::new(dtype, element, 4, (40, 16), &[(40, 0), (1, 90), (33, 1010)]));
    }
    for sizes in [(8, 8), (64, 8), (72, 24), (128, 64), (512, 64)] {
        check(&Case::new(KvDtype::Bf16, Element::Bf16, 16, sizes, &[(1, 70), (1, 3)]));
        check(&Case::new(KvDtype::Fp8, Element::Bf16, 20, sizes, &[(9, 5)]));
    }
}

#[test]
fn heads_may_be_of_any_number() {
    for heads in [1, 3, 7, 16, 17, 128] {
        check(&Case::new(KvDtype::Bf16, Element::Bf16, heads, (40, 16), &[(1, 80), (2, 7), (3, 0)]));
        check(&Case::new(KvDtype::Bf16, Element::Bf16, heads, (40, 16), &[(1, 1030), (1, 7)]));
    }
}

#[test]
fn a_token_alone_has_the_bits_it_has_in_a_prompt() {
    for (dtype, heads) in [(KvDtype::Bf16, 4), (KvDtype::Fp8, 20)] {
        let case = |sequences: &[(usize, usize)], most_shared| {
            let sizes = (40, 16);
            Case { most_shared, ..Case::new(dtype, Element::Bf16, heads, sizes, sequences) }
        };
        let prompt = case(&[(70, 1000), (1, 20), (9, 0)], 227 << 10);
        let expected = attend(&attention(&prompt, &prepare(&prompt, &[0, 1, 2], false)));
        let width = heads * 40;
        // A card with less shared memory has one stage of keys.
        for most_shared in [227 << 10, 20 << 10] {
            let check = |sequences: &[(usize, usize)], numbers: &[usize], rows: &[usize]| {
                let some = case(sequences, most_shared);
                let got = attend(&attention(&some, &prepare(&some, numbers, true)));
                for (index, row) in rows.iter().enumerate() {
                    let same = got[index * width..][..width] == expected[row * width..][..width];
                    assert!(same, "{dtype} {heads} heads {sequences:?} row {row}");
                }
            };
            check(&[(1, 1000)], &[0], &[0]);
            check(&[(1, 1069), (1, 20), (1, 1023), (1, 1024)], &[0, 1, 0, 0], &[69, 70, 23, 24]);
            check(&[(2, 1030), (2, 7)], &[0, 2], &[30, 31, 78, 79]);
            check(&[(37, 1020), (1, 8)], &[0, 2], &(20..57).chain([79]).collect::<Vec<_>>());
        }
    }
}
