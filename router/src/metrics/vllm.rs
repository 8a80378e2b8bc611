//! What the router measures under vLLM's names, for dashboards and autoscalers that know those: requests as clients see them. Steps, pages
//! and queues are the workers' to count; no name is counted by both.

use super::{InUse, Outcome};
use crate::{fleet::leg::Cached, request::Finish};
use metrics::{Counter, Histogram, counter, histogram};
use std::time::Duration;

/// Handles, labelled with the model's name, and `engine` as the router.
pub(super) struct Vllm {
    pub(super) first_token: Histogram,
    pub(super) next_token: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt: Histogram,
    output: Histogram,
    most_output: Histogram,
    computed: Histogram,
    choices: Histogram,
    max_tokens: Histogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    /// Computed, found in a worker's cache, fetched from a peer's.
    sources: [Counter; 3],
    /// The latter two.
    cached_sources: [Counter; 2],
    output_tokens: Counter,
    /// By reason: stop, length, abort, error.
    ended: [Counter; 4],
    rejected: Counter,
}

/// A choice that came to its end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Told {
    pub(crate) prompt_tokens: u32,
    pub(crate) cached: Cached,
    pub(crate) output_tokens: u32,
    /// From arrival to the last token.
    pub(crate) whole: Duration,
    /// From the first token to the last.
    pub(crate) decode: Duration,
    /// As the worker that computed the prompt measured it: from its arrival there to the first step that held it.
    pub(crate) queue: Duration,
    /// And from then to the first token.
    pub(crate) prefill: Duration,
}

impl Vllm {
    pub(super) fn new(model: &str) -> Self {
        let labels = || [("model_name", model.to_owned()), ("engine", "router".to_owned())];
        let with = |name: &'static str, value: &str| [labels().to_vec(), vec![(name, value.to_owned())]].concat();
        Self {
            first_token: histogram!("vllm:time_to_first_token_seconds", &labels()),
            next_token: histogram!("vllm:inter_token_latency_seconds", &labels()),
            per_token: histogram!("vllm:request_time_per_output_token_seconds", &labels()),
            whole: histogram!("vllm:e2e_request_latency_seconds", &labels()),
            queue: histogram!("vllm:request_queue_time_seconds", &labels()),
            inference: histogram!("vllm:request_inference_time_seconds", &labels()),
            prefill: histogram!("vllm:request_prefill_time_seconds", &labels()),
            decode: histogram!("vllm:request_decode_time_seconds", &labels()),
            prompt: histogram!("vllm:request_prompt_tokens", &labels()),
            output: histogram!("vllm:request_generation_tokens", &labels()),
            most_output: histogram!("vllm:request_max_num_generation_tokens", &labels()),
            computed: histogram!("vllm:request_prefill_kv_computed_tokens", &labels()),
            choices: histogram!("vllm:request_params_n", &labels()),
            max_tokens: histogram!("vllm:request_params_max_tokens", &labels()),
            prompt_tokens: counter!("vllm:prompt_tokens_total", &labels()),
            cached_tokens: counter!("vllm:prompt_tokens_cached_total", &labels()),
            sources: ["local_compute", "local_cache_hit", "external_kv_transfer"]
                .map(|source| counter!("vllm:prompt_tokens_by_source_total", &with("source", source))),
            cached_sources: ["device", "p2p"]
                .map(|source| counter!("vllm:prompt_tokens_cached_by_source_total", &with("source", source))),
            output_tokens: counter!("vllm:generation_tokens_total", &labels()),
            ended: ["stop", "length", "abort", "error"]
                .map(|reason| counter!("vllm:request_success_total", &with("finished_reason", reason))),
            rejected: counter!("vllm:admission_rejections_total", &with("reason", "no_capacity")),
        }
    }

    /// Notes a choice.
    pub(super) fn told(&self, told: &Told, finish: &Finish) {
        let Told { prompt_tokens, cached, output_tokens, whole, decode, queue, prefill } = *told;
        self.prompt_tokens.increment(prompt_tokens.into());
        self.cached_tokens.increment(cached.tokens.into());
        let [computed, here, fetched] = [prompt_tokens - cached.tokens, cached.tokens - cached.fetched, cached.fetched];
        let counted = self.sources.iter().zip([computed, here, fetched]);
        counted
            .chain(self.cached_sources.iter().zip([here, fetched]))
            .for_each(|(counter, tokens)| counter.increment(tokens.into()));
        self.output_tokens.increment(output_tokens.into());
        self.prompt.record(prompt_tokens);
        self.computed.record(computed);
        self.output.record(output_tokens);
        self.whole.record(whole);
        self.queue.record(queue);
        self.prefill.record(prefill);
        self.decode.record(decode);
        self.inference.record(prefill + decode);
        if output_tokens > 1 {
            self.per_token.record(decode.as_secs_f64() / f64::from(output_tokens - 1));
        }
        self.ended[usize::from(*finish == Finish::Length)].increment(1);
    }

    /// Notes what was asked: `n`, and the limit of tokens if there was one.
    pub(super) fn asked(&self, choices: u32, max_tokens: Option<u32>) {
        self.choices.record(choices);
        if let Some(max_tokens) = max_tokens {
            self.max_tokens.record(max_tokens);
        }
    }

    /// Notes the most tokens that any choice of a request had.
    pub(super) fn most(&self, output_tokens: u32) {
        self.most_output.record(output_tokens);
    }

    /// Notes a request that came to no end of its own.
    pub(super) fn unfinished(&self, outcome: Outcome) {
        match outcome {
            Outcome::Cancelled => self.ended[2].increment(1),
            Outcome::Failed => self.ended[3].increment(1),
            Outcome::Rejected => self.rejected.increment(1),
            Outcome::Ok | Outcome::Invalid => {}
        }
    }
}

/// Writes which adapters are in use, with the time as the value; nothing where none is served. Each combination of adapters is a label set
/// of its own, so this line is written when it is asked for and remembered by nobody.
pub(super) fn lora_requests_info(served: usize, in_use: &InUse, now: Duration) -> String {
    if served == 0 {
        return String::new();
    }
    let names = |which: usize| {
        let names: Vec<&str> = in_use.iter().filter(|(_, counts)| counts[which] > 0).map(|(name, _)| &**name).collect();
        names.join(",").replace('\\', "\\\\").replace('"', "\\\"")
    };
    let (waiting, running, now) = (names(0), names(1), now.as_secs_f64());
    format!(
        "# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{{max_lora=\"{served}\",waiting_lora_adapters=\"{waiting}\",\
         running_lora_adapters=\"{running}\"}} {now:.3}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_in_use_are_listed_by_what_their_requests_do() {
        let metrics = super::super::Metrics::new("m");
        let line = || lora_requests_info(2, &metrics.inner.in_use(), Duration::from_millis(1_500));
        let labels = |waiting, running| {
            let labels = format!("waiting_lora_adapters={waiting:?},running_lora_adapters={running:?}");
            format!("# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{{max_lora=\"2\",{labels}}} 1.500\n")
        };
        let mut requests: Vec<_> = (0..3).map(|_| metrics.request(super::super::Endpoint::Chat)).collect();
        assert_eq!(line(), labels("", ""));
        for (request, adapter) in requests.iter_mut().zip(["poet", "a\"b", "poet"]) {
            request.waits(adapter);
        }
        assert_eq!(line(), labels("a\"b,poet", ""));
        requests[0].runs();
        requests[0].runs();
        requests[1].runs();
        assert_eq!(line(), labels("poet", "a\"b,poet"));
        requests.pop();
        assert_eq!(line(), labels("", "a\"b,poet"));
        requests.clear();
        assert!(metrics.inner.in_use().is_empty());
        assert_eq!(lora_requests_info(0, &metrics.inner.in_use(), Duration::ZERO), "");
    }
}
