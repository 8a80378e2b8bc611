//! Linears of many rows by a library of the device, where bits may depend on the batch ([`crate::Config::exact`]).
//!
//! A library wants weights output after output, and ours lie in panels, for kernels that read each byte once. So a step lays them out before it multiplies:
//! a second copy of all weights would take as much memory again. What that costs is what kernels of some hundred rows lose beside the library's
//! ([`LEAST_ROWS`]). It is done for some outputs at a time: their weights and sums are still in the second-level cache when they are read, and room for
//! them is little.
//!
//! ```text
//! narrow     input            -> inputs    [rows][inputs] of eight bits, and a scale of each row; beside weights of eight bits
//! lay        panels           -> weights   [outputs][inputs] of the same, and a scale of each output; or 16-bit floats, quantised weights too
//! multiply   inputs, weights  -> sums      f32 or i32 [rows][outputs]; with neither bias nor gate nor scales where they belong at once
//! end        sums             ->           as a linear's
//! ```

use super::{
    Device,
    device::{Operand, Product, ProductShape, Region},
    kernels::{self, Deltas, Element, Finish, Narrow, Shrink, Sums},
    rank::Rank,
    weights::{Linear, Uploaded},
};
use crate::Error;
use std::collections::HashSet;

/// Fewest rows that go through the library. To read 16-bit weights and write them again takes about 1 ps for each on a card of 4 TB/s, and the library saves 2 fs of
/// each for a row where it reaches three quarters of 790 TFLOP/s and our kernels half: 500 rows are even. Fewer in tests, whose prompts are short.
const LEAST_ROWS: usize = if cfg!(test) { 16 } else { 512 };
/// Most panels of outputs at a time: 4,096 outputs. Of 2,048 rows that is 256 tiles of 128 by 256, twice what a card has processors, and of 4,096 inputs
/// 32 MiB of weights and as many of sums. Fewer in tests, so that their linears have several parts.
const MOST_PANELS: usize = if cfg!(test) { 2 } else { 64 };
/// What NVIDIA recommends for cuBLASLt on sm_90.
pub(super) const WORKSPACE: usize = 32 << 20;

/// What such linears work in.
#[derive(Debug)]
pub(super) struct Products {
    weights: Region,
    /// Of outputs and of rows.
    scales: Region,
    row_scales: Region,
    inputs: Region,
    sums: Region,
    workspace: Region,
    /// Those for which the library has no way.
    baffling: HashSet<ProductShape>,
    /// Those that steps make, while that is found out.
    listed: Vec<Product>,
}

impl Products {
    /// Reserves them, for steps of up to `rows` rows; none where the device has no library or steps are short.
    pub(super) fn reserve(
        device: &mut dyn Device,
        weights: &Uploaded,
        element: Element,
        rows: usize,
    ) -> Result<Option<Self>, Error> {
        if !device.multiplies(Operand::Floats(element)) || rows < LEAST_ROWS {
            return Ok(None);
        }
        let panels = weights.linears().map(|linear| linear.shape.panels as usize).max().unwrap_or(0).min(MOST_PANELS);
        let inputs = weights.linears().map(|linear| linear.shape.steps as usize * 32).max().unwrap_or(0);
        let narrow = |linear: &Linear| operand(linear, element, device).bytes() == 1;
        let narrow_rows = if weights.linears().any(narrow) { rows } else { 0 };
        let mut alloc = |bytes: usize| device.alloc("products by a library", bytes);
        Ok(Some(Self {
            weights: alloc(panels * 64 * inputs * 2)?,
            scales: alloc(panels * 64 * 4)?,
            row_scales: alloc(narrow_rows * 4)?,
            inputs: alloc(narrow_rows * inputs)?,
            sums: alloc(rows * panels * 64 * 4)?,
            workspace: alloc(WORKSPACE)?,
            baffling: HashSet::new(),
            listed: Vec::new(),
        }))
    }
}

/// Returns what `device` multiplies for a linear.
fn operand(linear: &Linear, element: Element, device: &dyn Device) -> Operand {
    let narrow = linear.codes.and_then(|codes| codes.operand()).filter(|operand| device.multiplies(*operand));
    narrow.unwrap_or(Operand::Floats(element))
}

/// A linear as products.
struct Plan {
    linear: kernels::Linear,
    operand: Operand,
    /// Panels of all parts but the last.
    panels: u32,
}

impl Plan {
    /// First panel and panels of each part, as even as can be.
    fn parts(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let (all, panels) = (self.linear.shape.panels, self.panels);
        (0..all).step_by(panels as usize).map(move |first| (first, panels.min(all - first)))
    }

    /// Whether products are what is wanted, where it is wanted.
    fn is_direct(&self) -> bool {
        let plain = matches!(self.linear.finish, Finish::Store | Finish::Add);
        plain && self.linear.bias == 0 && self.linear.deltas.is_none() && self.operand.bytes() > 1
    }

    fn shape(&self, panels: u32) -> ProductShape {
        let (outputs, inputs) = (panels * 64, self.linear.shape.steps * 32);
        ProductShape {
            operand: self.operand,
            outputs,
            inputs,
            input_stride: if self.operand.bytes() > 1 { self.linear.input_stride } else { inputs },
            to_stride: if self.is_direct() { self.linear.to_stride } else { outputs },
            adds: self.is_direct() && self.linear.finish == Finish::Add,
        }
    }
}

impl Rank {
    /// Computes a linear of rows that all go through it, and in its sums what adapters add to them: by the library where rows are many.
    pub(super) fn large_linear(
        &mut self,
        linear: &Linear,
        rows: usize,
        from: (Region, usize),
        to: (Region, usize),
        finish: Finish,
        deltas: Option<Deltas>,
    ) -> Result<(), Error> {
        if let Some(deltas) = deltas {
            let (steps, stride) = (linear.shape.steps, from.1 as u32);
            let (element, rows, input) = (self.element, rows as u32, from.0.address);
            self.call(&Shrink { element, rows, input, stride, steps, deltas }.call())?;
        }
        let plan = self.plan(linear, rows, from, to, finish, deltas);
        // What the library has no way for is computed by kernels of ours: when kernels are listed nobody knows yet.
        if plan.is_none() || self.listed.is_some() {
            self.linear_and(linear, rows, from, to, finish, deltas)?;
        }
        let Some(mut plan) = plan else { return Ok(()) };
        plan.linear.input = self.ordered(linear, rows, from)?.address;
        self.multiply_parts(&plan)
    }

    /// Returns how the library computes a linear; `None` where it does not.
    fn plan(
        &self,
        linear: &Linear,
        rows: usize,
        (from, from_stride): (Region, usize),
        (to, to_stride): (Region, usize),
        finish: Finish,
        deltas: Option<Deltas>,
    ) -> Option<Plan> {
        let products = self.products.as_ref().filter(|_| rows >= LEAST_ROWS)?;
        assert!(linear.split.is_none(), "`check` refuses a library for several ranks");
        let call = linear.call(self.element, self.device.most_shared(), rows, from, from_stride);
        let call = kernels::Linear { to: to.address, to_stride: to_stride as u32, finish, deltas, ..call };
        let parts = call.shape.panels.div_ceil(MOST_PANELS as u32);
        let (operand, panels) = (operand(linear, self.element, &*self.device), call.shape.panels.div_ceil(parts));
        let plan = Plan { linear: call, operand, panels };
        let known = plan.parts().all(|(_, panels)| !products.baffling.contains(&plan.shape(panels)));
        known.then_some(plan)
    }

    fn multiply_parts(&mut self, plan: &Plan) -> Result<(), Error> {
        let kernels::Linear { element, rows, mut input, input_stride: stride, .. } = plan.linear;
        let (narrow, integers) = (plan.operand.bytes() == 1, plan.operand == Operand::Int8);
        let Products { weights, scales, row_scales, inputs, sums, workspace, .. } =
            *self.products.as_ref().expect("a plan is made for a library");
        if narrow {
            let (width, to) = (plan.linear.shape.steps * 32, inputs.address);
            let scales = row_scales.address;
            self.call(&Narrow { element, rows, from: input, to, scales, width, stride, integers }.call())?;
            input = to;
        }
        for (first, panels) in plan.parts() {
            let part = plan.linear.part(first, panels);
            let direct = plan.is_direct();
            self.call(&part.lay(weights.address, narrow.then_some(scales.address)))?;
            let to = if direct { part.to } else { sums.address };
            let product = Product { shape: plan.shape(panels), rows, weights: weights.address, input, to, workspace };
            self.multiply(product)?;
            if !direct {
                let (row_scales, scales) = if narrow { (row_scales.address, scales.address) } else { (0, 0) };
                self.call(&part.end(&Sums { from: sums.address, integers, row_scales, scales }))?;
            }
        }
        Ok(())
    }

    /// Asks the device for a product, or lists it.
    fn multiply(&mut self, product: Product) -> Result<(), Error> {
        if self.listed.is_none() {
            return self.device.multiply(&product);
        }
        self.products.as_mut().expect("a plan is made for a library").listed.push(product);
        Ok(())
    }

    /// Makes ready the products that were listed.
    pub(super) fn prepare_products(&mut self) -> Result<(), Error> {
        let Some(products) = &mut self.products else { return Ok(()) };
        let mut ready = HashSet::new();
        for product in std::mem::take(&mut products.listed) {
            let shape = product.shape;
            if !ready.insert((shape, product.row_class())) || products.baffling.contains(&shape) {
                continue;
            }
            if !self.device.prepare_product(&product)? {
                let ProductShape { operand, outputs, inputs, .. } = shape;
                let rows = product.row_class();
                tracing::warn!(
                    ?operand,
                    outputs,
                    inputs,
                    rows,
                    "the library has no way to multiply this: kernels of ours do"
                );
                products.baffling.insert(shape);
            }
        }
        Ok(())
    }
}
