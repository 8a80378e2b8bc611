use super::*;
use crate::{
    cpu::scheme::widen_e4m3,
    cuda::kernels::{
        LinearShape,
        tests::{Memory, close, floats, halves, noise, noises, pack, run},
    },
    model::decoder::Activation,
};

/// A linear without operands.
fn linear(element: Element, outputs: usize, inputs: usize, rows: usize, finish: Finish) -> Linear {
    Linear {
        element,
        shape: LinearShape::new(outputs, inputs, finish.is_gated(), 1),
        rows: rows as u32,
        weights: 0,
        bias: 0,
        input: 0,
        input_stride: 0,
        to: 0,
        to_stride: outputs.next_multiple_of(64) as u32,
        finish,
        partial: 0,
        counters: 0,
        codes: None,
        most_shared: 0,
        pairs: None,
        deltas: None,
    }
}

#[test]
fn weights_are_laid_out_output_after_output() {
    for (element, outputs, inputs) in
        [(Element::Bf16, 64, 32), (Element::Bf16, 130, 300), (Element::F16, 64, 31), (Element::Bf16, 320, 1000)]
    {
        let weights: Vec<f32> = noises(1, outputs * inputs).into_iter().map(|value| element.round(value)).collect();
        let packed = pack(element, &weights, outputs, inputs);
        let linear = Linear { weights: packed.address(), ..linear(element, outputs, inputs, 1, Finish::Store) };
        let (all, width) = (outputs.next_multiple_of(64), inputs.next_multiple_of(32));
        let value = |index: usize| {
            let (output, input) = (index / width, index % width);
            if output < outputs && input < inputs { weights[output * inputs + input] } else { 0.0 }
        };
        let expected: Vec<u16> = (0..all * width).map(|index| element.narrow(value(index))).collect();
        assert_eq!(halves(&run(&vec![0xff; all * width * 2], |to| linear.lay(to, None))), expected);
        // As it is done: some panels at a time.
        for (first, panels) in [(0, 1), (all as u32 / 64 - 1, 1)] {
            let part = panels as usize * 64 * width;
            let left = run(&vec![0xff; part * 2], |to| linear.part(first, panels).lay(to, None));
            assert_eq!(halves(&left), &expected[first as usize * 64 * width..][..part], "panel {first}");
        }
    }
}

#[test]
fn rows_are_rounded_to_eight_bits_of_their_largest() {
    let (rows, width, stride) = (5, 320, 328);
    for (element, integers) in
        [(Element::Bf16, false), (Element::Bf16, true), (Element::F16, false), (Element::F16, true)]
    {
        let mut from: Vec<f32> =
            (0..rows * stride).map(|at| element.round(noise(1, at) * (at / stride) as f32)).collect();
        // The first is of zeros, and the last has a number that is none.
        from[4 * stride + 17] = f32::NAN;
        let stored = Memory::of_halves(&from.iter().map(|value| element.narrow(*value)).collect::<Vec<_>>());
        let narrow = Narrow {
            element,
            rows: rows as u32,
            from: stored.address(),
            to: 0,
            scales: 0,
            width: width as u32,
            stride: stride as u32,
            integers,
        };
        // Scales stand behind the rows.
        let left = run(&vec![0xff; rows * (width + 4)], |to| {
            Narrow { to, scales: to + (rows * width) as u64, ..narrow }.call()
        });
        let (codes, scales) = left.split_at(rows * width);
        let (most, scales) = (if integers { 127.0 } else { 448.0 }, floats(scales));
        assert!(codes[..width].iter().all(|code| code & 0x7f == 0) && scales[4].is_nan());
        for row in 1..4 {
            let from = &from[row * stride..][..width];
            let largest = from.iter().map(|value| value.abs()).fold(0.0, f32::max);
            assert_eq!(scales[row], largest / most);
            for (code, from) in codes[row * width..].iter().zip(from) {
                let found = scales[row] * if integers { f32::from(*code as i8) } else { widen_e4m3(*code) };
                // Half of a last place: of four bits, or of the smallest there are.
                let error = if integers { 0.5001 * scales[row] } else { (from.abs() / 15.9).max(scales[row] / 1000.0) };
                assert!((found - from).abs() <= error, "{element:?} {integers}: {from} is {found}");
            }
        }
    }
}

/// What a linear is to make of `sums`, `[rows][outputs]`.
fn ended(finish: Finish, bias: &[f32], before: f32, sums: &[f64], width: usize) -> Vec<f64> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let row = |sums: &[f64]| -> Vec<f64> {
        let sums: Vec<f64> = sums.iter().zip(bias).map(|(sum, bias)| sum + f64::from(*bias)).collect();
        match finish {
            Finish::Store | Finish::Narrow => sums,
            Finish::Add => sums.iter().map(|sum| sum + f64::from(before)).collect(),
            Finish::Activate(_) => sums.iter().map(|sum| silu(*sum)).collect(),
            Finish::Gate(_) => {
                let panel = |panel: &[f64]| (0..32).map(|at| silu(panel[at]) * panel[32 + at]).collect::<Vec<_>>();
                sums.chunks_exact(64).flat_map(panel).collect()
            }
        }
    };
    sums.chunks_exact(width).flat_map(row).collect()
}

#[test]
fn sums_end_as_those_of_a_linear() {
    let (rows, width, element, before) = (7, 192, Element::Bf16, 0.5);
    let silu = Activation::Silu;
    let (bias, row_scales, scales) = (noises(1, width), noises(2, rows), noises(3, width));
    let stored = [&bias, &row_scales, &scales].map(|values| Memory::of_floats(values));
    for finish in [Finish::Store, Finish::Add, Finish::Gate(silu), Finish::Activate(silu)] {
        for (integers, scaled, biased) in
            [(false, false, true), (false, true, false), (true, true, true), (false, true, true)]
        {
            let sums: Vec<f32> = (0..rows * width).map(|at| (noise(4, at) * 3000.0).round() / 1000.0).collect();
            let whole: Vec<u32> = sums.iter().map(|sum| (sum * 100.0) as i32 as u32).collect();
            let memory = if integers { Memory::of_words(&whole) } else { Memory::of_floats(&sums) };
            let value = |at: usize| if integers { f64::from(whole[at] as i32) } else { f64::from(sums[at]) };
            let scale = |at: usize| match scaled {
                true => f64::from(row_scales[at / width]) * f64::from(scales[at % width]),
                false => 1.0,
            };
            let exact: Vec<f64> = (0..rows * width).map(|at| value(at) * scale(at)).collect();
            let none = vec![0.0; width];
            let expected = ended(finish, if biased { &bias } else { &none }, before, &exact, width);
            let linear = Linear {
                bias: if biased { stored[0].address() } else { 0 },
                ..linear(element, width, 32, rows, finish)
            };
            let sums = Sums {
                from: memory.address(),
                integers,
                row_scales: if scaled { stored[1].address() } else { 0 },
                scales: stored[2].address(),
            };
            let to_width = expected.len() / rows;
            let linear = Linear { to_stride: to_width as u32, ..linear };
            let wide = matches!(finish, Finish::Store | Finish::Add);
            let start: Vec<u8> = match wide {
                true => vec![before; rows * to_width].iter().flat_map(|value| value.to_le_bytes()).collect(),
                false => vec![0xff; rows * to_width * 2],
            };
            let left = run(&start, |to| Linear { to, ..linear }.end(&sums));
            let (got, tolerance) = match wide {
                true => (floats(&left), 1e-5),
                false => (halves(&left).into_iter().map(|bits| element.wide(bits)).collect(), 5e-3),
            };
            close(&format!("{finish:?} {integers} {scaled} {biased}"), &got, &expected, tolerance);
        }
    }
}
