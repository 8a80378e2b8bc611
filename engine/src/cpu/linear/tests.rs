use super::*;
use crate::{
    cpu::{
        buffer::Buffer,
        encode::{self, EncodeTask, Encoding},
        kernels::{Kernels, LinearKernel},
        packed::{Packed, StoredRow, WeightType},
        scheme::{Code, QuantizedRow, Scheme},
        simd::portable::Portable,
    },
    model::checkpoint::ElementType,
};
use half::{bf16, f16};

/// A matrix of weights as stored, and as packed.
struct Weight {
    depth: usize,
    values: Vec<f32>,
    packed: Packed,
}

impl Weight {
    /// One panel of which 50 columns are there.
    fn new(kind: WeightType, depth: usize) -> Self {
        Self::of_columns(kind, depth, 50)
    }

    fn of_columns(kind: WeightType, depth: usize, columns: usize) -> Self {
        let panels = columns.div_ceil(PANEL);
        let mut values: Vec<f32> = (0..columns * depth).map(|index| wave(index, 3)).collect();
        let packed = match kind {
            WeightType::Float(dtype) => {
                values.iter_mut().for_each(|value| *value = rounded(dtype, *value));
                let stored: Vec<u8> = values.iter().flat_map(|value| stored(dtype, *value)).collect();
                let row = |column: usize| {
                    let stride = depth * dtype.bytes();
                    stored.get(column * stride..(column + 1) * stride).map(|bytes| StoredRow { dtype, bytes })
                };
                Packed::pack(dtype, panels, depth, 1, &row)
            }
            WeightType::Quantized(scheme) => {
                let read = |column: usize, row: &mut QuantizedRow| {
                    *row = quantized_row(&scheme, depth, column);
                    column < columns
                };
                for (column, values) in values.chunks_exact_mut(depth).enumerate() {
                    quantized_row(&scheme, depth, column).widen(&scheme, values);
                }
                Packed::pack_quantized(scheme, panels, depth, 1, None, &read)
            }
        };
        Self { depth, values, packed: packed.expect("memory") }
    }

    fn row(&self, column: usize) -> &[f32] {
        self.values.get(column * self.depth..(column + 1) * self.depth).unwrap_or(&[])
    }

    /// Returns the kernel for these weights, and how it reads its inputs; `floats` asks for the one that takes them as they are.
    fn linear(&self, kernels: &Kernels, floats: bool) -> (LinearKernel, Encoding) {
        if !floats {
            return kernels.linear(&self.packed);
        }
        let format = kernels.format([&self.packed].into_iter());
        (kernels.linear_of_floats(&self.packed, format), Encoding::Floats(format))
    }
}

/// Codes, scales and offsets that look random, and weights around -1 ..= 1.
fn quantized_row(scheme: &Scheme, depth: usize, column: usize) -> QuantizedRow {
    let mut row = QuantizedRow::zeroed(scheme, depth);
    let (codes, largest) = match scheme.code {
        Code::Int4 => (16, 16.0),
        Code::Int8 => (256, 256.0),
        Code::Fp8 => (256, 448.0),
    };
    for (index, code) in row.codes.iter_mut().enumerate() {
        let any = ((index * 7919 + column * 104_729) % 2003 % codes) as u8;
        // The two NaNs are not codes.
        *code = if scheme.code == Code::Fp8 && any & 0x7f == 0x7f { 0 } else { any };
    }
    let scale = |group: usize| (1.0 + wave(group, column)) / largest;
    row.scales.iter_mut().enumerate().for_each(|(group, value)| *value = rounded(ElementType::F16, scale(group)));
    row.offsets.iter_mut().enumerate().for_each(|(group, value)| *value = -wave(group, column + 1));
    row
}

/// Every way in which weights are kept.
fn kinds() -> Vec<WeightType> {
    let floats = [ElementType::F32, ElementType::F16, ElementType::Bf16].map(WeightType::Float);
    let mut kinds = floats.to_vec();
    for code in [Code::Int4, Code::Int8, Code::Fp8] {
        for (group, narrow, offsets) in
            [(16, false, true), (32, true, false), (64, true, true), (128, false, false), (1 << 20, false, false)]
        {
            for narrow_inputs in [false, true].into_iter().take(if code == Code::Int8 { 2 } else { 1 }) {
                kinds.push(WeightType::Quantized(Scheme { code, group, narrow, offsets, narrow_inputs }));
            }
        }
    }
    kinds
}

/// A number in -1 ..= 1 that looks random.
fn wave(index: usize, salt: usize) -> f32 {
    ((index * 7919 + salt * 104_729) % 2003) as f32 / 1001.0 - 1.0
}

fn rounded(dtype: ElementType, value: f32) -> f32 {
    match dtype {
        ElementType::F32 => value,
        ElementType::F16 => f16::from_f32(value).to_f32(),
        ElementType::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

fn stored(dtype: ElementType, value: f32) -> Vec<u8> {
    match dtype {
        ElementType::F32 => value.to_le_bytes().to_vec(),
        ElementType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        ElementType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
    }
}

/// Inputs of `rows` rows in `encoding`, with room for whole tiles, and what they stand for; what is beyond the rows is NaN.
fn inputs(encoding: Encoding, rows: usize, depth: usize) -> (Buffer, Vec<f32>) {
    let stride = encoding.stride(depth);
    // One tile more than the rows need, so that a test can start at any row.
    let mut buffer = Buffer::new((rows + 16).next_multiple_of(16) * stride).expect("memory");
    buffer.bytes_mut()[rows * stride..].fill(0xff);
    let mut values = Vec::new();
    let mut from = Buffer::new(Format::F32.stride(depth)).expect("memory");
    for (row, to) in buffer.bytes_mut().chunks_exact_mut(stride).enumerate().take(rows) {
        from.floats_mut()[..depth].iter_mut().enumerate().for_each(|(at, value)| *value = wave(row * depth + at, 5));
        let format = Format::F32;
        let task = EncodeTask { from: from.as_ptr(), format, order: None, depth, to: to.as_mut_ptr(), encoding };
        // SAFETY: both rows are as long as they should be.
        unsafe { encode::run(Portable, &task) };
        let value = |at: usize| match encoding {
            Encoding::Floats(Format::Bf16) => ElementType::Bf16.get(to, at),
            Encoding::Floats(_) => ElementType::F32.get(to, at),
            Encoding::Codes(rows) => {
                let place = at / 4 * 4 + [0, 2, 1, 3][at % 4];
                let code = match rows.narrow {
                    true => i16::from(to[at] as i8),
                    false => i16::from_le_bytes([to[place * 2], to[place * 2 + 1]]),
                };
                f32::from(code) * ElementType::F32.get(&to[rows.scales..], at / rows.segment)
            }
        };
        values.extend((0..depth).map(value));
    }
    (buffer, values)
}

/// Computes one panel and returns its outputs, `[rows][64]`.
fn product(
    (kernel, encoding): (LinearKernel, Encoding),
    weight: &Weight,
    input: &Buffer,
    rows: usize,
    bias: Option<&[f32; PANEL]>,
) -> Vec<f32> {
    let mut scratch = Buffer::new(rows.next_multiple_of(16) * PANEL * 4).expect("memory");
    scratch.bytes_mut().fill(0xff);
    let mut output = Buffer::new(rows * PANEL * 4).expect("memory");
    let task = LinearTask {
        input: input.as_ptr(),
        input_stride: encoding.stride(weight.depth),
        rows,
        depth: weight.depth,
        panel: weight.packed.panel(0),
        panel_bytes: weight.packed.panel_bytes(),
        panels: 1,
        groups: weight.packed.groups(),
        bias: bias.map(std::slice::from_ref),
        adapted: None,
        output: Output::Store { to: output.as_mut_ptr().cast(), stride: PANEL },
    };
    // SAFETY: the buffers hold the rows and end at guard pages; the kernels are available.
    unsafe { kernel(&task, scratch.floats_mut()) };
    output.floats()[..rows * PANEL].to_vec()
}

/// Calls `check` with every kernel of this machine, every way in which weights are kept, and both ways to read inputs.
fn for_each_linear(check: impl Fn(&Kernels, WeightType, bool)) {
    for kernels in Kernels::available() {
        for kind in kinds() {
            check(kernels, kind, false);
            if matches!(kind, WeightType::Quantized(_)) {
                check(kernels, kind, true);
            }
        }
    }
}

#[test]
fn products_are_right_for_all_rows_and_depths() {
    for_each_linear(|kernels, kind, floats| {
        for (rows, depth) in
            [(1, 1), (2, 7), (3, 32), (5, 33), (6, 100), (7, 64), (14, 96), (15, 31), (33, 1100), (49, 2080)]
        {
            let weight = Weight::new(kind, depth);
            let linear = weight.linear(kernels, floats);
            let (input, values) = inputs(linear.1, rows, depth);
            let bias: [f32; PANEL] = std::array::from_fn(|column| column as f32);
            let output = product(linear, &weight, &input, rows, Some(&bias));
            for (row, (output, input)) in output.chunks_exact(PANEL).zip(values.chunks_exact(depth)).enumerate() {
                for (column, output) in output.iter().enumerate() {
                    let terms = input.iter().zip(weight.row(column));
                    let exact: f64 = terms.clone().map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let size: f64 = terms.map(|(a, b)| f64::from(a * b).abs()).sum();
                    let expected = exact + column as f64;
                    let error = (f64::from(*output) - expected).abs();
                    // One sum in one accumulator: each term may add half a unit in the last place.
                    let limit = 6e-8 * (depth + 4) as f64 * (size + column as f64) + 1e-6;
                    assert!(
                        error <= limit,
                        "{} {kind:?} {rows} x {depth}, row {row} column {column}: {output}, expected {expected}",
                        kernels.name
                    );
                }
            }
        }
    });
}

#[test]
fn widened_weights_have_the_bits_of_the_f32_they_stand_for() {
    for kernels in Kernels::available().into_iter().filter(|kernels| kernels.name != "portable") {
        for kind in kinds().into_iter().filter(|kind| matches!(kind, WeightType::Quantized(_))) {
            for (rows, depth) in [(1, 1), (1, 37), (3, 300), (4, 31), (11, 2100), (20, 5000)] {
                let weight = Weight::new(kind, depth);
                let row = |column: usize, row: &mut [f32]| {
                    weight.values.get(column * depth..).is_some_and(|values| {
                        let here = values.len() >= depth;
                        row.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
                        here
                    })
                };
                let packed = Packed::pack_made(1, depth, 1, &row).expect("memory");
                let widened = Weight { packed, depth, values: Vec::new() };
                let encoding = Encoding::Floats(Format::F32);
                let (input, _) = inputs(encoding, rows, depth);
                let ours = product(
                    (kernels.linear_of_floats(&weight.packed, Format::F32), encoding),
                    &weight,
                    &input,
                    rows,
                    None,
                );
                let expected = product(kernels.linear(&widened.packed), &widened, &input, rows, None);
                assert!(
                    ours.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{} {kind:?} {rows} x {depth}",
                    kernels.name
                );
            }
        }
    }
}

#[test]
fn units_agree_to_the_bit_on_integers() {
    let units: Vec<_> = Kernels::available().into_iter().filter(|kernels| kernels.name != "portable").collect();
    for kind in kinds() {
        for (rows, depth) in [(1, 200), (5, 1030), (23, 2100)] {
            let weight = Weight::new(kind, depth);
            let outputs = units.iter().map(|kernels| weight.linear(kernels, false)).filter_map(|linear| {
                let codes = matches!(linear.1, Encoding::Codes(_));
                codes.then(|| product(linear, &weight, &inputs(linear.1, rows, depth).0, rows, None))
            });
            let outputs: Vec<_> = outputs.collect();
            assert!(outputs.iter().all(|output| *output == outputs[0]), "{kind:?} {rows} x {depth}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let depth = 1500;
    for_each_linear(|kernels, kind, floats| {
        let weight = Weight::new(kind, depth);
        let linear = weight.linear(kernels, floats);
        let stride = linear.1.stride(depth);
        let (mut input, _) = inputs(linear.1, TASK_ROWS, depth);
        let all = product(linear, &weight, &input, TASK_ROWS, None);
        for rows in (1usize..40).chain([64, 100]) {
            for first in [0, 16, 80] {
                let mut part = Buffer::new(rows.next_multiple_of(16) * stride).expect("memory");
                part.bytes_mut()[..rows * stride]
                    .copy_from_slice(&input.bytes_mut()[first * stride..][..rows * stride]);
                let some = product(linear, &weight, &part, rows, None);
                let expected = &all[first * PANEL..][..rows * PANEL];
                assert!(
                    some.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{} {kind:?} {floats} {rows} rows from {first}",
                    kernels.name
                );
            }
        }
    });
}

#[test]
fn panels_together_have_the_bits_of_panels_alone() {
    let (depth, rows, panels) = (4100, 33, 3);
    for_each_linear(|kernels, kind, floats| {
        let weight = Weight::of_columns(kind, depth, 150);
        let (kernel, encoding) = weight.linear(kernels, floats);
        let input_stride = encoding.stride(depth);
        let (input, _) = inputs(encoding, rows, depth);
        let bias: Vec<[f32; PANEL]> = (0..panels).map(|panel| [panel as f32; PANEL]).collect();
        let mut scratch = Buffer::new(rows.next_multiple_of(16) * panels * PANEL * 4).expect("memory");
        scratch.bytes_mut().fill(0xff);
        let mut compute = |first: usize, rows: usize, panel: usize, panels: usize| {
            let stride = panels * PANEL;
            let mut output = Buffer::new(rows * stride * 4).expect("memory");
            let task = LinearTask {
                // The last rows of the buffer are padding, so one row alone can be followed by fifteen others.
                input: input.as_ptr().wrapping_add(first * input_stride),
                input_stride,
                rows,
                depth,
                panel: weight.packed.panel(panel),
                panel_bytes: weight.packed.panel_bytes(),
                panels,
                groups: weight.packed.groups(),
                bias: Some(&bias[panel..]),
                adapted: None,
                output: Output::Store { to: output.as_mut_ptr().cast(), stride },
            };
            // SAFETY: the buffers hold the rows and end at guard pages; the kernels are available.
            unsafe { kernel(&task, scratch.floats_mut()) };
            output.floats()[..rows * stride].to_vec()
        };
        let together = compute(0, rows, 0, panels);
        for row in [0, 1, 15, 32] {
            let few = compute(row, 1, 0, panels);
            assert!(few.iter().zip(&together[row * panels * PANEL..]).all(|(a, b)| a.to_bits() == b.to_bits()));
            for panel in 0..panels {
                let alone = compute(row, 1, panel, 1);
                let expected = &together[(row * panels + panel) * PANEL..][..PANEL];
                assert!(
                    alone.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{} {kind:?} row {row} panel {panel}",
                    kernels.name
                );
            }
        }
    });
}

#[test]
fn gates_multiply_activations_and_residuals_add() {
    for kernels in Kernels::available() {
        let weight = Weight::new(WeightType::Float(ElementType::F32), 40);
        let linear = weight.linear(kernels, false);
        let (input, _) = inputs(linear.1, 3, 40);
        let plain = product(linear, &weight, &input, 3, None);
        let run = |output: Output| {
            let mut scratch = Buffer::new(16 * PANEL * 4).expect("memory");
            let task = LinearTask {
                input: input.as_ptr(),
                input_stride: Format::F32.stride(40),
                rows: 3,
                depth: 40,
                panel: weight.packed.panel(0),
                panel_bytes: weight.packed.panel_bytes(),
                panels: 1,
                groups: weight.packed.groups(),
                bias: None,
                adapted: None,
                output,
            };
            // SAFETY: the buffers hold the rows and end at guard pages; the kernels are available.
            unsafe { (linear.0)(&task, scratch.floats_mut()) };
        };
        let (format, silu) = (Format::F32, |x: f32| x / (1.0 + (-x).exp()));
        let tanh = |x: f32| 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh());
        let check = |out: f32, expected: f32| assert!((out - expected).abs() <= 1e-5 * expected.abs() + 1e-6);
        for (activation, exact) in [(Activation::Silu, &silu as &dyn Fn(f32) -> f32), (Activation::GeluTanh, &tanh)] {
            let mut gated = Buffer::new(3 * PANEL / 2 * 4).expect("memory");
            run(Output::Gate { to: gated.as_mut_ptr(), stride: PANEL / 2 * 4, format, activation });
            let mut bent = Buffer::new(3 * PANEL * 4).expect("memory");
            run(Output::Activate { to: bent.as_mut_ptr(), stride: PANEL * 4, format, activation });
            for (row, gated) in gated.floats().chunks_exact(PANEL / 2).enumerate() {
                for (column, gated) in gated.iter().enumerate() {
                    let (gate, up) = (row * PANEL + column, row * PANEL + PANEL / 2 + column);
                    check(*gated, exact(plain[gate]) * plain[up]);
                    check(bent.floats()[gate], exact(plain[gate]));
                    check(bent.floats()[up], exact(plain[up]));
                }
            }
        }
        let mut sum = Buffer::new(3 * PANEL * 4).expect("memory");
        sum.floats_mut().fill(2.0);
        run(Output::Add { to: sum.as_mut_ptr().cast(), stride: PANEL });
        assert!(sum.floats().iter().zip(&plain).all(|(sum, plain)| *sum == plain + 2.0));
    }
}

/// Draws the most likely token from the largest of each panel, and from all outputs.
fn check_largest(kernels: &Kernels, columns: usize, rows: usize, scale: f32, cap: Option<f32>) {
    let (depth, panels) = (3, columns.div_ceil(PANEL));
    let mut values = vec![0.0; columns * depth];
    // Small whole numbers: their sums tie in every panel.
    values.iter_mut().enumerate().for_each(|(index, value)| *value = (wave(index, 3) * 4.0).round());
    let stored: Vec<u8> = values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
    let row = |column: usize| {
        let bytes = stored.get(column * depth * 4..(column + 1) * depth * 4)?;
        Some(StoredRow { dtype: ElementType::F32, bytes })
    };
    let packed = Packed::pack(ElementType::F32, panels, depth, 1, &row).expect("memory");
    let (kernel, encoding) = kernels.linear(&packed);
    let (mut input, _) = inputs(encoding, rows, depth);
    let stride = encoding.stride(depth);
    for (row, values) in input.floats_mut().chunks_exact_mut(stride / 4).take(rows).enumerate() {
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
        for (index, value) in values[..depth].iter_mut().enumerate() {
            *value = (wave(row * depth + index, 11) * 3.0).round();
            if row % 16 == index {
                *value = special[row / 16 % special.len()];
            }
        }
    }
    let mut scratch = Buffer::new(rows.next_multiple_of(16) * panels * PANEL * 4).expect("memory");
    let mut run = |output: Output| {
        let task = LinearTask {
            input: input.as_ptr(),
            input_stride: stride,
            rows,
            depth,
            panel: packed.panel(0),
            panel_bytes: packed.panel_bytes(),
            panels,
            groups: packed.groups(),
            bias: None,
            adapted: None,
            output,
        };
        // SAFETY: the buffers hold the rows and end at guard pages; the kernels are available.
        unsafe { kernel(&task, scratch.floats_mut()) };
    };
    let mut all = Buffer::new(rows * panels * PANEL * 4).expect("memory");
    run(Output::Store { to: all.as_mut_ptr().cast(), stride: panels * PANEL });
    // SAFETY: the kernels are available, and the floats are whole vectors.
    unsafe { (kernels.scale_and_cap)(&mut all.floats_mut()[..rows * panels * PANEL], scale, cap) };
    let mut largest = Buffer::new(rows * panels * size_of::<Largest>()).expect("memory");
    run(Output::Largest { to: largest.as_mut_ptr().cast(), stride: panels, first: 0, columns, scale, cap });
    // SAFETY: the buffer holds as many and was written just above.
    let largest = unsafe { std::slice::from_raw_parts(largest.as_ptr().cast::<Largest>(), rows * panels) };
    for (row, logits) in all.floats().chunks_exact(panels * PANEL).take(rows).enumerate() {
        let mut best = (f32::NEG_INFINITY, None);
        for (column, logit) in logits[..columns].iter().enumerate() {
            best = if *logit > best.0 { (*logit, Some(column as u32)) } else { best };
        }
        let found = Largest::first(&largest[row * panels..][..panels]);
        assert_eq!(found, best.1, "{} row {row} of {columns} columns, {scale}, {cap:?}", kernels.name);
    }
}

#[test]
fn the_largest_output_is_the_one_that_a_look_at_all_finds() {
    for kernels in Kernels::available() {
        for columns in [1, 50, 64, 65, 190] {
            for (scale, cap) in [(1.0, None), (0.3, None), (-1.0, None), (1.0, Some(2.0)), (0.5, Some(30.0))] {
                check_largest(kernels, columns, 7, scale, cap);
                check_largest(kernels, columns, 150, scale, cap);
            }
        }
    }
}

/// `cargo test -p engine -- --ignored --nocapture linear::tests::speed`
#[test]
#[ignore = "prints speeds; asserts nothing"]
fn speed() {
    let kernels = Kernels::detect();
    for kind in kinds() {
        for (rows, depth) in [(1, 2048), (4, 2048), (8, 2048), (16, 2048), (32, 2048), (192, 2048), (192, 8192)] {
            let weight = Weight::new(kind, depth);
            let (kernel, encoding) = weight.linear(kernels, false);
            let (input, _) = inputs(encoding, rows, depth);
            let mut best = f64::INFINITY;
            let mut scratch = Buffer::new(rows.next_multiple_of(16) * PANEL * 4).expect("memory");
            let mut output = Buffer::new(rows * PANEL * 4).expect("memory");
            let task = LinearTask {
                input: input.as_ptr(),
                input_stride: encoding.stride(depth),
                rows,
                depth,
                panel: weight.packed.panel(0),
                panel_bytes: weight.packed.panel_bytes(),
                panels: 1,
                groups: weight.packed.groups(),
                bias: None,
                adapted: None,
                output: Output::Store { to: output.as_mut_ptr().cast(), stride: PANEL },
            };
            for _ in 0..300 {
                let start = std::time::Instant::now();
                // SAFETY: the buffers hold the rows; the kernels are available.
                unsafe { kernel(&task, scratch.floats_mut()) };
                best = best.min(start.elapsed().as_secs_f64());
            }
            let operations = 2.0 * (rows * depth * PANEL) as f64;
            let bytes = weight.packed.panel_bytes() as f64;
            println!(
                "{:12} {kind:?} {rows:3} x {depth}: {:7.1} Gop/s {:6.1} GB/s",
                kernels.name,
                operations / best / 1e9,
                bytes / best / 1e9
            );
        }
    }
}
