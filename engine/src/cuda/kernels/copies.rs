//! The kernel that copies pages (`copies.cu`).

use super::{Args, Call, Defines, Element, Kernel, Source};

/// Copies within memory that a device reaches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copies {
    /// [`Run`](crate::cuda::device::Run)s `[count]`, up to [`Copies::MOST_BYTES`] each, of which none overlap.
    pub(crate) runs: u64,
    /// At least 1.
    pub(crate) count: u32,
}

impl Copies {
    /// Most bytes of a run: a block moves it, and as many blocks as there are runs keep a card busy.
    pub(crate) const MOST_BYTES: usize = 64 << 10;

    /// Returns what its calls are of.
    pub(crate) fn kernel() -> Kernel {
        Kernel { name: "copy_runs", source: Source::Copies, element: Element::Bf16, defines: Defines::default() }
    }

    pub(crate) fn call(&self) -> Call {
        let args = Args::default().word(self.runs);
        Call { kernel: Self::kernel(), grid: [self.count, 1, 1], threads: 256, shared_bytes: 0, args }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{Memory, run},
        *,
    };

    #[test]
    fn runs_of_any_length_are_copied_from_anywhere() {
        let from: Vec<u8> = (0..200_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        // Whole and broken rounds of all threads, and bytes that are no multiple of 16, or do not begin at one.
        let runs = [
            (0, 64, 64 << 10),
            (70_000, 70_000, 16 << 10),
            (16, 90_000, 4_096 + 32),
            (100_000, 100_016, 48),
            (5, 110_000, 1_000),
            (32, 120_003, 16),
            (48, 130_000, 17),
            (0, 140_000, 0),
            (150_001, 150_001, 40_000),
        ];
        let source = Memory::of_bytes(&from);
        let left = run(&vec![0xee; from.len()], |to| {
            let words = runs.iter().flat_map(|(here, there, bytes)| [source.address() + here, to + there, *bytes]);
            let list = Box::leak(Box::new(Memory::of_bytes(&words.flat_map(u64::to_le_bytes).collect::<Vec<_>>())));
            Copies { runs: list.address(), count: runs.len() as u32 }.call()
        });
        let mut expected = vec![0xee; from.len()];
        for (here, there, bytes) in runs.map(|run| (run.0 as usize, run.1 as usize, run.2 as usize)) {
            expected[there..there + bytes].copy_from_slice(&from[here..here + bytes]);
        }
        assert!(left == expected);
    }
}
