//! Cards behind NVIDIA's driver, where there is neither: the processor plays both, under their names (`driver/libcuda.c`, `driver/libnvrtc.c`), and what
//! connects cards (`driver/libnccl.c`) and what multiplies on them (`driver/libcublasLt.c`). What is tried here is how the engine calls them: in which order, with what, and what it makes of their errors.
//!
//! The stand-in is opened before the engine asks for `libcuda.so`, which the system's loader then takes for the one that is meant. One test, because a
//! process has one driver.
#![cfg(all(target_os = "linux", target_pointer_width = "64", feature = "cuda"))]

use engine::{
    Adapter, Config, Device, Engine, Error, Model, Row, Sample, Sampling, TokenId,
    cards::{self, Part, Reading},
};
use kv_cache::{Extent, PageId, PoolCopy};
use libloading::Library;
use std::{
    ffi::c_int,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// Set where this program plays the process that pages are handed to: the folder in which it leaves what came.
const PEER: &str = "BATON_TEST_PEER";
/// What stands before what it tells of its pages.
const TELLS: &str = "pages: ";

/// Compiles `source` of the folder `driver` into `folder` as the library `name`, and opens it.
fn library(source: &str, folder: &Path, name: &str) -> (Library, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = folder.join(name);
    let emulator = format!("-DEMULATOR=\"{}\"", root.join("src/cuda/emulator.c").display());
    let mut compiler = Command::new("cc");
    compiler.args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread", &emulator]);
    compiler.arg(format!("-Wl,-soname,{name}")).arg("-o").arg(&file);
    let status = compiler.arg(root.join("tests/driver").join(source)).arg("-ldl").status().expect("a C compiler");
    assert!(status.success(), "{source}");
    // SAFETY: the library has no initialisers.
    (unsafe { Library::new(&file) }.expect("a library that was just made"), file)
}

/// Calls a function without arguments of `library`.
fn number(library: &Library, name: &str) -> c_int {
    // SAFETY: the functions that are asked for have this type, and may be called at any time.
    unsafe { library.get::<unsafe extern "C" fn() -> c_int>(name).expect("a function of the library")() }
}

/// Computes `tokens[start..]` as the rows of as many sequences as there are `tables`, and returns the logits of each.
fn logits(
    engine: &mut Engine,
    tokens: &[TokenId],
    start: usize,
    tables: &[Vec<PageId>],
    leaves: bool,
) -> Vec<Vec<f32>> {
    let sampling = Sampling { logprobs: Some(0), ..Sampling::default() };
    let sample = Sample {
        sampling: &sampling,
        history: tokens,
        prompt_tokens: tokens.len(),
        forbidden: &[],
        min_tokens: 0,
        grammar: None,
    };
    let mut rows = Vec::new();
    for pages in tables {
        rows.push(Row { tokens: &tokens[start..], start, pages, leaves, sample: Some(sample), ..Row::default() });
    }
    engine.step(&rows, &mut |_| {}).expect("good rows");
    (0..tables.len()).map(|row| engine.logits(row).expect("it was sampled").to_vec()).collect()
}

/// Returns the blocks of `pages`, layer after layer.
fn extents(engine: &Engine, pages: &[PageId]) -> Vec<Extent> {
    let layout = engine.memory().layout();
    let place = |layer| pages.iter().map(move |page| (layer, *page));
    let extent = |(layer, page)| Extent { offset: layout.block_offset(layer, page), bytes: layout.block_bytes() };
    (0..layout.layers).flat_map(place).map(extent).collect()
}

/// Returns the bytes of `pages`, layer after layer, by way of the host's memory.
fn blocks(engine: &Engine, pages: &[PageId]) -> Vec<Vec<u8>> {
    let layout = engine.memory().layout();
    engine.backing().expect("a card").fetch(&extents(engine, pages)).expect("pages that are there");
    let mut blocks = Vec::new();
    for layer in 0..layout.layers {
        for page in pages {
            let (mut block, at) = (vec![0; layout.block_bytes()], layout.block_offset(layer, *page));
            engine.memory().file().read_exact_at(&mut block, at as u64).expect("the pool's bytes");
            assert!(block.iter().any(|byte| *byte != 0), "{page:?} of layer {layer} did not leave");
            blocks.push(block);
        }
    }
    blocks
}

/// What an engine makes of a few steps, to the bit.
#[derive(PartialEq)]
struct Outcome {
    /// Of a prompt that leaves, of prompts beside each other, and of sequences that decode.
    logits: Vec<Vec<u32>>,
    blocks: Vec<Vec<u8>>,
    tokens: Vec<Vec<TokenId>>,
}

/// The pages of five sequences.
fn tables() -> Vec<Vec<PageId>> {
    (0..5).map(|at| (0..8).map(|page| PageId(at + 5 * page)).collect()).collect()
}

/// The pages of a sequence of up to 608 tokens.
fn wide_table() -> [Vec<PageId>; 1] {
    [(0..38).map(PageId).collect()]
}

fn tokens() -> Vec<TokenId> {
    (0..90).map(|at| at * 7 % 1000 + 3).collect()
}

fn outcome(engine: &mut Engine) -> Outcome {
    let (tokens, tables) = (tokens(), tables());
    let mut all = logits(engine, &tokens[..80], 0, &tables[..1], true);
    let mut left = blocks(engine, &tables[0][..5]);
    all.extend(logits(engine, &tokens[..40], 0, &tables[1..], false));
    // The second of the steps that decode replays what the first made.
    for end in [41, 42] {
        let alone = logits(engine, &tokens[..end], end - 1, &tables[1..2], false);
        let together = logits(engine, &tokens[..end], end - 1, &tables[2..], false);
        assert!(together.iter().all(|logits| *logits == alone[0]), "a sequence has its bits in any batch");
        all.extend(together);
    }
    left.extend(blocks(engine, &tables[1][..3]));
    let bits = |logits: &Vec<f32>| logits.iter().map(|logit| logit.to_bits()).collect();
    Outcome { logits: all.iter().map(bits).collect(), blocks: left, tokens: ahead(engine) }
}

/// Continues the sequences of [`outcome`] but the first by the most likely tokens, by steps that end before the next begins and by ones that begin before, and checks
/// that the tokens are the same. Returns them.
fn ahead(engine: &mut Engine) -> Vec<Vec<TokenId>> {
    let (tokens, tables, sampling) = (tokens(), tables(), Sampling::default());
    fn row<'a>(history: &'a [TokenId], sampling: &'a Sampling, pages: &'a [PageId], follows: Option<usize>) -> Row<'a> {
        let sample = Sample { sampling, history, prompt_tokens: 40, forbidden: &[], min_tokens: 0, grammar: None };
        let (tokens, start) = (&history[history.len() - 1..], history.len() - 1);
        Row { tokens, start, pages, sample: Some(sample), follows, ..Row::default() }
    }
    let mut known = vec![tokens[..41].to_vec(); 4];
    for _ in 0..6 {
        let rows: Vec<Row<'_>> =
            known.iter().zip(&tables[1..]).map(|(known, pages)| row(known, &sampling, pages, None)).collect();
        let drawn: Vec<_> = engine.step(&rows, &mut |_| {}).expect("good rows").to_vec();
        known.iter_mut().zip(drawn).for_each(|(known, made)| known.push(made.sampled[0].token));
    }
    let mut drawn = vec![tokens[..41].to_vec(); 4];
    for step in 0..7 {
        if step < 6 {
            // Of the token that a row follows it has only the place.
            let mut history = tokens[..41].to_vec();
            history.resize(41 + step, 0);
            let rows: Vec<Row<'_>> =
                (0..4).map(|at| row(&history, &sampling, &tables[1 + at], (step > 0).then_some(at))).collect();
            assert!(engine.begin(&rows).expect("a card that works"), "rows that decode");
        }
        if step > 0 {
            let made = engine.end().expect("a card that works");
            drawn.iter_mut().zip(made).for_each(|(known, made)| known.push(made.sampled[0].token));
        }
    }
    assert_eq!(drawn, known);
    drawn
}

/// Checks that two engines mean the same by their logits, one of which rounds to bf16.
fn check_alike(found: &[f32], expected: &[f32], what: &str) {
    check_within(0.05, found, expected, what);
}

/// Checks that logits differ by no more than `share` of the largest.
fn check_within(share: f32, found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest > 1.0 && worst <= share * largest, "{what}: they differ by {worst} of {largest}");
}

fn refused(model: &Arc<Model>, config: &Config, words: &[&str]) {
    let error = Engine::new(model.clone(), config).expect_err("an engine that cannot be");
    assert!(matches!(error, Error::Card { .. }), "{error:?}");
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{text:?} lacks {word:?}"));
}

/// Returns the model of the recorded references of that name.
fn model(name: &str) -> Arc<Model> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    Model::load(&path, &mut |_| {}).expect("a good checkpoint")
}

/// What stands in for NVIDIA's libraries.
struct Stand {
    driver: Library,
    nvrtc: Library,
    nccl: Library,
    /// Before it is there, nobody knows what cards are doing.
    nvml: Option<Library>,
    cublaslt: Library,
    model: Arc<Model>,
    /// Of an engine on the first card.
    config: Config,
}

impl Stand {
    fn new(folder: &Path) -> Self {
        let (driver, _) = library("libcuda.c", folder, "libcuda.so");
        let (nvrtc, nvrtc_file) = library("libnvrtc.c", folder, "libnvrtc.so");
        let (nccl, nccl_file) = library("libnccl.c", folder, "libnccl.so.2");
        let (cublaslt, cublaslt_file) = library("libcublasLt.c", folder, "libcublasLt.so.13");
        let config = Config {
            device: Device::Cuda(0),
            nvrtc_library: Some(nvrtc_file),
            nccl_library: Some(nccl_file),
            cublaslt_library: Some(cublaslt_file),
            kernel_cache: Some(folder.join("cache")),
            kv_bytes: Some(8 << 20),
            token_budget: 256,
            max_sequences: 8,
            max_model_len: Some(1024),
            threads: Some(2),
            ..Config::default()
        };
        Self { driver, nvrtc, nccl, cublaslt, nvml: None, model: model("llama3-bf16-sharded"), config }
    }

    /// Of an engine on the first card that need not be exact, for prompts that are long enough for a library.
    fn inexact(&self) -> Config {
        Config { exact: false, token_budget: 1024, ..self.config.clone() }
    }

    /// Of an engine on all three cards.
    fn shared(&self) -> Config {
        Config { tensor_parallel: 3, ..self.config.clone() }
    }

    fn engine(&self, config: &Config) -> Engine {
        Engine::new(self.model.clone(), config).expect("an engine")
    }

    fn compiled(&self) -> c_int {
        number(&self.nvrtc, "compiled")
    }

    /// Checks that nobody has kept anything, or waits for somebody who is gone.
    fn check_empty(&self) {
        assert_eq!((number(&self.driver, "leaks"), number(&self.nccl, "connections")), (0, 0));
        assert_eq!(number(&self.cublaslt, "objects"), 0);
        assert_eq!(number(&self.driver, "in_vain"), 0);
    }

    /// What is wrong is said, and leaves nothing behind.
    fn check_refusals(&self) {
        let config = || self.config.clone();
        let gone = |name: &str| Some(PathBuf::from("/nowhere").join(name));
        let mib = 1 << 20;
        let check = |config: Config, words: &[&str]| {
            refused(&self.model, &config, words);
            self.check_empty();
        };
        check(Config { device: Device::Cuda(3), ..config() }, &["cuda:3", "3 cards"]);
        check(Config { device: Device::Cuda(1), ..self.shared() }, &["cuda:3", "3 cards"]);
        check(Config { nvrtc_library: gone("libgone.so"), ..config() }, &["cuda:0", "NVRTC", "libgone.so"]);
        check(Config { nccl_library: gone("libgone.so"), ..self.shared() }, &["cuda:0", "NCCL", "libgone.so"]);
        // That is a library, but another one.
        check(
            Config { nccl_library: config().nvrtc_library, ..self.shared() },
            &["connect it with its peers", "libnvrtc.so"],
        );
        check(
            Config { cublaslt_library: gone("libgone.so"), ..self.inexact() },
            &["cuda:0", "exact is off", "libgone.so", "nvidia-cublas-cu12", "--cublaslt-library"],
        );
        check(Config { cublaslt_library: config().nvrtc_library, ..self.inexact() }, &["libnvrtc.so", "cublasLt"]);
        number(&self.cublaslt, "grow_old");
        check(self.inexact(), &["version 12103", "CUDA 12.0"]);
        number(&self.cublaslt, "grow_up");
        check(Config { kv_bytes: Some(8192 * mib), ..config() }, &["a processor", "pages", "out of memory"]);
        check(Config { kv_bytes: Some(16384 * mib), ..self.shared() }, &["a processor", "pages", "out of memory"]);
        let none = Config { kv_bytes: None, gpu_memory_utilization: 1e-3, ..config() };
        check(none, &["gpu_memory_utilization", "weights and buffers"]);
    }

    /// Checks what is told of cards to people and dashboards, before NVIDIA's management library is there and after.
    fn check_cards(&mut self, folder: &Path) {
        let survey = || cards::survey(&self.config).expect("a binary that knows cards");
        let found = |part: &Part, words: &str| match part {
            Part::Found(what) | Part::Missing(what) => assert!(what.contains(words), "{what:?} lacks {words:?}"),
        };
        let (engine, told) = (self.engine(&self.shared()), survey());
        assert_eq!(told.cards.len(), 3);
        assert_eq!(told.cards[1], "cuda:1 a processor, compute capability 9.0, 4 GiB");
        found(&told.driver, "CUDA 13.0");
        found(&told.nvrtc, "13.0");
        found(&told.nccl, "libnccl.so.2");
        found(&told.cublaslt, "libcublasLt.so");
        found(&told.nvml, "libnvidia-ml.so.1");
        let problem = cards::Watch::open(&engine).expect_err("no such library");
        assert!(problem.contains("libnvidia-ml.so.1"), "{problem}");

        self.nvml = Some(library("libnvidia-ml.c", folder, "libnvidia-ml.so.1").0);
        found(&survey().nvml, "12.570.1");
        let watch = cards::Watch::open(&engine).expect("the library").expect("cards");
        let reading = |at: usize, sensors: Option<()>| Reading {
            card: format!("cuda:{at}"),
            memory: Some((80 << 30, (at as u64 + 1) << 30)),
            utilization: Some((40 + at) as f64 / 100.0),
            power: sensors.map(|()| 350.5),
            temperature: sensors.map(|()| 61.0),
        };
        assert_eq!(watch.read(), [reading(0, Some(())), reading(1, None), reading(2, Some(()))]);
        let processor = self.engine(&Config { device: Device::Cpu, ..self.config.clone() });
        assert!(cards::Watch::open(&processor).expect("nothing is opened").is_none());
    }

    /// Checks an engine on one card against the processor, and returns what it makes of some steps.
    fn check_one(&self) -> Outcome {
        let (tokens, one) = (tokens(), &tables()[..1]);
        let mut cpu = self.engine(&Config { device: Device::Cpu, ..self.config.clone() });
        let mut card = self.engine(&self.config);
        let compiled = self.compiled();
        assert!(compiled > 5, "{compiled} programs");
        let prompt = logits(&mut card, &tokens[..80], 0, one, true);
        check_alike(&prompt[0], &logits(&mut cpu, &tokens[..80], 0, one, true)[0], "a prompt");
        let outcome = outcome(&mut card);
        let cached = fs::read_dir(self.config.kernel_cache.as_ref().expect("a folder")).expect("a cache").count();
        assert_eq!(cached as c_int, compiled);
        outcome
    }

    /// Checks that the three cards do as the one whose `expected` outcome is.
    fn check_shared(&self, expected: &Outcome) {
        let mut cards = self.engine(&self.shared());
        let compiled = self.compiled();
        assert_eq!(number(&self.nccl, "connections"), 3);
        let found = outcome(&mut cards);
        for (at, (found, expected)) in found.logits.iter().zip(&expected.logits).enumerate() {
            assert!(found == expected, "the logits of row {at} are others");
        }
        assert!(found == *expected, "pages have the bytes of one card's");
        assert_eq!(self.compiled(), compiled, "what steps do is made ready before");
    }

    /// Pages go from card to card in one process, and from process to process.
    fn check_handoffs(&self, folder: &Path) {
        let (tokens, tables) = (tokens(), tables());
        let (here, there) = (&tables[0][..5], &tables[3][..5]);
        let mut source = self.engine(&self.config);
        logits(&mut source, &tokens[..80], 0, &tables[..1], true);
        let pages = source.backing().expect("a card");
        let copies = |target: &Engine, there: &[PageId]| -> Vec<PoolCopy> {
            let (from, to) = (extents(&source, here), extents(target, there));
            let copy =
                |(from, to): (Extent, Extent)| PoolCopy { source: from.offset, target: to.offset, bytes: from.bytes };
            from.into_iter().zip(to).map(copy).collect()
        };
        for card in [0, 1] {
            let target = self.engine(&Config { device: Device::Cuda(card), ..self.config.clone() });
            let reached =
                pages.reach(&target.backing().expect("a card").share().expect("it can be")).expect("in reach");
            reached.write(&copies(&target, there)).expect("they can be copied");
            assert!(blocks(&target, there) == blocks(&source, here), "from cuda:0 to cuda:{card}");
        }
        // Three that share a model are all in reach of the middle one alone.
        let shared = self.engine(&self.shared());
        let cards = shared.backing().expect("cards").share().expect("it can be");
        let problem = pages.reach(&cards).expect_err("one is far");
        assert!(problem.contains("cuda:0") && problem.contains("do not reach"), "{problem}");
        let mut middle = self.engine(&Config { device: Device::Cuda(1), ..self.config.clone() });
        logits(&mut middle, &tokens[..80], 0, &tables[..1], true);
        let reached = middle.backing().expect("a card").reach(&cards).expect("in reach");
        reached.write(&copies(&shared, there)).expect("they can be copied");
        assert!(blocks(&shared, there) == blocks(&source, here), "to three cards");
        drop((reached, shared, middle));

        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "a_model_runs_behind_the_driver", "--nocapture"]).env(PEER, folder);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("another process");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let shared = lines.by_ref().find_map(|line| Some(line.expect("text").split_once(TELLS)?.1.to_owned()));
        let reached = pages.reach(&shared.expect("it tells")).expect("in reach");
        reached.write(&copies(&source, there)).expect("they can be copied");
        drop(reached);
        child.stdin.take().expect("piped").write_all(b"done\n").expect("it waits");
        lines.for_each(drop);
        assert!(child.wait().expect("it ends").success());
        let landed = fs::read(folder.join("landed")).expect("what landed");
        assert!(landed == blocks(&source, here).concat(), "to another process");
        let problem = pages.reach("{}").expect_err("nothing");
        assert!(problem.contains("says where the pages are"), "{problem}");
    }

    /// What the other process does: it tells where its pages are, waits for a word, and writes down what came.
    fn play_target(&self, folder: &Path) {
        let engine = self.engine(&self.config);
        println!("{TELLS}{}", engine.backing().expect("a card").share().expect("it can be reached"));
        std::io::stdin().read_line(&mut String::new()).expect("a word");
        fs::write(folder.join("landed"), blocks(&engine, &tables()[3][..5]).concat()).expect("a file");
    }

    /// A card that need not be exact multiplies many rows by the library, and few by kernels of ours.
    fn check_library(&self) {
        let (tokens, one): (Vec<TokenId>, _) = ((0..600).map(|at| at * 7 % 1000 + 3).collect(), wide_table());
        let products = || number(&self.cublaslt, "products");
        let exact = {
            let config = Config { token_budget: 1024, ..self.config.clone() };
            logits(&mut self.engine(&config), &tokens[..521], 0, &one, false)
        };
        assert_eq!(products(), 0, "who is exact multiplies by kernels of ours");
        self.check_empty();
        let mut first = Vec::new();
        for _ in 0..2 {
            let mut card = self.engine(&self.inexact());
            let (ready, choices) = (products(), number(&self.cublaslt, "choices"));
            // Classes of 512 and 1024 rows of a few shapes.
            assert!(choices >= 4 && ready >= 4, "{choices} ways, {ready} products");
            let prompt = logits(&mut card, &tokens[..520], 0, &one, true);
            assert!(products() > ready, "a long prompt goes through the library");
            assert_eq!(number(&self.cublaslt, "choices"), choices, "ways are kept");
            // That way is none for an odd number of rows, which is found out when they come.
            let odd = logits(&mut card, &tokens[..521], 0, &one, false);
            assert!(number(&self.cublaslt, "choices") > choices);
            check_alike(&odd[0], &exact[0], "a long prompt");
            let multiplied = products();
            let short = logits(&mut card, &tokens[..80], 0, &one, false);
            let next = logits(&mut card, &tokens[..81], 80, &one, false);
            assert_eq!(products(), multiplied, "few rows go through kernels of ours");
            let all = [prompt, odd, short, next];
            assert!(first.is_empty() || first == all, "a start has the bits of another");
            first = all.into();
        }
        self.check_empty();
        // What the library has no way for is as exact as ever.
        number(&self.cublaslt, "forget");
        let multiplied = products();
        assert!(logits(&mut self.engine(&self.inexact()), &tokens[..521], 0, &one, false) == exact);
        assert_eq!(products(), multiplied);
        number(&self.cublaslt, "remember");
        self.check_empty();
        // Inputs are rounded to what weights are, or weights widened.
        for (name, share) in
            [("llama-fp8-channel", 0.3), ("llama-int8-w8a8", 0.1), ("llama-gptq-int4-g32-actorder", 0.05)]
        {
            let engine = |config: &Config| Engine::new(model(name), config).expect("an engine");
            let mut cpu = engine(&Config { device: Device::Cpu, exact: true, ..self.inexact() });
            let found = logits(&mut engine(&self.inexact()), &tokens[..520], 0, &one, false);
            check_within(share, &found[0], &logits(&mut cpu, &tokens[..520], 0, &one, false)[0], name);
            self.check_empty();
        }
    }

    /// An adapter goes up when it is first computed, changes what its rows say as on the processor and nothing else, and leaves nothing behind.
    fn check_adapters(&self) {
        let (model, tokens, tables) = (model("llama"), tokens(), tables());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama/adapters/lora-all");
        let adapter = Adapter::load(&model, &path, 16).expect("a good adapter");
        let sampling = Sampling { logprobs: Some(0), ..Sampling::default() };
        let step = |engine: &mut Engine, end: usize, start: usize, adapters: [Option<&Adapter>; 2]| {
            let history = &tokens[..end];
            let sample = Sample {
                sampling: &sampling,
                history,
                prompt_tokens: end,
                forbidden: &[],
                min_tokens: 0,
                grammar: None,
            };
            let row = |at: usize| Row {
                tokens: &history[start..],
                start,
                pages: &tables[at],
                adapter: adapters[at],
                sample: Some(sample),
                ..Row::default()
            };
            engine.step(&[row(0), row(1)], &mut |_| {}).expect("good rows");
            [0, 1].map(|row| engine.logits(row).expect("it was sampled").to_vec())
        };
        let prompt_and_more = |config: &Config, adapters: [Option<&Adapter>; 2]| {
            let mut engine = Engine::new(model.clone(), config).expect("an engine");
            let logits = [(40, 0), (41, 40), (42, 41)].map(|(end, start)| step(&mut engine, end, start, adapters));
            (engine, logits.concat())
        };
        let two = Config { tensor_parallel: 2, ..self.config.clone() };
        let (_, on_processor) =
            prompt_and_more(&Config { device: Device::Cpu, ..self.config.clone() }, [Some(&adapter), None]);
        let (engine, without) = prompt_and_more(&self.config, [None, None]);
        let held = number(&self.driver, "leaks");
        drop(engine);
        let (mut engine, mixed) = prompt_and_more(&self.config, [Some(&adapter), None]);
        for (found, expected) in mixed.iter().zip(&on_processor) {
            check_alike(found, expected, "beside an adapter");
        }
        assert!(mixed[1] == without[1] && mixed[5] == without[5], "a row without an adapter has other bits");
        assert!(mixed[0] != without[0] && number(&self.driver, "leaks") > held);
        assert!(prompt_and_more(&two, [Some(&adapter), None]).1 == mixed, "two cards have other bits");
        drop(adapter);
        step(&mut engine, 43, 42, [None, None]);
        assert_eq!(number(&self.driver, "leaks"), held + 1, "what is left is a graph for rows with adapters");
    }

    /// A draft model is on the first card beside the model: both within the card's share, and neither changes what the other says.
    fn check_draft(&self) {
        let (tokens, one) = (tokens(), &tables()[..1]);
        let alone = |model: &Arc<Model>| {
            let mut engine = Engine::new(model.clone(), &self.config).expect("an engine");
            [(40, 0), (41, 40)].map(|(end, start)| logits(&mut engine, &tokens[..end], start, one, false))
        };
        let small = model("llama3");
        let expected = [alone(&self.model), alone(&small)];
        for config in [self.config.clone(), self.shared()] {
            let config = Config { kv_bytes: None, gpu_memory_utilization: 0.02, ..config };
            let engines = Engine::with_draft(self.model.clone(), small.clone(), &config);
            let (mut engine, mut draft) = engines.expect("two engines");
            assert_eq!(engine.memory().layout().pages, draft.memory().layout().pages);
            for (step, (end, start)) in [(40, 0), (41, 40)].into_iter().enumerate() {
                for (engine, expected) in [&mut engine, &mut draft].into_iter().zip(&expected) {
                    assert!(logits(engine, &tokens[..end], start, one, false) == expected[step], "other bits");
                }
            }
        }
    }

    /// A card that fails in the middle of a step fails the step, for which the others do not wait: one that computes a prompt, and one that decodes.
    fn check_failures(&self) {
        let (tokens, tables, sampling) = (tokens(), tables(), Sampling::default());
        let prompt = Row { tokens: &tokens[..80], pages: &tables[0], leaves: true, ..Row::default() };
        let sample = Sample {
            sampling: &sampling,
            history: &tokens[..81],
            prompt_tokens: 81,
            forbidden: &[],
            min_tokens: 0,
            grammar: None,
        };
        let one = Row { tokens: &tokens[80..81], start: 80, leaves: false, sample: Some(sample), ..prompt };
        for row in [prompt, one] {
            self.check_failure(row);
        }
    }

    /// A card that hangs is given up after a while, and so is what is to move its pages; nothing waits for it to be given back.
    fn check_hang(&self) {
        let (tokens, tables) = (tokens(), tables());
        let mut card = self.engine(&Config { card_timeout_ms: 300, ..self.config.clone() });
        logits(&mut card, &tokens[..80], 0, &tables[..1], true);
        let pages = card.backing().expect("a card");
        number(&self.driver, "hang_card");
        let row = Row { tokens: &tokens[..80], pages: &tables[0], leaves: true, ..Row::default() };
        for _ in 0..3 {
            let error = card.step(&[row], &mut |_| {}).expect_err("a card that hangs").to_string();
            assert!(error.contains("cuda:0") && error.contains("300ms") && error.contains("hangs"), "{error}");
        }
        let problem = pages.fetch(&extents(&card, &tables[0][..1])).expect_err("a card that hangs");
        assert!(problem.contains("hangs"), "{problem}");
        drop(card);
        drop(pages);
    }

    fn check_failure(&self, row: Row<'_>) {
        let mut cards = self.engine(&self.shared());
        number(&self.driver, "break_card");
        for card in ["cuda:1", "cuda:"] {
            let error = cards.step(&[row], &mut |_| {}).expect_err("a card that fails");
            assert!(matches!(&error, Error::Card { card: named, .. } if named.contains(card)), "{error:?}");
        }
        if row.sample.is_some() {
            let begun = cards.begin(&[row]).and_then(|_| cards.end().map(drop));
            assert!(matches!(begun, Err(Error::Card { .. })), "{begun:?}");
        }
        number(&self.driver, "mend_card");
    }
}

#[test]
fn a_model_runs_behind_the_driver() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    if let Some(peer) = std::env::var_os(PEER) {
        return Stand::new(folder.path()).play_target(Path::new(&peer));
    }
    let mut stand = Stand::new(folder.path());
    stand.check_refusals();
    let one = stand.check_one();
    stand.check_empty();
    stand.check_shared(&one);
    stand.check_empty();
    stand.check_failures();
    stand.check_empty();
    stand.check_handoffs(folder.path());
    stand.check_empty();
    stand.check_adapters();
    stand.check_empty();
    stand.check_draft();
    stand.check_empty();
    stand.check_library();
    stand.check_cards(folder.path());
    stand.check_empty();

    // A second start compiles nothing. A library of its name that is open is the one that the system's loader has.
    let compiled = stand.compiled();
    for config in [stand.config.clone(), Config { nccl_library: None, ..stand.shared() }] {
        assert!(outcome(&mut stand.engine(&config)) == one, "the bits are those of the first start");
        stand.check_empty();
    }
    assert_eq!(stand.compiled(), compiled);
    stand.check_hang();
}
