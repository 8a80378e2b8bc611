//! The step thread: it owns the engine, the scheduler and every leg, and is the only one that decides.
//!
//! A leg's life: *in line* until its prompt is part of a step, when the hand-off begins; *computing*, with each layer's whole
//! pages pushed while later layers compute; *committed* once its first token is drawn; over when the hand-off is. Its pages are
//! given back when kv-transfer says that nobody reads them, which may be later than the leg's end (a cancel) but never
//! before.
//!
//! Two kinds of leg have no hand-off: an embed leg is over when its prompt is computed, a local one with its first token. That is all a
//! prefill worker does of those; their pages may be kept for a peer that fetches them.

use attach::{
    Command, End, Input, Leg, LegId, Legs, Load, Meters, Parts, Prefixes, Routers, Stepper, StreamId, Submission,
};
use engine::{
    TokenId,
    scheduler::{Chunk, Computed, Drawn, Embedded, Ended, Fault, Finish, Hold, Plan, Request, SequenceId, Usage},
};
use kv_cache::CacheDelta;
use kv_transfer::{Begin, Commit, Event, HandoffId, Outcome, Peer};
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
    page_tokens: usize,
    layers: u32,
    legs: Legs<Prompt>,
    sequences: HashMap<SequenceId, LegId>,
    handoffs: HashMap<HandoffId, Handoff>,
    prefixes: Prefixes,
    routers: Routers,
    meters: Meters,
}

/// A live leg.
#[derive(Debug)]
struct Prompt {
    /// Where its pages go; `None` = nowhere, it is computed for its embedding.
    destination: Option<(HandoffId, Peer)>,
    /// Its sequence, until the first token is drawn.
    sequence: Option<SequenceId>,
    usage: Usage,
    span: Span,
}

impl Prompt {
    fn handoff(&self) -> Option<HandoffId> {
        self.destination.as_ref().map(|(handoff, _)| *handoff)
    }
}

/// A hand-off that has begun and is not over.
#[derive(Debug)]
struct Handoff {
    /// Gone when the leg has ended before its hand-off.
    leg: Option<LegId>,
    /// The pages, once the sequence is gone.
    hold: Option<Hold>,
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
            let plan = self.parts.scheduler.schedule(self.now());
            if plan.is_empty() && !self.parts.scheduler.is_under_way() {
                self.flush();
                self.parts.health.progressed(true);
                self.wait();
                self.parts.health.work_began();
            } else {
                self.step(plan)?;
                self.flush();
                self.parts.health.progressed(false);
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
    pub(crate) fn new(parts: Parts) -> Self {
        let layout = parts.engine.memory().layout();
        Self {
            epoch: Instant::now(),
            page_tokens: layout.page_tokens as usize,
            layers: layout.layers,
            legs: Legs::default(),
            sequences: HashMap::new(),
            handoffs: HashMap::new(),
            prefixes: Prefixes::new(&parts),
            routers: Routers::default(),
            meters: Meters::new(&parts),
            parts,
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self) {
        let deadline = self.legs.next_deadline().map(|deadline| self.epoch + deadline);
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
        let arrived = received.saturating_duration_since(self.epoch);
        let destination = match self.admit(leg, &sequence) {
            Ok(destination) => destination,
            Err(end) => return self.routers.ended(id, end, Usage::default()),
        };
        let sequence = match self.parts.scheduler.submit(sequence, arrived) {
            Ok(sequence) => sequence,
            Err(refusal) => return self.routers.ended(id, End::Refused(refusal.to_string()), Usage::default()),
        };
        if let Some(keep) = keep {
            self.prefixes.announce(sequence, keep);
        }
        if let Some(fetch) = fetch {
            let Parts { scheduler, transfer, .. } = &mut self.parts;
            self.prefixes.fetch(fetch, sequence, scheduler, transfer);
        }
        let span = tracing::info_span!("prefill", request, attempt = id.attempt, worker = self.parts.worker);
        telemetry::set_parent(&span, &traceparent);
        let prompt = Prompt { destination, sequence: Some(sequence), usage: Usage::default(), span };
        self.sequences.insert(sequence, id);
        self.legs.insert(id, prompt, deadline.map(|deadline| arrived + deadline)).expect("it was looked up above");
    }

    /// Checks what only this worker can check.
    fn admit(&self, leg: Leg, sequence: &Request) -> Result<Option<(HandoffId, Peer)>, End> {
        let (handoff, target) = match leg {
            _ if self.draining() => return Err(End::Refused(format!("{} is draining", self.parts.worker))),
            Leg::Prefill { handoff, worker, incarnation, link } => {
                (HandoffId(handoff), Peer { worker, incarnation, link })
            }
            Leg::Embed(_) => return Ok(None),
            Leg::Local if sequence.stop.max_tokens == 1 => return Ok(None),
            Leg::Local => {
                let (worker, most) = (&self.parts.worker, sequence.stop.max_tokens);
                let why =
                    format!("{worker} is a prefill worker and goes no further than the first token, not to {most}");
                return Err(End::Invalid(why));
            }
            Leg::Decode { .. } => {
                return Err(End::Invalid(format!("{} is a prefill worker: nothing lands here", self.parts.worker)));
            }
        };
        if self.handoffs.contains_key(&handoff) {
            return Err(End::Invalid(format!("hand-off {:016x} was used before", handoff.0)));
        }
        Ok(Some((handoff, target)))
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
        for id in self.legs.overdue(self.now()) {
            self.end_leg(id, End::Failed("the leg's deadline passed on the prefill worker".into()));
        }
    }

    // ---- a step ----

    /// Carries out `plan`, or begins it, and takes what the step that this ended came to. An error says what broke the engine.
    fn step(&mut self, plan: Plan) -> Result<(), String> {
        plan.started().iter().for_each(|&sequence| self.begin(sequence));
        let computed = self.compute(plan);
        self.meters.computed(&computed);
        for reported in computed.reported {
            self.routers.reported(self.sequences[&reported.id], reported);
        }
        computed.embedded.into_iter().for_each(|embedded| self.embedded(embedded));
        computed.drawn.into_iter().for_each(|drawn| self.drawn(drawn));
        computed.faults.into_iter().for_each(|fault| self.fault(fault));
        computed.broken.map_or(Ok(()), Err)
    }

    /// Begins the hand-off of a sequence that is part of a step for the first time, and sends what is cached of it.
    fn begin(&mut self, sequence: SequenceId) {
        let now = self.now();
        let id = self.sequences[&sequence];
        let prompt = self.legs.get(id).expect("a sequence in a step has a live leg");
        let (usage, tokens) = self.parts.scheduler.usage_of(sequence, now).expect("a planned sequence is known");
        self.meters.started(tokens, &usage);
        let Some((handoff, target)) = prompt.destination.clone() else { return };
        let pages = self.parts.scheduler.pages_of(sequence).to_vec();
        let cached = usage.cached_tokens / self.page_tokens;
        self.parts.transfer.begin(Begin { handoff, targets: vec![target], tokens: tokens as u32, pages });
        if cached > 0 {
            self.parts.transfer.push(handoff, 0..self.layers, 0..cached as u32);
        }
        self.handoffs.insert(handoff, Handoff { leg: Some(id), hold: None });
    }

    /// Computes `plan`, pushing each layer's pages when they are final.
    fn compute(&mut self, plan: Plan) -> Computed {
        let Self { parts, sequences, legs, epoch, page_tokens, .. } = self;
        let Parts { engine, scheduler, transfer, .. } = parts;
        let push = |chunk: &Chunk, layer: u32| {
            let prompt = sequences.get(&chunk.id).and_then(|&id| legs.get(id)).expect("a chunk's leg is live");
            let Some(handoff) = prompt.handoff() else { return };
            let (first, end) = (chunk.start / *page_tokens, (chunk.start + chunk.tokens).div_ceil(*page_tokens));
            transfer.push(handoff, layer..layer + 1, first as u32..end as u32);
        };
        scheduler.compute(
            plan,
            engine,
            &mut |chunks, layer| chunks.iter().for_each(|chunk| push(chunk, layer)),
            &|| epoch.elapsed(),
        )
    }

    /// The first token of a prompt: the router gets it now, the decode worker with the commit.
    fn drawn(&mut self, drawn: Drawn) {
        let Drawn { id: sequence, index, sampled, ended } = drawn;
        let id = self.sequences.remove(&sequence).expect("a drawn sequence has a live leg");
        let (finish, Ended { usage, hold }) = ended.expect("a prompt ends here with its first token");
        let prompt = self.legs.get_mut(id).expect("a drawn sequence has a live leg");
        prompt.sequence = None;
        prompt.usage = usage;
        let handoff = prompt.handoff();
        self.hold(handoff, hold);
        self.prefixes.ended(sequence, &mut self.parts.scheduler);
        let first_token: TokenId = sampled.token;
        self.routers.token(id, index, sampled);
        match finish {
            Finish::FirstToken => {
                let handoff = handoff.expect("who goes on to decode elsewhere has a hand-off");
                self.parts.transfer.commit(handoff, Commit { first_token });
            }
            Finish::Stop(token) => self.end_leg(id, End::Stop(token)),
            Finish::Length => self.end_leg(id, End::Length),
        }
    }

    fn embedded(&mut self, embedded: Embedded) {
        let Embedded { id: sequence, vector, ended } = embedded;
        let id = self.sequences.remove(&sequence).expect("an embedded sequence has a live leg");
        let prompt = self.legs.get_mut(id).expect("an embedded sequence has a live leg");
        prompt.sequence = None;
        prompt.usage = ended.usage;
        self.end_leg(id, End::Embedded(vector));
    }

    fn fault(&mut self, fault: Fault) {
        let Fault { id: sequence, error, hopeless, ended } = fault;
        let id = self.sequences.remove(&sequence).expect("a faulty sequence has a live leg");
        self.prefixes.cancel(sequence, &self.parts.transfer);
        tracing::error!(leg = %id, error, "a sequence could not be computed");
        let prompt = self.legs.get_mut(id).expect("a faulty sequence has a live leg");
        prompt.sequence = None;
        prompt.usage = ended.usage;
        let handoff = prompt.handoff();
        self.hold(handoff, ended.hold);
        self.end_leg(id, if hopeless { End::Invalid(error) } else { End::Failed(error) });
    }

    // ---- hand-offs ----

    fn event(&mut self, event: Event) {
        let Parts { engine, scheduler, transfer, .. } = &mut self.parts;
        let event = self.prefixes.take(event, engine, scheduler, transfer);
        for (sequence, why) in self.prefixes.deprived() {
            let id = self.sequences[&sequence];
            self.end_leg(id, End::Refused(why));
        }
        let Some(event) = event else { return };
        match event {
            Event::SourceDone { handoff, outcome } => self.source_done(handoff, outcome),
            Event::Begun { handoff, from, .. } => {
                let reason = format!("{} is a prefill worker: nothing lands here", self.parts.worker);
                tracing::warn!(handoff = handoff.0, from, "a hand-off came to a prefill worker");
                self.parts.transfer.refuse(handoff, reason);
            }
            Event::Asked { handoff, .. }
            | Event::Landed { handoff, .. }
            | Event::Lost { handoff, .. }
            | Event::Quiet { handoff } => {
                tracing::warn!(handoff = handoff.0, "news of a landing that this worker never opened");
            }
        }
    }

    /// The hand-off is over: its pages come back, and with them the leg's end.
    fn source_done(&mut self, handoff: HandoffId, outcome: Outcome) {
        let Some(Handoff { leg, hold }) = self.handoffs.remove(&handoff) else { return };
        if let Some(hold) = hold {
            self.parts.scheduler.give_back(hold);
        }
        if let Some(id) = leg {
            self.end_leg(id, end_of(outcome));
        }
    }

    /// Keeps the pages of a sequence that is gone until its hand-off is over, which it may be already.
    fn hold(&mut self, handoff: Option<HandoffId>, hold: Option<Hold>) {
        let Some(hold) = hold else { return };
        match handoff.and_then(|handoff| self.handoffs.get_mut(&handoff)) {
            Some(open) => open.hold = Some(hold),
            None => self.parts.scheduler.give_back(hold),
        }
    }

    /// Ends a leg in whatever state it is. Unknown legs have ended already.
    fn end_leg(&mut self, id: LegId, end: End) {
        let Some(prompt) = self.legs.remove(id) else { return };
        let mut usage = prompt.usage;
        if let Some(sequence) = prompt.sequence {
            self.sequences.remove(&sequence);
            self.prefixes.cancel(sequence, &self.parts.transfer);
            if let Some(ended) = self.parts.scheduler.cancel(sequence, self.epoch.elapsed()) {
                usage = ended.usage;
                self.hold(prompt.handoff(), ended.hold);
            }
        }
        if let Some(handoff) = prompt.handoff()
            && let Some(open) = self.handoffs.get_mut(&handoff)
        {
            open.leg = None;
            match end {
                End::Stop(_) | End::Length => self.parts.transfer.forgo(handoff),
                _ => self.parts.transfer.abort(handoff, format!("the prefill leg ended: {end:?}")),
            }
        }
        tracing::debug!(parent: &prompt.span, leg = %id, ?end, ?usage, "leg ended");
        self.routers.ended(id, end, usage);
    }

    // ---- what is reported ----

    fn flush(&mut self) {
        let load = Load {
            handoffs: self.handoffs.len(),
            link_bytes_per_s: self.parts.transfer.link_bytes_per_s(),
            draining: self.draining(),
            ..self.meters.load(&self.parts.scheduler, self.legs.len())
        };
        let delta = self.parts.scheduler.take_delta();
        self.routers.flush(Instant::now(), delta, self.parts.scheduler.pool(), &load);
        self.parts.load.send_replace(load);
    }
}

fn end_of(outcome: Outcome) -> End {
    match outcome {
        Outcome::Landed => End::HandedOff,
        Outcome::Forgone => End::Failed("hand-off called off: nobody needs it".to_owned()),
        Outcome::Refused(why) => End::Refused(format!("the decode worker refused: {why}")),
        Outcome::Aborted(why) => End::Failed(format!("hand-off called off: {why}")),
        Outcome::Expired(why) => End::Failed(format!("hand-off expired: {why}")),
    }
}
