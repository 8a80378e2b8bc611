//! The step thread: it owns the engine, the scheduler and every leg, and is the only one that decides.
//!
//! A leg is either on its way from a prefill worker, and then the [`reservation`](crate::reservation)s know where, or a sequence in the
//! scheduler: landed, or computed here from its prompt on (a local leg, an embed leg). Before each step the speculator, if there is one, guesses
//! tokens, and after it the routers get what was drawn.

use crate::reservation::{self, Action, Awaited, Reservations};
use attach::{
    Borrowing, Command, End, Input, Keep, Leg, LegId, Legs, Load, Meters, Parts, Prefixes, Routers, Stepper, StreamId,
    Submission,
};
use engine::{
    scheduler::{Drawn, Embedded, Ended, Fault, Finish, Plan, Request, SequenceId, Stepped, Usage},
    speculation::Speculator,
};
use kv_cache::CacheDelta;
use kv_transfer::{Event, HandoffId};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};
use tracing::Span;

/// The step thread's state.
#[derive(Debug)]
pub(crate) struct Runner {
    parts: Parts,
    /// Moment from which the scheduler's time counts.
    epoch: Instant,
    speculator: Option<Speculator>,
    legs: Legs<Part>,
    sequences: HashMap<SequenceId, LegId>,
    reservations: Reservations,
    prefixes: Prefixes,
    routers: Routers,
    meters: Meters,
}

/// A live leg.
#[derive(Debug)]
struct Part {
    at: At,
    span: Span,
}

/// Where a live leg is.
#[derive(Clone, Copy, Debug)]
enum At {
    /// On its way from another worker.
    Reserved(HandoffId),
    /// In the scheduler.
    Sequence(SequenceId),
}

impl Stepper for Runner {
    fn run(&mut self) -> Result<(), String> {
        loop {
            self.parts.inbox.take().into_iter().for_each(|input| self.react(input));
            self.expire();
            if self.finished() {
                self.flush();
                self.routers.finish();
                return Ok(());
            }
            self.reservations.open(&mut self.parts.scheduler);
            self.act();
            let began = self.now();
            if let Some(speculator) = &mut self.speculator {
                speculator.propose(&mut self.parts.scheduler);
            }
            let plan = self.parts.scheduler.schedule(began);
            self.meters.preempted(plan.preempted().len());
            if !plan.is_empty() || self.parts.scheduler.is_under_way() {
                self.step(plan)?;
                self.flush();
                self.parts.health.progressed(false);
            } else if plan.preempted().is_empty() {
                self.flush();
                self.parts.health.progressed(true);
                self.wait();
                self.parts.health.work_began();
            }
        }
    }

    fn fail(&mut self, problem: &str) {
        self.parts.health.not_ready(&format!("the step thread ended: {problem}"));
        for id in self.legs.ids() {
            self.routers.ended(id, End::Failed(format!("the worker's step thread ended: {problem}")), Usage::default());
        }
        let load = *self.parts.load.borrow();
        self.routers.flush(Instant::now(), CacheDelta::default(), self.parts.scheduler.pool(), &load);
        self.routers.finish();
    }
}

impl Runner {
    pub(crate) fn new(parts: Parts, reservations: reservation::Limits, speculator: Option<Speculator>) -> Self {
        Self {
            epoch: Instant::now(),
            speculator,
            legs: Legs::default(),
            sequences: HashMap::new(),
            reservations: Reservations::new(reservations),
            prefixes: Prefixes::new(&parts),
            routers: Routers::default(),
            meters: Meters::new(&parts),
            parts,
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self) {
        let deadlines = [self.legs.next_deadline(), self.reservations.next_deadline()];
        let deadline = deadlines.into_iter().flatten().min().map(|deadline| self.epoch + deadline);
        let until = [deadline, self.routers.load_due(), self.prefixes.next_deadline()].into_iter().flatten().min();
        if let Some(input) = self.parts.inbox.wait(until) {
            self.react(input);
        }
    }

    fn react(&mut self, input: Input<Event>) {
        match input {
            Input::Command(command) => self.command(command),
            Input::Event(event) => self.event(event),
        }
    }

    /// Says whether the thread is to end: at once, with whatever is left failing, or because it drains and nothing is left.
    fn finished(&mut self) -> bool {
        if self.parts.inbox.stopped() {
            for id in self.legs.ids() {
                self.end_leg(id, End::Failed("the worker stopped before this was done".into()));
            }
        }
        self.legs.is_empty() && (self.parts.inbox.stopped() || self.draining())
    }

    fn draining(&self) -> bool {
        self.parts.inbox.draining()
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    // ---- what routers ask ----

    fn command(&mut self, command: Command) {
        match command {
            Command::Attached(router) => self.routers.attach(router),
            Command::Submit(submission) => self.submit(*submission),
            Command::Cancel(id) => self.end_leg(id, End::Cancelled),
            Command::Resync(stream) => self.routers.resync(stream),
            Command::Reset(stream, number) => {
                let done = self.parts.scheduler.forget_prefixes();
                self.routers.reset(stream, number, done);
            }
            Command::Detached(stream) => self.detach(stream),
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { id, request, traceparent, received, deadline, sequence, leg, fetch, keep } = submission;
        if self.legs.get(id).is_some() {
            return self.expel(id);
        }
        self.routers.received(id);
        if self.draining() {
            let refusal = End::Refused(format!("{} is draining", self.parts.worker));
            return self.routers.ended(id, refusal, Usage::default());
        }
        let arrived = received.saturating_duration_since(self.epoch);
        let span = tracing::info_span!("decode", request, attempt = id.attempt, worker = self.parts.worker);
        telemetry::set_parent(&span, &traceparent);
        let deadline = deadline.map(|deadline| arrived + deadline);
        match leg {
            Leg::Local | Leg::Embed(_) => self.submit_local(id, sequence, (fetch, keep), arrived, deadline, span),
            Leg::Decode { handoff, worker, .. } => {
                let handoff = HandoffId(handoff);
                let part = Part { at: At::Reserved(handoff), span };
                self.legs.insert(id, part, deadline).expect("it was looked up above");
                let awaited = Awaited { leg: id, source: worker, request: sequence, arrived };
                let now = self.now();
                self.reservations.expect(handoff, awaited, now, &mut self.parts.scheduler);
                self.act();
            }
            Leg::Prefill { .. } => {
                let why = format!("{} is a decode worker and takes no prefill legs", self.parts.worker);
                self.routers.ended(id, End::Invalid(why), Usage::default());
            }
        }
    }

    fn submit_local(
        &mut self,
        id: LegId,
        request: Request,
        (fetch, keep): (Option<Borrowing>, Option<Keep>),
        arrived: Duration,
        deadline: Option<Duration>,
        span: Span,
    ) {
        match self.parts.scheduler.submit(request, arrived) {
            Ok(sequence) => {
                if let Some(keep) = keep {
                    self.prefixes.announce(sequence, keep);
                }
                if let Some(fetch) = fetch {
                    let Parts { scheduler, transfer, .. } = &mut self.parts;
                    self.prefixes.fetch(fetch, sequence, scheduler, transfer);
                }
                self.sequences.insert(sequence, id);
                let part = Part { at: At::Sequence(sequence), span };
                self.legs.insert(id, part, deadline).expect("callers looked it up");
            }
            Err(refusal) => self.routers.ended(id, End::Refused(refusal.to_string()), Usage::default()),
        }
    }

    /// Ends the stream of a router that reuses a live attempt id, with all it submitted: its books and ours differ.
    fn expel(&mut self, id: LegId) {
        self.routers.expel(id.stream, &attach::Duplicate(id).to_string());
        self.detach(id.stream);
    }

    fn detach(&mut self, stream: StreamId) {
        self.routers.detach(stream);
        for id in self.legs.of_stream(stream) {
            self.end_leg(id, End::Cancelled);
        }
    }

    fn expire(&mut self) {
        self.prefixes.expire(&mut self.parts.scheduler);
        let now = self.now();
        for id in self.legs.overdue(now) {
            self.end_leg(id, End::Failed("the leg's deadline passed on the decode worker".into()));
        }
        self.reservations.expire(now);
        self.act();
    }

    // ---- hand-offs ----

    fn event(&mut self, event: Event) {
        let now = self.now();
        let Self { parts: Parts { scheduler, transfer, engine, .. }, .. } = self;
        let event = self.prefixes.take(event, engine, scheduler, transfer);
        for (sequence, why) in self.prefixes.deprived() {
            let id = self.sequences[&sequence];
            self.end_leg(id, End::Refused(why));
        }
        let Some(event) = event else { return };
        let Self { parts: Parts { scheduler, .. }, reservations, .. } = self;
        match event {
            Event::Begun { handoff, from, tokens } => {
                reservations.begun(handoff, from, tokens as usize, now, scheduler);
            }
            Event::Landed { handoff, commit } => reservations.landed(handoff, commit.first_token, scheduler),
            Event::Lost { handoff, reason } => reservations.lost(handoff, reason, scheduler),
            Event::Quiet { handoff } => reservations.quiet(handoff, scheduler),
            Event::Asked { handoff, .. } | Event::SourceDone { handoff, .. } => {
                tracing::warn!(handoff = handoff.0, "news of a hand-off that this worker never began");
            }
        }
        self.act();
    }

    /// Carries out what the reservations decided.
    fn act(&mut self) {
        for action in self.reservations.take_actions() {
            match action {
                Action::Open { handoff, pages, have } => self.parts.transfer.open(handoff, pages, have as u32),
                Action::Refuse { handoff, reason } => self.parts.transfer.refuse(handoff, reason),
                Action::Abort { handoff, reason } => self.parts.transfer.abort(handoff, reason),
                Action::End { leg, end } => self.close_leg(leg, end, Usage::default()),
                Action::Run { leg, sequence } => {
                    self.sequences.insert(sequence, leg);
                    let part = self.legs.get_mut(leg).expect("a landing without its leg has been forgone");
                    part.at = At::Sequence(sequence);
                }
            }
        }
    }

    // ---- a step ----

    /// Carries out `plan`, or begins it, and takes what the step that this ended came to. An error says what broke the engine.
    fn step(&mut self, plan: Plan) -> Result<(), String> {
        let now = self.now();
        let Self { parts: Parts { engine, scheduler, .. }, epoch, meters, .. } = self;
        for &sequence in plan.started() {
            let (usage, tokens) = scheduler.usage_of(sequence, now).expect("a planned sequence is known");
            meters.started(tokens, &usage);
        }
        let started = Instant::now();
        let computed = scheduler.compute(plan, engine, &mut |_, _| {}, &|| epoch.elapsed());
        meters.computed(&computed);
        if let (Some(speculator), Some(Stepped { tokens, prompt_tokens, .. })) =
            (&mut self.speculator, computed.stepped)
        {
            speculator.observe(&computed, tokens, prompt_tokens, started.elapsed());
        }
        for reported in computed.reported {
            self.routers.reported(self.sequences[&reported.id], reported);
        }
        for Embedded { id, vector, ended } in computed.embedded {
            let leg = self.sequences.remove(&id).expect("an embedded sequence has a live leg");
            self.close_leg(leg, End::Embedded(vector), ended.usage);
        }
        computed.drawn.into_iter().for_each(|drawn| self.drawn(drawn));
        computed.faults.into_iter().for_each(|fault| self.fault(fault));
        computed.broken.map_or(Ok(()), Err)
    }

    fn drawn(&mut self, drawn: Drawn) {
        let Drawn { id: sequence, index, sampled, ended } = drawn;
        let id = self.sequences[&sequence];
        self.routers.token(id, index, sampled);
        let Some((finish, Ended { usage, .. })) = ended else { return };
        let end = match finish {
            Finish::Stop(token) => End::Stop(token),
            Finish::Length => End::Length,
            Finish::FirstToken => unreachable!("sequences here go to their end"),
        };
        self.sequences.remove(&sequence);
        self.prefixes.ended(sequence, &mut self.parts.scheduler);
        self.close_leg(id, end, usage);
    }

    fn fault(&mut self, fault: Fault) {
        let id = self.sequences.remove(&fault.id).expect("a faulty sequence has a live leg");
        self.prefixes.cancel(fault.id, &self.parts.transfer);
        let Fault { error, hopeless, ended, .. } = fault;
        tracing::error!(leg = %id, error, "a sequence could not be computed");
        self.close_leg(id, if hopeless { End::Invalid(error) } else { End::Failed(error) }, ended.usage);
    }

    // ---- the end of a leg ----

    /// Ends a leg in whatever state it is. Unknown legs have ended already.
    fn end_leg(&mut self, id: LegId, end: End) {
        let Some(part) = self.legs.get(id) else { return };
        let mut usage = Usage::default();
        match part.at {
            At::Reserved(handoff) => {
                let reason = format!("the decode leg ended: {end:?}");
                self.reservations.cancel(handoff, &reason, &mut self.parts.scheduler);
                self.act();
            }
            At::Sequence(sequence) => {
                self.sequences.remove(&sequence);
                self.prefixes.cancel(sequence, &self.parts.transfer);
                if let Some(ended) = self.parts.scheduler.cancel(sequence, self.epoch.elapsed()) {
                    usage = ended.usage;
                }
            }
        }
        self.close_leg(id, end, usage);
    }

    /// Says the last word about a leg of which nothing else is left.
    fn close_leg(&mut self, id: LegId, end: End, usage: Usage) {
        let Some(part) = self.legs.remove(id) else { return };
        tracing::debug!(parent: &part.span, leg = %id, ?end, ?usage, "leg ended");
        self.routers.ended(id, end, usage);
    }

    // ---- what is reported ----

    fn flush(&mut self) {
        let load = Load {
            handoffs: self.reservations.in_flight(),
            draining: self.draining(),
            ..self.meters.load(&self.parts.scheduler, self.legs.len())
        };
        let delta = self.parts.scheduler.take_delta();
        self.routers.flush(Instant::now(), delta, self.parts.scheduler.pool(), &load);
        self.parts.load.send_replace(load);
    }
}

#[cfg(test)]
mod tests;
