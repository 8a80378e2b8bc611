//! One attempt at a choice: its legs, and their tokens in order.
//!
//! Token 0 comes from the prefill worker, the rest from the decode worker, over two streams that know nothing of each other. An
//! [`Attempt`] puts them in order, each index once, and tells when all of it has ended.

use crate::{
    fleet::{
        Computing, Fleet, Path, Target, events,
        leg::{Cached, End, Ended, Fetch, LegEvent, LegRole, Said, Submission, Token},
        session::LegGuard,
    },
    recovery::{Failure, FailureKind, Part},
};
use std::{collections::BTreeMap, time::Duration};

/// See the module. Dropping it calls its legs off.
#[derive(Debug)]
pub(crate) struct Attempt {
    legs: Vec<Leg>,
    events: events::Listener,
    /// Index of the next token to give out.
    next: u32,
    /// Tokens that have not been given out, the next one last.
    early: Vec<Token>,
    /// Tokens of the prompt, by their position there.
    prompt: BTreeMap<u32, Token>,
    /// Whether any token has come.
    spoke: bool,
    ended: Option<Ending>,
    failure: Option<Failure>,
    /// The decode leg failed before any token came and while the prefill leg was under way. If that ended with its first token, it
    /// called the hand-off off and its word is just later: the failure counts once the prefill leg has said how it ended.
    suspected: Option<Failure>,
    /// What was not computed of the prompt, once that is known.
    cached: Option<Cached>,
    /// How long the prompt waited and was computed, once that is known.
    prompt_times: Option<[Duration; 2]>,
    /// Until the prompt is computed.
    computing: Option<Computing>,
}

#[derive(Debug)]
struct Leg {
    guard: LegGuard,
    part: Part,
    worker: String,
    spoke: bool,
    ended: bool,
}

/// How a sequence came to its natural end.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ending {
    /// This token ended it.
    Stop(u32),
    Length,
    /// With the vector that was asked for in place of tokens.
    Embedded(Vec<f32>),
}

/// What an attempt has to say next.
#[derive(Debug)]
pub(crate) enum News {
    Token(Token),
    Ended(Ending),
    Failed(Failure),
}

impl Attempt {
    /// Submits all legs at once. `submission` is the same for each but for its number and, where there are two, its role; the first token wanted is `next`.
    pub(crate) fn start(
        fleet: &Fleet,
        path: Path,
        submission: &Submission,
        next: u32,
        handoff: u64,
        buffer: usize,
    ) -> Result<Self, Failure> {
        let (sender, events) = events::channel(buffer);
        let decode = &path.decode;
        let fetch = path.fetch.as_ref().map(|(holder, pages)| Fetch {
            handoff: !handoff,
            worker: holder.worker.id.clone(),
            incarnation: holder.incarnation,
            link: holder.link.clone(),
            pages: *pages,
            required: false,
        });
        let parts: Vec<(Part, &Target, LegRole)> = match &path.prefill {
            None => vec![(Part::Local, decode, submission.role.clone())],
            Some(prefill) => vec![
                (
                    Part::Prefill,
                    prefill,
                    LegRole::Prefill {
                        handoff,
                        worker: decode.worker.id.clone(),
                        incarnation: decode.incarnation,
                        link: decode.link.clone(),
                    },
                ),
                (
                    Part::Decode,
                    decode,
                    LegRole::Decode { handoff, worker: prefill.worker.id.clone(), incarnation: prefill.incarnation },
                ),
            ],
        };
        let mut legs = Vec::with_capacity(parts.len());
        for (part, target, role) in parts {
            let mut submission = Submission { attempt: fleet.next_attempt(), role, ..submission.clone() };
            if part == Part::Decode {
                submission.prompt_logprobs = None;
            } else {
                submission.fetch = submission.fetch.or_else(|| fetch.clone());
            }
            let worker = target.worker.id.clone();
            match target.session.submit(submission, target.asks, &sender) {
                Ok(guard) => legs.push(Leg { guard, part, worker, spoke: false, ended: false }),
                // The other leg, if it is under way, is called off as its guard drops.
                Err(unsent) => {
                    return Err(Failure {
                        kind: FailureKind::Lost,
                        worker,
                        part,
                        peer: None,
                        spoke: false,
                        message: unsent.to_string(),
                    });
                }
            }
        }
        Ok(Self {
            legs,
            events,
            next,
            early: Vec::new(),
            prompt: BTreeMap::new(),
            spoke: false,
            ended: None,
            failure: None,
            suspected: None,
            cached: None,
            prompt_times: None,
            computing: path.computing,
        })
    }

    /// Waits for something to happen and takes it in. Cancel-safe.
    pub(crate) async fn listen(&mut self, events: &mut Vec<LegEvent>) {
        self.events.listen(events).await;
        for event in events.drain(..) {
            self.hear(event);
        }
    }

    /// Returns what there is to say without waiting: tokens in order, then how it ended.
    pub(crate) fn news(&mut self) -> Option<News> {
        if let Some(token) = self.early.pop_if(|token| token.index == self.next) {
            self.next += 1;
            return Some(News::Token(token));
        }
        // Without a token of its own an attempt only finds that the last one before it was the last.
        let told = |ending: &mut Ending| {
            let whole = self.spoke || self.next > 0 || matches!(ending, Ending::Embedded(_));
            whole && self.early.is_empty()
        };
        if let Some(ending) = self.ended.take_if(told) {
            return Some(News::Ended(ending));
        }
        self.failure.take().map(News::Failed)
    }

    /// Takes what was said about the prompt's tokens, in order. All of it is there when the first token is.
    pub(crate) fn take_prompt(&mut self) -> Vec<Token> {
        std::mem::take(&mut self.prompt).into_values().collect()
    }

    /// The failure of an attempt from which nothing came for too long.
    pub(crate) fn stalled(&self, message: String) -> Failure {
        // Before its first token the prompt is to blame on whoever computes it, afterwards whoever decodes.
        let at = if self.spoke { self.legs.len() - 1 } else { 0 };
        self.failure_of(at, FailureKind::Stalled, message)
    }

    /// Whether a token has come.
    pub(crate) fn has_spoken(&self) -> bool {
        self.spoke
    }

    /// Whether one has come from whoever decodes.
    pub(crate) fn has_decoded(&self) -> bool {
        self.legs.iter().any(|leg| leg.part != Part::Prefill && leg.spoke)
    }

    /// Returns what was taken of the prompt from a prefix cache, once that is known.
    pub(crate) fn cached(&self) -> Option<Cached> {
        self.cached
    }

    /// Returns how long the prompt waited at its worker and how long it was computed, once that is known.
    pub(crate) fn prompt_times(&self) -> Option<[Duration; 2]> {
        self.prompt_times
    }

    fn hear(&mut self, event: LegEvent) {
        let Some(at) = self.legs.iter().position(|leg| leg.guard.attempt() == event.attempt) else { return };
        match event.said {
            Said::Prompt(tokens) => self.prompt.extend(tokens.into_iter().map(|token| (token.index, token))),
            Said::Token(token) => {
                self.spoke = true;
                self.computing = None;
                self.legs[at].spoke = true;
                let place = self.early.partition_point(|other| other.index > token.index);
                // An index that was given out already, or will be, is an echo.
                if token.index >= self.next && self.early.get(place).is_none_or(|other| other.index != token.index) {
                    self.early.insert(place, token);
                }
            }
            Said::Ended(ended) => self.hear_ended(at, *ended),
        }
    }

    fn hear_ended(&mut self, at: usize, ended: Ended) {
        self.legs[at].ended = true;
        self.take_ended(at, ended);
        if self.legs[at].part == Part::Prefill && self.ended.is_none() && self.failure.is_none() {
            self.failure = self.suspected.take();
        }
    }

    fn take_ended(&mut self, at: usize, ended: Ended) {
        // What the decode worker already held saved a transfer, not compute.
        if self.legs[at].part != Part::Decode {
            self.cached = Some(ended.cached);
            self.prompt_times = Some([ended.queue, ended.prefill]);
        }
        let (kind, message) = match ended.end {
            End::Stop(token) => return self.ended = Some(Ending::Stop(token)),
            End::Length => return self.ended = Some(Ending::Length),
            End::Embedded(vector) => return self.ended = Some(Ending::Embedded(vector)),
            End::HandedOff => return,
            End::Lost(message) => (FailureKind::Lost, message),
            End::Failed(message) => (FailureKind::Failed, message),
            End::Refused(message) => (FailureKind::Refused, message),
            End::Invalid(message) => (FailureKind::Invalid, message),
            End::Overflow => (FailureKind::Overflow, "the client does not read".into()),
        };
        // Once the decode worker decodes, it owns the sequence, whatever becomes of the prefill leg.
        let superseded =
            self.legs[at].part == Part::Prefill && self.legs.iter().any(|l| l.part == Part::Decode && l.spoke);
        if superseded || self.failure.is_some() {
            return;
        }
        let failure = self.failure_of(at, kind, message);
        let prefilling = self.legs.iter().any(|leg| leg.part == Part::Prefill && !leg.ended);
        if kind == FailureKind::Failed && failure.part == Part::Decode && !self.spoke && prefilling {
            self.suspected = Some(failure);
        } else {
            self.failure = Some(failure);
        }
    }

    fn failure_of(&self, at: usize, kind: FailureKind, message: String) -> Failure {
        let leg = &self.legs[at];
        let peer = self.legs.iter().find(|other| other.worker != leg.worker).map(|other| other.worker.clone());
        Failure { kind, worker: leg.worker.clone(), part: leg.part, peer, spoke: self.spoke, message }
    }
}
