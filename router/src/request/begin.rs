//! How a choice sets out: it is placed, held against its objective, and submitted.

use super::{Generation, Router};
use crate::{
    admission::Promise,
    attempt::Attempt,
    error::Error,
    fleet::{
        Path, Wanted, Worker,
        leg::{Fetch, LegRole, Pooling, Submission},
    },
    prompt::Prompt,
    recovery::Failure,
};
use placement::{Demand, NoPath};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};

/// Where a choice is.
#[derive(Debug)]
pub(super) struct Placed {
    prefill: Option<Arc<Worker>>,
    decode: Arc<Worker>,
    /// When the first token is expected, where speeds were measured.
    promise: Option<Promise>,
    /// When it went there, as long as nothing has come from there.
    since: Option<Instant>,
}

impl Router {
    /// Predicts in how many milliseconds the first token of a prompt would come if it went now; `None` where nobody has measured that.
    pub(crate) fn predict_ms(&self, prompt: &Prompt) -> Option<f64> {
        let demand = Demand { tokens: prompt.tokens.len() as u32, max_output: 1 };
        let adapter = prompt.adapter.as_ref().map(|adapter| adapter.id.as_str());
        let wanted = Wanted { demand, pages: Some(&prompt.pages), excluded: &[], adapter, desperate: true };
        let path = self.fleet.choose(&wanted, rand::random()).ok()?;
        path.measured.then(|| path.cost.ttft())
    }
}

impl Generation {
    /// Places the choice and submits its legs, again if need be.
    pub(super) async fn begin(&mut self) -> Result<(), Error> {
        loop {
            let path = self.place().await?;
            let promised = self.work.promise.filter(|_| self.attempts == 0);
            if self.attempts == 0 && promised.is_none() {
                self.check_objective(&path)?;
            }
            self.attempts += 1;
            self.last_heard = Instant::now();
            let measured = path.measured.then(|| Promise { ttft_ms: path.cost.ttft(), since: self.last_heard });
            self.note_placed(&path);
            let placed = Placed {
                prefill: path.prefill.as_ref().map(|target| target.worker.clone()),
                decode: path.decode.worker.clone(),
                promise: promised.or(measured),
                since: Some(self.last_heard),
            };
            match self.submit(path) {
                Ok(attempt) => {
                    self.attempt = Some(attempt);
                    self.placed = Some(placed);
                    self.set_alarm();
                    return Ok(());
                }
                Err(failure) => self.prepare_retry(&failure).await?,
            }
        }
    }

    /// Chooses a path: without those that failed if possible, with them if not, and for a request already under way it waits a while
    /// for workers to come back.
    async fn place(&self) -> Result<Path, Error> {
        let fleet = &self.router.fleet;
        let no_path = match self.try_place(&self.excluded, false).or_else(|_| self.try_place(&[], true)) {
            Ok(path) => return Ok(path),
            Err(no_path) => no_path,
        };
        let patience = self.router.config.limits.recovery_timeout();
        if self.attempts > 0 && timeout(patience, fleet.wait_for_path(self.adapter_id())).await.is_ok() {
            return self.try_place(&[], true).map_err(unavailable);
        }
        Err(unavailable(no_path))
    }

    /// `desperate`: workers whose circuit breaker is open will do.
    fn try_place(&self, excluded: &[String], desperate: bool) -> Result<Path, NoPath> {
        let known = self.work.prompt.tokens.len() + self.output.len();
        let demand = Demand { tokens: known as u32, max_output: self.work.stop.max_tokens - self.output_tokens() };
        // What all of a prompt is needed for is computed whole, whatever is cached of it.
        let whole = self.wanted_prompt().is_some() || self.work.pooling == Some(Pooling::Mean);
        let pages = (!whole).then_some(&self.work.prompt.pages);
        let wanted = Wanted { demand, pages, excluded, adapter: self.adapter_id(), desperate };
        let path = self.router.fleet.place(&wanted, rand::random())?;
        Ok(if self.work.pooling.is_some() { path.without_handoff() } else { path })
    }

    /// Turns the request away if it could not meet its objective.
    fn check_objective(&self, path: &Path) -> Result<(), Error> {
        let origin = &self.work.origin;
        let Some(wanted) = origin.objective.filter(|_| path.measured) else { return Ok(()) };
        let idle = path.cost.queue + path.cost.room <= 0.0;
        let checked = self.router.admission.check_objective((origin.arrived.elapsed(), wanted), path.cost.ttft(), idle);
        checked.inspect_err(|error| self.router.why.refused(&origin.request, error))
    }

    fn note_placed(&self, path: &Path) {
        let origin = &self.work.origin;
        self.router.metrics.placed(path.prefill.is_some());
        self.router.why.placed(&origin.request, self.work.choice, self.last_heard - origin.arrived, path);
        tracing::debug!(
            parent: &origin.span,
            request = %origin.request,
            attempt = self.attempts,
            prefill = path.prefill.as_ref().map_or("-", |target| &target.worker.id),
            decode = %path.decode.worker.id,
            ttft_ms = path.cost.ttft(),
            cost_ms = path.cost.total(),
            "placed"
        );
    }

    /// Tokens came: the first one proves whoever computed the prompt, the next whoever decodes.
    pub(super) fn note_success(&mut self, now: Instant) {
        let Some(placed) = &mut self.placed else { return };
        let fleet = &self.router.fleet;
        if let Some(since) = placed.since.take() {
            let after = now - since;
            fleet.succeeded(placed.prefill.as_ref().unwrap_or(&placed.decode));
            self.router.why.spoke(&self.work.origin.request, self.work.choice, after);
            if let Some(promise) = placed.promise {
                self.router.admission.learn(promise);
            }
        }
        if self.attempt.as_ref().is_some_and(Attempt::has_decoded) {
            if placed.prefill.is_some() {
                fleet.succeeded(&placed.decode);
            }
            self.placed = None;
        }
    }

    fn submit(&self, path: Path) -> Result<Attempt, Failure> {
        let work = &self.work;
        let submission = Submission {
            attempt: 0,
            request: work.origin.request.clone(),
            traceparent: work.origin.traceparent.clone(),
            tokens: proto::pack(&[&work.prompt.tokens, &self.output]),
            prompt_tokens: self.prompt_tokens(),
            salt: work.prompt.salt.clone(),
            adapter: work.prompt.adapter.clone(),
            fetch: self.borrowed(),
            keep: work.transfer.as_ref().map_or(Duration::ZERO, |transfer| transfer.keep()),
            sampling: work.sampling.clone(),
            grammar: work.grammar.clone(),
            choice: work.choice,
            stop: work.stop.clone(),
            prompt_logprobs: self.wanted_prompt(),
            priority: work.priority,
            deadline: self.ends_at().saturating_duration_since(Instant::now()),
            role: work.pooling.map_or(LegRole::Local, LegRole::Embed),
        };
        let buffer = self.router.config.limits.stream_buffer_tokens;
        Attempt::start(&self.router.fleet, path, &submission, self.output_tokens(), rand::random(), buffer)
    }

    /// Returns what a client's proxy says to fetch from a peer. A prompt that is reported is computed whole.
    fn borrowed(&self) -> Option<Fetch> {
        let transfer = self.work.transfer.as_ref().filter(|_| self.wanted_prompt().is_none())?;
        transfer.fetch(&self.router, self.prompt_tokens())
    }

    fn adapter_id(&self) -> Option<&str> {
        self.work.prompt.adapter.as_ref().map(|adapter| adapter.id.as_str())
    }

    /// Returns how many alternatives are to be reported beside the prompt's tokens, as long as they have not been.
    pub(super) fn wanted_prompt(&self) -> Option<u32> {
        self.work.prompt_logprobs.filter(|_| self.output.is_empty())
    }
}

fn unavailable(no_path: NoPath) -> Error {
    Error::Unavailable { message: no_path.to_string(), retry_after: Duration::from_secs(1) }
}
