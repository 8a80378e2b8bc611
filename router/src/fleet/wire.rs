//! Wire ⇄ domain, field by field.

use super::leg::{End, Ended, LegRole, Logprobs, Submission, Token};
use crate::cost::Speed;
use kv_cache::PageHash;
use proto::ended::Reason;
use std::time::Duration;

/// A worker's load report.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Report {
    pub(super) running: u32,
    /// Running and waiting.
    pub(super) sequences: u32,
    pub(super) queued_tokens: u64,
    pub(super) free_pages: Option<u32>,
    pub(super) draining: bool,
    pub(super) speed: Speed,
}

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
    };
    let bias = from.sampling.logit_bias.iter().map(|&(token, bias)| proto::LogitBias { token, bias });
    proto::Submit {
        attempt: from.attempt,
        request: from.request.to_string(),
        traceparent: from.traceparent.to_string(),
        tokens: from.tokens,
        prompt_tokens: from.prompt_tokens,
        salt: from.salt,
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
            logprobs: from.sampling.logprobs,
        }),
        stop: Some(proto::Stop {
            max_tokens: from.stop.max_tokens,
            min_tokens: from.stop.min_tokens,
            ignore_eos: from.stop.ignore_eos,
            token_ids: from.stop.token_ids.clone(),
        }),
        priority: from.priority,
        // Zero would mean no deadline at all.
        deadline_ms: u32::try_from(from.deadline.as_millis()).unwrap_or(u32::MAX).max(1),
        leg: Some(leg),
    }
}

pub(super) fn token(from: proto::Token) -> Token {
    let logprobs = from.logprobs.map(|l| {
        Box::new(Logprobs { logprob: l.logprob, top: l.top_tokens.into_iter().zip(l.top_logprobs).collect() })
    });
    Token { index: from.index, id: from.token, logprobs }
}

/// Returns the leg's number and how it ended.
pub(super) fn ended(from: proto::Ended) -> (u64, Ended) {
    let end = match from.reason() {
        Reason::Stop => End::Stop(from.stop_token),
        Reason::Length => End::Length,
        Reason::HandedOff => End::HandedOff,
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
        cached_tokens: from.cached_tokens,
        queue: micros(from.queue_us),
        prefill: micros(from.prefill_us),
    };
    (from.attempt, ended)
}

pub(super) fn report(from: &proto::Load) -> Report {
    let known = |value: f32| (value.is_finite() && value > 0.0).then_some(f64::from(value));
    Report {
        running: from.running,
        sequences: from.running + from.waiting,
        queued_tokens: from.waiting_tokens,
        free_pages: Some(from.pages_free),
        draining: from.draining,
        speed: Speed {
            prefill_tokens_per_s: known(from.prefill_tokens_per_s),
            step_ms: known(from.decode_step_ms),
            link_bytes_per_s: known(from.link_bytes_per_s),
        },
    }
}

/// Reads hashes laid end to end; a cut one at the end is dropped.
pub(super) fn page_hashes(bytes: &[u8]) -> impl Iterator<Item = PageHash> + '_ {
    let (hashes, _) = bytes.as_chunks::<16>();
    hashes.iter().map(|hash| PageHash(u128::from_le_bytes(*hash)))
}
