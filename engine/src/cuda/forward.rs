//! The decoder on a card: call by call, layer by layer.

use super::{
    Buffers, Cuda,
    device::Region,
    kernels::{self, Cap, Element, Embed, Finish, Gather, Largest, Norm, NormTo},
    weights::{Block, Inner, Linear, NormWeights},
};
use crate::{
    Error, KvMemory, Model,
    cpu::{nodes::Stay, pool::Pool},
    home::{Home, Logits, Pass},
    model::{checkpoint::ElementType, decoder::Decoder},
};
use kv_cache::TokenId;
use std::ops::Range;

impl Home for Cuda {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn stay(&self) -> Stay {
        self.pool.stay()
    }

    fn forward(
        &mut self,
        model: &Model,
        memory: &KvMemory,
        pass: &Pass<'_>,
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<(), Error> {
        if pass.spans.is_empty() {
            return Ok(());
        }
        let nowhere = memory.layout().pages;
        self.words.write(pass, pass.tokens.len(), memory.layout().page_tokens as usize, nowhere);
        self.device.upload(self.parts.whole, self.words.bytes())?;
        self.launch_pass(&model.decoder, pass)?;
        // Layers are told when they are final, while later ones are still computed.
        for layer in 0..self.weights.blocks.len() {
            self.device.wait(layer)?;
            on_layer(layer as u32);
        }
        Ok(())
    }

    fn read_hidden(&mut self, row: usize, to: &mut [f32]) -> Result<(), Error> {
        let stride = self.sizes.residual * 2;
        let mut bytes = vec![0; to.len() * 2];
        self.device.download(self.hidden.part(row * stride, stride), &mut bytes)?;
        for (to, bytes) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
            let dtype = match self.element {
                Element::Bf16 => ElementType::Bf16,
                Element::F16 => ElementType::F16,
            };
            *to = dtype.get(bytes, 0);
        }
        Ok(())
    }

    fn keep_rows(&mut self, rows: &mut dyn Iterator<Item = usize>) -> Result<(), Error> {
        let kept = self.words.keep(rows);
        let list = kept.len() / 4;
        self.device.upload(self.parts.kept, kept)?;
        // The residual is not needed any more, and its rows are longer.
        let (from, to) = (self.hidden, self.buffers.residual);
        self.rows = list;
        if list > 0 {
            let stride = (self.sizes.residual / 2) as u32;
            let (from, rows) = (from.address, self.parts.kept.address);
            self.device.launch(&Gather { kept: list as u32, from, rows, to: to.address, stride }.call())?;
        }
        self.hidden = to;
        Ok(())
    }

    fn find_most_likely(&mut self, model: &Model, rows: Range<usize>) -> Result<(), Error> {
        let count = rows.len();
        self.head(&model.decoder, rows)?;
        let (logits, to) = (self.buffers.logits.address, self.buffers.largest);
        let (stride, columns) = (self.sizes.logits as u32, model.decoder.vocab_size as u32);
        let call = Largest { rows: count as u32, logits, to: to.address, stride, columns }.call();
        self.device.launch(&call)?;
        // SAFETY: any bytes are u32s.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.likely.as_mut_ptr().cast(), count * 4) };
        self.device.download(to, bytes)
    }

    fn most_likely(&self, row: usize) -> Option<TokenId> {
        Some(self.likely[row]).filter(|token| *token != TokenId::MAX)
    }

    fn compute_logits(&mut self, model: &Model, rows: Range<usize>) -> Result<(), Error> {
        let floats = rows.len() * self.sizes.logits;
        self.head(&model.decoder, rows)?;
        // SAFETY: any bytes are f32s.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.logits.as_mut_ptr().cast(), floats * 4) };
        self.device.download(self.buffers.logits, bytes)
    }

    fn logits(&self) -> Logits<'_> {
        Logits { floats: &self.logits, stride: self.sizes.logits }
    }

    fn pool_and_logits(&mut self) -> (&mut Pool, Logits<'_>) {
        (&mut self.pool, Logits { floats: &self.logits, stride: self.sizes.logits })
    }

    fn expert_bytes(&self) -> (u64, u64) {
        (0, 0)
    }
}

/// The rows that a part of a pass works on.
#[derive(Clone, Copy, Debug)]
struct At {
    rows: usize,
    /// Their sequences and how many: `[sequences][4]`.
    sequences: Region,
    count: usize,
    residual: Region,
    qkv: Region,
}

impl Cuda {
    /// Asks for all of a pass, up to the head's inputs, and marks where each layer's pages are final.
    fn launch_pass(&mut self, decoder: &Decoder, pass: &Pass<'_>) -> Result<(), Error> {
        let Buffers { residual, qkv, kept_residual, kept_qkv, input, attended, gated, .. } = self.buffers;
        let count = pass.spans.len();
        let mut at = At { rows: pass.tokens.len(), sequences: self.parts.sequences, count, residual, qkv };
        self.embed(decoder, &at)?;
        for layer in 0..self.weights.blocks.len() {
            let block = self.weights.blocks[layer];
            self.norm(decoder, &at, block.attention_norm)?;
            self.linear(&block.qkv, &at, (input, self.sizes.residual), (qkv, self.sizes.qkv), Finish::Store)?;
            self.rotate_and_write(decoder, &at, &block, layer)?;
            self.device.mark(layer)?;
            if layer + 1 == self.weights.blocks.len() {
                // The last pages are written. From here on a token matters only to its own logits.
                let kept = pass.places.len();
                if kept == 0 {
                    self.rows = 0;
                    return Ok(());
                }
                if kept < at.rows {
                    self.gather(kept, residual, kept_residual, self.sizes.residual)?;
                    self.gather(kept, qkv, kept_qkv, self.sizes.qkv)?;
                    (at.rows, at.residual, at.qkv) = (kept, kept_residual, kept_qkv);
                    (at.sequences, at.count) = (self.parts.kept_sequences, pass.kept.len());
                }
            }
            self.attend(decoder, &at, layer)?;
            if decoder.parallel {
                // The MLP reads the residual as attention did.
                self.norm(decoder, &at, block.mlp_norm)?;
            }
            let from = (attended, self.sizes.attended);
            self.add(decoder, &block.output, &at, from, block.attention_post_norm)?;
            if !decoder.parallel {
                self.norm(decoder, &at, block.mlp_norm)?;
            }
            let (inner, finish) = match &block.inner {
                Inner::Gated(gate_up) => (gate_up, Finish::Gate(decoder.activation)),
                Inner::Plain(up) => (up, Finish::Activate(decoder.activation)),
            };
            self.linear(inner, &at, (input, self.sizes.residual), (gated, self.sizes.gated), finish)?;
            self.add(decoder, &block.down, &at, (gated, self.sizes.gated), block.mlp_post_norm)?;
        }
        self.norm(decoder, &at, Some(self.weights.final_norm))?;
        (self.rows, self.hidden) = (at.rows, input);
        Ok(())
    }

    fn embed(&mut self, decoder: &Decoder, at: &At) -> Result<(), Error> {
        let (kind, table) = self.weights.table;
        let embed = Embed {
            element: self.element,
            rows: at.rows as u32,
            tokens: self.parts.tokens.address,
            table: table.address,
            to: at.residual.address,
            width: decoder.hidden as u32,
            stride: self.sizes.residual as u32,
            kind,
            scale: self.weights.embedding_scale,
        };
        self.device.launch(&embed.call())
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
        self.device.launch(&norm.call())
    }

    fn linear(
        &mut self,
        linear: &Linear,
        at: &At,
        (from, from_stride): (Region, usize),
        (to, to_stride): (Region, usize),
        finish: Finish,
    ) -> Result<(), Error> {
        let call = linear.call(self.element, at.rows, from, from_stride);
        let call = kernels::Linear {
            to: to.address,
            to_stride: to_stride as u32,
            finish,
            partial: self.buffers.partial.address,
            counters: self.buffers.counters.address,
            ..call
        };
        self.device.launch(&call.call())
    }

    /// Adds a product to the residual, through a norm where there is one.
    fn add(
        &mut self,
        decoder: &Decoder,
        linear: &Linear,
        at: &At,
        from: (Region, usize),
        norm: Option<NormWeights>,
    ) -> Result<(), Error> {
        let (residual, stride) = (at.residual, self.sizes.residual);
        if norm.is_none() {
            return self.linear(linear, at, from, (residual, stride), Finish::Add);
        }
        let outcome = self.buffers.outcome;
        self.linear(linear, at, from, (outcome, stride), Finish::Store)?;
        self.norm_rows(decoder, at, norm, outcome, (residual, NormTo::Add))
    }

    fn rotate_and_write(&mut self, _: &Decoder, _: &At, _: &Block, _: usize) -> Result<(), Error> { todo!() }
    fn attend(&mut self, _: &Decoder, _: &At, _: usize) -> Result<(), Error> { todo!() }

    /// Copies the rows that are kept of `from`, f32 of `stride`.
    fn gather(&mut self, kept: usize, from: Region, to: Region, stride: usize) -> Result<(), Error> {
        let rows = self.parts.kept.address;
        let gather = Gather { kept: kept as u32, from: from.address, rows, to: to.address, stride: stride as u32 };
        self.device.launch(&gather.call())
    }

    /// Computes the logits of `rows`.
    fn head(&mut self, decoder: &Decoder, rows: Range<usize>) -> Result<(), Error> {
        assert!(rows.end <= self.rows && rows.len() <= self.sizes.logits_rows, "rows {rows:?} of {}", self.rows);
        let (logits, stride) = (self.buffers.logits, self.sizes.logits);
        let (head, bytes) = (self.weights.head, self.sizes.residual * 2);
        let from = self.hidden.part(rows.start * bytes, rows.len() * bytes);
        let at = At { rows: rows.len(), sequences: Region::default(), count: 0, residual: from, qkv: from };
        self.linear(&head, &at, (from, self.sizes.residual), (logits, stride), Finish::Store)?;
        let (scale, cap) = (decoder.logit_scale, decoder.logit_cap);
        if scale == 1.0 && cap.is_none() {
            return Ok(());
        }
        let (stride, columns) = (stride as u32, decoder.vocab_size as u32);
        self.device.launch(&Cap { rows: at.rows as u32, logits: logits.address, stride, columns, scale, cap }.call())
    }
}
