//! Linears of a step: which tasks there are, and what adapters add to them.

use super::{
    ALONE, CHUNK, Cpu, Shared, Span,
    adapter::{Adapted, Delta, RANK_STEP, ShrinkTask},
    encode::{EncodeTask, Encoding},
    format::Format,
    linear::{AdaptedRows, FEW_ROWS, LinearTask, Output, TASK_PANELS, TASK_ROWS},
    lock,
    packed::{PANEL, Packed},
    pool::Pool,
};
use crate::{lora::LayerDeltas, model::weights::Linear, reuse::reuse};
use std::ops::Range;

/// What adapters add to one linear of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deltas<'a> {
    spans: &'a [Span<'a>],
    layer: usize,
    /// Where in a layer's deltas the linear's is.
    place: fn(&LayerDeltas) -> &Option<Delta>,
}

impl<'a> Deltas<'a> {
    /// Nothing.
    pub(super) const NONE: Self = Self { spans: &[], layer: 0, place: |layer| &layer.qkv };

    /// The deltas of the adapters of `spans` where `place` looks in layer `layer`.
    pub(super) fn new(spans: &'a [Span<'a>], layer: usize, place: fn(&LayerDeltas) -> &Option<Delta>) -> Self {
        Self { spans, layer, place }
    }

    /// Returns the rows that have a delta, with it.
    fn rows(self) -> impl Iterator<Item = (Range<usize>, &'a Delta)> {
        let of_span = move |span: &'a Span<'a>| {
            let delta = (self.place)(span.adapter?.layer(self.layer)).as_ref()?;
            Some((span.first..span.first + span.tokens, delta))
        };
        self.spans.iter().filter_map(of_span)
    }
}

/// Lists that deltas are worked out in; their memory is kept from linear to linear, and they are empty in between.
#[derive(Debug, Default)]
pub(super) struct DeltaLists {
    shrinks: Vec<Shrink<'static>>,
    adapted: Vec<Option<Adapted<'static>>>,
}

/// Some numbers of `A x` for some rows.
#[derive(Debug)]
struct Shrink<'a> {
    delta: &'a Delta,
    rows: Range<usize>,
    ranks: Range<usize>,
}

/// Which buffer a linear reads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand {
    /// What queries of latent attention are made from.
    Narrow,
    Input,
    Attended,
    Gated,
}

impl Cpu {
    /// Multiplies all rows of an operand by `linear`, and adds `deltas`.
    pub(super) fn linear(&mut self, linear: &Linear, operand: Operand, output: Output, deltas: Deltas<'_>) {
        let latent = self.latent.as_ref();
        let (buffer, input_stride) = match operand {
            Operand::Narrow => latent.expect("only latent attention has a narrow input").narrow(),
            Operand::Input => (&self.input, self.sizes.input),
            Operand::Attended => (&self.attended, self.sizes.attended),
            Operand::Gated => (&self.gated, self.sizes.gated),
        };
        // Adapters see the inputs in their own order, whatever that of the packed weights.
        let input = Shared(buffer.as_ptr().cast_mut());
        let adapted = adapt(
            &mut self.pool,
            self.kernels.shrink,
            deltas,
            self.rows,
            (&input, input_stride, self.sizes.format),
            &mut self.hidden,
            &mut self.delta_lists,
        );
        let weights = &linear.packed;
        let (rows, panels, depth) = (self.rows, weights.panels(), weights.depth());
        let (run, encoding) = self.kernels.linear(weights);
        let groups = weights.groups();
        let format = self.sizes.format;
        let (input, input_stride) = if encoding == Encoding::Floats(format) && weights.order().is_none() {
            (input, input_stride)
        } else {
            let stride = encoding.stride(depth);
            assert!(rows * stride <= self.encoded.len(), "every operand fits");
            let to = Shared(self.encoded.as_mut_ptr());
            let from = (&input, input_stride, format);
            encode(&mut self.pool, self.kernels.encode, from, weights, rows, (&to, stride, encoding));
            (to, stride)
        };

        let row_blocks = rows.div_ceil(TASK_ROWS).max(1);
        // A multiple of the full tiles of all units, so that blocks do not end in short ones and start on whole ones.
        let block_rows = rows.div_ceil(row_blocks).next_multiple_of(96).min(TASK_ROWS);
        // Few rows are a stream of weights: each task reads a long run of it. Many rows share a few panels while they are in
        // cache. Either way there are many tasks for each thread, so that the last one is not waited for long.
        let most = if rows <= FEW_ROWS { 16 } else { TASK_PANELS };
        let run_panels = (panels * row_blocks).div_ceil(16 * self.pool.threads()).clamp(1, most);
        let runs = panels.div_ceil(run_panels);
        let output = SharedOutput(output);
        let scratch = &self.scratch;
        let adapted_rows = |row: usize, panel| {
            let rows = adapted.get(row..rows.min(row + block_rows)).filter(|_| !adapted.is_empty())?;
            Some(AdaptedRows { rows, panel })
        };
        let body = |index: usize, thread: usize| {
            let (row, panel) = (index % row_blocks * block_rows, index / row_blocks * run_panels);
            let task = LinearTask {
                input: input.at(row * input_stride),
                input_stride,
                rows: block_rows.min(rows - row),
                depth,
                panel: weights.panel(panel),
                panel_bytes: weights.panel_bytes(),
                panels: run_panels.min(panels - panel),
                groups,
                bias: linear.bias.as_ref().map(|bias| &bias[panel..]),
                adapted: adapted_rows(row, panel),
                output: output.part(row, panel),
            };
            // SAFETY: buffers hold `rows` rows of whole panels, and every task has its own rows and columns.
            unsafe { run(&task, lock(&scratch[thread]).floats_mut()) };
        };
        if rows * depth * panels * PANEL < ALONE {
            (0..runs * row_blocks).for_each(|index| body(index, 0));
        } else {
            self.pool.run(runs * row_blocks, &body);
        }
        self.delta_lists.adapted = reuse(adapted);
    }
}

/// Computes what the adapters of `deltas` make of their rows' inputs, and returns for each of the `rows` rows what its linear adds;
/// nothing when there are no deltas.
fn adapt<'a>(
    pool: &mut Pool,
    shrink: unsafe fn(&ShrinkTask<'_>),
    deltas: Deltas<'a>,
    rows: usize,
    (input, input_stride, format): (&Shared<u8>, usize, Format),
    hidden: &'a mut Vec<f32>,
    lists: &mut DeltaLists,
) -> Vec<Option<Adapted<'a>>> {
    /// Ranks of one task.
    const TASK_RANKS: usize = 4 * RANK_STEP;
    let mut adapted = reuse(std::mem::take(&mut lists.adapted));
    let Some(stride) = deltas.rows().map(|(_, delta)| delta.ranks()).max() else { return adapted };
    if hidden.len() < rows * stride {
        hidden.resize(rows * stride, 0.0);
    }
    let mut tasks: Vec<Shrink<'_>> = reuse(std::mem::take(&mut lists.shrinks));
    for (rows, delta) in deltas.rows() {
        for first in rows.clone().step_by(CHUNK) {
            let shrink = |rank: usize| Shrink {
                delta,
                rows: first..rows.end.min(first + CHUNK),
                ranks: rank..delta.ranks().min(rank + TASK_RANKS),
            };
            tasks.extend((0..delta.ranks()).step_by(TASK_RANKS).map(shrink));
        }
    }
    let to = Shared(hidden.as_mut_ptr());
    let work: usize = deltas.rows().map(|(rows, delta)| rows.len() * delta.work()).sum();
    let body = |index: usize, _: usize| {
        let Shrink { delta, rows, ranks } = &tasks[index];
        let task = ShrinkTask {
            delta,
            ranks: ranks.clone(),
            input: input.at(rows.start * input_stride),
            input_stride,
            format,
            rows: rows.len(),
            hidden: to.at(rows.start * stride),
            hidden_stride: stride,
        };
        // SAFETY: the rows lie in the operand, whose rows are whole cache lines, and every task has its own rows and ranks.
        unsafe { shrink(&task) };
    };
    if work < ALONE {
        (0..tasks.len()).for_each(|index| body(index, 0));
    } else {
        pool.run(tasks.len(), &body);
    }
    let hidden: &'a [f32] = hidden;
    lists.shrinks = reuse(tasks);
    adapted.resize(rows, None);
    for (rows, delta) in deltas.rows() {
        for row in rows {
            adapted[row] = Some(Adapted { delta, hidden: &hidden[row * stride..][..delta.ranks()] });
        }
    }
    adapted
}

/// Encodes `rows` rows as `weights` read them.
pub(super) fn encode(
    pool: &mut Pool,
    run: unsafe fn(&EncodeTask<'_>),
    (from, from_stride, format): (&Shared<u8>, usize, Format),
    weights: &Packed,
    rows: usize,
    (to, stride, encoding): (&Shared<u8>, usize, Encoding),
) {
    let (depth, order) = (weights.depth(), weights.order());
    assert!(order.is_none() || format == Format::F32, "weights with an order are integers, and inputs of others f32");
    let body = |row: usize, _: usize| {
        let (from, to) = (from.at(row * from_stride), to.at(row * stride));
        // SAFETY: the row lies in both buffers and belongs to this task, and an order names its inputs alone.
        unsafe { run(&EncodeTask { from, format, order, depth, to, encoding }) };
    };
    if rows * depth < ALONE {
        (0..rows).for_each(|row| body(row, 0));
    } else {
        pool.run(rows, &body);
    }
}

/// An output that tasks of one job share, each with rows and columns of its own.
pub(super) struct SharedOutput(pub(super) Output);

// SAFETY: only an address, as for `Shared`.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    pub(super) fn part(&self, row: usize, panel: usize) -> Output {
        self.0.part(row, panel)
    }
}
