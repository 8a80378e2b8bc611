//! The figures of a run, as a table and as JSON.

use super::play::{Played, Record};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write, time::Duration};
use workload::{Distribution, Objectives, Served, Summary};

/// What was asked of whom.
#[derive(Clone, Debug, Serialize)]
pub(super) struct About {
    pub(super) endpoint: String,
    pub(super) model: String,
    pub(super) load: String,
    pub(super) prompts: String,
}

/// A run and its figures.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) about: About,
    pub(super) summary: Summary,
    /// How long after they were due requests left. Latencies include it.
    pub(super) lateness_ms: Distribution,
    /// Requests that were not sent or not waited for, because the run was interrupted.
    pub(super) unfinished: usize,
    /// By kind.
    pub(super) errors: BTreeMap<String, Errors>,
    /// By arrival.
    pub(super) requests: Vec<Row>,
    /// For the plots.
    #[serde(skip)]
    pub(super) served: Vec<Served>,
}

/// Failures of one kind.
#[derive(Debug, Serialize)]
pub(super) struct Errors {
    /// What the first one said.
    pub(super) example: String,
    /// How long after they were due requests failed, and how many did.
    pub(super) after_ms: Distribution,
}

/// One request.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    at_ms: f64,
    input_tokens: usize,
    output_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tpot_ms: Option<f64>,
    e2e_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Row {
    fn new(record: &Record) -> Self {
        let (at_ms, input_tokens) = (millis(record.due), record.input_tokens);
        match &record.outcome {
            Ok(served) => Self {
                at_ms,
                input_tokens,
                output_tokens: served.output_tokens,
                ttft_ms: Some(millis(served.ttft())),
                tpot_ms: served.tpot().map(millis),
                e2e_ms: millis(served.e2e()),
                error: None,
            },
            Err((failure, after)) => Self {
                at_ms,
                input_tokens,
                output_tokens: 0,
                ttft_ms: None,
                tpot_ms: None,
                e2e_ms: millis(*after),
                error: Some(failure.kind()),
            },
        }
    }
}

impl Report {
    pub(super) fn new(about: About, played: Played, objectives: Objectives) -> Self {
        let requests = played.records.iter().map(Row::new).collect();
        let lateness = played.records.iter().map(|record| record.sent.saturating_sub(record.due));
        let lateness_ms = Distribution::of(lateness);
        let mut served = Vec::new();
        let mut failures: BTreeMap<String, (String, Vec<Duration>)> = BTreeMap::new();
        for record in played.records {
            match record.outcome {
                Ok(request) => served.push(request),
                Err((failure, after)) => {
                    let of_kind = failures.entry(failure.kind());
                    of_kind.or_insert_with(|| (failure.to_string(), Vec::new())).1.push(after);
                }
            }
        }
        let failed = failures.values().map(|(_, after)| after.len()).sum();
        let errors = failures
            .into_iter()
            .map(|(kind, (example, after))| (kind, Errors { example, after_ms: Distribution::of(after.into_iter()) }));
        Self {
            about,
            summary: Summary::of(&served, failed, objectives),
            lateness_ms,
            unfinished: played.unfinished,
            errors: errors.collect(),
            requests,
            served,
        }
    }

    /// Describes the objectives; `None` where there are none.
    pub(super) fn objectives(&self) -> Option<String> {
        let Objectives { ttft, itl } = self.summary.objectives;
        let part = |name: &str, limit: Option<Duration>| limit.map(|limit| format!("{name} ≤ {} ms", millis(limit)));
        let parts: Vec<String> = [part("TTFT", ttft), part("mean ITL", itl)].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }

    /// The latencies, by name.
    pub(super) fn latencies(&self) -> [(&'static str, &Distribution); 4] {
        let summary = &self.summary;
        [("TTFT", &summary.ttft), ("ITL", &summary.itl), ("TPOT", &summary.tpot), ("E2E", &summary.e2e)]
    }

    /// Writes the figures for a terminal.
    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_table(&mut out);
        out
    }

    /// The run in a sentence, the objectives if there are any, and whether it was interrupted.
    pub(super) fn lines(&self) -> Vec<String> {
        let summary = &self.summary;
        let mut lines = vec![format!(
            "{} served, {} failed in {:.1} s: {:.2} requests/s, {:.1} tokens/s",
            summary.requests - summary.failed,
            summary.failed,
            summary.span.as_secs_f64(),
            summary.throughput,
            summary.output_tokens_per_s
        )];
        if let Some(objectives) = self.objectives() {
            let share = 100.0 * summary.good as f64 / summary.requests.max(1) as f64;
            lines.push(format!("{share:.1} % with {objectives}: goodput {:.2} requests/s", summary.goodput));
        }
        if self.unfinished > 0 {
            lines.push(format!("interrupted: {} requests were not sent or not waited for", self.unfinished));
        }
        lines
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        for line in self.lines() {
            writeln!(out, "{line}")?;
        }
        writeln!(out, "\n{:<10} {:>9} {:>9} {:>9} {:>9} {:>9}", "ms", "mean", "p50", "p90", "p99", "max")?;
        for (name, of) in self.latencies().into_iter().chain([("sent late", &self.lateness_ms)]) {
            write!(out, "{name:<10}")?;
            for value in [of.mean, of.p50, of.p90, of.p99, of.max] {
                write!(out, " {:>9.1}", millis(value))?;
            }
            writeln!(out)?;
        }
        for (kind, errors) in &self.errors {
            let Errors { example, after_ms } = errors;
            let [p50, p99, max] = [after_ms.p50, after_ms.p99, after_ms.max].map(millis);
            writeln!(
                out,
                "\n{} × {kind}, after {p50:.1} ms (p50), {p99:.1} (p99), {max:.1} (max): {example}",
                after_ms.count
            )?;
        }
        writeln!(out)
    }
}
