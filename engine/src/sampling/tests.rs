use super::*;

fn drawn(logits: &[f32], sampling: &Sampling) -> Sampled {
    drawn_after(logits, sampling, &[], 0, &[])
}

fn drawn_after(
    logits: &[f32],
    sampling: &Sampling,
    history: &[TokenId],
    prompt_tokens: usize,
    forbidden: &[TokenId],
) -> Sampled {
    draw(logits, &Sample { sampling, history, prompt_tokens, forbidden })
}

fn warm() -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::default() }
}

/// Tokens that can be drawn, found by drawing many.
fn support(logits: &[f32], sampling: &Sampling) -> Vec<TokenId> {
    let mut seen: Vec<TokenId> =
        (0..2000).map(|seed| drawn(logits, &Sampling { seed, ..sampling.clone() }).token).collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

/// Logits of these probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|probability| probability.ln()).collect()
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_ignores_nan() {
    assert_eq!(drawn(&[1.0, 3.0, 3.0, 2.0], &Sampling::default()).token, 1);
    assert_eq!(drawn(&[f32::NAN, 1.0, f32::NAN], &Sampling::default()).token, 1);
    assert_eq!(drawn(&[f32::NAN, f32::NAN], &warm()).token, 0);
}

#[test]
fn cuts_keep_what_they_say() {
    let logits = logits_of(&[0.05, 0.4, 0.15, 0.1, 0.3]);
    let check =
        |sampling: Sampling, expected: &[TokenId]| assert_eq!(support(&logits, &sampling), expected, "{sampling:?}");
    check(warm(), &[0, 1, 2, 3, 4]);
    check(Sampling { top_k: 1, ..warm() }, &[1]);
    check(Sampling { top_k: 3, ..warm() }, &[1, 2, 4]);
    check(Sampling { top_k: 99, ..warm() }, &[0, 1, 2, 3, 4]);
    check(Sampling { top_p: 0.0, ..warm() }, &[1]);
    check(Sampling { top_p: 0.39, ..warm() }, &[1]);
    check(Sampling { top_p: 0.41, ..warm() }, &[1, 4]);
    check(Sampling { top_p: 0.84, ..warm() }, &[1, 2, 4]);
    check(Sampling { top_p: 0.86, ..warm() }, &[1, 2, 3, 4]);
    check(Sampling { min_p: 0.3, ..warm() }, &[1, 2, 4]);
    check(Sampling { min_p: 0.7, ..warm() }, &[1, 4]);
    check(Sampling { min_p: 1.0, ..warm() }, &[1]);
    // top-p counts the mass of what top-k left: 0.4 / 0.7 is enough for 0.5.
    check(Sampling { top_k: 2, top_p: 0.5, ..warm() }, &[1]);
    check(Sampling { top_k: 2, top_p: 0.6, ..warm() }, &[1, 4]);
    // min-p acts after the temperature: at 0.5 probabilities are squared, and 0.15 falls to 0.14 of the best.
    check(Sampling { min_p: 0.3, temperature: 0.5, ..warm() }, &[1, 4]);
}

#[test]
fn a_large_flat_distribution_is_cut_by_mass() {
    let logits = vec![0.0; 5000];
    let mut kept = candidates(&logits, &Sampling { top_p: 0.5, ..warm() });
    assert_eq!(kept.len(), 2500);
    kept.sort_unstable_by_key(|candidate| candidate.token);
    assert_eq!(kept.last().map(|candidate| candidate.token), Some(2499), "ties go to the lower id");
}

#[test]
fn draws_follow_the_distribution() {
    let check = |temperature: f32, weights: &[f64]| {
        let logits = logits_of(&[0.1, 0.2, 0.3, 0.4]);
        let total: f64 = weights.iter().sum();
        let mut counts = [0f64; 4];
        let draws = 20_000;
        for index in 0..draws {
            // One sequence whose tokens are drawn one after the other.
            let history = vec![0; index % 100];
            let seed = (index / 100) as u64;
            let sampling = Sampling { temperature, seed, ..warm() };
            counts[drawn_after(&logits, &sampling, &history, 0, &[]).token as usize] += 1.0;
        }
        let chi: f64 = counts
            .iter()
            .zip(weights)
            .map(|(count, weight)| (weight / total * draws as f64, count))
            .map(|(expected, count)| (count - expected).powi(2) / expected)
            .sum();
        // Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand.
        assert!(chi < 16.3, "temperature {temperature}: {counts:?}, chi-square {chi}");
    };
    check(1.0, &[0.1, 0.2, 0.3, 0.4]);
    check(0.5, &[0.01, 0.04, 0.09, 0.16]);
    check(2.0, &[0.1f64.sqrt(), 0.2f64.sqrt(), 0.3f64.sqrt(), 0.4f64.sqrt()]);
}

#[test]
fn a_token_depends_on_its_index_and_its_key_only() {
    let logits: Vec<f32> = (0..500).map(|index| ((index * 37) % 101) as f32 / 20.0).collect();
    let at = |seed, choice, prompt: usize, output: usize| {
        let sampling = Sampling { seed, choice, ..warm() };
        drawn_after(&logits, &sampling, &vec![0; prompt + output], prompt, &[]).token
    };
    let sequence = |seed, choice, prompt| (0..32).map(|index| at(seed, choice, prompt, index)).collect::<Vec<_>>();
    assert_eq!(sequence(1, 0, 10), sequence(1, 0, 500));
    assert_ne!(sequence(1, 0, 10), sequence(2, 0, 10));
    assert_ne!(sequence(1, 0, 10), sequence(1, 1, 10));
}

#[test]
fn penalties_tell_prompt_from_output() {
    let greedy = |sampling: Sampling, history: &[TokenId], prompt_tokens| {
        drawn_after(&[2.0, 1.9, -1.0], &sampling, history, prompt_tokens, &[]).token
    };
    let presence = Sampling { presence_penalty: 0.2, ..Sampling::default() };
    let frequency = Sampling { frequency_penalty: 0.06, ..Sampling::default() };
    let repetition = Sampling { repetition_penalty: 1.1, ..Sampling::default() };
    assert_eq!(greedy(presence.clone(), &[0], 1), 0, "the prompt is no output");
    assert_eq!(greedy(presence, &[0], 0), 1);
    assert_eq!(greedy(frequency.clone(), &[0], 0), 0);
    assert_eq!(greedy(frequency, &[0, 0], 0), 1);
    assert_eq!(greedy(repetition.clone(), &[0], 1), 1, "the prompt counts for repetition");
    assert_eq!(greedy(repetition, &[0, 1], 1), 0, "both are divided");
    // A negative logit is multiplied, so that a penalty never helps.
    let mut logits = vec![-1.0, -1.05];
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    penalise(&mut logits, &Sample { sampling: &sampling, history: &[0], prompt_tokens: 1, forbidden: &[] });
    assert_eq!(logits, [-2.0, -1.05]);
}

#[test]
fn biases_and_forbidden_tokens() {
    let logits = [2.0, 1.0, 0.0];
    let biased = Sampling { logit_bias: vec![(2, 5.0), (99, 1.0)], ..Sampling::default() };
    assert_eq!(drawn(&logits, &biased).token, 2);
    assert_eq!(drawn_after(&logits, &biased, &[], 0, &[2]).token, 0, "a bias does not undo a ban");
    assert_eq!(drawn_after(&logits, &Sampling::default(), &[], 0, &[0, 99]).token, 1);
    for seed in 0..200 {
        assert_eq!(drawn_after(&logits, &Sampling { seed, ..warm() }, &[], 0, &[0, 2]).token, 1);
    }
}

#[test]
fn logprobs_are_those_of_the_unmodified_logits() {
    let logits = logits_of(&[0.1, 0.2, 0.3, 0.4]);
    let sampling = Sampling { logprobs: Some(2), logit_bias: vec![(1, 9.0)], temperature: 0.3, ..Sampling::default() };
    let sampled = drawn(&logits, &sampling);
    assert_eq!(sampled.token, 1);
    let logprobs = sampled.logprobs.expect("asked for");
    assert!((logprobs.logprob - 0.2f32.ln()).abs() < 1e-6);
    assert_eq!(logprobs.rank, 3);
    let tokens: Vec<TokenId> = logprobs.top.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, [3, 2]);
    assert!((logprobs.top[0].1 - 0.4f32.ln()).abs() < 1e-6);

    assert_eq!(drawn(&logits, &Sampling::default()).logprobs, None);
    let none = drawn(&logits, &Sampling { logprobs: Some(0), ..Sampling::default() }).logprobs.expect("asked for");
    assert_eq!((none.rank, none.top.len()), (1, 0));
    let many = drawn(&logits, &Sampling { logprobs: Some(99), ..Sampling::default() }).logprobs.expect("asked for");
    assert_eq!(many.top.len(), 4);
}

#[test]
fn equal_logits_rank_by_id() {
    let sampling = Sampling { logprobs: Some(3), ..Sampling::default() };
    let logprobs = drawn(&[1.0, 1.0, 1.0], &sampling).logprobs.expect("asked for");
    assert_eq!(logprobs.rank, 1);
    let tokens: Vec<TokenId> = logprobs.top.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, [0, 1, 2]);
}
