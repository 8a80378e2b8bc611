//! What this crate counts, labelled with the worker's member id since several workers may share a process.

use crate::{TransportKind, handoffs::Side, target::End};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use std::collections::HashMap;

/// Handles made once per worker.
pub(crate) struct Metrics {
    /// `baton_handoffs_total`, by how they ended; without a transport when the link never came up.
    ended: HashMap<(Side, End, Option<TransportKind>), Counter>,
    pub(crate) sent_bytes: Counter,
    pub(crate) landed_bytes: Counter,
    pub(crate) overhead_seconds: Histogram,
    pub(crate) stale_messages: Counter,
    pub(crate) in_flight: Gauge,
    pub(crate) quarantined_pages: Gauge,
    links: HashMap<(Side, TransportKind), Gauge>,
    hidden_ratio: HashMap<TransportKind, Histogram>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

const SIDES: [(Side, &str); 2] = [(Side::Source, "source"), (Side::Target, "target")];
const KINDS: [(TransportKind, &str); 5] = [
    (TransportKind::Memory, "memory"),
    (TransportKind::Cuda, "cuda"),
    (TransportKind::Shm, "shm"),
    (TransportKind::Ucx, "ucx"),
    (TransportKind::Tcp, "tcp"),
];
const ENDS: [(End, &str); 5] = [
    (End::Landed, "landed"),
    (End::Forgone, "forgone"),
    (End::Refused, "refused"),
    (End::Aborted, "aborted"),
    (End::Expired, "expired"),
];

impl Metrics {
    /// Makes the handles for `worker`.
    pub(crate) fn new(worker: &str) -> Self {
        describe();
        let of = |name: &'static str| gauge!(name, "worker" => worker.to_owned());
        let bytes =
            |side: &'static str| counter!("baton_handoff_bytes_total", "worker" => worker.to_owned(), "side" => side);
        let (mut ended, mut links) = (HashMap::new(), HashMap::new());
        for (side, side_name) in SIDES {
            for (kind, kind_name) in KINDS.map(|(kind, name)| (Some(kind), name)).into_iter().chain([(None, "none")]) {
                for (end, end_name) in ENDS {
                    let counter = counter!("baton_handoffs_total",
                        "worker" => worker.to_owned(), "side" => side_name, "outcome" => end_name, "transport" => kind_name);
                    ended.insert((side, end, kind), counter);
                }
            }
            for (kind, kind_name) in KINDS {
                let gauge = gauge!("baton_handoff_links",
                    "worker" => worker.to_owned(), "side" => side_name, "transport" => kind_name);
                links.insert((side, kind), gauge);
            }
        }
        let hidden_ratio = KINDS.map(|(kind, name)| {
            let histogram =
                histogram!("baton_handoff_hidden_ratio", "worker" => worker.to_owned(), "transport" => name);
            (kind, histogram)
        });
        Self {
            ended,
            sent_bytes: bytes("source"),
            landed_bytes: bytes("target"),
            overhead_seconds: histogram!("baton_handoff_overhead_seconds", "worker" => worker.to_owned()),
            stale_messages: counter!("baton_handoff_stale_messages_total", "worker" => worker.to_owned()),
            in_flight: of("baton_handoff_in_flight"),
            quarantined_pages: of("baton_handoff_quarantined_pages"),
            links,
            hidden_ratio: hidden_ratio.into(),
        }
    }

    /// Counts a hand-off that ended.
    pub(crate) fn ended(&self, side: Side, end: End, kind: Option<TransportKind>) {
        self.ended[&(side, end, kind)].increment(1);
    }

    /// Returns the shares of the time spent moving that computing hid.
    pub(crate) fn hidden_ratio(&self, kind: TransportKind) -> &Histogram {
        &self.hidden_ratio[&kind]
    }

    /// Returns the number of links that move bytes this way.
    pub(crate) fn links(&self, side: Side, kind: TransportKind) -> &Gauge {
        &self.links[&(side, kind)]
    }
}

/// Returns the counter of links for which something else was chosen than `wanted`, which both ends offer and which did not work.
pub(crate) fn fallbacks(worker: &str, wanted: TransportKind) -> Counter {
    let wanted = KINDS.iter().find(|(kind, _)| *kind == wanted).map_or("", |(_, name)| name);
    counter!("baton_handoff_link_fallbacks_total", "worker" => worker.to_owned(), "wanted" => wanted)
}

fn describe() {
    describe_counter!("baton_handoffs_total", "Hand-offs that ended, by side, outcome and transport.");
    describe_counter!("baton_handoff_bytes_total", "Bytes of pages that left (source) or landed (target).");
    describe_histogram!(
        "baton_handoff_overhead_seconds",
        "From the worker's commit, after the last page was computed, to the target's acknowledgement."
    );
    describe_histogram!(
        "baton_handoff_hidden_ratio",
        "Share of a landed hand-off's time spent moving that came before its last layer was computed, by transport."
    );
    describe_counter!("baton_handoff_stale_messages_total", "Messages and frames for no live hand-off, ignored.");
    describe_counter!(
        "baton_handoff_link_fallbacks_total",
        "Links that use another transport than the one wanted, because that did not work."
    );
    describe_gauge!("baton_handoff_in_flight", "Hand-offs that have not ended, both sides.");
    describe_gauge!(
        "baton_handoff_quarantined_pages",
        "Landing pages of lost hand-offs, waiting for proof that no write can land."
    );
    describe_gauge!("baton_handoff_links", "Links that are up, by side and transport.");
}
