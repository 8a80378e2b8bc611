//! Settings of one engine.

use kv_cache::KvDtype;
use serde::{Deserialize, Serialize};

/// How much one engine may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Tokens per page. 16 keeps waste per sequence under a page of 16 tokens and hashes short.
    pub page_tokens: u32,
    /// Element type of keys and values; unset = the checkpoint's own (bf16 and f16 stay, everything else is f32). Workers that
    /// hand sequences to each other need the same one.
    pub kv_dtype: Option<KvDtype>,
    /// Bytes of memory for pages.
    pub kv_bytes: u64,
    /// Longest sequence, prompt and output together; unset = the checkpoint's `max_position_embeddings`.
    pub max_model_len: Option<u32>,
    /// Most tokens computed in one step, over all sequences: the size of the activation buffers.
    pub token_budget: u32,
    /// Most sequences in one step.
    pub max_sequences: u32,
    /// Threads that compute; unset = the cores this process may use, by its affinity and its control group's quota. A pool that has as
    /// many or more is spread over the machine's memory nodes; a smaller one runs wherever the system puts it.
    pub threads: Option<usize>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            page_tokens: 16,
            kv_dtype: None,
            kv_bytes: 512 << 20,
            max_model_len: None,
            token_budget: 2048,
            max_sequences: 256,
            threads: None,
        }
    }
}
