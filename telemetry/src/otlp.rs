//! Spans to a collector over OTLP/gRPC.
//!
//! Finished spans go to a bounded queue (2048; what comes when it is full is dropped) from which a thread of the SDK exports
//! batches. The connection has a small runtime of its own: the last batch is sent when the [`Export`] is dropped, which may be on
//! the service's only runtime thread, and that must not wait for itself.

use crate::Error;
use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::runtime::{Handle, Runtime};
use tracing::{Level, Metadata};
use tracing_subscriber::{Layer, Registry, filter::filter_fn};

/// Limit for one batch, connecting and trying again included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit for the last batch when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait of a finished span for its batch.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// How often a collector that stays away is mentioned.
const REMINDER_INTERVAL: Duration = Duration::from_secs(300);

/// A running export. Dropping it sends what is queued, for at most [`FLUSH_TIMEOUT`].
#[derive(Debug)]
pub(crate) struct Export {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::debug!("the last spans were not exported: {error}");
        }
        if let Some(runtime) = self.runtime.take() {
            // Not `drop`, which waits, and panics within another runtime.
            runtime.shutdown_background();
        }
    }
}

/// Checks that the endpoint is `http://host:port` and returns it.
pub(crate) fn check_endpoint(endpoint: &str) -> Result<&str, Error> {
    let refuse = |problem: &str| Err(Error { field: "otlp", problem: format!("{endpoint:?}: {problem}") });
    let Some(authority) = endpoint.strip_prefix("http://") else {
        return refuse("expected http://host:port");
    };
    match authority.trim_end_matches('/').rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => Ok(endpoint),
        _ => refuse("expected http://host:port"),
    }
}

/// Starts exporting to `endpoint` and returns the layer that makes spans.
pub(crate) fn start(endpoint: &str, service: &str) -> Result<(Export, Box<dyn Layer<Registry> + Send + Sync>), Error> {
    let refuse = |problem: String| Error { field: "otlp", problem };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp")
        .enable_all()
        .build()
        .map_err(|error| refuse(format!("start a thread: {error}")))?;
    let connected = {
        let _within = runtime.enter();
        opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .with_retry_policy(opentelemetry_otlp::RetryPolicy::disabled())
            .build()
            .map_err(|error| refuse(format!("{endpoint:?}: {error}")))?
    };
    let exporter = Exporter::new(endpoint, connected, runtime.handle().clone());
    let batches = BatchConfigBuilder::default().with_scheduled_delay(BATCH_DELAY).build();
    let resource = Resource::builder_empty()
        .with_service_name(service.to_owned())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider = SdkTracerProvider::builder()
        .with_resource(resource)
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
        .build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("baton"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(belongs_in_traces));
    Ok((Export { provider, runtime: Some(runtime) }, layer.boxed()))
}

/// Traces hold our own spans and events from `info` up, whatever the log shows; those of the transport would be about the export
/// itself.
fn belongs_in_traces(metadata: &Metadata<'_>) -> bool {
    const TRANSPORT: [&str; 5] = ["h2", "hyper", "tonic", "tower", "opentelemetry"];
    *metadata.level() <= Level::INFO && !TRANSPORT.iter().any(|name| metadata.target().starts_with(name))
}

/// Exports on the runtime of its own, and tells the log when that stops and starts to work.
#[derive(Debug)]
struct Exporter {
    endpoint: String,
    connected: Arc<opentelemetry_otlp::SpanExporter>,
    runtime: Handle,
    trouble: Mutex<Trouble>,
}

impl Exporter {
    fn new(endpoint: &str, connected: opentelemetry_otlp::SpanExporter, runtime: Handle) -> Self {
        let trouble = Mutex::new(Trouble::default());
        Self { endpoint: endpoint.into(), connected: Arc::new(connected), runtime, trouble }
    }

    fn tell(&self, result: &OTelSdkResult, spans: usize) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) if trouble.over() => tracing::info!(endpoint = self.endpoint, "traces are exported again"),
            Ok(()) => {}
            Err(error) if trouble.tell(Instant::now()) => {
                tracing::warn!(
                    endpoint = self.endpoint,
                    spans,
                    "traces are lost, the collector does not take them: {error}"
                );
            }
            Err(_) => {}
        }
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (connected, spans) = (self.connected.clone(), batch.len());
        let sending =
            self.runtime.spawn(async move { tokio::time::timeout(EXPORT_TIMEOUT, connected.export(batch)).await });
        let result = match sending.await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(OTelSdkError::Timeout(EXPORT_TIMEOUT)),
            Err(error) => Err(OTelSdkError::InternalFailure(error.to_string())),
        };
        self.tell(&result, spans);
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        let connected = Arc::get_mut(&mut self.connected).expect("the resource is set before the first export");
        connected.set_resource(resource);
    }
}

/// Which failures deserve a line. Pure: time is an argument.
#[derive(Debug, Default)]
struct Trouble {
    told_at: Option<Instant>,
}

impl Trouble {
    /// Notes a failure; true if it is to be told.
    fn tell(&mut self, now: Instant) -> bool {
        let due = self.told_at.is_none_or(|told_at| now.duration_since(told_at) >= REMINDER_INTERVAL);
        if due {
            self.told_at = Some(now);
        }
        due
    }

    /// Ends the trouble; true if there was some.
    fn over(&mut self) -> bool {
        self.told_at.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        fn check(endpoint: &str, good: bool) {
            assert_eq!(check_endpoint(endpoint).is_ok(), good, "{endpoint}");
        }
        check("http://127.0.0.1:4317", true);
        check("http://collector:4317/", true);
        check("http://collector", false);
        check("http://collector:otlp", false);
        check("http://:4317", false);
        check("https://collector:4317", false);
        check("", false);
    }

    #[test]
    fn a_collector_that_stays_away_is_mentioned_rarely() {
        let mut trouble = Trouble::default();
        let start = Instant::now();
        let told: Vec<u64> = (0..700).filter(|second| trouble.tell(start + Duration::from_secs(*second))).collect();
        assert_eq!(told, [0, 300, 600]);
        assert!(trouble.over());
        assert!(!trouble.over());
        assert!(trouble.tell(start));
    }
}
