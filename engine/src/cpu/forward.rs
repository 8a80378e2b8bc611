//! The decoder on the processor: operation by operation, layer by layer.

use super::{Cpu, nodes::Stay, pool::Pool};
use crate::{
    Error, KvMemory, Model, Stuck,
    home::{Home, Logits, Pass},
    model::weights::{Attention, Dense, Mlp, Plain},
};
use kv_cache::TokenId;
use std::ops::Range;

impl Home for Cpu {
    fn name(&self) -> &str {
        self.kernels.name
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
        let (decoder, weights) = (&model.decoder, model.weights());
        let mut spans = pass.spans;
        if spans.is_empty() {
            return Ok(());
        }
        self.begin(spans, memory.layout().page_tokens as usize);
        self.embed(weights, pass.tokens);
        for (layer, block) in weights.layers.iter().enumerate() {
            let (rope, window) = (decoder.layer_ropes[layer], decoder.windows[layer]);
            self.norm(block.attention_norm.as_ref());
            match &block.attention {
                Attention::Heads(heads) => {
                    self.qkv(&heads.qkv, spans, layer);
                    self.rotate_and_write(heads, rope, memory, layer);
                }
                Attention::Latent(latent) => {
                    self.latent_entry(&latent.entry);
                    self.latent_write(latent, rope, memory, layer);
                }
            }
            on_layer(layer as u32);
            if layer + 1 == weights.layers.len() {
                // The last pages are written. From here on a token matters only to its own logits.
                self.keep(pass.kept_rows());
                spans = pass.kept;
                if spans.is_empty() {
                    return Ok(());
                }
            }
            let output = match &block.attention {
                Attention::Heads(heads) => {
                    self.attend(spans, window, memory, layer);
                    &heads.output
                }
                Attention::Latent(latent) => {
                    self.latent_query(latent, rope);
                    self.attend(spans, window, memory, layer);
                    self.latent_value(latent);
                    &latent.output
                }
            };
            if decoder.parallel {
                // The MLP reads the residual as attention did.
                self.norm(block.mlp_norm.as_ref());
                self.output(output, block.attention_post_norm.as_ref(), spans, layer);
            } else {
                self.output(output, block.attention_post_norm.as_ref(), spans, layer);
                self.norm(block.mlp_norm.as_ref());
            }
            match &block.mlp {
                Mlp::Dense(Dense { gate_up, down }) => {
                    self.gate_up(gate_up, spans, layer);
                    self.down(down, block.mlp_post_norm.as_ref(), spans, layer);
                }
                Mlp::Plain(Plain { up, down }) => {
                    self.up(up, spans, layer);
                    self.down(down, block.mlp_post_norm.as_ref(), spans, layer);
                }
                Mlp::Experts(experts) => {
                    self.experts(experts);
                    if let Some(Dense { gate_up, down }) = &experts.shared {
                        // Nothing is added to an expert.
                        self.gate_up(gate_up, &[], layer);
                        self.down(down, None, &[], layer);
                    }
                }
            }
        }
        self.norm(Some(&weights.final_norm));
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn FnMut(u32)) -> Result<(), Error> {
        Ok(())
    }

    fn read_hidden(&mut self, row: usize, to: &mut [f32]) -> Result<(), Error> {
        self.read_input(row, to);
        Ok(())
    }

    fn keep_rows(&mut self, rows: &mut dyn Iterator<Item = usize>) -> Result<(), Error> {
        self.keep_input(rows);
        Ok(())
    }

    fn races(&self) -> bool {
        false
    }

    fn find_tokens(&mut self, model: &Model, rows: Range<usize>) -> Result<(), Error> {
        self.compute_largest(&model.weights().head, rows);
        Ok(())
    }

    fn found(&self, row: usize) -> Option<Result<TokenId, Stuck>> {
        Some(self.largest(row).ok_or(Stuck::NoLogits))
    }

    fn compute_logits(&mut self, model: &Model, rows: Range<usize>, _: &dyn Fn(usize) -> bool) -> Result<(), Error> {
        self.head(&model.weights().head, rows);
        Ok(())
    }

    fn logits(&self) -> Logits<'_> {
        Logits { floats: self.logits.floats(), stride: self.sizes.logits }
    }

    fn pool_and_logits(&mut self) -> (&mut Pool, Logits<'_>) {
        (&mut self.pool, Logits { floats: self.logits.floats(), stride: self.sizes.logits })
    }

    fn expert_bytes(&self) -> (u64, u64) {
        self.chosen_and_read()
    }
}
