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
    try_drawn(logits, sampling, history, prompt_tokens, forbidden).expect("a token")
}

fn try_drawn(
    logits: &[f32],
    sampling: &Sampling,
    history: &[TokenId],
    prompt_tokens: usize,
    forbidden: &[TokenId],
) -> Result<Sampled, Stuck> {
    let sample = Sample { sampling, history, prompt_tokens, forbidden, min_tokens: usize::MAX, grammar: None };
    draw(logits, &sample, None, &mut Scratch::new(logits.len()))
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
    let mut kept = Vec::new();
    choose(&logits, 0, &Sampling { top_p: 0.5, ..warm() }, &mut kept);
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
    penalise(
        &mut logits,
        &Sample { sampling: &sampling, history: &[0], prompt_tokens: 1, forbidden: &[], min_tokens: 0, grammar: None },
        &mut [0; 2],
    );
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

/// Returns what may be drawn, or what left nothing.
fn support_after(
    logits: &[f32],
    sampling: &Sampling,
    history: &[TokenId],
    mask: Option<&Mask>,
) -> Result<Vec<TokenId>, Stuck> {
    let mut seen = Vec::new();
    for seed in 0..500 {
        let sampling = Sampling { seed, ..sampling.clone() };
        let sample =
            Sample { sampling: &sampling, history, prompt_tokens: 2, forbidden: &[3], min_tokens: 1, grammar: None };
        seen.push(draw(logits, &sample, mask, &mut Scratch::new(logits.len()))?.token);
    }
    seen.sort_unstable();
    seen.dedup();
    Ok(seen)
}

/// Every rule alone and with others, where the order or the end of it matters. Five equal tokens; the prompt is two tokens long; token 3 is
/// forbidden at the first one.
#[test]
fn rules_and_their_order() {
    let flat = [0.0; 5];
    let check = |sampling: Sampling, history: &[TokenId], mask: Option<&[TokenId]>, expected: &[TokenId]| {
        let mask = mask.map(|allowed| Mask::of(5, allowed));
        let seen = support_after(&flat, &sampling, history, mask.as_ref());
        assert_eq!(seen.as_deref(), Ok(expected), "{sampling:?} after {history:?}, {mask:?}");
    };
    let bad_words = |words: &[&[TokenId]]| words.iter().map(|word| word.to_vec()).collect::<Vec<_>>();
    check(warm(), &[0, 0], None, &[0, 1, 2, 4]);
    check(warm(), &[0, 0, 0], None, &[0, 1, 2, 3, 4]);
    check(warm(), &[0, 0, 0], Some(&[2, 4]), &[2, 4]);
    check(warm(), &[0, 0], Some(&[2, 3]), &[2]);
    check(Sampling { allowed_tokens: vec![1, 2, 3, 77], ..warm() }, &[0, 0], None, &[1, 2]);
    check(Sampling { allowed_tokens: vec![1, 2], ..warm() }, &[0, 0, 0], Some(&[2, 4]), &[2]);
    // A bad word of one token never comes; a longer one not behind its beginning, which counts in the output only.
    check(Sampling { bad_words: bad_words(&[&[1], &[0, 2], &[99]]), ..warm() }, &[0, 0], None, &[0, 2, 4]);
    check(Sampling { bad_words: bad_words(&[&[0, 2]]), ..warm() }, &[5, 5, 0], None, &[0, 1, 3, 4]);
    check(Sampling { bad_words: bad_words(&[&[0, 2]]), ..warm() }, &[5, 5, 0, 1], None, &[0, 1, 2, 3, 4]);
    check(Sampling { bad_words: bad_words(&[&[0, 1, 2]]), ..warm() }, &[0, 0, 1], None, &[0, 1, 2, 3, 4]);
    check(Sampling { bad_words: bad_words(&[&[0, 1, 2]]), ..warm() }, &[5, 5, 0, 1], None, &[0, 1, 3, 4]);
    // No bias and no penalty brings a masked token back.
    let biased = Sampling { logit_bias: vec![(0, 100.0), (1, 100.0), (2, 1.0)], frequency_penalty: -2.0, ..warm() };
    let masked = Sampling { allowed_tokens: vec![1, 2], bad_words: bad_words(&[&[1]]), ..biased };
    check(masked, &[0, 0, 0, 1], Some(&[0, 1, 2]), &[2]);
    // Biases before penalties: a repetition penalty works on the biased logit, 4 / 2 = 2 and not 0 / 2 + 4.
    let penalised =
        |bias: f32| Sampling { logit_bias: vec![(0, 4.0), (1, bias)], repetition_penalty: 2.0, top_k: 1, ..warm() };
    check(penalised(1.9), &[0, 0, 0], None, &[0]);
    check(penalised(2.1), &[0, 0, 0], None, &[1]);
    // Penalties before cuts by rank and mass; masks before them all: what is cut is cut from what is left.
    check(Sampling { presence_penalty: 1.0, top_k: 2, ..warm() }, &[0, 0, 0], None, &[1, 2]);
    check(Sampling { top_k: 2, ..warm() }, &[0, 0, 0], Some(&[1, 3, 4]), &[1, 3]);
    check(Sampling { top_p: 0.5, ..warm() }, &[0, 0, 0], Some(&[3, 4]), &[3]);
    check(Sampling { min_p: 0.5, logit_bias: vec![(0, 9.0)], ..warm() }, &[0, 0, 0], Some(&[3, 4]), &[3, 4]);
    check(Sampling { temperature: 0.0, logit_bias: vec![(0, 9.0)], ..warm() }, &[0, 0, 0], Some(&[3, 4]), &[3]);
}

#[test]
fn masks_do_not_touch_the_log_probabilities() {
    let logits = logits_of(&[0.1, 0.2, 0.3, 0.4]);
    let sampling = Sampling { logprobs: Some(1), allowed_tokens: vec![0, 1], ..Sampling::default() };
    let sample =
        Sample { sampling: &sampling, history: &[], prompt_tokens: 0, forbidden: &[], min_tokens: 0, grammar: None };
    let sampled = draw(&logits, &sample, Some(&Mask::of(4, &[0])), &mut Scratch::new(4)).expect("a token");
    let logprobs = sampled.logprobs.expect("asked for");
    assert_eq!((sampled.token, logprobs.rank, logprobs.top[0].0), (0, 4, 3));
    assert!((logprobs.logprob - 0.1f32.ln()).abs() < 1e-6);
}

#[test]
fn where_nothing_is_left_the_reason_is_named() {
    let stuck = |logits: &[f32], sampling: Sampling, mask: Option<&[TokenId]>| {
        let mask = mask.map(|allowed| Mask::of(logits.len(), allowed));
        support_after(logits, &sampling, &[0, 0], mask.as_ref()).map_err(|stuck| stuck.to_string())
    };
    let (flat, nan, low) = ([0.0; 5], f32::NAN, f32::NEG_INFINITY);
    let check = |sampling: Sampling, mask: Option<&[TokenId]>, words: &[&str]| {
        for sampling in [sampling.clone(), Sampling { temperature: 0.0, ..sampling }] {
            let reason = stuck(&flat, sampling, mask).unwrap_err();
            words.iter().for_each(|word| assert!(reason.contains(word), "{reason} lacks {word}"));
        }
    };
    check(warm(), Some(&[]), &["no token may follow", "the grammar"]);
    check(warm(), Some(&[3]), &["the grammar", "min_tokens"]);
    check(
        Sampling { allowed_tokens: vec![1], bad_words: vec![vec![1]], ..warm() },
        None,
        &["allowed_token_ids, bad_words"],
    );
    check(Sampling { allowed_tokens: vec![77], ..warm() }, None, &["allowed_token_ids"]);
    check(Sampling { logit_bias: (0..5).map(|token| (token, low)).collect(), ..warm() }, None, &["logit_bias"]);
    for logits in [[nan; 5], [low; 5], [nan, low, nan, low, nan]] {
        assert_eq!(stuck(&logits, warm(), None).unwrap_err(), "none of the logits is a number");
        assert_eq!(stuck(&logits, warm(), Some(&[1])).unwrap_err(), "none of the logits is a number");
    }
    assert!(stuck(&[0.0, nan, 1.0, 1.0, 1.0], warm(), Some(&[1])).unwrap_err().contains("the grammar"));
}

#[test]
fn infinite_logits_are_certain() {
    let infinite = f32::INFINITY;
    let sampling = Sampling { logprobs: Some(2), ..warm() };
    let check = |logits: &[f32], mask: Option<&[TokenId]>, token: TokenId, logprob: f32| {
        let sample = Sample {
            sampling: &sampling,
            history: &[],
            prompt_tokens: 0,
            forbidden: &[],
            min_tokens: 0,
            grammar: None,
        };
        let mask = mask.map(|allowed| Mask::of(logits.len(), allowed));
        let sampled = draw(logits, &sample, mask.as_ref(), &mut Scratch::new(logits.len())).expect("a token");
        assert_eq!((sampled.token, sampled.logprobs.expect("asked for").logprob), (token, logprob), "{logits:?}");
    };
    check(&[1.0, infinite, 3.0], None, 1, 0.0);
    check(&[f32::NAN, infinite, infinite], None, 1, 0.0);
    check(&[1.0, infinite, 3.0], Some(&[2]), 2, f32::NEG_INFINITY);
    check(&[f32::NEG_INFINITY, 0.0], None, 1, 0.0);
}
