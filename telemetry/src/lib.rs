//! Makes a process visible: logs, traces, metrics, health.
//!
//! [`init`] is called once at start and returns a [`Guard`]; calling it again in the same process (tests, a process that runs
//! several services) changes nothing. Everything here is off the path of requests: logs and metrics are local, spans go to a bounded
//! queue that drops when it is full, and a collector that is slow or away costs one line in the log.
//!
//! | file | noun |
//! |---|---|
//! | `log.rs` | lines on stderr |
//! | `otlp.rs` | spans to a collector |
//! | `trace.rs` | where a request stands in a trace, from process to process |
//! | `metrics.rs` | the registry and its text |
//! | `process.rs` | memory, CPU time and files of this process |
//! | `health.rs` | ready and alive, or why not (pure core) |
//! | `admin.rs` | `/metrics`, `/livez`, `/readyz` |
#![forbid(unsafe_code)]

mod admin;
mod health;
mod log;
mod metrics;
mod otlp;
mod process;
mod trace;
mod vllm;

pub use admin::serve_admin;
pub use health::Health;
pub use metrics::render_metrics;
pub use trace::{NotATraceParent, TraceParent, current_traceparent, set_parent, traceparent};

use serde::{Deserialize, Serialize};
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt, util::SubscriberInitExt};

/// What is logged and where traces go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Filter in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// Shape of log lines.
    pub log_format: LogFormat,
    /// OTLP/gRPC endpoint for traces, `http://host:4317`; unset = no export.
    pub otlp: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { log: "info".into(), log_format: LogFormat::Text, otlp: None }
    }
}

/// Shape of log lines on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Error {
    /// Field of [`Config`].
    pub field: &'static str,
    /// What is wrong.
    pub problem: String,
}

/// Flushes what is still to be exported when dropped, for at most two seconds.
#[derive(Debug)]
#[must_use = "dropping the guard ends the export of traces"]
pub struct Guard {
    _export: Option<otlp::Export>,
}

/// Starts logging, trace export and the metrics registry of this process. `service` names it in traces.
///
/// Needs no tokio runtime. In a process where it has been called before, it checks `config` and changes nothing.
pub fn init(config: &Config, service: &str) -> Result<Guard, Error> {
    let log = log::layer(config)?;
    let endpoint = config.otlp.as_deref().map(otlp::check_endpoint).transpose()?;
    metrics::install();
    if tracing::dispatcher::has_been_set() {
        return Ok(Guard { _export: None });
    }
    let (export, spans) = endpoint.map(|endpoint| otlp::start(endpoint, service)).transpose()?.unzip();
    let layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = spans.into_iter().chain([log]).collect();
    // Two threads may have come here at once; the other's subscriber is as good as ours.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    Ok(Guard { _export: export })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_name_their_field() {
        fn check(config: Config, expected: &str) {
            let error = init(&config, "test").expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        check(Config { log: "info,=".into(), ..Config::default() }, "log: ");
        check(Config { log: "baton=loud".into(), ..Config::default() }, "log: ");
        check(Config { otlp: Some("collector".into()), ..Config::default() }, "otlp: ");
        check(Config { otlp: Some("https://collector:4317".into()), ..Config::default() }, "otlp: ");
    }

    #[test]
    fn starting_twice_is_no_error() {
        let _first = init(&Config::default(), "first").expect("good settings");
        let _second =
            init(&Config { log_format: LogFormat::Json, ..Config::default() }, "second").expect("good settings");
        ::metrics::counter!("baton_started_twice_total").increment(1);
        assert!(render_metrics().contains("baton_started_twice_total 1"));
    }
}
