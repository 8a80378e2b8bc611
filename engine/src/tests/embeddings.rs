//! Hidden states against what the reference recorded, through the head: `logits = head * hidden` determines a hidden state, for
//! a head has more rows than columns.

use super::{Runner, load, repository, small_config, watched};
use crate::{Config, Embedding, Pooling, Row, Sampling, TokenId, cpu::kernels::Kernels};
use kv_cache::PageId;
use safetensors::SafeTensors;

const MODEL: &str = "tests/golden/llama";

struct Prompt {
    name: String,
    ids: Vec<TokenId>,
}

fn prompts() -> Vec<Prompt> {
    let text = std::fs::read(repository(MODEL).join("expected.json")).expect("expected.json");
    let expected: serde_json::Value = serde_json::from_slice(&text).expect("expected.json");
    let prompts = expected["prompts"].as_array().expect("prompts").iter();
    prompts
        .map(|prompt| Prompt {
            name: prompt["name"].as_str().expect("a name").into(),
            ids: serde_json::from_value(prompt["ids"].clone()).expect("ids"),
        })
        .collect()
}

/// A tensor of f32 out of a file of the model's directory, as f64.
fn tensor(file: &str, name: &str) -> Vec<f64> {
    let bytes = std::fs::read(repository(MODEL).join(file)).expect("a file");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let data = tensors.tensor(name).expect("a tensor").data().to_vec();
    data.chunks_exact(4).map(|f| f64::from(f32::from_le_bytes([f[0], f[1], f[2], f[3]]))).collect()
}

/// Embeds `ids` in chunks of `chunk`.
fn embed(runner: &mut Runner, ids: &[TokenId], chunk: usize, pooling: Pooling) -> Vec<f32> {
    let mut embedding = Embedding::new(pooling);
    for (index, tokens) in ids.chunks(chunk).enumerate() {
        let start = index * chunk;
        let row = Row { tokens, start, pages: &runner.pages, pooling: Some(pooling), ..Row::default() };
        let width = runner.engine.model().decoder.hidden;
        let made = runner.engine.step(&[row], &mut |_| {}).expect("a good row");
        embedding.add(start, made[0].hidden.chunks_exact(width));
    }
    embedding.finish()
}

/// Says how far `head * embedding` is from a multiple of `logits`, in parts of the largest logit.
fn distance(head: &[f64], embedding: &[f32], logits: &[f64]) -> f64 {
    let length: f64 = embedding.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    assert!((length - 1.0).abs() < 1e-6, "a vector of length {length}");
    let projected: Vec<f64> = head
        .chunks_exact(embedding.len())
        .map(|row| row.iter().zip(embedding).map(|(weight, value)| weight * f64::from(*value)).sum())
        .collect();
    assert_eq!(projected.len(), logits.len());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let factor = dot(&projected, logits) / dot(&projected, &projected);
    assert!(factor > 0.0, "the embedding points the other way");
    let largest = logits.iter().fold(0.0f64, |most, logit| most.max(logit.abs()));
    let worst = projected.iter().zip(logits).map(|(a, b)| (a * factor - b).abs()).fold(0.0, f64::max);
    worst / largest
}

#[test]
fn the_last_hidden_state_is_the_reference_s() {
    let (model, head) = (load(MODEL), tensor("model.safetensors", "lm_head.weight"));
    for kernels in Kernels::available() {
        let mut runner = Runner::new(model.clone(), kernels);
        for prompt in prompts() {
            let logits = tensor("logits.safetensors", &prompt.name);
            let embedding = embed(&mut runner, &prompt.ids, 64, Pooling::Last);
            let off = distance(&head, &embedding, &logits);
            assert!(off < 1e-3, "{} {}: {off}", kernels.name, prompt.name);
        }
    }
}

#[test]
fn the_mean_is_that_of_the_logits_of_all_positions() {
    let (model, head) = (load(MODEL), tensor("model.safetensors", "lm_head.weight"));
    for kernels in Kernels::available() {
        let mut runner = Runner::new(model.clone(), kernels);
        for prompt in prompts().into_iter().filter(|prompt| prompt.ids.len() <= 100) {
            let mut sums = vec![0.0; head.len() / model.decoder.hidden];
            for at in 0..prompt.ids.len() {
                runner.draw(&prompt.ids[..=at], at, 1, &watched());
                let logits = runner.engine.logits(0).expect("the row was sampled");
                sums.iter_mut().zip(logits).for_each(|(sum, logit)| *sum += f64::from(*logit));
            }
            let off = distance(&head, &embed(&mut runner, &prompt.ids, 64, Pooling::Mean), &sums);
            assert!(off < 1e-4, "{} {}: {off}", kernels.name, prompt.name);
        }
    }
}

#[test]
fn an_embedding_has_the_same_bits_in_any_chunks_and_any_batch() {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for (path, pooling) in
        [(MODEL, Pooling::Mean), (MODEL, Pooling::Last), ("tests/golden/qwen2-bf16-sharded", Pooling::Mean)]
    {
        let model = load(path);
        for kernels in Kernels::available() {
            let ids: Vec<TokenId> = (0..150).map(|at| (at * at * 31 + at * 7) % 1000).collect();
            let mut runner = Runner::with(model.clone(), kernels, Config { threads: Some(1), ..small_config() });
            let whole = bits(embed(&mut runner, &ids, 512, pooling));
            let mut runner = Runner::with(model.clone(), kernels, Config { threads: Some(3), ..small_config() });
            for chunk in [1, 5, 16, 77] {
                assert_eq!(bits(embed(&mut runner, &ids, chunk, pooling)), whole, "{path} {} {chunk}", kernels.name);
            }
            // Between rows that draw, whose tokens must not change either.
            let (before, after) = (ids[40..70].to_vec(), ids[90..101].to_vec());
            let sampling = watched();
            let sample = |history| crate::Sample { history, ..sample_of(&sampling) };
            let all = runner.pages.clone();
            let (first, rest) = all.split_at(20);
            let (own, last) = rest.split_at(20);
            let drawing = |tokens, pages| Row { tokens, pages, sample: Some(sample(tokens)), ..Row::default() };
            let alone: Vec<_> = [(&before[..], first), (&after[..], last)]
                .map(|(tokens, pages): (&[TokenId], &[PageId])| {
                    let made = runner.engine.step(&[drawing(tokens, pages)], &mut |_| {}).expect("a good row").to_vec();
                    (made, bits(runner.engine.logits(0).expect("it drew").to_vec()))
                })
                .into();
            let row = Row { tokens: &ids, pages: own, pooling: Some(pooling), ..Row::default() };
            let rows = [drawing(&before, first), row, drawing(&after, last)];
            let made = runner.engine.step(&rows, &mut |_| {}).expect("good rows").to_vec();
            let mut embedding = Embedding::new(pooling);
            embedding.add(0, made[1].hidden.chunks_exact(model.decoder.hidden));
            assert_eq!(bits(embedding.finish()), whole, "{path} {} in a batch", kernels.name);
            for (index, (drawn, logits)) in [0, 2].into_iter().zip(&alone) {
                assert!(made[index].hidden.is_empty());
                assert_eq!(made[index], drawn[0]);
                assert_eq!(bits(runner.engine.logits(index).expect("it drew").to_vec()), *logits);
            }
            assert!(made[1].sampled.is_empty() && runner.engine.logits(1).is_none());
        }
    }
}

#[test]
fn a_row_gives_hidden_states_or_tokens() {
    let mut runner = Runner::new(load(MODEL), Kernels::detect());
    let sampling = Sampling::default();
    let sample = Some(sample_of(&sampling));
    let row = Row { tokens: &[1], pages: &runner.pages, sample, pooling: Some(Pooling::Last), ..Row::default() };
    let error = runner.engine.step(&[row], &mut |_| {}).expect_err("both are asked for").to_string();
    assert!(error.contains("row 0: hidden states are asked for"), "{error}");
}

fn sample_of(sampling: &Sampling) -> crate::Sample<'_> {
    crate::Sample { sampling, history: &[1], prompt_tokens: 1, forbidden: &[], min_tokens: 0, grammar: None }
}
