//! Lines on stderr, for people or for machines.

use crate::{Config, Error, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

/// Makes the layer that writes logs.
pub(crate) fn layer(config: &Config) -> Result<Box<dyn Layer<Registry> + Send + Sync>, Error> {
    let filter = filter(&config.log)?;
    let lines = fmt::layer().with_writer(std::io::stderr);
    Ok(match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_filter(filter).boxed(),
    })
}

/// Reads the filter. The OpenTelemetry crates log each failed export; unless asked for, that is left to `otlp.rs`, which says it once.
fn filter(log: &str) -> Result<EnvFilter, Error> {
    let quiet = ["opentelemetry=off", "opentelemetry_sdk=off", "opentelemetry-otlp=off"];
    let directives = if log.contains("opentelemetry") { log.to_owned() } else { format!("{log},{}", quiet.join(",")) };
    EnvFilter::builder().parse(directives).map_err(|error| Error {
        field: "log",
        problem: format!("{log:?} is no filter such as \"info,router=debug\": {error}"),
    })
}
