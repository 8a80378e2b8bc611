//! The endpoint under load, and how prompts are put to it.

use super::exchange::{self, Failure};
use crate::settings::{Load, Prompts};
use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, Uri, body::Incoming, header};
use hyper_util::{
    client::{legacy, legacy::connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use std::{fmt, time::Duration};
use tokio::time::timeout;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for the list of models, and for the first short answer, for which a model may have to warm up.
const ASIDE: Duration = Duration::from_secs(60);

/// Takes requests.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// `http://host:port/prefix`
    base: String,
    key: Option<String>,
    model: String,
    form: Form,
    vocabulary: u32,
    /// Longest wait for a whole answer.
    pub(super) timeout: Duration,
    http: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// How prompts are put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Not [`Prompts::Auto`].
    prompts: Prompts,
    /// Whether the endpoint can be told to go on to the length asked for.
    exact_length: bool,
}

impl fmt::Display for Form {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self.prompts {
            Prompts::Auto | Prompts::Tokens => "prompts as token ids",
            Prompts::Text => "prompts as words, about one a token",
            Prompts::Chat => "prompts as chat messages of words, about one a token",
        })?;
        out.write_str(if self.exact_length { "" } else { "; answers end when the model ends them" })
    }
}

impl Endpoint {
    /// Connects, looks up the model and finds a form of prompt that the endpoint takes.
    pub(super) async fn reach(url: &str, load: &Load) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("--url {url:?}"))?;
        if uri.scheme_str() != Some("http") {
            bail!("--url {url:?}: only http:// is spoken here; put a TLS proxy's plain side in its place");
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        let base = url.trim_end_matches('/');
        let mut endpoint = Self {
            base: base.strip_suffix("/v1").unwrap_or(base).to_owned(),
            key: load.api_key.clone(),
            model: load.model.clone().unwrap_or_default(),
            form: Form { prompts: load.prompts, exact_length: true },
            vocabulary: load.vocabulary,
            timeout: load.timeout,
            http: legacy::Client::builder(TokioExecutor::new()).build(connector),
        };
        if load.model.is_none() {
            endpoint.model = endpoint.first_model().await?;
        }
        endpoint.form = endpoint.accepted_form(load.prompts).await?;
        Ok(endpoint)
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    async fn first_model(&self) -> anyhow::Result<String> {
        let unreachable = || format!("ask {} for its models; name one with --model", self.base);
        let response = timeout(ASIDE, self.send(Method::GET, "/v1/models", Bytes::new()));
        let response = response.await.with_context(unreachable)?.with_context(unreachable)?;
        let status = response.status();
        let body = timeout(ASIDE, response.into_body().collect()).await.with_context(unreachable)??.to_bytes();
        if !status.is_success() {
            bail!("{}: {status}: {}", unreachable(), exchange::complaint(&body));
        }
        let models: Value = serde_json::from_slice(&body).with_context(unreachable)?;
        let first = models["data"][0]["id"].as_str();
        first.map(str::to_owned).with_context(|| format!("{} lists no model; name one with --model", self.base))
    }

    /// Tries a short request in each form that `wanted` allows, the best first.
    async fn accepted_form(&self, wanted: Prompts) -> anyhow::Result<Form> {
        let prompts: &[Prompts] = match wanted {
            Prompts::Auto => &[Prompts::Tokens, Prompts::Text, Prompts::Chat],
            Prompts::Tokens => &[Prompts::Tokens],
            Prompts::Text => &[Prompts::Text],
            Prompts::Chat => &[Prompts::Chat],
        };
        let forms =
            prompts.iter().flat_map(|&prompts| [true, false].map(|exact_length| Form { prompts, exact_length }));
        // The largest id tells whether the vocabulary is one of the endpoint's.
        let prompt = [self.vocabulary - 1, 0];
        let mut first_refusal = None;
        for form in forms {
            let tried = timeout(ASIDE, exchange::exchange(self, form.path(), self.body(form, &prompt, 1), || {})).await;
            let failure = match tried.with_context(|| format!("wait for a first answer of {}", self.base))? {
                Ok(_) => return Ok(form),
                Err(failure) => failure,
            };
            // A refusal that another form cannot cure ends it.
            if !matches!(failure, Failure::Status { status: 400 | 404 | 405 | 415 | 422 | 501, .. }) {
                bail!("a first request to {} failed: {failure}", self.base);
            }
            first_refusal.get_or_insert(failure);
        }
        let refusal = first_refusal.context("no form of prompt to try")?;
        bail!("{} takes no prompt (--prompts, --vocabulary): {refusal}", self.base)
    }

    /// Writes a request for an answer of `output_tokens` to `tokens`, and returns its path too.
    pub(super) fn request(&self, tokens: &[u32], output_tokens: usize) -> (&'static str, Bytes) {
        (self.form.path(), self.body(self.form, tokens, output_tokens))
    }

    /// The vocabulary that prompts are made from.
    pub(super) fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    fn body(&self, form: Form, tokens: &[u32], output_tokens: usize) -> Bytes {
        let mut body = json!({
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match form.prompts {
            Prompts::Auto | Prompts::Tokens => body["prompt"] = tokens.into(),
            Prompts::Text => body["prompt"] = words(tokens).into(),
            Prompts::Chat => body["messages"] = json!([{"role": "user", "content": words(tokens)}]),
        }
        if form.exact_length {
            body["ignore_eos"] = true.into();
        }
        body.to_string().into()
    }

    /// Sends a request and waits for the head of its answer, whatever its status.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, legacy::Error> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        // The base has been read as a URI, and paths are ours.
        *request.uri_mut() = format!("{}{path}", self.base).parse().unwrap_or_default();
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if let Some(key) = &self.key
            && let Ok(mut value) = header::HeaderValue::from_str(&format!("Bearer {key}"))
        {
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        self.http.request(request).await
    }
}

impl Form {
    fn path(self) -> &'static str {
        match self.prompts {
            Prompts::Chat => "/v1/chat/completions",
            _ => "/v1/completions",
        }
    }
}

/// Short words that are a token each in the vocabularies of today. Equal tokens are equal words.
fn words(tokens: &[u32]) -> String {
    const WORDS: [&str; 32] = [
        "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
        "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were",
    ];
    let words: Vec<&str> = tokens.iter().map(|&token| WORDS[token as usize % WORDS.len()]).collect();
    words.join(" ")
}
