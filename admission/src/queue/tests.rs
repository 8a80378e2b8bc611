use super::*;
use proptest::prelude::*;

const LIMITS: Limits = Limits { max_running: 2, max_waiting: 4, quantum_tokens: 100 };

fn ask(class: i32, key: u64, tokens: u64) -> Ask {
    Ask { class, key, tokens, share: 1, patience: Duration::from_secs(10), objective: None }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Has it wait, with predictions taken at their word.
fn wait(queue: &mut Queue, now: Duration, ask: Ask) -> Result<Ticket, Refusal> {
    queue.wait(now, ask, &Forecast::default()).map(|waits| waits.ticket)
}

fn pump(queue: &mut Queue, now: Duration) -> Vec<Outcome> {
    let mut out = Vec::new();
    queue.pump(now, &mut out);
    out
}

/// A queue with no turn left, so that everybody waits.
fn busy(limits: Limits) -> Queue {
    let mut queue = Queue::new(limits);
    assert!(queue.pass(limits.max_running, 1));
    queue
}

/// Gives turns one at a time until nobody waits.
fn order(queue: &mut Queue) -> Vec<Ticket> {
    let mut order = Vec::new();
    queue.done(usize::MAX);
    queue.limits.max_running = 1;
    while queue.waiting() > 0 {
        let went = pump(queue, Duration::ZERO);
        assert_eq!(went.len(), 1, "one turn, one goes");
        order.push(went[0].0);
        queue.done(1);
    }
    order
}

#[test]
fn turns_and_room_are_given_back() {
    let mut queue = Queue::new(LIMITS);
    assert!(queue.pass(1, 10) && queue.pass(1, 10) && !queue.pass(1, 10));
    let ticket = wait(&mut queue, ms(0), ask(0, 0, 10)).unwrap();
    assert!(pump(&mut queue, ms(1)).is_empty());
    queue.done(1);
    assert!(!queue.pass(1, 10), "nobody overtakes those who wait");
    assert_eq!(pump(&mut queue, ms(2)), [(ticket, Ok(()))]);
    // Without room nothing goes; the last one that goes may want more than there is.
    queue.done(1);
    queue.supply(Supply { room_tokens: 5, tokens_per_s: 100.0 });
    assert!(queue.pass(1, 10));
    queue.done(2);
    assert!(!queue.pass(1, 1) && !queue.is_supplied());
}

#[test]
fn better_classes_go_first_and_one_turn_in_eight_is_the_oldest_ones() {
    let mut queue = busy(Limits { max_waiting: 100, ..LIMITS });
    let old = wait(&mut queue, ms(0), ask(5, 0, 10)).unwrap();
    let good: Vec<Ticket> = (0..20).map(|_| wait(&mut queue, ms(0), ask(-1, 0, 10)).unwrap()).collect();
    let order = order(&mut queue);
    assert_eq!(order[..7], good[..7]);
    assert_eq!(order[7], old);
    assert_eq!(order[8..], good[7..]);
}

#[test]
fn the_last_of_the_worst_class_makes_room() {
    let mut queue = busy(Limits { max_waiting: 2, ..LIMITS });
    let first = wait(&mut queue, ms(0), ask(1, 0, 10)).unwrap();
    let last = wait(&mut queue, ms(0), ask(1, 7, 10)).unwrap();
    assert!(!queue.is_closed(), "a better class may come");
    assert_eq!(queue.enter(1), Err(Refusal::Full { waiting: 2 }));
    queue.enter(0).unwrap();
    queue.arrived();
    let better = wait(&mut queue, ms(0), ask(0, 0, 10)).unwrap();
    assert_eq!(pump(&mut queue, ms(0)), [(last, Err(Refusal::Full { waiting: 2 }))]);
    assert_eq!(wait(&mut queue, ms(0), ask(1, 0, 10)), Err(Refusal::Full { waiting: 2 }));
    assert_eq!(order(&mut queue), [better, first]);
    let mut queue = busy(Limits { max_waiting: 1, ..LIMITS });
    wait(&mut queue, ms(0), ask(0, 0, 10)).unwrap();
    assert!(queue.is_closed(), "all have been of one class");
}

#[test]
fn arrivals_count_while_they_are_prepared() {
    let mut queue = Queue::new(Limits { max_running: 1, max_waiting: 1, ..LIMITS });
    queue.enter(0).unwrap();
    queue.enter(0).unwrap();
    assert_eq!(queue.enter(0), Err(Refusal::Full { waiting: 2 }));
    queue.arrived();
    assert_eq!(queue.enter(0), Ok(()));
}

#[test]
fn objectives_are_held_against_the_wait_on_arrival_and_while_waiting() {
    let mut queue = busy(LIMITS);
    queue.supply(Supply { room_tokens: 1_000, tokens_per_s: 1_000.0 });
    wait(&mut queue, ms(0), ask(0, 0, 500)).unwrap();
    let with = |ttft| Ask { objective: Some(Objective { ttft: ms(ttft), service_ms: 100.0 }), ..ask(0, 0, 10) };
    // Half a second of tokens is ahead of it, and 100 ms of its own.
    assert_eq!(wait(&mut queue, ms(0), with(550)), Err(Refusal::TooSlow { predicted: ms(600) }));
    let mut careful = Forecast::default();
    careful.learn(100.0, ms(1_000));
    assert!(queue.wait(ms(0), with(650), &careful).is_err(), "what lately was late counts");
    let Waits { ticket, promised_ms } = queue.wait(ms(0), with(650), &Forecast::default()).unwrap();
    assert_eq!(promised_ms, Some(600.0));
    assert!(pump(&mut queue, ms(649)).is_empty(), "it was let in, so it may go as long as its token is not overdue");
    assert_eq!(pump(&mut queue, ms(650)), [(ticket, Err(Refusal::TooSlow { predicted: ms(750) }))]);
    assert_eq!(queue.waiting(), 1);
    let gone = pump(&mut queue, ms(10_000));
    assert!(matches!(gone[..], [(_, Err(Refusal::Expired { waited }))] if waited == ms(10_000)));
}

#[test]
fn the_pace_is_learned_from_what_goes() {
    let mut queue = busy(Limits { max_waiting: 1_000, ..LIMITS });
    queue.supply(Supply { room_tokens: i64::MAX, tokens_per_s: 1_000_000.0 });
    for _ in 0..200 {
        wait(&mut queue, ms(0), ask(0, 0, 100)).unwrap();
    }
    for i in 0..90 {
        queue.done(1);
        assert_eq!(pump(&mut queue, ms(100 * (i + 1))).len(), 1);
    }
    // What the workers promise no longer counts for much against nine seconds at a thousand tokens a second.
    let pace = queue.pace.tokens_per_s(1_000.0);
    assert!((pace / 1_000.0 - 1.0).abs() < 0.05, "{pace}");
}

#[test]
fn what_a_key_took_more_than_it_asked_for_is_charged_to_it() {
    let mut queue = busy(Limits { max_waiting: 100, ..LIMITS });
    let tickets: Vec<Ticket> = (0..8).map(|i| wait(&mut queue, ms(0), ask(0, i % 2, 100)).unwrap()).collect();
    queue.settle(0, 0, 300);
    queue.settle(0, 9, 300);
    let order = order(&mut queue);
    let ahead = order.iter().take_while(|ticket| *ticket != &tickets[0]).count();
    assert_eq!(ahead, 3, "three quanta go to the other key first: {order:?}");
}

/// What may happen to a queue.
#[derive(Clone, Debug)]
enum Event {
    Enter(i32),
    Ask { class: i32, key: u64, tokens: u64, share: usize, ttft: Option<u64> },
    GiveUp(usize),
    Done,
    Supply(i64),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let ask = (-2i32..3, 0u64..4, 0u64..2_000, 1usize..5, proptest::option::of(0u64..3_000));
    prop_oneof![
        1 => (-2i32..3).prop_map(Event::Enter),
        6 => ask.prop_map(|(class, key, tokens, share, ttft)| Event::Ask { class, key, tokens, share, ttft }),
        1 => (0usize..20).prop_map(Event::GiveUp),
        3 => Just(Event::Done),
        2 => (-100i64..5_000).prop_map(Event::Supply),
        2 => (0u64..3_000).prop_map(Event::Pass),
    ]
}

proptest! {
    /// Bounds hold, nobody is lost or answered twice, nobody goes after their deadline, and nothing waits while something could go.
    #[test]
    fn whatever_happens_the_queue_is_sound(events in proptest::collection::vec(event(), 1..200), max_running in 1usize..6, max_waiting in 0usize..8) {
        let limits = Limits { max_running, max_waiting, quantum_tokens: 256 };
        let (mut queue, mut now) = (Queue::new(limits), Duration::ZERO);
        let (mut waiting, mut running, mut room) = (BTreeMap::new(), Vec::new(), i64::MAX);
        for event in events {
            match event {
                Event::Enter(class) => {
                    let full = queue.waiting() >= max_waiting && running.iter().sum::<usize>() == max_running;
                    let worst = waiting.values().map(|ask: &(Ask, Duration)| ask.0.class).max();
                    if queue.enter(class).is_ok() {
                        prop_assert!(!full || worst.is_some_and(|worst| worst > class));
                        queue.arrived();
                    }
                }
                Event::Ask { class, key, tokens, share, ttft } => {
                    let objective = ttft.map(|ttft| Objective { ttft: ms(ttft), service_ms: 200.0 });
                    let ask = Ask { class, key, tokens, share, patience: ms(2_000), objective };
                    match wait(&mut queue, now, ask) {
                        Ok(ticket) => {
                            let by = objective.map_or(ms(2_000), |o| o.ttft.min(ms(2_000)));
                            prop_assert!(waiting.insert(ticket, (ask, now + by)).is_none());
                        }
                        Err(Refusal::TooSlow { predicted }) => prop_assert!(predicted > objective.unwrap().ttft),
                        Err(Refusal::Full { .. }) => {
                            prop_assert!(waiting.len() >= max_waiting && waiting.values().all(|(a, _)| a.class <= class));
                        }
                        Err(other) => prop_assert!(false, "{other:?}"),
                    }
                }
                Event::GiveUp(index) => {
                    if let Some(ticket) = waiting.keys().nth(index).copied() {
                        waiting.remove(&ticket);
                        prop_assert!(queue.give_up(ticket) && !queue.give_up(ticket));
                    }
                }
                Event::Done => if let Some(share) = running.pop() { queue.done(share) },
                Event::Supply(tokens) => {
                    room = tokens;
                    queue.supply(Supply { room_tokens: tokens, tokens_per_s: 1_000.0 });
                }
                Event::Pass(after) => now += ms(after),
            }
            for (ticket, outcome) in pump(&mut queue, now) {
                let (ask, deadline) = waiting.remove(&ticket).expect("one answer each, and only to those who wait");
                match outcome {
                    Ok(()) => {
                        prop_assert!(now < deadline && room > 0);
                        room = room.saturating_sub_unsigned(ask.tokens);
                        running.push(ask.share.min(max_running));
                    }
                    Err(Refusal::Full { .. }) => {}
                    Err(_) => prop_assert!(now >= deadline),
                }
            }
            prop_assert_eq!(queue.waiting(), waiting.len());
            prop_assert!(waiting.len() <= max_waiting);
            let taken: usize = running.iter().sum();
            prop_assert!(taken <= max_running);
            prop_assert!(waiting.values().all(|(_, deadline)| now < *deadline));
            // The largest share that asks is four: with that much free, and room, nobody is left waiting.
            prop_assert!(waiting.is_empty() || room <= 0 || max_running - taken < 4.min(max_running));
        }
        // The books close: with everything gone, no trace is left.
        now += ms(5_000);
        pump(&mut queue, now);
        prop_assert!(queue.waiting.is_empty() && queue.deadlines.is_empty() && queue.classes.is_empty());
    }

    /// Two keys that always have something waiting never differ by more than a quantum and a request each.
    #[test]
    fn keys_share_by_tokens(sizes in proptest::collection::vec((1u64..400, 1u64..400), 20..60), quantum in 50u64..500) {
        let mut queue = busy(Limits { max_running: 1, max_waiting: 1_000, quantum_tokens: quantum });
        let mut of = HashMap::new();
        for (a, b) in &sizes {
            for (key, tokens) in [(0u64, *a), (1, *b)] {
                of.insert(wait(&mut queue, ms(0), ask(0, key, tokens)).unwrap(), (key, tokens));
            }
        }
        let largest = of.values().map(|(_, tokens)| *tokens).max().unwrap();
        let (mut got, mut left) = ([0i64; 2], [sizes.len(); 2]);
        queue.done(1);
        for turn in 0.. {
            // The aged turns are not the round's: they are put off here.
            queue.turns = turn * AGED_TURN;
            let Some((ticket, Ok(()))) = pump(&mut queue, ms(0)).first().copied() else { break };
            queue.done(1);
            let (key, tokens) = of[&ticket];
            got[key as usize] += tokens as i64;
            left[key as usize] -= 1;
            if left.contains(&0) {
                break;
            }
            let apart = (got[0] - got[1]).unsigned_abs();
            prop_assert!(apart <= quantum + 2 * largest, "{got:?} with a quantum of {quantum}");
        }
    }

    /// However many of better classes keep coming, whoever is behind `n` others is out after `AGED_TURN * (n + 1)` turns.
    #[test]
    fn nobody_starves(ahead in 0usize..20, class in 1i32..100, tokens in 1u64..100_000) {
        let mut queue = busy(Limits { max_running: 1, max_waiting: 10_000, quantum_tokens: 100 });
        for _ in 0..ahead {
            wait(&mut queue, ms(0), ask(0, 0, 10)).unwrap();
        }
        let poor = wait(&mut queue, ms(0), ask(class, 1, tokens)).unwrap();
        queue.done(1);
        for turn in 1..=AGED_TURN * (ahead as u64 + 1) {
            for _ in 0..2 {
                wait(&mut queue, ms(0), ask(-5, 0, 10)).unwrap();
            }
            let went = pump(&mut queue, ms(0));
            queue.done(1);
            if went[0].0 == poor {
                return Ok(());
            }
            prop_assert!(turn < AGED_TURN * (ahead as u64 + 1), "still there after {turn} turns");
        }
    }
}
