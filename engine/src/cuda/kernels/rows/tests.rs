use super::*;
use crate::cuda::kernels::tests::{Memory, close, floats, halves, noise, noises, pack, run, run_floats, words};
use crate::{
    cpu::{
        packed::Packed,
        scheme::{Code, QuantizedRow, Scheme},
    },
    cuda::kernels::Draw,
    home::FOUND,
};
use half::f16;

const ELEMENTS: [Element; 2] = [Element::Bf16, Element::F16];

#[test]
fn embeddings_are_looked_up_in_every_table() {
    for element in ELEMENTS {
        let (vocab, width, stride) = (100, 72, 128);
        let table: Vec<f32> = noises(1, vocab * width).into_iter().map(|value| element.round(value)).collect();
        // The last two rows take what was found; what is no token counts as the first.
        let tokens = Memory::of_words(&[0, 99, 64, 7, 7, FOUND | 1, FOUND]);
        let found = Memory::of_words(&[Draw::UNDECIDED, 31]);
        let narrow: Vec<u16> = table.iter().map(|value| element.narrow(*value)).collect();
        let tables = [
            (Table::Rows, Memory::of_halves(&narrow)),
            (Table::Floats, Memory::of_floats(&table)),
            (Table::Panels, pack(element, &table, vocab, width)),
        ];
        for (kind, memory) in &tables {
            let embed = Embed {
                element,
                rows: 7,
                tokens: tokens.address(),
                found: found.address(),
                vocab: vocab as u32,
                table: memory.address(),
                to: 0,
                width: width as u32,
                stride: stride as u32,
                kind: *kind,
                scale: 1.5,
            };
            let got = run_floats(7 * stride, |to| Embed { to, ..embed }.call());
            for (row, token) in [0, 99, 64, 7, 7, 31, 0].into_iter().enumerate() {
                let expected = (0..stride).map(|at| if at < width { table[token * width + at] * 1.5 } else { 0.0 });
                assert!(got[row * stride..][..stride].iter().copied().eq(expected), "{element:?} {kind:?} row {row}");
            }
        }
    }
}

#[test]
fn embeddings_that_are_codes_are_those_of_the_processor() {
    let (vocab, width, stride) = (100, 300, 320);
    for (code, group, narrow, offsets) in [
        (Code::Int4, 32, true, false),
        (Code::Int4, 32, false, true),
        (Code::Int8, 32, true, false),
        (Code::Int8, 16, false, true),
        (Code::Int8, 304, false, false),
        (Code::Fp8, 128, false, false),
    ] {
        let scheme = Scheme { code, group, narrow, offsets, narrow_inputs: false };
        let read = |token: usize, row: &mut QuantizedRow| {
            let highest = if code == Code::Int4 { 16.0 } else { 255.0 };
            let any = |salt: u64, at: usize| (noise(salt, token * width + at) + 1.0) / 2.0;
            row.codes.iter_mut().enumerate().for_each(|(at, code)| *code = (any(1, at) * highest) as u8);
            if code == Code::Fp8 {
                // Those that are no numbers have no place.
                row.codes.iter_mut().for_each(|code| *code &= 0xf7);
            }
            row.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = f16::from_f32(any(2, at)).to_f32());
            row.offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = any(3, at));
            token < vocab
        };
        let packed = Packed::pack_quantized(scheme, 2, width, 1, None, &read).expect("memory");
        let tokens = Memory::of_words(&[0, 99, 64, FOUND]);
        let found = Memory::of_words(&[31]);
        let embed = Embed {
            element: Element::Bf16,
            rows: 4,
            tokens: tokens.address(),
            found: found.address(),
            vocab: vocab as u32,
            table: packed.panel(0) as u64,
            to: 0,
            width: width as u32,
            stride: stride as u32,
            kind: Table::Codes(Codes::new(&packed).expect("codes that kernels know")),
            scale: 1.5,
        };
        let got = run_floats(4 * stride, |to| Embed { to, ..embed }.call());
        let mut expected = vec![0.0; stride];
        for (row, token) in [0, 99, 64, 31].into_iter().enumerate() {
            packed.column(token, &mut expected[..width]);
            expected[..width].iter_mut().for_each(|value| *value *= 1.5);
            assert!(got[row * stride..][..stride] == expected, "{scheme:?} row {row}");
            expected.fill(0.0);
        }
    }
}

/// The definition, in f64.
fn exact(kind: Option<NormKind>, row: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let wide: Vec<f64> = row.iter().map(|value| f64::from(*value)).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let middle = if kind == Some(NormKind::Layer) { mean(&wide) } else { 0.0 };
    let squares: Vec<f64> = wide.iter().map(|value| (value - middle).powi(2)).collect();
    let scale = 1.0 / (mean(&squares) + 1e-5).sqrt();
    let one = |(at, value): (usize, &f64)| match kind {
        None => *value,
        Some(_) => (value - middle) * scale * f64::from(weight[at]) + bias.map_or(0.0, |bias| f64::from(bias[at])),
    };
    wide.iter().enumerate().map(one).collect()
}

#[test]
fn rows_are_normed_as_defined() {
    for element in ELEMENTS {
        for width in [1usize, 7, 64, 130, 1000, 4096] {
            let (rows, stride) = (3, width.next_multiple_of(64));
            let from: Vec<f32> =
                (0..rows * stride).map(|at| if at % stride < width { 2.0 * noise(3, at) + 0.5 } else { 0.0 }).collect();
            let (weight, bias) = (noises(4, width), noises(5, width));
            let memories = [&from, &weight, &bias].map(|values| Memory::of_floats(values));
            for (kind, with_bias) in [
                (None, false),
                (Some(NormKind::Rms), false),
                (Some(NormKind::Layer), false),
                (Some(NormKind::Layer), true),
            ] {
                let norm = Norm {
                    element,
                    rows: rows as u32,
                    from: memories[0].address(),
                    weight: memories[1].address(),
                    bias: if with_bias { memories[2].address() } else { 0 },
                    to: 0,
                    width: width as u32,
                    from_stride: stride as u32,
                    to_stride: stride as u32,
                    kind,
                    eps: 1e-5,
                    into: NormTo::Store,
                };
                let stored = halves(&run(&vec![0xff; rows * stride * 2], |to| Norm { to, ..norm }.call()));
                let before = noises(6, rows * stride);
                let bytes: Vec<u8> = before.iter().flat_map(|value| value.to_le_bytes()).collect();
                let added = floats(&run(&bytes, |to| Norm { to, into: NormTo::Add, ..norm }.call()));
                for row in 0..rows {
                    let name = format!("{element:?} {kind:?} bias {with_bias} width {width} row {row}");
                    let values = &from[row * stride..][..width];
                    let expected = exact(kind, values, &weight, with_bias.then_some(&bias[..]));
                    let at = row * stride..row * stride + width;
                    let got: Vec<f32> = stored[at.clone()].iter().map(|bits| element.wide(*bits)).collect();
                    close(&name, &got, &expected, 4.1e-3);
                    assert!(stored[at.end..(row + 1) * stride].iter().all(|bits| *bits == 0), "{name}: padding");
                    let sums: Vec<f64> =
                        expected.iter().zip(&before[at.clone()]).map(|(a, b)| a + f64::from(*b)).collect();
                    close(&name, &added[at.clone()], &sums, 1e-5);
                    assert_eq!(added[at.end..(row + 1) * stride], before[at.end..(row + 1) * stride], "{name}: beyond");
                }
            }
        }
    }
}

#[test]
fn rows_are_kept_in_the_order_that_is_asked() {
    let (from, rows) = (Memory::of_words(&(0..700).collect::<Vec<_>>()), Memory::of_words(&[6, 0, 3]));
    let gather = Gather { kept: 3, from: from.address(), rows: rows.address(), to: 0, stride: 100 };
    let got = words(&run(&[0xff; 1200], |to| Gather { to, ..gather }.call()));
    assert!(got.into_iter().eq([600, 0, 300].into_iter().flat_map(|first| first..first + 100)));
}

#[test]
fn inputs_are_brought_into_another_order() {
    let (width, stride) = (601u32, 608u32);
    let from = Memory::of_halves(&(0..2 * stride as u16).collect::<Vec<_>>());
    let order: Vec<u32> = (0..width).map(|at| at * 7 % width).collect();
    let list = Memory::of_words(&order);
    let call = Reorder { rows: 2, from: from.address(), order: list.address(), to: 0, width, stride };
    let got = halves(&run(&[0xff; 2 * 608 * 2], |to| Reorder { to, ..call }.call()));
    for (row, got) in got.chunks_exact(stride as usize).enumerate() {
        let expected = (0..stride as usize).map(|at| order.get(at).map_or(0, |from| row as u16 * 608 + *from as u16));
        assert!(got.iter().copied().eq(expected), "row {row}");
    }
}

#[test]
fn logits_are_scaled_and_capped() {
    let (rows, columns, stride) = (2, 5000, 5056);
    let logits: Vec<f32> = noises(8, rows * stride).into_iter().map(|value| value * 60.0).collect();
    let before: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
    for cap in [None, Some(30.0f32)] {
        let call = Cap { rows: 2, logits: 0, stride: stride as u32, columns: columns as u32, scale: 0.5, cap };
        let got = floats(&run(&before, |logits| Cap { logits, ..call }.call()));
        let one = |logit: f32| {
            let logit = f64::from(logit) * 0.5;
            cap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
        };
        for row in 0..rows {
            let at = row * stride..row * stride + columns;
            let expected: Vec<f64> = logits[at.clone()].iter().map(|logit| one(*logit)).collect();
            close(&format!("cap {cap:?}"), &got[at], &expected, 1e-6);
        }
    }
}

#[test]
fn the_largest_is_the_lowest_of_equals() {
    let check = |row: &[f32], expected: u32| {
        // A second row, so that strides count; what stands beyond the columns is larger.
        let (columns, stride) = (row.len(), row.len() + 3);
        let padded: Vec<f32> = [row, &[9e9; 3], row, &[9e9; 3]].concat();
        let logits = Memory::of_floats(&padded);
        let call = Largest { rows: 2, logits: logits.address(), to: 0, stride: stride as u32, columns: columns as u32 };
        let got = words(&run(&[0; 8], |to| Largest { to, ..call }.call()));
        assert_eq!(got, [expected; 2], "of {columns}");
    };
    check(&[1.0], 0);
    check(&[f32::NAN; 40], u32::MAX);
    check(&[f32::NAN, f32::NEG_INFINITY, f32::NAN], u32::MAX);
    check(&[f32::NEG_INFINITY; 2000], u32::MAX);
    check(&[f32::NEG_INFINITY, f32::MIN], 1);
    let mut row = noises(9, 5000);
    (row[17], row[1041], row[4999]) = (f32::NAN, 2.0, 2.0);
    check(&row, 1041);
    row[3] = f32::INFINITY;
    check(&row, 3);
}

#[test]
fn parts_are_put_side_by_side() {
    let (rows, parts, part_stride, part_width) = (3, 4, 64, 20);
    // The third part has but ten columns, the last none.
    for width in [80, 50] {
        let to_stride = 128;
        let values: Vec<f32> = (0..rows * parts * part_stride).map(|at| at as f32).collect();
        let narrow: Vec<u16> = (0..values.len() as u16).collect();
        let (floats_in, halves_in) = (Memory::of_floats(&values), Memory::of_halves(&narrow));
        let join = Join {
            rows: rows as u32,
            parts: parts as u32,
            from: floats_in.address(),
            part_stride: part_stride as u32,
            part_width: part_width as u32,
            to: 0,
            width: width as u32,
            to_stride: to_stride as u32,
            into: JoinTo::Floats,
        };
        let source = |row: usize, at: usize| (at / part_width * rows + row) * part_stride + at % part_width;
        let all = || (0..rows).flat_map(|row| (0..to_stride).map(move |at| (row, at)));
        let expected = |there: f32| -> Vec<f32> {
            let value = |(row, at)| if at < width { there + values[source(row, at)] } else { there };
            all().map(value).collect()
        };
        let zeros = vec![0; rows * to_stride * 4];
        assert_eq!(floats(&run(&zeros, |to| Join { to, ..join }.call())), expected(0.0));
        let there = 0.5f32.to_le_bytes().repeat(rows * to_stride);
        assert_eq!(floats(&run(&there, |to| Join { to, into: JoinTo::Sums, ..join }.call())), expected(0.5));
        let (from, stale) = (halves_in.address(), vec![0xff; rows * to_stride * 2]);
        let joined = run(&stale, |to| Join { from, to, into: JoinTo::Halves, ..join }.call());
        let value = |(row, at)| if at < width { narrow[source(row, at)] } else { 0 };
        assert_eq!(halves(&joined), all().map(value).collect::<Vec<u16>>());
    }
}
