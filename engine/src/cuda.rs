//! A card of NVIDIA as a home for a model.
//!
//! Three layers. [`kernels`] says what the kernels are and what a call of one is; [`device`] is what a card does with calls; [`Cuda`] is the
//! [`Home`](crate::home::Home): weights and buffers on the device, and the order of calls that make a pass ([`forward`]). Only [`driver`] knows NVIDIA's
//! driver. Kernels are compiled for the card at hand when it is opened ([`nvrtc`], [`cache`]).
//!
//! ```text
//! embed       tokens            -> residual     f32 [rows][hidden]
//! norm        residual          -> input        16-bit floats [rows][hidden]
//! linear      input             -> qkv          f32 [rows][(heads + 2 kv_heads) * head_dim]
//! rotary      qkv               -> qkv, pages
//! attention   qkv, pages        -> attended     16-bit floats [rows][heads * head_dim]
//! linear      attended          +> residual     or -> outcome, and through a norm
//! linear      input             -> gated        16-bit floats [rows][intermediate]
//! linear      gated             +> residual     or likewise
//!
//!             where attention is latent ([`latent`]), instead of rotary and attention:
//! ...         qkv               -> pages, q     16-bit floats [rows][heads][rank + rope]
//! ...         q, pages          -> attended     16-bit floats [rows][heads * value]
//!
//!             where a layer has experts, instead of the last two:
//! linear      input             -> scores       f32 [rows][experts]
//! choose      scores            -> chosen, weights [rows][chosen]; a pair is a row and one of its choices
//! group       chosen            -> pairs, tiles expert after expert
//! linear      input, tiles      -> gated        16-bit floats [pairs][intermediate]
//! linear      gated, tiles      -> outcomes     f32 [pairs][hidden]
//! mix         outcomes          +> residual     choice after choice
//!
//! gather      residual, qkv     -> kept         after the last pages are written only sampled rows go on
//! linear      input             -> logits       f32 [rows][vocab]; capped, and the largest found
//! rank        logits            -> edges        where top-k and top-p cut; only where a row races
//! race        logits, edges     -> tokens       in place of the largest of rows that race
//! ```
//!
//! Where rows have adapters, what these add is in the sums of linears that they change ([`adapters`]).
//!
//! Where bits may depend on the batch, dense linears of many rows are products by a library instead ([`products`]).
//!
//! Memory is taken when the engine is made, and none by a step but the first with an adapter. A step's rows are described in words that are copied once ([`rows`]);
//! what is asked of the device after that waits for nothing until the tokens are wanted.

mod adapters;
#[cfg(feature = "cuda")]
mod cache;
#[cfg(feature = "cuda")]
mod copier;
#[cfg(feature = "cuda")]
mod cublaslt;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod emulator;
mod forward;
mod graphs;
mod kernels;
mod latent;
#[cfg(feature = "cuda")]
mod library;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod nvrtc;
mod pages;
#[cfg(feature = "cuda")]
mod patience;
mod products;
mod rank;
mod rows;
mod slice;
#[cfg(feature = "cuda")]
mod staging;
mod weights;

pub(crate) use device::Device;
pub(crate) use weights::{check, check_path};
#[cfg(test)]
pub(crate) use {emulated::Emulated, emulator::Order};

use crate::{
    Error, KvMemory, Model, Stuck,
    cpu::{nodes::Stay, pool::Pool},
    home::{Home, Logits, Pass},
    model::{checkpoint::ElementType, decoder::Decoder},
};
use device::{MOST_SENT_BYTES, SLOTS};
use graphs::Bucket;
use kernels::{Draw, Element};
use kv_cache::{Backing, KvDtype, PageLayout, TokenId};
use pages::CardPages;
use rank::Rank;
pub(crate) use rank::Sizes;
use rows::Capacity;
use slice::Slice;
use std::{
    iter::repeat,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
#[cfg(feature = "cuda")]
use {
    crate::Config,
    std::{path::Path, time::Duration},
};

/// Returns what keys and values of `model` are kept as when nobody says.
pub(crate) fn kv_dtype(model: &Model) -> KvDtype {
    weights::kv_dtype(weights::element(model.weights()))
}

/// Opens card `card` and as many behind it as share the model under `config`.
///
/// # Errors
/// [`Error::Card`] says what is missing.
#[cfg(feature = "cuda")]
pub(crate) fn open(card: usize, config: &Config) -> Result<Vec<Box<dyn Device>>, Error> {
    let open = |card| {
        let cache = cache::Cache { folder: config.kernel_cache.clone() };
        driver::Card::open(card, config.nvrtc_library.as_deref(), cache, Duration::from_millis(config.card_timeout_ms))
    };
    let mut cards = (card..card + config.tensor_parallel).map(open).collect::<Result<Vec<_>, _>>()?;
    if !config.exact {
        cards.iter_mut().try_for_each(|card| card.multiply_by(config.cublaslt_library.as_deref()))?;
    }
    driver::connect(&mut cards, config.nccl_library.as_deref())?;
    Ok(cards.into_iter().map(|card| Box::new(card) as Box<dyn Device>).collect())
}

#[cfg(feature = "cuda")]
pub(crate) use {driver::survey, library::describe as describe_library};

/// Looks for the compiler of kernels, and says which it is.
#[cfg(feature = "cuda")]
pub(crate) fn find_nvrtc(file: Option<&Path>) -> Result<String, String> {
    let (major, minor) = nvrtc::Nvrtc::open(file)?.version();
    Ok(format!("{major}.{minor}"))
}

/// Looks for what connects cards, and says where it is.
#[cfg(feature = "cuda")]
pub(crate) fn find_nccl(file: Option<&Path>) -> Result<String, String> {
    nccl::find(file).map(|place| place.display().to_string())
}

/// Looks for what multiplies where bits may depend on the batch, and says which it is.
#[cfg(feature = "cuda")]
pub(crate) fn find_cublaslt(file: Option<&Path>) -> Result<String, String> {
    cublaslt::find(file)
}

/// A model on a card, or on several that share it.
#[derive(Debug)]
pub(crate) struct Cuda {
    name: String,
    ranks: Vec<Mutex<Rank>>,
    /// A thread for each rank.
    crew: Pool,
    sizes: Sizes,
    layers: usize,
    kv_heads: usize,
    /// Layers of the pass that nobody was told of.
    untold: Range<usize>,
    /// Rows that are kept after all.
    kept: Vec<usize>,
    /// Rows whose logits come down together.
    runs: Vec<Range<usize>>,
    /// What was downloaded last.
    logits: Vec<f32>,
    found: Vec<TokenId>,
    /// Passes that were begun, and those of them that ended.
    begun: usize,
    ended: usize,
    /// Threads that draw tokens.
    pool: Pool,
}

impl Cuda {
    /// Uploads `model` to `devices`, which share it, and reserves buffers; `threads` draw tokens.
    pub(crate) fn new(
        devices: Vec<Box<dyn Device>>,
        model: &Model,
        sizes: Sizes,
        threads: usize,
    ) -> Result<Self, Error> {
        let names: Vec<&str> = devices.iter().map(|device| device.name()).collect();
        let (name, ranks) = (names.join(", "), devices.len());
        let mut crew = Pool::new(ranks)?;
        let devices: Vec<Mutex<Option<Box<dyn Device>>>> =
            devices.into_iter().map(|device| Mutex::new(Some(device))).collect();
        // Every card's part of the weights goes up at once.
        let made: Vec<Mutex<Option<Result<Rank, Error>>>> = devices.iter().map(|_| Mutex::new(None)).collect();
        crew.run(ranks, &|rank, _| {
            let device = lock(&devices[rank]).take().expect("a device for each rank");
            *lock(&made[rank]) = Some(Rank::new(device, Slice { rank, ranks }, model, sizes));
        });
        let made = made.into_iter().map(|rank| rank.into_inner().unwrap_or_else(PoisonError::into_inner));
        let ranks = made.map(|rank| Ok(Mutex::new(rank.expect("every rank was made")?)));
        Ok(Self {
            name,
            ranks: ranks.collect::<Result<_, Error>>()?,
            crew,
            sizes,
            layers: model.decoder.layers(),
            kv_heads: model.decoder.kv_heads,
            untold: 0..0,
            kept: Vec::new(),
            runs: Vec::new(),
            logits: vec![0.0; sizes.capacity.logits_rows * sizes.logits],
            found: vec![0; sizes.capacity.logits_rows],
            begun: 0,
            ended: 0,
            pool: Pool::new(threads)?,
        })
    }

    /// Says whether weights were rounded when they were uploaded.
    pub(crate) fn rounds(&mut self) -> bool {
        self.first().weights.rounded
    }

    /// Returns for how many pages of `page_bytes` bytes a `share` of the devices' memory leaves room. Of the first device's share another engine has `taken`: bytes, and
    /// as many again for each page.
    ///
    /// # Errors
    /// [`Error::Card`] says who has the rest.
    pub(crate) fn room_for_pages(&mut self, share: f64, page_bytes: u64, taken: (u64, u64)) -> Result<u64, Error> {
        // Each has a part of every page: its heads.
        let parts = self.ranks.len().min(self.kv_heads) as u64;
        let mut most = u64::MAX;
        for (rank, (bytes, of_page)) in self.ranks.iter_mut().zip([taken].into_iter().chain(repeat((0, 0)))) {
            most = most.min(own(rank).bytes_for_pages(share, bytes)? * parts / (page_bytes + of_page * parts));
        }
        Ok(most)
    }

    /// Returns the bytes that it has on the first device.
    pub(crate) fn bytes_taken(&mut self) -> Result<u64, Error> {
        Ok(self.first().device.memory()?.own)
    }

    /// Reserves the pool, and makes ready what steps of `model` do.
    pub(crate) fn reserve_pages(&mut self, model: &Model, layout: &PageLayout) -> Result<(), Error> {
        self.each(&|rank| rank.reserve_pages(model, layout))
    }

    /// Uploads the adapters of `pass` that are not there, and gives back what others took that are gone.
    ///
    /// # Errors
    /// [`Error::Row`] when there is no memory for one: whoever does without it can go on.
    fn bring_adapters(&mut self, decoder: &Decoder, pass: &Pass<'_>) -> Result<(), Error> {
        if self.first().adapters.are_those_of(pass) {
            return Ok(());
        }
        self.each(&Rank::forget_adapters)?;
        for (row, adapter) in pass.spans.iter().enumerate().filter_map(|(row, span)| Some((row, span.adapter?))) {
            if self.first().adapters.has(adapter) {
                continue;
            }
            // A rank that has no room is no rank that breaks.
            let refused = Mutex::new(None);
            self.each(&|rank| {
                if let Err(error) = rank.upload_adapter(decoder, adapter) {
                    lock(&refused).get_or_insert(error);
                }
                Ok(())
            })?;
            if let Some(error) = refused.into_inner().unwrap_or_else(PoisonError::into_inner) {
                self.each(&|rank| rank.withdraw_adapter(adapter))?;
                return Err(Error::Row(format!("row {row}: adapter {}: {error}", adapter.id())));
            }
        }
        Ok(())
    }

    /// Does `what` on all ranks, each on a thread of its own: they wait for each other.
    fn each(&mut self, what: &(dyn Fn(&mut Rank) -> Result<(), Error> + Sync)) -> Result<(), Error> {
        let (ranks, fault) = (&self.ranks, Mutex::new(None));
        self.crew.run(ranks.len(), &|at, _| {
            let mut rank = lock(&ranks[at]);
            // Who panics is waited for by the others as well.
            match catch_unwind(AssertUnwindSafe(|| what(&mut rank))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    // The first is what others may fail of.
                    lock(&fault).get_or_insert(error);
                    rank.device.leave();
                }
                Err(panic) => {
                    rank.device.leave();
                    resume_unwind(panic);
                }
            }
        });
        fault.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Returns what graph `pass` is done by, if by one.
    fn bucket(&self, pass: &Pass<'_>) -> Option<Bucket> {
        let Capacity { rows, sequences, .. } = self.sizes.capacity;
        Bucket::of(pass, rows.min(sequences), self.sizes.context)
    }

    /// Returns the rank that is asked for what all of them have.
    fn first(&mut self) -> &mut Rank {
        own(&mut self.ranks[0])
    }
}

/// A number of four bytes, any of which are one.
trait Word {}

impl Word for u32 {}
impl Word for f32 {}

fn bytes_of<T: Word>(words: &mut [T]) -> &mut [u8] {
    // SAFETY: a word is four bytes, whatever they are; they are borrowed as long as the words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// Nothing that is locked here is left half-way by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn own<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

impl Home for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn cards(&self) -> Vec<(String, [u8; 16])> {
        self.ranks.iter().map(|rank| lock(rank).device.identity()).collect()
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
        self.bring_adapters(&model.decoder, pass)?;
        let bucket = self.bucket(pass);
        self.each(&|rank| rank.begin(&model.decoder, memory.layout(), pass, bucket))?;
        if self.sizes.checked {
            let fault = Mutex::new(None);
            self.each(&|rank| match rank.slice.rank {
                0 => rank.find_fault(pass).map(|found| *lock(&fault) = found),
                _ => rank.catch_up(),
            })?;
            if let Some(problem) = fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
                return Err(Error::Row(problem));
            }
        }
        self.untold = 0..self.layers;
        if bucket.is_none() {
            // Layers are told when they are final, while later ones are still computed.
            while let Some(layer) = self.untold.next() {
                self.each(&|rank| rank.device.wait(layer))?;
                on_layer(layer as u32);
            }
        }
        Ok(())
    }

    fn finish(&mut self, on_layer: &mut dyn FnMut(u32)) -> Result<(), Error> {
        if self.untold.is_empty() {
            return Ok(());
        }
        self.each(&|rank| rank.device.wait(0))?;
        std::mem::take(&mut self.untold).for_each(|layer| on_layer(layer as u32));
        Ok(())
    }

    fn begin(&mut self, model: &Model, memory: &KvMemory, pass: &Pass<'_>) -> Result<bool, Error> {
        let can = !self.sizes.checked && pass.tokens.len() * 4 <= MOST_SENT_BYTES;
        let Some(bucket) = self.bucket(pass).filter(|_| can) else {
            return Ok(false);
        };
        if !self.first().adapters.are_those_of(pass) {
            return Ok(false);
        }
        let (slot, tokens) = (self.begun % SLOTS, pass.tokens.len() * 4);
        self.each(&|rank| {
            rank.begin(&model.decoder, memory.layout(), pass, Some(bucket))?;
            rank.device.send(slot, rank.buffers.tokens.part(0, tokens))
        })?;
        self.begun += 1;
        Ok(true)
    }

    fn end(&mut self, rows: usize) -> Result<(), Error> {
        let slot = self.ended % SLOTS;
        self.ended += 1;
        let mut found = std::mem::take(&mut self.found);
        let into = Mutex::new(bytes_of(&mut found[..rows]));
        let outcome = self.each(&|rank| match rank.slice.rank {
            0 => rank.device.receive(slot, &mut lock(&into)),
            // One that nothing is asked of may still have failed.
            _ => rank.device.receive(slot, &mut []),
        });
        self.found = found;
        outcome
    }

    fn read_hidden(&mut self, row: usize, to: &mut [f32]) -> Result<(), Error> {
        let stride = self.sizes.residual * 2;
        let mut bytes = vec![0; to.len() * 2];
        let into = Mutex::new(&mut bytes[..]);
        self.each(&|rank| match rank.slice.rank {
            0 => rank.device.download(rank.hidden.part(row * stride, stride), &mut lock(&into)),
            _ => rank.catch_up(),
        })?;
        for (to, bytes) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
            let dtype = match self.first().element {
                Element::Bf16 => ElementType::Bf16,
                Element::F16 => ElementType::F16,
            };
            *to = dtype.get(bytes, 0);
        }
        Ok(())
    }

    fn keep_rows(&mut self, rows: &mut dyn Iterator<Item = usize>) -> Result<(), Error> {
        let mut kept = std::mem::take(&mut self.kept);
        kept.clear();
        kept.extend(rows);
        let outcome = self.each(&|rank| rank.keep_rows(&kept));
        self.kept = kept;
        outcome
    }

    fn races(&self) -> bool {
        lock(&self.ranks[0]).races
    }

    fn find_tokens(&mut self, model: &Model, rows: Range<usize>) -> Result<(), Error> {
        let mut found = std::mem::take(&mut self.found);
        let into = Mutex::new(bytes_of(&mut found[..rows.len()]));
        let outcome = self.each(&|rank| {
            rank.head(&model.decoder, rows.clone())?;
            match rank.slice.rank {
                0 => rank.device.download(rank.buffers.tokens, &mut lock(&into)),
                _ => rank.catch_up(),
            }
        });
        self.found = found;
        outcome
    }

    fn found(&self, row: usize) -> Option<Result<TokenId, Stuck>> {
        match self.found[row] {
            Draw::UNDECIDED => None,
            TokenId::MAX => Some(Err(Stuck::NoLogits)),
            token => Some(Ok(token)),
        }
    }

    fn compute_logits(
        &mut self,
        model: &Model,
        rows: Range<usize>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<(), Error> {
        let (count, stride) = (rows.len(), self.sizes.logits);
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        let mut row = 0;
        while row < count {
            // Rows that follow each other come down as one.
            let run = (row..count).take_while(|row| wanted(*row)).count();
            runs.extend((run > 0).then_some(row..row + run));
            row += run + 1;
        }
        let mut logits = std::mem::take(&mut self.logits);
        let into = Mutex::new(bytes_of(&mut logits));
        let outcome = self.each(&|rank| {
            rank.head(&model.decoder, rows.clone())?;
            if rank.slice.rank > 0 {
                return rank.catch_up();
            }
            runs.iter().try_for_each(|run| {
                let (at, bytes) = (run.start * stride * 4, run.len() * stride * 4);
                rank.device.download(rank.buffers.logits.part(at, bytes), &mut lock(&into)[at..at + bytes])
            })
        });
        (self.logits, self.runs) = (logits, runs);
        outcome
    }

    fn logits(&self) -> Logits<'_> {
        Logits { floats: &self.logits, stride: self.sizes.logits }
    }

    fn pool_and_logits(&mut self) -> (&mut Pool, Logits<'_>) {
        (&mut self.pool, Logits { floats: &self.logits, stride: self.sizes.logits })
    }

    fn backing(&mut self, memory: &Arc<KvMemory>) -> Result<Option<Arc<dyn Backing>>, Error> {
        let side = |rank: &mut Mutex<Rank>| {
            let rank = own(rank);
            rank.pages.as_ref().expect("pages are reserved before they are handed off").side(&mut *rank.device)
        };
        let sides = self.ranks.iter_mut().map(side).collect::<Result<_, _>>()?;
        Ok(Some(CardPages::new(memory.clone(), sides)))
    }

    fn expert_bytes(&self) -> (u64, u64) {
        (0, 0)
    }
}
