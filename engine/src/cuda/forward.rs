//! The decoder on a card: call by call, layer by layer.

use super::{
    bytes_of,
    device::Region,
    graphs::Bucket,
    kernels::{
        self, Attention, Call, Cap, Check, Choose, Cut, DeltaOf, Deltas, Draw, Embed, Finish, Gather, Group, HeadNorms,
        Join, JoinTo, Largest, LatentAttention, Mix, Norm, NormTo, Pages, Pairs, Reorder, Rotary, Share,
    },
    rank::{Buffers, ExpertBuffers, Rank, whole},
    rows::Capacity,
    slice::{Outputs, Split},
    weights::{self, Dense, Experts, HeadAttention, Inner, Linear, Mlp, NormWeights},
};
use crate::{
    Error,
    home::{Pass, Place, Span},
    model::decoder::{Decoder, QkNorm},
};
use kv_cache::PageLayout;
use std::{collections::HashSet, ops::Range};

/// The rows that some of a pass works on.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub(super) rows: usize,
    residual: Region,
    pub(super) qkv: Region,
    /// Which of the pass's rows these are, where they are not all.
    pub(super) kept: Option<Region>,
    /// The list of their adapters, where some have one.
    adapted: Option<Region>,
    /// `[sequences][4]`, and which of them attend in the same way.
    sequences: Region,
    parts: [Part; 2],
}

impl At {
    /// Returns where those of `part` begin.
    pub(super) fn sequences_of(&self, part: &Part) -> u64 {
        self.sequences.part(part.first * 16, part.count * 16).address
    }

    /// Returns what adapters add to a linear of layer `layer`.
    fn deltas(&self, layer: usize, of: DeltaOf) -> Option<Deltas> {
        self.adapted.map(|list| Deltas::new(list.address, layer, of))
    }
}

/// Bytes of states, what attends, and what merges parts where they are apart.
type Attends = (u64, (Call, Option<Call>));

/// Sequences that follow each other, or none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    first: usize,
    pub(super) count: usize,
    /// Rows of all of them, most rows of one, and positions of the longest; or more.
    pub(super) rows: usize,
    pub(super) most_rows: usize,
    pub(super) longest: usize,
}

impl Part {
    /// Cuts `spans` where the first is that has more tokens than `few`: those before it, and the rest.
    fn cut(spans: &[Span<'_>], few: usize) -> [Part; 2] {
        let few = spans.iter().take_while(|span| span.tokens <= few).count();
        [0..few, few..spans.len()].map(|range| {
            let spans = &spans[range.clone()];
            Part {
                first: range.start,
                count: spans.len(),
                rows: spans.iter().map(|span| span.tokens).sum(),
                most_rows: spans.iter().map(|span| span.tokens).max().unwrap_or(0),
                longest: spans.iter().map(|span| span.start + span.tokens).max().unwrap_or(0),
            }
        })
    }
}

impl Rank {
    /// Asks for all of a pass, up to the head's inputs, as a graph where there is a bucket for it.
    pub(super) fn begin(
        &mut self,
        decoder: &Decoder,
        layout: &PageLayout,
        pass: &Pass<'_>,
        bucket: Option<Bucket>,
    ) -> Result<(), Error> {
        let rows = bucket.map_or(pass.tokens.len(), |bucket| bucket.rows);
        self.words.write(pass, rows, layout.page_tokens as usize, layout.pages);
        self.device.upload(self.parts.whole, self.words.bytes())?;
        if pass.is_adapted() {
            self.device.upload(self.adapters.list, self.adapters.write(pass, rows))?;
        }
        match bucket {
            Some(bucket) => self.replay(decoder, bucket),
            None => self.launch_pass(decoder, pass, pass.is_adapted()),
        }
    }

    /// Keeps the rows `rows` and forgets all others.
    pub(super) fn keep_rows(&mut self, rows: &[usize]) -> Result<(), Error> {
        let kept = self.words.keep(&mut rows.iter().copied());
        let list = kept.len() / 4;
        self.device.upload(self.parts.kept, kept)?;
        // The residual is not needed any more, and its rows are longer.
        let (from, to) = (self.hidden, self.buffers.residual);
        (self.rows, self.computed) = (list, 0..0);
        if list > 0 {
            let stride = (self.sizes.residual / 2) as u32;
            let (from, rows) = (from.address, self.parts.kept.address);
            self.call(&Gather { kept: list as u32, from, rows, to: to.address, stride }.call())?;
        }
        self.hidden = to;
        Ok(())
    }

    /// Waits for everything so far: a rank that nothing is asked of may still have failed, and the others wait for it.
    pub(super) fn catch_up(&mut self) -> Result<(), Error> {
        self.device.mark(0)?;
        self.device.wait(0)
    }

    /// Asks for a pass of rows that decode, and for what follows their tokens, as one.
    fn replay(&mut self, decoder: &Decoder, bucket: Bucket) -> Result<(), Error> {
        let graph = match self.graphs.get(&bucket) {
            Some(graph) => *graph,
            None => {
                self.device.begin_graph()?;
                let asked = self.launch_decode(decoder, bucket);
                // A device that remembers does nothing else, so it is told to stop in any case.
                let graph = self.device.end_graph();
                asked?;
                *self.graphs.entry(bucket).or_insert(graph?)
            }
        };
        self.device.replay(graph)?;
        (self.rows, self.hidden, self.computed) = (bucket.rows, self.buffers.input, 0..bucket.rows);
        self.device.mark(0)
    }

    /// Makes ready every kernel that steps may call: neither a request nor a graph is the place to compile one.
    pub(super) fn prepare(&mut self, decoder: &Decoder) -> Result<(), Error> {
        self.listed = Some(HashSet::new());
        // Adapters are not read for latent attention.
        for adapted in [false, true].into_iter().filter(|adapted| !adapted || decoder.latent.is_none()) {
            self.list(decoder, adapted)?;
        }
        let listed = self.listed.take().expect("it was put there above");
        listed.iter().try_for_each(|kernel| self.device.prepare(kernel))?;
        self.prepare_products()
    }

    /// Makes the calls of all kinds of steps, of rows that may have adapters or not.
    fn list(&mut self, decoder: &Decoder, adapted: bool) -> Result<(), Error> {
        let Capacity { rows: most, sequences, .. } = self.sizes.capacity;
        for longest in [1, self.sizes.context] {
            for rows in (0..).map(|power| 1 << power).take_while(|rows| *rows <= most.min(sequences)) {
                self.launch_decode(decoder, Bucket { rows, longest, races: self.races, adapted })?;
            }
        }
        // Kernels of linears change with the number of rows or pairs, those of attention with that of a sequence's rows; none at less than its double.
        for tokens in (1..).map(|power| 1 << power).take_while(|tokens| *tokens < most).chain([most]) {
            let span = Span { first: 0, tokens, start: 0, pages: &[], adapter: None, leaves: false };
            let kept = Span { tokens: 1, start: tokens - 1, ..span };
            let places = [Place { row: 0, token: tokens - 1, race: None }];
            let tokens = vec![0; tokens];
            let pass = Pass { tokens: &tokens, spans: &[span], places: &places, kept: &[kept] };
            self.launch_pass(decoder, &pass, adapted)?;
        }
        Ok(())
    }

    /// Asks the device for a call, or lists its kernel while that is what calls are made for.
    pub(super) fn call(&mut self, call: &Call) -> Result<(), Error> {
        match &mut self.listed {
            Some(listed) => {
                listed.insert(call.kernel);
                Ok(())
            }
            None => self.device.launch(call),
        }
    }

    fn launch_decode(&mut self, decoder: &Decoder, bucket: Bucket) -> Result<(), Error> {
        let Bucket { rows, longest, races, adapted } = bucket;
        let all = Part { first: 0, count: rows, rows, most_rows: 1, longest };
        let (residual, qkv) = (self.buffers.residual, self.buffers.qkv);
        let (parts, adapted) = ([all, Part::default()], adapted.then_some(self.adapters.list));
        let at = At { rows, residual, qkv, kept: None, adapted, sequences: self.parts.sequences, parts };
        self.embed(decoder, &at)?;
        self.list_heads(rows)?;
        for layer in 0..self.weights.blocks.len() {
            self.write_pages(decoder, &at, layer)?;
            self.finish_block(decoder, &at, layer)?;
        }
        self.check(decoder, &at, self.weights.blocks.len())?;
        self.norm(decoder, &at, Some(self.weights.final_norm))?;
        self.launch_head(decoder, self.buffers.input, at.rows, races)
    }

    /// Asks for all of a pass, whose rows may have adapters or not, up to the head's inputs, and marks where each layer's pages are final.
    fn launch_pass(&mut self, decoder: &Decoder, pass: &Pass<'_>, adapted: bool) -> Result<(), Error> {
        let Buffers { residual, qkv, kept_residual, kept_qkv, input, .. } = self.buffers;
        let few = match &decoder.latent {
            Some(_) => LatentAttention::few_tokens(decoder.heads),
            None => Attention::few_tokens(decoder.heads / decoder.kv_heads),
        };
        let (rows, parts) = (pass.tokens.len(), Part::cut(pass.spans, few));
        let (sequences, list) = (self.parts.sequences, adapted.then_some(self.adapters.list));
        let mut at = At { rows, residual, qkv, kept: None, adapted: list, sequences, parts };
        (self.rows, self.hidden, self.computed) = (pass.places.len(), input, 0..0);
        let last = self.weights.blocks.len() - 1;
        self.embed(decoder, &at)?;
        self.list_heads(rows)?;
        for layer in 0..=last {
            self.write_pages(decoder, &at, layer)?;
            if self.listed.is_none() {
                self.device.mark(layer)?;
            }
            if layer == last {
                // From here on a token matters only to its own logits.
                if self.rows == 0 {
                    return Ok(());
                }
                if self.rows < at.rows {
                    self.gather(self.rows, residual, kept_residual, self.sizes.residual)?;
                    self.gather(self.rows, qkv, kept_qkv, self.sizes.qkv)?;
                    (at.rows, at.residual, at.qkv, at.kept) =
                        (self.rows, kept_residual, kept_qkv, Some(self.parts.kept));
                    (at.sequences, at.parts) = (self.parts.kept_sequences, Part::cut(pass.kept, few));
                    at.adapted = adapted.then(|| self.adapters.kept(rows));
                    self.list_heads(at.rows)?;
                }
            }
            self.finish_block(decoder, &at, layer)?;
        }
        self.check(decoder, &at, self.weights.blocks.len())?;
        self.norm(decoder, &at, Some(self.weights.final_norm))
    }

    /// Notes which rows hold what is no number, at a stage counted from 0: before a layer, or behind the last.
    fn check(&mut self, decoder: &Decoder, at: &At, stage: usize) -> Result<(), Error> {
        if !self.sizes.checked {
            return Ok(());
        }
        let kept = stage == self.weights.blocks.len();
        let check = Check {
            rows: at.rows as u32,
            from: at.residual.address,
            stages: if kept { self.buffers.kept_stages } else { self.buffers.stages }.address,
            width: decoder.hidden as u32,
            stride: self.sizes.residual as u32,
            stage: stage as u32 + 1,
            first: kept || stage == 0,
        };
        self.call(&check.call())
    }

    /// Waits for the pass at hand and says which row of it first held what is no number, and where.
    pub(super) fn find_fault(&mut self, pass: &Pass<'_>) -> Result<Option<String>, Error> {
        let mut stages = vec![0; pass.tokens.len() + pass.places.len()];
        let (all, kept) = stages.split_at_mut(pass.tokens.len());
        self.device.download(self.buffers.stages, bytes_of(all))?;
        if !kept.is_empty() {
            self.device.download(self.buffers.kept_stages, bytes_of(kept))?;
        }
        let rows = (0..all.len()).chain(pass.kept_rows());
        let faults = rows.zip(&stages).filter(|(_, stage)| **stage > 0);
        let Some((row, stage)) = faults.min_by_key(|(_, stage)| **stage) else { return Ok(None) };
        let of = |span: &&Span<'_>| (span.first..span.first + span.tokens).contains(&row);
        let span = pass.spans.iter().position(|span| of(&span)).expect("a row is of a sequence");
        let position = pass.spans[span].start + row - pass.spans[span].first;
        let place = match *stage as usize - 1 {
            0 => "in the embedding".to_owned(),
            stage if stage == self.weights.blocks.len() => "behind the last layer".to_owned(),
            stage => format!("before layer {stage}, counted from 0"),
        };
        Ok(Some(format!("row {span}: position {position} holds a NaN or an infinity {place} (nan_guard)")))
    }

    /// Computes q, k and v of a layer, or what they come from, and writes its pages.
    fn write_pages(&mut self, decoder: &Decoder, at: &At, layer: usize) -> Result<(), Error> {
        self.check(decoder, at, layer)?;
        let block = self.weights.blocks[layer];
        let (input, qkv) = (self.buffers.input, self.buffers.qkv);
        self.norm(decoder, at, block.attention_norm)?;
        match &block.attention {
            weights::Attention::Heads(heads) => {
                let (from, to) = ((input, self.sizes.residual), (qkv, self.sizes.qkv));
                let deltas = at.deltas(layer, DeltaOf::Qkv);
                self.large_linear(&heads.qkv, at.rows, from, to, Finish::Store, deltas)?;
                self.rotate_and_write(decoder, heads, at, layer)
            }
            weights::Attention::Latent(latent) => self.write_latents(decoder, latent, at, layer),
        }
    }

    /// Attends, and computes the rest of a block.
    fn finish_block(&mut self, decoder: &Decoder, at: &At, layer: usize) -> Result<(), Error> {
        let block = self.weights.blocks[layer];
        let attended = self.buffers.attended;
        match &block.attention {
            weights::Attention::Heads(_) => {
                self.attend(at, &|rank, part| {
                    let attention = rank.attention(decoder, at, layer, part);
                    (attention.state_bytes(), attention.calls())
                })?;
                self.join_attended(decoder, at)?;
            }
            weights::Attention::Latent(latent) => {
                self.latent_queries(decoder, latent, at, layer)?;
                self.attend(at, &|rank, part| {
                    let attention = rank.latent_attention(decoder, at, layer, part);
                    (attention.state_bytes(), attention.calls())
                })?;
                self.latent_values(decoder, latent, at)?;
            }
        }
        if decoder.parallel {
            // The MLP reads the residual as attention did.
            self.norm(decoder, at, block.mlp_norm)?;
        }
        let from = (attended, self.sizes.attended);
        let deltas = at.deltas(layer, DeltaOf::Output);
        self.add(decoder, (&block.output, deltas), at, from, block.attention_post_norm)?;
        if !decoder.parallel {
            self.norm(decoder, at, block.mlp_norm)?;
        }
        match &block.mlp {
            Mlp::Dense(dense) => {
                let deltas = [DeltaOf::Up, DeltaOf::Down].map(|of| at.deltas(layer, of));
                self.dense(decoder, dense, at, block.mlp_post_norm, deltas)
            }
            Mlp::Experts(experts) => {
                self.experts(decoder, experts, at)?;
                experts.shared.map_or(Ok(()), |shared| self.dense(decoder, &shared, at, None, [None; 2]))
            }
        }
    }

    /// Adds to the residual what every row goes through, with what adapters add on the way in and out.
    fn dense(
        &mut self,
        decoder: &Decoder,
        dense: &Dense,
        at: &At,
        norm: Option<NormWeights>,
        [up, down]: [Option<Deltas>; 2],
    ) -> Result<(), Error> {
        let (input, gated) = (self.buffers.input, self.buffers.gated);
        let (inner, finish) = match &dense.inner {
            Inner::Gated(gate_up) => (gate_up, Finish::Gate(decoder.activation)),
            Inner::Plain(up) => (up, Finish::Activate(decoder.activation)),
        };
        self.large_linear(inner, at.rows, (input, self.sizes.residual), (gated, self.sizes.gated), finish, up)?;
        self.add(decoder, (&dense.down, down), at, (gated, self.sizes.gated), norm)
    }

    /// Adds to the residual what the experts that each row chooses make of it.
    fn experts(&mut self, decoder: &Decoder, experts: &Experts, at: &At) -> Result<(), Error> {
        let routing = &decoder.mixture.as_ref().expect("a decoder with experts says how they are chosen").routing;
        let sizes = self.sizes.experts.expect("a decoder with experts has sizes of them");
        let ExpertBuffers { scores, chosen, weights, pairs, tiles, gated, outcomes } = self.buffers.experts;
        let (input, residual, used) = (self.buffers.input, self.sizes.residual, self.parts.used.address);
        self.linear(&experts.router, at.rows, (input, residual), (scores, sizes.scores), Finish::Store)?;
        let choose = Choose {
            routing,
            rows: at.rows as u32,
            logits: scores.address,
            stride: sizes.scores as u32,
            correction: experts.correction.address,
            experts: chosen.address,
            weights: weights.address,
            used,
        };
        self.call(&choose.call())?;
        let count = at.rows * sizes.chosen;
        // Codes are widened for up to 32 rows at a time.
        let most = if experts.gate_up.codes.or(experts.down.codes).is_some() { 32 } else { 128 };
        let cut = Cut::new(count, sizes.experts, most);
        let (list, tiles, expert_count) = (pairs.address, tiles.address, sizes.experts as u32);
        self.call(&Group { experts: chosen.address, pairs: count as u32, expert_count, cut, list, tiles }.call())?;
        let by_row = Pairs { cut, list, tiles, expert_bytes: 0, sharers: sizes.chosen as u32, width: None };
        let finish = Finish::Gate(decoder.activation);
        self.linear_of_pairs(&experts.gate_up, by_row, count, (input, residual), (gated, sizes.gated), finish)?;
        let by_pair = Pairs { sharers: 1, ..by_row };
        let (from, to) = ((gated, sizes.gated), (outcomes, residual));
        self.linear_of_pairs(&experts.down, by_pair, count, from, to, Finish::Store)?;
        let mix = Mix {
            rows: at.rows as u32,
            chosen: sizes.chosen as u32,
            outcomes: outcomes.address,
            weights: weights.address,
            to: at.residual.address,
            used,
            stride: residual as u32,
        };
        self.call(&mix.call())
    }

    pub(super) fn linear_of_pairs(
        &mut self,
        linear: &Linear,
        pairs: Pairs,
        count: usize,
        (from, from_stride): (Region, usize),
        to: (Region, usize),
        finish: Finish,
    ) -> Result<(), Error> {
        assert!(linear.order.bytes == 0, "experts whose inputs have an order are widened when they are packed");
        let call = linear.call(self.element, self.device.most_shared(), count, from, from_stride);
        let pairs = Some(Pairs { expert_bytes: linear.expert_bytes, ..pairs });
        self.finished(linear.split, kernels::Linear { pairs, ..call }, to, finish)
    }

    /// Asks for a linear whose outcome goes to `to`, that of all ranks where they split it.
    fn finished(
        &mut self,
        split: Option<Split>,
        linear: kernels::Linear,
        (to, stride): (Region, usize),
        finish: Finish,
    ) -> Result<(), Error> {
        let Some(split) = split else {
            let (to, to_stride) = (to.address, stride as u32);
            return self.call(&kernels::Linear { to, to_stride, finish, ..linear }.call());
        };
        let (finish, into) = match finish {
            Finish::Add => (Finish::Store, JoinTo::Sums),
            Finish::Store => (finish, JoinTo::Floats),
            Finish::Gate(_) | Finish::Activate(_) | Finish::Narrow => (finish, JoinTo::Halves),
        };
        let (part, part_stride) = (self.buffers.part.address, whole(split.own) as u32);
        self.call(&kernels::Linear { to: part, to_stride: part_stride, finish, ..linear }.call())?;
        self.join(split, linear.rows, (to, stride), into)
    }

    /// Gathers what every rank has in its part, and puts it side by side.
    fn join(&mut self, split: Split, rows: u32, (to, stride): (Region, usize), into: JoinTo) -> Result<(), Error> {
        let (Buffers { part, parts, .. }, own) = (self.buffers, whole(split.own));
        if self.listed.is_none() {
            self.device.gather(part, rows as usize * own * into.bytes(), parts)?;
        }
        let join = Join {
            rows,
            parts: self.slice.ranks as u32,
            from: parts.address,
            part_stride: own as u32,
            part_width: split.own as u32,
            to: to.address,
            width: split.all as u32,
            to_stride: stride as u32,
            into,
        };
        self.call(&join.call())
    }

    fn embed(&mut self, decoder: &Decoder, at: &At) -> Result<(), Error> {
        let (kind, table) = self.weights.table;
        let embed = Embed {
            element: self.element,
            rows: at.rows as u32,
            tokens: self.parts.tokens.address,
            found: self.buffers.tokens.address,
            vocab: decoder.vocab_size as u32,
            table: table.address,
            to: at.residual.address,
            width: decoder.hidden as u32,
            stride: self.sizes.residual as u32,
            kind,
            scale: self.weights.embedding_scale,
        };
        self.call(&embed.call())
    }

    /// Norms the residual into the input of the next linear, or takes it as it is.
    fn norm(&mut self, decoder: &Decoder, at: &At, norm: Option<NormWeights>) -> Result<(), Error> {
        let to = (self.buffers.input, NormTo::Store);
        self.norm_rows(decoder, at, norm, at.residual, to)
    }

    fn norm_rows(
        &mut self,
        decoder: &Decoder,
        at: &At,
        norm: Option<NormWeights>,
        from: Region,
        (to, into): (Region, NormTo),
    ) -> Result<(), Error> {
        let (weight, bias) = norm.map_or((0, 0), |norm| (norm.weight.address, norm.bias.address));
        let norm = Norm {
            element: self.element,
            rows: at.rows as u32,
            from: from.address,
            weight,
            bias,
            to: to.address,
            width: decoder.hidden as u32,
            from_stride: self.sizes.residual as u32,
            to_stride: self.sizes.residual as u32,
            kind: norm.map(|_| decoder.norm),
            eps: decoder.norm_eps,
            into,
        };
        self.call(&norm.call())
    }

    pub(super) fn linear(
        &mut self,
        linear: &Linear,
        rows: usize,
        from: (Region, usize),
        to: (Region, usize),
        finish: Finish,
    ) -> Result<(), Error> {
        self.linear_and(linear, rows, from, to, finish, None)
    }

    /// Computes a linear, and in its sums what adapters add to them.
    pub(super) fn linear_and(
        &mut self,
        linear: &Linear,
        rows: usize,
        from: (Region, usize),
        to: (Region, usize),
        finish: Finish,
        deltas: Option<Deltas>,
    ) -> Result<(), Error> {
        let input = self.ordered(linear, rows, from)?;
        let call = linear.call(self.element, self.device.most_shared(), rows, input, from.1);
        let (partial, counters) = (self.buffers.partial.address, self.buffers.counters.address);
        self.finished(linear.split, kernels::Linear { partial, counters, deltas, ..call }, to, finish)
    }

    /// Brings a linear's inputs into the order of its weights, where they have one; returns where they are.
    pub(super) fn ordered(
        &mut self,
        linear: &Linear,
        rows: usize,
        (from, stride): (Region, usize),
    ) -> Result<Region, Error> {
        if linear.order.bytes == 0 {
            return Ok(from);
        }
        let (width, to) = ((linear.order.bytes / 4) as u32, self.buffers.ordered);
        let (rows, order, stride) = (rows as u32, linear.order.address, stride as u32);
        self.call(&Reorder { rows, from: from.address, order, to: to.address, width, stride }.call())?;
        Ok(to)
    }

    /// Adds a product, and what adapters add to it, to the residual, through a norm where there is one.
    fn add(
        &mut self,
        decoder: &Decoder,
        (linear, deltas): (&Linear, Option<Deltas>),
        at: &At,
        from: (Region, usize),
        norm: Option<NormWeights>,
    ) -> Result<(), Error> {
        let (residual, stride) = (at.residual, self.sizes.residual);
        if norm.is_none() {
            return self.large_linear(linear, at.rows, from, (residual, stride), Finish::Add, deltas);
        }
        let outcome = self.buffers.outcome;
        self.large_linear(linear, at.rows, from, (outcome, stride), Finish::Store, deltas)?;
        self.norm_rows(decoder, at, norm, outcome, (residual, NormTo::Add))
    }

    /// Norms q and k, turns them, and writes k and v to the pages of layer `layer`.
    fn rotate_and_write(
        &mut self,
        decoder: &Decoder,
        heads: &HeadAttention,
        at: &At,
        layer: usize,
    ) -> Result<(), Error> {
        let rope = decoder.layer_ropes[layer];
        let norms = heads.norms.map(|(q, k)| HeadNorms {
            kind: decoder.norm,
            share: match decoder.qk_norm {
                QkNorm::None | QkNorm::Head => Share::Same,
                QkNorm::EachHead => Share::Each,
                QkNorm::Whole => Share::Whole,
            },
            q: q.address,
            k: k.address,
            eps: decoder.norm_eps,
        });
        let rotary = Rotary {
            element: self.element,
            rows: at.rows as u32,
            qkv: at.qkv.address,
            stride: self.sizes.qkv as u32,
            heads: self.heads(decoder),
            positions: self.parts.positions.address,
            slots: self.parts.slots.address,
            angles: self.weights.angles[rope].address,
            pairs: decoder.ropes[rope].pairs() as u32,
            interleaved: decoder.interleaved_pairs,
            norms,
            pages: self.layer_pages(layer),
        };
        self.call(&rotary.call())
    }

    /// Attends over pages, by what `of` returns for some sequences: those of few rows apart from those of many, as many at a time as there is room for states.
    fn attend(&mut self, at: &At, of: &dyn Fn(&Self, &Part) -> Attends) -> Result<(), Error> {
        for part in at.parts.into_iter().filter(|part| part.count > 0) {
            let each = of(self, &Part { count: 1, ..part }).0.max(1);
            assert!(each <= self.buffers.states.bytes as u64, "{each} bytes of states of a sequence");
            let most = ((self.buffers.states.bytes as u64 / each) as usize).clamp(1, part.count);
            for first in (part.first..part.first + part.count).step_by(most) {
                let count = most.min(part.first + part.count - first);
                let (_, (call, merge)) = of(self, &Part { first, count, ..part });
                self.call(&call)?;
                merge.map_or(Ok(()), |merge| self.call(&merge))?;
            }
        }
        Ok(())
    }

    /// Exchanges what ranks have attended.
    fn join_attended(&mut self, decoder: &Decoder, at: &At) -> Result<(), Error> {
        let to = (self.buffers.attended, self.sizes.attended);
        let split = Self::attended(decoder).split(self.slice);
        split.map_or(Ok(()), |split| self.join(split, at.rows as u32, to, JoinTo::Halves))
    }

    /// What attention gives: each rank the outputs of its heads.
    fn attended(decoder: &Decoder) -> Outputs {
        Outputs::Plain(decoder.query_dim())
    }

    /// Returns the heads of this rank.
    fn heads(&self, decoder: &Decoder) -> u32 {
        (decoder.heads / self.slice.ranks) as u32
    }

    fn attention(&self, decoder: &Decoder, at: &At, layer: usize, part: &Part) -> Attention {
        let (to, to_stride) = match Self::attended(decoder).split(self.slice) {
            Some(split) => (self.buffers.part, whole(split.own)),
            None => (self.buffers.attended, self.sizes.attended),
        };
        Attention {
            element: self.element,
            rows: part.rows as u32,
            most_rows: part.most_rows as u32,
            longest: part.longest as u32,
            q: at.qkv.address,
            q_stride: self.sizes.qkv as u32,
            heads: self.heads(decoder),
            sequences: at.sequences_of(part),
            sequence_count: part.count as u32,
            tables: self.parts.tables.address,
            to: to.address,
            to_stride: to_stride as u32,
            window: decoder.windows[layer].map(|window| window as u32),
            scale: decoder.score_scale,
            cap: decoder.score_cap,
            pages: self.layer_pages(layer),
            states: self.buffers.states.address,
        }
    }

    pub(super) fn layer_pages(&self, layer: usize) -> Pages {
        let pool = self.pages.as_ref().expect("pages are reserved before the first step");
        pool.layers[layer]
    }

    /// Copies the rows that are kept of `from`, f32 of `stride`.
    fn gather(&mut self, kept: usize, from: Region, to: Region, stride: usize) -> Result<(), Error> {
        let rows = self.parts.kept.address;
        let gather = Gather { kept: kept as u32, from: from.address, rows, to: to.address, stride: stride as u32 };
        self.call(&gather.call())
    }

    /// Computes the logits of `rows` and finds their tokens, unless that was done.
    pub(super) fn head(&mut self, decoder: &Decoder, rows: Range<usize>) -> Result<(), Error> {
        let most = self.sizes.capacity.logits_rows;
        assert!(rows.end <= self.rows && rows.len() <= most, "rows {rows:?} of {}", self.rows);
        if rows.start == self.computed.start && rows.end <= self.computed.end {
            return Ok(());
        }
        self.computed = 0..0;
        let races = self.words.races(rows.clone());
        races.map_or(Ok(()), |races| self.device.upload(self.parts.races, races))?;
        let (bytes, races) = (self.sizes.residual * 2, races.is_some());
        self.launch_head(decoder, self.hidden.part(rows.start * bytes, rows.len() * bytes), rows.len(), races)?;
        self.computed = rows;
        Ok(())
    }

    fn launch_head(&mut self, decoder: &Decoder, from: Region, rows: usize, races: bool) -> Result<(), Error> {
        let (logits, stride, head) = (self.buffers.logits, self.sizes.logits, self.weights.head);
        self.linear(&head, rows, (from, self.sizes.residual), (logits, stride), Finish::Store)?;
        let (scale, cap) = (decoder.logit_scale, decoder.logit_cap);
        let (rows, stride, columns, logits) = (rows as u32, stride as u32, decoder.vocab_size as u32, logits.address);
        if scale != 1.0 || cap.is_some() {
            self.call(&Cap { rows, logits, stride, columns, scale, cap }.call())?;
        }
        let to = self.buffers.tokens.address;
        self.call(&Largest { rows, logits, to, stride, columns }.call())?;
        if !races {
            return Ok(());
        }
        let draw = Draw {
            rows,
            logits,
            stride,
            columns,
            terms: self.parts.races.address,
            to,
            edges: self.buffers.edges.address,
            leads: self.buffers.leads.address,
            counters: self.buffers.lead_counters.address,
        };
        draw.calls().iter().try_for_each(|call| self.call(call))
    }
}
