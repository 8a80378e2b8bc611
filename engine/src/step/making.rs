//! How an engine is made: which home it gets, how large its pages are, and what they are called.

use super::{Engine, limits::Limits};
use crate::{
    Config, Device, Error, KvMemory, Model, Quantize,
    cpu::{Cpu, kernels::Kernels},
    home::Home,
    model::checkpoint::ElementType,
    sampling::Scratch,
    timed::{self, Timed},
};
use kv_cache::{KvDtype, PageLayout};
use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex},
};
use timing::Profile;

/// Bytes for pages when nobody says, on the processor.
const KV_BYTES: u64 = 512 << 20;

impl Engine {
    /// Reserves pages and buffers for `model` on the device that `config` names, and starts its threads.
    ///
    /// # Errors
    /// [`Error::Setting`] names the field of `config` that does not fit, [`Error::System`] what the machine refused, [`Error::Card`] what is
    /// wrong with the card.
    pub fn new(model: Arc<Model>, config: &Config) -> Result<Self, Error> {
        match config.device {
            Device::Cpu => {
                check_one(config)?;
                Self::with_kernels(model, config, Kernels::detect())
            }
            Device::Cuda(card) => Self::on_card(model, config, card),
        }
    }

    /// Makes an engine for `model`, and beside it one for `draft`, which is to guess for it ([`Speculator::draft`](crate::speculation::Speculator::draft)): its pages
    /// hold as many tokens, and all else is as `config` says. On a card both take what they need of the one share; where several cards share `model`, `draft` is on the
    /// first alone.
    ///
    /// # Errors
    /// As [`Engine::new`], and [`Error::Setting`] when the two vocabularies differ in size.
    pub fn with_draft(model: Arc<Model>, draft: Arc<Model>, config: &Config) -> Result<(Self, Self), Error> {
        match config.device {
            Device::Cpu => {
                check_draft(&model, &draft)?;
                let engine = Self::new(model, config)?;
                let draft = engine.draft(draft)?;
                Ok((engine, draft))
            }
            Device::Cuda(card) => Self::on_card_with_draft(model, draft, config, card),
        }
    }

    /// Makes an engine on the processor for `draft`, as [`Engine::with_draft`] does, beside this one.
    ///
    /// # Errors
    /// As [`Engine::with_draft`].
    pub fn draft(&self, draft: Arc<Model>) -> Result<Self, Error> {
        let config = Config { device: Device::Cpu, ..draft_config(&self.model, &draft, &self.config)? };
        let page_bytes = any_layout(&draft, &config)?.page_bytes() as u64;
        let kv_bytes = Some(page_bytes * u64::from(self.memory.layout().pages));
        let max_model_len = Some(draft_len(self, &draft));
        Self::new(draft, &Config { kv_bytes, max_model_len, ..config })
    }

    /// Makes an engine that computes nothing: its steps take as long as `profile` says, its tokens are made up from those before
    /// them, and its pages, as many as the profile has room for, hold next to nothing. `model` lends its vocabulary, its number of
    /// layers and the tokens that end a sequence; `kv_bytes`, `threads` and `device` mean nothing, and `max_model_len` may be more than the
    /// checkpoint was made for.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn timed(model: Arc<Model>, config: &Config, profile: &Profile) -> Result<Self, Error> {
        let config = Config { threads: Some(1), ..config.clone() };
        check_page_tokens(&config)?;
        let layout = timed::page_layout(profile, &config, model.decoder.layers() as u32);
        let timed = Timed::new(profile, &model.info().eos, model.decoder.vocab_size);
        Self::on_processor(model, &config, Kernels::detect(), layout, Some(timed))
    }

    pub(crate) fn with_kernels(model: Arc<Model>, config: &Config, kernels: &'static Kernels) -> Result<Self, Error> {
        let layout = page_layout(&model, config)?;
        Self::on_processor(model, config, kernels, layout, None)
    }

    fn on_processor(
        model: Arc<Model>,
        config: &Config,
        kernels: &'static Kernels,
        layout: PageLayout,
        timed: Option<Timed>,
    ) -> Result<Self, Error> {
        let limits = Limits::new(&model, config, &layout, timed.is_some())?;
        let (tokens, logits, context) = (limits.token_budget, limits.logits_rows(), context(&model, config));
        let format = kernels.format(model.weights().packed());
        let home = Cpu::new(kernels, &model.decoder, format, threads(config)?, tokens, logits, context)?;
        let fingerprint = match timed {
            // Pages that hold nothing are nobody else's.
            Some(_) => derived(&format!("timed {}", fingerprint(&model, context))),
            None => fingerprint(&model, context),
        };
        Self::build(model, config, limits, layout, fingerprint, Box::new(home), timed)
    }

    #[cfg(not(feature = "cuda"))]
    fn on_card(_: Arc<Model>, _: &Config, card: usize) -> Result<Self, Error> {
        Err(without_cards(card))
    }

    #[cfg(feature = "cuda")]
    fn on_card(model: Arc<Model>, config: &Config, card: usize) -> Result<Self, Error> {
        // What cannot be run is refused before anything is taken.
        crate::cuda::check(&model, config)?;
        let cards = crate::cuda::open(card, config)?;
        Self::on_devices(model, config, cards)
    }

    #[cfg(not(feature = "cuda"))]
    fn on_card_with_draft(_: Arc<Model>, _: Arc<Model>, _: &Config, card: usize) -> Result<(Self, Self), Error> {
        Err(without_cards(card))
    }

    #[cfg(feature = "cuda")]
    fn on_card_with_draft(
        model: Arc<Model>,
        draft: Arc<Model>,
        config: &Config,
        card: usize,
    ) -> Result<(Self, Self), Error> {
        let own = draft_config(&model, &draft, config)?;
        crate::cuda::check(&model, config)?;
        crate::cuda::check(&draft, &own)?;
        let (cards, first) = (crate::cuda::open(card, config)?, crate::cuda::open(card, &own)?);
        Self::on_devices_with_draft((model, cards), (draft, first), config)
    }

    /// Makes an engine on cards that share the model, or on what stands in for them.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn on_devices(
        model: Arc<Model>,
        config: &Config,
        devices: Vec<Box<dyn crate::cuda::Device>>,
    ) -> Result<Self, Error> {
        let mut made = Unpaged::new(model, config, devices)?;
        let page_bytes = made.page_bytes()?;
        let kv_bytes = match config.kv_bytes {
            Some(bytes) => bytes,
            None => made.home.room_for_pages(config.gpu_memory_utilization, page_bytes, (0, 0))? * page_bytes,
        };
        made.reserve_pages(kv_bytes, config.max_model_len)
    }

    /// Makes an engine as [`Engine::with_draft`]: the draft model has a device of its own, which is the first of the others, opened once more.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn on_devices_with_draft(
        (model, devices): (Arc<Model>, Vec<Box<dyn crate::cuda::Device>>),
        (draft, first): (Arc<Model>, Vec<Box<dyn crate::cuda::Device>>),
        config: &Config,
    ) -> Result<(Self, Self), Error> {
        let own = draft_config(&model, &draft, config)?;
        let (mut made, mut beside) = (Unpaged::new(model, config, devices)?, Unpaged::new(draft, &own, first)?);
        let (page_bytes, own_page_bytes) = (made.page_bytes()?, beside.page_bytes()?);
        let pages = match config.kv_bytes {
            Some(bytes) => bytes / page_bytes,
            None => {
                let taken = (beside.home.bytes_taken()?, own_page_bytes);
                made.home.room_for_pages(config.gpu_memory_utilization, page_bytes, taken)?
            }
        };
        let engine = made.reserve_pages(pages * page_bytes, config.max_model_len)?;
        let longest = draft_len(&engine, &beside.model);
        let draft = beside.reserve_pages(u64::from(engine.memory.layout().pages) * own_page_bytes, Some(longest))?;
        Ok((engine, draft))
    }

    fn build(
        model: Arc<Model>,
        config: &Config,
        limits: Limits,
        layout: PageLayout,
        fingerprint: String,
        mut home: Box<dyn Home>,
        timed: Option<Timed>,
    ) -> Result<Self, Error> {
        let threads = threads(config)?;
        let memory = Arc::new(KvMemory::new(layout)?);
        let backing = home.backing(&memory)?;
        tracing::info!(
            home = home.name(),
            threads,
            pages = limits.pages,
            kv_dtype = %memory.layout().dtype,
            max_model_len = limits.max_model_len,
            "engine ready"
        );
        Ok(Self {
            config: config.clone(),
            model,
            fingerprint,
            memory,
            home,
            backing,
            timed,
            limits,
            begun: VecDeque::new(),
            tokens: Vec::with_capacity(limits.token_budget),
            spans: Vec::new(),
            kept: Vec::new(),
            places: Vec::new(),
            drawn: Vec::new(),
            yields: Vec::new(),
            scratch: (0..threads).map(|_| Mutex::new(Scratch::new(limits.vocab_size))).collect(),
            written: vec![0; limits.pages],
            steps: 0,
            open: Vec::new(),
            logits_kept: Vec::new(),
            logits_rows: Vec::new(),
        })
    }
}

/// An engine on cards without its pages: how many there is room for is known when everything else has its memory.
#[cfg(any(feature = "cuda", test))]
struct Unpaged {
    model: Arc<Model>,
    config: Config,
    context: usize,
    home: crate::cuda::Cuda,
}

#[cfg(any(feature = "cuda", test))]
impl Unpaged {
    fn new(model: Arc<Model>, config: &Config, devices: Vec<Box<dyn crate::cuda::Device>>) -> Result<Self, Error> {
        crate::cuda::check(&model, config)?;
        let context = context(&model, config);
        let kv_dtype = Some(config.kv_dtype.unwrap_or_else(|| crate::cuda::kv_dtype(&model)));
        let config = Config { kv_dtype, ..config.clone() };
        let most = Limits::new(&model, &config, &any_layout(&model, &config)?, false)?;
        let sizes = crate::cuda::Sizes::new(
            &model,
            &config,
            (most.token_budget, most.max_sequences),
            most.logits_rows(),
            context,
            most.page_tokens,
        );
        let home = crate::cuda::Cuda::new(devices, &model, sizes, threads(&config)?)?;
        Ok(Self { model, config, context, home })
    }

    fn page_bytes(&self) -> Result<u64, Error> {
        Ok(any_layout(&self.model, &self.config)?.page_bytes() as u64)
    }

    /// Makes the engine, with pages of `kv_bytes` bytes and sequences of up to `max_model_len` tokens.
    fn reserve_pages(self, kv_bytes: u64, max_model_len: Option<u32>) -> Result<Engine, Error> {
        let Self { model, config, context, mut home } = self;
        let config = Config { kv_bytes: Some(kv_bytes), max_model_len, ..config };
        let layout = page_layout(&model, &config)?;
        let limits = Limits::new(&model, &config, &layout, false)?;
        home.reserve_pages(&model, &layout)?;
        let fingerprint = match home.rounds() {
            // What weights were rounded to is another model.
            true => derived(&format!("bf16 {}", fingerprint(&model, context))),
            false => fingerprint(&model, context),
        };
        // The cards have the weights: the last engine of the process that is made lets go of those in the host's memory.
        let model = Arc::new(model.without_weights());
        Engine::build(model, &config, limits, layout, fingerprint, Box::new(home), None)
    }
}

/// Returns the settings of a model that guesses for one of `config`, but for what depends on that one's pages.
fn draft_config(model: &Model, draft: &Model, config: &Config) -> Result<Config, Error> {
    check_draft(model, draft)?;
    // A guess that is no number is a wrong guess.
    let config = Config { kv_dtype: None, tensor_parallel: 1, nan_guard: false, ..config.clone() };
    let longest = context(model, &config).min(draft.decoder.max_position);
    Ok(Config { max_model_len: Some(longest as u32), ..config })
}

/// Returns the longest sequence of which `draft` guesses tokens for `engine`.
fn draft_len(engine: &Engine, draft: &Model) -> u32 {
    engine.max_model_len().min(draft.decoder.max_position) as u32
}

fn check_draft(model: &Model, draft: &Model) -> Result<(), Error> {
    let (ours, theirs) = (draft.info().vocab_size, model.info().vocab_size);
    if ours == theirs {
        return Ok(());
    }
    let problem = format!("its vocabulary has {ours} tokens, the model's {theirs}: they must be the same");
    Err(Error::setting("draft_model", problem))
}

/// Returns the shape of a pool of any size.
fn any_layout(model: &Model, config: &Config) -> Result<PageLayout, Error> {
    page_layout(model, &Config { kv_bytes: Some(u64::MAX), ..config.clone() })
}

/// Checks, from a model's description alone, that an engine of `config` could run it, loaded as `quantize` says: whoever asks before the weights
/// are loaded need not wait for them to learn that it cannot.
///
/// # Errors
/// As [`Engine::new`].
pub fn check_device(path: &Path, quantize: Option<Quantize>, config: &Config) -> Result<(), Error> {
    match config.device {
        Device::Cpu => check_one(config),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::cuda::check_path(path, quantize, config),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => {
            let _ = quantize;
            let problem = format!(
                "{} is asked for {}, and this binary was built without the feature `cuda`",
                config.device,
                path.display()
            );
            Err(Error::setting("device", problem))
        }
    }
}

/// Checks that nobody wants of a processor what cards alone have; several of them is one pool of threads.
fn check_one(config: &Config) -> Result<(), Error> {
    if config.nan_guard {
        let problem = "rows are looked at on a card alone, but the engine is cpu: cuda, or false, would be right";
        return Err(Error::setting("nan_guard", problem));
    }
    if !config.exact {
        let problem = "off is for a card, but the engine is cpu, which is exact: cuda, or on, would be right";
        return Err(Error::setting("exact", problem));
    }
    match config.tensor_parallel {
        1 => Ok(()),
        ranks => {
            let problem = format!("{ranks} cards share a model, but the engine is cpu: cuda, or 1, would be right");
            Err(Error::setting("tensor_parallel", problem))
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn without_cards(card: usize) -> Error {
    let problem = format!("cuda:{card} is asked for, and this binary was built without the feature `cuda`");
    Error::setting("device", problem)
}

fn threads(config: &Config) -> Result<usize, Error> {
    match config.threads {
        Some(0) => Err(Error::setting("threads", "0 threads compute nothing")),
        Some(threads) => Ok(threads),
        None => Ok(std::thread::available_parallelism().map_or(1, |threads| threads.get())),
    }
}

/// Returns the longest sequence as far as angles depend on it: not the limit that the pool's size gives, because workers with pools of different
/// sizes exchange pages.
fn context(model: &Model, config: &Config) -> usize {
    config.max_model_len.map_or(model.decoder.max_position, |len| len as usize)
}

/// Names what an engine whose longest context is `context` writes to pages.
fn fingerprint(model: &Model, context: usize) -> String {
    let model_fingerprint = &model.info().fingerprint;
    let turns = |context: usize| -> Vec<_> { model.decoder.ropes.iter().map(|rope| rope.turns(context)).collect() };
    if turns(context) == turns(0) {
        return model_fingerprint.clone();
    }
    derived(&format!("{model_fingerprint} {:?}", turns(context)))
}

fn derived(from: &str) -> String {
    blake3::hash(from.as_bytes()).to_hex()[..32].to_owned()
}

/// Returns the shape of the pool that `config` asks for.
fn page_layout(model: &Model, config: &Config) -> Result<PageLayout, Error> {
    let decoder = &model.decoder;
    check_page_tokens(config)?;
    let dtype = config.kv_dtype.unwrap_or(match model.weights().stored {
        ElementType::F32 => KvDtype::F32,
        ElementType::F16 => KvDtype::F16,
        ElementType::Bf16 => KvDtype::Bf16,
    });
    let mut layout = PageLayout {
        layers: decoder.layers() as u32,
        page_tokens: config.page_tokens,
        kv_heads: decoder.kv_heads as u32,
        key_dim: decoder.head_dim as u32,
        // The value of a latent stands in its key.
        value_dim: if decoder.latent.is_some() { 0 } else { decoder.head_dim as u32 },
        dtype,
        pages: 0,
    };
    let bytes = config.kv_bytes.unwrap_or(KV_BYTES);
    let pages = bytes / layout.page_bytes() as u64;
    if pages == 0 {
        let problem = format!("{bytes} bytes hold no page; one takes {}", layout.page_bytes());
        return Err(Error::setting("kv_bytes", problem));
    }
    layout.pages = pages.min(u64::from(u32::MAX)) as u32;
    Ok(layout)
}

fn check_page_tokens(config: &Config) -> Result<(), Error> {
    match config.page_tokens {
        1..=1024 => Ok(()),
        other => Err(Error::setting("page_tokens", format!("{other} is not between 1 and 1024"))),
    }
}
