//! One planned step, carried out.

use super::{Chunk, Drawn, Embedded, Ended, Plan, Reported, Scheduler, SequenceId, Verified};
use crate::{Error, Row, Step, Yield, reuse::reuse};
use std::time::Duration;
use timing::Work;

/// What a step came to.
#[derive(Debug, Default)]
pub struct Computed {
    /// The tokens drawn, those of one sequence in order.
    pub drawn: Vec<Drawn>,
    /// Log-probabilities of prompts, as far as this step computed them.
    pub reported: Vec<Reported>,
    /// The embeddings that it finished.
    pub embedded: Vec<Embedded>,
    /// What became of drafts.
    pub verified: Vec<Verified>,
    /// The sequences that the step could not go on with; they are gone.
    pub faults: Vec<Fault>,
    /// What broke the engine for good, where something has: no step after this one can be computed.
    pub broken: Option<String>,
    /// The step that all this is of; none where it is under way.
    pub stepped: Option<Stepped>,
}

/// A step that is over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// How much there was to compute, drafts aside.
    pub work: Work,
    /// Tokens that it computed.
    pub tokens: usize,
    /// Those of them that were neither the single next token of a sequence nor drafts after it.
    pub prompt_tokens: usize,
    /// Those that were drafts.
    pub draft_tokens: usize,
    /// From when its plan was begun, or the step before it ended, to its end.
    pub took: Duration,
}

/// A sequence that a step ended.
#[derive(Debug)]
pub struct Fault {
    /// Whose.
    pub id: SequenceId,
    /// What the engine said.
    pub error: String,
    /// Whether it would go the same way on any worker.
    pub hopeless: bool,
    /// What is left of it.
    pub ended: Ended,
}

/// How far a step came.
enum Stage<'a> {
    Done(&'a mut [Yield]),
    Begun,
    /// It is to be planned again when nothing is under way.
    Waits,
}

impl Scheduler {
    /// Carries out `plan` on `engine` and completes it, or begins it and completes the one that was under way. `on_layer` is told the chunks being
    /// computed with each layer that is final; `clock` is read when a step is over. A plan that is empty, or has to wait, is abandoned, and what was under way completed.
    ///
    /// What grammars allow is worked out on their own threads while the engine computes.
    ///
    /// A row that cannot be computed ends its own sequence and no other: the engine refuses such a step whole, so the rows are
    /// then tried one by one, which gives the same bits. Any other error ends every sequence of the step.
    pub fn compute(
        &mut self,
        plan: Plan,
        engine: &mut dyn Step,
        on_layer: &mut dyn FnMut(&[Chunk], u32),
        clock: &dyn Fn() -> Duration,
    ) -> Computed {
        if plan.is_empty() {
            self.abandon(plan);
            return self.end(engine, clock);
        }
        for chunk in plan.chunks.iter().filter(|chunk| chunk.sample) {
            self.running[&chunk.id].prepare(chunk);
        }
        let mut rows: Vec<Row<'_>> = reuse(std::mem::take(&mut self.spare_rows));
        rows.extend(self.rows(&plan));
        let result = self.start(&plan, &rows, engine, on_layer);
        self.spare_rows = reuse(rows);
        match result {
            Ok(Stage::Done(yields)) => self.complete(plan, yields, clock()),
            Ok(Stage::Begun) => {
                for (row, chunk) in plan.chunks.iter().enumerate() {
                    self.running.get_mut(&chunk.id).expect("what is planned runs").ahead = Some(row);
                }
                self.stepping = false;
                match self.under_way.replace(plan) {
                    Some(before) => self.take_end(before, engine, clock),
                    None => Computed::default(),
                }
            }
            Ok(Stage::Waits) => {
                self.abandon(plan);
                self.end(engine, clock)
            }
            Err(Error::Row(_)) if plan.chunks.len() > 1 => {
                let mut computed = Computed::default();
                let in_step = std::mem::replace(&mut self.in_step, true);
                for single in self.split(plan) {
                    self.stepping = true;
                    let part = self.compute(single, engine, on_layer, clock);
                    computed.drawn.extend(part.drawn);
                    computed.reported.extend(part.reported);
                    computed.embedded.extend(part.embedded);
                    computed.verified.extend(part.verified);
                    computed.faults.extend(part.faults);
                    computed.broken = computed.broken.or(part.broken);
                }
                self.in_step = in_step;
                computed
            }
            Err(error) => self.fail(plan, &error, clock()),
        }
    }

    /// Begins the step of `rows`, or does all of it where it cannot be left under way and nothing else is.
    fn start<'a>(
        &self,
        plan: &Plan,
        rows: &[Row<'_>],
        engine: &'a mut dyn Step,
        on_layer: &mut dyn FnMut(&[Chunk], u32),
    ) -> Result<Stage<'a>, Error> {
        let undecided = plan.chunks.iter().any(|chunk| self.running[&chunk.id].undecided);
        if !self.in_step && !undecided && engine.begin(rows)? {
            return Ok(Stage::Begun);
        }
        match self.under_way {
            Some(_) => Ok(Stage::Waits),
            None => engine.step(rows, &mut |layer| on_layer(&plan.chunks, layer)).map(Stage::Done),
        }
    }

    /// Ends the step under way, if there is one.
    fn end(&mut self, engine: &mut dyn Step, clock: &dyn Fn() -> Duration) -> Computed {
        match self.under_way.take() {
            Some(plan) => self.take_end(plan, engine, clock),
            None => Computed::default(),
        }
    }

    /// Ends the step of `plan`, the first of those that were begun.
    fn take_end(&mut self, plan: Plan, engine: &mut dyn Step, clock: &dyn Fn() -> Duration) -> Computed {
        if self.under_way.is_none() {
            // Nobody is ahead of what is known any more.
            for chunk in &plan.chunks {
                self.running.get_mut(&chunk.id).iter_mut().for_each(|sequence| sequence.ahead = None);
            }
        }
        match engine.end() {
            Ok(yields) => self.take(plan, yields, clock()),
            Err(error) => self.fail(plan, &error, clock()),
        }
    }

    /// Measures the step of `plan`, which ends now.
    pub(super) fn stepped(&mut self, plan: &Plan, now: Duration) -> Stepped {
        let before = std::mem::replace(&mut self.last_end, now);
        Stepped {
            work: plan.work(),
            tokens: plan.tokens,
            prompt_tokens: plan.prompt_tokens(),
            draft_tokens: plan.draft_tokens(),
            took: now.saturating_sub(plan.began.max(before)),
        }
    }

    fn split(&mut self, plan: Plan) -> Vec<Plan> {
        let single = |&chunk| {
            let mut single = Plan::default();
            single.push(chunk);
            single
        };
        let singles = plan.chunks.iter().map(single).collect();
        self.abandon(plan);
        singles
    }

    /// Ends every sequence of the step of `plan`, and of one that is under way.
    fn fail(&mut self, plan: Plan, error: &Error, now: Duration) -> Computed {
        let others = self.under_way.take();
        let plans = [&plan].into_iter().chain(&others);
        let ids: Vec<SequenceId> = plans.flat_map(|plan| &plan.chunks).map(|chunk| chunk.id).collect();
        self.abandon(plan);
        let fault =
            |id| self.cancel(id, now).map(|ended| Fault { id, error: error.to_string(), hopeless: false, ended });
        let faults = ids.into_iter().filter_map(fault).collect();
        // A card that refuses a step refuses all that come: what it was told before is lost with it.
        let broken = matches!(error, Error::Card { .. }).then(|| error.to_string());
        Computed { faults, broken, ..Computed::default() }
    }
}
