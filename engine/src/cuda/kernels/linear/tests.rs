use super::*;
use crate::cuda::kernels::tests::{Memory, close, floats, halves, noises, pack, run, run_floats};

struct Case {
    element: Element,
    outputs: usize,
    inputs: usize,
    rows: usize,
    weights: Vec<f32>,
    input: Vec<f32>,
    bias: Vec<f32>,
    packed: Memory,
    stored_input: Memory,
    stored_bias: Memory,
    stride: usize,
}

impl Case {
    fn new(element: Element, outputs: usize, inputs: usize, rows: usize) -> Self {
        let round = |values: Vec<f32>| -> Vec<f32> { values.into_iter().map(|value| element.round(value)).collect() };
        let (weights, input) = (round(noises(1, outputs * inputs)), round(noises(2, rows * inputs)));
        let stride = inputs.next_multiple_of(32) + 64;
        let mut padded = vec![0u16; rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(input.chunks_exact(inputs)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = element.narrow(*from));
            // What stands beyond the last step is never read as an input.
            to[inputs.next_multiple_of(32)..].fill(0x7fff);
        }
        let bias = noises(3, outputs.next_multiple_of(64));
        Self {
            packed: pack(element, &weights, outputs, inputs),
            stored_input: Memory::of_halves(&padded),
            stored_bias: Memory::of_floats(&bias),
            stride,
            ..Self { element, outputs, inputs, rows, weights, input, bias, ..Self::empty() }
        }
    }

    fn empty() -> Self {
        let nothing = || Memory::of_bytes(&[]);
        Self {
            element: Element::Bf16,
            outputs: 0,
            inputs: 0,
            rows: 0,
            weights: vec![],
            input: vec![],
            bias: vec![],
            packed: nothing(),
            stored_input: nothing(),
            stored_bias: nothing(),
            stride: 0,
        }
    }

    fn linear(&self, gated: bool) -> Linear {
        let shape = LinearShape::new(self.outputs, self.inputs, gated, 1);
        Linear {
            element: self.element,
            shape,
            rows: self.rows as u32,
            weights: self.packed.address(),
            bias: 0,
            input: self.stored_input.address(),
            input_stride: self.stride as u32,
            to: 0,
            to_stride: shape.panels * 64,
            finish: Finish::Store,
            partial: 0,
            counters: 0,
            codes: None,
            most_shared: WIDE_SHARED,
            pairs: None,
            deltas: None,
        }
    }

    /// The definition, in f64, bias included: `[rows][outputs]`.
    fn exact(&self) -> Vec<f64> {
        let output = |row: &[f32], output: usize| -> f64 {
            let weights = &self.weights[output * self.inputs..][..self.inputs];
            let products = row.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>() + f64::from(self.bias[output])
        };
        let row = |row| (0..self.outputs).map(move |index| output(row, index));
        self.input.chunks_exact(self.inputs).flat_map(row).collect()
    }
}

/// Every way to compute `linear`.
fn ways(linear: &Linear) -> Vec<Way> {
    let mut ways = Vec::new();
    if linear.rows <= 16 {
        ways.push(Way::Stream { tiles: 1 });
    }
    if linear.rows <= 32 {
        ways.push(Way::Stream { tiles: 2 });
    }
    for tiling in [FEW, MANY, MANY_NARROW] {
        ways.extend([false, true].map(|apart| Way::Tiled { tiling, apart: apart && linear.shape.splits > 1 }));
    }
    ways
}

/// Runs a linear in one way, with room for its partial sums.
fn run_way(linear: &Linear, way: Way, before: &[u8]) -> Vec<u8> {
    let mut counters = Memory::of_bytes(&vec![0; Linear::most_counters() as usize * 4]);
    let partial = Memory::of_bytes(&vec![0xff; 4 << 20]);
    let left = run(before, |to| {
        Linear { to, partial: partial.address(), counters: counters.address(), ..*linear }.call_by(way)
    });
    assert!(counters.bytes().iter().all(|byte| *byte == 0), "counters are left as they were found");
    left
}

/// Outputs, inputs, rows: whole panels, steps and tiles, and one more or less.
const SHAPES: [(usize, usize, usize); 8] = [
    (64, 32, 1),
    (64, 31, 2),
    (80, 48, 9),
    (200, 100, 16),
    (64, 300, 17),
    (330, 64, 33),
    (64, 520, 70),
    (576, 96, 140),
];

#[test]
fn outputs_are_sums_of_products_whatever_the_way() {
    for element in [Element::Bf16, Element::F16] {
        let shapes: &[(usize, usize, usize)] = match element {
            Element::Bf16 => &SHAPES,
            Element::F16 => &[(80, 48, 9), (64, 520, 70)],
        };
        for &(outputs, inputs, rows) in shapes {
            let case = Case::new(element, outputs, inputs, rows);
            let linear = Linear { bias: case.stored_bias.address(), ..case.linear(false) };
            let (width, expected) = (linear.to_stride as usize, case.exact());
            let mut first: Option<Vec<u8>> = None;
            for way in ways(&linear) {
                let name = format!("{element:?} {outputs}x{inputs} of {rows} rows by {way:?}");
                let left = run_way(&linear, way, &vec![0xff; rows * width * 4]);
                let got: Vec<f32> = floats(&left).chunks_exact(width).flat_map(|row| row[..outputs].to_vec()).collect();
                close(&name, &got, &expected, 1e-5);
                assert!(first.get_or_insert_with(|| left.clone()) == &left, "{name}: other bits");
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let case = Case::new(Element::Bf16, 192, 1100, 150);
    let linear = case.linear(false);
    let width = linear.to_stride as usize;
    assert!(linear.shape.splits > 1, "{:?}", linear.shape);
    let all = run_floats(150 * width, |to| {
        Linear { to, partial: 0, ..linear }.call_by(Way::Tiled { tiling: MANY, apart: false })
    });
    for (first, rows) in [(0, 1), (149, 1), (77, 5), (3, 16), (90, 33), (40, 64)] {
        let some = Linear { rows, input: linear.input + (first * case.stride * 2) as u64, ..linear };
        let mut counters = Memory::of_bytes(&vec![0; Linear::most_counters() as usize * 4]);
        let partial = Memory::of_bytes(&vec![0; some.partial_bytes() as usize]);
        let got = run_floats(rows as usize * width, |to| {
            Linear { to, partial: partial.address(), counters: counters.address(), ..some }.call()
        });
        assert!(counters.bytes().iter().all(|byte| *byte == 0));
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&all[first * width..][..got.len()]), "{rows} rows from {first}");
    }
}

#[test]
fn sums_are_added_gated_and_activated() {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let gelu_tanh =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
    for rows in [1, 20, 40, 70] {
        let case = Case::new(Element::Bf16, 256, 96, rows);
        let linear = Linear { bias: case.stored_bias.address(), ..case.linear(true) };
        let sums = case.exact();
        for way in ways(&linear) {
            let before = noises(7, rows * 256);
            let bytes: Vec<u8> = before.iter().flat_map(|value| value.to_le_bytes()).collect();
            let added = floats(&run_way(&Linear { finish: Finish::Add, ..linear }, way, &bytes));
            let expected: Vec<f64> = sums.iter().zip(&before).map(|(sum, before)| sum + f64::from(*before)).collect();
            close(&format!("add {rows} {way:?}"), &added, &expected, 1e-5);

            let wide = |bytes: Vec<u8>| -> Vec<f32> {
                halves(&bytes).into_iter().map(|bits| case.element.wide(bits)).collect()
            };
            let activate = Linear { finish: Finish::Activate(Activation::GeluTanh), ..linear };
            let expected: Vec<f64> = sums.iter().map(|sum| gelu_tanh(*sum)).collect();
            close(
                &format!("activate {rows} {way:?}"),
                &wide(run_way(&activate, way, &vec![0xff; rows * 512])),
                &expected,
                4e-3,
            );

            let gate = Linear { finish: Finish::Gate(Activation::Silu), to_stride: 128, ..linear };
            let gated = |index: usize| {
                let (row, column) = (index / 128, index % 128);
                let at = row * 256 + column / 32 * 64 + column % 32;
                silu(sums[at]) * sums[at + 32]
            };
            let expected: Vec<f64> = (0..rows * 128).map(gated).collect();
            close(
                &format!("gate {rows} {way:?}"),
                &wide(run_way(&gate, way, &vec![0xff; rows * 256])),
                &expected,
                8e-3,
            );
        }
    }
}

#[test]
fn gelu_is_the_exact_one() {
    let case = Case::new(Element::F16, 64, 32, 3);
    let linear =
        Linear { finish: Finish::Activate(Activation::Gelu), bias: case.stored_bias.address(), ..case.linear(false) };
    let got: Vec<f32> = halves(&run_way(&linear, linear.way(), &[0xff; 3 * 128]))
        .into_iter()
        .map(|bits| case.element.wide(bits))
        .collect();
    // erf by its series.
    let erf = |x: f64| {
        let term = |n: i32| {
            (-1f64).powi(n) * x.powi(2 * n + 1) / ((2 * n + 1) as f64 * (1..=n).map(f64::from).product::<f64>())
        };
        2.0 / std::f64::consts::PI.sqrt() * (0..60).map(term).sum::<f64>()
    };
    let expected: Vec<f64> = case.exact().iter().map(|x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))).collect();
    close("gelu", &got, &expected, 6e-4);
}

#[test]
fn blocks_fit_their_device() {
    for (rows, splits, most_shared) in
        [(40, 8, 163 << 10), (300, 8, 163 << 10), (40, 8, WIDE_SHARED), (300, 8, WIDE_SHARED)]
    {
        let shape = LinearShape { panels: 64, steps: 128, splits };
        let empty = Case::empty();
        let linear = Linear { shape, rows, most_shared, input_stride: 4096, to_stride: 4096, ..empty.linear(false) };
        for apart in [false, true] {
            let Way::Tiled { tiling, .. } = linear.way() else { panic!("{rows} rows are many") };
            let call = linear.call_by(Way::Tiled { tiling, apart });
            assert!(call.shared_bytes <= most_shared, "{} bytes for {rows} rows of {most_shared}", call.shared_bytes);
        }
    }
}

#[test]
fn runs_depend_on_the_shape_of_the_weights() {
    let check_experts = |chosen, outputs, inputs, gated, splits| {
        assert_eq!(
            LinearShape::new(outputs, inputs, gated, chosen).splits,
            splits,
            "{chosen} times {outputs} x {inputs}"
        );
    };
    let check = |outputs, inputs, gated, splits| check_experts(1, outputs, inputs, gated, splits);
    // Llama 3.1 8B: output and down, q/k/v, gate and up, head.
    check(4096, 4096, false, 8);
    check(4096, 14336, false, 8);
    check(6144, 4096, false, 8);
    check(28672, 4096, true, 2);
    check(128_256, 4096, false, 1);
    // Experts of Qwen3 30B and of Mixtral 8x7B.
    check_experts(8, 1536, 2048, true, 4);
    check_experts(8, 2048, 768, false, 4);
    check_experts(2, 28672, 4096, true, 1);
    check_experts(2, 4096, 14336, false, 8);
    // Runs are not shorter than a step, and pairs of half panels not split.
    check(64, 64, false, 2);
    check(64, 4096, true, 4);
}
