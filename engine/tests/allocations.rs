//! A steady step takes no memory from the heap: it never waits for an allocator, and a long run cannot fragment what that manages.
//!
//! Steady: a running batch decodes, nobody comes or goes, and nothing is asked for that is a list of its own (log-probabilities, a
//! grammar). The counting allocator is this process's only one, so other threads are counted as well: this file has one test.

use engine::{
    Adapter, Config, Engine, Model, Row, Sample, Sampling, TokenId,
    scheduler::{History, Limits, Request, Scheduler, Stop, Until},
};
use kv_cache::PageId;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

struct Counting;

/// Blocks taken and enlarged so far.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

// SAFETY: `System` does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps that may make room for what follows.
const WARM: usize = 8;
/// Steps that may not.
const STEADY: usize = 40;
const SEQUENCES: usize = 6;
const PROMPT: usize = 20;

/// Ways of drawing that need memory of their own.
fn samplings() -> Vec<Sampling> {
    let warm = Sampling { temperature: 0.9, seed: 7, ..Sampling::default() };
    vec![
        Sampling::default(),
        Sampling { top_p: 0.9, ..warm.clone() },
        Sampling { top_k: 5, min_p: 0.01, ..warm.clone() },
        Sampling { repetition_penalty: 1.1, frequency_penalty: 0.2, presence_penalty: 0.1, ..warm.clone() },
        Sampling { logit_bias: vec![(3, 1.0)], bad_words: vec![vec![5, 6]], ..warm },
        Sampling { allowed_tokens: (10..200).collect(), ..Sampling::default() },
    ]
}

/// Decodes `sequences` sequences with prompts of `prompt` tokens, drawing by `samplings` in turn and every other one with `adapter`, and
/// returns how many blocks the steady steps took.
fn steady(
    model: &Arc<Model>,
    samplings: &[Sampling],
    adapter: Option<&Adapter>,
    sequences: usize,
    prompt: usize,
) -> usize {
    let config = Config { kv_bytes: Some(8 << 20), token_budget: 1024, threads: Some(3), ..Config::default() };
    let mut engine = Engine::new(model.clone(), &config).expect("an engine");
    let length = prompt + 1 + WARM + STEADY;
    let pages = length.div_ceil(config.page_tokens as usize);
    let tables: Vec<Vec<PageId>> = (0..sequences)
        .map(|sequence| (0..pages).map(|page| PageId((sequence * pages + page) as u32)).collect())
        .collect();
    let mut histories: Vec<Vec<TokenId>> = (0..sequences)
        .map(|sequence| {
            let mut history = Vec::with_capacity(length);
            history.extend((0..prompt).map(|token| (sequence * 31 + token * 7) as TokenId % 100 + 5));
            history
        })
        .collect();
    let mut taken = 0;
    for step in 0..1 + WARM + STEADY {
        let rows: Vec<Row<'_>> = (0..sequences)
            .map(|sequence| {
                let history = &histories[sequence];
                let start = if step == 0 { 0 } else { history.len() - 1 };
                let sample = Sample {
                    sampling: &samplings[sequence % samplings.len()],
                    history,
                    prompt_tokens: prompt,
                    forbidden: &[2],
                    min_tokens: length,
                    grammar: None,
                };
                let (tokens, pages) = (&history[start..], &tables[sequence][..]);
                let adapter = adapter.filter(|_| sequence % 2 == 1);
                Row { tokens, start, pages, adapter, sample: Some(sample), ..Row::default() }
            })
            .collect();
        let before = TAKEN.load(Ordering::SeqCst);
        let made = engine.step(&rows, &mut |_| {}).expect("good rows");
        let during = TAKEN.load(Ordering::SeqCst) - before;
        if step > WARM {
            taken += during;
        }
        let drawn: Vec<TokenId> = made.iter().map(|made| made.sampled[0].token).collect();
        drop(rows);
        histories.iter_mut().zip(drawn).for_each(|(history, token)| history.push(token));
    }
    taken
}

/// Runs sequences through a scheduler and returns how many blocks each of its steady steps took.
fn scheduled(model: &Arc<Model>) -> Vec<usize> {
    let config = Config { kv_bytes: Some(8 << 20), token_budget: 256, threads: Some(2), ..Config::default() };
    let mut engine = Engine::new(model.clone(), &config).expect("an engine");
    let layout = engine.memory().layout();
    let mut scheduler = Scheduler::new(Limits {
        pages: layout.pages as usize,
        page_tokens: layout.page_tokens as usize,
        token_budget: config.token_budget as usize,
        max_sequences: config.max_sequences as usize,
        max_model_len: engine.max_model_len(),
        max_waiting: SEQUENCES,
    })
    .expect("good limits");
    for sequence in 0..SEQUENCES as TokenId {
        let tokens = (0..PROMPT as TokenId).map(|token| (sequence * 31 + token * 7) % 100 + 5).collect();
        let request = Request {
            history: History::new(b"", tokens, layout.page_tokens as usize),
            prompt_tokens: PROMPT,
            adapter: None,
            sampling: Sampling::default(),
            grammar: None,
            stop: Stop { max_tokens: 1 << 20, min_tokens: 0, ids: Vec::new() },
            prompt_logprobs: None,
            priority: 0,
            until: Until::End,
        };
        assert!(scheduler.submit(request, Duration::ZERO).is_ok());
    }
    let step = |_| {
        let before = TAKEN.load(Ordering::SeqCst);
        let plan = scheduler.schedule(Duration::ZERO);
        let computed = scheduler.compute(plan, &mut engine, &mut |_, _| {}, &|| Duration::ZERO);
        assert_eq!(computed.drawn.len(), SEQUENCES);
        TAKEN.load(Ordering::SeqCst) - before
    };
    (0..1 + WARM + STEADY).map(step).skip(1 + WARM).collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn demo() -> PathBuf {
    root().join("models/demo")
}

/// Every checkpoint of the repository: all families, all weight formats.
fn checkpoints() -> Vec<PathBuf> {
    let root = root();
    let mut all = vec![demo()];
    for (folder, wanted) in [("tests/golden", ""), ("tests/gguf", "gguf")] {
        let files = std::fs::read_dir(root.join(folder)).expect("a folder of the repository");
        let paths = files.map(|file| file.expect("an entry").path());
        all.extend(paths.filter(|path| match wanted {
            "" => path.is_dir(),
            wanted => path.extension().is_some_and(|extension| extension == wanted),
        }));
    }
    all.sort();
    assert!(all.len() > 20, "{all:?}");
    all
}

#[test]
fn a_steady_step_takes_no_memory() {
    let greedy = vec![Sampling::default()];
    let mut faults = Vec::new();
    for path in checkpoints() {
        let model = Model::load(&path, &mut |_| {}).expect("a good checkpoint");
        for samplings in [&greedy, &samplings()] {
            let taken = steady(&model, samplings, None, SEQUENCES, PROMPT);
            if taken > 0 {
                faults.push(format!("{}: {taken} blocks in {STEADY} steps", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");

    let llama = Model::load(&root().join("tests/golden/llama"), &mut |_| {}).expect("a good checkpoint");
    let adapter = root().join("tests/golden/llama/adapters/lora-all");
    let adapter = Adapter::load(&llama, &adapter, 64).expect("a good adapter");
    assert_eq!(steady(&llama, &greedy, Some(&adapter), SEQUENCES, PROMPT), 0, "with an adapter");

    let model = Model::load(&demo(), &mut |_| {}).expect("a good checkpoint");
    assert_eq!(steady(&model, &greedy, None, 1, 700), 0, "a sequence whose attention is split");

    // The list of drawn tokens is its caller's. Steps in which sequences begin a page, or outgrow the room for their tokens, take more.
    let steps = scheduled(&model);
    assert!(steps.iter().filter(|taken| **taken <= 1).count() > STEADY * 3 / 4, "{steps:?}");
}
