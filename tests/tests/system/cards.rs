//! Cards of NVIDIA, where there is none: the binary starts without any of their libraries, and says what is missing to whoever asks for one. With the
//! engine's stand-ins for them (engine/tests/driver) two processes hand pages to each other from card to card.

use crate::etcd::{Etcd, wait_for_fleet};
use cluster_tests::{
    Client,
    process::{Baton, baton_binary, free_address},
};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Returns the shared libraries that the system's loader must find before the program `elf` starts: the `DT_NEEDED` entries of its dynamic
/// section (System V ABI, chapter 5; 64 bits, little-endian).
fn needed(elf: &[u8]) -> Vec<String> {
    const LOAD: u64 = 1;
    const DYNAMIC: u64 = 2;
    const NEEDED: u64 = 1;
    const STRINGS: u64 = 5;
    let number = |at: usize, bytes: usize| {
        elf[at..at + bytes].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let (table, entry, entries) = (number(0x20, 8) as usize, number(0x36, 2) as usize, number(0x38, 2) as usize);
    // Kind, offset in the file, address, bytes in the file.
    let segments: Vec<[u64; 4]> = (0..entries)
        .map(|index| table + index * entry)
        .map(|at| [number(at, 4), number(at + 8, 8), number(at + 16, 8), number(at + 32, 8)])
        .collect();
    let [_, offset, _, bytes] = *segments.iter().find(|segment| segment[0] == DYNAMIC).expect("a dynamic section");
    let tags: Vec<(u64, u64)> =
        (offset as usize..(offset + bytes) as usize).step_by(16).map(|at| (number(at, 8), number(at + 8, 8))).collect();
    let (_, strings) = *tags.iter().find(|(tag, _)| *tag == STRINGS).expect("a table of strings");
    let holds = |segment: &&[u64; 4]| segment[0] == LOAD && (segment[2]..segment[2] + segment[3]).contains(&strings);
    let [_, offset, address, _] = segments.iter().find(holds).expect("a segment with the strings");
    let name = |at: u64| {
        let text = &elf[(strings - address + offset + at) as usize..];
        String::from_utf8_lossy(&text[..text.iter().position(|byte| *byte == 0).expect("a string ends")]).into_owned()
    };
    tags.iter().filter(|(tag, _)| *tag == NEEDED).map(|(_, at)| name(*at)).collect()
}

#[test]
#[cfg(all(target_os = "linux", target_pointer_width = "64", target_endian = "little"))]
fn the_binary_needs_nothing_of_nvidia_to_start() {
    let libraries = needed(&fs::read(baton_binary()).expect("the binary"));
    assert!(libraries.iter().any(|library| library.starts_with("libc.")), "{libraries:?}");
    let foreign = ["cuda", "nvrtc", "cublas", "nccl", "nvidia"];
    let of_nvidia = |library: &&String| foreign.iter().any(|name| library.contains(name));
    assert_eq!(libraries.iter().find(of_nvidia), None, "{libraries:?}");
}

/// Runs `baton` with `arguments`, which it is to refuse, and returns what it printed.
async fn refusal(arguments: &[&str]) -> String {
    let (code, output) = Baton::start(arguments).exit(Duration::from_secs(30)).await;
    assert_eq!(code, Some(1), "{output}");
    output
}

#[tokio::test]
async fn what_a_card_does_not_run_yet_is_refused_before_weights_are_loaded() {
    let file = |name: &str| format!("{}/{name}", env!("CARGO_MANIFEST_DIR"));
    for (engine, model, more, words) in [
        ("cuda", "golden/deepseek_v2", &["--tensor-parallel", "2"][..], ["--engine cuda:0", "latent attention"]),
        ("cuda", "gguf/qwen2-q8_0.gguf", &["--kv-dtype", "f16"], ["--engine cuda:0", "kv_dtype"]),
        ("cuda", "golden/llama", &["--kv-dtype", "f16"], ["kv_dtype", "f16"]),
        ("cuda", "golden/llama", &["--tensor-parallel", "3"], ["--engine cuda:0", "evenly: 1, 2, 6 would be right"]),
        ("cpu", "golden/llama", &["--tensor-parallel", "2"], ["--engine cpu", "tensor_parallel"]),
        ("cpu", "golden/llama", &["--exact", "off"], ["--engine cpu", "exact"]),
        ("cuda", "golden/llama", &["--exact", "off", "--tensor-parallel", "2"], ["--engine cuda:0", "one card alone"]),
    ] {
        let path = file(model);
        let output =
            refusal(&[&["up", "--listen", "127.0.0.1:0", "--engine", engine, "--model", &path], more].concat()).await;
        words.iter().for_each(|word| assert!(output.contains(word), "{model}: {output:?} lacks {word:?}"));
        assert!(!output.contains("loading weights"), "{output}");
    }
}

/// Compiles what stands in for NVIDIA's driver and the compiler of kernels into `folder`, and returns the latter.
fn stand_ins(folder: &Path) -> PathBuf {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine");
    let emulator = format!("-DEMULATOR=\"{}\"", engine.join("src/cuda/emulator.c").display());
    let compile = |source: &str, name: &str| {
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-pthread", &emulator, &format!("-Wl,-soname,{name}")]);
        compiler.arg("-o").arg(folder.join(name)).arg(engine.join("tests/driver").join(source)).arg("-ldl");
        assert!(compiler.status().expect("a C compiler").success(), "{source}");
        folder.join(name)
    };
    compile("libcuda.c", "libcuda.so");
    compile("libnvrtc.c", "libnvrtc.so")
}

/// Pages of prompts that one process computes go to another that decodes: by CUDA IPC, and through the host's memory where that is asked for. Nothing else
/// changes.
#[tokio::test]
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
async fn processes_hand_over_from_card_to_card() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let nvrtc = stand_ins(folder.path());
    let (nvrtc, model) = (nvrtc.display().to_string(), format!("{}/../models/demo-draft", env!("CARGO_MANIFEST_DIR")));
    // Kernels are kept in the home directory.
    let home = [("LD_LIBRARY_PATH", folder.path()), ("HOME", folder.path()), ("XDG_CACHE_HOME", folder.path())];
    let mut texts = Vec::new();
    for (transport, asked) in [("cuda", &[][..]), ("shm", &["--transport", "shm"])] {
        let etcd = Etcd::start();
        let (endpoint, patience) = (etcd.endpoint(), Duration::from_secs(120));
        let worker = |role: &str, card: &str| {
            let admin = free_address().to_string();
            let arguments = [role, "--etcd", &endpoint, "--admin-listen", &admin, "--engine", card, "--model", &model];
            let more = ["--nvrtc-library", &nvrtc, "--kv-memory", "8MiB", "--max-sequences", "4"];
            let process = Baton::start_in(&[&arguments[..], &more, asked].concat(), &home);
            (process, Client::new(format!("http://{admin}")))
        };
        // Cards of one host, and cards of another number.
        let (mut prefill, mut decode) = (worker("prefill-worker", "cuda:1"), worker("decode-worker", "cuda:0"));
        for (process, admin) in [&mut prefill, &mut decode] {
            process.ready(admin, "/livez", patience).await;
        }
        let listen = free_address().to_string();
        let arguments =
            ["router", "--etcd", &endpoint, "--listen", &listen, "--model", &model, "--placement", "remote"];
        let (mut router, client) = (Baton::start(&arguments), Client::new(format!("http://{listen}")));
        router.ready(&client, "/readyz", patience).await;
        wait_for_fleet(&client, 2).await?;
        let prompt =
            "A router sends a prompt to a worker that computes it, and its pages to one that decodes. ".repeat(4);
        let request = json!({"prompt": prompt, "max_tokens": 12, "temperature": 0.8, "seed": 5, "ignore_eos": true});
        let answer = client.post("/v1/completions", &request).await?;
        assert_eq!(answer.status, 200, "{}", answer.text);
        texts.push(answer.json()["choices"][0]["text"].clone());
        let labels = [r#"side="target""#, r#"outcome="landed""#, &format!("transport={transport:?}")];
        let landed = decode.1.metric("baton_handoffs_total", &labels).await?;
        assert!(landed >= 1.0, "{transport}: {}", decode.0.output());
    }
    assert_eq!(texts[0], texts[1]);
    Ok(())
}
