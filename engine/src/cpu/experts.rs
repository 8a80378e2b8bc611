//! Experts: every token goes through a few of a layer's gated linears, chosen by its scores.
//!
//! The pairs of a token and an expert are sorted by expert, so that the weights of an expert are read once for all its tokens,
//! and those of an expert that nobody chose not at all. A task of the gated linear copies its tokens' inputs side by side and
//! then goes through as many of the expert's panels as leaves the other threads some, so that the copies stay in its cache and
//! cost next to nothing. Its outputs stay in the order of the pairs, where the way back finds them.
//!
//! On the way back a task owns columns of the residual and goes through all experts in order: a token's outputs are added in
//! the order of its experts' numbers, whatever else is in the step, and no buffer for the outputs of all pairs is needed.

use super::{
    Cpu, Deltas, Operand, Shared, Sizes,
    buffer::Buffer,
    encode::Encoding,
    linear::{FEW_ROWS, LinearTask, Output, TASK_PANELS, TASK_ROWS},
    lock,
    packed::PANEL,
    products::encode,
};
use crate::{
    Error,
    model::{
        experts::Mixture,
        routing::{Choice, Routing},
        weights::{Experts, Linear},
    },
};
use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

/// Tokens of one task of the choice.
const CHUNK: usize = 4;

/// Choices of a step, and what experts work in.
#[derive(Debug)]
pub(super) struct ExpertBuffers {
    pairs: Pairs,
    /// `[rows][2][stride]` f32: scores, and what they are ranked in.
    scores: Buffer,
    /// f32 from one half of a row of scores to the other.
    stride: usize,
    /// `[rows][chosen]`.
    choices: Vec<Choice>,
    /// `[pairs][intermediate]`, format of the weights.
    gated: Buffer,
    /// Bytes from pair to pair.
    gated_stride: usize,
    /// The same as the way back reads it, untouched where that is how it lies.
    encoded: Buffer,
    /// One for each thread: the inputs of a block, or its outputs.
    scratch: Vec<Mutex<Buffer>>,
    /// Bytes of experts that were chosen, once for each step and layer.
    chosen_bytes: u64,
    /// Bytes that tasks read.
    read_bytes: AtomicU64,
}

impl ExpertBuffers {
    /// Reserves buffers for steps of up to `tokens` tokens on `threads` threads.
    pub(super) fn new(mixture: &Mixture, sizes: &Sizes, threads: usize, tokens: usize) -> Result<Self, Error> {
        let stride = mixture.routing.ranks().next_multiple_of(PANEL);
        let pairs = tokens * mixture.routing.chosen;
        let gated_stride = sizes.format.stride(mixture.intermediate);
        // Where inputs are encoded they lie as f32, and take less once they are.
        let scratch_bytes = TASK_ROWS * sizes.input.max(4 * TASK_PANELS * PANEL);
        Ok(Self {
            pairs: Pairs::new(&mixture.routing, tokens),
            scores: Buffer::new(tokens * 2 * stride * 4)?,
            stride,
            choices: vec![Choice::default(); pairs],
            // The tile unit reads whole tiles from any pair on.
            gated: Buffer::new((pairs + 16) * gated_stride)?,
            gated_stride,
            encoded: Buffer::new((pairs + 16) * gated_stride)?,
            scratch: (0..threads).map(|_| Buffer::new(scratch_bytes).map(Mutex::new)).collect::<Result<_, _>>()?,
            chosen_bytes: 0,
            read_bytes: AtomicU64::new(0),
        })
    }
}

/// The pairs of a step, sorted by expert.
#[derive(Debug)]
struct Pairs {
    routing: Routing,
    /// Row and weight of each pair; an expert's rows ascend.
    sorted: Vec<Pair>,
    /// Runs of an expert's pairs.
    blocks: Vec<Block>,
    /// Per expert: where its next pair goes.
    next: Vec<usize>,
}

/// A row's share of an expert's output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pair {
    row: u32,
    weight: f32,
}

/// Neighbouring pairs of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    expert: usize,
    first: usize,
    /// At most [`TASK_ROWS`].
    rows: usize,
}

impl Pairs {
    fn new(routing: &Routing, tokens: usize) -> Self {
        let pairs = tokens * routing.chosen;
        Self {
            routing: routing.clone(),
            sorted: vec![Pair::default(); pairs],
            blocks: Vec::with_capacity(routing.experts.min(pairs) + pairs / TASK_ROWS),
            next: vec![0; routing.experts],
        }
    }

    /// Sorts the choices of some rows, `[rows][chosen]`.
    fn sort(&mut self, choices: &[Choice]) {
        self.next.fill(0);
        choices.iter().for_each(|choice| self.next[choice.expert as usize] += 1);
        self.blocks.clear();
        let mut end = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let first = end;
            end += std::mem::replace(next, first);
            let block = |first| Block { expert, first, rows: TASK_ROWS.min(end - first) };
            self.blocks.extend((first..end).step_by(TASK_ROWS).map(block));
        }
        for (row, choices) in choices.chunks_exact(self.routing.chosen).enumerate() {
            for choice in choices {
                let next = &mut self.next[choice.expert as usize];
                self.sorted[*next] = Pair { row: row as u32, weight: choice.weight };
                *next += 1;
            }
        }
    }

    /// Returns how many experts have pairs.
    fn experts(&self) -> usize {
        self.blocks.chunk_by(|a, b| a.expert == b.expert).count()
    }

    /// Returns the pairs of a block.
    fn of(&self, block: &Block) -> &[Pair] {
        &self.sorted[block.first..][..block.rows]
    }
}

impl Cpu {
    /// Adds to the residual what the experts that each row chooses make of it, weighted.
    pub(crate) fn experts(&mut self, layer: &Experts) {
        let buffers = self.experts.as_mut().expect("a model with experts has buffers for them");
        let to = Output::Store { to: buffers.scores.as_mut_ptr().cast(), stride: 2 * buffers.stride };
        self.linear(&layer.router, Operand::Input, to, Deltas::NONE);
        self.choose(layer.correction.as_deref());
        self.gate_up_of_experts(&layer.gate_up);
        self.down_of_experts(&layer.down);
        let buffers = self.experts.as_mut().expect("a model with experts has buffers for them");
        let each = (layer.gate_up.packed.bytes() + layer.down.packed.bytes()) / buffers.pairs.routing.experts;
        buffers.chosen_bytes += (buffers.pairs.experts() * each) as u64;
    }

    /// Returns the bytes of experts that were chosen, once for each step and layer, and the bytes that were read.
    pub(crate) fn chosen_and_read(&self) -> (u64, u64) {
        self.experts
            .as_ref()
            .map_or((0, 0), |buffers| (buffers.chosen_bytes, buffers.read_bytes.load(Ordering::Relaxed)))
    }

    /// Chooses the experts of all rows by their scores.
    fn choose(&mut self, correction: Option<&[f32]>) {
        let buffers = self.experts.as_mut().expect("a model with experts has buffers for them");
        let routing = &buffers.pairs.routing;
        let (stride, experts, chosen, rows) = (buffers.stride, routing.experts, routing.chosen, self.rows);
        let scores = Shared(buffers.scores.as_mut_ptr().cast::<f32>());
        let choices = Shared(buffers.choices.as_mut_ptr());
        self.pool.run(rows.div_ceil(CHUNK), &|chunk, _| {
            for row in chunk * CHUNK..rows.min((chunk + 1) * CHUNK) {
                // SAFETY: a row has two halves of `stride` scores and `chosen` choices, and belongs to this task.
                let (scores, choices) = unsafe {
                    let scores = std::slice::from_raw_parts_mut(scores.at(row * 2 * stride), 2 * stride);
                    (scores, std::slice::from_raw_parts_mut(choices.at(row * chosen), chosen))
                };
                let (scores, ranks) = scores.split_at_mut(stride);
                routing.choose(&mut scores[..experts], correction, &mut ranks[..routing.ranks()], choices);
            }
        });
        buffers.pairs.sort(&buffers.choices[..rows * chosen]);
    }

    /// Computes `silu(gate) * up` of all pairs.
    fn gate_up_of_experts(&mut self, linear: &Linear) {
        let buffers = self.experts.as_mut().expect("a model with experts has buffers for them");
        let weights = &linear.packed;
        let (pairs, threads) = (&buffers.pairs, self.pool.threads());
        let gated = SharedBytes::of(&mut buffers.gated, buffers.gated_stride);
        let Sizes { format, activation, .. } = self.sizes;
        let (run, encoding) = self.kernels.linear(weights);
        let mut input = SharedBytes::of(&mut self.input, self.sizes.input);
        if encoding != Encoding::Floats(format) {
            let to = SharedBytes::of(&mut self.encoded, encoding.stride(weights.depth()));
            assert!(self.rows * to.stride <= self.encoded.len(), "every operand fits");
            let from = (&input.start, input.stride, format);
            encode(&mut self.pool, self.kernels.encode, from, weights, self.rows, (&to.start, to.stride, encoding));
            input = to;
        }
        let (gathered, scratch) = (&buffers.scratch, &self.scratch);
        let read_bytes = &buffers.read_bytes;

        let panels = weights.panels() / pairs.routing.experts;
        // Copies for a few pairs cost nothing, and shorter tasks leave less to wait for at the end.
        let few = pairs.blocks.iter().all(|block| block.rows <= FEW_ROWS);
        let most = if few { panels.min(16) } else { panels };
        let run_panels = (panels * pairs.blocks.len()).div_ceil(4 * threads).clamp(1, most);
        let runs = panels.div_ceil(run_panels);
        self.pool.run(pairs.blocks.len() * runs, &|index, thread| {
            let (block, first) = (&pairs.blocks[index / runs], index % runs * run_panels);
            let (mut gathered, mut scratch) = (lock(&gathered[thread]), lock(&scratch[thread]));
            for (pair, to) in pairs.of(block).iter().zip(gathered.bytes_mut().chunks_exact_mut(input.stride)) {
                // SAFETY: the pair's row lies in the input, which nobody writes now.
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(input.row(pair.row as usize), input.stride) });
            }
            let output = Output::Gate { to: gated.row(block.first), stride: gated.stride, format, activation };
            let last = panels.min(first + run_panels);
            let at_once = if block.rows <= FEW_ROWS { run_panels } else { TASK_PANELS };
            for panel in (first..last).step_by(at_once) {
                let task = LinearTask {
                    input: gathered.as_ptr(),
                    input_stride: input.stride,
                    rows: block.rows,
                    depth: weights.depth(),
                    panel: weights.panel(block.expert * panels + panel),
                    panel_bytes: weights.panel_bytes(),
                    panels: at_once.min(last - panel),
                    groups: weights.groups(),
                    bias: None,
                    adapted: None,
                    output: output.part(0, panel),
                };
                read_bytes.fetch_add((task.panels * task.panel_bytes) as u64, Ordering::Relaxed);
                // SAFETY: inputs of a block fit the scratch in whole tiles, and every task has its own pairs and columns.
                unsafe { run(&task, scratch.floats_mut()) };
            }
        });
    }

    /// Adds the weighted outputs of all pairs to the residual.
    fn down_of_experts(&mut self, linear: &Linear) {
        let buffers = self.experts.as_mut().expect("a model with experts has buffers for them");
        let weights = &linear.packed;
        let (pairs, threads, format) = (&buffers.pairs, self.pool.threads(), self.sizes.format);
        let (run, encoding) = self.kernels.linear(weights);
        let mut gated = SharedBytes::of(&mut buffers.gated, buffers.gated_stride);
        if encoding != Encoding::Floats(format) {
            let to = SharedBytes::of(&mut buffers.encoded, encoding.stride(weights.depth()));
            let rows = self.rows * pairs.routing.chosen;
            assert!(rows * to.stride <= buffers.encoded.len(), "every pair fits");
            let from = (&gated.start, gated.stride, format);
            encode(&mut self.pool, self.kernels.encode, from, weights, rows, (&to.start, to.stride, encoding));
            gated = to;
        }
        let (residual, residual_stride) = (Shared(self.residual.as_mut_ptr().cast::<f32>()), self.sizes.residual);
        let (outputs, scratch, read_bytes) = (&buffers.scratch, &self.scratch, &buffers.read_bytes);

        let panels = weights.panels() / pairs.routing.experts;
        let run_panels = panels.div_ceil(4 * threads).clamp(1, TASK_PANELS);
        self.pool.run(panels.div_ceil(run_panels), &|index, thread| {
            let panel = index * run_panels;
            let width = run_panels.min(panels - panel) * PANEL;
            let mut outputs = lock(&outputs[thread]);
            for block in &pairs.blocks {
                let task = LinearTask {
                    input: gated.row(block.first),
                    input_stride: gated.stride,
                    rows: block.rows,
                    depth: weights.depth(),
                    panel: weights.panel(block.expert * panels + panel),
                    panel_bytes: weights.panel_bytes(),
                    panels: width / PANEL,
                    groups: weights.groups(),
                    bias: None,
                    adapted: None,
                    output: Output::Store { to: outputs.as_mut_ptr().cast(), stride: width },
                };
                read_bytes.fetch_add((task.panels * task.panel_bytes) as u64, Ordering::Relaxed);
                // SAFETY: pairs lie in the buffer with room for whole tiles; outputs of a block fit this thread's scratch.
                unsafe { run(&task, lock(&scratch[thread]).floats_mut()) };
                for (pair, output) in pairs.of(block).iter().zip(outputs.floats().chunks_exact(width)) {
                    // SAFETY: these columns of the residual belong to this task.
                    let to = unsafe {
                        let row = residual.at(pair.row as usize * residual_stride + panel * PANEL);
                        std::slice::from_raw_parts_mut(row, width)
                    };
                    to.iter_mut().zip(output).for_each(|(to, output)| *to += pair.weight * output);
                }
            }
        });
    }
}

/// Rows of a buffer that tasks of one job share, each with parts of its own.
struct SharedBytes {
    start: Shared<u8>,
    /// Bytes from row to row.
    stride: usize,
}

impl SharedBytes {
    fn of(buffer: &mut Buffer, stride: usize) -> Self {
        Self { start: Shared(buffer.as_mut_ptr()), stride }
    }

    fn row(&self, row: usize) -> *mut u8 {
        self.start.at(row * self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Engine, ExpertShape, Model, ModelShape, Pooling, Quantize, Row, model::routing::Scoring};
    use kv_cache::PageId;

    fn pairs(experts: usize, chosen: usize, choices: &[u32]) -> Pairs {
        let routing =
            Routing { experts, chosen, scoring: Scoring::Softmax, groups: None, normalise: false, scale: 1.0 };
        let mut pairs = Pairs::new(&routing, choices.len() / chosen);
        let choices = choices.iter().map(|&expert| Choice { expert, weight: expert as f32 });
        pairs.sort(&choices.collect::<Vec<_>>());
        pairs
    }

    #[test]
    fn pairs_are_sorted_by_expert_and_then_by_row() {
        let pairs = pairs(5, 2, &[3, 0, 0, 4, 3, 0]);
        let rows: Vec<u32> = pairs.sorted.iter().map(|pair| pair.row).collect();
        assert_eq!(rows, [0, 1, 2, 0, 2, 1]);
        assert!(pairs.of(&pairs.blocks[1]).iter().all(|pair| pair.weight == 3.0));
        let block = |expert, first, rows| Block { expert, first, rows };
        assert_eq!(pairs.blocks, [block(0, 0, 3), block(3, 3, 2), block(4, 5, 1)]);
        assert_eq!(pairs.experts(), 3);
    }

    #[test]
    fn many_rows_of_an_expert_are_several_blocks() {
        let pairs = pairs(2, 1, &[1; TASK_ROWS + 5]);
        let block = |first, rows| Block { expert: 1, first, rows };
        assert_eq!(pairs.blocks, [block(0, TASK_ROWS), block(TASK_ROWS, 5)]);
        assert_eq!(pairs.experts(), 1);
        assert!(pairs.sorted.iter().enumerate().all(|(at, pair)| pair.row as usize == at));
    }

    #[test]
    fn nothing_is_no_blocks() {
        assert!(pairs(4, 2, &[]).blocks.is_empty());
    }

    /// The bar is 1.1; nothing is read twice, nor what nobody chose.
    #[test]
    fn a_small_batch_reads_each_expert_it_chose_once() {
        let experts = Some(ExpertShape { count: 24, chosen: 4, intermediate: 100, shared: 30 });
        let shape = ModelShape {
            experts,
            hidden: 200,
            intermediate: 96,
            layers: 4,
            vocab_size: 300,
            ..ModelShape::qwen3_moe()
        };
        let shape = ModelShape { heads: 2, kv_heads: 1, head_dim: 32, max_position: 64, ..shape };
        for (quantize, threads) in [(None, 1), (None, 3), (Some(Quantize::Int8), 2), (Some(Quantize::Int4), 2)] {
            let model = Model::random(&ModelShape { quantize, ..shape.clone() }, 3).expect("memory");
            let config = Config {
                kv_bytes: Some(1 << 20),
                token_budget: 8,
                max_sequences: 8,
                threads: Some(threads),
                ..Config::default()
            };
            let mut engine = Engine::new(model, &config).expect("an engine");
            for step in 0..20 {
                let tokens: Vec<u32> = (0..8).map(|row| (step * 89 + row * 31) % 300).collect();
                let pages: Vec<PageId> = (0..8).map(PageId).collect();
                let rows = tokens.chunks(1).zip(pages.chunks(1));
                let rows: Vec<Row<'_>> = rows
                    .map(|(tokens, pages)| Row { tokens, pages, pooling: Some(Pooling::Last), ..Row::default() })
                    .collect();
                let before = engine.expert_traffic();
                engine.step(&rows, &mut |_| {}).expect("good rows");
                let after = engine.expert_traffic();
                let (chosen, read) = (after.chosen - before.chosen, after.read - before.read);
                assert_eq!(read, chosen);
                // Three layers, and four to all of the experts in each.
                assert!(chosen * 6 >= after.all && chosen <= after.all, "{chosen} of {}", after.all);
            }
        }
    }
}
