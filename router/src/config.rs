//! Settings of the router.

use crate::server::TlsFiles;
use placement::{Policy, Weights};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// Settings of the router. Milliseconds where a name ends in `_ms`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Member id in the directory; unset = drawn at random.
    pub name: Option<String>,
    /// GGUF file, or HF directory of the model: `config.json`, `tokenizer.json`, `tokenizer_config.json`,
    /// `generation_config.json` and, where the template is not in the tokenizer's config, `chat_template.jinja`. Weights are
    /// not read.
    pub model_dir: PathBuf,
    /// Name clients ask for. Workers that serve another name are ignored.
    pub model_name: String,
    /// Other names that mean the same model.
    pub aliases: Vec<String>,
    /// Lets clients load and unload adapters (`/v1/load_lora_adapter`). Off, because a client then names paths on the workers'
    /// machines.
    pub runtime_lora: bool,
    /// Lets clients have all workers forget their prefix caches (`/reset_prefix_cache`). Off, because it costs everybody else.
    pub cache_reset: bool,
    /// `host:port` the directory is told; unset = the listener's address.
    pub advertise: Option<String>,
    /// Keys of which a request must show one, as they are. With neither this nor a file, nobody is asked for a key.
    /// Not a key of files that may be shown.
    #[serde(skip)]
    pub api_keys: Vec<String>,
    /// TOML file with hashes of keys and what each may use; read again when it changes.
    pub api_key_file: Option<PathBuf>,
    /// Certificate and key; unset = clear text.
    pub tls: Option<TlsFiles>,
    /// Origins whose pages may ask from a browser, such as `https://chat.example.com`; `*` alone means any.
    pub cors_origins: Vec<String>,
    /// Where prompts are computed.
    pub placement: Policy,
    /// How candidates are compared.
    pub weights: Weights,
    /// How much is accepted and how long anything may take.
    pub limits: Limits,
    /// Bytes the prefix index may use. When it is full, what was neither stored nor matched longest is forgotten first;
    /// forgetting costs a worse placement, never a wrong one.
    pub prefix_index_bytes: usize,
    /// Bytes that remembered tokens and page names of prompts may use. When it is full, what was neither made nor found longest is
    /// forgotten first; forgetting costs time.
    pub text_cache_bytes: usize,
    /// Bytes that records of where requests went, and why, may use (`/v1/requests/{id}/why`); the oldest are forgotten first. 0 = none are kept.
    pub why_bytes: usize,
    /// Threads that render templates and tokenise; 0 = half of the cores.
    pub text_threads: usize,
    /// How calls of tools are read from what the model says.
    pub tool_call_parser: ToolCallParser,
    /// How its reasoning is told from its answer.
    pub reasoning_parser: ReasoningParser,
    /// How hidden states make an embedding.
    pub embedding_pooling: EmbeddingPooling,
    /// Makes this the door of one worker, which may be driven by somebody else's proxy; unset = a cluster's router.
    #[serde(skip)]
    pub kv_transfer: Option<KvTransfer>,
}

/// What `kv_transfer_params` may ask of the worker behind this door.
#[derive(Clone, Debug, PartialEq)]
pub struct KvTransfer {
    /// Who pages may be fetched from.
    pub peers: Vec<KvPeer>,
    /// Whether a request whose pages cannot be fetched is refused; otherwise they are computed.
    pub required: bool,
    /// How long a prompt's pages are kept for whoever was told of them.
    pub lease: Duration,
    /// Whether this is a prefill worker's door.
    pub first_token_only: bool,
}

/// A host that pages may be fetched from, and the port if only one will do. Nothing is resolved: the host is compared as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvPeer {
    host: String,
    port: Option<u16>,
}

impl KvPeer {
    /// Says whether pages may be fetched from there.
    pub(crate) fn allows(&self, host: &str, port: u16) -> bool {
        self.host.eq_ignore_ascii_case(host) && self.port.is_none_or(|own| own == port)
    }
}

impl std::str::FromStr for KvPeer {
    type Err = String;

    /// Reads `host`, `host:port`, `[v6]` or `[v6]:port`.
    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let (host, port) = match text.rsplit_once(':') {
            Some((host, digits)) if !digits.ends_with(']') && (!host.contains(':') || host.ends_with(']')) => {
                (host, Some(port(digits).ok_or("expected a port from 1 to 65535 behind the colon")?))
            }
            _ => (text, None),
        };
        let v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let named = !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !named && v6.is_none_or(|host| host.parse::<std::net::Ipv6Addr>().is_err()) {
            return Err("expected HOST or HOST:PORT, such as 10.0.0.7 or 10.0.0.7:7001".into());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: None,
            model_dir: PathBuf::new(),
            model_name: String::new(),
            aliases: Vec::new(),
            runtime_lora: false,
            cache_reset: false,
            advertise: None,
            api_keys: Vec::new(),
            api_key_file: None,
            tls: None,
            cors_origins: Vec::new(),
            placement: Policy::Auto,
            weights: Weights::default(),
            limits: Limits::default(),
            prefix_index_bytes: 64 << 20,
            text_cache_bytes: 32 << 20,
            why_bytes: 4 << 20,
            text_threads: 0,
            tool_call_parser: ToolCallParser::Auto,
            reasoning_parser: ReasoningParser::Auto,
            embedding_pooling: EmbeddingPooling::Auto,
            kv_transfer: None,
        }
    }
}

/// How a model writes calls of tools. The names are vLLM's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolCallParser {
    /// As its chat template shows.
    #[default]
    Auto,
    /// Calls are not read; tools with `tool_choice: auto` are refused.
    None,
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen 2.5 and 3.
    Hermes,
    /// `{"name": …, "parameters": …}`: Llama 3.1 and 3.2.
    Llama3Json,
    /// `[TOOL_CALLS]`: Mistral.
    Mistral,
    /// `[f(a=1)]`: Llama 3.2 and 4.
    #[serde(alias = "llama4_pythonic")]
    Pythonic,
    /// `<function=f><parameter=a>1</parameter></function>`: Qwen3-Coder.
    #[serde(alias = "qwen3_coder")]
    Qwen3Xml,
    /// `<|START_ACTION|>[…]<|END_ACTION|>`: Command R and A.
    #[serde(alias = "cohere_command")]
    Cohere,
}

/// How a model marks its reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningParser {
    /// As its chat template shows.
    #[default]
    Auto,
    /// It does not; everything is the answer.
    None,
    /// It begins with reasoning, up to `</think>`: DeepSeek-R1 and models distilled from it.
    DeepseekR1,
    /// `<think>` and `</think>`, or none: Qwen3.
    Qwen3,
    /// `[THINK]` and `[/THINK]`: Magistral.
    Mistral,
    /// `<|START_THINKING|>` and `<|END_THINKING|>`: Command A.
    Cohere,
}

/// How the hidden states of a prompt's tokens make an embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmbeddingPooling {
    /// As the model's files say (`modules.json`, or `pooling_type` of a GGUF file); where they say nothing, not at all.
    #[default]
    Auto,
    /// Not at all: embeddings are refused.
    None,
    /// The last token's.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// How much is accepted and how long anything may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Choices generated at once; a request with `n` choices takes `n`.
    pub max_concurrent: usize,
    /// Requests that may wait for their turn; beyond, 429 at once.
    pub max_queued: usize,
    /// Longest wait for a turn; then 503.
    pub queue_timeout_ms: u64,
    /// Milliseconds of prompts that each worker is given ahead; what is more waits at the router. Long enough for a worker to report and
    /// the router to answer, short enough that order can still be decided.
    pub worker_backlog_ms: u64,
    /// Time to the first token that a request wants which does not say so itself (`x-baton-ttft-ms`); what cannot come in time is refused.
    /// 0 = any time will do.
    pub ttft_objective_ms: u64,
    /// Longest wait for a path (a prefill and a decode worker) to take a request whose workers died.
    pub recovery_timeout_ms: u64,
    /// Longest wait for all workers to load or unload an adapter: a large one on a slow disk.
    pub adapter_timeout_ms: u64,
    /// Longest wait for the first token of an attempt.
    pub first_token_timeout_ms: u64,
    /// Longest silence between two tokens of a choice.
    pub stall_timeout_ms: u64,
    /// Longest life of a request.
    pub request_timeout_ms: u64,
    /// Times a choice may be placed, the first included.
    pub max_attempts: u32,
    /// Most choices of one request: prompts times `n`.
    pub max_choices: u32,
    /// Connections at once; more wait unaccepted.
    pub max_connections: usize,
    /// Largest head of a request in bytes; at least 8,192.
    pub max_header_bytes: usize,
    /// Longest wait for the head of a request, and for a TLS handshake. A connection without a request ends after it, too.
    pub header_timeout_ms: u64,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Responses of `/v1/responses` that are kept to be asked for again; the oldest are forgotten first.
    pub stored_responses: usize,
    /// Bytes they may take, with the conversations up to them.
    pub stored_response_bytes: usize,
    /// Longest wait for a whole body.
    pub body_timeout_ms: u64,
    /// Longest wait for a client to take in anything of what is written to it.
    pub write_timeout_ms: u64,
    /// Most alternatives `top_logprobs` may ask for.
    pub max_logprobs: u32,
    /// Tokens a client may be behind before its request is ended: the answer to a client that does not read.
    pub stream_buffer_tokens: usize,
    /// Longest wait at shutdown for streams to finish.
    pub drain_timeout_ms: u64,
    /// Longest wait for a worker to accept a connection and to say welcome.
    pub connect_timeout_ms: u64,
    /// Interval of pings to each worker.
    pub probe_interval_ms: u64,
    /// Silence after which an attached worker counts as gone.
    pub probe_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_concurrent: 4_096,
            max_queued: 1_024,
            queue_timeout_ms: 10_000,
            worker_backlog_ms: 500,
            ttft_objective_ms: 0,
            recovery_timeout_ms: 5_000,
            adapter_timeout_ms: 60_000,
            first_token_timeout_ms: 120_000,
            stall_timeout_ms: 30_000,
            request_timeout_ms: 600_000,
            max_attempts: 4,
            max_choices: 1_024,
            max_connections: 32_768,
            max_header_bytes: 64 << 10,
            header_timeout_ms: 75_000,
            max_body_bytes: 32 << 20,
            stored_responses: 4_096,
            stored_response_bytes: 32 << 20,
            body_timeout_ms: 60_000,
            write_timeout_ms: 60_000,
            max_logprobs: 20,
            stream_buffer_tokens: 4_096,
            drain_timeout_ms: 30_000,
            connect_timeout_ms: 2_000,
            probe_interval_ms: 500,
            probe_timeout_ms: 2_000,
        }
    }
}

impl Limits {
    pub(crate) fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }

    pub(crate) fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }

    pub(crate) fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }

    pub(crate) fn queue_timeout(&self) -> Duration {
        Duration::from_millis(self.queue_timeout_ms)
    }

    /// Time to the first token that is wanted where a request does not say.
    pub(crate) fn ttft_objective(&self) -> Option<Duration> {
        (self.ttft_objective_ms > 0).then(|| Duration::from_millis(self.ttft_objective_ms))
    }

    pub(crate) fn recovery_timeout(&self) -> Duration {
        Duration::from_millis(self.recovery_timeout_ms)
    }

    pub(crate) fn adapter_timeout(&self) -> Duration {
        Duration::from_millis(self.adapter_timeout_ms)
    }

    pub(crate) fn first_token_timeout(&self) -> Duration {
        Duration::from_millis(self.first_token_timeout_ms)
    }

    pub(crate) fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(crate) fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.drain_timeout_ms)
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn probe_interval(&self) -> Duration {
        Duration::from_millis(self.probe_interval_ms)
    }

    pub(crate) fn probe_timeout(&self) -> Duration {
        Duration::from_millis(self.probe_timeout_ms)
    }
}

impl Config {
    /// Returns all names of the base model, the first one first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.model_name).chain(&self.aliases)
    }

    /// Checks what types cannot. The error names the field.
    pub fn validate(&self) -> Result<(), String> {
        let at_least_one =
            |field: &str, value: u64| if value > 0 { Ok(()) } else { Err(format!("{field}: must be at least 1")) };
        if self.model_name.is_empty() {
            return Err("model_name: must not be empty".into());
        }
        self.weights.validate()?;
        let l = &self.limits;
        for (field, value) in [
            ("limits.max_concurrent", l.max_concurrent as u64),
            ("limits.request_timeout_ms", l.request_timeout_ms),
            ("limits.first_token_timeout_ms", l.first_token_timeout_ms),
            ("limits.adapter_timeout_ms", l.adapter_timeout_ms),
            ("limits.stall_timeout_ms", l.stall_timeout_ms),
            ("limits.worker_backlog_ms", l.worker_backlog_ms),
            ("limits.max_attempts", u64::from(l.max_attempts)),
            ("limits.max_choices", u64::from(l.max_choices)),
            ("limits.max_connections", l.max_connections as u64),
            ("limits.header_timeout_ms", l.header_timeout_ms),
            ("limits.max_body_bytes", l.max_body_bytes as u64),
            ("limits.body_timeout_ms", l.body_timeout_ms),
            ("limits.write_timeout_ms", l.write_timeout_ms),
            ("limits.stream_buffer_tokens", l.stream_buffer_tokens as u64),
            ("limits.connect_timeout_ms", l.connect_timeout_ms),
            ("limits.probe_interval_ms", l.probe_interval_ms),
        ] {
            at_least_one(field, value)?;
        }
        if !(8_192..=1 << 30).contains(&l.max_header_bytes) {
            return Err(format!("limits.max_header_bytes: {} is not between 8192 and {}", l.max_header_bytes, 1 << 30));
        }
        if let Some(bad) = self.cors_origins.iter().find(|origin| !is_origin(origin, self.cors_origins.len())) {
            return Err(format!("cors_origins: {bad:?} is no origin such as https://chat.example.com; * stands alone"));
        }
        if l.probe_timeout_ms <= l.probe_interval_ms {
            return Err(format!(
                "limits.probe_timeout_ms: {} must be longer than limits.probe_interval_ms ({})",
                l.probe_timeout_ms, l.probe_interval_ms
            ));
        }
        Ok(())
    }
}

/// An origin is a scheme and a host, perhaps with a port.
fn is_origin(text: &str, of: usize) -> bool {
    let host = text.split_once("://").map(|(_, host)| host);
    (text == "*" && of == 1)
        || host
            .is_some_and(|host| !host.is_empty() && !host.contains('/') && text.bytes().all(|b| b.is_ascii_graphic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_hosts_with_or_without_a_port() {
        let check = |peer: &str, host: &str, port: u16, expected: bool| {
            let read: KvPeer = peer.parse().unwrap_or_else(|problem| panic!("{peer}: {problem}"));
            assert_eq!(read.allows(host, port), expected, "{peer} and {host}:{port}");
        };
        check("10.0.0.7", "10.0.0.7", 7001, true);
        check("10.0.0.7", "10.0.0.8", 7001, false);
        check("10.0.0.7:7001", "10.0.0.7", 7001, true);
        check("10.0.0.7:7001", "10.0.0.7", 7002, false);
        check("Worker-3.prefill", "worker-3.prefill", 1, true);
        check("[fd00::3]", "[fd00::3]", 1, true);
        check("[fd00::3]:7001", "[fd00::3]", 7002, false);
        for wrong in ["", ":7001", "host:", "host:0", "host:70000", "fd00::3", "[fd00::3", "http://host", "a b"] {
            assert!(wrong.parse::<KvPeer>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn defaults_are_valid_and_errors_name_the_field() {
        let good = Config { model_name: "demo".into(), ..Config::default() };
        assert_eq!(good.validate(), Ok(()));
        let mut bad = good.clone();
        bad.weights.prior_link_bytes_per_s = 0.0;
        assert!(bad.validate().unwrap_err().contains("weights.prior_link_bytes_per_s"));
        let mut bad = good.clone();
        bad.limits.probe_timeout_ms = 10;
        assert!(bad.validate().unwrap_err().contains("limits.probe_timeout_ms"));
        let mut bad = good.clone();
        for origins in [vec!["example.com"], vec!["https://a/b"], vec!["*", "https://a"]] {
            bad.cors_origins = origins.into_iter().map(String::from).collect();
            assert!(bad.validate().unwrap_err().contains("cors_origins"));
        }
        assert!(Config::default().validate().unwrap_err().contains("model_name"));
    }
}
