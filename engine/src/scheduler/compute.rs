//! One planned step, carried out.

use super::{Chunk, Drawn, Embedded, Ended, Plan, Reported, Scheduler, SequenceId, Verified};
use crate::{Error, Row, Step, reuse::reuse};
use std::time::Duration;

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

impl Scheduler {
    /// Carries out `plan` on `engine` and completes it. `on_layer` is told the chunks being computed with each layer that is
    /// final; `clock` is read when the step is over.
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
        let mut computed = Computed::default();
        for chunk in plan.chunks.iter().filter(|chunk| chunk.sample) {
            self.running[&chunk.id].prepare(chunk);
        }
        let mut rows: Vec<Row<'_>> = reuse(std::mem::take(&mut self.spare_rows));
        rows.extend(self.rows(&plan));
        let imported = if self.landed.is_empty() { Ok(()) } else { engine.import(&self.landed) };
        let result = imported.and_then(|()| engine.step(&rows, &mut |layer| on_layer(&plan.chunks, layer)));
        self.spare_rows = reuse(rows);
        self.landed.clear();
        match result {
            Ok(yields) => computed = self.complete(plan, yields, clock()),
            Err(Error::Row(_)) if plan.chunks.len() > 1 => {
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
            }
            Err(error) => {
                // A card that refuses a step refuses all that come: what it was told before is lost with it.
                computed.broken = matches!(error, Error::Card { .. }).then(|| error.to_string());
                computed.faults = self.fail(plan, &error, clock());
            }
        }
        computed
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

    fn fail(&mut self, plan: Plan, error: &Error, now: Duration) -> Vec<Fault> {
        let ids: Vec<SequenceId> = plan.chunks.iter().map(|chunk| chunk.id).collect();
        self.abandon(plan);
        let fault =
            |id| self.cancel(id, now).map(|ended| Fault { id, error: error.to_string(), hopeless: false, ended });
        ids.into_iter().filter_map(fault).collect()
    }
}
