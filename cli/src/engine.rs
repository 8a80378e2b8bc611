//! The engines of workers: which kind, and made.

use crate::{
    model::Located,
    settings::{EngineChoice, Quantize, Speculate, Transport},
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

    /// Checks, before weights are loaded, that the device runs what is asked of it.
    ///
    /// # Errors
    /// Names what it does not run yet.
    pub(crate) fn check(
        &self,
        located: &Located,
        quantize: Option<Quantize>,
        guesses: Speculate,
        config: &Config,
    ) -> anyhow::Result<()> {
        let Self::Device(device) = self else { return Ok(()) };
        if guesses == Speculate::Draft && *device != Device::Cpu {
            bail!("--engine {device}: --speculate draft does not go with a card yet");
        }
        engine::check_device(&located.path, quantize.map(Into::into), config)
            .with_context(|| format!("--engine {device}"))
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
        match self {
            Self::Device(Device::Cpu) => {
                Engine::new(model, config).context("reserve memory for a worker (--kv-memory)")
            }
            Self::Device(_) => Engine::new(model, config).context("start a worker on a card (--engine)"),
            Self::Timed(profile) => Engine::timed(model, config, profile).context("make a timed engine (--engine)"),
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
