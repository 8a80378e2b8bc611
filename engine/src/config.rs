//! Settings of one engine.

use kv_cache::KvDtype;
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};

/// How much one engine may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Tokens per page. 16 keeps waste per sequence under a page of 16 tokens and hashes short.
    pub page_tokens: u32,
    /// Element type of keys and values; unset = the checkpoint's own (bf16 and f16 stay, everything else is f32). Workers that
    /// hand sequences to each other need the same one.
    pub kv_dtype: Option<KvDtype>,
    /// Bytes of memory for pages; unset = 512 MiB on the processor, and on a card what `gpu_memory_utilization` leaves beside weights and buffers.
    pub kv_bytes: Option<u64>,
    /// Longest sequence, prompt and output together; unset = the checkpoint's `max_position_embeddings`.
    pub max_model_len: Option<u32>,
    /// Most tokens computed in one step, over all sequences: the size of the activation buffers.
    pub token_budget: u32,
    /// Most sequences in one step.
    pub max_sequences: u32,
    /// Threads that compute; unset = the cores this process may use, by its affinity and its control group's quota. A pool that has as
    /// many or more is spread over the machine's memory nodes; a smaller one runs wherever the system puts it.
    pub threads: Option<usize>,
    /// What computes. Said by whoever makes the engine, never by a file.
    #[serde(skip)]
    pub device: Device,
    /// How many cards share the model, from that of `device` on: each computes a part of every layer, and keeps that part of the pages.
    pub tensor_parallel: usize,
    /// Whether a sequence's bits depend on nothing but the sequence. Off, a card computes the linears of steps of many rows with cuBLASLt, which is faster, and
    /// adds up in an order of its own. A processor is always exact.
    pub exact: bool,
    /// Share of a card's memory that this engine may have, above 0 and up to 1. The default leaves room for what the driver and others take.
    pub gpu_memory_utilization: f64,
    /// Longest that a card may take for what is waited for, a step as a rule, in milliseconds. One that takes longer hangs, and ends its worker.
    pub card_timeout_ms: u64,
    /// Whether a card looks at every row before each layer, and refuses those that hold what is no number. Each step waits for that.
    pub nan_guard: bool,
    /// NVRTC's library; unset = where the system's loader and CUDA toolkits have it.
    pub nvrtc_library: Option<PathBuf>,
    /// NCCL's library, by which cards that share a model exchange activations; unset = where the system's loader has it.
    pub nccl_library: Option<PathBuf>,
    /// cuBLASLt's library, for cards that need not be `exact`; unset = where the system's loader and CUDA toolkits have it.
    pub cublaslt_library: Option<PathBuf>,
    /// Folder in which compiled kernels are kept from start to start; unset = they are compiled each time.
    pub kernel_cache: Option<PathBuf>,
}

/// What an engine computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A card of NVIDIA, by its number.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(card) => write!(f, "cuda:{card}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let card = |number: &str| number.parse().map(Device::Cuda).ok();
        let device = match text.split_once(':') {
            None => match text {
                "cpu" => Some(Device::Cpu),
                "cuda" => Some(Device::Cuda(0)),
                _ => None,
            },
            Some(("cuda", number)) => card(number),
            Some(_) => None,
        };
        device.ok_or_else(|| format!("`{text}` is no device; known: cpu, cuda, cuda:N"))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            page_tokens: 16,
            kv_dtype: None,
            kv_bytes: None,
            max_model_len: None,
            token_budget: 2048,
            max_sequences: 256,
            threads: None,
            device: Device::Cpu,
            tensor_parallel: 1,
            exact: true,
            gpu_memory_utilization: 0.9,
            card_timeout_ms: 120_000,
            nan_guard: false,
            nvrtc_library: None,
            nccl_library: None,
            cublaslt_library: None,
            kernel_cache: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, device) in [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:12", Device::Cuda(12))] {
            assert_eq!((text.parse(), device.to_string().as_str()), (Ok(device), text));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"] {
            let problem = text.parse::<Device>().expect_err("no device");
            assert!(problem.contains(&format!("`{text}`")) && problem.contains("cuda:N"), "{problem}");
        }
    }
}
