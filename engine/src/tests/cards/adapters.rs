//! Adapters on a card: beside what was recorded, in one batch with others and with none, and what they take.

use super::{NEAR_TIES, Order, asked, check_ahead, golden, invariance, run};
use crate::{
    Adapter, Config, Engine, Error, Model, Row, Sample, Sampling,
    cuda::Emulated,
    tests::{
        Runner, Unit,
        adapters::{FAMILIES, equals_merged, random_adapter},
        load, repository, small_config, watched,
    },
};
use kv_cache::PageId;
use std::sync::{Arc, atomic::Ordering::Relaxed};

const LLAMA: &str = "tests/golden/llama";
const QV: &str = "tests/golden/llama/adapters/lora-qv";
const ALL: &str = "tests/golden/llama/adapters/lora-all";

/// Reads adapters of `model`.
pub(super) fn read(model: &Model, paths: &[Option<&str>]) -> Vec<Option<Arc<Adapter>>> {
    let load = |path: &str| Adapter::load(model, &repository(path), 16).expect("a good adapter");
    paths.iter().map(|path| path.map(load)).collect()
}

/// Compares what `unit` computes with adapters with what was recorded.
pub(super) fn check_references(unit: Unit) {
    for (base, name) in [("llama", "lora-qv"), ("llama", "lora-all"), ("qwen2", "lora-qv"), ("qwen2", "lora-all")] {
        let (base, path) = (format!("tests/golden/{base}"), format!("tests/golden/{base}/adapters/{name}"));
        let mut runner = Runner::new(load(&base), unit);
        runner.adapter = read(runner.engine.model(), &[Some(&path)]).remove(0);
        for (mut prompt, reference) in
            golden::prompts(&path, "").into_iter().filter(|(prompt, _)| prompt.ids.len() <= 200)
        {
            let tie = NEAR_TIES.iter().find(|(model, name, _)| *model == path && *name == prompt.name);
            prompt.greedy.truncate(tie.map_or(usize::MAX, |(_, _, tokens)| *tokens));
            for chunk in [512, 33] {
                golden::check_prompt(
                    &mut runner,
                    &prompt,
                    &reference,
                    chunk,
                    golden::BF16,
                    &format!("{path} {unit:?}"),
                );
            }
        }
    }
}

#[test]
fn recorded_references() {
    check_references(Unit::Card(Order::Forward));
    // Where a library multiplies, and where several cards do.
    check_references(Unit::Library(0));
    check_references(Unit::Cards(2));
}

#[test]
fn adapters_equal_merged_weights() {
    // Both are rounded to bf16, the one before it is added and the other after.
    FAMILIES.into_iter().for_each(|base| equals_merged(base, Unit::Card(Order::Backward), 0.03));
}

/// Computes sequences with different adapters and with none, each alone token by token on one unit and mixed on another; the bits are to be the same.
fn check_mixed(model: &Arc<Model>, adapters: &[Option<Arc<Adapter>>], alone: Unit, together: Unit, what: &str) {
    let config = Config { token_budget: 160, ..small_config() };
    let lengths = [50, 33, 20, 25];
    let steps = vec![
        vec![(0, 30), (1, 1), (2, 17)],
        vec![(0, 1), (1, 31), (2, 1), (3, 19)],
        vec![(3, 1), (0, 1), (2, 1), (1, 1)],
        vec![(0, 1), (2, 1)],
    ];
    let plan = invariance::Plan { threads: 2, steps, page_stride: 29 };
    let mixed = invariance::run_adapted(model, together, &config, &lengths, &plan, adapters);
    for (sequence, length) in lengths.into_iter().enumerate() {
        let plan = invariance::token_by_token(sequence, length);
        let plain = invariance::run_adapted(model, alone, &config, &lengths, &plan, adapters);
        invariance::compare(&plain, &mixed, what);
    }
}

pub(super) fn check_batch(alone: Unit, together: Unit) {
    let model = load(LLAMA);
    check_mixed(&model, &read(&model, &[Some(QV), None, Some(ALL)]), alone, together, LLAMA);
}

#[test]
fn rows_with_different_adapters_and_with_none_have_the_bits_they_have_alone() {
    check_batch(Unit::Card(Order::Forward), Unit::Card(Order::Backward));
    check_batch(Unit::Card(Order::Forward), Unit::Cards(2));
}

#[test]
fn rows_without_an_adapter_have_the_bits_of_a_card_that_knows_none() {
    let model = load(LLAMA);
    let (config, lengths, unit) = (small_config(), [40, 20], Unit::Card(Order::Forward));
    let plan =
        invariance::Plan { threads: 1, steps: vec![vec![(0, 30), (1, 15)], vec![(0, 1), (1, 1)]], page_stride: 29 };
    let beside = invariance::run_adapted(&model, unit, &config, &lengths, &plan, &read(&model, &[None, Some(ALL)]));
    let plain = invariance::run(&model, unit, &config, &lengths, &plan);
    invariance::compare(&plain[..1], &beside[..1], "beside an adapter");
}

#[test]
fn cards_that_share_a_model_have_the_bits_of_one_with_adapters() {
    // q, k and v head after head in the checkpoint, and no gates; outputs that no number of ranks divides; a head that all ranks have.
    for (base, ranks) in [("gptneox", 4), ("cohere", 3), ("gemma3", 4), ("phi3", 2)] {
        let base = format!("tests/golden/{base}");
        let [adapter, merged] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        random_adapter(&base, adapter.path(), merged.path());
        let model = load(&base);
        let adapter = Adapter::load(&model, adapter.path(), 8).expect("a good adapter");
        check_mixed(&model, &[Some(adapter), None], Unit::Card(Order::Forward), Unit::Cards(ranks), &base);
    }
}

#[test]
fn a_host_one_step_ahead_draws_the_same_with_adapters() {
    let adapters = [Some(QV), None, Some(ALL), None];
    check_ahead(LLAMA, Unit::Card(Order::Forward), &adapters);
    check_ahead(LLAMA, Unit::Cards(2), &adapters);
    let (with, without) = (run(LLAMA, Unit::Card(Order::Forward), true, &adapters).0, [None]);
    let without = run(LLAMA, Unit::Card(Order::Forward), true, &without).0;
    let same: Vec<bool> = with.iter().zip(&without).map(|(with, without)| with == without).collect();
    assert!(same.iter().zip(adapters.iter().cycle()).all(|(same, adapter)| *same == adapter.is_none()), "{same:?}");
}

#[test]
fn a_step_with_adapters_is_one_copy_more_and_takes_no_memory() {
    let (model, warm) = (load(LLAMA), Sampling { temperature: 0.7, seed: 3, ..Sampling::default() });
    for (batch, adapters) in [(1, &[Some(ALL)][..]), (5, &[Some(QV), None, Some(ALL)]), (16, &[None, Some(QV)])] {
        let steps = asked(LLAMA, 6, &vec![warm.clone(); batch], &read(&model, adapters));
        // The first takes memory for the adapters and makes the graph.
        assert!(steps[0][0] > 0 && steps[1..].iter().all(|step| *step == [0, 2, 1, 2, 4 * batch]), "{steps:?}");
    }
}

/// A sequence that decodes one token after another on a card that computes nothing.
struct Decoding {
    engine: Engine,
    pages: Vec<PageId>,
    tokens: usize,
}

impl Decoding {
    fn new(model: &Arc<Model>, devices: Vec<Emulated>) -> Self {
        let config = Config { kv_bytes: Some(1 << 20), tensor_parallel: devices.len(), ..small_config() };
        let boxed = |device| Box::new(device) as Box<dyn crate::cuda::Device>;
        let engine = Engine::on_devices(model.clone(), &config, devices.into_iter().map(boxed).collect());
        Self { engine: engine.expect("an engine"), pages: (0..8).map(PageId).collect(), tokens: 1 }
    }

    /// Begins a step with `adapter`, if it can be, and else takes it.
    fn step(&mut self, adapter: Option<&Adapter>) -> Result<bool, Error> {
        let (history, sampling) = (vec![1; self.tokens], Sampling::default());
        let sample = Sample {
            sampling: &sampling,
            history: &history,
            prompt_tokens: 1,
            forbidden: &[],
            min_tokens: 0,
            grammar: None,
        };
        let (start, sample) = (self.tokens - 1, Some(sample));
        let row = Row { tokens: &[7], start, pages: &self.pages, adapter, sample, ..Row::default() };
        self.tokens += 1;
        let begun = self.engine.begin(&[row])?;
        match begun {
            true => self.engine.end().map(drop)?,
            false => self.engine.step(&[row], &mut |_| {}).map(drop)?,
        }
        Ok(begun)
    }
}

#[test]
fn memory_of_an_adapter_is_given_back_when_nobody_has_it_any_more() {
    let model = load(LLAMA);
    for ranks in [1, 2] {
        let devices: Vec<Emulated> = (0..ranks).map(|_| Emulated::recording()).collect();
        let asked: Vec<_> = devices.iter().map(Emulated::asked).collect();
        let held = || asked.iter().map(|asked| asked.held.load(Relaxed)).collect::<Vec<_>>();
        let mut decoding = Decoding::new(&model, devices);
        let [all, qv] = [ALL, QV].map(|path| read(&model, &[Some(path)]).remove(0).expect("it was read"));
        assert!(decoding.step(None).expect("a step"));
        let before = held();
        assert!(!decoding.step(Some(&all)).expect("a step"), "what brings an adapter is not begun ahead");
        assert!(decoding.step(Some(&all)).expect("a step") && decoding.step(None).expect("a step"));
        let with_one = held();
        assert!(with_one.iter().zip(&before).all(|(with, before)| with > before));
        assert!(!decoding.step(Some(&qv)).expect("a step") && decoding.step(Some(&all)).expect("a step"));
        let with_both = held();
        drop(qv);
        let (held_by_another, _) = (all.clone(), drop(all));
        assert!(!decoding.step(None).expect("a step"), "nor is what takes one away");
        assert!(with_both != with_one && held() == with_one && decoding.step(Some(&held_by_another)).expect("a step"));
        drop(held_by_another);
        assert!(!decoding.step(None).expect("a step") && decoding.step(None).expect("a step"));
        assert_eq!(held(), before, "{ranks} ranks");
    }
}

#[test]
fn an_adapter_that_finds_no_memory_ends_its_own_sequence_and_no_other() {
    let model = load(LLAMA);
    let adapter = read(&model, &[Some(ALL)]).remove(0).expect("it was read");
    for ranks in [1, 2] {
        let devices: Vec<Emulated> = (0..ranks).map(|_| Emulated::recording()).collect();
        let asked = devices.last().expect("one at least").asked();
        let mut decoding = Decoding::new(&model, devices);
        assert!(decoding.step(None).expect("a step"));
        let before = asked.held.load(Relaxed);
        // The last has room for nothing, or for what rows leave between kernels, but for no factors.
        for room in [1000, 512 * 48 * 4] {
            asked.most.store(before + room, Relaxed);
            let Err(Error::Row(problem)) = decoding.step(Some(&adapter)) else { panic!("there is no room") };
            assert!(problem.contains("row 0") && problem.contains(adapter.id()), "{problem}");
            assert!(decoding.step(None).expect("a step") && asked.held.load(Relaxed) == before);
        }
        asked.most.store(usize::MAX, Relaxed);
        assert!(!decoding.step(Some(&adapter)).expect("room") && decoding.step(Some(&adapter)).expect("a step"));
    }
}

#[test]
fn more_ranks_than_before_move_what_a_step_works_in() {
    let model = load(LLAMA);
    let adapters = read(&model, &[Some(QV), Some(ALL)]);
    let check = |order: [usize; 2]| {
        let mut runner = Runner::new(model.clone(), Unit::Card(Order::Forward));
        let mut logits = [vec![], vec![]];
        // The first makes a graph, which is right when the second has been there.
        for at in [order[0], order[1], order[0]] {
            runner.adapter.clone_from(&adapters[at]);
            runner.draw(&[5, 9, 2, 77, 140, 8, 31], 0, 6, &watched());
            logits[at] = runner.engine.logits(0).expect("sampled").to_vec();
        }
        logits
    };
    assert!(check([0, 1]) == check([1, 0]));
}
