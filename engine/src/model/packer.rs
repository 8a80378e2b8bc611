//! From the tensors of a checkpoint to packed linears: what is read where, side by side or interleaved, counted as it goes.

use crate::{
    Error, LoadProgress,
    cpu::{
        packed::{PANEL, Packed, StoredRow},
        scheme::{QuantizedMatrix, QuantizedRow, Scheme},
    },
    model::{
        checkpoint::{Checkpoint, ElementType, Tensor},
        decoder::Decoder,
        quantized::{Quantization, Quantize, Quantizing},
        weights::{Linear, Norm},
    },
};
use std::sync::Arc;

/// Packs one checkpoint, counting as it goes.
pub(super) struct Packer<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) progress: &'a mut dyn FnMut(LoadProgress),
    pub(super) state: LoadProgress,
    pub(super) parameters: u64,
    pub(super) dtype: ElementType,
    pub(super) quantization: Option<&'a Quantization>,
    pub(super) quantize: Option<Quantize>,
    threads: usize,
    /// Bytes packed since mapped pages were last given back.
    held: usize,
}

/// Bytes of a checkpoint that stay mapped in memory after they were packed, at most and roughly.
const HELD: usize = 64 << 20;

/// A matrix of a checkpoint, `[outputs][inputs]`.
#[derive(Clone)]
pub(super) enum Matrix<'a> {
    /// As floats.
    Float(Tensor<'a>),
    /// As codes with scales.
    Quantized(Arc<dyn QuantizedMatrix + 'a>),
}

impl Matrix<'_> {
    /// Returns the bytes in the checkpoint.
    pub(super) fn stored_bytes(&self) -> usize {
        match self {
            Matrix::Float(tensor) => tensor.bytes.len(),
            Matrix::Quantized(matrix) => matrix.stored_bytes(),
        }
    }

    /// Writes the weights of an output, input by input.
    pub(super) fn widen(&self, output: usize, weights: &mut [f32]) {
        match self {
            Matrix::Float(tensor) => {
                let row = tensor.row(output, weights.len());
                weights.iter_mut().enumerate().for_each(|(index, weight)| *weight = tensor.dtype.get(row, index));
            }
            Matrix::Quantized(matrix) => {
                let scheme = matrix.scheme();
                let mut row = QuantizedRow::zeroed(&scheme, weights.len());
                matrix.read(output, &mut row);
                let Some(order) = matrix.order() else {
                    return row.widen(&scheme, weights);
                };
                let mut ordered = vec![0.0; weights.len()];
                row.widen(&scheme, &mut ordered);
                order.iter().zip(ordered).for_each(|(input, weight)| weights[*input as usize] = weight);
            }
        }
    }
}

/// How a packed matrix keeps what several sources give.
enum Common {
    /// All are floats of this type.
    Float(ElementType),
    /// All can be brought to one scheme, and take their inputs in one order.
    Quantized(Scheme, Option<Arc<[u32]>>),
    /// They have nothing in common but their values.
    Widened,
}

impl Common {
    fn of(sources: &[Source<'_>]) -> Self {
        let types = || {
            sources.iter().map(|source| match &source.matrix {
                Matrix::Float(tensor) => Ok(tensor.dtype),
                Matrix::Quantized(matrix) => Err(matrix),
            })
        };
        if types().all(|kind| kind.is_ok()) {
            let mut dtypes = types().flatten();
            let first = dtypes.next().unwrap_or(ElementType::F32);
            return Common::Float(if dtypes.all(|dtype| dtype == first) { first } else { ElementType::F32 });
        }
        let matrices: Vec<_> = types().filter_map(Result::err).collect();
        let order = matrices[0].order();
        let scheme =
            matrices[1..].iter().try_fold(matrices[0].scheme(), |scheme, matrix| scheme.unite(matrix.scheme()));
        match scheme {
            Some(scheme)
                if matrices.len() == sources.len() && matrices.iter().all(|matrix| matrix.order() == order) =>
            {
                Common::Quantized(scheme, order.cloned())
            }
            _ => Common::Widened,
        }
    }
}

/// A matrix that is part of a packed one: rows `[outputs]` of the model's input width, and biases.
#[derive(Clone)]
pub(super) struct Source<'a> {
    pub(super) matrix: Matrix<'a>,
    pub(super) outputs: usize,
    pub(super) bias: Option<Vec<f32>>,
}

impl<'a> Source<'a> {
    /// Returns `outputs` outputs of the matrix from `first` on.
    pub(super) fn part(&self, first: usize, outputs: usize) -> Source<'a> {
        let matrix = match &self.matrix {
            Matrix::Float(tensor) => {
                let stride = tensor.bytes.len() / self.outputs;
                Matrix::Float(Tensor { bytes: &tensor.bytes[first * stride..][..outputs * stride], ..*tensor })
            }
            Matrix::Quantized(whole) => {
                let stored_bytes = whole.stored_bytes() * outputs / self.outputs;
                Matrix::Quantized(Arc::new(Part { whole: whole.clone(), first, stored_bytes }))
            }
        };
        Source { matrix, outputs, bias: self.bias.as_ref().map(|bias| bias[first..first + outputs].to_vec()) }
    }
}

/// Some outputs of a quantised matrix.
struct Part<'a> {
    whole: Arc<dyn QuantizedMatrix + 'a>,
    first: usize,
    stored_bytes: usize,
}

impl QuantizedMatrix for Part<'_> {
    fn scheme(&self) -> Scheme {
        self.whole.scheme()
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    fn order(&self) -> Option<&Arc<[u32]>> {
        self.whole.order()
    }

    fn read(&self, output: usize, row: &mut QuantizedRow) {
        self.whole.read(self.first + output, row);
    }
}

impl<'a> Packer<'a> {
    pub(super) fn new(
        decoder: &'a Decoder,
        checkpoint: &'a Checkpoint,
        quantization: Option<&'a Quantization>,
        quantize: Option<Quantize>,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let state = LoadProgress { done: 0, total: checkpoint.total_bytes() };
        let dtype = checkpoint.matrix_dtype();
        let packer = Self {
            decoder,
            checkpoint,
            progress,
            state,
            parameters: 0,
            dtype,
            quantization,
            quantize,
            threads,
            held: 0,
        };
        (packer.progress)(state);
        packer
    }

    /// Finds the linear `name`, to be quantised if that was asked for.
    pub(super) fn source(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
    ) -> Result<Source<'a>, Error> {
        let source = self.source_as_stored(name, outputs, inputs, bias)?;
        match (self.quantize, source.matrix) {
            (Some(quantize), Matrix::Float(tensor)) => {
                let matrix = self.quantizing(name, tensor, inputs, quantize.scheme(inputs))?;
                Ok(Source { matrix, ..source })
            }
            (_, matrix) => Ok(Source { matrix, ..source }),
        }
    }

    /// Finds the linear `name`, which is not quantised when it is loaded: one that decides, such as a router of experts.
    pub(super) fn source_as_stored(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
    ) -> Result<Source<'a>, Error> {
        let quantized = match self.quantization {
            Some(quantization) => quantization.matrix(self.checkpoint, name, outputs, inputs)?,
            None => None,
        };
        let matrix = match quantized {
            Some(matrix) => Matrix::Quantized(matrix),
            None => Matrix::Float(self.checkpoint.tensor(&format!("{name}.weight"), &[outputs, inputs])?),
        };
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), outputs)?) } else { None };
        self.parameters += (outputs * inputs) as u64;
        Ok(Source { matrix, outputs, bias })
    }

    /// Makes the head of `matrix`, `[vocab][hidden]`.
    pub(super) fn head(&mut self, name: &str, matrix: Matrix<'a>) -> Result<Source<'a>, Error> {
        let matrix = match (self.quantize, matrix) {
            (Some(quantize), Matrix::Float(tensor)) => {
                self.quantizing(name, tensor, self.decoder.hidden, quantize.head_scheme())?
            }
            (_, matrix) => matrix,
        };
        Ok(Source { matrix, outputs: self.decoder.vocab_size, bias: None })
    }

    /// Quantises a matrix as it is packed; only finite numbers have codes.
    fn quantizing(&self, name: &str, tensor: Tensor<'a>, inputs: usize, scheme: Scheme) -> Result<Matrix<'a>, Error> {
        if let Some((at, value)) = tensor.first_not_finite() {
            let problem = format!("the weight of output {} and input {} is {value}", at / inputs, at % inputs);
            return Err(self.checkpoint.fault(&format!("{name}.weight"), &problem));
        }
        Ok(Matrix::Quantized(Arc::new(Quantizing { tensor, inputs, scheme })))
    }

    pub(super) fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, Error> {
        self.floats(name, &[length])
    }

    /// Reads a small tensor as it is.
    pub(super) fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        self.parameters += shape.iter().product::<usize>() as u64;
        self.count(tensor.bytes.len());
        Ok(tensor.to_f32())
    }

    /// Reads `name.weight` and, where norms have one, `name.bias`.
    pub(super) fn norm(&mut self, name: &str) -> Result<Norm, Error> {
        let (hidden, whole) = (self.decoder.hidden, self.decoder.hidden.next_multiple_of(PANEL));
        let mut weight = self.vector(&format!("{name}.weight"), hidden)?;
        weight.iter_mut().for_each(|weight| *weight += self.decoder.norm_offset);
        weight.resize(whole, 0.0);
        let bias = self.decoder.norm_bias.then(|| self.vector(&format!("{name}.bias"), hidden)).transpose()?;
        let bias = bias.map(|mut bias| {
            bias.resize(whole, 0.0);
            bias
        });
        Ok(Norm { weight, bias })
    }

    /// Packs matrices so that their outputs follow each other.
    pub(super) fn side_by_side(&mut self, sources: &[Source<'_>], inputs: usize) -> Result<Linear, Error> {
        let outputs: usize = sources.iter().map(|source| source.outputs).sum();
        let column = |mut column: usize| {
            sources.iter().find_map(|source| {
                if column >= source.outputs {
                    column -= source.outputs;
                    return None;
                }
                Some((source, column))
            })
        };
        self.linear(sources, outputs.div_ceil(PANEL), inputs, &column)
    }

    /// Packs gate and up so that a panel holds 32 columns of each.
    pub(super) fn interleaved(&mut self, gate: &Source<'_>, up: &Source<'_>, inputs: usize) -> Result<Linear, Error> {
        let sources = [gate.clone(), up.clone()];
        let column = |column: usize| {
            let index = column / PANEL * (PANEL / 2) + column % (PANEL / 2);
            let source = &sources[column % PANEL / (PANEL / 2)];
            (index < source.outputs).then_some((source, index))
        };
        self.linear(&sources, gate.outputs.div_ceil(PANEL / 2), inputs, &column)
    }

    /// Packs `panels` panels; `column` says which output of which source a column is.
    fn linear<'b>(
        &mut self,
        sources: &[Source<'b>],
        panels: usize,
        inputs: usize,
        column: &(dyn Fn(usize) -> Option<(&'b Source<'b>, usize)> + Sync),
    ) -> Result<Linear, Error>
    where
        'a: 'b,
    {
        let linear = self.pack_as(Common::of(sources), sources, panels, inputs, column)?;
        self.count(sources.iter().map(|source| source.matrix.stored_bytes()).sum());
        Ok(linear)
    }

    /// The same, of panels that do not all belong to one input: their inputs stay in the order of the checkpoint. What they
    /// are made of is counted by the caller.
    pub(super) fn blocks<'b>(
        &self,
        sources: &[Source<'b>],
        panels: usize,
        inputs: usize,
        column: &(dyn Fn(usize) -> Option<(&'b Source<'b>, usize)> + Sync),
    ) -> Result<Linear, Error>
    where
        'a: 'b,
    {
        let common = match Common::of(sources) {
            Common::Quantized(_, Some(_)) => Common::Widened,
            common => common,
        };
        self.pack_as(common, sources, panels, inputs, column)
    }

    fn pack_as<'b>(
        &self,
        common: Common,
        sources: &[Source<'b>],
        panels: usize,
        inputs: usize,
        column: &(dyn Fn(usize) -> Option<(&'b Source<'b>, usize)> + Sync),
    ) -> Result<Linear, Error>
    where
        'a: 'b,
    {
        let threads = self.threads;
        let packed = match common {
            Common::Float(dtype) => Packed::pack(dtype, panels, inputs, threads, &|index| {
                let (source, output) = column(index)?;
                match &source.matrix {
                    Matrix::Float(tensor) => Some(StoredRow { dtype: tensor.dtype, bytes: tensor.row(output, inputs) }),
                    Matrix::Quantized(_) => unreachable!("all sources are floats"),
                }
            }),
            Common::Quantized(scheme, order) => {
                Packed::pack_quantized(scheme, panels, inputs, threads, order, &|index, row| {
                    let Some((Source { matrix: Matrix::Quantized(matrix), .. }, output)) = column(index) else {
                        return false;
                    };
                    let from = matrix.scheme();
                    *row = QuantizedRow::zeroed(&from, inputs);
                    matrix.read(output, row);
                    row.convert(&from, &scheme);
                    true
                })
            }
            Common::Widened => Packed::pack_made(panels, inputs, threads, &|index, weights| {
                let Some((source, output)) = column(index) else { return false };
                source.matrix.widen(output, weights);
                true
            }),
        }?;
        let bias_of = |index: usize| column(index).and_then(|(source, output)| Some(source.bias.as_ref()?[output]));
        let has_bias = sources.iter().any(|source| source.bias.is_some());
        let bias = has_bias.then(|| {
            let panel = |panel: usize| std::array::from_fn(|lane| bias_of(panel * PANEL + lane).unwrap_or(0.0));
            (0..panels).map(panel).collect()
        });
        Ok(Linear { packed, bias })
    }

    pub(super) fn count(&mut self, bytes: usize) {
        self.state.done += bytes as u64;
        self.held += bytes;
        if self.held > HELD {
            self.checkpoint.release();
            self.held = 0;
        }
        (self.progress)(self.state);
    }
}
