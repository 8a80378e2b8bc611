//! A collector that accepts connections and never answers costs nothing but its spans.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};
use telemetry::Config;

#[test]
fn a_silent_collector_neither_blocks_nor_delays_the_end() {
    // The listener's backlog accepts; nobody ever reads.
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let guard =
        telemetry::init(&Config { otlp: Some(endpoint), ..Config::default() }, "test").expect("nothing is asked yet");

    // Far more than the queue holds.
    let start = Instant::now();
    for index in 0..20_000 {
        tracing::info_span!("request", index).in_scope(|| ());
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(2), "20000 spans took {took:?}");

    let start = Instant::now();
    drop(guard);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(4), "the end took {took:?}");
}
