//! The report as a page: one file, nothing fetched, no script.

use super::{
    plot::{Plot, Scale, Series, Shape},
    report::{Report, millis},
};
use std::{fmt::Write, time::Duration};
use workload::Served;

/// More points than this do not show.
const POINTS: usize = 2000;
/// Parts that a run is cut into for plots over time.
const BUCKETS: usize = 120;

const STYLE: &str = "\
:root{color-scheme:light dark;--text:#1c1c1c;--dim:#777;--grid:#ddd;--page:#fff;--s0:#1f6fb4;--s1:#d2691e;--s2:#2e8b57}\
@media(prefers-color-scheme:dark){:root{--text:#e6e6e6;--dim:#999;--grid:#3a3a3a;--page:#161616;--s0:#6cb2eb;--s1:#f0a05a;--s2:#6fcf97}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--page);max-width:1180px;margin:2em auto;padding:0 1em}\
h1{font-size:1.4em}h2{font-size:1em;margin:0}p{margin:.3em 0}.dim{color:var(--dim)}\
table{border-collapse:collapse;margin:1em 0}th,td{padding:.2em .9em;text-align:right;border-bottom:1px solid var(--grid)}\
th:first-child,td:first-child,.errors td{text-align:left}\
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:1.5em}svg{width:100%}\
.axis path{stroke:var(--grid);fill:none}.axis text{fill:var(--dim);font-size:11px}\
.line{fill:none;stroke-width:1.8}.dots{fill:none;stroke-width:3.5;stroke-linecap:round;opacity:.55}.key{font-size:12px;stroke:none!important}\
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}text.s0{fill:var(--s0)}text.s1{fill:var(--s1)}text.s2{fill:var(--s2)}";

/// Writes the page.
pub(super) fn html(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_page(report, &mut out);
    out
}

fn write_page(report: &Report, out: &mut String) -> std::fmt::Result {
    let (about, summary) = (&report.about, &report.summary);
    let title = format!("{} at {}", escape(&about.model), escape(&about.endpoint));
    write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>"
    )?;
    write!(out, "<h1>{title}</h1><p>{}; {}.</p>", escape(&about.load), escape(&about.prompts))?;
    write!(
        out,
        "<p><b>{}</b> served, <b>{}</b> failed in {:.1} s: <b>{:.2}</b> requests/s, <b>{:.1}</b> tokens/s.</p>",
        summary.requests - summary.failed,
        summary.failed,
        summary.span.as_secs_f64(),
        summary.throughput,
        summary.output_tokens_per_s
    )?;
    if let Some(objectives) = report.objectives() {
        let share = 100.0 * summary.good as f64 / summary.requests.max(1) as f64;
        let goodput = summary.goodput;
        write!(out, "<p><b>{share:.1} %</b> with {objectives}: goodput <b>{goodput:.2}</b> requests/s.</p>")?;
    }
    if report.unfinished > 0 {
        write!(out, "<p>Interrupted: {} requests were not sent or not waited for.</p>", report.unfinished)?;
    }
    write!(out, "<table><tr><th>ms<th>mean<th>p50<th>p90<th>p99<th>max</tr>")?;
    for (name, of) in report.latencies().into_iter().chain([("sent late", &report.lateness_ms)]) {
        write!(out, "<tr><td>{name}")?;
        for value in [of.mean, of.p50, of.p90, of.p99, of.max] {
            write!(out, "<td>{:.1}", millis(value))?;
        }
        write!(out, "</tr>")?;
    }
    write!(out, "</table>")?;
    if !report.errors.is_empty() {
        write!(out, "<table class=\"errors\"><tr><th>failed<th>count<th>after (p50)<th>the first</tr>")?;
        for (kind, errors) in &report.errors {
            let (count, after) = (errors.after_ms.count, millis(errors.after_ms.p50));
            let (kind, example) = (escape(kind), escape(&errors.example));
            write!(out, "<tr><td>{kind}<td>{count}<td>{after:.1} ms<td>{example}</tr>")?;
        }
        write!(out, "</table>")?;
    }
    write!(out, "<div class=\"plots\">")?;
    for (heading, plot) in plots(&report.served) {
        write!(out, "<div><h2>{heading}</h2>{}</div>", plot.svg())?;
    }
    write!(
        out,
        "</div><p class=\"dim\">Latencies count from when a request was due. TTFT: to the first token. ITL: between two pieces of \
         an answer, all requests together. TPOT: mean time for each token after the first, by request. E2E: to the last token.</p></html>"
    )
}

fn plots(served: &[Served]) -> Vec<(&'static str, Plot)> {
    let share = |name, values: Vec<Duration>| Series { name, shape: Shape::Line, points: cumulative(values) };
    let over_time = |name, of: fn(&Served) -> Option<Duration>| {
        let every = served.len().div_ceil(POINTS).max(1);
        let dot = |request: &Served| Some((request.arrived.as_secs_f64(), millis(of(request)?)));
        Series { name, shape: Shape::Dots, points: served.iter().step_by(every).filter_map(dot).collect() }
    };
    let latencies = vec![
        share("TTFT", served.iter().map(Served::ttft).collect()),
        share("ITL", served.iter().flat_map(Served::gaps).collect()),
        share("E2E", served.iter().map(Served::e2e).collect()),
    ];
    let first_tokens = vec![over_time("TTFT", |request| Some(request.ttft()))];
    let further_tokens = vec![over_time("TPOT", Served::tpot)];
    let [in_flight, tokens] = through_time(served);
    let one = |name, points| vec![Series { name, shape: Shape::Line, points }];
    let plot = |x, y, series| Plot { x, y, series };
    vec![
        ("Share of latencies up to", plot(("ms", Scale::Log), ("share", Scale::Linear), latencies)),
        ("Time to the first token, by arrival", plot(("s", Scale::Linear), ("ms", Scale::Log), first_tokens)),
        (
            "Mean time for each further token, by arrival",
            plot(("s", Scale::Linear), ("ms", Scale::Linear), further_tokens),
        ),
        ("Requests in flight", plot(("s", Scale::Linear), ("requests", Scale::Linear), one("in flight", in_flight))),
        ("Pieces of answers", plot(("s", Scale::Linear), ("a second", Scale::Linear), one("pieces", tokens))),
    ]
}

/// The share of values up to each of them, in milliseconds.
fn cumulative(mut values: Vec<Duration>) -> Vec<(f64, f64)> {
    values.sort_unstable();
    let every = values.len().div_ceil(POINTS).max(1);
    let count = values.len();
    let last = count.saturating_sub(1);
    let shown = values.into_iter().enumerate().filter(|(index, _)| index % every == 0 || *index == last);
    // A logarithmic axis has no place for zero.
    shown.map(|(index, value)| (millis(value).max(1e-3), (index + 1) as f64 / count as f64)).collect()
}

/// Requests in flight, and pieces a second, over the run.
fn through_time(served: &[Served]) -> [Vec<(f64, f64)>; 2] {
    let end = served.iter().filter_map(|request| request.pieces.last()).max().map_or(0.0, Duration::as_secs_f64);
    let width = end / BUCKETS as f64;
    if width <= 0.0 {
        return [Vec::new(), Vec::new()];
    }
    let bucket = |at: &Duration| ((at.as_secs_f64() / width) as usize).min(BUCKETS - 1);
    let (mut in_flight, mut pieces) = ([0usize; BUCKETS], [0usize; BUCKETS]);
    for request in served {
        let last = request.pieces.last().unwrap_or(&request.arrived);
        in_flight[bucket(&request.arrived)..=bucket(last)].iter_mut().for_each(|count| *count += 1);
        request.pieces.iter().for_each(|piece| pieces[bucket(piece)] += 1);
    }
    let at = |index: usize| (index as f64 + 0.5) * width;
    let in_flight = in_flight.iter().enumerate().map(|(index, &count)| (at(index), count as f64));
    let pieces = pieces.iter().enumerate().map(|(index, &count)| (at(index), count as f64 / width));
    [in_flight.collect(), pieces.collect()]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
