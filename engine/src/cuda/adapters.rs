//! Adapters on a card ([`crate::lora`] has the idea): where their factors are, and which rows of a step have one.
//!
//! ```text
//! shrink      input             -> hidden       f32 [rows][ranks]: scale * A x; before every linear that adapters may change
//! linear      hidden            +> sums         B hidden, behind the bias and before whatever follows the sums
//! ```
//!
//! An adapter goes up in the first step that has a sequence with it, and what it takes is given back in the first step after the one that had it
//! last is gone. No step that is begun ahead does either, so nothing is waited for there. Both factors are 16-bit floats of the model's element on a card:
//! f32 is rounded. Several ranks have the whole of `A` each, and of `B` what belongs to their own outputs, so a row's bits are those of one card.
//!
//! Rows find their adapter by a list in device memory, which is written before each step that has one. So kernels are asked for alike whichever
//! adapters there are, and one graph serves any mix of them. Steps without any have neither the list nor the kernels.

use super::{
    device::{Device, Region},
    kernels::{Deltas, Element},
    rank::Rank,
    slice::{Outputs, Slice},
    weights::{Dense, Inner, Mlp},
};
use crate::{
    Adapter, Error,
    cpu::{adapter::Delta, packed::PANEL},
    home::{Pass, Span},
    model::{checkpoint::ElementType, decoder::Decoder},
};
use half::{bf16, f16};
use std::{
    collections::HashMap,
    iter::repeat_n,
    ops::Range,
    sync::{Arc, Weak},
};

const PURPOSE: &str = "adapters";
/// Outputs that share a list of ranks.
const HALF: usize = PANEL / 2;
/// Words before a list's rows.
const HEAD: usize = 2;

/// The adapters of a rank.
#[derive(Debug)]
pub(super) struct Adapters {
    /// By where their lives are.
    there: HashMap<usize, There>,
    /// What is `scale * A x` of a step's rows, f32 `[rows][ranks]`; of no length while no adapter is there.
    hidden: Region,
    ranks: usize,
    /// What [`Deltas::adapted`] documents, of a step's rows and then of those that are kept.
    pub(super) list: Region,
    words: Vec<u64>,
}

/// An adapter on the device.
#[derive(Debug)]
struct There {
    life: Weak<()>,
    /// Deltas, `[layers]`[`[Deltas::LINEARS]`](Deltas::LINEARS)`[`[`Deltas::WORDS`]`]`, and then all that they name.
    region: Region,
}

impl Adapters {
    /// Reserves the list for steps of up to `rows` rows.
    pub(super) fn reserve(device: &mut dyn Device, rows: usize) -> Result<Self, Error> {
        let words = 2 * (HEAD + rows);
        let list = device.alloc("the rows of a step", words * 8)?;
        Ok(Self { there: HashMap::new(), hidden: Region::default(), ranks: 0, list, words: Vec::with_capacity(words) })
    }

    /// Says whether what is there is what `pass` needs: all of it, and nothing that nobody has any more.
    pub(super) fn are_those_of(&self, pass: &Pass<'_>) -> bool {
        let gone = |there: &There| there.life.strong_count() == 0;
        !self.there.values().any(gone) && pass.spans.iter().filter_map(|span| span.adapter).all(|own| self.has(own))
    }

    pub(super) fn has(&self, adapter: &Adapter) -> bool {
        self.there.contains_key(&key(adapter))
    }

    /// Writes which adapters the rows of `pass` have, padded to `padded` rows, and returns what is to be copied to the start of the list.
    pub(super) fn write(&mut self, pass: &Pass<'_>, padded: usize) -> &[u8] {
        let Self { there, hidden, ranks, words, .. } = self;
        words.clear();
        for (spans, rows) in [(pass.spans, padded), (pass.kept, pass.places.len())] {
            words.extend([hidden.address, *ranks as u64]);
            let end = words.len() + rows;
            let deltas = |span: &Span<'_>| span.adapter.map_or(0, |adapter| there[&key(adapter)].region.address);
            words.extend(spans.iter().flat_map(|span| repeat_n(deltas(span), span.tokens)));
            words.resize(end, 0);
        }
        bytes_of(words)
    }

    /// Returns where the list of kept rows is, in a step of `rows` rows.
    pub(super) fn kept(&self, rows: usize) -> Region {
        let before = (HEAD + rows) * 8;
        self.list.part(before, self.list.bytes - before)
    }
}

impl Rank {
    /// Gives back what adapters took that nobody has any more.
    pub(super) fn forget_adapters(&mut self) -> Result<(), Error> {
        let Self { adapters, device, .. } = self;
        let mut freed = Ok(());
        adapters.there.retain(|_, there| {
            let stays = there.life.strong_count() > 0;
            if !stays && freed.is_ok() {
                freed = device.free(there.region);
            }
            stays
        });
        freed?;
        if adapters.there.is_empty() && adapters.ranks > 0 {
            adapters.ranks = 0;
            return device.free(std::mem::take(&mut adapters.hidden));
        }
        Ok(())
    }

    /// Uploads this rank's part of `adapter`.
    ///
    /// # Errors
    /// [`Error::Card`] when there is no memory for it; then nothing of it is there.
    pub(super) fn upload_adapter(&mut self, decoder: &Decoder, adapter: &Adapter) -> Result<(), Error> {
        let mut image = Image { element: self.element, slice: self.slice, bytes: Vec::new(), ranks: 0 };
        let entries = adapter.layers().len() * Deltas::LINEARS;
        image.bytes.resize(entries * Deltas::WORDS * 8, 0);
        for (layer, deltas) in adapter.layers().iter().enumerate() {
            let of = deltas.linears().into_iter().zip(self.outputs(decoder, layer));
            for (at, (delta, outputs)) in of.enumerate().filter_map(|(at, (delta, of))| Some((at, (delta?, of)))) {
                image.place(layer * Deltas::LINEARS + at, delta, outputs);
            }
        }
        let Self { adapters, device, sizes, .. } = self;
        if image.ranks > adapters.ranks {
            let hidden = device.alloc(PURPOSE, sizes.capacity.rows * image.ranks * 4)?;
            let before = std::mem::replace(&mut adapters.hidden, hidden);
            if std::mem::replace(&mut adapters.ranks, image.ranks) > 0 {
                device.free(before)?;
            }
        }
        let region = device.alloc(PURPOSE, image.bytes.len())?;
        image.settle(entries, region.address);
        if let Err(error) = device.upload(region, &image.bytes) {
            device.free(region)?;
            return Err(error);
        }
        adapters.there.insert(key(adapter), There { life: Arc::downgrade(adapter.life()), region });
        Ok(())
    }

    /// Gives back what this rank took for `adapter`, if it did: a peer could not take it.
    pub(super) fn withdraw_adapter(&mut self, adapter: &Adapter) -> Result<(), Error> {
        self.adapters.there.remove(&key(adapter)).map_or(Ok(()), |there| self.device.free(there.region))?;
        self.forget_adapters()
    }

    /// Returns how the outputs of a layer's linears lie, in the order of [`super::kernels::DeltaOf`].
    fn outputs(&self, decoder: &Decoder, layer: usize) -> [Outputs; Deltas::LINEARS] {
        let Decoder { heads, kv_heads, head_dim, hidden, intermediate, .. } = *decoder;
        let up = match &self.weights.blocks[layer].mlp {
            Mlp::Dense(Dense { inner: Inner::Plain(_), .. }) => Outputs::Plain(intermediate),
            Mlp::Dense(Dense { inner: Inner::Gated(_), .. }) | Mlp::Experts(_) => Outputs::Gated(intermediate),
        };
        [Outputs::Heads { heads, kv_heads, dim: head_dim }, Outputs::Plain(hidden), up, Outputs::Plain(hidden)]
    }
}

/// What is to be copied to the device for an adapter. Addresses in it count from its start until it is known where that is.
struct Image {
    element: Element,
    slice: Slice,
    bytes: Vec<u8>,
    /// Of the delta with the most.
    ranks: usize,
}

impl Image {
    /// Appends the factors of `delta`, whose linear has such outputs, and writes entry `entry` of the deltas.
    fn place(&mut self, entry: usize, delta: &Delta, outputs: Outputs) {
        let (ranks, depth) = (delta.scales().len().next_multiple_of(Deltas::RANKS), delta.depth().next_multiple_of(32));
        self.ranks = self.ranks.max(ranks);
        let down = self.align();
        for rank in 0..delta.scales().len() {
            self.narrow(delta, delta.down(rank));
            self.bytes.resize(down + (rank + 1) * depth * 2, 0);
        }
        self.bytes.resize(down + ranks * depth * 2, 0);
        let scales = self.align();
        self.bytes.extend(delta.scales().iter().flat_map(|scale| scale.to_le_bytes()));
        self.bytes.resize(scales + ranks * 4, 0);
        let up = self.align();
        let halves = match outputs.columns(self.slice) {
            None => self.place_halves(delta, up),
            Some(columns) => self.place_columns(delta, up, &columns),
        };
        let listed = self.align();
        self.bytes.extend(halves.into_iter().flatten().flat_map(u32::to_le_bytes));
        for (at, word) in [down, scales, up, listed, ranks].into_iter().enumerate() {
            self.bytes[(entry * Deltas::WORDS + at) * 8..][..8].copy_from_slice(&(word as u64).to_le_bytes());
        }
    }

    /// Appends `B` as it lies; returns, for each half panel, its first rank, its ranks, and where they begin behind `up`, in elements.
    fn place_halves(&mut self, delta: &Delta, up: usize) -> Vec<[u32; 3]> {
        let half = |half| {
            let ((ranks, factors), at) = (delta.half(half), self.bytes.len() - up);
            self.narrow(delta, factors);
            half_words(ranks, at)
        };
        (0..delta.halves()).map(half).collect()
    }

    /// The same of the half panels that `columns` make.
    fn place_columns(&mut self, delta: &Delta, up: usize, columns: &[Option<usize>]) -> Vec<[u32; 3]> {
        let half = |columns: &[Option<usize>]| {
            let whole = |column: &usize| delta.half(column / HALF);
            let used = columns.iter().flatten().map(|column| whole(column).0).filter(|ranks| !ranks.is_empty());
            let ranks = used.reduce(|all, ranks| all.start.min(ranks.start)..all.end.max(ranks.end)).unwrap_or(0..0);
            let (at, zero) = (self.bytes.len() - up, [0; 4]);
            for rank in ranks.clone() {
                for column in columns {
                    let factor = column.and_then(|column| {
                        let ((own, factors), bytes) = (whole(&column), delta.dtype().bytes());
                        let row = own.contains(&rank).then(|| rank - own.start)?;
                        Some(&factors[(row * HALF + column % HALF) * bytes..][..bytes])
                    });
                    self.narrow(delta, factor.unwrap_or(&zero[..delta.dtype().bytes()]));
                }
            }
            half_words(ranks, at)
        };
        columns.chunks_exact(HALF).map(half).collect()
    }

    /// Appends factors of `delta` as 16-bit floats.
    fn narrow(&mut self, delta: &Delta, factors: &[u8]) {
        let (dtype, to) = (delta.dtype(), &mut self.bytes);
        let values = (0..factors.len() / dtype.bytes()).map(|at| dtype.get(factors, at));
        match (dtype, self.element) {
            (ElementType::Bf16, Element::Bf16) | (ElementType::F16, Element::F16) => to.extend_from_slice(factors),
            (_, Element::Bf16) => to.extend(values.flat_map(|value| bf16::from_f32(value).to_le_bytes())),
            (_, Element::F16) => to.extend(values.flat_map(|value| f16::from_f32(value).to_le_bytes())),
        }
    }

    /// Pads to where something may begin.
    fn align(&mut self) -> usize {
        let at = self.bytes.len().next_multiple_of(256);
        self.bytes.resize(at, 0);
        at
    }

    /// Makes addresses of what the first `entries` deltas name, when the image is to be at `address`.
    fn settle(&mut self, entries: usize, address: u64) {
        for delta in self.bytes[..entries * Deltas::WORDS * 8].chunks_exact_mut(Deltas::WORDS * 8) {
            for word in &mut delta.as_chunks_mut::<8>().0[..Deltas::WORDS - 1] {
                *word = (u64::from_le_bytes(*word) + address).to_le_bytes();
            }
        }
    }
}

fn half_words(ranks: Range<usize>, at: usize) -> [u32; 3] {
    [ranks.start as u32, ranks.len() as u32, (at / 2) as u32]
}

fn key(adapter: &Adapter) -> usize {
    Arc::as_ptr(adapter.life()) as usize
}

fn bytes_of(words: &[u64]) -> &[u8] {
    // SAFETY: any word is eight bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 8) }
}
