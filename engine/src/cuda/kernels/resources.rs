//! What kernels take of a processor: every one is compiled for every architecture, and its registers compared with `resources.txt`.
//!
//! Needs NVRTC of CUDA 13.0, which `tests/servers/install.sh` takes from PyPI, and no card. Without it the test is skipped and says so.

use super::{Attention, Call, Codes, Element, Kernel, LatentAttention, Linear, Pages, Rotary, Source};
use crate::cuda::nvrtc::{Nvrtc, options};
use kv_cache::{KvDtype, PageLayout};
use std::{collections::BTreeMap, path::Path, sync::Mutex};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

fn pages(dtype: KvDtype, dim: u32) -> Pages {
    let layout = PageLayout { layers: 1, page_tokens: 16, kv_heads: 8, key_dim: dim, value_dim: dim, dtype, pages: 1 };
    let element = if dtype == KvDtype::F16 { Element::F16 } else { Element::Bf16 };
    Pages::new(&layout, element, 0, 0).expect("pages")
}

fn rotary(dtype: KvDtype) -> Kernel {
    let element = if dtype == KvDtype::F16 { Element::F16 } else { Element::Bf16 };
    let call = Rotary {
        element,
        rows: 1,
        qkv: 0,
        stride: 0,
        heads: 32,
        positions: 0,
        slots: 0,
        angles: 0,
        pairs: 32,
        interleaved: false,
        norms: None,
        pages: pages(dtype, 128),
    };
    call.call().kernel
}

/// The kernels of one token of each sequence, and of prompts.
fn attention(dtype: KvDtype, dim: u32) -> impl Iterator<Item = Kernel> {
    let calls = [1, 4096].map(|rows| {
        let call = Attention {
            element: if dtype == KvDtype::F16 { Element::F16 } else { Element::Bf16 },
            rows,
            most_rows: rows,
            longest: 8192,
            q: 0,
            q_stride: 0,
            heads: 32,
            sequences: 0,
            sequence_count: 1,
            tables: 0,
            to: 0,
            to_stride: 0,
            window: None,
            scale: 1.0,
            cap: None,
            pages: pages(dtype, dim),
            states: 0,
        };
        let fits = |call: Call| {
            assert!(call.shared_bytes <= 163 << 10, "{} bytes for heads of {dim}", call.shared_bytes);
            call.kernel
        };
        fits(call.calls().0)
    });
    calls.into_iter()
}

/// The kernels of DeepSeek's latents, for so many heads on a card with so much shared memory: those of rows, and attention.
fn latents(dtype: KvDtype, heads: u32, most_shared: u32) -> [Kernel; 2] {
    let layout = PageLayout { layers: 1, page_tokens: 16, kv_heads: 1, key_dim: 576, value_dim: 0, dtype, pages: 1 };
    let rotary = rotary(dtype);
    let attention = LatentAttention {
        element: rotary.element,
        rows: 1,
        most_rows: 1,
        longest: 8192,
        q: 0,
        heads,
        sequences: 0,
        sequence_count: 1,
        tables: 0,
        to: 0,
        to_stride: 512,
        rank: 512,
        scale: 1.0,
        pages: Pages::new(&layout, rotary.element, 0, 0).expect("pages"),
        states: 0,
        most_shared,
    };
    let call = attention.calls().0;
    assert!(call.shared_bytes <= most_shared, "{} bytes of {most_shared}", call.shared_bytes);
    [Kernel { source: Source::Latent, ..rotary }, call.kernel]
}

/// One kernel of each source and set of defines.
fn kernels() -> Vec<Kernel> {
    let plain = |source, element| Kernel { name: "", source, element, defines: super::Defines::default() };
    let mut kernels = vec![plain(Source::Rows, Element::Bf16), plain(Source::Rows, Element::F16)];
    kernels.extend([Element::Bf16, Element::F16].map(|element| plain(Source::Products, element)));
    kernels.push(plain(Source::Copies, Element::Bf16));
    kernels.extend([Element::Bf16, Element::F16].map(|element| plain(Source::Shrink, element)));
    kernels.push(plain(Source::Experts, Element::Bf16));
    kernels.push(plain(Source::Draw, Element::Bf16));
    kernels.extend(Linear::variants(Element::Bf16).chain(Linear::variants(Element::F16)));
    kernels.extend(Codes::variants());
    kernels.extend([KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8, KvDtype::Int8].map(rotary));
    kernels.extend([64, 128, 256].into_iter().flat_map(|dim| attention(KvDtype::Bf16, dim)));
    kernels.extend([KvDtype::F16, KvDtype::Fp8, KvDtype::Int8].into_iter().flat_map(|dtype| attention(dtype, 128)));
    let (narrow, wide) = (163 << 10, 227 << 10);
    kernels.extend([narrow, wide].into_iter().flat_map(|shared| latents(KvDtype::Bf16, 128, shared)));
    kernels.extend(latents(KvDtype::Bf16, 16, wide));
    kernels.extend([KvDtype::F16, KvDtype::Fp8, KvDtype::Int8].into_iter().flat_map(|dtype| latents(dtype, 128, wide)));
    kernels
}

/// Registers, and bytes that were spilled, of each entry point that the log of `ptxas -v` names.
fn read_log(log: &str) -> Vec<(String, u32, u32)> {
    let number = |words: &str| words.split_whitespace().find_map(|word| word.parse::<u32>().ok());
    let (mut entries, mut name, mut spilled) = (vec![], "", 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            name = rest.split('\'').next().unwrap_or(rest);
        } else if let Some((stores, loads)) = line.split_once(" bytes spill stores,") {
            let stores = stores.rsplit(',').next().and_then(number).expect("a number of bytes");
            spilled = stores + number(loads).expect("a number of bytes");
        } else if let Some((_, rest)) = line.split_once(": Used ") {
            entries.push((name.to_owned(), number(rest).expect("a number of registers"), spilled));
        }
    }
    entries
}

/// Compiles a kernel for every architecture and notes what each of its entry points takes.
fn compile(nvrtc: &Nvrtc, kernel: &Kernel, taken: &Mutex<Table>) {
    let defines: String = kernel.defines.iter().map(|(name, value)| format!(" {name}={value}")).collect();
    for (at, architecture) in ARCHITECTURES.into_iter().enumerate() {
        let mut options = options(architecture);
        options.push("--ptxas-options=-v".into());
        let compiled =
            nvrtc.compile("kernel.cu", &kernel.text(), &options).unwrap_or_else(|problem| panic!("{problem}"));
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "a cubin is an ELF file");
        for (name, registers, spilled) in read_log(&compiled.log) {
            assert_eq!(spilled, 0, "{name}{defines} spills on {architecture}");
            let name = format!("{name} {:?}{defines}", kernel.element);
            taken.lock().expect("no thread panicked").entry(name).or_default()[at] = registers;
        }
    }
}

/// Kernel, element and defines; and what it takes on each architecture.
type Table = BTreeMap<String, [u32; ARCHITECTURES.len()]>;

fn read_table(text: &str) -> Table {
    let rows = text.lines().filter(|line| !line.starts_with('#'));
    let row = |line: &str| {
        let (name, registers) = line.split_once(':').expect("a name, a colon, numbers");
        let registers: Vec<u32> = registers.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        (name.to_owned(), registers.try_into().expect("a number for each architecture"))
    };
    rows.map(row).collect()
}

#[test]
fn every_kernel_compiles_for_every_architecture_within_the_table() {
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-servers/nvrtc/libnvrtc.so.13");
    if !library.exists() {
        eprintln!("skipped: no NVRTC in .test-servers/nvrtc; `make servers` fetches it");
        return;
    }
    let nvrtc = Nvrtc::open(Some(&library)).expect("NVRTC");
    assert_eq!(nvrtc.version(), (13, 0), "the table is that of another NVRTC");
    let (kernels, taken) = (kernels(), Mutex::new(Table::new()));
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    std::thread::scope(|scope| {
        for share in kernels.chunks(kernels.len().div_ceil(threads)) {
            let (nvrtc, taken) = (&nvrtc, &taken);
            scope.spawn(move || share.iter().for_each(|kernel| compile(nvrtc, kernel, taken)));
        }
    });
    let taken = taken.into_inner().expect("every kernel compiles");
    let table = read_table(include_str!("resources.txt"));
    let grown = |(name, taken): &(&String, &[u32; 3])| {
        table.get(*name).is_none_or(|table| taken.iter().zip(table).any(|(taken, table)| taken > table))
    };
    let gone: Vec<_> = table.keys().filter(|name| !taken.contains_key(*name)).collect();
    if !gone.is_empty() || taken.iter().any(|row| grown(&row)) {
        let rows: String = taken.iter().map(|(name, [a, b, c])| format!("{name}: {a} {b} {c}\n")).collect();
        panic!(
            "kernels take more registers than resources.txt says, or others are there (gone: {gone:?}); now:\n{rows}"
        );
    }
}
