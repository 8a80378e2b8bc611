//! What is sent, and when: settings and a trace become a list of requests.

use crate::settings::{Load, When};
use anyhow::{Context, bail};
use std::time::Duration;
use workload::{Arrivals, Objectives, Trace};

/// When requests leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// At their own times.
    Times,
    /// When fewer than so many are in flight.
    InFlight(usize),
}

/// A run, before it begins.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) trace: Trace,
    pub(super) pace: Pace,
    /// One line for people.
    pub(super) description: String,
}

impl Plan {
    pub(super) fn new(load: &Load) -> anyhow::Result<Self> {
        let trace = match &load.trace {
            Some(path) => {
                let trace = Trace::read(path, load.format).context("--trace")?;
                let trace = load.requests.into_iter().fold(trace, Trace::first);
                load.lengths.into_iter().fold(trace, Trace::scaled)
            }
            None => {
                let (input, output) = (load.input_tokens, load.output_tokens);
                Trace::uniform(load.requests.unwrap_or(100), input, output, load.shared_tokens)
            }
        };
        let own_rate = trace.rate();
        let count = trace.requests.len();
        let (trace, pace, when) = match (load.concurrency, load.arrivals, load.rate) {
            (Some(number), _, _) => (trace, Pace::InFlight(number), format!("{number} in flight")),
            (None, Some(When::Drawn(arrivals)), rate) => {
                let rate = rate.or(own_rate).context("--arrivals: there is no rate to draw them for, say --rate")?;
                drawn(trace, arrivals, rate, load.seed)
            }
            (None, None | Some(When::Trace), rate) => match (own_rate, rate) {
                (Some(own), rate) => {
                    let rate = rate.unwrap_or(own);
                    (trace.faster(rate / own), Pace::Times, format!("at the trace's times, {rate:.3} a second"))
                }
                (None, _) if load.arrivals.is_some() => {
                    bail!("--arrivals trace: the requests have no times of their own")
                }
                (None, Some(rate)) => drawn(trace, Arrivals::Poisson, rate, load.seed),
                (None, None) => bail!("the requests have no times of their own: say --rate R or --concurrency N"),
            },
        };
        let tokens = |of: fn(&workload::Request) -> usize| trace.requests.iter().map(of).sum::<usize>() / count.max(1);
        let (input, output) = (tokens(|request| request.input_tokens), tokens(|request| request.output_tokens));
        let from = load.trace.as_ref().map_or_else(String::new, |path| format!(" of {}", path.display()));
        let description = format!("{count} requests{from} ({input} tokens in, {output} out on average), {when}");
        Ok(Self { trace, pace, description })
    }
}

fn drawn(trace: Trace, arrivals: Arrivals, rate: f64, seed: u64) -> (Trace, Pace, String) {
    let name = match arrivals {
        Arrivals::Constant => "evenly".to_owned(),
        Arrivals::Poisson => "Poisson".to_owned(),
        Arrivals::Bursty(variation) => format!("in bursts (variation {variation})"),
    };
    (trace.arriving(arrivals, rate, seed), Pace::Times, format!("{name}, {rate:.3} a second"))
}

/// Returns what requests must see to count as good.
pub(super) fn objectives(load: &Load) -> Objectives {
    let millis = |ms: Option<f64>| ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
    Objectives { ttft: millis(load.ttft_ms), itl: millis(load.itl_ms) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Command, Settings};
    use std::ffi::OsString;

    const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/traces/mooncake_conversation_300.jsonl");

    fn plan(args: &[&str]) -> anyhow::Result<Plan> {
        let args = ["baton", "bench", "--url", "http://127.0.0.1:1"]
            .into_iter()
            .chain(args.iter().copied())
            .map(OsString::from);
        match Settings::read(args)?.command {
            Command::Bench(bench) => Plan::new(&bench.load),
            other => panic!("expected bench, got {other:?}"),
        }
    }

    /// Checks that it is refused for a reason that says `part`.
    fn check_refused(args: &[&str], part: &str) {
        let problem = format!("{:#}", plan(args).expect_err("a plan that is refused"));
        assert!(problem.contains(part), "{args:?}: {problem:?} does not say {part:?}");
    }

    #[test]
    fn a_trace_keeps_its_times_or_is_played_at_a_rate() {
        let own = plan(&["--trace", TRACE]).expect("a plan");
        assert_eq!((own.trace.requests.len(), own.pace), (300, Pace::Times));
        let faster = plan(&["--trace", TRACE, "--rate", "30", "--requests", "100"]).expect("a plan").trace;
        assert_eq!(faster.requests.len(), 100);
        assert!((faster.rate().expect("times") - 30.0).abs() < 0.01);
        let scaled = plan(&["--trace", TRACE, "--lengths", "0.0625"]).expect("a plan").trace;
        assert_eq!((scaled.block_tokens, scaled.requests[0].output_tokens), (32, 31));
        assert!(plan(&["--trace", TRACE, "--arrivals", "poisson"]).expect("a plan").description.contains("Poisson"));
    }

    #[test]
    fn requests_of_one_shape_need_a_pace() {
        let shape = ["--input-tokens", "40", "--output-tokens", "7", "--requests", "9"];
        let plan_with = |more: &[&str]| plan(&[&shape, more].concat()).expect("a plan");
        assert_eq!(plan_with(&["--concurrency", "3"]).pace, Pace::InFlight(3));
        let drawn = plan_with(&["--rate", "5"]);
        assert_eq!((drawn.trace.requests.len(), drawn.trace.requests[8].input_tokens), (9, 40));
        assert!(drawn.trace.span() > Duration::ZERO);
        assert!(drawn.description.contains("9 requests (40 tokens in, 7 out on average), Poisson"));
        let even = plan_with(&["--rate", "5", "--arrivals", "constant"]).trace;
        assert_eq!(even.span(), Duration::from_millis(1600));
    }

    #[test]
    fn what_makes_no_plan_says_what_would() {
        check_refused(&[], "--rate R or --concurrency N");
        check_refused(&["--arrivals", "poisson"], "--rate");
        check_refused(&["--arrivals", "trace", "--rate", "2"], "no times");
        check_refused(&["--trace", "/nowhere/x.jsonl"], "/nowhere/x.jsonl");
        check_refused(&["--trace", "/nowhere/x"], "--format mooncake");
        check_refused(&["--rate", "2", "--concurrency", "3"], "--concurrency");
        check_refused(&["--rate", "0"], "above 0");
        check_refused(&["--arrivals", "bursty:0"], "0.01 to 100");
        check_refused(&["--trace", TRACE, "--input-tokens", "3"], "--input-tokens");
    }
}
