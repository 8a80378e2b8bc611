//! The registry of this process and its text.
//!
//! Crates declare and record with the `metrics` facade; this is the one recorder behind it. Histograms get their buckets by the unit
//! that ends their name, so that a new metric needs no entry here; those under vLLM's names get vLLM's.

use crate::{process, vllm};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{sync::OnceLock, time::Duration};

/// Seconds: 50 µs (a token's overhead, a step) to a minute (a long prompt's first token).
const SECONDS: [f64; 19] = [
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 2.0, 5.0, 10.0,
    20.0, 60.0,
];
/// Bytes: 1 KiB to 64 GiB, by fours.
const BYTES: [f64; 14] = powers(1024.0, 4.0);
/// Tokens, pages, sequences: 1 to 131072, by twos.
const COUNTS: [f64; 18] = powers(1.0, 2.0);
/// Shares of a whole.
const RATIOS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// How often what histograms collected is folded into buckets if nobody asks for metrics.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

static REGISTRY: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the registry, once per process.
pub(crate) fn install() {
    REGISTRY.get_or_init(|| {
        let recorder = builder().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed: metrics will be empty");
        }
        metrics::gauge!("baton_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        keep_up(handle.clone());
        handle
    });
}

/// Renders all metrics of this process as Prometheus text (0.0.4).
///
/// Empty but for the process itself before [`crate::init`].
pub fn render_metrics() -> String {
    let mut text = REGISTRY.get().map(PrometheusHandle::render).unwrap_or_default();
    text.push_str(&process::render());
    text
}

fn builder() -> PrometheusBuilder {
    let suffixes: [(&str, &[f64]); 7] = [
        ("_seconds", &SECONDS),
        ("_bytes", &BYTES),
        ("_tokens", &COUNTS),
        ("_pages", &COUNTS),
        ("_sequences", &COUNTS),
        ("_size", &COUNTS),
        ("_ratio", &RATIOS),
    ];
    let by_suffix = suffixes.iter().map(|(suffix, buckets)| (Matcher::Suffix((*suffix).into()), *buckets));
    // A whole name counts for more than how it ends.
    let by_name = vllm::BUCKETS.iter().map(|(name, buckets)| (Matcher::Full((*name).into()), *buckets));
    by_suffix.chain(by_name).fold(PrometheusBuilder::new(), |builder, (matcher, buckets)| {
        builder.set_buckets_for_metric(matcher, buckets).expect("the tables are not empty")
    })
}

/// Folds what histograms collected, for ever. Its own thread, since a process may have several runtimes, or end one.
fn keep_up(registry: PrometheusHandle) {
    let upkeep = move || {
        loop {
            std::thread::park_timeout(UPKEEP_INTERVAL);
            registry.run_upkeep();
        }
    };
    if let Err(error) = std::thread::Builder::new().name("metrics-upkeep".into()).spawn(upkeep) {
        tracing::warn!("metrics are folded only when asked for: {error}");
    }
}

const fn powers<const N: usize>(first: f64, factor: f64) -> [f64; N] {
    let mut buckets = [first; N];
    let mut index = 1;
    while index < N {
        buckets[index] = buckets[index - 1] * factor;
        index += 1;
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow() {
        for buckets in [&SECONDS[..], &BYTES, &COUNTS, &RATIOS] {
            assert!(buckets.is_sorted_by(|a, b| a < b), "{buckets:?}");
        }
        assert_eq!((BYTES[13], COUNTS[17]), (64.0 * f64::from(1 << 30), 131_072.0));
    }

    /// A recorder of its own, so that this test sees nobody else's metrics.
    #[test]
    fn classic_text_with_buckets_by_unit() {
        let recorder = builder().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            metrics::describe_histogram!("baton_time_to_first_token_seconds", "From arrival to token 0.");
            metrics::histogram!("baton_time_to_first_token_seconds").record(0.003);
            metrics::histogram!("baton_prompt_tokens").record(300.0);
            metrics::counter!("baton_requests_total", "outcome" => "stop").increment(2);
            metrics::gauge!("baton_queue_waiting", "worker" => "p0").set(3.0);
        });
        let text = recorder.handle().render();
        for line in [
            "# HELP baton_time_to_first_token_seconds From arrival to token 0.",
            "# TYPE baton_time_to_first_token_seconds histogram",
            "baton_time_to_first_token_seconds_bucket{le=\"0.002\"} 0",
            "baton_time_to_first_token_seconds_bucket{le=\"0.005\"} 1",
            "baton_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1",
            "baton_prompt_tokens_bucket{le=\"256\"} 0",
            "baton_prompt_tokens_bucket{le=\"512\"} 1",
            "# TYPE baton_requests_total counter",
            "baton_requests_total{outcome=\"stop\"} 2",
            "baton_queue_waiting{worker=\"p0\"} 3",
        ] {
            assert!(text.lines().any(|there| there == line), "{line:?} is not in\n{text}");
        }
    }
}
