//! One vector for a text: pooled hidden states of a decoder.
//!
//! A prompt is computed like any other, in chunks and in any batch; its rows say which hidden states they want
//! ([`crate::Row::pooling`]) and each step yields them ([`crate::Yield::hidden`]): what the head would read, after the last norm. An [`Embedding`] takes them in the order of positions. Sums are f64 and grow by one position at a time, so how the
//! prompt was cut into chunks changes no bit.
//!
//! What a prefix cache holds are keys and values, not hidden states: a mean needs every token computed, the last token only
//! itself.

/// What an embedding is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The hidden state of the last token.
    Last,
    /// The mean over the hidden states of all tokens.
    Mean,
}

/// The embedding of one prompt while its chunks are computed.
#[derive(Clone, Debug)]
pub struct Embedding {
    pooling: Pooling,
    /// Tokens that are in `sums`.
    tokens: usize,
    /// `[hidden]`, or empty before the first chunk.
    sums: Vec<f64>,
}

impl Embedding {
    /// Starts with nothing.
    pub fn new(pooling: Pooling) -> Self {
        Self { pooling, tokens: 0, sums: Vec::new() }
    }

    /// Takes the hidden states of a row, each `[hidden]`, the first at position `start`.
    ///
    /// # Panics
    /// When a mean is not given every position in its turn: that is a mistake of the caller's, never input.
    pub fn add<'a>(&mut self, start: usize, states: impl Iterator<Item = &'a [f32]>) {
        assert!(self.pooling == Pooling::Last || start == self.tokens, "position {start} after {} tokens", self.tokens);
        for state in states {
            if self.pooling == Pooling::Last || self.tokens == 0 {
                self.sums.clear();
                self.sums.resize(state.len(), 0.0);
            }
            self.sums.iter_mut().zip(state).for_each(|(sum, value)| *sum += f64::from(*value));
            self.tokens += 1;
        }
    }

    /// Returns the vector, `[hidden]`, of length 1 unless all is zero. (A mean and a sum have the same direction.)
    pub fn finish(self) -> Vec<f32> {
        let length = self.sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
        let scale = if length == 0.0 { 0.0 } else { 1.0 / length };
        self.sums.into_iter().map(|sum| (sum * scale) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled(pooling: Pooling, chunks: &[&[[f32; 2]]]) -> Vec<f32> {
        let mut embedding = Embedding::new(pooling);
        let mut start = 0;
        for chunk in chunks {
            embedding.add(start, chunk.iter().map(|state| &state[..]));
            start += chunk.len();
        }
        embedding.finish()
    }

    #[test]
    fn the_last_state_or_the_mean_of_all_has_length_one() {
        assert_eq!(pooled(Pooling::Last, &[&[[1.0, 7.0], [3.0, -4.0]]]), [0.6, -0.8]);
        assert_eq!(pooled(Pooling::Last, &[&[[1.0, 7.0]], &[[3.0, -4.0]]]), [0.6, -0.8]);
        assert_eq!(pooled(Pooling::Mean, &[&[[1.0, 7.0], [5.0, 1.0]]]), [0.6, 0.8]);
        assert_eq!(pooled(Pooling::Mean, &[&[[1.0, 7.0]], &[[5.0, 1.0]]]), [0.6, 0.8]);
        assert_eq!(pooled(Pooling::Mean, &[&[[0.0, 0.0]]]), [0.0, 0.0]);
        assert_eq!(pooled(Pooling::Mean, &[&[[f32::MAX, 0.0]; 3]]), [1.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "position 5 after 1 tokens")]
    fn a_mean_leaves_no_token_out() {
        let mut embedding = Embedding::new(Pooling::Mean);
        embedding.add(0, [&[1.0f32][..]].into_iter());
        embedding.add(5, [&[1.0f32][..]].into_iter());
    }
}
