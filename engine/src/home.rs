//! Where a model runs: the seam between what a step is and what carries it out.
//!
//! A step is a [`Pass`] through the decoder, and then what is made of its last rows: hidden states, logits, tokens. The
//! processor ([`crate::cpu`]) and a CUDA card ([`crate::cuda`]) are two homes. Both go through the same [`Decoder`](crate::model::decoder::Decoder) over
//! the same packed weights, write pages of the same layout, and give a sequence bits that depend on that sequence alone; the bits of two
//! homes differ, as those of two kinds of processors do.

use crate::{
    Adapter, Error, KvMemory, Model, Stuck,
    cpu::{nodes::Stay, pool::Pool},
    sampling::Race,
};
use kv_cache::{Backing, PageId, TokenId};
use std::{fmt::Debug, ops::Range, sync::Arc};

/// The tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    /// First row of the step.
    pub(crate) first: usize,
    /// Rows.
    pub(crate) tokens: usize,
    /// Position of the first token.
    pub(crate) start: usize,
    /// The sequence's pages.
    pub(crate) pages: &'a [PageId],
    /// What is added to the model for it.
    pub(crate) adapter: Option<&'a Adapter>,
    /// Whether somebody is to be told of each layer when its pages are final.
    pub(crate) leaves: bool,
}

/// In place of a token, with the number of a row: the one that is found for that row of the pass begun before.
pub(crate) const FOUND: TokenId = 1 << 31;

/// A token of a step after which something is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Which of the step's spans.
    pub(crate) row: usize,
    /// Which of its tokens.
    pub(crate) token: usize,
    /// How the token that follows is drawn, where the home is to do that; only where [`Home::races`].
    pub(crate) race: Option<Race>,
}

/// What goes through the decoder in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    /// Flat, one for each row.
    pub(crate) tokens: &'a [TokenId],
    /// The sequences they belong to.
    pub(crate) spans: &'a [Span<'a>],
    /// The tokens that go on when the last layer's pages are written, in ascending order of their rows.
    pub(crate) places: &'a [Place],
    /// The spans that these make.
    pub(crate) kept: &'a [Span<'a>],
}

impl Pass<'_> {
    /// Says whether some of its rows have adapters.
    pub(crate) fn is_adapted(&self) -> bool {
        self.spans.iter().any(|span| span.adapter.is_some())
    }

    /// Returns the rows of the places.
    pub(crate) fn kept_rows(&self) -> impl Iterator<Item = usize> {
        self.places.iter().map(|place| self.spans[place.row].first + place.token)
    }
}

/// What the head made of the sampled rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits<'a> {
    pub(crate) floats: &'a [f32],
    /// f32 from row to row.
    pub(crate) stride: usize,
}

impl<'a> Logits<'a> {
    /// Returns a row: `[vocab]` and whatever lies behind it, up to the next.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.floats[row * self.stride..][..self.stride]
    }
}

/// What runs a model. Its rows are those of the pass until [`Home::forward`] returns, and from then on those of the places, in their order.
///
/// An error of any method leaves the home as it was for the next pass, or broken for good; it never leaves it half-way.
pub(crate) trait Home: Debug + Send + Sync {
    /// Names what computes, for people.
    fn name(&self) -> &str;

    /// Returns the cards that it computes on: names in settings, and what tells each from all others.
    fn cards(&self) -> Vec<(String, [u8; 16])> {
        Vec::new()
    }

    /// Keeps the calling thread where it computes best until what is returned is dropped.
    fn stay(&self) -> Stay;

    /// Runs the decoder over the rows of `pass`, writes their keys and values to their pages, and norms what is left at the places.
    ///
    /// Calls `on_layer(l)` in the order of layers, each once its blocks of all rows are final; those that are not when it returns, [`Home::finish`] calls.
    fn forward(
        &mut self,
        model: &Model,
        memory: &KvMemory,
        pass: &Pass<'_>,
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<(), Error>;

    /// Ends a step: calls `on_layer` for the layers that it was not called for.
    fn finish(&mut self, on_layer: &mut dyn FnMut(u32)) -> Result<(), Error>;

    /// Begins a pass over rows that decode, each a sequence, and what finds their tokens ([`Home::find_tokens`]); waits for nothing, and may be done once more before
    /// [`Home::end`]. Returns whether it did: only where [`Home::races`].
    fn begin(&mut self, _model: &Model, _memory: &KvMemory, _pass: &Pass<'_>) -> Result<bool, Error> {
        Ok(false)
    }

    /// Waits for the first of the passes that were begun: [`Home::found`] is of its `rows` rows then.
    fn end(&mut self, _rows: usize) -> Result<(), Error> {
        unreachable!("a home that begins passes ends them")
    }

    /// Copies the hidden state of row `row`, as the head reads it, to `to`, `[hidden]`.
    fn read_hidden(&mut self, row: usize, to: &mut [f32]) -> Result<(), Error>;

    /// Keeps the rows `rows`, in ascending order, and forgets all others.
    fn keep_rows(&mut self, rows: &mut dyn Iterator<Item = usize>) -> Result<(), Error>;

    /// Says whether it draws tokens by itself. Then to find those of some rows and to compute the logits of others is hardly more than one of
    /// both; else it is twice as much.
    fn races(&self) -> bool;

    /// Finds the token after each of `rows`: the one that its place's race draws, or the most likely one. Slices follow each other in ascending order.
    fn find_tokens(&mut self, model: &Model, rows: Range<usize>) -> Result<(), Error>;

    /// Returns what was found for row `row` of the slice, the lowest of equals; `None` where it takes the logits to tell.
    fn found(&self, row: usize) -> Option<Result<TokenId, Stuck>>;

    /// Computes the logits after each of `rows`, at least of those rows of the slice that are `wanted`. Slices follow each other in ascending order, or are
    /// that of [`Home::find_tokens`].
    fn compute_logits(
        &mut self,
        model: &Model,
        rows: Range<usize>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<(), Error>;

    /// Returns the logits computed last; what was not wanted is undefined.
    fn logits(&self) -> Logits<'_>;

    /// Returns threads, and the logits computed last for them to work on.
    fn pool_and_logits(&mut self) -> (&mut Pool, Logits<'_>);

    /// Returns where pages are, if not in `memory`.
    fn backing(&mut self, _memory: &Arc<KvMemory>) -> Result<Option<Arc<dyn Backing>>, Error> {
        Ok(None)
    }

    /// Returns the bytes of experts that tokens chose so far, and those that were read for it; nothing where a home does not learn what they choose.
    fn expert_bytes(&self) -> (u64, u64);
}
