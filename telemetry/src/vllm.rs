//! Buckets of the histograms under vLLM's names, as `vllm/v1/metrics/loggers.py` has them, so that existing dashboards find the bounds
//! they look for. Between tokens there are finer ones below 10 ms, too.

const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const STEP_TOKENS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// By name.
pub(crate) const BUCKETS: [(&str, &[f64]); 15] = [
    ("vllm:time_to_first_token_seconds", FIRST_TOKEN),
    ("vllm:inter_token_latency_seconds", BETWEEN_TOKENS),
    ("vllm:request_time_per_output_token_seconds", BETWEEN_TOKENS),
    ("vllm:e2e_request_latency_seconds", REQUEST),
    ("vllm:request_queue_time_seconds", REQUEST),
    ("vllm:request_inference_time_seconds", REQUEST),
    ("vllm:request_prefill_time_seconds", REQUEST),
    ("vllm:request_decode_time_seconds", REQUEST),
    ("vllm:request_prompt_tokens", TOKENS),
    ("vllm:request_generation_tokens", TOKENS),
    ("vllm:request_max_num_generation_tokens", TOKENS),
    ("vllm:request_params_max_tokens", TOKENS),
    ("vllm:request_prefill_kv_computed_tokens", TOKENS),
    ("vllm:request_params_n", CHOICES),
    ("vllm:iteration_tokens_total", STEP_TOKENS),
];
