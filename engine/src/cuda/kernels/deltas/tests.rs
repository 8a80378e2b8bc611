use super::*;
use crate::{
    cuda::kernels::{
        Finish, Linear, LinearShape,
        tests::{Memory, close, floats, halves, noises, pack, run},
    },
    model::decoder::Activation,
};
use std::cell::RefCell;

const STEP: usize = 32;

/// An adapter of one linear: numbers, and how they lie on a device.
struct Adapter {
    ranks: usize,
    down: Vec<f32>,
    scales: Vec<f32>,
    /// `[outputs][ranks]`, zero where an output does not use a rank.
    up: Vec<f32>,
    _stored: [Memory; 4],
    /// Deltas of two linears, of which the first has none.
    deltas: Memory,
}

fn rounded(element: Element, values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|value| element.round(value)).collect()
}

impl Adapter {
    fn new(salt: u64, element: Element, ranks: usize, outputs: usize, inputs: usize) -> Self {
        let (padded, depth) = (ranks.next_multiple_of(Deltas::RANKS), inputs.next_multiple_of(STEP));
        let (down, scales) = (rounded(element, noises(salt, ranks * inputs)), noises(salt + 1, ranks));
        let mut stored_down = vec![0u16; padded * depth];
        for (to, from) in stored_down.chunks_exact_mut(depth).zip(down.chunks_exact(inputs)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = element.narrow(*from));
        }
        let mut stored_scales = scales.clone();
        stored_scales.resize(padded, 0.0);
        let (mut up, mut stored_up, mut halves) = (vec![0.0; outputs * ranks], Vec::new(), Vec::new());
        let factors = rounded(element, noises(salt + 2, outputs * ranks));
        for half in 0..outputs / 32 {
            // Some use the first ranks, some the last, some all and some none.
            let own = [0..ranks.div_ceil(2), ranks / 2..ranks, 0..ranks, 0..0][half % 4].clone();
            halves.extend([own.start as u32, own.len() as u32, stored_up.len() as u32]);
            for rank in own {
                for output in half * 32..half * 32 + 32 {
                    up[output * ranks + rank] = factors[output * ranks + rank];
                    stored_up.push(element.narrow(up[output * ranks + rank]));
                }
            }
        }
        let stored = [
            Memory::of_halves(&stored_down),
            Memory::of_floats(&stored_scales),
            Memory::of_halves(&stored_up),
            Memory::of_words(&halves),
        ];
        let mut words = vec![0; Deltas::WORDS];
        words.extend(stored.iter().map(Memory::address).chain([padded as u64]));
        Self { ranks, down, scales, up, _stored: stored, deltas: memory_of(&words) }
    }

    /// Which of the two linears.
    fn of_second(adapted: &RefCell<Memory>) -> Deltas {
        Deltas { adapted: adapted.borrow().address(), place: 1, first_column: 0 }
    }

    /// The definition, in f64: `scale * A x`.
    fn hidden(&self, row: &[f32]) -> Vec<f64> {
        let product = |(down, scale): (&[f32], &f32)| {
            let sum: f64 = down.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            sum * f64::from(*scale)
        };
        self.down.chunks_exact(row.len()).zip(&self.scales).map(product).collect()
    }

    /// The definition, in f64: `B hidden`.
    fn delta(&self, hidden: &[f32]) -> Vec<f64> {
        let product = |up: &[f32]| up.iter().zip(hidden).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        self.up.chunks_exact(self.ranks).map(product).collect()
    }
}

fn memory_of(words: &[u64]) -> Memory {
    Memory::of_bytes(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
}

/// Says where the numbers of rows are, `stride` each, and which adapters rows have.
fn list(hidden: u64, stride: usize, adapters: &[Option<&Adapter>]) -> RefCell<Memory> {
    let rows = adapters.iter().map(|adapter| adapter.map_or(0, |adapter| adapter.deltas.address()));
    RefCell::new(memory_of(&[hidden, stride as u64].into_iter().chain(rows).collect::<Vec<_>>()))
}

/// Rows `[rows][inputs]`, stored in rows of `stride`, with what is never read behind the last step.
fn stored_rows(element: Element, rows: &[f32], inputs: usize, stride: usize) -> Memory {
    let mut stored = vec![0x7fff; rows.len() / inputs * stride];
    for (to, from) in stored.chunks_exact_mut(stride).zip(rows.chunks_exact(inputs)) {
        to[..inputs.next_multiple_of(STEP)].fill(0);
        to.iter_mut().zip(from).for_each(|(to, from)| *to = element.narrow(*from));
    }
    Memory::of_halves(&stored)
}

#[test]
fn rows_shrink_by_their_own_adapter_or_not_at_all() {
    for (element, inputs, rows) in [(Element::Bf16, 300, 37), (Element::F16, 96, 16), (Element::Bf16, 1000, 70)] {
        let (few, many) = (Adapter::new(1, element, 5, 32, inputs), Adapter::new(5, element, 40, 32, inputs));
        let of_row: Vec<Option<&Adapter>> =
            (0..rows).map(|row| [Some(&few), None, Some(&many)][row * 7 / 5 % 3]).collect();
        let (numbers, stride) = (rounded(element, noises(9, rows * inputs)), inputs.next_multiple_of(STEP) + 64);
        let (stored, width) = (stored_rows(element, &numbers, inputs, stride), 48);
        // The numbers of `count` rows from `first` on.
        let shrunk = |first: usize, count: usize| {
            let adapted = list(0, width, &of_row[first..first + count]);
            let shrink = Shrink {
                element,
                rows: count as u32,
                input: stored.address() + (first * stride * 2) as u64,
                stride: stride as u32,
                steps: inputs.div_ceil(STEP) as u32,
                deltas: Adapter::of_second(&adapted),
            };
            run(&vec![0xff; count * width * 4], |to| {
                adapted.borrow_mut().bytes()[..8].copy_from_slice(&to.to_le_bytes());
                shrink.call()
            })
        };
        let all = shrunk(0, rows);
        for (row, bytes) in all.chunks_exact(width * 4).enumerate() {
            let Some(adapter) = of_row[row] else {
                assert!(bytes.iter().all(|byte| *byte == 0xff), "row {row} has no adapter");
                continue;
            };
            let found = floats(bytes);
            let expected = adapter.hidden(&numbers[row * inputs..][..inputs]);
            close(&format!("{element:?} row {row}"), &found[..adapter.ranks], &expected, 1e-5);
            let padded = adapter.ranks.next_multiple_of(Deltas::RANKS);
            assert!(found[adapter.ranks..padded].iter().all(|number| *number == 0.0));
        }
        for (first, count) in [(0, 1), (3, 1), (rows - 1, 1), (5, 11)] {
            let some = shrunk(first, count);
            assert!(some == all[first * width * 4..][..some.len()], "{count} rows from {first}");
        }
    }
}

#[test]
fn a_linear_s_sums_have_the_deltas_of_their_rows_and_others_nothing() {
    let (element, outputs, inputs, rows, width) = (Element::Bf16, 320, 100, 70, 16);
    let (few, many) = (Adapter::new(1, element, 3, outputs, inputs), Adapter::new(5, element, 14, outputs, inputs));
    let of_row: Vec<Option<&Adapter>> = (0..rows).map(|row| [None, Some(&few), Some(&many)][row % 3]).collect();
    let (weights, numbers) =
        (rounded(element, noises(2, outputs * inputs)), rounded(element, noises(3, rows * inputs)));
    let (packed, stored) = (pack(element, &weights, outputs, inputs), stored_rows(element, &numbers, inputs, 128));
    let hidden = noises(4, rows * width);
    let (stored_hidden, bias) = (Memory::of_floats(&hidden), noises(6, outputs));
    let stored_bias = Memory::of_floats(&bias);
    for (finish, gated) in [
        (Finish::Store, false),
        (Finish::Add, false),
        (Finish::Activate(Activation::Silu), false),
        (Finish::Gate(Activation::Silu), true),
    ] {
        let bytes = match finish {
            Finish::Store | Finish::Add => outputs * 4,
            Finish::Gate(_) => outputs,
            Finish::Activate(_) | Finish::Narrow => outputs * 2,
        };
        // `count` rows from `first` on, by whichever kernel computes so many.
        let computed = |first: usize, count: usize, with: bool| {
            let adapted =
                list(stored_hidden.address() + (first * width * 4) as u64, width, &of_row[first..first + count]);
            let mut linear = Linear {
                element,
                shape: LinearShape::new(outputs, inputs, gated, 1),
                rows: count as u32,
                weights: packed.address(),
                bias: stored_bias.address(),
                input: stored.address() + (first * 256) as u64,
                input_stride: 128,
                to: 0,
                to_stride: if gated { outputs as u32 / 2 } else { outputs as u32 },
                finish,
                partial: 0,
                counters: 0,
                codes: None,
                most_shared: 227 << 10,
                pairs: None,
                deltas: with.then(|| Adapter::of_second(&adapted)),
            };
            let counters = Memory::of_bytes(&vec![0; Linear::most_counters() as usize * 4]);
            let partial = Memory::of_bytes(&vec![0xff; linear.partial_bytes() as usize]);
            (linear.counters, linear.partial) = (counters.address(), partial.address());
            run(&vec![0; count * bytes], |to| Linear { to, ..linear }.call())
        };
        let (all, plain) = (computed(0, rows, true), computed(0, rows, false));
        for row in 0..rows {
            let own = row * bytes..(row + 1) * bytes;
            let Some(adapter) = of_row[row] else {
                assert!(all[own.clone()] == plain[own], "{finish:?}: row {row} has no adapter, but other bits");
                continue;
            };
            let delta = adapter.delta(&hidden[row * width..][..adapter.ranks]);
            let sum = |output: usize| {
                let products = weights[output * inputs..][..inputs].iter().zip(&numbers[row * inputs..]);
                let sum: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                sum + f64::from(bias[output]) + delta[output]
            };
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let wide =
                |bytes: &[u8]| -> Vec<f32> { halves(bytes).into_iter().map(|bits| element.wide(bits)).collect() };
            let name = format!("{finish:?} row {row}");
            match finish {
                Finish::Store | Finish::Add | Finish::Narrow => {
                    close(&name, &floats(&all[own]), &(0..outputs).map(sum).collect::<Vec<_>>(), 1e-5);
                }
                Finish::Activate(_) => {
                    close(&name, &wide(&all[own]), &(0..outputs).map(|at| silu(sum(at))).collect::<Vec<_>>(), 4e-3);
                }
                Finish::Gate(_) => {
                    let gate = |at: usize| silu(sum(at / 32 * 64 + at % 32)) * sum(at / 32 * 64 + 32 + at % 32);
                    close(&name, &wide(&all[own]), &(0..outputs / 2).map(gate).collect::<Vec<_>>(), 8e-3);
                }
            }
        }
        for (first, count) in [(0, 1), (1, 1), (2, 1), (7, 20), (4, 40)] {
            let some = computed(first, count, true);
            assert!(some == all[first * bytes..][..some.len()], "{finish:?}: {count} rows from {first}");
        }
    }
}
