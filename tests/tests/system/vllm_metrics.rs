//! Metrics under vLLM's names: after ten requests of ten tokens every one has exactly the value that vLLM's would have, wherever
//! the work was done.

use cluster_tests::{TestCluster, client::sum_metric};
use router::Policy;
use serde_json::json;

const REQUESTS: f64 = 10.0;
const OUTPUT: f64 = 10.0;

/// Sums a metric over this cluster's workers: a process remembers those of other tests.
fn of_workers(text: &str, name: &str, labels: &[&str]) -> f64 {
    let of = |engine| sum_metric(text, name, &[labels, &[engine]].concat());
    of("engine=\"prefill-0\"") + of("engine=\"decode-0\"")
}

/// A process counts for ever, so what a test looks at are differences.
async fn ten_requests(placement: Policy) -> anyhow::Result<()> {
    let cluster = TestCluster::new().placement(placement).start().await?;
    let client = &cluster.client;
    let before = client.get("/metrics").await?.text;
    let mut prompt = 0.0;
    for _ in 0..10 {
        let ask = json!({"prompt": "A KV cache", "max_tokens": OUTPUT, "ignore_eos": true});
        let answer = client.post("/v1/completions", &ask).await?.json();
        prompt = answer["usage"]["prompt_tokens"].as_f64().expect("usage");
    }
    let labels = ["model_name=\"test\""];
    let grown = |after: &str, name: &str, more: &[&str]| {
        let labels: Vec<&str> = labels.iter().chain(more).copied().collect();
        sum_metric(after, name, &labels) - sum_metric(&before, name, &labels)
    };
    // What a worker counts of a step is there when the step's tokens may have been seen already.
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    let after = loop {
        let after = client.get("/metrics").await?.text;
        let idle = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"];
        let done = idle.iter().all(|name| of_workers(&after, name, &labels) == 0.0);
        if done && grown(&after, "vllm:iteration_tokens_total_count", &[]) >= REQUESTS * OUTPUT {
            break after;
        }
        anyhow::ensure!(tokio::time::Instant::now() < deadline, "steps are missing in\n{after}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    for (name, more, expected) in [
        ("vllm:time_to_first_token_seconds_count", &[][..], REQUESTS),
        ("vllm:inter_token_latency_seconds_count", &[], REQUESTS * (OUTPUT - 1.0)),
        ("vllm:request_time_per_output_token_seconds_count", &[], REQUESTS),
        ("vllm:e2e_request_latency_seconds_count", &[], REQUESTS),
        ("vllm:request_queue_time_seconds_count", &[], REQUESTS),
        ("vllm:request_inference_time_seconds_count", &[], REQUESTS),
        ("vllm:request_prefill_time_seconds_count", &[], REQUESTS),
        ("vllm:request_decode_time_seconds_count", &[], REQUESTS),
        ("vllm:request_prompt_tokens_sum", &[], REQUESTS * prompt),
        ("vllm:request_prompt_tokens_count", &[], REQUESTS),
        ("vllm:request_generation_tokens_sum", &[], REQUESTS * OUTPUT),
        ("vllm:request_generation_tokens_count", &[], REQUESTS),
        ("vllm:request_max_num_generation_tokens_sum", &[], REQUESTS * OUTPUT),
        ("vllm:request_max_num_generation_tokens_count", &[], REQUESTS),
        ("vllm:request_prefill_kv_computed_tokens_sum", &[], REQUESTS * prompt),
        ("vllm:request_params_n_sum", &[], REQUESTS),
        ("vllm:request_params_n_count", &[], REQUESTS),
        ("vllm:request_params_max_tokens_sum", &[], REQUESTS * OUTPUT),
        ("vllm:request_params_max_tokens_count", &[], REQUESTS),
        ("vllm:prompt_tokens_total", &[], REQUESTS * prompt),
        ("vllm:prompt_tokens_cached_total", &[], 0.0),
        ("vllm:prompt_tokens_by_source_total", &["source=\"local_compute\""], REQUESTS * prompt),
        ("vllm:prompt_tokens_by_source_total", &[], REQUESTS * prompt),
        ("vllm:prompt_tokens_cached_by_source_total", &[], 0.0),
        ("vllm:generation_tokens_total", &[], REQUESTS * OUTPUT),
        ("vllm:request_success_total", &["finished_reason=\"length\""], REQUESTS),
        ("vllm:request_success_total", &[], REQUESTS),
        ("vllm:admission_rejections_total", &[], 0.0),
        ("vllm:num_preemptions_total", &[], 0.0),
        ("vllm:iteration_tokens_total_count", &[], REQUESTS * OUTPUT),
        ("vllm:iteration_tokens_total_sum", &[], REQUESTS * (prompt + OUTPUT)),
    ] {
        assert_eq!(grown(&after, name, more), expected, "{placement:?}: {name}{more:?}");
    }
    for (name, more) in
        [("vllm:cache_config_info", "block_size=\"16\""), ("vllm:engine_sleep_state", "sleep_state=\"awake\"")]
    {
        assert!(of_workers(&after, name, &[labels[0], more]) >= 2.0, "{placement:?}: {name}{{{more}}}");
    }
    assert!(
        after.contains("vllm:time_to_first_token_seconds_bucket{model_name=\"test\",engine=\"router\",le=\"0.001\"}")
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_requests_of_ten_tokens_count_as_with_vllm() -> anyhow::Result<()> {
    ten_requests(Policy::Local).await?;
    ten_requests(Policy::Remote).await
}
