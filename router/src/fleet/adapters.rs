//! Adapters across the fleet: which are served, and how all workers take one or give it up.
//!
//! Every worker says which adapters it has, over its stream, so the list is as fresh as its tokens. An adapter is served while
//! workers that have it make a whole path. Its id names its contents: two workers that hold different things under one name
//! never share a request.

use super::{Fleet, session::Unsent};
use crate::error::Error;
use futures::future::join_all;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::timeout;

/// An adapter as its workers describe it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Adapter {
    pub(crate) name: String,
    /// Names the contents.
    pub(crate) id: String,
    /// Where a worker read it.
    pub(crate) path: String,
}

/// What workers are asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Read `path`, on their own machines, and serve it as `name`.
    Load {
        name: String,
        path: String,
    },
    Unload {
        name: String,
    },
}

/// Why a worker did not do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The name is in use.
    Exists(String),
    /// No adapter has the name.
    Unknown(String),
    /// No such directory.
    NotFound(String),
    /// What is there cannot be used.
    Unusable(String),
    /// It did not answer.
    Silent(String),
}

/// What a worker made of a change.
#[derive(Clone, Debug)]
struct Answer {
    worker: String,
    said: Result<(), Refusal>,
}

impl Fleet {
    /// Returns the adapters that are served now, one for each name, sorted.
    pub(crate) fn adapters(&self) -> Vec<Arc<Adapter>> {
        let mut served = BTreeMap::new();
        for adapter in self.known_adapters(|_| true) {
            if !served.contains_key(&adapter.name) && self.has_path(Some(&adapter.id)) {
                served.insert(adapter.name.clone(), adapter);
            }
        }
        served.into_values().collect()
    }

    /// Returns the adapter that is served as `name`.
    pub(crate) fn adapter(&self, name: &str) -> Option<Arc<Adapter>> {
        self.known_adapters(|adapter| adapter.name == name).into_iter().find(|adapter| self.has_path(Some(&adapter.id)))
    }

    /// Asks all attached workers for a change, and waits for their answers for at most `limit`. A load that fails on one of them is
    /// taken back on the others.
    pub(crate) async fn change_adapters(&self, change: Change, limit: Duration) -> Result<(), Error> {
        let answers = self.ask(&change, limit, |_| true).await;
        let verdict = judge(&change, &answers).and_then(|()| self.check_same(&change));
        if let (Err(_), Change::Load { name, .. }) = (&verdict, &change) {
            let took: Vec<&str> = answers.iter().filter(|a| a.said.is_ok()).map(|a| a.worker.as_str()).collect();
            self.ask(&Change::Unload { name: name.clone() }, limit, |worker| took.contains(&worker)).await;
        }
        verdict
    }

    async fn ask(&self, change: &Change, limit: Duration, of: impl Fn(&str) -> bool) -> Vec<Answer> {
        let attached = self.workers().into_iter().filter(|worker| of(&worker.id)).filter_map(|worker| {
            let session = worker.state().attached.as_ref()?.session.clone();
            Some((worker.id.clone(), session))
        });
        let ask = attached.map(async |(worker, session)| {
            let lost = || Refusal::Silent(Unsent::Gone.to_string());
            let said = match timeout(limit, session.change_adapters(change)).await {
                Ok(answer) => answer.unwrap_or_else(|| Err(lost())),
                Err(_) => Err(Refusal::Silent(format!("no answer within {limit:?}"))),
            };
            Answer { worker, said }
        });
        let answers = join_all(ask).await;
        self.changed();
        answers
    }

    /// Refuses a load after which one name means two things.
    fn check_same(&self, change: &Change) -> Result<(), Error> {
        let Change::Load { name, path } = change else { return Ok(()) };
        let mut ids: Vec<String> = self.known_adapters(|a| a.name == *name).iter().map(|a| a.id.clone()).collect();
        ids.dedup();
        if ids.len() < 2 {
            return Ok(());
        }
        let problem = format!("{path} is not the same on all workers: they found {}; unload it first", ids.join(", "));
        Err(Error::invalid("lora_path", problem))
    }

    /// Returns what attached workers have, sorted, each once.
    fn known_adapters(&self, wanted: impl Fn(&Adapter) -> bool) -> Vec<Arc<Adapter>> {
        let sessions =
            self.workers().into_iter().filter_map(|worker| Some(worker.state().attached.as_ref()?.session.clone()));
        let mut known: Vec<Arc<Adapter>> =
            sessions.flat_map(|session| session.adapters().to_vec()).filter(|adapter| wanted(adapter)).collect();
        known.sort_unstable();
        known.dedup_by(|a, b| (&a.name, &a.id) == (&b.name, &b.id));
        known
    }
}

/// Says what the answers of all workers come to. Pure.
///
/// A worker that has the name already is no failure as long as another one took it: so a load that is repeated reaches workers
/// that joined since.
fn judge(change: &Change, answers: &[Answer]) -> Result<(), Error> {
    if answers.is_empty() {
        return Err(unavailable("no worker is attached".into()));
    }
    let failures = || answers.iter().filter_map(|answer| Some((answer, answer.said.as_ref().err()?)));
    let harmless = |refusal: &Refusal| matches!(refusal, Refusal::Exists(_) | Refusal::Unknown(_));
    let all_words = |refusals: &mut dyn Iterator<Item = (&Answer, &Refusal)>| {
        let word = |(answer, refusal): (&Answer, &Refusal)| format!("worker {}: {}", answer.worker, refusal.words());
        refusals.map(word).collect::<Vec<_>>().join("; ")
    };
    let mut serious = failures().filter(|(_, refusal)| !harmless(refusal)).peekable();
    if serious.peek().is_some() {
        let silent = serious.clone().any(|(_, refusal)| matches!(refusal, Refusal::Silent(_)));
        let unusable = serious.clone().any(|(_, refusal)| matches!(refusal, Refusal::Unusable(_)));
        let words = all_words(&mut serious);
        return Err(match (silent, unusable) {
            (true, _) => unavailable(words),
            (false, true) => Error::invalid("lora_path", words),
            (false, false) => Error::NotFound(words),
        });
    }
    if failures().count() < answers.len() {
        return Ok(());
    }
    Err(match change {
        Change::Load { .. } => Error::invalid("lora_name", all_words(&mut failures())),
        Change::Unload { name } => Error::NotFound(format!("adapter `{name}` is not loaded on any worker")),
    })
}

pub(super) fn unavailable(message: String) -> Error {
    Error::Unavailable { message, retry_after: Duration::from_secs(1) }
}

impl Refusal {
    fn words(&self) -> &str {
        match self {
            Refusal::Exists(words)
            | Refusal::Unknown(words)
            | Refusal::NotFound(words)
            | Refusal::Unusable(words)
            | Refusal::Silent(words) => words,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(said: &[Result<(), Refusal>]) -> Vec<Answer> {
        said.iter().enumerate().map(|(i, said)| Answer { worker: format!("w{i}"), said: said.clone() }).collect()
    }

    fn load(said: &[Result<(), Refusal>]) -> Result<(), Error> {
        judge(&Change::Load { name: "a".into(), path: "/a".into() }, &answers(said))
    }

    #[test]
    fn one_failure_fails_a_load_and_names_the_worker() {
        let unusable = || Err(Refusal::Unusable("r: 9 is too large".into()));
        let error = load(&[Ok(()), unusable()]).unwrap_err();
        assert_eq!(error, Error::invalid("lora_path", "worker w1: r: 9 is too large"));
        let missing = || Err(Refusal::NotFound("/a: no such directory".into()));
        assert!(
            matches!(load(&[missing(), Ok(())]), Err(Error::NotFound(words)) if words == "worker w0: /a: no such directory")
        );
        let silent = || Err(Refusal::Silent("no answer".into()));
        assert!(matches!(load(&[unusable(), silent()]), Err(Error::Unavailable { .. })));
        assert!(matches!(load(&[]), Err(Error::Unavailable { .. })));
    }

    #[test]
    fn a_repeated_load_reaches_those_that_lack_it() {
        let exists = || Err(Refusal::Exists("adapter `a` is loaded already".into()));
        assert_eq!(load(&[exists(), Ok(())]), Ok(()));
        assert!(matches!(load(&[exists(), exists()]), Err(Error::Invalid { param: Some(p), .. }) if p == "lora_name"));
    }

    #[test]
    fn an_unload_needs_one_worker_that_had_it() {
        let unload = |said: &[Result<(), Refusal>]| judge(&Change::Unload { name: "a".into() }, &answers(said));
        let unknown = || Err(Refusal::Unknown("adapter `a` is not loaded".into()));
        assert_eq!(unload(&[Ok(()), unknown()]), Ok(()));
        assert!(matches!(unload(&[unknown(), unknown()]), Err(Error::NotFound(words)) if words.contains("`a`")));
    }
}
