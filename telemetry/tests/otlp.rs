//! Spans reach a collector, as part of the trace the caller began.

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use std::time::Duration;
use telemetry::{Config, TraceParent};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;

/// A collector that hands on what it gets.
#[derive(Debug)]
struct Collector {
    requests: mpsc::Sender<ExportTraceServiceRequest>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.requests.send(request.into_inner()).await.map_err(|_| tonic::Status::unavailable("the test is over"))?;
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

// One runtime thread, which the drop of the guard blocks: the export must not need it. The collector runs elsewhere.
#[test]
fn spans_are_exported_under_the_callers_trace_and_flushed_at_the_end() {
    let collecting = tokio::runtime::Runtime::new().expect("threads");
    let (endpoint, mut requests) = collecting.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let (sender, receiver) = mpsc::channel(16);
        let service = TraceServiceServer::new(Collector { requests: sender });
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (endpoint, receiver)
    });

    // The log is silent: traces do not depend on its filter.
    let config = Config { log: "off".into(), otlp: Some(endpoint), ..Config::default() };
    let callers = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let serving = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let handed_on: TraceParent = serving.block_on(async {
        let guard = telemetry::init(&config, "router").expect("good settings");
        let request = tracing::info_span!("request", id = "r1");
        telemetry::set_parent(&request, callers);
        let handed_on = request.in_scope(|| {
            tracing::debug_span!("too fine for a trace").in_scope(|| ());
            let prefill = tracing::info_span!("prefill");
            prefill.in_scope(telemetry::current_traceparent).expect("traces are exported")
        });
        drop(request);
        drop(guard);
        handed_on.parse().expect("our own form")
    });

    let first = collecting.block_on(async { timeout(Duration::from_secs(10), requests.recv()).await });
    let mut exported = first.expect("spans arrive").expect("the collector runs").resource_spans;
    while let Ok(more) = requests.try_recv() {
        exported.extend(more.resource_spans);
    }
    let resource = exported[0].resource.clone().expect("who exports").attributes;
    assert!(
        resource.iter().any(|pair| pair.key == "service.name" && format!("{pair:?}").contains("router")),
        "{resource:?}"
    );
    let mut spans: Vec<Span> = exported.into_iter().flat_map(|r| r.scope_spans).flat_map(|s| s.spans).collect();
    spans.sort_by(|a, b| a.name.cmp(&b.name));
    let [prefill, request] = spans.as_slice() else { panic!("two spans, not {spans:#?}") };
    let theirs: TraceParent = callers.parse().expect("the example of the standard");
    assert_eq!((prefill.name.as_str(), request.name.as_str()), ("prefill", "request"));
    for span in [prefill, request] {
        assert_eq!(span.trace_id, theirs.trace_id.to_be_bytes());
    }
    assert_eq!(request.parent_span_id, theirs.span_id.to_be_bytes());
    assert_eq!(prefill.parent_span_id, request.span_id);
    assert_eq!(handed_on.trace_id, theirs.trace_id);
    assert_eq!(prefill.span_id, handed_on.span_id.to_be_bytes(), "what is handed on is the current span");
    assert!(handed_on.sampled);
}
