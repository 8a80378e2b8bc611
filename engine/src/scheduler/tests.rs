//! One rule each, in the smallest world that shows it. Pages of 4 tokens.

use super::*;
use crate::{Sampled, Sampling, Step};

const START: Duration = Duration::ZERO;

fn scheduler(pages: usize, token_budget: usize, max_sequences: usize) -> Scheduler {
    let limits = Limits { pages, page_tokens: 4, token_budget, max_sequences, max_model_len: 64, max_waiting: 3 };
    Scheduler::new(limits).unwrap()
}

/// A prompt of `tokens` tokens that shares no prefix with one of another `family`.
fn prompt(family: u32, tokens: u32) -> Request {
    Request {
        history: History::new(b"", (0..tokens).map(|token| family * 100 + token).collect(), 4),
        prompt_tokens: tokens as usize,
        adapter: None,
        sampling: Sampling::default(),
        stop: Stop { max_tokens: 100, min_tokens: 0, ids: vec![] },
        grammar: None,
        prompt_logprobs: None,
        priority: 0,
        until: Until::End,
    }
}

/// What a row yields that draws `token`, if it draws at all.
fn drawn(sample: bool, token: u32) -> Yield {
    if sample { Sampled { token, logprobs: None }.into() } else { Yield::default() }
}

/// An engine of one layer that draws 7 whatever it is asked, unless it `fails`.
struct Fake {
    fails: fn(&[Row<'_>]) -> Option<Error>,
    made: Vec<Yield>,
}

impl Step for Fake {
    fn begin(&mut self, _: &[Row<'_>]) -> Result<bool, Error> {
        Ok(false)
    }

    fn end(&mut self) -> Result<&mut [Yield], Error> {
        unreachable!("nothing is begun")
    }

    fn step(&mut self, rows: &[Row<'_>], on_layer: &mut dyn FnMut(u32)) -> Result<&mut [Yield], Error> {
        if let Some(error) = (self.fails)(rows) {
            return Err(error);
        }
        on_layer(0);
        self.made = rows.iter().map(|_| drawn(true, 7)).collect();
        Ok(&mut self.made)
    }
}

/// Runs one step in which every sequence draws `token`. Returns the plan's chunks as (start, tokens, sample), and what was drawn.
fn step(scheduler: &mut Scheduler, token: u32) -> (Vec<(usize, usize, bool)>, Vec<Drawn>) {
    let plan = scheduler.schedule(START);
    let chunks = plan.chunks().iter().map(|chunk| (chunk.start, chunk.tokens, chunk.sample)).collect();
    let mut made: Vec<Yield> = plan.chunks().iter().map(|chunk| drawn(chunk.sample, token)).collect();
    (chunks, scheduler.complete(plan, &mut made, START).drawn)
}

fn chunks(scheduler: &mut Scheduler) -> Vec<(usize, usize, bool)> {
    step(scheduler, 7).0
}

#[test]
fn a_long_prompt_is_cut_at_page_boundaries() {
    let mut scheduler = scheduler(16, 10, 4);
    scheduler.submit(prompt(0, 21), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 8, false)]);
    assert_eq!(chunks(&mut scheduler), [(8, 8, false)]);
    assert_eq!(chunks(&mut scheduler), [(16, 5, true)]);
    assert_eq!(chunks(&mut scheduler), [(21, 1, true)]);
}

#[test]
fn a_decoding_sequence_does_not_wait_behind_a_prompt() {
    let mut scheduler = scheduler(16, 8, 4);
    scheduler.submit(prompt(0, 4), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 4, true)]);
    scheduler.submit(prompt(1, 20), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(4, 1, true), (0, 4, false)]);
    assert_eq!(chunks(&mut scheduler), [(5, 1, true), (4, 4, false)]);
}

#[test]
fn the_line_goes_by_priority_then_arrival() {
    let mut scheduler = scheduler(16, 32, 1);
    let late = scheduler.submit(Request { priority: 1, ..prompt(0, 4) }, START).unwrap();
    let first = scheduler.submit(prompt(1, 4), START).unwrap();
    let second = scheduler.submit(prompt(2, 4), START).unwrap();
    for expected in [first, second, late] {
        let plan = scheduler.schedule(START);
        assert_eq!(plan.started(), [expected]);
        scheduler.abandon(plan);
        assert!(scheduler.cancel(expected, START).is_some());
    }
}

#[test]
fn the_last_token_of_a_cached_prompt_is_computed_again() {
    let mut scheduler = scheduler(16, 32, 2);
    let first = scheduler.submit(prompt(0, 12), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 12, true)]);
    assert!(scheduler.cancel(first, START).is_some());
    let again = scheduler.submit(prompt(0, 12), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(8, 4, true)]);
    assert_eq!(scheduler.cancel(again, START).unwrap().usage.cached_tokens, 8);
}

#[test]
fn prefixes_are_forgotten_all_or_none() {
    let mut scheduler = scheduler(16, 32, 2);
    let under_way = scheduler.submit(prompt(0, 12), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 12, true)]);
    let _ = scheduler.take_delta();
    assert!(!scheduler.forget_prefixes());
    assert!(scheduler.take_delta().is_empty());
    assert!(scheduler.cancel(under_way, START).is_some());
    assert!(scheduler.forget_prefixes());
    assert_eq!((scheduler.take_delta().evicted.len(), scheduler.pool().stats().free), (3, 16));
    scheduler.submit(prompt(0, 12), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 12, true)], "all of it is computed again");
}

#[test]
fn the_last_of_the_batch_pays_for_the_first() {
    // Room for two sequences of three pages each; then the first one needs a fourth.
    let mut scheduler = scheduler(6, 32, 2);
    let first = scheduler.submit(prompt(0, 8), START).unwrap();
    let last = scheduler.submit(prompt(1, 8), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 8, true), (0, 8, true)]);
    for position in 8..12 {
        assert_eq!(chunks(&mut scheduler), [(position, 1, true), (position, 1, true)]);
    }
    let plan = scheduler.schedule(START);
    assert_eq!(plan.preempted(), [last]);
    assert_eq!(plan.chunks(), [Chunk { id: first, start: 12, tokens: 1, drafts: 0, sample: true, follows: None }]);
    scheduler.abandon(plan);
    // The victim comes back when there is room. The end of its prefix went to the first one; what is cached is not computed again.
    assert!(scheduler.cancel(first, START).is_some());
    let (chunks, drawn) = step(&mut scheduler, 7);
    assert_eq!(chunks, [(8, 5, true)]);
    assert_eq!(drawn[0].index, 5);
}

#[test]
fn stop_ids_come_before_length() {
    let ends = |token, max_tokens| {
        let mut scheduler = scheduler(16, 32, 2);
        let stop = Stop { max_tokens, min_tokens: 0, ids: vec![2] };
        scheduler.submit(Request { stop, ..prompt(0, 4) }, START).unwrap();
        step(&mut scheduler, token).1.remove(0).ended.map(|(finish, _)| finish)
    };
    assert_eq!(ends(2, 1), Some(Finish::Stop(2)));
    assert_eq!(ends(3, 1), Some(Finish::Length));
    assert_eq!(ends(3, 2), None);
}

#[test]
fn stop_ids_are_forbidden_until_min_tokens() {
    let mut scheduler = scheduler(16, 32, 2);
    let stop = Stop { max_tokens: 9, min_tokens: 1, ids: vec![2] };
    scheduler.submit(Request { stop, ..prompt(0, 4) }, START).unwrap();
    for known in [4, 5] {
        let plan = scheduler.schedule(START);
        let sample = scheduler.rows(&plan).next().unwrap().sample.unwrap();
        assert_eq!(
            (sample.forbidden, sample.min_tokens, sample.history.len() - sample.prompt_tokens),
            (&[2][..], 1, known - 4)
        );
        assert_eq!(scheduler.complete(plan, &mut [drawn(true, 7)], START).drawn.len(), 1);
    }
}

#[test]
fn output_is_counted_from_the_prompt_whoever_emitted_it() {
    let mut scheduler = scheduler(16, 32, 2);
    let stop = Stop { max_tokens: 3, min_tokens: 0, ids: vec![] };
    scheduler.submit(Request { prompt_tokens: 4, stop, ..prompt(0, 6) }, START).unwrap();
    let drawn = step(&mut scheduler, 7).1.remove(0);
    assert_eq!((drawn.index, drawn.ended.unwrap().0), (2, Finish::Length));
}

#[test]
fn a_handed_off_sequence_keeps_its_pages_until_they_are_given_back() {
    let mut scheduler = scheduler(16, 32, 2);
    scheduler.submit(Request { until: Until::FirstToken, ..prompt(0, 9) }, START).unwrap();
    let (finish, ended) = step(&mut scheduler, 7).1.remove(0).ended.unwrap();
    assert_eq!(finish, Finish::FirstToken);
    assert_eq!(scheduler.pool().stats().held(), 3);
    scheduler.give_back(ended.hold.unwrap());
    assert_eq!(scheduler.pool().stats().held(), 0);
    assert_eq!(scheduler.pool().stats().cached, 2, "full pages stay findable");
}

#[test]
fn a_cancel_in_the_middle_of_a_step_frees_pages_after_it() {
    let mut scheduler = scheduler(2, 32, 2);
    let id = scheduler.submit(prompt(0, 6), START).unwrap();
    let plan = scheduler.schedule(START);
    assert!(scheduler.cancel(id, START).is_some());
    let ticket = scheduler.ticket(0);
    assert_eq!(scheduler.reserve(ticket, &[], 3).unwrap_err(), NoRoom::Now, "the step still writes them");
    assert!(scheduler.complete(plan, &mut [drawn(true, 7)], START).drawn.is_empty());
    let landing = scheduler.reserve(ticket, &[], 3).unwrap();
    let hold = scheduler.forgo(landing);
    scheduler.give_back(hold);
}

#[test]
fn a_landing_does_not_pass_the_line() {
    let mut scheduler = scheduler(8, 32, 3);
    let running = scheduler.submit(prompt(0, 16), START).unwrap();
    assert_eq!(chunks(&mut scheduler).len(), 1);
    scheduler.submit(prompt(1, 20), START).unwrap();
    assert!(chunks(&mut scheduler).len() == 1, "too long for what is left");
    let late = scheduler.ticket(0);
    assert_eq!(scheduler.reserve(late, &[], 4).unwrap_err(), NoRoom::Now);
    let urgent = scheduler.ticket(-1);
    let landing = scheduler.reserve(urgent, &[], 4).unwrap();
    let hold = scheduler.forgo(landing);
    scheduler.give_back(hold);
    assert!(scheduler.cancel(running, START).is_some());
    assert_eq!(chunks(&mut scheduler), [(0, 20, true)]);
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = scheduler(4, 32, 2);
    assert_eq!(scheduler.submit(prompt(0, 16), START), Err(Refusal::TooLong { tokens: 16, max_len: 16 }));
    let ticket = scheduler.ticket(0);
    assert_eq!(scheduler.reserve(ticket, &[], 16).unwrap_err(), NoRoom::Ever);
    for _ in 0..3 {
        assert!(scheduler.submit(prompt(0, 4), START).is_ok());
    }
    assert_eq!(scheduler.submit(prompt(0, 4), START), Err(Refusal::Full { waiting: 3 }));
}

#[test]
fn a_row_that_cannot_be_computed_ends_alone() {
    let mut scheduler = scheduler(16, 32, 4);
    let ids: Vec<_> = (0..3).map(|family| scheduler.submit(prompt(family, 5), START).unwrap()).collect();
    let plan = scheduler.schedule(START);
    let mut layers = Vec::new();
    let computed = scheduler.compute(
        plan,
        &mut Fake {
            fails: |rows| {
                let broken = rows.iter().any(|row| row.tokens[0] == 100);
                broken.then(|| Error::Row("row 1 is broken".into()))
            },
            made: Vec::new(),
        },
        &mut |chunks, layer| layers.push((chunks[0].id, layer)),
        &|| START,
    );
    assert_eq!(computed.drawn.iter().map(|drawn| drawn.id).collect::<Vec<_>>(), [ids[0], ids[2]]);
    assert_eq!(computed.faults.len(), 1);
    assert_eq!((computed.faults[0].id, &*computed.faults[0].error), (ids[1], "row 1 is broken"));
    assert_eq!(layers, [(ids[0], 0), (ids[2], 0)]);
    assert_eq!(scheduler.backlog().running, 2);
}

#[test]
fn an_engine_that_gives_up_ends_the_whole_step() {
    let mut scheduler = scheduler(16, 32, 4);
    (0..2).for_each(|family| assert!(scheduler.submit(prompt(family, 5), START).is_ok()));
    let plan = scheduler.schedule(START);
    let error = |_: &[Row<'_>]| {
        let source = std::io::ErrorKind::OutOfMemory.into();
        Some(Error::System { action: "allocate", source })
    };
    let mut engine = Fake { fails: error, made: Vec::new() };
    let computed = scheduler.compute(plan, &mut engine, &mut |_, _| {}, &|| START);
    assert_eq!((computed.faults.len(), computed.broken), (2, None));
    assert_eq!(scheduler.pool().stats().held(), 0);
}

#[test]
fn a_card_that_breaks_is_not_asked_again() {
    let mut scheduler = scheduler(16, 32, 4);
    scheduler.submit(prompt(0, 5), START).unwrap();
    let plan = scheduler.schedule(START);
    let error = |_: &[Row<'_>]| Some(Error::card("cuda:0", "wait for a step", "illegal address".into()));
    let mut engine = Fake { fails: error, made: Vec::new() };
    let computed = scheduler.compute(plan, &mut engine, &mut |_, _| {}, &|| START);
    assert_eq!(computed.faults.len(), 1);
    assert_eq!(computed.broken.as_deref(), Some("cuda:0: wait for a step: illegal address"));
}

#[test]
fn the_more_urgent_pass_a_long_prompt_under_way() {
    let mut scheduler = scheduler(16, 8, 4);
    let long = scheduler.submit(Request { priority: 1, ..prompt(0, 24) }, START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 8, false)]);
    let urgent = scheduler.submit(prompt(1, 4), START).unwrap();
    let later = scheduler.submit(Request { priority: 1, ..prompt(2, 4) }, START).unwrap();
    let plan = scheduler.schedule(START);
    let order: Vec<_> = plan.chunks().iter().map(|chunk| (chunk.id, chunk.start, chunk.tokens)).collect();
    assert_eq!(order, [(urgent, 0, 4), (long, 8, 4)]);
    assert!(scheduler.contains(later));
    scheduler.abandon(plan);
}

#[test]
fn whoever_waits_for_a_prefix_is_passed_and_keeps_its_place() {
    let mut scheduler = scheduler(16, 16, 4);
    let waits = scheduler.submit(prompt(0, 12), START).unwrap();
    scheduler.await_prefix(waits, 2);
    assert_eq!(scheduler.backlog().prompts.tokens, 4, "what is on its way needs no computing");
    let next = scheduler.submit(prompt(1, 20), START).unwrap();
    let plan = scheduler.schedule(START);
    assert_eq!(plan.started(), [next]);
    let mut made: Vec<Yield> = plan.chunks().iter().map(|chunk| drawn(chunk.sample, 7)).collect();
    let _ = scheduler.complete(plan, &mut made, START);

    let names = prompt(0, 12).history.hashes()[..2].to_vec();
    let prefix = scheduler.reserve_prefix(&names).expect("there is room");
    assert_eq!((prefix.pages().len(), prefix.have()), (2, 0));
    scheduler.keep_prefix(prefix, &names);
    scheduler.settle_prefix(waits, 8);
    let plan = scheduler.schedule(START);
    let order: Vec<_> = plan.chunks().iter().map(|chunk| (chunk.id, chunk.start, chunk.tokens)).collect();
    assert_eq!(order, [(waits, 8, 4), (next, 16, 4)], "it came first, and two pages of it are here");
    scheduler.abandon(plan);
}

#[test]
fn a_prefix_takes_no_page_that_the_running_may_need() {
    let mut scheduler = scheduler(6, 32, 4);
    let running = scheduler.submit(prompt(0, 10), START).unwrap();
    assert_eq!(chunks(&mut scheduler), [(0, 10, true)]);
    let names = |tokens| prompt(1, tokens).history.hashes().to_vec();
    assert!(scheduler.reserve_prefix(&names(12)).is_none(), "three pages are left, and one of them is spoken for");
    let prefix = scheduler.reserve_prefix(&names(8)).expect("two are not");
    let hold = prefix.forgo();
    scheduler.give_back(hold);
    assert_eq!(scheduler.lend(&names(8)).pages().len(), 0, "what never came has no name");
    let lent = scheduler.lend(prompt(0, 8).history.hashes());
    assert!(scheduler.cancel(running, START).is_some());
    assert_eq!(scheduler.pool().stats().held(), 2, "what is lent outlives its sequence");
    scheduler.give_back(lent);
    assert_eq!(scheduler.pool().stats().held(), 0);
}
