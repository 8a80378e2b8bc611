//! The engines of workers: which kind, and made.

use crate::{
    model::Located,
    settings::{EngineChoice, Quantize, Transport},
};
use anyhow::{Context, bail};
use engine::{Config, Device, Engine, Model};
use std::sync::Arc;
use timing::Profile;

/// What computes, ready to be made.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// This machine's processor, or a card.
    Device(Device),
    /// Nothing: steps take as long as the profile says.
    Timed(Box<Profile>),
}

impl Kind {
    /// Reads what `choice` names.
    ///
    /// # Errors
    /// Names the profile and the field that is wrong.
    pub(crate) fn read(choice: &EngineChoice) -> anyhow::Result<Self> {
        Ok(match choice {
            EngineChoice::Device(device) => Self::Device(*device),
            EngineChoice::Timed(path) => Self::Timed(Box::new(Profile::read(path).context("--engine")?)),
        })
    }

    /// Checks, before weights are loaded, that the device runs the model `located`, and the one that drafts for it.
    ///
    /// # Errors
    /// Names what it does not run yet.
    pub(crate) fn check(
        &self,
        located: &Located,
        quantize: Option<Quantize>,
        draft: Option<&Located>,
        config: &Config,
    ) -> anyhow::Result<()> {
        let Self::Device(device) = self else { return Ok(()) };
        engine::check_device(&located.path, quantize.map(Into::into), config)
            .with_context(|| format!("--engine {device}"))?;
        let Some(draft) = draft else { return Ok(()) };
        // Several cards share the model alone.
        let config = Config { kv_dtype: None, tensor_parallel: 1, ..config.clone() };
        engine::check_device(&draft.path, None, &config).with_context(|| format!("--engine {device}: --draft-model"))
    }

    /// Checks likewise that pages can go the way that is asked for.
    ///
    /// # Errors
    /// Says which engine could.
    pub(crate) fn check_transport(&self, asked: Option<Transport>) -> anyhow::Result<()> {
        match (asked, self) {
            (Some(Transport::Cuda), Self::Device(Device::Cpu) | Self::Timed(_)) => {
                bail!("--transport cuda: pages of this engine are on no card; --engine cuda has them there")
            }
            _ => Ok(()),
        }
    }

    /// Makes an engine for `model`.
    pub(crate) fn engine(&self, model: Arc<Model>, config: &Config) -> anyhow::Result<Engine> {
        let engine = match self {
            Self::Device(_) => Engine::new(model, config),
            Self::Timed(profile) => Engine::timed(model, config, profile),
        };
        engine.context(self.making())
    }

    /// Makes an engine for `model`, and one for the model that drafts for it.
    pub(crate) fn engine_with_draft(
        &self,
        model: Arc<Model>,
        draft: Arc<Model>,
        config: &Config,
    ) -> anyhow::Result<(Engine, Engine)> {
        match self {
            Self::Device(_) => Engine::with_draft(model, draft, config).context(self.making()),
            Self::Timed(_) => {
                let engine = self.engine(model, config)?;
                let draft = engine.draft(draft).context("--draft-model")?;
                Ok((engine, draft))
            }
        }
    }

    /// Says what is tried when an engine is made, and what to change where that fails.
    fn making(&self) -> &'static str {
        match self {
            Self::Device(Device::Cpu) => "reserve memory for a worker (--kv-memory)",
            Self::Device(Device::Cuda(_)) => "start a worker on a card (--engine)",
            Self::Timed(_) => "make a timed engine (--engine)",
        }
    }

    /// Says what computes on `threads` threads.
    pub(crate) fn describe(&self, threads: usize) -> String {
        match self {
            Self::Device(Device::Cuda(card)) => format!("on card {card}"),
            Self::Device(Device::Cpu) => format!("{threads} {} each", if threads == 1 { "thread" } else { "threads" }),
            Self::Timed(profile) => format!("computing nothing, timed as {} on {}", profile.model, profile.machine),
        }
    }
}
