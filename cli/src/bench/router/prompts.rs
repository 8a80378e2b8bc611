//! What the client asks: the prompts that the peers were measured with.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// 128 bytes.
const SHORT: &str = "Explain in one short paragraph why a router that knows which worker holds a prefix saves time for everybody \
                     who shares it today.";
/// Bytes of a long prompt, and how many of them it shares with others.
const LONG_BYTES: usize = 16 << 10;
const SHARED_BYTES: usize = 14 << 10;
/// How many beginnings the long prompts share.
const PREFIXES: u64 = 32;
/// English with its punctuation; the words of long prompts are drawn from it, so frequent ones are frequent.
const TEXT: &str = include_str!("../../../../LICENSE");
/// One word in so many was never seen before, as names and numbers are.
const NEW_WORDS: u32 = 32;

/// How much is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    /// 128 bytes, always the same.
    Short,
    /// 16 KiB: one of 32 beginnings of 14 KiB, and an end of its own.
    Long,
}

/// The prompts of one connection, one after another.
#[derive(Debug)]
pub(super) struct Prompts {
    length: Length,
    prefixes: Vec<String>,
    random: StdRng,
    prompt: String,
}

impl Prompts {
    /// Prompts of different `seed` end differently.
    pub(super) fn new(length: Length, seed: u64) -> Self {
        let count = if length == Length::Long { PREFIXES } else { 0 };
        let prefix = |number| {
            let mut text = String::with_capacity(LONG_BYTES);
            extend(&mut text, SHARED_BYTES, &mut StdRng::seed_from_u64(number));
            text
        };
        // Seeds are for ends only from where the beginnings' end.
        let random = StdRng::seed_from_u64(PREFIXES + seed);
        Self { length, prefixes: (0..count).map(prefix).collect(), random, prompt: String::new() }
    }

    /// Returns the next prompt. It can stand in JSON as it is.
    pub(super) fn next(&mut self) -> &str {
        if self.length == Length::Short {
            return SHORT;
        }
        let prefix = &self.prefixes[self.random.random_range(0..self.prefixes.len())];
        self.prompt.clear();
        self.prompt.push_str(prefix);
        extend(&mut self.prompt, LONG_BYTES, &mut self.random);
        &self.prompt
    }
}

/// Appends words until `text` is this long.
fn extend(text: &mut String, bytes: usize, random: &mut StdRng) {
    use std::sync::LazyLock;
    static WORDS: LazyLock<Vec<&str>> =
        LazyLock::new(|| TEXT.split_whitespace().filter(|word| !word.contains(['"', '\\'])).collect());
    while text.len() < bytes {
        if random.random_range(0..NEW_WORDS) == 0 {
            text.extend((0..7).map(|_| char::from(random.random_range(b'a'..=b'z'))));
        } else {
            text.push_str(WORDS[random.random_range(0..WORDS.len())]);
        }
        text.push(' ');
    }
    text.truncate(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_as_long_as_the_peers_were_given() {
        assert_eq!(Prompts::new(Length::Short, 0).next().len(), 128);
        let (mut one, mut other) = (Prompts::new(Length::Long, 0), Prompts::new(Length::Long, 1));
        let first = one.next().to_owned();
        assert_eq!(first.len(), LONG_BYTES);
        assert!(one.prefixes.iter().any(|prefix| first.starts_with(prefix)));
        assert_ne!(first[SHARED_BYTES..], one.next()[SHARED_BYTES..]);
        assert_ne!(first[SHARED_BYTES..], other.next()[SHARED_BYTES..]);
        assert_eq!(one.prefixes, other.prefixes);
    }
}
