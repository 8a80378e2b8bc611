//! The scheduler against a world that misbehaves, from a seed.
//!
//! The world holds what pages would hold: for every position, a digest of all tokens up to it. A row checks the digests of
//! everything before it and writes its own, so a page that is reused wrongly, too early or half-filled shows at once. The
//! sampler is a function of the tokens so far, as the real one is, so what a sequence must emit is known beforehand.
//!
//! Half of the worlds have a card: it begins steps and computes them when they end, as late as it may, and now and then it cannot tell a token.

mod card;

use super::*;
use crate::{Embedding, Pooling, Sampling};
use card::{Card, Work};
use kv_cache::{PageHash, TokenId};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

const PAGE: usize = 4;
const VOCAB: u64 = 61;

fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(b | 1) ^ b;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn digest(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(7, |digest, &token| mix(digest, u64::from(token) + 1))
}

fn draw(tokens: &[TokenId], forbidden: &[TokenId]) -> TokenId {
    let mut value = digest(tokens);
    loop {
        value = mix(value, 3);
        let token = (value % VOCAB) as TokenId;
        if !forbidden.contains(&token) {
            return token;
        }
    }
}

/// What the model has after the last of `tokens`.
fn hidden_state(tokens: &[TokenId]) -> [f32; 2] {
    let digest = digest(tokens);
    [(digest % 1000) as f32, (digest / 1000 % 1000) as f32]
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0, 11);
        (self.0 % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What one sequence must emit, and has.
struct Expected {
    tokens: Vec<(usize, TokenId)>,
    finish: Finish,
    seen: usize,
    /// In place of tokens.
    vector: Option<Vec<f32>>,
    /// Tokens of the prompt that are to be reported, and that have been; the first one counts as such.
    wanted: usize,
    reported: usize,
}

impl Expected {
    fn of(request: &Request, max_len: usize) -> Self {
        let mut known = request.history.tokens().to_vec();
        let mut tokens = Vec::new();
        if let Until::Embedding(pooling) = request.until {
            let states: Vec<[f32; 2]> = (1..=known.len()).map(|end| hidden_state(&known[..end])).collect();
            let mut embedding = Embedding::new(pooling);
            embedding.add(0, states.iter().map(|state| &state[..]));
            let (finish, vector) = (Finish::Length, Some(embedding.finish()));
            return Self { tokens, finish, seen: 0, vector, wanted: 1, reported: 1 };
        }
        loop {
            let index = known.len() - request.prompt_tokens;
            let forbidden: &[TokenId] = if index < request.stop.min_tokens { &request.stop.ids } else { &[] };
            let token = draw(&known, forbidden);
            known.push(token);
            tokens.push((index, token));
            let finish = if request.stop.ids.contains(&token) {
                Finish::Stop(token)
            } else if index + 1 >= request.stop.max_tokens || known.len() >= max_len {
                Finish::Length
            } else if request.until == Until::FirstToken {
                Finish::FirstToken
            } else {
                continue;
            };
            let wanted = request.prompt_logprobs.map_or(1, |_| request.prompt_tokens);
            return Self { tokens, finish, seen: 0, vector: None, wanted, reported: 1 };
        }
    }
}

/// A sequence on its way from another worker.
struct Flight {
    landing: Landing,
    request: Request,
    lost: bool,
}

struct World {
    random: Random,
    scheduler: Scheduler,
    limits: Limits,
    now: Duration,
    card: Card,
    /// Whether steps are the card's.
    ahead: bool,
    live: HashMap<SequenceId, Expected>,
    ended: usize,
    queue: Vec<(SequenceId, Request)>,
    flights: Vec<Flight>,
    /// Pages kept after a sequence's end; the flag says that somebody may still write to them.
    holds: Vec<(Hold, bool)>,
    reader: HashSet<PageHash>,
    preempted: usize,
    embedded: usize,
    /// Drafts that were verified, and those that turned out right.
    drafts: usize,
    accepted: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let limits = Limits {
            pages: 6 + random.below(20),
            page_tokens: PAGE,
            token_budget: PAGE + 1 + random.below(24),
            max_sequences: 1 + random.below(6),
            max_model_len: 12 + random.below(80),
            max_waiting: 1 + random.below(8),
        };
        Self {
            random,
            scheduler: Scheduler::new(limits).unwrap(),
            limits,
            now: Duration::ZERO,
            card: Card::new(limits.pages, seed),
            ahead: seed % 2 == 1,
            live: HashMap::new(),
            ended: 0,
            queue: Vec::new(),
            flights: Vec::new(),
            holds: Vec::new(),
            reader: HashSet::new(),
            preempted: 0,
            embedded: 0,
            drafts: 0,
            accepted: 0,
        }
    }

    /// Prompts come from few families, so that prefixes meet in the cache.
    fn request(&mut self) -> Request {
        let family = self.random.below(3) as TokenId;
        let prompt_tokens = 1 + self.random.below(24);
        let mut tokens: Vec<TokenId> = (0..prompt_tokens as TokenId).map(|i| (i * 5 + family) % VOCAB as u32).collect();
        if self.random.one_in(3) {
            let last = tokens.len() - 1;
            tokens[last] = 0;
        }
        let emitted = if self.random.one_in(4) { self.random.below(6) } else { 0 };
        for _ in 0..emitted {
            tokens.push(draw(&tokens, &[]));
        }
        let (max_tokens, min_tokens) = (emitted + 1 + self.random.below(60), self.random.below(8));
        Request {
            history: History::new(b"", tokens, PAGE),
            prompt_tokens,
            adapter: None,
            sampling: Sampling::default(),
            stop: Stop { max_tokens, min_tokens, ids: vec![3, 9] },
            grammar: None,
            prompt_logprobs: self.random.one_in(6).then_some(0),
            priority: if self.random.one_in(5) { 1 } else { 0 },
            until: if self.random.one_in(4) { Until::FirstToken } else { Until::End },
        }
    }

    fn arrive(&mut self) {
        let mut request = self.request();
        let max_len = self.scheduler.max_len();
        if self.random.one_in(3) && request.stop.max_tokens > request.history.len() - request.prompt_tokens + 1 {
            (request.until, request.prompt_logprobs) = (Until::End, None);
            let id = self.scheduler.ticket(request.priority);
            self.queue.push((id, request));
            return;
        }
        if self.random.one_in(8) {
            let pooling = if self.random.one_in(2) { Pooling::Last } else { Pooling::Mean };
            (request.until, request.prompt_logprobs) = (Until::Embedding(pooling), None);
        }
        let expected = Expected::of(&request, max_len);
        let tokens = request.history.len();
        match self.scheduler.submit(request, self.now) {
            Ok(id) => assert!(self.live.insert(id, expected).is_none()),
            Err(Refusal::TooLong { .. }) => assert!(tokens >= max_len),
            Err(Refusal::Full { waiting }) => assert!(waiting >= self.limits.max_waiting),
        }
    }

    /// Opens landings for the queue, oldest first, and lets bytes arrive in their pages at once.
    fn open(&mut self) {
        self.queue.sort_by_key(|(id, _)| *id);
        let mut left = Vec::new();
        for (id, request) in std::mem::take(&mut self.queue) {
            let tokens = request.history.tokens().to_vec();
            match self.scheduler.reserve(id, request.history.hashes(), tokens.len()) {
                Ok(landing) => {
                    self.card.memory.check_written(landing.pages(), &tokens, landing.have() * PAGE);
                    self.card.memory.write(landing.pages(), &tokens, landing.have() * PAGE..tokens.len());
                    let lost = self.random.one_in(3);
                    self.flights.push(Flight { landing, request, lost });
                }
                Err(NoRoom::Now) => left.push((id, request)),
                Err(NoRoom::Ever) => assert!(tokens.len() >= self.scheduler.max_len()),
            }
        }
        self.queue = left;
    }

    fn settle_one_flight(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let pick = self.random.below(self.flights.len());
        let Flight { landing, request, lost } = self.flights.swap_remove(pick);
        if lost {
            let hold = self.scheduler.forgo(landing);
            self.holds.push((hold, true));
            return;
        }
        // The source has drawn the first token; what is left to emit comes after it.
        let first = draw(request.history.tokens(), self.forbidden(&request));
        let mut expected = Expected::of(&request, self.scheduler.max_len());
        if expected.tokens.len() == 1 {
            let hold = self.scheduler.forgo(landing);
            self.holds.push((hold, true));
            return;
        }
        expected.tokens.remove(0);
        let id = self.scheduler.land(landing, request, first, self.now);
        assert!(self.live.insert(id, expected).is_none());
    }

    fn forbidden<'a>(&self, request: &'a Request) -> &'a [TokenId] {
        let index = request.history.len() - request.prompt_tokens;
        if index < request.stop.min_tokens { &request.stop.ids } else { &[] }
    }

    fn give_back_one(&mut self) {
        if !self.holds.is_empty() {
            let pick = self.random.below(self.holds.len());
            let (hold, written) = self.holds.swap_remove(pick);
            if written {
                // A late write: it must hurt nobody, up to the moment the hold is given back.
                for &page in hold.pages() {
                    if self.scheduler.pool().stats().held() > 0 && !self.shared(page) {
                        self.card.memory.0[page.index()] = [u64::MAX; PAGE];
                    }
                }
            }
            self.scheduler.give_back(hold);
        }
    }

    /// Says whether anyone but a hold relies on `page`: its prefix has a name, so a landing had it and does not write it.
    fn shared(&self, page: PageId) -> bool {
        let mut probe = self.scheduler.pool().clone();
        let names: Vec<PageHash> = probe.named().collect();
        names.iter().any(|&name| probe.reuse(&[name]) == [page])
    }

    fn cancel_one(&mut self) {
        let mut ids: Vec<SequenceId> = self.live.keys().copied().collect();
        ids.sort();
        if !ids.is_empty() {
            let id = ids[self.random.below(ids.len())];
            let ended = self.scheduler.cancel(id, self.now).expect("a live sequence is known");
            assert!(self.scheduler.cancel(id, self.now).is_none(), "and only once");
            self.live.remove(&id);
            self.end(ended);
        }
    }

    fn end(&mut self, ended: Ended) {
        self.ended += 1;
        assert!(ended.usage.queue <= self.now);
        self.holds.extend(ended.hold.map(|hold| (hold, false)));
    }

    fn meddle(&mut self) {
        for _ in 0..self.random.below(3) {
            match self.random.below(6) {
                0 => self.cancel_one(),
                1 | 2 => self.settle_one_flight(),
                3 | 4 => self.give_back_one(),
                _ => self.open(),
            }
        }
    }

    /// Guesses at the next tokens of some sequences, more or less well and sometimes far too many.
    fn guess(&mut self) {
        let decoding: Vec<(SequenceId, Vec<TokenId>, usize)> = self
            .scheduler
            .decoding()
            .map(|decoding| (decoding.id, decoding.sample.history.to_vec(), decoding.room))
            .collect();
        for (id, mut known, room) in decoding {
            let (start, wrong) = (known.len(), 2 + self.random.below(6));
            let most = if self.random.one_in(3) { room + 2 } else { self.random.below(7) };
            for _ in 0..most {
                known.push(if self.random.one_in(wrong) { 1 } else { draw(&known, &[]) });
            }
            self.scheduler.guess(id, &known[start..]);
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        if self.random.one_in(if self.ahead { 8 } else { 2 }) {
            self.guess();
        }
        let plan = self.scheduler.schedule(self.now);
        self.check_plan(&plan);
        self.preempted += plan.preempted().len();
        let computed = if self.ahead { Some(self.compute(plan)) } else { self.compute_by_hand(plan) };
        if let Some(computed) = computed {
            self.take(computed);
        }
    }

    /// Returns what is known of each sequence of `plan`, drafts included.
    fn known(&self, plan: &Plan) -> Vec<Vec<TokenId>> {
        let history = |chunk: &Chunk| &self.scheduler.running[&chunk.id].request.history;
        plan.chunks().iter().map(|chunk| history(chunk).with_drafts().to_vec()).collect()
    }

    /// Has the card carry out `plan`, or begin it.
    fn compute(&mut self, plan: Plan) -> Computed {
        self.card.known = self.known(&plan);
        let now = self.now;
        self.scheduler.compute(plan, &mut self.card, &mut |_, _| {}, &|| now)
    }

    /// Carries out `plan` while others meddle, or abandons it.
    fn compute_by_hand(&mut self, plan: Plan) -> Option<Computed> {
        if plan.is_empty() {
            return None;
        }
        // What the engine will read is fixed before anything else happens; its writes come after.
        let known = self.known(&plan);
        let rows = self.scheduler.rows(&plan).zip(&known).zip(plan.chunks());
        let work: Vec<Work> = rows
            .map(|((row, known), chunk)| {
                assert_eq!(row.drafts, chunk.drafts);
                Work::of(&row, known)
            })
            .collect();
        self.drafts += plan.draft_tokens();
        self.accepted += work.iter().map(|work| work.made.sampled.len().saturating_sub(1)).sum::<usize>();
        self.meddle();
        let mut made: Vec<Yield> = work.into_iter().map(|work| work.carry_out(&mut self.card.memory)).collect();
        if self.random.one_in(20) {
            self.scheduler.abandon(plan);
            return None;
        }
        Some(self.scheduler.complete(plan, &mut made, self.now))
    }

    fn take(&mut self, computed: Computed) {
        assert!(computed.faults.is_empty(), "{:?}", computed.faults);
        for reported in &computed.reported {
            let expected = &mut self.live.get_mut(&reported.id).expect("only live sequences report").reported;
            assert!(reported.position <= *expected, "without a gap");
            *expected = (*expected).max(reported.position + reported.tokens.len());
        }
        for embedded in computed.embedded {
            let expected = self.live.remove(&embedded.id).expect("only live sequences are embedded");
            assert_eq!(Some(embedded.vector), expected.vector);
            assert!(embedded.ended.hold.is_none());
            self.embedded += 1;
            self.end(embedded.ended);
        }
        for drawn in computed.drawn {
            let expected = self.live.get_mut(&drawn.id).expect("only live sequences draw");
            assert_eq!(
                (drawn.index, drawn.sampled.token),
                expected.tokens[expected.seen],
                "in order, once, and the same"
            );
            assert!(
                expected.seen > 0 || expected.reported >= expected.wanted,
                "a prompt is reported before it goes on"
            );
            expected.seen += 1;
            let last = expected.seen == expected.tokens.len();
            assert_eq!(last, drawn.ended.is_some());
            if let Some((finish, ended)) = drawn.ended {
                assert_eq!(finish, self.live.remove(&drawn.id).unwrap().finish);
                self.end(ended);
            }
        }
    }

    fn check_plan(&self, plan: &Plan) {
        let tokens: usize = plan.chunks().iter().map(|chunk| chunk.tokens).sum();
        assert_eq!(tokens, plan.tokens());
        assert!(tokens <= self.limits.token_budget, "{tokens} over budget");
        assert!(plan.chunks().len() <= self.scheduler.max_sequences());
        let ids: HashSet<SequenceId> = plan.chunks().iter().map(|chunk| chunk.id).collect();
        assert_eq!(ids.len(), plan.chunks().len(), "one chunk per sequence");
        for chunk in plan.chunks() {
            assert!(chunk.tokens > chunk.drafts);
            let sequence = &self.scheduler.running[&chunk.id];
            let end = chunk.start + chunk.tokens;
            let ahead = usize::from(chunk.follows.is_some());
            let whole = end == sequence.request.history.len() + chunk.drafts + ahead;
            assert_eq!(chunk.sample, whole && sequence.draws());
            assert!(whole || end.is_multiple_of(PAGE), "{chunk:?} ends inside a page");
        }
        for id in plan.started() {
            assert!(ids.contains(id), "who starts is part of the step");
        }
    }

    fn check_names(&mut self) {
        let delta = self.scheduler.take_delta();
        for hash in &delta.evicted {
            assert!(self.reader.remove(hash));
        }
        for hash in &delta.stored {
            assert!(self.reader.insert(*hash));
        }
        assert_eq!(self.reader, self.scheduler.pool().named().collect());
    }

    fn idle(&self) -> bool {
        let ended = self.live.is_empty() && !self.scheduler.is_under_way();
        ended && self.queue.is_empty() && self.flights.is_empty() && self.holds.is_empty()
    }
}

/// Runs one world to its end. Returns it for closer looks.
fn simulate(seed: u64) -> World {
    let mut world = World::new(seed);
    let arrivals = 10 + world.random.below(30);
    for _ in 0..arrivals {
        for _ in 0..world.random.below(3) {
            world.arrive();
        }
        world.open();
        world.step();
        world.meddle();
        world.check_names();
    }
    // From here on every sequence ends by itself: bounded work, so a bounded number of steps.
    for _ in 0..20_000 {
        if world.idle() {
            break;
        }
        world.open();
        world.step();
        world.settle_one_flight();
        world.give_back_one();
        world.check_names();
    }
    assert!(world.idle(), "{} sequences never ended", world.live.len());
    let stats = world.scheduler.pool().stats();
    assert_eq!(stats.held(), 0, "pages leaked");
    assert_eq!(world.scheduler.backlog(), Backlog::default());
    assert_eq!(world.scheduler.landings, 0);
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever arrives, is cancelled, lands or gets lost: no page leaks or is shared wrongly, every sequence ends, and each
    /// emits what it would have emitted alone.
    #[test]
    fn every_sequence_ends_as_if_it_were_alone(seed: u64) {
        simulate(seed);
    }
}

#[test]
fn the_simulation_reaches_what_it_is_for() {
    let (mut preempted, mut embedded, mut ended, mut drafts, mut accepted) = (0, 0, 0, 0, 0);
    let (mut followed, mut undecided) = (0, 0);
    for seed in 0..200 {
        let world = simulate(seed);
        preempted += world.preempted;
        embedded += world.embedded;
        ended += world.ended;
        drafts += world.drafts;
        accepted += world.accepted;
        followed += world.card.followed;
        undecided += world.card.undecided;
    }
    assert!(preempted > 50, "only {preempted} preemptions");
    assert!(embedded > 50, "only {embedded} embeddings");
    assert!(ended > 1000, "only {ended} sequences ended");
    assert!(followed > 2000 && undecided > 200, "{followed} rows followed another, {undecided} had no token");
    assert!(accepted > 2000 && drafts - accepted > 2000, "{accepted} of {drafts} drafts were right");
}
