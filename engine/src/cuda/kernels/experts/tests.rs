use super::*;
use crate::{
    cpu::{
        packed::{PANEL, Packed},
        scheme::{Code, QuantizedRow, Scheme},
    },
    cuda::kernels::{
        Codes, Finish, Linear, LinearShape,
        tests::{Memory, close, floats, noise, noises, pack, run, words},
    },
    model::{decoder::Activation, routing::Choice},
};

const PADDING: u32 = u32::MAX;

#[test]
fn rows_choose_as_on_the_processor() {
    let plain =
        Routing { experts: 6, chosen: 2, scoring: Scoring::Softmax, groups: None, normalise: false, scale: 1.0 };
    let groups = |count, kept, best| Some(Groups { count, kept, best });
    let (sigmoid, normalise) = (Scoring::Sigmoid, true);
    check_choose(&plain, false);
    check_choose(&Routing { experts: 128, chosen: 8, normalise, ..plain.clone() }, false);
    check_choose(&Routing { experts: 40, chosen: 40, scale: 2.5, ..plain.clone() }, false);
    check_choose(&Routing { experts: 1, chosen: 1, ..plain.clone() }, false);
    check_choose(&Routing { experts: 100, chosen: 5, scoring: sigmoid, normalise, ..plain.clone() }, true);
    check_choose(&Routing { experts: 64, chosen: 6, groups: groups(8, 3, 1), scale: 16.0, ..plain.clone() }, false);
    let v3 = Routing { experts: 96, chosen: 8, scoring: sigmoid, groups: groups(48, 5, 2), normalise, ..plain };
    check_choose(&v3, true);
}

fn check_choose(routing: &Routing, corrected: bool) {
    let (rows, used, experts, chosen) = (7, 5, routing.experts, routing.chosen);
    let stride = experts + 3;
    let mut logits = noises(1, rows * stride);
    // Equal scores: of pairs of neighbours, and of all.
    (0..experts).for_each(|at| logits[stride + at] = noise(2, at / 2));
    logits[2 * stride..3 * stride].fill(0.25);
    let correction = noises(3, experts);
    let stored = [Memory::of_floats(&logits), Memory::of_floats(&correction), Memory::of_words(&[used as u32])];
    // Experts, and behind them weights.
    let got = words(&run(&vec![0xee; rows * chosen * 8], |to| {
        let (logits, used) = (stored[0].address(), stored[2].address());
        let correction = if corrected { stored[1].address() } else { 0 };
        let weights = to + (rows * chosen * 4) as u64;
        let (rows, stride) = (rows as u32, stride as u32);
        Choose { routing, rows, logits, stride, correction, experts: to, weights, used }.call()
    }));
    let (got_experts, got_weights) = got.split_at(rows * chosen);
    for row in 0..used {
        let mut scores = logits[row * stride..][..experts].to_vec();
        let (mut ranks, mut choices) = (vec![0.0; routing.ranks()], vec![Choice::default(); chosen]);
        routing.choose(&mut scores, corrected.then_some(&correction[..]), &mut ranks, &mut choices);
        let wanted: Vec<u32> = choices.iter().map(|choice| choice.expert).collect();
        assert_eq!(got_experts[row * chosen..][..chosen], wanted, "row {row} of {routing:?}");
        let weights: Vec<f32> =
            got_weights[row * chosen..][..chosen].iter().map(|bits| f32::from_bits(*bits)).collect();
        let wanted: Vec<f64> = choices.iter().map(|choice| f64::from(choice.weight)).collect();
        close(&format!("row {row} of {routing:?}"), &weights, &wanted, 1e-6);
    }
    assert!(got_experts[used * chosen..].iter().all(|expert| *expert == PADDING), "padding goes nowhere");
}

#[test]
fn what_is_not_a_number_does_no_harm() {
    let routing =
        Routing { experts: 40, chosen: 3, scoring: Scoring::Softmax, groups: None, normalise: true, scale: 1.0 };
    let (logits, used) = (Memory::of_floats(&[f32::NAN; 40]), Memory::of_words(&[1]));
    let (logits, used) = (logits.address(), used.address());
    let got = words(&run(&[0xee; 24], |to| {
        let (routing, weights) = (&routing, to + 12);
        Choose { routing, rows: 1, logits, stride: 40, correction: 0, experts: to, weights, used }.call()
    }));
    assert!(got[..3].iter().all(|expert| *expert < 40), "{got:?}");
}

fn cut(pairs: usize, experts: usize, rows: usize) -> Cut {
    Cut { rows: rows as u32, count: pairs.min(pairs / rows + experts) as u32 }
}

/// Groups `choices`, the expert of each pair, and returns the list and the tiles.
fn group(choices: &[u32], experts: usize, cut: Cut) -> (Vec<u32>, Vec<[u32; 3]>) {
    let (stored, pairs) = (Memory::of_words(choices), choices.len());
    let left = words(&run(&vec![0xee; pairs * 4 + cut.count as usize * 12], |to| {
        let (list, tiles, expert_count) = (to, to + (pairs * 4) as u64, experts as u32);
        Group { experts: stored.address(), pairs: pairs as u32, expert_count, cut, list, tiles }.call()
    }));
    let (list, tiles) = left.split_at(pairs);
    (list.to_vec(), tiles.as_chunks::<3>().0.to_vec())
}

/// Choices of which some experts have many and some none.
fn choices(pairs: usize, experts: usize) -> Vec<u32> {
    (0..pairs).map(|pair| ((noise(5, pair).powi(2) * experts as f32) as u32).min(experts as u32 - 1)).collect()
}

#[test]
fn pairs_are_listed_by_expert_and_then_by_row() {
    for (pairs, experts) in [(1, 1), (2, 8), (8, 128), (300, 5), (700, 128), (2500, 40)] {
        for rows in [16, 32, 64, 128] {
            let mut choices = choices(pairs, experts);
            if pairs > 20 {
                choices[pairs - 6..].fill(PADDING);
            }
            let (list, tiles) = group(&choices, experts, cut(pairs, experts, rows));
            let choices = &choices;
            let wanted: Vec<u32> = (0..experts as u32)
                .flat_map(|expert| (0..pairs as u32).filter(move |pair| choices[*pair as usize] == expert))
                .collect();
            assert_eq!(list[..wanted.len()], wanted, "{pairs} pairs of {experts} experts");
            // Tiles are those pairs, in order, each of one expert and none too high.
            let mut next = 0;
            for [expert, first, count] in tiles.into_iter().filter(|[_, _, count]| *count > 0) {
                assert_eq!(first, next, "{pairs} pairs of {experts} experts in {rows}");
                assert!(count as usize <= rows);
                let own = &list[first as usize..][..count as usize];
                assert!(own.iter().all(|pair| choices[*pair as usize] == expert));
                next += count;
            }
            assert_eq!(next as usize, wanted.len());
        }
    }
}

#[test]
fn an_expert_has_few_tiles() {
    // No expert is read twice where none has more pairs than a tile.
    let choices: Vec<u32> = (0..64).map(|pair| pair * 7 % 16).collect();
    let (_, tiles) = group(&choices, 16, Cut::new(64, 16, 128));
    assert_eq!(tiles.iter().filter(|[_, _, count]| *count > 0).count(), 16);
}

#[test]
fn tiles_grow_with_what_an_expert_has() {
    let check = |pairs, experts, most, rows, count| {
        assert_eq!(Cut::new(pairs, experts, most), Cut { rows, count }, "{pairs} pairs of {experts} experts");
        assert!(count as usize <= Cut::most_count(pairs, experts));
    };
    // A row of Qwen3 30B, a batch, and prompts; Mixtral.
    check(8, 128, 128, 16, 8);
    check(64 * 8, 128, 128, 16, 160);
    check(512 * 8, 128, 128, 64, 192);
    check(8192 * 8, 128, 128, 128, 640);
    check(8192 * 8, 128, 32, 32, 2176);
    check(64 * 2, 8, 128, 32, 12);
}

#[test]
fn outcomes_are_added_in_the_order_of_choices() {
    let (rows, used, chosen, stride) = (4, 3, 3, 320);
    let (outcomes, weights, before) =
        (noises(1, rows * chosen * stride), noises(2, rows * chosen), noises(3, rows * stride));
    let stored = [Memory::of_floats(&outcomes), Memory::of_floats(&weights), Memory::of_words(&[used as u32])];
    let bytes: Vec<u8> = before.iter().flat_map(|value| value.to_le_bytes()).collect();
    let left = floats(&run(&bytes, |to| {
        let [outcomes, weights, used] = [0, 1, 2].map(|at: usize| stored[at].address());
        Mix { rows: rows as u32, chosen: chosen as u32, outcomes, weights, to, used, stride: stride as u32 }.call()
    }));
    for (at, (left, before)) in left.iter().zip(&before).enumerate() {
        let (row, column) = (at / stride, at % stride);
        let outcome = |choice: usize| outcomes[(row * chosen + choice) * stride + column];
        let add = |sum: f32, choice: usize| weights[row * chosen + choice].mul_add(outcome(choice), sum);
        let sum = if row < used { before + (0..chosen).fold(0.0, add) } else { *before };
        assert!(*left == sum, "row {row}, column {column}: {left} is not {sum}");
    }
}

/// Compares what `linear`, of all experts, makes of pairs with what each row alone makes with an expert's weights: the same bits.
fn check_pairs(
    name: &str,
    linear: &Linear,
    expert_bytes: u64,
    (rows, chosen, experts): (usize, usize, usize),
    cut_rows: usize,
) {
    let pairs = rows * chosen;
    let choices = choices(pairs, experts);
    let cut = cut(pairs, experts, cut_rows);
    let (list, tiles) = group(&choices, experts, cut);
    let (list, tiles) = (Memory::of_words(&list), Memory::of_words(tiles.as_flattened()));
    let width = if linear.finish == Finish::Store { 4 } else { 2 } * linear.to_stride as usize;
    for sharers in [chosen, 1] {
        // Rows are shared by their pairs, or pairs have rows of their own.
        let inputs = pairs / sharers;
        let (list, tiles) = (list.address(), tiles.address());
        let grouped = Pairs { cut, list, tiles, expert_bytes, sharers: sharers as u32, width: None };
        let got = run(&vec![0xee; pairs * width], |to| {
            Linear { rows: pairs as u32, to, pairs: Some(grouped), ..*linear }.call()
        });
        for expert in 0..experts {
            let weights = linear.weights + expert as u64 * expert_bytes;
            // Sixteen rows at a time, which no other way computes.
            for first in (0..inputs).step_by(16) {
                let count = 16.min(inputs - first);
                let input = linear.input + (first * linear.input_stride as usize * 2) as u64;
                let alone = run(&vec![0xee; count * width], |to| {
                    Linear { rows: count as u32, weights, input, to, ..*linear }.call()
                });
                for pair in first * sharers..(first + count) * sharers {
                    let row = pair / sharers - first;
                    let same = got[pair * width..][..width] == alone[row * width..][..width];
                    assert!(
                        same || choices[pair] as usize != expert,
                        "{name}: pair {pair} of expert {expert} in {cut:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_pair_has_the_bits_of_its_row_alone_with_its_expert() {
    let (rows, chosen, experts, inputs, outputs) = (70, 3, 5, 200, 128);
    let element = Element::Bf16;
    let weights = noises(1, experts * outputs * inputs);
    let packed = pack(element, &weights, experts * outputs, inputs);
    let stride = inputs.next_multiple_of(32);
    let input: Vec<u16> = (0..rows * chosen * stride)
        .map(|at| element.narrow(if at % stride < inputs { noise(2, at) } else { 0.0 }))
        .collect();
    let input = Memory::of_halves(&input);
    for (gated, finish) in [(false, Finish::Store), (true, Finish::Gate(Activation::Silu))] {
        let shape = LinearShape::new(outputs, inputs, gated, chosen);
        assert!(shape.splits > 1, "{shape:?}");
        let linear = Linear {
            element,
            shape,
            rows: 0,
            weights: packed.address(),
            bias: 0,
            input: input.address(),
            input_stride: stride as u32,
            to: 0,
            to_stride: (outputs / if gated { 2 } else { 1 }) as u32,
            finish,
            partial: 0,
            counters: 0,
            codes: None,
            most_shared: 227 << 10,
            pairs: None,
            deltas: None,
        };
        let expert_bytes = (outputs * inputs.next_multiple_of(32) * 2) as u64;
        for (cut_rows, most_shared) in [(16, 227), (32, 227), (64, 227), (128, 227), (128, 163)] {
            let linear = Linear { most_shared: most_shared << 10, ..linear };
            check_pairs(&format!("{finish:?}"), &linear, expert_bytes, (rows, chosen, experts), cut_rows);
        }
    }
}

#[test]
fn so_has_a_pair_whose_expert_is_codes() {
    check_codes(Code::Int4, 32);
    check_codes(Code::Int8, 16);
}

fn check_codes(code: Code, group: usize) {
    let (rows, chosen, experts, inputs, panels) = (24, 2, 3, 300, 2);
    let scheme = Scheme { code, group, narrow: true, offsets: true, narrow_inputs: false };
    let read = |output: usize, row: &mut QuantizedRow| {
        row.codes
            .iter_mut()
            .enumerate()
            .for_each(|(at, code)| *code = ((noise(1, output * inputs + at) + 1.0) * 8.0) as u8);
        row.scales
            .iter_mut()
            .enumerate()
            .for_each(|(at, scale)| *scale = half::f16::from_f32(noise(2, output * 32 + at) / 64.0).to_f32());
        row.offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = noise(3, output * 32 + at));
        true
    };
    let packed = Packed::pack_quantized(scheme, experts * panels, inputs, 1, None, &read).expect("memory");
    let codes = Codes::new(&packed).expect("codes that the kernel knows");
    let stride = inputs.next_multiple_of(32);
    let input: Vec<u16> = (0..rows * chosen * stride)
        .map(|at| Element::Bf16.narrow(if at % stride < inputs { noise(4, at) } else { 0.0 }))
        .collect();
    let input = Memory::of_halves(&input);
    let linear = Linear {
        element: Element::Bf16,
        shape: codes.shape(panels, false, chosen),
        rows: 0,
        weights: packed.panel(0) as u64,
        bias: 0,
        input: input.address(),
        input_stride: stride as u32,
        to: 0,
        to_stride: (panels * PANEL) as u32,
        finish: Finish::Store,
        partial: 0,
        counters: 0,
        codes: Some(codes),
        most_shared: 227 << 10,
        pairs: None,
        deltas: None,
    };
    for cut_rows in [16, 32] {
        check_pairs("codes", &linear, (panels * packed.panel_bytes()) as u64, (rows, chosen, experts), cut_rows);
    }
}
