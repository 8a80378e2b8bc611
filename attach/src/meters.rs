//! What a worker measures, under the same names for both roles.

mod vllm;

use crate::{Load, Parts};
use engine::scheduler::{Computed, Scheduler, Stepped, Usage};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use std::time::{Duration, Instant};
use timing::Fit;
use vllm::Vllm;

/// Handles of one worker's metrics, made once, and the pace that its load reports.
pub struct Meters {
    running: Gauge,
    waiting: Gauge,
    pages_free: Gauge,
    pages_cached: Gauge,
    pages_held: Gauge,
    prefill_step: Histogram,
    decode_step: Histogram,
    mixed_step: Histogram,
    step_tokens: Histogram,
    preemptions: Counter,
    queue: Histogram,
    cache_hit: Counter,
    cache_query: Counter,
    prefill_tokens: Counter,
    decode_tokens: Counter,
    drafts: Counter,
    accepted: Counter,
    /// Drafts and those that were right, since the log was told.
    untold: (usize, usize),
    told: Option<Instant>,
    fit: Fit,
    vllm: Vllm,
}

/// How often the log hears what became of drafts.
const TELL_EVERY: Duration = Duration::from_secs(30);

impl std::fmt::Debug for Meters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meters").field("fit", &self.fit).finish_non_exhaustive()
    }
}

impl Meters {
    /// Makes the metrics of a worker.
    pub fn new(parts: &Parts) -> Self {
        describe();
        let worker = parts.worker.clone();
        let layout = parts.engine.memory().layout();
        let pages = |state: &'static str| gauge!("baton_pages", "worker" => worker.clone(), "state" => state);
        let step = |kind: &'static str| histogram!("baton_step_seconds", "worker" => worker.clone(), "kind" => kind);
        let tokens =
            |kind: &'static str| counter!("baton_worker_tokens_total", "worker" => worker.clone(), "kind" => kind);
        Self {
            running: gauge!("baton_worker_running", "worker" => worker.clone()),
            waiting: gauge!("baton_worker_waiting", "worker" => worker.clone()),
            pages_free: pages("free"),
            pages_cached: pages("cached"),
            pages_held: pages("held"),
            prefill_step: step("prefill"),
            decode_step: step("decode"),
            mixed_step: step("mixed"),
            step_tokens: histogram!("baton_step_tokens", "worker" => worker.clone()),
            preemptions: counter!("baton_preemptions_total", "worker" => worker.clone()),
            queue: histogram!("baton_worker_queue_seconds", "worker" => worker.clone()),
            cache_hit: counter!("baton_prefix_cache_hit_tokens_total", "worker" => worker.clone()),
            cache_query: counter!("baton_prefix_cache_query_tokens_total", "worker" => worker.clone()),
            prefill_tokens: tokens("prefill"),
            decode_tokens: tokens("decode"),
            drafts: counter!("baton_speculation_drafts_total", "worker" => worker.clone()),
            accepted: counter!("baton_speculation_accepted_total", "worker" => worker.clone()),
            untold: (0, 0),
            told: None,
            fit: Fit::default(),
            vllm: Vllm::new(&parts.model_name, &worker, layout.page_tokens as usize, layout.pages as usize),
        }
    }

    /// Counts a sequence of `tokens` known tokens that is part of a step for the first time.
    pub fn started(&self, tokens: usize, usage: &Usage) {
        self.queue.record(usage.queue);
        self.cache_query.increment(tokens as u64);
        self.cache_hit.increment(usage.cached_tokens as u64);
        self.vllm.started(tokens, usage.cached_tokens);
    }

    /// Counts the step that came to `computed`, if one has ended.
    pub fn computed(&mut self, computed: &Computed) {
        let Some(stepped) = computed.stepped else { return };
        let Stepped { work, tokens, prompt_tokens: prompt, draft_tokens: drafts, took } = stepped;
        let accepted = computed.verified.iter().map(|verified| verified.accepted).sum();
        self.vllm.step(prompt + computed.drawn.len(), drafts, computed.verified.len(), accepted);
        let single = tokens - prompt - drafts;
        let histogram = match (prompt, single) {
            (_, 0) => &self.prefill_step,
            (0, _) => &self.decode_step,
            _ => &self.mixed_step,
        };
        histogram.record(took);
        self.step_tokens.record(tokens as f64);
        self.prefill_tokens.increment(prompt as u64);
        self.decode_tokens.increment((single + accepted) as u64);
        // What matters to whoever waits is the time of a token: a step that yields two for each counts as two.
        let yields = if prompt == 0 && single > 0 { (single + accepted) as f64 / single as f64 } else { 1.0 };
        self.fit.add(&work, took.div_f64(yields));
        if drafts > 0 {
            self.speculated(drafts, accepted);
        }
    }

    fn speculated(&mut self, drafts: usize, accepted: usize) {
        self.drafts.increment(drafts as u64);
        self.accepted.increment(accepted as u64);
        self.untold = (self.untold.0 + drafts, self.untold.1 + accepted);
        let now = Instant::now();
        if self.told.is_none_or(|told| now >= told + TELL_EVERY) {
            let (drafts, accepted) = std::mem::take(&mut self.untold);
            tracing::info!(drafts, accepted, acceptance = accepted as f64 / drafts as f64, "speculation");
            self.told = Some(now);
        }
    }

    /// Counts sequences that lost their pages.
    pub fn preempted(&self, sequences: usize) {
        self.preemptions.increment(sequences as u64);
        self.vllm.preempted(sequences);
    }

    /// Sets the gauges and returns the load of a worker with `legs` legs, as far as `scheduler` knows it.
    pub fn load(&self, scheduler: &Scheduler, legs: usize) -> Load {
        let (backlog, pages) = (scheduler.backlog(), scheduler.pool().stats());
        self.running.set(backlog.running as f64);
        self.waiting.set(backlog.waiting as f64);
        self.pages_free.set(pages.free as f64);
        self.pages_cached.set(pages.cached as f64);
        self.pages_held.set(pages.held() as f64);
        self.vllm.load(&backlog, &pages);
        let pace = self.fit.pace();
        Load {
            running: backlog.running,
            waiting: backlog.waiting,
            waiting_tokens: backlog.tokens,
            pages_free: pages.available(),
            pages_total: pages.total,
            legs,
            pace,
            backlog_ms: pace.map_or(0.0, |pace| pace.prompt_ms(backlog.prompts.tokens, backlog.prompts.pairs)),
            ..Load::default()
        }
    }
}

fn describe() {
    describe_gauge!("baton_worker_running", "Sequences in the batch");
    describe_gauge!("baton_worker_waiting", "Sequences not yet scheduled");
    describe_gauge!("baton_pages", "Pages by state: free, cached (reusable, nobody holds them), held");
    describe_histogram!("baton_step_seconds", "Time of one step, by what it held: prefill, decode or both (mixed)");
    describe_histogram!("baton_step_tokens", "Tokens computed in one step");
    describe_counter!("baton_preemptions_total", "Sequences that lost their pages to others and were computed again");
    describe_histogram!("baton_worker_queue_seconds", "From a leg's arrival to the first step that held it");
    describe_counter!("baton_prefix_cache_hit_tokens_total", "Tokens found in the prefix cache");
    describe_counter!("baton_prefix_cache_query_tokens_total", "Tokens looked up in the prefix cache");
    describe_counter!("baton_speculation_drafts_total", "Tokens guessed and verified");
    describe_counter!("baton_speculation_accepted_total", "Tokens guessed that turned out right");
    describe_counter!("baton_worker_tokens_total", "Tokens computed: of prompts (prefill), after them (decode)");
}
