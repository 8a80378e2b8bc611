//! `adapter_model.safetensors`: the factors of every adapted linear, in the order of the packed linears.

use super::{Adapter, config::Peft};
use crate::{
    Error, Model,
    cpu::{
        adapter::{Delta, Factors},
        packed::PANEL,
    },
    model::{
        checkpoint::{Checkpoint, ElementType, Tensor},
        decoder::{Decoder, QkvNames, UpNames},
    },
};
use std::{collections::BTreeSet, path::Path, sync::Arc};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT writes before a module's name.
const PREFIX: &str = "base_model.model.";

/// The deltas of one layer.
#[derive(Debug, Default)]
pub(crate) struct LayerDeltas {
    pub(crate) qkv: Option<Delta>,
    pub(crate) output: Option<Delta>,
    /// Of what leads into the MLP: gate and up, or up alone.
    pub(crate) up: Option<Delta>,
    pub(crate) down: Option<Delta>,
}

impl LayerDeltas {
    /// Returns them in the order of the fields.
    pub(crate) fn linears(&self) -> [Option<&Delta>; 4] {
        [&self.qkv, &self.output, &self.up, &self.down].map(Option::as_ref)
    }
}

/// A packed linear of every layer, as adapters name its parts.
#[derive(Debug)]
struct Shape {
    inputs: usize,
    /// Name within the layer, and outputs.
    parts: Vec<(&'static str, usize)>,
    order: Order,
}

/// Which row of its parts, one part after the other, a packed column is; the same as in `model/weights.rs` and `model/packer.rs`.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// They follow each other.
    SideBySide,
    /// The part holds q, k and v of one head after the other; packed, all of q come first.
    ByHead { heads: usize, head_dim: usize },
    /// Half panels of the first `outputs` rows (gate) and of the next (up) alternate.
    Interleaved { outputs: usize },
}

impl Shape {
    fn rows(&self) -> usize {
        self.parts.iter().map(|(_, outputs)| outputs).sum()
    }

    fn panels(&self) -> usize {
        match self.order {
            Order::SideBySide | Order::ByHead { .. } => self.rows().div_ceil(PANEL),
            Order::Interleaved { outputs } => outputs.div_ceil(PANEL / 2),
        }
    }

    /// Returns the part and its output that stand in packed column `column`.
    fn column(&self, column: usize) -> Option<(usize, usize)> {
        let mut row = match self.order {
            Order::SideBySide => column,
            Order::ByHead { heads, head_dim } => {
                let (index, within) = (column / head_dim, column % head_dim);
                if index >= 3 * heads {
                    return None;
                }
                (index % heads * 3 + index / heads) * head_dim + within
            }
            Order::Interleaved { outputs } => {
                let index = column / PANEL * (PANEL / 2) + column % (PANEL / 2);
                if index >= outputs {
                    return None;
                }
                index + column % PANEL / (PANEL / 2) * outputs
            }
        };
        for (part, (_, outputs)) in self.parts.iter().enumerate() {
            if row < *outputs {
                return Some((part, row));
            }
            row -= outputs;
        }
        None
    }
}

/// What can be adapted of each layer.
#[derive(Debug)]
struct Shapes {
    /// What stands before a module's name: `model.layers`.
    layers: String,
    /// q/k/v, output, into the MLP, out of it.
    linears: [Shape; 4],
    /// Per layer: is its MLP one of experts, which cannot be adapted?
    experts: Vec<bool>,
}

impl Shapes {
    /// Returns them under the names of the checkpoint; `tensors` shows which root these have.
    fn of(decoder: &Decoder, tensors: &Checkpoint) -> Self {
        let names = &decoder.names;
        let (hidden, inner, query, kv) = (decoder.hidden, decoder.intermediate, decoder.query_dim(), decoder.kv_dim());
        let side_by_side = |inputs, parts| Shape { inputs, parts, order: Order::SideBySide };
        let qkv = match names.qkv {
            QkvNames::Apart { q, k, v } => side_by_side(hidden, vec![(q, query), (k, kv), (v, kv)]),
            QkvNames::Fused(qkv) => side_by_side(hidden, vec![(qkv, query + 2 * kv)]),
            QkvNames::ByHead(qkv) => {
                let order = Order::ByHead { heads: decoder.heads, head_dim: decoder.head_dim };
                Shape { inputs: hidden, parts: vec![(qkv, 3 * query)], order }
            }
        };
        let gated = |parts| Shape { inputs: hidden, parts, order: Order::Interleaved { outputs: inner } };
        let up = match names.up {
            UpNames::Gated { gate, up } => gated(vec![(gate, inner), (up, inner)]),
            UpNames::Fused(gate_up) => gated(vec![(gate_up, 2 * inner)]),
            UpNames::Plain(up) => side_by_side(hidden, vec![(up, inner)]),
        };
        let output = side_by_side(query, vec![(names.output, hidden)]);
        let down = side_by_side(inner, vec![(names.down, hidden)]);
        let has =
            |root: &&&str| tensors.names().any(|name| name.starts_with(&format!("{PREFIX}{root}.{}.", names.layers)));
        let root = names.roots.iter().find(has).unwrap_or(&names.roots[0]);
        let experts = decoder.mixture.as_ref().map_or(vec![false; decoder.layers()], |mixture| mixture.layers.clone());
        Self { layers: format!("{root}.{}", names.layers), linears: [qkv, output, up, down], experts }
    }

    fn names(&self) -> String {
        let parts = self.linears.iter().flat_map(|shape| &shape.parts);
        parts.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// Reads the adapter in `dir` for `model`.
pub(super) fn read(model: &Model, dir: &Path, max_rank: usize) -> Result<Adapter, Error> {
    let (config_path, path) = (dir.join(CONFIG), dir.join(TENSORS));
    let peft = Peft::read(&config_path)?;
    if peft.largest_rank() > max_rank {
        let problem = format!("r: {} is more than the largest rank taken here, {max_rank}", peft.largest_rank());
        return Err(Error::checkpoint(&config_path, problem));
    }
    if let Some(end) = peft.end() {
        let problem = format!("target_modules: `{end}`: adapters of the embedding and the head are not supported");
        return Err(Error::checkpoint(&config_path, problem));
    }
    if model.decoder.latent.is_some() {
        let problem = format!("adapters of latent attention ({}) are not supported", model.decoder.architecture);
        return Err(Error::checkpoint(&config_path, problem));
    }
    let tensors = Checkpoint::open_file(&path)?;
    check_kinds(&tensors, &path)?;
    let shapes = Shapes::of(&model.decoder, &tensors);
    let mut reader = Reader {
        peft: &peft,
        tensors: &tensors,
        path: &path,
        dtype: tensors.matrix_dtype(),
        expected: BTreeSet::new(),
        hasher: blake3::Hasher::new_derive_key("baton adapter fingerprint v1"),
    };
    let layers =
        (0..model.decoder.layers()).map(|layer| reader.layer(&shapes, layer)).collect::<Result<Vec<_>, _>>()?;
    if reader.expected.is_empty() {
        let names = shapes.names();
        let problem = format!("target_modules names no linear of {}; its linears: {names}", model.decoder.architecture);
        return Err(Error::checkpoint(&config_path, problem));
    }
    reader.check_names(&shapes)?;
    let bytes =
        layers.iter().flat_map(|layer| layer.linears().into_iter().flatten()).map(|delta| delta.bytes() as u64).sum();
    Ok(Adapter {
        id: reader.hasher.finalize().to_hex()[..32].to_owned(),
        model: model.info().fingerprint.clone(),
        path: dir.to_owned(),
        rank: peft.largest_rank(),
        bytes,
        layers,
        life: Arc::default(),
    })
}

/// Reads factors, and notes which.
struct Reader<'a> {
    peft: &'a Peft,
    tensors: &'a Checkpoint,
    path: &'a Path,
    /// Of all tensors, or f32, which holds any.
    dtype: ElementType,
    /// Names of all tensors that belong here.
    expected: BTreeSet<String>,
    hasher: blake3::Hasher,
}

impl<'a> Reader<'a> {
    fn layer(&mut self, shapes: &Shapes, layer: usize) -> Result<LayerDeltas, Error> {
        let [qkv, output, up, down] = &shapes.linears;
        let (qkv, output) = (self.delta(shapes, qkv, layer)?, self.delta(shapes, output, layer)?);
        if shapes.experts[layer] {
            return Ok(LayerDeltas { qkv, output, up: None, down: None });
        }
        Ok(LayerDeltas { qkv, output, up: self.delta(shapes, up, layer)?, down: self.delta(shapes, down, layer)? })
    }

    fn delta(&mut self, shapes: &Shapes, shape: &Shape, layer: usize) -> Result<Option<Delta>, Error> {
        let parts: Vec<Option<Factors<'a>>> = shape
            .parts
            .iter()
            .map(|(name, outputs)| {
                let module = format!("{}.{layer}.{name}", shapes.layers);
                self.factors(&module, layer, *outputs, shape.inputs)
            })
            .collect::<Result<_, _>>()?;
        if parts.iter().all(Option::is_none) {
            return Ok(None);
        }
        Delta::new(self.dtype, shape.inputs, shape.panels(), &parts, &|column| shape.column(column)).map(Some)
    }

    fn factors(
        &mut self,
        module: &str,
        layer: usize,
        outputs: usize,
        inputs: usize,
    ) -> Result<Option<Factors<'a>>, Error> {
        if !self.peft.adapts(module, layer) {
            return Ok(None);
        }
        let (rank, scale) = (self.peft.rank(module), self.peft.scale(module));
        self.hasher.update(format!("{module}\0{rank}\0{}\0", scale.to_bits()).as_bytes());
        let down = self.tensor(format!("{PREFIX}{module}.lora_A.weight"), &[rank, inputs])?;
        let up = self.tensor(format!("{PREFIX}{module}.lora_B.weight"), &[outputs, rank])?;
        Ok(Some(Factors { down, up, rank, scale }))
    }

    fn tensor(&mut self, name: String, shape: &[usize]) -> Result<Tensor<'a>, Error> {
        let tensor = self.tensors.tensor(&name, shape)?;
        let count = shape.iter().product::<usize>();
        let wrong = (0..count).map(|index| tensor.dtype.get(tensor.bytes, index)).position(|value| !value.is_finite());
        if let Some(index) = wrong {
            let value = tensor.dtype.get(tensor.bytes, index);
            let problem = format!("tensor `{name}` holds {value} at {index}, expected finite numbers");
            return Err(Error::checkpoint(self.path, problem));
        }
        self.hasher.update(tensor.dtype.name().as_bytes());
        self.hasher.update(tensor.bytes);
        self.expected.insert(name);
        Ok(tensor)
    }

    /// Refuses files with tensors beyond those that were read: they would change the numbers.
    fn check_names(&self, shapes: &Shapes) -> Result<(), Error> {
        let Some(name) = self.tensors.names().find(|name| !self.expected.contains(*name)) else { return Ok(()) };
        let known = shapes.names();
        let problem =
            format!("tensor `{name}` is not of one of the linears that {CONFIG} names; this model has: {known}");
        Err(Error::checkpoint(self.path, problem))
    }
}

/// Refuses kinds of tensors that no linear here has, whatever the configuration says.
fn check_kinds(tensors: &Checkpoint, path: &Path) -> Result<(), Error> {
    const ENDS: [&str; 5] = ["lora_embedding", "embed_tokens", "embed_in", "embed_out", "lm_head"];
    for name in tensors.names() {
        let why = if name.contains("lora_magnitude_vector") {
            "belongs to DoRA"
        } else if ENDS.iter().any(|end| name.contains(end)) {
            "adapts the embedding or the head"
        } else if name.contains(".experts.") || name.contains("shared_expert") {
            "adapts an expert"
        } else {
            continue;
        };
        return Err(Error::checkpoint(path, format!("tensor `{name}` {why}, which is not supported")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_the_packer() {
        let parts = vec![("q", 70), ("k", 20)];
        let side = Shape { inputs: 1, parts, order: Order::SideBySide };
        assert_eq!(
            (side.panels(), side.column(69), side.column(70), side.column(90)),
            (2, Some((0, 69)), Some((1, 0)), None)
        );
        let parts = vec![("gate", 40), ("up", 40)];
        let mixed = Shape { inputs: 1, parts, order: Order::Interleaved { outputs: 40 } };
        assert_eq!(mixed.panels(), 2);
        assert_eq!(
            [0, 31, 32, 63].map(|column| mixed.column(column)),
            [Some((0, 0)), Some((0, 31)), Some((1, 0)), Some((1, 31))]
        );
        assert_eq!(
            [64, 71, 72, 96].map(|column| mixed.column(column)),
            [Some((0, 32)), Some((0, 39)), None, Some((1, 32))]
        );
        let by_head = Shape { inputs: 1, parts: vec![("qkv", 12)], order: Order::ByHead { heads: 2, head_dim: 2 } };
        let rows = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11].map(|row| Some((0, row)));
        assert_eq!(std::array::from_fn(|column| by_head.column(column)), rows);
        assert_eq!(by_head.column(12), None);
        let fused = Shape { inputs: 1, parts: vec![("gate_up", 80)], order: Order::Interleaved { outputs: 40 } };
        assert_eq!((fused.column(1), fused.column(33)), (Some((0, 1)), Some((0, 41))));
    }
}
