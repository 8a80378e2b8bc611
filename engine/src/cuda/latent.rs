//! Latent attention on a card (`model::latent` has the idea): from the residual stream to latents in pages and queries that meet them, and from
//! attended latents back to values.
//!
//! ```text
//! linear            input       -> qkv        f32 [rows][heads * query or query_rank][rank + rope]: queries, or what makes them; a latent; what turns
//! latent_keys       qkv         -> pages      latents normed, the rest turned
//!
//!                   where queries have a low rank:
//! norm              qkv         -> narrow     16-bit floats [rows][query_rank]
//! linear            narrow      -> queries    f32 [rows][heads][plain + rope]
//!
//! latent_queries    queries     -> plain, q   parted, and the rest turned
//! linear by head    plain       -> q          16-bit floats [rows][heads][rank + rope]
//! latent_attention  q, pages    -> latents    16-bit floats [rows][heads][rank]
//! linear by head    latents     -> attended   16-bit floats [rows][heads * value]
//! ```
//!
//! A linear by head is one of experts, where every row goes to all of them and a pair is a row and a head; so its pairs and tiles are listed once for a
//! pass.

use super::{
    device::{Device, Region},
    forward::{At, Part},
    kernels::{Cut, Finish, Group, LatentAttention, LatentKeys, LatentQueries, Norm, NormTo, Pairs},
    rank::{Rank, whole},
    weights::{Latent, Linear, LowRank, Uploaded},
};
use crate::{
    Error,
    model::{
        decoder::{Decoder, NormKind},
        latent::{self, LatentShape},
    },
};

/// How rows of latent attention lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct LatentSizes {
    heads: usize,
    /// Elements from row to row; none where queries have no low rank.
    pub(super) narrow: usize,
    queries: usize,
    /// Elements from head to head.
    plain: usize,
    key: usize,
    latent: usize,
}

impl LatentSizes {
    pub(super) fn new(shape: &LatentShape, heads: usize) -> Self {
        // Inputs of linears are zero up to a whole step.
        let step = |width: usize| width.next_multiple_of(32);
        Self {
            heads,
            narrow: shape.query_rank.map_or(0, whole),
            queries: shape.query_rank.map_or(0, |_| whole(heads * shape.query())),
            plain: step(shape.plain),
            key: shape.key(),
            latent: step(shape.rank),
        }
    }
}

/// What latent attention works in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LatentBuffers {
    narrow: Region,
    queries: Region,
    plain: Region,
    q: Region,
    /// Zero beyond what there is of a latent, as nobody writes there.
    latents: Region,
    /// Of each pair its head, and the pairs, head after head, and the tiles that they make.
    heads: Region,
    pairs: Region,
    tiles: Region,
    /// Most pairs of a tile.
    most: usize,
}

impl LatentBuffers {
    /// Reserves buffers for `rows` rows.
    pub(super) fn reserve(
        device: &mut dyn Device,
        rows: usize,
        sizes: &LatentSizes,
        weights: &Uploaded,
    ) -> Result<Self, Error> {
        let (heads, mut alloc) = (sizes.heads, |bytes: usize| device.alloc("what latent attention works in", bytes));
        let pairs = rows * heads;
        let buffers = Self {
            narrow: alloc(rows * sizes.narrow * 2)?,
            queries: alloc(rows * sizes.queries * 4)?,
            plain: alloc(pairs * sizes.plain * 2)?,
            q: alloc(pairs * sizes.key * 2)?,
            latents: alloc(pairs * sizes.latent * 2)?,
            heads: alloc(pairs * 4)?,
            pairs: alloc(pairs * 4)?,
            tiles: alloc(Cut::most_count(pairs, heads) * 12)?,
            // Codes are widened for up to 32 rows at a time.
            most: if weights.latents().any(|latent| latent.key.codes.or(latent.value.codes).is_some()) {
                32
            } else {
                128
            },
        };
        let heads: Vec<u8> = (0..pairs).flat_map(|pair| ((pair % heads) as u32).to_le_bytes()).collect();
        device.upload(buffers.heads, &heads)?;
        Ok(buffers)
    }
}

impl Rank {
    /// Lists the pairs of `rows` rows and all heads, where attention is latent, for the linears by head that follow.
    pub(super) fn list_heads(&mut self, rows: usize) -> Result<(), Error> {
        let Some(LatentSizes { heads, .. }) = self.sizes.latent else { return Ok(()) };
        let LatentBuffers { pairs, tiles, heads: experts, .. } = self.buffers.latent;
        let group = Group {
            experts: experts.address,
            pairs: (rows * heads) as u32,
            expert_count: heads as u32,
            cut: self.head_cut(rows, heads),
            list: pairs.address,
            tiles: tiles.address,
        };
        self.call(&group.call())
    }

    fn head_cut(&self, rows: usize, heads: usize) -> Cut {
        Cut::new(rows * heads, heads, self.buffers.latent.most)
    }

    /// Multiplies each head's part of all rows, `from_stride` elements after the one before, by its own panels of `linear`: `width` outputs, 16-bit
    /// floats, `to_stride` elements after those of the head before.
    fn linear_by_head(
        &mut self,
        linear: &Linear,
        rows: usize,
        from: (Region, usize),
        to: (Region, usize),
        width: usize,
    ) -> Result<(), Error> {
        let heads = self.sizes.latent.expect(PRESENT).heads;
        let (list, tiles) = (self.buffers.latent.pairs.address, self.buffers.latent.tiles.address);
        let (cut, width) = (self.head_cut(rows, heads), Some(width as u32));
        let pairs = Pairs { cut, list, tiles, expert_bytes: 0, sharers: 1, width };
        self.linear_of_pairs(linear, pairs, rows * heads, from, to, Finish::Narrow)
    }

    /// Computes what queries, latents and turned keys are made from, and writes the pages of layer `layer`.
    pub(super) fn write_latents(
        &mut self,
        decoder: &Decoder,
        latent: &Latent,
        at: &At,
        layer: usize,
    ) -> Result<(), Error> {
        let shape = decoder.latent.as_ref().expect(PRESENT);
        let (input, entry, stride) = (self.buffers.input, self.buffers.qkv, self.sizes.qkv);
        self.linear(&latent.entry, at.rows, (input, self.sizes.residual), (entry, stride), Finish::Store)?;
        let before = shape.query_rank.unwrap_or(decoder.heads * shape.query());
        let keys = LatentKeys {
            element: self.element,
            rows: at.rows as u32,
            from: entry.address + before as u64 * 4,
            stride: stride as u32,
            positions: self.parts.positions.address,
            slots: self.parts.slots.address,
            angles: self.weights.angles[decoder.layer_ropes[layer]].address,
            norm: latent.norm.address,
            rank: shape.rank as u32,
            eps: latent::NORM_EPS,
            pages: self.layer_pages(layer),
        };
        self.call(&keys.call())
    }

    /// Makes the queries of all rows, turns them, and takes them to the space of latents.
    pub(super) fn latent_queries(
        &mut self,
        decoder: &Decoder,
        latent: &Latent,
        at: &At,
        layer: usize,
    ) -> Result<(), Error> {
        let shape = decoder.latent.as_ref().expect(PRESENT);
        let (sizes, buffers) = (self.sizes.latent.expect(PRESENT), self.buffers.latent);
        let (mut from, mut stride) = (at.qkv, self.sizes.qkv);
        if let Some(LowRank { norm, up }) = &latent.query {
            let norm = Norm {
                element: self.element,
                rows: at.rows as u32,
                from: from.address,
                weight: norm.address,
                bias: 0,
                to: buffers.narrow.address,
                width: shape.query_rank.unwrap_or(0) as u32,
                from_stride: stride as u32,
                to_stride: sizes.narrow as u32,
                kind: Some(NormKind::Rms),
                eps: latent::NORM_EPS,
                into: NormTo::Store,
            };
            self.call(&norm.call())?;
            (from, stride) = (buffers.queries, sizes.queries);
            self.linear(up, at.rows, (buffers.narrow, sizes.narrow), (from, stride), Finish::Store)?;
        }
        let queries = LatentQueries {
            element: self.element,
            count: at.rows as u32,
            from: from.address,
            stride: stride as u32,
            heads: decoder.heads as u32,
            width: shape.plain as u32,
            turning: shape.rope as u32,
            rows: at.kept.map_or(0, |kept| kept.address),
            positions: self.parts.positions.address,
            angles: self.weights.angles[decoder.layer_ropes[layer]].address,
            plain: buffers.plain.address,
            plain_stride: sizes.plain as u32,
            q: buffers.q.address,
            rank: shape.rank as u32,
        };
        self.call(&queries.call())?;
        self.linear_by_head(&latent.key, at.rows, (buffers.plain, sizes.plain), (buffers.q, sizes.key), shape.rank)
    }

    pub(super) fn latent_attention(&self, decoder: &Decoder, at: &At, layer: usize, part: &Part) -> LatentAttention {
        let shape = decoder.latent.as_ref().expect(PRESENT);
        let (sizes, buffers) = (self.sizes.latent.expect(PRESENT), self.buffers.latent);
        LatentAttention {
            element: self.element,
            rows: part.rows as u32,
            most_rows: part.most_rows as u32,
            longest: part.longest as u32,
            q: buffers.q.address,
            heads: decoder.heads as u32,
            sequences: at.sequences_of(part),
            sequence_count: part.count as u32,
            tables: self.parts.tables.address,
            to: buffers.latents.address,
            to_stride: sizes.latent as u32,
            rank: shape.rank as u32,
            scale: decoder.score_scale,
            pages: self.layer_pages(layer),
            states: self.buffers.states.address,
            most_shared: self.device.most_shared(),
        }
    }

    /// Makes values of what was attended.
    pub(super) fn latent_values(&mut self, decoder: &Decoder, latent: &Latent, at: &At) -> Result<(), Error> {
        let shape = decoder.latent.as_ref().expect(PRESENT);
        let (from, to) = (self.buffers.latent.latents, self.buffers.attended);
        let stride = self.sizes.latent.expect(PRESENT).latent;
        self.linear_by_head(&latent.value, at.rows, (from, stride), (to, shape.value), shape.value)
    }
}

const PRESENT: &str = "a model with latent attention has sizes of it";
