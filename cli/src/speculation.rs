//! What guesses tokens on the decode workers: chosen, loaded, and made for each engine.

use crate::{
    engine::Kind,
    model::{self, Located},
    settings::{Speculate, Speculation},
};
use anyhow::{Context, bail, ensure};
use engine::{
    Config, Engine, Model,
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

/// Returns the model that `choice` has draft for the model `located`, if it asks for one.
///
/// # Errors
/// Names the flag that makes no sense.
pub(crate) fn locate(choice: &Speculation, located: &Located) -> anyhow::Result<Option<Located>> {
    let most = choice.max_drafts;
    ensure!(most <= MAX_DRAFTS, "--max-drafts {most}: at most {MAX_DRAFTS}");
    if choice.speculate != Speculate::Draft && choice.draft_model.is_some() {
        bail!("--draft-model: only used with --speculate draft");
    }
    let draft = (choice.speculate == Speculate::Draft).then_some(choice.draft_model.as_deref());
    draft.map(|named| model::locate_draft(named, located)).transpose()
}

/// Loads what `choice` asks for to guess tokens: the model `draft`, where it is one.
///
/// # Errors
/// Says what is wrong with the draft model.
pub(crate) async fn load(choice: &Speculation, draft: Option<&Located>) -> anyhow::Result<Guesser> {
    let most = choice.max_drafts;
    if let Some(draft) = draft {
        return Ok(Guesser::Draft { model: model::load(draft, None).await.context("--draft-model")?, most });
    }
    Ok(match choice.speculate {
        Speculate::Ngram => Guesser::Ngrams { most },
        Speculate::Off | Speculate::Draft => Guesser::Nothing,
    })
}

impl Guesser {
    /// Makes an engine of `kind` for `model`, and what guesses for its sequences.
    pub(crate) fn engine(
        &self,
        kind: &Kind,
        model: Arc<Model>,
        config: &Config,
    ) -> anyhow::Result<(Engine, Option<Speculator>)> {
        Ok(match self {
            Self::Nothing => (kind.engine(model, config)?, None),
            Self::Ngrams { most } => (kind.engine(model, config)?, Some(Speculator::ngrams(*most))),
            Self::Draft { model: draft, most } => {
                let (engine, draft) = kind.engine_with_draft(model, draft.clone(), config)?;
                (engine, Some(Speculator::draft(draft, *most)))
            }
        })
    }
}
