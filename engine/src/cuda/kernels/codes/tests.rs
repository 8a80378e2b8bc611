use super::*;
use crate::{
    cpu::scheme::{QuantizedRow, Scheme},
    cuda::kernels::{
        Element, Finish, Linear,
        tests::{Memory, close, floats, halves, noise, run, run_floats},
    },
};

struct Case {
    element: Element,
    inputs: usize,
    packed: Packed,
    /// `[outputs][inputs]`.
    weights: Vec<f32>,
    input: Vec<f32>,
    stored: Memory,
    stride: usize,
}

impl Case {
    fn new(element: Element, scheme: Scheme, outputs: usize, inputs: usize, rows: usize) -> Self {
        let groups = scheme.groups(inputs);
        let read = |output: usize, row: &mut QuantizedRow| {
            if output >= outputs {
                return false;
            }
            let codes = match scheme.code {
                Code::Int4 => 16,
                _ => 256,
            };
            for (at, code) in row.codes.iter_mut().enumerate() {
                let any = ((noise(1, output * inputs + at) + 1.0) * codes as f32 / 2.0) as u8;
                // The two e4m3 that are no numbers have no place.
                *code = if scheme.code == Code::Fp8 && any & 0x7f == 0x7f { 0x7e } else { any };
            }
            let size = if scheme.code == Code::Fp8 { 1.0 / 64.0 } else { 1.0 / codes as f32 };
            for group in 0..groups {
                let scale = (noise(2, output * groups + group) + 1.5) * size;
                row.scales[group] = if scheme.narrow { half::f16::from_f32(scale).to_f32() } else { scale };
                if scheme.offsets {
                    row.offsets[group] = noise(3, output * groups + group);
                }
            }
            true
        };
        let packed = Packed::pack_quantized(scheme, outputs.div_ceil(PANEL), inputs, 1, None, &read).expect("memory");
        let mut weights = vec![0.0; outputs * inputs];
        weights.chunks_exact_mut(inputs).enumerate().for_each(|(output, row)| packed.column(output, row));
        let input: Vec<f32> = (0..rows * inputs).map(|at| element.round(noise(4, at))).collect();
        let stride = inputs.next_multiple_of(32) + 8;
        let mut padded = vec![0u16; rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(input.chunks_exact(inputs)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = element.narrow(*from));
        }
        Self { element, inputs, packed, weights, input, stored: Memory::of_halves(&padded), stride }
    }

    fn linear(&self, first: usize, rows: usize) -> Linear {
        let codes = Codes::new(&self.packed).expect("codes that the kernel knows");
        let shape = codes.shape(self.packed.panels(), false, 1);
        Linear {
            element: self.element,
            shape,
            rows: rows as u32,
            weights: self.packed.panel(0) as u64,
            bias: 0,
            input: self.stored.address() + (first * self.stride * 2) as u64,
            input_stride: self.stride as u32,
            to: 0,
            to_stride: shape.panels * 64,
            finish: Finish::Store,
            partial: 0,
            counters: 0,
            codes: Some(codes),
            most_shared: 0,
            pairs: None,
            deltas: None,
        }
    }

    fn run(&self, first: usize, rows: usize) -> Vec<f32> {
        let linear = self.linear(first, rows);
        run_floats(rows * linear.to_stride as usize, |to| Linear { to, ..linear }.call())
    }
}

fn scheme(code: Code, group: usize, narrow: bool, offsets: bool) -> Scheme {
    Scheme { code, group, narrow, offsets, narrow_inputs: false }
}

fn check(element: Element, scheme: Scheme, outputs: usize, inputs: usize, rows: usize) {
    let case = Case::new(element, scheme, outputs, inputs, rows);
    let width = case.packed.panels() * PANEL;
    let got = case.run(0, rows);
    let name = format!("{element:?} {scheme:?} {outputs}x{inputs} of {rows} rows");
    for (row, input) in case.input.chunks_exact(case.inputs).enumerate() {
        let output = |weights: &[f32]| weights.iter().zip(input).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        let expected: Vec<f64> = case.weights.chunks_exact(case.inputs).map(output).collect();
        close(&name, &got[row * width..][..outputs], &expected, 3e-5);
    }
}

#[test]
fn outputs_are_sums_of_products_of_weights() {
    for element in [Element::Bf16, Element::F16] {
        for code in [Code::Int4, Code::Int8, Code::Fp8] {
            let offsets = if code == Code::Fp8 { &[false][..] } else { &[false, true] };
            for &offsets in offsets {
                check(element, scheme(code, 32, true, offsets), 70, 96, 3);
                check(element, scheme(code, 128, false, offsets), 64, 300, 40);
            }
        }
    }
    // Two groups of a step; the last step has but one, or half of one.
    for (element, offsets) in [(Element::Bf16, false), (Element::Bf16, true), (Element::F16, true)] {
        check(element, scheme(Code::Int8, 16, !offsets, offsets), 70, 304, 3);
        check(element, scheme(Code::Int8, 16, offsets, offsets), 64, 300, 40);
    }
    check(Element::Bf16, Scheme::per_output(Code::Int8, 520), 130, 520, 17);
    check(Element::Bf16, Scheme::per_output(Code::Fp8, 68), 64, 68, 1);
    check(Element::Bf16, scheme(Code::Int4, 64, true, true), 64, 1000, 33);
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    for (code, group, offsets) in
        [(Code::Int4, 32, true), (Code::Int4, 128, false), (Code::Int8, 16, true), (Code::Int8, 4096, false)]
    {
        let case = Case::new(Element::Bf16, scheme(code, group, false, offsets), 192, 1100, 40);
        let width = case.packed.panels() * PANEL;
        assert!(case.linear(0, 1).shape.splits > 1);
        let all = case.run(0, 40);
        for (first, rows) in [(0, 1), (39, 1), (5, 16), (7, 33)] {
            let got = case.run(first, rows);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&all[first * width..][..got.len()]), "{code:?} {rows} rows from {first}");
        }
    }
}

#[test]
fn what_the_kernel_cannot_do_is_said() {
    let problem = |code: Code, group: usize| {
        let zeros = |_: usize, _: &mut QuantizedRow| false;
        let packed = Packed::pack_quantized(scheme(code, group, true, false), 1, 64, 1, None, &zeros).expect("memory");
        Codes::new(&packed).expect_err("not possible")
    };
    assert!(problem(Code::Int4, 16).contains("int4 in groups of 16"));
    assert!(problem(Code::Fp8, 16).contains("fp8 in groups of 16"));
    assert!(problem(Code::Int8, 24).contains("int8 in groups of 24"));
}

#[test]
fn weights_are_laid_out_widened() {
    for (element, scheme) in [
        (Element::Bf16, scheme(Code::Int4, 32, true, false)),
        (Element::Bf16, scheme(Code::Int4, 128, true, true)),
        (Element::F16, scheme(Code::Int4, 64, false, true)),
        (Element::Bf16, scheme(Code::Int8, 32, true, true)),
        (Element::Bf16, scheme(Code::Int8, 16, false, true)),
        (Element::F16, scheme(Code::Int8, 16, false, false)),
        (Element::F16, scheme(Code::Int8, 4096, false, false)),
        (Element::Bf16, scheme(Code::Fp8, 128, false, false)),
    ] {
        let (outputs, inputs) = (70, 300);
        let case = Case::new(element, scheme, outputs, inputs, 1);
        let (all, width) = (case.packed.panels() * PANEL, inputs.next_multiple_of(32));
        let left = halves(&run(&vec![0xff; all * width * 2], |to| case.linear(0, 1).lay(to, None)));
        for (output, weights) in case.weights.chunks_exact(inputs).enumerate() {
            for (input, (found, weight)) in left[output * width..].iter().zip(weights).enumerate() {
                let error = (element.wide(*found) - weight).abs();
                assert!(
                    error <= weight.abs() / 256.0 + 1e-6,
                    "{scheme:?}: {weight} of {output}, {input} is off by {error}"
                );
            }
        }
    }
}

#[test]
fn weights_of_eight_bits_are_laid_out_as_they_are() {
    for (code, operand) in [(Code::Fp8, Operand::E4m3), (Code::Int8, Operand::Int8)] {
        let (outputs, inputs) = (130, 68);
        let scheme = Scheme { narrow_inputs: true, ..Scheme::per_output(code, inputs) };
        let case = Case::new(Element::Bf16, scheme, outputs, inputs, 1);
        let linear = case.linear(0, 1);
        assert_eq!(linear.codes.and_then(|codes| codes.operand()), Some(operand));
        let (all, width) = (case.packed.panels() * PANEL, inputs.next_multiple_of(32));
        // Scales stand behind the weights.
        let left = run(&vec![0xff; all * (width + 4)], |to| linear.lay(to, Some(to + (all * width) as u64)));
        let (codes, scales) = left.split_at(all * width);
        let scales = floats(scales);
        for (output, weights) in case.weights.chunks_exact(inputs).enumerate() {
            for (bits, weight) in codes[output * width..].iter().zip(weights) {
                let value = if code == Code::Fp8 { Code::Fp8.value(*bits) } else { f32::from(*bits as i8) };
                let error = (scales[output] * value - weight).abs();
                assert!(error <= weight.abs() * 1e-5 + 1e-6, "{code:?}: {weight} of {output} is off by {error}");
            }
        }
    }
    // Other integers are beside inputs of 16 bits, and so is what has several scales.
    for scheme in [Scheme::per_output(Code::Int8, 64), scheme(Code::Fp8, 32, false, false)] {
        let case = Case::new(Element::Bf16, scheme, 64, 64, 1);
        assert_eq!(case.linear(0, 1).codes.and_then(|codes| codes.operand()), None);
    }
}
