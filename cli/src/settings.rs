//! Every setting of every subcommand, each written once.
//!
//! A field below is the flag, the environment variable (`BATON_…`) and the key of the TOML file (`--config FILE`, the flag's
//! name without the dashes). File, environment and flags are layered by clap alone: what the file says becomes the argument's
//! default ([`file`]), so all three go through the same parser. What the libraries can be told beyond these flags stands in
//! tables of the file named after them ([`Tables`]).

mod bench;
mod compute;
mod file;
mod simulate;
mod units;

pub(crate) use bench::{Bench, BenchServer, Load, Prompts, When};
pub(crate) use compute::{CardLibraries, Compute, EngineChoice, Exact, KvDtype, Quantize, Speculate, Speculation};
pub(crate) use file::Tables;
pub(crate) use simulate::Simulate;
pub(crate) use units::Bytes;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, builder::Styles, parser::ValueSource};
use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

/// Large language models, served from a prefill pool and a decode pool.
///
/// Without a subcommand, `baton` runs `baton up`: a whole cluster in this process.
#[derive(Debug, Parser)]
#[command(name = "baton", version, args_conflicts_with_subcommands = true, styles = Styles::plain())]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    up: Up,
}

/// What to run.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster in this process: router, prefill and decode workers
    Up(Up),
    /// Run the router of a cluster
    Router(Router),
    /// Run a prefill worker: turns prompts into KV pages
    PrefillWorker(Worker),
    /// Run a decode worker: turns KV pages into tokens
    DecodeWorker(DecodeWorker),
    /// Talk to a running Baton
    Chat(Chat),
    /// Examine the ways between workers on this host
    Doctor(Doctor),
    /// Measure this machine and Baton on it; with --url, an endpoint under load
    Bench(Bench),
    /// Play a trace on an imagined cluster, in virtual time
    Simulate(Simulate),
}

/// What every server process takes.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// TOML file with settings: flags by their names, library settings in tables
    #[arg(long, value_name = "FILE", env = "BATON_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// What to log, such as `info` or `warn,router=debug` [default: info, for `up` warn]
    #[arg(long, value_name = "FILTER", env = "BATON_LOG")]
    pub(crate) log: Option<String>,
    /// Shape of log lines
    #[arg(long, value_name = "FORMAT", env = "BATON_LOG_FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// OTLP/gRPC endpoint that receives traces, such as http://127.0.0.1:4317
    #[arg(long, value_name = "URL", env = "BATON_OTLP", hide_env_values = true, value_parser = url)]
    pub(crate) otlp: Option<String>,
}

/// Which model is served, and as what.
#[derive(Debug, Args)]
pub(crate) struct ModelChoice {
    /// Hugging Face model directory or GGUF file [default: the bundled demo model]
    #[arg(long, value_name = "PATH", env = "BATON_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Name that clients ask for [default: the directory's or file's name]
    #[arg(long, value_name = "NAME", env = "BATON_MODEL_NAME", value_parser = name)]
    pub(crate) model_name: Option<String>,
}

/// What workers can add to their model.
#[derive(Debug, Args)]
pub(crate) struct Adapters {
    /// LoRA adapter to serve as model NAME: a PEFT directory. Can be given several times
    #[arg(long, value_name = "NAME=DIR", env = "BATON_LORA", value_delimiter = ',', value_parser = adapter)]
    pub(crate) lora: Vec<(String, PathBuf)>,
    /// Largest rank of an adapter [default: 64]
    #[arg(long, value_name = "N", env = "BATON_MAX_LORA_RANK", value_parser = at_least_one::<usize>)]
    pub(crate) max_lora_rank: Option<usize>,
}

/// Whether clients can change what workers add to their model.
#[derive(Debug, Args)]
pub(crate) struct RuntimeLora {
    /// Let clients load and unload adapters (/v1/load_lora_adapter): they name paths on the workers' machines
    #[arg(
        long,
        env = "BATON_RUNTIME_LORA",
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_possible_values = true
    )]
    pub(crate) runtime_lora: bool,
}

/// How the model writes what is not text for the user, and what makes its embeddings.
#[derive(Debug, Default, Args)]
pub(crate) struct Dialect {
    /// How the model writes calls of tools: auto, none, hermes, llama3_json, mistral, pythonic, qwen3_xml or cohere
    /// [default: auto, as its chat template shows]
    #[arg(long, value_name = "FORMAT", env = "BATON_TOOL_CALL_PARSER", value_parser = by_name::<router::ToolCallParser>)]
    pub(crate) tool_call_parser: Option<router::ToolCallParser>,
    /// How it marks its reasoning: auto, none, deepseek_r1, qwen3, mistral or cohere
    /// [default: auto, as its chat template shows]
    #[arg(long, value_name = "FORMAT", env = "BATON_REASONING_PARSER", value_parser = by_name::<router::ReasoningParser>)]
    pub(crate) reasoning_parser: Option<router::ReasoningParser>,
    /// How hidden states make an embedding: auto, none, last or mean
    /// [default: auto, as the model's files say]
    #[arg(long, value_name = "POOLING", env = "BATON_EMBEDDING_POOLING", value_parser = by_name::<router::EmbeddingPooling>)]
    pub(crate) embedding_pooling: Option<router::EmbeddingPooling>,
}

/// Where processes find each other.
#[derive(Debug, Args)]
pub(crate) struct Membership {
    /// etcd endpoints, comma separated, such as http://127.0.0.1:2379
    #[arg(long, value_name = "URL", env = "BATON_ETCD", hide_env_values = true, value_delimiter = ',')]
    pub(crate) etcd: Vec<String>,
    /// Name of the cluster: several can share one etcd
    #[arg(long, value_name = "NAME", env = "BATON_CLUSTER", default_value = "baton", value_parser = name)]
    pub(crate) cluster: String,
    /// Name of this member, unique in the cluster [default: drawn at random]
    #[arg(long, value_name = "NAME", env = "BATON_NAME", value_parser = name)]
    pub(crate) name: Option<String>,
    /// Host that others use to reach this process [default: the address it listens on]
    #[arg(long, value_name = "HOST", env = "BATON_ADVERTISE", value_parser = host)]
    pub(crate) advertise: Option<String>,
}

/// Who may ask, and over what.
#[derive(Debug, Args)]
pub(crate) struct Door {
    /// Key that requests must show (`Authorization: Bearer KEY`); repeatable [default: nobody is asked for one]
    #[arg(long = "api-key", value_name = "KEY", env = "BATON_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub(crate) api_keys: Vec<String>,
    /// TOML file with hashes of keys and their limits; read again when it changes
    #[arg(long, value_name = "FILE", env = "BATON_API_KEY_FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Certificate in PEM, with what signed it; read again when it changes [default: clear text]
    #[arg(long, value_name = "FILE", env = "BATON_TLS_CERT", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate, in PEM
    #[arg(long, value_name = "FILE", env = "BATON_TLS_KEY", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Origin whose pages may ask from a browser, such as https://chat.example.com, or * for any; repeatable [default: none]
    #[arg(long = "cors-origin", value_name = "ORIGIN", env = "BATON_CORS_ORIGIN", value_delimiter = ',')]
    pub(crate) cors_origins: Vec<String>,
}

/// Settings of `baton up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Address of the OpenAI endpoint
    #[arg(long, value_name = "ADDR", env = "BATON_LISTEN", default_value = "127.0.0.1:8000", value_parser = units::address)]
    pub(crate) listen: SocketAddr,
    /// Prefill workers to run; with 0, decode workers compute all prompts themselves
    #[arg(long, value_name = "N", env = "BATON_PREFILL", default_value = "1", value_parser = whole::<usize>)]
    pub(crate) prefill: usize,
    /// Decode workers to run
    #[arg(long, value_name = "N", env = "BATON_DECODE", default_value = "1", value_parser = at_least_one::<usize>)]
    pub(crate) decode: usize,
    #[command(flatten)]
    pub(crate) door: Door,
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) adapters: Adapters,
    #[command(flatten)]
    pub(crate) runtime: RuntimeLora,
    #[command(flatten)]
    pub(crate) dialect: Dialect,
    #[command(flatten)]
    pub(crate) speculation: Speculation,
    /// Where prompts are computed
    #[arg(long, value_name = "WHERE", env = "BATON_PLACEMENT", default_value = "auto")]
    pub(crate) placement: Placement,
}

/// Settings of `baton router`.
#[derive(Debug, Args)]
pub(crate) struct Router {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Address of the OpenAI endpoint
    #[arg(long, value_name = "ADDR", env = "BATON_LISTEN", default_value = "127.0.0.1:8000", value_parser = units::address)]
    pub(crate) listen: SocketAddr,
    #[command(flatten)]
    pub(crate) door: Door,
    #[command(flatten)]
    pub(crate) membership: Membership,
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    #[command(flatten)]
    pub(crate) runtime: RuntimeLora,
    #[command(flatten)]
    pub(crate) dialect: Dialect,
    /// Where prompts are computed
    #[arg(long, value_name = "WHERE", env = "BATON_PLACEMENT", default_value = "auto")]
    pub(crate) placement: Placement,
}

/// Settings of `baton prefill-worker` and `baton decode-worker`.
#[derive(Debug, Args)]
pub(crate) struct Worker {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Address for routers (gRPC); port 0 takes a free one
    #[arg(long, value_name = "ADDR", env = "BATON_LISTEN", default_value = "127.0.0.1:0", value_parser = units::address)]
    pub(crate) listen: SocketAddr,
    /// Address for hand-offs between workers [default: the host of --listen, a free port]
    #[arg(long, value_name = "ADDR", env = "BATON_LINK_LISTEN", value_parser = units::address)]
    pub(crate) link_listen: Option<SocketAddr>,
    /// Address of /metrics, /livez and /readyz
    #[arg(long, value_name = "ADDR", env = "BATON_ADMIN_LISTEN", default_value = "127.0.0.1:0", value_parser = units::address)]
    pub(crate) admin_listen: SocketAddr,
    #[command(flatten)]
    pub(crate) membership: Membership,
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) adapters: Adapters,
    /// Longest sequence, prompt and output, in tokens [default: the checkpoint's]
    #[arg(long, value_name = "TOKENS", env = "BATON_MAX_MODEL_LEN", value_parser = at_least_one::<u32>)]
    pub(crate) max_model_len: Option<u32>,
    /// Most tokens computed in one step
    #[arg(long, value_name = "TOKENS", env = "BATON_TOKEN_BUDGET", value_parser = at_least_one::<u32>)]
    pub(crate) token_budget: Option<u32>,
    /// Most sequences in one step
    #[arg(long, value_name = "N", env = "BATON_MAX_SEQUENCES", value_parser = at_least_one::<u32>)]
    pub(crate) max_sequences: Option<u32>,
    /// How long running requests may take to finish once the worker is told to stop
    #[arg(long, value_name = "TIME", env = "BATON_DRAIN_TIMEOUT", default_value = "30s", value_parser = units::duration)]
    pub(crate) drain_timeout: Duration,
    /// File with the token that all workers share; whoever has another gets no hand-off [default: anybody does]
    #[arg(long, value_name = "FILE", env = "BATON_CLUSTER_TOKEN_FILE")]
    pub(crate) cluster_token_file: Option<PathBuf>,
    /// Refuse hand-offs over any other transport than this [default: the best both ends have]
    #[arg(long, value_name = "KIND", env = "BATON_TRANSPORT")]
    pub(crate) transport: Option<Transport>,
    #[command(flatten)]
    pub(crate) ucx: Ucx,
    #[command(flatten)]
    pub(crate) http: Http,
}

/// The OpenAI endpoint of one worker, for a proxy that is none of ours.
#[derive(Debug, Args)]
pub(crate) struct Http {
    /// Serve the OpenAI API of this worker alone, for somebody else's proxy (`kv_transfer_params`): no etcd, no cluster
    #[arg(long, value_name = "ADDR", env = "BATON_HTTP", value_parser = units::address, conflicts_with = "etcd")]
    pub(crate) http: Option<SocketAddr>,
    /// Worker that pages may be fetched from when a proxy says so: HOST or HOST:PORT; repeatable [default: none]
    #[arg(long = "kv-peer", value_name = "PEER", env = "BATON_KV_PEER", value_delimiter = ',', requires = "http")]
    pub(crate) kv_peers: Vec<router::KvPeer>,
    /// What becomes of a request whose pages cannot be fetched
    #[arg(long, value_name = "POLICY", env = "BATON_KV_LOAD_FAILURE", default_value = "recompute")]
    pub(crate) kv_load_failure: KvLoadFailure,
    /// How long the pages of a prompt are kept for whoever a proxy sends for them
    #[arg(long, value_name = "TIME", env = "BATON_KV_LEASE", default_value = "30s", value_parser = units::duration)]
    pub(crate) kv_lease: Duration,
    #[command(flatten)]
    pub(crate) door: Door,
    #[command(flatten)]
    pub(crate) dialect: Dialect,
}

/// What becomes of a request whose pages cannot be fetched. The names are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvLoadFailure {
    /// Its prompt is computed here
    Recompute,
    /// It is refused, with 503
    Fail,
}

/// Settings of `baton decode-worker` alone.
#[derive(Debug, Args)]
pub(crate) struct DecodeWorker {
    #[command(flatten)]
    pub(crate) worker: Worker,
    #[command(flatten)]
    pub(crate) speculation: Speculation,
}

/// Settings of `baton chat`.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    /// Endpoint to talk to
    #[arg(long, value_name = "URL", env = "BATON_URL", default_value = "http://127.0.0.1:8000", value_parser = url)]
    pub(crate) url: String,
    /// Model to ask for [default: the first that the endpoint lists]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Sampling temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value = "0", value_parser = temperature)]
    pub(crate) temperature: f32,
    /// Longest answer, in tokens [default: what the context leaves]
    #[arg(long, value_name = "N", value_parser = at_least_one::<u32>)]
    pub(crate) max_tokens: Option<u32>,
}

/// Settings of `baton doctor`.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Measure the ways to the doctor at this address instead of those within this host
    #[arg(long, value_name = "ADDR", conflicts_with = "listen")]
    pub(crate) peer: Option<String>,
    /// Be the other end for a doctor on another host, until stopped
    #[arg(long, value_name = "ADDR", value_parser = units::address)]
    pub(crate) listen: Option<SocketAddr>,
    /// Fail when this transport cannot be used; with --listen, offer it alone
    #[arg(long, value_name = "KIND", env = "BATON_TRANSPORT")]
    pub(crate) transport: Option<Transport>,
    /// Memory for KV pages that a worker here is to have, and to register
    #[arg(long, value_name = "SIZE", env = "BATON_KV_MEMORY")]
    pub(crate) kv_memory: Option<Bytes>,
    /// A worker's TOML file: what it says of hand-offs, TLS among it, holds here
    #[arg(long, value_name = "FILE", env = "BATON_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// File with the secret of the cluster
    #[arg(long, value_name = "FILE", env = "BATON_CLUSTER_TOKEN_FILE")]
    pub(crate) cluster_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ucx: Ucx,
    #[command(flatten)]
    pub(crate) card_libraries: CardLibraries,
    /// Tell everything as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How UCX is found and what it may use.
#[derive(Debug, Args)]
pub(crate) struct Ucx {
    /// UCX's libucp.so.0 [default: where the system looks]
    #[arg(long, value_name = "PATH", env = "BATON_UCX_LIBRARY")]
    pub(crate) ucx_library: Option<PathBuf>,
    /// Transports that UCX may use, as its UCX_TLS [default: all it finds]
    #[arg(long, value_name = "LIST", env = "BATON_UCX_TLS")]
    pub(crate) ucx_tls: Option<String>,
}

/// Shape of log lines.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Where prompts are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Placement {
    /// By predicted cost
    Auto,
    /// Always on a prefill worker
    Remote,
    /// Always on the decode worker itself
    Local,
}

impl Placement {
    pub(crate) fn policy(self) -> router::Policy {
        match self {
            Self::Auto => router::Policy::Auto,
            Self::Remote => router::Policy::Remote,
            Self::Local => router::Policy::Local,
        }
    }
}

/// A transport of hand-offs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Transport {
    /// Within one process
    Memory,
    /// Between processes of one host, from card to card
    Cuda,
    /// Between processes of one host, through shared memory
    Shm,
    /// By RDMA and whatever else UCX finds
    Ucx,
    /// Between any two processes
    Tcp,
}

impl From<Transport> for kv_transfer::TransportKind {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Memory => Self::Memory,
            Transport::Cuda => Self::Cuda,
            Transport::Shm => Self::Shm,
            Transport::Ucx => Self::Ucx,
            Transport::Tcp => Self::Tcp,
        }
    }
}

/// What a process was told, parsed and checked field by field.
#[derive(Debug)]
pub(crate) struct Settings {
    /// What to run, with its flags.
    pub(crate) command: Command,
    /// Library settings of the file.
    pub(crate) tables: Tables,
    shown: Vec<Shown>,
}

/// One setting as the log shows it.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    /// The flag's name.
    name: String,
    /// The value as given, secrets hidden.
    value: String,
    /// Where it came from: `default`, `file`, `environment` or `flag`.
    source: &'static str,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A flag or variable is wrong, or help was asked for.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file is wrong.
    #[error(transparent)]
    File(#[from] file::Error),
}

impl Settings {
    /// Reads flags, environment and the file they name.
    ///
    /// # Errors
    /// Names the field, the value and what would be right; for the file, the file too.
    pub(crate) fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let args: Vec<OsString> = args.into_iter().collect();
        let mut parser = Cli::command();
        let first = Cli::from_arg_matches(&parser.clone().try_get_matches_from(&args)?)?.into_command();
        let mut tables = Tables::default();
        let mut in_file = Vec::new();
        if let Some(path) = first.config() {
            let file = file::File::read(path)?;
            let (layered, names) = file.apply(parser, first.name())?;
            parser = layered;
            in_file = names;
            tables = file.into_tables(first.tables(), first.name())?;
        }
        let matches = parser.clone().try_get_matches_from(&args)?;
        let command = Cli::from_arg_matches(&matches)?.into_command();
        let shown = match matches.subcommand() {
            Some((name, matches)) => parser.find_subcommand(name).map(|parser| shown(parser, matches, &in_file)),
            None => Some(shown(&parser, &matches, &in_file)),
        };
        Ok(Self { command, tables, shown: shown.unwrap_or_default() })
    }

    /// Logs every setting and who set it: what was chosen at info, defaults at debug.
    pub(crate) fn log(&self) {
        for Shown { name, value, source } in &self.shown {
            match *source {
                "default" => tracing::debug!(%name, %value, source, "setting"),
                _ => tracing::info!(%name, %value, source, "setting"),
            }
        }
        for (name, value) in self.tables.shown() {
            tracing::info!(%name, %value, source = "file", "setting");
        }
    }
}

impl Cli {
    fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Up(self.up))
    }
}

impl Command {
    /// Returns the subcommand's name.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Up(_) => "up",
            Self::Router(_) => "router",
            Self::PrefillWorker(_) => "prefill-worker",
            Self::DecodeWorker(_) => "decode-worker",
            Self::Chat(_) => "chat",
            Self::Doctor(_) => "doctor",
            Self::Bench(_) => "bench",
            Self::Simulate(_) => "simulate",
        }
    }

    /// Returns what server processes share; `None` for clients.
    pub(crate) fn common(&self) -> Option<&Common> {
        match self {
            Self::Up(up) => Some(&up.common),
            Self::Router(router) => Some(&router.common),
            Self::PrefillWorker(worker) => Some(&worker.common),
            Self::DecodeWorker(decode) => Some(&decode.worker.common),
            Self::Chat(_) | Self::Doctor(_) | Self::Bench(_) | Self::Simulate(_) => None,
        }
    }

    fn config(&self) -> Option<&PathBuf> {
        match self {
            Self::Doctor(doctor) => doctor.config.as_ref(),
            _ => self.common().and_then(|common| common.config.as_ref()),
        }
    }

    /// Names the library tables that the file may hold.
    fn tables(&self) -> &'static [&'static str] {
        match self {
            Self::Up(_) | Self::Doctor(_) => &["router", "prefill-worker", "decode-worker", "engine"],
            Self::Router(_) => &["router"],
            Self::PrefillWorker(_) => &["prefill-worker", "engine", "router"],
            Self::DecodeWorker(_) => &["decode-worker", "engine", "router"],
            Self::Chat(_) | Self::Bench(_) | Self::Simulate(_) => &[],
        }
    }
}

/// Lists the settings of one command as the log shows them.
fn shown(parser: &clap::Command, matches: &clap::ArgMatches, in_file: &[String]) -> Vec<Shown> {
    let describe = |arg: &clap::Arg| {
        let name = arg.get_long()?;
        let value: Vec<_> = matches.get_raw(arg.get_id().as_str())?.map(|value| value.to_string_lossy()).collect();
        let source = match matches.value_source(arg.get_id().as_str())? {
            ValueSource::CommandLine => "flag",
            ValueSource::EnvVariable => "environment",
            _ if in_file.iter().any(|known| known == name) => "file",
            _ => "default",
        };
        Some(Shown { name: name.to_owned(), value: hide_secrets(name, &value.join(",")), source })
    };
    parser.get_arguments().filter_map(describe).collect()
}

/// Replaces API keys, and the user part of URLs (`http://user:password@host`).
fn hide_secrets(name: &str, text: &str) -> String {
    if name == "api-key" && !text.is_empty() {
        return "***".into();
    }
    let hide = |url: &str| match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://***@{host}"),
            None => url.to_owned(),
        },
        None => url.to_owned(),
    };
    text.split(',').map(hide).collect::<Vec<_>>().join(",")
}

fn whole<N: std::str::FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "expected a whole number".into())
}

fn at_least_one<N: std::str::FromStr + PartialOrd + From<u8>>(text: &str) -> Result<N, String> {
    let number = whole(text).ok().filter(|number| *number >= N::from(1));
    number.ok_or_else(|| "expected a whole number, at least 1".into())
}

/// Reads one of a closed set by the name it has in the library's configuration.
fn by_name<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|problem| problem.to_string())
}

fn share(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| "expected a number above 0 and up to 1, such as 0.9".into())
}

fn temperature(text: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok().filter(|value| (0.0..=2.0).contains(value));
    value.ok_or_else(|| "expected a number from 0 to 2".into())
}

fn url(text: &str) -> Result<String, String> {
    let plain = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match plain {
        Some(rest) if !rest.is_empty() && !rest.starts_with('/') => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err("expected a URL such as http://127.0.0.1:4317".into()),
    }
}

/// Reads a name that can stand in a directory key and a metric label.
fn name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if !text.is_empty() && text.len() <= 128 && text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("expected 1 to 128 letters, digits, '-', '_', '.' or ':'".into())
    }
}

/// Reads a name and where its adapter lies.
fn adapter(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => Ok((name.to_owned(), dir.into())),
        _ => Err("expected NAME=DIR".into()),
    }
}

fn host(text: &str) -> Result<String, String> {
    let name = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    let v6 = text.trim_matches(['[', ']']).parse::<std::net::Ipv6Addr>();
    match (name, v6) {
        (true, _) => Ok(text.to_owned()),
        (_, Ok(v6)) => Ok(format!("[{v6}]")),
        _ => Err("expected a host name or IP address without a port, such as 10.0.0.7".into()),
    }
}

#[cfg(test)]
mod tests;
