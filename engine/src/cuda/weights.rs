//! Weights on the device: uploaded once, matrix by matrix, in the order in which they are packed. Where several ranks share a model, a rank's are the
//! [part](super::slice) of each matrix that it computes; embeddings, norms, routers and angles are whole on each.
//!
//! Matrices are 16-bit floats there, in the panels of [`crate::cpu::packed`]: `[panels][depth / 2][64][2]`. A word of a panel, two neighbours
//! along the depth of one output, is what a lane of a tensor core takes. They are f16 where all of a model's are, else bf16: f32 is rounded.
//! What is quantised lies there as in the host's panels, which are codes and scales. The panels of a layer's experts follow each other. Norms, biases and
//! angles are f32.

use super::{
    device::{Device, Region},
    kernels::{self, Choose, Codes, Element, Finish, LatentAttention, LinearShape, Table},
    slice::{Outputs, Slice, Split},
};
use crate::{
    Config, Error, Model,
    cpu::packed::{PANEL, Packed, WeightType},
    model::{
        Opened,
        checkpoint::ElementType,
        decoder::{Decoder, QkNorm},
        experts::Mixture,
        latent::LatentShape,
        quantized::Quantize,
        weights::{self, Embedding, Layer, Norm, Plain, Weights},
    },
};
use half::bf16;
use kv_cache::KvDtype;
use std::{ops::Range, path::Path};

/// A linear on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// `[panels][depth / 2][64][2]` 16-bit floats, the depth rounded up to 32; or the host's panels of codes.
    pub(crate) panels: Region,
    pub(crate) codes: Option<Codes>,
    /// Which input stands at each place, u32 `[depth]`; of no length where each stands at its own.
    pub(crate) order: Region,
    /// `[panels][64]` f32; of no length where there is none.
    pub(crate) bias: Region,
    /// Of one expert's part, where there are several.
    pub(crate) shape: LinearShape,
    /// Bytes of that part.
    pub(crate) expert_bytes: u64,
    /// What ranks exchange of what they compute.
    pub(crate) split: Option<Split>,
}

impl Linear {
    /// Returns it as a call that reads rows of `input`, and is to be told where its sums go.
    pub(crate) fn call(
        &self,
        element: Element,
        most_shared: u32,
        rows: usize,
        input: Region,
        input_stride: usize,
    ) -> kernels::Linear {
        kernels::Linear {
            element,
            shape: self.shape,
            rows: rows as u32,
            weights: self.panels.address,
            bias: self.bias.address,
            input: input.address,
            input_stride: input_stride as u32,
            to: 0,
            to_stride: 0,
            finish: Finish::Store,
            partial: 0,
            counters: 0,
            codes: self.codes,
            most_shared,
            pairs: None,
            deltas: None,
        }
    }
}

/// A norm on the device: f32, zeros up to a whole panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormWeights {
    pub(crate) weight: Region,
    /// Of no length where there is none.
    pub(crate) bias: Region,
}

/// What follows attention.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each layer, made once")]
pub(crate) enum Mlp {
    Dense(Dense),
    Experts(Experts),
}

/// What every token goes through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dense {
    pub(crate) inner: Inner,
    pub(crate) down: Linear,
}

impl Dense {
    fn linears(&self) -> [&Linear; 2] {
        let (Inner::Gated(inner) | Inner::Plain(inner)) = &self.inner;
        [inner, &self.down]
    }
}

/// What leads into the middle.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Inner {
    /// Panels of 32 gate columns and the 32 up columns that belong to them.
    Gated(Linear),
    Plain(Linear),
}

/// Gated pairs of which every token uses a few.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts {
    pub(crate) router: Linear,
    /// f32 `[experts]`; of no length where there is none.
    pub(crate) correction: Region,
    /// One expert's panels after the other's, gates and ups as in [`Inner::Gated`].
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
    /// What every token goes through as well.
    pub(crate) shared: Option<Dense>,
}

/// How a block attends.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each layer, made once")]
pub(crate) enum Attention {
    Heads(HeadAttention),
    Latent(Latent),
}

/// Attention with keys and values for each head or group of heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadAttention {
    pub(crate) qkv: Linear,
    /// Weights of the norms of q and of k.
    pub(crate) norms: Option<(Region, Region)>,
}

/// Latent attention, as in [`weights::Latent`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latent {
    pub(crate) entry: Linear,
    pub(crate) query: Option<LowRank>,
    /// f32 `[rank]`.
    pub(crate) norm: Region,
    /// One head's panels after the other's, as those of experts.
    pub(crate) key: Linear,
    pub(crate) value: Linear,
}

/// What makes queries of what is narrow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRank {
    /// f32 `[rank]`.
    pub(crate) norm: Region,
    pub(crate) up: Linear,
}

/// One block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) attention_norm: Option<NormWeights>,
    pub(crate) attention: Attention,
    /// What follows attention of either kind.
    pub(crate) output: Linear,
    pub(crate) attention_post_norm: Option<NormWeights>,
    pub(crate) mlp_norm: Option<NormWeights>,
    pub(crate) mlp: Mlp,
    pub(crate) mlp_post_norm: Option<NormWeights>,
}

/// All weights of a decoder on the device.
#[derive(Debug)]
pub(crate) struct Uploaded {
    /// Where embeddings are looked up, and how they lie there.
    pub(crate) table: (Table, Region),
    pub(crate) embedding_scale: f32,
    pub(crate) blocks: Vec<Block>,
    pub(crate) final_norm: NormWeights,
    pub(crate) head: Linear,
    /// For each rope, `[context][pairs][2]` f32: cosine and sine.
    pub(crate) angles: Vec<Region>,
    /// Whether something was rounded.
    pub(crate) rounded: bool,
}

/// Says what of `model` under `config` no kernel runs yet, before anything is uploaded.
///
/// # Errors
/// [`Error::Setting`] names it.
pub(crate) fn check(model: &Model, config: &Config) -> Result<(), Error> {
    let weights = model.weights();
    check_decoder(&model.decoder, element(weights), config)?;
    let embedding = match &weights.embedding {
        Embedding::Packed(packed) => Some(packed),
        Embedding::Tied | Embedding::Rows { .. } => None,
    };
    for packed in weights.packed().chain(embedding) {
        if let WeightType::Quantized(_) = packed.weights() {
            Codes::new(packed).map_err(|problem| {
                Error::setting("device", format!("weights of type {} are not read on a card: {problem}", weights.dtype))
            })?;
        }
    }
    Ok(())
}

/// Says the same of the checkpoint at `path`, loaded as `quantize` says, as far as its description goes.
///
/// # Errors
/// As [`check`], and [`Error::Checkpoint`] for a description that is at fault.
pub(crate) fn check_path(path: &Path, quantize: Option<Quantize>, config: &Config) -> Result<(), Error> {
    let Opened { decoder, checkpoint, quantization, .. } = Opened::open(path)?;
    let element = match (quantize, quantization) {
        (None, None) => element_of(checkpoint.matrix_dtype()),
        // As codes are no f16.
        _ => Element::Bf16,
    };
    check_decoder(&decoder, element, config)
}

fn check_decoder(decoder: &Decoder, element: Element, config: &Config) -> Result<(), Error> {
    let Decoder { architecture, head_dim, heads, kv_heads, .. } = decoder;
    let refused = |problem: String| Err(Error::setting("device", problem));
    let ranks = config.tensor_parallel;
    if !Slice::is_even(ranks, *heads, *kv_heads) {
        let right: Vec<String> = (1..=*heads)
            .filter(|ranks| Slice::is_even(*ranks, *heads, *kv_heads))
            .map(|ranks| ranks.to_string())
            .collect();
        let problem = format!(
            "{ranks} cards do not share {heads} heads and {kv_heads} of keys and values ({architecture}) evenly: {} would be right",
            right.join(", ")
        );
        return Err(Error::setting("tensor_parallel", problem));
    }
    if ranks > 1 && decoder.qk_norm == QkNorm::Whole {
        let problem = format!("{ranks} cards: norms over all heads ({architecture}) run on one card alone");
        return Err(Error::setting("tensor_parallel", problem));
    }
    if ranks > 1 && decoder.latent.is_some() {
        let problem = format!("{ranks} cards: latent attention ({architecture}) runs on one card alone");
        return Err(Error::setting("tensor_parallel", problem));
    }
    if ranks > 1 && !config.exact {
        let problem = format!("off for {ranks} cards, whose bits would not be those of one: it is for one card alone");
        return Err(Error::setting("exact", problem));
    }
    if let Some(Mixture { routing, .. }) = &decoder.mixture
        && routing.experts > Choose::MOST
    {
        let (experts, most) = (routing.experts, Choose::MOST);
        return refused(format!("{experts} experts of a layer ({architecture}) do not run on a card: up to {most} do"));
    }
    match &decoder.latent {
        Some(LatentShape { rank, rope, value, .. }) => {
            let eights = [rank, rope, value].into_iter().all(|size| size.is_multiple_of(8));
            let (most_rank, most_key) = (LatentAttention::MOST_RANK, LatentAttention::MOST_KEY);
            if !eights || !(heads * value).is_multiple_of(32) || *rank > most_rank || *head_dim > most_key {
                return refused(format!(
                    "latents of {rank} elements beside {rope} that turn, for {heads} values of {value} ({architecture}), do not run on a card: \
                     those of up to {most_rank}, {most_key} with what turns, do, all in multiples of 8, values in 32 over all heads"
                ));
            }
        }
        None if !head_dim.is_multiple_of(4) || *head_dim > 256 => {
            return refused(format!(
                "heads of {head_dim} elements ({architecture}) do not run on a card: those of a multiple of 4 up to 256 do"
            ));
        }
        None => {}
    }
    if !config.page_tokens.is_power_of_two() {
        let problem = format!("{} is no power of two, which pages on a card need", config.page_tokens);
        return Err(Error::setting("page_tokens", problem));
    }
    let own = kv_dtype(element);
    match config.kv_dtype {
        Some(other) if ![own, KvDtype::Fp8, KvDtype::Int8].contains(&other) => {
            let problem =
                format!("{other} pages are not written on a card for this model: {own}, fp8 and int8 ones are");
            Err(Error::setting("kv_dtype", problem))
        }
        _ => Ok(()),
    }
}

/// Returns what keys and values are kept as when nobody says.
pub(crate) fn kv_dtype(element: Element) -> KvDtype {
    match element {
        Element::Bf16 => KvDtype::Bf16,
        Element::F16 => KvDtype::F16,
    }
}

fn element_of(dtype: ElementType) -> Element {
    match dtype {
        ElementType::F16 => Element::F16,
        ElementType::F32 | ElementType::Bf16 => Element::Bf16,
    }
}

/// Returns what 16-bit floats `weights` are on a card.
pub(crate) fn element(weights: &Weights) -> Element {
    let all = |wanted: ElementType| weights.packed().all(|packed| packed.weights() == WeightType::Float(wanted));
    if all(ElementType::F16) { Element::F16 } else { Element::Bf16 }
}

impl Uploaded {
    /// Uploads what `slice` has of the weights of `decoder`, and its angles up to position `context`.
    pub(crate) fn upload(
        device: &mut dyn Device,
        slice: Slice,
        decoder: &Decoder,
        weights: &Weights,
        element: Element,
        context: usize,
    ) -> Result<Self, Error> {
        let mut to = Uploader { device, slice, element, rounded: false, words: Vec::new(), panel: Vec::new() };
        let (inner, residual) = (Outputs::Plain(decoder.intermediate), Outputs::Plain(decoder.hidden));
        let Decoder { heads, kv_heads, head_dim, .. } = *decoder;
        let qkv = Outputs::Heads { heads, kv_heads, dim: head_dim };
        let mut block = |layer: &Layer| {
            let mlp = match &layer.mlp {
                weights::Mlp::Dense(dense) => Mlp::Dense(to.dense(dense, decoder.intermediate, decoder.hidden)?),
                weights::Mlp::Plain(Plain { up, down }) => {
                    Mlp::Dense(Dense { inner: Inner::Plain(to.linear(up, inner)?), down: to.linear(down, residual)? })
                }
                weights::Mlp::Experts(experts) => {
                    let mixture = decoder.mixture.as_ref().expect("a decoder with experts says how they are chosen");
                    Mlp::Experts(to.experts(experts, mixture, decoder.hidden)?)
                }
            };
            let (attention, output) = match &layer.attention {
                weights::Attention::Heads(weights::HeadAttention { qkv: linear, head_norms, output }) => {
                    let norms = match head_norms {
                        Some((q, k)) => {
                            let own = (slice.range(heads), slice.kv_heads(kv_heads));
                            Some((to.head_norm(q, own.0, decoder)?, to.head_norm(k, own.1, decoder)?))
                        }
                        None => None,
                    };
                    (Attention::Heads(HeadAttention { qkv: to.linear(linear, qkv)?, norms }), output)
                }
                weights::Attention::Latent(latent) => (Attention::Latent(to.latent(latent, heads)?), &latent.output),
            };
            Ok(Block {
                attention_norm: to.norm(layer.attention_norm.as_ref())?,
                attention,
                output: to.linear(output, residual)?,
                attention_post_norm: to.norm(layer.attention_post_norm.as_ref())?,
                mlp_norm: to.norm(layer.mlp_norm.as_ref())?,
                mlp,
                mlp_post_norm: to.norm(layer.mlp_post_norm.as_ref())?,
            })
        };
        let blocks = weights.layers.iter().map(&mut block).collect::<Result<_, Error>>()?;
        let final_norm = to.norm(Some(&weights.final_norm))?.expect("it is there");
        let head = to.linear(&weights.head, Outputs::Plain(decoder.vocab_size))?;
        let table = match (&weights.embedding, head.codes) {
            (Embedding::Rows { dtype, bytes }, _) => to.rows(*dtype, bytes)?,
            (Embedding::Packed(packed), _) => to.codes(packed)?,
            // Ranks have parts of the head, and each looks up any token.
            (Embedding::Tied, Some(_)) if head.split.is_some() => to.codes(&weights.head.packed)?,
            (Embedding::Tied, Some(codes)) => (Table::Codes(codes), head.panels),
            (Embedding::Tied, None) if head.split.is_some() => {
                (Table::Panels, to.linear(&weights.head, Outputs::All)?.panels)
            }
            (Embedding::Tied, None) => (Table::Panels, head.panels),
        };
        let angles = decoder.ropes.iter().map(|rope| {
            let (turns, pairs) = (rope.turns(context), rope.pairs());
            let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
            let mut table = Vec::with_capacity(context * pairs * 2);
            for position in 0..context {
                turns.angles(position as u32, &mut cos, &mut sin);
                table.extend(cos.iter().zip(&sin).flat_map(|(cos, sin)| [*cos, *sin]));
            }
            to.floats("angles", &table)
        });
        let angles = angles.collect::<Result<_, Error>>()?;
        let rounded = to.rounded;
        Ok(Self { table, embedding_scale: weights.embedding_scale, blocks, final_norm, head, angles, rounded })
    }

    /// Returns all linears but those of experts, and of single heads.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        fn of_block(block: &Block) -> impl Iterator<Item = &Linear> {
            let (router, dense) = match &block.mlp {
                Mlp::Dense(dense) => (None, Some(dense)),
                Mlp::Experts(Experts { router, shared, .. }) => (Some(router), shared.as_ref()),
            };
            let (first, up) = match &block.attention {
                Attention::Heads(attention) => (&attention.qkv, None),
                Attention::Latent(latent) => (&latent.entry, latent.query.as_ref().map(|query| &query.up)),
            };
            let attention = [first, &block.output].into_iter().chain(up);
            attention.chain(router).chain(dense.into_iter().flat_map(Dense::linears))
        }
        self.blocks.iter().flat_map(of_block).chain([&self.head])
    }

    /// Returns the blocks' latent attention, where they have it.
    pub(crate) fn latents(&self) -> impl Iterator<Item = &Latent> {
        self.blocks.iter().filter_map(|block| match &block.attention {
            Attention::Latent(latent) => Some(latent),
            Attention::Heads(_) => None,
        })
    }
}

struct Uploader<'a> {
    device: &'a mut dyn Device,
    slice: Slice,
    element: Element,
    rounded: bool,
    /// What is being rounded.
    words: Vec<u16>,
    /// The panel that is being put together.
    panel: Vec<u8>,
}

impl Uploader<'_> {
    fn dense(
        &mut self,
        weights::Dense { gate_up, down }: &weights::Dense,
        intermediate: usize,
        hidden: usize,
    ) -> Result<Dense, Error> {
        let inner = Inner::Gated(self.linear(gate_up, Outputs::Gated(intermediate))?);
        Ok(Dense { inner, down: self.linear(down, Outputs::Plain(hidden))? })
    }

    fn experts(&mut self, experts: &weights::Experts, mixture: &Mixture, hidden: usize) -> Result<Experts, Error> {
        let Mixture { routing, intermediate, shared, .. } = mixture;
        let all = (routing.experts, routing.chosen);
        Ok(Experts {
            router: self.linear(&experts.router, Outputs::All)?,
            correction: match &experts.correction {
                Some(correction) => self.floats("biases", correction)?,
                None => Region::default(),
            },
            gate_up: self.linear_of(&experts.gate_up, Outputs::Gated(*intermediate), all)?,
            down: self.linear_of(&experts.down, Outputs::Plain(hidden), all)?,
            shared: experts.shared.as_ref().map(|dense| self.dense(dense, *shared, hidden)).transpose()?,
        })
    }

    fn latent(&mut self, latent: &weights::Latent, heads: usize) -> Result<Latent, Error> {
        let all = (heads, heads);
        let query = match &latent.query {
            Some(weights::LowRank { norm, up }) => {
                Some(LowRank { norm: self.floats("norms", norm)?, up: self.linear(up, Outputs::All)? })
            }
            None => None,
        };
        Ok(Latent {
            entry: self.linear(&latent.entry, Outputs::All)?,
            query,
            norm: self.floats("norms", &latent.norm)?,
            key: self.linear_of(&latent.key, Outputs::All, all)?,
            value: self.linear_of(&latent.value, Outputs::All, all)?,
        })
    }

    fn linear(&mut self, linear: &weights::Linear, outputs: Outputs) -> Result<Linear, Error> {
        self.linear_of(linear, outputs, (1, 1))
    }

    /// Uploads this rank's part of the linear of `experts` experts, of which a row chooses `chosen`.
    fn linear_of(
        &mut self,
        linear: &weights::Linear,
        outputs: Outputs,
        (experts, chosen): (usize, usize),
    ) -> Result<Linear, Error> {
        let packed = &linear.packed;
        let columns = outputs.columns(self.slice);
        let each = packed.panels() / experts;
        let own = columns.as_ref().map_or(each, |columns| columns.len() / PANEL);
        let bias = match (&linear.bias, &columns) {
            (None, _) => Region::default(),
            (Some(bias), None) => self.floats("biases", bias.as_flattened())?,
            (Some(bias), Some(columns)) => {
                let bias = bias.as_flattened();
                let own: Vec<f32> = columns.iter().map(|column| column.map_or(0.0, |column| bias[column])).collect();
                self.floats("biases", &own)?
            }
        };
        let (codes, shape, panel_bytes) = match packed.weights() {
            WeightType::Quantized(_) => {
                let codes = codes_of(packed);
                (Some(codes), codes.shape(each, outputs.gated(), chosen), packed.panel_bytes())
            }
            WeightType::Float(_) => {
                let shape = LinearShape::new(each * PANEL, packed.depth(), outputs.gated(), chosen);
                (None, shape, packed.depth().next_multiple_of(32) * PANEL * 2)
            }
        };
        let panels = self.device.alloc("weights", own * experts * panel_bytes)?;
        for expert in 0..experts {
            for panel in 0..own {
                let to = panels.part((expert * own + panel) * panel_bytes, panel_bytes);
                let columns = columns.as_ref().map(|columns| &columns[panel * PANEL..][..PANEL]);
                self.panel(packed, expert * each, panel, columns, to)?;
            }
        }
        let order = match packed.order() {
            Some(order) => {
                let region = self.device.alloc("weights", order.len() * 4)?;
                // SAFETY: a u32 is four bytes.
                let bytes = unsafe { std::slice::from_raw_parts(order.as_ptr().cast(), order.len() * 4) };
                self.device.upload(region, bytes)?;
                region
            }
            None => Region::default(),
        };
        let (shape, expert_bytes, split) = (shape.part(own), (own * panel_bytes) as u64, outputs.split(self.slice));
        Ok(Linear { panels, codes, order, bias, shape, expert_bytes, split })
    }

    /// Uploads a panel to `to`: panel `panel` of those of `packed` from `first` on, or the one that is made of `columns` of these.
    fn panel(
        &mut self,
        packed: &Packed,
        first: usize,
        panel: usize,
        columns: Option<&[Option<usize>]>,
        to: Region,
    ) -> Result<(), Error> {
        let whole = |columns: &[Option<usize>]| {
            let start = columns[0].filter(|start| start.is_multiple_of(PANEL))?;
            columns.iter().copied().eq((start..start + PANEL).map(Some)).then_some(start / PANEL)
        };
        let contents = match columns.map(|columns| (columns, whole(columns))) {
            None => packed.panel_contents(first + panel),
            Some((_, Some(panel))) => packed.panel_contents(first + panel),
            Some((columns, None)) => {
                self.panel.clear();
                self.panel.resize(packed.panel_bytes(), 0);
                for (to, column) in columns.iter().enumerate() {
                    column.inspect(|column| packed.copy_column(first * PANEL + column, &mut self.panel, to));
                }
                &self.panel
            }
        };
        match packed.weights() {
            WeightType::Float(ElementType::Bf16) | WeightType::Quantized(_) => self.device.upload(to, contents),
            WeightType::Float(ElementType::F32) => {
                self.rounded = true;
                let narrow = |bytes: &[u8]| bf16::from_f32(ElementType::F32.get(bytes, 0)).to_bits();
                pair_up(contents, 4, packed.depth(), &narrow, &mut self.words);
                self.device.upload(to, bytes_of(&self.words))
            }
            WeightType::Float(ElementType::F16) => {
                let f16 = self.element == Element::F16;
                self.rounded |= !f16;
                let narrow = |bytes: &[u8]| match f16 {
                    true => u16::from_le_bytes([bytes[0], bytes[1]]),
                    false => bf16::from_f32(ElementType::F16.get(bytes, 0)).to_bits(),
                };
                pair_up(contents, 2, packed.depth(), &narrow, &mut self.words);
                self.device.upload(to, bytes_of(&self.words))
            }
        }
    }

    /// Uploads weights of the norm of q or k: those of heads `own`, where each has its own.
    fn head_norm(&mut self, weights: &[f32], own: Range<usize>, decoder: &Decoder) -> Result<Region, Error> {
        let dim = decoder.head_dim;
        let own = match decoder.qk_norm {
            QkNorm::EachHead => &weights[own.start * dim..own.end * dim],
            QkNorm::None | QkNorm::Head | QkNorm::Whole => weights,
        };
        self.floats("norms of heads", own)
    }

    /// Uploads an embedding that is quantised.
    fn codes(&mut self, packed: &Packed) -> Result<(Table, Region), Error> {
        assert!(packed.order().is_none(), "embeddings are looked up in order");
        let (panels, bytes) = (packed.panels(), packed.panel_bytes());
        let region = self.device.alloc("the embedding", panels * bytes)?;
        for panel in 0..panels {
            self.device.upload(region.part(panel * bytes, bytes), packed.panel_contents(panel))?;
        }
        Ok((Table::Codes(codes_of(packed)), region))
    }

    fn norm(&mut self, norm: Option<&Norm>) -> Result<Option<NormWeights>, Error> {
        let Some(norm) = norm else { return Ok(None) };
        let bias = match &norm.bias {
            Some(bias) => self.floats("norms", bias)?,
            None => Region::default(),
        };
        Ok(Some(NormWeights { weight: self.floats("norms", &norm.weight)?, bias }))
    }

    fn floats(&mut self, purpose: &'static str, floats: &[f32]) -> Result<Region, Error> {
        let region = self.device.alloc(purpose, floats.len() * 4)?;
        // SAFETY: an f32 is four bytes.
        let bytes = unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len() * 4) };
        self.device.upload(region, bytes)?;
        Ok(region)
    }

    /// Uploads the rows of an embedding as they are, or as f32 where its type is not that of the linears.
    fn rows(&mut self, dtype: ElementType, bytes: &[u8]) -> Result<(Table, Region), Error> {
        let kind = match (dtype, self.element) {
            (ElementType::F32, _) => Table::Floats,
            (ElementType::Bf16, Element::Bf16) | (ElementType::F16, Element::F16) => Table::Rows,
            _ => {
                let floats: Vec<f32> = (0..bytes.len() / 2).map(|at| dtype.get(bytes, at)).collect();
                return Ok((Table::Floats, self.floats("the embedding", &floats)?));
            }
        };
        let region = self.device.alloc("the embedding", bytes.len())?;
        self.device.upload(region, bytes)?;
        Ok((kind, region))
    }
}

fn codes_of(packed: &Packed) -> Codes {
    Codes::new(packed).expect("`check` refuses what kernels do not read")
}

/// Makes of a panel of elements of `bytes` bytes, `[depth][64]`, pairs of neighbours along the depth, `[depth / 2][64][2]`, with zeros up to a
/// depth of whole 32.
fn pair_up(panel: &[u8], bytes: usize, depth: usize, narrow: &dyn Fn(&[u8]) -> u16, to: &mut Vec<u16>) {
    to.clear();
    to.resize(depth.next_multiple_of(32) * PANEL, 0);
    for (index, element) in panel.chunks_exact(bytes).take(depth * PANEL).enumerate() {
        let (at, column) = (index / PANEL, index % PANEL);
        to[(at / 2 * PANEL + column) * 2 + at % 2] = narrow(element);
    }
}

fn bytes_of(words: &[u16]) -> &[u8] {
    // SAFETY: an u16 is two bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 2) }
}
