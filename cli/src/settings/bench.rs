//! Settings of `baton bench`: the machine and Baton on it, or with `--url` any endpoint under load.

use super::{ModelChoice, at_least_one, units, url, whole};
use clap::{Args, ValueEnum};
use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};
use workload::{Arrivals, Format};

/// Settings of `baton bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Measure only what begins with this, such as `engine` or `handoff/copy`
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub(crate) only: String,
    /// UCX's libucp.so.0 [default: where the system looks]
    #[arg(long, value_name = "PATH", env = "BATON_UCX_LIBRARY")]
    pub(crate) ucx_library: Option<PathBuf>,
    /// How long `router/memory/prompts` fills the router's caches
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    pub(crate) soak: Duration,
    /// Measure how long a model's steps take here instead, and write that for `--engine timed:FILE`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "soak"])]
    pub(crate) profile: Option<PathBuf>,
    /// Model that is profiled: a Hugging Face model directory or GGUF file [default: the bundled demo model]
    #[arg(long, value_name = "PATH", requires = "profile")]
    profile_model: Option<PathBuf>,
    /// Threads that compute while a profile is measured [default: the cores this process may use, shared out among --sharing]
    #[arg(long, value_name = "N", requires = "profile", value_parser = at_least_one::<usize>)]
    pub(crate) threads: Option<usize>,
    /// Workers that will share this machine: while one is measured, the others compute prompts
    #[arg(long, value_name = "N", requires = "profile", default_value_t = 1, value_parser = at_least_one::<usize>)]
    pub(crate) sharing: usize,
    /// Becomes one of the processes that the bench measures, instead of measuring
    #[arg(long, value_name = "WHAT", hide = true)]
    pub(crate) serve: Option<BenchServer>,
    /// Mock workers of `--serve router`: the prefill worker, then the decode worker
    #[arg(long, value_name = "ADDR", hide = true, value_delimiter = ',', requires = "serve")]
    pub(crate) workers: Vec<SocketAddr>,
    #[command(flatten)]
    pub(crate) load: Load,
}

impl Bench {
    /// Returns which model is profiled.
    pub(crate) fn profile_model(&self) -> ModelChoice {
        ModelChoice { model: self.profile_model.clone(), model_name: None }
    }
}

/// What is sent to an endpoint, and when.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Load on an endpoint (with --url, instead of the above)")]
pub(crate) struct Load {
    /// OpenAI endpoint to put load on, such as http://127.0.0.1:8000
    #[arg(long, value_name = "URL", value_parser = url, conflicts_with_all = ["only", "soak", "serve", "profile"])]
    pub(crate) url: Option<String>,
    /// Model to ask for [default: the first that the endpoint lists]
    #[arg(long, value_name = "NAME", requires = "url")]
    pub(crate) model: Option<String>,
    /// Key to show (`Authorization: Bearer KEY`)
    #[arg(long, value_name = "KEY", env = "BATON_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// File with recorded requests [default: requests of one shape]
    #[arg(long, value_name = "FILE", requires = "url")]
    pub(crate) trace: Option<PathBuf>,
    /// Format of the trace: mooncake, azure or sharegpt [default: by its ending .jsonl, .csv or .json]
    #[arg(long, value_name = "FORMAT", requires = "trace")]
    pub(crate) format: Option<Format>,
    /// How many requests to send, the trace's first [default: the whole trace; 100 without one]
    #[arg(long, value_name = "N", requires = "url", value_parser = at_least_one::<usize>)]
    pub(crate) requests: Option<usize>,
    /// Scale the trace's prompts and answers by this, such as 0.1
    #[arg(long, value_name = "FACTOR", requires = "trace", value_parser = positive)]
    pub(crate) lengths: Option<f64>,
    /// Tokens of each prompt, where there is no trace
    #[arg(long, value_name = "TOKENS", requires = "url", conflicts_with = "trace", default_value = "512", value_parser = at_least_one::<usize>)]
    pub(crate) input_tokens: usize,
    /// Of those, how many are the same in all prompts, in steps of 16
    #[arg(long, value_name = "TOKENS", requires = "url", conflicts_with = "trace", default_value = "0", value_parser = whole::<usize>)]
    pub(crate) shared_tokens: usize,
    /// Tokens of each answer, where there is no trace
    #[arg(long, value_name = "TOKENS", requires = "url", conflicts_with = "trace", default_value = "128", value_parser = at_least_one::<usize>)]
    pub(crate) output_tokens: usize,
    /// Requests a second on average, whatever the endpoint does [default: the trace's own]
    #[arg(long, value_name = "R", requires = "url", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// When they arrive: trace, poisson, constant or bursty:VARIATION, such as bursty:3 [default: trace; poisson without one]
    #[arg(long, value_name = "HOW", requires = "url")]
    pub(crate) arrivals: Option<When>,
    /// Keep so many requests in flight, each sent when another ends, instead of sending at a rate
    #[arg(long, value_name = "N", requires = "url", conflicts_with_all = ["rate", "arrivals"], value_parser = at_least_one::<usize>)]
    pub(crate) concurrency: Option<usize>,
    /// Seed of random arrivals
    #[arg(long, value_name = "SEED", requires = "url", default_value = "0")]
    pub(crate) seed: u64,
    /// How prompts are sent
    #[arg(long, value_name = "HOW", requires = "url", default_value = "auto")]
    pub(crate) prompts: Prompts,
    /// Prompts are made of token ids below this
    #[arg(long, value_name = "N", requires = "url", default_value = "1000", value_parser = at_least_one::<u32>)]
    pub(crate) vocabulary: u32,
    /// Longest wait for a whole answer
    #[arg(long, value_name = "TIME", requires = "url", default_value = "10m", value_parser = units::duration)]
    pub(crate) timeout: Duration,
    /// Objective: longest time to the first token, in milliseconds
    #[arg(long, value_name = "MS", requires = "url", value_parser = positive)]
    pub(crate) ttft_ms: Option<f64>,
    /// Objective: longest mean time for each further token of a request, in milliseconds
    #[arg(long, value_name = "MS", requires = "url", value_parser = positive)]
    pub(crate) itl_ms: Option<f64>,
    /// Write all figures, and every request, as JSON
    #[arg(long, value_name = "FILE", requires = "url")]
    pub(crate) json: Option<PathBuf>,
    /// Write a report with plots
    #[arg(long, value_name = "FILE", requires = "url")]
    pub(crate) html: Option<PathBuf>,
}

/// Where arrival times come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum When {
    /// The trace says it; a rate plays it faster or slower.
    Trace,
    /// They are drawn.
    Drawn(Arrivals),
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "trace" { Ok(Self::Trace) } else { text.parse().map(Self::Drawn) }
    }
}

/// How prompts are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Prompts {
    /// As token ids where the endpoint takes them, else as text
    Auto,
    /// As token ids, to /v1/completions
    Tokens,
    /// As words, about one a token, to /v1/completions
    Text,
    /// As one message of such words, to /v1/chat/completions
    Chat,
}

/// What a process of the bench is.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum BenchServer {
    /// A router in front of mock workers
    Router,
    /// A server that answers without thinking
    Plain,
    /// A decode worker's end of a link
    Target,
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (1e-6..=1e9).contains(value));
    value.ok_or_else(|| "expected a number above 0, such as 2 or 0.5".into())
}
