//! What a person on call sees of hand-offs.

mod support;

use kv_cache::PageId;
use kv_transfer::{Event, HandoffId, Outcome, TransportKind};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use support::{SOON, Worker, identity, only};

/// The value of the only sample whose name and labels contain all of `parts`.
fn value(metrics: &PrometheusHandle, parts: &[&str]) -> f64 {
    let text = metrics.render();
    let matches: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part))).collect();
    match matches[..] {
        [line] => line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number"),
        _ => panic!("{parts:?} matches {matches:?}"),
    }
}

#[tokio::test]
async fn handoffs_are_counted_by_how_they_ended() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    // The handles are made by `Transfer::start`, on this thread.
    let local = metrics::set_default_local_recorder(&recorder);
    let mut source = Worker::start(only(TransportKind::Tcp), identity("prefill-0", 40), 1).await;
    let mut target = Worker::start(only(TransportKind::Tcp), identity("decode-0", 64), 2).await;
    drop(local);

    let (landed, refused) = (HandoffId(1), HandoffId(2));
    for handoff in [landed, refused] {
        source.begin(handoff, target.peer(), &[PageId(0), PageId(1)]);
        target.begun(handoff).await;
    }
    assert_eq!(value(&metrics, &["baton_handoff_in_flight{", "prefill-0"]), 2.0);
    assert_eq!(value(&metrics, &["baton_handoff_links{", "prefill-0", "tcp", "source"]), 1.0);
    target.transfer.refuse(refused, "full".into());
    target.transfer.open(landed, vec![PageId(3), PageId(2)], 1);
    source.push(landed, 0..2);
    source.commit(landed, 1);
    assert!(matches!(target.event().await, Event::Landed { .. }));
    for _ in 0..2 {
        assert!(matches!(source.event().await, Event::SourceDone { .. }));
    }
    // Ends after a commit that nobody can have acknowledged: no overhead is recorded for it.
    source.begin(HandoffId(3), target.peer(), &[PageId(0)]);
    target.begun(HandoffId(3)).await;
    source.transfer.abort(HandoffId(3), "x".into());
    assert!(matches!(source.event().await, Event::SourceDone { outcome: Outcome::Aborted(_), .. }));
    assert_eq!((source.transfer.drain(SOON).await, target.transfer.drain(SOON).await), (0, 0));

    for (worker, side) in [("prefill-0", "source"), ("decode-0", "target")] {
        for (outcome, expected) in [("landed", 1.0), ("refused", 1.0), ("aborted", 1.0), ("expired", 0.0)] {
            let parts = ["baton_handoffs_total{", worker, side, outcome, "transport=\"tcp\""];
            assert_eq!(value(&metrics, &parts), expected, "{parts:?}");
        }
        let bytes = source.identity.layout.page_bytes() as f64;
        assert_eq!(value(&metrics, &["baton_handoff_bytes_total{", worker, side]), bytes, "one page was there already");
        assert_eq!(value(&metrics, &["baton_handoff_in_flight{", worker]), 0.0);
        assert_eq!(value(&metrics, &["baton_handoff_quarantined_pages{", worker]), 0.0);
        assert_eq!(value(&metrics, &["baton_handoff_stale_messages_total{", worker]), 0.0);
    }
    assert_eq!(value(&metrics, &["baton_handoff_overhead_seconds_count{", "prefill-0"]), 1.0);
    assert_eq!(value(&metrics, &["baton_handoff_hidden_ratio_count{", "prefill-0", "tcp"]), 1.0);
}
