//! Speculation: guessing the next tokens of a sequence cheaply and verifying all guesses in one step.
//!
//! A [`Speculator`] stands beside a [`Scheduler`]. Before each step it adds drafts to the sequences that decode
//! ([`Speculator::propose`]), and after it learns how many were right and what that cost ([`Speculator::observe`]). Where
//! drafts come from is the [`ngram`] index or a [`draft`] model; how many are worth it is the [`policy`]'s decision.
//!
//! Drafts never change what is emitted. Each token is drawn from the target's own distribution by the counter of its index, as
//! without speculation, and a draft is right if it is that token. So a sequence's tokens are the same with any draft, any
//! number of them and any batch, also when another worker goes on with it after a failure – which rejection sampling
//! (arXiv 2211.17192) cannot promise, because there the drafts take part in the draw. For drafts without randomness both accept
//! with the same probability. A draft model draws by the same counters as the target: tokens race, each with an exponential time
//! from its own counter over its probability, so that two distributions that are alike mostly have the same winner. The rate
//! is at least (1 - d) / (1 + d) where rejection has 1 - d, d being the distance of the distributions (arXiv 2408.07978).

mod draft;
mod ngram;
mod policy;

use crate::{
    Engine, Error,
    scheduler::{Computed, Scheduler, SequenceId},
};
use draft::{DraftModel, Wanted};
use ngram::Ngrams;
use policy::{Offer, Policy};
use std::time::{Duration, Instant};

/// Most drafts of a sequence in one step, whatever is asked for.
pub const MAX_DRAFTS: usize = 16;

/// Guesses tokens, for the sequences of one scheduler.
#[derive(Debug)]
pub struct Speculator {
    proposer: Proposer,
    policy: Policy,
    most: usize,
}

#[derive(Debug)]
enum Proposer {
    Ngrams(Ngrams),
    Draft(Box<DraftModel>),
    /// The draft model could not be computed.
    Broken,
}

impl Speculator {
    /// Guesses what followed the last tokens where they stood before: at most `most` tokens at a time.
    pub fn ngrams(most: usize) -> Self {
        let most = most.min(MAX_DRAFTS);
        Self { proposer: Proposer::Ngrams(Ngrams::default()), policy: Policy::new(most), most }
    }

    /// Guesses what the model of `draft`, an engine of [`Engine::with_draft`], would say: at most `most` tokens at a time.
    pub fn draft(draft: Engine, most: usize) -> Self {
        let most = most.min(MAX_DRAFTS);
        Self { proposer: Proposer::Draft(Box::new(DraftModel::new(draft))), policy: Policy::new(most), most }
    }

    /// Adds drafts to the sequences of which the next step computes one token, as many as pay. To be called right before
    /// [`Scheduler::schedule`].
    pub fn propose(&mut self, scheduler: &mut Scheduler) {
        scheduler.set_guessing(!matches!(self.proposer, Proposer::Broken));
        self.policy.retain(|id| scheduler.contains(id));
        let drafts = match &mut self.proposer {
            Proposer::Ngrams(ngrams) => {
                ngrams.retain(|id| scheduler.contains(id));
                propose_ngrams(ngrams, &mut self.policy, self.most, scheduler)
            }
            Proposer::Draft(model) => {
                model.retain(|id| scheduler.contains(id));
                match propose_draft(model, &mut self.policy, self.most, scheduler) {
                    Ok(drafts) => drafts,
                    Err(error) => {
                        tracing::error!(%error, "the draft model cannot be computed: no more speculation");
                        self.proposer = Proposer::Broken;
                        return;
                    }
                }
            }
            Proposer::Broken => return,
        };
        for (id, drafts) in drafts {
            scheduler.guess(id, &drafts);
        }
    }

    /// Learns from a step over `tokens` tokens, drafts included, that `took` so long. `prompt_tokens` of them were neither
    /// drafts nor the single next token of a sequence.
    pub fn observe(&mut self, computed: &Computed, tokens: usize, prompt_tokens: usize, took: Duration) {
        for verified in &computed.verified {
            self.policy.verified(verified.id, verified.drafts, verified.accepted);
        }
        if prompt_tokens == 0 && computed.faults.is_empty() {
            self.policy.step_took(tokens, took);
        }
    }
}

type Drafts = Vec<(SequenceId, Vec<crate::TokenId>)>;

/// Looking up costs next to nothing: first all guesses, then the choice among them.
fn propose_ngrams(ngrams: &mut Ngrams, policy: &mut Policy, most: usize, scheduler: &Scheduler) -> Drafts {
    let look_up = |decoding: crate::scheduler::Decoding<'_>| {
        (decoding.id, ngrams.propose(decoding.id, decoding.sample.history, most.min(decoding.room)))
    };
    let mut drafts: Drafts = scheduler.decoding().map(look_up).collect();
    let offers: Vec<Offer> = drafts.iter().map(|(id, drafts)| Offer { id: *id, most: drafts.len() }).collect();
    for ((_, drafts), count) in drafts.iter_mut().zip(policy.choose(&offers)) {
        drafts.truncate(count);
    }
    drafts
}

/// Computing costs: first the choice, then the guesses.
fn propose_draft(
    model: &mut DraftModel,
    policy: &mut Policy,
    most: usize,
    scheduler: &Scheduler,
) -> Result<Drafts, Error> {
    let decoding: Vec<_> = scheduler.decoding().collect();
    let offer = |decoding: &crate::scheduler::Decoding<'_>| Offer {
        id: decoding.id,
        most: most.min(decoding.room).min(model.room(decoding.sample.history.len())),
    };
    let offers: Vec<Offer> = decoding.iter().map(offer).collect();
    let counts = policy.choose(&offers);
    let wanted = decoding.iter().zip(counts).filter(|(_, count)| *count > 0);
    let wanted: Vec<Wanted<'_>> =
        wanted.map(|(decoding, count)| Wanted { id: decoding.id, sample: decoding.sample, count }).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let started = Instant::now();
    let round = model.propose(&wanted)?;
    // A prompt that the draft model has yet to read says nothing about what a draft costs.
    if round.caught_up {
        policy.drafting_took(round.depth, started.elapsed());
    }
    Ok(wanted.iter().map(|wanted| wanted.id).zip(round.drafts).collect())
}

#[cfg(test)]
mod tests;
