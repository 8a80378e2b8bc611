//! What a router submits, checked: nothing in a [`Submission`] can hurt a step.

use crate::{End, LegId};
use engine::{
    Adapter, Adapters, Pooling, Sampling, TokenId,
    scheduler::{History, Request, Stop, Until},
};
use grammar::{Kind, Spec, Thoughts};
use kv_cache::{PageHash, root_salt};
use kv_transfer::{Fetch, HandoffId, Peer};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Most alternatives reported beside a token. Bounds the size of frames.
pub(crate) const MAX_LOGPROBS: u32 = 64;

/// One leg of one attempt at a request.
#[derive(Debug)]
pub struct Submission {
    /// Its name here.
    pub id: LegId,
    /// Request id, the same in every process.
    pub request: String,
    /// W3C trace context, or empty.
    pub traceparent: String,
    /// When it arrived.
    pub received: Instant,
    /// From `received` until it must have ended.
    pub deadline: Option<Duration>,
    /// What is to be computed.
    pub sequence: Request,
    /// Which part of it is this worker's.
    pub leg: Leg,
    /// What of its prefix a peer holds.
    pub fetch: Option<Borrowing>,
    /// What is kept of it for peers, once it has ended.
    pub keep: Option<Keep>,
}

/// A prefix to be had from a peer.
#[derive(Clone, Debug)]
pub struct Borrowing {
    /// From whom, and which.
    pub fetch: Fetch,
    /// Whether the leg is refused when it does not come; otherwise it is computed.
    pub required: bool,
}

/// What is kept of a sequence for peers.
#[derive(Clone, Debug)]
pub struct Keep {
    /// Names of the pages that they can use: the full ones of its prompt, without its last token's.
    pub pages: Vec<PageHash>,
    /// How long, counted from its end.
    pub time: Duration,
}

/// A worker's part in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leg {
    /// All of it.
    Local,
    /// Compute the prompt, emit the first token, push the pages to this decode worker.
    Prefill {
        /// The hand-off attempt.
        handoff: u64,
        /// Member id of the decode worker.
        worker: String,
        /// Which life of it.
        incarnation: u64,
        /// `host:port` of its link listener.
        link: String,
    },
    /// Expect the pages from this prefill worker, then decode.
    Decode {
        /// The hand-off attempt.
        handoff: u64,
        /// Member id of the prefill worker.
        worker: String,
        /// Which life of it.
        incarnation: u64,
    },
    /// Compute the prompt and answer with its embedding.
    Embed(Pooling),
}

/// Reads a grammar off the wire. It is compiled elsewhere: that takes a while.
pub(crate) fn decode_grammar(grammar: proto::Grammar) -> Result<Spec, String> {
    use proto::grammar::Kind as Wire;
    let kind = match grammar.kind() {
        Wire::JsonSchema => Kind::JsonSchema,
        Wire::Regex => Kind::Regex,
        Wire::Lark => Kind::Lark,
        Wire::Choice => Kind::Choice,
        Wire::Unspecified => return Err(format!("grammar: kind {} is not known here", grammar.kind)),
    };
    let thoughts = grammar.thoughts.map(|thoughts| {
        let proto::Thoughts { start, end, begun, budget } = thoughts;
        if end.is_empty() || (start.is_empty() && !begun) {
            return Err(format!("grammar: thoughts have the marks {start:?} and {end:?}; neither may be empty"));
        }
        Ok(Thoughts { start, end, begun, budget })
    });
    Ok(Spec { kind, text: grammar.text, whitespace: grammar.whitespace, thoughts: thoughts.transpose()? })
}

/// What the checks need to know of the model.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) vocab_size: u32,
    pub(crate) page_tokens: usize,
    /// Tokens that end a sequence unless the request ignores them.
    pub(crate) eos: Vec<TokenId>,
    /// What can be added to it.
    pub(crate) adapters: Option<Arc<Adapters>>,
}

impl Model {
    /// Looks up what a submission adds to the model. Another worker may have what this one lacks.
    fn adapter(&self, named: Option<&proto::AdapterRef>) -> Result<Option<Arc<Adapter>>, End> {
        let Some(proto::AdapterRef { name, id }) = named else { return Ok(None) };
        let found = self.adapters.as_ref().and_then(|adapters| adapters.get(id));
        found.map(Some).ok_or_else(|| End::Refused(format!("adapter `{name}` ({id}) is not loaded here")))
    }
}

impl Submission {
    /// Reads a submission off the wire. Errors name the field and the value.
    pub(crate) fn decode(id: LegId, submit: proto::Submit, model: &Model) -> Result<Self, End> {
        let adapter = model.adapter(submit.adapter.as_ref())?;
        Self::check(id, submit, adapter, model).map_err(End::Invalid)
    }

    fn check(id: LegId, submit: proto::Submit, adapter: Option<Arc<Adapter>>, model: &Model) -> Result<Self, String> {
        let leg = decode_leg(submit.leg.ok_or("leg is missing")?)?;
        let ids = proto::unpack(&submit.tokens)
            .ok_or_else(|| format!("tokens has {} bytes, not four for each token", submit.tokens.len()))?;
        let tokens = ids.len();
        let prompt_tokens = submit.prompt_tokens as usize;
        if !(1..=tokens).contains(&prompt_tokens) {
            return Err(format!("prompt_tokens {prompt_tokens} is not within 1..={tokens}, the tokens given"));
        }
        for (position, &token) in ids.iter().enumerate() {
            check_token(token, model, || format!("token {position}"))?;
        }
        if let Some(count) = submit.prompt_logprobs.filter(|&count| count > MAX_LOGPROBS) {
            return Err(format!("prompt_logprobs is {count}, more than {MAX_LOGPROBS}"));
        }
        if matches!(leg, Leg::Embed(_)) && (tokens > prompt_tokens || submit.prompt_logprobs.is_some()) {
            return Err("an embed leg has tokens beyond its prompt, or asks for prompt_logprobs".into());
        }
        let stop = decode_stop(submit.stop.unwrap_or_default(), model)?;
        let emitted = tokens - prompt_tokens;
        if stop.max_tokens <= emitted {
            return Err(format!("max_tokens {} leaves nothing after {emitted} emitted tokens", stop.max_tokens));
        }
        let root = root_salt(&submit.salt, adapter.as_ref().map(|adapter| adapter.id()));
        let sequence = Request {
            history: History::new(&root, ids, model.page_tokens),
            prompt_tokens,
            adapter,
            sampling: decode_sampling(submit.sampling.ok_or("sampling is missing")?, model)?,
            stop,
            grammar: None,
            prompt_logprobs: submit.prompt_logprobs,
            priority: submit.priority,
            until: match leg {
                Leg::Local | Leg::Decode { .. } => Until::End,
                Leg::Prefill { .. } => Until::FirstToken,
                Leg::Embed(pooling) => Until::Embedding(pooling),
            },
        };
        let deadline = (submit.deadline_ms > 0).then(|| Duration::from_millis(submit.deadline_ms.into()));
        let fetch = submit.fetch.map(|fetch| decode_fetch(fetch, &sequence.history)).transpose()?;
        let keep = (submit.keep_ms > 0).then(|| Keep {
            pages: sequence.history.hashes()[..(prompt_tokens - 1) / model.page_tokens].to_vec(),
            time: Duration::from_millis(submit.keep_ms.into()),
        });
        let (request, traceparent) = (submit.request, submit.traceparent);
        Ok(Self { id, request, traceparent, received: Instant::now(), deadline, sequence, leg, fetch, keep })
    }
}

fn check_token(token: TokenId, model: &Model, what: impl FnOnce() -> String) -> Result<(), String> {
    if token < model.vocab_size {
        return Ok(());
    }
    Err(format!("{} is {token}, outside the vocabulary of {}", what(), model.vocab_size))
}

fn decode_fetch(fetch: proto::Fetch, history: &History) -> Result<Borrowing, String> {
    let proto::Fetch { handoff, worker, incarnation, link, pages, required } = fetch;
    if worker.is_empty() || link.is_empty() {
        return Err("fetch names no worker or no link".into());
    }
    let (pages, known) = (pages as usize, history.hashes().len());
    if !(1..=known).contains(&pages) {
        return Err(format!("fetch asks for {pages} pages, not 1 to {known}, the full pages of the tokens given"));
    }
    let source = Peer { worker, incarnation, link };
    let fetch = Fetch { handoff: HandoffId(handoff), source, pages: history.hashes()[..pages].to_vec() };
    Ok(Borrowing { fetch, required })
}

fn decode_leg(leg: proto::submit::Leg) -> Result<Leg, String> {
    let named = |worker: String| if worker.is_empty() { Err("leg names no worker") } else { Ok(worker) };
    Ok(match leg {
        proto::submit::Leg::Local(proto::Local {}) => Leg::Local,
        proto::submit::Leg::Prefill(proto::PrefillLeg { handoff, worker, incarnation, link }) => {
            if link.is_empty() {
                return Err("prefill leg names no link".into());
            }
            Leg::Prefill { handoff, worker: named(worker)?, incarnation, link }
        }
        proto::submit::Leg::Decode(proto::DecodeLeg { handoff, worker, incarnation }) => {
            Leg::Decode { handoff, worker: named(worker)?, incarnation }
        }
        proto::submit::Leg::Embed(embed) => match embed.pooling() {
            proto::embed::Pooling::Last => Leg::Embed(Pooling::Last),
            proto::embed::Pooling::Mean => Leg::Embed(Pooling::Mean),
            proto::embed::Pooling::Unspecified => return Err(format!("pooling {} is not known here", embed.pooling)),
        },
    })
}

fn decode_stop(stop: proto::Stop, model: &Model) -> Result<Stop, String> {
    for &token in &stop.token_ids {
        check_token(token, model, || "stop id".into())?;
    }
    let mut ids = stop.token_ids;
    if !stop.ignore_eos {
        ids.extend(&model.eos);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(Stop { max_tokens: stop.max_tokens as usize, min_tokens: stop.min_tokens as usize, ids })
}

fn decode_sampling(sampling: proto::Sampling, model: &Model) -> Result<Sampling, String> {
    let proto::Sampling { temperature, top_p, top_k, min_p, seed, choice, .. } = sampling;
    let proto::Sampling { repetition_penalty, frequency_penalty, presence_penalty, logprobs, .. } = sampling;
    let range = |name: &str, value: f32, good: bool, range: &str| {
        if good && value.is_finite() { Ok(()) } else { Err(format!("{name} is {value}, not {range}")) }
    };
    range("temperature", temperature, temperature >= 0.0, "0 or more")?;
    range("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "within (0, 1]")?;
    range("min_p", min_p, (0.0..=1.0).contains(&min_p), "within [0, 1]")?;
    range("repetition_penalty", repetition_penalty, repetition_penalty > 0.0, "above 0")?;
    range("frequency_penalty", frequency_penalty, true, "finite")?;
    range("presence_penalty", presence_penalty, true, "finite")?;
    for token in &sampling.allowed_tokens {
        check_token(*token, model, || "allowed_tokens token".into())?;
    }
    for word in &sampling.bad_words {
        if word.tokens.is_empty() {
            return Err("bad_words holds an empty word".into());
        }
        word.tokens.iter().try_for_each(|token| check_token(*token, model, || "bad_words token".into()))?;
    }
    for bias in &sampling.logit_bias {
        check_token(bias.token, model, || "logit_bias token".into())?;
        range("logit_bias", bias.bias, true, "finite")?;
    }
    if let Some(logprobs) = logprobs.filter(|&logprobs| logprobs > MAX_LOGPROBS) {
        return Err(format!("logprobs is {logprobs}, more than {MAX_LOGPROBS}"));
    }
    Ok(Sampling {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        choice,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias: sampling.logit_bias.into_iter().map(|bias| (bias.token, bias.bias)).collect(),
        allowed_tokens: sampling.allowed_tokens,
        bad_words: sampling.bad_words.into_iter().map(|word| word.tokens).collect(),
        logprobs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StreamId;

    fn model() -> Model {
        Model { vocab_size: 100, page_tokens: 4, eos: vec![2], adapters: None }
    }

    fn submit() -> proto::Submit {
        proto::Submit {
            attempt: 7,
            tokens: proto::pack(&[&[5, 6, 7]]),
            prompt_tokens: 2,
            sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
            stop: Some(proto::Stop { max_tokens: 9, token_ids: vec![8, 2, 8], ..Default::default() }),
            leg: Some(proto::submit::Leg::Local(proto::Local {})),
            ..Default::default()
        }
    }

    fn decode(change: impl FnOnce(&mut proto::Submit)) -> Result<Submission, End> {
        let mut submit = submit();
        change(&mut submit);
        Submission::decode(LegId { stream: StreamId(1), attempt: submit.attempt }, submit, &model())
    }

    #[test]
    fn end_of_sequence_is_a_stop_id_unless_ignored() {
        assert_eq!(decode(|_| {}).unwrap().sequence.stop.ids, [2, 8]);
        let ignoring = decode(|submit| {
            submit.stop =
                Some(proto::Stop { max_tokens: 9, ignore_eos: true, token_ids: vec![8], ..Default::default() });
        });
        assert_eq!(ignoring.unwrap().sequence.stop.ids, [8]);
    }

    #[test]
    fn a_prefill_leg_goes_to_its_first_token() {
        let prefill = proto::PrefillLeg { handoff: 1, worker: "d".into(), incarnation: 2, link: "h:1".into() };
        let submission = decode(|submit| submit.leg = Some(proto::submit::Leg::Prefill(prefill))).unwrap();
        assert_eq!(submission.sequence.until, Until::FirstToken);
    }

    #[test]
    fn an_embed_leg_is_a_prompt_and_nothing_else() {
        use proto::embed::Pooling as Wire;
        let embed = |pooling: Wire| Some(proto::submit::Leg::Embed(proto::Embed { pooling: pooling.into() }));
        let leg = |pooling, prompt_tokens| {
            decode(|submit| (submit.leg, submit.prompt_tokens) = (embed(pooling), prompt_tokens))
        };
        let submission = leg(Wire::Mean, 3).unwrap();
        assert_eq!(
            (submission.sequence.until, submission.leg),
            (Until::Embedding(Pooling::Mean), Leg::Embed(Pooling::Mean))
        );
        assert_eq!(leg(Wire::Last, 3).unwrap().leg, Leg::Embed(Pooling::Last));
        let invalid = |why: &str| End::Invalid(why.into());
        assert_eq!(leg(Wire::Unspecified, 3).unwrap_err(), invalid("pooling 0 is not known here"));
        let beyond = "an embed leg has tokens beyond its prompt, or asks for prompt_logprobs";
        assert_eq!(leg(Wire::Last, 2).unwrap_err(), invalid(beyond));
    }

    #[test]
    fn an_adapter_that_is_not_here_may_be_elsewhere() {
        let adapter = proto::AdapterRef { name: "poet".into(), id: "12ab".into() };
        let refused = decode(|submit| submit.adapter = Some(adapter)).unwrap_err();
        assert_eq!(refused, End::Refused("adapter `poet` (12ab) is not loaded here".into()));
    }

    #[test]
    fn what_no_worker_could_do_is_named() {
        fn check(change: impl FnOnce(&mut proto::Submit), expected: &str) {
            assert_eq!(decode(change).unwrap_err(), End::Invalid(expected.into()));
        }
        fn sampling(change: impl FnOnce(&mut proto::Sampling)) -> impl FnOnce(&mut proto::Submit) {
            |submit| change(submit.sampling.as_mut().unwrap())
        }
        check(|submit| submit.tokens = proto::pack(&[&[5, 100, 7]]), "token 1 is 100, outside the vocabulary of 100");
        check(|submit| submit.tokens.truncate(7), "tokens has 7 bytes, not four for each token");
        check(|submit| submit.tokens.clear(), "prompt_tokens 2 is not within 1..=0, the tokens given");
        check(|submit| submit.prompt_tokens = 0, "prompt_tokens 0 is not within 1..=3, the tokens given");
        check(|submit| submit.prompt_tokens = 4, "prompt_tokens 4 is not within 1..=3, the tokens given");
        check(|submit| submit.stop = None, "max_tokens 0 leaves nothing after 1 emitted tokens");
        check(|submit| submit.leg = None, "leg is missing");
        check(|submit| submit.sampling = None, "sampling is missing");
        check(sampling(|s| s.temperature = f32::NAN), "temperature is NaN, not 0 or more");
        check(sampling(|s| s.top_p = 0.0), "top_p is 0, not within (0, 1]");
        check(sampling(|s| s.min_p = 1.5), "min_p is 1.5, not within [0, 1]");
        check(sampling(|s| s.repetition_penalty = 0.0), "repetition_penalty is 0, not above 0");
        check(sampling(|s| s.presence_penalty = f32::INFINITY), "presence_penalty is inf, not finite");
        check(sampling(|s| s.logprobs = Some(65)), "logprobs is 65, more than 64");
        check(|submit| submit.prompt_logprobs = Some(65), "prompt_logprobs is 65, more than 64");
        let bias = vec![proto::LogitBias { token: 200, bias: 0.0 }];
        check(sampling(|s| s.logit_bias = bias), "logit_bias token is 200, outside the vocabulary of 100");
        check(sampling(|s| s.allowed_tokens = vec![100]), "allowed_tokens token is 100, outside the vocabulary of 100");
        let word = |tokens| vec![proto::TokenSequence { tokens }];
        check(sampling(|s| s.bad_words = word(vec![1, 100])), "bad_words token is 100, outside the vocabulary of 100");
        check(sampling(|s| s.bad_words = word(vec![])), "bad_words holds an empty word");
        let decode_leg = proto::DecodeLeg::default();
        check(|submit| submit.leg = Some(proto::submit::Leg::Decode(decode_leg)), "leg names no worker");
    }
}
