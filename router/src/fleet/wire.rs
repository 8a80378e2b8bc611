//! Wire ⇄ domain, field by field.

use super::{
    adapters::{Adapter, Change, Refusal},
    leg::{Cached, End, Ended, LegRole, Logprobs, Pooling, Submission, Token},
};
use grammar::{Kind, Spec};
use kv_cache::PageHash;
use placement::Report;
use proto::{adapter_answer::Outcome, adapter_command::What, ended::Reason};
use std::{sync::Arc, time::Duration};
use timing::Pace;

pub(super) fn hello(router: &str) -> proto::RouterFrame {
    proto::RouterFrame {
        hello: Some(proto::Hello { protocol: proto::PROTOCOL, router: router.to_string() }),
        resync: true,
        ..proto::RouterFrame::default()
    }
}

pub(super) fn submit(from: Submission) -> proto::Submit {
    let leg = match from.role {
        LegRole::Local => proto::submit::Leg::Local(proto::Local {}),
        LegRole::Prefill { handoff, worker, incarnation, link } => {
            proto::submit::Leg::Prefill(proto::PrefillLeg { handoff, worker, incarnation, link })
        }
        LegRole::Decode { handoff, worker, incarnation } => {
            proto::submit::Leg::Decode(proto::DecodeLeg { handoff, worker, incarnation })
        }
        LegRole::Embed(pooling) => {
            let pooling = match pooling {
                Pooling::Last => proto::embed::Pooling::Last,
                Pooling::Mean => proto::embed::Pooling::Mean,
            };
            proto::submit::Leg::Embed(proto::Embed { pooling: pooling.into() })
        }
    };
    let bias = from.sampling.logit_bias.iter().map(|&(token, bias)| proto::LogitBias { token, bias });
    let words = from.sampling.bad_words.iter().cloned();
    proto::Submit {
        attempt: from.attempt,
        request: from.request.to_string(),
        traceparent: from.traceparent.to_string(),
        tokens: from.tokens,
        prompt_tokens: from.prompt_tokens,
        salt: from.salt,
        adapter: from.adapter.map(|adapter| proto::AdapterRef { name: adapter.name.clone(), id: adapter.id.clone() }),
        sampling: Some(proto::Sampling {
            temperature: from.sampling.temperature,
            top_p: from.sampling.top_p,
            top_k: from.sampling.top_k,
            min_p: from.sampling.min_p,
            seed: from.sampling.seed,
            choice: from.choice,
            repetition_penalty: from.sampling.repetition_penalty,
            frequency_penalty: from.sampling.frequency_penalty,
            presence_penalty: from.sampling.presence_penalty,
            logit_bias: bias.collect(),
            allowed_tokens: from.sampling.allowed_tokens.clone(),
            bad_words: words.map(|tokens| proto::TokenSequence { tokens }).collect(),
            logprobs: from.sampling.logprobs,
        }),
        grammar: from.grammar.as_deref().map(grammar),
        stop: Some(proto::Stop {
            max_tokens: from.stop.max_tokens,
            min_tokens: from.stop.min_tokens,
            ignore_eos: from.stop.ignore_eos,
            token_ids: from.stop.token_ids.clone(),
        }),
        prompt_logprobs: from.prompt_logprobs,
        priority: from.priority,
        // Zero would mean no deadline at all.
        deadline_ms: u32::try_from(from.deadline.as_millis()).unwrap_or(u32::MAX).max(1),
        fetch: from.fetch.map(|fetch| proto::Fetch {
            handoff: fetch.handoff,
            worker: fetch.worker,
            incarnation: fetch.incarnation,
            link: fetch.link,
            pages: fetch.pages,
            required: fetch.required,
        }),
        keep_ms: u32::try_from(from.keep.as_millis()).unwrap_or(u32::MAX),
        leg: Some(leg),
    }
}

pub(super) fn adapters(from: proto::Adapters) -> Vec<Arc<Adapter>> {
    let adapter = |proto::Adapter { name, id, path }| Arc::new(Adapter { name, id, path });
    from.adapters.into_iter().map(adapter).collect()
}

pub(super) fn adapter_command(command: u64, change: &Change) -> proto::AdapterCommand {
    let (name, what) = match change.clone() {
        Change::Load { name, path } => (name, What::Load(path)),
        Change::Unload { name } => (name, What::Unload(true)),
    };
    proto::AdapterCommand { command, name, what: Some(what) }
}

/// Returns the command's number and what the worker made of it.
pub(super) fn adapter_answer(from: proto::AdapterAnswer) -> (u64, Result<(), Refusal>) {
    let outcome = from.outcome();
    let said = match outcome {
        Outcome::Done => Ok(()),
        Outcome::Exists => Err(Refusal::Exists(from.message)),
        Outcome::Unknown => Err(Refusal::Unknown(from.message)),
        Outcome::NotFound => Err(Refusal::NotFound(from.message)),
        Outcome::Unusable | Outcome::Unspecified => Err(Refusal::Unusable(from.message)),
    };
    (from.command, said)
}

fn grammar(from: &Spec) -> proto::Grammar {
    let kind = match from.kind {
        Kind::JsonSchema => proto::grammar::Kind::JsonSchema,
        Kind::Regex => proto::grammar::Kind::Regex,
        Kind::Lark => proto::grammar::Kind::Lark,
        Kind::Choice => proto::grammar::Kind::Choice,
    };
    let thoughts = from.thoughts.clone().map(|thoughts| {
        let grammar::Thoughts { start, end, begun, budget } = thoughts;
        proto::Thoughts { start, end, begun, budget }
    });
    proto::Grammar { kind: kind.into(), text: from.text.clone(), whitespace: from.whitespace.clone(), thoughts }
}

pub(super) fn token(from: proto::Token) -> Token {
    let logprobs = from.logprobs.map(|l| {
        let top = l.top_tokens.into_iter().zip(l.top_logprobs).collect();
        Box::new(Logprobs { logprob: l.logprob, rank: l.rank, top })
    });
    Token { index: from.index, id: from.token, logprobs }
}

/// Returns the leg's number and how it ended.
pub(super) fn ended(from: proto::Ended) -> (u64, Ended) {
    let end = match from.reason() {
        Reason::Stop => End::Stop(from.stop_token),
        Reason::Length => End::Length,
        Reason::HandedOff => End::HandedOff,
        Reason::Embedded => End::Embedded(from.embedding),
        Reason::Refused => End::Refused(from.message),
        Reason::Invalid => End::Invalid(from.message),
        Reason::Failed => End::Failed(from.message),
        // Nobody here asked: a leg is forgotten when it is cancelled.
        Reason::Cancelled => End::Failed("cancelled by the worker".into()),
        Reason::Unspecified => End::Failed(format!("ended for an unknown reason ({})", from.reason)),
    };
    let micros = |us| Duration::from_micros(u64::from(us));
    let ended = Ended {
        end,
        cached: Cached { tokens: from.cached_tokens, fetched: from.fetched_tokens.min(from.cached_tokens) },
        queue: micros(from.queue_us),
        prefill: micros(from.prefill_us),
    };
    (from.attempt, ended)
}

/// Reads a worker's load report; a pace that cannot be reckoned with is none.
pub(super) fn report(from: &proto::Load) -> Report {
    let known = |value: f32| (value.is_finite() && value > 0.0).then_some(f64::from(value));
    let pace = from.pace.map(|pace| Pace {
        step_us: pace.step_us.into(),
        sequence_us: pace.sequence_us.into(),
        context_ns: pace.context_ns.into(),
        token_us: pace.token_us.into(),
        pair_ns: pace.pair_ns.into(),
    });
    Report {
        received: from.received,
        sequences: from.legs,
        backlog_ms: known(from.backlog_ms).unwrap_or(0.0),
        free_pages: from.pages_free,
        total_pages: from.pages_total,
        draining: from.draining,
        pace: pace.filter(Pace::is_valid),
        link_bytes_per_s: known(from.link_bytes_per_s),
    }
}

/// Reads hashes laid end to end; a cut one at the end is dropped.
pub(super) fn page_hashes(bytes: &[u8]) -> impl Iterator<Item = PageHash> + '_ {
    let (hashes, _) = bytes.as_chunks::<16>();
    hashes.iter().map(|hash| PageHash(u128::from_le_bytes(*hash)))
}
