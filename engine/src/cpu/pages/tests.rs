use super::*;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{avx2::Avx2, avx512::Avx512};
use crate::cpu::{buffer::Buffer, simd::portable::Portable};
use proptest::prelude::*;

/// Runs a generic function on every vector unit of this machine.
macro_rules! on_every_unit {
    ($run:expr) => {
        ($run)("portable", &|from, to| decode_all(Portable, from, to), &|side, write| {
            write_and_read(Portable, side, write)
        });
        #[cfg(target_arch = "x86_64")]
        {
            if Avx2::available() {
                // SAFETY: it is available.
                let unit = unsafe { Avx2::new() };
                ($run)("avx2", &|from, to| decode_all(unit, from, to), &|side, write| {
                    write_and_read(unit, side, write)
                });
            }
            if Avx512::<false>::available() {
                // SAFETY: it is available.
                let unit = unsafe { Avx512::<false>::new() };
                ($run)("avx512", &|from, to| decode_all(unit, from, to), &|side, write| {
                    write_and_read(unit, side, write)
                });
            }
        }
    };
}

type Decode<'a> = &'a dyn Fn(ByteCode, &mut [f32]);
type Access<'a> = &'a dyn Fn(&Side, &Write<'_>) -> Vec<f32>;

/// What goes to one place of a side.
struct Write<'a> {
    slot: Slot,
    head: usize,
    values: &'a [f32],
}

/// Widens all 256 codes.
fn decode_all<S: Simd>(simd: S, code: ByteCode, to: &mut [f32]) {
    let codes: Vec<u8> = (0..=255).collect();
    for (codes, to) in codes.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        // SAFETY: both hold a vector.
        unsafe { simd.store(to.as_mut_ptr(), Storage::Scaled(code).load(simd, codes.as_ptr(), 0)) };
    }
}

/// Writes one token's head and reads it back.
fn write_and_read<S: Simd>(simd: S, side: &Side, write: &Write<'_>) -> Vec<f32> {
    // SAFETY: the tests' slots lie in the pages.
    unsafe {
        side.write(simd, write.slot, write.head, write.values);
        side.values(simd, write.slot, write.head)
    }
}

/// What the format's definition says of a finite code (arXiv 2209.05433, table 1).
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code >= 128 { -magnitude } else { magnitude }
}

#[test]
fn every_code_widens_to_what_it_means() {
    on_every_unit!(|unit, decode: Decode<'_>, _: Access<'_>| {
        let mut wide = [f32::NAN; 256];
        decode(ByteCode::E4m3, &mut wide);
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            let (ours, expected) = (wide[code as usize], e4m3(code) as f32);
            assert_eq!(ours.to_bits(), expected.to_bits(), "{unit} {code:#x}: {ours} for {expected}");
        }
        decode(ByteCode::Int8, &mut wide);
        for code in 0..=255u8 {
            assert_eq!(wide[code as usize], f32::from(code as i8), "{unit} {code:#x}");
        }
    });
}

fn layout(dtype: KvDtype, key_dim: u32, value_dim: u32) -> PageLayout {
    PageLayout { layers: 1, page_tokens: 4, kv_heads: 2, key_dim, value_dim, dtype, pages: 3 }
}

/// Pages of 0xaa that end at a guard page.
fn guarded(layout: &PageLayout) -> (Buffer, usize) {
    let mut buffer = Buffer::new(layout.pool_bytes()).expect("memory");
    buffer.bytes_mut().fill(0xaa);
    let start = buffer.len() - layout.pool_bytes();
    (buffer, start)
}

/// Writes values to every place in turn; checks what is read, that nothing else changes, and returns the bytes.
fn fill(unit: &str, layout: &PageLayout, seed: usize, access: Access<'_>) -> Vec<u8> {
    let (mut buffer, start) = guarded(layout);
    let pages = LayerPages::at(layout, buffer.bytes_mut()[start..].as_mut_ptr());
    let mut expected: Vec<(usize, Slot, usize, Vec<f32>)> = Vec::new();
    for (index, side) in [pages.keys, pages.values].iter().enumerate().filter(|(_, side)| side.dim > 0) {
        for place in 0..layout.pages * layout.page_tokens * layout.kv_heads {
            let (head, token) = ((place % layout.kv_heads) as usize, place / layout.kv_heads);
            let slot = Slot { page: token / layout.page_tokens, token: token % layout.page_tokens };
            let values: Vec<f32> = (0..side.dim)
                .map(|at| ((at * 7919 + place as usize * 31 + index + seed) % 2003) as f32 / 500.0 - 2.0)
                .collect();
            let row = access(side, &Write { slot, head, values: &values });
            expected.push((index, slot, head, row));
        }
    }
    // What was read back when it was written is still there after all others.
    for (index, slot, head, expected) in &expected {
        let side = [pages.keys, pages.values][*index];
        // SAFETY: the slot lies in the pages.
        let row = unsafe { side.values(Portable, *slot, *head) };
        assert_eq!(&row, expected, "{unit} {layout:?} {slot:?} {head}");
    }
    // Every byte of the pool belongs to some place, and none before it does.
    assert!(buffer.bytes_mut()[..start].iter().all(|byte| *byte == 0xaa));
    buffer.bytes_mut()[start..].to_vec()
}

#[test]
fn tokens_have_places_of_their_own_and_every_unit_writes_the_same_bytes() {
    for dtype in KvDtype::ALL {
        for (key_dim, value_dim) in [(1, 1), (2, 7), (8, 8), (15, 16), (24, 17), (64, 64), (80, 33), (40, 0)] {
            let layout = layout(dtype, key_dim, value_dim);
            let mut first: Option<Vec<u8>> = None;
            on_every_unit!(|unit, _: Decode<'_>, access: Access<'_>| {
                let bytes = fill(unit, &layout, 5, access);
                let first = first.get_or_insert_with(|| bytes.clone());
                assert!(*first == bytes, "{unit} {dtype}: other bytes than the first unit");
            });
        }
    }
}

#[test]
fn a_token_leaves_the_bytes_of_its_neighbours_alone() {
    for dtype in KvDtype::ALL {
        let layout = layout(dtype, 8, 8);
        let (mut buffer, start) = guarded(&layout);
        let pages = LayerPages::at(&layout, buffer.bytes_mut()[start..].as_mut_ptr());
        for (side, plane) in [(pages.keys, layout.keys()), (pages.values, layout.values())] {
            buffer.bytes_mut().fill(0xaa);
            let write = Write { slot: Slot { page: 1, token: 2 }, head: 1, values: &[1.0; 8] };
            write_and_read(Portable, &side, &write);
            let (element, scale) = (8 * dtype.bytes(), dtype.scale_bytes());
            let block = start + layout.block_bytes();
            let own = [(plane.elements + 6 * element, element), (plane.scales + 6 * scale, scale)];
            for (at, byte) in buffer.bytes_mut().iter().enumerate() {
                let mine = own.iter().any(|(from, len)| (block + from..block + from + len).contains(&at));
                assert!(mine || *byte == 0xaa, "{dtype}: byte {at} was touched");
            }
        }
    }
}

#[test]
fn a_head_that_is_not_finite_reads_back_as_nan_and_one_of_zeros_as_zeros() {
    for dtype in [KvDtype::Fp8, KvDtype::Int8] {
        let layout = layout(dtype, 20, 20);
        let (mut buffer, start) = guarded(&layout);
        let pages = LayerPages::at(&layout, buffer.bytes_mut()[start..].as_mut_ptr());
        on_every_unit!(|unit, _: Decode<'_>, access: Access<'_>| {
            let slot = Slot { page: 2, token: 3 };
            for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = [3.0; 20];
                values[17] = odd;
                let row = access(&pages.values, &Write { slot, head: 1, values: &values });
                assert!(row.iter().all(|value| value.is_nan()), "{unit} {dtype} {odd}: {row:?}");
                let bytes = &buffer.bytes_mut()[start + layout.pool_bytes() - 2..];
                assert_eq!(bytes, [0xc0, 0x7f], "one NaN whatever it was");
            }
            let row = access(&pages.values, &Write { slot, head: 1, values: &[0.0; 20] });
            assert!(row.iter().all(|value| *value == 0.0), "{unit} {dtype}");
        });
    }
}

proptest! {
    #[test]
    fn what_is_read_is_what_was_written_within_half_a_step(
        values in prop::collection::vec(-1.0f32..1.0, 1..80),
        power in -140i32..127,
    ) {
        let values: Vec<f32> = values.iter().map(|value| value * 2f32.powi(power.max(-126)) * 2f32.powi((power + 126).min(0))).collect();
        let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        for code in [ByteCode::E4m3, ByteCode::Int8] {
            let scale = code.scale(&values);
            let fits = scale == f32::MIN_POSITIVE || scale <= largest / code.largest() * (1.0 + 1.0 / 128.0);
            prop_assert!(fits, "{scale} for {largest}");
            let mut elements = vec![0; values.len()];
            code.encode(&values, scale, &mut elements);
            elements.resize(256, 0);
            let mut read = [0.0; 256];
            for at in (0..256).step_by(Portable::LANES) {
                // SAFETY: both hold 256 elements.
                unsafe {
                    let vector = Storage::Scaled(code).load(Portable, elements.as_ptr(), at);
                    Portable.store(read.as_mut_ptr().add(at), Portable.mul(vector, Portable.splat(scale)));
                }
            }
            for (value, read) in values.iter().zip(&read) {
                let step = match code {
                    // 3 bits of mantissa, or the step of the smallest numbers.
                    ByteCode::E4m3 => (f64::from(value.abs()) / 8.0).max(f64::from(scale) * 2f64.powi(-9)),
                    ByteCode::Int8 => f64::from(scale),
                };
                let off = f64::from((value - read).abs());
                prop_assert!(off <= step / 2.0 * 1.000_001, "{code:?}: {value} read as {read}, scale {scale}");
            }
        }
    }
}
