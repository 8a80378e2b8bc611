use super::*;
use placement::Weights;
use proptest::prelude::*;
use std::{path::Path, time::Duration};
use workload::{Arrivals, Format, Objectives, Request, Trace};

fn config(policy: Policy, prefill: usize, decode: usize) -> Config {
    let profile = a800();
    let weights = Weights {
        prior: profile.pace,
        prior_link_bytes_per_s: 1e11,
        expected_output_tokens: 300,
        fetch_pages: 1,
        ..Weights::default()
    };
    Config {
        prefill,
        decode,
        profile,
        slow: Vec::new(),
        page_tokens: 128,
        token_budget: 4_096,
        max_sequences: 256,
        link_bytes_per_s: 1e11,
        message: Duration::from_micros(300),
        policy,
        placement: placement::Policy::Auto,
        weights,
        index_bytes: 64 << 20,
        seed: 0,
        objectives: Objectives::default(),
    }
}

/// The part of a trace of Mooncake's that is kept here.
fn slice(name: &str) -> Trace {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/traces/mooncake_{name}_300.jsonl"));
    Trace::read(&file, Format::Mooncake).unwrap()
}

fn conversations() -> Trace {
    slice("conversation")
}

fn mean_ttft(outcome: &Outcome) -> f64 {
    outcome.summary.ttft.mean.as_secs_f64()
}

#[test]
fn the_published_order_is_found_again() {
    // Eight nodes with a third of the trace's load each would idle: three of each kind carry it.
    let order = [Policy::Random, Policy::LeastLoaded, Policy::CacheAware, Policy::Global, Policy::Baton];
    let ttft = order.map(|policy| mean_ttft(&run(&config(policy, 6, 6), &conversations())));
    assert!(ttft.windows(2).all(|pair| pair[0] > pair[1]), "{ttft:?}");
}

#[test]
fn the_same_seed_is_the_same_hour() {
    let once = |seed| run(&Config { seed, ..config(Policy::Random, 2, 2) }, &conversations().first(60)).summary;
    assert_eq!(once(1), once(1));
    assert_ne!(once(1), once(2));
}

/// Requests that all begin alike, of which each has a part of its own.
fn one_prefix(count: usize, per_s: f64) -> Trace {
    let mut trace = Trace::uniform(count, 16_384, 50, 12_288);
    let gap = Duration::from_secs_f64(1.0 / per_s);
    for (number, request) in trace.requests.iter_mut().enumerate() {
        request.at = gap * number as u32;
    }
    trace
}

#[test]
fn a_hot_prefix_spreads_and_nobody_idles_beside_a_crowd() {
    let outcome = run(&config(Policy::Baton, 6, 4), &one_prefix(400, 6.0));
    assert!(outcome.cached > 0.6, "{outcome:?}");
    assert!(outcome.idle_beside_crowd_s < 5.0, "{outcome:?}");
    let sticky = run(&config(Policy::Sticky, 6, 4), &one_prefix(400, 6.0));
    assert!(mean_ttft(&sticky) > 2.0 * mean_ttft(&outcome), "{} and {}", mean_ttft(&sticky), mean_ttft(&outcome));
}

#[test]
fn a_slow_node_gets_less_and_nobody_idles_beside_its_crowd() {
    let slow = |policy| Config { slow: vec![(0, 5.0), (5, 3.0)], ..config(policy, 4, 4) };
    let trace = || Trace::uniform(300, 8_192, 100, 0);
    let spread = || {
        let mut trace = trace();
        trace.requests.iter_mut().enumerate().for_each(|(n, r)| r.at = Duration::from_millis(500 * n as u64));
        trace
    };
    let (baton, in_turn) = (run(&slow(Policy::Baton), &spread()), run(&slow(Policy::RoundRobin), &spread()));
    assert!(baton.idle_beside_crowd_s < 5.0, "{baton:?}");
    assert!(mean_ttft(&in_turn) > 3.0 * mean_ttft(&baton), "{} and {}", mean_ttft(&in_turn), mean_ttft(&baton));
}

#[test]
fn on_traces_nobody_idles_beside_a_crowd() {
    for name in ["conversation", "synthetic"] {
        // Three times as fast: all of four nodes have a line, and it takes them minutes.
        let outcome = run(&config(Policy::Baton, 4, 4), &slice(name).faster(3.0));
        assert!(outcome.summary.ttft.p50 > Duration::from_secs(10), "{name} is no load: {outcome:?}");
        assert!(outcome.idle_beside_crowd_s < 5.0, "{name}: {outcome:?}");
    }
}

#[test]
fn decode_workers_compute_all_prompts_where_there_is_nobody_else() {
    let outcome = run(&config(Policy::Baton, 0, 3), &conversations().first(40));
    assert_eq!((outcome.summary.failed, outcome.local), (0, 40));
    let remote = Config { placement: placement::Policy::Remote, ..config(Policy::Baton, 1, 2) };
    assert_eq!(run(&remote, &conversations().first(40)).local, 0);
}

#[test]
fn what_no_worker_can_hold_fails_and_nothing_else_does() {
    let mut trace = conversations().first(20);
    trace.requests[7] =
        Request { at: trace.requests[7].at, input_tokens: 2_000_000, output_tokens: 5, blocks: (0..4_000).collect() };
    let outcome = run(&config(Policy::Baton, 1, 1), &trace);
    assert_eq!((outcome.summary.requests, outcome.summary.failed), (20, 1));
}

fn policy() -> impl Strategy<Value = Policy> {
    proptest::sample::select(Policy::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Small pools and long prompts, so that sequences wait for pages, are preempted and land late.
    #[test]
    fn every_request_gets_all_of_its_tokens(
        policy in policy(),
        workers in (1usize..4, 1usize..4),
        kv_tokens in 3_000u64..20_000,
        seed in 0u64..1_000,
        requests in proptest::collection::vec((1usize..2_000, 1usize..60, 0u64..5, 0u64..40), 1..60),
    ) {
        let mut trace = Trace { requests: Vec::new(), block_tokens: 64 };
        for (number, (input_tokens, output_tokens, family, at)) in requests.into_iter().enumerate() {
            let blocks = input_tokens.div_ceil(64) as u64;
            let own = |block: u64| if block < 8 { family * 1_000 + block } else { 1_000_000 + number as u64 * 1_000 + block };
            let at = Duration::from_millis(100 * at);
            trace.requests.push(Request { at, input_tokens, output_tokens, blocks: (0..blocks).map(own).collect() });
        }
        trace.requests.sort_by_key(|request| request.at);
        let mut config = Config { seed, page_tokens: 16, token_budget: 512, ..config(policy, workers.0, workers.1) };
        config.profile.kv_tokens = kv_tokens;
        // The simulation itself asserts that no page is given back twice or held for ever, and that every leg ends.
        let outcome = run(&config, &trace);
        prop_assert_eq!(outcome.summary.failed, 0);
        prop_assert_eq!(outcome.summary.e2e.count, trace.requests.len());
        let tokens: usize = trace.requests.iter().map(|request| request.output_tokens).sum();
        prop_assert_eq!(outcome.summary.itl.count + trace.requests.len(), tokens);
    }
}

#[test]
fn arrivals_of_any_kind_can_be_played() {
    let trace = conversations().first(40).arriving(Arrivals::Poisson, 2.0, 1);
    assert_eq!(run(&config(Policy::Baton, 2, 2), &trace).summary.failed, 0);
}
