//! Linears of a step: which tasks there are, and what adapters add to them.

use super::{
    ALONE, CHUNK, Cpu, Shared, Span,
    adapter::{Adapted, Delta, RANK_STEP, ShrinkTask},
    format::Format,
    linear::{AdaptedRows, FEW_ROWS, LinearTask, Output, TASK_PANELS, TASK_ROWS},
    lock,
    packed::PANEL,
    pool::Pool,
};
use crate::{lora::LayerDeltas, model::weights::Linear};
use std::ops::Range;

/// Rows of one linear, and the delta that is theirs.
#[derive(Clone, Debug)]
pub(super) struct DeltaRows<'a> {
    rows: Range<usize>,
    delta: &'a Delta,
}

/// Lists the rows of `spans` that have a delta where `place` looks in layer `layer`.
pub(super) fn deltas<'a>(
    spans: &[Span<'a>],
    layer: usize,
    place: impl Fn(&'a LayerDeltas) -> &'a Option<Delta>,
) -> Vec<DeltaRows<'a>> {
    let of_span = |span: &Span<'a>| {
        let delta = place(span.adapter?.layer(layer)).as_ref()?;
        Some(DeltaRows { rows: span.first..span.first + span.tokens, delta })
    };
    spans.iter().filter_map(of_span).collect()
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
    pub(super) fn linear(&mut self, linear: &Linear, operand: Operand, output: Output, deltas: &[DeltaRows<'_>]) {
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
        );
        let weights = &linear.packed;
        let (rows, panels, depth) = (self.rows, weights.panels(), weights.depth());
        let run = self.kernels.linear(weights.weights(), self.sizes.format);
        let groups = weights.groups();
        let input = match weights.order() {
            Some(order) => {
                assert!(rows * input_stride <= self.ordered.len(), "every operand fits");
                let to = Shared(self.ordered.as_mut_ptr());
                put_in_order(&mut self.pool, order, rows, input_stride, &input, &to);
                to
            }
            None => input,
        };

        let row_blocks = rows.div_ceil(TASK_ROWS).max(1);
        // A multiple of the full tiles of all units, so that blocks do not end in short ones and start on whole ones.
        let block_rows = rows.div_ceil(row_blocks).next_multiple_of(96).min(TASK_ROWS);
        // Few rows are a stream of weights: each task reads a long run of it. Many rows share a few panels while they are in
        // cache. Either way there are some tasks for each thread, so that the last one is not waited for long.
        let most = if rows <= FEW_ROWS { 16 } else { TASK_PANELS };
        let run_panels = (panels * row_blocks).div_ceil(4 * self.pool.threads()).clamp(1, most);
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
    }
}

/// Computes what the adapters of `deltas` make of their rows' inputs, and returns for each of the `rows` rows what its linear adds;
/// nothing when there are no deltas.
fn adapt<'a>(
    pool: &mut Pool,
    shrink: unsafe fn(&ShrinkTask<'_>),
    deltas: &[DeltaRows<'a>],
    rows: usize,
    (input, input_stride, format): (&Shared<u8>, usize, Format),
    hidden: &'a mut Vec<f32>,
) -> Vec<Option<Adapted<'a>>> {
    /// Ranks of one task.
    const TASK_RANKS: usize = 4 * RANK_STEP;
    let Some(stride) = deltas.iter().map(|rows| rows.delta.ranks()).max() else { return Vec::new() };
    if hidden.len() < rows * stride {
        hidden.resize(rows * stride, 0.0);
    }
    let mut tasks = Vec::new();
    for DeltaRows { rows, delta } in deltas {
        for first in rows.clone().step_by(CHUNK) {
            let chunk = first..rows.end.min(first + CHUNK);
            let ranks = (0..delta.ranks()).step_by(TASK_RANKS);
            tasks.extend(ranks.map(|rank| (*delta, chunk.clone(), rank..delta.ranks().min(rank + TASK_RANKS))));
        }
    }
    let to = Shared(hidden.as_mut_ptr());
    let work: usize = deltas.iter().map(|rows| rows.rows.len() * rows.delta.work()).sum();
    let body = |index: usize, _: usize| {
        let (delta, rows, ranks) = &tasks[index];
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
    let mut adapted = vec![None; rows];
    for DeltaRows { rows, delta } in deltas {
        for row in rows.clone() {
            adapted[row] = Some(Adapted { delta, hidden: &hidden[row * stride..][..delta.ranks()] });
        }
    }
    adapted
}

/// Copies `rows` rows of f32 so that place `i` of each holds its element `order[i]`.
fn put_in_order(pool: &mut Pool, order: &[u32], rows: usize, stride: usize, from: &Shared<u8>, to: &Shared<u8>) {
    assert!(order.len() * 4 <= stride, "a row holds what the order names");
    pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
        for row in chunk * CHUNK..rows.min((chunk + 1) * CHUNK) {
            // SAFETY: rows hold at least as many f32 as the order has places, as just checked, lie in both buffers, which were
            // sized for them, and belong to this task.
            let (from, to) = unsafe {
                (
                    std::slice::from_raw_parts(from.at(row * stride).cast::<f32>(), order.len()),
                    std::slice::from_raw_parts_mut(to.at(row * stride).cast::<f32>(), order.len()),
                )
            };
            to.iter_mut().zip(order).for_each(|(to, input)| *to = from[*input as usize]);
        }
    });
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
