//! Settings of `baton simulate`.

use super::units;
use clap::Args;
use simulator::Policy;
use std::{path::PathBuf, time::Duration};
use workload::Format;

/// Settings of `baton simulate`.
#[derive(Debug, Args)]
pub(crate) struct Simulate {
    /// Trace to play
    #[arg(value_name = "TRACE")]
    pub(crate) trace: PathBuf,
    /// Format of the trace: mooncake, azure or sharegpt [default: by its ending .jsonl, .csv or .json]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    /// Prefill workers; with 0, which only the policy baton can do, decode workers compute all prompts themselves
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = super::whole::<usize>)]
    pub(crate) prefill: usize,
    /// Decode workers
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = super::at_least_one::<usize>)]
    pub(crate) decode: usize,
    /// Who places requests: any of baton, random, round-robin, least-loaded, sticky, cache-aware and global
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "baton,random,round-robin,least-loaded,sticky,cache-aware,global"
    )]
    pub(crate) policy: Vec<Policy>,
    /// Where prompts are computed, with the policy baton
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub(crate) placement: super::Placement,
    /// What a worker is: TOML file of `baton bench --profile` [default: 8 x A800, Llama-2-70B]
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Runs of each policy, with different random numbers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = super::at_least_one::<u64>)]
    pub(crate) seeds: u64,
    /// Plays the trace so many times as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    pub(crate) rate: f64,
    /// Plays only the first requests
    #[arg(long, value_name = "N", value_parser = super::at_least_one::<usize>)]
    pub(crate) first: Option<usize>,
    /// Scale the trace's prompts and answers by this, such as 0.1
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    pub(crate) lengths: Option<f64>,
    /// Workers that take so many times as long, such as `0:4` (prefill workers come first, counted from 0)
    #[arg(long, value_name = "WORKER:FACTOR", value_delimiter = ',', value_parser = slow)]
    pub(crate) slow: Vec<(usize, f64)>,
    /// Bandwidth of a worker's network, in GB/s
    #[arg(long, value_name = "GB/S", default_value_t = 100.0, value_parser = factor)]
    pub(crate) link: f64,
    /// Tokens in a page
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = super::at_least_one::<usize>)]
    pub(crate) page_tokens: usize,
    /// Most tokens in a step; more than a page
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = super::at_least_one::<usize>)]
    pub(crate) token_budget: usize,
    /// Longest time to the first token that counts as good
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) ttft: Option<Duration>,
    /// Longest mean time between two tokens that counts as good
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) itl: Option<Duration>,
    /// Prints one JSON object for each run instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if factor > 0.0 && f64::is_finite(factor) => Ok(factor),
        _ => Err("must be a number above 0".into()),
    }
}

fn slow(text: &str) -> Result<(usize, f64), String> {
    let wanted = || "must be a worker's number and a factor, such as 0:4".to_owned();
    let (worker, times) = text.split_once(':').ok_or_else(wanted)?;
    Ok((worker.parse().map_err(|_| wanted())?, factor(times)?))
}
