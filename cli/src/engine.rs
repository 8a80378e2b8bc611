//! The engines of workers: which kind, and made.

use crate::settings::EngineChoice;
use anyhow::Context;
use engine::{Config, Engine, Model};
use std::sync::Arc;
use timing::Profile;

/// What computes, ready to be made.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// This machine's processor.
    Cpu,
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
            EngineChoice::Cpu => Self::Cpu,
            EngineChoice::Timed(path) => Self::Timed(Box::new(Profile::read(path).context("--engine")?)),
        })
    }

    /// Makes an engine for `model`.
    pub(crate) fn engine(&self, model: Arc<Model>, config: &Config) -> anyhow::Result<Engine> {
        match self {
            Self::Cpu => Engine::new(model, config).context("reserve memory for a worker (--kv-memory)"),
            Self::Timed(profile) => Engine::timed(model, config, profile).context("make a timed engine (--engine)"),
        }
    }

    /// Says what computes on `threads` threads.
    pub(crate) fn describe(&self, threads: usize) -> String {
        match self {
            Self::Cpu => format!("{threads} {} each", if threads == 1 { "thread" } else { "threads" }),
            Self::Timed(profile) => format!("computing nothing, timed as {} on {}", profile.model, profile.machine),
        }
    }
}
