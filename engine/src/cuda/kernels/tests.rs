//! What the tests of kernels share: numbers, buffers that end at guard pages, and runs in both orders.

use super::{Call, Element};
use crate::{
    cpu::buffer::Buffer,
    cuda::emulator::{self, Order},
};

/// Returns a number between -1 and 1 that depends on both arguments.
pub(super) fn noise(salt: u64, index: usize) -> f32 {
    let mut bits = (index as u64).wrapping_add(salt << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
}

pub(super) fn noises(salt: u64, count: usize) -> Vec<f32> {
    (0..count).map(|index| noise(salt, index)).collect()
}

/// What a device would hold.
pub(super) struct Memory(Buffer);

impl Memory {
    pub(super) fn of_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Buffer::new(bytes.len()).expect("memory");
        buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Self(buffer)
    }

    pub(super) fn of_floats(values: &[f32]) -> Self {
        Self::of_bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(super) fn of_words(values: &[u32]) -> Self {
        Self::of_bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(super) fn of_halves(values: &[u16]) -> Self {
        Self::of_bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(super) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl Element {
    pub(super) fn narrow(self, value: f32) -> u16 {
        match self {
            Element::Bf16 => half::bf16::from_f32(value).to_bits(),
            Element::F16 => half::f16::from_f32(value).to_bits(),
        }
    }

    pub(super) fn wide(self, bits: u16) -> f32 {
        match self {
            Element::Bf16 => half::bf16::from_bits(bits).to_f32(),
            Element::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }

    pub(super) fn round(self, value: f32) -> f32 {
        self.wide(self.narrow(value))
    }
}

/// Runs `call`, which is given the address of its output, in both orders over copies of `before`, and returns what it left: the same
/// both times.
pub(super) fn run(before: &[u8], call: impl Fn(u64) -> Call) -> Vec<u8> {
    let mut left = [Order::Forward, Order::Backward].map(|order| {
        let mut to = Memory::of_bytes(before);
        let call = call(to.address());
        // SAFETY: every address is that of a `Memory`, sized as the call documents it and guarded at its end; this test alone has them.
        unsafe { emulator::run(&call, order) }.unwrap_or_else(|problem| panic!("{problem}"));
        to.bytes()[..before.len()].to_vec()
    });
    assert!(left[0] == left[1], "kernel {:?} depends on the order of its threads", call(0).kernel);
    std::mem::take(&mut left[0])
}

/// As [`run`], for an output of `count` f32 that start as NaN.
pub(super) fn run_floats(count: usize, call: impl Fn(u64) -> Call) -> Vec<f32> {
    floats(&run(&vec![0xff; count * 4], call))
}

pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

pub(super) fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

pub(super) fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect()
}

/// Packs `weights`, `[outputs][inputs]`, as pairs of 16-bit floats in panels.
pub(super) fn pack(element: Element, weights: &[f32], outputs: usize, inputs: usize) -> Memory {
    let (panels, pairs) = (outputs.div_ceil(64), inputs.next_multiple_of(32) / 2);
    let mut packed = vec![0u16; panels * pairs * 128];
    for (index, weight) in weights.iter().enumerate() {
        let (output, input) = (index / inputs, index % inputs);
        packed[((output / 64 * pairs + input / 2) * 64 + output % 64) * 2 + input % 2] = element.narrow(*weight);
    }
    Memory::of_halves(&packed)
}

pub(super) fn close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        assert!(error <= tolerance * (1.0 + expected.abs()), "{name}: element {index} is {got}, expected {expected}");
    }
}
