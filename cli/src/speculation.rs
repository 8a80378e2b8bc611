//! What guesses tokens on the decode workers: chosen, loaded, and made for each engine.

use crate::{
    model::{self, Located},
    settings::{Speculate, Speculation},
};
use anyhow::{Context, bail, ensure};
use engine::{
    Engine, Model,
    speculation::{MAX_DRAFTS, Speculator},
};
use std::sync::Arc;

/// What guesses, loaded once for all workers of this process.
#[derive(Clone, Debug)]
pub(crate) enum Guesser {
    Nothing,
    Ngrams { most: usize },
    Draft { model: Arc<Model>, most: usize },
}

/// Loads what `choice` asks for to guess the tokens of the model `located`.
///
/// # Errors
/// Names the flag that makes no sense, or what is wrong with the draft model.
pub(crate) async fn load(choice: &Speculation, located: &Located) -> anyhow::Result<Guesser> {
    let most = choice.max_drafts;
    ensure!(most <= MAX_DRAFTS, "--max-drafts {most}: at most {MAX_DRAFTS}");
    if choice.speculate != Speculate::Draft && choice.draft_model.is_some() {
        bail!("--draft-model: only used with --speculate draft");
    }
    Ok(match choice.speculate {
        Speculate::Off => Guesser::Nothing,
        Speculate::Ngram => Guesser::Ngrams { most },
        Speculate::Draft => {
            let draft = model::locate_draft(choice.draft_model.as_deref(), located)?;
            Guesser::Draft { model: model::load(&draft, None).await.context("--draft-model")?, most }
        }
    })
}

impl Guesser {
    /// Makes what guesses for the sequences of `engine`.
    pub(crate) fn speculator(&self, engine: &Engine) -> anyhow::Result<Option<Speculator>> {
        Ok(match self {
            Self::Nothing => None,
            Self::Ngrams { most } => Some(Speculator::ngrams(*most)),
            Self::Draft { model, most } => {
                Some(Speculator::draft(model.clone(), engine, *most).context("--draft-model")?)
            }
        })
    }
}
