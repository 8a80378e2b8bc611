//! Turns blocks of one element type into blocks of another.
//!
//! Done at the source, by its movers: the source's cores compute prompts in large steps and can spare some, the target's decode
//! in small ones; and the target reads what comes straight into its pages whatever the source keeps. Rounding is that of engines:
//! to the nearest, ties to even, and elements of one byte by the same [`ByteCode`], scale included. So a converted page has the bits
//! that the target would have written, had it been given the same keys and values.

use half::{bf16, f16};
use kv_cache::{ByteCode, KvDtype, PageLayout};

/// Appends `block`, a block of `from`, as a block of `to`, which differs in its dtype alone.
pub(crate) fn convert(from: &PageLayout, block: &[u8], to: &PageLayout, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + to.block_bytes(), 0);
    let out = &mut out[start..];
    let rows = (from.kv_heads * from.page_tokens) as usize;
    let planes = [(from.keys(), to.keys(), from.key_dim), (from.values(), to.values(), from.value_dim)];
    for (source, target, dim) in planes.into_iter().filter(|(.., dim)| *dim > 0) {
        let mut values = vec![0.0f32; dim as usize];
        let (read, written) = (values.len() * from.dtype.bytes(), values.len() * to.dtype.bytes());
        for row in 0..rows {
            let scale = &block[source.scales + row * from.dtype.scale_bytes()..][..from.dtype.scale_bytes()];
            widen(from.dtype, &block[source.elements + row * read..][..read], scale, &mut values);
            let (elements, scales) = out.split_at_mut(target.scales);
            let scale = &mut scales[row * to.dtype.scale_bytes()..][..to.dtype.scale_bytes()];
            narrow(to.dtype, &values, &mut elements[target.elements + row * written..][..written], scale);
        }
    }
}

fn widen(dtype: KvDtype, elements: &[u8], scale: &[u8], values: &mut [f32]) {
    match dtype {
        KvDtype::F32 => each(elements, values, f32::from_le_bytes),
        KvDtype::Bf16 => each(elements, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        KvDtype::F16 => each(elements, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
        KvDtype::Fp8 | KvDtype::Int8 => {
            let scale = bf16::from_le_bytes([scale[0], scale[1]]).to_f32();
            let value = |[byte]: [u8; 1]| if dtype == KvDtype::Int8 { f32::from(byte as i8) } else { widen_e4m3(byte) };
            each(elements, values, |byte| value(byte) * scale);
        }
    }
}

fn narrow(dtype: KvDtype, values: &[f32], elements: &mut [u8], scale: &mut [u8]) {
    match dtype {
        KvDtype::F32 => fill(elements, values, f32::to_le_bytes),
        KvDtype::Bf16 => fill(elements, values, |value| bf16::from_f32(value).to_le_bytes()),
        KvDtype::F16 => fill(elements, values, |value| f16::from_f32(value).to_le_bytes()),
        KvDtype::Fp8 => narrow_byte(ByteCode::E4m3, values, elements, scale),
        KvDtype::Int8 => narrow_byte(ByteCode::Int8, values, elements, scale),
    }
}

fn narrow_byte(code: ByteCode, values: &[f32], elements: &mut [u8], scale: &mut [u8]) {
    let unit = code.scale(values);
    scale.copy_from_slice(&bf16::from_bits((unit.to_bits() >> 16) as u16).to_le_bytes());
    code.encode(values, unit, elements);
}

fn each<const N: usize>(elements: &[u8], values: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    let (elements, _) = elements.as_chunks();
    elements.iter().zip(values).for_each(|(element, value)| *value = read(*element));
}

fn fill<const N: usize>(elements: &mut [u8], values: &[f32], write: impl Fn(f32) -> [u8; N]) {
    let (elements, _) = elements.as_chunks_mut();
    elements.iter_mut().zip(values).for_each(|(element, value)| *element = write(*value));
}

/// Returns a finite e4m3 (arXiv 2209.05433, table 1): four exponent bits with a bias of 7, three of the significand.
fn widen_e4m3(byte: u8) -> f32 {
    let magnitude = f32::from_bits((u32::from(byte) & 0x7f) << 20);
    // The exponent is too small by 120; multiplying also makes normal numbers of subnormal ones.
    magnitude * f32::from_bits((127 + 120) << 23) * if byte < 0x80 { 1.0 } else { -1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(dtype: KvDtype) -> PageLayout {
        PageLayout { layers: 1, page_tokens: 3, kv_heads: 2, key_dim: 5, value_dim: 4, dtype, pages: 0 }
    }

    fn values(count: usize) -> impl Strategy<Value = Vec<f32>> {
        proptest::collection::vec(prop_oneof![-9.0f32..9.0, -1e-3f32..1e-3, Just(0.0), Just(-1e30), Just(448.0)], count)
    }

    /// A block of f32 with these values, keys first.
    fn block(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn through(dtypes: &[KvDtype], block: &[u8]) -> Vec<u8> {
        dtypes.windows(2).fold(block.to_vec(), |block, pair| {
            let mut out = Vec::new();
            convert(&layout(pair[0]), &block, &layout(pair[1]), &mut out);
            assert_eq!(out.len(), layout(pair[1]).block_bytes());
            out
        })
    }

    proptest! {
        /// Whatever a type holds, f32 holds it too, and gives it back.
        #[test]
        fn wider_is_exact(values in values(54), pick in 0..5usize) {
            use KvDtype::F32;
            let dtype = KvDtype::ALL[pick];
            let stored = through(&[F32, dtype], &block(&values));
            if dtype.scale_bytes() == 0 {
                prop_assert_eq!(&stored, &through(&[dtype, F32, dtype], &stored));
                return Ok(());
            }
            let (widened, keys) = (through(&[dtype, F32], &stored), layout(dtype).keys());
            for row in 0..6 {
                let scale = bf16::from_le_bytes(stored[keys.scales + row * 2..][..2].try_into().unwrap()).to_f64();
                for at in row * 5..row * 5 + 5 {
                    let code = stored[at];
                    let value = if dtype == KvDtype::Int8 { f32::from(code as i8) } else { widen_e4m3(code) };
                    let got = f32::from_le_bytes(widened[at * 4..][..4].try_into().unwrap());
                    prop_assert_eq!(f64::from(got), f64::from(value) * scale);
                }
            }
        }

        #[test]
        fn rounding_is_within_half_a_step(values in values(54)) {
            for (dtype, relative) in [(KvDtype::Bf16, 1.0 / 256.0), (KvDtype::Int8, 0.5 / 127.0), (KvDtype::Fp8, 1.0 / 16.0)] {
                let back = through(&[KvDtype::F32, dtype, KvDtype::F32], &block(&values));
                let rows = [5; 6].into_iter().chain([4; 6]).scan(0, |at, dim| { *at += dim; Some(*at - dim..*at) });
                for row in rows {
                    let largest = values[row.clone()].iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    for at in row {
                        let got = f32::from_le_bytes(back[at * 4..][..4].try_into().unwrap());
                        let error = (got - values[at]).abs();
                        prop_assert!(error <= largest.max(1e-30) * relative * 1.01, "{dtype}: {} became {got}", values[at]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_code_of_a_byte_comes_back() {
        let narrow = |code: ByteCode, value: f32| {
            let mut element = [0];
            code.encode(&[value], 1.0, &mut element);
            element[0]
        };
        for code in 0..=255u8 {
            if code & 0x7f < 0x7f {
                assert_eq!(narrow(ByteCode::E4m3, widen_e4m3(code)), code, "{code:#x}");
            }
            if code != 0x80 {
                assert_eq!(narrow(ByteCode::Int8, f32::from(code as i8)), code, "{code:#x}");
            }
        }
        assert_eq!(widen_e4m3(0x7e), 448.0);
        assert_eq!(narrow(ByteCode::E4m3, 1e9), 0x7e);
    }

    #[test]
    fn what_is_not_finite_does_not_become_a_number() {
        let mut values = vec![1.0; 54];
        values[7] = f32::INFINITY;
        for dtype in [KvDtype::Int8, KvDtype::Fp8] {
            let back = through(&[KvDtype::F32, dtype, KvDtype::F32], &block(&values));
            let value = |at: usize| f32::from_le_bytes(back[at * 4..][..4].try_into().unwrap());
            assert!((5..10).all(|at| value(at).is_nan()), "the token's head");
            assert!((value(0) - 1.0).abs() < 0.01, "its neighbour");
        }
    }
}
