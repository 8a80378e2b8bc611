//! The one task that owns a worker's hand-offs: feeds their state machines and does what they say.
//!
//! Everything it touches answers at once (queues, maps, atomics), so it never waits but for its next input. Events that the
//! worker has not taken yet are held back here; while there are any, nothing more is read from links, whose senders then wait
//! in turn. Requests of the worker and reports of transports are always taken.

use crate::{
    Begin, Event, Fetch, HandoffId, Peer, TransportKind,
    handoffs::{Action, LinkId, Moved, Request, Side, Took},
    handshake::past_life,
    inbox::{Inbox, Note},
    landing::Landings,
    link::{Arrival, LinkStop, Role, Up},
    links::Links,
    message::Message,
    metrics::Metrics,
    plan::{self, Terms},
    ranks::Ranks,
    source::Frame,
    speed::Speed,
    target::End,
    transport::{Job, Transport},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Span;

/// How precisely deadlines are kept.
const TICK: Duration = Duration::from_millis(50);
/// Longest that a source's thread stays awake for what is due: the reports of the last frames, and then the acknowledgement of the
/// commit. Two such moments a hand-off; being woken for it instead costs tens of microseconds, as long as copying half a megabyte, and
/// what takes longer than this has something else to wait for.
const AWAKE: Duration = Duration::from_micros(80);
/// How long hand-offs get to end when the worker stops.
const STOP_LIMIT: Duration = Duration::from_millis(500);

/// Hand-offs that have not ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Live {
    /// Begun by the worker, not yet seen by the driver.
    pub(crate) queued: usize,
    /// Known to the driver, both sides.
    pub(crate) known: usize,
}

/// What the driver is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) handoffs: Ranks,
    pub(crate) links: Arc<Links>,
    pub(crate) landings: Arc<Landings>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) arrivals: mpsc::Receiver<Arrival>,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) live: watch::Sender<Live>,
    pub(crate) speed: Arc<Speed>,
    pub(crate) metrics: Metrics,
    /// Which life of this worker peers are told.
    pub(crate) incarnation: u64,
    /// Where peers connect.
    pub(crate) address: String,
    /// Ends the listener when the driver is gone.
    pub(crate) _accepting: DropGuard,
}

/// One end of a link that is up or being dialled.
#[derive(Debug)]
struct Link {
    peer: String,
    /// Key in `dialled`, when dialled here.
    address: Option<Address>,
    /// Which life of the peer was asked for, or answered.
    incarnation: u64,
    outgoing: mpsc::Sender<Message>,
    stop: LinkStop,
    up: Option<UpLink>,
}

#[derive(Debug)]
struct UpLink {
    token: u64,
    kind: TransportKind,
    terms: Arc<Terms>,
    /// At the source.
    transport: Option<Arc<dyn Transport>>,
}

/// Member id and link address.
type Address = (String, String);

/// See the module.
#[derive(Debug)]
pub(crate) struct Driver {
    parts: Parts,
    epoch: Instant,
    links: HashMap<LinkId, Link>,
    dialled: HashMap<Address, LinkId>,
    outbox: VecDeque<Event>,
    spans: HashMap<(Side, HandoffId), Span>,
    /// Committed, and to be answered by the target.
    committed: HashSet<HandoffId>,
    /// Until when not to sleep, for something is due from a peer.
    awake_until: Option<Instant>,
}

impl Driver {
    /// Makes a driver; nothing happens before [`Driver::run`].
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            parts,
            epoch: Instant::now(),
            links: HashMap::new(),
            dialled: HashMap::new(),
            outbox: VecDeque::new(),
            spans: HashMap::new(),
            committed: HashSet::new(),
            awake_until: None,
        }
    }

    /// Runs until `shutdown`, or until the worker drops the receiver of its events; then ends every link and gives hand-offs a
    /// moment to end.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut notes = Vec::new();
        let mut stop_at = None;
        let events = self.parts.events.clone();
        while stop_at.is_none() || self.parts.handoffs.live() > 0 || !self.outbox.is_empty() {
            if !self.outbox.is_empty() {
                // Messages first: a peer waits for them, and waking the worker's thread takes as long as writing one.
                tokio::task::yield_now().await;
            }
            // Every arm is cancel safe: notes and arrivals are taken or stay, a reserved place is given back.
            tokio::select! {
                () = self.parts.inbox.take(&mut notes) => self.handle_notes(&mut notes),
                Some(arrival) = self.parts.arrivals.recv(), if self.outbox.is_empty() => self.handle_arrival(arrival),
                place = events.reserve(), if !self.outbox.is_empty() => match (place, self.outbox.pop_front()) {
                    (Ok(place), Some(event)) => place.send(event),
                    _ => self.outbox.clear(),
                },
                () = stay_awake(self.awake_until), if self.awake_until.is_some() => self.awake_until = None,
                _ = ticks.tick(), if self.parts.handoffs.live() > 0 => self.act(|handoffs, now, out| handoffs.tick(now, out)),
                () = shutdown.cancelled(), if stop_at.is_none() => stop_at = Some(self.stop()),
                () = events.closed(), if stop_at.is_none() => stop_at = Some(self.stop()),
                () = sleep_until(stop_at.unwrap_or(self.epoch)), if stop_at.is_some() => break,
            }
        }
    }

    /// Ends every link. Returns how long to wait for what follows.
    fn stop(&mut self) -> Instant {
        for link in self.links.values() {
            link.stop.stop("shutting down");
        }
        Instant::now() + STOP_LIMIT
    }

    fn handle_notes(&mut self, notes: &mut Vec<(Instant, Note)>) {
        let mut begun = 0;
        for (at, note) in notes.drain(..) {
            match note {
                Note::Begin(begin, span) => {
                    begun += 1;
                    self.begin(at, begin, span);
                }
                Note::Fetch(fetch) => {
                    begun += 1;
                    self.fetch(at, &fetch);
                }
                Note::Request(request) => {
                    if let Request::Commit { .. } = request {
                        self.awake_until = Some(Instant::now() + AWAKE);
                    }
                    self.act_at(at, |handoffs, now, out| handoffs.request(now, request, out));
                }
                Note::Moved(handoff, moved) => {
                    match moved {
                        Moved::Sent { bytes, .. } => {
                            self.parts.metrics.sent_bytes.increment(bytes);
                            self.parts.handoffs.legs_mut().moved_at(self.parts.speed.bytes_per_s());
                        }
                        Moved::Landed { bytes, .. } => self.parts.metrics.landed_bytes.increment(bytes),
                        Moved::Lost | Moved::Settled | Moved::Sealed | Moved::Stale => {}
                    }
                    self.act_at(at, |handoffs, now, out| handoffs.moved(now, handoff, moved, out));
                }
            }
        }
        if begun > 0 {
            self.parts.live.send_modify(|live| live.queued -= begun);
        }
    }

    fn begin(&mut self, at: Instant, begin: Begin, span: Span) {
        let mut legs = Vec::new();
        for (leg, target) in self.parts.handoffs.legs_of(&begin) {
            legs.push((leg, self.link_to(&begin.targets[target])));
            self.spans.entry((Side::Source, leg)).or_insert_with(|| span.clone());
        }
        self.act_at(at, |handoffs, now, out| handoffs.begin(now, &begin, legs, out));
    }

    fn fetch(&mut self, at: Instant, fetch: &Fetch) {
        let link = self.link_to(&fetch.source);
        let (incarnation, address) = (self.parts.incarnation, self.parts.address.clone());
        self.act_at(at, |handoffs, now, out| match link {
            Ok(link) => handoffs.legs_mut().fetch(now, (link, incarnation, &address), fetch, out),
            Err(reason) => out.push(Action::Emit(Event::Lost { handoff: fetch.handoff, reason })),
        });
    }

    /// Finds the link to `peer`, or starts dialling one.
    fn link_to(&mut self, peer: &Peer) -> Result<LinkId, String> {
        let address = (peer.worker.clone(), peer.link.clone());
        if let Some(id) = self.dialled.get(&address)
            && let Some(link) = self.links.get(id).filter(|link| !link.stop.token().is_cancelled())
        {
            return past_life(peer.incarnation, link.incarnation).map(|()| *id);
        }
        let (id, outgoing, stop) = self.parts.links.dial(peer.clone());
        self.dialled.insert(address.clone(), id);
        let (peer, incarnation) = (peer.worker.clone(), peer.incarnation);
        self.links.insert(id, Link { peer, address: Some(address), incarnation, outgoing, stop, up: None });
        Ok(id)
    }

    fn handle_arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Up(id, up) => self.link_up(id, up),
            Arrival::Said(id, frame @ Message::Pages { .. }) => {
                // Said by a source that writes by itself; who else says it has no landing that listens.
                let up = self.links.get(&id).filter(|link| link.address.is_none()).and_then(|link| link.up.as_ref());
                if let Some(up) = up {
                    self.parts.links.written(up.token, frame);
                }
            }
            Arrival::Said(id, message) => {
                let Some(link) = self.links.get(&id) else { return };
                let (from, accepted) = (link.peer.clone(), link.address.is_none());
                self.act(|handoffs, now, out| handoffs.message(now, (id, &from, accepted), message, out));
            }
            Arrival::Down { link, reason, refused } => self.link_down(link, &reason, refused),
        }
    }

    fn link_up(&mut self, id: LinkId, up: Up) {
        let Up { peer, incarnation, token, kind, terms, role } = up;
        let (side, transport) = match role {
            Role::Source(transport) => (Side::Source, Some(transport)),
            Role::Target(outgoing, stop) => {
                let link = Link { peer: peer.clone(), address: None, incarnation, outgoing, stop, up: None };
                self.links.insert(id, link);
                (Side::Target, None)
            }
        };
        tracing::info!(peer, incarnation, ?side, transport = ?kind, "link up");
        self.parts.metrics.links(side, kind).increment(1);
        if let Some(link) = self.links.get_mut(&id) {
            link.incarnation = incarnation;
            link.up = Some(UpLink { token, kind, terms: terms.clone(), transport });
        }
        self.parts.handoffs.legs_mut().link_up(id, terms);
    }

    fn link_down(&mut self, id: LinkId, reason: &str, refused: bool) {
        let Some(link) = self.links.get(&id) else { return };
        tracing::info!(peer = link.peer, reason, refused, "link down");
        let reason = if refused { reason.to_owned() } else { format!("link to {} lost: {reason}", link.peer) };
        // While the link is still listed: the records of what ends with it name its transport.
        self.act(|handoffs, now, out| handoffs.link_lost(now, id, &reason, refused, out));
        let Some(link) = self.links.remove(&id) else { return };
        if let Some(address) = &link.address
            && self.dialled.get(address) == Some(&id)
        {
            self.dialled.remove(address);
        }
        if let Some(up) = link.up {
            let side = if link.address.is_some() { Side::Source } else { Side::Target };
            self.parts.metrics.links(side, up.kind).decrement(1);
        }
    }

    fn act(&mut self, step: impl FnOnce(&mut Ranks, Duration, &mut Vec<Action>)) {
        self.act_at(Instant::now(), step);
    }

    /// Steps the state machines as of `at` and does what they say.
    fn act_at(&mut self, at: Instant, step: impl FnOnce(&mut Ranks, Duration, &mut Vec<Action>)) {
        let mut actions = Vec::new();
        step(&mut self.parts.handoffs, at.saturating_duration_since(self.epoch), &mut actions);
        for action in actions {
            self.perform(action);
        }
        let known = self.parts.handoffs.live();
        self.parts.live.send_modify(|live| live.known = known);
        self.parts.metrics.in_flight.set(known as f64);
        self.parts.metrics.quarantined_pages.set(f64::from(self.parts.handoffs.legs().quarantined_pages()));
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send(link, message) => self.send(link, message),
            Action::Commit { link, handoff, sent, commit, word } => {
                let transport = self.transport(link);
                let settled = transport.zip(word).is_some_and(|(transport, page)| transport.settle(handoff, page));
                if !settled {
                    self.committed.insert(handoff);
                    self.awake_until = Some(Instant::now() + AWAKE);
                    self.parts.speed.started(Instant::now());
                }
                self.send(link, Message::Commit { handoff, sent, commit, settled });
                if settled {
                    self.act(|handoffs, now, out| handoffs.moved(now, handoff, Moved::Settled, out));
                }
            }
            Action::Post(link, frame) => self.post(link, frame),
            Action::Cancel(link, handoff) => {
                if let Some(transport) = self.transport(link) {
                    transport.cancel(handoff);
                }
            }
            Action::Admit { link, handoff, landing, travel } => {
                // A hand-off begins over a link that is up, and a lost link ends its hand-offs before it is forgotten.
                let Some(up) = self.links.get(&link).and_then(|link| link.up.as_ref()) else { return };
                self.parts.landings.open(handoff, (up.token, up.terms.clone()), landing, travel);
            }
            Action::Seal { handoff, vouched, .. } => {
                tracing::trace!(%handoff, vouched, "seal");
                if vouched {
                    self.parts.landings.vouched(handoff);
                }
                self.parts.landings.seal(handoff);
            }
            Action::DropLink(link, reason) => {
                if let Some(link) = self.links.get(&link) {
                    tracing::warn!(peer = link.peer, reason, "link dropped");
                    link.stop.stop(reason);
                }
            }
            Action::Emit(event) => self.emit(event),
            Action::Ended { link, handoff, side, end, took } => self.ended(link, handoff, side, end, took),
            Action::Stale(handoff) => {
                tracing::debug!(%handoff, "stale message ignored");
                self.parts.metrics.stale_messages.increment(1);
            }
        }
    }

    fn send(&self, link: LinkId, message: Message) {
        // A link that is gone has told its hand-offs, or is about to.
        let Some(link) = self.links.get(&link) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = link.outgoing.try_send(message) {
            link.stop.stop("the other end does not read");
        }
    }

    fn post(&self, link: LinkId, frame: Frame) {
        let up = self.links.get(&link).and_then(|link| link.up.as_ref());
        let block_bytes = up.map_or(0, |up| up.terms.block_bytes());
        let bytes = plan::blocks(&frame.pieces) * block_bytes as u64;
        let job = Job::new(frame, bytes, self.parts.inbox.clone(), self.parts.speed.clone());
        // Without a transport the job is dropped here, which reports it as lost.
        if let Some(transport) = up.and_then(|up| up.transport.as_ref()) {
            transport.post(job);
        }
    }

    fn transport(&self, link: LinkId) -> Option<&Arc<dyn Transport>> {
        self.links.get(&link)?.up.as_ref()?.transport.as_ref()
    }

    fn emit(&mut self, event: Event) {
        if let Event::Begun { handoff, from, tokens } = &event {
            let span = tracing::info_span!("handoff", id = %handoff, side = "target", peer = from, tokens);
            self.spans.insert((Side::Target, *handoff), span);
        }
        self.outbox.push_back(event);
    }

    fn ended(&mut self, link: Option<LinkId>, handoff: HandoffId, side: Side, end: End, took: Option<Took>) {
        if side == Side::Target {
            self.parts.landings.forget(handoff);
        } else if self.committed.remove(&handoff) {
            self.parts.speed.finished(Instant::now(), 0);
            if self.committed.is_empty() {
                self.awake_until = None;
            }
        }
        let link = link.and_then(|link| self.links.get(&link));
        let kind = link.and_then(|link| link.up.as_ref()).map(|up| up.kind);
        self.parts.metrics.ended(side, end, kind);
        if let Some(took) = took {
            self.parts.metrics.overhead_seconds.record(took.overhead.as_secs_f64());
            self.parts.speed.overlapped(took.overlapped);
            if let (Some(kind), Some(share)) = (kind, took.overlapped.share()) {
                self.parts.metrics.hidden_ratio(kind).record(share);
            }
        }
        let span = self.spans.remove(&(side, handoff)).unwrap_or_else(Span::none);
        let peer = link.map_or("", |link| &link.peer);
        span.in_scope(|| tracing::debug!(%handoff, ?side, ?end, peer, ?took, "hand-off ended"));
    }
}

/// Returns at `until`, and keeps this thread from sleeping before. Cancel safe.
async fn stay_awake(until: Option<Instant>) {
    while until.is_some_and(|until| Instant::now() < until) {
        // Looks at the sockets of the thread's reactor, and lets everybody else on it run; but not others on its core, who would have
        // it for milliseconds.
        tokio::task::yield_now().await;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Also when the runtime is dropped under us: nobody will be told any more, but nothing may land either.
        self.parts.landings.close();
        for link in self.links.values() {
            link.stop.stop("shutting down");
        }
        self.parts.live.send_modify(|live| *live = Live::default());
    }
}
