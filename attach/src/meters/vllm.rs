//! What a worker measures under vLLM's names, for dashboards and autoscalers that know those: the engine's side. Requests, as clients see
//! them, are the router's to count; no name is counted by both.

use engine::scheduler::Backlog;
use kv_cache::PoolStats;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

/// Handles, labelled with the model's name and the worker's id as `engine`.
pub(super) struct Vllm {
    running: Gauge,
    waiting: Gauge,
    /// For room in a step or for pages.
    waiting_for_capacity: Gauge,
    /// For a prefix from a peer.
    deferred: Gauge,
    kv_cache_usage: Gauge,
    cache_queries: Counter,
    cache_hits: Counter,
    preemptions: Counter,
    iteration_tokens: Histogram,
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
}

impl Vllm {
    pub(super) fn new(model: &str, worker: &str, page_tokens: usize, pages: usize) -> Self {
        let labels = || [("model_name", model.to_owned()), ("engine", worker.to_owned())];
        let with = |name: &'static str, value: String| [labels().to_vec(), vec![(name, value)]].concat();
        let capacity = [
            labels().to_vec(),
            vec![
                ("block_size", page_tokens.to_string()),
                ("num_gpu_blocks", pages.to_string()),
                ("kv_cache_size_tokens", (pages * page_tokens).to_string()),
            ],
        ];
        gauge!("vllm:cache_config_info", &capacity.concat()).set(1.0);
        // A worker is awake as long as it is there.
        for (state, value) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
            gauge!("vllm:engine_sleep_state", &with("sleep_state", state.into())).set(value);
        }
        Self {
            running: gauge!("vllm:num_requests_running", &labels()),
            waiting: gauge!("vllm:num_requests_waiting", &labels()),
            waiting_for_capacity: gauge!("vllm:num_requests_waiting_by_reason", &with("reason", "capacity".into())),
            deferred: gauge!("vllm:num_requests_waiting_by_reason", &with("reason", "deferred".into())),
            kv_cache_usage: gauge!("vllm:kv_cache_usage_perc", &labels()),
            cache_queries: counter!("vllm:prefix_cache_queries_total", &labels()),
            cache_hits: counter!("vllm:prefix_cache_hits_total", &labels()),
            preemptions: counter!("vllm:num_preemptions_total", &labels()),
            iteration_tokens: histogram!("vllm:iteration_tokens_total", &labels()),
            drafts: counter!("vllm:spec_decode_num_drafts_total", &labels()),
            draft_tokens: counter!("vllm:spec_decode_num_draft_tokens_total", &labels()),
            accepted_tokens: counter!("vllm:spec_decode_num_accepted_tokens_total", &labels()),
        }
    }

    pub(super) fn started(&self, tokens: usize, cached: usize) {
        self.cache_queries.increment(tokens as u64);
        self.cache_hits.increment(cached as u64);
    }

    /// Counts a step that read or drew `tokens` tokens, and verified `drafts` drafts of `guessed` sequences.
    pub(super) fn step(&self, tokens: usize, drafts: usize, guessed: usize, accepted: usize) {
        self.iteration_tokens.record(tokens as f64);
        if drafts > 0 {
            self.drafts.increment(guessed as u64);
            self.draft_tokens.increment(drafts as u64);
            self.accepted_tokens.increment(accepted as u64);
        }
    }

    pub(super) fn preempted(&self, sequences: usize) {
        self.preemptions.increment(sequences as u64);
    }

    pub(super) fn load(&self, backlog: &Backlog, pages: &PoolStats) {
        self.running.set(backlog.running as f64);
        self.waiting.set(backlog.waiting as f64);
        self.waiting_for_capacity.set((backlog.waiting - backlog.deferred) as f64);
        self.deferred.set(backlog.deferred as f64);
        self.kv_cache_usage.set(pages.held() as f64 / pages.total.max(1) as f64);
    }
}
