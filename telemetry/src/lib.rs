//! Makes a process visible: traces, metrics, health.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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

/// Flushes what is still to be exported when dropped.
#[derive(Debug)]
pub struct Guard {
    _private: (),
}

/// Starts logging, trace export and the metrics registry of this process. `service` names it in traces.
pub fn init(_config: &Config, _service: &str) -> Result<Guard, Error> {
    todo!()
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

/// Renders all metrics of this process as Prometheus text (0.0.4).
pub fn render_metrics() -> String {
    todo!()
}

/// What probes are told about one part of a process. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Health {
    _private: (),
}

impl Health {
    /// Starts not ready, for the reason given, and alive. `stall` is how long [`Health::work_began`] may go without
    /// [`Health::progressed`] before the part counts as hung.
    pub fn new(_reason: &str, _stall: Duration) -> Self {
        todo!()
    }

    /// The part can take work.
    pub fn ready(&self) {
        todo!()
    }

    /// The part cannot take work, for this reason.
    pub fn not_ready(&self, _reason: &str) {
        todo!()
    }

    /// There is work: from now on progress is expected.
    pub fn work_began(&self) {
        todo!()
    }

    /// A step finished. `idle` when nothing is left to do, so that no further progress is expected.
    pub fn progressed(&self, _idle: bool) {
        todo!()
    }

    /// `Err` with the reason while not ready (`/readyz`).
    pub fn readiness(&self) -> Result<(), String> {
        todo!()
    }

    /// `Err` with the reason when work is there but no step finishes (`/livez`).
    pub fn liveness(&self) -> Result<(), String> {
        todo!()
    }
}

/// Serves `/metrics`, `/livez` and `/readyz` until `shutdown`.
pub async fn serve_admin(_listener: TcpListener, _health: Health, _shutdown: CancellationToken) -> std::io::Result<()> {
    todo!()
}
