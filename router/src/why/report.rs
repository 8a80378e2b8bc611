//! A record as its readers see it: whole, as JSON, or in one line, as a header.

use super::{Attempt, Record, Why};
use crate::{
    error::Error,
    fleet::{Considered, Worker},
};
use placement::Cost;
use serde_json::{Map, Value, json};
use std::{sync::Arc, time::Duration};

impl Why {
    /// Returns all that is known of a request, by its id or that of its answer (`chatcmpl-…`).
    pub(crate) fn report(&self, id: &str) -> Result<Value, Error> {
        let state = self.state();
        let of_answer = || id.split_once(['-', '_']).and_then(|(_, request)| state.records.get_key_value(request));
        let found = state.records.get_key_value(id).or_else(of_answer);
        let Some((id, record)) = found else {
            let problem = if self.budget_bytes == 0 {
                "no records are kept (why_bytes = 0)"
            } else {
                "it never came this way, or long ago"
            };
            return Err(Error::NotFound(format!("nothing is known of request {id:?}: {problem}")));
        };
        Ok(record.report(id))
    }

    /// Returns the first choice's way in one line.
    pub(crate) fn line(&self, id: &str) -> Option<String> {
        let state = self.state();
        let record = state.records.get(id)?;
        let queued = format!("queued={:.1}", ms(record.waited));
        let Some(attempt) = record.attempts.iter().rev().find(|attempt| attempt.choice == 0) else {
            return Some(format!("refused; {queued}"));
        };
        let mut line = Vec::new();
        if let Some(chosen) = attempt.considered.iter().find(|c| c.chosen) {
            line.push(chosen.way());
            line.push(format!("cached={}/{}", chosen.cached_tokens, chosen.tokens));
            line.push(format!("predicted={:.1}", chosen.cost.ttft()));
        }
        line.extend(attempt.spoke.map(|spoke| format!("ttft={:.1}", ms(spoke))));
        line.push(queued);
        line.extend(attempt.runner_up().map(|(other, more)| format!("next={} {more:+.1}", other.way())));
        let attempts = record.attempts.iter().filter(|attempt| attempt.choice == 0).count();
        line.push(format!("attempts={attempts}"));
        Some(line.join("; "))
    }
}

impl Record {
    fn report(&self, id: &str) -> Value {
        let arrived = self.arrived.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let first = self.attempts.iter().filter_map(|a| Some(a.placed + a.spoke?)).min();
        json!({
            "id": id,
            "object": "request.why",
            "arrived": rounded(arrived.as_secs_f64()),
            "priority": self.class,
            "queued_ms": rounded(ms(self.waited)),
            "wanted_ttft_ms": self.objective.map(|wanted| rounded(ms(wanted))),
            "ttft_ms": first.map(|first| rounded(ms(first))),
            "refused": self.refused,
            "attempts": self.attempts.iter().map(Attempt::report).collect::<Vec<_>>(),
            "attempts_left_out": self.left_out,
        })
    }
}

impl Attempt {
    fn report(&self) -> Value {
        let chosen = self.considered.iter().find(|c| c.chosen);
        json!({
            "choice": self.choice,
            "placed_ms": rounded(ms(self.placed)),
            "chosen": chosen.map(Considered::way),
            "runner_up": self.runner_up().map(|(other, more)| json!({"way": other.way(), "costs_more_ms": rounded(more)})),
            "predicted_ttft_ms": chosen.map(|chosen| rounded(chosen.cost.ttft())),
            "ttft_ms": self.spoke.map(|spoke| rounded(ms(spoke))),
            "failed": self.failed.as_ref().map(|f| json!({"worker": f.worker, "message": f.message})),
            "candidates": self.considered.iter().map(Considered::report).collect::<Vec<_>>(),
        })
    }

    /// The cheapest of those that were not chosen, and how much more it costs than the one that was.
    fn runner_up(&self) -> Option<(&Considered, f64)> {
        let chosen = self.considered.iter().find(|c| c.chosen)?;
        let other = self.considered.iter().find(|c| !c.chosen)?;
        Some((other, other.cost.total() - chosen.cost.total()))
    }
}

impl Considered {
    /// Who would compute and who decode, in words.
    fn way(&self) -> String {
        match &self.prefill {
            Some(prefill) => format!("remote {}>{}", prefill.id, self.decode.id),
            None => format!("local {}", self.decode.id),
        }
    }

    fn report(&self) -> Value {
        json!({
            "where": if self.prefill.is_some() { "remote" } else { "local" },
            "prefill": self.prefill.as_ref().map(|worker: &Arc<Worker>| &worker.id),
            "decode": self.decode.id,
            "chosen": self.chosen,
            "cached_tokens": self.cached_tokens,
            "fetched_from": self.fetched_from.as_ref().map(|worker| &worker.id),
            "computed_tokens": self.tokens - self.cached_tokens,
            "predicted_ttft_ms": rounded(self.cost.ttft()),
            "total_ms": rounded(self.cost.total()),
            "cost_ms": terms(&self.cost),
        })
    }
}

/// Every term of a cost by its name.
fn terms(cost: &Cost) -> Map<String, Value> {
    cost.terms().into_iter().map(|(name, ms)| (name.to_string(), rounded(ms))).collect()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// To three places: nobody reads more.
fn rounded(value: f64) -> Value {
    json!((value * 1e3).round() / 1e3)
}
