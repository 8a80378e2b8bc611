use super::{load, small_config, watched};
use crate::{Config, Engine, Error, Pooling, PromptLogprobs, Row, Sample, Sampling, TokenId, Yield};
use kv_cache::PageId;
use std::time::{Duration, Instant};
use timing::{Pace, Profile};

const PACE: Pace = Pace { step_us: 200.0, sequence_us: 10.0, context_ns: 0.0, token_us: 20.0, pair_ns: 0.0 };

fn profile(pace: Pace) -> Profile {
    let (model, machine, source) = ("m".into(), "x".into(), "a test".into());
    Profile { model, machine, source, kv_bytes_per_token: 1, kv_tokens: 100 * 16 + 7, pace }
}

fn engine(pace: Pace) -> Engine {
    Engine::timed(load("tests/golden/llama"), &small_config(), &profile(pace)).expect("an engine")
}

fn sample<'a>(sampling: &'a Sampling, history: &'a [TokenId]) -> Sample<'a> {
    Sample { sampling, history, prompt_tokens: 4, forbidden: &[], min_tokens: 0, grammar: None }
}

/// Goes on after `history` for `count` tokens, having computed the prompt in chunks of `chunk`.
fn generate(
    engine: &mut Engine,
    mut history: Vec<TokenId>,
    sampling: &Sampling,
    count: usize,
    chunk: usize,
) -> Vec<TokenId> {
    let pages: Vec<PageId> = (0..100).map(PageId).collect();
    let (mut start, end) = (0, history.len() + count);
    while history.len() < end {
        let tokens = history[start..].iter().copied().take(chunk).collect::<Vec<_>>();
        let last = start + tokens.len() == history.len();
        let sample = last.then(|| sample(sampling, &history));
        let row = Row { tokens: &tokens, start, pages: &pages, sample, ..Row::default() };
        let yields: &[Yield] = engine.step(&[row], &mut |_| {}).expect("a step");
        start += tokens.len();
        let drawn = yields[0].sampled.first().map(|sampled| sampled.token);
        assert_eq!(drawn.is_some(), last);
        history.extend(drawn);
    }
    history.split_off(end - count)
}

#[test]
fn a_step_takes_its_time_layer_by_layer() {
    let mut engine = engine(Pace { token_us: 500.0, ..PACE });
    let layers = engine.memory().layout().layers;
    let pages: Vec<PageId> = (0..2).map(PageId).collect();
    let row = Row { tokens: &[1; 20], pages: &pages, ..Row::default() };
    let (began, mut told) = (Instant::now(), Vec::new());
    engine.step(&[row], &mut |layer| told.push((layer, began.elapsed()))).expect("a step");
    // Twenty tokens of 500 us; a layer is never early.
    let share = Duration::from_millis(10) / layers;
    assert_eq!(told.len(), layers as usize);
    for (index, (layer, at)) in told.into_iter().enumerate() {
        assert!(layer as usize == index && at >= share * (layer + 1), "layer {layer} after {at:?}");
    }
}

#[test]
fn tokens_follow_from_what_was_said_whatever_is_beside_it() {
    let mut engine = engine(PACE);
    let prompt = vec![5, 6, 7, 8];
    for sampling in [Sampling::default(), watched(), Sampling { temperature: 1.0, seed: 7, ..Sampling::default() }] {
        let whole = generate(&mut engine, prompt.clone(), &sampling, 40, 64);
        assert_eq!(generate(&mut engine, prompt.clone(), &sampling, 40, 3), whole);
        // Placed again in the middle, on another worker.
        let so_far = [&prompt[..], &whole[..17]].concat();
        assert_eq!(generate(&mut self::engine(PACE), so_far, &sampling, 23, 64), whole[17..]);
        let eos = &engine.model().info().eos;
        assert!(whole.iter().all(|token| !eos.contains(token)), "{whole:?} ends at {eos:?}");
    }
    let greedy = generate(&mut engine, prompt.clone(), &Sampling::default(), 40, 64);
    assert_eq!(generate(&mut engine, prompt.clone(), &watched(), 40, 64), greedy, "with and without logits");
    let sampled = |seed| Sampling { temperature: 2.0, seed, ..Sampling::default() };
    assert_ne!(
        generate(&mut engine, prompt.clone(), &sampled(1), 40, 64),
        generate(&mut engine, prompt, &sampled(2), 40, 64)
    );
}

#[test]
fn its_pages_are_the_profiles_and_nobody_elses() {
    let timed = engine(PACE);
    assert_eq!(timed.memory().layout().pages, 100);
    let computing = Engine::new(timed.model().clone(), &small_config()).expect("an engine");
    assert_ne!(timed.fingerprint(), computing.fingerprint());
    assert_eq!(timed.fingerprint(), engine(PACE).fingerprint());
    assert_eq!(timed.memory().layout().layers, computing.memory().layout().layers);
    let long = Config { max_model_len: Some(1600), ..small_config() };
    assert!(timed.model().info().max_position < 1600, "the checkpoint was made for less");
    let timed = Engine::timed(timed.model().clone(), &long, &profile(PACE)).expect("an engine");
    assert_eq!(timed.max_model_len(), 1600);
    let longer = Config { max_model_len: Some(1601), ..small_config() };
    let problem = Engine::timed(timed.model().clone(), &longer, &profile(PACE)).expect_err("no room").to_string();
    assert!(problem.contains("1601") && problem.contains("1600"), "{problem}");
}

#[test]
fn log_probabilities_are_numbers_and_embeddings_are_refused() {
    let mut engine = engine(PACE);
    let pages = [PageId(0)];
    let prompt_logprobs = Some(PromptLogprobs { targets: &[2, 3], top: 1 });
    let row = Row { tokens: &[1, 2, 3], pages: &pages, prompt_logprobs, ..Row::default() };
    let reported = engine.step(&[row], &mut |_| {}).expect("a step")[0].prompt_logprobs.clone();
    assert_eq!(reported.len(), 2);
    let row = Row { tokens: &[1], pages: &pages, pooling: Some(Pooling::Last), ..Row::default() };
    let problem = engine.step(&[row], &mut |_| {}).expect_err("no hidden states");
    assert!(matches!(&problem, Error::Row(why) if why.contains("timed")), "{problem}");
}
