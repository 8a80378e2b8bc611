//! `baton simulate`: a trace on an imagined cluster, in virtual time.

use crate::settings::{Placement, Simulate as Settings};
use anyhow::bail;
use simulator::{Config, Outcome, Policy};
use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use timing::Profile;
use workload::{Objectives, Trace};

/// Bytes of the imagined router's prefix index.
const INDEX_BYTES: usize = 256 << 20;
/// How long a message between two processes takes.
const MESSAGE: Duration = Duration::from_micros(300);
/// Most sequences in a step.
const MAX_SEQUENCES: usize = 256;

/// Plays the trace with each policy and prints how it went.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let profile = match &settings.profile {
        Some(file) => Profile::read(file)?,
        None => simulator::a800(),
    };
    let workers = settings.prefill + settings.decode;
    if let Some((worker, _)) = settings.slow.iter().find(|(worker, _)| *worker >= workers) {
        bail!("--slow names worker {worker}; there are {workers}, counted from 0");
    }
    if settings.prefill == 0 && settings.placement == Placement::Remote {
        bail!("--prefill is 0, and with --placement remote somebody else has to compute prompts");
    }
    if let Some(rival) = settings.policy.iter().find(|&&policy| settings.prefill == 0 && policy != Policy::Baton) {
        bail!("--prefill is 0, and the policy {rival} needs a prefill worker; say --policy baton");
    }
    if settings.token_budget <= settings.page_tokens {
        bail!("--token-budget {} must exceed a page of {} tokens", settings.token_budget, settings.page_tokens);
    }
    if (profile.kv_tokens as usize) < settings.page_tokens {
        bail!("the profile's kv_tokens {} are less than a page of {} tokens", profile.kv_tokens, settings.page_tokens);
    }
    let mut trace = Trace::read(&settings.trace, settings.format)?.faster(settings.rate);
    if let Some(first) = settings.first {
        trace = trace.first(first);
    }
    if let Some(factor) = settings.lengths {
        trace = trace.scaled(factor);
    }
    if !settings.json {
        println!(
            "{} requests over {:.0} s on {} prefill and {} decode workers: {}, {}",
            trace.requests.len(),
            trace.span().as_secs_f64(),
            settings.prefill,
            settings.decode,
            profile.machine,
            profile.model
        );
        println!("speeds: {}\n", profile.source);
    }
    let config = |policy, seed| Config {
        prefill: settings.prefill,
        decode: settings.decode,
        weights: placement(&profile, settings),
        profile: profile.clone(),
        slow: settings.slow.clone(),
        page_tokens: settings.page_tokens,
        token_budget: settings.token_budget,
        max_sequences: MAX_SEQUENCES,
        link_bytes_per_s: settings.link * 1e9,
        message: MESSAGE,
        policy,
        placement: settings.placement.policy(),
        index_bytes: INDEX_BYTES,
        seed,
        objectives: Objectives { ttft: settings.ttft, itl: settings.itl },
    };
    let began = Instant::now();
    let runs: Vec<(Policy, u64)> =
        settings.policy.iter().flat_map(|&policy| (0..settings.seeds).map(move |seed| (policy, seed))).collect();
    let outcomes = all(&runs, |&(policy, seed)| simulator::run(&config(policy, seed), &trace));
    if settings.json {
        for ((policy, seed), outcome) in runs.iter().zip(&outcomes) {
            println!("{}", serde_json::json!({ "policy": policy, "seed": seed, "outcome": outcome }));
        }
        return Ok(());
    }
    table(&settings.policy, settings.seeds as usize, &outcomes);
    println!("\nmeans over {} seed(s); simulated in {:.1} s", settings.seeds, began.elapsed().as_secs_f64());
    Ok(())
}

/// The router's own assumptions, but for what is known here before the first report.
fn placement(profile: &Profile, settings: &Settings) -> router::Weights {
    router::Weights {
        prior: profile.pace,
        prior_link_bytes_per_s: settings.link * 1e9,
        expected_output_tokens: 300,
        ..router::Weights::default()
    }
}

/// Runs all on as many threads as there are cores; the order of the results is that of `runs`.
fn all<T: Sync>(runs: &[T], run: impl Fn(&T) -> Outcome + Sync) -> Vec<Outcome> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (next, done) = (Mutex::new(0..runs.len()), Mutex::new(Vec::with_capacity(runs.len())));
    thread::scope(|scope| {
        for _ in 0..threads.min(runs.len()) {
            scope.spawn(|| {
                loop {
                    let Some(at) = next.lock().expect("nobody panics while it counts").next() else { return };
                    let outcome = run(&runs[at]);
                    done.lock().expect("nobody panics while it adds").push((at, outcome));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("the threads have ended");
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn table(policies: &[Policy], seeds: usize, outcomes: &[Outcome]) {
    println!(
        "{:<13}{:>10}{:>9}{:>9}{:>11}{:>9}{:>9}{:>9}{:>8}{:>8}{:>8}{:>9}{:>8}",
        "policy",
        "TTFT mean",
        "p50",
        "p99 s",
        "ITL mean",
        "p99 ms",
        "good %",
        "cached %",
        "local",
        "fetched",
        "idle s",
        "busy %",
        "failed"
    );
    for (policy, outcomes) in policies.iter().zip(outcomes.chunks(seeds)) {
        let mean = |of: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(of).sum::<f64>() / outcomes.len() as f64;
        let seconds = |of: fn(&Outcome) -> Duration| mean(&|outcome| of(outcome).as_secs_f64());
        println!(
            "{policy:<13}{:>10.2}{:>9.2}{:>9.2}{:>11.2}{:>9.2}{:>9.1}{:>9.1}{:>8.0}{:>8.0}{:>8.1}{:>9}{:>8.0}",
            seconds(|outcome| outcome.summary.ttft.mean),
            seconds(|outcome| outcome.summary.ttft.p50),
            seconds(|outcome| outcome.summary.ttft.p99),
            seconds(|outcome| outcome.summary.itl.mean) * 1e3,
            seconds(|outcome| outcome.summary.itl.p99) * 1e3,
            mean(&|outcome| 100.0 * outcome.summary.good as f64 / outcome.summary.requests.max(1) as f64),
            mean(&|outcome| 100.0 * outcome.cached),
            mean(&|outcome| outcome.local as f64),
            mean(&|outcome| outcome.fetched as f64),
            mean(&|outcome| outcome.idle_beside_crowd_s),
            format!("{:.0}/{:.0}", mean(&|outcome| 100.0 * outcome.busy[0]), mean(&|outcome| 100.0 * outcome.busy[1])),
            mean(&|outcome| outcome.summary.failed as f64),
        );
    }
}
