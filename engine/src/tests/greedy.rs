//! The most likely token, found without writing logits, is the one that the logits give.

use super::{load, small_config, watched};
use crate::{Engine, Row, Sample, Sampling, TokenId, cpu::kernels::Kernels};
use kv_cache::PageId;

/// Returns the tokens drawn after prompts of growing length, three in a step, and whether there were logits.
fn drawn(engine: &mut Engine, samplings: &[&Sampling; 3]) -> (Vec<Option<TokenId>>, bool) {
    let tokens: Vec<TokenId> = (0..8).map(|token| token * 37 % 60).collect();
    let pages: Vec<PageId> = (0..6).map(PageId).collect();
    let mut drawn = Vec::new();
    let mut logits = false;
    for count in 1..=tokens.len() {
        let row = |(pages, sampling)| {
            let history = &tokens[..count];
            let sample = Sample { sampling, history, prompt_tokens: 1, forbidden: &[], min_tokens: 0, grammar: None };
            Row { tokens: history, start: 0, pages, sample: Some(sample), ..Row::default() }
        };
        let rows: Vec<Row<'_>> = pages.chunks(2).zip(samplings.iter().copied()).map(row).collect();
        let made = engine.step(&rows, &mut |_| {}).expect("good rows");
        drawn.extend(made.iter().map(|made| made.sampled.first().map(|sampled| sampled.token)));
        logits |= engine.logits(0).is_some();
    }
    (drawn, logits)
}

#[test]
fn tokens_are_those_of_the_logits() {
    // Plain, tied, quantised, capped, scaled and with experts.
    for path in ["llama", "qwen2", "llama-gptq-int4-g32", "llama-int8-w8a8", "gemma2", "cohere", "qwen3moe"] {
        let model = load(&format!("tests/golden/{path}"));
        for kernels in Kernels::available() {
            let mut engine = Engine::with_kernels(model.clone(), &small_config(), kernels).expect("an engine");
            let (plain, watched) = (Sampling::default(), watched());
            let (tokens, logits) = drawn(&mut engine, &[&plain; 3]);
            assert!(!logits, "{path}: logits that nobody wants");
            assert_eq!(drawn(&mut engine, &[&watched; 3]), (tokens.clone(), true), "{path} {}", kernels.name);
            assert_eq!(drawn(&mut engine, &[&plain, &plain, &watched]), (tokens, true), "{path} {}", kernels.name);
        }
    }
}
