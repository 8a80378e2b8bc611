//! `kv_transfer_params`: how a proxy that is none of ours has two workers compute one request, as it does with vLLM's.
//!
//! The proxy sends a request to one worker with `do_remote_decode` and one token to generate. That worker keeps the prompt's pages and answers
//! where they are: an object that says `do_remote_prefill`. The proxy puts it into the request as it came and sends that to another worker, which
//! fetches the pages, computes what is missing and goes on. Pages are named by what is in them, so a prompt that reads differently
//! there, by another template say, is computed, and never mixed up.
//!
//! Served only at a worker's own door: a cluster's router moves pages by itself.

use super::{
    fields::{Fields, wrong},
    params::is_request_id,
};
use crate::{
    config::KvTransfer,
    error::Error,
    fleet::{Door, leg::Fetch},
    prompt::Prompt,
    request::Router,
};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{sync::Arc, time::Duration};

const FIELD: &str = "kv_transfer_params";

/// What a proxy asks of this worker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Part {
    /// Compute the prompt, keep its pages this long, and say where they are.
    Prefill(Duration),
    /// Fetch the prompt's pages from there.
    Decode(Remote),
}

/// Where pages are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Remote {
    worker: String,
    incarnation: u64,
    /// `host:port`.
    link: String,
    /// Most tokens in them.
    tokens: u32,
    required: bool,
}

/// Takes the field. A proxy's peers are those that the operator named: no client has this worker connect to anybody else.
pub(super) fn take(fields: &mut Fields, router: &Router) -> Result<Option<Arc<Part>>, Error> {
    let Some(params) = fields.object(FIELD)?.filter(|params| !params.is_empty()) else { return Ok(None) };
    let Some(config) = &router.config.kv_transfer else {
        let problem =
            "is not supported by a cluster's router, which moves pages by itself; workers started with --http serve it";
        return Err(Error::invalid(FIELD, problem));
    };
    let part = match (flag(&params, "do_remote_prefill")?, flag(&params, "do_remote_decode")?) {
        (false, false) => return Ok(None),
        (true, true) => {
            return Err(Error::invalid(FIELD, "do_remote_prefill and do_remote_decode cannot both be true"));
        }
        (false, true) => Part::Prefill(config.lease),
        (true, false) => Part::Decode(Remote::read(&params, config)?),
    };
    Ok(Some(Arc::new(part)))
}

impl Part {
    /// How long the pages of the prompt are kept.
    pub(crate) fn keep(&self) -> Duration {
        match self {
            Self::Prefill(lease) => *lease,
            Self::Decode(_) => Duration::ZERO,
        }
    }

    /// Returns what is to be fetched for a prompt of so many tokens, if any full page of it is elsewhere.
    pub(crate) fn fetch(&self, router: &Router, prompt_tokens: u32) -> Option<Fetch> {
        let Self::Decode(remote) = self else { return None };
        let pages = full_pages(prompt_tokens, router).min(remote.tokens / router.fleet.page_tokens() as u32);
        let Remote { worker, incarnation, link, required, .. } = remote.clone();
        (pages > 0).then(|| Fetch { handoff: rand::random(), worker, incarnation, link, pages, required })
    }

    /// Returns what the answer says of where the prompt's pages are.
    pub(crate) fn told(&self, router: &Router, prompt: &Prompt, request: &str) -> Option<Told> {
        let Self::Prefill(_) = self else { return None };
        let Door { worker, incarnation, link } = router.fleet.door()?;
        let (host, port) = link.rsplit_once(':')?;
        let pages = full_pages(prompt.tokens.len() as u32, router);
        let last = pages.checked_sub(1).and_then(|last| prompt.pages.get(last as usize));
        Some(Told {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_engine_id: format!("{worker}@{incarnation}"),
            remote_block_ids: last.map(|name| format!("{:032x}", name.0)).into_iter().collect(),
            remote_request_id: request.to_owned(),
            remote_host: host.to_owned(),
            remote_port: port.parse().ok()?,
            tp_size: 1,
            dcp_size: 1,
            pp_size: 1,
            remote_num_tokens: pages * router.fleet.page_tokens() as u32,
            transfer_mode: "pull",
        })
    }
}

/// The page of the last token is never had from elsewhere: the next token is drawn from its logits.
fn full_pages(prompt_tokens: u32, router: &Router) -> u32 {
    prompt_tokens.saturating_sub(1) / router.fleet.page_tokens() as u32
}

/// Where the pages of an answer's prompt are.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Told {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    remote_engine_id: String,
    /// The name of the last page, which names all before it.
    remote_block_ids: Vec<String>,
    remote_request_id: String,
    remote_host: String,
    remote_port: u16,
    tp_size: u32,
    dcp_size: u32,
    pp_size: u32,
    remote_num_tokens: u32,
    transfer_mode: &'static str,
}

impl Remote {
    fn read(params: &Map<String, Value>, config: &KvTransfer) -> Result<Self, Error> {
        let engine = text(params, "remote_engine_id")?;
        let (worker, incarnation) = engine
            .rsplit_once('@')
            .and_then(|(worker, life)| Some((worker, life.parse().ok()?)))
            .filter(|(worker, _)| is_request_id(worker))
            .ok_or_else(|| not("remote_engine_id", "what a worker of this kind answered: NAME@NUMBER", params))?;
        let host = text(params, "remote_host")?;
        let port = integer(params, "remote_port")?.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        let port = port.ok_or_else(|| not("remote_port", "a port from 1 to 65535", params))?;
        if !config.peers.iter().any(|peer| peer.allows(host, port)) {
            let problem = format!(
                "{} is not among the peers that this worker was started with (--kv-peer)",
                shown(&format!("{host}:{port}"))
            );
            return Err(Error::invalid(&name("remote_host"), problem));
        }
        let tokens = integer(params, "remote_num_tokens")?.map_or(Ok(u32::MAX), |tokens| {
            u32::try_from(tokens).map_err(|_| not("remote_num_tokens", "a number of tokens", params))
        })?;
        let link = format!("{host}:{port}");
        Ok(Self { worker: worker.to_owned(), incarnation, link, tokens, required: config.required })
    }
}

fn flag(params: &Map<String, Value>, field: &str) -> Result<bool, Error> {
    match params.get(field) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(yes)) => Ok(*yes),
        Some(_) => Err(not(field, "true or false", params)),
    }
}

fn text<'a>(params: &'a Map<String, Value>, field: &str) -> Result<&'a str, Error> {
    params.get(field).and_then(Value::as_str).ok_or_else(|| not(field, "a string", params))
}

fn integer(params: &Map<String, Value>, field: &str) -> Result<Option<i64>, Error> {
    match params.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => super::fields::integer(value).map(Some).ok_or_else(|| not(field, "an integer", params)),
    }
}

fn not(field: &str, expected: &str, params: &Map<String, Value>) -> Error {
    wrong(&name(field), expected, params.get(field).unwrap_or(&Value::Null))
}

fn name(field: &str) -> String {
    format!("{FIELD}.{field}")
}

fn shown(text: &str) -> String {
    super::fields::shown(&text.into())
}
