//! Random numbers by counter.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a keyed bijection of
//! 128 bits. There is no state to hand over, so a sequence that moves to another worker draws what it would have drawn.

use kv_cache::TokenId;

/// The numbers of one draw: one for each token of the vocabulary.
#[derive(Debug)]
pub(super) struct Numbers {
    key: [u32; 2],
    counter: [u32; 4],
    /// The pair of tokens whose numbers are at hand.
    pair: Option<u32>,
    numbers: [f64; 2],
}

impl Numbers {
    /// Returns those of output token `token_index`, which depend on this key and on nothing else.
    pub(super) fn new(seed: u64, choice: u32, token_index: u64) -> Self {
        let counter = [token_index as u32, (token_index >> 32) as u32, choice, 0];
        Self { key: [seed as u32, (seed >> 32) as u32], counter, pair: None, numbers: [0.0; 2] }
    }

    /// Returns the number of `token`, in `(0, 1)`.
    pub(super) fn of(&mut self, token: TokenId) -> f64 {
        let pair = token / 2;
        if self.pair != Some(pair) {
            self.counter[3] = pair;
            let [a, b, c, d] = philox(self.counter, self.key);
            (self.pair, self.numbers) = (Some(pair), [unit(a, b), unit(c, d)]);
        }
        self.numbers[token as usize % 2]
    }
}

/// Returns the middle of one of the 2^52 parts of `(0, 1)`: neither end, of which one has no logarithm and the other none but 0.
fn unit(low: u32, high: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
    (bits as f64 + 0.5) / (1u64 << 52) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xD251_1F53;
        let second = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the generator (Random123, `kat_vectors`).
    #[test]
    fn known_answers() {
        let check = |counter, key, expected| assert_eq!(philox(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let number = |seed, choice, index, token| Numbers::new(seed, choice, index).of(token);
        let base = number(1, 2, 3, 4);
        assert_eq!(base, number(1, 2, 3, 4));
        for other in [
            number(2, 2, 3, 4),
            number(1 << 32, 2, 3, 4),
            number(1, 3, 3, 4),
            number(1, 2, 4, 4),
            number(1, 2, 1 << 33, 4),
            number(1, 2, 3, 5),
            number(1, 2, 3, 6),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn numbers_do_not_depend_on_the_order_they_are_asked_in() {
        let mut numbers = Numbers::new(1, 2, 3);
        let up: Vec<f64> = (0..9).map(|token| numbers.of(token)).collect();
        let down: Vec<f64> = (0..9).rev().map(|token| numbers.of(token)).collect();
        assert!(up.iter().eq(down.iter().rev()));
    }

    #[test]
    fn numbers_fill_the_interval_evenly() {
        let mut counts = [0u32; 16];
        for index in 0..4_000 {
            let mut numbers = Numbers::new(7, 0, index);
            (0..4).for_each(|token| counts[(numbers.of(token) * 16.0) as usize] += 1);
        }
        // Chi-square with 15 degrees of freedom: 37.7 is passed once in a thousand.
        let chi: f64 = counts.iter().map(|count| (f64::from(*count) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi < 37.7, "{chi}");
    }
}
