//! Speculation changes how fast tokens come, and nothing else.

use super::*;
use crate::{
    Config, Device, ElementType, Model, ModelShape, Row, Sample, Sampled, Sampling, TokenId,
    cuda::{Emulated, Order},
    scheduler::{Finish, History, Limits, Request, Stop, Until},
    tests::{load, repository, small_config},
};
use kv_cache::PageId;
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering::Relaxed},
};

const START: Duration = Duration::ZERO;

/// What one sequence emitted, with log-probabilities where they were asked for, and why it stopped.
type Output = (Vec<Sampled>, Finish);

/// Engine, scheduler and, maybe, a speculator: a decode worker without its wires.
struct Worker {
    engine: Engine,
    scheduler: Scheduler,
    speculator: Option<Speculator>,
    drafts: usize,
    accepted: usize,
    steps: usize,
}

impl Worker {
    fn new(model: &Arc<Model>, config: &Config, pages: usize) -> Self {
        Self::of(Engine::new(model.clone(), config).expect("an engine"), config, pages)
    }

    fn of(engine: Engine, config: &Config, pages: usize) -> Self {
        let limits = Limits {
            pages: pages.min(engine.memory().layout().pages as usize),
            page_tokens: config.page_tokens as usize,
            token_budget: config.token_budget as usize,
            max_sequences: config.max_sequences as usize,
            max_model_len: engine.max_model_len(),
            max_waiting: 4096,
        };
        let scheduler = Scheduler::new(limits).expect("a scheduler");
        Self { engine, scheduler, speculator: None, drafts: 0, accepted: 0, steps: 0 }
    }

    fn ngrams(mut self, most: usize) -> Self {
        self.speculator = Some(Speculator::ngrams(most));
        self
    }

    fn draft(self, draft: &Arc<Model>, most: usize) -> Self {
        let draft = self.engine.draft(draft.clone()).expect("a draft model");
        self.drafted_by(draft, most)
    }

    fn drafted_by(mut self, draft: Engine, most: usize) -> Self {
        self.speculator = Some(Speculator::draft(draft, most));
        self
    }

    /// Runs all requests to their ends. Times are kept from the policy: it then takes every draft to be free.
    fn run(&mut self, requests: &[Request]) -> Vec<Output> {
        let submit = |request: &Request| self.scheduler.submit(request.clone(), START).expect("it fits");
        let ids: Vec<SequenceId> = requests.iter().map(submit).collect();
        let mut outputs: BTreeMap<SequenceId, (Vec<Sampled>, Option<Finish>)> = BTreeMap::new();
        while self.scheduler.backlog() != Default::default() {
            if let Some(speculator) = &mut self.speculator {
                speculator.propose(&mut self.scheduler);
            }
            let plan = self.scheduler.schedule(START);
            let computed = self.scheduler.compute(plan, &mut self.engine, &mut |_, _| {}, &|| START);
            assert!(computed.faults.is_empty(), "{:?}", computed.faults);
            if let Some(speculator) = &mut self.speculator {
                speculator.observe(&computed, 1, 1, Duration::ZERO);
            }
            self.steps += 1;
            self.drafts += computed.verified.iter().map(|verified| verified.drafts).sum::<usize>();
            self.accepted += computed.verified.iter().map(|verified| verified.accepted).sum::<usize>();
            for drawn in computed.drawn {
                let (tokens, finish) = outputs.entry(drawn.id).or_default();
                assert_eq!(drawn.index, tokens.len(), "in order");
                tokens.push(drawn.sampled);
                *finish = drawn.ended.map(|(finish, _)| finish);
            }
        }
        assert_eq!(self.scheduler.pool().stats().held(), 0, "pages leaked");
        ids.into_iter().map(|id| outputs.remove(&id).expect("it ran")).map(|(t, f)| (t, f.expect("it ended"))).collect()
    }
}

fn request(tokens: Vec<TokenId>, max_tokens: usize, sampling: Sampling) -> Request {
    Request {
        adapter: None,
        grammar: None,
        prompt_tokens: tokens.len(),
        history: History::new(b"", tokens, 16),
        sampling,
        stop: Stop { max_tokens, min_tokens: 0, ids: Vec::new() },
        prompt_logprobs: None,
        priority: 0,
        until: Until::End,
    }
}

/// The prompts recorded beside a checkpoint, as long as they leave room.
fn prompts(path: &str, longest: usize) -> Vec<Vec<TokenId>> {
    let text = std::fs::read(repository(path).join("expected.json")).expect("expected.json");
    let expected: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let ids = |prompt: &serde_json::Value| serde_json::from_value(prompt["ids"].clone()).expect("token ids");
    let prompts = expected["prompts"].as_array().expect("prompts");
    prompts.iter().map(ids).filter(|ids: &Vec<TokenId>| ids.len() <= longest).collect()
}

/// Greedy and sampled sequences with everything that looks at the tokens so far.
fn mixed_requests(path: &str) -> Vec<Request> {
    let warm = |seed| Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() };
    let mut requests = Vec::new();
    for (at, prompt) in prompts(path, 300).into_iter().enumerate() {
        let seed = at as u64;
        requests.push(request(prompt.clone(), 48, Sampling::default()));
        requests.push(request(prompt.clone(), 30, warm(seed)));
        let penalised = Sampling {
            repetition_penalty: 1.2,
            frequency_penalty: 0.3,
            presence_penalty: 0.2,
            logprobs: Some(3),
            top_k: 20,
            ..warm(seed + 100)
        };
        let mut stopped = request(prompt, 40, penalised);
        stopped.stop = Stop { max_tokens: 40, min_tokens: 5, ids: (0..4096).step_by(17).collect() };
        requests.push(stopped);
    }
    requests
}

fn check_same(path: &str, draft: Option<&str>) {
    let (model, config) = (load(path), small_config());
    let requests = mixed_requests(path);
    let plain = Worker::new(&model, &config, 4096).run(&requests);
    // Few pages: sequences are preempted in the middle of speculation.
    for pages in [4096, 40] {
        let mut ngrams = Worker::new(&model, &config, pages).ngrams(4);
        assert_eq!(ngrams.run(&requests), plain, "{path}, n-grams, {pages} pages");
        let draft = load(draft.unwrap_or(path));
        let mut drafted = Worker::new(&model, &config, pages).draft(&draft, 3);
        assert_eq!(drafted.run(&requests), plain, "{path}, draft model, {pages} pages");
        assert!(drafted.accepted > 0 && drafted.drafts >= drafted.accepted);
        println!(
            "{path} {pages} pages: n-grams {} of {}, draft model {} of {}",
            ngrams.accepted, ngrams.drafts, drafted.accepted, drafted.drafts
        );
    }
}

#[test]
fn the_bundled_model_says_the_same_with_and_without() {
    check_same("models/demo", Some("models/demo-draft"));
}

#[test]
fn a_model_that_drafts_for_itself_is_always_right() {
    let model = load("tests/golden/qwen3");
    let requests: Vec<Request> = mixed_requests("tests/golden/qwen3")
        .into_iter()
        .map(|request| Request { stop: Stop { ids: Vec::new(), max_tokens: 41, min_tokens: 0 }, ..request })
        .collect();
    let plain = Worker::new(&model, &small_config(), 4096).run(&requests);
    let mut drafted = Worker::new(&model, &small_config(), 4096).draft(&model, 4);
    assert_eq!(drafted.run(&requests), plain);
    assert_eq!(drafted.accepted, drafted.drafts, "the same model draws the same tokens");
    // Forty tokens after the first, five in a step, and a few steps for prompts and whoever waited for them.
    assert!(drafted.steps < 30, "{} steps", drafted.steps);
}

#[test]
fn golden_models_say_the_same_with_and_without() {
    for path in ["llama", "llama3", "mistral", "qwen2-bf16-sharded"] {
        check_same(&format!("tests/golden/{path}"), None);
    }
}

#[test]
fn a_draft_of_another_vocabulary_is_refused() {
    let (model, draft) = (load("tests/golden/llama"), load("models/demo-draft"));
    let engine = Engine::new(model.clone(), &small_config()).expect("an engine");
    for device in [Device::Cpu, Device::Cuda(0)] {
        let config = Config { device, ..small_config() };
        let error =
            Engine::with_draft(model.clone(), draft.clone(), &config).expect_err("another vocabulary").to_string();
        assert!(error.contains("4096") && error.contains("1031"), "{error}");
    }
    engine.draft(draft).expect_err("another vocabulary");
}

#[test]
fn caches_that_were_evicted_are_computed_again() {
    let (model, draft) = (load("models/demo"), load("models/demo-draft"));
    // Pages for two sequences at a time in both models, and a batch that holds one: sequences of one priority push out others.
    let config = Config { kv_bytes: Some(1 << 20), max_model_len: Some(200), max_sequences: 3, ..small_config() };
    let prompt = |from: u32| (from..from + 70).collect::<Vec<TokenId>>();
    let requests: Vec<Request> = (0..5).map(|n| request(prompt(n * 100), 60, Sampling::default())).collect();
    let plain = Worker::new(&model, &config, 4096).run(&requests);
    let mut drafted = Worker::new(&model, &config, 4096).draft(&draft, 4);
    assert_eq!(drafted.run(&requests), plain);
    let Some(Speculator { proposer: Proposer::Draft(model), .. }) = &mut drafted.speculator else { unreachable!() };
    model.retain(|_| false);
    assert_eq!(model.free_pages(), model.all_pages(), "pages leaked");
}

/// A tiny model of a few tokens whose distribution is far from even.
fn tiny(seed: u64, hidden: usize) -> Arc<Model> {
    let shape = ModelShape {
        name: "tiny",
        vocab_size: 12,
        hidden,
        intermediate: 64,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        qkv_bias: false,
        max_position: 512,
        dtype: ElementType::F32,
        quantize: None,
        experts: None,
        latent: None,
    };
    Model::random(&shape, seed).expect("memory")
}

/// Engines for `model` and `draft` on `ranks` cards that the processor plays, of which the first has both.
fn on_cards(model: &Arc<Model>, draft: &Arc<Model>, config: &Config, ranks: usize) -> (Engine, Engine) {
    let boxed = |device| Box::new(device) as Box<dyn crate::cuda::Device>;
    let devices = Emulated::team(Order::Forward, ranks).into_iter().map(boxed).collect();
    let (first, config) = (boxed(Emulated::new(Order::Backward)), Config { tensor_parallel: ranks, ..config.clone() });
    Engine::on_devices_with_draft((model.clone(), devices), (draft.clone(), vec![first]), &config).expect("two engines")
}

#[test]
fn a_card_says_the_same_with_and_without_a_draft_model_beside() {
    let (model, draft) = (tiny(3, 32), tiny(4, 48));
    let config = Config { kv_bytes: Some(1 << 20), max_model_len: Some(320), max_sequences: 8, ..small_config() };
    let warm = |seed| Sampling { temperature: 0.9, seed, ..Sampling::default() };
    let samplings = [
        Sampling::default(),
        warm(1),
        Sampling { top_k: 5, top_p: 0.9, ..warm(2) },
        // The host draws from what the card computed.
        Sampling { repetition_penalty: 1.2, logprobs: Some(3), ..warm(3) },
    ];
    let prompt = |at: usize| (0..3 + 11 * at as TokenId).map(|token| token * 7 % 12).collect();
    let requests: Vec<Request> =
        (0..8).map(|at| request(prompt(at), 20 + at, samplings[at % samplings.len()].clone())).collect();
    let mut expected = None;
    for ranks in [1, 2] {
        let (engine, _) = on_cards(&model, &draft, &config, ranks);
        let plain = Worker::of(engine, &config, 4096).run(&requests);
        assert!(*expected.get_or_insert_with(|| plain.clone()) == plain, "{ranks} cards");
        // Few pages: sequences are preempted in the middle of speculation.
        for pages in [4096, 12] {
            let (engine, drafts) = on_cards(&model, &draft, &config, ranks);
            let mut drafted = Worker::of(engine, &config, pages).drafted_by(drafts, 3);
            assert!(drafted.run(&requests) == plain, "{ranks} cards, {pages} pages");
            assert!(drafted.accepted > 0 && drafted.accepted < drafted.drafts, "{} drafts", drafted.drafts);
        }
        let (engine, drafts) = on_cards(&model, &model, &config, ranks);
        let mut drafted = Worker::of(engine, &config, 4096).drafted_by(drafts, 4);
        assert!(drafted.run(&requests) == plain && drafted.accepted == drafted.drafts && drafted.drafts > 50);
    }
}

#[test]
fn a_model_and_its_draft_share_a_card_s_memory() {
    let (model, draft) = (load("tests/golden/llama3-bf16-sharded"), load("tests/golden/llama3"));
    for ranks in [1, 3] {
        let config = Config { kv_bytes: None, gpu_memory_utilization: 0.6, tensor_parallel: ranks, ..small_config() };
        let (team, first) = (Emulated::team(Order::Forward, ranks), Emulated::new(Order::Forward));
        let asked: Vec<_> = team.iter().chain([&first]).map(Emulated::asked).collect();
        let share = (Emulated::MEMORY as f64 * config.gpu_memory_utilization) as usize;
        let boxed = |device| Box::new(device) as Box<dyn crate::cuda::Device>;
        let devices = team.into_iter().map(boxed).collect();
        let engines =
            Engine::on_devices_with_draft((model.clone(), devices), (draft.clone(), vec![boxed(first)]), &config);
        let (engine, drafts) = engines.expect("two engines");
        assert_eq!(engine.memory().layout().pages, drafts.memory().layout().pages);
        let held: Vec<usize> = asked.iter().map(|asked| asked.held.load(Relaxed)).collect();
        // Both of the first, where each pool ends with a page for rows that only pad; the others have as many pages, and more room than they need.
        let (taken, pools) =
            (held[0] + held[ranks], [&engine, &drafts].map(|engine| engine.memory().layout().page_bytes()));
        let most = share + pools.iter().sum::<usize>();
        assert!(taken <= most && taken > share / 10 * 9, "{ranks} cards: {taken} of {share}");
        assert!(held[1..ranks].iter().all(|held| *held < taken));
        let alone = Config { max_model_len: Some(60), ..config };
        let (short, _) = on_cards(&model, &draft, &alone, ranks);
        assert_eq!(short.max_model_len(), 60);
    }
}

/// Chi-square of the second and third token together, over many seeds, against what the model says. Both come out of drafts.
fn check_distribution(prompt: &[TokenId], speculate: impl Fn(Worker) -> Worker) {
    const SEEDS: u64 = 6_000;
    let (model, temperature) = (tiny(3, 32), 0.9);
    let config = Config { kv_bytes: Some(2 << 20), max_model_len: Some(320), max_sequences: 100, ..small_config() };
    let sampling = |seed| Sampling { temperature: temperature as f32, seed, ..Sampling::default() };
    let requests: Vec<Request> = (0..SEEDS).map(|seed| request(prompt.to_vec(), 4, sampling(seed))).collect();
    let mut worker = speculate(Worker::new(&model, &config, 4096));
    let mut counts = BTreeMap::new();
    for outputs in requests.chunks(1000).map(|requests| worker.run(requests)) {
        for (tokens, _) in outputs {
            *counts.entry((tokens[0].token, tokens[1].token, tokens[2].token)).or_insert(0.0) += 1.0;
        }
    }
    assert!(worker.accepted > 500, "only {} of {} drafts were right", worker.accepted, worker.drafts);

    let mut engine = Engine::new(model, &config).expect("an engine");
    let first = distribution(&mut engine, prompt, temperature);
    let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    for (a, p) in first.iter().enumerate() {
        let with_a = [prompt, &[a as TokenId]].concat();
        for (b, q) in distribution(&mut engine, &with_a, temperature).into_iter().enumerate() {
            let with_b = [&with_a[..], &[b as TokenId]].concat();
            for (c, r) in distribution(&mut engine, &with_b, temperature).into_iter().enumerate() {
                let expected = p * q * r * SEEDS as f64;
                let seen = counts.get(&(a as TokenId, b as TokenId, c as TokenId)).copied().unwrap_or(0.0);
                if expected < 5.0 {
                    rest = (rest.0 + expected, rest.1 + seen);
                } else {
                    (chi, cells) = (chi + (seen - expected).powi(2) / expected, cells + 1);
                }
            }
        }
    }
    chi += (rest.1 - rest.0).powi(2) / rest.0.max(1.0);
    // With so many degrees of freedom chi-square is nearly normal: mean n, variance 2n.
    let (mean, deviation) = (f64::from(cells), f64::from(2 * cells).sqrt());
    assert!(cells > 100, "{cells} cells say too little");
    assert!((chi - mean).abs() < 3.3 * deviation, "chi-square {chi} over {cells} cells");
}

#[test]
fn n_grams_leave_the_distribution_as_it_is() {
    // Every pair has stood before, so n-grams always have something to say.
    let prompt: Vec<TokenId> = (0..12).flat_map(|a| (0..12).flat_map(move |b| [a, b])).collect();
    check_distribution(&prompt, |worker| worker.ngrams(2));
}

#[test]
fn a_draft_model_leaves_the_distribution_as_it_is() {
    let draft = tiny(4, 48);
    check_distribution(&[3, 1, 4, 1, 5], |worker| worker.draft(&draft, 3));
}

/// For ARCHITECTURE.md: how often a draft of the bundled draft model is right by the rule used here, and how often rejection
/// sampling would accept it, on text the bundled model wrote.
#[test]
#[ignore = "a measurement"]
fn acceptance_of_both_rules() {
    let (model, draft) = (load("models/demo"), load("models/demo-draft"));
    let config = Config { max_model_len: None, ..small_config() };
    let mut target = Engine::new(model.clone(), &config).expect("an engine");
    let mut small = Engine::new(draft.clone(), &config).expect("an engine");
    for temperature in [0.3, 0.7, 1.0] {
        let sampling = |seed| Sampling { temperature: temperature as f32, seed, ..Sampling::default() };
        let (mut rejection, mut race, mut inverse, mut positions) = (0.0, 0.0, 0.0, 0.0);
        for (at, prompt) in prompts("models/demo", 64).into_iter().enumerate().skip(1) {
            let requests: Vec<Request> =
                (0..8).map(|seed| request(prompt.clone(), 40, sampling(at as u64 * 10 + seed))).collect();
            for (tokens, _) in Worker::new(&model, &config, 4096).run(&requests) {
                let tokens: Vec<TokenId> = tokens.iter().map(|sampled| sampled.token).collect();
                let whole = [&prompt[..], &tokens].concat();
                for end in (prompt.len()..whole.len()).step_by(5) {
                    let p = distribution(&mut target, &whole[..end], temperature);
                    let q = distribution(&mut small, &whole[..end], temperature);
                    positions += 1.0;
                    rejection += p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum::<f64>();
                    // The same token wins both races.
                    let wins = |i: usize| p.iter().zip(&q).map(|(pj, qj)| (pj / p[i]).max(qj / q[i])).sum::<f64>();
                    let likely = (0..p.len()).filter(|&i| p[i].min(q[i]) > 1e-6);
                    race += likely.map(|i| 1.0 / wins(i)).sum::<f64>();
                    // One number for both, tokens in the order of their ids.
                    let (mut below_p, mut below_q) = (0.0, 0.0);
                    for (p, q) in p.iter().zip(&q) {
                        let overlap: f64 = f64::min(below_p + p, below_q + q) - f64::max(below_p, below_q);
                        inverse += overlap.max(0.0);
                        (below_p, below_q) = (below_p + p, below_q + q);
                    }
                }
            }
        }
        let [rejection, race, inverse] = [rejection, race, inverse].map(|sum| sum / positions);
        println!("temperature {temperature}: rejection {rejection:.3}, race {race:.3}, one number {inverse:.3}");
    }
}

/// The distribution of the token after `tokens` at `temperature`.
fn distribution(engine: &mut Engine, tokens: &[TokenId], temperature: f64) -> Vec<f64> {
    let pages: Vec<PageId> = (0..engine.memory().layout().pages).map(PageId).collect();
    let sampling = Sampling { logprobs: Some(0), ..Sampling::default() };
    let sample = Sample {
        sampling: &sampling,
        history: tokens,
        prompt_tokens: tokens.len(),
        forbidden: &[],
        min_tokens: 0,
        grammar: None,
    };
    engine
        .step(&[Row { tokens, pages: &pages, sample: Some(sample), ..Row::default() }], &mut |_| {})
        .expect("a good row");
    let logits = engine.logits(0).expect("it was sampled");
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit - most) / temperature).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}
