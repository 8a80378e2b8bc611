//! What a worker computes on, and how.

use super::{Bytes, at_least_one, share};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// How a worker uses its machine.
#[derive(Debug, Args)]
pub(crate) struct Compute {
    /// What computes: `cpu`; `cuda` or `cuda:N` for a card of NVIDIA; or `timed:FILE` for nothing, with steps that take as long as the profile in
    /// FILE says
    #[arg(long, value_name = "KIND", env = "BATON_ENGINE", default_value = "cpu")]
    pub(crate) engine: EngineChoice,
    /// Memory for KV pages of one worker [default: 512 MiB; on a card, what --gpu-memory-utilization leaves]
    #[arg(long, value_name = "SIZE", env = "BATON_KV_MEMORY")]
    pub(crate) kv_memory: Option<Bytes>,
    /// Share of a card's memory that a worker on it may have; with `up`, all of them together [default: 0.9]
    #[arg(long, value_name = "SHARE", env = "BATON_GPU_MEMORY_UTILIZATION", value_parser = share)]
    pub(crate) gpu_memory_utilization: Option<f64>,
    /// Cards that share the model, from that of --engine on: each computes a part of every layer and keeps that part of the pages [default: 1]
    #[arg(long, value_name = "N", env = "BATON_TENSOR_PARALLEL", value_parser = at_least_one::<usize>)]
    pub(crate) tensor_parallel: Option<usize>,
    /// Have a card look at every row before each layer and refuse those that hold a NaN or an infinity, saying where; every step waits for that
    #[arg(
        long,
        env = "BATON_NAN_GUARD",
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_possible_values = true
    )]
    pub(crate) nan_guard: bool,
    /// Whether a sequence's bits depend on nothing but the sequence. Off, a card computes long prompts with cuBLASLt, which is faster [default: on]
    #[arg(long, value_name = "WHETHER", env = "BATON_EXACT")]
    pub(crate) exact: Option<Exact>,
    #[command(flatten)]
    pub(crate) card_libraries: CardLibraries,
    /// Element type of keys and values; all workers of a model need the same one [default: auto]
    #[arg(long, value_name = "TYPE", env = "BATON_KV_DTYPE")]
    pub(crate) kv_dtype: Option<KvDtype>,
    /// Threads that compute, per worker [default: the cores this process may use; with `up`, shared out]
    #[arg(long, value_name = "N", env = "BATON_THREADS", value_parser = at_least_one::<usize>)]
    pub(crate) threads: Option<usize>,
    /// Quantise the weights while they load; every worker of a cluster alike [default: as stored]
    #[arg(long, value_name = "TYPE", env = "BATON_QUANTIZE")]
    pub(crate) quantize: Option<Quantize>,
}

/// Where NVIDIA's libraries are that a card takes.
#[derive(Debug, Args)]
pub(crate) struct CardLibraries {
    /// NVRTC's libnvrtc.so, which compiles the kernels of a card [default: where the system and CUDA toolkits have it]
    #[arg(long, value_name = "PATH", env = "BATON_NVRTC_LIBRARY")]
    pub(crate) nvrtc_library: Option<PathBuf>,
    /// NCCL's libnccl.so, by which cards that share a model exchange what they compute [default: where the system has it]
    #[arg(long, value_name = "PATH", env = "BATON_NCCL_LIBRARY")]
    pub(crate) nccl_library: Option<PathBuf>,
    /// cuBLASLt's libcublasLt.so, for `--exact off` [default: where the system and CUDA toolkits have it]
    #[arg(long, value_name = "PATH", env = "BATON_CUBLASLT_LIBRARY")]
    pub(crate) cublaslt_library: Option<PathBuf>,
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EngineChoice {
    /// This machine's processor, or a card
    Device(engine::Device),
    /// Nothing: the file says how long it takes
    Timed(PathBuf),
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("timed", file)) if !file.is_empty() => Ok(Self::Timed(file.into())),
            _ => text.parse().map(Self::Device).map_err(|_| {
                "expected cpu, cuda, cuda:N, or timed:FILE with a profile, such as timed:profile.toml".into()
            }),
        }
    }
}

/// What weights become when they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quantize {
    /// 8-bit integers, a scale for each output
    Int8,
    /// 4-bit integers, a scale for each 32 inputs
    Int4,
    /// 8-bit floats (e4m3), a scale for each output
    Fp8,
}

impl From<Quantize> for engine::Quantize {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::Int8 => Self::Int8,
            Quantize::Int4 => Self::Int4,
            Quantize::Fp8 => Self::Fp8,
        }
    }
}

/// What bits may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Exact {
    /// The sequence alone
    On,
    /// Also what is computed beside it, and in which parts
    Off,
}

/// Element type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDtype {
    /// The checkpoint's own
    Auto,
    /// 32-bit float
    F32,
    /// 16-bit brain float
    Bf16,
    /// 16-bit float
    F16,
    /// 8-bit float (e4m3) with a scale for each token and head
    Fp8,
    /// 8-bit integer with a scale for each token and head
    Int8,
}

/// How a decode worker guesses tokens ahead, to verify several in one step. What is emitted does not depend on it.
#[derive(Debug, Args)]
pub(crate) struct Speculation {
    /// What guesses the next tokens
    #[arg(long, value_name = "HOW", env = "BATON_SPECULATE", default_value = "off")]
    pub(crate) speculate: Speculate,
    /// Directory of the model that guesses, with the same vocabulary [default: for the bundled model the bundled one]
    #[arg(long, value_name = "DIR", env = "BATON_DRAFT_MODEL")]
    pub(crate) draft_model: Option<PathBuf>,
    /// Most tokens guessed at a time, up to 16; how many it is follows what they turn out to be worth
    #[arg(long, value_name = "N", env = "BATON_MAX_DRAFTS", default_value = "4", value_parser = at_least_one::<usize>)]
    pub(crate) max_drafts: usize,
}

/// What guesses tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Speculate {
    /// Nothing
    Off,
    /// The sequence itself: what followed its last tokens before
    Ngram,
    /// A smaller model
    Draft,
}
