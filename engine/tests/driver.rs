//! A card behind NVIDIA's driver, where there is neither: the processor plays both, under their names (`driver/libcuda.c`, `driver/libnvrtc.c`). What is
//! tried here is how the engine calls them: in which order, with what, and what it makes of their errors.
//!
//! The stand-in is opened before the engine asks for `libcuda.so`, which the system's loader then takes for the one that is meant. One test, because a
//! process has one driver.
#![cfg(all(target_os = "linux", target_pointer_width = "64", feature = "cuda"))]

use engine::{Config, Device, Engine, Error, Model, Row, Sample, Sampling, TokenId};
use kv_cache::PageId;
use libloading::Library;
use std::{
    ffi::c_int,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

/// Compiles `source` of the folder `driver` into `folder` as the library `name`, and opens it.
fn library(source: &str, folder: &Path, name: &str) -> (Library, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = folder.join(name);
    let emulator = format!("-DEMULATOR=\"{}\"", root.join("src/cuda/emulator.c").display());
    let mut compiler = Command::new("cc");
    compiler.args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", &emulator]);
    compiler.arg(format!("-Wl,-soname,{name}")).arg("-o").arg(&file);
    let status = compiler.arg(root.join("tests/driver").join(source)).arg("-ldl").status().expect("a C compiler");
    assert!(status.success(), "{source}");
    // SAFETY: the library has no initialisers.
    (unsafe { Library::new(&file) }.expect("a library that was just made"), file)
}

/// Calls a function without arguments of `library`.
fn number(library: &Library, name: &str) -> c_int {
    // SAFETY: the functions that are asked for have this type and no effect.
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

/// Checks that two engines mean the same by their logits, one of which rounds to bf16.
fn check_alike(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest > 1.0 && worst <= 0.05 * largest, "{what}: they differ by {worst} of {largest}");
}

fn refused(model: &Arc<Model>, config: &Config, words: &[&str]) {
    let error = Engine::new(model.clone(), config).expect_err("an engine that cannot be");
    assert!(matches!(error, Error::Card { .. }), "{error:?}");
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{text:?} lacks {word:?}"));
}

#[test]
fn a_model_runs_behind_the_driver() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (driver, _) = library("libcuda.c", folder.path(), "libcuda.so");
    let (nvrtc, nvrtc_file) = library("libnvrtc.c", folder.path(), "libnvrtc.so");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama3-bf16-sharded");
    let model = Model::load(&path, &mut |_| {}).expect("a good checkpoint");
    let config = Config {
        device: Device::Cuda(0),
        nvrtc_library: Some(nvrtc_file),
        kernel_cache: Some(folder.path().join("cache")),
        kv_bytes: Some(8 << 20),
        token_budget: 256,
        max_sequences: 8,
        max_model_len: Some(1024),
        threads: Some(2),
        ..Config::default()
    };

    // What is wrong is said, and leaves nothing behind.
    refused(&model, &Config { device: Device::Cuda(1), ..config.clone() }, &["cuda:1", "1 card"]);
    let gone = Some(folder.path().join("libgone.so"));
    refused(&model, &Config { nvrtc_library: gone, ..config.clone() }, &["cuda:0", "NVRTC", "libgone.so"]);
    refused(&model, &Config { kv_bytes: Some(8 << 30), ..config.clone() }, &["a processor", "pages", "out of memory"]);
    refused(
        &model,
        &Config { kv_bytes: None, gpu_memory_utilization: 1e-3, ..config.clone() },
        &["gpu_memory_utilization", "weights and buffers"],
    );
    assert_eq!(number(&driver, "leaks"), 0);

    let tokens: Vec<TokenId> = (0..90).map(|at| at * 7 % 1000 + 3).collect();
    let tables: Vec<Vec<PageId>> = (0..5).map(|at| (0..8).map(|page| PageId(at + 5 * page)).collect()).collect();
    let mut cpu = Engine::new(model.clone(), &Config { device: Device::Cpu, ..config.clone() }).expect("an engine");
    let mut card = Engine::new(model.clone(), &config).expect("an engine on a card");
    let compiled = number(&nvrtc, "compiled");
    assert!(compiled > 5, "{compiled} programs");
    // Prompts that leave, more of them beside each other, and then steps that decode: the second replays what the first made.
    let one = &tables[..1];
    let prompt = logits(&mut card, &tokens[..80], 0, one, true);
    check_alike(&prompt[0], &logits(&mut cpu, &tokens[..80], 0, one, true)[0], "a prompt");
    let mut block = vec![0; card.memory().layout().block_bytes()];
    for layer in 0..card.memory().layout().layers {
        let at = card.memory().layout().block_offset(layer, tables[0][4]);
        card.memory().file().read_exact_at(&mut block, at as u64).expect("the pool's bytes");
        assert!(block.iter().any(|byte| *byte != 0), "layer {layer} did not leave");
    }
    logits(&mut card, &tokens[..40], 0, &tables[1..], false);
    for end in [41, 42] {
        let alone = logits(&mut card, &tokens[..end], end - 1, &tables[1..2], false);
        let together = logits(&mut card, &tokens[..end], end - 1, &tables[2..], false);
        assert!(together.iter().all(|logits| *logits == alone[0]), "a sequence has its bits in any batch");
    }
    let cached = fs::read_dir(folder.path().join("cache")).expect("a cache").count();
    assert_eq!(cached as c_int, compiled);
    drop(card);
    assert_eq!(number(&driver, "leaks"), 0);

    // A second start compiles nothing.
    let mut again = Engine::new(model, &config).expect("an engine on a card");
    assert_eq!(number(&nvrtc, "compiled"), compiled);
    assert!(logits(&mut again, &tokens[..80], 0, one, false) == prompt, "the bits are those of the first start");
}
