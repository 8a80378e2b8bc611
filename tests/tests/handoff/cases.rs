//! What a hand-off promises.

use crate::{
    router::{Router, Said, from_prefill, local, numbered, request, to_decode},
    workers::{Golden, Source, Worker, golden, kv_bytes, longest, named, small, wait_for},
};
use cluster::{MemoryDirectory, State};
use kv_cache::KvDtype;
use kv_transfer::{Outcome, TransportKind};
use proto::{Submit, ended::Reason};
use std::time::{Duration, Instant};

/// One prefill worker, one decode worker, and a stream to each.
struct Pair {
    directory: MemoryDirectory,
    prefill: Worker,
    decode: Worker,
    to_prefill: Router,
    to_decode: Router,
}

impl Pair {
    async fn start(name: &str) -> Self {
        Self::with(name, small(), small()).await
    }

    /// `name` tells the metrics of tests in one process apart.
    async fn with(name: &str, prefill: engine::Config, decode: engine::Config) -> Self {
        let directory = MemoryDirectory::default();
        let prefill = Worker::prefill(&directory, &format!("{name}-p"), prefill).await;
        let decode = Worker::decode(&directory, &format!("{name}-d"), decode).await;
        let to_prefill = Router::attach(&prefill.member).await;
        let to_decode = Router::attach(&decode.member).await;
        Self { directory, prefill, decode, to_prefill, to_decode }
    }

    /// Both workers alike, and hand-offs travel by `kind`.
    async fn over(name: &str, kind: TransportKind, engine: engine::Config) -> Self {
        let directory = MemoryDirectory::default();
        let transfer = || kv_transfer::Config { require: Some(kind), ..Default::default() };
        let named = |side: &str| Some(format!("{name}-{side}"));
        let prefill = prefill_worker::Config { name: named("p"), transfer: transfer(), ..Default::default() };
        let prefill = Worker::prefill_with(&directory, prefill, engine.clone()).await;
        let decode = decode_worker::Config { name: named("d"), transfer: transfer(), ..Default::default() };
        let decode = Worker::decode_with(&directory, decode, engine).await;
        let to_prefill = Router::attach(&prefill.member).await;
        let to_decode = Router::attach(&decode.member).await;
        Self { directory, prefill, decode, to_prefill, to_decode }
    }

    /// Makes the two legs of a request.
    fn legs(&self, attempt: u64, prompt: &[u32], count: usize) -> (Submit, Submit) {
        let handoff = 0xab00 + attempt;
        let first = request(attempt, prompt, count, to_decode(handoff, &self.decode.member));
        let rest = request(attempt, prompt, count, from_prefill(handoff, &self.prefill.member));
        (first, rest)
    }

    async fn submit(&mut self, attempt: u64, prompt: &Golden) {
        let (first, rest) = self.legs(attempt, &prompt.ids, prompt.greedy.len());
        self.to_prefill.submit(first).await;
        self.to_decode.submit(rest).await;
    }

    /// Checks that attempt `attempt` gave the recorded continuation: the first token here, the others there.
    async fn check(&mut self, attempt: u64, prompt: &Golden) {
        let first = self.to_prefill.ended(attempt).await;
        assert_eq!(first.reason(), Some(Reason::HandedOff), "{}: {first:?}", prompt.name);
        assert_eq!(first.tokens, numbered(&prompt.greedy[..1], 0), "{}", prompt.name);
        let rest = self.to_decode.ended(attempt).await;
        assert_eq!(rest.reason(), Some(Reason::Length), "{}: {rest:?}", prompt.name);
        assert_eq!(rest.tokens, numbered(&prompt.greedy, 1), "{}", prompt.name);
    }

    async fn all_pages_back(&mut self) {
        self.to_prefill.all_pages_back().await;
        self.to_decode.all_pages_back().await;
    }
}

async fn local_worker(name: &str, engine: engine::Config) -> (Worker, Router) {
    let worker = Worker::decode(&MemoryDirectory::default(), name, engine).await;
    let router = Router::attach(&worker.member).await;
    (worker, router)
}

fn check_local(said: &Said, prompt: &Golden) {
    assert_eq!(said.reason(), Some(Reason::Length), "{}: {said:?}", prompt.name);
    assert_eq!(said.tokens, numbered(&prompt.greedy, 0), "{}", prompt.name);
}

// ---- local legs ----

#[tokio::test]
async fn local_legs_give_the_recorded_tokens_all_at_once() {
    let (worker, mut router) = local_worker("local", small()).await;
    let prompts = golden();
    for (attempt, prompt) in prompts.iter().enumerate() {
        router.submit(request(attempt as u64, &prompt.ids, prompt.greedy.len(), local())).await;
    }
    for (attempt, prompt) in prompts.iter().enumerate() {
        check_local(&router.ended(attempt as u64).await, prompt);
    }
    router.all_pages_back().await;
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_tiny_pool_preempts_and_changes_no_token() {
    let _guard = telemetry::init(&telemetry::Config::default(), "handoff").unwrap();
    // Two sequences of up to 401 tokens, each of which fits alone.
    let engine = engine::Config { kv_bytes: Some(kv_bytes(30)), max_model_len: Some(450), ..small() };
    let (_worker, mut router) = local_worker("tiny", engine).await;
    let prompts = [named("len1"), Golden { ids: vec![5], ..named("len1") }];
    let mut alone = Vec::new();
    for (attempt, prompt) in prompts.iter().enumerate() {
        router.submit(request(attempt as u64, &prompt.ids, 400, local())).await;
        alone.push(router.ended(attempt as u64).await.tokens);
    }
    assert_eq!(alone[0][..48], numbered(&prompts[0].greedy, 0));
    for (attempt, prompt) in prompts.iter().enumerate() {
        router.submit(request(10 + attempt as u64, &prompt.ids, 400, local())).await;
        router.tokens(10 + attempt as u64, 1).await;
    }
    for (attempt, alone) in alone.iter().enumerate() {
        assert_eq!(&router.ended(10 + attempt as u64).await.tokens, alone);
    }
    router.all_pages_back().await;
    assert!(metric("baton_preemptions_total", "tiny") > 0.0, "nothing was preempted");
}

/// Reads one metric of one worker from what this process exports.
fn metric(name: &str, worker: &str) -> f64 {
    let metrics = telemetry::render_metrics();
    let label = format!("worker=\"{worker}\"");
    let line = metrics.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains(&label));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} of {worker}"))
}

#[tokio::test]
async fn later_attempts_go_on_where_earlier_ones_stopped() {
    let (_worker, mut router) = local_worker("resume", small()).await;
    let prompt = longest();
    let mut submit = request(1, &prompt.ids, prompt.greedy.len(), local());
    submit.tokens = proto::pack(&[&prompt.ids, &prompt.greedy[..20]]);
    router.submit(submit).await;
    let said = router.ended(1).await;
    assert_eq!(said.tokens, numbered(&prompt.greedy, 20));
    assert_eq!(said.reason(), Some(Reason::Length));
}

#[tokio::test]
async fn stop_ids_end_a_leg_with_the_token_emitted() {
    let (_worker, mut router) = local_worker("stop", small()).await;
    let prompt = named("len1");
    let mut submit = request(1, &prompt.ids, prompt.greedy.len(), local());
    submit.stop.as_mut().unwrap().token_ids = vec![prompt.greedy[4]];
    router.submit(submit).await;
    let said = router.ended(1).await;
    assert_eq!(said.tokens, numbered(&prompt.greedy[..5], 0));
    assert_eq!((said.reason(), said.ended.unwrap().stop_token), (Some(Reason::Stop), prompt.greedy[4]));
}

#[tokio::test]
async fn what_is_not_taken_says_why() {
    let (_worker, mut router) = local_worker("refuse", engine::Config { max_model_len: Some(32), ..small() }).await;
    router.submit(request(1, &[5; 32], 8, local())).await;
    let said = router.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::Refused));
    assert_eq!(said.message(), "32 tokens leave no room for output in sequences of at most 32");

    router.submit(request(2, &[5, 2000], 8, local())).await;
    let said = router.ended(2).await;
    assert_eq!(said.reason(), Some(Reason::Invalid));
    assert_eq!(said.message(), "token 1 is 2000, outside the vocabulary of 1031");

    let nowhere = cluster::Member { id: "x".into(), link: "127.0.0.1:1".into(), ..worker_of(&_worker) };
    router.submit(request(3, &[5], 8, to_decode(9, &nowhere))).await;
    assert_eq!(router.ended(3).await.reason(), Some(Reason::Invalid), "a decode worker takes no prefill legs");

    let mut late = request(4, &[5; 20], 9, local());
    late.deadline_ms = 1;
    late.stop.as_mut().unwrap().max_tokens = 1000;
    router.submit(late).await;
    let said = router.ended(4).await;
    assert!(matches!(said.reason(), Some(Reason::Failed | Reason::Length)), "{said:?}");
    router.all_pages_back().await;
}

fn worker_of(worker: &Worker) -> cluster::Member {
    worker.member.clone()
}

#[tokio::test]
async fn a_router_that_goes_away_takes_its_sequences_with_it() {
    let (worker, mut router) = local_worker("gone", small()).await;
    let mut other = Router::attach(&worker.member).await;
    let prompt = longest();
    for attempt in 0..8 {
        router.submit(request(attempt, &prompt.ids, 600, local())).await;
    }
    router.tokens(0, 1).await;
    drop(router);
    other.until("news of the sequences", |other| other.load.pages_free < other.load.pages_total).await;
    other.all_pages_back().await;
}

// ---- hand-offs ----

#[tokio::test]
async fn handed_off_equals_recorded_whatever_comes_first() {
    let mut pair = Pair::start("equal").await;
    let prompts = golden();
    for (attempt, prompt) in prompts.iter().enumerate() {
        pair.submit(attempt as u64, prompt).await;
    }
    for (attempt, prompt) in prompts.iter().enumerate() {
        pair.check(attempt as u64, prompt).await;
    }
    pair.all_pages_back().await;

    // The same ones with the decode leg long before, and long after the hand-off has begun.
    for (attempt, prompt) in prompts.iter().enumerate() {
        let attempt = 100 + attempt as u64;
        let (first, rest) = pair.legs(attempt, &prompt.ids, prompt.greedy.len());
        if attempt.is_multiple_of(2) {
            pair.to_prefill.submit(first).await;
            pair.to_prefill.tokens(attempt, 1).await;
            pair.to_decode.submit(rest).await;
        } else {
            pair.to_decode.submit(rest).await;
            pair.to_decode.submit(request(1000 + attempt, &[5], 1, local())).await;
            pair.to_decode.ended(1000 + attempt).await;
            pair.to_prefill.submit(first).await;
        }
        pair.check(attempt, prompt).await;
    }
    pair.all_pages_back().await;
    let Pair { prefill, decode, directory, .. } = pair;
    prefill.stop().await.unwrap();
    decode.stop().await.unwrap();
    wait_for(&directory, |view| view.members.is_empty().then_some(())).await;
}

#[tokio::test]
async fn handed_off_equals_recorded_over_tcp_and_shared_memory() {
    for kind in [TransportKind::Tcp, TransportKind::Shm] {
        let mut pair = Pair::over(&format!("{kind:?}"), kind, small()).await;
        let prompts = golden();
        for (attempt, prompt) in prompts.iter().enumerate() {
            pair.submit(attempt as u64, prompt).await;
        }
        for (attempt, prompt) in prompts.iter().enumerate() {
            pair.check(attempt as u64, prompt).await;
        }
        pair.all_pages_back().await;
    }
}

/// Pages of 8 bits change the numbers, and a hand-off changes nothing more.
#[tokio::test]
async fn pages_of_every_element_type_are_handed_off_as_they_are() {
    for dtype in KvDtype::ALL {
        // Chunks of less than two pages, so that pages travel half done.
        let engine = engine::Config { kv_dtype: Some(dtype), token_budget: 21, max_sequences: 4, ..small() };
        let (_worker, mut alone) =
            local_worker(&format!("{dtype}-alone"), engine::Config { kv_dtype: Some(dtype), ..small() }).await;
        let mut prompts = golden();
        for (attempt, prompt) in prompts.iter().enumerate() {
            alone.submit(request(attempt as u64, &prompt.ids, prompt.greedy.len(), local())).await;
        }
        for (attempt, prompt) in prompts.iter_mut().enumerate() {
            prompt.greedy = alone.ended(attempt as u64).await.tokens.into_iter().map(|(_, token)| token).collect();
        }
        for kind in [TransportKind::Memory, TransportKind::Shm, TransportKind::Tcp] {
            let mut pair = Pair::over(&format!("{dtype}-{kind:?}"), kind, engine.clone()).await;
            // The second time the prefixes are cached on both sides.
            for attempt in [0, 100] {
                for (index, prompt) in prompts.iter().enumerate() {
                    pair.submit(attempt + index as u64, prompt).await;
                }
                for (index, prompt) in prompts.iter().enumerate() {
                    pair.check(attempt + index as u64, prompt).await;
                }
                pair.all_pages_back().await;
            }
        }
    }
}

#[tokio::test]
async fn workers_with_other_element_types_do_not_link() {
    let other = engine::Config { kv_dtype: Some(KvDtype::Int8), ..small() };
    let fp8 = engine::Config { kv_dtype: Some(KvDtype::Fp8), ..small() };
    let mut pair = Pair::with("dtypes", other, fp8).await;
    let prompt = longest();
    pair.submit(1, &prompt).await;
    let said = pair.to_prefill.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::Refused), "{said:?}");
    assert!(said.message().contains("page layout: dtype: yours int8, ours fp8"), "{said:?}");
}

#[tokio::test]
async fn prompts_in_chunks_land_whole() {
    // Chunks of one and of three pages, and prompts that wait for each other.
    for (name, token_budget) in [("chunk1", 31), ("chunk3", 63)] {
        let engine = engine::Config { token_budget, max_sequences: 4, ..small() };
        let mut pair = Pair::with(name, engine.clone(), small()).await;
        let prompts = golden();
        for (attempt, prompt) in prompts.iter().enumerate() {
            pair.submit(attempt as u64, prompt).await;
        }
        for (attempt, prompt) in prompts.iter().enumerate() {
            pair.check(attempt as u64, prompt).await;
        }
        pair.all_pages_back().await;
    }
}

#[tokio::test]
async fn sampled_continuations_are_the_same_wherever_they_run() {
    let mut pair = Pair::start("sampled").await;
    let prompt = named("len1");
    let sampled = |mut submit: Submit| {
        let sampling = submit.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed, sampling.logprobs) = (0.9, 1234, Some(3));
        submit
    };
    pair.to_decode.submit(sampled(request(1, &prompt.ids, 40, local()))).await;
    let whole = pair.to_decode.ended(1).await.tokens;
    let (first, rest) = pair.legs(2, &prompt.ids, 40);
    pair.to_decode.submit(sampled(rest)).await;
    pair.to_prefill.submit(sampled(first)).await;
    let mut tokens = pair.to_prefill.ended(2).await.tokens;
    tokens.extend(pair.to_decode.ended(2).await.tokens);
    assert_eq!(tokens, whole);
}

#[tokio::test]
async fn a_prefix_that_is_there_is_neither_computed_nor_sent_again() {
    let mut pair = Pair::start("prefix").await;
    let prompt = longest();
    pair.submit(1, &prompt).await;
    pair.check(1, &prompt).await;
    pair.submit(2, &prompt).await;
    pair.check(2, &prompt).await;
    let full = (prompt.ids.len() as u32 - 1) / 16 * 16;
    assert_eq!(pair.to_prefill.legs[&1].ended.as_ref().unwrap().cached_tokens, 0);
    assert_eq!(pair.to_prefill.legs[&2].ended.as_ref().unwrap().cached_tokens, full);
    assert_eq!(pair.to_decode.legs[&1].ended.as_ref().unwrap().cached_tokens, 0);
    assert_eq!(pair.to_decode.legs[&2].ended.as_ref().unwrap().cached_tokens, prompt.ids.len() as u32 / 16 * 16);
    // The page events say the same: the prompt's pages on both, the output's on the decode worker alone.
    let pages = |tokens: usize| tokens / 16;
    pair.all_pages_back().await;
    assert_eq!(pair.to_prefill.cached.len(), pages(prompt.ids.len()));
    assert_eq!(pair.to_decode.cached.len(), pages(prompt.ids.len() + prompt.greedy.len() - 1));
}

#[tokio::test]
async fn a_request_that_ends_with_its_first_token_needs_no_decode_worker() {
    let mut pair = Pair::start("first").await;
    let prompt = longest();
    let (first, rest) = pair.legs(1, &prompt.ids, 1);
    pair.to_decode.submit(rest).await;
    pair.to_prefill.submit(first).await;
    let said = pair.to_prefill.ended(1).await;
    assert_eq!((said.reason(), said.tokens), (Some(Reason::Length), numbered(&prompt.greedy[..1], 0)));
    // The router would cancel; the decode leg may have heard of it already.
    pair.to_decode.cancel(1).await;
    let said = pair.to_decode.ended(1).await;
    assert!(matches!(said.reason(), Some(Reason::Cancelled | Reason::Failed)), "{said:?}");
    pair.all_pages_back().await;
}

#[tokio::test]
async fn a_full_decode_worker_makes_hand_offs_wait_their_turn() {
    let prompt = longest();
    // Room for one such sequence and a bit: the others wait for pages, and some are preempted.
    let pages = (prompt.ids.len() + prompt.greedy.len()).div_ceil(16) as u64 + 4;
    let decode = engine::Config { kv_bytes: Some(kv_bytes(pages)), max_model_len: Some(16 * pages as u32), ..small() };
    let mut pair = Pair::with("full", small(), decode).await;
    let prompts: Vec<Golden> = golden();
    for (attempt, prompt) in prompts.iter().enumerate() {
        pair.submit(attempt as u64, prompt).await;
    }
    for (attempt, prompt) in prompts.iter().enumerate() {
        pair.check(attempt as u64, prompt).await;
    }
    pair.all_pages_back().await;
}

// ---- cancels ----

#[tokio::test]
async fn a_cancel_in_any_phase_gives_all_pages_back() {
    // Small steps, so that there are many moments to cancel at.
    let engine = engine::Config { token_budget: 48, max_sequences: 8, ..small() };
    let mut pair = Pair::with("cancel", engine.clone(), engine).await;
    let prompt = longest();

    // In line, and while the prompt computes (the first one), with the decode leg waiting for pages or not submitted at all.
    for attempt in 0..6 {
        let (first, rest) = pair.legs(attempt, &prompt.ids, 40);
        pair.to_prefill.submit(first).await;
        if attempt.is_multiple_of(2) {
            pair.to_decode.submit(rest).await;
        }
    }
    pair.to_prefill.cancel_all(0..6).await;
    pair.to_decode.cancel_all([0, 2, 4]).await;
    let mut cancelled = 0;
    for attempt in 0..6 {
        let said = pair.to_prefill.ended(attempt).await;
        // The first ones may have been quicker, or their other half was.
        assert!(!matches!(said.reason(), Some(Reason::Stop | Reason::Length | Reason::Invalid)), "{said:?}");
        cancelled += usize::from(said.reason() == Some(Reason::Cancelled));
        if attempt.is_multiple_of(2) {
            let said = pair.to_decode.ended(attempt).await;
            assert!(matches!(said.reason(), Some(Reason::Cancelled | Reason::Failed)), "{said:?}");
        }
    }
    assert!(cancelled > 0, "all were quicker");
    pair.all_pages_back().await;

    // Committed, and the decode worker has never heard of it from the router.
    let (first, _) = pair.legs(10, &prompt.ids[..100], 40);
    pair.to_prefill.submit(first).await;
    pair.to_prefill.tokens(10, 1).await;
    pair.to_prefill.cancel(10).await;
    assert_eq!(pair.to_prefill.ended(10).await.reason(), Some(Reason::Cancelled));
    pair.all_pages_back().await;

    // The decode leg alone, while the pages are on their way: the prefill leg fails or has done its part.
    for attempt in 20..26 {
        let (first, rest) = pair.legs(attempt, &prompt.ids[..150 + attempt as usize], 800);
        pair.to_decode.submit(rest).await;
        pair.to_prefill.submit(first).await;
        if attempt > 22 {
            pair.to_prefill.tokens(attempt, 1).await;
        }
        pair.to_decode.cancel(attempt).await;
        let said = pair.to_decode.ended(attempt).await;
        assert_eq!(said.reason(), Some(Reason::Cancelled));
        let said = pair.to_prefill.ended(attempt).await;
        assert!(matches!(said.reason(), Some(Reason::Failed | Reason::Refused | Reason::HandedOff)), "{said:?}");
    }
    pair.all_pages_back().await;

    // Decoding.
    let (first, rest) = pair.legs(30, &prompt.ids, 600);
    pair.to_decode.submit(rest).await;
    pair.to_prefill.submit(first).await;
    pair.to_decode.tokens(30, 3).await;
    pair.to_decode.cancel(30).await;
    assert_eq!(pair.to_decode.ended(30).await.reason(), Some(Reason::Cancelled));
    pair.all_pages_back().await;

    // And both still work.
    pair.submit(40, &prompt).await;
    pair.check(40, &prompt).await;
}

// ---- deaths and drains ----

#[tokio::test]
async fn a_decode_worker_that_dies_fails_the_hand_off_and_nothing_else() {
    let mut pair = Pair::start("dead-decode").await;
    let prompt = longest();
    // Begun, but the decode worker has not heard of it: the hand-off cannot land before the death.
    let (first, _) = pair.legs(1, &prompt.ids, 40);
    pair.to_prefill.submit(first).await;
    pair.to_prefill.tokens(1, 1).await;
    let died = Instant::now();
    pair.decode.kill().await;
    let said = pair.to_prefill.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::Failed), "{said:?}");
    assert!(died.elapsed() < Duration::from_secs(5), "noticed after {:?}", died.elapsed());
    pair.to_prefill.all_pages_back().await;
    // The prompt's pages are still cached: the next attempt computes next to nothing.
    let second = Worker::decode(&pair.directory, "dead-decode-2", small()).await;
    let mut to_second = Router::attach(&second.member).await;
    pair.to_prefill.submit(request(2, &prompt.ids, prompt.greedy.len(), to_decode(77, &second.member))).await;
    to_second.submit(request(2, &prompt.ids, prompt.greedy.len(), from_prefill(77, &pair.prefill.member))).await;
    assert_eq!(to_second.ended(2).await.tokens, numbered(&prompt.greedy, 1));
    let said = pair.to_prefill.ended(2).await;
    assert!(said.ended.unwrap().cached_tokens > 0);
}

#[tokio::test]
async fn a_prefill_worker_that_dies_fails_its_landings_and_nothing_else() {
    let directory = MemoryDirectory::default();
    let decode = Worker::decode(&directory, "orphan", small()).await;
    let mut router = Router::attach(&decode.member).await;
    let prompt = longest();
    let source = Source::start("dying").await;
    router.submit(request(1, &prompt.ids, 40, from_prefill(1, &source.member))).await;
    source.begin(1, prompt.ids.len(), &decode.member);
    router.until("the landing", |router| router.load.handoffs > 0).await;
    router.submit(request(9, &prompt.ids, prompt.greedy.len(), local())).await;
    let died = Instant::now();
    source.alive.cancel();
    let said = router.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::Failed), "{said:?}");
    assert!(died.elapsed() < Duration::from_secs(5), "noticed after {:?}", died.elapsed());
    check_local(&router.ended(9).await, &prompt);
    router.all_pages_back().await;
}

#[tokio::test]
async fn a_landing_that_is_cancelled_gives_its_pages_back_when_the_source_is_quiet() {
    let directory = MemoryDirectory::default();
    let decode = Worker::decode(&directory, "unwanted", small()).await;
    let mut router = Router::attach(&decode.member).await;
    let mut source = Source::start("patient").await;
    source.begin(1, 100, &decode.member);
    router.submit(request(1, &[5; 100], 40, from_prefill(1, &source.member))).await;
    router.until("the landing", |router| router.load.handoffs > 0).await;
    assert_eq!(router.load.pages_total - router.load.pages_free, 7);
    router.cancel(1).await;
    assert_eq!(router.ended(1).await.reason(), Some(Reason::Cancelled));
    let done = source.done().await;
    assert!(matches!(done, Outcome::Aborted(_)), "{done:?}");
    router.all_pages_back().await;
}

#[tokio::test]
async fn a_source_and_a_router_that_disagree_are_both_told() {
    let directory = MemoryDirectory::default();
    let decode = Worker::decode(&directory, "confused", small()).await;
    let mut router = Router::attach(&decode.member).await;
    let mut source = Source::start("wrong").await;
    router.submit(request(1, &[5; 100], 40, from_prefill(1, &source.member))).await;
    source.begin(1, 99, &decode.member);
    let said = router.ended(1).await;
    assert_eq!((said.reason(), said.message()), (Some(Reason::Failed), "100 tokens expected, 99 begun"));
    assert_eq!(source.done().await, Outcome::Refused("100 tokens expected, 99 begun".into()));
    router.all_pages_back().await;
}

#[tokio::test]
async fn a_draining_pair_finishes_what_it_has_and_takes_nothing_new() {
    let mut pair = Pair::start("drain").await;
    let prompt = longest();
    pair.submit(1, &prompt).await;
    pair.to_decode.tokens(1, 1).await;
    pair.decode.shutdown.cancel();
    wait_for(&pair.directory, |view| {
        (view.members.get("drain-d").is_none_or(|member| member.state == State::Draining)).then_some(())
    })
    .await;
    pair.check(1, &prompt).await;
    let Pair { prefill, decode, directory, .. } = pair;
    decode.stop().await.unwrap();
    prefill.stop().await.unwrap();
    wait_for(&directory, |view| view.members.is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_drain_that_takes_too_long_fails_what_is_left() {
    let directory = MemoryDirectory::default();
    let config = decode_worker::Config { name: Some("late".into()), drain_timeout_ms: 50, ..Default::default() };
    let worker = Worker::decode_with(&directory, config, small()).await;
    let mut router = Router::attach(&worker.member).await;
    let expected = request(1, &[5; 40], 40, from_prefill(1, &worker.member));
    router.submit(expected).await;
    router.submit(request(2, &[5; 40], 1, local())).await;
    router.ended(2).await;
    assert!(worker.health.readiness().is_ok());
    let health = worker.health.clone();
    let stopped = tokio::spawn(async { worker.stop().await.unwrap() });
    let said = router.ended(1).await;
    assert_eq!(said.reason(), Some(Reason::Failed), "{said:?}");
    stopped.await.unwrap();
    assert!(health.readiness().is_err());
}
