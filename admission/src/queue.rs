//! Who goes next. Pure.
//!
//! What reaches a worker is served as it came, so whatever cannot start soon waits here, where its order can still be decided. A request
//! goes when there is a turn for it ([`Limits::max_running`]) and room at the workers ([`Supply`]); as long as any worker has room,
//! something goes.
//!
//! - **Classes.** The lowest `class` goes first. One turn in [`AGED_TURN`] goes to whoever has waited longest, whatever its class, so a
//!   request that `n` others were ahead of is out after `AGED_TURN * (n + 1)` turns: nobody starves.
//! - **Keys.** Within a class, keys share by tokens: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995). A key's debts are forgotten
//!   when nothing of it waits.
//! - **Objectives.** A request that is not expected to meet its objective is refused on arrival, so that its client can go elsewhere at once.
//!   Whoever is let in is meant to be served: it leaves only when its first token was wanted and it has not even gone.
//! - **Deadlines.** Else a request leaves when its patience ends.
//! - **Full.** A newcomer takes the place of the last of the worst class if that is worse than its own; otherwise it is refused.
//!
//! Times are since any fixed moment.

use crate::{Forecast, forecast::milliseconds};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

/// One turn of so many belongs to whoever has waited longest.
pub const AGED_TURN: u64 = 8;

/// Seconds after which what was seen of the pace counts half.
const PACE_HALF_LIFE: f64 = 2.0;

/// Seconds of the pace that the workers promise, counted with what was seen.
const PACE_PRIOR: f64 = 0.5;

/// What a queue holds and hands out.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Choices under way at once.
    pub max_running: usize,
    /// Requests that wait.
    pub max_waiting: usize,
    /// What a key may have in a round of its class, in tokens. Smaller is fairer over short times and costs more rounds.
    pub quantum_tokens: u64,
}

/// What workers can take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Supply {
    /// Tokens of prompts they can be sent before every one of them has enough to do; not positive = none has room.
    pub room_tokens: i64,
    /// At which all of them together get through prompts.
    pub tokens_per_s: f64,
}

impl Supply {
    /// Nothing is known of any worker, so nothing is held back.
    pub const UNKNOWN: Self = Self { room_tokens: i64::MAX, tokens_per_s: 0.0 };
}

/// A request that wants a turn.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Lower goes first.
    pub class: i32,
    /// Whose it is.
    pub key: u64,
    /// What it takes, as far as is known: tokens of the prompt and of the expected output.
    pub tokens: u64,
    /// Choices it generates at once.
    pub share: usize,
    /// Longest wait.
    pub patience: Duration,
    pub objective: Option<Objective>,
}

/// When a request wants its first token.
#[derive(Clone, Copy, Debug)]
pub struct Objective {
    /// From now.
    pub ttft: Duration,
    /// Predicted in milliseconds from its turn to its first token, if it had its turn now.
    pub service_ms: f64,
}

/// A place among those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What one who waits is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Waits {
    pub ticket: Ticket,
    /// Predicted in milliseconds from now to its first token, where it wants that by some time: what [`Forecast::learn`] is to be told.
    pub promised_ms: Option<f64>,
}

/// Why a request gets no turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// So many wait already, none of them in a worse class.
    Full { waiting: usize },
    /// Its patience ended.
    Expired { waited: Duration },
    /// Its first token would come `predicted` after it asked, and not in time.
    TooSlow { predicted: Duration },
}

/// What became of one that waited.
pub type Outcome = (Ticket, Result<(), Refusal>);

/// See the module.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    running: usize,
    /// Requests on their way to asking for a turn.
    arriving: usize,
    supply: Supply,
    turns: u64,
    next: u64,
    /// The lowest class that ever asked.
    best: i32,
    waiting: BTreeMap<Ticket, Waiting>,
    deadlines: BTreeSet<(Duration, Ticket)>,
    classes: BTreeMap<i32, Class>,
    /// Those whose place another took.
    displaced: Vec<Ticket>,
    pace: Pace,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    ask: Ask,
    since: Duration,
    deadline: Duration,
}

/// Those of one class who wait.
#[derive(Debug, Default)]
struct Class {
    flows: HashMap<u64, Flow>,
    /// Keys in the order of the round.
    round: VecDeque<u64>,
    tokens: u64,
}

/// Those of one key.
#[derive(Debug, Default)]
struct Flow {
    /// What it may still take in this round; negative where it took more than was expected.
    deficit: i64,
    /// Whether it has got its quantum since the round came to it.
    served: bool,
    tickets: VecDeque<Ticket>,
    tokens: u64,
}

impl Queue {
    /// Starts empty, with nothing known of the workers.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: 0,
            arriving: 0,
            supply: Supply::UNKNOWN,
            turns: 0,
            next: 0,
            best: 0,
            waiting: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            classes: BTreeMap::new(),
            displaced: Vec::new(),
            pace: Pace::default(),
        }
    }

    /// Returns how many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a request of any class would be refused: what can be said before it is read.
    pub fn is_closed(&self) -> bool {
        self.is_full() && self.worst().is_none_or(|worst| worst <= self.best)
    }

    /// Counts a request in that will ask for a turn once it is prepared; [`Queue::arrived`] must follow.
    pub fn enter(&mut self, class: i32) -> Result<(), Refusal> {
        self.best = self.best.min(class);
        if self.is_full() && self.worst().is_none_or(|worst| worst <= class) {
            return Err(Refusal::Full { waiting: self.waiting.len() + self.arriving });
        }
        self.arriving += 1;
        Ok(())
    }

    /// The request has come as far as it gets: it asks for its turn next, or never.
    pub fn arrived(&mut self) {
        self.arriving -= 1;
    }

    /// Takes a turn if nobody waits for one and there is room. [`Queue::done`] gives it back.
    pub fn pass(&mut self, share: usize, tokens: u64) -> bool {
        let free = self.waiting.is_empty() && self.has_room(self.share(share));
        if free {
            self.start(share, tokens);
        }
        free
    }

    /// Waits, if `forecast` has its first token come in time. Whoever is refused at once never had a ticket; all others hear of it by [`Queue::pump`].
    pub fn wait(&mut self, now: Duration, ask: Ask, forecast: &Forecast) -> Result<Waits, Refusal> {
        let promised_ms = ask.objective.map(|objective| self.wait_ms(&ask) + objective.service_ms);
        if let (Some(objective), Some(ms)) = (ask.objective, promised_ms) {
            let predicted = forecast.ttft(ms);
            if predicted > objective.ttft {
                return Err(Refusal::TooSlow { predicted });
            }
        }
        if self.waiting.len() >= self.limits.max_waiting {
            let worse = self.worst().filter(|worst| *worst > ask.class);
            let last = worse.and_then(|worst| self.classes[&worst].last());
            let Some(last) = last else { return Err(Refusal::Full { waiting: self.waiting.len() }) };
            self.remove(last);
            self.displaced.push(last);
        }
        if self.waiting.is_empty() {
            self.pace.resume(now);
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        let deadline = now + ask.objective.map_or(ask.patience, |objective| objective.ttft.min(ask.patience));
        self.waiting.insert(ticket, Waiting { ask, since: now, deadline });
        self.deadlines.insert((deadline, ticket));
        self.classes.entry(ask.class).or_default().push(ticket, &ask);
        Ok(Waits { ticket, promised_ms })
    }

    /// Lets go of one that waits no more; `false` if it does not.
    pub fn give_up(&mut self, ticket: Ticket) -> bool {
        self.remove(ticket).is_some()
    }

    /// Gives a turn back.
    pub fn done(&mut self, share: usize) {
        self.running -= self.share(share);
    }

    /// Says that a request took `more` tokens than it asked for, or fewer: its key's others wait so much longer.
    pub fn settle(&mut self, class: i32, key: u64, more: i64) {
        if let Some(flow) = self.classes.get_mut(&class).and_then(|class| class.flows.get_mut(&key)) {
            flow.deficit = flow.deficit.saturating_sub(more);
        }
    }

    /// Takes what is known of the workers now.
    pub fn supply(&mut self, supply: Supply) {
        self.supply = supply;
    }

    /// Whether there was room at the workers, when last asked.
    pub fn is_supplied(&self) -> bool {
        self.supply.room_tokens > 0
    }

    /// Sends away those whose time has come and gives turns to whom they belong.
    pub fn pump(&mut self, now: Duration, out: &mut Vec<Outcome>) {
        let waiting = self.waiting.len();
        out.extend(self.displaced.drain(..).map(|ticket| (ticket, Err(Refusal::Full { waiting }))));
        while let Some((_, ticket)) = self.deadlines.first().copied().filter(|(deadline, _)| *deadline <= now) {
            let gone = self.remove(ticket).expect("a deadline is of one that waits");
            let waited = now - gone.since;
            let refusal = match gone.ask.objective {
                Some(objective) if objective.ttft < gone.ask.patience => {
                    Refusal::TooSlow { predicted: waited + milliseconds(objective.service_ms) }
                }
                _ => Refusal::Expired { waited },
            };
            out.push((ticket, Err(refusal)));
        }
        let mut started = 0;
        let backlogged = !self.waiting.is_empty();
        while let Some(ticket) = self.peek() {
            let ask = self.waiting[&ticket].ask;
            if !self.has_room(self.share(ask.share)) {
                break;
            }
            self.turns += 1;
            self.take(ticket, &ask);
            self.start(ask.share, ask.tokens);
            started += ask.tokens;
            out.push((ticket, Ok(())));
        }
        if backlogged {
            self.pace.add(now, started);
        }
    }

    fn start(&mut self, share: usize, tokens: u64) {
        self.running += self.share(share);
        self.supply.room_tokens = self.supply.room_tokens.saturating_sub(i64::try_from(tokens).unwrap_or(i64::MAX));
    }

    /// A request larger than the house takes all of it.
    fn share(&self, share: usize) -> usize {
        share.clamp(1, self.limits.max_running)
    }

    fn has_room(&self, share: usize) -> bool {
        self.running + share <= self.limits.max_running && self.supply.room_tokens > 0
    }

    fn is_full(&self) -> bool {
        let free = if self.supply.room_tokens > 0 { self.limits.max_running - self.running } else { 0 };
        self.waiting.len() + self.arriving >= self.limits.max_waiting.saturating_add(free)
    }

    fn worst(&self) -> Option<i32> {
        self.classes.last_key_value().map(|(class, _)| *class)
    }

    /// Whose turn is next. Asking twice gives the same answer.
    fn peek(&mut self) -> Option<Ticket> {
        if self.turns % AGED_TURN == AGED_TURN - 1 {
            return self.waiting.first_key_value().map(|(ticket, _)| *ticket);
        }
        let (_, class) = self.classes.iter_mut().next()?;
        Some(class.front(&self.waiting, self.limits.quantum_tokens.max(1)))
    }

    /// Lets it out, at the expense of its key.
    fn take(&mut self, ticket: Ticket, ask: &Ask) {
        let flow = self.classes.get_mut(&ask.class).and_then(|class| class.flows.get_mut(&ask.key));
        let flow = flow.expect("one that waits is in its key's line");
        flow.deficit = flow.deficit.saturating_sub(i64::try_from(ask.tokens).unwrap_or(i64::MAX));
        self.remove(ticket);
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Waiting> {
        let gone = self.waiting.remove(&ticket)?;
        self.deadlines.remove(&(gone.deadline, ticket));
        let class = self.classes.get_mut(&gone.ask.class).expect("its class waits with it");
        class.remove(ticket, &gone.ask);
        if class.flows.is_empty() {
            self.classes.remove(&gone.ask.class);
        }
        Some(gone)
    }

    /// Predicts how long a request that asks now will wait: all of better classes goes before it, and of every other key in its class as much as
    /// of its own.
    fn wait_ms(&self, ask: &Ask) -> f64 {
        let better: u64 = self.classes.range(..ask.class).map(|(_, class)| class.tokens).sum();
        let own = self.classes.get(&ask.class).map_or(0, |class| {
            let own = class.flows.get(&ask.key).map_or(0, |flow| flow.tokens);
            let others = class.flows.iter().filter(|(key, _)| **key != ask.key);
            own + others.map(|(_, flow)| flow.tokens.min(own + ask.tokens)).sum::<u64>()
        });
        let pace = self.pace.tokens_per_s(self.supply.tokens_per_s);
        if pace > 0.0 { (better + own) as f64 / pace * 1e3 } else { 0.0 }
    }
}

impl Class {
    fn push(&mut self, ticket: Ticket, ask: &Ask) {
        let flow = self.flows.entry(ask.key).or_default();
        if flow.tickets.is_empty() {
            self.round.push_back(ask.key);
        }
        flow.tickets.push_back(ticket);
        flow.tokens += ask.tokens;
        self.tokens += ask.tokens;
    }

    fn remove(&mut self, ticket: Ticket, ask: &Ask) {
        let flow = self.flows.get_mut(&ask.key).expect("its key waits with it");
        let at = flow.tickets.binary_search(&ticket).expect("tickets grow");
        flow.tickets.remove(at);
        flow.tokens -= ask.tokens;
        self.tokens -= ask.tokens;
        if flow.tickets.is_empty() {
            self.flows.remove(&ask.key);
            self.round.retain(|key| *key != ask.key);
        }
    }

    /// The one who came last.
    fn last(&self) -> Option<Ticket> {
        self.flows.values().filter_map(|flow| flow.tickets.back()).max().copied()
    }

    /// Turns the round until its first key can afford its first request.
    fn front(&mut self, waiting: &BTreeMap<Ticket, Waiting>, quantum: u64) -> Ticket {
        let quantum = i64::try_from(quantum).unwrap_or(i64::MAX);
        let short = |flow: &Flow| {
            let price = i64::try_from(waiting[&flow.tickets[0]].ask.tokens).unwrap_or(i64::MAX);
            price.saturating_sub(flow.deficit)
        };
        let mut passed = 0;
        loop {
            let flow = self.flows.get_mut(&self.round[0]).expect("the round holds keys that wait");
            if !std::mem::replace(&mut flow.served, true) {
                flow.deficit = flow.deficit.saturating_add(quantum);
            }
            if short(flow) <= 0 {
                return flow.tickets[0];
            }
            flow.served = false;
            self.round.rotate_left(1);
            passed += 1;
            if passed == self.round.len() {
                // Nobody can afford anything yet: whole rounds pass at once, but for the one in which somebody can.
                let nearest = self.flows.values().map(short).min().unwrap_or(0);
                let credit = (nearest - 1).max(0) / quantum * quantum;
                self.flows.values_mut().for_each(|flow| flow.deficit = flow.deficit.saturating_add(credit));
                passed = 0;
            }
        }
    }
}

/// How fast tokens left the queue lately, while any waited.
#[derive(Debug, Default)]
struct Pace {
    tokens: f64,
    seconds: f64,
    at: Duration,
}

impl Pace {
    /// Somebody waits again.
    fn resume(&mut self, now: Duration) {
        self.at = now;
    }

    fn add(&mut self, now: Duration, tokens: u64) {
        let took = now.saturating_sub(self.at).as_secs_f64();
        let keep = (-took / PACE_HALF_LIFE).exp2();
        self.tokens = self.tokens * keep + tokens as f64;
        self.seconds = self.seconds * keep + took;
        self.at = now;
    }

    /// `promised` by the workers counts for half a second.
    fn tokens_per_s(&self, promised: f64) -> f64 {
        let prior = if promised > 0.0 { PACE_PRIOR } else { 0.0 };
        let seconds = self.seconds + prior;
        if seconds > 0.0 { (self.tokens + promised * prior) / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests;
